//go:build vm && soak

package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/cradlestack/cradlestack/internal/nomadtest"
)

// writtenJob is a job as somebody writes one, and writtenHCL the same pod in Terraform's words. Nothing of it runs.
const (
	writtenJob = `
job "written" {
  group "any" {
    count = 0
    network {
      mode = "bridge"
      port "http_alt" {
        to = 80
      }
    }
    service {
      name     = "written"
      port     = "http_alt"
      provider = "nomad"
      check {
        type     = "http"
        path     = "/"
        interval = "5s"
        timeout  = "2s"
      }
    }
    task "web" {
      driver       = "cradle"
      kill_timeout = "15s"
      # MORE
      config {
        image   = "oci:/nowhere"
        command = "sh"
        args    = ["-c", "true"]
        healthcheck {
          test     = ["CMD", "true"]
          interval = "3s"
        }
        labels {
          tier = "front"
        }
        mount {
          source = "cache"
          target = "/cache"
        }
        container "beside" {
          image   = "oci:/nowhere"
          command = "sleep"
          args    = ["1000"]
          env {
            A = "1"
          }
          lifecycle {
            after {
              container = "web"
            }
            restart_on_failure = true
          }
        }
      }
      resources {
        memory = 128
      }
    }
  }
}`
	writtenHCL = `
provider "cradle" {}
resource "cradle_pod" "written" {
  name     = "written"
  replicas = 0
  memory   = "128MiB"
  network  = "bridge"
  container {
    name        = "web"
    image       = "oci:/nowhere"
    command     = ["sh", "-c", "true"]
    labels      = { tier = "front" }
    healthcheck = { test = ["CMD", "true"], interval = "3s" }
    mount {
      path    = "/cache"
      scratch = "cache"
    }
  }
  container {
    name    = "beside"
    image   = "oci:/nowhere"
    command = ["sleep", "1000"]
    env     = { A = "1" }
    after   = [{ container = "web" }]
    restart = "on-failure"
  }
  port {
    port = 80
  }
  service {
    name  = "written"
    port  = 80
    check = { type = "http", path = "/", interval = "5s" }
  }
}
import {
  to = cradle_pod.written
  id = "written"
}
`
)

// A job that somebody has written and run is imported as it is. What no attribute says is told, and goes with an apply.
func TestSoakTerraformImportsJobs(t *testing.T) {
	c := openNomad(t)
	w := openWorkspace(t, c)
	c.Run(t, writtenJob)
	w.write(writtenHCL)
	if all, said := w.plan(); len(all) != 0 || !strings.Contains(said, "1 to import, 0 to add, 0 to change") {
		t.Errorf("the import of a job changes %v:\n%s", all, said)
	}
	w.run("apply", "-auto-approve", "-no-color")
	before := versionOf(t, c)
	w.unchanged()
	if again := versionOf(t, c); again != before {
		t.Errorf("an import has changed the job from version %d to %d", before, again)
	}

	testOtherState(w)

	// Somebody writes more than a pod can say.
	c.Run(t, strings.Replace(writtenJob, "# MORE", "user = \"root\"\n env {\n A = \"1\"\n }", 1))
	all, said := w.plan()
	got := all["cradle_pod.written"]
	if err := got.onlyIn("beyond"); err != nil || got.actions() != "update" || !strings.Contains(said, `- "task.env",`) || !strings.Contains(said, `- "task.user",`) {
		t.Errorf("what no attribute says is %s: %v\n%s", got.actions(), err, said)
	}
	w.run("apply", "-auto-approve", "-no-color")
	w.unchanged()
	job, _, err := c.API.Jobs().Info("written", nil)
	if err != nil {
		t.Fatal(err)
	}
	if task := job.TaskGroups[0].Tasks[0]; len(task.Env) > 0 || task.User != "" {
		t.Errorf("it is left: %v, %q", task.Env, task.User)
	}

	// A job that is no pod is told of.
	w.write(writtenHCL + "resource \"cradle_pod\" \"other\" {\n name = \"other\"\n container {\n name = \"t\"\n image = \"oci:/nowhere\"\n }\n}\n")
	w.fails([]string{"job cradle-csi is not one pod"}, "import", "-no-color", "cradle_pod.other", "cradle-csi")
	w.fails([]string{"Cannot import non-existent remote object"}, "import", "-no-color", "cradle_pod.other", "nowhere")
	w.write(writtenHCL)
	w.run("destroy", "-auto-approve", "-no-color")
}

// testOtherState reads a state that another version of the provider has written: it lacks an attribute, and has one that there is no more.
func testOtherState(w *workspace) {
	w.t.Helper()
	file := filepath.Join(w.dir, "terraform.tfstate")
	data, err := os.ReadFile(file)
	if err != nil {
		w.t.Fatal(err)
	}
	var state map[string]any
	if err := json.Unmarshal(data, &state); err != nil {
		w.t.Fatal(err)
	}
	attributes := state["resources"].([]any)[0].(map[string]any)["instances"].([]any)[0].(map[string]any)["attributes"].(map[string]any)
	if _, ok := attributes["beyond"]; !ok {
		w.t.Fatalf("the state is %s", data)
	}
	delete(attributes, "beyond")
	attributes["formerly"] = "something"
	if data, err = json.Marshal(state); err != nil {
		w.t.Fatal(err)
	}
	if err := os.WriteFile(file, data, 0o600); err != nil {
		w.t.Fatal(err)
	}
	w.unchanged()
}

func versionOf(t *testing.T, c *nomadtest.Cluster) uint64 {
	t.Helper()
	job, _, err := c.API.Jobs().Info("written", nil)
	if err != nil {
		t.Fatal(err)
	}
	return *job.Version
}
