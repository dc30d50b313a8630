package tree

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/gob"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path"
	"path/filepath"
	"slices"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// maxPath is the length of the longest path that is listed. Directories can be nested deeper, and whoever does that with a million of them would have all of this
// process's memory and open files.
const maxPath = unix.PathMax

// List reads a part of a directory, "." for all of it, but for what is to be left out. The order is one in which all can be made.
func List(ctx context.Context, root *os.Root, part string, without ...string) ([]Entry, error) {
	l := lister{ctx: ctx, without: without, seen: map[inode]string{}}
	l.use, _ = ctx.Value(useKey{}).(*use)
	err := l.list(root, part, part)
	return l.all, err
}

type inode struct{ dev, ino uint64 }

// A Memory bounds what lists take that are there at the same time: directories may have any number of files. A nil one has no end.
type Memory struct{ left atomic.Int64 }

// NewMemory has so many bytes.
func NewMemory(most int64) *Memory {
	m := &Memory{}
	m.left.Store(most)
	return m
}

// ErrTooMuch is a list that there is no memory for.
var ErrTooMuch = errors.New("there is no memory for the list of all its files")

// A use is what one caller's lists take.
type use struct {
	of    *Memory
	taken atomic.Int64
}

type useKey struct{}

// Use has all lists that are made under the context take of the memory, until end is called.
func (m *Memory) Use(ctx context.Context) (_ context.Context, end func()) {
	if m == nil {
		return ctx, func() {}
	}
	u := &use{of: m}
	return context.WithValue(ctx, useKey{}, u), func() { m.left.Add(u.taken.Swap(0)) }
}

func (u *use) take(n int64) error {
	if u == nil {
		return nil
	}
	u.taken.Add(n)
	if u.of.left.Add(-n) < 0 {
		return ErrTooMuch
	}
	return nil
}

// What an entry takes as a rule, in its list and in what is made of that, with what waits to be collected; a chunk of a file; and what a map does.
const entrySize, chunkSize, chunksSize = 400, 100, 200

// size is what it takes.
func (e *Entry) size() int64 {
	n := entrySize + 2*len(e.Path) + len(e.Name) + len(e.Target) + chunkSize*len(e.Chunks)
	if len(e.Chunks) > 0 {
		n += chunksSize
	}
	for name, value := range e.Attributes {
		n += chunksSize + len(name) + len(value)
	}
	return int64(n)
}

type lister struct {
	ctx     context.Context
	use     *use // nil where nothing is bounded
	without []string
	seen    map[inode]string // files with several names → the first
	all     []Entry
}

// list is of what is called base in dir, which List's caller knows as name.
func (l *lister) list(dir *os.Root, base, name string) error {
	if l.ctx.Err() != nil {
		return context.Cause(l.ctx)
	}
	if slices.Contains(l.without, name) {
		return nil
	}
	if len(name) > maxPath {
		return fmt.Errorf("%.80s…: it lies too deep: the paths of what is copied or compared have at most %d bytes; move it up, or remove it", name, maxPath)
	}
	fi, err := dir.Lstat(base)
	if err != nil {
		return err
	}
	st := fi.Sys().(*syscall.Stat_t)
	key := inode{st.Dev, st.Ino}
	if first, ok := l.seen[key]; ok {
		return l.add(Entry{Path: name, Name: first})
	}
	if st.Nlink > 1 && !fi.IsDir() {
		l.seen[key] = name
	}
	e := Entry{Path: name, Mode: st.Mode, UID: st.Uid, GID: st.Gid, Modified: time.Unix(st.Mtim.Unix()).UTC()}
	switch fi.Mode().Type() {
	case 0:
		err = l.file(dir, base, &e)
	case fs.ModeDir:
		e.Modified = time.Time{}
		return l.directory(dir, base, e)
	case fs.ModeSymlink:
		e.Target, err = dir.Readlink(base)
	default:
		e.Device = st.Rdev
	}
	if err != nil {
		delete(l.seen, key) // its other names are not names of what is not listed
		return err
	}
	return l.add(e)
}

func (l *lister) add(e Entry) error {
	l.all = append(l.all, e)
	return l.use.take(e.size())
}

func (l *lister) directory(dir *os.Root, base string, e Entry) error {
	dir, err := dir.OpenRoot(base) // so that what is in it takes no longer the deeper it lies
	if err != nil {
		return err
	}
	defer dir.Close()
	d, err := dir.Open(".")
	if err != nil {
		return err
	}
	e.Attributes, err = attributes(d)
	var names []string
	if err == nil {
		names, err = d.Readdirnames(-1)
	}
	d.Close()
	if err != nil {
		return err
	}
	if err := l.add(e); err != nil {
		return err
	}
	slices.Sort(names)
	for _, name := range names {
		if err := l.list(dir, name, path.Join(e.Path, name)); err != nil && !errors.Is(err, fs.ErrNotExist) { // it has gone meanwhile
			return err
		}
	}
	return nil
}

func (l *lister) file(dir *os.Root, base string, e *Entry) error {
	f, err := dir.OpenFile(base, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return err
	}
	e.Size = fi.Size()
	if e.Attributes, err = attributes(f); err != nil {
		return err
	}
	e.Chunks = map[int64][32]byte{}
	return content(l.ctx, f, e.Size, func(i int64, data []byte) error {
		e.Chunks[i] = sha256.Sum256(data)
		return nil
	})
}

// content reads a file's chunks that are not all zeros.
func content(ctx context.Context, f *os.File, size int64, each func(i int64, data []byte) error) error {
	buffer := make([]byte, chunk)
	for at := int64(0); at < size; {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		data, err := unix.Seek(int(f.Fd()), at, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			return nil
		}
		if err != nil {
			return &fs.PathError{Op: "seek", Path: f.Name(), Err: err}
		}
		i := data / chunk
		n, err := f.ReadAt(buffer[:min(chunk, size-i*chunk)], i*chunk)
		if err != nil && !errors.Is(err, io.EOF) {
			return err
		}
		if some := buffer[:n]; len(bytes.Trim(some, "\x00")) > 0 {
			if err := each(i, some); err != nil {
				return err
			}
		}
		if size-i*chunk <= chunk {
			return nil // whose end may be the largest number that there is
		}
		at = (i + 1) * chunk
	}
	return nil
}

// Send writes what makes a part of a directory that is listed as theirs like the same of this one.
func Send(ctx context.Context, root *os.Root, part string, theirs []Entry, w io.Writer, without ...string) error {
	ours, err := List(ctx, root, part, without...)
	if err != nil {
		return err
	}
	out := gob.NewEncoder(w)
	has := map[string]*Entry{}
	for i := range theirs {
		has[theirs[i].Path] = &theirs[i]
	}
	keep := map[string]bool{}
	for _, e := range ours {
		their := has[e.Path]
		keep[e.Path] = their != nil && their.Name == e.Name && their.Mode&unix.S_IFMT == e.Mode&unix.S_IFMT && their.Device == e.Device && their.Target == e.Target
	}
	for _, e := range slices.Backward(theirs) { // what is in a directory before it
		if !keep[e.Path] {
			if err := out.Encode(message{Remove: e.Path}); err != nil {
				return err
			}
			delete(has, e.Path)
		}
	}
	for _, e := range ours {
		their := has[e.Path]
		if their != nil && same(e, *their) {
			continue
		}
		head := e
		head.Chunks = nil
		if err := out.Encode(message{Entry: &head}); err != nil {
			return err
		}
		if e.Name == "" && e.Mode&unix.S_IFMT == unix.S_IFREG {
			if their == nil {
				their = &Entry{}
			}
			if err := send(ctx, root, e, *their, out); err != nil {
				return err
			}
		}
	}
	return out.Encode(message{End: true})
}

// Compare tells in what one list differs from another that is older.
func Compare(older, newer []Entry) (all []Difference) {
	was := map[string]Entry{}
	for _, e := range older {
		was[e.Path] = e
	}
	for _, e := range newer {
		switch o, there := was[e.Path]; {
		case !there:
			all = append(all, Difference{Added, e.Path})
		case !same(o, e):
			all = append(all, Difference{Changed, e.Path})
		}
		delete(was, e.Path)
	}
	for path := range was {
		all = append(all, Difference{Removed, path})
	}
	slices.SortFunc(all, func(a, b Difference) int { return cmp.Compare(a.Path, b.Path) })
	return all
}

func same(a, b Entry) bool {
	return a.Path == b.Path && a.Mode == b.Mode && a.UID == b.UID && a.GID == b.GID && a.Device == b.Device && a.Modified.Equal(b.Modified) && a.Target == b.Target &&
		a.Name == b.Name && maps.Equal(a.Attributes, b.Attributes) && a.Size == b.Size && maps.Equal(a.Chunks, b.Chunks)
}

// send sends the chunks of a file that differ from theirs; one that is a hole here is sent as zeros.
func send(ctx context.Context, root *os.Root, e, their Entry, out *gob.Encoder) error {
	f, err := root.OpenFile(e.Path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	put := func(i int64, data []byte) error { return out.Encode(message{At: i * chunk, Data: data}) }
	whole := func(i int64) int64 { return min(chunk, e.Size-i*chunk) }
	for _, i := range slices.Sorted(maps.Keys(their.Chunks)) {
		if _, ok := e.Chunks[i]; !ok && i < (e.Size+chunk-1)/chunk {
			if err := put(i, make([]byte, whole(i))); err != nil {
				return err
			}
		}
	}
	return content(ctx, f, e.Size, func(i int64, data []byte) error {
		if sum, ok := their.Chunks[i]; ok && sum == e.Chunks[i] {
			return nil
		}
		return put(i, data)
	})
}

// Receive does what Send has written, and tells what that was: nothing where they were the same. What it has done when it is interrupted, the next List
// finds.
func Receive(ctx context.Context, root *os.Root, r io.Reader) (c Changes, err error) {
	in := gob.NewDecoder(r)
	var last *Entry
	var file *os.File // where it is one
	finish := func() error {
		e, f := last, file
		if last, file = nil, nil; e == nil {
			return nil
		}
		return complete(root, *e, f)
	}
	defer func() { err = errors.Join(err, finish()) }()
	var directories []Entry // their modes may forbid what is done in them
	for {
		if ctx.Err() != nil {
			return c, context.Cause(ctx)
		}
		var m message
		if err := in.Decode(&m); err != nil {
			return c, fmt.Errorf("what is sent ends too early: %w", err)
		}
		if err := m.check(); err != nil {
			return c, err
		}
		if m.Data == nil {
			if err := finish(); err != nil {
				return c, err
			}
		}
		switch {
		case m.End:
			for _, d := range slices.Backward(directories) {
				if err := complete(root, d, nil); err != nil {
					return c, err
				}
			}
			return c, nil
		case m.Remove != "":
			c.Entries++
			err = root.RemoveAll(m.Remove)
		case m.Entry != nil:
			c.Entries++
			if m.Entry.Mode&unix.S_IFMT == unix.S_IFDIR {
				directories = append(directories, *m.Entry)
			}
			last = m.Entry
			file, err = begin(root, *m.Entry)
		case file == nil:
			err = errors.New("what is sent has content of no file")
		default:
			c.Bytes += int64(len(m.Data))
			_, err = file.WriteAt(m.Data, m.At)
		}
		if err != nil {
			return c, err
		}
	}
}

// check refuses what List has never told: paths that are not below the directory, or are written in another way than they have to be.
func (m *message) check() error {
	paths := []string{m.Remove}
	if m.Entry != nil {
		if m.Entry.Path == "" || m.Entry.Size < 0 {
			return fmt.Errorf("what is sent has an entry %.80q of %d bytes", m.Entry.Path, m.Entry.Size)
		}
		paths = append(paths, m.Entry.Path, m.Entry.Name)
	}
	for _, p := range paths {
		if p != "" && (!filepath.IsLocal(p) || filepath.Clean(p) != p) {
			return fmt.Errorf("what is sent has the path %.80q, which is not below the directory", p)
		}
	}
	return nil
}

// begin makes what is not there yet.
func begin(root *os.Root, e Entry) (*os.File, error) {
	_, err := root.Lstat(e.Path)
	there := err == nil
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	switch kind := e.Mode & unix.S_IFMT; {
	case e.Name != "":
		return nil, root.Link(e.Name, e.Path)
	case kind == unix.S_IFREG:
		f, err := root.OpenFile(e.Path, os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
		if err == nil {
			err = f.Truncate(e.Size)
		}
		return f, err
	case there:
		return nil, nil
	case kind == unix.S_IFDIR:
		return nil, root.Mkdir(e.Path, 0o700)
	case kind == unix.S_IFLNK:
		return nil, root.Symlink(e.Target, e.Path)
	default:
		return nil, in(root, e.Path, "mknod", func(dir int, name string) error { return unix.Mknodat(dir, name, e.Mode, int(e.Device)) })
	}
}

// in calls do with the directory that a name is in.
func in(root *os.Root, name, what string, do func(dir int, name string) error) error {
	d, err := root.Open(filepath.Dir(name))
	if err != nil {
		return err
	}
	defer d.Close()
	if err := do(int(d.Fd()), filepath.Base(name)); err != nil {
		return &fs.PathError{Op: what, Path: name, Err: err}
	}
	return nil
}

// complete gives an entry its owner, attributes, mode and time, in that order: writing changes times, and a change of owner takes file capabilities, which are
// an attribute, and set-user-id bits away. A file is closed.
func complete(root *os.Root, e Entry, f *os.File) error {
	if e.Name != "" {
		return nil
	}
	if err := root.Lchown(e.Path, int(e.UID), int(e.GID)); err != nil {
		if f != nil {
			err = errors.Join(err, f.Close())
		}
		return err
	}
	kind := e.Mode & unix.S_IFMT
	if kind == unix.S_IFREG || kind == unix.S_IFDIR {
		if f == nil {
			d, err := root.Open(e.Path)
			if err != nil {
				return err
			}
			f = d
		}
		if err := errors.Join(setAttributes(f, e.Attributes), f.Close()); err != nil {
			return err
		}
	}
	if kind != unix.S_IFLNK {
		if e.Path == "." {
			return chmodRoot(root, e.Mode)
		}
		if err := chmod(root, e); err != nil {
			return err
		}
	}
	if kind == unix.S_IFDIR {
		return nil
	}
	at := unix.Timespec{Sec: e.Modified.Unix(), Nsec: int64(e.Modified.Nanosecond())} // which has room for other centuries as well
	return in(root, e.Path, "utimes", func(dir int, name string) error {
		return unix.UtimesNanoAt(dir, name, []unix.Timespec{at, at}, unix.AT_SYMLINK_NOFOLLOW)
	})
}

// chmod follows no symbolic link, also where somebody who has the directory as well puts one in the entry's place meanwhile.
func chmod(root *os.Root, e Entry) error {
	return in(root, e.Path, "chmod", func(dir int, name string) error {
		fd, err := unix.Openat(dir, name, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		var st unix.Stat_t
		if err := unix.Fstat(fd, &st); err != nil {
			return err
		}
		if st.Mode&unix.S_IFMT != e.Mode&unix.S_IFMT {
			return errors.New("what is there is of another kind")
		}
		return unix.Chmod(fmt.Sprintf("/proc/self/fd/%d", fd), e.Mode&0o7777) // fchmod(2) takes no such descriptor
	})
}

func chmodRoot(root *os.Root, mode uint32) error {
	d, err := root.Open(".")
	if err != nil {
		return err
	}
	defer d.Close()
	return unix.Fchmod(int(d.Fd()), mode&0o7777)
}

// maxAttributes is the kernel's own limit of a list of names, and of a value (linux/limits.h XATTR_LIST_MAX, XATTR_SIZE_MAX).
const maxAttributes = 64 << 10

func attributes(f *os.File) (map[string]string, error) {
	list := make([]byte, maxAttributes)
	n, err := unix.Flistxattr(int(f.Fd()), list)
	if errors.Is(err, unix.EOPNOTSUPP) || n == 0 {
		return nil, nil
	}
	all := map[string]string{}
	value := make([]byte, maxAttributes)
	for name := range bytes.SplitSeq(list[:max(n, 0)], []byte{0}) {
		if len(name) == 0 {
			continue
		}
		if n, err = unix.Fgetxattr(int(f.Fd()), string(name), value); err != nil {
			break
		}
		all[string(name)] = string(value[:n])
	}
	if err != nil {
		return nil, fmt.Errorf("attributes of %s: %w", f.Name(), err)
	}
	return all, nil
}

func setAttributes(f *os.File, want map[string]string) error {
	has, err := attributes(f)
	if err != nil {
		return err
	}
	for name := range has {
		if _, ok := want[name]; !ok {
			if err := unix.Fremovexattr(int(f.Fd()), name); err != nil {
				return fmt.Errorf("attribute %s of %s: %w", name, f.Name(), err)
			}
		}
	}
	for name, value := range want {
		if has[name] == value {
			continue
		}
		if err := unix.Fsetxattr(int(f.Fd()), name, []byte(value), 0); err != nil {
			return fmt.Errorf("attribute %s of %s: %w", name, f.Name(), err)
		}
	}
	return nil
}
