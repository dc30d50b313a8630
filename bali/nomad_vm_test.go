//go:build vm

package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// TestRootNomad runs an image as a task of a real Nomad's raw_exec: the task's
// environment, folders and logs are there, and Nomad's stop ends the service
// itself.
func TestRootNomad(t *testing.T) {
	p := newPlace(t)
	p.sh(`for a in cat sleep touch; do ln -s busybox app/bin/$a; done`)
	p.ok("build", "app.tar.gz", "--from", "./app", "--entrypoint", "/bin/sh", "--entrypoint", "-c", "--env", "PATH=/bin")
	build, err := filepath.Abs("../tools/build.sh")
	if err != nil {
		t.Fatal(err)
	}
	nomad := lastLine(p.sh(build + " nomad"))
	p.sh(fmt.Sprintf(`cat >agent.hcl <<END
data_dir = "%[1]s/nomad"
bind_addr = "127.0.0.1"
advertise {
  http = "127.0.0.1"
  rpc  = "127.0.0.1"
  serf = "127.0.0.1"
}
ports {
  http = 24646
  rpc  = 24647
  serf = 24648
}
server {
  enabled          = true
  bootstrap_expect = 1
}
client {
  enabled           = true
  network_interface = "lo"
  options           = { "fingerprint.denylist" = "env_aws,env_gce,env_azure,env_digitalocean" }
}
plugin "raw_exec" {
  config { enabled = true }
}
END
cat >job.hcl <<END
job "app" {
  type = "service"
  group "app" {
    task "app" {
      driver       = "raw_exec"
      kill_timeout = "20s"
      kill_signal  = "SIGTERM"
      config {
        command = "%[2]s"
        args    = ["run", "%[1]s/app.tar.gz", "--", "trap 'echo stopped; exit 0' TERM; echo task \$NOMAD_TASK_NAME; cat \$NOMAD_TASK_DIR/in; touch \$NOMAD_ALLOC_DIR/out; sleep 1000 & wait"]
      }
      env {
        BALI_TRUST = "%[1]s/trust"
      }
      template {
        data        = "from a template\n"
        destination = "local/in"
      }
    }
  }
}
END`, p.dir, p.bali))
	agent := exec.CommandContext(t.Context(), nomad, "agent", "-config", filepath.Join(p.dir, "agent.hcl"))
	agent.Env = append(p.env(), "AWS_CA_BUNDLE=")
	agent.Cancel = func() error { return agent.Process.Signal(os.Interrupt) }
	agent.WaitDelay = 30 * time.Second
	log, err := os.Create(filepath.Join(p.dir, "agent.log"))
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	agent.Stdout, agent.Stderr = log, log
	if err := agent.Start(); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		agent.Wait()
		cancel() // nothing more to wait for
	}()
	t.Cleanup(func() {
		agent.Process.Signal(os.Interrupt)
		<-ended
		// an agent that ends leaves the allocations' folders for the next one
		for _, name := range []string{"secrets", "private"} {
			left, _ := filepath.Glob(filepath.Join(p.dir, "nomad/alloc/*/*", name))
			for _, m := range left {
				syscall.Unmount(m, 0) // or it is none
			}
		}
		if t.Failed() {
			b, _ := os.ReadFile(log.Name())
			t.Logf("agent: %s", b)
		}
	})
	do := func(args ...string) (string, error) {
		cmd := exec.CommandContext(ctx, nomad, args...)
		cmd.Dir, cmd.Env = p.dir, append(p.env(), "NOMAD_ADDR=http://127.0.0.1:24646")
		out, err := cmd.CombinedOutput()
		return string(out), err
	}
	until := func(what string, f func() bool) {
		t.Helper()
		for !f() {
			if ctx.Err() != nil {
				t.Fatalf("%s: not within two minutes, or the agent ended", what)
			}
			time.Sleep(200 * time.Millisecond)
		}
	}
	until("a ready node", func() bool { out, _ := do("node", "status"); return strings.Contains(out, "ready") })
	if out, err := do("job", "run", "-detach", "job.hcl"); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	var alloc string
	until("an allocation", func() bool {
		out, err := do("job", "allocs", "-json", "app")
		var list []struct{ ID string }
		if err != nil || json.Unmarshal([]byte(out), &list) != nil || len(list) == 0 {
			return false
		}
		alloc = list[0].ID
		return true
	})
	until("its output", func() bool {
		out, _ := do("alloc", "logs", alloc)
		return out == "task app\nfrom a template\n"
	})
	if _, err := os.Stat(filepath.Join(p.dir, "nomad/alloc", alloc, "alloc/out")); err != nil {
		t.Errorf("what the task wrote into the allocation's folder: %v", err)
	}
	if out, err := do("job", "stop", "-detach", "app"); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	until("its end", func() bool { out, _ := do("alloc", "logs", alloc); return strings.HasSuffix(out, "stopped\n") })
	until("a complete allocation", func() bool { out, _ := do("alloc", "status", alloc); return strings.Contains(out, "Exit Code: 0") })
}

func lastLine(s string) string {
	l := strings.Split(strings.TrimSpace(s), "\n")
	return l[len(l)-1]
}
