package dir

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/cradlestack/cradlestack/csi-plugin/mount"
	"github.com/cradlestack/cradlestack/csi-plugin/tree"
	"github.com/cradlestack/cradlestack/csi-plugin/volume"
)

// Open is volume.Sender's. A host file system does not tell what differs from another file: all that is no hole counts.
func (b *Backend) Open(ctx context.Context, id, _ volume.SnapshotID) (*volume.Blocks, error) {
	f, err := b.origin(volume.Origin{Snapshot: id})
	if err != nil {
		return nil, err
	}
	if !f.Block() {
		return nil, volume.Invalid("volume "+id.Volume, "class %s is of file volumes, which have no blocks", f.Class)
	}
	image, err := f.pool.root.Open(filepath.Join(f.folder, imageFile))
	if err != nil {
		return nil, err
	}
	locks, err := b.locks()
	if err != nil {
		return nil, errors.Join(err, image.Close())
	}
	lease, err := mount.Lend(ctx, locks, id.Volume, fmt.Errorf("volume %s: %w", id.Volume, volume.ErrDeleted))
	if err != nil {
		return nil, errors.Join(err, image.Close())
	}
	data, err := dataOf(image, f.size)
	if err = errors.Join(err, lease.Read(image, func() error { return nil })); err != nil {
		return nil, errors.Join(err, lease.Close())
	}
	return &volume.Blocks{ReaderAt: lease, Closer: lease, Size: f.size, Data: data, Whole: true}, nil
}

// dataOf are the ranges of a file that are no holes.
func dataOf(f *os.File, size int64) (all []volume.Range, err error) {
	for at := int64(0); at < size; {
		start, err := unix.Seek(int(f.Fd()), at, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			break
		}
		if err != nil {
			return nil, &os.PathError{Op: "seek", Path: f.Name(), Err: err}
		}
		if at, err = unix.Seek(int(f.Fd()), start, unix.SEEK_HOLE); err != nil {
			return nil, &os.PathError{Op: "seek", Path: f.Name(), Err: err}
		}
		all = append(all, volume.Range{Start: start, End: at})
	}
	return all, nil
}

// Receive is volume.Receiver's.
func (b *Backend) Receive(ctx context.Context, r volume.Request, content volume.Content, fill func(context.Context, *os.File) error) (volume.Volume, error) {
	if r.Origin.Copy == "" || !r.Block() {
		return volume.Volume{}, volume.Invalid("origin", "block volumes come from cold storage, and nothing else does")
	}
	p, err := b.check(&r)
	if err != nil {
		return volume.Volume{}, err
	}
	lock, err := b.lock(ctx, r.Name)
	if err != nil {
		return volume.Volume{}, err
	}
	defer lock.Close()
	switch f, err := b.find(r.Name); {
	case err == nil:
		return f.volume(), f.volume().Fits(r)
	case !errors.Is(err, volume.ErrNotFound):
		return volume.Volume{}, err
	}
	if err := b.receive(ctx, p, r, content, fill); err != nil {
		return volume.Volume{}, fmt.Errorf("create volume %s: %w", r.Name, storageError(err))
	}
	f, err := b.find(r.Name)
	if err != nil {
		return volume.Volume{}, err
	}
	return f.volume(), nil
}

// receive makes the folder as make does, but goes on with what an interrupted call for the same copy has left.
func (b *Backend) receive(ctx context.Context, p *pool, r volume.Request, content volume.Content, fill func(context.Context, *os.File) error) error {
	h := hidden(r.Name)
	rec := record{Version: 1, Parameters: r.Parameters, Origin: r.Origin, Created: r.Born(), Content: content, Generation: r.Generation}
	if r.Direct {
		rec.Content = volume.Guest
	}
	if left, err := p.read(h); err != nil || left.Origin != r.Origin || left.Generation != r.Generation || left.Parameters != r.Parameters || left.size != r.Size {
		if err := tree.RemoveAll(p.root, h); err != nil {
			return err
		}
		if err := p.room(r.Name, r.Size); err != nil { // what is left has taken its own already
			return err
		}
		if err := p.root.Mkdir(h, 0o700); err != nil {
			return err
		}
		f, err := p.root.OpenFile(filepath.Join(h, imageFile), createNew, 0o600)
		if err != nil {
			return err
		}
		if err := errors.Join(f.Truncate(r.Size), f.Close()); err != nil {
			return err
		}
		if err := p.write(h, rec); err != nil {
			return err
		}
	}
	image, err := p.root.OpenFile(filepath.Join(h, imageFile), os.O_RDWR, 0)
	if err != nil {
		return err
	}
	if err = mount.Forget(image); err == nil { // else what the interrupted call could not write would count as written
		err = fill(ctx, image)
	}
	if err = errors.Join(err, image.Sync(), image.Close()); err != nil {
		return err // what there is of it stays for the next call
	}
	if err := p.write(h, rec); err != nil {
		return err
	}
	if err := p.root.Rename(h, r.Name); err != nil {
		return err
	}
	return p.sync(".")
}
