package nfs

import (
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// An exported directory. Its lock is held for reading by each call that is at work in it.
type exported struct {
	sync.RWMutex
	Export
	sealer
	tree // the volume's files
	fsid uint64
	gone bool

	late    time.Time     // when it should have ended, where it leaves
	ended   chan struct{} // closed when it is gone, and no call is at work in it
	failure error         // that came of it
	slow    atomic.Bool   // its file system can't say whether reading would wait
	limits
	stuck   atomic.Int64 // calls that the storage keeps
	small   atomic.Int64 // bytes of small calls
	replied *replies

	opening   sync.Mutex // a snapshot
	snapshots map[snapshotID]*tree
}

// A tree is what handles lead to: the files of a volume, or of a snapshot.
type tree struct {
	snapshot snapshotID // zero for the volume
	root     *os.File
	dev, ino uint64
	shift    uint64 // of inode numbers: a file has another one in each tree, else programs take them for the same file
	used     time.Time
}

func openExport(e Export, key []byte) (*exported, error) {
	if err := e.check(); err != nil {
		return nil, err
	}
	root, err := os.OpenFile(e.Root, unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return nil, err
	}
	x := &exported{Export: e, ended: make(chan struct{}), sealer: newSealer(key, e.Path), tree: tree{root: root}, limits: newLimits(maxWorkingInOne, maxCallingInOne, maxRepliesInOne), snapshots: map[snapshotID]*tree{}}
	sum := sha256.Sum256([]byte(e.Volume))
	x.fsid = binary.BigEndian.Uint64(sum[:])
	o := object{export: x, tree: &x.tree, fd: int(root.Fd())}
	err = o.stat()
	if err == nil {
		x.dev, x.ino = o.st.Dev, o.st.Ino
		_, err = o.reopened()
	}
	if err != nil {
		root.Close()
		return nil, fmt.Errorf("%s: its file system can't be served: %w; take one with file handles, such as ext4, xfs, btrfs or zfs", e.Root, err)
	}
	return x, nil
}

// reopened says whether what the kernel calls an object leads back to it.
func (o object) reopened() (handle []byte, err error) {
	if handle, err = o.handle(); err != nil {
		return nil, err
	}
	r, _ := o.export.open(handle)
	again, err := o.tree.object(o.export, r, unix.O_PATH)
	if err == nil {
		again.close()
	}
	return handle, err
}

// An object is a file, directory or whatever else that is open for one call.
type object struct {
	export *exported
	tree   *tree // nil of the directory of snapshots, which has no descriptor
	fd     int
	st     unix.Stat_t
}

func (o object) close() {
	if o.fd >= 0 {
		unix.Close(o.fd)
	}
}

func (o *object) stat() error {
	if o.tree == nil {
		return nil // it has what snapshotList has given it
	}
	return unix.Fstat(o.fd, &o.st)
}

func (o object) kind() uint32 { return o.st.Mode & unix.S_IFMT }

func (o object) isRoot() bool {
	return o.tree != nil && o.st.Ino == o.tree.ino && o.st.Dev == o.tree.dev
}

// hides says whether a name in a directory is none of the volume's.
func (o object) hides(name string) bool { return o.isRoot() && slices.Contains(o.export.Hidden, name) }

// object opens what a handle leads to.
func (x *exported) object(r reference, flags int) (object, error) {
	switch {
	case r.snapshot == (snapshotID{}):
		return x.tree.object(x, r, flags)
	case r.snapshot == listID:
		return x.snapshotList()
	}
	t, err := x.snapshotTree(r.snapshot)
	if err != nil {
		return object{fd: -1}, err
	}
	return t.object(x, r, flags)
}

// object opens what the kernel calls so. Flags other than O_PATH open what is not a regular file or directory only to be refused by the caller,
// who looks at its kind: devices don't open, the mount is nodev, and a FIFO does not wait.
func (t *tree) object(x *exported, r reference, flags int) (object, error) {
	fd, err := unix.OpenByHandleAt(int(t.root.Fd()), unix.NewFileHandle(r.kind, r.kernel), flags|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_NOCTTY|unix.O_CLOEXEC)
	if err != nil {
		return object{fd: -1}, err
	}
	return t.adopt(x, fd)
}

// top is the tree's root directory.
func (t *tree) top(x *exported) (object, error) {
	fd, err := unix.Openat(int(t.root.Fd()), ".", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return object{fd: -1}, err
	}
	return t.adopt(x, fd)
}

// adopt makes an object of an open file, which it closes where that fails.
func (t *tree) adopt(x *exported, fd int) (object, error) {
	o := object{export: x, tree: t, fd: fd}
	err := o.stat()
	if err == nil && o.st.Dev != t.dev {
		err = unix.ENOENT // something else that the host has mounted there
	}
	if err != nil {
		o.close()
		return object{fd: -1}, err
	}
	return o, nil
}

// child opens a name in a directory, with O_PATH: nothing is read of it, and no link followed.
func (o object) child(name string) (object, error) {
	if o.leadsOn(name) {
		return o.beyond(name)
	}
	if name == "." || name == ".." && o.isRoot() {
		fd, err := unix.Openat(o.fd, ".", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if err != nil {
			return object{fd: -1}, err
		}
		return o.tree.adopt(o.export, fd)
	}
	// ".." of a directory that the host has moved out of the root is refused by the kernel, since the root is a mount of its own.
	fd, err := unix.Openat(o.fd, name, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return object{fd: -1}, err
	}
	return o.tree.adopt(o.export, fd)
}

// handle is what clients call the object.
func (o object) handle() ([]byte, error) {
	if o.tree == nil {
		handle, _ := o.export.seal(reference{snapshot: listID})
		return handle, nil
	}
	h, _, err := unix.NameToHandleAt(o.fd, "", unix.AT_EMPTY_PATH)
	if err != nil {
		return nil, err
	}
	handle, ok := o.export.seal(reference{o.tree.snapshot, h.Type(), h.Bytes()})
	if !ok {
		return nil, fmt.Errorf("its file handles of type %d have %d bytes, which is too long: %w", h.Type(), h.Size(), unix.EOVERFLOW)
	}
	return handle, nil
}

// path is a name of the object for calls that take no descriptor of O_PATH. Following it leads to the object and nowhere else.
func (o object) path() string { return fmt.Sprintf("/proc/self/fd/%d", o.fd) }

// may says whether the user may do what unix.R_OK, W_OK and X_OK stand for.
func (o object) may(u user, mode uint32) error {
	switch {
	case o.tree != nil:
	case mode&unix.W_OK != 0:
		return unix.EROFS
	default:
		return nil
	}
	return u.as(func() error { return unix.Faccessat(o.fd, "", mode, unix.AT_EMPTY_PATH|unix.AT_EACCESS) })
}
