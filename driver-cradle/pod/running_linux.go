package pod

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"os"
	"sync"
	"time"

	"github.com/cradlestack/cradlestack/driver-cradle/hostfile"
	"github.com/cradlestack/cradlestack/driver-cradle/vmm"
	"github.com/cradlestack/cradlestack/driver-cradle/wire"
	"github.com/cradlestack/cradlestack/spec"
)

// A Running is a pod that this process attends to, until Wait returns or Detach is called.
type Running struct {
	dir         *Dir
	log         *slog.Logger
	machine     *vmm.Machine
	lock        *os.File
	spec        *spec.Launch
	started     time.Time
	discardLogs bool
	joining     *Joining      // nil: nothing joins
	joins       sync.Mutex    // one container joins or leaves at a time
	calls       chan struct{} // of the host, that are being answered

	listener *net.UnixListener
	proxies  sync.WaitGroup
	holds    sync.WaitGroup

	ctx  context.Context // of everything that is done for this pod
	stop context.CancelCauseFunc
	over chan struct{} // closed when the guest's containers have ended for good, or the machine has
	done chan struct{}

	mu     sync.Mutex
	conns  map[net.Conn]bool
	killed bool
	last   wire.Status // the latest known

	attached *Stream

	report *Report // valid once done is closed
	err    error
}

var (
	errDetached = errors.New("pod was let go")
	errEnded    = errors.New("pod has ended")
)

// launchTimeout bounds what a guest has to set up before its first container runs. Copying an image's content into volumes may take longer, as
// long as it gets on.
const launchTimeout = 10 * time.Minute

func (d *Dir) running(m *vmm.Machine, lock *os.File, launch *spec.Launch, started time.Time, discardLogs bool) *Running {
	r := &Running{
		dir: d, log: d.log, machine: m, lock: lock, spec: launch, started: started, discardLogs: discardLogs,
		over: make(chan struct{}), done: make(chan struct{}), conns: map[net.Conn]bool{}, calls: make(chan struct{}, maxCalls),
	}
	r.ctx, r.stop = context.WithCancelCause(context.Background())
	return r
}

// TakeUpOptions say how to attend to a pod that was taken up, as StartOptions do for one that is started.
type TakeUpOptions struct {
	DiscardLogs bool
	Hold        bool
	Joining     *Joining
}

// TakeUp attends to a pod that another process has started detached and no longer attends to. It fails with ErrRunning where one does,
// with ErrNotRunning where the pod has ended. One whose start was not complete is ended.
func (d *Dir) TakeUp(ctx context.Context, o TakeUpOptions) (_ *Running, err error) {
	lock, err := d.attend()
	if err != nil {
		return nil, fmt.Errorf("take up pod: %w", err)
	}
	defer func() {
		if err != nil {
			hostfile.Unlock(lock)
		}
	}()
	info, _ := d.Machine() // there is none where the pod has not run
	m, err := vmm.TakeUp(ctx, d.join(runDir))
	if errors.Is(err, vmm.ErrNotRunning) {
		return nil, errors.Join(d.notRunning(), d.bury(err, info))
	}
	if err != nil {
		return nil, fmt.Errorf("take up %s: %w: kcradle kill %[1]s ends it", d.path, err)
	}
	launch, err := d.launched() // launch.json may have been edited since
	if err != nil {
		return nil, errors.Join(fmt.Errorf("take up %s: %w", d.path, err), m.Close())
	}
	r := d.running(m, lock, launch, m.Info().StartedAt, o.DiscardLogs)
	r.joining = o.Joining
	if err := r.listen(); err != nil {
		r.stop(err)
		return nil, errors.Join(fmt.Errorf("take up %s: %w", d.path, err), m.Close())
	}
	if o.Hold {
		r.holds.Add(1)
	}
	go r.watch()
	return r, nil
}

func (d *Dir) launched() (*spec.Launch, error) {
	data, err := hostfile.Read(d.join(runDir, launchedFile), spec.MaxDocument)
	if err != nil {
		return nil, err
	}
	return spec.ParseLaunch(d.join(runDir, launchedFile), data)
}

// bury reports the end of a pod whose machine has ended while nobody attended to it, if there is one.
// info is the machine's, where it is known.
func (d *Dir) bury(why error, info *vmm.Info) error {
	launch, err := d.launched()
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if _, err := d.readReport(); err == nil {
		return d.tidy() // of this run, as a start removes that of the last one: who has written it was killed before the rest was put away
	}
	report := Report{Version: reportVersion, EndedAt: time.Now(), Failure: "the machine has ended while no process attended to the pod"}
	if info != nil {
		report.Machine, report.StartedAt = *info, info.StartedAt
	}
	code := exitLost
	var panicked *vmm.PanicError
	switch {
	case errors.As(why, &panicked):
		report.Failure = panicked.Error()
	case errors.Is(why, vmm.ErrIncomplete):
		report.Failure = "the process that started it has ended before the start was complete"
	}
	if d.wasKilled() {
		report.Failure, code = "", exitKilled
	}
	report.Status = endedStatus(launch, code)
	return errors.Join(writeJSON(d.join(runDir, statusFile), report), d.tidy())
}

// endedStatus is that of a pod whose containers all ended in a way that nobody has seen.
func endedStatus(launch *spec.Launch, code int) wire.Status {
	s := wire.Status{State: wire.StateExited, ExitCode: code}
	for _, c := range launch.Containers {
		s.Containers = append(s.Containers, wire.ContainerStatus{ID: c.ID, Name: c.Name, State: wire.StateExited, ExitCode: code})
	}
	return s
}

// Launch is what the guest executes.
func (r *Running) Launch() *spec.Launch { return r.spec }

// Started is when the run began.
func (r *Running) Started() time.Time { return r.started }

// Info tells how the machine was started.
func (r *Running) Info() vmm.Info { return r.machine.Info() }

// Published are the ports that are reachable on the host, with their numbers where the spec leaves those open.
func (r *Running) Published() []spec.Publish { return r.machine.Info().Publish }

// Open opens a stream to the guest's HTTP server: control calls of package wire, else docker's API.
func (r *Running) Open(ctx context.Context) (net.Conn, error) { return r.machine.Open(ctx) }

// Machine is the virtual machine, for its disks and statistics.
func (r *Running) Machine() *vmm.Machine { return r.machine }

// Done is closed when the pod has ended and everything of it is brought home, or when it was let go.
func (r *Running) Done() <-chan struct{} { return r.done }

// Release ends what Hold, of StartOptions or TakeUpOptions, has begun. Call it once.
func (r *Running) Release() { r.holds.Done() }

// Guest is the server in the guest.
func (r *Running) Guest() *Guest { return &Guest{Dial: r.machine.Open} }

func (r *Running) call(ctx context.Context, method, path string, query url.Values, in, out any) error {
	return r.Guest().Call(ctx, method, path, query, in, out)
}

// launch tells the guest what to run.
func (r *Running) launch(ctx context.Context, w *wire.Launch, o *StartOptions) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	timeout := time.AfterFunc(launchTimeout, func() { cancel(fmt.Errorf("the guest did not set the pod up within %v", launchTimeout)) })
	defer timeout.Stop()
	ctx, done := r.whileItRuns(ctx)
	defer done()
	r.last.State = wire.StateRunning
	for _, c := range r.spec.Containers {
		r.last.Containers = append(r.last.Containers, wire.ContainerStatus{ID: c.ID, Name: c.Name, State: wire.StateCreated})
	}
	var watching sync.WaitGroup
	defer watching.Wait()
	watched, unwatch := context.WithCancel(ctx)
	defer unwatch()
	watching.Go(func() { r.watchFilling(watched, o.Progress, timeout) })
	var err error
	if o.Attach != "" {
		q := AttachQuery(r.started, o.Stdin)
		q.Set("attach", o.Attach)
		r.attached, err = r.Guest().Hijack(ctx, wire.PathLaunch, q, w)
	} else {
		err = r.call(ctx, http.MethodPost, wire.PathLaunch, nil, w, &r.last)
	}
	if err != nil && ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	return err
}

// watchFilling tells how a launch that takes its time goes, and in the run directory whoever wants to know.
func (r *Running) watchFilling(ctx context.Context, tell func(wire.Filling), timeout *time.Timer) {
	path := r.dir.join(runDir, fillingFile)
	defer os.Remove(path)
	wait, longest := 50*time.Millisecond, 250*time.Millisecond
	if tell == nil { // most starts have ended by then
		wait, longest = 250*time.Millisecond, time.Second
	}
	for last := (wire.Filling{}); ; wait = min(2*wait, longest) {
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return
		}
		var s wire.Status
		if err := r.call(ctx, http.MethodGet, wire.PathStatus, nil, nil, &s); err != nil || s.Filling == nil || *s.Filling == last {
			continue
		}
		last = *s.Filling
		timeout.Reset(launchTimeout)
		if tell != nil {
			tell(last)
		}
		if err := writeJSON(path, last); err != nil {
			r.log.Debug("note how far the start is", "error", err) // the disk with the run directory may be full
		}
	}
}

// filling is how far the pod's start is with copying an image's content into a volume, nil where it is not busy with that.
func (d *Dir) filling() (*wire.Filling, error) {
	data, err := hostfile.Read(d.join(runDir, fillingFile), 64<<10)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil //nolint:nilnil // there is none
	}
	if err != nil {
		return nil, err
	}
	var f wire.Filling
	if err := json.Unmarshal(data, &f); err != nil {
		return nil, fmt.Errorf("%s: %w", d.join(runDir, fillingFile), err)
	}
	return &f, nil
}

// Attached is the stream of the container that StartOptions.Attach names, docker's raw stream: from the start of this run until the container
// has ended for good.
func (r *Running) Attached() *Stream { return r.attached }

// AttachQuery are the parameters of docker's attach call for everything that a container puts out from since on, over its restarts.
func AttachQuery(since time.Time, stdin bool) url.Values {
	q := url.Values{
		"stream": {"1"}, "stdout": {"1"}, "stderr": {"1"}, "logs": {"1"},
		"restarts": {"1"}, "since": {fmt.Sprintf("%d.%09d", since.Unix(), since.Nanosecond())}, // these two are ours
	}
	if stdin {
		q.Set("stdin", "1")
	}
	return q
}

// whileItRuns makes a context that ends when the machine does. done is to be called, and waits.
func (r *Running) whileItRuns(ctx context.Context) (_ context.Context, done func()) {
	ctx, cancel := context.WithCancelCause(ctx)
	var watcher sync.WaitGroup
	watcher.Go(func() {
		select {
		case <-r.machine.Done():
			cancel(r.machineEnd())
		case <-ctx.Done():
		}
	})
	return ctx, func() {
		cancel(nil)
		watcher.Wait()
	}
}

// machineEnd says why the machine has ended.
func (r *Running) machineEnd() error {
	if err := r.machine.Err(); err != nil {
		return err
	}
	return errors.New("the machine was killed")
}

// Up returns once every container that is not held and waits for no other has been started, or could not be.
func (r *Running) Up(ctx context.Context) (wire.Status, error) {
	for wait := 5 * time.Millisecond; ; wait = min(2*wait, 200*time.Millisecond) {
		s, err := r.Status(ctx)
		if err != nil || s.State == wire.StateExited || r.begun(&s) {
			return s, err
		}
		select {
		case <-time.After(wait):
		case <-r.done:
			return r.report.Status, r.err
		case <-ctx.Done():
			return s, context.Cause(ctx)
		}
	}
}

func (r *Running) begun(s *wire.Status) bool {
	for i, c := range s.Containers {
		if l := r.spec.Containers[i].Lifecycle; c.State == wire.StateCreated && c.Error == "" && len(l.After) == 0 && l.Hold == 0 {
			return false
		}
	}
	return true
}

// Status asks the guest.
func (r *Running) Status(ctx context.Context) (wire.Status, error) {
	var s wire.Status
	if err := r.call(ctx, http.MethodGet, wire.PathStatus, nil, nil, &s); err != nil {
		return s, fmt.Errorf("status of pod %s: %w", r.spec.Name, err)
	}
	r.own(&s)
	r.mu.Lock()
	r.last = s
	r.mu.Unlock()
	return s, nil
}

// Wait returns the report once the pod has ended and its machine is gone. After Detach it fails.
func (r *Running) Wait(ctx context.Context) (*Report, error) {
	select {
	case <-r.done:
		return r.report, r.err
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

// Signal sends a signal (SIGHUP, 1) to the main process of a container; "" is every one that runs.
func (r *Running) Signal(ctx context.Context, container, signal string) error {
	names := []string{container}
	if container == "" {
		names = nil
		s, err := r.Status(ctx)
		if err != nil {
			return err
		}
		for _, c := range s.Containers {
			if c.State == wire.StateRunning {
				names = append(names, c.Name)
			}
		}
	}
	var errs []error
	for _, name := range names {
		q := url.Values{"signal": {signal}}
		err := r.call(ctx, http.MethodPost, "/containers/"+name+"/kill", q, nil, nil)
		var refused *GuestError
		if container == "" && errors.As(err, &refused) && refused.Code == http.StatusConflict {
			continue // it has just ended
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("signal container %s: %w", name, err))
		}
	}
	return errors.Join(errs...)
}

// Stop ends the pod: every container gets its stop signal, and SIGKILL after grace (nil: its own stop timeout). A guest that does not
// answer is killed. It returns when the pod has ended, as Wait does.
func (r *Running) Stop(ctx context.Context, grace *time.Duration) (*Report, error) {
	return r.StopWith(ctx, grace, "")
}

// StopWith is Stop with another signal than its own for the first container.
func (r *Running) StopWith(ctx context.Context, grace *time.Duration, signal string) (*Report, error) {
	limit, q := patience(r.spec, grace)
	if signal != "" {
		q.Set("signal", signal)
	}
	asked, cancel := context.WithTimeoutCause(ctx, limit, fmt.Errorf("the guest did not stop within %v", limit))
	defer cancel()
	var s wire.Status
	err := r.call(asked, http.MethodPost, wire.PathStop, q, nil, &s)
	if err == nil {
		select {
		case <-r.over:
		case <-asked.Done():
			err = context.Cause(asked)
		}
	}
	select {
	case <-r.over:
		return r.Wait(ctx) // bringing its logs home may take longer, and ends by itself
	default:
	}
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	r.log.Warn("pod does not stop, killing its machine", "pod", r.spec.Name, "error", err)
	return r.Kill(ctx)
}

// Kill ends the machine at once, and with it the pod.
func (r *Running) Kill(ctx context.Context) (*Report, error) {
	r.mu.Lock()
	r.killed = true
	r.mu.Unlock()
	if err := r.machine.Kill(); err != nil {
		return nil, fmt.Errorf("kill pod %s: %w", r.spec.Name, err)
	}
	return r.Wait(ctx)
}

// Detach lets a pod go that was started detached, without ending it: another process may take it up.
func (r *Running) Detach() error {
	r.stop(errDetached)
	<-r.done
	if errors.Is(r.err, errDetached) {
		return nil
	}
	return r.err
}

// watch waits for the pod's end and brings everything home.
func (r *Running) watch() {
	defer close(r.done)
	defer hostfile.Unlock(r.lock)
	status, err := r.awaitEnd()
	close(r.over)
	if errors.Is(err, errDetached) {
		r.err = errDetached
		r.unlisten()
		r.closeConns()
		r.proxies.Wait()
		if err := r.machine.Close(); err != nil {
			r.err = err
		}
		return
	}
	report := &Report{Version: reportVersion, StartedAt: r.started, Machine: r.machine.Info()}
	if err == nil {
		report.Status = status
		r.bringHome()
	} else {
		report.Status, report.Failure = r.lastStatus(err)
	}
	report.EndedAt = time.Now()
	// The report comes first: without the machine, the next process would have no other way to learn how the pod has ended, should this one be killed now.
	if err := errors.Join(writeJSON(r.dir.join(runDir, statusFile), report), r.end(), r.dir.tidy()); err != nil {
		r.err = fmt.Errorf("end pod %s: %w", r.spec.Name, err)
	}
	r.report = report
}

// awaitEnd returns the status of a pod that has ended. The error is errDetached, or why the machine has ended.
func (r *Running) awaitEnd() (wire.Status, error) {
	ctx, done := r.whileItRuns(r.ctx)
	defer done()
	for wait := 50 * time.Millisecond; ; wait = min(2*wait, 5*time.Second) {
		var s wire.Status
		begun := time.Now()
		err := r.call(ctx, http.MethodGet, wire.PathWait, nil, nil, &s)
		if err == nil {
			r.own(&s)
			return s, nil
		}
		if ctx.Err() != nil {
			return s, context.Cause(ctx)
		}
		r.log.Debug("waiting for the pod's end was interrupted", "pod", r.spec.Name, "error", err)
		if time.Since(begun) > time.Minute {
			wait = 50 * time.Millisecond
		}
		select {
		case <-ctx.Done():
			return s, context.Cause(ctx)
		case <-time.After(wait):
		}
	}
}

// lastStatus makes a final status of the latest known one, for a pod whose machine has ended under it.
func (r *Running) lastStatus(why error) (wire.Status, string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	s, failure, code := r.last, why.Error(), exitLost
	if r.killed || r.dir.wasKilled() {
		failure, code = "", exitKilled
	}
	s.State, s.ExitCode = wire.StateExited, code
	for i := range s.Containers {
		if c := &s.Containers[i]; c.State != wire.StateExited {
			c.State, c.ExitCode, c.FinishedAt = wire.StateExited, code, time.Now()
		}
	}
	return s, failure
}

// Exit codes of a pod that did not end by itself.
const (
	exitLost   = 255 // as docker has it for a container that nobody saw end
	exitKilled = 137 // 128 + SIGKILL
)

// bringHome takes from a guest whose pod has ended what is wanted afterwards. What fails is only logged: the pod has ended all the same.
func (r *Running) bringHome() {
	if !r.discardLogs {
		if err := r.saveLogs(); err != nil {
			r.log.Error("logs are not saved", "pod", r.spec.Name, "error", err)
		}
	}
	r.holds.Wait()
	// Answers that are on their way still arrive; a client that has asked for events without end does not keep the machine.
	r.unlisten()
	finished := make(chan struct{})
	go func() {
		r.proxies.Wait()
		close(finished)
	}()
	select {
	case <-finished:
	case <-time.After(time.Second):
	}
	ctx, cancel := context.WithTimeout(r.ctx, stopMargin)
	defer cancel()
	if err := r.call(ctx, http.MethodPost, wire.PathShutdown, nil, nil, nil); err != nil {
		r.log.Warn("guest does not put its volumes away", "pod", r.spec.Name, "error", err)
	}
}

// end ends the machine and everything that this process does for it.
func (r *Running) end() error {
	r.unlisten()
	err := r.machine.Kill()
	r.closeConns()
	r.proxies.Wait()
	r.stop(errEnded)
	return errors.Join(err, r.machine.Close())
}
