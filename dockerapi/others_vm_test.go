//go:build vm

package main

import (
	"fmt"
	"strings"
	"testing"

	"github.com/cradlestack/cradlestack/test/programs"
)

// Pods that docker has not made are seen and looked into, and not changed.
func TestVMPodsOfOthers(t *testing.T) {
	h := openHost(t)
	image, err := programs.Image("busybox")
	if err != nil {
		t.Fatal(err)
	}
	job := h.c.Run(t, fmt.Sprintf(`
job "shop" {
  group "any" {
    network {
      port "http" {
        to = 80
      }
    }
    task "front" {
      driver = "cradle"
      config {
        image   = "oci:%[1]s"
        command = "sh"
        args    = ["-c", "echo served; exec httpd -f -p 80"]
        ports   = ["http"]
        labels {
          tier = "front"
        }
        container "beside" {
          image   = "oci:%[1]s"
          command = "sleep"
          args    = ["100000"]
          stop_signal = "SIGKILL"
        }
      }
      kill_signal = "SIGKILL"
      resources {
        memory = 64
      }
    }
  }
}`, image))
	alloc := h.c.UntilRunning(t, job)
	h.run("run", "-d", "--name", "own", "--stop-signal", "SIGKILL", "busybox", "sleep", "100000")
	h.until("both containers", func() bool {
		out, err := h.try("", "ps", "--format", "{{.Names}} {{.State}}")
		return err == nil && strings.Count(out, "running") == 3
	})
	h.want("own\nshop\nshop-beside", "ps", "--format", "{{.Names}}")
	h.want("shop", "ps", "--format", "{{.Names}}", "--filter", "label=tier=front")
	h.want("", "ps", "-q", "--filter", "name=shop", "--filter", "status=exited", "-a")
	whole, _, err := h.c.API.Allocations().Info(alloc.ID, nil)
	if err != nil {
		t.Fatal(err)
	}
	h.want(fmt.Sprintf("0.0.0.0:%d->80/tcp", whole.AllocatedResources.Shared.Ports[0].Value), "ps", "--filter", "name=^/shop$", "--format", "{{.Ports}}")
	id := h.run("ps", "-q", "--no-trunc", "--filter", "name=^/shop$")
	h.want(id+" /shop running", "inspect", "-f", "{{.Id}} {{.Name}} {{.State.Status}}", "shop")
	h.want("/shop-beside", "inspect", "-f", "{{.Name}}", "shop-beside")
	h.until("its log", func() bool { out, _ := h.try("", "logs", id[:12]); return strings.Contains(out, "served") })
	h.want("inside", "exec", "shop-beside", "echo", "inside")
	h.want("", "exec", "shop", "sh", "-c", "ps | grep -q '[h]ttpd'")
	for _, change := range []string{"stop", "kill", "rm", "restart", "pause"} {
		h.wantError(1, "is of Nomad's job shop, which docker has not made", change, "shop")
	}
	if again := h.c.UntilRunning(t, job); again.ID != alloc.ID {
		t.Error("docker has ended a pod that is not docker's")
	}
	h.c.Stop(t, job)
	h.want("own", "ps", "-a", "--format", "{{.Names}}")
	h.run("rm", "-f", "own")
}
