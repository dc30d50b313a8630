package tree

import (
	"bytes"
	"encoding/gob"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"reflect"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func open(t *testing.T, dir string) *os.Root {
	t.Helper()
	root, err := os.OpenRoot(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { root.Close() })
	return root
}

func list(t *testing.T, root *os.Root) []Entry {
	t.Helper()
	all, err := List(t.Context(), root, ".", "lost+found")
	if err != nil {
		t.Fatal(err)
	}
	return all
}

// pass makes to like from, and returns what it took.
func pass(t *testing.T, from, to *os.Root) Changes {
	t.Helper()
	var wire bytes.Buffer
	if err := Send(t.Context(), from, ".", list(t, to), &wire, "lost+found"); err != nil {
		t.Fatal(err)
	}
	c, err := Receive(t.Context(), to, &wire)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func must(t *testing.T, errs ...error) {
	t.Helper()
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
}

// fill makes one of everything that needs no root.
func fill(t *testing.T, dir string) {
	t.Helper()
	path := func(name string) string { return filepath.Join(dir, name) }
	must(t,
		os.Mkdir(path("lost+found"), 0o700), os.WriteFile(path("lost+found/x"), nil, 0o600),
		os.MkdirAll(path("d/e"), 0o755), os.WriteFile(path("d/e/small"), []byte("small"), 0o640), os.WriteFile(path("d/empty"), nil, 0o600),
		os.WriteFile(path("large"), bytes.Repeat([]byte("0123456789abcdef"), 3*chunk/16+1), 0o600),
		os.WriteFile(path("sparse"), []byte("begin"), 0o600), os.Truncate(path("sparse"), 1<<30),
		os.Link(path("large"), path("d/same")), os.Symlink("../nowhere", path("d/link")), unix.Mkfifo(path("fifo"), 0o600),
		unix.UtimesNanoAt(unix.AT_FDCWD, path("large"), []unix.Timespec{{Sec: inYear2300}, {Sec: inYear2300, Nsec: 5}}, 0),
		os.Chtimes(path("d/e/small"), time.Time{}, time.Unix(1e9, 123456789)), os.Chmod(path("d/e/small"), 0o4751), os.Chmod(path("d/e"), 0o500),
	)
	t.Cleanup(func() { os.Chmod(path("d/e"), 0o700) })
}

// inYear2300 is more than 64 bits of nanoseconds after 1970.
const inYear2300 = 10413792000

func TestCopy(t *testing.T) {
	a, b := t.TempDir(), t.TempDir()
	fill(t, a)
	from, to := open(t, a), open(t, b)
	t.Cleanup(func() { os.Chmod(filepath.Join(b, "d/e"), 0o700) })
	first := pass(t, from, to)
	if got, want := list(t, to), list(t, from); !reflect.DeepEqual(got, want) {
		t.Errorf("there is %+v\nwant %+v", got, want)
	}
	if first.Entries != 9 || first.Bytes != 3*chunk+16+5+chunk {
		t.Errorf("it took %+v", first)
	}
	var st unix.Stat_t
	if err := unix.Stat(filepath.Join(b, "sparse"), &st); err != nil || st.Blocks*512 > 64<<20 {
		t.Errorf("the sparse file has %d blocks, %v", st.Blocks, err)
	}
	if again := pass(t, from, to); again != (Changes{}) {
		t.Errorf("once more it took %+v", again)
	}
}

// What differs is made the same, and only that is sent.
func TestDifferences(t *testing.T) {
	for what, change := range map[string]struct {
		change func(dir string) error
		bytes  int64
	}{
		"a byte":            {func(d string) error { return overwrite(d+"/large", 2*chunk, "X") }, chunk},
		"a hole's":          {func(d string) error { return overwrite(d+"/sparse", 5*chunk, "X") }, chunk},
		"shorter":           {func(d string) error { return os.Truncate(d+"/large", chunk) }, 2*chunk + 16},
		"longer":            {func(d string) error { return os.Truncate(d+"/large", 9*chunk) }, 16},
		"a mode":            {func(d string) error { return os.Chmod(d+"/d/empty", 0o777) }, 0},
		"a time":            {func(d string) error { return os.Chtimes(d+"/d/empty", time.Time{}, time.Unix(1, 0)) }, 0},
		"gone":              {func(d string) error { return os.Remove(d + "/d/link") }, 0},
		"one more":          {func(d string) error { return os.MkdirAll(d+"/more/and/more", 0o700) }, 0},
		"another target":    {func(d string) error { return errors.Join(os.Remove(d+"/d/link"), os.Symlink("x", d+"/d/link")) }, 0},
		"a file for a fifo": {func(d string) error { return errors.Join(os.Remove(d+"/fifo"), os.WriteFile(d+"/fifo", nil, 0o600)) }, 0},
		"a name less":       {func(d string) error { return os.Remove(d + "/d/same") }, 0},
		"no link": {func(d string) error {
			return errors.Join(os.Remove(d+"/d/same"), os.WriteFile(d+"/d/same", nil, 0o600))
		}, 0},
		"a directory for a file": {func(d string) error {
			return errors.Join(os.Remove(d+"/d/empty"), os.MkdirAll(d+"/d/empty/deep", 0o700), os.WriteFile(d+"/d/empty/deep/x", []byte("x"), 0o600))
		}, 0},
	} {
		t.Run(what, func(t *testing.T) {
			a, b := t.TempDir(), t.TempDir()
			fill(t, a)
			from, to := open(t, a), open(t, b)
			t.Cleanup(func() { os.Chmod(filepath.Join(b, "d/e"), 0o700) })
			pass(t, from, to)
			must(t, change.change(b))
			c := pass(t, from, to)
			if got, want := list(t, to), list(t, from); !reflect.DeepEqual(got, want) {
				t.Errorf("there is %+v\nwant %+v", got, want)
			}
			if c.Entries == 0 || change.bytes > 0 && c.Bytes != change.bytes {
				t.Errorf("it took %+v; want %d bytes", c, change.bytes)
			}
		})
	}
}

func overwrite(path string, at int64, text string) error {
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteAt([]byte(text), at)
	return errors.Join(err, f.Close())
}

// A stream that breaks off anywhere is an error, never a whole copy; the next pass completes it.
func TestBrokenOff(t *testing.T) {
	a := t.TempDir()
	fill(t, a)
	from := open(t, a)
	var wire bytes.Buffer
	must(t, Send(t.Context(), from, ".", nil, &wire, "lost+found"))
	for n := 0; n < wire.Len(); n += 1 + wire.Len()/12 {
		b := t.TempDir()
		to := open(t, b)
		if _, err := Receive(t.Context(), to, io.LimitReader(bytes.NewReader(wire.Bytes()), int64(n))); err == nil {
			t.Errorf("%d of %d bytes pass for all", n, wire.Len())
		}
		pass(t, from, to)
		if got, want := list(t, to), list(t, from); !reflect.DeepEqual(got, want) {
			t.Errorf("after %d bytes there is %+v\nwant %+v", n, got, want)
		}
		must(t, os.Chmod(filepath.Join(b, "d/e"), 0o700))
	}
}

// A part of a directory becomes like the same of another; what is beside it stays. Lists tell what that is.
func TestPart(t *testing.T) {
	a, b := t.TempDir(), t.TempDir()
	for _, dir := range []string{a, b} {
		must(t, os.Mkdir(filepath.Join(dir, "d"), 0o755), os.WriteFile(filepath.Join(dir, "d/same"), []byte("same"), 0o600), os.WriteFile(filepath.Join(dir, "beside"), []byte(dir), 0o600))
		must(t, os.Chtimes(filepath.Join(dir, "d/same"), time.Unix(1, 0), time.Unix(1, 0)))
	}
	must(t, os.WriteFile(filepath.Join(a, "d/changed"), []byte("then"), 0o600), os.WriteFile(filepath.Join(b, "d/changed"), []byte("now"), 0o600))
	must(t, os.WriteFile(filepath.Join(a, "d/removed"), nil, 0o600), os.WriteFile(filepath.Join(b, "d/added"), nil, 0o600))
	from, to := open(t, a), open(t, b)
	part := func(root *os.Root, part string) []Entry {
		t.Helper()
		all, err := List(t.Context(), root, part)
		must(t, err)
		return all
	}
	want := []Difference{{Added, "d/added"}, {Changed, "d/changed"}, {Removed, "d/removed"}}
	if got := Compare(part(from, "d"), part(to, "d")); !reflect.DeepEqual(got, want) {
		t.Errorf("the differences are %v, not %v", got, want)
	}
	for _, p := range []string{"d/removed", "d"} {
		theirs, err := List(t.Context(), to, p)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			t.Fatal(err)
		}
		var wire bytes.Buffer
		must(t, Send(t.Context(), from, p, theirs, &wire))
		_, err = Receive(t.Context(), to, &wire)
		must(t, err)
		if got := Compare(part(from, p), part(to, p)); len(got) > 0 {
			t.Errorf("%s: there are differences: %v", p, got)
		}
	}
	if text, err := os.ReadFile(filepath.Join(b, "beside")); err != nil || string(text) != b {
		t.Errorf("what is beside it is %q, %v", text, err)
	}
}

// Whoever has a directory may have made in it what costs him nothing: files that are nothing but holes, as large as can be, and directories without end.
func TestNothingForFree(t *testing.T) {
	dir := t.TempDir()
	for i := range 50 {
		name := filepath.Join(dir, strconv.Itoa(i))
		must(t, os.WriteFile(name, nil, 0o600), os.Truncate(name, 8<<40))
	}
	root := open(t, dir)
	if all := list(t, root); len(all) != 51 || len(all[1].Chunks) != 0 || all[1].Size != 8<<40 {
		t.Errorf("%d entries, the first is %+v", len(all), all[1])
	}

	at, err := os.OpenRoot(dir)
	must(t, err)
	name := strings.Repeat("d", unix.NAME_MAX)
	for range unix.PathMax/unix.NAME_MAX + 1 {
		must(t, at.Mkdir(name, 0o700))
		down, err := at.OpenRoot(name)
		must(t, err, at.Close())
		at = down
	}
	must(t, at.Close())
	if _, err := List(t.Context(), root, "."); err == nil || !strings.Contains(err.Error(), "it lies too deep") || len(err.Error()) > 300 {
		t.Errorf("%.400v", err)
	}

	const largest = 1<<62 + 5 // that a file system of memory can seek in
	fd, err := unix.MemfdCreate("largest", unix.MFD_CLOEXEC)
	must(t, err)
	f := os.NewFile(uintptr(fd), "largest")
	defer f.Close()
	must(t, f.Truncate(largest))
	if _, err := f.WriteAt([]byte{1}, largest-1); err != nil {
		t.Fatal(err)
	}
	found := 0
	must(t, content(t.Context(), f, largest, func(i int64, data []byte) error {
		found++
		if i != largest/chunk || len(data) != 5 {
			t.Errorf("chunk %d of %d bytes", i, len(data))
		}
		return nil
	}))
	if found != 1 {
		t.Errorf("%d chunks", found)
	}
}

// What is sent by whoever changes nothing outside of the directory.
func FuzzReceive(f *testing.F) {
	send := func(messages ...message) {
		var wire bytes.Buffer
		out := gob.NewEncoder(&wire)
		for _, m := range messages {
			if err := out.Encode(m); err != nil {
				f.Fatal(err)
			}
		}
		f.Add(wire.Bytes())
	}
	file := func(path string) message {
		return message{Entry: &Entry{Path: path, Mode: unix.S_IFREG | 0o600, Size: 4}}
	}
	data, end := message{Data: []byte("data")}, message{End: true}
	send(message{Entry: &Entry{Path: "d", Mode: unix.S_IFDIR | 0o700}}, file("d/f"), data, end)
	send(message{Remove: "../beside"}, end)
	send(file("../beside"), data, end)
	send(message{Entry: &Entry{Path: "up", Mode: unix.S_IFLNK | 0o777, Target: ".."}}, file("up/beside"), data, message{Remove: "up/beside"}, end)
	send(message{Entry: &Entry{Path: "up", Mode: unix.S_IFLNK | 0o777, Target: "../beside"}}, message{Entry: &Entry{Path: "up", Mode: unix.S_IFIFO | 0o666}}, end)
	send(message{Entry: &Entry{Path: "d", Mode: unix.S_IFDIR | 0o700}}, message{Entry: &Entry{Path: "d/..", Mode: unix.S_IFIFO | 0o666}}, end)
	send(message{Entry: &Entry{Path: "l", Mode: unix.S_IFREG | 0o600, Name: "../beside"}}, data, end)
	f.Fuzz(func(t *testing.T, wire []byte) {
		outside := t.TempDir()
		beside, inside := filepath.Join(outside, "beside"), filepath.Join(outside, "inside")
		must(t, os.WriteFile(beside, []byte("beside"), 0o600), os.Mkdir(inside, 0o700))
		was, err := os.Stat(beside)
		must(t, err)
		_, _ = Receive(t.Context(), open(t, inside), bytes.NewReader(wire))
		if all, err := os.ReadDir(outside); err != nil || len(all) != 2 {
			t.Errorf("outside there is %v, %v", all, err)
		}
		now, err := os.Stat(beside)
		must(t, err)
		if text, err := os.ReadFile(beside); err != nil || string(text) != "beside" || now.Mode() != was.Mode() || !now.ModTime().Equal(was.ModTime()) || now.Sys().(*syscall.Stat_t).Nlink != 1 {
			t.Errorf("what is beside is %q, %v, %v", text, now, err)
		}
	})
}

// What goes between two looks at it is not listed, nor as a name of it what is left.
func TestListGone(t *testing.T) {
	dir := t.TempDir()
	path := func(name string) string { return filepath.Join(dir, name) }
	must(t, os.WriteFile(path("z"), []byte("text"), 0o600), os.Link(path("z"), path("y")))
	root := open(t, dir)
	stop, stopped := make(chan struct{}), make(chan error, 1)
	go func() {
		for {
			select {
			case <-stop:
				stopped <- nil
				return
			default:
			}
			if err := errors.Join(os.Link(path("z"), path("a")), os.Remove(path("a"))); err != nil {
				stopped <- err
				return
			}
		}
	}()
	for {
		l := lister{ctx: t.Context(), seen: map[inode]string{}}
		err := l.list(root, "a", "a")
		var opened *os.PathError
		if !errors.As(err, &opened) || !strings.HasPrefix(opened.Op, "open") {
			continue // it was there, or was not for the first look
		}
		if err := errors.Join(l.list(root, "y", "y"), l.list(root, "z", "z")); err != nil {
			t.Error(err)
		}
		if len(l.all) != 2 || l.all[0].Path != "y" || l.all[0].Size != 4 || l.all[1].Name != "y" {
			t.Errorf("listed: %+v", l.all)
		}
		break
	}
	close(stop)
	must(t, <-stopped)
}

// TestMemory: lists that are there at the same time take no more than there is, and give it back.
func TestMemory(t *testing.T) {
	dir := t.TempDir()
	for i := range 10 {
		if err := os.WriteFile(filepath.Join(dir, fmt.Sprint(i)), []byte("content"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	m := NewMemory(10_000)
	first, end := m.Use(t.Context())
	if all, err := List(first, root, "."); err != nil || len(all) != 11 {
		t.Fatalf("%d, %v", len(all), err)
	}
	second, endSecond := m.Use(t.Context())
	if _, err := List(second, root, "."); !errors.Is(err, ErrTooMuch) {
		t.Errorf("beside the first one: %v", err)
	}
	endSecond()
	end()
	end()
	if left := m.left.Load(); left != 10_000 {
		t.Errorf("%d bytes are left of all", left)
	}
	third, end := m.Use(t.Context())
	defer end()
	if _, err := List(third, root, "."); err != nil {
		t.Errorf("after the first one: %v", err)
	}
	nobody, end := (*Memory)(nil).Use(t.Context())
	defer end()
	if _, err := List(nobody, root, "."); err != nil {
		t.Error(err)
	}
}
