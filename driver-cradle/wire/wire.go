// Package wire carries everything that host and guest say to each other over one virtio-serial port.
//
// A Session multiplexes streams (yamux) over the port; each stream is a net.Conn, and on it runs HTTP: the guest's server answers
// the control calls of this package (paths under /cradle/v1) and, for everything else, docker's container API. Either side may open
// streams.
//
// A serial port has no connections: bytes of an earlier host process may still be in it. Every session therefore begins with a
// greeting that both sides look for and throw away everything before, so that a host process can die at any byte and another take
// the guest up again.
//
// wire imports only spec; it is part of the guest's initramfs and may import neither Nomad nor a registry client.
package wire

import (
	"bufio"
	"context"
	"crypto/rand"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"time"

	"github.com/libp2p/go-yamux/v5"
)

// PortName is the name of the virtio-serial port, as /sys/class/virtio-ports/*/name shows it in the guest.
const PortName = "cradle.0"

// A greeting is a mark, one of four kinds, a nonce of the host process and a newline; all have one length. The mark's first byte is
// no yamux version, so a greeting where a frame should begin ends the session that still expects one.
const (
	greetMark   = "\xffcradle/2 "
	greetHello  = greetMark + "hello " // host: here is a new process
	greetReady  = greetMark + "ready " // guest: nothing but greetings will be taken from that process until it begins
	greetBegin  = greetMark + "begin " // host: the session follows
	greetBirth  = greetMark + "birth " // host: a Birth follows, then the session
	nonceLen    = 32
	greetingLen = len(greetHello) + nonceLen + 1
)

const maxMessage = 64 << 10 // of a stream's bytes in one frame

// A Session is one host process talking to one guest. It is a net.Listener for the streams that the other side opens.
//
// A Session whose port has failed ends by itself; it still has to be closed before the port is used again.
type Session struct{ mux *yamux.Session }

// Open opens a stream to the other side.
func (s *Session) Open(ctx context.Context) (net.Conn, error) {
	c, err := s.mux.OpenStream(ctx)
	if err != nil {
		return nil, fmt.Errorf("open stream: %w", err)
	}
	return &stream{c}, nil
}

// Accept waits for a stream of the other side.
func (s *Session) Accept() (net.Conn, error) {
	c, err := s.mux.AcceptStream()
	if err != nil {
		return nil, fmt.Errorf("accept stream: %w", err)
	}
	return &stream{c}, nil
}

// Done is closed when the session has ended, for whatever reason.
func (s *Session) Done() <-chan struct{} { return s.mux.CloseChan() }

// IsClosed says whether the session has ended.
func (s *Session) IsClosed() bool { return s.mux.IsClosed() }

// Close ends the session and all of its streams. When it returns, the port is no longer used.
func (s *Session) Close() error { return s.mux.Close() }

// Addr implements net.Listener.
func (s *Session) Addr() net.Addr { return s.mux.Addr() }

// A Birth makes a guest an individual: until then a restored one has the clock and the random state of its template. It comes with
// the greeting, so nothing is done for anybody before it.
type Birth struct {
	Time    time.Time
	Entropy [64]byte // from the host
}

const birthLen = 8 + len(Birth{}.Entropy)

// bytes are the time in nanoseconds since 1970, big-endian, and the entropy.
func (b *Birth) bytes() []byte {
	return append(binary.BigEndian.AppendUint64(nil, uint64(b.Time.UnixNano())), b.Entropy[:]...)
}

func readBirth(r io.Reader) (*Birth, error) {
	var raw [birthLen]byte
	if _, err := io.ReadFull(r, raw[:]); err != nil {
		return nil, err
	}
	b := &Birth{Time: time.Unix(0, int64(binary.BigEndian.Uint64(raw[:8])))}
	copy(b.Entropy[:], raw[8:])
	return b, nil
}

// Dial begins a session from the host's side of the port. It repeats its greeting until the guest answers or ctx ends. birth is called
// then, for a guest that has just been born; nil: it is an individual already. conn is closed when Dial fails.
func Dial(ctx context.Context, conn net.Conn, birth func() *Birth) (*Session, error) {
	s, err := dial(ctx, conn, birth)
	if err != nil {
		conn.Close()
		return nil, fmt.Errorf("greet the guest: %w", err)
	}
	return s, nil
}

func dial(ctx context.Context, conn net.Conn, birth func() *Birth) (*Session, error) {
	var raw [nonceLen / 2]byte
	rand.Read(raw[:])
	nonce := hex.EncodeToString(raw[:])

	stop := context.AfterFunc(ctx, func() { conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	answered, sent := make(chan struct{}), make(chan error, 1)
	go func() { sent <- repeatHello(conn, nonce, answered) }()

	quick := quickened(conn)
	r := bufio.NewReaderSize(quick, readBuffer)
	err := awaitReady(r, nonce)
	close(answered)
	if err != nil {
		conn.SetDeadline(time.Unix(1, 0))
	}
	if werr := <-sent; err == nil {
		err = werr
	}
	if err == nil {
		begin := []byte(greetBegin + nonce + "\n")
		if birth != nil {
			begin = append([]byte(greetBirth+nonce+"\n"), birth().bytes()...)
		}
		_, err = conn.Write(begin)
	}
	if !stop() {
		err = context.Cause(ctx)
	}
	if err != nil {
		return nil, err
	}
	c := config()
	c.MaxIncomingStreams = 16 // a guest may be hostile, and each costs memory here
	m, err := yamux.Client(&bufferedConn{Conn: quick, r: r}, c, nil)
	if err != nil {
		return nil, err
	}
	return &Session{m}, nil
}

// unstick ends the other side's session, if it has one: it outlasts the longest frame and is no header. A host sends it where its greetings stay
// unanswered: a guest that missed the end of a session may be inside a frame, and takes greetings for the frame's content.
func unstick() string { return strings.Repeat("x", maxMessage+4096) }

// repeatHello greets until answered is closed.
func repeatHello(w io.Writer, nonce string, answered <-chan struct{}) error {
	const longest = time.Second
	hello := []byte(greetHello + nonce + "\n")
	for wait := 20 * time.Millisecond; ; wait = min(2*wait, longest) {
		if wait == longest {
			hello = []byte(unstick() + greetHello + nonce + "\n")
		}
		if _, err := w.Write(hello); err != nil {
			return err
		}
		select {
		case <-answered:
			return nil
		case <-time.After(wait):
		}
	}
}

func awaitReady(r *bufio.Reader, nonce string) error {
	for {
		kind, n, err := readGreeting(r)
		if err != nil || kind == greetReady && n == nonce {
			return err
		}
	}
}

// Accept begins a session from the guest's side: it throws bytes away until a host process has greeted. The previous session must have
// been closed. Where the host says that the guest has just been born, born is called before anything else. After an error the caller accepts
// again.
func Accept(conn net.Conn, born func(*Birth) error) (*Session, error) {
	if err := conn.SetDeadline(time.Time{}); err != nil {
		return nil, fmt.Errorf("wait for the host's greeting: %w", err)
	}
	if c, ok := conn.(reused); ok && c.again() {
		// The guest learns late, and by another way than its bytes, that a host process has gone: the session that ended may have been the next
		// one's. That host has to notice; one that greets throws this away.
		if _, err := io.WriteString(conn, unstick()); err != nil {
			return nil, fmt.Errorf("end the last session: %w", err)
		}
	}
	r := bufio.NewReaderSize(conn, readBuffer)
	ready := "" // the process that was answered; any other that greets takes its place
	for {
		kind, nonce, err := readGreeting(r)
		if err == nil && kind == greetHello && nonce != ready {
			ready = nonce
			_, err = io.WriteString(conn, greetReady+nonce+"\n")
		}
		if err != nil {
			return nil, fmt.Errorf("wait for the host's greeting: %w", err)
		}
		if nonce != ready {
			continue
		}
		if kind == greetBirth {
			b, err := readBirth(r)
			if err == nil {
				err = born(b)
			}
			if err != nil {
				return nil, fmt.Errorf("become an individual: %w", err)
			}
			break
		}
		if kind == greetBegin {
			break
		}
	}
	m, err := yamux.Server(&bufferedConn{Conn: conn, r: r}, config(), nil)
	if err != nil {
		return nil, fmt.Errorf("begin session: %w", err)
	}
	return &Session{m}, nil
}

// reused is a connection that outlives its sessions, as a Port does.
type reused interface {
	again() bool // false the first time
}

// readGreeting throws bytes away until it has read a greeting, and takes nothing of what follows it.
func readGreeting(r *bufio.Reader) (kind, nonce string, err error) {
	for {
		if _, err := r.ReadSlice(greetMark[0]); errors.Is(err, bufio.ErrBufferFull) {
			continue
		} else if err != nil {
			return "", "", err
		}
		// That many bytes always come: whoever waits for an answer goes on greeting, and an answer is as long as a greeting.
		rest, err := r.Peek(greetingLen - 1)
		if err != nil {
			return "", "", err
		}
		g := greetMark[:1] + string(rest)
		kind, nonce = g[:len(greetHello)], g[len(greetHello):greetingLen-1]
		if kind != greetHello && kind != greetReady && kind != greetBegin && kind != greetBirth || g[greetingLen-1] != '\n' || !isNonce(nonce) {
			continue
		}
		_, err = r.Discard(greetingLen - 1)
		return kind, nonce, err
	}
}

func isNonce(s string) bool {
	_, err := hex.DecodeString(s)
	return err == nil
}

const readBuffer = 8 << 10

// bufferedConn reads what was buffered while greeting before anything else, and nothing that is no frame of ours. Without that check
// yamux could take a few bytes of another process's greeting for the rest of a header, and wait for gigabytes of body.
type bufferedConn struct {
	net.Conn
	r      *bufio.Reader
	header [12]byte // github.com/hashicorp/yamux spec.md: version, type, flags, stream, length
	have   int      // bytes of header
	body   uint32   // bytes until the next header

	mu     sync.Mutex
	closed bool
}

var errFrame = errors.New("not a frame of this session")

func (c *bufferedConn) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	for b := p[:n]; len(b) > 0; {
		if c.body > 0 {
			k := min(len(b), int(c.body))
			c.body -= uint32(k)
			b = b[k:]
			continue
		}
		k := copy(c.header[c.have:], b)
		c.have += k
		b = b[k:]
		if c.have < len(c.header) {
			break
		}
		c.have = 0
		const data = 0
		if c.header[1] == data {
			c.body = binary.BigEndian.Uint32(c.header[8:])
		}
		if c.header[0] != 0 || c.body > maxMessage {
			return 0, errFrame
		}
	}
	return n, err
}

// SetWriteDeadline does nothing once closed: yamux may extend its deadline while it closes, and a Port is closed by a deadline.
func (c *bufferedConn) SetWriteDeadline(t time.Time) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return net.ErrClosed
	}
	return c.Conn.SetWriteDeadline(t)
}

func (c *bufferedConn) Close() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.closed = true
	return c.Conn.Close()
}

func config() *yamux.Config {
	c := yamux.DefaultConfig()
	c.EnableKeepAlive = false                   // an idle guest sleeps
	c.MeasureRTTInterval = 365 * 24 * time.Hour // likewise
	c.ConnectionWriteTimeout = time.Hour        // a paused or stopped guest is no broken one
	c.InitialStreamWindowSize = 1 << 20
	c.MaxStreamWindowSize = 4 << 20
	c.ReadBufSize = 0 // bufferedConn has one
	c.MaxMessageSize = maxMessage
	c.WriteCoalesceDelay = 0
	c.LogOutput = io.Discard
	return c
}

// stream is a yamux stream whose Close behaves as that of a TCP connection: what was written still arrives, and a peer that goes on
// writing is told that nobody reads. With yamux alone it would fill its window and then wait for ever.
type stream struct{ *yamux.Stream }

func (s *stream) Close() error {
	_ = s.CloseWrite() // fails only where the stream is over, and then so is what Close is for
	return s.Reset()
}
