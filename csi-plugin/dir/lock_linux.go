package dir

import (
	"context"
	"fmt"
	"os"

	"github.com/cradlestack/cradlestack/csi-plugin/mount"
)

// lockFile is in the first pool.
const lockFile = ".lock"

// lock takes the volumes of these names, until it is closed.
func (b *Backend) lock(ctx context.Context, names ...string) (*os.File, error) {
	f, err := b.locks()
	if err != nil {
		return nil, err
	}
	return mount.Lock(ctx, f, names...)
}

// locks is a file in which none is taken yet.
func (b *Backend) locks() (*os.File, error) {
	f, err := b.pools[0].root.OpenFile(lockFile, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("pool %s: %w", b.pools[0].name, storageError(err))
	}
	return f, nil
}
