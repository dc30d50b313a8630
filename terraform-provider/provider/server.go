package provider

import (
	"bytes"
	"context"
	"errors"
	"fmt"

	"github.com/hashicorp/terraform-plugin-framework/attr"
	"github.com/hashicorp/terraform-plugin-framework/diag"
	"github.com/hashicorp/terraform-plugin-framework/providerserver"
	"github.com/hashicorp/terraform-plugin-framework/resource"
	"github.com/hashicorp/terraform-plugin-framework/resource/schema"
	"github.com/hashicorp/terraform-plugin-framework/resource/schema/defaults"
	"github.com/hashicorp/terraform-plugin-framework/resource/schema/int64planmodifier"
	"github.com/hashicorp/terraform-plugin-framework/resource/schema/stringplanmodifier"
	"github.com/hashicorp/terraform-plugin-framework/tfsdk"
	"github.com/hashicorp/terraform-plugin-go/tfprotov6"
	"github.com/hashicorp/terraform-plugin-go/tftypes"

	"github.com/cradlestack/cradlestack/internal/nomadjob"
)

// Server is what Terraform talks to. Of what it asks for each resource of a plan most changes nothing, and the framework takes long to find that out: it goes
// from a schema's root to each attribute, and makes values of it, several times a call. What is seen at once to change nothing is answered here, by what
// Terraform itself has said; all else is the framework's.
func Server(version string) func() tfprotov6.ProviderServer {
	return func() tfprotov6.ProviderServer { return newServer(version) }
}

type server struct {
	tfprotov6.ProviderServer
	provider *cradle
	quick    map[string]*quick // by types of resources
}

// A quick resource is one of which can be seen at once that nothing changes.
type quick struct {
	schema schema.Schema
	object tftypes.Object
	tree   *branch
	made   func(*cluster) steady
}

// A steady resource says what its methods for the framework say where nothing changes.
type steady interface {
	// there reads what there is into a state. It is false where that is for the framework to tell.
	there(ctx context.Context, state *tfsdk.State) (bool, diag.Diagnostics)
	// settled says whether ModifyPlan leaves a plan as it is that has what the state has.
	settled(config, state map[string]tftypes.Value) bool
}

func newServer(version string) *server {
	p := &cradle{version: version}
	s := &server{ProviderServer: providerserver.NewProtocol6(p)(), provider: p, quick: map[string]*quick{}}
	for name, q := range map[string]struct {
		resource resource.Resource
		made     func(*cluster) steady
	}{
		"cradle_pod":    {newPod(), func(c *cluster) steady { return &podResource{c} }},
		"cradle_volume": {newVolume(), func(c *cluster) steady { return &volumeResource{c} }},
	} {
		ctx := context.Background()
		var resp resource.SchemaResponse
		q.resource.Schema(ctx, resource.SchemaRequest{}, &resp)
		object, ok := resp.Schema.Type().TerraformType(ctx).(tftypes.Object)
		tree, err := grow(ctx, resp.Schema.Attributes, resp.Schema.Blocks)
		if !ok || err != nil {
			panic(fmt.Sprintf("%s: %v", name, err)) // a test reads all schemas
		}
		s.quick[name] = &quick{resp.Schema, object, tree, q.made}
	}
	return s
}

// UpgradeResourceState hands on a state of today's schema.
func (s *server) UpgradeResourceState(ctx context.Context, req *tfprotov6.UpgradeResourceStateRequest) (*tfprotov6.UpgradeResourceStateResponse, error) {
	if q := s.quick[req.TypeName]; q != nil && req.RawState != nil && req.Version == q.schema.Version {
		state, err := req.RawState.UnmarshalWithOpts(q.object, tfprotov6.UnmarshalOpts{ValueFromJSONOpts: tftypes.ValueFromJSONOpts{IgnoreUndefinedAttributes: true}})
		if err == nil && q.tree.whole(state) {
			if v, err := tfprotov6.NewDynamicValue(q.object, state); err == nil {
				return &tfprotov6.UpgradeResourceStateResponse{UpgradedState: &v}, nil
			}
		}
	}
	return s.ProviderServer.UpgradeResourceState(ctx, req)
}

// ReadResource tells what there is.
func (s *server) ReadResource(ctx context.Context, req *tfprotov6.ReadResourceRequest) (*tfprotov6.ReadResourceResponse, error) {
	if q := s.quick[req.TypeName]; q != nil && s.provider.cluster != nil {
		if now := q.read(ctx, s.provider.cluster, req); now != nil {
			return &tfprotov6.ReadResourceResponse{NewState: now, Private: req.Private}, nil
		}
	}
	return s.ProviderServer.ReadResource(ctx, req)
}

// read is nil where that is for the framework.
func (q *quick) read(ctx context.Context, c *cluster, req *tfprotov6.ReadResourceRequest) *tfprotov6.DynamicValue {
	if req.CurrentState == nil || bytes.Contains(req.Private, []byte(staleKey)) {
		return nil
	}
	was, err := req.CurrentState.Unmarshal(q.object)
	if err != nil || !was.IsFullyKnown() || !q.tree.whole(was) {
		return nil
	}
	now := tfsdk.State{Raw: was, Schema: q.schema}
	is, diags := q.made(c).there(ctx, &now)
	switch {
	case !is || len(diags) > 0:
		return nil
	case now.Raw.Equal(was):
		return req.CurrentState
	}
	if v, err := tfprotov6.NewDynamicValue(q.object, now.Raw); err == nil {
		return &v
	}
	return nil
}

// PlanResourceChange tells that nothing is to be changed.
func (s *server) PlanResourceChange(ctx context.Context, req *tfprotov6.PlanResourceChangeRequest) (*tfprotov6.PlanResourceChangeResponse, error) {
	if q := s.quick[req.TypeName]; q != nil && s.provider.cluster != nil && q.keeps(s.provider.cluster, req) {
		return &tfprotov6.PlanResourceChangeResponse{PlannedState: req.PriorState, PlannedPrivate: req.PriorPrivate}, nil
	}
	return s.ProviderServer.PlanResourceChange(ctx, req)
}

func (q *quick) keeps(c *cluster, req *tfprotov6.PlanResourceChangeRequest) bool {
	prior, proposed := req.PriorState, req.ProposedNewState
	if prior == nil || proposed == nil || req.Config == nil || len(prior.MsgPack) == 0 || !bytes.Equal(prior.MsgPack, proposed.MsgPack) || bytes.Contains(req.PriorPrivate, []byte(staleKey)) {
		return false
	}
	state, err := prior.Unmarshal(q.object)
	if err != nil || !state.IsFullyKnown() || !q.tree.whole(state) {
		return false
	}
	config, err := req.Config.Unmarshal(q.object)
	if err != nil || !config.IsFullyKnown() {
		return false
	}
	var is, said map[string]tftypes.Value
	if state.As(&is) != nil || config.As(&said) != nil || is == nil || said == nil {
		return false
	}
	return q.tree.keeps(config, state) && q.made(c).settled(said, is)
}

// textOfValue is "" for what is no text, or not there.
func textOfValue(v tftypes.Value) (s string) {
	if v.IsNull() || !v.IsKnown() || !v.Type().Is(tftypes.String) || v.As(&s) != nil {
		return ""
	}
	return s
}

// A branch is what of an attribute or a block decides whether the framework plans what a state has.
type branch struct {
	otherwise *tftypes.Value     // what is so where a configuration has nothing
	emptied   bool               // nothing is left of it
	block     bool               // is there, if empty
	branches  map[string]*branch // of an object, or of each of its elements
}

// grow makes a tree of a schema. What the framework would do with another kind of attribute, or with another plan modifier, has to be thought of first.
func grow(ctx context.Context, attributes map[string]schema.Attribute, blocks map[string]schema.Block) (*branch, error) {
	b := &branch{branches: map[string]*branch{}}
	for name, a := range attributes {
		one, err := growAttribute(ctx, a)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		b.branches[name] = one
	}
	for name, a := range blocks {
		list, ok := a.(schema.ListNestedBlock)
		if !ok || len(list.PlanModifiers)+len(list.NestedObject.PlanModifiers) > 0 {
			return nil, fmt.Errorf("%s: a block of kind %T", name, a)
		}
		one, err := grow(ctx, list.NestedObject.Attributes, list.NestedObject.Blocks)
		if err != nil {
			return nil, fmt.Errorf("%s.%w", name, err)
		}
		one.block = true
		b.branches[name] = one
	}
	return b, nil
}

func growAttribute(ctx context.Context, a schema.Attribute) (*branch, error) {
	b := &branch{}
	var otherwise attr.Value
	var modifiers []any
	switch a := a.(type) {
	case schema.StringAttribute:
		modifiers = anyOf(a.PlanModifiers)
		if a.Default != nil {
			var resp defaults.StringResponse
			a.Default.DefaultString(ctx, defaults.StringRequest{}, &resp)
			otherwise = resp.PlanValue
		}
	case schema.Int64Attribute:
		modifiers = anyOf(a.PlanModifiers)
		if a.Default != nil {
			var resp defaults.Int64Response
			a.Default.DefaultInt64(ctx, defaults.Int64Request{}, &resp)
			otherwise = resp.PlanValue
		}
	case schema.BoolAttribute:
		modifiers = anyOf(a.PlanModifiers)
		if a.Default != nil {
			var resp defaults.BoolResponse
			a.Default.DefaultBool(ctx, defaults.BoolRequest{}, &resp)
			otherwise = resp.PlanValue
		}
	case schema.ListAttribute:
		if a.Default != nil {
			return nil, errors.New("a list with a default")
		}
		modifiers = anyOf(a.PlanModifiers)
	case schema.MapAttribute:
		if a.Default != nil {
			return nil, errors.New("a map with a default")
		}
		modifiers = anyOf(a.PlanModifiers)
	case schema.SingleNestedAttribute:
		modifiers = anyOf(a.PlanModifiers)
		if a.Default != nil {
			var resp defaults.ObjectResponse
			a.Default.DefaultObject(ctx, defaults.ObjectRequest{}, &resp)
			otherwise = resp.PlanValue
		}
		within, err := grow(ctx, a.Attributes, nil)
		if err != nil {
			return nil, err
		}
		b.branches = within.branches
	case schema.ListNestedAttribute:
		if a.Default != nil {
			return nil, errors.New("a list with a default")
		}
		modifiers = append(anyOf(a.PlanModifiers), anyOf(a.NestedObject.PlanModifiers)...)
		within, err := grow(ctx, a.NestedObject.Attributes, nil)
		if err != nil {
			return nil, err
		}
		b.branches = within.branches
	case schema.MapNestedAttribute:
		if a.Default != nil {
			return nil, errors.New("a map with a default")
		}
		modifiers = append(anyOf(a.PlanModifiers), anyOf(a.NestedObject.PlanModifiers)...)
		within, err := grow(ctx, a.NestedObject.Attributes, nil)
		if err != nil {
			return nil, err
		}
		b.branches = within.branches
	default:
		return nil, fmt.Errorf("an attribute of kind %T", a)
	}
	for _, m := range modifiers {
		switch m {
		case sameQuantity[inBytes]{}, sameQuantity[inTime]{}, sameMemory{}, stringplanmodifier.UseStateForUnknown(), int64planmodifier.UseStateForUnknown(): // the state's, where it is planned
		case none{}:
			b.emptied = true
		default:
			return nil, fmt.Errorf("a plan modifier %T", m)
		}
	}
	if otherwise != nil {
		v, err := otherwise.ToTerraformValue(ctx)
		if err != nil {
			return nil, err
		}
		b.otherwise = &v
	}
	return b, nil
}

func anyOf[T any](all []T) (some []any) {
	for _, one := range all {
		some = append(some, one)
	}
	return some
}

// keeps says whether defaults and plan modifiers leave alone what is proposed as it is in the state.
func (b *branch) keeps(config, state tftypes.Value) bool {
	if b.emptied {
		var all []tftypes.Value
		return !state.IsNull() && state.As(&all) == nil && len(all) == 0
	}
	if b.otherwise != nil && config.IsNull() {
		return state.Equal(*b.otherwise)
	}
	if len(b.branches) == 0 || state.IsNull() {
		return true
	}
	return b.each(state, func(at *branch, key any, is tftypes.Value) bool { return at.keeps(child(config, key), is) })
}

// whole says whether all blocks of a state are there: the framework makes those empty that are not.
func (b *branch) whole(state tftypes.Value) bool {
	if state.IsNull() {
		return !b.block
	}
	return len(b.branches) == 0 || b.each(state, func(at *branch, _ any, is tftypes.Value) bool { return at.whole(is) })
}

// each is true where f is of all that is in an object, or in a list or map of objects.
func (b *branch) each(v tftypes.Value, f func(at *branch, key any, v tftypes.Value) bool) bool {
	if v.Type().Is(tftypes.List{}) {
		var all []tftypes.Value
		if v.As(&all) != nil {
			return false
		}
		for i, one := range all {
			if !f(&branch{branches: b.branches}, i, one) {
				return false
			}
		}
		return true
	}
	var all map[string]tftypes.Value
	if v.As(&all) != nil {
		return false
	}
	for name, one := range all {
		at := &branch{branches: b.branches}
		if v.Type().Is(tftypes.Object{}) {
			if at = b.branches[name]; at == nil {
				return false
			}
		}
		if !f(at, name, one) {
			return false
		}
	}
	return true
}

// child is what a configuration has in a place, null where it has nothing there.
func child(v tftypes.Value, key any) tftypes.Value {
	switch key := key.(type) {
	case int:
		var all []tftypes.Value
		if !v.IsNull() && v.As(&all) == nil && key < len(all) {
			return all[key]
		}
	case string:
		var all map[string]tftypes.Value
		if !v.IsNull() && v.As(&all) == nil {
			return all[key]
		}
	}
	return tftypes.Value{}
}

func (r *podResource) there(ctx context.Context, state *tfsdk.State) (bool, diag.Diagnostics) {
	var m podModel
	if diags := state.Get(ctx, &m); diags.HasError() {
		return false, diags
	}
	f, err := r.pod(ctx, m.Namespace.ValueString(), m.Name.ValueString())
	if err != nil || f == nil || f.stale {
		return false, nil
	}
	if diags := r.view(ctx, f, &m, true); len(diags) > 0 {
		return false, diags
	}
	return true, state.Set(ctx, &m)
}

func (r *podResource) settled(config, state map[string]tftypes.Value) bool {
	networked, once := false, false
	var networks map[string]tftypes.Value
	if v := state["networks"]; !v.IsNull() {
		networked = v.As(&networks) != nil || len(networks) > 0
	}
	if v := state["once"]; v.IsNull() || v.As(&once) != nil {
		return false
	}
	byDefault := func(name, otherwise string) bool {
		return !config[name].IsNull() || textOfValue(state[name]) == otherwise
	}
	return textOfValue(state["id"]) == objectID(textOfValue(state["namespace"]), textOfValue(state["name"])) &&
		byDefault("namespace", r.namespace) && byDefault("network", defaultNetwork(networked)) && byDefault("wait_for", defaultWaitFor(once)) &&
		(!config["node"].IsNull() || networked || state["node"].IsNull()) &&
		secretsAsSaid(config["container"], state["container"]) && runs(textOfValue(state["status"]))
}

// secretsAsSaid says whether the names of the secrets that containers have are those that a configuration gives them.
func secretsAsSaid(config, state tftypes.Value) bool {
	var said, are []tftypes.Value
	if config.As(&said) != nil || state.As(&are) != nil || len(said) != len(are) {
		return false
	}
	for i := range are {
		var secrets map[string]tftypes.Value
		if v := child(said[i], "secret_env"); !v.IsNull() && v.As(&secrets) != nil {
			return false
		}
		var names []tftypes.Value
		if v := child(are[i], "secret_env_names"); !v.IsNull() && v.As(&names) != nil {
			return false
		}
		if len(names) != len(secrets) {
			return false
		}
		for _, name := range names {
			if _, ok := secrets[textOfValue(name)]; !ok {
				return false
			}
		}
	}
	return true
}

func (r *volumeResource) there(ctx context.Context, state *tfsdk.State) (bool, diag.Diagnostics) {
	var m volumeModel
	if diags := state.Get(ctx, &m); diags.HasError() {
		return false, diags
	}
	v, err := r.info(ctx, m.Namespace.ValueString(), m.Name.ValueString())
	if err != nil {
		return false, nil
	}
	m.read(v)
	return true, state.Set(ctx, &m)
}

func (r *volumeResource) settled(config, state map[string]tftypes.Value) bool {
	class := textOfValue(state["class"])
	for name, otherwise := range map[string]string{
		"namespace": r.namespace, "plugin": r.volumePlugin, "access_mode": nomadjob.AccessMode(class), "attachment_mode": defaultAttachmentMode, "attach": defaultAttach(class),
	} {
		if config[name].IsNull() && textOfValue(state[name]) != otherwise {
			return false
		}
	}
	return textOfValue(state["id"]) == objectID(textOfValue(state["namespace"]), textOfValue(state["name"]))
}
