// Package volumes is volume.Backend for a host that has not the storage: every call goes to a filer, or to whichever filer of a set serves, which has its own backend
// do it, and this host mounts what the filer serves. It imports no other backend.
package volumes

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/cradlestack/cradlestack/csi-plugin/filer/api"
	"github.com/cradlestack/cradlestack/csi-plugin/volume"
)

// Backend is volume.Backend of a filer's volumes.
type Backend struct {
	client api.Client
	dir    string // Dir

	mu    sync.Mutex
	pools []string // as the filer said last
}

// Open returns the backend. The filer need not serve yet.
func Open(client api.Client) *Backend { return &Backend{client: client, dir: Dir} }

// Close does nothing: all is the filer's.
func (b *Backend) Close() error { return nil }

const (
	patience = 90 * time.Second       // for a filer to serve: a host's loss takes a set on ZFS half of that
	attempt  = 45 * time.Second       // for an answer, which a filer gives sooner whatever it is at: a host that is lost closes no connection
	pause    = 200 * time.Millisecond // before it is asked again
)

// ask asks until a filer has answered with what has come of it: while none serves, and while what is asked for goes on.
func (b *Backend) ask(ctx context.Context, do func(context.Context) error) error {
	for since := time.Now(); ; {
		trying, cancel := context.WithTimeout(ctx, attempt)
		err := do(trying)
		silent := trying.Err() != nil && ctx.Err() == nil
		cancel()
		switch {
		case err == nil:
			return nil
		case ctx.Err() != nil:
			return fmt.Errorf("%w: %w", context.Cause(ctx), err)
		case errors.Is(err, api.ErrGoesOn):
			since = time.Now()
		case silent && errors.Is(err, context.DeadlineExceeded):
			err = fmt.Errorf("%w: no filer has answered for %v", volume.ErrUnavailable, attempt)
			fallthrough
		case errors.Is(err, api.ErrAway):
			if time.Since(since) > patience {
				return err
			}
		default:
			return err
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return fmt.Errorf("%w: %w", context.Cause(ctx), err)
		}
	}
}

// Create is volume.Backend's.
func (b *Backend) Create(ctx context.Context, r volume.Request) (v volume.Volume, err error) {
	if r.Origin != (volume.Origin{}) {
		return v, volume.Invalid("origin", "is for clones")
	}
	return b.make(ctx, r)
}

// Clone is volume.Cloner's. No guest of this host has to hold still: it writes to the filer, which lets nobody write meanwhile where it has to.
func (b *Backend) Clone(ctx context.Context, r volume.Request, _ volume.Hold) (volume.Volume, error) {
	return b.make(ctx, r)
}

func (b *Backend) make(ctx context.Context, r volume.Request) (v volume.Volume, err error) {
	if err := volume.CheckName("volume name", r.Name); err != nil {
		return v, err
	}
	if r.Generation != 0 || r.Origin.Copy != "" {
		return v, volume.Invalid("volume "+r.Name, "a filer's volumes are not restored from cold storage")
	}
	return v, b.ask(ctx, func(ctx context.Context) (err error) { v, err = b.client.Create(ctx, r); return err })
}

// Delete is volume.Backend's.
func (b *Backend) Delete(ctx context.Context, id string) error {
	if !volume.ValidName(id) {
		return nil
	}
	return b.ask(ctx, func(ctx context.Context) error { return b.client.Delete(ctx, id) })
}

// Get is volume.Backend's.
func (b *Backend) Get(ctx context.Context, id string) (v volume.Volume, err error) {
	if err := known(id); err != nil {
		return v, err
	}
	return v, b.ask(ctx, func(ctx context.Context) (err error) { v, err = b.client.Volume(ctx, id); return err })
}

// known refuses what no volume can be called.
func known(id string) error {
	if !volume.ValidName(id) {
		return fmt.Errorf("volume %.80q: %w", id, volume.ErrNotFound)
	}
	return nil
}

// List is volume.Backend's.
func (b *Backend) List(ctx context.Context) (all []volume.Volume, err error) {
	return all, b.ask(ctx, func(ctx context.Context) (err error) { all, err = b.client.Volumes(ctx); return err })
}

// Expand is volume.Expander's. The file system of a volume that is published grows with it.
func (b *Backend) Expand(ctx context.Context, id string, size, limit int64) (n int64, err error) {
	if err := known(id); err != nil {
		return 0, err
	}
	return n, b.ask(ctx, func(ctx context.Context) (err error) { n, err = b.client.Expand(ctx, id, size, limit); return err })
}

// Snapshot is volume.Snapshotter's.
func (b *Backend) Snapshot(ctx context.Context, r volume.SnapshotRequest) (s volume.Snapshot, err error) {
	if err := known(r.ID.Volume); err != nil {
		return s, err
	}
	if err := r.Check(); err != nil {
		return s, err
	}
	return s, b.ask(ctx, func(ctx context.Context) (err error) { s, err = b.client.Take(ctx, r.ID, r.Automatic); return err })
}

// DeleteSnapshot is volume.Snapshotter's.
func (b *Backend) DeleteSnapshot(ctx context.Context, id volume.SnapshotID) error {
	if !volume.ValidName(id.Volume) || !volume.ValidName(id.Name) {
		return nil
	}
	return b.ask(ctx, func(ctx context.Context) error { return b.client.Drop(ctx, id) })
}

// Snapshots is volume.Snapshotter's.
func (b *Backend) Snapshots(ctx context.Context, id string) (all []volume.Snapshot, err error) {
	if id != "" && !volume.ValidName(id) {
		return nil, nil
	}
	return all, b.ask(ctx, func(ctx context.Context) (err error) { all, err = b.client.Taken(ctx, id); return err })
}

// Reschedule is volume.Scheduler's.
func (b *Backend) Reschedule(ctx context.Context, id, schedule string) error {
	if err := known(id); err != nil {
		return err
	}
	return b.ask(ctx, func(ctx context.Context) error { _, err := b.client.Reschedule(ctx, id, schedule); return err })
}

// Capacity is volume.Backend's.
func (b *Backend) Capacity(ctx context.Context, p volume.Parameters) (n int64, err error) {
	return n, b.ask(ctx, func(ctx context.Context) (err error) { n, err = b.client.Capacity(ctx, p); return err })
}

// Far is what keeps the filer's volumes.
func (b *Backend) Far(ctx context.Context) (far api.Backend, err error) {
	return far, b.ask(ctx, func(ctx context.Context) (err error) { far, err = b.client.Backend(ctx); return err })
}

// asking is how long Pools waits for a filer.
const asking = 2 * time.Second

// Pools is volume.Backend's: those of the filer, as it said last while it does not answer.
func (b *Backend) Pools() []string {
	ctx, cancel := context.WithTimeout(context.Background(), asking)
	defer cancel()
	far, err := b.client.Backend(ctx)
	b.mu.Lock()
	defer b.mu.Unlock()
	if err == nil {
		b.pools = far.Pools
	}
	return b.pools
}

// Ready is volume.Backend's. It waits for no filer: that none serves is the answer.
func (b *Backend) Ready(ctx context.Context) error { return b.client.Ready(ctx) }
