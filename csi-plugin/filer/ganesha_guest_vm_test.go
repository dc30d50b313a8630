//go:build vm

package main

import (
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/cradlestack/cradlestack/internal/filertest"
)

// TestVMGaneshaLocks: what a pod has locked another one can't, which has the same address and name, while the filer and NFS-Ganesha are killed; and it can once that is
// given back.
func TestVMGaneshaLocks(t *testing.T) {
	f := filertest.Start(t, "--engine", "ganesha")
	host := f.Volume("v", 64<<20, nil)
	p := f.Publish("v")
	p.Options += ",actimeo=1"
	wait := func(name string) {
		t.Helper()
		for end := time.Now().Add(5 * time.Minute); ; time.Sleep(50 * time.Millisecond) {
			if _, err := os.Stat(filepath.Join(host, name)); err == nil {
				return
			} else if time.Now().After(end) {
				t.Fatalf("the pods make no %s\n%s", name, f.Log())
			}
		}
	}
	put := func(name string) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(host, name), nil, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	const try = `flock -n 9 && { echo free; flock -u 9; } || echo taken; `
	// The image has flock.
	one := startImage(t, "debian", `cd /v; exec 9>lock 8>log; flock 9 || exit 1; touch held; until [ -e release ]; do echo line >&8 || echo lost; sleep 0.2; done; flock -u 9 && echo given back; grep -vc line log; true`,
		"--mount", p.Mount("/v"))
	wait("held")
	two := startImage(t, "debian", `cd /v; exec 9>lock; `+try+`touch first; until [ -e killed ]; do sleep 0.2; done; `+try+`touch second; flock 9 && echo free`, "--mount", p.Mount("/v"))
	wait("first")
	f.Signal(syscall.SIGKILL)
	f.Run()
	pids := ganeshas(t, f)
	if len(pids) != 1 {
		t.Fatalf("there are the processes %v of NFS-Ganesha", pids)
	}
	time.Sleep(time.Second)
	syscall.Kill(pids[0], syscall.SIGKILL)
	put("killed")
	wait("second")
	put("release")
	one.says("given back\n0\n")
	two.says("taken\ntaken\nfree\n")
}
