// Package tunnel connects to docker's API in a pod wherever it runs: through Nomad's exec, whose stream the task driver makes a
// connection to the pod's vdocker.sock (spec.TunnelCommand). Nomad's TLS and ACLs guard it (capability alloc-exec), and no node opens a port.
//
// The stream is that of nomad/api's Allocations().Exec, spoken here: the library sends at most 2 KiB in a message, which is slow, and can't be
// told to give up while it connects. tunnel imports nobody of Nomad's but nomad/api, and may be imported by everything that has that.
package tunnel

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/gorilla/websocket"
	"github.com/hashicorp/nomad/api"

	"github.com/cradlestack/cradlestack/spec"
)

// What Nomad refuses, for errors.Is.
var (
	ErrDenied     = errors.New("permission denied: the token needs the capability alloc-exec in the allocation's namespace")
	ErrNotRunning = errors.New("the task is not running")
	// ErrNotStarted is an ErrNotRunning, of a task that its client has not started as far as it tells.
	ErrNotStarted = fmt.Errorf("%w yet", ErrNotRunning)
)

// A Target is a task that is a pod.
type Target struct {
	Config *api.Config // how Nomad is reached; its address can be any agent's
	Alloc  string      // the allocation's whole id
	Task   string
	// Local is the task driver's state_dir on this machine; "" for none. A pod that is there is connected to by its socket, once Nomad has allowed it.
	Local string
}

// Dial opens a connection, which is there when Dial returns. ctx is for opening it alone. A connection has deadlines and CloseWrite as a TCP
// connection has.
func Dial(ctx context.Context, t Target) (net.Conn, error) {
	ws, err := open(ctx, t)
	if err != nil {
		return nil, fmt.Errorf("connect to task %s of allocation %.8s: %w", t.Task, t.Alloc, err)
	}
	ws.SetReadLimit(4 * maxMessage)
	c := &conn{
		ws: ws, target: t, ready: make(chan struct{}), in: make(chan []byte, queued), eof: make(chan struct{}),
		out: make(chan api.ExecStreamingInput, queued), closing: make(chan struct{}), sent: make(chan struct{}), done: make(chan struct{}),
		read: newDeadline(), write: newDeadline(),
	}
	c.work.Go(c.receive)
	c.work.Go(c.transmit)
	select {
	case <-c.ready:
		if local := c.local(ctx); local != nil {
			c.Close()
			return local, nil
		}
		return c, nil
	case <-c.done:
		c.Close()
		return nil, c.failed("connect to")
	case <-ctx.Done():
		c.Close()
		return nil, fmt.Errorf("connect to %v: %w", c.RemoteAddr(), context.Cause(ctx))
	}
}

// local connects to the pod's socket, where that is on this machine; nil where it is not. The driver's word counts below its own directory alone.
func (c *conn) local(ctx context.Context) net.Conn {
	if c.target.Local == "" {
		return nil
	}
	below, err := filepath.Rel(c.target.Local, c.at)
	if err != nil || !filepath.IsLocal(below) {
		return nil
	}
	conn, err := new(net.Dialer).DialContext(ctx, "unix", c.at)
	if err != nil {
		return nil
	}
	return conn
}

// open begins the exec.
func open(ctx context.Context, t Target) (*websocket.Conn, error) {
	dialer, u, err := way(t.Config)
	if err != nil {
		return nil, err
	}
	command, err := json.Marshal([]string{spec.TunnelCommand})
	if err != nil {
		return nil, err
	}
	u.Path = "/v1/client/allocation/" + t.Alloc + "/exec"
	q := url.Values{"task": {t.Task}, "tty": {"false"}, "command": {string(command)}}
	for key, value := range map[string]string{"namespace": t.Config.Namespace, "region": t.Config.Region} {
		if value != "" {
			q.Set(key, value)
		}
	}
	u.RawQuery = q.Encode()
	header := t.Config.Headers.Clone()
	if header == nil {
		header = http.Header{}
	}
	if t.Config.SecretID != "" {
		header.Set("X-Nomad-Token", t.Config.SecretID)
	}
	if a := t.Config.HttpAuth; a != nil {
		r := http.Request{Header: header}
		r.SetBasicAuth(a.Username, a.Password)
	}
	stop := func() bool { return true }
	dial := dialer.NetDialContext
	dialer.NetDialContext = func(ctx context.Context, network, address string) (net.Conn, error) {
		c, err := dial(ctx, network, address)
		if err != nil {
			return nil, err
		}
		stop = context.AfterFunc(ctx, func() { c.Close() }) // the dialer knows ctx's deadline alone
		return c, nil
	}
	ws, resp, err := dialer.DialContext(ctx, u.String(), header)
	if !stop() || err != nil && ctx.Err() != nil {
		if err == nil {
			ws.Close()
		}
		return nil, context.Cause(ctx)
	}
	if err != nil && resp != nil {
		defer resp.Body.Close()
		text, _ := io.ReadAll(io.LimitReader(resp.Body, 4<<10))
		err = refusal(fmt.Sprintf("%s: %s", resp.Status, strings.TrimSpace(string(text))))
	}
	return ws, err
}

// way is how api.NewClient would reach Nomad.
func way(c *api.Config) (*websocket.Dialer, *url.URL, error) {
	address := c.Address
	if address == "" {
		address = api.DefaultConfig().Address
	}
	u, err := url.Parse(address)
	if err != nil {
		return nil, nil, fmt.Errorf("address %q: %w", address, err)
	}
	d := &websocket.Dialer{ReadBufferSize: 64 << 10, WriteBufferSize: 64 << 10}
	if u.Scheme == "unix" {
		socket := u.EscapedPath()
		d.NetDialContext = func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", socket)
		}
		return d, &url.URL{Scheme: "ws", Host: "127.0.0.1"}, nil
	}
	client := c.HttpClient
	if client == nil {
		client = &http.Client{Transport: &http.Transport{Proxy: http.ProxyFromEnvironment, TLSClientConfig: &tls.Config{MinVersion: tls.VersionTLS12}}}
		if err := api.ConfigureTLS(client, c.TLSConfig); err != nil {
			return nil, nil, err
		}
	}
	transport, ok := client.Transport.(*http.Transport)
	if !ok {
		return nil, nil, fmt.Errorf("the HTTP client's transport is a %T, and a stream needs a *http.Transport", client.Transport)
	}
	d.NetDialContext, d.Proxy, d.TLSClientConfig = transport.DialContext, transport.Proxy, transport.TLSClientConfig
	if d.NetDialContext == nil {
		d.NetDialContext = new(net.Dialer).DialContext
	}
	to := &url.URL{Scheme: "ws", Host: u.Host}
	if u.Scheme == "https" {
		to.Scheme = "wss"
	}
	return d, to, nil
}

// refusal makes an error of what Nomad or the driver says.
func refusal(text string) error {
	text = strings.TrimPrefix(strings.TrimSpace(text), "rpc error: code = Unknown desc = ")
	lower := strings.ToLower(text)
	switch {
	case strings.Contains(lower, "permission denied"), strings.Contains(lower, "token not found"):
		return fmt.Errorf("%w: %s", ErrDenied, text)
	case strings.Contains(lower, "not started"):
		return fmt.Errorf("%w: %s", ErrNotStarted, text)
	case strings.Contains(lower, "not running"), strings.Contains(lower, "task not found"),
		strings.Contains(lower, "unknown allocation"), strings.Contains(lower, "client status of allocation"), strings.Contains(lower, "the task has ended"):
		return fmt.Errorf("%w: %s", ErrNotRunning, text)
	}
	return errors.New(text)
}

const (
	maxMessage = 64 << 10    // bytes in one message to Nomad
	queued     = 4           // messages of either direction that wait
	goodbye    = time.Second // for what waits when the connection is closed
)

type conn struct {
	ws     *websocket.Conn
	target Target
	work   sync.WaitGroup

	ready chan struct{} // closed when the pod takes bytes
	at    string        // where it does so on its node; known by then

	in      chan []byte
	eof     chan struct{} // closed when the pod has closed its direction
	reading sync.Mutex
	rest    []byte
	read    *deadline

	out     chan api.ExecStreamingInput
	sent    chan struct{} // closed when transmit has returned
	writing sync.Mutex
	shut    bool // CloseWrite was called
	write   *deadline

	closing chan struct{} // closed by Close
	done    chan struct{} // closed when nothing goes any more; err says why
	mu      sync.Mutex
	closed  bool
	err     error
}

// end notes why nothing goes any more; the first reason counts.
func (c *conn) end(why error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err == nil {
		c.err = why
		close(c.done)
		c.ws.Close()
	}
}

func (c *conn) why() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.err
}

func (c *conn) failed(op string) error {
	err := c.why()
	if err == io.EOF { // both sides had ended
		err = syscall.EPIPE
	}
	return fmt.Errorf("%s %v: %w", op, c.RemoteAddr(), err)
}

// receive takes what comes until the exec has ended.
func (c *conn) receive() {
	var said strings.Builder
	for {
		var m api.ExecStreamingOutput
		_ = c.ws.SetReadDeadline(time.Now().Add(spec.TunnelPatience)) // fails where it is closed
		if err := c.ws.ReadJSON(&m); err != nil {
			var closed *websocket.CloseError
			if errors.As(err, &closed) && closed.Text != "" {
				err = refusal(closed.Text)
			}
			c.end(err)
			return
		}
		switch {
		case m.Stdout != nil && len(m.Stdout.Data) > 0:
			select {
			case c.in <- m.Stdout.Data:
			case <-c.done:
				return
			}
		case m.Stderr != nil && len(m.Stderr.Data) > 0:
			text := string(m.Stderr.Data)
			at, told := strings.CutPrefix(text, spec.TunnelAt)
			switch {
			case told && c.at == "":
				c.at = strings.TrimSuffix(at, "\n")
			case text == spec.TunnelReady:
				c.opened(c.ready)
			case text == spec.TunnelEOF:
				c.opened(c.eof)
			default:
				said.Write(m.Stderr.Data[:min(len(m.Stderr.Data), max(0, maxMessage-said.Len()))])
			}
		case m.Exited && m.Result != nil:
			switch {
			case m.Result.ExitCode == 0:
				c.opened(c.eof)
				c.end(io.EOF)
			case said.Len() > 0:
				c.end(refusal(said.String()))
			default:
				c.end(fmt.Errorf("there was no connection: %s is a command to its driver, which has ended with exit code %d", spec.TunnelCommand, m.Result.ExitCode))
			}
			return
		}
	}
}

// opened closes a channel of receive's, once.
func (c *conn) opened(ch chan struct{}) {
	select {
	case <-ch:
	default:
		close(ch)
	}
}

// transmit sends what was written; now and then an empty message, so that a connection whose other side is gone does not stay; and at the
// end a goodbye.
func (c *conn) transmit() {
	defer close(c.sent)
	beat := time.NewTicker(spec.TunnelHeartbeat)
	defer beat.Stop()
	for {
		var m api.ExecStreamingInput
		select {
		case m = <-c.out:
		case <-beat.C:
		case <-c.done:
			return
		case <-c.closing:
			select {
			case m = <-c.out:
			default:
				_ = c.ws.WriteJSON(api.ExecStreamingInput{TTYSize: &api.TerminalSize{}}) // a pod that can't be told finds out
				return
			}
		}
		if err := c.ws.WriteJSON(m); err != nil {
			c.end(err)
			return
		}
	}
}

func (c *conn) Read(p []byte) (int, error) {
	c.reading.Lock()
	defer c.reading.Unlock()
	if len(p) == 0 {
		return 0, nil
	}
	if len(c.rest) == 0 {
		if err := c.next(); err != nil {
			return 0, err
		}
	}
	n := copy(p, c.rest)
	c.rest = c.rest[n:]
	return n, nil
}

// next waits for bytes. What has come before the end is read before it.
func (c *conn) next() error {
	passed := c.read.passed()
	select {
	case <-passed:
		return os.ErrDeadlineExceeded
	default:
	}
	select {
	case <-c.closing:
		return fmt.Errorf("read from %v: %w", c.RemoteAddr(), net.ErrClosed)
	default:
	}
	select {
	case c.rest = <-c.in:
		return nil
	case <-passed:
		return os.ErrDeadlineExceeded
	case <-c.closing:
		return fmt.Errorf("read from %v: %w", c.RemoteAddr(), net.ErrClosed)
	case <-c.eof:
	case <-c.done:
	}
	select {
	case c.rest = <-c.in:
		return nil
	default:
	}
	select {
	case <-c.eof:
		return io.EOF
	default:
		return c.failed("read from")
	}
}

func (c *conn) Write(p []byte) (n int, err error) {
	c.writing.Lock()
	defer c.writing.Unlock()
	for n < len(p) {
		part := p[n:min(n+maxMessage, len(p))]
		if err := c.send(api.ExecStreamingInput{Stdin: &api.ExecStreamingIOOperation{Data: bytes.Clone(part)}}); err != nil {
			return n, err
		}
		n += len(part)
	}
	return n, nil
}

// send gives transmit something to do. writing has to be held.
func (c *conn) send(m api.ExecStreamingInput) error {
	passed := c.write.passed()
	select {
	case <-c.closing:
		return fmt.Errorf("write to %v: %w", c.RemoteAddr(), net.ErrClosed)
	case <-c.done:
		return c.failed("write to")
	case <-passed:
		return os.ErrDeadlineExceeded
	default:
	}
	if c.shut {
		return fmt.Errorf("write to %v after CloseWrite: %w", c.RemoteAddr(), syscall.EPIPE)
	}
	select {
	case c.out <- m:
		return nil
	case <-c.closing:
		return fmt.Errorf("write to %v: %w", c.RemoteAddr(), net.ErrClosed)
	case <-c.done:
		return c.failed("write to")
	case <-passed:
		return os.ErrDeadlineExceeded
	}
}

// CloseWrite tells the pod that nothing more comes.
func (c *conn) CloseWrite() error {
	c.writing.Lock()
	defer c.writing.Unlock()
	if c.shut {
		return nil
	}
	err := c.send(api.ExecStreamingInput{Stdin: &api.ExecStreamingIOOperation{Close: true}})
	c.shut = err == nil
	return err
}

// Close ends both directions. What was written is still sent, unless the pod does not take it within a second.
func (c *conn) Close() error {
	c.mu.Lock()
	first := !c.closed
	if c.closed = true; first {
		close(c.closing)
	}
	c.mu.Unlock()
	select {
	case <-c.sent:
	case <-time.After(goodbye):
	}
	c.end(net.ErrClosed)
	c.work.Wait()
	if !first {
		return net.ErrClosed
	}
	return nil
}

// An addr is a task.
type addr struct{ text string }

func (addr) Network() string  { return "nomad" }
func (a addr) String() string { return a.text }

func (c *conn) LocalAddr() net.Addr { return addr{"tunnel"} }
func (c *conn) RemoteAddr() net.Addr {
	return addr{fmt.Sprintf("task %s of allocation %.8s", c.target.Task, c.target.Alloc)}
}

func (c *conn) SetDeadline(t time.Time) error {
	return errors.Join(c.SetReadDeadline(t), c.SetWriteDeadline(t))
}

func (c *conn) SetReadDeadline(t time.Time) error {
	c.read.set(t)
	return nil
}

func (c *conn) SetWriteDeadline(t time.Time) error {
	c.write.set(t)
	return nil
}
