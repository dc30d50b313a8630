package pod

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strconv"
	"time"

	"github.com/cradlestack/cradlestack/driver-cradle/vmm"
	"github.com/cradlestack/cradlestack/driver-cradle/wire"
	"github.com/cradlestack/cradlestack/spec"
)

// What can be done with a pod's volumes while it runs. The guest refuses with a GuestError.

// ErrNotFrozen is what Thaw returns where the file system was not frozen any more.
var ErrNotFrozen = errors.New("it was not frozen any more: what was copied meanwhile is not consistent")

// Freeze makes a block volume's file system complete on its disk and still, until Thaw, or the timeout: again, the time starts anew.
func (r *Running) Freeze(ctx context.Context, volume string, timeout time.Duration) error {
	q := url.Values{"volume": {volume}, "timeout": {strconv.FormatFloat(timeout.Seconds(), 'f', -1, 64)}}
	return r.call(ctx, http.MethodPost, wire.PathFreeze, q, nil, nil)
}

// Thaw ends a freeze.
func (r *Running) Thaw(ctx context.Context, volume string) error {
	var was wire.Thawed
	err := r.call(ctx, http.MethodPost, wire.PathThaw, url.Values{"volume": {volume}}, nil, &was)
	if err == nil && !was.Frozen {
		err = fmt.Errorf("volume %s: %w", volume, ErrNotFrozen)
	}
	return err
}

// Usage is what a volume's file system says of itself.
func (r *Running) Usage(ctx context.Context, volume string) (s spec.VolumeStats, err error) {
	err = r.call(ctx, http.MethodGet, wire.PathUsage, url.Values{"volume": {volume}}, nil, &s)
	return s, err
}

// Resize tells the machine that the image or device behind a block volume has grown to size. A raw volume has no file system that would grow with it.
func (r *Running) Resize(ctx context.Context, volume string, size spec.Bytes, raw bool) error {
	lun, err := r.lun(volume)
	if err != nil {
		return err
	}
	if err := r.machine.ResizeDisk(ctx, lun, int64(size)); err != nil {
		return err
	}
	if raw {
		return nil
	}
	return r.call(ctx, http.MethodPost, wire.PathGrow, url.Values{"volume": {volume}}, nil, nil)
}

// Throttle bounds what the guest does to a block volume.
func (r *Running) Throttle(ctx context.Context, volume string, l spec.IOLimits) error {
	lun, err := r.lun(volume)
	if err != nil {
		return err
	}
	return r.machine.Throttle(ctx, lun, vmm.Throttle{Ops: l.IOPS, Bytes: int64(l.Bandwidth)})
}

func (r *Running) lun(volume string) (int, error) {
	lun, ok := r.machine.LUN(wire.DiskVolume + volume)
	if !ok {
		return 0, &GuestError{Code: http.StatusBadRequest, Message: fmt.Sprintf("volume %s is no block volume: it has no disk", volume)}
	}
	return lun, nil
}
