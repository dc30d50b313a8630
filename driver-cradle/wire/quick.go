package wire

import (
	"io"
	"net"
	"os"
	"sync"
	"syscall"
	"unsafe"
)

// quick reads and writes a descriptor that never lets a system call sleep: a socket, a virtio-serial port. Its calls last as long as the
// copying does, and the runtime is not told of them. Told, it looks every 20 µs whether one lasts, hands the processor to another thread
// when it does, and goes on looking for a while: in an emulated guest that is a fifth of what moving a file costs.
type quick struct{ in, out quickly }

func newQuick(c syscall.Conn) (*quick, error) {
	rc, err := c.SyscallConn()
	if err != nil {
		return nil, err
	}
	q := &quick{in: quickly{await: rc.Read}, out: quickly{await: rc.Write}}
	q.in.try = func(fd uintptr) bool { return q.in.call(syscall.SYS_READ, fd) }
	q.out.try = func(fd uintptr) bool { return q.out.call(syscall.SYS_WRITE, fd) }
	return q, nil
}

// quickConn is a connection with quick calls, where it is a socket.
type quickConn struct {
	net.Conn
	quick *quick
}

func quickened(c net.Conn) net.Conn {
	if s, ok := c.(*net.UnixConn); ok {
		if q, err := newQuick(s); err == nil {
			return &quickConn{c, q}
		}
	}
	return c
}

func (c *quickConn) Read(b []byte) (int, error)  { return c.quick.Read(b) }
func (c *quickConn) Write(b []byte) (int, error) { return c.quick.Write(b) }

func (q *quick) Read(b []byte) (int, error) {
	n, err := q.in.next(b)
	if err != nil {
		return 0, os.NewSyscallError("read", err)
	}
	if n == 0 && len(b) > 0 {
		return 0, io.EOF
	}
	return n, nil
}

func (q *quick) Write(b []byte) (done int, err error) {
	for done < len(b) {
		n, err := q.out.next(b[done:])
		if err != nil {
			return done, os.NewSyscallError("write", err)
		}
		done += n
	}
	return done, nil
}

// quickly is one direction.
type quickly struct {
	mu    sync.Mutex
	await func(func(fd uintptr) bool) error
	try   func(fd uintptr) bool // made once: a port is read page by page
	b     []byte
	n     int
	errno syscall.Errno
}

// call is false where it would have to sleep.
func (q *quickly) call(number, fd uintptr) bool {
	n, _, errno := syscall.RawSyscall(number, fd, uintptr(unsafe.Pointer(unsafe.SliceData(q.b))), uintptr(len(q.b)))
	q.n, q.errno = int(n), errno
	return errno != syscall.EAGAIN
}

// next moves some of b, as soon as that is possible.
func (q *quickly) next(b []byte) (int, error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.b = b
	defer func() { q.b = nil }()
	for {
		if err := q.await(q.try); err != nil {
			return 0, err
		}
		switch q.errno {
		case 0:
			return q.n, nil
		case syscall.EINTR:
		default:
			return 0, q.errno
		}
	}
}
