package server

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/moby/moby/api/types/common"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/events"
	"github.com/moby/term"

	"github.com/cradlestack/cradlestack/dockerapi/translate"
	"github.com/cradlestack/cradlestack/internal/dockerhttp"
	"github.com/cradlestack/cradlestack/internal/tunnel"
)

// attachContainer connects a client with a container that runs, or with its next run: docker run attaches first and starts then.
func (s *Server) attachContainer(w http.ResponseWriter, r *http.Request, t *tenant, c *record) error {
	q := r.URL.Query()
	stream, replay := dockerhttp.Truth(r, "stream"), dockerhttp.Truth(r, "logs")
	if keys := q.Get("detachKeys"); keys != "" {
		if _, err := term.ToBytes(keys); err != nil {
			return dockerhttp.Invalid("invalid detach keys (%s) provided", keys)
		}
	}
	ctx := r.Context()
	if c.Run > 0 && !c.ended() && t.watch.state(c).phase == phasePending {
		if _, err := t.started(ctx, c); err != nil {
			return err
		}
	}
	if p, err := t.running(c); err == nil {
		t.emitContainer(c, events.ActionAttach, nil)
		return p.passStream(w, r, p.inside("/attach"))
	}
	if !stream && replay { // docker attach has no logs alone, but the API has
		return s.containerLogs(w, r, t, c)
	}
	if !stream { // as docker: a stream that ends at once
		client, err := takeOver(w, mediaType(c), r.Header.Get("Upgrade") != "")
		if err != nil {
			return err
		}
		return client.Close()
	}
	a := t.attach(c.ID)
	defer t.detach(c.ID, a)
	// From here on the start of the container waits for this client.
	client, err := takeOver(w, mediaType(c), r.Header.Get("Upgrade") != "")
	if err != nil {
		return err
	}
	defer client.Close()
	watched := watchClient(t.server.ctx, client)
	defer watched.stop()
	if err := t.attachNext(watched.ctx, client, c, q, a); err != nil && watched.ctx.Err() == nil {
		tell(client, c.Config.Tty, err)
	}
	return nil
}

// tell writes an error where the stream is already: that is where docker's clients show it.
func tell(client net.Conn, tty bool, err error) {
	text := err.Error() + "\r\n"
	if !tty {
		n := len(text)
		text = string([]byte{2, 0, 0, 0, byte(n >> 24), byte(n >> 16), byte(n >> 8), byte(n)}) + text
	}
	_, _ = io.WriteString(client, text)
}

// attachNext waits for the container's next run and connects the client with it.
func (t *tenant) attachNext(ctx context.Context, client net.Conn, c *record, q url.Values, a *attachment) error {
	next := c.Run + 1
	var s podState
	if err := t.watch.until(ctx, func() (bool, error) {
		if t.isPlacing(c.ID) {
			return false, nil
		}
		if c.Joins != "" {
			now, err := t.get(ctx, c.ID)
			if isNotFound(err) {
				return true, nil
			}
			if err != nil || now.Run < next {
				return false, err
			}
			if now.Run == next && !now.ended() {
				c, s = now, t.watch.state(now)
			}
			return true, nil
		}
		t.watch.mu.Lock()
		s = t.watch.stateOf(c.jobID(), next, anyTry)
		t.watch.mu.Unlock()
		if s.phase == phaseRunning || s.phase == phaseEnded {
			return true, nil
		}
		if t.busy(c.ID, next) {
			return false, nil
		}
		now, err := t.get(ctx, c.ID)
		if isNotFound(err) {
			return true, nil
		}
		return now != nil && now.Last.Number >= next, err
	}); err != nil {
		return err
	}
	if s.phase != phaseRunning {
		return nil // it did not start, is over, or was removed: start and wait say how
	}
	query := url.Values{"stream": {"1"}, "logs": {"1"}}
	if next > 1 { // what earlier runs have said is in the log as well
		begun := s.alloc.CreateTime
		if c.Joins != "" {
			begun = c.Began.UnixNano()
		}
		query.Set("since", fmt.Sprintf("%d.%09d", begun/1e9, begun%1e9))
	}
	for _, name := range []string{"stdin", "stdout", "stderr", "detachKeys"} {
		if v := q.Get(name); v != "" {
			query.Set(name, v)
		}
	}
	p := t.podWith(c, s.alloc)
	answer, conn, err := p.attach(ctx, query)
	// The driver has told that it runs, and Nomad's servers do not know it yet.
	for deadline := time.Now().Add(podTimeout); errors.Is(err, tunnel.ErrNotRunning) && !t.over(&record{ID: c.ID, Run: next}) && time.Now().Before(deadline); {
		if !sleepFor(ctx, 100*time.Millisecond) {
			break
		}
		answer, conn, err = p.attach(ctx, query)
	}
	if err != nil {
		if t.over(&record{ID: c.ID, Run: next}) {
			return nil
		}
		return err
	}
	defer answer.Body.Close()
	if answer.StatusCode != http.StatusSwitchingProtocols {
		return refusal(answer)
	}
	t.emitContainer(c, events.ActionAttach, nil)
	a.done()
	splice(t.server.ctx, client, conn)
	return nil
}

// attach asks the pod for the container's streams.
func (p *pod) attach(ctx context.Context, query url.Values) (*http.Response, net.Conn, error) {
	request, err := p.request(ctx, http.MethodPost, p.inside("/attach"), query, nil)
	if err != nil {
		return nil, nil, err
	}
	request.Header.Set("Connection", "Upgrade")
	request.Header.Set("Upgrade", "tcp")
	return p.send(ctx, request)
}

// A watchedClient's context ends when it goes away while nobody reads from it yet. What it sends meanwhile is kept for who reads later.
type watchedClient struct {
	ctx  context.Context
	stop func()
}

func watchClient(ctx context.Context, client net.Conn) watchedClient {
	ctx, cancel := context.WithCancel(ctx)
	c, ok := client.(*takenConn)
	if !ok {
		return watchedClient{ctx, cancel}
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		awaitHangup(ctx, c.Conn, cancel)
	}()
	return watchedClient{ctx, func() { cancel(); <-done }}
}

// execRoutes: an exec's id is its container's followed by its own, so that any server finds the pod that it is in.
func (s *Server) execRoutes(on *router) {
	one := func(pattern string, h func(http.ResponseWriter, *http.Request, *pod, string, string) error) {
		on.on(pattern, func(w http.ResponseWriter, r *http.Request, t *tenant) error {
			id := r.PathValue("id")
			if len(id) != 128 {
				return noExec(id)
			}
			c, err := t.get(r.Context(), id[:64])
			if isNotFound(err) {
				if o, err := t.other(r.Context(), id[:64]); err == nil {
					return h(w, r, t.podOfOther(o), o.ID, id[64:])
				}
				return noExec(id)
			}
			if err != nil {
				return err
			}
			if err := t.watch.ready(r.Context()); err != nil {
				return err
			}
			p, err := t.running(c)
			if err != nil {
				return err
			}
			return h(w, r, p, c.ID, id[64:])
		})
	}
	one("POST /exec/{id}/start", func(w http.ResponseWriter, r *http.Request, p *pod, _, exec string) error {
		return p.passStream(w, r, "/exec/"+exec+"/start")
	})
	one("POST /exec/{id}/resize", func(w http.ResponseWriter, r *http.Request, p *pod, _, exec string) error {
		return p.pass(w, r, "/exec/"+exec+"/resize")
	})
	one("GET /exec/{id}/json", func(w http.ResponseWriter, r *http.Request, p *pod, id, exec string) error {
		var e container.ExecInspectResponse
		if err := p.call(r.Context(), http.MethodGet, "/exec/"+exec+"/json", nil, nil, &e); err != nil {
			return err
		}
		e.ID, e.ContainerID = id+exec, id
		return dockerhttp.Answer(w, http.StatusOK, e)
	})
}

func noExec(id string) error {
	return dockerhttp.Errorf(http.StatusNotFound, "No such exec instance: %s", id)
}

// createExec makes an exec in a container that runs.
func (s *Server) createExec(w http.ResponseWriter, r *http.Request, t *tenant, c *record) error {
	p, err := t.running(c)
	if err != nil {
		return err
	}
	var request json.RawMessage
	if err := dockerhttp.Decode(w, r, &request); err != nil {
		return err
	}
	var made common.IDResponse
	if err := p.call(r.Context(), http.MethodPost, p.inside("/exec"), nil, request, &made); err != nil {
		return err
	}
	made.ID = c.ID + made.ID
	return dockerhttp.Answer(w, http.StatusCreated, made)
}

// podWait bounds what a list asks of each pod: one that does not answer is not to keep the others from being told of.
const podWait = 10 * time.Second

func checkPlatform(p string) error {
	parts := strings.Split(p, "/")
	if parts[0] != "linux" || len(parts) > 1 && parts[1] != "amd64" && parts[1] != "x86_64" {
		return dockerhttp.Errorf(http.StatusNotFound, "no node runs containers of platform %s: they are %s", p, translate.Platform)
	}
	return nil
}
