package mount

import (
	"os"

	"golang.org/x/sys/unix"
)

// Forget has the kernel forget what it has in memory of a file or device, so that what is read next is what is stored. What it could not write, to a disk that failed or a pool that was
// full, it still has, as if that had been written, and tells nobody but who had it open then.
func Forget(f *os.File) error {
	_ = f.Sync() // what can't be written is forgotten as well
	return os.NewSyscallError("fadvise", unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED))
}
