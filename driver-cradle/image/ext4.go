package image

import (
	"archive/tar"
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"slices"
	"strings"
	"time"

	"github.com/Microsoft/hcsshim/ext4/tar2ext4"
)

// writeExt4 writes the tree as an ext4 file system; content is the tar that the tree was scanned from. Equal trees give
// equal bytes.
//
// The conversion is tar2ext4's. It sees a tar that holds every file exactly once, parents before children, with what it
// would get wrong already put right: see fsTime and ext4Xattrs. What remains is put right afterwards: see fixRoot and
// padBitmaps.
func writeExt4(t *tree, content io.ReaderAt, out *sparseFile) error {
	stand := standIn(t.root)
	pr, pw := io.Pipe()
	done := make(chan struct{})
	go func() {
		defer close(done)
		buf := bufio.NewWriterSize(pw, 256<<10)
		e := &emitter{
			tar: tar.NewWriter(buf), content: content, first: make(map[*file]string), standIn: stand,
			buf: make([]byte, 256<<10),
		}
		err := e.emit(t.root, "")
		if err == nil {
			err = e.tar.Close()
		}
		if err == nil {
			err = buf.Flush()
		}
		pw.CloseWithError(err)
	}()
	// Twice the content and room for each inode is more than any tree takes; what it bounds is only the space kept for
	// group descriptors, one block for each 16 GiB.
	limit := 2*t.content + int64(t.entries)*16<<10 + 1<<30
	err := tar2ext4.ConvertTarToExt4(pr, out, tar2ext4.MaximumDiskSize(limit))
	pr.CloseWithError(errStopped)
	<-done
	if err != nil {
		return err
	}
	if err := out.finish(); err != nil {
		return err
	}
	p := &patcher{file: out.file}
	fixRoot(p, stand)
	padBitmaps(p)
	if p.err != nil {
		return fmt.Errorf("ext4 structures: %w", p.err)
	}
	return nil
}

var errStopped = errors.New("conversion ended")

// An emitter writes a tree as a tar stream.
type emitter struct {
	tar     *tar.Writer
	content io.ReaderAt
	first   map[*file]string // first path of files that were written
	standIn string           // what the layer's own lost+found is called for now
	buf     []byte
}

func (e *emitter) emit(f *file, name string) error {
	if err := e.write(f, name); err != nil {
		return err
	}
	names := make([]string, 0, len(f.children))
	for n := range f.children {
		names = append(names, n)
	}
	slices.Sort(names)
	for _, n := range names {
		child := f.children[n]
		if f.parent == nil && n == lostFound && e.standIn != "" {
			n = e.standIn
		}
		if err := e.emit(child, path.Join(name, n)); err != nil {
			return err
		}
	}
	return nil
}

func (e *emitter) write(f *file, name string) error {
	h := &tar.Header{
		Format: tar.FormatPAX, Typeflag: f.typ, Name: name, Mode: f.mode, Uid: f.uid, Gid: f.gid,
		Linkname: f.link, Devmajor: f.major, Devminor: f.minor,
	}
	h.ModTime = fsTime(f.mtime)
	h.AccessTime, h.ChangeTime = h.ModTime, h.ModTime
	for k, v := range f.xattrs {
		if h.PAXRecords == nil {
			h.PAXRecords = make(map[string]string)
		}
		h.PAXRecords[xattrRecord+k] = v
	}
	switch f.typ {
	case tar.TypeDir:
		h.Name += "/"
		if f.opaque {
			if h.PAXRecords == nil {
				h.PAXRecords = make(map[string]string)
			}
			h.PAXRecords[xattrRecord+"trusted.overlay.opaque"] = "y"
		}
		return e.header(h)
	case tar.TypeReg:
		h.Size = f.size
	}
	if !f.whiteout {
		if first, ok := e.first[f]; ok {
			return e.header(&tar.Header{Format: tar.FormatPAX, Typeflag: tar.TypeLink, Name: name, Linkname: first})
		}
		e.first[f] = name
	}
	if err := e.header(h); err != nil || h.Size == 0 {
		return err
	}
	r, err := f.open(e.content)
	if err != nil {
		return err
	}
	if _, err := io.CopyBuffer(e.tar, r, e.buf); err != nil {
		return fmt.Errorf("read %s again: %w", name, err)
	}
	return nil
}

func (e *emitter) header(h *tar.Header) error {
	if err := e.tar.WriteHeader(h); err != nil {
		return fmt.Errorf("entry %.200q: %w", h.Name, err)
	}
	return nil
}

// open returns the content of a regular file.
func (f *file) open(content io.ReaderAt) (io.Reader, error) {
	if !f.sparse {
		return io.NewSectionReader(content, f.offset, f.size), nil
	}
	tr := tar.NewReader(io.NewSectionReader(content, f.offset, 1<<62))
	if _, err := tr.Next(); err != nil {
		return nil, err
	}
	return tr, nil
}

// fsTime returns what to tell tar2ext4 so that Linux reads t. ext4 has a signed 32-bit second and two bits that count
// wraps of 2³² (fs/ext4/ext4.h, "extra" time bits); tar2ext4 stores the low 34 bits of the number as it is, which is off
// by one wrap wherever bit 31 is set: before 1970, and again from 2038 on.
func fsTime(t time.Time) time.Time {
	const lowest, highest = -1 << 31, 0x37fffffff - 1<<32
	s := t.Unix()
	if t.IsZero() || s < lowest {
		return time.Unix(0, 0)
	}
	if s > highest {
		return time.Unix(highest, 0)
	}
	if s&(1<<31) != 0 {
		s += 1 << 32
	}
	return time.Unix(s, int64(t.Nanosecond()))
}

// Space for extended attributes in an inode of 256 bytes and in the one block beside it, as tar2ext4 lays them out.
const (
	xattrInInode = 256 - 152 - 8
	xattrInBlock = 4096 - 36
	// xattrOrdered is how many attributes in the block tar2ext4 sorts correctly.
	xattrOrdered = 12
)

// ext4Xattrs returns the extended attributes among an entry's pax records as ext4 stores them. Those of overlayfs itself
// describe the builder's storage and are dropped, like those of other systems, which Linux can't store.
func ext4Xattrs(records map[string]string, mode int64) (map[string]string, error) {
	var xattrs map[string]string
	for key, value := range records {
		name, ok := strings.CutPrefix(key, xattrRecord)
		if !ok || strings.HasPrefix(name, "trusted.overlay.") {
			continue
		}
		namespace, rest, _ := strings.Cut(name, ".")
		switch namespace {
		case "user", "trusted", "security":
			if rest == "" || len(name) > maxName {
				return nil, fmt.Errorf("has an extended attribute with the impossible name %.300q", name)
			}
		case "system":
			if name != aclAccess && name != aclDefault {
				continue
			}
			acl, err := ext4ACL(value, name == aclAccess, mode)
			if err != nil {
				return nil, fmt.Errorf("has a bad %s: %w", name, err)
			}
			value = acl
		default:
			continue
		}
		if xattrs == nil {
			xattrs = make(map[string]string)
		}
		xattrs[name] = value
	}
	if !xattrsFit(xattrs) {
		return nil, errors.New("has more extended attributes than ext4 can store with one file (4 KiB)")
	}
	return xattrs, nil
}

// xattrsFit says whether there is room for the attributes, also when trusted.overlay.opaque=y joins them and pushes
// others out of the inode.
func xattrsFit(xattrs map[string]string) bool {
	inode, block, ordered := xattrInInode, xattrInBlock-xattrInInode, xattrOrdered-4
	names := make([]string, 0, len(xattrs))
	for name := range xattrs {
		names = append(names, name)
	}
	slices.Sort(names)
	for _, name := range names {
		_, suffix, _ := strings.Cut(name, ".")
		n := 16 + (len(suffix)+3)&^3 + (len(xattrs[name])+3)&^3
		if inode >= n {
			inode -= n
			continue
		}
		block -= n
		if ordered--; block < 0 || ordered < 0 {
			return false
		}
	}
	return true
}

const (
	aclAccess  = "system.posix_acl_access"
	aclDefault = "system.posix_acl_default"
)

// Kinds of entries in an access control list (linux/posix_acl.h).
const (
	aclUserObj  = 0x01
	aclUser     = 0x02
	aclGroupObj = 0x04
	aclGroup    = 0x08
	aclMask     = 0x10
	aclOther    = 0x20
)

// ext4ACL turns the form that system calls and archives use (linux/posix_acl_xattr.h: version 2, 8 bytes an entry) into
// the one on disk (fs/ext4/acl.h: version 1, an id only where the entry names a user or group). tar2ext4 would store
// the former, and Linux then fails to open the file. Where an access list disagrees with the mode, the mode wins, as it
// does for every program that unpacks and then calls chmod.
func ext4ACL(value string, access bool, mode int64) (string, error) {
	b := []byte(value)
	if len(b) < 4 || (len(b)-4)%8 != 0 || binary.LittleEndian.Uint32(b) != 2 {
		return "", errors.New("not an access control list")
	}
	group := uint16(aclGroupObj)
	for e := b[4:]; len(e) > 0; e = e[8:] {
		if binary.LittleEndian.Uint16(e) == aclMask {
			group = aclMask
		}
	}
	out := binary.LittleEndian.AppendUint32(nil, 1)
	for e := b[4:]; len(e) > 0; e = e[8:] {
		tag, perm := binary.LittleEndian.Uint16(e), binary.LittleEndian.Uint16(e[2:])
		if access {
			switch tag {
			case aclUserObj:
				perm = uint16(mode >> 6 & 7)
			case group:
				perm = uint16(mode >> 3 & 7)
			case aclOther:
				perm = uint16(mode & 7)
			}
		}
		out = binary.LittleEndian.AppendUint16(out, tag)
		out = binary.LittleEndian.AppendUint16(out, perm)
		switch tag {
		case aclUser, aclGroup:
			out = append(out, e[4:8]...)
		case aclUserObj, aclGroupObj, aclMask, aclOther:
		default:
			return "", fmt.Errorf("unknown tag %#x", tag)
		}
	}
	return string(out), nil
}

const lostFound = "lost+found"

// standIn returns the name under which a layer's own lost+found is written until fixRoot: tar2ext4 makes that directory
// itself, and it can become neither a file nor a whiteout. It is "" where the layer has none.
func standIn(root *file) string {
	if root.children[lostFound] == nil {
		return ""
	}
	for i := 0; ; i++ {
		name := fmt.Sprintf("lost%06d", i)
		if root.children[name] == nil {
			return name
		}
	}
}

// Places in ext4's structures (Documentation/filesystems/ext4, and struct ext4_super_block and so on in fs/ext4/ext4.h).
const (
	ext4Block        = 4096
	ext4InodeSize    = 256
	ext4RootInode    = 2
	ext4LostInode    = 11
	sbBlocks         = 1024 + 0x04
	sbFreeBlocks     = 1024 + 0x0c
	sbFreeInodes     = 1024 + 0x10
	sbInodesPerGroup = 1024 + 0x28
	sbLostFound      = 1024 + 0x268
	gdSize           = 32
	gdBlockBitmap    = 0x00
	gdInodeBitmap    = 0x04
	gdInodeTable     = 0x08
	gdFreeBlocks     = 0x0c
	gdFreeInodes     = 0x0e
	gdUsedDirs       = 0x10
	inodeSizeLow     = 0x04
	inodeLinks       = 0x1a
	inodeBlock       = 0x28
	extentMagic      = 0xf30a
	blocksPerGroup   = 8 * ext4Block
)

// fixRoot removes the lost+found that tar2ext4 puts into every root directory: merged by overlayfs it would show up in
// each container, which docker's don't have. Then it gives the layer's own lost+found, if there is one, its name.
//
// The layout is known: no checksums, no journal, linear directories in one run of blocks, 32-byte group descriptors from
// block 1 on.
func fixRoot(p *patcher, standIn string) {
	group0 := int64(ext4Block)
	table := int64(p.u32(group0+gdInodeTable)) * ext4Block
	root := table + (ext4RootInode-1)*ext4InodeSize
	lost := table + (ext4LostInode-1)*ext4InodeSize
	rootBlock, rootBlocks := p.extent(root)
	lostBlock, lostBlocks := p.extent(lost)

	// The name: its record is added to the one before, which is "..".
	dot := rootBlock * ext4Block
	dotdot := dot + int64(p.u16(dot+4))
	entry := dotdot + int64(p.u16(dotdot+4))
	if p.u32(entry) != ext4LostInode || p.name(entry) != lostFound || lostBlocks != 1 {
		p.fail("lost+found is not where it belongs")
		return
	}
	p.put16(dotdot+4, p.u16(dotdot+4)+p.u16(entry+4))
	p.put(entry, make([]byte, 8+len(lostFound)+2))
	p.put16(root+inodeLinks, p.u16(root+inodeLinks)-1)

	// The inode.
	p.put(lost, make([]byte, ext4InodeSize))
	p.clearBit(int64(p.u32(group0+gdInodeBitmap))*ext4Block, ext4LostInode-1)
	p.put16(group0+gdFreeInodes, p.u16(group0+gdFreeInodes)+1)
	p.put16(group0+gdUsedDirs, p.u16(group0+gdUsedDirs)-1)
	p.put32(sbFreeInodes, p.u32(sbFreeInodes)+1)
	p.put32(sbLostFound, 0)

	// Its block.
	group := ext4Block + lostBlock/blocksPerGroup*gdSize
	p.put(lostBlock*ext4Block, make([]byte, ext4Block))
	p.clearBit(int64(p.u32(group+gdBlockBitmap))*ext4Block, lostBlock%blocksPerGroup)
	p.put16(group+gdFreeBlocks, p.u16(group+gdFreeBlocks)+1)
	p.put32(sbFreeBlocks, p.u32(sbFreeBlocks)+1)

	if standIn != "" {
		p.rename(rootBlock, rootBlocks, standIn)
	}
}

// padBitmaps sets the bits of each inode bitmap behind its last inode, which e2fsck wants and tar2ext4 leaves out.
func padBitmaps(p *patcher) {
	used := int64(p.u32(sbInodesPerGroup)) / 8
	groups := (int64(p.u32(sbBlocks)) + blocksPerGroup - 1) / blocksPerGroup
	for g := int64(0); g < groups && p.err == nil; g++ {
		bitmap := int64(p.u32(ext4Block+g*gdSize+gdInodeBitmap)) * ext4Block
		p.put(bitmap+used, bytes.Repeat([]byte{0xff}, int(max(ext4Block-used, 0))))
	}
}

// A patcher reads and writes little-endian numbers and keeps the first error.
type patcher struct {
	file *os.File
	err  error
}

func (p *patcher) fail(msg string) {
	if p.err == nil {
		p.err = errors.New(msg)
	}
}

func (p *patcher) get(off int64, n int) []byte {
	b := make([]byte, n)
	if p.err == nil {
		_, p.err = p.file.ReadAt(b, off)
	}
	return b
}

func (p *patcher) put(off int64, b []byte) {
	if p.err == nil {
		_, p.err = p.file.WriteAt(b, off)
	}
}

func (p *patcher) u16(off int64) uint16 { return binary.LittleEndian.Uint16(p.get(off, 2)) }
func (p *patcher) u32(off int64) uint32 { return binary.LittleEndian.Uint32(p.get(off, 4)) }

func (p *patcher) put16(off int64, v uint16) { p.put(off, binary.LittleEndian.AppendUint16(nil, v)) }

func (p *patcher) put32(off int64, v uint32) { p.put(off, binary.LittleEndian.AppendUint32(nil, v)) }

func (p *patcher) clearBit(bitmap, bit int64) {
	b := p.get(bitmap+bit/8, 1)
	b[0] &^= 1 << (bit % 8)
	p.put(bitmap+bit/8, b)
}

// extent returns first block and length of an inode's content, which lies in one run.
func (p *patcher) extent(inode int64) (block, blocks int64) {
	b := p.get(inode+inodeBlock, 24)
	if binary.LittleEndian.Uint16(b) != extentMagic || binary.LittleEndian.Uint16(b[6:]) != 0 {
		p.fail("unexpected extent tree")
	}
	return int64(binary.LittleEndian.Uint32(b[20:])), (int64(p.u32(inode+inodeSizeLow)) + ext4Block - 1) / ext4Block
}

// name of a directory entry.
func (p *patcher) name(entry int64) string {
	n := p.get(entry+6, 1)[0]
	return string(p.get(entry+8, int(n)))
}

// rename gives the root's entry from its stand-in's name, of the same length, the name lost+found.
func (p *patcher) rename(block, blocks int64, from string) {
	for i := int64(0); i < blocks && p.err == nil; i++ {
		b := p.get((block+i)*ext4Block, ext4Block)
		for off := 0; off+8 <= len(b); {
			n := int(binary.LittleEndian.Uint16(b[off+4:]))
			if n < 8 {
				p.fail("bad directory entry")
				return
			}
			if l := int(b[off+6]); l == len(from) && bytes.Equal(b[off+8:off+8+l], []byte(from)) {
				p.put((block+i)*ext4Block+int64(off)+8, []byte(lostFound))
				return
			}
			off += n
		}
	}
	p.fail("no entry " + from)
}
