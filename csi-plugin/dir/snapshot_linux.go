package dir

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cradlestack/cradlestack/csi-plugin/mount"
	"github.com/cradlestack/cradlestack/csi-plugin/volume"
	"github.com/cradlestack/cradlestack/spec"
)

// id is a snapshot's, by its folder VOLUME/snapshots/NAME.
func (f *found) id() volume.SnapshotID {
	return volume.SnapshotID{Volume: filepath.Dir(filepath.Dir(f.folder)), Name: filepath.Base(f.folder)}
}

// snapshot is what others see of one.
func (f *found) snapshot() volume.Snapshot {
	return volume.Snapshot{ID: f.id(), Size: f.size, Created: f.Created, Copied: f.Copied, Automatic: f.Automatic}
}

func snapshotFolder(id volume.SnapshotID) string {
	return filepath.Join(id.Volume, snapshotsDir, id.Name)
}

// snapshots returns those of a volume; with an error, those that can be read.
func (f *found) snapshots() ([]*found, error) {
	names, err := f.pool.list(filepath.Join(f.folder, snapshotsDir))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var all []*found
	var errs []error
	for _, name := range names {
		snap, err := f.pool.read(snapshotFolder(volume.SnapshotID{Volume: f.folder, Name: name}))
		if errors.Is(err, fs.ErrNotExist) {
			continue // deleted meanwhile
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("snapshot %s@%s can't be read; delete it to go on: %w", f.folder, name, err))
			continue
		}
		all = append(all, snap)
	}
	return all, errors.Join(errs...)
}

// Snapshots is volume.Snapshotter's.
func (b *Backend) Snapshots(ctx context.Context, id string) ([]volume.Snapshot, error) {
	var of []string
	if id != "" {
		of = []string{id}
	} else {
		all, err := b.List(ctx)
		if err != nil {
			return nil, err
		}
		for _, v := range all {
			of = append(of, v.ID)
		}
	}
	var all []volume.Snapshot
	for _, one := range of {
		f, err := b.find(one)
		if errors.Is(err, volume.ErrNotFound) {
			continue
		}
		if err != nil {
			return nil, err
		}
		snaps, err := f.snapshots()
		if err != nil && id != "" { // of all, one that is damaged is no matter of the others', and Repair tells of it
			return nil, err
		}
		for _, snap := range snaps {
			all = append(all, snap.snapshot())
		}
	}
	slices.SortFunc(all, func(a, b volume.Snapshot) int { return cmp.Compare(a.ID.String(), b.ID.String()) })
	return all, nil
}

// Snapshot is volume.Snapshotter's.
func (b *Backend) Snapshot(ctx context.Context, r volume.SnapshotRequest) (volume.Snapshot, error) {
	id := r.ID
	if err := r.Check(); err != nil {
		return volume.Snapshot{}, err
	}
	lock, err := b.lock(ctx, id.Volume, "@"+id.Name)
	if err != nil {
		return volume.Snapshot{}, err
	}
	defer lock.Close()
	f, err := b.find(id.Volume)
	if err != nil {
		return volume.Snapshot{}, err
	}
	folder := snapshotFolder(id)
	switch snap, err := f.pool.read(folder); {
	case err == nil:
		return snap.snapshot(), nil
	case !errors.Is(err, fs.ErrNotExist):
		return volume.Snapshot{}, err
	}
	if !r.Automatic {
		if err := b.nameFree(ctx, id.Name); err != nil {
			return volume.Snapshot{}, err
		}
	}
	if err := f.pool.root.Mkdir(filepath.Dir(folder), 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return volume.Snapshot{}, storageError(err)
	}
	rec := f.record
	rec.Created, rec.Automatic, rec.Origin, rec.Schedule = time.Now().UTC(), r.Automatic, volume.Origin{}, ""
	err = f.pool.make(folder, &rec, func(h string) (err error) {
		rec.Copied, err = f.copyTo(ctx, f.pool, h, r.Hold)
		return err
	})
	if err != nil {
		return volume.Snapshot{}, fmt.Errorf("snapshot %s: %w", id, storageError(err))
	}
	snap, err := f.pool.read(folder)
	if err != nil {
		return volume.Snapshot{}, err
	}
	return snap.snapshot(), nil
}

// nameFree refuses the name of another volume's snapshot: who asks for one by name means one only (CSI spec, CreateSnapshot).
func (b *Backend) nameFree(ctx context.Context, name string) error {
	all, err := b.List(ctx)
	if err != nil {
		return err
	}
	for _, v := range all {
		f, err := b.find(v.ID)
		if err != nil {
			continue // deleted meanwhile
		}
		snap, err := f.pool.read(snapshotFolder(volume.SnapshotID{Volume: v.ID, Name: name}))
		if err == nil && !snap.Automatic {
			return fmt.Errorf("snapshot %s %w: it is volume %s's", name, volume.ErrExists, v.ID)
		}
	}
	return nil
}

// DeleteSnapshot is volume.Snapshotter's.
func (b *Backend) DeleteSnapshot(ctx context.Context, id volume.SnapshotID) error {
	lock, err := b.lock(ctx, id.Volume, "@"+id.Name)
	if err != nil {
		return err
	}
	defer lock.Close()
	f, err := b.find(id.Volume)
	if errors.Is(err, volume.ErrNotFound) {
		return nil
	}
	if err == nil {
		err = f.pool.remove(snapshotFolder(id))
	}
	if err != nil {
		return fmt.Errorf("delete snapshot %s: %w", id, storageError(err))
	}
	return nil
}

// Browse is volume.Browser's.
func (b *Backend) Browse(ctx context.Context, id volume.SnapshotID) (*os.Root, error) {
	t, err := b.browse(ctx, id)
	if err != nil {
		return nil, err
	}
	return t.Root()
}

// BrowseAt is volume.Browser's.
func (b *Backend) BrowseAt(ctx context.Context, id volume.SnapshotID, path string) error {
	t, err := b.browse(ctx, id)
	if err != nil {
		return err
	}
	return t.Attach(path)
}

func (b *Backend) browse(ctx context.Context, id volume.SnapshotID) (mount.Tree, error) {
	lock, err := b.lock(ctx, id.Volume, "@"+id.Name)
	if err != nil {
		return -1, err
	}
	defer lock.Close()
	snap, err := b.origin(volume.Origin{Snapshot: id})
	if err != nil {
		return -1, err
	}
	switch {
	case snap.Block():
		return -1, volume.Invalid("snapshot "+id.String(), "class %s is of block volumes, whose files are their users'", snap.Class)
	case snap.size == 0:
		return mount.Still(snap.path(dataDir))
	case snap.Content != volume.Trusted:
		return -1, fmt.Errorf("snapshot %s: %w: there are no files in it; nothing had been written to its volume", id, volume.ErrNotFound)
	}
	// What was in the journal when it was taken is written to the image: what is in its files does not change by that.
	l, err := mount.Attach(snap.image(), false)
	if err != nil {
		return -1, err
	}
	t, err := mount.Detached(l.Device, snap.FS, true)
	if err != nil {
		err = errors.Join(err, mount.Release(l))
	}
	return t, err
}

// Clone is volume.Cloner's.
func (b *Backend) Clone(ctx context.Context, r volume.Request, hold volume.Hold) (volume.Volume, error) {
	origin := r.Origin.Volume
	if origin == "" {
		origin, hold = r.Origin.Snapshot.Volume, nil
	}
	if err := volume.CheckName("volume name", r.Name); err != nil {
		return volume.Volume{}, err
	}
	lock, err := b.lock(ctx, r.Name, origin)
	if err != nil {
		return volume.Volume{}, err
	}
	defer lock.Close()
	// A clone that is there is judged by the request alone: what it was made of may have grown since, or be gone.
	switch f, err := b.find(r.Name); {
	case err == nil:
		r.FS = cmp.Or(r.FS, f.FS)
		return f.volume(), f.volume().Fits(r)
	case !errors.Is(err, volume.ErrNotFound):
		return volume.Volume{}, err
	}
	from, err := b.origin(r.Origin)
	if err != nil {
		return volume.Volume{}, err
	}
	if err := from.cloneable(&r); err != nil {
		return volume.Volume{}, err
	}
	p, err := b.check(&r)
	if err != nil {
		return volume.Volume{}, err
	}
	return b.create(p, r, from.size, func(rec *record, h string, size int64) error {
		if rec.Content = from.Content; r.Direct && r.Block() {
			rec.Content = volume.Guest
		}
		if _, err := from.copyTo(ctx, p, h, hold); err != nil || size == from.size {
			return err
		}
		f, err := p.root.OpenFile(filepath.Join(h, imageFile), os.O_RDWR, 0)
		if err != nil {
			return err
		}
		return errors.Join(f.Truncate(size), f.Sync(), f.Close())
	})
}

// origin finds what a clone is made of.
func (b *Backend) origin(o volume.Origin) (*found, error) {
	if o.Volume != "" {
		return b.find(o.Volume)
	}
	f, err := b.find(o.Snapshot.Volume)
	gone := errors.Is(err, volume.ErrNotFound)
	if err == nil {
		f, err = f.pool.read(snapshotFolder(o.Snapshot))
		gone = errors.Is(err, fs.ErrNotExist)
	}
	if gone {
		err = fmt.Errorf("snapshot %s: %w", o.Snapshot, volume.ErrNotFound)
	}
	return f, err
}

// cloneable refuses a clone that would need its content converted, and fills in what was left out.
func (f *found) cloneable(r *volume.Request) error {
	switch {
	case r.Class != f.Class:
		return volume.Invalid("parameter class", "%s is of class %s; a clone has the same (cradle-csi copy moves content to another)", r.Origin, f.Class)
	case f.size == 0 && isImage(*r):
		return volume.Invalid("size", "%s has no quota, and so has its clone; leave the size out", r.Origin)
	case f.size == 0:
		return nil
	case r.FS != "" && r.FS != f.FS:
		return volume.Invalid("parameter fs", "%s has %s, and so has its clone", r.Origin, f.FS)
	}
	r.FS = f.FS
	if r.Size = max(r.Size, f.size); r.Limit > 0 && r.Limit < r.Size {
		return fmt.Errorf("volume %s: %w: %s has %d bytes, and at most %d are asked for", r.Name, volume.ErrRange, r.Origin, f.size, r.Limit)
	}
	return nil
}

// copyTo copies a volume's or snapshot's content into the folder h of a pool. copied says that the data was written a second time.
func (f *found) copyTo(ctx context.Context, to *pool, h string, hold volume.Hold) (copied bool, err error) {
	if f.size == 0 {
		return copyTree(ctx, f.pool.root, filepath.Join(f.folder, dataDir), to.root, filepath.Join(h, dataDir))
	}
	from, err := f.pool.root.Open(filepath.Join(f.folder, imageFile))
	if err != nil {
		return false, err
	}
	defer from.Close()
	image, err := to.root.OpenFile(filepath.Join(h, imageFile), createNew, 0o600)
	if err != nil {
		return false, err
	}
	defer image.Close()

	points, written, err := f.writers(ctx)
	if err != nil {
		return false, err
	}
	release := func() error { return nil }
	still := !written
	switch {
	case hold != nil:
		if r, herr := hold(ctx); herr == nil {
			release, still = r, true
		}
	case len(points) > 0:
		// Shared at one instant, the file system is as after a power cut, which its journal is for: it does not have to stand still.
		if err := mount.Sync(points[0]); err != nil {
			return false, err
		}
	}
	err = reflink(image, from)
	if errors.Is(err, errors.ErrUnsupported) {
		copied = true
		err = to.roomToCopy(from)
		switch {
		case err != nil:
		case len(points) > 0:
			if err = mount.Freeze(points[0]); err == nil {
				err = copySparse(ctx, image, from)
				_, terr := mount.Thaw(points[0])
				err = errors.Join(err, terr)
			}
		case still:
			if err = copySparse(ctx, image, from); err == nil {
				err = release()
				release = func() error { return nil }
			}
		default:
			err = fmt.Errorf("%w: a task writes to it, and the pool's file system can't share data between files, as xfs and btrfs can; stop the task for the time of the snapshot", volume.ErrInUse)
		}
	}
	if rerr := release(); err == nil && copied {
		err = rerr
	}
	if err == nil {
		err = image.Sync()
	}
	return copied, err
}

// roomToCopy refuses a copy that would fill the pool before it is whole, and take what the images in it still need: by schedule it would be begun again each minute.
func (p *pool) roomToCopy(image *os.File) error {
	var st unix.Stat_t
	if err := unix.Fstat(int(image.Fd()), &st); err != nil {
		return &os.PathError{Op: "stat", Path: image.Name(), Err: err}
	}
	free, err := p.free()
	if takes := st.Blocks * 512; err == nil && takes > free {
		err = fmt.Errorf("%w: the pool's file system can't share data between files, a copy would take %v, and pool %s has %v left", volume.ErrNoSpace, spec.Bytes(takes), p.name, spec.Bytes(free))
	}
	return err
}

// writers says where this host has the file system mounted, and whether somebody may be writing who can't be made to hold still here: a task
// or guest that has the blocks. Of a file system that only hosts have written, all is on the image once it is unmounted here.
func (f *found) writers(ctx context.Context) (points []string, written bool, err error) {
	loops, err := f.attached(ctx)
	if err != nil {
		return nil, false, err
	}
	for _, l := range loops {
		at, err := mount.Points(l.Device)
		if err != nil {
			return nil, false, err
		}
		points = append(points, at...)
		written = written || !l.ReadOnly && len(at) == 0 && f.Content == volume.Guest
	}
	if err := machineHas(f.image()); errors.Is(err, volume.ErrInUse) {
		written = true
	} else if err != nil {
		return nil, false, err
	}
	return points, written, nil
}
