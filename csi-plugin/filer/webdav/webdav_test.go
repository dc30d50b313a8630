package webdav

import (
	"bytes"
	"context"
	"encoding/json"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/net/webdav"
	"golang.org/x/sys/unix"

	"github.com/cradlestack/cradlestack/csi-plugin/filer/gateway"
	"github.com/cradlestack/cradlestack/csi-plugin/filer/snapshots"
	"github.com/cradlestack/cradlestack/csi-plugin/tree"
)

// A world is a directory that is served to user "u" with the secret "p", with something beside it that nobody may see.
type world struct {
	t      testing.TB
	server *Server
	url    string // of the volume
	root   string
	locks  string
}

func serve(t testing.TB) *world {
	t.Helper()
	dir := t.TempDir()
	w := &world{t: t, root: filepath.Join(dir, "root"), locks: filepath.Join(dir, "locks")}
	if err := os.Mkdir(w.root, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "secret"), []byte("classified"), 0o644); err != nil {
		t.Fatal(err)
	}
	w.start()
	return w
}

// start serves until the test's end, or until what it returns is called.
func (w *world) start() (stop func()) {
	w.t.Helper()
	w.server = New(w.locks, 0, slog.New(slog.NewTextHandler(w.t.Output(), nil)))
	w.allow(Grant{User: "u", Secret: "p"})
	h := httptest.NewServer(w.server)
	w.url = h.URL + "/v"
	stop = func() {
		h.Close()
		w.server.Close()
	}
	w.t.Cleanup(stop)
	return stop
}

func (w *world) allow(g Grant) {
	w.t.Helper()
	g.Volume, g.Root, g.UID, g.GID = "v", w.root, os.Getuid(), os.Getgid()
	if err := w.server.Allow(g); err != nil {
		w.t.Fatal(err)
	}
}

// do makes a request, with headers as "Name: value".
func (w *world) do(method, path, body string, headers ...string) (code int, answer string, header http.Header) {
	w.t.Helper()
	resp, err := w.try(method, path, strings.NewReader(body), headers...)
	if err != nil {
		w.t.Fatal(err)
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(resp.Body)
	if err != nil {
		w.t.Fatal(err)
	}
	return resp.StatusCode, string(data), resp.Header
}

func (w *world) try(method, path string, body io.Reader, headers ...string) (*http.Response, error) {
	req, err := http.NewRequestWithContext(w.t.Context(), method, w.url+path, body)
	if err != nil {
		return nil, err
	}
	req.SetBasicAuth("u", "p")
	for _, h := range headers {
		name, value, _ := strings.Cut(h, ": ")
		req.Header.Set(name, value)
	}
	return http.DefaultTransport.RoundTrip(req)
}

// want makes a request that is to be answered so.
func (w *world) want(code int, method, path, body string, headers ...string) (string, http.Header) {
	w.t.Helper()
	got, answer, header := w.do(method, path, body, headers...)
	if got != code {
		w.t.Errorf("%s %s %v: %d, not %d: %s", method, path, headers, got, code, answer)
	}
	return answer, header
}

func (w *world) file(name string) string {
	w.t.Helper()
	data, err := os.ReadFile(filepath.Join(w.root, name))
	if err != nil {
		w.t.Error(err)
	}
	return string(data)
}

func (w *world) write(name, content string) {
	w.t.Helper()
	if err := os.WriteFile(filepath.Join(w.root, name), []byte(content), 0o640); err != nil {
		w.t.Fatal(err)
	}
}

func TestAccess(t *testing.T) {
	w := serve(t)
	w.write("file", "content")
	other := filepath.Join(filepath.Dir(w.root), "other")
	if err := os.Mkdir(other, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := w.server.Allow(Grant{User: "o", Secret: "q", Volume: "w", Root: other}); err != nil {
		t.Fatal(err)
	}
	w.allow(Grant{User: "r", Secret: "s", ReadOnly: true})
	as := func(user, secret string) string {
		r := &http.Request{Header: http.Header{}}
		r.SetBasicAuth(user, secret)
		return "Authorization: " + r.Header.Get("Authorization")
	}
	for _, method := range []string{"GET", "PUT", "PROPFIND", "OPTIONS", "DELETE", "LOCK"} {
		for _, login := range []string{"Authorization: ", as("u", ""), as("u", "P"), as("u", "pp"), as("", "p"), as("o", "p"), as("x", "p"), "Authorization: Bearer p"} {
			_, h := w.want(http.StatusUnauthorized, method, "/file", "", login)
			if h.Get("WWW-Authenticate") == "" {
				t.Errorf("%s: nobody is asked to log in", method)
			}
		}
		code, _, _ := w.do(method, "/file", "", as("o", "q"), "Depth: 0")
		if code != http.StatusNotFound {
			t.Errorf("%s of another's volume: %d", method, code)
		}
	}
	if answer, _ := w.want(http.StatusOK, "GET", "/file", "", as("r", "s")); answer != "content" {
		t.Errorf("read-only: %q", answer)
	}
	for _, method := range []string{"PUT", "DELETE", "MKCOL", "COPY", "MOVE", "PROPPATCH", "LOCK", "UNLOCK"} {
		w.want(http.StatusForbidden, method, "/file", "", as("r", "s"), "Destination: /v/new")
	}
	w.server.Forbid("u")
	w.server.Forbid("u")
	w.want(http.StatusUnauthorized, "GET", "/file", "")
	w.want(http.StatusOK, "GET", "/file", "", as("r", "s"))
	w.allow(Grant{User: "u", Secret: "new"})
	w.want(http.StatusUnauthorized, "GET", "/file", "")
	w.want(http.StatusOK, "GET", "/file", "", as("u", "new"))
	for _, g := range []Grant{{}, {User: "u"}, {User: "u:", Secret: "p", Volume: "v"}, {User: "u", Secret: "p", Volume: "../v"}, {User: "u", Secret: "p", Volume: ".."}} {
		if w.server.Allow(g) == nil {
			t.Errorf("%+v is allowed", g)
		}
	}
}

// TestConfined: nothing leads out of the directory, whatever is in it.
func TestConfined(t *testing.T) {
	w := serve(t)
	for name, target := range map[string]string{"absolute": "/etc/hostname", "up": "../secret", "dir": "/etc", "dot": "..", "round": "inner/../../secret", "loop": "loop", "nowhere": "nothing"} {
		if err := os.Symlink(target, filepath.Join(w.root, name)); err != nil {
			t.Fatal(err)
		}
	}
	if err := syscall.Mkfifo(filepath.Join(w.root, "fifo"), 0o666); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"absolute", "up", "dir/hostname", "dot/secret", "round", "loop", "nowhere", "fifo", ".cradle-webdav", ".sgwtmp", ".sgwtmp/x", "a%00b"} {
		w.want(http.StatusNotFound, "GET", "/"+name, "")
		w.want(http.StatusNotFound, "PROPFIND", "/"+name, "", "Depth: 0")
		code, _, _ := w.do("COPY", "/"+name, "", "Destination: /v/copy")
		if code != http.StatusNotFound {
			t.Errorf("COPY of %s: %d", name, code)
		}
	}
	for _, path := range []string{"/../secret", "/x/../../secret", "/%2e%2e/secret", "/..%2fsecret", "/dot/secret"} {
		if code, answer, _ := w.do("GET", path, ""); code != http.StatusNotFound || strings.Contains(answer, "classified") {
			t.Errorf("GET %s: %d %s", path, code, answer)
		}
		if code, _, _ := w.do("PUT", path, "mine"); code/100 != 4 {
			t.Errorf("PUT %s: %d", path, code)
		}
	}
	for _, destination := range []string{"/v/../w/x", "/w/x", "http://elsewhere/v/x", "../x", "/v/%2e%2e/x", "", "/v/.sgwtmp/x", "/v/.cradle-webdav"} {
		if code, _, _ := w.do("MOVE", "/nowhere", "", "Destination: "+destination); code/100 != 4 && code != http.StatusBadGateway {
			t.Errorf("MOVE to %q: %d", destination, code)
		}
	}
	w.want(http.StatusForbidden, "DELETE", "/", "")
	w.want(http.StatusConflict, "PUT", "/dir/new", "x")
	// A link that leads out is replaced by a file of its name, as what it leads to is not there.
	w.want(http.StatusCreated, "PUT", "/up", "mine")
	w.want(http.StatusNoContent, "DELETE", "/dot", "")
	w.want(http.StatusCreated, "MOVE", "/absolute", "", "Destination: /v/moved")
	if data, err := os.ReadFile(filepath.Join(filepath.Dir(w.root), "secret")); err != nil || string(data) != "classified" {
		t.Errorf("what is beside the volume is %q, %v", data, err)
	}
	if target, err := os.Readlink(filepath.Join(w.root, "moved")); err != nil || target != "/etc/hostname" {
		t.Errorf("a link was moved and is %q, %v", target, err)
	}
	answer, _ := w.want(http.StatusMultiStatus, "PROPFIND", "/", "", "Depth: 1")
	if strings.Contains(answer, "fifo") || strings.Contains(answer, "moved") || !strings.Contains(answer, "/v/up") {
		t.Errorf("listed: %s", answer)
	}
	if entries, err := os.ReadDir(filepath.Dir(w.root)); err != nil || len(entries) != 3 {
		t.Errorf("beside the volume are %v, %v", entries, err)
	}
}

// TestLinksInside: links that stay in the volume are followed, and stay links when what they lead to is written.
func TestLinksInside(t *testing.T) {
	w := serve(t)
	w.write("target", "old")
	if err := os.Symlink("target", filepath.Join(w.root, "link")); err != nil {
		t.Fatal(err)
	}
	if answer, _ := w.want(http.StatusOK, "GET", "/link", ""); answer != "old" {
		t.Errorf("it is %q", answer)
	}
	w.want(http.StatusNoContent, "PUT", "/link", "new")
	if w.file("target") != "new" {
		t.Errorf("the target is %q", w.file("target"))
	}
	if _, err := os.Readlink(filepath.Join(w.root, "link")); err != nil {
		t.Error(err)
	}
	// What a link leads to is not what its text says where the directory that it is in is a link as well.
	if err := errors.Join(os.MkdirAll(filepath.Join(w.root, "deep/in"), 0o755), os.Symlink("deep/in", filepath.Join(w.root, "short")), os.Symlink("../other", filepath.Join(w.root, "deep/in/link"))); err != nil {
		t.Fatal(err)
	}
	w.write("other", "another file")
	w.write("deep/other", "old")
	w.want(http.StatusNoContent, "PUT", "/short/link", "new")
	if got, _ := w.want(http.StatusOK, "GET", "/short/link", ""); got != "new" || w.file("other") != "another file" {
		t.Errorf("what was put is %q, and what it was not put to %q", got, w.file("other"))
	}
}

func TestFiles(t *testing.T) {
	w := serve(t)
	w.want(http.StatusCreated, "MKCOL", "/dir", "")
	_, h := w.want(http.StatusCreated, "PUT", "/dir/file", "0123456789")
	tag := h.Get("ETag")
	answer, h := w.want(http.StatusOK, "GET", "/dir/file", "")
	if answer != "0123456789" || h.Get("ETag") != tag || h.Get("X-Content-Type-Options") != "nosniff" {
		t.Errorf("%q with %v, put with %s", answer, h, tag)
	}
	if _, h := w.want(http.StatusOK, "HEAD", "/dir/file", ""); h.Get("Content-Length") != "10" {
		t.Errorf("HEAD: %v", h)
	}
	// A download that was interrupted goes on, if it still is the same file.
	if answer, _ := w.want(http.StatusPartialContent, "GET", "/dir/file", "", "Range: bytes=4-", "If-Range: "+tag); answer != "456789" {
		t.Errorf("resumed: %q", answer)
	}
	if answer, _ := w.want(http.StatusOK, "GET", "/dir/file", "", "Range: bytes=4-", `If-Range: "other"`); answer != "0123456789" {
		t.Errorf("resumed of another: %q", answer)
	}
	w.want(http.StatusRequestedRangeNotSatisfiable, "GET", "/dir/file", "", "Range: bytes=40-")
	w.want(http.StatusNotModified, "GET", "/dir/file", "", "If-None-Match: "+tag)
	w.want(http.StatusPreconditionFailed, "PUT", "/dir/file", "x", "If-None-Match: *")
	w.want(http.StatusPreconditionFailed, "PUT", "/dir/file", "x", `If-Match: "other"`)
	w.want(http.StatusPreconditionFailed, "PUT", "/dir/new", "x", "If-Match: *")
	w.want(http.StatusPreconditionFailed, "DELETE", "/dir/file", "", `If-Match: "other"`)
	w.want(http.StatusBadRequest, "PUT", "/dir/file", "x", "Content-Range: bytes 0-0/10")
	if w.file("dir/file") != "0123456789" {
		t.Errorf("it has become %q", w.file("dir/file"))
	}
	if err := os.Chmod(filepath.Join(w.root, "dir/file"), 0o4751); err != nil {
		t.Fatal(err)
	}
	_, h = w.want(http.StatusNoContent, "PUT", "/dir/file", "new", "If-Match: "+tag)
	if h.Get("ETag") == tag {
		t.Error("another file has the same tag")
	}
	if fi, err := os.Stat(filepath.Join(w.root, "dir/file")); err != nil || fi.Mode() != 0o751 {
		t.Errorf("replaced it has mode %v, %v", fi.Mode(), err)
	}
	w.want(http.StatusMethodNotAllowed, "PUT", "/dir", "x")
	w.want(http.StatusMethodNotAllowed, "PUT", "/new/", "x")
	w.want(http.StatusMethodNotAllowed, "GET", "/dir", "")
	w.want(http.StatusMethodNotAllowed, "TRACE", "/dir", "")
	w.want(http.StatusMethodNotAllowed, "MKCOL", "/dir/file", "")
	w.want(http.StatusConflict, "MKCOL", "/no/where", "")
	w.want(http.StatusConflict, "PUT", "/dir/file/below", "x")
	w.want(http.StatusBadRequest, "PUT", "/"+strings.Repeat("n", 256), "x")
	w.want(http.StatusBadRequest, "DELETE", "/dir", "", "Depth: 0")
	w.want(http.StatusNoContent, "DELETE", "/dir", "")
	w.want(http.StatusNotFound, "DELETE", "/dir", "")
	if entries, err := os.ReadDir(w.root); err != nil || len(entries) != 0 {
		t.Errorf("at the end there are %v, %v", entries, err)
	}
}

func TestCopyAndMove(t *testing.T) {
	w := serve(t)
	for _, dir := range []string{"a", "a/deep", "b"} {
		if err := os.Mkdir(filepath.Join(w.root, dir), 0o750); err != nil {
			t.Fatal(err)
		}
	}
	w.write("a/deep/file", "content")
	w.write("b/other", "other")
	if err := os.Symlink("deep/file", filepath.Join(w.root, "a/link")); err != nil {
		t.Fatal(err)
	}
	to := func(path string) string { return "Destination: " + w.url + path }
	w.want(http.StatusPreconditionFailed, "COPY", "/a", "", to("/b"), "Overwrite: F")
	w.want(http.StatusForbidden, "COPY", "/a", "", to("/a"))
	w.want(http.StatusForbidden, "COPY", "/a", "", to("/a/deep/a"))
	w.want(http.StatusForbidden, "COPY", "/a/deep", "", to("/a"))
	w.want(http.StatusForbidden, "MOVE", "/a", "", to("/a/deep/a"))
	w.want(http.StatusConflict, "COPY", "/a", "", to("/no/where"))
	w.want(http.StatusBadRequest, "COPY", "/a", "", to("/c"), "Depth: 1")
	w.want(http.StatusCreated, "COPY", "/a", "", to("/shallow"), "Depth: 0")
	w.want(http.StatusNoContent, "COPY", "/a", "", to("/b"))
	if w.file("b/deep/file") != "content" || w.file("b/link") != "content" {
		t.Error("the copy is another")
	}
	if target, err := os.Readlink(filepath.Join(w.root, "b/link")); err != nil || target != "deep/file" {
		t.Errorf("the copied link is %q, %v", target, err)
	}
	if fi, err := os.Stat(filepath.Join(w.root, "b/deep")); err != nil || fi.Mode().Perm() != 0o750 {
		t.Errorf("the copied directory: %v, %v", fi, err)
	}
	if _, err := os.Stat(filepath.Join(w.root, "b/other")); err == nil {
		t.Error("what was replaced is still there")
	}
	if entries, err := os.ReadDir(filepath.Join(w.root, "shallow")); err != nil || len(entries) != 0 {
		t.Errorf("the shallow copy: %v, %v", entries, err)
	}
	w.want(http.StatusNoContent, "MOVE", "/a/deep/file", "", to("/b"))
	w.want(http.StatusNoContent, "MOVE", "/a", "", to("/b"), "Depth: infinity")
	w.want(http.StatusCreated, "MOVE", "/b", "", to("/c%20d"))
	if _, err := os.Stat(filepath.Join(w.root, "c d/deep")); err != nil {
		t.Error(err)
	}
	w.want(http.StatusNotFound, "MOVE", "/b", "", to("/x"))
	w.want(http.StatusForbidden, "MOVE", "/", "", to("/x"))
	w.want(http.StatusForbidden, "MOVE", "/c%20d", "", to("/"))
	deep := filepath.Join(w.root, "tree")
	for range maxDepth + 1 {
		deep += "/d"
	}
	if err := os.MkdirAll(deep, 0o755); err != nil {
		t.Fatal(err)
	}
	w.want(http.StatusForbidden, "COPY", "/tree", "", to("/tree2"))
	if _, err := os.Stat(filepath.Join(w.root, ".cradle-webdav")); err == nil {
		t.Error("what helps is still there")
	}
}

// TestUploads: an upload that does not come to its end changes nothing, and is ended by the end of its grant.
func TestUploads(t *testing.T) {
	w := serve(t)
	w.write("file", "old")
	started := func(path string) (*io.PipeWriter, chan error) {
		r, body := io.Pipe()
		ended := make(chan error, 1)
		go func() {
			resp, err := w.try("PUT", path, r)
			if err == nil {
				resp.Body.Close()
				if resp.StatusCode/100 == 2 {
					ended <- nil
					return
				}
				err = fmt.Errorf("answered %s", resp.Status)
			}
			r.CloseWithError(err)
			ended <- err
		}()
		if _, err := body.Write(bytes.Repeat([]byte("x"), 100_000)); err != nil {
			t.Fatal(err)
		}
		return body, ended
	}
	body, ended := started("/file")
	body.CloseWithError(io.ErrUnexpectedEOF)
	if err := <-ended; err == nil {
		t.Error("an upload that broke off has succeeded")
	}
	body, ended = started("/file")
	if w.file("file") != "old" {
		t.Errorf("while it is written it is %.20q", w.file("file"))
	}
	// Whoever replaces the file meanwhile is heard.
	_, h := w.want(http.StatusOK, "HEAD", "/file", "")
	other, otherEnded := started("/other")
	w.want(http.StatusNoContent, "PUT", "/file", "newer", "If-Match: "+h.Get("ETag"))
	body.Close()
	if err := <-ended; err != nil {
		t.Error(err)
	}
	if len(w.file("file")) != 100_000 {
		t.Errorf("it has %d bytes", len(w.file("file")))
	}
	w.server.Forbid("u") // and does not wait for the client
	other.Close()
	if err := <-otherEnded; err == nil {
		t.Error("an upload outlasts its grant")
	}
	if entries, err := os.ReadDir(w.root); err != nil || len(entries) != 1 {
		t.Errorf("at the end there are %v, %v", entries, err)
	}
	// A process that is killed leaves parts: the next one removes them.
	if err := os.MkdirAll(filepath.Join(w.root, ".cradle-webdav/part"), 0o700); err != nil {
		t.Fatal(err)
	}
	w.allow(Grant{User: "u", Secret: "p"})
	if entries, err := os.ReadDir(w.root); err != nil || len(entries) != 1 {
		t.Errorf("after another start there are %v, %v", entries, err)
	}
}

// TestRevokedWhileWaiting: a request whose grant ends while it waits for its turn is not said to be done. A grant that is made again as it is ends none.
func TestRevokedWhileWaiting(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := New(filepath.Join(t.TempDir(), "locks"), 1e-6, slog.New(slog.NewTextHandler(t.Output(), nil))) // one request, and the next one in eleven days
		g := Grant{User: "u", Secret: "p", Volume: "v", Root: t.TempDir(), UID: os.Getuid(), GID: os.Getgid()}
		allow := func() {
			if err := s.Allow(g); err != nil {
				t.Fatal(err)
			}
		}
		put := func(name string) *httptest.ResponseRecorder {
			answer := httptest.NewRecorder()
			r := httptest.NewRequest("PUT", "/v/"+name, strings.NewReader("content"))
			r.SetBasicAuth("u", "p")
			go s.ServeHTTP(answer, r)
			synctest.Wait()
			return answer
		}
		allow()
		if got := put("first"); got.Code != http.StatusCreated {
			t.Fatalf("the first one is answered %d: %s", got.Code, got.Body)
		}
		second := put("second")
		allow()
		synctest.Wait()
		if second.Body.Len() > 0 {
			t.Errorf("one that waits is answered %d as its grant is made again: %s", second.Code, second.Body)
		}
		s.Forbid("u")
		if second.Code != http.StatusServiceUnavailable {
			t.Errorf("what was not done is answered %d", second.Code)
		}
		g.ReadOnly = true
		allow()
		if got := put("third"); got.Code != http.StatusForbidden {
			t.Errorf("a grant that may only read is answered %d: %s", got.Code, got.Body)
		}
	})
}

// TestDeep: what is removed may be directories in each other without end, as pods can make them. It takes no file that others need, and nothing of it stays.
func TestDeep(t *testing.T) {
	w := serve(t)
	w.write("file", "content")
	dir, err := unix.Open(w.root, unix.O_RDONLY|unix.O_DIRECTORY, 0)
	for range 6 * tree.Deepest {
		if err == nil {
			err = unix.Mkdirat(dir, "d", 0o755)
		}
		if err != nil {
			t.Fatal(err)
		}
		above := dir
		dir, err = unix.Openat(above, "d", unix.O_RDONLY|unix.O_DIRECTORY, 0)
		unix.Close(above)
	}
	unix.Close(dir)
	var was unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &was); err != nil {
		t.Fatal(err)
	}
	few := was
	few.Cur = 4 * tree.Deepest
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &few); err != nil {
		t.Fatal(err)
	}
	w.want(http.StatusNoContent, "DELETE", "/d", "")
	w.want(http.StatusNoContent, "PUT", "/file", "new")
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &was); err != nil {
		t.Fatal(err)
	}
	if entries, err := os.ReadDir(w.root); err != nil || len(entries) != 1 {
		t.Errorf("at the end there are %v, %v", entries, err)
	}
}

// TestCopiesAtOnce: so many directories of a volume are copied at the same time, each of which takes files of the process as it is deep. Others wait.
func TestCopiesAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := New(filepath.Join(t.TempDir(), "locks"), 0, slog.New(slog.NewTextHandler(t.Output(), nil)))
		g := Grant{User: "u", Secret: "p", Volume: "v", Root: t.TempDir(), UID: os.Getuid(), GID: os.Getgid()}
		if err := errors.Join(s.Allow(g), os.MkdirAll(filepath.Join(g.Root, "dir/in"), 0o755), os.WriteFile(filepath.Join(g.Root, "file"), nil, 0o644)); err != nil {
			t.Fatal(err)
		}
		copies := func(name string) *httptest.ResponseRecorder {
			answer := httptest.NewRecorder()
			r := httptest.NewRequest("COPY", "/v/"+name, nil)
			r.SetBasicAuth("u", "p")
			r.Header.Set("Destination", "/v/copy-of-"+name)
			go s.ServeHTTP(answer, r)
			synctest.Wait()
			return answer
		}
		for range maxCopies {
			s.volumes["v"].copies <- struct{}{}
		}
		if got := copies("file"); got.Code != http.StatusCreated {
			t.Errorf("a file is copied with %d", got.Code)
		}
		waits := copies("dir")
		if _, err := os.Stat(filepath.Join(g.Root, "copy-of-dir")); err == nil {
			t.Error("one too many is copied")
		}
		<-s.volumes["v"].copies
		synctest.Wait()
		if waits.Code != http.StatusCreated || len(s.volumes["v"].copies) != maxCopies-1 {
			t.Errorf("one that has waited is copied with %d, and %d are still at it", waits.Code, len(s.volumes["v"].copies))
		}
		s.Close()
	})
}

// TestStuck: who ends a grant whose requests the storage keeps is told so, and waits for them once.
func TestStuck(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := New(filepath.Join(t.TempDir(), "locks"), 0, slog.New(slog.NewTextHandler(t.Output(), nil)))
		answers := make(chan struct{})
		g := Grant{User: "u", Secret: "p", Volume: "v", Root: t.TempDir(), Snapshots: &snapshots.Source{List: func() ([]snapshots.Snapshot, error) { <-answers; return nil, nil }}}
		if err := s.Allow(g); err != nil {
			t.Fatal(err)
		}
		r := httptest.NewRequest("PROPFIND", "/v/.snapshots", nil)
		r.SetBasicAuth("u", "p")
		r.Header.Set("Depth", "1")
		go s.ServeHTTP(httptest.NewRecorder(), r)
		synctest.Wait()
		began := time.Now()
		for range 2 {
			if err := s.Forbid("u"); !errors.Is(err, gateway.ErrStuck) {
				t.Errorf("its end: %v", err)
			}
		}
		if err := s.Allow(g); !errors.Is(err, gateway.ErrStuck) {
			t.Errorf("made again: %v", err)
		}
		if waited := time.Since(began); waited != 10*time.Second {
			t.Errorf("all of that has taken %v", waited)
		}
		r = httptest.NewRequest("GET", "/v/", nil)
		r.SetBasicAuth("u", "p")
		answer := httptest.NewRecorder()
		if s.ServeHTTP(answer, r); answer.Code != http.StatusUnauthorized {
			t.Errorf("who comes meanwhile is answered %d", answer.Code)
		}
		close(answers)
		synctest.Wait()
		if err := s.Forbid("u"); err != nil || len(s.volumes) > 0 {
			t.Errorf("its end, when the storage has answered: %v, %v", err, s.volumes)
		}
		if err := s.Allow(g); err != nil {
			t.Error(err)
		}
		s.Close()
	})
}

const lockBody = `<?xml version="1.0"?><D:lockinfo xmlns:D="DAV:"><D:lockscope><D:%s/></D:lockscope><D:locktype><D:write/></D:locktype><D:owner><x:name xmlns:x="urn:x">me &amp; you</x:name></D:owner></D:lockinfo>`

// TestLocksOutlastTheProcess: as their file does, and so does what they forbid.
func TestLocksOutlastTheProcess(t *testing.T) {
	w := serve(t)
	w.write("file", "content")
	w.allow(Grant{User: "o", Secret: "p"})
	const other = "Authorization: Basic bzpw"
	answer, h := w.want(http.StatusOK, "LOCK", "/file", fmt.Sprintf(lockBody, "exclusive"), "Timeout: Second-5000, Infinite", "Depth: 0")
	token := h.Get("Lock-Token")
	if !strings.Contains(answer, "me &amp; you") || !strings.Contains(answer, "Second-5000") || !strings.Contains(answer, "/v/file") || !strings.HasPrefix(token, "<urn:uuid:") {
		t.Errorf("%s %s", token, answer)
	}
	w.server.Close()
	w.start()
	w.allow(Grant{User: "o", Secret: "p"})
	if answer, _ := w.want(http.StatusMultiStatus, "PROPFIND", "/file", "", "Depth: 0"); !strings.Contains(answer, strings.Trim(token, "<>")) {
		t.Errorf("after another start: %s", answer)
	}
	if answer, _ := w.want(http.StatusLocked, "PUT", "/file", "x"); !strings.Contains(answer, "<D:lock-token-submitted><D:href>/v/file</D:href>") {
		t.Errorf("locked: %s", answer)
	}
	w.want(http.StatusLocked, "DELETE", "/file", "")
	w.want(http.StatusLocked, "LOCK", "/file", fmt.Sprintf(lockBody, "shared"))
	w.want(http.StatusLocked, "LOCK", "/", fmt.Sprintf(lockBody, "shared"))
	// A token is nothing in the hands of somebody else.
	w.want(http.StatusLocked, "PUT", "/file", "x", "If: ("+token+")", other)
	w.want(http.StatusForbidden, "UNLOCK", "/file", "", "Lock-Token: "+token, other)
	w.want(http.StatusNoContent, "PUT", "/file", "x", "If: ("+token+")")
	w.want(http.StatusOK, "LOCK", "/file", "", "If: ("+token+")")
	w.want(http.StatusPreconditionFailed, "LOCK", "/file", "", "If: (<urn:x>)")
	w.want(http.StatusBadRequest, "LOCK", "/file", "")
	w.want(http.StatusConflict, "UNLOCK", "/other", "", "Lock-Token: "+token)
	w.want(http.StatusCreated, "MOVE", "/file", "", "Destination: /v/moved", "If: ("+token+")")
	w.want(http.StatusConflict, "UNLOCK", "/moved", "", "Lock-Token: "+token)
	if entries, err := os.ReadDir(w.locks); err != nil || len(entries) != 0 {
		t.Errorf("without locks there are %v, %v", entries, err)
	}
	w.want(http.StatusCreated, "LOCK", "/new", fmt.Sprintf(lockBody, "shared"))
	w.want(http.StatusOK, "LOCK", "/new", fmt.Sprintf(lockBody, "shared"), other)
	w.want(http.StatusUnprocessableEntity, "LOCK", "/new", `<lockinfo xmlns="DAV:"/>`)
	w.server.Close()
	if err := os.WriteFile(filepath.Join(w.locks, "v.json"), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := w.server.Allow(Grant{User: "u", Secret: "p", Volume: "v", Root: w.root}); err == nil || !strings.Contains(err.Error(), "remove it") {
		t.Errorf("locks that can't be read: %v", err)
	}
}

func TestLocksExpire(t *testing.T) {
	file := filepath.Join(t.TempDir(), "locks.json")
	synctest.Test(t, func(t *testing.T) {
		l := &locks{file: file, prefix: "/v"}
		k, err := l.take(lock{Path: "/a", Deep: true, User: "u", Seconds: 60})
		if err != nil {
			t.Fatal(err)
		}
		for path, in := range map[string]bool{"/a": true, "/a/b/c": true, "/ab": false, "/": false} {
			if err := l.allows("u", nil, path, false); (err != nil) != in {
				t.Errorf("%s: %v", path, err)
			}
		}
		if err := l.allows("u", nil, "/", true); err == nil {
			t.Error("a tree with a lock in it can be removed")
		}
		time.Sleep(59 * time.Second)
		if _, err := l.refresh("/a/b", "u", []string{k.Token}, 60); err != nil {
			t.Error(err)
		}
		time.Sleep(59 * time.Second)
		if len(l.on("/a")) != 1 {
			t.Error("it has expired too early")
		}
		time.Sleep(2 * time.Second)
		if again, err := openLocks(file); err != nil || len(again.on("/a")) != 0 || l.allows("u", nil, "/a", true) != nil {
			t.Errorf("it has not expired: %v", err)
		}
		// The clock was years ahead when it was taken, and is put right.
		data, err := json.Marshal([]*lock{{Token: "t", Path: "/a", User: "u", Seconds: 60, Expires: time.Now().AddDate(10, 0, 0)}})
		if err == nil {
			err = os.WriteFile(file, data, 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
		ahead, err := openLocks(file)
		if err != nil || len(ahead.on("/a")) != 1 {
			t.Errorf("a lock is forgotten: %v", err)
		}
		time.Sleep(61 * time.Second)
		if len(ahead.on("/a")) != 0 {
			t.Error("a lock lasts longer than it was asked for")
		}
		for i := range maxLocks {
			l.all = append(l.all, &lock{Token: "t", Path: fmt.Sprintf("/%d", i), Expires: time.Now().Add(time.Hour)})
		}
		if _, err := l.take(lock{Path: "/one-more", Seconds: 60}); explain(err).code != http.StatusInsufficientStorage {
			t.Errorf("one too many: %v", err)
		}
		// All of them are written with each change, and all of a place are told to who lists it.
		l.all = nil
		long := "/" + strings.Repeat("x", maxOwner)
		for i := range maxLocked / maxOwner / 2 {
			l.all = append(l.all, &lock{Token: "t", Path: fmt.Sprint(long, i), Owner: long[1:], Expires: time.Now().Add(time.Hour)})
		}
		if _, err := l.take(lock{Path: "/one-more", Seconds: 60}); explain(err).code != http.StatusInsufficientStorage {
			t.Errorf("more than are written: %v", err)
		}
		l.all = nil
		for range maxShared {
			l.all = append(l.all, &lock{Token: "t", Path: "/", Deep: true, Shared: true, Expires: time.Now().Add(time.Hour)})
		}
		if _, err := l.take(lock{Path: "/shared", Shared: true, Seconds: 60}); explain(err).code != http.StatusInsufficientStorage {
			t.Errorf("more than are listed: %v", err)
		}
	})
}

func TestListing(t *testing.T) {
	w := serve(t)
	w.write("ümläut <&>", "x")
	answer, _ := w.want(http.StatusMultiStatus, "PROPFIND", "/", "", "Depth: 1")
	for _, want := range []string{"/v/%C3%BCml%C3%A4ut%20%3C&amp;%3E", "<D:displayname>ümläut &lt;&amp;&gt;</D:displayname>", "<D:quota-available-bytes>", "<D:creationdate>", "<D:shared"} {
		if !strings.Contains(answer, want) {
			t.Errorf("no %s in %s", want, answer)
		}
	}
	for _, depth := range []string{"infinity", ""} {
		if answer, _ := w.want(http.StatusForbidden, "PROPFIND", "/", "", "Depth: "+depth); !strings.Contains(answer, "propfind-finite-depth") {
			t.Errorf("refused: %s", answer)
		}
	}
	w.want(http.StatusBadRequest, "PROPFIND", "/", "", "Depth: 2")
	w.want(http.StatusBadRequest, "PROPFIND", "/", "<", "Depth: 0")
	w.want(http.StatusBadRequest, "PROPFIND", "/", strings.Repeat("<a>", 1000), "Depth: 0")
	w.want(http.StatusRequestEntityTooLarge, "PROPFIND", "/", "<a>"+strings.Repeat(" ", maxXML)+"</a>", "Depth: 0")
	w.want(http.StatusRequestEntityTooLarge, "PROPPATCH", "/", "<a>"+strings.Repeat(" ", maxXML)+"</a>")
	w.want(http.StatusUnsupportedMediaType, "MKCOL", "/dir", "<a/>")
	// Above the volume there is the volume.
	w.url = strings.TrimSuffix(w.url, "/v")
	if answer, _ := w.want(http.StatusMultiStatus, "PROPFIND", "/", "", "Depth: 1"); strings.Count(answer, "<D:response>") != 2 || !strings.Contains(answer, "<D:href>/v/</D:href>") {
		t.Errorf("above: %s", answer)
	}
	if _, h := w.want(http.StatusOK, "OPTIONS", "/", ""); h.Get("DAV") != "1, 2, 3" {
		t.Errorf("options: %v", h)
	}
	w.want(http.StatusForbidden, "PUT", "/", "x")
}

// TestServe: who says nothing holds up nobody, and the end does not wait for it.
func TestServe(t *testing.T) {
	w := serve(t)
	w.write("file", "content")
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	ended := make(chan error, 1)
	go func() { ended <- w.server.Serve(ctx, l) }()
	idle, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer idle.Close()
	w.url = "http://" + l.Addr().String() + "/v"
	if answer, _ := w.want(http.StatusOK, "GET", "/file", ""); answer != "content" {
		t.Errorf("%q", answer)
	}
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
	if _, err := net.Dial("tcp", l.Addr().String()); err == nil {
		t.Error("it still listens")
	}
}

func TestParseIf(t *testing.T) {
	for header, want := range map[string]string{
		"(<urn:a>)":                             "[{ [{false urn:a }]}]",
		`( <urn:a> ["t"] )(Not<urn:b>)`:         `[{ [{false urn:a } {false  "t"}]} { [{true urn:b }]}]`,
		`<http://h/v/x> (["t"]) (<urn:a>)`:      `[{http://h/v/x [{false  "t"}]} {http://h/v/x [{false urn:a }]}]`,
		`<http://h/a> (<urn:a>) </b> ([W/"t"])`: `[{http://h/a [{false urn:a }]} {/b [{false  W/"t"}]}]`,
		"":                                      "",
		"()":                                    "",
		"(":                                     "",
		"(<urn:a>":                              "",
		"(urn:a)":                               "",
		"<http://h/a>":                          "",
		"(<urn:a>) <http://h/a> (<urn:a>)":      "",
		"(<>)":                                  "",
		"(Not)":                                 "",
		"(<urn:a>) x":                           "",
		"<http://h/a> <http://h/b> (<urn:a>)":   "",
		strings.Repeat("(<urn:a>)", 3) + "(Not (": "",
	} {
		lists, err := parseIf(header)
		if want == "" {
			if explain(err).code != http.StatusBadRequest {
				t.Errorf("%s is %v, %v", header, lists, err)
			}
		} else if got := fmt.Sprint(lists); err != nil || got != want {
			t.Errorf("%s is %s, %v", header, got, err)
		}
	}
}

func TestParseTimeout(t *testing.T) {
	for header, want := range map[string]int64{
		"": 1800, "Second-60": 60, "Infinite": 86400, "Infinite, Second-4100000000": 86400, "Second-4100000000": 86400, "Second-0": 1, "Second--1": 1800, "Extended, Second-7": 7, "Second-99999999999": 1800,
	} {
		if got := parseTimeout(header); got != want {
			t.Errorf("%q is %d seconds, not %d", header, got, want)
		}
	}
}

func TestMatches(t *testing.T) {
	for _, c := range []struct {
		header, tag string
		want        bool
	}{{`"a"`, `"a"`, true}, {`"b", "a"`, `"a"`, true}, {"*", `"a"`, true}, {"*", "", false}, {`W/"a"`, `"a"`, false}, {`"b"`, `"a"`, false}, {`""`, "", false}, {" , ", "", false}} {
		if matches(c.header, c.tag) != c.want {
			t.Errorf("%s and %s: not %v", c.header, c.tag, c.want)
		}
	}
}

func TestParseProperties(t *testing.T) {
	kept, err := parseProperties([]byte(`[{"s":"urn:x","n":"a","v":"t&amp;<b xmlns=\"urn:y\">x</b>"},{"n":"none","l":"de"},
		{"s":"DAV:","n":"getetag","v":"x"},{"s":"urn:x","n":"a b","v":""},{"s":"urn:x","n":"c","v":"</x><D:status/>"},{"s":"urn:x","n":"d","v":"<open>"},{"s":"urn:x","n":"x:y"},{"s":"urn:x","n":"p","v":"<?php ?>"}]`))
	if err != nil || len(kept) != 2 || string(kept[xml.Name{Space: "urn:x", Local: "a"}].InnerXML) != `t&amp;<b xmlns="urn:y">x</b>` || kept[xml.Name{Local: "none"}].Lang != "de" {
		t.Errorf("%v, %v", kept, err)
	}
	if _, err := parseProperties([]byte("<xml>")); err == nil {
		t.Error("what is no JSON is properties")
	}
}

// FuzzIf: whatever the header is, it is refused or has lists of conditions, whose tokens and tags are parts of it.
func FuzzIf(f *testing.F) {
	f.Add(`<http://h/v/x> (["t"] Not <urn:a>) (<urn:a>)`)
	f.Add(`(<urn:a>)(Not["t"])`)
	f.Fuzz(func(t *testing.T, header string) {
		lists, err := parseIf(header)
		if err != nil {
			if explain(err).code != http.StatusBadRequest {
				t.Errorf("%v", err)
			}
			return
		}
		if len(lists) == 0 {
			t.Error("no lists")
		}
		for _, l := range lists {
			if len(l.conditions) == 0 {
				t.Error("a list is empty")
			}
			for _, c := range l.conditions {
				if (c.token == "") == (c.etag == "") || !strings.Contains(header, c.token) || !strings.Contains(header, c.etag) {
					t.Errorf("condition %+v", c)
				}
			}
		}
		holds(lists, "/x", func(r string) (string, bool) { return local(r, &http.Request{Host: "h"}) }, func(string) string { return `"t"` }, func(string, string) bool { return true })
	})
}

// FuzzLockInfo: what is taken of a client's lock can be put into the answer of everybody else.
func FuzzLockInfo(f *testing.F) {
	f.Add([]byte(fmt.Sprintf(lockBody, "shared")))
	f.Add([]byte(`<lockinfo xmlns="DAV:" xmlns:a="urn:a"><lockscope><exclusive/></lockscope><locktype><write/></locktype><owner a:b="c"><owner>]]&gt;</owner></owner></lockinfo>`))
	f.Fuzz(func(t *testing.T, data []byte) {
		k, refresh, err := parseLockInfo(bytes.NewReader(data))
		if err != nil || refresh {
			return
		}
		if len(k.Owner) > maxOwner || !wellFormed(k.Owner) || !wellFormed(k.active("/v")) {
			t.Errorf("owner %q", k.Owner)
		}
	})
}

// FuzzProperties: whatever is kept with a file, what is shown of it is elements of their own.
func FuzzProperties(f *testing.F) {
	f.Add([]byte(`[{"s":"urn:x","n":"a","l":"de","v":"t&amp;<b xmlns=\"urn:y\">x</b>"}]`))
	f.Add([]byte(`[{"n":"a","v":"</x><x>"}]`))
	f.Fuzz(func(t *testing.T, data []byte) {
		kept, err := parseProperties(data)
		if err != nil {
			return
		}
		for name, p := range kept {
			if name != p.XMLName || name.Space == "DAV:" || !wellFormed(string(p.InnerXML)) {
				t.Errorf("%v: %v", name, p)
			}
			text, err := xml.Marshal(webdav.Property(p))
			if err != nil || xml.Unmarshal(text, new(struct{ XMLName xml.Name })) != nil {
				t.Errorf("%v: %s, %v", name, text, err)
			}
		}
	})
}

func TestOutcome(t *testing.T) {
	name := func(n string) webdav.Property { return webdav.Property{XMLName: xml.Name{Local: n}} }
	got := outcome([]webdav.Property{name("a"), name("b")}, []webdav.Property{name("b")}, http.StatusForbidden, "<x/>")
	if len(got) != 2 || got[0].Status != http.StatusForbidden || got[1].Status != http.StatusFailedDependency || !slices.EqualFunc(got[1].Props, []webdav.Property{name("a")}, func(a, b webdav.Property) bool { return a.XMLName == b.XMLName }) {
		t.Errorf("%+v", got)
	}
}

// TestHeld: while the volume is held nothing changes in it, what is read is answered, an upload's bytes are taken, and afterwards all is done that was asked for.
func TestHeld(t *testing.T) {
	w := serve(t)
	gate := &gateway.Gate{}
	w.allow(Grant{User: "u", Secret: "p", Gate: gate})
	for _, name := range []string{"deleted", "moved", "copied", "patched", "put"} {
		w.write(name, "old")
	}
	asked := make(chan string, 10)
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
	sent := &told{Reader: strings.NewReader("new"), end: make(chan struct{})}
	requests := []struct {
		method, path string
		body         io.Reader
		headers      []string
	}{
		{"PUT", "/put", sent, nil},
		{"PUT", "/created", strings.NewReader("new"), nil},
		{"DELETE", "/deleted", nil, nil},
		{"MKCOL", "/made", nil, nil},
		{"MOVE", "/moved", nil, []string{"Destination: /v/moved-to"}},
		{"COPY", "/copied", nil, []string{"Destination: /v/copied-to"}},
		{"LOCK", "/locked", strings.NewReader(`<lockinfo xmlns="DAV:"><lockscope><exclusive/></lockscope><locktype><write/></locktype></lockinfo>`), nil},
		{"PROPPATCH", "/patched", strings.NewReader(`<propertyupdate xmlns="DAV:"><set><prop><x xmlns="urn:x">1</x></prop></set></propertyupdate>`), nil},
	}
	for _, r := range requests {
		go func() {
			resp, err := w.try(r.method, r.path, r.body, r.headers...)
			if err != nil {
				asked <- r.method + ": " + err.Error()
				return
			}
			resp.Body.Close()
			if resp.StatusCode/100 != 2 {
				asked <- r.method + ": " + resp.Status
				return
			}
			asked <- ""
		}()
	}
	<-sent.end
	names := func() string {
		t.Helper()
		all, err := filepath.Glob(filepath.Join(w.root, "[a-z]*"))
		if err != nil {
			t.Fatal(err)
		}
		for i := range all {
			all[i] = filepath.Base(all[i])
		}
		return strings.Join(all, " ")
	}
	if answer, _ := w.want(http.StatusOK, "GET", "/put", ""); answer != "old" {
		t.Errorf("while it is held a file is %q", answer)
	}
	if got := names(); got != "copied deleted moved patched put" {
		t.Errorf("while it is held there are %s", got)
	}
	select {
	case what := <-asked:
		t.Errorf("while it is held one is answered: %s", what)
	default:
	}
	close(release)
	if err := <-done; err != nil {
		t.Error(err)
	}
	for range requests {
		if what := <-asked; what != "" {
			t.Error(what)
		}
	}
	if got := names(); got != "copied copied-to created locked made moved-to patched put" || w.file("put") != "new" {
		t.Errorf("then there are %s, and one is %q", got, w.file("put"))
	}
}

// told closes end when all of it has been read.
type told struct {
	io.Reader
	once sync.Once
	end  chan struct{}
}

func (r *told) Read(p []byte) (int, error) {
	n, err := r.Reader.Read(p)
	if err != nil {
		r.once.Do(func() { close(r.end) })
	}
	return n, err
}
