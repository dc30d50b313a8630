package cold

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
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
	volume.Noter
	n    int
	data []byte

	unused, restored string // of them, that were made of a copy

	asked  *atomic.Int64
	dead   int // of them, whose storage does not answer before answer is closed
	answer chan struct{}
}

func (m many) List(ctx context.Context) (all []volume.Volume, err error) {
	for i := range m.n {
		v, _ := m.Get(ctx, fmt.Sprint("v", i))
		all = append(all, v)
	}
	return all, nil
}

func (m many) Get(_ context.Context, id string) (volume.Volume, error) {
	v := volume.Volume{ID: id, Created: born, Parameters: volume.Parameters{Class: volume.LV2, Cold: volume.Retention{Hourly: 2}}}
	switch id {
	case m.unused:
		v.Origin.Copy = "copy"
	case m.restored:
		v.Origin.Copy, v.Used = "copy", true
	}
	return v, nil
}

func (m many) Snapshots(_ context.Context, id string) ([]volume.Snapshot, error) {
	if n, err := strconv.Atoi(id[1:]); err != nil || n < m.dead {
		<-m.answer
		return nil, errors.New("the disk is dead")
	}
	if m.asked != nil {
		m.asked.Add(1)
		at := time.Now().UTC().Truncate(time.Hour)
		return []volume.Snapshot{{ID: volume.SnapshotID{Volume: id, Name: "cold-" + at.Format(stamp)}, Created: at, Automatic: true}}, nil
	}
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
		m := many{Noter: new(note), n: 5 * atOnce, data: random(1, 4*chunkSize)}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		k := NewKeeper(m, v, slog.New(slog.DiscardHandler), nil)
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

// Volumes whose storage does not answer keep no other one from being copied.
func TestKeeperGoesOn(t *testing.T) {
	v := NewVault(folder(t), testKey(t))
	synctest.Test(t, func(t *testing.T) {
		m := many{Noter: new(note), n: 6*atOnce + 1, data: random(1, 4*chunkSize), dead: 6 * atOnce, answer: make(chan struct{})}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		k := NewKeeper(m, v, slog.New(slog.DiscardHandler), nil)
		go func() { done <- k.Run(ctx, nil) }()
		time.Sleep(time.Hour)
		synctest.Wait()
		if all, err := v.Copies(ctx, ""); err != nil || len(all) != 1 {
			t.Errorf("copies are %v, %v", all, err)
		}
		cancel()
		close(m.answer)
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

// A volume whose newest snapshot is copied is not asked for others before the hour is over, nor by the plugin's next start.
func TestKeeperAsksSeldom(t *testing.T) {
	v := NewVault(folder(t), testKey(t))
	synctest.Test(t, func(t *testing.T) {
		time.Sleep(time.Until(born) + time.Hour)
		m := many{Noter: new(note), n: 1, data: random(1, 4*chunkSize), asked: new(atomic.Int64)}
		for range 2 {
			ctx, cancel := context.WithCancel(t.Context())
			done := make(chan error)
			k := NewKeeper(m, v, slog.New(slog.DiscardHandler), nil)
			go func() { done <- k.Run(ctx, nil) }()
			time.Sleep(5*time.Hour + 20*time.Minute)
			synctest.Wait()
			cancel()
			if err := <-done; err != nil {
				t.Error(err)
			}
		}
		if all, err := v.Copies(t.Context(), ""); err != nil || len(all) != 2 {
			t.Errorf("copies are %v, %v", all, err)
		}
		if n := m.asked.Load(); n > 2*13 {
			t.Errorf("asked %d times", n)
		}
	})
}

// Copies that another key has made, or that are damaged, are in the way of none: new ones are made, and count as made, and old ones go in their time, with their chunks once all that are kept can be read.
func TestKeyChanged(t *testing.T) {
	f := folder(t)
	chunks := func() (n int) {
		if err := f.List(t.Context(), chunksDir, func(string) error { n++; return nil }); err != nil {
			t.Fatal(err)
		}
		return n
	}
	first, second := NewVault(f, testKey(t)), NewVault(f, testKey(t))
	synctest.Test(t, func(t *testing.T) {
		time.Sleep(time.Until(born.Truncate(time.Hour)) + time.Hour)
		m := many{Noter: new(note), n: 1, data: random(1, 4*chunkSize), asked: new(atomic.Int64)}
		size := 0 // of a copy, in chunks
		for _, step := range []struct {
			v                     *Vault
			hours, copies, chunks int
		}{{first, 3, 2, 1}, {second, 1, 2, 2}, {second, 1, 2, 1}} {
			ctx, cancel := context.WithCancel(t.Context())
			done := make(chan error)
			k := NewKeeper(m, step.v, slog.New(slog.DiscardHandler), nil)
			go func() { done <- k.Run(ctx, nil) }()
			time.Sleep(time.Duration(step.hours)*time.Hour - time.Minute)
			synctest.Wait()
			made, failed := testutil.ToFloat64(k.copies.WithLabelValues("made")), testutil.ToFloat64(k.copies.WithLabelValues("failed"))
			if made != float64(step.hours) || failed != 0 {
				t.Errorf("in %d hours %v copies are made, and %v failed", step.hours, made, failed)
			}
			cancel()
			if err := <-done; err != nil {
				t.Error(err)
			}
			if all, err := step.v.Copies(t.Context(), ""); err != nil || len(all) != step.copies {
				t.Errorf("copies are %v, %v", all, err)
			}
			n := chunks()
			if size == 0 {
				size = n
			}
			if n == 0 || n != step.chunks*size {
				t.Errorf("%d chunks, not %d times %d", n, step.chunks, size)
			}
			time.Sleep(time.Minute)
		}
	})
}

// A host whose key is not that of the others says so as it begins, and not when its volumes are to be restored elsewhere.
func TestOtherKey(t *testing.T) {
	f := folder(t)
	key := testKey(t)
	other := vol
	other.ID = "other"
	if _, _, err := NewVault(f, key).Save(t.Context(), other, snapshot(1), Order{Taken: snapshot(1).Created}, blocks(random(2, 4*chunkSize)), Copy{}); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		key  *Key
		want int
	}{"the same key": {key, 0}, "another one": {testKey(t), 1}} {
		synctest.Test(t, func(t *testing.T) {
			m := many{Noter: new(note), n: 1, data: random(1, 4*chunkSize)}
			ctx, cancel := context.WithCancel(t.Context())
			done := make(chan error)
			var said bytes.Buffer
			k := NewKeeper(m, NewVault(f, c.key), slog.New(slog.NewTextHandler(&said, nil)), nil)
			go func() { done <- k.Run(ctx, nil) }()
			time.Sleep(3 * lookEvery)
			synctest.Wait()
			cancel()
			if err := <-done; err != nil {
				t.Error(err)
			}
			if n := strings.Count(said.String(), "a copy of a volume that is not here was made with another key"); n != c.want {
				t.Errorf("%s: it is told %d times: %s", name, n, said.String())
			}
		})
	}
}

// What was made of a copy, and is not used yet, is not copied, be it that a restore has not come to its end, or that somebody wants to look at it: its copies would be newer than those of the one that
// is used. It has no age, which would be an alert.
func TestUnused(t *testing.T) {
	v := NewVault(folder(t), testKey(t))
	synctest.Test(t, func(t *testing.T) {
		m := many{Noter: new(note), n: 3, data: random(1, 4*chunkSize), unused: "v0", restored: "v1"}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		k := NewKeeper(m, v, slog.New(slog.DiscardHandler), nil)
		go func() { done <- k.Run(ctx, nil) }()
		time.Sleep(3 * lookEvery)
		synctest.Wait()
		all, err := v.Copies(ctx, "")
		if err != nil || len(all) != 2 || all[0].Volume != "v1" || all[1].Volume != "v2" {
			t.Errorf("copies are %v, %v", all, err)
		}
		if n := testutil.CollectAndCount(k); n != 2 {
			t.Errorf("%d volumes have an age", n)
		}
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

// note is a Noter's.
type note struct {
	line string
	full error // that it can't be kept
}

func (n *note) Note(context.Context) (string, error) { return n.line, nil }

func (n *note) SetNote(_ context.Context, line string) error {
	if n.full == nil {
		n.line = line
	}
	return n.full
}

// A directory on which nothing is mounted, and one that is gone, are not what volumes were copied to: nothing is written there, and the copies go on once the former one is there again.
func TestUnmounted(t *testing.T) {
	key := testKey(t)
	root := t.TempDir()
	at, away := filepath.Join(root, "cold"), filepath.Join(root, "away")
	open := func() *Vault {
		f, err := OpenFolder(at)
		if err != nil {
			t.Fatal(err)
		}
		return NewVault(f, key)
	}
	ctx := t.Context()
	n := &note{full: errors.New("the pool is full")}
	v := open()
	for range 2 { // which makes one mark
		if err := v.Use(ctx, n); !errors.Is(err, n.full) {
			t.Fatal(err)
		}
	}
	n.full = nil
	if err := v.Use(ctx, n); err != nil { // without ceremony
		t.Fatal(err)
	}
	if all := objects(t, v.store); len(all) != 1 || !Begun(at) {
		t.Errorf("in use there are %q", all)
	}
	one, _ := save(t, v, 1, blocks(random(1, 5*chunkSize)), Copy{})

	elsewhere := func(v *Vault) {
		t.Helper()
		for what, do := range map[string]func() error{
			"use":    func() error { return v.Use(ctx, n) },
			"known":  func() error { return v.Known(ctx, n) },
			"put":    func() error { return v.store.Put(ctx, "copies/x", nil) },
			"delete": func() error { return v.store.Delete(ctx, one.Object()) },
			"list":   func() error { _, err := v.Copies(ctx, ""); return err },
			"get":    func() error { _, err := v.Info(ctx, one); return err },
			"fetch":  func() error { return v.Restore(ctx, one, disk(t, 5*chunkSize)) },
		} {
			err := do()
			if !errors.Is(err, volume.ErrUnavailable) || errors.Is(err, volume.ErrNotFound) || errors.Is(err, ErrDamaged) || !strings.Contains(err.Error(), "cold storage "+at+": ") || !strings.Contains(err.Error(), "; mount that one there") {
				t.Errorf("%s: %v", what, err)
			}
		}
	}
	if err := os.Rename(at, away); err != nil {
		t.Fatal(err)
	}
	elsewhere(v)
	again := open() // the plugin's next start
	if err := again.Use(ctx, n); err == nil {
		t.Error("the next start takes what is not there into use")
	}
	elsewhere(again)
	if _, err := os.Stat(at); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("it was made: %v", err)
	}
	if err := os.Mkdir(at, 0o700); err != nil {
		t.Fatal(err)
	}
	elsewhere(v)
	elsewhere(again)
	if left, err := os.ReadDir(at); err != nil || len(left) != 0 || Begun(at) {
		t.Errorf("in what is none there are %v, %v", left, err)
	}

	// A plugin that runs meanwhile tells of it.
	synctest.Test(t, func(t *testing.T) {
		m := many{Noter: n, n: 3, data: random(1, 4*chunkSize)}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		k := NewKeeper(m, open(), slog.New(slog.DiscardHandler), nil)
		go func() { done <- k.Run(ctx, nil) }()
		time.Sleep(3 * lookEvery)
		synctest.Wait()
		if ages, failed := testutil.CollectAndCount(k), testutil.ToFloat64(k.copies.WithLabelValues("failed")); ages != m.n || failed < 3 {
			t.Errorf("of %d volumes %d have an age, and %v failures are counted", m.n, ages, failed)
		}
		if left, err := os.ReadDir(at); err != nil || len(left) != 0 {
			t.Errorf("in what is none there are %v, %v", left, err)
		}
		if err := errors.Join(os.Remove(at), os.Rename(away, at)); err != nil {
			t.Fatal(err)
		}
		time.Sleep(3 * lookEvery)
		synctest.Wait()
		if all, err := again.Copies(ctx, ""); err != nil || len(all) != 1+m.n {
			t.Errorf("once it is there, copies are %v, %v", all, err)
		}
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	for _, v := range []*Vault{v, again} {
		if err := v.Use(ctx, n); err != nil {
			t.Error(err)
		}
		restored(t, v, one, 5*chunkSize)
	}

	// Another one has its place: somebody has made the mark that the error names.
	mark, _, _ := strings.Cut(n.line, " ")
	if err := errors.Join(os.Rename(at, away), os.MkdirAll(filepath.Join(at, marks), 0o700), os.WriteFile(filepath.Join(at, marks, mark), nil, 0o600)); err != nil {
		t.Fatal(err)
	}
	if err := v.Use(ctx, n); err != nil {
		t.Error(err)
	}
}

// Who can write to the directory, which may be other hosts', neither has a plugin write anywhere else nor makes it wait.
func TestFolderHostile(t *testing.T) {
	f := folder(t)
	outside := filepath.Join(t.TempDir(), "shadow")
	if err := os.WriteFile(outside, []byte("secret"), 0o600); err != nil {
		t.Fatal(err)
	}
	at := func(name string) string { return filepath.Join(f.path, name) }
	err := errors.Join(
		os.Mkdir(at("a"), 0o700), os.Symlink(outside, at("a/"+temporary+"x")), os.Symlink(outside, at("a/y")),
		os.Symlink(filepath.Dir(outside), at("b")), syscall.Mkfifo(at("a/"+temporary+"pipe"), 0o600), syscall.Mkfifo(at("a/other"), 0o600),
	)
	if err != nil {
		t.Fatal(err)
	}
	ctx := t.Context()
	for _, name := range []string{"a/x", "a/y", "a/pipe"} {
		if err := f.Put(ctx, name, []byte("data")); err != nil {
			t.Errorf("%s: %v", name, err)
		} else if data, err := f.Get(ctx, name, 10); err != nil || string(data) != "data" {
			t.Errorf("%s: %q, %v", name, data, err)
		}
	}
	for what, err := range map[string]error{"put": f.Put(ctx, "b/shadow", []byte("data")), "delete": f.Delete(ctx, "b/shadow")} {
		if err == nil {
			t.Errorf("%s goes where a link leads", what)
		}
	}
	for _, name := range []string{"b/shadow", "a/other"} {
		if data, err := f.Get(ctx, name, 10); err == nil || errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s: %q, %v", name, data, err)
		}
	}
	if data, err := os.ReadFile(outside); err != nil || string(data) != "secret" {
		t.Errorf("outside there is %q, %v", data, err)
	}
}

// While a volume waits for its turn it may get its first content, or a task that may write whatever it wants, or be deleted and made again: a copy says what it is by then.
func TestWaited(t *testing.T) {
	v := NewVault(folder(t), testKey(t))
	only := snapshot(1)
	only.Automatic = true
	source := &snapshots{all: []volume.Snapshot{only}, data: random(1, 5*chunkSize), now: vol}
	k := NewKeeper(source, v, slog.New(slog.DiscardHandler), nil)
	listed := vol
	listed.Content = volume.Blank
	source.now.Created = vol.Created.Add(time.Hour)
	if c, _, err := k.save(t.Context(), listed, &state{}, goesOn); !errors.Is(err, volume.ErrNotFound) || c != (Copy{}) {
		t.Errorf("what was made again is copied as %v, %v", c, err)
	}
	k.copy(t.Context(), listed, &state{}, goesOn)
	if n := testutil.ToFloat64(k.copies.WithLabelValues("failed")); n != 0 {
		t.Errorf("that it was deleted is %v failures", n)
	}
	source.now = vol
	source.now.Content = volume.Guest
	c, _, err := k.save(t.Context(), listed, &state{}, goesOn)
	if err != nil {
		t.Fatal(err)
	}
	if info, err := v.Info(t.Context(), c); err != nil || info.Content != volume.Guest {
		t.Errorf("the copy says of the content %q, %v", info.Content, err)
	}
}

// A snapshot that was taken before the volume had a file system, and that is copied when it has one, has none: what is restored gets one, instead of being mounted as it is. What a guest has had
// stays a guest's.
func TestBlankByThen(t *testing.T) {
	for now, want := range map[volume.Content]volume.Content{volume.Trusted: volume.Blank, volume.Blank: volume.Blank, volume.Guest: volume.Guest} {
		v := NewVault(folder(t), testKey(t))
		of := vol
		of.Content = now
		c, _, err := v.Save(t.Context(), of, snapshot(1), Order{Taken: snapshot(1).Created}, blocks(make([]byte, 3*chunkSize)), Copy{})
		if err != nil {
			t.Fatal(err)
		}
		if info, err := v.Info(t.Context(), c); err != nil || info.Content != want {
			t.Errorf("of what is %q by then the copy says %q, %v; want %q", now, info.Content, err, want)
		}
	}
}

// Who can write to the store makes lists of any time, which say nothing without the key: a copy is made all the same where one can be later, and it is told which list is in the way where none can. What
// is restored is not born in the year 9999.
func TestForgedTimes(t *testing.T) {
	f := folder(t)
	v := NewVault(f, testKey(t))
	ctx := t.Context()
	only := snapshot(1)
	only.Automatic = true
	k := NewKeeper(&snapshots{all: []volume.Snapshot{only}, data: random(1, 5*chunkSize), now: vol}, v, slog.New(slog.DiscardHandler), nil)
	forge := func(c Copy) Copy {
		t.Helper()
		if err := f.Put(ctx, c.Object(), []byte("forged")); err != nil {
			t.Fatal(err)
		}
		return c
	}
	last := time.Date(9999, 12, 31, 23, 59, 59, 999999999, time.UTC)
	forge(Copy{"db", born, time.Date(2100, 1, 1, 0, 0, 0, 0, time.UTC)})
	c, _, err := k.save(ctx, vol, &state{}, goesOn)
	if found, ferr := v.Find(ctx, "db"); err != nil || ferr != nil || c == (Copy{}) || found != c {
		t.Errorf("saved as %v, %v; the newest is %v, %v", c, err, found, ferr)
	}
	end := forge(Copy{"db", born, last.Truncate(time.Second)})
	if c, _, err := k.save(ctx, vol, &state{}, goesOn); err == nil || !strings.Contains(err.Error(), "remove "+end.Object()) {
		t.Errorf("saved as %v, %v", c, err)
	}
	forge(Copy{"db", last, born})
	if at, err := v.Born(ctx, "db"); err != nil || !at.Equal(born) {
		t.Errorf("the newest volume is of %v, %v", at, err)
	}
	if at, err := v.Born(ctx, "none"); err != nil || !at.IsZero() {
		t.Errorf("one that there is not is of %v, %v", at, err)
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
	k := NewKeeper(deleted{source}, v, slog.New(slog.DiscardHandler), nil)
	k.copy(t.Context(), vol, &state{}, goesOn)
	if n := testutil.ToFloat64(k.copies.WithLabelValues("failed")); n != 0 {
		t.Errorf("%v failures", n)
	}
	if all, err := v.Copies(t.Context(), ""); err != nil || len(all) != 0 {
		t.Errorf("it is copied: %v, %v", all, err)
	}
	source.now.Created = vol.Created.Add(time.Hour)
	k.source = source
	c, _, err := k.save(t.Context(), source.now, &state{}, goesOn)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := v.Verify(t.Context(), c, &sync.Map{}, func(err error) { t.Error(err) }); err != nil {
		t.Error(err)
	}
}
