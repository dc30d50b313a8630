//go:build vm && soak && zfslab

package main

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/hashicorp/nomad/api"

	"github.com/cradlestack/cradlestack/internal/nomadtest"
	"github.com/cradlestack/cradlestack/test/programs"
)

// TestZFSNomadFiler: two tasks that are no pods have one volume of their host's filer, which the host's kernel mounts. It grows, gets a snapshot and is rolled back; plugin, filer and
// Nomad's client are killed. It runs in a machine with ZFS, whose kernel has an NFS client.
func TestZFSNomadFiler(t *testing.T) {
	s := &stack{t: t, id: "cradle", zfs: true}
	s.Cluster = nomadtest.Start(t, nomadtest.Options{
		Server: `heartbeat_grace = "2m"`, Drivers: []string{"raw_exec", "exec"}, Plugins: s.drivers(),
		Client: "chroot_env {\n  \"/bin/busybox\" = \"/bin/busybox\"\n}", Keep: []string{"nomad/client/csi", "/run/cradle"},
	})
	s.node = s.Clients()[0]
	f := &fileServer{stack: s}
	t.Cleanup(f.kill)
	t.Cleanup(s.stopUsers)
	t.Cleanup(func() { // without it nothing can be unmounted
		if f.cmd == nil {
			f.serve()
		}
	})
	f.serve()
	job := strings.Replace(s.example("cradle-csi.nomad.hcl"), `"--backend", "zfs", "--pool", "`+s.dataset()+`"`, `"--backend", "filer"`, 1)
	s.Run(t, job)
	s.healthy()

	s.volume("shared", `  attach = "direct"`, "")
	shared := func(job, script string) string {
		return use{job: job, volume: "shared", mode: "multi-node-multi-writer", script: script}.hcl()
	}
	// Tasks of exec are nobody, with capabilities that make them root for a local file system; the filer goes by who they are, and the volume is root's.
	owner := s.Run(t, shared("owner", "while test $($b stat -c %u /v) != 65534; do $b sleep 1; done; echo x >/v/x; $b rm /v/x"))
	places := s.mounts("/per-alloc/" + s.UntilRunning(t, owner).ID)
	if len(places) != 1 {
		t.Fatalf("mounts of the owner's task: %v", places)
	}
	if err := os.Chown(s.node.Path(strings.Fields(places[0])[4]), 65534, 65534); err != nil {
		t.Fatal(err)
	}
	if a := s.UntilEnded(t, owner); a.ClientStatus != "complete" {
		t.Fatalf("the owner's task: %s\n%s", a.ClientStatus, s.Describe())
	}
	said := regexp.MustCompile(`(?m)^\d+$`)
	counts := func(job string) (goesOn func()) {
		t.Helper()
		s.Run(t, strings.Replace(shared(job, "n=0; while :; do echo $n >>/v/"+job+"; $b sync /v/"+job+"; echo $n; n=$((n+1)); $b sleep 0.2; done"), `type = "batch"`, `type = "service"`, 1))
		a := s.UntilRunning(t, job)
		return func() {
			t.Helper()
			s.UntilAnswers(t, a.ID)
			was := len(said.FindAllString(s.Logs(t, a.ID, "t", "stdout"), -1))
			s.UntilLogs(t, a.ID, "t", "stdout", func(all string) bool { return len(said.FindAllString(all, -1)) > was+3 })
		}
	}
	one, two := counts("one"), counts("two")
	goOn := func() { t.Helper(); one(); two() }
	goOn()
	if out := s.ended(shared("look", "$b head -n 1 /v/one; $b head -n 1 /v/two; $b mount | $b grep ' /v '")); !strings.HasPrefix(out, "0\n0\n") || !strings.Contains(out, "type nfs ") || !strings.Contains(out, "hard") {
		t.Errorf("a third one sees %s", out)
	}
	s.ended(shared("first", "echo first >/v/kept"))
	s.volume("shared", `  attach = "direct"`, "", "64MiB", "96MiB")
	if out := s.ended(shared("size", "$b df -P -m /v | $b awk 'END {print $2}'")); func() bool { n, err := strconv.Atoi(out); return err != nil || n < 90 || n > 100 }() {
		t.Errorf("grown it has %s MiB", out)
	}
	s.CLI(t, "volume", "snapshot", "create", "shared", "s")
	s.ended(shared("second", "echo second >/v/kept"))
	f.command("rollback", "shared", "s", "kept")
	if out := s.ended(shared("again", "$b cat /v/kept /v/.snapshots/s/kept")); out != "first\nfirst" {
		t.Errorf("rolled back it has %q", out)
	}
	goOn()

	f.kill()
	f.serve()
	goOn()
	if err := errors.Join(s.kill("cradle-csi"), s.node.KillClient(), s.node.StartAgents()); err != nil {
		t.Fatal(err)
	}
	goOn()
	s.healthy()
	if _, stderr, code := s.TryCLI(t, "", "volume", "delete", "shared"); code == 0 || !strings.Contains(stderr, "in use") {
		t.Errorf("delete a volume in use: exit code %d, %s", code, stderr)
	}
	// A task is stopped while the filer is away, and ends once it is back: the kernel lets nobody be killed who waits in fsync(2).
	f.kill()
	s.CLI(t, "job", "stop", "-detach", "one")
	s.eventually("the task is told to end", func() bool {
		all, _, err := s.API.Jobs().Allocations("one", true, nil)
		return err == nil && slices.ContainsFunc(all, func(a *api.AllocationListStub) bool {
			return a.TaskStates["t"] != nil && slices.ContainsFunc(a.TaskStates["t"].Events, func(e *api.TaskEvent) bool { return e.Type == api.TaskKilling })
		})
	})
	f.serve()
	s.Stop(t, "one")
	two()
	s.Stop(t, "two")
	s.released("shared")
	s.CLI(t, "volume", "snapshot", "delete", "cradle", "shared@s")
	s.eventually("the volume is deleted", func() bool {
		_, _, code := s.TryCLI(t, "", "volume", "delete", "shared")
		return code == 0
	})
	if table, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(s.node.PID()), "mounts")); err != nil || bytes.Contains(table, []byte(" nfs ")) {
		t.Errorf("left mounted: %s, %v", table, err)
	}
	if left := f.command("publications"); strings.Contains(left, "shared") {
		t.Errorf("left published: %s", left)
	}
}

// A fileServer is cradle-filer on the node.
type fileServer struct {
	*stack
	cmd *exec.Cmd
	log bytes.Buffer
}

func (f *fileServer) program() string {
	f.t.Helper()
	program, err := programs.Path("cradle-filer")
	if err != nil {
		f.t.Fatal(err)
	}
	return program
}

func (f *fileServer) serve() {
	f.t.Helper()
	f.cmd = f.node.Command(context.WithoutCancel(f.t.Context()), f.program(), "serve", "--backend", "zfs", "--pool", f.dataset(), "--state", filepath.Join(f.Dir(), "filer"), "--listen", f.node.IP.String()+":2049")
	f.cmd.Stdout, f.cmd.Stderr = &f.log, &f.log
	if err := f.node.Launch(f.cmd); err != nil {
		f.t.Fatal(err)
	}
	f.eventually("the filer serves", func() bool {
		_, err := f.node.Output(f.t.Context(), f.program(), "status")
		return err == nil
	})
}

func (f *fileServer) kill() {
	f.t.Helper()
	if f.cmd == nil {
		return
	}
	if err := f.cmd.Process.Kill(); err != nil {
		f.t.Fatal(err)
	}
	f.cmd.Wait()
	f.cmd = nil
}

func (f *fileServer) command(args ...string) string {
	f.t.Helper()
	out, err := f.node.Output(f.t.Context(), f.program(), args...)
	if err != nil {
		f.t.Fatalf("%v\n%s", err, &f.log)
	}
	return out
}
