//go:build vm

package dir

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
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

// A pool that is full takes no copy: that is told as such, leaves nothing, and works once there is space.
func TestRootNoSpace(t *testing.T) {
	at := filesystem(t, "ext4")
	b := open(t, Pool{"default", filepath.Join(at, "pool")})
	r := volume.Request{Name: "v", Size: 64 << 20, Parameters: volume.Parameters{Class: volume.LV2, Direct: true}}
	if _, err := b.Create(t.Context(), r); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(at, "pool/v/image"), bytes.Repeat([]byte("data"), 16<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	s, err := mount.Stats(at)
	if err != nil {
		t.Fatal(err)
	}
	filler := filepath.Join(at, "filler")
	command(t, "fallocate", "-l", strconv.FormatInt(int64(s.Total-s.Used)-32<<20, 10), filler) // with what is reserved for root
	snapshot := volume.SnapshotRequest{ID: volume.SnapshotID{Volume: "v", Name: "s"}}
	clone, large := r, r
	clone.Name, clone.Origin.Volume = "clone", "v"
	large.Name = "large"
	for what, call := range map[string]func() error{
		"snapshot": func() error { _, err := b.Snapshot(t.Context(), snapshot); return err },
		"clone":    func() error { _, err := b.Clone(t.Context(), clone, nil); return err },
		"create":   func() error { _, err := b.Create(t.Context(), large); return err },
	} {
		if err := call(); !errors.Is(err, volume.ErrNoSpace) {
			t.Errorf("%s: %v; want %v", what, err, volume.ErrNoSpace)
		} else if what == "snapshot" && !strings.Contains(err.Error(), "a copy would take 64MiB") { // else what is free was taken for the time of it
			t.Errorf("%s: %v", what, err)
		}
	}
	if all := rest(t, filepath.Join(at, "pool")); len(all) != 3 && len(all) != 4 { // v, its image and record, and an empty folder for snapshots
		t.Errorf("there is %q", all)
	}
	if err := os.Remove(filler); err != nil {
		t.Fatal(err)
	}
	if _, err := b.Snapshot(t.Context(), snapshot); err != nil {
		t.Error(err)
	}
	if _, err := b.Clone(t.Context(), clone, nil); err != nil {
		t.Error(err)
	}
}

// A copy that is received goes on where it was interrupted, though by then the pool has not the room for all of it any more: what has arrived is its own.
func TestRootReceiveRoom(t *testing.T) {
	at := filesystem(t, "ext4")
	b := open(t, Pool{"default", filepath.Join(at, "pool")})
	r := volume.Request{Name: "v", Size: 64 << 20, Parameters: volume.Parameters{Class: volume.LV2}, Origin: volume.Origin{Copy: "v@20260101T000000Z"}}
	s, err := mount.Stats(at)
	if err != nil {
		t.Fatal(err)
	}
	command(t, "fallocate", "-l", strconv.FormatInt(int64(s.Available)-96<<20, 10), filepath.Join(at, "filler"))
	data := bytes.Repeat([]byte("data"), 16<<20)
	interrupted := errors.New("interrupted")
	for _, want := range []error{interrupted, nil} {
		_, err := b.Receive(t.Context(), r, volume.Trusted, func(_ context.Context, image *os.File) error {
			if _, err := image.WriteAt(data[:56<<20], 0); err != nil || want != nil {
				return errors.Join(err, want)
			}
			_, err := image.WriteAt(data, 0)
			return err
		})
		if !errors.Is(err, want) {
			t.Fatalf("%v; want %v", err, want)
		}
	}
	if got, err := os.ReadFile(filepath.Join(at, "pool/v/image")); err != nil || !bytes.Equal(got, data) {
		t.Errorf("it holds something else, %v", err)
	}
	r.Name = "w"
	if _, err := b.Receive(t.Context(), r, volume.Trusted, nil); !errors.Is(err, volume.ErrNoSpace) {
		t.Errorf("without room: %v", err)
	}
}

// A pool whose file system has failed, and is only read since, is told as one that may come back; what is in it can be seen.
func TestRootReadOnly(t *testing.T) {
	at := filesystem(t, "ext4")
	b := open(t, Pool{"default", filepath.Join(at, "pool")})
	r := volume.Request{Name: "v", Parameters: volume.Parameters{Class: volume.NFS}}
	v, err := b.Create(t.Context(), r)
	if err != nil {
		t.Fatal(err)
	}
	command(t, "mount", "-o", "remount,ro", at)
	r.Name = "w"
	clone := r
	clone.Origin.Volume = "v"
	for what, call := range map[string]func() error{
		"ready":  func() error { return b.Ready(t.Context()) },
		"create": func() error { _, err := b.Create(t.Context(), r); return err },
		"clone":  func() error { _, err := b.Clone(t.Context(), clone, nil); return err },
		"delete": func() error { return b.Delete(t.Context(), "v") },
		"snapshot": func() error {
			_, err := b.Snapshot(t.Context(), volume.SnapshotRequest{ID: volume.SnapshotID{Volume: "v", Name: "s"}})
			return err
		},
	} {
		if err := call(); !errors.Is(err, volume.ErrUnavailable) {
			t.Errorf("%s: %v; want %v", what, err, volume.ErrUnavailable)
		}
	}
	if all, err := b.List(t.Context()); err != nil || len(all) != 1 || all[0] != v {
		t.Errorf("there is %+v, %v", all, err)
	}
	command(t, "mount", "-o", "remount,rw", at)
	if err := errors.Join(b.Ready(t.Context()), b.Delete(t.Context(), "v")); err != nil {
		t.Error(err)
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
