//go:build vm && soak

package ceph

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/cradlestack/cradlestack/csi-plugin/mount"
	"github.com/cradlestack/cradlestack/csi-plugin/volume"
	"github.com/cradlestack/cradlestack/csi-plugin/volume/volumetest"
	"github.com/cradlestack/cradlestack/internal/cephtest"
)

// TestRootSoakCeph runs the conformance suite, and reads on one host what the other one has written a thousand times.
func TestRootSoakCeph(t *testing.T) {
	lab(t)
	t.Run("Suite", func(t *testing.T) { suite.Methods(t) })
	t.Run("Hosts", func(t *testing.T) { testHosts(t, 1000) })
	t.Run("Ends", testEnds)
	t.Run("Hangs", testHangs)
	t.Run("Unanswered", testUnanswered)
	t.Run("Elsewhere", testElsewhere)
	t.Run("Evicted", testEvicted)
	t.Run("LongClone", testLongClone)
	t.Run("StoppedClone", testStoppedClone)
	t.Run("Rebooted", testRebooted)
	t.Run("Abandoned", testAbandoned)
	t.Run("Daemons", testDaemons)
	t.Run("Store", testStore)
	t.Run("Full", testFull)
	t.Run("Names", testNames)
	t.Run("Many", testMany)
	t.Run("Monitors", testMonitors)
}

// TestRootSoakCephKilled kills every call at every step.
func TestRootSoakCephKilled(t *testing.T) {
	lab(t)
	suite.Killed(t)
}

// What asks the cluster does not crash when it has nothing more to ask, which 3 of 76 did.
func testEnds(t *testing.T) {
	ctx := t.Context()
	b, err := open(fresh(t))
	must(t, err)
	for i := range 100 {
		s, err := b.session(ctx)
		must(t, err)
		if i%2 == 0 {
			must(t, s.run(ctx, nil, asks(monitor, "mon dump")))
		}
		s.close()
		if err := s.wait(); err != nil {
			t.Fatalf("session %d: it has ended with %v: %s", i, err, &s.errs)
		}
	}
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

// What asks a cluster that does not answer ends also when the plugin is gone, and with it what holds the volume.
func testUnanswered(t *testing.T) {
	b, err := open(fresh(t))
	must(t, err)
	_, err = b.Create(t.Context(), gfs("v"))
	must(t, err)
	s, err := b.session(t.Context())
	must(t, err)
	q := asks(manager, "fs subvolume ls", "vol_name", b.pools[0].FS, "group_name", b.pools[0].Group)
	must(t, s.run(t.Context(), nil, q))
	cluster.Kill("ceph-mgr")
	defer func() { must(t, cluster.Daemon("ceph-mgr", "x")) }()
	command, err := json.Marshal(q.args)
	must(t, err)
	must(t, json.NewEncoder(s.in).Encode([]string{q.to, string(command)}))
	if err := s.wait(); err == nil || err.Error() != "signal: alarm clock" {
		t.Errorf("it has ended with %v: %s", err, &s.errs)
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
		source, err := s.lend(ctx, from, ":clone:", filepath.Dir(from.path), true)
		must(t, err)
		target, err := s.lend(ctx, to, ":clone", to.path, false)
		must(t, err)
		must(t, mount.Unlock(ctx, "origin", "clone"))
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
			if !errors.Is(err, volume.ErrBusy) {
				t.Errorf("%s meanwhile: %v", what, err)
			}
		}
		must(t, errors.Join(s.giveBack(ctx, from, source, nil), s.giveBack(ctx, to, target, nil)))
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
			clients, err := s.clients(ctx, f, f.path)
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

// A clone that takes long keeps nobody from using what it is made of; what would take that away is refused at once, and works when the clone is there.
func testLongClone(t *testing.T) {
	ctx := t.Context()
	b, err := open(fresh(t))
	must(t, err)
	_, err = b.Create(ctx, gfs("origin"))
	must(t, err)
	dir := staged(t, b, "origin")
	for i := range 2000 {
		must(t, os.WriteFile(filepath.Join(dir, fmt.Sprint(i)), []byte(strings.Repeat("x", 1000)), 0o600))
	}
	kept := volume.SnapshotID{Volume: "origin", Name: "kept"}
	_, err = b.Snapshot(ctx, volume.SnapshotRequest{ID: kept})
	must(t, err)
	for _, origin := range []volume.Origin{{Volume: "origin"}, {Snapshot: kept}} {
		clone := gfs("clone")
		clone.Origin = origin
		cloned := make(chan error, 1)
		go func() {
			_, err := b.Clone(ctx, clone, nil)
			cloned <- err
		}()
		point := b.point(":clone")
		for {
			mounted, err := mount.Is(point)
			must(t, err)
			if mounted {
				break
			}
			select {
			case err := <-cloned:
				t.Fatalf("it came to its end before it was mounted: %v", err)
			case <-time.After(time.Millisecond):
			}
		}
		// Each waits until the copy has begun.
		unsnapped := b.DeleteSnapshot(ctx, kept)
		must(t, os.WriteFile(filepath.Join(dir, "0"), []byte("later"), 0o600))
		must(t, b.Unstage(ctx, "origin"))
		for what, err := range map[string]error{"delete": b.Delete(ctx, "origin"), "delete the snapshot": unsnapped} {
			if !errors.Is(err, volume.ErrBusy) {
				t.Errorf("%s meanwhile: %v; want %v", what, err, volume.ErrBusy)
			}
		}
		dir = staged(t, b, "origin")
		_, err = b.Snapshot(ctx, volume.SnapshotRequest{ID: volume.SnapshotID{Volume: "origin", Name: "meanwhile"}})
		must(t, err)
		if n, err := b.Expand(ctx, "origin", 128<<20, 0); err != nil || n != 128<<20 {
			t.Errorf("expand meanwhile: %d, %v", n, err)
		}
		if found := repaired(t, b, false); len(found) != 0 {
			t.Errorf("repaired meanwhile: %q", found)
		}
		must(t, <-cloned)
		at := staged(t, b, "clone")
		entries, err := os.ReadDir(at)
		text, rerr := os.ReadFile(filepath.Join(at, "0"))
		if err != nil || rerr != nil || len(entries) != 2000 || len(text) != 1000 {
			t.Errorf("the clone has %d files, %v, the first with %d bytes, %v", len(entries), err, len(text), rerr)
		}
		must(t, b.Unstage(ctx, "clone"))
		must(t, b.Delete(ctx, "clone"))
		must(t, b.DeleteSnapshot(ctx, volume.SnapshotID{Volume: "origin", Name: "meanwhile"}))
		must(t, os.WriteFile(filepath.Join(dir, "0"), []byte(strings.Repeat("x", 1000)), 0o600))
	}
	must(t, b.DeleteSnapshot(ctx, kept))
	must(t, b.Unstage(ctx, "origin"))
	must(t, b.Delete(ctx, "origin"))
}

// A copy whose mount hangs holds up no other call. It ends with the call that makes it, and with the process that does; the same call makes a whole clone then.
func testStoppedClone(t *testing.T) {
	ctx := t.Context()
	storage := fresh(t)
	b, err := open(storage)
	must(t, err)
	for _, id := range []string{"v", "other"} { // v is cloned to w, as volumetest does
		_, err = b.Create(ctx, gfs(id))
		must(t, err)
	}
	dir := staged(t, b, "v")
	for i := range 500 {
		must(t, os.WriteFile(filepath.Join(dir, fmt.Sprint(i)), []byte("x"), 0o600))
	}
	clone := gfs("w")
	clone.Origin.Volume, clone.Size = "v", 2*clone.Size
	point := b.point(":w")
	// copies waits until files are copied, and returns the process that does it.
	copies := func(ended chan error) (pid int) {
		t.Helper()
		for {
			links, _ := filepath.Glob("/proc/[0-9]*/fd/*")
			for _, link := range links {
				if to, _ := os.Readlink(link); strings.HasPrefix(to, point+"/") {
					pid, err := strconv.Atoi(strings.Split(link, "/")[2])
					must(t, err)
					return pid
				}
			}
			select {
			case err := <-ended:
				t.Fatalf("it has ended before it copied a file: %v", err)
			case <-time.After(time.Millisecond):
			}
		}
	}
	for what, begin := range map[string]func() (end func(), ended chan error){
		"the call ends": func() (func(), chan error) {
			ctx, cancel := context.WithCancel(ctx)
			ended := make(chan error, 1)
			go func() {
				_, err := b.Clone(ctx, clone, nil)
				ended <- err
			}()
			return cancel, ended
		},
		"the plugin is killed": func() (func(), chan error) {
			cmd := volumetest.Operation(storage, "clone")
			must(t, cmd.Start())
			ended := make(chan error, 1)
			go func() { ended <- cmd.Wait() }()
			return func() { _ = cmd.Process.Kill() }, ended
		},
	} {
		end, ended := begin()
		pid := copies(ended)
		fuse := fuseOf(t, point)
		must(t, syscall.Kill(fuse, syscall.SIGSTOP))
		for range 3 {
			_, err := b.Stage(ctx, "other", volume.Use{As: volume.AsFiles})
			must(t, err)
			must(t, b.Unstage(ctx, "other"))
		}
		end()
		if err := <-ended; err == nil {
			t.Errorf("%s: the clone has succeeded", what)
		}
		must(t, syscall.Kill(fuse, syscall.SIGCONT))
		for begin := time.Now(); syscall.Kill(pid, 0) == nil; time.Sleep(10 * time.Millisecond) {
			if time.Since(begin) > time.Minute {
				t.Fatalf("%s: process %d, which copies, goes on", what, pid)
			}
		}
		_, err := b.Clone(ctx, clone, nil)
		must(t, err)
		entries, err := os.ReadDir(staged(t, b, "w"))
		if err != nil || len(entries) != 500 {
			t.Errorf("%s: the clone has %d files, %v", what, len(entries), err)
		}
		must(t, b.Unstage(ctx, "w"))
		must(t, b.Delete(ctx, "w"))
		if found := repaired(t, b, true); len(found) != 0 {
			t.Errorf("%s: left: %q", what, found)
		}
	}
	must(t, b.Unstage(ctx, "v"))
	must(t, b.Delete(ctx, "v"))
	must(t, b.Delete(ctx, "other"))
}

// The keys of what a host had mounted when it went down are removed as it comes up, with its sessions; those of other hosts stay.
func testRebooted(t *testing.T) {
	ctx := t.Context()
	b, err := open(fresh(t))
	must(t, err)
	other := *b
	other.config.Host, other.config.Dir = "other", t.TempDir()
	direct := gfs("direct")
	direct.Direct = true
	for _, r := range []volume.Request{gfs("v"), direct} {
		_, err = b.Create(ctx, r)
		must(t, err)
	}
	_, err = b.Stage(ctx, "v", volume.Use{As: volume.AsFiles})
	must(t, err)
	staged(t, &other, "v")
	_, err = b.Attach(ctx, "direct", "/alloc/'ä%1", false)
	must(t, err)
	_, err = other.Attach(ctx, "direct", "/alloc/2", false)
	must(t, err)
	must(t, syscall.Kill(fuseOf(t, b.point("v")), syscall.SIGKILL))
	must(t, mount.Detach(b.point("v")))

	again := *b
	again.boot, again.config.Dir = "another", t.TempDir()
	keys := func() int {
		all, err := keysOf(t, b.pools[0].Group)
		must(t, err)
		return len(all)
	}
	for _, look := range []bool{true, false} {
		found := strings.Join(repaired(t, &again, look), "\n")
		for _, want := range []string{"volume v: the key of what this host had mounted before", "volume direct: the key of what this host had mounted at /alloc/'ä%1 before"} {
			if !strings.Contains(found, want) {
				t.Errorf("look: %t: %s; want %s", look, found, want)
			}
		}
		if n := keys(); look && n != 4 || !look && n != 2 {
			t.Errorf("look: %t: %d keys", look, n)
		}
	}
	if found := repaired(t, &again, false); len(found) != 0 {
		t.Errorf("again: %q", found)
	}
	must(t, os.WriteFile(filepath.Join(staged(t, &other, "v"), "file"), []byte("x"), 0o600))
	if text, err := os.ReadFile(filepath.Join(staged(t, &again, "v"), "file")); err != nil || string(text) != "x" {
		t.Errorf("staged again: %q, %v", text, err)
	}
	must(t, again.Unstage(ctx, "v"))
	must(t, other.Unstage(ctx, "v"))
	must(t, again.Delete(ctx, "v"))
	must(t, again.Delete(ctx, "direct")) // with the key of who has not detached it
	if n := keys(); n != 0 {
		t.Errorf("%d keys are left", n)
	}
}

// Each daemon of the cluster may be killed and come back: who writes goes on, and so do calls.
func testDaemons(t *testing.T) {
	ctx := t.Context()
	b, err := open(fresh(t))
	must(t, err)
	_, err = b.Create(ctx, gfs("v"))
	must(t, err)
	dir := staged(t, b, "v")
	for i, d := range [][2]string{{"ceph-mds", "a"}, {"ceph-mgr", "x"}, {"ceph-mon", "a"}} {
		written := make(chan error, 1)
		stop := make(chan struct{})
		go func() {
			var err error
			for n := 0; err == nil; n++ {
				select {
				case <-stop:
					written <- nil
					return
				default:
				}
				name, text := filepath.Join(dir, fmt.Sprint(n%10)), fmt.Sprint(n)
				if err = os.WriteFile(name, []byte(text), 0o600); err == nil {
					var got []byte
					if got, err = os.ReadFile(name); err == nil && string(got) != text {
						err = fmt.Errorf("%s has %q and not %q", name, got, text)
					}
				}
			}
			written <- err
		}()
		cluster.Kill(d[0])
		id := fmt.Sprint("during", i)
		_, err := b.Create(ctx, gfs(id))
		if err != nil && !errors.Is(err, volume.ErrUnavailable) {
			t.Errorf("create without %s: %v", d[0], err)
		}
		must(t, cluster.Daemon(d[0], d[1]))
		for begin := time.Now(); ; time.Sleep(time.Second) {
			if _, err = b.Create(ctx, gfs(id)); err == nil {
				break
			}
			if !errors.Is(err, volume.ErrUnavailable) || time.Since(begin) > 5*time.Minute {
				t.Fatalf("create with %s again: %v", d[0], err)
			}
		}
		must(t, os.WriteFile(filepath.Join(dir, "after"), []byte(id), 0o600))
		close(stop)
		if err := <-written; err != nil {
			t.Errorf("without %s: %v", d[0], err)
		}
		must(t, b.Delete(ctx, id))
	}
}

// Object stores that do not answer hold up calls for a while and no longer, and nothing is lost of what was written meanwhile.
func testStore(t *testing.T) {
	ctx := t.Context()
	b, err := open(fresh(t))
	must(t, err)
	_, err = b.Create(ctx, gfs("v"))
	must(t, err)
	file := filepath.Join(staged(t, b, "v"), "file")
	must(t, os.WriteFile(file, []byte("before"), 0o600))
	f, err := os.OpenFile(file, os.O_WRONLY, 0)
	must(t, err)
	must(t, cluster.Signal("ceph-osd", syscall.SIGSTOP))
	again := func() { must(t, cluster.Signal("ceph-osd", syscall.SIGCONT)) }
	defer again()
	written := make(chan error, 1)
	go func() { // it may wait
		_, err := f.WriteString("meanwhile")
		written <- errors.Join(err, f.Close())
	}()
	_, created := b.Create(ctx, gfs("w"))
	unstaged := b.Unstage(ctx, "v")
	for what, err := range map[string]error{"create": created, "unstage": unstaged} {
		t.Logf("%s: %v", what, err)
		if err != nil && !errors.Is(err, volume.ErrUnavailable) && !errors.Is(err, volume.ErrInUse) {
			t.Errorf("%s without object stores: %v", what, err)
		}
	}
	again()
	must(t, <-written)
	_, err = b.Create(ctx, gfs("w"))
	must(t, err)
	must(t, b.Unstage(ctx, "v"))
	if text, err := os.ReadFile(filepath.Join(staged(t, b, "v"), "file")); err != nil || string(text) != "meanwhile" {
		t.Errorf("what was written meanwhile: %q, %v", text, err)
	}
}

// A cluster that is full says so to who writes; nothing hangs, what is there can be read and removed, and after that there is room again.
func testFull(t *testing.T) {
	ctx := t.Context()
	b, err := open(fresh(t))
	must(t, err)
	_, err = b.Create(ctx, gfs("v"))
	must(t, err)
	dir := staged(t, b, "v")
	must(t, os.WriteFile(filepath.Join(dir, "before"), make([]byte, 8<<20), 0o600))
	limit := func(n string) {
		t.Helper()
		_, err := cluster.Ceph(ctx, "osd", "pool", "set-quota", "data", "max_bytes", n)
		must(t, err)
	}
	until := func(what string, done func() bool) {
		t.Helper()
		for begin := time.Now(); !done(); time.Sleep(time.Second) {
			if time.Since(begin) > 2*time.Minute {
				t.Fatalf("%s: not within 2 minutes", what)
			}
		}
	}
	limit("1")
	defer limit("0")
	write := func() error {
		f, err := os.OpenFile(filepath.Join(dir, "more"), os.O_WRONLY|os.O_CREATE, 0o600)
		if err == nil {
			_, err = f.Write(make([]byte, 1<<20))
			err = errors.Join(err, f.Sync(), f.Close())
		}
		return err
	}
	until("a full pool", func() bool {
		err := write()
		if err != nil && !errors.Is(err, syscall.ENOSPC) && !errors.Is(err, syscall.EDQUOT) {
			t.Fatalf("written to a full pool: %v", err)
		}
		return err != nil
	})
	if _, err := b.Create(ctx, gfs("w")); !errors.Is(err, volume.ErrNoSpace) {
		t.Errorf("create a volume in a full pool: %v", err)
	}
	if data, err := os.ReadFile(filepath.Join(dir, "before")); err != nil || len(data) != 8<<20 {
		t.Errorf("read of a full pool: %d bytes, %v", len(data), err)
	}
	must(t, os.Remove(filepath.Join(dir, "before")))
	limit("0")
	until("room", func() bool { return write() == nil })
	_, err = b.Create(ctx, gfs("w"))
	must(t, err)
}

// Five hundred volumes are listed.
func testMany(t *testing.T) {
	ctx := t.Context()
	b, err := open(fresh(t))
	must(t, err)
	const many = 500
	first, err := b.Create(ctx, gfs("v000"))
	must(t, err)
	must(t, b.with(ctx, func(ctx context.Context, s *session) error {
		for i := 1; i < many; i++ {
			f := &found{pool: b.pools[0], id: fmt.Sprintf("v%03d", i), record: record{Version: 1, Parameters: first.Parameters}}
			must(t, s.run(ctx, nil, f.of("create")))
			must(t, s.record(ctx, f))
		}
		return nil
	}))
	begin := time.Now()
	all, err := b.List(ctx)
	must(t, err)
	if len(all) != many || all[many-1].ID != fmt.Sprintf("v%03d", many-1) || all[0] != first {
		t.Errorf("%d volumes, %+v", len(all), all)
	}
	t.Logf("%d volumes are listed in %v", many, time.Since(begin))
	begin = time.Now()
	_, err = b.Snapshot(ctx, volume.SnapshotRequest{ID: volume.SnapshotID{Volume: "v000", Name: "s"}}) // looks at the names of all
	must(t, err)
	t.Logf("and one gets a snapshot in %v", time.Since(begin))
	must(t, b.DeleteSnapshot(ctx, volume.SnapshotID{Volume: "v000", Name: "s"}))
}

// Where the monitors get other addresses, who writes goes on, and what is mounted from then on, by hosts and guests, goes to those.
func testMonitors(t *testing.T) {
	ctx := t.Context()
	b, err := open(fresh(t))
	must(t, err)
	direct := gfs("direct")
	direct.Direct = true
	for _, r := range []volume.Request{gfs("v"), gfs("later"), direct} {
		_, err = b.Create(ctx, r)
		must(t, err)
	}
	attached := func(want string) {
		t.Helper()
		v, err := b.Attach(ctx, "direct", "/alloc/1", false)
		must(t, err)
		if len(v.Ceph.Monitors) != 1 || !strings.HasSuffix(v.Ceph.Monitors[0], want) {
			t.Errorf("a guest is to mount from %q; want %s", v.Ceph.Monitors, want)
		}
	}
	dir := staged(t, b, "v")
	must(t, os.WriteFile(filepath.Join(dir, "file"), []byte("before"), 0o600))
	attached(":3300")
	must(t, cluster.MoveMonitor(ctx))
	must(t, os.WriteFile(filepath.Join(dir, "file"), []byte("after"), 0o600))
	attached(":3301")
	staged(t, b, "later")
	other := *b
	other.config.Host, other.config.Dir = "other", t.TempDir()
	if text, err := os.ReadFile(filepath.Join(staged(t, &other, "v"), "file")); err != nil || string(text) != "after" {
		t.Errorf("read from another host: %q, %v", text, err)
	}
	if stats, err := mount.Stats(dir); err != nil || stats.Total != 64<<20 { // which a monitor answers
		t.Errorf("%v, %v", stats.Total, err)
	}
	must(t, b.Detach(ctx, "direct", "/alloc/1"))
	must(t, b.Delete(ctx, "direct"))
}

// The longest name, and one that looks like a path or an option, are names as others are.
func testNames(t *testing.T) {
	ctx := t.Context()
	b, err := open(fresh(t))
	must(t, err)
	for _, id := range []string{strings.Repeat("n", volume.MaxName), "0..", "a--group_name", "a.b_c-d"} {
		_, err := b.Create(ctx, gfs(id))
		must(t, err)
		must(t, os.WriteFile(filepath.Join(staged(t, b, id), "file"), []byte(id), 0o600))
		snap := volume.SnapshotID{Volume: id, Name: id}
		_, err = b.Snapshot(ctx, volume.SnapshotRequest{ID: snap})
		must(t, err)
		clone := gfs("c" + id[1:])
		clone.Origin.Snapshot = snap
		_, err = b.Clone(ctx, clone, nil)
		must(t, err)
		if text, err := os.ReadFile(filepath.Join(staged(t, b, clone.Name), "file")); err != nil || string(text) != id {
			t.Errorf("the clone of %s has %q, %v", id, text, err)
		}
		must(t, b.DeleteSnapshot(ctx, snap))
		for _, id := range []string{id, clone.Name} {
			must(t, b.Unstage(ctx, id))
			must(t, b.Delete(ctx, id))
		}
	}
}

// What nobody has is unmounted, unless somebody is at work in it.
func testAbandoned(t *testing.T) {
	ctx := t.Context()
	b, err := open(fresh(t))
	must(t, err)
	_, err = b.Create(ctx, gfs("v"))
	must(t, err)
	abandoned := func() string {
		t.Helper()
		source, err := b.Stage(ctx, "v", volume.Use{As: volume.AsFiles})
		must(t, err)
		if found := repaired(t, b, false); len(found) != 0 {
			t.Errorf("just mounted: %q", found)
		}
		long := time.Now().Add(-2 * idling)
		must(t, os.Chtimes(b.mounting("v").file("used"), long, long))
		return source.Directory
	}
	dir := abandoned()
	root, err := os.OpenRoot(dir)
	must(t, err)
	repaired(t, b, false)
	must(t, root.WriteFile("file", []byte("x"), 0o600))
	if err := b.Delete(ctx, "v"); !errors.Is(err, volume.ErrInUse) {
		t.Errorf("delete what somebody has open: %v", err)
	}
	must(t, root.Close())
	if found := repaired(t, b, false); len(found) != 1 || !strings.Contains(found[0], "volume v: mounted, and at no place") {
		t.Errorf("found %q", found)
	}
	if mounted, err := mount.Is(dir); err != nil || mounted {
		t.Errorf("mounted: %t, %v", mounted, err)
	}
	abandoned()
	must(t, b.Delete(ctx, "v"))
}
