package server

import (
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/nomad/api"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/network"

	"github.com/cradlestack/cradlestack/dockerapi/translate"
	"github.com/cradlestack/cradlestack/spec"
)

// A container has each of its names on a network once, with the one for its address first, and is on those of its record.
func TestNetworkNames(t *testing.T) {
	r := &record{
		ID: strings.Repeat("a1", 32), Name: "shop-db-1", Config: &container.Config{Hostname: "db"}, Bridged: true,
		Networks: map[string]*network.EndpointSettings{"back": {Aliases: []string{"db", "shop-db-1", "database"}, NetworkID: strings.Repeat("b2", 32)}, "bridge": {}},
	}
	if got, want := r.names("back"), []string{"shop-db-1.back", "shop-db-1", "db", "database", "a1a1a1a1a1a1"}; !slices.Equal(got, want) {
		t.Errorf("names are %q, want %q", got, want)
	}
	if got := r.places(); len(got) != 1 || got[0].Service != "net-"+strings.Repeat("b2", 16) {
		t.Errorf("the job is on %+v", got)
	}
	if r.Bridged = false; r.places() != nil {
		t.Error("a machine without an interface in the bridge has names")
	}
}

// A taken port is recognised by whoever tells of it, and the next one of its range comes after it.
func TestTakenPort(t *testing.T) {
	r := &record{
		Run: 1, Ranges: map[int]translate.PortRange{1: {First: 8000, Last: 8001}},
		Pod: &spec.Pod{Network: spec.Network{Publish: []spec.Publish{{HostPort: 53, Port: 53}, {HostPort: 8000, Port: 80}}}},
	}
	given := func(ip string) *api.AllocationListStub {
		a := &api.AllocationListStub{AllocatedResources: &api.AllocatedResources{}}
		a.AllocatedResources.Shared.Ports = []api.PortMapping{{Label: "port1", Value: 8000, To: 80, HostIP: ip}}
		return a
	}
	failed := &api.TaskState{FinishedAt: time.Now(), Events: []*api.TaskEvent{{
		Type: api.TaskDriverFailure, Details: map[string]string{"driver_error": "publish ports: qmp netdev_add: Could not set up host forwarding rule 'tcp:0.0.0.0:8000-:80'"},
	}}}
	for name, x := range map[string]struct {
		s    podState
		want int
	}{
		"Nomad":              {podState{noPlace: "1 of the nodes: not enough network: reserved port collision port1=8000"}, 1},
		"its second address": {podState{phase: phasePending, alloc: given("2001:db8::1")}, 1},
		"QEMU":               {podState{phase: phaseEnded, alloc: given("192.0.2.1"), task: failed}, 1},
		"nobody":             {podState{phase: phaseRunning, alloc: given("192.0.2.1")}, -1},
		"not yet":            {podState{}, -1},
	} {
		if got := r.taken(x.s); got != x.want {
			t.Errorf("%s: %d, want %d", name, got, x.want)
		}
	}
	before := r.Pod
	if err := r.nextPort(1); err != nil || r.Pod.Network.Publish[1].HostPort != 8001 || before.Network.Publish[1].HostPort != 8000 {
		t.Errorf("the next port is %d, %v; what was there before is %+v", r.Pod.Network.Publish[1].HostPort, err, before.Network.Publish)
	}
	if err := r.nextPort(1); err == nil || !strings.Contains(err.Error(), "all ports of 8000-8001 are taken") {
		t.Errorf("after the last one: %v", err)
	}
}
