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
// that were not completed, and keys of volumes that are not there any more.
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
		id, copied := strings.CutPrefix(name, copying)
		err := b.locks().Alone(ctx, id, func(ctx context.Context) error {
			m := b.mounting(name)
			st, err := m.state()
			if err != nil {
				return err
			}
			if st == hanging { // as all others do then, each for its time: a plugin would not begin
				return m.errHangs()
			}
			if copied {
				report(fmt.Sprintf("%s: mounted to copy volume %s, and the copy did not come to its end", m.point(), id))
				if look {
					return nil
				}
				if err := m.down(ctx); err != nil {
					return err
				}
				f, err := s.find(ctx, id)
				if errors.Is(err, volume.ErrNotFound) {
					return nil
				}
				if err != nil {
					return err
				}
				return s.revoke(ctx, f, b.attachment(name))
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
	there := map[string]bool{}
	err = s.each(ctx, func(f *found) error {
		there[f.clientsOf()] = true
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
	if err != nil {
		return err
	}
	return s.repairKeys(ctx, there, look, report)
}

// copiedElsewhere says whether a call of another host copies a volume, or makes it.
func (s *session) copiedElsewhere(ctx context.Context, f *found, look bool, dirs ...string) (bool, error) {
	if !look { // what this host has left would look like it
		if err := s.uncopied(ctx, f); err != nil {
			return false, err
		}
	}
	err := s.elsewhere(ctx, f, dirs...)
	if errors.Is(err, volume.ErrInUse) {
		return true, nil
	}
	return false, err
}

// repair removes snapshots for clones.
func (s *session) repair(ctx context.Context, f *found, look bool, report func(string)) error {
	for name, t := range f.snapshots {
		if !t.Hidden {
			continue
		}
		err := s.b.locks().Alone(ctx, f.id, func(ctx context.Context) error {
			if busy, err := s.copiedElsewhere(ctx, f, look, filepath.Dir(f.path)); err != nil || busy {
				return err
			}
			report(fmt.Sprintf("%s@%s: it was for a clone, and the call did not come to its end", f.id, name))
			if look {
				return nil
			}
			return s.drop(ctx, f, name)
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// repairKeys removes keys of volumes of these pools that are not there.
func (s *session) repairKeys(ctx context.Context, there map[string]bool, look bool, report func(string)) error {
	all, err := s.keys(ctx)
	if err != nil {
		return err
	}
	for _, client := range all {
		for _, p := range s.b.pools {
			f := &found{pool: p}
			id, _, ok := strings.Cut(strings.TrimPrefix(client, strings.TrimSuffix(f.clientsOf(), ":")), ":")
			f.id = id
			if !ok || !strings.HasPrefix(client, strings.TrimSuffix((&found{pool: p}).clientsOf(), ":")) || !volume.ValidName(id) || there[f.clientsOf()] {
				continue
			}
			err := s.b.locks().Alone(ctx, id, func(ctx context.Context) error {
				if _, err := s.look(ctx, p, id); !errors.Is(err, volume.ErrNotFound) {
					return err
				}
				report("client." + client + ": the key of a volume that is not there any more")
				if look {
					return nil
				}
				return s.run(ctx, nil, "auth", "rm", "client."+client)
			})
			if err != nil {
				return err
			}
		}
	}
	return nil
}
