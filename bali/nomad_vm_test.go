//go:build vm

package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/cradlestack/cradlestack/internal/nomadtest"
)

// TestRootNomad runs an image as a task of a real Nomad's raw_exec: the task's
// environment, folders and logs are there, and Nomad's stop ends the service
// itself.
func TestRootNomad(t *testing.T) {
	p := newPlace(t)
	p.sh(`for a in cat sleep touch; do ln -s busybox app/bin/$a; done`)
	p.ok("build", "app.tar.gz", "--from", "./app", "--entrypoint", "/bin/sh", "--entrypoint", "-c", "--env", "PATH=/bin")
	nomad := nomadtest.Start(t, nomadtest.Options{Drivers: []string{"raw_exec"}})
	job := nomad.Run(t, fmt.Sprintf(`
job "app" {
  type = "service"
  group "app" {
    task "app" {
      driver       = "raw_exec"
      kill_timeout = "20s"
      kill_signal  = "SIGTERM"
      config {
        command = "%[2]s"
        args    = ["run", "%[1]s/app.tar.gz", "--", "trap 'echo stopped; exit 0' TERM; echo task $NOMAD_TASK_NAME; cat $NOMAD_TASK_DIR/in; touch $NOMAD_ALLOC_DIR/out; sleep 1000 & wait"]
      }
      env {
        BALI_TRUST      = "%[1]s/trust"
        XDG_CONFIG_HOME = "%[1]s/config"
      }
      template {
        data        = "from a template\n"
        destination = "local/in"
      }
    }
  }
}`, p.dir, p.bali))
	alloc := nomad.UntilRunning(t, job)
	if got := nomad.UntilLogsHave(t, alloc.ID, "app", "stdout", "template\n"); got != "task app\nfrom a template\n" {
		t.Errorf("output: %q", got)
	}
	node := nomad.Clients()[0]
	if _, err := os.Stat(node.Path(filepath.Join(node.Dir, "nomad/alloc", alloc.ID, "alloc/out"))); err != nil {
		t.Errorf("what the task wrote into the allocation's folder: %v", err)
	}
	nomad.Stop(t, job)
	const all = "task app\nfrom a template\nstopped\n"
	got := nomad.Logs(t, alloc.ID, "app", "stdout")
	// what collects the output may be behind
	for deadline := time.Now().Add(nomadtest.Patience); got != all && strings.HasPrefix(all, got) && time.Now().Before(deadline); {
		time.Sleep(100 * time.Millisecond)
		got = nomad.Logs(t, alloc.ID, "app", "stdout")
	}
	if got != all {
		t.Errorf("output after the end: %q", got)
	}
}

func lastLine(s string) string {
	l := strings.Split(strings.TrimSpace(s), "\n")
	return l[len(l)-1]
}
