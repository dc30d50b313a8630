package wire

import (
	"io"
	"net"
	"os"
	"sync"
	"time"
)

// A line behaves as a virtio-serial port behind a QEMU socket does: the guest's end stays, host processes come and go. While nobody
// is there the guest reads EOF and its writes wait. Bytes in flight when a host process goes are lost.
type line struct {
	mu       sync.Mutex
	cond     *sync.Cond
	host     *hostEnd
	guest    guestEnd
	toGuest  []byte
	toHost   []byte
	quickly  bool // the guest does not see that a host process has gone, because the next is there before it looks
	late     bool // the guest sees only now that an earlier host process had gone
	left     int  // bytes that still pass to the guest before the host process dies; -1: any number
	inflight int
}

func newLine() *line {
	l := &line{left: -1, inflight: 256 << 10}
	l.cond = sync.NewCond(&l.mu)
	l.guest.line = l
	return l
}

// connect is a new host process; the one before it has died.
func (l *line) connect() *hostEnd {
	l.mu.Lock()
	defer l.mu.Unlock()
	h := &hostEnd{line: l}
	l.host, l.toHost, l.left = h, nil, -1
	l.cond.Broadcast()
	return h
}

func (l *line) disconnect() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.host, l.toHost = nil, nil
	l.cond.Broadcast()
}

// inject puts bytes on the line that no session has written.
func (l *line) inject(toGuest, toHost []byte) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.toGuest, l.toHost = append(l.toGuest, toGuest...), append(l.toHost, toHost...)
	l.cond.Broadcast()
}

// cutAfter lets n more bytes pass to the guest.
func (l *line) cutAfter(n int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.left = n
}

type deadline struct{ expired bool }

type guestEnd struct {
	addr
	line *line
	deadline
	used bool
}

func (g *guestEnd) again() bool {
	used := g.used
	g.used = true
	return used
}

func (g *guestEnd) Read(p []byte) (int, error) {
	l := g.line
	l.mu.Lock()
	defer l.mu.Unlock()
	for {
		switch {
		case g.expired:
			return 0, os.ErrDeadlineExceeded
		case len(l.toGuest) > 0:
			n := copy(p, l.toGuest)
			l.toGuest = l.toGuest[n:]
			l.cond.Broadcast()
			return n, nil
		case l.late:
			l.late = false
			return 0, io.EOF
		case l.host == nil && !l.quickly:
			return 0, io.EOF
		}
		l.cond.Wait()
	}
}

func (g *guestEnd) Write(p []byte) (int, error) {
	l := g.line
	l.mu.Lock()
	defer l.mu.Unlock()
	for l.host == nil || len(l.toHost) > l.inflight {
		if g.expired {
			return 0, os.ErrDeadlineExceeded
		}
		l.cond.Wait()
	}
	l.toHost = append(l.toHost, p...)
	l.cond.Broadcast()
	return len(p), nil
}

func (g *guestEnd) Close() error { return g.SetDeadline(time.Unix(1, 0)) }

func (g *guestEnd) SetDeadline(t time.Time) error      { return g.line.set(&g.deadline, t) }
func (g *guestEnd) SetReadDeadline(t time.Time) error  { return g.line.set(&g.deadline, t) }
func (g *guestEnd) SetWriteDeadline(t time.Time) error { return g.line.set(&g.deadline, t) }

func (l *line) set(d *deadline, t time.Time) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	d.expired = !t.IsZero() && t.Before(time.Now())
	l.cond.Broadcast()
	return nil
}

type hostEnd struct {
	addr
	line *line
	deadline
	closed bool
}

func (h *hostEnd) Read(p []byte) (int, error) {
	l := h.line
	l.mu.Lock()
	defer l.mu.Unlock()
	for {
		switch {
		case h.closed:
			return 0, net.ErrClosed
		case h.expired:
			return 0, os.ErrDeadlineExceeded
		case l.host != h:
			return 0, io.EOF
		case len(l.toHost) > 0:
			n := copy(p, l.toHost)
			l.toHost = l.toHost[n:]
			l.cond.Broadcast()
			return n, nil
		}
		l.cond.Wait()
	}
}

func (h *hostEnd) Write(p []byte) (int, error) {
	l := h.line
	l.mu.Lock()
	defer l.mu.Unlock()
	for len(l.toGuest) > l.inflight && !h.closed && !h.expired && l.host == h {
		l.cond.Wait()
	}
	switch {
	case h.closed || l.host != h:
		return 0, net.ErrClosed
	case h.expired:
		return 0, os.ErrDeadlineExceeded
	}
	q := p
	if l.left >= 0 {
		q = p[:min(l.left, len(p))]
		l.left -= len(q)
	}
	l.toGuest = append(l.toGuest, q...)
	l.cond.Broadcast()
	return len(p), nil
}

func (h *hostEnd) Close() error {
	l := h.line
	l.mu.Lock()
	defer l.mu.Unlock()
	h.closed = true
	if l.host == h {
		l.host = nil
	}
	l.cond.Broadcast()
	return nil
}

func (h *hostEnd) SetDeadline(t time.Time) error      { return h.line.set(&h.deadline, t) }
func (h *hostEnd) SetReadDeadline(t time.Time) error  { return h.line.set(&h.deadline, t) }
func (h *hostEnd) SetWriteDeadline(t time.Time) error { return h.line.set(&h.deadline, t) }

type addr struct{}

func (addr) LocalAddr() net.Addr  { return portAddr{} }
func (addr) RemoteAddr() net.Addr { return portAddr{} }
