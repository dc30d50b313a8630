package nfs

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/semaphore"
	"golang.org/x/sys/unix"

	"github.com/cradlestack/cradlestack/csi-plugin/filer/lease"
)

// Bounds of what clients together can make the server hold, and of what those of one export can: a hostile client keeps its own volume waiting,
// not others'. Who has no file handle holds a connection and its buffer.
const (
	maxConnections, maxConnectionsOfOne = 16384, 2048 // of one address
	maxCalls                            = 128         // of one connection, at the same time

	maxWorking, maxWorkingInOne = 256, 64             // calls that are being done
	maxCalling, maxCallingInOne = 512 << 20, 64 << 20 // bytes of calls
	maxReplies, maxRepliesInOne = 512 << 20, 64 << 20 // bytes of replies

	patience = time.Minute // with a client that does not go on in the middle of a call or reply
)

// limits are of one export, or of all.
type limits struct{ working, calling, replies *semaphore.Weighted }

func newLimits(working, calling, replies int64) limits {
	return limits{semaphore.NewWeighted(working), semaphore.NewWeighted(calling), semaphore.NewWeighted(replies)}
}

// Server is the embedded Engine. It has to be root, in a process with umask 0: it does each call as the user that made it.
type Server struct {
	// Lease is asked before each call and before each reply. It is set before Serve; nil is for a server that nobody takes over from.
	Lease *lease.Lease

	// Done is told of each call that was answered, with the lengths of call and reply; Synced how long it took to bring data to stable storage. They are set
	// before Serve, or nil.
	Done   func(procedure, status string, in, out int)
	Synced func(took time.Duration)

	key []byte
	log *slog.Logger

	verifier atomic.Uint64 // changes where written data may be lost: clients send again what they have not committed

	mu    sync.RWMutex
	paths map[string]*exported
	tags  map[tag]*exported
	held  map[string]int // volumes → calls of Hold

	replied map[string]*replies // by the export's path

	connections connections
	limits
}

// connections are counted by address.
type connections struct {
	mu  sync.Mutex
	all int
	of  map[netip.Addr]int
}

// admit counts one more, unless there are too many.
func (c *connections) admit(client netip.Addr) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.all >= maxConnections || c.of[client] >= maxConnectionsOfOne {
		return false
	}
	c.all++
	c.of[client]++
	return true
}

func (c *connections) leave(client netip.Addr) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.all--
	if c.of[client]--; c.of[client] == 0 {
		delete(c.of, client)
	}
}

// New returns a server without exports. Handles that were made with the same key stay valid.
func New(key [KeySize]byte, log *slog.Logger) *Server {
	s := &Server{
		key: key[:], log: log, paths: map[string]*exported{}, tags: map[tag]*exported{}, replied: map[string]*replies{}, held: map[string]int{},
		connections: connections{of: map[netip.Addr]int{}}, limits: newLimits(maxWorking, maxCalling, maxReplies),
	}
	s.lost()
	return s
}

// lost makes clients send again what they have not committed.
func (s *Server) lost() {
	var b [8]byte
	rand.Read(b[:])
	s.verifier.Store(binary.BigEndian.Uint64(b[:]))
}

// Export is Engine's.
func (s *Server) Export(e Export) error {
	x, err := openExport(e, s.key)
	if err != nil {
		return fmt.Errorf("export of volume %s: %w", e.Volume, err)
	}
	s.mu.Lock()
	former := s.paths[e.Path]
	s.paths[e.Path], s.tags[x.tag] = x, x
	if x.replied = s.replied[e.Path]; x.replied == nil {
		x.replied = newReplies()
		s.replied[e.Path] = x.replied
	}
	s.mu.Unlock()
	return former.end()
}

// Unexport is Engine's.
func (s *Server) Unexport(path string) error {
	s.mu.Lock()
	x := s.paths[path]
	if x != nil {
		delete(s.paths, path)
		delete(s.tags, x.tag)
		delete(s.replied, path)
	}
	s.mu.Unlock()
	return x.end()
}

// Close ends all exports.
func (s *Server) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	var errs []error
	for _, x := range s.paths {
		errs = append(errs, x.end())
	}
	clear(s.paths)
	clear(s.tags)
	return errors.Join(errs...)
}

// end waits for the calls that are at work, and lets no other begin.
func (x *exported) end() error {
	if x == nil {
		return nil
	}
	x.Lock()
	defer x.Unlock()
	x.gone = true
	errs := []error{x.root.Close()}
	for _, t := range x.snapshots {
		errs = append(errs, t.root.Close())
	}
	clear(x.snapshots)
	return errors.Join(errs...)
}

// Hold is Engine's.
func (s *Server) Hold(volume string, do func() error) error {
	s.mu.Lock()
	s.held[volume]++
	var all []*exported
	for _, x := range s.paths {
		if x.Volume == volume {
			all = append(all, x)
		}
	}
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.held[volume]--; s.held[volume] == 0 {
			delete(s.held, volume)
		}
	}()
	for _, x := range all { // calls that have begun
		x.Lock()
		x.Unlock() //nolint:staticcheck // nothing is done under the lock: those that begin later see that the volume is held
	}
	return do()
}

func (s *Server) holds(volume string) bool {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.held[volume] > 0
}

// Serve is Engine's.
func (s *Server) Serve(ctx context.Context, l net.Listener) error {
	stop := context.AfterFunc(ctx, func() { l.Close() })
	defer stop()
	var conversations sync.WaitGroup
	defer conversations.Wait()
	conversations.Go(func() { s.forgetSnapshots(ctx) })
	for wait := time.Millisecond; ; {
		conn, err := l.Accept()
		switch {
		case err == nil:
			wait = time.Millisecond
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, net.ErrClosed):
			return err
		default: // no descriptor is left, or the client has gone
			s.log.Warn("accept", "error", err)
			time.Sleep(wait)
			wait = min(2*wait, time.Second)
			continue
		}
		client := addressOf(conn)
		if !s.connections.admit(client) {
			s.log.Debug("too many connections", "client", client)
			conn.Close()
			continue
		}
		conversations.Go(func() {
			defer s.connections.leave(client)
			s.converse(ctx, conn)
		})
	}
}

func addressOf(conn net.Conn) netip.Addr {
	if a, ok := conn.RemoteAddr().(*net.TCPAddr); ok {
		return a.AddrPort().Addr().Unmap()
	}
	return netip.Addr{}
}

// A conversation is one connection.
type conversation struct {
	*Server
	conn    net.Conn
	client  netip.Addr
	replied sync.Mutex
}

// converse answers the calls on a connection, several at a time and in no order.
func (s *Server) converse(ctx context.Context, conn net.Conn) {
	defer conn.Close()
	c := &conversation{Server: s, conn: conn, client: addressOf(conn)}
	stop := context.AfterFunc(ctx, func() { conn.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	calls := semaphore.NewWeighted(maxCalls)
	var g sync.WaitGroup
	defer g.Wait()
	r := bufio.NewReaderSize(conn, smallCall)
	for {
		record, release, err := c.read(ctx, r)
		if err == nil && record == nil {
			continue
		}
		if err != nil {
			if errors.Is(err, errRecord) {
				s.log.Warn("a client that does not speak NFS", "client", c.client, "error", err)
			}
			return
		}
		if calls.Acquire(ctx, 1) != nil {
			release()
			return
		}
		g.Go(func() {
			defer calls.Release(1)
			defer release()
			if err := c.answer(ctx, record); err != nil && ctx.Err() == nil {
				conn.Close() // which ends the loop; at the server's end others still have their replies to send
			}
		})
	}
}

// smallCall is the length of the largest call that is no WRITE: two names, handles and users have room in it.
const smallCall = 16 << 10

// read takes the next call from the connection; none where it was answered already. One that needs memory of its own has to be a WRITE with a valid
// handle.
func (c *conversation) read(ctx context.Context, r *bufio.Reader) (record []byte, release func(), err error) {
	c.conn.SetReadDeadline(time.Time{})
	if ctx.Err() != nil {
		return nil, nil, context.Cause(ctx)
	}
	n, err := readLength(r)
	if err != nil {
		return nil, nil, err
	}
	c.conn.SetReadDeadline(time.Now().Add(patience))
	head, err := r.Peek(min(n, smallCall))
	if err != nil {
		return nil, nil, err
	}
	of := []limits{c.limits}
	if n > smallCall {
		call, _, err := parseCall(head)
		if err != nil {
			return nil, nil, err
		}
		if call.program != programNFS || call.version != version3 || call.proc != procWrite {
			return nil, nil, fmt.Errorf("%w: %d bytes that are no data for a file", errRecord, n)
		}
		e := c.exportOf(call)
		if e == nil {
			return nil, nil, c.passOver(r, n, call)
		}
		of = []limits{e.limits, c.limits}
	}
	for i, l := range of {
		if err := l.calling.Acquire(ctx, int64(n)); err != nil {
			for _, l := range of[:i] {
				l.calling.Release(int64(n))
			}
			return nil, nil, err
		}
	}
	record = take(n)
	release = func() {
		give(record)
		for _, l := range of {
			l.calling.Release(int64(n))
		}
	}
	if _, err := io.ReadFull(r, record); err != nil {
		release()
		return nil, nil, err
	}
	return record, release, nil
}

// passOver answers a WRITE without a valid handle, such as of an export that has ended, and keeps nothing of it.
func (c *conversation) passOver(r *bufio.Reader, n int, call call) error {
	if _, err := r.Discard(n); err != nil {
		return err
	}
	e := accept(call.xid, acceptSuccess)
	e.uint32(uint32(errStale))
	for range nfsProcedures[procWrite].absent {
		e.uint32(0)
	}
	return c.send(e.b)
}

// errLapsed is a reply that is not given: another server may have gone on since.
var errLapsed = errors.New("the lease has lapsed")

// send sends a reply.
func (c *conversation) send(reply []byte) error {
	c.replied.Lock()
	defer c.replied.Unlock()
	if !c.Lease.Holds() {
		return errLapsed
	}
	c.conn.SetWriteDeadline(time.Now().Add(patience))
	_, err := c.conn.Write(seal(reply))
	return err
}

// large buffers are used again.
var large = sync.Pool{New: func() any { return new([maxRecord]byte) }}

const largeFrom = 32 << 10

func take(n int) []byte {
	if n < largeFrom {
		return make([]byte, n)
	}
	return large.Get().(*[maxRecord]byte)[:n]
}

func give(b []byte) {
	if cap(b) == maxRecord {
		large.Put((*[maxRecord]byte)(b[:maxRecord]))
	}
}

// answer does one call and sends its reply.
func (c *conversation) answer(ctx context.Context, record []byte) error {
	call, reply, err := parseCall(record)
	if err != nil {
		return err
	}
	end, err := c.Lease.Begin(ctx)
	if err != nil {
		return err
	}
	defer end()
	x := &exchange{conversation: c, call: call, release: func() {}}
	defer func() { x.release() }()
	if reply == nil && call.once() {
		reply, err = x.onlyOnce(ctx, identify(c.client, record))
	} else if reply == nil {
		reply, err = x.done(ctx)
	}
	if err != nil {
		return err
	}
	n := len(reply)
	err = c.send(reply)
	if x.buffer != nil {
		give(x.buffer)
	}
	if err == nil && c.Done != nil {
		c.Done(call.name(), x.outcome.String(), len(record), n)
	}
	return err
}

// onlyOnce is done for a call that may be the repetition of one.
func (x *exchange) onlyOnce(ctx context.Context, id callID) (reply []byte, err error) {
	e := x.exportOf(x.call)
	if e == nil {
		return x.done(ctx)
	}
	of, isNew := e.replied.begin(id)
	if !isNew {
		select {
		case <-of.done:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
		if of.reply == nil {
			return nil, errRepeated
		}
		return bytes.Clone(of.reply), nil
	}
	defer func() {
		if x.later {
			e.replied.end(id, of, nil)
		} else {
			e.replied.end(id, of, reply)
		}
	}()
	return x.done(ctx)
}

// errRepeated is a call that was being done, and then was not: its client asks again once more.
var errRepeated = errors.New("a repeated call that was not done")

// done does the call, once there is room for the reply.
func (x *exchange) done(ctx context.Context) ([]byte, error) {
	release, err := x.reserve(ctx)
	if err != nil {
		return nil, err
	}
	x.release = release
	return x.work(ctx)
}

// reserve waits until there is memory for the reply.
func (x *exchange) reserve(ctx context.Context) (release func(), err error) {
	e := x.exportOf(x.call)
	if e == nil {
		return func() {}, nil // its reply is a refusal, or the handle of a root
	}
	n := x.most()
	if err := e.replies.Acquire(ctx, n); err != nil {
		return nil, err
	}
	if err := x.replies.Acquire(ctx, n); err != nil {
		e.replies.Release(n)
		return nil, err
	}
	x.of = &e.limits
	return func() {
		x.replies.Release(n)
		e.replies.Release(n)
	}, nil
}

// work does the call when it is its turn.
func (x *exchange) work(ctx context.Context) ([]byte, error) {
	if x.of != nil {
		if err := x.of.working.Acquire(ctx, 1); err != nil {
			return nil, err
		}
		defer x.of.working.Release(1)
	}
	if err := x.working.Acquire(ctx, 1); err != nil {
		return nil, err
	}
	defer x.working.Release(1)
	return x.reply(), nil
}

// exportOf is the export that the call's first argument is a valid handle of, nil where it is none.
func (s *Server) exportOf(c call) *exported {
	if c.program != programNFS || c.version != version3 {
		return nil
	}
	handle := c.args.opaque(maxHandle)
	t, well := tagOf(handle)
	if !well {
		return nil
	}
	s.mu.RLock()
	e := s.tags[t]
	s.mu.RUnlock()
	if e == nil {
		return nil
	}
	if _, well := e.sealer.open(handle); !well {
		return nil
	}
	return e
}

// most is how long the reply can be.
func (x *exchange) most() int64 {
	switch x.proc {
	case procRead:
		args := x.args
		args.opaque(maxHandle)
		args.uint64()
		return int64(min(args.uint32(), maxData)) + smallReply
	case procReaddir, procReaddirplus:
		return maxList + smallReply
	}
	return smallReply
}

// smallReply has room for a path and attributes.
const smallReply = 5 << 10

// Programs and versions that are served.
const (
	programNFS, programMount = 100003, 100005
	version3                 = 3
)

// An exchange is one call and its reply.
type exchange struct {
	*conversation
	call
	out     encoder
	of      *limits
	release func() // what was reserved for the reply
	outcome status
	later   bool      // the client is to ask again
	export  *exported // that is being worked in
	buffer  []byte    // that the reply is in, where it is a large one
}

// reply does the call.
func (x *exchange) reply() []byte {
	var table []procedure
	switch x.program {
	case programNFS:
		table = nfsProcedures[:]
	case programMount:
		table = mountProcedures[:]
	default:
		return accept(x.xid, acceptProgUnavail).b
	}
	if x.version != version3 {
		e := accept(x.xid, acceptProgMismatch)
		e.uint32(version3)
		e.uint32(version3)
		return e.b
	}
	if x.proc >= uint32(len(table)) {
		return accept(x.xid, acceptProcUnavail).b
	}
	p := table[x.proc]
	if p.run == nil { // NULL, and those without arguments and results
		return accept(x.xid, acceptSuccess).b
	}
	if x.program == programNFS && x.flavor != authSys {
		return refuse(x.xid, authTooWeak)
	}
	x.out = accept(x.xid, acceptSuccess)
	start := len(x.out.b)
	defer x.leave()
	s := p.run(x)
	x.outcome = s
	switch s {
	case ok:
	case garbage:
		return accept(x.xid, acceptGarbage).b
	default:
		x.later = s == errJukebox
		x.out.b = x.out.b[:start]
		x.out.uint32(uint32(s))
		for range p.absent {
			x.out.uint32(0)
		}
	}
	return x.out.b
}

// A procedure writes its whole reply, or returns why there is none.
type procedure struct {
	run    func(x *exchange) status
	absent int  // attributes that a reply without success could have
	once   bool // done again, it would do or answer something else
}

// enter finds the export that a handle is of, and begins to work in it.
func (x *exchange) enter(handle []byte) (r reference, s status) {
	t, well := tagOf(handle)
	if !well {
		return r, errBadHandle
	}
	if x.export == nil {
		x.mu.RLock()
		e := x.tags[t]
		x.mu.RUnlock()
		if e == nil {
			return r, errStale
		}
		e.RLock()
		x.export = e
		if e.gone || !e.admits(x.client) {
			return r, errStale
		}
		if x.holds(e.Volume) {
			return r, errJukebox
		}
	} else if x.export.tag != t {
		return r, errXDev
	}
	if r, well = x.export.sealer.open(handle); !well {
		return r, errBadHandle
	}
	return r, ok
}

func (x *exchange) leave() {
	if x.export != nil {
		x.export.RUnlock()
		x.export = nil
	}
}

// object opens what a handle is of.
func (x *exchange) object(handle []byte, flags int) (object, status) {
	r, s := x.enter(handle)
	if s != ok {
		return object{fd: -1}, s
	}
	o, err := x.export.object(r, flags)
	return o, statusOf(err)
}

// subject opens what the handle is of that is a call's only argument.
func (x *exchange) subject() (object, status) {
	handle := x.args.opaque(maxHandle)
	if x.args.bad {
		return object{fd: -1}, garbage
	}
	return x.object(handle, unix.O_PATH)
}
