package ganesha

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

var errResting = errors.New("it must not be there")

// A child is a process of NFS-Ganesha.
type child struct {
	cmd      *exec.Cmd
	done     chan struct{}
	out      *output
	version3 bool
	begun    time.Time
}

// start starts the process and waits until it serves.
func (s *Server) start() error {
	if err := s.lockRun(); err != nil {
		return err
	}
	stale, err := s.staleRecovery()
	if err != nil {
		return err
	}
	// What is in the state directory may be another filer's by now, which has begun a list of its own. What was there while the lease still held is not its.
	s.now.Lock()
	rests := s.rests()
	s.now.Unlock()
	if rests {
		return errResting
	}
	for _, dir := range stale {
		if err := os.RemoveAll(dir); err != nil {
			return err
		}
	}
	epoch, err := s.epoch()
	if err != nil {
		return err
	}
	c := &child{done: make(chan struct{}), out: &output{log: s.Log}, version3: s.front == nil && registers(), begun: time.Now()}
	if err := s.configure(c.version3); err != nil {
		return err
	}
	initialized := c.out.expect("NFS SERVER INITIALIZED")
	c.cmd = exec.Command(s.program, "-F", "-L", "STDOUT", "-f", s.configFile(), "-p", filepath.Join(s.Run, "pid"), "-E", strconv.FormatInt(epoch, 10), "-I", "0")
	// No bus is asked for, where others could order about it, and no device's former file system is remembered.
	c.cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "DBUS_SYSTEM_BUS_ADDRESS=unix:path=/nonexistent", "BLKID_FILE=/nonexistent/blkid.tab"}
	c.cmd.Stdout, c.cmd.Stderr = c.out, c.out
	c.cmd.ExtraFiles = []*os.File{s.lock}
	if s.Leash != nil {
		c.cmd.ExtraFiles = append(c.cmd.ExtraFiles, s.Leash)
	}
	c.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Pdeathsig: unix.SIGKILL}
	if err := s.spawn(c); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(s.ctx, startTime)
	defer cancel()
	select {
	case <-initialized:
		s.Log.Info("NFS-Ganesha serves", "pid", c.cmd.Process.Pid, "listen", s.Listen, "version 3", c.version3)
		return nil
	case <-c.done:
		err = fmt.Errorf("NFS-Ganesha has ended: %v: %s", c.cmd.ProcessState, c.out.last())
	case <-ctx.Done():
		err = fmt.Errorf("NFS-Ganesha does not begin: %w: %s", context.Cause(ctx), c.out.last())
	}
	s.stop()
	s.now.Lock()
	defer s.now.Unlock()
	if s.resting {
		return errResting
	}
	return err
}

// spawn starts a process, unless there must be none. It dies with the thread that has started it, which waits for it.
func (s *Server) spawn(c *child) error {
	s.now.Lock()
	defer s.now.Unlock()
	if s.rests() {
		return errResting
	}
	started := make(chan error)
	s.group.Go(func() {
		runtime.LockOSThread()
		var err error
		if s.front == nil {
			defer runtime.UnlockOSThread()
		} else {
			err = s.front.enter()
		}
		if err == nil {
			err = c.cmd.Start()
		}
		started <- err
		if err == nil {
			c.cmd.Wait()
			close(c.done)
		}
	})
	if err := <-started; err != nil {
		return fmt.Errorf("start %s: %w", s.program, err)
	}
	s.child = c
	return nil
}

// rests says whether there must be no process now. The lock is held.
func (s *Server) rests() bool {
	s.resting = s.resting || !s.Lease.Holds()
	return s.resting
}

// lockRun waits for the end of a process that one before this has left, which can be but a moment.
func (s *Server) lockRun() error {
	if s.lock == nil {
		f, err := os.OpenFile(filepath.Join(s.Run, "lock"), os.O_RDWR|os.O_CREATE, 0o600)
		if err != nil {
			return err
		}
		for end := time.Now().Add(closeTime); ; time.Sleep(10 * time.Millisecond) {
			err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
			if err == nil {
				break
			}
			if !errors.Is(err, unix.EWOULDBLOCK) || time.Now().After(end) {
				return errors.Join(fmt.Errorf("%s: %w: another filer serves with the same socket", f.Name(), err), f.Close())
			}
		}
		s.lock = f
	}
	return nil
}

// staleRecovery are the lists of clients that processes were writing when they died. The one that counts is what the link leads to.
func (s *Server) staleRecovery() (stale []string, err error) {
	dir := filepath.Join(s.State, "v4recov")
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	current, err := os.Readlink(filepath.Join(dir, "node0"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	for _, e := range entries {
		if name := e.Name(); name != filepath.Base(current) && strings.HasPrefix(name, "node0.") {
			stale = append(stale, filepath.Join(dir, name))
		}
	}
	return stale, nil
}

func (c *child) ended() bool {
	select {
	case <-c.done:
		return true
	default:
		return false
	}
}

func (c *child) kill() {
	_ = c.cmd.Process.Kill() // else it has ended
	<-c.done
}

// dies kills it, and says whether it has ended by a time, which it does not while the storage keeps a call.
func (c *child) dies(limit time.Duration) bool {
	_ = c.cmd.Process.Kill()
	select {
	case <-c.done:
		return true
	case <-time.After(limit):
		return false
	}
}

// reload has it read its configuration again. The problems that it had with it are what it says; an error is that it did not say that it is done.
func (c *child) reload(ctx context.Context) (problems []string, err error) {
	complete := c.out.expect("Reread exports complete")
	if err := c.cmd.Process.Signal(unix.SIGHUP); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, reloadTime)
	defer cancel()
	select {
	case <-complete:
		return c.out.problems(), nil
	case <-c.done:
		return nil, fmt.Errorf("it has ended: %v", c.cmd.ProcessState)
	case <-ctx.Done():
		return nil, fmt.Errorf("it does not read its configuration: %w", context.Cause(ctx))
	}
}

// has says whether it has anything open on a mount, whose number is that of name_to_handle_at(2).
func (c *child) has(mount int) (bool, error) {
	dir := fmt.Sprintf("/proc/%d/fdinfo", c.cmd.Process.Pid)
	entries, err := os.ReadDir(dir)
	if err != nil {
		return false, err
	}
	line := fmt.Appendf(nil, "\nmnt_id:\t%d\n", mount)
	for _, e := range entries {
		if info, err := os.ReadFile(filepath.Join(dir, e.Name())); err == nil && bytes.Contains(info, line) { // else it has been closed
			return true, nil
		}
	}
	return false, nil
}

// waits are the system calls that threads are in which have nothing to do.
var waits = map[int]bool{
	unix.SYS_FUTEX: true, unix.SYS_EPOLL_WAIT: true, unix.SYS_EPOLL_PWAIT: true, unix.SYS_RT_SIGTIMEDWAIT: true, unix.SYS_CLOCK_NANOSLEEP: true, unix.SYS_RESTART_SYSCALL: true,
}

// drain freezes it at a moment at which all of its threads wait: no call is half done then, and those that come are not begun.
func (c *child) drain() bool {
	pid := c.cmd.Process.Pid
	for end := time.Now().Add(drainTime); ; time.Sleep(2 * time.Millisecond) {
		if c.ended() || c.cmd.Process.Signal(unix.SIGSTOP) != nil {
			return true
		}
		if idle(pid) {
			return true
		}
		if time.Now().After(end) {
			return false
		}
		if c.cmd.Process.Signal(unix.SIGCONT) != nil {
			return true
		}
	}
}

// idle says whether all threads of a process that is being stopped stand still, and each in a system call that waits.
func idle(pid int) bool {
	threads, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/[0-9]*", pid))
	if err != nil {
		return false
	}
	for _, thread := range threads {
		stopped := false
		for range 50 {
			stat, err := os.ReadFile(filepath.Join(thread, "stat"))
			if err != nil {
				return false
			}
			_, after, _ := strings.Cut(string(stat), ") ")
			if stopped = strings.HasPrefix(after, "T"); stopped {
				break
			}
			time.Sleep(200 * time.Microsecond)
		}
		if !stopped {
			return false // in the middle of a write
		}
		text, err := os.ReadFile(filepath.Join(thread, "syscall"))
		if err != nil {
			return false
		}
		number, _, _ := strings.Cut(string(text), " ")
		if n, err := strconv.Atoi(number); err != nil || !waits[n] {
			return false
		}
	}
	return len(threads) > 0
}

// output logs what the process says, line by line.
type output struct {
	log *slog.Logger

	mu       sync.Mutex
	rest     string
	said     []string // the last that were problems
	marker   string
	met      chan struct{} // closed when a line has the marker
	critical []string      // since expect, about exports
}

// expect is closed when a line with marker has been said.
func (o *output) expect(marker string) <-chan struct{} {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.marker, o.met, o.critical = marker, make(chan struct{}), nil
	return o.met
}

const maxLine, maxSaid = 4096, 3

func (o *output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.rest += string(p)
	for {
		line, rest, whole := strings.Cut(o.rest, "\n")
		if !whole && len(o.rest) < maxLine {
			return len(p), nil
		}
		o.rest = rest
		if !whole {
			o.rest = ""
		}
		o.line(line)
	}
}

// line is DATE : epoch N : HOST : PROGRAM-PID[THREAD] FUNCTION :COMPONENT :LEVEL :TEXT.
func (o *output) line(line string) {
	if o.marker != "" && strings.Contains(line, o.marker) {
		close(o.met)
		o.marker = ""
	}
	_, after, _ := strings.Cut(line, "] ")
	fields := strings.SplitN(after, " :", 4)
	if len(fields) < 4 {
		o.log.Debug("NFS-Ganesha", "says", line)
		return
	}
	component, level, text := fields[1], fields[2], fields[3]
	switch {
	case level == "WARN":
		o.said = append(o.said, text) // such as why it can't listen
		o.log.Debug("NFS-Ganesha", "component", component, "says", text)
	case strings.HasPrefix(text, "Cannot register NFS V4 "): // which needs no portmapper
		o.log.Debug("NFS-Ganesha", "component", component, "says", text)
	case level == "CRIT" || level == "MAJ" || level == "FATAL":
		o.said = append(o.said, text)
		if o.marker != "" && component == "CONFIG" {
			o.critical = append(o.critical, text)
		}
		o.log.Warn("NFS-Ganesha", "component", component, "says", text)
	default:
		o.log.Debug("NFS-Ganesha", "component", component, "says", text)
	}
	o.said = o.said[max(0, len(o.said)-maxSaid):]
}

func (o *output) problems() []string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.critical
}

// last is what was wrong last.
func (o *output) last() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	if len(o.said) == 0 {
		return "it says nothing"
	}
	return strings.Join(o.said, ": ")
}
