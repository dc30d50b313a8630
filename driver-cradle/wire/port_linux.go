package wire

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// A Port is the guest's end of the virtio-serial port. It is opened once and never closed: Close ends a session, not the port.
type Port struct {
	*os.File
	quick *quick
	used  bool // by Accept
}

func (p *Port) again() bool {
	used := p.used
	p.used = true
	return used
}

// OpenPort finds the port by its name.
func OpenPort() (*Port, error) {
	names, err := filepath.Glob("/sys/class/virtio-ports/*/name")
	if err != nil {
		return nil, err
	}
	for _, n := range names {
		name, err := os.ReadFile(n)
		if err != nil || strings.TrimSpace(string(name)) != PortName {
			continue
		}
		path := "/dev/" + filepath.Base(filepath.Dir(n))
		fd, err := unix.Open(path, unix.O_RDWR|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
		if err != nil {
			return nil, fmt.Errorf("open %s: %w", path, err)
		}
		return NewPort(os.NewFile(uintptr(fd), path))
	}
	return nil, fmt.Errorf("no virtio-serial port named %s", PortName)
}

// NewPort makes a Port of a file that is non-blocking and can be polled, and takes it over.
func NewPort(f *os.File) (*Port, error) {
	q, err := newQuick(f)
	if err != nil {
		f.Close()
		return nil, err
	}
	return &Port{File: f, quick: q}, nil
}

// Read reads what the driver has at hand, up to a page.
func (p *Port) Read(b []byte) (int, error) { return p.quick.Read(b) }

// Write writes all of b.
func (p *Port) Write(b []byte) (int, error) { return p.quick.Write(b) }

// Wait sleeps until a host process has connected to the port.
func (p *Port) Wait() error {
	if err := p.SetDeadline(time.Time{}); err != nil {
		return err
	}
	rc, err := p.SyscallConn()
	if err != nil {
		return err
	}
	// The runtime's poller is edge-triggered and the driver wakes it when the host comes or goes, so this sleeps in between.
	return rc.Read(func(fd uintptr) bool {
		fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		_, err := unix.Poll(fds, 0)
		for err == unix.EINTR { // nothing would wake it again for this connection
			_, err = unix.Poll(fds, 0)
		}
		return err == nil && fds[0].Revents&unix.POLLHUP == 0
	})
}

// Close only makes pending reads and writes return: the port itself stays open for the next host process.
func (p *Port) Close() error { return p.SetDeadline(time.Unix(1, 0)) }

// LocalAddr implements net.Conn.
func (p *Port) LocalAddr() net.Addr { return portAddr{} }

// RemoteAddr implements net.Conn.
func (p *Port) RemoteAddr() net.Addr { return portAddr{} }

type portAddr struct{}

func (portAddr) Network() string { return "virtio-serial" }
func (portAddr) String() string  { return PortName }
