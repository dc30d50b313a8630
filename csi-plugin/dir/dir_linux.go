package dir

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cradlestack/cradlestack/csi-plugin/mount"
	"github.com/cradlestack/cradlestack/csi-plugin/tree"
	"github.com/cradlestack/cradlestack/csi-plugin/volume"
	"github.com/cradlestack/cradlestack/spec"
)

// A Pool is a directory that volumes are kept in.
type Pool struct {
	Name string // what the parameter pool says; the first one is the default
	Path string // absolute; made where it is missing
}

// Backend is volume.Backend on directories.
type Backend struct {
	pools []*pool
}

type pool struct {
	name, path string
	root       *os.Root
}

// Open takes pools into use.
func Open(pools []Pool) (*Backend, error) {
	b := &Backend{}
	for _, p := range pools {
		if !filepath.IsAbs(p.Path) {
			return nil, errors.Join(fmt.Errorf("pool %s: %s is not absolute; write a path from /", p.Name, p.Path), b.Close())
		}
		if err := os.MkdirAll(p.Path, 0o700); err != nil {
			return nil, errors.Join(fmt.Errorf("pool %s: %w", p.Name, err), b.Close())
		}
		root, err := os.OpenRoot(p.Path)
		if err != nil {
			return nil, errors.Join(fmt.Errorf("pool %s: %w", p.Name, err), b.Close())
		}
		b.pools = append(b.pools, &pool{p.Name, p.Path, root})
	}
	if len(b.pools) == 0 {
		return nil, errors.New("no pool: name the directory that volumes are kept in")
	}
	return b, nil
}

// Close gives the pools back. What is staged stays so.
func (b *Backend) Close() error {
	var errs []error
	for _, p := range b.pools {
		errs = append(errs, p.root.Close())
	}
	return errors.Join(errs...)
}

// Names in a volume's folder.
const (
	recordFile   = "volume.json"
	imageFile    = "image"
	dataDir      = "data"
	snapshotsDir = "snapshots"
)

// A record is volume.json.
type record struct {
	Version int `json:"version"` // 1
	volume.Parameters
	Origin     volume.Origin  `json:"origin,omitzero"`
	Created    time.Time      `json:"created"`
	Content    volume.Content `json:"content,omitempty"`
	Generation int            `json:"generation,omitempty"`
	Used       bool           `json:"used,omitempty"` // after it was restored
	Schedule   string         `json:"schedule,omitempty"`

	// Of snapshots.
	Copied    bool `json:"copied,omitempty"`
	Automatic bool `json:"automatic,omitempty"`
}

// maxRecord bounds what is read of one.
const maxRecord = 64 << 10

// A found is a volume's or snapshot's folder.
type found struct {
	record
	pool   *pool
	folder string // in the pool
	size   int64  // of the image, which alone says it; 0 of a directory
}

func (f *found) path(name string) string { return filepath.Join(f.pool.path, f.folder, name) }

func (f *found) image() string { return f.path(imageFile) }

// volume is what others see of it.
func (f *found) volume() volume.Volume {
	return volume.Volume{ID: f.folder, Size: f.size, Origin: f.Origin, Created: f.Created, Content: f.Content, Generation: f.Generation, Used: f.Used, Schedule: f.Schedule, Parameters: f.Parameters}
}

// there says, with an ErrUnavailable, that the pool's directory is not the one that was opened: its disk was taken away, or came later. Nothing of it is
// taken for deleted, and nothing is put where it will not be found.
func (p *pool) there() error {
	fi, err := os.Stat(p.path)
	if err != nil {
		return fmt.Errorf("pool %s: %w: %w", p.name, volume.ErrUnavailable, err)
	}
	if opened, err := p.root.Stat("."); err != nil || !os.SameFile(fi, opened) {
		return fmt.Errorf("pool %s: %w: another directory is at %s now, or its file system is mounted anew; start the plugin again", p.name, volume.ErrUnavailable, p.path)
	}
	return nil
}

// find looks for a volume in all pools.
func (b *Backend) find(id string) (*found, error) {
	if !volume.ValidName(id) {
		return nil, fmt.Errorf("volume %q: %w", id[:min(len(id), volume.MaxName)], volume.ErrNotFound)
	}
	var missing error // of a pool, in which it could be
	for _, p := range b.pools {
		if err := p.there(); err != nil {
			missing = errors.Join(missing, err)
			continue
		}
		if f, err := p.read(id); !errors.Is(err, fs.ErrNotExist) {
			return f, err
		}
	}
	return nil, cmp.Or(missing, fmt.Errorf("volume %s: %w", id, volume.ErrNotFound))
}

// read reads a folder; fs.ErrNotExist where there is none.
func (p *pool) read(folder string) (*found, error) {
	f, err := p.root.Open(filepath.Join(folder, recordFile))
	if err != nil {
		return nil, err
	}
	defer f.Close()
	v := found{pool: p, folder: folder}
	data, err := io.ReadAll(io.LimitReader(f, maxRecord))
	if err == nil {
		err = json.Unmarshal(data, &v.record)
	}
	if err == nil && v.Version != 1 {
		err = fmt.Errorf("its version is %d; this program reads version 1", v.Version)
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", filepath.Join(p.path, folder, recordFile), err)
	}
	switch fi, err := p.root.Lstat(filepath.Join(folder, imageFile)); {
	case err == nil:
		v.size = fi.Size()
	case !errors.Is(err, fs.ErrNotExist):
		return nil, err
	}
	return &v, nil
}

// write replaces the record: whoever reads sees the former one or the new one, also after a power cut.
func (p *pool) write(folder string, r record) error {
	data, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	return p.replace(filepath.Join(folder, recordFile), append(data, '\n'))
}

// replace writes a file in one step.
func (p *pool) replace(name string, data []byte) error {
	temporary := hidden(name)
	f, err := p.root.OpenFile(temporary, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	if err := p.root.Rename(temporary, name); err != nil {
		return err
	}
	return p.sync(filepath.Dir(name))
}

// sync makes what was made, renamed or removed in a folder outlast a power cut.
func (p *pool) sync(folder string) error {
	d, err := p.root.Open(folder)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

// hidden is what a folder is called before it is whole, and when it goes.
func hidden(folder string) string {
	if "."+folder == lockFile {
		return lockFile + ":"
	}
	dir, name := filepath.Split(folder)
	return dir + "." + name
}

// make makes a folder in one step: fill gets the hidden folder's name. The caller holds the lock.
func (p *pool) make(folder string, r *record, fill func(hidden string) error) error {
	h := hidden(folder)
	err := tree.RemoveAll(p.root, h)
	if err == nil {
		err = p.root.Mkdir(h, 0o700)
	}
	if err == nil {
		err = fill(h)
	}
	if err == nil {
		err = p.write(h, *r)
	}
	if err == nil {
		err = p.root.Rename(h, folder)
	}
	if err == nil {
		err = p.sync(filepath.Dir(folder))
	}
	if err != nil {
		err = errors.Join(err, tree.RemoveAll(p.root, h))
	}
	return err
}

// remove removes a folder, of which nothing is to be seen from its first step on. The caller holds the lock.
func (p *pool) remove(folder string) error {
	h := hidden(folder)
	if err := tree.RemoveAll(p.root, h); err != nil {
		return err
	}
	err := p.root.Rename(folder, h)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if err := p.sync(filepath.Dir(folder)); err != nil {
		return err
	}
	return tree.RemoveAll(p.root, h)
}

// Create is volume.Backend's.
func (b *Backend) Create(ctx context.Context, r volume.Request) (volume.Volume, error) {
	if r.Origin != (volume.Origin{}) {
		return volume.Volume{}, volume.Invalid("origin", "is for clones")
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
	return b.create(p, r, mount.Minimum(r.FS), func(rec *record, h string, size int64) error {
		if r.Direct && r.Block() {
			rec.Content = volume.Guest
		}
		if size == 0 {
			data := filepath.Join(h, dataDir)
			return errors.Join(p.root.Mkdir(data, 0o755), p.root.Chmod(data, 0o755)) // whatever the umask
		}
		f, err := p.root.OpenFile(filepath.Join(h, imageFile), createNew, 0o600)
		if err != nil {
			return err
		}
		return errors.Join(f.Truncate(size), f.Sync(), f.Close())
	})
}

// create makes a volume of at least least bytes, should there be none, for which fill makes the content in the hidden folder. The caller
// holds the lock.
func (b *Backend) create(p *pool, r volume.Request, least int64, fill func(rec *record, hidden string, size int64) error) (volume.Volume, error) {
	switch f, err := b.find(r.Name); {
	case err == nil:
		return f.volume(), f.volume().Fits(r)
	case !errors.Is(err, volume.ErrNotFound):
		return volume.Volume{}, err
	}
	var size int64
	if isImage(r) {
		var err error
		if size, err = r.Choose(max(least, defaultSize), least, sizeStep); err != nil {
			return volume.Volume{}, err
		}
		if err := p.room(r.Name, size); err != nil {
			return volume.Volume{}, err
		}
	}
	rec := record{Version: 1, Parameters: r.Parameters, Origin: r.Origin, Created: time.Now().UTC(), Generation: r.Generation}
	if err := p.make(r.Name, &rec, func(h string) error { return fill(&rec, h, size) }); err != nil {
		return volume.Volume{}, fmt.Errorf("create volume %s: %w", r.Name, storageError(err))
	}
	f, err := b.find(r.Name)
	if err != nil {
		return volume.Volume{}, err
	}
	return f.volume(), nil
}

// isImage says whether a request is for an image; else it is for a directory.
func isImage(r volume.Request) bool { return r.Block() || r.Size > 0 || r.Limit > 0 }

const (
	defaultSize = 1 << 30
	sizeStep    = 4096 // a page: what a loop device with direct I/O wants
)

// check refuses what this backend can't do, and fills in what was left out.
func (b *Backend) check(r *volume.Request) (*pool, error) {
	if err := volume.CheckName("volume name", r.Name); err != nil {
		return nil, err
	}
	switch {
	case r.Compression != "":
		return nil, volume.Invalid("parameter compression", "backend dir has none; leave it out, or use zfs")
	case r.BlockSize != 0:
		return nil, volume.Invalid("parameter volblocksize", "is for zfs; leave it out")
	case r.Served() && r.Class != volume.NFS:
		return nil, volume.Invalid("parameter attach", "backend dir has no server that a guest could mount a %s volume from; use attach=host, or class nfs", r.Class)
	case r.Size < 0 || r.Limit < 0 || r.Limit > 0 && r.Limit < r.Size:
		return nil, fmt.Errorf("volume %s: %w: at least %d and at most %d bytes", r.Name, volume.ErrRange, r.Size, r.Limit)
	}
	if isImage(*r) {
		r.FS = cmp.Or(r.FS, "ext4")
	} else if r.FS != "" {
		return nil, volume.Invalid("parameter fs", "a file volume without a size is a directory of the pool's file system; leave it out, or give a size")
	}
	p, err := b.pool(r.Pool)
	if err == nil {
		r.Pool = p.name
	}
	return p, err
}

// Pools is volume.Backend's.
func (b *Backend) Pools() (names []string) {
	for _, p := range b.pools {
		names = append(names, p.name)
	}
	return names
}

// pool finds one by name, "" is the default.
func (b *Backend) pool(name string) (*pool, error) {
	if name == "" {
		return b.pools[0], nil
	}
	i := slices.IndexFunc(b.pools, func(p *pool) bool { return p.name == name })
	if i < 0 {
		return nil, volume.NoPool(name, b.Pools())
	}
	return b.pools[i], nil
}

// room refuses a volume that is larger than what is free. Images are sparse: together they may still be larger than the pool.
func (p *pool) room(name string, size int64) error {
	free, err := p.free()
	if err == nil && size > free {
		err = fmt.Errorf("volume %s: %w: it would have %v, and pool %s has %v left", name, volume.ErrNoSpace, spec.Bytes(size), p.name, spec.Bytes(free))
	}
	return err
}

func (p *pool) free() (int64, error) {
	if err := p.there(); err != nil {
		return 0, err
	}
	s, err := mount.Stats(p.path)
	if err != nil {
		return 0, fmt.Errorf("pool %s: %w: %w", p.name, volume.ErrUnavailable, err)
	}
	return int64(s.Available), nil
}

// storageError gives the errors of a full or failing host file system their sentinel.
func storageError(err error) error {
	switch {
	case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EDQUOT):
		return fmt.Errorf("%w: %w", volume.ErrNoSpace, err)
	case errors.Is(err, unix.EFBIG):
		return fmt.Errorf("%w: %w", volume.ErrRange, err)
	case errors.Is(err, unix.EROFS), errors.Is(err, unix.EIO):
		return fmt.Errorf("%w: %w", volume.ErrUnavailable, err)
	}
	return err
}

// Delete is volume.Backend's.
func (b *Backend) Delete(ctx context.Context, id string) error {
	if !volume.ValidName(id) {
		return nil
	}
	lock, err := b.lock(ctx, id)
	if err != nil {
		return err
	}
	defer lock.Close()
	f, err := b.find(id)
	if errors.Is(err, volume.ErrNotFound) {
		for _, p := range b.pools { // what an interrupted call left
			if err := tree.RemoveAll(p.root, hidden(id)); err != nil {
				return err
			}
		}
		return nil
	}
	if err != nil {
		return err
	}
	if err := f.unused(ctx); err != nil {
		return fmt.Errorf("delete volume %s: %w", id, err)
	}
	snapshots, err := f.snapshots()
	if err != nil {
		return err
	}
	for _, snap := range snapshots {
		if !snap.Automatic {
			return fmt.Errorf("delete volume %s: %w: it has the snapshot %s; delete that first", id, volume.ErrInUse, snap.id())
		}
	}
	waiting, cancel := volume.Reclaiming(ctx)
	defer cancel()
	err = mount.Reclaim(waiting, lock, id, nil) // else the image's room would be taken for as long as it is copied, and what has its name by then would not be
	if err == nil {
		err = f.pool.remove(id)
	}
	if err != nil {
		return fmt.Errorf("delete volume %s: %w", id, storageError(err))
	}
	return nil
}

// unused says, with an ErrInUse, who has a volume on this host. A loop device that nobody uses is detached.
func (f *found) unused(ctx context.Context) error {
	if f.size == 0 {
		uses, err := mount.UsesOf(f.path(dataDir))
		if err == nil && len(uses) > 0 {
			err = fmt.Errorf("%w: it is mounted on %s", volume.ErrInUse, uses[0])
		}
		return err
	}
	loops, err := f.attached(ctx)
	if err != nil {
		return err
	}
	if len(loops) == 0 {
		return machineHas(f.image())
	}
	uses, err := mount.Uses(loops[0].Device)
	switch {
	case err != nil:
		return err
	case len(uses) > 0:
		return fmt.Errorf("%w: it is mounted on %s", volume.ErrInUse, uses[0])
	default:
		return fmt.Errorf("%w: %s is open, or mounted in another mount namespace", volume.ErrInUse, loops[0].Device)
	}
}

// attached detaches the loop devices that are not mounted and returns those that are left. Whoever lists loop devices has each open for a
// moment: what is only open gets some time.
func (f *found) attached(ctx context.Context) ([]mount.Loop, error) {
	for wait := time.Millisecond; ; wait *= 2 {
		if err := f.release(); err != nil {
			return nil, err
		}
		loops, err := mount.Loops(f.image())
		if err != nil || len(loops) == 0 || wait > patience {
			return loops, err
		}
		uses, err := mount.Uses(loops[0].Device)
		if err != nil || len(uses) > 0 {
			return loops, err
		}
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}

// patience is the longest pause between two looks at who has a device open; all of them together take twice as long.
const patience = time.Second

// machineHas finds the lock that QEMU holds on an image that it has open.
func machineHas(image string) error {
	f, err := os.OpenFile(image, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	l := unix.Flock_t{Type: unix.F_WRLCK}
	if err := unix.FcntlFlock(f.Fd(), unix.F_OFD_GETLK, &l); err != nil {
		return err
	}
	if l.Type != unix.F_UNLCK {
		return fmt.Errorf("%w: a machine has it open", volume.ErrInUse)
	}
	return nil
}

// release detaches the loop devices that are neither mounted nor bound.
func (f *found) release() error { return mount.ReleaseUnused(f.image()) }

// Get is volume.Backend's.
func (b *Backend) Get(_ context.Context, id string) (volume.Volume, error) {
	f, err := b.find(id)
	if err != nil {
		return volume.Volume{}, err
	}
	return f.volume(), nil
}

// List is volume.Backend's.
func (b *Backend) List(context.Context) ([]volume.Volume, error) {
	var all []volume.Volume
	var missing error
	for _, p := range b.pools {
		if err := p.there(); err != nil {
			missing = errors.Join(missing, err)
			continue
		}
		names, err := p.list(".")
		if err != nil {
			return nil, fmt.Errorf("pool %s: %w", p.name, err)
		}
		for _, name := range names {
			f, err := p.read(name)
			if err != nil {
				continue // deleted meanwhile, no volume of ours, or damaged, of which Get and Repair tell
			}
			all = append(all, f.volume())
		}
	}
	slices.SortFunc(all, func(a, b volume.Volume) int { return cmp.Compare(a.ID, b.ID) })
	return all, missing
}

// list returns the names in a folder that can be volumes or snapshots.
func (p *pool) list(folder string) ([]string, error) {
	names, err := p.all(folder)
	return slices.DeleteFunc(names, func(name string) bool { return !volume.ValidName(name) }), err
}

// Stage is volume.Backend's.
func (b *Backend) Stage(ctx context.Context, id string, use volume.Use) (volume.Source, error) {
	lock, err := b.lock(ctx, id)
	if err != nil {
		return volume.Source{}, err
	}
	defer lock.Close()
	f, err := b.find(id)
	if err != nil {
		return volume.Source{}, err
	}
	source, err := f.stage(ctx, use, lock)
	if err == nil && f.Origin.Copy != "" && !f.Used {
		f.Used = true
		err = storageError(f.pool.write(f.folder, f.record))
	}
	if err != nil {
		return volume.Source{}, fmt.Errorf("stage volume %s: %w", id, err)
	}
	return source, nil
}

func (f *found) stage(ctx context.Context, use volume.Use, lock *os.File) (volume.Source, error) {
	switch {
	case use.As != volume.AsFiles && !f.Block():
		return volume.Source{}, volume.Invalid("volume", "class %s is of file volumes, which have no block device", f.Class)
	case f.Block() && (use.As == volume.AsGuest) != f.Direct:
		return volume.Source{}, volume.Invalid("volume", "attach=direct is what guests attach themselves, and nothing else is")
	case f.size == 0:
		return volume.Source{Directory: f.path(dataDir)}, nil
	case use.As == volume.AsGuest:
		return volume.Source{Guest: spec.Volume{Name: f.folder, Class: f.Class, Block: &spec.BlockVolume{Path: f.image(), FSType: f.FS}}}, nil
	case use.As == volume.AsRaw:
		return f.stageRaw(use.ReadOnly)
	default:
		return f.stageFiles(ctx, lock)
	}
}

func (f *found) stageRaw(readOnly bool) (volume.Source, error) {
	loops, err := mount.Loops(f.image())
	if err != nil {
		return volume.Source{}, err
	}
	for _, l := range loops {
		points, err := mount.Points(l.Device)
		if err != nil {
			return volume.Source{}, err
		}
		if len(points) > 0 {
			return volume.Source{}, fmt.Errorf("%w: this host has its file system mounted on %s", volume.ErrInUse, points[0])
		}
	}
	if err := f.mark(volume.Guest); err != nil {
		return volume.Source{}, err
	}
	l, err := mount.Attach(f.image(), readOnly)
	return volume.Source{Device: l.Device}, err
}

func (f *found) stageFiles(ctx context.Context, lock *os.File) (volume.Source, error) {
	switch f.Content {
	case volume.Guest:
		return volume.Source{}, fmt.Errorf("%w: a task has had the volume as a block device, and what is on it now could attack this host's kernel; attach it as a block device", volume.ErrForeign)
	case volume.Blank:
		image, err := os.OpenFile(f.image(), os.O_RDWR, 0)
		if err != nil {
			return volume.Source{}, err
		}
		defer image.Close()
		if err := mount.Format(ctx, image, f.FS, lock); err != nil {
			return volume.Source{}, storageError(err)
		}
		if err := f.mark(volume.Trusted); err != nil {
			return volume.Source{}, err
		}
	}
	l, err := mount.Attach(f.image(), false)
	return volume.Source{Device: l.Device, FSType: f.FS}, err
}

// mark records who writes the volume's content.
func (f *found) mark(c volume.Content) error {
	if f.Content == c {
		return nil
	}
	f.Content = c
	return storageError(f.pool.write(f.folder, f.record))
}

// Unstage is volume.Backend's.
func (b *Backend) Unstage(ctx context.Context, id string) error {
	if !volume.ValidName(id) {
		return nil
	}
	lock, err := b.lock(ctx, id)
	if err != nil {
		return err
	}
	defer lock.Close()
	f, err := b.find(id)
	if errors.Is(err, volume.ErrNotFound) || err == nil && f.size == 0 {
		return nil
	}
	if err == nil {
		err = f.release()
	}
	if err != nil {
		return fmt.Errorf("unstage volume %s: %w", id, err)
	}
	return nil
}

// Expand is volume.Expander's.
func (b *Backend) Expand(ctx context.Context, id string, size, limit int64) (int64, error) {
	lock, err := b.lock(ctx, id)
	if err != nil {
		return 0, err
	}
	defer lock.Close()
	f, err := b.find(id)
	if err != nil {
		return 0, err
	}
	if f.size == 0 {
		return 0, volume.Invalid("volume "+id, "it has no quota that could grow")
	}
	want, err := volume.Request{Name: id, Size: max(size, f.size), Limit: limit}.Choose(0, 0, sizeStep)
	if err != nil {
		return 0, err
	}
	if want > f.size {
		if err := f.pool.room(id, want-f.size); err != nil {
			return 0, err
		}
		image, err := os.OpenFile(f.image(), os.O_RDWR, 0)
		if err != nil {
			return 0, err
		}
		if err := errors.Join(image.Truncate(want), image.Sync(), image.Close()); err != nil {
			return 0, fmt.Errorf("expand volume %s: %w", id, storageError(err))
		}
	}
	loops, err := mount.Loops(f.image())
	for _, l := range loops {
		err = errors.Join(err, mount.Resized(l))
	}
	return want, err
}

// Reschedule is volume.Scheduler's.
func (b *Backend) Reschedule(ctx context.Context, id, schedule string) error {
	lock, err := b.lock(ctx, id)
	if err != nil {
		return err
	}
	defer lock.Close()
	f, err := b.find(id)
	if err != nil || f.Schedule == schedule {
		return err
	}
	f.Schedule = schedule
	return storageError(f.pool.write(f.folder, f.record))
}

// Capacity is volume.Backend's.
func (b *Backend) Capacity(_ context.Context, params volume.Parameters) (int64, error) {
	p, err := b.check(&volume.Request{Name: "new", Size: 1, Parameters: params})
	if err != nil {
		return 0, err
	}
	return p.free()
}

// Ready is volume.Backend's.
func (b *Backend) Ready(context.Context) error {
	for _, p := range b.pools {
		if _, err := p.free(); err != nil {
			return err
		}
		if err := unix.Access(p.path, unix.W_OK); err != nil { // a file system that has failed is only read
			return fmt.Errorf("pool %s: %w: %s: %w", p.name, volume.ErrUnavailable, p.path, err)
		}
	}
	return nil
}
