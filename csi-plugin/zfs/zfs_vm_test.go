//go:build vm

package zfs

import (
	"bytes"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/cradlestack/cradlestack/test/programs"
)

// TestVMZFS runs the tests of zfs_lab_test.go in a machine that has ZFS, but for the kills at every step, block volumes with xfs, the orders in which families of
// clones go, a pool that gets full, and cold storage, which the soak has; and has the doctor find what a copy has left that did not come to its end. Of dir it runs there what takes a
// capability that some hosts have taken from root: growing a mounted ext4.
func TestVMZFS(t *testing.T) {
	inLab(t, `zpool create -f -O mountpoint=none tank /dev/vda1
./dir.test -test.v -test.run 'TestRootDir/ext4/Expand'
./zfs.test -test.v -test.short -test.skip 'TestZFS/Killed|TestFamilies|TestReceiveFull'
is() { echo "$2"; test "$1" = "$2"; }
doctor='./cradle-csi doctor --backend zfs --pool tank/doctor'
half='tank/doctor/receive:w: a copy to or from cold storage did not come to its end'
is 'nothing to repair' "$($doctor)"
zfs create -s -V 16M tank/doctor/receive:w
is "found: $half" "$($doctor --look)"
is "repaired: $half" "$($doctor)"
is 'nothing to repair' "$($doctor)"
`)
}

// inLab runs a shell script in a machine that has ZFS, beside the tests' programs.
func inLab(t *testing.T, script string) {
	t.Helper()
	inLabWith(t, script, func(string) {})
}

// postMortem says at the end of a run that has failed how much memory and space was left, and what waits in the kernel.
const postMortem = `trap 'test $? = 0 || { grep -E "^(MemTotal|MemAvailable|Shmem|Slab):" /proc/meminfo; df -m; zpool list -v; echo w >/proc/sysrq-trigger; dmesg | tail -n 100; }' EXIT
`

// inLabWith is inLab for a script that finds more files in its directory.
func inLabWith(t *testing.T, script string, more func(dir string)) {
	t.Helper()
	root, err := programs.Root()
	if err != nil {
		t.Fatal(err)
	}
	lab, err := programs.Lab()
	if err != nil {
		t.Fatal(err)
	}
	job := t.TempDir()
	build := func(out, pkg, tags string) {
		t.Helper()
		// Like make build, which has compiled most of it so.
		cmd := exec.Command("go", "test", "-c", "-trimpath", "-tags", tags, "-o", filepath.Join(job, out), pkg)
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		cmd.Dir = root
		if text, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%v: %v\n%s", cmd.Args, err, text)
		}
	}
	build("zfs.test", "./csi-plugin/zfs", "zfslab")
	build("dir.test", "./csi-plugin/dir", "vm")
	if strings.Contains(script, "./csi.test") {
		build("csi.test", "./csi-plugin", "vm,soak,zfslab")
	}
	sanity, err := programs.Tool("csi-sanity")
	if err != nil {
		t.Fatal(err)
	}
	plugin, err := programs.Path("cradle-csi")
	if err != nil {
		t.Fatal(err)
	}
	for _, program := range []string{sanity, plugin} {
		if err := os.Symlink(program, filepath.Join(job, filepath.Base(program))); err != nil {
			t.Fatal(err)
		}
	}
	more(job)
	if err := os.WriteFile(filepath.Join(job, "run.sh"), []byte("set -e\n"+postMortem+"mkdir /failing\nmount -t tmpfs -o size=80m failing /failing\n"+script+"echo all passed\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	var console bytes.Buffer
	cmd := exec.Command(lab, "run", job)
	cmd.Env = append(os.Environ(), "ZFSLAB_TIMEOUT=7200")
	cmd.Stdout = io.MultiWriter(&console, t.Output()) // with -v one sees how far it is
	cmd.Stderr = cmd.Stdout
	if err := cmd.Run(); err != nil || !bytes.Contains(console.Bytes(), []byte("all passed")) {
		t.Fatalf("%v\n%s", err, console.Bytes()[max(0, console.Len()-16<<10):])
	}
}
