package ceph

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"path/filepath"
	"slices"
	"time"

	"github.com/cradlestack/cradlestack/csi-plugin/mount"
	"github.com/cradlestack/cradlestack/csi-plugin/volume"
)

// snapshots are the names of those that a subvolume has, also of those that an administrator took.
func (s *session) snapshots(ctx context.Context, f *found) ([]string, error) {
	var all []named
	if err := s.run(ctx, &all, f.of("snapshot ls")); err != nil {
		return nil, err
	}
	return names(all), nil
}

// named is one of a list that Ceph answers with.
type named struct {
	Name string `json:"name"`
}

func names(all []named) (some []string) {
	for _, one := range all {
		some = append(some, one.Name)
	}
	return unique(some)
}

// known are the snapshots of a volume that a user knows.
func (s *session) known(ctx context.Context, f *found) ([]volume.Snapshot, error) {
	names, err := s.snapshots(ctx, f)
	if err != nil {
		return nil, err
	}
	return s.ofUsers(ctx, f, names)
}

// ofUsers are those of a volume's snapshots that a user knows.
func (s *session) ofUsers(ctx context.Context, f *found, names []string) (all []volume.Snapshot, err error) {
	for _, name := range names {
		t, ours := f.snapshots[name]
		if t.Hidden || !volume.ValidName(name) {
			continue
		}
		if !ours {
			if t, err = s.foreign(ctx, f, name); err != nil {
				return nil, err
			}
		}
		all = append(all, volume.Snapshot{ID: volume.SnapshotID{Volume: f.id, Name: name}, Size: t.Size, Created: t.Created, Automatic: t.Automatic})
	}
	return all, nil
}

// takenAt is when Ceph has taken a snapshot, to the microsecond.
func (s *session) takenAt(ctx context.Context, f *found, name string) (string, error) {
	var info struct {
		Created string `json:"created_at"`
	}
	err := s.run(ctx, &info, f.of("snapshot info", "snap_name", name))
	return info.Created, err
}

// foreign is what is known of a snapshot that an administrator took.
func (s *session) foreign(ctx context.Context, f *found, name string) (taken, error) {
	text, err := s.takenAt(ctx, f, name)
	created, perr := time.Parse("2006-01-02 15:04:05.999999", text)
	if perr != nil {
		created = f.Created
	}
	return taken{Created: created, Size: f.size}, err
}

// Snapshots is volume.Snapshotter's.
func (b *Backend) Snapshots(ctx context.Context, id string) (all []volume.Snapshot, err error) {
	if id != "" && !volume.ValidName(id) {
		return nil, nil
	}
	err = b.with(ctx, func(ctx context.Context, s *session) error {
		if id == "" {
			all, err = s.all(ctx)
			return err
		}
		f, err := s.volume(ctx, id)
		if errors.Is(err, volume.ErrNotFound) {
			return nil
		}
		if err == nil {
			all, err = s.known(ctx, f)
		}
		return err
	})
	slices.SortFunc(all, func(a, b volume.Snapshot) int { return cmp.Compare(a.ID.String(), b.ID.String()) })
	return all, err
}

// all are the snapshots of all volumes.
func (s *session) all(ctx context.Context) (all []volume.Snapshot, err error) {
	err = s.each(ctx, func(f *found) error {
		if !f.whole() {
			return nil
		}
		some, err := s.known(ctx, f)
		if errors.Is(err, volume.ErrNotFound) {
			return nil // deleted meanwhile
		}
		all = append(all, some...)
		return err
	})
	return all, err
}

// Snapshot is volume.Snapshotter's. The metadata server takes it in an instant, of what clients have written by then.
func (b *Backend) Snapshot(ctx context.Context, r volume.SnapshotRequest) (snap volume.Snapshot, err error) {
	id := r.ID
	if err := r.Check(); err != nil {
		return snap, err
	}
	if !volume.ValidName(id.Volume) {
		return snap, fmt.Errorf("volume %q: %w", id.Volume[:min(len(id.Volume), volume.MaxName)], volume.ErrNotFound)
	}
	err = b.with(ctx, func(ctx context.Context, s *session) error {
		f, err := s.volume(ctx, id.Volume)
		if err != nil {
			return err
		}
		all, err := s.known(ctx, f)
		if err == nil && !r.Automatic {
			all, err = s.all(ctx)
		}
		if err != nil {
			return err
		}
		for _, one := range all {
			if one.ID == id {
				snap = one
				return nil
			}
			if one.ID.Name == id.Name && !one.Automatic && !r.Automatic {
				return fmt.Errorf("snapshot %s %w: it is volume %s's", id.Name, volume.ErrExists, one.ID.Volume)
			}
		}
		t := taken{Created: time.Now().UTC().Round(0), Size: f.size, Automatic: r.Automatic}
		if err := s.take(ctx, f, id.Name, t); err != nil {
			return fmt.Errorf("snapshot %s: %w", id, err)
		}
		snap = volume.Snapshot{ID: id, Size: t.Size, Created: t.Created, Automatic: t.Automatic}
		return nil
	}, id.Volume, "@"+id.Name)
	return snap, err
}

func (s *session) take(ctx context.Context, f *found, name string, t taken) error {
	if err := s.run(ctx, nil, f.of("metadata set", "key_name", snapshotKey(name), "value", quoted(t))); err != nil {
		return err
	}
	f.snapshots[name] = t
	return s.run(ctx, nil, f.of("snapshot create", "snap_name", name))
}

// drop removes a snapshot, and then what is recorded of it; one that is not there is no error.
func (s *session) drop(ctx context.Context, f *found, name string) error {
	if err := s.removes(ctx, f.of("snapshot rm", "snap_name", name)); err != nil {
		return err
	}
	if _, ok := f.snapshots[name]; !ok {
		return nil
	}
	return s.removes(ctx, f.of("metadata rm", "key_name", snapshotKey(name)))
}

// DeleteSnapshot is volume.Snapshotter's.
func (b *Backend) DeleteSnapshot(ctx context.Context, id volume.SnapshotID) error {
	if !volume.ValidName(id.Volume) || !volume.ValidName(id.Name) {
		return nil
	}
	err := b.with(ctx, func(ctx context.Context, s *session) error {
		f, err := s.volume(ctx, id.Volume)
		if err == nil {
			err = s.uncopied(ctx, f)
		}
		if err == nil {
			err = s.elsewhere(ctx, f, filepath.Dir(f.path))
		}
		if err == nil {
			err = s.drop(ctx, f, id.Name)
		}
		if errors.Is(err, volume.ErrNotFound) {
			return nil
		}
		return err
	}, id.Volume, "@"+id.Name)
	if err != nil {
		return fmt.Errorf("delete snapshot %s: %w", id, err)
	}
	return nil
}

// Clone is volume.Cloner's. The files are copied: what "ceph fs subvolume snapshot clone" makes has the objects of its copy in the origin's namespace, whose
// keys each could read the other's (src/pybind/mgr/volumes/fs/operations/versions/subvolume_v2.py, create_clone).
func (b *Backend) Clone(ctx context.Context, r volume.Request, _ volume.Hold) (v volume.Volume, err error) {
	origin := cmp.Or(r.Origin.Volume, r.Origin.Snapshot.Volume)
	if err := volume.CheckName("volume name", r.Name); err != nil {
		return v, err
	}
	if !volume.ValidName(origin) {
		return v, fmt.Errorf("%s: %w", r.Origin, volume.ErrNotFound)
	}
	// The clone's lock is held to the end; the origin's until what is copied is mounted, as that takes as long as it does.
	err = b.with(ctx, func(ctx context.Context, s *session) error {
		f, err := s.find(ctx, r.Name)
		switch {
		case err == nil && f.whole():
			// One that is there is judged by the request alone: what it was made of may have grown since, or be gone.
			v = f.volume()
			return v.Fits(r)
		case err == nil:
			if err := s.discard(ctx, f); err != nil {
				return err
			}
		case !errors.Is(err, volume.ErrNotFound):
			return err
		}
		from, err := s.volume(ctx, origin)
		if err != nil {
			return err
		}
		f, err = s.clone(ctx, r, from)
		if err == nil {
			v = f.volume()
		}
		return err
	}, r.Name, origin)
	return v, err
}

// between is the name of the snapshot by which a volume is cloned.
func between(clone string) string {
	h := fnv.New64a()
	h.Write([]byte(clone))
	return fmt.Sprintf("cradle-clone-%016x", h.Sum64())
}

func (s *session) clone(ctx context.Context, r volume.Request, from *found) (*found, error) {
	name, size := r.Origin.Snapshot.Name, from.size
	if r.Origin.Volume == "" {
		all, err := s.known(ctx, from)
		if err != nil {
			return nil, err
		}
		i := slices.IndexFunc(all, func(one volume.Snapshot) bool { return one.ID == r.Origin.Snapshot })
		if i < 0 {
			return nil, fmt.Errorf("%s: %w", r.Origin, volume.ErrNotFound)
		}
		size = all[i].Size
	} else {
		name = between(r.Name)
	}
	if r.Class != from.Class {
		return nil, volume.Invalid("parameter class", "%s is of class %s; a clone has the same (cradle-csi copy moves content to another)", r.Origin, from.Class)
	}
	p, err := s.b.check(&r)
	if err != nil {
		return nil, err
	}
	if r.Limit > 0 && (size == 0 || r.Limit < size) {
		return nil, fmt.Errorf("volume %s: %w: %s has %d bytes, and at most %d are asked for", r.Name, volume.ErrRange, r.Origin, size, r.Limit)
	}
	r.Size, r.Limit = max(r.Size, size), 0
	if r.Origin.Volume != "" {
		// What an interrupted call left is of another time.
		if err := s.drop(ctx, from, name); err != nil {
			return nil, err
		}
		if err := s.take(ctx, from, name, taken{Created: time.Now().UTC(), Size: size, Hidden: true}); err != nil {
			return nil, fmt.Errorf("clone %s: %w", r.Origin, err)
		}
	}
	f, err := s.make(ctx, p, r, size)
	if err == nil {
		f.Making = true
		err = s.record(ctx, f)
	}
	if err == nil {
		f, err = s.copied(ctx, f, from, name)
	}
	if err == nil && r.Origin.Volume != "" {
		err = s.drop(ctx, from, name)
	}
	if err == nil {
		f.Making = false
		err = s.record(ctx, f)
	}
	if err != nil {
		return nil, fmt.Errorf("clone %s: %w", r.Origin, err)
	}
	return f, nil
}

// copied fills a subvolume with the files of another one's snapshot.
func (s *session) copied(ctx context.Context, to, from *found, snapshot string) (*found, error) {
	rec := to.record
	to, err := s.look(ctx, to.pool, to.id) // where it is
	if err != nil {
		return nil, err
	}
	to.record = rec
	was, err := s.takenAt(ctx, from, snapshot)
	if err != nil {
		return nil, err
	}
	// Of the subvolume <path>/<uuid>, <path>/.snap/<snapshot>/<uuid> is what it was; nothing can be mounted from within .snap.
	source, err := s.lend(ctx, from, copying+to.id+copying, filepath.Dir(from.path), true)
	if err != nil {
		return nil, err
	}
	target, err := s.lend(ctx, to, copying+to.id, to.path, false)
	if err != nil {
		return nil, errors.Join(err, s.uncopy(ctx, from, source.name))
	}
	back := func(err error) error {
		return errors.Join(err, s.giveBack(ctx, from, source, err), s.giveBack(ctx, to, target, err))
	}
	if err := mount.Unlock(ctx, from.id, to.id); err != nil {
		return nil, back(err)
	}
	// Locks are a host's own. Each has noted by now that it copies, so that of two at least one finds the other here.
	if err := s.unchanged(ctx, to, from, snapshot, was); err != nil {
		return nil, back(err)
	}
	err = transfer(ctx, source, filepath.Join(".snap", snapshot, filepath.Base(from.path)), target)
	if err == nil { // as long as nobody who asks whether it is copied is told no
		err = s.unchanged(ctx, to, from, snapshot, was)
	}
	return to, back(err)
}

// unchanged says whether a copy is whole: a snapshot that was removed meanwhile has looked like one with fewer files, and what another host has made is not this copy.
func (s *session) unchanged(ctx context.Context, to, from *found, snapshot, was string) error {
	now, err := s.takenAt(ctx, from, snapshot)
	if err == nil && now != was {
		err = fmt.Errorf("%w: another one has its name now", volume.ErrNotFound)
	}
	if err != nil {
		return fmt.Errorf("snapshot %s@%s, while it was copied: %w", from.id, snapshot, err)
	}
	made, err := s.look(ctx, to.pool, to.id)
	if err != nil {
		return err
	}
	if made.path != to.path {
		return fmt.Errorf("%w: another call makes it", volume.ErrUnavailable)
	}
	for _, a := range made.attached {
		if a.Host != s.b.config.Host {
			return fmt.Errorf("%w: host %s makes it", volume.ErrBusy, a.Host)
		}
	}
	return nil
}
