package pod

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"sync"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/cradlestack/cradlestack/driver-cradle/boot"
	"github.com/cradlestack/cradlestack/driver-cradle/hostfile"
	"github.com/cradlestack/cradlestack/driver-cradle/image"
	"github.com/cradlestack/cradlestack/spec"
)

// SummonOptions are what Summon needs beside the pod.
type SummonOptions struct {
	Images *image.Store
	Boot   *boot.Package
	Pull   image.PullOptions
	ID     string       // of the pod, 64 lower-case hexadecimal digits; default: that of the disk, or random
	Disk   string       // absolute path of a Disk, which is made where there is none; "": the pod has a scratch disk of its own
	Log    *slog.Logger // of the Dir; may be nil
}

// Summon makes a pod directory: it pulls the images, resolves the pod and makes the scratch disk. The directory must not exist or be
// empty; it becomes a pod in the last step, and what a Summon that was killed left in it is replaced by the next. After an error nothing is left.
func Summon(ctx context.Context, path string, p *spec.Pod, o SummonOptions) (*Dir, error) {
	path, err := filepath.Abs(path)
	if err != nil {
		return nil, err
	}
	if err := p.Validate(); err != nil {
		return nil, err
	}
	if err := vacant(path); err != nil {
		return nil, err
	}
	images, err := pull(ctx, p, o)
	if err != nil {
		return nil, err
	}
	var disk *Disk
	id := o.ID
	if o.Disk != "" {
		switch disk, err = OpenDisk(o.Disk); {
		case errors.Is(err, fs.ErrNotExist):
		case err != nil:
			return nil, err
		case id != "" && id != disk.ID:
			return nil, fmt.Errorf("%w: it is that of pod %.12s, not %.12s: use another disk, or remove it", ErrUnfit, disk.ID, id)
		default:
			id = disk.ID
		}
	}
	if id == "" {
		var raw [32]byte
		rand.Read(raw[:])
		id = hex.EncodeToString(raw[:])
	}
	launch, err := Resolve(p, id, images)
	if err != nil {
		return nil, err
	}
	if disk != nil {
		if err := disk.fits(launch); err != nil {
			return nil, err
		}
	}
	dir, made, err := claim(path)
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	if err := fill(ctx, path, launch, images, o); err != nil {
		return nil, errors.Join(fmt.Errorf("summon %s: %w", path, err), clear(path, made))
	}
	return Open(path, o.Log)
}

// pull brings the images of all containers into the cache.
func pull(ctx context.Context, p *spec.Pod, o SummonOptions) (map[string]*image.Image, error) {
	var mu sync.Mutex
	images := map[string]*image.Image{}
	asked := map[string]bool{}
	g, ctx := errgroup.WithContext(ctx)
	for _, c := range p.Containers {
		if asked[c.Image] {
			continue
		}
		asked[c.Image] = true
		g.Go(func() error {
			img, err := o.Images.Pull(ctx, c.Image, o.Pull)
			mu.Lock()
			defer mu.Unlock()
			images[c.Image] = img
			return err
		})
	}
	return images, g.Wait()
}

// claim makes sure that path is a directory for nothing but this pod, and that no other Summon is at work there as long as the file, which is the
// directory, is open; made says that it was made.
func claim(path string) (dir *os.File, made bool, err error) {
	if err := vacant(path); err != nil {
		return nil, false, err
	}
	err = os.Mkdir(path, 0o700)
	if made = err == nil; !made && !errors.Is(err, fs.ErrExist) {
		return nil, false, err
	}
	busy := fmt.Errorf("%s: another process is just making a pod there: name another directory", path)
	if dir, err = os.Open(path); errors.Is(err, fs.ErrNotExist) {
		return nil, false, busy
	} else if err != nil {
		return nil, false, err
	}
	defer func() {
		if err != nil {
			dir.Close()
		}
	}()
	switch err := unix.Flock(int(dir.Fd()), unix.LOCK_EX|unix.LOCK_NB); {
	case errors.Is(err, unix.EWOULDBLOCK):
		return nil, false, busy
	case err != nil && !errors.Is(err, unix.EBADF) && !errors.Is(err, unix.ENOLCK) && !errors.Is(err, unix.EOPNOTSUPP): // NFS has no such locks
		return nil, false, fmt.Errorf("lock %s: %w", path, err)
	}
	// Who had it before may have finished, or removed it.
	if have, err := dir.Stat(); err != nil {
		return nil, false, err
	} else if now, err := os.Stat(path); err != nil || !os.SameFile(have, now) {
		return nil, false, busy
	}
	if err := vacant(path); err != nil {
		return nil, false, err
	}
	if made {
		return dir, true, nil
	}
	if err := clear(path, false); err != nil {
		return nil, false, err
	}
	return dir, false, os.Chmod(path, 0o700)
}

// vacant says why a pod can't be made at path: something is there that no Summon has left half made.
func vacant(path string) error {
	entries, err := os.ReadDir(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, e := range entries {
		switch e.Name() {
		case LaunchFile:
			return fmt.Errorf("%s is a pod already: kcradle rm %[1]s removes it", path)
		case BootLink, layersDir, scratchFile, runDir:
		default:
			return fmt.Errorf("%s is not empty (%s is in it): name a new directory", path, e.Name())
		}
	}
	return nil
}

// clear removes what Summon makes.
func clear(path string, made bool) error {
	if made {
		return os.RemoveAll(path)
	}
	var errs []error
	for _, name := range []string{LaunchFile, BootLink, layersDir, scratchFile, runDir} {
		errs = append(errs, os.RemoveAll(filepath.Join(path, name)))
	}
	return errors.Join(errs...)
}

func fill(ctx context.Context, path string, launch *spec.Launch, images map[string]*image.Image, o SummonOptions) error {
	if err := os.Mkdir(filepath.Join(path, layersDir), 0o700); err != nil {
		return err
	}
	files := map[string]string{}
	for _, c := range launch.Containers {
		for _, l := range c.Layers {
			files[l.DiffID] = l.File
		}
	}
	var releases []func() error
	undo := func(err error) error {
		for _, release := range releases {
			err = errors.Join(err, release())
		}
		return err
	}
	for _, owner := range []string{path, filepath.Join(path, runDir)} { // of a pod before this one, which had the same path
		if err := o.Images.Forget(owner); err != nil {
			return undo(err)
		}
	}
	for _, img := range images {
		release, err := o.Images.Hold(img, path)
		if err != nil {
			return undo(err)
		}
		releases = append(releases, release)
		for _, l := range img.Layers {
			if err := os.Symlink(l.Path, filepath.Join(path, files[l.DiffID])); err != nil && !errors.Is(err, fs.ErrExist) {
				return undo(err)
			}
		}
	}
	if err := os.Symlink(o.Boot.Dir, filepath.Join(path, BootLink)); err != nil {
		return undo(err)
	}
	scratch := func() error { return makeScratch(ctx, filepath.Join(path, scratchFile), launch.Scratch.Size) }
	if o.Disk != "" {
		scratch = func() error { return keep(ctx, path, o.Disk, launch, images, o.Images) }
	}
	if err := scratch(); err != nil {
		return undo(err)
	}
	if ctx.Err() != nil {
		return undo(context.Cause(ctx))
	}
	if err := writeJSON(filepath.Join(path, LaunchFile), launch); err != nil {
		return undo(err)
	}
	return nil
}

// Remove deletes a pod directory that is not running. Images stay in the cache, volumes where they are.
func (d *Dir) Remove() error {
	lock, err := d.attend()
	if err != nil {
		return err
	}
	defer hostfile.Unlock(lock)
	if err := d.awaitDying(context.Background()); err != nil {
		return err
	}
	// Without launch.json it is no pod any more, whatever happens on the way.
	if err := os.Remove(d.join(LaunchFile)); err != nil {
		return err
	}
	for _, name := range []string{BootLink, layersDir, scratchFile, SocketFile, runDir} {
		if err := os.RemoveAll(d.join(name)); err != nil {
			return err
		}
	}
	if err := os.Remove(d.path); err != nil && !errors.Is(err, unix.ENOTEMPTY) {
		return err
	}
	return nil // with files of others in it, the directory stays
}

// RemoveRemains removes a directory that a Summon or Remove that was killed has left, which is no pod. It fails with ErrNoPod where path is anything else.
func RemoveRemains(path string) error {
	path, err := filepath.Abs(path)
	if err != nil {
		return err
	}
	if _, err := os.Stat(path); err != nil || vacant(path) != nil {
		return fmt.Errorf("%s: %w", path, ErrNoPod)
	}
	dir, _, err := claim(path)
	if err != nil {
		return err
	}
	return errors.Join(os.Remove(path), dir.Close())
}
