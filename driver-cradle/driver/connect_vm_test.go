//go:build vm

package driver

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	nomad "github.com/hashicorp/nomad/api"

	"github.com/cradlestack/cradlestack/internal/nomadtest"
	"github.com/cradlestack/cradlestack/test/programs"
)

// meshJob is two groups of Consul's service mesh: the pod of one serves at its 127.0.0.1 alone, that of the other asks it by an upstream at its own
// 127.0.0.1. Between them are real proxies, tasks of another driver in the groups' network namespaces. They are Consul's own, as no distribution has Envoy.
// The end of web's request is held back: Consul's proxy drops the answer to a client that has nothing more to say.
const meshJob = `
job "mesh" {
  group "api" {
    network {
      mode = "bridge"
    }
    service {
      name = "api"
      port = "8080"
      connect {
        sidecar_service {}
        sidecar_task {
%[2]s
        }
      }
    }
    task "api" {
      driver       = "cradle"
      kill_timeout = "1s"
      config {
        image   = "%[1]s"
        command = "sh"
        args    = ["-c", "echo 'hello from the mesh' >/index.html; exec httpd -f -p 127.0.0.1:8080 -h /"]
      }
      resources {
        cpu    = 100
        memory = 64
      }
    }
    # Any task of another driver: it reaches the pod, and the world.
    task "beside" {
      driver = "raw_exec"
      config {
        command = "/bin/sh"
        args    = ["-c", <<EOS
          until curl --silent --max-time 10 http://127.0.0.1:8080/; do sleep 1; done
          curl --silent --max-time 60 http://$(hostname -I | cut -d' ' -f1):8080/ || echo "at the pod's address: $?"
          until curl --silent --fail --max-time 10 --output /dev/null http://$(ip route | awk '/^default/ {print $3}'):8500/v1/status/leader; do sleep 1; done
          echo consul answers
          exec sleep 100000
        EOS
        ]
      }
    }
  }

  group "web" {
    network {
      mode = "bridge"
    }
    service {
      name = "web"
      port = "80"
      connect {
        sidecar_service {
          proxy {
            upstreams {
              destination_name = "api"
              local_bind_port  = 9191
            }
          }
        }
        sidecar_task {
%[3]s
        }
      }
    }
    task "web" {
      driver       = "cradle"
      kill_timeout = "1s"
      config {
        image   = "%[1]s"
        command = "sh"
        args    = ["-c", "while :; do { printf 'GET / HTTP/1.0\\r\\n\\r\\n'; sleep 10; } | nc $NOMAD_UPSTREAM_IP_api $NOMAD_UPSTREAM_PORT_api; sleep 1; done"]
      }
      resources {
        cpu    = 100
        memory = 64
      }
    }
  }
}`

// proxyTask takes the place of Envoy's container: the service's name is the group's.
const proxyTask = `
          driver = "raw_exec"
          config {
            command = "/bin/sh"
            args    = ["-c", <<EOS
              consul=http://$(ip route | awk '/^default/ {print $3}'):8500
              eval port=\$NOMAD_PORT_connect_proxy_$NOMAD_GROUP_NAME
              exec %s connect proxy -http-addr $consul -service $NOMAD_GROUP_NAME -listen :$port %s
            EOS
            ]
          }`

func TestVMConnect(t *testing.T) {
	consul, err := programs.Tool("consul")
	if err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", filepath.Dir(consul)+":"+os.Getenv("PATH")) // Nomad runs it
	image, err := programs.Image("busybox")
	if err != nil {
		t.Fatal(err)
	}
	o := nomadtest.Options{Consul: true, Drivers: []string{"raw_exec"}}
	if err := o.Cradle(""); err != nil {
		t.Fatal(err)
	}
	c := nomadtest.Start(t, o)
	job := c.Run(t, fmt.Sprintf(meshJob, "oci:"+image,
		fmt.Sprintf(proxyTask, consul, "-service-addr 127.0.0.1:8080"), fmt.Sprintf(proxyTask, consul, "-service-addr 127.0.0.1:80 -upstream api:9191")))
	in := func(group string) string {
		return c.UntilAlloc(t, job, group+" runs", func(a *nomad.AllocationListStub) bool { return a.TaskGroup == group && nomadtest.Running(a) }).ID
	}
	api, web := in("api"), in("web")
	c.UntilLogsHave(t, api, "beside", "stdout", "hello from the mesh\nat the pod's address: 7\nconsul answers\n")
	c.UntilLogsHave(t, web, "web", "stdout", "hello from the mesh\n")
	c.Stop(t, job)

	// One pod has a group's network. The second is refused, and told what to do.
	job = c.Run(t, fmt.Sprintf(twoPodsJob, "oci:"+image))
	a := c.UntilAlloc(t, job, "fails", func(a *nomad.AllocationListStub) bool { return a.ClientStatus == nomad.AllocClientStatusFailed })
	var told []string
	for task, s := range a.TaskStates {
		for _, e := range s.Events {
			told = append(told, task+": "+e.DisplayMessage)
		}
	}
	if all := strings.Join(told, "\n"); !strings.Contains(all, "network namespace is in use by another pod") || !strings.Contains(all, "container {} blocks") {
		t.Errorf("Nomad is told\n%s", all)
	}
	c.Stop(t, job)
}

const twoPodsJob = `
job "two" {
  group "g" {
    network {
      mode = "bridge"
    }
    restart {
      attempts = 0
      mode     = "fail"
    }
    reschedule {
      attempts  = 0
      unlimited = false
    }
    task "one" {
      driver       = "cradle"
      kill_timeout = "1s"
      config {
        image   = "%[1]s"
        command = "sleep"
        args    = ["100000"]
      }
      resources {
        cpu    = 100
        memory = 64
      }
    }
    task "other" {
      driver       = "cradle"
      kill_timeout = "1s"
      config {
        image   = "%[1]s"
        command = "sleep"
        args    = ["100000"]
      }
      resources {
        cpu    = 100
        memory = 64
      }
    }
  }
}`
