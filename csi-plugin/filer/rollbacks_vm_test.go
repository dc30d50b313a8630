//go:build vm

package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/cradlestack/cradlestack/csi-plugin/dir"
	"github.com/cradlestack/cradlestack/csi-plugin/filer/api"
	"github.com/cradlestack/cradlestack/csi-plugin/filer/gateway"
	"github.com/cradlestack/cradlestack/csi-plugin/filer/lease"
	"github.com/cradlestack/cradlestack/csi-plugin/filer/nfs"
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
