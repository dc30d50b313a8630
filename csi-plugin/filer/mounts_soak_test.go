//go:build vm && soak

package main

import (
	"bytes"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/cradlestack/cradlestack/test/programs"
)

// TestVMSoakFilerMounts: in a machine whose kernel has an NFS client, hosts mount what a filer keeps, by cradle-csi --backend filer. The tests are those of mounts_lab_test.go.
func TestVMSoakFilerMounts(t *testing.T) {
	root, err := programs.Root()
	if err != nil {
		t.Fatal(err)
	}
	lab, err := programs.Lab()
	if err != nil {
		t.Fatal(err)
	}
	job := t.TempDir()
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
	script := map[string]string{
		"tools/build.sh": "#!/bin/sh\necho $(dirname $(readlink -f $0))/$1\n",
		"run.sh": `set -e
cp -a system/. /
rm -f /bin/ip; ln -s /sbin/ip /bin/ip
hostname zfs
mkdir -p /run/netns /var/lib /tmp
mount -t tmpfs tmpfs /run
zpool create -o cachefile=none -O mountpoint=none tank /dev/vda1
mkdir /xfs; zfs create -V 1g -s tank/tmp; n=0; until [ -e /dev/zd0 ]; do sleep 1; n=$((n+1)); [ $n -lt 30 ]; done
mkfs.xfs -q /dev/zd0; mount /dev/zd0 /xfs
export TMPDIR=/xfs
cd csi-plugin/filer
./filer.test -test.v -test.timeout 2h -test.run '^(` + env("LAB_MOUNTS", "TestLabMounts.*") + `)$'
echo all passed
`,
	}
	for name, text := range script {
		if err := os.WriteFile(filepath.Join(job, name), []byte(text), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	var console bytes.Buffer
	cmd := exec.Command(lab, "run", job)
	cmd.Env = append(os.Environ(), "ZFSLAB_TIMEOUT=7200", "ZFSLAB_MEMORY=2560")
	cmd.Stdout = io.MultiWriter(&console, t.Output())
	cmd.Stderr = cmd.Stdout
	if err := cmd.Run(); err != nil || !strings.Contains(console.String(), "all passed") {
		t.Fatalf("%v\n%s", err, console.Bytes()[max(0, console.Len()-32<<10):])
	}
}

func env(name, fallback string) string {
	if v := os.Getenv(name); v != "" {
		return v
	}
	return fallback
}
