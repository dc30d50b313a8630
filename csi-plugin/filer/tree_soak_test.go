//go:build vm && soak

package main

import (
	"crypto/sha256"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/cradlestack/cradlestack/internal/filertest"
	"github.com/cradlestack/cradlestack/test/programs"
)

// treeScript has all that git and go write on the volume, and says what git finds wrong, and the program's digest.
const treeScript = `set -e; cd /v; export HOME=/tmp PATH=%s/bin:$PATH
git clone -q file:///source tree; cd tree; git fsck --full --no-progress; git status --porcelain
go build -o ../program ./test/fileops
git checkout -q HEAD~3; git checkout -q -; git repack -a -d -q; git fsck --full --no-progress; git status --porcelain; sha256sum <../program`

// TestVMSoakTree: git clones this repository to a volume that the guest's kernel has mounted, by each engine, and go builds a program of it there. Nothing of it is other
// than it should be, and the program is the one that is built on this host. The standard library's packages are compiled beforehand, by this host: guests that are
// emulated take long for that.
func TestVMSoakTree(t *testing.T) {
	root, err := programs.Root()
	if err != nil {
		t.Fatal(err)
	}
	env := []string{"CGO_ENABLED=0", "GOFLAGS=-trimpath -buildvcs=false", "GOPROXY=off", "GOTOOLCHAIN=local", "GOWORK=off"}
	do := func(dir string, env []string, name string, args ...string) string {
		t.Helper()
		cmd := exec.CommandContext(t.Context(), name, args...)
		cmd.Dir, cmd.Env = dir, append(os.Environ(), env...)
		var stderr strings.Builder
		cmd.Stderr = &stderr
		out, err := cmd.Output()
		if err != nil {
			t.Fatalf("%s: %v\n%s", cmd, err, &stderr)
		}
		return strings.TrimSpace(string(out))
	}
	work := t.TempDir()
	source, local, program := filepath.Join(work, "source"), filepath.Join(work, "local"), filepath.Join(work, "program")
	do(root, nil, "git", "clone", "-q", "--bare", "--no-local", root, source)
	do(root, nil, "git", "clone", "-q", source, local)
	do(local, env, "go", "build", "-o", program, "./test/fileops")
	built, err := os.ReadFile(program)
	if err != nil {
		t.Fatal(err)
	}
	standard := strings.Fields(do(local, env, "go", "list", "-deps", "-f", "{{if .Standard}}{{.ImportPath}}{{end}}", "./test/fileops"))
	goroot, modules := do(root, nil, "go", "env", "GOROOT"), do(root, nil, "go", "env", "GOMODCACHE")
	flags := []string{"-m", "1g", "-v", "/usr:/usr:ro", "-v", modules + ":/modules:ro", "-v", source + ":/source:ro"} // /usr has git
	if !strings.HasPrefix(goroot, "/usr/") {
		flags = append(flags, "-v", goroot+":"+goroot+":ro")
	}
	for _, e := range append(env, "GOCACHE=/v/cache", "GOMODCACHE=/modules") {
		flags = append(flags, "-e", e)
	}
	for _, engine := range []string{embedded, byGanesha} {
		t.Run(engine, func(t *testing.T) {
			f := filertest.Start(t, "--engine", engine)
			host := f.Volume("v", 2<<30, nil)
			do(local, append(env, "GOCACHE="+filepath.Join(host, "cache")), "go", append([]string{"build"}, standard...)...)
			pod := startImage(t, "debian", fmt.Sprintf(treeScript, goroot), append(flags, "--mount", f.Publish("v").Mount("/v"))...)
			pod.says(fmt.Sprintf("%x  -\n", sha256.Sum256(built)))
		})
	}
}
