package vdocker

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"strings"

	"golang.org/x/sys/unix"
)

// root is a container's file system from the agent's side. What is in it is hostile: every path is resolved by the kernel inside it
// (openat2, RESOLVE_IN_ROOT), and what has been opened is worked on by its descriptor.
type root struct{ dir *os.File }

func openRoot(dir string) (*root, error) {
	f, err := openPath(unix.AT_FDCWD, dir, unix.O_PATH|unix.O_DIRECTORY, 0)
	if err != nil {
		return nil, err
	}
	return &root{f}, nil
}

// withoutMounts gives the same root without what is mounted in it: the layers alone.
func (r *root) withoutMounts() (*root, error) {
	fd, err := unix.OpenTree(int(r.dir.Fd()), "", unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_EMPTY_PATH)
	if err != nil {
		return nil, &os.PathError{Op: "open tree", Path: r.dir.Name(), Err: err}
	}
	return &root{os.NewFile(uintptr(fd), r.dir.Name())}, nil
}

func (r *root) Close() error { return r.dir.Close() }

// open opens a path of the container, symbolic links followed as a process in the container would.
func (r *root) open(name string, flags uint64) (*os.File, error) {
	return openPath(int(r.dir.Fd()), name, flags, unix.RESOLVE_IN_ROOT|unix.RESOLVE_NO_MAGICLINKS)
}

// openParent opens the directory of a path's last element, which is not followed. "" is the element of the root itself.
func (r *root) openParent(name string) (dir *os.File, base string, err error) {
	parent, base := path.Split(path.Clean("/" + name))
	dir, err = r.open(parent, unix.O_PATH|unix.O_DIRECTORY)
	return dir, base, err
}

// openPath opens without following anything that resolve forbids. The kernel gives up with EAGAIN when somebody renames meanwhile.
func openPath(at int, name string, flags, resolve uint64) (*os.File, error) {
	how := unix.OpenHow{Flags: flags | unix.O_CLOEXEC, Resolve: resolve}
	for attempt := 0; ; attempt++ {
		fd, err := unix.Openat2(at, name, &how)
		if errors.Is(err, unix.EAGAIN) && attempt < 128 || errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return nil, &os.PathError{Op: "open", Path: name, Err: err}
		}
		return os.NewFile(uintptr(fd), name), nil
	}
}

// entry is a path for system calls that do not follow their last element: the directory is held by its descriptor, so nothing above
// can change.
func entry(dir *os.File, base string) string {
	p := fmt.Sprintf("/proc/self/fd/%d", dir.Fd())
	if base == "" {
		return p + "/."
	}
	return p + "/" + base
}

// lookup gives what is at a path of the container, the last element not followed unless the path says directory (a slash or dot at
// its end).
func (r *root) lookup(name string) (dir *os.File, base string, info fs.FileInfo, err error) {
	if wantsDirectory(name) {
		if dir, err = r.open(name, unix.O_PATH|unix.O_DIRECTORY); err != nil {
			return nil, "", nil, err
		}
	} else if dir, base, err = r.openParent(name); err != nil {
		return nil, "", nil, err
	}
	info, err = os.Lstat(entry(dir, base))
	if err != nil {
		dir.Close()
		return nil, "", nil, err
	}
	return dir, base, info, nil
}

func wantsDirectory(name string) bool {
	return strings.HasSuffix(name, "/") || strings.HasSuffix(name, "/.") || name == "."
}

// mkdirAll makes missing directories of a path, as root's.
func (r *root) mkdirAll(name string) error {
	name = path.Clean("/" + name)
	if f, err := r.open(name, unix.O_PATH|unix.O_DIRECTORY); err == nil {
		return f.Close()
	} else if !errors.Is(err, fs.ErrNotExist) || name == "/" {
		return err
	}
	if err := r.mkdirAll(path.Dir(name)); err != nil {
		return err
	}
	dir, base, err := r.openParent(name)
	if err != nil {
		return err
	}
	defer dir.Close()
	if err := os.Mkdir(entry(dir, base), 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return nil
}

// mountID tells on which mount an open file is.
func mountID(f *os.File) (uint64, error) {
	var st unix.Statx_t
	if err := unix.Statx(int(f.Fd()), "", unix.AT_EMPTY_PATH|unix.AT_SYMLINK_NOFOLLOW, unix.STATX_MNT_ID, &st); err != nil {
		return 0, &os.PathError{Op: "statx", Path: f.Name(), Err: err}
	}
	return st.Mnt_id, nil
}
