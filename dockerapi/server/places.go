package server

import (
	"context"
	"errors"
	"maps"
	"net/http"
	"slices"

	"github.com/hashicorp/nomad/api"
	"github.com/moby/moby/api/types/network"

	"github.com/cradlestack/cradlestack/dockerapi/translate"
	"github.com/cradlestack/cradlestack/internal/dockerhttp"
	"github.com/cradlestack/cradlestack/internal/nomadjob"
)

// isOn says whether a container has a place on a network, running or not.
func (r *record) isOn(n *netRecord) bool {
	e := r.Networks[n.Name]
	return e != nil && (e.NetworkID == n.ID || e.NetworkID == "" || n.index == 0)
}

// onNetworks says whether a container is on a network in which it has names.
func (r *record) onNetworks() bool {
	return slices.ContainsFunc(slices.Collect(maps.Keys(r.Networks)), translate.IsOwn)
}

// names are the container's on a network, the one for its address first.
func (r *record) names(networkName string) []string {
	names := append([]string{r.Name + "." + networkName, r.Name}, r.Networks[networkName].Aliases...)
	names = append(names, r.ID[:12], r.Config.Hostname)
	seen := map[string]bool{}
	return slices.DeleteFunc(names, func(name string) bool {
		twice := name == "" || seen[name]
		seen[name] = true
		return twice
	})
}

// places are the container's networks as its job has them; nil where its machine has no interface that others reach.
func (r *record) places() []nomadjob.Network {
	if !r.Bridged {
		return nil
	}
	out := []nomadjob.Network{}
	for _, name := range r.networks() {
		if translate.IsOwn(name) {
			out = append(out, nomadjob.Network{Service: nomadjob.NetworkService(r.Networks[name].NetworkID), Names: r.names(name)})
		}
	}
	return out
}

// tellNames lets a running container's networks be what its record says: the names that it has there, and those that it finds. Its job is updated in place.
func (t *tenant) tellNames(ctx context.Context, r *record) error {
	for {
		if !r.Bridged || !t.isRunning(r) {
			return nil
		}
		if err := t.putVariables(ctx, r); err != nil {
			return err
		}
		job, err := t.server.jobOf(r, t.Namespace, true)
		if err != nil {
			return err
		}
		if _, _, err := t.nomad.Jobs().Register(job, t.write(ctx)); err != nil {
			return err
		}
		now, err := t.get(ctx, r.ID)
		if isNotFound(err) {
			return nil
		}
		if err != nil {
			return err
		}
		if now.ended() || now.Want == wantRemoved || t.watch.state(now).phase == phaseEnded {
			return t.stopJob(ctx, now.jobID()) // it ended meanwhile: Nomad is not to run it again
		}
		if maps.EqualFunc(now.Networks, r.Networks, func(a, b *network.EndpointSettings) bool { return a.NetworkID == b.NetworkID }) && now.Name == r.Name {
			return nil
		}
		r = now
	}
}

// resolve finds the networks that a container is to be on. Those that are not there yet are looked for at its start, as docker does.
func (t *tenant) resolve(ctx context.Context, c *translate.Container) error {
	for ref, e := range maps.Clone(c.Networks) {
		n, err := t.network(ctx, ref)
		if isNotFound(err) {
			continue
		}
		if err != nil {
			return err
		}
		delete(c.Networks, ref)
		e.NetworkID = n.ID
		c.Networks[n.Name] = e
	}
	return nil
}

// enter finds a container's networks before it starts, and the node that they are on; "" where none is on one.
func (t *tenant) enter(ctx context.Context, r *record) (node string, err error) {
	networks := map[string]*network.EndpointSettings{} // the record's may be somebody else's to read
	for name, e := range r.Networks {
		networks[name] = e.Copy()
	}
	r.Networks, r.Bridged = networks, r.onNetworks()
	binding := ""
	for _, name := range r.networks() {
		if !translate.IsOwn(name) {
			continue
		}
		n, err := t.readNetwork(ctx, nomadjob.NetworkPath(name))
		if isNotFound(err) {
			return "", noNetwork(name)
		}
		if err != nil {
			return "", err
		}
		e := r.Networks[name]
		if e.NetworkID != "" && e.NetworkID != n.ID {
			return "", noNetwork(e.NetworkID)
		}
		e.NetworkID = n.ID
		at, err := t.nodeOf(ctx, n, r)
		if err != nil {
			return "", err
		}
		if at == "" {
			continue
		}
		if node != "" && node != at {
			return "", dockerhttp.Errorf(http.StatusConflict, "container %s can't be on networks %s and %s: they are on different nodes, whose bridges don't reach each other. Remove what is on one of them, and start it again with the other", r.Name, binding, name)
		}
		node, binding = at, name
	}
	if node != "" && r.Node != "" && r.Node != node {
		return "", dockerhttp.Errorf(http.StatusConflict, "container %s has its disk on another node than what is on network %s, and a node's bridge does not reach that of another one: remove the container and create it anew", r.Name, binding)
	}
	return node, nil
}

// nodeOf is the node that a network is bound to by others than r: by containers that run there, or have their disk there.
func (t *tenant) nodeOf(ctx context.Context, n *netRecord, r *record) (string, error) {
	if n.Node == "" {
		return "", nil
	}
	all, err := t.list(ctx)
	if err != nil {
		return "", err
	}
	for _, o := range all {
		if o.ID == r.ID || !o.isOn(n) || o.Want == wantRemoved {
			continue
		}
		s := t.watch.state(o)
		if o.Node == n.Node || !o.ended() && s.alloc != nil && s.alloc.NodeID == n.Node && s.phase != phaseEnded {
			if t.isDown(ctx, n.Node) {
				return "", nil // so its containers can go elsewhere, one after the other
			}
			return n.Node, nil
		}
	}
	others, err := t.othersOn(ctx, n) // docker has no record of them
	if err != nil {
		return "", err
	}
	if slices.ContainsFunc(others, func(s *api.ServiceRegistration) bool { return s.NodeID == n.Node }) && !t.isDown(ctx, n.Node) {
		return n.Node, nil
	}
	return "", nil
}

// errElsewhere is that a network's containers are on another node.
var errElsewhere = errors.New("the network's containers are on another node")

// settleOn binds a network to the node that a container is on. Where others have bound it to another one meanwhile, it is errElsewhere.
func (t *tenant) settleOn(ctx context.Context, name, id string, r *record, node string) error {
	for {
		n, err := t.readNetwork(ctx, nomadjob.NetworkPath(name))
		if err != nil {
			return err
		}
		if n.ID != id {
			return noNetwork(id)
		}
		if n.Node == node {
			return nil
		}
		other, err := t.nodeOf(ctx, n, r)
		if err != nil {
			return err
		}
		if other != "" {
			return errElsewhere
		}
		n.Node = node
		if err := t.putNetwork(ctx, n); !errors.Is(err, errConflict) {
			return err
		}
	}
}

// settleNetworks binds a container's networks to the node that it has come to.
func (t *tenant) settleNetworks(ctx context.Context, r *record, s podState) error {
	if s.alloc == nil || s.phase != phaseRunning {
		return nil
	}
	for _, name := range r.networks() {
		if !translate.IsOwn(name) {
			continue
		}
		if err := t.settleOn(ctx, name, r.Networks[name].NetworkID, r, s.alloc.NodeID); err != nil && !isNotFound(err) {
			return err
		}
	}
	return nil
}
