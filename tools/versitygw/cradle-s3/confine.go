package main

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// capabilities are those over files: whoever has a grant for a volume has all that is in it.
var capabilities = []int{unix.CAP_DAC_OVERRIDE, unix.CAP_DAC_READ_SEARCH, unix.CAP_FOWNER}

// confine turns this process into one that has only the directory, and executes the program anew.
func (c config) confine() error {
	if err := c.enterRoot(); err != nil {
		return err
	}
	if err := c.dropPrivileges(); err != nil {
		return err
	}
	err := unix.Exec("/proc/self/exe", []string{"cradle-s3", confined}, []string{"GOMEMLIMIT=256MiB", "PATH=/"})
	return fmt.Errorf("execute again: %w", err)
}

func (c config) enterRoot() error {
	mount := func(what, source, target, fsType string, flags uintptr, data string) error {
		if err := unix.Mount(source, target, fsType, flags, data); err != nil {
			return fmt.Errorf("mount %s: %w", what, err)
		}
		return nil
	}
	const flags = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC
	if err := mount("private", "", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return err
	}
	if err := mount("new root", "cradle-s3", c.Mount, "tmpfs", flags, "mode=755,size=1m,nr_inodes=1k"); err != nil {
		return err
	}
	if err := os.Chdir(c.Mount); err != nil {
		return err
	}
	for _, dir := range []string{"proc", "run", "tmp", "volumes", "volumes/.vgwlocks", "volumes/" + c.Bucket} {
		if err := os.Mkdir(dir, 0o755); err != nil {
			return fmt.Errorf("new root: %w", err)
		}
	}
	for target, source := range map[string]string{"run": c.Run, "volumes/" + c.Bucket: c.Root} {
		if err := mount(source, source, target, "", unix.MS_BIND, ""); err != nil {
			return err
		}
		if err := mount(source, "", target, "", unix.MS_BIND|unix.MS_REMOUNT|flags, ""); err != nil {
			return err
		}
	}
	owner := fmt.Sprintf("mode=700,uid=%d,gid=%d,", c.UID, c.GID)
	for target, size := range map[string]string{"volumes/.vgwlocks": "size=4m,nr_inodes=64k", "tmp": "size=1m,nr_inodes=1k"} {
		if err := mount(target, "cradle-s3", target, "tmpfs", flags, owner+size); err != nil {
			return err
		}
	}
	if err := mount("proc", "proc", "proc", "proc", unix.MS_RDONLY|unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "subset=pid"); err != nil {
		return err
	}
	switch err := unix.PivotRoot(".", "."); {
	case err == nil:
		// The old root lies on the new one's place now (pivot_root(2), NOTES).
		if err := unix.Unmount(".", unix.MNT_DETACH); err != nil {
			return fmt.Errorf("unmount old root: %w", err)
		}
	case errors.Is(err, unix.EINVAL):
		// The host has its root in the initial RAM file system, which stays below all others. Nothing leads there: the capability to change the root is dropped.
		if err := mount("new root over the old one", ".", "/", "", unix.MS_MOVE, ""); err != nil {
			return err
		}
		if err := unix.Chroot("."); err != nil {
			return fmt.Errorf("change root: %w", err)
		}
	default:
		return fmt.Errorf("pivot root: %w", err)
	}
	if err := os.Chdir("/"); err != nil {
		return err
	}
	// No bucket can be made beside the volume.
	return mount("root read-only", "", "/", "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY|flags, "")
}

func (c config) dropPrivileges() error {
	var kept [2]uint32
	for _, n := range capabilities {
		kept[n/32] |= 1 << (n % 32)
	}
	for n := 0; ; n++ {
		if n < 64 && kept[n/32]&(1<<(n%32)) != 0 {
			continue
		}
		err := unix.Prctl(unix.PR_CAPBSET_DROP, uintptr(n), 0, 0, 0)
		if errors.Is(err, unix.EINVAL) {
			break // behind the kernel's last capability
		}
		if err != nil {
			return fmt.Errorf("drop capability %d: %w", n, err)
		}
	}
	if err := unix.Prctl(unix.PR_SET_KEEPCAPS, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("keep capabilities: %w", err)
	}
	// Directly: this thread alone becomes the program.
	if _, _, errno := unix.RawSyscall(unix.SYS_SETGROUPS, 0, 0, 0); errno != 0 {
		return fmt.Errorf("set groups: %w", errno)
	}
	if _, _, errno := unix.RawSyscall(unix.SYS_SETRESGID, uintptr(c.GID), uintptr(c.GID), uintptr(c.GID)); errno != 0 {
		return fmt.Errorf("set group %d: %w", c.GID, errno)
	}
	if _, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, uintptr(c.UID), uintptr(c.UID), uintptr(c.UID)); errno != 0 {
		return fmt.Errorf("set user %d: %w", c.UID, errno)
	}
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	for i := range data {
		data[i] = unix.CapUserData{Effective: kept[i], Permitted: kept[i], Inheritable: kept[i]}
	}
	if err := unix.Capset(&header, &data[0]); err != nil {
		return fmt.Errorf("set capabilities: %w", err)
	}
	for _, n := range capabilities {
		if err := unix.Prctl(unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_RAISE, uintptr(n), 0, 0); err != nil {
			return fmt.Errorf("keep capability %d: %w", n, err)
		}
	}
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("set no_new_privs: %w", err)
	}
	return nil
}
