package server

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"net/netip"
	"slices"
	"strings"

	"github.com/hashicorp/nomad/api"
	"github.com/moby/moby/api/types/events"
	"github.com/moby/moby/api/types/network"

	"github.com/cradlestack/cradlestack/dockerapi/translate"
	"github.com/cradlestack/cradlestack/internal/dockerhttp"
	"github.com/cradlestack/cradlestack/internal/nomadjob"
)

// A netRecord is what is known of a network. Who is on it stands in the containers' records, and who has which name there is told by Nomad's services.
type netRecord struct {
	nomadjob.NetworkRecord

	index uint64 // of the variable; 0 of a network that is always there
}

// networkID makes the id of a network that is always there.
func networkID(namespace, name string) string {
	sum := sha256.Sum256([]byte("network\x00" + namespace + "\x00" + name))
	return hex.EncodeToString(sum[:])
}

// builtin are the networks that are always there.
func (t *tenant) builtin() []*netRecord {
	return []*netRecord{
		{NetworkRecord: nomadjob.NetworkRecord{ID: networkID(t.Namespace, translate.Bridge), Name: translate.Bridge, Driver: translate.Bridge}},
		{NetworkRecord: nomadjob.NetworkRecord{ID: networkID(t.Namespace, translate.None), Name: translate.None, Driver: "null"}},
	}
}

func noNetwork(ref string) error {
	return dockerhttp.Errorf(http.StatusNotFound, "network %s not found", ref)
}

func (t *tenant) readNetwork(ctx context.Context, path string) (*netRecord, error) {
	v, _, err := t.nomad.Variables().Read(path, t.query(ctx))
	if errors.Is(err, api.ErrVariablePathNotFound) {
		return nil, noNetwork(strings.TrimPrefix(path, nomadjob.NetworkPrefix))
	}
	if err != nil {
		return nil, err
	}
	n := &netRecord{index: v.ModifyIndex}
	n.NetworkRecord, err = nomadjob.ReadNetwork(v)
	return n, err
}

// putNetwork writes a network that nobody else has changed since it was read; errConflict where somebody has.
func (t *tenant) putNetwork(ctx context.Context, n *netRecord) error {
	v, err := n.Variable(n.index)
	if err != nil {
		return err
	}
	out, _, err := t.nomad.Variables().CheckedUpdate(v, t.write(ctx))
	if isConflict(err) {
		return errConflict
	}
	if err == nil {
		n.index = out.ModifyIndex
	}
	return err
}

// networks are all that there are, by name.
func (t *tenant) networks(ctx context.Context) ([]*netRecord, error) {
	paths, _, err := t.nomad.Variables().PrefixList(nomadjob.NetworkPrefix, t.query(ctx))
	if err != nil {
		return nil, err
	}
	all := t.builtin()
	for _, v := range paths {
		n, err := t.readNetwork(ctx, v.Path)
		if isNotFound(err) {
			continue
		}
		if err != nil {
			return nil, err
		}
		all = append(all, n)
	}
	slices.SortFunc(all, func(a, b *netRecord) int { return cmp.Compare(a.Name, b.Name) })
	return all, nil
}

// network finds what a client calls id, name, or the beginning of an id; in this order, as docker does.
func (t *tenant) network(ctx context.Context, ref string) (*netRecord, error) {
	for _, n := range t.builtin() {
		if n.Name == ref {
			return n, nil
		}
	}
	isHex := ref != "" && strings.Trim(ref, "0123456789abcdef") == ""
	var all []*netRecord
	if isHex {
		var err error
		if all, err = t.networks(ctx); err != nil {
			return nil, err
		}
		if i := slices.IndexFunc(all, func(n *netRecord) bool { return n.ID == ref }); i >= 0 {
			return all[i], nil
		}
	}
	if n, err := t.readNetwork(ctx, nomadjob.NetworkPath(ref)); !isNotFound(err) {
		return n, err
	}
	if !isHex {
		return nil, noNetwork(ref)
	}
	all = slices.DeleteFunc(all, func(n *netRecord) bool { return !strings.HasPrefix(n.ID, ref) })
	switch len(all) {
	case 0:
		return nil, noNetwork(ref)
	case 1:
		return all[0], nil
	}
	return nil, dockerhttp.Invalid("network %s is ambiguous (%d matches found based on ID prefix)", ref, len(all))
}

func (s *Server) networkRoutes(on *router) {
	one := func(pattern string, h func(http.ResponseWriter, *http.Request, *tenant, *netRecord) error) {
		on.on(pattern, naming((*tenant).network, h))
	}
	on.on("GET /networks", s.listNetworks)
	on.on("GET /networks/{$}", s.listNetworks)
	on.on("POST /networks/create", s.createNetwork)
	on.on("POST /networks/prune", s.pruneNetworks)
	one("GET /networks/{id}", s.inspectNetwork)
	one("DELETE /networks/{id}", s.removeNetwork)
	one("POST /networks/{id}/connect", s.connectNetwork)
	one("POST /networks/{id}/disconnect", s.disconnectNetwork)
}

func (n *netRecord) describe() network.Network {
	return network.Network{
		Name: n.Name, ID: n.ID, Created: n.Created, Scope: "local", Driver: n.Driver, EnableIPv4: n.Name != translate.None, Attachable: n.Attachable,
		IPAM: network.IPAM{Driver: "default", Config: []network.IPAMConfig{}}, Options: union(n.Options), Labels: union(n.Labels),
	}
}

func (s *Server) listNetworks(w http.ResponseWriter, r *http.Request, t *tenant) error {
	f, err := dockerhttp.ParseFilters(r, "dangling", "driver", "id", "label", "name", "scope", "type")
	if err != nil {
		return err
	}
	for _, kind := range f["type"] {
		if kind != "builtin" && kind != "custom" {
			return dockerhttp.Invalid("invalid filter 'type=%s'", kind)
		}
	}
	ctx := r.Context()
	all, err := t.networks(ctx)
	if err != nil {
		return err
	}
	var containers []*record
	if len(f["dangling"]) > 0 {
		if containers, err = t.list(ctx); err != nil {
			return err
		}
	}
	out := []network.Summary{}
	for _, n := range all {
		used := slices.ContainsFunc(containers, func(r *record) bool { return r.isOn(n) })
		if len(f["dangling"]) > 0 && !used {
			others, err := t.othersOn(ctx, n)
			if err != nil {
				return err
			}
			used = len(others) > 0
		}
		if f.Any("driver", func(v string) bool { return v == n.Driver }) && f.Any("id", func(v string) bool { return strings.HasPrefix(n.ID, v) }) &&
			f.Labels("label", n.Labels, false) && f.Any("name", func(v string) bool { return dockerhttp.Matches(v, n.Name) }) &&
			f.Any("scope", func(v string) bool { return v == "local" }) && f.Any("type", func(v string) bool { return (v == "builtin") == (n.index == 0) }) &&
			f.Any("dangling", func(v string) bool { return (v == "true" || v == "1") == (!used && n.index > 0) }) {
			out = append(out, network.Summary{Network: n.describe()})
		}
	}
	return dockerhttp.Answer(w, http.StatusOK, out)
}

func (s *Server) createNetwork(w http.ResponseWriter, r *http.Request, t *tenant) error {
	var request network.CreateRequest
	if err := dockerhttp.Decode(w, r, &request); err != nil {
		return err
	}
	if err := translate.Network(&request); err != nil {
		return err
	}
	n := &netRecord{NetworkRecord: nomadjob.NewNetworkRecord(request.Name, newID())}
	n.Attachable, n.Options, n.Labels = request.Attachable, request.Options, request.Labels
	err := t.putNetwork(r.Context(), n)
	if errors.Is(err, errConflict) {
		return dockerhttp.Errorf(http.StatusConflict, "network with name %s already exists", n.Name)
	}
	if err != nil {
		return err
	}
	t.emit(n.event(events.ActionCreate, nil))
	return dockerhttp.Answer(w, http.StatusCreated, network.CreateResponse{ID: n.ID})
}

// running are the containers on a network that run, or are about to.
func (t *tenant) runningOn(ctx context.Context, n *netRecord) ([]*record, error) {
	all, err := t.list(ctx)
	if err != nil {
		return nil, err
	}
	return slices.DeleteFunc(all, func(r *record) bool { return !r.isOn(n) || !t.isRunning(r) }), nil
}

// othersOn are the places on a network of pods that docker has not made.
func (t *tenant) othersOn(ctx context.Context, n *netRecord) ([]*api.ServiceRegistration, error) {
	if n.index == 0 {
		return nil, nil
	}
	all, _, err := t.nomad.Services().Get(nomadjob.NetworkService(n.ID), t.query(ctx))
	if err != nil {
		return nil, err
	}
	return slices.DeleteFunc(all, func(s *api.ServiceRegistration) bool { return strings.HasPrefix(s.JobID, jobPrefix) }), nil
}

func (s *Server) inspectNetwork(w http.ResponseWriter, r *http.Request, t *tenant, n *netRecord) error {
	if scope := dockerhttp.Parameter(r, "scope"); scope != "" && scope != "local" {
		return noNetwork(r.PathValue("id"))
	}
	on, err := t.runningOn(r.Context(), n)
	if err != nil {
		return err
	}
	out := network.Inspect{Network: n.describe(), Containers: map[string]network.EndpointResource{}}
	for _, c := range t.askAll(r.Context(), on, true) {
		e := t.endpoints(c)[n.Name]
		out.Containers[c.ID] = network.EndpointResource{
			Name: c.Name, EndpointID: e.EndpointID, MacAddress: e.MacAddress,
			IPv4Address: netip.PrefixFrom(e.IPAddress, e.IPPrefixLen), IPv6Address: netip.PrefixFrom(e.GlobalIPv6Address, e.GlobalIPv6PrefixLen),
		}
	}
	places, err := t.othersOn(r.Context(), n)
	if err != nil {
		return err
	}
	var others []*other
	if len(places) > 0 {
		if others, err = t.others(r.Context()); err != nil {
			return err
		}
	}
	for _, o := range others {
		i := slices.IndexFunc(places, func(s *api.ServiceRegistration) bool { return s.AllocID == o.alloc.ID })
		if i < 0 || o.inside != o.task {
			continue
		}
		e := network.EndpointResource{Name: o.Name, EndpointID: o.ID}
		if address, err := netip.ParseAddr(places[i].Address); err == nil {
			e.IPv4Address = netip.PrefixFrom(address, address.BitLen())
		}
		out.Containers[o.ID] = e
	}
	return dockerhttp.Answer(w, http.StatusOK, out)
}

func (s *Server) removeNetwork(w http.ResponseWriter, r *http.Request, t *tenant, n *netRecord) error {
	ctx := r.Context()
	if n.index == 0 {
		return dockerhttp.Errorf(http.StatusForbidden, "%s is a pre-defined network and cannot be removed", n.Name)
	}
	on, err := t.runningOn(ctx, n)
	if err != nil {
		return err
	}
	others, err := t.othersOn(ctx, n)
	if err != nil {
		return err
	}
	if len(on)+len(others) > 0 {
		var names []string
		for _, c := range on {
			names = append(names, fmt.Sprintf("name:%q id:%q", c.Name, c.ID[:12]))
		}
		for _, o := range others {
			names = append(names, fmt.Sprintf("job:%q", o.JobID))
		}
		return dockerhttp.Errorf(http.StatusForbidden, "error while removing network: network %s has active endpoints (%s)", n.Name, strings.Join(names, ", "))
	}
	if err := t.dropNetwork(ctx, n); err != nil {
		return err
	}
	w.WriteHeader(http.StatusNoContent)
	return nil
}

// dropNetwork removes a network, if it is still the one that was looked at.
func (t *tenant) dropNetwork(ctx context.Context, n *netRecord) error {
	for {
		_, err := t.nomad.Variables().CheckedDelete(nomadjob.NetworkPath(n.Name), n.index, t.write(ctx))
		if err == nil {
			t.emit(n.event(events.ActionDestroy, nil))
		}
		if !isConflict(err) {
			return err
		}
		now, err := t.readNetwork(ctx, nomadjob.NetworkPath(n.Name))
		if isNotFound(err) || err == nil && now.ID != n.ID {
			return nil
		}
		if err != nil {
			return err
		}
		n = now
	}
}

func (s *Server) pruneNetworks(w http.ResponseWriter, r *http.Request, t *tenant) error {
	f, err := dockerhttp.ParseFilters(r, "label", "label!", "until")
	if err != nil {
		return err
	}
	until, err := pruneUntil(f["until"])
	if err != nil {
		return err
	}
	ctx := r.Context()
	if err := t.watch.ready(ctx); err != nil {
		return err
	}
	all, err := t.networks(ctx)
	if err != nil {
		return err
	}
	report := network.PruneReport{NetworksDeleted: []string{}}
	for _, n := range all {
		if n.index == 0 || !f.Labels("label", n.Labels, false) || !f.Labels("label!", n.Labels, true) || !until.IsZero() && !n.Created.Before(until) {
			continue
		}
		on, err := t.runningOn(ctx, n)
		if err != nil {
			return err
		}
		others, err := t.othersOn(ctx, n)
		if err != nil {
			return err
		}
		if len(on)+len(others) > 0 {
			continue
		}
		if err := t.dropNetwork(ctx, n); err != nil {
			return err
		}
		report.NetworksDeleted = append(report.NetworksDeleted, n.Name)
	}
	t.emitPrune(events.NetworkEventType, 0)
	return dockerhttp.Answer(w, http.StatusOK, report)
}

func (s *Server) connectNetwork(w http.ResponseWriter, r *http.Request, t *tenant, n *netRecord) error {
	var request network.ConnectRequest
	if err := dockerhttp.Decode(w, r, &request); err != nil {
		return err
	}
	if err := translate.Endpoint(n.Name, request.EndpointConfig); err != nil {
		return err
	}
	e := request.EndpointConfig
	if e != nil && len(e.Links) > 0 {
		return dockerhttp.Errorf(http.StatusNotImplemented, "--link is given when the container is made (docker run, docker create): use --alias for a name that all of the network's containers find")
	}
	if e == nil {
		e = &network.EndpointSettings{}
	}
	if len(e.MacAddress) > 0 {
		return dockerhttp.Invalid("the container has one interface for all of its networks, which is there already: docker create and run take --mac-address")
	}
	e.NetworkID = n.ID
	return t.rewire(w, r, request.Container, n, events.ActionConnect, func(c *record) error {
		if err := refuseJoined(c); err != nil {
			return err
		}
		switch {
		case c.Networks[n.Name] != nil:
			return dockerhttp.Errorf(http.StatusForbidden, "endpoint with name %s already exists in network %s", c.Name, n.Name)
		case n.Name == translate.None || c.Networks[translate.None] != nil:
			return dockerhttp.Errorf(http.StatusForbidden, "container cannot be connected to multiple networks with one of the networks in private (none) mode")
		case t.isRunning(c) && !c.Bridged:
			return dockerhttp.Errorf(http.StatusConflict, "container %s runs without an interface that other containers reach, and a machine that runs gets no other one: stop it first, or create it with --network", c.Name)
		}
		if t.isRunning(c) && n.index > 0 {
			if at := t.watch.state(c).alloc; at != nil {
				err := t.settleOn(r.Context(), n.Name, n.ID, c, at.NodeID)
				if errors.Is(err, errElsewhere) {
					return dockerhttp.Errorf(http.StatusConflict, "container %s can't be on network %s: what is on it is on another node, and a node's bridge does not reach that of another one", c.Name, n.Name)
				}
				if err != nil {
					return err
				}
			}
		}
		c.Networks[n.Name] = e
		return nil
	})
}

func (s *Server) disconnectNetwork(w http.ResponseWriter, r *http.Request, t *tenant, n *netRecord) error {
	var request network.DisconnectRequest
	if err := dockerhttp.Decode(w, r, &request); err != nil {
		return err
	}
	return t.rewire(w, r, request.Container, n, events.ActionDisconnect, func(c *record) error {
		switch {
		case c.Networks[n.Name] == nil:
			return dockerhttp.Errorf(http.StatusForbidden, "container %s is not connected to network %s", c.ID, n.Name)
		case t.isRunning(c) && !translate.IsOwn(n.Name):
			return dockerhttp.Errorf(http.StatusConflict, "container %s runs on network %s, and a machine that runs keeps its interface: stop it first", c.Name, n.Name)
		}
		delete(c.Networks, n.Name)
		return nil
	})
}

// rewire changes a container's place on a network.
func (t *tenant) rewire(w http.ResponseWriter, r *http.Request, ref string, n *netRecord, action events.Action, change func(*record) error) error {
	ctx := r.Context()
	c, err := t.find(ctx, ref)
	if err != nil {
		return err
	}
	c, err = t.change(ctx, c.ID, func(now *record) (bool, error) {
		if now.Want == wantRemoved {
			return false, dockerhttp.Errorf(http.StatusConflict, "container %s is marked for removal and cannot be connected or disconnected to the network", now.ID)
		}
		now.Networks = maps.Clone(now.Networks)
		if now.Networks == nil {
			now.Networks = map[string]*network.EndpointSettings{}
		}
		return true, change(now)
	})
	if err != nil {
		return err
	}
	if err := t.tellNames(context.WithoutCancel(ctx), c); err != nil {
		return err
	}
	if t.isRunning(c) {
		t.emit(n.event(action, map[string]string{"container": c.ID}))
	}
	w.WriteHeader(http.StatusOK)
	return nil
}
