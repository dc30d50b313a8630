package registry

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/rsa"
	"encoding/json"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"
)

// A front is a registry's own HTTP side.
type front struct {
	t    *testing.T
	host string
}

func serve(t *testing.T, r *Registry) front {
	t.Helper()
	s := httptest.NewServer(r.Handler())
	t.Cleanup(s.Close)
	return front{t, strings.TrimPrefix(s.URL, "http://")}
}

// bearer exchanges a password.
func (f front) bearer(password string) (token string, status int) {
	f.t.Helper()
	req, _ := http.NewRequest(http.MethodGet, "http://"+f.host+"/token?service="+Service, nil)
	req.SetBasicAuth("anybody", password)
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		f.t.Fatal(err)
	}
	defer resp.Body.Close()
	var body struct{ Token string }
	if resp.StatusCode == http.StatusOK {
		if err := json.NewDecoder(resp.Body).Decode(&body); err != nil {
			f.t.Fatal(err)
		}
	}
	return body.Token, resp.StatusCode
}

func (f front) do(method, path, token string, header ...string) (status int, body string) {
	f.t.Helper()
	req, err := http.NewRequest(method, "http://"+f.host+path, nil)
	if err != nil {
		f.t.Fatal(err)
	}
	if token != "" {
		req.Header.Set("Authorization", "Bearer "+token)
	}
	for i := 0; i < len(header); i += 2 {
		req.Header.Set(header[i], header[i+1])
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		f.t.Fatal(err)
	}
	defer resp.Body.Close()
	data, _ := io.ReadAll(resp.Body)
	return resp.StatusCode, string(data)
}

func token(t *testing.T, r *Registry, g Grant) string {
	t.Helper()
	s, err := r.Token(g, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

const anyManifest = "application/vnd.docker.distribution.manifest.v2+json"

// Whatever a namespace's token is tried on, it reaches nothing of another one's.
func TestTokens(t *testing.T) {
	r := open(t)
	f := serve(t, r)
	for _, ns := range []string{"a", "b"} {
		load(t, images(t, r, ns), "app:1", newImage(t, "linux/amd64", "of "+ns))
	}
	i, err := images(t, r, "b").Resolve(t.Context(), "app:1")
	if err != nil {
		t.Fatal(err)
	}
	layer, manifest := i.Layers[0].Digest.String(), i.Manifest.Digest.String()
	full, _ := f.bearer(token(t, r, Grant{Namespace: "a", Push: true}))
	reader, _ := f.bearer(token(t, r, Grant{Namespace: "b"}))
	narrow, _ := f.bearer(token(t, r, Grant{Namespace: "b", Repositories: []string{"docker.io/library/other"}}))
	expired, err := r.sign(Grant{Namespace: "b", Push: true}, -time.Minute, Service)
	if err != nil {
		t.Fatal(err)
	}
	other := open(t)
	foreign, err := other.sign(Grant{Namespace: "b", Push: true}, time.Hour, Service)
	if err != nil {
		t.Fatal(err)
	}
	login := token(t, r, Grant{Namespace: "b", Push: true})
	for _, test := range []struct {
		what, method, path, token string
		status                    int
	}{
		{"a pull of one's own", "GET", "/v2/b/docker.io/library/app/manifests/1", reader, 200},
		{"one's own tags", "GET", "/v2/b/docker.io/library/app/tags/list", reader, 200},
		{"one's own blob", "GET", "/v2/b/docker.io/library/app/blobs/" + layer, reader, 200},
		{"nobody", "GET", "/v2/b/docker.io/library/app/manifests/1", "", 401},
		{"nobody, the base", "GET", "/v2/", "", 401},
		{"the base", "GET", "/v2/", reader, 200},
		{"another's manifest", "GET", "/v2/b/docker.io/library/app/manifests/1", full, 401},
		{"another's manifest by digest", "GET", "/v2/b/docker.io/library/app/manifests/" + manifest, full, 401},
		{"another's blob", "GET", "/v2/b/docker.io/library/app/blobs/" + layer, full, 401},
		{"another's blob in one's own repository", "GET", "/v2/a/docker.io/library/app/blobs/" + layer, full, 404},
		{"another's manifest in one's own repository", "GET", "/v2/a/docker.io/library/app/manifests/" + manifest, full, 404},
		{"another's tags", "GET", "/v2/b/docker.io/library/app/tags/list", full, 401},
		{"the catalog", "GET", "/v2/_catalog", full, 401},
		{"an upload to another", "POST", "/v2/b/docker.io/library/app/blobs/uploads/", full, 401},
		{"a mount from another", "POST", "/v2/a/docker.io/library/app/blobs/uploads/?mount=" + layer + "&from=b/docker.io/library/app", full, 401},
		{"a mount to another", "POST", "/v2/b/docker.io/library/app/blobs/uploads/?mount=" + layer + "&from=a/docker.io/library/app", full, 401},
		{"a manifest for another", "PUT", "/v2/b/docker.io/library/app/manifests/2", full, 401},
		{"a delete of another's", "DELETE", "/v2/b/docker.io/library/app/manifests/" + manifest, full, 405},
		{"a delete of one's own", "DELETE", "/v2/b/docker.io/library/app/manifests/" + manifest, reader, 405},
		{"an upload with a reader's token", "POST", "/v2/b/docker.io/library/app/blobs/uploads/", reader, 401},
		{"an upload of one's own", "POST", "/v2/a/docker.io/library/app/blobs/uploads/", full, 202},
		{"a repository that begins as another namespace", "POST", "/v2/ab/docker.io/library/app/blobs/uploads/", full, 401},
		{"a repository outside of namespaces", "POST", "/v2/a/blobs/uploads/", full, 401},
		{"dots", "GET", "/v2/a/../b/docker.io/library/app/manifests/1", full, 401},
		{"another repository than the token's", "GET", "/v2/b/docker.io/library/app/manifests/1", narrow, 401},
		{"an expired token", "GET", "/v2/b/docker.io/library/app/manifests/1", expired, 401},
		{"another server's token", "GET", "/v2/b/docker.io/library/app/manifests/1", foreign, 401},
		{"a login token, not exchanged", "GET", "/v2/b/docker.io/library/app/manifests/1", login, 401},
		{"rubbish", "GET", "/v2/b/docker.io/library/app/manifests/1", "x.y.z", 401},
		{"no signature", "GET", "/v2/b/docker.io/library/app/manifests/1", strings.Join(append(strings.Split(reader, ".")[:2], ""), "."), 401},
	} {
		if status, body := f.do(test.method, test.path, test.token, "Accept", anyManifest); status != test.status {
			t.Errorf("%s: %d, want %d: %.200s", test.what, status, test.status, body)
		}
	}
	for what, password := range map[string]string{"nothing": "", "a bearer token": full, "rubbish": "x", "an endless one": strings.Repeat("x", 100000)} {
		if _, status := f.bearer(password); status != http.StatusUnauthorized {
			t.Errorf("%s as a password: %d", what, status)
		}
	}
	if status, _ := f.do(http.MethodPut, "/token", ""); status != http.StatusMethodNotAllowed {
		t.Errorf("PUT /token: %d", status)
	}
	for what, form := range map[string]struct {
		values url.Values
		status int
	}{
		"the token of a login":    {url.Values{"grant_type": {"refresh_token"}, "refresh_token": {login}}, 200},
		"a token as the password": {url.Values{"grant_type": {"password"}, "username": {"x"}, "password": {login}}, 200},
		"a bearer token":          {url.Values{"grant_type": {"refresh_token"}, "refresh_token": {full}}, 401},
		"nothing":                 {url.Values{}, 401},
		"too much":                {url.Values{"grant_type": {"refresh_token"}, "refresh_token": {strings.Repeat("x", 1<<20)}}, 401},
	} {
		answer, err := http.PostForm("http://"+f.host+"/token", form.values)
		if err != nil {
			t.Fatal(err)
		}
		answer.Body.Close()
		if answer.StatusCode != form.status {
			t.Errorf("POST /token with %s: %d", what, answer.StatusCode)
		}
	}
}

// Ordinary clients push to the registry and pull from it with a token as the password, and docker images shows what they have pushed.
func TestClientOfTheRegistry(t *testing.T) {
	r := open(t)
	f := serve(t, r)
	img := newImage(t, "linux/amd64", "base", "pushed")
	ref, err := name.NewTag(f.host+"/team/docker.io/library/app:1", name.Insecure)
	if err != nil {
		t.Fatal(err)
	}
	auth := remote.WithAuth(&authn.Basic{Username: "x", Password: token(t, r, Grant{Namespace: "team", Push: true})})
	if err := remote.Write(ref, img, auth); err != nil {
		t.Fatal(err)
	}
	idx := index(map[string]v1.Image{"linux/amd64": img, "linux/arm64": newImage(t, "linux/arm64", "arm")})
	multi, _ := name.NewTag(f.host+"/team/docker.io/library/multi:1", name.Insecure)
	if err := remote.WriteIndex(multi, idx, auth); err != nil {
		t.Fatal(err)
	}
	s := images(t, r, "team")
	if got, want := list(t, s), id(t, img)[7:19]+" app:1 multi:1"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	i, err := s.Inspect(t.Context(), "app:1")
	if err != nil {
		t.Fatal(err)
	}
	if size, err := s.Size(t.Context(), i); err != nil || size != int64(len("base"+"pushed")) {
		t.Errorf("size %d, %v", size, err)
	}
	node, err := name.NewDigest(i.NodeReference(f.host), name.Insecure)
	if err != nil {
		t.Fatal(err)
	}
	pulled, err := remote.Image(node, remote.WithAuth(&authn.Basic{Username: "node", Password: token(t, r, Grant{Namespace: "team", Repositories: []string{strings.TrimPrefix(i.WorkloadAudience(), Service+"/")}})}))
	if err != nil {
		t.Fatal(err)
	}
	if id(t, pulled) != id(t, img) {
		t.Errorf("the node has %s", id(t, pulled))
	}
	if _, err := s.Remove(t.Context(), "multi:1", false, nil); err != nil {
		t.Fatal(err)
	}
	if got, want := list(t, s), id(t, img)[7:19]+" app:1"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}

// A task pulls with the identity that Nomad gives it, and only what its audience names.
func TestWorkloadIdentities(t *testing.T) {
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	public := jose.JSONWebKey{Key: key.Public(), KeyID: "nomad-1", Algorithm: "RS256", Use: "sig"}
	r := open(t, func(c *Config) {
		c.WorkloadKeys = func(context.Context) (*jose.JSONWebKeySet, error) {
			return &jose.JSONWebKeySet{Keys: []jose.JSONWebKey{public}}, nil
		}
	})
	f := serve(t, r)
	load(t, images(t, r, "a"), "app:1", newImage(t, "linux/amd64", "of a"))
	identity := func(namespace, audience string, valid time.Duration, kid string, alg jose.SignatureAlgorithm, key any) string {
		s, err := jose.NewSigner(jose.SigningKey{Algorithm: alg, Key: jose.JSONWebKey{Key: key, KeyID: kid}}, nil)
		if err != nil {
			t.Fatal(err)
		}
		c := map[string]any{"nomad_namespace": namespace, "nomad_job_id": "web", "nomad_task": "web", "sub": "global:a:web:web:web:registry", "aud": audience, "iat": time.Now().Unix(), "nbf": time.Now().Unix()}
		if valid != 0 {
			c["exp"] = time.Now().Add(valid).Unix()
		}
		raw, err := jwt.Signed(s).Claims(c).Serialize()
		if err != nil {
			t.Fatal(err)
		}
		return raw
	}
	const audience = Service + "/docker.io/library/app"
	good, status := f.bearer(identity("a", audience, time.Hour, "nomad-1", jose.RS256, key))
	if status != http.StatusOK {
		t.Fatalf("%d", status)
	}
	for path, want := range map[string]int{"/v2/a/docker.io/library/app/manifests/1": 200, "/v2/a/docker.io/library/other/manifests/1": 401, "/v2/b/docker.io/library/app/manifests/1": 401} {
		if status, body := f.do(http.MethodGet, path, good, "Accept", anyManifest); status != want {
			t.Errorf("%s: %d, want %d: %s", path, status, want, body)
		}
	}
	if status, _ := f.do(http.MethodPost, "/v2/a/docker.io/library/app/blobs/uploads/", good); status != http.StatusUnauthorized {
		t.Errorf("a task may push: %d", status)
	}
	_, ed, _ := ed25519.GenerateKey(rand.Reader)
	for what, token := range map[string]string{
		"another audience":    identity("a", "vault.io", time.Hour, "nomad-1", jose.RS256, key),
		"expired":             identity("a", audience, -time.Hour, "nomad-1", jose.RS256, key),
		"endless":             identity("a", audience, 0, "nomad-1", jose.RS256, key),
		"no namespace":        identity("", audience, time.Hour, "nomad-1", jose.RS256, key),
		"unknown key":         identity("a", audience, time.Hour, "nomad-2", jose.RS256, key),
		"another's signature": identity("a", audience, time.Hour, "nomad-1", jose.EdDSA, ed),
		"symmetric":           identity("a", audience, time.Hour, "nomad-1", jose.HS256, []byte(strings.Repeat("k", 32))),
	} {
		if _, status := f.bearer(token); status != http.StatusUnauthorized {
			t.Errorf("%s: %d", what, status)
		}
	}
}
