//go:build vm

package nomad

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/nomad/api"

	"github.com/cradlestack/cradlestack/internal/nomadtest"
	"github.com/cradlestack/cradlestack/test/programs"
)

// withVolume is a batch job that has one volume in a pod.
const withVolume = `
job %[1]q {
  type = "batch"
  group "g" {
    restart {
      attempts = 0
      mode     = "fail"
    }
    reschedule {
      attempts  = 0
      unlimited = false
    }
    volume "v" {
      type            = %[2]q
      source          = %[3]q
      attachment_mode = %[4]q
      access_mode     = "single-node-writer"
    }
    task "t" {
      driver = "cradle"
      volume_mount {
        volume      = "v"
        destination = %[6]q
        read_only   = %[5]t
      }
      config {
        image   = "oci:%[7]s"
        command = "sh"
        args    = ["-ec", %[8]q]
      }
      resources {
        cpu    = 100
        memory = 64
      }
    }
  }
}`

// TestVMVolumes gives pods every kind of volume that Nomad mounts: host volumes, those that a plugin makes, and the CSI plugin's, as files and as a
// block device. What one pod writes the next one reads.
func TestVMVolumes(t *testing.T) {
	root, err := programs.Root()
	if err != nil {
		t.Fatal(err)
	}
	csi, err := programs.Path("cradle-csi")
	if err != nil {
		t.Fatal(err)
	}
	image, err := programs.Image("busybox")
	if err != nil {
		t.Fatal(err)
	}
	static := t.TempDir()
	o := nomadtest.Options{
		Drivers: []string{"raw_exec"}, Client: fmt.Sprintf("host_volume \"static\" {\n  path = %q\n}", static),
		Keep: []string{"volumes", "nomad/client/csi", "/run/cradle", "nomad/host_volumes"}, // the CSI plugin's and Nomad's own
	}
	if err := o.Cradle(""); err != nil {
		t.Fatal(err)
	}
	c := nomadtest.Start(t, o)
	n := c.Clients()[0]
	example := func(name string) string {
		text, err := os.ReadFile(filepath.Join(root, "examples/nomad", name))
		if err != nil {
			t.Fatal(err)
		}
		return strings.NewReplacer("/usr/local/bin/cradle-csi", csi, "/var/lib/cradle/volumes", filepath.Join(n.Dir, "volumes"), "/var/lib/nomad", filepath.Join(n.Dir, "nomad")).Replace(string(text))
	}
	create := func(name string) string {
		file := filepath.Join(t.TempDir(), "volume.hcl")
		if err := os.WriteFile(file, []byte(example(name)), 0o600); err != nil {
			t.Fatal(err)
		}
		return c.CLI(t, "volume", "create", file)
	}
	jobs := 0
	run := func(kind, volume, attachment, at string, readOnly bool, script string) string {
		t.Helper()
		jobs++
		job := c.Run(t, fmt.Sprintf(withVolume, fmt.Sprintf("%s-%d", volume, jobs), kind, volume, attachment, readOnly, at, image, script))
		a := c.UntilEnded(t, job)
		if a.ClientStatus != "complete" {
			t.Fatalf("job %s is %s\n%s\n%s", job, a.ClientStatus, c.Logs(t, a.ID, "t", "stderr"), c.Describe())
		}
		out := c.Logs(t, a.ID, "t", "stdout")
		if kind == "csi" { // Nomad places a job for a volume that is claimed when something else happens, and not when the claim ends
			eventually(t, "the end of the claims of "+volume, func() bool {
				v, _, err := c.API.CSIVolumes().Info(volume, nil)
				return err == nil && len(v.ReadAllocs)+len(v.WriteAllocs) == 0
			})
		}
		return out
	}
	written := func(kind, volume, attachment, at string) {
		t.Helper()
		run(kind, volume, attachment, at, false, fmt.Sprintf("echo kept >%s/file; sync; head -c 100000 /dev/urandom >%[1]s/more", at))
		if got := run(kind, volume, attachment, at, true, fmt.Sprintf("cat %s/file; wc -c <%[1]s/more; if echo x 2>/dev/null >%[1]s/new; then echo written; fi", at)); got != "kept\n100000\n" {
			t.Errorf("%s volume %s, read-only: %q", kind, volume, got)
		}
	}

	written("host", "static", "file-system", "/v")
	if data, err := os.ReadFile(filepath.Join(static, "file")); err != nil || string(data) != "kept\n" {
		t.Errorf("the host sees %q, %v", data, err)
	}
	create("mariadb.volume.hcl")
	written("host", "mariadb", "file-system", "/var/lib/data")
	c.CLI(t, "volume", "delete", "-type", "host", hostVolumeID(t, c))

	c.Run(t, example("volumes/cradle-csi.nomad.hcl"))
	eventually(t, "a healthy CSI plugin", func() bool {
		p, _, err := c.API.CSIPlugins().Info("cradle", nil)
		return err == nil && p.ControllersHealthy == 1 && p.NodesHealthy == 1
	})
	create("volumes/database.volume.hcl")
	written("csi", "database", "file-system", "/var/lib/data")
	create("volumes/disk.volume.hcl")
	// Raw, where a program sees the device; then with the file system that it has got there.
	if got := run("csi", "disk", "block-device", "/dev/volumes/data", false, "test -b /dev/volumes/data; echo mark >/dev/volumes/data; sync; head -c 5 /dev/volumes/data"); got != "mark\n" {
		t.Errorf("the raw device has %q", got)
	}
	if got := run("csi", "disk", "block-device", "/dev/volumes/data", true, "head -c 5 /dev/volumes/data; if echo no 2>/dev/null >/dev/volumes/data; then echo written; fi"); got != "mark\n" {
		t.Errorf("the raw device has %q in the next pod", got)
	}
	c.CLI(t, "volume", "delete", "disk")
	create("volumes/disk.volume.hcl")
	run("csi", "disk", "block-device", "/v", false, "echo kept >/v/file")
	if got := run("csi", "disk", "block-device", "/v", false, "cat /v/file; grep -c ' /v ext4 ' /proc/mounts"); got != "kept\n1\n" {
		t.Errorf("the device's file system has %q", got)
	}
	for _, id := range []string{"database", "disk"} {
		c.CLI(t, "volume", "delete", id)
	}
}

// hostVolumeID is that of the only dynamic host volume.
func hostVolumeID(t *testing.T, c *nomadtest.Cluster) string {
	t.Helper()
	volumes, _, err := c.API.HostVolumes().List(&api.HostVolumeListRequest{}, nil)
	if err != nil || len(volumes) != 1 {
		t.Fatalf("host volumes: %v, %v", volumes, err)
	}
	return volumes[0].ID
}

func eventually(t *testing.T, what string, f func() bool) {
	t.Helper()
	for begin := time.Now(); !f(); time.Sleep(100 * time.Millisecond) {
		if time.Since(begin) > nomadtest.Patience {
			t.Fatalf("%s does not come", what)
		}
	}
}
