package rpc

import (
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cradlestack/cradlestack/spec"
)

const target = "/alloc/volume"

// A pod serves the DirectControl API as who runs pods does.
type pod struct {
	mu     sync.Mutex
	calls  []string
	refuse map[string]int // path → status
}

func (p *pod) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	p.mu.Lock()
	defer p.mu.Unlock()
	var body any
	if r.ContentLength > 0 {
		if err := json.NewDecoder(r.Body).Decode(&body); err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
	}
	text, _ := json.Marshal(body)
	p.calls = append(p.calls, r.Method+" "+r.URL.Path+" "+string(text))
	switch code := p.refuse[r.URL.Path]; {
	case code != 0:
		w.WriteHeader(code)
		_ = json.NewEncoder(w).Encode(spec.DirectError{Message: "not now"})
	case r.URL.Path == spec.DirectStatsPath:
		_ = json.NewEncoder(w).Encode(spec.VolumeStats{Total: 100, Used: 30, Available: 70})
	default:
		w.WriteHeader(http.StatusNoContent)
	}
}

func (p *pod) said() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Clone(p.calls)
}

// startPod serves the control socket of target in the server's folder.
func startPod(t *testing.T, s *Server) *pod {
	t.Helper()
	p := &pod{refuse: map[string]int{}}
	l, err := net.Listen("unix", filepath.Join(s.config.DirectDir, spec.DirectSocket(target)))
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{Handler: p}
	done := make(chan error)
	go func() { done <- server.Serve(l) }()
	t.Cleanup(func() {
		server.Close()
		if err := <-done; !errors.Is(err, http.ErrServerClosed) {
			t.Error(err)
		}
	})
	return p
}

func testServer(t *testing.T) *Server {
	return &Server{config: Config{DirectDir: t.TempDir(), Log: slog.New(slog.DiscardHandler)}}
}

// Of a volume that is taken from a guest nothing is left, its key least of all.
func TestForget(t *testing.T) {
	s := testServer(t)
	record, secret := spec.DirectFile(target), spec.DirectSecret(target)
	for _, name := range []string{record, "." + record, secret, "." + secret, spec.DirectSocket(target)} {
		if err := os.WriteFile(filepath.Join(s.config.DirectDir, name), []byte("x"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for range 2 {
		if err := s.forget(target); err != nil {
			t.Fatal(err)
		}
	}
	entries, err := os.ReadDir(s.config.DirectDir)
	if err != nil || len(entries) > 0 {
		t.Errorf("left: %v, %v", entries, err)
	}
}

func TestGuest(t *testing.T) {
	s := testServer(t)
	if _, err := s.guestStats(t.Context(), target); !errors.Is(err, errNoGuest) {
		t.Errorf("stats without a pod: %v", err)
	}
	if err := s.guestResize(t.Context(), target, 1); err != nil {
		t.Errorf("resize without a pod, which finds out when it starts: %v", err)
	}
	p := startPod(t, s)
	if stats, err := s.guestStats(t.Context(), target); err != nil || stats.Used != 30 {
		t.Errorf("stats: %+v, %v", stats, err)
	}
	if err := s.guestResize(t.Context(), target, 4<<20); err != nil {
		t.Error(err)
	}
	if want := `POST /resize {"size":"4MiB"}`; !slices.Contains(p.said(), want) {
		t.Errorf("the pod heard %v; want %s", p.said(), want)
	}
	p.refuse[spec.DirectStatsPath] = http.StatusNotFound
	if _, err := s.guestStats(t.Context(), target); !errors.Is(err, errNoGuest) {
		t.Errorf("stats of a raw volume: %v", err)
	}
	p.refuse[spec.DirectResizePath] = http.StatusInternalServerError
	if err := s.guestResize(t.Context(), target, 1); err == nil || !strings.Contains(err.Error(), "not now") {
		t.Errorf("a resize that fails: %v", err)
	}
}

func TestFreeze(t *testing.T) {
	s := testServer(t)
	p := startPod(t, s)
	frozen := func() *freeze {
		f := &freeze{server: s, target: target}
		if err := f.call(t.Context()); err != nil {
			t.Fatal(err)
		}
		return f
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	f := frozen()
	f.extend(ctx)
	f.asked = f.asked.Add(time.Hour) // however long this machine takes
	if err := f.thaw(); err != nil {
		t.Errorf("thaw: %v", err)
	}
	if want := []string{`POST /freeze {"timeout":"10s"}`, "POST /thaw null"}; !slices.Equal(p.said(), want) {
		t.Errorf("the pod heard %v; want %v", p.said(), want)
	}

	// Whatever a call answers: a guest that was not told in time has thawed in between.
	f = frozen()
	f.asked = f.asked.Add(-2 * freezeTime)
	if err := f.call(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := f.thaw(); err == nil || !strings.Contains(err.Error(), "did not hold still") {
		t.Errorf("frozen again after it had thawed: %v", err)
	}
	f = frozen()
	f.asked = f.asked.Add(-2 * freezeTime)
	if err := f.thaw(); err == nil || !strings.Contains(err.Error(), "did not hold still") {
		t.Errorf("thawed too late: %v", err)
	}
	f = frozen()
	p.refuse[spec.DirectThawPath] = http.StatusConflict
	if err := f.thaw(); err == nil || !strings.Contains(err.Error(), "not now") {
		t.Errorf("thawed by itself: %v", err)
	}
	p.refuse[spec.DirectFreezePath] = http.StatusNotFound
	if err := f.call(t.Context()); !errors.Is(err, errNoGuest) {
		t.Errorf("freeze a raw volume: %v", err)
	}
}
