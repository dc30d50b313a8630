package launch

import (
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Root is a root file system in the making: a tmpfs that is mounted nowhere. It
// can only be reached through its handle and is gone with the process.
type Root struct {
	dir   *os.File
	flags int
	// Lower, if set, is a folder of the host below which the tmpfs takes the
	// writes.
	Lower string
	// LowerDir is the handle under which Lower was verified.
	LowerDir *os.File
}

// NewRoot makes an empty one. size is a tmpfs size ("2G", "80%"), empty the
// kernel's default of half the memory. setid and devices allow the image to
// have either.
func NewRoot(size string, setid, devices bool) (*Root, error) {
	r := &Root{flags: unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV}
	if setid {
		r.flags &^= unix.MOUNT_ATTR_NOSUID
	}
	if devices {
		r.flags &^= unix.MOUNT_ATTR_NODEV
	}
	options := map[string]string{"mode": "0755", "source": "bali"}
	if size != "" {
		options["size"] = size
	}
	var err error
	if r.dir, err = newMount("tmpfs", options, r.flags); err != nil {
		if errors.Is(err, unix.EPERM) {
			return nil, fmt.Errorf("%w: bali run needs root (CAP_SYS_ADMIN) for its mounts", err)
		}
		return nil, err
	}
	return r, nil
}

// Dir is the handle to unpack into.
func (r *Root) Dir() *os.File { return r.dir }

// newMount makes a detached mount.
func newMount(kind string, options map[string]string, flags int) (*os.File, error) {
	fs, err := unix.Fsopen(kind, unix.FSOPEN_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("mount %s: %w", kind, err)
	}
	defer unix.Close(fs)
	for k, v := range options {
		if err := unix.FsconfigSetString(fs, k, v); err != nil {
			return nil, fmt.Errorf("mount %s: option %s=%s: %w%s", kind, k, v, err, fsLog(fs))
		}
	}
	if err := unix.FsconfigCreate(fs); err != nil {
		return nil, fmt.Errorf("mount %s: %w%s", kind, err, fsLog(fs))
	}
	fd, err := unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, flags)
	if err != nil {
		return nil, fmt.Errorf("mount %s: %w", kind, err)
	}
	return os.NewFile(uintptr(fd), kind), nil
}

// fsLog is what the kernel says about a refused option.
func fsLog(fs int) string {
	buf := make([]byte, 4096)
	n, err := unix.Read(fs, buf)
	if err != nil || n <= 0 {
		return ""
	}
	return ": " + strings.TrimSpace(string(buf[:n]))
}

// tree is a detached copy of a part of the host's mounts.
type tree struct {
	*os.File
	dir     bool
	changed bool // it has options of its own
}

// clone copies what is mounted at and below a host path. Copies of shared
// mounts stay their peers: what is mounted on one appears on the other.
func clone(p string) (*tree, error) {
	fd, err := unix.OpenTree(unix.AT_FDCWD, p, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_RECURSIVE)
	if err != nil {
		return nil, err
	}
	t := &tree{File: os.NewFile(uintptr(fd), p)}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		t.Close()
		return nil, err
	}
	t.dir = st.Mode&unix.S_IFMT == unix.S_IFDIR
	return t, nil
}

func (t *tree) set(attr uint64, p Propagation) error {
	a := unix.MountAttr{Attr_set: attr}
	switch p {
	case Slave:
		a.Propagation = unix.MS_SLAVE
	case Private:
		a.Propagation = unix.MS_PRIVATE
	}
	if a == (unix.MountAttr{}) {
		return nil
	}
	t.changed = true
	return unix.MountSetattr(int(t.Fd()), "", unix.AT_EMPTY_PATH|unix.AT_RECURSIVE, &a)
}

// enter gives the calling thread, which must be locked, a mount namespace of
// its own. The host's mounts are copied by clone afterwards, still as peers;
// sever must come before anything is mounted by path.
func enter() error {
	if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
		return fmt.Errorf("new mount namespace: %w", err)
	}
	return nil
}

func sever() error {
	err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, "")
	if errors.Is(err, unix.EINVAL) {
		return errors.New("bali runs in a chroot whose root is no mount: mount --bind it onto itself before chroot")
	}
	if err != nil {
		return fmt.Errorf("make the mount namespace private: %w", err)
	}
	return nil
}

// mountRoot attaches the root over the namespace's own and, with Lower, puts
// the overlay there. It returns the handle of what becomes /.
func (r *Root) mountRoot() (*os.File, error) {
	over := func(f *os.File) error {
		return unix.MoveMount(int(f.Fd()), "", unix.AT_FDCWD, "/", unix.MOVE_MOUNT_F_EMPTY_PATH)
	}
	if err := over(r.dir); err != nil {
		return nil, fmt.Errorf("attach the image's root: %w", err)
	}
	if r.Lower == "" {
		return r.dir, nil
	}
	// in this namespace, or overlayfs won't have it
	lower, err := os.Open(r.Lower)
	if err != nil {
		return nil, err
	}
	defer lower.Close()
	if same, err := sameFile(lower, r.LowerDir); err != nil || !same {
		return nil, fmt.Errorf("%s is not the folder that was verified: %w", r.Lower, errors.Join(err, unix.ESTALE))
	}
	for _, d := range []string{"upper", "work"} {
		if err := unix.Mkdirat(int(r.dir.Fd()), d, 0o755); err != nil {
			return nil, err
		}
	}
	upper := fdPath(r.dir)
	merged, err := newMount("overlay", map[string]string{
		"lowerdir": fdPath(lower), "upperdir": upper + "/upper", "workdir": upper + "/work", "source": "bali",
	}, r.flags)
	if err != nil {
		return nil, err
	}
	if err := over(merged); err != nil {
		return nil, fmt.Errorf("attach the image's root: %w", err)
	}
	return merged, nil
}

func sameFile(a, b *os.File) (bool, error) {
	ai, err := a.Stat()
	if err != nil {
		return false, err
	}
	bi, err := b.Stat()
	return err == nil && os.SameFile(ai, bi), err
}

func fdPath(f *os.File) string { return "/proc/self/fd/" + strconv.Itoa(int(f.Fd())) }

// pivot makes root the thread's / and drops everything else.
func pivot(root *os.File) error {
	if err := unix.Fchdir(int(root.Fd())); err != nil {
		return err
	}
	if err := unix.PivotRoot(".", "."); err != nil {
		// in an initramfs or a chroot there is nothing to swap with
		if err := unix.Chroot("."); err != nil {
			return fmt.Errorf("change the root: %w", err)
		}
		return unix.Chdir("/")
	}
	// the old root now lies over the new one
	if err := unix.Unmount(".", unix.MNT_DETACH); err != nil {
		return fmt.Errorf("detach the host's root: %w", err)
	}
	return unix.Chdir("/")
}

// within opens a path below root as if root were /, symbolic links included.
func within(root *os.File, p string, flags uint64) (*os.File, error) {
	fd, err := unix.Openat2(int(root.Fd()), p, &unix.OpenHow{
		Flags:   flags | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS,
	})
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: p, Err: err}
	}
	return os.NewFile(uintptr(fd), p), nil
}

// target opens the place where something is mounted, and makes it if it is
// missing: in the image only, never in a part of the host that is mounted
// there already.
func target(root *os.File, p string, dir bool) (*os.File, error) {
	if f, err := within(root, p, unix.O_PATH); err == nil {
		return f, checkKind(f, p, dir)
	} else if !errors.Is(err, unix.ENOENT) {
		return nil, err
	}
	if p == "/" || p == "." {
		return nil, unix.ENOENT
	}
	parent, err := target(root, path.Dir(p), true)
	if err != nil {
		return nil, err
	}
	defer parent.Close()
	if own, err := sameDevice(root, parent); err != nil {
		return nil, err
	} else if !own {
		return nil, fmt.Errorf("%s does not exist in the volume that is mounted above it: make it on the host", p)
	}
	name := path.Base(p)
	if dir {
		err = unix.Mkdirat(int(parent.Fd()), name, 0o755)
	} else {
		var fd int
		if fd, err = unix.Openat(int(parent.Fd()), name, unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o644); err == nil {
			unix.Close(fd)
		}
	}
	if err != nil {
		return nil, &os.PathError{Op: "make", Path: p, Err: err}
	}
	return within(root, p, unix.O_PATH)
}

// onShared reports whether what is mounted on f appears in other namespaces.
func onShared(f *os.File) (bool, error) {
	var st unix.Statx_t
	if err := unix.Statx(int(f.Fd()), "", unix.AT_EMPTY_PATH, unix.STATX_MNT_ID, &st); err != nil {
		return false, err
	}
	b, err := os.ReadFile("/proc/thread-self/mountinfo")
	if err != nil {
		return false, err
	}
	id := strconv.FormatUint(st.Mnt_id, 10)
	for l := range strings.Lines(string(b)) {
		// ID PARENT DEVICE ROOT AT OPTIONS [TAG…] - …, proc_pid_mountinfo(5)
		fields := strings.Fields(l)
		if fields[0] != id {
			continue
		}
		for _, tag := range fields[6:] {
			if tag == "-" {
				break
			}
			if strings.HasPrefix(tag, "shared:") {
				return true, nil
			}
		}
		return false, nil
	}
	return false, fmt.Errorf("mount %s is not in /proc/thread-self/mountinfo", id)
}

func checkKind(f *os.File, p string, dir bool) error {
	fi, err := f.Stat()
	if err == nil && fi.IsDir() != dir {
		err = fmt.Errorf("%s: one is a folder, the other isn't", p)
	}
	if err != nil {
		f.Close()
	}
	return err
}

func sameDevice(a, b *os.File) (bool, error) {
	var x, y unix.Stat_t
	if err := errors.Join(unix.Fstat(int(a.Fd()), &x), unix.Fstat(int(b.Fd()), &y)); err != nil {
		return false, err
	}
	return x.Dev == y.Dev, nil
}

// attach mounts a tree in root. A link of the image, such as /var/run, can lead
// to a part of the host, where the mount would appear too, and stay.
func (t *tree) attach(root *os.File, p string) error {
	to, err := target(root, p, t.dir)
	if err != nil {
		return err
	}
	defer to.Close()
	if own, err := sameDevice(root, to); err != nil {
		return err
	} else if !own {
		if shared, err := onShared(to); err != nil {
			return err
		} else if shared {
			if same, err := sameFile(t.File, to); err == nil && same && !t.changed {
				return nil // it is there already
			}
			return fmt.Errorf("in the image a link leads from %s to the host's own, where the mount would appear too: name another place", p)
		}
	}
	return unix.MoveMount(int(t.Fd()), "", int(to.Fd()), "", unix.MOVE_MOUNT_F_EMPTY_PATH|unix.MOVE_MOUNT_T_EMPTY_PATH)
}

// shareFile gives the image one of the host's configuration files. One that
// lies in /run is linked, since its owner replaces it; others are mounted.
type sharedFile struct {
	name string
	link string
	tree *tree
}

var hostFiles = []string{"/etc/resolv.conf", "/etc/hosts"}

func cloneFiles() ([]sharedFile, error) {
	var out []sharedFile
	for _, name := range hostFiles {
		real, err := filepath.EvalSymlinks(name)
		if err != nil {
			continue // the host has none
		}
		if inside(real, "/run") {
			out = append(out, sharedFile{name: name, link: real})
			continue
		}
		t, err := clone(real)
		if err != nil {
			return nil, fmt.Errorf("share %s: %w", name, err)
		}
		out = append(out, sharedFile{name: name, tree: t})
	}
	return out, nil
}

func (s *sharedFile) attach(root *os.File) error {
	parent, err := target(root, path.Dir(s.name), true)
	if err != nil {
		return err
	}
	defer parent.Close()
	if own, err := sameDevice(root, parent); err != nil {
		return err
	} else if !own {
		return fmt.Errorf("in the image a link leads from %s to the host's own", path.Dir(s.name))
	}
	base := path.Base(s.name)
	if err := unix.Unlinkat(int(parent.Fd()), base, 0); err != nil && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("replace the image's %s: %w", s.name, err)
	}
	if s.link != "" {
		return unix.Symlinkat(s.link, int(parent.Fd()), base)
	}
	return s.tree.attach(root, s.name)
}

// lockThread keeps everything that follows on one thread: namespaces, ids and
// capabilities belong to threads, and the one that calls execve becomes the
// process.
func lockThread() { runtime.LockOSThread() }
