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
	var there Loop
	err := EachLoop(image, func(l Loop) error {
		if there != (Loop{}) || l.ReadOnly != readOnly {
			return nil
		}
		there = l
		return keep(l.Device)
	})
	if err != nil || there != (Loop{}) {
		return there, err
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

// ReleaseUnused detaches those of an image that are neither mounted nor bound.
func ReleaseUnused(image string) error {
	return EachLoop(image, func(l Loop) error {
		uses, err := Uses(l.Device)
		if err == nil && len(uses) == 0 {
			err = Release(l)
		}
		return err
	})
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

// Loops returns the loop devices over an image.
func Loops(image string) (all []Loop, err error) {
	err = EachLoop(image, func(l Loop) error {
		all = append(all, l)
		return nil
	})
	return all, err
}

// EachLoop calls do for the loop devices over an image, by the file and not by what it was called. Each is open meanwhile and stays the image's: one that
// is detached can be another image's at once.
func EachLoop(image string, do func(Loop) error) error {
	var of unix.Stat_t
	if err := unix.Stat(image, &of); err != nil {
		return &fs.PathError{Op: "stat", Path: image, Err: err}
	}
	attached, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	if err != nil {
		return err
	}
	for _, path := range attached {
		device := filepath.Join("/dev", filepath.Base(filepath.Dir(filepath.Dir(path))))
		f, err := os.Open(device)
		if errors.Is(err, unix.ENXIO) || errors.Is(err, fs.ErrNotExist) {
			continue // detached meanwhile
		}
		if err != nil {
			return err
		}
		l, over, err := look(f, &of)
		if err == nil && over {
			err = do(l)
		}
		f.Close()
		if err != nil {
			return err
		}
	}
	return nil
}

// look says what a loop device is, and whether it is one over an image.
func look(f *os.File, image *unix.Stat_t) (l Loop, over bool, err error) {
	info, err := unix.IoctlLoopGetStatus64(int(f.Fd()))
	if errors.Is(err, unix.ENXIO) {
		return Loop{}, false, nil // detached meanwhile
	}
	if err != nil {
		return Loop{}, false, fmt.Errorf("%s: %w", f.Name(), err)
	}
	over = info.Device == image.Dev && info.Inode == image.Ino
	if image.Mode&unix.S_IFMT == unix.S_IFBLK {
		over = info.Rdevice == image.Rdev
	}
	return Loop{Device: f.Name(), ReadOnly: info.Flags&unix.LO_FLAGS_READ_ONLY != 0}, over, nil
}
