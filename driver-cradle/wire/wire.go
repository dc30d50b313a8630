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
	"bytes"
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"time"

	"github.com/libp2p/go-yamux/v5"
)

// PortName is the name of the virtio-serial port, as /sys/class/virtio-ports/*/name shows it in the guest.
const PortName = "cradle.0"

// Greetings. The first byte is no yamux version, so a greeting in the middle of a session ends that session.
const (
	greetHello = "\xffcradle/1 hello "
	greetReady = "\xffcradle/1 ready "
	greetGo    = "\xffcradle/1 go "
	nonceLen   = 32
)

// A Session is one host process talking to one guest. It is a net.Listener for the streams that the other side opens.
type Session struct{ *yamux.Session }

// Open opens a stream to the other side.
func (s *Session) Open(ctx context.Context) (net.Conn, error) {
	c, err := s.OpenStream(ctx)
	if err != nil {
		return nil, fmt.Errorf("open stream: %w", err)
	}
	return c, nil
}

// Accept waits for a stream of the other side.
func (s *Session) Accept() (net.Conn, error) { return s.AcceptStream() }

// Dial begins a session from the host's side of the port. It repeats its greeting until the guest answers or ctx ends; conn is
// closed when it fails.
func Dial(ctx context.Context, conn net.Conn) (*Session, error) {
	s, err := dial(ctx, conn)
	if err != nil {
		conn.Close()
		return nil, err
	}
	return s, nil
}

func dial(ctx context.Context, conn net.Conn) (*Session, error) {
	var raw [nonceLen / 2]byte
	rand.Read(raw[:])
	nonce := hex.EncodeToString(raw[:])

	stop := context.AfterFunc(ctx, func() { conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	answered, sent := make(chan struct{}), make(chan error, 1)
	go func() {
		for wait := 20 * time.Millisecond; ; wait = min(2*wait, time.Second) {
			if _, err := io.WriteString(conn, greetHello+nonce+"\n"); err != nil {
				sent <- err
				return
			}
			select {
			case <-answered:
				sent <- nil
				return
			case <-time.After(wait):
			}
		}
	}()
	err := skipPast(conn, greetReady+nonce+"\n")
	close(answered)
	if err != nil {
		conn.SetDeadline(time.Unix(1, 0))
	}
	if werr := <-sent; err == nil {
		err = werr
	}
	if err == nil {
		_, err = io.WriteString(conn, greetGo+nonce+"\n")
	}
	if err != nil {
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		return nil, fmt.Errorf("greet the guest: %w", err)
	}
	if !stop() {
		return nil, fmt.Errorf("greet the guest: %w", context.Cause(ctx))
	}
	m, err := yamux.Client(conn, config(), nil)
	if err != nil {
		return nil, fmt.Errorf("begin session: %w", err)
	}
	return &Session{m}, nil
}

// Accept begins a session from the guest's side: it throws bytes away until a host process has greeted.
func Accept(conn net.Conn) (*Session, error) {
	nonce, err := greeted(conn)
	for {
		if err != nil {
			return nil, fmt.Errorf("wait for the host's greeting: %w", err)
		}
		if _, err = io.WriteString(conn, greetReady+nonce+"\n"); err != nil {
			continue
		}
		// The host may have greeted several times; what follows its go is the session.
		var next string
		if next, err = confirmed(conn, nonce); err == nil && next == "" {
			break
		}
		nonce = next
	}
	m, err := yamux.Server(conn, config(), nil)
	if err != nil {
		return nil, fmt.Errorf("begin session: %w", err)
	}
	return &Session{m}, nil
}

// greeted reads up to the end of a hello and returns its nonce.
func greeted(r io.Reader) (string, error) {
	for {
		if err := skipPast(r, greetHello); err != nil {
			return "", err
		}
		nonce, err := readNonce(r)
		if err != nil || nonce != "" {
			return nonce, err
		}
	}
}

// confirmed reads greetings up to the go for nonce ("") or the hello of another host process (its nonce).
func confirmed(r io.Reader, nonce string) (string, error) {
	for {
		kind, err := skipPastAny(r, greetHello, greetGo)
		if err != nil {
			return "", err
		}
		n, err := readNonce(r)
		switch {
		case err != nil:
			return "", err
		case kind == greetGo && n == nonce:
			return "", nil
		case kind == greetHello && n != "" && n != nonce:
			return n, nil
		}
	}
}

// readNonce reads a nonce and the newline behind it; "" where these bytes are none.
func readNonce(r io.Reader) (string, error) {
	var b [nonceLen + 1]byte
	if _, err := io.ReadFull(r, b[:]); err != nil {
		return "", err
	}
	if _, err := hex.Decode(make([]byte, nonceLen/2), b[:nonceLen]); err != nil || b[nonceLen] != '\n' {
		return "", nil
	}
	return string(b[:nonceLen]), nil
}

func skipPast(r io.Reader, mark string) error {
	_, err := skipPastAny(r, mark)
	return err
}

// skipPastAny reads byte by byte, so that nothing of the session behind a greeting is taken, until it has read one of marks.
func skipPastAny(r io.Reader, marks ...string) (string, error) {
	longest := 0
	for _, m := range marks {
		longest = max(longest, len(m))
	}
	tail := make([]byte, 0, 2*longest)
	var b [1]byte
	for {
		if _, err := io.ReadFull(r, b[:]); err != nil {
			return "", err
		}
		if len(tail) == cap(tail) {
			tail = append(tail[:0], tail[len(tail)-longest:]...)
		}
		tail = append(tail, b[0])
		for _, m := range marks {
			if bytes.HasSuffix(tail, []byte(m)) {
				return m, nil
			}
		}
	}
}

func config() *yamux.Config {
	c := yamux.DefaultConfig()
	c.EnableKeepAlive = false                   // an idle guest sleeps
	c.MeasureRTTInterval = 365 * 24 * time.Hour // likewise
	c.ConnectionWriteTimeout = time.Hour        // a paused or stopped guest is no broken one
	c.InitialStreamWindowSize = 1 << 20
	c.MaxStreamWindowSize = 4 << 20
	c.ReadBufSize = 64 << 10
	c.WriteCoalesceDelay = 0
	c.LogOutput = io.Discard
	return c
}

// Proxy copies between two connections until both directions have ended, passing on the end of each direction by itself
// (docker's attach and exec go on sending after their stdin has ended). When one side is gone, the other is closed.
func Proxy(a, b net.Conn) {
	done := make(chan struct{}, 2)
	pass := func(dst, src net.Conn) {
		defer func() { done <- struct{}{} }()
		if _, err := io.Copy(dst, src); err != nil && !errors.Is(err, io.EOF) {
			reset(a)
			reset(b)
			return
		}
		if w, ok := dst.(interface{ CloseWrite() error }); !ok || w.CloseWrite() != nil {
			reset(dst)
		}
	}
	go pass(a, b)
	go pass(b, a)
	<-done
	<-done
	a.Close()
	b.Close()
}

// reset ends a connection at once, so that the other side's next write fails instead of filling a window that nobody reads.
func reset(c net.Conn) {
	if s, ok := c.(*yamux.Stream); ok {
		s.Reset()
		return
	}
	c.Close()
}
