package registry

import (
	"bytes"
	"context"
	"testing"

	"github.com/go-jose/go-jose/v4"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	dockerspec "github.com/moby/docker-image-spec/specs-go/v1"
)

// FuzzLoad reads archives of strangers. Whatever is in them, images that come of it can be shown.
func FuzzLoad(f *testing.F) {
	r, err := Open(context.Background(), Config{Folder: f.TempDir(), MaxLayer: 1 << 20, MaxImages: 10})
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { r.Close() })
	s := images(f, r, "fuzz")
	f.Add(archive(f, map[string]v1.Image{"a:1": newImage(f, "linux/amd64", "x")}))
	f.Add(tarOf(f, map[string]string{"manifest.json": `[{"Config":"c","Layers":["l"],"RepoTags":["x:1"]}]`, "c": `{"rootfs":{"diff_ids":[]}}`}))
	f.Add(tarOf(f, map[string]string{"index.json": `{"manifests":[{"digest":"sha256:00"}]}`}))
	f.Fuzz(func(t *testing.T, data []byte) {
		found, err := s.Load(t.Context(), bytes.NewReader(data))
		if err != nil {
			return
		}
		for _, l := range found {
			i, err := s.Inspect(t.Context(), l.ID.String())
			if err != nil {
				t.Errorf("%s was loaded, but %v", l.ID, err)
				continue
			}
			if _, err := s.Size(t.Context(), i); err != nil {
				t.Error(err)
			}
		}
	})
}

func FuzzManifest(f *testing.F) {
	f.Add([]byte(`{"schemaVersion":2,"config":{"digest":"sha256:0000000000000000000000000000000000000000000000000000000000000000","size":1},"layers":[]}`))
	f.Add([]byte(`{"manifests":[]}`))
	f.Add([]byte(both))
	f.Fuzz(func(t *testing.T, data []byte) {
		m, err := parseManifest("", data)
		if err != nil {
			return
		}
		if m.isIndex() && (m.Layers != nil || m.Config.Digest != "") {
			t.Error("it is both an index and a manifest")
		}
		for _, l := range m.Layers {
			if short(l.Digest) == "" {
				t.Error("a layer without a digest")
			}
		}
	})
}

func FuzzToken(f *testing.F) {
	r, err := Open(context.Background(), Config{Folder: f.TempDir(), WorkloadKeys: func(context.Context) (*jose.JSONWebKeySet, error) { return &jose.JSONWebKeySet{}, nil }})
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { r.Close() })
	good, err := r.Token(Grant{Namespace: "a"}, 1<<40)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add("a.b.c")
	f.Fuzz(func(t *testing.T, s string) {
		if g, err := r.grantOf(s, loginAudience); err == nil && (s != good || g.Namespace != "a") {
			t.Errorf("%q is taken for %+v", s, g)
		}
		if g, err := r.workloadGrant(t.Context(), s); err == nil {
			t.Errorf("%q is taken for a workload of %+v", s, g)
		}
	})
}

func FuzzChange(f *testing.F) {
	for _, s := range []string{`CMD ["a"]`, `ENV A="b c" D=e`, "EXPOSE 80-90/udp", `LABEL a=\`} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		var c dockerspec.DockerOCIImageConfig
		_ = Change(&c, []string{s})
	})
}

func FuzzFact(f *testing.F) {
	f.Add("sha256:0000000000000000000000000000000000000000000000000000000000000000 5\n")
	f.Fuzz(func(t *testing.T, s string) {
		if x, ok := parseFact(s); ok && (x.size < 0 || x.diffID.Encoded() == "") {
			t.Errorf("%q is %+v", s, x)
		}
	})
}
