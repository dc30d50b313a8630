package ganesha

import (
	"bytes"
	"cmp"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cradlestack/cradlestack/csi-plugin/filer/nfs"
	"github.com/cradlestack/cradlestack/csi-plugin/filer/snapshots"
)

// Snapshots that nobody has looked at for a while are not mounted any more: one that is deleted takes room until then.
const (
	lookForIdle = 10 * time.Second
	idleAfter   = time.Minute
)

const (
	// Directories of snapshots are in the server's root by such names, with a hash behind.
	dirPrefix = snapshots.Dir + "-"
	dirHash   = 16

	// An export that nobody may use keeps such a directory, which is there for exports alone. It is no name of a snapshot.
	keeper = ".none"

	// Snapshots are mounted among the volumes, by names that are none of a volume's.
	mountPrefix = "filer:snapshot-"
)

// A shelf is the directory of an export's snapshots. Each is an export of its own, in the order in which clients come to them: until one is entered, which mounts it,
// an empty directory is in its place.
type shelf struct {
	export string // its path
	volume string
	dir    string // in the server's root
	source *snapshots.Source

	looking sync.Mutex        // one look at a time
	all     map[string]*shown // by their keys; the Server's lock is held
}

// path is what a name in it is exported as.
func (is *shelf) path(name string) string { return "/" + is.dir + "/" + name }

// shown is a snapshot. The Server's lock is held but for what is atomic.
type shown struct {
	snapshots.Snapshot
	shelf   *shelf
	id      uint16
	listed  bool   // it is known to be there
	hidden  bool   // it is not exported, for the moment or because it can't be
	at      string // where it is mounted
	mounted atomic.Bool
	used    atomic.Int64
	device  atomic.Pointer[[8]byte] // as handles have it
}

// key is what a snapshot's number is kept by: one that is taken anew is another one.
func (x *shown) key() string {
	return fmt.Sprintf("%s@%d", x.shelf.path(x.Name), x.Taken.UnixNano())
}

// An index is what calls ask, without the Server's lock.
type index struct {
	sync.RWMutex
	exports map[uint16]*exported
	paths   map[string]*exported
	shelfs  map[string]*shelf // by their directories
	dirs    []string          // of all of them
	shown   map[uint16]*shown
}

// exported is an export as calls see it.
type exported struct {
	directory
	handle  []byte // which its root's ends with
	clients []netip.Prefix
}

func newIndex() index {
	return index{exports: map[uint16]*exported{}, paths: map[string]*exported{}, shelfs: map[string]*shelf{}, shown: map[uint16]*shown{}}
}

// enlist has calls see an export as it is now, if it is there.
func (s *Server) enlist(path string, id uint16) {
	s.index.Lock()
	defer s.index.Unlock()
	delete(s.index.exports, id)
	delete(s.index.paths, path)
	e, ok := s.exports[path]
	if !ok {
		return
	}
	is := &exported{directory: directory{hidden: e.Hidden}, handle: e.handle, clients: e.Clients}
	if shelf := s.shelfs[path]; shelf != nil {
		is.beyond, is.hidden = shelf.dir, append(slices.Clip(e.Hidden), snapshots.Dir)
	}
	is.inside = is.hidden
	s.index.exports[id], s.index.paths[path] = is, is
}

// admits says whether the export is for the client at an address.
func (e *exported) admits(client netip.Addr) bool {
	return e != nil && slices.ContainsFunc(e.clients, func(p netip.Prefix) bool { return p.Contains(client) })
}

// A visitor is a client, for whom nothing is mounted that it may not see.
type visitor struct {
	*Server
	address netip.Addr
}

// shelve gives an export the directory of its snapshots, or takes it away. What it was before can be given back.
func (s *Server) shelve(e export) (undo func(), err error) {
	former := s.shelfs[e.Path]
	if s.front == nil || e.Snapshots == nil {
		s.unshelve(former)
		return func() { s.reshelve(former) }, nil
	}
	if former != nil && former.volume == e.Volume {
		source := former.source
		former.source = e.Snapshots
		return func() { former.source = source }, nil
	}
	sum := sha256.Sum256(slices.Concat([]byte("snapshots of "), s.Key, []byte(e.Path)))
	is := &shelf{export: e.Path, volume: e.Volume, dir: dirPrefix + hex.EncodeToString(sum[:dirHash]), source: e.Snapshots, all: map[string]*shown{}}
	// Handles of before lead to them as well.
	for key, id := range s.ids.Of {
		if rest, ok := strings.CutPrefix(key, is.path("")); ok {
			if at := strings.LastIndexByte(rest, '@'); at > 0 {
				if taken, err := strconv.ParseInt(rest[at+1:], 10, 64); err == nil {
					x := &shown{Snapshot: snapshots.Snapshot{Name: rest[:at], Taken: time.Unix(0, taken)}, shelf: is, id: id}
					is.all[x.key()] = x
				}
			}
		}
	}
	if _, err := s.number(is.path(keeper)); err != nil {
		return nil, err
	}
	s.unshelve(former)
	s.reshelve(is)
	return func() { s.unshelve(is); s.reshelve(former) }, nil
}

func (s *Server) unshelve(is *shelf) {
	if is == nil {
		return
	}
	delete(s.shelfs, is.export)
	s.index.Lock()
	defer s.index.Unlock()
	delete(s.index.shelfs, is.dir)
	s.index.dirs = slices.Collect(maps.Keys(s.index.shelfs))
	for _, x := range is.all {
		delete(s.index.shown, x.id)
	}
}

func (s *Server) reshelve(is *shelf) {
	if is == nil {
		return
	}
	s.shelfs[is.export] = is
	s.index.Lock()
	defer s.index.Unlock()
	s.index.shelfs[is.dir] = is
	s.index.dirs = slices.Collect(maps.Keys(s.index.shelfs))
	for _, x := range is.all {
		s.index.shown[x.id] = x
	}
}

// discard unmounts what a shelf had, which is exported no more, and gives up its numbers.
func (s *Server) discard(is *shelf) error {
	if is == nil {
		return nil
	}
	var errs []error
	for key, x := range is.all {
		errs = append(errs, unmount(x.at))
		delete(s.ids.Of, key)
	}
	delete(s.ids.Of, is.path(keeper))
	return errors.Join(errs...)
}

// owns says whether a number is that of an export, or of something on a shelf.
func (s *Server) owns(key string) bool {
	if _, is := s.exports[key]; is {
		return true
	}
	for _, is := range s.shelfs {
		if key == is.path(keeper) || is.all[key] != nil {
			return true
		}
	}
	return false
}

// nothing is the empty directory that is in the place of what is not mounted.
func (s *Server) nothing() string { return filepath.Join(s.State, "nothing") }

func (s *Server) mountOf(id uint16) string {
	return filepath.Join(s.Mounts, mountPrefix+strconv.Itoa(int(id)))
}

// unmount does so though the process may have something open there for a moment.
func unmount(at string) error {
	if at == "" {
		return nil
	}
	err := unix.Unmount(at, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
	if err == nil || errors.Is(err, unix.EINVAL) { // nothing is
		err = os.Remove(at)
	}
	if err != nil {
		return fmt.Errorf("unmount a snapshot: %w", err)
	}
	return nil
}

// clearMounts unmounts what a process before this has left.
func (s *Server) clearMounts() error {
	entries, err := os.ReadDir(s.Mounts)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	errs := []error{err}
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), mountPrefix) {
			errs = append(errs, unmount(filepath.Join(s.Mounts, e.Name())))
		}
	}
	return errors.Join(errs...)
}

// shelfExports are the exports of all shelves.
func (s *Server) shelfExports(all map[string]export) {
	for _, is := range s.shelfs {
		e := export{Export: nfs.Export{Path: is.path(keeper), Root: s.nothing(), Volume: is.dir, ReadOnly: true}, id: s.ids.Of[is.path(keeper)]}
		all[e.Path] = e
		for key, x := range is.all {
			if x.listed && !x.hidden {
				e := export{Export: nfs.Export{Path: is.path(x.Name), Root: cmp.Or(x.at, s.nothing()), Volume: key, ReadOnly: true, Clients: s.exports[is.export].Clients}, id: x.id}
				all[e.Path] = e
			}
		}
	}
}

// look has a shelf show the snapshots that there are now, and have that mounted which somebody enters.
func (s *Server) look(is *shelf, enters string) {
	s.mu.Lock()
	goesOn := s.ctx.Err() == nil && s.Lease.Holds()
	if goesOn {
		s.looks.Add(1)
	}
	source := is.source
	s.mu.Unlock()
	if !goesOn {
		return
	}
	defer s.looks.Done()
	is.looking.Lock()
	defer is.looking.Unlock()
	all, err := source.List()
	if err == nil {
		err = s.arrange(is, all)
	}
	if err == nil && enters != "" {
		err = s.enter(is, source, enters)
	}
	if err != nil {
		s.Log.Warn("show snapshots", "volume", is.volume, "snapshot", enters, "error", err)
	}
}

// arrange has a shelf show what there is.
func (s *Server) arrange(is *shelf, all []snapshots.Snapshot) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.shelfs[is.export] != is {
		return nil
	}
	there := map[string]bool{}
	var added []*shown
	changed := false
	for _, one := range all {
		x := &shown{Snapshot: one, shelf: is, listed: true}
		key := x.key()
		there[key] = true
		switch known := is.all[key]; {
		case known == nil:
			added = append(added, x)
		case !known.listed || known.hidden:
			known.listed, known.hidden, changed = true, false, true
		}
	}
	var gone []*shown
	for key, x := range is.all {
		if !there[key] {
			gone = append(gone, x)
			delete(is.all, key)
			delete(s.ids.Of, key)
			changed = changed || x.listed && !x.hidden
		}
	}
	if len(added) == 0 && len(gone) == 0 && !changed {
		return nil
	}
	// A name can have been given to another one: what is gone has to go first.
	var errs []error
	if len(added) > 0 && len(gone) > 0 {
		errs = append(errs, s.apply())
	}
	// No client has a handle with a number that is not kept.
	var err error
	for _, x := range added {
		if x.id, err = s.reserve(x.key()); err != nil {
			break
		}
	}
	if err == nil && len(added)+len(gone) > 0 {
		err = s.saveIDs()
	}
	if err != nil {
		errs = append(errs, err)
		for _, x := range added {
			delete(s.ids.Of, x.key())
		}
		added = nil
	}
	s.index.Lock()
	for _, x := range gone {
		delete(s.index.shown, x.id)
	}
	for _, x := range added {
		is.all[x.key()] = x
		s.index.shown[x.id] = x
	}
	s.index.Unlock()
	errs = append(errs, s.apply())
	for _, x := range gone {
		errs = append(errs, unmount(x.at))
	}
	return errors.Join(errs...)
}

// enter has a snapshot mounted.
func (s *Server) enter(is *shelf, source *snapshots.Source, name string) error {
	find := func() *shown {
		if s.shelfs[is.export] == is {
			for _, x := range is.all {
				if x.Name == name && x.listed {
					return x
				}
			}
		}
		return nil
	}
	s.mu.Lock()
	x := find()
	s.mu.Unlock()
	if x == nil {
		return nil
	}
	x.used.Store(time.Now().UnixNano())
	if x.mounted.Load() {
		return nil
	}
	at := s.mountOf(x.id)
	err := os.MkdirAll(at, 0o700)
	if err == nil {
		err = source.Mount(name, at)
	}
	var st unix.Stat_t
	if err == nil {
		if err = unix.Stat(at, &st); err != nil {
			err = errors.Join(err, unmount(at))
		}
	}
	if err != nil {
		_ = os.Remove(at) // else it is not there
		at = ""
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if find() != x {
		return errors.Join(err, unmount(at))
	}
	if err != nil { // who looks is to see that it is not there
		return errors.Join(err, s.hide(x))
	}
	if err := s.swap([]*shown{x}, at); err != nil {
		return errors.Join(err, s.hide(x), unmount(at))
	}
	var device [8]byte
	binary.NativeEndian.PutUint32(device[:], unix.Major(st.Dev))
	binary.NativeEndian.PutUint32(device[4:], unix.Minor(st.Dev))
	x.device.Store(&device)
	x.mounted.Store(true)
	return nil
}

// hide ends the export of a snapshot until somebody looks again.
func (s *Server) hide(x *shown) error {
	x.hidden, x.at = true, ""
	return s.apply()
}

// swap has snapshots be exported from where they are mounted, or not. The same number, and the same path, must be gone before.
func (s *Server) swap(all []*shown, at string) error {
	for _, x := range all {
		x.hidden = true
	}
	err := s.apply()
	for _, x := range all {
		x.hidden, x.at = false, at
	}
	return errors.Join(err, s.apply())
}

// forgetIdle unmounts what was last used before a time.
func (s *Server) forgetIdle(before time.Time) error {
	s.mu.Lock()
	shelfs := slices.Collect(maps.Values(s.shelfs))
	s.mu.Unlock()
	var errs []error
	for _, is := range shelfs {
		if is.looking.TryLock() { // else somebody is coming to it, and may be mounting where this would unmount
			errs = append(errs, s.forgetIdleOf(is, before))
			is.looking.Unlock()
		}
	}
	return errors.Join(errs...)
}

func (s *Server) forgetIdleOf(is *shelf, before time.Time) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.shelfs[is.export] != is {
		return nil
	}
	var idle []*shown
	var left []string
	for _, x := range is.all {
		if !x.mounted.Load() || x.used.Load() >= before.UnixNano() {
			continue
		}
		x.mounted.Store(false)
		if x.used.Load() >= before.UnixNano() { // by who has just seen it mounted
			x.mounted.Store(true)
			continue
		}
		idle, left = append(idle, x), append(left, x.at)
	}
	if len(idle) == 0 {
		return nil
	}
	errs := []error{s.swap(idle, "")}
	for _, at := range left {
		errs = append(errs, unmount(at))
	}
	return errors.Join(errs...)
}

func (s *Server) forgetIdles() {
	t := time.NewTicker(lookForIdle)
	defer t.Stop()
	for {
		select {
		case <-t.C:
		case <-s.ctx.Done():
			return
		}
		if err := s.forgetIdle(time.Now().Add(-idleAfter)); err != nil {
			s.Log.Warn("close snapshots", "error", err)
		}
	}
}

// Handles are 1 byte for a version, 1 of flags, and 2 for the number of the export, before what that calls the file.
const handleHead = 4

func exportOf(handle []byte) uint16 {
	if len(handle) < handleHead {
		return 0
	}
	return binary.BigEndian.Uint16(handle[2:])
}

// anyDevice is in the place of the device's number in handles of snapshots, which have another one each time they are mounted.
var anyDevice = [8]byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff}

// replace replaces a device in a handle, which it changes.
func replace(handle []byte, device, by *[8]byte) {
	if len(handle) > handleHead {
		if at := bytes.Index(handle[handleHead:], device[:]); at >= 0 {
			copy(handle[handleHead+at:], by[:])
		}
	}
}

// shown is the snapshot that a handle is of. seen says whether the client may see it.
func (v visitor) shown(handle []byte) (x *shown, seen bool) {
	v.index.RLock()
	defer v.index.RUnlock()
	x = v.index.shown[exportOf(handle)]
	return x, x != nil && v.index.paths[x.shelf.export].admits(v.address)
}

func (v visitor) inner(handle []byte) []byte {
	x, seen := v.shown(handle)
	if !seen {
		return handle
	}
	x.used.Store(time.Now().UnixNano())
	if !x.mounted.Load() {
		v.look(x.shelf, x.Name)
	}
	if device := x.device.Load(); device != nil {
		replace(handle, &anyDevice, device)
	}
	return handle
}

func (v visitor) outer(handle []byte) []byte {
	if x, _ := v.shown(handle); x != nil {
		if device := x.device.Load(); device != nil {
			replace(handle, device, &anyDevice)
		}
	}
	return handle
}

func (v visitor) admits(handle []byte) bool {
	v.index.RLock()
	defer v.index.RUnlock()
	e := v.index.exports[exportOf(handle)]
	return e != nil && e.admits(v.address)
}

func (v visitor) at(handle []byte) directory {
	id := exportOf(handle)
	v.index.RLock()
	defer v.index.RUnlock()
	if id != 0 {
		switch e := v.index.exports[id]; {
		case e == nil:
			return directory{}
		case bytes.HasSuffix(handle, e.handle):
			return v.root(e)
		default:
			return e.other()
		}
	}
	// Those of directories on the way to exports have their paths in them.
	if _, dir, found := bytes.Cut(handle, []byte("/"+dirPrefix)); found && len(dir) >= 2*dirHash {
		return v.shelf(dirPrefix + string(dir[:2*dirHash]))
	}
	return directory{top: true, hidden: v.index.dirs}
}

// top has directories that clients come to by the volumes alone.
func (v visitor) top() directory {
	v.index.RLock()
	defer v.index.RUnlock()
	return directory{top: true, hidden: v.index.dirs}
}

func (v visitor) child(d directory, name string) directory {
	if !d.top && !d.above {
		return d.other()
	}
	v.index.RLock()
	defer v.index.RUnlock()
	e := v.index.paths["/"+name]
	switch {
	case d.above && e != nil: // or a directory of that name
		names := slices.Concat(d.inside, e.inside)
		return directory{hidden: names, inside: names}
	case d.above:
		return d.other()
	case e != nil:
		return v.root(e)
	}
	return v.shelf(name)
}

func (v visitor) root(e *exported) directory {
	if !e.admits(v.address) {
		return directory{}
	}
	return e.directory
}

func (v visitor) shelf(dir string) directory {
	if is := v.index.shelfs[dir]; is != nil && v.index.paths[is.export].admits(v.address) {
		return directory{shelf: is}
	}
	return directory{}
}

func (v visitor) comes(d directory, name string) {
	switch {
	case d.shelf != nil:
		v.look(d.shelf, name)
	case d.beyond != "" && name == snapshots.Dir:
		v.index.RLock()
		is := v.index.shelfs[d.beyond]
		v.index.RUnlock()
		if is != nil {
			v.look(is, "")
		}
	}
}
