package nfs

import (
	"encoding/binary"
	"errors"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/cradlestack/cradlestack/csi-plugin/filer/snapshots"
)

// maxName is the length of the longest name in a directory.
const maxName = 255

// name reads a filename3. One that is too long for a name, and not for the protocol, is an error of its own.
func (d *decoder) name() string { return string(d.opaque(unix.PathMax)) }

// checkName says what is wrong with a name: it is to be one step in a directory, and no path.
func checkName(name string) status {
	switch {
	case len(name) > maxName:
		return errNameTooLong
	case name == "":
		return errAcces
	case strings.ContainsAny(name, "/\x00"):
		return errAcces
	}
	return ok
}

// checkNew is checkName for names that are made, removed or changed.
func checkNew(name string) status {
	switch name {
	case ".":
		return errInval
	case "..":
		return errExist
	}
	return checkName(name)
}

// directory opens a directory. Whether the user may look a name up in it, or change it, the kernel says in the call that does so.
func (x *exchange) directory(handle []byte, flags int) (object, status) {
	o, s := x.object(handle, flags|unix.O_DIRECTORY)
	if s == ok && o.kind() != unix.S_IFDIR {
		o.close()
		s = errNotDir
	}
	return o, s
}

// place opens a directory in which a name is to be changed.
func (x *exchange) place(handle []byte, name string) (object, status) {
	o, s := x.directory(handle, unix.O_RDONLY)
	if s != ok {
		return o, s
	}
	switch {
	case x.export.ReadOnly || o.tree == nil:
		s = errROFS
	case o.leadsOn(name) && name == snapshots.Dir:
		s = errExist
	case o.hides(name):
		s = errAcces
	default:
		s = checkNew(name)
	}
	if s != ok {
		o.close()
	}
	return o, s
}

func lookup(x *exchange) status {
	handle, name := x.args.opaque(maxHandle), x.args.name()
	if x.args.bad {
		return garbage
	}
	dir, s := x.directory(handle, unix.O_PATH)
	if s != ok {
		return s
	}
	defer dir.close()
	if s := checkName(name); s != ok {
		return s
	}
	if dir.hides(name) {
		return errNoEnt
	}
	if dir.leadsOn(name) && !x.waits {
		return mustWait
	}
	o, err := x.child(dir, name)
	if err != nil {
		return statusOf(err)
	}
	defer o.close()
	found, err := o.handle()
	if err != nil {
		return statusOf(err)
	}
	x.out.uint32(uint32(ok))
	x.out.opaque(found)
	for _, o := range []*object{&o, &dir} { // as they were when they were opened, just now
		x.out.bool(true)
		x.out.fattr(o)
	}
	return ok
}

// child is object.child, as the user.
func (x *exchange) child(dir object, name string) (o object, err error) {
	if dir.leadsOn(name) { // to what is no user's
		if err := dir.may(x.user, unix.X_OK); err != nil {
			return object{fd: -1}, err
		}
		return dir.child(name)
	}
	err = x.user.as(func() (err error) {
		o, err = dir.child(name)
		return err
	})
	return o, err
}

// made answers for what was made in a directory, once it is on stable storage.
func (x *exchange) made(dir, o object) status {
	if err := x.sync(dir.fd, unix.Fsync); err != nil {
		return statusOf(err)
	}
	handle, err := o.handle()
	if err != nil {
		return statusOf(err)
	}
	x.out.uint32(uint32(ok))
	x.out.bool(true)
	x.out.opaque(handle)
	x.out.attributes(&o)
	x.out.changed(&dir)
	return ok
}

// How a file is created (RFC 1813 §3.3.8, createmode3).
const (
	unchecked = 0
	guarded   = 1
	exclusive = 2
)

func create(x *exchange) status {
	handle, name := x.args.opaque(maxHandle), x.args.name()
	how := x.args.uint32()
	var a sattr
	switch how {
	case unchecked, guarded:
		a = x.args.sattr()
	case exclusive:
		a = onlyOnce(x.args.uint64())
	default:
		return garbage
	}
	if x.args.bad {
		return garbage
	}
	dir, s := x.place(handle, name)
	if s != ok {
		return s
	}
	defer dir.close()
	var o object
	err := x.user.as(func() error {
		fd, err := unix.Openat(dir.fd, name, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, a.mode)
		if err != nil {
			return err
		}
		if o, err = dir.tree.adopt(x.export, fd); err != nil {
			return err
		}
		rest := a
		rest.setMode = a.mode&0o7000 != 0 // which O_CREAT may have left out
		return o.apply(rest)
	})
	if errors.Is(err, unix.EEXIST) && how != guarded {
		return x.recreate(dir, name, how, a)
	}
	if err != nil {
		if o.export != nil {
			o.close()
		}
		return statusOf(err)
	}
	defer o.close()
	if a.setSize && a.size > 0 {
		if err := o.truncate(x.user, a.size); err != nil {
			return statusOf(err)
		}
	}
	if err := x.sync(o.fd, unix.Fsync); err != nil {
		return statusOf(err)
	}
	return x.made(dir, o)
}

// onlyOnce keeps the verifier of an exclusive creation in the times, as other servers do: the client sets them afterwards. 31 bits are
// what every file system can keep.
func onlyOnce(verifier uint64) sattr {
	return sattr{
		mode:  0o600,
		atime: unix.Timespec{Sec: int64(verifier >> 32 & 0x7fffffff)},
		mtime: unix.Timespec{Sec: int64(verifier & 0x7fffffff)},
	}
}

// recreate answers for a file that was there already: it stays as it is but for a size that was asked for.
func (x *exchange) recreate(dir object, name string, how uint32, a sattr) status {
	o, err := x.child(dir, name)
	if err != nil {
		return statusOf(err)
	}
	defer o.close()
	switch {
	case how == exclusive:
		// The same call again, of which the reply was lost?
		if o.kind() != unix.S_IFREG || o.st.Size != 0 || o.st.Atim.Sec != a.atime.Sec || o.st.Mtim.Sec != a.mtime.Sec {
			return errExist
		}
	case o.kind() == unix.S_IFDIR:
		return errIsDir
	case o.kind() != unix.S_IFREG:
		return errExist
	case a.setSize:
		if err := o.truncate(x.user, a.size); err != nil {
			return statusOf(err)
		}
		if err := x.persist(o); err != nil {
			return statusOf(err)
		}
	}
	return x.made(dir, o)
}

func mkdir(x *exchange) status {
	handle, name := x.args.opaque(maxHandle), x.args.name()
	a := x.args.sattr()
	if x.args.bad {
		return garbage
	}
	return x.make(handle, name, a, func(dir int) error { return unix.Mkdirat(dir, name, a.mode) })
}

func symlink(x *exchange) status {
	handle, name := x.args.opaque(maxHandle), x.args.name()
	a := x.args.sattr()
	target := string(x.args.opaque(unix.PathMax))
	if x.args.bad {
		return garbage
	}
	if strings.IndexByte(target, 0) >= 0 {
		return errInval
	}
	a.setMode, a.mode = false, 0 // links have none
	return x.make(handle, name, a, func(dir int) error { return unix.Symlinkat(target, dir, name) })
}

// mknod makes FIFOs and sockets. Device nodes are no files of a volume: what a host's kernel would do with them is nobody's business there.
func mknod(x *exchange) status {
	handle, name := x.args.opaque(maxHandle), x.args.name()
	kind := x.args.uint32()
	a := x.args.sattr()
	switch {
	case kind == fileTypes[unix.S_IFCHR] || kind == fileTypes[unix.S_IFBLK]:
		x.args.uint64()
		if x.args.bad {
			return garbage
		}
		return errPerm
	case x.args.bad || kind != fileTypes[unix.S_IFSOCK] && kind != fileTypes[unix.S_IFIFO]:
		return garbage
	}
	mode := uint32(unix.S_IFIFO)
	if kind == fileTypes[unix.S_IFSOCK] {
		mode = unix.S_IFSOCK
	}
	return x.make(handle, name, a, func(dir int) error { return unix.Mknodat(dir, name, mode|a.mode&0o777, 0) })
}

// make makes what is no regular file. What is set besides the mode, other users see a moment later.
func (x *exchange) make(handle []byte, name string, a sattr, f func(dir int) error) status {
	dir, s := x.place(handle, name)
	if s != ok {
		return s
	}
	defer dir.close()
	a.setSize = false
	a.setMode = a.mode&0o7000 != 0
	o := object{fd: -1}
	err := x.user.as(func() error {
		if err := f(dir.fd); err != nil {
			return err
		}
		var err error
		if o, err = dir.child(name); err == nil {
			err = o.apply(a)
		}
		return err
	})
	defer func() { o.close() }()
	if err == nil && (a.setUID || a.setGID || a.setMode || a.setTimes()) {
		err = x.persist(o)
	}
	if err != nil {
		return statusOf(err)
	}
	return x.made(dir, o)
}

func remove(x *exchange) status { return x.remove(0) }

func rmdir(x *exchange) status { return x.remove(unix.AT_REMOVEDIR) }

func (x *exchange) remove(flags int) status {
	handle, name := x.args.opaque(maxHandle), x.args.name()
	if x.args.bad {
		return garbage
	}
	dir, s := x.place(handle, name)
	if s != ok {
		return s
	}
	defer dir.close()
	err := x.user.as(func() error { return unix.Unlinkat(dir.fd, name, flags) })
	if err == nil {
		err = x.sync(dir.fd, unix.Fsync)
	}
	if err != nil {
		return statusOf(err)
	}
	x.out.uint32(uint32(ok))
	x.out.changed(&dir)
	return ok
}

func rename(x *exchange) status {
	fromHandle, fromName := x.args.opaque(maxHandle), x.args.name()
	toHandle, toName := x.args.opaque(maxHandle), x.args.name()
	if x.args.bad {
		return garbage
	}
	from, s := x.place(fromHandle, fromName)
	if s != ok {
		return s
	}
	defer from.close()
	to, s := x.place(toHandle, toName)
	if s != ok {
		return s
	}
	defer to.close()
	err := x.user.as(func() error { return unix.Renameat(from.fd, fromName, to.fd, toName) })
	if err == nil {
		err = x.sync(to.fd, unix.Fsync)
	}
	if err == nil && from.st.Ino != to.st.Ino {
		err = x.sync(from.fd, unix.Fsync)
	}
	if err != nil {
		return statusOf(err)
	}
	x.out.uint32(uint32(ok))
	x.out.changed(&from)
	x.out.changed(&to)
	return ok
}

func link(x *exchange) status {
	handle := x.args.opaque(maxHandle)
	dirHandle, name := x.args.opaque(maxHandle), x.args.name()
	if x.args.bad {
		return garbage
	}
	o, s := x.object(handle, unix.O_PATH)
	if s != ok {
		return s
	}
	defer o.close()
	dir, s := x.place(dirHandle, name)
	if s != ok {
		return s
	}
	defer dir.close()
	err := x.user.as(func() error {
		return unix.Linkat(unix.AT_FDCWD, o.path(), dir.fd, name, unix.AT_SYMLINK_FOLLOW)
	})
	if err == nil {
		err = x.sync(dir.fd, unix.Fsync)
	}
	if err != nil {
		return statusOf(err)
	}
	x.out.uint32(uint32(ok))
	x.out.attributes(&o)
	x.out.changed(&dir)
	return ok
}

// maxList bounds one reply of READDIR and READDIRPLUS.
const maxList = 64 << 10

func readdir(x *exchange) status {
	handle := x.args.opaque(maxHandle)
	cookie := x.args.uint64()
	x.args.uint64() // the verifier of cookies, which are the file system's own and stay valid
	count := x.args.uint32()
	if x.args.bad {
		return garbage
	}
	return x.list(handle, cookie, ^uint32(0), count, false)
}

func readdirplus(x *exchange) status {
	handle := x.args.opaque(maxHandle)
	cookie := x.args.uint64()
	x.args.uint64()
	names, count := x.args.uint32(), x.args.uint32()
	if x.args.bad {
		return garbage
	}
	return x.list(handle, cookie, names, count, true)
}

// list writes the entries of a directory after the one with the cookie: names of at most so many bytes, in a reply of at most count.
func (x *exchange) list(handle []byte, cookie uint64, names, count uint32, plus bool) status {
	dir, s := x.directory(handle, unix.O_RDONLY)
	if s != ok {
		return s
	}
	defer dir.close()
	if err := dir.may(x.user, unix.R_OK); err != nil {
		return statusOf(err)
	}
	if dir.tree != nil {
		if _, err := unix.Seek(dir.fd, int64(cookie), unix.SEEK_SET); err != nil {
			return statusOf(err)
		}
	}
	start := len(x.out.b)
	x.out.uint32(uint32(ok))
	x.out.attributes(&dir)
	x.out.uint64(0)
	l := listing{exchange: x, dir: dir, plus: plus, names: int(min(names, maxList)), end: start + int(min(count, maxList)) - endOfList}
	fill := l.fill
	if dir.tree == nil {
		fill = func() (bool, error) { return l.fillSnapshots(cookie) }
	}
	full, err := fill()
	switch {
	case err != nil:
		return statusOf(err)
	case full && l.entries == 0:
		return errTooSmall
	}
	x.out.bool(false)
	x.out.bool(!full)
	return ok
}

// endOfList is the size of what follows the last entry: that there is none, and whether it was the directory's last.
const endOfList = 8

// A listing is a directory as far as it fits into a reply.
type listing struct {
	*exchange
	dir     object
	plus    bool
	names   int // bytes that are left for names and cookies
	end     int // of the reply
	entries int
}

// fill adds entries and says whether there was no room for one.
func (l *listing) fill() (full bool, err error) {
	buffer := make([]byte, 16<<10)
	for {
		n, err := unix.Getdents(l.dir.fd, buffer)
		if err != nil {
			return false, err
		}
		if n == 0 {
			return false, nil
		}
		for b := buffer[:n]; len(b) > 0; {
			// getdents64(2): inode, offset of the next, length of this, type, name.
			length := binary.NativeEndian.Uint16(b[16:])
			name, _, _ := strings.Cut(string(b[19:length]), "\x00")
			ino := binary.NativeEndian.Uint64(b)
			if name == ".." && l.dir.isRoot() {
				ino = l.dir.st.Ino
			}
			if !l.dir.hides(name) && !l.add(ino, binary.NativeEndian.Uint64(b[8:]), name) {
				return true, nil
			}
			b = b[length:]
		}
	}
}

// add writes an entry (RFC 1813 §3.3.16, §3.3.17), unless it does not fit.
func (l *listing) add(ino, cookie uint64, name string) bool {
	before := len(l.out.b)
	l.out.bool(true)
	l.out.uint64(l.dir.number(ino))
	l.out.opaque([]byte(name))
	l.out.uint64(cookie)
	l.names -= len(l.out.b) - before
	if l.plus {
		l.about(name)
	}
	if l.names < 0 || len(l.out.b) > l.end {
		l.out.b = l.out.b[:before]
		return false
	}
	l.entries++
	return true
}

// about writes attributes and handle of an entry, which both may be absent.
func (l *listing) about(name string) {
	o, err := object{}, error(unix.ENOENT)
	if !l.dir.leadsOn(name) { // a client that wants to know more of a snapshot than its name asks for it: it has to be opened
		o, err = l.child(l.dir, name)
	}
	if err != nil {
		l.out.bool(false)
		l.out.bool(false)
		return
	}
	defer o.close()
	handle, err := o.handle()
	l.out.attributes(&o)
	l.out.bool(err == nil)
	if err == nil {
		l.out.opaque(handle)
	}
}
