//go:build vm

package rpc

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/cradlestack/cradlestack/csi-plugin/mount"
	"github.com/cradlestack/cradlestack/csi-plugin/volume"
)

// none is a backend without volumes.
type none struct{ volume.Backend }

func (none) Get(context.Context, string) (volume.Volume, error) {
	return volume.Volume{}, volume.ErrNotFound
}

// What is at a path by somebody else's doing stays, whatever a caller has called it.
func TestRootNotOurs(t *testing.T) {
	s := &node{Server: New(Config{Backend: none{}, DirectDir: t.TempDir()})}
	unpublish := func(target string) error {
		_, err := s.NodeUnpublishVolume(t.Context(), &csi.NodeUnpublishVolumeRequest{VolumeId: "v", TargetPath: target})
		return err
	}
	foreign := t.TempDir()
	if err := unix.Mount("run", foreign, "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := mount.Unmount(foreign); err != nil {
			t.Error(err)
		}
	}()
	_, unstaged := s.NodeUnstageVolume(t.Context(), &csi.NodeUnstageVolumeRequest{VolumeId: "v", StagingTargetPath: foreign})
	file, dir := filepath.Join(t.TempDir(), "file"), filepath.Join(t.TempDir(), "dir")
	for name, data := range map[string]string{file: "a host's", filepath.Join(dir, "file"): ""} {
		if err := os.MkdirAll(filepath.Dir(name), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(name, []byte(data), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for what, err := range map[string]error{"a mount, unstaged": unstaged, "a mount": unpublish(foreign), "a file": unpublish(file), "a directory": unpublish(dir)} {
		if status.Code(err) != codes.FailedPrecondition || !strings.Contains(err.Error(), "left alone") {
			t.Errorf("%s: %v", what, err)
		}
	}
	if mounted, err := mount.Is(foreign); err != nil || !mounted {
		t.Errorf("mounted: %t, %v", mounted, err)
	}
	if data, err := os.ReadFile(file); err != nil || string(data) != "a host's" {
		t.Errorf("%q, %v", data, err)
	}

	target := filepath.Join(t.TempDir(), "target")
	if err := os.Mkdir(target, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := mount.Empty(target); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := unpublish(target); err != nil {
			t.Error(err)
		}
	}
	if _, err := os.Lstat(target); !os.IsNotExist(err) {
		t.Errorf("what a volume was published on is still there: %v", err)
	}
}
