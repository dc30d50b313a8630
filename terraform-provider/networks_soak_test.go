//go:build vm && soak

package main

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/hashicorp/nomad/api"

	"github.com/cradlestack/cradlestack/internal/nomadtest"
	"github.com/cradlestack/cradlestack/test/programs"
)

// launch runs a program in the node until the test's end, and says what it has told.
func launch(t *testing.T, c *nomadtest.Cluster, program string, args ...string) *bytes.Buffer {
	t.Helper()
	path, err := programs.Path(program)
	if err != nil {
		t.Fatal(err)
	}
	cmd := c.Server().Command(context.Background(), path, args...)
	log := &bytes.Buffer{}
	cmd.Env, cmd.Stdout, cmd.Stderr = c.Env(), log, log
	if err := c.Server().Launch(cmd); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Signal(os.Interrupt) // it may have ended
		_ = cmd.Wait()
		if t.Failed() {
			t.Logf("%s says\n%s", program, log)
		}
	})
	return log
}

// dockerOf is docker's CLI with a server of its API in front of the cluster.
func dockerOf(t *testing.T, c *nomadtest.Cluster) func(args ...string) (string, error) {
	t.Helper()
	cache, err := os.UserCacheDir()
	if err != nil {
		t.Fatal(err)
	}
	socket := filepath.Join(c.Dir(), "tf.sock")
	launch(t, c, "cradle-dockerapi", "serve", "--socket", socket, "--image-layouts", filepath.Join(cache, "cradlestack", "images"))
	config := t.TempDir()
	return func(args ...string) (string, error) {
		cmd := exec.Command("docker", args...)
		cmd.Env = append(os.Environ(), "DOCKER_HOST=unix://"+socket, "DOCKER_CONFIG="+config)
		out, err := cmd.CombinedOutput()
		return strings.TrimSpace(string(out)), err
	}
}

const networksHCL = `
provider "cradle" {}
variable "aliases" {
  default = ["database"]
}
resource "cradle_network" "shop" {
  name   = "shop"
  labels = { team = "shop" }
}
resource "cradle_pod" "db" {
  name     = "db"
  memory   = "64MiB"
  networks = { (cradle_network.shop.name) = { aliases = var.aliases } }
  rollout  = { min_healthy = "100ms" }
  container {
    name        = "main"
    image       = "oci:IMAGE"
    entrypoint  = ["sh", "-c"]
    command     = ["mkdir -p /www && echo stored >/www/index.html && exec httpd -f -p 80 -h /www"]
    stop_signal = "SIGKILL"
  }
}
resource "cradle_pod" "web" {
  name     = "web"
  memory   = "64MiB"
  networks = { (cradle_network.shop.name) = {} }
  rollout  = { min_healthy = "100ms" }
  container {
    name        = "main"
    image       = "oci:IMAGE"
    command     = ["sleep", "100000"]
    env         = { KIND = "front" }
    stop_signal = "SIGKILL"
  }
}
output "image" {
  value = cradle_pod.db.instances[0].images["main"]
}
`

// Pods of Terraform and of docker find each other on one network by their names and aliases.
func TestSoakTerraformNetworks(t *testing.T) {
	c := openNomad(t)
	w := openWorkspace(t, c)
	image, err := programs.Image("busybox")
	if err != nil {
		t.Fatal(err)
	}
	hcl := strings.ReplaceAll(networksHCL, "IMAGE", image)
	w.apply(hcl)
	w.unchanged()
	if got := w.output("image"); !strings.HasPrefix(got, "sha256:") {
		t.Errorf("the image is %q", got)
	}
	docker := dockerOf(t, c)
	said := func(want string, args ...string) {
		t.Helper()
		last := ""
		eventually(t, c, fmt.Sprintf("docker %v: %q", args, want), func() bool {
			out, err := docker(args...)
			if out != last {
				t.Logf("docker %v says %q, %v", args, out, err)
			}
			last = out
			return err == nil && strings.Contains(out, want)
		})
	}
	said("shop", "network", "ls", "--filter", "label=team=shop", "--format", "{{.Name}}")
	said("db", "ps", "--filter", "name=^/db$", "--format", "{{.Names}}")
	if out, err := docker("run", "-d", "--name", "client", "--network", "shop", "--stop-signal", "SIGKILL", "busybox", "sleep", "100000"); err != nil {
		t.Fatal(out)
	}
	for _, name := range []string{"db", "database", "db.shop"} {
		said("stored", "exec", "client", "wget", "-q", "-O", "-", "http://"+name+"/")
		said("stored", "exec", "web", "wget", "-q", "-O", "-", "http://"+name+"/")
	}
	said("1 packets received", "exec", "web", "ping", "-c", "1", "-w", "20", "client")
	said("db", "network", "inspect", "-f", "{{range .Containers}}{{.Name}} {{end}}", "shop")
	if out, err := docker("network", "rm", "shop"); err == nil || !strings.Contains(out, `job:"db"`) {
		t.Errorf("docker removes a network that pods are on: %s, %v", out, err)
	}

	// Imported, everything is as it was.
	if all := w.imports(hcl, map[string]string{"cradle_network.shop": "default/shop", "cradle_pod.db": "db", "cradle_pod.web": "default/web"}); len(all) > 0 {
		t.Errorf("imports change %v", all)
	}
	w.unchanged()

	// Another alias changes names, and nothing that runs.
	before := c.UntilRunning(t, "db").ID
	w.write(strings.Replace(hcl, `["database"]`, `["database", "store"]`, 1))
	all, text := w.plan()
	if one := all["cradle_pod.db"]; len(all) != 1 || one.actions() != "update" || !strings.Contains(text, `+ "store"`) {
		t.Errorf("another alias is %v:\n%s", all, text)
	}
	w.run("apply", "-auto-approve", "-no-color")
	w.unchanged()
	said("stored", "exec", "client", "wget", "-q", "-O", "-", "http://store/")
	if again := c.UntilRunning(t, "db").ID; again != before {
		t.Error("another alias has started another pod")
	}

	// Off the network nobody finds it.
	w.write(strings.Replace(hcl, "  networks = { (cradle_network.shop.name) = { aliases = var.aliases } }\n", "  network = \"bridge\"\n", 1))
	w.run("apply", "-auto-approve", "-no-color")
	w.unchanged()
	eventually(t, c, "its name to be gone", func() bool {
		_, err := docker("exec", "client", "wget", "-q", "-T", "20", "-O", "-", "http://db/")
		return err != nil
	})

	w.fails([]string{"The network is in use", "job docker-"}, "destroy", "-auto-approve", "-no-color")
	if out, err := docker("rm", "-f", "client"); err != nil {
		t.Fatal(out)
	}
	w.run("destroy", "-auto-approve", "-no-color")
	for _, prefix := range []string{"docker/networks/", "nomad/jobs/"} {
		if left, _, err := c.API.Variables().PrefixList(prefix, nil); err != nil || len(left) > 0 {
			t.Errorf("left at %s: %v, %v", prefix, left, err)
		}
	}
	w.write("provider \"cradle\" {}\nresource \"cradle_pod\" \"p\" {\n  name = \"p\"\n  networks = { nowhere = {} }\n  container {\n    name = \"c\"\n    image = \"oci:/nowhere\"\n  }\n}\n")
	w.fails([]string{"There is no such network", "default/nowhere"}, "apply", "-auto-approve", "-no-color")
	if _, _, err := c.API.Jobs().Info("p", &api.QueryOptions{}); err == nil {
		t.Error("a pod without its network was started")
	}
}
