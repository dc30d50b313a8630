package webdav

import (
	"io"
	"net/http"
	"regexp"
	"strings"
	"testing"
)

// A step is a request as a file manager makes it. TOKEN is that of the lock which a former one has got.
type step struct {
	method, path string
	headers      []string
	body         string
	chunked      bool
	code         int
	has          []string // in the answer, or in its headers as Name: value
}

func (w *world) follow(agent string, steps []step) {
	w.t.Helper()
	token := ""
	for _, s := range steps {
		var headers []string
		for _, h := range append([]string{"User-Agent: " + agent}, s.headers...) {
			headers = append(headers, strings.NewReplacer("TOKEN", token, "HOST", strings.TrimSuffix(w.url, "/v")).Replace(h))
		}
		var body io.Reader = strings.NewReader(s.body)
		if s.chunked {
			body = struct{ io.Reader }{body}
		}
		resp, err := w.try(s.method, s.path, body, headers...)
		if err != nil {
			w.t.Fatal(err)
		}
		data, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if err != nil || resp.StatusCode != s.code {
			w.t.Fatalf("%s: %s %s: %d, not %d: %s, %v", agent, s.method, s.path, resp.StatusCode, s.code, data, err)
		}
		for _, has := range s.has {
			name, value, isHeader := strings.Cut(has, ": ")
			if isHeader && resp.Header.Get(name) != value || !isHeader && !regexp.MustCompile(has).Match(data) {
				w.t.Errorf("%s: %s %s: there is no %s in %v %s", agent, s.method, s.path, has, resp.Header, data)
			}
		}
		if s.method == "LOCK" {
			token = resp.Header.Get("Lock-Token")
		}
	}
}

// TestWindows makes the requests of Windows' mini-redirector, by which its Explorer has a network drive: it looks, saves a file, renames it, makes a directory, removes both.
func TestWindows(t *testing.T) {
	w := serve(t)
	const (
		lock = `<?xml version="1.0" encoding="utf-8" ?><D:lockinfo xmlns:D="DAV:"><D:lockscope><D:exclusive/></D:lockscope><D:locktype><D:write/></D:locktype><D:owner><D:href>DESKTOP\someone</D:href></D:owner></D:lockinfo>`
		made = `<?xml version="1.0" encoding="utf-8" ?><D:propertyupdate xmlns:D="DAV:" xmlns:Z="urn:schemas-microsoft-com:"><D:set><D:prop><Z:Win32CreationTime>Fri, 27 Nov 2026 10:00:00 GMT</Z:Win32CreationTime>` +
			`<Z:Win32LastAccessTime>Fri, 27 Nov 2026 10:00:00 GMT</Z:Win32LastAccessTime><Z:Win32LastModifiedTime>Fri, 27 Nov 2026 10:00:00 GMT</Z:Win32LastModifiedTime><Z:Win32FileAttributes>00000020</Z:Win32FileAttributes></D:prop></D:set></D:propertyupdate>`
	)
	named := "If: (TOKEN)"
	w.follow("Microsoft-WebDAV-MiniRedir/10.0.19045", []step{
		{method: "OPTIONS", path: "", headers: []string{"translate: f"}, code: 200, has: []string{"MS-Author-Via: DAV", "DAV: 1, 2, 3"}},
		{method: "PROPFIND", path: "", headers: []string{"Depth: 0", "translate: f"}, code: 207, has: []string{"<D:collection"}},
		{method: "PROPFIND", path: "", headers: []string{"Depth: 1", "translate: f"}, code: 207},
		{method: "PROPFIND", path: "/desktop.ini", headers: []string{"Depth: 0", "translate: f"}, code: 404},
		{method: "PROPFIND", path: "/New%20Document.txt", headers: []string{"Depth: 0", "translate: f"}, code: 404},
		{method: "PUT", path: "/New%20Document.txt", headers: []string{"translate: f"}, code: 201},
		{method: "LOCK", path: "/New%20Document.txt", headers: []string{"Timeout: Second-3600", "Content-Type: text/xml; charset=\"utf-8\"", "translate: f"}, body: lock, code: 200, has: []string{`Second-\d+`, `DESKTOP\\someone`}},
		{method: "PROPPATCH", path: "/New%20Document.txt", headers: []string{named, "translate: f"}, body: made, code: 207, has: []string{"HTTP/1.1 200 OK"}},
		{method: "HEAD", path: "/New%20Document.txt", headers: []string{"translate: f"}, code: 200, has: []string{"Content-Length: 0"}},
		{method: "PUT", path: "/New%20Document.txt", headers: []string{named, "translate: f"}, body: "content", code: 204},
		{method: "PUT", path: "/New%20Document.txt", headers: []string{"translate: f"}, body: "another's", code: 423},
		{method: "PROPPATCH", path: "/New%20Document.txt", headers: []string{named, "translate: f"}, body: made, code: 207, has: []string{"HTTP/1.1 200 OK"}},
		{method: "LOCK", path: "/New%20Document.txt", headers: []string{named, "Timeout: Second-3600", "translate: f"}, code: 200},
	})
	// A refresh has no token in its header: what the first one got counts on.
	resp, err := w.try("PROPFIND", "/New%20Document.txt", nil, "Depth: 0")
	if err != nil {
		t.Fatal(err)
	}
	data, err := io.ReadAll(resp.Body)
	resp.Body.Close()
	token := regexp.MustCompile(`urn:uuid:[0-9a-f-]+`).FindString(string(data))
	if err != nil || token == "" {
		t.Fatalf("the lock is not told: %s, %v", data, err)
	}
	w.want(http.StatusNoContent, "UNLOCK", "/New%20Document.txt", "", "Lock-Token: <"+token+">")
	w.follow("Microsoft-WebDAV-MiniRedir/10.0.19045", []step{
		{method: "PROPFIND", path: "", headers: []string{"Depth: 1", "translate: f"}, code: 207, has: []string{"/v/New%20Document.txt", "<Win32FileAttributes[^>]*>00000020<", "<D:getcontentlength>7<"}},
		{method: "MOVE", path: "/New%20Document.txt", headers: []string{"Destination: HOST/v/Gr%C3%B6%C3%9Fe.txt", "Overwrite: F", "translate: f"}, code: 201},
		{method: "GET", path: "/Gr%C3%B6%C3%9Fe.txt", headers: []string{"translate: f"}, code: 200, has: []string{"^content$"}},
		{method: "MKCOL", path: "/New%20folder", headers: []string{"translate: f"}, code: 201},
		{method: "PROPPATCH", path: "/New%20folder", headers: []string{"translate: f"}, body: made, code: 207, has: []string{"HTTP/1.1 200 OK"}},
		{method: "DELETE", path: "/New%20folder", headers: []string{"translate: f"}, code: 204},
		{method: "DELETE", path: "/Gr%C3%B6%C3%9Fe.txt", headers: []string{"translate: f"}, code: 204},
	})
}

// TestMacOS makes those of macOS' Finder: it asks for the room that there is and for files of its own, saves a file of which it sends the length by a header of its own, beside
// one with what HFS has of it, replaces it, and moves it with its name decomposed.
func TestMacOS(t *testing.T) {
	w := serve(t)
	const (
		lock = `<?xml version="1.0" encoding="utf-8"?><D:lockinfo xmlns:D="DAV:"><D:lockscope><D:exclusive/></D:lockscope><D:locktype><D:write/></D:locktype><D:owner><D:href>http://www.apple.com/webdav_fs/</D:href></D:owner></D:lockinfo>`
		room = `<?xml version="1.0" encoding="utf-8"?><D:propfind xmlns:D="DAV:"><D:prop><D:quota-available-bytes/><D:quota-used-bytes/><D:quota/><D:quotaused/></D:prop></D:propfind>`
		look = `<?xml version="1.0" encoding="utf-8"?><D:propfind xmlns:D="DAV:"><D:prop><D:getlastmodified/><D:getcontentlength/><D:creationdate/><D:resourcetype/></D:prop></D:propfind>`
	)
	locked := []string{"If: (TOKEN)"}
	save := func(path, content string, first int) []step {
		return []step{
			{method: "PUT", path: path, code: first},
			{method: "LOCK", path: path, headers: []string{"Depth: 0", "Timeout: Second-600", "Content-Type: text/xml; charset=\"utf-8\""}, body: lock, code: 200, has: []string{"webdav_fs"}},
			{method: "PROPFIND", path: path, headers: []string{"Depth: 0"}, body: look, code: 207, has: []string{"<D:getcontentlength>0<"}},
			{method: "PUT", path: path, headers: append(locked, "X-Expected-Entity-Length: "+"7"), body: content, chunked: true, code: 204},
			{method: "PROPFIND", path: path, headers: []string{"Depth: 0"}, body: look, code: 207, has: []string{"<D:getcontentlength>7<", "<D:creationdate>"}},
			{method: "UNLOCK", path: path, headers: []string{"Lock-Token: TOKEN"}, code: 204},
		}
	}
	w.follow("WebDAVFS/3.0.0 (03008000) Darwin/23.1.0 (arm64)", append(append([]step{
		{method: "OPTIONS", path: "/", code: 200, has: []string{"DAV: 1, 2, 3"}},
		{method: "PROPFIND", path: "/", headers: []string{"Depth: 0"}, body: room, code: 207, has: []string{`<D:quota-available-bytes>\d+<`, `<D:quota-used-bytes>\d+<`, "404 Not Found"}},
		{method: "PROPFIND", path: "/", headers: []string{"Depth: 1"}, body: look, code: 207},
		{method: "PROPFIND", path: "/._.", headers: []string{"Depth: 0"}, body: look, code: 404},
		{method: "PROPFIND", path: "/.DS_Store", headers: []string{"Depth: 0"}, body: look, code: 404},
	}, save("/caf%C3%A9.txt", "content", 201)...), save("/._caf%C3%A9.txt", "\x00\x05\x16\x07\x00\x02\x00", 201)...))
	w.follow("WebDAVFS/3.0.0 (03008000) Darwin/23.1.0 (arm64)", []step{
		{method: "GET", path: "/caf%C3%A9.txt", headers: []string{"Range: bytes=0-3"}, code: 206, has: []string{"^cont$"}},
		{method: "MOVE", path: "/caf%C3%A9.txt", headers: []string{"Destination: HOST/v/cafe%CC%81s.txt"}, code: 201},
		{method: "MOVE", path: "/._caf%C3%A9.txt", headers: []string{"Destination: HOST/v/._cafe%CC%81s.txt"}, code: 201},
		{method: "PROPFIND", path: "/", headers: []string{"Depth: 1"}, body: look, code: 207, has: []string{"/v/cafe%CC%81s.txt"}},
		{method: "DELETE", path: "/cafe%CC%81s.txt", code: 204},
		{method: "DELETE", path: "/._cafe%CC%81s.txt", code: 204},
	})
}
