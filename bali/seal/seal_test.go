package seal

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"crypto/ed25519"
	"crypto/sha256"
	"crypto/sha512"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/klauspost/compress/zstd"
	"golang.org/x/crypto/ssh"
)

var update = flag.Bool("update", false, "rewrite testdata/vectors")

// vectorTree is sha256sum testdata/vectors/hello.tree.
const vectorTree = "d645f1f60b1c73b60b7595953c66699ab8f602e266125d7f2a3eb9eff989740f"

// signer makes a key from a seed of one repeated byte.
func signer(t testing.TB, seed byte) (ssh.Signer, Identity) {
	t.Helper()
	key := ed25519.NewKeyFromSeed(bytes.Repeat([]byte{seed}, ed25519.SeedSize))
	s, err := ssh.NewSignerFromKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return s, Identity(key.Public().(ed25519.PublicKey))
}

type item struct {
	Entry
	content string
}

func file(path, content string) item {
	return item{Entry{Path: path, Kind: File, Mode: 0o644, ModTime: 1700000000, Size: int64(len(content))}, content}
}

func dir(path string) item {
	return item{Entry{Path: path, Kind: Dir, Mode: 0o755, ModTime: 1700000000}, ""}
}

func link(kind Kind, path, target string) item {
	mode := uint32(0o777)
	if kind == Hardlink {
		mode = 0o755
	}
	return item{Entry{Path: path, Kind: kind, Mode: mode, ModTime: 1700000000, Link: target}, ""}
}

var testImage = Image{
	Version: 1, OS: "linux", Architecture: "amd64",
	Entrypoint: []string{"/bin/hello"}, Cmd: []string{"world"}, Env: []string{"PATH=/bin"},
}

var testItems = []item{
	dir("bin"),
	{Entry{Path: "bin/hello", Kind: File, Mode: 0o755, ModTime: 1700000000, Size: 6}, "hello\n"},
	link(Hardlink, "bin/hi", "bin/hello"),
	dir("bin/empty"),
	dir("bin-2"),
	file("bin-2/ümlaut "+strings.Repeat("long", 40), "x"),
	link(Symlink, "lib", "/bin"),
}

func init() {
	slices.SortFunc(testItems, func(a, b item) int { return CompareDepthFirst(a.Path, b.Path) })
}

func build(t testing.TB, c Compression, s ssh.Signer, items ...item) []byte {
	t.Helper()
	var out bytes.Buffer
	w, err := NewWriter(&out, &testImage, c, 1700000000)
	if err != nil {
		t.Fatal(err)
	}
	for _, i := range items {
		if err := w.WriteEntry(&i.Entry); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, i.content); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := w.Seal(s); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

// unpack is what run and extract do with a file: read all, then ask.
func unpack(t testing.TB, file []byte, u Unpack, l Limits) (string, *Signature, error) {
	t.Helper()
	dir := t.TempDir()
	d, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	r, err := NewReader(bytes.NewReader(file), l)
	if err != nil {
		return dir, nil, err
	}
	defer r.Close()
	s, err := u.Into(t.Context(), r, d)
	return dir, s, err
}

// tree is what the cache compares an unpacked copy with, and its text.
func tree(t testing.TB, file []byte) (sum [32]byte, listing string) {
	t.Helper()
	r, err := NewReader(bytes.NewReader(file), Limits{})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	lines := []byte(treeHead)
	for {
		e, err := r.Next()
		if errors.Is(err, io.EOF) {
			return sha256.Sum256(lines), string(lines)
		}
		if err != nil {
			t.Fatal(err)
		}
		var v Verity
		if _, err := io.Copy(&v, r); err != nil {
			t.Fatal(err)
		}
		lines = append(lines, e.line(fmt.Sprintf("%x", v.Sum()))...)
	}
}

func TestRoundTrip(t *testing.T) {
	key, id := signer(t, 1)
	for _, c := range []Compression{Gzip, Zstd} {
		t.Run(c.String(), func(t *testing.T) {
			b := build(t, c, key, testItems...)
			sig, err := Verify(t.Context(), bytes.NewReader(b))
			if err != nil || sig.Identity != id {
				t.Fatalf("Verify: %v, %v", sig, err)
			}
			claim, err := ParseTrailer(b[max(0, len(b)-TrailerLen):])
			if err != nil || claim.Sig != sig.Sig || claim.Tree != sig.Tree {
				t.Fatalf("ParseTrailer: %v, %v", claim, err)
			}
			dir, got, err := unpack(t, b, Unpack{}, Limits{})
			if err != nil {
				t.Fatal(err)
			}
			if *got != *sig {
				t.Errorf("unpacking saw another signature: %v, %v", got, sig)
			}
			if sum, _ := tree(t, b); sum != sig.Tree {
				t.Errorf("the entries' tree is %x, signed %x", sum, sig.Tree)
			}
			hello, err := os.Stat(filepath.Join(dir, "bin/hello"))
			if err != nil || hello.Mode() != 0o755 || hello.ModTime().Unix() != 1700000000 {
				t.Errorf("bin/hello: %v, %v", hello, err)
			}
			hi, err := os.Stat(filepath.Join(dir, "bin/hi"))
			if err != nil || !os.SameFile(hello, hi) {
				t.Errorf("bin/hi is not the same file as bin/hello: %v", err)
			}
			if l, err := os.Readlink(filepath.Join(dir, "lib")); l != "/bin" {
				t.Errorf("lib: %q, %v", l, err)
			}
			var record Signature
			m, _ := sig.MarshalBinary()
			if err := record.UnmarshalBinary(m); err != nil || record != *sig {
				t.Errorf("signature record: %v", err)
			}
		})
	}
}

// TestReproducible builds on one processor and on several, with content that
// spans several blocks of the compressors.
func TestReproducible(t *testing.T) {
	key, _ := signer(t, 1)
	var content strings.Builder
	for i := 0; content.Len() < 5<<20; i++ {
		fmt.Fprintf(&content, "line %d\n", i*i)
	}
	big := file("big", content.String())
	for _, c := range []Compression{Gzip, Zstd} {
		old := runtime.GOMAXPROCS(1)
		one := build(t, c, key, big)
		runtime.GOMAXPROCS(4)
		four := build(t, c, key, big)
		runtime.GOMAXPROCS(old)
		if !bytes.Equal(one, four) {
			t.Errorf("%v: the bytes depend on the number of processors", c)
		}
	}
}

// TestEveryBit flips each bit of a file, and cuts it off at each length: never
// does it verify, never does unpacking it succeed. What is left of an image
// without its whole signature, and nothing else, is one that was never signed.
func TestEveryBit(t *testing.T) {
	key, id := signer(t, 1)
	trusted := func(s *Signature, err error) error {
		if err == nil && s.Identity != id {
			return ErrUntrusted
		}
		return err
	}
	// what --insecure takes for an image that was never signed
	unsigned := func(s *Signature, err error) error {
		if errors.Is(err, ErrUnsigned) {
			return nil
		}
		return trusted(s, err)
	}
	for _, c := range []Compression{Gzip, Zstd} {
		good := build(t, c, key, file("a", "a"))
		refuse := func(what string, b []byte) {
			t.Helper()
			if err := trusted(Verify(t.Context(), bytes.NewReader(b))); err == nil {
				t.Errorf("%v: %s: verified", c, what)
			}
			for _, l := range []Limits{{}, {Unsigned: true}} {
				accept := trusted
				if l.Unsigned {
					accept = unsigned
				}
				r, err := NewReader(bytes.NewReader(b), l)
				if err != nil {
					continue
				}
				for err == nil {
					_, err = r.Next()
				}
				if errors.Is(err, io.EOF) {
					err = accept(r.Finish())
				}
				r.Close()
				if err == nil && !bytes.Equal(b, good[:len(good)-c.trailerLen()]) {
					t.Errorf("%v: %s: read as good with %+v", c, what, l)
				}
			}
		}
		for i := range good {
			for bit := range 8 {
				b := bytes.Clone(good)
				b[i] ^= 1 << bit
				refuse(fmt.Sprintf("bit %d of byte %d of %d flipped", bit, i, len(good)), b)
			}
			refuse(fmt.Sprintf("cut off after %d bytes", i), good[:i])
			if i%16 == 0 {
				refuse(fmt.Sprintf("byte inserted at %d", i), slices.Insert(bytes.Clone(good), i, 0))
			}
		}
	}
}

// raw makes a gzip payload of any tar and signs it with a good key: what a
// hostile or broken builder could do.
func raw(t testing.TB, s ssh.Signer, headers ...*tar.Header) []byte {
	t.Helper()
	var payload bytes.Buffer
	z := gzip.NewWriter(&payload)
	w := tar.NewWriter(z)
	desc, _ := testImage.marshal()
	all := append([]*tar.Header{
		{Name: ".bali/", Typeflag: tar.TypeDir, Mode: 0o755},
		{Name: ".bali/image.json", Typeflag: tar.TypeReg, Mode: 0o644, Size: int64(len(desc))},
	}, headers...)
	for _, h := range all {
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		content := desc
		if h.Name != ImagePath {
			content = make([]byte, h.Size)
		}
		if _, err := w.Write(content); err != nil {
			t.Fatal(err)
		}
	}
	w.Close()
	z.Close()
	return sealRaw(t, Gzip, payload.Bytes(), s)
}

func sealRaw(t testing.TB, c Compression, payload []byte, s ssh.Signer) []byte {
	t.Helper()
	sig := &Signature{Payload: sha512.Sum512(payload)}
	if err := sig.sign(s); err != nil {
		t.Fatal(err)
	}
	return append(bytes.Clone(payload), sig.trailer(c)...)
}

// TestAttacks is the attack set on the format: each is refused, for its reason,
// and leaves the folder's outside alone.
func TestAttacks(t *testing.T) {
	key, _ := signer(t, 1)
	other, _ := signer(t, 2)
	good := build(t, Gzip, key, testItems...)
	foreign := build(t, Gzip, other, file("evil", "evil"))
	n := Gzip.trailerLen()
	member := func(s string) []byte {
		var b bytes.Buffer
		z := gzip.NewWriter(&b)
		io.WriteString(z, s)
		z.Close()
		return b.Bytes()
	}
	reg := func(name string) *tar.Header { return &tar.Header{Name: name, Typeflag: tar.TypeReg, Size: 1} }
	folder := func(name string) *tar.Header { return &tar.Header{Name: name, Typeflag: tar.TypeDir, Mode: 0o755} }
	sym := func(name, to string) *tar.Header {
		return &tar.Header{Name: name, Typeflag: tar.TypeSymlink, Linkname: to, Mode: 0o777}
	}
	hard := func(name, to string) *tar.Header {
		return &tar.Header{Name: name, Typeflag: tar.TypeLink, Linkname: to}
	}
	bomb := func() []byte {
		var payload bytes.Buffer
		z, _ := gzip.NewWriterLevel(&payload, gzip.BestCompression)
		w := tar.NewWriter(z)
		desc, _ := testImage.marshal()
		w.WriteHeader(&tar.Header{Name: ".bali/", Typeflag: tar.TypeDir, Mode: 0o755})
		w.WriteHeader(&tar.Header{Name: ImagePath, Typeflag: tar.TypeReg, Size: int64(len(desc))})
		w.Write(desc)
		w.WriteHeader(&tar.Header{Name: "zeros", Typeflag: tar.TypeReg, Size: 64 << 20})
		io.CopyN(w, zeros{}, 64<<20)
		w.Close()
		z.Close()
		return sealRaw(t, Gzip, payload.Bytes(), key)
	}
	names := func() []byte {
		long := strings.Repeat("x", 250)
		headers := []*tar.Header{folder(long + "/"), folder(long + "/" + long + "/")}
		for i := range 20 {
			headers = append(headers, reg(fmt.Sprintf("%s/%s/%02d%s", long, long, i, long)))
		}
		return raw(t, key, headers...)
	}
	goodZ, nz := build(t, Zstd, key, testItems...), Zstd.trailerLen()
	frame := func() []byte { // an empty one
		var b bytes.Buffer
		z, _ := zstd.NewWriter(&b, zstd.WithZeroFrames(true))
		z.Close()
		return b.Bytes()
	}
	skippable := []byte{0x50, 0x2a, 0x4d, 0x18, 4, 0, 0, 0, 'e', 'v', 'i', 'l'}
	swap := func(b []byte, from, to string) []byte {
		if !bytes.Contains(b, []byte(from)) {
			t.Fatalf("no %q to replace", from)
		}
		return bytes.Replace(b, []byte(from), []byte(to), 1)
	}
	paxGlobal := &tar.Header{Typeflag: tar.TypeXGlobalHeader, PAXRecords: map[string]string{"path": "x"}}
	attacks := []struct {
		name   string
		file   []byte
		err    error
		reason string
	}{
		{"unsigned", build(t, Gzip, nil, file("a", "a")), ErrUnsigned, "never signed"},
		{"empty file", nil, ErrFormat, "0 bytes"},
		{"not compressed", []byte("#!/bin/sh\n"), ErrFormat, "neither like gzip"},
		{"cut off before the signature", good[:len(good)-n], ErrUnsigned, "cut off"},
		{"cut off in the signature", good[:len(good)-1], ErrUnsigned, "cut off"},
		{"byte appended", append(bytes.Clone(good), 0), ErrUnsigned, "appended"},
		{"padding appended", append(bytes.Clone(good), make([]byte, 512)...), ErrFormat, "between the image"},
		{"member appended", append(bytes.Clone(good), member("x")...), ErrUnsigned, "appended"},
		{"image appended", append(bytes.Clone(good), foreign...), ErrFormat, "between the image and its signature"},
		{"member before", append(member("x"), good...), ErrFormat, ""},
		{"member inside", slices.Insert(bytes.Clone(good), len(good)-n, member("x")...), ErrFormat, "between the image"},
		{"signed twice", sealRaw(t, Gzip, good, key), ErrSignature, "signed twice"},
		{"signed twice by different keys", sealRaw(t, Gzip, good, other), ErrSignature, "signed twice"},
		{"zstd signed twice", sealRaw(t, Zstd, build(t, Zstd, key), key), ErrSignature, "signed twice"},
		{"signature of another file", append(bytes.Clone(good[:len(good)-n]), foreign[len(foreign)-n:]...), ErrSignature, "not what"},
		{"another payload under the signature", append(bytes.Clone(foreign[:len(foreign)-n]), good[len(good)-n:]...), ErrSignature, "not what"},
		{"key confusion: the other's key over my signature", confuse(t, good, other), ErrSignature, "not what"},
		{"newer signature version", swap(good, "BALI\x01", "BALI\x02"), ErrFormat, "get a newer one"},
		{"newer image version", sealRaw(t, Gzip, member(tarOf(t, strings.Replace(describe(t), `"version": 1`, `"version": 2`, 1))), key), ErrFormat, "get a newer one"},
		{"two members signed as one", sealRaw(t, Gzip, append(bytes.Clone(good[:len(good)-n]), member("x")...), key), ErrFormat, "between the image"},
		{"zstd frame appended", append(bytes.Clone(goodZ), frame()...), ErrUnsigned, "appended"},
		{"zstd skippable frame appended", append(bytes.Clone(goodZ), skippable...), ErrUnsigned, "appended"},
		{"zstd frame inside", slices.Insert(bytes.Clone(goodZ), len(goodZ)-nz, frame()...), ErrFormat, "between the image"},
		{"zstd skippable frame inside", slices.Insert(bytes.Clone(goodZ), len(goodZ)-nz, skippable...), ErrFormat, "between the image"},
		{"zstd skippable frame before", append(bytes.Clone(skippable), goodZ...), ErrFormat, "neither like gzip"},
		{"two zstd frames signed as one", sealRaw(t, Zstd, append(bytes.Clone(goodZ[:len(goodZ)-nz]), frame()...), key), ErrFormat, "between the image"},
		{"zstd skippable frame signed along", sealRaw(t, Zstd, append(bytes.Clone(goodZ[:len(goodZ)-nz]), skippable...), key), ErrFormat, "between the image"},
		{"gzip trailer on zstd", append(bytes.Clone(goodZ[:len(goodZ)-nz]), good[len(good)-n:]...), ErrUnsigned, ""},
		{"data after the archive", sealRaw(t, Gzip, member(tarOf(t, describe(t))+"more"), key), ErrFormat, "after the end"},
		{"zero blocks after the archive", sealRaw(t, Gzip, member(tarOf(t, describe(t))+strings.Repeat("\x00", 1<<20)), key), ErrFormat, "after the end"},
		{"archive without end", sealRaw(t, Gzip, member(tarOf(t, describe(t))[:1024]), key), ErrFormat, ""},
		{"no description", sealRaw(t, Gzip, member(strings.Repeat("\x00", 1024)), key), ErrFormat, "is missing"},
		{"huge description", sealRaw(t, Gzip, member(tarOf(t, strings.Repeat(" ", maxImageBytes+1))), key), ErrFormat, "is missing"},

		{"absolute path", raw(t, key, reg("/etc/passwd")), ErrFormat, "absolute path"},
		{"dot dot", raw(t, key, reg("../escape")), ErrFormat, "leaves the image"},
		{"dot dot inside", raw(t, key, folder("a/"), reg("a/../../escape")), ErrFormat, "leaves the image"},
		{"unclean path", raw(t, key, reg("./a")), ErrFormat, "not clean"},
		{"through a symlink", raw(t, key, sym("a", "/"), reg("a/escape")), ErrFormat, "no folder of the image"},
		{"through a symlink to the parent", raw(t, key, sym("a", ".."), reg("a/escape")), ErrFormat, "no folder of the image"},
		{"symlink replaced by its target", raw(t, key, sym("a", "/tmp/escape"), reg("a")), ErrFormat, "appears twice"},
		{"folder and then file", raw(t, key, folder("a/"), reg("a")), ErrFormat, "appears twice"},
		{"duplicate path", raw(t, key, reg("a"), reg("b"), reg("a")), ErrFormat, "not in order"},
		{"hard link to the host", raw(t, key, hard("a", "/etc/shadow")), ErrFormat, "absolute path"},
		{"hard link out", raw(t, key, hard("a", "../../etc/shadow")), ErrFormat, "leaves the image"},
		{"hard link through a symlink", raw(t, key, sym("a", "/etc"), hard("b", "a/passwd")), ErrFormat, "no earlier file"},
		{"hard link to a symlink", raw(t, key, sym("a", "/etc/passwd"), hard("b", "a")), ErrFormat, "no earlier file"},
		{"hard link with other attributes", raw(t, key, reg("a"), &tar.Header{Name: "b", Typeflag: tar.TypeLink, Linkname: "a", Mode: 0o4755}), ErrFormat, "other attributes"},
		{"device", raw(t, key, &tar.Header{Name: "sda", Typeflag: tar.TypeBlock, Devmajor: 8}), nil, "device node"},
		{"fifo", raw(t, key, &tar.Header{Name: "p", Typeflag: tar.TypeFifo}), nil, "device node"},
		{"global header", raw(t, key, paxGlobal), ErrFormat, "type 'g'"},
		{"file in bali's folder", raw(t, key, reg(".bali/image.json2")), ErrFormat, "bali's own"},
		{"gzip bomb", bomb(), ErrTooLarge, "--max-size"},
		{"sparse file of an exbibyte", sealRaw(t, Gzip, member(sparse(t)), key), ErrFormat, "type 'S'"},
		{"sparse file as PAX has it", sealRaw(t, Gzip, member(paxSparse(t)), key), ErrFormat, "is a sparse file"},
		{"bomb of names", names(), ErrTooLarge, "--max-entries"},
		{"huge size in a header", sealRaw(t, Gzip, member(hugeHeader(t)), key), nil, ""},
		{"file type in the mode", raw(t, key, &tar.Header{Name: "a", Typeflag: tar.TypeReg, Mode: 0o100644}), ErrFormat, "has mode"},
		{"deep path", raw(t, key, reg(strings.Repeat("a/", 300)+"a")), ErrFormat, "folders deep"},
		{"long name", raw(t, key, reg(strings.Repeat("a", 256))), ErrFormat, "file name of 256 bytes"},
	}
	for _, a := range attacks {
		t.Run(a.name, func(t *testing.T) {
			dir, _, err := unpack(t, a.file, Unpack{}, Limits{MaxSize: 8 << 20, MaxEntries: 50})
			if err == nil {
				t.Fatal("accepted")
			}
			if a.err != nil && !errors.Is(err, a.err) {
				t.Errorf("refused with %v, want %v", err, a.err)
			}
			if !strings.Contains(err.Error(), a.reason) {
				t.Errorf("refused with %q, which doesn't say %q", err, a.reason)
			}
			for _, p := range []string{"escape", "../escape"} {
				if _, err := os.Lstat(filepath.Join(filepath.Dir(dir), p)); err == nil {
					t.Errorf("%s was written outside", p)
				}
			}
		})
	}
}

// confuse puts another key into a trailer, with everything else left alone.
func confuse(t *testing.T, good []byte, other ssh.Signer) []byte {
	t.Helper()
	id, err := IdentityOf(other.PublicKey())
	if err != nil {
		t.Fatal(err)
	}
	b := bytes.Clone(good)
	copy(b[len(b)-len(gzipSealTail)-sealLen+40:], id[:])
	return b
}

func describe(t *testing.T) string {
	t.Helper()
	b, err := testImage.marshal()
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func tarOf(t *testing.T, description string) string {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	w.WriteHeader(&tar.Header{Name: ".bali/", Typeflag: tar.TypeDir, Mode: 0o755})
	w.WriteHeader(&tar.Header{Name: ImagePath, Typeflag: tar.TypeReg, Size: int64(len(description))})
	io.WriteString(w, description)
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

// hugeHeader claims a file of an exbibyte.
func hugeHeader(t *testing.T) string {
	t.Helper()
	b := tarOf(t, describe(t))
	var h bytes.Buffer
	w := tar.NewWriter(&h)
	if err := w.WriteHeader(&tar.Header{Name: "huge", Typeflag: tar.TypeReg, Size: 1 << 60, Format: tar.FormatGNU}); err != nil {
		t.Fatal(err)
	}
	return b[:len(b)-1024] + h.String()
}

// sparse turns a header into one of GNU's old sparse files, whose size is in
// another field.
func sparse(t *testing.T) string {
	t.Helper()
	b := tarOf(t, describe(t))
	var h bytes.Buffer
	w := tar.NewWriter(&h)
	if err := w.WriteHeader(&tar.Header{Name: "sparse", Typeflag: tar.TypeReg, Format: tar.FormatGNU}); err != nil {
		t.Fatal(err)
	}
	block := h.Bytes()[:512]
	copy(block[483:], "\x80\x00\x00\x00\x10\x00\x00\x00\x00\x00\x00\x00") // realsize, base 256
	retype(block, tar.TypeGNUSparse)
	return b[:len(b)-1024] + string(block) + strings.Repeat("\x00", 1024)
}

// paxSparse is a file of an exbibyte in the form that GNU tar writes today
// (GNU.sparse.major=1).
func paxSparse(t *testing.T) string {
	t.Helper()
	b := tarOf(t, describe(t))
	records := ""
	for _, r := range []string{"GNU.sparse.major=1", "GNU.sparse.minor=0", "GNU.sparse.name=sparse", "GNU.sparse.realsize=1152921504606846976"} {
		n := len(r) + 5 // two digits, space, newline; three digits where it gets longer
		for len(fmt.Sprintf("%d %s\n", n, r)) != n {
			n--
		}
		records += fmt.Sprintf("%d %s\n", n, r)
	}
	var h bytes.Buffer
	w := tar.NewWriter(&h)
	for _, f := range []struct {
		typeflag byte
		content  string
	}{{'0', records}, {'0', "1\n1152921504606846975\n1\n" + strings.Repeat("\x00", 512-24) + "x"}} {
		if err := w.WriteHeader(&tar.Header{Name: "sparse", Typeflag: f.typeflag, Size: int64(len(f.content)), Format: tar.FormatUSTAR}); err != nil {
			t.Fatal(err)
		}
		io.WriteString(w, f.content)
	}
	if err := w.Flush(); err != nil {
		t.Fatal(err)
	}
	out := h.Bytes()
	retype(out[:512], 'x')
	return b[:len(b)-1024] + string(out) + strings.Repeat("\x00", 1024)
}

// retype makes a tar header another kind's, with a right checksum.
func retype(block []byte, typeflag byte) {
	block[156] = typeflag
	copy(block[148:], "        ")
	sum := 0
	for _, c := range block[:512] {
		sum += int(c)
	}
	copy(block[148:], fmt.Sprintf("%06o\x00 ", sum))
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }

// TestCaseTricks: where the target's file system takes two names for the same,
// the second is refused, and not followed: here they are there already, as they
// would be on one that ignores case.
func TestCaseTricks(t *testing.T) {
	key, _ := signer(t, 1)
	for name, second := range map[string]item{
		"file": file("a", "evil"), "folder": dir("a"), "link": link(Symlink, "a", "/tmp"), "hard link": {Entry{Path: "a", Kind: Hardlink, Mode: 0o644, ModTime: 1700000000, Link: "B"}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			b := build(t, Gzip, key, file("B", "x"), second)
			where := t.TempDir()
			if err := os.Symlink("/nonexistent", filepath.Join(where, "a")); err != nil {
				t.Fatal(err)
			}
			d, err := os.Open(where)
			if err != nil {
				t.Fatal(err)
			}
			defer d.Close()
			r, err := NewReader(bytes.NewReader(b), Limits{})
			if err != nil {
				t.Fatal(err)
			}
			defer r.Close()
			u := Unpack{}
			if _, err := u.Into(t.Context(), r, d); err == nil || !strings.Contains(err.Error(), "takes two names of the image for the same") {
				t.Errorf("unpacked onto another name: %v", err)
			}
		})
	}
}

// TestSetid: without leave, setuid, setgid and capabilities don't reach the disk.
func TestSetid(t *testing.T) {
	key, _ := signer(t, 1)
	su := item{Entry{Path: "su", Kind: File, Mode: 0o6755, Size: 1}, "x"}
	b := build(t, Gzip, key, su)
	for _, allowed := range []bool{false, true} {
		dir, _, err := unpack(t, b, Unpack{Setid: allowed}, Limits{})
		if err != nil {
			t.Fatal(err)
		}
		fi, err := os.Stat(filepath.Join(dir, "su"))
		if err != nil {
			t.Fatal(err)
		}
		if got := fi.Mode()&(os.ModeSetuid|os.ModeSetgid) != 0; got != allowed {
			t.Errorf("Setid %v: mode %v", allowed, fi.Mode())
		}
	}
}

// TestOrdinaryTools unpacks with every tar there is: a signed image is nothing
// special to them, and says nothing on stderr.
func TestOrdinaryTools(t *testing.T) {
	key, _ := signer(t, 1)
	files := map[Compression]string{}
	for c, name := range map[Compression]string{Gzip: "i.tar.gz", Zstd: "i.tar.zst"} {
		files[c] = filepath.Join(t.TempDir(), name)
		if err := os.WriteFile(files[c], build(t, c, key, testItems...), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, tool := range []struct {
		pkg  string
		comp Compression
		argv []string
	}{
		{"tar", Gzip, []string{"tar", "xzf", "FILE"}},
		{"zstd", Zstd, []string{"tar", "--zstd", "-xf", "FILE"}},
		{"libarchive-tools", Gzip, []string{"bsdtar", "xf", "FILE"}},
		{"libarchive-tools", Zstd, []string{"bsdtar", "xf", "FILE"}},
		{"busybox", Gzip, []string{"busybox", "tar", "xzf", "FILE"}},
		{"python3", Gzip, []string{"python3", "-c", "import tarfile,sys; tarfile.open(sys.argv[1]).extractall('.')", "FILE"}},
		{"gzip", Gzip, []string{"gzip", "-t", "FILE"}},
		{"zstd", Zstd, []string{"zstd", "-q", "-t", "FILE"}},
	} {
		argv := slices.Clone(tool.argv)
		argv[slices.Index(argv, "FILE")] = files[tool.comp]
		t.Run(strings.Join(tool.argv[:2], " "), func(t *testing.T) {
			if _, err := exec.LookPath(argv[0]); err != nil {
				t.Fatalf("%v: apt-get install %s", err, tool.pkg)
			}
			cmd := exec.CommandContext(t.Context(), argv[0], argv[1:]...)
			cmd.Dir = t.TempDir()
			out, err := cmd.CombinedOutput()
			if err != nil || len(out) > 0 {
				t.Fatalf("%v: %v: %s", argv, err, out)
			}
			if slices.Contains(argv, "-t") {
				return
			}
			for _, i := range testItems {
				fi, err := os.Lstat(filepath.Join(cmd.Dir, i.Path))
				if err != nil {
					t.Error(err)
				} else if i.Kind == File && fi.Size() != i.Size {
					t.Errorf("%s has %d bytes, want %d", i.Path, fi.Size(), i.Size)
				}
			}
		})
	}
}

// TestVerity compares with the reference program at the sizes where the tree
// grows a level.
func TestVerity(t *testing.T) {
	if _, err := exec.LookPath("fsverity"); err != nil {
		t.Fatalf("%v: apt-get install fsverity", err)
	}
	name := filepath.Join(t.TempDir(), "f")
	for _, size := range []int{0, 1, 4095, 4096, 4097, 8192, 128 * 4096, 128*4096 + 1, 129 * 4096, 128*128*4096 + 5} {
		content := make([]byte, size)
		for i := range content {
			content[i] = byte(i * i >> 3)
		}
		if err := os.WriteFile(name, content, 0o600); err != nil {
			t.Fatal(err)
		}
		out, err := exec.CommandContext(t.Context(), "fsverity", "digest", "--compact", name).Output()
		if err != nil {
			t.Fatal(err)
		}
		for _, step := range []int{len(content) + 1, 1000, 4096, 70000} {
			var v Verity
			v.Write([]byte("of another file"))
			v.Reset()
			for c := range slices.Chunk(content, step) {
				v.Write(c)
			}
			if got := fmt.Sprintf("%x", v.Sum()); got != strings.TrimSpace(string(out)) {
				t.Errorf("%d bytes, written %d at a time: %s, fsverity says %s", size, step, got, out)
			}
		}
	}
}

func TestIdentityForms(t *testing.T) {
	_, id := signer(t, 1)
	for _, s := range []string{id.String(), id.AuthorizedKey(), id.AuthorizedKey() + " someone@host\n", " " + id.String() + "\n"} {
		if got, err := ParseIdentity(s); err != nil || got != id {
			t.Errorf("ParseIdentity(%q) = %v, %v", s, got, err)
		}
	}
	for _, s := range []string{
		"", "ed25519:", "ed25519:AAAA", id.String()[8:], id.String() + "A", strings.ToUpper(id.String()),
		id.AuthorizedKey() + "\n" + id.AuthorizedKey(),
		"ssh-rsa AAAAB3NzaC1yc2EAAAADAQABAAAAgQC7", "ssh-ed25519 !",
	} {
		if got, err := ParseIdentity(s); err == nil {
			t.Errorf("ParseIdentity(%q) = %v, want an error", s, got)
		}
	}
}

// TestVectors holds the format still: testdata/vectors are the files that
// docs/bali-format.md describes, made from seed bytes 01.
func TestVectors(t *testing.T) {
	key, id := signer(t, 1)
	for c, name := range map[Compression]string{Gzip: "hello.tar.gz", Zstd: "hello.tar.zst"} {
		name = filepath.Join("testdata/vectors", name)
		built := build(t, c, key, testItems...)
		if *update {
			if err := os.WriteFile(name, built, 0o644); err != nil {
				t.Fatal(err)
			}
		}
		b, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		s, err := Verify(t.Context(), bytes.NewReader(b))
		if err != nil || s.Identity != id {
			t.Fatalf("%s: %v, %v", name, s, err)
		}
		if c == Gzip && !bytes.Equal(b, built) {
			t.Errorf("%s: the same input no longer gives these bytes", name)
		}
		if got := fmt.Sprintf("%x", s.Tree); got != vectorTree {
			t.Errorf("%s: tree digest %s, want %s", name, got, vectorTree)
		}
		sum, listing := tree(t, b)
		if sum != s.Tree {
			t.Errorf("%s: the entries' tree is %x, signed %x", name, sum, s.Tree)
		}
		want, err := os.ReadFile("testdata/vectors/hello.tree")
		if *update {
			err = os.WriteFile("testdata/vectors/hello.tree", []byte(listing), 0o644)
			want = []byte(listing)
		}
		if err != nil || string(want) != listing {
			t.Errorf("%s: listing\n%s\nwant\n%s%v", name, listing, want, err)
		}
	}
}

// TestDocumented holds docs/bali-format.md to the test vectors.
func TestDocumented(t *testing.T) {
	doc, err := os.ReadFile("../../docs/bali-format.md")
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile("testdata/vectors/hello.tar.gz")
	if err != nil {
		t.Fatal(err)
	}
	_, id := signer(t, 1)
	trailer := b[len(b)-Gzip.trailerLen():]
	for _, want := range []string{
		vectorTree, id.String(), fmt.Sprintf("%x", sha512.Sum512(b[:len(b)-len(trailer)])),
		fmt.Sprintf("%x\n%x\n%x", trailer[:54], trailer[54:108], trailer[108:]),
	} {
		if !strings.Contains(string(doc), want) {
			t.Errorf("docs/bali-format.md doesn't have %s", want)
		}
	}
}

// FuzzReader feeds anything to the whole path from bytes to files: it may only
// refuse or stay within its limits.
func FuzzReader(f *testing.F) {
	key, _ := signer(f, 1)
	f.Add(build(f, Gzip, key, testItems...))
	f.Add(build(f, Zstd, key, testItems...))
	f.Add(build(f, Gzip, nil, file("a", "a")))
	f.Fuzz(func(t *testing.T, b []byte) {
		root := t.TempDir()
		inner := filepath.Join(root, "inner")
		if err := os.Mkdir(inner, 0o700); err != nil {
			t.Fatal(err)
		}
		d, err := os.Open(inner)
		if err != nil {
			t.Fatal(err)
		}
		defer d.Close()
		r, err := NewReader(bytes.NewReader(b), Limits{MaxSize: 1 << 20, MaxEntries: 100, Unsigned: true})
		if err != nil {
			return
		}
		defer r.Close()
		u := Unpack{}
		u.Into(t.Context(), r, d)
		if left, _ := os.ReadDir(root); len(left) != 1 {
			t.Fatalf("written outside: %v", left)
		}
	})
}

// FuzzTar skips the compression, which a fuzzer can't see through.
func FuzzTar(f *testing.F) {
	key, _ := signer(f, 1)
	z, err := gzip.NewReader(bytes.NewReader(build(f, Gzip, key, testItems...)))
	if err != nil {
		f.Fatal(err)
	}
	seed, err := io.ReadAll(z)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(seed)
	enc, err := zstd.NewWriter(nil, zstd.WithEncoderLevel(zstd.SpeedFastest))
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := NewReader(bytes.NewReader(enc.EncodeAll(b, nil)), Limits{MaxSize: 1 << 20, MaxEntries: 100, Unsigned: true})
		if err != nil {
			return
		}
		defer r.Close()
		seen := map[string]bool{}
		for {
			e, err := r.Next()
			if err != nil {
				return
			}
			if !filepath.IsLocal(e.Path) || seen[e.Path] {
				t.Fatalf("admitted %q", e.Path)
			}
			seen[e.Path] = true
		}
	})
}

// FuzzTrailer: what parses is canonical, so it comes out as it went in.
func FuzzTrailer(f *testing.F) {
	key, _ := signer(f, 1)
	for _, c := range []Compression{Gzip, Zstd} {
		b := build(f, c, key)
		f.Add(b[len(b)-c.trailerLen():])
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		s, err := ParseTrailer(b)
		if err != nil {
			return
		}
		if !bytes.HasSuffix(b, s.trailer(Gzip)) && !bytes.HasSuffix(b, s.trailer(Zstd)) {
			t.Fatalf("accepted %x, which is not canonical", b)
		}
	})
}
