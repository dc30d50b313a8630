package main

import (
	"bytes"
	"encoding/csv"
	"net"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/cradlestack/cradlestack/csi-plugin/filer/api"
)

// What is printed to be typed is what does it.
func TestPrinted(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	address := ""
	mux := http.NewServeMux()
	mux.HandleFunc("PUT /publications/{id}", func(w http.ResponseWriter, r *http.Request) {
		answerJSON(w, api.Publication{ID: r.PathValue("id"), Address: address, Export: "/v/secret", Options: "vers=3,hard"}, nil)
	})
	mux.HandleFunc("POST /volumes/v/rollback", func(w http.ResponseWriter, _ *http.Request) { answerJSON(w, api.RolledBack{Undo: "before"}, nil) })
	server := &httptest.Server{Listener: l, Config: &http.Server{Handler: mux}}
	server.Start()
	defer server.Close()
	says := func(args ...string) string {
		t.Helper()
		var out, errs bytes.Buffer
		if code := run(t.Context(), append([]string{"--socket", socket}, args...), &out, &errs); code != 0 {
			t.Fatalf("%v: %s", args, errs.String())
		}
		return strings.Join(strings.Fields(out.String()), " ")
	}
	for a, want := range map[string]string{
		"10.1.2.3:2049":      "mount -t nfs -o vers=3,hard,port=2049,mountport=2049 10.1.2.3:/v/secret DIRECTORY",
		"[fd00::9]:2049":     "mount -t nfs -o vers=3,hard,port=2049,mountport=2049 [fd00::9]:/v/secret DIRECTORY",
		"files.example:2049": "mount -t nfs -o vers=3,hard,port=2049,mountport=2049 files.example:/v/secret DIRECTORY",
	} {
		address = a
		said := says("publish", "v", "--client", "10.1.2.4")
		if !strings.Contains(said, want) {
			t.Errorf("at %s it says %q", a, said)
		}
		_, word, _ := strings.Cut(said, "--mount '")
		word, _, _ = strings.Cut(word, "'")
		fields, err := csv.NewReader(strings.NewReader(word)).Read() // as kcradle reads it
		if want := []string{"type=nfs", "source=nfs://" + a + "/v/secret", "target=PATH", "options=vers=3,hard"}; err != nil || !slices.Equal(fields, want) {
			t.Errorf("at %s a pod is told %q, %v", a, fields, err)
		}
	}
	for path, want := range map[string]string{"": "rollback v before", "letters/größe": "rollback v before letters/größe", "it's $HOME": `rollback v before 'it'\''s $HOME'`} {
		args := []string{"rollback", "v", "s"}
		if path != "" {
			args = append(args, path)
		}
		if said := says(args...); !strings.HasSuffix(said, "cradle-filer "+want) {
			t.Errorf("after the rollback of %q it says %q", path, said)
		}
	}
}
