//go:build vm

package guest_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cradlestack/cradlestack/driver-cradle/guest"
	"github.com/cradlestack/cradlestack/driver-cradle/vmm"
	"github.com/cradlestack/cradlestack/driver-cradle/wire"
	"github.com/cradlestack/cradlestack/spec"
)

// Whatever is at /etc, the agent neither hangs nor leaves the container's root.
func TestVMHostileFiles(t *testing.T) {
	share := t.TempDir()
	etc := func(name string, make func(dir string) error) spec.Container {
		t.Helper()
		dir := filepath.Join(share, name)
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := make(dir); err != nil {
			t.Fatal(err)
		}
		return with(sh(name, "id -u; ls /"), "share:/etc:sub="+name)
	}
	link := func(to, name string) func(string) error {
		return func(dir string) error { return os.Symlink(to, filepath.Join(dir, name)) }
	}
	p := podSpec{
		shares: []vmm.Share{{Name: "dir", Path: share}},
		dirs:   []wire.Directory{{Volume: "share", Tag: wire.ShareTag, Type: "9p", Path: "dir"}},
	}
	p.Volumes = []spec.Volume{{Name: "share", Directory: &spec.DirectoryVolume{Path: share}}}
	p.Containers = []spec.Container{
		etc("fifo", func(dir string) error { return unix.Mkfifo(filepath.Join(dir, "passwd"), 0o644) }),
		etc("zero", link("/dev/zero", "passwd")),
		etc("huge", func(dir string) error {
			if err := os.WriteFile(filepath.Join(dir, "group"), nil, 0o644); err != nil {
				return err
			}
			return os.Truncate(filepath.Join(dir, "group"), 1<<40)
		}),
		etc("long", func(dir string) error {
			return os.WriteFile(filepath.Join(dir, "passwd"), []byte(strings.Repeat("x", 3<<20)), 0o644)
		}),
		etc("escape", link("../../../../../../out", "resolv.conf")),
		etc("absolute", link("/run/cradle/out/side", "hosts")),
		etc("loop", link("hostname", "hostname")),
	}
	for i := range p.Containers {
		p.Containers[i].User = "12:34"
	}
	for i := range 2 {
		p.Containers[i].User = "somebody"
	}
	loop := p.Containers[len(p.Containers)-1]
	p.Containers = p.Containers[:len(p.Containers)-1]
	m := boots(t, p)
	s := m.ends()
	for i, c := range s.Containers {
		stdout, _ := m.logs(c.Name)
		switch c.Name {
		case "fifo", "zero":
			if c.ExitCode != 125 || c.Error != "unable to find user somebody: no matching entries in passwd file" {
				t.Errorf("%s: %+v", c.Name, s.Containers[i])
			}
		case "escape":
			if !strings.Contains(stdout, "12\n") || !strings.Contains(stdout, "out\n") {
				t.Errorf("a link out of the root does not end in it: %q", stdout)
			}
		case "absolute":
			if !strings.Contains(stdout, "run\n") {
				t.Errorf("an absolute link does not end in the root: %q", stdout)
			}
		case "huge", "long": // as docker
			if c.ExitCode != 125 || !strings.HasSuffix(c.Error, "token too long") {
				t.Errorf("%s: %+v, %q", c.Name, s.Containers[i], stdout)
			}
		}
	}

	p = podSpec{shares: p.shares, dirs: p.dirs, Launch: spec.Launch{Volumes: p.Volumes, Containers: []spec.Container{loop}}}
	if _, err := tryBoot(t, p); err == nil || !strings.Contains(err.Error(), "too many") {
		t.Errorf("a loop of links: %v", err)
	}
}

// A container that takes all it can get harms itself only.
func TestVMExhaustion(t *testing.T) {
	p := podSpec{disks: []vmm.Disk{{Key: wire.DiskScratch, Path: disk(t, "ext4", 64<<20)}}}
	p.Resources.Memory = 96 << 20
	bomb := sh("bomb", "echo up; while :; do f() { f | f & }; f; sleep 0.2; done & exec sleep 1000") // the first process needs no other
	hog := sh("hog", "echo up; dd if=/dev/zero of=/dev/shm/x bs=1M; exec tail -f /dev/zero")
	full := sh("full", "dd if=/dev/zero of=/x bs=1M 2>/dev/null; touch /y; echo full; sleep 1000")
	files := sh("files", "i=3; while eval \"exec $i</dev/null\" 2>/dev/null && [ $i -lt 200 ]; do i=$((i+1)); done; echo open; sleep 1000")
	main := sh("main", "echo up; sleep 1000")
	main.Lifecycle.Critical = true
	p.Containers = []spec.Container{main, full, hog, files, bomb}
	m := boots(t, p)
	m.prints("main", "up")
	m.prints("full", "full")
	m.prints("bomb", "up")
	time.Sleep(3 * time.Second) // the bomb spreads
	begin := time.Now()
	if err := m.do("bomb", "kill", "signal", "KILL"); err != nil {
		t.Error(err)
	}
	var ended struct{ Code int }
	if err := m.call("GET", "/wait?c=bomb", nil, &ended); err != nil || ended.Code != 137 {
		t.Errorf("bomb: %+v, %v", ended, err)
	}
	t.Logf("the bomb was dead after %s", time.Since(begin))
	if err := m.call("GET", "/wait?c=hog", nil, &ended); err != nil || ended.Code != 137 {
		t.Errorf("hog: %+v, %v", ended, err)
	}
	if s := m.state("hog"); !s.OOMKilled {
		t.Errorf("hog was not killed for memory: %+v", s)
	}
	if s := m.state("main"); s.Running {
		if e := m.exec("main", guest.ExecConfig{Args: []string{"echo", "alive"}}, ""); e.Stdout != "alive\n" {
			t.Errorf("exec beside them: %+v", e)
		}
	}
	var s wire.Status
	if err := m.call("POST", wire.PathShutdown+"?timeout=1", nil, &s); err != nil || s.State != wire.StateExited {
		t.Errorf("shutdown: %+v, %v", s, err)
	}
}
