package main

import (
	"io"
	"os"
	"testing"

	"github.com/cradlestack/cradlestack/internal/golden"
)

// TestReference keeps docs/kcradle.md what the commands say of themselves.
func TestReference(t *testing.T) {
	t.Setenv("CRADLE_ROOT", "")
	golden.Reference(t, "../../docs/kcradle.md", "go test ./driver-cradle/kcradle -run TestReference -update", (&cli{stdin: os.Stdin, stdout: io.Discard, stderr: io.Discard}).command())
}
