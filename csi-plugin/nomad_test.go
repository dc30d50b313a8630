package main

import (
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"path"
	"slices"
	"strings"
	"testing"

	"github.com/gorilla/websocket"
	"github.com/hashicorp/nomad/api"
)

// What was cut off goes on, and what has failed does not.
func TestUnlessCut(t *testing.T) {
	begun := 0
	var ends func(*websocket.Conn)
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if path.Base(r.URL.Path) != "exec" {
			_, _ = io.WriteString(w, "{}")
			return
		}
		begun++
		conn, err := (&websocket.Upgrader{}).Upgrade(w, r, nil)
		if err != nil {
			t.Error(err)
			return
		}
		ends(conn)
		conn.Close()
	}))
	defer srv.Close()
	n, said := nomadAt(t, srv)
	p := &place{node: &api.Node{Name: "node1"}, alloc: &api.Allocation{ID: "a", NodeID: "n"}, task: &api.Task{Name: "t"}}
	receive := func() error { return n.exec(t.Context(), p, nil, io.Discard, "lv2", "receive", "v") }
	exits := func(code string) func(*websocket.Conn) {
		return func(conn *websocket.Conn) {
			_ = conn.WriteMessage(websocket.TextMessage, []byte(`{"exited": true, "result": {"exit_code": `+code+`}}`))
		}
	}

	ends = func(*websocket.Conn) {
		if begun == 2 {
			ends = exits("0")
		}
	}
	if err := n.unlessCut(t.Context(), receive); err != nil || begun != 3 {
		t.Errorf("cut off twice: %v, begun %d times", err, begun)
	}
	if want := "cradle-csi lv2 receive v on node node1: the connection is lost"; strings.Count(said.String(), want) != 2 {
		t.Errorf("told %q; want twice %q", said.String(), want)
	}
	begun, ends = 0, exits("3")
	if err := n.unlessCut(t.Context(), receive); err == nil || errors.Is(err, errCut) || begun != 1 {
		t.Errorf("what fails: %v, begun %d times", err, begun)
	}
}

// A plugin that is unhealthy for a moment is waited for, and Nomad does not forget a volume before it can be the plugin's.
func TestRegisterUnhealthy(t *testing.T) {
	var calls []string
	healthy := []int{0, 0, 1} // at each look
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		answer := any(map[string]string{})
		switch {
		case strings.HasPrefix(r.URL.Path, "/v1/plugin/"):
			if len(healthy) > 1 {
				healthy = healthy[1:]
			}
			answer = &api.CSIPlugin{ID: "p", ControllersHealthy: healthy[0]}
		case r.Method == http.MethodPut && len(calls) == 1:
			calls = append(calls, "refused")
			http.Error(w, "no healthy controllers for CSI plugin: p", http.StatusInternalServerError)
			return
		case r.Method == http.MethodGet && slices.Contains(calls, http.MethodDelete):
			http.NotFound(w, r)
			return
		case r.Method == http.MethodGet:
			answer = &api.CSIVolume{ID: "v", PluginID: "former"}
		default:
			calls = append(calls, r.Method)
		}
		if err := json.NewEncoder(w).Encode(answer); err != nil {
			t.Error(err)
		}
	}))
	defer srv.Close()
	n, said := nomadAt(t, srv)
	if err := n.register(t.Context(), &api.CSIVolume{ID: "v", PluginID: "former"}, &api.CSIVolume{ID: "v", PluginID: "p"}); err != nil {
		t.Fatal(err)
	}
	if want := []string{http.MethodDelete, "refused", http.MethodPut}; !slices.Equal(calls, want) {
		t.Errorf("%q, not %q", calls, want)
	}
	if strings.Count(said.String(), "not healthy just now") != 1 {
		t.Errorf("told %q", said.String())
	}
}

// A volume is in use on a node that is up. One that is down, or that Nomad does not know any more, is no reason not to restore it elsewhere.
func TestUnused(t *testing.T) {
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch status := path.Base(r.URL.Path); status {
		case "purged":
			http.Error(w, "node not found", http.StatusNotFound)
		case "unknown":
			http.Error(w, "no leader", http.StatusInternalServerError)
		default:
			if err := json.NewEncoder(w).Encode(&api.Node{ID: status, Name: status, Status: status}); err != nil {
				t.Error(err)
			}
		}
	}))
	defer srv.Close()
	n, _ := nomadAt(t, srv)
	if p, err := n.place(t.Context(), "purged", ""); p != nil || err != nil {
		t.Errorf("the plugin on a node that was purged: %v, %v", p, err)
	}
	for _, c := range []struct {
		node, alloc string
		unused      bool
	}{
		{"ready", "running", false},
		{"ready", "lost", false},
		{"ready", "complete", true},
		{"initializing", "running", false},
		{"down", "running", true},
		{"disconnected", "unknown", true},
		{"purged", "lost", true},
		{"purged", "running", true},
		{"unknown", "running", false},
	} {
		v := &api.CSIVolume{ID: "v", Allocations: []*api.AllocationListStub{{ID: "ended", NodeID: "ready", ClientStatus: "failed"}, {ID: "a", NodeID: c.node, ClientStatus: c.alloc}}}
		if err := n.unused(t.Context(), v); (err == nil) != c.unused {
			t.Errorf("%s on a node that is %s: %v", c.alloc, c.node, err)
		}
	}
}

// nomadAt asks a server, and says what it tells.
func nomadAt(t *testing.T, srv *httptest.Server) (n *nomad, said *strings.Builder) {
	t.Helper()
	client, err := api.NewClient(&api.Config{Address: srv.URL})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(client.Close)
	said = &strings.Builder{}
	return &nomad{c: &cli{stderr: said}, client: client}, said
}
