package jsonhttp

import (
	"errors"
	"io"
	"io/fs"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"testing"
)

func TestCall(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "s")
	var n int
	if err := Call(t.Context(), socket, http.MethodGet, "/", nil, &n); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("without a server: %v", err)
	}
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/no" {
			w.WriteHeader(http.StatusConflict)
		}
		_, _ = io.Copy(w, r.Body) // the client has gone
	})}
	done := make(chan error)
	go func() { done <- server.Serve(l) }()
	t.Cleanup(func() {
		server.Close()
		<-done
	})
	if err := Call(t.Context(), socket, http.MethodPost, "/", 7, &n); err != nil || n != 7 {
		t.Errorf("7 comes back as %d, %v", n, err)
	}
	if err := Call(t.Context(), socket, http.MethodPost, "/", "text", &n); err == nil {
		t.Error("a text is a number")
	}
	if err := Call(t.Context(), socket, http.MethodPost, "/", strings.Repeat("x", maxAnswer), nil); err == nil || !strings.Contains(err.Error(), "more than 64 MiB") {
		t.Errorf("what is too long is cut: %v", err)
	}
	var refusal *Refusal
	if err := Call(t.Context(), socket, http.MethodPost, "/no", "why", nil); !errors.As(err, &refusal) || refusal.Code != http.StatusConflict || string(refusal.Body) != `"why"` {
		t.Errorf("a refusal is %v", err)
	}
}
