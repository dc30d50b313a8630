package provider

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strings"

	"github.com/hashicorp/nomad/api"
	"github.com/hashicorp/terraform-plugin-framework/attr"
	"github.com/hashicorp/terraform-plugin-framework/diag"
	"github.com/hashicorp/terraform-plugin-framework/path"
	"github.com/hashicorp/terraform-plugin-framework/resource"
	"github.com/hashicorp/terraform-plugin-framework/resource/schema"
	"github.com/hashicorp/terraform-plugin-framework/resource/schema/planmodifier"
	"github.com/hashicorp/terraform-plugin-framework/resource/schema/stringplanmodifier"
	"github.com/hashicorp/terraform-plugin-framework/types"

	"github.com/cradlestack/cradlestack/internal/nomadjob"
)

// Networks are docker's (docs/decisions/0014): pods of one network, whoever has made them, find each other by their names.

type networkResource struct{ *cluster }

func newNetwork() resource.Resource { return &networkResource{} }

type networkResourceModel struct {
	ID        types.String `tfsdk:"id"`
	Name      types.String `tfsdk:"name"`
	Namespace types.String `tfsdk:"namespace"`
	Labels    types.Map    `tfsdk:"labels"`
	NetworkID types.String `tfsdk:"network_id"`
}

// networkModel is a pod's place on a network.
type networkModel struct {
	Aliases types.List `tfsdk:"aliases"`
}

func (r *networkResource) Metadata(_ context.Context, req resource.MetadataRequest, resp *resource.MetadataResponse) {
	resp.TypeName = req.ProviderTypeName + "_network"
}

func (r *networkResource) Configure(_ context.Context, req resource.ConfigureRequest, _ *resource.ConfigureResponse) {
	r.cluster = configured(req.ProviderData)
}

func (r *networkResource) Schema(_ context.Context, _ resource.SchemaRequest, resp *resource.SchemaResponse) {
	kept := []planmodifier.String{stringplanmodifier.UseStateForUnknown()}
	resp.Schema = schema.Schema{
		MarkdownDescription: "A network in which pods find each other by names: the same as `docker network create` makes. Its pods are on one node.",
		Attributes: map[string]schema.Attribute{
			"id":         schema.StringAttribute{Computed: true, PlanModifiers: kept, MarkdownDescription: "NAMESPACE/NAME."},
			"name":       schema.StringAttribute{Required: true, Validators: networkName, MarkdownDescription: "Letters, digits, `_`, `.` and `-`. Another name is another network."},
			"namespace":  schema.StringAttribute{Optional: true, Computed: true, PlanModifiers: kept, Validators: notEmpty, MarkdownDescription: "Nomad's namespace. Default: the provider's. Another one is another network."},
			"labels":     named("Docker's labels. They change in place."),
			"network_id": schema.StringAttribute{Computed: true, PlanModifiers: kept, MarkdownDescription: "By which docker knows it."},
		},
	}
}

// ModifyPlan shows the defaults, and what makes another network.
func (r *networkResource) ModifyPlan(ctx context.Context, req resource.ModifyPlanRequest, resp *resource.ModifyPlanResponse) {
	if req.Plan.Raw.IsNull() || r.cluster == nil {
		return
	}
	var config, plan, state networkResourceModel
	resp.Diagnostics.Append(req.Config.Get(ctx, &config)...)
	resp.Diagnostics.Append(req.Plan.Get(ctx, &plan)...)
	if !req.State.Raw.IsNull() {
		resp.Diagnostics.Append(req.State.Get(ctx, &state)...)
	}
	if resp.Diagnostics.HasError() {
		return
	}
	fill(&plan.Namespace, config.Namespace, r.namespace)
	if !plan.Name.IsUnknown() && !plan.Namespace.IsUnknown() {
		plan.ID = types.StringValue(objectID(plan.Namespace.ValueString(), plan.Name.ValueString()))
	}
	for _, a := range []struct {
		name   string
		is, to attr.Value
	}{{"name", state.Name, plan.Name}, {"namespace", state.Namespace, plan.Namespace}} {
		if !state.ID.IsNull() && !a.is.Equal(a.to) {
			resp.RequiresReplace.Append(path.Root(a.name))
			plan.NetworkID = types.StringUnknown()
		}
	}
	resp.Diagnostics.Append(resp.Plan.Set(ctx, &plan)...)
}

func (m *networkResourceModel) read(namespace string, n *nomadjob.NetworkRecord) {
	m.ID, m.Name, m.Namespace = types.StringValue(objectID(namespace, n.Name)), types.StringValue(n.Name), types.StringValue(namespace)
	m.Labels, m.NetworkID = nowMap(m.Labels, n.Labels), types.StringValue(n.ID)
}

func (r *networkResource) Create(ctx context.Context, req resource.CreateRequest, resp *resource.CreateResponse) {
	var m networkResourceModel
	if resp.Diagnostics.Append(req.Plan.Get(ctx, &m)...); resp.Diagnostics.HasError() {
		return
	}
	namespace := m.Namespace.ValueString()
	var id [32]byte
	_, _ = rand.Read(id[:]) // never fails
	n := nomadjob.NewNetworkRecord(m.Name.ValueString(), hex.EncodeToString(id[:]))
	n.Labels = pairs(m.Labels)
	err := r.putNetwork(ctx, namespace, &n, 0)
	if isConflict(err) {
		is, _, readErr := r.network(ctx, namespace, n.Name)
		if readErr == nil && is != nil && is.Node == "" && maps.Equal(is.Labels, n.Labels) { // an apply that was killed had made it
			resp.Diagnostics.AddWarning("The network was there", m.ID.ValueString()+" is as it should be, and is Terraform's from now on.")
			n, err = *is, nil
		} else {
			resp.Diagnostics.AddAttributeError(path.Root("name"), "There is such a network",
				fmt.Sprintf("%s exists: choose another name, or take it into Terraform's state with\nterraform import ADDRESS %[1]s", m.ID.ValueString()))
			return
		}
	}
	if err != nil {
		resp.Diagnostics.Append(failed("The network was not made", m.ID.ValueString(), err))
		return
	}
	m.read(namespace, &n)
	resp.Diagnostics.Append(resp.State.Set(ctx, &m)...)
}

func (r *networkResource) Read(ctx context.Context, req resource.ReadRequest, resp *resource.ReadResponse) {
	var m networkResourceModel
	if resp.Diagnostics.Append(req.State.Get(ctx, &m)...); resp.Diagnostics.HasError() {
		return
	}
	n, _, err := r.network(ctx, m.Namespace.ValueString(), m.Name.ValueString())
	switch {
	case err != nil:
		resp.Diagnostics.Append(failed("The network can't be read", m.ID.ValueString(), err))
	case n == nil || !m.NetworkID.IsNull() && n.ID != m.NetworkID.ValueString(): // another one by that name is not this
		resp.State.RemoveResource(ctx)
	default:
		m.read(m.Namespace.ValueString(), n)
		resp.Diagnostics.Append(resp.State.Set(ctx, &m)...)
	}
}

func (r *networkResource) Update(ctx context.Context, req resource.UpdateRequest, resp *resource.UpdateResponse) {
	var m networkResourceModel
	if resp.Diagnostics.Append(req.Plan.Get(ctx, &m)...); resp.Diagnostics.HasError() {
		return
	}
	n, err := r.changeNetwork(ctx, m.Namespace.ValueString(), m.Name.ValueString(), func(n *nomadjob.NetworkRecord) (bool, error) {
		n.Labels = pairs(m.Labels)
		return true, nil
	})
	if err != nil {
		resp.Diagnostics.Append(failed("The network was not changed", m.ID.ValueString(), err))
		return
	}
	m.read(m.Namespace.ValueString(), n)
	resp.Diagnostics.Append(resp.State.Set(ctx, &m)...)
}

// Delete refuses while pods are on it, as docker does.
func (r *networkResource) Delete(ctx context.Context, req resource.DeleteRequest, resp *resource.DeleteResponse) {
	var m networkResourceModel
	if resp.Diagnostics.Append(req.State.Get(ctx, &m)...); resp.Diagnostics.HasError() {
		return
	}
	namespace := m.Namespace.ValueString()
	for {
		n, index, err := r.network(ctx, namespace, m.Name.ValueString())
		if err == nil && (n == nil || n.ID != m.NetworkID.ValueString()) {
			return
		}
		var on []string
		if err == nil {
			on, err = r.onNetwork(ctx, namespace, n)
		}
		if err == nil && len(on) > 0 {
			resp.Diagnostics.AddError("The network is in use", fmt.Sprintf("%s: %s: take them off it first.", m.ID.ValueString(), strings.Join(on, ", ")))
			return
		}
		if err == nil {
			_, err = r.nomad.Variables().CheckedDelete(nomadjob.NetworkPath(n.Name), index, r.write(ctx, namespace))
		}
		if isConflict(err) {
			continue
		}
		if err != nil {
			resp.Diagnostics.Append(failed("The network was not removed", m.ID.ValueString(), err))
		}
		return
	}
}

func (r *networkResource) ImportState(ctx context.Context, req resource.ImportStateRequest, resp *resource.ImportStateResponse) {
	namespace, name := r.split(req.ID)
	resp.Diagnostics.Append(resp.State.Set(ctx, &networkResourceModel{
		Name: types.StringValue(name), Namespace: types.StringValue(namespace), Labels: types.MapNull(types.StringType),
	})...)
}

func isConflict(err error) bool {
	var conflict api.ErrCASConflict
	return errors.As(err, &conflict)
}

// network reads one, nil where there is none, with the index of its variable.
func (c *cluster) network(ctx context.Context, namespace, name string) (*nomadjob.NetworkRecord, uint64, error) {
	v, _, err := c.nomad.Variables().Read(nomadjob.NetworkPath(name), c.query(ctx, namespace))
	if errors.Is(err, api.ErrVariablePathNotFound) {
		return nil, 0, nil
	}
	if err != nil {
		return nil, 0, fmt.Errorf("network %s: %w", name, err)
	}
	n, err := nomadjob.ReadNetwork(v)
	return &n, v.ModifyIndex, err
}

func (c *cluster) putNetwork(ctx context.Context, namespace string, n *nomadjob.NetworkRecord, index uint64) error {
	v, err := n.Variable(index)
	if err == nil {
		_, _, err = c.nomad.Variables().CheckedUpdate(v, c.write(ctx, namespace))
	}
	return err
}

// changeNetwork applies f until nobody else has changed the network meanwhile. f says whether it has changed something.
func (c *cluster) changeNetwork(ctx context.Context, namespace, name string, f func(*nomadjob.NetworkRecord) (bool, error)) (*nomadjob.NetworkRecord, error) {
	for {
		n, index, err := c.network(ctx, namespace, name)
		if err == nil && n == nil {
			err = fmt.Errorf("there is no network %s", name)
		}
		if err != nil {
			return nil, err
		}
		changed, err := f(n)
		if err != nil || !changed {
			return n, err
		}
		if err = c.putNetwork(ctx, namespace, n, index); !isConflict(err) {
			return n, err
		}
	}
}

// onNetwork are the jobs of those that are on a network.
func (c *cluster) onNetwork(ctx context.Context, namespace string, n *nomadjob.NetworkRecord) (jobs []string, err error) {
	all, _, err := c.nomad.Services().Get(nomadjob.NetworkService(n.ID), c.query(ctx, namespace))
	for _, s := range all {
		jobs = append(jobs, "job "+s.JobID)
	}
	slices.Sort(jobs)
	return slices.Compact(jobs), err
}

// names are what a pod is found by on a network: the first one tells the network's own.
func (m *podModel) names(network string, aliases []string) []string {
	names := []string{m.Name.ValueString() + "." + network, m.Name.ValueString()}
	if h := m.Hostname.ValueString(); h != "" && h != m.Name.ValueString() {
		names = append(names, h)
	}
	return append(names, aliases...)
}

// checkNetworks tells what is wrong with a pod's networks.
func (m *podModel) checkNetworks() (diags diag.Diagnostics) {
	if len(m.Networks) > 0 && m.Network.ValueString() != "" && m.Network.ValueString() != networkBridge {
		diags.AddAttributeError(path.Root("network"), "Not with networks", "Pods of a network reach each other in their node's bridge: leave network out, or write bridge.")
	}
	for name, n := range m.Networks {
		at := path.Root("networks").AtMapKey(name)
		for _, r := range networkName {
			if problem := r.(rule).problem(name); problem != "" {
				diags.AddAttributeError(at, "Not possible", problem)
			}
		}
		seen := map[string]bool{}
		for _, own := range m.names(name, nil) {
			seen[own] = true
		}
		for i, alias := range strs(n.Aliases) { // Terraform finds no line for what is deeper than the network
			switch {
			case n.Aliases.Elements()[i].IsUnknown():
				continue
			case !aliasRule.MatchString(alias):
				diags.AddAttributeError(at, "Not possible", fmt.Sprintf("%q is no name: write letters, digits, _, . and -, at most 253", alias))
			case seen[alias]:
				diags.AddAttributeError(at, "Said twice", alias+" is a name of the pod there anyway: leave it out.")
			}
			seen[alias] = true
		}
	}
	return diags
}

// places reads a job's networks. others are services that are none of a network.
func (m *podModel) places(o *nomadjob.Options) (others bool) {
	was := m.Networks
	m.Networks = nil
	if was != nil {
		m.Networks = map[string]networkModel{}
	}
	for _, n := range o.Networks {
		name, ok := "", false
		if len(n.Names) > 0 {
			name, ok = strings.CutPrefix(n.Names[0], o.ID+".")
		}
		own := m.names(name, nil)
		if !ok || len(n.Names) < len(own) || !slices.Equal(own, n.Names[:len(own)]) {
			others = true
			continue
		}
		if m.Networks == nil {
			m.Networks = map[string]networkModel{}
		}
		m.Networks[name] = networkModel{nowStrings(was[name].Aliases, n.Names[len(own):])}
	}
	return others
}

// joined leaves of a pod's networks those that there are: one that was made anew by its name is another one.
func (c *cluster) joined(ctx context.Context, f *foundPod, m *podModel) error {
	for name := range m.Networks {
		n, _, err := c.network(ctx, f.options.Namespace, name)
		if err != nil {
			return err
		}
		if n == nil || !slices.ContainsFunc(f.options.Networks, func(o nomadjob.Network) bool { return o.Service == nomadjob.NetworkService(n.ID) }) {
			delete(m.Networks, name)
		}
	}
	return nil
}

// enter finds the networks that a pod is to be on, and the node where they are; a pod on networks that are on none has to settle.
func (c *cluster) enter(ctx context.Context, w *wish, m *podModel) (diags diag.Diagnostics) {
	if len(m.Networks) == 0 {
		return nil
	}
	namespace, asked, of := w.options.Namespace, w.options.Node, ""
	w.byNetwork, w.options.Networks = asked == "", nil
	for _, name := range slices.Sorted(maps.Keys(m.Networks)) {
		at := path.Root("networks").AtMapKey(name)
		n, _, err := c.network(ctx, namespace, name)
		if err != nil {
			diags.Append(failed("The network can't be read", objectID(namespace, name), err))
			return diags
		}
		if n == nil {
			diags.AddAttributeError(at, "There is no such network", fmt.Sprintf("%s: make it with a cradle_network, or docker network create.", objectID(namespace, name)))
			return diags
		}
		w.options.Networks = append(w.options.Networks, nomadjob.Network{Service: nomadjob.NetworkService(n.ID), Names: m.names(name, strs(m.Networks[name].Aliases))})
		bound, err := c.boundTo(ctx, n)
		if err != nil {
			diags.Append(failed("The network's node can't be read", objectID(namespace, name), err))
			return diags
		}
		switch {
		case bound == "":
		case w.options.Node == "":
			w.options.Node, of = bound, name
		case bound != w.options.Node:
			where := "node says " + asked
			if of != "" {
				where = "network " + of + " is on " + w.options.Node
			}
			diags.AddAttributeError(at, "On another node", fmt.Sprintf("%s is on node %s, and %s: a node's bridge does not reach that of another one. Remove what is on one of them first.", objectID(namespace, name), bound, where))
			return diags
		}
	}
	w.items, _ = nomadjob.EnvItems(w.pod, w.options.Networks) // it was marshalled before
	if w.options.Node != "" {
		if err := c.bind(ctx, w, m, w.options.Node); err != nil {
			diags.Append(failed("The network was not bound to its node", w.object(), err))
		}
	}
	return diags
}

// boundTo is the node to which a network's pods go, "" while it is on none, or that node is not there.
func (c *cluster) boundTo(ctx context.Context, n *nomadjob.NetworkRecord) (string, error) {
	if n.Node == "" {
		return "", nil
	}
	node, _, err := c.nomad.Nodes().Info(n.Node, c.query(ctx, ""))
	switch {
	case isNotFound(err):
		return "", nil
	case isStatus(err, http.StatusForbidden): // node:read is not for everybody; what the record says holds
		return n.Node, nil
	case err != nil:
		return "", err
	case node.Status != api.NodeStatusReady:
		return "", nil
	}
	return n.Node, nil
}

// bind makes a node that of a pod's networks.
func (c *cluster) bind(ctx context.Context, w *wish, m *podModel, node string) error {
	for _, name := range slices.Sorted(maps.Keys(m.Networks)) {
		if _, err := c.changeNetwork(ctx, w.options.Namespace, name, func(n *nomadjob.NetworkRecord) (bool, error) {
			bound, err := c.boundTo(ctx, n)
			if err != nil || bound == node {
				return false, err
			}
			if bound != "" {
				return false, errElsewhere{name, bound}
			}
			n.Node = node
			return true, nil
		}); err != nil {
			return err
		}
	}
	return nil
}

// errElsewhere is that somebody else has bound a network to another node meanwhile.
type errElsewhere struct{ network, node string }

func (e errElsewhere) Error() string {
	return fmt.Sprintf("network %s is on node %s since a moment ago: apply again", e.network, e.node)
}

// settle binds networks that were on no node to the one that Nomad has chosen, and makes the job stay there.
func (c *cluster) settle(ctx context.Context, w *wish, m *podModel, eval string) (again bool, err error) {
	if len(m.Networks) == 0 || w.options.Node != "" {
		return false, nil
	}
	ctx, cancel := context.WithTimeout(ctx, m.WaitTimeout.duration())
	defer cancel()
	if why, err := c.placed(ctx, w, eval); err != nil || why != "" {
		return false, err //nolint:nilerr // why it has no place is told by who waits for it
	}
	all, _, err := c.nomad.Jobs().Allocations(w.options.ID, false, c.query(ctx, w.options.Namespace))
	if err != nil {
		return false, err
	}
	for _, a := range all {
		if a.DesiredStatus != api.AllocDesiredStatusRun || a.ClientStatus != api.AllocClientStatusPending && a.ClientStatus != api.AllocClientStatusRunning {
			continue
		}
		node := a.NodeID
		err := c.bind(ctx, w, m, node)
		var other errElsewhere
		if errors.As(err, &other) { // a pod that was started at the same time was quicker
			node = other.node
			err = c.bind(ctx, w, m, node)
		}
		if w.once() { // it stays where it is; a job that differs would be run again
			return false, err
		}
		w.options.Node = node
		return err == nil, err
	}
	return false, nil
}
