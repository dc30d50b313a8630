package wire

import (
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
		if _, err := io.Copy(dst, src); err != nil {
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
