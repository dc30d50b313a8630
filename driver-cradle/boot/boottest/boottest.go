// Package boottest makes the boot packages of tests that run in real machines: the project's kernel or the distribution's, and an agent
// that is built of this source. Only tests import it.
package boottest

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/cradlestack/cradlestack/driver-cradle/boot"
)

// Main is the TestMain of a package whose tests boot machines. It makes a folder that everybody may enter, and in it a boot package with the
// agent of a Go package (of cradle-init's, or one that does what tests ask for); CRADLE_TEST_VARIANT=stock takes the distribution's kernel. Then setUp, the tests
// and tearDown, which may be nil, have their turn. It does not return.
func Main(m *testing.M, agent string, setUp func(dir string, p *boot.Package) error, tearDown func() error) {
	code, err := run(m, agent, setUp, tearDown)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = max(code, 1)
	}
	os.Exit(code)
}

func run(m *testing.M, agent string, setUp func(string, *boot.Package) error, tearDown func() error) (code int, err error) {
	if os.Getuid() != 0 {
		return 1, errors.New("tests of virtual machines need root")
	}
	wd, err := os.Getwd()
	if err != nil {
		return 1, err
	}
	dir, err := os.MkdirTemp("", filepath.Base(wd)+"-test-")
	if err != nil {
		return 1, err
	}
	defer os.RemoveAll(dir)
	if err := os.Chmod(dir, 0o755); err != nil {
		return 1, err
	}
	variant := os.Getenv("CRADLE_TEST_VARIANT")
	if variant == "" {
		variant = boot.VariantDefault
	}
	p, err := Build(filepath.Join(dir, "boot"), agent, variant)
	if err == nil {
		err = setUp(dir, p)
	}
	if err != nil {
		return 1, err
	}
	code = m.Run()
	if tearDown != nil {
		err = tearDown()
	}
	return code, err
}

// Build makes a boot package in the folder out, which must not exist. agent is a Go package, as go build takes it; args go to the kernel's
// command line.
func Build(out, agent, variant string, args ...string) (*boot.Package, error) {
	root, err := repository()
	if err != nil {
		return nil, err
	}
	o := boot.BuildOptions{Variant: variant, Out: out, Agent: out + ".agent", Args: args}
	script := filepath.Join(root, "tools", "kernel", "build.sh")
	if variant == boot.VariantStock {
		script = filepath.Join(root, "tools", "kernel", "stock.sh")
	}
	if o.Kernel, err = command(script); err != nil {
		return nil, err
	}
	if variant == boot.VariantStock {
		o.Modules, o.Kernel = filepath.Join(o.Kernel, "modules"), filepath.Join(o.Kernel, "vmlinuz")
	}
	if _, err := command("go", "build", "-trimpath", "-ldflags=-s -w", "-o", o.Agent, agent); err != nil {
		return nil, err
	}
	defer os.Remove(o.Agent)
	if err := boot.Build(context.Background(), o); err != nil {
		return nil, err
	}
	return boot.Open(out)
}

// repository is its root, found upwards from the working directory.
func repository() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for ; ; dir = filepath.Dir(dir) {
		if _, err := os.Stat(filepath.Join(dir, "arch_test.go")); err == nil {
			return dir, nil
		}
		if dir == filepath.Dir(dir) {
			return "", errors.New("this is not inside the repository; run it there")
		}
	}
}

// command gives what a program prints.
func command(name string, args ...string) (string, error) {
	cmd := exec.Command(name, args...)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("%s %v: %w\n%s", name, args, err, stderr.String())
	}
	return strings.TrimSpace(string(out)), nil
}
