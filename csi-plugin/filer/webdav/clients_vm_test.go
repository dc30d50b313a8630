//go:build vm

package webdav

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cradlestack/cradlestack/internal/mountns"
)

func TestMain(m *testing.M) {
	mountns.Own()
	os.Exit(m.Run())
}

// command runs a client, for two minutes at most.
func command(t *testing.T, stdin string, name string, args ...string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute) // also at the test's end
	defer cancel()
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Stdin = strings.NewReader(stdin)
	out, err := cmd.CombinedOutput()
	if errors.Is(err, exec.ErrNotFound) {
		t.Fatalf("%v; run make setup", err)
	}
	if err != nil {
		t.Errorf("%s %v: %v\n%s", name, args, err, out)
	}
	return string(out)
}

// TestRootLitmus runs the test suite that WebDAV servers are measured by, which has to pass whole and without a warning.
func TestRootLitmus(t *testing.T) {
	w := serve(t)
	t.Chdir(t.TempDir()) // for its log
	out := command(t, "", "litmus", "--keep-going", w.url+"/", "u", "p")
	if strings.Contains(out, "FAIL") || strings.Contains(out, "WARNING") || strings.Contains(out, "SKIPPED") || strings.Count(out, "100.0%") != 5 {
		t.Errorf("litmus:\n%s", out)
	}
}

func TestRootClients(t *testing.T) {
	w := servePast(t)
	dir := t.TempDir()
	content := bytes.Repeat([]byte("0123456789abcdef"), 40_000)
	for name, data := range map[string][]byte{"large": content, "small ü&%": []byte("small"), "empty": nil} {
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	t.Run("curl", func(t *testing.T) {
		login := []string{"--silent", "--show-error", "--fail", "--user", "u:p"}
		curl := func(args ...string) string { return command(t, "", "curl", append(login, args...)...) }
		curl("--upload-file", filepath.Join(dir, "large"), w.url+"/curl")
		part := filepath.Join(t.TempDir(), "part")
		if err := os.WriteFile(part, content[:100_001], 0o644); err != nil {
			t.Fatal(err)
		}
		curl("--continue-at", "-", "--output", part, w.url+"/curl")
		if data, err := os.ReadFile(part); err != nil || !bytes.Equal(data, content) {
			t.Errorf("a download that went on: %d bytes, %v", len(data), err)
		}
		w.take("first", time.Now())
		for destination, name := range map[string]string{w.url + "/back": ".snapshots/first/curl", w.url + "/back again": ".snapshots/first"} {
			curl("--request", "COPY", "--header", "Destination: "+strings.ReplaceAll(destination, " ", "%20"), w.url+"/"+name)
		}
		if w.file("back") != string(content) || w.file("back again/curl") != string(content) {
			t.Error("what came back is another file")
		}
		if out := curl("--range", "16-31", w.url+"/.snapshots/first/curl"); out != string(content[:16]) {
			t.Errorf("in the snapshot it has %q", out)
		}
		for _, name := range []string{"back", "back%20again"} {
			curl("--request", "DELETE", w.url+"/"+name)
		}
	})
	t.Run("cadaver", func(t *testing.T) {
		home := t.TempDir()
		t.Setenv("HOME", home)
		host := strings.TrimPrefix(strings.TrimPrefix(w.url, "http://"), "https://")
		host, _, _ = strings.Cut(host, ":")
		if err := os.WriteFile(filepath.Join(home, ".netrc"), []byte("machine "+host+" login u password p\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		got := filepath.Join(home, "got")
		out := command(t, strings.Join([]string{
			"mkcol cadaver", "cd cadaver", "put " + filepath.Join(dir, "large") + " one", "copy one two", "move two three", "lock one", "discover one", "propset one colour red", "propget one colour",
			"put " + filepath.Join(dir, "empty") + " one", "unlock one", "ls", "get three " + got, "rm one", "cd ../.snapshots", "ls", "cd first", "copy curl ../../cadaver/back", "quit", "",
		}, "\n"), "cadaver", w.url+"/")
		for _, want := range []string{"Value of colour is: red", "three", "Coll:   first"} {
			if !strings.Contains(out, want) {
				t.Errorf("cadaver does not say %q", want)
			}
		}
		data, err := os.ReadFile(got)
		if err != nil || !bytes.Equal(data, content) || strings.Contains(out, "failed") {
			t.Errorf("what cadaver got: %d bytes, %v\n%s", len(data), err, out)
		}
		if entries, err := os.ReadDir(filepath.Join(w.root, "cadaver")); err != nil || len(entries) != 2 || entries[0].Name() != "back" || entries[1].Name() != "three" {
			t.Errorf("cadaver has left %v, %v", entries, err)
		}
		if w.file("cadaver/back") != string(content) {
			t.Error("what cadaver has brought back is another file")
		}
	})
	t.Run("rclone", func(t *testing.T) {
		config := filepath.Join(t.TempDir(), "rclone.conf")
		password := strings.TrimSpace(command(t, "", "rclone", "obscure", "p"))
		if err := os.WriteFile(config, []byte("[v]\ntype = webdav\nurl = "+w.url+"\nvendor = other\nuser = u\npass = "+password+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		rclone := func(args ...string) string {
			return command(t, "", "rclone", append([]string{"--config", config, "--retries", "1"}, args...)...)
		}
		rclone("copy", dir, "v:rclone")
		rclone("check", "--download", dir, "v:rclone")
		rclone("moveto", "v:rclone/large", "v:rclone/moved")
		if out := rclone("about", "v:"); !strings.Contains(out, "Free:") {
			t.Errorf("rclone about: %s", out)
		}
		if out := rclone("lsf", "-R", "v:rclone"); out != "empty\nmoved\nsmall ü&%\n" {
			t.Errorf("rclone lsf: %s", out)
		}
		if out := rclone("lsf", "v:"); strings.Contains(out, "snapshots") {
			t.Errorf("rclone lsf of the volume: %s", out)
		}
		if out := rclone("lsf", "-R", "v:.snapshots"); out != "first/\nfirst/curl\n" {
			t.Errorf("rclone lsf of the snapshots: %s", out)
		}
		rclone("check", "--download", "v:.snapshots/first", "v:", "--include", "curl")
		rclone("copyto", "v:.snapshots/first/curl", "v:rclone/back") // by COPY
		if w.file("rclone/back") != string(content) {
			t.Error("what rclone has brought back is another file")
		}
		rclone("purge", "v:rclone")
		if _, err := os.Stat(filepath.Join(w.root, "rclone")); err == nil {
			t.Error("rclone has not purged")
		}
	})
	t.Run("davfs2", func(t *testing.T) {
		home := t.TempDir()
		at := filepath.Join(home, "at")
		if err := os.Mkdir(at, 0o755); err != nil {
			t.Fatal(err)
		}
		cache, err := os.MkdirTemp("", "davfs2-") // it works as a user of its own, who can't look into the test's directory
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { os.RemoveAll(cache) })
		command(t, "", "chown", "root:davfs2", cache)
		command(t, "", "chmod", "0770", cache)
		config := filepath.Join(home, "davfs2.conf")
		if err := os.WriteFile(config, []byte("ask_auth 1\nuse_locks 1\ndelay_upload 0\ncache_dir "+cache+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		command(t, "u\np\n", "mount.davfs", "-o", "conf="+config, w.url+"/", at)
		mounted := true
		umount := func() {
			if mounted {
				command(t, "", "umount", at) // which waits for uploads
				mounted = false
			}
		}
		defer umount()
		if data, err := os.ReadFile(filepath.Join(at, "curl")); err != nil || !bytes.Equal(data, content) {
			t.Errorf("davfs2 reads %d bytes, %v", len(data), err)
		}
		if err := os.Mkdir(filepath.Join(at, "davfs"), 0o755); err != nil {
			t.Error(err)
		}
		if err := os.WriteFile(filepath.Join(at, "davfs/new"), content, 0o644); err != nil {
			t.Error(err)
		}
		if err := os.Rename(filepath.Join(at, "davfs"), filepath.Join(at, "renamed")); err != nil {
			t.Error(err)
		}
		umount()
		if data, err := os.ReadFile(filepath.Join(w.root, "renamed/new")); err != nil || !bytes.Equal(data, content) {
			t.Errorf("davfs2 wrote %d bytes, %v", len(data), err)
		}
		// It looks for no name that was not listed, so that the snapshots are mounted by themselves.
		command(t, "u\np\n", "mount.davfs", "-o", "ro,conf="+config, w.url+"/.snapshots/", at)
		mounted = true
		if data, err := os.ReadFile(filepath.Join(at, "first/curl")); err != nil || !bytes.Equal(data, content) {
			t.Errorf("davfs2 reads of a snapshot %d bytes, %v", len(data), err)
		}
	})
	if entries, err := os.ReadDir(w.locks); err != nil || len(entries) != 0 {
		t.Errorf("locks are left: %v, %v", entries, err)
	}
}

// TestRootFull: a volume that is full says so, and keeps what it has.
func TestRootFull(t *testing.T) {
	w := serve(t)
	w.server.Close()
	image := filepath.Join(t.TempDir(), "image")
	if err := os.WriteFile(image, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(image, 8<<20); err != nil {
		t.Fatal(err)
	}
	command(t, "", "mkfs.ext4", "-q", "-m", "0", image)
	command(t, "", "mount", "-o", "loop", image, w.root)
	t.Cleanup(func() {
		w.server.Close()
		command(t, "", "umount", w.root)
	})
	w.allow(Grant{User: "u", Secret: "p"})
	w.want(http.StatusCreated, "PUT", "/file", "old")
	resp, err := w.try("PUT", "/file", io.LimitReader(zeros{}, 64<<20))
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != http.StatusInsufficientStorage || w.file("file") != "old" {
		t.Errorf("too much is answered by %s, and the file is %q", resp.Status, w.file("file"))
	}
	// What did not fit has not taken room either.
	w.want(http.StatusCreated, "PUT", "/other", strings.Repeat("x", 5<<20))
	w.want(http.StatusInsufficientStorage, "COPY", "/other", "", "Destination: /v/third")
	w.want(http.StatusInsufficientStorage, "COPY", "/other", "", "Destination: /v/file")
	if w.file("file") != "old" {
		t.Errorf("a copy that did not fit has made it %.20q", w.file("file"))
	}
	large := `<propertyupdate xmlns="DAV:"><set><prop><p xmlns="urn:x">` + strings.Repeat("x", 20_000) + `</p></prop></set></propertyupdate>`
	if answer, _ := w.want(http.StatusMultiStatus, "PROPPATCH", "/file", large); !strings.Contains(answer, "507 Insufficient Storage") {
		t.Errorf("a property that does not fit: %s", answer)
	}
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }

// TestRootProperties: what clients have set goes where the file goes, by whichever way.
func TestRootProperties(t *testing.T) {
	w := serve(t)
	w.write("file", "content")
	set := `<D:propertyupdate xmlns:D="DAV:" xmlns:x="urn:x"><D:set><D:prop><x:a xml:lang="de">eins <b xmlns="urn:y">zwei</b></x:a><c xmlns="">drei</c></D:prop></D:set></D:propertyupdate>`
	_, h := w.want(http.StatusOK, "HEAD", "/file", "")
	w.want(http.StatusMultiStatus, "PROPPATCH", "/file", set)
	if _, again := w.want(http.StatusOK, "HEAD", "/file", ""); again.Get("ETag") != h.Get("ETag") {
		t.Error("a property has made the file another one")
	}
	has := func(path string) {
		t.Helper()
		answer, _ := w.want(http.StatusMultiStatus, "PROPFIND", path, "", "Depth: 0")
		for _, want := range []string{`xml:lang="de"`, `eins <b xmlns="urn:y">zwei</b>`, "drei"} {
			if !strings.Contains(answer, want) {
				t.Errorf("%s: no %s in %s", path, want, answer)
			}
		}
	}
	w.server.Close()
	w.start()
	has("/file")
	if err := os.Rename(filepath.Join(w.root, "file"), filepath.Join(w.root, "renamed")); err != nil {
		t.Fatal(err)
	}
	has("/renamed")
	w.want(http.StatusNoContent, "PUT", "/renamed", "other content")
	has("/renamed")
	w.want(http.StatusCreated, "COPY", "/renamed", "", "Destination: /v/copy")
	has("/copy")
	for _, refused := range []string{"<D:getetag/>", "<D:quota-used-bytes/>", "<D:lockdiscovery/>"} {
		answer, _ := w.want(http.StatusMultiStatus, "PROPPATCH", "/copy", strings.Replace(set, `<c xmlns="">drei</c>`, refused, 1))
		if !strings.Contains(answer, "403 Forbidden") || !strings.Contains(answer, "424 Failed Dependency") {
			t.Errorf("%s: %s", refused, answer)
		}
	}
	has("/copy")
	w.want(http.StatusMultiStatus, "PROPPATCH", "/copy", `<D:propertyupdate xmlns:D="DAV:" xmlns:x="urn:x"><D:remove><D:prop><x:a/><c xmlns=""/><x:none/></D:prop></D:remove></D:propertyupdate>`)
	if answer, _ := w.want(http.StatusMultiStatus, "PROPFIND", "/copy", "", "Depth: 0"); strings.Contains(answer, "eins") {
		t.Errorf("removed: %s", answer)
	}
	// Whoever has the files can write that too.
	for _, nonsense := range []string{"nonsense", `[{"n":"a","v":"</prop>"}]`, strings.Repeat("x", 3000)} {
		if err := unix.Setxattr(filepath.Join(w.root, "copy"), attribute, []byte(nonsense), 0); err != nil {
			t.Fatal(err)
		}
		w.want(http.StatusMultiStatus, "PROPFIND", "/copy", "", "Depth: 0")
	}
}

// TestRootOwner: what is made belongs to whom the grant says; what is replaced to whom it belonged; directories pass their group on where they are set to.
func TestRootOwner(t *testing.T) {
	w := serve(t)
	if err := w.server.Allow(Grant{User: "u", Secret: "p", Volume: "v", Root: w.root, UID: 1234, GID: 2345}); err != nil {
		t.Fatal(err)
	}
	w.write("theirs", "x")
	if err := errors.Join(os.Chown(filepath.Join(w.root, "theirs"), 77, 88), os.Mkdir(filepath.Join(w.root, "group"), 0o755),
		os.Chown(filepath.Join(w.root, "group"), 0, 99), os.Chmod(filepath.Join(w.root, "group"), 0o2775|os.ModeSetgid)); err != nil {
		t.Fatal(err)
	}
	w.want(http.StatusCreated, "PUT", "/new", "x")
	w.want(http.StatusNoContent, "PUT", "/theirs", "y")
	w.want(http.StatusCreated, "MKCOL", "/dir", "")
	w.want(http.StatusCreated, "MKCOL", "/group/dir", "")
	w.want(http.StatusCreated, "PUT", "/group/file", "x")
	w.want(http.StatusCreated, "COPY", "/theirs", "", "Destination: /v/copy")
	for name, want := range map[string]string{
		"new": "1234:2345 100644", "theirs": "77:88 100640", "dir": "1234:2345 40755", "group/dir": "1234:99 42755", "group/file": "1234:99 100644", "copy": "1234:2345 100640",
	} {
		var st unix.Stat_t
		if err := unix.Stat(filepath.Join(w.root, name), &st); err != nil || fmt.Sprintf("%d:%d %o", st.Uid, st.Gid, st.Mode) != want {
			t.Errorf("%s is %d:%d %o, not %s, %v", name, st.Uid, st.Gid, st.Mode, want, err)
		}
	}
}
