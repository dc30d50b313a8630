//go:build vm

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/cradlestack/cradlestack/csi-plugin/volume/volumetest"
	"github.com/cradlestack/cradlestack/internal/filertest"
	"github.com/cradlestack/cradlestack/internal/mountns"
)

// skips are csi-sanity's specs that do not concern us, by the message that they are skipped with, and why.
var skips = map[string]string{
	"ControllerPublishVolume not supported":                     "nothing is attached to a host before the host's own plugin does it",
	"ControllerUnpublishVolume not supported":                   "as above",
	"Controller Publish, UnpublishVolume not supported":         "as above",
	"Service does not have single node multi writer capability": "Nomad has no such access modes",
	"ControllerModifyVolume not supported":                      "Nomad does not call it",
	"Modify volume not supported":                               "as above",
	"Modify Volume not supported":                               "as above",
	"SNAPSHOT_ACCESSIBILITY_CONSTRAINTS not supported":          "of CSI 1.13; Nomad 1.11 speaks 1.12",
	"GroupControllerService not supported":                      "Nomad has no volume groups",
	"ControllerGetVolumeHealth not supported":                   "of CSI 1.13; Nomad 1.11 speaks 1.12",
	"ControllerListVolumeHealth not supported":                  "as above",
	"NodeGetVolumeHealth not supported":                         "as above",
	"NodeGetStorageHealth not supported":                        "as above",
}

func TestMain(m *testing.M) {
	mountns.Own()
	os.Exit(m.Run())
}

// TestRootSanity runs the whole of csi-sanity against the dir backend, once for each kind of volume that it has; TestRootSoakSanity for the names that lead to the same.
func TestRootSanity(t *testing.T) {
	eachSanity(t, map[string]string{"block": `class: lv2`, "xfs": "class: lv2\nfs: xfs", "files": `class: nfs`})
}

// TestRootSanityFiler runs it against volumes that a filer keeps, and that guests mount from there.
func TestRootSanityFiler(t *testing.T) {
	filer := filertest.Start(t)
	sanity(t, shortDir(t), pool{[]string{"--backend", "filer", "--filer", filer.Socket()}, func() []string { return volumetest.Left(t, filer.Pool) }}, "class: nfs\nattach: direct")
}

func eachSanity(t *testing.T, kinds map[string]string) {
	for name, parameters := range kinds {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := shortDir(t)
			sanity(t, dir, dirPool(t, dir), parameters)
		})
	}
}

// sanity runs csi-sanity against a plugin whose files are in dir, and which goes on.
func sanity(t *testing.T, dir string, pool pool, parameters string) (endpoint string) {
	file := func(name string) string { return filepath.Join(dir, name) }
	endpoint = serve(t, dir, pool)
	if err := os.WriteFile(file("parameters.yaml"), []byte(parameters+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	args := []string{
		"--csi.endpoint", endpoint, "--csi.mountdir", file("mnt"), "--csi.stagingdir", file("staging"),
		"--csi.testvolumesize", "314572800", "--csi.testvolumeexpandsize", "335544320",
		"--ginkgo.no-color", "--ginkgo.json-report", file("report.json"),
	}
	if parameters != "" {
		args = append(args, "--csi.testvolumeparameters", file("parameters.yaml"))
	}
	out, err := exec.CommandContext(t.Context(), tool(t, "csi-sanity"), args...).CombinedOutput()
	if err != nil {
		t.Errorf("csi-sanity: %v\n%s", err, out)
	}

	data, err := os.ReadFile(file("report.json"))
	if err != nil {
		t.Fatal(err)
	}
	var suites []struct {
		SpecReports []struct {
			LeafNodeText, State string
			Failure             struct{ Message string }
		}
	}
	if err := json.Unmarshal(data, &suites); err != nil {
		t.Fatal(err)
	}
	passed := 0
	for _, spec := range suites[0].SpecReports {
		switch spec.State {
		case "passed":
			passed++
		case "skipped":
			if _, ok := skips[spec.Failure.Message]; !ok {
				t.Errorf("%s: skipped (%s), and there is no reason in skips", spec.LeafNodeText, spec.Failure.Message)
			}
		}
	}
	if passed < 70 {
		t.Errorf("only %d specs passed", passed)
	}
	return endpoint
}

// A pool is a plugin's.
type pool struct {
	flags []string        // that choose it
	left  func() []string // what there is in it
}

// dirPool is a directory.
func dirPool(t *testing.T, dir string) pool {
	at := filepath.Join(dir, "pool")
	return pool{[]string{"--pool", at}, func() []string { return volumetest.Left(t, at) }}
}

// serve runs cradle-csi monolith until the test ends, and then looks for what it left.
func serve(t *testing.T, dir string, pool pool) (endpoint string) {
	t.Helper()
	endpoint = "unix://" + filepath.Join(dir, "csi.sock")
	ctx, cancel := context.WithCancel(context.Background())
	var stderr bytes.Buffer
	done := make(chan int)
	go func() {
		args := append([]string{"monolith", "--endpoint", endpoint, "--node-id", "host", "--zone", "zone", "--metrics", "127.0.0.1:0", "--verbose"}, pool.flags...)
		done <- run(ctx, args, os.Stdout, &stderr)
	}()
	t.Cleanup(func() {
		cancel()
		if code := <-done; code != 0 || t.Failed() {
			lines := strings.Split(stderr.String(), "\n")
			t.Errorf("cradle-csi: exit code %d\n%s", code, strings.Join(lines[max(0, len(lines)-40):], "\n"))
		}
		if left := pool.left(); len(left) > 0 {
			t.Errorf("left in the pool: %q", left)
		}
		for _, table := range []string{"/proc/self/mountinfo", "/sys/block/loop*/loop/backing_file"} {
			files, err := filepath.Glob(table)
			if err != nil {
				t.Error(err)
			}
			for _, name := range files {
				if data, err := os.ReadFile(name); err == nil && strings.Contains(string(data), dir) {
					t.Errorf("%s has something of %s:\n%s", name, dir, data)
				}
			}
		}
	})
	return endpoint
}

// shortDir is a directory whose path is short enough for a unix socket.
func shortDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "csi-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// tool is the path of a third-party program, which a machine has beside its tests.
func tool(t *testing.T, name string) string {
	t.Helper()
	if path, err := exec.LookPath("./" + name); err == nil {
		return path
	}
	var stderr bytes.Buffer
	cmd := exec.CommandContext(t.Context(), "../tools/build.sh", name)
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("tools/build.sh %s: %v\n%s", name, err, stderr.String())
	}
	lines := strings.Split(strings.TrimSpace(string(out)), "\n")
	return lines[len(lines)-1]
}
