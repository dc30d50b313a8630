//go:build vm && soak

package ceph

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/cradlestack/cradlestack/csi-plugin/mount"
	"github.com/cradlestack/cradlestack/csi-plugin/volume"
	"github.com/cradlestack/cradlestack/internal/cephtest"
)

// TestRootSoakCeph runs the conformance suite, and reads on one host what the other one has written a thousand times.
func TestRootSoakCeph(t *testing.T) {
	lab(t)
	t.Run("Suite", func(t *testing.T) { suite.Methods(t) })
	t.Run("Hosts", func(t *testing.T) { testHosts(t, 1000) })
	t.Run("Hangs", testHangs)
	t.Run("Elsewhere", testElsewhere)
	t.Run("Evicted", testEvicted)
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

// What one host clones the others leave alone, with what it is made of; a copy of a snapshot that was removed meanwhile is none.
func testElsewhere(t *testing.T) {
	ctx := t.Context()
	one, err := open(fresh(t))
	must(t, err)
	other := *one
	other.config.Host, other.config.Dir = "other", t.TempDir()
	_, err = one.Create(ctx, gfs("origin"))
	must(t, err)
	must(t, os.WriteFile(filepath.Join(staged(t, one, "origin"), "file"), []byte("x"), 0o600))
	kept := volume.SnapshotID{Volume: "origin", Name: "kept"}
	_, err = one.Snapshot(ctx, volume.SnapshotRequest{ID: kept})
	must(t, err)
	clone := gfs("clone")
	clone.Origin.Volume = "origin"
	hidden := between("clone")
	must(t, one.with(ctx, func(ctx context.Context, s *session) error { // as clone does
		from, err := s.volume(ctx, "origin")
		must(t, err)
		must(t, s.take(ctx, from, hidden, taken{Created: time.Now(), Size: from.size, Hidden: true}))
		to, err := s.make(ctx, one.pools[0], clone, 0)
		must(t, err)
		to.Making = true
		must(t, s.record(ctx, to))
		to, err = s.look(ctx, to.pool, to.id)
		must(t, err)
		source, err := s.opened(ctx, from, filepath.Dir(from.path), ".", true)
		must(t, err)
		target, err := s.opened(ctx, to, to.path, ".", false)
		must(t, err)
		for _, look := range []bool{true, false} {
			if found := repaired(t, &other, look); len(found) != 0 {
				t.Errorf("another host repairs %q", found)
			}
		}
		_, cloned := other.Clone(ctx, clone, nil)
		for what, err := range map[string]error{
			"a second clone": cloned, "the snapshot is deleted": other.DeleteSnapshot(ctx, kept),
			"the clone is deleted": other.Delete(ctx, "clone"), "the origin is deleted": other.Delete(ctx, "origin"),
		} {
			if !errors.Is(err, volume.ErrInUse) {
				t.Errorf("%s meanwhile: %v", what, err)
			}
		}
		must(t, errors.Join(source.end(), target.end()))
		was, err := s.takenAt(ctx, from, hidden)
		must(t, err)
		must(t, s.unchanged(ctx, to, from, hidden, was))
		must(t, s.drop(ctx, from, hidden))
		if err := s.unchanged(ctx, to, from, hidden, was); !errors.Is(err, volume.ErrNotFound) {
			t.Errorf("the copy of a snapshot that is gone: %v", err)
		}
		must(t, s.take(ctx, from, hidden, taken{Created: time.Now(), Size: from.size, Hidden: true}))
		if err := s.unchanged(ctx, to, from, hidden, was); !errors.Is(err, volume.ErrNotFound) {
			t.Errorf("the copy of a snapshot that is another one: %v", err)
		}
		return nil
	}, "origin", "clone"))
	_, err = other.Clone(ctx, clone, nil)
	must(t, err)
	if text, err := os.ReadFile(filepath.Join(staged(t, &other, "clone"), "file")); err != nil || string(text) != "x" {
		t.Errorf("the clone: %q, %v", text, err)
	}
}

// A host whose session the cluster has ended, as after minutes without a network, has the volume again when it is staged.
func testEvicted(t *testing.T) {
	ctx := t.Context()
	b, err := open(fresh(t))
	must(t, err)
	_, err = b.Create(ctx, gfs("v"))
	must(t, err)
	dir := staged(t, b, "v")
	file := filepath.Join(dir, "file")
	target := filepath.Join(t.TempDir(), "published")
	must(t, os.Mkdir(target, 0o700))
	must(t, mount.Bind(dir, target, mount.Options{}))
	defer func() { _ = mount.Detach(target) }()
	evict := func() {
		t.Helper()
		must(t, os.WriteFile(file, []byte("x"), 0o600))
		must(t, b.with(ctx, func(ctx context.Context, s *session) error {
			f, err := s.volume(ctx, "v")
			must(t, err)
			clients, err := b.clients(ctx, f, f.path)
			must(t, err)
			if len(clients) != 1 {
				t.Fatalf("clients %+v", clients)
			}
			_, err = cluster.Ceph(ctx, "tell", "mds."+cephtest.FS+":0", "client", "evict", fmt.Sprint("id=", clients[0].ID))
			return err
		}))
		for begin := time.Now(); os.WriteFile(file, []byte("y"), 0o600) == nil && time.Since(begin) < time.Minute; {
		}
	}
	evict()
	held, err := os.Open(target) // a pod that has gone on
	if err == nil {
		defer held.Close()
	}
	found := repaired(t, b, true)
	if len(found) != 1 || !strings.Contains(found[0], "volume v: its ceph-fuse has") {
		t.Errorf("found %q", found)
	}
	_, err = b.Stage(ctx, "v", volume.Use{As: volume.AsFiles})
	must(t, err)
	for _, at := range []string{dir, target} {
		must(t, os.WriteFile(filepath.Join(at, "file"), []byte("z"), 0o600))
	}
	evict()
	must(t, mount.Detach(target))
	if mounted, err := mount.Is(target); err != nil || mounted {
		t.Errorf("unpublished: %t, %v", mounted, err)
	}
	must(t, b.Unstage(ctx, "v"))
	must(t, b.Delete(ctx, "v"))
}
