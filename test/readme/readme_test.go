//go:build vm

package readme

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/cradlestack/cradlestack/internal/mountns"
	"github.com/cradlestack/cradlestack/internal/stack"
	"github.com/cradlestack/cradlestack/test/programs"
)

// TestMain: nodes of other tests that run would keep volumes mounted that the examples destroy.
func TestMain(m *testing.M) {
	mountns.Own()
	os.Exit(m.Run())
}

// Examples are fenced as sh, with <!-- run --> on the line before; those that need a node of Nomad's have <!-- run with make up -->.
var (
	blocks      = regexp.MustCompile("(?s)<!-- run -->\n```sh\n(.*?)```\n")
	stackBlocks = regexp.MustCompile("(?s)<!-- run with make up -->\n```sh\n(.*?)```\n")
)

// TestVMExamples runs the README's examples one after the other in one shell, as a reader would, in a folder of their own.
func TestVMExamples(t *testing.T) {
	root, err := programs.Root()
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"kcradle", "boot/default/manifest.json"} {
		if _, err := programs.Path(name); err != nil {
			t.Fatal(err)
		}
	}
	script := examples(t, root, blocks)
	dir, err := os.MkdirTemp("", "readme")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		// What a failed example has left running ends with it.
		pods, _ := filepath.Glob(filepath.Join(dir, "*", "launch.json"))
		for _, pod := range pods {
			if out, err := exec.Command(filepath.Join(root, "bin", "kcradle"), "kill", filepath.Dir(pod)).CombinedOutput(); err == nil && t.Failed() {
				t.Logf("kcradle kill: %s", out)
			}
		}
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	bash(t, root, dir, script)
}

// TestVMExamplesWithMakeUp runs those that are for a node, on one.
func TestVMExamplesWithMakeUp(t *testing.T) {
	root, err := programs.Root()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := programs.Image("busybox"); err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp("/tmp", "readme") // short, for sockets' paths
	if err != nil {
		t.Fatal(err)
	}
	t.Setenv("DOCKER_CONFIG", t.TempDir())
	if _, err := programs.Image("nginx"); err != nil {
		t.Fatal(err)
	}
	installProvider(t, root)
	t.Cleanup(func() {
		if err := stack.Clean(context.Background(), dir); err != nil {
			t.Error(err)
		}
	})
	if _, err := stack.Up(t.Context(), dir); err != nil {
		t.Fatal(err)
	}
	env, err := stack.Env(dir)
	if err != nil {
		t.Fatal(err)
	}
	bash(t, root, dir, env+examples(t, root, stackBlocks))
}

// installProvider is make install-provider, for this test alone.
func installProvider(t *testing.T, root string) {
	t.Helper()
	if _, err := exec.LookPath("terraform"); err != nil {
		t.Fatalf("%v: https://developer.hashicorp.com/terraform/install", err)
	}
	plugins, rc := t.TempDir(), filepath.Join(t.TempDir(), "terraformrc")
	if out, err := exec.Command("make", "-C", root, "-o", "build", "install-provider", "PROVIDERS="+plugins).CombinedOutput(); err != nil {
		t.Fatalf("make install-provider: %v\n%s", err, out)
	}
	if err := os.WriteFile(rc, fmt.Appendf(nil, "provider_installation {\n  filesystem_mirror {\n    path = %q\n  }\n}\n", plugins), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("TF_CLI_CONFIG_FILE", rc)
	t.Setenv("CHECKPOINT_DISABLE", "1")
}

// examples are the README's, one after the other.
func examples(t *testing.T, root string, blocks *regexp.Regexp) string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(root, "README.md"))
	if err != nil {
		t.Fatal(err)
	}
	var script strings.Builder
	for _, block := range blocks.FindAllSubmatch(text, -1) {
		script.Write(block[1])
	}
	if n := strings.Count(script.String(), "\n"); n < 10 {
		t.Fatalf("the README has %d lines of examples", n)
	}
	return script.String()
}

// bash runs a script in a directory, as a reader would who has the programs in $PATH.
func bash(t *testing.T, root, dir, script string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 15*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "bash", "-euxo", "pipefail", "-c", script)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "PATH="+filepath.Join(root, "bin")+":"+os.Getenv("PATH"))
	cmd.WaitDelay = 5 * time.Second
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Run(); err != nil {
		t.Fatalf("%v\n%s", err, &out)
	}
}
