package server

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"runtime/debug"
	"slices"
	"strings"
	"time"

	"github.com/cradlestack/cradlestack/internal/dockerhttp"
)

// A handler answers a request of a tenant's. An error that it returns is answered in docker's shape: see errors.go for the status.
type handler func(w http.ResponseWriter, r *http.Request, t *tenant) error

// A router finds the handler of a request.
type router struct {
	*http.ServeMux
	server *Server
	named  map[string]map[string]handler // "GET /images/" → what follows a name → handler
	all    []string                      // patterns that it answers
}

func newRouter(s *Server) *router {
	rt := &router{ServeMux: http.NewServeMux(), server: s, named: map[string]map[string]handler{}}
	for pattern, why := range unsupported {
		rt.open(pattern, func(http.ResponseWriter, *http.Request) error {
			return dockerhttp.NewError(http.StatusNotImplemented, why)
		})
	}
	for pattern, kind := range absent {
		rt.open(pattern, func(_ http.ResponseWriter, r *http.Request) error {
			return dockerhttp.Errorf(http.StatusNotFound, "No such %s: %s", kind, r.PathValue("name"))
		})
	}
	rt.open("/", func(http.ResponseWriter, *http.Request) error {
		return dockerhttp.NewError(http.StatusNotFound, "page not found")
	})
	return rt
}

// takeJSON are the patterns whose bodies are JSON. That is checked before anything else, as docker does.
var takeJSON = []string{
	"POST /commit", "POST /containers/create", "POST /containers/{id}/exec", "POST /containers/{id}/update", "POST /exec/{id}/start",
	"POST /networks/create", "POST /networks/{id}/connect", "POST /networks/{id}/disconnect", "POST /volumes/create",
}

// on answers a pattern of http.ServeMux to those who have a namespace.
func (rt *router) on(pattern string, h handler) {
	isJSON := slices.Contains(takeJSON, pattern)
	rt.open(pattern, func(w http.ResponseWriter, r *http.Request) error {
		if isJSON {
			if err := dockerhttp.CheckJSON(w, r); err != nil {
				return err
			}
		}
		t, err := rt.server.tenant(r)
		if err != nil {
			return err
		}
		return h(w, r, t)
	})
}

// open answers a pattern to everybody.
func (rt *router) open(pattern string, h func(http.ResponseWriter, *http.Request) error) {
	rt.all = append(rt.all, pattern)
	rt.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) {
		if err := h(w, r); err != nil {
			answerError(w, r, err)
		}
	})
}

// naming answers a route whose id names one object: it is found first, and what Nomad tells of has to be known.
func naming[T any](find func(*tenant, context.Context, string) (T, error), h func(http.ResponseWriter, *http.Request, *tenant, T) error) handler {
	return func(w http.ResponseWriter, r *http.Request, t *tenant) error {
		object, err := find(t, r.Context(), r.PathValue("id"))
		if err != nil {
			return err
		}
		if err := t.watch.ready(r.Context()); err != nil {
			return err
		}
		return h(w, r, t, object)
	}
}

// onName answers paths with a name in the middle that may hold slashes, as images' do: onName("GET", "/images/", "/json", h) is
// GET /images/registry.example.org/team/app/json. The name is the path value "name". suffix may be "".
func (rt *router) onName(method, prefix, suffix string, h handler) {
	pattern := method + " " + prefix
	if rt.named[pattern] == nil {
		suffixes := map[string]handler{}
		rt.named[pattern] = suffixes
		rt.on(pattern+"{name...}", func(w http.ResponseWriter, r *http.Request, t *tenant) error {
			full := r.PathValue("name")
			best, found := "", false
			for suffix := range suffixes {
				if strings.HasSuffix(full, suffix) && len(full) > len(suffix) && (!found || len(suffix) > len(best)) {
					best, found = suffix, true
				}
			}
			if !found {
				return dockerhttp.NewError(http.StatusNotFound, "page not found")
			}
			r.SetPathValue("name", strings.TrimSuffix(full, best))
			return suffixes[best](w, r, t)
		})
	}
	rt.named[pattern][suffix] = h
}

// What docker's API has and this one has not, and what to do instead.
var unsupported = map[string]string{
	"POST /build":   noBuild,
	"POST /session": noBuild,
	"POST /grpc":    noBuild,
	"/swarm":        noSwarm, "/swarm/": noSwarm, "/nodes": noSwarm, "/nodes/": noSwarm, "/services": noSwarm, "/services/": noSwarm,
	"/tasks": noSwarm, "/tasks/": noSwarm, "/secrets": noSwarm, "/secrets/": noSwarm, "/configs": noSwarm, "/configs/": noSwarm,
	"/plugins": noPlugins, "/plugins/": noPlugins,
	"GET /containers/{id}/attach/ws":         "attaching over a websocket is not supported: use POST /containers/{id}/attach",
	"/containers/{id}/checkpoints":           noCheckpoints,
	"/containers/{id}/checkpoints/{name...}": noCheckpoints,
}

const (
	noBuild       = "images are not built here: build with docker buildx on your own machine (docker --context default buildx build -o type=docker,dest=image.tar .), then docker load -i image.tar"
	noSwarm       = "this is no swarm: Nomad schedules containers; use docker compose"
	noPlugins     = "there are no docker plugins: volumes come from Nomad's CSI plugins"
	noCheckpoints = "checkpoints are not supported"
)

// Single objects that docker inspect tries one after the other when it isn't told a type.
var absent = map[string]string{
	"GET /nodes/{name}":        "node",
	"GET /services/{name}":     "service",
	"GET /tasks/{name}":        "task",
	"GET /secrets/{name}":      "secret",
	"GET /configs/{name}":      "config",
	"GET /plugins/{name}/json": "plugin",
}

// logged notes each request, and keeps a handler's panic to it.
func (s *Server) logged(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		begin, seen := time.Now(), &seenStatus{ResponseWriter: w}
		defer func() {
			if p := recover(); p != nil {
				if p == http.ErrAbortHandler { //nolint:errorlint // it is that very value
					panic(p)
				}
				s.Log.Error("a request ended in a panic", "method", r.Method, "path", r.URL.Path, "panic", fmt.Sprint(p), "stack", string(debug.Stack()))
				if seen.status == 0 {
					dockerhttp.AnswerError(w, http.StatusInternalServerError, errors.New("the server failed: its log says where"))
				}
				return
			}
			level := slog.LevelInfo
			if r.Method == http.MethodGet || r.Method == http.MethodHead {
				level = slog.LevelDebug
			}
			s.Log.Log(context.WithoutCancel(r.Context()), level, "request", "client", clientName(r), "method", r.Method, "path", r.URL.Path, "status", seen.status, "took", time.Since(begin).Round(time.Microsecond))
		}()
		next.ServeHTTP(seen, r)
	})
}

// seenStatus remembers the status that was answered.
type seenStatus struct {
	http.ResponseWriter
	status int
}

func (w *seenStatus) WriteHeader(status int) {
	w.status = status
	w.ResponseWriter.WriteHeader(status)
}

func (w *seenStatus) Write(p []byte) (int, error) {
	if w.status == 0 {
		w.status = http.StatusOK
	}
	return w.ResponseWriter.Write(p)
}

// Unwrap lets http.ResponseController flush and hijack.
func (w *seenStatus) Unwrap() http.ResponseWriter { return w.ResponseWriter }
