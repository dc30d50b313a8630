//go:build vm

package s3

import (
	"bytes"
	"context"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/minio/minio-go/v7"
	"github.com/minio/minio-go/v7/pkg/credentials"
	"github.com/minio/minio-go/v7/pkg/tags"
	"golang.org/x/sys/unix"

	"github.com/cradlestack/cradlestack/csi-plugin/filer/gateway"
	"github.com/cradlestack/cradlestack/csi-plugin/filer/snapshots"
	"github.com/cradlestack/cradlestack/test/programs"
)

// A world is a directory that is served as bucket "bucket" by key "key" with secret "secret", with something beside it that nobody may see.
type world struct {
	t      *testing.T
	server *Server
	host   string
	root   string
}

func serve(t *testing.T) *world {
	t.Helper()
	if os.Getuid() != 0 {
		t.Fatal("this needs root")
	}
	program, err := programs.Path("cradle-s3")
	if err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp("", "s3-") // for unix sockets, t.TempDir's paths are too long
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	w := &world{t: t, root: filepath.Join(dir, "root")}
	if err := errors.Join(os.Mkdir(w.root, 0o755), os.WriteFile(filepath.Join(dir, "secret"), []byte("classified"), 0o644)); err != nil {
		t.Fatal(err)
	}
	if w.server, err = New(program, filepath.Join(dir, "run"), 0, slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelDebug}))); err != nil {
		t.Fatal(err)
	}
	h := httptest.NewServer(w.server)
	t.Cleanup(func() {
		h.Close()
		w.server.Close()
		if left := children(w.root); left != "" {
			t.Errorf("processes are left: %s", left)
		}
	})
	w.host = strings.TrimPrefix(h.URL, "http://")
	w.allow(Grant{Key: "key", Secret: "secret"})
	return w
}

// children are the processes that have a directory mounted.
func children(dir string) (found string) {
	tables, _ := filepath.Glob("/proc/[0-9]*/mountinfo")
	for _, table := range tables {
		data, err := os.ReadFile(table)
		if err == nil && strings.Contains(string(data), " "+dir+" ") {
			found += " " + table
		}
	}
	return found
}

func (w *world) allow(g Grant) {
	w.t.Helper()
	g.Volume, g.Root = "bucket", w.root
	if err := w.server.Allow(g); err != nil {
		w.t.Fatal(err)
	}
}

// process is the one that serves a grant, 0 for none.
func (w *world) process(key string) (pid int) {
	g := w.server.grants[key]
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.child == nil {
		return 0
	}
	return g.child.cmd.Process.Pid
}

func (w *world) kill(key string) {
	w.t.Helper()
	if err := unix.Kill(w.process(key), unix.SIGKILL); err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) client(key, secret string) *minio.Client {
	w.t.Helper()
	c, err := minio.New(w.host, &minio.Options{Creds: credentials.NewStaticV4(key, secret, ""), Region: "us-east-1"})
	if err != nil {
		w.t.Fatal(err)
	}
	return c
}

func (w *world) put(c *minio.Client, name, content string) minio.UploadInfo {
	w.t.Helper()
	info, err := c.PutObject(w.t.Context(), "bucket", name, strings.NewReader(content), int64(len(content)), minio.PutObjectOptions{})
	if err != nil {
		w.t.Errorf("put %s: %v", name, err)
	}
	return info
}

func get(ctx context.Context, c *minio.Client, name string) (string, error) {
	o, err := c.GetObject(ctx, "bucket", name, minio.GetObjectOptions{})
	if err != nil {
		return "", err
	}
	defer o.Close()
	data, err := io.ReadAll(o)
	return string(data), err
}

func (w *world) want(c *minio.Client, name, want string) {
	w.t.Helper()
	if got, err := get(w.t.Context(), c, name); err != nil || got != want {
		w.t.Errorf("%s has %d bytes, not %d, %v", name, len(got), len(want), err)
	}
}

func (w *world) write(name, content string) {
	w.t.Helper()
	if err := os.WriteFile(filepath.Join(w.root, name), []byte(content), 0o644); err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) read(name string) string {
	w.t.Helper()
	data, err := os.ReadFile(filepath.Join(w.root, name))
	if err != nil {
		w.t.Error(err)
	}
	return string(data)
}

func TestRootObjects(t *testing.T) {
	w := serve(t)
	w.allow(Grant{Key: "key", Secret: "secret", UID: 1234, GID: 2345})
	c := w.client("key", "secret")
	ctx := t.Context()
	info := w.put(c, "dir/ü &%", "content")
	if w.read("dir/ü &%") != "content" {
		t.Error("the file is another")
	}
	for name, mode := range map[string]uint32{"dir": unix.S_IFDIR | 0o755, "dir/ü &%": unix.S_IFREG | 0o644} {
		var st unix.Stat_t
		if err := unix.Stat(filepath.Join(w.root, name), &st); err != nil || st.Uid != 1234 || st.Gid != 2345 || st.Mode != mode {
			t.Errorf("%s is %d:%d %o, %v", name, st.Uid, st.Gid, st.Mode, err)
		}
	}
	// What was not written over S3 has a tag, which is another one with other content; and so has what was, and was changed since.
	w.write("beside", "one")
	stat := func(name string) string {
		t.Helper()
		o, err := c.StatObject(ctx, "bucket", name, minio.StatObjectOptions{})
		if err != nil || o.ETag == "" {
			t.Errorf("%s: %+v, %v", name, o, err)
		}
		return o.ETag
	}
	tag := stat("beside")
	if again := stat("beside"); again != tag {
		t.Errorf("it was %s and is %s", tag, again)
	}
	w.write("beside", "other")
	if stat("beside") == tag {
		t.Error("another content has the same tag")
	}
	if tag = stat("dir/ü &%"); tag != info.ETag {
		t.Errorf("put as %s it is %s", info.ETag, tag)
	}
	w.write("dir/ü &%", "changed in place")
	if stat("dir/ü &%") == tag {
		t.Error("what was changed in place has the former tag")
	}
	w.want(c, "dir/ü &%", "changed in place")
	listed := map[string]string{}
	for o := range c.ListObjects(ctx, "bucket", minio.ListObjectsOptions{Recursive: true}) {
		listed[o.Key] = o.ETag
	}
	if len(listed) != 2 || strings.Trim(listed["beside"], `"`) != stat("beside") {
		t.Errorf("listed: %v", listed)
	}
	// In parts, larger than is kept in memory anywhere.
	large := strings.Repeat("0123456789abcdef", 12<<20/16)
	if _, err := c.PutObject(ctx, "bucket", "large", strings.NewReader(large), int64(len(large)), minio.PutObjectOptions{PartSize: 5 << 20}); err != nil {
		t.Error(err)
	}
	if w.read("large") != large {
		t.Error("what came in parts is another file")
	}
	w.want(c, "large", large)
	// A condition, a copy, tags and metadata of the user's.
	never := minio.PutObjectOptions{}
	never.SetMatchETagExcept("*")
	if _, err := c.PutObject(ctx, "bucket", "beside", strings.NewReader("x"), 1, never); minio.ToErrorResponse(err).Code != minio.PreconditionFailed {
		t.Errorf("what is there was written anew: %v", err)
	}
	if _, err := c.CopyObject(ctx, minio.CopyDestOptions{Bucket: "bucket", Object: "copy/of", UserMetadata: map[string]string{"Colour": "red"}, ReplaceMetadata: true},
		minio.CopySrcOptions{Bucket: "bucket", Object: "beside"}); err != nil {
		t.Error(err)
	}
	w.want(c, "copy/of", "other")
	label, err := tags.NewTags(map[string]string{"size": "small"}, true)
	if err != nil {
		t.Fatal(err)
	}
	if err := c.PutObjectTagging(ctx, "bucket", "copy/of", label, minio.PutObjectTaggingOptions{}); err != nil {
		t.Error(err)
	}
	if got, err := c.GetObjectTagging(ctx, "bucket", "copy/of", minio.GetObjectTaggingOptions{}); err != nil || got.ToMap()["size"] != "small" {
		t.Errorf("the tags are %v, %v", got, err)
	}
	if o, err := c.StatObject(ctx, "bucket", "copy/of", minio.StatObjectOptions{}); err != nil || o.UserMetadata["Colour"] != "red" {
		t.Errorf("the metadata is %v, %v", o.UserMetadata, err)
	}
	presigned, err := c.PresignedGetObject(ctx, "bucket", "beside", time.Hour, url.Values{})
	if err != nil {
		t.Fatal(err)
	}
	resp, err := http.Get(presigned.String())
	if err != nil {
		t.Fatal(err)
	}
	data, err := io.ReadAll(resp.Body)
	resp.Body.Close()
	if err != nil || string(data) != "other" {
		t.Errorf("by a presigned URL it is %q, %v", data, err)
	}
	for name := range listed {
		if err := c.RemoveObject(ctx, "bucket", name, minio.RemoveObjectOptions{}); err != nil {
			t.Error(err)
		}
	}
	if _, err := os.Stat(filepath.Join(w.root, "beside")); err == nil {
		t.Error("what was removed is there")
	}
}

// TestRootConfined: nobody reads another's files, and nothing leads out of the directory.
func TestRootConfined(t *testing.T) {
	w := serve(t)
	other := w.root + "-other"
	if err := errors.Join(os.Mkdir(other, 0o755), os.Symlink("/etc/passwd", filepath.Join(w.root, "absolute")), os.Symlink("../secret", filepath.Join(w.root, "up")),
		os.Symlink("/proc/1/environ", filepath.Join(w.root, "proc")), os.Symlink("/proc/self/fd/3", filepath.Join(w.root, "configuration")), os.Symlink("/", filepath.Join(w.root, "slash"))); err != nil {
		t.Fatal(err)
	}
	if err := w.server.Allow(Grant{Key: "other", Secret: "other", Volume: "other", Root: other}); err != nil {
		t.Fatal(err)
	}
	w.write("file", "content")
	c := w.client("key", "secret")
	for _, name := range []string{"absolute", "up", "configuration", "../secret", "slash/etc/passwd", "slash/volumes/bucket/../../etc/passwd"} {
		if got, err := get(t.Context(), c, name); err == nil {
			t.Errorf("%s is %.40q", name, got)
		}
	}
	for _, who := range []*minio.Client{w.client("other", "other"), w.client("key", "wrong"), w.client("nobody", "secret"), w.client("", "")} {
		if got, err := get(t.Context(), who, "file"); err == nil {
			t.Errorf("somebody else reads %q", got)
		}
	}
	if err := c.MakeBucket(t.Context(), "new", minio.MakeBucketOptions{}); err == nil {
		t.Error("a bucket was made")
	}
	if err := c.RemoveBucket(t.Context(), "bucket"); err == nil {
		t.Error("the bucket was removed")
	}
	w.allow(Grant{Key: "reader", Secret: "secret", ReadOnly: true})
	r := w.client("reader", "secret")
	w.want(r, "file", "content")
	if _, err := r.PutObject(t.Context(), "bucket", "new", strings.NewReader("x"), 1, minio.PutObjectOptions{}); err == nil {
		t.Error("who may only read has written")
	}
	if err := r.RemoveObject(t.Context(), "bucket", "file", minio.RemoveObjectOptions{}); err == nil {
		t.Error("who may only read has removed")
	}
	w.server.Forbid("key")
	if _, err := get(t.Context(), c, "file"); err == nil {
		t.Error("a grant that has ended is one")
	}
}

// TestRootLongKey: a grant may have the longest name that there is.
func TestRootLongKey(t *testing.T) {
	w := serve(t)
	key := strings.Repeat("k", 128)
	w.allow(Grant{Key: key, Secret: "secret", Snapshots: &snapshots.Source{List: func() ([]snapshots.Snapshot, error) { return nil, nil }}})
	c := w.client(key, "secret")
	w.put(c, "object", "content")
	w.want(c, "object", "content")
}

// TestRootKilled: the process may die at any time; the next request finds another one.
func TestRootKilled(t *testing.T) {
	w := serve(t)
	c := w.client("key", "secret")
	for range 3 {
		w.put(c, "file", "content")
		if children(w.root) == "" {
			t.Error("no process has the directory")
		}
		w.kill("key")
		w.want(c, "file", "content")
	}
}

func TestRootClients(t *testing.T) {
	w := servePast(t)
	w.write("before", "then")
	w.take("first")
	if err := os.Remove(filepath.Join(w.root, "before")); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	content := bytes.Repeat([]byte("0123456789abcdef"), 12<<20/16)
	for name, data := range map[string][]byte{"large": content, "small ü": []byte("small"), "empty": nil} {
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	run := func(name string, args ...string) string {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
		defer cancel()
		cmd := exec.CommandContext(ctx, name, args...)
		cmd.Env = append(os.Environ(), "AWS_CA_BUNDLE=") // which rclone does not take
		out, err := cmd.CombinedOutput()
		if errors.Is(err, exec.ErrNotFound) {
			t.Fatalf("%v; run make setup", err)
		}
		if err != nil {
			t.Errorf("%s %v: %v\n%s", name, args, err, out)
		}
		return string(out)
	}
	config := filepath.Join(t.TempDir(), "rclone.conf")
	if err := os.WriteFile(config, []byte("[s]\ntype = s3\nprovider = Other\nendpoint = http://"+w.host+"\naccess_key_id = key\nsecret_access_key = secret\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	rclone := func(args ...string) string {
		return run("rclone", append([]string{"--config", config, "--retries", "1", "--s3-chunk-size", "5M", "--s3-upload-cutoff", "5M"}, args...)...)
	}
	rclone("copy", dir, "s:bucket/rclone")
	rclone("check", "--download", dir, "s:bucket/rclone")
	if out := rclone("lsf", "s:bucket/rclone"); out != "empty\nlarge\nsmall ü\n" {
		t.Errorf("rclone lsf: %s", out)
	}
	s3cmd := func(args ...string) string {
		return run("s3cmd", append([]string{"--config=/dev/null", "--no-ssl", "--host=" + w.host, "--host-bucket=" + w.host, "--access_key=key", "--secret_key=secret", "--multipart-chunk-size-mb=5"}, args...)...)
	}
	s3cmd("put", filepath.Join(dir, "large"), "s3://bucket/s3cmd/large")
	got := filepath.Join(t.TempDir(), "got")
	s3cmd("get", "s3://bucket/s3cmd/large", got)
	if data, err := os.ReadFile(got); err != nil || !bytes.Equal(data, content) {
		t.Errorf("s3cmd got %d bytes, %v", len(data), err)
	}
	if out := s3cmd("ls", "s3://bucket/"); !strings.Contains(out, "s3://bucket/rclone/") {
		t.Errorf("s3cmd ls: %s", out)
	}
	if out := rclone("lsf", "s:bucket/.snapshots") + rclone("lsf", "s:bucket/.snapshots/first"); out != "first/\nbefore\n" {
		t.Errorf("rclone lsf of the snapshots: %s", out)
	}
	if out := rclone("cat", "s:bucket/.snapshots/first/before"); out != "then" {
		t.Errorf("rclone cat: %s", out)
	}
	rclone("copyto", "s:bucket/.snapshots/first/before", "s:bucket/rclone/back")
	if w.read("rclone/back") != "then" {
		t.Error("what rclone has brought back is another file")
	}
	if out := s3cmd("ls", "s3://bucket/.snapshots/first/"); !strings.Contains(out, "s3://bucket/.snapshots/first/before") {
		t.Errorf("s3cmd ls of a snapshot: %s", out)
	}
	s3cmd("cp", "s3://bucket/.snapshots/first/before", "s3://bucket/s3cmd/back")
	if w.read("s3cmd/back") != "then" {
		t.Error("what s3cmd has brought back is another file")
	}
	s3cmd("del", "--recursive", "--force", "s3://bucket/s3cmd/")
	rclone("purge", "s:bucket/rclone")
	// The AWS SDK for Go is in a module of its own. By TLS it sends checksums in trailers, and signs no content.
	root, err := programs.Root()
	if err != nil {
		t.Fatal(err)
	}
	program := filepath.Join(t.TempDir(), "aws-client")
	build := exec.CommandContext(t.Context(), "go", "build", "-mod=readonly", "-buildvcs=false", "-o", program, "./aws-client")
	build.Dir = filepath.Join(root, "tools/versitygw")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("go build ./aws-client: %v\n%s", err, out)
	}
	secure := httptest.NewTLSServer(w.server)
	defer secure.Close()
	ca := filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(ca, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: secure.Certificate().Raw}), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("SSL_CERT_FILE", ca)
	t.Setenv("AWS_ACCESS_KEY_ID", "key")
	t.Setenv("AWS_SECRET_ACCESS_KEY", "secret")
	run(program, "http://"+w.host, "bucket")
	run(program, secure.URL, "bucket")
	if entries, err := os.ReadDir(w.root); err != nil || len(entries) > 1 {
		t.Errorf("at the end there are %v, %v", entries, err)
	}
}

// until waits until a grant's process writes, or does not write any more, to a file that is no object yet.
func (w *world) until(key string, writes bool) {
	w.t.Helper()
	for {
		files, err := filepath.Glob("/proc/" + strconv.Itoa(w.process(key)) + "/fd/*")
		if err != nil {
			w.t.Fatal(err)
		}
		if writes == slices.ContainsFunc(files, func(file string) bool {
			to, err := os.Readlink(file)
			return err == nil && strings.Contains(to, "/.sgwtmp/")
		}) {
			return
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// half uploads half of an object, and tells how that is answered. end ends it.
func (w *world) half(key, name string) (code chan int, end func()) {
	w.t.Helper()
	u, err := w.client(key, "secret").PresignedPutObject(w.t.Context(), "bucket", name, time.Hour)
	if err != nil {
		w.t.Fatal(err)
	}
	theirs, ours := io.Pipe()
	code = make(chan int, 1)
	go func() {
		req, err := http.NewRequestWithContext(w.t.Context(), http.MethodPut, u.String(), theirs)
		if err != nil {
			code <- 0
			return
		}
		req.ContentLength = 2 << 20
		resp, err := http.DefaultTransport.RoundTrip(req)
		if err != nil {
			code <- 0
			return
		}
		resp.Body.Close()
		code <- resp.StatusCode
	}()
	if _, err := ours.Write(make([]byte, 1<<20)); err != nil {
		w.t.Fatal(err)
	}
	w.until(key, true)
	return code, func() { ours.Close() }
}

// TestRootRevoked: a grant ends although a client of it has stopped in the middle of an upload, which leaves nothing.
func TestRootRevoked(t *testing.T) {
	w := serve(t)
	c := w.client("key", "secret")
	w.put(c, "object", "content")
	code, end := w.half("key", "slow")
	w.server.Forbid("key")
	if got := <-code; got != http.StatusForbidden && got != 0 {
		t.Errorf("an upload whose grant has ended is answered %d", got)
	}
	end()
	if _, err := os.Lstat(filepath.Join(w.root, "slow")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("half of an object is there: %v", err)
	}
}

// TestRootRefusedEarly: why a request is refused is told although the client has not sent all of it.
func TestRootRefusedEarly(t *testing.T) {
	w := serve(t)
	w.put(w.client("key", "secret"), "object", "content")
	u, err := w.client("key", "wrong").PresignedPutObject(t.Context(), "bucket", "object", time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	for range 20 {
		req, err := http.NewRequestWithContext(t.Context(), http.MethodPut, u.String(), bytes.NewReader(make([]byte, 3<<20)))
		if err != nil {
			t.Fatal(err)
		}
		resp, err := http.DefaultTransport.RoundTrip(req)
		if err != nil {
			t.Fatal(err)
		}
		text, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if err != nil || resp.StatusCode != http.StatusForbidden || !strings.Contains(string(text), "SignatureDoesNotMatch") {
			t.Fatalf("with a wrong secret: %s %s, %v", resp.Status, text, err)
		}
	}
	w.want(w.client("key", "secret"), "object", "content")
}

// TestRootManyGrants: as many processes are at work as there may be; one that nobody uses makes room for another, and one that somebody uses does not.
func TestRootManyGrants(t *testing.T) {
	w := serve(t)
	w.server.most = 2
	w.put(w.client("key", "secret"), "object", "content")
	for _, key := range []string{"second", "third"} {
		w.allow(Grant{Key: key, Secret: "secret"})
		w.want(w.client(key, "secret"), "object", "content")
	}
	w.server.mu.Lock()
	first := w.server.grants["key"]
	w.server.mu.Unlock()
	first.mu.Lock()
	ended := first.child == nil
	first.mu.Unlock()
	if n := w.server.processes.Load(); n != 2 || !ended {
		t.Errorf("%d processes are at work, and the first one has ended: %t", n, ended)
	}
	one, end := w.half("key", "one")
	other, endOther := w.half("second", "other")
	u, err := w.client("third", "secret").PresignedGetObject(t.Context(), "bucket", "object", time.Hour, nil)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := http.Get(u.String())
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != http.StatusServiceUnavailable {
		t.Errorf("where all are at work another is answered %s", resp.Status)
	}
	end()
	endOther()
	<-one
	<-other
	w.want(w.client("third", "secret"), "object", "content")
}

// TestRootCutOff: of an object or part whose client goes in the middle there is nothing, and what was there before is there whole.
func TestRootCutOff(t *testing.T) {
	w := serve(t)
	c := w.client("key", "secret")
	w.put(c, "object", "content")
	id, err := (&minio.Core{Client: c}).NewMultipartUpload(t.Context(), "bucket", "parts", minio.PutObjectOptions{})
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name, object string
		parameters   url.Values
	}{{"an object", "new", nil}, {"one that is there", "object", nil}, {"a part", "parts", url.Values{"uploadId": {id}, "partNumber": {"1"}}}} {
		u, err := w.client("key", "secret").Presign(t.Context(), http.MethodPut, "bucket", c.object, time.Hour, c.parameters)
		if err != nil {
			t.Fatal(err)
		}
		conn, err := net.Dial("tcp", w.host)
		if err != nil {
			t.Fatal(err)
		}
		w.until("key", false)
		if _, err := fmt.Fprintf(conn, "PUT %s HTTP/1.1\r\nHost: %s\r\nContent-Length: 2097152\r\n\r\n%s", u.RequestURI(), w.host, make([]byte, 1<<20)); err != nil {
			t.Fatal(err)
		}
		w.until("key", true)
		if err := conn.Close(); err != nil {
			t.Fatal(err)
		}
		w.until("key", false)
		w.want(w.client("key", "secret"), "object", "content")
		if _, err := os.Lstat(filepath.Join(w.root, "new")); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s that was cut off: it is there: %v", c.name, err)
		}
	}
	if parts, err := (&minio.Core{Client: c}).ListObjectParts(t.Context(), "bucket", "parts", id, 0, 10); err != nil || len(parts.ObjectParts) > 0 {
		t.Errorf("of a part that was cut off there are %+v, %v", parts.ObjectParts, err)
	}
}

// TestRootHeld: while the volume is held nothing is written, what is read is answered, an upload that takes too long is broken off and leaves nothing, and afterwards
// all is done that was asked for.
func TestRootHeld(t *testing.T) {
	w := serve(t)
	gate := &gateway.Gate{}
	w.allow(Grant{Key: "key", Secret: "secret", Gate: gate})
	c := w.client("key", "secret")
	w.put(c, "object", "old")
	slow, end := w.half("key", "slow")
	held, release := make(chan struct{}), make(chan struct{})
	done := make(chan error, 1)
	go func() {
		done <- gate.Hold(t.Context(), func() error {
			close(held)
			<-release
			return nil
		})
	}()
	<-held
	if code := <-slow; code != http.StatusServiceUnavailable && code != 0 {
		t.Errorf("an upload that takes too long is answered %d", code)
	}
	end()
	put, removed := make(chan error, 1), make(chan error, 1)
	go func() {
		_, err := c.PutObject(t.Context(), "bucket", "new", strings.NewReader("new"), 3, minio.PutObjectOptions{})
		put <- err
	}()
	go func() { removed <- c.RemoveObject(t.Context(), "bucket", "object", minio.RemoveObjectOptions{}) }()
	w.want(c, "object", "old")
	select {
	case err := <-put:
		t.Errorf("while it is held something is written: %v", err)
	case err := <-removed:
		t.Errorf("while it is held something is removed: %v", err)
	default:
	}
	close(release)
	for _, answered := range []chan error{done, put, removed} {
		if err := <-answered; err != nil {
			t.Error(err)
		}
	}
	w.want(c, "new", "new")
	for _, name := range []string{"object", "slow"} {
		if _, err := os.Lstat(filepath.Join(w.root, name)); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s is there: %v", name, err)
		}
	}
}
