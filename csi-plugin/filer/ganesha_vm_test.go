//go:build vm

package main

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cradlestack/cradlestack/internal/filertest"
)

// at is what libnfs calls a file of a publication, by version 4.0.
func at(p filertest.Publication, path string) string {
	host, port, _ := net.SplitHostPort(p.Address)
	return fmt.Sprintf("nfs://%s%s%s?nfsport=%s&version=4&auto-traverse-mounts=0", host, p.Export, path, port)
}

func libnfs(program string, args ...string) (string, error) {
	out, err := exec.Command(program, args...).CombinedOutput()
	return string(out), err
}

// ganeshas are the processes of NFS-Ganesha that a filer has started.
func ganeshas(t *testing.T, f *filertest.Filer) (pids []int) {
	t.Helper()
	lists, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/[0-9]*/children", f.PID()))
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range lists {
		list, _ := os.ReadFile(path)
		for _, field := range strings.Fields(string(list)) {
			if name, _ := os.ReadFile("/proc/" + field + "/comm"); string(name) == "ganesha.nfsd\n" {
				var pid int
				fmt.Sscan(field, &pid)
				pids = append(pids, pid)
			}
		}
	}
	return pids
}

// TestRootGanesha: with NFS-Ganesha volumes are there for whom they are published, as they are published, while the filer and NFS-Ganesha are killed, and not any more
// once that has ended.
func TestRootGanesha(t *testing.T) {
	f := filertest.Start(t, "--engine", "ganesha")
	host := f.Volume("v", 64<<20, nil)
	onHost := f.Volume("w", 320<<20, map[string]string{"fs": "xfs"})
	f.Volume("d", 0, nil)
	local := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(local, []byte("content"), 0o600); err != nil {
		t.Fatal(err)
	}
	// Listing needs no opening, which the clients before would have to claim first.
	sees := func(p filertest.Publication, size ...int) {
		t.Helper()
		want := fmt.Sprintf(" %d file\n", append(size, len("content"))[0])
		var out string
		var err error
		for end := time.Now().Add(time.Minute); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
			if out, err = libnfs("nfs-ls", at(p, "/")); err == nil {
				break
			}
		}
		if err != nil || !strings.Contains(out, want) {
			t.Errorf("%s has %s, %v", p.ID, out, err)
		}
	}
	put := func(p filertest.Publication, path, refusal string) {
		t.Helper()
		if out, err := libnfs("nfs-cp", local, at(p, path)); refusal == "" && err != nil || refusal != "" && !strings.Contains(out, refusal) {
			t.Errorf("writing %s of %s: %s, %v; want %q", path, p.ID, out, err, refusal)
		}
	}
	rw := f.Publish("v")
	ro := f.Publish("v", "--read-only", "--id", "ro")
	if err := unix.Unmount(onHost, 0); err != nil { // which has it without
		t.Fatal(err)
	}
	w := f.Publish("w")
	if table, err := os.ReadFile("/proc/self/mounts"); err != nil || !strings.Contains(string(table), "/volumes/w xfs rw,dirsync,") {
		t.Errorf("w is mounted without dirsync: %v\n%s", err, table)
	}
	put(rw, "/file", "")
	put(w, "/file", "")
	d := f.Publish("d") // a directory of the pool's file system
	put(d, "/file", "")
	if out, err := libnfs("nfs-cat", at(ro, "/file")); err != nil || out != "content" {
		t.Errorf("the file has %q, %v", out, err)
	}
	put(ro, "/other", "ROFS")
	// What changes otherwise is seen at once.
	f.Must("snapshot", "v", "s")
	for i := range 3 {
		if err := os.WriteFile(filepath.Join(host, "file"), make([]byte, 100+i), 0o600); err != nil {
			t.Fatal(err)
		}
		sees(ro, 100+i)
	}
	f.Must("rollback", "v", "s")
	sees(ro)
	removeSnapshot(t, f, "v", "s")
	// Whom it is not published to sees none of it.
	f.Must("publish", "w", "--id", "elsewhere", "--client", "10.255.255.255")
	list, err := libnfs("nfs-ls", strings.Replace(at(rw, "/"), rw.Export, "", 1))
	if err != nil || strings.Count(list, "\n") != 4 {
		t.Errorf("the root has %s, %v", list, err)
	}
	sees(d)
	former := ganeshas(t, f)
	for _, s := range []os.Signal{syscall.SIGTERM, syscall.SIGKILL} {
		f.Signal(s)
		f.Run()
		sees(ro)
		sees(w)
	}
	for range 3 {
		pids := ganeshas(t, f)
		if len(pids) != 1 {
			t.Fatalf("there are the processes %v of NFS-Ganesha", pids)
		}
		former = append(former, pids[0])
		syscall.Kill(pids[0], syscall.SIGKILL)
		sees(rw)
	}
	for _, pid := range former {
		if syscall.Kill(pid, 0) == nil {
			t.Errorf("process %d is left", pid)
		}
	}
	if out := f.Must("status"); !strings.Contains(out, "engine   ganesha") {
		t.Errorf("status: %s", out)
	}
	f.Must("unpublish", rw.ID)
	if out, err := libnfs("nfs-ls", at(rw, "/")); err == nil {
		t.Errorf("after the end there is %q", out)
	}
	sees(ro)
	f.Must("unpublish", ro.ID)
}
