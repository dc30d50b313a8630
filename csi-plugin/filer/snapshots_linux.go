package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/cradlestack/cradlestack/csi-plugin/filer/api"
	"github.com/cradlestack/cradlestack/csi-plugin/filer/gateway"
	"github.com/cradlestack/cradlestack/csi-plugin/filer/lease"
	"github.com/cradlestack/cradlestack/csi-plugin/filer/snapshots"
	"github.com/cradlestack/cradlestack/csi-plugin/filer/webdav"
	"github.com/cradlestack/cradlestack/csi-plugin/mount"
	"github.com/cradlestack/cradlestack/csi-plugin/tree"
	"github.com/cradlestack/cradlestack/csi-plugin/volume"
)

// snapshotting is what a backend has to be for its volumes' snapshots to be seen and taken here.
type snapshotting interface {
	volume.Snapshotter
	volume.Browser
}

// snapshotter is the backend, for a volume of files.
func (f *filer) snapshotter(ctx context.Context, id string) (snapshotting, error) {
	v, err := f.backend.Get(ctx, id)
	if err != nil {
		return nil, err
	}
	b, ok := f.backend.(snapshotting)
	if !ok || v.Block() {
		return nil, volume.Invalid("volume "+id, "its snapshots have no files that could be shown")
	}
	return b, nil
}

// seen are a volume's snapshots as the protocols show them.
func (f *filer) seen(id string) *snapshots.Source {
	b, ok := f.backend.(snapshotting)
	if !ok {
		return nil
	}
	show := func(name string, show func(volume.SnapshotID) error) error {
		err := show(volume.SnapshotID{Volume: id, Name: name})
		if err != nil {
			f.log.Warn("show a snapshot", "volume", id, "snapshot", name, "error", err)
		}
		if errors.Is(err, volume.ErrNotFound) {
			err = fmt.Errorf("%w: %w", unix.ENOENT, err)
		}
		return err
	}
	return &snapshots.Source{
		List: func() ([]snapshots.Snapshot, error) {
			all, err := b.Snapshots(context.Background(), id)
			if err != nil {
				f.log.Warn("list snapshots", "volume", id, "error", err)
			}
			var seen []snapshots.Snapshot
			for _, s := range all {
				seen = append(seen, snapshots.Snapshot{Name: s.ID.Name, Taken: s.Created})
			}
			return seen, err
		},
		Open: func(name string) (root *os.Root, err error) {
			err = show(name, func(s volume.SnapshotID) (err error) {
				root, err = b.Browse(context.Background(), s)
				return err
			})
			return root, err
		},
		Mount: func(name, path string) error {
			return show(name, func(s volume.SnapshotID) error { return b.BrowseAt(context.Background(), s, path) })
		},
	}
}

func (f *filer) snapshots(ctx context.Context, id string) ([]api.Snapshot, error) {
	b, err := f.snapshotter(ctx, id)
	if err != nil {
		return nil, err
	}
	all, err := b.Snapshots(ctx, id)
	out := []api.Snapshot{}
	for _, s := range all {
		out = append(out, shown(s))
	}
	slices.SortFunc(out, func(a, b api.Snapshot) int { return a.Created.Compare(b.Created) })
	return out, err
}

func shown(s volume.Snapshot) api.Snapshot {
	return api.Snapshot{Name: s.ID.Name, Created: s.Created, Automatic: s.Automatic}
}

func (f *filer) snapshot(ctx context.Context, id, name string) (api.Snapshot, error) {
	b, err := f.snapshotter(ctx, id)
	if err != nil {
		return api.Snapshot{}, err
	}
	if err := roomFor(ctx, b, volume.SnapshotID{Volume: id, Name: name}); err != nil {
		return api.Snapshot{}, err
	}
	s, err := b.Snapshot(ctx, volume.SnapshotRequest{ID: volume.SnapshotID{Volume: id, Name: name}})
	if errors.Is(err, volume.ErrExists) { // it says which other volume's, which is not for everybody
		err = fmt.Errorf("snapshot %s %w, of another volume: names of snapshots are everybody's; take another one", name, volume.ErrExists)
	}
	return shown(s), err
}

// maxSnapshots of a volume are taken here, beside those of a schedule: each takes room that no quota of the volume's counts, and time wherever they are listed.
const maxSnapshots = 1000

// roomFor says whether one more snapshot can be taken.
func roomFor(ctx context.Context, b volume.Snapshotter, id volume.SnapshotID) error {
	all, err := b.Snapshots(ctx, id.Volume)
	if err != nil {
		return err
	}
	taken := 0
	for _, s := range all {
		if s.ID == id {
			return nil
		}
		if !s.Automatic || strings.HasPrefix(s.ID.Name, beforeRollback) {
			taken++
		}
	}
	if taken >= maxSnapshots {
		return volume.Invalid("snapshot "+id.Name, "volume %s has %d besides those of its schedule; remove some, by nomad volume snapshot delete PLUGIN %s@SNAPSHOT", id.Volume, taken, id.Volume)
	}
	return nil
}

// beforeRollback is what the names of those snapshots begin with that rollbacks can be undone by.
const beforeRollback = "before-rollback-"

// A pending rollback is a file in the state directory, from its beginning to its end: one that was interrupted is completed when the filer starts again, or when its volume
// can be read again. Nobody gets the volume before.
type pending struct {
	Volume   string `json:"volume"`
	Snapshot string `json:"snapshot"`
	Path     string `json:"path"`
	Undo     string `json:"undo"`

	// Of who has asked for it, for the audit log.
	Who       string `json:"who,omitempty"`
	Namespace string `json:"namespace,omitempty"`
	As        string `json:"as,omitempty"` // the volume, as they call it
}

func (f *filer) rollbacks() records[pending] {
	return records[pending]{filepath.Join(f.state, "rollbacks"), "rollback of volume"}
}

// rollback makes a volume, or a path in it, what it was when a snapshot was taken. Files that are in both stay the same files, as clients have them open. as is how
// the caller calls the volume.
func (f *filer) rollback(ctx context.Context, c caller, as string, r api.Rollback) (api.RolledBack, error) {
	part := strings.TrimPrefix(path.Clean("/"+r.Path), "/")
	if part == "" {
		part = "."
	}
	if first, _, _ := strings.Cut(part, "/"); first == snapshots.Dir {
		return api.RolledBack{}, volume.Invalid("path "+r.Path, "snapshots stay as they are; name what is to become as it was, without %s", snapshots.Dir)
	}
	p := pending{Volume: c.volume, Snapshot: r.Snapshot, Path: part, Undo: beforeRollback + stamp(), Who: c.who, Namespace: c.namespace, As: as}
	half, err := f.half(p.Volume)
	if err != nil {
		return api.RolledBack{}, err
	}
	done, err := f.makeAsItWas(ctx, p, false)
	if err == nil && half != nil {
		f.resume(ctx, p.Volume)
	}
	return done, err
}

// makeAsItWas does a rollback, or completes one that was interrupted: that stays to be completed where it can't be, or another one takes its place which does all of it.
func (f *filer) makeAsItWas(ctx context.Context, p pending, completes bool) (done api.RolledBack, err error) {
	b, err := f.snapshotter(ctx, p.Volume)
	if err != nil {
		return done, err
	}
	if err := roomFor(ctx, b, volume.SnapshotID{Volume: p.Volume, Name: p.Undo}); err != nil {
		return done, err
	}
	from, err := b.Browse(ctx, volume.SnapshotID{Volume: p.Volume, Name: p.Snapshot})
	if err != nil {
		return done, err
	}
	defer from.Close()
	if _, err := from.Lstat(p.Path); err != nil {
		return done, fmt.Errorf("path %s: %w in snapshot %s of volume %s", p.Path, volume.ErrNotFound, p.Snapshot, p.Volume)
	}
	to, leave, err := f.enter(ctx, p.Volume, nil)
	if err != nil {
		return done, err
	}
	defer func() { err = errors.Join(err, leave()) }()
	if _, err := to.Lstat(path.Dir(p.Path)); err != nil {
		return done, fmt.Errorf("path %s: there is no %s in volume %s now; roll that back", p.Path, path.Dir(p.Path), p.Volume)
	}
	half, err := f.half(p.Volume)
	switch {
	case err != nil:
		return done, err
	case completes && (half == nil || *half != p):
		return done, fmt.Errorf("volume %s: %w: it was rolled back meanwhile; try again", p.Volume, volume.ErrInUse)
	case half != nil && p.Path != "." && p.Path != half.Path:
		return done, f.refusal(half, errors.New("this rollback is of another path"))
	}
	settle := func(err error) error {
		if err != nil && half != nil {
			return err
		}
		return errors.Join(err, f.forget(p.Volume))
	}
	if err := f.rollbacks().write(p.Volume, p); err != nil {
		return done, err
	}
	err = f.hold(ctx, p.Volume, func() error {
		if _, err := b.Snapshot(ctx, volume.SnapshotRequest{ID: volume.SnapshotID{Volume: p.Volume, Name: p.Undo}, Automatic: true}); err != nil {
			return err
		}
		done.Undo = p.Undo
		listing, end := f.lists.Use(ctx)
		changes, err := pass(listing, from, to, p.Path)
		end()
		err = tooMuch(p.Volume, err)
		done.Entries, done.Bytes = changes.Entries, changes.Bytes
		if err != nil && ctx.Err() != nil { // it is to be completed: who waits must not go on before
			return fmt.Errorf("it is completed as soon as a filer serves again: %w: %w", lease.ErrEnded, err)
		}
		// Before anybody goes on: completed once more after a crash, it would take from them what they have been told is done since.
		return settle(err)
	})
	if err == nil || ctx.Err() == nil {
		if err != nil && done.Undo != "" && !errors.Is(err, tree.ErrTooMuch) { // which is before anything is changed
			err = fmt.Errorf("volume %s is part of snapshot %s and part of what it was before, which is kept as %s; roll it back again once the reason is mended: %w", p.Volume, p.Snapshot, p.Undo, err)
		}
		err = settle(err)
	}
	return done, err
}

// forget has the rollback of a volume not be completed any more.
func (f *filer) forget(id string) error {
	if err := f.rollbacks().remove(id); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	f.halves.Delete(id)
	return nil
}

// half is the rollback that a former process had begun of a volume, and that is not completed; nil where there is none, or somebody has removed its record.
func (f *filer) half(id string) (*pending, error) {
	if _, is := f.halves.Load(id); !is {
		return nil, nil
	}
	p, err := f.rollbacks().read(id)
	if errors.Is(err, fs.ErrNotExist) {
		f.halves.Delete(id)
		return nil, nil
	}
	if err != nil {
		err = fmt.Errorf("volume %s: %w: it may be half rolled back: %w; restore %s, or remove it to have the volume as it is", id, volume.ErrUnavailable, err, f.rollbacks().file(id))
	}
	return &p, err
}

// refusal says why nobody gets a volume, and what to do.
func (f *filer) refusal(p *pending, why error) error {
	part := ""
	if p.Path != "." {
		part = ", path " + p.Path
	}
	// Its kind is this one, whatever the reason is of.
	return fmt.Errorf("volume %s%s: %w: its rollback to snapshot %s was interrupted, and nobody gets the volume before that is completed: %s; once that is mended publish or grant it again, roll it back to another snapshot (%s has what was before), or remove %s to have it as it is", p.Volume, part, volume.ErrUnavailable, p.Snapshot, why.Error(), p.Undo, f.rollbacks().file(p.Volume))
}

// isWhole refuses a volume that may be half rolled back.
func (f *filer) isWhole(id string) error {
	p, err := f.half(id)
	if p == nil || err != nil {
		return err
	}
	return f.refusal(p, errors.New("it could not be when the filer started, whose log says why"))
}

// whole completes the rollback of a volume that may be half rolled back, for who wants to have it.
func (f *filer) whole(ctx context.Context, id string) error {
	if p, err := f.half(id); p == nil || err != nil {
		return err
	}
	_, err := lasting(ctx, f, id, "volume "+id+", whose rollback is completed", nil, func(ctx context.Context) (none struct{}, err error) {
		p, err := f.half(id)
		if p == nil || err != nil {
			return none, err
		}
		if _, err := f.fileVolume(ctx, id); err != nil {
			return none, err
		}
		if err := f.finish(ctx, *p); err != nil {
			return none, f.refusal(p, err)
		}
		f.resume(ctx, id)
		return none, nil
	})
	return err
}

// resume serves what is published and granted of a volume that is whole again.
func (f *filer) resume(ctx context.Context, id string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	publications, err := f.published().all()
	grants, gerr := f.granted().all()
	publications = slices.DeleteFunc(publications, func(p api.Publication) bool { return p.Volume != id })
	grants = slices.DeleteFunc(grants, func(g api.Grant) bool { return g.Volume != id })
	if err := errors.Join(err, gerr, f.serveAll(ctx, publications, grants)); err != nil {
		f.log.Warn("what was published before", "volume", id, "error", err)
	}
}

// memoryOfLists is a quarter of the host's: rollbacks and comparisons have all names of a volume's files in memory, and whoever may ask for them can have made any number.
func memoryOfLists() int64 {
	var host unix.Sysinfo_t
	if err := unix.Sysinfo(&host); err != nil {
		return 1 << 30
	}
	return int64(host.Totalram) * int64(host.Unit) / 4
}

// tooMuch says what to do where there was none.
func tooMuch(id string, err error) error {
	if errors.Is(err, tree.ErrTooMuch) {
		return fmt.Errorf("volume %s: %w: roll back a path in it at a time, or try again once other volumes are neither being rolled back nor compared: %w", id, volume.ErrUnavailable, err)
	}
	return err
}

// gate is what changes of a volume by WebDAV and S3 go through.
func (f *filer) gate(id string) *gateway.Gate {
	g, _ := f.gates.LoadOrStore(id, &gateway.Gate{})
	return g.(*gateway.Gate)
}

// hold does something while no client changes a volume: they wait.
func (f *filer) hold(ctx context.Context, id string, do func() error) error {
	return stuck(f.gate(id).Hold(ctx, func() error { return f.engine.Hold(id, do) }))
}

// pass makes a part of one directory like that of another.
func pass(ctx context.Context, from, to *os.Root, part string) (changes tree.Changes, err error) {
	theirs, err := tree.List(ctx, to, part, notOurs...)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return changes, err
	}
	r, w := io.Pipe()
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		err := tree.Send(ctx, from, part, theirs, w, notOurs...)
		w.CloseWithError(err)
		return err
	})
	g.Go(func() error {
		var err error
		changes, err = tree.Receive(ctx, to, r)
		r.CloseWithError(err)
		return err
	})
	err = g.Wait()
	return changes, errors.Join(err, mount.SyncRoot(to))
}

// notOurs is what a file system has for itself, and what helps to serve it: uploads that are under way go on.
var notOurs = append([]string{"lost+found"}, webdav.Hidden...)

// complete completes the rollbacks that a former process had begun.
func (f *filer) complete(ctx context.Context) error {
	ids, err := f.rollbacks().ids()
	if err != nil {
		return err
	}
	var errs []error
	for _, id := range ids {
		f.halves.Store(id, nil)
		p, err := f.half(id)
		if p == nil || err != nil {
			errs = append(errs, err)
		} else if err := f.finish(ctx, *p); err != nil {
			f.completed(*p, "", err)
			errs = append(errs, f.refusal(p, err))
		}
	}
	return errors.Join(errs...)
}

// finish completes a rollback. One of another volume of that name, or that nothing is left of, is none.
func (f *filer) finish(ctx context.Context, p pending) error {
	done, err := f.makeAsItWas(ctx, p, true)
	if errors.Is(err, volume.ErrNotFound) && f.hopeless(ctx, p) {
		f.completed(p, "", err)
		return f.forget(p.Volume)
	}
	if err == nil {
		f.completed(p, done.Undo, nil)
	}
	return err
}

// hopeless says whether a volume has neither what it was to become nor what it was.
func (f *filer) hopeless(ctx context.Context, p pending) bool {
	b, err := f.snapshotter(ctx, p.Volume)
	if err != nil {
		return false
	}
	all, err := b.Snapshots(ctx, p.Volume)
	return err == nil && !slices.ContainsFunc(all, func(s volume.Snapshot) bool { return s.ID.Name == p.Snapshot || s.ID.Name == p.Undo })
}

// completed tells what has come of a rollback that was interrupted.
func (f *filer) completed(p pending, undo string, err error) {
	f.audit.write(event{
		What: "rollback completed after an interruption", Who: cmp.Or(p.Who, "cradle-filer"), Namespace: p.Namespace, Volume: cmp.Or(p.As, p.Volume), Snapshot: p.Snapshot, Path: p.Path, Undo: undo,
	}, err)
}

// A visit is this process's own work with a volume's files.
type visit struct {
	end  context.CancelCauseFunc // of a comparison, which no rollback waits for; nil for others
	left chan struct{}
}

// begin begins a visit: a volume has one at a time, and a rollback ends a comparison, which who may only read could begin again and again. f.mu is held.
func (f *filer) begin(ctx context.Context, id string, end context.CancelCauseFunc) (left func(), err error) {
	for v := f.entered[id]; v != nil; v = f.entered[id] {
		if v.end == nil || end != nil {
			return nil, fmt.Errorf("volume %s: %w: it is being rolled back, or compared; try again", id, volume.ErrInUse)
		}
		v.end(fmt.Errorf("volume %s: %w: it is being rolled back; try again", id, volume.ErrInUse))
		f.mu.Unlock()
		select {
		case <-v.left:
		case <-ctx.Done():
		}
		f.mu.Lock()
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
	}
	v := &visit{end: end, left: make(chan struct{})}
	f.entered[id] = v
	return func() {
		delete(f.entered, id)
		close(v.left)
	}, nil
}

// enter opens a volume's files for this process. They stay where they are mounted until leave is called. Only one at a time may; end is a comparison's end.
func (f *filer) enter(ctx context.Context, id string, end context.CancelCauseFunc) (root *os.Root, leave func() error, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	left, err := f.begin(ctx, id, end)
	if err != nil {
		return nil, nil, err
	}
	at, err := f.place(ctx, id)
	if err == nil {
		root, err = os.OpenRoot(at)
	}
	leave = func() error {
		f.mu.Lock()
		defer f.mu.Unlock()
		left()
		var err error
		if root != nil {
			err = root.Close()
		}
		return errors.Join(err, f.release(context.WithoutCancel(ctx), id, 0))
	}
	if err != nil {
		f.mu.Unlock()
		err = errors.Join(err, leave())
		f.mu.Lock()
	}
	return root, leave, err
}

// maxComparing is how many volumes are compared at once.
const maxComparing = 2

func (f *filer) diff(ctx context.Context, id, from, to string) (all []tree.Difference, err error) {
	b, err := f.snapshotter(ctx, id)
	if err != nil {
		return nil, err
	}
	// All that is in both is read.
	if _, at := f.compared.LoadOrStore(id, nil); at {
		return nil, fmt.Errorf("volume %s: %w: it is being compared; try again", id, volume.ErrInUse)
	}
	defer f.compared.Delete(id)
	select {
	case f.comparing <- struct{}{}:
		defer func() { <-f.comparing }()
	case <-ctx.Done():
		return nil, fmt.Errorf("volume %s: others are being compared: %w", id, context.Cause(ctx))
	}
	ctx, end := context.WithCancelCause(ctx)
	defer end(nil)
	defer func() {
		if err != nil && errors.Is(context.Cause(ctx), volume.ErrInUse) {
			err = context.Cause(ctx)
		}
	}()
	list := func(name string) (entries []tree.Entry, err error) {
		var root *os.Root
		if name == "" {
			var leave func() error
			if root, leave, err = f.enter(ctx, id, end); err != nil {
				return nil, err
			}
			defer func() { err = errors.Join(err, leave()) }()
		} else {
			if root, err = b.Browse(ctx, volume.SnapshotID{Volume: id, Name: name}); err != nil {
				return nil, err
			}
			defer root.Close()
		}
		return tree.List(ctx, root, ".", notOurs...)
	}
	ctx, free := f.lists.Use(ctx)
	defer free()
	older, err := list(from)
	if err != nil {
		return nil, tooMuch(id, err)
	}
	newer, err := list(to)
	if err != nil {
		return nil, tooMuch(id, err)
	}
	if all = tree.Compare(older, newer); all == nil {
		all = []tree.Difference{}
	}
	return all, nil
}
