package nfs

import (
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cradlestack/cradlestack/csi-plugin/filer/snapshots"
)

// A snapshotID is how handles name a snapshot.
type snapshotID [8]byte

func idOf(s snapshots.Snapshot) (id snapshotID) {
	sum := sha256.Sum256(fmt.Appendf(nil, "%s taken %d", s.Name, s.Taken.UnixNano()))
	copy(id[:], sum[:])
	return id
}

// listID is the directory's that all snapshots are in.
var listID = snapshotID{'.', 's', 'n', 'a', 'p', 's', 'h', 'o'}

func (id snapshotID) number() uint64 { return binary.BigEndian.Uint64(id[:]) }

// number is the inode number that clients see.
func (o object) number(ino uint64) uint64 {
	if o.tree == nil {
		return ino
	}
	return ino + o.tree.shift
}

// leadsOn says whether a name in a directory leads from the volume to its snapshots, or back.
func (o object) leadsOn(name string) bool {
	switch {
	case o.tree == nil:
		return true
	case !o.isRoot():
		return false
	case o.tree.snapshot == (snapshotID{}):
		return name == snapshots.Dir && o.export.Snapshots != nil
	}
	return name == ".."
}

// beyond is where such a name leads.
func (o object) beyond(name string) (object, error) {
	x := o.export
	switch {
	case o.tree != nil || name == ".":
		return x.snapshotList()
	case name == "..":
		return x.tree.top(x)
	}
	all, err := x.Snapshots.List()
	if err != nil {
		return object{fd: -1}, err
	}
	i := slices.IndexFunc(all, func(s snapshots.Snapshot) bool { return s.Name == name })
	if i < 0 {
		return object{fd: -1}, unix.ENOENT
	}
	t, err := x.openSnapshot(all[i])
	if err != nil {
		return object{fd: -1}, err
	}
	return t.top(x)
}

// snapshotList is the directory that all snapshots are in. Its times are others whenever they are.
func (x *exported) snapshotList() (object, error) {
	o := object{export: x, fd: -1}
	if x.Snapshots == nil {
		return o, unix.ESTALE
	}
	all, err := x.Snapshots.List()
	if err != nil {
		return o, err
	}
	hash := sha256.New()
	var newest time.Time
	for _, s := range all {
		id := idOf(s)
		hash.Write(id[:])
		if s.Taken.After(newest) {
			newest = s.Taken
		}
	}
	at := unix.Timespec{Nsec: int64(binary.BigEndian.Uint32(hash.Sum(nil)) % 1e9)}
	if len(all) > 0 {
		at.Sec = newest.Unix()
	}
	o.st = unix.Stat_t{Mode: unix.S_IFDIR | 0o555, Nlink: 2, Ino: listID.number(), Size: 4096, Blksize: 4096, Atim: at, Mtim: at, Ctim: at}
	return o, nil
}

// fillSnapshots is fill for that directory, in which cookies count.
func (l *listing) fillSnapshots(cookie uint64) (full bool, err error) {
	all, err := l.dir.export.Snapshots.List()
	if err != nil {
		return false, err
	}
	slices.SortFunc(all, func(a, b snapshots.Snapshot) int { return strings.Compare(a.Name, b.Name) })
	type entry struct {
		name string
		ino  uint64
	}
	entries := []entry{{".", l.dir.st.Ino}, {"..", l.dir.export.ino}}
	for _, s := range all {
		entries = append(entries, entry{s.Name, idOf(s).number()})
	}
	for i := min(cookie, uint64(len(entries))); i < uint64(len(entries)); i++ {
		if !l.add(entries[i].ino, i+1, entries[i].name) {
			return true, nil
		}
	}
	return false, nil
}

// snapshotTree is the tree that handles lead to, also those that were made before this process began.
func (x *exported) snapshotTree(id snapshotID) (*tree, error) {
	x.opening.Lock()
	t := x.snapshots[id]
	if t != nil {
		t.used = time.Now()
	}
	x.opening.Unlock()
	if t != nil {
		return t, nil
	}
	if x.Snapshots == nil {
		return nil, unix.ESTALE
	}
	all, err := x.Snapshots.List()
	if err != nil {
		return nil, err
	}
	i := slices.IndexFunc(all, func(s snapshots.Snapshot) bool { return idOf(s) == id })
	if i < 0 {
		return nil, unix.ESTALE
	}
	return x.openSnapshot(all[i])
}

func (x *exported) openSnapshot(s snapshots.Snapshot) (*tree, error) {
	x.opening.Lock()
	defer x.opening.Unlock()
	id := idOf(s)
	if t := x.snapshots[id]; t != nil {
		t.used = time.Now()
		return t, nil
	}
	top, err := x.Snapshots.Open(s.Name)
	if err != nil {
		return nil, fmt.Errorf("snapshot %s of volume %s: %w", s.Name, x.Volume, err)
	}
	root, err := top.Open(".")
	top.Close()
	if err != nil {
		return nil, fmt.Errorf("snapshot %s of volume %s: %w", s.Name, x.Volume, err)
	}
	t := &tree{snapshot: id, root: root, used: time.Now()}
	o := object{export: x, tree: t, fd: int(root.Fd())}
	if err := o.stat(); err != nil {
		root.Close()
		return nil, err
	}
	t.dev, t.ino, t.shift = o.st.Dev, o.st.Ino, id.number()-o.st.Ino
	x.snapshots[id] = t
	return t, nil
}

// Snapshots that nobody has looked at for a while are closed: one that is deleted takes room until then.
const (
	lookForIdle = 10 * time.Second
	idleAfter   = time.Minute
)

func (s *Server) forgetSnapshots() {
	s.mu.RLock()
	var all []*exported
	for _, x := range s.paths {
		all = append(all, x)
	}
	s.mu.RUnlock()
	for _, x := range all {
		if err := x.forgetSnapshots(time.Now().Add(-idleAfter)); err != nil {
			s.log.Warn("close a snapshot", "volume", x.Volume, "error", err)
		}
	}
}

// forgetSnapshots closes those that were last used before a time, unless a call is at work.
func (x *exported) forgetSnapshots(before time.Time) error {
	x.opening.Lock()
	idle := false
	for _, t := range x.snapshots {
		idle = idle || t.used.Before(before)
	}
	x.opening.Unlock()
	if !idle || !x.TryLock() {
		return nil
	}
	defer x.Unlock()
	var err error
	for id, t := range x.snapshots {
		if t.used.Before(before) {
			err = t.root.Close()
			delete(x.snapshots, id)
		}
	}
	return err
}
