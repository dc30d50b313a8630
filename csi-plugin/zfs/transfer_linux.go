package zfs

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"time"

	"github.com/cradlestack/cradlestack/csi-plugin/mount"
	"github.com/cradlestack/cradlestack/csi-plugin/volume"
)

// Datasets in a pool that are no volumes have a name that no volume can have: zfs allows the colon, ValidName does not.
const (
	copying   = mount.Copying // + a volume's name: a clone of the snapshot that is read
	receiving = "receive:"    // + a volume's name: it is not whole yet
)

// Open is volume.Sender's. What differs is what "zfs send" would send; it is read from a clone of the snapshot, whose device is there without
// those of all other snapshots.
func (b *Backend) Open(ctx context.Context, id, since volume.SnapshotID) (*volume.Blocks, error) {
	locks, err := b.locks.Open()
	if err != nil {
		return nil, err
	}
	lease, err := mount.Lend(ctx, locks, id.Volume, fmt.Errorf("volume %s: %w", id.Volume, volume.ErrDeleted))
	if err != nil {
		return nil, err
	}
	blocks, err := b.open(lease, id, since)
	if err != nil {
		return nil, errors.Join(err, lease.Close())
	}
	return blocks, nil
}

func (b *Backend) open(lease *mount.Lease, id, since volume.SnapshotID) (*volume.Blocks, error) {
	ctx := lease.Context()
	f, err := b.find(ctx, id.Volume)
	if err != nil {
		return nil, err
	}
	if !f.Block() {
		return nil, volume.Invalid("volume "+id.Volume, "class %s is of file volumes, which have no blocks", f.Class)
	}
	s, err := f.snap(ctx, id.Name)
	if err != nil {
		return nil, err
	}
	blocks := &volume.Blocks{ReaderAt: lease, Closer: lease, Size: s.size, Whole: true}
	args := []string{s.name}
	if base, err := f.snap(ctx, since.Name); err == nil && since.Volume == id.Volume {
		blocks.Whole = false
		args = []string{"-i", base.name, s.name}
	} else if err != nil && !errors.Is(err, volume.ErrNotFound) {
		return nil, err
	}
	if blocks.Data, err = differences(ctx, s.size, !blocks.Whole, args...); err != nil {
		return nil, err
	}
	c := f.copied()
	if err := c.destroy(ctx); err != nil { // what an interrupted call left
		return nil, err
	}
	if _, err := zfs(ctx, "clone", "-o", "readonly=on", s.name, c.dataset); err != nil {
		return nil, err
	}
	destroy := func() error { return c.destroy(context.WithoutCancel(ctx)) } // also where the caller's time is up
	device, err := c.device(ctx)
	if err != nil {
		return nil, errors.Join(err, destroy())
	}
	disk, err := os.Open(device)
	if err != nil {
		return nil, errors.Join(err, destroy())
	}
	return blocks, lease.Read(disk, destroy)
}

// copied is the clone that a volume's copy is read from.
func (f *found) copied() *found {
	return &found{dataset: path.Join(path.Dir(f.dataset), copying+f.id())}
}

// destroy removes a dataset without snapshots; one that is not there is no error.
func (f *found) destroy(ctx context.Context) error {
	return patiently(ctx, func() error {
		_, err := zfs(ctx, "destroy", f.dataset)
		if errors.Is(err, errNoDataset) {
			return nil
		}
		return err
	})
}

// patiently does again what fails because something is busy: whoever looks for new disks has each open for a moment.
func patiently(ctx context.Context, do func() error) error {
	for wait := time.Millisecond; ; wait *= 2 {
		err := do()
		if !errors.Is(err, errBusy) || wait > time.Second {
			return err
		}
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// differences reads of a send stream which of a zvol's bytes it has.
func differences(ctx context.Context, size int64, holes bool, args ...string) (all []volume.Range, err error) {
	err = stream(ctx, func(r io.Reader) (err error) {
		all, err = ranges(bufio.NewReaderSize(r, 1<<20), size, holes)
		return err
	}, append([]string{"send"}, args...)...)
	return all, err
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
	ctx, unlock, err := b.take(ctx, r.Name)
	if err != nil {
		return volume.Volume{}, err
	}
	defer unlock()
	switch f, err := b.find(ctx, r.Name); {
	case err == nil:
		return f.volume(), f.volume().Fits(r)
	case !errors.Is(err, volume.ErrNotFound):
		return volume.Volume{}, err
	}
	size, err := r.Choose(0, mount.Minimum(r.FS), step(r.BlockSize))
	if err == nil {
		err = p.receive(ctx, r, size, content, fill)
	}
	if err != nil {
		return volume.Volume{}, fmt.Errorf("create volume %s: %w", r.Name, err)
	}
	return b.Get(ctx, r.Name)
}

// receive makes the zvol under another name, or goes on with what an interrupted call for the same copy has left.
func (p Pool) receive(ctx context.Context, r volume.Request, size int64, content volume.Content, fill func(context.Context, *os.File) error) error {
	rec := record{Version: 1, Parameters: r.Parameters, Origin: r.Origin, Created: r.Born(), Content: content, Generation: r.Generation}
	if r.Direct {
		rec.Content = volume.Guest
	}
	half := &found{dataset: p.Dataset + "/" + receiving + r.Name}
	left, err := half.left(ctx)
	if err != nil {
		return err
	}
	if left == nil || left.Origin != r.Origin || left.Generation != r.Generation || left.Parameters != r.Parameters || left.size != size {
		if err := half.destroy(ctx); err != nil {
			return err
		}
		if err := p.room(ctx, r.Name, size); err != nil { // what is left has taken its own already
			return err
		}
		args := append([]string{"create"}, rec.options(size)...)
		if _, err := zfs(ctx, append(args, "-s", "-b", number(int64(r.BlockSize)), "-V", number(size), half.dataset)...); err != nil {
			return err
		}
	}
	device, err := half.device(ctx)
	if err != nil {
		return err
	}
	disk, err := os.OpenFile(device, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	if err = mount.Forget(disk); err == nil { // else what the interrupted call could not write would count as written
		err = fill(ctx, disk)
	}
	if err = errors.Join(err, disk.Sync(), disk.Close()); err != nil {
		return err // what there is of it stays for the next call
	}
	return patiently(ctx, func() error {
		_, err := zfs(ctx, "rename", half.dataset, p.Dataset+"/"+r.Name)
		return err
	})
}

// left reads what an interrupted receive has left; nil where there is nothing.
func (f *found) left(ctx context.Context) (*found, error) {
	out, err := zfs(ctx, "list", "-Hp", "-t", "filesystem,volume", "-o", columns, f.dataset)
	if errors.Is(err, errNoDataset) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	return read(rows(out)[0])
}
