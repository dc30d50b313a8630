package image

import (
	"archive/tar"
	"errors"
	"fmt"
	"io"
	"path"
	"strings"
	"time"
)

// bounds of one layer's content. They are far above every image seen and keep what a hostile layer can make us remember
// and compute within about a gigabyte and half a minute.
type bounds struct {
	entries  int
	devices  int
	metadata int   // bytes of names, link targets and extended attributes
	steps    int   // path components looked up
	content  int64 // bytes of all regular files, which sparse entries can make far larger than the tar
}

func layerBounds(content int64) bounds {
	return bounds{entries: 2 << 20, devices: 4096, metadata: 256 << 20, steps: 64 << 20, content: content}
}

const (
	maxPath     = 4095 // PATH_MAX
	maxName     = 255  // NAME_MAX
	maxSymlinks = 40   // followed for one entry, as Linux does
	// maxFile is the largest file that tar2ext4 describes correctly: beyond 340 extents of 128 MiB it is wrong.
	maxFile = 339 * 128 << 20
)

const (
	whiteoutPrefix = ".wh."          // image-spec layer.md, "Whiteouts"
	whiteoutMeta   = ".wh..wh."      // aufs's own records, which docker skips
	whiteoutOpaque = ".wh..wh..opq"  // image-spec layer.md, "Opaque Whiteout"
	xattrRecord    = "SCHILY.xattr." // pax key of an extended attribute
)

// A tree is what unpacking a layer's tar into an empty directory gives, held in memory but for the file contents: for
// those it knows where in the tar they are. Building it first makes tar's rules hold (the last entry of a name wins, a
// file may replace a directory, hard links keep what their name meant then) in front of a writer that can only append.
type tree struct {
	root     *file
	bounds   bounds
	entries  int
	devices  int
	metadata int
	steps    int
	content  int64 // bytes of regular files
}

// A file is one inode of a tree.
type file struct {
	typ          byte // tar.TypeReg, TypeDir, TypeSymlink, TypeChar, TypeBlock, TypeFifo
	mode         int64
	uid, gid     int
	mtime        time.Time
	size         int64
	offset       int64 // of the content in the tar; of the header where sparse
	sparse       bool
	link         string // target of a symbolic link
	major, minor int64
	xattrs       map[string]string

	children map[string]*file // of a directory
	parent   *file            // of a directory
	pathLen  int              // of a directory: length of its path
	opaque   bool             // a directory that hides what lower layers have in it
	whiteout bool             // the name is deleted
}

func newTree(b bounds) *tree {
	return &tree{bounds: b, root: &file{typ: tar.TypeDir, mode: 0o755, children: make(map[string]*file)}}
}

// An entryError says which entry of a layer is refused.
type entryError struct {
	name string
	msg  string
	kind error
}

func (e *entryError) Error() string { return fmt.Sprintf("entry %.200q %s", e.name, e.msg) }
func (e *entryError) Unwrap() error { return e.kind }

func refuse(name, format string, args ...any) error {
	return &entryError{name, fmt.Sprintf(format, args...), ErrRefused}
}

// countingReader knows how far it has read.
type countingReader struct {
	r io.Reader
	n int64
}

func (c *countingReader) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.n += int64(n)
	return n, err
}

// scanTar reads an uncompressed layer to its end and returns its tree.
func scanTar(r io.Reader, b bounds) (*tree, error) {
	t := newTree(b)
	cr := &countingReader{r: r}
	tr := tar.NewReader(cr)
	for {
		// The previous entry is read to its end, so the next header follows after the padding of its last block.
		start := (cr.n + 511) &^ 511
		h, err := tr.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			return nil, corruptTar(err)
		}
		if h.Typeflag == tar.TypeXGlobalHeader {
			continue
		}
		if err := t.add(h, start, cr.n); err != nil {
			return nil, err
		}
		if _, err := io.Copy(io.Discard, tr); err != nil {
			return nil, corruptTar(err)
		}
	}
	// Whatever follows the end mark belongs to the digest.
	if _, err := io.Copy(io.Discard, cr); err != nil {
		return nil, corruptTar(err)
	}
	return t, nil
}

// corruptTar adds the sentinel to what archive/tar finds wrong with the bytes, and leaves errors of the reader below.
func corruptTar(err error) error {
	if errors.Is(err, ErrCorrupt) {
		return err
	}
	if errors.Is(err, tar.ErrHeader) || errors.Is(err, tar.ErrFieldTooLong) {
		return fmt.Errorf("%w: not a valid tar: %w", ErrCorrupt, err)
	}
	if errors.Is(err, io.ErrUnexpectedEOF) {
		return fmt.Errorf("%w: the tar ends too early", ErrCorrupt)
	}
	return err
}

func (t *tree) add(h *tar.Header, header, content int64) error {
	dir, base, err := splitEntry(h.Name, h.Name)
	if err != nil {
		return err
	}
	for key, value := range h.PAXRecords {
		if strings.HasPrefix(key, xattrRecord) {
			t.metadata += len(key) + len(value)
		}
	}
	t.metadata += len(base) + len(h.Linkname)
	if t.metadata > t.bounds.metadata {
		return &entryError{h.Name, fmt.Sprintf("is one too many: names and attributes take over %s", formatSize(int64(t.bounds.metadata))), ErrTooLarge}
	}
	if base == "" {
		if h.Typeflag != tar.TypeDir {
			return refuse(h.Name, "is the root of the layer and no directory")
		}
		return t.describe(t.root, h, h.Name)
	}
	parent, err := t.directory(dir, h.Name)
	if err != nil {
		return err
	}
	if strings.HasPrefix(base, whiteoutPrefix) {
		return t.addWhiteout(parent, base, h.Name)
	}
	if parent.pathLen+1+len(base) > maxPath {
		return refuse(h.Name, "has a path of more than %d bytes", maxPath)
	}

	if h.Typeflag == tar.TypeLink {
		target, err := t.linkTarget(h)
		if err != nil {
			return err
		}
		return t.put(parent, base, target, h.Name)
	}
	old := parent.children[base]
	if h.Typeflag == tar.TypeDir && old != nil && old.typ == tar.TypeDir {
		return t.describe(old, h, h.Name)
	}
	f := &file{typ: h.Typeflag}
	switch h.Typeflag {
	case tar.TypeReg, tar.TypeCont, tar.TypeGNUSparse:
		f.typ = tar.TypeReg
		f.sparse = isSparse(h)
		f.size, f.offset = h.Size, content
		if f.sparse {
			f.offset = header
		}
		if f.size > maxFile {
			return &entryError{h.Name, fmt.Sprintf("has %s: more than %s in one file can't be converted", formatSize(f.size), formatSize(maxFile)), ErrTooLarge}
		}
		if f.size > t.bounds.content-t.content {
			return &entryError{h.Name, fmt.Sprintf("makes the layer larger than %s", formatSize(t.bounds.content)), ErrTooLarge}
		}
		t.content += f.size
	case tar.TypeDir:
		f.children = make(map[string]*file)
		f.opaque = old != nil && old.whiteout
	case tar.TypeSymlink:
		f.link = strings.Clone(h.Linkname)
		if f.link == "" || len(f.link) > maxPath {
			return refuse(h.Name, "is a symbolic link of %d bytes, not 1 to %d", len(f.link), maxPath)
		}
	case tar.TypeChar, tar.TypeBlock:
		if t.devices++; t.devices > t.bounds.devices {
			return refuse(h.Name, "is one too many: a layer may have %d device nodes", t.bounds.devices)
		}
		f.major, f.minor = h.Devmajor, h.Devminor
		if f.major < 0 || f.major >= 1<<12 || f.minor < 0 || f.minor >= 1<<20 {
			return refuse(h.Name, "is a device with the impossible number %d:%d", f.major, f.minor)
		}
	case tar.TypeFifo:
	default:
		return refuse(h.Name, "is of the unknown type %q", h.Typeflag)
	}
	if err := t.describe(f, h, h.Name); err != nil {
		return err
	}
	return t.put(parent, base, f, h.Name)
}

// isSparse says whether archive/tar expands the entry: old GNU's type, or any of the three pax variants.
func isSparse(h *tar.Header) bool {
	if h.Typeflag == tar.TypeGNUSparse {
		return true
	}
	for key := range h.PAXRecords {
		if strings.HasPrefix(key, "GNU.sparse.") {
			return true
		}
	}
	return false
}

// describe sets what every kind of entry has.
func (t *tree) describe(f *file, h *tar.Header, name string) error {
	if h.Uid < 0 || int64(h.Uid) > 1<<32-2 || h.Gid < 0 || int64(h.Gid) > 1<<32-2 {
		return refuse(name, "has the impossible owner %d:%d", h.Uid, h.Gid)
	}
	f.mode, f.uid, f.gid, f.mtime = h.Mode&0o7777, h.Uid, h.Gid, h.ModTime
	xattrs, err := ext4Xattrs(h.PAXRecords, f.mode)
	if err != nil {
		return refuse(name, "%v", err)
	}
	f.xattrs = xattrs
	return nil
}

// put gives f one more name. A name that exists is replaced with all that is below it, as unpacking would.
func (t *tree) put(dir *file, base string, f *file, name string) error {
	if dir.children[base] == nil {
		if t.entries++; t.entries > t.bounds.entries {
			return &entryError{name, fmt.Sprintf("is one too many: a layer may have %d", t.bounds.entries), ErrTooLarge}
		}
	}
	if f.typ == tar.TypeDir {
		f.parent = dir
		f.pathLen = dir.pathLen + 1 + len(base)
	}
	dir.children[strings.Clone(base)] = f
	return nil
}

// addWhiteout notes a deletion. Its place in the tar means nothing: it deletes what lower layers have, never what this
// one brings.
func (t *tree) addWhiteout(dir *file, base, name string) error {
	if base == whiteoutOpaque {
		dir.opaque = true
		return nil
	}
	if strings.HasPrefix(base, whiteoutMeta) {
		return nil
	}
	victim := base[len(whiteoutPrefix):]
	if victim == "" || victim == "." || victim == ".." {
		return refuse(name, "is a whiteout of nothing")
	}
	if f := dir.children[victim]; f != nil {
		if f.typ == tar.TypeDir {
			f.opaque = true
		}
		return nil
	}
	return t.put(dir, victim, &file{typ: tar.TypeChar, whiteout: true}, name)
}

// linkTarget finds the file that a hard link names. Like docker, a name that starts with / starts at the layer's root.
func (t *tree) linkTarget(h *tar.Header) (*file, error) {
	dir, base, err := splitEntry(h.Linkname, h.Name)
	if err != nil {
		return nil, refuse(h.Name, "is a hard link to %.200q, outside of the layer", h.Linkname)
	}
	d := t.root
	if dir != "" {
		if d, err = t.walk(dir, h.Name, false); err != nil {
			return nil, err
		}
	}
	var f *file
	if d != nil {
		f = d.children[base]
	}
	switch {
	case f == nil || f.whiteout:
		return nil, refuse(h.Name, "is a hard link to %.200q, which is not in the layer", h.Linkname)
	case f.typ == tar.TypeDir:
		return nil, refuse(h.Name, "is a hard link to the directory %.200q", h.Linkname)
	}
	return f, nil
}

// splitEntry cleans an entry's name and splits off its last component. A name may be absolute and may contain . and ..,
// but must not climb above the root at any point.
func splitEntry(name, entry string) (dir, base string, err error) {
	if len(name) > maxPath+1 {
		return "", "", refuse(entry, "has a path of more than %d bytes", maxPath)
	}
	if strings.IndexByte(name, 0) >= 0 {
		return "", "", refuse(entry, "has a NUL byte in its path")
	}
	depth := 0
	for c := range strings.SplitSeq(name, "/") {
		switch c {
		case "", ".":
		case "..":
			if depth--; depth < 0 {
				return "", "", refuse(entry, "points out of the layer")
			}
		default:
			if len(c) > maxName {
				return "", "", refuse(entry, "has a name of more than %d bytes", maxName)
			}
			depth++
		}
	}
	dir, base = path.Split(path.Clean("/" + name)[1:])
	return strings.TrimSuffix(dir, "/"), base, nil
}

// directory returns the directory at a clean path, making what is missing: many tars have no entries for the directories
// that they share with lower layers.
func (t *tree) directory(dir, entry string) (*file, error) {
	if dir == "" {
		return t.root, nil
	}
	return t.walk(dir, entry, true)
}

// walk follows a clean path, through symbolic links as unpacking would, never out of the tree. Without create it
// returns nil where the path doesn't lead to a directory.
func (t *tree) walk(dir, entry string, create bool) (*file, error) {
	at, links := t.root, 0
	rest := strings.Split(dir, "/")
	for len(rest) > 0 {
		if t.steps++; t.steps > t.bounds.steps {
			return nil, &entryError{entry, "is one too many: the layer's paths are too deep", ErrTooLarge}
		}
		c := rest[0]
		rest = rest[1:]
		switch c {
		case "", ".":
			continue
		case "..":
			if at.parent != nil {
				at = at.parent
			}
			continue
		}
		next := at.children[c]
		switch {
		case next == nil || next.whiteout:
			if !create {
				return nil, nil
			}
			if strings.HasPrefix(c, whiteoutPrefix) {
				return nil, refuse(entry, "is inside a whiteout")
			}
			if len(c) > maxName || at.pathLen+1+len(c) > maxPath {
				return nil, refuse(entry, "has a path of more than %d bytes", maxPath)
			}
			t.metadata += len(c)
			// The mode of an implied directory is docker's (moby pkg/archive, ImpliedDirectoryMode).
			implied := &file{typ: tar.TypeDir, mode: 0o755, children: make(map[string]*file), opaque: next != nil}
			if err := t.put(at, c, implied, entry); err != nil {
				return nil, err
			}
			at = implied
		case next.typ == tar.TypeSymlink:
			if links++; links > maxSymlinks {
				return nil, refuse(entry, "is behind more than %d symbolic links", maxSymlinks)
			}
			if strings.HasPrefix(next.link, "/") {
				at = t.root
			}
			target := strings.Split(next.link, "/")
			rest = append(target[:len(target):len(target)], rest...)
		case next.typ == tar.TypeDir:
			at = next
		default:
			if !create {
				return nil, nil
			}
			return nil, refuse(entry, "is inside %.200q, which is no directory", c)
		}
	}
	return at, nil
}
