//go:build vm

package main

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"
)

const recreated = `
name: recreated
services:
  app:
    image: busybox
    environment: { GENERATION: "%s" }
    volumes: ["/data", "kept:/kept"]
    command: sh -c "echo $$GENERATION >>/data/log; sync; exec sleep 10000"
volumes:
  kept:
`

// What is on a volume without a name goes to the container that docker compose makes in another one's place, and to whoever else asks for it, when its container is removed.
func TestVMHandedOver(t *testing.T) {
	h := openBeside(t)
	h.c.RunVolumes(t)
	h.takeCompose()
	file := filepath.Join(t.TempDir(), "compose.yaml")
	up := func(generation string) {
		t.Helper()
		if err := os.WriteFile(file, fmt.Appendf(nil, recreated, generation), 0o600); err != nil {
			t.Fatal(err)
		}
		h.run("compose", "--progress", "quiet", "-f", file, "up", "-d", "-t", "1")
	}
	logged := func(container, want string) {
		t.Helper()
		h.until(container+" to have written", func() bool {
			out, _ := h.try("", "exec", container, "cat", "/data/log")
			return out == want
		})
	}
	const app, name = "recreated-app-1", "{{range .Mounts}}{{if eq .Driver \"local\"}}{{.Name}}{{end}}{{end}}"
	up("1")
	logged(app, "1\n")
	volume := h.run("inspect", "-f", name, app)
	h.run("exec", app, "sh", "-c", "chown 7:8 /data; chmod 1730 /data; mkdir /data/dir; echo hidden >/data/dir/.file; ln /data/log /data/hard; ln -s /etc /data/soft; sync")
	first := h.run("inspect", "-f", "{{.Id}}", app)
	up("2")
	logged(app, "1\n2\n")
	if now := h.run("inspect", "-f", "{{.Id}}", app); now == first {
		t.Error("the container is the same one")
	}
	h.want(volume, "inspect", "-f", name, app)
	h.want(volume, "volume", "ls", "-q", "--filter", "driver=local")
	h.want("7:8 1730 2 /etc hidden", "exec", app, "sh", "-c", "echo $(stat -c '%u:%g %a' /data) $(stat -c %h /data/log) $(readlink /data/soft) $(cat /data/dir/.file)")

	// It is one container's at a time.
	h.run("create", "--name", "next", "-v", volume+":/srv/data", "busybox", "sh", "-c", "cat /srv/data/log; exec sleep 10000")
	h.wantError(1, "volume "+volume+" at /srv/data is on the disk of container .*, and is this one's when that is removed", "start", "next")
	h.wantError(1, "is to be another one's already", "create", "-v", volume+":/data", "busybox")
	h.wantError(1, "volume is in use", "volume", "rm", volume)
	h.run("rm", "-f", app)
	h.run("start", "next")
	h.untilSaid("1\n2", "next")
	h.wantError(1, "is on the disk of container .*as a whole, to be written to, and at the same path", "create", "-v", volume+":/other", "busybox")
	h.run("compose", "-f", file, "down", "-v", "-t", "1")
	h.run("rm", "-f", "next")
	h.want("", "volume", "ls", "-q")
}
