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
