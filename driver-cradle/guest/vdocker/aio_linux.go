package vdocker

import (
	"errors"
	"os"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// aio moves parts of files in the background with io_submit(2). A goroutine that waits for one sleeps in the runtime's poller. In a
// system call it would have its processor taken away by the runtime, which then looks every 20 µs for others to take it from: in an
// emulated guest with one processor that costs as much as the copying. A call that only begins I/O lasts long enough for that too.
type aio struct {
	ctx     uintptr
	resFD   int
	done    *os.File // resFD, an eventfd
	pending int
	quick   bool // io_submit is not told to the runtime: should it have to wait for the disk, all of this program does
}

// linux/aio_abi.h
const (
	aioRead  = 0 // IOCB_CMD_PREAD
	aioWrite = 1 // IOCB_CMD_PWRITE
	aioResFD = 1 // IOCB_FLAG_RESFD
)

// iocb is struct iocb of linux/aio_abi.h on little-endian machines.
type iocb struct {
	data   uint64
	_, _   uint32 // the kernel's, and flags as of pwritev2
	opcode uint16
	_      int16 // priority
	fd     uint32
	buf    *byte
	bytes  uint64
	offset int64
	_      uint64
	flags  uint32
	resFD  uint32
}

// ioEvent is struct io_event of linux/aio_abi.h.
type ioEvent struct {
	data, obj uint64
	res, res2 int64
}

// newAIO is for up to n parts at a time.
func newAIO(n int) (*aio, error) {
	fd, err := unix.Eventfd(0, unix.EFD_NONBLOCK|unix.EFD_CLOEXEC)
	if err != nil {
		return nil, os.NewSyscallError("eventfd", err)
	}
	a := &aio{resFD: fd, done: os.NewFile(uintptr(fd), "eventfd")}
	if _, _, errno := unix.Syscall(unix.SYS_IO_SETUP, uintptr(n), uintptr(unsafe.Pointer(&a.ctx)), 0); errno != 0 {
		a.done.Close()
		return nil, os.NewSyscallError("io_setup", errno)
	}
	return a, nil
}

// submit begins to read into, or write from, memory that Go does not manage. The tag comes back from wait.
func (a *aio) submit(opcode uint16, f *os.File, b []byte, at int64, tag int) error {
	cb := &iocb{
		data: uint64(tag), opcode: opcode, fd: uint32(f.Fd()), buf: unsafe.SliceData(b), bytes: uint64(len(b)), offset: at,
		flags: aioResFD, resFD: uint32(a.resFD),
	}
	for {
		var errno syscall.Errno
		if a.quick {
			_, _, errno = syscall.RawSyscall(unix.SYS_IO_SUBMIT, a.ctx, 1, uintptr(unsafe.Pointer(&cb)))
		} else {
			_, _, errno = syscall.Syscall(unix.SYS_IO_SUBMIT, a.ctx, 1, uintptr(unsafe.Pointer(&cb)))
		}
		switch errno {
		case 0:
			a.pending++
			return nil
		case unix.EINTR:
		default:
			return os.NewSyscallError("io_submit", errno)
		}
	}
}

// wait gives the tag of one that is done, and the bytes moved or a negative errno.
func (a *aio) wait() (tag, res int, err error) {
	var ev ioEvent
	var now unix.Timespec
	for {
		got, _, errno := syscall.RawSyscall6(unix.SYS_IO_GETEVENTS, a.ctx, 1, 1, uintptr(unsafe.Pointer(&ev)), uintptr(unsafe.Pointer(&now)), 0)
		switch {
		case got == 1 && errno == 0:
			a.pending--
			return int(ev.data), int(ev.res), nil
		case errno != 0 && errno != unix.EINTR:
			return 0, 0, os.NewSyscallError("io_getevents", errno)
		}
		var count [8]byte
		if _, err := a.done.Read(count[:]); err != nil {
			return 0, 0, err
		}
	}
}

// close waits for what is pending.
func (a *aio) close() error {
	var err error
	if _, _, errno := unix.Syscall(unix.SYS_IO_DESTROY, a.ctx, 0, 0); errno != 0 {
		err = os.NewSyscallError("io_destroy", errno)
	}
	return errors.Join(err, a.done.Close())
}
