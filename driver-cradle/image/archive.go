package image

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"
	"time"
)

// maxArchiveEntries bounds the files of a docker archive or of a layout in a tar; each layer takes three at most.
const maxArchiveEntries = 1 << 16

// An archive shows the regular files of a tar as a file system, without unpacking it.
type archive struct {
	r     io.ReaderAt
	files map[string]archiveFile
}

type archiveFile struct {
	offset, size int64
	link         string // clean name of the file that this is another name of
}

// openArchive indexes a tar; it reads only the headers. A compressed tar is uncompressed first. The session closes what
// is opened.
func openArchive(ctx context.Context, file string, x *session, limit int64) (*archive, error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	x.closers = append(x.closers, f)
	fi, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !fi.Mode().IsRegular() {
		return nil, fmt.Errorf("%s is no regular file", file)
	}
	var magic [4]byte
	if _, err := f.ReadAt(magic[:], 0); err != nil && err != io.EOF {
		return nil, err
	}
	if bytes.HasPrefix(magic[:], gzipMagic) || bytes.Equal(magic[:], zstdMagic) {
		r, done, err := decompress(f)
		if err != nil {
			return nil, err
		}
		defer done()
		return spoolArchive(ctx, r, x, limit)
	}
	return indexArchive(f, fi.Size())
}

// spoolArchive writes a stream to a file of the session and indexes that.
func spoolArchive(ctx context.Context, r io.Reader, x *session, limit int64) (*archive, error) {
	f, err := createSparse(ctx, filepath.Join(x.dir, "archive"))
	if err != nil {
		return nil, err
	}
	x.closers = append(x.closers, f.file)
	n, err := io.Copy(f, io.LimitReader(r, limit+1))
	if err != nil {
		return nil, spaceError(err, x.dir)
	}
	if n > limit {
		return nil, fmt.Errorf("%w: an archive of more than %s", ErrTooLarge, formatSize(limit))
	}
	if err := f.finish(); err != nil {
		return nil, err
	}
	return indexArchive(f.file, f.end)
}

func indexArchive(f *os.File, size int64) (*archive, error) {
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return nil, err
	}
	a := &archive{r: f, files: make(map[string]archiveFile)}
	tr := tar.NewReader(f) // seeks over the contents
	for {
		h, err := tr.Next()
		if err == io.EOF {
			return a, nil
		}
		if err != nil {
			return nil, corruptTar(err)
		}
		name := path.Clean("/" + h.Name)[1:]
		switch h.Typeflag {
		case tar.TypeReg:
			if isSparse(h) {
				return nil, fmt.Errorf("%w: %.200q is a sparse file", ErrRefused, h.Name)
			}
			at, err := f.Seek(0, io.SeekCurrent)
			if err != nil {
				return nil, err
			}
			if h.Size > size-at {
				return nil, fmt.Errorf("%w: truncated within %.200q: save the image again", ErrCorrupt, h.Name)
			}
			a.files[name] = archiveFile{offset: at, size: h.Size}
		case tar.TypeSymlink: // docker 1.10 to 24 save a layer that several images share once
			a.files[name] = archiveFile{link: path.Join("/", path.Dir(name), h.Linkname)[1:]}
		case tar.TypeLink:
			a.files[name] = archiveFile{link: path.Clean("/" + h.Linkname)[1:]}
		}
		if len(a.files) > maxArchiveEntries {
			return nil, fmt.Errorf("%w: an archive of more than %d files", ErrTooLarge, maxArchiveEntries)
		}
	}
}

// Open implements fs.FS.
func (a *archive) Open(name string) (fs.File, error) {
	f, err := a.find(name)
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: name, Err: err}
	}
	return &openedFile{io.NewSectionReader(a.r, f.offset, f.size), path.Base(name)}, nil
}

func (a *archive) find(name string) (archiveFile, error) {
	for range maxSymlinks {
		f, ok := a.files[strings.TrimPrefix(name, "./")]
		if !ok {
			return f, fs.ErrNotExist
		}
		if f.link == "" {
			return f, nil
		}
		name = f.link
	}
	return archiveFile{}, errors.New("too many links")
}

// An openedFile implements fs.File and fs.FileInfo.
type openedFile struct {
	*io.SectionReader
	name string
}

func (f *openedFile) Stat() (fs.FileInfo, error) { return f, nil }
func (f *openedFile) Close() error               { return nil }
func (f *openedFile) Name() string               { return f.name }
func (f *openedFile) Mode() fs.FileMode          { return 0o444 }
func (f *openedFile) ModTime() time.Time         { return time.Time{} }
func (f *openedFile) IsDir() bool                { return false }
func (f *openedFile) Sys() any                   { return nil }
