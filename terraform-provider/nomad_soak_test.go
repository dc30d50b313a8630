//go:build vm && soak

package main

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/cradlestack/cradlestack/internal/nomadtest"
	"github.com/cradlestack/cradlestack/test/programs"
)

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
	w.run("apply", "-auto-approve", "-no-color") // what went before that
	w.unchanged()

	// With prevent_destroy_if_in_use = false a destruction waits for the pod's end.
	grown := strings.Replace(volumes, `"64MiB"
  snapshot_id`, `"128MiB"
  snapshot_id`, 1)
	w.write(strings.Replace(grown, `  size = var.size`, "  size = var.size\n  prevent_destroy_if_in_use = false", 1))
	w.run("apply", "-auto-approve", "-no-color")
	var out bytes.Buffer
	cmd := w.start(&out, "destroy", "-auto-approve", "-no-color", "-target=cradle_volume.files")
	eventually(w.t, c, "a destruction that waits", func() bool {
		_, _, err := c.API.CSIVolumes().Info("copy", nil) // it goes before
		return err != nil
	})
	c.Stop(w.t, job)
	if err := cmd.Wait(); err != nil {
		w.t.Errorf("a destruction that waits: %v\n%s", err, &out)
	}
	w.apply(grown)
	w.unchanged()
}
