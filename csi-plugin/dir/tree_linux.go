package dir

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"

	"golang.org/x/sys/unix"
)

// copyTree copies a directory with everything that a file system keeps of its files: owners, modes, times, extended attributes, hard
// links, holes, special files. copied says that data was written a second time.
//
// Whoever writes to the directory meanwhile may be hostile. All paths are resolved inside the root, so that the worst it gets is
// a copy of other files of its own; what vanishes while it is looked at is left out.
func copyTree(ctx context.Context, from *os.Root, source string, to *os.Root, target string) (copied bool, err error) {
	c := treeCopy{ctx: ctx, to: to, links: map[inode]named{}}
	if err := c.directory(from, source, to, target, target); err != nil {
		return false, err
	}
	return c.copied, nil
}

type inode struct{ dev, ino uint64 }

// A named is a file in a directory below the root of all copies. All in one have one text of its path: there may be very many, and it may be long.
type named struct{ dir, name string }

type treeCopy struct {
	ctx    context.Context
	to     *os.Root
	links  map[inode]named // files with several names → the first one that was copied
	copied bool
}

// maxPath is the length of the longest path that is copied. Directories can be nested deeper, and whoever does that with a million of them would have all of this
// process's memory and open files.
const maxPath = unix.PathMax

// directory copies what is called source in from, as target in to. path is the copy's, below the root of all copies.
func (c *treeCopy) directory(from *os.Root, source string, to *os.Root, target, path string) error {
	if len(path) > maxPath {
		return fmt.Errorf("a directory lies too deep in it: the paths of what is copied have at most %d bytes; move it up, or remove it", maxPath)
	}
	in, err := from.OpenRoot(source) // so that what is in it takes no longer the deeper it lies
	if err != nil {
		return err
	}
	defer in.Close()
	d, err := in.Open(".")
	if err != nil {
		return err
	}
	defer d.Close()
	fi, err := d.Stat()
	if err != nil {
		return err
	}
	if err := to.Mkdir(target, 0o700); err != nil {
		return err
	}
	out, err := to.OpenRoot(target)
	if err != nil {
		return err
	}
	defer out.Close()
	for {
		names, err := d.Readdirnames(256)
		for _, name := range names {
			if err := c.entry(in, out, path, name); err != nil {
				return err
			}
		}
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return err
		}
	}
	t, err := out.Open(".")
	if err != nil {
		return err
	}
	defer t.Close()
	if err := attributes(t, d); err != nil {
		return err
	}
	return errors.Join(ownership(to, target, fi), t.Sync())
}

func (c *treeCopy) entry(from, to *os.Root, dir, name string) error {
	if c.ctx.Err() != nil {
		return context.Cause(c.ctx)
	}
	fi, err := from.Lstat(name)
	if err == nil {
		err = c.copy(from, to, named{dir, name}, fi)
	}
	if gone := (*fs.PathError)(nil); errors.As(err, &gone) && errors.Is(err, fs.ErrNotExist) {
		return nil // deleted or renamed meanwhile
	}
	return err
}

func (c *treeCopy) copy(from, to *os.Root, at named, fi fs.FileInfo) error {
	name, path := at.name, filepath.Join(at.dir, at.name)
	st := fi.Sys().(*syscall.Stat_t)
	key := inode{st.Dev, st.Ino}
	if st.Nlink > 1 && !fi.IsDir() {
		if first, ok := c.links[key]; ok {
			if err := c.to.Link(filepath.Join(first.dir, first.name), path); !errors.Is(err, fs.ErrNotExist) {
				return err
			}
		} // else that one was deleted or renamed before it was copied
		c.links[key] = at
	}
	switch fi.Mode().Type() {
	case 0:
		return c.file(from, to, name)
	case fs.ModeDir:
		return c.directory(from, name, to, name, path)
	case fs.ModeSymlink:
		target, err := from.Readlink(name)
		if err != nil {
			return err
		}
		if err := to.Symlink(target, name); err != nil {
			return err
		}
		return ownership(to, name, fi)
	default:
		return node(to, name, fi, st)
	}
}

func (c *treeCopy) file(from, to *os.Root, name string) error {
	f, err := from.OpenFile(name, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil || !fi.Mode().IsRegular() {
		return err // it was replaced by something else just now
	}
	t, err := to.OpenFile(name, createNew, 0o600)
	if err != nil {
		return err
	}
	defer t.Close()
	err = reflink(t, f)
	if errors.Is(err, errors.ErrUnsupported) {
		if err = copySparse(c.ctx, t, f); fi.Size() > 0 {
			c.copied = true
		}
	}
	if err == nil {
		err = owner(to, name, fi)
	}
	if err == nil {
		err = attributes(t, f)
	}
	if err == nil {
		err = modeAndTimes(to, name, fi)
	}
	return errors.Join(err, t.Sync())
}

// node makes a FIFO, socket or device node. Nothing that volumes are mounted with lets a device node be used.
func node(to *os.Root, name string, fi fs.FileInfo, st *syscall.Stat_t) error {
	d, err := to.Open(".")
	if err != nil {
		return err
	}
	defer d.Close()
	if err := unix.Mknodat(int(d.Fd()), name, st.Mode, int(st.Rdev)); err != nil {
		return &fs.PathError{Op: "mknod", Path: name, Err: err}
	}
	return ownership(to, name, fi)
}

// ownership gives a copy its owner, mode and times, in that order: a change of owner takes set-user-id bits away, and of a file its capabilities, which are an attribute.
func ownership(to *os.Root, name string, fi fs.FileInfo) error {
	if err := owner(to, name, fi); err != nil {
		return err
	}
	return modeAndTimes(to, name, fi)
}

func owner(to *os.Root, name string, fi fs.FileInfo) error {
	st := fi.Sys().(*syscall.Stat_t)
	return to.Lchown(name, int(st.Uid), int(st.Gid))
}

func modeAndTimes(to *os.Root, name string, fi fs.FileInfo) error {
	st := fi.Sys().(*syscall.Stat_t)
	d, err := to.Open(filepath.Dir(name))
	if err != nil {
		return err
	}
	defer d.Close()
	if fi.Mode().Type() != fs.ModeSymlink {
		if err := unix.Fchmodat(int(d.Fd()), filepath.Base(name), st.Mode&0o7777, 0); err != nil {
			return &fs.PathError{Op: "chmod", Path: name, Err: err}
		}
	}
	times := []unix.Timespec{{Sec: st.Atim.Sec, Nsec: st.Atim.Nsec}, {Sec: st.Mtim.Sec, Nsec: st.Mtim.Nsec}}
	if err := unix.UtimesNanoAt(int(d.Fd()), filepath.Base(name), times, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return &fs.PathError{Op: "utimes", Path: name, Err: err}
	}
	return nil
}

// maxAttributes is the kernel's own limit of a list of names, and of a value (linux/limits.h XATTR_LIST_MAX, XATTR_SIZE_MAX).
const maxAttributes = 64 << 10

// attributes copies extended attributes, access control lists among them.
func attributes(to, from *os.File) error {
	list := make([]byte, maxAttributes)
	n, err := unix.Flistxattr(int(from.Fd()), list)
	if errors.Is(err, unix.EOPNOTSUPP) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("attributes of %s: %w", from.Name(), err)
	}
	value := make([]byte, maxAttributes)
	for name := range bytes.SplitSeq(list[:n], []byte{0}) {
		if len(name) == 0 {
			continue
		}
		n, err := unix.Fgetxattr(int(from.Fd()), string(name), value)
		if errors.Is(err, unix.ENODATA) {
			continue // removed meanwhile
		}
		if err == nil {
			err = unix.Fsetxattr(int(to.Fd()), string(name), value[:n], 0)
		}
		if err != nil {
			return fmt.Errorf("attribute %s of %s: %w", name, from.Name(), err)
		}
	}
	return nil
}
