package main

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	consulapi "github.com/hashicorp/consul/api"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/cradlestack/cradlestack/csi-plugin/filer/lease"
)

// A warden is a process beside a filer of a set. It kills the filer when its lease passes while something may be at work: one that was frozen does not wake up in
// the middle of a write then. Once the filer and all processes that it has started are gone, it takes the floating address away, and lets the others know that
// they need not wait.
//
// It hears from the filer by a pipe, which those processes have open as well: its end is theirs.
type warden struct {
	cmd   *exec.Cmd
	leash *os.File // the pipe's end to write to
	dead  chan struct{}

	mu   sync.Mutex
	last warning
}

// A warning is what the filer writes, in one piece.
type warning struct {
	deadline time.Duration // as lease.Now counts; 0: nothing is at work
	session  string        // whose lock is held, and what has it may say that it ended; "" if not
}

const (
	sessionSize = 36
	warningSize = 8 + sessionSize
)

// A charge is what a warden is told at its start.
type charge struct {
	Consul   string
	Set      string
	Member   string
	Floating string
	Volumes  string   // the directory that they are mounted in
	Zpools   []string // that go with the lock
}

// startWarden starts one for this process.
func startWarden(c charge, stderr io.Writer) (_ *warden, err error) {
	config, err := json.Marshal(c)
	if err != nil {
		return nil, err
	}
	fd, err := unix.PidfdOpen(os.Getpid(), 0)
	if err != nil {
		return nil, os.NewSyscallError("pidfd_open", err)
	}
	self := os.NewFile(uintptr(fd), "pidfd")
	defer self.Close()
	theirs, ours, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer theirs.Close()
	w := &warden{leash: ours, dead: make(chan struct{})}
	w.cmd = exec.Command("/proc/self/exe", "warden")
	w.cmd.Stdin, w.cmd.Stderr = strings.NewReader(string(config)), stderr
	w.cmd.ExtraFiles = []*os.File{theirs, self}
	w.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true} // a signal to the filer's group is not for it
	if err := w.cmd.Start(); err != nil {
		ours.Close()
		return nil, fmt.Errorf("start the warden: %w", err)
	}
	go func() {
		defer close(w.dead)
		w.cmd.Wait()
	}()
	return w, nil
}

// warn tells it.
func (w *warden) warn(change func(*warning)) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	change(&w.last)
	b := binary.NativeEndian.AppendUint64(nil, uint64(w.last.deadline))
	b = append(b, w.last.session...)
	w.leash.SetWriteDeadline(time.Now().Add(time.Second)) // a warden that does not read is none
	_, err := w.leash.Write(append(b, make([]byte, warningSize-len(b))...))
	return err
}

// arm has it kill this process at a moment.
func (w *warden) arm(deadline time.Duration) error {
	return w.warn(func(n *warning) { n.deadline = deadline })
}

// disarm is arm's end.
func (w *warden) disarm() error { return w.arm(0) }

// holds tells it of the lock, which it gives back if this process ends.
func (w *warden) holds(session string) error {
	return w.warn(func(n *warning) { n.session = session })
}

// close ends it, with nothing to do.
func (w *warden) close() {
	_ = w.warn(func(n *warning) { *n = warning{} })
	w.leash.Close()
	select {
	case <-w.dead:
	case <-time.After(endTime): // a process that was left alone has the pipe
		_ = w.cmd.Process.Kill()
		<-w.dead
	}
}

func (c *cli) wardenCommand() *cobra.Command {
	return &cobra.Command{
		Use: "warden", Short: "watch over a filer of a set, which starts this itself", Hidden: true, Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			var w charge
			if err := json.NewDecoder(io.LimitReader(cmd.InOrStdin(), maxRequest)).Decode(&w); err != nil {
				return err
			}
			signal.Ignore(unix.SIGTERM, unix.SIGINT, unix.SIGHUP) // it ends after the filer
			_ = unix.Setpriority(unix.PRIO_PROCESS, 0, -20)       // as good as it gets
			log := slog.New(slog.NewTextHandler(c.stderr, nil)).With("warden of", w.Member)
			return w.watch(os.NewFile(3, "pipe"), 4, log)
		},
	}
}

// watch waits for the deadline, and for the end of all that have the pipe.
func (c charge) watch(pipe *os.File, pidfd int, log *slog.Logger) error {
	timer, err := unix.TimerfdCreate(unix.CLOCK_BOOTTIME, unix.TFD_CLOEXEC|unix.TFD_NONBLOCK)
	if err != nil {
		return os.NewSyscallError("timerfd_create", err)
	}
	var now warning
	var killed time.Duration // when; 0 for never
	in := int(pipe.Fd())
watch:
	for b := make([]byte, 100*warningSize); ; {
		at := unix.ItimerSpec{Value: unix.NsecToTimespec(int64(now.deadline))} // 0 is never
		if err := unix.TimerfdSettime(timer, unix.TFD_TIMER_ABSTIME, &at, nil); err != nil {
			return os.NewSyscallError("timerfd_settime", err)
		}
		fds := []unix.PollFd{{Fd: int32(in), Events: unix.POLLIN}, {Fd: int32(timer), Events: unix.POLLIN}}
		patience := -1
		if killed > 0 {
			patience = 500
		}
		if _, err := unix.Poll(fds, patience); err != nil && !errors.Is(err, unix.EINTR) {
			return os.NewSyscallError("poll", err)
		}
		if fds[0].Revents != 0 {
			n, err := io.ReadAtLeast(pipe, b, warningSize)
			if n < warningSize {
				if errors.Is(err, io.EOF) {
					break watch
				}
				return err
			}
			last := b[n/warningSize*warningSize-warningSize:]
			now = warning{time.Duration(binary.NativeEndian.Uint64(last)), strings.TrimRight(string(last[8:warningSize]), "\x00")}
		}
		if now.deadline > 0 && lease.Now() >= now.deadline {
			log.Error("the filer's lease has passed and it has not stopped: it is killed")
			kill(pidfd)
			now.deadline, killed = 0, lease.Now()
		}
		// Calls that wait for disks keep its processes, their connections, and the pipe. They answer nobody any more.
		if killed > 0 && lease.Now()-killed > time.Second {
			if err := c.freeAddress(); err != nil {
				log.Error("give the address back", "error", err)
			}
			if lostZpools(c.Zpools) != nil {
				break watch
			}
		}
	}
	if now.session == "" {
		return nil
	}
	// The pipe may be closed before its last connections are, whose clients would not hear of it without the address.
	_, _ = unix.Poll([]unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}, 1000)
	log.Info("the filer has ended, or does nothing any more")
	errs := []error{c.freeAddress()}
	why := "the filer of " + c.Member + " has ended unexpectedly"
	if len(c.Zpools) > 0 {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		switch err := exportZpools(ctx, c.Volumes, c.Zpools); {
		case errors.Is(err, errZpoolLost):
			why += ": " + err.Error()
		case err != nil:
			return errors.Join(append(errs, err)...) // nobody is told that this host has nothing any more
		default:
			log.Info("gave the pool back", "zpools", c.Zpools)
		}
	}
	config := consulConfig(c.Consul)
	client, err := consulapi.NewClient(config)
	if err == nil {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		l := lock{client: client, set: c.Set}
		err = l.ended(ctx, now.session, why)
		_ = client.Agent().ServiceDeregister(c.Set + "-active-" + c.Member)
	}
	return errors.Join(append(errs, err)...)
}

func (c charge) freeAddress() error {
	a, err := parseFloating(c.Floating)
	if err != nil || a == nil {
		return err
	}
	return a.remove()
}

// kill ends the filer, and what it has started, which would end by itself unless it were frozen as well.
func kill(pidfd int) {
	info, err := os.ReadFile(fmt.Sprintf("/proc/self/fdinfo/%d", pidfd))
	var started []int
	if _, after, ok := strings.Cut(string(info), "\nPid:"); err == nil && ok {
		text, _, _ := strings.Cut(strings.TrimSpace(after), "\n")
		if pid, err := strconv.Atoi(strings.TrimSpace(text)); err == nil && pid > 0 {
			started = children(pid)
		}
	}
	_ = unix.PidfdSendSignal(pidfd, unix.SIGKILL, nil, 0) // else it has ended already
	for _, child := range started {
		if child != os.Getpid() {
			_ = unix.Kill(child, unix.SIGKILL)
		}
	}
}

// children are the processes that one has started.
func children(pid int) (pids []int) {
	lists, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/[0-9]*/children", pid))
	for _, path := range lists {
		list, _ := os.ReadFile(path) // a thread that has ended has none
		for _, field := range strings.Fields(string(list)) {
			if child, err := strconv.Atoi(field); err == nil {
				pids = append(pids, child)
			}
		}
	}
	return pids
}
