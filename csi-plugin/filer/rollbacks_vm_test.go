//go:build vm

package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/cradlestack/cradlestack/csi-plugin/dir"
	"github.com/cradlestack/cradlestack/csi-plugin/filer/api"
	"github.com/cradlestack/cradlestack/csi-plugin/filer/gateway"
	"github.com/cradlestack/cradlestack/csi-plugin/filer/lease"
	"github.com/cradlestack/cradlestack/csi-plugin/filer/nfs"
	"github.com/cradlestack/cradlestack/csi-plugin/filer/webdav"
	"github.com/cradlestack/cradlestack/csi-plugin/mount"
	"github.com/cradlestack/cradlestack/csi-plugin/tree"
	"github.com/cradlestack/cradlestack/csi-plugin/volume"
	"github.com/cradlestack/cradlestack/internal/filertest"
)

// eager is an engine whose clients go on in the moment in which they may.
type eager struct {
	nfs.Engine
	goOn func()
}

func (e eager) Hold(_ string, do func() error) error {
	err := do()
	e.goOn()
	return err
}

// interrupted is a backend under which the filer is told to end as soon as it has taken a snapshot.
type interrupted struct {
	*dir.Backend
	end context.CancelFunc
}

func (b interrupted) Snapshot(ctx context.Context, r volume.SnapshotRequest) (volume.Snapshot, error) {
	s, err := b.Backend.Snapshot(ctx, r)
	b.end()
	return s, err
}

// TestRootRollbackEnds: a rollback that is done is not completed once more after a crash, which would take from clients what they have been told is done since: that is settled
// before they go on. After one that the filer's end has interrupted nobody goes on before it is completed, which is told of who has asked for it.
func TestRootRollbackEnds(t *testing.T) {
	b, err := dir.Open([]dir.Pool{{Name: "default", Path: t.TempDir()}})
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	f := testFiler(t, b)
	f.audit = newAudit(f.state, f.log)
	if _, err := b.Create(t.Context(), volume.Request{Name: "v", Parameters: volume.Parameters{Class: volume.NFS}}); err != nil {
		t.Fatal(err)
	}
	if _, err := b.Snapshot(t.Context(), volume.SnapshotRequest{ID: volume.SnapshotID{Volume: "v", Name: "s"}}); err != nil {
		t.Fatal(err)
	}
	asks := caller{who: "somebody", namespace: "n", volume: "v"}
	goesOn := false
	f.engine = eager{goOn: func() {
		goesOn = true
		if p, err := f.rollbacks().read("v"); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("clients go on, and after a crash %+v would be done: %v", p, err)
		}
	}}
	if _, err := f.rollback(t.Context(), asks, "theirs", api.Rollback{Snapshot: "s"}); err != nil || !goesOn {
		t.Fatalf("clients go on: %t, %v", goesOn, err)
	}

	// One that can't begin, as the storage keeps a call, is refused, changes nothing, and is not tried again.
	for _, kept := range []error{fmt.Errorf("volume v: %w", nfs.ErrStuck), gateway.ErrStuck} {
		f.engine = exporting{failure: kept}
		done, err := f.rollback(t.Context(), asks, "theirs", api.Rollback{Snapshot: "s"})
		if !errors.Is(err, volume.ErrUnavailable) || !errors.Is(err, kept) || !strings.Contains(err.Error(), "try again") || strings.Contains(err.Error(), "is part of") || done.Undo != "" {
			t.Errorf("one that can't begin: %+v, %v", done, err)
		}
		if p, err := f.rollbacks().read("v"); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("what was refused is to be done: %+v, %v", p, err)
		}
	}

	// One that there is no memory for changes nothing, and is not tried again.
	f.lists = tree.NewMemory(100)
	f.engine = eager{goOn: func() {}}
	if _, err := f.rollback(t.Context(), asks, "theirs", api.Rollback{Snapshot: "s"}); !errors.Is(err, volume.ErrUnavailable) || !strings.Contains(err.Error(), "roll back a path in it at a time") || strings.Contains(err.Error(), "is part of") {
		t.Errorf("one of too many files: %v", err)
	}
	if _, err := f.diff(t.Context(), "v", "s", ""); !errors.Is(err, volume.ErrUnavailable) {
		t.Errorf("a comparison of too many: %v", err)
	}
	if p, err := f.rollbacks().read("v"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("what was refused is to be done: %+v, %v", p, err)
	}
	f.lists = nil
	ctx, end := context.WithCancel(t.Context())
	f.backend = interrupted{b, end}
	if _, err := f.rollback(ctx, asks, "theirs", api.Rollback{Snapshot: "s"}); !errors.Is(err, lease.ErrEnded) {
		t.Errorf("one that is interrupted: %v", err)
	}
	if _, _, err := f.gate("v").Enter(t.Context()); !errors.Is(err, gateway.ErrHeld) {
		t.Errorf("who changes something before it is completed: %v", err)
	}
	next := testFiler(t, b)
	next.dir, next.state, next.kept, next.engine, next.audit = f.dir, f.state, f.kept, f.engine, f.audit
	if err := next.complete(t.Context()); err != nil {
		t.Error(err)
	}
	if p, err := f.rollbacks().read("v"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("there is %+v still: %v", p, err)
	}
	text, err := os.ReadFile(f.audit.path)
	if told := string(text); err != nil || strings.Count(told, "\n") != 1 || !strings.Contains(told, `"who":"somebody","namespace":"n","volume":"theirs"`) {
		t.Errorf("the audit log tells %q, %v", told, err)
	}
}

// exporting is an engine that notes what it is to serve.
type exporting struct {
	nfs.Engine
	of      map[string]nfs.Export // by path
	failure error                 // of Hold
}

func (e exporting) Export(x nfs.Export) error {
	e.of[x.Path] = x
	return nil
}

func (e exporting) Unexport(path string) error {
	delete(e.of, path)
	return nil
}

func (e exporting) Hold(_ string, do func() error) error {
	if e.failure != nil {
		return e.failure
	}
	return do()
}

// TestRootRollbackKept: nobody gets a volume whose rollback was interrupted before that is completed, which it is once its storage is there again, at the filer's start or
// when somebody wants the volume. Where it can't be, another rollback takes its place, or somebody has the volume be as it is.
func TestRootRollbackKept(t *testing.T) {
	pool := filepath.Join(t.TempDir(), "pool")
	if err := os.Mkdir(pool, 0o700); err != nil {
		t.Fatal(err)
	}
	b, err := dir.Open([]dir.Pool{{Name: "default", Path: pool}})
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	snap := func(name string) {
		t.Helper()
		if _, err := b.Snapshot(t.Context(), volume.SnapshotRequest{ID: volume.SnapshotID{Volume: "v", Name: name}}); err != nil {
			t.Fatal(err)
		}
	}
	drop := func(name string) {
		t.Helper()
		if err := b.DeleteSnapshot(t.Context(), volume.SnapshotID{Volume: "v", Name: name}); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := b.Create(t.Context(), volume.Request{Name: "v", Parameters: volume.Parameters{Class: volume.NFS}}); err != nil {
		t.Fatal(err)
	}
	source, err := b.Stage(t.Context(), "v", volume.Use{As: volume.AsFiles})
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(source.Directory, "a/file")
	write := func(text string) {
		t.Helper()
		if err := errors.Join(os.MkdirAll(filepath.Dir(file), 0o755), os.WriteFile(file, []byte(text), 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	write("then")
	snap("s")
	first := testFiler(t, b)
	first.audit = newAudit(first.state, first.log)
	asks := caller{who: "somebody", namespace: "n", volume: "v"}
	interrupt := func(path string) {
		t.Helper()
		write("now")
		f := testFiler(t, nil)
		f.dir, f.state, f.kept, f.engine = first.dir, first.state, first.kept, exporting{of: map[string]nfs.Export{}}
		ctx, end := context.WithCancel(t.Context())
		f.backend = interrupted{b, end}
		if _, err := f.rollback(ctx, asks, "theirs", api.Rollback{Snapshot: "s", Path: path}); !errors.Is(err, lease.ErrEnded) {
			t.Fatalf("one that is interrupted: %v", err)
		}
	}
	// next is the next process.
	next := func() (f *filer, served map[string]nfs.Export) {
		t.Helper()
		served = map[string]nfs.Export{}
		f = testFiler(t, b)
		f.dir, f.state, f.kept, f.audit, f.engine = first.dir, first.state, first.kept, first.audit, exporting{of: served}
		f.webdav = webdav.New(filepath.Join(f.state, "webdav"), 0, f.log)
		t.Cleanup(func() { f.webdav.Close() })
		err := f.complete(t.Context())
		if errors.Is(err, volume.ErrUnavailable) {
			rerr := f.restore(t.Context())
			if len(served) > 0 {
				t.Fatalf("served half rolled back: %v", served)
			}
			if rerr == nil || !strings.Contains(rerr.Error(), "publication old: volume v") || !strings.Contains(rerr.Error(), "grant g: volume v") {
				t.Fatalf("what was published before: %v", rerr)
			}
		} else if err := errors.Join(err, f.restore(t.Context())); err != nil {
			t.Fatal(err)
		}
		return f, served
	}
	clients := []netip.Prefix{netip.MustParsePrefix("192.0.2.1/32")}
	publish := func(f *filer) error {
		_, err := f.publish(t.Context(), api.Publication{ID: "new", Volume: "v", Clients: clients})
		return err
	}
	ends := func(f *filer, served map[string]nfs.Export, want string) {
		t.Helper()
		if text, err := os.ReadFile(file); err != nil || string(text) != want {
			t.Errorf("the volume has %q, %v; want %q", text, err, want)
		}
		if _, err := f.rollbacks().read("v"); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("it is to be completed still: %v", err)
		}
		if len(served) != 2 {
			t.Errorf("served are %v", served)
		}
		if err := errors.Join(f.unpublish(t.Context(), "new"), f.unpublish(t.Context(), "old"), f.revoke(t.Context(), "g")); err != nil {
			t.Error(err)
		}
		if mounted, err := mount.Is(f.root("v")); err != nil || mounted {
			t.Errorf("it is mounted still: %t, %v", mounted, err)
		}
	}
	begin := func(path string) {
		t.Helper()
		interrupt(path)
		old := api.Publication{ID: "old", Volume: "v", Export: "/v/old", Clients: clients, Options: first.options()}
		if err := errors.Join(first.published().write("old", old), first.granted().write("g", api.Grant{ID: "g", Volume: "v", Secret: "secret"})); err != nil {
			t.Fatal(err)
		}
	}
	move := func(from, to string) {
		t.Helper()
		if err := os.Rename(from, to); err != nil {
			t.Fatal(err)
		}
	}

	// The pool is missing, and then there again when somebody wants the volume.
	away := pool + ".away"
	begin("a")
	move(pool, away)
	f, served := next()
	refused := func(err error, why string) {
		t.Helper()
		if !errors.Is(err, volume.ErrUnavailable) || !strings.Contains(err.Error(), "publish or grant it again") || !strings.Contains(err.Error(), why) {
			t.Errorf("%s: %v", why, err)
		}
	}
	if err := publish(f); !errors.Is(err, volume.ErrUnavailable) {
		t.Errorf("published without its pool: %v", err)
	}
	move(away, pool)
	_, err = f.rollback(t.Context(), asks, "theirs", api.Rollback{Snapshot: "s", Path: "a/file"})
	refused(err, "another path")
	if err := publish(f); err != nil {
		t.Error(err)
	}
	ends(f, served, "then")
	if text, err := os.ReadFile(f.audit.path); err != nil || !strings.Contains(string(text), `"who":"somebody","namespace":"n","volume":"theirs"`) || !strings.Contains(string(text), `"undo":"before-rollback-`) {
		t.Errorf("the audit log tells %q, %v", text, err)
	}

	// Or at the next start.
	begin("")
	move(pool, away)
	next()
	move(away, pool)
	f, served = next()
	if err := publish(f); err != nil {
		t.Error(err)
	}
	ends(f, served, "then")

	// The volume can't be read: a grant is refused as well.
	begin("")
	record := filepath.Join(filepath.Dir(source.Directory), "volume.json")
	if _, err := os.Stat(record); err != nil {
		t.Fatal(err)
	}
	move(record, record+".away")
	f, served = next()
	move(record+".away", record)
	if _, err := f.grant(t.Context(), api.Grant{ID: "g", Volume: "v"}); err != nil {
		t.Error(err)
	}
	if err := publish(f); err != nil {
		t.Error(err)
	}
	ends(f, served, "then")

	// Its snapshot has been deleted: it goes back to what it was.
	snap("other")
	begin("")
	p, err := first.rollbacks().read("v")
	if err != nil {
		t.Fatal(err)
	}
	drop("s")
	f, served = next()
	refused(publish(f), p.Undo)
	_, err = f.grant(t.Context(), api.Grant{ID: "g", Volume: "v"})
	refused(err, "not found")
	if errors.Is(err, volume.ErrNotFound) {
		t.Errorf("the volume is told to be not there: %v", err)
	}
	write("half")
	f.engine = exporting{of: served, failure: nfs.ErrStuck}
	if _, err := f.rollback(t.Context(), asks, "theirs", api.Rollback{Snapshot: p.Undo}); !errors.Is(err, nfs.ErrStuck) {
		t.Errorf("one that can't be done: %v", err)
	}
	refused(publish(f), "rollback to snapshot "+p.Undo) // which is to be completed now
	if err := f.isWhole("v"); err == nil || len(served) > 0 {
		t.Errorf("one that could not be completed has gone: %v, %v", err, served)
	}
	f.engine = exporting{of: served}
	if _, err := f.rollback(t.Context(), asks, "theirs", api.Rollback{Snapshot: p.Undo}); err != nil {
		t.Error(err)
	}
	if len(served) != 1 {
		t.Errorf("served once it is whole: %v", served)
	}
	if err := publish(f); err != nil {
		t.Error(err)
	}
	ends(f, served, "now")

	// Or somebody has it be as it is.
	write("then")
	snap("s")
	begin("")
	move(pool, away)
	f, served = next()
	move(away, pool)
	if err := os.Remove(f.rollbacks().file("v")); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(publish(f), f.restore(t.Context())); err != nil {
		t.Error(err)
	}
	ends(f, served, "now")

	// A record that can't be read is no reason to serve what it is about.
	begin("")
	if err := os.WriteFile(first.rollbacks().file("v"), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	f, _ = next()
	if err := publish(f); !errors.Is(err, volume.ErrUnavailable) || !strings.Contains(err.Error(), "remove it to have the volume as it is") {
		t.Errorf("of a record that can't be read: %v", err)
	}

	// Of a volume that has neither snapshot any more, as a later one of that name, nothing is to be done. One that is deleted takes its rollback along.
	begin("")
	if p, err = first.rollbacks().read("v"); err != nil {
		t.Fatal(err)
	}
	drop("s")
	drop(p.Undo)
	f, served = next()
	if err := publish(f); err != nil {
		t.Error(err)
	}
	ends(f, served, "now")
	snap("s")
	interrupt("")
	drop("s")
	f = testFiler(t, b)
	f.dir, f.state, f.kept, f.audit, f.engine = first.dir, first.state, first.kept, first.audit, exporting{}
	if err := f.complete(t.Context()); !errors.Is(err, volume.ErrUnavailable) {
		t.Errorf("one that is to be deleted: %v", err)
	}
	all, err := b.Snapshots(t.Context(), "v")
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range all {
		if !s.Automatic {
			drop(s.ID.Name)
		}
	}
	if err := f.deleteVolume(t.Context(), "v"); err != nil {
		t.Error(err)
	}
	if left, err := f.rollbacks().ids(); err != nil || len(left) > 0 {
		t.Errorf("rollbacks of what is deleted: %v, %v", left, err)
	}
	if err := f.isWhole("v"); err != nil {
		t.Error(err)
	}
}

// TestRootRollbacksAtOnce: of rollbacks of a volume that are asked for at once one is done at a time, and others are refused: the volume is as one of the snapshots,
// whole, and each that was done can be undone.
func TestRootRollbacksAtOnce(t *testing.T) {
	f := filertest.Start(t)
	const files = 200
	host := f.Volume("v", 0, nil)
	write := func(text string) {
		t.Helper()
		for i := range files {
			if err := os.WriteFile(filepath.Join(host, fmt.Sprint(i)), []byte(text), 0o644); err != nil {
				t.Fatal(err)
			}
		}
	}
	holds := func() string {
		t.Helper()
		has := map[string]int{}
		for i := range files {
			text, err := os.ReadFile(filepath.Join(host, fmt.Sprint(i)))
			if err != nil {
				t.Fatal(err)
			}
			has[string(text)]++
		}
		if len(has) != 1 {
			t.Fatalf("the files of the volume are %v", has)
		}
		for text := range has {
			return text
		}
		return ""
	}
	names := []string{"red", "blue", "green"}
	for _, name := range names {
		write(name)
		f.Must("snapshot", "v", name)
	}
	var undo string
	for range 5 {
		type outcome struct {
			to, out string
			err     error
		}
		outcomes := make(chan outcome)
		for _, name := range names {
			go func() {
				out, err := f.Command("rollback", "v", name)
				outcomes <- outcome{name, out, err}
			}()
		}
		done := map[string]bool{}
		for range names {
			switch o := <-outcomes; {
			case o.err == nil:
				done[o.to] = true
				_, undo, _ = strings.Cut(o.out, "cradle-filer rollback v ")
			case !strings.Contains(o.err.Error(), "it is being rolled back"):
				t.Errorf("rollback to %s: %v", o.to, o.err)
			}
		}
		if now := holds(); !done[now] {
			t.Errorf("the volume is as %s, and rolled back to %v", now, done)
		}
	}
	f.Must("rollback", "v", strings.TrimSpace(undo))
	holds()
	if left, err := os.ReadDir(filepath.Join(f.State(), "rollbacks")); err != nil && !errors.Is(err, os.ErrNotExist) || len(left) > 0 {
		t.Errorf("rollbacks that are not at their end: %v, %v", left, err)
	}
	for _, name := range names {
		removeSnapshot(t, f, "v", name)
	}
}
