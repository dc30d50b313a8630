package seal

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Unpack says how entries become files.
type Unpack struct {
	// Owners sets user and group ids, which takes root.
	Owners bool
	// Setid keeps setuid and setgid bits and file capabilities. Without it
	// they are dropped.
	Setid bool
	// Devices makes device nodes and named pipes. Without it an image that has
	// some is refused.
	Devices bool
	// Exact makes extended attributes that the target's file system doesn't have
	// an error: the files will be compared with the tree digest. Without it they
	// are lost.
	Exact bool
}

// Into unpacks every entry of r below dir, an empty folder that nobody else
// writes to, and returns what r.Finish says. Nothing in dir may be used if that
// is an error.
//
// It can't leave dir: every name is a single component that must not exist yet,
// made relative to the handle of a folder that it made itself.
func (u *Unpack) Into(ctx context.Context, r *Reader, dir *os.File) (*Signature, error) {
	t := &unpacking{Unpack: u, ctx: ctx, stack: []level{{fd: int(dir.Fd())}}, buf: make([]byte, 256<<10)}
	defer t.abandon()
	for {
		e, err := r.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return nil, err
		}
		if err := t.enter(path.Dir(e.Path)); err != nil {
			return nil, err
		}
		switch err := t.entry(e, r); {
		case t.failed != nil:
			return nil, t.failed // the image's fault, not this file's
		case err != nil:
			return nil, fmt.Errorf("unpack %s: %w", e.Path, explainFull(err))
		}
	}
	if err := t.enter("."); err != nil {
		return nil, err
	}
	return r.Finish()
}

// explainFull adds the remedy to the errors that a full target gives.
func explainFull(err error) error {
	switch {
	case errors.Is(err, unix.ENOSPC):
		return fmt.Errorf("%w: the target is full: give it more room, or less image", err)
	case errors.Is(err, unix.ENOMEM):
		return fmt.Errorf("%w: no memory left for the image: raise the limit of the cgroup", err)
	case errors.Is(err, unix.EPERM):
		return fmt.Errorf("%w: run it as root", err)
	case errors.Is(err, unix.EEXIST):
		return fmt.Errorf("%w: the target's file system takes two names of the image for the same", err)
	}
	return err
}

// level is a folder that is being filled.
type level struct {
	fd    int
	entry *Entry // nil for the root
}

type unpacking struct {
	*Unpack
	ctx   context.Context
	stack []level // from the root to the folder of the current entry
	buf   []byte
	// failed is what reading the image ended with
	failed error
}

// abandon closes the handles of an unpacking that was cut short.
func (t *unpacking) abandon() {
	for _, l := range t.stack[1:] {
		unix.Close(l.fd)
	}
}

// enter leaves folders that are complete and opens the ones down to dir. Since
// entries come depth first, dir is an ancestor, or a child just made.
func (t *unpacking) enter(dir string) error {
	for {
		top := t.stack[len(t.stack)-1]
		at := "."
		if top.entry != nil {
			at = top.entry.Path
		}
		if at == dir {
			return nil
		}
		if top.entry == nil || !strings.HasPrefix(dir, at+"/") {
			if top.entry == nil {
				return fmt.Errorf("%w: %q was not made", ErrFormat, dir)
			}
			if err := t.leave(); err != nil {
				return err
			}
			continue
		}
		return fmt.Errorf("%w: %q was not made", ErrFormat, dir)
	}
}

// leave sets what writing into a folder would have changed.
func (t *unpacking) leave() error {
	l := t.stack[len(t.stack)-1]
	t.stack = t.stack[:len(t.stack)-1]
	defer unix.Close(l.fd)
	if err := unix.Fchmod(l.fd, t.mode(l.entry)); err != nil {
		return fmt.Errorf("unpack %s: %w", l.entry.Path, err)
	}
	return t.times(l.entry)
}

func (t *unpacking) parent() int { return t.stack[len(t.stack)-1].fd }

func (t *unpacking) mode(e *Entry) uint32 {
	if t.Setid || e.Kind == Dir {
		return e.Mode
	}
	return e.Mode &^ 0o6000
}

// times works on the entry's name in the current folder.
func (t *unpacking) times(e *Entry) error {
	ts, err := unix.TimeToTimespec(time.Unix(e.ModTime, 0))
	if err != nil {
		return err
	}
	if err := unix.UtimesNanoAt(t.parent(), path.Base(e.Path), []unix.Timespec{ts, ts}, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return fmt.Errorf("set time of %s: %w", e.Path, err)
	}
	return nil
}

func (t *unpacking) entry(e *Entry, content io.Reader) error {
	// a file's owner, mode and time are set by its handle, a folder's on leave; a
	// hard link has none of its own
	name, parent := path.Base(e.Path), t.parent()
	switch e.Kind {
	case File:
		return t.file(parent, name, e, content)
	case Dir:
		return t.dir(parent, name, e)
	case Hardlink:
		return t.link(parent, name, e)
	case Symlink:
		if err := unix.Symlinkat(e.Link, parent, name); err != nil {
			return err
		}
	default:
		if !t.Devices {
			return errors.New("it is a device node, and the image's folder is no place for one: allow it with --devices")
		}
		if err := mknod(parent, name, e); err != nil {
			return err
		}
	}
	if t.Owners {
		if err := unix.Fchownat(parent, name, e.UID, e.GID, unix.AT_SYMLINK_NOFOLLOW); err != nil {
			return err
		}
	}
	if e.Kind != Symlink {
		if err := unix.Fchmodat(parent, name, t.mode(e), 0); err != nil {
			return err
		}
	}
	return t.times(e)
}

func (t *unpacking) file(parent int, name string, e *Entry, content io.Reader) error {
	fd, err := unix.Openat(parent, name, unix.O_CREAT|unix.O_EXCL|unix.O_WRONLY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return err
	}
	f := os.NewFile(uintptr(fd), name)
	defer f.Close()
	to := struct{ io.Writer }{f} // no ReadFrom: it would ignore buf
	n, err := io.CopyBuffer(to, onlyReader{t, content}, t.buf)
	if err != nil {
		return err
	}
	if n != e.Size {
		return fmt.Errorf("%w: %d bytes instead of %d", ErrFormat, n, e.Size)
	}
	if t.Owners {
		if err := f.Chown(e.UID, e.GID); err != nil {
			return err
		}
	}
	if err := t.xattrs(fd, e); err != nil {
		return err
	}
	if err := unix.Fchmod(fd, t.mode(e)); err != nil { // after chown, which clears setuid
		return err
	}
	return futimes(fd, e.ModTime)
}

// onlyReader ends a copy with its context, and tells errors of the image from
// those of its copy.
type onlyReader struct {
	t *unpacking
	r io.Reader
}

func (o onlyReader) Read(p []byte) (n int, err error) {
	if o.t.ctx.Err() != nil {
		err = context.Cause(o.t.ctx)
	} else {
		n, err = o.r.Read(p)
	}
	if err != nil && !errors.Is(err, io.EOF) {
		o.t.failed = err
	}
	return n, err
}

func (t *unpacking) dir(parent int, name string, e *Entry) error {
	if err := unix.Mkdirat(parent, name, 0o700); err != nil {
		return err
	}
	fd, err := openDir(parent, name)
	if err != nil {
		return err
	}
	t.stack = append(t.stack, level{fd, e})
	if t.Owners {
		if err := unix.Fchown(fd, e.UID, e.GID); err != nil {
			return err
		}
	}
	return t.xattrs(fd, e)
}

// link walks to the target by single components, following nothing.
func (t *unpacking) link(parent int, name string, e *Entry) error {
	at := t.stack[0].fd
	dir, base := path.Split(e.Link)
	for c := range strings.SplitSeq(strings.TrimSuffix(dir, "/"), "/") {
		if c == "" {
			continue
		}
		fd, err := openDir(at, c)
		if at != t.stack[0].fd {
			unix.Close(at)
		}
		if err != nil {
			return fmt.Errorf("%s: %w", e.Link, err)
		}
		at = fd
	}
	if at != t.stack[0].fd {
		defer unix.Close(at)
	}
	return unix.Linkat(at, base, parent, name, 0)
}

func openDir(parent int, name string) (int, error) {
	return unix.Openat(parent, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
}

func (t *unpacking) xattrs(fd int, e *Entry) error {
	for k, v := range e.Xattrs {
		if k == "security.capability" && !t.Setid {
			continue
		}
		err := unix.Fsetxattr(fd, k, []byte(v), 0)
		lost := errors.Is(err, unix.ENOTSUP) && !t.Exact || !t.Owners // security.* takes root
		if err != nil && !lost {
			return fmt.Errorf("extended attribute %s: %w", k, err)
		}
	}
	return nil
}
