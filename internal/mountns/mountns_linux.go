// Package mountns gives a test mounts of its own. Whoever gets a mount namespace while a file system is mounted on the host, as each node of package nomadtest does,
// keeps it mounted: what is over it can't be removed then.
package mountns

import (
	"fmt"
	"os"
	"runtime"
	"syscall"

	"golang.org/x/sys/unix"
)

// Own gives this process, which begins anew for it, a mount namespace. It is called by TestMain; without root it does nothing.
func Own() {
	const done = "MOUNTNS_OWN"
	if os.Getenv(done) != "" || os.Geteuid() != 0 {
		return
	}
	runtime.LockOSThread() // whose namespace it is
	err := unix.Unshare(unix.CLONE_NEWNS)
	if err == nil {
		err = unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, "")
	}
	if err == nil {
		err = unix.Mount("", "/", "", unix.MS_REC|unix.MS_SHARED, "") // as hosts have it
	}
	if err == nil {
		err = syscall.Exec("/proc/self/exe", os.Args, append(os.Environ(), done+"=1"))
	}
	fmt.Fprintf(os.Stderr, "own mounts: %v\n", err)
	os.Exit(1)
}
