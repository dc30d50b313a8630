package rpc

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/cradlestack/cradlestack/csi-plugin/volume"
)

// lookEvery is how often Schedule looks for snapshots that are due.
const lookEvery = time.Minute

// Schedule takes the volumes' automatic snapshots, and removes those that are too many, until ctx ends. What can't be taken is tried again
// the next time: a period's snapshot comes late rather than never.
func (s *Server) Schedule(ctx context.Context) error {
	b, ok := s.config.Backend.(volume.Snapshotter)
	if !ok {
		return nil
	}
	t := time.NewTicker(lookEvery)
	defer t.Stop()
	for {
		s.takeDue(ctx, b)
		select {
		case s.config.Cold <- struct{}{}:
		default: // nobody listens, or has had the time to read the former one
		}
		select {
		case <-t.C:
		case <-ctx.Done():
			return nil
		}
	}
}

func (s *Server) takeDue(ctx context.Context, b volume.Snapshotter) {
	all, err := s.config.Backend.List(ctx)
	if err != nil {
		s.config.Log.Warn("automatic snapshots", "error", err)
		return
	}
	for _, v := range all {
		if v.Scheduled() == (volume.Retention{}) && v.Cold == (volume.Retention{}) { // what was taken before stays
			continue
		}
		if err := s.takeDueOf(ctx, b, v); err != nil && ctx.Err() == nil {
			s.config.Log.Warn("automatic snapshots", "volume", v.ID, "error", err)
		}
	}
}

func (s *Server) takeDueOf(ctx context.Context, b volume.Snapshotter, v volume.Volume) error {
	unlock, err := s.busy.lock(ctx, v.ID)
	if err != nil {
		return err
	}
	defer unlock()
	has, err := b.Snapshots(ctx, v.ID)
	if err != nil {
		return err
	}
	var errs []error
	take, drop := v.Due(has, time.Now())
	for _, name := range take {
		id := volume.SnapshotID{Volume: v.ID, Name: name}
		_, err := b.Snapshot(ctx, volume.SnapshotRequest{ID: id, Automatic: true, Hold: s.hold(v.ID)})
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
