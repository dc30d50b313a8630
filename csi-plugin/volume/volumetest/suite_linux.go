package volumetest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cradlestack/cradlestack/csi-plugin/mount"
	"github.com/cradlestack/cradlestack/csi-plugin/volume"
	"github.com/cradlestack/cradlestack/spec"
)

const (
	mib  = 1 << 20
	size = 64 * mib
)

// A bench is one backend on empty storage.
type bench struct {
	*testing.T
	suite   Suite
	storage string
	volume.Backend
}

func (s Suite) bench(t *testing.T, storage string) *bench {
	t.Helper()
	b, err := s.Open(storage)
	if err != nil {
		t.Fatal(err)
	}
	if c, ok := b.(io.Closer); ok {
		t.Cleanup(func() {
			if err := c.Close(); err != nil {
				t.Error(err)
			}
		})
	}
	return &bench{t, s, storage, b}
}

func block(name string) volume.Request {
	return volume.Request{Name: name, Size: size, Parameters: volume.Parameters{Class: volume.LV2}}
}

func (b *bench) ctx() context.Context { return b.Context() }

func (b *bench) must(err error) {
	b.Helper()
	if err != nil {
		b.Fatal(err)
	}
}

// wants checks an error's sentinel.
func (b *bench) wants(err, want error, what string) {
	b.Helper()
	if !errors.Is(err, want) {
		b.Errorf("%s: %v; want %v", what, err, want)
	}
}

func (b *bench) create(r volume.Request) volume.Volume {
	b.Helper()
	v, err := b.Create(b.ctx(), r)
	b.must(err)
	return v
}

// with mounts a volume's files for as long as do runs.
func (b *bench) with(id string, do func(dir string)) {
	b.Helper()
	source, err := b.Stage(b.ctx(), id, volume.Use{As: volume.AsFiles})
	b.must(err)
	if source.Device == "" {
		do(source.Directory)
		b.must(b.Unstage(b.ctx(), id))
		return
	}
	dir := b.TempDir()
	b.must(mount.Filesystem(source.Device, dir, source.FSType, mount.Options{}))
	defer func() {
		b.Helper()
		b.must(mount.Unmount(dir))
		b.must(b.Unstage(b.ctx(), id))
	}()
	do(dir)
}

func (b *bench) put(id, text string) {
	b.Helper()
	b.with(id, func(dir string) { b.must(os.WriteFile(filepath.Join(dir, "file"), []byte(text), 0o600)) })
}

func (b *bench) get(id string) (text string) {
	b.Helper()
	b.with(id, func(dir string) {
		data, err := os.ReadFile(filepath.Join(dir, "file"))
		b.must(err)
		text = string(data)
	})
	return text
}

func (b *bench) holds(id, want string) {
	b.Helper()
	if got := b.get(id); got != want {
		b.Errorf("volume %s holds %q; want %q", id, got, want)
	}
}

// clear removes every volume, those of these ids also where they can't be seen, and says what is left.
func (b *bench) clear(ids ...string) {
	b.Helper()
	all, err := b.List(b.ctx())
	b.must(err)
	for _, v := range all {
		if !slices.Contains(ids, v.ID) {
			ids = append(ids, v.ID)
		}
	}
	if s, ok := b.Backend.(volume.Snapshotter); ok {
		snaps, err := s.Snapshots(b.ctx(), "")
		b.must(err)
		for _, snap := range snaps {
			b.must(s.DeleteSnapshot(b.ctx(), snap.ID))
		}
	}
	for _, id := range ids {
		b.must(b.Unstage(b.ctx(), id))
		b.must(b.Delete(b.ctx(), id))
	}
	if rest := b.suite.Rest(b.T, b.storage); len(rest) > 0 {
		b.Errorf("left on the storage: %s", strings.Join(rest, ", "))
	}
}

// Run runs the suite.
func (s Suite) Run(t *testing.T) {
	s.Methods(t)
	s.Killed(t)
}

// Left is what there is in a directory of volumes besides their locks.
func Left(t *testing.T, pool string) (names []string) {
	t.Helper()
	entries, err := os.ReadDir(pool)
	if err != nil {
		t.Error(err)
	}
	for _, e := range entries {
		if e.Name() != ".lock" {
			names = append(names, e.Name())
		}
	}
	return names
}

// Methods runs the tests of these names, all where there are none, but does not kill anything.
func (s Suite) Methods(t *testing.T, names ...string) {
	for _, test := range []struct {
		name string
		run  func(*bench)
	}{
		{"Create", testCreate},
		{"Refused", testRefused},
		{"Delete", testDelete},
		{"Files", testFiles},
		{"Quota", testQuota},
		{"Raw", testRaw},
		{"Direct", testDirect},
		{"Expand", testExpand},
		{"Snapshot", testSnapshot},
		{"SnapshotInUse", testSnapshotInUse},
		{"Schedule", testSchedule},
		{"Browse", testBrowse},
		{"Clone", testClone},
		{"Transfer", testTransfer},
		{"DeletedWhileRead", testDeletedWhileRead},
		{"Parallel", testParallel},
	} {
		if len(names) > 0 && !slices.Contains(names, test.name) {
			continue
		}
		t.Run(test.name, func(t *testing.T) {
			b := s.bench(t, s.New(t))
			test.run(b)
			b.clear()
		})
	}
}

func testCreate(b *bench) {
	for _, class := range b.suite.Classes {
		r := volume.Request{Name: "v", Size: size, Parameters: volume.Parameters{Class: class}}
		v := b.create(r)
		if v.ID != "v" || v.Size < size || v.Class != class || v.Created.IsZero() {
			b.Errorf("class %s: made %+v", class, v)
		}
		if again := b.create(r); again != v {
			b.Errorf("class %s: made again it is %+v, and was %+v", class, again, v)
		}
		if got, err := b.Get(b.ctx(), "v"); err != nil || got != v {
			b.Errorf("class %s: Get: %+v, %v; want %+v", class, got, err, v)
		}
		if all, err := b.List(b.ctx()); err != nil || !slices.Equal(all, []volume.Volume{v}) {
			b.Errorf("class %s: List: %+v, %v", class, all, err)
		}
		others := map[string]volume.Request{
			"a larger one":  {Name: "v", Size: 2 * size, Parameters: r.Parameters},
			"a smaller one": {Name: "v", Limit: size / 2, Parameters: r.Parameters},
		}
		if other := b.another(class); other != class {
			others["another class"] = volume.Request{Name: "v", Size: size, Parameters: volume.Parameters{Class: other}}
		}
		for what, other := range others {
			if _, err := b.Create(b.ctx(), other); !errors.Is(err, volume.ErrExists) {
				b.Errorf("class %s: %s of the same name: %v; want ErrExists", class, what, err)
			}
		}
		b.must(b.Delete(b.ctx(), "v"))
		if _, err := b.Get(b.ctx(), "v"); !errors.Is(err, volume.ErrNotFound) {
			b.Errorf("class %s: Get after Delete: %v; want ErrNotFound", class, err)
		}
	}
}

// another is a class of the backend that is not this one, should there be one.
func (b *bench) another(class string) string {
	for _, other := range b.suite.Classes {
		if other != class {
			return other
		}
	}
	return class
}

// foreign is a class that is not this one, of the backend or not.
func (b *bench) foreign(class string) string {
	if other := b.another(class); other != class {
		return other
	}
	return volume.LV2
}

func testRefused(b *bench) {
	for _, name := range []string{"", ".", "..", "a/b", "/a", "a@b", "-a", ".a", "a b", "a\x00", "ä", strings.Repeat("a", volume.MaxName+1)} {
		_, err := b.Create(b.ctx(), block(name))
		b.wants(err, volume.ErrInvalid, fmt.Sprintf("create volume %.10q", name))
		_, err = b.Get(b.ctx(), name)
		b.wants(err, volume.ErrNotFound, fmt.Sprintf("get volume %.10q", name))
		_, err = b.Stage(b.ctx(), name, volume.Use{})
		b.wants(err, volume.ErrNotFound, fmt.Sprintf("stage volume %.10q", name))
		b.must(b.Delete(b.ctx(), name))
		b.must(b.Unstage(b.ctx(), name))
	}
	class := volume.Parameters{Class: b.suite.Classes[0]}
	for what, c := range map[string]struct {
		r    volume.Request
		want error
	}{
		"a limit below the size":   {volume.Request{Name: "v", Size: size, Limit: size - 1, Parameters: class}, volume.ErrRange},
		"a size below 0":           {volume.Request{Name: "v", Size: -1, Parameters: class}, volume.ErrRange},
		"a size beyond everything": {volume.Request{Name: "v", Size: volume.MaxSize + 1, Parameters: class}, volume.ErrRange},
		"more than there is":       {volume.Request{Name: "v", Size: volume.MaxSize, Parameters: class}, volume.ErrNoSpace},
		"an unknown pool":          {volume.Request{Name: "v", Size: size, Parameters: volume.Parameters{Class: class.Class, Pool: "none"}}, volume.ErrInvalid},
		"an origin":                {volume.Request{Name: "v", Size: size, Parameters: class, Origin: volume.Origin{Volume: "w"}}, volume.ErrInvalid},
	} {
		_, err := b.Create(b.ctx(), c.r)
		b.wants(err, c.want, what)
	}
	if n, err := b.Capacity(b.ctx(), class); err != nil || n < size {
		b.Errorf("Capacity: %d, %v", n, err)
	}
	if v := b.create(volume.Request{Name: "in", Size: size, Parameters: class}); v.Pool != b.Pools()[0] {
		b.Errorf("a volume is in pool %q, and there are %v", v.Pool, b.Pools())
	}
	b.must(b.Delete(b.ctx(), "in"))
	_, err := b.Capacity(b.ctx(), volume.Parameters{Class: class.Class, Pool: "none"})
	b.wants(err, volume.ErrInvalid, "the capacity of an unknown pool")
	b.must(b.Ready(b.ctx()))
}

func testDelete(b *bench) {
	b.must(b.Delete(b.ctx(), "v"))
	for _, class := range b.suite.Classes {
		v := b.create(volume.Request{Name: "v", Size: size, Parameters: volume.Parameters{Class: class}})
		b.with(v.ID, func(string) {
			b.wants(b.Delete(b.ctx(), v.ID), volume.ErrInUse, "delete a volume that is mounted, of class "+class)
		})
		b.must(b.Delete(b.ctx(), v.ID))
		b.must(b.Delete(b.ctx(), v.ID))
	}
}

// What one stage writes the next one reads, whatever the class and file system.
func testFiles(b *bench) {
	for _, class := range b.suite.Classes {
		b.create(volume.Request{Name: "v", Size: size, Parameters: volume.Parameters{Class: class}})
		b.put("v", class)
		if class == volume.NFS {
			b.stagedTogether("v")
		}
		b.with("v", func(dir string) {
			if entries, err := os.ReadDir(dir); err != nil || len(entries) != 1 {
				b.Errorf("class %s: there is more than what was written: %v, %v", class, entries, err)
			}
		})
		b.holds("v", class)
		b.must(b.Delete(b.ctx(), "v"))
	}
	for _, fs := range b.suite.FS {
		b.create(volume.Request{Name: "v", Size: 320 * mib, Parameters: volume.Parameters{Class: volume.LV2, FS: fs}})
		b.put("v", fs)
		b.with("v", func(dir string) {
			at, err := mount.At(dir)
			b.must(err)
			if at.FSType != fs {
				b.Errorf("it is %s, not %s", at.FSType, fs)
			}
			if _, err := b.Stage(b.ctx(), "v", volume.Use{As: volume.AsRaw}); !errors.Is(err, volume.ErrInUse) {
				b.Errorf("staged raw while it is mounted: %v; want ErrInUse", err)
			}
		})
		b.holds("v", fs)
		b.must(b.Delete(b.ctx(), "v"))
	}
	if slices.Contains(b.suite.Classes, volume.NFS) { // without a quota
		if v := b.create(volume.Request{Name: "v", Parameters: volume.Parameters{Class: volume.NFS}}); v.Size != 0 {
			b.Errorf("nobody asked for a size, and it has %d", v.Size)
		}
		b.put("v", "plain")
		b.holds("v", "plain")
	}
}

// stagedTogether checks that a file volume is where Stage says by itself.
func (b *bench) stagedTogether(id string) {
	b.Helper()
	s, ok := b.Backend.(volume.FilesStager)
	if !ok {
		return
	}
	all, err := s.StageFiles(b.ctx(), []string{id})
	b.must(err)
	want, err := b.Stage(b.ctx(), id, volume.Use{As: volume.AsFiles})
	b.must(err)
	if got := all[id]; got.Device != want.Device || got.Directory != want.Directory || got.FSType != want.FSType {
		b.Errorf("volume %s was staged together with others as %+v, and by itself as %+v", id, got, want)
	}
	b.must(b.Unstage(b.ctx(), id))
}

// A file volume that has a size takes no more than that, and what is removed is free again.
func testQuota(b *bench) {
	i := slices.IndexFunc(b.suite.Classes, func(class string) bool { return class != volume.LV2 })
	if i < 0 {
		return
	}
	const full = 16 * mib
	b.create(volume.Request{Name: "v", Size: 2 * full, Parameters: volume.Parameters{Class: b.suite.Classes[i]}})
	b.with("v", func(dir string) {
		first, second := filepath.Join(dir, "first"), filepath.Join(dir, "second")
		b.must(fill(first, full))
		if err := fill(second, 2*full); !errors.Is(err, unix.ENOSPC) && !errors.Is(err, unix.EDQUOT) { // ZFS lets a little more pass than the quota
			b.Errorf("%d bytes are written to a volume of %d: %v; want ENOSPC or EDQUOT", 3*full, 2*full, err)
		}
		b.must(errors.Join(os.Remove(first), os.Remove(second)))
		for end := time.Now().Add(5 * time.Minute); ; time.Sleep(100 * time.Millisecond) { // ZFS frees a moment later
			s, err := mount.Stats(dir)
			b.must(err)
			if s.Available > full {
				break
			}
			if time.Now().After(end) {
				b.Fatalf("what was removed takes its space for 5 minutes: %+v", s)
			}
		}
		b.must(fill(first, full))
	})
}

// fill writes a file that no file system makes smaller, to the device.
func fill(path string, size int64) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	piece := make([]byte, mib)
	_, _ = rand.NewChaCha8([32]byte{}).Read(piece)
	for at := int64(0); err == nil && at < size; at += mib {
		_, err = f.WriteAt(piece, at)
	}
	return errors.Join(err, f.Sync(), f.Close())
}

func (b *bench) blocks() bool { return b.suite.blocks() }

func testRaw(b *bench) {
	if !b.blocks() {
		return
	}
	b.create(block("v"))
	use := volume.Use{As: volume.AsRaw}
	source, err := b.Stage(b.ctx(), "v", use)
	b.must(err)
	if again, err := b.Stage(b.ctx(), "v", use); err != nil || again != source {
		b.Errorf("staged again: %+v, %v; want %+v", again, err, source)
	}
	device, err := os.OpenFile(source.Device, os.O_RDWR, 0)
	b.must(err)
	defer device.Close()
	if n, err := device.Seek(0, 2); err != nil || n < size {
		b.Errorf("the device has %d bytes, %v", n, err)
	}
	_, err = device.WriteAt([]byte("hello"), 12345)
	b.must(errors.Join(err, device.Sync()))
	b.wants(b.Delete(b.ctx(), "v"), volume.ErrInUse, "delete a volume whose device is open")
	b.must(device.Close())

	readOnly, err := b.Stage(b.ctx(), "v", volume.Use{As: volume.AsRaw, ReadOnly: true})
	b.must(err)
	if d, err := os.OpenFile(readOnly.Device, os.O_RDWR, 0); err == nil {
		if _, err := d.WriteAt([]byte("x"), 0); err == nil && d.Sync() == nil {
			b.Error("the read-only device was written to")
		}
		d.Close()
	}
	d, err := os.Open(readOnly.Device)
	b.must(err)
	got := make([]byte, 5)
	_, err = d.ReadAt(got, 12345)
	b.must(errors.Join(err, d.Close()))
	if string(got) != "hello" {
		b.Errorf("read %q", got)
	}
	b.must(b.Unstage(b.ctx(), "v"))
	b.must(b.Unstage(b.ctx(), "v"))

	_, err = b.Stage(b.ctx(), "v", volume.Use{As: volume.AsFiles})
	b.wants(err, volume.ErrForeign, "mount what a task has written")
	_, err = b.Stage(b.ctx(), "v", volume.Use{As: volume.AsGuest})
	b.wants(err, volume.ErrInvalid, "give a guest what is not attached directly")
	for _, class := range b.suite.Classes {
		if class != volume.LV2 {
			b.create(volume.Request{Name: "w", Parameters: volume.Parameters{Class: class}})
			_, err = b.Stage(b.ctx(), "w", volume.Use{As: volume.AsRaw})
			b.wants(err, volume.ErrInvalid, "the block device of class "+class)
			b.must(b.Delete(b.ctx(), "w"))
		}
	}
}

func testDirect(b *bench) {
	if slices.Contains(b.suite.Classes, volume.NFS) { // a filer's host mounts it, for guests
		if v := b.create(volume.Request{Name: "served", Parameters: volume.Parameters{Class: volume.NFS, Direct: true}}); v.Content == volume.Guest {
			b.Errorf("made %+v", v)
		}
		b.put("served", "x")
		b.holds("served", "x")
	}
	if !b.blocks() {
		return
	}
	r := block("v")
	r.Direct, r.Limits = true, spec.IOLimits{IOPS: 100}
	v := b.create(r)
	if v.Content != volume.Guest || v.Limits.IOPS != 100 {
		b.Errorf("made %+v", v)
	}
	source, err := b.Stage(b.ctx(), "v", volume.Use{As: volume.AsGuest})
	b.must(err)
	if source.Guest.Name != "v" || source.Guest.Block == nil || source.Device != "" || source.Directory != "" {
		b.Fatalf("staged %+v", source)
	}
	f, err := os.OpenFile(source.Guest.Block.Path, os.O_RDWR, 0)
	b.must(err)
	// What QEMU does to an image that it has open.
	b.must(unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLK, &unix.Flock_t{Type: unix.F_RDLCK, Start: 100, Len: 1}))
	if fi, err := f.Stat(); err == nil && fi.Mode().IsRegular() {
		b.wants(b.Delete(b.ctx(), "v"), volume.ErrInUse, "delete a volume that a machine has open")
	}
	b.must(f.Close())
	for _, as := range []volume.As{volume.AsFiles, volume.AsRaw} {
		_, err = b.Stage(b.ctx(), "v", volume.Use{As: as})
		b.wants(err, volume.ErrInvalid, "attach a guest's volume on the host")
	}
	b.must(b.Unstage(b.ctx(), "v"))
}

func testExpand(b *bench) {
	e, ok := b.Backend.(volume.Expander)
	if !ok {
		return
	}
	_, err := e.Expand(b.ctx(), "v", size, 0)
	b.wants(err, volume.ErrNotFound, "expand what is not there")
	for _, fs := range b.suite.FS {
		b.create(volume.Request{Name: "v", Size: 320 * mib, Parameters: volume.Parameters{Class: volume.LV2, FS: fs}})
		b.put("v", "before")
		b.with("v", func(dir string) {
			n, err := e.Expand(b.ctx(), "v", 400*mib, 0)
			if err != nil || n < 400*mib {
				b.Fatalf("expand: %d, %v", n, err)
			}
			if again, err := e.Expand(b.ctx(), "v", 400*mib, 0); err != nil || again != n {
				b.Errorf("expand again: %d, %v; want %d", again, err, n)
			}
			if fs == "ext4" && !capable(unix.CAP_SYS_RESOURCE) {
				b.Log("this host takes CAP_SYS_RESOURCE even from root, which growing a mounted ext4 needs: tested in a machine")
				at, err := mount.At(dir)
				b.must(err)
				if err := mount.Grow(b.ctx(), at.Source, dir, fs); err == nil || !strings.Contains(err.Error(), "it takes CAP_SYS_RESOURCE") {
					b.Errorf("without it: %v", err)
				}
				return
			}
			at, err := mount.At(dir)
			b.must(err)
			b.must(mount.Grow(b.ctx(), at.Source, dir, fs))
			stats, err := mount.Stats(dir)
			if err != nil || stats.Total < 300*mib {
				b.Errorf("the file system has %v, %v", stats.Total, err)
			}
		})
		if n, err := e.Expand(b.ctx(), "v", size, 0); err != nil || n < 400*mib {
			b.Errorf("a smaller size: %d, %v; want no change", n, err)
		}
		_, err := e.Expand(b.ctx(), "v", size, 2*size)
		b.wants(err, volume.ErrRange, "shrink")
		_, err = e.Expand(b.ctx(), "v", volume.MaxSize, 0)
		b.wants(err, volume.ErrNoSpace, "expand to more than there is")
		b.holds("v", "before")
		b.must(b.Delete(b.ctx(), "v"))
	}
}

// capable says whether this thread has a capability.
func capable(number int) bool {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	return unix.Capget(&header, &data[0]) == nil && data[number/32].Effective&(1<<(number%32)) != 0
}

func snap(id, name string) volume.SnapshotRequest {
	return volume.SnapshotRequest{ID: volume.SnapshotID{Volume: id, Name: name}}
}

// A volume keeps the schedule that somebody has changed, and is the one that it was made as; its snapshots and clones have none of it.
func testSchedule(b *bench) {
	s, ok := b.Backend.(volume.Scheduler)
	if !ok {
		return
	}
	b.wants(s.Reschedule(b.ctx(), "v", "none"), volume.ErrNotFound, "reschedule what is not there")
	class := b.suite.Classes[0] // it is a record, whatever the class
	r := volume.Request{Name: "v", Size: size, Parameters: volume.Parameters{Class: class, Snapshots: volume.Retention{Hourly: 2}}}
	v := b.create(r)
	if v.Schedule != "" || v.Scheduled() != r.Snapshots {
		b.Errorf("class %s: made with the schedule %q, %v", class, v.Schedule, v.Scheduled())
	}
	for _, schedule := range []string{"daily=3", "daily=3", volume.NoSnapshots, ""} {
		b.must(s.Reschedule(b.ctx(), "v", schedule))
		v.Schedule = schedule
		if got, err := b.Get(b.ctx(), "v"); err != nil || got != v {
			b.Errorf("class %s: after the schedule %q: %+v, %v; want %+v", class, schedule, got, err, v)
		}
		if again := b.create(r); again != v {
			b.Errorf("class %s: made again with the schedule %q it is %+v, not %+v", class, schedule, again, v)
		}
	}
	b.must(s.Reschedule(b.ctx(), "v", "daily=3"))
	one, err := b.Backend.(volume.Snapshotter).Snapshot(b.ctx(), snap("v", "s"))
	b.must(err)
	w := r
	w.Name, w.Origin.Snapshot = "w", one.ID
	clone, err := b.Backend.(volume.Cloner).Clone(b.ctx(), w, nil)
	b.must(err)
	if clone.Schedule != "" {
		b.Errorf("class %s: a clone has the schedule %q", class, clone.Schedule)
	}
	b.must(b.Delete(b.ctx(), "w"))
	b.must(b.Backend.(volume.Snapshotter).DeleteSnapshot(b.ctx(), one.ID))
	b.must(b.Delete(b.ctx(), "v"))
}

func testSnapshot(b *bench) {
	s, ok := b.Backend.(volume.Snapshotter)
	if !ok {
		return
	}
	c := b.Backend.(volume.Cloner)
	_, err := s.Snapshot(b.ctx(), snap("v", "s"))
	b.wants(err, volume.ErrNotFound, "snapshot of what is not there")
	for _, class := range b.suite.Classes {
		r := volume.Request{Name: "v", Size: size, Parameters: volume.Parameters{Class: class}}
		v := b.create(r)
		b.put("v", "first")
		one, err := s.Snapshot(b.ctx(), snap("v", "s"))
		b.must(err)
		if one.ID.String() != "v@s" || one.Size != v.Size || one.Created.IsZero() || one.Automatic {
			b.Errorf("class %s: %+v", class, one)
		}
		b.put("v", "second")
		if again, err := s.Snapshot(b.ctx(), snap("v", "s")); err != nil || again != one {
			b.Errorf("class %s: again: %+v, %v", class, again, err)
		}
		for _, name := range []string{"", "a/b", "..", "a@b", "cold-20260106T150000Z"} {
			_, err = s.Snapshot(b.ctx(), snap("v", name))
			b.wants(err, volume.ErrInvalid, fmt.Sprintf("snapshot %q", name))
		}
		w := r
		w.Name, w.Origin.Snapshot = "w", one.ID
		clone, err := c.Clone(b.ctx(), w, nil)
		b.must(err)
		if clone.Origin != w.Origin || clone.Size != v.Size {
			b.Errorf("class %s: the clone is %+v", class, clone)
		}
		b.holds("w", "first")
		b.put("w", "third")
		b.holds("v", "second")
		_, err = s.Snapshot(b.ctx(), snap("w", "s"))
		b.wants(err, volume.ErrExists, "the name of another volume's snapshot")
		b.wants(b.Delete(b.ctx(), "v"), volume.ErrInUse, "delete a volume that has a snapshot")

		automatic := snap("w", "s")
		automatic.Automatic = true
		if a, err := s.Snapshot(b.ctx(), automatic); err != nil || !a.Automatic {
			b.Errorf("class %s: automatic: %+v, %v", class, a, err)
		}
		all, err := s.Snapshots(b.ctx(), "")
		if err != nil || len(all) != 2 || all[0] != one || all[1].ID.String() != "w@s" {
			b.Errorf("class %s: all: %+v, %v", class, all, err)
		}
		if of, err := s.Snapshots(b.ctx(), "w"); err != nil || len(of) != 1 {
			b.Errorf("class %s: of one volume: %+v, %v", class, of, err)
		}
		if none, err := s.Snapshots(b.ctx(), "none"); err != nil || len(none) != 0 {
			b.Errorf("class %s: of none: %+v, %v", class, none, err)
		}
		b.must(s.DeleteSnapshot(b.ctx(), one.ID))
		b.must(s.DeleteSnapshot(b.ctx(), one.ID))
		if again, err := c.Clone(b.ctx(), w, nil); err != nil || again.ID != "w" {
			b.Errorf("class %s: a clone that is there, of a snapshot that is not any more: %+v, %v", class, again, err)
		}
		w.Name = "x"
		_, err = c.Clone(b.ctx(), w, nil)
		b.wants(err, volume.ErrNotFound, "clone of a snapshot that is not there any more")
		b.must(b.Delete(b.ctx(), "v"))
		_, err = s.Snapshot(b.ctx(), snap("v", "late"))
		b.wants(err, volume.ErrNotFound, "snapshot of a volume that was deleted")
		b.holds("w", "third")
		b.must(b.Delete(b.ctx(), "w")) // with its automatic snapshot
	}
}

// A snapshot of a file system that is mounted and written to is one that can be mounted. One whose writer can't be made to hold still is
// refused where it would take time.
func testSnapshotInUse(b *bench) {
	s, ok := b.Backend.(volume.Snapshotter)
	if !ok || !b.blocks() {
		return
	}
	for _, fs := range b.suite.FS {
		r := volume.Request{Name: "v", Size: 320 * mib, Parameters: volume.Parameters{Class: volume.LV2, FS: fs}}
		b.create(r)
		b.put("v", "before")
		b.with("v", func(dir string) {
			ctx, cancel := context.WithCancel(b.ctx())
			var g sync.WaitGroup
			g.Go(func() {
				for i := 0; ctx.Err() == nil; i++ {
					if err := os.WriteFile(filepath.Join(dir, fmt.Sprint("w", i%100)), make([]byte, 10000), 0o600); err != nil {
						b.Errorf("write during the snapshot: %v", err)
						return
					}
				}
			})
			_, err := s.Snapshot(b.ctx(), snap("v", "s"))
			cancel()
			g.Wait()
			b.must(err)
		})
		r.Name, r.Origin.Snapshot = "w", volume.SnapshotID{Volume: "v", Name: "s"}
		_, err := b.Backend.(volume.Cloner).Clone(b.ctx(), r, nil)
		b.must(err)
		b.with("v", func(string) { b.holds("w", "before") }) // origin and clone at the same time
		b.must(s.DeleteSnapshot(b.ctx(), r.Origin.Snapshot))
		b.must(b.Delete(b.ctx(), "w"))
		b.must(b.Delete(b.ctx(), "v"))
	}

	b.create(block("v"))
	_, err := b.Stage(b.ctx(), "v", volume.Use{As: volume.AsRaw})
	b.must(err)
	_, raw := s.Snapshot(b.ctx(), snap("v", "raw"))
	if raw != nil && !errors.Is(raw, volume.ErrInUse) {
		b.Errorf("snapshot of a raw device: %v; want success or ErrInUse", raw)
	}
	held, released := 0, 0
	held1 := snap("v", "held")
	held1.Hold = func(context.Context) (func() error, error) {
		held++
		return func() error { released++; return nil }, nil
	}
	_, err = s.Snapshot(b.ctx(), held1)
	b.must(err)
	if held != 1 || released != 1 {
		b.Errorf("held %d times and released %d times", held, released)
	}
	moved := snap("v", "moved")
	moved.Hold = func(context.Context) (func() error, error) {
		return func() error { return errors.New("it moved") }, nil
	}
	if _, err = s.Snapshot(b.ctx(), moved); raw != nil && err == nil {
		b.Error("a copy of what did not hold still passes as a snapshot")
	}
}

// What is in a snapshot can be seen, and stays while it is looked at; nothing can be changed by that.
func testBrowse(b *bench) {
	s, ok := b.Backend.(volume.Browser)
	if !ok {
		return
	}
	t := b.Backend.(volume.Snapshotter)
	id := volume.SnapshotID{Volume: "v", Name: "s"}
	_, err := s.Browse(b.ctx(), id)
	b.wants(err, volume.ErrNotFound, "what is not there is shown")
	b.wants(s.BrowseAt(b.ctx(), id, b.TempDir()), volume.ErrNotFound, "what is not there is mounted")
	for _, class := range b.suite.Classes {
		sizes := []int64{size, 0}
		if (volume.Parameters{Class: class}).Block() {
			sizes = sizes[:1]
		}
		for _, size := range sizes {
			b.create(volume.Request{Name: "v", Size: size, Parameters: volume.Parameters{Class: class}})
			b.put("v", "then")
			_, err := t.Snapshot(b.ctx(), volume.SnapshotRequest{ID: id})
			b.must(err)
			b.put("v", "now")
			root, err := s.Browse(b.ctx(), id)
			if (volume.Parameters{Class: class}).Block() {
				b.wants(err, volume.ErrInvalid, "files of a block volume are shown")
				b.wants(s.BrowseAt(b.ctx(), id, b.TempDir()), volume.ErrInvalid, "files of a block volume are mounted")
			} else {
				b.must(err)
				b.with("v", func(string) {})
				again, err := s.Browse(b.ctx(), id)
				b.must(err)
				b.must(again.Close())
				at := b.TempDir()
				b.must(s.BrowseAt(b.ctx(), id, at))
				if text, err := os.ReadFile(filepath.Join(at, "file")); err != nil || string(text) != "then" {
					b.Errorf("class %s: where the snapshot is mounted it has %q, %v", class, text, err)
				}
				if err := os.WriteFile(filepath.Join(at, "file"), []byte("x"), 0o600); !errors.Is(err, unix.EROFS) {
					b.Errorf("class %s: write where a snapshot is mounted: %v", class, err)
				}
				b.must(mount.Detach(at))
				if text, err := root.ReadFile("file"); err != nil || string(text) != "then" {
					b.Errorf("class %s: the snapshot has %q, %v", class, text, err)
				}
				for what, err := range map[string]error{
					"write": root.WriteFile("file", []byte("x"), 0o600), "create": root.WriteFile("new", nil, 0o600), "remove": root.Remove("file"), "chmod": root.Chmod("file", 0o777),
				} {
					if !errors.Is(err, unix.EROFS) {
						b.Errorf("class %s: %s in a snapshot: %v", class, what, err)
					}
				}
				b.must(t.DeleteSnapshot(b.ctx(), id))
				b.must(root.Close())
				b.holds("v", "now")
			}
			b.must(t.DeleteSnapshot(b.ctx(), id))
			b.must(b.Delete(b.ctx(), "v"))
		}
	}
}

func testClone(b *bench) {
	c, ok := b.Backend.(volume.Cloner)
	if !ok {
		return
	}
	for _, class := range b.suite.Classes {
		r := volume.Request{Name: "v", Size: size, Parameters: volume.Parameters{Class: class}}
		b.create(r)
		b.put("v", "origin")
		w := r
		w.Name, w.Origin.Volume, w.Size = "w", "v", 2*size
		clone, err := c.Clone(b.ctx(), w, nil)
		b.must(err)
		if clone.Size < 2*size {
			b.Errorf("class %s: the clone is %+v", class, clone)
		}
		if again, err := c.Clone(b.ctx(), w, nil); err != nil || again != clone {
			b.Errorf("class %s: again: %+v, %v", class, again, err)
		}
		b.holds("w", "origin")
		b.put("v", "changed")
		b.holds("w", "origin")
		if e, ok := b.Backend.(volume.Expander); ok {
			_, err := e.Expand(b.ctx(), "v", 3*size, 0)
			b.must(err)
			if again, err := c.Clone(b.ctx(), w, nil); err != nil || again != clone {
				b.Errorf("class %s: again, of an origin that has grown: %+v, %v", class, again, err)
			}
		}
		for what, t := range map[string]struct {
			change func(*volume.Request)
			want   error
		}{
			"of another class":        {func(r *volume.Request) { r.Class = b.foreign(class) }, volume.ErrInvalid},
			"that is smaller":         {func(r *volume.Request) { r.Size, r.Limit = 0, size/2 }, volume.ErrRange},
			"of what is not there":    {func(r *volume.Request) { r.Origin.Volume = "none" }, volume.ErrNotFound},
			"of a hostile name":       {func(r *volume.Request) { r.Origin.Volume = "../v" }, volume.ErrNotFound},
			"with another name's dot": {func(r *volume.Request) { r.Name = ".v" }, volume.ErrInvalid},
		} {
			other := w
			other.Name = "x"
			t.change(&other)
			_, err := c.Clone(b.ctx(), other, nil)
			b.wants(err, t.want, "class "+class+": a clone "+what)
			if err != nil && other.Class != class && !strings.Contains(err.Error(), "cradle-csi copy") {
				b.Errorf("a clone of another class: %v; what does it is not named", err)
			}
		}
		b.must(b.Delete(b.ctx(), "v"))
		b.must(b.Delete(b.ctx(), "w"))
	}
}

// What is read of a snapshot makes the same volume elsewhere, also where only what has changed since an earlier one is read.
func testTransfer(b *bench) {
	sender, ok := b.Backend.(volume.Sender)
	if !ok {
		return
	}
	snapshots, receiver := b.Backend.(volume.Snapshotter), b.Backend.(volume.Receiver)
	v := b.create(block("v"))
	var copied []byte // what the copy elsewhere has
	take := func(name string, since volume.SnapshotID) volume.SnapshotID {
		b.Helper()
		b.put("v", name)
		_, err := snapshots.Snapshot(b.ctx(), snap("v", name))
		b.must(err)
		blocks, err := sender.Open(b.ctx(), snap("v", name).ID, since)
		b.must(err)
		if blocks.Size != v.Size || len(blocks.Data) == 0 || blocks.Whole && !slices.IsSortedFunc(blocks.Data, func(x, y volume.Range) int { return int(x.Start - y.Start) }) {
			b.Errorf("%s: %d bytes, data %v", name, blocks.Size, blocks.Data)
		}
		if blocks.Whole {
			copied = make([]byte, blocks.Size)
		}
		for _, r := range blocks.Data {
			_, err := io.ReadFull(io.NewSectionReader(blocks, r.Start, r.End-r.Start), copied[r.Start:r.End])
			b.must(err)
		}
		b.must(blocks.Close())
		return snap("v", name).ID
	}
	first := take("first", volume.SnapshotID{})
	second := take("second", first)
	b.must(snapshots.DeleteSnapshot(b.ctx(), first))
	third := take("third", first) // of which nothing is known any more
	_, err := sender.Open(b.ctx(), first, volume.SnapshotID{})
	b.wants(err, volume.ErrNotFound, "open a snapshot that is not there")

	r := volume.Request{Name: "w", Size: v.Size, Parameters: v.Parameters, Origin: volume.Origin{Copy: "v@20260106T150000Z"}}
	interrupted := errors.New("interrupted")
	_, err = receiver.Receive(b.ctx(), r, volume.Trusted, func(_ context.Context, disk *os.File) error {
		_, err := disk.WriteAt(copied[:size/2], 0)
		return errors.Join(err, interrupted)
	})
	b.wants(err, interrupted, "a copy that can't be read")
	_, err = b.Get(b.ctx(), "w")
	b.wants(err, volume.ErrNotFound, "half a volume")
	if all, err := b.List(b.ctx()); err != nil || len(all) != 1 {
		b.Errorf("with half a volume there are %+v, %v", all, err)
	}
	w, err := receiver.Receive(b.ctx(), r, volume.Trusted, func(_ context.Context, disk *os.File) error {
		had := make([]byte, size/2)
		if _, err := disk.ReadAt(had, 0); err != nil || !bytes.Equal(had, copied[:size/2]) {
			b.Errorf("what was written before is not there any more: %v", err)
		}
		_, err := disk.WriteAt(copied[size/2:], size/2)
		return err
	})
	b.must(err)
	if w.Origin != r.Origin || w.Size != v.Size || w.Content != volume.Trusted {
		b.Errorf("received %+v", w)
	}
	b.holds("w", "third")
	again := func(context.Context, *os.File) error { return errors.New("it is there already") }
	if same, err := receiver.Receive(b.ctx(), r, volume.Trusted, again); err != nil || same.ID != "w" {
		b.Errorf("received again: %+v, %v", same, err)
	}
	r.Origin.Copy = "v@20260106T160000Z"
	_, err = receiver.Receive(b.ctx(), r, volume.Trusted, again)
	b.wants(err, volume.ErrExists, "another copy of the same name")
	r.Name = "x"
	_, err = receiver.Receive(b.ctx(), r, volume.Guest, func(context.Context, *os.File) error { return nil })
	b.must(err)
	_, err = b.Stage(b.ctx(), "x", volume.Use{As: volume.AsFiles})
	b.wants(err, volume.ErrForeign, "mount what a guest has written elsewhere")
	b.must(snapshots.DeleteSnapshot(b.ctx(), second))
	b.must(snapshots.DeleteSnapshot(b.ctx(), third))
}

// A volume can be deleted while it is copied elsewhere, by another process as well: the copy ends, and nothing of it is in the way of a volume of the same name. What is refused ends no copy, and
// neither does the deletion of the snapshot that is copied.
func testDeletedWhileRead(b *bench) {
	sender, ok := b.Backend.(volume.Sender)
	if !ok {
		return
	}
	other := b.suite.bench(b.T, b.storage).Backend // as another process has it: locks are of an open file
	snapshots, others := b.Backend.(volume.Snapshotter), other.(volume.Snapshotter)
	hourly := volume.SnapshotRequest{ID: volume.SnapshotID{Volume: "v", Name: "cold-20260106T160000Z"}, Automatic: true}
	begin := func(text string) *volume.Blocks {
		b.Helper()
		b.create(block("v"))
		b.put("v", text)
		_, err := snapshots.Snapshot(b.ctx(), hourly)
		b.must(err)
		blocks, err := sender.Open(b.ctx(), hourly.ID, volume.SnapshotID{})
		b.must(err)
		return blocks
	}
	read := func(blocks *volume.Blocks) error {
		_, err := blocks.ReadAt(make([]byte, 4096), blocks.Data[0].Start)
		return err
	}
	for _, deletes := range []volume.Backend{b.Backend, other} {
		blocks := begin("first")
		_, err := snapshots.Snapshot(b.ctx(), snap("v", "kept"))
		b.must(err)
		b.wants(deletes.Delete(b.ctx(), "v"), volume.ErrInUse, "delete what has a snapshot")
		b.must(read(blocks))
		b.must(snapshots.DeleteSnapshot(b.ctx(), snap("v", "kept").ID))
		b.must(others.DeleteSnapshot(b.ctx(), hourly.ID))
		if all, err := snapshots.Snapshots(b.ctx(), "v"); err != nil || len(all) != 0 {
			b.Errorf("the snapshot that is copied was deleted, and there are %+v, %v", all, err)
		}
		b.must(read(blocks))
		b.must(deletes.Delete(b.ctx(), "v"))
		b.wants(read(blocks), volume.ErrDeleted, "read what is deleted")

		// Who reads has not come to closing it yet.
		b.create(block("v"))
		b.put("v", "second")
		_, err = snapshots.Snapshot(b.ctx(), hourly)
		b.must(err)
		soon, cancel := context.WithTimeout(b.ctx(), time.Second)
		if _, err := sender.Open(soon, hourly.ID, volume.SnapshotID{}); err == nil {
			b.Error("two copy volumes of one name")
		}
		cancel()
		b.must(blocks.Close())
		again, err := sender.Open(b.ctx(), hourly.ID, volume.SnapshotID{})
		b.must(err)
		b.must(read(again))
		b.must(deletes.Delete(b.ctx(), "v"))
		b.must(again.Close())
		if rest := b.suite.Rest(b.T, b.storage); len(rest) > 0 {
			b.Errorf("left: %q", rest)
		}
	}

	// A clone's origin can go while the clone is read, and the clone while its origin is.
	c, ok := b.Backend.(volume.Cloner)
	if !ok {
		return
	}
	for _, goes := range []string{"v", "w"} {
		blocks := begin("origin")
		w := block("w")
		w.Origin.Volume = "v"
		_, err := c.Clone(b.ctx(), w, nil)
		b.must(err)
		stays := "v"
		if goes == "v" {
			b.must(blocks.Close())
			of := hourly
			of.ID.Volume, stays = "w", "w"
			_, err = snapshots.Snapshot(b.ctx(), of)
			b.must(err)
			blocks, err = sender.Open(b.ctx(), of.ID, volume.SnapshotID{})
			b.must(err)
		}
		b.must(b.Delete(b.ctx(), goes))
		b.must(read(blocks))
		b.must(b.Delete(b.ctx(), stays))
		b.wants(read(blocks), volume.ErrDeleted, "read a clone, or an origin, that is deleted")
		b.must(blocks.Close())
	}
}

// Callers at the same time: for one volume they get the same answer, for different ones all succeed.
func testParallel(b *bench) {
	var g sync.WaitGroup
	answers := make([]volume.Volume, 8)
	if testing.Short() {
		answers = answers[:4]
	}
	for i := range answers {
		g.Go(func() {
			v, err := b.Create(b.ctx(), volume.Request{Name: "v", Size: size, Parameters: volume.Parameters{Class: b.suite.Classes[0]}})
			if answers[i] = v; err != nil {
				b.Error(err)
			}
		})
		g.Go(func() {
			id := fmt.Sprint("parallel", i)
			if _, err := b.Create(b.ctx(), volume.Request{Name: id, Size: size, Parameters: volume.Parameters{Class: b.suite.Classes[0]}}); err != nil {
				b.Error(err)
			}
			if _, err := b.Stage(b.ctx(), id, volume.Use{As: volume.AsFiles}); err != nil {
				b.Error(err)
			}
			if err := b.Unstage(b.ctx(), id); err != nil {
				b.Error(err)
			}
			if i%2 == 0 {
				if err := b.Delete(b.ctx(), id); err != nil {
					b.Error(err)
				}
			}
		})
	}
	g.Wait()
	for _, v := range answers {
		if v != answers[0] {
			b.Errorf("one volume, two answers: %+v, %+v", v, answers[0])
		}
	}
	if all, err := b.List(b.ctx()); err != nil || len(all) != 1+len(answers)/2 {
		b.Errorf("%d volumes, %v", len(all), err)
	}
}
