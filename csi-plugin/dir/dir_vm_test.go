//go:build vm

package dir

import (
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/cradlestack/cradlestack/csi-plugin/mount"
	"github.com/cradlestack/cradlestack/csi-plugin/volume"
	"github.com/cradlestack/cradlestack/csi-plugin/volume/volumetest"
)

func suite(fsType string) volumetest.Suite {
	return volumetest.Suite{
		New:     func(t *testing.T) string { return filepath.Join(filesystem(t, fsType), "pool") },
		Open:    func(storage string) (volume.Backend, error) { return Open([]Pool{{"default", storage}}) },
		Rest:    rest,
		Classes: []string{volume.LV2, volume.NFS, volume.GFS},
		FS:      []string{"ext4", "xfs"},
	}
}

func TestMain(m *testing.M) { suite("").Main(m) }

// TestRootDir runs the suite on a file system that can't share data between files, and on those that can.
func TestRootDir(t *testing.T) {
	for _, fsType := range []string{"ext4", "xfs", "btrfs"} {
		t.Run(fsType, func(t *testing.T) { suite(fsType).Run(t) })
	}
}

// filesystem mounts an empty one, in memory, until the test ends.
func filesystem(t *testing.T, fsType string) string {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "cradle-csi-dir-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	image, at := filepath.Join(dir, "image"), filepath.Join(dir, "at")
	if err := os.WriteFile(image, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(image, 4<<30); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(at, 0o700); err != nil {
		t.Fatal(err)
	}
	command(t, "mkfs."+fsType, "-q", image)
	command(t, "mount", "-o", "loop", image, at)
	t.Cleanup(func() { command(t, "umount", at) })
	return at
}

func command(t *testing.T, name string, args ...string) {
	t.Helper()
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
}

// rest lists what is in a pool besides its lock, and the loop devices over what is in it.
func rest(t *testing.T, storage string) (all []string) {
	t.Helper()
	err := filepath.WalkDir(storage, func(path string, d fs.DirEntry, err error) error {
		if err == nil && path != storage && d.Name() != lockFile {
			all = append(all, path)
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
	attached, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	if err != nil {
		t.Error(err)
	}
	for _, name := range attached {
		if data, err := os.ReadFile(name); err == nil && strings.HasPrefix(string(data), storage) {
			all = append(all, strings.TrimSpace(string(data))+" as a loop device")
		}
	}
	if uses, err := mount.UsesOf(storage); err != nil || len(uses) > 0 {
		all = append(all, uses...)
	}
	return all
}
