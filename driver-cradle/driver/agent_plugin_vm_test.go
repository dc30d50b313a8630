//go:build vm

package driver

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/cradlestack/cradlestack/internal/nomadtest"
	"github.com/cradlestack/cradlestack/test/dockerd"
)

// pluginSettings is a plugin block with what openAgents leaves as it is by default.
const pluginSettings = `
state_dir           = "{{.Dir}}/cradle/state"
cache_dir           = %q
boot_package        = %q
qemu_uid            = 1500000000
default_disk        = "96MiB"
image_pull_timeout  = "2s"
insecure_registries = ["` + silent + `"]
gc {
  image_delay = "1s"
}
`

// What an operator writes into the plugin's block, and what the host then lacks, as Nomad's users see it.
func TestVMAgentPluginSettings(t *testing.T) {
	dir, err := os.MkdirTemp("", "ps") // short: dockerd's socket is in it
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	cache, boot := filepath.Join(dir, "cache"), filepath.Join(dir, "boot")
	if err := os.Mkdir(cache, 0o711); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(dir, 0o711); err != nil { // QEMU runs as another user
		t.Fatal(err)
	}
	if err := unix.Mount("cache", cache, "tmpfs", 0, "size=1g,mode=711"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { // the kernel lets go of images a moment after the machines' end
		eventually(t, func() string {
			if err := unix.Unmount(cache, 0); err != nil {
				return err.Error()
			}
			return "unmounted"
		}, func(s string) bool { return s == "unmounted" })
	})
	daemon := dockerd.ForTest(t, dir)
	t.Setenv("DOCKER_HOST", daemon.Host)
	if err := daemon.Load(t.Context(), "tests/settings:1", busybox(t)); err != nil {
		t.Fatal(err)
	}
	plugin, err := buildPlugin()
	if err != nil {
		t.Fatal(err)
	}
	c := nomadtest.Start(t, nomadtest.Options{Plugins: map[string]nomadtest.Plugin{
		"nomad-driver-cradle": {Path: plugin, Config: fmt.Sprintf(pluginSettings, cache, boot)},
	}})
	n := c.Clients()[0]

	// Without a boot package nothing is placed there, and the reason is told; once it is there, what waits begins.
	job := c.Run(t, imageJob("settings", "docker-daemon:tests/settings:1", "df -m / | awk 'END {print $2}'; exec sleep 1000", `image_pull_timeout = "5m"`))
	eventually(t, func() string { return c.CLI(t, "node", "status", "-verbose", nodeID(t, c)) }, func(s string) bool { return strings.Contains(s, boot) })
	if err := os.Symlink(shared.boot, boot); err != nil {
		t.Fatal(err)
	}
	a := c.UntilRunning(t, job)
	if out := c.UntilLogs(t, a.ID, "main", "stdout", func(s string) bool { return strings.HasSuffix(s, "\n") }); len(strings.TrimSpace(out)) > 2 {
		t.Errorf("the disk has %s MiB", out) // what is left of 96 with a file system on it
	}
	if uid := machineUID(t, n); uid < 1500000000 || uid >= 1500065536 {
		t.Errorf("the pod's machine runs as user %d", uid)
	}
	c.Stop(t, job)
	eventually(t, func() string { return imagesIn(t, cache) }, func(s string) bool { return s == "" })

	// A registry that never answers is given up after the plugin's time, where the task names none.
	l, err := n.Listen("tcp", silent)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	fail(t, c, map[string]failure{"silence": {batch(imageJob("silence", silent+"/busybox", "", "", "", once)), "the images were not there within 2s (image_pull_timeout)"}})()

	// A full cache is a reason; once somebody has made room, the task runs.
	full := filepath.Join(cache, "full")
	fill(t, cache, full)
	job = c.Run(t, imageJob("full", "oci:"+aLayout(t, 16<<20), "echo here; exec sleep 1000", `image_pull_timeout = "5m"`, "", `
    restart {
      attempts = 1000
      interval = "1h"
      delay    = "1s"
      mode     = "delay"
    }`))
	a = c.UntilAlloc(t, job, "told that the cache is full", func(a *nomadAlloc) bool { return a.TaskStates["main"] != nil && a.TaskStates["main"].Restarts > 0 })
	if got := events(t, c, a.ID); !strings.Contains(got, "no space at "+cache) {
		t.Errorf("Nomad tells\n%s", got)
	}
	if err := os.Remove(full); err != nil {
		t.Fatal(err)
	}
	c.UntilLogsHave(t, c.UntilRunning(t, job).ID, "main", "stdout", "here\n")
	c.Stop(t, job)
}

func nodeID(t *testing.T, c *nomadtest.Cluster) string {
	t.Helper()
	nodes, _, err := c.API.Nodes().List(nil)
	if err != nil || len(nodes) != 1 {
		t.Fatal(nodes, err)
	}
	return nodes[0].ID
}

// machineUID is the user that the node's only machine runs as.
func machineUID(t *testing.T, n *nomadtest.Node) (uid int) {
	t.Helper()
	all := machines(t, n)
	if len(all) != 1 {
		t.Fatalf("%d machines run", len(all))
	}
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", all[0].PID))
	if err != nil {
		t.Fatal(err)
	}
	_, text, _ := strings.Cut(string(status), "\nUid:")
	if _, err := fmt.Sscan(text, &uid); err != nil {
		t.Fatal(err)
	}
	return uid
}

// fill takes all that is free on a file system.
func fill(t *testing.T, at, file string) {
	t.Helper()
	var fs unix.Statfs_t
	if err := unix.Statfs(at, &fs); err != nil {
		t.Fatal(err)
	}
	f, err := os.Create(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := unix.Fallocate(int(f.Fd()), 0, 0, int64(fs.Bavail)*fs.Bsize); err != nil {
		t.Fatal(err)
	}
}
