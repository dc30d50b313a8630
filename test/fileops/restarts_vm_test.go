//go:build vm

package main

import (
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/cradlestack/cradlestack/internal/filertest"
	"github.com/cradlestack/cradlestack/internal/locked"
)

// TestVMFilerRestarts: the filer ends and begins again all the time, and random operations on it give the same answers and bytes as ever. It ends as
// a service is stopped: a killed one may have done what it has not answered, and version 3 of NFS can't tell that from what was never asked.
func TestVMFilerRestarts(t *testing.T) {
	kcradle, dir, image := prepare(t)
	filer := filertest.Start(t)
	filer.Volume("files", 64<<20, nil)
	pod := filepath.Join(dir, "pod")
	command := func(args ...string) *exec.Cmd { return exec.CommandContext(t.Context(), kcradle, args...) }
	check := fmt.Sprintf("mkdir -p /v/d && echo begun && exec /bin/fileops check -workers 3 -ops 160 -for 20s -without %s /v/d /reference", "unlinkedlinks,linktimes,reasons")
	if out, err := command("summon", pod, "oci:"+image, "--privileged", "-m", "256m", "--tmpfs", "/reference:size=150m",
		"--mount", filer.Publish("files").Mount("/v"), "--", "sh", "-c", check).CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	t.Cleanup(func() { exec.Command(kcradle, "rm", "-f", pod).Run() })
	var said locked.Buffer
	run := command("run", pod)
	run.Stdout, run.Stderr = &said, &said
	if err := run.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- run.Wait() }()
	// Not before the volume is mounted: a server that is not there then fails the pod's start.
	for !strings.Contains(said.String(), "begun") {
		select {
		case err := <-ended:
			t.Fatalf("%v\n%s", err, said.String())
		case <-time.After(10 * time.Millisecond):
		}
	}
	next := time.After(0)
	for restarts := 0; ; {
		select {
		case err := <-ended:
			if err != nil || restarts < 3 {
				t.Errorf("after %d restarts: %v\n%s", restarts, err, said.String())
			}
			t.Logf("%d restarts: %s", restarts, said.String())
			return
		case <-next:
			filer.Signal(syscall.SIGTERM)
			filer.Run()
			if restarts++; restarts < 7 { // a client that was refused waits for seconds
				next = time.After(2 * time.Second)
			}
		}
	}
}
