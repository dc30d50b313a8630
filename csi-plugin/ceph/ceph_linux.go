package ceph

import (
	"cmp"
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/cradlestack/cradlestack/csi-plugin/mount"
	"github.com/cradlestack/cradlestack/csi-plugin/volume"
	"github.com/cradlestack/cradlestack/spec"
)

// A Pool is a subvolume group that volumes are kept in. It belongs to this package alone, and is made with its first volume.
type Pool struct {
	Name  string // what the parameter pool says; the first one is the default
	FS    string // the file system
	Group string
}

// ParsePool reads FS or FS/GROUP; the group is called cradle otherwise.
func ParsePool(name, where string) (Pool, error) {
	fs, group, ok := strings.Cut(where, "/")
	if !ok {
		group = "cradle"
	}
	if !volume.ValidName(fs) || !volume.ValidName(group) {
		return Pool{}, fmt.Errorf("--pool %q: write FILESYSTEM, or FILESYSTEM/GROUP for a subvolume group that is not called cradle", where)
	}
	return Pool{Name: name, FS: fs, Group: group}, nil
}

// Config says how to reach the cluster.
type Config struct {
	Conf    string // ceph.conf; default /etc/ceph/ceph.conf
	ID      string // of the client whose key this plugin has; default admin
	Keyring string // that has it; default what ceph.conf says
	Host    string // this host's name, which no other host has
	Dir     string // where mounts, their keys and locks are, gone after a reboot: /run/cradle/ceph
}

// Backend is volume.Backend on CephFS.
type Backend struct {
	pools  []Pool
	config Config
	boot   string // this host's boot_id
}

// Open takes pools into use. The cluster need not be reachable.
func Open(pools []Pool, c Config) (*Backend, error) {
	if len(pools) == 0 {
		return nil, errors.New("no pool: name the file system that volumes are kept on")
	}
	c.Conf, c.ID, c.Dir = cmp.Or(c.Conf, "/etc/ceph/ceph.conf"), cmp.Or(c.ID, "admin"), cmp.Or(c.Dir, "/run/cradle/ceph")
	if c.Host == "" {
		return nil, errors.New("this host has no name")
	}
	if err := os.MkdirAll(c.Dir, 0o700); err != nil {
		return nil, err
	}
	boot, err := mount.Boot()
	if err != nil {
		return nil, err
	}
	return &Backend{pools, c, boot}, nil
}

// Close does nothing: all is in the cluster.
func (b *Backend) Close() error { return nil }

func (b *Backend) locks() mount.Locks { return mount.Locks(filepath.Join(b.config.Dir, "lock")) }

// with does something to volumes: it has their locks, and a session.
func (b *Backend) with(ctx context.Context, do func(context.Context, *session) error, names ...string) error {
	if len(names) > 0 {
		held, unlock, err := b.locks().Take(ctx, names...)
		if err != nil {
			return err
		}
		defer unlock()
		ctx = held
	}
	s, err := b.session(ctx)
	if err != nil {
		return err
	}
	defer s.close()
	return do(ctx, s)
}

// Keys of a subvolume's metadata. Ceph has them in lower case; a snapshot's name is in hexadecimal therefore.
const (
	volumeKey    = "org.cradlestack.volume"
	snapshotsKey = "org.cradlestack.snapshot."
	attachedKey  = "org.cradlestack.attachment."
)

func snapshotKey(name string) string { return snapshotsKey + hex.EncodeToString([]byte(name)) }

// A record is what Ceph does not know of a volume.
type record struct {
	Version int  `json:"version"`          // 1
	Making  bool `json:"making,omitempty"` // there is no volume yet
	volume.Parameters
	Origin     volume.Origin `json:"origin,omitzero"`
	Created    time.Time     `json:"created,omitzero"`
	Generation int           `json:"generation,omitempty"`
}

// A taken is what Ceph does not know of a snapshot. It is written before the snapshot is there.
type taken struct {
	Created   time.Time `json:"created"`
	Size      int64     `json:"size"`
	Automatic bool      `json:"automatic,omitempty"`
	Hidden    bool      `json:"hidden,omitempty"` // for a clone, while that is made
}

// An attached is what has a volume mounted by a key of its own. It is written before the key is made, and goes after it.
type attached struct {
	Host   string `json:"host"`
	Boot   string `json:"boot"`             // the host's boot_id: with another one everything that it had mounted is gone
	Target string `json:"target,omitempty"` // where a guest's is published; "" is the host's own mount, and what begins as copying one for a copy
}

// A found is a subvolume.
type found struct {
	record
	pool      Pool
	id        string
	path      string // in the file system
	namespace string
	data      string // the data pool
	size, has int64
	snapshots map[string]taken // what there may be
	attached  map[string]attached
}

func (f *found) volume() volume.Volume {
	return volume.Volume{ID: f.id, Size: f.size, Origin: f.Origin, Created: f.Created, Generation: f.Generation, Parameters: f.Parameters}
}

// whole says whether it is a volume. What is not was left by a call that did not come to its end.
func (f *found) whole() bool { return f.Version == 1 && !f.Making }

// What "fs subvolume info" answers.
type subvolumeInfo struct {
	Path      string          `json:"path"`
	Namespace string          `json:"pool_namespace"`
	Pool      string          `json:"data_pool"`
	Quota     json.RawMessage `json:"bytes_quota"` // a number, or "infinite"
	Used      int64           `json:"bytes_used"`
}

// look reads what there is of a subvolume.
func (s *session) look(ctx context.Context, p Pool, id string) (*found, error) {
	f := &found{pool: p, id: id}
	var info subvolumeInfo
	if err := s.run(ctx, &info, f.of("info")); err != nil {
		return nil, err
	}
	var texts map[string]string
	if err := s.run(ctx, &texts, f.of("metadata ls")); err != nil {
		return nil, err
	}
	return f.is(info, texts)
}

// is makes it what Ceph says of it, and its metadata.
func (f *found) is(info subvolumeInfo, texts map[string]string) (*found, error) {
	p, id := f.pool, f.id
	f.snapshots, f.attached = map[string]taken{}, map[string]attached{}
	if json.Unmarshal(info.Quota, &f.size) != nil {
		f.size = 0
	}
	f.path, f.namespace, f.data, f.has = info.Path, info.Namespace, info.Pool, info.Used
	for key, text := range texts {
		if name, ok := strings.CutPrefix(key, snapshotsKey); ok {
			var t taken
			if name, err := hex.DecodeString(name); err == nil && json.Unmarshal([]byte(text), &t) == nil {
				f.snapshots[string(name)] = t
			}
		}
		if name, ok := strings.CutPrefix(key, attachedKey); ok {
			var a attached
			if err := json.Unmarshal([]byte(text), &a); err != nil {
				return nil, fmt.Errorf("subvolume %s/%s/%s: its metadata %s: %w", p.FS, p.Group, id, key, err)
			}
			f.attached[name] = a
		}
	}
	text, ok := texts[volumeKey]
	if !ok {
		return f, nil
	}
	if err := json.Unmarshal([]byte(text), &f.record); err != nil {
		return nil, fmt.Errorf("subvolume %s/%s/%s: its metadata %s: %w", p.FS, p.Group, id, volumeKey, err)
	}
	if f.Version != 1 {
		return nil, fmt.Errorf("subvolume %s/%s/%s: its metadata %s: its version is %d; this program reads version 1", p.FS, p.Group, id, volumeKey, f.Version)
	}
	return f, nil
}

// find looks for a subvolume in all pools, also for one that is no volume yet.
func (s *session) find(ctx context.Context, id string) (*found, error) {
	if !volume.ValidName(id) {
		return nil, fmt.Errorf("volume %q: %w", id[:min(len(id), volume.MaxName)], volume.ErrNotFound)
	}
	for _, p := range s.b.pools {
		f, err := s.look(ctx, p, id)
		if !errors.Is(err, volume.ErrNotFound) {
			return f, err
		}
	}
	return nil, fmt.Errorf("volume %s: %w", id, volume.ErrNotFound)
}

// volume finds a volume.
func (s *session) volume(ctx context.Context, id string) (*found, error) {
	f, err := s.find(ctx, id)
	if err == nil && !f.whole() {
		err = fmt.Errorf("volume %s: %w: it has not wholly been made", id, volume.ErrNotFound)
	}
	if err != nil {
		return nil, err
	}
	return f, nil
}

// ids of the subvolumes of a pool.
func (s *session) ids(ctx context.Context, p Pool) ([]string, error) {
	var all []named
	err := s.run(ctx, &all, asks(manager, "fs subvolume ls", "vol_name", p.FS, "group_name", p.Group))
	if errors.Is(err, errNoGroup) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("pool %s: %w", p.Name, err)
	}
	return slices.DeleteFunc(names(all), func(id string) bool { return !volume.ValidName(id) }), nil
}

// each calls do with every subvolume that there is. One that can't be read is left to whoever asks for it by name.
func (s *session) each(ctx context.Context, do func(*found) error) error {
	for _, p := range s.b.pools {
		ids, err := s.ids(ctx, p)
		if err != nil {
			return err
		}
		all, err := s.lookAll(ctx, p, ids)
		if err != nil {
			return err
		}
		for _, f := range all {
			if err := do(f); err != nil {
				return err
			}
		}
	}
	return nil
}

// lookAll reads what there is of subvolumes that can be read.
func (s *session) lookAll(ctx context.Context, p Pool, ids []string) (all []*found, err error) {
	for _, id := range ids {
		f, err := s.look(ctx, p, id)
		switch {
		case err == nil:
			all = append(all, f)
		case s.dead != nil || ctx.Err() != nil || errors.Is(err, volume.ErrUnavailable):
			return nil, err
		}
	}
	return all, nil
}

// Get is volume.Backend's.
func (b *Backend) Get(ctx context.Context, id string) (v volume.Volume, err error) {
	if !volume.ValidName(id) {
		return v, fmt.Errorf("volume %q: %w", id[:min(len(id), volume.MaxName)], volume.ErrNotFound)
	}
	err = b.with(ctx, func(ctx context.Context, s *session) error {
		f, err := s.volume(ctx, id)
		if err == nil {
			v = f.volume()
		}
		return err
	})
	return v, err
}

// List is volume.Backend's.
func (b *Backend) List(ctx context.Context) (all []volume.Volume, err error) {
	err = b.with(ctx, func(ctx context.Context, s *session) error {
		return s.each(ctx, func(f *found) error {
			if f.whole() {
				all = append(all, f.volume())
			}
			return nil
		})
	})
	slices.SortFunc(all, func(a, b volume.Volume) int { return cmp.Compare(a.ID, b.ID) })
	return all, err
}

const (
	step  = 4096
	least = 1 << 20
)

// check refuses what this backend can't do.
func (b *Backend) check(r *volume.Request) (Pool, error) {
	if err := volume.CheckName("volume name", r.Name); err != nil {
		return Pool{}, err
	}
	switch {
	case r.Class != volume.GFS:
		return Pool{}, volume.Invalid("parameter class", "CephFS has files on many hosts at once, which is class gfs; for %s use another backend", r.Class)
	case r.FS != "":
		return Pool{}, volume.Invalid("parameter fs", "a gfs volume is on CephFS itself; leave it out")
	case r.Compression != "":
		return Pool{}, volume.Invalid("parameter compression", "is a matter of Ceph's pools (ceph osd pool set POOL compression_mode); leave it out")
	case r.BlockSize != 0:
		return Pool{}, volume.Invalid("parameter volblocksize", "is for block volumes; leave it out")
	case r.Size < 0 || r.Limit < 0 || r.Limit > 0 && r.Limit < r.Size:
		return Pool{}, fmt.Errorf("volume %s: %w: at least %d and at most %d bytes", r.Name, volume.ErrRange, r.Size, r.Limit)
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

// free is what Ceph says can be written to the file system's data pool, with its copies.
func (s *session) free(ctx context.Context, p Pool) (int64, error) {
	var all []struct {
		Name string   `json:"name"`
		Data []string `json:"data_pools"`
	}
	if err := s.run(ctx, &all, asks(monitor, "fs ls")); err != nil {
		return 0, err
	}
	data := ""
	for _, fs := range all {
		if fs.Name == p.FS && len(fs.Data) > 0 {
			data = fs.Data[0]
		}
	}
	if data == "" {
		return 0, fmt.Errorf("pool %s: %w: the cluster has no file system %s", p.Name, volume.ErrUnavailable, p.FS)
	}
	var df struct {
		Pools []struct {
			Name  string `json:"name"`
			Stats struct {
				Max int64 `json:"max_avail"`
			} `json:"stats"`
		} `json:"pools"`
	}
	if err := s.run(ctx, &df, asks(monitor, "df")); err != nil {
		return 0, err
	}
	for _, pool := range df.Pools {
		if pool.Name == data {
			return pool.Stats.Max, nil
		}
	}
	return 0, fmt.Errorf("pool %s: %w: ceph df does not name the data pool %s", p.Name, volume.ErrUnavailable, data)
}

// room refuses a volume that is larger than what is free. Quotas reserve nothing: together they may still be larger than the cluster.
func (s *session) room(ctx context.Context, p Pool, name string, size int64) error {
	free, err := s.free(ctx, p)
	if err == nil && size > free {
		err = fmt.Errorf("volume %s: %w: it would have %v, and the file system %s has %v left", name, volume.ErrNoSpace, spec.Bytes(size), p.FS, spec.Bytes(free))
	}
	return err
}

// Create is volume.Backend's.
func (b *Backend) Create(ctx context.Context, r volume.Request) (v volume.Volume, err error) {
	if r.Origin != (volume.Origin{}) {
		return v, volume.Invalid("origin", "is for clones")
	}
	p, err := b.check(&r)
	if err != nil {
		return v, err
	}
	err = b.with(ctx, func(ctx context.Context, s *session) error {
		switch f, err := s.find(ctx, r.Name); {
		case err == nil && f.whole():
			v = f.volume()
			return v.Fits(r)
		case err == nil:
			err = s.discard(ctx, f)
			if err != nil {
				return err
			}
		case !errors.Is(err, volume.ErrNotFound):
			return err
		}
		f, err := s.make(ctx, p, r, 0)
		if err == nil {
			err = s.record(ctx, f)
		}
		if err != nil {
			return fmt.Errorf("create volume %s: %w", r.Name, err)
		}
		v = f.volume()
		return nil
	}, r.Name)
	return v, err
}

// make makes the subvolume, which is no volume before its record says so.
func (s *session) make(ctx context.Context, p Pool, r volume.Request, size int64) (*found, error) {
	if r.Size > 0 || r.Limit > 0 {
		var err error
		if size, err = r.Choose(least, least, step); err == nil {
			err = s.room(ctx, p, r.Name, size)
		}
		if err != nil {
			return nil, err
		}
	}
	f := &found{pool: p, id: r.Name, size: size, snapshots: map[string]taken{}, attached: map[string]attached{}}
	f.record = record{Version: 1, Parameters: r.Parameters, Origin: r.Origin, Created: time.Now().UTC().Round(0), Generation: r.Generation}
	create := f.of("create", "namespace_isolated", true, "mode", "755")
	if size > 0 {
		create.and("size", size)
	}
	err := s.run(ctx, nil, create)
	if errors.Is(err, errNoGroup) {
		if err = s.run(ctx, nil, asks(manager, "fs subvolumegroup create", "vol_name", p.FS, "group_name", p.Group)); err == nil {
			err = s.run(ctx, nil, create)
		}
	}
	return f, err
}

// record writes the volume's record.
func (s *session) record(ctx context.Context, f *found) error {
	return s.run(ctx, nil, f.of("metadata set", "key_name", volumeKey, "value", quoted(f.record)))
}

// discard removes what a call has left that did not come to its end. What holds files and has no record is somebody else's.
func (s *session) discard(ctx context.Context, f *found) error {
	if f.Version == 0 && f.has > 0 {
		return fmt.Errorf("volume %s: the subvolume %s/%s/%[1]s is there, holds files and has no metadata %[4]s: it is not ours; rename or remove it, or name another group in --pool", f.id, f.pool.FS, f.pool.Group, volumeKey)
	}
	if err := s.uncopied(ctx, f); err != nil {
		return err
	}
	if err := s.elsewhere(ctx, f, f.path, filepath.Dir(f.path)); errors.Is(err, volume.ErrInUse) {
		return fmt.Errorf("volume %s: %w: another host makes it", f.id, volume.ErrBusy)
	} else if err != nil {
		return err
	}
	for name := range f.snapshots {
		if err := s.drop(ctx, f, name); err != nil {
			return err
		}
	}
	if err := s.revokeAll(ctx, f); err != nil {
		return err
	}
	return s.remove(ctx, f)
}

func (s *session) remove(ctx context.Context, f *found) error {
	return s.removes(ctx, f.of("rm"))
}

// Delete is volume.Backend's.
func (b *Backend) Delete(ctx context.Context, id string) error {
	if !volume.ValidName(id) {
		return nil
	}
	err := b.with(ctx, func(ctx context.Context, s *session) error {
		f, err := s.find(ctx, id)
		if errors.Is(err, volume.ErrNotFound) {
			return nil
		}
		if err != nil {
			return err
		}
		if !f.whole() {
			return s.discard(ctx, f)
		}
		if err := s.unused(ctx, f); err != nil {
			return err
		}
		names, err := s.snapshots(ctx, f)
		if err != nil {
			return err
		}
		for _, name := range names {
			if t := f.snapshots[name]; !t.Automatic && !t.Hidden {
				return fmt.Errorf("%w: it has the snapshot %s@%s; delete that first", volume.ErrInUse, id, name)
			}
		}
		for _, name := range names {
			if err := s.drop(ctx, f, name); err != nil {
				return err
			}
		}
		if err := s.revokeAll(ctx, f); err != nil {
			return err
		}
		return s.remove(ctx, f)
	}, id)
	if err != nil {
		return fmt.Errorf("delete volume %s: %w", id, err)
	}
	return nil
}

// unused says, with an ErrInUse, who has the volume mounted: this host, or any other client of the cluster.
func (s *session) unused(ctx context.Context, f *found) error {
	m := s.b.mounting(f.id)
	if st, err := m.state(); err != nil {
		return err
	} else if st == living {
		if idle, err := m.idle(); err != nil {
			return err
		} else if !idle {
			return fmt.Errorf("%w: this host has it mounted", volume.ErrInUse)
		}
		if err := s.unstage(ctx, m); err != nil {
			return err
		}
	} else if st != absent {
		return fmt.Errorf("%w: this host has it mounted", volume.ErrInUse)
	}
	if err := s.uncopied(ctx, f); err != nil {
		return err
	}
	return s.elsewhere(ctx, f, f.path, filepath.Dir(f.path))
}

// uncopied ends what interrupted calls of this host have left mounted to copy a volume, which is locked, or its snapshots. A call that is at work is an ErrBusy.
func (s *session) uncopied(ctx context.Context, f *found) error {
	return s.copies(ctx, f, func(ctx context.Context, target string) error { return s.uncopy(ctx, f, target) })
}

// uncopy ends what is mounted to copy a volume.
func (s *session) uncopy(ctx context.Context, f *found, target string) error {
	if err := s.b.mounting(target).away(ctx); err != nil {
		return err
	}
	return s.revoke(ctx, f, target)
}

// copies calls do for each copy of a volume, which is locked, that was begun on this host and that nobody makes any more. One that somebody makes is an ErrBusy.
func (s *session) copies(ctx context.Context, f *found, do func(ctx context.Context, target string) error) error {
	for _, a := range f.attached {
		clone, copied := cloneOf(a.Target)
		if a.Host != s.b.config.Host || !copied {
			continue
		}
		if clone == f.id { // whose lock is the caller's
			if err := do(ctx, a.Target); err != nil {
				return err
			}
			continue
		}
		busy := true
		err := s.b.locks().Alone(ctx, clone, func(ctx context.Context) error {
			busy = false
			return do(ctx, a.Target)
		})
		if err == nil && busy {
			err = fmt.Errorf("%w: it is cloned to volume %s", volume.ErrBusy, clone)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// elsewhere says, with an ErrInUse, which client of the cluster has one of a volume's directories mounted. Locks are a host's own: by this alone other hosts know
// that a volume is copied, which is done from the directory above its files (copied).
func (s *session) elsewhere(ctx context.Context, f *found, dirs ...string) error {
	clients, err := s.clients(ctx, f, dirs...)
	if i := slices.IndexFunc(clients, func(c sessionOf) bool { return c.Metadata.Root != f.path }); i >= 0 {
		return fmt.Errorf("%w: host %s clones it", volume.ErrBusy, clients[i].Metadata.Hostname)
	}
	if err == nil && len(clients) > 0 {
		err = fmt.Errorf("%w: host %s has it mounted; where that host is lost, its session ends within five minutes", volume.ErrInUse, clients[0].Metadata.Hostname)
	}
	return err
}

// A sessionOf is one that a client has with the metadata server.
type sessionOf struct {
	ID       int64 `json:"id"`
	Metadata struct {
		Root     string `json:"root"`
		Hostname string `json:"hostname"`
	} `json:"client_metadata"`
}

// clients are those that have one of these directories of the volume mounted. Each has a session with the metadata server of rank 0, which has the root.
func (s *session) clients(ctx context.Context, f *found, dirs ...string) (some []sessionOf, err error) {
	var all []sessionOf
	err = s.run(ctx, &all, asks(f.pool.FS+":0", "session ls"))
	for _, c := range all {
		if slices.Contains(dirs, c.Metadata.Root) {
			some = append(some, c)
		}
	}
	return some, err
}

// Expand is volume.Expander's.
func (b *Backend) Expand(ctx context.Context, id string, size, limit int64) (n int64, err error) {
	err = b.with(ctx, func(ctx context.Context, s *session) error {
		f, err := s.volume(ctx, id)
		if err != nil {
			return err
		}
		if f.size == 0 {
			return volume.Invalid("volume "+id, "it has no quota that could grow")
		}
		if n, err = (volume.Request{Name: id, Size: max(size, f.size), Limit: limit}).Choose(0, 0, step); err != nil || n <= f.size {
			return err
		}
		if err := s.room(ctx, f.pool, id, n-f.size); err != nil {
			return err
		}
		if err := s.run(ctx, nil, f.of("resize", "new_size", fmt.Sprint(n), "no_shrink", true)); err != nil {
			return fmt.Errorf("expand volume %s: %w", id, err)
		}
		return nil
	}, id)
	return n, err
}

// Capacity is volume.Backend's.
func (b *Backend) Capacity(ctx context.Context, params volume.Parameters) (n int64, err error) {
	if params.Class == volume.NFS { // of a caller who names no class
		params.Class = volume.GFS
	}
	p, err := b.check(&volume.Request{Name: "new", Size: 1, Parameters: params})
	if err != nil {
		return 0, err
	}
	err = b.with(ctx, func(ctx context.Context, s *session) error {
		n, err = s.free(ctx, p)
		return err
	})
	return n, err
}

// Ready is volume.Backend's: a monitor, the manager and the metadata server of each file system answer.
func (b *Backend) Ready(ctx context.Context) error {
	return b.with(ctx, func(ctx context.Context, s *session) error {
		for _, p := range b.pools {
			if _, err := s.ids(ctx, p); err != nil {
				return err
			}
		}
		return nil
	})
}
