package vdocker

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"slices"
	"strings"
	"time"

	"github.com/moby/moby/api/types/container"
	"golang.org/x/sys/unix"
)

// smallBuffer is what file contents are moved by.
const smallBuffer = 256 << 10

// packer writes a tree of the container as a tar archive.
type packer struct {
	ctx   context.Context
	tar   *tar.Writer
	start *os.File // what names are relative to
	links map[inode]string
	buf   []byte
	bulk  bulk
}

type inode struct{ dev, ino uint64 }

// pack writes what is at base in dir under a name, a directory with everything below; with bare, only what is below, and without
// that name.
func pack(ctx context.Context, w io.Writer, dir *os.File, base, name string, bare bool) error {
	start, err := openPath(int(dir.Fd()), ".", unix.O_PATH|unix.O_DIRECTORY, 0)
	if err != nil {
		return err
	}
	defer start.Close()
	p := &packer{ctx: ctx, tar: tar.NewWriter(w), start: start, links: map[inode]string{}, buf: make([]byte, smallBuffer)}
	defer p.bulk.close()
	if base == "" {
		base = "."
	}
	var st unix.Stat_t
	if err := unix.Fstatat(int(start.Fd()), base, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return &os.PathError{Op: "stat", Path: name, Err: err}
	}
	if st.Mode&unix.S_IFMT != unix.S_IFDIR {
		if err := p.file(start, base, name, &st); err != nil {
			return err
		}
		return p.tar.Close()
	}
	if !bare {
		if err := p.header(start, base, name, &st); err != nil {
			return err
		}
	}
	if err := p.below(base, name); err != nil {
		return err
	}
	return p.tar.Close()
}

// whiteout begins the name of an entry that stands for the absence of what follows it (OCI image-spec layer.md, "Whiteouts").
const whiteout = ".wh."

// packLayer writes what has changed in a root as a layer. What has gone since is left out.
func packLayer(ctx context.Context, w io.Writer, r *root, changes []container.FilesystemChange) error {
	p := &packer{ctx: ctx, tar: tar.NewWriter(w), start: r.dir, links: map[inode]string{}, buf: make([]byte, smallBuffer)}
	defer p.bulk.close()
	for _, c := range changes {
		if err := p.change(r, c); err != nil {
			return err
		}
	}
	return p.tar.Close()
}

func (p *packer) change(r *root, c container.FilesystemChange) error {
	name := strings.TrimPrefix(c.Path, "/")
	if c.Kind == container.ChangeDelete {
		return p.write(&tar.Header{Name: path.Join(path.Dir(name), whiteout+path.Base(name)), Typeflag: tar.TypeReg, Format: tar.FormatPAX})
	}
	dir, base, err := r.openParent(c.Path)
	if err != nil {
		return gone(err)
	}
	defer dir.Close()
	var st unix.Stat_t
	if err := unix.Fstatat(int(dir.Fd()), base, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return gone(err)
	}
	if st.Mode&unix.S_IFMT == unix.S_IFDIR {
		return p.header(dir, base, name, &st)
	}
	return p.file(dir, base, name, &st)
}

// below packs a directory's content: first all but directories, then these, with no more than one directory open at a time. rel is
// the directory's path from where packing began; nothing in it is followed.
func (p *packer) below(rel, name string) error {
	dir, err := openPath(int(p.start.Fd()), rel, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOATIME, unix.RESOLVE_BENEATH|unix.RESOLVE_NO_SYMLINKS)
	if errors.Is(err, unix.EPERM) {
		dir, err = openPath(int(p.start.Fd()), rel, unix.O_RDONLY|unix.O_DIRECTORY, unix.RESOLVE_BENEATH|unix.RESOLVE_NO_SYMLINKS)
	}
	if err != nil {
		return gone(err)
	}
	defer dir.Close() // again, after an error
	var now unix.Stat_t
	if err := unix.Fstat(int(dir.Fd()), &now); err != nil || now.Mode&unix.S_IFMT != unix.S_IFDIR {
		return err
	}
	var subdirs []string
	for {
		names, err := dir.Readdirnames(4096)
		slices.Sort(names)
		for _, base := range names {
			var st unix.Stat_t
			if err := unix.Fstatat(int(dir.Fd()), base, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
				if errors.Is(err, fs.ErrNotExist) {
					continue
				}
				return &os.PathError{Op: "stat", Path: join(name, base), Err: err}
			}
			if st.Mode&unix.S_IFMT == unix.S_IFDIR {
				subdirs = append(subdirs, base)
				continue
			}
			if err := p.file(dir, base, join(name, base), &st); err != nil {
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
	slices.Sort(subdirs)
	for _, base := range subdirs {
		var st unix.Stat_t
		if err := unix.Fstatat(int(dir.Fd()), base, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil || st.Mode&unix.S_IFMT != unix.S_IFDIR {
			continue // it has changed since
		}
		if err := p.header(dir, base, join(name, base), &st); err != nil {
			return err
		}
	}
	dir.Close()
	for _, base := range subdirs {
		if err := p.below(path.Join(rel, base), join(name, base)); err != nil {
			return err
		}
	}
	return nil
}

// gone makes nothing of what was deleted meanwhile.
func gone(err error) error {
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ELOOP) {
		return nil
	}
	return err
}

// join is path.Join for the names in an archive: that of the container's root is "/".
func join(name, base string) string {
	if name == "" || strings.HasSuffix(name, "/") {
		return name + base
	}
	return name + "/" + base
}

// header writes an entry without content.
func (p *packer) header(dir *os.File, base, name string, st *unix.Stat_t) error {
	h, err := newHeader(dir, base, name, st)
	if err != nil || h == nil {
		return err
	}
	return p.write(h)
}

func (p *packer) write(h *tar.Header) error {
	if err := p.ctx.Err(); err != nil {
		return context.Cause(p.ctx)
	}
	if err := p.tar.WriteHeader(h); err != nil {
		return fmt.Errorf("pack %s: %w", h.Name, err)
	}
	return nil
}

// file packs what is no directory.
func (p *packer) file(dir *os.File, base, name string, st *unix.Stat_t) error {
	if st.Mode&unix.S_IFMT == unix.S_IFSOCK {
		return nil // an archive can't hold one
	}
	if st.Nlink > 1 {
		key := inode{st.Dev, st.Ino}
		if first, ok := p.links[key]; ok {
			h, err := newHeader(dir, base, name, st)
			if err != nil || h == nil {
				return err
			}
			h.Typeflag, h.Linkname, h.Size = tar.TypeLink, first, 0
			return p.write(h)
		}
		p.links[key] = name
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return p.header(dir, base, name, st)
	}
	f, err := openPath(int(dir.Fd()), base, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_NOCTTY|unix.O_NOFOLLOW, unix.RESOLVE_BENEATH|unix.RESOLVE_NO_SYMLINKS)
	if err != nil {
		return gone(err)
	}
	defer f.Close()
	if err := unix.Fstat(int(f.Fd()), st); err != nil || st.Mode&unix.S_IFMT != unix.S_IFREG {
		return err
	}
	h, err := newHeader(dir, base, name, st)
	if err != nil || h == nil {
		return err
	}
	if err := p.write(h); err != nil {
		return err
	}
	return p.content(f, h)
}

// content writes as many bytes as the header says, whatever the file has become since; zeros where it has shrunk, as tar does.
func (p *packer) content(f *os.File, h *tar.Header) error {
	left := h.Size
	if left >= directSize && p.bulk.open(f) {
		err := p.bulk.read(f, left, func(b []byte) error {
			if p.ctx.Err() != nil {
				return context.Cause(p.ctx)
			}
			_, err := p.tar.Write(b)
			return err
		})
		if err != nil {
			return fmt.Errorf("pack %s: %w", h.Name, err)
		}
		return nil
	}
	for left > 0 {
		if p.ctx.Err() != nil {
			return context.Cause(p.ctx)
		}
		b := p.buf[:min(left, int64(len(p.buf)))]
		n, err := io.ReadFull(f, b)
		if err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
			return fmt.Errorf("pack %s: %w", h.Name, err)
		}
		clear(b[n:])
		if _, err := p.tar.Write(b); err != nil {
			return fmt.Errorf("pack %s: %w", h.Name, err)
		}
		left -= int64(len(b))
	}
	return nil
}

// newHeader describes an entry; nil: it is gone.
func newHeader(dir *os.File, base, name string, st *unix.Stat_t) (*tar.Header, error) {
	h := &tar.Header{
		Name: name, Mode: int64(st.Mode & 0o7777), Uid: int(st.Uid), Gid: int(st.Gid), ModTime: time.Unix(st.Mtim.Sec, 0), Format: tar.FormatPAX,
	}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		h.Typeflag, h.Size = tar.TypeReg, st.Size
	case unix.S_IFDIR:
		h.Typeflag = tar.TypeDir
		if !strings.HasSuffix(h.Name, "/") {
			h.Name += "/"
		}
	case unix.S_IFLNK:
		h.Typeflag = tar.TypeSymlink
		target, err := os.Readlink(entry(dir, base))
		if err != nil {
			return nil, gone(err)
		}
		h.Linkname = target
	case unix.S_IFIFO:
		h.Typeflag = tar.TypeFifo
	case unix.S_IFCHR, unix.S_IFBLK:
		h.Typeflag = tar.TypeChar
		if st.Mode&unix.S_IFMT == unix.S_IFBLK {
			h.Typeflag = tar.TypeBlock
		}
		h.Devmajor, h.Devminor = int64(unix.Major(st.Rdev)), int64(unix.Minor(st.Rdev))
	}
	if h.Typeflag == tar.TypeReg || h.Typeflag == tar.TypeDir {
		h.PAXRecords = xattrs(entry(dir, base))
	}
	return h, nil
}

// xattrPrefix is that of PAX records for extended attributes.
const xattrPrefix = "SCHILY.xattr."

// portable tells whether an attribute belongs to the file and not to how it is stored or labelled here.
func portable(attr string) bool {
	return attr == "security.capability" || strings.HasPrefix(attr, "user.")
}

func xattrs(path string) map[string]string {
	buf := make([]byte, 1024)
	n, err := unix.Llistxattr(path, buf)
	if errors.Is(err, unix.ERANGE) {
		buf = make([]byte, 64<<10) // XATTR_LIST_MAX
		n, err = unix.Llistxattr(path, buf)
	}
	if err != nil || n == 0 {
		return nil
	}
	var out map[string]string
	for attr := range strings.SplitSeq(strings.TrimSuffix(string(buf[:n]), "\x00"), "\x00") {
		if !portable(attr) {
			continue
		}
		value := make([]byte, 64<<10) // XATTR_SIZE_MAX
		n, err := unix.Lgetxattr(path, attr, value)
		if err != nil {
			continue
		}
		if out == nil {
			out = map[string]string{}
		}
		out[xattrPrefix+attr] = string(value[:n])
	}
	return out
}
