//go:build vm

package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cradlestack/cradlestack/driver-cradle/vmm"
)

// start executes kcradle and does not wait for it.
func (w *world) start(t testing.TB, stdout io.Writer, args ...string) *exec.Cmd {
	t.Helper()
	cmd := exec.Command(w.kcradle, args...)
	cmd.Env = w.env()
	cmd.Stdout, cmd.Stderr = stdout, stdout
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.WaitDelay = 10 * time.Second
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	return cmd
}

// patience is how long a test waits for what has to come, on a machine that may be busy with much else.
const patience = 3 * time.Minute

// within waits until ok.
func within(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); !ok(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not within %v: %s", patience, what)
		}
	}
}

// exit waits for a kcradle that was started and returns its exit code.
func exit(t testing.TB, cmd *exec.Cmd) int {
	t.Helper()
	timer := time.AfterFunc(patience, func() { cmd.Process.Kill() })
	err := cmd.Wait()
	if !timer.Stop() {
		t.Fatalf("%v does not end", cmd.Args)
	}
	if err != nil && !errors.As(err, new(*exec.ExitError)) {
		t.Fatal(err)
	}
	return cmd.ProcessState.ExitCode()
}

func (w *world) status(t testing.TB, dir string) (s podStatus) {
	t.Helper()
	if err := json.Unmarshal([]byte(w.must(t, "status", "-o", "json", dir)), &s); err != nil {
		t.Fatal(err)
	}
	return s
}

// remains lists what a pod has left outside of its directory, and running: processes that have a file of it open, or were told its name.
func remains(t testing.TB, dir string) []string {
	t.Helper()
	var found []string
	processes, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range processes {
		if p == fmt.Sprintf("/proc/%d", os.Getpid()) {
			continue
		}
		line, _ := os.ReadFile(p + "/cmdline")
		if bytes.Contains(line, []byte(dir)) {
			found = append(found, p+": "+string(bytes.ReplaceAll(line, []byte{0}, []byte{' '})))
			continue
		}
		files, _ := os.ReadDir(p + "/fd")
		for _, f := range files {
			if to, err := os.Readlink(p + "/fd/" + f.Name()); err == nil && strings.HasPrefix(to, dir) {
				found = append(found, p+" has "+to)
			}
		}
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(mounts)) {
		if strings.Contains(line, dir) {
			found = append(found, "mount "+line)
		}
	}
	return found
}

// nothingRemains gives what was killed a moment to end.
func nothingRemains(t testing.TB, dir string) {
	t.Helper()
	var found []string
	for deadline := time.Now().Add(patience); time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
		if found = remains(t, dir); len(found) == 0 {
			return
		}
	}
	t.Errorf("left of %s:\n%s", dir, strings.Join(found, "\n"))
}

func entries(t testing.TB, dirs ...string) (all []string) {
	t.Helper()
	for _, dir := range dirs {
		list, err := os.ReadDir(dir)
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range list {
			all = append(all, filepath.Join(dir, e.Name()))
		}
	}
	return all
}

// A kcradle in the foreground that is killed at any moment leaves no machine, no tap, no mount, no file outside of its directory, and the next one works.
func TestVMKilledAtAnyMoment(t *testing.T) { killedAtAnyMoment(t, 2) }

func killedAtAnyMoment(t *testing.T, rounds int) {
	w := theWorld(t)
	ns := newNamespace(t)
	settings := ns.settings(t)
	dir := w.summon(t, "--netns", ns.path, "-v", filepath.Join(t.TempDir(), "v.img")+":/v:size=32M", "-v", t.TempDir()+":/d", "--", "sh", "-c", "echo up; sync; sleep 0.2")
	begin := time.Now()
	if out := w.must(t, "run", dir); out != "up\n" {
		t.Fatalf("output %q", out)
	}
	whole := time.Since(begin)
	places := []string{w.tmp, w.root, filepath.Join(w.root, "templates"), filepath.Join(w.root, "tmp")}
	before := entries(t, places...)
	for range rounds {
		moment := time.Duration(rand.Int64N(int64(whole)))
		cmd := w.start(t, io.Discard, "run", dir)
		time.Sleep(moment)
		cmd.Process.Kill()
		cmd.Wait()
		nothingRemains(t, dir)
		if t.Failed() {
			t.Fatalf("kcradle was killed %v after its start", moment)
		}
		within(t, "the tap goes", func() bool { return !strings.Contains(ns.links(t), "cradle0") })
	}
	if after := entries(t, places...); !slices.Equal(before, after) {
		t.Errorf("files before %v, after %v", before, after)
	}
	if out := w.must(t, "run", dir); out != "up\n" {
		t.Errorf("output of a run after %d killed ones: %q", rounds, out)
	}
	if after := ns.settings(t); after != settings {
		t.Errorf("the namespace was\n%s, and is\n%s", settings, after)
	}
}

// A run --rm that a signal ends leaves nothing; what a killed one has left goes with the next command that opens the cache.
func TestVMRunRemovedAtAnyMoment(t *testing.T) {
	w := theWorld(t)
	image := "oci:" + w.images + "/busybox"
	begin := time.Now()
	w.must(t, "run", "--rm", image, "true")
	whole := time.Since(begin)
	temp := filepath.Join(w.root, "tmp")
	for _, s := range []unix.Signal{unix.SIGKILL, unix.SIGTERM, unix.SIGINT, unix.SIGHUP, unix.SIGQUIT} {
		moment := time.Duration(rand.Int64N(int64(whole)))
		cmd := w.start(t, io.Discard, "run", "--rm", image, "sleep", "1")
		within(t, "kcradle has begun", func() bool { return len(entries(t, temp)) > 0 })
		time.Sleep(moment)
		if err := cmd.Process.Signal(s); err != nil {
			t.Fatal(err)
		}
		cmd.Wait()
		nothingRemains(t, temp)
		if s == unix.SIGKILL {
			w.must(t, "images", "ls")
		}
		if left := entries(t, temp, w.tmp); len(left) > 0 {
			t.Errorf("%v %v after its start left %v", s, moment, left)
		}
	}
}

// Likewise summon: what a killed one has left is replaced by the next.
func TestVMSummonKilledAtAnyMoment(t *testing.T) { summonKilledAtAnyMoment(t, 4) }

func summonKilledAtAnyMoment(t *testing.T, rounds int) {
	w := theWorld(t)
	base := t.TempDir()
	dir := filepath.Join(base, "pod")
	args := []string{"summon", dir, "oci:" + w.images + "/busybox", "--root", filepath.Join(base, "cache"), "--", "true"}
	begin := time.Now()
	w.must(t, args...)
	whole := time.Since(begin)
	w.must(t, "rm", dir)
	for range rounds {
		os.RemoveAll(filepath.Join(base, "cache"))
		cmd := w.start(t, io.Discard, args...)
		time.Sleep(time.Duration(rand.Int64N(int64(whole))))
		cmd.Process.Kill()
		cmd.Wait()
		nothingRemains(t, base)
		if _, err := os.Stat(filepath.Join(dir, "launch.json")); err == nil {
			w.must(t, "rm", dir)
		}
	}
	w.must(t, args...)
	w.must(t, "--root", filepath.Join(base, "cache"), "verify", dir)
	if left := entries(t, filepath.Join(base, "cache", "tmp")); len(left) > 0 {
		t.Errorf("left in the cache: %v", left)
	}
}

// A detached pod goes on without its monitor; the next command takes it up and nothing is lost.
func TestVMTakeUp(t *testing.T) {
	w := theWorld(t)
	dir := w.summon(t, "--stop-timeout", "60", "--", "sh", "-c", "trap 'exit 9' TERM; i=0; while :; do echo $i; i=$((i+1)); sleep 0.1; done")
	w.must(t, "run", "-d", dir)
	machine := w.status(t, dir).Machine.PID
	for range 3 {
		s := w.status(t, dir)
		if s.State != "running" || s.Attendant == 0 || s.Machine.PID != machine {
			t.Fatalf("status %+v", s)
		}
		killAndWait(t, s.Attendant)
	}
	within(t, "ten lines", func() bool { return strings.Count(w.must(t, "logs", dir), "\n") >= 10 })
	w.must(t, "exec", dir, "true")
	w.must(t, "stop", dir)
	if s := w.status(t, dir); s.ExitCode == nil || *s.ExitCode != 9 {
		t.Errorf("status %+v", s)
	}
	lines := strings.Split(strings.TrimSpace(w.must(t, "logs", dir)), "\n")
	for i, line := range lines {
		if line != strconv.Itoa(i) {
			t.Fatalf("line %d of the log is %q", i, line)
		}
	}
	if len(lines) < 10 {
		t.Errorf("%d lines", len(lines))
	}
	nothingRemains(t, dir)
}

// killAndWait kills a process that need not be a child, and waits for all of its threads to end.
func killAndWait(t testing.TB, pid int) {
	t.Helper()
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if err := unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0); err != nil {
		t.Fatal(err)
	}
	if n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 60_000); n != 1 {
		t.Fatalf("process %d does not end: %v", pid, err)
	}
}

// The end of a pod that nobody attends to is kept until somebody asks.
func TestVMEndsUnattended(t *testing.T) {
	w := theWorld(t)
	for _, machineKilled := range []bool{false, true} {
		shared := t.TempDir()
		dir := w.summon(t, "-v", shared+":/d", "--", "sh", "-c", "echo begun; until test -e /d/go; do sleep 0.1; done; echo ended; touch /d/ended; exit 4")
		letGo := func() {
			if err := os.WriteFile(filepath.Join(shared, "go"), nil, 0o644); err != nil {
				t.Fatal(err)
			}
		}
		w.must(t, "run", "-d", dir)
		s := w.status(t, dir)
		killAndWait(t, s.Attendant)
		if machineKilled {
			killAndWait(t, s.Machine.PID)
			s = w.status(t, dir)
			if s.State != "exited" || s.ExitCode == nil || *s.ExitCode != 255 || s.Error == "" {
				t.Errorf("status after the machine was killed: %+v", s)
			}
			letGo()
			if out, _, code := w.run(t, "run", dir); code != 4 || out != "begun\nended\n" {
				t.Errorf("the next run: exit code %d, %q", code, out)
			}
			continue
		}
		letGo()
		within(t, "the container is about to end", func() bool { _, err := os.Stat(filepath.Join(shared, "ended")); return err == nil })
		time.Sleep(time.Second) // it ends, and nobody is there
		within(t, "it has ended", func() bool { s = w.status(t, dir); return s.State != "running" })
		if s.State != "exited" || s.ExitCode == nil || *s.ExitCode != 4 {
			t.Errorf("status %+v", s)
		}
		if out := w.must(t, "logs", dir); out != "begun\nended\n" {
			t.Errorf("logs %q", out)
		}
		nothingRemains(t, dir)
	}
}

// Every signal reaches the container; SIGTERM stops the pod.
func TestVMSignals(t *testing.T) {
	w := theWorld(t)
	dir := w.summon(t, "--stop-signal", "SIGQUIT", "--stop-timeout", "60", "--", "sh", "-c",
		"for s in HUP INT USR1 USR2; do trap \"echo $s\" $s; done; trap 'echo quit; exit 8' QUIT; echo ready; while :; do sleep 0.05; done")
	r, pipe, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	cmd := w.start(t, pipe, "run", dir)
	pipe.Close()
	lines := bufio.NewScanner(r)
	expect := func(want string) {
		t.Helper()
		r.SetReadDeadline(time.Now().Add(patience))
		if !lines.Scan() || lines.Text() != want {
			t.Fatalf("the container says %q (%v), want %q", lines.Text(), lines.Err(), want)
		}
	}
	expect("ready")
	for _, s := range []struct {
		signal syscall.Signal
		says   string
	}{{unix.SIGHUP, "HUP"}, {unix.SIGUSR1, "USR1"}, {unix.SIGINT, "INT"}, {unix.SIGUSR2, "USR2"}, {unix.SIGTERM, "quit"}} {
		cmd.Process.Signal(s.signal)
		expect(s.says)
	}
	if code := exit(t, cmd); code != 8 {
		t.Errorf("exit code %d", code)
	}
}

// Ctrl-C is passed on; again it stops the pod, which this one does not care about, once more it kills.
func TestVMInterruptThrice(t *testing.T) {
	w := theWorld(t)
	dir := w.summon(t, "--stop-timeout", "1000", "--", "sh", "-c", "trap '' INT TERM; echo ready; while :; do sleep 0.05; done")
	r, pipe, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	cmd := w.start(t, pipe, "run", dir)
	pipe.Close()
	if line, err := bufio.NewReader(r).ReadString('\n'); line != "ready\n" {
		t.Fatal(line, err)
	}
	begin, ended := time.Now(), make(chan struct{})
	go func() { cmd.Wait(); close(ended) }()
	times := 0
	within(t, "kcradle ends", func() bool {
		cmd.Process.Signal(unix.SIGINT) // of several that come before it looks, one counts
		times++
		select {
		case <-ended:
			return true
		case <-time.After(200 * time.Millisecond):
			return false
		}
	})
	if code := cmd.ProcessState.ExitCode(); code != 137 || times < 3 {
		t.Errorf("after %d times: exit code %d", times, code)
	}
	t.Logf("ended after %d times and %v", times, time.Since(begin))
	nothingRemains(t, dir)
}

// An interrupt while the machine starts ends everything.
func TestVMInterruptedStart(t *testing.T) {
	w := theWorld(t)
	dir := w.summon(t, "--start", "cold", "--", "sleep", "1000")
	for _, milliseconds := range []int{10, 50, 200, 500} {
		cmd := w.start(t, io.Discard, "run", dir)
		time.Sleep(time.Duration(milliseconds) * time.Millisecond)
		cmd.Process.Signal(unix.SIGTERM)
		if code := exit(t, cmd); code == 0 {
			t.Errorf("exit code %d", code)
		}
		nothingRemains(t, dir)
	}
}

// A machine that is killed, a kernel that panics: told, and cleared away.
func TestVMMachineFails(t *testing.T) {
	w := theWorld(t)
	running := func(args ...string) (string, *exec.Cmd, *bytes.Buffer, podStatus) {
		t.Helper()
		dir := w.summon(t, append(args, "--", "sleep", "1000")...)
		var out bytes.Buffer
		cmd := w.start(t, &out, "run", dir)
		within(t, "the pod runs", func() bool {
			_, _, code := w.run(t, "exec", dir, "true")
			return code == 0
		})
		return dir, cmd, &out, w.status(t, dir)
	}
	t.Run("QEMU killed", func(t *testing.T) {
		dir, cmd, out, s := running()
		unix.Kill(s.Machine.PID, unix.SIGKILL)
		if code := exit(t, cmd); code != 125 || !strings.Contains(out.String(), "the pod's machine ended: QEMU was killed") {
			t.Errorf("exit code %d, %s", code, out)
		}
		nothingRemains(t, dir)
	})
	t.Run("guest panic", func(t *testing.T) {
		dir, cmd, out, _ := running("--privileged")
		w.run(t, "exec", dir, "sh", "-c", "kill -SEGV 1; echo c >/proc/sysrq-trigger")
		if code := exit(t, cmd); code != 125 || !strings.Contains(out.String(), "panic") {
			t.Errorf("exit code %d, %s", code, out)
		}
		nothingRemains(t, dir)
	})
}

// A full disk is told, while pulling and while running, and the container sees it as any other.
func TestVMDiskFull(t *testing.T) {
	w := theWorld(t)
	small := t.TempDir()
	if err := unix.Mount("tmpfs", small, "tmpfs", 0, "size=1m"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(small, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	dir := filepath.Join(t.TempDir(), "pod")
	_, stderr, code := w.run(t, "--root", small, "summon", dir, "oci:"+w.images+"/debian")
	if code != 1 || !strings.Contains(stderr, "no space") {
		t.Errorf("summon with a full cache: exit code %d, %s", code, stderr)
	}
	if _, err := os.Stat(dir); err == nil {
		t.Error("a directory is left")
	}
	if left := entries(t, filepath.Join(small, "tmp"), filepath.Join(small, "layers", "sha256")); len(left) > 0 {
		t.Errorf("left in the cache: %v", left)
	}
	dir = w.summon(t, "--scratch-size", "32m", "--", "sh", "-c", "dd if=/dev/zero of=/big bs=1M; echo still here; exit 3")
	stdout, stderr, code := w.run(t, "run", dir)
	if code != 3 || stdout != "still here\n" || !strings.Contains(stderr, "No space left on device") {
		t.Errorf("exit code %d, %q, %s", code, stdout, stderr)
	}

	// The host's file system under a volume is full: status says which, and what to do.
	dir = w.summon(t, "-v", filepath.Join(small, "v.img")+":/v:size=64M", "--", "sleep", "1000")
	w.must(t, "run", "-d", dir)
	if stdout, _, code := w.run(t, "exec", dir, "dd", "if=/dev/urandom", "of=/v/big", "bs=1M", "count=32", "conv=fsync"); code == 0 {
		t.Errorf("32 MiB fit into 1: %s", stdout)
	}
	within(t, "the status tells it", func() bool {
		stdout = w.must(t, "status", dir)
		return strings.Contains(stdout, "v.img: No space left on device")
	})
	if !strings.Contains(stdout, "v.img: No space left on device: the host's file system "+small+" is full: free space there\n") {
		t.Errorf("the status is %s", stdout)
	}
	w.must(t, "rm", "-f", dir)
}

// What a container deletes is free for the host again.
func TestVMDeletedSpaceIsTheHosts(t *testing.T) {
	w := theWorld(t)
	dir := w.summon(t, "--", "sleep", "1000")
	w.must(t, "run", "-d", dir)
	takes := func() int64 {
		var st unix.Stat_t
		if err := unix.Stat(filepath.Join(dir, "scratch.img"), &st); err != nil {
			t.Fatal(err)
		}
		return st.Blocks * 512
	}
	w.must(t, "exec", dir, "sh", "-c", "dd if=/dev/urandom of=/big bs=1M count=32 && sync")
	if n := takes(); n < 32<<20 {
		t.Errorf("with a file of 32 MiB the scratch disk takes %d bytes", n)
	}
	w.must(t, "exec", dir, "sh", "-c", "rm /big && sync")
	within(t, "the scratch disk takes less than 4 MiB", func() bool { return takes() < 4<<20 })
	w.must(t, "kill", dir)
}

// Memory is limited exactly, and who goes beyond is killed.
func TestVMMemory(t *testing.T) {
	w := theWorld(t)
	dir := w.summon(t, "-m", "64m", "--", "sh", "-c", "cat /sys/fs/cgroup/memory.max 2>/dev/null; tail /dev/zero")
	_, _, code := w.run(t, "run", dir)
	if code != 137 {
		t.Errorf("exit code %d", code)
	}
	if s := w.status(t, dir); len(s.Containers) != 1 || !s.Containers[0].OOMKilled {
		t.Errorf("status %+v", s)
	}
}

// A pod with a terminal: sizes, line discipline, exit.
func TestVMTerminal(t *testing.T) {
	w := theWorld(t)
	dir := w.summon(t, "-it", "--", "sh")
	master, slave := openTerminal(t)
	setSize(t, master, 33, 101)
	cmd := exec.Command(w.kcradle, "run", dir)
	cmd.Env = w.env()
	cmd.Stdin, cmd.Stdout, cmd.Stderr = slave, slave, slave
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	before, err := unix.IoctlGetTermios(int(slave.Fd()), unix.TCGETS)
	if err != nil {
		t.Fatal(err)
	}
	var seen bytes.Buffer
	expect := func(want string) {
		t.Helper()
		buf := make([]byte, 4096)
		for !strings.Contains(seen.String(), want) {
			master.SetReadDeadline(time.Now().Add(patience))
			n, err := master.Read(buf)
			if err != nil {
				t.Fatalf("%q does not come (%v):\n%s", want, err, &seen)
			}
			seen.Write(buf[:n])
		}
		seen.Reset()
	}
	expect("# ")
	io.WriteString(master, "tty; stty size\r")
	expect("/dev/pts/0\r\n33 101\r\n")
	setSize(t, master, 20, 50)
	within(t, "the new size arrives", func() bool {
		io.WriteString(master, "stty size\r")
		buf := make([]byte, 4096)
		master.SetReadDeadline(time.Now().Add(patience))
		n, _ := master.Read(buf)
		seen.Write(buf[:n])
		return strings.Contains(seen.String(), "20 50\r\n")
	})
	seen.Reset()
	size := exec.Command(w.kcradle, "exec", "-t", dir, "stty", "size") // has it from the first moment on
	size.Env = w.env()
	size.Stdin = slave
	if out, err := size.Output(); err != nil || string(out) != "20 50\r\n" {
		t.Errorf("a command's terminal is %q, %v", out, err)
	}
	io.WriteString(master, "sleep 1000\r")
	within(t, "sleep runs", func() bool {
		_, _, code := w.run(t, "exec", dir, "pidof", "sleep")
		return code == 0
	})
	io.WriteString(master, "\x03") // Ctrl-C is the container's
	io.WriteString(master, "echo got $?\r")
	expect("got 130\r\n")
	io.WriteString(master, "exit 7\r")
	if code := exit(t, cmd); code != 7 {
		t.Errorf("exit code %d", code)
	}
	after, err := unix.IoctlGetTermios(int(slave.Fd()), unix.TCGETS)
	if err != nil {
		t.Fatal(err)
	}
	if after.Lflag != before.Lflag|unix.ICANON|unix.ECHO {
		t.Errorf("the terminal is not as it was: %x, %x", after.Lflag, before.Lflag)
	}
}

// What a start copies into a volume is shown on a terminal, of a detached pod as well, and so is what its monitor has to say.
func TestVMFillingIsShown(t *testing.T) {
	w := theWorld(t)
	for _, how := range [][]string{{"run"}, {"run", "-d"}} {
		dir := filepath.Join(t.TempDir(), "pod")
		t.Cleanup(func() { w.run(t, "rm", "-f", dir) })
		w.must(t, "summon", dir, "oci:"+w.images+"/debian", "--cpus", "64", "-v", filepath.Join(t.TempDir(), "bin.img")+":/usr/bin:size=200M", "--", "true")
		master, slave := openTerminal(t)
		cmd := exec.Command(w.kcradle, append(how, dir)...)
		cmd.Env = w.env()
		cmd.Stdin, cmd.Stdout, cmd.Stderr = slave, slave, slave
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		slave.Close()
		var seen bytes.Buffer
		io.Copy(&seen, master) // until nobody has the terminal any more
		warned := strings.Contains(seen.String(), "fewer processors")
		if code := exit(t, cmd); code != 0 || !strings.Contains(seen.String(), "copying the image's content into a volume") || warned != (runtime.NumCPU() < 64) {
			t.Errorf("%v: exit code %d, %q", how, code, seen.String())
		}
	}
}

// Whoever asks for the pod's status meanwhile is told as well.
func TestVMStatusWhileFilling(t *testing.T) {
	w := theWorld(t)
	dir := filepath.Join(t.TempDir(), "pod")
	t.Cleanup(func() { w.run(t, "rm", "-f", dir) })
	w.must(t, "summon", dir, "oci:"+w.images+"/debian", "-v", filepath.Join(t.TempDir(), "bin.img")+":/usr/bin:size=200M", "--", "true")
	cmd := w.start(t, io.Discard, "run", dir)
	var s podStatus
	within(t, "the status tells that a volume is being filled", func() bool {
		s = w.status(t, dir)
		return s.Filling != nil || s.State != "created" && s.State != stateStarting
	})
	if s.State != stateStarting || s.Filling == nil || s.Filling.Done == 0 || s.Attendant != cmd.Process.Pid {
		t.Errorf("%+v", s)
	}
	resume := pause(t, dir) // it would have ended before somebody slow asks once more
	defer resume()
	if stdout := w.must(t, "status", dir); !strings.Contains(stdout, "): starting: copying the image's content into volume ") {
		t.Errorf("the status is %s", stdout)
	}
	resume()
	if code := exit(t, cmd); code != 0 {
		t.Errorf("exit code %d", code)
	}
	if s := w.status(t, dir); s.State != "exited" || s.Filling != nil {
		t.Errorf("at the end: %+v", s)
	}
}

// pause stops a pod's QEMU until resume is called.
func pause(t testing.TB, dir string) (resume func()) {
	t.Helper()
	pid, err := vmm.Running(filepath.Join(dir, "run"))
	if err == nil {
		err = unix.Kill(pid, unix.SIGSTOP)
	}
	if err != nil {
		t.Fatal(err)
	}
	return sync.OnceFunc(func() { _ = unix.Kill(pid, unix.SIGCONT) })
}

func openTerminal(t *testing.T) (master, slave *os.File) {
	t.Helper()
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY|unix.O_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { master.Close() })
	if err := unix.IoctlSetPointerInt(int(master.Fd()), unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	unix.SetNonblock(int(master.Fd()), true)
	n, err := unix.IoctlGetInt(int(master.Fd()), unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	unix.SetNonblock(int(master.Fd()), true)
	slave, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { slave.Close() })
	return master, slave
}

func setSize(t *testing.T, f *os.File, rows, columns uint16) {
	t.Helper()
	rc, err := f.SyscallConn()
	if err == nil {
		cerr := rc.Control(func(fd uintptr) {
			err = unix.IoctlSetWinsize(int(fd), unix.TIOCSWINSZ, &unix.Winsize{Row: rows, Col: columns})
		})
		err = errors.Join(err, cerr)
	}
	if err != nil {
		t.Fatal(err)
	}
}

func sh(t testing.TB, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %v: %v\n%s", name, args, err, out)
	}
	return string(out)
}

// Ports are published in user mode: TCP and UDP, chosen and given, on an address.
func TestVMPublish(t *testing.T) {
	w := theWorld(t)
	dir := filepath.Join(t.TempDir(), "pod")
	t.Cleanup(func() { w.run(t, "rm", "-f", dir) })
	w.must(t, "summon", dir, "oci:"+w.images+"/debian", "-p", "127.0.0.1::80", "-p", "127.0.0.1::53/udp", "--", "perl", "-MIO::Socket::INET", "-e", `
		if (fork) {
			my $s = IO::Socket::INET->new(Proto => "udp", LocalPort => 53) or die;
			while (1) { $s->recv(my $m, 1000); $s->send($m) }
		}
		my $l = IO::Socket::INET->new(Listen => 5, LocalPort => 80) or die;
		while (my $c = $l->accept) { <$c>; print $c "page\n"; close $c }
	`)
	w.must(t, "run", "-d", dir)
	published := w.status(t, dir).Machine.Publish
	if len(published) != 2 || published[0].HostPort == 0 || published[1].HostPort == 0 {
		t.Fatalf("published %+v", published)
	}
	// The guest tells docker's clients the same.
	port := exec.Command("docker", "-H", "unix://"+filepath.Join(dir, "vdocker.sock"), "port", "pod", "80/tcp")
	if out, err := port.CombinedOutput(); err != nil || string(out) != fmt.Sprintf("127.0.0.1:%d\n", published[0].HostPort) {
		t.Errorf("docker port: %v, %s", err, out)
	}
	within(t, "the web server answers", func() bool {
		c, err := net.DialTimeout("tcp", fmt.Sprintf("127.0.0.1:%d", published[0].HostPort), time.Second)
		if err != nil {
			return false
		}
		defer c.Close()
		c.SetDeadline(time.Now().Add(30 * time.Second))
		io.WriteString(c, "GET / HTTP/1.0\r\n\r\n")
		data, _ := io.ReadAll(c)
		return string(data) == "page\n"
	})
	within(t, "the UDP server answers", func() bool {
		c, err := net.Dial("udp", fmt.Sprintf("127.0.0.1:%d", published[1].HostPort))
		if err != nil {
			return false
		}
		defer c.Close()
		c.SetDeadline(time.Now().Add(time.Second))
		io.WriteString(c, "hello\n")
		buf := make([]byte, 100)
		n, err := c.Read(buf)
		return err == nil && string(buf[:n]) == "hello\n"
	})
	w.must(t, "kill", dir)
	if c, err := net.DialTimeout("tcp", fmt.Sprintf("127.0.0.1:%d", published[0].HostPort), time.Second); err == nil {
		c.Close()
		t.Error("the port is still open")
	}
}

// Directories are looked up all at once in a file system that the guest has only just mounted: none is missing.
func TestVMManyDirectories(t *testing.T) { manyDirectories(t, 2) }

func manyDirectories(t *testing.T, starts int) {
	w := theWorld(t)
	const n = 24
	var args []string
	want := ""
	for i := range n {
		dir, name := t.TempDir(), fmt.Sprintf("/d%02d", i)
		if err := os.WriteFile(filepath.Join(dir, "f"), []byte(name+"\n"), 0o644); err != nil {
			t.Fatal(err)
		}
		args, want = append(args, "-v", dir+":"+name), want+name+"\n"
	}
	dir := w.summon(t, append(args, "--", "sh", "-c", "cat /d??/f")...)
	for i := range starts {
		if stdout, stderr, code := w.run(t, "run", dir); code != 0 || stdout != want {
			t.Fatalf("start %d: exit code %d\n%s%s", i+1, code, stdout, stderr)
		}
	}
}

// From a template and cold: what the pod sees is the same.
func TestVMStarts(t *testing.T) {
	w := theWorld(t)
	for _, start := range []string{vmm.Template, vmm.Cold} {
		dir := w.summon(t, "--start", start, "--", "sh", "-c", "hostname; nproc; id -u")
		out := w.must(t, "run", dir)
		s := w.status(t, dir)
		if s.Machine.Start != start || out != s.ID[:12]+"\n1\n0\n" {
			t.Errorf("%s: %s, %q", start, s.Machine.Start, out)
		}
	}
}

// Pods of one template have nothing in common that should be a pod's own, down to the keys that programs make.
func TestVMPodsAreIndividuals(t *testing.T) {
	w := theWorld(t)
	if _, err := os.Stat("/usr/bin/ssh-keygen"); err != nil {
		t.Fatal("no ssh-keygen: apt-get install openssh-client")
	}
	seen := map[string]bool{}
	for range 3 {
		// The host's own program, with the host's libraries, in a container that has neither.
		dir := w.summon(t, "--start", "template", "-v", "/usr:/usr.host:ro", "--", "sh", "-c", `
			hostname; cat /sys/class/net/eth0/address /proc/sys/kernel/random/boot_id /proc/sys/kernel/random/uuid; head -c 16 /dev/urandom | md5sum
			/usr.host/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2 --library-path /usr.host/lib/x86_64-linux-gnu /usr.host/bin/ssh-keygen -q -t ed25519 -N '' -C '' -f /key && cat /key.pub
			date +%s`)
		begin := time.Now().Unix()
		lines := strings.Split(strings.TrimSpace(w.must(t, "run", dir)), "\n")
		if s := w.status(t, dir); s.Machine.Start != vmm.Template {
			t.Errorf("started %s", s.Machine.Start)
		}
		if len(lines) != 7 {
			t.Fatalf("the pod says %q", lines)
		}
		if now, err := strconv.ParseInt(lines[6], 10, 64); err != nil || now < begin || now > time.Now().Unix()+1 {
			t.Errorf("the pod's clock says %s, %d seconds after the host's", lines[6], now-begin)
		}
		for _, line := range lines[:6] {
			if len(line) < 12 || seen[line] {
				t.Errorf("not a pod's own: %q", line)
			}
			seen[line] = true
		}
	}
}
