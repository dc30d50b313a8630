package rpc

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/cradlestack/cradlestack/csi-plugin/volume"
	"github.com/cradlestack/cradlestack/internal/turns"
)

// lookEvery is how often Schedule looks for snapshots that are due.
const lookEvery = time.Minute

// Snapshots are taken of atOnce volumes at the same time: one is copied for as long as it is large. A volume that takes longer than tooLong, as its storage does not answer,
// counts apart: as many as apart.
const (
	atOnce  = 4
	apart   = 28
	tooLong = 5 * time.Minute
)

// Schedule takes the volumes' automatic snapshots, and removes those that are too many, until ctx ends. What can't be taken is tried again
// the next time: a period's snapshot comes late rather than never. A volume that takes long, or whose storage does not answer, holds up no other one.
func (s *Server) Schedule(ctx context.Context) error {
	b, ok := s.config.Backend.(volume.Snapshotter)
	if !ok {
		return nil
	}
	g := &turns.Turns{AtOnce: atOnce, Apart: apart, Patience: tooLong}
	defer g.Wait()
	d := &due{server: s, snapshotter: b, busy: map[string]bool{}}
	t := time.NewTicker(lookEvery)
	defer t.Stop()
	for {
		d.look(ctx, g)
		select {
		case <-t.C:
		case <-ctx.Done():
			return nil
		}
	}
}

func (s *Server) tellCold() {
	select {
	case s.config.Cold <- struct{}{}:
	default: // nobody listens, or has had the time to read the former one
	}
}

// due is what Schedule is at.
type due struct {
	server      *Server
	snapshotter volume.Snapshotter
	settled     map[string]string // volumes of which nothing is due, by id, and as what that was so

	mu   sync.Mutex
	busy map[string]bool // volumes, by id
}

// look begins with each volume that nobody is at.
func (d *due) look(ctx context.Context, g *turns.Turns) {
	all, err := d.server.config.Backend.List(ctx)
	if err != nil {
		if ctx.Err() == nil {
			d.server.config.Log.Warn("automatic snapshots", "error", err)
		}
	} // which is no matter of the volumes that are there
	for _, v := range d.undone(ctx, all) {
		if ctx.Err() != nil || !d.begin(v.ID) {
			continue
		}
		began := g.Go(ctx, func(func()) {
			defer d.end(v.ID)
			if err := d.server.takeDueOf(ctx, d.snapshotter, v); err != nil && ctx.Err() == nil {
				d.server.config.Log.Warn("automatic snapshots", "volume", v.ID, "error", err)
			}
		})
		if !began {
			d.end(v.ID)
		}
	}
}

// undone are the volumes of which something may be due. There is one question for all of them, where several hosts may ask one filer, and ZFS reads all snapshots for an answer; and none about those of
// which nothing was due before in this hour: nothing is then before the next one begins. Where there is no answer, each is asked about.
func (d *due) undone(ctx context.Context, all []volume.Volume) (undone []volume.Volume) {
	now := time.Now()
	settled := map[string]string{}
	as := func(v volume.Volume) string {
		return fmt.Sprint(now.UTC().Truncate(time.Hour), v.Created, v.Scheduled(), v.Cold)
	}
	for _, v := range all {
		switch {
		case !automatic(v):
		case d.settled[v.ID] == as(v):
			settled[v.ID] = as(v)
		default:
			undone = append(undone, v)
		}
	}
	d.settled = settled
	if len(undone) == 0 {
		return nil
	}
	snapshots, err := d.snapshotter.Snapshots(ctx, "")
	if err != nil {
		return undone
	}
	has := map[string][]volume.Snapshot{}
	for _, s := range snapshots {
		has[s.ID.Volume] = append(has[s.ID.Volume], s)
	}
	return slices.DeleteFunc(undone, func(v volume.Volume) bool {
		take, drop := v.Due(has[v.ID], now)
		nothing := len(take)+len(drop) == 0
		if nothing {
			settled[v.ID] = as(v)
		}
		return nothing
	})
}

// automatic says whether a volume has automatic snapshots. Of one that has none any more those that were taken stay.
func automatic(v volume.Volume) bool {
	return v.Scheduled() != (volume.Retention{}) || v.Cold != (volume.Retention{})
}

func (d *due) begin(id string) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.busy[id] {
		return false
	}
	d.busy[id] = true
	return true
}

func (d *due) end(id string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.busy, id)
}

func (s *Server) takeDueOf(ctx context.Context, b volume.Snapshotter, v volume.Volume) error {
	waiting, cancel := context.WithTimeout(ctx, lookEvery)
	defer cancel()
	unlock, err := s.busy.Lock(waiting, v.ID)
	if err != nil {
		return s.untaken(ctx, fmt.Errorf("%w: %w", volume.ErrBusy, err))
	}
	defer unlock()
	has, err := b.Snapshots(ctx, v.ID)
	if err != nil {
		return s.untaken(ctx, err)
	}
	var errs []error
	take, drop := v.Due(has, time.Now())
	if len(take)+len(drop) > 0 { // it may have waited long for its turn, and have another schedule by now
		if v, err = s.config.Backend.Get(ctx, v.ID); errors.Is(err, volume.ErrNotFound) || err == nil && !automatic(v) {
			return nil
		} else if err != nil {
			return err
		}
		take, drop = v.Due(has, time.Now())
	}
	for _, name := range take {
		id := volume.SnapshotID{Volume: v.ID, Name: name}
		snap, err := b.Snapshot(ctx, volume.SnapshotRequest{ID: id, Automatic: true, Hold: s.hold(v.ID)})
		if err == nil && !snap.Automatic { // an administrator's, by the storage's own means
			err = fmt.Errorf("snapshot %s %w: it was not taken by schedule; rename or delete it", id, volume.ErrExists)
		}
		if errors.Is(err, volume.ErrNotFound) {
			return nil // deleted meanwhile
		}
		s.metrics.taken(err)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		s.config.Log.Info("took an automatic snapshot", "snapshot", id.String())
	}
	if v.Cold != (volume.Retention{}) && len(take) > 0 {
		s.tellCold()
	}
	if len(errs) > 0 {
		return errors.Join(errs...) // no old one goes for want of a new one
	}
	for _, id := range drop {
		if err := b.DeleteSnapshot(ctx, id); err != nil {
			errs = append(errs, fmt.Errorf("remove an old snapshot: %w", err))
		}
	}
	return errors.Join(errs...)
}

// untaken counts an error for which a volume's snapshots are not even begun.
func (s *Server) untaken(ctx context.Context, err error) error {
	if ctx.Err() == nil {
		s.metrics.taken(err)
	}
	return err
}
