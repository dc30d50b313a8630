package zfs

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"hash/fnv"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/cradlestack/cradlestack/csi-plugin/mount"
	"github.com/cradlestack/cradlestack/csi-plugin/volume"
)

// Snapshots that are nobody's have a name that no volume's snapshot can have: zfs allows the colon, ValidName does not. ZFS removes them
// by itself with the last clone that needs them.
const (
	cloned  = "clone:"   // + a hash of the name of the clone that was made of the volume itself
	deleted = "deleted:" // + a time
)

// A snap is a snapshot.
type snap struct {
	record
	name     string // tank/cradle/v@s
	size     int64
	created  time.Time
	clones   []string
	deferred bool // it goes with its last clone
}

// dataset is what it is a snapshot of.
func (s snap) dataset() string {
	dataset, _, _ := strings.Cut(s.name, "@")
	return dataset
}

func (s snap) id() volume.SnapshotID {
	dataset, name, _ := strings.Cut(s.name, "@")
	return volume.SnapshotID{Volume: dataset[strings.LastIndexByte(dataset, '/')+1:], Name: name}
}

// ours says whether a snapshot is one that a user knows.
func (s snap) ours() bool { return s.Version == 1 && volume.ValidName(s.id().Name) }

// hidden says whether it is one that nobody knows and that goes with its clones.
func (s snap) hidden() bool {
	name := s.id().Name
	return strings.HasPrefix(name, cloned) || strings.HasPrefix(name, deleted)
}

func (s snap) snapshot() volume.Snapshot {
	return volume.Snapshot{ID: s.id(), Size: s.size, Created: s.created, Automatic: s.Automatic}
}

// snaps lists the snapshots of a dataset, or of all below it. One that an administrator took has its volume's record.
func snaps(ctx context.Context, dataset string, depth int) ([]snap, error) {
	out, err := zfs(ctx, "list", "-Hp", "-t", "snapshot", "-d", strconv.Itoa(depth), "-o", "name,volsize,creation,clones,defer_destroy,"+property, dataset)
	if err != nil {
		return nil, err
	}
	var all []snap
	for _, row := range rows(out) {
		if len(row) != 6 {
			return nil, fmt.Errorf("zfs list: %q is no snapshot", row)
		}
		s := snap{name: row[0], deferred: row[4] == "on"}
		if row[3] != "-" && row[3] != "" {
			s.clones = strings.Split(row[3], ",")
		}
		if json.Unmarshal([]byte(row[5]), &s.record) != nil {
			s.record = record{}
		}
		if s.size, err = strconv.ParseInt(row[1], 10, 64); err != nil { // "-" of a file system
			s.size = s.Quota
		}
		seconds, err := strconv.ParseInt(row[2], 10, 64)
		if err != nil {
			return nil, fmt.Errorf("zfs list: creation of %s: %w", s.name, err)
		}
		s.created = time.Unix(seconds, 0).UTC()
		all = append(all, s)
	}
	return all, nil
}

// Snapshots is volume.Snapshotter's.
func (b *Backend) Snapshots(ctx context.Context, id string) ([]volume.Snapshot, error) {
	var found []snap
	if id == "" {
		for _, p := range b.pools {
			some, err := snaps(ctx, p.Dataset, 2)
			if err = p.said(ctx, err); err != nil {
				return nil, err
			}
			found = append(found, some...)
		}
	} else {
		f, err := b.find(ctx, id)
		if err == nil {
			found, err = snaps(ctx, f.dataset, 1)
		}
		if err != nil && !errors.Is(err, volume.ErrNotFound) {
			return nil, err
		}
	}
	var all []volume.Snapshot
	for _, s := range found {
		if s.ours() {
			all = append(all, s.snapshot())
		}
	}
	slices.SortFunc(all, func(a, b volume.Snapshot) int { return cmp.Compare(a.ID.String(), b.ID.String()) })
	return all, nil
}

// Snapshot is volume.Snapshotter's. ZFS takes it in an instant, so that nothing has to hold still for long.
func (b *Backend) Snapshot(ctx context.Context, r volume.SnapshotRequest) (volume.Snapshot, error) {
	id := r.ID
	if err := r.Check(); err != nil {
		return volume.Snapshot{}, err
	}
	ctx, unlock, err := b.take(ctx, id.Volume, "@"+id.Name)
	if err != nil {
		return volume.Snapshot{}, err
	}
	defer unlock()
	f, err := b.find(ctx, id.Volume)
	if err != nil {
		return volume.Snapshot{}, err
	}
	name := f.dataset + "@" + id.Name
	if len(name) > maxDataset {
		return volume.Snapshot{}, volume.Invalid("snapshot name", "%s has %d characters in ZFS, which takes %d; choose one that is shorter by %d", name, len(name), maxDataset, len(name)-maxDataset)
	}
	of := "" // all, of which one alone has a name
	if r.Automatic {
		of = id.Volume
	}
	all, err := b.Snapshots(ctx, of)
	if err != nil {
		return volume.Snapshot{}, err
	}
	for _, s := range all {
		if s.ID == id {
			return s, nil
		}
		if s.ID.Name == id.Name && !s.Automatic && !r.Automatic {
			return volume.Snapshot{}, fmt.Errorf("snapshot %s %w: it is volume %s's", id.Name, volume.ErrExists, s.ID.Volume)
		}
	}
	rec := f.record
	rec.Created, rec.Origin, rec.Automatic = time.Time{}, volume.Origin{}, r.Automatic
	if !f.Block() {
		rec.Quota = f.size
	}
	if err := f.take(ctx, name, rec, r.Hold); err != nil && !errors.Is(err, errExists) {
		return volume.Snapshot{}, fmt.Errorf("snapshot %s: %w", id, err)
	}
	s, err := f.snap(ctx, id.Name)
	return s.snapshot(), err
}

// snap finds a snapshot of the volume that a user knows.
func (f *found) snap(ctx context.Context, name string) (snap, error) {
	all, err := snaps(ctx, f.dataset, 1)
	if err != nil {
		return snap{}, err
	}
	for _, s := range all {
		if s.ours() && s.id().Name == name {
			return s, nil
		}
	}
	return snap{}, fmt.Errorf("snapshot %s@%s: %w", f.id(), name, volume.ErrNotFound)
}

// take takes a snapshot, of what the file system has in memory as well. Where nobody can be made to hold still, it is as after a power cut.
func (f *found) take(ctx context.Context, name string, rec record, hold volume.Hold) error {
	if hold != nil {
		if release, err := hold(ctx); err == nil {
			defer func() { _ = release() }() // an instant is consistent in any case
		}
	} else if f.Block() {
		device, err := f.device(ctx)
		if err != nil {
			return err
		}
		points, err := mount.Points(device)
		if err != nil {
			return err
		}
		if len(points) > 0 {
			if err := reaching(ctx, f.dataset, func(context.Context) error { return mount.Sync(points[0]) }); err != nil {
				return err
			}
		}
	}
	_, err := zfs(ctx, "snapshot", "-o", rec.String(), name)
	return err
}

// DeleteSnapshot is volume.Snapshotter's.
func (b *Backend) DeleteSnapshot(ctx context.Context, id volume.SnapshotID) error {
	ctx, unlock, err := b.take(ctx, id.Volume, "@"+id.Name)
	if err != nil {
		return err
	}
	defer unlock()
	f, err := b.find(ctx, id.Volume)
	if err == nil {
		var s snap
		if s, err = f.snap(ctx, id.Name); err == nil {
			err = s.drop(ctx)
		}
		if err == nil || errors.Is(err, volume.ErrNotFound) {
			err = errors.Join(err, f.sweep(ctx))
		}
	}
	if errors.Is(err, volume.ErrNotFound) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("delete snapshot %s: %w", id, err)
	}
	return nil
}

// sweep removes snapshots that were deleted while somebody looked at them.
func (f *found) sweep(ctx context.Context) error {
	all, err := snaps(ctx, f.dataset, 1)
	for _, s := range all {
		if err == nil && s.left() && strings.HasPrefix(s.id().Name, deleted) {
			if err = s.drop(ctx); errors.Is(err, errBusy) || errors.Is(err, errNoDataset) {
				err = nil
			}
		}
	}
	return err
}

// drop removes a snapshot. One that clones need goes with the last of them, and until then has another name; so has one that somebody looks at.
func (s snap) drop(ctx context.Context) error {
	_, err := zfs(ctx, "destroy", s.name)
	looked := errors.Is(err, errBusy) && !s.hidden()
	if !errors.Is(err, errChildren) && !looked {
		return err
	}
	name := s.name
	if !s.hidden() {
		name = fmt.Sprintf("%s@%s%d", s.dataset(), deleted, time.Now().UnixNano())
		if _, err := zfs(ctx, "rename", s.name, name); err != nil {
			return err
		}
	}
	if _, err = zfs(ctx, "destroy", "-d", name); looked && errors.Is(err, errBusy) {
		err = nil
	}
	return err
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
	ctx, unlock, err := b.take(ctx, r.Name, origin)
	if err != nil {
		return volume.Volume{}, err
	}
	defer unlock()
	// A clone that is there is judged by the request alone: what it was made of may have grown since, or be gone.
	f, err := b.find(ctx, r.Name)
	if err == nil {
		r.FS, r.BlockSize = cmp.Or(r.FS, f.FS), cmp.Or(r.BlockSize, f.BlockSize)
		if err := f.volume().Fits(r); err != nil {
			return f.volume(), err
		}
	} else if errors.Is(err, volume.ErrNotFound) {
		f, err = b.clone(ctx, r, origin, hold)
	}
	if err == nil && r.Origin.Volume != "" {
		err = b.forget(ctx, r)
	}
	if err != nil {
		return volume.Volume{}, err
	}
	return f.volume(), nil
}

// between is the snapshot by which a volume is cloned.
func between(dataset, clone string) string {
	h := fnv.New64a()
	h.Write([]byte(clone))
	return fmt.Sprintf("%s@%s%016x", dataset, cloned, h.Sum64())
}

// forget lets the snapshot that a volume was cloned by go with the clone.
func (b *Backend) forget(ctx context.Context, r volume.Request) error {
	from, err := b.find(ctx, r.Origin.Volume)
	if err == nil {
		_, err = zfs(ctx, "destroy", "-d", between(from.dataset, r.Name))
	}
	if errors.Is(err, volume.ErrNotFound) {
		return nil
	}
	return err
}

// clone makes the dataset.
func (b *Backend) clone(ctx context.Context, r volume.Request, origin string, hold volume.Hold) (*found, error) {
	from, err := b.find(ctx, origin)
	if err != nil {
		return nil, err
	}
	snapshot, content := between(from.dataset, r.Name), from.Content
	if r.Origin.Volume == "" {
		s, err := from.snap(ctx, r.Origin.Snapshot.Name)
		if err != nil {
			return nil, err
		}
		snapshot, content, from.size = s.name, s.Content, s.size
	}
	if err := from.cloneable(&r); err != nil {
		return nil, err
	}
	p, err := b.check(&r)
	if err != nil {
		return nil, err
	}
	fromPool, err := b.pool(from.Pool)
	if err == nil && zpool(p.Dataset) != zpool(fromPool.Dataset) {
		err = volume.Invalid("parameter pool", "%s is in another pool, and a clone shares its data; leave it out", r.Origin)
	}
	size := from.size
	if err == nil && r.Size > from.size {
		if size, err = r.Choose(0, from.size, step(r.BlockSize)); err == nil {
			err = p.room(ctx, r.Name, size-from.size)
		}
	}
	if err != nil {
		return nil, err
	}
	if r.Origin.Volume != "" {
		// What an interrupted call left is of another time.
		if _, err := zfs(ctx, "destroy", "-d", snapshot); err != nil && !errors.Is(err, errNoDataset) {
			return nil, err
		}
		if err := from.take(ctx, snapshot, record{}, hold); err != nil {
			return nil, fmt.Errorf("clone %s: %w", r.Origin, err)
		}
	}
	rec := record{Version: 1, Parameters: r.Parameters, Origin: r.Origin, Created: time.Now().UTC(), Content: content, Generation: r.Generation}
	if r.Direct && r.Block() {
		rec.Content = volume.Guest
	}
	args := append([]string{"clone"}, rec.options(size)...)
	if r.Block() && size > from.size {
		args = append(args, "-o", "volsize="+number(size))
	}
	if _, err := zfs(ctx, append(args, snapshot, p.Dataset+"/"+r.Name)...); err != nil && !errors.Is(err, errExists) {
		return nil, fmt.Errorf("clone %s: %w", r.Origin, err)
	}
	return b.find(ctx, r.Name)
}

func zpool(dataset string) string {
	name, _, _ := strings.Cut(dataset, "/")
	return name
}

// cloneable refuses a clone that would need its content converted, and fills in what was left out.
func (f *found) cloneable(r *volume.Request) error {
	switch {
	case r.Class != f.Class:
		return volume.Invalid("parameter class", "%s is of class %s; a clone has the same (cradle-csi copy moves content to another)", r.Origin, f.Class)
	case r.FS != "" && r.FS != f.FS:
		return volume.Invalid("parameter fs", "%s has %s, and so has its clone", r.Origin, f.FS)
	case r.BlockSize != 0 && r.BlockSize != f.BlockSize:
		return volume.Invalid("parameter volblocksize", "%s has %v, and so has its clone", r.Origin, f.BlockSize)
	}
	r.FS, r.BlockSize = f.FS, f.BlockSize
	if r.Size = max(r.Size, f.size); r.Limit > 0 && r.Limit < r.Size {
		return fmt.Errorf("volume %s: %w: %s has %d bytes, and at most %d are asked for", r.Name, volume.ErrRange, r.Origin, f.size, r.Limit)
	}
	return nil
}

// Delete is volume.Backend's.
func (b *Backend) Delete(ctx context.Context, id string) error {
	if !volume.ValidName(id) {
		return nil
	}
	ctx, unlock, err := b.take(ctx, id)
	if err != nil {
		return err
	}
	defer unlock()
	f, err := b.find(ctx, id)
	if err == nil {
		err = b.remove(ctx, f)
	} else if errors.Is(err, volume.ErrNotFound) {
		err = nil
		for _, p := range b.pools { // what an interrupted Receive left
			err = errors.Join(err, (&found{dataset: p.Dataset + "/" + receiving + id}).destroy(ctx))
		}
	}
	if err != nil {
		return fmt.Errorf("delete volume %s: %w", id, err)
	}
	return nil
}

func (b *Backend) remove(ctx context.Context, f *found) error {
	if err := f.unused(ctx); err != nil {
		return err
	}
	all, err := snaps(ctx, f.dataset, 1)
	if err != nil {
		return err
	}
	for _, s := range all {
		if s.ours() && !s.Automatic {
			return fmt.Errorf("%w: it has the snapshot %s; delete that first", volume.ErrInUse, s.id())
		}
	}
	if f.Block() {
		if err := b.reclaim(ctx, f); err != nil {
			return err
		}
	}
	for _, s := range all {
		if err := s.drop(ctx); err != nil && !errors.Is(err, errNoDataset) {
			return err
		}
	}
	if len(all) > 0 { // without snapshots there are no clones
		if err := f.independent(ctx); err != nil {
			return err
		}
	}
	return f.destroy(ctx)
}

// reclaim ends a copy to cold storage: what is read for it would be in the way of a deletion. It does not begin again before the context's locks end.
func (b *Backend) reclaim(ctx context.Context, f *found) error {
	waiting, cancel := volume.Reclaiming(ctx)
	defer cancel()
	err := mount.Reclaim(waiting, mount.Held(ctx), f.id(), func() error { return Suspended(zpool(f.dataset)) })
	if err != nil {
		return err
	}
	return f.copied().destroy(ctx) // what one that was killed has left
}

// independent makes no clone depend on a volume. One that is promoted takes the snapshots with it that it needs; they go with what else
// depends on them, the volume itself.
func (f *found) independent(ctx context.Context) error {
	for {
		all, err := snaps(ctx, f.dataset, 1)
		if err != nil {
			return err
		}
		i := slices.IndexFunc(all, func(s snap) bool { return len(s.clones) > 0 })
		if i < 0 {
			return nil
		}
		if _, err := zfs(ctx, "promote", all[i].clones[0]); err != nil {
			return err
		}
	}
}

// unused says, with an ErrInUse, where the volume is mounted.
func (f *found) unused(ctx context.Context) error {
	if !f.Block() {
		targets, err := mount.OfDataset(f.dataset)
		if err == nil && len(targets) > 0 {
			err = fmt.Errorf("%w: it is mounted on %s", volume.ErrInUse, targets[0])
		}
		return err
	}
	if err := f.release(ctx); err != nil {
		return err
	}
	device, err := f.device(ctx)
	if err != nil {
		return err
	}
	uses, err := mount.Uses(device)
	if err == nil && len(uses) > 0 {
		err = fmt.Errorf("%w: it is mounted on %s", volume.ErrInUse, uses[0])
	}
	return err
}
