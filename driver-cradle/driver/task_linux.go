package driver

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/nomad/plugins/drivers"

	"github.com/cradlestack/cradlestack/driver-cradle/pod"
	"github.com/cradlestack/cradlestack/spec"
)

// A task is one that this process attends to, running or ended, until Nomad has it destroyed.
type task struct {
	d       *Driver
	dir     string
	record  *record
	config  *drivers.TaskConfig
	started time.Time

	running  *pod.Running // nil: it had ended when it was recovered
	delivery *delivery
	controls *controls

	done chan struct{} // closed when it has ended, or was let go

	waits presence    // of a client that waits for the end
	up    atomic.Bool // its containers are known to have been started

	mu     sync.Mutex
	ended  time.Time
	result *drivers.ExitResult // nil while it runs
}

// attend begins a task with a pod that was started, or taken up, held. After an error nobody attends to the pod.
//
// Nomad's pipes are opened only now. Its reader does not come back once the last writer has gone: as long as there is no machine that outlives this process
// and holds them, none may begin.
func (d *Driver) attend(dir string, rec *record, config *drivers.TaskConfig, r *pod.Running) error {
	// The pod's machine holds the pipes as well.
	output, err := newDelivery(filepath.Join(dir, outputFile), rec, heldBy(d.ctx, r.Machine()), d.log.With("task", rec.ID).Warn)
	if err != nil {
		r.Release()
		return errors.Join(err, r.Detach())
	}
	t := &task{d: d, dir: dir, record: rec, config: config, started: r.Started(), running: r, delivery: output, done: make(chan struct{})}
	// A pod that can't be told of snapshots runs all the same: who calls is told that nobody answers.
	if t.controls, err = serveControls(r, rec.Attached, d.log); err != nil {
		d.log.Error("volumes can't be controlled", "task", rec.ID, "error", err)
	}
	output.begin(r)
	d.hold(t)
	d.work.Go(t.watch)
	return nil
}

// watch waits for the end of the task. The machine is kept until all output is delivered.
func (t *task) watch() {
	defer close(t.done)
	delivered := make(chan struct{})
	go func() {
		t.delivery.wait()
		t.running.Release()
		close(delivered)
	}()
	report, err := t.running.Wait(context.Background())
	t.controls.close()
	if report == nil { // it was let go
		t.delivery.end(err)
		<-delivered
		return
	}
	t.delivery.end(errEnded)
	<-delivered
	if err != nil {
		t.d.log.Error("the pod's end", "task", t.record.ID, "error", err)
	}
	if err := removeControls(t.record.Attached); err != nil {
		t.d.log.Error("the control sockets of volumes stay", "task", t.record.ID, "error", err)
	}
	t.finish(report)
	if _, s, err := t.d.open(); err == nil {
		s.disks.release(t.record.Disk, t.record.ID)
	}
}

var (
	errEnded     = errors.New("the pod has ended")
	errTaskEnded = errors.New("the task has ended")
)

// finish notes how the task has ended.
func (t *task) finish(report *pod.Report) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.ended = report.EndedAt
	t.result = resultOf(report)
}

// resultOf is what Nomad learns of a pod's end.
func resultOf(report *pod.Report) *drivers.ExitResult {
	result := &drivers.ExitResult{ExitCode: report.Status.ExitCode}
	for i := range report.Status.Containers {
		c := &report.Status.Containers[i]
		// The exit code is that of the container whose end has ended the pod: the task's own, or another that is critical.
		if c.OOMKilled && (i == 0 || c.ExitCode == report.Status.ExitCode && c.ExitCode != 0) {
			result.OOMKilled = true
		}
		if c.Error != "" && result.Err == nil && c.ExitCode == report.Status.ExitCode {
			result.Err = fmt.Errorf("container %s: %s", c.Name, c.Error)
		}
	}
	switch {
	case report.Failure != "":
		result.Err = fmt.Errorf("the pod's machine ended: %s", report.Failure)
	case result.Err == nil && report.Status.Error != "" && report.Status.ExitCode != 0:
		result.Err = errors.New(report.Status.Error)
	}
	return result
}

// letGo leaves the task to another process.
func (t *task) letGo() error {
	if t.running == nil {
		return nil
	}
	t.delivery.stop(errShutdown)
	err := t.running.Detach()
	<-t.done
	return err
}

// status is what Nomad asks.
func (t *task) status() *drivers.TaskStatus {
	t.mu.Lock()
	defer t.mu.Unlock()
	s := &drivers.TaskStatus{
		ID: t.record.ID, Name: t.record.Name, State: drivers.TaskStateRunning, StartedAt: t.started,
		DriverAttributes: map[string]string{"pod": filepath.Join(t.dir, podDir)},
	}
	if t.running != nil {
		info := t.running.Info()
		s.DriverAttributes["accelerator"], s.DriverAttributes["start"] = info.Accel, info.Start
		s.DriverAttributes["vm_memory"], s.DriverAttributes["vcpus"] = info.Memory.String(), fmt.Sprint(info.CPUs)
	}
	if t.result != nil {
		s.State, s.CompletedAt, s.ExitResult = drivers.TaskStateExited, t.ended, t.result.Copy()
	}
	return s
}

func (t *task) exited() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.result != nil
}

// live is the pod, if it runs.
func (t *task) live() (*pod.Running, error) {
	if t.running == nil || t.exited() {
		return nil, errTaskEnded
	}
	return t.running, nil
}

// ready is the pod, if it runs, once its containers have been started: a task that Nomad calls started takes commands and signals. Asking the guest until it is so
// would cost every start time, and few need it.
func (t *task) ready(ctx context.Context) (*pod.Running, error) {
	r, err := t.live()
	if err != nil || t.up.Load() {
		return r, err
	}
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	if _, err := r.Up(ctx); err != nil {
		t.d.log.Warn("the pod's containers are not seen to start", "task", t.record.ID, "error", err)
	} else {
		t.up.Store(true)
	}
	return r, nil
}

// own is the name of the task's own container.
func (t *task) own() string { return t.running.Launch().Containers[0].Name }

// WaitTask gives the result when the task has ended.
func (d *Driver) WaitTask(ctx context.Context, taskID string) (<-chan *drivers.ExitResult, error) {
	t, err := d.task(taskID)
	if err != nil {
		return nil, err
	}
	ch := make(chan *drivers.ExitResult, 1)
	t.waits.come()
	d.work.Go(func() {
		defer t.waits.leave()
		defer close(ch)
		select {
		case <-t.done:
		case <-ctx.Done():
			return
		case <-d.ctx.Done():
			return
		}
		t.mu.Lock()
		defer t.mu.Unlock()
		if t.result != nil {
			ch <- t.result.Copy()
		}
	})
	return ch, nil
}

// InspectTask tells how a task is.
func (d *Driver) InspectTask(taskID string) (*drivers.TaskStatus, error) {
	t, err := d.task(taskID)
	if err != nil {
		return nil, err
	}
	return t.status(), nil
}

// StopTask ends a task: its container gets the signal ("": the image's stop signal), all others their own, and what still runs after the timeout is
// killed. It returns when the task has ended.
func (d *Driver) StopTask(taskID string, timeout time.Duration, signal string) error {
	t, err := d.task(taskID)
	if err != nil {
		return err
	}
	r, err := t.live()
	if errors.Is(err, errTaskEnded) {
		return nil
	}
	if err != nil {
		return err
	}
	if signal != "" && !spec.KnownSignal(signal) {
		d.log.Warn("kill_signal is no signal, the image's stop signal is used", "task", taskID, "kill_signal", signal)
		signal = ""
	}
	if _, err := r.StopWith(d.ctx, &timeout, signal); err != nil {
		return fmt.Errorf("stop task: %w", err)
	}
	<-t.done
	return nil
}

// SignalTask sends a signal to the main process of the task's container.
func (d *Driver) SignalTask(taskID, signal string) error {
	t, err := d.task(taskID)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(d.ctx, callTimeout)
	defer cancel()
	r, err := t.ready(ctx)
	if err != nil {
		return err
	}
	if !spec.KnownSignal(signal) {
		return fmt.Errorf("%q is no signal: name one such as SIGHUP", signal)
	}
	return r.Signal(ctx, t.own(), signal)
}

// callTimeout bounds what a guest that runs answers at once.
const callTimeout = 30 * time.Second

// DestroyTask removes everything of a task. One that this process does not attend to is removed as well, where something of it is on disk.
func (d *Driver) DestroyTask(taskID string, force bool) error {
	t, err := d.task(taskID)
	if errors.Is(err, drivers.ErrTaskNotFound) {
		return d.destroyRemnant(taskID, force)
	}
	if err != nil {
		return err
	}
	if r, err := t.live(); err == nil {
		if !force {
			return errors.New("the task still runs: stop it first")
		}
		if _, err := r.Kill(d.ctx); err != nil {
			return fmt.Errorf("destroy task: %w", err)
		}
		<-t.done
	}
	if err := d.remove(t); err != nil {
		return fmt.Errorf("destroy task: %w", err)
	}
	d.drop(t)
	return nil
}

// remove removes a task's directory.
func (d *Driver) remove(t *task) error {
	c, s, err := d.open()
	if err != nil {
		return err
	}
	if !enabled(c.GC.Container, true) {
		return os.Remove(filepath.Join(t.dir, recordFile)) // the next plugin process removes the rest
	}
	return s.clear(d.ctx, t.dir)
}

func (d *Driver) destroyRemnant(taskID string, force bool) error {
	_, s, err := d.open()
	if err != nil {
		return err
	}
	all, err := s.remnants()
	if err != nil {
		return err
	}
	for _, r := range all {
		if r.record != nil && r.record.ID == taskID {
			if p, err := pod.Open(filepath.Join(r.dir, podDir), d.log); err == nil && !force {
				if running, err := p.Running(); err != nil || running {
					return errors.Join(errors.New("the task still runs: stop it first"), err)
				}
			}
			return s.clear(d.ctx, r.dir)
		}
	}
	return drivers.ErrTaskNotFound
}
