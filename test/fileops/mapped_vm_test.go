//go:build vm

package main

import (
	"bytes"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/cradlestack/cradlestack/internal/filertest"
)

// TestVMFilerMappings: what is written through a shared mapping of a file is there for another mapping, for who reads, for another mount of the same volume that has
// a cache of its own, as another pod has, and for this host.
func TestVMFilerMappings(t *testing.T) {
	kcradle, dir, image := prepare(t)
	want := func(seed string) string {
		t.Helper()
		sum, err := mapFile(filepath.Join(dir, seed), seed)
		if err != nil {
			t.Fatal(err)
		}
		return sum + "\n"
	}
	for _, engine := range []string{"embedded", "ganesha"} {
		t.Run(engine, func(t *testing.T) {
			f := filertest.Start(t, "--engine", engine)
			host := f.Volume("v", 16<<20, nil)
			p := f.Publish("v")
			p.Options += ",nosharecache"
			pod := filepath.Join(t.TempDir(), "pod")
			t.Cleanup(func() { exec.Command(kcradle, "rm", "-f", pod).Run() })
			const script = `set -e; fileops map /v/f first; fileops map /v/f; fileops map /w/f; fileops map /w/f second; fileops map /v/f; exec 3</w/f; fileops map /v/f third; fileops map /w/f`
			if out, err := exec.CommandContext(t.Context(), kcradle, "summon", pod, "oci:"+image, "-m", "128m", "--mount", p.Mount("/v"), "--mount", p.Mount("/w"), "--", "sh", "-c", script).CombinedOutput(); err != nil {
				t.Fatalf("kcradle summon: %v\n%s", err, out)
			}
			var stdout, stderr bytes.Buffer
			run := exec.CommandContext(t.Context(), kcradle, "run", pod)
			run.Stdout, run.Stderr = &stdout, &stderr
			all := strings.Repeat(want("first"), 3) + strings.Repeat(want("second"), 2) + strings.Repeat(want("third"), 2)
			if err := run.Run(); err != nil || stdout.String() != all {
				t.Errorf("the pod says (%v)\n%s%s\nand should\n%s", err, &stdout, &stderr, all)
			}
			if sum, err := mapFile(filepath.Join(host, "f"), ""); err != nil || sum+"\n" != want("third") {
				t.Errorf("on this host it is %s, %v", sum, err)
			}
		})
	}
}
