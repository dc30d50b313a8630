package gateway

import (
	"bufio"
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"testing"
	"time"
)

// served answers on a port of its own until the test's end.
func served(t *testing.T, handler http.Handler, most int) (address string) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := &http.Server{Handler: handler, ConnContext: remember}
	ended := make(chan error, 1)
	go func() { ended <- s.Serve(&door{Listener: l, max: most}) }()
	t.Cleanup(func() {
		s.Close()
		if err := <-ended; !errors.Is(err, http.ErrServerClosed) {
			t.Error(err)
		}
	})
	return l.Addr().String()
}

// A client is a connection, to say things on by hand.
type client struct {
	net.Conn
	t *testing.T
	r *bufio.Reader
}

func dial(t *testing.T, address string) *client {
	t.Helper()
	conn, err := net.Dial("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return &client{conn, t, bufio.NewReader(conn)}
}

func (c *client) says(text string) {
	c.t.Helper()
	if _, err := io.WriteString(c, text); err != nil {
		c.t.Fatal(err)
	}
}

// hears is the next answer's code.
func (c *client) hears() (code int, err error) {
	resp, err := http.ReadResponse(c.r, nil)
	if err != nil {
		return 0, err
	}
	_, err = io.Copy(io.Discard, resp.Body)
	return resp.StatusCode, errors.Join(err, resp.Body.Close())
}

// TestDoor: who says nothing, or nothing that lets him in, keeps nobody out, and who is at work stays.
func TestDoor(t *testing.T) {
	const most = 4
	working, goOn := make(chan struct{}), make(chan struct{})
	mux := http.NewServeMux()
	mux.HandleFunc("/denied", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusUnauthorized) })
	mux.HandleFunc("/short", func(_ http.ResponseWriter, r *http.Request) { Admitted(r) })
	mux.HandleFunc("/long", func(_ http.ResponseWriter, r *http.Request) {
		Admitted(r)
		working <- struct{}{}
		<-goOn
	})
	address := served(t, visit(mux), most)
	long := dial(t, address)
	long.says("GET /long HTTP/1.1\r\nHost: h\r\n\r\n")
	<-working
	denied := dial(t, address)
	denied.says("GET /denied HTTP/1.1\r\nHost: h\r\n\r\n")
	if code, err := denied.hears(); code != http.StatusUnauthorized || err != nil {
		t.Fatal(code, err)
	}
	var silent []*client
	for i := range 3 * most {
		silent = append(silent, dial(t, address))
		short := dial(t, address)
		short.says("GET /short HTTP/1.1\r\nHost: h\r\n\r\n")
		if code, err := short.hears(); code != http.StatusOK || err != nil {
			t.Fatalf("beside %d that say nothing a request is answered %d, %v", i+1, code, err)
		}
	}
	for _, c := range append(silent[:most], denied) {
		if _, err := c.Read(make([]byte, 1)); err == nil {
			t.Error("one that has waited longest is told something")
		}
	}
	close(goOn)
	if code, err := long.hears(); code != http.StatusOK || err != nil {
		t.Errorf("who was at work is answered %d, %v", code, err)
	}
	// When all are at work, nobody else comes in until one has gone.
	goOn = make(chan struct{})
	var all []*client
	for range most {
		c := dial(t, address)
		c.says("GET /long HTTP/1.1\r\nHost: h\r\n\r\n")
		<-working
		all = append(all, c)
	}
	if _, err := dial(t, address).Read(make([]byte, 1)); err == nil {
		t.Error("one too many is told something")
	}
	close(goOn)
	for _, c := range all {
		if code, err := c.hears(); code != http.StatusOK || err != nil {
			t.Errorf("%d, %v", code, err)
		}
	}
}

// TestPace: who sends or takes nothing in the middle of a request is given up, and what takes long otherwise is not.
func TestPace(t *testing.T) {
	t.Parallel()
	const stalled = 2 * time.Second
	done := make(chan error, 1)
	mux := http.NewServeMux()
	mux.HandleFunc("/echo", func(w http.ResponseWriter, r *http.Request) {
		_, err := io.Copy(w, r.Body)
		done <- err
	})
	mux.HandleFunc("/works", func(w http.ResponseWriter, r *http.Request) {
		_, err := io.Copy(io.Discard, r.Body)
		time.Sleep(stalled + stalled/10)
		done <- errors.Join(err, r.Context().Err())
		w.WriteHeader(http.StatusNoContent)
	})
	mux.HandleFunc("/much", func(w http.ResponseWriter, _ *http.Request) {
		var err error
		for err == nil {
			_, err = w.Write(make([]byte, 1<<20))
		}
		done <- err
	})
	address := served(t, pace(mux, stalled), 10)
	c := dial(t, address)
	for range 2 {
		c.says("POST /echo HTTP/1.1\r\nHost: h\r\nContent-Length: 4\r\n\r\nabcd")
		if code, err := c.hears(); code != http.StatusOK || err != nil || <-done != nil {
			t.Fatal(code, err)
		}
		c.says("POST /works HTTP/1.1\r\nHost: h\r\nContent-Length: 4\r\n\r\nabcd")
		if err := <-done; err != nil {
			t.Errorf("a request that works for long: %v", err)
		}
		if code, err := c.hears(); code != http.StatusNoContent || err != nil {
			t.Fatalf("one that has worked for long is answered %d, %v", code, err)
		}
	}
	c.says("POST /echo HTTP/1.1\r\nHost: h\r\nContent-Length: 4\r\n\r\nab")
	if err := <-done; err == nil {
		t.Error("half a body is whole")
	}
	dial(t, address).says("GET /much HTTP/1.1\r\nHost: h\r\n\r\n")
	if err := <-done; err == nil {
		t.Error("who takes nothing has taken all")
	}
}

// TestLimit: of one grant so many requests are at work or wait, and no other grant has to wait for it.
func TestLimit(t *testing.T) {
	l := NewLimit(0)
	var ends []func()
	for range maxAtOnce {
		end, err := l.Begin(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		ends = append(ends, end)
	}
	if _, err := l.Begin(t.Context()); !errors.Is(err, ErrBusy) {
		t.Errorf("one too many: %v", err)
	}
	ends[0]()
	if _, err := l.Begin(t.Context()); err != nil {
		t.Error(err)
	}
}

// TestOwners: so many requests are at work of all grants that somebody has, however many he makes.
func TestOwners(t *testing.T) {
	var o Owners
	var ends []func()
	begun := 0
	for range maxOfOwner/maxAtOnce + 2 {
		l := o.NewLimit("one", 0)
		for {
			end, err := l.Begin(t.Context())
			if err != nil {
				break
			}
			ends = append(ends, end)
			begun++
		}
	}
	if begun != maxOfOwner {
		t.Errorf("%d of one owner are at work", begun)
	}
	if _, err := o.NewLimit("another", 0).Begin(t.Context()); err != nil {
		t.Errorf("one of another: %v", err)
	}
	for _, end := range ends {
		end()
	}
	slow := o.NewLimit("one", 1e-9)
	if _, err := slow.Begin(t.Context()); err != nil {
		t.Errorf("once all have ended: %v", err)
	}
	given, cancel := context.WithCancel(t.Context())
	cancel()
	for range 2 * maxOfOwner { // who gives up leaves nothing
		if _, err := slow.Begin(given); errors.Is(err, ErrBusy) || err == nil {
			t.Fatalf("who gives up: %v", err)
		}
	}
}
