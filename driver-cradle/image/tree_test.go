package image

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// list describes a tree, one line for each name.
func (t *tree) list() []string {
	var lines []string
	var walk func(f *file, name string)
	walk = func(f *file, name string) {
		kind := map[byte]string{
			tar.TypeReg: "file", tar.TypeDir: "dir", tar.TypeSymlink: "link", tar.TypeChar: "char", tar.TypeBlock: "block",
			tar.TypeFifo: "fifo",
		}[f.typ]
		switch {
		case f.whiteout:
			kind = "whiteout"
		case f.opaque:
			kind = "opaque"
		case f.typ == tar.TypeReg:
			kind += fmt.Sprint(" ", f.size)
		case f.typ == tar.TypeSymlink:
			kind += " " + f.link
		}
		if name != "" {
			lines = append(lines, name+" "+kind)
		}
		for n, c := range f.children {
			walk(c, strings.TrimPrefix(name+"/"+n, "/"))
		}
	}
	walk(t.root, "")
	slices.Sort(lines)
	return lines
}

func scan(t testing.TB, entries ...entry) (*tree, error) {
	return scanTar(bytes.NewReader(makeTar(t, entries...)), layerBounds(1<<30))
}

func TestTreeHasTarSemantics(t *testing.T) {
	for _, tt := range []struct {
		name    string
		entries []entry
		want    []string
	}{
		{
			"the last entry wins",
			[]entry{reg("a", "one"), reg("a", "second"), reg("./b", ""), symlink("b", "a")},
			[]string{"a file 6", "b link a"},
		},
		{
			"a file replaces a directory and the other way round",
			[]entry{dir("d/"), reg("d/x", "x"), reg("d", "file"), reg("f", "file"), dir("f/"), reg("f/y", "yy")},
			[]string{"d file 4", "f dir", "f/y file 2"},
		},
		{
			"a directory named again keeps its content",
			[]entry{dir("d"), reg("d/x", "x"), dir("d")},
			[]string{"d dir", "d/x file 1"},
		},
		{
			"missing parents are made",
			[]entry{reg("a/b/c", "x")},
			[]string{"a dir", "a/b dir", "a/b/c file 1"},
		},
		{
			"absolute names start at the root, dots go away",
			[]entry{reg("/etc/a", "x"), reg("./etc/./b", "x"), reg("etc/x/../c", "x"), dir("./"), dir("/")},
			[]string{"etc dir", "etc/a file 1", "etc/b file 1", "etc/c file 1"},
		},
		{
			"a hard link keeps what its name meant",
			[]entry{reg("a", "old"), hardlink("b", "a"), reg("a", "newer"), hardlink("c", "/b"), hardlink("d", "./c")},
			[]string{"a file 5", "b file 3", "c file 3", "d file 3"},
		},
		{
			"paths lead through symbolic links, not out of the layer",
			[]entry{dir("usr/lib"), symlink("lib", "usr/lib"), reg("lib/x", "x"), symlink("up", "../../.."), reg("up/etc", "y"), symlink("abs", "/usr"), reg("abs/z", "z")},
			[]string{"abs link /usr", "etc file 1", "lib link usr/lib", "up link ../../..", "usr dir", "usr/lib dir", "usr/lib/x file 1", "usr/z file 1"},
		},
		{
			"whiteouts",
			[]entry{reg("d/.wh.gone", ""), reg("e/.wh..wh..opq", ""), reg("e/kept", "x"), reg(".wh.root", ""), reg(".wh..wh.plnk", "")},
			[]string{"d dir", "d/gone whiteout", "e opaque", "e/kept file 1", "root whiteout"},
		},
		{
			"a whiteout never hides what its own layer brings",
			[]entry{reg("a", "x"), reg(".wh.a", ""), reg(".wh.b", ""), reg("b", "x"), dir("c"), reg(".wh.c", ""), reg(".wh.d", ""), reg("d/x", "x"), reg(".wh.e", ""), dir("e")},
			[]string{"a file 1", "b file 1", "c opaque", "d opaque", "d/x file 1", "e opaque"},
		},
		{
			"global headers are no files",
			[]entry{
				{Header: tar.Header{Typeflag: tar.TypeXGlobalHeader, Name: "pax_global_header", PAXRecords: map[string]string{"comment": "x"}}},
				reg("a", ""),
			},
			[]string{"a file 0"},
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			tree, err := scan(t, tt.entries...)
			if err != nil {
				t.Fatal(err)
			}
			if got := tree.list(); !slices.Equal(got, tt.want) {
				t.Errorf("got\n\t%s\nwant\n\t%s", strings.Join(got, "\n\t"), strings.Join(tt.want, "\n\t"))
			}
		})
	}
}

func TestScanRefuses(t *testing.T) {
	long := strings.Repeat("n", 256)
	deep := strings.Repeat("abcdefg/", 512) + "x"
	device := func(major, minor int64) entry {
		return entry{Header: tar.Header{Typeflag: tar.TypeChar, Name: "dev/x", Devmajor: major, Devminor: minor}}
	}
	xattr := func(key, value string) entry {
		return entry{Header: tar.Header{Typeflag: tar.TypeReg, Name: "x", PAXRecords: map[string]string{xattrRecord + key: value}}}
	}
	loop := []entry{symlink("a", "b"), symlink("b", "a"), reg("a/x", "")}
	for _, tt := range []struct {
		name    string
		entries []entry
		want    string
	}{
		{"climbing name", []entry{reg("../etc/passwd", "x")}, `entry "../etc/passwd" points out of the layer`},
		{"climbing absolute name", []entry{reg("/../x", "x")}, `points out of the layer`},
		{"climbing in the middle", []entry{reg("a/../../x", "x")}, `points out of the layer`},
		{"climbing directory", []entry{dir("..")}, `points out of the layer`},
		{"climbing hard link", []entry{hardlink("x", "../../etc/shadow")}, `entry "x" is a hard link to "../../etc/shadow", outside of the layer`},
		{"hard link to nothing", []entry{hardlink("x", "y")}, `is a hard link to "y", which is not in the layer`},
		{"hard link to a whiteout", []entry{reg(".wh.y", ""), hardlink("x", "y")}, `not in the layer`},
		{"hard link to a directory", []entry{dir("y"), hardlink("x", "y")}, `is a hard link to the directory "y"`},
		{"hard link to the root", []entry{hardlink("x", "/")}, `not in the layer`},
		{"hard link through a file", []entry{reg("y", ""), hardlink("x", "y/z")}, `not in the layer`},
		{"inside a file", []entry{reg("y", ""), reg("y/z", "")}, `entry "y/z" is inside "y", which is no directory`},
		{"symbolic links in a circle", loop, `entry "a/x" is behind more than 40 symbolic links`},
		{"empty symbolic link", []entry{symlink("a", "")}, `symbolic link of 0 bytes`},
		{"long name", []entry{reg(long, "")}, "name of more than 255 bytes"},
		{"long path", []entry{reg(deep, "")}, "path of more than 4095 bytes"},
		{"root is a file", []entry{reg(".", "")}, "is the root of the layer and no directory"},
		{"whiteout of nothing", []entry{reg("d/.wh.", "")}, "is a whiteout of nothing"},
		{"whiteout of the parent", []entry{reg("d/.wh...", "")}, "is a whiteout of nothing"},
		{"inside a whiteout", []entry{reg(".wh.d/x", "")}, "is inside a whiteout"},
		{"device number", []entry{device(1<<12, 0)}, "impossible number 4096:0"},
		{"owner", []entry{{Header: tar.Header{Typeflag: tar.TypeReg, Name: "x", Uid: 1 << 33}}}, "impossible owner 8589934592:0"},
		{"attributes of 5 KiB", []entry{xattr("user.a", strings.Repeat("x", 5<<10))}, "more extended attributes than ext4 can store"},
		{"bad access control list", []entry{xattr("system.posix_acl_access", "12345")}, "bad system.posix_acl_access"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := scan(t, tt.entries...)
			if !errors.Is(err, ErrRefused) || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error %v, want a refusal with %q", err, tt.want)
			}
			if err != nil && strings.Contains(err.Error(), "\n") {
				t.Errorf("more than one line: %q", err)
			}
		})
	}
}

func TestScanBounds(t *testing.T) {
	device := entry{Header: tar.Header{Typeflag: tar.TypeBlock, Name: "sda", Devmajor: 8}}
	device2 := device
	device2.Name = "sdb"
	attribute := entry{Header: tar.Header{Typeflag: tar.TypeReg, Name: "x", PAXRecords: map[string]string{"SCHILY.xattr.user.x": strings.Repeat("x", 100)}}}
	for _, tt := range []struct {
		name    string
		bounds  bounds
		entries []entry
		want    string
		kind    error
	}{
		{"entries", bounds{entries: 2}, []entry{dir("a"), dir("b"), dir("a"), dir("c")}, `entry "c" is one too many: a layer may have 2`, ErrTooLarge},
		{"implied entries", bounds{entries: 2}, []entry{dir("a/b/c")}, `entry "a/b/c" is one too many`, ErrTooLarge},
		{"device bomb", bounds{devices: 1}, []entry{device, device2}, `entry "sdb" is one too many: a layer may have 1 device nodes`, ErrRefused},
		{"names and attributes", bounds{metadata: 64}, []entry{attribute}, `names and attributes take over 64 bytes`, ErrTooLarge},
		{"depth", bounds{steps: 5}, []entry{reg("a/b/c/x", ""), reg("a/b/c/y", "")}, `entry "a/b/c/y" is one too many: the layer's paths are too deep`, ErrTooLarge},
		{"content", bounds{content: 9}, []entry{reg("a", "12345"), reg("b", "67890")}, `entry "b" makes the layer larger than 9 bytes`, ErrTooLarge},
	} {
		t.Run(tt.name, func(t *testing.T) {
			b := layerBounds(1 << 20)
			for _, f := range []struct{ to, from *int }{
				{&b.entries, &tt.bounds.entries}, {&b.devices, &tt.bounds.devices}, {&b.metadata, &tt.bounds.metadata}, {&b.steps, &tt.bounds.steps},
			} {
				if *f.from != 0 {
					*f.to = *f.from
				}
			}
			if tt.bounds.content != 0 {
				b.content = tt.bounds.content
			}
			_, err := scanTar(bytes.NewReader(makeTar(t, tt.entries...)), b)
			if !errors.Is(err, tt.kind) || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error %v, want %q", err, tt.want)
			}
		})
	}
}

// A sparse file of a terabyte in a tar of two kilobytes counts with the size it has.
func TestScanSparseBomb(t *testing.T) {
	data := sparseTar(t, 1<<40)
	_, err := scanTar(bytes.NewReader(data), layerBounds(DefaultMaxLayerSize))
	if !errors.Is(err, ErrTooLarge) {
		t.Errorf("error %v, want too large", err)
	}
}

// sparseTar is GNU tar's archive of a file of this size that holds one block of text at its very end.
func sparseTar(t testing.TB, size int64) []byte {
	t.Helper()
	requireTool(t, "tar", "tar")
	dir := t.TempDir()
	f, err := os.Create(filepath.Join(dir, "sparse"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt(bytes.Repeat([]byte("end "), 1024), size-4096); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command("tar", "-C", dir, "--sparse", "--format=pax", "-cf", "-", "sparse").Output()
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func requireTool(t testing.TB, tool, pkg string) {
	t.Helper()
	if _, err := exec.LookPath(tool); err != nil {
		if _, err := os.Stat("/usr/sbin/" + tool); err != nil {
			t.Fatalf("%s is missing: apt-get install -y --no-install-recommends %s", tool, pkg)
		}
	}
}

func TestCorruptTar(t *testing.T) {
	good := makeTar(t, reg("a", strings.Repeat("x", 5000)), reg("b", "y"))
	for _, tt := range []struct {
		name string
		data []byte
		want string
	}{
		{"truncated content", good[:3000], "the tar ends too early"},
		{"truncated header", good[:700+5000], "the tar ends too early"},
		{"garbage", append(bytes.Repeat([]byte("garbage!"), 64), good...), "not a valid tar"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := scanTar(bytes.NewReader(tt.data), layerBounds(1<<30))
			if !errors.Is(err, ErrCorrupt) || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error %v, want %q", err, tt.want)
			}
		})
	}
}

// fsTime must undo what tar2ext4 stores and Linux decodes: the low 34 bits, of which the upper two count wraps of the
// signed lower 32.
func TestFSTime(t *testing.T) {
	for _, s := range []int64{-1 << 31, -1, 0, 1, 1700000000, 1<<31 - 1, 1 << 31, 1<<32 - 1, 1 << 32, 1<<32 + 1<<31, 0x37fffffff - 1<<32} {
		stored := uint64(fsTime(time.Unix(s, 7)).Unix()) & 0x3ffffffff
		decoded := int64(int32(uint32(stored))) + int64(stored>>32)<<32
		if decoded != s {
			t.Errorf("%d is read as %d", s, decoded)
		}
		if ns := fsTime(time.Unix(s, 7)).Nanosecond(); ns != 7 {
			t.Errorf("%d: %d ns instead of 7", s, ns)
		}
	}
	if got := fsTime(time.Time{}).Unix(); got != 0 {
		t.Errorf("no time is stored as %d", got)
	}
	if got := fsTime(time.Date(9999, 1, 1, 0, 0, 0, 0, time.UTC)).Unix(); got > 0x37fffffff {
		t.Errorf("the year 9999 is stored as %#x, beyond what fits", got)
	}
}

// acl is in the form of system calls: user::rw-, user:1000:r--, group::r--, mask::r--, other::---.
const acl = "\x02\x00\x00\x00" +
	"\x01\x00\x06\x00\xff\xff\xff\xff" + "\x02\x00\x04\x00\xe8\x03\x00\x00" + "\x04\x00\x04\x00\xff\xff\xff\xff" +
	"\x10\x00\x04\x00\xff\xff\xff\xff" + "\x20\x00\x00\x00\xff\xff\xff\xff"

func TestExt4ACL(t *testing.T) {
	const head, user = "\x01\x00\x00\x00", "\x02\x00\x04\x00\xe8\x03\x00\x00"
	for _, tt := range []struct {
		access bool
		mode   int64
		want   string
	}{
		{false, 0, head + "\x01\x00\x06\x00" + user + "\x04\x00\x04\x00" + "\x10\x00\x04\x00" + "\x20\x00\x00\x00"},
		{true, 0o640, head + "\x01\x00\x06\x00" + user + "\x04\x00\x04\x00" + "\x10\x00\x04\x00" + "\x20\x00\x00\x00"},
		{true, 0o4751, head + "\x01\x00\x07\x00" + user + "\x04\x00\x04\x00" + "\x10\x00\x05\x00" + "\x20\x00\x01\x00"},
	} {
		if got, err := ext4ACL(acl, tt.access, tt.mode); err != nil || got != tt.want {
			t.Errorf("mode %o: %q, %v, want %q", tt.mode, got, err, tt.want)
		}
	}
}

func FuzzScanTar(f *testing.F) {
	f.Add(makeTar(f, dir("d/"), reg("d/a", "content"), hardlink("b", "d/a"), symlink("c", "../b"), reg(".wh.x", ""), reg("d/.wh..wh..opq", "")))
	f.Add(makeTar(f, entry{Header: tar.Header{
		Typeflag: tar.TypeReg, Name: "x", Uid: 100000, ModTime: time.Unix(1, 5), Format: tar.FormatPAX,
		PAXRecords: map[string]string{"SCHILY.xattr.user.a": "b", "SCHILY.xattr.system.posix_acl_access": acl},
	}}))
	f.Add(makeTar(f, reg("lost+found", "x"), dir("a/b/c"), symlink("l", "a"), reg("l/b/y", "z")))
	f.Add(sparseTar(f, 1<<20))
	f.Fuzz(func(t *testing.T, data []byte) {
		tree, err := scanTar(bytes.NewReader(data), layerBounds(1<<20))
		if err != nil {
			return
		}
		checkNames(t, tree.root)
		out, err := createSparse(t.Context(), filepath.Join(t.TempDir(), "ext4"))
		if err != nil {
			t.Fatal(err)
		}
		defer out.file.Close()
		if err := writeExt4(tree, bytes.NewReader(data), out); err != nil {
			t.Fatalf("what was accepted does not convert: %v", err)
		}
	})
}

// checkNames fails where a name in a tree could lead out of it.
func checkNames(t *testing.T, f *file) {
	t.Helper()
	for name, child := range f.children {
		if name == "" || name == "." || name == ".." || len(name) > maxName || strings.ContainsAny(name, "/\x00") {
			t.Fatalf("a file is called %q", name)
		}
		checkNames(t, child)
	}
}
