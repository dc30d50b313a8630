//go:build vm

package driver

import (
	"bytes"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cradlestack/cradlestack/driver-cradle/boot"
	"github.com/cradlestack/cradlestack/driver-cradle/boot/boottest"
	"github.com/cradlestack/cradlestack/driver-cradle/vmm"
	"github.com/cradlestack/cradlestack/internal/nomadtest"
)

// Several containers in a pod: their logs, commands in each, and the one whose end is the task's.
func TestVMAgentContainers(t *testing.T) {
	c := openAgents(t)
	image := "oci:" + shared.images + "/busybox"
	job := c.Run(t, jobOf("containers", "echo mine; exec sleep 1000", fmt.Sprintf(`
        container "side" {
          image   = %[1]q
          command = "sh"
          args    = ["-c", "echo one; printf 'two '; sleep 1; echo halves; echo oops >&2; printf unfinished; exec sleep 1000"]
          env {
            WHO = "side"
          }
        }
        container "brief" {
          image   = %[1]q
          command = "printf"
          args    = ["no newline"]
        }`, image)))
	a := c.UntilRunning(t, job)
	out := c.UntilLogs(t, a.ID, "main", "stdout", func(s string) bool {
		return strings.Contains(s, "side: two halves\n") && strings.Contains(s, "brief: ") && strings.Contains(s, "mine\n")
	})
	for _, line := range []string{"mine\n", "side: one\n", "side: two halves\n", "brief: no newline\n"} {
		if !strings.Contains("\n"+out, "\n"+line) {
			t.Errorf("there is no line %q in\n%s", line, out)
		}
	}
	if strings.Contains(out, "unfinished") {
		t.Errorf("an unfinished line is told:\n%s", out)
	}
	c.UntilLogsHave(t, a.ID, "main", "stderr", "side: oops\n")
	if got := c.CLI(t, "alloc", "exec", a.ID, "--container=side", "sh", "-c", "echo $WHO $NOMAD_TASK_NAME"); got != "side main\n" {
		t.Errorf("exec in a container: %q", got)
	}
	if _, stderr, code := c.TryCLI(t, "", "alloc", "exec", "-i=false", a.ID, "--container=nope", "true"); code != 125 || !strings.Contains(stderr, `no container "nope": it has main, brief, side`) {
		t.Errorf("exec in a container that there is not: %d, %s", code, stderr)
	}
	if _, stderr, code := c.TryCLI(t, "", "alloc", "exec", "-i=false", a.ID, "--container=side"); code != 125 || !strings.Contains(stderr, "there is no command") {
		t.Errorf("exec without a command: %d, %s", code, stderr)
	}
	eventually(t, func() string { // its output ends before it does
		_, stderr, code := c.TryCLI(t, "", "alloc", "exec", "-i=false", a.ID, "--container=brief", "true")
		return fmt.Sprint(code, ": ", stderr)
	}, func(s string) bool { return strings.HasPrefix(s, "125: ") && strings.Contains(s, "not running") })
	c.Stop(t, job)

	a = c.UntilEnded(t, c.Run(t, batch(jobOf("hungry", "exec sleep 1000", fmt.Sprintf(`
        container "hungry" {
          image   = %q
          command = "tail"
          args    = ["/dev/zero"]
          memory  = "24MiB"
          lifecycle {
            critical = true
          }
        }`, image), "", once))))
	if a.ClientStatus != "failed" {
		t.Errorf("it is %s", a.ClientStatus)
	}
	eventually(t, func() string { return events(t, c, a.ID) }, func(s string) bool { // what Nomad's client has told so far may have been less
		return strings.Contains(s, "oom_killed:true") && strings.Contains(s, "exit_code:137")
	})
}

// What Nomad and the job mount: where it is writable, where not, and what is said where there is nothing.
func TestVMAgentMounts(t *testing.T) {
	c := openAgents(t)
	n := c.Clients()[0]
	dir := filepath.Join(n.Dir, "cradle/shared")
	for _, d := range []string{dir, hostVolume()} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(d, "file"), []byte("here\n"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	const volume = `
    volume "v" {
      type      = "host"
      source    = "tests"
      read_only = true
    }`
	const mount = `
      volume_mount {
        volume      = "v"
        destination = "/made/for/it"
        read_only   = true
      }`
	job := jobOf("mounts", `cat /made/for/it/file /srv/rw/file; for f in /made/for/it /srv/ro /srv/rw /srv/tmp /srv/own /; do echo x 2>/dev/null >$f/new && echo $f; done`, fmt.Sprintf(`
        readonly_rootfs = true
        volumes         = ["%[1]s:/srv/rw", "%[1]s:/srv/ro:ro", "./local:/srv/own"]
        tmpfs           = ["/srv/tmp"]`, dir), mount, once+volume)
	a := c.UntilEnded(t, c.Run(t, batch(job)))
	if got := c.Logs(t, a.ID, "main", "stdout"); got != "here\nhere\n/srv/rw\n/srv/tmp\n/srv/own\n" {
		t.Errorf("%s\n%s\n%s", got, c.Logs(t, a.ID, "main", "stderr"), events(t, c, a.ID))
	}
	if data, err := os.ReadFile(filepath.Join(dir, "new")); err != nil || string(data) != "x\n" {
		t.Errorf("the pod has written %q, %v", data, err)
	}

	if err := os.RemoveAll(hostVolume()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { // a client does not start without it
		if err := os.Mkdir(hostVolume(), 0o755); err != nil {
			t.Error(err)
		}
	})
	fail(t, c, map[string]failure{
		"host volume": {jobOf("no-volume", "", "", mount, once+volume), hostVolume()},
		"allowed":     {jobOf("no-path", "", fmt.Sprintf("volumes = [\"%s/gone:/x\"]", dir), "", once), "gone does not exist on this client"},
		"way out":     {jobOf("way-out", "", "volumes = [\"../../../../etc:/x\"]", "", once), "leads out of the task's directory"},
		"twice":       {jobOf("twice", "", fmt.Sprintf("volumes = [\"%[1]s:/x\", \"%[1]s:/x\"]", dir), "", once), "/x"},
		"propagation": {jobOf("propagation", "", "", strings.Replace(mount, "read_only ", "propagation_mode = \"bidirectional\"\n        read_only ", 1), once+volume), "propagation_mode"},
	})()
}

// A group without a network namespace: the ports that a task names are forwarded to its pod, for TCP and UDP.
func TestVMAgentForwardedPorts(t *testing.T) {
	c := openAgents(t)
	n := c.Clients()[0]
	job := c.Run(t, jobOf("forwarded", "mkdir /www; echo a page >/www/index.html; exec httpd -f -p 80 -h /www", "ports = [\"http\"]", "", `
    network {
      port "http" {
        to = 80
      }
      port "other" {}
    }`))
	a := c.UntilRunning(t, job)
	full, _, err := c.API.Allocations().Info(a.ID, nil)
	if err != nil {
		t.Fatal(err)
	}
	port := map[string]string{}
	for _, p := range full.AllocatedResources.Shared.Ports {
		port[p.Label] = fmt.Sprintf("%s:%d", p.HostIP, p.Value)
	}
	if page, err := n.Output(t.Context(), "curl", "-sSf", "--retry", "100", "--retry-all-errors", "--retry-delay", "1", "http://"+port["http"]+"/"); err != nil || page != "a page\n" {
		t.Errorf("the page is %q, %v", page, err)
	}
	if _, err := n.Output(t.Context(), "curl", "-sS", "--max-time", "5", "http://"+port["other"]+"/"); err == nil {
		t.Error("a port that the task does not name is forwarded")
	}
	if got := c.CLI(t, "alloc", "exec", a.ID, "sh", "-c", "echo $NOMAD_PORT_http"); strings.TrimSpace(got) == "" {
		t.Error("the task is not told its port")
	}
	c.Stop(t, job)

	job = c.Run(t, imageJob("datagrams", "oci:"+shared.images+"/debian", `exec perl -MIO::Socket::INET -e '
		my $s = IO::Socket::INET->new(Proto => "udp", LocalPort => 53) or die;
		while (1) { $s->recv(my $m, 1000); $s->send("you said $m") }'`, "ports = [\"dns\"]", "", `
    network {
      port "dns" {
        to = 53
      }
    }`))
	a = c.UntilRunning(t, job)
	if full, _, err = c.API.Allocations().Info(a.ID, nil); err != nil {
		t.Fatal(err)
	}
	p := full.AllocatedResources.Shared.Ports[0]
	server, err := n.Dial(t.Context(), "udp", net.JoinHostPort(p.HostIP, strconv.Itoa(p.Value)))
	if err != nil {
		t.Fatal(err)
	}
	defer server.Close()
	eventually(t, func() string { // the server may have to start yet, and a datagram may be lost
		server.SetDeadline(time.Now().Add(time.Second))
		fmt.Fprint(server, "hello")
		answer := make([]byte, 100)
		n, err := server.Read(answer)
		return fmt.Sprint(string(answer[:n]), err)
	}, func(s string) bool { return s == "you said hello<nil>" })
	c.Stop(t, job)
}

// A guest whose kernel panics, and a machine that is killed: told as what they are, and the restart policy is on them.
func TestVMAgentMachineDies(t *testing.T) {
	c := openAgents(t)
	job := c.Run(t, jobOf("dies", `if [ -e /alloc/panicked ]; then echo again; exec sleep 1000; fi; touch /alloc/panicked; sync; echo first; until [ -e /alloc/heard ]; do sleep 0.1; done; echo 1 >/proc/sys/kernel/sysrq; echo c >/proc/sysrq-trigger`,
		"privileged = true", "", "restart {\n  attempts = 2\n  delay = \"1s\"\n  interval = \"1h\"\n  mode = \"fail\"\n}\n"))
	a := c.UntilRunning(t, job)
	c.UntilLogsHave(t, a.ID, "main", "stdout", "first\n")
	c.TryCLI(t, "", "alloc", "exec", a.ID, "touch", "/alloc/heard") // which may be told no more
	a = c.UntilAlloc(t, job, "running again", func(a *nomadAlloc) bool { return nomadtest.Running(a) && a.TaskStates["main"].Restarts == 1 })
	c.UntilLogs(t, a.ID, "main", "stdout", func(s string) bool { return s == "first\nagain\n" })
	if got := events(t, c, a.ID); !strings.Contains(got, "the pod's machine ended: ") || !strings.Contains(got, "sysrq") {
		t.Errorf("Nomad tells\n%s", got)
	}
	for _, p := range machines(t, c.Clients()[0]) {
		if err := unix.Kill(p.PID, unix.SIGKILL); err != nil {
			t.Error(err)
		}
	}
	c.UntilAlloc(t, job, "running a third time", func(a *nomadAlloc) bool { return nomadtest.Running(a) && a.TaskStates["main"].Restarts == 2 })
	c.UntilLogs(t, a.ID, "main", "stdout", func(s string) bool { return s == "first\nagain\nagain\n" })
	c.Stop(t, job)
}

// QEMU is replaced by another version while a pod runs: that goes on, also in the hands of another plugin process, and new ones start.
func TestVMAgentQEMUUpgraded(t *testing.T) {
	c := openAgents(t)
	n := c.Clients()[0]
	path, version, err := vmm.FindQEMU(t.Context(), t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	program, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	digit := strings.LastIndexAny(version, "0123456789")
	other := version[:digit] + string('0'+(version[digit]-'0'+1)%10) + version[digit+1:]
	upgraded := bytes.ReplaceAll(program, []byte(version), []byte(other))
	if bytes.Equal(program, upgraded) {
		t.Fatalf("%s does not hold its version %s", path, version)
	}
	file := filepath.Join(n.Dir, "tmp", "qemu")
	if err := os.WriteFile(file, upgraded, 0o755); err != nil {
		t.Fatal(err)
	}
	defer os.Remove(file)

	old := c.Run(t, jobOf("old", "i=0; while :; do i=$((i+1)); echo $i; sleep 0.1; done"))
	a := c.UntilRunning(t, old)
	if _, err := n.Output(t.Context(), "mount", "--bind", file, path); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if _, err := n.Output(t.Context(), "umount", "--lazy", path); err != nil { // the plugin may be asking it for its version
			t.Error(err)
		}
	}()
	killPlugin(t, n)
	execIsBack(t, c, a.ID)
	fresh := c.Run(t, jobOf("fresh", "echo up; exec sleep 1000"))
	c.UntilLogsHave(t, c.UntilRunning(t, fresh).ID, "main", "stdout", "up\n")
	c.Until(t, "the new version", func(s *nomadtest.State) bool {
		d := s.Node(n.Name).Drivers[Name]
		return d != nil && d.Healthy && d.Attributes["driver.cradle.qemu.version"] == other
	})
	seen := strings.Count(c.Logs(t, a.ID, "main", "stdout"), "\n")
	out := c.UntilLogs(t, a.ID, "main", "stdout", func(s string) bool { return strings.Count(s, "\n") > seen+5 })
	gapless(t, out, 1)
	c.Stop(t, fresh)
	c.Stop(t, old)
}

// The driver and the boot package are replaced in place while a pod runs: it goes on as it was in the hands of the new driver, and what starts from then on has
// the new package.
func TestVMAgentUpgraded(t *testing.T) {
	c := openAgents(t)
	n := c.Clients()[0]
	pkg, err := boot.Open(shared.boot)
	if err != nil {
		t.Fatal(err)
	}
	next, err := boottest.Build(shared.boot+".next", "github.com/cradlestack/cradlestack/driver-cradle/guest/cradle-init", pkg.Manifest.Variant, "upgraded")
	if err != nil {
		t.Fatal(err)
	}
	plugin, err := buildPlugin()
	if err != nil {
		t.Fatal(err)
	}
	t.Setenv("CGO_ENABLED", "0") // as the present one was built
	const version = "9.9.9"
	if _, err := command("go", "build", "-trimpath", "-ldflags", "-X github.com/cradlestack/cradlestack/driver-cradle/driver.Version="+version, "-o", plugin+".next", ".."); err != nil {
		t.Fatal(err)
	}
	exchange := func() {
		t.Helper()
		for _, path := range []string{shared.boot, plugin} {
			if err := unix.Renameat2(unix.AT_FDCWD, path, unix.AT_FDCWD, path+".next", unix.RENAME_EXCHANGE); err != nil {
				t.Fatal(err)
			}
		}
		if err := n.StopAgents(); err != nil { // which ends the plugin
			t.Fatal(err)
		}
		if err := n.StartAgents(); err != nil {
			t.Fatal(err)
		}
	}
	upgraded := func(alloc string) string {
		t.Helper()
		out, stderr, _ := c.TryCLI(t, "", "alloc", "exec", alloc, "sh", "-c", "grep -ow upgraded /proc/cmdline || echo as it was")
		return out + stderr
	}

	old := c.Run(t, jobOf("old", "i=0; while :; do i=$((i+1)); echo $i; sleep 0.1; done"))
	a := c.UntilRunning(t, old)
	exchange()
	defer exchange()
	c.Until(t, "the new version", func(s *nomadtest.State) bool {
		d := s.Node(n.Name).Drivers[Name]
		return d != nil && d.Healthy && d.Attributes["driver.cradle.version"] == version && d.Attributes["driver.cradle.boot.digest"] == next.Digest
	})
	c.UntilAnswers(t, a.ID)
	if got := upgraded(a.ID); got != "as it was\n" {
		t.Errorf("the pod that ran says %q", got)
	}
	seen := strings.Count(c.Logs(t, a.ID, "main", "stdout"), "\n")
	gapless(t, c.UntilLogs(t, a.ID, "main", "stdout", func(s string) bool { return strings.Count(s, "\n") > seen+5 }), 1)
	fresh := c.Run(t, jobOf("fresh", "exec sleep 1000"))
	if got := upgraded(c.UntilRunning(t, fresh).ID); got != "upgraded\n" {
		t.Errorf("the pod that starts after that says %q", got)
	}
	c.CLI(t, "alloc", "restart", a.ID) // returns before it runs again
	eventually(t, func() string { return upgraded(a.ID) }, func(s string) bool { return s == "upgraded\n" })
	c.Stop(t, fresh)
	c.Stop(t, old)
}

// gapless checks that a task that counts has been heard from the start on. For each kill of a plugin one piece of output may be there twice: the one that
// was written and not yet noted. On a busy host that is not so rare, as writing wakes the reader.
func gapless(t *testing.T, out string, kills int) (last int) {
	t.Helper()
	for i, line := range strings.Split(out[:max(strings.LastIndexByte(out, '\n'), 0)], "\n") {
		number, err := strconv.Atoi(line)
		if err == nil && number <= last && number > last-1000 && kills > 0 {
			kills--
		} else if err != nil || number != last+1 {
			t.Fatalf("line %d is %q, after %d", i+1, line, last)
		}
		last = number
	}
	return last
}

// What a client that is asked for too much says, and what Nomad does.
func TestVMAgentImpossibleResources(t *testing.T) {
	c := openAgents(t)
	job := c.Run(t, strings.Replace(jobOf("huge", "true"), "memory = 64", "memory = 10000000", 1))
	c.Until(t, "an evaluation without a place", func(s *nomadtest.State) bool {
		for _, e := range s.Evals {
			if e.JobID == job && e.FailedTGAllocs["g"] != nil && e.FailedTGAllocs["g"].DimensionExhausted["memory"] > 0 {
				return true
			}
		}
		return false
	})
	fail(t, c, map[string]failure{
		"memory": {strings.Replace(jobOf("tiny", "true", "", "", once), "memory = 64", "memory = 10", 1), "resources.memory: 10MiB is too small to boot; at least 16MiB"},
		"disk":   {jobOf("small", "true", "disk = \"1MiB\"", "", once), "disk: 1MiB is too small for a file system; at least 16MiB"},
		"cpus":   {jobOf("half", "true", "cpus = -1", "", once), "cpus"},
	})()
}

// A mistake in the plugin's configuration ends the agent, which says where it is.
func TestVMAgentPluginMistakes(t *testing.T) {
	c := openAgents(t)
	n := c.Clients()[0]
	const agent = `data_dir   = "%[1]s/data"
plugin_dir = "%[2]s/plugins"
client {
  enabled = true
}
plugin "nomad-driver-cradle" {
  config {
    %[3]s
  }
}
`
	for name, test := range map[string]struct{ line, want string }{
		"value":   {`accelerator = "magic"`, `agent.hcl:8: accelerator: "magic" is none of auto, kvm, tcg`},
		"key":     {`acelerator = "kvm"`, `acelerator`},
		"kind":    {`volumes = "all"`, `volumes`},
		"several": {"state_dir = \"x\"\ncache_dir = \"y\"", `agent.hcl:9: cache_dir: "y" is no absolute path`},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			file := filepath.Join(dir, "agent.hcl")
			if err := os.WriteFile(file, fmt.Appendf(nil, agent, dir, n.Dir, test.line), 0o600); err != nil {
				t.Fatal(err)
			}
			out, err := n.Output(t.Context(), "timeout", "180", c.Nomad(), "agent", "-config", file)
			if err == nil || !strings.Contains(out+err.Error(), test.want) {
				t.Errorf("%s\n%v", out, err)
			}
		})
	}
}
