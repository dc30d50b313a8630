//go:build vm

package main

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cradlestack/cradlestack/internal/filertest"
	"github.com/cradlestack/cradlestack/test/programs"
)

// A pod is a microVM with busybox in it; its guest's kernel is the NFS client.
type pod struct {
	t       *testing.T
	kcradle string
	dir     string
	cmd     *exec.Cmd
	out     bytes.Buffer
}

// start runs a script in a pod.
func start(t *testing.T, script string, flags ...string) *pod {
	t.Helper()
	kcradle, err := programs.Path("kcradle")
	if err != nil {
		t.Fatal(err)
	}
	image, err := programs.Image("busybox")
	if err != nil {
		t.Fatal(err)
	}
	p := &pod{t: t, kcradle: kcradle, dir: filepath.Join(t.TempDir(), "pod")}
	args := append([]string{"summon", p.dir, "oci:" + image, "-m", "128m"}, flags...)
	if out, err := exec.Command(kcradle, append(args, "--", "sh", "-c", script)...).CombinedOutput(); err != nil {
		t.Fatalf("kcradle summon: %v\n%s", err, out)
	}
	t.Cleanup(func() { _ = exec.Command(kcradle, "rm", "-f", p.dir).Run() })
	p.cmd = exec.CommandContext(t.Context(), kcradle, "run", p.dir)
	p.cmd.Stdout, p.cmd.Stderr = &p.out, &p.out
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	return p
}

// says checks the output of a pod that has to end well.
func (p *pod) says(want string) {
	p.t.Helper()
	if err := p.cmd.Wait(); err != nil || p.out.String() != want {
		p.t.Errorf("the pod says (%v)\n%s\nand should\n%s", err, &p.out, want)
	}
}

// TestVMFiles does with files on the filer, by a guest's kernel, what other tests do by hand: as several users, in two pods at once, and with many names.
func TestVMFiles(t *testing.T) {
	f := filertest.Start(t)
	host := f.Volume("v", 256<<20, map[string]string{"fs": "xfs"})
	if err := os.Symlink("/etc/hostname", filepath.Join(host, "out")); err != nil {
		t.Fatal(err)
	}
	writable, readable := f.Publish("v"), f.Publish("v", "--read-only")
	start(t, `cd /v; umask 022
		set -C; echo one >exclusive; (echo two >exclusive) 2>/dev/null || echo refused; set +C; cat exclusive
		echo two >>exclusive; cat exclusive; mv exclusive renamed; ln renamed hard; stat -c %h hard; rm renamed; cat hard
		ln -s hard soft; readlink soft; truncate -s 1M hole; stat -c %s hole; test $(stat -c %b hole) -lt 64 && echo sparse
		exec 3<hard; rm hard; cat <&3; ls | sort | tr '\n' ' '; exec 3<&-; mkdir dir; rmdir dir; mkdir dir; touch dir/x; rmdir dir 2>/dev/null || echo full
		cmp -s out /etc/hostname && echo "the link leads to this pod"
		mknod null c 1 3 2>/dev/null || echo no devices; mkfifo fifo && stat -c %F fifo
		mkdir -m 1777 everyone; chown 1000:1000 hole; chmod 4755 hole; stat -c %a:%u hole
		sed -i 's/.*1000.*//' /etc/passwd; echo 'u:x:1000:1000::/:/bin/sh' >>/etc/passwd; echo 'w:x:1001:1001::/:/bin/sh' >>/etc/passwd
		su u -c 'echo mine >/v/everyone/u; chmod 600 /v/everyone/u; mkdir -m 700 /v/everyone/d; echo x >/v/everyone/d/x'
		su w -c 'cat /v/everyone/u /v/everyone/d/x 2>/dev/null || echo not mine; rm -f /v/everyone/u 2>/dev/null || echo sticky; touch /v/nothing 2>/dev/null || echo closed'
		stat -c %u:%g:%a everyone/u everyone/d/x`,
		"--privileged", "--mount", writable.Mount("/v")).says(`refused
one
one
two
2
one
two
hard
1048576
sparse
one
two
hole out soft full
the link leads to this pod
no devices
fifo
4755:1000
not mine
sticky
closed
1000:1000:600
1000:1000:644
`)
	for name, want := range map[string]uint32{"everyone/u": 1000, "everyone/d": 1000, "hole": 1000, "soft": 0} {
		var st unix.Stat_t
		if err := unix.Lstat(filepath.Join(host, name), &st); err != nil || st.Uid != want {
			t.Errorf("%s belongs to %d on this host, %v", name, st.Uid, err)
		}
	}
	// Ten thousand names, a part of them made by a client.
	many := filepath.Join(host, "many")
	if err := os.Mkdir(many, 0o777); err != nil {
		t.Fatal(err)
	}
	for i := range 9800 {
		if err := os.WriteFile(filepath.Join(many, fmt.Sprintf("%05d", i)), nil, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	start(t, `cd /v/many; for i in $(seq 9800 9999); do : >0$i; done; ls | wc -l; ls | sort -u | wc -l; ls -l | grep -c ' 0 '; find . -name '*777' | xargs rm; ls | wc -l`,
		"--mount", writable.Mount("/v")).says("10000\n10000\n10000\n9990\n")
	// The other publication is of the same files, and changes none.
	start(t, `cat /v/everyone/d/x; ls /v/many | wc -l; touch /v/new 2>/dev/null || echo refused; mount -o remount,rw /v 2>/dev/null; touch /v/new 2>/dev/null || echo refused`,
		"--privileged", "--mount", readable.Mount("/v")).says("x\n9990\nrefused\nrefused\n")
	if out, err := f.Command("publications"); err != nil || strings.Count(out, "\n") != 3 || strings.Contains(out, writable.Export) {
		t.Errorf("the publications: %v\n%s", err, out)
	}
}

// TestVMFilerKilled kills the filer again and again while a pod writes. What the pod was told is written is there, and it has seen no error.
func TestVMFilerKilled(t *testing.T) {
	f := filertest.Start(t)
	host := f.Volume("v", 0, nil)
	p := start(t, `cd /v; i=0; until [ -e stop ]; do i=$((i+1)); head -c 20000 /dev/urandom >/tmp/x; cp /tmp/x $i && sync $i || exit 1; echo $(sha256sum </tmp/x | cut -c1-64) $i; done`,
		"--mount", f.Publish("v").Mount("/v"))
	for end := time.Now().Add(5 * time.Minute); ; time.Sleep(50 * time.Millisecond) {
		if _, err := os.Stat(filepath.Join(host, "1")); err == nil {
			break
		} else if time.Now().After(end) {
			t.Fatal("the pod does not write")
		}
	}
	for range 6 {
		time.Sleep(1500 * time.Millisecond) // some calls come in between, some meet nobody
		f.Signal(syscall.SIGKILL)
		f.Run()
	}
	if err := os.WriteFile(filepath.Join(host, "stop"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := p.cmd.Wait(); err != nil {
		t.Errorf("the pod: %v\n%s", err, &p.out)
	}
	sums := filepath.Join(t.TempDir(), "sums")
	if err := os.WriteFile(sums, []byte(strings.ReplaceAll(p.out.String(), " ", "  ")), 0o600); err != nil {
		t.Fatal(err)
	}
	check := exec.Command("sha256sum", "--check", "--strict", "--quiet", sums) // which refuses an empty list
	check.Dir = host
	if out, err := check.CombinedOutput(); err != nil {
		t.Errorf("what was acknowledged: %v\n%s", err, out)
	}
	t.Logf("%d files", strings.Count(p.out.String(), "\n"))
}

// TestRootFiler: publications outlast the process, an end of one ends what it mounted, and what can't be published is refused with the reason.
func TestRootFiler(t *testing.T) {
	f := filertest.Start(t)
	f.Volume("v", 32<<20, nil)
	f.Volume("w", 0, nil)
	p := f.Publish("v", "--id", "mine")
	if again := f.Publish("v", "--id", "mine"); again != p {
		t.Errorf("published again it is %+v, not %+v", again, p)
	}
	if other := f.Publish("v"); other.Export == p.Export || other.ID == p.ID {
		t.Errorf("another publication is the same: %+v", other)
	}
	f.Publish("w", "--id", "w", "--read-only")
	refused := func(want string, args ...string) {
		t.Helper()
		if out, err := f.Command(args...); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v: %s, %v; want %s", args, out, err, want)
		}
	}
	refused("publication mine exists, and is another: it is of volume v", "publish", "w", "--id", "mine", "--client", "10.0.0.1")
	refused("volume x: not found", "publish", "x", "--client", "10.0.0.1")
	refused(`"client" not set`, "publish", "v")
	refused("neither an address nor a network", "publish", "v", "--client", "everybody")
	refused("publication: ", "publish", "v", "--id", "../x", "--client", "10.0.0.1")

	list, err := f.Command("publications", "-o", "json")
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range []os.Signal{syscall.SIGTERM, syscall.SIGKILL} {
		f.Signal(s)
		f.Run()
		if now, err := f.Command("publications", "-o", "json"); err != nil || now != list {
			t.Errorf("after %v there are %s, %v", s, now, err)
		}
	}
	if out, err := f.Command("status"); err != nil || !strings.Contains(out, "volumes  2, published 3 times") {
		t.Errorf("status: %s, %v", out, err)
	}
	for _, id := range []string{"mine", "mine", "nobody"} {
		if _, err := f.Command("unpublish", id); err != nil {
			t.Error(err)
		}
	}
}
