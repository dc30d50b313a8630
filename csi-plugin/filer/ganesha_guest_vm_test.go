//go:build vm

package main

import (
	"os"
	"path/filepath"
	"strings"
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
	wait := func(name string) { t.Helper(); awaitFile(t, f, host, name) }
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

// TestVMGaneshaRollback: a pod that has files open and one locked goes on with them when the volume is rolled back under it, and sees what they were; another volume's
// pod sees nothing but a pause.
func TestVMGaneshaRollback(t *testing.T) {
	f := filertest.Start(t, "--engine", "ganesha")
	host := f.Volume("v", 64<<20, nil)
	f.Volume("w", 64<<20, nil)
	p, q := f.Publish("v"), f.Publish("w")
	p.Options += ",actimeo=1"
	wait := func(name string) { t.Helper(); awaitFile(t, f, host, name) }
	// What a descriptor reads twice is read from the server, as is what it has written.
	pod := startImage(t, "debian", `cd /v; echo first >file; mkdir d; echo a >d/a; exec 4<file 9>lock; flock 9 || echo no lock; touch ready
		until [ -e taken ]; do sleep 0.2; done
		echo second >file; rm -r d; mkdir d; echo b >d/b; echo new >new; sync; exec 8>/w/log; touch changed; i=0
		while [ -e changed ]; do i=$((i+1)); echo $i >&8 || echo lost; sleep 0.2; done
		cat file d/a; cat <&4; ls -A | tr '\n' ' '; ls d; (exec 9<&-; exec 7>lock; flock -n 7 && echo stolen || echo kept); echo third >file && cat file; [ "$(wc -l </w/log)" = $i ] || echo missing`,
		"--mount", p.Mount("/v"), "--mount", q.Mount("/w"))
	wait("ready")
	f.Must("snapshot", "v", "s")
	if err := os.WriteFile(filepath.Join(host, "taken"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	wait("changed")
	f.Must("rollback", "v", "s")
	pod.says("first\na\nfirst\nd file lock ready a\nkept\nthird\n")
	f.Must("unpublish", p.ID)
	for _, s := range snapshotsOf(t, f, "v") {
		removeSnapshot(t, f, "v", s.Name)
	}
}

// awaitFile waits until a pod has made a file in a volume, which is a directory here.
func awaitFile(t *testing.T, f *filertest.Filer, volume, name string) {
	t.Helper()
	for end := time.Now().Add(5 * time.Minute); ; time.Sleep(50 * time.Millisecond) {
		if _, err := os.Stat(filepath.Join(volume, name)); err == nil {
			return
		} else if time.Now().After(end) {
			t.Fatalf("no pod makes %s\n%s", name, f.Log())
		}
	}
}

// TestVMGaneshaSnapshots: a pod looks into snapshots of its volume, old and new ones, and has a file of one open while NFS-Ganesha and the filer are killed. It changes
// nothing in them.
func TestVMGaneshaSnapshots(t *testing.T) {
	f := filertest.Start(t, "--engine", "ganesha")
	host := f.Volume("v", 64<<20, nil)
	p := f.Publish("v")
	p.Options += ",actimeo=1"
	pod := startImage(t, "debian", `cd /v; echo first >file; mkdir d; echo a >d/a; touch ready
		until [ -e taken ]; do sleep 0.2; done
		echo second >file; rm -r d; echo new >new; ls -A | tr '\n' ' '; ls .snapshots; cat .snapshots/s/file .snapshots/s/d/a
		(cd .snapshots/s/d/../../..; ls -A | tr '\n' ' '); diff -q file .snapshots/s/file; cp -a .snapshots/s/d back; cat back/a; find . -name a
		touch .snapshots/s/x 2>/dev/null || echo read-only; mkdir .snapshots/x 2>/dev/null || echo read-only; rmdir .snapshots 2>/dev/null || echo stays; mkdir .snapshots 2>/dev/null || echo is there
		exec 4<.snapshots/s/file; : >changed; while [ -e changed ]; do sleep 0.2; done
		cat <&4; ls .snapshots | tr '\n' ' '; cat .snapshots/s/file .snapshots/t/file; : >seen; while [ -e seen ]; do sleep 0.2; done; ls .snapshots`,
		"--mount", p.Mount("/v"))
	awaitFile(t, f, host, "ready")
	f.Must("snapshot", "v", "s")
	if err := os.WriteFile(filepath.Join(host, "taken"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	awaitFile(t, f, host, "changed")
	syscall.Kill(ganeshas(t, f)[0], syscall.SIGKILL)
	f.Must("snapshot", "v", "t")
	f.Signal(syscall.SIGKILL)
	f.Run()
	if err := os.Remove(filepath.Join(host, "changed")); err != nil {
		t.Fatal(err)
	}
	awaitFile(t, f, host, "seen")
	removeSnapshot(t, f, "v", "s")
	if err := os.Remove(filepath.Join(host, "seen")); err != nil {
		t.Fatal(err)
	}
	pod.says(`file new ready taken s
first
a
file new ready taken Files file and .snapshots/s/file differ
a
./back/a
read-only
read-only
stays
is there
first
s t first
second
t
`)
	f.Must("unpublish", p.ID)
	if table, err := os.ReadFile("/proc/self/mounts"); err != nil || strings.Contains(string(table), "filer:snapshot") {
		t.Errorf("a snapshot is left mounted: %v\n%s", err, table)
	}
	removeSnapshot(t, f, "v", "t")
}
