package guest

import (
	"os"
	"os/signal"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// children are the agent's child processes. PID 1 has to reap whatever is handed to it, which Go's own waiting would compete with:
// nothing in the agent uses os/exec.
type children struct {
	mu    sync.Mutex // held while forking, so that no child is reaped before it is known
	known map[int]*process
}

// A process is a child of the agent.
type process struct {
	pid  int
	done chan struct{} // closed once it is reaped

	mu     sync.Mutex
	pidfd  int // -1 once reaped
	status unix.WaitStatus
}

// newChildren begins to reap; it goes on for ever.
func newChildren() *children {
	c := &children{known: make(map[int]*process)}
	ended := make(chan os.Signal, 1)
	signal.Notify(ended, unix.SIGCHLD)
	go func() {
		for range ended {
			c.reap()
		}
	}()
	return c
}

func (c *children) reap() {
	for {
		var ws unix.WaitStatus
		c.mu.Lock()
		pid, err := unix.Wait4(-1, &ws, unix.WNOHANG, nil)
		if err == unix.EINTR {
			c.mu.Unlock()
			continue
		}
		if err != nil || pid <= 0 {
			c.mu.Unlock()
			return
		}
		p := c.known[pid]
		delete(c.known, pid)
		c.mu.Unlock()
		if p != nil {
			p.reaped(ws)
		}
	}
}

// start forks and executes; attr as for syscall.ForkExec.
func (c *children) start(argv0 string, argv []string, attr *syscall.ProcAttr) (*process, error) {
	pidfd := -1
	attr.Sys.PidFD = &pidfd
	c.mu.Lock()
	defer c.mu.Unlock()
	pid, err := syscall.ForkExec(argv0, argv, attr)
	if err != nil {
		return nil, err
	}
	p := &process{pid: pid, pidfd: pidfd, done: make(chan struct{})}
	c.known[pid] = p
	return p, nil
}

func (p *process) reaped(ws unix.WaitStatus) {
	p.mu.Lock()
	defer p.mu.Unlock()
	unix.Close(p.pidfd)
	p.pidfd, p.status = -1, ws
	close(p.done)
}

// signal sends a signal to this process and never to another one that got its number.
func (p *process) signal(sig unix.Signal) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.pidfd < 0 {
		return unix.ESRCH
	}
	return unix.PidfdSendSignal(p.pidfd, sig, nil, 0)
}

// dupPidfd gives a descriptor of the process that the caller closes.
func (p *process) dupPidfd() (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.pidfd < 0 {
		return -1, unix.ESRCH
	}
	return unix.FcntlInt(uintptr(p.pidfd), unix.F_DUPFD_CLOEXEC, 0)
}

// ended says whether the process is gone.
func (p *process) ended() bool {
	select {
	case <-p.done:
		return true
	default:
		return false
	}
}

// endsWithin waits for the process's end, for so long.
func (p *process) endsWithin(d time.Duration) bool {
	select {
	case <-p.done:
		return true
	case <-time.After(d):
		return false
	}
}

// wait gives the exit code as docker does: 128+n for signal n.
func (p *process) wait() int {
	<-p.done
	if p.status.Signaled() {
		return 128 + int(p.status.Signal())
	}
	return p.status.ExitStatus()
}
