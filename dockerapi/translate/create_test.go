package translate

import (
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	dockerspec "github.com/moby/docker-image-spec/specs-go/v1"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/volume"

	"github.com/cradlestack/cradlestack/internal/dockerhttp"
	"github.com/cradlestack/cradlestack/internal/golden"
	"github.com/cradlestack/cradlestack/spec"
)

var id = strings.Repeat("0123456789abcdef", 4)

// anImage is one with everything that images say.
func anImage() *Image {
	i := &Image{Reference: "registry.example.org/team/web@sha256:4bcff63911fcb4448bd4fdacec207030997caf25e9bea4045fa6c8c44de311d1", ID: "sha256:" + id}
	i.Config.User, i.Config.WorkingDir, i.Config.StopSignal = "www-data", "/srv", "SIGQUIT"
	i.Config.Entrypoint, i.Config.Cmd = []string{"/entry"}, []string{"serve"}
	i.Config.Env = []string{"PATH=/usr/bin:/bin", "LANG=C"}
	i.Config.Labels = map[string]string{"maintainer": "somebody"}
	i.Config.ExposedPorts = map[string]struct{}{"80/tcp": {}}
	i.Config.Volumes = map[string]struct{}{"/data": {}}
	i.Config.Healthcheck = &dockerspec.HealthcheckConfig{Test: []string{"CMD", "check"}, Retries: 2}
	return i
}

func create(t testing.TB, request string, rules Rules) (*Container, error) {
	t.Helper()
	var r container.CreateRequest
	if err := json.Unmarshal([]byte(request), &r); err != nil {
		t.Fatal(err)
	}
	return Create(&r, id, anImage(), rules)
}

// The requests are as docker's CLI sends them; the golden files are what becomes of them, and are read to see whether it is right.
func TestGoldenContainers(t *testing.T) {
	requests, err := filepath.Glob("testdata/create/*.request.json")
	if err != nil || len(requests) == 0 {
		t.Fatal(err, requests)
	}
	for _, file := range requests {
		t.Run(filepath.Base(file), func(t *testing.T) {
			request, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			c, err := create(t, string(request), Rules{})
			if err != nil {
				t.Fatal(err)
			}
			got, err := json.MarshalIndent(struct {
				Pod      *spec.Pod
				Config   *container.Config
				Zone     string
				Volumes  []volume.CreateRequest
				Warnings []string
			}{c.Pod, c.Config, c.Zone, c.Volumes, c.Warnings}, "", "  ")
			if err != nil {
				t.Fatal(err)
			}
			golden.Compare(t, strings.Replace(file, ".request.json", ".json", 1), append(got, '\n'))
		})
	}
}

// What a microVM can't do, and what is wrong, is said; nothing is left out.
func TestRefused(t *testing.T) {
	for request, want := range map[string]string{
		`{}`:                                  "config cannot be empty",
		`{"Image": "x", "Env": ["=a"]}`:       "invalid environment variable: =a",
		`{"Image": "x", "WorkingDir": "rel"}`: "the working directory 'rel' is invalid",
		`{"Image": "x", "Healthcheck": {"Test": ["CMD", "x"], "Interval": 5}}`:                                                                                  "Interval in Healthcheck cannot be less than 1ms",
		`{"Image": "x", "Labels": {"kr.ingress.80": "https://x"}}`:                                                                                              "kr.ingress.80 is not supported yet",
		`{"Image": "x", "Labels": {"kr.res.mem": "lots"}}`:                                                                                                      "a size from",
		`{"Image": "x", "Labels": {"kr.zon": "a"}}`:                                                                                                             "there are kr.zone, kr.res.mem and kr.res.cpu",
		`{"Image": "x", "HostConfig": {"NetworkMode": "host"}}`:                                                                                                 "--network host is not possible",
		`{"Image": "x", "Hostname": "x", "HostConfig": {"NetworkMode": "container:web"}}`:                                                                       "conflicting options: hostname and the network mode",
		`{"Image": "x", "HostConfig": {"NetworkMode": "container:web", "Dns": ["10.0.0.1"]}}`:                                                                   "conflicting options: dns and the network mode",
		`{"Image": "x", "HostConfig": {"NetworkMode": "container:web", "ExtraHosts": ["a:10.0.0.1"]}}`:                                                          "conflicting options: custom host-to-IP mapping and the network mode",
		`{"Image": "x", "HostConfig": {"NetworkMode": "container:web", "Links": ["a"]}}`:                                                                        "conflicting options: container type network can't be used with links",
		`{"Image": "x", "HostConfig": {"NetworkMode": "container:web", "PublishAllPorts": true}}`:                                                               "conflicting options: port publishing and the container type network mode",
		`{"Image": "x", "ExposedPorts": {"80/tcp": {}}, "HostConfig": {"NetworkMode": "container:web"}}`:                                                        "conflicting options: port exposing and the container type network mode",
		`{"Image": "x", "HostConfig": {"NetworkMode": "container:web"}, "NetworkingConfig": {"EndpointsConfig": {"web": {"MacAddress": "02:00:00:00:00:01"}}}}`: "conflicting options: mac-address and the network mode",
		`{"Image": "x", "Labels": {"kr.zone": "a"}, "HostConfig": {"NetworkMode": "container:web"}}`:                                                            "label kr.zone with --network container: is not possible",
		`{"Image": "x", "HostConfig": {"NetworkMode": "container:web", "StorageOpt": {"size": "1g"}}}`:                                                          "--storage-opt with --network container: is not possible",
		`{"Image": "x", "HostConfig": {"PidMode": "container:web"}}`:                                                                                            "add --network container: of the same container",
		`{"Image": "x", "HostConfig": {"IpcMode": "container:web", "NetworkMode": "shop"}}`:                                                                     "add --network container: of the same container",
		`{"Image": "x", "HostConfig": {"NetworkMode": "container:web", "PidMode": "container:"}}`:                                                               "invalid PID mode",
		`{"Image": "x", "HostConfig": {"PidMode": "host"}}`:                                                                                                     "--pid host is not possible: the container has a kernel of its own",
		`{"Image": "x", "HostConfig": {"IpcMode": "host"}}`:                                                                                                     "--ipc host is not possible",
		`{"Image": "x", "HostConfig": {"IpcMode": "whatever"}}`:                                                                                                 "invalid IPC mode: whatever",
		`{"Image": "x", "HostConfig": {"UTSMode": "host"}}`:                                                                                                     "--uts host is not possible",
		`{"Image": "x", "HostConfig": {"UsernsMode": "host"}}`:                                                                                                  "--userns host is not possible",
		`{"Image": "x", "HostConfig": {"CgroupnsMode": "host"}}`:                                                                                                "--cgroupns host is not possible",
		`{"Image": "x", "HostConfig": {"Binds": ["/etc:/etc"]}}`:                                                                                                "directories of a node can't be mounted",
		`{"Image": "x", "HostConfig": {"Binds": ["x:rel"]}}`:                                                                                                    "mount path must be absolute",
		`{"Image": "x", "HostConfig": {"Binds": ["v1:/a", "w1:/a"]}}`:                                                                                           "Duplicate mount point: /a",
		`{"Image": "x", "HostConfig": {"Binds": ["v:/a:shared"]}}`:                                                                                              "mounts are not propagated",
		`{"Image": "x", "HostConfig": {"Binds": ["v:/a:odd"]}}`:                                                                                                 "invalid mode: odd",
		`{"Image": "x", "HostConfig": {"Binds": ["v w:/a"]}}`:                                                                                                   "includes invalid characters for a local volume name",
		`{"Image": "x", "HostConfig": {"Mounts": [{"Type": "npipe", "Target": "/a"}]}}`:                                                                         "mount type unknown",
		`{"Image": "x", "HostConfig": {"Mounts": [{"Type": "volume", "Target": "/"}]}}`:                                                                         "destination can't be '/'",
		`{"Image": "x", "HostConfig": {"Memory": 1000}}`:                                                                                                        "Minimum memory limit allowed is 6MB",
		`{"Image": "x", "HostConfig": {"Memory": 10000000, "MemorySwap": 7000000}}`:                                                                             "Minimum memoryswap limit should be larger",
		`{"Image": "x", "HostConfig": {"NanoCpus": 1000, "CpuQuota": 5000}}`:                                                                                    "Conflicting options",
		`{"Image": "x", "HostConfig": {"CpusetCpus": "0"}}`:                                                                                                     "use --cpus",
		`{"Image": "x", "HostConfig": {"BlkioWeight": 10}}`:                                                                                                     "limits of a disk are its volume's",
		`{"Image": "x", "HostConfig": {"RestartPolicy": {"Name": "sometimes"}}}`:                                                                                "unknown policy 'sometimes'",
		`{"Image": "x", "HostConfig": {"RestartPolicy": {"Name": "always"}, "AutoRemove": true}}`:                                                               "can't create 'AutoRemove' container with restart policy",
		`{"Image": "x", "HostConfig": {"SecurityOpt": ["apparmor=docker-default"]}}`:                                                                            "neither AppArmor nor SELinux",
		`{"Image": "x", "HostConfig": {"Devices": [{"PathOnHost": "/dev/sda", "PathInContainer": "/dev/sda"}]}}`:                                                "devices of the node can't be given",
		`{"Image": "x", "HostConfig": {"DeviceRequests": [{"Count": -1}]}}`:                                                                                     "--gpus is not possible",
		`{"Image": "x", "HostConfig": {"SecurityOpt": ["writeable-cgroups=true"]}}`:                                                                             `invalid --security-opt 2: "writeable-cgroups=true"`,
		`{"Image": "x", "HostConfig": {"SecurityOpt": ["writable-cgroups=1"]}}`:                                                                                 `invalid --security-opt 2: "writable-cgroups=1"`,
		`{"Image": "x", "HostConfig": {"MaskedPaths": ["proc"]}}`:                                                                                               `"proc" is no path of a container`,
		`{"Image": "x", "HostConfig": {"Mounts": [{"Type": "volume", "Source": "v1", "Target": "/a", "VolumeOptions": {"Subpath": "../x"}}]}}`:                  "subpath must be a relative path within the volume",
		`{"Image": "x", "NetworkingConfig": {"EndpointsConfig": {"bridge": {"MacAddress": "03:00:00:00:00:01"}}}}`:                                              "is no address of an interface",
		`{"Image": "x", "HostConfig": {"NetworkMode": "a"}, "NetworkingConfig": {"EndpointsConfig": {"a": {"MacAddress": "02:00:00:00:00:01"}, "b": {"MacAddress": "02:00:00:00:00:02"}}}}`: "one interface for all of its networks",
		`{"Image": "x", "HostConfig": {"Links": ["a:b"]}}`:                                                                                                      "--link is not possible",
		`{"Image": "x", "HostConfig": {"LogConfig": {"Type": "syslog"}}}`:                                                                                       "--log-driver syslog is not possible",
		`{"Image": "x", "HostConfig": {"LogConfig": {"Type": "json-file", "Config": {"max-sise": "1m"}}}}`:                                                      "unknown log opt 'max-sise'",
		`{"Image": "x", "HostConfig": {"PortBindings": {"80/sctp": [{"HostPort": "80"}]}}}`:                                                                     "tcp and udp can be published",
		`{"Image": "x", "HostConfig": {"PortBindings": {"80/tcp": [{"HostPort": "90-80"}]}}}`:                                                                   "invalid port specification",
		`{"Image": "x", "HostConfig": {"NetworkMode": "shop"}, "NetworkingConfig": {"EndpointsConfig": {"shop": {"Aliases": ["a b"]}}}}`:                        "network alias \"a b\"",
		`{"Image": "x", "NetworkingConfig": {"EndpointsConfig": {"bridge": {"Aliases": ["a"]}}}}`:                                                               "only supported for user-defined networks",
		`{"Image": "x", "HostConfig": {"NetworkMode": "none"}, "NetworkingConfig": {"EndpointsConfig": {"shop": {}}}}`:                                          "to no network (none) and to another one",
		`{"Image": "x", "HostConfig": {"NetworkMode": "shop"}, "NetworkingConfig": {"EndpointsConfig": {"shop": {"IPAMConfig": {"IPv4Address": "10.0.0.9"}}}}}`: "--ip is not possible",
		`{"Image": "x", "HostConfig": {"PortBindings": {"80/tcp": [{"HostPort": "8"}], "81/tcp": [{"HostPort": "8"}]}}}`:                                        "port 8 is published twice",
		`{"Image": "x", "HostConfig": {"ExtraHosts": ["h:host-gateway"]}}`:                                                                                      "is not to be reached",
		`{"Image": "x", "HostConfig": {"Ulimits": [{"Name": "odd", "Soft": 1, "Hard": 1}]}}`:                                                                    "\"odd\" is no limit",
		`{"Image": "x", "HostConfig": {"CapAdd": ["ODD"]}}`:                                                                                                     "\"ODD\" is no capability",
	} {
		_, err := create(t, request, Rules{})
		var e dockerhttp.Error
		if err == nil || !strings.Contains(err.Error(), want) || !errors.As(err, &e) || e.Status < 400 {
			t.Errorf("%s: %v; want %s", request, err, want)
		}
	}
	if _, err := create(t, `{"Image": "x", "HostConfig": {"Binds": ["/srv:/srv:ro"]}}`, Rules{HostPaths: true}); err != nil {
		t.Errorf("a directory of the node, where they are allowed: %v", err)
	}
}

// Entrypoint and command are merged with the image's as docker does.
func TestCommand(t *testing.T) {
	for request, want := range map[string]string{
		`{"Image": "x"}`:                                    "/entry serve",
		`{"Image": "x", "Cmd": ["a", "b"]}`:                 "/entry a b",
		`{"Image": "x", "Entrypoint": ["e"]}`:               "e",
		`{"Image": "x", "Entrypoint": ["e"], "Cmd": ["a"]}`: "e a",
		`{"Image": "x", "Entrypoint": [""], "Cmd": ["a"]}`:  "a",
		`{"Image": "x", "Entrypoint": [], "Cmd": ["a"]}`:    "a",
	} {
		c, err := create(t, request, Rules{})
		if err != nil {
			t.Errorf("%s: %v", request, err)
			continue
		}
		own := c.Pod.Containers[0]
		got := slices.Clone(*own.Entrypoint)
		if own.Command != nil {
			got = append(got, *own.Command...)
		}
		if strings.Join(got, " ") != want {
			t.Errorf("%s runs %q, want %q", request, got, want)
		}
	}
}

func TestName(t *testing.T) {
	for name, want := range map[string]string{"web": "web", "/web": "web", "a.b-c_d": "a.b-c_d", "-x": "", "x": "", "a b": "", "": "", "a/b": ""} {
		if got, err := Name(name); got != want || (err == nil) != (want != "") {
			t.Errorf("%q: %q, %v", name, got, err)
		}
	}
}

// Whatever a client sends is an answer, and a pod that is valid.
func FuzzCreate(f *testing.F) {
	requests, err := filepath.Glob("testdata/create/*.request.json")
	if err != nil {
		f.Fatal(err)
	}
	for _, file := range requests {
		data, err := os.ReadFile(file)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		var r container.CreateRequest
		if json.Unmarshal(data, &r) != nil {
			return
		}
		c, err := Create(&r, id, anImage(), Rules{HostPaths: true})
		if err != nil {
			var e dockerhttp.Error
			if !errors.As(err, &e) || e.Status < 400 || e.Status > 501 {
				t.Fatalf("an error without a status: %v", err)
			}
			return
		}
		if err := c.Pod.Validate(); err != nil {
			t.Fatal(err)
		}
	})
}

// Nomad places a task by its stop signal, and knows names alone.
func TestStopSignal(t *testing.T) {
	for asked, want := range map[string]string{"TERM": "SIGTERM", "sigusr1": "SIGUSR1", "15": "SIGTERM", "SIGINT": "SIGINT", "SIGRTMIN+3": "SIGRTMIN+3"} {
		c, err := create(t, `{"Image": "x", "StopSignal": "`+asked+`"}`, Rules{})
		if err != nil {
			t.Fatal(err)
		}
		if got := c.Pod.Containers[0].StopSignal; got != want || c.Config.StopSignal != asked {
			t.Errorf("%s: %s, and inspect tells %s; want %s", asked, got, c.Config.StopSignal, want)
		}
	}
}
