package main

import (
	"cmp"
	"context"

	"github.com/cradlestack/cradlestack/csi-plugin/filer/api"
	"github.com/cradlestack/cradlestack/csi-plugin/volume"
)

// schedule is which of a volume's automatic snapshots are kept. cradle-csi's controller takes and removes them.
func (f *filer) schedule(ctx context.Context, id string) (api.Schedule, error) {
	v, err := f.backend.Get(ctx, id)
	if err != nil {
		return api.Schedule{}, err
	}
	return api.Schedule{Snapshots: cmp.Or(v.Scheduled().String(), volume.NoSnapshots), Changed: v.Schedule != ""}, nil
}

func (f *filer) reschedule(ctx context.Context, id, snapshots string) (api.Schedule, error) {
	if _, err := f.snapshotter(ctx, id); err != nil {
		return api.Schedule{}, err
	}
	if err := volume.CheckSchedule(snapshots); err != nil {
		return api.Schedule{}, err
	}
	b, ok := f.backend.(volume.Scheduler)
	if !ok {
		return api.Schedule{}, volume.Invalid("volume "+id, "this backend keeps no schedule that could be changed")
	}
	if err := b.Reschedule(ctx, id, snapshots); err != nil {
		return api.Schedule{}, err
	}
	return f.schedule(ctx, id)
}
