//go:build vm && soak

package main

import (
	"context"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cradlestack/cradlestack/internal/nomadtest"
	"github.com/cradlestack/cradlestack/test/programs"
)

func TestMain(m *testing.M) {
	code := m.Run()
	if cluster.Cluster != nil {
		if err := cluster.Close(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			code = 1
		}
	}
	os.Exit(code)
}

// cluster is one Nomad for all tests, with pods and volumes.
var cluster struct {
	sync.Once
	*nomadtest.Cluster
	err error
}

// openNomad is the cluster with the volumes' plugin, for this test.
func openNomad(t *testing.T) *nomadtest.Cluster {
	t.Helper()
	cluster.Do(func() {
		o := nomadtest.Options{ACL: true}
		if cluster.err = o.Cradle(""); cluster.err != nil {
			return
		}
		o.Keep = append(o.Keep, "cradle", "volumes", "nomad/client/csi", "/run/cradle")
		cluster.Cluster, cluster.err = nomadtest.Open(context.Background(), o)
	})
	if cluster.err != nil {
		t.Fatal(cluster.err)
	}
	c := cluster.Cluster
	c.Begin(t)
	c.RunVolumes(t)
	return c
}

func eventually(t *testing.T, c *nomadtest.Cluster, what string, f func() bool) {
	t.Helper()
	for end := time.Now().Add(nomadtest.Patience); !f(); time.Sleep(50 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%s: not within %v\n%s", what, nomadtest.Patience, c.Describe())
		}
	}
}

// apply makes a configuration the workspace's, and the cluster like it.
func (w *workspace) apply(hcl string) string {
	w.t.Helper()
	w.write(hcl)
	return w.run("apply", "-auto-approve", "-no-color")
}

// differs lists the attributes that differ, sorted.
func (c change) differs() (names []string) {
	for name, was := range c.Change.Before {
		_, unknown := c.Change.AfterUnknown[name]
		if is := c.Change.After[name]; unknown && c.Change.AfterUnknown[name] == true || fmt.Sprint(was) != fmt.Sprint(is) {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names
}

// replaces lists the attributes for which a resource is replaced.
func (c change) replaces() (names []string) {
	for _, p := range c.Change.ReplacePaths {
		names = append(names, fmt.Sprint(p[0]))
	}
	slices.Sort(names)
	return names
}

// unchanged makes a plan that has to change nothing.
func (w *workspace) unchanged(args ...string) {
	w.t.Helper()
	if out, code := w.try(append([]string{"plan", "-no-color", "-detailed-exitcode"}, args...)...); code != 0 {
		w.t.Errorf("a plan changes something, exit code %d:\n%s", code, out)
	}
}

// imports takes resources out of the state, and plans to import them: all is as it was.
func (w *workspace) imports(hcl string, ids map[string]string) map[string]change {
	w.t.Helper()
	addresses := slices.Sorted(maps.Keys(ids))
	w.run(append([]string{"state", "rm"}, addresses...)...)
	for _, a := range addresses {
		hcl += fmt.Sprintf("import {\n  to = %s\n  id = %q\n}\n", a, ids[a])
	}
	w.write(hcl)
	all, said := w.plan()
	if want := fmt.Sprintf("%d to import", len(ids)); !strings.Contains(said, want) {
		w.t.Errorf("without %q:\n%s", want, said)
	}
	w.run("apply", "-auto-approve", "-no-color")
	return all
}

// output is one of the state's outputs.
func (w *workspace) output(name string) string {
	w.t.Helper()
	return strings.TrimSpace(w.run("output", "-raw", name))
}

const volumes = `
provider "cradle" {}
variable "size" {
  default = "64MiB"
}
variable "snapshots" {
  default = null
}
resource "cradle_volume" "files" {
  name = "files"
  size = var.size
}
resource "cradle_volume" "db" {
  name       = "db"
  class      = "lv2"
  size       = "32MiB"
  snapshots  = var.snapshots
  parameters = { fs = "ext4" }
}
resource "cradle_snapshot" "before" {
  volume = cradle_volume.files.name
  name   = "before"
}
resource "cradle_volume" "copy" {
  name        = "copy"
  size        = "64MiB"
  snapshot_id = cradle_snapshot.before.id
}
data "cradle_volumes" "all" {
  depends_on = [cradle_volume.copy, cradle_volume.db]
}
data "cradle_volume" "db" {
  name       = cradle_volume.db.name
  depends_on = [cradle_volume.db]
}
data "cradle_snapshots" "files" {
  volume     = cradle_volume.files.name
  depends_on = [cradle_snapshot.before]
}
data "cradle_nodes" "all" {}
output "seen" {
  value = join(" ", [
    join(",", data.cradle_volumes.all.volumes[*].name), data.cradle_volume.db.class, data.cradle_volume.db.attach,
    join(",", data.cradle_snapshots.files.snapshots[*].name), data.cradle_nodes.all.nodes[0].runs_pods,
  ])
}
`

// Volumes and snapshots are made, seen, imported, grown, replaced and deleted; what others do to them is seen.
func TestSoakTerraformVolumes(t *testing.T) {
	c := openNomad(t)
	w := openWorkspace(t, c)
	w.apply(volumes)
	if got, want := w.output("seen"), "copy,db,files lv2 direct before true"; got != want {
		t.Errorf("the data sources have %q, want %q", got, want)
	}
	w.unchanged()
	w.unchanged("-var", "size=65536KiB") // the same, written in another way

	// Imported, everything is as it was.
	if all := w.imports(volumes, map[string]string{"cradle_volume.db": "default/db", "cradle_volume.copy": "copy", "cradle_snapshot.before": "default/files@before"}); len(all) > 0 {
		t.Errorf("imports change %v", all)
	}

	// It grows in place, and does not shrink.
	w.fails([]string{"A volume never shrinks", "default/files has 64MiB", "size = var.size"}, "plan", "-no-color", "-var", "size=1MiB")
	if err := os.WriteFile(filepath.Join(w.dir, "terraform.tfvars"), []byte("size = \"100 MB\"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	all, said := w.plan()
	if f := all["cradle_volume.files"]; len(all) != 1 || f.actions() != "update" || !slices.Equal(f.differs(), []string{"capacity", "size"}) {
		t.Errorf("growth is %s of %v:\n%s", f.actions(), f.differs(), said)
	}
	w.run("apply", "-auto-approve", "-no-color")
	w.unchanged()
	if v, _, err := c.API.CSIVolumes().Info("files", nil); err != nil || v.Capacity < 100e6 {
		t.Errorf("grown to %+v, %v", v, err)
	}

	// Somebody else makes it grow, and takes the snapshot away.
	v, _, err := c.API.CSIVolumes().Info("copy", nil)
	if err != nil {
		t.Fatal(err)
	}
	v.RequestedCapacityMin = 128 << 20
	if _, _, err := c.API.CSIVolumes().Create(v, nil); err != nil {
		t.Fatal(err)
	}
	w.fails([]string{"A volume never shrinks", "default/copy has 128MiB"}, "plan", "-no-color")
	w.write(strings.Replace(volumes, `"64MiB"
  snapshot_id`, `"128MiB"
  snapshot_id`, 1))
	w.unchanged()

	// Another schedule is another volume, as is told; what a plan says is what happens.
	if err := os.WriteFile(filepath.Join(w.dir, "terraform.tfvars"), []byte("size = \"100 MB\"\nsnapshots = \"hourly=2\"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	all, said = w.plan()
	if d := all["cradle_volume.db"]; len(all) != 1 || d.actions() != "delete+create" || !slices.Equal(d.replaces(), []string{"snapshots"}) || !strings.Contains(flatten(said), "default/db is deleted with all that is in it") {
		t.Errorf("another schedule is %s for %v:\n%s", d.actions(), d.replaces(), said)
	}
	w.run("apply", "-auto-approve", "-no-color")
	w.unchanged()

	// What is not Terraform's is not taken, unless it is what an apply had made that was killed.
	w.run("state", "rm", "cradle_volume.db")
	w.write(strings.Replace(volumes, `"32MiB"`, `"33MiB"`, 1))
	w.fails([]string{"There is such a volume", "terraform import ADDRESS default/db"}, "apply", "-auto-approve", "-no-color", "-target=cradle_volume.db")
	w.write(strings.Replace(volumes, `"64MiB"
  snapshot_id`, `"128MiB"
  snapshot_id`, 1))
	if out := w.run("apply", "-auto-approve", "-no-color"); !strings.Contains(flatten(out), "default/db is as it should be") {
		t.Errorf("what is there is not taken up:\n%s", out)
	}
	w.unchanged()
	testVolumeInUse(w, c)
	if _, stderr, code := c.TryCLI(t, "", "volume", "delete", "copy"); code != 0 { // behind Terraform's back
		t.Fatal(stderr)
	}
	all, said = w.plan()
	if len(all) != 1 || all["cradle_volume.copy"].actions() != "create" {
		t.Errorf("a volume that has gone is not made again:\n%s", said)
	}
	w.run("destroy", "-auto-approve", "-no-color")
	if left, _, err := c.API.CSIVolumes().List(nil); err != nil || len(left) > 0 {
		t.Errorf("left: %v, %v", left, err)
	}
}

// testVolumeInUse destroys a volume that a pod has.
func testVolumeInUse(w *workspace, c *nomadtest.Cluster) {
	image, err := programs.Image("busybox")
	if err != nil {
		w.t.Fatal(err)
	}
	job := c.Run(w.t, fmt.Sprintf(`
job "user" {
  group "g" {
    volume "v" {
      type            = "csi"
      source          = "files"
      attachment_mode = "file-system"
      access_mode     = "multi-node-multi-writer"
    }
    task "t" {
      driver = "cradle"
      volume_mount {
        volume      = "v"
        destination = "/v"
      }
      config {
        image   = "oci:%s"
        command = "sleep"
        args    = ["1000"]
      }
      resources {
        memory = 64
      }
    }
  }
}`, image))
	c.UntilRunning(w.t, job)
	w.fails([]string{"The volume is in use", "job user has it"}, "destroy", "-auto-approve", "-no-color", "-target=cradle_volume.files")
	c.Stop(w.t, job)
	w.run("apply", "-auto-approve", "-no-color") // what went before that
	w.unchanged()
}

// computed are attributes that a change of any other makes unknown.
var computed = []string{"status", "env_index", "instances"}

// differences lists the paths at which two values of a plan differ: as the schema has them, without places in lists and names in maps of texts.
func differences(at string, was, is any) (paths []string) {
	switch w := was.(type) {
	case map[string]any:
		if i, ok := is.(map[string]any); ok {
			for _, name := range slices.Sorted(maps.Keys(merged(w, i))) {
				paths = append(paths, differences(strings.TrimPrefix(at+"."+name, "."), w[name], i[name])...)
			}
			return paths
		}
	case []any:
		if i, ok := is.([]any); ok && len(i) == len(w) {
			for n := range w {
				paths = append(paths, differences(at, w[n], i[n])...)
			}
			return paths
		}
	}
	if !reflect.DeepEqual(was, is) {
		paths = []string{at}
	}
	return paths
}

func merged(a, b map[string]any) map[string]any {
	all := maps.Clone(a)
	maps.Copy(all, b)
	return all
}

// onlyIn says that nothing but an attribute differs, and that it does.
func (c change) onlyIn(attribute string) error {
	was, is := maps.Clone(c.Change.Before), maps.Clone(c.Change.After)
	for _, name := range computed {
		delete(was, name)
		delete(is, name)
	}
	paths := differences("", was, is)
	if len(paths) == 0 {
		return fmt.Errorf("nothing differs: %s", c.actions())
	}
	for _, p := range paths {
		if p != attribute && !strings.HasPrefix(p, attribute+".") {
			return fmt.Errorf("%s differs", p)
		}
	}
	return nil
}
