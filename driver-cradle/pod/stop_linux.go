package pod

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"net/url"
	"os"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cradlestack/cradlestack/driver-cradle/hostfile"
	"github.com/cradlestack/cradlestack/driver-cradle/vmm"
	"github.com/cradlestack/cradlestack/driver-cradle/wire"
	"github.com/cradlestack/cradlestack/spec"
)

// Stop ends the pod, whichever process attends to it, and returns its report: see Running.Stop. A pod that only starts is not waited for.
func (d *Dir) Stop(ctx context.Context, grace *time.Duration) (*Report, error) {
	r, err := d.TakeUp(ctx, TakeUpOptions{})
	switch {
	case err == nil:
		return r.Stop(ctx, grace)
	case errors.Is(err, ErrNotRunning):
		return nil, err
	case !errors.Is(err, ErrRunning) && ctx.Err() == nil:
		d.log.Warn("pod can't be taken up, killing its machine", "pod", d.path, "error", err)
		return d.Kill(ctx)
	case !errors.Is(err, ErrRunning):
		return nil, context.Cause(ctx)
	}
	launch, err := d.launched()
	if errors.Is(err, fs.ErrNotExist) {
		launch, err = d.Launch() // it has only just begun
	}
	if err != nil {
		return nil, err
	}
	limit, query := patience(launch, grace)
	asked, cancel := context.WithTimeoutCause(ctx, limit, fmt.Errorf("it did not end within %v", limit))
	defer cancel()
	run := d.run()
	for {
		err = d.Guest().Call(asked, http.MethodPost, wire.PathStop, query, nil, nil)
		if err == nil {
			home, cancel := context.WithTimeoutCause(ctx, homeLimit, fmt.Errorf("its containers have ended, but its logs were not brought home within %v", homeLimit))
			defer cancel()
			err = d.AwaitEnd(home)
			break
		}
		if !noListener(err) {
			break
		}
		// It starts, or is about to end.
		if err = d.requestEnd(); err != nil {
			break
		}
		if err = d.awaitEndSoon(asked, run); err == nil || asked.Err() != nil {
			break
		}
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

// noListener says whether nobody answers on vdocker.sock: the pod starts or ends.
func noListener(err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ECONNREFUSED)
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
	return longest + stopMargin, url.Values{}
}

// stopMargin is what a guest gets beside the containers' grace time to put its volumes away.
const stopMargin = 20 * time.Second

// homeLimit bounds the time that another process may take to bring a pod's logs home.
const homeLimit = 10 * time.Minute

// killLimit bounds the time from the machine's end to that of its attendant's work.
const killLimit = 30 * time.Second

// Kill ends the pod's machine at once, whichever process attends to it. Neither the guest nor QEMU has to answer.
func (d *Dir) Kill(ctx context.Context) (*Report, error) {
	lock, err := d.attend()
	if err == nil {
		defer hostfile.Unlock(lock)
		return d.killUnattended()
	}
	var attended *RunningError
	if !errors.As(err, &attended) {
		return nil, err
	}
	ctx, cancel := context.WithTimeoutCause(ctx, killLimit,
		fmt.Errorf("kill %s: its machine is killed, but process %d, which attends to it, hangs: end that with kill -9 %[2]d", d.path, attended.PID))
	defer cancel()
	run := d.run()
	for {
		if err := d.requestEnd(); err != nil {
			return nil, fmt.Errorf("kill %s: %w", d.path, err)
		}
		if err := vmm.Kill(d.join(runDir)); err != nil && !errors.Is(err, vmm.ErrNotRunning) {
			return nil, fmt.Errorf("kill %s: %w", d.path, err)
		}
		// A pod that starts may have got its machine only now.
		if d.awaitEndSoon(ctx, run) == nil {
			return d.Report()
		}
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
	}
}

// killUnattended kills a machine that nobody attends to but us.
func (d *Dir) killUnattended() (*Report, error) {
	info, _ := d.Machine() // gone when the machine is
	alive, err := d.machineAlive()
	if err != nil {
		return nil, fmt.Errorf("kill %s: %w", d.path, err)
	}
	if !alive {
		return nil, errors.Join(d.notRunning(), d.bury(nil, info))
	}
	if err := d.requestEnd(); err != nil {
		return nil, fmt.Errorf("kill %s: %w", d.path, err)
	}
	if err := vmm.Kill(d.join(runDir)); err != nil && !errors.Is(err, vmm.ErrNotRunning) {
		return nil, fmt.Errorf("kill %s: %w", d.path, err)
	}
	if err := d.bury(nil, info); err != nil {
		return nil, err
	}
	return d.readReport()
}

// requestPause is how long the end of a run may take after it was asked for before that is done again: at the first time its start may
// have been looking elsewhere.
const requestPause = time.Second

// requestEnd notes that the present run is ended on purpose. It names it: the note may outlive the run.
func (d *Dir) requestEnd() error {
	return hostfile.Replace(d.join(runDir, killedFile), []byte(d.run()))
}

func (d *Dir) wasKilled() bool {
	data, err := hostfile.Read(d.join(runDir, killedFile), 64)
	return err == nil && len(data) > 0 && string(data) == d.run()
}

// errStopped is why a start was not completed.
var errStopped = errors.New("it was stopped while it started")

// stoppable makes a context that ends when somebody asks for the pod's end. done is to be called, and waits.
func (d *Dir) stoppable(ctx context.Context) (_ context.Context, done func()) {
	ctx, cancel := context.WithCancelCause(ctx)
	var watcher sync.WaitGroup
	watcher.Go(func() {
		for !d.wasKilled() {
			select {
			case <-time.After(20 * time.Millisecond):
			case <-ctx.Done():
				return
			}
		}
		cancel(errStopped)
	})
	return ctx, func() {
		cancel(nil)
		watcher.Wait()
	}
}

// AwaitEnd returns once nobody attends to the pod's present run any more.
func (d *Dir) AwaitEnd(ctx context.Context) error { return d.awaitEndOf(ctx, d.run()) }

func (d *Dir) awaitEndOf(ctx context.Context, run string) error {
	for wait := time.Millisecond; ; wait = min(2*wait, 50*time.Millisecond) {
		if pid, err := d.Attendant(); err != nil || pid == 0 || run != "" && d.run() != run {
			return err
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(wait):
		}
	}
}

// awaitEndSoon gives up after requestPause.
func (d *Dir) awaitEndSoon(ctx context.Context, run string) error {
	ctx, cancel := context.WithTimeout(ctx, requestPause)
	defer cancel()
	return d.awaitEndOf(ctx, run)
}

// settleLimit bounds how long a pod may take to begin or to end for those who want to know how it is.
const settleLimit = 10 * time.Second

// AwaitSettled returns nil once somebody answers on the vdocker.sock of a pod that is attended to, ErrNotRunning once it has ended, and ErrUnsettled
// where that takes too long.
func (d *Dir) AwaitSettled(ctx context.Context) error {
	_, err := d.settled(ctx, false)
	return err
}

// AwaitStart is AwaitSettled, but does not wait for a start that copies an image's content into a volume: it tells how far that is.
func (d *Dir) AwaitStart(ctx context.Context) (*wire.Filling, error) { return d.settled(ctx, true) }

func (d *Dir) settled(ctx context.Context, orFilling bool) (*wire.Filling, error) {
	ctx, cancel := context.WithTimeout(ctx, settleLimit)
	defer cancel()
	for wait := time.Millisecond; ; wait = min(2*wait, 50*time.Millisecond) {
		conn, err := d.Dial(ctx)
		if err == nil {
			return nil, conn.Close()
		}
		if !noListener(err) && !errors.Is(err, context.DeadlineExceeded) && ctx.Err() == nil { // the limit may come while it is dialed
			return nil, err
		}
		pid, err := d.Attendant()
		if err != nil {
			return nil, err
		}
		if pid == 0 {
			return nil, d.notRunning()
		}
		f, err := d.filling()
		if err != nil || f != nil && orFilling {
			return f, err
		}
		select {
		case <-ctx.Done():
			if f != nil {
				return nil, fmt.Errorf("%s: %w: it copies the image's content into volume %s: try again when kcradle status %[1]s tells that it runs, or end it with kcradle kill %[1]s", d.path, ErrUnsettled, f.Volume)
			}
			return nil, fmt.Errorf("%s: %w, and process %d is not done with that yet: try again, or end it with kcradle kill %[1]s", d.path, ErrUnsettled, pid)
		case <-time.After(wait):
		}
	}
}

// awaitLock is lock for a new run: it waits for one that is about to end.
func (d *Dir) awaitLock(ctx context.Context) (*os.File, error) {
	ctx, cancel := context.WithTimeout(ctx, settleLimit)
	defer cancel()
	for {
		lock, err := d.lock()
		if !errors.Is(err, ErrRunning) || !d.ending(ctx) {
			return lock, err
		}
		select {
		case <-ctx.Done():
			return nil, err
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// ending says whether an attended pod has ended and its attendant is busy with that. In doubt, it may be.
func (d *Dir) ending(ctx context.Context) bool {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	var s wire.Status
	err := d.Guest().Call(ctx, http.MethodGet, wire.PathStatus, nil, nil, &s)
	return noListener(err) || err == nil && s.State == wire.StateExited
}

func (d *Dir) notRunning() error {
	return fmt.Errorf("%s: %w: kcradle run %[1]s starts it", d.path, ErrNotRunning)
}
