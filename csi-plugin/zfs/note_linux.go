package zfs

import (
	"context"
	"errors"
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
		if err = p.said(ctx, err); errors.Is(err, volume.ErrUnavailable) {
			missing = errors.Join(missing, err)
			continue
		}
		if err != nil {
			return "", err
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
		_, err := zfs(ctx, "set", noteProperty+"="+line, p.Dataset)
		if err = p.said(ctx, err); err != nil {
			return err
		}
	}
	return nil
}
