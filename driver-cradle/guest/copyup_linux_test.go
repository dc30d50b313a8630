package guest

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// imageTree makes what an image may have in a directory, and tells how it must look in a volume.
func imageTree(t *testing.T) (dir string, want map[string]string) {
	t.Helper()
	dir = t.TempDir()
	steps := []error{
		os.Mkdir(filepath.Join(dir, "sub"), 0o755),
		os.WriteFile(filepath.Join(dir, "sub", "big"), []byte(strings.Repeat("0123456789", 300_000)), 0o600),
		os.WriteFile(filepath.Join(dir, "tool"), []byte("#!/bin/sh\n"), 0o755),
		os.Chmod(filepath.Join(dir, "tool"), 0o755|fs.ModeSetuid),
		os.Link(filepath.Join(dir, "tool"), filepath.Join(dir, "sub", "same")),
		os.Symlink("../tool", filepath.Join(dir, "sub", "link")),
		os.WriteFile(filepath.Join(dir, "empty"), nil, 0o444),
		unix.Mkfifo(filepath.Join(dir, "pipe"), 0o620),
		os.Chtimes(filepath.Join(dir, "sub"), time.Unix(1000, 0), time.Unix(2000, 5)),
		os.Chmod(dir, 0o751),
	}
	for _, err := range steps {
		if err != nil {
			t.Fatal(err)
		}
	}
	return dir, tree(t, dir)
}

// tree describes all that is in a directory.
func tree(t *testing.T, dir string) map[string]string {
	t.Helper()
	out := map[string]string{}
	names := map[uint64]string{}
	err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil {
			return err
		}
		name, _ := filepath.Rel(dir, path)
		text := fmt.Sprintf("%o", st.Mode)
		switch {
		case e.Type().IsRegular():
			data, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			if first, ok := names[st.Ino]; ok {
				text += " is " + first
			}
			names[st.Ino] = name
			text += " " + string(data)
		case e.Type() == fs.ModeSymlink:
			to, err := os.Readlink(path)
			if err != nil {
				return err
			}
			text += " to " + to
		}
		if name != "." { // whose time is that of the mark's removal
			text += time.Unix(st.Mtim.Unix()).String()
		}
		out[name] = text
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func sameTree(t *testing.T, dir string, want map[string]string) {
	t.Helper()
	got := tree(t, dir)
	for name, text := range want {
		if got[name] != text {
			t.Errorf("%s is %.200q, want %.200q", name, got[name], text)
		}
	}
	for name := range got {
		if _, ok := want[name]; !ok {
			t.Errorf("%s should not be there", name)
		}
	}
}

func TestFillVolume(t *testing.T) {
	source, want := imageTree(t)
	for _, shared := range []bool{false, true} {
		volume := t.TempDir()
		copied := 0
		for range 2 { // the second finds it filled
			if err := fillVolume(volume, source, shared, func(n int) { copied += n }); err != nil {
				t.Fatal(err)
			}
			sameTree(t, volume, want)
		}
		if copied != 3_000_010 {
			t.Errorf("%d bytes were told to be copied", copied)
		}
	}
	used := t.TempDir()
	if err := os.WriteFile(filepath.Join(used, "mine"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := fillVolume(used, source, true, nil); err != nil {
		t.Fatal(err)
	}
	if got := tree(t, used); len(got) != 2 {
		t.Errorf("a volume in use has %d entries", len(got)-1)
	}
}

// A volume that only this guest has is emptied when a copy was cut short: what is there is a part of the image.
func TestFillOwnAgain(t *testing.T) {
	source, want := imageTree(t)
	volume := t.TempDir()
	for _, name := range []string{copyMark, "tool"} {
		if err := os.WriteFile(filepath.Join(volume, name), []byte("torn"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := fillVolume(volume, source, false, nil); err != nil {
		t.Fatal(err)
	}
	sameTree(t, volume, want)
}

// Many guests that begin at the same time on an empty volume all get it filled, once and completely.
func TestFillSharedAtOnce(t *testing.T) {
	source, want := imageTree(t)
	volume := t.TempDir()
	var guests sync.WaitGroup
	for range 8 {
		guests.Go(func() {
			if err := fillVolume(volume, source, true, nil); err != nil {
				t.Error(err)
				return
			}
			// What a guest finds when its copy, or its wait for another's, is over.
			for name := range want {
				if _, err := os.Lstat(filepath.Join(volume, name)); err != nil {
					t.Error(err)
				}
			}
		})
	}
	guests.Wait()
	sameTree(t, volume, want)
}

// While another guest copies, nothing is touched, however long it takes.
func TestFillSharedWaits(t *testing.T) {
	source, _ := imageTree(t)
	volume := t.TempDir()
	mark := filepath.Join(volume, copyMark)
	for _, name := range []string{copyMark, "data"} {
		if err := os.WriteFile(filepath.Join(volume, name), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	stop := touch(mark, 10*time.Millisecond)
	filled := make(chan error)
	p := pace{beat: 10 * time.Millisecond, dead: time.Minute, every: time.Millisecond}
	go func() { filled <- fillShared(volume, source, p, nil) }()
	select {
	case err := <-filled:
		t.Fatalf("did not wait: %v", err)
	case <-time.After(100 * time.Millisecond):
	}
	stop()
	if err := os.Remove(mark); err != nil {
		t.Fatal(err)
	}
	if err := <-filled; err != nil {
		t.Fatal(err)
	}
	if got := tree(t, volume); len(got) != 2 || got["data"] == "" {
		t.Errorf("after another's copy there is %v", got)
	}
}

// A copy whose guest has died is completed; what is there stays, and no link leads out.
func TestFillSharedGoesOn(t *testing.T) {
	source, want := imageTree(t)
	volume, outside := t.TempDir(), t.TempDir()
	for name, text := range map[string]string{copyMark: "", copyMark + "-OLD": "torn", "empty": "mine", "live": "data"} {
		if err := os.WriteFile(filepath.Join(volume, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink(outside, filepath.Join(volume, "sub")); err != nil {
		t.Fatal(err)
	}
	before := tree(t, volume)
	if err := fillShared(volume, source, pace{beat: time.Millisecond, dead: 20 * time.Millisecond, every: time.Millisecond}, nil); err != nil {
		t.Fatal(err)
	}
	for name := range want {
		if strings.HasPrefix(name, "sub/") {
			delete(want, name)
		}
	}
	for _, name := range []string{"empty", "live", "sub"} {
		want[name] = before[name]
	}
	want["tool"] = strings.Replace(want["tool"], " is sub/same", "", 1) // which is not there
	sameTree(t, volume, want)
	if got := tree(t, outside); len(got) != 1 {
		t.Errorf("outside of the volume there is %v", got)
	}
}
