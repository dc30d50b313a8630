package provider

import (
	"encoding/json"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/hashicorp/terraform-plugin-framework/attr"
	"github.com/hashicorp/terraform-plugin-framework/types"

	"github.com/cradlestack/cradlestack/internal/nomadjob"
	"github.com/cradlestack/cradlestack/spec"
)

type podModel struct {
	ID          types.String            `tfsdk:"id"`
	Name        types.String            `tfsdk:"name"`
	Namespace   types.String            `tfsdk:"namespace"`
	Replicas    types.Int64             `tfsdk:"replicas"`
	CPUs        types.Int64             `tfsdk:"cpus"`
	Memory      sizeValue               `tfsdk:"memory"`
	Disk        sizeValue               `tfsdk:"disk"`
	Hostname    types.String            `tfsdk:"hostname"`
	Network     types.String            `tfsdk:"network"`
	Networks    map[string]networkModel `tfsdk:"networks"`
	Once        types.Bool              `tfsdk:"once"`
	Zone        types.String            `tfsdk:"zone"`
	Node        types.String            `tfsdk:"node"`
	Variant     types.String            `tfsdk:"variant"`
	Replace     types.Bool              `tfsdk:"replace_lost"`
	Restart     *restartModel           `tfsdk:"restart"`
	Rollout     *rolloutModel           `tfsdk:"rollout"`
	Containers  []containerModel        `tfsdk:"container"`
	Ports       []portModel             `tfsdk:"port"`
	Services    []serviceModel          `tfsdk:"service"`
	Constraints []constraintModel       `tfsdk:"constraint"`
	WaitFor     types.String            `tfsdk:"wait_for"`
	WaitTimeout durationValue           `tfsdk:"wait_timeout"`
	Status      types.String            `tfsdk:"status"`
	EnvIndex    types.Int64             `tfsdk:"env_index"`
	Beyond      types.List              `tfsdk:"beyond"`
	Instances   types.List              `tfsdk:"instances"`
}

type restartModel struct {
	Attempts types.Int64   `tfsdk:"attempts"`
	Interval durationValue `tfsdk:"interval"`
	Delay    durationValue `tfsdk:"delay"`
	Mode     types.String  `tfsdk:"mode"`
}

type rolloutModel struct {
	MaxParallel types.Int64   `tfsdk:"max_parallel"`
	MinHealthy  durationValue `tfsdk:"min_healthy"`
	Deadline    durationValue `tfsdk:"deadline"`
	Revert      types.Bool    `tfsdk:"auto_revert"`
}

type portModel struct {
	Port     types.Int64  `tfsdk:"port"`
	HostPort types.Int64  `tfsdk:"host_port"`
	HostIP   types.String `tfsdk:"host_ip"`
	Protocol types.String `tfsdk:"protocol"`
}

type serviceModel struct {
	Name     types.String `tfsdk:"name"`
	Port     types.Int64  `tfsdk:"port"`
	Provider types.String `tfsdk:"catalog"`
	Tags     types.List   `tfsdk:"tags"`
	Check    *checkModel  `tfsdk:"check"`
}

type checkModel struct {
	Type     types.String  `tfsdk:"type"`
	Path     types.String  `tfsdk:"path"`
	Interval durationValue `tfsdk:"interval"`
	Timeout  durationValue `tfsdk:"timeout"`
}

type constraintModel struct {
	Attribute types.String `tfsdk:"attribute"`
	Operator  types.String `tfsdk:"operator"`
	Value     types.String `tfsdk:"value"`
}

type containerModel struct {
	Name         types.String  `tfsdk:"name"`
	Image        types.String  `tfsdk:"image"`
	Entrypoint   types.List    `tfsdk:"entrypoint"`
	Command      types.List    `tfsdk:"command"`
	Env          types.Map     `tfsdk:"env"`
	Secrets      types.Map     `tfsdk:"secret_env"`
	SecretsAt    types.String  `tfsdk:"secret_env_version"`
	SecretNames  types.List    `tfsdk:"secret_env_names"`
	User         types.String  `tfsdk:"user"`
	WorkingDir   types.String  `tfsdk:"working_dir"`
	StopSignal   types.String  `tfsdk:"stop_signal"`
	StopTimeout  durationValue `tfsdk:"stop_timeout"`
	Init         types.Bool    `tfsdk:"init"`
	ReadOnly     types.Bool    `tfsdk:"read_only"`
	Privileged   types.Bool    `tfsdk:"privileged"`
	CapAdd       types.List    `tfsdk:"cap_add"`
	CapDrop      types.List    `tfsdk:"cap_drop"`
	Labels       types.Map     `tfsdk:"labels"`
	Memory       sizeValue     `tfsdk:"memory"`
	Health       *healthModel  `tfsdk:"healthcheck"`
	Restart      types.String  `tfsdk:"restart"`
	RestartDelay durationValue `tfsdk:"restart_delay"`
	MaxStarts    types.Int64   `tfsdk:"max_starts"`
	Critical     types.Bool    `tfsdk:"critical"`
	After        []afterModel  `tfsdk:"after"`
	Mounts       []mountModel  `tfsdk:"mount"`
}

type healthModel struct {
	Test        types.List    `tfsdk:"test"`
	Interval    durationValue `tfsdk:"interval"`
	Timeout     durationValue `tfsdk:"timeout"`
	StartPeriod durationValue `tfsdk:"start_period"`
	Retries     types.Int64   `tfsdk:"retries"`
}

type afterModel struct {
	Container types.String `tfsdk:"container"`
	Until     types.String `tfsdk:"until"`
}

type mountModel struct {
	Path     types.String `tfsdk:"path"`
	Volume   types.String `tfsdk:"volume"`
	Shared   types.Bool   `tfsdk:"shared"`
	Scratch  types.String `tfsdk:"scratch"`
	HostPath types.String `tfsdk:"host_path"`
	Subpath  types.String `tfsdk:"subpath"`
	ReadOnly types.Bool   `tfsdk:"read_only"`
	NoCopy   types.Bool   `tfsdk:"no_copy"`
}

// instance is the type of what runs.
var instance = types.ObjectType{AttrTypes: map[string]attr.Type{
	"id": types.StringType, "node": types.StringType, "status": types.StringType, "address": types.StringType, "images": types.MapType{ElemType: types.StringType}, "ports": types.MapType{ElemType: types.StringType},
}}

// What a container does when it ends.
const (
	restartNo        = "no"
	restartOnFailure = "on-failure"
	restartAlways    = "always"
)

// How the pod is in the network.
const (
	networkUser   = "user"
	networkBridge = "bridge"
	networkNone   = "none"
)

// Which class stands for who may have a volume: a job says only that.
const (
	exclusiveClass = "lv2"
	sharedClass    = "nfs"
)

// secretsMeta is the name of what a job keeps of Terraform's: the names of the secrets in its containers' environments, as a JSON object by the containers' names.
const secretsMeta = "terraform_secrets"

func strs(l types.List) []string {
	if l.IsNull() || l.IsUnknown() {
		return nil
	}
	out := []string{}
	for _, e := range l.Elements() {
		out = append(out, e.(types.String).ValueString())
	}
	return out
}

func argv(l types.List) *[]string {
	if l.IsNull() || l.IsUnknown() {
		return nil
	}
	s := strs(l)
	return &s
}

func pairs(m types.Map) map[string]string {
	if len(m.Elements()) == 0 {
		return nil
	}
	out := map[string]string{}
	for name, v := range m.Elements() {
		out[name] = v.(types.String).ValueString()
	}
	return out
}

func (v quantity[U]) duration() time.Duration { return time.Duration(v.number()) }

// pod is what a plan asks for. secrets are those of its containers, which no plan keeps.
func (m *podModel) pod(secrets []map[string]string) (*spec.Pod, nomadjob.Options) {
	p := &spec.Pod{
		Name: m.Name.ValueString(), Hostname: m.Hostname.ValueString(), Resources: spec.Resources{Memory: spec.Bytes(m.Memory.number()), CPUs: int(m.CPUs.ValueInt64())},
		Scratch: spec.Scratch{Size: spec.Bytes(m.Disk.number())},
	}
	o := nomadjob.Options{
		ID: p.Name, Namespace: m.Namespace.ValueString(), Node: m.Node.ValueString(), Zone: m.Zone.ValueString(), Replace: m.Replace.ValueBool(), Variant: m.Variant.ValueString(),
		Service: &nomadjob.Service{Count: int(m.Replicas.ValueInt64()), Restart: nomadjob.DefaultRestart, Update: nomadjob.DefaultUpdate},
	}
	switch {
	case m.Network.ValueString() == networkBridge, len(m.Networks) > 0: // which these are is found before it is started
		o.Bridge = true
	case m.Network.ValueString() == networkNone:
		p.Network.Mode = "none"
	}
	if m.Once.ValueBool() {
		o.Service = nil
	}
	if r := m.Restart; r != nil && o.Service != nil {
		o.Service.Restart = nomadjob.Restart{Attempts: int(r.Attempts.ValueInt64()), Interval: r.Interval.duration(), Delay: r.Delay.duration(), Wait: r.Mode.ValueString() == "delay"}
	}
	if r := m.Rollout; r != nil && o.Service != nil {
		o.Service.Update = nomadjob.Update{MaxParallel: int(r.MaxParallel.ValueInt64()), MinHealthy: r.MinHealthy.duration(), Deadline: r.Deadline.duration(), Revert: r.Revert.ValueBool()}
	}
	for _, c := range m.Constraints {
		o.Constraints = append(o.Constraints, nomadjob.Constraint{Attribute: c.Attribute.ValueString(), Operator: c.Operator.ValueString(), Value: c.Value.ValueString()})
	}
	for _, port := range m.Ports {
		one := spec.Publish{Port: uint16(port.Port.ValueInt64()), HostPort: uint16(port.HostPort.ValueInt64()), HostIP: port.HostIP.ValueString(), Protocol: port.Protocol.ValueString()}
		if one.Protocol == "tcp" {
			one.Protocol = ""
		}
		p.Network.Publish = append(p.Network.Publish, one)
	}
	for _, s := range m.Services {
		e := nomadjob.Endpoint{Name: s.Name.ValueString(), Port: uint16(s.Port.ValueInt64()), Provider: s.Provider.ValueString(), Tags: strs(s.Tags)}
		if c := s.Check; c != nil {
			e.Check = &nomadjob.Check{Type: c.Type.ValueString(), Path: c.Path.ValueString(), Interval: c.Interval.duration(), Timeout: c.Timeout.duration()}
		}
		if o.Service != nil {
			o.Service.Endpoints = append(o.Service.Endpoints, e)
		}
	}
	names, named := map[string][]string{}, map[string]bool{}
	for i := range m.Containers {
		for _, from := range m.Containers[i].Mounts {
			named[from.Volume.ValueString()], named[from.Scratch.ValueString()] = true, true
		}
	}
	for i := range m.Containers {
		one := m.Containers[i].container(p, named)
		if hidden := at(secrets, i); len(hidden) > 0 {
			one.Env, names[one.Name] = environment(pairs(m.Containers[i].Env), hidden), slices.Sorted(maps.Keys(hidden))
		}
		if m.Containers[i].Critical.IsNull() {
			one.Lifecycle.Critical = i == 0
		}
		p.Containers = append(p.Containers, one)
	}
	if len(names) > 0 {
		text, err := json.Marshal(names)
		if err != nil {
			panic(err) // texts
		}
		o.Meta = map[string]string{secretsMeta: string(text)}
	}
	return p, o
}

// secretNames are the names of what nobody is told the values of.
func secretNames(secrets types.Map) types.List {
	if secrets.IsUnknown() {
		return types.ListUnknown(types.StringType)
	}
	return textsOf(slices.Collect(maps.Keys(secrets.Elements())))
}

// textsOf is a list in order, null for an empty one.
func textsOf(all []string) types.List {
	if len(all) == 0 {
		return types.ListNull(types.StringType)
	}
	all = slices.Sorted(slices.Values(all))
	return nowList(types.ListNull(types.StringType), &all)
}

// environment is a container's: NAME=value, sorted.
func environment(all ...map[string]string) (out []string) {
	for _, some := range all {
		for name, value := range some {
			out = append(out, name+"="+value)
		}
	}
	slices.Sort(out)
	return out
}

// container is one of the pod, to whose volumes it adds those that it mounts. named are those of the pod that have a name.
func (m *containerModel) container(p *spec.Pod, named map[string]bool) spec.PodContainer {
	c := spec.PodContainer{
		Name: m.Name.ValueString(), Image: m.Image.ValueString(), Entrypoint: argv(m.Entrypoint), Command: argv(m.Command), Env: environment(pairs(m.Env)), User: m.User.ValueString(),
		WorkingDir: m.WorkingDir.ValueString(), StopSignal: m.StopSignal.ValueString(),
	}
	c.Settings = spec.Settings{
		Init: m.Init.ValueBool(), ReadOnly: m.ReadOnly.ValueBool(), Privileged: m.Privileged.ValueBool(), CapAdd: strs(m.CapAdd), CapDrop: strs(m.CapDrop), Labels: pairs(m.Labels),
		Resources: spec.Limits{Memory: spec.Bytes(m.Memory.number())},
		Lifecycle: spec.Lifecycle{
			RestartOnFailure: m.Restart.ValueString() == restartOnFailure || m.Restart.ValueString() == restartAlways, RestartOnSuccess: m.Restart.ValueString() == restartAlways,
			RestartDelay: spec.Duration(m.RestartDelay.number()), MaxStarts: int(m.MaxStarts.ValueInt64()), Critical: m.Critical.ValueBool(),
		},
	}
	if m.StopTimeout.known() {
		d := spec.Duration(m.StopTimeout.number())
		c.StopTimeout = &d
	}
	if h := m.Health; h != nil {
		c.Healthcheck = &spec.Healthcheck{
			Test: strs(h.Test), Interval: spec.Duration(h.Interval.number()), Timeout: spec.Duration(h.Timeout.number()), StartPeriod: spec.Duration(h.StartPeriod.number()), Retries: int(h.Retries.ValueInt64()),
		}
	}
	for _, a := range m.After {
		c.Lifecycle.After = append(c.Lifecycle.After, spec.After{Container: a.Container.ValueString(), Until: a.Until.ValueString()})
	}
	for _, from := range m.Mounts {
		made := spec.Mount{Path: from.Path.ValueString(), Subpath: from.Subpath.ValueString(), ReadOnly: from.ReadOnly.ValueBool(), NoCopy: from.NoCopy.ValueBool()}
		var v spec.Volume
		switch {
		case from.Volume.ValueString() != "":
			v = spec.Volume{Name: from.Volume.ValueString(), Class: exclusiveClass}
			if from.Shared.ValueBool() {
				v.Class = sharedClass
			}
		case from.Scratch.ValueString() != "":
			v = spec.Volume{Name: from.Scratch.ValueString(), Scratch: &spec.ScratchVolume{}}
		default:
			v.Name = nomadjob.Directory(p, spec.DirectoryVolume{Path: from.HostPath.ValueString()}, made.Path, named)
		}
		made.Volume = v.Name
		if !slices.ContainsFunc(p.Volumes, func(o spec.Volume) bool { return o.Name == v.Name }) {
			p.Volumes = append(p.Volumes, v)
		}
		c.Mounts = append(c.Mounts, made)
	}
	return c
}

// What follows reads a pod into a model, and leaves what somebody has written as it is where it says the same.

func nowText(was types.String, is string) types.String {
	if !was.IsUnknown() && was.ValueString() == is {
		return was
	}
	if is == "" {
		return types.StringNull()
	}
	return types.StringValue(is)
}

func nowBool(was types.Bool, is bool) types.Bool {
	if !was.IsUnknown() && was.ValueBool() == is {
		return was
	}
	return types.BoolValue(is)
}

func nowInt(was types.Int64, is int64) types.Int64 {
	if !was.IsUnknown() && was.ValueInt64() == is {
		return was
	}
	return types.Int64Value(is)
}

// nowList is null for no list; an empty one is one.
func nowList(was types.List, is *[]string) types.List {
	if is == nil {
		return types.ListNull(types.StringType)
	}
	if !was.IsNull() && !was.IsUnknown() && slices.Equal(strs(was), *is) {
		return was
	}
	all := []attr.Value{}
	for _, s := range *is {
		all = append(all, types.StringValue(s))
	}
	return types.ListValueMust(types.StringType, all)
}

// nowStrings is nowList where an empty list says as much as none.
func nowStrings(was types.List, is []string) types.List {
	if len(is) > 0 {
		return nowList(was, &is)
	}
	if !was.IsNull() && !was.IsUnknown() && len(was.Elements()) == 0 {
		return was
	}
	return types.ListNull(types.StringType)
}

func nowMap(was types.Map, is map[string]string) types.Map {
	if !was.IsUnknown() && maps.Equal(pairs(was), is) {
		if was.IsNull() {
			return types.MapNull(types.StringType)
		}
		return was
	}
	if len(is) == 0 {
		return types.MapNull(types.StringType)
	}
	all := map[string]attr.Value{}
	for name, value := range is {
		all[name] = types.StringValue(value)
	}
	return types.MapValueMust(types.StringType, all)
}

// at is an element of a list as it was, or a new one.
func at[T any](was []T, i int) (t T) {
	if i < len(was) {
		t = was[i]
	}
	return t
}

// read sets everything that a job says.
func (m *podModel) read(p *spec.Pod, o *nomadjob.Options) {
	m.ID, m.Name, m.Namespace = types.StringValue(objectID(o.Namespace, o.ID)), types.StringValue(o.ID), types.StringValue(o.Namespace)
	memory := int64(p.Resources.Memory)
	if m.Memory.known() && int64(nomadjob.MemoryMB(spec.Bytes(m.Memory.number())))<<20 == memory { // a job has whole MiB
		memory = m.Memory.number()
	}
	m.CPUs, m.Memory, m.Disk = types.Int64Value(max(int64(p.Resources.CPUs), 1)), m.Memory.now(memory), m.Disk.now(int64(p.Scratch.Size))
	m.Hostname, m.Zone, m.Node, m.Variant = nowText(m.Hostname, p.Hostname), nowText(m.Zone, o.Zone), nowText(m.Node, o.Node), nowText(m.Variant, o.Variant)
	m.Replace = types.BoolValue(o.Replace)
	m.EnvIndex = types.Int64Value(int64(o.EnvIndex))
	m.Network = types.StringValue(networkUser)
	if o.Bridge {
		m.Network = types.StringValue(networkBridge)
	} else if p.Network.Mode == "none" {
		m.Network = types.StringValue(networkNone)
	}
	m.Once = types.BoolValue(o.Service == nil)
	s := o.Service
	if s == nil {
		s = &nomadjob.Service{Count: 1, Restart: nomadjob.DefaultRestart, Update: nomadjob.DefaultUpdate}
	}
	m.service(s)
	was := m.Constraints
	m.Constraints = []constraintModel{}
	for i, c := range o.Constraints {
		w := at(was, i)
		m.Constraints = append(m.Constraints, constraintModel{nowText(w.Attribute, c.Attribute), types.StringValue(c.Operator), nowText(w.Value, c.Value)})
	}
	ports := m.Ports
	m.Ports = []portModel{}
	for i, one := range p.Network.Publish {
		protocol := one.Protocol
		if protocol == "" {
			protocol = "tcp"
		}
		w := at(ports, i)
		m.Ports = append(m.Ports, portModel{types.Int64Value(int64(one.Port)), nowNumber(w.HostPort, int64(one.HostPort)), nowText(w.HostIP, one.HostIP), types.StringValue(protocol)})
	}
	var secrets map[string][]string
	_ = json.Unmarshal([]byte(o.Meta[secretsMeta]), &secrets) // of somebody else's: there are none
	containers := m.Containers
	m.Containers = []containerModel{}
	for i := range p.Containers {
		w := at(containers, i)
		w.read(&p.Containers[i], p, i == 0, secrets[p.Containers[i].Name])
		m.Containers = append(m.Containers, w)
	}
}

// nowNumber is null for 0, which says nothing.
func nowNumber(was types.Int64, is int64) types.Int64 {
	if is == 0 && was.IsNull() {
		return types.Int64Null()
	}
	return nowInt(was, is)
}

func (m *podModel) service(s *nomadjob.Service) {
	m.Replicas = types.Int64Value(int64(s.Count))
	if m.Restart == nil {
		m.Restart = &restartModel{}
	}
	mode := "fail"
	if s.Restart.Wait {
		mode = "delay"
	}
	r, u := m.Restart, m.Rollout
	m.Restart = &restartModel{types.Int64Value(int64(s.Restart.Attempts)), r.Interval.set(s.Restart.Interval), r.Delay.set(s.Restart.Delay), types.StringValue(mode)}
	if u == nil {
		u = &rolloutModel{}
	}
	m.Rollout = &rolloutModel{types.Int64Value(int64(s.Update.MaxParallel)), u.MinHealthy.set(s.Update.MinHealthy), u.Deadline.set(s.Update.Deadline), types.BoolValue(s.Update.Revert)}
	was := m.Services
	m.Services = []serviceModel{}
	for i, e := range s.Endpoints {
		w := at(was, i)
		made := serviceModel{types.StringValue(e.Name), types.Int64Value(int64(e.Port)), types.StringValue(e.Provider), nowStrings(w.Tags, e.Tags), nil}
		if c := e.Check; c != nil {
			if w.Check == nil {
				w.Check = &checkModel{}
			}
			made.Check = &checkModel{types.StringValue(c.Type), nowText(w.Check.Path, c.Path), w.Check.Interval.set(c.Interval), w.Check.Timeout.set(c.Timeout)}
		}
		m.Services = append(m.Services, made)
	}
}

// set is now for what has a value in any case.
func (v quantity[U]) set(d time.Duration) quantity[U] {
	if v.known() && v.number() == int64(d) {
		return v
	}
	return quantityOf[U](int64(d))
}

func (m *containerModel) read(c *spec.PodContainer, p *spec.Pod, own bool, secrets []string) {
	m.Name, m.Image = types.StringValue(c.Name), types.StringValue(c.Image)
	m.Entrypoint, m.Command = nowList(m.Entrypoint, c.Entrypoint), nowList(m.Command, c.Command)
	env := map[string]string{}
	for _, e := range c.Env {
		if name, value, ok := strings.Cut(e, "="); ok && !slices.Contains(secrets, name) {
			env[name] = value
		}
	}
	m.Env, m.Secrets, m.SecretNames = nowMap(m.Env, env), types.MapNull(types.StringType), textsOf(secrets)
	m.User, m.WorkingDir, m.StopSignal = nowText(m.User, c.User), nowText(m.WorkingDir, c.WorkingDir), nowText(m.StopSignal, c.StopSignal)
	stop := time.Duration(0)
	if c.StopTimeout != nil {
		stop = time.Duration(*c.StopTimeout)
	}
	if own && c.StopTimeout == nil && m.StopTimeout.known() && m.StopTimeout.duration() == spec.DefaultStopTimeout {
		stop = spec.DefaultStopTimeout // a job does not tell it from none
	}
	if !own && c.StopTimeout == nil {
		stop = m.StopTimeout.duration()
	}
	m.StopTimeout = m.StopTimeout.now(int64(stop))
	m.Init, m.ReadOnly, m.Privileged = nowBool(m.Init, c.Init), nowBool(m.ReadOnly, c.ReadOnly), nowBool(m.Privileged, c.Privileged)
	m.CapAdd, m.CapDrop = nowStrings(m.CapAdd, c.CapAdd), nowStrings(m.CapDrop, c.CapDrop)
	m.Labels, m.Memory = nowMap(m.Labels, c.Labels), m.Memory.now(int64(c.Resources.Memory))
	l := c.Lifecycle
	restart := restartNo
	if l.RestartOnFailure {
		restart = restartOnFailure
		if l.RestartOnSuccess {
			restart = restartAlways
		}
	}
	m.Restart = types.StringValue(restart)
	m.RestartDelay, m.MaxStarts = m.RestartDelay.now(int64(l.RestartDelay)), nowNumber(m.MaxStarts, int64(l.MaxStarts))
	if !m.Critical.IsNull() || l.Critical != own {
		m.Critical = types.BoolValue(l.Critical)
	}
	if h := c.Healthcheck; h != nil {
		w := m.Health
		if w == nil {
			w = &healthModel{}
		}
		m.Health = &healthModel{nowStrings(w.Test, h.Test), w.Interval.now(int64(h.Interval)), w.Timeout.now(int64(h.Timeout)), w.StartPeriod.now(int64(h.StartPeriod)), nowNumber(w.Retries, int64(h.Retries))}
	} else {
		m.Health = nil
	}
	was := m.After
	m.After = nil
	if was != nil {
		m.After = []afterModel{}
	}
	for i, a := range l.After {
		until := a.Until
		if until == "" {
			until = "started"
		}
		w := at(was, i)
		if w.Until.ValueString() != until && !(w.Until.IsNull() && until == "started") {
			w.Until = types.StringValue(until)
		}
		m.After = append(m.After, afterModel{types.StringValue(a.Container), w.Until})
	}
	m.mounts(c, p)
}

// mounts keeps the order in which they are written: a job has those of volumes apart.
func (m *containerModel) mounts(c *spec.PodContainer, p *spec.Pod) {
	was := m.Mounts
	place := func(path string) int {
		if i := slices.IndexFunc(was, func(w mountModel) bool { return w.Path.ValueString() == path }); i >= 0 {
			return i
		}
		return len(was)
	}
	m.Mounts = []mountModel{}
	for _, from := range c.Mounts {
		v := p.Volumes[slices.IndexFunc(p.Volumes, func(v spec.Volume) bool { return v.Name == from.Volume })] // validated
		var w mountModel
		if i := place(from.Path); i < len(was) {
			w = was[i]
		}
		made := mountModel{Path: types.StringValue(from.Path), Subpath: nowText(w.Subpath, from.Subpath), ReadOnly: nowBool(w.ReadOnly, from.ReadOnly), NoCopy: nowBool(w.NoCopy, from.NoCopy), Shared: nowBool(w.Shared, false)}
		switch {
		case v.Class != "":
			made.Volume, made.Shared = types.StringValue(v.Name), nowBool(w.Shared, v.Class != exclusiveClass)
		case v.Scratch != nil:
			made.Scratch = types.StringValue(v.Name)
		case v.Directory != nil:
			made.HostPath = types.StringValue(v.Directory.Path)
		}
		m.Mounts = append(m.Mounts, made)
	}
	slices.SortStableFunc(m.Mounts, func(a, b mountModel) int { return place(a.Path.ValueString()) - place(b.Path.ValueString()) })
}

// hostPort is where a published port is.
func hostPort(ip string, port uint16) string {
	if strings.Contains(ip, ":") {
		ip = "[" + ip + "]"
	}
	return ip + ":" + strconv.Itoa(int(port))
}
