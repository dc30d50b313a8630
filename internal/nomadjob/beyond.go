package nomadjob

import (
	"reflect"
	"slices"
	"strings"

	"github.com/hashicorp/nomad/api"
)

// Beyond lists what a job of somebody else's says that neither a pod nor Options can, by the names that it has in a job's file: no job that Job makes has any of
// it. What only differs from what Job writes for everyone, such as the sizes of logs, is not told.
func Beyond(j *api.Job) (names []string) {
	said := func(name string, values ...any) {
		if slices.ContainsFunc(values, says) {
			names = append(names, name)
		}
	}
	said("affinity", j.Affinities)
	said("all_at_once", deref(j.AllAtOnce))
	said("datacenters", len(j.Datacenters) > 0 && !slices.Equal(j.Datacenters, []string{"*"}))
	said("multiregion", j.Multiregion)
	said("node_pool", !slices.Contains([]string{"", api.NodePoolDefault}, deref(j.NodePool)))
	said("parameterized", j.ParameterizedJob)
	said("periodic", j.Periodic)
	said("priority", j.Priority != nil && *j.Priority != api.JobDefaultPriority)
	said("spread", j.Spreads)
	for _, g := range j.TaskGroups {
		said("group.count", deref(j.Type) == api.JobTypeBatch && g.Count != nil && *g.Count != 1)
		said("group.affinity", g.Affinities)
		said("group.constraint", slices.ContainsFunc(g.Constraints, func(c *api.Constraint) bool { return !implied(c) }))
		said("group.ephemeral_disk", g.EphemeralDisk != nil && (deref(g.EphemeralDisk.Sticky) || deref(g.EphemeralDisk.Migrate)))
		said("group.max_run_duration", g.MaxRunDuration)
		said("group.meta", g.Meta)
		said("group.network", len(g.Networks) > 1)
		for _, n := range g.Networks {
			said("group.network.cni", n.CNI)
			said("group.network.dns", n.DNS)
			said("group.network.hostname", n.Hostname)
		}
		said("group.scaling", g.Scaling)
		for _, s := range g.Services {
			said("group.service", s.Connect, s.CanaryTags, s.Meta, s.Address, len(s.Checks) > 1)
			for _, c := range s.Checks {
				said("group.service.check", c.Command, c.Args, c.Header, c.Body, c.CheckRestart, c.PortLabel, c.Expose)
			}
		}
		said("group.shutdown_delay", deref(g.ShutdownDelay))
		said("group.spread", g.Spreads)
		for _, v := range g.Volumes {
			said("group.volume", v.Type != csiType, v.MountOptions, v.PerAlloc)
		}
		for _, t := range g.Tasks {
			names = append(names, beyondTask(t)...)
		}
	}
	return slices.Compact(names)
}

// implied says whether a group's constraint is one of those that Nomad adds for what the group uses (1.11, nomad/job_endpoint_hooks.go).
func implied(c *api.Constraint) bool {
	return slices.ContainsFunc([]string{"${attr.consul.", "${attr.nomad.", "${attr.os.signals}", "${attr.plugins."}, func(target string) bool { return strings.HasPrefix(c.LTarget, target) })
}

func beyondTask(t *api.Task) (names []string) {
	said := func(name string, values ...any) {
		if slices.ContainsFunc(values, says) {
			names = append(names, "task."+name)
		}
	}
	said("action", t.Actions)
	said("affinity", t.Affinities)
	said("artifact", t.Artifacts)
	for _, name := range unread(t.Config) {
		said("config."+name, true)
	}
	said("constraint", t.Constraints)
	said("csi_plugin", t.CSIPluginConfig)
	said("dispatch_payload", t.DispatchPayload)
	said("env", t.Env)
	said("identity", slices.ContainsFunc(t.Identities, func(i *api.WorkloadIdentity) bool { return i.Name != identity && i.Name != "" && i.Name != "default" }))
	said("kind", t.Kind)
	said("leader", t.Leader)
	said("lifecycle", t.Lifecycle)
	said("meta", t.Meta)
	if r := t.Resources; r != nil {
		said("resources", deref(r.Cores), deref(r.MemoryMaxMB), r.Devices, r.Networks)
	}
	said("schedule", t.Schedule)
	said("secret", t.Secrets)
	said("service", t.Services)
	said("shutdown_delay", t.ShutdownDelay)
	said("template", slices.ContainsFunc(t.Templates, func(t *api.Template) bool {
		return !strings.HasPrefix(deref(t.DestPath), envFile) && deref(t.DestPath) != namesFile
	}))
	said("user", t.User)
	said("vault", t.Vault)
	return names
}

// unread are the keys of a driver's configuration that config has not.
func unread(c map[string]any) (names []string) {
	known := map[string]bool{"auth": true} // with an audience
	for _, t := range []reflect.Type{reflect.TypeFor[config](), reflect.TypeFor[container]()} {
		for i := range t.NumField() {
			name, _, _ := strings.Cut(t.Field(i).Tag.Get("json"), ",")
			known[name] = true
		}
	}
	for name, value := range c {
		if !known[name] && says(value) {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names
}

// says tells whether a value is something: Nomad writes nothing in several ways.
func says(v any) bool {
	if v == nil {
		return false
	}
	switch r := reflect.ValueOf(v); r.Kind() {
	case reflect.Slice, reflect.Map:
		return r.Len() > 0
	case reflect.Pointer:
		return !r.IsNil()
	default:
		return !r.IsZero()
	}
}
