//go:build vm

package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/hashicorp/nomad/api"
	"golang.org/x/sys/unix"

	"github.com/cradlestack/cradlestack/internal/nomadtest"
)

// killMachines ends all machines of a node, as the kernel does when memory is short.
func killMachines(t *testing.T, n *nomadtest.Node) {
	t.Helper()
	all, err := n.Processes()
	if err != nil {
		t.Fatal(err)
	}
	killed := 0
	for _, p := range all {
		if strings.HasPrefix(p.Name(), "qemu-system") && p.State != 'Z' {
			killed++
			if err := unix.Kill(p.PID, unix.SIGKILL); err != nil && !errors.Is(err, unix.ESRCH) {
				t.Fatal(err)
			}
		}
	}
	if killed == 0 {
		t.Fatal("there is no machine")
	}
}

// A container whose machine ends under it is started by its policy, on its own disk; without one it has ended, and docker says why.
func TestVMMachineLost(t *testing.T) {
	h := openHost(t)
	h.run("run", "-d", "--name", "plain", "busybox", "sleep", "1000")
	// What is not on the disk goes with the machine.
	h.run("run", "-d", "--restart", "unless-stopped", "--name", "kept", "busybox", "sh", "-c", "trap exit TERM; echo start >>/log; sync; while :; do sleep 0.1; done")
	id := h.run("inspect", "-f", "{{.Id}}", "kept")
	starts := func(n int) {
		t.Helper()
		h.until(fmt.Sprintf("start %d", n), func() bool {
			out, _ := h.try("", "exec", "kept", "sh", "-c", "cat /log; sync") // it is seen before it is on the disk
			return out == strings.Repeat("start\n", n)
		})
	}
	starts(1)
	killMachines(t, h.c.Server())
	h.until("the end of plain", func() bool { return h.run("inspect", "-f", "{{.State.Status}}", "plain") == "exited" })
	if got := h.run("inspect", "-f", "{{.State.ExitCode}} {{.State.Error}}", "plain"); !strings.HasPrefix(got, "255 the pod's machine ended") {
		t.Errorf("plain has ended: %s", got)
	}
	h.run("rm", "plain")
	starts(2)
	h.want("running 1", "inspect", "-f", "{{.State.Status}} {{.RestartCount}}", "kept")

	// No server is there when it happens: the next one notices, though nobody asks it.
	h.kill()
	killMachines(t, h.c.Server())
	h.c.UntilEnded(t, "docker-"+id)
	h.serve()
	starts(3)
	h.run("stop", "kept")
	h.want("exited", "inspect", "-f", "{{.State.Status}}", "kept")
}

// A node's containers end when it is drained, as make down does it. When it takes pods again, those run that have a policy; the others have ended, and what they have written can be looked at.
func TestVMDrained(t *testing.T) {
	h := openHost(t)
	nodes, _, err := h.c.API.Nodes().List(nil)
	if err != nil || len(nodes) != 1 {
		t.Fatalf("%d nodes, %v", len(nodes), err)
	}
	drain := func(o *api.DrainOptions) {
		t.Helper()
		if _, err := h.c.API.Nodes().UpdateDrainOpts(nodes[0].ID, o, nil); err != nil {
			t.Fatal(err)
		}
	}
	eligible := &api.DrainOptions{MarkEligible: true}
	t.Cleanup(func() { drain(eligible) })
	command := []string{"busybox", "sh", "-c", "trap 'exit 3' TERM; echo start >>/log; sync; while :; do sleep 0.1; done"}
	h.run(append([]string{"run", "-d", "--name", "plain"}, command...)...)
	h.run(append([]string{"run", "-d", "--name", "kept", "--restart", "always"}, command...)...)
	status := func(name string) string { return h.run("inspect", "-f", "{{.State.Status}} {{.State.ExitCode}}", name) }
	starts := func(name string, n int) {
		t.Helper()
		h.until(fmt.Sprintf("start %d of %s", n, name), func() bool {
			file := filepath.Join(t.TempDir(), "log")
			if _, err := h.try("", "cp", name+":/log", file); err != nil {
				return false
			}
			text, err := os.ReadFile(file)
			return err == nil && string(text) == strings.Repeat("start\n", n)
		})
	}
	starts("plain", 1)
	starts("kept", 1)
	drain(&api.DrainOptions{DrainSpec: &api.DrainSpec{Deadline: -1, IgnoreSystemJobs: true}})
	h.until("the end of plain", func() bool { return status("plain") == "exited 3" })
	h.until("kept to wait", func() bool { return strings.HasPrefix(status("kept"), "restarting") })
	drain(eligible)
	h.until("kept to run", func() bool { return status("kept") == "running 0" })
	starts("kept", 2)
	starts("plain", 1)
	if got := status("plain"); got != "exited 3" {
		t.Errorf("plain is %s", got)
	}
	h.run("start", "plain")
	starts("plain", 2)
	h.run("stop", "kept")
}

// testNodeLost: a node is lost. What has a policy to start again is on another one then, with a fresh disk, and docker ps tells the truth about the others, which
// go on when the node is back. Nothing of what has left is there then.
func testNodeLost(h *host) {
	t := h.t
	h.run("run", "-d", "--restart", "always", "--name", "moved", "busybox", "sh", "-c", "echo moved; exec sleep 1000")
	at := func(name string) string {
		all, _, err := h.c.API.Jobs().Allocations("docker-"+h.run("inspect", "-f", "{{.Id}}", name), false, nil)
		if err != nil {
			t.Fatal(err)
		}
		for _, a := range all {
			if nomadtest.Running(a) {
				return a.NodeName
			}
		}
		return fmt.Sprint(len(all), " allocations, and none runs")
	}
	first := ""
	h.until("moved on a node", func() bool { first = at("moved"); return strings.HasPrefix(first, "client") })
	h.run("run", "-d", "--name", "stays", "-l", "kr.zone="+first, "busybox", "sh", "-c", "echo stays; until test -e /end; do sleep 0.2; done; cat /end")
	works := func(name string) {
		t.Helper()
		h.untilSaid(name, name)
		file := filepath.Join(t.TempDir(), "file")
		if err := os.WriteFile(file, []byte(name), 0o600); err != nil {
			t.Fatal(err)
		}
		h.run("cp", file, name+":/copied")
		h.want(name, "exec", name, "sh", "-c", "sync; cat /copied")
		h.run("cp", name+":/copied", file+"2")
		if text, err := os.ReadFile(file + "2"); err != nil || string(text) != name {
			t.Errorf("copied from %s: %q, %v", name, text, err)
		}
	}
	works("moved")
	works("stays")
	var lost *nomadtest.Node
	for _, n := range h.c.Clients() {
		if n.Name == first {
			lost = n
		}
	}
	if err := lost.Crash(); err != nil {
		t.Fatal(err)
	}
	h.until("the loss to be told", func() bool { return h.run("ps", "-a", "--filter", "name=stays", "--format", "{{.Status}}") == "Dead" })
	for _, command := range []string{"stop", "start", "logs", "top"} {
		h.wantError(1, "node does not answer", command, "stays")
	}
	h.until("moved on another node", func() bool {
		now := at("moved")
		return strings.HasPrefix(now, "client") && now != first
	})
	h.until("it to run", func() bool {
		return h.run("inspect", "-f", "{{.State.Status}} {{.RestartCount}}", "moved") == "running 1"
	})
	h.want("moved", "ps", "--format", "{{.Names}}")
	works("moved")
	disks := func() string {
		found, err := filepath.Glob(filepath.Join(h.c.Dir(), "*", "cradle", "disks", "*", "*"))
		if err != nil {
			t.Fatal(err)
		}
		return fmt.Sprint(len(found))
	}
	if left := disks(); left != "3" {
		t.Errorf("there are %s disks", left)
	}
	if err := lost.Boot(); err != nil {
		t.Fatal(err)
	}
	h.until("the end of the disk that was left", func() bool { return disks() == "2" })
	h.until("stays to go on", func() bool { return h.run("inspect", "-f", "{{.State.Status}}", "stays") == "running" })
	h.want("stays", "exec", "stays", "cat", "/copied")
	attached := h.hijack("/containers/stays/attach?stream=1&stdout=1", "")
	h.try("", "exec", "stays", "sh", "-c", "echo the end >/new; mv /new /end") // the container may end before the command has told its end
	attached.until("the end")
	h.want("0", "wait", "stays")
	h.run("rm", "-f", "moved", "stays")
	h.until("the end of all disks", func() bool { return disks() == "0" })
}
