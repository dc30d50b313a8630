//go:build vm && soak

package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cradlestack/cradlestack/csi-plugin/filer/api"
	"github.com/cradlestack/cradlestack/internal/locked"
	"github.com/cradlestack/cradlestack/test/programs"
)

// TestVMSoakFilerMounts: in a machine whose kernel has an NFS client, hosts mount what a filer keeps, by cradle-csi --backend filer. The tests are those of mounts_lab_test.go.
func TestVMSoakFilerMounts(t *testing.T) {
	job, lab := mountsJob(t, `hostname zfs
cd csi-plugin/filer
./filer.test -test.v -test.timeout 2h -test.run '^(`+env("LAB_MOUNTS", "TestLabMounts.*")+`)$'
`)
	var console bytes.Buffer
	cmd := exec.Command(lab, "run", job)
	cmd.Env = append(os.Environ(), "ZFSLAB_TIMEOUT=7200", "ZFSLAB_MEMORY=2560")
	cmd.Stdout = io.MultiWriter(&console, t.Output())
	cmd.Stderr = cmd.Stdout
	if err := cmd.Run(); err != nil || !strings.Contains(console.String(), "all passed") {
		t.Fatalf("%v\n%s", err, console.Bytes()[max(0, console.Len()-32<<10):])
	}
}

// TestVMSoakFilerMountsSet: a machine has a volume of a set of filers mounted, and writes line after line to it, each synced before the next, while the filers take over from each other. No call ends
// with an error, and every line is there.
func TestVMSoakFilerMountsSet(t *testing.T) {
	p := newPair(t, 5*time.Second)
	p.ip("-n", p.ns("sw"), "tuntap", "add", "lab", "mode", "tap")
	p.ip("-n", p.ns("sw"), "link", "set", "dev", "lab", "master", "bridge0", "up")
	job, lab := mountsJob(t, `hostname client
for do in "netns add lab" "link set eth0 netns lab" "-n lab link set lo up" "-n lab addr add 10.77.0.7/24 dev eth0" "-n lab link set eth0 up"; do /bin/ip $do; done # not the shell's own
LAB_SET=`+p.hosts[1].address+":"+api.PeersPort+` ./csi-plugin/filer/filer.test -test.v -test.timeout 2h -test.run '^TestLabSet$'
`)
	key, err := os.ReadFile(filepath.Join(p.pool, setState, "handles.key"))
	if err == nil {
		err = os.WriteFile(filepath.Join(job, "set.key"), key, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	var console locked.Buffer
	cmd := exec.Command("ip", "netns", "exec", p.ns("sw"), lab, "run", job)
	cmd.Env = append(os.Environ(), "ZFSLAB_TIMEOUT=7200", "ZFSLAB_NET=tap,ifname=lab,script=no,downscript=no")
	cmd.Stdout = io.MultiWriter(&console, t.Output())
	cmd.Stderr = cmd.Stdout
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		err = cmd.Wait()
	}()
	defer func() {
		_ = unix.Kill(-cmd.Process.Pid, unix.SIGKILL)
		<-ended
	}()
	volume := filepath.Join(p.pool, "shared", "data")
	lines := func() int {
		text, _ := os.ReadFile(filepath.Join(volume, "lines"))
		return bytes.Count(text, []byte("\n"))
	}
	goesOn := func() {
		t.Helper()
		was := lines()
		p.eventually("the writer goes on", func() error {
			select {
			case <-ended:
				t.Fatal(err)
			default:
			}
			if n := lines(); n < was+5 {
				return fmt.Errorf("there are %d lines, of %d before", n, was)
			}
			return nil
		})
	}
	goesOn()
	for range 3 {
		for _, d := range drills {
			active, other := p.active()
			d.do(p, active, other)
			goesOn()
			p.eventually("a filer is active, and the other stands by", p.settled)
			t.Logf("%s: %d lines", d.name, lines())
		}
	}
	if err := os.WriteFile(filepath.Join(volume, "end"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	<-ended
	if err != nil || !strings.Contains(console.String(), "all passed") {
		t.Error(err)
	}
	if entries, err := os.ReadDir(filepath.Join(p.pool, "shared")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("left of the volume: %v, %v", entries, err)
	}
}

// mountsJob is what those machines have, and what they do once they have it.
func mountsJob(t *testing.T, script string) (job, lab string) {
	t.Helper()
	root, err := programs.Root()
	if err != nil {
		t.Fatal(err)
	}
	if lab, err = programs.Lab(); err != nil {
		t.Fatal(err)
	}
	job = t.TempDir()
	place := func(name, from string) {
		t.Helper()
		at := filepath.Join(job, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(at), 0o755), os.Symlink(from, at)); err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range []string{"cradle-filer", "cradle-csi", "cradle-s3"} {
		program, err := programs.Path(name)
		if err != nil {
			t.Fatal(err)
		}
		place("bin/"+name, program)
	}
	for _, name := range []string{"csi-sanity", "consul"} {
		program, err := programs.Tool(name)
		if err != nil {
			t.Fatal(err)
		}
		place("tools/"+name, program)
	}
	place("arch_test.go", filepath.Join(root, "arch_test.go")) // the repository's root is where it is
	place("docs/nfs.md", filepath.Join(root, "docs/nfs.md"))
	test := filepath.Join(job, "csi-plugin/filer/filer.test")
	if err := os.MkdirAll(filepath.Dir(test), 0o755); err != nil {
		t.Fatal(err)
	}
	build := exec.Command("go", "test", "-c", "-trimpath", "-tags", "vm,soak,zfslab", "-o", test, "./csi-plugin/filer")
	build.Env, build.Dir = append(os.Environ(), "CGO_ENABLED=0"), root
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v: %v\n%s", build.Args, err, out)
	}
	ganeshaSystem(t, job, "zfs", "/bin/bash", "/sbin/ip", "/bin/umount", "/bin/mount")
	for name, text := range map[string]string{
		"tools/build.sh": "#!/bin/sh\necho $(dirname $(readlink -f $0))/$1\n",
		"run.sh": `set -e
cp -a system/. /
rm -f /bin/ip; ln -s /sbin/ip /bin/ip
mkdir -p /run/netns /var/lib /tmp
mount -t tmpfs tmpfs /run
zpool create -o cachefile=none -O mountpoint=none tank /dev/vda1
mkdir /xfs; zfs create -V 1g -s tank/tmp; n=0; until [ -e /dev/zd0 ]; do sleep 1; n=$((n+1)); [ $n -lt 30 ]; done
mkfs.xfs -q /dev/zd0; mount /dev/zd0 /xfs
export TMPDIR=/xfs
` + script + `echo all passed
`,
	} {
		if err := os.WriteFile(filepath.Join(job, name), []byte(text), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	return job, lab
}

func env(name, fallback string) string {
	if v := os.Getenv(name); v != "" {
		return v
	}
	return fallback
}
