package pod

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"strconv"
	"time"

	"github.com/cradlestack/cradlestack/driver-cradle/vmm"
	"github.com/cradlestack/cradlestack/driver-cradle/wire"
	"github.com/cradlestack/cradlestack/spec"
)

// Stop ends the pod, whichever process attends to it, and returns its report: see Running.Stop.
func (d *Dir) Stop(ctx context.Context, grace *time.Duration) (*Report, error) {
	r, err := d.TakeUp(ctx)
	if err == nil {
		return r.Stop(ctx, grace)
	}
	if !errors.Is(err, ErrRunning) {
		return nil, err
	}
	launch, err := d.launched()
	if err != nil {
		return nil, err
	}
	limit, query := patience(launch, grace)
	asked, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	err = d.Guest().Call(asked, http.MethodPost, wire.PathStop, query, nil, nil)
	if err == nil {
		err = d.AwaitEnd(asked)
	}
	if err == nil {
		return d.Report()
	}
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	d.log.Warn("pod does not stop, killing its machine", "pod", launch.Name, "error", err)
	return d.Kill(ctx)
}

// patience is how long a guest may take to stop, and what to ask of it.
func patience(launch *spec.Launch, grace *time.Duration) (time.Duration, url.Values) {
	if grace != nil {
		return *grace + stopMargin, url.Values{"timeout": {strconv.FormatFloat(grace.Seconds(), 'f', -1, 64)}}
	}
	longest := spec.DefaultStopTimeout
	for _, c := range launch.Containers {
		if c.StopTimeout != nil {
			longest = max(longest, time.Duration(*c.StopTimeout))
		}
	}
	return longest + stopMargin, nil
}

// stopMargin is what a guest gets beside the containers' grace time to put its volumes away.
const stopMargin = 20 * time.Second

// Kill ends the pod's machine at once, whichever process attends to it.
func (d *Dir) Kill(ctx context.Context) (*Report, error) {
	r, err := d.TakeUp(ctx)
	if err == nil {
		return r.Kill(ctx)
	}
	if !errors.Is(err, ErrRunning) {
		return nil, err
	}
	if err := os.WriteFile(d.join(runDir, killedFile), nil, 0o600); err != nil {
		return nil, err
	}
	if err := vmm.Kill(d.join(runDir)); err != nil && !errors.Is(err, vmm.ErrNotRunning) {
		return nil, fmt.Errorf("kill %s: %w", d.path, err)
	}
	if err := d.AwaitEnd(ctx); err != nil {
		return nil, err
	}
	return d.Report()
}

func (d *Dir) wasKilled() bool {
	_, err := os.Stat(d.join(runDir, killedFile))
	return err == nil
}

// AwaitEnd returns once nobody attends to the pod any more.
func (d *Dir) AwaitEnd(ctx context.Context) error {
	for wait := time.Millisecond; ; wait = min(2*wait, 50*time.Millisecond) {
		if pid, err := d.Attendant(); err != nil || pid == 0 {
			return err
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(wait):
		}
	}
}
