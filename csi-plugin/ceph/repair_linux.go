package ceph

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/cradlestack/cradlestack/csi-plugin/volume"
)

// Repair is volume.Repairer's: it mounts again what a ceph-fuse that has died has left, unmounts what a copy has, and removes volumes, and snapshots for clones,
// that were not completed, and keys of what this host had mounted before it was started again.
func (b *Backend) Repair(ctx context.Context, look bool, report func(string)) error {
	entries, err := os.ReadDir(filepath.Join(b.config.Dir, "run"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	s, err := b.session(ctx)
	if err != nil {
		return err
	}
	defer s.close()
	for _, e := range entries {
		name := e.Name()
		id, copied := cloneOf(name)
		err := b.locks().Alone(ctx, id, func(ctx context.Context) error {
			m := b.mounting(name)
			if copied {
				report(fmt.Sprintf("%s: mounted to make volume %s, and the copy did not come to its end", m.point(), id))
				if look {
					return nil
				}
				return m.away(ctx)
			}
			st, err := m.state()
			if err != nil {
				return err
			}
			if st == hanging { // as all others do then, each for its time: a plugin would not begin
				return m.errHangs()
			}
			if st == living {
				idle, err := m.idle()
				if err != nil || !idle {
					return err
				}
				report(fmt.Sprintf("volume %s: mounted, and at no place: its attachment, or a copy of its files, did not come to its end", id))
				if look {
					return nil
				}
				if err := s.unstage(ctx, m); !errors.Is(err, volume.ErrInUse) { // by who copies it
					return err
				}
				return nil
			}
			if st != dead {
				return nil
			}
			report(fmt.Sprintf("volume %s: its ceph-fuse has died, or has lost its session with the cluster; what is mounted from it is mounted again, and processes have to open their files anew", id))
			if look {
				return nil
			}
			f, err := s.volume(ctx, id)
			if errors.Is(err, volume.ErrNotFound) {
				return m.down(ctx)
			}
			if err == nil {
				err = s.up(ctx, f)
			}
			return err
		})
		if err != nil {
			return err
		}
	}
	return s.each(ctx, func(f *found) error {
		if f.whole() {
			return s.repair(ctx, f, look, report)
		}
		return b.locks().Alone(ctx, f.id, func(ctx context.Context) error {
			now, err := s.look(ctx, f.pool, f.id)
			if errors.Is(err, volume.ErrNotFound) || err == nil && now.whole() {
				return nil
			}
			if err != nil {
				return err
			}
			if now.Version == 0 && now.has > 0 {
				report(fmt.Sprintf("subvolume %s/%s/%s holds files and is no volume: it is not ours and is left as it is", f.pool.FS, f.pool.Group, f.id))
				return nil
			}
			if busy, err := s.copiedElsewhere(ctx, now, look, now.path, filepath.Dir(now.path)); err != nil || busy {
				return err
			}
			report(fmt.Sprintf("volume %s: it was not completed", f.id))
			if look {
				return nil
			}
			return s.discard(ctx, now)
		})
	})
}

// copiedElsewhere says whether a call of another host copies a volume, or makes it.
func (s *session) copiedElsewhere(ctx context.Context, f *found, look bool, dirs ...string) (bool, error) {
	if !look { // what this host has left would look like it
		if err := s.uncopied(ctx, f); err != nil {
			return false, err
		}
	}
	err := s.elsewhere(ctx, f, dirs...)
	if errors.Is(err, volume.ErrInUse) || errors.Is(err, volume.ErrBusy) {
		return true, nil
	}
	return false, err
}

// repair removes what interrupted copies of a volume have left, with their snapshots, and the keys of what this host had mounted before it was started again.
func (s *session) repair(ctx context.Context, f *found, look bool, report func(string)) error {
	if !f.leftovers(s.b) {
		return nil
	}
	return s.b.locks().Alone(ctx, f.id, func(ctx context.Context) error {
		f, err := s.look(ctx, f.pool, f.id)
		if errors.Is(err, volume.ErrNotFound) {
			return nil
		}
		if err != nil {
			return err
		}
		left := false
		copied := s.copies(ctx, f, func(ctx context.Context, target string) error {
			left = true
			clone, _ := cloneOf(target)
			report(fmt.Sprintf("volume %s: it was copied to volume %s, and the call did not come to its end", f.id, clone))
			if look {
				return nil
			}
			return s.uncopy(ctx, f, target)
		})
		busy := errors.Is(copied, volume.ErrBusy)
		if copied != nil && !busy {
			return copied
		}
		for _, a := range f.attached {
			if a.Host != s.b.config.Host || a.Boot == s.b.boot || strings.HasPrefix(a.Target, copying) {
				continue
			}
			report(fmt.Sprintf("volume %s: the key of what this host had mounted%s before it was started again", f.id, at(a.Target)))
			if look {
				continue
			}
			if err := s.revoke(ctx, f, a.Target); err != nil {
				return err
			}
		}
		if busy {
			return nil
		}
		for name, t := range f.snapshots {
			if !t.Hidden {
				continue
			}
			if !left || !look { // what this host has left would look like a copy
				if busy, err := s.copiedElsewhere(ctx, f, look, filepath.Dir(f.path)); err != nil || busy {
					return err
				}
			}
			report(fmt.Sprintf("%s@%s: it was for a clone, and the call did not come to its end", f.id, name))
			if look {
				continue
			}
			if err := s.drop(ctx, f, name); err != nil {
				return err
			}
		}
		return nil
	})
}

// leftovers says whether something of a volume may have been left.
func (f *found) leftovers(b *Backend) bool {
	for _, t := range f.snapshots {
		if t.Hidden {
			return true
		}
	}
	for _, a := range f.attached {
		if a.Host == b.config.Host && (a.Boot != b.boot || strings.HasPrefix(a.Target, copying)) {
			return true
		}
	}
	return false
}

func at(target string) string {
	if target == "" {
		return ""
	}
	return " at " + target
}
