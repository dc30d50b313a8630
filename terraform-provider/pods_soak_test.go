//go:build vm && soak

package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/hashicorp/nomad/api"

	"github.com/cradlestack/cradlestack/internal/nomadtest"
	"github.com/cradlestack/cradlestack/test/programs"
)

// podsHCL is a pod that serves what its environment says, and one that has secrets.
func podsHCL(t *testing.T) string {
	t.Helper()
	image, err := programs.Image("busybox")
	if err != nil {
		t.Fatal(err)
	}
	return strings.ReplaceAll(`
provider "cradle" {}
variable "greeting" {
  default = "hello"
}
variable "secret" {
  default   = "first-secret"
  sensitive = true
}
variable "secret_version" {
  default = "1"
}
variable "name" {
  default = "web"
}
resource "cradle_pod" "web" {
  name   = var.name
  memory = "64MiB"
  container {
    name       = "web"
    image      = "IMAGE"
    entrypoint = ["sh", "-c"]
    command    = ["mkdir -p /www && echo $GREETING >/www/index.html && exec httpd -f -p 80 -h /www"]
    env        = { GREETING = var.greeting }
    stop_signal = "SIGKILL"
    mount {
      path    = "/cache"
      scratch = "cache"
    }
  }
  container {
    name    = "beside"
    image   = "IMAGE"
    command = ["sh", "-c", "echo $KEY; sleep 2; touch /ready; exec sleep 100000"]
    after   = [{ container = "web" }]
    secret_env         = { KEY = "key-of-${var.secret}" }
    secret_env_version = var.secret_version
    healthcheck        = { test = ["CMD-SHELL", "test -f /ready"], interval = "1s" }
  }
  port {
    port = 80
  }
  service {
    name = "web"
    port = 80
    check = {
      type     = "http"
      path     = "/"
      interval = "1s"
    }
  }
  rollout = { min_healthy = "100ms" }
}
resource "cradle_pod" "secret" {
  name   = "secret"
  memory = "64 MiB"
  container {
    name               = "main"
    image              = "IMAGE"
    command            = ["sh", "-c", "echo $PASSWORD $OPEN; exec sleep 100000"]
    env                = { OPEN = "seen" }
    secret_env         = { PASSWORD = var.secret }
    secret_env_version = var.secret_version
    stop_signal        = "SIGKILL"
  }
  wait_for = "running"
}
output "secret" {
  value = cradle_pod.secret.instances[0].id
}
output "port" {
  value = cradle_pod.web.instances[0].ports["80/tcp"]
}
`, "IMAGE", "oci:"+image)
}

// set gives a workspace's variables values.
func (w *workspace) set(values map[string]string) {
	w.t.Helper()
	var b strings.Builder
	for name, value := range values {
		fmt.Fprintf(&b, "%s = %q\n", name, value)
	}
	if err := os.WriteFile(filepath.Join(w.dir, "terraform.tfvars"), []byte(b.String()), 0o600); err != nil {
		w.t.Fatal(err)
	}
}

// get fetches a page inside of the node.
func get(t *testing.T, c *nomadtest.Cluster, address string) string {
	t.Helper()
	out, err := c.Server().Output(t.Context(), "busybox", "wget", "-q", "-O", "-", "http://"+address+"/")
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(out)
}

// Pods are made, changed, imported and removed; what others do to them is seen.
func TestSoakTerraformPods(t *testing.T) {
	c := openNomad(t)
	w := openWorkspace(t, c)
	w.apply(podsHCL(t))
	w.unchanged()
	if got := get(t, c, w.output("port")); got != "hello" {
		t.Errorf("the page is %q", got)
	}
	alloc := w.output("secret")
	c.UntilLogsHave(t, alloc, "main", "stdout", "first-secret seen")
	web := c.UntilRunning(t, "web").ID
	c.UntilLogsHave(t, web, "web", "stdout", "key-of-first-secret")
	testSecretIsNowhere(w, c)

	// Imported, everything is as it was, but for what no job says.
	all := w.imports(podsHCL(t), map[string]string{"cradle_pod.web": "web", "cradle_pod.secret": "default/secret"})
	for address, want := range map[string][]string{
		"cradle_pod.web": {"container", "env_index", "instances", "status"}, "cradle_pod.secret": {"container", "env_index", "instances", "status", "wait_for"},
	} {
		if s := all[address]; s.actions() != "update" || !slices.Equal(s.differs(), want) {
			t.Errorf("the import of %s is %s of %v", address, s.actions(), s.differs())
		}
	}
	w.unchanged()
	if again := w.output("secret"); again != alloc || c.UntilRunning(t, "web").ID != web {
		t.Error("what Nomad does not know of has started another pod")
	}
	w.run("taint", "-no-color", "cradle_pod.web")
	if all, said := w.plan(); len(all) != 1 || all["cradle_pod.web"].actions() != "delete+create" {
		t.Errorf("a tainted pod is left as it is:\n%s", said)
	}
	w.run("untaint", "-no-color", "cradle_pod.web")

	// Another environment is another pod, in place.
	w.set(map[string]string{"greeting": "good day"})
	all, said := w.plan()
	if a := all["cradle_pod.web"]; len(all) != 1 || a.actions() != "update" {
		t.Errorf("another environment is %s:\n%s", a.actions(), said)
	}
	w.run("apply", "-auto-approve", "-no-color")
	if got := get(t, c, w.output("port")); got != "good day" {
		t.Errorf("the page is %q", got)
	}
	w.set(map[string]string{"greeting": "good day", "secret": "second-secret"})
	w.unchanged()
	w.set(map[string]string{"greeting": "good day", "secret": "second-secret", "secret_version": "2"})
	traced := *w
	traced.env = append(slices.Clone(w.env), "TF_LOG_PROVIDER=TRACE")
	if out := traced.run("apply", "-auto-approve", "-no-color"); strings.Contains(out, "second-secret") || !strings.Contains(out, "[TRACE]") {
		t.Errorf("the secret is in the log, or there is none:\n%s", out)
	}
	w.unchanged()
	c.UntilLogsHave(t, w.output("secret"), "main", "stdout", "second-secret seen")

	testPodDrift(w, c)

	// Another name is another pod.
	w.set(map[string]string{"greeting": "good day", "secret": "second-secret", "secret_version": "2", "name": "site"})
	all, said = w.plan()
	if a := all["cradle_pod.web"]; len(all) != 1 || a.actions() != "delete+create" || !slices.Equal(a.replaces(), []string{"name"}) || !strings.Contains(flatten(said), "name is what Nomad knows a job by") {
		t.Errorf("another name is %s for %v:\n%s", a.actions(), a.replaces(), said)
	}
	w.run("destroy", "-auto-approve", "-no-color")
	for _, name := range []string{"web", "secret"} {
		if _, _, err := c.API.Jobs().Info(name, nil); err == nil || !strings.Contains(err.Error(), "not found") {
			t.Errorf("job %s: %v", name, err)
		}
		if _, _, err := c.API.Variables().Read("nomad/jobs/"+name, nil); !errors.Is(err, api.ErrVariablePathNotFound) {
			t.Errorf("the variable of %s: %v", name, err)
		}
	}
}

// testSecretIsNowhere looks for a secret where it has no business.
func testSecretIsNowhere(w *workspace, c *nomadtest.Cluster) {
	w.t.Helper()
	state, err := os.ReadFile(filepath.Join(w.dir, "terraform.tfstate"))
	if err != nil {
		w.t.Fatal(err)
	}
	job := c.CLI(w.t, "job", "inspect", "secret")
	for where, text := range map[string]string{"the state": string(state), "the job": job, "the job of several containers": c.CLI(w.t, "job", "inspect", "web"), "the state that is shown": w.run("show", "-json")} {
		if strings.Contains(text, "first-secret") {
			w.t.Errorf("the secret is in %s:\n%s", where, text)
		}
	}
	if strings.Contains(job, "hello") {
		w.t.Errorf("the environment is in the job:\n%s", job)
	}
}

// testPodDrift is what others do.
func testPodDrift(w *workspace, c *nomadtest.Cluster) {
	w.t.Helper()
	c.CLI(w.t, "job", "scale", "web", "pod", "2")
	all, said := w.plan()
	if a := all["cradle_pod.web"]; len(all) != 1 || a.actions() != "update" || fmt.Sprint(a.Change.Before["replicas"], a.Change.After["replicas"]) != "2 1" {
		w.t.Errorf("a pod that was scaled is %s:\n%s", a.actions(), said)
	}
	w.run("apply", "-auto-approve", "-no-color")
	w.unchanged()

	c.Stop(w.t, "web")
	all, said = w.plan()
	if a := all["cradle_pod.web"]; len(all) != 1 || a.actions() != "update" || a.Change.Before["status"] != "stopped" {
		w.t.Errorf("a pod that was stopped is %s:\n%s", a.actions(), said)
	}
	w.run("apply", "-auto-approve", "-no-color")
	w.unchanged()

	v, _, err := c.API.Variables().Read("nomad/jobs/web", nil)
	if err != nil {
		w.t.Fatal(err)
	}
	v.Items["env"] = `["GREETING=changed"]`
	if _, _, err := c.API.Variables().Update(v, nil); err != nil {
		w.t.Fatal(err)
	}
	all, said = w.plan()
	if a := all["cradle_pod.web"]; len(all) != 1 || a.actions() != "update" || !strings.Contains(said, `"changed" -> "good day"`) {
		w.t.Errorf("a pod with another environment is %s:\n%s", a.actions(), said)
	}
	w.run("apply", "-auto-approve", "-no-color")
	w.unchanged()
	if got := get(w.t, c, w.output("port")); got != "good day" {
		w.t.Errorf("the page is %q", got)
	}
}

// A pod that can't be started, or does not stay, fails the apply that it belongs to, with what there is to say of it.
func TestSoakTerraformPodsFail(t *testing.T) {
	c := openNomad(t)
	w := openWorkspace(t, c)
	image, err := programs.Image("busybox")
	if err != nil {
		t.Fatal(err)
	}
	hcl := func(command, more string) string {
		return fmt.Sprintf(`
provider "cradle" {}
resource "cradle_pod" "p" {
  name    = "fails"
  memory  = "64MiB"
  restart = { attempts = 1, delay = "1s", interval = "5m" }
  rollout = { min_healthy = "3s" }
  container {
    name       = "main"
    image      = "oci:%s"
    entrypoint = ["sh", "-c"]
    command    = [%q]
    stop_signal = "SIGKILL"
  }
  %s
}`, image, command, more)
	}
	w.write(hcl("exec sleep 100000", `zone = "nowhere"`))
	w.fails([]string{"The pod is not healthy", "default/fails: Nomad finds no node for it", "1 of 1: ${meta.zone} = nowhere"}, "apply", "-auto-approve", "-no-color")
	w.write(hcl("echo it is broken >&2; exit 3", ""))
	w.fails([]string{"The pod is not healthy", "default/fails: it has failed", "Exit Code: 3", "Its stderr ends: it is broken"}, "apply", "-auto-approve", "-no-color")
	w.apply(hcl("exec sleep 100000", ""))
	w.unchanged()
	w.write(hcl("echo it is worse >&2; exit 4", "")) // in place, this time
	w.fails([]string{"default/fails: it has failed", "Exit Code: 4", "it is worse"}, "apply", "-auto-approve", "-no-color")
	if all, said := w.plan(); len(all) != 1 || all["cradle_pod.p"].actions() != "update" {
		t.Errorf("a pod that has failed is left as it is:\n%s", said)
	}
	w.apply(hcl("exec sleep 100000", ""))
	w.unchanged()

	// Health checks of containers are waited for, as long as is said.
	checked := func(check, timeout string) string {
		return strings.Replace(hcl("exec sleep 100000", `wait_timeout = "`+timeout+`"`), "stop_signal", "healthcheck = "+check+"\n    stop_signal", 1)
	}
	w.write(checked(`{ test = ["CMD-SHELL", "echo it is ill; false"], interval = "1s", retries = 1 }`, "10m"))
	w.fails([]string{"container main is unhealthy. Its check says: it is ill"}, "apply", "-auto-approve", "-no-color")
	w.write(checked(`{ test = ["CMD-SHELL", "false"], interval = "1h" }`, "12s"))
	w.fails([]string{"The pod is not healthy", "default/fails: not within 12s"}, "apply", "-auto-approve", "-no-color")
	w.apply(checked(`{ test = ["CMD-SHELL", "true"], interval = "1s" }`, "10m"))
	w.unchanged()
	w.run("destroy", "-auto-approve", "-no-color")
}
