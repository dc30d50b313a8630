//go:build zfslab

package zfs

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cradlestack/cradlestack/csi-plugin/mount"
	"github.com/cradlestack/cradlestack/csi-plugin/volume"
	"github.com/cradlestack/cradlestack/csi-plugin/volume/volumetest"
)

// The tests in this file run in a machine that has ZFS and the pool tank: TestVMZFS starts it.

func suite() volumetest.Suite {
	return volumetest.Suite{
		New: func(t *testing.T) string {
			dataset := "tank/" + strings.ReplaceAll(t.Name(), "/", "-")
			t.Cleanup(func() { run(t, "zfs", "destroy", "-r", dataset) })
			return dataset
		},
		Open: func(storage string) (volume.Backend, error) {
			return Open(context.Background(), []Pool{{"default", storage}}, "/run/cradle/"+filepath.Base(storage)+".lock")
		},
		Rest:    rest,
		Classes: []string{volume.LV2, volume.NFS},
		FS:      []string{"ext4", "xfs"},
	}
}

func TestMain(m *testing.M) { suite().Main(m) }

func TestZFS(t *testing.T) {
	s := suite()
	if testing.Short() { // what differs with xfs is mount's own, which dir tests on this host
		s.FS = s.FS[:1]
	}
	s.Run(t)
}

// rest lists what is below the pool's dataset.
func rest(t *testing.T, storage string) []string {
	t.Helper()
	return slices.DeleteFunc(strings.Fields(run(t, "zfs", "list", "-H", "-r", "-t", "all", "-o", "name", storage)), func(name string) bool { return name == storage })
}

func run(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Errorf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

func open(t *testing.T) (b *Backend, dataset string) {
	t.Helper()
	dataset = suite().New(t)
	v, err := suite().Open(dataset)
	if err != nil {
		t.Fatal(err)
	}
	return v.(*Backend), dataset
}

func block(name string) volume.Request {
	return volume.Request{Name: name, Size: 16 << 20, Parameters: volume.Parameters{Class: volume.LV2}}
}

func must[T any](t *testing.T) func(T, error) T {
	return func(v T, err error) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

func wants(t *testing.T, err, want error, what string) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Errorf("%s: %v; want %v", what, err, want)
	}
}

// What ZFS is to keep besides its defaults is what was asked for.
func TestParameters(t *testing.T) {
	b, dataset := open(t)
	r := block("v")
	r.Compression, r.BlockSize = "zstd", 8<<10
	must[volume.Volume](t)(b.Create(t.Context(), r))
	f := volume.Request{Name: "f", Size: 64 << 20, Parameters: volume.Parameters{Class: volume.NFS, Compression: "off"}}
	must[volume.Volume](t)(b.Create(t.Context(), f))
	w := volume.Request{Name: "w", Parameters: volume.Parameters{Class: volume.LV2}, Origin: volume.Origin{Volume: "v"}, Size: 32 << 20}
	must[volume.Volume](t)(b.Clone(t.Context(), w, nil))
	for id, want := range map[string]string{
		"v": "volsize=16777216 volblocksize=8192 compression=zstd refreservation=0",
		"w": "volsize=33554432 volblocksize=8192 compression=off refreservation=0",
		"f": "refquota=67108864 compression=off mountpoint=legacy",
	} {
		for property := range strings.FieldsSeq(want) {
			name, value, _ := strings.Cut(property, "=")
			if got := strings.TrimSpace(run(t, "zfs", "get", "-Hp", "-o", "value", name, dataset+"/"+id)); got != value {
				t.Errorf("%s has %s %s; want %s", id, name, got, value)
			}
		}
	}
	for what, change := range map[string]func(*volume.Request){
		"class gfs":                     func(r *volume.Request) { r.Class = volume.GFS },
		"a file volume with blocks":     func(r *volume.Request) { r.Class = volume.NFS; r.BlockSize = 8192 },
		"a file volume with ext4":       func(r *volume.Request) { r.Class = volume.NFS; r.FS = "ext4" },
		"blocks of 512":                 func(r *volume.Request) { r.BlockSize = 512 },
		"a clone with other blocks":     func(r *volume.Request) { r.Origin.Volume = "v"; r.BlockSize = 32 << 10 },
		"a clone with another kind":     func(r *volume.Request) { r.Origin.Volume = "v"; r.FS = "xfs"; r.Size = 400 << 20 },
		"a clone of a volume for files": func(r *volume.Request) { r.Origin.Volume = "f" },
	} {
		r := block("x")
		change(&r)
		var err error
		if r.Origin.Volume == "" {
			_, err = b.Create(t.Context(), r)
		} else {
			_, err = b.Clone(t.Context(), r, nil)
		}
		wants(t, err, volume.ErrInvalid, what)
	}
}

// makeZpool makes one of two small files, a mirror, until the test ends.
func makeZpool(t *testing.T, name string) (a, b string) {
	t.Helper()
	a, b = filepath.Join(t.TempDir(), "a"), filepath.Join(t.TempDir(), "b")
	for _, file := range []string{a, b} {
		if err := os.WriteFile(file, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Truncate(file, 128<<20); err != nil {
			t.Fatal(err)
		}
	}
	run(t, "zpool", "create", "-O", "mountpoint=none", name, "mirror", a, b)
	t.Cleanup(func() { run(t, "zpool", "destroy", name) })
	return a, b
}

// A pool that is full takes no snapshot and no volume: that is told as such, leaves nothing, and works once there is space.
func TestNoSpace(t *testing.T) {
	makeZpool(t, "full")
	b, err := Open(t.Context(), []Pool{{"default", "full/cradle"}}, "/run/cradle/full.lock")
	if err != nil {
		t.Fatal(err)
	}
	must[volume.Volume](t)(b.Create(t.Context(), block("v")))
	was := rest(t, "full/cradle")
	// Who reserves space takes it from all others, as data does.
	run(t, "zfs", "create", "-o", "mountpoint=none", "full/filler")
	free, err := strconv.ParseInt(strings.TrimSpace(run(t, "zfs", "get", "-Hp", "-o", "value", "available", "full/filler")), 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	run(t, "zfs", "set", "reservation="+number(free-32<<10), "full/filler")
	snapshot := volume.SnapshotRequest{ID: volume.SnapshotID{Volume: "v", Name: "s"}}
	clone := block("clone")
	clone.Origin.Volume = "v"
	for what, call := range map[string]func() error{
		"snapshot": func() error { _, err := b.Snapshot(t.Context(), snapshot); return err },
		"clone":    func() error { _, err := b.Clone(t.Context(), clone, nil); return err },
		"create":   func() error { _, err := b.Create(t.Context(), block("w")); return err },
		"expand":   func() error { _, err := b.Expand(t.Context(), "v", 32<<20, 0); return err },
	} {
		wants(t, call(), volume.ErrNoSpace, what)
	}
	if now := rest(t, "full/cradle"); !slices.Equal(now, was) {
		t.Errorf("there is %q", now)
	}
	run(t, "zfs", "destroy", "full/filler")
	must[volume.Snapshot](t)(b.Snapshot(t.Context(), snapshot))
	must[volume.Volume](t)(b.Clone(t.Context(), clone, nil))
}

// A pool gets full while a copy is received, whose device somebody looks at meanwhile, so that the kernel keeps what it could not write: the call fails, and when there is space the next one
// writes it, though it reads what it wanted. That has more room than it seems, as what is there is its own.
func TestReceiveFull(t *testing.T) {
	makeZpool(t, "brim")
	b, err := Open(t.Context(), []Pool{{"default", "brim/cradle"}}, "/run/cradle/brim.lock")
	if err != nil {
		t.Fatal(err)
	}
	r := block("v")
	r.Size, r.Origin.Copy = 48<<20, "v@20260101T000000Z"
	data := make([]byte, r.Size)
	for i := range data {
		data[i] = byte(rand.Uint32())
	}
	run(t, "zfs", "create", "-o", "mountpoint=none", "brim/filler")
	var looks *os.File
	_, err = b.Receive(t.Context(), r, volume.Trusted, func(_ context.Context, disk *os.File) (err error) {
		if looks, err = os.Open(disk.Name()); err != nil {
			return err
		}
		free, err := strconv.ParseInt(strings.TrimSpace(run(t, "zfs", "get", "-Hp", "-o", "value", "available", "brim/filler")), 10, 64)
		if err != nil {
			return err
		}
		run(t, "zfs", "set", "reservation="+number(free-40<<20), "brim/filler")
		_, err = disk.WriteAt(data, 0)
		return err
	})
	if err == nil {
		t.Error("received into a pool that was full")
	}
	t.Logf("full: %v", err)
	if _, err := b.Get(t.Context(), "v"); !errors.Is(err, volume.ErrNotFound) {
		t.Errorf("it is there, %v", err)
	}
	run(t, "zfs", "destroy", "brim/filler")
	written := 0
	must[volume.Volume](t)(b.Receive(t.Context(), r, volume.Trusted, func(_ context.Context, disk *os.File) error {
		have := make([]byte, 1<<20)
		for at := 0; at < len(data); at += len(have) {
			if _, err := disk.ReadAt(have, int64(at)); err != nil {
				return err
			}
			if want := data[at : at+len(have)]; !bytes.Equal(have, want) {
				if _, err := disk.WriteAt(want, int64(at)); err != nil {
					return err
				}
				written += len(want)
			}
		}
		return nil
	}))
	if written == 0 {
		t.Error("nothing was missing")
	}
	if err := mount.Forget(looks); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, len(data))
	if _, err := looks.ReadAt(got, 0); err != nil || !bytes.Equal(got, data) {
		t.Errorf("what is stored is not what was received, %v", err)
	}
	if err := looks.Close(); err != nil {
		t.Fatal(err)
	}
	if err := b.Delete(t.Context(), "v"); err != nil {
		t.Fatal(err)
	}
}

// A pool that is not there is nothing to conclude anything from: a volume in it is not deleted. One that is degraded keeps volumes.
func TestPoolMissing(t *testing.T) {
	one, half := makeZpool(t, "second")
	first := suite().New(t)
	b, err := Open(t.Context(), []Pool{{"default", first}, {"second", "second/cradle"}}, "/run/cradle/missing.lock")
	if err != nil {
		t.Fatal(err)
	}
	r := block("v")
	r.Pool = "second"
	must[volume.Volume](t)(b.Create(t.Context(), r))
	must[volume.Snapshot](t)(b.Snapshot(t.Context(), volume.SnapshotRequest{ID: volume.SnapshotID{Volume: "v", Name: "s"}}))

	r.Name, r.Size = "large", 1<<30
	_, err = b.Create(t.Context(), r)
	wants(t, err, volume.ErrNoSpace, "a volume larger than its pool")

	run(t, "zpool", "offline", "second", half)
	if err := b.Ready(t.Context()); err != nil {
		t.Errorf("degraded: %v", err)
	}
	r.Name, r.Size = "w", 16<<20
	must[volume.Volume](t)(b.Create(t.Context(), r))
	run(t, "zpool", "online", "second", half)

	other, err := Open(t.Context(), []Pool{{"second", "second/cradle"}, {"default", first}}, "/run/cradle/missing.lock")
	if err != nil {
		t.Fatal(err)
	}
	here := block("here")
	here.Pool = "default"
	must[volume.Volume](t)(other.Create(t.Context(), here))

	run(t, "zpool", "export", "second")
	wants(t, b.Ready(t.Context()), volume.ErrUnavailable, "Ready")
	wants(t, b.Delete(t.Context(), "v"), volume.ErrUnavailable, "Delete")
	wants(t, b.DeleteSnapshot(t.Context(), volume.SnapshotID{Volume: "v", Name: "s"}), volume.ErrUnavailable, "DeleteSnapshot")
	_, err = b.Get(t.Context(), "v")
	wants(t, err, volume.ErrUnavailable, "Get")
	all, err := b.List(t.Context())
	wants(t, err, volume.ErrUnavailable, "List")
	if len(all) != 1 || all[0].ID != "here" {
		t.Errorf("in the pool that is there are %+v", all)
	}
	must[volume.Volume](t)(other.Get(t.Context(), "here"))
	must[volume.Snapshot](t)(other.Snapshot(t.Context(), volume.SnapshotRequest{ID: volume.SnapshotID{Volume: "here", Name: "hourly-1"}, Automatic: true}))
	if err := other.Delete(t.Context(), "here"); err != nil {
		t.Errorf("one in the pool that is there: %v", err)
	}
	_, err = b.Snapshots(t.Context(), "")
	wants(t, err, volume.ErrUnavailable, "Snapshots")
	_, err = b.Capacity(t.Context(), r.Parameters)
	wants(t, err, volume.ErrUnavailable, "Capacity")
	r.Name, r.Pool = "new", ""
	_, err = b.Create(t.Context(), r)
	wants(t, err, volume.ErrUnavailable, "Create in another pool, of what may be in this one")
	_, err = Open(t.Context(), []Pool{{"second", "second/cradle"}}, "/run/cradle/missing.lock")
	wants(t, err, volume.ErrUnavailable, "Open")

	run(t, "zpool", "import", "-o", "readonly=on", "-d", filepath.Dir(one), "-d", filepath.Dir(half), "second")
	wants(t, b.Ready(t.Context()), volume.ErrUnavailable, "Ready of a pool that is only read")
	if v, err := b.Get(t.Context(), "v"); err != nil || v.ID != "v" {
		t.Errorf("of a pool that is only read: %+v, %v", v, err)
	}
	_, err = b.Snapshot(t.Context(), volume.SnapshotRequest{ID: volume.SnapshotID{Volume: "v", Name: "late"}})
	wants(t, err, volume.ErrUnavailable, "Snapshot in a pool that is only read")
	run(t, "zpool", "export", "second")
	run(t, "zpool", "import", "-d", filepath.Dir(one), "-d", filepath.Dir(half), "second")
	if all, err := b.Snapshots(t.Context(), "v"); err != nil || len(all) != 1 {
		t.Errorf("after the import: %+v, %v", all, err)
	}
}

// A pool whose disks fail is suspended, and then holds back whatever asks it for something. Calls say so, the one under which it happened as well; a volume in a pool
// beside it is there, and all goes on once the disks are back.
func TestSuspended(t *testing.T) {
	// It has less space than the file there says: inLab has mounted it, as ZFS opens files where the machine's first process sees them.
	const disks = "/failing"
	file := filepath.Join(disks, "a")
	if err := errors.Join(os.WriteFile(file, nil, 0o600), os.Truncate(file, 512<<20)); err != nil {
		t.Fatal(err)
	}
	run(t, "zpool", "create", "-O", "mountpoint=none", "-O", "compression=off", "failing", file)
	t.Cleanup(func() { run(t, "zpool", "destroy", "failing") })
	other := suite().New(t)
	b, err := Open(t.Context(), []Pool{{"default", other}, {"failing", "failing/cradle"}}, "/run/cradle/failing.lock")
	if err != nil {
		t.Fatal(err)
	}
	must[volume.Volume](t)(b.Create(t.Context(), block("other")))
	r := block("v")
	r.Pool, r.Size, r.Direct = "failing", 256<<20, true
	must[volume.Volume](t)(b.Create(t.Context(), r))
	s := volume.SnapshotRequest{ID: volume.SnapshotID{Volume: "v", Name: "s"}}
	must[volume.Snapshot](t)(b.Snapshot(t.Context(), s))
	source := must[volume.Source](t)(b.Stage(t.Context(), "v", volume.Use{As: volume.AsGuest}))
	// One that has a lock and reaches for a device, which comes to no end.
	held, unlock, err := b.take(t.Context(), "reaching")
	if err != nil {
		t.Fatal(err)
	}
	again := make(chan struct{})
	reached := make(chan error)
	go func() {
		err := reaching(held, "failing/cradle/v", func(context.Context) error { <-again; return nil })
		unlock()
		reached <- err
	}()
	writer := exec.Command("dd", "if=/dev/urandom", "of="+source.Guest.Block.Path, "bs=1M", "count=100", "conv=fsync")
	if err := writer.Start(); err != nil {
		t.Fatal(err)
	}
	for n := 0; err == nil; n++ { // until one meets it
		more := volume.SnapshotRequest{ID: volume.SnapshotID{Volume: "v", Name: "s" + strconv.Itoa(n)}}
		if _, err = b.Snapshot(t.Context(), more); err == nil {
			err = b.DeleteSnapshot(t.Context(), more.ID)
		}
	}
	wants(t, err, ErrSuspended, "the call that met it")
	t.Log(err)
	wants(t, <-reached, ErrSuspended, "who reached for a device")
	locked := func() error {
		brief, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
		defer cancel()
		_, unlock, err := b.locks.Take(brief, "reaching")
		if err == nil {
			unlock()
		}
		return err
	}
	wants(t, locked(), context.DeadlineExceeded, "the lock of what was left alone")
	second := r
	second.Name = "w"
	for what, call := range map[string]func() error{
		"Ready":          func() error { return b.Ready(t.Context()) },
		"List":           func() error { _, err := b.List(t.Context()); return err },
		"Get":            func() error { _, err := b.Get(t.Context(), "v"); return err },
		"Capacity":       func() error { _, err := b.Capacity(t.Context(), r.Parameters); return err },
		"Create":         func() error { _, err := b.Create(t.Context(), second); return err },
		"DeleteSnapshot": func() error { return b.DeleteSnapshot(t.Context(), volume.SnapshotID{Volume: "w", Name: "t"}) },
		"Delete":         func() error { return b.Delete(t.Context(), "w") },
		"Repair":         func() error { return b.Repair(t.Context(), true, func(string) {}) },
		"Open": func() error {
			_, err := Open(t.Context(), []Pool{{"failing", "failing/cradle"}}, "/run/cradle/failing.lock")
			return err
		},
	} {
		wants(t, call(), ErrSuspended, what)
	}
	if v := must[volume.Volume](t)(b.Get(t.Context(), "other")); v.ID != "other" {
		t.Errorf("beside it: %+v", v)
	}
	// What the program that was left alone works on has its lock: who waits for that is told why.
	wants(t, b.Delete(t.Context(), "v"), ErrSuspended, "Delete of the volume whose call hangs")
	wants(t, b.Delete(t.Context(), "reaching"), ErrSuspended, "Delete of what is locked")
	close(again)

	run(t, "mount", "-o", "remount,size=600m", disks)
	run(t, "zpool", "clear", "failing")
	if err := writer.Wait(); err != nil {
		t.Errorf("who wrote: %v", err)
	}
	for end := time.Now().Add(time.Minute); locked() != nil; {
		if time.Now().After(end) {
			t.Fatal("the lock of what was left alone does not end with it")
		}
	}
	for _, s := range must[[]volume.Snapshot](t)(b.Snapshots(t.Context(), "v")) { // the one that was left alone may be among them
		if err := b.DeleteSnapshot(t.Context(), s.ID); err != nil {
			t.Error(err)
		}
	}
	if err := errors.Join(b.Ready(t.Context()), b.Delete(t.Context(), "v")); err != nil {
		t.Error(err)
	}
}

// Names may be as long as CSI allows, of a snapshot with its volume's as ZFS does.
func TestLongNames(t *testing.T) {
	b, dataset := open(t)
	long := strings.Repeat("n", volume.MaxName)
	must[volume.Volume](t)(b.Create(t.Context(), block(long)))
	w := block("w" + long[1:])
	w.Origin.Volume = long
	must[volume.Volume](t)(b.Clone(t.Context(), w, nil))
	name := strings.Repeat("s", maxDataset-len(dataset)-len("/@")-len(long))
	_, err := b.Snapshot(t.Context(), volume.SnapshotRequest{ID: volume.SnapshotID{Volume: long, Name: name + "s"}})
	wants(t, err, volume.ErrInvalid, "a snapshot's name that is too long by 1")
	w.Name, w.Origin = "x", volume.Origin{Snapshot: volume.SnapshotID{Volume: long, Name: name}}
	must[volume.Snapshot](t)(b.Snapshot(t.Context(), volume.SnapshotRequest{ID: w.Origin.Snapshot}))
	must[volume.Volume](t)(b.Clone(t.Context(), w, nil))
	if err := b.DeleteSnapshot(t.Context(), w.Origin.Snapshot); err != nil { // which gives it another name
		t.Error(err)
	}
	for _, id := range []string{long, w.Name, "w" + long[1:]} {
		if err := b.Delete(t.Context(), id); err != nil {
			t.Error(err)
		}
	}
	if all := rest(t, dataset); len(all) > 0 {
		t.Errorf("left: %q", all)
	}
	_, err = Open(t.Context(), []Pool{{"default", "tank/" + long}}, "/run/cradle/long.lock")
	if err == nil || !strings.Contains(err.Error(), "too long") {
		t.Errorf("a pool below which volumes have no room for their names: %v", err)
	}
}

// Clones outlive what they were made of, in whatever order all goes.
func TestFamilies(t *testing.T) {
	for _, order := range [][]string{{"a", "b", "c", "d"}, {"d", "c", "b", "a"}, {"c", "a", "b", "d"}} {
		t.Run(strings.Join(order, ""), func(t *testing.T) { family(t, order) })
	}
}

func family(t *testing.T, order []string) {
	b, dataset := open(t)
	must[volume.Volume](t)(b.Create(t.Context(), block("a")))
	s := volume.SnapshotRequest{ID: volume.SnapshotID{Volume: "a", Name: "s"}}
	must[volume.Snapshot](t)(b.Snapshot(t.Context(), s))
	for name, origin := range map[string]volume.Origin{"b": {Snapshot: s.ID}, "c": {Volume: "a"}} {
		r := block(name)
		r.Origin = origin
		must[volume.Volume](t)(b.Clone(t.Context(), r, nil))
	}
	d := block("d")
	d.Origin.Volume = "b"
	must[volume.Volume](t)(b.Clone(t.Context(), d, nil))
	for _, id := range []string{"a", "b"} { // of one name, each
		auto := volume.SnapshotRequest{ID: volume.SnapshotID{Volume: id, Name: "hourly-20260106T150000Z"}, Automatic: true}
		must[volume.Snapshot](t)(b.Snapshot(t.Context(), auto))
	}
	if err := b.DeleteSnapshot(t.Context(), s.ID); err != nil {
		t.Error(err)
	}
	for i, id := range order {
		if err := b.Delete(t.Context(), id); err != nil {
			t.Fatal(err)
		}
		if all := must[[]volume.Volume](t)(b.List(t.Context())); len(all) != 3-i {
			t.Errorf("%d are left after %s", len(all), id)
		}
	}
	if all := rest(t, dataset); len(all) > 0 {
		t.Errorf("left: %q", all)
	}
}

// What others have below the pool's dataset, or as snapshots of its volumes, is not taken for ours.
func TestForeign(t *testing.T) {
	b, dataset := open(t)
	run(t, "zfs", "create", "-o", "mountpoint=none", dataset+"/foreign")
	must[volume.Volume](t)(b.Create(t.Context(), block("v")))
	run(t, "zfs", "snapshot", dataset+"/v@by-hand")
	run(t, "zfs", "snapshot", dataset+"/v@autosnap_2026-01-06_15:00:00_hourly")
	if all := must[[]volume.Volume](t)(b.List(t.Context())); len(all) != 1 || all[0].ID != "v" {
		t.Errorf("volumes: %+v", all)
	}
	if err := b.Delete(t.Context(), "foreign"); err == nil {
		t.Error("a foreign dataset was deleted")
	}
	if _, err := b.Create(t.Context(), block("foreign")); err == nil {
		t.Error("a foreign dataset passes as a volume")
	}
	if all := must[[]volume.Snapshot](t)(b.Snapshots(t.Context(), "v")); len(all) != 1 || all[0].ID.Name != "by-hand" || all[0].Automatic || all[0].Size != 16<<20 {
		t.Errorf("snapshots: %+v", all)
	}
	wants(t, b.Delete(t.Context(), "v"), volume.ErrInUse, "delete what has a snapshot by hand")

	run(t, "zfs", "set", property+"={", dataset+"/v")
	if all, err := b.List(t.Context()); err != nil || len(all) != 0 {
		t.Errorf("with a damaged record: %+v, %v", all, err)
	}
	found := 0
	if err := b.Repair(t.Context(), false, func(string) { found++ }); err != nil || found != 1 {
		t.Errorf("Repair: %d, %v", found, err)
	}
	run(t, "zfs", "list", dataset+"/v")
}

// A volume can be deleted in any moment of a copy's beginning: while "zfs send" says what there is to be read, too.
func TestDeletedWhileOpened(t *testing.T) {
	b, dataset := open(t)
	id := volume.SnapshotID{Volume: "v", Name: "cold-20260106T160000Z"}
	begin := func() {
		t.Helper()
		r := block("v")
		r.Direct = true
		must[volume.Volume](t)(b.Create(t.Context(), r))
		source := must[volume.Source](t)(b.Stage(t.Context(), "v", volume.Use{As: volume.AsGuest}))
		data := make([]byte, r.Size)
		_, _ = rand.NewChaCha8([32]byte{}).Read(data)
		if err := os.WriteFile(source.Guest.Block.Path, data, 0o600); err != nil {
			t.Fatal(err)
		}
		must[volume.Snapshot](t)(b.Snapshot(t.Context(), volume.SnapshotRequest{ID: id, Automatic: true}))
	}
	begin()
	began := time.Now()
	if err := must[*volume.Blocks](t)(b.Open(t.Context(), id, volume.SnapshotID{})).Close(); err != nil {
		t.Fatal(err)
	}
	took := time.Since(began)
	if err := b.Delete(t.Context(), "v"); err != nil {
		t.Fatal(err)
	}
	const moments = 4 // each takes an emulated machine some fifty programs
	for i := range moments {
		begin()
		var g sync.WaitGroup
		g.Go(func() {
			blocks, err := b.Open(t.Context(), id, volume.SnapshotID{})
			if err == nil {
				for err == nil {
					_, err = blocks.ReadAt(make([]byte, 4096), 0)
				}
				if err := blocks.Close(); err != nil {
					t.Error(err)
				}
			}
			if !errors.Is(err, volume.ErrDeleted) && !errors.Is(err, volume.ErrNotFound) {
				t.Errorf("the copy: %v", err)
			}
			t.Logf("deleted %d/%d of the time after its beginning: %v", i, moments, err)
		})
		time.Sleep(took * time.Duration(i) / moments)
		if err := b.Delete(t.Context(), "v"); err != nil {
			t.Error(err)
		}
		g.Wait()
		if all := rest(t, dataset); len(all) > 0 {
			t.Fatalf("left: %q", all)
		}
	}
}

// What was left of a copy goes with its volume.
func TestDeletedAfterKill(t *testing.T) {
	b, dataset := open(t)
	must[volume.Volume](t)(b.Create(t.Context(), block("v")))
	id := volume.SnapshotID{Volume: "v", Name: "cold-20260106T160000Z"}
	must[volume.Snapshot](t)(b.Snapshot(t.Context(), volume.SnapshotRequest{ID: id, Automatic: true}))
	run(t, "zfs", "clone", dataset+"/v@"+id.Name, dataset+"/"+copying+"v")
	if err := b.Delete(t.Context(), "v"); err != nil {
		t.Fatal(err)
	}
	if all := rest(t, dataset); len(all) > 0 {
		t.Errorf("left: %q", all)
	}
}

// What a call that was killed between two programs leaves is found and removed.
func TestRepair(t *testing.T) {
	b, dataset := open(t)
	must[volume.Volume](t)(b.Create(t.Context(), block("v")))
	run(t, "zfs", "snapshot", "-o", record{}.String(), between(dataset+"/v", "w"))
	run(t, "zfs", "snapshot", "-o", record{}.String(), dataset+"/v@"+deleted+"1")
	run(t, "zfs", "clone", dataset+"/v@"+deleted+"1", dataset+"/byhand")
	run(t, "zfs", "create", "-s", "-V", "16M", dataset+"/"+receiving+"w")
	run(t, "zfs", "clone", dataset+"/v@"+deleted+"1", dataset+"/"+copying+"v")
	_, unlock, err := b.locks.Take(t.Context(), "v", "w", copying+"v")
	if err != nil {
		t.Fatal(err)
	}
	if err := b.Repair(t.Context(), false, func(s string) { t.Errorf("while somebody is at work: %s", s) }); err != nil {
		t.Error(err)
	}
	unlock()
	for _, c := range []struct {
		look bool
		want int
	}{{true, 4}, {false, 4}, {false, 0}} {
		var found []string
		if err := b.Repair(t.Context(), c.look, func(s string) { found = append(found, s) }); err != nil || len(found) != c.want {
			t.Errorf("look: %t: %q, %v; want %d", c.look, found, err, c.want)
		}
	}
	run(t, "zfs", "destroy", dataset+"/byhand")
	if all := rest(t, dataset); len(all) != 1 {
		t.Errorf("left: %q", all)
	}
}

// BenchmarkSnapshot takes snapshots of two volumes that have the same data, of 1 GiB and of 100 GiB, in turn: make bench runs it.
func BenchmarkSnapshot(b *testing.B) {
	defer func() {
		if _, err := zfs(context.Background(), "destroy", "-r", "tank/bench"); err != nil {
			b.Error(err)
		}
	}()
	backend, err := Open(b.Context(), []Pool{{"default", "tank/bench"}}, "/run/cradle/bench.lock")
	if err != nil {
		b.Fatal(err)
	}
	sizes := []struct {
		name string
		size int64
	}{{"1GiB", 1 << 30}, {"100GiB", 100 << 30}}
	for _, v := range sizes {
		if err := filled(b.Context(), backend, v.name, v.size); err != nil {
			b.Fatal(err)
		}
	}
	took := map[string][]time.Duration{}
	for b.Loop() {
		for _, v := range sizes {
			id := volume.SnapshotID{Volume: v.name, Name: "s"}
			begin := time.Now()
			_, err := backend.Snapshot(b.Context(), volume.SnapshotRequest{ID: id})
			took[v.name] = append(took[v.name], time.Since(begin))
			if err := errors.Join(err, backend.DeleteSnapshot(b.Context(), id)); err != nil {
				b.Fatal(err)
			}
		}
	}
	for name, all := range took {
		slices.Sort(all)
		b.ReportMetric(all[(len(all)-1)/2].Seconds(), "s/"+name)
	}
}

// filled makes a volume that has 128 MiB of data over its whole size.
func filled(ctx context.Context, b *Backend, name string, size int64) error {
	r := block(name)
	r.Size, r.Direct = 1<<30, true
	if _, err := b.Create(ctx, r); err != nil {
		return err
	}
	// It may be larger than the pool, which a sparse volume can become, but is not made.
	if _, err := zfs(ctx, "set", "volsize="+number(size), "tank/bench/"+name); err != nil {
		return err
	}
	source, err := b.Stage(ctx, name, volume.Use{As: volume.AsGuest})
	if err != nil {
		return err
	}
	disk, err := os.OpenFile(source.Guest.Block.Path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	const pieces = 128
	piece := make([]byte, 1<<20)
	_, _ = rand.NewChaCha8([32]byte{}).Read(piece)
	for i := range int64(pieces) {
		if _, err := disk.WriteAt(piece, i*(size/pieces)); err != nil {
			return errors.Join(err, disk.Close())
		}
	}
	return errors.Join(disk.Sync(), disk.Close())
}
