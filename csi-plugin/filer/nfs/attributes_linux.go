package nfs

import (
	"time"

	"golang.org/x/sys/unix"
)

// nfsProcedures are those of NFS version 3 (RFC 1813 §3.3), by number.
var nfsProcedures = [...]procedure{
	{}, // NULL
	{run: getattr},
	{run: setattr, absent: 2, once: true},
	{run: lookup, absent: 1},
	{run: access, absent: 1},
	{run: readlink, absent: 1},
	{run: read, absent: 1},
	{run: write, absent: 2},
	{run: create, absent: 2, once: true},
	{run: mkdir, absent: 2, once: true},
	{run: symlink, absent: 2, once: true},
	{run: mknod, absent: 2, once: true},
	{run: remove, absent: 2, once: true},
	{run: rmdir, absent: 2, once: true},
	{run: rename, absent: 4, once: true},
	{run: link, absent: 3, once: true},
	{run: readdir, absent: 1},
	{run: readdirplus, absent: 1},
	{run: fsstat, absent: 1},
	{run: fsinfo, absent: 1},
	{run: pathconf, absent: 1},
	{run: commit, absent: 2},
}

// Procedures that the server knows more of.
const (
	procGetattr     = 1
	procLookup      = 3
	procAccess      = 4
	procRead        = 6
	procWrite       = 7
	procReaddir     = 16
	procReaddirplus = 17
)

// fileTypes are ftype3 by the mode's type.
var fileTypes = map[uint32]uint32{
	unix.S_IFREG: 1, unix.S_IFDIR: 2, unix.S_IFBLK: 3, unix.S_IFCHR: 4, unix.S_IFLNK: 5, unix.S_IFSOCK: 6, unix.S_IFIFO: 7,
}

// fattrSize is the length of fattr3.
const fattrSize = 84

// fattr writes fattr3 (RFC 1813 §2.6).
func (e *encoder) fattr(o *object) {
	st := &o.st
	e.uint32(fileTypes[o.kind()])
	e.uint32(st.Mode & 0o7777)
	e.uint32(uint32(st.Nlink))
	e.uint32(st.Uid)
	e.uint32(st.Gid)
	e.uint64(uint64(st.Size))
	e.uint64(uint64(st.Blocks) * 512)
	e.uint32(unix.Major(st.Rdev))
	e.uint32(unix.Minor(st.Rdev))
	e.uint64(o.export.fsid)
	e.uint64(o.number(st.Ino))
	for _, t := range []unix.Timespec{st.Atim, st.Mtim, st.Ctim} {
		e.uint32(uint32(t.Sec))
		e.uint32(uint32(t.Nsec))
	}
}

// attributes writes post_op_attr: how the object is now.
func (e *encoder) attributes(o *object) {
	if o.stat() != nil {
		e.bool(false)
		return
	}
	e.bool(true)
	e.fattr(o)
}

// changed writes wcc_data: how the object is now, and not how it was before, as others may have changed it just then.
func (e *encoder) changed(o *object) {
	e.bool(false)
	e.attributes(o)
}

func getattr(x *exchange) status {
	o, s := x.subject()
	if s != ok {
		return s
	}
	defer o.close()
	x.out.uint32(uint32(ok))
	x.out.fattr(&o)
	return ok
}

// An sattr is sattr3: what of an object is to be set.
type sattr struct {
	setMode, setUID, setGID, setSize bool
	mode, uid, gid                   uint32
	size                             uint64
	atime, mtime                     unix.Timespec // with UTIME_OMIT and UTIME_NOW
}

func (d *decoder) sattr() (a sattr) {
	optional := func(set *bool, value *uint32) {
		if *set = d.uint32() != 0; *set {
			*value = d.uint32()
		}
	}
	optional(&a.setMode, &a.mode)
	a.mode &= 0o7777
	optional(&a.setUID, &a.uid)
	optional(&a.setGID, &a.gid)
	if a.setSize = d.uint32() != 0; a.setSize {
		a.size = d.uint64()
	}
	a.atime, a.mtime = d.time(), d.time()
	// -1 would be "as it is" for the kernel.
	d.bad = d.bad || a.setUID && a.uid == ^uint32(0) || a.setGID && a.gid == ^uint32(0)
	return a
}

// time reads set_atime and set_mtime.
func (d *decoder) time() unix.Timespec {
	switch d.uint32() {
	case 0:
		return unix.Timespec{Nsec: unix.UTIME_OMIT}
	case 1:
		return unix.Timespec{Nsec: unix.UTIME_NOW}
	case 2:
		t := unix.Timespec{Sec: int64(d.uint32()), Nsec: int64(d.uint32())}
		d.bad = d.bad || t.Nsec >= 1e9
		return t
	}
	d.bad = true
	return unix.Timespec{}
}

func (a sattr) setTimes() bool {
	return a.atime.Nsec != unix.UTIME_OMIT || a.mtime.Nsec != unix.UTIME_OMIT
}

// apply sets what is to be set but the size, as the user. The owner comes first, as a change of it takes set-user-id bits away.
func (o object) apply(a sattr) error {
	if a.setUID || a.setGID {
		uid, gid := -1, -1
		if a.setUID {
			uid = int(a.uid)
		}
		if a.setGID {
			gid = int(a.gid)
		}
		if err := unix.Fchownat(o.fd, "", uid, gid, unix.AT_EMPTY_PATH); err != nil {
			return err
		}
	}
	if a.setMode {
		if o.kind() == unix.S_IFLNK {
			return unix.EOPNOTSUPP
		}
		if err := unix.Fchmodat(unix.AT_FDCWD, o.path(), a.mode, 0); err != nil {
			return err
		}
	}
	if a.setTimes() {
		return unix.UtimesNanoAt(o.fd, "", []unix.Timespec{a.atime, a.mtime}, unix.AT_EMPTY_PATH)
	}
	return nil
}

// truncate sets a regular file's size. The owner may always, as with WRITE.
func (o object) truncate(u user, size uint64) error {
	if size > 1<<63-1 {
		return unix.EFBIG
	}
	switch o.kind() {
	case unix.S_IFREG:
	case unix.S_IFDIR:
		return unix.EISDIR
	default:
		return unix.EINVAL
	}
	if o.st.Uid != u.uid {
		if err := o.may(u, unix.W_OK); err != nil {
			return err
		}
	}
	f, err := unix.Open(o.path(), unix.O_WRONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(f)
	return u.as(func() error { return unix.Ftruncate(f, int64(size)) })
}

func setattr(x *exchange) status {
	handle := x.args.opaque(maxHandle)
	a := x.args.sattr()
	guarded := x.args.uint32() != 0
	var sec, nsec uint32
	if guarded {
		sec, nsec = x.args.uint32(), x.args.uint32()
	}
	if x.args.bad {
		return garbage
	}
	o, s := x.object(handle, unix.O_PATH)
	if s != ok {
		return s
	}
	defer o.close()
	if x.export.ReadOnly || o.tree == nil {
		return errROFS
	}
	if guarded && (uint32(o.st.Ctim.Sec) != sec || uint32(o.st.Ctim.Nsec) != nsec) {
		return errNotSync
	}
	var err error
	if a.setSize {
		err = o.truncate(x.user, a.size)
	}
	if err == nil {
		err = x.user.as(func() error { return o.apply(a) })
	}
	if err == nil {
		err = x.persist(o)
	}
	if err != nil {
		return statusOf(err)
	}
	x.out.uint32(uint32(ok))
	x.out.changed(&o)
	return ok
}

// persist brings an object's attributes and data to stable storage.
func (x *exchange) persist(o object) error {
	if k := o.kind(); k != unix.S_IFREG && k != unix.S_IFDIR {
		// It can't be opened to be synced by itself.
		return x.sync(int(x.export.root.Fd()), unix.Syncfs)
	}
	f, err := unix.Open(o.path(), unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(f)
	return x.sync(f, unix.Fsync)
}

// sync is fsync or syncfs. An error is told once by the kernel, but may be about data that other clients have written and not committed.
func (x *exchange) sync(fd int, how func(int) error) error {
	began := time.Now()
	err := how(fd)
	if x.Synced != nil {
		x.Synced(time.Since(began))
	}
	if err != nil {
		x.lost()
		x.log.Error("what was written is not on stable storage", "volume", x.export.Volume, "error", err)
	}
	return err
}

// Bits of ACCESS (RFC 1813 §3.3.4).
const (
	accessRead    = 0x01
	accessLookup  = 0x02
	accessModify  = 0x04
	accessExtend  = 0x08
	accessDelete  = 0x10
	accessExecute = 0x20
)

func access(x *exchange) status {
	handle := x.args.opaque(maxHandle)
	asked := x.args.uint32()
	if x.args.bad {
		return garbage
	}
	o, s := x.object(handle, unix.O_PATH)
	if s != ok {
		return s
	}
	defer o.close()
	writing, executing := uint32(accessModify|accessExtend), uint32(accessExecute)
	if o.kind() == unix.S_IFDIR {
		writing, executing = accessModify|accessExtend|accessDelete, accessLookup
	}
	if x.export.ReadOnly {
		writing = 0
	}
	granted := uint32(0)
	for _, m := range []struct{ bits, mode uint32 }{{accessRead, unix.R_OK}, {writing, unix.W_OK}, {executing, unix.X_OK}} {
		if asked&m.bits != 0 && o.may(x.user, m.mode) == nil {
			granted |= asked & m.bits
		}
	}
	x.out.uint32(uint32(ok))
	x.out.bool(true)
	x.out.fattr(&o)
	x.out.uint32(granted)
	return ok
}

func readlink(x *exchange) status {
	o, s := x.subject()
	if s != ok {
		return s
	}
	defer o.close()
	if o.kind() != unix.S_IFLNK {
		return errInval
	}
	target := make([]byte, unix.PathMax)
	n, err := unix.Readlinkat(o.fd, "", target)
	if err != nil {
		return statusOf(err)
	}
	x.out.uint32(uint32(ok))
	x.out.attributes(&o)
	x.out.opaque(target[:n])
	return ok
}

func fsstat(x *exchange) status {
	o, s := x.subject()
	if s != ok {
		return s
	}
	defer o.close()
	var st unix.Statfs_t
	if err := unix.Fstatfs(int(x.export.root.Fd()), &st); err != nil {
		return statusOf(err)
	}
	x.out.uint32(uint32(ok))
	x.out.attributes(&o)
	for _, blocks := range []uint64{st.Blocks, st.Bfree, st.Bavail} {
		x.out.uint64(blocks * uint64(st.Bsize))
	}
	for _, files := range []uint64{st.Files, st.Ffree, st.Ffree} {
		x.out.uint64(files)
	}
	x.out.uint32(0) // invarsec: may change at any time
	return ok
}

func fsinfo(x *exchange) status {
	o, s := x.subject()
	if s != ok {
		return s
	}
	defer o.close()
	x.out.uint32(uint32(ok))
	x.out.attributes(&o)
	for range 2 { // READ, WRITE: most, best, multiple
		x.out.uint32(maxData)
		x.out.uint32(maxData)
		x.out.uint32(4096)
	}
	x.out.uint32(maxList)                   // READDIR: best
	x.out.uint64(1<<63 - 1)                 // the largest file; what is too large for the file system is EFBIG
	x.out.uint32(0)                         // time_delta: seconds
	x.out.uint32(1)                         // and nanoseconds
	x.out.uint32(0x01 | 0x02 | 0x08 | 0x10) // hard links, symbolic links, one PATHCONF for all, times can be set
	return ok
}

func pathconf(x *exchange) status {
	o, s := x.subject()
	if s != ok {
		return s
	}
	defer o.close()
	x.out.uint32(uint32(ok))
	x.out.attributes(&o)
	x.out.uint32(65000) // links: ext4's, the least of those served
	x.out.uint32(maxName)
	x.out.bool(true)  // longer names are refused
	x.out.bool(true)  // chown is root's
	x.out.bool(false) // names that differ in case are two
	x.out.bool(true)  // and are kept as given
	return ok
}
