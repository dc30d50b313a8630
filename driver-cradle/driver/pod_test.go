package driver

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/hashicorp/nomad/api"
	"github.com/hashicorp/nomad/helper/pluginutils/hclspecutils"
	"github.com/hashicorp/nomad/helper/pluginutils/hclutils"
	"github.com/hashicorp/nomad/jobspec2"
	"github.com/hashicorp/nomad/nomad/structs"
	"github.com/hashicorp/nomad/plugins/drivers"
	"github.com/hashicorp/nomad/plugins/shared/hclspec"

	"github.com/cradlestack/cradlestack/internal/golden"
	"github.com/cradlestack/cradlestack/spec"
)

// parseTask reads a job as nomad does, and its one task's configuration as Nomad's client does.
func parseTask(tb testing.TB, job string) (*api.Task, *taskConfig, error) {
	tb.Helper()
	task := parseJob(tb, job)
	var t drivers.TaskConfig
	var c taskConfig
	err := decode(tb, taskSchema(), task.Config, &t)
	if err == nil {
		err = t.DecodeDriverConfig(&c)
	}
	return task, &c, err
}

// parseJob reads a job of one task.
func parseJob(tb testing.TB, job string) *api.Task {
	tb.Helper()
	j, err := jobspec2.Parse("job.hcl", strings.NewReader(job))
	if err != nil {
		tb.Fatal(err)
	}
	return j.TaskGroups[0].Tasks[0]
}

// decode checks a configuration with a schema, and encodes it as Nomad hands it to a plugin.
func decode(tb testing.TB, schema *hclspec.Spec, config any, into *drivers.TaskConfig) error {
	tb.Helper()
	s, diags := hclspecutils.Convert(schema)
	if diags.HasErrors() {
		tb.Fatal(diags)
	}
	v, diags, errs := hclutils.ParseHclInterface(config, s, nil)
	if diags.HasErrors() {
		return errors.Join(errs...)
	}
	return into.EncodeDriverConfig(v)
}

// aTask is what Nomad makes of a task, in an allocation with typical directories.
func aTask(task *api.Task) *drivers.TaskConfig {
	env := map[string]string{"NOMAD_TASK_NAME": task.Name, "NOMAD_ALLOC_ID": "1f2e3d4c"}
	for k, v := range task.Env {
		env[k] = v
	}
	return &drivers.TaskConfig{
		ID: "1f2e3d4c/" + task.Name + "/5b6a", AllocID: "1f2e3d4c", Name: task.Name, User: task.User, Env: env, AllocDir: "/var/nomad/alloc/1f2e3d4c",
		Resources: &drivers.Resources{
			NomadResources: &structs.AllocatedTaskResources{
				Memory: structs.AllocatedMemoryResources{MemoryMB: 300}, Cpu: structs.AllocatedCpuResources{CpuShares: 100},
			},
			Ports: &structs.AllocatedPorts{},
		},
	}
}

// aHost is a client with four cores of 2 GHz, which allows /srv.
func aHost() *host {
	return &host{
		cores: cores{4, 2000}, disk: spec.DefaultScratchSize, variant: "default",
		examine: func(p string) (pathKind, error) {
			switch {
			case strings.Contains(p, "missing"):
				return 0, errors.New(p + " does not exist on this client")
			case strings.HasPrefix(p, "/dev/"):
				return aBlockDevice, nil
			case strings.HasSuffix(p, ".conf"):
				return aFile, nil
			}
			return aDirectory, nil
		},
		allowed: func(p string) error {
			if !strings.HasPrefix(p, "/srv/") {
				return errors.New(p + " is not allowed")
			}
			return nil
		},
		direct:  func(string) (*spec.DirectAttachment, error) { return nil, nil },
		fsType:  func(string) (string, error) { return "", nil },
		readEnv: func(_, p string) ([]string, error) { return []string{"FROM=" + p, "REMOVED"}, nil },
		within:  func(root, p string) (string, error) { return filepath.Join(root, p), nil },
	}
}

// The golden files are what jobs become; they are read to see whether it is right.
func TestGoldenPods(t *testing.T) {
	jobs, err := filepath.Glob("testdata/pod/*.hcl")
	if err != nil || len(jobs) == 0 {
		t.Fatal(err, jobs)
	}
	for _, file := range jobs {
		t.Run(filepath.Base(file), func(t *testing.T) {
			job, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			task, c, err := parseTask(t, string(job))
			if err != nil {
				t.Fatal(err)
			}
			p, err := podOf(aTask(task), c, aHost())
			if err != nil {
				t.Fatal(err)
			}
			got, err := json.MarshalIndent(p, "", "  ")
			if err != nil {
				t.Fatal(err)
			}
			golden.Compare(t, strings.TrimSuffix(file, ".hcl")+".json", append(got, '\n'))
		})
	}
}

// A group's connect blocks, and what the task names itself.
func TestUpstreams(t *testing.T) {
	const job = `
		job "j" {
			group "g" {
				task "t" {
					driver = "cradle"
					config {
						image     = "debian:12"
						upstreams = [5432, 9191]
					}
				}
			}
		}`
	task, c, err := parseTask(t, job)
	if err != nil {
		t.Fatal(err)
	}
	nomads := aTask(task)
	if _, err := podOf(nomads, c, aHost()); err == nil || !strings.Contains(err.Error(), "bridge") {
		t.Errorf("upstreams without a network namespace: %v", err)
	}
	nomads.NetworkIsolation = &drivers.NetworkIsolationSpec{Mode: drivers.NetIsolationModeGroup, Path: "/run/netns/g"}
	for name, value := range map[string]string{
		"ADDR_count-api": "127.0.0.1:9191", "IP_count-api": "127.0.0.1", "PORT_count-api": "9191", "PORT_count_api": "9191", "PORT_db": "9192",
	} {
		nomads.Env["NOMAD_UPSTREAM_"+name] = value
	}
	p, err := podOf(nomads, c, aHost())
	if err != nil {
		t.Fatal(err)
	}
	if want := []uint16{5432, 9191, 9192}; !slices.Equal(p.Network.Upstreams, want) {
		t.Errorf("upstreams %v, want %v", p.Network.Upstreams, want)
	}
	c.Upstreams = []string{"http"}
	if _, err := podOf(nomads, c, aHost()); err == nil || !strings.Contains(err.Error(), `"http" is no port`) {
		t.Errorf("an upstream that is no port: %v", err)
	}
}

// Ports of the host are forwarded at the address that Nomad has chosen, or at another one.
func TestForwardedPorts(t *testing.T) {
	for config, want := range map[string]string{
		`ports = ["http"]`: "10.0.0.1:8080",
		`ports = []`:       "",
		"ports = [\"http\"]\nhost_ips = { http = \"127.0.0.1\" }": "127.0.0.1:8080",
		"ports = [\"http\"]\nhost_ips = { http = \"here\" }":      `host_ips.http: "here" is no IP address`,
		"ports = [\"http\"]\nhost_ips = { http = \"::1\" }":       `ports[0]: http is on an IPv6 address of the host`,
		"ports = [\"http\"]\nhost_ips = { ssh = \"127.0.0.1\" }":  `host_ips.ssh: is no port that is forwarded`,
		`hostname = "h"`: `network: the group's ports are in network mode host`,
	} {
		task, c, err := parseTask(t, "job \"j\" {\n group \"g\" {\n task \"t\" {\n driver = \"cradle\"\n config {\n image = \"debian:12\"\n"+config+"\n}\n}\n}\n}")
		if err != nil {
			t.Fatal(err)
		}
		nomads := aTask(task)
		*nomads.Resources.Ports = structs.AllocatedPorts{{Label: "http", Value: 8080, To: 80, HostIP: "10.0.0.1"}}
		p, err := podOf(nomads, c, aHost())
		if err != nil {
			if want == "" || !strings.Contains(err.Error(), want) {
				t.Errorf("%s: %v; want %s", config, err, want)
			}
			continue
		}
		var got []string
		for _, f := range p.Network.Publish {
			if f.Protocol == "tcp" && f.Port == 80 {
				got = append(got, fmt.Sprintf("%s:%d", f.HostIP, f.HostPort))
			}
		}
		if strings.Join(got, " ") != want {
			t.Errorf("%s: forwarded %v; want %s", config, got, want)
		}
	}
}

// A pod without a network is in a group that has none.
func TestNoNetwork(t *testing.T) {
	for config, want := range map[string]string{
		``:                      "user",
		`network_mode = "none"`: "none",
		`network_mode = "host"`: `network_mode: "host": none, or nothing`,
		"network_mode = \"none\"\nupstreams = [\"80\"]": "network_mode: ports and upstreams need a network",
	} {
		task, c, err := parseTask(t, "job \"j\" {\n group \"g\" {\n task \"t\" {\n driver = \"cradle\"\n config {\n image = \"debian:12\"\n"+config+"\n}\n}\n}\n}")
		if err != nil {
			t.Fatal(err)
		}
		p, err := podOf(aTask(task), c, aHost())
		got := fmt.Sprint(err)
		if err == nil {
			got = p.Network.Mode
		}
		if !strings.Contains(got, want) {
			t.Errorf("%s: %s; want %s", config, got, want)
		}
		nomads := aTask(task)
		nomads.NetworkIsolation = &drivers.NetworkIsolationSpec{Mode: drivers.NetIsolationModeGroup, Path: "/run/netns/g"}
		if _, err := podOf(nomads, c, aHost()); c.NetworkMode == "none" && (err == nil || !strings.Contains(err.Error(), "leave the group's network block out")) {
			t.Errorf("%s in a group network: %v", config, err)
		}
	}
}

// In a group network, ports at the host's 127.0.0.1 are for the bridge alone.
func TestLoopbackPorts(t *testing.T) {
	for config, want := range map[string]string{
		"":                                     "[]",
		`host_ips = { http = "127.0.0.1" }`:    "[80]",
		`host_ips = { admin = "127.0.0.1" }`:   "[9000]",
		`host_ips = { http = "192.0.2.1" }`:    `host_ips.http: "192.0.2.1": a port of a group network`,
		`host_ips = { ssh = "127.0.0.1" }`:     `host_ips.ssh: the group's network has no port "ssh"`,
		`host_ips = { metrics = "127.0.0.1" }`: `host_ips.metrics: the pod's port 9100 is at all addresses of the host as port "more"`,
	} {
		task, c, err := parseTask(t, "job \"j\" {\n group \"g\" {\n task \"t\" {\n driver = \"cradle\"\n config {\n image = \"debian:12\"\n"+config+"\n}\n}\n}\n}")
		if err != nil {
			t.Fatal(err)
		}
		nomads := aTask(task)
		nomads.NetworkIsolation = &drivers.NetworkIsolationSpec{Mode: drivers.NetIsolationModeGroup, Path: "/run/netns/g"}
		*nomads.Resources.Ports = structs.AllocatedPorts{{Label: "http", Value: 8080, To: 80}, {Label: "admin", Value: 9000}, {Label: "metrics", Value: 1, To: 9100}, {Label: "more", Value: 2, To: 9100}}
		p, err := podOf(nomads, c, aHost())
		got := fmt.Sprint(err)
		if err == nil {
			got = fmt.Sprint(p.Network.OnLink)
		}
		if !strings.Contains(got, want) {
			t.Errorf("%s: %s; want %s", config, got, want)
		}
	}
}

// Nomad's word for a task without a limit is -1.
func TestMemoryWithoutLimit(t *testing.T) {
	task, c, err := parseTask(t, "job \"j\" {\n group \"g\" {\n task \"t\" {\n driver = \"cradle\"\n config {\n image = \"debian:12\"\n}\n}\n}\n}")
	if err != nil {
		t.Fatal(err)
	}
	nomads := aTask(task)
	nomads.Resources.NomadResources.Memory.MemoryMaxMB = -1
	if _, err := podOf(nomads, c, aHost()); err == nil || !strings.Contains(err.Error(), "resources.memory_max: a microVM has a size") {
		t.Errorf("memory_max = -1: %v", err)
	}
}

// Every key of the schema is decoded into something.
func TestSchemaIsDecoded(t *testing.T) {
	for _, keys := range []struct {
		keys []key
		into any
	}{{taskKeys, &taskConfig{}}, {configKeys, &config{}}} {
		checkDecoded(t, "", keys.keys, keys.into)
	}
}
