package source

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io"
	"log"
	"net/http/httptest"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"

	"github.com/cradlestack/cradlestack/bali/seal"
)

// layer makes one from lines like "d usr", "f usr/x content", "l lib usr/lib",
// "h b a".
func layer(t *testing.T, lines ...string) v1.Layer {
	t.Helper()
	b := layerBytes(t, lines...)
	l, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(b)), nil })
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func layerBytes(t testing.TB, lines ...string) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, l := range lines {
		f := append(strings.SplitN(l, " ", 3), "")
		h := &tar.Header{Name: f[1], Mode: 0o644, Uid: 5, Gid: 6}
		switch f[0] {
		case "d":
			h.Typeflag, h.Mode = tar.TypeDir, 0o755
		case "f":
			h.Typeflag, h.Size = tar.TypeReg, int64(len(f[2]))
		case "l":
			h.Typeflag, h.Linkname = tar.TypeSymlink, f[2]
		case "h":
			h.Typeflag, h.Linkname = tar.TypeLink, f[2]
		case "c":
			h.Typeflag = tar.TypeChar
		}
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if f[0] == "f" {
			io.WriteString(w, f[2])
		}
	}
	w.Close()
	return b.Bytes()
}

func image(t *testing.T, layers ...v1.Layer) v1.Image {
	t.Helper()
	img, err := mutate.AppendLayers(empty.Image, layers...)
	if err != nil {
		t.Fatal(err)
	}
	cfg, err := img.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	cfg = cfg.DeepCopy()
	cfg.OS, cfg.Architecture = "linux", runtime.GOARCH
	cfg.Config = v1.Config{Entrypoint: []string{"/bin/app"}, Cmd: []string{"serve"}, Env: []string{"A=1"}, User: "web", WorkingDir: "/srv", StopSignal: "SIGINT", Labels: map[string]string{"k": "v"}}
	if img, err = mutate.ConfigFile(img, cfg); err != nil {
		t.Fatal(err)
	}
	return img
}

// listing writes an image and reads it back, one line per entry.
func listing(t *testing.T, r *Rootfs) string {
	t.Helper()
	var b bytes.Buffer
	w, err := seal.NewWriter(&b, &r.Image, seal.Gzip, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := r.Write(t.Context(), w); err != nil {
		t.Fatal(err)
	}
	if _, err := w.Seal(nil); err != nil {
		t.Fatal(err)
	}
	read, err := seal.NewReader(&b, seal.Limits{Unsigned: true})
	if err != nil {
		t.Fatal(err)
	}
	defer read.Close()
	var out strings.Builder
	for {
		e, err := read.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		if strings.HasPrefix(e.Path, seal.ImageDir) {
			continue
		}
		content, err := io.ReadAll(read)
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(&out, "%c %s %s%s\n", e.Kind, e.Path, e.Link, content)
	}
	return out.String()
}

// TestLayers lays layers over each other as the OCI image specification says,
// and as images in the wild need it.
func TestLayers(t *testing.T) {
	for _, c := range []struct {
		name   string
		layers [][]string
		want   string
	}{
		{
			"upper wins",
			[][]string{{"f a one", "f b one"}, {"f b two"}},
			"- a one\n- b two\n",
		},
		{
			"whiteout",
			[][]string{{"d d", "f d/a x", "f e x"}, {"f .wh.e ", "f d/.wh.a ", "f d/b y"}},
			"d d \n- d/b y\n",
		},
		{
			"whiteout and new in one layer",
			[][]string{{"d d", "f d/a x"}, {"f .wh.d ", "d d", "f d/b y"}},
			"d d \n- d/b y\n",
		},
		{
			"opaque hides lower layers only",
			[][]string{{"d d", "f d/a x", "d d/s", "f d/s/deep x"}, {"d d", "f d/b y", "d d/s", "f d/.wh..wh..opq ", "f d/c z"}},
			"d d \n- d/b y\n- d/c z\nd d/s \n",
		},
		{
			"folder becomes file and back",
			[][]string{{"d a", "f a/x x", "f b x"}, {"f a file", "d b", "f b/y y"}},
			"- a file\nd b \n- b/y y\n",
		},
		{
			"folder keeps what is below it",
			[][]string{{"d a", "f a/x x"}, {"d a", "f a/y y"}},
			"d a \n- a/x x\n- a/y y\n",
		},
		{
			"hard links, also to what an upper layer replaces",
			[][]string{{"f a x", "h b a", "h c a"}, {"f a new"}},
			"- a new\n- b x\nh c b\n",
		},
		{
			"hard link across layers",
			[][]string{{"f a x"}, {"h b a"}},
			"- a x\nh b a\n",
		},
		{
			"hard link to a symbolic link",
			[][]string{{"l a to", "h b a"}},
			"l a to\nl b to\n",
		},
		{
			"through a lower symbolic link",
			[][]string{{"d usr/lib", "l lib usr/lib", "l abs /usr/lib"}, {"f lib/a x", "f abs/b y"}},
			"l abs /usr/lib\nl lib usr/lib\nd usr \nd usr/lib \n- usr/lib/a x\n- usr/lib/b y\n",
		},
		{
			"symbolic link out of the image stays in it",
			[][]string{{"l up ../../..", "f up/a x"}},
			"- a x\nl up ../../..\n",
		},
		{
			"names that climb stay in it",
			[][]string{{"f ../../a x", "f /b y", "f ./c z"}},
			"- a x\n- b y\n- c z\n",
		},
		{
			"parents that are missing",
			[][]string{{"f x/y/z x"}},
			"d x \nd x/y \n- x/y/z x\n",
		},
		{
			"devices are left out",
			[][]string{{"d dev", "c dev/null"}},
			"d dev \n",
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			var layers []v1.Layer
			for _, l := range c.layers {
				layers = append(layers, layer(t, l...))
			}
			r, err := flatten(t.Context(), image(t, layers...), "test", Options{})
			if err != nil {
				t.Fatal(err)
			}
			defer r.Close()
			if got := listing(t, r); got != c.want {
				t.Errorf("got\n%swant\n%s", got, c.want)
			}
		})
	}
}

func TestLinkLoop(t *testing.T) {
	img := image(t, layer(t, "l a b", "l b a"), layer(t, "f a/x x"))
	if _, err := flatten(t.Context(), img, "test", Options{}); err == nil || !strings.Contains(err.Error(), "too many symbolic links") {
		t.Errorf("a loop of links: %v", err)
	}
}

func TestTooLarge(t *testing.T) {
	img := image(t, layer(t, "f a "+strings.Repeat("x", 1000)))
	if _, err := flatten(t.Context(), img, "test", Options{MaxSize: 999}); !errors.Is(err, seal.ErrTooLarge) {
		t.Errorf("1000 bytes with MaxSize 999: %v", err)
	}
}

// TestOpen reads the same image from everywhere it can come from.
func TestOpen(t *testing.T) {
	img := image(t, layer(t, "d bin", "f bin/app hello"))
	dir := t.TempDir()

	archive := filepath.Join(dir, "image.tar")
	tag, err := name.NewTag("example.org/app:1")
	if err != nil {
		t.Fatal(err)
	}
	if err := tarball.WriteToFile(archive, tag, img); err != nil {
		t.Fatal(err)
	}
	oci, err := layout.Write(filepath.Join(dir, "oci"), empty.Index)
	if err != nil {
		t.Fatal(err)
	}
	if err := oci.AppendImage(img, layout.WithAnnotations(map[string]string{"org.opencontainers.image.ref.name": "one"})); err != nil {
		t.Fatal(err)
	}
	other := image(t, layer(t, "f other x"))
	if err := oci.AppendImage(other, layout.WithAnnotations(map[string]string{"org.opencontainers.image.ref.name": "two"})); err != nil {
		t.Fatal(err)
	}
	server := httptest.NewServer(registry.New(registry.Logger(log.New(io.Discard, "", 0))))
	defer server.Close()
	where := strings.TrimPrefix(server.URL, "http://") + "/app:1"
	ref, err := name.ParseReference(where)
	if err != nil {
		t.Fatal(err)
	}
	if err := remote.Write(ref, img); err != nil {
		t.Fatal(err)
	}
	for _, from := range []string{"docker-archive:" + archive, "oci:" + filepath.Join(dir, "oci") + ":one", where} {
		r, err := Open(t.Context(), from, Options{})
		if err != nil {
			t.Fatalf("%s: %v", from, err)
		}
		if got := listing(t, r); got != "d bin \n- bin/app hello\n" {
			t.Errorf("%s: %s", from, got)
		}
		i := r.Image
		if fmt.Sprintln(i.Entrypoint, i.Cmd, i.Env, i.User, i.Workdir, i.StopSignal, i.Labels) != "[/bin/app] [serve] [A=1] web /srv SIGINT map[k:v]\n" {
			t.Errorf("%s: %+v", from, i)
		}
		r.Close()
	}
	for from, reason := range map[string]string{
		"oci:" + filepath.Join(dir, "oci"):          "more than one image",
		"oci:" + filepath.Join(dir, "oci") + ":no":  "no image for",
		"docker-archive:" + filepath.Join(dir, "x"): "no such file",
		where + "00": "pull ",
		"Bad Name":   "write a folder with a leading ./",
	} {
		if _, err := Open(t.Context(), from, Options{}); err == nil || !strings.Contains(err.Error(), reason) {
			t.Errorf("%s: %v, want an error with %q", from, err, reason)
		}
	}
	if _, err := Open(t.Context(), where, Options{Platform: v1.Platform{OS: "linux", Architecture: "mips"}}); err == nil {
		t.Error("an image for another architecture was taken")
	}
}

// dockerArchive is what docker save writes: in the form since 25, an OCI layout
// with a manifest.json, and in the one before, with names of its own, and links
// where two layers are the same. edit may change its members.
func dockerArchive(t testing.TB, old bool, img v1.Image, edit func(name string, content []byte) (string, []byte)) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	add := func(h tar.Header, content []byte) {
		if edit != nil && h.Typeflag == tar.TypeReg {
			h.Name, content = edit(h.Name, content)
		}
		if h.Mode, h.Size = 0o644, int64(len(content)); h.Name == "" {
			return
		}
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		w.Write(content)
	}
	config, err := img.RawConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	layers, err := img.Layers()
	if err != nil {
		t.Fatal(err)
	}
	name, err := img.ConfigName()
	if err != nil {
		t.Fatal(err)
	}
	manifest := "blobs/sha256/" + name.Hex
	if old {
		manifest = name.Hex + ".json"
	} else {
		add(tar.Header{Name: "blobs/", Typeflag: tar.TypeDir}, nil)
		add(tar.Header{Name: "blobs/sha256/1", Typeflag: tar.TypeReg}, []byte(`{"an attestation": 1}`))
	}
	seen := map[string]string{}
	for i, l := range layers {
		z, err := l.Uncompressed()
		if err != nil {
			t.Fatal(err)
		}
		content, err := io.ReadAll(z)
		if err != nil {
			t.Fatal(err)
		}
		id, err := l.DiffID()
		if err != nil {
			t.Fatal(err)
		}
		switch at := fmt.Sprintf("%d/layer.tar", i); {
		case !old:
			add(tar.Header{Name: "blobs/sha256/" + id.Hex, Typeflag: tar.TypeReg}, content)
		case seen[id.Hex] != "":
			add(tar.Header{Name: at, Typeflag: tar.TypeSymlink, Linkname: "../" + seen[id.Hex]}, nil)
		default:
			seen[id.Hex] = at
			add(tar.Header{Name: fmt.Sprintf("%d/VERSION", i), Typeflag: tar.TypeReg}, []byte("1.0"))
			add(tar.Header{Name: fmt.Sprintf("%d/json", i), Typeflag: tar.TypeReg}, []byte("{}"))
			add(tar.Header{Name: at, Typeflag: tar.TypeReg}, content)
		}
	}
	add(tar.Header{Name: manifest, Typeflag: tar.TypeReg}, config)
	add(tar.Header{Name: "manifest.json", Typeflag: tar.TypeReg}, fmt.Appendf(nil, `[{"Config": %q, "RepoTags": null, "Layers": ["whatever"]}]`, manifest))
	add(tar.Header{Name: "repositories", Typeflag: tar.TypeReg}, []byte("{}"))
	w.Close()
	return b.Bytes()
}

// once gives bytes like a pipe: one at a time, never again.
type once struct{ io.Reader }

// TestDockerArchive reads both forms of docker save from a pipe, compressed or
// not.
func TestDockerArchive(t *testing.T) {
	same := layer(t, "f [ x", "f same x")
	img := image(t, layer(t, "d bin", "f bin/app hello", "f gone x"), same, layer(t, "f .wh.gone ", "f bin/app upper"), same)
	gz := func(b []byte) []byte {
		var out bytes.Buffer
		z := gzip.NewWriter(&out)
		z.Write(b)
		z.Close()
		return out.Bytes()
	}
	zs := func(b []byte) []byte {
		z, err := zstd.NewWriter(nil)
		if err != nil {
			t.Fatal(err)
		}
		return z.EncodeAll(b, nil)
	}
	compressLayers := func(name string, b []byte) (string, []byte) {
		if len(b)%512 == 0 && len(b) > 0 { // a tar
			return name, gz(b)
		}
		return name, b
	}
	for name, b := range map[string][]byte{
		"new":                dockerArchive(t, false, img, nil),
		"old":                dockerArchive(t, true, img, nil),
		"gzip":               gz(dockerArchive(t, false, img, nil)),
		"zstd":               zs(dockerArchive(t, true, img, nil)),
		"compressed layers":  dockerArchive(t, false, img, compressLayers),
		"names mean nothing": dockerArchive(t, true, img, func(name string, b []byte) (string, []byte) { return strings.Replace(name, "layer.tar", "other", 1), b }),
	} {
		r, err := DockerArchive(t.Context(), once{bytes.NewReader(b)}, Options{})
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if got := listing(t, r); got != "- [ x\nd bin \n- bin/app upper\n- same x\n" {
			t.Errorf("%s: %s", name, got)
		}
		if r.Image.User != "web" || r.Size != 7 {
			t.Errorf("%s: %+v, %d bytes", name, r.Image, r.Size)
		}
		r.Close()
	}
	change := func(part, with string) func(string, []byte) (string, []byte) {
		return func(name string, b []byte) (string, []byte) {
			if strings.Contains(name, part) {
				return name, bytes.Replace(b, []byte("hello"), []byte(with), 1)
			}
			return name, b
		}
	}
	drop := func(part string) func(string, []byte) (string, []byte) {
		return func(name string, b []byte) (string, []byte) {
			if strings.Contains(name, part) {
				return "", nil
			}
			return name, b
		}
	}
	good := dockerArchive(t, false, img, nil)
	for _, c := range []struct {
		name   string
		b      []byte
		reason string
	}{
		{"damaged layer", dockerArchive(t, true, img, change("0/layer.tar", "jello")), "layer 1 of 4, sha256:"},
		{"damaged configuration", dockerArchive(t, true, img, func(name string, b []byte) (string, []byte) {
			return name, bytes.Replace(b, []byte("/bin/app"), []byte("/bin/bad"), 1)
		}), "is damaged"},
		{"missing layer", dockerArchive(t, true, img, drop("layer.tar")), "is not in it"},
		{"missing configuration", dockerArchive(t, false, img, func(name string, b []byte) (string, []byte) {
			if bytes.Contains(b, []byte("rootfs")) {
				return "", nil
			}
			return name, b
		}), "configuration blobs/sha256/"},
		{"no manifest", dockerArchive(t, false, img, drop("manifest.json")), "no manifest.json: make it with docker save"},
		{"several images", dockerArchive(t, false, img, func(name string, b []byte) (string, []byte) {
			if name == "manifest.json" {
				b = []byte(`[{"Config":"a"},{"Config":"b"}]`)
			}
			return name, b
		}), "it holds 2 images: docker save one alone"},
		{"cut off", good[:len(good)/2], ""},
		{"not an archive", []byte("hello"), ""},
		{"empty", nil, "no manifest.json"},
	} {
		if _, err := DockerArchive(t.Context(), bytes.NewReader(c.b), Options{}); err == nil || !strings.Contains(err.Error(), c.reason) {
			t.Errorf("%s: %v, want an error with %q", c.name, err, c.reason)
		}
	}
	if _, err := DockerArchive(t.Context(), bytes.NewReader(good), Options{MaxSize: 5}); !errors.Is(err, seal.ErrTooLarge) {
		t.Errorf("more than MaxSize: %v", err)
	}
}

// FuzzArchive: any archive is refused or gives what can be written.
func FuzzArchive(f *testing.F) {
	small, err := mutate.AppendLayers(empty.Image)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(dockerArchive(f, false, small, nil))
	f.Add(dockerArchive(f, true, small, nil))
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := DockerArchive(t.Context(), bytes.NewReader(b), Options{MaxSize: 1 << 20})
		if err != nil {
			return
		}
		defer r.Close()
		w, err := seal.NewWriter(io.Discard, &r.Image, seal.Gzip, 0)
		if err != nil {
			return // the description is checked when it is written
		}
		if err := r.Write(t.Context(), w); err != nil {
			t.Fatal(err)
		}
	})
}

// TestNothingLeft: the temporary file has no name, so nothing stays after a
// kill either.
func TestNothingLeft(t *testing.T) {
	t.Setenv("TMPDIR", t.TempDir())
	r, err := flatten(t.Context(), image(t, layer(t, "f a x")), "test", Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if left, _ := os.ReadDir(os.TempDir()); len(left) > 0 {
		t.Errorf("left in the temporary folder while in use: %v", left)
	}
}

// FuzzLayer lays any layer over a small one: what can be flattened can be
// written, so nothing of it breaks a rule of the format.
func FuzzLayer(f *testing.F) {
	for _, lines := range [][]string{
		{"d a", "f a/b x", "l c a", "h d a/b"}, {"f c/x y", "f .wh.a ", "f a/.wh..wh..opq "}, {"l a a", "f a/a x"}, {"h x ../usr/lib/a"},
	} {
		f.Add(layerBytes(f, lines...))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		l, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(b)), nil })
		if err != nil {
			return
		}
		r := &Rootfs{opt: Options{MaxSize: 1 << 20}, top: newDir(0, 0), Image: seal.Image{Version: 1, OS: "linux", Architecture: "amd64"}}
		if r.spool, err = newSpool(); err != nil {
			t.Fatal(err)
		}
		defer r.Close()
		for i, l := range []v1.Layer{layer(t, "d usr", "d usr/lib", "f usr/lib/a x", "l lib usr/lib"), l} {
			if r.layer(t.Context(), l, i+1) != nil {
				return
			}
		}
		w, err := seal.NewWriter(io.Discard, &r.Image, seal.Gzip, 0)
		if err != nil {
			t.Fatal(err)
		}
		if err := r.Write(t.Context(), w); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Seal(nil); err != nil {
			t.Fatal(err)
		}
	})
}
