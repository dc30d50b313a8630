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
	"maps"
	"net"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/semaphore"
	"golang.org/x/sys/unix"

	"github.com/cradlestack/cradlestack/csi-plugin/filer/crowd"
	"github.com/cradlestack/cradlestack/csi-plugin/filer/lease"
)

// Bounds of what clients together can make the server hold, and of what those of one export can: a hostile client keeps its own volume waiting,
// not others'. Who has no file handle holds a connection and its buffer.
const (
	maxConnections, maxConnectionsOfOne = 16384, 2048 // of one address; where there are more, those go first that have shown no handle, and then of all those without a call for long
	idle                                = time.Minute // which that is: who has such a connection makes another one when he needs it
	maxCalls, maxKept                   = 128, 1024   // of one connection, at the same time, and others that the storage keeps

	maxWorking, maxWorkingInOne = 256, 64             // calls that are being done
	maxCalling, maxCallingInOne = 512 << 20, 64 << 20 // bytes of calls
	maxReplies, maxRepliesInOne = 512 << 20, 64 << 20 // bytes of replies
	maxSmallInOne               = 64 << 20            // bytes of calls that are too small to wait for that

	patience = time.Minute // with a client that does not go on in the middle of a call or reply
	hurry    = time.Second // where others wait for the memory that it has meanwhile
)

// A call that the storage keeps, as a disk or a zpool that answers nothing does, may have no end. Connections and the server go on without it: clients have all their mounts
// of a server in one connection.
const (
	readsOn  = 100 * time.Millisecond // after which others of its connection are read although it was to be done by then
	stuck    = 10 * time.Second       // after which it counts no longer among those that are being done
	maxStuck = 4096                   // of which so many are left alone at most: each has a thread
	maxLent  = 1 << 30                // bytes that they have besides: what others wait for is not theirs any more
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

	leaving map[string][]*exported // by path: those that calls are at work in still, or may be

	replied map[string]*replies // by the export's path

	connections crowd.Crowd
	limits
	stuck atomic.Int64 // calls that the storage keeps
	lent  atomic.Int64 // bytes that they have

	holding time.Duration // Patience

	began   time.Time
	short   atomic.Int64 // calls that wait for memory
	talking sync.Map     // each *conversation
}

// New returns a server without exports. Handles that were made with the same key stay valid.
func New(key [KeySize]byte, log *slog.Logger) *Server {
	s := &Server{
		holding: Patience, began: time.Now(), key: key[:], log: log, paths: map[string]*exported{}, tags: map[tag]*exported{}, replied: map[string]*replies{}, held: map[string]int{}, leaving: map[string][]*exported{},
		connections: crowd.Crowd{Most: maxConnections, MostOfOne: maxConnectionsOfOne, Idle: idle}, limits: newLimits(maxWorking, maxCalling, maxReplies),
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
	s.leave(e.Path)
	s.paths[e.Path], s.tags[x.tag] = x, x
	if x.replied = s.replied[e.Path]; x.replied == nil {
		x.replied = newReplies()
		s.replied[e.Path] = x.replied
	}
	s.mu.Unlock()
	return s.left(e.Path)
}

// Unexport is Engine's.
func (s *Server) Unexport(path string) error {
	s.mu.Lock()
	if x := s.leave(path); x != nil {
		delete(s.paths, path)
		delete(s.tags, x.tag)
		delete(s.replied, path)
	}
	s.mu.Unlock()
	return s.left(path)
}

// leave begins to end what is exported at a path. The server is locked.
func (s *Server) leave(path string) *exported {
	x := s.paths[path]
	if x != nil {
		x.late = time.Now().Add(stuck)
		s.leaving[path] = append(s.leaving[path], x)
		go x.end() // which left waits for, or nobody where the storage keeps its calls
	}
	return x
}

// left waits for the end of all that was exported at a path before, by whichever call, for as long as a call of clients' may take: who asks again and again waits once.
func (s *Server) left(path string) error {
	for {
		s.mu.Lock()
		var x *exported
		if all := s.leaving[path]; len(all) > 0 {
			x = all[0]
		} else {
			delete(s.leaving, path)
		}
		s.mu.Unlock()
		if x == nil {
			return nil
		}
		select {
		case <-x.ended:
		case <-time.After(max(time.Until(x.late), readsOn)): // of what has ended meanwhile is heard
			return fmt.Errorf("export of volume %s: %w: nobody begins another one, and those have no end before it answers", x.Volume, ErrStuck)
		}
		s.mu.Lock()
		s.leaving[path] = slices.DeleteFunc(s.leaving[path], func(other *exported) bool { return other == x })
		s.mu.Unlock()
		if x.failure != nil {
			return x.failure
		}
	}
}

// Close ends all exports.
func (s *Server) Close() error {
	s.mu.Lock()
	for path := range s.paths {
		s.leave(path)
	}
	clear(s.paths)
	clear(s.tags)
	all := slices.Concat(slices.Collect(maps.Values(s.leaving))...)
	clear(s.leaving)
	s.mu.Unlock() // which calls that are at work take as well
	var errs []error
	for _, x := range all {
		<-x.ended
		errs = append(errs, x.failure)
	}
	return errors.Join(errs...)
}

// end waits for the calls that are at work, and lets no other begin.
func (x *exported) end() {
	x.Lock()
	defer x.Unlock()
	x.gone = true
	errs := []error{x.root.Close()}
	for _, t := range x.snapshots {
		errs = append(errs, t.root.Close())
	}
	clear(x.snapshots)
	x.failure = errors.Join(errs...)
	close(x.ended)
}

// Hold is Engine's.
func (s *Server) Hold(volume string, do func() error) (err error) {
	s.mu.Lock()
	s.held[volume]++
	var all []*exported
	for _, x := range slices.Concat(append(slices.Collect(maps.Values(s.leaving)), slices.Collect(maps.Values(s.paths)))...) {
		if x.Volume == volume {
			all = append(all, x)
		}
	}
	s.mu.Unlock()
	defer func() {
		if errors.Is(err, lease.ErrEnded) {
			return
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.held[volume]--; s.held[volume] == 0 {
			delete(s.held, volume)
		}
	}()
	end := time.Now().Add(s.holding)
	for _, x := range all { // calls that have begun; those that begin later see that the volume is held
		for !x.TryLock() { // as Lock would keep all others from then on, whatever comes of this
			if time.Now().After(end) {
				return fmt.Errorf("volume %s: %w: nothing is done to it before it answers", volume, ErrStuck)
			}
			time.Sleep(time.Millisecond)
		}
		x.Unlock()
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
	conversations.Go(func() { every(ctx, lookForIdle, s.forgetSnapshots) })
	conversations.Go(func() { every(ctx, hurry/2, s.hurry) })
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
		guest := s.connections.Admit(client, func() { conn.Close() })
		if guest == nil {
			s.log.Debug("too many connections", "client", client)
			conn.Close()
			continue
		}
		conversations.Go(func() {
			defer guest.Leave()
			s.converse(ctx, conn, guest)
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
	conn   net.Conn
	client netip.Addr
	guest  *crowd.Guest

	calls *semaphore.Weighted // that are being done
	kept  atomic.Int64        // others, which the storage keeps
	group sync.WaitGroup

	replied sync.Mutex
	until   time.Time // the client has to take a reply

	reads, writes atomic.Int64 // since when, after began, it waits for the client in the middle of a call, or of a reply; 0 where it does not
}

// every does something again and again until ctx ends.
func every(ctx context.Context, period time.Duration, do func()) {
	t := time.NewTicker(period)
	defer t.Stop()
	for {
		select {
		case <-t.C:
			do()
		case <-ctx.Done():
			return
		}
	}
}

// hurry ends, while calls wait for memory, the conversations of clients that have some and do not go on: however many exports somebody has, he keeps nobody else waiting.
func (s *Server) hurry() {
	if s.short.Load() == 0 {
		return
	}
	ended := 0
	for c := range s.talking.Range {
		c := c.(*conversation)
		for _, since := range []int64{c.reads.Load(), c.writes.Load()} {
			if since != 0 && time.Since(s.began)-time.Duration(since) > hurry {
				c.conn.Close()
				ended++
			}
		}
	}
	if ended > 0 {
		s.log.Warn("clients that did not go on while others waited for memory have lost their connections", "connections", ended)
	}
}

// A memory is what a call, and its reply, have of all clients'. Once the storage has kept the call for long it is no part of that any more, as far as maxLent goes: else
// clients of other volumes would wait for what may have no end.
type memory struct {
	*Server

	small int64 // of the call, where that is not counted as one of its export's yet

	mu    sync.Mutex
	late  bool
	parts [2]part
}

// Parts of it, each of its own limit.
const ofCall, ofReply = 0, 1

type part struct{ held, lent int64 }

func (m *memory) of(which int) *semaphore.Weighted {
	return [...]*semaphore.Weighted{ofCall: m.calling, ofReply: m.replies}[which]
}

// has notes what was taken.
func (m *memory) has(which int, n int64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.parts[which] = part{held: n}
	if m.late {
		m.lend(which)
	}
}

// isLate is for a call that is at work for so long that it may have no end.
func (m *memory) isLate() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.late = true
	m.lend(ofCall)
	m.lend(ofReply)
}

// lend lets others have as much as a part is. It is locked.
func (m *memory) lend(which int) {
	p := &m.parts[which]
	if m.lent.Add(p.held) > maxLent {
		m.lent.Add(-p.held)
		return
	}
	m.of(which).Release(p.held)
	p.held, p.lent = 0, p.lent+p.held
}

// free gives a part back.
func (m *memory) free(which int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	p := &m.parts[which]
	m.of(which).Release(p.held)
	m.lent.Add(-p.lent)
	*p = part{}
}

// borrow takes some of all clients'.
func (s *Server) borrow(ctx context.Context, of *semaphore.Weighted, n int64) error {
	if of.TryAcquire(n) {
		return nil
	}
	s.short.Add(1)
	defer s.short.Add(-1)
	return of.Acquire(ctx, n)
}

// converse answers the calls on a connection, several at a time and in no order. One that comes alone and need not wait for anything is done right here: another
// goroutine would be woken on another processor, which takes longer than such a call.
func (s *Server) converse(ctx context.Context, conn net.Conn, guest *crowd.Guest) {
	defer conn.Close()
	c := &conversation{Server: s, conn: conn, client: addressOf(conn), guest: guest}
	stop := context.AfterFunc(ctx, func() {
		conn.SetReadDeadline(time.Unix(1, 0))
		if !s.Lease.Holds() { // no call will be answered, and some may have no end
			conn.Close()
		}
	})
	defer stop()
	c.calls = semaphore.NewWeighted(maxCalls)
	s.talking.Store(c, nil)
	defer s.talking.Delete(c)
	defer c.group.Wait()
	c.listen(ctx, bufio.NewReaderSize(conn, smallCall))
}

// listen reads the calls. Where one that it does itself is kept by the storage, another goroutine reads on, and this one ends with the call.
func (c *conversation) listen(ctx context.Context, r *bufio.Reader) {
	goesOn := make(chan struct{})
	late := time.AfterFunc(time.Hour, func() {
		c.group.Go(func() { c.listen(ctx, r) })
		close(goesOn)
	})
	defer late.Stop()
	late.Stop()
	for {
		record, mem, release, err := c.read(ctx, r)
		if err == nil && record == nil {
			continue
		}
		if err != nil {
			if errors.Is(err, errRecord) {
				c.log.Warn("a client that does not speak NFS", "client", c.client, "error", err)
			}
			return
		}
		if r.Buffered() == 0 && len(record) <= smallCall {
			late.Reset(readsOn)
			err = c.answer(ctx, record, mem, false)
			superseded := !late.Stop()
			if !errors.Is(err, errWait) {
				release()
				c.ends(ctx, err)
			}
			if superseded {
				<-goesOn
				if errors.Is(err, errWait) {
					c.ends(ctx, c.answer(ctx, record, mem, true))
					release()
				}
				return
			}
			if !errors.Is(err, errWait) {
				continue
			}
		}
		if c.calls.Acquire(ctx, 1) != nil {
			release()
			return
		}
		c.group.Go(func() {
			defer untilStuck(c.calls, maxKept, mem.isLate, &c.kept)()
			defer release()
			c.ends(ctx, c.answer(ctx, record, mem, true))
		})
	}
}

// untilStuck gives back one of places, which was taken, at the end of what begins now, or before that if it lasts so long that it may have no end. It is counted
// from then on to its end; where those in the first of counts are more than most, it keeps its place. isLate is called then.
func untilStuck(places *semaphore.Weighted, most int64, isLate func(), counts ...*atomic.Int64) (end func()) {
	left, done := false, make(chan struct{})
	late := time.AfterFunc(stuck, func() {
		defer close(done)
		isLate()
		for i, n := range counts {
			now := n.Add(1)
			left = left || i == 0 && now <= most
		}
		if left {
			places.Release(1)
		}
	})
	return func() {
		if !late.Stop() {
			<-done
			for _, n := range counts {
				n.Add(-1)
			}
		}
		if !left {
			places.Release(1)
		}
	}
}

// ends closes the connection after an error, which ends its loop. At the server's end others still have their replies to send.
func (c *conversation) ends(ctx context.Context, err error) {
	if err != nil && ctx.Err() == nil {
		c.conn.Close()
	}
}

// smallCall is the length of the largest call that is no WRITE: two names, handles and users have room in it.
const smallCall = 16 << 10

// read takes the next call from the connection; none where it was answered already. One that needs memory of its own has to be a WRITE with a valid
// handle.
func (c *conversation) read(ctx context.Context, r *bufio.Reader) (record []byte, mem *memory, release func(), err error) {
	if ctx.Err() != nil {
		return nil, nil, nil, context.Cause(ctx)
	}
	n, err := readLength(r)
	if err != nil {
		return nil, nil, nil, err
	}
	if n > r.Buffered() {
		c.conn.SetReadDeadline(time.Now().Add(patience))
		defer c.conn.SetReadDeadline(time.Time{})
		if ctx.Err() != nil { // whose end has set another one
			return nil, nil, nil, context.Cause(ctx)
		}
	}
	head, err := r.Peek(min(n, smallCall))
	if err != nil {
		return nil, nil, nil, err
	}
	var own *exported
	if n > smallCall {
		call, _, err := parseCall(head)
		if err != nil {
			return nil, nil, nil, err
		}
		if call.program != programNFS || call.version != version3 || call.proc != procWrite {
			return nil, nil, nil, fmt.Errorf("%w: %d bytes that are no data for a file", errRecord, n)
		}
		e := c.exportOf(call).export
		if e == nil {
			return nil, nil, nil, c.passOver(r, n, call, errStale)
		}
		own = e
		if err := e.memory(ctx, int64(room(n))); err != nil {
			if errors.Is(err, ErrStuck) {
				err = c.passOver(r, n, call, errJukebox)
			}
			return nil, nil, nil, err
		}
	}
	takes := int64(room(n))
	if err := c.borrow(ctx, c.calling, takes); err != nil {
		if own != nil {
			own.calling.Release(takes)
		}
		return nil, nil, nil, err
	}
	mem = &memory{Server: c.Server}
	mem.has(ofCall, takes)
	if own == nil {
		mem.small = takes
	}
	record = take(n)
	c.guest.Begin()
	release = func() {
		c.guest.End()
		give(record)
		mem.free(ofCall)
		if own != nil {
			own.calling.Release(takes)
		}
	}
	if n > smallCall { // else all of it is here
		c.reads.Store(int64(time.Since(c.began)))
		defer c.reads.Store(0)
	}
	if _, err := io.ReadFull(r, record); err != nil {
		release()
		return nil, nil, nil, err
	}
	return record, mem, release, nil
}

// ErrStuck is that the storage keeps calls, and with them what is needed.
var ErrStuck = errors.New("the storage keeps calls that have begun")

// memory takes some for a call. It gives up where that which others have may not be given back.
func (x *exported) memory(ctx context.Context, n int64) error {
	for !x.calling.TryAcquire(n) {
		if x.stuck.Load() > 0 {
			return ErrStuck
		}
		short, cancel := context.WithTimeout(ctx, time.Second)
		err := x.calling.Acquire(short, n)
		cancel()
		if err == nil {
			return nil
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
	}
	return nil
}

// passOver answers a WRITE without a valid handle, such as of an export that has ended, or one that there is no memory for, and keeps nothing of it.
func (c *conversation) passOver(r *bufio.Reader, n int, call call, s status) error {
	if _, err := r.Discard(n); err != nil {
		return err
	}
	e := accept(call.xid, acceptSuccess)
	e.uint32(uint32(s))
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
	now := time.Now()
	if c.until.Sub(now) < patience {
		c.until = now.Add(patience + patience/4)
		c.conn.SetWriteDeadline(c.until)
	}
	c.writes.Store(int64(now.Sub(c.began)))
	defer c.writes.Store(0)
	_, err := c.conn.Write(seal(reply))
	return err
}

// Buffers of some sizes are used again.
var (
	page = sync.Pool{New: func() any { return new([pageBuffer]byte) }}
	most = sync.Pool{New: func() any { return new([maxRecord]byte) }}
)

const (
	pageFrom, pageBuffer = 1 << 10, 8 << 10 // one page of a file, and what is around it
	mostFrom             = 32 << 10
)

// room is the size of the buffer for n bytes.
func room(n int) int {
	switch {
	case n >= mostFrom:
		return maxRecord
	case n >= pageFrom && n <= pageBuffer:
		return pageBuffer
	}
	return n
}

func take(n int) []byte {
	switch room(n) {
	case maxRecord:
		return most.Get().(*[maxRecord]byte)[:n]
	case pageBuffer:
		return page.Get().(*[pageBuffer]byte)[:n]
	}
	return make([]byte, n)
}

func give(b []byte) {
	switch cap(b) {
	case maxRecord:
		most.Put((*[maxRecord]byte)(b[:maxRecord]))
	case pageBuffer:
		page.Put((*[pageBuffer]byte)(b[:pageBuffer]))
	}
}

// errWait is what a call that does not wait comes to when it would have to. Nothing has been done of it.
var errWait = errors.New("it has to wait")

// answer does one call and sends its reply. One that is not to wait is done right now, or not at all.
func (c *conversation) answer(ctx context.Context, record []byte, mem *memory, waits bool) error {
	call, reply, err := parseCall(record)
	if err != nil {
		return err
	}
	if !waits && !call.brief() {
		return errWait
	}
	end, begun := c.Lease.TryBegin()
	if !begun && !waits {
		return errWait
	}
	if !begun {
		if end, err = c.Lease.Begin(ctx); err != nil {
			return err
		}
	}
	defer end()
	x := &exchange{conversation: c, call: call, memory: mem, waits: waits}
	defer x.release()
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
	if err == nil && c.Done != nil {
		c.Done(call.name(), x.outcome.String(), len(record), n)
	}
	return err
}

// maxBrief bytes are read by a call that does not wait: its reply has room in the connection as a rule, and others are not kept for long.
const maxBrief = 64 << 10

// brief says whether a call needs nothing, as a rule, but what the kernel has in memory.
func (c call) brief() bool {
	if c.program != programNFS || c.version != version3 {
		return false
	}
	switch c.proc {
	case procGetattr, procLookup, procAccess:
		return true
	case procRead:
		return c.count() <= maxBrief
	}
	return false
}

// count is how much a READ wants.
func (c call) count() uint32 {
	c.args.opaque(maxHandle)
	c.args.uint64()
	return c.args.uint32()
}

// onlyOnce is done for a call that may be the repetition of one.
func (x *exchange) onlyOnce(ctx context.Context, id callID) (reply []byte, err error) {
	e := x.first().export
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

// done does the call, once there is room for the reply and it is its turn.
func (x *exchange) done(ctx context.Context) ([]byte, error) {
	if e := x.first().export; e != nil { // else its reply is a refusal, or the handle of a root
		defer e.small.Add(-x.memory.small)
		if e.small.Add(x.memory.small) > maxSmallInOne { // of calls that wait for each other
			return x.putOff(), nil
		}
		x.bytes = x.atMost()
		if err := x.acquire(ctx, e.replies, x.bytes); err != nil {
			return nil, err
		}
		x.reserved = e.replies
		if err := x.acquire(ctx, x.limits.replies, x.bytes); err != nil {
			return nil, err
		}
		x.memory.has(ofReply, x.bytes)
		if e.stuck.Load() >= maxWorkingInOne {
			return x.putOff(), nil
		}
		if err := x.acquire(ctx, e.working, 1); err != nil {
			return nil, err
		}
		defer e.working.Release(1)
		if err := x.acquire(ctx, x.working, 1); err != nil {
			return nil, err
		}
		defer untilStuck(x.working, maxStuck, x.memory.isLate, &x.conversation.stuck, &e.stuck)()
		return x.reply()
	}
	if err := x.acquire(ctx, x.working, 1); err != nil {
		return nil, err
	}
	defer x.working.Release(1)
	return x.reply()
}

// putOff has the client ask again later.
func (x *exchange) putOff() []byte {
	e := accept(x.xid, acceptSuccess)
	e.uint32(uint32(errJukebox))
	if x.proc < uint32(len(nfsProcedures)) {
		for range nfsProcedures[x.proc].absent {
			e.uint32(0)
		}
	}
	x.outcome, x.later = errJukebox, true
	return e.b
}

// acquire takes some of what there is, as soon as there is so much.
func (x *exchange) acquire(ctx context.Context, of *semaphore.Weighted, n int64) error {
	switch {
	case x.waits && of == x.limits.replies:
		return x.borrow(ctx, of, n)
	case x.waits:
		return of.Acquire(ctx, n)
	case of.TryAcquire(n):
		return nil
	}
	return errWait
}

// release is called once the reply is sent, or there is none.
func (x *exchange) release() {
	give(x.buffer)
	x.memory.free(ofReply)
	if x.reserved != nil {
		x.reserved.Release(x.bytes)
	}
}

// A target is what a valid handle leads to; without an export, it was none.
type target struct {
	export    *exported
	handle    []byte
	reference reference
}

// exportOf is what the call's first argument leads to.
func (s *Server) exportOf(c call) (t target) {
	if c.program != programNFS || c.version != version3 {
		return t
	}
	t.handle = c.args.opaque(maxHandle)
	its, well := tagOf(t.handle)
	if !well {
		return t
	}
	s.mu.RLock()
	e := s.tags[its]
	s.mu.RUnlock()
	if e == nil {
		return t
	}
	if t.reference, well = e.sealer.open(t.handle); well {
		t.export = e
	}
	return t
}

// first is exportOf this call.
func (x *exchange) first() target {
	if !x.looked {
		x.target, x.looked = x.exportOf(x.call), true
	}
	return x.target
}

// is says whether a handle is the one that was looked at, and not another of the same bytes at most.
func (t target) is(handle []byte) bool {
	return t.export != nil && len(handle) == len(t.handle) && &handle[0] == &t.handle[0]
}

// atMost is how much memory the reply can take.
func (x *exchange) atMost() int64 {
	switch x.proc {
	case procRead:
		return int64(room(smallReply + int(min(x.count(), maxData))))
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
	memory  *memory
	waits   bool // for memory, its turn or the disk, as long as it takes
	out     encoder
	outcome status
	later   bool      // the client is to ask again
	export  *exported // that is being worked in
	buffer  []byte    // that the reply is in, where it is a large one

	looked bool // at the first handle
	target target

	bytes    int64               // reserved for the reply
	reserved *semaphore.Weighted // of the export's
}

// reply does the call.
func (x *exchange) reply() ([]byte, error) {
	var table []procedure
	switch x.program {
	case programNFS:
		table = nfsProcedures[:]
	case programMount:
		table = mountProcedures[:]
	default:
		return accept(x.xid, acceptProgUnavail).b, nil
	}
	if x.version != version3 {
		e := accept(x.xid, acceptProgMismatch)
		e.uint32(version3)
		e.uint32(version3)
		return e.b, nil
	}
	if x.proc >= uint32(len(table)) {
		return accept(x.xid, acceptProcUnavail).b, nil
	}
	p := table[x.proc]
	if p.run == nil { // NULL, and those without arguments and results
		return accept(x.xid, acceptSuccess).b, nil
	}
	if x.program == programNFS && x.flavor != authSys {
		return refuse(x.xid, authTooWeak), nil
	}
	x.out = accept(x.xid, acceptSuccess)
	start := len(x.out.b)
	defer x.leave()
	s := p.run(x)
	x.outcome = s
	switch s {
	case ok:
	case mustWait:
		return nil, errWait
	case garbage:
		return accept(x.xid, acceptGarbage).b, nil
	default:
		x.later = s == errJukebox
		x.out.b = x.out.b[:start]
		x.out.uint32(uint32(s))
		for range p.absent {
			x.out.uint32(0)
		}
	}
	return x.out.b, nil
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
		held := e != nil && x.held[e.Volume] > 0
		x.mu.RUnlock()
		if e == nil {
			return r, errStale
		}
		if held && e.admits(x.client) { // who would hold waits for those alone that have begun
			return r, errJukebox
		}
		if !e.TryRLock() {
			if !x.waits {
				return r, mustWait
			}
			e.RLock()
		}
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
	if first := x.first(); first.export == x.export && first.is(handle) {
		r = first.reference
	} else if r, well = x.export.sealer.open(handle); !well {
		return r, errBadHandle
	}
	x.guest.Know()
	if r.snapshot != (snapshotID{}) && !x.waits { // which may have to be mounted
		return r, mustWait
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
