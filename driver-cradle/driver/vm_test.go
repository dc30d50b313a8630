//go:build vm

// These tests run tasks as pods in real machines, through Nomad's own harness for drivers. They need root, QEMU and e2fsprogs.
package driver

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/nomad/client/lib/cgroupslib"
	"github.com/hashicorp/nomad/nomad/structs"
	"github.com/hashicorp/nomad/plugins/base"
	"github.com/hashicorp/nomad/plugins/drivers"
	"github.com/hashicorp/nomad/plugins/drivers/proto"
	"github.com/hashicorp/nomad/plugins/drivers/testutils"
	"golang.org/x/sys/unix"

	"github.com/cradlestack/cradlestack/driver-cradle/boot"
	"github.com/cradlestack/cradlestack/driver-cradle/boot/boottest"
	"github.com/cradlestack/cradlestack/driver-cradle/vmm"
	"github.com/cradlestack/cradlestack/internal/nomadtest"
	"github.com/cradlestack/cradlestack/test/programs"
)

func TestMain(m *testing.M) {
	vmm.Confine()
	if dir := os.Getenv(noCgroups); dir != "" {
		p, err := boot.Open(filepath.Join(dir, "boot"))
		if err == nil {
			err = setUp(dir, p)
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(m.Run())
	}
	boottest.Main(m, "github.com/cradlestack/cradlestack/driver-cradle/guest/cradle-init", setUp, closeAgents)
}

// noCgroups is the variable by which withoutCgroups tells the folder of all tests.
const noCgroups = "DRIVER_TEST_WITHOUT_CGROUPS"

// withoutCgroups executes the present test again where Nomad's library finds no cgroups at the place it looks for them. Its conformance test of exec
// wants to see in a task's /proc/self/cgroup that the host has put the task into a cgroup; a microVM has a kernel of its own, which knows nothing
// of the host's. It says whether this is that execution.
func withoutCgroups(t *testing.T) bool {
	if os.Getenv(noCgroups) != "" {
		if cgroupslib.GetMode() != cgroupslib.OFF {
			t.Fatal("Nomad's library still sees cgroups")
		}
		return true
	}
	type result struct {
		out []byte
		err error
	}
	done := make(chan result)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends here
		err := unix.Unshare(unix.CLONE_FS | unix.CLONE_NEWNS)
		if err == nil {
			err = unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, "")
		}
		unified := "/sys/fs/cgroup/unified"
		if _, serr := os.Stat(unified); serr != nil {
			unified = "/sys/fs/cgroup"
		}
		if err == nil { // our own machines need version 2, wherever it is
			err = unix.Mount(unified, "/mnt", "", unix.MS_BIND, "")
		}
		if err == nil {
			err = unix.Unmount("/sys/fs/cgroup", unix.MNT_DETACH)
		}
		if err != nil {
			done <- result{err: err}
			return
		}
		cmd := exec.Command("/proc/self/exe", "-test.run=^"+t.Name()+"$", "-test.v")
		cmd.Env = append(os.Environ(), noCgroups+"="+shared.dir)
		out, err := cmd.CombinedOutput()
		done <- result{out, err}
	}()
	r := <-done
	t.Logf("%s", r.out)
	if r.err != nil {
		t.Error(r.err)
	}
	return false
}

// shared is what all tests use: a folder, a boot package of this source, a cache of images and templates, and the example images.
var shared struct{ dir, boot, cache, images string }

func setUp(dir string, p *boot.Package) error {
	image, err := programs.Image("busybox")
	if err != nil {
		return err
	}
	shared.dir, shared.boot, shared.cache, shared.images = dir, p.Dir, filepath.Join(dir, "cache"), filepath.Dir(image)
	return os.Setenv("TMPDIR", dir) // Nomad's harness leaves directories there
}

// command runs a program and gives its output.
func command(name string, args ...string) (string, error) {
	cmd := exec.Command(name, args...)
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("%s %v: %w\n%s", name, args, err, stderr.String())
	}
	return string(out), nil
}

// A client is a state directory and the plugin that attends to it.
type client struct {
	testing.TB
	state   string
	driver  *Driver
	harness *testutils.DriverHarness
	config  config
}

// newClient starts a plugin. edit may change its configuration.
func newClient(t *testing.T, edit func(*config)) *client {
	t.Helper()
	state, err := os.MkdirTemp(shared.dir, "state-")
	if err != nil {
		t.Fatal(err)
	}
	c := &client{TB: t, state: state, config: config{StateDir: state, CacheDir: shared.cache, BootPackage: shared.boot}}
	if edit != nil {
		edit(&c.config)
	}
	c.open(t)
	t.Cleanup(func() {
		c.close()
		c.empty()
	})
	return c
}

// open starts a plugin process's work.
func (c *client) open(t *testing.T) {
	t.Helper()
	c.driver = New(hclog.New(&hclog.LoggerOptions{Level: hclog.Debug, Output: testWriter{t}})).(*Driver)
	c.harness = testutils.NewDriverHarness(t, c.driver)
	var raw []byte
	if err := base.MsgPackEncode(&raw, &c.config); err != nil {
		t.Fatal(err)
	}
	if err := c.harness.SetConfig(&base.Config{PluginConfig: raw, AgentConfig: &base.AgentConfig{}}); err != nil {
		t.Fatal(err)
	}
}

type testWriter struct{ testing.TB }

func (w testWriter) Write(p []byte) (int, error) {
	w.Logf("%s", strings.TrimSpace(string(p)))
	return len(p), nil
}

// close ends the plugin's work as a kill does: pods stay as they are.
func (c *client) close() {
	if c.driver == nil {
		return
	}
	c.harness.Kill()
	if err := c.driver.Close(); err != nil {
		c.Errorf("close: %v", err)
	}
	c.driver = nil
}

// empty checks that no task has left anything.
func (c *client) empty() {
	left, err := os.ReadDir(filepath.Join(c.state, tasksDir))
	if err != nil && !errors.Is(err, fs.ErrNotExist) { // a plugin that did not work has made none
		c.Error(err)
	}
	for _, e := range left {
		c.Errorf("%s is left", filepath.Join(c.state, tasksDir, e.Name()))
	}
}

var taskNumber int

// task makes a task of the busybox image that runs a shell script, and its allocation.
func (c *client) task(script string, edit func(*drivers.TaskConfig, *taskConfig)) *drivers.TaskConfig {
	c.Helper()
	taskNumber++
	alloc := fmt.Sprintf("%08d-0000-0000-0000-000000000000", taskNumber)
	t := &drivers.TaskConfig{
		ID: alloc + "/main/1", AllocID: alloc, Name: "main",
		Resources: &drivers.Resources{
			NomadResources: &structs.AllocatedTaskResources{
				Memory: structs.AllocatedMemoryResources{MemoryMB: 64}, Cpu: structs.AllocatedCpuResources{CpuShares: 100},
			},
			LinuxResources: &drivers.LinuxResources{},
		},
	}
	cfg := &taskConfig{containerConfig: containerConfig{Image: "oci:" + shared.images + "/busybox", Command: "sh", Args: []string{"-c", script}}}
	if edit != nil {
		edit(t, cfg)
	}
	if err := t.EncodeConcreteDriverConfig(cfg); err != nil {
		c.Fatal(err)
	}
	end := c.harness.MkAllocDir(t, true)
	c.Cleanup(func() {
		for _, path := range []string{t.StdoutPath, t.StderrPath} { // for a pipe that no task has opened the harness waits four seconds
			if f, err := os.OpenFile(path, os.O_WRONLY|unix.O_NONBLOCK, 0); err == nil {
				f.Close()
			}
		}
		end()
	})
	return t
}

// start starts a task, which is destroyed at the test's end.
func (c *client) start(t *drivers.TaskConfig) *drivers.TaskHandle {
	c.Helper()
	h, _, err := c.harness.StartTask(t)
	if err != nil {
		c.Fatal(err)
	}
	c.Cleanup(func() {
		if c.driver == nil {
			return
		}
		if err := c.driver.DestroyTask(t.ID, true); err != nil && !errors.Is(err, drivers.ErrTaskNotFound) {
			c.Errorf("destroy: %v", err)
		}
	})
	return h
}

// wait waits for a task's end.
func (c *client) wait(t *drivers.TaskConfig) *drivers.ExitResult {
	c.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), nomadtest.Patience)
	defer cancel()
	ch, err := c.harness.WaitTask(ctx, t.ID)
	if err != nil {
		c.Fatal(err)
	}
	select {
	case r := <-ch:
		if r == nil {
			c.Fatal("the task has no result")
		}
		return r
	case <-ctx.Done():
		c.Fatal("the task does not end")
	}
	return nil
}

// logs is what Nomad has got of a task's output, once it is as expected or nothing more is waited for.
func (c *client) logs(t *drivers.TaskConfig, stream, want string) {
	c.Helper()
	path := filepath.Join(t.TaskDir().LogDir, t.Name+"."+stream+".0")
	var got []byte
	for begin := time.Now(); time.Since(begin) < nomadtest.Patience; {
		got, _ = os.ReadFile(path)
		if string(got) == want {
			return
		}
		time.Sleep(100 * time.Millisecond)
	}
	c.Errorf("%s is %q, want %q", stream, got, want)
}

func TestVMOutputAndExitCode(t *testing.T) {
	c := newClient(t, nil)
	task := c.task("echo out; echo err >&2; exit 7", nil)
	c.start(task)
	if r := c.wait(task); r.ExitCode != 7 || r.Err != nil || r.OOMKilled {
		t.Errorf("result %+v", r)
	}
	c.logs(task, "stdout", "out\n")
	c.logs(task, "stderr", "err\n")
	if s, err := c.harness.InspectTask(task.ID); err != nil || s.State != drivers.TaskStateExited || s.ExitResult.ExitCode != 7 {
		t.Errorf("status %+v, %v", s, err)
	}
}

func TestVMExecConformance(t *testing.T) {
	if !withoutCgroups(t) {
		return
	}
	c := newClient(t, nil)
	task := c.task("sleep 600", nil)
	c.start(task)
	testutils.ExecTaskStreamingConformanceTests(t, c.harness, task.ID)
}

// Nomad's client passes on what a command has to say also where the end of its input comes only when the command has long ended.
func TestVMExecIsHeardToItsEnd(t *testing.T) {
	c := newClient(t, nil)
	task := c.task("sleep 600", nil)
	c.start(task)
	for _, command := range [][]string{{"--container=none", "true"}, {"sh", "-c", "exit 7"}} {
		s := &slowExec{ctx: t.Context(), begun: make(chan struct{}), passed: make(chan struct{})}
		err := c.harness.DriverPlugin.(drivers.ExecTaskStreamingRawDriver).ExecTaskStreamingRaw(t.Context(), task.ID, command, false, s)
		if err != nil || s.exit == nil || s.exit.ExitCode != map[string]int32{"sh": 7}[command[0]] && s.exit.ExitCode != exitRefused {
			t.Errorf("%v ends with %v, %+v", command, err, s.exit)
		}
	}
}

// A slowExec is a client that takes the first message only once it has passed its input on.
type slowExec struct {
	ctx    context.Context
	begun  chan struct{} // closed with the first message
	passed chan struct{} // closed when the end of the input was passed on
	once   sync.Once
	asked  int
	exit   *proto.ExitResult
}

func (s *slowExec) Send(m *drivers.ExecTaskStreamingResponseMsg) error {
	s.once.Do(func() {
		close(s.begun)
		select {
		case <-s.passed:
		case <-time.After(5 * time.Second): // it was not: its stream has ended
		}
	})
	if m.Exited {
		s.exit = m.Result
	}
	return nil
}

func (s *slowExec) Recv() (*drivers.ExecTaskStreamingRequestMsg, error) {
	if s.asked++; s.asked > 1 {
		close(s.passed)
		<-s.ctx.Done()
		return nil, io.EOF
	}
	<-s.begun
	time.Sleep(100 * time.Millisecond) // the plugin has nothing more to do
	return &drivers.ExecTaskStreamingRequestMsg{Stdin: &proto.ExecTaskStreamingIOOperation{Close: true}}, nil
}

func TestVMDNS(t *testing.T) {
	c := newClient(t, nil)
	for _, dns := range []*drivers.DNSConfig{
		nil,
		{Servers: []string{"192.0.2.53", "198.51.100.53"}, Searches: []string{"example.org"}, Options: []string{"ndots:2"}},
	} {
		task := c.task("sleep 600", func(t *drivers.TaskConfig, _ *taskConfig) { t.DNS = dns })
		c.start(task)
		testutils.TestTaskDNSConfig(t, c.harness, task.ID, dns)
	}
}

// The plugin is ended and started again while the task writes; nothing of its output is missing or there twice. Meanwhile the machine holds Nomad's pipes.
func TestVMRecover(t *testing.T) {
	c := newClient(t, nil)
	task := c.task("i=0; until [ -e /enough ]; do i=$((i+1)); echo $i; sleep 0.1; done; exit 3", nil)
	path := filepath.Join(task.TaskDir().LogDir, task.Name+".stdout.0")
	lines := func() int {
		out, _ := os.ReadFile(path)
		return strings.Count(string(out), "\n")
	}
	more := func() {
		t.Helper()
		want := lines() + 10
		eventually(t, func() string { return fmt.Sprintf("%d lines of %d", lines(), want) }, func(string) bool { return lines() >= want })
	}
	h := c.start(task)
	more()
	c.close()
	for _, path := range []string{task.StdoutPath, task.StderrPath} {
		f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
		if err != nil {
			t.Fatal(err)
		}
		unread := func() string { // by Nomad's reader, whose it is
			n, err := unix.IoctlGetInt(int(f.Fd()), unix.TIOCINQ) // FIONREAD
			return fmt.Sprint(n, err)
		}
		eventually(t, unread, func(s string) bool { return s == fmt.Sprint(0, nil) })
		if n, err := unix.Read(int(f.Fd()), make([]byte, 1)); err != unix.EAGAIN {
			t.Errorf("nobody writes to %s: %d, %v", path, n, err)
		}
		f.Close()
	}
	time.Sleep(time.Second)
	c.open(t)
	if err := c.harness.RecoverTask(h); err != nil {
		t.Fatal(err)
	}
	more()
	if r, err := c.harness.ExecTask(task.ID, []string{"touch", "/enough"}, nomadtest.Patience); err != nil || !r.ExitResult.Successful() {
		t.Fatalf("touch: %+v, %v", r, err)
	}
	if r := c.wait(task); r.ExitCode != 3 || r.Err != nil {
		t.Errorf("result %+v", r)
	}
	out, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	gapless(t, string(out), 0)
}

func TestVMStop(t *testing.T) {
	c := newClient(t, nil)
	task := c.task("trap 'echo term; exit 5' TERM; trap 'echo usr1; exit 6' USR1; echo up; while :; do sleep 1; done", nil)
	c.start(task)
	c.logs(task, "stdout", "up\n")
	if err := c.harness.StopTask(task.ID, 20*time.Second, "SIGUSR1"); err != nil {
		t.Fatal(err)
	}
	if r := c.wait(task); r.ExitCode != 6 {
		t.Errorf("result %+v", r)
	}
	c.logs(task, "stdout", "up\nusr1\n")
}

func TestVMStats(t *testing.T) {
	c := newClient(t, nil)
	task := c.task("head -c 20000000 /dev/zero >/dev/shm/file; while :; do :; done", nil)
	c.start(task)
	ctx, cancel := context.WithTimeout(t.Context(), nomadtest.Patience)
	defer cancel()
	ch, err := c.harness.TaskStats(ctx, task.ID, time.Second)
	if err != nil {
		t.Fatal(err)
	}
	for u := range ch {
		m, cpu := u.ResourceUsage.MemoryStats, u.ResourceUsage.CpuStats
		t.Logf("%+v %+v", m, cpu)
		if m.Usage > 20000000 && m.Usage < 64<<20 && cpu.Percent > 5 {
			return
		}
	}
	t.Error("the statistics do not show the task's memory and processor time")
}
