package server

import (
	"context"
	"net"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// hangupPeriod is how often a connection that nobody reads from is looked at: Go's poller tells of data only.
const hangupPeriod = time.Second

// awaitHangup calls gone when the other side has closed its connection altogether, and returns then or when ctx ends.
func awaitHangup(ctx context.Context, conn net.Conn, gone func()) {
	sc, ok := conn.(syscall.Conn)
	if !ok {
		return // TLS: it is seen when it is read
	}
	raw, err := sc.SyscallConn()
	if err != nil {
		return
	}
	tick := time.NewTicker(hangupPeriod)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		hung := false
		if err := raw.Control(func(fd uintptr) {
			fds := []unix.PollFd{{Fd: int32(fd), Events: 0}}
			n, err := unix.Poll(fds, 0)
			hung = err == nil && n > 0 && fds[0].Revents&(unix.POLLHUP|unix.POLLERR) != 0
		}); err != nil || hung {
			gone()
			return
		}
	}
}
