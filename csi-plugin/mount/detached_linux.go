package mount

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// A Tree is a mount that is nowhere. It is used up by Root or Attach.
type Tree int

// Root opens its root directory. The mount is gone when that is closed, or this process has ended.
func (t Tree) Root() (*os.Root, error) {
	defer unix.Close(int(t))
	return os.OpenRoot(fmt.Sprintf("/proc/self/fd/%d", t))
}

// Attach mounts it at a path.
func (t Tree) Attach(path string) error {
	defer unix.Close(int(t))
	if err := unix.MoveMount(int(t), "", unix.AT_FDCWD, path, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		return fmt.Errorf("mount at %s: %w", path, err)
	}
	return nil
}

// Detached mounts a file system where nobody else sees it. It is writable whatever readOnly says, since one can't be mounted in two ways at once; through the
// mount nothing is written then.
func Detached(device, fsType string, readOnly bool) (Tree, error) {
	failed := func(err error) (Tree, error) { return -1, fmt.Errorf("mount %s of %s: %w", fsType, device, err) }
	fs, err := unix.Fsopen(fsType, unix.FSOPEN_CLOEXEC)
	if err != nil {
		return failed(err)
	}
	defer unix.Close(fs)
	err = unix.FsconfigSetString(fs, "source", device)
	if err == nil && fsType == "xfs" {
		err = unix.FsconfigSetFlag(fs, "nouuid") // a clone has its origin's uuid
	}
	if err == nil && fsType == ZFS && strings.Contains(device, "@") {
		err = unix.FsconfigSetFlag(fs, "ro") // as a snapshot is, if it is already mounted
	}
	if err == nil {
		err = unix.FsconfigCreate(fs)
	}
	if err != nil {
		return failed(err)
	}
	attributes := unix.MOUNT_ATTR_NODEV | unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NOEXEC | unix.MOUNT_ATTR_NOATIME
	if readOnly {
		attributes |= unix.MOUNT_ATTR_RDONLY
	}
	fd, err := unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, attributes)
	if err != nil {
		return failed(err)
	}
	if fsType != ZFS {
		if err := Tie(device); err != nil {
			return -1, errors.Join(err, unix.Close(fd))
		}
	}
	return Tree(fd), nil
}

// Still is Detached for a directory: through the mount nothing is written.
func Still(directory string) (Tree, error) {
	fd, err := unix.OpenTree(unix.AT_FDCWD, directory, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	if err != nil {
		return -1, fmt.Errorf("open %s as a mount: %w", directory, err)
	}
	attributes := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY | unix.MOUNT_ATTR_NODEV | unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NOEXEC | unix.MOUNT_ATTR_NOATIME, Attr_clr: unix.MOUNT_ATTR__ATIME}
	if err := unix.MountSetattr(fd, "", unix.AT_EMPTY_PATH, &attributes); err != nil {
		return -1, errors.Join(fmt.Errorf("open %s read-only: %w", directory, err), unix.Close(fd))
	}
	return Tree(fd), nil
}
