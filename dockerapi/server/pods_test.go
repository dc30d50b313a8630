package server

import (
	"errors"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"slices"
	"sync"
	"testing"

	"github.com/hashicorp/nomad/api"

	"github.com/cradlestack/cradlestack/dockerapi/translate"
	"github.com/cradlestack/cradlestack/internal/tunnel"
)

// A client that says of a task which runs that it has not started is reminded, and asked again; one of a task that does not run yet is believed.
func TestReminded(t *testing.T) {
	var mu sync.Mutex
	var asked []string
	nomad := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		defer mu.Unlock()
		what := r.Method + " " + r.URL.Path
		switch {
		case what == "GET /v1/client/allocation/a/exec" && !slices.Contains(asked, "PUT /v1/client/allocation/a/signal"):
			http.Error(w, `task "main" not started yet.`, http.StatusNotFound)
		case what == "GET /v1/client/allocation/a/exec":
			http.Error(w, "it is asked", http.StatusTeapot)
		case what == "PUT /v1/client/allocation/a/signal":
			http.Error(w, `"0" is no signal`, http.StatusInternalServerError)
		}
		asked = append(asked, what)
	}))
	defer nomad.Close()
	config := &api.Config{Address: nomad.URL}
	client, err := api.NewClient(config)
	if err != nil {
		t.Fatal(err)
	}
	a := &api.AllocationListStub{ID: "a", JobID: "docker-1", ClientStatus: api.AllocClientStatusPending, DesiredStatus: api.AllocDesiredStatusRun}
	of := &tenant{server: &Server{Config: Config{Log: slog.New(slog.NewTextHandler(io.Discard, nil))}}, config: config, nomad: client, watch: newWatch()}
	of.watch.jobs["docker-1"] = &jobState{allocs: map[string]*api.AllocationListStub{"a": a}}
	p := &pod{of, "a", translate.Own, translate.Own}
	if _, err := p.dial(t.Context()); !errors.Is(err, tunnel.ErrNotStarted) || !errors.Is(err, tunnel.ErrNotRunning) || len(asked) != 1 {
		t.Errorf("pending: %v, asked %v", err, asked)
	}
	a.ClientStatus = api.AllocClientStatusRunning
	if _, err := p.dial(t.Context()); err == nil || errors.Is(err, tunnel.ErrNotRunning) || len(asked) != 4 {
		t.Errorf("running: %v, asked %v", err, asked)
	}
}
