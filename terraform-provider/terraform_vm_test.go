//go:build vm

// These tests run the real terraform with the built provider, as its users do. Those that need a Nomad have a real one.
package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/cradlestack/cradlestack/internal/nomadtest"
	"github.com/cradlestack/cradlestack/test/programs"
)

// A workspace is a directory of Terraform's with its state.
type workspace struct {
	t         *testing.T
	dir       string
	terraform string
	env       []string
	c         *nomadtest.Cluster // nil: Terraform runs on the host
}

// header is what every configuration here begins with.
const header = `
terraform {
  required_providers {
    cradle = { source = "cradlestack/cradle" }
  }
}
`

// openWorkspace makes an empty one whose provider is that of bin/. Nothing of it asks a registry.
func openWorkspace(t *testing.T, c *nomadtest.Cluster) *workspace {
	t.Helper()
	terraform, err := exec.LookPath("terraform")
	if err != nil {
		t.Fatal("terraform 1.11 or newer is missing: https://developer.hashicorp.com/terraform/install")
	}
	provider, err := programs.Path("terraform-provider-cradle")
	if err != nil {
		t.Fatal(err)
	}
	w := &workspace{t: t, c: c, dir: t.TempDir(), terraform: terraform}
	rc := filepath.Join(t.TempDir(), "terraformrc")
	text := fmt.Sprintf("provider_installation {\n  dev_overrides {\n    \"cradlestack/cradle\" = %q\n  }\n}\n", filepath.Dir(provider))
	if err := os.WriteFile(rc, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, e := range os.Environ() {
		if name, _, _ := strings.Cut(e, "="); !strings.HasPrefix(name, "TF_") && !strings.HasPrefix(name, "NOMAD_") {
			w.env = append(w.env, e)
		}
	}
	if c != nil {
		w.env = append(c.Env(), "PATH="+os.Getenv("PATH"))
	}
	w.env = append(w.env, "TF_CLI_CONFIG_FILE="+rc, "TF_IN_AUTOMATION=1", "TF_INPUT=0", "CHECKPOINT_DISABLE=1", "HOME="+w.dir)
	return w
}

// write makes a configuration the workspace's.
func (w *workspace) write(hcl string) {
	w.t.Helper()
	if err := os.WriteFile(filepath.Join(w.dir, "main.tf"), []byte(header+hcl), 0o600); err != nil {
		w.t.Fatal(err)
	}
}

// start begins a command of Terraform's, in the node where there is a cluster.
func (w *workspace) start(out io.Writer, args ...string) *exec.Cmd {
	w.t.Helper()
	args = append([]string{"-chdir=" + w.dir}, args...)
	cmd := exec.Command(w.terraform, args...)
	if w.c != nil {
		cmd = w.c.Server().Command(context.Background(), w.terraform, args...)
	}
	cmd.Env, cmd.Stdout, cmd.Stderr = w.env, out, out
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // with the provider that it starts
	var err error
	if w.c != nil {
		err = w.c.Server().Launch(cmd)
	} else {
		err = cmd.Start()
	}
	if err != nil {
		w.t.Fatalf("terraform %s: %v", strings.Join(args, " "), err)
	}
	return cmd
}

// try runs a command of Terraform's and returns its output and exit code.
func (w *workspace) try(args ...string) (string, int) {
	w.t.Helper()
	var out bytes.Buffer
	cmd := w.start(&out, args...)
	if err := cmd.Wait(); err != nil && !errors.As(err, new(*exec.ExitError)) {
		w.t.Fatalf("terraform %s: %v\n%s", strings.Join(args, " "), err, &out)
	}
	return out.String(), cmd.ProcessState.ExitCode()
}

// run is try for what has to succeed.
func (w *workspace) run(args ...string) string {
	w.t.Helper()
	out, code := w.try(args...)
	if code != 0 {
		w.t.Fatalf("terraform %s: exit code %d\n%s", strings.Join(args, " "), code, out)
	}
	return out
}

// fails runs what has to fail, with all of these texts in its output.
func (w *workspace) fails(want []string, args ...string) {
	w.t.Helper()
	out, code := w.try(args...)
	flat := flatten(out)
	for _, s := range want {
		if code == 0 || !strings.Contains(flat, s) {
			w.t.Errorf("terraform %s: exit code %d, without %q:\n%s", strings.Join(args, " "), code, s, out)
		}
	}
}

// A mistake is one line of a resource, beside which there is more of it; or in it, at its %s.
type mistake struct{ line, rest, want string }

// refuses says that validation tells of each mistake, in a resource of its own, at its line. It returns all that is told.
func (w *workspace) refuses(mistakes []mistake, resource func(n int, m mistake) string) string {
	w.t.Helper()
	hcl, lines := later, map[int]mistake{}
	for n, m := range mistakes {
		text := resource(n, m)
		before, _, ok := strings.Cut(text, m.line+"\n")
		if !ok {
			w.t.Fatalf("%q is not in\n%s", m.line, text)
		}
		lines[1+strings.Count(header+hcl+before, "\n")] = m
		hcl += text
	}
	w.write(hcl)
	out, _ := w.try("validate", "-json")
	var v struct {
		Diagnostics []struct {
			Severity, Detail string
			Range            struct{ Start struct{ Line int } }
		}
	}
	if i := strings.Index(out, "{"); i < 0 || json.Unmarshal([]byte(out[i:]), &v) != nil {
		w.t.Fatal(out)
	}
	for _, d := range v.Diagnostics {
		m, ok := lines[d.Range.Start.Line]
		switch {
		case d.Severity != "error":
		case !ok:
			w.t.Errorf("line %d is refused: %s", d.Range.Start.Line, d.Detail)
		case strings.Contains(d.Detail, m.want):
			m.want = ""
			lines[d.Range.Start.Line] = m
		}
	}
	for n, m := range lines {
		if m.want != "" {
			w.t.Errorf("%s in line %d: not told %q:\n%s", m.line, n, m.want, out)
		}
	}
	return out
}

// later is what is known only after an apply.
const later = `
resource "terraform_data" "later" {
  input = "later"
}
locals {
  later = terraform_data.later.output
}
`

// flatten undoes how Terraform breaks and frames its diagnostics.
func flatten(out string) string {
	return strings.Join(strings.Fields(strings.NewReplacer("│", " ", "╷", " ", "╵", " ").Replace(out)), " ")
}

// A change is what a plan says of one resource.
type change struct {
	Address string `json:"address"`
	Change  struct {
		Actions      []string       `json:"actions"`
		Before       map[string]any `json:"before"`
		After        map[string]any `json:"after"`
		AfterUnknown map[string]any `json:"after_unknown"`
		ReplacePaths [][]any        `json:"replace_paths"`
	} `json:"change"`
}

func (c change) actions() string { return strings.Join(c.Change.Actions, "+") }

// plan makes one, and returns what it changes by address, and what it says.
func (w *workspace) plan() (map[string]change, string) {
	w.t.Helper()
	said := w.run("plan", "-no-color", "-out=plan")
	out := w.run("show", "-json", "plan")
	if i := strings.Index(out, "{"); i > 0 { // warnings
		out = out[i:]
	}
	var p struct {
		Changes []change `json:"resource_changes"`
	}
	if err := json.NewDecoder(strings.NewReader(out)).Decode(&p); err != nil {
		w.t.Fatalf("%v\n%s", err, out)
	}
	all := map[string]change{}
	for _, c := range p.Changes {
		if c.actions() != "no-op" && c.actions() != "read" {
			all[c.Address] = c
		}
	}
	return all, said
}

// A nomad that only says that it is there is enough for plans.
func openFake(t *testing.T) *httptest.Server {
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch {
		case r.URL.Path == "/v1/status/leader":
			fmt.Fprintln(w, `"127.0.0.1:4647"`)
		case r.URL.Path == "/v1/acl/token/self" && r.Header.Get("X-Nomad-Token") != "good":
			http.Error(w, "ACL token not found", http.StatusForbidden)
		case r.URL.Path == "/v1/acl/token/self":
			fmt.Fprintln(w, `{}`)
		default:
			http.Error(w, r.URL.Path+" is asked for", http.StatusTeapot)
		}
	}))
	t.Cleanup(s.Close)
	return s
}

// Mistakes are told before anything is made, at their line: also beside what is not known yet.
func TestTerraformValidates(t *testing.T) {
	openWorkspace(t, nil).refuses([]mistake{
		{`size = "ten"`, ``, `size "ten": unit "ten" is none of`},
		{`size = "0"`, ``, `there has to be something`},
		{`name = "../etc"`, ``, `"../etc" is no name`},
		{`class = "gp"`, ``, `"gp" is none of nfs, lv2, gfs`},
		{`access_mode = "multi-node-multi-writer"`, `class = "lv2"`, `A block volume is for one node at a time`},
		{`attach = "direct"`, ``, `Only block volumes can be attached by a guest itself`},
		{`attachment_mode = "block-device"`, ``, `Only block volumes are devices`},
		{`snapshots = "hourly"`, ``, `parameter snapshots`},
		{`clone_id = "a"`, `snapshot_id = "b@c"`, `leave out snapshot_id or clone_id`},
		{`rollback_to = "before"`, `class = "lv2"`, `make a volume with snapshot_id`},
		{`colour = "red"`, ``, `not expected here`},
		{`parameters = { fsx = "ext4" }`, ``, `parameter "fsx": there is none`},
		{`parameters = { fs = "ntfs" }`, ``, `"ntfs" is none of ext4, xfs`},
		{`parameters = { class = "lv2" }`, ``, `It is an attribute of the volume`},
		{`parameters = { cold = "hourly=1" }`, ``, `It is for block volumes`},
		{`parameters = { iops = "100" }`, ``, `kept by the guest's machine`},
		{`size = "ten"`, "zone = local.later\nparameters = { fs = local.later }", `unit "ten" is none of`},
		{`attach = "direct"`, `name = local.later`, `Only block volumes can be attached by a guest itself`},
	}, func(n int, m mistake) string {
		name := "name = \"v\"\n"
		if strings.HasPrefix(m.line, "name") || strings.HasPrefix(m.rest, "name") {
			name = ""
		}
		return fmt.Sprintf("resource \"cradle_volume\" \"v%d\" {\n%s%s\n%s\n}\n", n, name, m.rest, m.line)
	})
}

// A pod's mistakes are told at their line, too.
func TestTerraformValidatesPods(t *testing.T) {
	container := "container {\nname = \"c\"\nimage = \"busybox\"\n%s\n}"
	out := openWorkspace(t, nil).refuses([]mistake{
		{`memory = "lots"`, ``, `size "lots": unit "lots" is none of`},
		{`name = "Web"`, ``, `"Web" is no name`},
		{`wait_timeout = "soon"`, ``, `duration "soon" is not such as 1m30s`},
		{`network = "host"`, ``, `"host" is none of user, bridge, none`},
		{`port = 70000`, "port {\n%s\n}", `70000 is not from 1 to 65535`},
		{`working_dir = "rel"`, "container {\nname = \"c\"\nimage = \"busybox\"\n%s\n}", `workingDir`},
		{`stop_timeout = "1s"`, "container {\nname = \"c\"\nimage = \"busybox\"\n}\ncontainer {\nname = \"d\"\nimage = \"busybox\"\n%s\n}", `stop_timeout of a further container has no place in a job`},
		{`secret_env_version = null`, "container {\nname = \"c\"\nimage = \"busybox\"\nsecret_env = { A = \"hidden\" }\n%s\n}", `it needs a text beside it that changes with it`},
		{`env = { A = "1" }`, "container {\nname = \"c\"\nimage = \"busybox\"\nsecret_env = { A = \"hidden\" }\nsecret_env_version = 1\n%s\n}", `A is in secret_env as well`},
		{`path = "relative"`, "container {\nname = \"c\"\nimage = \"busybox\"\nmount {\nscratch = \"s\"\n%s\n}\n}", `containers[0].mounts[0].path`},
		{`port = 81`, "port {\nport = 80\n}\nservice {\nname = \"s\"\n%s\n}", `port 81 is reached by nobody`},
		{`networks = { host = {} }`, ``, `"host" is a network that docker has for itself`},
		{`networks = { shop = { aliases = ["a b"] } }`, ``, `"a b" is no name`},
		{`networks = { shop = { aliases = ["p"] } }`, ``, `p is a name of the pod there anyway`},
		{`network = "user"`, "networks = { shop = {} }", `Pods of a network reach each other in their node's bridge`},
		{`wait_for = "completed"`, ``, `Nomad keeps this pod running: set once = true`},
		{`wait_for = "healthy"`, `once = true`, `Wait until it is running or completed`},
		{`replicas = 3`, `once = true`, `leave replicas out`},
		{`restart = { attempts = 1 }`, `once = true`, `leave restart out`},
		{`labels = { "kr.ingress.80" = "https://a.example.org" }`, "container {\nname = \"c\"\nimage = \"busybox\"\n%s\n}", `kr.ingress.80 is not supported yet`},
		{`labels = { "kr.zone" = "north" }`, "container {\nname = \"c\"\nimage = \"busybox\"\n%s\n}", `write the pod's zone`},
		{`replicas = 2`, "container {\nname = \"c\"\nimage = \"busybox\"\nmount {\nvolume = \"v\"\npath = \"/v\"\n}\n}", `Volume v is for one pod at a time`},
		// What Nomad would refuse.
		{`name = "a_b"`, "service {\nport = 80\n%s\n}\nport {\nport = 80\n}", `"a_b" is no name of a service`},
		{`catalog = "consul"`, "network = \"bridge\"\nservice {\nname = \"s\"\nport = 80\n}\nservice {\nname = \"t\"\nport = 80\n%s\n}", `another one is in nomad`},
		{`catalog = "consul"`, "networks = { shop = {} }\nservice {\nname = \"s\"\nport = 80\n%s\n}", `its networks are in Nomad's`},
		{`name = "twice"`, "network = \"bridge\"\nservice {\nport = 80\nname = \"twice\" #\n}\nservice {\nport = 80\n%s\n}", `is the 1. block of that kind`},
		{`check = { type = "http" }`, "network = \"bridge\"\nservice {\nname = \"s\"\nport = 80\n%s\n}", `write path = "/"`},
		{`check = { type = "http", path = "http://a" }`, "network = \"bridge\"\nservice {\nname = \"s\"\nport = 80\n%s\n}", `write it from /`},
		{`check = { interval = "500ms" }`, "network = \"bridge\"\nservice {\nname = \"s\"\nport = 80\n%s\n}", `500ms is too short`},
		{`restart = { interval = "1s" }`, ``, `1s is too short: at least 5s`},
		{`restart = { attempts = 100, delay = "1m" }`, ``, `100 attempts with a delay of 1m0s do not fit into an interval of 30m0s`},
		{`restart = { attempts = 0, mode = "delay" }`, ``, `leave mode out`},
		{`rollout = { min_healthy = "10m" }`, ``, `let deadline be longer`},
		{`operator = "~"`, "constraint {\nattribute = \"a\"\nvalue = \"b\"\n%s\n}", `"~" is none of =`},
		{`attribute = ""`, "constraint {\nvalue = \"b\"\n%s\n}", `It is missing: write such as ${attr.cpu.arch}`},
		{`value = ""`, "constraint {\nattribute = \"a\"\n%s\n}", `= compares the attribute with it`},
		{`value = "("`, "constraint {\nattribute = \"a\"\noperator = \"regexp\"\n%s\n}", `missing closing )`},
		{`value = "a"`, "constraint {\nattribute = \"a\"\noperator = \"is_set\"\n%s\n}", `compares with nothing`},
		{`value = "0"`, "constraint {\nattribute = \"a\"\noperator = \"distinct_property\"\n%s\n}", `"0" is no number of pods`},

		// What is not known yet keeps nothing else from being looked at.
		{`memory = "1KiB"`, "namespace = local.later\nreplicas = length(local.later)\nrestart = local.later == \"later\" ? {} : null", `is too small to boot`},
		{`working_dir = "rel"`, "container {\nname = local.later\nimage = local.later\ncommand = [local.later]\nenv = { A = local.later }\nhealthcheck = local.later == \"later\" ? { test = [\"NONE\"] } : null\n%s\n}", `"rel" is not absolute`},
		{`path = "relative"`, "container {\nname = \"c\"\nimage = local.later\nmount {\nscratch = local.later\n%s\n}\n}", `no clean absolute path`},
		{`port = 81`, "hostname = local.later\nport {\nport = 80\n}\nservice {\nname = local.later\n%s\n}", `port 81 is reached by nobody`},
		{`labels = { "kr.ingress.80" = local.later }`, container, `kr.ingress.80 is not supported yet`},
		{`wait_for = "completed"`, `zone = local.later`, `set once = true`},
		{`network = "user"`, "zone = local.later\nnetworks = { shop = { aliases = [local.later] } }", `Pods of a network reach each other in their node's bridge`},
		{`secret_env_version = null`, "container {\nname = local.later\nimage = \"busybox\"\nsecret_env = { A = local.later }\n%s\n}", `it needs a text beside it that changes with it`},
		{`memory = "1KiB"`, "container {\nname = \"c\"\nimage = \"busybox\"\n}\ncontainer {\nname = \"d\"\nimage = local.later\n%s\n}", `is too small; at least`},
		{`after = [{ container = "nobody" }]`, "container {\nname = \"c\"\nimage = local.later\n%s\n}", `the pod has no container "nobody"`},
		{`cap_add = ["NONE"]`, "container {\nname = \"c\"\nimage = local.later\n%s\n}", `"NONE" is no capability`},
	}, func(n int, m mistake) string {
		hcl := fmt.Sprintf("resource \"cradle_pod\" \"p%d\" {\n", n)
		if !strings.HasPrefix(m.line, "name") || strings.Contains(m.rest, "%s") {
			hcl += "name = \"p\"\n"
		}
		if strings.Contains(m.rest, "%s") {
			hcl += fmt.Sprintf(m.rest, m.line)
		} else {
			hcl += m.line + "\n" + m.rest
		}
		if !strings.Contains(hcl, "container {") {
			hcl += "\ncontainer {\nname = \"c\"\nimage = \"busybox\"\n}"
		}
		return hcl + "\n}\n"
	})
	if strings.Contains(out, "hidden") {
		t.Errorf("a secret is told:\n%s", out)
	}
}

// What a volume will be is seen before it is made.
func TestTerraformPlansDefaults(t *testing.T) {
	nomad := openFake(t)
	w := openWorkspace(t, nil)
	w.write(fmt.Sprintf(`
provider "cradle" {
  address   = %q
  namespace = "team"
}
resource "cradle_volume" "files" {
  name = "files"
}
resource "cradle_volume" "db" {
  name  = "db"
  class = "lv2"
  size  = "10 GB"
}
resource "cradle_network" "shop" {
  name = "shop"
}
resource "cradle_pod" "joined" {
  name     = "joined"
  networks = { (cradle_network.shop.name) = { aliases = ["database"] } }
  container {
    name  = "main"
    image = "busybox"
  }
}
resource "cradle_pod" "once" {
  name = "once"
  once = true
  container {
    name  = "main"
    image = "busybox"
  }
}
output "bytes" {
  value = provider::cradle::size("10GiB") + provider::cradle::size("1 KB")
}
`, nomad.URL))
	all, said := w.plan()
	for address, want := range map[string]map[string]any{
		"cradle_volume.files": {"id": "team/files", "namespace": "team", "plugin": "cradle", "class": "nfs", "access_mode": "multi-node-multi-writer", "attachment_mode": "file-system", "attach": "host", "prevent_destroy_if_in_use": true},
		"cradle_network.shop": {"id": "team/shop", "namespace": "team"},
		"cradle_pod.joined":   {"id": "team/joined", "network": "bridge", "once": false, "wait_for": "healthy"},
		"cradle_pod.once":     {"network": "user", "once": true, "wait_for": "completed", "node": nil},
		"cradle_volume.db":    {"id": "team/db", "size": "10 GB", "class": "lv2", "access_mode": "single-node-writer", "attach": "direct"},
	} {
		c := all[address]
		for name, value := range want {
			if c.actions() != "create" || c.Change.After[name] != value {
				t.Errorf("%s %s.%s is %v, want %v", c.actions(), address, name, c.Change.After[name], value)
			}
		}
	}
	if !strings.Contains(said, "bytes = 10737419240") {
		t.Errorf("the sum of sizes is not there:\n%s", said)
	}
	w.write(`output "bytes" {
  value = provider::cradle::size("a lot")
}`)
	w.fails([]string{`size "a lot": unit "a lot" is none of`}, "plan", "-no-color")
}

// What is known only when something else has been made can stand in any place: what is planned then leaves that open.
func TestTerraformPlansUnknown(t *testing.T) {
	nomad := openFake(t)
	w := openWorkspace(t, nil)
	w.write(fmt.Sprintf(`
provider "cradle" {
  address = %q
}
resource "terraform_data" "text" {
  input = "later"
}
resource "terraform_data" "list" {
  input = ["80", "81"]
}
locals {
  text = terraform_data.text.output
  yes  = terraform_data.text.output == "later"
}
resource "cradle_pod" "blocks" {
  name      = local.text
  namespace = local.text
  memory    = local.text
  replicas  = length(terraform_data.list.output)
  restart   = local.yes ? { attempts = 3 } : null
  rollout   = local.yes ? { max_parallel = 2 } : null
  networks  = { (local.text) = { aliases = terraform_data.list.output } }
  container {
    name        = local.text
    image       = local.text
    command     = terraform_data.list.output
    env         = { (local.text) = local.text }
    labels      = { A = local.text }
    secret_env  = { B = local.text }
    secret_env_version = local.text
    healthcheck = local.yes ? { test = terraform_data.list.output } : null
    after       = [for name in terraform_data.list.output : { container = name }]
    dynamic "mount" {
      for_each = terraform_data.list.output
      content {
        path    = mount.value
        scratch = mount.value
      }
    }
  }
  dynamic "port" {
    for_each = terraform_data.list.output
    content {
      port = port.value
    }
  }
}
resource "cradle_pod" "texts" {
  name      = "texts"
  namespace = local.text
  node      = local.text
  once      = local.yes
  wait_for  = local.text
  container {
    name    = local.text
    image   = local.text
    command = [local.text]
  }
}
resource "cradle_pod" "parts" {
  name     = "parts"
  replicas = 2
  network  = local.text
  container {
    name       = "one"
    image      = "busybox"
    entrypoint = terraform_data.list.output
    command    = []
    mount {
      path   = "/a"
      volume = local.text
      shared = true
    }
    mount {
      path   = "/b"
      volume = "b"
      shared = local.yes
    }
    mount {
      path    = "/c"
      scratch = local.text
    }
  }
  container {
    name  = local.text
    image = "busybox"
    after = [{ container = "one" }]
  }
  container {
    name  = "three"
    image = "busybox"
    after = [{ container = "later" }]
  }
  port {
    port      = 80
    host_port = 8080
    protocol  = local.yes ? "udp" : "tcp"
  }
  port {
    port      = 81
    host_port = 8080
  }
  service {
    name = "s"
    port = 90
  }
  service {
    name    = "s"
    port    = local.yes ? 81 : 90
    catalog = local.yes ? "nomad" : "consul"
  }
  constraint {
    operator = local.yes ? "distinct_hosts" : "="
  }
}
resource "cradle_network" "n" {
  name      = "n"
  namespace = local.text
  labels    = { A = local.text }
}
resource "cradle_volume" "v" {
  name        = "v"
  namespace   = local.text
  plugin      = local.text
  class       = local.text
  size        = local.text
  zone        = local.text
  parameters  = { pool = local.text }
  snapshot_id = local.yes ? "a" : null
  clone_id    = local.yes ? null : "b"
}
resource "cradle_snapshot" "s" {
  name      = "s"
  volume    = local.text
  namespace = local.text
  plugin    = local.text
}
`, nomad.URL))
	all, _ := w.plan()
	for _, address := range []string{"cradle_pod.blocks", "cradle_pod.texts", "cradle_pod.parts", "cradle_network.n", "cradle_volume.v", "cradle_snapshot.s"} {
		if c := all[address]; c.actions() != "create" || (c.Change.AfterUnknown["namespace"] == true) != (address != "cradle_pod.parts") {
			t.Errorf("%s is planned as %q: %v", address, c.actions(), c.Change.AfterUnknown)
		}
	}
}

// A Nomad that is not there, and one that does not know who asks, are told of once.
func TestTerraformReachesNomad(t *testing.T) {
	nomad := openFake(t)
	w := openWorkspace(t, nil)
	w.write(`
provider "cradle" {}
resource "cradle_volume" "v" {
  name = "v"
}`)
	plan := func(env ...string) (string, int) {
		w := *w
		w.env = append(slices.Clone(w.env), env...)
		return w.try("plan", "-no-color")
	}
	for _, c := range []struct {
		env  []string
		want string
	}{
		{[]string{"NOMAD_ADDR=http://127.0.0.1:1"}, "Nomad can't be reached"},
		{[]string{"NOMAD_ADDR=" + nomad.URL, "NOMAD_TOKEN=bad"}, "Nomad does not know this token"},
		{[]string{"NOMAD_ADDR=" + nomad.URL, "NOMAD_CACERT=/nonexistent/ca.pem"}, "/nonexistent/ca.pem: no such file"},
		{[]string{"NOMAD_ADDR=" + nomad.URL, "NOMAD_TOKEN=good"}, ""},
		{[]string{"NOMAD_ADDR=" + nomad.URL}, ""},
	} {
		out, code := plan(c.env...)
		if (code == 0) != (c.want == "") || !strings.Contains(flatten(out), c.want) {
			t.Errorf("%v: exit code %d, want %q:\n%s", c.env, code, c.want, out)
		}
		if n := strings.Count(out, "Error: "); c.want != "" && n != 1 {
			t.Errorf("%v: %d errors:\n%s", c.env, n, out)
		}
		if strings.Contains(out, "=bad") || strings.Contains(out, "good") {
			t.Errorf("the token is in the output:\n%s", out)
		}
	}
	testReachesByTLS(w, plan)
	w.write(`
resource "terraform_data" "later" {
  input = "http://127.0.0.1:4646"
}
provider "cradle" {
  address = terraform_data.later.output
}
resource "cradle_volume" "v" {
  name = "v"
}`)
	w.fails([]string{"Not known yet", "address = terraform_data.later.output"}, "plan", "-no-color")
}

// testReachesByTLS is a Nomad that answers only clients with a certificate, and of its region.
func testReachesByTLS(w *workspace, plan func(env ...string) (string, int)) {
	nomad := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Query().Get("region") != "north" {
			http.Error(w, "no path to region", http.StatusInternalServerError)
			return
		}
		fmt.Fprintln(w, `"127.0.0.1:4647"`)
	}))
	nomad.TLS = &tls.Config{ClientAuth: tls.RequireAnyClientCert}
	nomad.Config.ErrorLog = log.New(io.Discard, "", 0)
	nomad.StartTLS()
	w.t.Cleanup(nomad.Close)
	cert, key := filepath.Join(w.dir, "cert.pem"), filepath.Join(w.dir, "key.pem")
	own := nomad.TLS.Certificates[0] // the client's as well
	der, err := x509.MarshalPKCS8PrivateKey(own.PrivateKey)
	if err != nil {
		w.t.Fatal(err)
	}
	for name, block := range map[string]*pem.Block{cert: {Type: "CERTIFICATE", Bytes: own.Certificate[0]}, key: {Type: "PRIVATE KEY", Bytes: der}} {
		if err := os.WriteFile(name, pem.EncodeToMemory(block), 0o600); err != nil {
			w.t.Fatal(err)
		}
	}
	env := []string{"NOMAD_ADDR=" + nomad.URL, "NOMAD_CACERT=" + cert, "NOMAD_CLIENT_CERT=" + cert, "NOMAD_CLIENT_KEY=" + key, "NOMAD_REGION=north"}
	for _, c := range []struct {
		env  []string
		want string
	}{
		{env[:1], "certificate"},                    // unknown authority
		{env[:2], "certificate required"},           // of the client
		{env[:4], "no path to region"},              // the wrong one
		{slices.Concat(env[:3], env[4:]), "NOMAD_"}, // no key
		{env, ""},
	} {
		out, code := plan(c.env...)
		if (code == 0) != (c.want == "") || !strings.Contains(flatten(out), c.want) {
			w.t.Errorf("%v: exit code %d, want %q:\n%s", c.env, code, c.want, out)
		}
	}
	w.write(fmt.Sprintf(`
provider "cradle" {
  address   = %q
  region    = "north"
  ca_file   = %q
  cert_file = %[2]q
  key_file  = %q
}
resource "cradle_volume" "v" {
  name = "v"
}`, nomad.URL, cert, key))
	if out, code := plan("NOMAD_ADDR=http://127.0.0.1:1", "NOMAD_REGION=south"); code != 0 {
		w.t.Errorf("attributes do not come before the environment:\n%s", out)
	}
}

// What make install-provider installs, terraform init finds, and no registry is asked.
func TestTerraformInit(t *testing.T) {
	root, err := programs.Root()
	if err != nil {
		t.Fatal(err)
	}
	w := openWorkspace(t, nil)
	if out, err := exec.Command("make", "-C", root, "-o", "build", "install-provider", "PROVIDERS="+filepath.Join(w.dir, ".terraform.d/plugins")).CombinedOutput(); err != nil {
		t.Fatalf("make install-provider: %v\n%s", err, out)
	}
	empty := filepath.Join(t.TempDir(), "terraformrc")
	if err := os.WriteFile(empty, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	w.env = append(w.env, "TF_CLI_CONFIG_FILE="+empty, "HTTPS_PROXY=http://127.0.0.1:1")
	w.write("resource \"cradle_volume\" \"v\" {\n  name = \"v\"\n}\n")
	if out := w.run("init", "-no-color"); !strings.Contains(out, "Installed cradlestack/cradle") {
		t.Errorf("init says\n%s", out)
	}
	w.run("validate", "-no-color")
}
