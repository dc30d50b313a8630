//go:build vm

package driver

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/random"
	"github.com/hashicorp/nomad/plugins/drivers"
	"golang.org/x/sys/unix"

	"github.com/cradlestack/cradlestack/driver-cradle/image"
	"github.com/cradlestack/cradlestack/driver-cradle/pod"
	"github.com/cradlestack/cradlestack/internal/nomadtest"
)

// What a client that can't run pods says of itself.
func TestVMFingerprint(t *testing.T) {
	broken := t.TempDir()
	if err := os.WriteFile(filepath.Join(broken, "manifest.json"), []byte(`{"version": 1}`), 0o600); err != nil {
		t.Fatal(err)
	}
	noQEMU := t.TempDir()
	for name, test := range map[string]struct {
		edit func(*config)
		path string // PATH of the plugin; "": as it is
		want string // "": healthy
	}{
		"healthy":              {nil, "", ""},
		"no QEMU":              {nil, noQEMU, "apt-get install"},
		"no boot package":      {func(c *config) { c.BootPackage = filepath.Join(broken, "none") }, "", "none"},
		"broken boot package":  {func(c *config) { c.BootPackage = broken }, "", broken},
		"no KVM":               {func(c *config) { c.Accelerator = "kvm" }, "", "kvm"},
		"state_dir is a file":  {func(c *config) { c.StateDir = filepath.Join(broken, "manifest.json") }, "", "state_dir: "},
		"cache_dir is unusual": {func(c *config) { c.CacheDir = filepath.Join(broken, "manifest.json/x") }, "", "cache_dir: "},
	} {
		t.Run(name, func(t *testing.T) {
			if test.path != "" {
				t.Setenv("PATH", test.path)
			}
			c := newClient(t, test.edit)
			ctx, cancel := context.WithTimeout(t.Context(), nomadtest.Patience)
			defer cancel()
			ch, err := c.harness.Fingerprint(ctx)
			if err != nil {
				t.Fatal(err)
			}
			fp := <-ch
			if fp == nil {
				t.Fatal("there is no fingerprint")
			}
			if test.want == "" {
				if fp.Health != drivers.HealthStateHealthy {
					t.Errorf("it is %s: %s", fp.Health, fp.HealthDescription)
				}
				for _, a := range []string{"version", "accelerator", "accelerator.reason", "qemu.version", "boot.digest", "boot.variant", "volumes.enabled"} {
					if fp.Attributes["driver.cradle."+a] == nil {
						t.Errorf("attribute %s is missing: %v", a, fp.Attributes)
					}
				}
			} else if fp.Health != drivers.HealthStateUnhealthy || !strings.Contains(fp.HealthDescription, test.want) {
				t.Errorf("it is %s: %s; want %s", fp.Health, fp.HealthDescription, test.want)
			}
		})
	}
}

// A pod that Nomad does not recover is ended after a while; one that it does recover is not. What is no pod yet goes at once.
func TestVMOrphans(t *testing.T) {
	c := newClient(t, func(c *config) { c.GC = &gcConfig{OrphanDelay: "10s"} })
	forgotten, known := c.task("sleep 1000", nil), c.task("sleep 1000", nil)
	c.start(forgotten)
	handle := c.start(known)
	c.close()
	half := filepath.Join(c.state, tasksDir, "half")
	if err := os.MkdirAll(filepath.Join(half, podDir, "layers"), 0o711); err != nil {
		t.Fatal(err)
	}
	c.open(t)
	if err := c.harness.RecoverTask(handle); err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(c.state, tasksDir)
	eventually(t, func() string {
		left, _ := os.ReadDir(dir)
		var names []string
		for _, e := range left {
			names = append(names, e.Name())
		}
		return strings.Join(names, " ")
	}, func(s string) bool { return s == filepath.Base((&state{dir: c.state}).dirOf(known.ID, known.Name)) })
	if s, err := c.harness.InspectTask(known.ID); err != nil || s.State != drivers.TaskStateRunning {
		t.Errorf("the recovered task: %+v, %v", s, err)
	}
	if _, err := c.driver.InspectTask(forgotten.ID); !errors.Is(err, drivers.ErrTaskNotFound) {
		t.Errorf("the forgotten task: %v", err)
	}
}

// A client that is killed before it could note a task's start either starts it again, or has no use for it: the same plugin process has it, and ends it.
func TestVMForgotten(t *testing.T) {
	c := newClient(t, func(c *config) { c.GC = &gcConfig{OrphanDelay: "10s"} })
	if _, err := c.harness.Fingerprint(t.Context()); err != nil { // there is a client
		t.Fatal(err)
	}
	known, forgotten := c.task("sleep 1000", nil), c.task("sleep 1000", nil)
	c.start(known)
	end, err := c.harness.WaitTask(t.Context(), known.ID)
	if err != nil {
		t.Fatal(err)
	}
	c.start(forgotten)
	eventually(t, func() string {
		_, err := c.driver.InspectTask(forgotten.ID)
		return fmt.Sprint(err)
	}, func(s string) bool { return s == drivers.ErrTaskNotFound.Error() })
	select {
	case r := <-end:
		t.Errorf("the task that is waited for has ended: %+v", r)
	default:
	}

	again := *known
	again.ID = known.AllocID + "/main/2"
	c.start(&again)
	if r := <-end; r == nil || r.ExitCode != 137 {
		t.Errorf("the task that was started again: the first run has ended with %+v", r)
	}
	if _, err := c.driver.InspectTask(known.ID); !errors.Is(err, drivers.ErrTaskNotFound) {
		t.Errorf("the first run is still known: %v", err)
	}
	if s, err := c.harness.InspectTask(again.ID); err != nil || s.State != drivers.TaskStateRunning {
		t.Errorf("the second run: %+v, %v", s, err)
	}
}

// A handle of another boot of the host, of another plugin, or without anything on disk is no task that goes on.
func TestVMRecoverIsRefused(t *testing.T) {
	c := newClient(t, nil)
	task := c.task("sleep 1000", nil)
	h := c.start(task)
	c.close()
	c.open(t)
	for name, change := range map[string]struct {
		edit func(*handle)
		want string
	}{
		"reboot":  {func(h *handle) { h.BootID = "another" }, "the node was rebooted"},
		"dir":     {func(h *handle) { h.Dir = "/etc" }, "does not belong to state_dir"},
		"another": {func(h *handle) { h.Dir += "x" }, "does not belong to state_dir"},
	} {
		var state handle
		if err := h.GetDriverState(&state); err != nil {
			t.Fatal(err)
		}
		change.edit(&state)
		other := h.Copy()
		if err := other.SetDriverState(&state); err != nil {
			t.Fatal(err)
		}
		if err := c.harness.RecoverTask(other); err == nil || !strings.Contains(err.Error(), change.want) {
			t.Errorf("%s: %v; want %s", name, err, change.want)
		}
	}
	old := h.Copy()
	old.Version = 7
	if err := c.harness.RecoverTask(old); err == nil || !strings.Contains(err.Error(), "its handle has version 7") {
		t.Errorf("a handle of another version: %v", err)
	}
	if err := c.harness.RecoverTask(h); err != nil {
		t.Errorf("the handle as it was: %v", err)
	}
	if err := c.harness.RecoverTask(h); err != nil { // again
		t.Error(err)
	}
}

// aLayout makes an OCI layout of one image with a layer of random bytes.
func aLayout(t *testing.T, size int64) string {
	t.Helper()
	layer, err := random.Layer(size, "application/vnd.oci.image.layer.v1.tar+gzip")
	if err != nil {
		t.Fatal(err)
	}
	img, err := mutate.AppendLayers(busybox(t), layer)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	if _, err := layout.Write(dir, mutate.AppendManifests(empty.Index, mutate.IndexAddendum{Add: img})); err != nil {
		t.Fatal(err)
	}
	return dir
}

// Images go that were not used for a while, or that take too much; those of pods stay.
func TestVMImageGC(t *testing.T) {
	for name, gc := range map[string]*gcConfig{
		"delay": {ImageDelay: "1s"},
		"size":  {ImageSize: "3MiB"},
		"off":   {Image: new(bool), ImageDelay: "1s"},
	} {
		t.Run(name, func(t *testing.T) {
			c := newClient(t, func(c *config) { c.GC = gc })
			images := func() string { return imagesIn(t, shared.cache) }
			stays := c.task("sleep 1000", nil)
			c.start(stays)
			other := aLayout(t, 4<<20)
			ends := c.task("true", func(_ *drivers.TaskConfig, cfg *taskConfig) { cfg.Image = "oci:" + other })
			c.start(ends)
			c.wait(ends)
			if err := c.harness.DestroyTask(ends.ID, false); err != nil {
				t.Fatal(err)
			}
			if name == "off" {
				time.Sleep(3 * time.Second)
				if got := images(); !strings.Contains(got, other) {
					t.Errorf("there is only %s", got)
				}
				return
			}
			if name == "size" { // it is looked at rarely
				config, state, err := c.driver.open()
				if err != nil {
					t.Fatal(err)
				}
				c.driver.collect(config, state)
			}
			eventually(t, images, func(s string) bool { return strings.Contains(s, "busybox") && !strings.Contains(s, other) })
		})
	}
}

// imagesIn are the images in a cache.
func imagesIn(t *testing.T, cache string) string {
	t.Helper()
	store, err := image.Open(cache)
	if err != nil {
		t.Fatal(err)
	}
	list, err := store.List()
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, i := range list {
		names = append(names, i.Reference)
	}
	return strings.Join(names, " ")
}

// A machine's user is one of those that the operator has set aside.
func TestVMQEMUUser(t *testing.T) {
	const first = 1_000_000
	c := newClient(t, func(c *config) { c.QEMUUID = fmt.Sprint(first) })
	task := c.task("sleep 1000", nil)
	c.start(task)
	running, err := c.driver.task(task.ID)
	if err != nil {
		t.Fatal(err)
	}
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", running.running.Info().PID))
	if err != nil {
		t.Fatal(err)
	}
	for _, id := range []string{"\nUid:", "\nGid:"} {
		_, text, _ := strings.Cut(string(status), id)
		n := 0
		if _, err := fmt.Sscan(text, &n); err != nil || n < first || n >= first+1<<16 {
			t.Errorf("it runs with %s %d, %v", strings.TrimSpace(id), n, err)
		}
	}
}

// Scratch disks have the size that the operator names where the task names none, and ended pods stay for looking at them until the plugin starts anew.
func TestVMDefaultDiskAndContainerGC(t *testing.T) {
	c := newClient(t, func(c *config) { c.DefaultDisk, c.GC = "64MiB", &gcConfig{Container: new(bool)} })
	task := c.task("df -m / | awk 'END {print ($2 < 64)}'", nil)
	c.start(task)
	c.wait(task)
	c.logs(task, "stdout", "1\n")
	if err := c.harness.DestroyTask(task.ID, false); err != nil {
		t.Fatal(err)
	}
	dir := (&state{dir: c.state}).dirOf(task.ID, task.Name)
	if _, err := pod.Open(filepath.Join(dir, podDir), nil); err != nil {
		t.Errorf("the pod of a task that is gone: %v", err)
	}
	c.close()
	c.open(t)
	if _, _, err := c.driver.open(); err != nil {
		t.Fatal(err)
	}
	eventually(t, func() string {
		_, err := os.Stat(dir)
		return fmt.Sprint(err)
	}, func(s string) bool { return strings.Contains(s, "no such file") })
}

// A cache that is full is a reason, and leaves nothing half done.
func TestVMDiskFull(t *testing.T) {
	cache := t.TempDir()
	if err := unix.Mount("cache", cache, "tmpfs", 0, "size=8m"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(cache, 0); err != nil {
			t.Error(err)
		}
	})
	c := newClient(t, func(c *config) { c.CacheDir = cache })
	large := aLayout(t, 16<<20)
	task := c.task("true", func(_ *drivers.TaskConfig, cfg *taskConfig) { cfg.Image = "oci:" + large })
	_, _, err := c.harness.StartTask(task)
	if err == nil || !strings.Contains(err.Error(), "no space at ") || !strings.Contains(err.Error(), "free some") {
		t.Errorf("a pull into a full cache: %v", err)
	}
}
