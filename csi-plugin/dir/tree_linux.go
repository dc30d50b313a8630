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
	c := treeCopy{ctx: ctx, from: from, to: to, links: map[inode]string{}}
	if err := c.directory(source, target); err != nil {
		return false, err
	}
	return c.copied, nil
}

type inode struct{ dev, ino uint64 }

type treeCopy struct {
	ctx      context.Context
	from, to *os.Root
	links    map[inode]string // files with several names → the first one that was copied
	copied   bool
}

func (c *treeCopy) directory(source, target string) error {
	d, err := c.from.OpenFile(source, os.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		return err
	}
	defer d.Close()
	fi, err := d.Stat()
	if err != nil {
		return err
	}
	if err := c.to.Mkdir(target, 0o700); err != nil {
		return err
	}
	for {
		names, err := d.Readdirnames(256)
		for _, name := range names {
			if err := c.entry(filepath.Join(source, name), filepath.Join(target, name)); err != nil {
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
	t, err := c.to.Open(target)
	if err != nil {
		return err
	}
	defer t.Close()
	if err := attributes(t, d); err != nil {
		return err
	}
	return errors.Join(c.ownership(target, fi), t.Sync())
}

func (c *treeCopy) entry(source, target string) error {
	if c.ctx.Err() != nil {
		return context.Cause(c.ctx)
	}
	fi, err := c.from.Lstat(source)
	if err == nil {
		err = c.copy(source, target, fi)
	}
	if gone := (*fs.PathError)(nil); errors.As(err, &gone) && errors.Is(err, fs.ErrNotExist) {
		return nil // deleted or renamed meanwhile
	}
	return err
}

func (c *treeCopy) copy(source, target string, fi fs.FileInfo) error {
	st := fi.Sys().(*syscall.Stat_t)
	key := inode{st.Dev, st.Ino}
	if st.Nlink > 1 && !fi.IsDir() {
		if first, ok := c.links[key]; ok {
			return c.to.Link(first, target)
		}
		c.links[key] = target
	}
	switch fi.Mode().Type() {
	case 0:
		return c.file(source, target)
	case fs.ModeDir:
		return c.directory(source, target)
	case fs.ModeSymlink:
		to, err := c.from.Readlink(source)
		if err != nil {
			return err
		}
		if err := c.to.Symlink(to, target); err != nil {
			return err
		}
		return c.ownership(target, fi)
	default:
		return c.node(target, fi, st)
	}
}

func (c *treeCopy) file(source, target string) error {
	f, err := c.from.OpenFile(source, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil || !fi.Mode().IsRegular() {
		return err // it was replaced by something else just now
	}
	t, err := c.to.OpenFile(target, createNew, 0o600)
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
		err = attributes(t, f)
	}
	if err == nil {
		err = c.ownership(target, fi)
	}
	return errors.Join(err, t.Sync())
}

// node makes a FIFO, socket or device node. Nothing that volumes are mounted with lets a device node be used.
func (c *treeCopy) node(target string, fi fs.FileInfo, st *syscall.Stat_t) error {
	d, err := c.to.Open(filepath.Dir(target))
	if err != nil {
		return err
	}
	defer d.Close()
	if err := unix.Mknodat(int(d.Fd()), filepath.Base(target), st.Mode, int(st.Rdev)); err != nil {
		return &fs.PathError{Op: "mknod", Path: target, Err: err}
	}
	return c.ownership(target, fi)
}

// ownership gives a copy its owner, mode and times, in that order: a change of owner takes set-user-id bits away.
func (c *treeCopy) ownership(target string, fi fs.FileInfo) error {
	st := fi.Sys().(*syscall.Stat_t)
	if err := c.to.Lchown(target, int(st.Uid), int(st.Gid)); err != nil {
		return err
	}
	d, err := c.to.Open(filepath.Dir(target))
	if err != nil {
		return err
	}
	defer d.Close()
	if fi.Mode().Type() != fs.ModeSymlink {
		if err := unix.Fchmodat(int(d.Fd()), filepath.Base(target), st.Mode&0o7777, 0); err != nil {
			return &fs.PathError{Op: "chmod", Path: target, Err: err}
		}
	}
	times := []unix.Timespec{{Sec: st.Atim.Sec, Nsec: st.Atim.Nsec}, {Sec: st.Mtim.Sec, Nsec: st.Mtim.Nsec}}
	if err := unix.UtimesNanoAt(int(d.Fd()), filepath.Base(target), times, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return &fs.PathError{Op: "utimes", Path: target, Err: err}
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
