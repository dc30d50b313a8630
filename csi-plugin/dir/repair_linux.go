package dir

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/cradlestack/cradlestack/csi-plugin/mount"
	"github.com/cradlestack/cradlestack/csi-plugin/tree"
	"github.com/cradlestack/cradlestack/csi-plugin/volume"
)

// Repair is volume.Repairer's: it removes folders that never became whole or that were being removed, thaws file systems whose snapshot
// was not completed, and detaches loop devices that nobody uses.
func (b *Backend) Repair(ctx context.Context, look bool, report func(string)) error {
	var errs []error
	for _, p := range b.pools {
		names, err := p.all(".")
		if err != nil {
			return fmt.Errorf("pool %s: %w", p.name, err)
		}
		ids := map[string]bool{}
		for _, name := range names {
			if id := strings.TrimSuffix(strings.TrimPrefix(name, "."), ":"); volume.ValidName(id) && name != lockFile {
				ids[id] = true
			}
		}
		for _, id := range slices.Sorted(maps.Keys(ids)) {
			errs = append(errs, b.repair(ctx, p, id, look, report))
		}
	}
	return errors.Join(errs...)
}

// atWork is how long Repair waits for another process to be done with a volume.
const atWork = time.Second

func (b *Backend) repair(ctx context.Context, p *pool, id string, look bool, report func(string)) error {
	waiting, cancel := context.WithTimeout(ctx, atWork)
	defer cancel()
	lock, err := b.lock(waiting, id)
	if err != nil {
		if waiting.Err() != nil && ctx.Err() == nil {
			return nil // somebody is at work
		}
		return err
	}
	defer lock.Close()
	rubbish := func(folder string) error {
		if _, err := p.root.Lstat(folder); errors.Is(err, fs.ErrNotExist) {
			return nil
		} else if err != nil {
			return err
		}
		report(fmt.Sprintf("%s: it was not completed, or not removed to its end", filepath.Join(p.path, folder)))
		if look {
			return nil
		}
		return tree.RemoveAll(p.root, folder)
	}
	if err := rubbish(hidden(id)); err != nil {
		return err
	}
	f, err := p.read(id)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		report(fmt.Sprintf("volume %s can't be read: %v", id, err)) // for a person to look at
		return nil
	}
	names, err := p.all(filepath.Join(id, snapshotsDir))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	for _, name := range names {
		folder := filepath.Join(id, snapshotsDir, name)
		if strings.HasPrefix(name, ".") {
			if err := rubbish(folder); err != nil {
				return err
			}
		} else if _, err := p.read(folder); volume.ValidName(name) && err != nil && !errors.Is(err, fs.ErrNotExist) {
			report(fmt.Sprintf("snapshot %s@%s can't be read: %v", id, name, err)) // for a person to look at
		}
	}
	if f.size == 0 {
		return nil
	}
	return f.settle(look, report)
}

// settle is repair's part for what the kernel holds of an image.
func (f *found) settle(look bool, report func(string)) error {
	return mount.EachLoop(f.image(), func(l mount.Loop) error {
		points, err := mount.Points(l.Device)
		if err != nil {
			return err
		}
		if len(points) > 0 {
			if look {
				return nil // whether it is frozen can't be seen
			}
			thawed, err := mount.Thaw(points[0])
			if thawed {
				report(fmt.Sprintf("volume %s: its file system was frozen for a snapshot that was not completed", f.folder))
			}
			return err
		}
		uses, err := mount.Uses(l.Device)
		if err != nil || len(uses) > 0 {
			return err
		}
		report(fmt.Sprintf("volume %s: %s is attached and nobody uses it", f.folder, l.Device))
		if look {
			return nil
		}
		return mount.Release(l)
	})
}

// all returns the names in a folder.
func (p *pool) all(folder string) ([]string, error) {
	d, err := p.root.Open(folder)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	return d.Readdirnames(-1)
}
