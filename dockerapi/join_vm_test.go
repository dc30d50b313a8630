//go:build vm

package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cradlestack/cradlestack/internal/locked"
	"github.com/cradlestack/cradlestack/internal/nomadtest"
)

// killPlugin ends the task driver of a node, which Nomad's client starts anew.
func killPlugin(t *testing.T, n *nomadtest.Node) {
	t.Helper()
	all, err := n.Processes()
	if err != nil {
		t.Fatal(err)
	}
	killed := 0
	for _, p := range all {
		if strings.HasPrefix(p.Name(), "nomad-driver-cr") && p.State != 'Z' {
			killed++
			if err := unix.Kill(p.PID, unix.SIGKILL); err != nil && !errors.Is(err, unix.ESRCH) {
				t.Fatal(err)
			}
		}
	}
	if killed == 0 {
		t.Fatal("there is no plugin")
	}
}

// eventFormat shows an event's action, and how it has ended.
const eventFormat = "{{.Action}}{{with .Actor.Attributes.exitCode}} {{.}}{{end}}"

// listen has docker events tell what happens from now on to what a filter lets through. told is what it has told so far.
func (h *host) listen(filter string) (told func() []string) {
	h.t.Helper()
	var out locked.Buffer
	cmd := h.command(h.t.Context(), "events", "--since", fmt.Sprint(time.Now().Unix()), "--filter", filter, "--format", eventFormat)
	cmd.Stdout = &out
	if err := cmd.Start(); err != nil {
		h.t.Fatal(err)
	}
	h.t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
	return func() []string { return strings.Split(strings.TrimSpace(out.String()), "\n") }
}

// hasAll says whether all lines are among others.
func hasAll(all, lines []string) bool {
	return !slices.ContainsFunc(lines, func(line string) bool { return !slices.Contains(all, line) })
}

const composed = `
name: joined
services:
  side:
    image: busybox
    network_mode: "service:web"
    command: sh -c "until wget -qO- http://127.0.0.1/; do sleep 0.2; done 2>/dev/null; exec sleep 10000"
  web:
    image: busybox
    command: sh -c "mkdir /www; echo a page >/www/index.html; exec httpd -f -p 127.0.0.1:80 -h /www"
`

// Containers join the machine of one that runs: they share its network and end with it, and have everything else of their own. They go on while the server or the driver is killed.
func TestVMJoin(t *testing.T) {
	h := openHost(t, "--host-paths")
	pages := t.TempDir()
	begin := time.Now()
	step := func(what string) { t.Logf("%6.1f s: %s", time.Since(begin).Seconds(), what) }
	if err := os.WriteFile(filepath.Join(pages, "index.html"), []byte("a page\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	const page = "trap 'exit 3' TERM; httpd -f -p 127.0.0.1:80 -h /www & wait"
	h.run("create", "--name", "web", "--memory", "192m", "-v", pages+":/www:ro", "busybox", "sh", "-c", page)
	h.wantError(125, "cannot join network namespace of a non running container: container /web is created", "run", "--rm", "--network", "container:web", "busybox", "true")
	h.want("web", "ps", "-a", "--format", "{{.Names}}")
	h.wantError(125, "No such container: missing", "run", "--rm", "--network", "container:missing", "busybox", "true")
	h.wantError(125, "conflicting options: port publishing and the container type network mode", "run", "-p", "80:80", "--network", "container:web", "busybox", "true")
	h.wantError(125, "conflicting options: hostname and the network mode", "run", "--hostname", "x", "--network", "container:web", "busybox", "true")
	h.wantError(125, "has the volumes that it was started with, and data is none of them", "run", "-v", "data:/data", "--network", "container:web", "busybox", "true")
	h.wantError(125, "container /web has it mounted read-only", "run", "-v", pages+":/data", "--network", "container:web", "busybox", "true")
	h.run("start", "web")
	id := h.run("inspect", "-f", "{{.Id}}", "web")
	step("web runs")

	h.until("the page", func() bool {
		out, _ := h.try("", "run", "--rm", "--network", "container:web", "busybox", "wget", "-qO-", "http://127.0.0.1/")
		return out == "a page\n"
	})
	step("it was read from inside")
	h.wantError(5, "", "run", "--rm", "--network", "container:web", "busybox", "sh", "-c", "exit 5")
	h.wantError(127, "executable file not found", "run", "--rm", "--network", "container:web", "busybox", "nosuchcommand")
	if out, err := h.try("typed\n", "run", "--rm", "-i", "--network", "container:"+id, "busybox", "cat"); err != nil || out != "typed\n" {
		t.Errorf("run -i: %q, %v", out, err)
	}
	h.wantError(125, "--memory of one that joins can't be more", "run", "--rm", "--memory", "1g", "--network", "container:web", "busybox", "true")
	h.want("web", "ps", "-a", "--format", "{{.Names}}")
	h.want("a page", "run", "--rm", "-v", pages+":/data:ro", "--network", "container:web", "busybox", "cat", "/data/index.html")
	h.wantError(125, "--pid container:web is not possible.*add --network container:", "run", "--rm", "--pid", "container:web", "busybox", "true")
	h.wantError(125, "non-shareable IPC \\(hint: use IpcMode:shareable for the donor container\\)", "run", "--rm", "--ipc", "container:web", "--network", "container:web", "busybox", "true")
	h.wantError(125, "failed to join PID namespace: No such container: missing", "run", "--rm", "--pid", "container:missing", "--network", "container:web", "busybox", "true")
	h.want("httpd", "run", "--rm", "--pid", "container:web", "--network", "container:web", "busybox", "sh", "-c", "ps | grep -o '[h]ttpd' | head -n 1")
	h.run("run", "-d", "--name", "donor", "--ipc", "shareable", "--network", "container:web", "busybox", "sh", "-c", "echo shared >/dev/shm/file; exec sleep 10000")
	h.until("shared memory", func() bool {
		out, _ := h.try("", "run", "--rm", "--ipc", "container:donor", "--network", "container:web", "busybox", "cat", "/dev/shm/file")
		return out == "shared\n"
	})
	h.run("rm", "-f", "donor")
	step("short ones have come and gone")

	// One of another image, with a volume of its own. Who listens for what happens to it alone hears of it, though nothing was wanted of the pod before.
	since := time.Now()
	told := h.listen("container=side")
	h.run("run", "-d", "--name", "side", "--restart", "unless-stopped", "--health-cmd", "test -e /data/file", "--health-interval", "1s", "-l", "tier=side", "-v", "/data", "--network", "container:web", "debian", "bash", "-c", "trap 'echo bye; exit 7' TERM; echo out; echo err >&2; echo kept >>/data/file; sleep 10000 & wait")
	h.want("container:"+id+" running "+id[:12], "inspect", "-f", "{{.HostConfig.NetworkMode}} {{.State.Status}} {{.Config.Hostname}}", "side")
	kept := func(n int) {
		t.Helper()
		h.until("side to begin", func() bool {
			out, _ := h.try("", "exec", "side", "sh", "-c", "hostname; cat /data/file; sync")
			return out == id[:12]+"\n"+strings.Repeat("kept\n", n)
		})
	}
	kept(1)
	h.want("side\nweb", "ps", "--format", "{{.Names}}")
	h.untilSaid("out", "side")
	h.wantError(4, "", "exec", "side", "sh", "-c", "exit 4")
	h.until("side to be healthy", func() bool { return h.run("inspect", "-f", "{{.State.Health.Status}}", "side") == "healthy" })
	inside := []string{"create", "start", "health_status: healthy", "exec_create: sh -c exit 4", "exec_start: sh -c exit 4", "exec_die 4"}
	h.until("what happens to side to be told", func() bool { return hasAll(told(), inside) })
	past := strings.Split(h.run("events", "--since", fmt.Sprint(since.Unix()), "--until", fmt.Sprint(time.Now().Unix()+1), "--filter", "label=tier=side", "--format", eventFormat), "\n")
	if !hasAll(past, inside) {
		t.Errorf("of the past of side is told %q", past)
	}
	if n := strings.Count(strings.Join(told(), "\n")+"\n", "start\n"); n != 1 {
		t.Errorf("side's start is told %d times: %q", n, told())
	}
	h.wantError(1, "--memory of one that joins can't be more", "update", "--memory", "1g", "--memory-swap", "-1", "side")
	h.run("update", "--memory", "64m", "--cpus", "0.5", "side")
	h.want("67108864\n50000 100000", "exec", "side", "cat", "/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/cpu.max")
	h.want("67108864 500000000 0", "inspect", "-f", "{{.HostConfig.Memory}} {{.HostConfig.NanoCpus}} {{.RestartCount}}", "side")
	step("side runs")

	killPlugin(t, h.c.Server())
	h.until("the pod to be found again", func() bool {
		_, err := h.try("", "exec", "side", "true")
		return err == nil
	})
	step("the driver was killed")
	h.kill()
	h.serve()
	h.want("running", "inspect", "-f", "{{.State.Status}}", "side")
	h.run("stop", "side")
	h.want("exited 7", "inspect", "-f", "{{.State.Status}} {{.State.ExitCode}}", "side")
	h.want("out\nbye", "logs", "side")
	step("the server was killed, and side has ended")
	h.run("start", "side")
	kept(2)

	// The server is killed in the middle of docker run; how that ends is known to the next one, and it is removed.
	cmd := h.command(t.Context(), "run", "--rm", "--name", "gone", "--network", "container:web", "busybox", "sh", "-c", "until test -e /end; do sleep 0.2; done")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	h.until("gone to begin", func() bool {
		_, err := h.try("", "exec", "-d", "gone", "sh", "-c", "sleep 2; touch /end")
		return err == nil
	})
	h.kill()
	cmd.Wait()
	h.serve()
	h.until("gone to be gone", func() bool {
		out, err := h.try("", "ps", "-aq", "--filter", "name=gone")
		return err == nil && out == ""
	})
	step("gone is gone")

	h.run("stop", "web")
	h.want("exited 3", "inspect", "-f", "{{.State.Status}} {{.State.ExitCode}}", "web")
	status := func(want string) {
		t.Helper()
		h.until("side to be "+want, func() bool { return h.run("inspect", "-f", "{{.State.Status}} {{.State.ExitCode}}", "side") == want })
	}
	status("restarting 7") // its policy waits for the other one
	h.wantError(1, "cannot join network namespace of a non running container: container /web is exited", "start", "side")
	h.run("start", "web")
	kept(3)
	h.want("67108864", "exec", "side", "cat", "/sys/fs/cgroup/memory.max")
	step("both run again")
	// The machine is lost, while no server runs; web is started by somebody, and what has joined it by its policy.
	h.run("update", "--restart", "always", "side")
	h.kill()
	killMachines(t, h.c.Server())
	h.c.UntilEnded(t, "docker-"+id)
	h.serve()
	status("restarting 137")
	h.run("start", "web")
	kept(4)
	h.run("stop", "web")
	status("restarting 7")
	h.run("stop", "side") // and has no policy any more
	status("exited 7")
	h.run("start", "web")
	h.wantError(1, "is not running", "exec", "side", "true")
	h.run("start", "side")
	kept(5)
	h.run("kill", "side") // one that somebody has ended stays so
	status("exited 137")
	step("side follows its policy")
	h.run("rm", "-f", "side")
	h.want("web", "ps", "-a", "--format", "{{.Names}}")
	h.run("rm", "-f", "web")
	step("all is removed")

	// The same by compose, which begins the one after the other.
	h.takeCompose()
	file := filepath.Join(t.TempDir(), "compose.yaml")
	if err := os.WriteFile(file, []byte(composed), 0o600); err != nil {
		t.Fatal(err)
	}
	h.run("compose", "-f", file, "up", "-d")
	h.until("the page", func() bool {
		out, _ := h.try("", "compose", "-f", file, "logs", "--no-log-prefix", "side")
		return strings.TrimSpace(out) == "a page"
	})
	h.want("container:"+h.run("inspect", "-f", "{{.Id}}", "joined-web-1"), "inspect", "-f", "{{.HostConfig.NetworkMode}}", "joined-side-1")
	h.run("compose", "-f", file, "down", "-t", "1")
	h.want("", "ps", "-aq")
	step("compose has come and gone")
}
