//go:build vm

package stack

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/hashicorp/nomad/api"
	"golang.org/x/sys/unix"

	"github.com/cradlestack/cradlestack/internal/agents"
	"github.com/cradlestack/cradlestack/test/programs"
)

// TestVMStack is the life of a stack: up, up again, its agents killed, down, up with its data, down, clean. The host has no trace of it while it is down.
func TestVMStack(t *testing.T) {
	dir, err := os.MkdirTemp("/tmp", "stack")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := Clean(context.Background(), dir); err != nil {
			t.Error(err)
		}
		if _, err := os.Stat(dir); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("after clean: %v", err)
		}
	})
	t.Setenv("DOCKER_CONFIG", t.TempDir())
	image, err := programs.Image("busybox")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Env(dir); err == nil || !strings.Contains(err.Error(), "make up") {
		t.Errorf("env of a stack that is down: %v", err)
	}
	s := up(t, dir)
	env, err := Env(dir)
	if err != nil {
		t.Fatal(err)
	}
	nomad := func(args ...string) string {
		t.Helper()
		cmd := exec.CommandContext(t.Context(), "bash", append([]string{"-ec", env + `exec nomad "$@"`, "nomad"}, args...)...)
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("nomad %s: %v\n%s", strings.Join(args, " "), err, out)
		}
		return string(out)
	}
	docker := func(args ...string) string {
		t.Helper()
		out, err := exec.CommandContext(t.Context(), "docker", args...).CombinedOutput()
		if err != nil {
			t.Fatalf("docker %s: %v\n%s", strings.Join(args, " "), err, out)
		}
		return strings.TrimSpace(string(out))
	}
	if got := docker("context", "show"); got != "default" {
		t.Errorf("the user's context is %s", got)
	}
	docker("--context", dockerContext, "volume", "create", "data")
	docker("--context", dockerContext, "run", "-d", "--name", "kept", "-v", "data:/data", "busybox", "sh", "-c", "echo here >/data/file; sleep 1000")
	if got := docker("--context", dockerContext, "run", "--rm", "-v", dir+":/host", "busybox", "ls", "/host/stack.json"); got != "/host/stack.json" {
		t.Errorf("a container with a folder of the host says %s", got)
	}
	job := filepath.Join(dir, "page.nomad.hcl")
	if err := os.WriteFile(job, fmt.Appendf(nil, `
job "page" {
  group "g" {
    network {
      mode = "bridge"
      port "http" { to = 80 }
    }
    service {
      name = "page"
      port = "http"
      check {
        type     = "http"
        path     = "/"
        interval = "1s"
        timeout  = "5s"
      }
    }
    task "t" {
      driver = "cradle"
      config {
        image   = "oci:%s"
        command = "sh"
        args    = ["-c", "mkdir /www; echo a page >/www/index.html; exec httpd -f -p 80 -h /www"]
      }
    }
  }
}`, image), 0o644); err != nil {
		t.Fatal(err)
	}
	nomad("job", "run", job) // returns when the service is healthy
	client, err := s.API()
	if err != nil {
		t.Fatal(err)
	}
	page := func() {
		t.Helper()
		var text string
		err := agents.Retry(deadline(t), "the page", func() error {
			a, err := running(client)
			if err != nil {
				return err
			}
			port := a.AllocatedResources.Shared.Ports[0]
			text, err = command("", "curl", "-sSf", "--max-time", "5", fmt.Sprintf("http://%s:%d/", port.HostIP, port.Value))
			return err
		})
		if err != nil || text != "a page\n" {
			t.Fatalf("the page is %q, %v", text, err)
		}
	}
	page()
	err = agents.Retry(deadline(t), "statistics", func() error {
		a, err := running(client)
		if err != nil {
			return err
		}
		if text := nomad("alloc", "status", "-stats", a.ID); !strings.Contains(text, "Memory Stats") || !strings.Contains(text, "CPU Stats") {
			return errors.New(text)
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}

	filer := func() {
		t.Helper()
		text, err := command("", "bash", "-ec", env+"exec cradle-filer status")
		if want := fmt.Sprintf(":%d", s.nfsPort()); err != nil || !strings.Contains(text, want) {
			t.Errorf("the filer says %q, %v, and should serve at %s", text, err, want)
		}
	}
	filer()

	// Again: nothing happens. With another configuration: the client starts again, pods go on.
	before := s.record.Processes
	if s = up(t, dir); !maps.Equal(s.record.Processes, before) {
		t.Errorf("a second up makes %v of %v", s.record.Processes, before)
	}
	pod := pods(t, s)
	if len(pod) != 2 { // the page, and docker's
		t.Fatalf("there are %d machines", len(pod))
	}
	// What Nomad keeps of an allocation's network it writes to disk when it ends, or after a minute (nomadtest.KillClient).
	if err := s.record.Processes[agents.Client].end(endLimit); err != nil {
		t.Fatal(err)
	}
	s = up(t, dir)
	page()
	if now := pods(t, s); !slices.Equal(now, pod) {
		t.Errorf("the client's restart makes the machines %v of %v", now, pod)
	}

	// All agents are killed: down ends the pod all the same.
	for _, p := range s.record.Processes {
		if err := unix.Kill(p.PID, unix.SIGKILL); err != nil {
			t.Fatal(err)
		}
	}
	down(t, s)

	if got := docker("context", "ls", "-q"); got != "default" {
		t.Errorf("while the stack is down docker has the contexts %s", got)
	}

	// What was running runs again.
	s = up(t, dir)
	page()
	filer()
	// But docker's container has no policy to do so.
	err = agents.Retry(deadline(t), "the container", func() error {
		if got := docker("--context", dockerContext, "inspect", "-f", "{{.State.Status}}", "kept"); got != "exited" {
			return fmt.Errorf("it is %s", got)
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
	if got := docker("--context", dockerContext, "cp", "kept:/data/file", "-"); !strings.Contains(got, "here") {
		t.Errorf("the volume has %q", got)
	}
	down(t, s)
	if err := Down(t.Context(), dir); err != nil { // again
		t.Error(err)
	}
}

func deadline(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), readyLimit)
	t.Cleanup(cancel)
	return ctx
}

func running(client *api.Client) (*api.Allocation, error) {
	all, _, err := client.Jobs().Allocations("page", false, nil)
	if err != nil {
		return nil, err
	}
	for _, a := range all {
		if a.ClientStatus == api.AllocClientStatusRunning && a.DesiredStatus == api.AllocDesiredStatusRun {
			full, _, err := client.Allocations().Info(a.ID, nil)
			return full, err
		}
	}
	return nil, fmt.Errorf("of %d allocations none is running", len(all))
}

func up(t *testing.T, dir string) *Stack {
	t.Helper()
	s, err := Up(t.Context(), dir)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// pods are the stack's machines.
func pods(t *testing.T, s *Stack) (pids []string) {
	t.Helper()
	ids, err := s.allocs()
	if err != nil {
		t.Fatal(err)
	}
	programs, err := filepath.Glob("/proc/[0-9]*/exe")
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range programs {
		exe, err := os.Readlink(p)
		if err != nil || !strings.HasPrefix(filepath.Base(exe), "qemu-system") {
			continue
		}
		c, err := os.ReadFile(filepath.Join(filepath.Dir(p), "cgroup"))
		if err != nil {
			continue
		}
		for _, mark := range append(ids, filepath.Base(s.cgroup())) { // where version 1 is, or not
			if strings.Contains(string(c), mark) {
				pids = append(pids, filepath.Base(filepath.Dir(p)))
				break
			}
		}
	}
	return pids
}

// down ends the stack and looks for what is left.
func down(t *testing.T, s *Stack) {
	t.Helper()
	bridge, subnet, cgroup := s.record.Bridge, strings.TrimSuffix(s.record.Subnet, "0/20"), s.cgroup()
	if err := Down(t.Context(), s.dir); err != nil {
		t.Fatal(err)
	}
	var left []string
	look := func(what, text string, marks ...string) {
		for line := range strings.Lines(text) {
			for _, m := range marks {
				if strings.Contains(line, m) {
					left = append(left, what+" "+line)
				}
			}
		}
	}
	lines, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range lines {
		if text, err := os.ReadFile(l); err == nil && l != fmt.Sprintf("/proc/%d/cmdline", os.Getpid()) {
			look("process", strings.ReplaceAll(string(text), "\x00", " "), s.dir)
		}
	}
	for what, read := range map[string][]string{
		"mount": {"cat", "/proc/self/mountinfo"}, "rule": {"iptables-save"}, "interface": {"ip", "-o", "link"}, "route": {"ip", "route"},
		"socket": {"ss", "-Hlntup"}, "loop device": {"losetup", "-a"},
	} {
		text, err := command("", read[0], read[1:]...)
		if err != nil {
			t.Fatal(err)
		}
		look(what, text, s.dir, bridge+" ", bridge+":", subnet, fmt.Sprintf("127.0.0.1:%d ", agents.DefaultPorts(s.record.Offset).HTTP))
	}
	if _, err := os.Stat(cgroup); !errors.Is(err, fs.ErrNotExist) {
		left = append(left, "cgroup "+cgroup)
	}
	ids, err := s.allocs()
	if err != nil {
		t.Fatal(err)
	}
	if left = append(left, ids...); len(left) > 0 {
		t.Errorf("after down there is\n%s", strings.Join(left, "\n"))
	}
}

// A context of the same name that leads elsewhere is left alone, and the user is told; one's own is found again, and removed where it was made.
func TestDockerContext(t *testing.T) {
	elsewhere, own := t.TempDir(), t.TempDir()
	t.Setenv("DOCKER_CONFIG", elsewhere)
	if _, err := docker(t.Context(), elsewhere, "context", "create", dockerContext, "--docker", "host=tcp://cloud.example.org:2376"); err != nil {
		t.Fatal(err)
	}
	s := &Stack{dir: t.TempDir()}
	if err := s.addContext(t.Context()); err == nil || !strings.Contains(err.Error(), "leads to tcp://cloud.example.org:2376: docker context rm cradle") {
		t.Errorf("a context that leads elsewhere: %v", err)
	}
	if s.record.Docker != "" {
		t.Errorf("it is noted as the stack's own, in %s", s.record.Docker)
	}
	t.Setenv("DOCKER_CONFIG", own)
	for range 2 {
		if err := s.addContext(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	t.Setenv("DOCKER_CONFIG", elsewhere)
	if err := s.removeContext(t.Context()); err != nil {
		t.Fatal(err)
	}
	for dir, want := range map[string]string{elsewhere: "cradle\ndefault", own: "default"} {
		if got, err := docker(t.Context(), dir, "context", "ls", "-q"); err != nil || strings.TrimSpace(got) != want {
			t.Errorf("there are %q, %v; want %q", got, err, want)
		}
	}
}
