package programs

import (
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"
)

// Tool is the path of a third-party program: that of PATH where it fits, else built once (tools/build.sh).
func Tool(name string) (string, error) {
	root, err := Root()
	if err != nil {
		return "", err
	}
	out, err := exec.Command(filepath.Join(root, "tools", "build.sh"), name).Output()
	if err != nil {
		var exit *exec.ExitError
		if errors.As(err, &exit) {
			return "", fmt.Errorf("tools/build.sh %s: %w: %s", name, err, exit.Stderr)
		}
		return "", err
	}
	return strings.TrimSpace(string(out)), nil
}
