package zfs

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cradlestack/cradlestack/csi-plugin/mount"
	"github.com/cradlestack/cradlestack/csi-plugin/volume"
	"github.com/cradlestack/cradlestack/spec"
)

// A Pool is a dataset that volumes are kept below.
type Pool struct {
	Name    string // what the parameter pool says; the first one is the default
	Dataset string // tank/cradle; made where its parent is there
}

// Backend is volume.Backend on ZFS.
type Backend struct {
	pools []Pool
	locks mount.Locks
}

// ParsePools reads pools as command lines name them: DATASET, or NAME=DATASET.
func ParsePools(texts []string) (pools []Pool, err error) {
	for _, text := range texts {
		name, dataset, err := volume.SplitPool(text)
		if err != nil {
			return nil, err
		}
		pools = append(pools, Pool{Name: name, Dataset: dataset})
	}
	return pools, nil
}

// Locks is the file for locks among a host's processes.
const Locks = "/run/cradle/zfs.lock"

// Open takes pools into use. locks is a file for locks among processes: Locks, but for tests.
func Open(ctx context.Context, pools []Pool, locks string) (*Backend, error) {
	return openPools(ctx, pools, 0, locks)
}

// Reopen is Open where the dataset of the first pool is known to be there.
func Reopen(ctx context.Context, pools []Pool, locks string) (*Backend, error) {
	return openPools(ctx, pools, 1, locks)
}

// openPools makes the pools' datasets but for the first ones.
func openPools(ctx context.Context, pools []Pool, there int, locks string) (*Backend, error) {
	if len(pools) == 0 {
		return nil, errors.New("no pool: name the dataset that volumes are kept below")
	}
	if err := os.MkdirAll(filepath.Dir(locks), 0o700); err != nil {
		return nil, err
	}
	for i, p := range pools {
		if len(p.Dataset) > maxPool {
			return nil, fmt.Errorf("pool %s: the dataset's name %s is too long; at most %d, so that volumes have room below it", p.Name, p.Dataset, maxPool)
		}
		if i < there {
			continue
		}
		_, err := zfs(ctx, "create", "-o", "mountpoint=none", "-o", "canmount=off", p.Dataset)
		if err != nil && !errors.Is(err, errExists) {
			return nil, fmt.Errorf("pool %s: %w", p.Name, err)
		}
	}
	return &Backend{pools, mount.Locks(locks)}, nil
}

// Names in ZFS have at most maxDataset bytes, a snapshot's with its dataset's (include/sys/fs/zfs.h, ZFS_MAX_DATASET_NAME_LEN).
const (
	maxDataset = 255
	maxPool    = maxDataset - len("/") - volume.MaxName - len("@deleted:") - 20
)

// take takes locks of volumes. Who has them may wait for a zpool that is suspended: who waits for them in turn is told so.
func (b *Backend) take(ctx context.Context, names ...string) (held context.Context, unlock func(), err error) {
	return b.locks.TakeUnless(ctx, func() error {
		if !slices.ContainsFunc(b.pools, func(p Pool) bool { return Suspended(zpool(p.Dataset)) != nil }) {
			return nil
		}
		if _, err := b.find(ctx, names[0]); errors.Is(err, ErrSuspended) {
			return err
		}
		return nil
	}, names...)
}

// Close does nothing: all is in ZFS.
func (b *Backend) Close() error { return nil }

// property holds the record of a volume, or of a snapshot.
const property = "org.cradlestack:volume"

// A record is what ZFS does not know.
type record struct {
	Version int `json:"version"` // 1
	volume.Parameters
	Origin     volume.Origin  `json:"origin,omitzero"`
	Created    time.Time      `json:"created,omitzero"`
	Content    volume.Content `json:"content,omitempty"`
	Generation int            `json:"generation,omitempty"`
	Used       bool           `json:"used,omitempty"` // after it was restored
	Schedule   string         `json:"schedule,omitempty"`

	// Of snapshots.
	Automatic bool  `json:"automatic,omitempty"`
	Quota     int64 `json:"quota,omitempty"` // that the file volume had
}

func (r record) String() string {
	text, err := json.Marshal(r)
	if err != nil {
		panic(err) // it holds nothing that could not be written
	}
	return property + "=" + string(text)
}

// A found is a volume.
type found struct {
	record
	dataset string
	size    int64
}

func (f *found) id() string { return filepath.Base(f.dataset) }

func (f *found) volume() volume.Volume {
	return volume.Volume{ID: f.id(), Size: f.size, Origin: f.Origin, Created: f.Created, Content: f.Content, Generation: f.Generation, Used: f.Used, Schedule: f.Schedule, Parameters: f.Parameters}
}

// columns of volumes, in the order that read wants.
const columns = "name,volsize,refquota," + property

// read makes a volume of a row; nil where it is none of ours.
func read(row []string) (*found, error) {
	if len(row) != 4 || row[3] == "-" {
		return nil, nil
	}
	f := &found{dataset: row[0]}
	if err := json.Unmarshal([]byte(row[3]), &f.record); err != nil {
		return nil, fmt.Errorf("%s: %s: %w", row[0], property, err)
	}
	if f.Version != 1 {
		return nil, fmt.Errorf("%s: %s: its version is %d; this program reads version 1", row[0], property, f.Version)
	}
	for _, size := range row[1:3] {
		if n, err := strconv.ParseInt(size, 10, 64); err == nil && n > 0 {
			f.size = n
		}
	}
	return f, nil
}

// find looks for a volume in all pools.
func (b *Backend) find(ctx context.Context, id string) (*found, error) {
	if !volume.ValidName(id) {
		return nil, fmt.Errorf("volume %q: %w", id[:min(len(id), volume.MaxName)], volume.ErrNotFound)
	}
	var missing error // of a pool, in which it could be
	for _, p := range b.pools {
		out, err := zfs(ctx, "list", "-Hp", "-t", "filesystem,volume", "-o", columns, p.Dataset+"/"+id)
		if errors.Is(err, errNoDataset) {
			if err = p.there(ctx); err == nil {
				continue
			}
		}
		if errors.Is(err, volume.ErrUnavailable) {
			missing = errors.Join(missing, err)
			continue
		}
		if err != nil {
			return nil, err
		}
		f, err := read(rows(out)[0])
		if err != nil {
			return nil, err
		}
		if f == nil {
			return nil, fmt.Errorf("volume %s: the dataset %s/%[1]s is there and has no property %[3]s: it is not ours, or a power cut came before the property; rename or destroy it", id, p.Dataset, property)
		}
		return f, nil
	}
	return nil, cmp.Or(missing, fmt.Errorf("volume %s: %w", id, volume.ErrNotFound))
}

// there says, with an ErrUnavailable, that the pool's dataset is missing, of which ZFS says what it says of a volume that was deleted.
func (p Pool) there(ctx context.Context) error {
	_, err := zfs(ctx, "list", "-H", "-o", "name", p.Dataset)
	if errors.Is(err, errNoDataset) {
		return fmt.Errorf("pool %s: %w: there is no dataset %s; import its zpool", p.Name, volume.ErrUnavailable, p.Dataset)
	}
	return err
}

// said is what an error of a command about the pool's dataset means.
func (p Pool) said(ctx context.Context, err error) error {
	if errors.Is(err, errNoDataset) {
		return p.there(ctx)
	}
	if err != nil {
		err = fmt.Errorf("pool %s: %w", p.Name, err)
	}
	return err
}

// List is volume.Backend's.
func (b *Backend) List(ctx context.Context) ([]volume.Volume, error) {
	found, err := b.list(ctx)
	var all []volume.Volume
	for _, f := range found {
		all = append(all, f.volume())
	}
	slices.SortFunc(all, func(a, b volume.Volume) int { return cmp.Compare(a.ID, b.ID) })
	return all, err
}

// list finds the volumes of all pools, in the pools' order.
func (b *Backend) list(ctx context.Context) (all []*found, missing error) {
	for _, p := range b.pools {
		out, err := zfs(ctx, "list", "-Hp", "-t", "filesystem,volume", "-d", "1", "-o", columns, p.Dataset)
		if err = p.said(ctx, err); errors.Is(err, volume.ErrUnavailable) {
			missing = errors.Join(missing, err)
			continue
		}
		if err != nil {
			return nil, err
		}
		for _, row := range rows(out) {
			if f, err := read(row); err == nil && f != nil && row[0] != p.Dataset && volume.ValidName(f.id()) {
				all = append(all, f)
			}
		}
	}
	return all, missing
}

// Get is volume.Backend's.
func (b *Backend) Get(ctx context.Context, id string) (volume.Volume, error) {
	f, err := b.find(ctx, id)
	if err != nil {
		return volume.Volume{}, err
	}
	return f.volume(), nil
}

const (
	defaultSize = 1 << 30
	blockSize   = 16 << 10 // of zvols: OpenZFS's own default from 2.2 on
)

// check refuses what this backend can't do, and fills in what was left out.
func (b *Backend) check(r *volume.Request) (Pool, error) {
	if err := volume.CheckName("volume name", r.Name); err != nil {
		return Pool{}, err
	}
	switch {
	case r.Class == volume.GFS:
		return Pool{}, volume.Invalid("parameter class", "gfs is on many hosts at once, which ZFS is not; use ceph, or class nfs")
	case !r.Block() && r.FS != "":
		return Pool{}, volume.Invalid("parameter fs", "a file volume is a file system of ZFS's own; leave it out")
	case !r.Block() && r.BlockSize != 0:
		return Pool{}, volume.Invalid("parameter volblocksize", "is for block volumes; leave it out")
	case r.BlockSize != 0 && r.BlockSize < 4096:
		return Pool{}, volume.Invalid("parameter volblocksize", "%v is less than a file system's block; write 4KiB at least", r.BlockSize)
	case r.Size < 0 || r.Limit < 0 || r.Limit > 0 && r.Limit < r.Size:
		return Pool{}, fmt.Errorf("volume %s: %w: at least %d and at most %d bytes", r.Name, volume.ErrRange, r.Size, r.Limit)
	}
	if r.Block() {
		r.FS = cmp.Or(r.FS, "ext4")
		r.BlockSize = cmp.Or(r.BlockSize, blockSize)
	}
	p, err := b.pool(r.Pool)
	r.Pool = p.Name
	return p, err
}

// Pools is volume.Backend's.
func (b *Backend) Pools() (names []string) {
	for _, p := range b.pools {
		names = append(names, p.Name)
	}
	return names
}

// pool finds one by name, "" is the default.
func (b *Backend) pool(name string) (Pool, error) {
	if name == "" {
		return b.pools[0], nil
	}
	i := slices.IndexFunc(b.pools, func(p Pool) bool { return p.Name == name })
	if i < 0 {
		return Pool{}, volume.NoPool(name, b.Pools())
	}
	return b.pools[i], nil
}

// room refuses a volume that is larger than what is free. Volumes are sparse: together they may still be larger than the pool.
func (p Pool) room(ctx context.Context, name string, size int64) error {
	free, err := p.free(ctx)
	if err == nil && size > free {
		err = fmt.Errorf("volume %s: %w: it would have %v, and pool %s has %v left", name, volume.ErrNoSpace, spec.Bytes(size), p.Name, spec.Bytes(free))
	}
	return err
}

func (p Pool) free(ctx context.Context) (int64, error) {
	out, err := zfs(ctx, "get", "-Hp", "-o", "value", "available", p.Dataset)
	if errors.Is(err, errNoDataset) {
		return 0, p.there(ctx)
	}
	if err != nil {
		return 0, fmt.Errorf("pool %s: %w", p.Name, err)
	}
	return strconv.ParseInt(strings.TrimSpace(out), 10, 64)
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
	rec := record{Version: 1, Parameters: r.Parameters, Created: time.Now().UTC(), Generation: r.Generation}
	if r.Direct && r.Block() {
		rec.Content = volume.Guest
	}
	var size int64
	if r.Block() || r.Size > 0 || r.Limit > 0 {
		size, err = r.Choose(defaultSize, mount.Minimum(r.FS), step(r.BlockSize))
		if err == nil {
			err = p.room(ctx, r.Name, size)
		}
		if err != nil {
			return volume.Volume{}, err
		}
	}
	args := append([]string{"create"}, rec.options(size)...)
	if r.Block() {
		args = append(args, "-s", "-b", number(int64(r.BlockSize)), "-V", number(size))
	}
	f := &found{record: rec, dataset: p.Dataset + "/" + r.Name, size: size}
	switch _, err := zfs(ctx, append(args, f.dataset)...); {
	case errors.Is(err, errExists):
		return b.Get(ctx, r.Name)
	case err != nil:
		return volume.Volume{}, fmt.Errorf("create volume %s: %w", r.Name, err)
	}
	return f.volume(), nil
}

// options of a new dataset, but for what "zfs create" has flags of its own for.
func (r record) options(size int64) []string {
	args := []string{"-o", r.String()}
	if r.Compression != "" {
		args = append(args, "-o", "compression="+r.Compression)
	}
	if !r.Block() {
		args = append(args, "-o", "mountpoint=legacy", "-o", "xattr=sa", "-o", "acltype=posix")
	}
	if !r.Block() && size > 0 {
		args = append(args, "-o", "refquota="+number(size))
	}
	return args
}

func number(n int64) string { return strconv.FormatInt(n, 10) }

// step is what a volume's size is a multiple of.
func step(blockSize spec.Bytes) int64 { return max(int64(blockSize), 4096) }

// Stage is volume.Backend's.
func (b *Backend) Stage(ctx context.Context, id string, use volume.Use) (volume.Source, error) {
	ctx, unlock, err := b.take(ctx, id)
	if err != nil {
		return volume.Source{}, err
	}
	defer unlock()
	f, err := b.find(ctx, id)
	if err != nil {
		return volume.Source{}, err
	}
	source, err := f.stage(ctx, use)
	if err == nil && f.Origin.Copy != "" && !f.Used {
		f.Used = true
		_, err = zfs(ctx, "set", f.record.String(), f.dataset)
	}
	if err != nil {
		return volume.Source{}, fmt.Errorf("stage volume %s: %w", id, err)
	}
	return source, nil
}

// StageFiles is volume.FilesStager's. Where there is one pool, a file system can only be there: ZFS is not asked, which takes a program.
func (b *Backend) StageFiles(ctx context.Context, ids []string) (map[string]volume.Source, error) {
	sources := map[string]volume.Source{}
	if len(b.pools) == 1 {
		for _, id := range ids {
			if volume.ValidName(id) {
				sources[id] = volume.Source{Device: b.pools[0].Dataset + "/" + id, FSType: mount.ZFS}
			}
		}
		return sources, nil
	}
	all, err := b.list(ctx)
	for _, f := range all {
		if slices.Contains(ids, f.id()) && !f.Block() && !f.Direct && sources[f.id()].Device == "" {
			sources[f.id()] = volume.Source{Device: f.dataset, FSType: mount.ZFS}
		}
	}
	return sources, err
}

func (f *found) stage(ctx context.Context, use volume.Use) (volume.Source, error) {
	switch {
	case use.As != volume.AsFiles && !f.Block():
		return volume.Source{}, volume.Invalid("volume", "class %s is of file volumes, which have no block device", f.Class)
	case !f.Block(): // guests have it from a filer
		return volume.Source{Device: f.dataset, FSType: mount.ZFS}, nil
	case (use.As == volume.AsGuest) != f.Direct:
		return volume.Source{}, volume.Invalid("volume", "attach=direct is what guests attach themselves, and nothing else is")
	}
	device, err := f.device(ctx)
	if err != nil {
		return volume.Source{}, err
	}
	switch use.As {
	case volume.AsGuest:
		return volume.Source{Guest: spec.Volume{Name: f.id(), Class: f.Class, Block: &spec.BlockVolume{Path: device, FSType: f.FS}}}, nil
	case volume.AsRaw:
		points, err := mount.Points(device)
		if err != nil {
			return volume.Source{}, err
		}
		if len(points) > 0 {
			return volume.Source{}, fmt.Errorf("%w: this host has its file system mounted on %s", volume.ErrInUse, points[0])
		}
		if err := f.mark(ctx, volume.Guest); err != nil || !use.ReadOnly {
			return volume.Source{Device: device}, err
		}
		var l mount.Loop
		err = reaching(ctx, f.dataset, func(context.Context) (err error) { l, err = mount.Attach(device, true); return err })
		if err != nil {
			return volume.Source{}, err
		}
		return volume.Source{Device: l.Device}, nil
	default:
		return volume.Source{Device: device, FSType: f.FS}, f.format(ctx, device)
	}
}

// format makes a blank volume's file system, and refuses one that the host's kernel must not mount.
func (f *found) format(ctx context.Context, device string) error {
	switch f.Content {
	case volume.Guest:
		return fmt.Errorf("%w: a task has had the volume as a block device, and what is on it now could attack this host's kernel; attach it as a block device", volume.ErrForeign)
	case volume.Blank:
		err := reaching(ctx, f.dataset, func(ctx context.Context) error {
			disk, err := os.OpenFile(device, os.O_RDWR, 0)
			if err != nil {
				return err
			}
			defer disk.Close()
			return mount.Format(ctx, disk, f.FS, mount.Held(ctx))
		})
		if err != nil {
			return err
		}
		return f.mark(ctx, volume.Trusted)
	}
	return nil
}

// mark records who writes the volume's content.
func (f *found) mark(ctx context.Context, c volume.Content) error {
	if f.Content == c {
		return nil
	}
	f.Content = c
	_, err := zfs(ctx, "set", f.record.String(), f.dataset)
	return err
}

// blkZName is the request that tells a zvol's name (include/sys/zvol.h BLKZNAME): _IOR(0x12, 125, char[256]).
const blkZName = 0x8100127d

// device finds the zvol's device node, which comes a moment after the zvol. Where there is udev a link leads to it; a node's own name does
// not say whose it is.
func (f *found) device(ctx context.Context) (string, error) {
	var node string
	err := reaching(ctx, f.dataset, func(ctx context.Context) (err error) { node, err = f.node(ctx); return err })
	if err != nil {
		return "", err // not node, which what was left alone may still write
	}
	return node, nil
}

func (f *found) node(ctx context.Context) (string, error) {
	for wait := time.Millisecond; ; wait *= 2 {
		if device, err := filepath.EvalSymlinks("/dev/zvol/" + f.dataset); err == nil {
			if name, err := zvolName(device); err == nil && name == f.dataset {
				return device, nil
			}
		}
		nodes, err := filepath.Glob("/sys/block/zd*")
		if err != nil {
			return "", err
		}
		for _, node := range nodes {
			device := filepath.Join("/dev", filepath.Base(node))
			if name, err := zvolName(device); err == nil && name == f.dataset {
				return device, nil
			}
		}
		if wait > 8*time.Second {
			return "", fmt.Errorf("%w: the zvol %s has no device node; is its property volmode none?", volume.ErrUnavailable, f.dataset)
		}
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return "", context.Cause(ctx)
		}
	}
}

func zvolName(device string) (string, error) {
	f, err := os.OpenFile(device, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return "", err
	}
	defer f.Close()
	var name [256]byte
	if err := ioctl(f, blkZName, &name); err != nil {
		return "", err
	}
	return unix.ByteSliceToString(name[:]), nil
}

// Unstage is volume.Backend's. A zvol's device is always there; what may have to go is a read-only one over it.
func (b *Backend) Unstage(ctx context.Context, id string) error {
	if !volume.ValidName(id) {
		return nil
	}
	ctx, unlock, err := b.take(ctx, id)
	if err != nil {
		return err
	}
	defer unlock()
	f, err := b.find(ctx, id)
	if errors.Is(err, volume.ErrNotFound) || err == nil && !f.Block() {
		return nil
	}
	if err == nil {
		err = f.release(ctx)
	}
	if err != nil {
		return fmt.Errorf("unstage volume %s: %w", id, err)
	}
	return nil
}

// loops are the read-only devices over the zvol's.
func (f *found) loops(ctx context.Context) ([]mount.Loop, error) {
	device, err := f.device(ctx)
	if err != nil {
		return nil, err
	}
	return mount.Loops(device)
}

func (f *found) release(ctx context.Context) error {
	device, err := f.device(ctx)
	if err != nil {
		return err
	}
	return mount.ReleaseUnused(device)
}

// Expand is volume.Expander's.
func (b *Backend) Expand(ctx context.Context, id string, size, limit int64) (int64, error) {
	ctx, unlock, err := b.take(ctx, id)
	if err != nil {
		return 0, err
	}
	defer unlock()
	f, err := b.find(ctx, id)
	if err != nil {
		return 0, err
	}
	if f.size == 0 {
		return 0, volume.Invalid("volume "+id, "it has no quota that could grow")
	}
	want, err := volume.Request{Name: id, Size: max(size, f.size), Limit: limit}.Choose(0, 0, step(f.BlockSize))
	if err != nil {
		return 0, err
	}
	if want > f.size {
		p, err := b.pool(f.Pool)
		if err == nil {
			err = p.room(ctx, id, want-f.size)
		}
		if err != nil {
			return 0, err
		}
		name := "refquota="
		if f.Block() {
			name = "volsize="
		}
		if _, err := zfs(ctx, "set", name+number(want), f.dataset); err != nil {
			return 0, fmt.Errorf("expand volume %s: %w", id, err)
		}
	}
	if !f.Block() {
		return want, nil
	}
	loops, err := f.loops(ctx)
	for _, l := range loops {
		err = errors.Join(err, mount.Resized(l))
	}
	return want, err
}

// Reschedule is volume.Scheduler's.
func (b *Backend) Reschedule(ctx context.Context, id, schedule string) error {
	ctx, unlock, err := b.take(ctx, id)
	if err != nil {
		return err
	}
	defer unlock()
	f, err := b.find(ctx, id)
	if err != nil || f.Schedule == schedule {
		return err
	}
	f.Schedule = schedule
	_, err = zfs(ctx, "set", f.record.String(), f.dataset)
	return err
}

// Capacity is volume.Backend's.
func (b *Backend) Capacity(ctx context.Context, params volume.Parameters) (int64, error) {
	p, err := b.check(&volume.Request{Name: "new", Size: 1, Parameters: params})
	if err != nil {
		return 0, err
	}
	return p.free(ctx)
}

// Ready is volume.Backend's. A degraded pool still keeps volumes.
func (b *Backend) Ready(ctx context.Context) error {
	for _, p := range b.pools {
		zpool := zpool(p.Dataset)
		out, err := command(ctx, "zpool", "list", "-H", "-o", "health,readonly", zpool)
		if err != nil && !errors.Is(err, volume.ErrUnavailable) {
			err = fmt.Errorf("%w: %w", volume.ErrUnavailable, err)
		}
		if err != nil && strings.Contains(err.Error(), "no such pool") {
			err = fmt.Errorf("%w; import its zpool", err)
		}
		if err != nil {
			return fmt.Errorf("pool %s: %w", p.Name, err)
		}
		switch health, readOnly, _ := strings.Cut(strings.TrimSpace(out), "\t"); {
		case health != "ONLINE" && health != "DEGRADED":
			return fmt.Errorf("pool %s: %w: zpool %s is %s", p.Name, volume.ErrUnavailable, zpool, health)
		case readOnly == "on":
			return fmt.Errorf("pool %s: %w: zpool %s is imported read-only", p.Name, volume.ErrUnavailable, zpool)
		}
	}
	return nil
}
