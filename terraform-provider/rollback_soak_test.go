//go:build vm && soak

package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/cradlestack/cradlestack/test/programs"
)

const rollbackHCL = `
provider "cradle" {
  filer = "http://127.0.0.1:20500"
}
variable "back" {
  default = null
}
resource "cradle_volume" "files" {
  name        = "files"
  rollback_to = var.back
}
resource "cradle_pod" "first" {
  name   = "first"
  once   = true
  memory = "64MiB"
  container {
    name    = "main"
    image   = "oci:IMAGE"
    command = ["sh", "-c", "echo first >/v/file"]
    mount {
      path   = "/v"
      volume = cradle_volume.files.name
      shared = true
    }
  }
}
resource "cradle_snapshot" "before" {
  volume     = cradle_volume.files.name
  name       = "before"
  depends_on = [cradle_pod.first]
}
output "undo" {
  value = cradle_volume.files.undo_snapshot
}
`

// expects is a pod that finds a text in the volume, and leaves another one.
func expects(name, want, leaves string) string {
	return strings.NewReplacer("NAME", name, "WANT", want, "LEAVES", leaves).Replace(`
resource "cradle_pod" "NAME" {
  name   = "NAME"
  once   = true
  memory = "64MiB"
  container {
    name    = "main"
    image   = "oci:IMAGE"
    command = ["sh", "-c", "if grep -qx WANT /v/file; then echo LEAVES >/v/file; else cat /v/file >&2; exit 3; fi"]
    mount {
      path   = "/v"
      volume = cradle_volume.files.name
      shared = true
    }
  }
  depends_on = [cradle_snapshot.before, cradle_volume.files]
}
`)
}

// A volume is rolled back once for each value that says so, and the rollback can be undone; pods that run once do, and tell how it went.
func TestSoakTerraformRollback(t *testing.T) {
	c := openNomad(t)
	w := openWorkspace(t, c)
	image, err := programs.Image("busybox")
	if err != nil {
		t.Fatal(err)
	}
	nomadAt := ""
	for _, e := range c.Env() {
		if value, ok := strings.CutPrefix(e, "NOMAD_ADDR="); ok {
			nomadAt = value
		}
	}
	launch(t, c, "cradle-filer", "serve", "--pool", filepath.Join(c.Server().Dir, "volumes"), "--state", filepath.Join(c.Dir(), "tf-filer"), "--socket", filepath.Join(c.Dir(), "tf-filer.sock"),
		"--listen", "127.0.0.1:20490", "--api", "127.0.0.1:20500", "--nomad", nomadAt)
	with := func(pods ...string) string {
		return strings.ReplaceAll(rollbackHCL+strings.Join(pods, ""), "IMAGE", image)
	}
	second := expects("second", "first", "second")
	w.apply(with(second))
	w.unchanged()
	if got := statusIn(w, "cradle_pod.second"); got != "completed" {
		t.Errorf("a pod that has run once is %q", got)
	}

	// What Nomad forgets after its end is not run again.
	if _, _, err := c.API.Jobs().Deregister("first", true, nil); err != nil {
		t.Fatal(err)
	}
	w.unchanged()

	// A pod that fails says why; its next run is another one.
	w.write(with(second, expects("wrong", "nothing", "x")))
	w.fails([]string{"The pod is not completed", "default/wrong: it has failed", "Its stderr ends: second"}, "apply", "-auto-approve", "-no-color")

	if err := os.WriteFile(filepath.Join(w.dir, "terraform.tfvars"), []byte("back = \"nowhere\"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	w.write(with(second))
	w.fails([]string{"The volume was not rolled back", "default/files to nowhere", "rollback_to = var.back"}, "apply", "-auto-approve", "-no-color")
	set := func(name string) { w.set(map[string]string{"back": name}) }
	set("before")
	all, said := w.plan()
	if f := all["cradle_volume.files"]; f.actions() != "update" || !strings.Contains(flatten(said), "default/files becomes what it was in snapshot before") {
		t.Errorf("a rollback is %v:\n%s", all, said)
	}
	w.run("apply", "-auto-approve", "-no-color")
	w.unchanged()
	undo := w.output("undo")
	third := expects("third", "first", "third")
	w.apply(with(second, third)) // which rolls nothing back
	w.unchanged()
	set(undo)
	w.run("apply", "-auto-approve", "-no-color")
	w.unchanged()
	w.apply(with(second, third, expects("fourth", "second", "fourth")))
	w.unchanged()
	if all := w.imports(with(second, third), map[string]string{"cradle_pod.third": "third"}); len(all["cradle_pod.third"].differs()) > 0 {
		t.Errorf("the import of a pod that has run once changes %v", all["cradle_pod.third"].differs())
	}
	w.run("destroy", "-auto-approve", "-no-color")
	if left, _, err := c.API.CSIVolumes().List(nil); err != nil || len(left) > 0 {
		t.Errorf("left: %v, %v", left, err)
	}
}

// statusIn is a resource's in the state.
func statusIn(w *workspace, address string) string {
	w.t.Helper()
	for _, line := range strings.Split(w.run("state", "show", "-no-color", address), "\n") {
		if name, value, ok := strings.Cut(line, "="); ok && strings.TrimSpace(name) == "status" && strings.HasPrefix(line, "    status") {
			return strings.Trim(strings.TrimSpace(value), `"`)
		}
	}
	return ""
}
