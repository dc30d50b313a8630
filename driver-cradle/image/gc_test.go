package image

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// twoImages are in the cache and share their first layer.
func twoImages(t *testing.T) (s *Store, one, two *Image) {
	t.Helper()
	r := startRegistry(t, nil)
	base := tarLayer(t, makeTar(t, reg("base", strings.Repeat("b", 10000))))
	s = openStore(t)
	one = pull(t, s, r.push(t, "one:1", makeImage(t, v1.Config{}, base, tarLayer(t, makeTar(t, reg("one", "1"))))), PullOptions{})
	two = pull(t, s, r.push(t, "two:1", makeImage(t, v1.Config{}, base, tarLayer(t, makeTar(t, reg("two", "2"))))), PullOptions{})
	return s, one, two
}

func (s *Store) has(l Layer) bool {
	_, err := s.readLayer(l.DiffID)
	return err == nil
}

func age(t *testing.T, s *Store, img *Image, d time.Duration) {
	t.Helper()
	when := time.Now().Add(-d)
	if err := os.Chtimes(s.imagePath(img.Reference, img.Platform), when, when); err != nil {
		t.Fatal(err)
	}
}

func gc(t *testing.T, s *Store, o GCOptions) GCReport {
	t.Helper()
	report, err := s.GC(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	return report
}

func TestListGetRemove(t *testing.T) {
	s, one, two := twoImages(t)
	age(t, s, one, time.Hour)
	imgs, err := s.List()
	if err != nil || len(imgs) != 2 || imgs[0].ID != two.ID || imgs[1].ID != one.ID {
		t.Fatalf("list %v, %v", imgs, err)
	}
	for _, arg := range []string{one.Reference, one.ID, one.ID[:20], one.ID[7:15]} {
		if img, err := s.Get(arg); err != nil || img.ID != one.ID {
			t.Errorf("get %s: %v, %v", arg, img, err)
		}
	}
	for _, arg := range []string{"none:1", one.ID[7:9], "", "sha256:"} {
		if _, err := s.Get(arg); !errors.Is(err, ErrNotFound) {
			t.Errorf("get %q: error %v, want not found", arg, err)
		}
	}

	if err := s.Remove(one.Reference); err != nil {
		t.Fatal(err)
	}
	if !s.has(two.Layers[0]) || !s.has(two.Layers[1]) || s.has(one.Layers[1]) {
		t.Error("remove took a shared layer, or left one that nothing needs")
	}
	if err := s.Remove(one.Reference); !errors.Is(err, ErrNotFound) {
		t.Errorf("second remove: %v", err)
	}
	if err := s.Remove(two.ID); err != nil {
		t.Fatal(err)
	}
	assertEmpty(t, s)
}

func TestGCByAgeAndSize(t *testing.T) {
	s, one, two := twoImages(t)
	if r := gc(t, s, GCOptions{}); len(r.Images)+len(r.Layers) != 0 || r.Kept == 0 {
		t.Errorf("GC without options: %+v", r)
	}
	age(t, s, one, 2*time.Hour)
	dry := gc(t, s, GCOptions{MaxAge: time.Hour, DryRun: true})
	if !slices.Equal(dry.Images, []string{one.Reference}) || !slices.Equal(dry.Layers, []string{one.Layers[1].DiffID}) || !s.has(one.Layers[1]) {
		t.Errorf("dry run: %+v", dry)
	}
	wet := gc(t, s, GCOptions{MaxAge: time.Hour})
	if !slices.Equal(wet.Images, dry.Images) || !slices.Equal(wet.Layers, dry.Layers) || wet.Freed != dry.Freed || wet.Kept != dry.Kept {
		t.Errorf("dry run says %+v, GC did %+v", dry, wet)
	}
	if s.has(one.Layers[1]) || !s.has(two.Layers[0]) || !s.has(two.Layers[1]) {
		t.Error("GC removed the wrong layers")
	}
	if r := gc(t, s, GCOptions{MaxSize: wet.Kept}); len(r.Images) != 0 {
		t.Errorf("GC removed what fits: %+v", r)
	}
	if r := gc(t, s, GCOptions{MaxSize: wet.Kept - 1}); !slices.Equal(r.Images, []string{two.Reference}) || r.Kept != 0 {
		t.Errorf("GC kept too much: %+v", r)
	}
	assertEmpty(t, s)
}

// A pod directory's place that another pod has got holds nothing any more of what the first one needed.
func TestForget(t *testing.T) {
	s, one, two := twoImages(t)
	pod, other := t.TempDir(), t.TempDir()
	for _, h := range []struct {
		img   *Image
		owner string
	}{{one, pod}, {one, other}, {two, pod}} {
		if _, err := s.Hold(h.img, h.owner); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Forget(pod + "/"); err != nil {
		t.Fatal(err)
	}
	gc(t, s, GCOptions{MaxAge: time.Nanosecond})
	if _, err := s.Get(one.ID); err != nil {
		t.Errorf("what another directory holds is gone: %v", err)
	}
	if _, err := s.Get(two.ID); !errors.Is(err, ErrNotFound) {
		t.Errorf("what nobody holds any more is kept: %v", err)
	}
}

func TestHold(t *testing.T) {
	s, one, two := twoImages(t)
	pod := t.TempDir()
	release, err := s.Hold(one, pod)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Hold(one, pod+"/"); err != nil {
		t.Fatal(err)
	}
	if err := s.Remove(one.Reference); !errors.Is(err, ErrInUse) || !strings.Contains(err.Error(), pod) {
		t.Errorf("remove of a held image: %v", err)
	}
	gc(t, s, GCOptions{MaxAge: time.Nanosecond})
	if !s.has(one.Layers[0]) || !s.has(one.Layers[1]) || s.has(two.Layers[1]) {
		t.Error("GC removed a held layer, or left one that nobody holds")
	}
	if _, err := s.Get(one.ID); err != nil {
		t.Errorf("a held image is gone: %v", err)
	}
	if _, err := s.Hold(two, pod); !errors.Is(err, ErrNotFound) {
		t.Errorf("hold of a removed image: %v", err)
	}
	if _, err := s.Hold(one, filepath.Join(pod, "none")); err == nil {
		t.Error("hold for a directory that does not exist")
	}
	if _, err := s.Hold(one, "relative"); err == nil {
		t.Error("hold for a relative path")
	}
	if err := release(); err != nil {
		t.Fatal(err)
	}
	if err := release(); err != nil {
		t.Errorf("second release: %v", err)
	}
	gc(t, s, GCOptions{MaxAge: time.Nanosecond})
	assertEmpty(t, s)
}

// An image is in use as long as a pod has it: its age counts from the pod's end.
func TestGCCountsFromTheEndOfUse(t *testing.T) {
	s, one, _ := twoImages(t)
	release, err := s.Hold(one, t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	age(t, s, one, 48*time.Hour)
	gc(t, s, GCOptions{MaxAge: 24 * time.Hour})
	if err := release(); err != nil {
		t.Fatal(err)
	}
	if r := gc(t, s, GCOptions{MaxAge: 24 * time.Hour}); len(r.Images) != 0 {
		t.Errorf("GC removed what was in use a moment ago: %+v", r)
	}
}

func TestHoldEndsWithItsDirectory(t *testing.T) {
	s, one, _ := twoImages(t)
	pod := filepath.Join(t.TempDir(), "pod")
	if err := os.Mkdir(pod, 0o700); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Hold(one, pod); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(pod); err != nil {
		t.Fatal(err)
	}
	gc(t, s, GCOptions{MaxAge: time.Nanosecond})
	assertEmpty(t, s)
}

func TestVerify(t *testing.T) {
	s, one, _ := twoImages(t)
	problems, err := s.Verify(t.Context())
	if err != nil || len(problems) != 0 {
		t.Fatalf("%v, %v", problems, err)
	}
	path := one.Layers[1].Path
	if err := os.Chmod(path, 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt([]byte{1}, one.Layers[1].Size-1); err != nil {
		t.Fatal(err)
	}
	record := s.imagePath(one.Reference, one.Platform)
	data := readFile(t, record)
	if err := os.WriteFile(record, []byte(strings.Replace(string(data), `"config": "`, `"config": "AAAA`, 1)), 0o600); err != nil {
		t.Fatal(err)
	}
	problems, err = s.Verify(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var paths []string
	for _, p := range problems {
		if !errors.Is(p.Err, ErrCorrupt) {
			t.Errorf("%v", p)
		}
		paths = append(paths, p.Path)
	}
	if !slices.Equal(paths, []string{path, record}) {
		t.Errorf("problems %v", problems)
	}
	// What a killed process left goes: a lock that nobody holds, a record whose layer never came.
	strays := []string{strings.TrimSuffix(path, ".ext4") + ".lock", s.layerPath(digestOf(nil), ".lock"), s.layerPath(digestOf(nil), ".json")}
	for _, stray := range strays {
		if err := os.WriteFile(stray, nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	gc(t, s, GCOptions{})
	for _, stray := range strays {
		if _, err := os.Stat(stray); err == nil {
			t.Errorf("%s is still there", stray)
		}
	}
	if !s.has(one.Layers[1]) {
		t.Error("GC took a layer along")
	}
	// A layer of another length is not used.
	if err := f.Truncate(4096); err != nil {
		t.Fatal(err)
	}
	if s.has(one.Layers[1]) {
		t.Error("a truncated layer is used")
	}
}

// TestMain is also the process that TestKilled kills in the middle of a Pull.
func TestMain(m *testing.M) {
	if ref := os.Getenv("IMAGE_TEST_PULL"); ref != "" {
		s, err := Open(os.Getenv("IMAGE_TEST_ROOT"))
		if err == nil {
			_, err = s.Pull(contextOfProcess, ref, PullOptions{})
		}
		if err != nil {
			os.Stderr.WriteString(err.Error() + "\n")
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// A Pull that is killed leaves files; they hold up nobody, and go with the next Open.
func TestKilled(t *testing.T) {
	reached := make(chan struct{}, 10)
	var block atomic.Bool
	r := startRegistry(t, blockSecondHalf(&block, reached))
	img := makeImage(t, v1.Config{},
		tarLayer(t, makeTar(t, reg("small", "x"))),
		tarLayer(t, makeTar(t, reg("large", randomText(1<<20)))))
	ref := r.push(t, "x:1", img)
	root := t.TempDir()
	block.Store(true)
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), "IMAGE_TEST_PULL="+ref, "IMAGE_TEST_ROOT="+root)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	select {
	case <-reached:
	case <-time.After(5 * time.Minute):
		t.Error("the process did not come to its layer")
	}

	// While it lives, its files stay, and another Pull of the same layer waits for it.
	s, err := Open(root)
	if err != nil {
		t.Fatal(err)
	}
	if left, _ := filepath.Glob(filepath.Join(root, "tmp/*")); len(left) != 1 {
		t.Errorf("in tmp: %q", left)
	}
	gc(t, s, GCOptions{MaxAge: time.Nanosecond})
	waiting := make(chan struct{}, 100)
	done := make(chan error, 1)
	go func() {
		_, err := s.Pull(t.Context(), ref, PullOptions{Progress: func(p Progress) {
			if p.Phase == Waiting {
				waiting <- struct{}{}
			}
		}})
		done <- err
	}()
	select {
	case <-waiting:
	case err := <-done:
		t.Errorf("the second Pull did not wait: %v", err)
	case <-time.After(5 * time.Minute):
		t.Error("the second Pull neither waits nor ends")
	}
	block.Store(false)
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	select {
	case err := <-done:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(5 * time.Minute):
		t.Fatal("the second Pull does not end")
	}
	if _, err := Open(root); err != nil {
		t.Fatal(err)
	}
	assertClean(t, s)
	if problems, err := s.Verify(t.Context()); err != nil || len(problems) != 0 {
		t.Errorf("%v, %v", problems, err)
	}
}

// Whoever uses a layer notices when its file is another one than it was, and reads it for that only when the file system says so.
func TestCheckLayer(t *testing.T) {
	s, one, _ := twoImages(t)
	layer := one.Layers[1]
	link := filepath.Join(t.TempDir(), "0.ext4")
	if err := os.Symlink(layer.Path, link); err != nil {
		t.Fatal(err)
	}
	check := func(what, path, diffID string, want error) {
		t.Helper()
		if err := CheckLayer(t.Context(), path, diffID); !errors.Is(err, want) || want == nil && err != nil {
			t.Errorf("%s: %v, want %v", what, err, want)
		}
	}
	check("just made", link, layer.DiffID, nil)
	check("another one", link, one.Layers[0].DiffID, ErrCorrupt)
	record := s.layerPath(layer.DiffID, ".json")
	right := readFile(t, record)
	if err := os.WriteFile(record, []byte(strings.Replace(string(right), `"sha256": "`, `"sha256": "0`, 1)), 0o600); err != nil {
		t.Fatal(err)
	}
	check("unchanged, so not read", link, layer.DiffID, nil)
	if err := VerifyLayer(t.Context(), link, layer.DiffID); !errors.Is(err, ErrCorrupt) {
		t.Errorf("read in any case: %v", err)
	}
	if err := os.WriteFile(record, right, 0o600); err != nil {
		t.Fatal(err)
	}

	if err := os.Chmod(layer.Path, 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(layer.Path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	last := make([]byte, 1)
	if _, err := f.ReadAt(last, layer.Size-1); err != nil {
		t.Fatal(err)
	}
	time.Sleep(20 * time.Millisecond) // the clock of file systems ticks
	if _, err := f.WriteAt([]byte{last[0] ^ 1}, layer.Size-1); err != nil {
		t.Fatal(err)
	}
	check("one bit changed", link, layer.DiffID, ErrCorrupt)
	if _, err := f.WriteAt(last, layer.Size-1); err != nil {
		t.Fatal(err)
	}
	check("changed back", link, layer.DiffID, nil)
	if !isChecked(strings.TrimSuffix(layer.Path, ".ext4")) {
		t.Error("that it was read and is right is forgotten")
	}
	if err := os.Remove(s.layerPath(layer.DiffID, checkedExt)); err != nil {
		t.Fatal(err)
	}
	check("nobody knows", link, layer.DiffID, nil)

	own := filepath.Join(t.TempDir(), "own.ext4")
	if err := os.WriteFile(own, []byte("anything"), 0o600); err != nil {
		t.Fatal(err)
	}
	check("in no cache", own, layer.DiffID, nil)
	if err := os.Remove(layer.Path); err != nil {
		t.Fatal(err)
	}
	check("missing", link, layer.DiffID, os.ErrNotExist)
}
