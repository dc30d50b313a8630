package fetch

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/md5"
	"crypto/rand"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/pkg/sftp"
	"golang.org/x/crypto/ssh"
	"golang.org/x/crypto/ssh/agent"
	"golang.org/x/crypto/ssh/knownhosts"
)

func content(n int) []byte {
	b := make([]byte, n)
	rand.Read(b)
	return b
}

// get reads a whole file and its tail.
func get(t *testing.T, where string, o Options) ([]byte, error) {
	t.Helper()
	s, err := New(where, o)
	if err != nil {
		return nil, err
	}
	r, err := Open(t.Context(), s, o)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	return io.ReadAll(r)
}

func TestFile(t *testing.T) {
	want := content(100_000)
	name := filepath.Join(t.TempDir(), "f")
	if err := os.WriteFile(name, want, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, where := range []string{name, "file://" + name, "file://localhost" + name} {
		got, err := get(t, where, Options{})
		if err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s: %d bytes, %v", where, len(got), err)
		}
		s, err := New(where, Options{})
		if err != nil {
			t.Fatal(err)
		}
		for _, n := range []int64{10, 200_000} {
			tail, err := Tail(t.Context(), s, n)
			if err != nil || !bytes.Equal(tail, want[max(0, len(want)-int(n)):]) {
				t.Errorf("%s: tail of %d: %d bytes, %v", where, n, len(tail), err)
			}
		}
	}
	for where, reason := range map[string]string{
		filepath.Dir(name):          "it is a folder",
		name + "x":                  "no such file",
		"file://elsewhere" + name:   "a file URL has no host",
		"gopher://x/y":              "unknown scheme",
		"sftp://host":               "want sftp://",
		"sftp://u:secret@host/path": "no passwords in URLs",
		"s3://bucket":               "want s3://bucket/key",
	} {
		if _, err := get(t, where, Options{}); err == nil || !strings.Contains(err.Error(), reason) || strings.Contains(err.Error(), "secret") {
			t.Errorf("%s: %v, want an error with %q", where, err, reason)
		}
	}
}

// TestHTTPResume cuts every answer after a random piece: the whole arrives.
func TestHTTPResume(t *testing.T) {
	want := content(1 << 20)
	for _, ranges := range []bool{true, false} {
		var requests atomic.Int32
		server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			n := int(requests.Add(1))
			if !ranges {
				r.Header.Del("Range")
			}
			w.Header().Set("ETag", `"v1"`)
			if n < 8 {
				w = &cutting{ResponseWriter: w, left: 100_000 * n}
			}
			http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(want))
		}))
		got, err := get(t, server.URL, Options{Retries: 2})
		server.Close()
		if err != nil || !bytes.Equal(got, want) {
			t.Errorf("ranges %v: %d bytes after %d requests: %v", ranges, len(got), requests.Load(), err)
		}
	}
}

// cutting ends the connection after so many bytes.
type cutting struct {
	http.ResponseWriter
	left int
}

func (c *cutting) Write(p []byte) (int, error) {
	if c.left < len(p) {
		c.ResponseWriter.Write(p[:c.left])
		c.ResponseWriter.(http.Flusher).Flush()
		panic(http.ErrAbortHandler)
	}
	c.left -= len(p)
	return c.ResponseWriter.Write(p)
}

func TestHTTPErrors(t *testing.T) {
	var stalled sync.WaitGroup
	stall := make(chan struct{})
	mux := http.NewServeMux()
	count := map[string]*atomic.Int32{}
	handle := func(path string, h http.HandlerFunc) {
		count[path] = new(atomic.Int32)
		mux.HandleFunc(path, func(w http.ResponseWriter, r *http.Request) {
			count[path].Add(1)
			h(w, r)
		})
	}
	handle("/down", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(503) })
	handle("/denied", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(403) })
	handle("/wrong-range", func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Range") == "" {
			w.Header().Set("Content-Length", "100")
			w.Write(make([]byte, 50))
			w.(http.Flusher).Flush()
			panic(http.ErrAbortHandler)
		}
		w.Header().Set("Content-Range", "bytes 10-99/100")
		w.WriteHeader(206)
	})
	handle("/grown", func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Range") == "" {
			w.Header().Set("Content-Length", "100")
			w.Write(make([]byte, 50))
			w.(http.Flusher).Flush()
			panic(http.ErrAbortHandler)
		}
		w.Header().Set("Content-Range", "bytes 50-199/200")
		w.WriteHeader(206)
	})
	handle("/stall", func(w http.ResponseWriter, _ *http.Request) {
		stalled.Add(1)
		defer stalled.Done()
		w.Write(make([]byte, 10))
		w.(http.Flusher).Flush()
		<-stall
	})
	server := httptest.NewServer(mux)
	defer server.Close()
	defer stalled.Wait()
	defer close(stall)

	for _, c := range []struct {
		path     string
		o        Options
		reason   string
		requests int32
	}{
		{"/down", Options{Retries: 1}, "503 Service Unavailable (after 2 attempts)", 2},
		{"/down", Options{}, "503 Service Unavailable (after 1 attempts)", 1},
		{"/denied", Options{Retries: 1}, "the server answers 403 Forbidden", 1},
		{"/wrong-range", Options{Retries: 1}, "is not what was asked for", 2},
		{"/grown", Options{Retries: 1}, ErrChanged.Error(), 2},
		{"/stall", Options{Retries: 1, Idle: 50 * time.Millisecond}, "nothing came for 50ms", 3},
	} {
		where := strings.Replace(server.URL, "http://", "http://user:secret@", 1) + c.path + "?signature=secret"
		count[c.path].Store(0)
		_, err := get(t, where, c.o)
		if err == nil || !strings.Contains(err.Error(), c.reason) || strings.Contains(err.Error(), "secret") {
			t.Errorf("%s %+v: %v, want an error with %q and no password", c.path, c.o, err, c.reason)
		}
		if n := count[c.path].Load(); n > c.requests {
			t.Errorf("%s %+v: %d requests, want at most %d", c.path, c.o, n, c.requests)
		}
	}
	server.CloseClientConnections()
	if _, err := get(t, "http://127.0.0.1:1/x?token=1", Options{}); err == nil {
		t.Error("a closed port answered")
	}
}

// TestCancel: the caller's context ends a transfer that stands still, and no
// goroutine is left.
func TestCancel(t *testing.T) {
	before := runtime.NumGoroutine()
	stall := make(chan struct{})
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Write([]byte("x"))
		w.(http.Flusher).Flush()
		<-stall
	}))
	ctx, cancel := context.WithCancelCause(t.Context())
	s, err := New(server.URL, Options{})
	if err != nil {
		t.Fatal(err)
	}
	r, err := Open(ctx, s, Options{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(r, make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	enough := errors.New("enough")
	cancel(enough)
	if _, err := io.ReadAll(r); !errors.Is(err, enough) {
		t.Errorf("read after cancel: %v", err)
	}
	r.Close()
	close(stall)
	server.Close()
	http.DefaultClient.CloseIdleConnections()
	for deadline := time.Now().Add(time.Minute); time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
		if runtime.NumGoroutine() <= before {
			return
		}
	}
	t.Errorf("%d goroutines, there were %d", runtime.NumGoroutine(), before)
}

// TestPipe: one that says nothing ends with the caller's context too.
func TestPipe(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer w.Close()
	w.WriteString("x")
	s, err := New(fmt.Sprintf("/proc/self/fd/%d", r.Fd()), Options{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Tail(t.Context(), s, 1); !errors.Is(err, ErrWhole) {
		t.Errorf("the end of a pipe: %v", err)
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	reader, err := Open(ctx, s, Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer reader.Close()
	if _, err := io.ReadFull(reader, make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	enough := errors.New("enough")
	cancel(enough)
	if _, err := io.ReadAll(reader); !errors.Is(err, enough) {
		t.Errorf("read after cancel: %v", err)
	}
}

// TestRedacted: neither passwords nor presigned URLs reach a log.
func TestRedacted(t *testing.T) {
	const where = "https://user:secret@host/image?X-Amz-Signature=secret"
	s, err := New(where, Options{})
	if err != nil {
		t.Fatal(err)
	}
	for _, got := range []string{Redacted(where), s.String()} {
		if got != "https://user:xxxxx@host/image?xxxxx" {
			t.Error(got)
		}
	}
	const bad = "https://user:secret@host:port/"
	if _, err := New(bad, Options{}); err == nil || strings.Contains(Redacted(bad)+err.Error(), "secret") {
		t.Errorf("%s: %v", Redacted(bad), err)
	}
	if got := Redacted("/a?b"); got != "/a?b" {
		t.Error(got)
	}
}

// sshServer serves SFTP to one key and cuts each connection after so many
// bytes.
func sshServer(t *testing.T, host ssh.Signer, client ssh.PublicKey, cut *atomic.Int64) string {
	t.Helper()
	config := &ssh.ServerConfig{PublicKeyCallback: func(_ ssh.ConnMetadata, k ssh.PublicKey) (*ssh.Permissions, error) {
		if !bytes.Equal(k.Marshal(), client.Marshal()) {
			return nil, errors.New("no")
		}
		return nil, nil
	}}
	config.AddHostKey(host)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	t.Cleanup(func() { l.Close(); wg.Wait() })
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() { serveSFTP(&cutConn{Conn: c, left: cut.Add(1 << 18)}, config) })
		}
	})
	return l.Addr().String()
}

// cutConn closes itself after so many bytes written.
type cutConn struct {
	net.Conn
	left int64
}

func (c *cutConn) Write(p []byte) (int, error) {
	if c.left -= int64(len(p)); c.left < 0 {
		c.Close()
		return 0, net.ErrClosed
	}
	return c.Conn.Write(p)
}

func serveSFTP(c net.Conn, config *ssh.ServerConfig) {
	defer c.Close()
	_, chans, reqs, err := ssh.NewServerConn(c, config)
	if err != nil {
		return
	}
	go ssh.DiscardRequests(reqs)
	for n := range chans {
		ch, reqs, err := n.Accept()
		if err != nil {
			return
		}
		go func() {
			for r := range reqs {
				r.Reply(r.Type == "subsystem", nil)
			}
		}()
		s, err := sftp.NewServer(ch, sftp.ReadOnly())
		if err != nil {
			return
		}
		s.Serve()
		ch.Close()
	}
}

func key(t *testing.T) (ed25519.PrivateKey, ssh.Signer) {
	t.Helper()
	_, k, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	s, err := ssh.NewSignerFromKey(k)
	if err != nil {
		t.Fatal(err)
	}
	return k, s
}

func TestSFTP(t *testing.T) {
	dir := t.TempDir()
	want := content(1 << 20)
	name := filepath.Join(dir, "image")
	if err := os.WriteFile(name, want, 0o600); err != nil {
		t.Fatal(err)
	}
	_, host := key(t)
	clientKey, client := key(t)
	var cut atomic.Int64 // each connection lives for 256 KiB more than the one before
	addr := sshServer(t, host, client.PublicKey(), &cut)

	known := filepath.Join(dir, "known_hosts")
	line := knownhosts.Line([]string{knownhosts.Normalize(addr)}, host.PublicKey())
	if err := os.WriteFile(known, []byte(line+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	block, err := ssh.MarshalPrivateKey(clientKey, "")
	if err != nil {
		t.Fatal(err)
	}
	keyFile := filepath.Join(dir, "key")
	if err := os.WriteFile(keyFile, pem.EncodeToMemory(block), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("SSH_AUTH_SOCK", "")
	where := "sftp://me@" + addr + name

	o := Options{KnownHosts: known, SSHKey: keyFile, Retries: 3}
	for _, w := range []string{where, strings.Replace(where, "sftp:", "scp:", 1)} {
		got, err := get(t, w, o)
		if err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s: %d bytes, %v", w, len(got), err)
		}
	}
	s, err := New(where, o)
	if err != nil {
		t.Fatal(err)
	}
	if tail, err := Tail(t.Context(), s, 100); err != nil || !bytes.Equal(tail, want[len(want)-100:]) {
		t.Errorf("tail: %d bytes, %v", len(tail), err)
	}
	// an agent that is gone matters only where no key is named
	t.Setenv("SSH_AUTH_SOCK", filepath.Join(dir, "gone"))
	if got, err := get(t, where, o); err != nil || !bytes.Equal(got, want) {
		t.Errorf("with a dead agent: %d bytes, %v", len(got), err)
	}
	if _, err := get(t, where, Options{KnownHosts: known}); err == nil || !strings.Contains(err.Error(), "name a key with --ssh-key") {
		t.Errorf("only a dead agent: %v", err)
	}
	t.Setenv("SSH_AUTH_SOCK", "")

	t.Run("agent", func(t *testing.T) {
		ring := agent.NewKeyring()
		if err := ring.Add(agent.AddedKey{PrivateKey: clientKey}); err != nil {
			t.Fatal(err)
		}
		sock := filepath.Join(t.TempDir(), "s")
		l, err := net.Listen("unix", sock)
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				go agent.ServeAgent(ring, c)
			}
		}()
		t.Setenv("SSH_AUTH_SOCK", sock)
		if got, err := get(t, where, Options{KnownHosts: known, Retries: 3}); err != nil || !bytes.Equal(got, want) {
			t.Errorf("%d bytes, %v", len(got), err)
		}
	})

	_, stranger := key(t)
	bad := filepath.Join(dir, "bad_hosts")
	if err := os.WriteFile(bad, []byte(knownhosts.Line([]string{knownhosts.Normalize(addr)}, stranger.PublicKey())+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	empty := filepath.Join(dir, "no_hosts")
	if err := os.WriteFile(empty, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	otherKey, _ := key(t)
	block, err = ssh.MarshalPrivateKey(otherKey, "")
	if err != nil {
		t.Fatal(err)
	}
	otherFile := filepath.Join(dir, "other")
	if err := os.WriteFile(otherFile, pem.EncodeToMemory(block), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		where  string
		o      Options
		reason string
	}{
		{where, Options{KnownHosts: bad, SSHKey: keyFile}, "is NOT the one in " + bad + " line 1"},
		{where, Options{KnownHosts: empty, SSHKey: keyFile}, "is not known here"},
		{where, Options{KnownHosts: known, SSHKey: otherFile}, "accepts none of 1 keys"},
		{where, Options{KnownHosts: known}, "start an ssh-agent or name one with --ssh-key"},
		{where + "x", o, "file does not exist"},
	} {
		if _, err := get(t, c.where, c.o); err == nil || !strings.Contains(err.Error(), c.reason) {
			t.Errorf("%s %+v: %v, want an error with %q", c.where, c.o, err, c.reason)
		}
	}
}

// TestS3 talks to a server that answers GetObject as S3 does, and cuts the
// first answers.
func TestS3(t *testing.T) {
	want := content(1 << 20)
	etag := fmt.Sprintf(`"%x"`, md5.Sum(want))
	var requests atomic.Int32
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		n := int(requests.Add(1))
		switch {
		case !strings.Contains(r.Header.Get("Authorization"), "Credential=me/"):
			w.WriteHeader(403)
			io.WriteString(w, `<Error><Code>AccessDenied</Code><Message>no</Message></Error>`)
			return
		case r.URL.Path != "/bucket/images/app.tar.gz":
			w.WriteHeader(404)
			io.WriteString(w, `<Error><Code>NoSuchKey</Code><Message>no such key</Message></Error>`)
			return
		}
		w.Header().Set("ETag", etag)
		if n < 4 {
			w = &cutting{ResponseWriter: w, left: 200_000 * n}
		}
		http.ServeContent(w, r, "", time.Unix(1700000000, 0), bytes.NewReader(want))
	}))
	defer server.Close()
	t.Setenv("AWS_ENDPOINT_URL_S3", server.URL)
	t.Setenv("AWS_REGION", "us-east-1")
	t.Setenv("AWS_ACCESS_KEY_ID", "me")
	t.Setenv("AWS_SECRET_ACCESS_KEY", "secret")
	t.Setenv("HOME", t.TempDir())

	got, err := get(t, "s3://bucket/images/app.tar.gz", Options{Retries: 2})
	if err != nil || !bytes.Equal(got, want) {
		t.Fatalf("%d bytes after %d requests: %v", len(got), requests.Load(), err)
	}
	s, err := New("s3://bucket/images/app.tar.gz", Options{})
	if err != nil {
		t.Fatal(err)
	}
	if tail, err := Tail(t.Context(), s, 100); err != nil || !bytes.Equal(tail, want[len(want)-100:]) {
		t.Errorf("tail: %d bytes, %v", len(tail), err)
	}
	if _, err := get(t, "s3://bucket/nothing", Options{}); err == nil || !strings.Contains(err.Error(), "no such key") {
		t.Errorf("a missing key: %v", err)
	}
	t.Setenv("AWS_ACCESS_KEY_ID", "you")
	if _, err := get(t, "s3://bucket/images/app.tar.gz", Options{}); err == nil || !strings.Contains(err.Error(), "access denied: set AWS_ACCESS_KEY_ID") {
		t.Errorf("another's key: %v", err)
	}
}
