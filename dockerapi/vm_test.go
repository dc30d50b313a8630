//go:build vm

// These tests run the real docker CLI against the server in front of a real Nomad, whose pods are real machines.
package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/nomad/api"

	"github.com/cradlestack/cradlestack/internal/nomadtest"
	"github.com/cradlestack/cradlestack/test/dockerd"
	"github.com/cradlestack/cradlestack/test/programs"
)

func TestMain(m *testing.M) {
	code := m.Run()
	if err := closeCluster(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	os.Exit(code)
}

// cluster is one Nomad for all tests.
var cluster struct {
	sync.Once
	*nomadtest.Cluster
	end func() error
	err error
}

// closeCluster ends it. What tests that ran beside each other have left behind is an error.
func closeCluster() error {
	if cluster.Cluster == nil {
		return nil
	}
	var err error
	if cluster.end != nil {
		err = cluster.end()
	}
	return errors.Join(err, cluster.Close())
}

// A host is a server, and what makes the docker CLI use it.
type host struct {
	t      *testing.T
	c      *nomadtest.Cluster
	socket string
	config string   // docker's, empty
	space  string   // Nomad's namespace
	more   []string // of serve's options
	cmd    *exec.Cmd
	log    *bytes.Buffer
}

// openCluster is the cluster, for this test alone.
func openCluster(t *testing.T) *nomadtest.Cluster {
	t.Helper()
	c := startCluster(t)
	c.Begin(t)
	return c
}

func startCluster(t *testing.T) *nomadtest.Cluster {
	t.Helper()
	if _, err := exec.LookPath("docker"); err != nil {
		t.Fatal("the docker CLI is missing: apt-get install docker-cli")
	}
	cluster.Do(func() {
		o := nomadtest.Options{ACL: true}
		if cluster.err = o.Cradle("volumes {\n enabled = true\n}"); cluster.err != nil { // --host-paths needs it
			return
		}
		o.Keep = append(o.Keep, "cradle", "volumes", "nomad/client/csi", "/run/cradle")
		if _, cluster.err = programs.Image("busybox"); cluster.err != nil {
			return
		}
		if cluster.Cluster, cluster.err = nomadtest.Open(context.Background(), o); cluster.err != nil {
			return
		}
		cluster.end, cluster.err = cluster.Mark()
	})
	if cluster.err != nil {
		t.Fatal(cluster.err)
	}
	return cluster.Cluster
}

func openHost(t *testing.T, more ...string) *host {
	t.Helper()
	return openHostOn(t, openCluster(t), more...)
}

// in is the host for a part of its test.
func (h *host) in(t *testing.T) *host {
	part := *h
	part.t = t
	return &part
}

// openBeside is openHost for a test that runs beside others, when those that need the cluster for themselves have ended: in a namespace of its own. Ports of the node
// are to be no other test's.
func openBeside(t *testing.T, more ...string) *host {
	t.Helper()
	t.Parallel()
	c := startCluster(t)
	name := strings.ToLower(t.Name())
	if _, err := c.API.Namespaces().Register(&api.Namespace{Name: name}, nil); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Log(c.Describe())
		}
	})
	h := openHostOn(t, c, append(more, "--namespace", name)...)
	h.space = name
	return h
}

// openHostOn starts a server with more of serve's options.
func openHostOn(t *testing.T, c *nomadtest.Cluster, more ...string) *host {
	t.Helper()
	h := &host{t: t, space: api.DefaultNamespace, more: more, c: c, config: t.TempDir(), socket: filepath.Join(c.Dir(), fmt.Sprintf("%d.sock", time.Now().UnixNano()%1e9))}
	h.serve()
	t.Cleanup(h.close)
	return h
}

// serve starts the server in the node, whose Nomad it uses.
func (h *host) serve() {
	h.t.Helper()
	program, err := programs.Path("cradle-dockerapi")
	if err != nil {
		h.t.Fatal(err)
	}
	cache, err := os.UserCacheDir()
	if err != nil {
		h.t.Fatal(err)
	}
	node := h.c.Server()
	args := []string{"serve", "--verbose", "--socket", h.socket, "--image-layouts", filepath.Join(cache, "cradlestack", "images")}
	h.cmd = node.Command(context.Background(), program, append(args, h.more...)...)
	h.cmd.Env = h.c.Env()
	h.log = &bytes.Buffer{}
	h.cmd.Stderr = h.log
	if err := node.Launch(h.cmd); err != nil {
		h.t.Fatal(err)
	}
	for begin := time.Now(); ; time.Sleep(20 * time.Millisecond) {
		if c, err := net.Dial("unix", h.socket); err == nil {
			c.Close()
			return
		}
		if time.Since(begin) > nomadtest.Patience {
			h.t.Fatalf("the server does not listen:\n%s", h.log)
		}
	}
}

// kill ends the server as kill -9 does.
func (h *host) kill() {
	h.cmd.Process.Kill()
	h.cmd.Wait()
}

func (h *host) close() {
	if out, err := h.try("", "ps", "-aq"); err == nil && out != "" {
		h.try("", append([]string{"rm", "-f"}, strings.Fields(out)...)...)
	}
	h.cmd.Process.Signal(os.Interrupt)
	h.cmd.Wait()
	if h.t.Failed() {
		h.t.Logf("the server's log:\n%s", h.log)
	}
}

func (h *host) command(ctx context.Context, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, "docker", args...)
	cmd.Env = append(os.Environ(), "DOCKER_HOST=unix://"+h.socket, "DOCKER_CONFIG="+h.config)
	cmd.WaitDelay = 10 * time.Second
	return cmd
}

// try runs docker and returns its standard output; an error has the other, and the exit code.
func (h *host) try(stdin string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), nomadtest.Patience)
	defer cancel()
	cmd := h.command(ctx, args...)
	cmd.Stdin = strings.NewReader(stdin)
	var stdout, stderr strings.Builder
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return stdout.String(), fmt.Errorf("docker %s: %w: %s", strings.Join(args, " "), err, strings.TrimSpace(stderr.String()))
	}
	return stdout.String(), nil
}

// run is try that has to succeed, without the white space around its output.
func (h *host) run(args ...string) string {
	h.t.Helper()
	out, err := h.try("", args...)
	if err != nil {
		h.t.Fatalf("%v\n%s", err, out)
	}
	return strings.TrimSpace(out)
}

// want compares what a command prints.
func (h *host) want(want string, args ...string) {
	h.t.Helper()
	if got := h.run(args...); got != want {
		h.t.Errorf("docker %s: %q, want %q", strings.Join(args, " "), got, want)
	}
}

// wantError checks that a command fails with a code and a message.
func (h *host) wantError(code int, want string, args ...string) {
	h.t.Helper()
	_, err := h.try("", args...)
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != code || !regexp.MustCompile(want).MatchString(err.Error()) {
		h.t.Errorf("docker %s: %v; want exit code %d and %s", strings.Join(args, " "), err, code, want)
	}
}

func TestVMRun(t *testing.T) {
	h := openBeside(t)
	h.want("hello", "run", "--rm", "busybox", "echo", "hello")
	h.want("", "ps", "-aq")
	h.wantError(3, "", "run", "--rm", "--network", "none", "busybox", "sh", "-c", "test $(wc -l </proc/net/route) -le 1 && exit 3")
	h.wantError(125, "network nosuch not found", "run", "--rm", "--network", "nosuch", "busybox", "true")
	h.want("", "ps", "-aq")
	h.wantError(127, "exit status 127: docker: Error response from daemon: failed to create task.*executable file not found", "run", "--rm", "busybox", "nosuchcommand") // and nothing before it
	h.wantError(125, "No such image: missing:latest|Unable to find image", "run", "--rm", "missing")
	out, err := h.try("some input\n", "run", "--rm", "-i", "busybox", "cat")
	if err != nil || out != "some input\n" {
		t.Errorf("run -i: %q, %v", out, err)
	}
	h.want("1: lo    inet 127.0.0.1/8 scope host lo", "run", "--rm", "--network", "none", "busybox", "sh", "-c", "ip -4 -o addr | sed 's/ *\\\\.*//'; ip route")
	h.run("run", "-d", "--init", "--name", "early", "busybox", "sleep", "1000")
	h.run("stop", "early")
	h.want("143", "inspect", "-f", "{{.State.ExitCode}}", "early")
	h.want("A=1\nB=x y\nPATH=/bin", "run", "--rm", "-e", "A=1", "-e", "B=x y", "-e", "PATH=/bin", "--entrypoint", "", "busybox", "sh", "-c", "env | grep -E '^(A|B|PATH|NOMAD.*)=' | sort")
}

func TestVMLife(t *testing.T) {
	h := openBeside(t)
	id := h.run("run", "-d", "--name", "web", "-l", "tier=front", "--stop-signal", "HUP", "busybox", "sh", "-c", "trap 'echo bye; exit 7' HUP; echo out; echo err >&2; while :; do sleep 0.1; done")
	if len(id) != 64 {
		t.Fatalf("run -d prints %q", id)
	}
	h.want("web running true", "inspect", "-f", "{{slice .Name 1}} {{.State.Status}} {{.State.Running}}", "web")
	h.want(id, "ps", "-q", "--no-trunc", "--filter", "label=tier=front", "--filter", "status=running")
	h.want("", "ps", "-q", "--filter", "name=other")
	h.want(id[:12], "exec", "web", "hostname")
	h.wantError(9, "", "exec", "web", "sh", "-c", "exit 9")
	out, err := h.try("through exec\n", "exec", "-i", "web", "cat")
	if err != nil || out != "through exec\n" {
		t.Errorf("exec -i: %q, %v", out, err)
	}
	h.wantError(1, "Conflict. The container name \"/web\" is already in use by container", "create", "--name", "web", "busybox")
	h.run("exec", "web", "sh", "-c", "echo kept >/file")
	h.run("rename", "web", "site")
	h.wantError(1, "No such container: web", "inspect", "--type", "container", "web")
	h.untilSaid("out", "site")
	h.run("stop", "site")
	h.want("exited 7", "inspect", "-f", "{{.State.Status}} {{.State.ExitCode}}", "site")
	h.want("out\nbye", "logs", "site")
	h.run("start", "site")
	h.want("kept", "exec", "site", "cat", "/file")
	h.want("running 0", "inspect", "-f", "{{.State.Status}} {{.State.ExitCode}}", "site")
	h.wantError(1, "container is running: stop the container before removing or force remove", "rm", "site")
	h.run("kill", "site")
	h.want("137", "wait", "site")
	h.run("rm", "site")
	h.want("", "ps", "-aq")
}

// A container's files are there before its first run and after its last one, and come and go by docker cp.
func TestVMCopy(t *testing.T) {
	h := openBeside(t)
	dir := t.TempDir()
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, []byte("content\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	h.run("create", "--name", "copied", "busybox", "sh", "-c", "cat /etc/file; echo more >>/etc/file; sleep 1000")
	h.run("cp", file, "copied:/etc/file")
	h.run("start", "copied")
	h.until("the container's writing", func() bool { return h.run("exec", "copied", "cat", "/etc/file") == "content\nmore" })
	h.run("cp", "copied:/etc/file", file+"2")
	h.untilSaid("content", "copied")
	h.run("kill", "copied")
	h.want("C /etc\nA /etc/file", "diff", "copied")
	h.run("cp", "copied:/etc/file", file+"3")
	for _, name := range []string{file + "2", file + "3"} {
		if data, err := os.ReadFile(name); err != nil || string(data) != "content\nmore\n" {
			t.Errorf("%s: %q, %v", name, data, err)
		}
	}
	// docker compose run --rm copies secrets so.
	h.run("create", "--rm", "--name", "once", "busybox", "cat", "/etc/file")
	h.run("cp", file, "once:/etc/file")
	h.want("content", "start", "-a", "once")
	h.until("its removal", func() bool { return h.run("ps", "-aq", "--filter", "name=once") == "" })
}

// The server is killed while docker run waits for a container, and while another one with --rm has just begun. The next one goes on: how the one ended is
// known, and the other is gone when it has ended.
func TestVMServerKilled(t *testing.T) {
	h := openBeside(t)
	h.run("run", "-d", "--name", "kept", "busybox", "sh", "-c", "sleep 3; echo done; exit 4")
	cmd := h.command(t.Context(), "run", "--rm", "--name", "gone", "busybox", "sh", "-c", "until test -e /end; do sleep 0.1; done")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	h.until("gone to begin", func() bool {
		_, err := h.try("", "exec", "-d", "gone", "sh", "-c", "sleep 2; touch /end") // it ends while there is no server
		return err == nil
	})
	h.kill()
	cmd.Wait()
	h.serve()
	h.want("4", "wait", "kept")
	h.want("done", "logs", "kept")
	h.until("gone to be gone", func() bool {
		out, err := h.try("", "ps", "-aq", "--filter", "name=gone")
		return err == nil && out == ""
	})
}

// untilSaid waits until that is all of a container's standard output: what it has written may come into the log a moment later.
func (h *host) untilSaid(want, container string) {
	h.t.Helper()
	h.until(fmt.Sprintf("%s to say %q", container, want), func() bool {
		out, _ := h.try("", "logs", container)
		return strings.TrimSpace(out) == want
	})
}

// until asks until it is so.
func (h *host) until(what string, ok func() bool) {
	h.t.Helper()
	for begin := time.Now(); !ok(); time.Sleep(100 * time.Millisecond) {
		if time.Since(begin) > nomadtest.Patience {
			out, err := h.try("", "ps", "-a")
			h.t.Fatalf("waited for %s; there are, %v,\n%s", what, err, out)
		}
	}
}

// Policies to start again are followed inside of the pod.
func TestVMRestartPolicy(t *testing.T) {
	h := openBeside(t)
	h.run("run", "-d", "--restart", "on-failure:2", "--name", "tries", "busybox", "sh", "-c", "echo try; exit 5")
	h.want("5", "wait", "tries")
	h.until("the last try", func() bool {
		return h.run("inspect", "-f", "{{.State.Status}} {{.RestartCount}}", "tries") == "exited 2"
	})
	h.want("try\ntry\ntry", "logs", "tries")
	h.want("5 2", "inspect", "-f", "{{.State.ExitCode}} {{.RestartCount}}", "tries")
}

// second is another server in front of the same Nomad.
func (h *host) second(args ...string) *host {
	h.t.Helper()
	other := *h
	other.socket, other.more = h.socket+"2", append(slices.Clone(h.more), args...)
	other.serve()
	h.t.Cleanup(func() {
		other.cmd.Process.Signal(os.Interrupt)
		other.cmd.Wait()
	})
	return &other
}

// eventSteps are commands of docker's whose events are the same here as Debian's dockerd's.
var eventSteps = [][]string{
	{"create", "--name", "told", "--label", "tier=front", "busybox", "sh", "-c", "trap 'exit 3' TERM; touch /ready; while :; do sleep 0.1; done"},
	{"start", "told"},
	{"exec", "told", "sh", "-c", "until test -e /ready; do sleep 0.1; done"},
	{"pause", "told"},
	{"unpause", "told"},
	{"rename", "told", "again"},
	{"kill", "--signal", "WINCH", "again"},
	{"top", "again"},
	{"stop", "again"},
	{"start", "again"},
	{"kill", "again"},
	{"rm", "again"},
	{"run", "--rm", "--name", "short", "busybox", "sh", "-c", "exit 4"},
}

// eventsOf runs the steps while docker events listens, and returns what it prints.
func eventsOf(t *testing.T, docker func(ctx context.Context, args ...string) *exec.Cmd) []string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), nomadtest.Patience)
	defer cancel()
	listen := docker(ctx, "events", "--filter", "type=container", "--format", "{{.Action}} {{with .Actor.Attributes}}{{.name}} {{.image}} {{.tier}} {{.exitCode}} {{.signal}} {{.oldName}}{{end}}")
	out, err := listen.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := listen.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		listen.Process.Signal(os.Interrupt)
		listen.Wait()
	}()
	lines := bufio.NewScanner(out)
	var all []string
	next := func() string {
		if !lines.Scan() {
			t.Fatalf("docker events ended after\n%s", strings.Join(all, "\n"))
		}
		return strings.Join(strings.Fields(lines.Text()), " ")
	}
	// A container that is made again and again until it is told of: from then on docker events listens.
	listens := make(chan struct{})
	go func() {
		for ctx.Err() == nil {
			docker(ctx, "create", "--name", "first", "busybox", "true").Run()
			docker(ctx, "rm", "first").Run()
			select {
			case <-listens:
				return
			case <-time.After(200 * time.Millisecond):
			}
		}
	}()
	next()
	listens <- struct{}{}
	for _, step := range eventSteps {
		cmd := docker(ctx, step...)
		if said, err := cmd.CombinedOutput(); err != nil && step[0] != "run" {
			t.Fatalf("docker %s: %v: %s", strings.Join(step, " "), err, said)
		}
	}
	for {
		line := next()
		if !strings.Contains(line, " first ") {
			all = append(all, line)
		}
		if strings.HasPrefix(line, "destroy short ") {
			return all
		}
	}
}

// What docker events tells through one server of what is done through another is what dockerd tells; and it is told later, by a server that was
// started after that, as well, but for what pods told that are gone.
func TestVMEvents(t *testing.T) {
	h := openBeside(t)
	other := h.second()
	begin := time.Now()
	told := eventsOf(t, func(ctx context.Context, args ...string) *exec.Cmd {
		if args[0] == "events" {
			return other.command(ctx, args...)
		}
		return h.command(ctx, args...)
	})
	home, err := os.MkdirTemp("", "dv")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(home) })
	daemon := dockerd.ForTest(t, home)
	busybox, err := programs.Image("busybox")
	if err != nil {
		t.Fatal(err)
	}
	if err := daemon.LoadLayout(t.Context(), "busybox:latest", busybox); err != nil {
		t.Fatal(err)
	}
	want := eventsOf(t, func(ctx context.Context, args ...string) *exec.Cmd {
		return exec.CommandContext(ctx, "docker", append([]string{"-H", daemon.Host}, args...)...)
	})
	for i := range want[1:] { // which of the two comes first depends on dockerd's version, and on luck
		if strings.HasPrefix(want[i], "stop ") && strings.HasPrefix(want[i+1], "die ") {
			want[i], want[i+1] = want[i+1], want[i]
		}
	}
	if got, want := strings.Join(told, "\n"), strings.Join(want, "\n"); got != want {
		t.Errorf("docker events tells\n%s\ndockerd's\n%s", got, want)
	}
	h.kill()
	h.serve()
	past := func(filter string) string {
		return h.run("events", "--since", fmt.Sprint(begin.Unix()), "--until", fmt.Sprint(time.Now().Unix()), "--filter", filter, "--format", "{{.Type}} {{.Action}}")
	}
	if got := past("container=short"); got != "container create\ncontainer attach\ncontainer start\ncontainer die\ncontainer destroy" {
		t.Errorf("later the past is\n%s", got)
	}
	if got := past("network=bridge"); got != strings.TrimSpace(strings.Repeat("network connect\nnetwork disconnect\n", 3)) {
		t.Errorf("of the network bridge the past is\n%s", got)
	}
}
