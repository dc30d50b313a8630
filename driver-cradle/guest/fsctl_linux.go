package guest

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/cradlestack/cradlestack/spec"
)

// Requests of linux/fs.h, fs/ext4/ext4.h and fs/xfs/libxfs/xfs_fs.h.
const (
	fiFreeze      = 0xc0045877 // FIFREEZE
	fiThaw        = 0xc0045878 // FITHAW
	ext4ResizeFS  = 0x40086610 // EXT4_IOC_RESIZE_FS, __u64 blocks
	xfsGeometry   = 0x80705864 // XFS_IOC_FSGEOMETRY_V1, struct xfs_fsop_geom_v1
	xfsGrowFSData = 0x4010586e // XFS_IOC_FSGROWFSDATA, struct xfs_growfs_data
)

// freeze makes a file system quiet and complete on disk, for as long as timeout says at most (0: until it is thawed).
func (v *volume) freeze(timeout time.Duration) error {
	_, err := v.fsctl("freeze", fiFreeze, true, timeout)
	return err
}

// thaw ends a freeze and says whether there was one.
func (v *volume) thaw() (bool, error) { return v.fsctl("thaw", fiThaw, false, 0) }

// fsctl freezes or thaws, and says whether the file system was frozen before.
func (v *volume) fsctl(what string, request uintptr, frozen bool, timeout time.Duration) (was bool, err error) {
	if v.spec.Block == nil || v.dev == "" {
		return false, &stateError{ErrInvalid, fmt.Sprintf("volume %s is no block volume: there is nothing to %s", v.spec.Name, what)}
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.expiry != nil {
		v.expiry.Stop()
		v.expiry = nil
	}
	was = v.frozen
	if was != frozen {
		f, err := os.Open(v.path)
		if err != nil {
			return was, err
		}
		defer f.Close()
		if err := ioctl(f, request, nil); err != nil {
			return was, fmt.Errorf("%s volume %s: %w", what, v.spec.Name, err)
		}
		v.frozen = frozen
	}
	if frozen && timeout > 0 {
		var expiry *time.Timer
		expiry = time.AfterFunc(timeout, func() { v.expire(expiry) })
		v.expiry = expiry
	}
	return was, nil
}

// expire thaws when the time of a freeze is over, unless another has begun.
func (v *volume) expire(expiry *time.Timer) {
	v.mu.Lock()
	current := v.expiry == expiry
	v.mu.Unlock()
	if current {
		_, _ = v.thaw() // a freeze of its own is not undone: that would have been another's time
	}
}

// usage is what statfs says of a volume that is mounted.
func (v *volume) usage() (spec.VolumeStats, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(v.path, &st); err != nil {
		return spec.VolumeStats{}, &os.PathError{Op: "statfs", Path: v.path, Err: err}
	}
	size := spec.Bytes(st.Frsize)
	return spec.VolumeStats{
		Total: spec.Bytes(st.Blocks) * size, Used: spec.Bytes(st.Blocks-st.Bfree) * size, Available: spec.Bytes(st.Bavail) * size,
		Inodes: st.Files, InodesUsed: st.Files - st.Ffree, InodesAvailable: st.Ffree,
	}, nil
}

// grow makes the file system as large as its disk has become.
func (v *volume) grow() error {
	if v.spec.Block == nil || v.dev == "" {
		return &stateError{ErrInvalid, fmt.Sprintf("volume %s is no block volume: there is nothing to grow", v.spec.Name)}
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.frozen { // it would wait for the thaw, and the thaw for it
		return &stateError{ErrConflict, fmt.Sprintf("volume %s is frozen: thaw it first", v.spec.Name)}
	}
	// The capacity-change event may still be under way: ask the disk now.
	rescan := filepath.Join("/sys/class/block", filepath.Base(v.dev), "device/rescan")
	if err := writeFile(rescan, "1"); err != nil {
		return fmt.Errorf("grow volume %s: %w", v.spec.Name, err)
	}
	kind, err := fsKindOf(v.dev)
	if err != nil {
		return err
	}
	size, err := deviceSize(v.dev)
	if err != nil {
		return err
	}
	f, err := os.Open(v.path)
	if err != nil {
		return err
	}
	defer f.Close()
	var st unix.Statfs_t
	if err := unix.Fstatfs(int(f.Fd()), &st); err != nil {
		return fmt.Errorf("grow volume %s: %w", v.spec.Name, err)
	}
	blocks := size / uint64(st.Bsize)
	switch kind {
	case "ext4":
		err = ioctl(f, ext4ResizeFS, unsafe.Pointer(&blocks))
	case "xfs":
		err = growXFS(f, blocks)
	default:
		err = errors.New("its file system is neither ext4 nor xfs")
	}
	if err != nil {
		return fmt.Errorf("grow volume %s: %w", v.spec.Name, err)
	}
	return nil
}

// growXFS grows a mounted xfs to so many blocks; the share of it that inodes may take stays.
func growXFS(f *os.File, blocks uint64) error {
	var geometry [112]byte
	if err := ioctl(f, xfsGeometry, unsafe.Pointer(&geometry[0])); err != nil {
		return fmt.Errorf("geometry: %w", err)
	}
	request := struct {
		blocks      uint64
		maxInodePct uint32
		_           uint32
	}{blocks: blocks, maxInodePct: binary.NativeEndian.Uint32(geometry[28:])}
	return ioctl(f, xfsGrowFSData, unsafe.Pointer(&request))
}

// deviceSize in bytes.
func deviceSize(dev string) (uint64, error) {
	f, err := os.Open(dev)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	var buf [8]byte
	if err := ioctl(f, unix.BLKGETSIZE64, unsafe.Pointer(&buf[0])); err != nil {
		return 0, &os.PathError{Op: "size of", Path: dev, Err: err}
	}
	return binary.NativeEndian.Uint64(buf[:]), nil
}
