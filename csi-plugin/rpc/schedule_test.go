package rpc

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/cradlestack/cradlestack/csi-plugin/volume"
)

// shelf is a backend with one volume, whose snapshots are a list.
type shelf struct {
	volume.Backend
	keep volume.Retention

	mu       sync.Mutex
	has      []volume.Snapshot
	fail     bool
	silent   bool
	schedule string
	asked    int
}

func (s *shelf) List(ctx context.Context) ([]volume.Volume, error) {
	v, err := s.Get(ctx, "v")
	return []volume.Volume{v, {ID: "w"}}, err
}

func (s *shelf) Get(_ context.Context, id string) (volume.Volume, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return volume.Volume{ID: id, Schedule: s.schedule, Parameters: volume.Parameters{Snapshots: s.keep}}, nil
}

func (s *shelf) Snapshots(context.Context, string) ([]volume.Snapshot, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.asked++
	if s.silent {
		return nil, volume.ErrUnavailable
	}
	return slices.Clone(s.has), nil
}

func (s *shelf) Snapshot(_ context.Context, r volume.SnapshotRequest) (volume.Snapshot, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.fail {
		return volume.Snapshot{}, errors.New("no")
	}
	for _, has := range s.has {
		if has.ID == r.ID {
			return has, nil
		}
	}
	snap := volume.Snapshot{ID: r.ID, Automatic: r.Automatic}
	s.has = append(s.has, snap)
	return snap, nil
}

func (s *shelf) DeleteSnapshot(_ context.Context, id volume.SnapshotID) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.has = slices.DeleteFunc(s.has, func(has volume.Snapshot) bool { return has.ID == id })
	return nil
}

// What an administrator has taken under a name of the schedule's is none of its snapshots: that one of this hour is missing is to be seen, and nothing goes for it.
func TestScheduleNameTaken(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		// synctest's clock begins at midnight UTC on 2000-01-01.
		b := &shelf{keep: volume.Retention{Hourly: 1}, has: []volume.Snapshot{
			{ID: volume.SnapshotID{Volume: "v", Name: "hourly-19991231T230000Z"}, Automatic: true},
			{ID: volume.SnapshotID{Volume: "v", Name: "hourly-20000101T000000Z"}},
		}}
		c := Config{Backend: b, DirectDir: t.TempDir(), Log: slog.New(slog.DiscardHandler)}
		s := &Server{config: c, metrics: newMetrics(c)}
		err := s.takeDueOf(t.Context(), b, volume.Volume{ID: "v", Parameters: volume.Parameters{Snapshots: b.keep}})
		if !errors.Is(err, volume.ErrExists) || !strings.Contains(err.Error(), "v@hourly-20000101T000000Z") {
			t.Error(err)
		}
		if all, _ := b.Snapshots(t.Context(), "v"); len(all) != 2 {
			t.Errorf("left: %v", all)
		}
		taken, failed := testutil.ToFloat64(s.metrics.snaps.WithLabelValues("taken")), testutil.ToFloat64(s.metrics.snaps.WithLabelValues("failed"))
		if taken != 0 || failed != 1 {
			t.Errorf("counted: %v taken, %v failed", taken, failed)
		}
	})
}

// Snapshots that are due and not even begun, as another call has the volume for long or its storage does not say which there are, count as failed: the alert goes by that.
func TestScheduleUntaken(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := &shelf{keep: volume.Retention{Hourly: 1}}
		c := Config{Backend: b, DirectDir: t.TempDir(), Log: slog.New(slog.DiscardHandler)}
		s := &Server{config: c, metrics: newMetrics(c)}
		v := volume.Volume{ID: "v", Parameters: volume.Parameters{Snapshots: b.keep}}
		unlock, err := s.busy.Lock(t.Context(), "v")
		if err != nil {
			t.Fatal(err)
		}
		if err := s.takeDueOf(t.Context(), b, v); !errors.Is(err, volume.ErrBusy) {
			t.Error(err)
		}
		unlock()
		b.silent = true
		if err := s.takeDueOf(t.Context(), b, v); !errors.Is(err, volume.ErrUnavailable) {
			t.Error(err)
		}
		if n := testutil.ToFloat64(s.metrics.snaps.WithLabelValues("failed")); n != 2 {
			t.Errorf("%v failures are counted", n)
		}
		ended, end := context.WithCancel(t.Context())
		end()
		if err := s.takeDueOf(ended, b, v); err == nil {
			t.Error("a plugin that ends goes on")
		}
		if n := testutil.ToFloat64(s.metrics.snaps.WithLabelValues("failed")); n != 2 {
			t.Errorf("%v failures are counted, with the plugin's end", n)
		}
	})
}

func TestSchedule(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := &shelf{keep: volume.Retention{Hourly: 2}}
		c := Config{Backend: b, DirectDir: t.TempDir(), Log: slog.New(slog.DiscardHandler)}
		s := &Server{config: c, metrics: newMetrics(c)}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- s.Schedule(ctx) }()

		names := func() (all []string) {
			synctest.Wait()
			have, _ := b.Snapshots(ctx, "v")
			for _, snap := range have {
				all = append(all, snap.ID.String())
			}
			return all
		}
		fail := func(yes bool) {
			b.mu.Lock()
			b.fail = yes
			b.mu.Unlock()
		}
		// synctest's clock begins at midnight UTC on 2000-01-01.
		time.Sleep(2*time.Hour + 30*time.Minute)
		if got, want := names(), []string{"v@hourly-20000101T010000Z", "v@hourly-20000101T020000Z"}; !slices.Equal(got, want) {
			t.Errorf("there are %v; want %v", got, want)
		}
		fail(true)
		time.Sleep(time.Hour)
		if got := names(); len(got) != 2 {
			t.Errorf("an old one went for want of a new one: %v", got)
		}
		fail(false)
		time.Sleep(2 * lookEvery)
		if got, want := names(), []string{"v@hourly-20000101T020000Z", "v@hourly-20000101T030000Z"}; !slices.Equal(got, want) {
			t.Errorf("after it failed for a while there are %v; want %v", got, want)
		}
		if n := testutil.ToFloat64(s.metrics.snaps.WithLabelValues("taken")); n != 4 {
			t.Errorf("%v are counted", n)
		}
		change := func(schedule string) {
			b.mu.Lock()
			b.schedule = schedule
			b.mu.Unlock()
			time.Sleep(2 * lookEvery)
		}
		change("daily=1,hourly=1")
		if got, want := names(), []string{"v@hourly-20000101T030000Z", "v@daily-20000101T000000Z"}; !slices.Equal(got, want) {
			t.Errorf("with another schedule there are %v; want %v", got, want)
		}
		change("none")
		time.Sleep(25 * time.Hour)
		if got := names(); len(got) != 2 {
			t.Errorf("none are to be taken, and there are %v", got)
		}
		change("")
		if got, want := names(), []string{"v@hourly-20000101T030000Z", "v@hourly-20000102T040000Z"}; !slices.Equal(got, want) {
			t.Errorf("as it was made there are %v; want %v", got, want)
		}
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

// Where nothing can be due before the next hour begins, the storage is not asked for all snapshots each minute.
func TestScheduleAsksSeldom(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := &shelf{keep: volume.Retention{Hourly: 2, Daily: 1}}
		c := Config{Backend: b, DirectDir: t.TempDir(), Log: slog.New(slog.DiscardHandler)}
		s := &Server{config: c, metrics: newMetrics(c)}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- s.Schedule(ctx) }()
		time.Sleep(25*time.Hour + 30*time.Minute)
		synctest.Wait()
		if b.asked > 3*26 || len(b.has) != 3 {
			t.Errorf("asked %d times, there are %v", b.asked, b.has)
		}
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

// made notes what was asked for.
type made struct {
	volume.Backend
	requests []volume.Request
	has      volume.Volume // of every name; the zero value is none
}

func (m *made) Create(_ context.Context, r volume.Request) (volume.Volume, error) {
	m.requests = append(m.requests, r)
	if m.has.ID != "" {
		return m.has, m.has.Fits(r)
	}
	return volume.Volume{ID: r.Name, Parameters: r.Parameters}, nil
}

func (m *made) Get(context.Context, string) (volume.Volume, error) { return m.has, nil }

// TestSnapshotsByDefault: file volumes whose parameters do not say get the plugin's schedule, and no others.
func TestSnapshotsByDefault(t *testing.T) {
	usual := volume.Retention{Hourly: 24, Daily: 7, Weekly: 4, Monthly: 6}
	b := &made{}
	c := Config{Backend: b, DirectDir: t.TempDir(), Log: slog.New(slog.DiscardHandler), Snapshots: func(context.Context) (volume.Retention, error) { return usual, nil }}
	s := &controller{Server: &Server{config: c, metrics: newMetrics(c)}}
	create := func(p map[string]string) error {
		_, err := s.CreateVolume(t.Context(), &csi.CreateVolumeRequest{Name: "v", Parameters: p, VolumeCapabilities: []*csi.VolumeCapability{{
			AccessType: &csi.VolumeCapability_Mount{Mount: &csi.VolumeCapability_MountVolume{}}, AccessMode: &csi.VolumeCapability_AccessMode{Mode: csi.VolumeCapability_AccessMode_SINGLE_NODE_WRITER},
		}}})
		return err
	}
	for _, p := range []map[string]string{nil, {"snapshots": "hourly=1"}, {"snapshots": "none"}, {"class": "lv2"}} {
		if err := create(p); err != nil {
			t.Fatal(err)
		}
	}
	var got []volume.Retention
	for _, r := range b.requests {
		got = append(got, r.Snapshots)
	}
	if want := []volume.Retention{usual, {Hourly: 1}, {}, {}}; !slices.Equal(got, want) {
		t.Errorf("volumes were made with the schedules %v, not %v", got, want)
	}
	// One that is there is the one that is asked for, also where the plugin's schedule was another when it was made.
	for _, was := range []volume.Retention{{}, {Daily: 3}} {
		b.has = volume.Volume{ID: "v", Parameters: b.requests[0].Parameters}
		b.has.Snapshots = was
		if err := create(nil); err != nil {
			t.Errorf("made when it was %v: %v", was, err)
		}
		for _, p := range []map[string]string{{"snapshots": "hourly=1"}, {"class": "lv2"}} {
			if err := create(p); !errors.Is(err, volume.ErrExists) {
				t.Errorf("made when it was %v, and now %v is asked for: %v", was, p, err)
			}
		}
	}
}

// stuck is a backend with some volumes whose storage does not answer, and two others.
type stuck struct {
	*shelf
	dead    int
	answers chan error
}

func (s stuck) List(context.Context) (all []volume.Volume, err error) {
	ids := []string{"locked", "well"}
	for i := range s.dead {
		ids = append(ids, fmt.Sprintf("dead-%d", i))
	}
	slices.Sort(ids)
	for _, id := range ids {
		all = append(all, volume.Volume{ID: id, Parameters: volume.Parameters{Snapshots: s.keep}})
	}
	return all, nil
}

func (s stuck) Snapshots(ctx context.Context, id string) ([]volume.Snapshot, error) {
	all, err := s.shelf.Snapshots(ctx, id)
	return slices.DeleteFunc(all, func(s volume.Snapshot) bool { return s.ID.Volume != id }), err
}

func (s stuck) Snapshot(ctx context.Context, r volume.SnapshotRequest) (volume.Snapshot, error) {
	if strings.HasPrefix(r.ID.Volume, "dead") {
		return volume.Snapshot{}, <-s.answers
	}
	return s.shelf.Snapshot(ctx, r)
}

// Volumes whose storage does not answer, or that another call has, hold up no other one's snapshots.
func TestScheduleGoesOn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := stuck{&shelf{keep: volume.Retention{Hourly: 2}}, 5 * atOnce, make(chan error)}
		c := Config{Backend: b, DirectDir: t.TempDir(), Log: slog.New(slog.DiscardHandler)}
		s := &Server{config: c, metrics: newMetrics(c)}
		unlock, err := s.busy.Lock(t.Context(), "locked")
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- s.Schedule(ctx) }()
		time.Sleep(90 * time.Minute)
		synctest.Wait()
		if has, _ := b.Snapshots(ctx, "well"); len(has) != 2 {
			t.Errorf("there are %v", has)
		}
		unlock()
		time.Sleep(2 * lookEvery)
		synctest.Wait()
		if has, _ := b.Snapshots(ctx, "locked"); len(has) != 1 {
			t.Errorf("once it is free there are %v", has)
		}
		cancel()
		for range b.dead {
			b.answers <- errors.New("the disk is dead")
		}
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

// A schedule that is changed while a volume waits for its turn counts.
func TestScheduleChanged(t *testing.T) {
	b := &shelf{keep: volume.Retention{Hourly: 1}}
	c := Config{Backend: b, DirectDir: t.TempDir(), Log: slog.New(slog.DiscardHandler)}
	s := &Server{config: c, metrics: newMetrics(c)}
	old := volume.SnapshotID{Volume: "v", Name: "hourly-20000101T030000Z"}
	b.has = []volume.Snapshot{{ID: old, Automatic: true}}
	listed, err := b.Get(t.Context(), "v")
	if err != nil {
		t.Fatal(err)
	}
	for _, schedule := range []string{volume.NoSnapshots, "hourly=2"} {
		b.schedule = schedule
		if err := s.takeDueOf(t.Context(), b, listed); err != nil {
			t.Fatal(err)
		}
		if taken := len(b.has) > 1; b.has[0].ID != old || taken != (schedule != volume.NoSnapshots) {
			t.Errorf("with the schedule %s there are %v", schedule, b.has)
		}
	}
}
