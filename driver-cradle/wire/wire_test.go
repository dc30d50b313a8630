package wire

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// serve is a guest that answers every session with h, one after the other, as the agent does. It ends with the test.
func serve(t *testing.T, l *line, h http.Handler) {
	ended, done := make(chan struct{}), make(chan struct{})
	t.Cleanup(func() {
		close(ended)
		l.mu.Lock()
		l.quickly = false
		l.mu.Unlock()
		l.disconnect()
		<-done
		time.Sleep(time.Second) // net/http lingers after a reset
	})
	go func() {
		defer close(done)
		for {
			l.waitForHost(ended)
			select {
			case <-ended:
				return
			default:
			}
			s, err := Accept(&l.guest, nil)
			if err != nil {
				continue
			}
			go func() {
				select {
				case <-ended:
				case <-s.Done():
				}
				s.Close()
			}()
			srv := &http.Server{Handler: h}
			srv.Serve(s)
			s.Close()
			srv.Close()
		}
	}()
}

// waitForHost is Port.Wait.
func (l *line) waitForHost(ended <-chan struct{}) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for l.host == nil {
		select {
		case <-ended:
			return
		default:
			l.cond.Wait()
		}
	}
}

func dialLine(t *testing.T, l *line) *Session {
	t.Helper()
	return dialHost(t, l.connect())
}

func dialHost(t *testing.T, h *hostEnd) *Session {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	s, err := Dial(ctx, h, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func httpClient(s *Session) *http.Client {
	return &http.Client{Timeout: time.Minute, Transport: &http.Transport{
		DialContext:       func(ctx context.Context, _, _ string) (net.Conn, error) { return s.Open(ctx) },
		DisableKeepAlives: true,
	}}
}

// say has the guest repeat a body.
func say(t *testing.T, s *Session, body []byte) {
	t.Helper()
	resp, err := httpClient(s).Post("http://guest/echo", "", bytes.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if got, err := io.ReadAll(resp.Body); err != nil || !bytes.Equal(got, body) {
		t.Fatalf("the guest repeated %d of %d bytes, or others: %v", len(got), len(body), err)
	}
}

var echo = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return
	}
	w.Write(body)
})

func random(n int) []byte {
	b := make([]byte, n)
	rand.Read(b)
	return b
}

func TestSession(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLine()
		serve(t, l, echo)
		s := dialLine(t, l)
		var wg sync.WaitGroup
		for _, n := range []int{0, 1, 64 << 10, 9 << 20} {
			wg.Go(func() { say(t, s, random(n)) })
		}
		wg.Wait()
	})
}

func TestGuestSkipsGarbage(t *testing.T) {
	other := strings.Repeat("0", nonceLen)
	for name, garbage := range map[string]string{
		"noise":                  string(random(3*readBuffer + 17)),
		"marks":                  strings.Repeat("\xff", 1000),
		"cut hello":              greetHello + "0123",
		"hello with no nonce":    greetHello + strings.Repeat("x", nonceLen) + "\n",
		"hello of a dead one":    greetHello + other + "\n",
		"begin of a dead one":    greetHello + other + "\n" + greetBegin + other + "\n\x00\x01\x00\x01",
		"ready":                  greetReady + other + "\n",
		"cut frame":              "\x00\x00\x00\x01\x00\x00\x00\x01\x00\x01\x00\x00abc",
		"frames without a begin": strings.Repeat("\x00\x01\x00\x01\x00\x00\x00\x01\x00\x00\x00\x00", 5),
		"unstick":                unstick(),
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				l := newLine()
				l.inject([]byte(garbage), nil)
				serve(t, l, echo)
				say(t, dialLine(t, l), random(100))
			})
		})
	}
}

func TestHostSkipsGarbage(t *testing.T) {
	other := strings.Repeat("0", nonceLen)
	for name, garbage := range map[string]string{
		"noise":               string(random(3*readBuffer + 17)),
		"ready for another":   greetReady + other + "\n",
		"cut ready":           greetReady + "01234567",
		"frames of a session": strings.Repeat("\x00\x01\x00\x01\x00\x00\x00\x02\x00\x00\x00\x00", 5),
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				l := newLine()
				h := l.connect()
				l.inject(nil, []byte(garbage))
				serve(t, l, echo)
				say(t, dialHost(t, h), random(100))
			})
		})
	}
}

// A host process may die at any byte of a frame, and the guest may not notice before the next one is there.
func TestReconnect(t *testing.T) {
	for _, quickly := range []bool{false, true} {
		for _, after := range []int{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 24, 25, 30, 35, 40, 1000, 5000, 65535, 65536, 70000, 80000, -1} {
			t.Run(fmt.Sprintf("after %d, quickly %v", after, quickly), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					l := newLine()
					l.quickly = quickly
					serve(t, l, echo)
					for range 3 {
						s := dialLine(t, l)
						say(t, s, random(10))
						l.cutAfter(after)
						c, err := s.Open(t.Context())
						if err != nil {
							t.Fatal(err)
						}
						wrote := make(chan struct{})
						go func() { // more than the window, so that it waits where the guest gets nothing
							defer close(wrote)
							fmt.Fprintf(c, "POST / HTTP/1.1\r\nHost: guest\r\nContent-Length: 1000000000\r\n\r\n%s", random(1<<20))
						}()
						synctest.Wait()
						l.disconnect()
						s.Close()
						<-wrote
					}
					say(t, dialLine(t, l), random(10))
				})
			})
		}
	}
}

// A guest that sees the end of an earlier host process only when the next one's session has begun ends that, and its host notices.
func TestLateEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLine()
		serve(t, l, echo)
		for range 3 {
			s := dialLine(t, l)
			say(t, s, random(10))
			c, err := s.Open(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			l.mu.Lock()
			l.late = true
			l.cond.Broadcast()
			l.mu.Unlock()
			<-s.Done()
			if _, err := c.Read(make([]byte, 1)); err == nil {
				t.Error("a stream outlives its session")
			}
			s.Close()
		}
		say(t, dialLine(t, l), random(10))
	})
}

// Two host processes greet, the first dies before it begins.
func TestHostDiesWhileGreeting(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLine()
		l.quickly = true
		serve(t, l, echo)
		for range 3 {
			io.WriteString(l.connect(), greetHello+strings.Repeat("a", nonceLen)+"\n")
			synctest.Wait()
			l.disconnect()
		}
		say(t, dialLine(t, l), random(10))
	})
}

// A guest is born before anything is done for the host, and only when the host says so.
func TestBirth(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		want := &Birth{Time: time.Unix(1_800_000_000, 123456789)}
		copy(want.Entropy[:], random(len(want.Entropy)))
		for _, birth := range []func() *Birth{func() *Birth { return want }, nil} {
			l := newLine()
			var got *Birth
			type accepted struct {
				s   *Session
				err error
			}
			guest := make(chan accepted, 1)
			go func() {
				s, err := Accept(&l.guest, func(b *Birth) error { got = b; return nil })
				guest <- accepted{s, err}
			}()
			s, err := Dial(t.Context(), l.connect(), birth)
			if err != nil {
				t.Fatal(err)
			}
			a := <-guest
			if a.err != nil {
				t.Fatal(a.err)
			}
			switch {
			case birth == nil && got != nil:
				t.Errorf("a guest that is an individual is born again: %+v", got)
			case birth != nil && (got == nil || !got.Time.Equal(want.Time) || got.Entropy != want.Entropy):
				t.Errorf("birth %+v, want %+v", got, want)
			}
			a.s.Close()
			s.Close()
		}
	})
}

func TestStillbirth(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLine()
		why := errors.New("no clock")
		guest := make(chan error, 1)
		go func() {
			_, err := Accept(&l.guest, func(*Birth) error { return why })
			guest <- err
		}()
		s, err := Dial(t.Context(), l.connect(), func() *Birth { return new(Birth) })
		if err != nil {
			t.Fatal(err)
		}
		if err := <-guest; !errors.Is(err, why) {
			t.Errorf("Accept: %v", err)
		}
		l.disconnect()
		s.Close()
	})
}

func TestDialGivesUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLine() // nobody in the guest
		why := errors.New("test is over")
		ctx, cancel := context.WithCancelCause(t.Context())
		time.AfterFunc(30*time.Second, func() { cancel(why) })
		h := l.connect()
		if _, err := Dial(ctx, h, nil); !errors.Is(err, why) {
			t.Errorf("Dial: %v, want %v", err, why)
		}
		if !h.closed {
			t.Error("Dial left the connection open")
		}
	})
}

func TestSessionEndsWithPort(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLine()
		serve(t, l, echo)
		s := dialLine(t, l)
		c, err := s.Open(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		l.disconnect()
		if _, err := c.Read(make([]byte, 1)); err == nil {
			t.Error("read of a stream whose session has ended succeeds")
		}
		<-s.Done()
		if _, err := s.Open(t.Context()); err == nil {
			t.Error("Open after the end succeeds")
		}
		if _, err := s.Accept(); err == nil {
			t.Error("Accept after the end succeeds")
		}
	})
}

// pair gives both ends of a stream, the host's first.
func pair(t *testing.T) (host, guest net.Conn) {
	t.Helper()
	l := newLine()
	h := l.connect()
	accepted := make(chan *Session, 1)
	go func() {
		s, err := Accept(&l.guest, nil)
		if err != nil {
			t.Error(err)
		}
		accepted <- s
	}()
	hs := dialHost(t, h)
	gs := <-accepted
	t.Cleanup(func() { gs.Close() })
	host, err := hs.Open(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	guest, err = gs.Accept()
	if err != nil {
		t.Fatal(err)
	}
	return host, guest
}

func TestHalfClose(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		host, guest := pair(t)
		io.WriteString(host, "question")
		host.(interface{ CloseWrite() error }).CloseWrite()
		if got, err := io.ReadAll(guest); err != nil || string(got) != "question" {
			t.Fatalf("guest reads %q, %v", got, err)
		}
		io.WriteString(guest, "answer")
		guest.Close()
		if got, err := io.ReadAll(host); err != nil || string(got) != "answer" {
			t.Fatalf("host reads %q, %v", got, err)
		}
	})
}

func TestClosedStream(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		host, guest := pair(t)
		last := random(100 << 10)
		go func() {
			host.Write(last)
			host.Close()
		}()
		failed := make(chan error)
		go func() {
			for {
				if _, err := guest.Write(last); err != nil {
					failed <- err
					return
				}
			}
		}()
		if err := <-failed; err == nil {
			t.Error("writing to a closed stream succeeds for ever")
		}
		if got, err := io.ReadAll(guest); err != nil || !bytes.Equal(got, last) {
			t.Errorf("of %d bytes written before Close %d arrive: %v", len(last), len(got), err)
		}
		if _, err := host.Read(make([]byte, 1)); err == nil {
			t.Error("reading a closed stream succeeds")
		}
	})
}

func TestCloseEndsRead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		host, _ := pair(t)
		done := make(chan error)
		go func() {
			_, err := host.Read(make([]byte, 1))
			done <- err
		}()
		synctest.Wait()
		host.Close()
		if err := <-done; err == nil {
			t.Error("Read ends without an error when its stream is closed")
		}
	})
}

func TestHostileGuestOpensStreams(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLine()
		h := l.connect()
		go func() {
			s, err := Accept(&l.guest, nil)
			if err != nil {
				t.Error(err)
				return
			}
			defer s.Close()
			for range 200 {
				c, err := s.Open(t.Context())
				if err != nil {
					return
				}
				c.SetDeadline(time.Now().Add(time.Second))
				go c.Write(random(200 << 10))
			}
			<-s.Done()
		}()
		s := dialHost(t, h)
		synctest.Wait()
		if n := s.mux.NumStreams(); n > 16 {
			t.Errorf("the host keeps %d streams that it never accepted", n)
		}
		s.Close()
	})
}

// proxied gives a client's end of a proxied unix connection and the guest's end of its stream.
func proxied(t *testing.T) (client *net.UnixConn, guest net.Conn, done <-chan struct{}) {
	t.Helper()
	host, guest := pair(t)
	ln, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		c, err := ln.Accept()
		ln.Close()
		if err != nil {
			t.Error(err)
			return
		}
		Proxy(c, host)
	}()
	c, err := net.Dial("unix", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	guest.SetDeadline(time.Now().Add(30 * time.Second))
	c.SetDeadline(time.Now().Add(30 * time.Second))
	return c.(*net.UnixConn), guest, ended
}

func wait(t *testing.T, done <-chan struct{}, what string) {
	t.Helper()
	select {
	case <-done:
	case <-time.After(30 * time.Second):
		t.Fatal(what)
	}
}

func TestProxyHalfClose(t *testing.T) {
	client, guest, done := proxied(t)
	body := random(3 << 20)
	go func() {
		client.Write(body)
		client.CloseWrite()
	}()
	if got, err := io.ReadAll(guest); err != nil || !bytes.Equal(got, body) {
		t.Fatalf("guest reads %d of %d bytes: %v", len(got), len(body), err)
	}
	go func() {
		guest.Write(body)
		guest.Close()
	}()
	if got, err := io.ReadAll(client); err != nil || !bytes.Equal(got, body) {
		t.Fatalf("client reads %d of %d bytes: %v", len(got), len(body), err)
	}
	wait(t, done, "Proxy goes on after both directions have ended")
}

func TestProxyGuestEndsFirst(t *testing.T) {
	client, guest, done := proxied(t)
	guest.(interface{ CloseWrite() error }).CloseWrite()
	if _, err := io.ReadAll(client); err != nil {
		t.Fatal(err)
	}
	io.WriteString(client, "late")
	client.CloseWrite()
	if got, err := io.ReadAll(guest); err != nil || string(got) != "late" {
		t.Fatalf("guest reads %q, %v", got, err)
	}
	wait(t, done, "Proxy goes on after both directions have ended")
}

// A client that has gone is noticed though neither side says anything any more.
func TestProxyClientGone(t *testing.T) {
	for _, half := range []bool{false, true} {
		client, guest, done := proxied(t)
		io.WriteString(client, "x")
		if _, err := io.ReadFull(guest, make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
		if half {
			client.CloseWrite()
			if _, err := guest.Read(make([]byte, 1)); err != io.EOF {
				t.Fatal(err)
			}
		}
		client.Close()
		wait(t, done, "Proxy goes on without its client")
		guest.SetDeadline(time.Now().Add(30 * time.Second))
		for {
			if _, err := guest.Write(random(1 << 10)); err != nil {
				if timeout := net.Error(nil); errors.As(err, &timeout) && timeout.Timeout() {
					t.Error("the guest's stream is still open")
				}
				break
			}
		}
	}
}

func TestProxyGuestResets(t *testing.T) {
	client, guest, done := proxied(t)
	guest.(interface{ Reset() error }).Reset()
	if _, err := io.ReadAll(client); err != nil && !errors.Is(err, net.ErrClosed) && !strings.Contains(err.Error(), "reset") {
		t.Error(err)
	}
	wait(t, done, "Proxy goes on after a reset")
}

// pagePort reads as a virtio-serial port does: a page at a time.
type pagePort struct{ net.Conn }

func (p pagePort) Read(b []byte) (int, error) { return p.Conn.Read(b[:min(len(b), 4096)]) }

// BenchmarkProxy moves bytes from a client through the proxy, the session and the port to the guest ("in"), and back ("out").
func BenchmarkProxy(b *testing.B) {
	for _, direction := range []string{"in", "out"} {
		b.Run(direction, func(b *testing.B) {
			dir := b.TempDir()
			socket := func(name string) (near, far net.Conn) {
				ln, err := net.Listen("unix", filepath.Join(dir, name))
				if err != nil {
					b.Fatal(err)
				}
				defer ln.Close()
				if near, err = net.Dial("unix", ln.Addr().String()); err != nil {
					b.Fatal(err)
				}
				if far, err = ln.Accept(); err != nil {
					b.Fatal(err)
				}
				return near, far
			}
			hostPort, guestPort := socket("port")
			accepted := make(chan *Session, 1)
			go func() {
				s, err := Accept(pagePort{guestPort}, nil)
				if err != nil {
					b.Error(err)
				}
				accepted <- s
			}()
			hs, err := Dial(b.Context(), hostPort, nil)
			if err != nil {
				b.Fatal(err)
			}
			defer hs.Close()
			gs := <-accepted
			defer gs.Close()
			stream, err := hs.Open(b.Context())
			if err != nil {
				b.Fatal(err)
			}
			guest, err := gs.Accept()
			if err != nil {
				b.Fatal(err)
			}
			client, proxied := socket("client")
			done := make(chan struct{})
			go func() {
				Proxy(proxied, stream)
				close(done)
			}()
			const chunk = 1 << 20
			b.SetBytes(chunk)
			from, to := client, guest
			if direction == "out" {
				from, to = guest, client
			}
			total := int64(b.N) * chunk
			go func() {
				buf := make([]byte, 128<<10)
				for n := int64(0); n < total; n += int64(len(buf)) {
					if _, err := from.Write(buf); err != nil {
						b.Error(err)
						return
					}
				}
			}()
			if n, err := io.CopyN(io.Discard, to, total); err != nil {
				b.Fatal(n, err)
			}
			b.StopTimer()
			client.Close()
			guest.Close()
			<-done
		})
	}
}
