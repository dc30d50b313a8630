package seal

import (
	"archive/tar"
	"fmt"
	"maps"
	"math"
	"path"
	"slices"
	"strings"
	"time"
)

// Kind is what an entry is, as the letter that ls shows.
type Kind byte

// The kinds of an entry. A hard link names an earlier File.
const (
	File     Kind = '-'
	Dir      Kind = 'd'
	Symlink  Kind = 'l'
	Hardlink Kind = 'h'
	CharDev  Kind = 'c'
	BlockDev Kind = 'b'
	FIFO     Kind = 'p'
)

// Entry is one member of an image: what the format keeps of a tar header.
type Entry struct {
	Path string // relative, clean, without a leading ./ or a trailing /
	Kind Kind
	// Mode is the twelve permission bits as POSIX numbers them (04000 setuid).
	Mode     uint32
	UID, GID int
	ModTime  int64 // seconds since 1970
	Size     int64 // of a File
	// Link is a Symlink's target, verbatim, or the path of a Hardlink's File.
	Link         string
	Major, Minor uint32 // of a device
	// Xattrs are extended attributes by their full name ("security.capability").
	Xattrs map[string]string
}

const (
	maxPath      = 4095      // PATH_MAX without its NUL
	maxComponent = 255       // NAME_MAX
	maxDepth     = 256       // folders open at once while unpacking
	meanName     = 256       // bytes that an entry's names may have on average, since a reader remembers them
	maxTime      = 1<<33 - 1 // what eleven octal digits of tar hold: the year 2242
	xattrRecord  = "SCHILY.xattr."
	maxID        = math.MaxUint32 - 1 // (uid_t)-1 means "leave it" to chown
)

// IsDevice reports whether unpacking the entry makes a device node or a pipe.
func (e *Entry) IsDevice() bool { return e.Kind == CharDev || e.Kind == BlockDev || e.Kind == FIFO }

// CompareDepthFirst orders paths component by component, so that a folder comes
// right before all that is in it.
func CompareDepthFirst(a, b string) int {
	for {
		ac, arest, amore := strings.Cut(a, "/")
		bc, brest, bmore := strings.Cut(b, "/")
		if c := strings.Compare(ac, bc); c != 0 {
			return c
		}
		switch {
		case !amore && !bmore:
			return 0
		case !amore:
			return -1
		case !bmore:
			return 1
		}
		a, b = arest, brest
	}
}

// checkPath refuses every path that isn't the one way to write a place below
// the root.
func checkPath(p string) error {
	switch {
	case p == "" || p == ".":
		return fmt.Errorf("%w: an entry without a name", ErrFormat)
	case len(p) > maxPath:
		return fmt.Errorf("%w: a path of %d bytes", ErrFormat, len(p))
	case path.IsAbs(p):
		return fmt.Errorf("%w: absolute path %q", ErrFormat, p)
	case p == ".." || strings.HasPrefix(p, "../") || strings.Contains(p, "/../") || strings.HasSuffix(p, "/.."):
		return fmt.Errorf("%w: path %q leaves the image", ErrFormat, p)
	case path.Clean(p) != p:
		return fmt.Errorf("%w: path %q is not clean", ErrFormat, p)
	case strings.ContainsRune(p, 0):
		return fmt.Errorf("%w: NUL in path %q", ErrFormat, p)
	}
	if strings.Count(p, "/") >= maxDepth {
		return fmt.Errorf("%w: path %q is more than %d folders deep", ErrFormat, p, maxDepth)
	}
	for c := range strings.SplitSeq(p, "/") {
		if len(c) > maxComponent {
			return fmt.Errorf("%w: a file name of %d bytes in %q", ErrFormat, len(c), p)
		}
	}
	return nil
}

// check refuses an entry that could not be written, or not without doubt about
// what it means.
func (e *Entry) check() error {
	if err := checkPath(e.Path); err != nil {
		return err
	}
	switch e.Kind {
	case File, Dir, CharDev, BlockDev, FIFO:
		if e.Link != "" {
			return fmt.Errorf("%w: %q has a link target and is no link", ErrFormat, e.Path)
		}
	case Symlink:
		if e.Link == "" || len(e.Link) > maxPath || strings.ContainsRune(e.Link, 0) {
			return fmt.Errorf("%w: symbolic link %q has no usable target", ErrFormat, e.Path)
		}
	case Hardlink:
		if err := checkPath(e.Link); err != nil {
			return fmt.Errorf("hard link %q: %w", e.Path, err)
		}
	default:
		return fmt.Errorf("%w: %q is of unknown kind %q", ErrFormat, e.Path, e.Kind)
	}
	switch {
	case e.Size < 0 || e.Size != 0 && e.Kind != File:
		return fmt.Errorf("%w: %q has size %d", ErrFormat, e.Path, e.Size)
	case e.ModTime < 0 || e.ModTime > maxTime:
		return fmt.Errorf("%w: %q has time stamp %d", ErrFormat, e.Path, e.ModTime)
	case e.Mode&^0o7777 != 0:
		return fmt.Errorf("%w: %q has mode %o", ErrFormat, e.Path, e.Mode)
	case e.UID < 0 || e.GID < 0 || int64(e.UID) > maxID || int64(e.GID) > maxID:
		return fmt.Errorf("%w: %q belongs to %d:%d", ErrFormat, e.Path, e.UID, e.GID)
	case e.Kind == Symlink && e.Mode != 0o777:
		return fmt.Errorf("%w: symbolic link %q has mode %o", ErrFormat, e.Path, e.Mode)
	case len(e.Xattrs) > 0 && e.Kind != File && e.Kind != Dir:
		return fmt.Errorf("%w: %q has extended attributes and is no file or folder", ErrFormat, e.Path)
	}
	for k, v := range e.Xattrs {
		if !KeepXattr(k) || len(k) > 255 || len(v) > 64<<10 || strings.ContainsAny(k, "=\x00") {
			return fmt.Errorf("%w: extended attribute %q of %q", ErrFormat, k, e.Path)
		}
	}
	return nil
}

// KeepXattr reports whether the format has an extended attribute: what a
// program needs at run time. security.selinux and the like belong to a machine.
func KeepXattr(name string) bool {
	return name == "security.capability" || strings.HasPrefix(name, "user.")
}

var kinds = map[byte]Kind{
	tar.TypeReg: File, tar.TypeDir: Dir, tar.TypeSymlink: Symlink, tar.TypeLink: Hardlink,
	tar.TypeChar: CharDev, tar.TypeBlock: BlockDev, tar.TypeFifo: FIFO,
}

// FromHeader takes over a tar header. Sparse files, global headers and kinds
// that no file system knows are refused.
func FromHeader(h *tar.Header) (*Entry, error) {
	kind, ok := kinds[h.Typeflag]
	if !ok {
		return nil, fmt.Errorf("%w: %q is a tar member of type %q", ErrFormat, h.Name, h.Typeflag)
	}
	e := &Entry{
		Path: h.Name, Kind: kind, Mode: uint32(h.Mode & math.MaxUint32), UID: h.Uid, GID: h.Gid,
		ModTime: h.ModTime.Unix(), Size: h.Size, Link: h.Linkname,
	}
	switch kind {
	case Dir:
		e.Path = strings.TrimSuffix(e.Path, "/")
	case CharDev, BlockDev:
		if h.Devmajor < 0 || h.Devminor < 0 || h.Devmajor > math.MaxUint32 || h.Devminor > math.MaxUint32 {
			return nil, fmt.Errorf("%w: device number of %q", ErrFormat, h.Name)
		}
		e.Major, e.Minor = uint32(h.Devmajor), uint32(h.Devminor)
	}
	for k, v := range h.PAXRecords {
		if strings.HasPrefix(k, "GNU.sparse.") {
			return nil, fmt.Errorf("%w: %q is a sparse file", ErrFormat, h.Name)
		}
		if name, ok := strings.CutPrefix(k, xattrRecord); ok {
			if e.Xattrs == nil {
				e.Xattrs = make(map[string]string)
			}
			e.Xattrs[name] = v
		}
	}
	return e, e.check()
}

// header is the entry as tar writes it: GNU's form, which the smallest
// programs read, and PAX only for extended attributes.
func (e *Entry) header() *tar.Header {
	h := &tar.Header{
		Name: e.Path, Mode: int64(e.Mode), Uid: e.UID, Gid: e.GID, ModTime: time.Unix(e.ModTime, 0),
		Size: e.Size, Linkname: e.Link, Devmajor: int64(e.Major), Devminor: int64(e.Minor), Format: tar.FormatGNU,
	}
	for t, k := range kinds {
		if k == e.Kind {
			h.Typeflag = t
		}
	}
	if e.Kind == Dir {
		h.Name += "/"
	}
	if len(e.Xattrs) > 0 {
		h.Format = tar.FormatPAX
		h.PAXRecords = make(map[string]string, len(e.Xattrs))
		for k, v := range e.Xattrs {
			h.PAXRecords[xattrRecord+k] = v
		}
	}
	return h
}

// guard holds the rules between entries: strictly ascending, the description
// first, every parent a folder that came before, every hard link to a file that
// came before. What passes can be unpacked without a name being used twice and
// without a link being followed.
type guard struct {
	last  string
	count int
	max   int
	names int // bytes of all paths, which are kept
	dirs  map[string]bool
	files map[string]attributes
}

// attributes are an inode's, which its hard links repeat.
type attributes struct {
	mode     uint32
	uid, gid int
	mtime    int64
}

func (e *Entry) attributes() attributes { return attributes{e.Mode, e.UID, e.GID, e.ModTime} }

func newGuard(maxEntries int) *guard {
	return &guard{max: maxEntries, dirs: map[string]bool{".": true}, files: make(map[string]attributes)}
}

func (g *guard) admit(e *Entry) error {
	if g.count++; g.count > g.max {
		return fmt.Errorf("%w: more than %d entries: raise --max-entries if that is right", ErrTooLarge, g.max)
	}
	if g.names += len(e.Path) + len(e.Link); g.names/meanName > g.max {
		return fmt.Errorf("%w: names of more than %d bytes in %d entries: raise --max-entries if that is right", ErrTooLarge, g.max*meanName, g.count)
	}
	switch {
	case g.count == 1:
		if e.Path != ImageDir || e.Kind != Dir {
			return fmt.Errorf("%w: it starts with %q, not with %s", ErrFormat, e.Path, ImagePath)
		}
	case g.count == 2:
		if e.Path != ImagePath || e.Kind != File || e.Size > maxImageBytes {
			return fmt.Errorf("%w: %s is missing", ErrFormat, ImagePath)
		}
	case e.Path == ImageDir || strings.HasPrefix(e.Path, ImageDir+"/"):
		return fmt.Errorf("%w: %q is in a folder that is bali's own", ErrFormat, e.Path)
	case g.count == 3: // the order starts anew after the description
	case e.Path == g.last:
		return fmt.Errorf("%w: %q appears twice", ErrFormat, e.Path)
	case CompareDepthFirst(g.last, e.Path) > 0:
		return fmt.Errorf("%w: %q comes after %q: entries are not in order", ErrFormat, e.Path, g.last)
	}
	if dir := path.Dir(e.Path); !g.dirs[dir] {
		return fmt.Errorf("%w: %q lies in %q, which is no folder of the image", ErrFormat, e.Path, dir)
	}
	g.last = e.Path
	switch e.Kind {
	case Dir:
		g.dirs[e.Path] = true
	case File:
		g.files[e.Path] = e.attributes()
	case Hardlink:
		file, ok := g.files[e.Link]
		if !ok {
			return fmt.Errorf("%w: %q is a hard link to %q, which is no earlier file of the image", ErrFormat, e.Path, e.Link)
		}
		if file != e.attributes() {
			return fmt.Errorf("%w: hard link %q has other attributes than %q", ErrFormat, e.Path, e.Link)
		}
	}
	return nil
}

// line is the entry in the canonical listing that Tree hashes; digest is a
// File's fs-verity digest in hex.
func (e *Entry) line(digest string) string {
	var b strings.Builder
	fmt.Fprintf(&b, "%c %o %d %d %d %d %s", e.Kind, e.Mode, e.UID, e.GID, e.ModTime, e.Size, escape(e.Path))
	switch e.Kind {
	case File:
		b.WriteString(" " + digest)
	case Symlink, Hardlink:
		b.WriteString(" " + escape(e.Link))
	case CharDev, BlockDev:
		fmt.Fprintf(&b, " %d:%d", e.Major, e.Minor)
	}
	for _, k := range slices.Sorted(maps.Keys(e.Xattrs)) {
		fmt.Fprintf(&b, " %s=%x", escape(k), e.Xattrs[k])
	}
	return b.String() + "\n"
}

// escape writes every byte outside of printable ASCII, and % and =, as %xx.
func escape(s string) string {
	var b strings.Builder
	for i := range len(s) {
		if c := s[i]; c <= ' ' || c >= 0x7f || c == '%' || c == '=' {
			fmt.Fprintf(&b, "%%%02x", c)
		} else {
			b.WriteByte(c)
		}
	}
	return b.String()
}
