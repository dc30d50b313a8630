package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"time"

	"github.com/cradlestack/cradlestack/csi-plugin/filer/api"
	"github.com/cradlestack/cradlestack/csi-plugin/volume"
)

// handleVolumes answers what cradle-csi on hosts that have not the storage asks of the backend.
func (f *filer) handleVolumes(mux *http.ServeMux) {
	handle := handleJSON(mux, f.log)
	handle("GET /volumes", func(r *http.Request) (any, error) {
		all, err := f.fileVolumes(r.Context())
		if errors.Is(err, volume.ErrUnavailable) { // which is no matter of the volumes that are there
			missing, _ := api.Explain(err)
			return api.Volumes{Volumes: all, Missing: &missing}, nil
		}
		return api.Volumes{Volumes: all}, err
	})
	handle("GET /volumes/{id}", func(r *http.Request) (any, error) { return f.fileVolume(r.Context(), r.PathValue("id")) })
	handle("PUT /volumes/{id}", func(r *http.Request) (any, error) {
		var asked api.Request
		if err := read(r, "volume", &asked); err != nil {
			return nil, err
		}
		return f.makeVolume(r.Context(), r.PathValue("id"), asked)
	})
	handle("DELETE /volumes/{id}", func(r *http.Request) (any, error) { return struct{}{}, f.deleteVolume(r.Context(), r.PathValue("id")) })
	handle("POST /volumes/{id}/expand", func(r *http.Request) (any, error) {
		var asked api.Size
		if err := read(r, "size", &asked); err != nil {
			return nil, err
		}
		return f.expand(r.Context(), r.PathValue("id"), asked)
	})
	handle("GET /snapshots", func(r *http.Request) (any, error) {
		return f.snapshotsOf(r.Context(), r.URL.Query().Get("volume"))
	})
	handle("PUT /snapshots/{id}", func(r *http.Request) (any, error) {
		id, err := volume.ParseSnapshotID(r.PathValue("id"))
		if err != nil {
			return nil, err
		}
		return f.takeSnapshot(r.Context(), volume.SnapshotRequest{ID: id, Automatic: r.URL.Query().Get("automatic") == "true"})
	})
	handle("DELETE /snapshots/{id}", func(r *http.Request) (any, error) {
		id, err := volume.ParseSnapshotID(r.PathValue("id"))
		if err == nil {
			err = f.dropSnapshot(r.Context(), id)
		}
		if errors.Is(err, volume.ErrNotFound) { // there can't be one of such a name
			err = nil
		}
		return struct{}{}, err
	})
	handle("GET /capacity", func(r *http.Request) (any, error) {
		asked := map[string]string{}
		for name, values := range r.URL.Query() {
			asked[name] = values[0]
		}
		p, err := parameters(asked)
		if err != nil {
			return nil, err
		}
		n, err := f.backend.Capacity(r.Context(), p)
		return api.Size{Bytes: n}, err
	})
	handle("GET /backend", func(*http.Request) (any, error) { return api.Backend{Name: f.keptBy, Pools: f.backend.Pools()}, nil })
	handle("GET /ready", func(r *http.Request) (any, error) { return struct{}{}, f.backend.Ready(r.Context()) })
}

// fileVolumes are those that a filer can serve: what else is in its pools belongs to the plugins of its host.
func (f *filer) fileVolumes(ctx context.Context) ([]volume.Volume, error) {
	all, err := f.backend.List(ctx)
	return orEmpty(slices.DeleteFunc(all, func(v volume.Volume) bool { return v.Block() })), err
}

func (f *filer) fileVolume(ctx context.Context, id string) (volume.Volume, error) {
	v, err := f.backend.Get(ctx, id)
	if err == nil && v.Block() {
		err = volume.Invalid("volume "+id, "class %s is of block volumes, which are none of the filer's; ask the plugin that has it", v.Class)
	}
	return v, err
}

// snapshotsOf are those of a volume, or of all.
func (f *filer) snapshotsOf(ctx context.Context, id string) ([]volume.Snapshot, error) {
	b, err := power[volume.Snapshotter](f, "takes no snapshots")
	if err != nil {
		return nil, err
	}
	if id != "" && !volume.ValidName(id) {
		return []volume.Snapshot{}, nil
	}
	all, err := b.Snapshots(ctx, id)
	if err != nil || len(all) == 0 {
		return []volume.Snapshot{}, err
	}
	if id != "" {
		if v, err := f.backend.Get(ctx, id); err == nil && v.Block() {
			return []volume.Snapshot{}, nil
		}
		return all, nil
	}
	volumes, err := f.backend.List(ctx)
	blocks := map[string]bool{}
	for _, v := range volumes {
		blocks[v.ID] = v.Block()
	}
	return orEmpty(slices.DeleteFunc(all, func(s volume.Snapshot) bool { return blocks[s.ID.Volume] })), err
}

// orEmpty has a list that is empty be one in JSON.
func orEmpty[T any](all []T) []T {
	if all == nil {
		return []T{}
	}
	return all
}

// power is the backend where it is more than that.
func power[T any](f *filer, lacks string) (T, error) {
	b, ok := f.backend.(T)
	if !ok {
		return b, fmt.Errorf("%w: this backend %s", errors.ErrUnsupported, lacks)
	}
	return b, nil
}

// parameters reads those of a volume that a filer can serve.
func parameters(asked map[string]string) (volume.Parameters, error) {
	p, err := volume.ParseParameters(asked)
	if err == nil && p.Block() {
		err = volume.Invalid("parameter class", "%s is of block volumes, and a filer serves files; use nfs, or a plugin with --backend zfs or dir on the host that is to have it, where cradle-csi copy takes a volume's files", p.Class)
	}
	return p, err
}

func (f *filer) makeVolume(ctx context.Context, id string, asked api.Request) (v volume.Volume, err error) {
	r := volume.Request{Name: id, Size: asked.Size, Limit: asked.Limit, Origin: asked.Origin}
	if err := volume.CheckName("volume name", id); err != nil {
		return v, err
	}
	if r.Parameters, err = parameters(asked.Parameters); err != nil {
		return v, err
	}
	if r.Origin.Copy != "" || r.Origin.Volume != "" && r.Origin.Snapshot != (volume.SnapshotID{}) {
		return v, volume.Invalid("origin", "it is one volume, or one snapshot")
	}
	return lasting(ctx, f, id, "volume "+id, r, func(ctx context.Context) (v volume.Volume, err error) {
		if err := f.sizes(ctx, r); err != nil {
			return v, err
		}
		if r.Origin == (volume.Origin{}) {
			return f.backend.Create(ctx, r)
		}
		b, err := power[volume.Cloner](f, "makes no clones")
		if err != nil {
			return v, err
		}
		return b.Clone(ctx, r, nil)
	})
}

// sizes refuses a volume that could never be served, as its files would be in an image.
func (f *filer) sizes(ctx context.Context, r volume.Request) error {
	if !f.shared || !f.images {
		return nil
	}
	image := r.Size > 0 || r.Limit > 0
	if of := r.Origin.Volume + r.Origin.Snapshot.Volume; of != "" && !image {
		v, err := f.backend.Get(ctx, of)
		if err != nil && !errors.Is(err, volume.ErrNotFound) { // a clone may be there already
			return err
		}
		image = v.Size > 0
	}
	if image {
		return volume.Invalid("volume "+r.Name, "one on the pool of a set of filers, where that is a directory, is without a size: what has one is an image, which two hosts must not mount")
	}
	return nil
}

// deleteVolume deletes one that nobody has. Nobody gets it meanwhile.
func (f *filer) deleteVolume(ctx context.Context, id string) error {
	if !volume.ValidName(id) {
		return nil
	}
	_, err := lasting(ctx, f, id, "volume "+id+", which is being deleted", nil, func(ctx context.Context) (struct{}, error) {
		if _, err := f.fileVolume(ctx, id); errors.Is(err, volume.ErrInvalid) {
			return struct{}{}, err
		} // of one that is not there something may be left
		if err := f.leave(id); err != nil {
			return struct{}{}, err
		}
		defer f.left(id)
		if err := f.backend.Delete(ctx, id); err != nil {
			return struct{}{}, err
		}
		return struct{}{}, f.forget(id)
	})
	return err
}

// leave has nobody get a volume any more, unless somebody has it.
func (f *filer) leave(id string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	who, err := f.has(id)
	if err == nil && f.entered[id] != nil {
		who = "it is being rolled back, or compared"
	}
	if err != nil {
		return err
	}
	if who != "" {
		return fmt.Errorf("delete volume %s: %w: %s", id, volume.ErrInUse, who)
	}
	f.leaving[id] = true
	return nil
}

func (f *filer) left(id string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.leaving, id)
}

// has says by what a volume is published or granted, "" where it is not.
func (f *filer) has(id string) (string, error) {
	publications, err := f.published().all()
	for _, p := range publications {
		if p.Volume == id {
			return fmt.Sprintf("it is published as %s for %v; a publication that a host has left is ended by: cradle-filer unpublish %[1]s", p.ID, p.Clients), nil
		}
	}
	if err != nil {
		return "", err
	}
	grants, err := f.granted().all()
	for _, g := range grants {
		if g.Volume == id {
			return fmt.Sprintf("it is granted to %s; revoke that first", g.ID), nil
		}
	}
	return "", err
}

func (f *filer) expand(ctx context.Context, id string, asked api.Size) (now api.Size, err error) {
	if asked.Bytes < 0 || asked.Limit < 0 || asked.Limit > 0 && asked.Limit < asked.Bytes {
		return now, fmt.Errorf("volume %.80q: %w: at least %d and at most %d bytes", id, volume.ErrRange, asked.Bytes, asked.Limit)
	}
	b, err := power[volume.Expander](f, "has no volumes that grow")
	if err != nil {
		return now, err
	}
	return lasting(ctx, f, id, "volume "+id+", which grows", asked, func(ctx context.Context) (now api.Size, err error) {
		if _, err := f.fileVolume(ctx, id); err != nil {
			return now, err
		}
		if now.Bytes, err = b.Expand(ctx, id, asked.Bytes, asked.Limit); err != nil {
			return now, err
		}
		if err := f.grow(ctx, id); !errors.Is(err, volume.ErrNotFound) { // one that is not published grows when it is
			return now, err
		}
		return now, nil
	})
}

func (f *filer) takeSnapshot(ctx context.Context, r volume.SnapshotRequest) (s volume.Snapshot, err error) {
	b, err := power[volume.Snapshotter](f, "takes no snapshots")
	if err != nil {
		return s, err
	}
	return lasting(ctx, f, r.ID.Volume, "snapshot "+r.ID.String(), r.Automatic, func(ctx context.Context) (s volume.Snapshot, err error) {
		if _, err := f.fileVolume(ctx, r.ID.Volume); err != nil {
			return s, err
		}
		return b.Snapshot(ctx, r)
	})
}

func (f *filer) dropSnapshot(ctx context.Context, id volume.SnapshotID) error {
	b, err := power[volume.Snapshotter](f, "takes no snapshots")
	if err != nil {
		return err
	}
	_, err = lasting(ctx, f, id.Volume, "snapshot "+id.String()+", which is being deleted", nil, func(ctx context.Context) (struct{}, error) {
		if _, err := f.fileVolume(ctx, id.Volume); errors.Is(err, volume.ErrInvalid) {
			return struct{}{}, err
		}
		return struct{}{}, b.DeleteSnapshot(ctx, id)
	})
	return err
}

// answerTime is how long who asks for what may take long waits at once. A caller that has heard nothing for longer has lost the filer's host.
const answerTime = 20 * time.Second

// maxAtWork is of how many volumes something is done at the same time, whoever asks.
const maxAtWork = 64

// A failed is what has come of something that nobody waited for any more.
type failed struct {
	what string // and how it was asked for
	err  error
	at   time.Time
}

// told is how long an error is kept for who asks again: it does so at once.
const told = time.Minute

// lasting does something to a volume, as asked for, after what is being done to it. It comes to its end, or to the term's, also where its call's time is up. Who asks for
// the same again then hears of an error: it would never come to an end if it were begun anew instead. The lease is held as long: another filer has the pool only once
// nothing of it is left.
func lasting[T any](ctx context.Context, f *filer, id, what string, asked any, do func(context.Context) (T, error)) (done T, err error) {
	goesOn := func() error { return fmt.Errorf("%s: %w", what, api.ErrGoesOn) }
	waiting, cancel := context.WithTimeout(ctx, answerTime)
	defer cancel()
	unlock, err := f.busy.Lock(waiting, id)
	if err != nil {
		return done, goesOn()
	}
	exactly := fmt.Sprintf("%s %+v", what, asked)
	if former, is := f.failed.LoadAndDelete(id); is {
		if was := former.(failed); was.what == exactly && time.Since(was.at) < told {
			unlock()
			return done, was.err
		}
	}
	select {
	case f.atWork <- struct{}{}:
	case <-waiting.Done():
		unlock()
		return done, goesOn()
	}
	end, begun := f.lease.TryBegin()
	if !begun {
		<-f.atWork
		unlock()
		return done, fmt.Errorf("%w: this filer hands over; try again", api.ErrAway)
	}
	type outcome struct {
		done T
		err  error
	}
	outcomes := make(chan outcome)
	f.work.Go(func() {
		defer end()
		defer unlock()
		defer func() { <-f.atWork }()
		done, err := do(f.long)
		if err != nil && f.long.Err() != nil {
			err = fmt.Errorf("%s: %w: this filer has handed over meanwhile: %w", what, api.ErrAway, err)
		}
		select {
		case outcomes <- outcome{done, err}:
		case <-waiting.Done():
			f.log.Info("it has come to its end after its call", "what", what, "error", err)
			if err != nil {
				f.failed.Store(id, failed{exactly, err, time.Now()})
			}
		}
	})
	select {
	case o := <-outcomes:
		return o.done, o.err
	case <-waiting.Done():
		return done, goesOn()
	}
}
