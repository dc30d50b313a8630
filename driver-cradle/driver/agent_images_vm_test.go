//go:build vm

package driver

import (
	"context"
	"crypto/tls"
	"encoding/base64"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/random"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/cradlestack/cradlestack/internal/nomadtest"
	"github.com/cradlestack/cradlestack/test/programs"
)

// The node's registries, one behind several doors. What opens a door is where a client finds its credentials.
const (
	open         = "10.77.0.1:5000" // to everybody
	byConfig     = "10.77.0.1:5001" // docker's configuration
	byHelper     = "10.77.0.1:5002" // a credential helper that it names
	byFirst      = "10.77.0.1:5011" // a credential helper that is asked before docker's configuration
	byTask       = "10.77.0.1:5003" // an auth block
	selfSigned   = "10.77.0.1:5004" // everybody, with a certificate that nobody knows, and the plugin is told so
	untrusted    = "10.77.0.1:5005" // the same, and it is not
	silent       = "10.77.0.1:5006" // it never answers
	overloaded   = "10.77.0.1:5007" // it has an error
	nobody       = "10.77.0.1:5008" // nothing listens
	unnamed      = "10.77.0.1:5009" // to everybody, without TLS, and the plugin is not told so
	slow         = "10.77.0.1:5010" // to everybody; a layer comes byte by byte until the test lets the rest come
	mirrored     = "registry.example.org"
	registryKeys = `
insecure_registries = ["` + open + `", "` + byConfig + `", "` + byHelper + `", "` + byFirst + `", "` + byTask + `", "` + selfSigned + `", "` + silent + `", "` + overloaded + `", "` + nobody + `", "` + slow + `"]
registry "` + mirrored + `" {
  mirrors = ["http://` + nobody + `", "http://` + open + `/mirror"]
}
auth {
  config = "%s/docker.json"
  helper = "driver-first"
}
`
)

// credentials writes what the plugin is told of registries, and the helpers, into dir.
func credentials(dir string) error {
	config := fmt.Sprintf(`{"auths": {%q: {"auth": %q}}, "credHelpers": {%q: "driver-test"}}`, byConfig, base64.StdEncoding.EncodeToString([]byte("config:secret")), byHelper)
	helper := `#!/bin/sh
[ "$1" = get ] && echo "{\"ServerURL\": \"$(cat)\", \"Username\": \"helper\", \"Secret\": \"secret\"}"
`
	if err := os.WriteFile(filepath.Join(dir, "docker.json"), []byte(config), 0o600); err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(dir, "docker-credential-driver-test"), []byte(helper), 0o755); err != nil {
		return err
	}
	first := `#!/bin/sh
[ "$1" = get ] || exit 1
if [ "$(cat)" = ` + byFirst + ` ]; then
	echo '{"ServerURL": "` + byFirst + `", "Username": "first", "Secret": "secret"}'
else
	echo 'credentials not found in native keychain'
	exit 1
fi
`
	return os.WriteFile(filepath.Join(dir, "docker-credential-driver-first"), []byte(first), 0o755)
}

// serveRegistries opens the registry's doors in a node.
func serveRegistries(t *testing.T, n *nomadtest.Node) {
	t.Helper()
	images := registry.New(registry.Logger(log.New(io.Discard, "", 0)))
	asks := func(user string) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if u, p, ok := r.BasicAuth(); !ok || u != user || p != "secret" {
				w.Header().Set("WWW-Authenticate", `Basic realm="test"`)
				http.Error(w, "who are you?", http.StatusUnauthorized)
				return
			}
			images.ServeHTTP(w, r)
		})
	}
	certificate := httptest.NewTLSServer(nil)
	certificate.Close()
	for address, handler := range map[string]http.Handler{
		open: images, byConfig: asks("config"), byHelper: asks("helper"), byFirst: asks("first"), byTask: asks("task"), selfSigned: images, untrusted: images, unnamed: images,
		silent:     http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }),
		overloaded: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { http.Error(w, "too much", http.StatusServiceUnavailable) }),
	} {
		var secret *tls.Config
		if address == selfSigned || address == untrusted {
			secret = certificate.TLS
		}
		serve(t, n, address, handler, secret)
	}
}

// serve opens one door until the test ends, with TLS where there is a configuration of it.
func serve(t *testing.T, n *nomadtest.Node, address string, handler http.Handler, c *tls.Config) {
	t.Helper()
	l, err := n.Listen("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	if c != nil {
		l = tls.NewListener(l, c)
	}
	s := &http.Server{Handler: handler, ErrorLog: log.New(io.Discard, "", 0)}
	done := make(chan struct{})
	go func() {
		defer close(done)
		s.Serve(l)
	}()
	t.Cleanup(func() {
		s.Close()
		<-done
	})
}

// busybox is the example image.
func busybox(t *testing.T) v1.Image {
	t.Helper()
	image, err := programs.OnlyImage(filepath.Join(shared.images, "busybox"))
	if err != nil {
		t.Fatal(err)
	}
	return image
}

// push puts an image into the node's registry.
func push(t *testing.T, n *nomadtest.Node, image v1.Image, reference string) {
	t.Helper()
	ref, err := name.ParseReference(reference, name.Insecure)
	if err != nil {
		t.Fatal(err)
	}
	client := n.HTTP()
	defer client.CloseIdleConnections()
	if err := remote.Write(ref, image, remote.WithTransport(client.Transport)); err != nil {
		t.Fatal(err)
	}
}

// withEnv is an image with another environment variable.
func withEnv(t *testing.T, image v1.Image, env string) v1.Image {
	t.Helper()
	return configured(t, image, func(c *v1.Config) { c.Env = append(c.Env, env) })
}

// configured is an image with another configuration.
func configured(t *testing.T, image v1.Image, edit func(*v1.Config)) v1.Image {
	t.Helper()
	config, err := image.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	config = config.DeepCopy()
	edit(&config.Config)
	image, err = mutate.ConfigFile(image, config)
	if err != nil {
		t.Fatal(err)
	}
	return image
}

// imageJob is jobOf with another image.
func imageJob(name, image, script string, more ...string) string {
	return strings.Replace(jobOf(name, script, more...), "oci:"+shared.images+"/busybox", image, 1)
}

// TestVMAgentRegistries pulls from registries by every way in, and hears their reasons where there is none.
func TestVMAgentRegistries(t *testing.T) {
	c := openAgents(t)
	n := c.Clients()[0]
	serveRegistries(t, n)
	image := busybox(t)
	digest, err := image.Digest()
	if err != nil {
		t.Fatal(err)
	}
	for _, repository := range []string{"busybox", "mirror/busybox", "task/busybox"} {
		push(t, n, image, open+"/"+repository+":latest")
	}
	const taskAuth = "auth {\n  username = \"task\"\n  password = \"secret\"\n}\n"
	refusals := map[string]failure{}
	for name, test := range map[string]struct{ image, config, want string }{
		"nobody":       {byTask + "/task/busybox", "", "not authorized by " + byTask},
		"advice":       {byTask + "/task/busybox", "", "auth {}"},
		"another":      {byTask + "/task/busybox", strings.Replace(taskAuth, "secret", "wrong", 1), "not authorized by " + byTask},
		"other-server": {byTask + "/task/busybox", strings.Replace(taskAuth, "}", "  server_address = \"elsewhere.example.org\"\n}", 1), "not authorized by " + byTask},
		"missing":      {open + "/nothing:7", "", "pull " + open + "/nothing:7: no such image at " + open},
		"certificate":  {untrusted + "/busybox", "", "the certificate of " + untrusted + " is not good: x509: "},
		"no TLS":       {unnamed + "/busybox", "", unnamed + " has no TLS: name it as an insecure registry"},
		"silence":      {silent + "/busybox", "image_pull_timeout = \"2s\"", "the images were not there within 2s (image_pull_timeout)"},
		"error":        {overloaded + "/busybox", "image_pull_timeout = \"1m\"", overloaded + " answers 503 Service Unavailable"},
		"refused":      {nobody + "/busybox", "", "connection refused"},
		"daemon":       {"docker-daemon:busybox", "", "start it, or set DOCKER_HOST"},
		"unknown":      {mirrored + "/nothing", "", mirrored},
	} {
		refusals[name] = failure{batch(imageJob("no-"+strings.ReplaceAll(name, " ", "-"), test.image, "", test.config, "", once)), test.want}
	}
	refused := fail(t, c, refusals)
	t.Run("all", func(t *testing.T) { // ends before the registries do
		for name, test := range map[string]struct{ image, config string }{
			"open":             {open + "/busybox", ""},
			"config":           {byConfig + "/busybox", ""},
			"helper":           {byHelper + "/busybox", ""},
			"helper-first":     {byFirst + "/busybox", ""},
			"digest":           {open + "/busybox@" + digest.String(), ""},
			"archive":          {"docker-archive:" + shared.images + "/busybox-docker.tar", ""},
			"auth":             {byTask + "/busybox", taskAuth},
			"auth-for-server":  {byTask + "/mirror/busybox:latest", strings.Replace(taskAuth, "}", "  server_address = \""+byTask+"\"\n}", 1)},
			"insecure":         {selfSigned + "/busybox", ""},
			"second-of-mirror": {mirrored + "/busybox", ""},
		} {
			t.Run(name, func(t *testing.T) {
				t.Parallel()
				a := c.UntilEnded(t, c.Run(t, batch(imageJob("from-"+name, test.image, "echo hello", test.config, "", once))))
				if out := c.Logs(t, a.ID, "main", "stdout"); a.ClientStatus != "complete" || out != "hello\n" {
					t.Errorf("it is %s and says %q\n%s", a.ClientStatus, out, events(t, c, a.ID))
				}
			})
		}
	})
	refused()

	// The restart policy is on pulls as on all else: once the image is there, the task runs.
	job := c.Run(t, imageJob("later", open+"/later", "echo here; sleep 1000", "", "", `
    restart {
      attempts = 100
      interval = "1h"
      delay    = "1s"
      mode     = "delay"
    }`))
	c.UntilAlloc(t, job, "told that there is no image", func(a *nomadAlloc) bool {
		return a.TaskStates["main"] != nil && a.TaskStates["main"].Restarts > 0
	})
	push(t, n, image, open+"/later:latest")
	a := c.UntilRunning(t, job)
	c.UntilLogsHave(t, a.ID, "main", "stdout", "here\n")
	if got := events(t, c, a.ID); !strings.Contains(got, "no such image at "+open) || !strings.Contains(got, "Restarting") {
		t.Errorf("Nomad tells\n%s", got)
	}
	c.Stop(t, job)

	// A tag moves on: who forces a pull sees it, others have what they had.
	run := func(what, config string) string {
		t.Helper()
		a := c.UntilEnded(t, c.Run(t, batch(imageJob("tag-"+what, open+"/moving", "echo $WHICH", config, "", once))))
		return c.Logs(t, a.ID, "main", "stdout")
	}
	push(t, n, withEnv(t, image, "WHICH=first"), open+"/moving:latest")
	if got := run("new", ""); got != "first\n" {
		t.Errorf("the first image says %q", got)
	}
	push(t, n, withEnv(t, image, "WHICH=second"), open+"/moving:latest")
	if got := run("kept", ""); got != "first\n" {
		t.Errorf("the image of the cache says %q", got)
	}
	if got := run("forced", "force_pull = true"); got != "second\n" {
		t.Errorf("the image pulled again says %q", got)
	}
}

// Without a kill_signal a task gets its image's stop signal; so do further containers, unless they name another one.
func TestVMAgentStopSignals(t *testing.T) {
	c := openAgents(t)
	n := c.Clients()[0]
	serve(t, n, open, registry.New(registry.Logger(log.New(io.Discard, "", 0))), nil)
	push(t, n, configured(t, busybox(t), func(c *v1.Config) { c.StopSignal = "SIGRTMIN+3" }), open+"/stops:latest")
	script := func(signal string) string {
		return "trap 'echo asked to end; exit 0' " + signal + "; echo up; while :; do sleep 0.1; done"
	}
	container := func(name, more, signal string) string {
		return fmt.Sprintf("container %q {\n  image = %q\n  command = \"sh\"\n  args = [\"-c\", %q]\n  %s\n}\n", name, open+"/stops", script(signal), more)
	}
	job := c.Run(t, imageJob("stops", open+"/stops", script("37"), container("other", "", "37")+container("own", `stop_signal = "SIGUSR1"`, "USR1"), "kill_timeout = \"20s\""))
	a := c.UntilRunning(t, job)
	says := func(what string) {
		t.Helper()
		c.UntilLogs(t, a.ID, "main", "stdout", func(s string) bool {
			return strings.Contains("\n"+s, "\n"+what) && strings.Contains(s, "other: "+what) && strings.Contains(s, "own: "+what)
		})
	}
	says("up\n")
	c.Stop(t, job)
	says("asked to end\n")
}

// batch makes a job one that ends.
func batch(job string) string { return strings.Replace(job, "{", "{\n  type = \"batch\"", 1) }

// Two tasks that want one image pull it once, and each tells how far that is.
func TestVMAgentPull(t *testing.T) {
	c := openAgents(t)
	n := c.Clients()[0]
	layer, err := random.Layer(64<<10, types.OCILayer)
	if err != nil {
		t.Fatal(err)
	}
	digest, err := layer.Digest()
	if err != nil {
		t.Fatal(err)
	}
	image, err := mutate.AppendLayers(busybox(t), layer)
	if err != nil {
		t.Fatal(err)
	}
	images := registry.New(registry.Logger(log.New(io.Discard, "", 0)))
	var asked atomic.Int32
	rest := make(chan struct{})
	serve(t, n, slow, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodGet && strings.HasSuffix(r.URL.Path, "/blobs/"+digest.String()) {
			asked.Add(1)
			w = &hesitant{w, rest, r.Context()}
		}
		images.ServeHTTP(w, r)
	}), nil)
	push(t, n, image, slow+"/shared:latest")

	jobs := []string{"one", "other"}
	for _, name := range jobs {
		c.Run(t, batch(imageJob(name, slow+"/shared", "echo hello", "", "", once)))
	}
	begun := func(a *nomadAlloc) bool { return len(a.TaskStates) > 0 }
	for _, job := range jobs {
		a := c.UntilAlloc(t, job, "begun", begun)
		eventually(t, func() string { return events(t, c, a.ID) }, func(s string) bool { return strings.Contains(s, " layers are there, ") })
	}
	close(rest)
	for _, job := range jobs {
		a := c.UntilEnded(t, job)
		if got := events(t, c, a.ID); a.ClientStatus != "complete" || !strings.Contains(got, "Pulled images in ") {
			t.Errorf("job %s is %s\n%s", job, a.ClientStatus, got)
		}
	}
	if asked.Load() != 1 {
		t.Errorf("the layer was pulled %d times", asked.Load())
	}
}

// A hesitant answer comes byte by byte until rest is closed.
type hesitant struct {
	http.ResponseWriter
	rest <-chan struct{}
	ctx  context.Context
}

func (h *hesitant) Write(p []byte) (n int, err error) {
	for ; n < len(p) && err == nil; n++ {
		select {
		case <-h.rest:
			m, err := h.ResponseWriter.Write(p[n:])
			return n + m, err
		case <-h.ctx.Done():
			return n, h.ctx.Err()
		case <-time.After(50 * time.Millisecond):
		}
		_, err = h.ResponseWriter.Write(p[n : n+1])
		h.ResponseWriter.(http.Flusher).Flush()
	}
	return n, err
}
