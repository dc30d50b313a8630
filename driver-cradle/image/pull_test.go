package image

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"reflect"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// A requestLog records what a registry is asked.
type requestLog struct {
	mu    sync.Mutex
	lines []string
}

func (l *requestLog) wrap(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
		l.mu.Lock()
		l.lines = append(l.lines, q.Method+" "+q.URL.Path)
		l.mu.Unlock()
		h.ServeHTTP(w, q)
	})
}

// take returns what was asked since the last take.
func (l *requestLog) take() []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	lines := l.lines
	l.lines = nil
	return lines
}

func count(lines []string, part string) int {
	n := 0
	for _, l := range lines {
		if strings.Contains(l, part) {
			n++
		}
	}
	return n
}

// fullConfig sets every field that docker keeps and go-containerregistry knows.
var fullConfig = v1.Config{
	User: "www:www", Env: []string{"A=1"}, Entrypoint: []string{"/e"}, Cmd: []string{"c"}, WorkingDir: "/w",
	Labels: map[string]string{"l": "v"}, StopSignal: "SIGQUIT", Shell: []string{"/bin/ash", "-c"}, OnBuild: []string{"RUN x"},
	Volumes: map[string]struct{}{"/v": {}}, ExposedPorts: map[string]struct{}{"80/tcp": {}},
	Healthcheck: &v1.HealthConfig{Test: []string{"CMD", "true"}, Interval: time.Second, Retries: 3},
}

func TestPullRegistry(t *testing.T) {
	var log requestLog
	r := startRegistry(t, log.wrap)
	base := tarLayer(t, makeTar(t, dir("etc"), reg("etc/motd", "hello\n")))
	img := makeImage(t, fullConfig, base, tarLayer(t, makeTar(t, reg("etc/.wh.motd", ""))), base)
	ref := r.push(t, "team/app:1", img)
	s := openStore(t)

	log.take()
	var phases []Phase
	got := pull(t, s, ref, PullOptions{Progress: func(p Progress) { phases = append(phases, p.Phase) }})
	digest, _ := img.Digest()
	id, _ := img.ConfigName()
	raw, _ := img.RawConfigFile()
	if got.Reference != ref || got.Digest != digest.String() || got.ID != id.String() || !bytes.Equal(got.RawConfig, raw) {
		t.Errorf("got %+v", got)
	}
	if !got.Created.Equal(time.Unix(1700000000, 0)) || got.Platform != "linux/"+runtime.GOARCH {
		t.Errorf("created %v for %s", got.Created, got.Platform)
	}
	c := got.Config.Config
	if c.User != "www:www" || c.StopSignal != "SIGQUIT" || c.Healthcheck.Retries != 3 || c.Healthcheck.Test[0] != "CMD" ||
		!slices.Equal(c.Shell, fullConfig.Shell) || !slices.Equal(c.OnBuild, fullConfig.OnBuild) ||
		!reflect.DeepEqual(c.Volumes, fullConfig.Volumes) || !reflect.DeepEqual(c.ExposedPorts, fullConfig.ExposedPorts) ||
		!slices.Equal(c.Entrypoint, fullConfig.Entrypoint) || c.WorkingDir != "/w" || c.Labels["l"] != "v" {
		t.Errorf("configuration %+v", c)
	}
	if len(got.Layers) != 3 || got.Layers[0] != got.Layers[2] || got.Layers[0].DiffID == got.Layers[1].DiffID {
		t.Errorf("layers %v", got.Layers)
	}
	var size int64
	for _, l := range got.Layers {
		fi, err := os.Stat(l.Path)
		if err != nil {
			t.Fatal(err)
		}
		if fi.Size() != l.Size || fi.Mode() != 0o444 {
			t.Errorf("%s: %d bytes, mode %v", l.Path, fi.Size(), fi.Mode())
		}
		size += l.Size
	}
	if got.Size != size {
		t.Errorf("size %d, want %d", got.Size, size)
	}
	if n := count(log.take(), "/blobs/"); n != 3 { // configuration and two layers
		t.Errorf("%d blobs fetched, want 3", n)
	}
	for _, want := range []Phase{Downloading, Converting, Ready} {
		if !slices.Contains(phases, want) {
			t.Errorf("no progress %q among %q", want, phases)
		}
	}
	assertClean(t, s)

	again := pull(t, s, ref, PullOptions{})
	if lines := log.take(); len(lines) != 0 {
		t.Errorf("a cached tag asked the registry: %q", lines)
	}
	if again.ID != got.ID || !slices.Equal(again.Layers, got.Layers) {
		t.Errorf("cached %+v, pulled %+v", again, got)
	}
	byDigest := r.host + "/team/app@" + digest.String()
	pull(t, s, byDigest, PullOptions{})
	if n := count(log.take(), "/blobs/"); n != 1 {
		t.Errorf("%d blobs fetched for cached layers, want the configuration", n)
	}
	pull(t, s, byDigest, PullOptions{})
	if lines := log.take(); len(lines) != 0 {
		t.Errorf("a cached digest asked the registry: %q", lines)
	}

	// The tag moves: only Force notices.
	moved := makeImage(t, v1.Config{Cmd: []string{"other"}}, base)
	r.push(t, "team/app:1", moved)
	if pull(t, s, ref, PullOptions{}).ID != got.ID {
		t.Error("without Force the tag moved")
	}
	if pull(t, s, ref, PullOptions{Force: true}).ID == got.ID {
		t.Error("with Force the tag did not move")
	}
}

func TestPullCompressions(t *testing.T) {
	data := makeTar(t, reg("a", strings.Repeat("text ", 1000)))
	r := startRegistry(t, nil)
	for _, tt := range []struct {
		name string
		blob []byte
		mt   types.MediaType
	}{
		{"gzip", gzipped(t, data), types.OCILayer},
		{"two gzip members", append(gzipped(t, data[:1000]), gzipped(t, data[1000:])...), types.DockerLayer},
		{"zstd", zstded(t, data), types.OCILayerZStd},
		{"zstd with a skippable frame", append([]byte{0x50, 0x2a, 0x4d, 0x18, 2, 0, 0, 0, 'h', 'i'}, zstded(t, data)...), types.OCILayerZStd},
		{"plain", data, types.OCIUncompressedLayer},
		{"plain called gzip", data, types.DockerLayer},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := openStore(t)
			ref := r.push(t, "c:"+strings.ReplaceAll(tt.name, " ", "-"), makeImage(t, v1.Config{}, blobLayer(tt.blob, tt.mt, digestOf(data))))
			img := pull(t, s, ref, PullOptions{})
			if len(img.Layers) != 1 || img.Layers[0].DiffID != digestOf(data) {
				t.Errorf("layers %v", img.Layers)
			}
		})
	}
}

// An empty tar, an empty file, and bytes behind the end of the tar are all layers that docker takes.
func TestPullOddLayers(t *testing.T) {
	r := startRegistry(t, nil)
	for i, data := range [][]byte{makeTar(t), {}, append(makeTar(t, reg("a", "x")), make([]byte, 9000)...)} {
		s := openStore(t)
		ref := r.push(t, fmt.Sprint("odd:", i), makeImage(t, v1.Config{}, blobLayer(data, types.OCIUncompressedLayer, digestOf(data))))
		pull(t, s, ref, PullOptions{})
	}
}

func TestPullBadLayers(t *testing.T) {
	data := makeTar(t, dir("d"), reg("d/a", strings.Repeat("some text\n", 5000)))
	gz := gzipped(t, data)
	flipped := bytes.Clone(gz)
	flipped[len(flipped)/2] ^= 0x10
	evil := makeTar(t, reg("../../etc/cron.d/x", "boo"))
	absolute := makeTar(t, hardlink("x", "/../../etc/shadow"))
	var devices []entry
	for i := range 4097 {
		devices = append(devices, entry{Header: tar.Header{Typeflag: tar.TypeChar, Name: fmt.Sprint("dev/", i), Devmajor: 1, Devminor: 3}})
	}
	bomb := makeTar(t, devices...)
	other := digestOf([]byte("something else"))

	for _, tt := range []struct {
		name   string
		blob   []byte
		diffID string
		kind   error
		want   string
	}{
		{"content of another layer", gz, other, ErrCorrupt, "content has the digest " + digestOf(data)},
		{"truncated gzip", gz[:len(gz)-100], digestOf(data), ErrCorrupt, "the compressed data ends too early"},
		{"flipped bit", flipped, digestOf(data), ErrCorrupt, ""},
		{"no tar at all", []byte(strings.Repeat("hello world\n", 100)), digestOf(data), ErrCorrupt, "not a valid tar"},
		{"parent directories", evil, digestOf(evil), ErrRefused, `entry "../../etc/cron.d/x" points out of the layer`},
		{"absolute link", absolute, digestOf(absolute), ErrRefused, `entry "x" is a hard link to "/../../etc/shadow", outside of the layer`},
		{"device bomb", bomb, digestOf(bomb), ErrRefused, "a layer may have 4096 device nodes"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := startRegistry(t, nil)
			s := openStore(t)
			ref := r.push(t, "bad:1", makeImage(t, v1.Config{}, blobLayer(tt.blob, types.OCILayer, tt.diffID)))
			_, err := s.Pull(t.Context(), ref, PullOptions{})
			assertError(t, err, tt.kind, "pull "+ref+": layer 1 of 1 ("+short(digestOf(tt.blob))+"): ", tt.want)
			assertEmpty(t, s)
		})
	}
}

func assertError(t *testing.T, err, kind error, parts ...string) {
	t.Helper()
	if err == nil {
		t.Fatal("no error")
	}
	if kind != nil && !errors.Is(err, kind) {
		t.Errorf("error %q is not %q", err, kind)
	}
	for _, part := range parts {
		if !strings.Contains(err.Error(), part) {
			t.Errorf("error %q\nlacks %q", err, part)
		}
	}
	if strings.Contains(err.Error(), "\n") {
		t.Errorf("error of several lines: %q", err)
	}
}

// assertEmpty fails where a failed Pull left a layer, a record, or a temporary file.
func assertEmpty(t *testing.T, s *Store) {
	t.Helper()
	assertClean(t, s)
	for _, pattern := range []string{"layers/sha256/*", "images/*", "holds/*"} {
		if left, _ := filepath.Glob(s.path(pattern)); len(left) > 0 {
			t.Errorf("left behind: %q", left)
		}
	}
}

// A registry that sends other bytes than it announces.
func TestPullLyingRegistry(t *testing.T) {
	data := makeTar(t, reg("a", strings.Repeat("text ", 10000)))
	gz := gzipped(t, data)
	otherGz := gzipped(t, makeTar(t, reg("a", strings.Repeat("else ", 10000))))
	for _, tt := range []struct {
		name string
		send func(w http.ResponseWriter)
		want string
	}{
		{"other layer of the same size or more", func(w http.ResponseWriter) {
			_, _ = w.Write(append(otherGz, make([]byte, len(gz))...)[:len(gz)])
		}, "blob has the digest"},
		{"connection ends", func(w http.ResponseWriter) {
			w.Header().Set("Content-Length", fmt.Sprint(len(gz)))
			_, _ = w.Write(gz[:len(gz)/2])
		}, "truncated"},
		{"shorter", func(w http.ResponseWriter) { _, _ = w.Write(gz[:len(gz)/2]) }, "truncated"},
		{"garbage", func(w http.ResponseWriter) { _, _ = w.Write(make([]byte, len(gz))) }, "blob has the digest"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var lie atomic.Bool
			r := startRegistry(t, func(h http.Handler) http.Handler {
				return http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
					if lie.Load() && strings.HasSuffix(q.URL.Path, "/blobs/"+digestOf(gz)) {
						tt.send(w)
						return
					}
					h.ServeHTTP(w, q)
				})
			})
			ref := r.push(t, "x:1", makeImage(t, v1.Config{}, blobLayer(gz, types.OCILayer, digestOf(data))))
			lie.Store(true)
			s := openStore(t)
			_, err := s.Pull(t.Context(), ref, PullOptions{})
			assertError(t, err, ErrCorrupt, "layer 1 of 1", tt.want)
			assertEmpty(t, s)
		})
	}
}

// zeroStream is n zeros with a tar header in front: one file.
func zeroTar(t testing.TB, n int64) io.Reader {
	t.Helper()
	var b bytes.Buffer
	if err := tar.NewWriter(&b).WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: "zeros", Size: n, Mode: 0o644}); err != nil {
		t.Fatal(err)
	}
	return io.MultiReader(&b, io.LimitReader(zeroReader{}, n+1024))
}

type zeroReader struct{}

func (zeroReader) Read(p []byte) (int, error) {
	clear(p)
	return len(p), nil
}

func TestPullBomb(t *testing.T) {
	s := openStore(t)
	r := startRegistry(t, nil)
	var blob bytes.Buffer
	w := newZstd(t, &blob)
	if _, err := io.Copy(w, zeroTar(t, 10<<30)); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	if blob.Len() > 1200<<10 {
		t.Fatalf("the bomb has %d bytes", blob.Len())
	}
	ref := r.push(t, "bomb:1", makeImage(t, v1.Config{}, blobLayer(blob.Bytes(), types.OCILayerZStd, digestOf(nil))))
	_, err := s.Pull(t.Context(), ref, PullOptions{})
	assertError(t, err, ErrTooLarge, "layer 1 of 1", "taken for a decompression bomb")
	assertEmpty(t, s)

	_, err = s.Pull(t.Context(), ref, PullOptions{MaxLayerSize: 100 << 20})
	assertError(t, err, ErrTooLarge, "makes the layer larger than 100 MiB")
	_, err = s.Pull(t.Context(), ref, PullOptions{MaxImageSize: 100 << 20})
	assertError(t, err, ErrTooLarge, "the image's layers take more than the limit")
	assertEmpty(t, s)
}

func TestPullIndex(t *testing.T) {
	r := startRegistry(t, nil)
	s := openStore(t)
	var index v1.ImageIndex = empty.Index
	want := make(map[string]string)
	for _, p := range []v1.Platform{
		{OS: "linux", Architecture: "amd64"},
		{OS: "linux", Architecture: "arm", Variant: "v6"},
		{OS: "linux", Architecture: "arm", Variant: "v7"},
		{OS: "linux", Architecture: "arm64", Variant: "v8"},
		{OS: "windows", Architecture: "amd64"},
		{OS: "unknown", Architecture: "unknown"},
	} {
		key := joinPlatform(p.OS, p.Architecture, p.Variant)
		img := makeImage(t, v1.Config{Labels: map[string]string{"p": key}}, tarLayer(t, makeTar(t, reg("p", key))))
		cf, _ := img.ConfigFile()
		cf = cf.DeepCopy()
		cf.OS, cf.Architecture, cf.Variant = p.OS, p.Architecture, p.Variant
		img, err := mutate.ConfigFile(img, cf)
		if err != nil {
			t.Fatal(err)
		}
		id, _ := img.ConfigName()
		want[key] = id.String()
		index = mutate.AppendManifests(index, mutate.IndexAddendum{Add: img, Descriptor: v1.Descriptor{Platform: &p}})
	}
	ref, err := name.ParseReference(r.host + "/multi:1")
	if err != nil {
		t.Fatal(err)
	}
	if err := remote.WriteIndex(ref, index); err != nil {
		t.Fatal(err)
	}
	for platform, key := range map[string]string{
		"linux/amd64": "linux/amd64", "linux/arm64": "linux/arm64/v8", "linux/arm64/v8": "linux/arm64/v8",
		"linux/arm/v6": "linux/arm/v6", "linux/arm": "linux/arm/v7", "windows/amd64": "windows/amd64",
	} {
		if img := pull(t, s, ref.Name(), PullOptions{Platform: platform}); img.ID != want[key] {
			t.Errorf("%s: got the image for %s", platform, img.Config.Config.Labels["p"])
		}
	}
	if img := pull(t, s, ref.Name(), PullOptions{Platform: "linux/aarch64"}); img.Platform != "linux/arm64" {
		t.Errorf("aarch64 became %s", img.Platform)
	}
	_, err = s.Pull(t.Context(), ref.Name(), PullOptions{Platform: "arm64"})
	assertError(t, err, nil, `platform "arm64": give os/arch`)
	_, err = s.Pull(t.Context(), ref.Name(), PullOptions{Platform: "linux/riscv64"})
	assertError(t, err, ErrPlatform, "pull "+ref.Name(),
		"none for linux/riscv64, only for linux/amd64, linux/arm/v6, linux/arm/v7, linux/arm64/v8, windows/amd64")
}

func TestPullWrongArchitecture(t *testing.T) {
	r := startRegistry(t, nil)
	s := openStore(t)
	ref := r.push(t, "one:1", makeImage(t, v1.Config{}, tarLayer(t, makeTar(t))))
	_, err := s.Pull(t.Context(), ref, PullOptions{Platform: "linux/s390x"})
	assertError(t, err, ErrPlatform, "it is for linux/"+runtime.GOARCH+", not for linux/s390x")
	assertEmpty(t, s)
}

// authorized wants a user name and a password for everything.
func authorized(user, password string) func(http.Handler) http.Handler {
	return func(h http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
			if u, p, _ := q.BasicAuth(); u != user || p != password {
				w.Header().Set("WWW-Authenticate", `Basic realm="test"`)
				w.WriteHeader(http.StatusUnauthorized)
				return
			}
			h.ServeHTTP(w, q)
		})
	}
}

func TestPullWithLogin(t *testing.T) {
	r := startRegistry(t, authorized("al", "secret"))
	ref, err := name.ParseReference(r.host + "/private:1")
	if err != nil {
		t.Fatal(err)
	}
	img := makeImage(t, v1.Config{}, tarLayer(t, makeTar(t, reg("a", "x"))))
	if err := remote.Write(ref, img, remote.WithAuth(&authn.Basic{Username: "al", Password: "secret"})); err != nil {
		t.Fatal(err)
	}
	t.Setenv("DOCKER_CONFIG", t.TempDir())
	s := openStore(t)
	_, err = s.Pull(t.Context(), ref.Name(), PullOptions{})
	assertError(t, err, ErrUnauthorized, "pull "+ref.Name(), "run docker login "+r.host)
	assertEmpty(t, s)

	config := fmt.Sprintf(`{"auths":{%q:{"auth":%q}}}`, r.host, base64.StdEncoding.EncodeToString([]byte("al:secret")))
	if err := os.WriteFile(filepath.Join(os.Getenv("DOCKER_CONFIG"), "config.json"), []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	pull(t, s, ref.Name(), PullOptions{})
}

// An image that is here because one tenant has a login for it is nobody else's for that.
func TestPullPrivate(t *testing.T) {
	var asked requestLog
	r := startRegistry(t, func(h http.Handler) http.Handler { return asked.wrap(authorized("al", "secret")(h)) })
	ref, err := name.ParseReference(r.host + "/private:1")
	if err != nil {
		t.Fatal(err)
	}
	al := &authn.Basic{Username: "al", Password: "secret"}
	img := makeImage(t, v1.Config{}, tarLayer(t, makeTar(t, reg("a", "x"))))
	if err := remote.Write(ref, img, remote.WithAuth(al)); err != nil {
		t.Fatal(err)
	}
	t.Setenv("DOCKER_CONFIG", t.TempDir())
	s := openStore(t)
	own := PullOptions{Owner: "al", Keychain: login{al}}
	pull(t, s, ref.Name(), own)
	for _, o := range []PullOptions{{}, {Owner: "mallory", Keychain: login{&authn.Basic{Username: "mallory", Password: "guessed"}}}} {
		_, err = s.Pull(t.Context(), ref.Name(), o)
		assertError(t, err, ErrUnauthorized, "pull "+ref.Name())
	}
	asked.take()
	pull(t, s, ref.Name(), own)
	if lines := asked.take(); count(lines, "/manifests/") == 0 || count(lines, "/blobs/") != 1 { // the configuration
		t.Errorf("for a cached image the registry was asked for %q, want its manifest and configuration", lines)
	}
	// Mallory's registry says that it has the layer, whose digest he knows. He would get what is in the cache.
	claimed := startRegistry(t, nil)
	claimed.push(t, "claimed:1", img)
	layers, err := img.Layers()
	if err != nil {
		t.Fatal(err)
	}
	digest, err := layers[0].Digest()
	if err != nil {
		t.Fatal(err)
	}
	real := claimed.handler
	claimed.handler = http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
		if q.Method == http.MethodGet && strings.HasSuffix(q.URL.Path, "/blobs/"+digest.String()) {
			io.WriteString(w, "something else")
			return
		}
		real.ServeHTTP(w, q)
	})
	for _, owner := range []string{"mallory", ""} {
		_, err = s.Pull(t.Context(), claimed.host+"/claimed:1", PullOptions{Owner: owner})
		assertError(t, err, ErrCorrupt, "layer 1 of 1")
	}
	claimed.handler = real // who has it can use it
	pull(t, s, claimed.host+"/claimed:1", PullOptions{Owner: "bob"})

	pull(t, s, ref.Name(), PullOptions{Keychain: login{al}}) // the node's own login: everybody has it
	asked.take()
	pull(t, s, ref.Name(), PullOptions{})
	if lines := asked.take(); len(lines) > 0 {
		t.Errorf("the registry was asked for %q", lines)
	}
}

// A login is the same for all registries.
type login struct{ authn.Authenticator }

func (l login) Resolve(authn.Resource) (authn.Authenticator, error) { return l.Authenticator, nil }

func TestPullErrors(t *testing.T) {
	r := startRegistry(t, nil)
	gone := startRegistry(t, nil)
	gone.Close()
	s := openStore(t)
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, []byte("no archive, but long enough to be read as one"), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("DOCKER_HOST", "unix://"+file+".sock")
	for _, tt := range []struct {
		ref  string
		kind error
		want string
	}{
		{r.host + "/nothing:1", ErrNotFound, "check name and tag"},
		{gone.host + "/x:1", ErrUnreachable, "connection refused: check the network, or give a mirror"},
		{"registry.invalid/x:1", ErrUnreachable, "check the network"},
		{"docker-daemon:x", ErrUnreachable, "start it, or set DOCKER_HOST"},
		{"docker-daemon:", nil, "give a name"},
		{"docker-archive:" + file, ErrCorrupt, ""},
		{"docker-archive:" + file + ".none", ErrNotFound, "does not exist"},
		{"docker-archive:" + filepath.Dir(file), nil, "an OCI layout is named oci:"},
		{"oci:" + filepath.Dir(file), ErrCorrupt, "index.json is missing: it is no OCI layout"},
		{"oci:" + file, ErrCorrupt, ""},
		{"oci:", nil, "give a path"},
		{"UPPER/case", nil, "no valid reference"},
		{r.host + "/x@sha256:12", nil, "no valid reference"},
	} {
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
		_, err := s.Pull(ctx, tt.ref, PullOptions{})
		cancel()
		assertError(t, err, tt.kind, tt.ref, tt.want)
		assertEmpty(t, s)
	}
}

func TestPullMirror(t *testing.T) {
	var log requestLog
	mirror := startRegistry(t, log.wrap)
	img := makeImage(t, v1.Config{}, tarLayer(t, makeTar(t, reg("a", "x"))))
	mirror.push(t, "cache/library/app:1", img)
	gone := startRegistry(t, nil)
	gone.Close()
	s := openStore(t)
	log.take()
	got := pull(t, s, "app:1", PullOptions{Mirrors: map[string][]string{"docker.io": {"http://" + gone.host, "http://" + mirror.host + "/cache"}}})
	if got.Reference != "app:1" || len(got.Layers) != 1 {
		t.Errorf("got %+v", got)
	}
	if count(log.take(), "/v2/cache/library/app/blobs/") != 2 {
		t.Error("the mirror was not asked for the blobs")
	}
}

func TestPullCancelled(t *testing.T) {
	blocked := make(chan struct{}, 1)
	var block atomic.Bool
	r := startRegistry(t, func(h http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
			if block.Load() && q.Method == http.MethodGet && strings.Contains(q.URL.Path, "/blobs/") {
				blocked <- struct{}{}
				<-q.Context().Done()
				return
			}
			h.ServeHTTP(w, q)
		})
	})
	ref := r.push(t, "x:1", makeImage(t, v1.Config{}, tarLayer(t, makeTar(t, reg("a", "x")))))
	block.Store(true)
	s := openStore(t)
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		<-blocked
		cancel()
	}()
	_, err := s.Pull(ctx, ref, PullOptions{})
	assertError(t, err, context.Canceled, ref)
	assertEmpty(t, s)
}

// Several stores on one directory are what several processes have.
func TestConcurrentPullsShareWork(t *testing.T) {
	var log requestLog
	r := startRegistry(t, log.wrap)
	img := makeImage(t, v1.Config{},
		tarLayer(t, makeTar(t, reg("a", strings.Repeat("a", 1<<20)))),
		tarLayer(t, makeTar(t, reg("b", strings.Repeat("b", 1<<20)))))
	ref := r.push(t, "x:1", img)
	log.take()
	root := t.TempDir()
	var wg sync.WaitGroup
	for range 8 {
		wg.Add(1)
		go func() {
			defer wg.Done()
			s, err := Open(root)
			if err != nil {
				t.Error(err)
				return
			}
			if _, err := s.Pull(t.Context(), ref, PullOptions{}); err != nil {
				t.Error(err)
			}
		}()
	}
	wg.Wait()
	lines := log.take()
	layers, _ := img.Layers()
	for _, l := range layers {
		digest, _ := l.Digest()
		if n := count(lines, "GET /v2/x/blobs/"+digest.String()); n != 1 {
			t.Errorf("layer %s was fetched %d times", digest, n)
		}
	}
	s, err := Open(root)
	if err != nil {
		t.Fatal(err)
	}
	assertClean(t, s)
}

func TestPullLayout(t *testing.T) {
	img := makeImage(t, fullConfig, tarLayer(t, makeTar(t, reg("a", "x"))))
	other := makeImage(t, v1.Config{}, tarLayer(t, makeTar(t, reg("b", "x"))))
	dir := filepath.Join(t.TempDir(), "with:colon")
	l, err := layout.Write(dir, empty.Index)
	if err != nil {
		t.Fatal(err)
	}
	tag := func(s string) layout.Option {
		return layout.WithAnnotations(map[string]string{"org.opencontainers.image.ref.name": s})
	}
	if err := l.AppendImage(img, tag("one")); err != nil {
		t.Fatal(err)
	}
	s := openStore(t)
	want, _ := img.ConfigName()
	digest, _ := img.Digest()
	got := pull(t, s, "oci:"+dir, PullOptions{})
	if got.ID != want.String() || got.Digest != digest.String() || got.Reference != "oci:"+dir {
		t.Errorf("got %+v", got)
	}
	if err := l.AppendImage(other, tag("two")); err != nil {
		t.Fatal(err)
	}
	_, err = s.Pull(t.Context(), "oci:"+dir, PullOptions{})
	assertError(t, err, nil, `it has several images: say which, one of ["one" "two"]`)
	_, err = s.Pull(t.Context(), "oci:"+dir+":three", PullOptions{})
	assertError(t, err, ErrNotFound, `it has no "three", only ["one" "two"]`)
	if got := pull(t, s, "oci:"+dir+":one", PullOptions{}); got.ID != want.String() {
		t.Errorf("got %+v", got)
	}

	// The same as a tar, plain and compressed.
	data := tarDir(t, dir)
	for name, data := range map[string][]byte{"layout.tar": data, "layout.tar.gz": gzipped(t, data), "layout.tar.zst": zstded(t, data)} {
		file := filepath.Join(t.TempDir(), name)
		if err := os.WriteFile(file, data, 0o600); err != nil {
			t.Fatal(err)
		}
		if got := pull(t, s, "oci:"+file+":one", PullOptions{}); got.ID != want.String() {
			t.Errorf("%s: got %+v", name, got)
		}
		assertClean(t, s)
	}

	// A blob that is a link out of the layout is not followed, one that changed is noticed.
	blobName := filepath.Join(dir, "blobs", "sha256", want.Hex)
	secret := filepath.Join(t.TempDir(), "secret")
	if err := os.WriteFile(secret, readFile(t, blobName), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(blobName); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(secret, blobName); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Pull(t.Context(), "oci:"+dir+":one", PullOptions{}); err == nil {
		t.Error("a link out of the layout was followed")
	}
	if err := os.Remove(blobName); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(blobName, []byte("{}"), 0o600); err != nil {
		t.Fatal(err)
	}
	_, err = s.Pull(t.Context(), "oci:"+dir+":one", PullOptions{})
	assertError(t, err, ErrCorrupt, "the configuration has the digest")
}

func tarDir(t *testing.T, root string) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	if err := w.AddFS(os.DirFS(root)); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func TestPullDockerArchive(t *testing.T) {
	one := makeImage(t, fullConfig, tarLayer(t, makeTar(t, reg("a", "x"))), tarLayer(t, makeTar(t, reg("b", "x"))))
	two := makeImage(t, v1.Config{}, tarLayer(t, makeTar(t, reg("b", "x"))))
	file := filepath.Join(t.TempDir(), "images.tar")
	tags := map[name.Tag]v1.Image{}
	for n, img := range map[string]v1.Image{"one:1": one, "two:latest": two} {
		tag, err := name.NewTag(n)
		if err != nil {
			t.Fatal(err)
		}
		tags[tag] = img
	}
	if err := tarball.MultiWriteToFile(file, tags); err != nil {
		t.Fatal(err)
	}
	s := openStore(t)
	_, err := s.Pull(t.Context(), "docker-archive:"+file, PullOptions{})
	assertError(t, err, nil, "it has several images: say which, one of [", `"one:1"`, `"two:latest"`)
	_, err = s.Pull(t.Context(), "docker-archive:"+file+":none", PullOptions{})
	assertError(t, err, ErrNotFound, `it has no "none", only [`)
	for ref, img := range map[string]v1.Image{"one:1": one, "docker.io/library/one:1": one, "two": two} {
		want, _ := img.ConfigName()
		got := pull(t, s, "docker-archive:"+file+":"+ref, PullOptions{})
		if got.ID != want.String() || got.Digest != "" {
			t.Errorf("%s: got %+v", ref, got)
		}
	}
	assertClean(t, s)

	cut := file + ".cut"
	data := readFile(t, file)
	if err := os.WriteFile(cut, data[:len(data)/2], 0o600); err != nil {
		t.Fatal(err)
	}
	_, err = s.Pull(t.Context(), "docker-archive:"+cut, PullOptions{})
	assertError(t, err, ErrCorrupt, cut)
}

// oldArchive is what `docker save` of docker 1.10 to 24 writes: a directory for each layer, and a link where the same
// layer comes again.
func oldArchive(t *testing.T) (data []byte, id string) {
	t.Helper()
	layer := makeTar(t, reg("a", "x"))
	config := fmt.Sprintf(`{"architecture":%q,"os":"linux","config":{"Cmd":["sh"]},"rootfs":{"type":"layers","diff_ids":[%q,%q]}}`,
		runtime.GOARCH, digestOf(layer), digestOf(layer))
	id = digestOf([]byte(config))
	manifest := fmt.Sprintf(`[{"Config":"%s.json","RepoTags":["busybox:latest"],"Layers":["1111/layer.tar","2222/layer.tar"]}]`, id[7:])
	return makeTar(t,
		dir("1111"), reg("1111/layer.tar", string(layer)), reg("1111/VERSION", "1.0"),
		dir("2222"), symlink("2222/layer.tar", "../1111/layer.tar"),
		reg(id[7:]+".json", config), reg("manifest.json", manifest),
	), id
}

// newArchive is what `docker save` of docker 25 and later writes: an OCI layout with a manifest.json.
func newArchive(t *testing.T) (data []byte, id, digest string) {
	t.Helper()
	layer := makeTar(t, reg("a", "x"))
	config := fmt.Sprintf(`{"architecture":%q,"os":"linux","config":{"Cmd":["sh"],"Healthcheck":{"Test":["CMD","x"],"StartInterval":5}},"rootfs":{"type":"layers","diff_ids":[%q]}}`,
		runtime.GOARCH, digestOf(layer))
	id = digestOf([]byte(config))
	ociManifest := fmt.Sprintf(`{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json",`+
		`"config":{"mediaType":"application/vnd.oci.image.config.v1+json","digest":%q,"size":%d},`+
		`"layers":[{"mediaType":"application/vnd.oci.image.layer.v1.tar","digest":%q,"size":%d}]}`, id, len(config), digestOf(layer), len(layer))
	digest = digestOf([]byte(ociManifest))
	index := fmt.Sprintf(`{"schemaVersion":2,"mediaType":"application/vnd.oci.image.index.v1+json","manifests":[{"mediaType":`+
		`"application/vnd.oci.image.manifest.v1+json","digest":%q,"size":%d,"annotations":{"io.containerd.image.name":"docker.io/library/app:2","org.opencontainers.image.ref.name":"2"}}]}`, digest, len(ociManifest))
	blob := func(data string) string { return "blobs/sha256/" + digestOf([]byte(data))[7:] }
	list := fmt.Sprintf(`[{"Config":%q,"RepoTags":["app:2"],"Layers":[%q]}]`, blob(config), blob(string(layer)))
	return makeTar(t,
		dir("blobs"), dir("blobs/sha256"), reg(blob(config), config), reg(blob(string(layer)), string(layer)),
		reg(blob(ociManifest), ociManifest), reg("index.json", index), reg("manifest.json", list),
		reg("oci-layout", `{"imageLayoutVersion":"1.0.0"}`), reg("repositories", "{}"),
	), id, digest
}

func TestPullDockerSave(t *testing.T) {
	s := openStore(t)
	data, id := oldArchive(t)
	file := filepath.Join(t.TempDir(), "old.tar")
	if err := os.WriteFile(file, data, 0o600); err != nil {
		t.Fatal(err)
	}
	if got := pull(t, s, "docker-archive:"+file+":busybox", PullOptions{}); got.ID != id || len(got.Layers) != 2 {
		t.Errorf("old: got %+v", got)
	}

	data, id, digest := newArchive(t)
	file = filepath.Join(t.TempDir(), "new.tar.gz")
	if err := os.WriteFile(file, gzipped(t, data), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, ref := range []string{"docker-archive:" + file, "docker-archive:" + file + ":app:2", "oci:" + file + ":2", "oci:" + file + ":app:2"} {
		got := pull(t, s, ref, PullOptions{})
		if got.ID != id || got.Digest != digest || len(got.Layers) != 1 {
			t.Errorf("%s: got %+v", ref, got)
		}
		if got.Config.Config.Healthcheck.StartInterval != 5 {
			t.Errorf("%s: the health check lost its start interval", ref)
		}
	}
	assertClean(t, s)
}

func TestPullMalformedLayout(t *testing.T) {
	s := openStore(t)
	const head = `{"mediaType":"application/vnd.oci.image.manifest.v1+json","size":3,"digest":"`
	for _, tt := range []struct {
		index string
		kind  error
		want  string
	}{
		{`{"manifests":[]` + strings.Repeat(" ", maxManifest) + `}`, ErrTooLarge, "index.json: too large: more than 4096 KiB"},
		{`{"manifests":[]}`, ErrNotFound, "the layout is empty"},
		{`{"manifests":`, ErrCorrupt, "index.json: corrupt image"},
		{`{"manifests":[` + head + `../../../x:00"}]}`, ErrCorrupt, "index.json"},
		{`{"manifests":[` + head + `sha512:` + strings.Repeat("a", 128) + `"}]}`, nil, "sha512"},
		{`{"manifests":[` + head + digestOf(nil) + `"}]}`, fs.ErrNotExist, digestOf(nil)[7:]},
	} {
		dir := t.TempDir()
		if err := os.WriteFile(filepath.Join(dir, "index.json"), []byte(tt.index), 0o600); err != nil {
			t.Fatal(err)
		}
		_, err := s.Pull(t.Context(), "oci:"+dir, PullOptions{})
		assertError(t, err, tt.kind, "pull oci:"+dir, tt.want)
		assertEmpty(t, s)
	}
}

func TestManifest(t *testing.T) {
	descriptor := func(data []byte) map[string]any { return map[string]any{"digest": digestOf(data), "size": len(data)} }
	encode := func(v any) []byte {
		data, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		return data
	}
	image := encode(map[string]any{"config": descriptor(nil), "layers": []any{}})
	both := encode(map[string]any{"config": descriptor(nil), "manifests": []any{descriptor(nil)}})
	blobs := map[string][]byte{digestOf(image): image}
	nested := image
	var levels [][]byte
	for range maxIndexDepth {
		nested = encode(map[string]any{"manifests": []any{descriptor(nested)}})
		blobs[digestOf(nested)] = nested
		levels = append(levels, nested)
	}
	fetch := func(_ context.Context, d v1.Descriptor) ([]byte, error) { return blobs[d.Digest.String()], nil }
	swapped := func(context.Context, v1.Descriptor) ([]byte, error) { return both, nil }
	for _, tt := range []struct {
		name  string
		data  []byte
		fetch fetchFunc
		kind  error
		want  string
	}{
		{"image", image, fetch, nil, ""},
		{"deep index", levels[maxIndexDepth-2], fetch, nil, ""},
		{"too deep", levels[maxIndexDepth-1], fetch, ErrRefused, "more than 4 indexes inside each other"},
		{"index and image at once", both, fetch, ErrRefused, "both an index and a manifest"},
		{"another manifest than the index says", levels[0], swapped, ErrCorrupt, "the manifest has the digest"},
		{"docker's first version", []byte(`{"schemaVersion":1,"fsLayers":[]}`), fetch, nil, "push the image again"},
		{"nothing", []byte(`{}`), fetch, ErrCorrupt, "neither a configuration nor manifests"},
		{"no JSON", []byte(`<html>`), fetch, ErrCorrupt, "manifest"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			m, _, err := manifest(t.Context(), v1.Descriptor{}, tt.data, "linux/amd64", tt.fetch)
			if tt.want == "" {
				if err != nil || m.Config.Digest.String() != digestOf(nil) {
					t.Errorf("%+v, %v", m, err)
				}
				return
			}
			assertError(t, err, tt.kind, tt.want)
		})
	}
}

func FuzzManifest(f *testing.F) {
	f.Add([]byte(`{"config":{"digest":"`+digestOf(nil)+`"},"layers":[{"digest":"`+digestOf(nil)+`","mediaType":"application/vnd.oci.image.layer.v1.tar"}]}`), []byte(`{"rootfs":{"diff_ids":["`+digestOf(nil)+`"]}}`))
	f.Add([]byte(`{"manifests":[{"digest":"`+digestOf(nil)+`","platform":{"os":"linux","architecture":"amd64"}}]}`), []byte(`{}`))
	f.Fuzz(func(t *testing.T, data, config []byte) {
		m, _, err := manifest(t.Context(), v1.Descriptor{}, data, "linux/amd64", func(context.Context, v1.Descriptor) ([]byte, error) { return data, nil })
		if err != nil {
			return
		}
		r := &resolved{id: digestOf(config), config: config}
		for _, l := range m.Layers {
			r.blobs = append(r.blobs, blob{digest: l.Digest.String(), size: l.Size, mediaType: string(l.MediaType)})
		}
		if _, err := r.parse("linux/amd64"); err != nil {
			return
		}
		for _, b := range r.blobs {
			if !isDigest(b.diffID) || !isDigest(b.digest) {
				t.Fatalf("accepted %+v", b)
			}
		}
	})
}

func FuzzArchive(f *testing.F) {
	f.Add(makeTar(f, reg("manifest.json", `[{"Config":"a.json","Layers":["x/layer.tar"]}]`), reg("a.json", "{}"), symlink("x/layer.tar", "../y"), hardlink("y", "a.json")))
	f.Add(makeTar(f, reg("index.json", `{"manifests":[]}`), symlink("loop", "loop")))
	f.Fuzz(func(t *testing.T, data []byte) {
		file := filepath.Join(t.TempDir(), "tar")
		if err := os.WriteFile(file, data, 0o600); err != nil {
			t.Fatal(err)
		}
		f, err := os.Open(file)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		a, err := indexArchive(f, int64(len(data)))
		if err != nil {
			return
		}
		for name := range a.files {
			if f, err := a.Open(name); err == nil {
				if n, err := io.Copy(io.Discard, f); err != nil || n > int64(len(data)) {
					t.Fatalf("%q: %d bytes of %d, %v", name, n, len(data), err)
				}
			}
		}
		_, _ = archiveSource{fsys: a}.resolve(t.Context(), "linux/amd64")
	})
}
