package main

import (
	"io"
	"testing"

	"github.com/cradlestack/cradlestack/internal/golden"
)

// TestReference keeps docs/cradle-filer.md what the commands say of themselves.
func TestReference(t *testing.T) {
	for _, name := range []string{"CRADLE_FILER", "CRADLE_FILER_API", "CRADLE_FILER_KEY", "CRADLE_FILER_SOCKET", "CONSUL_HTTP_ADDR", "NOMAD_NAMESPACE", "NOMAD_SECRETS_DIR", "NOMAD_TOKEN"} {
		t.Setenv(name, "")
	}
	golden.Reference(t, "../../docs/cradle-filer.md", "go test ./csi-plugin/filer -run TestReference -update", (&cli{stdout: io.Discard, stderr: io.Discard}).command())
}
