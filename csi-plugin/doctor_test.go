package main

import (
	"bytes"
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"

	"github.com/hashicorp/nomad/api"
)

// A claim is ended where no allocation on its node lives; a lost node's may still run.
func TestDoctorClaims(t *testing.T) {
	alloc := func(id, node, status string) *api.AllocationListStub {
		return &api.AllocationListStub{ID: id, NodeID: node, ClientStatus: status}
	}
	allocs := []*api.AllocationListStub{
		alloc("ended", "node1", "complete"),
		alloc("runs", "node2", "running"), alloc("ended-beside", "node2", "failed"),
		alloc("lost", "node3", "lost"),
	}
	answers := map[string]any{
		"/v1/volumes":                []*api.CSIVolumeListStub{{ID: "data", Namespace: "prod", PluginID: "claims"}, {ID: "other", PluginID: "other"}},
		"/v1/volume/csi/data":        &api.CSIVolume{ID: "data", Namespace: "prod", Allocations: allocs},
		"/v1/allocations":            []*api.AllocationListStub{},
		"/v1/volume/csi/data/detach": map[string]string{},
		"/v1/acl/token/self":         &api.ACLToken{Type: "client"}, // it is shown no allocations but those of the volume
	}
	var detached []string
	nomad := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodDelete {
			detached = append(detached, r.URL.Query().Get("node")+" in "+r.URL.Query().Get("namespace"))
		}
		answer, ok := answers[r.URL.Path]
		if !ok {
			t.Errorf("%s %s", r.Method, r.URL)
		}
		if err := json.NewEncoder(w).Encode(answer); err != nil {
			t.Error(err)
		}
	}))
	defer nomad.Close()

	for _, look := range []bool{true, false} {
		var out bytes.Buffer
		d := &doctor{c: &cli{stdout: &out}, look: look}
		if err := d.nomad(t.Context(), nomad.URL, "claims"); err != nil {
			t.Fatal(err)
		}
		verb := "repaired"
		if look {
			verb = "found"
		}
		if want := verb + ": volume data: claimed by allocation ended, which has ended\n"; out.String() != want {
			t.Errorf("said %q; want %q", out.String(), want)
		}
		if look && len(detached) > 0 {
			t.Errorf("only looking, it detached %v", detached)
		}
	}
	if want := []string{"node1 in prod"}; !slices.Equal(detached, want) {
		t.Errorf("detached %v; want %v", detached, want)
	}
	nomad.Close()
	if err := (&doctor{c: &cli{}}).nomad(t.Context(), nomad.URL, "claims"); err == nil || !strings.Contains(err.Error(), "nomad at "+nomad.URL) {
		t.Errorf("a nomad that is not there: %v", err)
	}
}

// A plugin's id that Nomad does not know is a mistake, or "nothing to repair" would be said of what was not looked at.
func TestDoctorPlugin(t *testing.T) {
	nomad := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var answer any = []string{}
		switch r.URL.Path {
		case "/v1/plugin/csi/cradle-node1":
			answer = &api.CSIPlugin{ID: "cradle-node1"}
		case "/v1/plugin/csi/cradle-gone":
			http.NotFound(w, r)
			return
		case "/v1/acl/token/self":
			answer = &api.ACLToken{Type: "management"}
		case "/v1/volumes", "/v1/allocations":
		default:
			t.Errorf("%s %s", r.Method, r.URL)
		}
		if err := json.NewEncoder(w).Encode(answer); err != nil {
			t.Error(err)
		}
	}))
	defer nomad.Close()
	if err := (&doctor{c: &cli{}}).nomad(t.Context(), nomad.URL, "cradle-node1"); err != nil {
		t.Error(err)
	}
	if err := (&doctor{c: &cli{}}).nomad(t.Context(), nomad.URL, "cradle-gone"); err == nil || !strings.Contains(err.Error(), "--plugin cradle-gone: there is none of that id") {
		t.Error(err)
	}
}
