package webdav

import (
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cradlestack/cradlestack/csi-plugin/filer/snapshots"
)

// past has the world's volume keep snapshots: copies beside it.
type past struct {
	*world
	all    []snapshots.Snapshot
	opened map[string]int
	roots  []*os.Root
}

func servePast(t testing.TB) *past {
	p := &past{world: serve(t), opened: map[string]int{}}
	p.server.Forbid("u")
	p.allow(Grant{User: "u", Secret: "p"})
	return p
}

func (p *past) allow(g Grant) {
	p.t.Helper()
	g.Snapshots = &snapshots.Source{
		List: func() ([]snapshots.Snapshot, error) { return slices.Clone(p.all), nil },
		Open: func(name string) (*os.Root, error) {
			p.opened[name]++
			r, err := os.OpenRoot(p.at(name))
			p.roots = append(p.roots, r)
			return r, err
		},
	}
	p.world.allow(g)
}

func (p *past) at(name string) string { return filepath.Join(filepath.Dir(p.root), "taken", name) }

func (p *past) take(name string, at time.Time) {
	p.t.Helper()
	if err := os.MkdirAll(p.at(name), 0o755); err != nil {
		p.t.Fatal(err)
	}
	if err := os.CopyFS(p.at(name), os.DirFS(p.root)); err != nil {
		p.t.Fatal(err)
	}
	p.all = append(p.all, snapshots.Snapshot{Name: name, Taken: at})
}

const odd = "b&<ü> %2e+ä"

func TestSnapshots(t *testing.T) {
	w := servePast(t)
	if err := os.MkdirAll(filepath.Join(w.root, "dir/deep"), 0o750); err != nil {
		t.Fatal(err)
	}
	w.write("file", "0123456789")
	w.write("dir/deep/letter", "then")
	w.write(".sgwtmp", "helps")
	then := time.Date(2026, 1, 6, 16, 0, 0, 0, time.UTC)
	w.take("first", then)
	w.take(odd, then.Add(time.Hour))
	w.write("file", "now")
	if err := os.RemoveAll(filepath.Join(w.root, "dir")); err != nil {
		t.Fatal(err)
	}

	// It is there when it is asked for, and otherwise not.
	for _, path := range []string{"/", ""} {
		if answer, _ := w.want(http.StatusMultiStatus, "PROPFIND", path, "", "Depth: 1"); strings.Contains(answer, "snapshots") || !strings.Contains(answer, "/v/file") {
			t.Errorf("the root is listed as %s", answer)
		}
	}
	for _, path := range []string{"/.snapshots", "/.snapshots/", "/.snapshots//", "/%2esnapshots"} {
		answer, _ := w.want(http.StatusMultiStatus, "PROPFIND", path, "", "Depth: 1")
		for _, want := range []string{">/v/.snapshots/<", ">/v/.snapshots/first/<", ">/v/.snapshots/b&amp;%3C%C3%BC%3E%20%252e+%C3%A4/<", "Tue, 06 Jan 2026 16:00:00 GMT"} {
			if strings.Count(answer, want) == 0 {
				t.Errorf("%s is listed without %s: %s", path, want, answer)
			}
		}
		if strings.Count(answer, "<D:response>") != 3 {
			t.Errorf("%s has more: %s", path, answer)
		}
		if answer, _ := w.want(http.StatusMultiStatus, "PROPFIND", path, "", "Depth: 0"); strings.Count(answer, "<D:response>") != 1 {
			t.Errorf("%s itself: %s", path, answer)
		}
		w.want(http.StatusForbidden, "PROPFIND", path, "", "Depth: infinity")
		w.want(http.StatusMethodNotAllowed, "GET", path, "")
		w.want(http.StatusMethodNotAllowed, "HEAD", path, "")
	}
	if len(w.opened) != 0 {
		t.Errorf("to list them they were opened: %v", w.opened)
	}
	for path, n := range map[string]int{"/.snapshots/first": 3, "/.snapshots/first/dir/": 2, "/.snapshots/b&%3C%C3%BC%3E%20%252e+%C3%A4/dir%2fdeep": 2, "/.snapshots/first/dir/../": 0} {
		code, answer, _ := w.do("PROPFIND", path, "", "Depth: 1")
		if strings.Count(answer, "<D:response>") != n || n > 0 && code != http.StatusMultiStatus || strings.Contains(answer, "sgwtmp") || strings.Contains(answer, "lockentry") {
			t.Errorf("%s is listed as %d %s", path, code, answer)
		}
	}

	// Files, ranges and conditions.
	answer, h := w.want(http.StatusOK, "GET", "/.snapshots/first/file", "")
	if answer != "0123456789" || h.Get("ETag") == "" {
		t.Errorf("it was %q, %v", answer, h)
	}
	if answer, _ := w.want(http.StatusPartialContent, "GET", "/.snapshots/first/file", "", "Range: bytes=4-", "If-Range: "+h.Get("ETag")); answer != "456789" {
		t.Errorf("from its middle on %q", answer)
	}
	w.want(http.StatusNotModified, "GET", "/.snapshots/first/file", "", "If-None-Match: "+h.Get("ETag"))
	if _, h := w.want(http.StatusOK, "HEAD", "/.snapshots/first/file", ""); h.Get("Content-Length") != "10" {
		t.Errorf("HEAD: %v", h)
	}
	if answer, _ := w.want(http.StatusOK, "GET", "/file", ""); answer != "now" {
		t.Errorf("now it is %q", answer)
	}
	if _, h := w.want(http.StatusOK, "OPTIONS", "/.snapshots/first/file", ""); h.Get("Allow") != "OPTIONS, GET, HEAD, PROPFIND, COPY" {
		t.Errorf("OPTIONS: %v", h)
	}
	w.want(http.StatusMethodNotAllowed, "GET", "/.snapshots/first/dir", "")
	for _, path := range []string{
		"/.snapshots/none", "/.snapshots/none/file", "/.snapshots/first/none", "/.snapshots/FIRST/file", "/.SNAPSHOTS", "/.snapshots./first", "/.snapshotsfirst", "/.snapshots/first/.sgwtmp", "/dir/.snapshots",
		"/.snapshots/first/.snapshots", "/.snapshots/b&%3C%C3%BC%3E%20.+%C3%A4/file", "/.snapshots/first%00/file",
	} {
		w.want(http.StatusNotFound, "GET", path, "")
		w.want(http.StatusNotFound, "PROPFIND", path, "", "Depth: 1")
	}

	// Nothing is changed in them, whoever asks and by whichever name.
	for _, path := range []string{"/.snapshots", "/.snapshots/new", "/.snapshots/first", "/.snapshots/first/", "/.snapshots/first/file", "/.snapshots/first/dir/new", "//.snapshots//first//file", "/%2Esnapshots%2Ffirst%2Ffile", "/./.snapshots/first/file"} {
		for _, method := range []string{"PUT", "DELETE", "MKCOL", "MOVE", "PROPPATCH", "LOCK", "UNLOCK", "POST", "PATCH"} {
			w.want(http.StatusForbidden, method, path, "", "Destination: "+w.url+"/moved")
		}
		for _, method := range []string{"COPY", "MOVE"} {
			w.want(http.StatusForbidden, method, "/file", "", "Destination: "+w.url+path)
		}
	}
	w.want(http.StatusForbidden, "COPY", "/.snapshots", "", "Destination: "+w.url+"/all")
	w.want(http.StatusForbidden, "COPY", "/.snapshots/first/file", "", "Destination: "+w.url+"/.snapshots/first/other")
	for _, name := range []string{"first", odd} {
		if data, err := os.ReadFile(filepath.Join(w.at(name), "file")); err != nil || string(data) != "0123456789" {
			t.Errorf("%s has become %q, %v", name, data, err)
		}
	}

	// What is in them can be brought back.
	to := func(path string) string { return "Destination: " + w.url + path }
	w.want(http.StatusPreconditionFailed, "COPY", "/.snapshots/first/file", "", to("/file"), "Overwrite: F")
	w.want(http.StatusPreconditionFailed, "COPY", "/.snapshots/first/file", "", to("/file"), `If-Match: "other"`)
	w.want(http.StatusNoContent, "COPY", "/.snapshots/first/file", "", to("/file"), "If-Match: "+h.Get("ETag"))
	w.want(http.StatusCreated, "COPY", "/.snapshots/first/dir", "", to("/dir"))
	w.want(http.StatusCreated, "COPY", "/.snapshots/first", "", to("/all"))
	w.want(http.StatusCreated, "COPY", "/.snapshots/first", "", to("/flat"), "Depth: 0")
	w.want(http.StatusNotFound, "COPY", "/.snapshots/first/none", "", to("/none"))
	w.want(http.StatusNotFound, "COPY", "/.snapshots/none", "", to("/none"))
	for name, want := range map[string]string{"file": "0123456789", "dir/deep/letter": "then", "all/dir/deep/letter": "then"} {
		if w.file(name) != want {
			t.Errorf("%s has become %q", name, w.file(name))
		}
	}
	if _, err := os.Stat(filepath.Join(w.root, "all/.sgwtmp")); err == nil {
		t.Error("what helps to serve was copied")
	}
	if entries, err := os.ReadDir(filepath.Join(w.root, "flat")); err != nil || len(entries) != 0 {
		t.Errorf("of a directory alone was copied %v, %v", entries, err)
	}
	w.allow(Grant{User: "r", Secret: "s", ReadOnly: true})
	r := &http.Request{Header: http.Header{}}
	r.SetBasicAuth("r", "s")
	reader := "Authorization: " + r.Header.Get("Authorization")
	w.want(http.StatusOK, "GET", "/.snapshots/first/file", "", reader)
	w.want(http.StatusForbidden, "COPY", "/.snapshots/first/file", "", reader, to("/mine"))

	// One that is taken anew under its name is another; what is open ends with the last grant.
	w.all = w.all[1:]
	w.want(http.StatusNotFound, "GET", "/.snapshots/first/file", "")
	w.take("first/..", then) // an impossible name leads nowhere
	w.want(http.StatusNotFound, "GET", "/.snapshots/first/../file", "")
	if err := os.RemoveAll(w.at("first")); err != nil {
		t.Fatal(err)
	}
	w.write("file", "later")
	w.take("first", then.Add(2*time.Hour))
	if answer, _ := w.want(http.StatusOK, "GET", "/.snapshots/first/file", ""); answer != "later" {
		t.Errorf("taken anew it is %q", answer)
	}
	if w.opened["first"] != 2 || w.opened[odd] != 1 || len(w.opened) != 2 {
		t.Errorf("they were opened %v times", w.opened)
	}
	w.server.Forbid("u")
	w.want(http.StatusUnauthorized, "GET", "/.snapshots/first/file", "")
	w.server.Forbid("r")
	for _, r := range w.roots {
		if _, err := r.Stat("."); err == nil {
			t.Errorf("%s is open", r.Name())
		}
	}
}

// TestSnapshotsConfined: links in snapshots lead out of none, the volume's own directory of their name is not seen, and nobody has another's.
func TestSnapshotsConfined(t *testing.T) {
	w := servePast(t)
	for name, target := range map[string]string{"up": "../../secret", "over": "../other/file", "now": "../../root/file", "absolute": "/etc/hostname", "inside": "file", ".snapshots": "dir", "past": ".snapshots/file"} {
		if err := os.Symlink(target, filepath.Join(w.root, name)); err != nil {
			t.Fatal(err)
		}
	}
	w.write("file", "then")
	w.take("first", time.Unix(1, 0))
	w.take("other", time.Unix(2, 0))
	for _, name := range []string{"up", "over", "now", "absolute", "past"} {
		w.want(http.StatusNotFound, "GET", "/.snapshots/first/"+name, "")
		w.want(http.StatusNotFound, "COPY", "/.snapshots/first/"+name, "", "Destination: "+w.url+"/mine")
	}
	if answer, _ := w.want(http.StatusOK, "GET", "/.snapshots/first/inside", ""); answer != "then" {
		t.Errorf("a link that stays inside leads to %q", answer)
	}
	for _, path := range []string{"/.snapshots/../../secret", "/.snapshots/..%2f..%2fsecret", "/.snapshots/first/..%2f..%2f..%2fsecret", "/.snapshots/..", "/.snapshots/../file", "/.snapshots/first/../other/file", "/.snapshots/%2e%2e/%2e%2e/secret"} {
		for _, method := range []string{"GET", "PUT", "DELETE", "PROPFIND"} {
			if code, answer, _ := w.do(method, path, "", "Depth: 0"); code != http.StatusNotFound || strings.Contains(answer, "classified") {
				t.Errorf("%s %s: %d %s", method, path, code, answer)
			}
		}
	}
	// A directory of this name that the volume has is not seen, listed or written.
	if err := os.Remove(filepath.Join(w.root, ".snapshots")); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(filepath.Join(w.root, ".snapshots"), 0o755); err != nil {
		t.Fatal(err)
	}
	w.write(".snapshots/file", "hidden")
	w.want(http.StatusNotFound, "GET", "/.snapshots/file", "")
	w.want(http.StatusForbidden, "PUT", "/.snapshots/file", "x")
	w.want(http.StatusNoContent, "PUT", "/past", "x") // the link itself
	if answer, _ := w.want(http.StatusMultiStatus, "PROPFIND", "/", "", "Depth: 1"); strings.Contains(answer, "snapshots") {
		t.Errorf("the root is listed as %s", answer)
	}
	if w.file(".snapshots/file") != "hidden" || w.file("past") != "x" {
		t.Error("a hidden file was written")
	}
	// Nobody has another's.
	root := filepath.Join(filepath.Dir(w.root), "theirs")
	if err := os.Mkdir(root, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := w.server.Allow(Grant{User: "o", Secret: "q", Volume: "w", Root: root, Snapshots: &snapshots.Source{List: func() ([]snapshots.Snapshot, error) { return nil, nil }}}); err != nil {
		t.Fatal(err)
	}
	r := &http.Request{Header: http.Header{}}
	r.SetBasicAuth("o", "q")
	theirs := "Authorization: " + r.Header.Get("Authorization")
	for _, path := range []string{"/.snapshots", "/.snapshots/first/file", "/../w/.snapshots/first/file"} {
		w.want(http.StatusNotFound, "GET", path, "", theirs)
	}
	// Where there are none, it is a name like others.
	if err := w.server.Allow(Grant{User: "o", Secret: "q", Volume: "w", Root: root}); err != nil {
		t.Fatal(err)
	}
	w.url = strings.TrimSuffix(w.url, "v") + "w"
	w.want(http.StatusCreated, "PUT", "/.snapshots", "a file", theirs)
	w.want(http.StatusOK, "GET", "/.snapshots", "", theirs)
}
