package guest

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// copyMark is in a volume while content is being copied into it: a copy that was cut short begins anew.
const copyMark = ".cradle-copying"

// fillVolume copies the image's content, a directory, into a volume if that is empty.
func fillVolume(volume, source string) error {
	entries, err := os.ReadDir(volume)
	if err != nil {
		return err
	}
	interrupted := false
	for _, e := range entries {
		interrupted = interrupted || e.Name() == copyMark
	}
	if len(entries) > 0 && !interrupted {
		return nil
	}
	st, err := os.Lstat(source)
	if errors.Is(err, fs.ErrNotExist) || err == nil && !st.IsDir() {
		return nil // the image has nothing there
	}
	if err != nil {
		return err
	}
	for _, e := range entries {
		if e.Name() != copyMark {
			if err := os.RemoveAll(filepath.Join(volume, e.Name())); err != nil {
				return err
			}
		}
	}
	mark := filepath.Join(volume, copyMark)
	if err := os.WriteFile(mark, nil, 0o600); err != nil {
		return err
	}
	c := copier{links: make(map[inode]string)}
	if err := c.entries(source, volume); err != nil {
		return fmt.Errorf("copy the image's content: %w", err)
	}
	if err := c.attributes(source, volume); err != nil {
		return fmt.Errorf("copy the image's content: %w", err)
	}
	if err := syncFS(volume); err != nil {
		return err
	}
	return os.Remove(mark)
}

// syncFS writes a file system's dirty pages to its disk.
func syncFS(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := unix.Syncfs(int(f.Fd())); err != nil {
		return &os.PathError{Op: "sync", Path: dir, Err: err}
	}
	return nil
}

type inode struct{ dev, ino uint64 }

// A copier copies a tree with owners, modes, times, extended attributes, devices and hard links. Nothing else has the target yet.
type copier struct {
	links map[inode]string // what has more than one name → its copy
}

func (c *copier) entries(source, target string) error {
	list, err := os.ReadDir(source)
	if err != nil {
		return err
	}
	for _, e := range list {
		if err := c.entry(filepath.Join(source, e.Name()), filepath.Join(target, e.Name())); err != nil {
			return err
		}
	}
	return nil
}

func (c *copier) entry(source, target string) error {
	var st unix.Stat_t
	if err := unix.Lstat(source, &st); err != nil {
		return &os.PathError{Op: "stat", Path: source, Err: err}
	}
	kind := st.Mode & unix.S_IFMT
	if kind != unix.S_IFDIR && st.Nlink > 1 {
		id := inode{st.Dev, st.Ino}
		if first, ok := c.links[id]; ok {
			return os.Link(first, target)
		}
		c.links[id] = target
	}
	var err error
	switch kind {
	case unix.S_IFDIR:
		if err = os.Mkdir(target, 0o700); err == nil {
			err = c.entries(source, target)
		}
	case unix.S_IFREG:
		err = copyFile(source, target)
	case unix.S_IFLNK:
		var to string
		if to, err = os.Readlink(source); err == nil {
			err = os.Symlink(to, target)
		}
	default:
		if err = unix.Mknod(target, st.Mode, int(st.Rdev)); err != nil {
			err = &os.PathError{Op: "mknod", Path: target, Err: err}
		}
	}
	if err != nil {
		return err
	}
	return c.attributes(source, target)
}

// attributes gives target what source has besides its content. The owner comes before the mode: chown clears setuid.
func (c *copier) attributes(source, target string) error {
	var st unix.Stat_t
	if err := unix.Lstat(source, &st); err != nil {
		return &os.PathError{Op: "stat", Path: source, Err: err}
	}
	if err := os.Lchown(target, int(st.Uid), int(st.Gid)); err != nil {
		return err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFLNK {
		if err := unix.Chmod(target, st.Mode&0o7777); err != nil {
			return &os.PathError{Op: "chmod", Path: target, Err: err}
		}
	}
	if err := copyXattrs(source, target); err != nil {
		return err
	}
	times := []unix.Timespec{st.Atim, st.Mtim}
	if err := unix.UtimesNanoAt(unix.AT_FDCWD, target, times, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return &os.PathError{Op: "set times of", Path: target, Err: err}
	}
	return nil
}

func copyFile(source, target string) error {
	in, err := os.Open(source)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(target, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	if _, err := io.Copy(out, in); err != nil {
		out.Close()
		return err
	}
	return out.Close()
}

// copyXattrs copies extended attributes; a file system that can't hold one goes without it.
func copyXattrs(source, target string) error {
	names := make([]byte, 64<<10)
	n, err := unix.Llistxattr(source, names)
	if errors.Is(err, unix.ENOTSUP) || n == 0 {
		return nil
	}
	if err != nil {
		return &os.PathError{Op: "list attributes of", Path: source, Err: err}
	}
	value := make([]byte, 64<<10)
	for _, name := range splitNul(names[:n]) {
		v, err := unix.Lgetxattr(source, name, value)
		if err != nil {
			continue
		}
		err = unix.Lsetxattr(target, name, value[:v], 0)
		if err != nil && !errors.Is(err, unix.ENOTSUP) && !errors.Is(err, unix.EPERM) {
			return &os.PathError{Op: "set attribute " + name + " of", Path: target, Err: err}
		}
	}
	return nil
}

func splitNul(b []byte) []string {
	var out []string
	start := 0
	for i, c := range b {
		if c == 0 {
			if i > start {
				out = append(out, string(b[start:i]))
			}
			start = i + 1
		}
	}
	return out
}
