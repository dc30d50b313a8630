package registry

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	storagedriver "github.com/distribution/distribution/v3/registry/storage/driver"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	dockerspec "github.com/moby/docker-image-spec/specs-go/v1"
	"github.com/opencontainers/go-digest"
)

func TestLoadAndSave(t *testing.T) {
	r := open(t)
	one, two := newImage(t, "linux/amd64", "base", "one"), newImage(t, "linux/amd64", "base", "two")
	data := archive(t, map[string]v1.Image{"one:1": one, "example.org/two:2": two, "one:latest": one})
	var packed bytes.Buffer
	z := gzip.NewWriter(&packed)
	z.Write(data)
	z.Close()
	for name, data := range map[string][]byte{"plain": data, "gzip": packed.Bytes()} {
		t.Run(name, func(t *testing.T) {
			s := images(t, r, name)
			found, err := s.Load(t.Context(), bytes.NewReader(data))
			if err != nil || len(found) != 3 {
				t.Fatalf("%v, %v", found, err)
			}
			want := []string{id(t, one)[7:19] + " one:1 one:latest", id(t, two)[7:19] + " example.org/two:2"}
			if got := list(t, s); got != strings.Join(sorted(want), "\n") {
				t.Errorf("got\n%s\nwant\n%s", got, want)
			}
			for _, refs := range [][]string{{"one:1", "example.org/two:2"}, {"one"}, {id(t, one), id(t, two)[7:20]}, {"one:1", "one:1"}} {
				file := filepath.Join(t.TempDir(), "saved.tar")
				f, err := os.Create(file)
				if err != nil {
					t.Fatal(err)
				}
				if err := errors.Join(s.Save(t.Context(), f, refs), f.Close()); err != nil {
					t.Fatal(err)
				}
				m, err := tarball.LoadManifest(func() (io.ReadCloser, error) { return os.Open(file) })
				if err != nil {
					t.Fatal(err)
				}
				tags := ""
				for _, d := range m {
					tags += strings.Join(sorted(d.RepoTags), ",") + ";"
				}
				want := map[string]string{"one:1,example.org/two:2": "example.org/two:2;one:1;", "one": "one:1,one:latest;", "one:1,one:1": "one:1;"}[strings.Join(refs, ",")]
				if want == "" {
					want = ";;"
				}
				if tags != want {
					t.Errorf("saved %q has tags %q, want %q", refs, tags, want)
				}
				// It is what was loaded, and can be again.
				again := images(t, r, "again-"+name)
				f, err = os.Open(file)
				if err != nil {
					t.Fatal(err)
				}
				back, err := again.Load(t.Context(), f)
				f.Close()
				if err != nil || back[0].ID.String() != id(t, one) && back[0].ID.String() != id(t, two) {
					t.Errorf("loaded again: %v, %v", back, err)
				}
			}
			if err := s.Save(t.Context(), io.Discard, []string{"none:1"}); !errors.Is(err, ErrNotFound) {
				t.Errorf("saved what is not there: %v", err)
			}
		})
	}
}

func sorted(s []string) []string {
	s = append([]string(nil), s...)
	for i := range s {
		for j := i; j > 0 && s[j] < s[j-1]; j-- {
			s[j], s[j-1] = s[j-1], s[j]
		}
	}
	return s
}

func TestLoadLayout(t *testing.T) {
	amd, arm := newImage(t, "linux/amd64", "amd"), newImage(t, "linux/arm64", "arm")
	dir := t.TempDir()
	p, err := layout.Write(dir, empty.Index)
	if err != nil {
		t.Fatal(err)
	}
	if err := p.AppendIndex(index(map[string]v1.Image{"linux/amd64": amd, "linux/arm64": arm}), layout.WithAnnotations(map[string]string{"io.containerd.image.name": "docker.io/library/multi:1"})); err != nil {
		t.Fatal(err)
	}
	if err := p.AppendImage(newImage(t, "linux/amd64", "nameless"), layout.WithAnnotations(map[string]string{"org.opencontainers.image.ref.name": "latest"})); err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	if err := w.AddFS(os.DirFS(dir)); err != nil {
		t.Fatal(err)
	}
	w.Close()
	s := images(t, open(t), "a")
	found, err := s.Load(t.Context(), &b)
	if err != nil || len(found) != 2 {
		t.Fatalf("%v, %v", found, err)
	}
	if found[0].Name == nil || found[0].Name.String() != "docker.io/library/multi:1" || found[0].ID.String() != id(t, amd) {
		t.Errorf("%+v", found[0])
	}
	if found[1].Name != nil {
		t.Errorf("%+v", found[1])
	}
}

// earlier is an archive of docker save before version 25: equal layers are links.
func earlier(t *testing.T) []byte {
	layer := tarOf(t, map[string]string{"text": "x"})
	config, err := json.Marshal(dockerspec.DockerOCIImage{Image: rootfs(layer, layer)})
	if err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	file := func(name string, data []byte) {
		w.WriteHeader(&tar.Header{Name: name, Typeflag: tar.TypeReg, Size: int64(len(data))})
		w.Write(data)
	}
	file("config.json", config)
	file("a/layer.tar", layer)
	file("a/VERSION", []byte("1.0"))
	w.WriteHeader(&tar.Header{Name: "b/layer.tar", Typeflag: tar.TypeSymlink, Linkname: "../a/layer.tar"})
	file("manifest.json", []byte(`[{"Config":"config.json","RepoTags":["early:1"],"Layers":["a/layer.tar","b/layer.tar"]}]`))
	w.Close()
	return b.Bytes()
}

func TestLoadEarlier(t *testing.T) {
	s := images(t, open(t), "a")
	if _, err := s.Load(t.Context(), bytes.NewReader(earlier(t))); err != nil {
		t.Fatal(err)
	}
	i, err := s.Resolve(t.Context(), "early:1")
	if err != nil || len(i.Layers) != 2 {
		t.Errorf("%+v, %v", i, err)
	}
}

func TestLoadHostile(t *testing.T) {
	r := open(t, func(c *Config) { c.MaxLayer = 1 << 20; c.MaxImages = 3 })
	s := images(t, r, "a")
	layer := tarOf(t, map[string]string{"text": "x"})
	config, _ := json.Marshal(dockerspec.DockerOCIImage{Image: rootfs(layer)})
	var bomb bytes.Buffer
	z := gzip.NewWriter(&bomb)
	z.Write(tarOf(t, map[string]string{"zeros": strings.Repeat("\x00", 64<<20)}))
	z.Close()
	var noTar bytes.Buffer
	z = gzip.NewWriter(&noTar)
	io.WriteString(z, strings.Repeat("this is no tar ", 100))
	z.Close()
	manifest := `[{"Config":"config.json","Layers":["layer.tar"],"RepoTags":["x:1"]}]`
	type file struct {
		name, link string
		kind       byte
		data       []byte
	}
	for _, test := range []struct {
		name  string
		files []file
		want  string
	}{
		{"empty", nil, "neither manifest.json nor index.json"},
		{"path", []file{{name: "../../etc/passwd", data: []byte("{}")}}, "points out of it"},
		{"absolute", []file{{name: "/etc/passwd", data: []byte("{}")}}, "points out of it"},
		{"manifest is no JSON", []file{{name: "manifest.json", data: []byte("{")}}, "manifest.json"},
		{"no config", []file{{name: "manifest.json", data: []byte(manifest)}}, `configuration "config.json" is missing`},
		{"no layer", []file{{name: "manifest.json", data: []byte(manifest)}, {name: "config.json", data: config}}, `layer "layer.tar" is missing`},
		{"link out", []file{{name: "layer.tar", kind: tar.TypeSymlink, link: "../../../etc/passwd"}, {name: "manifest.json", data: []byte(manifest)}, {name: "config.json", data: config}}, `layer "layer.tar" is missing`},
		{"link to itself", []file{{name: "layer.tar", kind: tar.TypeSymlink, link: "layer.tar"}, {name: "manifest.json", data: []byte(manifest)}, {name: "config.json", data: config}}, `layer "layer.tar" is missing`},
		{"device", []file{{name: "layer.tar", kind: tar.TypeBlock}, {name: "manifest.json", data: []byte(manifest)}, {name: "config.json", data: config}}, `layer "layer.tar" is missing`},
		{"another layer", []file{{name: "layer.tar", data: tarOf(t, map[string]string{"text": "y"})}, {name: "manifest.json", data: []byte(manifest)}, {name: "config.json", data: config}}, "but the configuration says"},
		{"bomb", []file{{name: "layer.tar", data: bomb.Bytes()}}, "more than 1048576 bytes when it is unpacked"},
		{"large", []file{{name: "layer.tar", data: tarOf(t, map[string]string{"x": strings.Repeat("x", 2<<20)})}}, "more than 1048576 bytes"},
		{"no tar", []file{{name: "layer.tar", data: noTar.Bytes()}}, "can't be unpacked"},
		{"truncated gzip", []file{{name: "layer.tar", data: bomb.Bytes()[:100]}}, "can't be unpacked"},
		{"many images", []file{{name: "manifest.json", data: []byte("[" + strings.Repeat("{},", 3) + "{}]")}}, "at most 3 are taken"},
		{"many layers", []file{{name: "manifest.json", data: []byte(`[{"Layers":[` + strings.Repeat(`"a",`, 200) + `"a"]}]`)}}, "at most 125 can be stacked"},
		{"bad name", []file{{name: "layer.tar", data: layer}, {name: "manifest.json", data: []byte(strings.Replace(manifest, "x:1", "../X", 1))}, {name: "config.json", data: config}}, "invalid reference format"},
		{"both", []file{{name: "index.json", data: []byte(`{"manifests":[{"digest":"` + digest.FromString(both).String() + `"}]}`)}, {name: "blobs/sha256/" + digest.FromString(both).Encoded(), data: []byte(both)}}, "both an index and a manifest"},
	} {
		t.Run(test.name, func(t *testing.T) {
			var b bytes.Buffer
			w := tar.NewWriter(&b)
			for _, f := range test.files {
				kind := f.kind
				if kind == 0 {
					kind = tar.TypeReg
				}
				w.WriteHeader(&tar.Header{Name: f.name, Linkname: f.link, Typeflag: kind, Size: int64(len(f.data))})
				w.Write(f.data)
			}
			w.Close()
			found, err := s.Load(t.Context(), &b)
			if err == nil || !errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), test.want) {
				t.Errorf("%v, %v; want %s", found, err, test.want)
			}
		})
	}
	if got := list(t, s); got != "" {
		t.Errorf("images:\n%s", got)
	}
	uploads, _ := filepath.Glob(filepath.Join(r.Folder, "images/docker/registry/v2/repositories/*/*/_uploads/*"))
	if len(uploads) > 0 {
		t.Errorf("uploads are left: %q", uploads)
	}
}

const both = `{"schemaVersion":2,"config":{"digest":"sha256:0000000000000000000000000000000000000000000000000000000000000000"},"manifests":[]}`

func TestLoadEndsWithContext(t *testing.T) {
	s := images(t, open(t), "a")
	ctx, cancel := context.WithCancel(t.Context())
	r, w := io.Pipe()
	go func() {
		data := archive(t, map[string]v1.Image{"a:1": newImage(t, "linux/amd64", "x")})
		w.Write(data[:len(data)/2])
		cancel()
		w.Close()
	}()
	if _, err := s.Load(ctx, r); !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
}

func TestRemove(t *testing.T) {
	host := startUpstream(t, nil)
	r := open(t, insecure(host))
	one := newImage(t, "linux/amd64", "base", "one")
	put(t, host+"/app:1", one)
	oneID := id(t, one)[7:19]
	config := digest.Digest(id(t, one))
	running := []Use{{config, "0123456789abcdef", true}}
	stopped := []Use{{config, "0123456789abcdef", false}}
	for _, test := range []struct {
		name  string
		tags  []string // beside host/app:1
		ref   string
		force bool
		uses  []Use
		want  string // lines, or the error
		left  string
	}{
		{"last name", nil, host + "/app:1", false, nil, "untagged HOST/app:1, untagged HOST/app@DIGEST, deleted ID, deleted, deleted", ""},
		{"one of two names", []string{"other:1"}, host + "/app:1", false, nil, "untagged HOST/app:1, untagged HOST/app@DIGEST", "ID other:1"},
		{"one of two tags", []string{host + "/app:2"}, host + "/app:1", false, nil, "untagged HOST/app:1", "ID HOST/app:2 HOST/app@DIGEST"},
		{"id", nil, oneID, false, nil, "untagged HOST/app:1, untagged HOST/app@DIGEST, deleted ID, deleted, deleted", ""},
		{"id of several names", []string{"other:1"}, oneID, false, nil, "conflict: unable to delete SHORT (must be forced) - image is referenced in multiple repositories", "ID HOST/app:1 other:1 HOST/app@DIGEST"},
		{"id of several names, forced", []string{"other:1"}, oneID, true, nil, "untagged HOST/app:1, untagged other:1, untagged HOST/app@DIGEST, deleted ID, deleted, deleted", ""},
		{"of a running container", nil, host + "/app:1", false, running, "conflict: unable to remove repository reference \"HOST/app:1\" (must force) - container 0123456789ab is using its referenced image SHORT", "ID HOST/app:1 HOST/app@DIGEST"},
		{"of a running container, forced", nil, host + "/app:1", true, running, "untagged HOST/app:1, untagged HOST/app@DIGEST", "ID "},
		{"of a running container, by id, forced", nil, oneID, true, running, "conflict: unable to delete SHORT (cannot be forced) - image is being used by running container 0123456789ab", "ID HOST/app:1 HOST/app@DIGEST"},
		{"of a stopped container, by id", nil, oneID, false, stopped, "conflict: unable to delete SHORT (must be forced) - image is being used by stopped container 0123456789ab", "ID HOST/app:1 HOST/app@DIGEST"},
		{"of a stopped container, forced", nil, host + "/app:1", true, stopped, "untagged HOST/app:1, untagged HOST/app@DIGEST", "ID "},
		{"unknown", nil, "none", false, nil, "No such image: none:latest", "ID HOST/app:1 HOST/app@DIGEST"},
		{"digest that is not known", []string{"other:1"}, "other@DIGEST", false, nil, "No such image: other@DIGEST", "ID HOST/app:1 other:1 HOST/app@DIGEST"},
	} {
		t.Run(test.name, func(t *testing.T) {
			s := images(t, r, strings.ReplaceAll(strings.ReplaceAll(test.name, " ", "-"), ",", ""))
			pull(t, s, host+"/app:1")
			i, err := s.Resolve(t.Context(), host+"/app:1")
			if err != nil {
				t.Fatal(err)
			}
			for _, tag := range test.tags {
				if err := s.Tag(t.Context(), i, parse(t, tag)); err != nil {
					t.Fatal(err)
				}
			}
			d, _ := one.Digest()
			short := strings.NewReplacer(host, "HOST", d.String(), "DIGEST", id(t, one), "ID", oneID, "SHORT")
			removed, err := s.Remove(t.Context(), strings.ReplaceAll(test.ref, "DIGEST", d.String()), test.force, test.uses)
			var lines []string
			for _, l := range removed {
				if l.Untagged != "" {
					lines = append(lines, "untagged "+short.Replace(l.Untagged))
				} else if got := short.Replace(l.Deleted); got == "ID" {
					lines = append(lines, "deleted ID")
				} else {
					lines = append(lines, "deleted")
				}
			}
			got := strings.Join(lines, ", ")
			if err != nil {
				got = short.Replace(err.Error())
			}
			if got != test.want {
				t.Errorf("got  %s\nwant %s", got, test.want)
			}
			left := strings.NewReplacer(host, "HOST", d.String(), "DIGEST", oneID, "ID").Replace(list(t, s))
			if left != test.left {
				t.Errorf("left %q, want %q", left, test.left)
			}
		})
	}
}

func TestPrune(t *testing.T) {
	s := images(t, open(t), "a")
	load(t, s, "old:1", newImage(t, "linux/amd64", "base", "first"))
	named := load(t, s, "old:1", newImage(t, "linux/amd64", "base", "second, longer"))
	used := load(t, s, "used:1", newImage(t, "linux/amd64", "base", "third"))
	if got := strings.Count(list(t, s), "\n"); got != 2 {
		t.Fatalf("images:\n%s", list(t, s))
	}
	p, err := s.Prune(t.Context(), PruneFilter{}, nil)
	if want := int64(len("first")); err != nil || p.Space != want || len(p.Removed) != 2 {
		t.Errorf("%+v, %v", p, err)
	}
	p, err = s.Prune(t.Context(), PruneFilter{All: true, Until: time.Unix(1, 0)}, nil)
	if err != nil || len(p.Removed) != 0 {
		t.Errorf("%+v, %v", p, err)
	}
	if p, err = s.Prune(t.Context(), PruneFilter{All: true}, []Use{{used.ID, "c", false}}); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Resolve(t.Context(), named.ID.String()); !errors.Is(err, ErrNotFound) {
		t.Errorf("it was not removed: %v", err)
	}
	if _, err := s.Resolve(t.Context(), "used:1"); err != nil {
		t.Error(err)
	}
}

func TestResolve(t *testing.T) {
	s := images(t, open(t), "a")
	i := load(t, s, "docker.io/library/busybox:latest", newImage(t, "linux/amd64", "x"))
	load(t, s, "cafe:latest", newImage(t, "linux/amd64", "y"))
	for _, ref := range []string{"busybox", "busybox:latest", "library/busybox", "docker.io/busybox", i.ID.String(), i.ID.Encoded(), i.ID.Encoded()[:7], "sha256:" + i.ID.Encoded()[:7]} {
		if got, err := s.Resolve(t.Context(), ref); err != nil || got.ID != i.ID {
			t.Errorf("%s: %v", ref, err)
		}
	}
	if got, err := s.Resolve(t.Context(), "cafe"); err != nil || got.ID == i.ID {
		t.Errorf("a name that could be the beginning of an id: %v", err)
	}
	for ref, want := range map[string]string{
		"none": "No such image: none:latest", "sha256:" + strings.Repeat("0", 64): "No such image", "UPPER": "invalid reference format",
		"": "invalid reference format", "busybox@sha256:" + strings.Repeat("0", 64): "No such image", strings.Repeat("a/", 3000): "invalid reference format",
	} {
		if _, err := s.Resolve(t.Context(), ref); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%.50s: %v, want %s", ref, err, want)
		}
	}
	// Another namespace has none of it.
	if _, err := images(t, s.Registry, "b").Resolve(t.Context(), i.ID.String()); !errors.Is(err, ErrNotFound) {
		t.Errorf("another namespace: %v", err)
	}
}

func TestCommitAndImport(t *testing.T) {
	s := images(t, open(t), "a")
	parent := load(t, s, "base:1", newImage(t, "linux/amd64", "base"))
	config := parent.Config.Config
	if err := Change(&config, []string{`CMD ["run","it"]`, "ENV A=1 B='2 3'", "ENV PATH=/usr/bin", `LABEL x="y z"`, "EXPOSE 80 53/udp", "VOLUME /data", "USER 1:2", "WORKDIR /w", "ENTRYPOINT exec x", "STOPSIGNAL SIGINT", "ONBUILD RUN x"}); err != nil {
		t.Fatal(err)
	}
	d, err := s.Commit(t.Context(), parent, bytes.NewReader(tarOf(t, map[string]string{"new": "file"})), Commit{Author: "me", Comment: "why", CreatedBy: "sh", Config: config}, parse(t, "made:1"))
	if err != nil {
		t.Fatal(err)
	}
	i, err := s.Inspect(t.Context(), "made:1")
	if err != nil || i.ID != d || len(i.Layers) != 2 {
		t.Fatalf("%+v, %v", i, err)
	}
	c, _ := json.Marshal(i.Config.Config)
	want := `{"User":"1:2","ExposedPorts":{"53/udp":{},"80/tcp":{}},"Env":["A=1","B=2 3","PATH=/usr/bin"],"Entrypoint":["/bin/sh","-c","exec x"],"Cmd":["run","it"],"Volumes":{"/data":{}},"WorkingDir":"/w","Labels":{"first":"base","x":"y z"},"StopSignal":"SIGINT","OnBuild":["RUN x"]}`
	if string(c) != want {
		t.Errorf("got  %s\nwant %s", c, want)
	}
	// Where nothing has changed there is a step, and no layer.
	unchanged, err := s.Commit(t.Context(), i, bytes.NewReader(tarOf(t, nil)), Commit{CreatedBy: "sh", Config: config}, nil)
	if err != nil {
		t.Fatal(err)
	}
	if same, err := s.Inspect(t.Context(), unchanged.String()); err != nil || len(same.Layers) != 2 || !same.Config.History[2].EmptyLayer || len(same.Config.RootFS.DiffIDs) != 2 {
		t.Errorf("%+v, %v", same, err)
	}
	h, err := s.History(t.Context(), i)
	if err != nil || len(h) != 2 || h[0].CreatedBy != "sh" || h[0].Comment != "why" || h[0].ID != d.String() || h[1].ID != "<missing>" || h[1].Size == 0 {
		t.Errorf("%+v, %v", h, err)
	}
	if parent, err = s.Inspect(t.Context(), "base:1"); err != nil || parent.Config.Config.User != "" {
		t.Errorf("the parent has changed: %+v, %v", parent.Config.Config, err)
	}
	for change, want := range map[string]string{"FROM x": "FROM is not a valid change command", "ENV": "ENV requires an argument", "EXPOSE x": "invalid containerPort: x", "EXPOSE 1/x": "invalid proto: x", "ENV a": "write KEY=VALUE", `LABEL a="b`: "a quote is not closed", "1": "no instruction"} {
		if err := Change(&config, []string{change}); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", change, err)
		}
	}
	if _, err = s.Import(t.Context(), bytes.NewReader(tarOf(t, map[string]string{"new": "file"})), "", Commit{Comment: "Imported from -"}, nil); err != nil {
		t.Fatal(err)
	}
}

// A tenant's blob is nobody else's, also where the other knows its digest and the server has it.
func TestForeignBlobs(t *testing.T) {
	host := startUpstream(t, nil)
	r := open(t, insecure(host))
	a, b := images(t, r, "a"), images(t, r, "b")
	secret := load(t, a, "secret:1", newImage(t, "linux/amd64", "the secret of a"))
	if err := b.link(t.Context(), "b/none", "b/docker.io/library/x", secret.Layers[0].Digest); err == nil {
		t.Error("linked a blob of another namespace")
	}
	// b's copy is fetched from where b has it, not taken from a's.
	var blobs int
	put(t, host+"/secret:1", newImage(t, "linux/amd64", "the secret of a"))
	told := strings.Join(pull(t, b, host+"/secret:1"), "\n")
	if blobs = strings.Count(told, "Downloading"); blobs == 0 {
		t.Errorf("nothing was downloaded:\n%s", told)
	}
}

func TestCollect(t *testing.T) {
	r := open(t)
	s := images(t, r, "a")
	kept := load(t, s, "kept:1", newImage(t, "linux/amd64", "base", "kept"))
	load(t, s, "gone:1", newImage(t, "linux/amd64", "base", "gone"))
	if _, err := s.Remove(t.Context(), "gone:1", false, nil); err != nil {
		t.Fatal(err)
	}
	c, err := r.Collect(t.Context())
	if err != nil || c.Blobs != 0 || c.Links != 0 {
		t.Errorf("what is young was collected: %+v, %v", c, err)
	}
	killed := filepath.Join(r.Folder, "images/docker/registry/v2/repositories/a/docker.io/library/kept/_manifests/tags/1/current/link.01234567-89ab-cdef-0123-456789abcdef.tmp")
	if err := os.WriteFile(killed, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	age(t, r.Folder, 25*time.Hour)
	// An upload that is under way, and a layer whose manifest is still to come, are young.
	opened, _ := r.open(t.Context(), "a/docker.io/library/pushing")
	upload, err := opened.Blobs(t.Context()).Create(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	upload.Write([]byte("the first half"))
	layer, err := s.putLayer(t.Context(), "a/docker.io/library/pushing", bytes.NewReader(tarOf(t, map[string]string{"young": "layer"})))
	if err != nil {
		t.Fatal(err)
	}
	before := blobs(t, r.Folder)
	if c, err = r.Collect(t.Context()); err != nil {
		t.Fatal(err)
	}
	// gone's own layer, configuration and manifest.
	if c.Blobs != 3 || blobs(t, r.Folder) != before-3 {
		t.Errorf("%+v; %d blobs before, %d after", c, before, blobs(t, r.Folder))
	}
	if _, err := os.Stat(killed); !os.IsNotExist(err) {
		t.Errorf("what a killed process has left: %v", err)
	}
	upload.Write([]byte("the second half"))
	if _, err := upload.Commit(t.Context(), desc("the first halfthe second half")); err != nil {
		t.Errorf("an upload that was under way: %v", err)
	}
	if ok, err := r.has(t.Context(), "a/docker.io/library/pushing", layer.Digest); err != nil || !ok {
		t.Errorf("a layer whose manifest was to come: %v, %v", ok, err)
	}
	if err := s.Save(t.Context(), io.Discard, []string{"kept:1"}); err != nil {
		t.Error(err)
	}
	if size, err := s.Size(t.Context(), kept); err != nil || size == 0 {
		t.Error(err)
	}
	if c, err := open(t).Collect(t.Context()); err != nil || c != (Collection{}) {
		t.Errorf("an empty registry: %+v, %v", c, err)
	}
}

// What is pushed while garbage is collected waits for it: else it would take a blob for there that is about to go.
func TestCollectBesidePush(t *testing.T) {
	r := open(t)
	s := images(t, r, "a")
	img := newImage(t, "linux/amd64", "base", "top")
	load(t, s, "app:1", img)
	if _, err := s.Remove(t.Context(), "app:1", false, nil); err != nil {
		t.Fatal(err)
	}
	age(t, r.Folder, 48*time.Hour)
	pushed := make(chan error, 1)
	r.driver = &hookedDriver{r.driver, func() {
		go func() {
			_, err := s.Load(context.WithoutCancel(t.Context()), bytes.NewReader(archive(t, map[string]v1.Image{"app:1": img})))
			pushed <- err
		}()
		select { // time enough to do harm
		case err := <-pushed:
			t.Error("it has not waited")
			pushed <- err
		case <-time.After(200 * time.Millisecond):
		}
	}}
	c, err := r.Collect(t.Context())
	if err != nil || c.Blobs != 4 {
		t.Errorf("%+v, %v", c, err)
	}
	if err := <-pushed; err != nil {
		t.Fatal(err)
	}
	if err := s.Save(t.Context(), io.Discard, []string{"app:1"}); err != nil {
		t.Error(err)
	}
}

// A hookedDriver calls a function when it is known which blobs there are.
type hookedDriver struct {
	storagedriver.StorageDriver
	walked func()
}

func (d *hookedDriver) Walk(ctx context.Context, path string, f storagedriver.WalkFn, options ...func(*storagedriver.WalkOptions)) error {
	err := d.StorageDriver.Walk(ctx, path, f, options...)
	if path == blobsPath {
		d.walked()
	}
	return err
}

// age makes files old.
func age(t testing.TB, folder string, by time.Duration) {
	t.Helper()
	old := time.Now().Add(-by)
	_ = filepath.WalkDir(folder, func(p string, _ os.DirEntry, err error) error {
		if err == nil {
			_ = os.Chtimes(p, old, old) // what is gone by now is old enough
		}
		return nil
	})
}

func blobs(t testing.TB, folder string) int {
	t.Helper()
	all, err := filepath.Glob(filepath.Join(folder, "images/docker/registry/v2/blobs/sha256/*/*/data"))
	if err != nil {
		t.Fatal(err)
	}
	return len(all)
}

// Two servers of one folder show the same, at once.
func TestStateless(t *testing.T) {
	folder := t.TempDir()
	one := images(t, open(t, func(c *Config) { c.Folder = folder }), "a")
	two := images(t, open(t, func(c *Config) { c.Folder = folder }), "a")
	i := load(t, one, "x:1", newImage(t, "linux/amd64", "x"))
	if got, err := two.Inspect(t.Context(), "x:1"); err != nil || got.ID != i.ID || got.Tagged.IsZero() {
		t.Errorf("%+v, %v", got, err)
	}
	if !bytes.Equal(one.Key, two.Key) {
		t.Error("they have different keys")
	}
	if _, err := two.Remove(t.Context(), "x:1", false, nil); err != nil {
		t.Fatal(err)
	}
	if got := list(t, one); got != "" {
		t.Errorf("the first still has %s", got)
	}
}

func TestUsage(t *testing.T) {
	s := images(t, open(t), "a")
	load(t, s, "a:1", newImage(t, "linux/amd64", "base", "a"))
	load(t, s, "b:1", newImage(t, "linux/amd64", "base", "b"))
	all, err := s.List(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	u, err := s.Usage(t.Context(), all)
	if err != nil || u.Layers != int64(len("base"+"a"+"b")) || u.Shared[all[0].ID] != int64(len("base")) {
		t.Errorf("%+v, %v", u, err)
	}
}

func BenchmarkList(b *testing.B) {
	s := images(b, open(b), "a")
	for n := range 300 {
		img, err := mutate.CreatedAt(newImage(b, "linux/amd64", "base", "two"), v1.Time{Time: time.Unix(int64(n), 0)})
		if err != nil {
			b.Fatal(err)
		}
		if _, err := s.Load(b.Context(), bytes.NewReader(archive(b, map[string]v1.Image{fmt.Sprintf("image%d:1", n): img}))); err != nil {
			b.Fatal(err)
		}
	}
	b.Run("list", func(b *testing.B) {
		for b.Loop() {
			if all, err := s.List(b.Context()); err != nil || len(all) != 300 {
				b.Fatal(len(all), err)
			}
		}
	})
	b.Run("resolve", func(b *testing.B) {
		for b.Loop() {
			if _, err := s.Resolve(b.Context(), "image7:1"); err != nil {
				b.Fatal(err)
			}
		}
	})
}
