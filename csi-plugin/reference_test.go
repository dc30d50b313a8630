package main

import (
	"io"
	"testing"

	"github.com/cradlestack/cradlestack/internal/golden"
)

// TestReference keeps docs/cradle-csi.md what the commands say of themselves.
func TestReference(t *testing.T) {
	for _, name := range []string{"CSI_ENDPOINT", "NOMAD_NAMESPACE", "NOMAD_SECRETS_DIR", "NOMAD_TOKEN"} {
		t.Setenv(name, "")
	}
	golden.Reference(t, "../docs/cradle-csi.md", "go test ./csi-plugin -run TestReference -update", (&cli{stdout: io.Discard, stderr: io.Discard}).command())
}
