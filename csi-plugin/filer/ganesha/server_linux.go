package ganesha

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"math"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cradlestack/cradlestack/csi-plugin/filer/lease"
	"github.com/cradlestack/cradlestack/csi-plugin/filer/nfs"
	"github.com/cradlestack/cradlestack/internal/durable"
)

const (
	startTime  = time.Minute
	reloadTime = 30 * time.Second
	closeTime  = 2 * time.Second // for files of what is no longer exported
	drainTime  = 2 * time.Second // for calls that have begun

	firstRetry, lastRetry = 100 * time.Millisecond, 5 * time.Second
	giveUp                = 30 * time.Second // with a process that does not start
)

// portmapper is rpcbind's socket.
const portmapper = "/run/rpcbind.sock"

// Config is what a Server is about.
type Config struct {
	Listen netip.AddrPort
	State  string // directory of what outlasts a restart, on this host or another
	Run    string // directory for what does not
	Mounts string // directory in which snapshots are mounted
	Key    []byte // that nobody else has; the server's name is made of it
	Shared bool   // the file systems are other hosts' as well
	Trust  bool   // that clients make up no file handles: nothing is between them and NFS-Ganesha, which may speak version 3 then

	Lease *lease.Lease // that it serves under; nil holds for ever
	Leash *os.File     // the process has it open: who reads at its other end knows when that has ended. nil for none
	Log   *slog.Logger
}

// Server is the Engine. It has to be root.
type Server struct {
	Config
	program string
	lock    *os.File // which the process has open as well: nobody else starts one before its end
	name    string
	front   *front // nil if clients are trusted

	ctx    context.Context
	cancel context.CancelFunc
	group  sync.WaitGroup
	wake   chan struct{}
	giveUp time.Duration
	broken chan error // why it gives up

	holding time.Duration // nfs.Patience

	mu      sync.Mutex // one change at a time
	exports map[string]export
	shelfs  map[string]*shelf // by the paths of exports
	ids     ids
	serving bool
	held    int // calls of Hold at work

	now     sync.Mutex // of these, held for moments
	child   *child     // nil if there is none
	resting bool

	looks sync.WaitGroup // at snapshots
	index index
}

// ids are the numbers of exports that file handles have. One is used again when all others have been.
type ids struct {
	Last uint16            `json:"last"`
	Of   map[string]uint16 `json:"of"` // by path
}

// New returns a server without exports.
func New(c Config) (*Server, error) {
	sum := sha256.Sum256(append([]byte("name of "), c.Key...))
	s := &Server{Config: c, name: "cradle-filer-" + hex.EncodeToString(sum[:8]), exports: map[string]export{}, shelfs: map[string]*shelf{}, index: newIndex(), wake: make(chan struct{}, 1), giveUp: giveUp, holding: nfs.Patience, broken: make(chan error, 1)}
	if !c.Listen.IsValid() || c.Listen.Port() == 0 {
		return nil, fmt.Errorf("%s: NFS-Ganesha has to be told an address and a port", c.Listen)
	}
	var err error
	if s.program, err = program(); err != nil {
		return nil, err
	}
	for _, dir := range []string{c.State, c.Run} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return nil, err
		}
	}
	data, err := os.ReadFile(s.idsFile())
	if err == nil {
		err = json.Unmarshal(data, &s.ids)
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%s: %w; restore it, or remove it and have clients mount again", s.idsFile(), err)
	}
	if s.ids.Of == nil {
		s.ids.Of = map[string]uint16{}
	}
	if !c.Trust {
		if s.front, err = newFront(c.Key, c.Lease, c.Log); err != nil {
			return nil, err
		}
		s.front.guide = func(client netip.Addr) guide { return visitor{s, client} }
	}
	err = os.Mkdir(s.nothing(), 0o555)
	if err == nil || errors.Is(err, fs.ErrExist) {
		err = s.clearMounts()
	}
	if err != nil {
		return nil, err
	}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	return s, nil
}

// program is where NFS-Ganesha is, if it is there with what it needs.
func program() (string, error) {
	const install = "NFS-Ganesha is not there: install the packages nfs-ganesha and nfs-ganesha-vfs"
	path, err := exec.LookPath("ganesha.nfsd")
	if err != nil {
		return "", fmt.Errorf("%s: %w", install, err)
	}
	at, err := filepath.EvalSymlinks(path)
	if err != nil {
		return "", err
	}
	for _, dir := range []string{"lib/*/ganesha", "lib*/ganesha", "local/lib*/ganesha"} {
		if found, _ := filepath.Glob(filepath.Join(filepath.Dir(filepath.Dir(at)), dir, "libfsalvfs.so")); len(found) > 0 {
			return path, nil
		}
	}
	return "", fmt.Errorf("%s: there is %s without libfsalvfs.so", install, path)
}

func (s *Server) idsFile() string { return filepath.Join(s.State, "exports.json") }

// number is the number of an export, which it keeps until it ends.
func (s *Server) number(path string) (uint16, error) {
	if id, ok := s.ids.Of[path]; ok {
		return id, nil
	}
	former := s.ids.Last
	id, err := s.reserve(path)
	if err == nil {
		err = s.saveIDs()
	}
	if err != nil {
		s.ids.Last = former
		delete(s.ids.Of, path)
	}
	return id, err
}

// reserve is a new number, which is not kept yet.
func (s *Server) reserve(path string) (uint16, error) {
	used := map[uint16]bool{0: true} // the root that all others are below
	for _, id := range s.ids.Of {
		used[id] = true
	}
	if len(used) > math.MaxUint16 {
		return 0, fmt.Errorf("there are %d exports, and no number for another", len(used))
	}
	id := s.ids.Last + 1
	for used[id] {
		id++
	}
	s.ids.Last, s.ids.Of[path] = id, id
	return id, nil
}

func (s *Server) saveIDs() error {
	data, err := json.Marshal(s.ids)
	if err != nil {
		return err
	}
	return durable.WriteFile(s.idsFile(), data)
}

// Forget gives up the numbers of what is not exported. It is for a beginning at which all is that should be.
func (s *Server) Forget() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	before := len(s.ids.Of)
	for path := range s.ids.Of {
		if !s.owns(path) {
			delete(s.ids.Of, path)
		}
	}
	if len(s.ids.Of) == before {
		return nil
	}
	return s.saveIDs()
}

// epoch is a number that no server before has had: clients know by it that this one is another, and ask for their locks.
func (s *Server) epoch() (int64, error) {
	path := filepath.Join(s.State, "epoch")
	epoch := time.Now().Unix()
	data, err := os.ReadFile(path)
	if err == nil {
		var last int64
		if last, err = strconv.ParseInt(strings.TrimSpace(string(data)), 10, 64); err == nil {
			epoch = max(epoch, last+1)
		}
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return 0, fmt.Errorf("%s: %w; remove it", path, err)
	}
	return epoch, durable.WriteFile(path, fmt.Appendln(nil, epoch))
}

// Start starts to serve, and goes on until Close.
func (s *Server) Start() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.serving = true
	if err := s.start(); err != nil && !errors.Is(err, errResting) {
		s.serving = false
		return err
	}
	s.group.Go(s.supervise)
	s.group.Go(s.forgetIdles)
	return nil
}

// Serve returns when ctx ends, or with the reason when the process can't be started any more. Clients that are not trusted connect to l, and keep their connections
// after Close: until ctx or the lease ends.
func (s *Server) Serve(ctx context.Context, l net.Listener) error {
	var g sync.WaitGroup
	defer g.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	if s.front != nil {
		g.Go(func() { s.front.serve(ctx, l) })
	}
	select {
	case <-ctx.Done():
		return nil
	case err := <-s.broken:
		return err
	}
}

// supervise starts the process again when it has ended, or when it may be there again.
func (s *Server) supervise() {
	wait := firstRetry
	var since time.Time // it does not start
	for retry := (<-chan time.Time)(nil); ; {
		var ended <-chan struct{}
		s.now.Lock()
		c := s.child
		s.now.Unlock()
		if c != nil && retry == nil {
			ended = c.done
		}
		select {
		case <-s.ctx.Done():
			return
		case <-s.wake:
		case <-ended:
			if time.Since(c.begun) < lastRetry { // it may do so again
				retry = time.After(wait)
				wait = min(2*wait, lastRetry)
				continue
			}
			wait = firstRetry
		case <-retry:
		}
		retry = nil
		if again, err := s.ensure(); err != nil {
			s.Log.Error("NFS-Ganesha", "error", err)
			if since.IsZero() {
				since = time.Now()
			} else if time.Since(since) > s.giveUp {
				s.broken <- err
				return
			}
			retry = time.After(wait)
			wait = min(2*wait, lastRetry)
		} else if again {
			since = time.Time{}
		}
	}
}

func (s *Server) poke() {
	select {
	case s.wake <- struct{}{}:
	default: // it will look
	}
}

// ensure starts the process if it should be there and is not.
func (s *Server) ensure() (started bool, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.now.Lock()
	c := s.child
	if c != nil && c.ended() {
		s.child = nil
		if !s.resting {
			s.Log.Warn("NFS-Ganesha has ended, and is started again", "state", c.cmd.ProcessState, "said", c.out.last())
		}
		c = nil
	}
	s.now.Unlock()
	if c != nil || !s.serving || s.held > 0 || s.ctx.Err() != nil {
		return false, nil
	}
	if err := s.start(); err != nil && !errors.Is(err, errResting) {
		return false, err
	}
	return true, nil
}

// alive is the process, if there is one.
func (s *Server) alive() *child {
	s.now.Lock()
	defer s.now.Unlock()
	if s.child == nil || s.child.ended() {
		return nil
	}
	return s.child
}

// stop ends the process at once. Clients ask again what they have not heard of.
func (s *Server) stop() {
	s.now.Lock()
	c := s.child
	s.child = nil
	s.now.Unlock()
	if c != nil {
		c.kill()
	}
}

// Export is Engine's.
func (s *Server) Export(e nfs.Export) error {
	root, err := filepath.EvalSymlinks(e.Root) // it follows none
	if err != nil {
		return err
	}
	e.Root = root
	if err := check(e); err != nil {
		return err
	}
	handle, err := reopens(root)
	if err != nil {
		return fmt.Errorf("export of volume %s: %s: its file system can't be served: %w; take one with file handles, such as ext4, xfs, btrfs or zfs", e.Volume, root, err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	id, err := s.number(e.Path)
	if err != nil {
		return err
	}
	former, was := s.exports[e.Path]
	s.exports[e.Path] = export{e, id, handle}
	undo, err := s.shelve(s.exports[e.Path])
	if err == nil {
		if err = s.apply(); err != nil {
			undo()
		}
	}
	defer func() { s.enlist(e.Path, id) }()
	if err != nil {
		if was {
			s.exports[e.Path] = former
		} else {
			delete(s.exports, e.Path)
		}
		return fmt.Errorf("export of volume %s: %w", e.Volume, errors.Join(err, s.apply()))
	}
	return nil
}

// reopens returns what the kernel calls a directory, if that leads back to it.
func reopens(root string) (handle []byte, err error) {
	h, _, err := unix.NameToHandleAt(unix.AT_FDCWD, root, 0)
	if err != nil {
		return nil, err
	}
	d, err := os.Open(root)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	fd, err := unix.OpenByHandleAt(int(d.Fd()), h, unix.O_PATH|unix.O_CLOEXEC)
	if err != nil {
		return nil, err
	}
	return h.Bytes(), unix.Close(fd)
}

// Unexport is Engine's.
func (s *Server) Unexport(path string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	e, was := s.exports[path]
	if !was {
		return s.forget(path)
	}
	shelf := s.shelfs[path]
	delete(s.exports, path)
	s.unshelve(shelf)
	defer func() { s.enlist(path, e.id) }()
	err := s.apply()
	if err == nil {
		err = s.release(e.Root)
	}
	if err == nil {
		err = s.discard(shelf)
	}
	if err != nil {
		s.exports[path] = e
		s.reshelve(shelf)
		return fmt.Errorf("end the export of volume %s: %w", e.Volume, err)
	}
	return s.forget(path)
}

func (s *Server) forget(path string) error {
	if _, ok := s.ids.Of[path]; !ok {
		return nil
	}
	delete(s.ids.Of, path)
	return s.saveIDs()
}

// release sees to it that the process has nothing of a directory open any more which is not exported.
func (s *Server) release(root string) error {
	for _, e := range s.exports {
		if e.Root == root {
			return nil
		}
	}
	_, mount, err := unix.NameToHandleAt(unix.AT_FDCWD, root, 0)
	if err != nil {
		return err
	}
	for end := time.Now().Add(closeTime); ; time.Sleep(time.Millisecond) {
		c := s.alive()
		if c == nil {
			return nil
		}
		open, err := c.has(mount)
		if err == nil && !open {
			return nil
		}
		if time.Now().After(end) {
			s.Log.Warn("NFS-Ganesha still has files of what is no longer exported, and is started anew", "root", root, "error", err)
			s.stop()
			return s.start()
		}
	}
}

// apply has the process take over what has changed. One that can't is replaced.
func (s *Server) apply() error {
	c := s.alive()
	if c == nil {
		return nil // the next one reads it
	}
	if err := s.configure(c.version3); err != nil {
		return err
	}
	problems, err := c.reload(s.ctx)
	if err == nil && len(problems) > 0 {
		return fmt.Errorf("NFS-Ganesha: %s", strings.Join(problems, ": "))
	}
	if err != nil {
		s.Log.Warn("NFS-Ganesha is started anew", "error", err)
		s.stop()
		if err = s.start(); errors.Is(err, errResting) {
			err = nil
		}
	}
	return err
}

func (s *Server) configFile() string { return filepath.Join(s.Run, "ganesha.conf") }

// configure writes what the process reads.
func (s *Server) configure(version3 bool) error {
	c := configuration{listen: s.Listen, version3: version3, recovery: s.State, name: s.name, shared: s.Shared, exports: maps.Clone(s.exports)}
	s.shelfExports(c.exports)
	if s.front != nil && c.listen.Addr().Is4() {
		c.listen = netip.AddrPortFrom(netip.IPv4Unspecified(), c.listen.Port())
	} else if s.front != nil || c.listen.Addr().IsUnspecified() {
		c.listen = netip.AddrPortFrom(unspecified(), c.listen.Port())
	}
	temporary := s.configFile() + ".new"
	if err := os.WriteFile(temporary, []byte(c.String()), 0o600); err != nil {
		return err
	}
	return os.Rename(temporary, s.configFile())
}

// registers says whether this host has a portmapper that version 3 can be registered with. Without one, NFS-Ganesha would not serve it.
func registers() bool {
	conn, err := net.DialTimeout("unix", portmapper, time.Second)
	if err == nil {
		conn.Close()
	}
	return err == nil
}

// unspecified is all addresses, also those of version 6 where this host has one.
func unspecified() netip.Addr {
	all, _ := net.InterfaceAddrs()
	for _, a := range all {
		if n, ok := a.(*net.IPNet); ok && n.IP.To4() == nil && !n.IP.IsLoopback() {
			return netip.IPv6Unspecified()
		}
	}
	return netip.IPv4Unspecified()
}

// Hold is Engine's. The process ends meanwhile, so that clients of all volumes wait: they claim their locks when it is there again.
func (s *Server) Hold(volume string, do func() error) (err error) {
	s.mu.Lock()
	s.held++
	if c := s.alive(); s.held == 1 && c != nil {
		s.drain()
		if !c.dies(s.holding) { // and another is started once it has
			s.held--
			s.mu.Unlock()
			return fmt.Errorf("volume %s: %w: nothing is done to it, and NFS-Ganesha is not there again, before it answers", volume, nfs.ErrStuck)
		}
		s.stop()
	}
	s.mu.Unlock()
	defer func() {
		if errors.Is(err, lease.ErrEnded) {
			return
		}
		s.mu.Lock()
		s.held--
		s.mu.Unlock()
		s.poke()
	}()
	return do()
}

// Rest ends the process, until Wake, and does not wait for what it is doing: nothing is answered from its return on.
func (s *Server) Rest() {
	s.now.Lock()
	s.resting = true
	s.now.Unlock()
	s.stop()
}

// Wake lets the process be there again, unless the Server is closed.
func (s *Server) Wake() {
	s.now.Lock()
	was := s.resting && s.ctx.Err() == nil
	s.resting = s.resting && !was
	s.now.Unlock()
	if was {
		s.poke()
	}
}

// Drain lets no further call begin and waits for those that have, as far as can be seen, before an end that nobody hears of.
func (s *Server) Drain() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.drain()
}

func (s *Server) drain() {
	if c := s.alive(); c != nil && !c.drain() {
		s.Log.Warn("calls that have begun do not end; clients make them again")
	}
}

// Close ends the process and all exports.
func (s *Server) Close() error {
	s.cancel()
	s.Rest()
	s.group.Wait()
	s.mu.Lock() // no look begins any more
	s.serving = false
	s.mu.Unlock()
	s.looks.Wait()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.stop()
	errs := []error{s.clearMounts()}
	if s.front != nil {
		errs = append(errs, s.front.close())
	}
	if s.lock != nil {
		errs = append(errs, s.lock.Close())
		s.lock = nil
	}
	return errors.Join(errs...)
}
