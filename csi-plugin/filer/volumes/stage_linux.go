package volumes

import (
	"context"
	"fmt"

	"github.com/cradlestack/cradlestack/csi-plugin/volume"
)

// Stage is volume.Backend's.
func (b *Backend) Stage(ctx context.Context, id string, use volume.Use) (volume.Source, error) {
	v, err := b.Get(ctx, id)
	if err != nil {
		return volume.Source{}, err
	}
	if use.As != volume.AsFiles || v.Block() {
		return volume.Source{}, volume.Invalid("volume", "class %s is of file volumes, which have no block device", v.Class)
	}
	return volume.Source{}, fmt.Errorf("stage volume %s: %w: this host has not its storage, and mounts nothing from the filer; make volumes with the parameter attach=direct, which guests mount", id, volume.ErrForeign)
}

// Unstage is volume.Backend's.
func (b *Backend) Unstage(context.Context, string) error { return nil }
