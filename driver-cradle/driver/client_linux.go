package driver

import (
	"errors"
	"os"

	"github.com/hashicorp/go-hclog"
	"golang.org/x/sys/unix"
)

// withoutClient calls f when the Nomad client that has started this process is gone.
func withoutClient(f func()) error {
	parent := os.Getppid()
	fd, err := unix.PidfdOpen(parent, unix.PIDFD_NONBLOCK)
	if err != nil {
		return err
	}
	go func() {
		// A file of the runtime's poller: waiting takes no thread.
		file := os.NewFile(uintptr(fd), "pidfd")
		defer file.Close()
		if rc, err := file.SyscallConn(); err == nil && os.Getppid() == parent {
			_ = rc.Read(func(fd uintptr) bool {
				n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 0)
				return n > 0 || err != nil && !errors.Is(err, unix.EINTR)
			})
		}
		f()
	}()
	return nil
}

// Serve makes a plugin, as plugins.Serve wants it, in a process that is nothing else. Nomad starts such processes also to have their configuration
// checked, and ends those itself; if it is killed meanwhile, they have to end by themselves. One that attends to tasks goes on: the next client finds it.
func Serve(log hclog.Logger) any {
	d := New(log).(*Driver)
	err := withoutClient(func() {
		d.mu.Lock()
		defer d.mu.Unlock()
		if d.state == nil {
			os.Exit(0)
		}
	})
	if err != nil {
		d.log.Debug("the client's end can't be waited for", "error", err)
	}
	return d
}
