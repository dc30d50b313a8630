package server

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/nomad/api"
	"github.com/moby/moby/api/types/common"

	"github.com/cradlestack/cradlestack/dockerapi/translate"
	"github.com/cradlestack/cradlestack/internal/dockerhttp"
	"github.com/cradlestack/cradlestack/internal/tunnel"
)

// podTimeout bounds the way to a pod, and what it answers at once.
const podTimeout = 30 * time.Second

// Pauses between tries to reach a pod that Nomad's client does not know yet.
const (
	leastEarly = 2 * time.Millisecond
	mostEarly  = 100 * time.Millisecond
)

// A pod is the docker API of an allocation's pod.
type pod struct {
	tenant      *tenant
	alloc, task string
	container   string // that is asked about, as the pod calls it
}

func (t *tenant) pod(a *api.AllocationListStub) *pod {
	return &pod{t, a.ID, translate.Own, translate.Own}
}

// podWith is the pod that a container is in.
func (t *tenant) podWith(r *record, a *api.AllocationListStub) *pod {
	p := t.pod(a)
	if r.Joins != "" {
		p.container = r.ID
	}
	return p
}

// dial opens a connection to the pod's docker API, through Nomad. The pod may be known to answer before Nomad's client knows what it has started.
func (p *pod) dial(ctx context.Context) (net.Conn, error) {
	w := p.tenant.watch
	for pause := leastEarly; w.isEarly(p.alloc); pause *= 2 {
		conn, err := p.dialNow(ctx)
		if !errors.Is(err, tunnel.ErrNotRunning) {
			return conn, err
		}
		if pause > mostEarly { // it is busy, and tells by itself
			if err := w.until(ctx, func() (bool, error) { return !w.isEarly(p.alloc), nil }); err != nil {
				return nil, err
			}
		} else if !sleepFor(ctx, pause) {
			return nil, context.Cause(ctx)
		}
	}
	conn, err := p.dialNow(ctx)
	for try := 0; try < reminders && errors.Is(err, tunnel.ErrNotStarted) && w.runs(p.alloc); try++ {
		p.remind(ctx)
		if !sleepFor(ctx, mostEarly) {
			return nil, context.Cause(ctx)
		}
		conn, err = p.dialNow(ctx)
	}
	return conn, err
}

// reminders are how often a client is asked to look again.
const reminders = 5

// remind has the pod's client look at what it runs. Who asks Nomad's client for a task in the moment of its start may have it write what was before over what is (Nomad 1.11,
// allocRunner.AllocState), and from then on refuse what the servers say is running. Any event of the task mends that: here that of a signal, which the driver refuses as it is none.
func (p *pod) remind(ctx context.Context) {
	err := p.tenant.nomad.Allocations().Signal(&api.Allocation{ID: p.alloc}, p.tenant.query(ctx), p.task, "0")
	p.tenant.server.Log.Debug("a client did not know a task that runs", "allocation", p.alloc, "said", err)
}

func (p *pod) dialNow(ctx context.Context) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, podTimeout)
	defer cancel()
	conn, err := tunnel.Dial(ctx, tunnel.Target{Config: p.tenant.config, Alloc: p.alloc, Task: p.task, Local: p.tenant.server.Pods})
	if errors.Is(err, tunnel.ErrDenied) {
		return nil, dockerhttp.NewError(http.StatusForbidden, err.Error())
	}
	return conn, err
}

// podHost is what stands in the Host header of a request to a pod.
const podHost = "pod"

// send sends a request on a connection of its own and returns the answer; closing its body closes the connection. Where the pod has taken the
// connection over, it is the answer's body, an io.ReadWriteCloser.
func (p *pod) send(ctx context.Context, r *http.Request) (*http.Response, net.Conn, error) {
	conn, err := p.dial(ctx)
	if err != nil {
		return nil, nil, err
	}
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	fail := func(err error) (*http.Response, net.Conn, error) {
		stop()
		conn.Close()
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		return nil, nil, fmt.Errorf("the pod: %w", err)
	}
	// A pod may answer before it has taken the whole body; what it then says counts.
	wrote := make(chan error, 1)
	go func() { wrote <- r.Write(conn) }()
	in := bufio.NewReader(conn)
	answer, err := http.ReadResponse(in, r)
	if err != nil {
		select {
		case werr := <-wrote:
			err = errors.Join(err, werr)
		default:
		}
		return fail(err)
	}
	taken := &takenConn{Conn: conn, in: in, stop: stop}
	if answer.StatusCode == http.StatusSwitchingProtocols {
		answer.Body = taken
		return answer, taken, nil
	}
	answer.Body = &closingBody{answer.Body, taken}
	return answer, taken, nil
}

// A takenConn is a connection of which something was read ahead.
type takenConn struct {
	net.Conn
	in   *bufio.Reader
	stop func() bool
	once sync.Once
}

func (c *takenConn) Read(p []byte) (int, error) { return c.in.Read(p) }

func (c *takenConn) Close() error {
	var err error
	c.once.Do(func() {
		c.stop()
		err = c.Conn.Close()
	})
	return err
}

func (c *takenConn) CloseWrite() error { return closeWrite(c.Conn) }

func closeWrite(c net.Conn) error {
	if w, ok := c.(interface{ CloseWrite() error }); ok {
		return w.CloseWrite()
	}
	return nil
}

type closingBody struct {
	io.ReadCloser
	conn net.Conn
}

func (b *closingBody) Close() error {
	err := b.ReadCloser.Close()
	return errors.Join(err, b.conn.Close())
}

func (p *pod) request(ctx context.Context, method, path string, q url.Values, body io.Reader) (*http.Request, error) {
	r, err := http.NewRequestWithContext(ctx, method, (&url.URL{Scheme: "http", Host: podHost, Path: path, RawQuery: q.Encode()}).String(), body)
	if err == nil && body != nil {
		r.Header.Set("Content-Type", "application/json")
	}
	return r, err
}

// call asks for something small. What the pod refuses is an error with its status.
func (p *pod) call(ctx context.Context, method, path string, q url.Values, in, out any) error {
	var body io.Reader
	if in != nil {
		data, err := json.Marshal(in)
		if err != nil {
			return err
		}
		body = bytes.NewReader(data)
	}
	r, err := p.request(ctx, method, path, q, body)
	if err != nil {
		return err
	}
	answer, _, err := p.send(ctx, r)
	if err != nil {
		return err
	}
	defer answer.Body.Close()
	if answer.StatusCode >= http.StatusBadRequest || answer.StatusCode == http.StatusNotModified {
		return refusal(answer)
	}
	if out == nil {
		return nil
	}
	return json.NewDecoder(io.LimitReader(answer.Body, dockerhttp.MaxBody)).Decode(out)
}

// read asks for what may be long, or never end.
func (p *pod) read(ctx context.Context, path string, q url.Values) (io.ReadCloser, error) {
	return p.stream(ctx, http.MethodGet, path, q)
}

// stream is a request without a body, and its answer as it comes.
func (p *pod) stream(ctx context.Context, method, path string, q url.Values) (io.ReadCloser, error) {
	r, err := p.request(ctx, method, path, q, nil)
	if err != nil {
		return nil, err
	}
	answer, _, err := p.send(ctx, r)
	if err != nil {
		return nil, err
	}
	if answer.StatusCode != http.StatusOK {
		defer answer.Body.Close()
		return nil, refusal(answer)
	}
	return answer.Body, nil
}

// refusal is what a pod says against a request.
func refusal(answer *http.Response) error {
	data, _ := io.ReadAll(io.LimitReader(answer.Body, 64<<10))
	var e common.ErrorResponse
	if json.Unmarshal(data, &e) != nil || e.Message == "" {
		e.Message = strings.TrimSpace(string(data))
	}
	return dockerhttp.NewError(answer.StatusCode, e.Message)
}

// inside is the path of something of the container in its pod.
func (p *pod) inside(rest string) string { return "/containers/" + p.container + rest }

// pass gives a request to the pod as it is, and its answer to the client as it comes.
func (p *pod) pass(w http.ResponseWriter, r *http.Request, path string) error {
	return p.passIn(r.Context(), w, r, path)
}

// passStream is pass for what the client's connection becomes a stream of: one that has ended its input is not gone, which the request's context takes
// it for.
func (p *pod) passStream(w http.ResponseWriter, r *http.Request, path string) error {
	return p.passIn(p.tenant.server.ctx, w, r, path)
}

func (p *pod) passIn(ctx context.Context, w http.ResponseWriter, r *http.Request, path string) error {
	out := r.Clone(ctx)
	out.URL = &url.URL{Scheme: "http", Host: podHost, Path: path, RawQuery: r.URL.RawQuery}
	out.Host, out.RequestURI = podHost, ""
	answer, conn, err := p.send(ctx, out)
	if err != nil {
		return err
	}
	defer answer.Body.Close()
	if answer.StatusCode >= http.StatusBadRequest {
		return refusal(answer)
	}
	if answer.StatusCode == http.StatusSwitchingProtocols || isRaw(answer) && r.Method == http.MethodPost {
		client, err := takeOver(w, answer.Header.Get("Content-Type"), r.Header.Get("Upgrade") != "")
		if err != nil {
			return err
		}
		splice(ctx, client, conn)
		return nil
	}
	relay(w, answer)
	return nil
}

// isRaw says whether a stream follows the answer's header that is no HTTP body.
func isRaw(answer *http.Response) bool {
	return strings.HasPrefix(answer.Header.Get("Content-Type"), "application/vnd.docker.")
}

// relay gives an answer to the client, each piece as soon as it comes. What breaks off breaks off for the client as well.
func relay(w http.ResponseWriter, answer *http.Response) {
	for _, name := range []string{"Content-Type", "Content-Length", "X-Docker-Container-Path-Stat"} {
		if v := answer.Header.Get(name); v != "" {
			w.Header().Set(name, v)
		}
	}
	w.WriteHeader(answer.StatusCode)
	flush := http.NewResponseController(w)
	_ = flush.Flush()
	buf := make([]byte, 64<<10)
	for {
		n, err := answer.Body.Read(buf)
		if n > 0 {
			if _, werr := w.Write(buf[:n]); werr != nil {
				return
			}
			if flush.Flush() != nil {
				return
			}
		}
		if err == io.EOF {
			return
		}
		if err != nil {
			panic(http.ErrAbortHandler)
		}
	}
}

// takeOver takes a client's connection from HTTP and begins a stream on it (moby api/swagger.yaml, ContainerAttach).
func takeOver(w http.ResponseWriter, mediaType string, upgrade bool) (net.Conn, error) {
	conn, in, err := dockerhttp.Hijack(w)
	if err != nil {
		return nil, err
	}
	if err := dockerhttp.BeginStream(conn, w.Header(), mediaType, upgrade); err != nil {
		conn.Close()
		return nil, err
	}
	return &takenConn{Conn: conn, in: in, stop: func() bool { return true }}, nil
}

// linger is how long a client may take to close its side when it has got everything.
const linger = 10 * time.Second

// splice connects a client with a pod. Either direction ends by itself; when the pod's has ended, all is said. A client that is gone ends both.
func splice(ctx context.Context, client, pod net.Conn) {
	stop := context.AfterFunc(ctx, func() {
		client.Close()
		pod.Close()
	})
	defer stop()
	input := make(chan struct{})
	go func() {
		defer close(input)
		_, err := io.Copy(pod, client)
		if err != nil {
			pod.Close() // the client is gone
			return
		}
		_ = closeWrite(pod)
	}()
	_, _ = io.Copy(client, pod)
	_ = closeWrite(client)
	client.SetReadDeadline(time.Now().Add(linger))
	pod.Close()
	<-input
	client.Close()
}
