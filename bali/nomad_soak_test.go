//go:build vm && soak

package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/cradlestack/cradlestack/internal/nomadtest"
)

// TestRootSoakNomadImage: the image of examples/bootstrap is a whole Nomad. Its
// agents, the driver, the volumes' plugin that they run from another image, and a
// pod with a network and a volume are real; the host gives the kernel.
func TestRootSoakNomadImage(t *testing.T) {
	p := newPlace(t)
	root, err := filepath.Abs("..")
	if err != nil {
		t.Fatal(err)
	}
	home, err := os.UserCacheDir()
	if err != nil {
		t.Fatal(err)
	}
	p.sh(fmt.Sprintf(`SUFFIX=tar.zst %[1]s/examples/bootstrap/images.sh images nomad cradle-csi
cp -r %[2]s/cradlestack/images/busybox busybox
mkdir bin trusted
cp trust trusted/trust
cat >bin/nomad <<END
#!/bin/sh
# as systemd has it on a host; a node of these tests has private mounts
[ "\$1" != agent ] || mount --make-rshared /
exec %[3]s/bali run -q --trust %[3]s/trust --cache %[3]s/cache -v %[3]s/cache:/var/cache/bali -v %[3]s/trusted:/etc/bali:ro -v /tmp:/tmp -v /var/lib/cni:/var/lib/cni %[3]s/images/nomad.tar.zst -- "\$@"
END
chmod 755 bin/nomad
bin/nomad version`, root, home, p.dir))
	t.Setenv("PATH", p.dir+"/bin:"+os.Getenv("PATH"))
	nomad := nomadtest.Start(t, nomadtest.Options{
		Drivers: []string{"raw_exec", "cradle"},
		Keep:    []string{"cradle", "nomad/client/csi"},
		Plugins: map[string]nomadtest.Plugin{"nomad-driver-cradle": {
			Path: "/usr/lib/nomad/plugins/nomad-driver-cradle", Config: `
    state_dir = "{{.Dir}}/cradle"
    cache_dir = "{{.ClusterDir}}/cache"`,
		}},
	})
	text, err := os.ReadFile(filepath.Join(root, "examples/bootstrap/cradle-csi.nomad.hcl"))
	if err != nil {
		t.Fatal(err)
	}
	dir := nomad.Server().Dir
	nomad.Run(t, strings.NewReplacer(`description = "URL or path of cradle-csi.tar.gz"`, fmt.Sprintf("default = %q", p.dir+"/images/cradle-csi.tar.zst"),
		"/var/lib/nomad", filepath.Join(dir, "nomad"), "/var/lib/cradle", filepath.Join(dir, "cradle"), "/run/cradle", p.dir).Replace(string(text)))
	for deadline := time.Now().Add(nomadtest.Patience); ; time.Sleep(time.Second) {
		if plugin, _, err := nomad.API.CSIPlugins().Info("cradle", nil); err == nil && plugin.ControllersHealthy == 1 && plugin.NodesHealthy == 1 {
			break
		} else if time.Now().After(deadline) {
			t.Fatalf("the volumes' plugin is not healthy: %+v, %v\n%s", plugin, err, nomad.CLI(t, "job", "status", "cradle-csi"))
		}
	}
	if out, errs, code := nomad.TryCLI(t, volume, "volume", "create", "-"); code != 0 {
		t.Fatalf("volume create: %s%s", out, errs)
	}
	pod := nomad.Run(t, fmt.Sprintf(`
job "pod" {
  type = "batch"
  group "pod" {
    network {
      mode = "bridge"
    }
    volume "data" {
      type            = "csi"
      source          = "data"
      access_mode     = "single-node-writer"
      attachment_mode = "file-system"
    }
    task "pod" {
      driver = "cradle"
      config {
        image   = "oci:%s/busybox"
        command = "sh"
        args    = ["-c", "ip addr | grep 172.26. && echo kept >/data/file && sync && echo written && sleep 100000"]
      }
      volume_mount {
        volume      = "data"
        destination = "/data"
      }
      resources {
        cpu    = 100
        memory = 64
      }
    }
  }
}`, p.dir))
	nomad.UntilLogsHave(t, nomad.UntilRunning(t, pod).ID, "pod", "stdout", "written\n")
	// the plugin's mount is there for the host: both images handed it on
	const published = "/nomad/client/csi/monolith/cradle/per-alloc/*/data/*/file"
	if kept := p.sh("cat " + nomad.Server().Path(dir) + published); kept != "kept\n" {
		t.Errorf("the volume on the host: %q", kept)
	}
	if below, err := filepath.Glob(dir + published); err != nil || len(below) != 0 { // where the node's mounts are not seen
		t.Errorf("below the mount: %v, %v", below, err)
	}
	nomad.Stop(t, pod)
	// Nomad takes it from the node after the pod's end
	for deadline := time.Now().Add(nomadtest.Patience); ; time.Sleep(time.Second) {
		out, errs, code := nomad.TryCLI(t, "", "volume", "delete", "data")
		if code == 0 {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("volume delete: %s%s", out, errs)
		}
	}
}

const volume = `id           = "data"
name         = "data"
type         = "csi"
plugin_id    = "cradle"
capacity_min = "64MiB"
capability {
  access_mode     = "single-node-writer"
  attachment_mode = "file-system"
}
parameters {
  class = "lv2"
}
`
