package guest

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cradlestack/cradlestack/driver-cradle/guest/stdio"
	"github.com/cradlestack/cradlestack/driver-cradle/wire"
	"github.com/cradlestack/cradlestack/spec"
)

// A Container of the pod, through all its starts.
type Container struct {
	pod     *Pod
	spec    *spec.Container
	unit    *unit
	io      *stdio.IO
	created time.Time

	dir    string   // on the scratch disk: upper, work, log, files, state.json
	rootfs string   // assembled
	lowers []string // lowest first: baseLayer, then the image's
	upper  string   // "" where a volume is the root
	cgroup string
	late   []lateMount
	nodes  []deviceNode

	joined *joined // nil: it is the launch's

	op sync.Mutex // one start, stop, pause at a time

	// Guarded by the crew's mutex.
	state    State
	attempts int // starts that came to something, be it an error
	exits    int
	exitCode int       // of the newest exit
	console  [2]uint16 // rows and columns of its terminal at the next start; zero: as the launch has it
	command  *command  // the running one
	execs    map[string]*Exec
	health   *Health
}

// newContainer prepares a container's place. It does not start it.
func (p *Pod) newContainer(n int, s *spec.Container) (_ *Container, err error) {
	c := &Container{
		pod: p, spec: s,
		dir:    filepath.Join(p.scratch, "containers", s.ID),
		rootfs: filepath.Join(runDir, "c", s.ID, "rootfs"),
		cgroup: containerCgroup(n),
		execs:  make(map[string]*Exec),
	}
	c.unit = &unit{name: s.Name, rule: s.Lifecycle, run: c.run}
	if s.ID == "" || s.ID != filepath.Base(s.ID) {
		return nil, &stateError{ErrInvalid, fmt.Sprintf("its id %q is no file name", s.ID)}
	}
	c.lowers = append(c.lowers, baseLayer)
	for i, l := range s.Layers {
		// Empty layers are often the same one. overlayfs takes a directory once: the upper one hides all that the lower one has.
		if slices.ContainsFunc(s.Layers[i+1:], func(above spec.Layer) bool { return above.DiffID == l.DiffID }) {
			continue
		}
		dir, ok := p.layers[l.DiffID]
		if !ok {
			return nil, &stateError{ErrInvalid, "the host attached no disk for layer " + l.DiffID}
		}
		c.lowers = append(c.lowers, dir)
	}
	for _, dir := range []string{c.dir, c.rootfs} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return nil, err
		}
	}
	c.state.Status = wire.StateCreated
	c.loadRecord()
	c.io, err = stdio.Open(filepath.Join(c.dir, "log"), stdio.Options{
		TTY: s.TTY, OpenStdin: s.OpenStdin, StdinOnce: s.StdinOnce, MaxSize: p.logSize(s.Logs),
	})
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			c.io.Close()
		}
	}()
	if err := makeCgroup(c.cgroup, s.Resources); err != nil {
		return nil, err
	}
	if err := c.assemble(); err != nil {
		return nil, err
	}
	if rules := c.deviceRules(); rules != nil {
		if err := limitDevices(c.cgroup, rules); err != nil {
			return nil, err
		}
	}
	c.Emit("create", nil)
	return c, nil
}

// logSize bounds a container's log: 1 GiB or a quarter of the scratch disk, unless the spec says.
func (p *Pod) logSize(l spec.Logs) int64 {
	if l.MaxSize > 0 {
		return int64(l.MaxSize)
	}
	size := int64(1 << 30)
	var st unix.Statfs_t
	if err := unix.Statfs(p.scratch, &st); err == nil {
		size = min(size, int64(st.Blocks)*st.Bsize/4)
	}
	return size
}

// Spec of the container, with the lifecycle that it has by now. It is not to be changed.
func (c *Container) Spec() spec.Container {
	c.pod.crew.mu.Lock()
	defer c.pod.crew.mu.Unlock()
	s := *c.spec
	s.Lifecycle = c.unit.rule
	return s
}

// Created is when the container first came to be on its scratch disk.
func (c *Container) Created() time.Time { return c.created }

// IO is the container's streams and log.
func (c *Container) IO() *stdio.IO { return c.io }

// Cgroup is the container's directory below /sys/fs/cgroup.
func (c *Container) Cgroup() string { return c.cgroup }

// Rootfs is the container's root with its volumes and tmpfs, as the agent sees it, also while it is stopped. What is below is the
// container's: paths in it are to be resolved inside it.
func (c *Container) Rootfs() string { return c.rootfs }

// Upper is the writable layer, in overlayfs's format; "" where a volume is the root.
func (c *Container) Upper() string { return c.upper }

// Lowers are the layers below the writable one, lowest first: what docker adds to an image, then the image's.
func (c *Container) Lowers() []string { return c.lowers }

// Emit tells subscribers what happened to the container; vdocker does for what it alone knows (attach, archive-path, …).
func (c *Container) Emit(action string, attrs map[string]string) {
	all := map[string]string{"image": c.spec.Image.Reference, "name": c.spec.Name}
	maps.Copy(all, c.spec.Image.Labels)
	maps.Copy(all, c.spec.Labels)
	maps.Copy(all, attrs)
	c.pod.bus.emit(Event{Type: "container", Action: action, ID: c.spec.ID, Attributes: all, Time: time.Now()})
}

// State of the container now.
func (c *Container) State() State {
	c.pod.crew.mu.Lock()
	defer c.pod.crew.mu.Unlock()
	return c.stateLocked()
}

func (c *Container) stateLocked() State {
	s := c.state
	s.RestartCount = c.unit.restarts
	if c.unit.restarting && !s.Running {
		s.Status, s.Running, s.Restarting = wire.StateRestarting, true, true
	}
	if u := c.unit; !u.active && !u.begun && u.last.reason != "" {
		s.ExitCode, s.Error = u.last.code, u.last.reason // what it waited for never came
	}
	if c.health != nil {
		h := *c.health
		h.Log = append([]Probe(nil), h.Log...)
		s.Health = &h
	}
	return s
}

func (c *Container) status() wire.ContainerStatus {
	c.pod.crew.mu.Lock()
	defer c.pod.crew.mu.Unlock()
	s := c.stateLocked()
	w := wire.ContainerStatus{
		ID: c.spec.ID, Name: c.spec.Name, State: s.Status, ExitCode: s.ExitCode, OOMKilled: s.OOMKilled, Error: s.Error,
		Starts: c.unit.starts, StartedAt: s.StartedAt, FinishedAt: s.FinishedAt,
	}
	if s.Health != nil {
		w.Health = s.Health.Status
	}
	return w
}

// update changes the state and tells everyone who waits.
func (c *Container) update(f func(s *State)) {
	c.pod.crew.mu.Lock()
	defer c.pod.crew.mu.Unlock()
	f(&c.state)
	c.pod.crew.change()
}

// run is one start to its end.
func (c *Container) run(context.Context) outcome {
	c.op.Lock()
	cmd, drained, stopHealth, err := c.begin()
	c.op.Unlock()
	if err != nil {
		return c.failed(err)
	}
	code := cmd.wait()
	stopHealth()
	<-drained
	return c.finished(code)
}

// begin starts the command.
func (c *Container) begin() (cmd *command, drained <-chan struct{}, stopHealth func(), err error) {
	crew := c.pod.crew
	crew.mu.Lock()
	stopped, again := crew.stopping || c.unit.halt, c.attempts > 0
	crew.mu.Unlock()
	if stopped {
		return nil, nil, nil, errStopped
	}
	if again {
		if err := c.refresh(); err != nil {
			return nil, nil, nil, err
		}
	}
	config, err := c.stageConfig()
	if err != nil {
		return nil, nil, nil, err
	}
	before := cgroupValue(c.cgroup, "memory.events", "oom_kill")
	request := stageRequest{config: config, cgroup: c.cgroup, stdin: c.spec.OpenStdin}
	if request.pid, request.ipc, err = c.shares(); err != nil {
		return nil, nil, nil, err
	}
	cmd, err = c.pod.startStage(request)
	if err != nil {
		return nil, nil, nil, err
	}
	drained = c.io.Run(cmd.streams) // before anyone is told that the container runs: following its log begins with that
	crew.mu.Lock()
	c.command = cmd
	c.attempts++
	c.state = State{Status: wire.StateRunning, Running: true, Pid: cmd.pid, StartedAt: time.Now(), FinishedAt: c.state.FinishedAt, OOMKilled: false}
	c.state.oomBefore = before
	crew.up(c.unit)
	crew.mu.Unlock()
	c.Emit("start", nil)
	return cmd, drained, c.watchHealth(), nil
}

// errStopped is why a container that was stopped meanwhile does not start.
var errStopped = errors.New("stopped before it started")

// failed records a start that came to nothing.
func (c *Container) failed(err error) outcome {
	o := outcome{exitRefused, err.Error()}
	if e, ok := errors.AsType[*stageError](err); ok {
		o.code = e.Code
	}
	if errors.Is(err, errStopped) {
		o = outcome{}
	}
	c.update(func(s *State) {
		c.attempts++
		s.ExitCode, s.Error = o.code, o.reason
	})
	c.saveRecord()
	return o
}

// finished records the end of a run.
func (c *Container) finished(code int) outcome {
	clearCgroup(c.cgroup)
	kills := cgroupValue(c.cgroup, "memory.events", "oom_kill")
	var ran time.Duration
	oom := false
	c.update(func(s *State) {
		oom = kills > s.oomBefore
		now := time.Now()
		ran = now.Sub(s.StartedAt)
		s.Status, s.Running, s.Paused, s.Pid = wire.StateExited, false, false, 0
		s.ExitCode, s.OOMKilled, s.FinishedAt = code, oom, now
		c.command = nil
		c.exits++
		c.exitCode = code
		// At once: nobody is to take it for one that has ended for good.
		c.unit.running, c.unit.restarting = false, c.pod.crew.goesOn(c.unit, outcome{code: code})
	})
	c.saveRecord()
	if oom {
		c.Emit("oom", nil)
	}
	c.Emit("die", map[string]string{"exitCode": strconv.Itoa(code), "execDuration": strconv.Itoa(int(ran.Seconds()))})
	return outcome{code: code}
}

// running gives the running command.
func (c *Container) running() (*command, error) {
	c.pod.crew.mu.Lock()
	defer c.pod.crew.mu.Unlock()
	if c.command == nil {
		return nil, &stateError{ErrNotRunning, fmt.Sprintf("container %s is not running", c.spec.ID)}
	}
	return c.command, nil
}

// Start starts a container that has ended, and returns when its command runs. It goes on by its lifecycle as from its first start.
func (c *Container) Start(ctx context.Context) error {
	crew := c.pod.crew
	// Between its end and what the rule makes of it, nothing can be said: it may start again by itself.
	if err := c.await(ctx, func() (bool, error) {
		u := c.unit
		return !u.active || !u.begun || u.restarting || c.command != nil, nil
	}); err != nil {
		return err
	}
	crew.mu.Lock()
	var err error
	switch u := c.unit; {
	case crew.stopping:
		err = &stateError{ErrConflict, "the pod has ended: run it again to start its containers"}
	case c.state.Paused:
		err = &stateError{ErrConflict, "cannot start a paused container, try unpause instead"}
	case c.state.Running:
		err = &stateError{ErrNotModified, "container is already running"}
	case u.held():
		u.released = true
		crew.change()
	case u.active && !u.restarting:
		err = &stateError{ErrConflict, "the container starts when those it waits for have come so far"}
	case u.active:
		u.again = true
		crew.change()
	default:
		crew.revive(u)
	}
	attempts := c.attempts
	crew.mu.Unlock()
	if err != nil {
		return err
	}
	return c.awaitStart(ctx, attempts)
}

// awaitStart waits for the outcome of the start after attempts.
func (c *Container) awaitStart(ctx context.Context, attempts int) error {
	return c.await(ctx, func() (bool, error) {
		switch {
		case c.attempts > attempts && c.state.Error != "":
			return true, errors.New(c.state.Error)
		case c.attempts > attempts:
			return true, nil
		case !c.unit.active:
			return true, &stateError{ErrConflict, "the pod has ended"}
		}
		return false, nil
	})
}

// await calls done, the crew's mutex held, at every change until it says true.
func (c *Container) await(ctx context.Context, done func() (bool, error)) error {
	for {
		c.pod.crew.mu.Lock()
		ok, err := done()
		changed := c.pod.crew.changed
		c.pod.crew.mu.Unlock()
		if ok {
			return err
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// Stop stops the container and waits for its end: the signal ("": its own), then SIGKILL after the timeout (nil: its own, negative:
// never). It does not start again by itself.
func (c *Container) Stop(ctx context.Context, signal string, timeout *time.Duration) error {
	if s := c.State(); !s.Running {
		return &stateError{ErrNotModified, "container is already stopped"}
	}
	return c.stop(ctx, signal, timeout, "stop")
}

func (c *Container) stop(ctx context.Context, signal string, timeout *time.Duration, event string) error {
	crew := c.pod.crew
	crew.mu.Lock()
	c.unit.halt, c.unit.again = true, false
	crew.change()
	crew.mu.Unlock()
	if err := c.end(ctx, signal, timeout); err != nil {
		return err
	}
	if err := c.await(ctx, func() (bool, error) { return !c.unit.active, nil }); err != nil {
		return err
	}
	if event != "" {
		c.Emit(event, nil)
	}
	return nil
}

// end makes the running command end, if there is one, and waits for that.
func (c *Container) end(ctx context.Context, signal string, timeout *time.Duration) error {
	if signal == "" {
		signal = c.spec.StopSignal
	}
	if signal == "" {
		signal = "SIGTERM"
	}
	sig, err := ParseSignal(signal)
	if err != nil {
		return err
	}
	grace := spec.DefaultStopTimeout
	if c.spec.StopTimeout != nil {
		grace = time.Duration(*c.spec.StopTimeout)
	}
	if timeout != nil {
		grace = *timeout
	}
	c.op.Lock() // no start is under way, and none begins: the unit is told
	crew := c.pod.crew
	crew.mu.Lock()
	cmd, exits := c.command, c.exits
	crew.mu.Unlock()
	if cmd != nil {
		_ = c.thaw()
		c.signal(cmd, sig)
	}
	c.op.Unlock()
	if cmd == nil {
		return nil
	}
	over := func() (bool, error) { return c.exits > exits, nil }
	if grace >= 0 {
		wait, cancel := context.WithTimeout(ctx, grace)
		err = c.await(wait, over)
		cancel()
		if err == nil {
			return nil
		}
		c.signal(cmd, unix.SIGKILL)
	}
	return c.await(ctx, over)
}

// signal sends a signal to the first process and tells so.
func (c *Container) signal(cmd *command, sig unix.Signal) {
	if err := cmd.signal(sig); err == nil {
		c.Emit("kill", map[string]string{"signal": strconv.Itoa(int(sig))})
	}
}

// Kill sends a signal to the container's first process. SIGKILL, and the container's own stop signal, keep it from starting again, as
// with docker.
func (c *Container) Kill(sig unix.Signal) error {
	cmd, err := c.running()
	if err != nil {
		return err
	}
	own := unix.SIGTERM
	if c.spec.StopSignal != "" {
		if s, err := ParseSignal(c.spec.StopSignal); err == nil {
			own = s
		}
	}
	if sig == unix.SIGKILL || sig == own {
		c.pod.crew.mu.Lock()
		c.unit.halt = true
		c.pod.crew.mu.Unlock()
	}
	if sig == unix.SIGKILL {
		_ = c.thaw()
	}
	c.signal(cmd, sig)
	return nil
}

// Restart stops the container, if it runs, and starts it at once.
func (c *Container) Restart(ctx context.Context, signal string, timeout *time.Duration) error {
	crew := c.pod.crew
	crew.mu.Lock()
	running, attempts := c.command != nil, c.attempts
	if running {
		c.unit.again = true
	}
	crew.mu.Unlock()
	if !running {
		if err := c.Start(ctx); err != nil {
			return err
		}
	} else {
		if err := c.end(ctx, signal, timeout); err != nil {
			return err
		}
		if err := c.awaitStart(ctx, attempts); err != nil {
			return err
		}
	}
	c.Emit("restart", nil)
	return nil
}

// Pause freezes all of the container's processes.
func (c *Container) Pause() error {
	c.op.Lock()
	defer c.op.Unlock()
	if _, err := c.running(); err != nil {
		return err
	}
	if c.State().Paused {
		return &stateError{ErrConflict, fmt.Sprintf("container %s is already paused", c.spec.ID)}
	}
	if err := writeFile(filepath.Join(c.cgroup, "cgroup.freeze"), "1"); err != nil {
		return err
	}
	c.update(func(s *State) { s.Paused, s.Status = true, wire.StatePaused })
	c.Emit("pause", nil)
	return nil
}

// Unpause lets them go on.
func (c *Container) Unpause() error {
	c.op.Lock()
	defer c.op.Unlock()
	if !c.State().Paused {
		return &stateError{ErrConflict, fmt.Sprintf("container %s is not paused", c.spec.ID)}
	}
	if err := c.thaw(); err != nil {
		return err
	}
	c.Emit("unpause", nil)
	return nil
}

func (c *Container) thaw() error {
	if !c.State().Paused {
		return nil
	}
	if err := writeFile(filepath.Join(c.cgroup, "cgroup.freeze"), "0"); err != nil {
		return err
	}
	c.update(func(s *State) {
		if s.Paused {
			s.Paused, s.Status = false, wire.StateRunning
		}
	})
	return nil
}

// Wait waits for a condition and gives the exit code of the end it saw. In a pod, a container is removed when it has ended for good.
func (c *Container) Wait(ctx context.Context, condition string) (exitCode int, errmsg string, err error) {
	return c.Awaiting(condition)(ctx)
}

// Awaiting is Wait in two steps: an end that comes after Awaiting has returned is not missed, whenever the waiting begins.
func (c *Container) Awaiting(condition string) func(context.Context) (exitCode int, errmsg string, err error) {
	c.pod.crew.mu.Lock()
	exits := c.exits
	c.pod.crew.mu.Unlock()
	return func(ctx context.Context) (exitCode int, errmsg string, err error) {
		err = c.await(ctx, func() (bool, error) {
			exitCode, errmsg = c.state.ExitCode, c.state.Error
			u := c.unit
			// Whether that is its end for good is known: who waits asks next whether it runs again.
			exited := c.exits > exits && (!u.active || u.restarting || c.command != nil)
			if exited {
				exitCode = c.exitCode
			}
			switch condition {
			case "", WaitNotRunning:
				return exited || c.exits == exits && c.command == nil && !u.restarting, nil
			case WaitNextExit:
				// The end of a pod in which it does not start again is the last exit there will be.
				return exited || !u.active && c.pod.crew.stopping, nil
			case WaitRemoved:
				return !c.unit.active, nil
			}
			return true, &stateError{ErrInvalid, fmt.Sprintf("invalid condition: %q", condition)}
		})
		return exitCode, errmsg, err
	}
}

// SetConsole sets the size that the container's terminal has from its next start on.
func (c *Container) SetConsole(h, w uint16) {
	c.pod.crew.mu.Lock()
	defer c.pod.crew.mu.Unlock()
	c.console = [2]uint16{h, w}
}

// SetRestart changes when the container starts again. MaxStarts counts all of its starts since somebody asked for one.
func (c *Container) SetRestart(onSuccess, onFailure bool, maxStarts int) {
	c.pod.crew.mu.Lock()
	defer c.pod.crew.mu.Unlock()
	rule := &c.unit.rule
	rule.RestartOnSuccess, rule.RestartOnFailure, rule.MaxStarts = onSuccess, onFailure, maxStarts
	c.pod.crew.change()
}

// Resize sets the size of the container's terminal.
func (c *Container) Resize(h, w uint16) error {
	cmd, err := c.running()
	if err != nil {
		return err
	}
	if cmd.master == nil {
		return &stateError{ErrInvalid, "the container has no terminal"}
	}
	return resizeTTY(cmd.master, h, w)
}

// Pids of the container's processes, numbers of the guest.
func (c *Container) Pids() ([]int, error) {
	if _, err := c.running(); err != nil {
		return nil, err
	}
	return cgroupPids(c.cgroup)
}

// A record is what of a container outlives its VM.
type record struct {
	StartedAt  time.Time `json:"startedAt,omitzero"`
	FinishedAt time.Time `json:"finishedAt,omitzero"`
	ExitCode   int       `json:"exitCode"`
	Error      string    `json:"error,omitempty"`
	OOMKilled  bool      `json:"oomKilled,omitempty"`
}

func (c *Container) recordPath() string { return filepath.Join(c.dir, "state.json") }

// loadRecord takes over what an earlier VM left. A container is as old as its directory on the scratch disk.
func (c *Container) loadRecord() {
	var st unix.Statx_t
	c.created = time.Now()
	if err := unix.Statx(unix.AT_FDCWD, c.dir, 0, unix.STATX_BTIME, &st); err == nil && st.Mask&unix.STATX_BTIME != 0 {
		c.created = time.Unix(st.Btime.Sec, int64(st.Btime.Nsec))
	}
	var r record
	if data, err := os.ReadFile(c.recordPath()); err != nil || json.Unmarshal(data, &r) != nil {
		return
	}
	c.state = State{
		Status: wire.StateCreated, StartedAt: r.StartedAt, FinishedAt: r.FinishedAt, ExitCode: r.ExitCode, Error: r.Error, OOMKilled: r.OOMKilled,
	}
	if !r.FinishedAt.IsZero() {
		c.state.Status = wire.StateExited
	}
}

func (c *Container) saveRecord() {
	s := c.State()
	data, err := json.Marshal(record{s.StartedAt, s.FinishedAt, s.ExitCode, s.Error, s.OOMKilled})
	if err == nil {
		tmp := c.recordPath() + ".new"
		if err = os.WriteFile(tmp, data, 0o600); err == nil {
			err = os.Rename(tmp, c.recordPath())
		}
	}
	if err != nil {
		c.pod.log.Warn("save state", "container", c.spec.Name, "error", err)
	}
}
