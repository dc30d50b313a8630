package vdocker

import (
	"archive/tar"
	"bufio"
	"bytes"
	"compress/bzip2"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cradlestack/cradlestack/internal/dockerhttp"
)

// unpacker puts a tar archive into a container.
type unpacker struct {
	ctx  context.Context
	root *root
	base string // where to, a directory of the container

	// writable refuses directories that are not to be written to.
	writable func(dir *os.File) error
	// noReplace refuses to replace a directory by something else or the other way round.
	noReplace bool
	owner     *[2]int // of everything, whatever the archive says

	dir     *os.File // the last entry's directory
	dirName string
	times   []dirTime
	buf     []byte
	bulk    bulk
}

type dirTime struct {
	name  string
	mtime time.Time
}

// unpack reads the archive, which may be compressed with gzip or bzip2, to its end.
func (u *unpacker) unpack(r io.Reader) error {
	defer u.leave()
	defer u.bulk.close()
	r, err := decompressed(r)
	if err != nil {
		return err
	}
	u.buf = make([]byte, smallBuffer)
	archive := tar.NewReader(r)
	for {
		if err := u.ctx.Err(); err != nil {
			return context.Cause(u.ctx)
		}
		h, err := archive.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return dockerhttp.Invalid("unreadable archive: %v", err)
		}
		if err := u.put(h, archive); err != nil {
			return err
		}
	}
	u.leave()
	for i := len(u.times) - 1; i >= 0; i-- {
		t := u.times[i]
		dir, base, err := u.root.openParent(t.name)
		if err != nil {
			continue // something later in the archive has replaced it
		}
		setTime(entry(dir, base), t.mtime)
		dir.Close()
	}
	return nil
}

// decompressed recognises the compression by its first bytes, as docker does.
func decompressed(r io.Reader) (io.Reader, error) {
	b := bufio.NewReaderSize(r, 64<<10)
	head, err := b.Peek(6)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	switch {
	case bytes.HasPrefix(head, []byte{0x1f, 0x8b, 8}):
		z, err := gzip.NewReader(b)
		if err != nil {
			return nil, dockerhttp.Invalid("unreadable archive: %v", err)
		}
		return z, nil
	case bytes.HasPrefix(head, []byte("BZh")):
		return bzip2.NewReader(b), nil
	case bytes.Equal(head, []byte{0xfd, '7', 'z', 'X', 'Z', 0}), bytes.HasPrefix(head, []byte{0x28, 0xb5, 0x2f, 0xfd}):
		return nil, dockerhttp.Invalid("an archive for a pod is compressed with gzip, bzip2 or not at all")
	}
	return b, nil
}

func (u *unpacker) leave() {
	if u.dir != nil {
		u.dir.Close()
		u.dir = nil
	}
}

// parent gives the directory of an entry, making what is missing. Links in it lead where they lead for the container.
func (u *unpacker) parent(name string) (*os.File, error) {
	if u.dir != nil && u.dirName == name {
		return u.dir, nil
	}
	u.leave()
	dir, err := u.root.open(name, unix.O_PATH|unix.O_DIRECTORY)
	if errors.Is(err, fs.ErrNotExist) {
		if err = u.root.mkdirAll(name); err == nil {
			dir, err = u.root.open(name, unix.O_PATH|unix.O_DIRECTORY)
		}
	}
	if err != nil {
		return nil, err
	}
	if err := u.writable(dir); err != nil {
		dir.Close()
		return nil, err
	}
	u.dir, u.dirName = dir, name
	return dir, nil
}

// inside gives the container's path for a name in the archive.
func (u *unpacker) inside(name string) (string, error) {
	if n := path.Clean(name); n == ".." || strings.HasPrefix(n, "../") {
		return "", dockerhttp.Invalid("the archive's entry %q leads out of %s", name, u.base)
	}
	return path.Join(u.base, path.Clean("/"+name)), nil
}

// put makes one entry.
func (u *unpacker) put(h *tar.Header, content io.Reader) error {
	if h.Typeflag == tar.TypeXGlobalHeader {
		return nil
	}
	name, err := u.inside(h.Name)
	if err != nil {
		return err
	}
	if name == u.base {
		// The target itself: it is there, and stays as it is.
		if h.Typeflag != tar.TypeDir {
			return dockerhttp.Invalid("the archive's entry %q is the target itself, and no directory", h.Name)
		}
		return nil
	}
	dir, err := u.parent(path.Dir(name))
	if err != nil {
		return err
	}
	at := entry(dir, path.Base(name))
	inPlace, err := u.clear(at, h, name)
	if err != nil {
		return err
	}
	if err := u.make(at, h, content, inPlace); err != nil {
		return fmt.Errorf("unpack %s: %w", h.Name, err)
	}
	if h.Typeflag == tar.TypeLink {
		return nil // what it is linked to has its attributes already
	}
	if err := u.dress(at, h); err != nil {
		return fmt.Errorf("unpack %s: %w", h.Name, err)
	}
	if h.Typeflag == tar.TypeDir {
		u.times = append(u.times, dirTime{name, h.ModTime})
	}
	return nil
}

// clear takes away what the entry replaces. A file that can't be, since something is mounted there, is overwritten in place.
func (u *unpacker) clear(at string, h *tar.Header, name string) (inPlace bool, err error) {
	info, err := os.Lstat(at)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	switch toDir := h.Typeflag == tar.TypeDir; {
	case info.IsDir() && toDir:
		return false, nil
	case info.IsDir() && u.noReplace:
		return false, dockerhttp.Invalid("cannot overwrite directory %q with non-directory %q", name, u.base)
	case toDir && u.noReplace:
		return false, dockerhttp.Invalid("cannot overwrite non-directory %q with directory %q", name, u.base)
	}
	err = os.RemoveAll(at)
	if errors.Is(err, unix.EBUSY) && info.Mode().IsRegular() && isRegular(h) {
		return true, nil
	}
	return false, err
}

func isRegular(h *tar.Header) bool {
	return h.Typeflag == tar.TypeReg || h.Typeflag == tar.TypeGNUSparse || h.Typeflag == tar.TypeCont
}

// make makes the bare file.
func (u *unpacker) make(at string, h *tar.Header, content io.Reader, inPlace bool) error {
	mode := uint32(h.Mode & 0o7777)
	dev := int(unix.Mkdev(uint32(h.Devmajor), uint32(h.Devminor)))
	switch h.Typeflag {
	case tar.TypeDir:
		if err := os.Mkdir(at, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
		return nil
	case tar.TypeSymlink:
		return os.Symlink(h.Linkname, at)
	case tar.TypeLink:
		return u.link(at, h.Linkname)
	case tar.TypeFifo:
		return mknod(at, unix.S_IFIFO|mode, 0)
	case tar.TypeChar:
		return mknod(at, unix.S_IFCHR|mode, dev)
	case tar.TypeBlock:
		return mknod(at, unix.S_IFBLK|mode, dev)
	}
	if !isRegular(h) {
		return dockerhttp.Invalid("entries of type %q are not supported", h.Typeflag)
	}
	flags := os.O_WRONLY | os.O_CREATE | os.O_EXCL
	if inPlace {
		flags = os.O_WRONLY | os.O_TRUNC
	}
	f, err := os.OpenFile(at, flags|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0o600)
	if err != nil {
		return err
	}
	err = u.write(f, content, h.Size)
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	return err
}

func mknod(at string, mode uint32, dev int) error {
	if err := unix.Mknod(at, mode, dev); err != nil {
		return &os.PathError{Op: "mknod", Path: path.Base(at), Err: err}
	}
	return nil
}

// link makes a hard link to another entry of the archive, or to what is there in the target already.
func (u *unpacker) link(at, target string) error {
	name, err := u.inside(target)
	if err != nil {
		return err
	}
	dir, base, err := u.root.openParent(name)
	if err != nil {
		return err
	}
	defer dir.Close()
	return os.Link(entry(dir, base), at)
}

// hole is what files are searched for zeros by: a block of the usual file systems.
const hole = 4096

var zeros [hole]byte

// write copies a file's content. Blocks of zeros are not written: they become holes.
func (u *unpacker) write(f *os.File, content io.Reader, size int64) error {
	read := func(b []byte) error {
		if u.ctx.Err() != nil {
			return context.Cause(u.ctx)
		}
		if _, err := io.ReadFull(content, b); err != nil {
			return dockerhttp.Invalid("unreadable archive: %v", err)
		}
		return nil
	}
	if size >= directSize && u.bulk.open(f) {
		return u.bulk.write(f, size, read)
	}
	for at := int64(0); at < size; {
		b := u.buf[:min(size-at, int64(len(u.buf)))]
		if err := read(b); err != nil {
			return err
		}
		if err := writeSparse(f, b, at); err != nil {
			return err
		}
		at += int64(len(b))
	}
	return f.Truncate(size)
}

func writeSparse(f *os.File, b []byte, at int64) error {
	return eachRun(b, func(run []byte, skip int) error {
		_, err := f.WriteAt(run, at+int64(skip))
		return err
	})
}

// eachRun calls for each run of blocks that are not zeros, with what is before it in b.
func eachRun(b []byte, call func(run []byte, skip int) error) error {
	for at := 0; at < len(b); {
		at += zeroBlocks(b[at:])
		end := at
		for end < len(b) && zeroBlocks(b[end:]) == 0 {
			end += min(hole, len(b)-end)
		}
		if end > at {
			if err := call(b[at:end], at); err != nil {
				return err
			}
		}
		at = end
	}
	return nil
}

// zeroBlocks gives the length of the whole blocks of zeros that b begins with.
func zeroBlocks(b []byte) int {
	n := 0
	for len(b)-n >= hole && b[n] == 0 && bytes.Equal(b[n:n+hole], zeros[:]) {
		n += hole
	}
	return n
}

// dress gives the file what the archive says of it: owner first, since changing it drops setuid and capabilities.
func (u *unpacker) dress(at string, h *tar.Header) error {
	uid, gid := h.Uid, h.Gid
	if u.owner != nil {
		uid, gid = u.owner[0], u.owner[1]
	}
	if err := os.Lchown(at, uid, gid); err != nil {
		return err
	}
	if h.Typeflag != tar.TypeSymlink {
		// Nothing can have made a link of it since: it is followed by no other call either.
		if err := fchmod(at, uint32(h.Mode&0o7777)); err != nil {
			return err
		}
	}
	for key, value := range h.PAXRecords {
		attr, ok := strings.CutPrefix(key, xattrPrefix)
		if !ok || !portable(attr) {
			continue
		}
		if err := unix.Lsetxattr(at, attr, []byte(value), 0); err != nil && !errors.Is(err, unix.ENOTSUP) && !errors.Is(err, unix.EPERM) {
			return &os.PathError{Op: "setxattr " + attr, Path: h.Name, Err: err}
		}
	}
	setTime(at, h.ModTime)
	return nil
}

// fchmod changes the mode of what is at a path without following a link that somebody has put there.
func fchmod(at string, mode uint32) error {
	fd, err := unix.Open(at, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return &os.PathError{Op: "open", Path: path.Base(at), Err: err}
	}
	defer unix.Close(fd)
	if err := unix.Chmod(fmt.Sprintf("/proc/self/fd/%d", fd), mode); err != nil && !errors.Is(err, unix.ENOTSUP) {
		return &os.PathError{Op: "chmod", Path: path.Base(at), Err: err}
	}
	return nil
}

// setTime sets the modification time, where the file system can.
func setTime(at string, mtime time.Time) {
	ts := []unix.Timespec{{Nsec: unix.UTIME_OMIT}, unix.NsecToTimespec(mtime.UnixNano())}
	if mtime.Before(time.Unix(0, 0)) || mtime.After(time.Unix(1<<33, 0)) {
		ts[1] = unix.Timespec{Nsec: unix.UTIME_NOW}
	}
	_ = unix.UtimesNanoAt(unix.AT_FDCWD, at, ts, unix.AT_SYMLINK_NOFOLLOW)
}
