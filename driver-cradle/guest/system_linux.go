package guest

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/cradlestack/cradlestack/driver-cradle/wire"
)

// Where the agent keeps what it mounts. It is in its own mount namespace: a container never sees these paths.
const (
	runDir     = "/run/cradle"
	cgroupRoot = "/sys/fs/cgroup"
)

// leaveRootfs puts a bind mount of the initramfs over itself: the root of a mount namespace can't be pivoted away from, what is
// mounted on it can.
func leaveRootfs() error {
	if err := os.MkdirAll("/root", 0o700); err != nil {
		return err
	}
	if err := mount("/", "/root", "", unix.MS_BIND, ""); err != nil {
		return err
	}
	if err := unix.Chdir("/root"); err != nil {
		return fmt.Errorf("enter /root: %w", err)
	}
	if err := mount(".", "/", "", unix.MS_MOVE, ""); err != nil {
		return err
	}
	if err := unix.Chroot("."); err != nil {
		return fmt.Errorf("chroot: %w", err)
	}
	return unix.Chdir("/")
}

// mountSystem mounts the file systems that the agent itself needs.
func mountSystem() error {
	for _, m := range []struct {
		target, fstype string
		flags          uintptr
		data           string
	}{
		{"/proc", "proc", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC, ""},
		{"/sys", "sysfs", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC, ""},
		{"/dev", "devtmpfs", unix.MS_NOSUID, "mode=0755"},
		{"/run", "tmpfs", unix.MS_NOSUID | unix.MS_NODEV, "mode=0755"},
		{cgroupRoot, "cgroup2", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC, ""},
	} {
		if err := os.MkdirAll(m.target, 0o755); err != nil {
			return err
		}
		err := mount(m.fstype, m.target, m.fstype, m.flags, m.data)
		if err != nil && !errors.Is(err, unix.EBUSY) { // the kernel may have mounted /dev
			return err
		}
	}
	return os.MkdirAll(inside, 0o700)
}

// podCgroup holds every container; the agent stays outside, so that no limit of the pod touches it.
const podCgroup = cgroupRoot + "/pod"

// controllers that limits or statistics of containers need. Each one more costs time at every boot.
var controllers = []string{"cpuset", "cpu", "io", "memory", "pids"}

// makePodCgroup makes the pod's cgroup and turns the controllers on.
func makePodCgroup() error {
	have, err := os.ReadFile(cgroupRoot + "/cgroup.controllers")
	if err != nil {
		return err
	}
	var on []string
	for _, c := range strings.Fields(string(have)) {
		if slices.Contains(controllers, c) {
			on = append(on, "+"+c)
		}
	}
	if err := os.Mkdir(podCgroup, 0o755); err != nil {
		return err
	}
	for _, dir := range []string{cgroupRoot, podCgroup} {
		if err := writeFile(dir+"/cgroup.subtree_control", strings.Join(on, " ")); err != nil {
			return err
		}
	}
	return nil
}

// writeFile writes to a file of the kernel's.
func writeFile(path, value string) error {
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := f.WriteString(value); err != nil {
		return fmt.Errorf("write %q to %s: %w", value, path, errors.Unwrap(err))
	}
	return nil
}

// setSysctl writes one kernel parameter, its name with dots or slashes as sysctl(8) takes it.
func setSysctl(name, value string) error {
	if !strings.Contains(name, "/") {
		name = strings.ReplaceAll(name, ".", "/")
	}
	path := filepath.Join("/proc/sys", filepath.Clean("/"+name))
	return writeFile(path, value)
}

// tuneKernel sets what docker sets, or what a host's distribution would have set, for all containers.
func tuneKernel() {
	for _, s := range [][2]string{
		{"net/ipv4/ip_unprivileged_port_start", "0"},  // moby daemon/oci_linux.go
		{"net/ipv4/ping_group_range", "0 2147483647"}, // likewise
		{"kernel/pid_max", "4194304"},                 // systemd's default
		{"vm/max_map_count", "262144"},                // what databases ask their hosts for
		{"fs/inotify/max_user_instances", "1024"},     // the kernel's 128 is per user of all containers
		{"net/ipv6/conf/default/accept_ra", "0"},      // addresses come from the host only
		{"net/ipv6/conf/default/accept_dad", "0"},     // and were checked there
		{"net/ipv4/conf/default/arp_notify", "1"},     // a restored pod has another MAC
		{"kernel/core_pattern", "core"},               // no helper program exists
		{"kernel/randomize_va_space", "2"},            //
		{"net/core/somaxconn", "4096"},                //
		{"fs/protected_hardlinks", "1"},               // as Debian
		{"fs/protected_symlinks", "1"},                // as Debian
	} {
		_ = setSysctl(s[0], s[1]) // a kernel without it is good enough
	}
}

// becomeIndividual sets clock and random state to what the host says.
func becomeIndividual(b *wire.Birth) error {
	tv := unix.NsecToTimeval(b.Time.UnixNano())
	if err := unix.Settimeofday(&tv); err != nil {
		return fmt.Errorf("set the clock: %w", err)
	}
	fd, err := unix.Open("/dev/urandom", unix.O_WRONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return &os.PathError{Op: "open", Path: "/dev/urandom", Err: err}
	}
	defer unix.Close(fd)
	// struct rand_pool_info of linux/random.h
	info := struct {
		bits, size int32
		pool       [len(b.Entropy)]byte
	}{int32(8 * len(b.Entropy)), int32(len(b.Entropy)), b.Entropy}
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.RNDADDENTROPY, uintptr(unsafe.Pointer(&info))); errno != 0 {
		return fmt.Errorf("add entropy: %w", errno)
	}
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), rndReseedCRNG, 0); errno != 0 {
		return fmt.Errorf("reseed the random generator: %w", errno)
	}
	return nil
}

// rndReseedCRNG is RNDRESEEDCRNG of linux/random.h, _IO('R', 0x07).
const rndReseedCRNG = 0x5207

func ioctl(f *os.File, request uintptr, arg unsafe.Pointer) error {
	rc, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var errno unix.Errno
	if err := rc.Control(func(fd uintptr) { _, _, errno = unix.Syscall(unix.SYS_IOCTL, fd, request, uintptr(arg)) }); err != nil {
		return err
	}
	if errno != 0 {
		return errno
	}
	return nil
}
