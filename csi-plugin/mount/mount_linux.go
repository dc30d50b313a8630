package mount

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"github.com/cradlestack/cradlestack/spec"
)

// Is says whether something is mounted at path. A path that is not there is no mount. What is mounted is not asked: it may not answer.
func Is(path string) (bool, error) {
	at, err := At(path)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	return at != nil, err
}

// dead says whether an error is what a FUSE file system gives whose program has ended, or has lost its cluster: nothing but a mount does.
func dead(err error) bool {
	return errors.Is(err, unix.ENOTCONN) || errors.Is(err, unix.ECONNABORTED) || errors.Is(err, unix.ESHUTDOWN)
}

// Unseen says whether what is mounted in a directory stays in this process's mount namespace while its parent has another: a sandbox whose directories
// are not shared with the host, or a container. Pods would write below the mount.
func Unseen(dir string) (bool, error) {
	own, err := os.Readlink("/proc/self/ns/mnt")
	if err != nil {
		return false, err
	}
	if parent := os.Getppid(); parent > 0 { // else it is outside of this process namespace, as a container's is, with other mounts
		outside, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/mnt", parent))
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, fs.ErrPermission) { // one that has ended, or a container with few capabilities
			return false, nil
		}
		if err != nil || outside == own {
			return false, err
		}
	}
	if dir, err = filepath.EvalSymlinks(dir); err != nil {
		return false, err
	}
	on, err := under(dir)
	if err != nil {
		return false, err
	}
	return !strings.Contains(on.Optional, "shared:"), nil
}

// At returns what is mounted at path, the uppermost; nil where nothing is.
func At(path string) (*mountinfo.Info, error) {
	path, err := resolve(path)
	if err != nil {
		return nil, err
	}
	found, err := mountinfo.GetMounts(mountinfo.SingleEntryFilter(path))
	if err != nil || len(found) == 0 {
		return nil, err
	}
	return found[len(found)-1], nil
}

// resolve follows the symbolic links on the way to path, as the mount table does.
func resolve(path string) (string, error) {
	dir, err := filepath.EvalSymlinks(filepath.Dir(path))
	if errors.Is(err, fs.ErrNotExist) {
		return path, nil
	}
	return filepath.Join(dir, filepath.Base(path)), err
}

// ZFS is the type of a file system that has no block device: a dataset is named in its place.
const ZFS = "zfs"

// Filesystem mounts the file system of a block device, and Ties that to it. No set-user-id program and no device node on it counts.
func Filesystem(device, target, fsType string, o Options) error {
	data := o.data
	if fsType == "xfs" {
		data = append(slices.Clone(data), "nouuid") // a clone has its origin's uuid
	}
	if err := unix.Mount(device, target, fsType, o.flags|unix.MS_NODEV|unix.MS_NOSUID, strings.Join(data, ",")); err != nil {
		return fmt.Errorf("mount %s of %s on %s: %w", fsType, device, target, err)
	}
	if o.flags&unix.MS_RDONLY == 0 {
		dropLostFound(target)
	}
	if fsType == ZFS {
		return nil
	}
	return Tie(device)
}

// ErrOccupied is a path at which something else is mounted.
var ErrOccupied = errors.New("something else is mounted there")

// Place makes a block device's file system, or a directory where there is no device, appear at path, which may be there already. The file
// system is mounted writable, whatever o says: one can't be mounted in two ways at once, and who may only read it gets that from
// a Bind. It fills its device. path is made.
func Place(ctx context.Context, device, directory, fsType, path string, o Options) error {
	if err := os.MkdirAll(path, 0o750); err != nil {
		return err
	}
	o.flags &^= unix.MS_RDONLY
	at, err := At(path)
	switch {
	case err != nil:
	case at != nil:
		var same bool
		if fsType == ZFS {
			same = at.FSType == ZFS && at.Source == device
		} else {
			same, err = is(at, device, directory)
		}
		if err == nil && !same {
			err = fmt.Errorf("%s: %w: %s", path, ErrOccupied, at.Source)
		}
		if err == nil && device != "" && fsType != ZFS {
			err = Tie(device)
		}
	case device != "":
		err = Filesystem(device, path, fsType, o)
	default:
		err = Bind(directory, path, o)
	}
	if err != nil || device == "" || fsType == ZFS {
		return err
	}
	return fill(ctx, device, path, fsType)
}

// dropLostFound removes mkfs's directory from an otherwise empty file system: programs want a new volume to be empty (initdb), and
// fsck makes another when it needs one.
func dropLostFound(dir string) {
	if entries, err := os.ReadDir(dir); err == nil && len(entries) == 1 && entries[0].Name() == "lost+found" {
		os.Remove(filepath.Join(dir, "lost+found"))
	}
}

// Bind makes the directory at source appear at target as well, with o's flags for the mount; the file system's are its own.
func Bind(source, target string, o Options) error {
	if err := unix.Mount(source, target, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("bind %s on %s: %w", source, target, err)
	}
	flags := o.flags&bindFlags | unix.MS_NODEV | unix.MS_NOSUID
	if err := unix.Mount("", target, "", unix.MS_BIND|unix.MS_REMOUNT|flags, ""); err != nil {
		err = fmt.Errorf("bind %s on %s: set its options: %w", source, target, err)
		return errors.Join(err, unix.Unmount(target, unix.MNT_DETACH))
	}
	return nil
}

// BindDevice makes the block device appear at the file target.
func BindDevice(device, target string) error {
	if err := unix.Mount(device, target, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("bind %s on %s: %w", device, target, err)
	}
	return nil
}

const emptySource = "cradle-direct"

// Empty mounts a file system on target that holds nothing and takes nothing.
func Empty(target string) error {
	const flags = unix.MS_RDONLY | unix.MS_NODEV | unix.MS_NOSUID | unix.MS_NOEXEC
	if err := unix.Mount(emptySource, target, "tmpfs", flags, "size=4k,mode=0555"); err != nil {
		return fmt.Errorf("mount an empty tmpfs on %s: %w", target, err)
	}
	return nil
}

// Unmount removes all that is mounted at target; nothing is no error. What is busy is an error that wraps EBUSY. What was written is on the
// device then, also where a mount namespace that was copied from this host's keeps the file system mounted.
func Unmount(target string) error {
	at, err := At(target)
	if err == nil && at != nil && !strings.HasPrefix(at.FSType, "fuse") && !IsNFS(at) { // which have no such thing, or no device, and may not answer
		if err := Sync(target); err != nil && !dead(err) {
			return err
		}
	}
	return unmount(target, 0)
}

// Detach is Unmount, and takes a mount that is busy out of the tree as well: whoever holds files in it keeps them.
func Detach(target string) error { return unmount(target, unix.MNT_DETACH) }

func unmount(target string, busy int) error {
	for {
		mounted, err := Is(target)
		if err != nil {
			return fmt.Errorf("unmount %s: %w", target, err)
		}
		if !mounted {
			return nil
		}
		err = unix.Unmount(target, unix.UMOUNT_NOFOLLOW)
		if errors.Is(err, unix.EBUSY) && busy != 0 {
			err = unix.Unmount(target, unix.UMOUNT_NOFOLLOW|busy)
		}
		if err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) { // somebody else was faster
			return fmt.Errorf("unmount %s: %w", target, err)
		}
	}
}

// Placed says whether a mount can be one of those that Place, Bind, BindDevice and Empty make: of the file system of a volume, or of a part of one.
func Placed(at *mountinfo.Info) bool {
	switch at.FSType {
	case "ext4", "xfs", ZFS, "ceph", "nfs", "nfs4":
		return true
	case "tmpfs":
		return at.Root != "/" || at.Source == emptySource
	}
	return at.Root != "/" || strings.HasPrefix(at.FSType, "fuse")
}

// Uses says where the file system of a block device is mounted, or its node bound to.
func Uses(device string) ([]string, error) {
	node, err := filepath.Rel("/dev", device)
	if err != nil {
		return nil, err
	}
	on, err := isOn(device)
	if err != nil {
		return nil, err
	}
	return where(func(m *mountinfo.Info) bool { return on(m) || m.FSType == "devtmpfs" && m.Root == "/"+node })
}

// Points says where the file system of a block device is mounted.
func Points(device string) ([]string, error) {
	on, err := isOn(device)
	if err != nil {
		return nil, err
	}
	return where(on)
}

func isOn(device string) (func(*mountinfo.Info) bool, error) {
	var st unix.Stat_t
	if err := unix.Stat(device, &st); err != nil {
		return nil, &fs.PathError{Op: "stat", Path: device, Err: err}
	}
	major, minor := int(unix.Major(st.Rdev)), int(unix.Minor(st.Rdev))
	return func(m *mountinfo.Info) bool { return m.Major == major && m.Minor == minor }, nil
}

// UsesOf says where a directory is bound to. It is given by its path on this host.
func UsesOf(dir string) ([]string, error) {
	dir, err := filepath.EvalSymlinks(dir)
	if err != nil {
		return nil, err
	}
	on, err := under(dir)
	if err != nil {
		return nil, err
	}
	rest, err := filepath.Rel(on.Mountpoint, dir)
	if err != nil {
		return nil, err
	}
	root := filepath.Join(on.Root, rest)
	return where(func(m *mountinfo.Info) bool {
		return m.Major == on.Major && m.Minor == on.Minor && (m.Root == root || strings.HasPrefix(m.Root, root+"/"))
	})
}

// under is the mount that a directory lies on.
func under(dir string) (on *mountinfo.Info, err error) {
	all, err := mountinfo.GetMounts(nil)
	if err != nil {
		return nil, err
	}
	for _, m := range all {
		if (dir == m.Mountpoint || strings.HasPrefix(dir, strings.TrimSuffix(m.Mountpoint, "/")+"/")) && (on == nil || len(m.Mountpoint) >= len(on.Mountpoint)) {
			on = m
		}
	}
	if on == nil {
		return nil, fmt.Errorf("%s is on none of this host's mounts", dir)
	}
	return on, nil
}

func where(matches func(*mountinfo.Info) bool) ([]string, error) {
	found, err := mountinfo.GetMounts(func(m *mountinfo.Info) (skip, stop bool) { return !matches(m), false })
	if err != nil {
		return nil, err
	}
	targets := make([]string, len(found))
	for i, m := range found {
		targets[i] = m.Mountpoint
	}
	return targets, nil
}

// Stats are statfs(2)'s of a mounted file system.
func Stats(path string) (spec.VolumeStats, error) {
	var s unix.Statfs_t
	if err := unix.Statfs(path, &s); err != nil {
		return spec.VolumeStats{}, &fs.PathError{Op: "statfs", Path: path, Err: err}
	}
	size := func(blocks uint64) spec.Bytes { return spec.Bytes(blocks * uint64(s.Bsize)) }
	return spec.VolumeStats{
		Total: size(s.Blocks), Used: size(s.Blocks - s.Bfree), Available: size(s.Bavail),
		Inodes: s.Files, InodesUsed: s.Files - s.Ffree, InodesAvailable: s.Ffree,
	}, nil
}

// Boot is another one after each boot of this host: what it had mounted is gone then.
func Boot() (string, error) {
	id, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return strings.TrimSpace(string(id)), err
}

// Options of a mount that a caller chose.
type Options struct {
	flags uintptr
	data  []string
}

// ReadOnly is o and read-only.
func (o Options) ReadOnly() Options {
	o.flags |= unix.MS_RDONLY
	return o
}

// IsReadOnly says whether o wishes to read only.
func (o Options) IsReadOnly() bool { return o.flags&unix.MS_RDONLY != 0 }

// bindFlags are those that each mount of one file system has for itself.
const bindFlags = unix.MS_RDONLY | unix.MS_NOEXEC | unix.MS_NOATIME | unix.MS_NODIRATIME | unix.MS_RELATIME

// ParseOptions takes the options that can do no harm, whoever asks for them, and names the first other one.
func ParseOptions(names []string) (o Options, unknown string) {
	for _, name := range names {
		flag, ok := options[name]
		switch {
		case ok:
			o.flags |= flag
		case name == "discard":
			o.data = append(o.data, name)
		default:
			return o, name
		}
	}
	return o, ""
}

var options = map[string]uintptr{
	"rw": 0, "defaults": 0, "nodev": 0, "nosuid": 0, // the last two are always set
	"ro": unix.MS_RDONLY, "noexec": unix.MS_NOEXEC, "noatime": unix.MS_NOATIME, "nodiratime": unix.MS_NODIRATIME,
	"relatime": unix.MS_RELATIME, "lazytime": unix.MS_LAZYTIME, "sync": unix.MS_SYNCHRONOUS, "dirsync": unix.MS_DIRSYNC,
}

// OptionsOf are those of a bind mount, for another one in its place.
func OptionsOf(m *mountinfo.Info) (o Options) {
	for name := range strings.SplitSeq(m.Options, ",") {
		o.flags |= options[name] & bindFlags
	}
	return o
}

// Freeze makes the file system that is mounted at path consistent on its device, and whoever writes to it wait until Thaw. It outlasts
// this process.
func Freeze(path string) error { return freezer(path, fiFreeze) }

// Thaw ends Freeze, and says whether there was something to end.
func Thaw(path string) (thawed bool, err error) {
	err = freezer(path, fiThaw)
	if errors.Is(err, unix.EINVAL) {
		return false, nil
	}
	return err == nil, err
}

// linux/fs.h FIFREEZE, FITHAW: _IOWR('X', 119, int), _IOWR('X', 120, int).
const (
	fiFreeze = 0xc0045877
	fiThaw   = 0xc0045878
)

func freezer(path string, request uint) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := unix.IoctlSetInt(int(f.Fd()), request, 0); err != nil {
		verb := "freeze"
		if request == fiThaw {
			verb = "thaw"
		}
		return fmt.Errorf("%s the file system at %s: %w", verb, path, err)
	}
	return nil
}

// Sync writes out what the file system that is mounted at path has in memory.
func Sync(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	return syncOf(f)
}

// SyncRoot is Sync for what is opened.
func SyncRoot(root *os.Root) error {
	f, err := root.Open(".")
	if err != nil {
		return err
	}
	return syncOf(f)
}

func syncOf(f *os.File) error {
	defer f.Close()
	if err := unix.Syncfs(int(f.Fd())); err != nil {
		return fmt.Errorf("sync the file system at %s: %w", f.Name(), err)
	}
	return nil
}

// is says whether a mount is of the block device, or of the directory where there is none.
func is(m *mountinfo.Info, device, directory string) (bool, error) {
	path := device
	if device == "" {
		path = directory
	}
	var st, at unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return false, &fs.PathError{Op: "stat", Path: path, Err: err}
	}
	if device != "" {
		return m.Major == int(unix.Major(st.Rdev)) && m.Minor == int(unix.Minor(st.Rdev)), nil
	}
	if err := unix.Stat(m.Mountpoint, &at); err != nil {
		return false, &fs.PathError{Op: "stat", Path: m.Mountpoint, Err: err}
	}
	return st.Dev == at.Dev && st.Ino == at.Ino, nil
}

// SameDevice says whether two nodes are of one device.
func SameDevice(a, b string) (bool, error) {
	var sa, sb unix.Stat_t
	if err := unix.Stat(a, &sa); err != nil {
		return false, &fs.PathError{Op: "stat", Path: a, Err: err}
	}
	if err := unix.Stat(b, &sb); err != nil {
		return false, &fs.PathError{Op: "stat", Path: b, Err: err}
	}
	return sa.Rdev == sb.Rdev && sa.Mode&unix.S_IFMT == sb.Mode&unix.S_IFMT, nil
}

// IsReadOnly says whether nothing can be written through a mount.
func IsReadOnly(m *mountinfo.Info) bool {
	return slices.Contains(strings.Split(m.Options, ","), "ro")
}

// Below says what is mounted at paths that contain each of the texts, the innermost first.
func Below(texts ...string) ([]string, error) {
	targets, err := where(func(m *mountinfo.Info) bool {
		return !slices.ContainsFunc(texts, func(text string) bool { return !strings.Contains(m.Mountpoint+"/", text) })
	})
	slices.Reverse(targets)
	return targets, err
}

// OfDataset says where a ZFS file system is mounted.
func OfDataset(dataset string) ([]string, error) {
	return where(func(m *mountinfo.Info) bool { return m.FSType == ZFS && m.Source == dataset })
}
