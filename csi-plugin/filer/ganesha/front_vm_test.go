//go:build vm

package ganesha

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cradlestack/cradlestack/csi-plugin/filer/lease"
)

// A stage is a front, with a server in its network namespace that answers each call at once.
type stage struct {
	*front
	l    net.Listener
	from sync.Map // addresses of clients, as the server has seen them
	open atomic.Int64
}

// newStage makes one for so many connections.
func newStage(t *testing.T, most int) *stage {
	t.Helper()
	by := lease.New()
	by.Extend(lease.Forever)
	by.Open()
	f, err := newFront([]byte("key"), by, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	f.crowd.Most = most
	s := &stage{front: f}
	if s.l, err = net.Listen("tcp", "127.0.0.1:0"); err != nil {
		t.Fatal(err)
	}
	listening := make(chan error)
	var inner net.Listener
	go func() {
		runtime.LockOSThread() // for good
		err := f.enter()
		if err == nil {
			inner, err = net.Listen("tcp", fmt.Sprintf(":%d", s.l.Addr().(*net.TCPAddr).Port))
		}
		listening <- err
	}()
	if err := <-listening; err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var g sync.WaitGroup
	t.Cleanup(func() {
		cancel()
		inner.Close()
		g.Wait()
		if err := f.close(); err != nil {
			t.Error(err)
		}
	})
	g.Go(func() {
		for {
			conn, err := inner.Accept()
			if err != nil {
				return
			}
			s.from.Store(conn.RemoteAddr().(*net.TCPAddr).IP.String(), true)
			s.open.Add(1)
			g.Go(func() {
				defer s.open.Add(-1)
				defer conn.Close()
				for {
					call, err := record(conn)
					if err != nil {
						return
					}
					reply := replyOf(words(opPutrootfh, 0))
					copy(reply, call[:4])
					if send(conn, [][]byte{reply}) != nil {
						return
					}
				}
			})
		}
	})
	g.Go(func() { f.serve(ctx, s.l) })
	return s
}

func record(conn net.Conn) ([]byte, error) {
	head := make([]byte, 4)
	if _, err := io.ReadFull(conn, head); err != nil {
		return nil, err
	}
	b := make([]byte, binary.BigEndian.Uint32(head)&^(1<<31))
	_, err := io.ReadFull(conn, b)
	return b, err
}

// ask makes a call, and reads its answer.
func ask(conn net.Conn, xid uint32) error {
	call := callOf(words(opPutrootfh))
	binary.BigEndian.PutUint32(call, xid)
	if err := send(conn, [][]byte{call}); err != nil {
		return err
	}
	reply, err := record(conn)
	if err == nil && binary.BigEndian.Uint32(reply) != xid {
		err = fmt.Errorf("call %d is answered by %x", xid, reply)
	}
	return err
}

// comes is a client's connection.
func comes(t *testing.T, s *stage, from string) net.Conn {
	t.Helper()
	d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}}
	conn, err := d.Dial("tcp", s.l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

// shows has a client show a handle.
func shows(t *testing.T, conn net.Conn, handle []byte) {
	t.Helper()
	if err := send(conn, [][]byte{callOf(words(opPutfh), encode(handle))}); err != nil {
		t.Fatal(err)
	}
	if _, err := record(conn); err != nil {
		t.Fatal(err)
	}
}

// Who opens connections without end takes them from nobody else: neither from those who have shown a file handle, nor from those who come, be it from the same address.
func TestRootFrontCrowd(t *testing.T) {
	s := newStage(t, maxConnections)
	s.crowd.MostOfOne = 20
	dial := func(from string) net.Conn { t.Helper(); return comes(t, s, from) }
	shows := func(conn net.Conn, handle []byte) { t.Helper(); shows(t, conn, handle) }
	handle, err := s.seal.close([]byte("a file"))
	if err != nil {
		t.Fatal(err)
	}
	known, stranger := dial("127.0.0.2"), dial("127.0.0.2")
	shows(known, handle)
	shows(stranger, []byte("a handle that was made up"))
	for range 2 * s.crowd.MostOfOne {
		dial("127.0.0.2") // and says nothing
	}
	for who, conn := range map[string]net.Conn{"who has shown a handle": known, "one more of that address": dial("127.0.0.2"), "another client": dial("127.0.0.3")} {
		if err := ask(conn, 1); err != nil {
			t.Errorf("%s: %v", who, err)
		}
	}
	if err := ask(stranger, 1); err == nil {
		t.Error("one that has shown nothing has outlasted them all")
	}
	for range s.crowd.MostOfOne - 1 {
		shows(dial("127.0.0.2"), handle)
	}
	if err := ask(dial("127.0.0.2"), 1); err == nil {
		t.Error("one more of that address is answered, where all have shown handles")
	}
	known.Close()
	for end := time.Now().Add(time.Minute); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		if err = ask(dial("127.0.0.2"), 1); err == nil {
			return
		}
	}
	t.Errorf("after one has ended: %v", err)
}

// Where all have shown a handle, the one goes that has had no call for longest.
func TestRootFrontIdle(t *testing.T) {
	s := newStage(t, 3)
	s.crowd.Idle = time.Nanosecond
	dial := func() net.Conn { t.Helper(); return comes(t, s, "127.0.0.1") }
	handle, err := s.seal.close([]byte("a file"))
	if err != nil {
		t.Fatal(err)
	}
	var all []net.Conn
	for range 3 {
		conn := dial()
		shows(t, conn, handle)
		all = append(all, conn)
	}
	if err := ask(all[0], 1); err != nil {
		t.Fatal(err)
	}
	for end := time.Now().Add(time.Minute); ask(dial(), 1) != nil; time.Sleep(10 * time.Millisecond) { // a call is at work until a moment after its answer
		if time.Now().After(end) {
			t.Fatal("nobody is answered any more")
		}
	}
	if err := ask(all[0], 2); err != nil {
		t.Errorf("who has just had a call: %v", err)
	}
	if ask(all[1], 1) == nil && ask(all[2], 1) == nil {
		t.Error("all are there, and one more")
	}
}

// The server sees clients at their own addresses, of either version, which are none of this host's.
func TestRootFrontAddresses(t *testing.T) {
	s := newStage(t, maxConnections)
	port := s.l.Addr().(*net.TCPAddr).Port
	for _, c := range []struct{ client, server string }{{"10.98.7.6", "10.1.2.3"}, {"fd00::7:6", "fd00::1"}, {"2001:db8:77::9", "fd00::1"}} {
		conn, err := s.dial(t.Context(), &net.TCPAddr{IP: net.ParseIP(c.client), Port: 700}, &net.TCPAddr{IP: net.ParseIP(c.server), Port: port})
		if err != nil {
			t.Errorf("as %s: %v", c.client, err)
			continue
		}
		if err := ask(conn, 1); err != nil {
			t.Errorf("as %s: %v", c.client, err)
		}
		conn.Close()
		if _, ok := s.from.Load(c.client); !ok {
			t.Errorf("the server has not seen %s", c.client)
		}
	}
	conn, err := net.Dial("tcp", s.l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if err := errors.Join(ask(conn, 1), ask(conn, 2)); err != nil {
		t.Error(err)
	}
	if err := send(conn, [][]byte{[]byte(strings.Repeat("x", 100))}); err != nil {
		t.Error(err)
	}
	if _, err := record(conn); err == nil {
		t.Error("nonsense is answered")
	}
}
