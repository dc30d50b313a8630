//go:build vm

package zfs

import (
	"bytes"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/cradlestack/cradlestack/test/programs"
)

// TestVMZFS runs the tests of zfs_lab_test.go in a machine that has ZFS, but for the kills at every step, block volumes with xfs, all orders but one
// in which families of clones go, and cold storage, which the soak has. Of dir it runs there what takes a capability that
// some hosts have taken from root: growing a mounted ext4.
func TestVMZFS(t *testing.T) {
	inLab(t, `zpool create -f -O mountpoint=none tank /dev/vda1
./dir.test -test.v -test.run 'TestRootDir/ext4/Expand'
./csi.test -test.v -test.run 'TestZFSDoctor'
./zfs.test -test.v -test.short -test.skip 'TestZFS/Killed|TestFamilies/(abcd|dcba)'
`)
}

// inLab runs a shell script in a machine that has ZFS, beside the tests' programs.
func inLab(t *testing.T, script string) {
	t.Helper()
	root, err := programs.Root()
	if err != nil {
		t.Fatal(err)
	}
	lab := filepath.Join(root, "tools/zfs/lab.sh")
	if out, err := exec.Command(lab, "build").CombinedOutput(); err != nil {
		t.Fatalf("%s build: %v\n%s", lab, err, out)
	}
	job := t.TempDir()
	build := func(out, pkg string, verb ...string) {
		t.Helper()
		cmd := exec.Command("go", append(verb, "-o", filepath.Join(job, out), pkg)...)
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		cmd.Dir = root
		if text, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%v: %v\n%s", cmd.Args, err, text)
		}
	}
	build("zfs.test", "./csi-plugin/zfs", "test", "-c", "-tags", "zfslab")
	build("dir.test", "./csi-plugin/dir", "test", "-c", "-tags", "vm")
	build("csi.test", "./csi-plugin", "test", "-c", "-tags", "vm,zfslab")
	build("cradle-csi", "./csi-plugin", "build")
	sanity, err := programs.Tool("csi-sanity")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(sanity, filepath.Join(job, "csi-sanity")); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(job, "run.sh"), []byte("set -e\n"+script+"echo all passed\n"), 0o755); err != nil {
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
