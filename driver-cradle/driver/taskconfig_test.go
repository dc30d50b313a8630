package driver

import (
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/nomad/jobspec2"
	"github.com/hashicorp/nomad/plugins/drivers"
)

var hclogNull = hclog.NewNullLogger()

func aTaskConfig(id, alloc, name string) *drivers.TaskConfig {
	return &drivers.TaskConfig{ID: id, AllocID: alloc, Name: name}
}

// FuzzTaskConfig is the way of a job's config block to a pod: whatever is in it, the host's directories that the pod gets are those that the client's
// operator allows and the task's own.
func FuzzTaskConfig(f *testing.F) {
	jobs, err := filepath.Glob("testdata/pod/*.hcl")
	if err != nil {
		f.Fatal(err)
	}
	for _, file := range jobs {
		job, err := os.ReadFile(file)
		if err != nil {
			f.Fatal(err)
		}
		if _, config, ok := strings.Cut(string(job), "config {"); ok {
			f.Add(config[:strings.LastIndexByte(config, '}')])
		}
	}
	for _, config := range []string{
		`image = "x"` + "\n" + `volumes = ["/etc:/x", "../../etc:/y", "local:/z:ro,nocopy", ":", "a:b:c:d", "..:/x", "/srv/../etc:/x"]`,
		`image = "x"` + "\n" + `mount { type = "bind"` + "\n" + `source = "/srv/x/../../etc"` + "\n" + `target = "/a" }`,
		`image = "x"` + "\n" + `mount { type = "task"` + "\n" + `source = "/"` + "\n" + `target = "/" }`,
		`image = "x"` + "\n" + `cpus = 1e300` + "\n" + `pids_limit = -1` + "\n" + `cpu_shares = -5`,
		`image = "x"` + "\n" + `container "../x" { image = "y" }`,
		`image = "x"` + "\n" + `disk = "99999999999999999999EiB"`,
		`image = "x"` + "\n" + `extra_hosts = ["a:b", "::1", ":", "a:[::1]"]` + "\n" + `ulimit { nofile = "::" }`,
		`image = "x"` + "\n" + `healthcheck { interval = "-1s"` + "\n" + `retries = -4 }`,
		`image = "x"` + "\n" + `lifecycle { after { container = "t" } }`,
	} {
		f.Add(config)
	}
	f.Fuzz(func(t *testing.T, config string) {
		job := "job \"j\" {\n group \"g\" {\n task \"t\" {\n driver = \"cradle\"\n config {\n" + config + "\n}\n}\n}\n}"
		j, err := jobspec2.Parse("job.hcl", strings.NewReader(job))
		if err != nil || len(j.TaskGroups) != 1 || len(j.TaskGroups[0].Tasks) != 1 {
			return
		}
		var encoded drivers.TaskConfig
		var c taskConfig
		if err := decode(t, taskSchema(), j.TaskGroups[0].Tasks[0].Config, &encoded); err != nil {
			return
		}
		if err := encoded.DecodeDriverConfig(&c); err != nil {
			t.Fatalf("what the schema lets through is not decoded: %v", err)
		}
		h := aHost()
		p, err := podOf(aTask(j.TaskGroups[0].Tasks[0]), &c, h)
		if err != nil {
			if err.Error() == "" {
				t.Error("an error says nothing")
			}
			return
		}
		if err := p.Validate(); err != nil {
			t.Errorf("a pod that does not validate: %v", err)
		}
		for _, v := range p.Volumes {
			if v.Block != nil {
				t.Errorf("a block device %s", v.Block.Path)
			}
			if v.Directory == nil {
				continue
			}
			rel, err := filepath.Rel("/var/nomad/alloc/1f2e3d4c", v.Directory.Path)
			if (err != nil || !filepath.IsLocal(rel)) && !strings.HasPrefix(v.Directory.Path, "/srv/") || filepath.Clean(v.Directory.Path) != v.Directory.Path {
				t.Errorf("the pod gets %s", v.Directory.Path)
			}
		}
	})
}

// Blocks of one kind have nothing in common.
func TestBlocksAreApart(t *testing.T) {
	config := ""
	names := []string{"a", "b", "c"}
	for _, name := range names {
		config += strings.ReplaceAll(`
			container "@" {
				image   = "image-@"
				command = "command-@"
				args    = ["args-@"]
				env {
					NAME = "env-@"
				}
				mount {
					source = "volume-@"
					target = "/@"
				}
				healthcheck {
					test = ["CMD", "check-@"]
				}
				lifecycle {
					after {
						container = "t"
						until     = "started"
					}
				}
			}`, "@", name)
	}
	_, c, err := parseTask(t, "job \"j\" {\n group \"g\" {\n task \"t\" {\n driver = \"cradle\"\n config {\n image = \"debian:12\"\n"+config+"\n}\n}\n}\n}")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range names {
		want := &containerConfig{
			Image: "image-" + name, Command: "command-" + name, Args: []string{"args-" + name}, Env: map[string]string{"NAME": "env-" + name},
			Mounts: []mountConfig{{Source: "volume-" + name, Target: "/" + name}}, Healthcheck: &healthcheckConfig{Test: []string{"CMD", "check-" + name}},
			Lifecycle: &lifecycleConfig{After: []afterConfig{{"t", "started"}}},
		}
		if got := c.Containers[name]; !reflect.DeepEqual(got, want) {
			t.Errorf("container %s is %+v, want %+v", name, got, want)
		}
	}
	plugin := decodeConfig(t, "registry \"one\" {\n mirrors = [\"of one\"]\n}\nregistry \"other\" {\n mirrors = [\"of other\"]\n}")
	if got := plugin.mirrors(); !reflect.DeepEqual(got, map[string][]string{"one": {"of one"}, "other": {"of other"}}) {
		t.Errorf("mirrors are %v", got)
	}
}

// What is wrong with a value is told with its key.
func TestWrongValues(t *testing.T) {
	for config, want := range map[string]string{
		`cpus = 0.1`:                                            "",
		`cpus = 1.7`:                                            "",
		`pids_limit = 1.5`:                                      `pids_limit: "1.5" is no whole number`,
		`pids_limit = -1`:                                       "",
		`pids_limit = -2`:                                       `pids_limit: "-2" is no whole number from -1`,
		`cpu_shares = 1e30`:                                     `cpu_shares: `,
		`oom_score_adj = -1001`:                                 `oom_score_adj: "-1001" is no whole number from -1000 to 1000`,
		`cpus = "many"`:                                         `cpus: "many" is no number`,
		`cpus = -0.5`:                                           `cpus: "-0.5" is no number`,
		`healthcheck { retries = 5e9 }`:                         `healthcheck.retries: "5000000000" is no whole number from 0 to 2147483647`,
		`lifecycle { max_starts = -2 }`:                         `lifecycle.max_starts: "-2" is no whole number`,
		`shm_size = "lots"`:                                     `shm_size: `,
		`disk_id = "../x"`:                                      `disk_id: "../x" is no id`,
		`ulimit { nofile = "many" }`:                            `ulimit.nofile: "many" is no limit`,
		`ports = ["http"]`:                                      `ports[0]: the group's network has no port "http"`,
		`extra_hosts = ["me"]`:                                  `extra_hosts[0]: "me" is no entry`,
		`extra_hosts = ["me:here"]`:                             `extra_hosts[0].address: "here" is no IP address`,
		`dns_servers = ["::1", "here"]`:                         `dns_servers[1]: "here" is no IP address`,
		`volumes = ["/etc:/x"]`:                                 `volumes[0].source: /etc is not allowed`,
		`volumes = ["../t2/secrets:/x"]`:                        `volumes[0].source: "../t2/secrets" leads out of the task's directory`,
		`volumes = ["/srv/a:b"]`:                                `volumes[0].target: "b" is not absolute`,
		`volumes = ["/srv/a:/b:exec"]`:                          `volumes[0]: option "exec" is none of`,
		`tmpfs = ["/run", "/run"]`:                              `tmpfs[1]: /run is there twice`,
		`image_pull_timeout = "soon"`:                           `image_pull_timeout: "soon" is no duration`,
		`variant = "snp"`:                                       `variant: snp is not supported yet`,
		`mount { target = "x" }`:                                `mount[0].target: "x" is not absolute`,
		"mount {\n target = \"/x\"\n type = \"nfs\"\n}":         `mount[0].type: "nfs" is none of`,
		"container \"t\" {\n image = \"x\"\n}":                  `container "t": name: is the task's own`,
		"container \"a b\" {\n image = \"x\"\n}":                `container "a b": name: "a b" is no container's name`,
		"container \"c\" {\n image = \"x\"\n memory = \"x\"\n}": `container "c": memory: `,
		"container \"c\" {\n image = \"x\"\n work_dir = \"not absolute\"\n}": `container "c": work_dir: `,
		"container \"c\" {\n image = \"x\"\n memory = \"1MiB\"\n}":           `container "c": memory: 1MiB is too small`,
		"container \"c\" {\n image = \"x\"\n cpu_shares = 1\n}":              `container "c": cpu_shares: 1 is out of range`,
		`cpus = 65`:                                         `cpus: 65 is no number of processors`,
		`healthcheck { start_interval = "1ns" }`:            `healthcheck.start_interval: 1ns is too short`,
		`ulimit { nofile = "2:1" }`:                         `ulimit.nofile: 2 is above the hard limit 1`,
		`ulimit { files = 1 }`:                              `ulimit.files: "files" is no limit`,
		`volumes = ["v:/x", "w:/x"]`:                        `mount /x: /x is the place of mount /x as well`,
		"volumes = [\"v:/x\"]\ntmpfs = [\"/x\"]":            `tmpfs["/x"]: /x is the place of mount /x as well`,
		"mount {\n target = \"/x\"\n subpath = \"../y\"\n}": `mount /x: subpath: "../y" is no path inside the volume`,
		"mount {\n target = \"/x\"\n type = \"bind\"\n source = \"/srv/x\"\n transport = \"nfs\"\n}": `mount /x: transport: "nfs" is none of`,
		"mount {\n target = \"/x\"\n type = \"tmpfs\"\n source = \"v\"\n}":                           `mount[0]: source, subpath and no_copy are of volumes`,
		"tmpfs = [\"/x\"]\nmount {\n target = \"/x\"\n type = \"tmpfs\"\n}":                          `mount[0].target: /x is there twice`,
	} {
		task, c, err := parseTask(t, "job \"j\" {\n group \"g\" {\n task \"t\" {\n driver = \"cradle\"\n config {\n image = \"debian:12\"\n"+config+"\n}\n}\n}\n}")
		if err == nil {
			_, err = podOf(aTask(task), c, aHost())
		}
		if want == "" {
			if err != nil {
				t.Errorf("%s: %v", config, err)
			}
		} else if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v; want %s", config, err, want)
		}
	}
}
