//go:build vm

package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/cradlestack/cradlestack/internal/filertest"
)

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
