//go:build vm

package main

import (
	"bytes"
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/cradlestack/cradlestack/csi-plugin/mount"
)

// A token that sees some namespaces is shown their allocations alone: what is mounted for the others' is in use, whatever the list says.
func TestRootDoctorToken(t *testing.T) {
	const plugin = "doctors-test" // no other mounts of this host are looked at
	for name, c := range map[string]struct {
		code   int
		token  string
		repair bool
	}{
		"Client":     {http.StatusOK, `{"Type": "client"}`, false},
		"Management": {http.StatusOK, `{"Type": "management"}`, true},
		"NoACLs":     {http.StatusOK, `{"Type": "client", "AccessorID": "acls-disabled"}`, true},
		"Refused":    {http.StatusForbidden, "ACL token not found", false},
	} {
		t.Run(name, func(t *testing.T) {
			nomad := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				if r.URL.Path == "/v1/acl/token/self" {
					w.WriteHeader(c.code)
					if _, err := w.Write([]byte(c.token)); err != nil {
						t.Error(err)
					}
				} else if err := json.NewEncoder(w).Encode([]string{}); err != nil {
					t.Error(err)
				}
			}))
			defer nomad.Close()
			target := filepath.Join(t.TempDir(), "csi/monolith", plugin, "per-alloc/8667701a/data/rw")
			if err := os.MkdirAll(target, 0o700); err != nil {
				t.Fatal(err)
			}
			if err := unix.Mount("test", target, "tmpfs", 0, ""); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() {
				if err := mount.Detach(target); err != nil {
					t.Error(err)
				}
			})
			var out bytes.Buffer
			err := (&doctor{c: &cli{stdout: &out}}).nomad(t.Context(), nomad.URL, plugin)
			mounted, merr := mount.Is(target)
			if merr != nil {
				t.Fatal(merr)
			}
			if mounted == c.repair || (err == nil) != c.repair || (out.Len() > 0) != c.repair {
				t.Errorf("mounted: %t, said %q, %v", mounted, out.String(), err)
			}
			if name == "Client" && (err == nil || !strings.Contains(err.Error(), "allocation 8667701a is none that this token sees") || !strings.Contains(err.Error(), "NOMAD_TOKEN")) {
				t.Errorf("%v", err)
			}
		})
	}
}
