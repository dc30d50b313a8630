package vmm

import (
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// A process is held by a pidfd: what is signalled and waited for is that process and never another one with its number.
type process struct {
	pid  int
	file *os.File // pidfd, non-blocking: the runtime's poller waits for the process's end

	reaped <-chan error // of a child: how it ended, once; nil for a process that another one has started
}

// openProcess finds the process with this number and start time.
func openProcess(pid int, start uint64) (*process, error) {
	fd, err := unix.PidfdOpen(pid, unix.PIDFD_NONBLOCK)
	if errors.Is(err, unix.ESRCH) || errors.Is(err, unix.EINVAL) {
		return nil, ErrNotRunning
	}
	if err != nil {
		return nil, fmt.Errorf("pidfd of process %d: %w", pid, err)
	}
	p := &process{pid: pid, file: os.NewFile(uintptr(fd), "pidfd")}
	// Only now, with the process held, does its start time say which one it is.
	if got, err := startTime(pid); err != nil || got != start || p.ended() {
		p.file.Close()
		return nil, ErrNotRunning
	}
	return p, nil
}

func (p *process) kill() error {
	rc, err := p.file.SyscallConn()
	if err != nil {
		return err
	}
	cerr := rc.Control(func(fd uintptr) { err = unix.PidfdSendSignal(int(fd), unix.SIGKILL, nil, 0) })
	if err == nil {
		err = cerr
	}
	if err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("kill process %d: %w", p.pid, err)
	}
	return nil
}

// wait returns when the process has ended, or with an error when the process was closed before.
func (p *process) wait() error {
	rc, err := p.file.SyscallConn()
	if err != nil {
		return err
	}
	return rc.Read(readable)
}

// endsWithin waits for the process's end, for so long.
func (p *process) endsWithin(d time.Duration) bool {
	if p.file.SetReadDeadline(time.Now().Add(d)) != nil {
		return p.ended()
	}
	err := p.wait()
	_ = p.file.SetReadDeadline(time.Time{})
	return err == nil
}

func (p *process) ended() bool {
	rc, err := p.file.SyscallConn()
	if err != nil {
		return false
	}
	var ended bool
	err = rc.Control(func(fd uintptr) { ended = readable(fd) })
	return err == nil && ended
}

func readable(fd uintptr) bool {
	fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	for {
		n, err := unix.Poll(fds, 0)
		if !errors.Is(err, unix.EINTR) {
			return err == nil && n == 1
		}
	}
}
