package mount

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// A Loop is a block device over an image file, or over another block device.
type Loop struct {
	Device   string // /dev/loop0
	ReadOnly bool
}

// Attach returns the loop device of an image, which is made where there is none of that kind: two devices over one image have two
// caches, and what one writes the other does not see. The caller holds a lock against others who do the same.
func Attach(image string, readOnly bool) (Loop, error) {
	all, err := Loops(image)
	if err != nil {
		return Loop{}, err
	}
	for _, l := range all {
		if l.ReadOnly == readOnly {
			return l, keep(l.Device)
		}
	}
	flags := os.O_RDWR
	if readOnly {
		flags = os.O_RDONLY
	}
	f, err := os.OpenFile(image, flags, 0)
	if err != nil {
		return Loop{}, err
	}
	defer f.Close()
	control, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		return Loop{}, fmt.Errorf("%w: load the kernel's loop module (modprobe loop)", err)
	}
	defer control.Close()
	config := unix.LoopConfig{Fd: uint32(f.Fd()), Size: blockSize}
	copy(config.Info.File_name[:len(config.Info.File_name)-1], image)
	// Without it every page is cached twice. File systems that can't do it have it ignored.
	config.Info.Flags = unix.LO_FLAGS_DIRECT_IO
	if readOnly {
		config.Info.Flags |= unix.LO_FLAGS_READ_ONLY
	}
	for {
		n, err := unix.IoctlRetInt(int(control.Fd()), unix.LOOP_CTL_GET_FREE)
		if err != nil {
			return Loop{}, fmt.Errorf("find a free loop device: %w", err)
		}
		l := Loop{Device: fmt.Sprintf("/dev/loop%d", n), ReadOnly: readOnly}
		device, err := os.OpenFile(l.Device, os.O_RDWR, 0)
		if err != nil {
			return Loop{}, err
		}
		err = unix.IoctlLoopConfigure(int(device.Fd()), &config)
		device.Close()
		if errors.Is(err, unix.EBUSY) {
			continue // another process has taken it
		}
		if err != nil {
			return Loop{}, fmt.Errorf("attach %s to %s: %w", image, l.Device, err)
		}
		return l, nil
	}
}

// blockSize of loop devices. Left to the kernel it is 512 bytes, until the image's file system asks for more, as xfs does from the first
// reflink on, and what was formatted for smaller blocks can't be mounted any more.
const blockSize = 4096

// Tie makes a loop device that is mounted go with its last mount, whoever unmounts that. Another block device stays as it is.
func Tie(device string) error { return autoclear(device, unix.LO_FLAGS_AUTOCLEAR) }

// keep takes back what Tie, or Release of a device that was busy, has said.
func keep(device string) error { return autoclear(device, 0) }

func autoclear(device string, flag uint32) error {
	err := withLoop(device, func(fd int) error {
		info, err := unix.IoctlLoopGetStatus64(fd)
		if err != nil || info.Flags&unix.LO_FLAGS_AUTOCLEAR == flag {
			return err
		}
		info.Flags ^= unix.LO_FLAGS_AUTOCLEAR
		return unix.IoctlLoopSetStatus64(fd, info)
	})
	if errors.Is(err, unix.ENOTTY) || errors.Is(err, unix.EINVAL) {
		return nil // no loop device
	}
	return err
}

// Release detaches a loop device; one that is still open is detached by the kernel when it is closed.
func Release(l Loop) error {
	err := withLoop(l.Device, func(fd int) error { return unix.IoctlSetInt(fd, unix.LOOP_CLR_FD, 0) })
	if errors.Is(err, unix.ENXIO) {
		return nil // it was detached already
	}
	return err
}

// ReleaseUnused detaches those that are neither mounted nor bound.
func ReleaseUnused(loops []Loop) error {
	for _, l := range loops {
		uses, err := Uses(l.Device)
		if err == nil && len(uses) == 0 {
			err = Release(l)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// Resized tells a loop device that its image has grown.
func Resized(l Loop) error {
	return withLoop(l.Device, func(fd int) error { return unix.IoctlSetInt(fd, unix.LOOP_SET_CAPACITY, 0) })
}

func withLoop(device string, do func(fd int) error) error {
	f, err := os.Open(device)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := do(int(f.Fd())); err != nil {
		return fmt.Errorf("%s: %w", device, err)
	}
	return nil
}

// Loops returns the loop devices over an image, by the file and not by what it was called.
func Loops(image string) ([]Loop, error) {
	var want unix.Stat_t
	if err := unix.Stat(image, &want); err != nil {
		return nil, &fs.PathError{Op: "stat", Path: image, Err: err}
	}
	attached, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	if err != nil {
		return nil, err
	}
	var all []Loop
	for _, path := range attached {
		device := filepath.Join("/dev", filepath.Base(filepath.Dir(filepath.Dir(path))))
		err := withLoop(device, func(fd int) error {
			info, err := unix.IoctlLoopGetStatus64(fd)
			same := info != nil && info.Device == want.Dev && info.Inode == want.Ino
			if want.Mode&unix.S_IFMT == unix.S_IFBLK {
				same = info != nil && info.Rdevice == want.Rdev
			}
			if err == nil && same {
				all = append(all, Loop{Device: device, ReadOnly: info.Flags&unix.LO_FLAGS_READ_ONLY != 0})
			}
			return err
		})
		if err != nil && !errors.Is(err, unix.ENXIO) && !errors.Is(err, fs.ErrNotExist) {
			return nil, err
		}
	}
	return all, nil
}
