package guest

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cradlestack/cradlestack/driver-cradle/guest/stdio"
)

// An Exec is a command in a running container beside its first one.
type Exec struct {
	id        string
	container *Container
	config    ExecConfig
	io        *stdio.IO

	// Guarded by the crew's mutex.
	state   ExecState
	command *command
	ended   chan struct{}
}

// maxExecs is how many ended execs of a container are remembered.
const maxExecs = 128

// Exec prepares a command; Start runs it.
func (c *Container) Exec(cfg ExecConfig) (*Exec, error) {
	if len(cfg.Args) == 0 {
		return nil, &stateError{ErrInvalid, "No exec command specified"}
	}
	if _, err := c.running(); err != nil {
		return nil, err
	}
	if c.State().Paused {
		return nil, &stateError{ErrConflict, fmt.Sprintf("Container %s is paused, unpause the container before exec", c.spec.ID)}
	}
	e := c.newExec(cfg)
	crew := c.pod.crew
	crew.mu.Lock()
	if len(c.execs) >= maxExecs {
		for id, old := range c.execs {
			if old.state.Started && !old.state.Running {
				delete(c.execs, id)
			}
		}
	}
	c.execs[e.id] = e
	crew.mu.Unlock()
	c.Emit("exec_create: "+strings.Join(cfg.Args, " "), map[string]string{"execID": e.id})
	return e, nil
}

func (c *Container) newExec(cfg ExecConfig) *Exec {
	var id [32]byte
	rand.Read(id[:])
	return &Exec{
		id: hex.EncodeToString(id[:]), container: c, config: cfg, ended: make(chan struct{}),
		io: stdio.Unlogged(stdio.Options{TTY: cfg.TTY, OpenStdin: cfg.OpenStdin, StdinOnce: true}),
	}
}

// Execs are the container's execs, in no order.
func (c *Container) Execs() []*Exec {
	c.pod.crew.mu.Lock()
	defer c.pod.crew.mu.Unlock()
	var out []*Exec
	for _, e := range c.execs {
		out = append(out, e)
	}
	return out
}

// ID is 64 hexadecimal digits.
func (e *Exec) ID() string { return e.id }

// Container that it runs in.
func (e *Exec) Container() *Container { return e.container }

// Config that it was made with.
func (e *Exec) Config() ExecConfig { return e.config }

// IO is its streams. Attach before Start: an exec's output is not kept.
func (e *Exec) IO() *stdio.IO { return e.io }

// State of the exec now.
func (e *Exec) State() ExecState {
	e.container.pod.crew.mu.Lock()
	defer e.container.pod.crew.mu.Unlock()
	return e.state
}

// Start runs the command and returns when it runs, or why it can't. The exec's exit code is then docker's, 126 or 127.
func (e *Exec) Start(context.Context) error {
	c := e.container
	crew := c.pod.crew
	crew.mu.Lock()
	first := c.command
	started := e.state.Started
	e.state.Started = true
	crew.mu.Unlock()
	if started {
		return &stateError{ErrConflict, fmt.Sprintf("Error: Exec command %s is already running", e.id)}
	}
	if first == nil {
		e.over(exitRefused)
		return &stateError{ErrConflict, fmt.Sprintf("container %s is not running", c.spec.ID)}
	}
	cmd, err := e.run(first)
	if err != nil {
		code := exitNotExecutable // docker's, whatever it is but a command that is not there
		if se, ok := errors.AsType[*stageError](err); ok {
			if se.Code != exitRefused {
				code = se.Code
			}
		} else if first.endsWithin(dying) {
			err = &stateError{ErrConflict, fmt.Sprintf("container %s is not running", c.spec.ID)}
		}
		e.over(code)
		return err
	}
	crew.mu.Lock()
	e.command = cmd
	e.state.Running, e.state.Pid = true, cmd.pid
	crew.mu.Unlock()
	drained := e.io.Run(cmd.streams)
	c.Emit("exec_start: "+strings.Join(e.config.Args, " "), map[string]string{"execID": e.id})
	go func() {
		code := cmd.wait()
		// Output that a child of the command still holds open does not keep the exec's end back.
		e.over(code)
		c.Emit("exec_die", map[string]string{"execID": e.id, "exitCode": strconv.Itoa(code)})
		<-drained
	}()
	return nil
}

// dying is how long the end of a container may take to be seen that has already made an exec in it fail, in one way or another.
const dying = time.Second

func (e *Exec) over(code int) {
	crew := e.container.pod.crew
	crew.mu.Lock()
	defer crew.mu.Unlock()
	e.command = nil
	e.state.Started, e.state.Running, e.state.Pid, e.state.ExitCode = true, false, 0, code
	select {
	case <-e.ended:
	default:
		close(e.ended)
	}
	crew.change()
}

func (e *Exec) run(first *command) (*command, error) {
	c := e.container
	config, err := c.stageConfig()
	if err != nil {
		return nil, err
	}
	cfg := e.config
	config.Rootfs, config.Sysctls, config.Devices, config.Nodes, config.Mounts, config.Init = "", nil, nil, nil, nil, false
	config.Args, config.TTY, config.Rows, config.Cols = cfg.Args, cfg.TTY, cfg.Rows, cfg.Cols
	config.Env = mergeEnv(containerEnv(c.spec.Env, c.hostname(), cfg.TTY), cfg.Env)
	if cfg.User != "" {
		config.User = cfg.User
	}
	if cfg.WorkingDir != "" {
		if !filepath.IsAbs(cfg.WorkingDir) {
			return nil, &stageError{exitNotExecutable, fmt.Sprintf("the working directory %q is no absolute path", cfg.WorkingDir)}
		}
		config.Cwd = cfg.WorkingDir
	}
	if cfg.Privileged {
		config.Caps, config.Privileged = allCaps, true
	}
	request := stageRequest{config: config, cgroup: c.cgroup, first: first.process, stdin: cfg.OpenStdin}
	start := c.pod.runInside
	if len(c.spec.Ulimits) > 0 || c.spec.Resources.OOMScoreAdj != 0 {
		start = c.pod.startStage
	}
	refused := cgroupValue(c.cgroup, "pids.events", "max")
	cmd, err := start(request)
	if errors.Is(err, unix.EBUSY) || errors.Is(err, unix.EOPNOTSUPP) {
		// The container runs a manager of its own below its cgroup, which then can't hold processes itself: go where its first one is.
		if request.cgroup, err = cgroupOf(first.pid); err == nil {
			cmd, err = start(request)
		}
	}
	if (errors.Is(err, unix.EAGAIN) || errors.Is(err, errStageDied)) && cgroupValue(c.cgroup, "pids.events", "max") > refused {
		limit := cgroupValue(c.cgroup, "pids.max", "")
		err = &stageError{exitNotExecutable, fmt.Sprintf("%v: the container's limit of %d processes is reached", unix.EAGAIN, limit)}
	}
	return cmd, err
}

// cgroupOf is the cgroup directory of a process.
func cgroupOf(pid int) (string, error) {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	if err != nil {
		return "", err
	}
	_, path, ok := strings.Cut(strings.TrimSpace(string(data)), "0::")
	if !ok {
		return "", fmt.Errorf("process %d: no cgroup v2", pid)
	}
	return filepath.Join(cgroupRoot, path), nil
}

// Resize sets the size of its terminal.
func (e *Exec) Resize(h, w uint16) error {
	crew := e.container.pod.crew
	crew.mu.Lock()
	cmd := e.command
	crew.mu.Unlock()
	if cmd == nil {
		return &stateError{ErrNotRunning, fmt.Sprintf("exec %s is not running", e.id)}
	}
	if cmd.master == nil {
		return &stateError{ErrInvalid, "the exec has no terminal"}
	}
	return resizeTTY(cmd.master, h, w)
}

// Wait waits for its end.
func (e *Exec) Wait(ctx context.Context) (exitCode int, err error) {
	select {
	case <-e.ended:
		return e.State().ExitCode, nil
	case <-ctx.Done():
		return 0, context.Cause(ctx)
	}
}

// kill ends the command and, as docker's healthchecks do not, nothing that it started.
func (e *Exec) kill() {
	crew := e.container.pod.crew
	crew.mu.Lock()
	cmd := e.command
	crew.mu.Unlock()
	if cmd != nil {
		_ = cmd.signal(unix.SIGKILL)
	}
}
