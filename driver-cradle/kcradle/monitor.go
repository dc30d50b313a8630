package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/cradlestack/cradlestack/driver-cradle/pod"
	"github.com/cradlestack/cradlestack/driver-cradle/wire"
)

// A monitorMessage is what a monitor tells the process that has started it, on answerFD: one of the first two any number of times, then the rest.
type monitorMessage struct {
	Log     string        `json:"log,omitempty"` // what it has logged
	Filling *wire.Filling `json:"filling,omitempty"`

	Result bool   `json:"result,omitempty"`
	Error  string `json:"error,omitempty"`
	Code   int    `json:"code,omitempty"` // exit code that goes with the error
}

// monitorLog is where a monitor's messages go, in the pod's run directory.
const monitorLog = "monitor.log"

func (c *cli) runDetached(ctx context.Context, dir string, quiet bool) error {
	d, err := c.open(dir)
	if err != nil {
		return err
	}
	launch, err := d.Launch() // what is wrong in it is told here
	if err != nil {
		return err
	}
	claim, err := d.Claim(ctx)
	if err != nil {
		return err
	}
	defer claim.Close()
	if err := c.spawnMonitor(ctx, d, claim, quiet); err != nil {
		return err
	}
	fmt.Fprintln(c.stdout, launch.ID)
	return nil
}

// What a monitor inherits.
const (
	answerFD = 3
	claimFD  = 4
)

// inherit takes a descriptor over that what this process starts has no use for.
func inherit(fd int, name string) *os.File {
	syscall.CloseOnExec(fd)
	return os.NewFile(uintptr(fd), name)
}

// spawnMonitor starts this program once more, in the background, to attend to a pod, and returns when it does. The pod is started with claim,
// or, where that is nil, taken up.
func (c *cli) spawnMonitor(ctx context.Context, d *pod.Dir, claim *os.File, quiet bool) error {
	run := filepath.Join(d.Path(), "run")
	if err := os.MkdirAll(run, 0o700); err != nil {
		return err
	}
	log, err := os.OpenFile(filepath.Join(run, monitorLog), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()
	exe, err := os.Executable()
	if err != nil {
		return err
	}
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	defer r.Close()
	root, err := filepath.Abs(c.root)
	if err != nil {
		return err
	}
	args := []string{"monitor", "--root", root}
	if c.bootDir != "" {
		boot, err := filepath.Abs(c.bootDir)
		if err != nil {
			return err
		}
		args = append(args, "--boot", boot)
	}
	if c.verbose {
		args = append(args, "--verbose")
	}
	bar := c.fillProgress(quiet)
	defer bar.done()
	if bar != nil {
		args = append(args, "--progress")
	}
	files := []*os.File{w}
	if claim == nil {
		args = append(args, "--take-up")
	} else {
		files = append(files, claim)
	}
	cmd := exec.Command(exe, append(args, d.Path())...)
	cmd.Dir = "/"
	cmd.Stdout, cmd.Stderr = log, log
	cmd.ExtraFiles = files
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	err = cmd.Start()
	w.Close()
	if err != nil {
		return err
	}
	if claim != nil {
		claim.Close() // or the pod would be attended to as long as this process lives
	}
	stop := context.AfterFunc(ctx, func() { cmd.Process.Signal(syscall.SIGTERM) })
	defer stop()
	var m monitorMessage
	for answers := json.NewDecoder(r); !m.Result; {
		m = monitorMessage{}
		if answers.Decode(&m) != nil {
			cmd.Wait()
			return fmt.Errorf("the monitor of %s ended early (%v): see %s", d.Path(), cmd.ProcessState, log.Name())
		}
		switch {
		case m.Filling != nil && bar != nil:
			bar.update(*m.Filling)
		case m.Log != "":
			bar.done()
			fmt.Fprint(c.stderr, m.Log)
		}
	}
	if m.Code != 0 {
		c.failure = m.Code
	} else if m.Error != "" {
		cmd.Wait()
	}
	err = cmd.Process.Release()
	if m.Error != "" {
		err = errors.New(m.Error)
	}
	return err
}

// An answer is a monitor's to the process that waits for it, which may be gone.
type answer struct {
	mu   sync.Mutex
	file *os.File // nil: everything is said
}

func (a *answer) tell(m monitorMessage) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.file == nil || json.NewEncoder(a.file).Encode(m) == nil && !m.Result {
		return
	}
	a.file.Close()
	a.file = nil
}

// Write tells a line of the log.
func (a *answer) Write(p []byte) (int, error) {
	a.tell(monitorMessage{Log: string(p)})
	return len(p), nil
}

// monitorCommand attends to a detached pod.
func (c *cli) monitorCommand() *cobra.Command {
	var takeUp, progress bool
	cmd := &cobra.Command{
		Use:    "monitor DIR",
		Hidden: true,
		Args:   cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			a := &answer{file: inherit(answerFD, "answer")}
			c.stderr = io.MultiWriter(c.stderr, a)
			var tell func(wire.Filling)
			if progress {
				tell = func(f wire.Filling) { a.tell(monitorMessage{Filling: &f}) }
			}
			r, err := c.attend(cmd, args[0], takeUp, tell)
			result := monitorMessage{Result: true}
			if err != nil {
				result.Error = err.Error()
			} else if !takeUp {
				result.Code, result.Error = begun(r)
			}
			a.tell(result)
			if err != nil {
				return err
			}
			defer slimLater()()
			_, err = r.Wait(context.Background())
			return err
		},
	}
	cmd.Flags().BoolVar(&takeUp, "take-up", false, "the pod runs already")
	cmd.Flags().BoolVar(&progress, "progress", false, "tell how far the start has come")
	return cmd
}

// begun waits until the containers run, and tells why the command of one was not executed, as docker run -d does. The pod may have others that
// run; one that has ended has done so completely.
func begun(r *pod.Running) (code int, why string) {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	s, err := r.Up(ctx)
	r.Release()
	if err != nil {
		return 0, "" // it has been started; how it is doing is for status to tell
	}
	if !slices.ContainsFunc(s.Containers, func(c wire.ContainerStatus) bool { return c.State == wire.StateRunning }) {
		wait, cancel := context.WithTimeout(ctx, 5*time.Second) // containers may be waiting for others
		defer cancel()
		_, _ = r.Wait(wait) // how it ended is looked at below
	}
	for _, c := range s.Containers {
		if c.Error != "" && (c.ExitCode == 126 || c.ExitCode == 127 || c.ExitCode == exitRefused) {
			return c.ExitCode, fmt.Sprintf("container %s: %s", c.Name, c.Error)
		}
	}
	return 0, ""
}

func (c *cli) attend(cmd *cobra.Command, dir string, takeUp bool, progress func(wire.Filling)) (*pod.Running, error) {
	ctx, cancel := interruptible(cmd)
	defer cancel()
	d, err := c.open(dir)
	if err != nil {
		return nil, err
	}
	if takeUp {
		return d.TakeUp(ctx, pod.TakeUpOptions{})
	}
	options, err := c.startOptions()
	if err != nil {
		return nil, err
	}
	options.Detached, options.Hold = true, true
	options.Claim, options.Progress = inherit(claimFD, "claim"), progress
	return d.Start(ctx, options)
}
