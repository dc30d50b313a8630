package cold

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"math/rand/v2"
	"os"
	"path"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"filippo.io/age"

	"github.com/cradlestack/cradlestack/csi-plugin/volume"
)

func testKey(t testing.TB) *Key {
	t.Helper()
	x, err := age.GenerateX25519Identity()
	if err != nil {
		t.Fatal(err)
	}
	k, err := newKey(x)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func folder(t *testing.T) *Folder {
	t.Helper()
	f, err := OpenFolder(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	return f
}

var (
	born = time.Date(2026, 1, 6, 15, 30, 0, 123456789, time.UTC)
	vol  = volume.Volume{ID: "db", Created: born, Content: volume.Trusted, Parameters: volume.Parameters{Class: volume.LV2, FS: "ext4"}}
)

// snapshot n is taken n hours after the volume was made.
func snapshot(n int) volume.Snapshot {
	return volume.Snapshot{ID: volume.SnapshotID{Volume: "db", Name: fmt.Sprint("cold-", n)}, Created: born.Add(time.Duration(n) * time.Hour)}
}

// random is a disk's content, with a hole.
func random(seed uint64, size int) []byte {
	data := make([]byte, size)
	r := rand.NewChaCha8([32]byte{byte(seed)})
	_, _ = r.Read(data)
	clear(data[2*chunkSize : 4*chunkSize])
	return data
}

func blocks(data []byte) *volume.Blocks {
	return &volume.Blocks{ReaderAt: bytes.NewReader(data), Closer: io.NopCloser(nil), Size: int64(len(data)), Data: []volume.Range{{Start: 0, End: int64(len(data))}}, Whole: true}
}

func save(t *testing.T, v *Vault, n int, b *volume.Blocks, base Copy) (Copy, int64) {
	t.Helper()
	c, sent, err := v.Save(t.Context(), vol, snapshot(n), Order{Taken: snapshot(n).Created}, b, base)
	if err != nil {
		t.Fatal(err)
	}
	return c, sent
}

func disk(t *testing.T, size int) *os.File {
	t.Helper()
	f, err := os.CreateTemp(t.TempDir(), "disk")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	if err := f.Truncate(int64(size)); err != nil {
		t.Fatal(err)
	}
	return f
}

func restored(t *testing.T, v *Vault, c Copy, size int) []byte {
	t.Helper()
	d := disk(t, size)
	if err := v.Restore(t.Context(), c, d); err != nil {
		t.Fatal(err)
	}
	data := make([]byte, size)
	if _, err := d.ReadAt(data, 0); err != nil {
		t.Fatal(err)
	}
	return data
}

func objects(t *testing.T, s Store) (all []string) {
	t.Helper()
	if err := s.List(t.Context(), "", func(name string) error { all = append(all, name); return nil }); err != nil {
		t.Fatal(err)
	}
	return all
}

func TestFolder(t *testing.T) { testStore(t, folder(t)) }

// testStore is what each kind of store has to do for the vault.
func testStore(t *testing.T, s Store) {
	ctx := t.Context()
	if _, err := s.Get(ctx, "none/x", 100); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("Get: %v; want ErrNotExist", err)
	}
	if err := s.Delete(ctx, "none/x"); err != nil {
		t.Errorf("Delete: %v", err)
	}
	if err := s.List(ctx, "none/", func(string) error { return errors.New("there is nothing") }); err != nil {
		t.Errorf("List: %v", err)
	}
	for _, content := range []string{"first", "second"} {
		if err := s.Put(ctx, "a/b/c", []byte(content)); err != nil {
			t.Fatal(err)
		}
	}
	if data, err := s.Get(ctx, "a/b/c", 6); err != nil || string(data) != "second" {
		t.Errorf("Get: %q, %v", data, err)
	}
	if _, err := s.Get(ctx, "a/b/c", 5); !errors.Is(err, errTooLarge) {
		t.Errorf("Get what is larger than it can be: %v", err)
	}
	for i := range 5 {
		if err := s.Put(ctx, fmt.Sprint("a/d/", i), []byte{byte(i)}); err != nil {
			t.Fatal(err)
		}
	}
	if all := objects(t, s); len(all) != 6 {
		t.Errorf("List: %q", all)
	}
	n := 0
	if err := s.List(ctx, "a/d/", func(name string) error {
		n++
		if !strings.HasPrefix(name, "a/d/") {
			t.Errorf("List: %s", name)
		}
		return nil
	}); err != nil || n != 5 {
		t.Errorf("List: %d, %v", n, err)
	}
	stop := errors.New("stop")
	if err := s.List(ctx, "", func(string) error { return stop }); !errors.Is(err, stop) {
		t.Errorf("List: %v; want the callback's error", err)
	}
	for _, name := range objects(t, s) {
		if err := s.Delete(ctx, name); err != nil {
			t.Error(err)
		}
	}
	if all := objects(t, s); len(all) != 0 {
		t.Errorf("left: %q", all)
	}
}

func TestVault(t *testing.T) { testVault(t, folder(t)) }

// testVault saves a volume three times, and each copy is what the volume was; what has not changed is sent once.
func testVault(t *testing.T, s Store) {
	v := NewVault(s, testKey(t))
	first := random(1, 6*chunkSize+5000)
	one, sent := save(t, v, 1, blocks(first), Copy{})
	if sent < 4*chunkSize {
		t.Errorf("sent %d bytes", sent)
	}
	second := bytes.Clone(first)
	copy(second[3*chunkSize:], "changed")
	clear(second[:chunkSize])
	two, sent := save(t, v, 2, blocks(second), Copy{})
	if sent > 100<<10 {
		t.Errorf("for a change in one chunk %d bytes were sent", sent)
	}
	third := append(bytes.Clone(second), make([]byte, chunkSize)...) // grown
	copy(third[5*chunkSize:], "again")
	b := blocks(third)
	b.Whole, b.Data = false, []volume.Range{{Start: 5 * chunkSize, End: 5*chunkSize + 4096}, {Start: 5*chunkSize + 8192, End: 5*chunkSize + 9000}}
	three, _ := save(t, v, 3, b, two)
	for c, want := range map[Copy][]byte{one: first, two: second, three: third} {
		if !bytes.Equal(restored(t, v, c, len(want)), want) {
			t.Errorf("%s is not what was saved", c)
		}
		info, err := v.Verify(t.Context(), c, new(sync.Map), func(err error) { t.Error(err) })
		if err != nil || info.Size != int64(len(want)) || info.Content != volume.Trusted || info.Parameters["class"] != "lv2" {
			t.Errorf("%+v, %v", info, err)
		}
	}
	if again, sent := save(t, v, 3, b, two); again != three || sent > 4096 {
		t.Errorf("saved again: %v, %d bytes", again, sent)
	}
	if all, err := v.Copies(t.Context(), "db"); err != nil || len(all) != 3 || all[2] != three {
		t.Errorf("%v, %v", all, err)
	}
	if c, err := v.Find(t.Context(), "db"); err != nil || c != three {
		t.Errorf("%v, %v", c, err)
	}
	if c, err := v.Find(t.Context(), one.String()); err != nil || c != one {
		t.Errorf("%v, %v", c, err)
	}
	for _, name := range []string{"", "none", "../db", "db@", "db@20200101T000000Z", "d"} {
		if c, err := v.Find(t.Context(), name); !errors.Is(err, volume.ErrNotFound) {
			t.Errorf("%q: %v, %v; want ErrNotFound", name, c, err)
		}
	}

	for _, c := range []Copy{one, three} { // what a process that was killed has left in a folder
		for _, object := range []string{path.Join(path.Dir(c.chunk("00")), temporary+"x.age"), path.Join(path.Dir(c.Object()), temporary+path.Base(c.Object()))} {
			if err := s.Put(t.Context(), object, []byte("half")); err != nil {
				t.Fatal(err)
			}
		}
	}
	if all, err := v.Copies(t.Context(), "db"); err != nil || len(all) != 3 {
		t.Errorf("%v, %v", all, err)
	}
	if err := v.Prune(t.Context(), vol, volume.Retention{Hourly: 2}, three); err != nil {
		t.Fatal(err)
	}
	if all, err := v.Copies(t.Context(), ""); err != nil || len(all) != 2 || all[0] != two {
		t.Errorf("%v, %v", all, err)
	}
	if all := objects(t, s); len(all) != 2+6 { // 1, 3 as changed, 4, 5 before and after, 6
		t.Errorf("after Prune: %q", all)
	}
	for c, want := range map[Copy][]byte{two: second, three: third} {
		if !bytes.Equal(restored(t, v, c, len(want)), want) {
			t.Errorf("after Prune %s is not what was saved", c)
		}
	}
}

// Nothing of a volume can be read, not even guessed, without the key.
func TestEncrypted(t *testing.T) {
	f := folder(t)
	k := testKey(t)
	v := NewVault(f, k)
	c, _ := save(t, v, 1, blocks(bytes.Repeat([]byte("confidential"), chunkSize/4)), Copy{})
	for _, name := range objects(t, f) {
		data, err := f.Get(t.Context(), name, maxSealed)
		if err != nil || bytes.Contains(data, []byte("confidential")) || !bytes.HasPrefix(data, []byte("age-encryption.org/v1\n")) {
			t.Errorf("%s: %.40q, %v", name, data, err)
		}
	}
	other := NewVault(f, testKey(t))
	if err := other.Restore(t.Context(), c, disk(t, 1)); !errors.Is(err, ErrDamaged) || !strings.Contains(err.Error(), "for another key than this one (--cold-key)") {
		t.Errorf("with another key: %v", err)
	}
}

// Whatever is changed in a store, a copy is restored as it was saved or not at all, and who asks is told which chunk it was.
func TestDamaged(t *testing.T) {
	f := folder(t)
	k := testKey(t)
	v := NewVault(f, k)
	data := random(1, 6*chunkSize)
	c, _ := save(t, v, 1, blocks(data), Copy{})
	other := vol
	other.ID = "web"
	foreign, _, err := v.Save(t.Context(), other, snapshot(1), Order{Taken: snapshot(1).Created}, blocks(random(2, 6*chunkSize)), Copy{})
	if err != nil {
		t.Fatal(err)
	}
	m, err := v.manifest(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	chunk := c.chunk(m.chunks[4])
	get := func(name string) []byte {
		t.Helper()
		data, err := f.Get(t.Context(), name, maxSealed)
		if err != nil {
			t.Fatal(err)
		}
		return data
	}
	flipped := func(name string, at int) []byte {
		data := bytes.Clone(get(name))
		data[(at+len(data))%len(data)] ^= 1
		return data
	}
	seal := func(data []byte) []byte {
		t.Helper()
		sealed, err := k.seal(data)
		if err != nil {
			t.Fatal(err)
		}
		return sealed
	}
	for what, damage := range map[string]struct {
		object string
		to     []byte
		names  string
	}{
		"a chunk with another bit":                    {chunk, flipped(chunk, -100), "chunk 4 (bytes 4194304 to 5242879)"},
		"a chunk with another header":                 {chunk, flipped(chunk, 30), "chunk 4 "},
		"a chunk that is cut off":                     {chunk, get(chunk)[:1000], "chunk 4 "},
		"an empty chunk":                              {chunk, []byte{}, "chunk 4 "},
		"one that is larger than any chunk":           {chunk, make([]byte, 8<<20), "damaged: it has more than 2097152 bytes"},
		"a chunk that is missing":                     {chunk, nil, "chunk 4 (bytes 4194304 to 5242879), " + chunk + ": damaged: it is missing"},
		"another chunk in its place":                  {chunk, get(c.chunk(m.chunks[5])), "chunk 4 "},
		"one of somebody who knows the age recipient": {chunk, seal(make([]byte, chunkSize)), "its content is not what was saved"},
		"one that unpacks to much":                    {chunk, seal(make([]byte, 64<<20)), "chunk 4 "},
		"a list with another bit":                     {c.Object(), flipped(c.Object(), -5), "copy db@"},
		"an older list under another name":            {c.Object(), get(foreign.Object()), "it is one of web@"},
		"a list by who knows the recipient":           {c.Object(), seal([]byte("{\"version\":1}\nend 00\n")), "its list is not what was saved"},
		"an empty list":                               {c.Object(), seal(nil), "its list is not what was saved"},
	} {
		t.Run(what, func(t *testing.T) {
			was := get(damage.object)
			if damage.to == nil {
				err = f.Delete(t.Context(), damage.object)
			} else {
				err = f.Put(t.Context(), damage.object, damage.to)
			}
			if err != nil {
				t.Fatal(err)
			}
			d := disk(t, len(data))
			err := v.Restore(t.Context(), c, d)
			if !errors.Is(err, ErrDamaged) || !strings.Contains(err.Error(), damage.names) {
				t.Errorf("Restore: %v", err)
			}
			got := make([]byte, len(data))
			if _, err := d.ReadAt(got, 0); err != nil {
				t.Fatal(err)
			}
			for i := range got {
				if got[i] != 0 && got[i] != data[i] {
					t.Fatalf("byte %d was written, and never saved", i)
				}
			}
			var reported []error
			if _, err := v.Verify(t.Context(), c, new(sync.Map), func(err error) { reported = append(reported, err) }); !errors.Is(err, ErrDamaged) {
				t.Errorf("Verify: %v", err)
			}
			if damage.object == chunk && (len(reported) != 1 || !strings.Contains(reported[0].Error(), damage.names)) {
				t.Errorf("Verify reported %q", reported)
			}
			if err := f.Put(t.Context(), damage.object, was); err != nil {
				t.Fatal(err)
			}
		})
	}
	if !bytes.Equal(restored(t, v, c, len(data)), data) {
		t.Error("as it was before, it is not what was saved")
	}
}

// A broken store fails after some calls, as one does whose host goes away.
type broken struct {
	Store
	mu   sync.Mutex
	left int
}

var errBroken = errors.New("the store is gone")

func (b *broken) use() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.left--; b.left < 0 {
		return errBroken
	}
	return nil
}

func (b *broken) Put(ctx context.Context, name string, data []byte) error {
	return errors.Join(b.use(), b.Store.Put(ctx, name, data)) // whether it arrived is not known
}

func (b *broken) Get(ctx context.Context, name string, most int64) ([]byte, error) {
	if err := b.use(); err != nil {
		return nil, err
	}
	return b.Store.Get(ctx, name, most)
}

// Interrupted after every number of calls, saving and restoring go on where they were: nothing is sent or fetched twice but what was on its way.
func TestInterrupted(t *testing.T) {
	f := folder(t)
	k := testKey(t)
	data := random(1, 30*chunkSize)
	total := int64(0)
	for tries := 1; ; tries++ {
		c, sent, err := NewVault(&broken{Store: f, left: 3}, k).Save(t.Context(), vol, snapshot(1), Order{Taken: snapshot(1).Created}, blocks(data), Copy{})
		total += sent
		if err == nil {
			if tries == 1 { // how many it takes depends on how many calls were on their way when the store broke
				t.Error("it was not interrupted")
			}
			d := disk(t, len(data))
			for tries = 1; ; tries++ {
				err := NewVault(&broken{Store: f, left: 4}, k).Restore(t.Context(), c, d)
				if err == nil {
					break
				}
				if !errors.Is(err, errBroken) || tries > 40 {
					t.Fatalf("restore, try %d: %v", tries, err)
				}
			}
			got := make([]byte, len(data))
			if _, err := d.ReadAt(got, 0); err != nil || !bytes.Equal(got, data) {
				t.Errorf("what was restored is not what was saved: %v", err)
			}
			break
		}
		if all, err := NewVault(f, k).Copies(t.Context(), ""); !errors.Is(err, nil) || len(all) > 1 {
			t.Fatalf("%v, %v", all, err)
		}
		if !errors.Is(err, errBroken) || tries > 40 {
			t.Fatalf("save, try %d: %v", tries, err)
		}
	}
	if total > 30*chunkSize {
		t.Errorf("%d bytes were sent for %d", total, len(data))
	}
}

// A volume that was restored elsewhere has newer copies than the former one, whose host comes back and goes on copying.
func TestFormerVolume(t *testing.T) {
	v := NewVault(folder(t), testKey(t))
	now := vol
	now.Created = born.Add(2 * time.Hour)
	current, _, err := v.Save(t.Context(), now, snapshot(3), Order{Taken: snapshot(3).Created}, blocks(random(2, 5*chunkSize)), Copy{})
	if err != nil {
		t.Fatal(err)
	}
	former, _ := save(t, v, 9, blocks(random(1, 5*chunkSize)), Copy{})
	if c, err := v.Find(t.Context(), "db"); err != nil || c != current {
		t.Errorf("the newest is %+v, %v", c, err)
	}
	if err := v.Prune(t.Context(), now, volume.Retention{}, current); err != nil {
		t.Fatal(err)
	}
	restored(t, v, former, 5*chunkSize)
	restored(t, v, current, 5*chunkSize)
}

// snapshots are a volume's in a backend that knows what has changed since an earlier one.
type snapshots struct {
	Source
	all   []volume.Snapshot
	data  []byte // of the newest
	since volume.SnapshotID
	now   volume.Volume
}

func (s *snapshots) Get(context.Context, string) (volume.Volume, error) { return s.now, nil }

func (s *snapshots) Snapshots(context.Context, string) ([]volume.Snapshot, error) { return s.all, nil }

func (s *snapshots) Open(_ context.Context, _, since volume.SnapshotID) (*volume.Blocks, error) {
	s.since = since
	b := blocks(s.data)
	if since != (volume.SnapshotID{}) {
		b.Whole, b.Data = false, nil
	}
	return b, nil
}

func goesOn() {}

// A snapshot that was deleted, and taken again under its name, is another one: what has changed since is not told by it.
func TestSnapshotTakenAgain(t *testing.T) {
	v := NewVault(folder(t), testKey(t))
	source := &snapshots{now: vol}
	k := NewKeeper(source, v, slog.New(slog.DiscardHandler), nil)
	first, again, later := snapshot(1), snapshot(1), snapshot(2)
	again.Created = again.Created.Add(30 * time.Second)
	for i, step := range []struct {
		all   []volume.Snapshot
		seed  uint64
		since volume.SnapshotID
	}{
		{[]volume.Snapshot{first}, 1, volume.SnapshotID{}},
		{[]volume.Snapshot{again}, 2, volume.SnapshotID{}},
		{[]volume.Snapshot{again, later}, 2, again.ID},
		{[]volume.Snapshot{again, snapshot(3)}, 3, volume.SnapshotID{}},
	} {
		for i := range step.all {
			step.all[i].Automatic = true
		}
		source.all, source.data = step.all, random(step.seed, 6*chunkSize)
		c, _, err := k.save(t.Context(), vol, &state{}, goesOn)
		if err != nil || source.since != step.since {
			t.Fatalf("step %d: compared with %q, want %q, %v", i, source.since, step.since, err)
		}
		if !bytes.Equal(restored(t, v, c, len(source.data)), source.data) {
			t.Errorf("step %d: what is restored is not what was copied", i)
		}
	}
}

// forgetful is a store whose list lacks some objects.
type forgetful struct {
	Store
	forgets func(name string) bool
}

func (f *forgetful) List(ctx context.Context, prefix string, each func(string) error) error {
	return f.Store.List(ctx, prefix, func(name string) error {
		if f.forgets(name) {
			return nil
		}
		return each(name)
	})
}

// What a list does not have is sent again, not inherited; and by a list that is old nothing is removed.
func TestOldLists(t *testing.T) {
	f := folder(t)
	k := testKey(t)
	v := NewVault(f, k)
	data := random(1, 6*chunkSize)
	one, _ := save(t, v, 1, blocks(data), Copy{})
	m, err := v.manifest(t.Context(), one)
	if err != nil {
		t.Fatal(err)
	}
	if err := f.Delete(t.Context(), one.chunk(m.chunks[4])); err != nil {
		t.Fatal(err)
	}
	nothing := blocks(data) // has changed since
	nothing.Whole, nothing.Data = false, nil
	two, sent := save(t, v, 2, nothing, one)
	if sent < chunkSize || sent > 2*chunkSize {
		t.Errorf("%d bytes were sent for a chunk that was missing", sent)
	}
	for _, c := range []Copy{one, two} {
		if !bytes.Equal(restored(t, v, c, len(data)), data) {
			t.Errorf("%s is not what was saved", c)
		}
	}
	three, _ := save(t, v, 3, blocks(random(2, 6*chunkSize)), two)
	before := objects(t, f)
	old := NewVault(&forgetful{f, func(name string) bool { return name == three.Object() }}, k)
	if err := old.Prune(t.Context(), vol, volume.Retention{}, three); err == nil || !strings.Contains(err.Error(), "nothing is removed") {
		t.Errorf("by a list that is old: %v", err)
	}
	if now := objects(t, f); !slices.Equal(now, before) {
		t.Errorf("there were %q, and are %q", before, now)
	}
	if err := v.Prune(t.Context(), vol, volume.Retention{}, three); err != nil {
		t.Fatal(err)
	}
	if err := v.Restore(t.Context(), one, disk(t, len(data))); !errors.Is(err, volume.ErrNotFound) || errors.Is(err, ErrDamaged) {
		t.Errorf("restored one that was removed: %v", err)
	}
	// One that is removed while it is restored: its list was read before.
	early := NewVault(&stale{f, map[string][]byte{}}, k)
	four, _ := save(t, v, 4, blocks(data), three)
	if _, err := early.Info(t.Context(), three); err != nil {
		t.Fatal(err)
	}
	if err := v.Prune(t.Context(), vol, volume.Retention{}, four); err != nil {
		t.Fatal(err)
	}
	if err := early.Restore(t.Context(), three, disk(t, len(data))); !errors.Is(err, volume.ErrNotFound) || errors.Is(err, ErrDamaged) {
		t.Errorf("removed while it is restored: %v", err)
	}
}

// stale gives once more what was read before, and then what there is.
type stale struct {
	Store
	had map[string][]byte
}

func (s *stale) Get(ctx context.Context, name string, most int64) ([]byte, error) {
	if data, ok := s.had[name]; ok {
		delete(s.had, name)
		return data, nil
	}
	data, err := s.Store.Get(ctx, name, most)
	if err == nil {
		s.had[name] = data
	}
	return data, err
}

// Snapshots of the future are of a clock that was ahead, or is behind now: what is taken afterwards is copied all the same, as the newest, and what was copied before is not copied again.
func TestClock(t *testing.T) {
	now := time.Now().UTC().Truncate(time.Second)
	this := vol
	this.Created = now.Add(-100 * time.Hour)
	for _, steps := range [][][]int{ // the snapshots that there are, in hours from now; the last one was taken last
		{{-5}, {-5, -4}, {-4, -3}},
		{{9000}, {9000, 9001}, {9001, -4}, {-4, -3}, {-3, -2}},
	} {
		v := NewVault(folder(t), testKey(t))
		source := &snapshots{now: this}
		k := NewKeeper(source, v, slog.New(slog.DiscardHandler), nil)
		var s state
		for i, hours := range steps {
			source.all, source.data, source.since = nil, random(uint64(i), 5*chunkSize), volume.SnapshotID{}
			for _, h := range hours {
				source.all = append(source.all, volume.Snapshot{ID: volume.SnapshotID{Volume: "db", Name: fmt.Sprint("cold-", h)}, Created: now.Add(time.Duration(h) * time.Hour), Automatic: true})
			}
			if i%2 == 1 {
				s = state{} // another plugin
			}
			for range 2 {
				if _, _, err := k.save(t.Context(), this, &s, goesOn); err != nil {
					t.Fatalf("%v, %d: %v", steps, i, err)
				}
			}
			c, err := v.Find(t.Context(), "db")
			if err != nil {
				t.Fatal(err)
			}
			info, err := v.Info(t.Context(), c)
			if want := fmt.Sprint("cold-", hours[len(hours)-1]); err != nil || info.Snapshot != want {
				t.Errorf("%v, step %d: the newest copy, %s, is of snapshot %s, not %s; %v", steps, i, c, info.Snapshot, want, err)
			}
			if len(hours) > 1 && i > 0 && hours[0] == steps[i-1][len(steps[i-1])-1] && source.since.Name != fmt.Sprint("cold-", hours[0]) {
				t.Errorf("%v, step %d: compared with %q", steps, i, source.since)
			}
			if all, err := v.Copies(t.Context(), "db"); err != nil || len(all) != 1 { // the volume keeps the newest
				t.Errorf("%v, step %d: copies are %v, %v", steps, i, all, err)
			}
		}
		// What was there before is not copied, where nothing else is left, nor while what was copied is in the future.
		old := source.all[:1]
		future := volume.Snapshot{ID: volume.SnapshotID{Volume: "db", Name: "cold-9009"}, Created: now.Add(9009 * time.Hour), Automatic: true}
		for i, all := range [][]volume.Snapshot{old, append(old, future)} {
			if i == 1 {
				o := Order{Taken: future.Created, Former: []string{old[0].ID.Name + "@" + old[0].Created.Format(stamp)}}
				if _, _, err := v.Save(t.Context(), this, future, o, blocks(source.data), Copy{}); err != nil {
					t.Fatal(err)
				}
			}
			source.all, s = all, state{}
			before, err := v.Find(t.Context(), "db")
			if err != nil {
				t.Fatal(err)
			}
			if c, _, err := k.save(t.Context(), this, &s, goesOn); err != nil || c != (Copy{}) {
				t.Errorf("%v: an old snapshot is copied as %v, %v", steps, c, err)
			}
			if now, err := v.Find(t.Context(), "db"); err != nil || now != before {
				t.Errorf("%v: the newest copy was %v and is %v, %v", steps, before, now, err)
			}
		}
	}
}

func FuzzDecode(f *testing.F) {
	k := testKey(f)
	m := &manifest{header: header{Version: 1, Size: 5 * chunkSize, Chunk: chunkSize}, chunks: map[int64]string{0: k.name(nil), 4: k.name([]byte("x"))}}
	f.Add(m.encode(k))
	f.Add([]byte("{}\nend \n"))
	f.Add([]byte("\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		_, _ = decode(data, k)
		// Also what is authentic is judged.
		at := bytes.LastIndexByte(data, '\n') + 1
		signed := append(append(bytes.Clone(data[:at]), "end "...), k.sum(listUse, data[:at])...)
		m, err := decode(append(signed, '\n'), k)
		if err == nil && m.encode(k) == nil {
			t.Error("nothing")
		}
	})
}
