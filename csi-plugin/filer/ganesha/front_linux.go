package ganesha

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"runtime"
	"sync"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sync/semaphore"
	"golang.org/x/sys/unix"

	"github.com/cradlestack/cradlestack/csi-plugin/filer/crowd"
	"github.com/cradlestack/cradlestack/csi-plugin/filer/lease"
)

const (
	maxConnections, maxConnectionsOfOne = 10000, 2048 // of one address; where there are more, those go first that have shown no handle of an export, and then of all those without a call for long
	idleTime                            = time.Minute // which that is: clients that have anything open renew their lease more often, and sessions outlast connections
	maxCalls                            = 1024        // of a connection at once

	maxRecord   = 1<<20 + 64<<10
	smallRecord = 16 << 10
	maxLarge    = 256 << 20 // of calls that are larger, together
	buffered    = 4 << 10

	patience = time.Minute // with a peer in the middle of a record
)

// A front is what clients talk to in the place of NFS-Ganesha: it authenticates file handles, and asks the lease. NFS-Ganesha is in a network namespace with nothing in
// it, where each address is a local one: the front connects to it from its client's, so that it sees who that is.
type front struct {
	seal
	guide func(client netip.Addr) guide // nil for none
	lease *lease.Lease
	log   *slog.Logger
	large *semaphore.Weighted
	crowd crowd.Crowd

	mu    sync.Mutex
	space netns.NsHandle // closed at the end
}

func newFront(key []byte, by *lease.Lease, log *slog.Logger) (*front, error) {
	space, err := isolated()
	return &front{seal: newSeal(key), lease: by, log: log, space: space, large: semaphore.NewWeighted(maxLarge), crowd: crowd.Crowd{Most: maxConnections, MostOfOne: maxConnectionsOfOne, Idle: idleTime}}, err
}

func (f *front) close() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if !f.space.IsOpen() {
		return nil
	}
	return f.space.Close()
}

// enter has the thread be in the namespace, until its end.
func (f *front) enter() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	return netns.Set(f.space)
}

// isolated makes a network namespace whose loopback interface has all addresses. It is there as long as somebody has it.
func isolated() (netns.NsHandle, error) {
	type made struct {
		space netns.NsHandle
		err   error
	}
	result := make(chan made)
	go func() {
		runtime.LockOSThread() // for good: the thread ends with this
		space, err := netns.New()
		if err == nil {
			err = loopback()
		}
		result <- made{space, err}
	}()
	m := <-result
	if m.err != nil {
		return m.space, fmt.Errorf("a network namespace: %w", m.err)
	}
	return m.space, nil
}

func loopback() error {
	lo, err := netlink.LinkByName("lo")
	if err == nil {
		err = netlink.LinkSetUp(lo)
	}
	if err != nil {
		return err
	}
	// NFS-Ganesha takes addresses of a version only where there is one besides the loopback interface's usual one: those are for documentation (RFC 5737, RFC 3849).
	for _, own := range []netip.Addr{netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("2001:db8::1")} {
		bits := own.BitLen()
		err := netlink.AddrAdd(lo, &netlink.Addr{IPNet: &net.IPNet{IP: own.AsSlice(), Mask: net.CIDRMask(bits, bits)}})
		if err == nil {
			err = netlink.RouteAdd(&netlink.Route{
				LinkIndex: lo.Attrs().Index, Dst: &net.IPNet{IP: make(net.IP, bits/8), Mask: net.CIDRMask(0, bits)}, Type: unix.RTN_LOCAL, Table: unix.RT_TABLE_LOCAL, Scope: netlink.SCOPE_HOST,
			})
		}
		if err != nil && (own.Is4() || !errors.Is(err, unix.EOPNOTSUPP) && !errors.Is(err, unix.EACCES)) { // there may be no version 6
			return fmt.Errorf("all addresses on the loopback interface: %w", err)
		}
	}
	return nil
}

// dial connects to NFS-Ganesha as a client has connected to the front.
func (f *front) dial(ctx context.Context, client, server net.Addr) (conn net.Conn, err error) {
	// A socket is of the namespace that the thread has which makes it.
	result := make(chan error)
	go func() {
		runtime.LockOSThread() // for good
		err := f.enter()
		if err == nil {
			d := net.Dialer{LocalAddr: &net.TCPAddr{IP: client.(*net.TCPAddr).IP}, Control: func(_, _ string, c syscall.RawConn) error {
				var err error
				return errors.Join(c.Control(func(fd uintptr) {
					err = unix.SetsockoptInt(int(fd), unix.SOL_IP, unix.IP_FREEBIND, 1)
				}), err)
			}}
			conn, err = d.DialContext(ctx, "tcp", server.String())
		}
		result <- err
	}()
	return conn, <-result
}

// serve answers clients until ctx ends, and closes l.
func (f *front) serve(ctx context.Context, l net.Listener) {
	var g sync.WaitGroup
	defer g.Wait()
	stop := context.AfterFunc(ctx, func() { l.Close() })
	defer stop()
	for {
		client, err := l.Accept()
		if err != nil {
			if ctx.Err() != nil {
				return
			}
			f.log.Warn("accept a connection", "error", err)
			time.Sleep(100 * time.Millisecond)
			continue
		}
		from := client.RemoteAddr().(*net.TCPAddr).AddrPort().Addr().Unmap()
		guest := f.crowd.Admit(from, func() { client.Close() })
		if guest == nil {
			f.log.Debug("too many connections", "client", from)
			client.Close()
			continue
		}
		g.Go(func() {
			defer guest.Leave()
			c := &conversation{front: f, seal: f.seal, guest: guest, client: client, asked: map[uint32]asked{}, room: semaphore.NewWeighted(maxCalls)}
			if f.guide != nil {
				c.seal.guide = f.guide(from)
			}
			if err := c.run(ctx); err != nil && ctx.Err() == nil && errors.Is(err, errCompound) {
				f.log.Warn("a client", "address", client.RemoteAddr(), "error", err)
			}
		})
	}
}

// A conversation is a client's connection, and one to NFS-Ganesha for it.
type conversation struct {
	*front
	seal           seal // for this client
	guest          *crowd.Guest
	client, server net.Conn
	room           *semaphore.Weighted

	mu    sync.Mutex
	asked map[uint32]asked // that have not been answered, by number
}

type asked struct {
	question
	end func() // of the work under the lease
}

// run ends with either connection, or ctx.
func (c *conversation) run(ctx context.Context) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	defer c.client.Close()
	stop := context.AfterFunc(ctx, func() { c.client.Close() })
	defer stop()
	calls := bufio.NewReaderSize(c.client, buffered)
	if _, err := calls.Peek(1); err != nil { // one that says nothing has nothing of NFS-Ganesha
		return err
	}
	if err := c.connect(ctx); err != nil {
		return err
	}
	defer c.server.Close()
	stopServer := context.AfterFunc(ctx, func() { c.server.Close() })
	defer stopServer()
	var g sync.WaitGroup
	g.Go(func() { cancel(c.ask(ctx, calls)) })
	g.Go(func() {
		err := c.answer(bufio.NewReaderSize(c.server, buffered))
		// Where it has ended because another filer takes over, clients are to know when that serves.
		if end, lerr := c.lease.Begin(ctx); lerr == nil {
			end()
		}
		cancel(err)
	})
	g.Wait()
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, q := range c.asked {
		q.end()
	}
	return context.Cause(ctx)
}

// connect connects to NFS-Ganesha, which may be starting.
func (c *conversation) connect(ctx context.Context) (err error) {
	for end := time.Now().Add(startTime); ; {
		if c.server, err = c.dial(ctx, c.client.RemoteAddr(), c.client.LocalAddr()); err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(20 * time.Millisecond):
		}
		if time.Now().After(end) {
			return err
		}
	}
}

// ask passes the client's calls on.
func (c *conversation) ask(ctx context.Context, r *bufio.Reader) error {
	for {
		c.client.SetReadDeadline(time.Time{})
		if _, err := r.Peek(1); err != nil {
			return err
		}
		c.client.SetReadDeadline(time.Now().Add(patience))
		if err := c.askOne(ctx, r); err != nil {
			return err
		}
	}
}

func (c *conversation) askOne(ctx context.Context, r *bufio.Reader) error {
	held := int64(0)
	defer func() { c.large.Release(held) }()
	record, err := readRecord(r, func(n int) error {
		if n <= smallRecord {
			return nil
		}
		more := int64(n) - held
		held += more
		if err := c.large.Acquire(ctx, more); err != nil {
			held -= more
			return err
		}
		return nil
	})
	if err != nil {
		return err
	}
	parts, q, err := c.seal.call(record)
	if err != nil {
		return err
	}
	if q.shown {
		c.guest.Know()
	}
	if binary.BigEndian.Uint32(record[4:]) == msgCall {
		if err := c.room.Acquire(ctx, 1); err != nil {
			return err
		}
		end, err := c.lease.Begin(ctx)
		if err != nil {
			c.room.Release(1)
			return err
		}
		c.mu.Lock()
		_, twice := c.asked[q.xid]
		if !twice {
			c.guest.Begin()
			c.asked[q.xid] = asked{q, func() { c.guest.End(); end(); c.room.Release(1) }}
		}
		c.mu.Unlock()
		if twice {
			end()
			return fmt.Errorf("two calls of one number: %w", errCompound)
		}
	}
	return send(c.server, parts)
}

// answer passes NFS-Ganesha's replies on, and its calls back.
func (c *conversation) answer(r *bufio.Reader) error {
	for {
		if _, err := r.Peek(1); err != nil {
			return err
		}
		record, err := readRecord(r, func(int) error { return nil })
		if err != nil {
			return err
		}
		var q asked
		if binary.BigEndian.Uint32(record[4:]) == msgReply {
			xid := binary.BigEndian.Uint32(record)
			c.mu.Lock()
			q = c.asked[xid]
			delete(c.asked, xid)
			c.mu.Unlock()
		}
		err = c.answerOne(record, q)
		if q.end != nil {
			q.end()
		}
		if err != nil {
			return err
		}
	}
}

func (c *conversation) answerOne(record []byte, q asked) (err error) {
	parts := [][]byte{record}
	if q.changed() {
		if parts, err = c.seal.reply(record, q.question); err != nil {
			return err
		}
	}
	if !c.lease.Holds() {
		return lease.ErrEnded
	}
	return send(c.client, parts)
}

// readRecord reads one of RPC (RFC 5531 §11). room is asked before memory is taken for it.
func readRecord(r *bufio.Reader, room func(n int) error) (record []byte, err error) {
	for last := false; !last; {
		head := make([]byte, 4)
		if _, err := io.ReadFull(r, head); err != nil {
			return nil, err
		}
		n := binary.BigEndian.Uint32(head)
		last = n>>31 != 0
		n &= 1<<31 - 1
		if n > maxRecord || len(record)+int(n) > maxRecord {
			return nil, fmt.Errorf("a record of more than %d bytes: %w", maxRecord, errCompound)
		}
		if n == 0 && !last {
			return nil, fmt.Errorf("a part of a record with nothing in it: %w", errCompound)
		}
		if err := room(len(record) + int(n)); err != nil {
			return nil, err
		}
		from := len(record)
		record = append(record, make([]byte, n)...)
		if _, err := io.ReadFull(r, record[from:]); err != nil {
			return nil, err
		}
	}
	if len(record) < 8 {
		return nil, fmt.Errorf("a record of %d bytes: %w", len(record), errCompound)
	}
	return record, nil
}

func send(conn net.Conn, parts [][]byte) error {
	n := 0
	for _, p := range parts {
		n += len(p)
	}
	conn.SetWriteDeadline(time.Now().Add(patience))
	all := net.Buffers(append([][]byte{binary.BigEndian.AppendUint32(nil, 1<<31|uint32(n))}, parts...))
	_, err := all.WriteTo(conn)
	return err
}
