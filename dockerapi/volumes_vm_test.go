//go:build vm

package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/hashicorp/nomad/api"
)

// Volumes with a name outlive containers; who may have one at the same time is its class's to say.
func TestVMVolumes(t *testing.T) {
	h := openBeside(t)
	h.c.RunVolumes(t)
	h.want("data", "volume", "create", "-d", "lv2", "-o", "size=64M", "--label", "tier=db", "data")
	h.want("data", "volume", "create", "data")
	h.want("data lv2 global map[size:64M] map[tier:db]", "volume", "inspect", "-f", "{{.Name}} {{.Driver}} {{.Scope}} {{.Options}} {{.Labels}}", "data")
	h.wantError(1, "it exists with driver lv2", "volume", "create", "-d", "nfs", "data")
	h.wantError(1, `there is no option "type"`, "volume", "create", "-o", "type=tmpfs", "odd")
	h.wantError(1, "no such volume", "volume", "inspect", "odd")

	// One container after the other has it.
	h.run("run", "--rm", "-v", "data:/data", "busybox", "sh", "-c", "echo kept >/data/file")
	h.want("kept", "run", "--rm", "-v", "data:/data:ro", "busybox", "cat", "/data/file")
	one := h.run("run", "-d", "--name", "one", "-v", "data:/data", "busybox", "sh", "-c", "trap exit TERM; while :; do sleep 0.1; done")
	h.wantError(125, "volume data is in use by container one, and of class lv2", "run", "--name", "two", "-v", "data:/data", "busybox", "true")
	h.run("rm", "two")
	h.want("volume data lv2 /data true", "inspect", "-f", "{{range .Mounts}}{{.Type}} {{.Name}} {{.Driver}} {{.Destination}} {{.RW}}{{end}}", "one")
	h.want(one, "ps", "-q", "--no-trunc", "--filter", "volume=data")
	h.wantError(1, "remove data: volume is in use - \\["+one+"\\]", "volume", "rm", "data")
	h.run("stop", "one")
	file := filepath.Join(t.TempDir(), "file")
	h.run("cp", "one:/data/file", file)
	if text, err := os.ReadFile(file); err != nil || string(text) != "kept\n" {
		t.Errorf("copied from the volume of a stopped container: %q, %v", text, err)
	}
	h.run("start", "one")
	h.want("kept", "exec", "one", "cat", "/data/file")

	// Two have the other one at once. Both begin with what the image has.
	h.run("volume", "create", "-d", "nfs", "shared")
	h.run("run", "-d", "--name", "three", "-v", "shared:/shared", "-v", "copied:/bin", "busybox", "sleep", "1000")
	h.want("told", "run", "--rm", "--name", "four", "-v", "shared:/shared", "busybox", "sh", "-c", "echo told >/shared/file; cat /shared/file")
	h.want("told", "exec", "three", "cat", "/shared/file")
	h.want("told", "run", "--rm", "--mount", "type=volume,src=tools,dst=/bin,volume-driver=nfs,volume-label=a=b", "-v", "shared:/shared", "busybox", "cat", "/shared/file")
	h.wantError(127, "not found", "run", "--rm", "-v", "empty:/bin:nocopy", "busybox", "cat", "/shared/file")
	h.run("run", "-d", "--name", "from", "--volumes-from", "three:ro", "--entrypoint", "/bin/sh", "-v", "tools:/bin", "busybox", "-c", "sleep 1000")
	h.want("told", "exec", "from", "cat", "/shared/file")
	h.wantError(1, "", "exec", "from", "touch", "/shared/other")

	// Who joins another one's machine has those volumes that this one has, of whatever class.
	h.run("start", "one")
	h.want("kept", "run", "--rm", "--network", "container:one", "-v", "data:/theirs", "busybox", "sh", "-c", "cat /theirs/file; echo more >/theirs/more")
	h.want("more", "exec", "one", "cat", "/data/more")
	h.run("create", "--name", "joined", "--network", "container:three", "--volumes-from", "three", "busybox", "cat", "/shared/file")
	h.want("told", "start", "-a", "joined")
	h.want("joined", "ps", "-a", "--filter", "volume=shared", "--filter", "status=exited", "--format", "{{.Names}}")
	h.run("rm", "joined")
	h.wantError(125, "and data is none of them", "run", "--rm", "--network", "container:three", "-v", "data:/data", "busybox", "true")

	// Parts of volumes, a shared one and a disk; nothing that is outside of them.
	for volume, container := range map[string]string{"shared": "three", "data": "one"} {
		h.run("exec", container, "sh", "-c", "cd /"+volume+"; mkdir site; echo page >site/index; ln -s / out")
		if container == "one" {
			h.run("stop", "one") // one container has it at a time
		}
		for subpath, want := range map[string]string{"site": "page\n", "out": "path concatenation escapes the base directory", "none": "cannot access path"} {
			h.ask("POST", "/containers/create?name=part", `{"Image": "busybox", "Cmd": ["cat", "/site/index"], "HostConfig": {"Mounts": [
				{"Type": "volume", "Source": "`+volume+`", "Target": "/site", "VolumeOptions": {"Subpath": "`+subpath+`"}}]}}`, nil)
			if out, err := h.try("", "start", "-a", "part"); !strings.Contains(fmt.Sprint(out, err), want) {
				t.Errorf("%s of volume %s: %q, %v; want %s", subpath, volume, out, err, want)
			}
			h.run("rm", "part")
		}
	}
	h.run("start", "one")

	// One without a name is there as long as its container.
	h.run("create", "--name", "nameless", "-v", "/data", "busybox", "true")
	nameless := h.run("inspect", "-f", "{{range .Mounts}}{{.Name}}{{end}}", "nameless")
	h.want("local local "+nameless, "volume", "inspect", "-f", "{{.Driver}} {{.Scope}} {{.Name}}", nameless)
	h.want(nameless, "volume", "ls", "-q", "--filter", "driver=local")
	h.wantError(1, "volume is in use", "volume", "rm", nameless)
	h.wantError(125, "give it a name there", "run", "-v", nameless+":/other", "busybox", "true")
	h.run("rm", "-v", "nameless")
	h.wantError(1, "no such volume", "volume", "inspect", nameless)
	// One whose name nobody has chosen goes with docker volume prune, others stay.
	chosen := h.run("volume", "create", "-d", "nfs")
	if out := h.run("volume", "prune", "-f"); !strings.HasPrefix(out, "Deleted Volumes:\n"+chosen+"\n\n") {
		t.Errorf("docker volume prune says %q, and not that it has removed %s alone", out, chosen)
	}

	// Another namespace has volumes of its own.
	if _, err := h.c.API.Namespaces().Register(&api.Namespace{Name: "other"}, nil); err != nil {
		t.Fatal(err)
	}
	other := h.second("--namespace", "other")
	other.want("", "volume", "ls", "-q")
	other.run("volume", "create", "data")
	other.want("data", "volume", "ls", "-q")
	other.want("", "run", "--rm", "-v", "data:/data", "busybox", "ls", "/data")
	other.want("data", "volume", "rm", "data")

	h.want("copied\ndata\nempty\nshared\ntools", "volume", "ls", "-q")
	h.want("tools", "volume", "ls", "-q", "--filter", "label=a=b")
	h.want("empty", "volume", "ls", "-q", "--filter", "dangling=true")
	h.want("shared\ntools", "volume", "ls", "-q", "--filter", "driver=nfs")
	h.want("Local Volumes 5 4", "system", "df", "--format", "{{if eq .Type \"Local Volumes\"}}{{.Type}} {{.TotalCount}} {{.Active}}{{end}}")
	h.run("rm", "-f", "one", "three", "from")
	h.want("data", "volume", "rm", "data")
	h.run("volume", "prune", "-af")
	h.want("", "volume", "ls", "-q")
}
