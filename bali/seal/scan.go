package seal

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path"
	"runtime"
	"slices"
	"strings"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

// Measure asks the kernel for the fs-verity digest of an open file. Without one
// (ok false) the file is read and hashed.
type Measure func(fd int) (digest [32]byte, ok bool)

// TreeOf computes the tree digest of an unpacked image: equal to the signed one
// if not a bit of it is different. It follows no links.
func TreeOf(ctx context.Context, dir *os.File, measure Measure) ([32]byte, error) {
	workers, ctx := errgroup.WithContext(ctx)
	s := &scan{ctx: ctx, measure: measure, inodes: make(map[[2]uint64]string), work: make(chan job, 64)}
	for range max(2, runtime.GOMAXPROCS(0)) {
		workers.Go(s.hash)
	}
	fd, err := unix.Dup(int(dir.Fd()))
	if err == nil {
		err = s.folder(fd, "")
	}
	close(s.work)
	if werr := workers.Wait(); werr != nil {
		err = werr // the folder's is only that the context ended
	}
	if err != nil {
		return [32]byte{}, err
	}
	// the description comes first in the archive, wherever it sorts
	slices.SortStableFunc(s.found, func(a, b *scanned) int { return rank(a.entry.Path) - rank(b.entry.Path) })
	t := NewTree()
	for _, f := range s.found {
		t.Add(&f.entry, f.digest)
	}
	return t.Sum(), nil
}

func rank(p string) int {
	if p == ImageDir || strings.HasPrefix(p, ImageDir+"/") {
		return 0
	}
	return 1
}

type scanned struct {
	entry  Entry
	digest [32]byte
}

type scan struct {
	ctx     context.Context
	measure Measure
	inodes  map[[2]uint64]string // path of a file's first name
	found   []*scanned
	work    chan job
}

// job is an open file to hash; the worker closes it.
type job struct {
	fd   int
	file *scanned
}

// folder takes over fd.
func (s *scan) folder(fd int, at string) error {
	f := os.NewFile(uintptr(fd), at)
	defer f.Close()
	if strings.Count(at, "/") >= maxDepth {
		return fmt.Errorf("%s: more than %d folders deep", at, maxDepth)
	}
	names, err := f.Readdirnames(-1)
	if err != nil {
		return err
	}
	slices.Sort(names)
	for _, n := range names {
		if s.ctx.Err() != nil {
			return context.Cause(s.ctx)
		}
		if err := s.name(fd, n, path.Join(at, n)); err != nil {
			return fmt.Errorf("%s: %w", path.Join(at, n), err)
		}
	}
	return nil
}

func (s *scan) name(parent int, name, p string) error {
	var st unix.Stat_t
	if err := unix.Fstatat(parent, name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return err
	}
	f := &scanned{entry: Entry{
		Path: p, Mode: uint32(st.Mode) & 0o7777, UID: int(st.Uid), GID: int(st.Gid), ModTime: int64(st.Mtim.Sec), //nolint:unconvert // narrower on some systems
	}}
	e := &f.entry
	s.found = append(s.found, f)
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		key := [2]uint64{uint64(st.Dev), st.Ino} //nolint:unconvert // Dev has 32 bits on some systems
		if first, ok := s.inodes[key]; ok {
			e.Kind, e.Link = Hardlink, first
			return nil
		}
		s.inodes[key] = p
		e.Kind, e.Size = File, st.Size
		return s.file(parent, name, f)
	case unix.S_IFDIR:
		e.Kind = Dir
		fd, err := openDir(parent, name)
		if err != nil {
			return err
		}
		if e.Xattrs, err = fileXattrs(fd); err != nil {
			unix.Close(fd)
			return err
		}
		return s.folder(fd, p)
	case unix.S_IFLNK:
		buf := make([]byte, maxPath+1)
		n, err := unix.Readlinkat(parent, name, buf)
		e.Kind, e.Mode, e.Link = Symlink, 0o777, string(buf[:max(n, 0)])
		return err
	case unix.S_IFCHR, unix.S_IFBLK:
		e.Kind = CharDev
		if st.Mode&unix.S_IFMT == unix.S_IFBLK {
			e.Kind = BlockDev
		}
		e.Major, e.Minor = unix.Major(uint64(st.Rdev)), unix.Minor(uint64(st.Rdev)) //nolint:unconvert // Rdev has 32 bits on some systems
	case unix.S_IFIFO:
		e.Kind = FIFO
	default:
		return errors.New("a file of unknown kind")
	}
	return nil
}

func (s *scan) file(parent int, name string, f *scanned) error {
	fd, err := unix.Openat(parent, name, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	if f.entry.Xattrs, err = fileXattrs(fd); err != nil {
		unix.Close(fd)
		return err
	}
	if s.measure != nil {
		if d, ok := s.measure(fd); ok {
			f.digest = d
			unix.Close(fd)
			return nil
		}
	}
	select {
	case s.work <- job{fd, f}:
		return nil
	case <-s.ctx.Done():
		unix.Close(fd)
		return context.Cause(s.ctx)
	}
}

// hash works until the channel is closed, and closes what it can't read.
func (s *scan) hash() error {
	var v Verity
	var failed error
	buf := make([]byte, 256<<10)
	for j := range s.work {
		if failed == nil && s.ctx.Err() == nil {
			v.Reset()
			if err := readInto(s.ctx, &v, j.fd, buf); err != nil {
				failed = fmt.Errorf("%s: %w", j.file.entry.Path, err)
			}
			j.file.digest = v.Sum()
		}
		unix.Close(j.fd)
	}
	return failed
}

func readInto(ctx context.Context, v *Verity, fd int, buf []byte) error {
	for {
		n, err := unix.Read(fd, buf)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case err != nil:
			return err
		case n == 0:
			return nil
		case ctx.Err() != nil:
			return context.Cause(ctx)
		}
		_, _ = v.Write(buf[:n]) // never fails
	}
}

// fileXattrs reads the extended attributes that the format has.
func fileXattrs(fd int) (map[string]string, error) {
	n, err := unix.Flistxattr(fd, nil)
	if errors.Is(err, unix.ENOTSUP) || err == nil && n == 0 {
		return nil, nil // nearly every file
	}
	names := make([]byte, 64<<10)
	if err == nil {
		n, err = unix.Flistxattr(fd, names)
	}
	if err != nil {
		return nil, fmt.Errorf("list extended attributes: %w", err)
	}
	var out map[string]string
	for name := range strings.SplitSeq(strings.TrimSuffix(string(names[:n]), "\x00"), "\x00") {
		if !KeepXattr(name) {
			continue
		}
		value := make([]byte, 64<<10)
		n, err := unix.Fgetxattr(fd, name, value)
		if err != nil {
			return nil, fmt.Errorf("extended attribute %s: %w", name, err)
		}
		if out == nil {
			out = make(map[string]string)
		}
		out[name] = string(value[:n])
	}
	return out, nil
}

// ReadXattrs gives the extended attributes of an open file that the format has.
func ReadXattrs(f *os.File) (map[string]string, error) { return fileXattrs(int(f.Fd())) }
