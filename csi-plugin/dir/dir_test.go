package dir

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cradlestack/cradlestack/csi-plugin/tree"
	"github.com/cradlestack/cradlestack/csi-plugin/volume"
)

func open(t *testing.T, pools ...Pool) *Backend {
	t.Helper()
	b, err := Open(pools)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := b.Close(); err != nil {
			t.Error(err)
		}
	})
	return b
}

func files(name, pool string) volume.Request {
	return volume.Request{Name: name, Parameters: volume.Parameters{Class: volume.NFS, Pool: pool}}
}

// A note outlasts the process, and the absence of a pool's disk. It is no volume's.
func TestNote(t *testing.T) {
	dir := t.TempDir()
	one, two := Pool{"one", filepath.Join(dir, "one")}, Pool{"two", filepath.Join(dir, "two")}
	b := open(t, one, two)
	if line, err := b.Note(t.Context()); err != nil || line != "" {
		t.Errorf("at first: %q, %v", line, err)
	}
	for _, line := range []string{"first", "second one"} {
		if err := b.SetNote(t.Context(), line); err != nil {
			t.Fatal(err)
		}
		if got, err := b.Note(t.Context()); err != nil || got != line {
			t.Errorf("%q, %v", got, err)
		}
	}
	err := errors.Join(b.Repair(t.Context(), false, func(found string) { t.Error(found) }), b.Delete(t.Context(), "note"))
	if all, lerr := b.List(t.Context()); err != nil || lerr != nil || len(all) != 0 {
		t.Errorf("listed: %v, %v, %v", all, lerr, err)
	}
	if line, err := b.Note(t.Context()); err != nil || line != "second one" {
		t.Errorf("after a repair: %q, %v", line, err)
	}
	if err := os.Rename(one.Path, one.Path+".away"); err != nil {
		t.Fatal(err)
	}
	if err := b.SetNote(t.Context(), "third"); !errors.Is(err, volume.ErrUnavailable) {
		t.Errorf("without a pool: %v", err)
	}
	for _, b := range []*Backend{b, open(t, one, two)} { // which takes an empty directory for the pool
		if line, err := b.Note(t.Context()); err != nil || line != "second one" {
			t.Errorf("without a pool: %q, %v", line, err)
		}
	}
}

// A volume may be called as a file of the pool's own is, but for its dot: its folder, while it is not whole, is not that file.
func TestVolumeLock(t *testing.T) {
	b := open(t, Pool{"default", t.TempDir()})
	held, err := b.lock(t.Context(), "v")
	if err != nil {
		t.Fatal(err)
	}
	defer held.Close()
	for range 2 {
		if _, err := b.Create(t.Context(), files("lock", "")); err != nil {
			t.Fatal(err)
		}
		if _, err := b.Clone(t.Context(), volume.Request{Name: "other", Origin: volume.Origin{Volume: "lock"}, Parameters: volume.Parameters{Class: volume.NFS}}, nil); err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(b.Delete(t.Context(), "lock"), b.Delete(t.Context(), "lock"), b.Delete(t.Context(), "other")); err != nil {
			t.Fatal(err)
		}
	}
	if err := b.pools[0].root.Mkdir(hidden("lock"), 0o700); err != nil { // as one that is killed does
		t.Fatal(err)
	}
	var found []string
	if err := b.Repair(t.Context(), false, func(one string) { found = append(found, one) }); err != nil || len(found) != 1 {
		t.Errorf("%q, %v", found, err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if lock, err := b.lock(ctx, "v"); err == nil {
		lock.Close()
		t.Error("two have one lock")
	}
	if left, err := os.ReadDir(b.pools[0].path); err != nil || len(left) != 1 {
		t.Errorf("left: %v, %v", left, err)
	}
}

// A name means one volume, whatever pool it is in.
func TestPools(t *testing.T) {
	dir := t.TempDir()
	b := open(t, Pool{"fast", filepath.Join(dir, "fast")}, Pool{"red", filepath.Join(dir, "red")})
	v, err := b.Create(t.Context(), files("v", "red"))
	if err != nil || v.Pool != "red" {
		t.Fatalf("%+v, %v", v, err)
	}
	if _, err := os.Stat(filepath.Join(dir, "red/v/data")); err != nil {
		t.Error(err)
	}
	if _, err := b.Create(t.Context(), files("v", "")); err == nil {
		t.Error("a second one in the default pool")
	}
	if w, err := b.Create(t.Context(), files("w", "")); err != nil || w.Pool != "fast" {
		t.Errorf("%+v, %v", w, err)
	}
	if _, err := b.Create(t.Context(), files("x", "slow")); err == nil || !strings.Contains(err.Error(), `there is no pool "slow"; known are fast, red`) {
		t.Errorf("an unknown pool: %v", err)
	}
	if got := b.Pools(); !slices.Equal(got, []string{"fast", "red"}) {
		t.Errorf("there are %v", got)
	}
	if all, err := b.List(t.Context()); err != nil || len(all) != 2 {
		t.Errorf("%+v, %v", all, err)
	}
	if _, err := Open([]Pool{{"p", "relative"}}); err == nil || !strings.Contains(err.Error(), "is not absolute") {
		t.Errorf("a relative path: %v", err)
	}
	if _, err := Open(nil); err == nil {
		t.Error("no pool is one too few")
	}
}

// nest makes directories of a name in each other.
func nest(t *testing.T, dir, name string, levels int) {
	t.Helper()
	at, err := os.OpenRoot(dir)
	for range levels {
		if err == nil {
			err = at.Mkdir(name, 0o700)
		}
		if err != nil {
			t.Fatal(err)
		}
		var down *os.Root
		down, err = at.OpenRoot(name)
		at.Close()
		at = down
	}
	at.Close()
}

// A pool that is missing is no matter of the volumes in another one; whether there are more, and where a new one would be found, nobody knows.
func TestOnePoolMissing(t *testing.T) {
	dir := t.TempDir()
	b := open(t, Pool{"red", filepath.Join(dir, "red")}, Pool{"fast", filepath.Join(dir, "fast")})
	v, err := b.Create(t.Context(), files("v", "fast"))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(filepath.Join(dir, "red"), filepath.Join(dir, "away")); err != nil {
		t.Fatal(err)
	}
	if all, err := b.List(t.Context()); !errors.Is(err, volume.ErrUnavailable) || len(all) != 1 || all[0] != v {
		t.Errorf("there are %+v, %v", all, err)
	}
	id := volume.SnapshotID{Volume: "v", Name: "hourly-1"}
	if _, err := b.Snapshot(t.Context(), volume.SnapshotRequest{ID: id, Automatic: true}); err != nil {
		t.Errorf("a snapshot of one that is there: %v", err)
	}
	for _, p := range []string{"", "fast"} {
		if _, err := b.Create(t.Context(), files("new", p)); !errors.Is(err, volume.ErrUnavailable) {
			t.Errorf("a new one in pool %q: %v", p, err)
		}
	}
	if _, err := b.Get(t.Context(), "other"); !errors.Is(err, volume.ErrUnavailable) {
		t.Errorf("one that may be in the other pool: %v", err)
	}
	if err := b.Delete(t.Context(), "v"); err != nil {
		t.Error(err)
	}
}

// Whoever has a volume without a size can nest directories without end in it. Its snapshot is refused, before it takes all of the process's files and memory; it can be
// deleted all the same.
func TestDeep(t *testing.T) {
	pool := filepath.Join(t.TempDir(), "pool")
	b := open(t, Pool{"default", pool})
	for _, id := range []string{"long", "deep"} {
		if _, err := b.Create(t.Context(), files(id, "")); err != nil {
			t.Fatal(err)
		}
	}
	nest(t, filepath.Join(pool, "long/data"), strings.Repeat("d", unix.NAME_MAX), unix.PathMax/unix.NAME_MAX+1)
	if _, err := b.Snapshot(t.Context(), volume.SnapshotRequest{ID: volume.SnapshotID{Volume: "long", Name: "s"}}); err == nil || !strings.Contains(err.Error(), "a directory lies too deep in it") || len(err.Error()) > 300 {
		t.Errorf("%.400v", err)
	}
	if left, err := os.ReadDir(filepath.Join(pool, "long/snapshots")); err != nil || len(left) > 0 {
		t.Errorf("left of the snapshot: %v, %v", left, err)
	}

	nest(t, filepath.Join(pool, "deep/data"), "d", 6*tree.Deepest)
	nest(t, filepath.Join(pool, "deep/data"), "e", 2*tree.Deepest)
	var was unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &was); err != nil {
		t.Fatal(err)
	}
	few := was
	few.Cur = 4 * tree.Deepest
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &few); err != nil {
		t.Fatal(err)
	}
	for _, id := range []string{"long", "deep"} {
		if err := b.Delete(t.Context(), id); err != nil {
			t.Errorf("%.400v", err)
		}
	}
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &was); err != nil {
		t.Fatal(err)
	}
	if left, err := os.ReadDir(pool); err != nil || len(left) != 1 {
		t.Errorf("left in the pool: %v, %v", left, err)
	}
}

// One damaged record hides its volume, not all others; who asks for it is told.
func TestDamaged(t *testing.T) {
	dir := t.TempDir()
	b := open(t, Pool{"default", dir})
	for _, name := range []string{"good", "bad", "future"} {
		if _, err := b.Create(t.Context(), files(name, "")); err != nil {
			t.Fatal(err)
		}
	}
	for name, text := range map[string]string{"bad": "{", "future": `{"version": 2}`} {
		if err := os.WriteFile(filepath.Join(dir, name, recordFile), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if all, err := b.List(t.Context()); err != nil || len(all) != 1 || all[0].ID != "good" {
		t.Errorf("%+v, %v", all, err)
	}
	if _, err := b.Get(t.Context(), "future"); err == nil || !strings.Contains(err.Error(), "its version is 2; this program reads version 1") {
		t.Errorf("Get: %v", err)
	}
	var found []string
	if err := b.Repair(t.Context(), false, func(s string) { found = append(found, s) }); err != nil || len(found) != 2 {
		t.Errorf("Repair: %q, %v", found, err)
	}
	if _, err := os.Stat(filepath.Join(dir, "bad/data")); err != nil {
		t.Errorf("a damaged volume's data: %v", err)
	}
}

// A snapshot that is damaged is told of, by its file, to who asks for its volume's, and hides no other volume's.
func TestDamagedSnapshot(t *testing.T) {
	dir := t.TempDir()
	b := open(t, Pool{"default", dir})
	for _, id := range []string{"v", "w"} {
		if _, err := b.Create(t.Context(), files(id, "")); err != nil {
			t.Fatal(err)
		}
		for _, name := range []string{"bad", "good"} {
			if _, err := b.Snapshot(t.Context(), volume.SnapshotRequest{ID: volume.SnapshotID{Volume: id, Name: id + name}}); err != nil {
				t.Fatal(err)
			}
		}
	}
	record := filepath.Join(dir, "v/snapshots/vbad", recordFile)
	if err := os.WriteFile(record, []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if all, err := b.Snapshots(t.Context(), ""); err != nil || len(all) != 3 || all[0].ID.Name != "vgood" {
		t.Errorf("all: %v, %v", all, err)
	}
	if all, err := b.Snapshots(t.Context(), "w"); err != nil || len(all) != 2 {
		t.Errorf("the other volume's: %v, %v", all, err)
	}
	if _, err := b.Snapshots(t.Context(), "v"); err == nil || !strings.Contains(err.Error(), record) {
		t.Errorf("the volume's: %v", err)
	}
	if err := b.Delete(t.Context(), "v"); err == nil || !strings.Contains(err.Error(), record) || !strings.Contains(err.Error(), "v@vbad can't be read; delete it") {
		t.Errorf("the volume is deleted with it: %v", err)
	}
	var found []string
	if err := b.Repair(t.Context(), false, func(s string) { found = append(found, s) }); err != nil || len(found) != 1 || !strings.Contains(found[0], "v@vbad can't be read") {
		t.Errorf("Repair: %q, %v", found, err)
	}
	if err := errors.Join(b.DeleteSnapshot(t.Context(), volume.SnapshotID{Volume: "v", Name: "vbad"}), b.DeleteSnapshot(t.Context(), volume.SnapshotID{Volume: "v", Name: "vgood"}), b.Delete(t.Context(), "v")); err != nil {
		t.Error(err)
	}
}

func TestRepair(t *testing.T) {
	dir := t.TempDir()
	b := open(t, Pool{"default", dir})
	if _, err := b.Create(t.Context(), files("v", "")); err != nil {
		t.Fatal(err)
	}
	for _, half := range []string{".half", ".v", "v/snapshots/.s"} {
		if err := os.MkdirAll(filepath.Join(dir, half, "data"), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	repair := func(look bool) (found []string) {
		t.Helper()
		if err := b.Repair(t.Context(), look, func(s string) { found = append(found, s) }); err != nil {
			t.Fatal(err)
		}
		return found
	}
	if found := repair(true); len(found) != 3 {
		t.Errorf("looked: %q", found)
	}
	if found := repair(false); len(found) != 3 {
		t.Errorf("repaired: %q", found)
	}
	if found := repair(false); len(found) != 0 {
		t.Errorf("again: %q", found)
	}
	if _, err := b.Get(t.Context(), "v"); err != nil {
		t.Error(err)
	}
}

// Who waits for a volume gives up with the context; others are not concerned.
func TestLock(t *testing.T) {
	b := open(t, Pool{"default", t.TempDir()})
	held, err := b.lock(t.Context(), "v", "w")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	if _, err := b.lock(ctx, "w"); err == nil {
		t.Error("two hold one lock")
	}
	other, err := b.lock(t.Context(), "x")
	if err != nil {
		t.Fatal(err)
	}
	other.Close()
	held.Close()
	again, err := b.lock(t.Context(), "w", "v")
	if err != nil {
		t.Fatal(err)
	}
	again.Close()
}

// A pool that is not there is nothing to conclude anything from: no volume in it is taken for deleted.
func TestPoolMissing(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "pool")
	b := open(t, Pool{"default", dir})
	v, err := b.Create(t.Context(), files("v", ""))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(dir, dir+".away"); err != nil {
		t.Fatal(err)
	}
	unavailable := func(what string, err error) {
		t.Helper()
		if !errors.Is(err, volume.ErrUnavailable) {
			t.Errorf("%s: %v; want %v", what, err, volume.ErrUnavailable)
		}
	}
	unavailable("Ready", b.Ready(t.Context()))
	unavailable("Delete", b.Delete(t.Context(), "v"))
	_, err = b.Get(t.Context(), "v")
	unavailable("Get", err)
	_, err = b.List(t.Context())
	unavailable("List", err)
	_, err = b.Create(t.Context(), files("new", ""))
	unavailable("Create", err)
	_, err = b.Snapshots(t.Context(), "")
	unavailable("Snapshots", err)
	_, err = b.Snapshots(t.Context(), "v")
	unavailable("Snapshots of one", err)
	unavailable("DeleteSnapshot", b.DeleteSnapshot(t.Context(), volume.SnapshotID{Volume: "v", Name: "s"}))
	w := files("w", "")
	w.Origin.Snapshot = volume.SnapshotID{Volume: "v", Name: "s"}
	_, err = b.Clone(t.Context(), w, nil)
	unavailable("Clone", err)
	_, err = b.Browse(t.Context(), w.Origin.Snapshot)
	unavailable("Browse", err)
	_, err = b.Capacity(t.Context(), volume.Parameters{Class: volume.NFS})
	unavailable("Capacity", err)
	if err := os.Rename(dir+".away", dir); err != nil {
		t.Fatal(err)
	}
	if all, err := b.List(t.Context()); err != nil || len(all) != 1 || all[0] != v {
		t.Errorf("it is there again: %+v, %v", all, err)
	}
}

// Of a file with several names, the one that was to be copied first may be gone by then, as mail servers have it: the others are copied all the same, as one file.
func TestFirstNameGone(t *testing.T) {
	dir := t.TempDir()
	for _, name := range []string{"from", "to", "to/sub"} {
		if err := os.Mkdir(filepath.Join(dir, name), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(dir, "from/a"), []byte("text"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Link(filepath.Join(dir, "from/a"), filepath.Join(dir, "from/b")); err != nil {
		t.Fatal(err)
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	from, err := root.OpenRoot("from")
	if err != nil {
		t.Fatal(err)
	}
	defer from.Close()
	to, err := root.OpenRoot("to/sub")
	if err != nil {
		t.Fatal(err)
	}
	defer to.Close()
	var st unix.Stat_t
	if err := unix.Stat(filepath.Join(dir, "from/a"), &st); err != nil {
		t.Fatal(err)
	}
	c := treeCopy{ctx: t.Context(), to: root, links: map[inode]named{{st.Dev, st.Ino}: {"to/sub", "gone"}}}
	for _, name := range []string{"a", "b"} {
		if err := c.entry(from, to, "to/sub", name); err != nil {
			t.Fatal(err)
		}
	}
	a, aerr := os.Stat(filepath.Join(dir, "to/sub/a"))
	b, berr := os.Stat(filepath.Join(dir, "to/sub/b"))
	if aerr != nil || berr != nil || !os.SameFile(a, b) || a.Size() != 4 {
		t.Errorf("%v, %v; %v, %v", a, aerr, b, berr)
	}
}
