package guest

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	securejoin "github.com/cyphar/filepath-securejoin"
	"golang.org/x/sys/unix"
)

// mount is mount(2), its error saying what and where.
func mount(source, target, fstype string, flags uintptr, data string) error {
	if err := unix.Mount(source, target, fstype, flags, data); err != nil {
		return &os.PathError{Op: "mount " + fstype + " at", Path: target, Err: err}
	}
	return nil
}

// fdPath names an open file for calls that take a path only. The agent's own /proc serves: it never leaves its mount namespace.
func fdPath(f *os.File) string { return "/proc/self/fd/" + strconv.Itoa(int(f.Fd())) }

// bind mounts source, with what is mounted below it, at target; attributes (unix.MOUNT_ATTR_RDONLY, …) hold for all of it, and from
// the beginning. What the mount has already, such as nosuid, stays.
func bind(source, target string, attributes uint64) error {
	fail := func(err error) error { return &os.PathError{Op: "bind " + source + " at", Path: target, Err: err} }
	tree, err := unix.OpenTree(unix.AT_FDCWD, source, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_RECURSIVE)
	if err != nil {
		return fail(err)
	}
	defer unix.Close(tree)
	if attributes != 0 {
		attr := unix.MountAttr{Attr_set: attributes}
		if err := unix.MountSetattr(tree, "", unix.AT_EMPTY_PATH|unix.AT_RECURSIVE, &attr); err != nil {
			return fail(err)
		}
	}
	if err := unix.MoveMount(tree, "", unix.AT_FDCWD, target, unix.MOVE_MOUNT_F_EMPTY_PATH|unix.MOVE_MOUNT_T_SYMLINKS); err != nil {
		return fail(err)
	}
	return nil
}

// A mountPoint inside a root that others control: opened, so that nobody can put something else in its place.
type mountPoint struct{ *os.File }

// path of the mount point, for mount(2).
func (m mountPoint) path() string { return fdPath(m.File) }

// openMountPoint resolves path inside root, symlinks and .. never leading out, and makes it where missing: a directory, or an empty
// file in its directory. To make it, the links are resolved first, as text; then the path that has none left is opened by os.Root,
// which refuses any that somebody put there meanwhile.
func openMountPoint(root, path string, file bool) (mountPoint, error) {
	if m, err := openInRoot(root, path); err == nil {
		return mountPoint{m}, nil
	}
	resolved, err := securejoin.SecureJoin(root, path)
	if err != nil {
		return mountPoint{}, fmt.Errorf("resolve %s: %w", path, err)
	}
	rel, err := filepath.Rel(root, resolved)
	if err != nil {
		return mountPoint{}, fmt.Errorf("resolve %s: %w", path, err)
	}
	r, err := os.OpenRoot(root)
	if err != nil {
		return mountPoint{}, err
	}
	defer r.Close()
	if rel != "." {
		dir := rel
		if file {
			dir = filepath.Dir(rel)
		}
		if err := r.MkdirAll(dir, 0o755); err != nil {
			return mountPoint{}, fmt.Errorf("make mount point %s: %w", path, err)
		}
	}
	if file {
		f, err := r.OpenFile(rel, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o755)
		if err != nil && !errors.Is(err, fs.ErrExist) {
			return mountPoint{}, fmt.Errorf("make mount point %s: %w", path, err)
		}
		if err == nil {
			f.Close()
		}
	}
	m, err := openBeneath(root, rel)
	if err != nil {
		return mountPoint{}, fmt.Errorf("open mount point %s: %w", path, err)
	}
	return mountPoint{m}, nil
}

// openInRoot opens what is at path, if anything, as a mere place (O_PATH), links in it leading to where they would with dir as the root.
func openInRoot(dir, path string) (*os.File, error) {
	return openResolving(dir, filepath.Join(".", path), unix.RESOLVE_IN_ROOT)
}

// openBeneath opens a path below dir as a mere place (O_PATH), no symlink in it leading out.
func openBeneath(dir, path string) (*os.File, error) {
	return openResolving(dir, path, unix.RESOLVE_BENEATH)
}

func openResolving(dir, path string, resolve uint64) (*os.File, error) {
	root, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: dir, Err: err}
	}
	defer unix.Close(root)
	how := unix.OpenHow{Flags: unix.O_PATH | unix.O_CLOEXEC, Resolve: resolve | unix.RESOLVE_NO_MAGICLINKS}
	fd, err := unix.Openat2(root, path, &how)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: filepath.Join(dir, path), Err: err}
	}
	return os.NewFile(uintptr(fd), filepath.Join(dir, path)), nil
}

// mountsBelow lists what is mounted at and below dir, the last mounted first.
func mountsBelow(dir string) ([]string, error) {
	data, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	var found []string
	for s := bufio.NewScanner(bytes.NewReader(data)); s.Scan(); {
		fields := strings.Fields(s.Text())
		if len(fields) < 5 {
			continue
		}
		if at := unescape(fields[4]); at == dir || strings.HasPrefix(at, dir+"/") {
			found = append([]string{at}, found...)
		}
	}
	return found, nil
}

// unescape undoes the octal escapes of /proc/self/mountinfo.
func unescape(s string) string {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+3 < len(s) {
			if n, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				b.WriteByte(byte(n))
				i += 3
				continue
			}
		}
		b.WriteByte(s[i])
	}
	return b.String()
}

// unmountBelow takes away everything mounted at and below dir; what is still in use goes when it is let go.
func unmountBelow(dir string) error {
	list, err := mountsBelow(dir)
	if err != nil {
		return err
	}
	var errs []error
	for _, at := range list {
		if err := unix.Unmount(at, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil {
			errs = append(errs, &os.PathError{Op: "unmount", Path: at, Err: err})
		}
	}
	return errors.Join(errs...)
}
