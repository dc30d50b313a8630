//go:build vm && soak

package ceph

import (
	"errors"
	"syscall"
	"testing"

	"github.com/cradlestack/cradlestack/csi-plugin/volume"
)

// TestRootSoakCeph runs the conformance suite, and reads on one host what the other one has written a thousand times.
func TestRootSoakCeph(t *testing.T) {
	lab(t)
	t.Run("Suite", func(t *testing.T) { suite.Methods(t) })
	t.Run("Hosts", func(t *testing.T) { testHosts(t, 1000) })
	t.Run("Hangs", testHangs)
}

// What is mounted and does not answer is told, and neither waited for nor taken for dead.
func testHangs(t *testing.T) {
	ctx := t.Context()
	b, err := open(fresh(t))
	must(t, err)
	_, err = b.Create(ctx, gfs("v"))
	must(t, err)
	dir := staged(t, b, "v")
	pid := fuseOf(t, dir)
	must(t, syscall.Kill(pid, syscall.SIGSTOP))
	_, serr := b.Stage(ctx, "v", volume.Use{As: volume.AsFiles})
	for what, err := range map[string]error{"stage": serr, "unstage": b.Unstage(ctx, "v"), "delete": b.Delete(ctx, "v")} {
		if !errors.Is(err, volume.ErrUnavailable) && !errors.Is(err, volume.ErrInUse) {
			t.Errorf("%s: %v", what, err)
		}
	}
	must(t, syscall.Kill(pid, syscall.SIGCONT))
	if _, err := b.Stage(ctx, "v", volume.Use{As: volume.AsFiles}); err != nil {
		t.Errorf("it answers again: %v", err)
	}
}
