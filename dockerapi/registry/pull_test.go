package registry

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/distribution/reference"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
)

func index(images map[string]v1.Image) v1.ImageIndex {
	idx := v1.ImageIndex(empty.Index)
	for _, p := range []string{"linux/arm64", "linux/amd64"} {
		if img := images[p]; img != nil {
			os, arch, _ := strings.Cut(p, "/")
			idx = mutate.AppendManifests(idx, mutate.IndexAddendum{Add: img, Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: os, Architecture: arch}}})
		}
	}
	return idx
}

func TestPull(t *testing.T) {
	host := startUpstream(t, nil)
	r := open(t, insecure(host))
	s := images(t, r, "team-a")
	amd := newImage(t, "linux/amd64", "base", "top of amd64")
	arm := newImage(t, "linux/arm64", "base", "top of arm64")
	idx := index(map[string]v1.Image{"linux/amd64": amd, "linux/arm64": arm})
	put(t, host+"/app:1", idx)

	lines := pull(t, s, host+"/app:1")
	told := strings.Join(lines, "\n")
	for _, want := range []string{"1: Pulling from app", ": Pulling fs layer", ": Downloading", ": Verifying Checksum", ": Download complete", ": Pull complete", "Digest: sha256:", "Status: Downloaded newer image for " + host + "/app:1"} {
		if !strings.Contains(told, want) {
			t.Errorf("%q is not told:\n%s", want, told)
		}
	}
	d, _ := idx.Digest()
	i, err := s.Inspect(t.Context(), host+"/app:1")
	if err != nil {
		t.Fatal(err)
	}
	if i.ID.String() != id(t, amd) {
		t.Errorf("the image is %s, want that of linux/amd64, %s", i.ID, id(t, amd))
	}
	// Others know it by the index's digest.
	if got := fmt.Sprint(i.Digests); got != "["+host+"/app@"+d.String()+"]" {
		t.Errorf("digests %s, want %s", got, d)
	}
	if m, _ := amd.Digest(); i.NodeReference("r:5000") != fmt.Sprintf("r:5000/team-a/%s/app@%s", strings.Replace(host, ":", "_", 1), m) {
		t.Errorf("nodes pull %s", i.NodeReference("r:5000"))
	}
	size, err := s.Size(t.Context(), i)
	if want := int64(len("base" + "top of amd64")); err != nil || size != want {
		t.Errorf("size %d, %v; want %d", size, err, want)
	}
	if told := pull(t, s, host+"/app:1"); told[len(told)-1] != "Status: Image is up to date for "+host+"/app:1" {
		t.Errorf("pulled again: %q", told)
	}
	// By digest, of the index, and of a platform that was asked for.
	pull(t, s, host+"/app@"+d.String())
	n, _ := ParseName(host + "/app:arm")
	put(t, host+"/app:arm", idx)
	if err := s.Pull(t.Context(), n, Transfer{Platform: "linux/arm64"}); err != nil {
		t.Fatal(err)
	}
	if i, err = s.Resolve(t.Context(), host+"/app:arm"); err != nil || i.ID.String() != id(t, arm) {
		t.Errorf("the image of linux/arm64 is %v, %v", i, err)
	}
	// What a tag meant before is there without the tag, as in docker.
	put(t, host+"/app:1", newImage(t, "linux/amd64", "base", "newer"))
	told = strings.Join(pull(t, s, host+"/app:1"), "\n")
	if !strings.Contains(told, "Already exists") {
		t.Errorf("the base layer was fetched again:\n%s", told)
	}
	if i, err = s.Inspect(t.Context(), id(t, amd)); err != nil || i.Tags != nil || len(i.Digests) != 1 {
		t.Errorf("the image that was replaced: %+v, %v", i, err)
	}
}

func TestPullErrors(t *testing.T) {
	host := startUpstream(t, nil)
	guarded := startUpstream(t, func(http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("WWW-Authenticate", `Basic realm="x"`)
			http.Error(w, `{"errors":[{"code":"DENIED","message":"requested access to the resource is denied"}]}`, http.StatusUnauthorized)
		})
	})
	r := open(t, insecure(host, guarded), func(c *Config) { c.MaxLayer = 100000 })
	s := images(t, r, "a")
	put(t, host+"/big:1", newImage(t, "linux/amd64", strings.Repeat("x", 200000)))
	put(t, host+"/arm:1", index(map[string]v1.Image{"linux/arm64": newImage(t, "linux/arm64", "arm")}))
	for _, test := range []struct {
		ref, platform string
		kind          error
		want          string
	}{
		{host + "/none:1", "", ErrNotFound, "manifest for " + host + "/none:1 not found"},
		{guarded + "/x:1", "", ErrNotFound, "pull access denied for " + guarded + "/x, repository does not exist or may require 'docker login'"},
		{host + "/arm:1", "", ErrNotFound, "no matching manifest"},
		{host + "/arm:1", "nonsense", ErrInvalid, "is no platform"},
		{host + "/big:1", "", ErrInvalid, "more than 100000 bytes when it is unpacked"},
		{"127.0.0.1:1/x:1", "", ErrUnavailable, "address of the server itself"},
		{"localhost:5000/x:1", "", ErrUnavailable, "the server itself"},
		{"169.254.169.254/x:1", "", ErrUnavailable, "the server itself"},
	} {
		n, err := ParseName(test.ref)
		if err != nil {
			t.Fatal(err)
		}
		err = s.Pull(t.Context(), n, Transfer{Platform: test.platform})
		if err == nil || !errors.Is(err, test.kind) || !strings.Contains(err.Error(), test.want) {
			t.Errorf("pull %s: %v; want %v: %s", test.ref, err, test.kind, test.want)
		}
	}
	if got := list(t, s); got != "" {
		t.Errorf("images after pulls that failed:\n%s", got)
	}
}

// A registry that sends something else than it said is found out, and nothing of it stays in the way of the next pull.
func TestPullCorrupt(t *testing.T) {
	var corrupt atomic.Bool
	host := startUpstream(t, func(h http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if corrupt.Load() && strings.Contains(r.URL.Path, "/blobs/") {
				w = &flipping{ResponseWriter: w}
			}
			h.ServeHTTP(w, r)
		})
	})
	r := open(t, insecure(host))
	s := images(t, r, "a")
	img := newImage(t, "linux/amd64", strings.Repeat("content ", 5000))
	put(t, host+"/app:1", img)
	n := parse(t, host+"/app:1")
	corrupt.Store(true)
	if err := s.Pull(t.Context(), n, Transfer{}); err == nil {
		t.Fatal("pulled what was not the image")
	}
	corrupt.Store(false)
	if err := s.Pull(t.Context(), n, Transfer{}); err != nil {
		t.Fatal(err)
	}
}

type flipping struct{ http.ResponseWriter }

func (f *flipping) Write(b []byte) (int, error) {
	if len(b) > 200 {
		c := append([]byte(nil), b...)
		c[len(c)/2] ^= 1
		return f.ResponseWriter.Write(c)
	}
	return f.ResponseWriter.Write(b)
}

// A transfer that breaks is gone on with from where it was, by the same pull and by another server's.
func TestPullResumes(t *testing.T) {
	var breaks atomic.Int64 // how many transfers break after 64 KiB
	var sent atomic.Int64
	host := startUpstream(t, func(h http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.Method == http.MethodGet && strings.Contains(r.URL.Path, "/blobs/") {
				c := &counting{ResponseWriter: w, sent: &sent, left: -1}
				if breaks.Add(-1) >= 0 {
					c.left = 64 << 10
				}
				w = c
			}
			h.ServeHTTP(w, r)
		})
	})
	noise := make([]byte, 800<<10)
	rand.NewChaCha8([32]byte{}).Read(noise)
	img := newImage(t, "linux/amd64", string(noise))
	put(t, host+"/app:1", img)
	layers, _ := img.Layers()
	size, _ := layers[0].Size()
	if size < 200<<10 {
		t.Fatalf("the layer has %d bytes; it should be worth breaking", size)
	}
	n := parse(t, host+"/app:1")

	t.Run("same pull", func(t *testing.T) {
		s := images(t, open(t, insecure(host)), "a")
		sent.Store(0)
		breaks.Store(3)
		if err := s.Pull(t.Context(), n, Transfer{}); err != nil {
			t.Fatal(err)
		}
		if got := sent.Load(); got > size+64<<10 {
			t.Errorf("%d bytes were sent for a layer of %d", got, size)
		}
	})
	t.Run("another server", func(t *testing.T) {
		folder := t.TempDir()
		first := images(t, open(t, insecure(host), func(c *Config) { c.Folder = folder }), "a")
		sent.Store(0)
		breaks.Store(attempts + 1) // the configuration comes in one of them
		if err := first.Pull(t.Context(), n, Transfer{}); err == nil {
			t.Fatal("the pull has not failed; the test is of no use")
		}
		second := images(t, open(t, insecure(host), func(c *Config) { c.Folder = folder }), "a")
		breaks.Store(0)
		if err := second.Pull(t.Context(), n, Transfer{}); err != nil {
			t.Fatal(err)
		}
		if got := sent.Load(); got > size+64<<10 {
			t.Errorf("%d bytes were sent for a layer of %d", got, size)
		}
		if i, err := second.Resolve(t.Context(), host+"/app:1"); err != nil || i.ID.String() != id(t, img) {
			t.Errorf("%v, %v", i, err)
		}
	})
}

// A server that is killed in the middle of a layer leaves what has come of it to the next one.
func TestPullAfterKill(t *testing.T) {
	if folder := os.Getenv("REGISTRY_TEST_FOLDER"); folder != "" { // the one that is killed
		host := os.Getenv("REGISTRY_TEST_HOST")
		s := images(t, open(t, insecure(host), func(c *Config) { c.Folder = folder }), "a")
		t.Fatal(s.Pull(t.Context(), parse(t, host+"/app:1"), Transfer{}), "the pull has ended")
	}
	var sent atomic.Int64
	var stall atomic.Bool
	stalled := make(chan struct{}, 10)
	host := startUpstream(t, func(h http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.Method == http.MethodGet && strings.Contains(r.URL.Path, "/blobs/") {
				w = &stalling{w, r.Context(), &sent, &stall, stalled}
			}
			h.ServeHTTP(w, r)
		})
	})
	noise := make([]byte, 2<<20)
	rand.NewChaCha8([32]byte{1}).Read(noise)
	img := newImage(t, "linux/amd64", string(noise))
	put(t, host+"/app:1", img)
	layers, _ := img.Layers()
	size, _ := layers[0].Size()
	folder := t.TempDir()
	stall.Store(true)
	child := exec.Command(os.Args[0], "-test.run", "^TestPullAfterKill$")
	child.Env = append(os.Environ(), "REGISTRY_TEST_FOLDER="+folder, "REGISTRY_TEST_HOST="+host)
	var out bytes.Buffer
	child.Stdout, child.Stderr = &out, &out
	if err := child.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- child.Wait() }()
	select {
	case <-stalled:
	case err := <-ended:
		t.Fatalf("%v: %s", err, out.String())
	}
	// What was sent has to have been written: nobody acknowledges it.
	for written(folder) < 500<<10 {
		select {
		case err := <-ended:
			t.Fatalf("%v: %s", err, out.String())
		case <-time.After(5 * time.Millisecond):
		}
	}
	child.Process.Kill()
	<-ended
	stall.Store(false)
	s := images(t, open(t, insecure(host), func(c *Config) { c.Folder = folder }), "a")
	if got := list(t, s); got != "" {
		t.Errorf("images of the killed one: %s", got)
	}
	sent.Store(0)
	if err := s.Pull(t.Context(), parse(t, host+"/app:1"), Transfer{}); err != nil {
		t.Fatal(err)
	}
	if got := sent.Load(); got > size-400<<10 {
		t.Errorf("%d bytes of %d were sent again", got, size)
	}
	if i, err := s.Resolve(t.Context(), host+"/app:1"); err != nil || i.ID.String() != id(t, img) {
		t.Errorf("%v, %v", i, err)
	}
}

// written is the size of what uploads have got.
func written(folder string) (n int64) {
	files, _ := filepath.Glob(filepath.Join(folder, "images/docker/registry/v2/repositories/a/*/app/_uploads/*/data"))
	for _, f := range files {
		if fi, err := os.Stat(f); err == nil {
			n += fi.Size()
		}
	}
	return n
}

// stalling sends a MiB of a body, and then nothing.
type stalling struct {
	http.ResponseWriter
	ctx     context.Context // of the request
	sent    *atomic.Int64
	stall   *atomic.Bool
	stalled chan<- struct{}
}

func (s *stalling) Write(b []byte) (int, error) {
	if !s.stall.Load() || len(b) < 1<<20 { // a configuration
		n, err := s.ResponseWriter.Write(b)
		s.sent.Add(int64(n))
		return n, err
	}
	_, _ = s.ResponseWriter.Write(b[:1<<20])
	s.ResponseWriter.(http.Flusher).Flush()
	s.stalled <- struct{}{}
	<-s.ctx.Done()
	return 0, s.ctx.Err()
}

// counting counts a body's bytes, and breaks the connection when none are left.
type counting struct {
	http.ResponseWriter
	sent *atomic.Int64
	left int
}

func (c *counting) Write(b []byte) (int, error) {
	if c.left == 0 {
		panic(http.ErrAbortHandler)
	}
	if c.left > 0 && len(b) > c.left {
		b = b[:c.left]
	}
	n, err := c.ResponseWriter.Write(b)
	c.sent.Add(int64(n))
	if c.left > 0 {
		c.left -= n
		if c.left == 0 {
			c.ResponseWriter.(http.Flusher).Flush()
			panic(http.ErrAbortHandler)
		}
	}
	return n, err
}

func TestPush(t *testing.T) {
	host := startUpstream(t, nil)
	r := open(t, insecure(host))
	s := images(t, r, "a")
	img := newImage(t, "linux/amd64", "base", "top")
	i := load(t, s, "local:1", img)
	if i.Digests != nil {
		t.Errorf("an image that was loaded has digests %v", i.Digests)
	}
	n := parse(t, host+"/team/app:2")
	if err := s.Tag(t.Context(), i, n); err != nil {
		t.Fatal(err)
	}
	var pushed *Pushed
	push := func() string {
		lines, err := transferLines(func(tr Transfer) (err error) {
			pushed, err = s.Push(t.Context(), n, tr)
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		return strings.Join(lines, "\n")
	}
	if told := push(); strings.Count(told, ": Pushed") != 2 || !strings.Contains(told, "2: digest: "+pushed.Digest) {
		t.Errorf("push:\n%s", told)
	}
	if told := push(); strings.Count(told, ": Layer already exists") != 2 {
		t.Errorf("pushed again:\n%s", told)
	}
	ref, _ := name.NewTag(n.String(), name.Insecure)
	got, err := remote.Image(ref)
	if err != nil {
		t.Fatal(err)
	}
	if id(t, got) != id(t, img) {
		t.Errorf("the other registry has %s, want %s", id(t, got), id(t, img))
	}
	if d, _ := got.Digest(); d.String() != pushed.Digest {
		t.Errorf("it has manifest %s, said was %s", d, pushed.Digest)
	}
	if i, err = s.Inspect(t.Context(), "local:1"); err != nil || len(i.Digests) != 1 || i.Digests[0].Name() != reference.TrimNamed(n).Name() {
		t.Errorf("after push: %v, %v", i.Digests, err)
	}
	if _, err := s.Push(t.Context(), parse(t, host+"/none:1"), Transfer{}); !errors.Is(err, ErrNotFound) {
		t.Errorf("pushed what is not there: %v", err)
	}
}
