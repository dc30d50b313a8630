package main

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/hashicorp/nomad/api"

	"github.com/cradlestack/cradlestack/csi-plugin/rpc"
	"github.com/cradlestack/cradlestack/csi-plugin/volume"
)

// A nomad is Nomad for a command that works on volumes of several nodes.
type nomad struct {
	c         *cli
	client    *api.Client
	namespace string // of the volumes
	unwell    bool   // a plugin that was looked for is there, and not healthy
	waits     bool   // that was told
}

// patience is how long a plugin may be unhealthy. Nomad asks each for a word now and then, and one on a busy node misses that.
const patience = 2 * time.Minute

// wait waits for a plugin to be healthy again, until end; false is that nothing is to be waited for.
func (n *nomad) wait(ctx context.Context, end time.Time, unwell bool) (bool, error) {
	if !unwell || time.Now().After(end) {
		return false, nil
	}
	if !n.waits {
		fmt.Fprintln(n.c.stderr, "a plugin is not healthy just now; it goes on once Nomad says that it is")
		n.waits = true
	}
	select {
	case <-ctx.Done():
		return false, context.Cause(ctx)
	case <-time.After(time.Second):
		return true, nil
	}
}

func openNomad(c *cli, namespace string) (*nomad, error) {
	client, err := api.NewClient(api.DefaultConfig())
	return &nomad{c: c, client: client, namespace: namespace}, err
}

func query(ctx context.Context, namespace string) *api.QueryOptions {
	return (&api.QueryOptions{Namespace: namespace}).WithContext(ctx)
}

func (n *nomad) write(ctx context.Context) *api.WriteOptions {
	return (&api.WriteOptions{Namespace: n.namespace}).WithContext(ctx)
}

// A place is a node with the plugin on it.
type place struct {
	node   *api.Node
	plugin string          // its id
	alloc  *api.Allocation // the plugin's
	task   *api.Task
}

// zone is the one that the plugin says it is in.
func (p *place) zone() string {
	return p.node.CSINodePlugins[p.plugin].NodeInfo.AccessibleTopology.Segments[rpc.TopologyZone]
}

// has is how Nomad is to know a volume that is there.
func (p *place) has(v *api.CSIVolume) *api.CSIVolume { return p.knows(v, true) }

// knows is has for a volume that is on the node alone, where that is local, or wherever the plugin is in its zone.
func (p *place) knows(v *api.CSIVolume, local bool) *api.CSIVolume {
	segments := maps.Clone(p.node.CSINodePlugins[p.plugin].NodeInfo.AccessibleTopology.Segments)
	if !local {
		delete(segments, rpc.TopologyHost)
	}
	var where []*api.CSITopology
	if len(segments) > 0 {
		where = []*api.CSITopology{{Segments: segments}}
	}
	return &api.CSIVolume{
		ID: v.ID, Name: v.Name, ExternalID: v.ExternalID, Namespace: v.Namespace, MountOptions: v.MountOptions, Parameters: v.Parameters, Context: v.Context,
		Capacity: v.Capacity, RequestedCapacityMin: v.RequestedCapacityMin, RequestedCapacityMax: v.RequestedCapacityMax, RequestedCapabilities: v.RequestedCapabilities,
		PluginID: p.plugin, Topologies: where,
	}
}

// find looks for a place, also after plugins that were not healthy.
func (n *nomad) find(ctx context.Context, look func() (*place, error)) (*place, error) {
	for end := time.Now().Add(patience); ; {
		n.unwell = false
		p, err := look()
		if p != nil || err == nil {
			return p, err
		}
		if again, werr := n.wait(ctx, end, n.unwell); !again {
			return nil, errors.Join(err, werr)
		}
	}
}

// placeAt looks for the node of a name, or any in a zone, with a plugin of an id, or any.
func (n *nomad) placeAt(ctx context.Context, name, zone, plugin string) (*place, error) {
	return n.find(ctx, func() (*place, error) { return n.lookAt(ctx, name, zone, plugin) })
}

func (n *nomad) lookAt(ctx context.Context, name, zone, plugin string) (*place, error) {
	all, _, err := n.client.Nodes().List(query(ctx, ""))
	if err != nil {
		return nil, err
	}
	known := false
	for _, stub := range all {
		if name != "" && stub.Name != name && stub.ID != name {
			continue
		}
		known = true
		if stub.Status != api.NodeStatusReady {
			continue
		}
		p, err := n.place(ctx, stub.ID, plugin)
		if err != nil {
			return nil, err
		}
		if p != nil && (zone == "" || p.zone() == zone) {
			return p, nil
		}
	}
	const list = "there is no healthy plugin that is " + rpc.Name + ", controller and node; \"nomad plugin status\" lists them"
	switch {
	case !known:
		return nil, fmt.Errorf("--to %s: Nomad has no such node; \"nomad node status\" lists them", name)
	case zone != "":
		return nil, fmt.Errorf("--zone %s: in it "+list, zone)
	case plugin != "":
		return nil, fmt.Errorf("--plugin %s: "+list, plugin)
	}
	return nil, fmt.Errorf("--to %s: on it "+list, name)
}

// placeOf looks for the node that has a volume.
func (n *nomad) placeOf(ctx context.Context, v *api.CSIVolume) (*place, error) {
	return n.find(ctx, func() (*place, error) { return n.lookFor(ctx, v) })
}

func (n *nomad) lookFor(ctx context.Context, v *api.CSIVolume) (*place, error) {
	plugin, _, err := n.client.CSIPlugins().Info(v.PluginID, query(ctx, ""))
	if err != nil {
		return nil, err
	}
	for node := range plugin.Controllers {
		p, err := n.place(ctx, node, v.PluginID)
		if err != nil || p != nil {
			return p, err
		}
	}
	return nil, fmt.Errorf("volume %s: its plugin %s is healthy on no node", v.ID, v.PluginID)
}

// place returns the plugin on a node, the one of an id unless that is ""; nil where there is none that is healthy.
func (n *nomad) place(ctx context.Context, node, only string) (*place, error) {
	p := &place{}
	var err error
	if p.node, _, err = n.client.Nodes().Info(node, query(ctx, "")); notFound(err) {
		return nil, nil // it was purged, and Nomad does not know yet that its plugins went with it
	} else if err != nil {
		return nil, err
	}
	for id, info := range p.node.CSIControllerPlugins {
		if p.node.CSINodePlugins[id] == nil || only != "" && id != only {
			continue
		}
		if !info.Healthy {
			n.unwell = true
			continue
		}
		plugin, _, err := n.client.CSIPlugins().Info(id, query(ctx, ""))
		if err != nil {
			return nil, err
		}
		if plugin.Provider != rpc.Name {
			continue
		}
		if p.alloc, _, err = n.client.Allocations().Info(info.AllocID, query(ctx, api.AllNamespacesNamespace)); err != nil {
			return nil, err
		}
		for _, g := range p.alloc.Job.TaskGroups {
			for _, t := range g.Tasks {
				if *g.Name == p.alloc.TaskGroup && t.CSIPluginConfig != nil && t.CSIPluginConfig.ID == id {
					p.plugin, p.task = id, t
					return p, nil
				}
			}
		}
	}
	return nil, nil
}

// exec runs a command of cradle-csi in the plugin's task, by the program that the task is.
func (n *nomad) exec(ctx context.Context, p *place, stdin io.Reader, stdout io.Writer, args ...string) error {
	program, ok := p.task.Config["command"].(string)
	if !ok || strings.Contains(program, "${") {
		program = "cradle-csi"
	}
	if stdin == nil {
		stdin = bytes.NewReader(nil)
	}
	code, err := n.client.Allocations().Exec(ctx, p.alloc, p.task.Name, false, append([]string{program}, args...), stdin, stdout, heard{n.c.stderr}, nil, query(ctx, p.alloc.Namespace))
	switch {
	case err == nil && code != 0:
		err = fmt.Errorf("exit code %d", code)
	case err != nil && ctx.Err() == nil && cut(err):
		err = fmt.Errorf("%w: %w", errCut, err)
	}
	if err != nil {
		return fmt.Errorf("cradle-csi %s on node %s: %w", strings.Join(args[:min(len(args), 3)], " "), p.node.Name, err)
	}
	return nil
}

// errCut is a connection that was lost while a command ran, which Nomad ends then.
var errCut = errors.New("the connection is lost")

// cut says whether an error is that of a connection. Nomad's library gives that of a websocket as a text alone.
func cut(err error) bool {
	var n net.Error
	return errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || err.Error() == io.ErrUnexpectedEOF.Error() || errors.As(err, &n)
}

// unlessCut does what goes on where it was, a few times where connections are lost meanwhile.
func (n *nomad) unlessCut(ctx context.Context, do func() error) error {
	for tries := 1; ; tries++ {
		err := do()
		if !errors.Is(err, errCut) || tries == 5 {
			return err
		}
		fmt.Fprintf(n.c.stderr, "%v; it goes on\n", err)
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(time.Second):
		}
	}
}

// heard is where a command's messages go.
type heard struct{ to io.Writer }

// Write is io.Writer's.
func (h heard) Write(p []byte) (int, error) {
	if said := bytes.ReplaceAll(p, []byte{alive}, nil); len(said) > 0 {
		if _, err := h.to.Write(said); err != nil {
			return 0, err
		}
	}
	return len(p), nil
}

// registered is what Nomad knows of a volume; nil where it does not. Its id there may be another one than the plugin's, as db[0] is.
func (n *nomad) registered(ctx context.Context, id string) (*api.CSIVolume, error) {
	if strings.ContainsAny(id, "/?#%") { // which would be another path
		return nil, nil
	}
	v, _, err := n.client.CSIVolumes().Info(id, query(ctx, n.namespace))
	if notFound(err) {
		return nil, nil
	}
	return v, err
}

// notFound says whether Nomad knows nothing of what it was asked about.
func notFound(err error) bool {
	var response api.UnexpectedResponseError
	return errors.As(err, &response) && response.StatusCode() == http.StatusNotFound
}

// stored is what the plugin calls a volume.
func stored(v *api.CSIVolume, id string) string {
	if v != nil && v.ExternalID != "" {
		return v.ExternalID
	}
	return id
}

func (n *nomad) unknown(id string) error {
	return fmt.Errorf("volume %s: Nomad knows none in namespace %s; \"nomad volume status\" lists them", id, n.namespace)
}

// forgotten is what a restore has noted of a volume that Nomad does not know any more: the restore was interrupted between taking it from one plugin and giving it to another.
// namespace is the notes'. What is noted of another namespace's volume is not meant.
func (n *nomad) forgotten(ctx context.Context, namespace, id string) (o owner, err error) {
	paths := []string{ownerPath(id)}
	for tried := 0; tried < len(paths); tried++ {
		one, err := readOwnerAt(ctx, n.client, namespace, paths[tried])
		if err != nil {
			return o, err
		}
		if one.volume != nil && one.volume.ID == id && one.volume.Namespace == n.namespace && one.index > o.index {
			o = one
		}
		if tried == 0 && o.volume == nil { // it is noted by the plugin's name for it
			all, _, err := n.client.Variables().PrefixList(ownersPath, query(ctx, namespace))
			if err != nil {
				return o, errors.Join(n.unknown(id), err)
			}
			for _, v := range all {
				paths = append(paths, v.Path)
			}
		}
	}
	if o.volume == nil {
		return o, n.unknown(id)
	}
	return o, nil
}

// sole refuses a block volume whose name one of another plugin has as well: cold storage and generations know names alone, so that the copies of the other one might be taken for its own, and the other one for a former one of it.
// What is the same one, registered twice, may be.
func (n *nomad) sole(ctx context.Context, v *api.CSIVolume, same func(*api.CSIVolumeListStub) bool) error {
	all, _, err := n.client.CSIVolumes().List(query(ctx, api.AllNamespacesNamespace))
	if err != nil {
		return err
	}
	for _, other := range all {
		if other.Provider != rpc.Name || other.PluginID == v.PluginID || same(other) || cmp.Or(other.ExternalID, other.ID) != stored(v, v.ID) {
			continue
		}
		known, err := (&nomad{client: n.client, namespace: other.Namespace}).registered(ctx, other.ID)
		if err != nil {
			return err
		}
		if known != nil && classOf(known) == volume.LV2 {
			return fmt.Errorf("volume %s: plugin %s has one of its name %s as well (volume %s in namespace %s), and which copies are whose is not known: \"cradle-csi cold ls %[3]s\" lists those of both with the times at which the volumes were made, \"cradle-csi cold restore\" makes a volume of one of them, by another name",
				v.ID, other.PluginID, stored(v, v.ID), other.ID, other.Namespace)
		}
	}
	return nil
}

func classOf(v *api.CSIVolume) string { return cmp.Or(v.Context["class"], v.Parameters["class"]) }

// unused refuses a volume that somebody may write to at this moment.
func (n *nomad) unused(ctx context.Context, v *api.CSIVolume) error {
	if v == nil {
		return nil
	}
	for _, a := range v.Allocations {
		if hasEnded(a) {
			continue
		}
		node, _, err := n.client.Nodes().Info(a.NodeID, query(ctx, ""))
		if notFound(err) {
			continue // a lost one that was purged, and its allocations are there a while longer
		}
		if err != nil {
			return err
		}
		if node.Status != api.NodeStatusDown && node.Status != api.NodeStatusDisconnected {
			return fmt.Errorf("volume %s: allocation %s uses it on node %s, which is %s: stop job %s first, or drain the node", v.ID, a.ID, node.Name, node.Status, a.JobID)
		}
	}
	return nil
}

// register makes Nomad place jobs that use a volume where it is now. The plugin of a registered volume can't be changed.
func (n *nomad) register(ctx context.Context, now, want *api.CSIVolume) error {
	if now != nil && now.PluginID == want.PluginID && slices.EqualFunc(now.Topologies, want.Topologies, sameTopology) {
		return nil
	}
	for end := time.Now().Add(patience); ; {
		unwell, err := n.give(ctx, now, want)
		if err == nil {
			return nil
		}
		again, werr := n.wait(ctx, end, unwell)
		if !again {
			return errors.Join(err, werr)
		}
		if now, err = n.registered(ctx, want.ID); err != nil {
			return err
		}
	}
}

// give is register, once. Nomad refuses a volume of a plugin that is not healthy: it does not forget the volume before it says that the plugin is.
func (n *nomad) give(ctx context.Context, now, want *api.CSIVolume) (unwell bool, err error) {
	failed := func(err error) error {
		return fmt.Errorf("volume %s: give it to plugin %s: %w", want.ID, want.PluginID, err)
	}
	plugin, _, err := n.client.CSIPlugins().Info(want.PluginID, query(ctx, ""))
	if err != nil {
		return false, failed(err)
	}
	if plugin.ControllersHealthy == 0 {
		return true, failed(errors.New("it is not healthy; \"nomad plugin status\" tells why"))
	}
	if now != nil {
		if err := n.client.CSIVolumes().Deregister(now.ID, true, n.write(ctx)); err != nil {
			return false, fmt.Errorf("volume %s: take it from plugin %s: %w", now.ID, now.PluginID, err)
		}
	}
	if _, err := n.client.CSIVolumes().Register(want, n.write(ctx)); err != nil {
		return strings.Contains(err.Error(), "no healthy controllers"), failed(err) // nomad/csi_endpoint.go
	}
	return false, nil
}

func sameTopology(a, b *api.CSITopology) bool { return maps.Equal(a.Segments, b.Segments) }

// evaluate has Nomad place the jobs that wait for a volume.
func (n *nomad) evaluate(ctx context.Context, id string) error {
	stubs, _, err := n.client.Jobs().List(query(ctx, n.namespace))
	if err != nil {
		return err
	}
	for _, stub := range stubs {
		if stub.Stop || stub.Periodic || stub.ParameterizedJob {
			continue
		}
		job, _, err := n.client.Jobs().Info(stub.ID, query(ctx, n.namespace))
		if err != nil {
			return err
		}
		if !slices.ContainsFunc(job.TaskGroups, func(g *api.TaskGroup) bool { return uses(g, id) }) {
			continue
		}
		if _, _, err := n.client.Jobs().ForceEvaluate(stub.ID, n.write(ctx)); err != nil {
			return fmt.Errorf("job %s: evaluate: %w", stub.ID, err)
		}
	}
	return nil
}

// uses says whether a group has the volume, or one with its allocations' numbers.
func uses(g *api.TaskGroup, id string) bool {
	for _, v := range g.Volumes {
		if v.Type == "csi" && (v.Source == id || v.PerAlloc && strings.HasPrefix(id, v.Source+"[")) {
			return true
		}
	}
	return false
}
