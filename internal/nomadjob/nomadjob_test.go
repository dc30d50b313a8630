package nomadjob

import (
	"cmp"
	"encoding/json"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"text/template"
	"time"
	"unicode/utf8"

	"github.com/hashicorp/nomad/api"

	"github.com/cradlestack/cradlestack/internal/golden"
	"github.com/cradlestack/cradlestack/spec"
)

func list(s ...string) *[]string {
	if s == nil {
		s = []string{}
	}
	return &s
}

const image = "registry.example.org/team/web@sha256:4bcff63911fcb4448bd4fdacec207030997caf25e9bea4045fa6c8c44de311d1"

var podID = strings.Repeat("0123456789abcdef", 4)

// critical is a container whose end is the pod's, as most are.
func critical(c spec.PodContainer) spec.PodContainer {
	c.Lifecycle.Critical = true
	return c
}

type example struct {
	pod     spec.Pod
	options Options
}

var examples = map[string]example{
	"minimal": {
		spec.Pod{Name: "minimal", Resources: spec.Resources{Memory: 64 << 20}, Containers: []spec.PodContainer{critical(spec.PodContainer{Name: "main", Image: image})}},
		Options{ID: "minimal"},
	},
	"docker": {
		spec.Pod{
			Name: "web", Hostname: "web", Resources: spec.Resources{Memory: 300 << 20, CPUs: 2}, Scratch: spec.Scratch{Size: 20 << 30},
			Network: spec.Network{
				Publish:    []spec.Publish{{HostPort: 8080, Port: 80}, {Port: 53, Protocol: "udp"}, {HostIP: "127.0.0.1", HostPort: 8443, Port: 443}},
				MAC:        "02:00:00:12:34:56",
				DNS:        []string{"192.0.2.53"},
				DNSSearch:  []string{"example.org"},
				DNSOptions: []string{"ndots:2"},
				ExtraHosts: []spec.HostEntry{{Name: "db", Address: "192.0.2.7"}, {Name: "v6", Address: "2001:db8::7"}},
			},
			Containers: []spec.PodContainer{{
				Name: "main", Image: image, Entrypoint: list("/bin/sh", "-c"), Command: list("echo ${HOME} $${HOME} %{if} 100% $$$ \"q\" \\n\nline"),
				Env: []string{"PASSWORD=secret", "odd name=x", "MULTI=a\nb", "REMOVED"}, User: "www-data:audio", WorkingDir: "/srv", StopSignal: "SIGUSR1",
				Healthcheck: &spec.Healthcheck{Test: []string{"CMD-SHELL", "curl ${URL}"}, Interval: spec.Duration(10 * time.Second), Timeout: spec.Duration(time.Second), StartPeriod: spec.Duration(time.Minute), StartInterval: spec.Duration(time.Second), Retries: 5},
				Settings: spec.Settings{
					Domainname: "example.org", Labels: map[string]string{"team": "shop", "com.example/${x}": "%{y}"}, GroupAdd: []string{"audio", "1000"},
					StopTimeout: ptr(spec.Duration(3 * time.Second)), TTY: true, OpenStdin: true, StdinOnce: true, Init: true, ReadOnly: true, Privileged: true,
					CapAdd: []string{"NET_ADMIN"}, CapDrop: []string{"ALL"}, NoNewPrivs: true, MaskedPaths: &[]string{}, ReadonlyPaths: list("/proc/sys"), WritableCgroups: true, Ulimits: []spec.Ulimit{{Name: "core"}, {Name: "nofile", Soft: 1024, Hard: -1}},
					Sysctls: map[string]string{"net.core.somaxconn": "1024"}, Tmpfs: map[string]string{"/run": "", "/cache": "size=64m,mode=1777"}, ShmSize: 128 << 20,
					Devices: []string{"/dev/fuse"}, Resources: spec.Limits{CPUs: 1.5, CPUShares: 512, Pids: 100, OOMScoreAdj: -5},
					Mounts: []spec.Mount{
						{Volume: "files", Path: "/files", ReadOnly: true, Subpath: "a/b"},
						{Volume: "cache", Path: "/var/cache"},
						{Volume: "cache", Path: "/var/cache2", Subpath: "two", ReadOnly: true, NoCopy: true},
						{Volume: "host", Path: "/host", ReadOnly: true},
					},
					Lifecycle: spec.Lifecycle{RestartOnFailure: true, MaxStarts: 4, RestartDelay: spec.Duration(2 * time.Second), Hold: spec.Duration(10 * time.Second), Critical: true},
					Logs:      spec.Logs{MaxSize: 10 << 20},
				},
			}},
			Volumes: []spec.Volume{
				{Name: "files", Class: "lv2"}, {Name: "cache", Scratch: &spec.ScratchVolume{}}, {Name: "host", Directory: &spec.DirectoryVolume{Path: "/srv/host", Transport: "virtiofs"}},
			},
		},
		Options{
			ID: "docker-" + podID, Namespace: "team", PodID: podID, DiskID: podID, Meta: map[string]string{"docker_id": podID, "run": "3"},
			Node: "5f0a3c1e-7d0b-4a52-9a55-0d6d5ed1d3a4", Zone: "north", Replace: true, Bare: true, Audience: "cradlestack-registry/team/web",
		},
	},
	"pod": {
		spec.Pod{
			Name: "pod", Resources: spec.Resources{Memory: 512 << 20},
			Network: spec.Network{Publish: []spec.Publish{{HostPort: 80, Port: 8080}, {HostPort: 53, Port: 53}, {HostPort: 53, Port: 53, Protocol: "udp"}}},
			Containers: []spec.PodContainer{
				critical(spec.PodContainer{Name: "app", Image: "oci:/images/app"}),
				{
					Name: "side", Image: "oci:/images/side", Env: []string{"A=1"}, StopSignal: "SIGINT",
					Settings: spec.Settings{Lifecycle: spec.Lifecycle{After: []spec.After{{Container: "app", Until: "healthy"}}, RestartOnSuccess: true, RestartOnFailure: true}, Resources: spec.Limits{Memory: 64 << 20}, Mounts: []spec.Mount{{Volume: "shared", Path: "/shared"}}},
				},
			},
			Volumes: []spec.Volume{{Name: "shared", Scratch: &spec.ScratchVolume{}}},
		},
		Options{ID: "pod", Bridge: true, Networks: []Network{{Service: "net-4bcff63911fc", Names: []string{"pod.shop", "pod"}}, {Service: "net-00", Names: []string{"pod.other", "pod"}}}},
	},
	"alone": {
		spec.Pod{
			Name: "alone", Resources: spec.Resources{Memory: 64 << 20}, Network: spec.Network{Mode: "none"},
			Containers: []spec.PodContainer{critical(spec.PodContainer{Name: "main", Image: image})},
		},
		Options{ID: "alone"},
	},
	"service": {
		spec.Pod{
			Name: "shop", Resources: spec.Resources{Memory: 128 << 20, CPUs: 2},
			Network: spec.Network{Publish: []spec.Publish{{HostPort: 8080, Port: 80}, {Port: 443}}},
			Containers: []spec.PodContainer{critical(spec.PodContainer{
				Name: "web", Image: image, Env: []string{"PASSWORD=secret"}, Settings: spec.Settings{Mounts: []spec.Mount{{Volume: "pages", Path: "/srv"}}},
			})},
			Volumes: []spec.Volume{{Name: "pages", Class: "nfs"}},
		},
		Options{
			ID: "shop", Namespace: "team", Zone: "north", Bridge: true, EnvIndex: 42, Variant: "default", Meta: map[string]string{"team": "shop"},
			Constraints: []Constraint{{Attribute: "${attr.kernel.name}", Operator: "=", Value: "linux"}, {Attribute: "${node.class}", Operator: "is_set"}},
			Service: &Service{
				Count: 3, Restart: Restart{Attempts: 1, Interval: time.Minute, Delay: time.Second, Wait: true},
				Update: Update{MaxParallel: 2, MinHealthy: time.Second, Deadline: time.Minute, Revert: true},
				Endpoints: []Endpoint{
					{Name: "shop", Port: 80, Provider: "nomad", Tags: []string{"a", "b"}, Check: &Check{Type: "http", Path: "/health", Interval: 2 * time.Second, Timeout: time.Second}},
					{Name: "shop-metrics", Port: 9100, Provider: "consul"},
				},
			},
		},
	},
}

// The golden files are what pods become; they are read to see whether it is right. What is read back is what went in.
func TestGoldenJobs(t *testing.T) {
	for name, x := range examples {
		t.Run(name, func(t *testing.T) {
			job, err := Job(&x.pod, x.options)
			if err != nil {
				t.Fatal(err)
			}
			got, err := json.MarshalIndent(job, "", "  ")
			if err != nil {
				t.Fatal(err)
			}
			got = append(compact(t, got), '\n')
			golden.Compare(t, filepath.Join("testdata", name+".json"), got)
			if strings.Contains(string(got), "secret\"") || strings.Contains(string(got), "PASSWORD") {
				t.Error("the environment stands in the job's text")
			}
			checkRoundTrip(t, &x.pod, x.options)
		})
	}
}

// compact leaves out what is null: what Nomad fills in.
func compact(t testing.TB, data []byte) []byte {
	t.Helper()
	var v any
	if err := json.Unmarshal(data, &v); err != nil {
		t.Fatal(err)
	}
	out, err := json.MarshalIndent(prune(v), "", "  ")
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func prune(v any) any {
	switch v := v.(type) {
	case map[string]any:
		for name, e := range v {
			if e = prune(e); e == nil || e == "" {
				delete(v, name)
			} else {
				v[name] = e
			}
		}
	case []any:
		for i := range v {
			v[i] = prune(v[i])
		}
	}
	return v
}

// checkRoundTrip sends a job through JSON, as Nomad does, and reads it.
func checkRoundTrip(t testing.TB, p *spec.Pod, o Options) {
	t.Helper()
	job, err := Job(p, o)
	if err != nil {
		t.Fatal(err)
	}
	data, err := json.Marshal(job)
	if err != nil {
		t.Fatal(err)
	}
	var back api.Job
	if err := json.Unmarshal(data, &back); err != nil {
		t.Fatal(err)
	}
	env, err := EnvItems(p, o.Networks)
	if err != nil {
		t.Fatal(err)
	}
	if ReadsEnv(&back) != slices.ContainsFunc(p.Containers, func(c spec.PodContainer) bool { return len(c.Env) > 0 }) {
		t.Errorf("reads an environment: %t", ReadsEnv(&back))
	}
	got, options, err := Pod(&back, env)
	if err != nil {
		t.Fatalf("%v\n%s", err, data)
	}
	got, p = inOrder(*got), inOrder(*p)
	if !reflect.DeepEqual(got, p) {
		t.Errorf("the pod read back is\n%s\nwant\n%s", text(t, got), text(t, p))
	}
	if !reflect.DeepEqual(*options, o) {
		t.Errorf("the options read back are\n%+v\nwant\n%+v", *options, o)
	}
}

// inOrder puts what has no order of its own into one: a job keeps volumes of Nomad's apart from others.
func inOrder(p spec.Pod) *spec.Pod {
	p.Volumes = slices.SortedFunc(slices.Values(p.Volumes), func(a, b spec.Volume) int { return cmp.Compare(a.Name, b.Name) })
	p.Containers = slices.Clone(p.Containers)
	for i := range p.Containers {
		c := &p.Containers[i]
		c.Mounts = slices.SortedFunc(slices.Values(c.Mounts), func(a, b spec.Mount) int { return cmp.Compare(a.Path, b.Path) })
	}
	return &p
}

func text(t testing.TB, v any) string {
	data, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

// A link is a name behind the one that it is for, in the file of its pod alone, whatever stands in it.
func TestLinks(t *testing.T) {
	p := spec.Pod{Name: "p", Containers: []spec.PodContainer{critical(spec.PodContainer{Name: "main", Image: image})}}
	job, err := Job(&p, Options{ID: "p", Bridge: true, Networks: []Network{}, Links: map[string][]string{"b1b1b1b1b1b1": {"db", "db-1"}, "a1a1a1a1a1a1": {`{{"`}}})
	if err != nil {
		t.Fatal(err)
	}
	text := *job.TaskGroups[0].Tasks[0].Templates[0].EmbeddedTmpl
	made, err := template.New("").Funcs(template.FuncMap{
		"nomadVar": func(string) map[string]struct{ Value string } {
			return map[string]struct{ Value string }{networksItem: {"net-1"}}
		},
		"split": func(by, s string) []string { return strings.Split(s, by) },
		"nomadService": func(string) any {
			return []struct {
				Address string
				Tags    []string
			}{{"10.0.0.2", []string{"web", "b1b1b1b1b1b1"}}, {"10.0.0.3", []string{"a1a1a1a1a1a1", "other"}}}
		},
	}).Parse(text)
	if err != nil {
		t.Fatal(err)
	}
	var got strings.Builder
	if err := made.Execute(&got, nil); err != nil {
		t.Fatal(err)
	}
	if want := "10.0.0.2 web b1b1b1b1b1b1 db db-1\n10.0.0.3 a1a1a1a1a1a1 {{\" other\n"; got.String() != want {
		t.Errorf("%q, want %q", got.String(), want)
	}
}

func TestRefused(t *testing.T) {
	for want, edit := range map[string]func(*spec.Pod, *Options){
		"boot: is the client's to say":                    func(p *spec.Pod, _ *Options) { p.Boot.Start = "cold" },
		"containers[0].hostname: all containers of a pod": func(p *spec.Pod, _ *Options) { p.Containers[0].Hostname = "x" },
		"containers[0].command: is empty":                 func(p *spec.Pod, _ *Options) { p.Containers[0].Command = list() },
		"containers[0].mounts[0]: volume v is nothing that": func(p *spec.Pod, _ *Options) {
			with(p, spec.Volume{Name: "v", NFS: &spec.NFSVolume{Address: "a", Export: "/e"}})
		},
		"volumes[0]: has 0 of block, directory": func(p *spec.Pod, _ *Options) { with(p, spec.Volume{Name: "v"}) },
		"network.publish[0].hostIp: 192.0.2.1: a port of": func(p *spec.Pod, o *Options) {
			o.Bridge = true
			p.Network.Publish = []spec.Publish{{HostIP: "192.0.2.1", HostPort: 1, Port: 1}}
		},
		"network.publish[1].hostIp: port 80 of a pod": func(p *spec.Pod, o *Options) {
			o.Bridge = true
			p.Network.Publish = []spec.Publish{{HostPort: 8080, Port: 80}, {HostIP: "127.0.0.1", HostPort: 8081, Port: 80}}
		},
		"endpoints[1].port: port 81 is reached by nobody": func(p *spec.Pod, o *Options) {
			p.Network.Publish = []spec.Publish{{Port: 80}}
			o.Service = &Service{Count: 1, Endpoints: []Endpoint{{Name: "a", Port: 80}, {Name: "b", Port: 81}}}
		},
		"containers: there is none; a pod has at least one": func(p *spec.Pod, _ *Options) { p.Containers = nil },
	} {
		p := spec.Pod{Name: "p", Containers: []spec.PodContainer{critical(spec.PodContainer{Name: "main", Image: image})}}
		o := Options{ID: "p"}
		edit(&p, &o)
		if _, err := Job(&p, o); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v; want %s", err, want)
		}
	}
}

func with(p *spec.Pod, v spec.Volume) {
	p.Volumes = []spec.Volume{v}
	p.Containers[0].Mounts = []spec.Mount{{Volume: v.Name, Path: "/v"}}
}

// Whatever text a pod has, it comes back as it was.
func FuzzTexts(f *testing.F) {
	for _, s := range []string{"", "x", "${a}", "$${a}", "$$${", "%{if true}", "%%{", "$", "%", "{", "\n", `"\`, "ü"} {
		f.Add(s, s)
	}
	f.Fuzz(func(t *testing.T, argument, value string) {
		p := spec.Pod{Name: "p", Resources: spec.Resources{Memory: 64 << 20}, Containers: []spec.PodContainer{critical(spec.PodContainer{
			Name: "main", Image: image, Entrypoint: list(argument), Command: list(argument, value), Env: []string{"A=" + value},
			Settings: spec.Settings{Labels: map[string]string{"l": value}},
		})}}
		if p.Validate() != nil || !utf8.ValidString(argument) || !utf8.ValidString(value) { // pods come from JSON, which has no other texts
			t.Skip()
		}
		checkRoundTrip(t, &p, Options{ID: "p"})
	})
}

// A job of somebody else's is read or refused.
func FuzzPod(f *testing.F) {
	for name := range examples {
		data, err := os.ReadFile(filepath.Join("testdata", name+".json"))
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		var j api.Job
		if json.Unmarshal(data, &j) != nil {
			return
		}
		p, o, err := Pod(&j, nil)
		if err != nil {
			return
		}
		job, err := Job(p, *o)
		if err != nil {
			return // it says what jobs of ours don't
		}
		again, _, err := Pod(job, nil)
		if err != nil || !reflect.DeepEqual(p, again) {
			t.Errorf("read twice, it differs: %v\n%s\n%s", err, text(t, p), text(t, again))
		}
	})
}

// A port of the node is Nomad's for all protocols: it is asked for once, and told of each.
func TestPublished(t *testing.T) {
	p := &spec.Pod{Name: "p", Network: spec.Network{Publish: []spec.Publish{{Port: 80}, {HostPort: 53, Port: 53}, {HostPort: 53, Port: 53, Protocol: "udp"}, {Port: 80, Protocol: "udp"}}}}
	got := Published(p, []api.PortMapping{
		{Label: "port0", Value: 23000, To: 80}, {Label: "port1_tcp_udp", Value: 53, To: 53}, {Label: "port3_udp", Value: 23001, To: 80}, {Label: "foreign", Value: 1, To: 1},
	})
	if by := Published(&spec.Pod{Network: spec.Network{Publish: []spec.Publish{{Port: 80}}}}, []api.PortMapping{{Label: "port_http", Value: 23002, To: 80}}); !slices.Equal(by, []spec.Publish{{HostPort: 23002, Port: 80}}) {
		t.Errorf("by a label of somebody's own: %v", by)
	}
	want := []spec.Publish{{HostPort: 23000, Port: 80}, {HostPort: 53, Port: 53}, {HostPort: 53, Port: 53, Protocol: "udp"}, {HostPort: 23001, Port: 80, Protocol: "udp"}}
	if !slices.Equal(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
}

// What a job says that a pod can't is named; what Job makes has nothing of it.
func TestBeyond(t *testing.T) {
	for name, x := range examples {
		job, err := Job(&x.pod, x.options)
		if err != nil {
			t.Fatal(err)
		}
		job.Canonicalize()
		if got := Beyond(job); len(got) > 0 {
			t.Errorf("%s says %v", name, got)
		}
	}
	for want, edit := range map[string]func(*api.Job, *api.TaskGroup, *api.Task){
		"priority":    func(j *api.Job, _ *api.TaskGroup, _ *api.Task) { j.Priority = ptr(70) },
		"datacenters": func(j *api.Job, _ *api.TaskGroup, _ *api.Task) { j.Datacenters = []string{"dc1"} },
		"node_pool":   func(j *api.Job, _ *api.TaskGroup, _ *api.Task) { j.NodePool = ptr("gpu") },
		"spread":      func(j *api.Job, _ *api.TaskGroup, _ *api.Task) { j.Spreads = []*api.Spread{{Attribute: "a"}} },
		"group.constraint": func(_ *api.Job, g *api.TaskGroup, _ *api.Task) {
			g.Constraints = []*api.Constraint{{LTarget: "${attr.nomad.service_discovery}"}, {}}
		},
		"group.network.dns": func(_ *api.Job, g *api.TaskGroup, _ *api.Task) {
			g.Networks = []*api.NetworkResource{{DNS: &api.DNSConfig{}}}
		},
		"group.volume": func(_ *api.Job, g *api.TaskGroup, _ *api.Task) {
			g.Volumes = map[string]*api.VolumeRequest{"v": {Type: "host"}}
		},
		"group.service": func(_ *api.Job, g *api.TaskGroup, _ *api.Task) {
			g.Services = []*api.Service{{Meta: map[string]string{"a": "b"}}}
		},
		"task.env": func(_ *api.Job, _ *api.TaskGroup, t *api.Task) { t.Env = map[string]string{"A": "1"} },
		"task.template": func(_ *api.Job, _ *api.TaskGroup, t *api.Task) {
			t.Templates = []*api.Template{{DestPath: ptr("local/x")}}
		},
		"task.resources":     func(_ *api.Job, _ *api.TaskGroup, t *api.Task) { t.Resources.MemoryMaxMB = ptr(512) },
		"task.config.unread": func(_ *api.Job, _ *api.TaskGroup, t *api.Task) { t.Config["unread"] = true },
	} {
		x := examples["minimal"]
		job, err := Job(&x.pod, x.options)
		if err != nil {
			t.Fatal(err)
		}
		job.Canonicalize()
		edit(job, job.TaskGroups[0], job.TaskGroups[0].Tasks[0])
		if got := Beyond(job); !slices.Equal(got, []string{want}) {
			t.Errorf("it says %v, want %s", got, want)
		}
	}
}

// A job that somebody has written is read as the driver does: blocks of its file are lists.
func TestWrittenByHand(t *testing.T) {
	task := &api.Task{Name: "web", Driver: Driver, Config: map[string]any{
		"image": "busybox", "command": "sh", "args": []any{"-c", "true"}, "labels": []any{map[string]any{"a": "b"}},
		"healthcheck": []any{map[string]any{"test": []any{"CMD", "true"}}}, "mount": []any{map[string]any{"source": "s", "target": "/s"}},
		"container": []any{map[string]any{"beside": []any{map[string]any{
			"image": "busybox", "command": "sleep", "env": []any{map[string]any{"A": "1"}}, "lifecycle": []any{map[string]any{"after": []any{map[string]any{"container": "web"}}}},
		}}}},
	}}
	job := api.NewServiceJob("web", "web", "global", 50).AddTaskGroup(api.NewTaskGroup("g", 1).AddTask(task))
	job.Canonicalize()
	p, _, err := Pod(job, nil)
	if err != nil {
		t.Fatal(err)
	}
	want := []spec.PodContainer{
		critical(spec.PodContainer{
			Name: "web", Image: "busybox", Command: list("sh", "-c", "true"), Healthcheck: &spec.Healthcheck{Test: []string{"CMD", "true"}},
			Settings: spec.Settings{Labels: map[string]string{"a": "b"}, StopTimeout: ptr(spec.Duration(0)), Mounts: []spec.Mount{{Volume: "s", Path: "/s"}}},
		}),
		{Name: "beside", Image: "busybox", Command: list("sleep"), Env: []string{"A=1"}, Settings: spec.Settings{Lifecycle: spec.Lifecycle{After: []spec.After{{Container: "web"}}}}},
	}
	if !reflect.DeepEqual(p.Containers, want) {
		t.Errorf("it is\n%s\nwant\n%s", text(t, p.Containers), text(t, want))
	}
}
