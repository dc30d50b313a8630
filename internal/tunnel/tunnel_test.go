package tunnel

import (
	"bytes"
	"context"
	"encoding/pem"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/gorilla/websocket"
	"github.com/hashicorp/nomad/api"
	"golang.org/x/net/nettest"

	"github.com/cradlestack/cradlestack/spec"
)

// An agent is a server that speaks Nomad's exec, with a pod's socket behind it, as agents and driver together do. What they do beyond that
// is in the tests with real ones.
type agent struct {
	*httptest.Server
	pod    func(*http.Request) (net.Conn, string) // or why not
	at     string                                 // where the pod is on its node
	served sync.WaitGroup
}

func newAgent(t *testing.T, pod func(*http.Request) (net.Conn, string)) *agent {
	a := &agent{pod: pod}
	a.Server = httptest.NewServer(http.HandlerFunc(a.serve))
	t.Cleanup(func() {
		a.served.Wait()
		a.Close()
	})
	return a
}

func (a *agent) target() Target {
	return Target{Config: &api.Config{Address: a.URL, SecretID: "secret", Namespace: "team"}, Alloc: "12345678-1234-1234-1234-123456789abc", Task: "main"}
}

func (a *agent) serve(w http.ResponseWriter, r *http.Request) {
	q := r.URL.Query()
	if r.URL.Path != "/v1/client/allocation/12345678-1234-1234-1234-123456789abc/exec" || q.Get("command") != `["cradle:vdocker"]` || q.Get("task") != "main" ||
		q.Get("tty") != "false" || q.Get("namespace") != "team" || r.Header.Get("X-Nomad-Token") != "secret" {
		http.Error(w, "no such thing: "+r.URL.String(), http.StatusNotFound)
		return
	}
	a.served.Add(1)
	defer a.served.Done()
	ws, err := (&websocket.Upgrader{}).Upgrade(w, r, nil)
	if err != nil {
		return
	}
	defer ws.Close()
	var mu sync.Mutex
	send := func(m api.ExecStreamingOutput) error {
		mu.Lock()
		defer mu.Unlock()
		return ws.WriteJSON(m)
	}
	tell := func(text string) error {
		return send(api.ExecStreamingOutput{Stderr: &api.ExecStreamingIOOperation{Data: []byte(text)}})
	}
	exit := func(code int) {
		_ = send(api.ExecStreamingOutput{Exited: true, Result: &api.ExecStreamingExitResult{ExitCode: code}})
	}
	pod, why := a.pod(r)
	if pod == nil {
		if tell(why) == nil {
			exit(125)
		}
		return
	}
	if tell(spec.TunnelAt+a.at+"\n") != nil || tell(spec.TunnelReady) != nil {
		return
	}
	var output sync.WaitGroup
	defer output.Wait()
	defer pod.Close()
	output.Go(func() {
		buf := make([]byte, 32<<10)
		for {
			n, err := pod.Read(buf)
			if n > 0 && send(api.ExecStreamingOutput{Stdout: &api.ExecStreamingIOOperation{Data: buf[:n]}}) != nil {
				return
			}
			if err != nil {
				_ = tell(spec.TunnelEOF)
				return
			}
		}
	})
	for {
		var m api.ExecStreamingInput
		if err := ws.ReadJSON(&m); err != nil || m.TTYSize != nil {
			return
		}
		if m.Stdin != nil && len(m.Stdin.Data) > 0 {
			if _, err := pod.Write(m.Stdin.Data); err != nil {
				return
			}
		}
		if m.Stdin != nil && m.Stdin.Close {
			_ = pod.(*net.UnixConn).CloseWrite()
			output.Wait()
			exit(0)
			return
		}
	}
}

// sockets are two ends of a connection as a pod has it.
func sockets(t *testing.T) (ours, theirs net.Conn) {
	t.Helper()
	l, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if ours, err = net.Dial("unix", l.Addr().String()); err != nil {
		t.Fatal(err)
	}
	if theirs, err = l.Accept(); err != nil {
		t.Fatal(err)
	}
	return ours, theirs
}

// A tunnel is a net.Conn by the book.
func TestConn(t *testing.T) {
	nettest.TestConn(t, func() (c1, c2 net.Conn, stop func(), err error) {
		ours, theirs := sockets(t)
		a := newAgent(t, func(*http.Request) (net.Conn, string) { return ours, "" })
		c1, err = Dial(t.Context(), a.target())
		return c1, theirs, func() {
			if c1 != nil {
				c1.Close()
			}
			theirs.Close()
		}, err
	})
}

// Each direction ends by itself, and neither loses a byte.
func TestHalfClose(t *testing.T) {
	before := runtime.NumGoroutine()
	ours, theirs := sockets(t)
	a := newAgent(t, func(*http.Request) (net.Conn, string) { return ours, "" })
	c, err := Dial(t.Context(), a.target())
	if err != nil {
		t.Fatal(err)
	}
	sent := bytes.Repeat([]byte("0123456789abcdef"), 100000)
	go func() {
		defer theirs.Close()
		got, err := io.ReadAll(theirs)
		if err != nil || !bytes.Equal(got, sent) {
			t.Errorf("the pod got %d bytes, %v", len(got), err)
		}
		theirs.Write(sent)
	}()
	if _, err := c.Write(sent); err != nil {
		t.Fatal(err)
	}
	if err := c.(interface{ CloseWrite() error }).CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Write(sent); err == nil {
		t.Error("written after CloseWrite")
	}
	got, err := io.ReadAll(c)
	if err != nil || !bytes.Equal(got, sent) {
		t.Errorf("got %d bytes, %v", len(got), err)
	}
	if err := c.Close(); err != nil {
		t.Error(err)
	}
	if _, err := c.Read(make([]byte, 1)); !errors.Is(err, net.ErrClosed) {
		t.Errorf("read after Close: %v", err)
	}
	a.served.Wait()
	a.Close()
	for end := time.Now().Add(time.Minute); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		if runtime.NumGoroutine() <= before {
			return
		}
	}
	all := make([]byte, 1<<20)
	t.Errorf("%d goroutines were there, %d are\n%s", before, runtime.NumGoroutine(), all[:runtime.Stack(all, true)])
}

// The pod stays as it is, and the agent is gone.
func TestBroken(t *testing.T) {
	ours, theirs := sockets(t)
	defer theirs.Close()
	a := newAgent(t, func(*http.Request) (net.Conn, string) { return ours, "" })
	c, err := Dial(t.Context(), a.target())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	theirs.Write([]byte("x"))
	if n, err := c.Read(make([]byte, 10)); n != 1 || err != nil {
		t.Fatal(n, err)
	}
	c.(*conn).ws.NetConn().Close()
	if _, err := c.Read(make([]byte, 10)); err == nil || errors.Is(err, io.EOF) || !strings.Contains(err.Error(), "task main of allocation 12345678") {
		t.Errorf("read: %v", err)
	}
	for err = nil; err == nil; {
		_, err = c.Write([]byte("x"))
	}
}

func TestRefused(t *testing.T) {
	for text, want := range map[string]error{
		"rpc error: code = Unknown desc = Permission denied": ErrDenied,
		"the task has ended\n":                               ErrNotRunning,
		"cradle:vdocker is a stream":                         nil,
	} {
		a := newAgent(t, func(*http.Request) (net.Conn, string) { return nil, text })
		c, err := Dial(t.Context(), a.target())
		if err == nil {
			c.Close()
		}
		if err == nil || want != nil && !errors.Is(err, want) || !strings.Contains(err.Error(), strings.TrimSpace(text[strings.LastIndex(text, "=")+1:])) {
			t.Errorf("%s: %v", text, err)
		}
	}
	a := newAgent(t, nil)
	other := a.target()
	other.Config.SecretID = "another"
	if _, err := Dial(t.Context(), other); err == nil || !strings.Contains(err.Error(), "404") {
		t.Errorf("not found: %v", err)
	}
	other.Config.Address = "http://127.0.0.1:1"
	if _, err := Dial(t.Context(), other); err == nil {
		t.Error("connected to nobody")
	}
}

// An agent is reached as nomad/api reaches it: over TLS, with the same certificates, or by a unix socket.
func TestAddresses(t *testing.T) {
	for _, scheme := range []string{"https", "unix"} {
		ours, theirs := sockets(t)
		a := &agent{pod: func(*http.Request) (net.Conn, string) { return ours, "" }}
		a.Server = httptest.NewUnstartedServer(http.HandlerFunc(a.serve))
		var target Target
		if scheme == "https" {
			a.StartTLS()
			target = a.target()
			target.Config.TLSConfig = &api.TLSConfig{CACertPEM: pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: a.Certificate().Raw})}
		} else {
			path := filepath.Join(t.TempDir(), "nomad.sock")
			a.Listener.Close()
			var err error
			if a.Listener, err = net.Listen("unix", path); err != nil {
				t.Fatal(err)
			}
			a.Start()
			target = a.target()
			target.Config.Address = "unix://" + path
		}
		c, err := Dial(t.Context(), target)
		if err != nil {
			t.Fatalf("%s: %v", scheme, err)
		}
		theirs.Write([]byte("hello"))
		got := make([]byte, 5)
		if _, err := io.ReadFull(c, got); err != nil || string(got) != "hello" {
			t.Errorf("%s: %q, %v", scheme, got, err)
		}
		if scheme == "https" {
			stranger := target
			stranger.Config = &api.Config{Address: a.URL}
			if _, err := Dial(t.Context(), stranger); err == nil || !strings.Contains(err.Error(), "certificate") {
				t.Errorf("a certificate that nobody knows: %v", err)
			}
		}
		c.Close()
		theirs.Close()
		a.served.Wait()
		a.Close()
	}
}

// Whoever gives up while it connects does not wait for anybody: neither for an agent that does not answer, nor for a pod.
func TestCancelled(t *testing.T) {
	silent, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	patience := make(chan struct{})
	a := newAgent(t, func(*http.Request) (net.Conn, string) {
		<-patience
		return nil, "too late"
	})
	defer close(patience)
	cause := errors.New("enough")
	for _, address := range []string{"http://" + silent.Addr().String(), a.URL} {
		ctx, cancel := context.WithCancelCause(t.Context())
		time.AfterFunc(50*time.Millisecond, func() { cancel(cause) })
		target := a.target()
		target.Config.Address = address
		if _, err := Dial(ctx, target); !errors.Is(err, cause) {
			t.Errorf("%s: %v", address, err)
		}
	}
}

// A pod that takes nothing stops who writes, not the whole machine's memory.
func TestBackpressure(t *testing.T) {
	ours, theirs := sockets(t)
	defer theirs.Close()
	a := newAgent(t, func(*http.Request) (net.Conn, string) { return ours, "" })
	c, err := Dial(t.Context(), a.target())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	total := 0
	for {
		if err := c.SetWriteDeadline(time.Now().Add(500 * time.Millisecond)); err != nil {
			t.Fatal(err)
		}
		n, err := c.Write(make([]byte, 1<<20))
		total += n
		if errors.Is(err, os.ErrDeadlineExceeded) {
			break
		}
		if err != nil || total > 64<<20 {
			t.Fatalf("%d bytes are under way: %v", total, err)
		}
	}
	// It goes on where it was.
	go func() {
		io.Copy(io.Discard, io.LimitReader(theirs, int64(total)))
		theirs.Write([]byte("done"))
	}()
	got := make([]byte, 4)
	if _, err := io.ReadFull(c, got); err != nil || string(got) != "done" {
		t.Errorf("%q, %v", got, err)
	}
}

// A pod of this machine is connected to by its own socket, when Nomad has let the client through; what an agent says of places elsewhere is not believed.
func TestLocal(t *testing.T) {
	dir := t.TempDir()
	at := filepath.Join(dir, "pod.sock")
	for _, tt := range []struct {
		name, local, at, want string
	}{
		{"here", dir, at, "socket"},
		{"nobody asked", "", at, "tunnel"},
		{"elsewhere", filepath.Join(dir, "pods"), at, "tunnel"},
		{"out of it", filepath.Join(dir, "pods"), filepath.Join(dir, "pods") + "/../pod.sock", "tunnel"},
		{"not there", dir, filepath.Join(dir, "other.sock"), "tunnel"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			l, err := net.Listen("unix", at)
			if err != nil {
				t.Fatal(err)
			}
			var served sync.WaitGroup
			served.Go(func() {
				for {
					c, err := l.Accept()
					if err != nil {
						return
					}
					c.Write([]byte("socket"))
					c.Close()
				}
			})
			t.Cleanup(func() {
				l.Close()
				served.Wait()
			})
			a := newAgent(t, func(*http.Request) (net.Conn, string) {
				ours, theirs := sockets(t)
				theirs.Write([]byte("tunnel"))
				theirs.Close()
				return ours, ""
			})
			a.at = tt.at
			target := a.target()
			target.Local = tt.local
			c, err := Dial(t.Context(), target)
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			got := make([]byte, len(tt.want))
			if _, err := io.ReadFull(c, got); err != nil || string(got) != tt.want {
				t.Errorf("%q, %v; want %q", got, err, tt.want)
			}
		})
	}
}
