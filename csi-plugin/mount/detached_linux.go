package mount

import (
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// Detached opens the root directory of a file system that nobody else sees: it is mounted nowhere, and gone when what is returned is closed, or this process
// has ended. It is writable whatever readOnly says, since one can't be mounted in two ways at once; through what is returned nothing is written then.
func Detached(device, fsType string, readOnly bool) (*os.Root, error) {
	failed := func(err error) error { return fmt.Errorf("mount %s of %s: %w", fsType, device, err) }
	fs, err := unix.Fsopen(fsType, unix.FSOPEN_CLOEXEC)
	if err != nil {
		return nil, failed(err)
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
		return nil, failed(err)
	}
	attributes := unix.MOUNT_ATTR_NODEV | unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NOEXEC | unix.MOUNT_ATTR_NOATIME
	if readOnly {
		attributes |= unix.MOUNT_ATTR_RDONLY
	}
	fd, err := unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, attributes)
	if err != nil {
		return nil, failed(err)
	}
	defer unix.Close(fd)
	root, err := os.OpenRoot(fmt.Sprintf("/proc/self/fd/%d", fd))
	if err == nil && fsType != ZFS {
		if err = Tie(device); err != nil {
			root.Close()
		}
	}
	return root, err
}

// Still is Detached for a directory: through what is returned nothing is written.
func Still(directory string) (*os.Root, error) {
	fd, err := unix.OpenTree(unix.AT_FDCWD, directory, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("open %s as a mount: %w", directory, err)
	}
	defer unix.Close(fd)
	attributes := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY | unix.MOUNT_ATTR_NODEV | unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NOEXEC | unix.MOUNT_ATTR_NOATIME, Attr_clr: unix.MOUNT_ATTR__ATIME}
	if err := unix.MountSetattr(fd, "", unix.AT_EMPTY_PATH, &attributes); err != nil {
		return nil, fmt.Errorf("open %s read-only: %w", directory, err)
	}
	return os.OpenRoot(fmt.Sprintf("/proc/self/fd/%d", fd))
}
