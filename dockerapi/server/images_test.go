package server

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"errors"
	"hash/crc32"
	"io"
	"log"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	cerrdefs "github.com/containerd/errdefs"
	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	upstreamregistry "github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/hashicorp/nomad/api"
	"github.com/moby/moby/client"

	"github.com/cradlestack/cradlestack/dockerapi/registry"
)

// otherRegistry is one that images come from and go to.
func otherRegistry(t testing.TB) string {
	t.Helper()
	s := httptest.NewServer(upstreamregistry.New(upstreamregistry.Logger(log.New(io.Discard, "", 0))))
	t.Cleanup(s.Close)
	return strings.TrimPrefix(s.URL, "http://")
}

func openRegistry(t testing.TB, insecure ...string) *registry.Registry {
	t.Helper()
	r, err := registry.Open(t.Context(), registry.Config{Folder: t.TempDir(), Insecure: insecure, Log: slog.New(slog.NewTextHandler(t.Output(), nil))})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	return r
}

// dockerHost starts a server for a namespace and returns its socket.
func dockerHost(t *testing.T, r *registry.Registry, namespace string) string {
	t.Helper()
	return "unix://" + startUnix(t, Config{Version: "test", Nomad: emptyNomad(t), Registry: r, Local: Access{Namespace: namespace}})
}

func mobyClient(t *testing.T, host string) *client.Client {
	t.Helper()
	c, err := client.New(client.WithHost(host))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// textImage is an image with a layer for each text.
func textImage(t testing.TB, texts ...string) v1.Image {
	t.Helper()
	img := v1.Image(empty.Image)
	for n, text := range texts {
		data := tarFile(t, "text", text)
		layer, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(data)), nil })
		if err != nil {
			t.Fatal(err)
		}
		if img, err = mutate.Append(img, mutate.Addendum{Layer: layer, History: v1.History{CreatedBy: "COPY text " + text, Created: v1.Time{Time: time.Unix(1700000000+int64(n), 0).UTC()}}}); err != nil {
			t.Fatal(err)
		}
	}
	c, err := img.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	c = c.DeepCopy()
	c.OS, c.Architecture, c.Author = "linux", "amd64", "somebody"
	c.Created = v1.Time{Time: time.Unix(1700000000+int64(crc32.ChecksumIEEE([]byte(texts[len(texts)-1]))%1e6), 0).UTC()}
	c.Config = v1.Config{Cmd: []string{"cat", "/text"}, Labels: map[string]string{"text": texts[len(texts)-1]}, Env: []string{"PATH=/bin"}}
	if img, err = mutate.ConfigFile(img, c); err != nil {
		t.Fatal(err)
	}
	return img
}

func tarFile(t testing.TB, name, text string) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	if err := w.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: int64(len(text)), Typeflag: tar.TypeReg}); err != nil {
		t.Fatal(err)
	}
	io.WriteString(w, text)
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func push(t testing.TB, ref string, img v1.Image) {
	t.Helper()
	n, err := name.NewTag(ref, name.Insecure)
	if err != nil {
		t.Fatal(err)
	}
	if err := remote.Write(n, img); err != nil {
		t.Fatal(err)
	}
}

func imageID(t testing.TB, img v1.Image) string {
	t.Helper()
	d, err := img.ConfigName()
	if err != nil {
		t.Fatal(err)
	}
	return d.String()
}

// The client of moby's: what portainer, testcontainers and compose are made of.
func TestImagesByMobysClient(t *testing.T) {
	host := otherRegistry(t)
	r := openRegistry(t, host)
	c := mobyClient(t, dockerHost(t, r, "a"))
	ctx := t.Context()
	one := textImage(t, "base", "one")
	push(t, host+"/app:1", one)

	pull, err := c.ImagePull(ctx, host+"/app:1", client.ImagePullOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if err := pull.Wait(ctx); err != nil {
		t.Fatal(err)
	}
	list, err := c.ImageList(ctx, client.ImageListOptions{SharedSize: true})
	if err != nil || len(list.Items) != 1 || list.Items[0].ID != imageID(t, one) || list.Items[0].RepoTags[0] != host+"/app:1" || list.Items[0].Size != int64(len("baseone")) || list.Items[0].SharedSize != 0 {
		t.Fatalf("%+v, %v", list, err)
	}
	i, err := c.ImageInspect(ctx, host+"/app:1")
	if err != nil || i.ID != imageID(t, one) || i.Os != "linux" || i.Author != "somebody" || i.Config.Cmd[0] != "cat" || len(i.RootFS.Layers) != 2 || len(i.RepoDigests) != 1 || i.Metadata.LastTagTime.IsZero() {
		t.Errorf("%+v, %v", i, err)
	}
	h, err := c.ImageHistory(ctx, host+"/app:1")
	if err != nil || len(h.Items) != 2 || h.Items[0].CreatedBy != "COPY text one" || h.Items[0].Size != 3 || h.Items[1].ID != "<missing>" {
		t.Errorf("%+v, %v", h, err)
	}
	if _, err := c.ImageTag(ctx, client.ImageTagOptions{Source: host + "/app:1", Target: "local:2"}); err != nil {
		t.Fatal(err)
	}
	saved, err := c.ImageSave(ctx, []string{"local:2"})
	if err != nil {
		t.Fatal(err)
	}
	data, err := io.ReadAll(saved)
	saved.Close()
	if err != nil {
		t.Fatal(err)
	}
	found, err := c.DistributionInspect(ctx, host+"/app:1", client.DistributionInspectOptions{})
	if err != nil || len(found.Platforms) != 1 || found.Platforms[0].OS != "linux" {
		t.Errorf("%+v, %v", found, err)
	}

	// Another namespace sees nothing of it, and gets its own of what it is given.
	b := mobyClient(t, dockerHost(t, r, "b"))
	for what, err := range map[string]error{
		"inspect":       second(b.ImageInspect(ctx, host+"/app:1")),
		"inspect by id": second(b.ImageInspect(ctx, i.ID)),
		"history":       second(b.ImageHistory(ctx, i.ID)),
		"tag":           second(b.ImageTag(ctx, client.ImageTagOptions{Source: i.ID, Target: "mine:1"})),
		"save":          second(b.ImageSave(ctx, []string{i.ID})),
		"remove":        second(b.ImageRemove(ctx, i.ID, client.ImageRemoveOptions{Force: true})),
	} {
		if !cerrdefs.IsNotFound(err) {
			t.Errorf("%s from another namespace: %v", what, err)
		}
	}
	pushing, err := b.ImagePush(ctx, host+"/app:1", client.ImagePushOptions{RegistryAuth: "e30="})
	if err == nil {
		err = pushing.Wait(ctx)
	}
	if err == nil || !strings.Contains(err.Error(), "does not exist locally") {
		t.Errorf("push from another namespace: %v", err)
	}
	if list, err := b.ImageList(ctx, client.ImageListOptions{}); err != nil || len(list.Items) != 0 {
		t.Errorf("another namespace: %+v, %v", list, err)
	}
	loaded, err := b.ImageLoad(ctx, bytes.NewReader(data))
	if err != nil {
		t.Fatal(err)
	}
	text, err := io.ReadAll(loaded)
	if err != nil || !strings.Contains(string(text), `"stream":"Loaded image: local:2\n"`) {
		t.Errorf("%s, %v", text, err)
	}
	if _, err := b.ImageRemove(ctx, "local:2", client.ImageRemoveOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := c.ImageInspect(ctx, "local:2"); err != nil {
		t.Errorf("the first namespace's image: %v", err)
	}

	du, err := c.DiskUsage(ctx, client.DiskUsageOptions{Images: true, Verbose: true})
	if err != nil || du.Images.TotalCount != 1 || du.Images.TotalSize != int64(len("baseone")) || du.Images.Reclaimable != du.Images.TotalSize || len(du.Images.Items) != 1 {
		t.Errorf("%+v, %v", du, err)
	}
	p, err := c.ImagePrune(ctx, client.ImagePruneOptions{Filters: make(client.Filters).Add("dangling", "false")})
	if err != nil || p.Report.SpaceReclaimed != uint64(len("baseone")) || len(p.Report.ImagesDeleted) != 6 {
		t.Errorf("%+v, %v", p, err)
	}
}

func second[T any](_ T, err error) error { return err }

func TestImageErrors(t *testing.T) {
	host := otherRegistry(t)
	ask := serve(t, Config{Version: "test", Nomad: emptyNomad(t), Registry: openRegistry(t, host)})
	for _, test := range []struct {
		method, path, body string
		status             int
		want               string
	}{
		{"GET", "/images/json", "", 200, "[]"},
		{"GET", "/images/json?filters=x", "", 400, "invalid filters"},
		{"GET", `/images/json?filters={"x":["y"]}`, "", 400, "invalid filter 'x'"},
		{"GET", `/images/json?filters={"dangling":["maybe"]}`, "", 400, "invalid filter 'dangling=[maybe]'"},
		{"GET", `/images/json?filters={"reference":["[a-"]}`, "", 400, "invalid reference filter"},
		{"GET", `/images/json?filters={"before":["none"]}`, "", 404, "No such image: none:latest"},
		{"GET", "/images/none/json", "", 404, "No such image: none:latest"},
		{"GET", "/images/NONE/json", "", 400, "must be lowercase"},
		{"GET", "/images/a/b/c/json", "", 404, "No such image: a/b/c:latest"},
		{"GET", "/images/none/history", "", 404, "No such image"},
		{"GET", "/images/none/get", "", 404, "No such image"},
		{"GET", "/images/get", "", 400, "name the images"},
		{"GET", "/images/get?names=none", "", 404, "No such image"},
		{"GET", "/images/search?term=x", "", 501, "searching is not supported"},
		{"POST", "/images/create?fromImage=" + host + "/none&tag=1", "", 404, "manifest for " + host + "/none:1 not found"},
		{"POST", "/images/create?fromImage=UPPER&tag=1", "", 400, "must be lowercase"},
		{"POST", "/images/create?fromImage=localhost:1/x&tag=1", "", 500, "address of the server itself"},
		{"POST", "/images/create?fromSrc=http://example.org/x", "", 400, "importing from an address is not supported"},
		{"POST", "/images/create?fromSrc=-&changes=NONSENSE+x", "", 400, "NONSENSE is not a valid change command"},
		{"POST", "/images/create?fromSrc=-&repo=a@sha256:" + strings.Repeat("0", 64), "", 400, "digest reference"},
		{"POST", "/images/load", "this is no archive at all", 400, "the archive can't be read"},
		{"POST", "/images/none/push?tag=1", "", 200, "An image does not exist locally with the tag: none"},
		{"POST", "/images/none/tag?repo=x", "", 404, "No such image: none:latest"},
		{"POST", "/images/none/tag", "", 400, "give a repo"},
		{"POST", "/images/none/tag?repo=sha256", "", 400, "ambiguous tag"},
		{"DELETE", "/images/none", "", 404, "No such image: none:latest"},
		{"POST", `/images/prune?filters={"until":["x"]}`, "", 400, "is neither seconds"},
		{"POST", `/images/prune?filters={"until":["1h","2h"]}`, "", 400, "more than one until"},
		{"POST", "/images/prune", "", 200, `"SpaceReclaimed":0`},
		{"GET", "/v1.44/system/df", "", 200, `"LayersSize":0`},
		{"GET", "/v1.52/system/df", "", 200, `"ImageUsage":{}`},
	} {
		status, body, _ := ask(test.method, test.path, test.body)
		if status != test.status || !strings.Contains(body, test.want) {
			t.Errorf("%s %s: %d %s; want %d %s", test.method, test.path, status, body, test.status, test.want)
		}
	}
	none := serve(t, Config{Version: "test", Nomad: &api.Config{Address: "http://127.0.0.1:1"}})
	if status, body, _ := none("GET", "/images/json", ""); status != http.StatusNotFound || !strings.Contains(body, "--images") {
		t.Errorf("a server without images: %d %s", status, body)
	}
}

// docker login is checked by the registry that it is for. The embedded one gives a token of the namespace of who asks.
func TestLogin(t *testing.T) {
	guarded := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if u, p, ok := r.BasicAuth(); !ok || u != "me" || p != "secret" {
			w.Header().Set("WWW-Authenticate", `Basic realm="guarded"`)
			http.Error(w, `{"errors":[{"code":"UNAUTHORIZED","message":"who are you?"}]}`, http.StatusUnauthorized)
		}
	}))
	t.Cleanup(guarded.Close)
	other := strings.TrimPrefix(guarded.URL, "http://")
	r := openRegistry(t, other)
	own := httptest.NewServer(r.Handler())
	t.Cleanup(own.Close)
	host := strings.TrimPrefix(own.URL, "http://")
	if _, err := imagesOf(t, r, "a").Load(t.Context(), bytes.NewReader(savedImage(t, "app:1", textImage(t, "one")))); err != nil {
		t.Fatal(err)
	}
	ask := serve(t, Config{Version: "test", Nomad: emptyNomad(t), Registry: r, RegistryHost: host, Local: Access{Namespace: "a"}})
	for _, test := range []struct {
		user, password, server string
		status                 int
		want                   string
	}{
		{"me", "secret", other, 200, "Login Succeeded"},
		{"me", "wrong", other, 401, "login attempt to " + other + " failed with status 401: unauthorized"},
		{"", "", "http://" + other + "/v1/", 401, "failed with status 401"},
		{"me", "secret", "127.0.0.1:1", 500, "127.0.0.1:1 can't be reached"},
		{"me", "secret", "NO HOST", 400, "registries must be valid"},
		{"anybody", "anything", host, 200, `"IdentityToken":"`},
	} {
		body, err := json.Marshal(map[string]string{"username": test.user, "password": test.password, "serveraddress": test.server})
		if err != nil {
			t.Fatal(err)
		}
		status, answer, _ := ask("POST", "/auth", string(body))
		if status != test.status || !strings.Contains(answer, test.want) {
			t.Errorf("login of %s to %s: %d %s; want %d %s", test.user, test.server, status, answer, test.status, test.want)
		}
		if test.server != host {
			continue
		}
		var a struct{ IdentityToken string }
		if err := json.Unmarshal([]byte(answer), &a); err != nil {
			t.Fatal(err)
		}
		token := remote.WithAuth(authn.FromConfig(authn.AuthConfig{IdentityToken: a.IdentityToken}))
		for namespace, allowed := range map[string]bool{"a": true, "b": false} {
			ref, err := name.NewTag(host+"/"+namespace+"/docker.io/library/new:1", name.Insecure)
			if err != nil {
				t.Fatal(err)
			}
			if err := remote.Write(ref, textImage(t, "two"), token); (err == nil) != allowed {
				t.Errorf("push to namespace %s: %v", namespace, err)
			}
		}
	}
	if _, err := imagesOf(t, r, "a").Resolve(t.Context(), "new:1"); err != nil {
		t.Error(err)
	}
}

func imagesOf(t *testing.T, r *registry.Registry, namespace string) *registry.Images {
	t.Helper()
	i, err := r.Images(namespace)
	if err != nil {
		t.Fatal(err)
	}
	return i
}

// An error that comes when the answer has begun stands in it.
func TestPullBreaks(t *testing.T) {
	layers, err := textImage(t, "one").Layers()
	if err != nil {
		t.Fatal(err)
	}
	missing, err := layers[0].Digest()
	if err != nil {
		t.Fatal(err)
	}
	other := upstreamregistry.New(upstreamregistry.Logger(log.New(io.Discard, "", 0)))
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodGet && strings.HasSuffix(r.URL.Path, missing.String()) {
			http.Error(w, `{"errors":[{"code":"BLOB_UNKNOWN","message":"gone"}]}`, http.StatusNotFound)
			return
		}
		other.ServeHTTP(w, r)
	}))
	t.Cleanup(s.Close)
	host := strings.TrimPrefix(s.URL, "http://")
	push(t, host+"/app:1", textImage(t, "one"))
	ask := serve(t, Config{Version: "test", Nomad: emptyNomad(t), Registry: openRegistry(t, host)})
	status, body, header := ask("POST", "/images/create?fromImage="+host+"/app&tag=1", "")
	if status != http.StatusOK || header.Get("Content-Type") != "application/json" {
		t.Errorf("%d, %s", status, header)
	}
	var last struct {
		Error       string
		ErrorDetail struct{ Message string }
	}
	lines := json.NewDecoder(strings.NewReader(body))
	for {
		if err := lines.Decode(&last); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
	}
	if !strings.Contains(last.Error, "gone") || last.ErrorDetail.Message != last.Error {
		t.Errorf("%s", body)
	}
}

// savedImage is an archive of docker save's.
func savedImage(t testing.TB, ref string, img v1.Image) []byte {
	t.Helper()
	n, err := name.NewTag(ref)
	if err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	if err := tarball.Write(n, img, &b); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}
