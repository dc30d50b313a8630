package provider

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"reflect"
	"slices"
	"strconv"
	"time"

	"github.com/hashicorp/nomad/api"
	"github.com/hashicorp/terraform-plugin-framework/attr"
	"github.com/hashicorp/terraform-plugin-framework/diag"
	"github.com/hashicorp/terraform-plugin-framework/path"
	"github.com/hashicorp/terraform-plugin-framework/resource"
	"github.com/hashicorp/terraform-plugin-framework/types"
	"github.com/hashicorp/terraform-plugin-go/tftypes"

	"github.com/cradlestack/cradlestack/internal/nomadjob"
	"github.com/cradlestack/cradlestack/spec"
)

type podResource struct{ *cluster }

func newPod() resource.Resource { return &podResource{} }

// What status says.
const (
	statusRunning = "running"
	statusPending = "pending"
	statusFailed  = "failed"
	statusStopped = "stopped"
	statusEnded   = "completed"
)

// runMeta is the name of what a job keeps of Terraform's: how many times a pod that runs once was started again as it was.
const runMeta = "terraform_run"

// readTimeout is how long is tried to read a pod that was registered, whatever has become of the apply.
const readTimeout = time.Minute

// staleKey is the key in a resource's private state that is there while pods have another environment than Nomad's variable.
const staleKey = "stale_env"

func (r *podResource) Metadata(_ context.Context, req resource.MetadataRequest, resp *resource.MetadataResponse) {
	resp.TypeName = req.ProviderTypeName + "_pod"
}

func (r *podResource) Configure(_ context.Context, req resource.ConfigureRequest, _ *resource.ConfigureResponse) {
	r.cluster = configured(req.ProviderData)
}

// ModifyPlan shows what follows from what is written, says why a pod would be made anew, and has pods changed that somebody has stopped, that have failed, or
// that an apply has left with a former environment. What it leaves as it is, settled knows as well.
func (r *podResource) ModifyPlan(ctx context.Context, req resource.ModifyPlanRequest, resp *resource.ModifyPlanResponse) {
	if req.Plan.Raw.IsNull() || r.cluster == nil {
		return
	}
	there := !req.State.Raw.IsNull()
	if partly(req.Config.Raw) { // Terraform asks again before it applies
		var namespace types.String
		if resp.Diagnostics.Append(req.Config.GetAttribute(ctx, path.Root("namespace"), &namespace)...); namespace.IsNull() {
			resp.Diagnostics.Append(resp.Plan.SetAttribute(ctx, path.Root("namespace"), r.namespace)...)
		}
		r.renames(ctx, there, &req, resp)
		return
	}
	var plan, state, config podModel
	resp.Diagnostics.Append(req.Plan.Get(ctx, &plan)...)
	resp.Diagnostics.Append(req.Config.Get(ctx, &config)...)
	if there {
		resp.Diagnostics.Append(req.State.Get(ctx, &state)...)
	}
	if resp.Diagnostics.HasError() {
		return
	}
	fill(&plan.Namespace, config.Namespace, r.namespace)
	fill(&plan.Network, config.Network, defaultNetwork(len(plan.Networks) > 0))
	if !plan.Once.IsUnknown() {
		fill(&plan.WaitFor, config.WaitFor, defaultWaitFor(plan.Once.ValueBool()))
	}
	for i := range min(len(plan.Containers), len(config.Containers)) {
		plan.Containers[i].SecretNames = secretNames(config.Containers[i].Secrets)
	}
	if there {
		plan.inOrder(&state, &config)
	}
	if !plan.Name.IsUnknown() && !plan.Namespace.IsUnknown() {
		plan.ID = types.StringValue(objectID(plan.Namespace.ValueString(), plan.Name.ValueString()))
	}
	stale, diags := req.Private.GetKey(ctx, staleKey)
	resp.Diagnostics.Append(diags...)
	plan.Status, plan.EnvIndex, plan.Instances = types.StringUnknown(), types.Int64Unknown(), types.ListUnknown(instance)
	again := plan
	again.Status, again.EnvIndex, again.Instances = state.Status, state.EnvIndex, state.Instances
	if config.Node.IsNull() {
		plan.Node, again.Node = types.StringNull(), types.StringNull()
		if len(plan.Networks) > 0 { // theirs
			plan.Node, again.Node = types.StringUnknown(), state.Node
		}
	}
	resp.Diagnostics.Append(resp.Plan.Set(ctx, &plan)...)
	if there && runs(state.Status.ValueString()) && len(stale) == 0 {
		// Where a size is only written in another way, or a list in another order, nothing will change.
		same := resp.Plan
		if d := same.Set(ctx, &again); !d.HasError() && same.Raw.Equal(req.State.Raw) {
			resp.Plan = same
		}
	}
	r.renames(ctx, there, &req, resp)
}

// defaultNetwork is that of pods on networks, and of others.
func defaultNetwork(networked bool) string {
	if networked {
		return networkBridge
	}
	return networkUser
}

func defaultWaitFor(once bool) string {
	if once {
		return waitEnded
	}
	return waitHealthy
}

// runs says whether a pod of this status is left as it is.
func runs(status string) bool {
	return status != "" && status != statusStopped && status != statusFailed
}

// renames says why a pod would be made anew.
func (r *podResource) renames(ctx context.Context, there bool, req *resource.ModifyPlanRequest, resp *resource.ModifyPlanResponse) {
	if !there {
		return
	}
	for _, name := range []string{"name", "namespace"} {
		var id, is, to, said types.String
		resp.Diagnostics.Append(req.Config.GetAttribute(ctx, path.Root(name), &said)...)
		resp.Diagnostics.Append(req.State.GetAttribute(ctx, path.Root("id"), &id)...)
		resp.Diagnostics.Append(req.State.GetAttribute(ctx, path.Root(name), &is)...)
		resp.Diagnostics.Append(resp.Plan.GetAttribute(ctx, path.Root(name), &to)...)
		if !resp.Diagnostics.HasError() && !is.Equal(to) {
			resp.RequiresReplace.Append(path.Root(name))
			resp.Diagnostics.AddAttributeWarning(path.Root(name), "The pod will be ended",
				fmt.Sprintf("%s is what Nomad knows a job by: %s is stopped, and another one is started.%s", name, id.ValueString(), byDefault(name, said, to)))
		}
	}
	var is, to types.Bool
	var beyond types.List
	var id types.String
	for at, into := range map[string]any{"once": &is, "beyond": &beyond, "id": &id} {
		resp.Diagnostics.Append(req.State.GetAttribute(ctx, path.Root(at), into)...)
	}
	resp.Diagnostics.Append(resp.Plan.GetAttribute(ctx, path.Root("once"), &to)...)
	switch {
	case resp.Diagnostics.HasError() || is.Equal(to) || is.IsNull():
	case slices.Contains(strs(beyond), beyondDocker):
		resp.Diagnostics.AddAttributeError(path.Root("once"), "A container of docker's runs once", "Nomad changes no job's type: set once = true, or write it as another cradle_pod, and docker rm -f it.")
	default:
		resp.RequiresReplace.Append(path.Root("once"))
		resp.Diagnostics.AddAttributeWarning(path.Root("once"), "The pod will be ended", fmt.Sprintf("Nomad changes no job's type: %s is stopped, and another one is started.", id.ValueString()))
	}
}

// partly says whether blocks or objects of a configuration are not known yet, such as those that are made for each element of what an apply makes. A model has no
// place for that.
func partly(v tftypes.Value) bool {
	found := false
	_ = tftypes.Walk(v, func(_ *tftypes.AttributePath, v tftypes.Value) (bool, error) {
		found = found || !v.IsKnown() && ofObjects(v.Type())
		return v.IsKnown(), nil
	})
	return found
}

func ofObjects(t tftypes.Type) bool {
	switch t := t.(type) {
	case tftypes.Object:
		return true
	case tftypes.List:
		return ofObjects(t.ElementType)
	case tftypes.Map:
		return ofObjects(t.ElementType)
	}
	return false
}

// A wish is a job as it should be, and what its environment is kept with.
type wish struct {
	pod       *spec.Pod
	options   nomadjob.Options
	items     api.VariableItems
	byNetwork bool // the node is that of its networks
}

// count is how many pods there are to be.
func (w *wish) count() int {
	if w.options.Service == nil {
		return 1
	}
	return w.options.Service.Count
}

func (w *wish) once() bool { return w.options.Service == nil }

func (w *wish) object() string { return objectID(w.options.Namespace, w.options.ID) }

// wish reads a plan, and the secrets, which are in the configuration alone.
func (m *podModel) wish(config *podModel) (*wish, error) {
	var secrets []map[string]string
	for i := range config.Containers {
		secrets = append(secrets, pairs(config.Containers[i].Secrets))
	}
	w := &wish{}
	w.pod, w.options = m.pod(secrets)
	var err error
	w.items, err = nomadjob.EnvItems(w.pod, nil)
	return w, err
}

// keep takes from a job that is there what Terraform does not say.
func (w *wish) keep(is *nomadjob.Options) {
	own := w.options.Meta
	w.options.PodID, w.options.DiskID, w.options.Bare, w.options.Audience = is.PodID, is.DiskID, is.Bare, is.Audience
	if w.options.Networks == nil && is.Networks != nil { // so that its names go without another pod
		w.options.Networks = []nomadjob.Network{}
		w.items, _ = nomadjob.EnvItems(w.pod, w.options.Networks) // it was marshalled before
	}
	w.options.Meta = maps.Clone(is.Meta)
	delete(w.options.Meta, secretsMeta)
	if len(own) > 0 && w.options.Meta == nil {
		w.options.Meta = map[string]string{}
	}
	maps.Copy(w.options.Meta, own)
}

// store writes the environment where the job reads it, and notes its index. What else is kept there stays.
func (c *cluster) store(ctx context.Context, w *wish) error {
	w.options.EnvIndex = 0
	if len(w.items) == 0 {
		return nil
	}
	is, err := c.variable(ctx, w.options.Namespace, w.options.ID)
	if err != nil {
		return fmt.Errorf("its environment: %w", err)
	}
	items, index := api.VariableItems{}, uint64(0)
	if is != nil {
		items, index = others(is.Items), is.ModifyIndex
	}
	maps.Copy(items, w.items)
	if is == nil || !maps.Equal(is.Items, items) {
		is, _, err = c.nomad.Variables().CheckedUpdate(&api.Variable{Path: nomadjob.EnvPath(w.options.ID), Items: items, ModifyIndex: index}, c.write(ctx, w.options.Namespace))
		if isConflict(err) {
			return errors.New("somebody else writes its environment at the same time: apply again, if the name is still free")
		}
		if err != nil {
			return fmt.Errorf("its environment: %w", err)
		}
	}
	for name := range w.items {
		if nomadjob.IsEnv(name) { // a change of networks alone is none of the pod
			w.options.EnvIndex = is.ModifyIndex
		}
	}
	return nil
}

// forget removes of a job's variable what it does not need any more; kept is what it does.
func (c *cluster) forget(ctx context.Context, namespace, job string, kept api.VariableItems) error {
	is, err := c.variable(ctx, namespace, job)
	if err != nil || is == nil {
		return err
	}
	is.Items = others(is.Items)
	if maps.Copy(is.Items, kept); len(is.Items) == 0 {
		_, err = c.nomad.Variables().Delete(is.Path, c.write(ctx, namespace))
	} else {
		_, _, err = c.nomad.Variables().Update(is, c.write(ctx, namespace))
	}
	return err
}

// others are what a variable has beside what a job reads there.
func others(items api.VariableItems) api.VariableItems {
	some := maps.Clone(items)
	maps.DeleteFunc(some, func(name, _ string) bool { return nomadjob.IsEnv(name) || nomadjob.IsNetworks(name) })
	return some
}

// variable is that of a job, nil where there is none.
func (c *cluster) variable(ctx context.Context, namespace, job string) (*api.Variable, error) {
	v, _, err := c.nomad.Variables().Read(nomadjob.EnvPath(job), c.query(ctx, namespace))
	if errors.Is(err, api.ErrVariablePathNotFound) {
		return nil, nil
	}
	return v, err
}

// A found pod is one that Nomad has.
type foundPod struct {
	job     *api.Job
	pod     *spec.Pod
	options *nomadjob.Options
	stale   bool // its environment is another one than the variable's
}

// pod reads one, nil where there is no such job.
func (c *cluster) pod(ctx context.Context, namespace, name string) (*foundPod, error) {
	job, _, err := c.nomad.Jobs().Info(name, c.query(ctx, namespace))
	if isNotFound(err) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	f := &foundPod{job: job}
	var v *api.Variable
	if nomadjob.ReadsEnv(job) {
		if v, err = c.variable(ctx, namespace, name); err != nil {
			return nil, fmt.Errorf("its environment: %w", err)
		}
	}
	var items api.VariableItems
	if v != nil {
		items = v.Items
	}
	if f.pod, f.options, err = nomadjob.Pod(job, items); err != nil {
		return nil, err
	}
	hasEnv := slices.ContainsFunc(slices.Collect(maps.Keys(items)), nomadjob.IsEnv)
	f.stale = hasEnv && f.options.EnvIndex != v.ModifyIndex && !(f.options.EnvIndex == 0 && v.ModifyIndex <= *job.JobModifyIndex) // docker's name none
	return f, nil
}

func (r *podResource) Create(ctx context.Context, req resource.CreateRequest, resp *resource.CreateResponse) {
	var m, config podModel
	resp.Diagnostics.Append(req.Plan.Get(ctx, &m)...)
	if resp.Diagnostics.Append(req.Config.Get(ctx, &config)...); resp.Diagnostics.HasError() {
		return
	}
	w, err := m.wish(&config)
	if err != nil {
		resp.Diagnostics.Append(failed("The pod was not started", m.ID.ValueString(), err))
		return
	}
	is, err := r.pod(ctx, w.options.Namespace, w.options.ID)
	if err != nil {
		resp.Diagnostics.Append(failed("The pod was not started", m.ID.ValueString(), err))
		return
	}
	if resp.Diagnostics.Append(r.enter(ctx, w, &m)...); resp.Diagnostics.HasError() {
		return
	}
	if is != nil && !deref(is.job.Stop) && !w.is(is) {
		resp.Diagnostics.AddAttributeError(path.Root("name"), "There is such a job",
			fmt.Sprintf("%s exists, and is another one than this configuration has: choose another name, or take it into Terraform's state with\nterraform import ADDRESS %[1]s", m.ID.ValueString()))
		return
	}
	if is != nil && !deref(is.job.Stop) { // an apply that was killed had made it
		resp.Diagnostics.AddWarning("The pod was there", m.ID.ValueString()+" is as it should be, and is Terraform's from now on.")
	}
	resp.Diagnostics.Append(r.register(ctx, w, is, &m)...)
	if m.Status.IsUnknown() { // nothing is there
		return
	}
	resp.Diagnostics.Append(resp.State.Set(ctx, &m)...)
}

// is says whether a job is what is wished: an apply that was killed had made it.
func (w *wish) is(f *foundPod) bool {
	want := w.options
	want.EnvIndex = f.options.EnvIndex
	if w.byNetwork {
		want.Node = f.options.Node
	}
	a, err := nomadjob.Job(w.pod, want)
	if err != nil {
		return false
	}
	b, err := nomadjob.Job(f.pod, *f.options)
	return err == nil && reflect.DeepEqual(a, b) && slices.EqualFunc(w.pod.Containers, f.pod.Containers, func(a, b spec.PodContainer) bool { return slices.Equal(a.Env, b.Env) })
}

// register makes Nomad run what is wished, waits as the model says, and reads what has come of it. The model's status is unknown where nothing was registered.
func (r *podResource) register(ctx context.Context, w *wish, is *foundPod, m *podModel) (diags diag.Diagnostics) {
	m.Status = types.StringUnknown()
	first, err := nomadjob.Job(w.pod, w.options) // before anything is written
	if err != nil {
		return wrong(err)
	}
	if err := r.accepts(ctx, first, w.options.Namespace); err != nil {
		diags.Append(failed("The pod was not started", w.object(), err))
		return diags
	}
	if err := r.store(ctx, w); err != nil {
		diags.Append(failed("The pod was not started", w.object(), err))
		return diags
	}
	if is != nil && is.options.EnvIndex == 0 && w.options.EnvIndex <= *is.job.JobModifyIndex { // what its pods were started with
		w.options.EnvIndex = 0
	}
	job, err := nomadjob.Job(w.pod, w.options)
	if err != nil {
		return wrong(err)
	}
	index := uint64(0)
	if is != nil {
		index = *is.job.JobModifyIndex
	}
	made, _, err := r.nomad.Jobs().EnforceRegister(job, index, r.write(context.WithoutCancel(ctx), w.options.Namespace))
	if err != nil {
		diags.Append(failed("The pod was not started", w.object(), err))
		return diags
	}
	eval := made.EvalID
	again, err := r.settle(ctx, w, m, eval)
	if err == nil && again {
		if job, err = nomadjob.Job(w.pod, w.options); err == nil {
			made, _, err = r.nomad.Jobs().EnforceRegister(job, made.JobModifyIndex, r.write(ctx, w.options.Namespace))
		}
		if err == nil {
			eval = made.EvalID
		}
	}
	if err != nil {
		diags.Append(failed("The pod's networks were not bound to its node", w.object(), err))
	} else {
		diags.Append(r.wait(ctx, w, eval, m)...)
	}
	// What is registered has to be in the state, also of an apply that is interrupted.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), readTimeout)
	defer cancel()
	if is != nil && is.options.EnvIndex != 0 && w.options.EnvIndex == 0 {
		if err := r.forget(ctx, w.options.Namespace, w.options.ID, w.items); err != nil {
			diags.Append(failed("The pod's former environment was not removed", w.object(), err))
		}
	}
	now, err := r.pod(ctx, w.options.Namespace, w.options.ID)
	if err == nil && now == nil {
		diags.Append(failed("The pod can't be read", w.object(), errors.New("somebody has removed it meanwhile")))
		return diags
	}
	if err != nil {
		diags.Append(failed("The pod can't be read", w.object(), err))
	} else {
		diags.Append(r.view(ctx, now, m, true)...)
	}
	if m.Status.IsUnknown() { // it is there, and the next plan reads it
		m.Status, m.EnvIndex, m.Instances = types.StringValue(statusPending), types.Int64Value(int64(w.options.EnvIndex)), types.ListValueMust(instance, []attr.Value{})
		if m.Node.IsUnknown() {
			m.Node = nowText(m.Node, w.options.Node)
		}
	}
	return diags
}

// accepts says what Nomad would refuse of a job.
func (c *cluster) accepts(ctx context.Context, job *api.Job, namespace string) error {
	said, _, err := c.nomad.Jobs().Validate(job, c.write(ctx, namespace))
	if err == nil && said.Error != "" {
		err = errors.New("Nomad refuses the job: " + said.Error) //nolint:staticcheck // a name
	}
	return err
}

func deref[T any](p *T) (v T) {
	if p != nil {
		v = *p
	}
	return v
}

// view reads into a model what there is of a pod; with ask, the pod itself says what Nomad does not know.
func (c *cluster) view(ctx context.Context, f *foundPod, m *podModel, ask bool) (diags diag.Diagnostics) {
	ran := images(m.Instances)
	m.read(f.pod, f.options)
	beyond := append([]string{}, nomadjob.Beyond(f.job)...)
	if m.places(f.options) {
		beyond = append(beyond, "group.service")
	}
	beyond = append(beyond, untold(f.pod)...)
	if f.isDocker() {
		beyond = append(beyond, beyondDocker)
	}
	if err := c.joined(ctx, f, m); err != nil {
		diags.Append(failed("The pod's networks can't be read", m.ID.ValueString(), err))
		return diags
	}
	if m.WaitFor.IsNull() {
		m.WaitFor = types.StringValue(waitHealthy)
		if f.options.Service == nil {
			m.WaitFor = types.StringValue(waitEnded)
		}
	}
	m.Beyond = nowList(m.Beyond, &beyond)
	all, _, err := c.nomad.Jobs().Allocations(f.options.ID, false, c.query(ctx, f.options.Namespace))
	if err != nil {
		diags.Append(failed("The pod can't be read", m.ID.ValueString(), err))
		return diags
	}
	instances := []attr.Value{}
	running, bad, done, count := 0, 0, 0, 1
	if f.options.Service != nil {
		count = f.options.Service.Count
	}
	for _, a := range all {
		if a.ClientStatus == api.AllocClientStatusFailed && a.JobVersion == *f.job.Version && a.NextAllocation == "" {
			bad++
		}
		if f.options.Service == nil && a.ClientStatus == api.AllocClientStatusComplete && a.JobVersion == *f.job.Version && a.DesiredStatus == api.AllocDesiredStatusRun {
			done++
		}
		if a.DesiredStatus != api.AllocDesiredStatusRun || a.ClientStatus != api.AllocClientStatusRunning && a.ClientStatus != api.AllocClientStatusPending {
			continue
		}
		if a.ClientStatus == api.AllocClientStatusRunning {
			running++
		}
		ports, address := map[string]attr.Value{}, ""
		if f.options.Bridge || len(f.pod.Network.Publish) > 0 { // which a list does not tell
			one, _, err := c.nomad.Allocations().Info(a.ID, c.query(ctx, f.options.Namespace))
			if isNotFound(err) {
				continue
			}
			if err != nil {
				diags.Append(failed("The pod can't be read", m.ID.ValueString(), err))
				return diags
			}
			ports, address = places(f.pod, one)
		}
		instances = append(instances, types.ObjectValueMust(instance.AttrTypes, map[string]attr.Value{
			"id": types.StringValue(a.ID), "node": types.StringValue(a.NodeName), "status": types.StringValue(a.ClientStatus), "address": types.StringValue(address),
			"images": c.images(ctx, f, a, ran[a.ID], ask), "ports": types.MapValueMust(types.StringType, ports),
		}))
	}
	m.Instances = types.ListValueMust(instance, instances)
	switch {
	case deref(f.job.Stop):
		m.Status = types.StringValue(statusStopped)
	case bad > 0:
		m.Status = types.StringValue(statusFailed)
	case done > 0 && running == 0:
		m.Status = types.StringValue(statusEnded)
	case running >= count:
		m.Status = types.StringValue(statusRunning)
	default:
		m.Status = types.StringValue(statusPending)
	}
	return diags
}

// places are where an allocation's published ports are, and its address in the bridge network.
func places(p *spec.Pod, a *api.Allocation) (ports map[string]attr.Value, address string) {
	ports = map[string]attr.Value{}
	if a.AllocatedResources != nil {
		given := a.AllocatedResources.Shared.Ports
		for _, p := range nomadjob.Published(p, given) {
			protocol, ip := p.Protocol, p.HostIP
			if protocol == "" {
				protocol = "tcp"
			}
			for _, g := range given {
				if ip == "" && g.Value == int(p.HostPort) {
					ip = g.HostIP
				}
			}
			ports[fmt.Sprintf("%d/%s", p.Port, protocol)] = types.StringValue(hostPort(ip, p.HostPort))
		}
	}
	if a.NetworkStatus != nil {
		address = a.NetworkStatus.Address
	}
	return ports, address
}

func (r *podResource) Read(ctx context.Context, req resource.ReadRequest, resp *resource.ReadResponse) {
	var m podModel
	if resp.Diagnostics.Append(req.State.Get(ctx, &m)...); resp.Diagnostics.HasError() {
		return
	}
	f, err := r.pod(ctx, m.Namespace.ValueString(), m.Name.ValueString())
	if err != nil {
		resp.Diagnostics.Append(failed("The pod can't be read", m.ID.ValueString(), err))
		return
	}
	if f == nil && m.Once.ValueBool() && m.Status.ValueString() == statusEnded {
		return // Nomad forgets a job some time after its end: what it was for is done
	}
	if f == nil {
		resp.State.RemoveResource(ctx)
		return
	}
	resp.Diagnostics.Append(r.view(ctx, f, &m, true)...)
	var stale []byte
	if f.stale {
		stale = []byte(`true`)
	}
	resp.Diagnostics.Append(resp.Private.SetKey(ctx, staleKey, stale)...)
	resp.Diagnostics.Append(resp.State.Set(ctx, &m)...)
}

func (r *podResource) Update(ctx context.Context, req resource.UpdateRequest, resp *resource.UpdateResponse) {
	var m, config, state podModel
	resp.Diagnostics.Append(req.Plan.Get(ctx, &m)...)
	resp.Diagnostics.Append(req.State.Get(ctx, &state)...)
	if resp.Diagnostics.Append(req.Config.Get(ctx, &config)...); resp.Diagnostics.HasError() {
		return
	}
	w, err := m.wish(&config)
	var is *foundPod
	if err == nil {
		is, err = r.pod(ctx, w.options.Namespace, w.options.ID)
	}
	if err == nil && is == nil && !state.Once.ValueBool() {
		err = errors.New("somebody has removed it meanwhile: plan again")
	}
	if err != nil {
		resp.Diagnostics.Append(failed("The pod was not changed", m.ID.ValueString(), err))
		return
	}
	if resp.Diagnostics.Append(r.enter(ctx, w, &m)...); resp.Diagnostics.HasError() {
		return
	}
	if is != nil {
		w.keep(is.options)
		w.goOn(is)
		if is.isDocker() {
			if err := r.take(ctx, is); err != nil {
				resp.Diagnostics.Append(failed("The container was not taken over", m.ID.ValueString(), err))
				return
			}
		}
	}
	if w.once() && is != nil && state.Status.ValueString() == statusFailed { // the same job would not be run again
		if w.options.Meta == nil {
			w.options.Meta = map[string]string{}
		}
		n, _ := strconv.Atoi(w.options.Meta[runMeta]) // of somebody else's: 0
		w.options.Meta[runMeta] = strconv.Itoa(n + 1)
	}
	resp.Diagnostics.Append(r.register(ctx, w, is, &m)...)
	if m.Status.IsUnknown() {
		return
	}
	resp.Diagnostics.Append(resp.State.Set(ctx, &m)...)
}

// Delete ends the pods, and forgets the job only when they have ended: whoever is killed in between can do it again.
func (r *podResource) Delete(ctx context.Context, req resource.DeleteRequest, resp *resource.DeleteResponse) {
	var m podModel
	if resp.Diagnostics.Append(req.State.Get(ctx, &m)...); resp.Diagnostics.HasError() {
		return
	}
	namespace, name := m.Namespace.ValueString(), m.Name.ValueString()
	timeout := defaultWait
	if m.WaitTimeout.known() {
		timeout = m.WaitTimeout.duration()
	}
	wctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	job, _, err := r.nomad.Jobs().Info(name, r.query(ctx, namespace))
	reads := m.EnvIndex.ValueInt64() != 0 || len(m.Networks) > 0 || err == nil && nomadjob.ReadsVariable(job)
	if err == nil { // of a container that was imported, and not taken over yet
		if f := (&foundPod{job: job, options: &nomadjob.Options{Namespace: namespace}}); f.isDocker() {
			err = r.take(ctx, f)
		}
	}
	if err == nil {
		_, _, err = r.nomad.Jobs().Deregister(name, false, r.write(ctx, namespace))
	}
	if err == nil {
		err = r.ended(wctx, namespace, name)
	}
	if err == nil {
		err = r.removeDisk(wctx, namespace, name, job)
	}
	if reads && (err == nil || isNotFound(err)) {
		if forgetErr := r.forget(ctx, namespace, name, nil); forgetErr != nil {
			err = forgetErr
		}
	}
	if err == nil {
		_, _, err = r.nomad.Jobs().Deregister(name, true, r.write(ctx, namespace))
	}
	if err != nil && !isNotFound(err) {
		resp.Diagnostics.Append(failed("The pod was not removed", m.ID.ValueString(), err))
	}
}

func (r *podResource) ImportState(ctx context.Context, req resource.ImportStateRequest, resp *resource.ImportStateResponse) {
	namespace, name := r.split(req.ID)
	f, err := r.pod(ctx, namespace, name)
	if err == nil && f == nil { // docker's name of a container, maybe
		var job string
		if job, err = r.dockerJob(ctx, namespace, name); err == nil && job != "" {
			name = job
			f, err = r.pod(ctx, namespace, name)
			if err == nil && f == nil {
				err = errors.New("it is a container of docker's that does not run: docker start it first")
			}
		}
	}
	if err == nil && f != nil && f.isDocker() {
		id, _ := f.container()
		var record *dockerRecord
		if record, err = r.dockerRecord(ctx, namespace, id); err == nil {
			err = r.mayTake(ctx, f, record)
		}
		if err != nil {
			resp.Diagnostics.Append(failed("The container can't be taken over", objectID(namespace, name), err))
			return
		}
	}
	if err != nil {
		resp.Diagnostics.Append(failed("The pod can't be read", objectID(namespace, name), err))
		return
	}
	for at, value := range map[string]string{"namespace": namespace, "name": name, "wait_timeout": defaultWaitText} {
		resp.Diagnostics.Append(resp.State.SetAttribute(ctx, path.Root(at), value)...)
	}
}
