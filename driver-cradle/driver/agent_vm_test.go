//go:build vm

package driver

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/nomad/api"

	"github.com/cradlestack/cradlestack/internal/nomadtest"
)

// agents is one Nomad with this driver for all tests that use real agents.
var agents struct {
	sync.Once
	*nomadtest.Cluster
	err error
}

func openAgents(t *testing.T) *nomadtest.Cluster {
	t.Helper()
	agents.Do(func() {
		if agents.err = os.MkdirAll(hostVolume(), 0o755); agents.err != nil {
			return
		}
		agents.Cluster, agents.err = startAgents(t.Context(), nomadtest.Options{
			Client: fmt.Sprintf("gc_max_allocs = 1000\nmax_kill_timeout = \"3m\"\nhost_volume \"tests\" {\n  path = %q\n}", hostVolume()),
		})
	})
	if agents.err != nil {
		t.Fatal(agents.err)
	}
	t.Cleanup(func() { noTasks(t, agents.Cluster) }) // after that of Begin
	agents.Begin(t)
	return agents.Cluster
}

// hostVolume is the directory of the node's host volume.
func hostVolume() string { return filepath.Join(shared.dir, "host-volume") }

// noTasks checks that no plugin has anything left of a task.
func noTasks(t *testing.T, c *nomadtest.Cluster) {
	for _, n := range c.Clients() {
		left, err := filepath.Glob(filepath.Join(n.Path(n.Dir), "cradle/state/tasks/*"))
		if err != nil || len(left) > 0 {
			t.Errorf("left behind: %v %v", left, err)
		}
	}
}

// closeAgents ends them after the last test.
func closeAgents() error {
	if agents.Cluster == nil {
		return nil
	}
	return agents.Close()
}

// pluginBlock is what an agent is told of the plugin. State and caches are the node's own.
const pluginBlock = `
state_dir    = "{{.Dir}}/cradle/state"
cache_dir    = "{{.Dir}}/cradle/cache"
boot_package = "%s"
volumes {
  enabled = true
  paths   = ["{{.Dir}}/cradle/shared"]
}
`

var buildPlugin = sync.OnceValues(func() (string, error) {
	path := filepath.Join(shared.dir, "nomad-driver-cradle")
	build := exec.Command("go", "build", "-trimpath", "-o", path, "..") // as make build does: all but the linking is there
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		return "", fmt.Errorf("go build: %w\n%s", err, out)
	}
	return path, nil
})

func startAgents(ctx context.Context, o nomadtest.Options) (*nomadtest.Cluster, error) {
	plugin, err := buildPlugin()
	if err != nil {
		return nil, err
	}
	if err := credentials(shared.dir); err != nil {
		return nil, err
	}
	for name, value := range map[string]string{
		"PATH": shared.dir + ":" + os.Getenv("PATH"), "DOCKER_HOST": "unix://" + shared.dir + "/docker.sock", // where no daemon is
	} {
		if err := os.Setenv(name, value); err != nil {
			return nil, err
		}
	}
	o.Plugins = map[string]nomadtest.Plugin{"nomad-driver-cradle": {Path: plugin, Config: fmt.Sprintf(pluginBlock+registryKeys, shared.boot, shared.dir)}}
	o.Drivers = append(o.Drivers, Name)
	o.Keep = append(o.Keep, "cradle") // noTasks looks into it
	o.Agent += "telemetry {\n  publish_allocation_metrics = true\n  collection_interval = \"1s\"\n}\n"
	return nomadtest.Open(ctx, o)
}

// jobOf is a job of one task that runs a shell script in the busybox image; more is added to its config block, task and group.
func jobOf(name, script string, more ...string) string {
	more = append(more, "", "", "")
	if !strings.Contains(more[1], "kill_timeout") {
		more[1] += "\nkill_timeout = \"100ms\"" // most scripts are process 1 and do not hear that they are to end
	}
	return fmt.Sprintf(`
job %q {
  group "g" {
    %s
    task "main" {
      driver = "cradle"
      %s
      config {
        image   = "oci:%s/busybox"
        command = "sh"
        args    = ["-c", <<EOS
%s
EOS
        ]
        %s
      }
      resources {
        cpu    = 100
        memory = 64
      }
    }
  }
}`, name, more[2], more[1], shared.images, script, more[0])
}

// eventually asks until the answer is as it should be, and fails the test with the last one if it never is.
func eventually(t *testing.T, ask func() string, ok func(string) bool) {
	t.Helper()
	var got string
	for begin := time.Now(); time.Since(begin) < nomadtest.Patience; time.Sleep(100 * time.Millisecond) {
		if got = ask(); ok(got) {
			return
		}
	}
	t.Errorf("it stays at\n%s", got)
}

// events are what Nomad tells of an allocation's task.
func events(t *testing.T, c *nomadtest.Cluster, alloc string) string {
	t.Helper()
	a, _, err := c.API.Allocations().Info(alloc, nil)
	if err != nil {
		t.Fatal(err)
	}
	var b strings.Builder
	for name, s := range a.TaskStates {
		for _, e := range s.Events {
			fmt.Fprintf(&b, "%s: %s: %s %v\n", name, e.Type, e.DisplayMessage, e.Details)
		}
	}
	return b.String()
}

// A failure is a job whose allocation is to fail, and what Nomad is to tell of that.
type failure struct{ job, want string }

// fail runs jobs, all at a time; what it returns checks them.
func fail(t *testing.T, c *nomadtest.Cluster, all map[string]failure) (check func()) {
	t.Helper()
	jobs := map[string]string{}
	for name, f := range all {
		jobs[name] = c.Run(t, f.job)
	}
	return func() {
		for name, f := range all {
			t.Run(name, func(t *testing.T) {
				a := c.UntilEnded(t, jobs[name])
				if a.ClientStatus != api.AllocClientStatusFailed {
					t.Errorf("the allocation is %s", a.ClientStatus)
				}
				eventually(t, func() string { return events(t, c, a.ID) }, func(s string) bool { return strings.Contains(s, f.want) })
			})
		}
	}
}

// once is a group's policy: what fails has failed.
const once = "restart {\n  attempts = 0\n  mode = \"fail\"\n}\nreschedule {\n  attempts = 0\n  unlimited = false\n}\n"

type nomadAlloc = api.AllocationListStub

func TestVMAgentLife(t *testing.T) {
	c := openAgents(t)
	job := c.Run(t, jobOf("life", `trap 'echo got hup' HUP; trap 'echo got 37' 37; trap 'echo got int; exit 0' INT; echo up; echo oops >&2; while :; do sleep 0.1; done`,
		"", "kill_signal = \"SIGINT\"\nkill_timeout = \"3m\"\nuser = \"nobody\"\nenv {\n  COLOUR = \"red\"\n}\naction \"greet\" {\n  command = \"echo\"\n  args    = [\"hello from an action\"]\n}\n"))
	a := c.UntilRunning(t, job)
	c.UntilLogsHave(t, a.ID, "main", "stdout", "up\n")
	c.UntilLogsHave(t, a.ID, "main", "stderr", "oops\n")

	inCgroup(t, c.Clients()[0], a.ID)
	if got := c.CLI(t, "alloc", "exec", a.ID, "sh", "-c", "id -un; echo $COLOUR $NOMAD_TASK_NAME"); got != "nobody\nred main\n" {
		t.Errorf("exec: %q", got)
	}
	if _, stderr, code := c.TryCLI(t, "", "alloc", "exec", "-i=false", a.ID, "sh", "-c", "echo no >&2; exit 7"); code != 7 || stderr != "no\n" {
		t.Errorf("exec: exit code %d, stderr %q", code, stderr)
	}
	if got, _, code := c.TryCLI(t, "some input", "alloc", "exec", a.ID, "wc", "-c"); code != 0 || strings.TrimSpace(got) != "10" {
		t.Errorf("exec with input: %q, %d", got, code)
	}
	if got := c.CLI(t, "action", "-job=life", "-group=g", "-task=main", "greet"); got != "hello from an action\n" {
		t.Errorf("action: %q", got)
	}
	onTerminal(t, c, a.ID)
	c.CLI(t, "alloc", "signal", "-s", "SIGHUP", a.ID)
	c.UntilLogsHave(t, a.ID, "main", "stdout", "got hup\n")
	c.CLI(t, "alloc", "signal", "-s", "SIGRTMIN+3", a.ID)
	c.UntilLogsHave(t, a.ID, "main", "stdout", "got hup\ngot 37\n")
	if _, stderr, code := c.TryCLI(t, "", "alloc", "signal", "-s", "SIGNOPE", a.ID); code == 0 || !strings.Contains(stderr, `"SIGNOPE" is no signal`) {
		t.Errorf("a signal that there is not: %d, %s", code, stderr)
	}
	if got := c.CLI(t, "alloc", "fs", a.ID, "main"); !strings.Contains(got, "local/") {
		t.Errorf("alloc fs: %q", got)
	}
	c.CLI(t, "alloc", "restart", a.ID)
	logs := func() string { return c.Logs(t, a.ID, "main", "stdout") }
	eventually(t, logs, func(s string) bool { return s == "up\ngot hup\ngot 37\ngot int\nup\n" })
	c.Stop(t, job)
	eventually(t, logs, func(s string) bool { return s == "up\ngot hup\ngot 37\ngot int\nup\ngot int\n" })
}

// machines are the node's QEMU processes.
func machines(t *testing.T, n *nomadtest.Node) []nomadtest.Process {
	t.Helper()
	all, err := n.Processes()
	if err != nil {
		t.Fatal(err)
	}
	return slices.DeleteFunc(all, func(p nomadtest.Process) bool { return !strings.HasPrefix(p.Name(), "qemu-system") || p.State == 'Z' })
}

// inCgroup checks that the node's machine is in the cgroup that Nomad has made for the allocation's task.
func inCgroup(t *testing.T, n *nomadtest.Node, alloc string) {
	t.Helper()
	all := machines(t, n)
	for _, p := range all {
		if groups, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", p.PID)); err != nil || !strings.Contains(string(groups), "/"+alloc+".main") {
			t.Errorf("the machine is in %s %v", groups, err)
		}
	}
	if len(all) != 1 {
		t.Errorf("%d machines run", len(all))
	}
}

// onTerminal runs a command on a terminal whose size changes.
func onTerminal(t *testing.T, c *nomadtest.Cluster, alloc string) {
	t.Helper()
	a, _, err := c.API.Allocations().Info(alloc, nil)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), nomadtest.Patience)
	defer cancel()
	out := &watched{text: "33 101", seen: make(chan struct{})}
	sizes := make(chan api.TerminalSize, 1)
	sizes <- api.TerminalSize{Height: 33, Width: 101}
	go func() {
		select {
		case <-out.seen:
			sizes <- api.TerminalSize{Height: 44, Width: 99}
		case <-ctx.Done():
		}
	}()
	code, err := c.API.Allocations().Exec(ctx, a, "main", true, []string{"sh", "-c", `until [ "$(stty size)" = "44 99" ]; do stty size; sleep 0.1; done; read line; echo "you said $line"; exit 5`},
		strings.NewReader("something\n"), out, io.Discard, sizes, nil)
	if err != nil || code != 5 || !strings.Contains(out.String(), "you said something\r\n") {
		t.Errorf("a command on a terminal: %d, %v, %q", code, err, out.String())
	}
}

// watched is output of which a text is waited for.
type watched struct {
	strings.Builder
	text string
	seen chan struct{}
	once sync.Once
}

func (w *watched) Write(p []byte) (int, error) {
	n, err := w.Builder.Write(p)
	if strings.Contains(w.String(), w.text) {
		w.once.Do(func() { close(w.seen) })
	}
	return n, err
}

// A task that does not end is killed after its kill_timeout; Nomad's stop of an allocation starts another.
func TestVMAgentKillTimeout(t *testing.T) {
	c := openAgents(t)
	job := c.Run(t, jobOf("stubborn", `trap '' TERM; echo up; while :; do sleep 1; done`, "", "kill_timeout = \"1s\""))
	a := c.UntilRunning(t, job)
	c.UntilLogsHave(t, a.ID, "main", "stdout", "up\n")
	c.CLI(t, "alloc", "stop", "-detach", a.ID)
	c.UntilAlloc(t, job, "ended", func(ended *nomadAlloc) bool { return ended.ID == a.ID && nomadtest.Ended(ended) })
	eventually(t, func() string { return events(t, c, a.ID) }, func(s string) bool { return strings.Contains(s, "exit_code:137") })
	c.UntilAlloc(t, job, "another that runs", func(other *nomadAlloc) bool { return other.ID != a.ID && nomadtest.Running(other) })
	c.Stop(t, job)
}

func TestVMAgentFailures(t *testing.T) {
	c := openAgents(t)
	fail(t, c, map[string]failure{
		"exit":         {jobOf("exit", "exit 9", "", "", once), "Exit Code: 9"},
		"oom":          {jobOf("oom", "tail /dev/zero", "", "", once), "oom_killed:true"},
		"command":      {strings.Replace(jobOf("command", "", "", "", once), `"sh"`, `"nothere"`, 1), "executable file not found"},
		"image":        {strings.Replace(jobOf("image", "", "", "", once), "busybox", "missing", 1), "missing"},
		"key":          {jobOf("key", "", "hostnam = \"x\"", "", once), "hostnam"},
		"value":        {jobOf("value", "", "hostname = \"not a name\"", "", once), "hostname: "},
		"host path":    {jobOf("path", "", "volumes = [\"/etc:/host\"]", "", once), "/etc is not below one of the paths that this client's operator allows"},
		"missing path": {jobOf("missing", "", "volumes = [\"local/nope:/host\"]", "", once), "does not exist"},
		"user":         {jobOf("user", "", "", "user = \"nosuchuser\"", once), "nosuchuser"},
		"host network": {jobOf("net", "", "", "", once+"network {\n  mode = \"host\"\n  port \"http\" {}\n}\n"), "microVM"},
		"snp":          {jobOf("snp", "", "variant = \"snp\"", "", once), "snp is not supported yet"},
	})()
}

// A task whose logs Nomad does not want runs as any other.
func TestVMAgentWithoutLogs(t *testing.T) {
	c := openAgents(t)
	job := c.Run(t, jobOf("silent", "echo nobody hears it; echo nor this >&2; exec sleep 1000", "", "logs {\n  disabled = true\n}\n"))
	a := c.UntilRunning(t, job)
	killPlugin(t, c.Clients()[0])
	execIsBack(t, c, a.ID)
	c.Stop(t, job)
}

// What keeps a pod from starting may go by itself: the restart policy is on that as well.
func TestVMAgentStartIsTriedAgain(t *testing.T) {
	c := openAgents(t)
	const port = "18099"
	l, err := c.Clients()[0].Listen("tcp", ":"+port)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	job := c.Run(t, jobOf("blocked", "echo up; exec sleep 1000", `ports = ["taken"]`, "", `
    network {
      port "taken" {
        static = `+port+`
      }
    }
    restart {
      attempts = 1000
      interval = "1h"
      delay    = "1s"
      mode     = "delay"
    }`))
	a := c.UntilAlloc(t, job, "tried again", func(a *nomadAlloc) bool { return a.TaskStates["main"] != nil && a.TaskStates["main"].Restarts > 0 })
	if got := events(t, c, a.ID); !strings.Contains(got, port) {
		t.Errorf("Nomad tells\n%s", got)
	}
	l.Close()
	c.UntilLogsHave(t, c.UntilRunning(t, job).ID, "main", "stdout", "up\n")
	c.Stop(t, job)
}

// Templates, the directories of a task, and what changes in them while it runs: with a signal, silently, and with a restart.
func TestVMAgentTemplates(t *testing.T) {
	c := openAgents(t)
	const path = "nomad/jobs/templates"
	const template = `
      template {
        data        = "%[1]s {{ with nomadVar \"` + path + `\" }}{{ .%[1]s }}{{ end }}\n"
        destination = "local/%[1]s"
        %[2]s
      }`
	job := c.Run(t, jobOf("templates", `trap 'echo hup; cat /local/colour' HUP; cat /local/colour /local/size /local/shape; cat /secrets/key; ls -d $NOMAD_ALLOC_DIR/data; echo $FROM_TEMPLATE; while :; do sleep 0.1; done`,
		"", fmt.Sprintf(template, "colour", "change_mode = \"signal\"\nchange_signal = \"SIGHUP\"")+
			fmt.Sprintf(template, "size", "change_mode = \"noop\"")+fmt.Sprintf(template, "shape", "change_mode = \"restart\"\nsplay = \"0s\"")+`
      template {
        data        = "key\n"
        destination = "secrets/key"
        perms       = "400"
      }
      template {
        data        = "FROM_TEMPLATE=yes"
        destination = "secrets/env"
        env         = true
      }
`))
	put := func(colour, size, shape string) {
		t.Helper()
		v := &api.Variable{Path: path, Items: api.VariableItems{"colour": colour, "size": size, "shape": shape}}
		if _, _, err := c.API.Variables().Update(v, nil); err != nil {
			t.Fatal(err)
		}
	}
	put("red", "small", "round")
	t.Cleanup(func() { c.API.Variables().Delete(path, nil) })
	a := c.UntilRunning(t, job)
	const begun = "colour red\nsize small\nshape round\nkey\n/alloc/data\nyes\n"
	c.UntilLogsHave(t, a.ID, "main", "stdout", begun)
	put("blue", "small", "round")
	c.UntilLogsHave(t, a.ID, "main", "stdout", begun+"hup\ncolour blue\n")
	put("blue", "large", "round")
	eventually(t, func() string { return c.CLI(t, "alloc", "exec", a.ID, "cat", "/local/size") }, func(s string) bool { return s == "size large\n" })
	if got := c.Logs(t, a.ID, "main", "stdout"); got != begun+"hup\ncolour blue\n" {
		t.Errorf("a silent change makes itself heard:\n%s", got)
	}
	put("blue", "large", "square")
	c.UntilLogsHave(t, a.ID, "main", "stdout", begun+"hup\ncolour blue\n"+"colour blue\nsize large\nshape square\nkey\n/alloc/data\nyes\n")
	a = c.UntilAlloc(t, job, "restarted", func(a *nomadAlloc) bool { return a.TaskStates["main"].Restarts > 0 })
	if n := a.TaskStates["main"].Restarts; n != 1 {
		t.Errorf("the task was restarted %d times", n)
	}
}

// The client, then the plugin, are killed while a task writes; then the client is restarted in order. The task goes on, and its log is whole.
func TestVMAgentRestarts(t *testing.T) {
	c := openAgents(t)
	node := c.Clients()[0]
	job := c.Run(t, jobOf("counter", `i=0; while :; do i=$((i+1)); echo $i; sleep 0.05; done`))
	a := c.UntilRunning(t, job)
	seen, plugins := 0, 0 // lines, and plugin processes that were ended
	more := func(what string) {
		t.Helper()
		target := seen + 40
		out := c.UntilLogs(t, a.ID, "main", "stdout", func(s string) bool { return strings.Count(s, "\n") >= target })
		seen = strings.Count(out, "\n")
		t.Logf("after %s it has counted to %d", what, gapless(t, out, plugins))
	}
	more("the start")
	if err := node.KillClient(); err != nil {
		t.Fatal(err)
	}
	startAgain(t, c, node, a.ID)
	more("the client was killed")
	killPlugin(t, node)
	plugins++
	more("the plugin was killed")
	execIsBack(t, c, a.ID)
	if err := node.StopAgents(); err != nil { // which ends the plugin
		t.Fatal(err)
	}
	plugins++
	startAgain(t, c, node, a.ID)
	more("the client was restarted")
	if err := node.KillClient(); err != nil {
		t.Fatal(err)
	}
	killPlugin(t, node)
	plugins++
	startAgain(t, c, node, a.ID)
	more("client and plugin were killed")
	info, _, err := c.API.Allocations().Info(a.ID, nil)
	if err != nil || info.TaskStates["main"].Restarts != 0 {
		t.Errorf("the task was restarted %d times: %v", info.TaskStates["main"].Restarts, err)
	}
}

// startAgain starts a node's agents and waits until the server can ask the client about an allocation.
func startAgain(t *testing.T, c *nomadtest.Cluster, n *nomadtest.Node, alloc string) {
	t.Helper()
	if err := n.StartAgents(); err != nil {
		t.Fatal(err)
	}
	c.UntilAnswers(t, alloc)
}

// execIsBack waits until a command runs in a task again: its plugin was killed and is back in a moment, and so is the client's handle of the task.
func execIsBack(t *testing.T, c *nomadtest.Cluster, alloc string) {
	t.Helper()
	eventually(t, func() string {
		out, stderr, _ := c.TryCLI(t, "", "alloc", "exec", alloc, "echo", "still here")
		return out + stderr
	}, func(s string) bool { return s == "still here\n" })
}

func killPlugin(t *testing.T, n *nomadtest.Node) {
	t.Helper()
	list, err := n.Processes()
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range list {
		if p.Name() == "nomad-driver-cradle" {
			process, err := os.FindProcess(p.PID)
			if err != nil {
				t.Fatal(err)
			}
			if err := process.Kill(); err != nil {
				t.Fatal(err)
			}
			return
		}
	}
	t.Fatal("there is no plugin process")
}

// What Nomad tells of a pod with two containers: of both together, of each, and of their machine.
func TestVMAgentStats(t *testing.T) {
	c := openAgents(t)
	a := c.UntilRunning(t, c.Run(t, jobOf("stats", "head -c 20000000 /dev/zero >/dev/shm/file; sleep 1000", fmt.Sprintf(`
        container "side" {
          image   = "oci:%s/busybox"
          command = "sh"
          args    = ["-c", "head -c 10000000 /dev/zero >/dev/shm/file; while :; do :; done"]
        }`, shared.images))))
	eventually(t, func() string {
		s, err := c.API.Allocations().Stats(&api.Allocation{ID: a.ID, NodeID: a.NodeID}, nil)
		if err != nil || s.Tasks["main"] == nil {
			return fmt.Sprint("nothing, ", err)
		}
		main := s.Tasks["main"]
		pod, own, side := main.ResourceUsage, main.Pids["main"], main.Pids["side"]
		if own == nil || side == nil {
			return fmt.Sprintf("the containers %v", main.Pids)
		}
		if pod.MemoryStats.Usage > 30000000 && pod.MemoryStats.MaxUsage > pod.MemoryStats.Usage && pod.CpuStats.Percent > 5 &&
			own.MemoryStats.Usage > 20000000 && side.MemoryStats.Usage > 10000000 && side.MemoryStats.Usage < 20000000 && side.CpuStats.Percent > own.CpuStats.Percent {
			return "right"
		}
		return fmt.Sprintf("%+v %+v, %+v %+v, %+v %+v", pod.MemoryStats, pod.CpuStats, own.MemoryStats, own.CpuStats, side.MemoryStats, side.CpuStats)
	}, func(s string) bool { return s == "right" })
	if out := c.CLI(t, "alloc", "status", "-stats", a.ID); !strings.Contains(out, "Memory Stats") || !strings.Contains(out, "CPU Stats") {
		t.Errorf("alloc status -stats:\n%s", out)
	}
}
