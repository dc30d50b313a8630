package vmm

import (
	"fmt"
	"os"
	"runtime"

	"golang.org/x/sys/unix"
)

const tunDevice = "/dev/net/tun"

// hasOffload tells whether packets on this network's tap carry a virtio-net header: the features that the guest's driver has agreed on
// depend on it, so it is part of a template's key.
func hasOffload(n Net) (bool, error) {
	if n.Mode != NetTap {
		return false, nil
	}
	ifr, err := unix.NewIfreq("none")
	if err != nil {
		return false, err
	}
	if err := unix.IoctlIfreq(int(n.Tap.Fd()), unix.TUNGETIFF, ifr); err != nil {
		return false, fmt.Errorf("network: the tap is none: %w", err)
	}
	return ifr.Uint16()&unix.IFF_VNET_HDR != 0, nil
}

// spareTap makes a tap with offload for a template's machine, in a network namespace that ends with it.
func spareTap() (*os.File, error) {
	type result struct {
		tap *os.File
		err error
	}
	made := make(chan result)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends with its namespace
		tap, err := func() (*os.File, error) {
			if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
				return nil, fmt.Errorf("network namespace: %w", err)
			}
			fd, err := unix.Open(tunDevice, unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
			if err != nil {
				return nil, fmt.Errorf("open %s: %w", tunDevice, err)
			}
			ifr, err := unix.NewIfreq("tap0")
			if err != nil {
				return nil, err
			}
			ifr.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
			if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, ifr); err != nil {
				unix.Close(fd)
				return nil, fmt.Errorf("make a tap: %w", err)
			}
			return os.NewFile(uintptr(fd), tunDevice), nil
		}()
		made <- result{tap, err}
	}()
	r := <-made
	return r.tap, r.err
}
