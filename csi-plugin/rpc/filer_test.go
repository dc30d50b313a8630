package rpc

import (
	"context"
	"encoding/json"
	"errors"
	"net"
	"net/http"
	"net/netip"
	"path/filepath"
	"slices"
	"testing"

	"github.com/cradlestack/cradlestack/csi-plugin/filer/api"
	"github.com/cradlestack/cradlestack/csi-plugin/volume"
)

// A guest is told what the filer says, and the filer who the guest may be.
func TestServe(t *testing.T) {
	s := testServer(t)
	v := volume.Volume{ID: "v", Parameters: volume.Parameters{Class: volume.NFS, Direct: true}}
	if _, err := s.serve(t.Context(), v, target, wish{}); !errors.Is(err, volume.ErrUnavailable) {
		t.Errorf("without a filer: %v", err)
	}
	socket := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	var asked api.Publication
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if err := json.NewDecoder(r.Body).Decode(&asked); err != nil || r.Method+r.URL.Path != "PUT/publications/"+publication(target) {
			t.Errorf("%s %s: %v", r.Method, r.URL, err)
		}
		p := asked
		p.Address, p.Export, p.Options = "192.0.2.1:2049", "/v/secret", "vers=3"
		_ = json.NewEncoder(w).Encode(p)
	})}
	done := make(chan error)
	go func() { done <- server.Serve(l) }()
	t.Cleanup(func() {
		server.Close()
		<-done
	})
	network := netip.MustParsePrefix("10.9.0.0/16")
	s.config.Filer, s.config.Networks = &api.Client{Socket: socket}, []netip.Prefix{network}
	got, err := s.serve(t.Context(), v, target, wish{readOnly: true, flags: []string{"ro", "noatime", "discard"}})
	if err != nil {
		t.Fatal(err)
	}
	if n := got.NFS; got.Name != "v" || got.Class != volume.NFS || n == nil || n.Address != "192.0.2.1:2049" || n.Export != "/v/secret" || n.Options != "vers=3,ro,noatime" || !n.ReadOnly {
		t.Errorf("the guest gets %+v, %+v", got, got.NFS)
	}
	if asked.Volume != "v" || !asked.ReadOnly || !slices.Contains(asked.Clients, network) {
		t.Errorf("the filer is asked for %+v", asked)
	}
	for _, c := range asked.Clients {
		if c.Bits() == 0 || c.Addr().IsLoopback() {
			t.Errorf("%v may have the volume", c)
		}
	}
}

// away is a backend whose filer does not answer, on a host that has the volume "here" staged.
type away struct{ volume.Backend }

func (away) Get(context.Context, string) (volume.Volume, error) {
	return volume.Volume{}, volume.ErrUnavailable
}

func (away) Staged(id string) (bool, error) { return id == "here", nil }

// What a host has mounted itself is unpublished without the filer; what a guest may have is not, which would leave it what it may.
func TestUnserveWithoutFiler(t *testing.T) {
	s := New(Config{Backend: away{}, DirectDir: t.TempDir()})
	if err := s.unserve(t.Context(), "here", target); err != nil {
		t.Errorf("staged on this host: %v", err)
	}
	if err := s.unserve(t.Context(), "guests", target); !errors.Is(err, volume.ErrUnavailable) {
		t.Errorf("a guest's: %v", err)
	}
}
