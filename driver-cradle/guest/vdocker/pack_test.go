package vdocker

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cradlestack/cradlestack/spec"
)

// testRoot is a container's root, and beside it something that is not the container's.
func testRoot(t testing.TB) (dir string, r *root) {
	t.Helper()
	top := t.TempDir()
	dir = filepath.Join(top, "rootfs")
	for _, d := range []string{"etc", "tmp", "var/lib"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	write(t, filepath.Join(top, "secret"), "the host's")
	r, err := openRoot(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	return dir, r
}

func write(t testing.TB, path, content string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
}

func archive(t testing.TB, headers ...*tar.Header) io.Reader {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, h := range headers {
		content := h.PAXRecords["content"]
		h.PAXRecords = nil
		h.Uid, h.Gid = os.Getuid(), os.Getgid()
		if h.Mode == 0 {
			h.Mode = 0o644
		}
		h.Size = int64(len(content))
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, content); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return &b
}

func file(name, content string) *tar.Header {
	return &tar.Header{Typeflag: tar.TypeReg, Name: name, PAXRecords: map[string]string{"content": content}}
}

func symlink(name, target string) *tar.Header {
	return &tar.Header{Typeflag: tar.TypeSymlink, Name: name, Linkname: target}
}

func directory(name string) *tar.Header {
	return &tar.Header{Typeflag: tar.TypeDir, Name: name, Mode: 0o755}
}

func unpackInto(t testing.TB, r *root, base string, content io.Reader) error {
	t.Helper()
	u := &unpacker{ctx: t.Context(), root: r, base: base, writable: func(*os.File) error { return nil }}
	return u.unpack(content)
}

// TestUnpackStaysInside: whatever an archive says, only the container's files are touched.
func TestUnpackStaysInside(t *testing.T) {
	for name, tt := range map[string]struct {
		headers []*tar.Header
		written string // in the root
		refused bool
	}{
		"dot dot":                   {headers: []*tar.Header{file("../../secret", "x")}, refused: true},
		"dot dot inside":            {headers: []*tar.Header{file("a/../../../secret", "x")}, refused: true},
		"absolute":                  {headers: []*tar.Header{file("/etc/x", "x")}, written: "tmp/etc/x"},
		"through an absolute link":  {headers: []*tar.Header{symlink("l", "/etc"), file("l/x", "x")}, written: "etc/x"},
		"through a climbing link":   {headers: []*tar.Header{symlink("l", "../../../../../../etc"), file("l/x", "x")}, written: "etc/x"},
		"over a link to outside":    {headers: []*tar.Header{symlink("l", "../../../secret"), file("l", "x")}, written: "tmp/l"},
		"through link and dot dot":  {headers: []*tar.Header{symlink("l", "/"), file("l/../secret", "x")}, written: "tmp/secret"},
		"hard link to outside":      {headers: []*tar.Header{{Typeflag: tar.TypeLink, Name: "h", Linkname: "../../secret"}}, refused: true},
		"hard link through a link":  {headers: []*tar.Header{symlink("l", "../.."), {Typeflag: tar.TypeLink, Name: "h", Linkname: "l/secret"}}, refused: true},
		"directories made on a way": {headers: []*tar.Header{file("new/deep/x", "x")}, written: "tmp/new/deep/x"},
	} {
		t.Run(name, func(t *testing.T) {
			dir, r := testRoot(t)
			err := unpackInto(t, r, "/tmp", archive(t, tt.headers...))
			if (err != nil) != tt.refused {
				t.Errorf("unpack: %v", err)
			}
			if got, err := os.ReadFile(filepath.Join(dir, "../secret")); string(got) != "the host's" {
				t.Errorf("outside: %q, %v", got, err)
			}
			if tt.written != "" {
				info, err := os.Lstat(filepath.Join(dir, tt.written))
				if err != nil || !info.Mode().IsRegular() {
					t.Errorf("%s: %v, %v", tt.written, info, err)
				}
			}
		})
	}
}

func TestUnpackReplaces(t *testing.T) {
	dir, r := testRoot(t)
	if err := os.Mkdir(filepath.Join(dir, "tmp/dir"), 0o755); err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(dir, "tmp/file"), "old")
	strict := func(headers ...*tar.Header) error {
		u := &unpacker{ctx: t.Context(), root: r, base: "/tmp", noReplace: true, writable: func(*os.File) error { return nil }}
		return u.unpack(archive(t, headers...))
	}
	if err := strict(file("dir", "x")); err == nil || !strings.Contains(err.Error(), `cannot overwrite directory "/tmp/dir" with non-directory`) {
		t.Errorf("file over directory: %v", err)
	}
	if err := strict(directory("file")); err == nil || !strings.Contains(err.Error(), `cannot overwrite non-directory "/tmp/file" with directory`) {
		t.Errorf("directory over file: %v", err)
	}
	if err := strict(directory("dir"), file("file", "new")); err != nil {
		t.Error(err)
	}
	if err := unpackInto(t, r, "/tmp", archive(t, file("dir", "now a file"))); err != nil {
		t.Error(err)
	}
	if got, _ := os.ReadFile(filepath.Join(dir, "tmp/dir")); string(got) != "now a file" {
		t.Errorf("got %q", got)
	}
}

func TestUnpackCompressed(t *testing.T) {
	dir, r := testRoot(t)
	var z bytes.Buffer
	w := gzip.NewWriter(&z)
	io.Copy(w, archive(t, file("x", "compressed")))
	w.Close()
	if err := unpackInto(t, r, "/tmp", &z); err != nil {
		t.Fatal(err)
	}
	if got, _ := os.ReadFile(filepath.Join(dir, "tmp/x")); string(got) != "compressed" {
		t.Errorf("got %q", got)
	}
	if err := unpackInto(t, r, "/tmp", strings.NewReader("\xfd7zXZ\x00…")); status(err) != 400 {
		t.Errorf("xz: %v", err)
	}
	if err := unpackInto(t, r, "/tmp", strings.NewReader("no archive, but long enough to be read as the head of one"+strings.Repeat(".", 512))); status(err) != 400 {
		t.Errorf("garbage: %v", err)
	}
	whole, _ := io.ReadAll(archive(t, file("y", strings.Repeat("z", 5000))))
	if err := unpackInto(t, r, "/tmp", bytes.NewReader(whole[:3000])); err == nil {
		t.Error("a truncated archive was taken")
	}
}

func TestWritable(t *testing.T) {
	_, r := testRoot(t)
	for name, tt := range map[string]struct {
		spec spec.Container
		want error
	}{
		"writable":       {},
		"read-only root": {spec.Container{Settings: spec.Settings{ReadOnly: true}}, errReadOnlyRoot},
		"read-only volume as root": {
			spec.Container{Settings: spec.Settings{Mounts: []spec.Mount{{Path: "/", ReadOnly: true}}}}, errReadOnlyRoot,
		},
	} {
		ok, err := writable(r, tt.spec)
		if err != nil {
			t.Fatal(err)
		}
		if err := ok(r.dir); !errors.Is(err, tt.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestRoundTrip packs a tree and unpacks it elsewhere: what tar can say of a file is the same.
func TestRoundTrip(t *testing.T) {
	dir, r := testRoot(t)
	src := filepath.Join(dir, "var/src")
	for _, d := range []string{src, filepath.Join(src, "sub"), filepath.Join(src, "empty")} {
		if err := os.Mkdir(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	write(t, filepath.Join(src, "plain"), "content")
	write(t, filepath.Join(src, "tool"), "#!")
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(unix.Chmod(filepath.Join(src, "tool"), 0o4755))
	must(os.Link(filepath.Join(src, "plain"), filepath.Join(src, "sub/hard")))
	must(os.Symlink("../../../../secret", filepath.Join(src, "sub/link")))
	must(unix.Mkfifo(filepath.Join(src, "fifo"), 0o600))
	must(unix.Setxattr(filepath.Join(src, "plain"), "user.note", []byte("kept\x00"), 0))
	big := bytes.Repeat([]byte("0123456789abcdef"), 12*smallPiece/16)
	clear(big[smallPiece/2 : 7*smallPiece])
	big = append(big, "an odd end"...)
	must(os.WriteFile(filepath.Join(src, "big"), big, 0o644))
	then := time.Date(2020, 2, 3, 4, 5, 6, 0, time.UTC)
	must(os.Chtimes(filepath.Join(src, "plain"), then, then))
	must(os.Chtimes(filepath.Join(src, "sub"), then, then))

	var b bytes.Buffer
	parent, base, err := r.openParent("/var/src")
	must(err)
	defer parent.Close()
	must(pack(t.Context(), &b, parent, base, "src", false))
	must(unpackInto(t, r, "/tmp", &b))

	dst := filepath.Join(dir, "tmp/src")
	must(filepath.WalkDir(src, func(path string, d fs.DirEntry, err error) error {
		rel, _ := filepath.Rel(src, path)
		var a, b unix.Stat_t
		if err := errors.Join(err, unix.Lstat(path, &a), unix.Lstat(filepath.Join(dst, rel), &b)); err != nil {
			return err
		}
		if a.Mode != b.Mode || a.Uid != b.Uid || a.Nlink != b.Nlink || a.Mtim.Sec != b.Mtim.Sec || a.Mode&unix.S_IFMT != unix.S_IFDIR && a.Size != b.Size {
			t.Errorf("%s: %+v became %+v", rel, a, b)
		}
		return nil
	}))
	if got, _ := os.ReadFile(filepath.Join(dst, "big")); !bytes.Equal(got, big) {
		t.Error("big differs")
	}
	var st unix.Stat_t
	must(unix.Stat(filepath.Join(dst, "big"), &st))
	if st.Blocks*512 > 6*smallPiece {
		t.Errorf("a file of %d bytes, half of them zeros, takes %d", len(big), st.Blocks*512)
	}
	value := make([]byte, 10)
	if n, err := unix.Getxattr(filepath.Join(dst, "plain"), "user.note", value); err != nil || string(value[:n]) != "kept\x00" {
		t.Errorf("attribute %q, %v", value[:n], err)
	}
	if target, _ := os.Readlink(filepath.Join(dst, "sub/link")); target != "../../../../secret" {
		t.Errorf("link to %q", target)
	}
}

// TestPackNames: docker cp finds what it asked for by the name's last element; the root's is "/".
func TestPackNames(t *testing.T) {
	dir, r := testRoot(t)
	write(t, filepath.Join(dir, "etc/hosts"), "")
	if err := os.Symlink("etc", filepath.Join(dir, "link")); err != nil {
		t.Fatal(err)
	}
	for asked, want := range map[string][]string{
		"/etc":    {"etc/", "etc/hosts"},
		"/etc/.":  {"./", "./hosts"},
		"/":       {"/", "/link", "/etc/", "/tmp/", "/var/", "/etc/hosts", "/var/lib/"},
		"/link":   {"link"},
		"/link/":  {"link/", "link/hosts"},
		"/link/.": {"./", "./hosts"},

		"etc":                {"etc/", "etc/hosts"},
		"/var/lib/../../etc": {"etc/", "etc/hosts"},
		"/etc/..":            {"/", "/link", "/etc/", "/tmp/", "/var/", "/etc/hosts", "/var/lib/"},
		"../..":              {"/", "/link", "/etc/", "/tmp/", "/var/", "/etc/hosts", "/var/lib/"},
		"/var/../etc/.":      {"./", "./hosts"},
		"/./link/":           {"link/", "link/hosts"},
	} {
		asked = cleanPath(asked)
		at, base, _, err := r.lookup(asked)
		if err != nil {
			t.Fatal(err)
		}
		var b bytes.Buffer
		if err := pack(t.Context(), &b, at, base, archiveName(asked), false); err != nil {
			t.Fatal(err)
		}
		at.Close()
		if got := names(t, &b); !slices.Equal(got, want) {
			t.Errorf("%s: %q, want %q", asked, got, want)
		}
	}
}

func names(t *testing.T, r io.Reader) (out []string) {
	a := tar.NewReader(r)
	for {
		h, err := a.Next()
		if errors.Is(err, io.EOF) {
			return out
		}
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, h.Name)
	}
}

// TestPackDeepAndWide: no more than one directory is open at a time, and a tree deeper than a path can be does no harm.
func TestPackDeep(t *testing.T) {
	dir, r := testRoot(t)
	fd, err := unix.Open(filepath.Join(dir, "tmp"), unix.O_DIRECTORY, 0)
	if err != nil {
		t.Fatal(err)
	}
	name := strings.Repeat("d", 100)
	for range 60 { // 6000 bytes of path
		if err := unix.Mkdirat(fd, name, 0o755); err != nil {
			t.Fatal(err)
		}
		next, err := unix.Openat(fd, name, unix.O_DIRECTORY, 0)
		unix.Close(fd)
		if err != nil {
			t.Fatal(err)
		}
		fd = next
	}
	unix.Close(fd)
	at, base, _, err := r.lookup("/tmp")
	if err != nil {
		t.Fatal(err)
	}
	defer at.Close()
	err = pack(t.Context(), io.Discard, at, base, "tmp", false)
	if !errors.Is(err, unix.ENAMETOOLONG) {
		t.Errorf("packed a tree deeper than a path can be: %v", err)
	}
}

func TestPackEndsWithItsContext(t *testing.T) {
	_, r := testRoot(t)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := pack(ctx, io.Discard, r.dir, "", "", true); !errors.Is(err, context.Canceled) {
		t.Errorf("pack: %v", err)
	}
}

// FuzzUnpack: any archive leaves what is outside alone.
func FuzzUnpack(f *testing.F) {
	for _, headers := range [][]*tar.Header{
		{file("a", "b"), symlink("l", "../.."), file("l/x", "y"), directory("d"), {Typeflag: tar.TypeLink, Name: "h", Linkname: "a"}},
		{symlink("etc", "/"), directory("etc/../.."), {Typeflag: tar.TypeFifo, Name: "f"}},
	} {
		b, _ := io.ReadAll(archive(f, headers...))
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		dir, r := testRoot(t)
		_ = unpackInto(t, r, "/tmp", io.LimitReader(bytes.NewReader(b), 1<<20))
		entries, err := os.ReadDir(filepath.Dir(dir))
		if err != nil || len(entries) != 2 {
			t.Fatalf("outside: %v, %v", entries, err)
		}
		if got, err := os.ReadFile(filepath.Join(dir, "../secret")); string(got) != "the host's" {
			t.Fatalf("outside: %q, %v", got, err)
		}
	})
}
