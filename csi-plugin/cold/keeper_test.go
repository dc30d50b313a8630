package cold

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/cradlestack/cradlestack/csi-plugin/volume"
)

// many is a backend with some volumes, each of which has one snapshot for cold storage. Asked for that it takes its time, as a program does.
type many struct {
	volume.Backend
	volume.Snapshotter
	volume.Sender
	n    int
	data []byte
}

func (m many) List(ctx context.Context) (all []volume.Volume, err error) {
	for i := range m.n {
		v, _ := m.Get(ctx, fmt.Sprint("v", i))
		all = append(all, v)
	}
	return all, nil
}

func (m many) Get(_ context.Context, id string) (volume.Volume, error) {
	return volume.Volume{ID: id, Created: born, Parameters: volume.Parameters{Class: volume.LV2, Cold: volume.Retention{Hourly: 2}}}, nil
}

func (m many) Snapshots(_ context.Context, id string) ([]volume.Snapshot, error) {
	time.Sleep(time.Second)
	return []volume.Snapshot{{ID: volume.SnapshotID{Volume: id, Name: "cold-20260106T160000Z"}, Created: born.Add(time.Hour), Automatic: true}}, nil
}

func (m many) Open(context.Context, volume.SnapshotID, volume.SnapshotID) (*volume.Blocks, error) {
	return blocks(m.data), nil
}

// However many volumes there are, each is copied: those that need no copy take no turn of the others.
func TestKeeperManyVolumes(t *testing.T) {
	v := NewVault(folder(t), testKey(t))
	synctest.Test(t, func(t *testing.T) {
		m := many{n: 5 * atOnce, data: random(1, 4*chunkSize)}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		k := NewKeeper(m, v, slog.New(slog.DiscardHandler), nil, used)
		go func() { done <- k.Run(ctx, nil) }()
		synctest.Wait() // four are at work, the others wait for their turn
		if n := testutil.CollectAndCount(k); n != m.n {
			t.Errorf("of %d volumes %d have an age", m.n, n)
		}
		time.Sleep(3 * lookEvery)
		synctest.Wait()
		if all, err := v.Copies(ctx, ""); err != nil || len(all) != m.n {
			t.Errorf("%d of %d volumes are copied: %v, %v", len(all), m.n, all, err)
		}
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

// While a volume waits for its turn it may get its first content, or a task that may write whatever it wants, or be deleted and made again: a copy says what it is by then.
func TestWaited(t *testing.T) {
	v := NewVault(folder(t), testKey(t))
	only := snapshot(1)
	only.Automatic = true
	source := &snapshots{all: []volume.Snapshot{only}, data: random(1, 5*chunkSize), now: vol}
	k := NewKeeper(source, v, slog.New(slog.DiscardHandler), nil, used)
	listed := vol
	listed.Content = volume.Blank
	source.now.Created = vol.Created.Add(time.Hour)
	if c, _, err := k.save(t.Context(), listed, &state{}); !errors.Is(err, volume.ErrNotFound) || c != (Copy{}) {
		t.Errorf("what was made again is copied as %v, %v", c, err)
	}
	source.now = vol
	source.now.Content = volume.Guest
	c, _, err := k.save(t.Context(), listed, &state{})
	if err != nil {
		t.Fatal(err)
	}
	if info, err := v.Info(t.Context(), c); err != nil || info.Content != volume.Guest {
		t.Errorf("the copy says of the content %q, %v", info.Content, err)
	}
}

// deleted is a backend whose volume is deleted while it is read.
type deleted struct{ *snapshots }

func (d deleted) Open(ctx context.Context, id, since volume.SnapshotID) (*volume.Blocks, error) {
	b, err := d.snapshots.Open(ctx, id, since)
	b.ReaderAt = d
	return b, err
}

func (d deleted) ReadAt(p []byte, off int64) (int, error) {
	if off >= 3*chunkSize {
		return 0, fmt.Errorf("volume v: %w", volume.ErrDeleted)
	}
	return copy(p, d.data[off:]), nil
}

// A volume that is deleted while it is copied leaves no copy, half or whole, and is no failure. What is made anew under its name is copied.
func TestDeletedWhileCopied(t *testing.T) {
	v := NewVault(folder(t), testKey(t))
	only := snapshot(1)
	only.Automatic = true
	source := &snapshots{all: []volume.Snapshot{only}, data: random(1, 5*chunkSize), now: vol}
	k := NewKeeper(deleted{source}, v, slog.New(slog.DiscardHandler), nil, used)
	k.copy(t.Context(), vol, &state{})
	if n := testutil.ToFloat64(k.copies.WithLabelValues("failed")); n != 0 {
		t.Errorf("%v failures", n)
	}
	if all, err := v.Copies(t.Context(), ""); err != nil || len(all) != 0 {
		t.Errorf("it is copied: %v, %v", all, err)
	}
	source.now.Created = vol.Created.Add(time.Hour)
	k.source = source
	c, _, err := k.save(t.Context(), source.now, &state{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := v.Verify(t.Context(), c, &sync.Map{}, func(err error) { t.Error(err) }); err != nil {
		t.Error(err)
	}
}
