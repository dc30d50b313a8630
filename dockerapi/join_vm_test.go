//go:build vm

package main

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

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
	h := openHost(t)
	begin := time.Now()
	step := func(what string) { t.Logf("%6.1f s: %s", time.Since(begin).Seconds(), what) }
	const page = "mkdir /www; echo a page >/www/index.html; trap 'exit 3' TERM; httpd -f -p 127.0.0.1:80 -h /www & wait"
	h.run("create", "--name", "web", "--memory", "192m", "busybox", "sh", "-c", page)
	h.wantError(125, "cannot join network namespace of a non running container: container /web is created", "run", "--rm", "--network", "container:web", "busybox", "true")
	h.want("web", "ps", "-a", "--format", "{{.Names}}")
	h.wantError(125, "No such container: missing", "run", "--rm", "--network", "container:missing", "busybox", "true")
	h.wantError(125, "conflicting options: port publishing and the container type network mode", "run", "-p", "80:80", "--network", "container:web", "busybox", "true")
	h.wantError(125, "conflicting options: hostname and the network mode", "run", "--hostname", "x", "--network", "container:web", "busybox", "true")
	h.wantError(125, "anonymous volumes and tmpfs are possible", "run", "-v", "data:/data", "--network", "container:web", "busybox", "true")
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
	step("short ones have come and gone")

	// One of another image, with a volume of its own.
	h.run("run", "-d", "--name", "side", "-v", "/data", "--network", "container:web", "debian", "bash", "-c", "echo out; echo err >&2; echo kept >>/data/file; trap 'echo bye; exit 7' TERM; sleep 10000 & wait")
	h.want("container:"+id+" running "+id[:12], "inspect", "-f", "{{.HostConfig.NetworkMode}} {{.State.Status}} {{.Config.Hostname}}", "side")
	kept := func(n int) {
		t.Helper()
		h.until("side to begin", func() bool {
			out, _ := h.try("", "exec", "side", "sh", "-c", "hostname; cat /data/file")
			return out == id[:12]+"\n"+strings.Repeat("kept\n", n)
		})
	}
	kept(1)
	h.want("side\nweb", "ps", "--format", "{{.Names}}")
	h.untilSaid("out", "side")
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
	h.until("side to have ended with it", func() bool { return h.run("inspect", "-f", "{{.State.Status}}", "side") == "exited" })
	h.wantError(1, "cannot join network namespace of a non running container: container /web is exited", "start", "side")
	h.run("start", "web")
	h.run("start", "side")
	kept(3)
	step("both run again")
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
