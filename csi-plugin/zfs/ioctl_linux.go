package zfs

import (
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// ioctl lets a driver fill a buffer.
func ioctl(f *os.File, request uintptr, into *[256]byte) error {
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), request, uintptr(unsafe.Pointer(into))); errno != 0 {
		return errno
	}
	return nil
}
