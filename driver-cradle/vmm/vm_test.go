//go:build vm

package vmm

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/cradlestack/cradlestack/driver-cradle/boot"
	"github.com/cradlestack/cradlestack/driver-cradle/boot/boottest"
	"github.com/cradlestack/cradlestack/spec"
)

// shared is what all tests of this package use: one boot package with the test agent, one cache of templates.
var shared struct {
	dir string
	pkg *boot.Package
}

func TestMain(m *testing.M) {
	Confine()
	switch {
	case len(os.Args) > 1 && os.Args[1] == hostileArg:
		hostile()
		return
	case len(os.Args) > 1 && os.Args[1] == thiefArg:
		thief()
		return
	case os.Args[0] == launcherName:
		if err := launch(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	boottest.Main(m, "./testdata/agent", func(dir string, p *boot.Package) error {
		shared.dir, shared.pkg = dir, p
		return nil
	}, nil)
}

// patience is how long a test waits for what has to come, on a machine that may be busy with much else.
const patience = 3 * time.Minute

func testContext() (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.Background(), patience)
}

// firstUID is the first of the users of this process's machines. Other processes' tests, which run at the same time, have others.
var firstUID = 0x60000000 + os.Getpid()&0xfff<<16

func config(t testing.TB) Config {
	if os.Getuid() != 0 {
		t.Fatal("tests of virtual machines need root")
	}
	if _, err := exec.LookPath(qemuName); err != nil {
		t.Fatal(ErrNoQEMU)
	}
	return Config{
		Package: shared.pkg, Accel: TCG, Start: Cold, Memory: 64 << 20,
		RunDir: filepath.Join(t.TempDir(), "run"), CacheDir: filepath.Join(shared.dir, "cache"), FirstUID: firstUID,
		Log: slog.New(slog.NewTextHandler(testWriter{t}, &slog.HandlerOptions{Level: slog.LevelDebug})),
	}
}

type testWriter struct{ testing.TB }

func (w testWriter) Write(p []byte) (int, error) {
	w.Logf("%s", strings.TrimSpace(string(p)))
	return len(p), nil
}

func start(t testing.TB, c Config) *Machine {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	m, err := Start(ctx, c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := m.Kill(); err != nil {
			t.Error(err)
		}
		if err := m.Close(); err != nil {
			t.Error(err)
		}
	})
	return m
}

// ask has the test agent do something and decodes its answer into v unless that is nil.
func ask(t testing.TB, m *Machine, what string, form url.Values, v any) {
	t.Helper()
	if err := try(t, m, what, form, v); err != nil {
		t.Fatalf("%s in the guest: %v", what, err)
	}
}

func try(t testing.TB, m *Machine, what string, form url.Values, v any) error {
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://guest/test/"+what, strings.NewReader(form.Encode()))
	if err != nil {
		return err
	}
	req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	resp, err := m.Client().Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		return err
	}
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("%s: %s", resp.Status, body)
	}
	if v == nil {
		return nil
	}
	return json.Unmarshal(body, v)
}

func image(t testing.TB, text string, size int64) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "disk.img")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(path, size); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestVMColdStart(t *testing.T) {
	c := config(t)
	c.Disks = []Disk{{Key: "a", Path: image(t, "first", 1<<20), ReadOnly: true}, {Key: "b", Path: image(t, "second", 2<<20)}}
	began := time.Now()
	m := start(t, c)
	t.Logf("hello after %v: %+v", time.Since(began), m.Info())
	var got string
	ask(t, m, "read", url.Values{"lun": {"0"}}, &got)
	if got != "first" {
		t.Errorf("disk 0 reads %q", got)
	}
	ask(t, m, "write", url.Values{"lun": {"1"}, "text": {"written"}}, nil)
	if data, _ := os.ReadFile(c.Disks[1].Path); !strings.HasPrefix(string(data), "written") {
		t.Errorf("image of disk 1 holds %.20q", data)
	}
	if err := try(t, m, "write", url.Values{"lun": {"0"}, "text": {"written"}}, nil); err == nil {
		t.Error("a read-only disk could be written")
	}
}

func TestVMFromTemplate(t *testing.T) {
	for range 3 {
		c := config(t)
		c.Start = Template
		c.Disks = []Disk{{Key: "a", Path: image(t, "first", 1<<20), ReadOnly: true}, {Key: "b", Path: image(t, "second", 2<<20)}}
		began := time.Now()
		m := start(t, c)
		t.Logf("hello after %v: %+v", time.Since(began), m.Info())
		var got string
		ask(t, m, "read", url.Values{"lun": {"0"}}, &got)
		if got != "first" {
			t.Errorf("disk 0 reads %q", got)
		}
	}
}

// Where KVM is of no use, an automatic start says why; the measurement ends in any case.
func TestVMAccelerator(t *testing.T) {
	c := config(t)
	c.Accel, c.Start = Auto, Template
	m := start(t, c)
	switch i := m.Info(); {
	case i.Accel == TCG && i.AccelWhy == "":
		t.Error("no reason for tcg")
	case i.Accel == KVM && i.AccelWhy != "":
		t.Errorf("kvm because %s", i.AccelWhy)
	}
	if _, err := os.Stat(kvmDevice); err == nil {
		t.Logf("the guest loop: %v", measureKVM())
	}
}

// A KVM that passes for usable and does not bring a guest up costs one attempt.
func TestVMKVMThatFails(t *testing.T) {
	t.Parallel() // it may wait
	c := config(t)
	c.Accel = Auto
	if _, err := os.Stat(kvmDevice); err == nil { // else there is nothing to wait for, and a busy machine may be slow without
		c.HelloTimeout = 20 * time.Second
	}
	if err := c.check(); err != nil {
		t.Fatal(err)
	}
	m, err := c.startOn(t.Context(), mustQEMU(t, c), KVM, "")
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	defer m.Kill()
	i := m.Info()
	if i.Accel == TCG && !strings.Contains(i.AccelWhy, "kvm failed") {
		t.Errorf("%+v", i)
	}
	if _, err := os.Stat(kvmDevice); err != nil && i.Accel != TCG {
		t.Errorf("%s without %s", i.Accel, kvmDevice)
	}
	t.Logf("%.300s", m.Info().AccelWhy)
}

func TestVMUserNetwork(t *testing.T) {
	t.Parallel() // its guest waits for what does not answer
	for _, how := range []string{Cold, Template} {
		t.Run(how, func(t *testing.T) { userNetwork(t, how) })
	}
}

func userNetwork(t *testing.T, how string) {
	local, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer local.Close()
	go func() {
		for {
			conn, err := local.Accept()
			if err != nil {
				return
			}
			io.WriteString(conn, "secret")
			conn.Close()
		}
	}()
	secret, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer secret.Close()
	heard := make(chan string, 10)
	go func() {
		b := make([]byte, 100)
		for {
			n, _, err := secret.ReadFrom(b)
			if err != nil {
				return
			}
			heard <- string(b[:n])
		}
	}()

	c := config(t)
	c.Start = how
	c.Net = Net{Mode: NetUser, Publish: []spec.Publish{
		{HostIP: "127.0.0.1", Port: 80}, {Port: 81}, {HostIP: "127.0.0.1", Port: 53, Protocol: "udp"},
	}}
	m := start(t, c)
	ports := m.Info().Publish
	ask(t, m, "net", nil, nil)
	ask(t, m, "listen", url.Values{"network": {"tcp"}, "address": {":80"}}, nil)
	ask(t, m, "listen", url.Values{"network": {"tcp"}, "address": {":81"}}, nil)
	ask(t, m, "listen", url.Values{"network": {"udp"}, "address": {":53"}}, nil)
	for _, p := range ports {
		conn, err := net.Dial(p.Protocol, fmt.Sprintf("127.0.0.1:%d", p.HostPort))
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		b := make([]byte, 100)
		n := 0
		wait := patience
		if p.Protocol == "udp" {
			wait = 10 * time.Second
		}
		for range 10 { // nobody promises that a datagram arrives
			conn.SetDeadline(time.Now().Add(wait))
			io.WriteString(conn, "hello")
			if n, err = conn.Read(b); p.Protocol != "udp" || !errors.Is(err, os.ErrDeadlineExceeded) {
				break
			}
		}
		if string(b[:n]) != "HELLO" {
			t.Errorf("published port %+v answers %q, %v", p, b[:n], err)
		}
	}
	var dials sync.WaitGroup // each takes seconds to fail
	_, port, _ := net.SplitHostPort(local.Addr().String())
	for _, host := range []string{UserGateway, "127.0.0.1", "10.0.2.3", "10.0.2.77", "0.0.0.0", "127.9.9.9"} {
		dials.Go(func() {
			var got string
			err := try(t, m, "dial", url.Values{"network": {"tcp"}, "address": {net.JoinHostPort(host, port)}, "text": {"x"}}, &got)
			if err == nil || got != "" {
				t.Errorf("the guest reaches the host's loopback interface as %s: %q", host, got)
			}
		})
	}
	dials.Go(func() {
		_, port, _ := net.SplitHostPort(secret.LocalAddr().String())
		if err := try(t, m, "dial", url.Values{"network": {"udp"}, "address": {net.JoinHostPort(UserGateway, port)}, "text": {"x"}}, nil); err == nil {
			t.Error("a datagram to the loopback interface was answered")
		}
	})
	dials.Wait()
	select {
	case s := <-heard:
		t.Errorf("the loopback interface received %q from the guest", s)
	default:
	}
}

// The cgroup of user networks goes with the last machine in it, whoever finds that one ended.
func TestVMUserNetworkLeavesNoCgroup(t *testing.T) {
	c := fromTemplate(t)
	c.Cgroup, c.Net = ownGroup(t), Net{Mode: NetUser}
	group := filepath.Join(c.Cgroup, loopbackGroup)
	there := func() bool { _, err := os.Stat(group); return err == nil }
	for range 2 {
		one, other := start(t, again(t, c)), start(t, again(t, c))
		if err := one.Kill(); err != nil || !there() {
			t.Fatalf("the first of two machines has ended: %v, the cgroup is there: %v", err, there())
		}
		if err := other.Kill(); err != nil || there() {
			t.Errorf("both machines have ended: %v, the cgroup is there: %v", err, there())
		}
	}
	c.Detached = true
	l := startLauncher(t, c)
	pid, _ := l.ready(t)
	l.Process.Kill()
	l.Wait()
	p, err := openProcess(pid, mustStartTime(t, pid))
	if err != nil {
		t.Fatal(err)
	}
	defer p.file.Close()
	if err := errors.Join(p.kill(), p.wait()); err != nil || !there() {
		t.Fatalf("nobody has seen the machine's end: %v, the cgroup is there: %v", err, there())
	}
	if _, err := TakeUp(t.Context(), c.RunDir); !errors.Is(err, ErrNotRunning) || there() {
		t.Errorf("TakeUp: %v, the cgroup is there: %v", err, there())
	}
}

// Machines that come and go at once never have the cgroup removed before they are in it.
func TestVMLoopbackGroupIsKeptWhileOpen(t *testing.T) {
	parent := ownGroup(t)
	path := filepath.Join(parent, loopbackGroup)
	var g sync.WaitGroup
	for range 4 {
		g.Go(func() {
			for range 10 {
				f, err := noLoopback(parent)
				if err != nil {
					t.Error(err)
					return
				}
				sleep := exec.Command("sleep", "60")
				sleep.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(f.Fd())}
				if err := sleep.Start(); err != nil {
					t.Error(err)
				}
				f.Close()
				removeGroup(path)
				if _, err := os.Stat(path); err != nil {
					t.Errorf("removed under a process: %v", err)
				}
				sleep.Process.Kill()
				sleep.Wait()
				removeGroup(path)
			}
		})
	}
	g.Wait()
	removeGroup(path)
	if _, err := os.Stat(path); err == nil {
		t.Error("the cgroup stays behind")
	}
}

// ownGroup makes a cgroup for the test.
func ownGroup(t *testing.T) string {
	parent, err := ownCgroup()
	if err != nil {
		t.Fatal(err)
	}
	path, err := os.MkdirTemp(parent, "vmm-test-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.Remove(path); err != nil {
			t.Error(err)
		}
	})
	return path
}

func mustStartTime(t *testing.T, pid int) uint64 {
	t.Helper()
	begun, err := startTime(pid)
	if err != nil {
		t.Fatal(err)
	}
	return begun
}

func TestVMShares(t *testing.T) {
	for name, set := range map[string]func(*Config, []Share){
		"9p":       func(c *Config, s []Share) { c.Shares, c.Start = s, Template },
		"virtiofs": func(c *Config, s []Share) { c.Virtiofs, c.Start = s, Auto },
	} {
		t.Run(name, func(t *testing.T) {
			dir, other, file := t.TempDir(), t.TempDir(), filepath.Join(t.TempDir(), "file")
			if err := os.WriteFile(file, []byte("one file"), 0o600); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(filepath.Join(other, "f"), []byte("of a directory"), 0o600); err != nil {
				t.Fatal(err)
			}
			if err := os.Symlink("/etc/shadow", filepath.Join(dir, "shadow")); err != nil {
				t.Fatal(err)
			}
			c := config(t)
			set(&c, []Share{{"rw", dir, false}, {"ro", other, true}, {"one", file, false}})
			m := start(t, c)
			ask(t, m, strings.Replace(name, "virtiofs", "fs", 1), nil, nil)
			for path, want := range map[string]string{"/mnt/ro/f": "of a directory", "/mnt/one": "one file"} {
				var got string
				if ask(t, m, "file", url.Values{"path": {path}}, &got); got != want {
					t.Errorf("%s reads %q", path, got)
				}
			}
			ask(t, m, "put", url.Values{"path": {"/mnt/rw/new"}, "text": {"from the guest"}, "uid": {"1234"}}, nil)
			fi, err := os.Stat(filepath.Join(dir, "new"))
			if err != nil {
				t.Fatal(err)
			}
			if uid := fi.Sys().(*syscall.Stat_t).Uid; uid != 1234 {
				t.Errorf("a file of the guest's user 1234 belongs to %d", uid)
			}
			if err := try(t, m, "put", url.Values{"path": {"/mnt/ro/new"}, "text": {"x"}}, nil); err == nil {
				t.Error("a read-only share could be written")
			}
			if err := try(t, m, "mknod", url.Values{"path": {"/mnt/rw/sda"}}, nil); err == nil {
				t.Error("the guest made a device node on the host")
			}
			var got string
			if err := try(t, m, "file", url.Values{"path": {"/mnt/rw/../../proc/1/root/etc/shadow"}}, &got); err == nil {
				t.Errorf("outside of the share: %.20q", got)
			}
		})
	}
}

// A machine that was booted cold gives memory that its guest no longer uses back to the host.
func TestVMFreeMemoryIsGivenBack(t *testing.T) {
	t.Parallel() // the guest's kernel takes its time
	c := config(t)
	c.Memory = 256 << 20
	m := start(t, c)
	resident := func() int64 {
		s, err := m.Stats(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		return s.RSS
	}
	ask(t, m, "dirty", url.Values{"mib": {"150"}, "keep": {"1"}}, nil)
	peak := resident()
	ask(t, m, "free", nil, nil)
	// The guest's kernel reports large free blocks, some of them each time that one comes to be.
	if !eventually(func() bool { return resident() < peak-40<<20 }) {
		t.Errorf("%d MiB resident, at the peak %d", resident()>>20, peak>>20)
	}
}
