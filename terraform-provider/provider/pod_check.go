package provider

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/hashicorp/terraform-plugin-framework/diag"
	"github.com/hashicorp/terraform-plugin-framework/path"
	"github.com/hashicorp/terraform-plugin-framework/resource"
	"github.com/hashicorp/terraform-plugin-framework/tfsdk"
	"github.com/hashicorp/terraform-plugin-framework/types"
	"github.com/hashicorp/terraform-plugin-go/tftypes"

	"github.com/cradlestack/cradlestack/internal/nomadjob"
	"github.com/cradlestack/cradlestack/spec"
)

// ValidateConfig looks at a pod as a whole. What depends on something that is not known yet is looked at when Terraform asks again, which it does before it
// applies.
func (r *podResource) ValidateConfig(ctx context.Context, req resource.ValidateConfigRequest, resp *resource.ValidateConfigResponse) {
	said := tfsdk.Config{Raw: withoutOpen(req.Config.Raw), Schema: req.Config.Schema}
	var m podModel
	if resp.Diagnostics.Append(said.Get(ctx, &m)...); resp.Diagnostics.HasError() {
		return
	}
	resp.Diagnostics.Append(m.check(req.Config.Raw)...)
}

// check tells what no job can say of what is written. What is not known yet of the configuration is nothing in the model, or unknown.
func (m *podModel) check(config tftypes.Value) (told diag.Diagnostics) {
	tell := func(all diag.Diagnostics) {
		for _, d := range all {
			if at, ok := d.(diag.DiagnosticWithPath); config.IsFullyKnown() || ok && !open(config, at.Path()) {
				told.Append(d)
			}
		}
	}
	if tell(m.problems()); told.HasError() {
		return told
	}
	a := m.apart(config)
	if a.Memory.IsNull() { // what has a default is null in a configuration
		a.Memory = newSize(spec.DefaultMemory)
	}
	_, err := nomadjob.Job(a.pod(nil))
	tell(wrong(err))
	return told
}

// problems are what one can see without making a job.
func (m *podModel) problems() (diags diag.Diagnostics) {
	containers := path.Root("container")
	if len(m.Containers) == 0 {
		diags.AddError("No container", "A pod has at least one container block.")
		return diags
	}
	diags.Append(m.checkNetworks()...)
	if !m.Once.IsUnknown() {
		diags.Append(m.checkOnce()...)
	}
	diags.Append(m.checkNomad()...)
	kinds := map[string]string{} // of volumes, by their names
	for i := range m.Containers {
		c, at := &m.Containers[i], containers.AtListIndex(i)
		for name := range c.Labels.Elements() {
			if problem := labelProblem(name); problem != "" {
				diags.AddAttributeError(at.AtName("labels").AtMapKey(name), "Not possible", problem)
			}
		}
		if i > 0 {
			if !c.StopTimeout.IsNull() {
				diags.AddAttributeError(at.AtName("stop_timeout"), "Of the first container alone", "stop_timeout of a further container has no place in a job: leave it out, or let that container be the first.")
			}
		} else if !c.Memory.IsNull() {
			diags.AddAttributeError(at.AtName("memory"), "Of further containers", "What the first container may use is the pod's: set the pod's memory.")
		}
		both := pairs(c.Secrets)
		for name := range both {
			if _, ok := c.Env.Elements()[name]; ok {
				diags.AddAttributeError(at.AtName("env").AtMapKey(name), "Said twice", name+" is in secret_env as well: leave one of them out.")
			}
		}
		if len(both) > 0 && c.SecretsAt.IsNull() {
			diags.AddAttributeError(at.AtName("secret_env_version"), "Missing", "Terraform does not see a change of secret_env: it needs a text beside it that changes with it.")
		}
		for j, mount := range c.Mounts {
			said := 0
			for _, s := range []types.String{mount.Volume, mount.Scratch, mount.HostPath} {
				if s.ValueString() != "" {
					said++
				}
			}
			if said != 1 {
				diags.AddAttributeError(at.AtName("mount").AtListIndex(j), "Not one thing", "A mount is one of volume, scratch and host_path.")
			}
			for kind, name := range map[string]types.String{"volume": mount.Volume, "scratch": mount.Scratch} {
				if mount.Shared.IsUnknown() {
					continue
				}
				if kind == "volume" && mount.Shared.ValueBool() {
					kind = "volume with shared = true"
				}
				if other := kinds[name.ValueString()]; name.ValueString() != "" && other != "" && other != kind {
					diags.AddAttributeError(at.AtName("mount").AtListIndex(j), "Two things by a name", fmt.Sprintf("%s is a %s of this pod, and a %s: give the scratch volume another name, or say of both mounts whether the volume is shared.", name.ValueString(), other, kind))
				}
				kinds[name.ValueString()] = kind
			}
			if mount.Shared.ValueBool() && mount.Volume.ValueString() == "" && !mount.Volume.IsUnknown() {
				diags.AddAttributeError(at.AtName("mount").AtListIndex(j).AtName("shared"), "Not of this mount", "Only a volume can be shared with other pods.")
			}
			if mount.Shared.IsUnknown() || mount.ReadOnly.IsUnknown() {
				continue
			}
			if mount.Volume.ValueString() != "" && !mount.Shared.ValueBool() && !mount.ReadOnly.ValueBool() && m.Replicas.ValueInt64() > 1 {
				diags.AddAttributeError(path.Root("replicas"), "One at a time", "Volume "+mount.Volume.ValueString()+" is for one pod at a time: set shared = true with a volume of class nfs or gfs, or have one pod.")
			}
		}
	}
	return diags
}

// What Nomad's jobs may say (nomad/structs RestartPolicy, UpdateStrategy, ServiceCheck and Constraint, Validate).
const (
	leastInterval = 5 * time.Second // within which restarts are counted
	leastCheck    = time.Second
)

// serviceRule is Nomad's and DNS's.
var serviceRule = regexp.MustCompile(`^[a-zA-Z0-9]([a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?$`)

// checkNomad tells what Nomad would refuse of what a job hands on to it as it is.
func (m *podModel) checkNomad() (diags diag.Diagnostics) {
	if r := m.Restart; r != nil {
		at, d := path.Root("restart"), nomadjob.DefaultRestart
		attempts, interval, delay := d.Attempts, r.Interval.or(d.Interval), r.Delay.or(d.Delay)
		if !r.Attempts.IsNull() {
			attempts = int(r.Attempts.ValueInt64())
		}
		switch {
		case interval < leastInterval:
			diags.AddAttributeError(at, "Not possible", fmt.Sprintf("interval: %v is too short: at least %v.", interval, leastInterval))
		case delay > 0 && attempts > int(interval/delay):
			diags.AddAttributeError(at, "Not possible", fmt.Sprintf("%d attempts with a delay of %v do not fit into an interval of %v.", attempts, delay, interval))
		case attempts == 0 && r.Mode.ValueString() == "delay":
			diags.AddAttributeError(at, "Not possible", "Without attempts there is nothing to go on with after the interval: leave mode out, or write some attempts.")
		}
	}
	if r := m.Rollout; r != nil {
		d := nomadjob.DefaultUpdate
		if healthy, deadline := r.MinHealthy.or(d.MinHealthy), r.Deadline.or(d.Deadline); healthy >= deadline {
			diags.AddAttributeError(path.Root("rollout"), "Not possible", fmt.Sprintf("A pod has to be well for %v, and is given up after %v: let deadline be longer than min_healthy.", healthy, deadline))
		}
	}
	catalog := ""
	seen := map[string]int{}
	for i, s := range m.Services {
		at := path.Root("service").AtListIndex(i)
		if name := s.Name.ValueString(); !s.Name.IsUnknown() {
			if !serviceRule.MatchString(name) {
				diags.AddAttributeError(at.AtName("name"), "Not possible", fmt.Sprintf("%q is no name of a service: write letters, digits and -, a letter or digit first and last, at most 63.", name))
			}
			place := name + " " + s.Port.String()
			if other, ok := seen[place]; ok && !s.Port.IsUnknown() {
				diags.AddAttributeError(at.AtName("name"), "Said twice", fmt.Sprintf("Service %s at port %v is the %s block of that kind as well: leave one out.", name, s.Port, ordinal(other)))
			}
			seen[place] = i
		}
		if !s.Provider.IsUnknown() {
			is := s.Provider.ValueString()
			if s.Provider.IsNull() {
				is = catalogNomad
			}
			switch {
			case catalog != "" && is != catalog:
				diags.AddAttributeError(at.AtName("catalog"), "One catalog", fmt.Sprintf("Services of a pod are in one catalog: another one is in %s.", catalog))
			case is != catalogNomad && len(m.Networks) > 0:
				diags.AddAttributeError(at.AtName("catalog"), "One catalog", "Services of a pod are in one catalog, and its networks are in Nomad's: leave catalog out, or take the pod off its networks.")
			}
			catalog = is
		}
		c := s.Check
		if c == nil {
			continue
		}
		at = at.AtName("check") // Terraform finds no line for what is deeper
		switch {
		case c.Type.ValueString() == "http" && c.Path.ValueString() == "" && !c.Path.IsUnknown():
			diags.AddAttributeError(at, "Missing", "A check of type http asks for something: write path = \"/\".")
		case c.Type.ValueString() == "http" && !c.Path.IsUnknown() && !strings.HasPrefix(c.Path.ValueString(), "/"):
			diags.AddAttributeError(at, "Not possible", fmt.Sprintf("path: %q is no path: write it from /.", c.Path.ValueString()))
		}
		for name, d := range map[string]durationValue{"interval": c.Interval, "timeout": c.Timeout} {
			if d.known() && d.duration() < leastCheck {
				diags.AddAttributeError(at, "Not possible", fmt.Sprintf("%s: %s is too short: at least %v.", name, d.ValueString(), leastCheck))
			}
		}
	}
	for i, c := range m.Constraints {
		if name, problem := c.problem(); problem != "" {
			diags.AddAttributeError(path.Root("constraint").AtListIndex(i).AtName(name), "Not possible", problem)
		}
	}
	return diags
}

func ordinal(i int) string { return strconv.Itoa(i+1) + "." }

// Operators of constraints by what they need: both sides, the attribute alone, or nothing of both.
var (
	compares = []string{"=", "==", "is", "!=", "not", "<", "<=", ">", ">=", "regexp", "version", "semver", "set_contains", "set_contains_all", "set_contains_any"}
	isThere  = []string{"is_set", "is_not_set"}
)

// problem is what is wrong with a constraint, and with which attribute of it.
func (c *constraintModel) problem() (at, problem string) {
	operator, value := c.Operator.ValueString(), c.Value.ValueString()
	if operator == "" {
		operator = "="
	}
	attribute := !c.Attribute.IsUnknown() && c.Attribute.ValueString() == ""
	switch {
	case c.Operator.IsUnknown():
	case operator == "distinct_hosts":
	case operator != "distinct_property" && !slices.Contains(compares, operator) && !slices.Contains(isThere, operator):
		return "operator", fmt.Sprintf("%q is none of %s, distinct_hosts, distinct_property", operator, strings.Join(slices.Concat(compares, isThere), ", "))
	case attribute:
		return "attribute", "It is missing: write such as ${attr.cpu.arch}, with $$ in a configuration."
	case c.Value.IsUnknown():
	case operator == "distinct_property":
		if n, err := strconv.ParseUint(value, 10, 64); value != "" && (err != nil || n == 0) {
			return "value", fmt.Sprintf("%q is no number of pods: write at least 1, or leave it out for 1.", value)
		}
	case slices.Contains(isThere, operator):
		if value != "" {
			return "value", fmt.Sprintf("%s compares with nothing: leave it out.", operator)
		}
	case value == "":
		return "value", fmt.Sprintf("It is missing: %s compares the attribute with it.", operator)
	case operator == "regexp":
		if _, err := regexp.Compile(value); err != nil {
			return "value", err.Error()
		}
	}
	return "", ""
}

// apart is the model without what one attribute says of another that is not known yet.
func (m *podModel) apart(config tftypes.Value) *podModel {
	a := *m
	if config.IsFullyKnown() {
		return &a
	}
	ports := open(config, path.Root("port"))
	if ports || open(config, path.Root("network")) || open(config, path.Root("networks")) {
		a.Services = nil // whose ports may be reached
	}
	if ports {
		a.Ports = slices.Clone(a.Ports)
		for i := range a.Ports {
			a.Ports[i].HostPort, a.Ports[i].HostIP = types.Int64Null(), types.StringNull()
		}
	}
	named := !slices.ContainsFunc(a.Containers, func(c containerModel) bool { return c.Name.IsUnknown() })
	a.Containers = slices.Clone(a.Containers)
	for i := range a.Containers {
		c := &a.Containers[i]
		if !named {
			c.After = nil
		}
		if c.Entrypoint.IsUnknown() {
			c.Command = types.ListNull(types.StringType)
		}
	}
	return &a
}

// checkOnce tells what a pod that runs once has not.
func (m *podModel) checkOnce() (diags diag.Diagnostics) {
	if !m.Once.ValueBool() {
		if m.WaitFor.ValueString() == waitEnded {
			diags.AddAttributeError(path.Root("wait_for"), "Of pods that run once", "Nomad keeps this pod running: set once = true, or wait until it is running or healthy.")
		}
		return diags
	}
	for name, said := range map[string]bool{
		"restart": !m.Restart.usual(), "rollout": !m.Rollout.usual(), "service": len(m.Services) > 0, "replicas": !m.Replicas.IsNull() && m.Replicas.ValueInt64() != 1,
	} {
		if said {
			diags.AddAttributeError(path.Root(name), "Not of pods that run once", "A pod with once = true is started one time: leave "+name+" out.")
		}
	}
	if m.WaitFor.ValueString() == waitHealthy {
		diags.AddAttributeError(path.Root("wait_for"), "Not of pods that run once", "Wait until it is running or completed.")
	}
	return diags
}

// usual says whether nothing is said but what is so by default, as in what Terraform writes of an import.
func (r *restartModel) usual() bool {
	d := nomadjob.DefaultRestart
	return r == nil || saysNo(r.Attempts, d.Attempts) && (r.Interval.IsNull() || r.Interval.duration() == d.Interval) && (r.Delay.IsNull() || r.Delay.duration() == d.Delay) && r.Mode.ValueString() != "delay"
}

func (r *rolloutModel) usual() bool {
	d := nomadjob.DefaultUpdate
	return r == nil || saysNo(r.MaxParallel, d.MaxParallel) && (r.MinHealthy.IsNull() || r.MinHealthy.duration() == d.MinHealthy) && (r.Deadline.IsNull() || r.Deadline.duration() == d.Deadline) && !r.Revert.ValueBool()
}

// saysNo says whether a number is none but the default.
func saysNo(n types.Int64, otherwise int) bool {
	return n.IsNull() || n.ValueInt64() == int64(otherwise)
}

// labelProblem is what is wrong with a label that docker's API reads, and pods of Terraform have attributes for, or nobody serves yet.
func labelProblem(name string) string {
	switch {
	case strings.HasPrefix(name, "kr.ingress."), name == "kr.res.snp", name == "kr.network.policy":
		return name + " is not supported yet: nothing would come of it. Leave it out; tags of a service are for ingresses that read Nomad's or Consul's catalog."
	case name == "kr.zone", name == "kr.res.mem", name == "kr.res.cpu":
		return name + " is for docker's API: write the pod's " + map[string]string{"kr.zone": "zone", "kr.res.mem": "memory", "kr.res.cpu": "cpus"}[name] + "."
	}
	return ""
}

// wrong makes what a job's translation says a diagnostic at the attribute that it speaks of.
func wrong(err error) (diags diag.Diagnostics) {
	if err == nil {
		return nil
	}
	if all, ok := err.(interface{ Unwrap() []error }); ok {
		for _, one := range all.Unwrap() {
			diags.Append(wrong(one)...)
		}
		return diags
	}
	var field *spec.Error
	if !errors.As(err, &field) {
		diags.AddError("Not a pod", err.Error())
		return diags
	}
	if at, ok := attribute(field.Field); ok {
		diags.AddAttributeError(at, "Not possible", field.Field+": "+field.Message)
	} else {
		diags.AddError("Not possible", field.Field+": "+field.Message)
	}
	return diags
}

// attribute is where a field of a pod is written: containers[0].workingDir is container[0].working_dir.
func attribute(field string) (at path.Path, ok bool) {
	field = strings.NewReplacer(".resources.", ".", ".lifecycle.", ".").Replace(strings.TrimPrefix(strings.TrimPrefix(field, "network."), "resources."))
	for i, part := range strings.Split(field, ".") {
		name, index, indexed := strings.Cut(strings.TrimSuffix(part, "]"), "[")
		renamed, known := map[string]string{
			"containers": "container", "publish": "port", "mounts": "mount", "hostIp": "host_ip", "hostPort": "host_port", "workingDir": "working_dir", "stopSignal": "stop_signal",
			"stopTimeout": "stop_timeout", "capAdd": "cap_add", "capDrop": "cap_drop", "endpoints": "service", "scratch": "disk",
			"maxStarts": "max_starts", "restartDelay": "restart_delay",
		}[name]
		switch {
		case known:
			name = renamed
		case i > 0 && (name == "name" || name == "image" || name == "port" || name == "command" || name == "entrypoint" || name == "user" || name == "env" || name == "path" || name == "subpath" || name == "healthcheck" || name == "memory" || name == "after"):
		case i == 0 && (name == "hostname" || name == "memory" || name == "cpus" || name == "name"):
		default:
			return at, i > 0 // as far as it has a name here
		}
		if i == 0 {
			at = path.Root(name)
		} else {
			at = at.AtName(name)
		}
		if indexed {
			n := 0
			if _, err := fmt.Sscan(index, &n); err != nil {
				return at, true
			}
			if name != "container" && name != "port" && name != "mount" && name != "service" {
				return at, true
			}
			at = at.AtListIndex(n)
		}
	}
	return at, true
}

// withoutOpen leaves out blocks and objects that are not known yet, for which a model has no place.
func withoutOpen(config tftypes.Value) tftypes.Value {
	if config.IsFullyKnown() {
		return config
	}
	known, err := tftypes.Transform(config, func(_ *tftypes.AttributePath, v tftypes.Value) (tftypes.Value, error) { // what is inside of v first
		if ofObjects(v.Type()) && (!v.IsKnown() || lacks(v)) {
			return tftypes.NewValue(v.Type(), nil), nil
		}
		return v, nil
	})
	if err != nil {
		return config
	}
	return known
}

// lacks says whether an element of a list or map is nothing.
func lacks(v tftypes.Value) bool {
	var list []tftypes.Value
	var byName map[string]tftypes.Value
	switch {
	case v.IsNull(), v.Type().Is(tftypes.Object{}), v.Type().Is(tftypes.List{}) && v.As(&list) != nil, v.Type().Is(tftypes.Map{}) && v.As(&byName) != nil:
		return false
	}
	return slices.ContainsFunc(slices.Concat(list, slices.Collect(maps.Values(byName))), tftypes.Value.IsNull)
}

// open says whether what stands at a place of a configuration is not known yet, or not all of it. What is told of a name in a map does not depend on what it
// is the name of.
func open(config tftypes.Value, at path.Path) bool {
	named := false
	for _, step := range at.Steps() {
		if !config.IsKnown() {
			return true
		}
		_, named = step.(path.PathStepElementKeyString)
		switch step := step.(type) {
		case path.PathStepAttributeName:
			config = child(config, string(step))
		case path.PathStepElementKeyString:
			config = child(config, string(step))
		case path.PathStepElementKeyInt:
			config = child(config, int(step))
		}
	}
	return !named && !config.IsFullyKnown()
}
