package main

import (
	"context"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"testing"

	"github.com/cradlestack/cradlestack/csi-plugin/filer/api"
)

// Connections of those who do not show the set's key keep nobody out who does.
func TestPeersCrowd(t *testing.T) {
	key := filepath.Join(t.TempDir(), "key")
	if err := os.WriteFile(key, make([]byte, 32), 0o600); err != nil {
		t.Fatal(err)
	}
	p := &peers{file: key}
	l, err := p.listen("127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, end := context.WithCancel(t.Context())
	served := make(chan error)
	go func() {
		served <- p.serve(ctx, l, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { answerJSON(w, api.Status{Version: "x"}, nil) }))
	}()
	defer func() {
		end()
		if err := <-served; err != nil {
			t.Error(err)
		}
	}()
	for range 3 * maxPeers {
		silent, err := net.Dial("tcp", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer silent.Close()
	}
	if s, err := (api.Client{Address: l.Addr().String(), KeyFile: key}).Status(t.Context()); err != nil || s.Version != "x" {
		t.Errorf("who has the key is answered %+v, %v", s, err)
	}
}
