package provider

import (
	"encoding/json"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/nomad/api"
	"github.com/hashicorp/terraform-plugin-framework/attr"
	"github.com/hashicorp/terraform-plugin-framework/types"

	"github.com/cradlestack/cradlestack/internal/nomadjob"
	"github.com/cradlestack/cradlestack/spec"
)

func str(s string) types.String { return types.StringValue(s) }

func list(all ...string) types.List { return nowList(types.ListNull(types.StringType), &all) }

func mapOf(m map[string]string) types.Map { return nowMap(types.MapNull(types.StringType), m) }

// planned is a model whose attributes have their defaults, as a plan has them.
func planned(edit func(*podModel)) *podModel {
	m := &podModel{
		ID: str("default/web"), Name: str("web"), Namespace: str("default"), Replicas: types.Int64Value(1), CPUs: types.Int64Value(1), Memory: newSize(spec.DefaultMemory), Network: str(networkUser), Once: types.BoolValue(false),
		Replace: types.BoolValue(true), EnvIndex: types.Int64Value(0), WaitFor: str(waitHealthy), WaitTimeout: newDuration(time.Minute),
		Restart:    &restartModel{types.Int64Value(2), newDuration(30 * time.Minute), newDuration(15 * time.Second), str("fail")},
		Rollout:    &rolloutModel{types.Int64Value(1), newDuration(10 * time.Second), newDuration(5 * time.Minute), types.BoolValue(false)},
		Containers: []containerModel{plannedContainer("main", nil)}, Ports: []portModel{}, Services: []serviceModel{}, Constraints: []constraintModel{},
	}
	edit(m)
	return m
}

func plannedContainer(name string, edit func(*containerModel)) containerModel {
	none := types.ListNull(types.StringType)
	c := containerModel{
		Name: str(name), Image: str("registry.example.org/" + name), Entrypoint: none, Command: none, Env: types.MapNull(types.StringType), Secrets: types.MapNull(types.StringType), SecretNames: none, CapAdd: none, CapDrop: none,
		Labels: types.MapNull(types.StringType), Restart: str(restartNo), Mounts: []mountModel{},
	}
	if edit != nil {
		edit(&c)
	}
	return c
}

var models = map[string]*podModel{
	"minimal": planned(func(*podModel) {}),
	"empty texts and lists are none": planned(func(m *podModel) {
		m.Hostname, m.Zone = str(""), str("")
		c := &m.Containers[0]
		c.User, c.CapAdd, c.Env, c.Labels = str(""), list(), types.MapValueMust(types.StringType, map[string]attr.Value{}), types.MapValueMust(types.StringType, map[string]attr.Value{})
		c.Init, c.MaxStarts, c.StopTimeout = types.BoolValue(false), types.Int64Value(0), newDuration(10*time.Second)
		c.Command, c.Entrypoint = list(), list("/bin/sh")
	}),
	"directories at places of one name": planned(func(m *podModel) {
		m.Containers = []containerModel{
			plannedContainer("a", func(c *containerModel) {
				c.Mounts = []mountModel{
					{Path: str("/x/y"), HostPath: str("/srv/1")}, {Path: str("/x-y"), HostPath: str("/srv/2")}, {Path: str("/s"), HostPath: str("/srv/3")}, {Path: str("/t"), Scratch: str("s")},
				}
			}),
			plannedContainer("b", func(c *containerModel) {
				c.Mounts = []mountModel{{Path: str("/s"), HostPath: str("/srv/4")}, {Path: str("/x/y"), HostPath: str("/srv/1")}}
			}),
		}
	}),
	"memory of no whole MiB": planned(func(m *podModel) { m.Memory = size("256 MB") }),
	"once":                   planned(func(m *podModel) { m.Once, m.WaitFor = types.BoolValue(true), str(waitEnded) }),
	"everything": planned(func(m *podModel) {
		m.Replicas, m.CPUs, m.Memory, m.Disk, m.Hostname = types.Int64Value(3), types.Int64Value(2), sizeValue{str("512 MiB")}, sizeValue{str("20G")}, str("host")
		m.Network, m.Zone, m.Node, m.Variant, m.Replace = str(networkBridge), str("north"), str("5f0a3c1e-7d0b-4a52-9a55-0d6d5ed1d3a4"), str("default"), types.BoolValue(false)
		m.Restart.Mode, m.Restart.Delay = str("delay"), durationValue{str("60s")}
		m.Rollout = &rolloutModel{types.Int64Value(2), durationValue{str("1000ms")}, durationValue{str("90s")}, types.BoolValue(true)}
		m.Constraints = []constraintModel{{str("${attr.cpu.arch}"), str("="), str("amd64")}, {str("${node.class}"), str("is_set"), types.StringNull()}}
		m.Ports = []portModel{{types.Int64Value(80), types.Int64Value(8080), types.StringNull(), str("tcp")}, {types.Int64Value(53), types.Int64Null(), types.StringNull(), str("udp")}}
		m.Services = []serviceModel{
			{str("web"), types.Int64Value(80), str("nomad"), list("a", "b"), &checkModel{str("http"), str("/"), durationValue{str("10s")}, durationValue{str("2s")}}},
			{str("metrics"), types.Int64Value(9100), str("consul"), types.ListNull(types.StringType), nil},
		}
		m.Containers = []containerModel{
			plannedContainer("web", func(c *containerModel) {
				c.Entrypoint, c.Command, c.Env = list("sh", "-c"), list("echo ${HOME}"), mapOf(map[string]string{"A": "1", "B": "%{x}"})
				c.User, c.WorkingDir, c.StopSignal, c.StopTimeout = str("www-data"), str("/srv"), str("SIGINT"), durationValue{str("30s")}
				c.Init, c.ReadOnly, c.Privileged = types.BoolValue(true), types.BoolValue(true), types.BoolValue(true)
				c.CapAdd, c.CapDrop, c.Labels = list("NET_ADMIN"), list("ALL"), mapOf(map[string]string{"kr.ingress.80": "https://a.example.org"})
				c.Health = &healthModel{list("CMD", "true"), durationValue{str("5s")}, durationValue{}, durationValue{}, types.Int64Value(5)}
				c.Restart, c.RestartDelay, c.MaxStarts = str(restartAlways), durationValue{str("2s")}, types.Int64Value(4)
				c.Mounts = []mountModel{
					{Path: str("/scratch"), Scratch: str("s"), Subpath: str("a")},
					{Path: str("/srv"), Volume: str("pages"), Shared: types.BoolValue(true), ReadOnly: types.BoolValue(true)},
					{Path: str("/host"), HostPath: str("/srv/host")},
					{Path: str("/data"), Volume: str("data"), NoCopy: types.BoolValue(true)},
				}
			}),
			plannedContainer("beside", func(c *containerModel) {
				c.Env, c.Memory, c.Critical = mapOf(map[string]string{"C": "3"}), sizeValue{str("64MiB")}, types.BoolValue(true)
				c.Restart, c.After = str(restartOnFailure), []afterModel{{str("web"), str("healthy")}}
				c.Mounts = []mountModel{{Path: str("/s"), Scratch: str("s")}}
			}),
		}
	}),
}

// back is what a job tells of what made it, after it was Nomad's.
func back(t *testing.T, m *podModel, secrets ...map[string]string) (*spec.Pod, *nomadjob.Options, []byte) {
	t.Helper()
	p, o := m.pod(secrets)
	job, err := nomadjob.Job(p, o)
	if err != nil {
		t.Fatal(err)
	}
	data, err := json.Marshal(job)
	if err != nil {
		t.Fatal(err)
	}
	var again api.Job
	if err := json.Unmarshal(data, &again); err != nil {
		t.Fatal(err)
	}
	items, err := nomadjob.EnvItems(p, nil)
	if err != nil {
		t.Fatal(err)
	}
	found, options, err := nomadjob.Pod(&again, items)
	if err != nil {
		t.Fatal(err)
	}
	return found, options, data
}

// What is written is read back as it is written, so that a plan shows no change; what is imported makes the same job.
func TestPodReadsBack(t *testing.T) {
	for name, m := range models {
		t.Run(name, func(t *testing.T) {
			p, o, job := back(t, m)
			read := *m
			read.Containers = append([]containerModel(nil), m.Containers...)
			read.read(p, o)
			if !reflect.DeepEqual(&read, m) {
				t.Errorf("read back it is\n%+v\nwant\n%+v", read, *m)
			}
			imported := &podModel{WaitFor: m.WaitFor, WaitTimeout: m.WaitTimeout}
			imported.read(p, o)
			if _, _, again := back(t, imported); string(again) != string(job) {
				t.Errorf("imported it makes\n%s\nwant\n%s", again, job)
			}
		})
	}
}

// Networks and the names that a pod has there are read back from what its job says of them; what is no network is told apart.
func TestNetworksReadBack(t *testing.T) {
	for _, hostname := range []string{"", "web", "host"} {
		m := planned(func(m *podModel) {
			m.Network, m.Networks = str(networkBridge), map[string]networkModel{"shop": {list("www", "front")}, "a.b": {types.ListNull(types.StringType)}}
			if hostname != "" {
				m.Hostname = str(hostname)
			}
		})
		if diags := m.checkNetworks(); diags.HasError() {
			t.Error(diags)
		}
		p, o := m.pod(nil)
		for _, name := range []string{"shop", "a.b"} {
			o.Networks = append(o.Networks, nomadjob.Network{Service: nomadjob.NetworkService(strings.Repeat(name, 16)), Names: m.names(name, strs(m.Networks[name].Aliases))})
		}
		job, err := nomadjob.Job(p, o)
		if err != nil {
			t.Fatal(err)
		}
		found, options, err := nomadjob.Pod(job, nil)
		if err != nil {
			t.Fatal(err)
		}
		imported := &podModel{WaitFor: m.WaitFor, WaitTimeout: m.WaitTimeout}
		imported.read(found, options)
		if imported.places(options); !reflect.DeepEqual(imported.Networks, m.Networks) || imported.Network != m.Network {
			t.Errorf("they are read as %v, want %v", imported.Networks, m.Networks)
		}
		options.Networks = append(options.Networks, nomadjob.Network{Service: "portless"})
		if !imported.places(options) || len(imported.Networks) != 2 {
			t.Errorf("a service without a port is a network: %v", imported.Networks)
		}
	}
}

// What a pod has that no attribute says is told; nothing is that an attribute says.
func TestUntold(t *testing.T) {
	for name, m := range models {
		if p, _, _ := back(t, m); len(untold(p)) > 0 {
			t.Errorf("%s: %v", name, untold(p))
		}
	}
	p, _ := models["minimal"].pod(nil)
	p.Containers[0].Tmpfs, p.Containers[0].ShmSize, p.Network.DNS = map[string]string{"/tmp": ""}, 1<<20, []string{"192.0.2.1"}
	if got, want := untold(p), []string{"task.config.dns_servers", "task.config.shm_size", "task.config.tmpfs"}; !reflect.DeepEqual(got, want) {
		t.Errorf("%v is told, want %v", got, want)
	}
}

// A token is sent to nobody by a way that others can read.
func TestFilerAddress(t *testing.T) {
	for address, ok := range map[string]bool{
		"": true, "https://filer.example.org:2050": true, "http://127.0.0.1:2050": true, "http://[::1]:2050": true, "http://localhost:2050": true,
		"http://filer.example.org:2050": false, "http://192.0.2.7:2050": false, "filer:2050": false, "unix:///run/x.sock": false, "https://": false, "%": false,
	} {
		if err := checkFiler(address); (err == nil) != ok {
			t.Errorf("%q: %v", address, err)
		}
	}
}

// Secrets are told by their names alone.
func TestSecretsAreNotRead(t *testing.T) {
	m := planned(func(m *podModel) {
		m.Containers[0].Env = mapOf(map[string]string{"OPEN": "1"})
		m.Containers = append(m.Containers, plannedContainer("beside", nil))
	})
	p, o, job := back(t, m, map[string]string{"PASSWORD": "hidden"}, map[string]string{"KEY": "hidden"})
	if got := p.Containers[0].Env; len(got) != 2 {
		t.Errorf("the environment is %v", got)
	}
	imported := &podModel{}
	imported.read(p, o)
	if got := pairs(imported.Containers[0].Env); !reflect.DeepEqual(got, map[string]string{"OPEN": "1"}) || !imported.Containers[0].Secrets.IsNull() {
		t.Errorf("the environment is read as %v", got)
	}
	if got := p.Containers[1].Env; !reflect.DeepEqual(got, []string{"KEY=hidden"}) || !imported.Containers[1].Env.IsNull() {
		t.Errorf("the environment of the container beside is %v, read as %v", got, imported.Containers[1].Env)
	}
	if s := string(job); len(s) == 0 || reflect.DeepEqual(o.Meta, map[string]string{}) || strings.Contains(s, "hidden") {
		t.Errorf("the job is %s", s)
	}
	w := wish{pod: p, options: *o}
	w.keep(&nomadjob.Options{PodID: "kept", Meta: map[string]string{"docker_id": "x", secretsMeta: "former"}})
	if want := map[string]string{"docker_id": "x", secretsMeta: `{"beside":["KEY"],"main":["PASSWORD"]}`}; w.options.PodID != "kept" || !reflect.DeepEqual(w.options.Meta, want) {
		t.Errorf("what others keep in a job becomes %+v", w.options)
	}
}

// Mistakes are told where they are written.
func TestAttribute(t *testing.T) {
	for field, want := range map[string]string{
		"containers[1].workingDir": "container[1].working_dir", "containers[0].mounts[2].path": "container[0].mount[2].path", "network.publish[0].hostIp": "port[0].host_ip",
		"hostname": "hostname", "resources.memory": "memory", "endpoints[1].port": "service[1].port", "containers[0].env[3]": "container[0].env", "containers[0].healthcheck.test": "container[0].healthcheck",
		"containers": "container",
	} {
		if got, ok := attribute(field); !ok || got.String() != want {
			t.Errorf("%s is %s, %t, want %s", field, got, ok, want)
		}
	}
	if at, ok := attribute("boot"); ok {
		t.Errorf("boot is %s", at)
	}
}

// What Terraform writes of a pod that runs once and is imported, is one.
func TestOnceWithDefaults(t *testing.T) {
	for name, c := range map[string]struct {
		edit func(*podModel)
		good bool
	}{
		"defaults": {func(*podModel) {}, true},
		"attempts": {func(m *podModel) { m.Restart.Attempts = types.Int64Value(5) }, false},
		"delay":    {func(m *podModel) { m.Restart.Mode = str("delay") }, false},
		"parallel": {func(m *podModel) { m.Rollout.MaxParallel = types.Int64Value(2) }, false},
		"revert":   {func(m *podModel) { m.Rollout.Revert = types.BoolValue(true) }, false},
		"deadline": {func(m *podModel) { m.Rollout.Deadline = newDuration(time.Hour) }, false},
	} {
		m := planned(func(m *podModel) { m.Once, m.WaitFor = types.BoolValue(true), str(waitEnded) })
		c.edit(m)
		if d := m.checkOnce(); d.HasError() == c.good {
			t.Errorf("%s: %v", name, d)
		}
	}
}
