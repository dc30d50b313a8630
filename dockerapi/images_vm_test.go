//go:build vm

package main

import (
	"archive/tar"
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	upstreamregistry "github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"

	"github.com/cradlestack/cradlestack/internal/nomadtest"
	"github.com/cradlestack/cradlestack/test/programs"
)

// saying is busybox with a layer on top, whose file /says has the text, and a command that shows it.
func saying(t *testing.T, text string) v1.Image {
	t.Helper()
	dir, err := programs.Image("busybox")
	if err != nil {
		t.Fatal(err)
	}
	img, err := programs.OnlyImage(dir)
	if err != nil {
		t.Fatal(err)
	}
	data := tarFile(t, "says", text)
	layer, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(data)), nil })
	if err != nil {
		t.Fatal(err)
	}
	if img, err = mutate.AppendLayers(img, layer); err != nil {
		t.Fatal(err)
	}
	c, err := img.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	c = c.DeepCopy()
	c.Config.Entrypoint, c.Config.Cmd = nil, []string{"cat", "/says"}
	if img, err = mutate.ConfigFile(img, c); err != nil {
		t.Fatal(err)
	}
	return img
}

// archive is an image as docker save writes it.
func archive(t *testing.T, ref string, img v1.Image) string {
	t.Helper()
	n, err := name.NewTag(ref)
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "image.tar")
	if err := tarball.WriteToFile(path, n, img); err != nil {
		t.Fatal(err)
	}
	return path
}

// tell writes an image to a registry in the node.
func tell(t *testing.T, n *nomadtest.Node, ref string, img v1.Image, auth authn.Authenticator) {
	t.Helper()
	to, err := name.NewTag(ref, name.Insecure)
	if err != nil {
		t.Fatal(err)
	}
	if err := remote.Write(to, img, remote.WithAuth(auth), remote.WithTransport(n.HTTP().Transport)); err != nil {
		t.Fatal(err)
	}
}

// loginOf is what docker login has left in docker's configuration.
func (h *host) loginOf(registry string) authn.Authenticator {
	h.t.Helper()
	data, err := os.ReadFile(filepath.Join(h.config, "config.json"))
	if err != nil {
		h.t.Fatal(err)
	}
	var c struct{ Auths map[string]authn.AuthConfig }
	if err := json.Unmarshal(data, &c); err != nil {
		h.t.Fatal(err)
	}
	a, ok := c.Auths[registry]
	if !ok || a.IdentityToken == "" {
		h.t.Fatalf("there is no token for %s: %s", registry, data)
	}
	return authn.FromConfig(a)
}

const (
	plainRegistry = "127.0.0.1:5000"
	otherRegistry = "127.0.0.1:5001" // where images come from
)

// Images come in by load, pull and push, and a node pulls them by their digest with its task's identity.
func TestVMNodePulls(t *testing.T) {
	h := openBeside(t, "--images", t.TempDir(), "--registry-listen", plainRegistry, "--insecure-registry", otherRegistry)
	node := h.c.Server()
	l, err := node.Listen("tcp", otherRegistry)
	if err != nil {
		t.Fatal(err)
	}
	other := &http.Server{Handler: upstreamregistry.New(upstreamregistry.Logger(log.New(io.Discard, "", 0)))}
	go other.Serve(l)
	t.Cleanup(func() { other.Close() })

	h.want("Loaded image: loaded:1", "load", "-q", "-i", archive(t, "loaded:1", saying(t, "loaded")))
	tell(t, node, otherRegistry+"/team/app:1", saying(t, "pulled"), authn.Anonymous)
	h.run("pull", otherRegistry+"/team/app:1")
	h.run("login", "-u", "anybody", "-p", "anything", plainRegistry)
	tell(t, node, plainRegistry+"/"+h.space+"/docker.io/library/pushed:1", saying(t, "pushed"), h.loginOf(plainRegistry))

	h.want("loaded", "run", "--rm", "loaded:1")
	h.want("pulled", "run", "--rm", otherRegistry+"/team/app:1")
	digest := h.run("image", "inspect", "-f", "{{index .RepoDigests 0}}", otherRegistry+"/team/app:1")
	h.want("pulled", "run", "--name", "by-digest", digest)
	h.want(h.run("image", "inspect", "-f", "{{.Id}}", digest)+" "+digest, "inspect", "-f", "{{.Image}} {{.Config.Image}}", "by-digest")
	h.want(digest, "ps", "-a", "--filter", "ancestor="+digest, "--no-trunc", "--format", "{{.Image}}")
	h.want("pushed", "run", "--name", "kept", "pushed:1")
	id := h.run("image", "inspect", "-f", "{{.Id}}", "pushed:1")
	h.want(id+" pushed:1", "inspect", "-f", "{{.Image}} {{.Config.Image}}", "kept")
	// A pod is bound to what its name meant then.
	h.run("tag", "loaded:1", "pushed:1")
	h.want("pushed", "start", "-a", "kept")
	h.want("loaded", "run", "--rm", "pushed:1")
	h.want("pushed", "run", "--rm", id)
}

// tarFile is a tar with one file.
func tarFile(t *testing.T, name, text string) []byte {
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

// certified makes a certificate for an address, which is its own authority's.
func certified(t *testing.T, dir string, ip net.IP) (ca, cert, key string) {
	t.Helper()
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature, IPAddresses: []net.IP{ip}, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, private.Public(), private)
	if err != nil {
		t.Fatal(err)
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		t.Fatal(err)
	}
	for path, b := range map[string]*pem.Block{"cert.pem": {Type: "CERTIFICATE", Bytes: der}, "key.pem": {Type: "PRIVATE KEY", Bytes: pkcs8}} {
		if err := os.WriteFile(filepath.Join(dir, path), pem.EncodeToMemory(b), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	cert = filepath.Join(dir, "cert.pem")
	return cert, cert, filepath.Join(dir, "key.pem")
}

// trusted are the authorities of Debian's hosts.
const trusted = "/etc/ssl/certs/ca-certificates.crt"

// With TLS, nodes have to trust the registry's certificate; it is at their server's address then.
func TestVMNodePullsWithTLS(t *testing.T) {
	dir, c := t.TempDir(), openCluster(t)
	node := c.Server()
	ca, cert, key := certified(t, dir, node.IP.AsSlice())
	mounted := func(args ...string) {
		t.Helper()
		if out, err := node.Output(t.Context(), args[0], args[1:]...); err != nil {
			t.Fatal(err, out)
		}
	}
	mounted("mount", "--bind", ca, trusted)
	defer mounted("umount", "--lazy", trusted) // somebody may be reading it
	address := node.IP.String() + ":5443"
	h := openHostOn(t, c, "--images", dir, "--registry-listen", "0.0.0.0:5443", "--registry-url", "https://"+address, "--registry-cert", cert, "--registry-key", key)
	h.run("load", "-i", archive(t, "loaded:1", saying(t, "with TLS")))
	h.want("with TLS", "run", "--rm", "loaded:1")
}

// What containers are made from stays as long as they do, and is told as dockerd tells it.
func TestVMImagesInUse(t *testing.T) {
	h := openBeside(t, "--images", t.TempDir(), "--registry-listen", "127.0.0.1:5002")
	id := map[string]string{}
	for _, name := range []string{"running", "idle", "spare"} {
		h.run("load", "-i", archive(t, name+":1", saying(t, name)))
		id[name] = h.run("images", "-q", "--no-trunc", name)
	}
	up, idle := h.run("run", "-d", "running:1", "sleep", "1000"), h.run("create", "--name", "idle", "idle:1")
	// Nothing is built here, and so there is no cache of it that docker system prune could not remove.
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "Dockerfile"), []byte("FROM running:1\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	h.wantError(1, "images are not built here: build with docker buildx on your own machine .*docker load", "build", dir)
	h.want("Total reclaimed space: 0B", "system", "prune", "-f", "--filter", "label=nobody=has-it")
	used := "conflict: unable to remove repository reference \"%s:1\" .must force. - container %.12s is using its referenced image %.12s"
	h.wantError(1, fmt.Sprintf(used, "running", up, id["running"][7:]), "rmi", "running:1")
	h.wantError(1, fmt.Sprintf(used, "idle", idle, id["idle"][7:]), "rmi", "idle:1")
	h.wantError(1, "cannot be forced. - image is being used by running container "+up[:12], "rmi", id["running"])
	h.wantError(1, "cannot be forced. - image is being used by running container "+up[:12], "rmi", "-f", id["running"])
	h.wantError(1, "must be forced. - image is being used by stopped container "+idle[:12], "rmi", id["idle"])

	h.want("Untagged: running:1", "rmi", "-f", "running:1")
	h.want(id["running"][7:19], "ps", "--filter", "id="+up, "--format", "{{.Image}}")
	h.run("tag", id["running"], "running:1")
	h.want(up, "ps", "-q", "--no-trunc", "--filter", "ancestor=running:1")
	h.want(idle, "ps", "-aq", "--no-trunc", "--filter", "ancestor="+id["idle"][7:19])
	h.want("", "ps", "-aq", "--filter", "ancestor=spare:1")
	h.want("Images 3 2\nContainers 2 1", "system", "df", "--format", "{{if or (eq .Type \"Images\") (eq .Type \"Containers\")}}{{.Type}} {{.TotalCount}} {{.Active}}{{end}}")

	// A name that means another image now shows neither the container nor its image.
	h.run("tag", "spare:1", "idle:1")
	h.want(id["idle"][7:19], "ps", "-a", "--filter", "name=idle", "--format", "{{.Image}}")
	h.want(id["idle"]+" idle:1", "inspect", "-f", "{{.Image}} {{.Config.Image}}", "idle")
	h.want("", "ps", "-aq", "--filter", "ancestor=idle:1")

	h.run("image", "prune", "-af")
	h.want("idle", "run", "--rm", id["idle"])
	h.want(id["idle"], "images", "-q", "--no-trunc", "--filter", "dangling=true")
	h.want("running", "images", "--filter", "dangling=false", "--format", "{{.Repository}}")
	h.want("idle", "start", "-a", "idle")
	h.run("rm", "idle")
	h.run("image", "prune", "-af")
	h.want("running", "images", "--format", "{{.Repository}}")
	h.run("rm", "-f", up)
	h.run("rmi", "running:1")
}

// What a container has changed becomes an image's layer: while it runs, after it, and before.
func TestVMCommit(t *testing.T) {
	h := openBeside(t, "--images", t.TempDir(), "--registry-listen", "127.0.0.1:5003")
	h.run("load", "-i", archive(t, "base:1", saying(t, "base")))
	h.run("run", "-d", "--name", "made", "-e", "A=1", "-v", "/volume", "base:1", "sh", "-c",
		"mkdir -p /made/dir; echo new >/made/file; ln /made/file /made/hard; ln -s file /made/soft; chmod 700 /made/dir; rm /says; echo no >/volume/file; chown 5:6 /made/hard; sleep 1000")
	h.until("the container's files", func() bool {
		out, _ := h.try("", "exec", "made", "stat", "-c", "%u", "/made/hard")
		return out == "5\n"
	})
	id := h.run("commit", "-a", "me <me@example.org>", "-m", "why", "-c", `CMD ["cat","/made/soft"]`, "-c", "ENV B=2", "-c", "LABEL tier=front", "made", "committed:1")
	h.want("running", "inspect", "-f", "{{.State.Status}}", "made")
	h.want(id+" me <me@example.org> why [cat /made/soft] 3 front", "image", "inspect", "-f",
		"{{.Id}} {{.Author}} {{.Comment}} {{.Config.Cmd}} {{len .RootFS.Layers}} {{.Config.Labels.tier}}", "committed:1")
	h.want("new", "run", "--rm", "committed:1")
	h.want("700 5 6 2 1 2", "run", "--rm", "committed:1", "sh", "-c", "echo $(stat -c %a /made/dir) $(stat -c '%u %g %h' /made/file) $A $B; test ! -e /says; test ! -e /volume/file")
	h.run("exec", "made", "sh", "-c", "echo later >/made/file")
	h.run("kill", "made")
	h.forgotten("made")
	h.run("commit", "made", "committed:2")
	h.want("later", "run", "--rm", "committed:2", "cat", "/made/soft")
	h.run("create", "--name", "never", "base:1")
	h.run("commit", "never", "committed:3")
	h.want("base", "run", "--rm", "committed:3")
	h.wantError(1, "No such container: none", "commit", "none", "x:1")
	h.wantError(1, "NONSENSE is not a valid change command", "commit", "-c", "NONSENSE x", "never", "x:1")
	h.wantError(1, "must be lowercase", "commit", "never", "UPPER")
}
