package main

import (
	"archive/tar"
	"bytes"
	"context"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"
	"time"

	"github.com/klauspost/pgzip"
	"golang.org/x/sys/unix"
)

// writeLayer writes the tree under dir as a gzipped layer. Entries are sorted, times are at most newest, so equal trees
// give equal bytes. What overlayfs leaves in an upper directory becomes what OCI asks for
// (image-spec layer.md, "Whiteouts"): a character device 0:0 a .wh. entry, trusted.overlay.opaque a .wh..wh..opq.
func writeLayer(ctx context.Context, dir, file string, newest time.Time) (err error) {
	f, err := os.Create(file)
	if err != nil {
		return err
	}
	defer func() {
		if cerr := f.Close(); err == nil {
			err = cerr
		}
	}()
	z := pgzip.NewWriter(f)
	w := &layerWriter{tar: tar.NewWriter(z), newest: newest, seen: make(map[inode]string)}
	// The root itself stays out: in a container its attributes are those of the writable layer.
	err = filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
		if err != nil || p == dir {
			return err
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		name, err := filepath.Rel(dir, p)
		if err != nil {
			return err
		}
		return w.add(p, name, d)
	})
	if err != nil {
		return err
	}
	if err := w.tar.Close(); err != nil {
		return err
	}
	return z.Close()
}

type inode struct{ dev, ino uint64 }

type layerWriter struct {
	tar    *tar.Writer
	newest time.Time
	seen   map[inode]string // first name of every file that has several
}

func (w *layerWriter) add(p, name string, d fs.DirEntry) error {
	var st unix.Stat_t
	if err := unix.Lstat(p, &st); err != nil {
		return fmt.Errorf("lstat %s: %w", p, err)
	}
	if st.Mode&unix.S_IFMT == unix.S_IFSOCK {
		return nil
	}
	if st.Mode&unix.S_IFMT == unix.S_IFCHR && st.Rdev == 0 {
		return w.tar.WriteHeader(w.header(path.Join(path.Dir(name), ".wh."+path.Base(name))))
	}

	fi, err := d.Info()
	if err != nil {
		return err
	}
	link := ""
	if st.Mode&unix.S_IFMT == unix.S_IFLNK {
		if link, err = os.Readlink(p); err != nil {
			return err
		}
	}
	h, err := tar.FileInfoHeader(fi, link)
	if err != nil {
		return err
	}
	h.Name, h.Format = name, tar.FormatPAX
	h.Uname, h.Gname = "", ""
	h.AccessTime, h.ChangeTime = time.Time{}, time.Time{}
	h.ModTime = h.ModTime.Truncate(time.Second)
	if h.ModTime.After(w.newest) {
		h.ModTime = w.newest
	}
	if fi.IsDir() {
		h.Name += "/"
	}
	if id := (inode{st.Dev, st.Ino}); !fi.IsDir() && st.Nlink > 1 {
		if first, ok := w.seen[id]; ok {
			h.Typeflag, h.Linkname, h.Size = tar.TypeLink, first, 0
			return w.tar.WriteHeader(h)
		}
		w.seen[id] = name
	}
	xattrs, err := listXattrs(p)
	if err != nil {
		return err
	}
	opaque := false
	for k, v := range xattrs {
		switch {
		case k == "trusted.overlay.opaque":
			opaque = v == "y"
		case strings.HasPrefix(k, "trusted.overlay."):
		default:
			if h.PAXRecords == nil {
				h.PAXRecords = make(map[string]string)
			}
			h.PAXRecords["SCHILY.xattr."+k] = v
		}
	}
	if err := w.tar.WriteHeader(h); err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	if opaque {
		return w.tar.WriteHeader(w.header(path.Join(name, ".wh..wh..opq")))
	}
	if h.Typeflag != tar.TypeReg {
		return nil
	}
	f, err := os.Open(p)
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := io.Copy(w.tar, f); err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	return nil
}

// header is that of an empty marker file.
func (w *layerWriter) header(name string) *tar.Header {
	return &tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o600, ModTime: w.newest, Format: tar.FormatPAX}
}

func listXattrs(p string) (map[string]string, error) {
	names := make([]byte, 64<<10) // XATTR_LIST_MAX
	n, err := unix.Llistxattr(p, names)
	if err != nil {
		if err == unix.ENOTSUP {
			return nil, nil
		}
		return nil, fmt.Errorf("listxattr %s: %w", p, err)
	}
	xattrs := make(map[string]string)
	value := make([]byte, 64<<10) // XATTR_SIZE_MAX
	for name := range bytes.SplitSeq(bytes.TrimRight(names[:n], "\x00"), []byte{0}) {
		if len(name) == 0 {
			continue
		}
		n, err := unix.Lgetxattr(p, string(name), value)
		if err != nil {
			return nil, fmt.Errorf("getxattr %s %s: %w", p, name, err)
		}
		xattrs[string(name)] = string(value[:n])
	}
	return xattrs, nil
}
