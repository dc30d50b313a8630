package server

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/nomad/api"
)

// nomadOf is an HTTP server in Nomad's place where one answer of it matters.
func nomadOf(t *testing.T, h http.HandlerFunc) *api.Config {
	t.Helper()
	n := httptest.NewServer(h)
	t.Cleanup(n.Close)
	return &api.Config{Address: n.URL}
}

// emptyNomad has nothing, and tells of no changes.
func emptyNomad(t *testing.T) *api.Config {
	t.Helper()
	return nomadOf(t, answerNothing)
}

func answerNothing(w http.ResponseWriter, r *http.Request) {
	if r.URL.Path == "/v1/event/stream" {
		_ = http.NewResponseController(w).Flush()
		<-r.Context().Done()
		return
	}
	if strings.HasPrefix(r.URL.Path, "/v1/var/") {
		http.NotFound(w, r)
		return
	}
	_, _ = io.WriteString(w, "[]")
}

// serve starts a server on a unix socket and returns how to ask it.
func serve(t *testing.T, c Config) (ask func(method, path, body string) (int, string, http.Header)) {
	t.Helper()
	socket := startUnix(t, c)
	client := &http.Client{Transport: &http.Transport{DialContext: func(context.Context, string, string) (net.Conn, error) {
		return net.Dial("unix", socket)
	}}}
	t.Cleanup(client.CloseIdleConnections)
	return asker(t, client, "http://docker")
}

// startUnix starts a server on a unix socket.
func startUnix(t *testing.T, c Config) (socket string) {
	t.Helper()
	dir, err := os.MkdirTemp("", "dapi")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	socket = filepath.Join(dir, "s")
	l, err := ListenUnix(socket, "")
	if err != nil {
		t.Fatal(err)
	}
	start(t, c, l)
	return socket
}

func start(t *testing.T, c Config, l net.Listener) {
	t.Helper()
	c.Log = slog.New(slog.NewTextHandler(io.Discard, nil))
	if c.Local.Namespace == "" {
		c.Local.Namespace = "default"
	}
	s, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Serve(ctx, l) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		s.Close()
	})
}

func asker(t *testing.T, client *http.Client, base string) func(method, path, body string) (int, string, http.Header) {
	return func(method, path, body string) (int, string, http.Header) {
		t.Helper()
		r, err := http.NewRequestWithContext(t.Context(), method, base+path, strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		if body != "" {
			r.Header.Set("Content-Type", "application/json")
		}
		a, err := client.Do(r)
		if err != nil {
			return 0, err.Error(), nil
		}
		defer a.Body.Close()
		data, err := io.ReadAll(a.Body)
		if err != nil {
			t.Fatal(err)
		}
		return a.StatusCode, string(data), a.Header
	}
}

func TestRoutes(t *testing.T) {
	ask := serve(t, Config{Version: "test", Nomad: &api.Config{Address: "http://127.0.0.1:1"}})
	for _, test := range []struct {
		method, path string
		status       int
		want         string
	}{
		{"GET", "/_ping", 200, "OK"},
		{"HEAD", "/_ping", 200, ""},
		{"GET", "/v1.40/_ping", 200, "OK"},
		{"GET", "/v1.56/version", 200, `"MinAPIVersion":"1.40"`}, // Nomad is down, which is no reason to say nothing
		{"GET", "/v1.39/_ping", 400, "client version 1.39 is too old. Minimum supported API version is 1.40"},
		{"GET", "/v1.57/_ping", 400, "client version 1.57 is too new. Maximum supported API version is 1.56"},
		{"GET", "/v1.x/_ping", 404, "page not found"},
		{"GET", "/nothing", 404, "page not found"},
		{"POST", "/v1.50/build", 501, "images are not built here"},
		{"GET", "/swarm", 501, "this is no swarm"},
		{"GET", "/secrets/x", 404, "No such secret: x"},
		{"GET", "/info", 503, "Nomad does not answer"},
	} {
		status, body, header := ask(test.method, test.path, "")
		if status != test.status || !strings.Contains(body, test.want) {
			t.Errorf("%s %s: %d %s, want %d %s", test.method, test.path, status, body, test.status, test.want)
		}
		if status >= 400 {
			var e struct{ Message string }
			if err := json.Unmarshal([]byte(body), &e); err != nil || e.Message == "" {
				t.Errorf("%s %s: %s is no error in docker's shape", test.method, test.path, body)
			}
		}
		if header.Get("Api-Version") != "1.56" {
			t.Errorf("%s %s: Api-Version is %q", test.method, test.path, header.Get("Api-Version"))
		}
	}
}

// What Nomad refuses, and why it can't act, is told with the status that fits.
func TestNomadsErrors(t *testing.T) {
	for _, test := range []struct {
		status int
		body   string
		want   int
		text   string
	}{
		{500, "No cluster leader", 503, "No cluster leader"},
		{500, "Permission denied", 500, "Permission denied"},
		{500, "something else", 500, "Nomad: something else"},
	} {
		ask := serve(t, Config{Nomad: nomadOf(t, func(w http.ResponseWriter, _ *http.Request) { http.Error(w, test.body, test.status) })})
		if status, body, _ := ask("GET", "/info", ""); status != test.want || !strings.Contains(body, test.text) {
			t.Errorf("Nomad answers %d %s: %d %s", test.status, test.body, status, body)
		}
	}
}

func TestSocket(t *testing.T) {
	dir := t.TempDir()
	if len(dir) > 90 {
		dir = "/tmp"
	}
	path := filepath.Join(dir, "docker.sock")
	l, err := ListenUnix(path, "")
	if err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("the socket: %v %v", info, err)
	}
	if _, err := ListenUnix(path, ""); err == nil || !strings.Contains(err.Error(), "another process listens") {
		t.Errorf("a second listener: %v", err)
	}
	l.(*unixListener).UnixListener.Close() // killed: the socket stays
	again, err := ListenUnix(path, "")
	if err != nil {
		t.Fatalf("after a kill: %v", err)
	}
	again.Close()
	if _, err := os.Stat(path); err == nil {
		t.Error("the socket outlives its listener")
	}
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := ListenUnix(path, ""); err == nil {
		t.Error("a file is replaced by the socket")
	}
}

// An authority signs the certificates of tests.
type authority struct {
	t    *testing.T
	dir  string
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newAuthority(t *testing.T) *authority {
	t.Helper()
	a := &authority{t: t, dir: t.TempDir()}
	var err error
	if a.key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	der, err := x509.CreateCertificate(rand.Reader, template, template, a.key.Public(), a.key)
	if err != nil {
		t.Fatal(err)
	}
	if a.cert, err = x509.ParseCertificate(der); err != nil {
		t.Fatal(err)
	}
	a.write("ca.pem", "CERTIFICATE", der)
	return a
}

func (a *authority) write(name, kind string, der []byte) string {
	path := filepath.Join(a.dir, name)
	if err := os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600); err != nil {
		a.t.Fatal(err)
	}
	return path
}

// files makes a certificate for a name.
func (a *authority) files(name string) TLSFiles {
	a.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		a.t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: name}, NotAfter: time.Now().Add(time.Hour),
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, a.cert, key.Public(), a.key)
	if err != nil {
		a.t.Fatal(err)
	}
	private, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		a.t.Fatal(err)
	}
	return TLSFiles{CA: filepath.Join(a.dir, "ca.pem"), Cert: a.write("cert-"+name, "CERTIFICATE", der), Key: a.write("key-"+name, "PRIVATE KEY", private)}
}

func (a *authority) client(f TLSFiles) *http.Client {
	a.t.Helper()
	c := &tls.Config{RootCAs: x509.NewCertPool()}
	c.RootCAs.AddCert(a.cert)
	if f.Cert != "" {
		cert, err := tls.LoadX509KeyPair(f.Cert, f.Key)
		if err != nil {
			a.t.Fatal(err)
		}
		c.Certificates = []tls.Certificate{cert}
	}
	client := &http.Client{Transport: &http.Transport{TLSClientConfig: c}}
	a.t.Cleanup(client.CloseIdleConnections)
	return client
}

// Each certificate's name leads to its own namespace and token; whoever has none, or another authority's, gets nothing.
func TestIdentities(t *testing.T) {
	a := newAuthority(t)
	list := filepath.Join(a.dir, "clients.json")
	write := func(text string) {
		t.Helper()
		if err := os.WriteFile(list, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	token := filepath.Join(a.dir, "token")
	if err := os.WriteFile(token, []byte("secret-of-alice\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	write(`{"clients": {"alice": {"namespace": "team-a", "tokenFile": "` + token + `"}}}`)
	l, err := ListenTLS("127.0.0.1:0", a.files("server"))
	if err != nil {
		t.Fatal(err)
	}
	start(t, Config{Clients: list, Nomad: nomadOf(t, func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("X-Nomad-Token") != "secret-of-alice" || r.URL.Query().Get("namespace") != "team-a" {
			w.WriteHeader(http.StatusForbidden)
			return
		}
		answerNothing(w, r)
	})}, l)
	url := "https://" + l.Addr().String()

	alice := asker(t, a.client(a.files("alice")), url)
	if status, body, _ := alice("GET", "/info", ""); status != 200 || !strings.Contains(body, "nomad.namespace=team-a") {
		t.Errorf("alice: %d %s", status, body)
	}
	mallory := asker(t, a.client(a.files("mallory")), url)
	if status, body, _ := mallory("GET", "/info", ""); status != 403 || !strings.Contains(body, `client \"mallory\" has no namespace here`) {
		t.Errorf("mallory: %d %s", status, body)
	}
	if status, body, _ := asker(t, a.client(TLSFiles{}), url)("GET", "/_ping", ""); status != 0 || !strings.Contains(body, "certificate") {
		t.Errorf("without a certificate: %d %s", status, body)
	}
	foreign := newAuthority(t).files("alice")
	if status, body, _ := asker(t, a.client(foreign), url)("GET", "/_ping", ""); status != 0 || !strings.Contains(body, "tls") {
		t.Errorf("with another authority's certificate: %d %s", status, body)
	}
	// The list is read anew when it changes.
	write(`{"clients": {"mallory2": {"namespace": "team-a", "tokenFile": "` + token + `"}}}`)
	if status, _, _ := alice("GET", "/info", ""); status != 403 {
		t.Errorf("alice, who is not in the list any more: %d", status)
	}
}

func TestParseClients(t *testing.T) {
	for text, want := range map[string]string{
		`{}`:                                     "there are no clients in it",
		`{"clients": {"a": {}}}`:                 "client a: namespace and tokenFile are both needed",
		`{"clients": {"a": {"tokenfiel": "x"}}}`: "tokenfiel",
		`{"clients": {"": {"namespace": "n", "tokenFile": "f"}}}`: "a client has no name",
		`nonsense`: "invalid character",
	} {
		if _, err := parseClients([]byte(text)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v; want %s", text, err, want)
		}
	}
}
