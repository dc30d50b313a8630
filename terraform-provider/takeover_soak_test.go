//go:build vm && soak

package main

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/hashicorp/nomad/api"

	"github.com/cradlestack/cradlestack/test/programs"
)

// A container that docker has made is imported by docker's name for it, and is Terraform's from the first apply on, without having been started anew.
func TestSoakTerraformTakesOver(t *testing.T) {
	c := openNomad(t)
	w := openWorkspace(t, c)
	image, err := programs.Image("busybox")
	if err != nil {
		t.Fatal(err)
	}
	docker := serveDocker(t, c, "--image-layouts", filepath.Dir(image))
	run := func(args ...string) string {
		t.Helper()
		out, err := docker(args...)
		if err != nil {
			t.Fatal(err)
		}
		return strings.TrimSpace(out)
	}
	id := run("run", "-d", "--name", "web", "--memory", "128m", "-e", "ZONE=1", "-e", "COLOUR=blue", "--label", "tier=front", "--stop-signal", "SIGKILL", "busybox", "sh", "-c", "echo served $COLOUR; exec sleep 100000")
	name := "docker-" + id
	job, _, err := c.API.Jobs().Info(name, nil)
	if err != nil {
		t.Fatal(err)
	}
	allocs, _, err := c.API.Jobs().Allocations(name, false, nil)
	if err != nil || len(allocs) != 1 {
		t.Fatalf("%d allocations, %v", len(allocs), err)
	}
	hcl := func(colour string) string {
		return fmt.Sprintf(`
provider "cradle" {}
resource "cradle_pod" "web" {
  name     = %q
  hostname = %q
  memory   = "128MiB"
  once     = true
  wait_for = "running"
  # of a machine that is lost with its disk, as docker has it
  replace_lost = false
  container {
    name        = "main"
    image       = %q
    entrypoint  = []
    command     = ["sh", "-c", "echo served $COLOUR; exec sleep 100000"]
    env         = { COLOUR = %q, ZONE = "1" }
    labels      = { tier = "front" }
    stop_signal = "SIGKILL"
  }
}
`, name, id[:12], job.TaskGroups[0].Tasks[0].Config["image"], colour)
	}
	w.write(hcl("blue"))

	// What can't be taken over is told why, and stays docker's.
	run("run", "-d", "--rm", "--name", "brief", "--stop-signal", "SIGKILL", "busybox", "sleep", "100000")
	w.fails([]string{"can't be taken over", "--rm"}, "import", "-no-color", "cradle_pod.web", "brief")
	run("rm", "-f", "brief")
	run("create", "--name", "joined", "--network", "container:web", "busybox", "true")
	w.fails([]string{"container joined has joined it", "docker rm -f joined"}, "import", "-no-color", "cradle_pod.web", "web")
	run("rm", "joined")
	run("create", "--name", "idle", "busybox", "true")
	w.fails([]string{"does not run", "docker start"}, "import", "-no-color", "cradle_pod.web", "idle")
	run("rm", "idle")

	w.run("import", "-no-color", "cradle_pod.web", "web")
	if got := run("inspect", "-f", "{{.Id}} {{.State.Running}}", "web"); got != id+" true" {
		t.Errorf("after an import docker says %q", got)
	}
	all, said := w.plan()
	t.Logf("the plan:\n%s", said)
	if got := all["cradle_pod.web"]; got.actions() != "update" || onlyDocker(got) != nil || !strings.Contains(said, `- "docker",`) {
		t.Errorf("the plan has %s: %v\n%s", got.actions(), onlyDocker(got), said)
	}
	w.run("apply", "-auto-approve", "-no-color")
	w.unchanged()
	if again, _, err := c.API.Jobs().Allocations(name, true, nil); err != nil || len(again) != 1 || again[0].ID != allocs[0].ID {
		t.Errorf("the pod was started anew: %d, %v", len(again), err)
		versions, _, _, err := c.API.Jobs().Versions(name, false, nil)
		for _, v := range versions {
			text, _ := json.Marshal(v)
			t.Logf("%s, %v", text, err)
		}
	}
	for _, path := range []string{"docker/containers/", "docker/names/"} {
		if left, _, err := c.API.Variables().PrefixList(path, nil); err != nil || len(left) > 0 {
			t.Errorf("%s has %v, %v", path, left, err)
		}
	}
	if got := run("ps", "--format", "{{.Names}} {{.State}}"); got != name+" running" {
		t.Errorf("docker ps has %q", got)
	}
	if got := run("logs", name); got != "served blue" {
		t.Errorf("docker logs has %q", got)
	}
	if got := run("exec", name, "hostname"); got != id[:12] {
		t.Errorf("docker exec says %q", got)
	}
	if got := run("inspect", "-f", "{{.Name}} {{.State.Status}}", name); got != "/"+name+" running" {
		t.Errorf("docker inspect says %q", got)
	}
	if out, err := docker("rm", "-f", name); err == nil || !strings.Contains(err.Error(), "terraform apply") {
		t.Errorf("docker rm: %q, %v", out, err)
	}

	// From here on it is as any pod.
	w.apply(hcl("red"))
	w.unchanged()
	eventually(t, c, "its log", func() bool {
		out, _ := docker("logs", name)
		return strings.HasSuffix(strings.TrimSpace(out), "served red")
	})
	w.run("destroy", "-auto-approve", "-no-color")

	// What is destroyed before an apply has taken it over, docker forgets as well. It can't be made a pod that Nomad keeps running.
	other := run("run", "-d", "--name", "other", "--stop-signal", "SIGKILL", "busybox", "sleep", "100000")
	short := func(more string) string {
		return fmt.Sprintf("provider \"cradle\" {}\nresource \"cradle_pod\" \"other\" {\n  name = \"docker-%s\"\n  %s\n  container {\n    name  = \"main\"\n    image = \"oci:/nowhere\"\n  }\n}\n", other, more)
	}
	w.write(short("once = true"))
	w.run("import", "-no-color", "cradle_pod.other", "other")
	w.write(short(""))
	w.fails([]string{"A container of docker's runs once"}, "plan", "-no-color")
	w.write("provider \"cradle\" {}\n")
	w.run("apply", "-auto-approve", "-no-color")
	if out := run("ps", "-aq"); out != "" {
		t.Errorf("docker ps has %q", out)
	}
	eventually(t, c, "nothing is left in Nomad", func() bool {
		jobs, _, err := c.API.Jobs().List(&api.QueryOptions{Prefix: "docker-"})
		return err == nil && len(jobs) == 0
	})
	for _, path := range []string{"docker/containers/", "docker/names/", "nomad/jobs/"} {
		if left, _, err := c.API.Variables().PrefixList(path, nil); err != nil || len(left) > 0 {
			t.Errorf("%s has %v, %v", path, left, err)
		}
	}
	err = filepath.WalkDir(c.Dir(), func(path string, d os.DirEntry, err error) error {
		if err == nil && (strings.Contains(d.Name(), id) || strings.Contains(d.Name(), other)) {
			t.Errorf("%s is left", path)
		}
		return nil //nolint:nilerr // it goes meanwhile
	})
	if err != nil {
		t.Fatal(err)
	}
}

// onlyDocker is onlyIn for beyond, and for what no job says.
func onlyDocker(c change) error {
	c.Change.Before["wait_for"] = c.Change.After["wait_for"]
	return c.onlyIn("beyond")
}
