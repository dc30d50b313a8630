//go:build vm && soak

package main

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/cradlestack/cradlestack/internal/nomadtest"
	"github.com/cradlestack/cradlestack/test/programs"
)

// docker sees what Terraform has made, and changes nothing of its pods; a volume that it takes away is missed by the next plan.
func TestSoakTerraformDocker(t *testing.T) {
	c := openNomad(t)
	w := openWorkspace(t, c)
	image, err := programs.Image("busybox")
	if err != nil {
		t.Fatal(err)
	}
	docker := serveDocker(t, c)
	w.apply(fmt.Sprintf(`
provider "cradle" {}
resource "cradle_volume" "files" {
  name = "files"
  size = "16MiB"
}
resource "cradle_volume" "spare" {
  name = "spare"
  size = "16MiB"
}
resource "cradle_pod" "web" {
  name   = "web"
  memory = "64MiB"
  container {
    name        = "main"
    image       = "oci:%s"
    command     = ["sleep", "100000"]
    stop_signal = "SIGKILL"
    mount {
      path   = "/files"
      volume = cradle_volume.files.name
      shared = true
    }
  }
  wait_for = "running"
}
`, image))
	if out, err := docker("ps", "--format", "{{.Names}}"); err != nil || strings.TrimSpace(out) != "web" {
		t.Errorf("docker ps has %q, %v", out, err)
	}
	if out, err := docker("exec", "web", "sh", "-c", "echo kept >/files/by-docker && cat /files/by-docker"); err != nil || strings.TrimSpace(out) != "kept" {
		t.Errorf("docker exec says %q, %v", out, err)
	}
	for _, change := range [][]string{{"stop", "web"}, {"rm", "-f", "web"}, {"volume", "rm", "files"}} {
		if out, err := docker(change...); err == nil {
			t.Errorf("docker %v is done: %s", change, out)
		}
	}
	w.unchanged()
	if out, err := docker("volume", "ls", "--format", "{{.Name}}"); err != nil || strings.Join(strings.Fields(out), " ") != "files spare" {
		t.Errorf("docker volume ls has %q, %v", out, err)
	}
	if _, err := docker("volume", "rm", "spare"); err != nil {
		t.Fatal(err)
	}
	if all, said := w.plan(); len(all) != 1 || all["cradle_volume.spare"].actions() != "create" {
		t.Errorf("a volume that docker has removed is not made again:\n%s", said)
	}
	w.run("apply", "-auto-approve", "-no-color")
	w.unchanged()
	w.run("destroy", "-auto-approve", "-no-color")
	if out, err := docker("ps", "-aq"); err != nil || strings.TrimSpace(out) != "" {
		t.Errorf("docker ps has %q, %v", out, err)
	}
}

// serveDocker runs docker's API in the node, and returns docker in front of it.
func serveDocker(t *testing.T, c *nomadtest.Cluster, more ...string) func(...string) (string, error) {
	t.Helper()
	program, err := programs.Path("cradle-dockerapi")
	if err != nil {
		t.Fatal(err)
	}
	socket, config := filepath.Join(c.Dir(), "docker.sock"), t.TempDir()
	var log bytes.Buffer
	server := c.Server().Command(context.Background(), program, append([]string{"serve", "--socket", socket}, more...)...)
	server.Env, server.Stderr = c.Env(), &log
	if err := c.Server().Launch(server); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		server.Process.Signal(os.Interrupt)
		server.Wait()
		if t.Failed() {
			t.Logf("docker's API:\n%s", &log)
		}
	})
	for end := time.Now().Add(nomadtest.Patience); ; time.Sleep(20 * time.Millisecond) {
		if conn, err := net.Dial("unix", socket); err == nil {
			conn.Close()
			break
		}
		if time.Now().After(end) {
			t.Fatal("docker's API does not listen")
		}
	}
	return func(args ...string) (string, error) {
		cmd := exec.Command("docker", args...)
		cmd.Env = append(os.Environ(), "DOCKER_HOST=unix://"+socket, "DOCKER_CONFIG="+config)
		var out, stderr bytes.Buffer
		cmd.Stdout, cmd.Stderr = &out, &stderr
		if err := cmd.Run(); err != nil {
			return out.String(), fmt.Errorf("docker %s: %w: %s", strings.Join(args, " "), err, &stderr)
		}
		return out.String(), nil
	}
}
