//go:build vm

package main

import (
	"context"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/cradlestack/cradlestack/driver-cradle/boot"
	"github.com/cradlestack/cradlestack/driver-cradle/boot/boottest"
)

// A world is what tests with machines share: a boot package of this source, a cache with its template, the example images.
type world struct {
	dir, tmp, root, boot, images, kcradle string
}

// theWorld is made once for the process.
func theWorld(t testing.TB) *world {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Fatal("tests with machines need root")
	}
	w, err := makeWorld()
	if err != nil {
		t.Fatal(err)
	}
	return w
}

var makeWorld = sync.OnceValues(func() (*world, error) {
	dir, err := os.MkdirTemp("", "kcradle-test-")
	if err != nil {
		return nil, err
	}
	atEnd = append(atEnd, func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		return nil, err
	}
	cache, err := os.UserCacheDir()
	if err != nil {
		return nil, err
	}
	w := &world{dir: dir, tmp: filepath.Join(dir, "tmp"), root: filepath.Join(dir, "cache"), boot: filepath.Join(dir, "boot"), images: filepath.Join(cache, "cradlestack", "images"), kcradle: filepath.Join(dir, "kcradle")}
	if err := os.Mkdir(w.tmp, 0o700); err != nil {
		return nil, err
	}
	for _, build := range [][]string{{"go", "build", "-o", w.kcradle, "."}, {"../../examples/images/build.sh", "busybox", "debian"}} {
		cmd := exec.Command(build[0], build[1:]...)
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := cmd.CombinedOutput(); err != nil {
			return nil, fmt.Errorf("%v: %w\n%s", build, err, out)
		}
	}
	_, err = boottest.Build(w.boot, "../guest/cradle-init", boot.VariantDefault)
	return w, err
})

// env is the environment of a kcradle in this world.
func (w *world) env() []string {
	return append(os.Environ(), "CRADLE_ROOT="+w.root, "CRADLE_BOOT="+w.boot, "TMPDIR="+w.tmp, "PATH="+w.dir+":"+os.Getenv("PATH"))
}

// run executes kcradle and returns what it says and its exit code.
func (w *world) run(t testing.TB, args ...string) (stdout, stderr string, code int) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience) // not the test's: clean-up runs after that
	defer cancel()
	cmd := exec.CommandContext(ctx, w.kcradle, args...)
	cmd.Env = w.env()
	var out, errs strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &errs
	cmd.WaitDelay = 10 * time.Second
	if err := cmd.Run(); err != nil && cmd.ProcessState == nil {
		t.Fatal(err)
	}
	if ctx.Err() != nil {
		t.Fatalf("kcradle %v does not end\n%s%s", args, &out, &errs)
	}
	return out.String(), errs.String(), cmd.ProcessState.ExitCode()
}

// must executes kcradle, which has to succeed.
func (w *world) must(t testing.TB, args ...string) string {
	t.Helper()
	stdout, stderr, code := w.run(t, args...)
	if code != 0 {
		t.Fatalf("kcradle %v: exit code %d\n%s%s", args, code, stdout, stderr)
	}
	return stdout
}

// summon makes a pod directory of the busybox image.
func (w *world) summon(t testing.TB, args ...string) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "pod")
	t.Cleanup(func() { w.run(t, "rm", "-f", dir) })
	w.must(t, append([]string{"summon", dir, "oci:" + w.images + "/busybox"}, args...)...)
	return dir
}

func TestVMScripts(t *testing.T) {
	w := theWorld(t)
	testscript.Run(t, testscript.Params{
		Dir: "testdata/vm",
		Setup: func(env *testscript.Env) error {
			env.Setenv("CRADLE_ROOT", w.root)
			env.Setenv("CRADLE_BOOT", w.boot)
			env.Setenv("TMPDIR", w.tmp)
			env.Setenv("BUSYBOX", "oci:"+w.images+"/busybox")
			env.Setenv("DEBIAN", "oci:"+w.images+"/debian")
			env.Defer(func() { w.endAll(t, env.WorkDir) })
			return nil
		},
		RequireExplicitExec: true,
	})
}

// endAll ends the pods that a script has left running.
func (w *world) endAll(t testing.TB, dir string) {
	filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err == nil && e.Name() == "launch.json" && filepath.Base(filepath.Dir(path)) != "run" {
			w.run(t, "kill", filepath.Dir(path))
		}
		return nil
	})
}
