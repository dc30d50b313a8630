//go:build vm

package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/hashicorp/nomad/api"

	"github.com/cradlestack/cradlestack/internal/locked"
	"github.com/cradlestack/cradlestack/internal/nomadjob"
	"github.com/cradlestack/cradlestack/internal/nomadtest"
)

// Whoever is killed in the middle of an apply, or of a destruction, has lost nothing and left nothing: the next one finishes it.
func TestTerraformKilled(t *testing.T) { testKilled(t, 4) }

// testKilled is that of n volumes and as many pods, beside one that an apply waits for as long as there is no room.
func testKilled(t *testing.T, n int) {
	c := openNomad(t)
	w := openWorkspace(t, c)
	w.write(many(n) + waits("running"))
	// made are volumes, jobs, and variables of these.
	made := func() (n int) {
		t.Helper()
		all, _, err := c.API.CSIVolumes().List(nil)
		if err != nil {
			t.Fatal(err)
		}
		jobs, _, err := c.API.Jobs().List(&api.QueryOptions{Prefix: "many-"})
		if err != nil {
			t.Fatal(err)
		}
		kept, _, err := c.API.Variables().PrefixList("nomad/jobs/many-", nil)
		if err != nil {
			t.Fatal(err)
		}
		return len(all) + len(jobs) + len(kept)
	}
	whole := 3*n + 1
	// kill runs terraform until so many are there, and kills it with its provider, or that alone. It says whether terraform was still at it.
	kill := func(alone bool, enough func(n int, said string) bool, args ...string) bool {
		t.Helper()
		var out locked.Buffer
		cmd := w.start(&out, append(args, "-auto-approve", "-no-color", "-lock=false", "-parallelism=20")...)
		ended := make(chan error, 1)
		go func() { ended <- cmd.Wait() }()
		for end := time.Now().Add(nomadtest.Patience); !enough(made(), out.String()); {
			select {
			case <-ended:
				return false
			case <-time.After(5 * time.Millisecond):
			}
			if time.Now().After(end) {
				t.Fatalf("terraform %s: nothing of it within %v\n%s", args[0], nomadtest.Patience, out.String())
			}
		}
		victim := -cmd.Process.Pid
		if alone {
			victim = providerOf(t, cmd.Process.Pid)
		}
		err := syscall.Kill(victim, syscall.SIGKILL)
		if err != nil && !errors.Is(err, syscall.ESRCH) {
			t.Fatal(err)
		}
		failed := <-ended != nil
		w.restore()
		t.Logf("terraform %s was killed when %d of %d were there", args[0], made(), whole)
		return err == nil && failed
	}
	if !kill(false, func(n int, _ string) bool { return n > 0 }, "apply") {
		t.Error("no apply was killed")
	}
	waiting := func(n int, said string) bool {
		return n > whole/2 && strings.Contains(said, "cradle_pod.waits: Creating...")
	}
	if !kill(true, waiting, "apply") {
		t.Error("no provider was killed in an apply")
	}
	w.write(many(n) + waits("none"))
	w.run("apply", "-auto-approve", "-no-color", "-lock=false", "-parallelism=20")
	w.unchanged("-lock=false")
	if n := made(); n != whole {
		t.Errorf("there are %d, want %d", n, whole)
	}
	// Nothing keeps a destruction from being quicker.
	kill(false, func(n int, _ string) bool { return n < whole }, "destroy")
	kill(true, func(n int, _ string) bool { return n < whole/2 }, "destroy")
	w.run("destroy", "-auto-approve", "-no-color", "-lock=false", "-parallelism=20")
	if n := made(); n != 0 {
		t.Errorf("%d are left", n)
	}
	// A destruction may meet that of a Terraform that was killed, with which Nomad goes on: this is what the later one is told.
	if err := c.API.CSIVolumes().DeleteOpts(&api.CSIVolumeDeleteRequest{ExternalVolumeID: "many-0"}, nil); !nomadjob.IsVolumeGone(err, "many-0") || nomadjob.IsVolumeGone(err, "many-1") {
		t.Errorf("of a volume that is gone Nomad says %v", err)
	}
	if entries, err := os.ReadDir(filepath.Join(c.Server().Dir, "volumes")); err != nil || len(entries) != 1 || entries[0].Name() != ".lock" {
		t.Errorf("left in the pool: %v, %v", entries, err)
	}
}

// restore does what docs/terraform.md says where a Terraform that was killed has left an empty state: it empties its file before it writes what is new.
func (w *workspace) restore() {
	w.t.Helper()
	path := filepath.Join(w.dir, "terraform.tfstate")
	if text, err := os.ReadFile(path); err != nil || json.Valid(text) {
		return
	}
	was, err := os.ReadFile(path + ".backup")
	if errors.Is(err, fs.ErrNotExist) { // there was none before: an apply takes over what is there
		return
	}
	if err != nil {
		w.t.Fatal(err)
	}
	if err := os.WriteFile(path, was, 0o600); err != nil {
		w.t.Fatal(err)
	}
	w.t.Log("Terraform was killed while it wrote its state: that of before is back")
}

// providerOf is the provider that a terraform has started, by its process group; noProcess when that has ended.
func providerOf(t *testing.T, group int) int {
	t.Helper()
	all, err := filepath.Glob("/proc/[0-9]*/stat")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range all {
		text, err := os.ReadFile(name)
		if err != nil {
			continue // it has ended
		}
		pid, rest, _ := strings.Cut(string(text), " ")
		i := strings.LastIndex(rest, ")")
		var state string
		var parent, in int
		if _, err := fmt.Sscan(rest[i+1:], &state, &parent, &in); err == nil && in == group && strings.HasPrefix(rest, "(terraform-provi") {
			n, err := strconv.Atoi(pid)
			if err != nil {
				t.Fatal(err)
			}
			return n
		}
	}
	return noProcess
}

// noProcess is nobody's number.
const noProcess = 1 << 30

// waits is a pod for which there is no room, with what an apply waits for.
func waits(until string) string {
	return `
resource "cradle_pod" "waits" {
  name     = "many-waits"
  memory   = "16TiB"
  wait_for = "` + until + `"
  container {
    name  = "main"
    image = "oci:/nowhere"
  }
}
`
}

// many are n volumes and n pods.
func many(n int) string {
	return fmt.Sprintf(`
provider "cradle" {}
resource "cradle_volume" "many" {
  count = %[1]d
  name  = "many-${count.index}"
  size  = "16MiB"
}
resource "cradle_pod" "many" {
  count    = %[1]d
  name     = "many-${count.index}"
  replicas = 0
  container {
    name  = "main"
    image = "oci:/nowhere"
    env   = { NUMBER = count.index }
  }
}
`, n)
}
