//go:build vm

package vmm

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cradlestack/cradlestack/driver-cradle/wire"
	"github.com/cradlestack/cradlestack/spec"
)

// clean checks that a run directory has nothing left of its machine but what people read.
func clean(t testing.TB, dir string) {
	t.Helper()
	if !eventually(func() bool { return len(qemus(t, dir)) == 0 }) {
		t.Errorf("processes of %s are left: %v", dir, qemus(t, dir))
	}
	entries, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	for _, e := range entries {
		if e.Name() != consoleFile && e.Name() != lockFile {
			t.Errorf("%s is left in %s", e.Name(), dir)
		}
	}
}

func TestVMStartErrors(t *testing.T) {
	for name, c := range map[string]struct {
		change func(*testing.T, *Config)
		is     error
		says   string
	}{
		"no QEMU":             {func(t *testing.T, _ *Config) { t.Setenv("PATH", t.TempDir()) }, ErrNoQEMU, "apt-get install qemu-system-x86"},
		"kvm that is no good": {func(_ *testing.T, c *Config) { c.Accel = KVM }, ErrNoKVM, "auto or tcg"},
		"too little memory":   {func(_ *testing.T, c *Config) { c.Memory = 1 << 20 }, nil, "more memory"},
		"too much memory":     {func(_ *testing.T, c *Config) { c.Memory = 1 << 50 }, nil, "less memory"},
		"no package":          {func(_ *testing.T, c *Config) { c.Package = nil }, nil, "no boot package"},
		"unknown accelerator": {func(_ *testing.T, c *Config) { c.Accel = "hvf" }, nil, "none of"},
		"no such disk": {
			func(_ *testing.T, c *Config) { c.Disks = []Disk{{Key: "layer", Path: "/nonexistent"}} }, os.ErrNotExist, "attach disk layer",
		},
		"no such share": {
			func(_ *testing.T, c *Config) { c.Shares = []Share{{"x", "/nonexistent", false}} }, os.ErrNotExist, "share x",
		},
		"share name with a slash": {
			func(_ *testing.T, c *Config) { c.Shares = []Share{{"../x", "/usr", false}} }, nil, "no path element",
		},
		"published port without a network": {
			func(_ *testing.T, c *Config) { c.Net.Publish = []spec.Publish{{Port: 80}} }, nil, "network mode user",
		},
		"published port on IPv6": {
			func(_ *testing.T, c *Config) {
				c.Net = Net{Mode: NetUser, Publish: []spec.Publish{{Port: 80, HostIP: "::1"}}}
			}, nil, "no IPv4 address",
		},
		"port that is taken": {
			func(t *testing.T, c *Config) {
				c.Net = Net{Mode: NetUser, Publish: []spec.Publish{{HostIP: "127.0.0.1", Port: 80, HostPort: takenPort(t)}}}
			}, ErrPortTaken, "choose another",
		},
		"template that may not be": {
			func(_ *testing.T, c *Config) { c.Start, c.Virtiofs = Template, []Share{{"x", "/usr", true}} }, nil, "cold start",
		},
	} {
		t.Run(name, func(t *testing.T) {
			conf := config(t)
			c.change(t, &conf)
			ctx, cancel := testContext()
			defer cancel()
			m, err := Start(ctx, conf)
			if err == nil {
				m.Kill()
				m.Close()
				t.Fatal("the machine started")
			}
			if !strings.Contains(err.Error(), c.says) || c.is != nil && !errors.Is(err, c.is) {
				t.Errorf("error %q, want one with %q", err, c.says)
			}
			clean(t, conf.RunDir)
		})
	}
}

// A QEMU that may not have a ring, though this process may, is started again without.
func TestVMNoIOUring(t *testing.T) {
	c := config(t)
	c.Start, c.Disks = Cold, []Disk{{Key: "volume", Path: image(t, "", 1<<20)}}
	if err := c.check(); err != nil { // it sets what is left out
		t.Fatal(err)
	}
	if !ringHere(t, c.Disks[0]) {
		t.Fatal("no io_uring here: set TMPDIR to a directory on ext4 or xfs, and kernel.io_uring_disabled to 0")
	}
	program := filepath.Join(t.TempDir(), "bin", "qemu")
	const script = `#!/usr/bin/sh
case "$*" in
*'"aio":"io_uring"'*) echo "Unable to use io_uring: failed to init linux io_uring ring: Operation not permitted" >&2 ;;
*) echo "asked for threads" >&2 ;;
esac
exit 1
`
	if err := errors.Join(os.Mkdir(filepath.Dir(program), 0o755), os.WriteFile(program, []byte(script), 0o755)); err != nil {
		t.Fatal(err)
	}
	q := &qemu{path: program, version: "7.2.0", ioUring: true}
	m, err := c.boot(t.Context(), q, Info{Accel: TCG, Start: Cold, Memory: class(c.Memory), CPUs: c.CPUs, Package: c.Package.Digest}, nil)
	if err == nil {
		m.Kill()
		m.Close()
		t.Fatal("the machine started")
	}
	if !strings.Contains(err.Error(), "asked for threads") || q.ioUring {
		t.Errorf("error %q, want the one of a start without io_uring", err)
	}
	clean(t, c.RunDir)
}

func TestVMDiskInUse(t *testing.T) {
	for _, how := range []string{Cold, Template, Auto} {
		for _, internal := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, internal %v", how, internal), func(t *testing.T) {
				c := config(t)
				c.Start = how
				c.Disks = []Disk{{Key: "volume", Path: image(t, "", 1<<20), Internal: internal}}
				first := start(t, c)
				second := again(t, c)
				_, err := Start(t.Context(), second)
				if !errors.Is(err, ErrDiskInUse) || !strings.Contains(err.Error(), "attach disk volume: "+c.Disks[0].Path) {
					t.Errorf("a second machine on the same disk: %v", err)
				}
				clean(t, second.RunDir)
				name := first.Info().Template
				if why, broken := OpenTemplates(c.CacheDir, nil).broken(name); broken {
					t.Errorf("the template is blamed for it: %s", why)
				}
			})
		}
	}
}

func TestVMGuestPanic(t *testing.T) {
	c := config(t)
	c.Start = Template
	m := start(t, c)
	try(t, m, "sysrq", url.Values{"key": {"c"}}, nil)
	<-m.Done()
	var p *PanicError
	if !errors.As(m.Err(), &p) || !strings.Contains(p.Reason, "sysrq") || !strings.Contains(p.Console, "Kernel panic") {
		t.Errorf("the machine's end: %v", m.Err())
	}
	clean(t, c.RunDir)
	if log, err := os.ReadFile(filepath.Join(c.RunDir, consoleFile)); err != nil || !strings.Contains(string(log), "Kernel panic") {
		t.Errorf("console.log: %v, %.200s", err, log)
	}
	if _, err := m.Open(t.Context()); !errors.As(err, &p) {
		t.Errorf("Open after the end: %v", err)
	}
}

func TestVMGuestRestartEndsIt(t *testing.T) {
	c := config(t)
	c.Start = Template
	m := start(t, c)
	try(t, m, "restart", nil, nil)
	<-m.Done()
	if m.Err() == nil || !strings.Contains(m.Err().Error(), "guest ended by itself") {
		t.Errorf("the machine's end: %v", m.Err())
	}
	clean(t, c.RunDir)
}

func TestVMQEMUKilled(t *testing.T) {
	c := config(t)
	c.Start = Template
	m := start(t, c)
	if err := unix.Kill(m.Info().PID, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	<-m.Done()
	if m.Err() == nil || !strings.Contains(m.Err().Error(), "killed") {
		t.Errorf("the machine's end: %v", m.Err())
	}
	clean(t, c.RunDir)
}

// Whoever kills a machine that is starting gets what he wants, and the template stays what it was.
func TestVMKilledWhileStarting(t *testing.T) {
	c := ownTemplates(t, fromTemplate(t))
	first := start(t, again(t, c))
	c.Start = Auto
	for i := range 8 {
		c := again(t, c)
		started := make(chan error, 1)
		go func() {
			m, err := Start(t.Context(), c)
			if err == nil { // before it was killed
				<-m.Done()
				err = errors.Join(m.Err(), m.Close())
			}
			started <- err
		}()
		if !eventually(func() bool { _, err := Running(c.RunDir); return err == nil }) {
			t.Fatal("no machine comes")
		}
		time.Sleep(time.Duration(i) * 8 * time.Millisecond)
		if err := Kill(c.RunDir); err != nil {
			t.Error(err)
		}
		if err := <-started; !errors.Is(err, ErrKilled) {
			t.Errorf("a machine that was killed while it started: %v", err)
		}
		clean(t, c.RunDir)
	}
	ts := OpenTemplates(c.CacheDir, nil)
	if why, ok := ts.broken(first.Info().Template); ok {
		t.Errorf("the template is out of use: %s", why)
	}
	if m := start(t, again(t, c)); m.Info().Start != Template {
		t.Errorf("%+v", m.Info())
	}
}

// What ends a service's or a session's processes all together leaves the pod to its launcher, which stops it first.
func TestVMSignalsAreTheLaunchers(t *testing.T) {
	c := config(t)
	c.Start = Template
	m := start(t, c)
	for _, s := range enders {
		if err := unix.Kill(m.Info().PID, s); err != nil {
			t.Fatal(err)
		}
	}
	status, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", m.Info().PID))
	if err != nil || len(status) == 0 {
		t.Fatalf("threads: %v, %v", status, err)
	}
	const blocked = 1<<(unix.SIGHUP-1) | 1<<(unix.SIGINT-1) | 1<<(unix.SIGQUIT-1) | 1<<(unix.SIGTERM-1)
	for _, path := range status {
		data, err := os.ReadFile(path)
		if err != nil {
			continue // a thread that has ended
		}
		_, mask, _ := strings.Cut(string(data), "SigBlk:\t")
		mask, _, _ = strings.Cut(mask, "\n")
		if n, err := strconv.ParseUint(mask, 16, 64); err != nil || n&blocked != blocked {
			t.Errorf("%s: signals blocked: %s, %v", path, mask, err)
		}
	}
	var s string
	ask(t, m, "uuid", nil, &s)
	if m.Err() != nil {
		t.Error(m.Err())
	}
}

// A QEMU that hangs while nobody attends to it answers nobody. To kill it takes no answer.
func TestVMKillOfOneThatHangs(t *testing.T) {
	c := fromTemplate(t)
	c.Detached = true
	l := startLauncher(t, c)
	pid, _ := l.ready(t)
	t.Cleanup(func() { Kill(c.RunDir) })
	l.Process.Kill()
	l.Wait()
	if err := unix.Kill(pid, unix.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if m, err := TakeUp(ctx, c.RunDir); err == nil || errors.Is(err, ErrNotRunning) {
		t.Fatalf("TakeUp of a QEMU that hangs: %v, %v", m, err)
	}
	if err := Kill(c.RunDir); err != nil {
		t.Fatal(err)
	}
	clean(t, c.RunDir)
	if err := Kill(c.RunDir); !errors.Is(err, ErrNotRunning) {
		t.Errorf("Kill of nothing: %v", err)
	}
}

// An agent that says nothing, cold and from a template: the guest's part of the port is never opened.
func TestVMAgentThatHangs(t *testing.T) {
	t.Parallel() // it waits
	c := config(t)
	c.Package = hangingPackage(t)
	ctx, cancel := testContext()
	defer cancel()
	var err error
	for c.HelloTimeout = 5 * time.Second; ; c.HelloTimeout *= 2 { // until it is long enough for the word, on a machine that is slow
		_, err = Start(ctx, c)
		if err == nil || !strings.Contains(err.Error(), fmt.Sprint("did not answer within ", c.HelloTimeout)) {
			t.Fatalf("Start: %v", err)
		}
		clean(t, c.RunDir)
		if strings.Contains(err.Error(), "agent: hanging") {
			break
		}
		if c.HelloTimeout > time.Minute {
			t.Fatalf("the agent's word is not told: %v", err)
		}
	}
	c = again(t, ownTemplates(t, c))
	c.Start, c.HelloTimeout = Template, time.Second
	if _, err = Start(ctx, c); err == nil || !strings.Contains(err.Error(), "agent did not come up within 1s") {
		t.Errorf("Start from a template: %v", err)
	}
	clean(t, c.RunDir)
	if entries, _ := filepath.Glob(filepath.Join(c.CacheDir, "templates", ".*")); len(entries) > 0 {
		t.Errorf("left: %v", entries)
	}
}

func TestVMConsoleIsBounded(t *testing.T) {
	c := config(t)
	c.Start = Template
	m := start(t, c)
	ask(t, m, "console", url.Values{"kib": {"200"}}, nil)
	path := filepath.Join(c.RunDir, consoleFile)
	if !eventually(func() bool { log, _ := os.ReadFile(path); return strings.Contains(string(log), "000199 xxx") }) {
		t.Error("the console's last line did not arrive")
	}
	if fi, err := os.Stat(path); err != nil || fi.Size() > maxConsole {
		t.Errorf("%v, %v bytes", err, fi.Size())
	}
}

// The leash: whenever a launcher is killed, its machine ends with it, and the next one finds a usable directory.
func TestVMLauncherKilledAtRandom(t *testing.T) { killLaunchers(t, 8) }

// A launcher that is killed while it makes a template leaves neither a process nor a template that is half there.
func TestVMLauncherKilledWhileMakingATemplate(t *testing.T) {
	c := ownTemplates(t, fromTemplate(t))
	conf := c
	if err := conf.check(); err != nil {
		t.Fatal(err)
	}
	k, err := conf.key(mustQEMU(t, c), TCG)
	if err != nil {
		t.Fatal(err)
	}
	ts := OpenTemplates(c.CacheDir, nil)
	work := filepath.Join(ts.Dir, "."+k.String()+".work", "run")
	for range 4 {
		l := startLauncher(t, again(t, c))
		time.Sleep(time.Duration(rand.IntN(1200)) * time.Millisecond)
		l.Process.Kill()
		l.Wait()
		if !eventually(func() bool { return len(qemus(t, work)) == 0 }) {
			t.Fatalf("the template's QEMU outlives its launcher: %v", qemus(t, work))
		}
		if list, err := ts.List(); err != nil || len(list) > 1 || len(list) == 1 && list[0].RAM == "" {
			t.Errorf("templates: %+v, %v", list, err)
		}
	}
	if _, err := ts.GC(Limit{}); err != nil {
		t.Error(err)
	}
	if left, _ := filepath.Glob(filepath.Join(ts.Dir, ".*")); len(left) > 0 {
		t.Errorf("GC leaves %v", left)
	}
	start(t, again(t, c))
}

func mustQEMU(t *testing.T, c Config) *qemu {
	t.Helper()
	q, err := findQEMU(t.Context(), c.CacheDir)
	if err != nil {
		t.Fatal(err)
	}
	return q
}

func killLaunchers(t *testing.T, n int) {
	c := fromTemplate(t)
	c = again(t, c)
	start(t, again(t, c)) // the template is there, and held
	for range n {
		l := startLauncher(t, c)
		time.Sleep(time.Duration(rand.IntN(200)) * time.Millisecond)
		l.Process.Kill()
		l.Wait()
		if !eventually(func() bool { return len(qemus(t, c.RunDir)) == 0 }) {
			t.Fatalf("QEMU outlives its launcher: %v", qemus(t, c.RunDir))
		}
		if m, err := TakeUp(t.Context(), c.RunDir); !errors.Is(err, ErrNotRunning) {
			t.Fatalf("TakeUp after the launcher's end: %v, %v", m, err)
		}
	}
	clean(t, c.RunDir)
	start(t, c)
}

// A detached machine goes on when its launcher is killed; another process takes it up and has its streams, disks and end.
func TestVMTakeUp(t *testing.T) {
	c := fromTemplate(t)
	c.Detached = true
	c.Disks = []Disk{{Key: "a", Path: image(t, "first", 1<<20)}}
	l := startLauncher(t, c)
	pid, _ := l.ready(t)
	t.Cleanup(func() { Kill(c.RunDir) })
	if _, err := TakeUp(t.Context(), c.RunDir); !errors.Is(err, ErrAttended) {
		t.Errorf("TakeUp of an attended machine: %v", err)
	}
	if _, err := Start(t.Context(), c); !errors.Is(err, ErrAttended) {
		t.Errorf("Start beside a launcher: %v", err)
	}
	for range 3 {
		l.Process.Kill()
		l.Wait()
		if got := qemus(t, c.RunDir); !slices.Equal(got, []string{fmt.Sprint(pid)}) {
			t.Fatalf("processes after the launcher's end: %v, want %d", got, pid)
		}
	}
	if _, err := Start(t.Context(), c); !errors.Is(err, ErrRunning) {
		t.Errorf("Start on a live machine: %v", err)
	}
	var m *Machine
	for range 3 {
		var err error
		if m, err = TakeUp(t.Context(), c.RunDir); err != nil {
			t.Fatal(err)
		}
		var got string
		ask(t, m, "read", url.Values{"lun": {"0"}}, &got)
		if got != "first" || m.Info().PID != pid || m.Info().Start != Template {
			t.Errorf("taken up: disk reads %q, %+v", got, m.Info())
		}
		if err := m.Close(); err != nil {
			t.Fatal(err)
		}
		if err := m.Err(); err != nil {
			t.Errorf("Err after Close: %v", err)
		}
	}
	m, err := TakeUp(t.Context(), c.RunDir)
	if err != nil {
		t.Fatal(err)
	}
	if lun, err := m.AddDisk(t.Context(), Disk{Key: "b", Path: image(t, "second", 1<<20)}); err != nil || lun != 1 {
		t.Errorf("AddDisk: LUN %d, %v", lun, err)
	}
	try(t, m, "sysrq", url.Values{"key": {"c"}}, nil)
	<-m.Done()
	var p *PanicError
	if !errors.As(m.Err(), &p) {
		t.Errorf("the end of a machine that was taken up: %v", m.Err())
	}
	if err := m.Close(); err != nil {
		t.Error(err)
	}
	clean(t, c.RunDir)
}

// A detached machine whose launcher ends before it was kept is nobody's: the next one ends it.
func TestVMLauncherKilledBeforeKeep(t *testing.T) {
	t.Setenv("LAUNCH_KEEP", "no")
	c := fromTemplate(t)
	c.Detached = true
	for name, next := range map[string]func(dir string) error{
		"TakeUp": func(dir string) error {
			_, err := TakeUp(t.Context(), dir)
			if errors.Is(err, ErrNotRunning) && errors.Is(err, ErrIncomplete) {
				return nil
			}
			return fmt.Errorf("not what was expected: %w", err)
		},
		"EndIncomplete": EndIncomplete,
	} {
		l := startLauncher(t, c)
		pid, _ := l.ready(t)
		t.Cleanup(func() { Kill(c.RunDir) })
		if err := EndIncomplete(c.RunDir); err != nil {
			t.Errorf("EndIncomplete beside the launcher: %v", err)
		}
		l.Process.Kill()
		l.Wait()
		if got := qemus(t, c.RunDir); !slices.Equal(got, []string{fmt.Sprint(pid)}) {
			t.Fatalf("%s: processes after the launcher's end: %v, want %d", name, got, pid)
		}
		if err := next(c.RunDir); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		clean(t, c.RunDir)
	}
	if err := EndIncomplete(c.RunDir); err != nil {
		t.Errorf("EndIncomplete where nothing runs: %v", err)
	}
	t.Setenv("LAUNCH_KEEP", "yes")
	l := startLauncher(t, c)
	pid, _ := l.ready(t)
	l.Process.Kill()
	l.Wait()
	if err := EndIncomplete(c.RunDir); err != nil {
		t.Error(err)
	}
	if got := qemus(t, c.RunDir); !slices.Equal(got, []string{fmt.Sprint(pid)}) {
		t.Errorf("EndIncomplete of a machine that was kept: processes %v, want %d", got, pid)
	}
}

// Process ids come again. The state of another boot, or of a process that has ended, names nobody.
func TestVMTakeUpKnowsAStranger(t *testing.T) {
	c := config(t)
	stranger, err := startTime(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	boot, err := bootID()
	if err != nil {
		t.Fatal(err)
	}
	for name, s := range map[string]state{
		"other start time": {Version: stateVersion, BootID: boot, PID: os.Getpid(), StartTime: stranger + 1, Ready: true},
		"other boot":       {Version: stateVersion, BootID: "another", PID: os.Getpid(), StartTime: stranger, Ready: true},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			if err := s.write(dir); err != nil {
				t.Fatal(err)
			}
			if _, err := TakeUp(t.Context(), dir); !errors.Is(err, ErrNotRunning) {
				t.Errorf("TakeUp: %v", err)
			}
			clean(t, dir)
		})
	}
	_ = c
}

// Streams of several sessions: a launcher that loses its session gets another one.
func TestVMSessionBreaks(t *testing.T) {
	c := fromTemplate(t)
	m := start(t, c)
	for range 3 {
		m.mu.Lock()
		m.session.Close()
		m.mu.Unlock()
		var s string
		ask(t, m, "uuid", nil, &s)
	}
	conn, err := m.Open(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	io.WriteString(conn, "GET "+wire.PathStatus+" HTTP/1.0\r\n\r\n")
	if answer, err := io.ReadAll(conn); err != nil || !strings.HasPrefix(string(answer), "HTTP/1.0 404") {
		t.Errorf("a plain stream answers %.40q, %v", answer, err)
	}
}
