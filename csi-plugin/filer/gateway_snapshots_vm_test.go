//go:build vm

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/minio/minio-go/v7"
	"golang.org/x/sync/errgroup"

	"github.com/cradlestack/cradlestack/internal/filertest"
)

// TestRootSnapshotsByGateways: who has a grant reads the volume's snapshots, of whichever kind it is, brings back what was, and changes nothing in them; nobody reads
// another's. What is deleted is gone although somebody has just looked at it.
func TestRootSnapshotsByGateways(t *testing.T) {
	f := filertest.Start(t)
	grants := map[string]filertest.Grant{}
	hosts := map[string]string{}
	for name, size := range map[string]int64{"image": 64 << 20, "directory": 0} {
		hosts[name] = f.Volume(name, size, nil)
		grants[name] = f.Grant(name, "--user", "1000:1001")
	}
	curl := func(g filertest.Grant, args ...string) (string, error) {
		return client(t, "curl", append([]string{"--silent", "--show-error", "--fail", "--path-as-is", "--cacert", f.CA(), "--user", g.ID + ":" + g.Secret}, args...)...)
	}
	for name, g := range grants {
		t.Run(name, func(t *testing.T) {
			others := map[string]string{"image": "directory", "directory": "image"}[name]
			other := grants[others]
			write := func(text string) {
				t.Helper()
				if err := errors.Join(os.MkdirAll(filepath.Join(hosts[name], "letters"), 0o755), os.WriteFile(filepath.Join(hosts[name], "letters/one"), []byte(text), 0o640)); err != nil {
					t.Fatal(err)
				}
			}
			refused := func(want string, out string, err error) {
				t.Helper()
				if err == nil || !strings.Contains(out, want) {
					t.Errorf("%v: %s; want %s", err, out, want)
				}
			}
			says := func(want string, out string, err error) {
				t.Helper()
				if err != nil || out != want {
					t.Errorf("%q, %v; want %q", out, err, want)
				}
			}
			was := name + " then"
			write(was)
			f.Must("snapshot", name, "before")
			write(name + " now")
			one := g.WebDAV + ".snapshots/before/letters/one"
			look := func() {
				t.Helper()
				out, err := curl(g, one)
				says(was, out, err)
				out, err = curl(g, "--range", "1-2", one)
				says(was[1:3], out, err)
			}
			look()
			f.Signal(syscall.SIGKILL)
			f.Run()
			look()
			out, err := curl(g, "--request", "PROPFIND", "--header", "Depth: 1", g.WebDAV+".snapshots/")
			if err != nil || !strings.Contains(out, "/"+name+"/.snapshots/before/<") {
				t.Errorf("the snapshots are %s, %v", out, err)
			}
			out, err = curl(g, "--request", "PROPFIND", "--header", "Depth: 1", g.WebDAV)
			if err != nil || strings.Contains(out, "snapshots") {
				t.Errorf("the root is listed as %s, %v", out, err)
			}
			for _, args := range [][]string{{"--upload-file", "/etc/hostname"}, {"--request", "DELETE"}, {"--request", "MKCOL"}, {"--request", "MOVE", "--header", "Destination: " + g.WebDAV + "mine"}, {"--request", "LOCK"}, {"--request", "PROPPATCH"}} {
				for _, at := range []string{one, g.WebDAV + ".snapshots/before", g.WebDAV + ".snapshots/new", g.WebDAV + ".snapshots"} {
					out, err := curl(g, append(args, at)...)
					refused("403", out, err)
				}
			}
			out, err = curl(other, one)
			refused("404", out, err)
			out, err = curl(other, strings.Replace(one, "/"+name+"/", "/"+others+"/../"+name+"/", 1))
			refused("404", out, err)
			out, err = curl(other, strings.Replace(one, "/"+name+"/", "/"+others+"/", 1))
			refused("404", out, err)
			out, err = curl(filertest.Grant{ID: "nobody", Secret: g.Secret}, one)
			refused("401", out, err)
			out, err = curl(g, "--request", "COPY", "--header", "Destination: "+g.WebDAV+"letters/back", one)
			says("", out, err)
			for path, want := range map[string]string{"letters/back": was, "letters/one": name + " now"} {
				if data, err := os.ReadFile(filepath.Join(hosts[name], path)); err != nil || string(data) != want {
					t.Errorf("%s is %q, %v", path, data, err)
				}
			}
			out, err = client(t, "stat", "--format", "%u:%g %a", filepath.Join(hosts[name], "letters/back"))
			says("1000:1001 640\n", out, err)

			// The same by S3.
			c := objects(t, f, g)
			const key = ".snapshots/before/letters/one"
			read := func(c *minio.Client, bucket string) (string, error) {
				o, err := c.GetObject(t.Context(), bucket, key, minio.GetObjectOptions{})
				if err != nil {
					return "", err
				}
				defer o.Close()
				data, err := io.ReadAll(o)
				return string(data), err
			}
			out, err = read(c, name)
			says(was, out, err)
			if _, err := c.CopyObject(t.Context(), minio.CopyDestOptions{Bucket: name, Object: "by-s3"}, minio.CopySrcOptions{Bucket: name, Object: key}); err != nil {
				t.Error(err)
			}
			if data, err := os.ReadFile(filepath.Join(hosts[name], "by-s3")); err != nil || string(data) != was {
				t.Errorf("brought back by S3 it is %q, %v", data, err)
			}
			if _, err := c.PutObject(t.Context(), name, key, strings.NewReader("x"), 1, minio.PutObjectOptions{}); minio.ToErrorResponse(err).Code != minio.AccessDenied {
				t.Errorf("it was written: %v", err)
			}
			keys := map[string]int{}
			for _, prefix := range []string{"", ".snapshots/"} {
				for o := range c.ListObjects(t.Context(), name, minio.ListObjectsOptions{Prefix: prefix, Recursive: true}) {
					keys[o.Key]++
				}
			}
			if want := map[string]int{key: 1, "by-s3": 1, "letters/one": 1, "letters/back": 1}; !maps.Equal(keys, want) {
				t.Errorf("the objects are %v, not %v", keys, want)
			}
			for _, bucket := range []string{name, others} {
				if out, err := read(objects(t, f, other), bucket); err == nil {
					t.Errorf("another reads %q", out)
				}
			}

			removeSnapshot(t, f, name, "before")
			if out, err := read(c, name); minio.ToErrorResponse(err).Code != minio.NoSuchKey {
				t.Errorf("what was deleted is %q, %v", out, err)
			}
			out, err = curl(g, one)
			refused("404", out, err)
		})
	}
}

// TestRootRollbackUnderGateways: while clients of WebDAV and S3 write, a volume is rolled back again and again: each time whole, no client's write fails, and an upload
// that is under way is there in the end. What helps to serve the volume is none of what has changed in it.
func TestRootRollbackUnderGateways(t *testing.T) {
	f := filertest.Start(t)
	host := f.Volume("vol", 64<<20, nil)
	g := f.Grant("vol")
	c := objects(t, f, g)
	web := http.Client{Transport: overTLS(t, f)}
	put := func(method, path string, body io.Reader) error {
		req, err := http.NewRequestWithContext(t.Context(), method, g.WebDAV+path, body)
		if err != nil {
			return err
		}
		req.SetBasicAuth(g.ID, g.Secret)
		resp, err := web.Do(req)
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		if resp.StatusCode/100 != 2 {
			return fmt.Errorf("%s %s: %s", method, path, resp.Status)
		}
		return nil
	}
	for i := range 50 {
		if err := put(http.MethodPut, fmt.Sprintf("kept-%d", i), strings.NewReader(strings.Repeat("kept", 1<<12))); err != nil {
			t.Fatal(err)
		}
	}
	f.Must("snapshot", "vol", "before")
	defer removeSnapshot(t, f, "vol", "before")
	theirs, ours := io.Pipe()
	uploaded := make(chan error, 1)
	go func() { uploaded <- put(http.MethodPut, "upload", theirs) }()
	if _, err := ours.Write(make([]byte, 1<<20)); err != nil {
		t.Fatal(err)
	}
	if out := f.Must("diff", "vol", "before"); out != "" {
		t.Errorf("while a file is uploaded the volume has changed: %s", out)
	}
	ctx, stop := context.WithCancel(t.Context())
	var writers errgroup.Group
	for i := range 3 {
		writers.Go(func() error {
			for n := 0; ctx.Err() == nil; n++ {
				dir := fmt.Sprintf("dav-%d-%d", i, n)
				if err := put("MKCOL", dir, nil); err != nil {
					return err
				}
				if err := put(http.MethodPut, fmt.Sprintf("kept-%d", n%50), strings.NewReader("new")); err != nil {
					return err
				}
			}
			return nil
		})
		writers.Go(func() error {
			for n := 0; ctx.Err() == nil; n++ {
				if _, err := c.PutObject(t.Context(), "vol", fmt.Sprintf("s3-%d/%d", i, n), strings.NewReader("new"), 3, minio.PutObjectOptions{}); err != nil {
					return err
				}
				if err := c.RemoveObject(t.Context(), "vol", fmt.Sprintf("kept-%d", 3*(n%16)+i), minio.RemoveObjectOptions{}); err != nil {
					return err
				}
			}
			return nil
		})
	}
	for range 5 {
		f.Must("rollback", "vol", "before")
	}
	stop()
	if err := writers.Wait(); err != nil {
		t.Errorf("who writes while the volume is rolled back: %v", err)
	}
	f.Must("rollback", "vol", "before")
	if out := f.Must("diff", "vol", "before"); out != "" {
		t.Errorf("when it has been rolled back the volume has changed: %s", out)
	}
	ours.Close()
	if err := <-uploaded; err != nil {
		t.Errorf("an upload that was under way: %v", err)
	}
	if fi, err := os.Stat(filepath.Join(host, "upload")); err != nil || fi.Size() != 1<<20 {
		t.Errorf("what was uploaded is %v, %v", fi, err)
	}
}
