//go:build vm

package main

import (
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cradlestack/cradlestack/driver-cradle/pod"
	"github.com/cradlestack/cradlestack/driver-cradle/vmm"
	"github.com/cradlestack/cradlestack/internal/locked"
)

// attended waits until some process attends to the pod.
func attended(t testing.TB, dir string) {
	t.Helper()
	d, err := pod.Open(dir, nil)
	if err != nil {
		t.Fatal(err)
	}
	within(t, "the pod is attended to", func() bool {
		pid, err := d.Attendant()
		return err == nil && pid != 0
	})
}

// up runs a pod in the foreground until it has printed a line.
func (w *world) up(t testing.TB, dir, line string) *exec.Cmd {
	t.Helper()
	out := new(locked.Buffer)
	cmd := w.start(t, out, "run", dir)
	within(t, "the pod prints "+line, func() bool { return strings.Contains(out.String(), line) })
	return cmd
}

// A pod that is stopped or killed while it starts, at whatever moment, has ended when that returns, and what is told is the end of that run and
// not of the one before.
func TestVMEndedWhileStarting(t *testing.T) { endedWhileStarting(t, 5) }

func endedWhileStarting(t *testing.T, rounds int) {
	w := theWorld(t)
	dir := w.summon(t, "--", "sh", "-c", "trap 'exit 3' TERM; while :; do sleep 0.05; done")
	begin := time.Now()
	w.must(t, "run", "-d", dir)
	whole := time.Since(begin)
	w.must(t, "stop", dir)
	for i := range rounds {
		run, end := []string{"run", dir}, []string{"stop", dir}
		if i%2 == 0 {
			run = []string{"run", "-d", dir}
		}
		if i%4 < 2 {
			end[0] = "kill"
		}
		moment := time.Duration(0)
		if i >= 4 {
			moment = time.Duration(rand.Int64N(int64(whole)))
		}
		begin := time.Now()
		cmd := w.start(t, io.Discard, run...)
		attended(t, dir)
		time.Sleep(moment)
		w.must(t, end...)
		s := w.status(t, dir)
		exit(t, cmd)
		// Whatever comes after it would be a start that was not stopped.
		if after := w.status(t, dir); s.State != "exited" || after.State != "exited" || s.ExitCode == nil || s.StartedAt.Before(begin) || s.EndedAt.Before(begin) {
			t.Errorf("%v, and %s %v later: status %+v, then %s", run, end[0], moment, s, after.State)
		}
		nothingRemains(t, dir)
	}
	w.must(t, "run", "-d", dir)
	if s := w.status(t, dir); s.State != "running" {
		t.Errorf("status of the run after %d that were ended: %+v", rounds, s)
	}
}

// A foreground pod's machine goes with its launcher. Whatever command comes next, even before the machine is gone, finds a pod that has ended.
func TestVMLauncherKilled(t *testing.T) {
	w := theWorld(t)
	dir := w.summon(t, "--", "sh", "-c", "echo up; exec sleep 1000")
	for _, c := range []struct {
		args []string
		says string // where it fails
	}{
		{[]string{"status", dir}, "no error"},
		{[]string{"logs", dir}, "the machine ended before the logs of the last run were saved"},
		{[]string{"stop", dir}, "no error"},
		{[]string{"kill", dir}, "pod is not running"},
		{[]string{"exec", dir, "true"}, "pod is not running"},
		{[]string{"rm", dir}, "no error"},
	} {
		cmd := w.up(t, dir, "up")
		cmd.Process.Kill()
		cmd.Wait()
		stdout, stderr, code := w.run(t, c.args...)
		killed := c.args[0] == "kill" && code == 0 // it was in time
		if code != 0 && !strings.Contains(stderr, c.says) || code == 0 && c.says != "no error" && !killed {
			t.Errorf("%s after its launcher was killed: exit code %d, %s%s", c.args[0], code, stdout, stderr)
		}
		if c.args[0] != "rm" {
			s := w.status(t, dir)
			if s.State != "exited" || s.ExitCode == nil || !killed && (*s.ExitCode != 255 || !strings.Contains(s.Error, "no process attended to the pod")) {
				t.Errorf("status after %s: %+v", c.args[0], s)
			}
		}
		nothingRemains(t, dir)
	}
	if _, err := os.Stat(dir); err == nil {
		t.Error("rm leaves the directory")
	}
}

// A detached pod whose monitor is killed before its containers run is nobody's: whatever command comes next ends it, and run begins anew.
func TestVMMonitorKilledWhileStarting(t *testing.T) {
	w := theWorld(t)
	dir := filepath.Join(t.TempDir(), "pod")
	t.Cleanup(func() { w.run(t, "rm", "-f", dir) })
	img := filepath.Join(t.TempDir(), "bin.img")
	// Filling the volume is what its start takes its time for, and begins anew after one that was cut short.
	w.must(t, "summon", dir, "oci:"+w.images+"/debian", "-v", img+":/usr/bin:size=200M", "--", "sleep", "1000")
	d, err := pod.Open(dir, nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		args   []string
		code   int
		says   string
		status string
	}{
		{[]string{"status", dir}, 0, "", "exited"},
		{[]string{"stop", dir}, 0, "", "exited"},
		{[]string{"exec", dir, "true"}, 1, "pod is not running", "exited"},
		{[]string{"run", "-d", dir}, 0, "", "running"},
	} {
		cmd := w.start(t, io.Discard, "run", "-d", dir)
		within(t, "the machine is there", func() bool { _, err := vmm.Running(filepath.Join(dir, "run")); return err == nil })
		resume := pause(t, dir)
		pid, err := d.Attendant()
		if err != nil || pid <= 0 {
			t.Fatalf("attendant %d, %v", pid, err)
		}
		killAndWait(t, pid)
		cmd.Wait()
		resume()
		if _, err := os.Stat(filepath.Join(dir, pod.SocketFile)); err == nil {
			t.Fatal("the start was complete before its monitor was killed")
		}
		if _, err := vmm.Running(filepath.Join(dir, "run")); err != nil {
			t.Fatalf("the machine after its monitor was killed: %v", err)
		}
		stdout, stderr, code := w.run(t, c.args...)
		if code != c.code || !strings.Contains(stderr, c.says) {
			t.Errorf("%s: exit code %d, %s%s", c.args[0], code, stdout, stderr)
		}
		s := w.status(t, dir)
		if s.State != c.status || s.State == "exited" && (s.ExitCode == nil || *s.ExitCode != 255 || !strings.Contains(s.Error, "before the start was complete")) {
			t.Errorf("status after %s: %+v", c.args[0], s)
		}
		if s.State == "running" {
			w.must(t, "exec", dir, "perl", "-e", "0") // the volume is whole
			w.must(t, "kill", dir)
		}
		nothingRemains(t, dir)
	}
}

// A QEMU that hangs, attended to or not: commands tell the way out in bounded time, and stop and kill are it.
func TestVMHungMachine(t *testing.T) {
	w := theWorld(t)
	var waiting sync.WaitGroup
	defer waiting.Wait()
	for _, c := range []struct {
		name                   string
		foreground, unattended bool
		tell, end              []string // fails with the way out; ends it
		says                   string
	}{
		{name: "foreground, stop", foreground: true, end: []string{"stop", "-t", "1"}, says: "killing its machine"},
		{name: "attended, kill", tell: []string{"status"}, end: []string{"kill"}},
		{name: "attended, stop", end: []string{"stop", "-t", "1"}, says: "killing its machine"},
		{name: "unattended, kill", unattended: true, end: []string{"kill"}},
		{name: "unattended, stop", unattended: true, end: []string{"stop", "-t", "1"}, says: "killing its machine"},
	} {
		dir := w.summon(t, "--", "sh", "-c", "echo up; exec sleep 1000")
		var cmd *exec.Cmd
		if c.foreground {
			cmd = w.up(t, dir, "up")
		} else {
			w.must(t, "run", "-d", dir)
		}
		s := w.status(t, dir)
		if c.unattended {
			killAndWait(t, s.Attendant)
		}
		if err := unix.Kill(s.Machine.PID, unix.SIGSTOP); err != nil {
			t.Fatal(err)
		}
		waiting.Go(func() {
			if c.tell != nil {
				if stdout, stderr, code := w.run(t, append(c.tell, dir)...); code == 0 || !strings.Contains(stderr, "kcradle kill") {
					t.Errorf("%s: %v: exit code %d, %s%s", c.name, c.tell, code, stdout, stderr)
				}
			}
			if stdout, stderr, code := w.run(t, append(c.end, dir)...); code != 0 || !strings.Contains(stderr, c.says) {
				t.Errorf("%s: exit code %d, %s%s", c.name, code, stdout, stderr)
			}
			if s := w.status(t, dir); s.State != "exited" || s.ExitCode == nil || *s.ExitCode != 137 {
				t.Errorf("%s: status %+v", c.name, s)
			}
			if c.foreground {
				if code := exit(t, cmd); code != 137 {
					t.Errorf("%s: exit code %d", c.name, code)
				}
			}
			nothingRemains(t, dir)
		})
	}
}

// Whoever looks at a pod that is just ending sees it run or sees its end, with all of its output, and no error.
func TestVMEndIsSeen(t *testing.T) {
	w := theWorld(t)
	for range 3 {
		dir := w.summon(t, "--", "sh", "-c", "echo first; sleep 0.$(($$ % 10)); echo last; exit 4")
		w.must(t, "run", "-d", dir)
		var looking sync.WaitGroup
		looking.Go(func() {
			for {
				stdout, stderr, code := w.run(t, "logs", dir)
				if code != 0 || stderr != "" {
					t.Errorf("logs: exit code %d, %s%s", code, stdout, stderr)
					return
				}
				if s := w.status(t, dir); s.State == "exited" {
					break
				}
			}
			if out := w.must(t, "logs", dir); out != "first\nlast\n" {
				t.Errorf("logs %q", out)
			}
		})
		looking.Go(func() {
			for {
				stdout, stderr, code := w.run(t, "status", dir)
				if code != 0 || !strings.Contains(stdout, ": running for") && !strings.Contains(stdout, "with exit code 4") {
					t.Errorf("status: exit code %d, %s%s", code, stdout, stderr)
					return
				}
				if strings.Contains(stdout, "with exit code 4") {
					return
				}
			}
		})
		looking.Go(func() {
			for {
				stdout, stderr, code := w.run(t, "exec", dir, "echo", "in")
				switch {
				case code == 0 && stdout == "in\n", code == 137: // killed with the container
				case strings.Contains(stdout+stderr, "not running"):
					return
				default:
					t.Errorf("exec: exit code %d, %s%s", code, stdout, stderr)
					return
				}
			}
		})
		looking.Wait()
		nothingRemains(t, dir)
	}
}
