package wire

import (
	"errors"
	"io"
	"net"

	"golang.org/x/sys/unix"
)

// Proxy copies between a client's connection and a stream until both directions have ended, passing on the end of each direction by
// itself (docker's attach and exec go on sending after their stdin has ended). When one side is gone, the other is closed.
func Proxy(client, stream net.Conn) {
	done := make(chan struct{}, 2)
	pass := func(dst, src net.Conn) {
		defer func() { done <- struct{}{} }()
		if err := transfer(quickened(dst), quickened(src)); err != nil {
			reset(client)
			reset(stream)
			return
		}
		if w, ok := dst.(interface{ CloseWrite() error }); !ok || w.CloseWrite() != nil {
			reset(dst)
		}
		// A unix socket tells a client that has gone from one that only has nothing more to say.
		if u, ok := src.(*net.UnixConn); ok && hungUp(u) {
			reset(dst)
		}
	}
	go pass(client, stream)
	go pass(stream, client)
	<-done
	<-done
	client.Close()
	stream.Close()
}

// What a direction of a proxied connection holds: little while it is used by a terminal, and for a file what a unix socket holds, so that
// its sender and this process wake each other rarely.
const (
	leastTransfer = 4 << 10
	mostTransfer  = 256 << 10
)

// transfer copies until src ends.
func transfer(dst io.Writer, src io.Reader) error {
	buf := make([]byte, leastTransfer)
	for {
		n, err := src.Read(buf)
		if n > 0 {
			if _, err := dst.Write(buf[:n]); err != nil {
				return err
			}
		}
		switch {
		case errors.Is(err, io.EOF):
			return nil
		case err != nil:
			return err
		case n == len(buf) && n < mostTransfer:
			buf = make([]byte, 2*n)
		}
	}
}

// hungUp waits until neither direction of c is open; false if c was closed on this side.
func hungUp(c *net.UnixConn) bool {
	rc, err := c.SyscallConn()
	if err != nil {
		return false
	}
	return rc.Read(func(fd uintptr) bool {
		fds := []unix.PollFd{{Fd: int32(fd)}}
		_, err := unix.Poll(fds, 0)
		return err == nil && fds[0].Revents&(unix.POLLHUP|unix.POLLERR) != 0
	}) == nil
}

// reset ends a connection at once, so that the other side's next write fails instead of filling a window that nobody reads.
func reset(c net.Conn) {
	if s, ok := c.(interface{ Reset() error }); ok {
		_ = s.Reset() // fails where the stream is over
		return
	}
	c.Close()
}
