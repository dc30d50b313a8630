//go:build vm

package registry

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cradlestack/cradlestack/test/s3server"
)

// bucket is a bucket of a real S3 server.
func bucket(t *testing.T) *S3 {
	t.Helper()
	url, _ := s3server.Start(t, "images")
	return &S3{
		Endpoint: url, Region: "us-east-1", Bucket: "images", Prefix: "some/prefix", AccessKey: s3server.AccessKey, SecretKey: s3server.SecretKey, PathStyle: true,
	}
}

// TestVMImagesInS3 does everything with images in a bucket of a real S3 server.
func TestVMImagesInS3(t *testing.T) {
	var breaks atomic.Int64
	var sent atomic.Int64
	host := startUpstream(t, func(h http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.Method == http.MethodGet && strings.Contains(r.URL.Path, "/blobs/") {
				c := &counting{ResponseWriter: w, sent: &sent, left: -1}
				if breaks.Add(-1) >= 0 {
					c.left = 12 << 20
				}
				w = c
			}
			h.ServeHTTP(w, r)
		})
	})
	s3 := bucket(t)
	key, err := folderKey(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	server := func() *Images {
		return images(t, open(t, func(c *Config) { c.Folder, c.S3, c.Key, c.Insecure = "", s3, key, []string{host} }), "a")
	}
	one := server()
	if got := list(t, one); got != "" {
		t.Fatal(got)
	}
	noise := make([]byte, 25<<20) // more than one part of an upload
	rand.NewChaCha8([32]byte{}).Read(noise)
	img := newImage(t, "linux/amd64", "base", string(noise))
	put(t, host+"/app:1", img)
	layers, _ := img.Layers()
	size, _ := layers[1].Size()

	// Its transfer breaks; another server goes on with it.
	breaks.Store(100)
	n := parse(t, host+"/app:1")
	ctx, cancel := context.WithCancel(t.Context())
	err = one.Pull(ctx, n, Transfer{Progress: func(p Progress) {
		if strings.HasPrefix(p.Status, "Retrying") {
			cancel()
		}
	}})
	if !errors.Is(err, context.Canceled) {
		t.Fatalf("the pull was not interrupted: %v", err)
	}
	breaks.Store(0)
	two := server()
	sent.Store(0)
	if err := two.Pull(t.Context(), n, Transfer{}); err != nil {
		t.Fatal(err)
	}
	if got := sent.Load(); got > size-5<<20 {
		t.Errorf("%d bytes of %d were sent again", got, size)
	}
	i, err := one.Inspect(t.Context(), host+"/app:1")
	if err != nil || i.ID.String() != id(t, img) {
		t.Fatalf("%+v, %v", i, err)
	}
	load(t, one, "local:1", newImage(t, "linux/amd64", "base", "other"))
	if err := one.Tag(t.Context(), i, parse(t, "copy:1")); err != nil {
		t.Fatal(err)
	}
	for _, s := range []*Images{one, two} {
		if got := strings.Count(list(t, s), ":1"); got != 3 {
			t.Errorf("%d names:\n%s", got, list(t, s))
		}
		if err := s.Save(t.Context(), io.Discard, []string{"copy:1", "local:1"}); err != nil {
			t.Error(err)
		}
	}
	if _, err := images(t, one.Registry, "b").Resolve(t.Context(), i.ID.String()); !errors.Is(err, ErrNotFound) {
		t.Errorf("another namespace: %v", err)
	}
	if _, err := two.Remove(t.Context(), "local:1", false, nil); err != nil {
		t.Fatal(err)
	}
	if c, err := one.Collect(t.Context()); err != nil || c.Blobs != 0 {
		t.Errorf("what is young was collected: %+v, %v", c, err)
	}
	// S3's clock has seconds: one blob may be old enough before another.
	one.Grace = time.Millisecond
	collected := 0
	for begin := time.Now(); collected < 3 && time.Since(begin) < time.Minute; time.Sleep(100 * time.Millisecond) {
		c, err := one.Collect(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		collected += c.Blobs
	}
	if collected != 3 {
		t.Errorf("%d blobs were collected", collected)
	}
	f := serve(t, two.Registry)
	bearer, _ := f.bearer(token(t, one.Registry, Grant{Namespace: "a"})) // any server's token is good at any server
	for _, l := range i.Layers {
		path := fmt.Sprintf("/v2/%s/blobs/%s", i.repo, l.Digest)
		if status, _ := f.do(http.MethodHead, path, bearer); status != http.StatusOK {
			t.Errorf("%s: %d", path, status)
		}
	}
	if err := two.Save(t.Context(), io.Discard, []string{"copy:1"}); err != nil {
		t.Error(err)
	}
}
