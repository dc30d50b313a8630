package vmm

import (
	"debug/elf"
	"fmt"
	"os"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Where QEMU hands a small request of a disk to one of its threads, the work of waking that and being told of the end costs several times the request itself
// if the host has the data in memory. With io_uring the kernel answers such a request where it is made.

// ioUringAllowed tells whether the host lets a process without privileges use io_uring, of a kernel that is recent enough.
func ioUringAllowed() bool {
	// Who is root, as this process, is not held up by these.
	for _, name := range []string{"io_uring_disabled", "apparmor_restrict_unprivileged_io_uring"} {
		if value, err := os.ReadFile("/proc/sys/kernel/" + name); err == nil && strings.TrimSpace(string(value)) != "0" {
			return false
		}
	}
	// struct io_uring_params of linux/io_uring.h: five numbers, features, and offsets in what could be mapped.
	var params [30]uint32
	fd, _, errno := unix.Syscall(unix.SYS_IO_URING_SETUP, 1, uintptr(unsafe.Pointer(&params)), 0)
	if errno != 0 {
		return false
	}
	_ = unix.Close(int(fd))
	// Linux 5.19: a write that was done in part is continued there, rings are not locked memory (5.12), and workers are the process's own threads (5.12).
	const linkedFile = 1 << 12
	return params[5]&linkedFile != 0
}

// linksIOUring tells whether a QEMU has been built with it.
func linksIOUring(path string) bool {
	f, err := elf.Open(path)
	if err != nil {
		return false // a script around it
	}
	defer f.Close()
	libraries, err := f.ImportedLibraries()
	if err != nil {
		return false
	}
	for _, l := range libraries {
		if strings.HasPrefix(l, "liburing.so") {
			return true
		}
	}
	return false
}

// answersAtOnce tells whether a file is on a file system that answers from memory without a thread. On others, remote ones among them, io_uring has threads of
// the kernel wait, which gains nothing.
func answersAtOnce(f *os.File) (bool, error) {
	var st unix.Statfs_t
	if err := unix.Fstatfs(int(f.Fd()), &st); err != nil {
		return false, fmt.Errorf("statfs %s: %w", f.Name(), err)
	}
	return st.Type == unix.EXT4_SUPER_MAGIC || st.Type == unix.XFS_SUPER_MAGIC, nil
}

// ioUringRefused recognises QEMU's failure to have a ring, be it for a security module or the memory of its cgroup.
func ioUringRefused(message string) bool { return strings.Contains(message, "io_uring") }
