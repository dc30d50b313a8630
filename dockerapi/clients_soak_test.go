//go:build vm && soak

package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cradlestack/cradlestack/internal/nomadjob"
	"github.com/cradlestack/cradlestack/internal/nomadtest"
)

// Slack of the server's memory and goroutines: what a garbage collector and idle connections make of one and the same state.
const (
	memorySlack    = 32 << 20
	goroutineSlack = 20
)

func TestVMSoakFiftyClients(t *testing.T) { clients(t, 50, 5*time.Minute) }

// clients run containers, execute in them, read their logs and remove them, all at once, each time another one, until it is enough. The server needs no more
// memory at the end than after a third of the time, and has as many goroutines as before.
func clients(t *testing.T, n int, enough time.Duration) {
	c := openCluster(t)
	h := openHostOn(t, c, "--pods", filepath.Join(c.Server().Dir, "cradle"))
	goroutines := func() int {
		got, err := strconv.Atoi(h.run("info", "-f", "{{.NGoroutines}}"))
		if err != nil {
			t.Fatal(err)
		}
		return got
	}
	h.want("", "run", "--rm", "busybox", "true") // the template is made, and the watch of the namespace runs
	before := goroutines()
	ctx, cancel := context.WithTimeout(t.Context(), enough)
	defer cancel()
	var all sync.WaitGroup
	var rounds atomic.Int64
	for i := range n {
		all.Go(func() {
			for round := 0; round == 0 || ctx.Err() == nil; round++ {
				if err := h.oneRound(fmt.Sprintf("client%d-%d", i, round)); err != nil {
					t.Error(err)
					cancel()
					return
				}
				rounds.Add(1)
			}
		})
	}
	var third int64
	select {
	case <-time.After(enough / 3):
		third = h.memory()
	case <-ctx.Done():
	}
	all.Wait()
	if t.Failed() {
		return
	}
	h.want("", "ps", "-aq")
	if end := h.memory(); end > third+memorySlack {
		t.Errorf("the server's memory has grown from %d MiB after a third of the time to %d MiB", third>>20, end>>20)
	}
	h.until("the goroutines to be as many as before", func() bool { return goroutines() <= before+goroutineSlack })
	t.Logf("%d clients, %d containers, no error; the server's memory: %d MiB after a third, %d MiB at the end", n, rounds.Load(), third>>20, h.memory()>>20)
}

// A server is killed while a pod looks at a stopped container's disk for it. The next one ends that pod, though nobody asks it for anything.
func TestVMSoakAttendantLeft(t *testing.T) {
	h := openHost(t)
	id := h.run("run", "-d", "--name", "looked", "busybox", "sh", "-c", "echo written >/file")
	h.want("0", "wait", "looked")
	file := filepath.Join(t.TempDir(), "file")
	h.run("cp", "looked:/file", file)
	h.kill()
	h.serve()
	h.until("the end of the pod that has looked at its disk", func() bool {
		all, _, err := h.c.API.Jobs().Allocations("docker-at-"+id, true, nil)
		if err != nil {
			t.Fatal(err)
		}
		for _, a := range all {
			if !nomadtest.Ended(a) {
				return false
			}
		}
		return true
	})
	h.run("cp", "looked:/file", file)
	h.run("start", "looked")
	h.want("0", "wait", "looked")
}

// A server is killed while it removes a container whose volume another one inherits. The next one goes on, unasked, and the other one has what was on it.
func TestVMSoakHandedOverKilled(t *testing.T) {
	h := openHost(t)
	h.run("run", "-d", "--name", "old", "-v", "/data", "busybox", "sh", "-c", "echo kept >/data/file; sync; exec sleep 10000")
	h.until("old to have written", func() bool { out, _ := h.try("", "exec", "old", "cat", "/data/file"); return out == "kept\n" })
	h.run("create", "--name", "heir", "-v", h.run("inspect", "-f", "{{range .Mounts}}{{.Name}}{{end}}", "old")+":/data", "busybox", "sh", "-c", "cat /data/file; exec sleep 10000")
	heir := h.run("inspect", "-f", "{{.Id}}", "heir")
	rm := h.command(t.Context(), "rm", "-f", "old")
	if err := rm.Start(); err != nil {
		t.Fatal(err)
	}
	h.until("heir's disk to be looked at", func() bool {
		all, _, err := h.c.API.Jobs().Allocations("docker-at-"+heir, true, nil)
		return err == nil && len(all) > 0
	})
	h.kill()
	rm.Wait()
	h.serve()
	h.until("old to be gone", func() bool { return h.run("ps", "-aq", "--filter", "name=old") == "" })
	h.run("start", "heir")
	h.untilSaid("kept", "heir")
}

// A disk that is in use for longer than a pod takes to end, as that of a node which is back and has started its pod once more, is removed when it is free.
func TestVMSoakDiskInUse(t *testing.T) {
	h := openHost(t)
	id := h.run("run", "-d", "--name", "uses", "busybox", "sleep", "10000")
	kept := filepath.Join(h.c.Server().Dir, "cradle", "disks", h.space, id)
	if _, err := os.Stat(kept); err != nil {
		t.Fatal(err)
	}
	nodes, _, err := h.c.API.Nodes().List(nil)
	if err != nil || len(nodes) != 1 {
		t.Fatalf("%d nodes, %v", len(nodes), err)
	}
	job := nomadjob.RemoveDisk("removes", h.space, nodes[0].ID, id)
	if _, _, err := h.c.API.Jobs().Register(job, nil); err != nil {
		t.Fatal(err)
	}
	h.until("Nomad to have tried it often", func() bool {
		all, _, err := h.c.API.Jobs().Allocations("removes", true, nil)
		if err != nil {
			t.Fatal(err)
		}
		for _, a := range all {
			if nomadtest.Ended(a) {
				t.Fatalf("the job that removes the disk has ended while that is in use: %s %+v", a.ClientStatus, a.TaskStates)
			}
			if s := a.TaskStates["remove"]; s != nil && s.Restarts > 11 {
				return true
			}
		}
		return false
	})
	h.want("true", "inspect", "-f", "{{.State.Running}}", "uses")
	h.run("kill", "uses")
	h.until("the disk to be removed", func() bool { _, err := os.Stat(kept); return errors.Is(err, fs.ErrNotExist) })
	if _, _, err := h.c.API.Jobs().Deregister("removes", true, nil); err != nil {
		t.Fatal(err)
	}
}

// oneRound is a container from run to rm.
func (h *host) oneRound(name string) error {
	for _, step := range []struct {
		args []string
		want string // of the output; "" for any
	}{
		{[]string{"run", "-d", "--name", name, "--memory", "64m", "busybox", "sh", "-c", "echo " + name + "; exec sleep 100000"}, ""},
		{[]string{"exec", name, "echo", "in " + name}, "in " + name + "\n"},
		{[]string{"logs", name}, name + "\n"},
		{[]string{"rm", "-f", name}, name + "\n"},
	} {
		out, err := h.try("", step.args...)
		for begin := time.Now(); err == nil && out == "" && step.args[0] == "logs" && time.Since(begin) < nomadtest.Patience; { // it is about to write
			out, err = h.try("", step.args...)
		}
		if err != nil {
			return err
		}
		if step.want != "" && out != step.want {
			return fmt.Errorf("docker %s: %q, want %q", strings.Join(step.args, " "), out, step.want)
		}
	}
	return nil
}

// memory is the resident one of the server.
func (h *host) memory() int64 {
	h.t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", h.cmd.Process.Pid))
	if err != nil {
		h.t.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		if rest, ok := strings.CutPrefix(line, "VmRSS:"); ok {
			kb, err := strconv.ParseInt(strings.Fields(rest)[0], 10, 64)
			if err != nil {
				h.t.Fatal(err)
			}
			return kb << 10
		}
	}
	h.t.Fatal("the server has no memory")
	return 0
}
