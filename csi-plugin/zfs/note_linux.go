package zfs

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/cradlestack/cradlestack/csi-plugin/volume"
)

// noteProperty is of the pools' datasets. Volumes inherit it, which is no matter.
const noteProperty = "org.cradlestack:note"

// Note is volume.Noter's.
func (b *Backend) Note(ctx context.Context) (string, error) {
	var missing error
	for _, p := range b.pools {
		out, err := zfs(ctx, "get", "-H", "-o", "value", noteProperty, p.Dataset)
		if errors.Is(err, errNoDataset) {
			err = p.there(ctx)
		}
		if errors.Is(err, volume.ErrUnavailable) {
			missing = errors.Join(missing, fmt.Errorf("pool %s: %w", p.Name, err))
			continue
		}
		if err != nil {
			return "", fmt.Errorf("pool %s: %w", p.Name, err)
		}
		if line := strings.TrimSuffix(out, "\n"); line != "-" {
			return line, nil
		}
	}
	return "", missing
}

// SetNote is volume.Noter's. It is in all pools: what one that is not there would have said is known then.
func (b *Backend) SetNote(ctx context.Context, line string) error {
	for _, p := range b.pools {
		if _, err := zfs(ctx, "set", noteProperty+"="+line, p.Dataset); err != nil {
			return fmt.Errorf("pool %s: %w", p.Name, err)
		}
	}
	return nil
}
