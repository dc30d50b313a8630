package main

import (
	"errors"
	"os"
	"strings"
	"testing"
)

// Two directories of one file system never differ, whatever is done.
func TestSameFileSystem(t *testing.T) {
	var out strings.Builder
	if err := run([]string{"check", "-ops", "2000", "-workers", "3", t.TempDir(), t.TempDir()}, &out); err != nil || !strings.HasPrefix(out.String(), "600") {
		t.Errorf("%v, %s", err, &out)
	}
}

// A file system that loses, changes or keeps what it should not is found out.
func TestDifferencesAreFound(t *testing.T) {
	for name, spoil := range map[string]func(path string) error{
		"a byte":     func(path string) error { return os.WriteFile(path, []byte("other"), 0) },
		"a mode":     func(path string) error { return os.Chmod(path, 0o640) },
		"an end":     func(path string) error { return os.Truncate(path, 3) },
		"a file":     os.Remove,
		"one more":   func(path string) error { return os.WriteFile(path+".more", nil, 0o600) },
		"a new name": func(path string) error { return os.Rename(path, path+".new") },
	} {
		w, err := newWorld(t.TempDir(), t.TempDir(), 1, nil, false)
		if err != nil {
			t.Fatal(err)
		}
		for side := range w.roots {
			if err := os.WriteFile(w.at(side, "file"), []byte("given"), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		if err := w.compare(); err != nil {
			t.Fatal(err)
		}
		if err := spoil(w.at(subject, "file")); err != nil {
			t.Fatal(err)
		}
		var d *difference
		if err := w.compare(); !errors.As(err, &d) || !strings.Contains(d.Error(), "file") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// Every operation is done, and most of them succeed: a game in which everything is ENOENT finds nothing.
func TestOperationsSucceed(t *testing.T) {
	w, err := newWorld(t.TempDir(), t.TempDir(), 1, nil, false)
	if err != nil {
		t.Fatal(err)
	}
	succeeded, failed := map[string]int{}, map[string]int{}
	for range 6000 {
		w.log = nil
		if err := w.step(); err != nil {
			t.Fatal(err)
		}
		for _, line := range w.log {
			what, result, _ := strings.Cut(strings.TrimLeft(line, " 0123456789"), ": ")
			what, _, _ = strings.Cut(what, " ")
			result = result[strings.LastIndex(result, ": ")+1:]
			if strings.Contains(result, " E") || strings.HasPrefix(result, "E") {
				failed[what]++
			} else {
				succeeded[what]++
			}
		}
	}
	t.Logf("succeeded %v, failed %v", succeeded, failed)
	for _, what := range []string{
		"open", "close", "write", "read", "truncate", "allocate", "map", "sync", "fstat", "mkdir", "rmdir", "unlink", "rename", "link", "symlink", "lstat", "chmod",
		"chown", "utimes", "readdir",
	} {
		if what == "chown" && os.Getuid() != 0 {
			continue
		}
		if succeeded[what] < 20 {
			t.Errorf("%s succeeded %d times and failed %d times", what, succeeded[what], failed[what])
		}
	}
	if entries, err := os.ReadDir(w.roots[subject]); err != nil || len(entries) < 3 {
		t.Errorf("at the end there are %d files, %v", len(entries), err)
	}
}
