//go:build vm

package main

import (
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/hashicorp/nomad/api"

	"github.com/cradlestack/cradlestack/internal/nomadtest"
)

// An effect is what becomes of a change of an attribute.
type effect string

const (
	inPlace  effect = "update"
	replaced effect = "delete+create"
	unseen   effect = "" // write-only: another attribute beside it brings another value
	// planned is replaced where nothing here could take the change: it is planned, and not applied.
	planned effect = "planned"
)

// An attribute is changed from one value to another; nil leaves it out.
type attribute struct {
	path     string // where it is written, with the places in lists: container.0.user
	from, to any
	effect   effect
	with     map[string]any // what else is written, by paths
	replaces []string       // for which it is replaced, where that is not the attribute alone
}

// name is the attribute's as the schema has it.
func (a attribute) name() string {
	var parts []string
	for _, p := range strings.Split(a.path, ".") {
		if _, err := strconv.Atoi(p); err != nil {
			parts = append(parts, p)
		}
	}
	return strings.Join(parts, ".")
}

// label is unique, and a name that everybody takes.
func (a attribute) label(n int) string {
	return strings.NewReplacer(".", "-", "_", "-").Replace(a.name()) + "-" + strconv.Itoa(n)
}

type object = map[string]any

// attributes are all that a configuration can say, by resources: a test fails where the schema has one that is missing here.
var attributes = map[string][]attribute{
	"cradle_pod": {
		{path: "name", from: "named", to: "renamed", effect: replaced},
		{path: "namespace", to: "other", effect: replaced},
		{path: "namespace", from: "other", effect: replaced},
		{path: "once", to: true, effect: replaced, with: object{"replicas": nil, "service": nil, "zone": "nowhere", "wait_for": "none"}},
		{path: "replicas", from: 0, to: 2, effect: inPlace, with: object{"zone": "nowhere", "wait_for": "none"}},
		{path: "cpus", to: 2, effect: inPlace},
		{path: "memory", to: "512 MiB", effect: inPlace},
		{path: "disk", from: "1GiB", to: "2GiB", effect: inPlace},
		{path: "disk", to: "2GiB", effect: inPlace},
		{path: "hostname", to: "host", effect: inPlace},
		{path: "network", to: "bridge", effect: inPlace},
		{path: "network", to: "none", effect: inPlace, with: object{"port": nil, "service": nil}},
		{path: "zone", to: "north", effect: inPlace},
		{path: "node", to: "5f0a3c1e-7d0b-4a52-9a55-0d6d5ed1d3a4", effect: inPlace},
		{path: "variant", to: "stock", effect: inPlace},
		{path: "replace_lost", to: false, effect: inPlace},
		{path: "restart", to: object{"attempts": 1}, effect: inPlace},
		{path: "restart.attempts", from: 1, to: 3, effect: inPlace},
		{path: "restart.interval", to: "20m", effect: inPlace},
		{path: "restart.delay", to: "5s", effect: inPlace},
		{path: "restart.mode", to: "delay", effect: inPlace},
		{path: "rollout", to: object{"max_parallel": 2}, effect: inPlace},
		{path: "rollout.max_parallel", from: 2, to: 3, effect: inPlace},
		{path: "rollout.min_healthy", to: "2s", effect: inPlace},
		{path: "rollout.deadline", to: "4m", effect: inPlace},
		{path: "rollout.auto_revert", to: true, effect: inPlace},
		{path: "wait_for", to: "running", effect: inPlace},
		{path: "wait_timeout", to: "5m", effect: inPlace},

		{path: "container.2", to: object{"name": "third", "image": "oci:/nowhere"}, effect: inPlace},
		{path: "container.1.name", from: "beside", to: "next", effect: inPlace},
		{path: "container.0.image", from: "oci:/nowhere", to: "oci:/elsewhere", effect: inPlace},
		{path: "container.0.entrypoint", to: []any{"sh", "-c"}, effect: inPlace},
		{path: "container.0.command", from: []any{"true"}, to: []any{"false", "$${NO} %%{x}"}, effect: inPlace},
		{path: "container.1.command", to: []any{}, effect: inPlace, with: object{"container.1.entrypoint": []any{"sh"}}},
		{path: "container.0.env", from: object{"A": "1"}, to: object{"A": "2", "B": ""}, effect: inPlace},
		{path: "container.1.env", to: object{"A": "1"}, effect: inPlace},
		{path: "container.0.secret_env", from: object{"S": "first"}, to: object{"S": "second"}, effect: unseen, with: object{"container.0.secret_env_version": "1"}},
		{path: "container.0.secret_env_version", from: "1", to: "2", effect: inPlace, with: object{"container.0.secret_env": object{"S": "first"}}},
		{path: "container.0.user", to: "1000:1000", effect: inPlace},
		{path: "container.0.working_dir", to: "/srv", effect: inPlace},
		{path: "container.0.stop_signal", to: "SIGINT", effect: inPlace},
		{path: "container.0.stop_timeout", to: "20s", effect: inPlace},
		{path: "container.0.init", to: true, effect: inPlace},
		{path: "container.0.read_only", to: true, effect: inPlace},
		{path: "container.0.privileged", to: true, effect: inPlace},
		{path: "container.0.cap_add", to: []any{"NET_ADMIN"}, effect: inPlace},
		{path: "container.1.cap_drop", from: []any{"ALL"}, to: []any{"CHOWN"}, effect: inPlace},
		{path: "container.0.labels", from: object{"a": "1"}, to: object{"a": "2"}, effect: inPlace},
		{path: "container.1.memory", to: "64MiB", effect: inPlace},
		{path: "container.0.healthcheck", to: object{"test": []any{"CMD", "true"}}, effect: inPlace},
		{path: "container.0.healthcheck.test", from: []any{"CMD", "true"}, to: []any{"CMD-SHELL", "false"}, effect: inPlace},
		{path: "container.1.healthcheck.interval", to: "5s", effect: inPlace, with: checked(1)},
		{path: "container.0.healthcheck.timeout", to: "5s", effect: inPlace, with: checked(0)},
		{path: "container.0.healthcheck.start_period", to: "5s", effect: inPlace, with: checked(0)},
		{path: "container.0.healthcheck.retries", to: 5, effect: inPlace, with: checked(0)},
		{path: "container.0.restart", to: "on-failure", effect: inPlace},
		{path: "container.1.restart_delay", to: "5s", effect: inPlace, with: object{"container.1.restart": "always"}},
		{path: "container.1.max_starts", to: 5, effect: inPlace, with: object{"container.1.restart": "always"}},
		{path: "container.1.critical", to: true, effect: inPlace},
		{path: "container.1.after", to: []any{object{"container": "main"}}, effect: inPlace},
		{path: "container.1.after.0.container", from: "main", to: "third", effect: inPlace, with: object{"container.2": object{"name": "third", "image": "oci:/nowhere"}}},
		{path: "container.1.after.0.until", to: "exited", effect: inPlace, with: object{"container.1.after.0.container": "main"}},
		{path: "container.0.mount.1", to: object{"path": "/more", "scratch": "more"}, effect: inPlace},
		{path: "container.0.mount.0.path", from: "/cache", to: "/tmp/cache", effect: inPlace},
		{path: "container.0.mount.0.volume", from: "v", to: "w", effect: inPlace, with: object{"container.0.mount.0.scratch": nil}},
		{path: "container.0.mount.0.shared", to: true, effect: inPlace, with: object{"container.0.mount.0.scratch": nil, "container.0.mount.0.volume": "v"}},
		{path: "container.0.mount.0.scratch", from: "one", to: "two", effect: inPlace},
		{path: "container.0.mount.0.host_path", from: "/srv", to: "/opt", effect: inPlace, with: object{"container.0.mount.0.scratch": nil}},
		{path: "container.0.mount.0.subpath", to: "below", effect: inPlace},
		{path: "container.0.mount.0.read_only", to: true, effect: inPlace},
		{path: "container.0.mount.0.no_copy", to: true, effect: inPlace},

		{path: "port.2", to: object{"port": 8080}, effect: inPlace},
		{path: "port.1.port", from: 90, to: 91, effect: inPlace},
		{path: "port.1.host_port", to: 20080, effect: inPlace},
		{path: "port.1.host_ip", to: "127.0.0.1", effect: inPlace},
		{path: "port.1.protocol", to: "udp", effect: inPlace},
		{path: "service.1", to: object{"name": "second", "port": 90}, effect: inPlace},
		{path: "service.0.name", from: "first", to: "another", effect: inPlace},
		{path: "service.0.port", from: 80, to: 90, effect: inPlace},
		{path: "service.0.catalog", to: "consul", effect: inPlace},
		{path: "service.0.tags", to: []any{"a", "b"}, effect: inPlace},
		{path: "service.0.check", from: object{}, effect: inPlace},
		{path: "service.0.check.type", to: "http", effect: inPlace, with: object{"service.0.check.path": "/"}},
		{path: "service.0.check.path", from: "/", to: "/health", effect: inPlace, with: object{"service.0.check.type": "http"}},
		{path: "service.0.check.interval", to: "5s", effect: inPlace},
		{path: "service.0.check.timeout", to: "1s", effect: inPlace},
		{path: "constraint.1", to: object{"attribute": "$${node.class}", "operator": "is_set"}, effect: inPlace},
		{path: "constraint.0.attribute", from: "$${attr.cpu.arch}", to: "$${attr.kernel.arch}", effect: inPlace},
		{path: "constraint.0.operator", to: "!=", effect: inPlace},
		{path: "constraint.0.value", from: "amd64", to: "arm64", effect: inPlace},
	},
	"cradle_volume": {
		{path: "name", from: "named", to: "renamed", effect: replaced},
		{path: "namespace", to: "other", effect: replaced},
		{path: "namespace", from: "other", effect: replaced},
		{path: "plugin", to: "another", effect: planned},
		{path: "class", to: "lv2", effect: replaced, replaces: []string{"access_mode", "attach", "class"}},
		{path: "size", from: "16MiB", to: "32 MiB", effect: inPlace},
		{path: "zone", to: "north", effect: planned},
		{path: "access_mode", to: "single-node-writer", effect: replaced},
		{path: "access_mode", from: "single-node-writer", effect: replaced},
		{path: "attachment_mode", to: "block-device", effect: replaced, with: object{"class": "lv2"}},
		{path: "attach", to: "host", effect: replaced, with: object{"class": "lv2"}},
		{path: "attach", from: "host", effect: replaced, with: object{"class": "lv2"}},
		{path: "snapshots", from: "hourly=2", to: "hourly=3", effect: replaced},
		{path: "snapshots", to: "hourly=3", effect: replaced},
		{path: "parameters", from: object{"fs": "ext4"}, effect: replaced, with: object{"class": "lv2"}},
		{path: "snapshot_id", to: "${cradle_snapshot.source.id}", effect: replaced},
		{path: "clone_id", to: "${cradle_volume.source.external_id}", effect: replaced},
		{path: "prevent_destroy_if_in_use", to: false, effect: inPlace},
	},
	"cradle_snapshot": {
		{path: "volume", from: "${cradle_volume.source.name}", to: "${cradle_volume.sink.name}", effect: replaced},
		{path: "name", from: "named", to: "renamed", effect: replaced},
		{path: "namespace", to: "${cradle_volume.elsewhere.namespace}", effect: replaced},
		{path: "namespace", from: "${cradle_volume.elsewhere.namespace}", effect: replaced},
		{path: "plugin", to: "another", effect: planned},
	},
}

// elsewhere are attributes whose change needs pods that run, or cradle-filer: a test of their own changes them.
var elsewhere = map[string][]string{
	"cradle_pod":     {"networks", "networks.aliases"}, // TestSoakTerraformNetworks
	"cradle_volume":  {"rollback_to"},                  // TestSoakTerraformRollback
	"cradle_network": {"name", "namespace", "labels"},  // TestSoakTerraformNetworks
}

// told are attributes that are only read.
var told = map[string][]string{
	"cradle_pod":      {"id", "status", "env_index", "beyond", "instances", "instances.id", "instances.node", "instances.status", "instances.address", "instances.ports", "instances.images", "container.secret_env_names"},
	"cradle_volume":   {"id", "external_id", "capacity", "undo_snapshot"},
	"cradle_snapshot": {"id", "size", "created_at"},
	"cradle_network":  {"id", "network_id"},
}

// unsaid are attributes that Nomad does not keep, so that no import tells them.
var unsaid = []string{"wait_for", "wait_timeout", "container.secret_env_version", "prevent_destroy_if_in_use"}

func checked(container int) object {
	return object{fmt.Sprintf("container.%d.healthcheck.test", container): []any{"CMD", "true"}}
}

// resource is one as it is written for a case, before or after the change.
func (a attribute) resource(kind, label string, after bool) object {
	var r object
	switch kind {
	case "cradle_pod": // none runs: what counts here is what Nomad is told, and tells
		r = object{
			"name": label, "replicas": 0,
			"container": []any{
				object{"name": "main", "image": "oci:/nowhere", "mount": []any{object{"path": "/cache", "scratch": "cache"}}},
				object{"name": "beside", "image": "oci:/nowhere"},
			},
			"port":       []any{object{"port": 80}, object{"port": 90}},
			"service":    []any{object{"name": "first", "port": 80, "check": object{}}},
			"constraint": []any{object{"attribute": "$${attr.cpu.arch}", "value": "amd64"}},
		}
	case "cradle_volume":
		r = object{"name": label, "size": "16MiB"}
	case "cradle_snapshot":
		r = object{"name": label, "volume": "${cradle_volume.source.name}"}
	}
	for path, value := range a.with {
		put(r, strings.Split(path, "."), value)
	}
	value := a.from
	if after {
		value = a.to
	}
	if text, ok := value.(string); ok && a.path == "name" { // a cluster's are unique
		value = label + "-" + text
	}
	put(r, strings.Split(a.path, "."), value)
	return r
}

// put writes a value at a path of maps and lists, which are made on the way; nil takes away what is there.
func put(in any, path []string, value any) any {
	if len(path) == 0 {
		return value
	}
	if i, err := strconv.Atoi(path[0]); err == nil {
		list, _ := in.([]any)
		if i == len(list) {
			if value == nil {
				return list
			}
			list = append(list, nil)
		}
		list[i] = put(list[i], path[1:], value)
		return list
	}
	m, ok := in.(object)
	if !ok {
		m = object{}
	}
	if made := put(m[path[0]], path[1:], value); made == nil {
		delete(m, path[0])
	} else {
		m[path[0]] = made
	}
	return m
}

// settable lists the attributes and blocks of a schema, and whether a configuration may say them.
func settable(t *testing.T, schema json.RawMessage) map[string]map[string]bool {
	t.Helper()
	type block struct {
		Attributes map[string]struct {
			Required, Optional bool
			Nested             *json.RawMessage `json:"nested_type"`
		}
		Blocks map[string]struct{ Block json.RawMessage } `json:"block_types"`
	}
	var provider struct {
		Resources map[string]struct{ Block json.RawMessage } `json:"resource_schemas"`
	}
	if err := json.Unmarshal(schema, &provider); err != nil {
		t.Fatal(err)
	}
	all := map[string]map[string]bool{}
	var walk func(into map[string]bool, at string, text json.RawMessage)
	walk = func(into map[string]bool, at string, text json.RawMessage) {
		var b block
		if err := json.Unmarshal(text, &b); err != nil {
			t.Fatal(err)
		}
		for name, a := range b.Attributes {
			into[at+name] = a.Required || a.Optional
			if a.Nested != nil {
				walk(into, at+name+".", *a.Nested)
			}
		}
		for name, n := range b.Blocks {
			into[at+name] = true
			walk(into, at+name+".", n.Block)
		}
	}
	for kind, r := range provider.Resources {
		all[kind] = map[string]bool{}
		walk(all[kind], "", r.Block)
	}
	return all
}

// A case is an attribute with its resource.
type attributeCase struct {
	attribute
	kind, label string
}

func (c attributeCase) address() string { return c.kind + "." + c.label }

func attributeCases() (all []attributeCase) {
	for _, kind := range slices.Sorted(maps.Keys(attributes)) {
		for i, a := range attributes[kind] {
			all = append(all, attributeCase{a, kind, a.label(i)})
		}
	}
	return all
}

// writeAttributes makes the workspace's configuration a resource for each case, beside what some of them refer to.
func writeAttributes(w *workspace, all []attributeCase, after func(attributeCase) bool) {
	w.t.Helper()
	resources := object{}
	for _, c := range all {
		resources[c.kind] = put(resources[c.kind], []string{c.label}, c.resource(c.kind, c.label, after(c)))
	}
	for label, namespace := range map[string]string{"source": "default", "sink": "default", "elsewhere": "other"} {
		name := label
		if label == "elsewhere" {
			name = "source"
		}
		put(resources, []string{"cradle_volume", label}, object{"name": name, "namespace": namespace, "size": "16MiB"})
	}
	put(resources, []string{"cradle_snapshot", "source"}, object{"name": "source", "volume": "${cradle_volume.source.name}"})
	text, err := json.MarshalIndent(object{"resource": resources}, "", "  ")
	if err != nil {
		w.t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(w.dir, "attributes.tf.json"), text, 0o600); err != nil {
		w.t.Fatal(err)
	}
}

// No attribute is left out of what TestTerraformAttributes changes.
func TestTerraformAttributesAreAll(t *testing.T) {
	for kind, names := range settable(t, openWorkspace(t, nil).schema()) {
		for name, may := range names {
			tested := slices.ContainsFunc(attributes[kind], func(a attribute) bool { return a.name() == name }) || slices.Contains(elsewhere[kind], name)
			if !may {
				tested = slices.Contains(told[kind], name)
			}
			if !tested {
				t.Errorf("%s.%s is in no table here: say what a change of it does", kind, name)
			}
		}
		for _, a := range attributes[kind] {
			if !names[a.name()] {
				t.Errorf("%s.%s is in the table, and not in the schema", kind, a.name())
			}
		}
	}
}

// Every attribute is changed, in place or by a new object, as its page says: a plan says so and changes nothing else, an apply does it, the next plan is
// empty, and an import tells the same.
func TestTerraformAttributes(t *testing.T) {
	c := openNomad(t)
	if _, err := c.API.Namespaces().Register(&api.Namespace{Name: "other"}, nil); err != nil {
		t.Fatal(err)
	}
	w := openWorkspace(t, c)
	const provider = "provider \"cradle\" {}\n"
	w.write(provider)
	all := attributeCases()
	apply := []string{"apply", "-auto-approve", "-no-color", "-parallelism=20"}
	before, after := func(attributeCase) bool { return false }, func(c attributeCase) bool { return c.effect != planned }

	writeAttributes(w, all, before)
	w.run(apply...)
	w.unchanged("-parallelism=20")
	made := jobIndexes(t, c)

	writeAttributes(w, all, func(attributeCase) bool { return true })
	changes, said := w.plan()
	for _, one := range all {
		one.planned(t, changes)
	}
	if n := strings.Count(said, "will be lost") + strings.Count(said, "will be ended"); n == 0 {
		t.Errorf("no plan says what is lost:\n%s", said)
	}
	writeAttributes(w, all, after)
	w.run(apply...)
	w.unchanged("-parallelism=20")
	now := jobIndexes(t, c)
	for _, one := range all {
		if one.kind != "cradle_pod" || one.path == "namespace" {
			continue
		}
		name := one.resource(one.kind, one.label, true)["name"].(string)
		was, there := made[name]
		if is, still := now[name]; !still || one.path == "name" && there || one.path == "once" && is == was || one.effect != replaced && is != was {
			t.Errorf("%s: job %s was made at %d, and is that of %d", one.address(), name, was, is)
		}
	}

	ids := map[string]string{}
	for _, one := range all {
		r := one.resource(one.kind, one.label, after(one))
		id, volume := r["name"].(string), "source"
		if one.kind == "cradle_snapshot" {
			if one.path == "volume" && after(one) {
				volume = "sink"
			}
			id = volume + "@" + id
		}
		if r["namespace"] != nil {
			id = "other/" + id
		}
		ids[one.address()] = id
	}
	for address, change := range w.imports(provider, ids) {
		i := slices.IndexFunc(all, func(c attributeCase) bool { return c.address() == address })
		if i < 0 || !slices.Contains(unsaid, all[i].name()) && all[i].with["container.0.secret_env_version"] == nil && all[i].with["wait_for"] == nil || change.actions() != string(inPlace) {
			t.Errorf("the import of %s is %s of %v", address, change.actions(), change.differs())
		}
	}
	w.write(provider)
	w.unchanged("-parallelism=20")
	w.run("destroy", "-auto-approve", "-no-color", "-parallelism=20")
	if left, _, err := c.API.CSIVolumes().List(nil); err != nil || len(left) > 0 {
		t.Errorf("left: %v, %v", left, err)
	}
	if err := deleteNamespace(c, "other"); err != nil {
		t.Error(err)
	}
}

// planned compares what a plan says of a case with what it should.
func (c attributeCase) planned(t *testing.T, changes map[string]change) {
	t.Helper()
	got, there := changes[c.address()]
	want := string(c.effect)
	if c.effect == planned {
		want = string(replaced)
	}
	if actions := got.actions(); actions != want || there != (c.effect != unseen) {
		t.Errorf("%s is planned as %q, want %q: %v", c.address(), actions, want, got.differs())
		return
	}
	switch want {
	case string(replaced):
		reasons := c.replaces
		if reasons == nil {
			reasons = []string{c.name()}
		}
		if !slices.Equal(got.replaces(), reasons) {
			t.Errorf("%s is replaced for %v, want %v", c.address(), got.replaces(), reasons)
		}
	case string(inPlace):
		if err := got.onlyIn(c.name()); err != nil {
			t.Errorf("%s: %v", c.address(), err)
		}
	}
}

// jobIndexes are the indexes at which the jobs of namespace default were made, by their names.
func jobIndexes(t *testing.T, c *nomadtest.Cluster) map[string]uint64 {
	t.Helper()
	jobs, _, err := c.API.Jobs().List(nil)
	if err != nil {
		t.Fatal(err)
	}
	all := map[string]uint64{}
	for _, j := range jobs {
		all[j.ID] = j.CreateIndex
	}
	return all
}

// deleteNamespace waits until Nomad has forgotten what was there.
func deleteNamespace(c *nomadtest.Cluster, name string) error {
	if err := c.API.System().GarbageCollect(); err != nil {
		return err
	}
	_, err := c.API.Namespaces().Delete(name, nil)
	return err
}
