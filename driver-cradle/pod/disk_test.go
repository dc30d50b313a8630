package pod

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/cradlestack/cradlestack/spec"
)

func diskLaunch() *spec.Launch {
	layers := []spec.Layer{{DiffID: "sha256:1"}, {DiffID: "sha256:2"}}
	return &spec.Launch{
		ID: strings.Repeat("a", 64), Scratch: spec.Scratch{Size: 32 << 20},
		Containers: []spec.Container{
			{ID: strings.Repeat("a", 64), Name: "main", Layers: layers, Image: spec.Image{Reference: "one:1", ID: "sha256:" + strings.Repeat("1", 64)}},
			{ID: strings.Repeat("b", 64), Name: "side", Layers: layers[:1], Image: spec.Image{Reference: "two:1"}},
		},
	}
}

// A disk is for pods with the same containers over the same layers.
func TestDiskFits(t *testing.T) {
	need(t, "mke2fs", "e2fsprogs")
	path := filepath.Join(t.TempDir(), "box")
	if err := makeDisk(t.Context(), path, diskLaunch(), time.Now()); err != nil {
		t.Fatal(err)
	}
	d, err := OpenDisk(path)
	if err != nil {
		t.Fatal(err)
	}
	for want, edit := range map[string]func(l *spec.Launch){
		"": func(l *spec.Launch) {
			l.Containers[0].Name, l.Containers[0].Image.Reference = "renamed", "registry/one:1"
		},
		"32MiB and 64MiB are asked for": func(l *spec.Launch) { l.Scratch.Size *= 2 },
		"was written over image one:1 (sha256:111111111111), and can't be read over one:2 (sha256:222222222222)": func(l *spec.Launch) {
			l.Containers[0].Layers = []spec.Layer{{DiffID: "sha256:1"}, {DiffID: "sha256:3"}}
			l.Containers[0].Image = spec.Image{Reference: "one:2", ID: "sha256:" + strings.Repeat("2", 64)}
		},
		"2 containers (main, side), and this pod has 1": func(l *spec.Launch) { l.Containers = l.Containers[:1] },
		"no container other, but main, side":            func(l *spec.Launch) { l.Containers[1].ID, l.Containers[1].Name = strings.Repeat("c", 64), "other" },
	} {
		l := diskLaunch()
		edit(l)
		if err := d.fits(l); (err == nil) != (want == "") || err != nil && !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want %q", err, want)
		}
	}
}

// Whatever is killed while a disk is made or removed, there is either all of it or none, and the next one clears up.
func TestDiskKilled(t *testing.T) {
	need(t, "mke2fs", "e2fsprogs")
	dir := t.TempDir()
	path := filepath.Join(dir, "box")
	half := func(name string) {
		t.Helper()
		if err := os.MkdirAll(filepath.Join(dir, name), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, name, scratchFile), []byte("half"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	half(".box.new")
	if _, err := OpenDisk(path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("half a disk: %v", err)
	}
	if err := makeDisk(t.Context(), path, diskLaunch(), time.Now()); err != nil {
		t.Fatal(err)
	}
	d, err := OpenDisk(path)
	if err != nil {
		t.Fatal(err)
	}
	if used, written, err := d.Use(); err != nil || used < 1<<10 || used > 8<<20 || time.Since(written) > time.Hour {
		t.Errorf("it takes %v, written %v: %v", used, written, err)
	}
	half(".box.old")
	if err := RemoveDisk(path); err != nil {
		t.Fatal(err)
	}
	if err := RemoveDisk(path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("remove nothing: %v", err)
	}
	half(".a.new")
	half(".b.old")
	if err := TidyDisks(dir); err != nil {
		t.Fatal(err)
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
		t.Errorf("left: %v, %v", left, err)
	}
}
