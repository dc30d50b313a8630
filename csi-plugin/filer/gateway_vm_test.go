//go:build vm

package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/minio/minio-go/v7"
	"github.com/minio/minio-go/v7/pkg/credentials"

	"github.com/cradlestack/cradlestack/internal/filertest"
)

// client runs a client of the filer, for five minutes at most.
func client(t *testing.T, name string, args ...string) (string, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	out, err := exec.CommandContext(ctx, name, args...).CombinedOutput()
	if errors.Is(err, exec.ErrNotFound) {
		t.Fatalf("%v; run make setup", err)
	}
	return string(out), err
}

// nfsURL is a file of a publication for libnfs's programs.
func nfsURL(p filertest.Publication, name string) string {
	host, port, _ := strings.Cut(p.Address, ":")
	return "nfs://" + host + strings.TrimSuffix(p.Export+"/"+name, "/") + "?version=3&auto-traverse-mounts=0&uid=0&gid=0&nfsport=" + port + "&mountport=" + port
}

// TestRootGateways: what is written by one protocol is read by another at once, grants outlast the process, and nobody has another's volume.
func TestRootGateways(t *testing.T) {
	f := filertest.Start(t)
	host := f.Volume("vol", 64<<20, nil)
	f.Volume("www", 0, nil)
	p, g, other := f.Publish("vol"), f.Grant("vol", "--id", "mine", "--user", "1000:1001"), f.Grant("www")
	dir := t.TempDir()
	local := func(name string) string { return filepath.Join(dir, name) }
	if err := os.WriteFile(local("one"), []byte(strings.Repeat("one ", 50_000)), 0o644); err != nil {
		t.Fatal(err)
	}
	curl := func(g filertest.Grant, args ...string) (string, error) {
		return client(t, "curl", append([]string{"--silent", "--show-error", "--fail", "--cacert", f.CA(), "--user", g.ID + ":" + g.Secret}, args...)...)
	}
	ok := func(out string, err error) string {
		t.Helper()
		if err != nil {
			t.Errorf("%v: %s", err, out)
		}
		return out
	}
	refused := func(want string, out string, err error) {
		t.Helper()
		if err == nil || !strings.Contains(out+err.Error(), want) {
			t.Errorf("%v: %s; want %s", err, out, want)
		}
	}
	same := func(path string) {
		t.Helper()
		one, err := os.ReadFile(local("one"))
		two, err2 := os.ReadFile(path)
		if err := errors.Join(err, err2); err != nil || string(one) != string(two) {
			t.Errorf("%s has %d bytes, not %d, %v", path, len(two), len(one), err)
		}
	}
	// NFS to WebDAV and back; what helps WebDAV is not seen.
	ok(client(t, "nfs-cp", local("one"), nfsURL(p, "from-nfs")))
	ok(curl(g, "--output", local("two"), g.WebDAV+"from-nfs"))
	same(local("two"))
	ok(curl(g, "--upload-file", local("one"), g.WebDAV+"from-webdav"))
	ok(client(t, "nfs-cp", nfsURL(p, "from-webdav"), local("three")))
	same(local("three"))
	for _, name := range []string{".sgwtmp", "shown"} {
		if err := os.WriteFile(filepath.Join(host, name), []byte("content"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if out := ok(client(t, "nfs-ls", nfsURL(p, ""))); strings.Contains(out, "sgwtmp") || !strings.Contains(out, "from-webdav") {
		t.Errorf("by NFS there are\n%s", out)
	}
	ok(client(t, "nfs-cp", nfsURL(p, "shown"), local("shown")))
	if out, err := client(t, "nfs-cp", nfsURL(p, ".sgwtmp"), local("hidden")); err == nil {
		t.Errorf("what is not shown can be read: %s", out)
	}
	if err := os.Remove(filepath.Join(host, ".sgwtmp")); err != nil { // where S3 has a directory
		t.Fatal(err)
	}
	if out := ok(client(t, "stat", "--format", "%u:%g %a", filepath.Join(host, "from-webdav"))); out != "1000:1001 644\n" {
		t.Errorf("from WebDAV it is %s", out)
	}

	// And S3, which has a process for each grant that uses it.
	ok("", objects(t, f, g).FGetObject(t.Context(), "vol", "from-nfs", local("five"), minio.GetObjectOptions{}))
	same(local("five"))
	_, err := objects(t, f, g).FPutObject(t.Context(), "vol", "from-s3", local("one"), minio.PutObjectOptions{})
	ok("", err)
	ok(curl(g, "--output", local("two"), g.WebDAV+"from-s3"))
	same(local("two"))
	ok(client(t, "nfs-cp", nfsURL(p, "from-s3"), local("six")))
	same(local("six"))
	if err := objects(t, f, other).FGetObject(t.Context(), "vol", "from-nfs", local("seven"), minio.GetObjectOptions{}); err == nil {
		t.Error("another's bucket can be read")
	}
	if processes(t, f) == 0 {
		t.Error("S3 is served by no process")
	}
	if _, err := os.Stat(filepath.Join(host, ".sgwtmp")); err != nil {
		t.Errorf("what helps S3 is elsewhere: %v", err)
	}
	if out := ok(client(t, "nfs-ls", nfsURL(p, ""))); strings.Contains(out, "sgwtmp") {
		t.Errorf("what helps S3 is seen by NFS:\n%s", out)
	}

	refused("404", "", second(curl(other, g.WebDAV+"from-nfs")))
	refused("401", "", second(curl(filertest.Grant{ID: "mine", Secret: other.Secret}, g.WebDAV+"from-nfs")))
	for want, args := range map[string][]string{
		"grant mine exists, and is another: it is of volume vol": {"grant", "www", "--id", "mine"},
		"volume x: not found":       {"grant", "x"},
		"it is not UID:GID":         {"grant", "vol", "--user", "root"},
		`"../x" is no name; letter`: {"grant", "vol", "--id", "../x"},
	} {
		out, err := f.Command(args...)
		refused(want, out, err)
	}
	// A lock and the grants outlast the process, as often as it is killed.
	if err := os.WriteFile(local("lock"), []byte(`<lockinfo xmlns="DAV:"><lockscope><exclusive/></lockscope><locktype><write/></locktype></lockinfo>`), 0o644); err != nil {
		t.Fatal(err)
	}
	ok(curl(g, "--request", "LOCK", "--data-binary", "@"+local("lock"), g.WebDAV+"from-nfs"))
	list := ok(f.Command("grants", "-o", "json"))
	if strings.Contains(list, g.Secret) || !strings.Contains(list, g.WebDAV) {
		t.Errorf("the grants: %s", list)
	}
	for _, s := range []os.Signal{syscall.SIGTERM, syscall.SIGKILL} {
		f.Signal(s)
		for end := time.Now().Add(time.Minute); processes(t, f) > 0; time.Sleep(20 * time.Millisecond) {
			if time.Now().After(end) {
				t.Fatalf("after %v there are processes that serve S3", s)
			}
		}
		f.Run()
		ok("", objects(t, f, g).FGetObject(t.Context(), "vol", "from-nfs", local("five"), minio.GetObjectOptions{}))
		if now := ok(f.Command("grants", "-o", "json")); now != list {
			t.Errorf("after %v there are %s", s, now)
		}
		if again := f.Grant("vol", "--id", "mine", "--user", "1000:1001"); again != g {
			t.Errorf("granted again it is %+v", again)
		}
		ok(curl(g, "--output", local("two"), g.WebDAV+"from-nfs"))
		refused("423", "", second(curl(g, "--upload-file", local("one"), g.WebDAV+"from-nfs")))
	}
	if out := ok(f.Command("status")); !strings.Contains(out, "volumes  2, published 1 times, granted 2 times") || !strings.Contains(out, "https://"+f.Host) {
		t.Errorf("status: %s", out)
	}
	// The publication has its files for as long as it is there itself.
	ok(f.Command("revoke", "mine", "mine", "nobody"))
	refused("401", "", second(curl(g, g.WebDAV+"from-nfs")))
	ok(client(t, "nfs-cp", nfsURL(p, "from-nfs"), local("four")))
	ok(f.Command("unpublish", p.ID))
	again := f.Grant("vol", "--read-only")
	ok(curl(again, "--output", local("two"), again.WebDAV+"from-nfs"))
	same(local("two"))
	refused("403", "", second(curl(again, "--upload-file", local("one"), again.WebDAV+"new")))
}

// overTLS is the way to a filer, whose certificate it knows.
func overTLS(t *testing.T, f *filertest.Filer) *http.Transport {
	t.Helper()
	pem, err := os.ReadFile(f.CA())
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(pem)
	return &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12}}
}

// objects is a client of S3.
func objects(t *testing.T, f *filertest.Filer, g filertest.Grant) *minio.Client {
	t.Helper()
	c, err := minio.New(strings.Trim(strings.TrimPrefix(g.S3, "https://"), "/"), &minio.Options{
		Creds: credentials.NewStaticV4(g.ID, g.Secret, ""), Secure: true, Region: "us-east-1", Transport: overTLS(t, f),
	})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// processes are how many serve S3 for the filer.
func processes(t *testing.T, f *filertest.Filer) (n int) {
	t.Helper()
	commands, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range commands {
		command, err := os.ReadFile(path)
		if err != nil || !strings.Contains(string(command), "cradle-s3") {
			continue // it has ended
		}
		if table, err := os.ReadFile(filepath.Join(filepath.Dir(path), "mountinfo")); err == nil && strings.Contains(string(table), filepath.Base(filepath.Dir(f.Pool))) {
			n++
		}
	}
	return n
}

// second is a client's error with what it has said.
func second(out string, err error) error {
	if err != nil {
		return errors.Join(err, errors.New(out))
	}
	return nil
}
