package zfs

import (
	"context"
	"errors"
	"fmt"
	"path"
	"slices"
	"strings"
)

// Repair is volume.Repairer's: it removes snapshots that were made for a clone, or deleted, by a call that did not come to its end, and
// datasets that a copy to or from cold storage has left.
func (b *Backend) Repair(ctx context.Context, look bool, report func(string)) error {
	for _, p := range b.pools {
		volumes, err := zfs(ctx, "list", "-Hp", "-t", "filesystem,volume", "-d", "1", "-o", columns, p.Dataset)
		if err != nil {
			return fmt.Errorf("pool %s: %w", p.Name, err)
		}
		for _, row := range rows(volumes) {
			if _, err := read(row); err != nil {
				report(fmt.Sprintf("a volume can't be read: %v", err)) // for a person to look at
			}
			name := path.Base(row[0])
			volume, received := strings.CutPrefix(name, receiving)
			if received {
				name = volume // which the lock is called by
			}
			if received || strings.HasPrefix(name, copying) {
				err := b.locks.Alone(ctx, name, func(ctx context.Context) error {
					report(row[0] + ": a copy to or from cold storage did not come to its end")
					if look {
						return nil
					}
					return (&found{dataset: row[0]}).destroy(ctx)
				})
				if err != nil {
					return err
				}
			}
		}
		all, err := snaps(ctx, p.Dataset, 2)
		if err != nil {
			return fmt.Errorf("pool %s: %w", p.Name, err)
		}
		for _, s := range all {
			if s.left() {
				if err := b.repair(ctx, s, look, report); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

// left says whether a call that made or hid the snapshot is not done with it.
func (s snap) left() bool { return s.hidden() && !s.deferred }

func (b *Backend) repair(ctx context.Context, s snap, look bool, report func(string)) error {
	return b.locks.Alone(ctx, s.id().Volume, func(ctx context.Context) error {
		all, err := snaps(ctx, s.dataset(), 1)
		if errors.Is(err, errNoDataset) {
			return nil
		}
		if err != nil || !slices.ContainsFunc(all, func(now snap) bool { return now.name == s.name && now.left() }) {
			return err
		}
		report(fmt.Sprintf("%s: it was for a clone, or deleted, and the call did not come to its end", s.name))
		if look {
			return nil
		}
		return s.drop(ctx)
	})
}
