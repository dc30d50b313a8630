package main

import (
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// The two sides: an operation is done on the subject first, and compared with the reference.
const (
	subject = iota
	reference
)

// A world is a pair of directories with the files that are open in them.
type world struct {
	roots   [2]string
	rnd     *rand.Rand
	missing map[string]bool
	drop    bool
	handles []*handle
	count   int
	log     []string // the last operations and what came of them

	paths  []string // that were there lately
	listed int      // when that was
}

// A handle is the same file, open on both sides.
type handle struct{ fd [2]int }

const (
	maxHandles = 6
	maxLog     = 80
	maxFile    = 192 << 10
	checkEvery = 150 // operations between two looks at everything
)

func newWorld(subjectDir, referenceDir string, seed uint64, missing map[string]bool, drop bool) (*world, error) {
	w := &world{roots: [2]string{subjectDir, referenceDir}, rnd: rand.New(rand.NewPCG(seed, 0)), missing: missing, drop: drop}
	for _, root := range w.roots {
		if err := os.MkdirAll(root, 0o755); err != nil {
			return nil, err
		}
	}
	// What is there before, in a layer of an image, is part of the game.
	return w, os.CopyFS(referenceDir, os.DirFS(subjectDir))
}

// A difference ends the check.
type difference struct {
	what, got, want string
	log             []string
}

func (d *difference) Error() string {
	return fmt.Sprintf("%s: %s, and on the reference %s\nthe last operations:\n%s", d.what, d.got, d.want, strings.Join(d.log, "\n"))
}

// errno gives an error the name that programs see; some are as good as others.
func errno(err error) string {
	var e unix.Errno
	switch {
	case err == nil:
		return "ok"
	case errors.Is(err, unix.ENOTEMPTY):
		return "EEXIST" // rename(2), rmdir(2): either
	case errors.Is(err, unix.EOPNOTSUPP):
		return "EOPNOTSUPP"
	case errors.As(err, &e):
		return unix.ErrnoName(e)
	}
	return err.Error()
}

// both does an operation on both sides and compares what it says. What the subject can't do at all is not done on the reference either.
func (w *world) both(what string, do func(side int) string) error {
	got := do(subject)
	if got == "EOPNOTSUPP" {
		return nil
	}
	want := do(reference)
	w.log = append(w.log, fmt.Sprintf("%6d %s: %s", w.count, what, got))
	w.log = w.log[max(0, len(w.log)-maxLog):]
	if got != want {
		return &difference{what, got, want, slices.Clone(w.log)}
	}
	return nil
}

func (w *world) at(side int, path string) string { return filepath.Join(w.roots[side], path) }

// names are few, so that operations meet.
var names = []string{"a", "b", "c", "d", "with space", "-x", "ümlaut", strings.Repeat("l", 200)}

func (w *world) path() string {
	path := names[w.rnd.IntN(len(names))]
	for range w.rnd.IntN(3) {
		path = filepath.Join(names[w.rnd.IntN(4)], path)
	}
	return path
}

// there is a path that is there, most of the time.
func (w *world) there() string {
	if w.rnd.IntN(4) == 0 {
		return w.path()
	}
	if w.count >= w.listed+10 || len(w.paths) == 0 {
		w.listed, w.paths = w.count, w.paths[:0]
		_ = filepath.WalkDir(w.roots[reference], func(path string, _ fs.DirEntry, err error) error {
			if rel, rerr := filepath.Rel(w.roots[reference], path); err == nil && rerr == nil && rel != "." {
				w.paths = append(w.paths, rel)
			}
			return nil
		})
	}
	if len(w.paths) == 0 {
		return w.path()
	}
	return w.paths[w.rnd.IntN(len(w.paths))]
}

// mode is one that leaves a user who is not root able to go on.
func mode(m uint32) uint32 {
	if os.Geteuid() != 0 {
		m |= 0o700
	}
	return m
}

// step does one operation.
func (w *world) step() error {
	w.count++
	if w.count%checkEvery == 0 {
		if err := w.compare(); err != nil {
			return err
		}
	}
	sum := 0
	for _, o := range operations {
		sum += o.weight
	}
	n := w.rnd.IntN(sum)
	for _, o := range operations {
		if n -= o.weight; n < 0 {
			return o.do(w)
		}
	}
	return nil
}

// finish closes everything and compares it once more.
func (w *world) finish() error {
	for len(w.handles) > 0 {
		if err := w.closeHandle(0); err != nil {
			return err
		}
	}
	return w.compare()
}

// compare looks at everything, from the cache and, where that may be dropped, from where it comes.
func (w *world) compare() error {
	for _, drop := range []bool{false, true}[:1+btoi(w.drop)] {
		if drop {
			unix.Sync()
			if err := os.WriteFile("/proc/sys/vm/drop_caches", []byte("3\n"), 0); err != nil {
				return err
			}
		}
		var lists [2]string
		for side, root := range w.roots {
			list, err := list(root)
			if err != nil {
				list += "error: " + err.Error() + "\n"
			}
			// The client of NFS keeps files that are open without a name under one like this.
			var kept strings.Builder
			for line := range strings.Lines(list) {
				if !strings.Contains(line, ".nfs0") {
					kept.WriteString(line)
				}
			}
			lists[side] = kept.String()
		}
		if lists[subject] == lists[reference] {
			continue
		}
		got, want := strings.Split(lists[subject], "\n"), strings.Split(lists[reference], "\n")
		return &difference{
			fmt.Sprintf("all files (caches dropped: %v)", drop),
			"there are these:\n" + strings.Join(only(got, want), "\n"), "these:\n" + strings.Join(only(want, got), "\n"), slices.Clone(w.log),
		}
	}
	return nil
}

func btoi(b bool) int {
	if b {
		return 1
	}
	return 0
}

// only gives the lines of a that b does not have.
func only(a, b []string) (lines []string) {
	for _, line := range a {
		if !slices.Contains(b, line) {
			lines = append(lines, line)
		}
	}
	return lines
}
