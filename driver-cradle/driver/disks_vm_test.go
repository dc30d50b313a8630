//go:build vm

package driver

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/nomad/api"
	"github.com/hashicorp/nomad/plugins/drivers"
)

// A disk goes from task to task, with the id of its pods, and is removed.
func TestVMDisk(t *testing.T) {
	c := newClient(t, nil)
	id := strings.Repeat("0123456789abcdef", 4)
	task := func(script string, edit func(*taskConfig)) *drivers.TaskConfig {
		t.Helper()
		return c.task(script, func(_ *drivers.TaskConfig, cfg *taskConfig) {
			cfg.DiskID, cfg.ID = "box", id
			if edit != nil {
				edit(cfg)
			}
		})
	}
	refused := func(want string, edit func(*taskConfig)) {
		t.Helper()
		other := task("exit", edit)
		if _, _, err := c.harness.StartTask(other); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want %s", err, want)
		}
	}
	removal := func(cfg *taskConfig) { *cfg = taskConfig{DiskID: "box", DiskAction: diskRemove} }

	first := task("echo kept >/root/file; sync; echo first; hostname; sleep 1000", func(cfg *taskConfig) { cfg.Disk = "256MiB" })
	h := c.start(first)
	c.logs(first, "stdout", "first\n0123456789ab\n")
	refused("in use by task "+first.ID, nil)
	refused("in use by task "+first.ID, removal)
	// The next plugin process does not know of the task before Nomad recovers it.
	c.close()
	c.open(t)
	refused("in use by task "+first.ID, nil)
	if err := c.harness.RecoverTask(h); err != nil {
		t.Fatal(err)
	}
	refused("in use by task "+first.ID, nil)
	if err := c.harness.DestroyTask(first.ID, true); err != nil { // the machine is killed
		t.Fatal(err)
	}

	refused("it has 256MiB and 1GiB are asked for", func(cfg *taskConfig) { cfg.Disk = "1GiB" })
	refused("is that of pod 0123456789ab, not ffffffffffff", func(cfg *taskConfig) { cfg.ID = strings.Repeat("f", 64) })
	refused("and this pod has 2", func(cfg *taskConfig) {
		cfg.Containers = map[string]*containerConfig{"side": {Image: cfg.Image, Command: "sleep", Args: []string{"9"}}}
	})
	second := task("echo second; hostname; cat /root/file; df -m / | tail -n 1 | while read dev size rest; do test $size -lt 256 && echo small; done; exit 3", nil)
	c.start(second)
	if r := c.wait(second); r.ExitCode != 3 {
		t.Errorf("result %+v", r)
	}
	c.logs(second, "stdout", "second\n0123456789ab\nkept\nsmall\n")

	// Another namespace's disk is another one, and its tasks hear of no other.
	stranger := task("test ! -e /root/file && echo stranger", nil)
	stranger.Namespace = "other"
	c.start(stranger)
	c.wait(stranger)
	c.logs(stranger, "stdout", "stranger\n")
	stranger = c.task("", func(_ *drivers.TaskConfig, cfg *taskConfig) { removal(cfg) })
	stranger.Namespace = "other"
	c.start(stranger)
	c.wait(stranger)

	list := c.task("", func(_ *drivers.TaskConfig, cfg *taskConfig) { *cfg = taskConfig{DiskAction: diskList} })
	c.start(list)
	if r := c.wait(list); !r.Successful() {
		t.Errorf("list: %+v", r)
	}
	var k keptDisk
	eventually(t, func() string {
		text, _ := os.ReadFile(filepath.Join(list.TaskDir().LogDir, "main.stdout.0"))
		return string(text)
	}, func(s string) bool { return json.Unmarshal([]byte(s), &k) == nil })
	if k.ID != "box" || k.Pod != id || k.Size != 256<<20 || k.Used < 64<<10 || k.Used > 64<<20 || k.Task != "" || len(k.Containers) != 1 || k.Containers[0].ID != id {
		t.Errorf("the list has %+v", k)
	}

	remove := c.task("", func(_ *drivers.TaskConfig, cfg *taskConfig) { removal(cfg) })
	for range 2 { // the second time there is nothing to remove
		c.start(remove)
		if r := c.wait(remove); !r.Successful() {
			t.Errorf("remove: %+v", r)
		}
		if err := c.harness.DestroyTask(remove.ID, false); err != nil {
			t.Error(err)
		}
	}
	if left, err := filepath.Glob(filepath.Join(c.state, disksDir, "*/*")); err != nil || len(left) > 0 {
		t.Errorf("left: %v, %v", left, err)
	}
	third := task("test ! -e /root/file && echo fresh", nil)
	c.start(third)
	c.wait(third)
	c.logs(third, "stdout", "fresh\n")
}

// A disk that nothing was written to for long goes by itself, where the operator says so; one in use does not.
func TestVMDiskAge(t *testing.T) {
	c := newClient(t, func(c *config) { c.GC = &gcConfig{DiskDelay: "3s"} })
	task := c.task("sleep 1000", func(_ *drivers.TaskConfig, cfg *taskConfig) { cfg.DiskID = "old" })
	c.start(task)
	gone := func() bool {
		_, err := os.Stat(filepath.Join(c.state, disksDir, "default/old"))
		return err != nil
	}
	for range 8 {
		if gone() {
			t.Fatal("it is gone while it is used")
		}
		time.Sleep(time.Second)
	}
	if err := c.harness.DestroyTask(task.ID, true); err != nil {
		t.Fatal(err)
	}
	eventually(t, func() string { return fmt.Sprint(gone()) }, func(s string) bool { return s == "true" })
}

// What a user does: a job with a disk is purged, its allocation collected, the client restarted, and the next job goes on; then the node's disks are
// listed and the disk is removed, by Nomad alone.
func TestVMAgentDisk(t *testing.T) {
	c := openAgents(t)
	const keeps = "disk_id = \"box\"\ndisk = \"128MiB\"\n"
	run := func(name, script string) string {
		t.Helper()
		a := c.UntilEnded(t, c.Run(t, strings.Replace(jobOf(name, script, keeps), "group \"g\"", "type = \"batch\"\n  group \"g\"", 1)))
		out := c.Logs(t, a.ID, "main", "stdout")
		if a.ClientStatus != api.AllocClientStatusComplete {
			t.Errorf("job %s: %s\n%s", name, a.ClientStatus, events(t, c, a.ID))
		}
		return out
	}
	action := func(name, config string) string {
		t.Helper()
		a := c.UntilEnded(t, c.Run(t, fmt.Sprintf("job %q {\n  type = \"batch\"\n  group \"g\" {\n    task \"main\" {\n      driver = \"cradle\"\n      config {\n%s\n      }\n    }\n  }\n}", name, config)))
		if a.ClientStatus != api.AllocClientStatusComplete {
			t.Errorf("job %s: %s\n%s", name, a.ClientStatus, events(t, c, a.ID))
		}
		return c.Logs(t, a.ID, "main", "stdout")
	}
	if got := run("first", "echo $RANDOM$RANDOM >/root/number; cat /root/number"); got == "" {
		t.Error("the first job wrote nothing")
	} else {
		c.CLI(t, "job", "stop", "-purge", "first")
		c.CLI(t, "system", "gc")
		node := c.Clients()[0]
		if err := node.StopAgents(); err != nil {
			t.Fatal(err)
		}
		if err := node.StartAgents(); err != nil {
			t.Fatal(err)
		}
		if again := run("second", "cat /root/number"); again != got {
			t.Errorf("%q is %q", got, again)
		}
	}
	if list := action("list", "disk_action = \"list\""); strings.Count(list, "\n") != 1 || !strings.HasPrefix(list, `{"id":"box",`) {
		t.Errorf("the list is %q", list)
	}
	action("remove", "disk_action = \"remove\"\ndisk_id = \"box\"")
	if list := action("empty", "disk_action = \"list\""); list != "" {
		t.Errorf("the list is %q", list)
	}
	if left, err := filepath.Glob(filepath.Join(c.Clients()[0].Path(c.Clients()[0].Dir), "cradle/state/disks/*/*")); err != nil || len(left) > 0 {
		t.Errorf("left: %v, %v", left, err)
	}
}
