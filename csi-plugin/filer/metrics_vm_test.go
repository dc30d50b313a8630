//go:build vm

package main

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/cradlestack/cradlestack/internal/filertest"
)

// TestRootMetrics: each protocol's requests, refusals, bytes and syncs are counted, what is served, and how old the newest snapshot is.
func TestRootMetrics(t *testing.T) {
	f := filertest.Start(t, "--metrics", ":0") // in the log is which port that is
	f.Volume("vol", 64<<20, nil)
	p, g := f.Publish("vol"), f.Grant("vol", "--id", "me")
	at := regexp.MustCompile(`msg="serving metrics" url=(http://127\.0\.0\.1:\S+)`).FindStringSubmatch(f.Log())
	if at == nil {
		t.Fatal("the filer does not say where its metrics are")
	}
	local := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(local, []byte(strings.Repeat("content ", 10_000)), 0o600); err != nil {
		t.Fatal(err)
	}
	curl := func(args ...string) string {
		t.Helper()
		out, err := client(t, "curl", append([]string{"--silent", "--show-error", "--cacert", f.CA(), "--user", g.ID + ":" + g.Secret}, args...)...)
		if err != nil {
			t.Errorf("%v: %s", err, out)
		}
		return out
	}
	if out, err := client(t, "nfs-cp", local, nfsURL(p, "one")); err != nil {
		t.Errorf("%v: %s", err, out)
	}
	_, _ = client(t, "nfs-cp", nfsURL(p, "absent"), local)
	curl("--upload-file", local, g.WebDAV+"two")
	curl("--request", "NONSENSE", g.WebDAV)
	curl(g.WebDAV + "absent")
	curl("--user", "me:wrong", g.WebDAV+"two")
	curl("--aws-sigv4", "aws:amz:us-east-1:s3", "--header", "x-amz-content-sha256: UNSIGNED-PAYLOAD", "--upload-file", local, g.S3+"vol/three")
	f.Must("snapshot", "vol", "now")
	defer removeSnapshot(t, f, "vol", "now")
	all := curl(at[1])
	for _, want := range []string{
		`cradle_filer_active 1`, `cradle_filer_volumes 1`, `cradle_filer_publications 1`, `cradle_filer_grants 1`, `cradle_filer_terms_total 1`,
		`cradle_filer_requests_total{code="OK",method="MOUNT",protocol="nfs"} \d`, `cradle_filer_requests_total{code="OK",method="WRITE",protocol="nfs"} \d`,
		`cradle_filer_requests_total{code="NOENT",method="LOOKUP",protocol="nfs"} \d`,
		`cradle_filer_requests_total{code="201",method="PUT",protocol="webdav"} 1`, `cradle_filer_requests_total{code="404",method="GET",protocol="webdav"} 1`,
		`cradle_filer_requests_total{code="401",method="GET",protocol="webdav"} 1`, `cradle_filer_requests_total{code="\d+",method="other",protocol="webdav"} 1`,
		`cradle_filer_requests_total{code="200",method="PUT",protocol="s3"} 1`,
		`cradle_filer_bytes_total{direction="in",protocol="nfs"} 8\d{4}`, `cradle_filer_bytes_total{direction="in",protocol="webdav"} 80000`, `cradle_filer_bytes_total{direction="in",protocol="s3"} 80000`,
		`cradle_filer_sync_seconds_count{protocol="nfs"} [1-9]`, `cradle_filer_sync_seconds_count{protocol="webdav"} [1-9]`, `cradle_filer_sync_seconds_count{protocol="s3"} [1-9]`,
		`cradle_filer_snapshot_age_seconds{volume="vol"} \d`,
	} {
		if !regexp.MustCompile(`(?m)^` + want).MatchString(all) {
			t.Errorf("there is no %s", want)
		}
	}
	if t.Failed() {
		t.Log(all)
	}
}
