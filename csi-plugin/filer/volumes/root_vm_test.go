//go:build vm

package volumes

import (
	"context"
	"errors"
	"math/rand/v2"
	"path/filepath"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/cradlestack/cradlestack/csi-plugin/dir"
	"github.com/cradlestack/cradlestack/csi-plugin/filer/api"
	"github.com/cradlestack/cradlestack/csi-plugin/volume"
	"github.com/cradlestack/cradlestack/csi-plugin/volume/volumetest"
	"github.com/cradlestack/cradlestack/internal/filertest"
)

// besides is the backend, of which a volume is staged by who has its storage as well, as a plugin on the filer's host can. What staging is without, Stage's own tests show.
type besides struct {
	*Backend
	storage *dir.Backend
}

func (b *besides) Stage(ctx context.Context, id string, use volume.Use) (volume.Source, error) {
	return b.storage.Stage(ctx, id, use)
}

func (b *besides) Unstage(ctx context.Context, id string) error { return b.storage.Unstage(ctx, id) }

func (b *besides) Close() error { return b.storage.Close() }

func poolOf(socket string) string { return filepath.Join(filepath.Dir(filepath.Dir(socket)), "pool") }

func suite() volumetest.Suite {
	return volumetest.Suite{
		New: func(t *testing.T) string { return filertest.Start(t).Socket() },
		Open: func(socket string) (volume.Backend, error) {
			storage, err := dir.Open([]dir.Pool{{Name: "default", Path: poolOf(socket)}})
			return &besides{Open(api.Client{Socket: socket}), storage}, err
		},
		Rest:    func(t *testing.T, socket string) []string { return volumetest.Left(t, poolOf(socket)) },
		Classes: []string{volume.NFS},
	}
}

func TestMain(m *testing.M) { suite().Main(m) }

// TestRootBackend runs the suite that all backends pass, over a filer. To kill who asks changes nothing for the filer, so that it is the filer that TestRootBackendKilled kills.
func TestRootBackend(t *testing.T) { suite().Methods(t) }

// TestRootBackendKilled: the filer is killed again and again, and started anew, while several ask for volumes and snapshots and remove them. Each call succeeds as if nothing
// had been, and nothing is left.
func TestRootBackendKilled(t *testing.T) {
	f := filertest.Start(t)
	b := Open(api.Client{Socket: f.Socket()})
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
	defer cancel()
	var g sync.WaitGroup
	done := make(chan struct{})
	for _, id := range []string{"a", "b", "c"} {
		g.Go(func() {
			for range 30 {
				if err := cycle(ctx, b, id); err != nil {
					t.Errorf("volume %s: %v", id, err)
					return
				}
			}
		})
	}
	go func() { g.Wait(); close(done) }()
	kills := 0
	for ended := false; !ended; {
		select {
		case <-done:
			ended = true
		case <-time.After(time.Duration(rand.IntN(200)) * time.Millisecond):
			f.Signal(syscall.SIGKILL)
			f.Run()
			kills++
		}
	}
	t.Logf("killed %d times", kills)
	if kills < 3 {
		t.Errorf("it was killed %d times", kills)
	}
	if names := volumetest.Left(t, f.Pool); len(names) > 0 {
		t.Errorf("left in the pool: %q", names)
	}
}

// cycle is the life of a volume.
func cycle(ctx context.Context, b *Backend, id string) error {
	r := volume.Request{Name: id, Size: 64 << 20, Parameters: volume.Parameters{Class: volume.NFS}}
	v, err := b.Create(ctx, r)
	if err == nil && (v.ID != id || v.Size != r.Size) {
		err = errors.New("another was made")
	}
	if err != nil {
		return err
	}
	if n, err := b.Expand(ctx, id, 96<<20, 0); err != nil || n != 96<<20 {
		return errors.Join(errors.New("grow"), err)
	}
	snap := volume.SnapshotID{Volume: id, Name: "snap-" + id}
	if _, err := b.Snapshot(ctx, volume.SnapshotRequest{ID: snap}); err != nil {
		return err
	}
	if all, err := b.Snapshots(ctx, id); err != nil || len(all) != 1 || all[0].ID != snap || all[0].Size != 96<<20 {
		return errors.Join(errors.New("its snapshots are others"), err)
	}
	clone := volume.Request{Name: "of-" + id, Origin: volume.Origin{Snapshot: snap}, Parameters: r.Parameters}
	if v, err := b.Clone(ctx, clone, nil); err != nil || v.Origin != clone.Origin || v.Size != 96<<20 {
		return errors.Join(errors.New("clone"), err)
	}
	if err := b.Reschedule(ctx, id, "daily=2"); err != nil {
		return err
	}
	if v, err := b.Get(ctx, id); err != nil || v.Schedule != "daily=2" {
		return errors.Join(errors.New("its schedule is another"), err)
	}
	if err := b.Delete(ctx, id); !errors.Is(err, volume.ErrInUse) {
		return errors.Join(errors.New("it was deleted with its snapshot"), err)
	}
	if err := errors.Join(b.DeleteSnapshot(ctx, snap), b.Delete(ctx, id), b.Delete(ctx, clone.Name)); err != nil {
		return err
	}
	all, err := b.List(ctx)
	if slices.ContainsFunc(all, func(v volume.Volume) bool { return v.ID == id || v.ID == clone.Name }) {
		err = errors.Join(errors.New("it is there still"), err)
	}
	return err
}
