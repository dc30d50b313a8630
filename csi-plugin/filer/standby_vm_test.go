//go:build vm

package main

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cradlestack/cradlestack/csi-plugin/dir"
	"github.com/cradlestack/cradlestack/csi-plugin/filer/api"
	"github.com/cradlestack/cradlestack/csi-plugin/volume"
)

// TestRootStandby: any filer of a set, or the address of the active one, is good for all that the active one does: by the socket of one that stands by, and from
// another host with the set's key; without that, for nothing. What is asked while the active one dies is
// done by the next.
func TestRootStandby(t *testing.T) {
	p := newPair(t, 3*time.Second)
	active, other := p.active()
	p.named(active)
	must := func(out string, err error) string {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	key := filepath.Join(p.pool, setState, "handles.key")
	remote := func(at string, args ...string) (string, error) {
		out, err := exec.Command("ip", append([]string{"netns", "exec", p.ns("cl"), p.programs["cradle-filer"], "--filer", at + ":" + api.PeersPort, "--filer-key", key}, args...)...).CombinedOutput()
		if err != nil {
			err = errors.Join(err, errors.New(string(out)))
		}
		return string(out), err
	}

	must(other.command("publish", "vol", "--client", "10.77.0.0/24", "--id", "by-standby"))
	must(other.command("grant", "vol", "--id", "me"))
	must(other.command("snapshot", "vol", "first"))
	must(other.command("rollback", "vol", "first"))
	must(other.command("diff", "vol", "first"))
	if out := must(active.command("publications")); !strings.Contains(out, "by-standby") {
		t.Errorf("the active filer has the publications\n%s", out)
	}
	if out := must(active.command("grants")); !strings.Contains(out, "me ") {
		t.Errorf("the active filer has the grants\n%s", out)
	}
	if out, err := other.command("publish", "absent", "--client", "10.77.0.0/24"); err == nil || !strings.Contains(err.Error(), "volume absent: not found") {
		t.Errorf("what the active filer refuses is told as %s, %v", out, err)
	}
	for _, at := range []string{active.address, other.address, serviceAddress} {
		if out := must(remote(at, "snapshots", "vol")); !strings.Contains(out, "first") {
			t.Errorf("asked at %s there are the snapshots\n%s", at, out)
		}
	}
	must(remote(other.address, "revoke", "me"))

	// Without the key, or with another one.
	wrong := filepath.Join(p.dir, "wrong.key")
	if err := os.WriteFile(wrong, make([]byte, 32), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{
		{p.programs["cradle-filer"], "publications", "--filer", active.address + ":" + api.PeersPort, "--filer-key", wrong},
		{"curl", "--silent", "--show-error", "--fail", "--insecure", "--max-time", "20", "https://" + active.address + ":" + api.PeersPort + "/publications"},
		{"curl", "--silent", "--show-error", "--fail", "--max-time", "20", "http://" + other.address + ":" + api.PeersPort + "/publications"},
	} {
		if out, err := exec.Command("ip", append([]string{"netns", "exec", p.ns("cl")}, args...)...).CombinedOutput(); err == nil || strings.Contains(string(out), "by-standby") {
			t.Errorf("%v is answered: %s", args, out)
		}
	}

	// The active one dies: who asks the other one then waits until that serves.
	p.signal(active.filer.Pid, unix.SIGKILL)
	must(other.command("publish", "vol", "--client", "10.77.0.1", "--id", "meanwhile"))
	if s, err := other.status(); err != nil || s.Set.Active != other.name {
		t.Errorf("then %+v is active, %v", s.Set, err)
	}
	p.named(other)
	active.again()
	_, other = p.active()
	// And switch, by the one that stands by.
	must(other.command("switch"))
	p.moved(other)
	p.named(other)
	_, other = p.active()
	must(other.command("unpublish", "meanwhile", "by-standby"))
	if out := must(other.command("publications", "-o", "json")); strings.TrimSpace(out) != "[]" {
		t.Errorf("at the end there are the publications %s", out)
	}
	b, err := dir.Open([]dir.Pool{{Name: "default", Path: p.pool}})
	if err == nil {
		err = errors.Join(b.DeleteSnapshot(t.Context(), volume.SnapshotID{Volume: "vol", Name: "first"}), b.Close())
	}
	if err != nil {
		t.Error(err)
	}
}
