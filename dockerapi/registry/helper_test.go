package registry

import (
	"archive/tar"
	"bytes"
	"context"
	"io"
	"log"
	"log/slog"
	"maps"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/distribution/reference"
	"github.com/google/go-containerregistry/pkg/name"
	upstreamregistry "github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// open opens a registry in a folder of the test's.
func open(t testing.TB, change ...func(*Config)) *Registry {
	t.Helper()
	c := Config{Log: slog.New(slog.NewTextHandler(t.Output(), nil)), retryDelay: time.Millisecond}
	for _, f := range change {
		f(&c)
	}
	if c.Folder == "" && c.S3 == nil { // not before: a test that is killed leaves it
		c.Folder = t.TempDir()
	}
	r, err := Open(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := r.Close(); err != nil {
			t.Error(err)
		}
	})
	return r
}

func insecure(hosts ...string) func(*Config) { return func(c *Config) { c.Insecure = hosts } }

func images(t testing.TB, r *Registry, namespace string) *Images {
	t.Helper()
	s, err := r.Images(namespace)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// newUpstream starts another registry; wrap may break it.
func startUpstream(t testing.TB, wrap func(http.Handler) http.Handler) string {
	t.Helper()
	h := upstreamregistry.New(upstreamregistry.Logger(log.New(io.Discard, "", 0)))
	if wrap != nil {
		h = wrap(h)
	}
	s := httptest.NewServer(h)
	t.Cleanup(s.Close)
	return strings.TrimPrefix(s.URL, "http://")
}

// tarOf is a tar with files of these contents.
func tarOf(t testing.TB, files map[string]string) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, n := range slices.Sorted(maps.Keys(files)) {
		if err := w.WriteHeader(&tar.Header{Name: n, Mode: 0o644, Size: int64(len(files[n])), Typeflag: tar.TypeReg}); err != nil {
			t.Fatal(err)
		}
		io.WriteString(w, files[n])
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// newImage is an image with a layer for each text.
func newImage(t testing.TB, platform string, texts ...string) v1.Image {
	t.Helper()
	img := v1.Image(empty.Image)
	for _, text := range texts {
		data := tarOf(t, map[string]string{"text": text})
		layer, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(data)), nil })
		if err != nil {
			t.Fatal(err)
		}
		if img, err = mutate.Append(img, mutate.Addendum{Layer: layer, History: v1.History{CreatedBy: "COPY " + text[:min(20, len(text))], Created: v1.Time{Time: time.Unix(1700000000, 0)}}}); err != nil {
			t.Fatal(err)
		}
	}
	c, err := img.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	c = c.DeepCopy()
	c.OS, c.Architecture, _ = strings.Cut(platform, "/")
	c.Created = v1.Time{Time: time.Unix(1700000000+int64(len(texts[0])), 0).UTC()}
	c.Config = v1.Config{Cmd: []string{"cat", "/text"}, Labels: map[string]string{"first": texts[0][:min(20, len(texts[0]))]}, Env: []string{"PATH=/bin"}}
	if img, err = mutate.ConfigFile(img, c); err != nil {
		t.Fatal(err)
	}
	return img
}

func put(t testing.TB, ref string, img remote.Taggable) {
	t.Helper()
	n, err := name.ParseReference(ref, name.Insecure)
	if err != nil {
		t.Fatal(err)
	}
	switch i := img.(type) {
	case v1.Image:
		err = remote.Write(n, i)
	case v1.ImageIndex:
		err = remote.WriteIndex(n, i)
	}
	if err != nil {
		t.Fatal(err)
	}
}

func parse(t testing.TB, s string) reference.NamedTagged {
	t.Helper()
	n, err := ParseName(s)
	if err != nil {
		t.Fatal(err)
	}
	tagged, ok := n.(reference.NamedTagged)
	if !ok {
		t.Fatalf("%s has no tag", s)
	}
	return tagged
}

// pull pulls and returns what was told.
func pull(t testing.TB, s *Images, ref string) []string {
	t.Helper()
	n, err := ParseName(ref)
	if err != nil {
		t.Fatal(err)
	}
	lines, err := transferLines(func(tr Transfer) error { return s.Pull(t.Context(), n, tr) })
	if err != nil {
		t.Fatal(err)
	}
	return lines
}

// transferLines collects the states of a transfer, each once.
func transferLines(f func(Transfer) error) ([]string, error) {
	var lines []string
	last := map[string]string{}
	err := f(Transfer{Progress: func(p Progress) {
		if last[p.ID] != p.Status {
			lines = append(lines, strings.TrimPrefix(p.ID+": "+p.Status, ": "))
		}
		last[p.ID] = p.Status
	}})
	return lines, err
}

func load(t testing.TB, s *Images, ref string, img v1.Image) *Image {
	t.Helper()
	found, err := s.Load(t.Context(), bytes.NewReader(archive(t, map[string]v1.Image{ref: img})))
	if err != nil {
		t.Fatal(err)
	}
	i, err := s.Inspect(t.Context(), found[0].ID.String())
	if err != nil {
		t.Fatal(err)
	}
	return i
}

// archive is one of docker save's.
func archive(t testing.TB, all map[string]v1.Image) []byte {
	t.Helper()
	refs := map[name.Reference]v1.Image{}
	for ref, img := range all {
		var n name.Reference
		n, err := name.NewTag(ref)
		if ref == "" {
			n, err = name.NewDigest("x@sha256:" + strings.Repeat("0", 64))
		}
		if err != nil {
			t.Fatal(err)
		}
		refs[n] = img
	}
	var b bytes.Buffer
	if err := tarball.MultiRefWrite(refs, &b); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// list is what there is: names and ids.
func list(t testing.TB, s *Images) string {
	t.Helper()
	all, err := s.List(context.WithoutCancel(t.Context()))
	if err != nil {
		t.Fatal(err)
	}
	var lines []string
	for _, i := range all {
		var names []string
		for _, n := range i.names() {
			names = append(names, reference.FamiliarString(n))
		}
		lines = append(lines, short(i.ID)+" "+strings.Join(names, " "))
	}
	slices.Sort(lines)
	return strings.Join(lines, "\n")
}

func id(t testing.TB, img v1.Image) string {
	t.Helper()
	d, err := img.ConfigName()
	if err != nil {
		t.Fatal(err)
	}
	return d.String()
}

// rootfs is a configuration's with these layers.
func rootfs(layers ...[]byte) ocispec.Image {
	i := ocispec.Image{Platform: ocispec.Platform{OS: "linux", Architecture: "amd64"}, RootFS: ocispec.RootFS{Type: "layers"}}
	for _, l := range layers {
		i.RootFS.DiffIDs = append(i.RootFS.DiffIDs, digest.FromBytes(l))
	}
	return i
}

func desc(content string) ocispec.Descriptor {
	return ocispec.Descriptor{Digest: digest.FromString(content)}
}
