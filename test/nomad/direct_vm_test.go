//go:build vm

package nomad

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/cradlestack/cradlestack/internal/nomadtest"
	"github.com/cradlestack/cradlestack/spec"
	"github.com/cradlestack/cradlestack/test/programs"
)

// A storehouse is a node with the driver and the CSI plugin of examples/nomad/volumes.
type storehouse struct {
	*nomadtest.Cluster
	t     *testing.T
	node  *nomadtest.Node
	image string
	root  string
	used  map[string]bool // volumes that there are
}

// startStorehouse starts the node with both plugins. agent is more of its configuration, and with are changes of how it is started.
func startStorehouse(t *testing.T, agent string, with ...func(*nomadtest.Options)) *storehouse {
	s := &storehouse{t: t, used: map[string]bool{}}
	var err error
	if s.root, err = programs.Root(); err != nil {
		t.Fatal(err)
	}
	if s.image, err = programs.Image("busybox"); err != nil {
		t.Fatal(err)
	}
	o := nomadtest.Options{Drivers: []string{"raw_exec"}, Agent: agent, Keep: []string{"volumes", "filer", "nomad/client/csi", "/run/cradle"}}
	if err := o.Cradle(""); err != nil {
		t.Fatal(err)
	}
	for _, change := range with {
		change(&o)
	}
	s.Cluster = nomadtest.Start(t, o)
	s.node = s.Clients()[0]
	t.Cleanup(s.clear)
	s.Run(t, s.example("cradle-csi.nomad.hcl"))
	s.healthy()
	return s
}

func (s *storehouse) healthy() {
	s.t.Helper()
	s.eventually("a healthy plugin", func() bool {
		p, _, err := s.API.CSIPlugins().Info("cradle", nil)
		return err == nil && p.ControllersHealthy == 1 && p.NodesHealthy == 1
	})
}

// TestVMDirectAttachment: what the CSI plugin leaves to guests, pods attach; snapshots, growth and usage go through the guest.
func TestVMDirectAttachment(t *testing.T) {
	s := startStorehouse(t, "")
	s.volume("guest")
	if out := s.completes("first", "guest", false, "/v", "echo kept >/v/file; grep -o ' /v ext4' /proc/mounts"); out != " /v ext4\n" {
		t.Errorf("the first pod says %q", out)
	}
	s.underAWriter()
	if out := s.completes("last", "guest", false, "/v", "cat /v/file; df -m /v | tail -n 1 | while read dev size rest; do test $size -gt 1500 && echo large; done"); out != "kept\nlarge\n" {
		t.Errorf("the last pod says %q", out)
	}
	s.volume("copy", `"database@before-upgrade"`, `"guest@running"`, `class = "lv2"`, "class = \"lv2\"\n  attach = \"direct\"")
	if out := s.completes("clone", "copy", false, "/v", "cat /v/file; test -s /v/now && echo dated"); out != "kept\ndated\n" {
		t.Errorf("the clone has %q", out)
	}

	s.volume("disk", `class = "lv2"`, "class = \"lv2\"\n  attach = \"direct\"")
	if out := s.completes("raw", "disk", true, "/dev/wanted", "echo raw >/tmp/x; dd if=/tmp/x of=/dev/wanted conv=fsync 2>/dev/null; test -b /dev/wanted && echo block"); out != "block\n" {
		t.Errorf("the raw device: %q", out)
	}
	if out := s.completes("raw again", "disk", true, "/dev/volumes/disk", "head -n 1 /dev/volumes/disk"); out != "raw\n" {
		t.Errorf("the raw device has %q", out)
	}
}

// underAWriter does what an operator does to a volume in use.
func (s *storehouse) underAWriter() {
	t := s.t
	job := s.Run(t, s.job("writer", "guest", false, "/v", "date >/v/now; cat /v/file; while :; do date >/v/next; mv /v/next /v/now; sync; sleep 0.1; done", "service"))
	a := s.UntilRunning(t, job)
	s.UntilLogsHave(t, a.ID, "main", "stdout", "kept\n")
	target := filepath.Join(s.node.Dir, "nomad/client/csi/monolith/cradle/per-alloc", a.ID, "guest/rw-file-system-single-node-writer")
	control := s.node.Path(filepath.Join(spec.DirectDir, spec.DirectSocket(target)))

	s.CLI(t, "volume", "snapshot", "create", "guest", "running")
	s.frozen(1)
	before := s.stats(control)
	if before.Total < 800<<20 || before.Total > 1<<30 || before.Used == 0 {
		t.Errorf("the guest says %+v", before)
	}
	if out := s.CLI(t, "volume", "status", "guest"); !strings.Contains(out, a.ID[:8]) {
		t.Errorf("volume status:\n%s", out)
	}
	// The next plugin process answers for the volume as the killed one did.
	s.kill("nomad-driver-cradle")
	s.eventually("an answer of the next plugin process", func() bool {
		_, err := s.ask(control)
		return err == nil
	})
	s.volume("guest", `"1GiB"`, `"2GiB"`)
	if now := s.stats(control); now.Total < before.Total+800<<20 {
		t.Errorf("the file system had %v, and after growth it has %v", before.Total, now.Total)
	}
	s.CLI(t, "volume", "snapshot", "create", "guest", "again")
	s.CLI(t, "volume", "snapshot", "delete", "cradle", "guest@again")
	s.frozen(2)
	s.Stop(t, job)
	s.released("guest")
	if _, err := os.Stat(control); !os.IsNotExist(err) {
		t.Errorf("the control socket stays: %v", err)
	}
}

func (s *storehouse) ask(control string) (v spec.VolumeStats, err error) {
	short := filepath.Join(s.t.TempDir(), "s")
	if err := os.Symlink(control, short); err != nil {
		return v, err
	}
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", short)
	}}}
	req, err := http.NewRequestWithContext(s.t.Context(), http.MethodGet, "http://pod"+spec.DirectStatsPath, nil)
	if err != nil {
		return v, err
	}
	resp, err := client.Do(req)
	if err != nil {
		return v, err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s: %s", resp.Status, text)
	}
	if err == nil {
		err = json.Unmarshal(text, &v)
	}
	return v, err
}

func (s *storehouse) stats(control string) spec.VolumeStats {
	s.t.Helper()
	v, err := s.ask(control)
	if err != nil {
		s.t.Error(err)
	}
	return v
}

// frozen checks that the volume was frozen and thawed in time so many times, by what the driver and the CSI plugin have said.
func (s *storehouse) frozen(times int) {
	s.t.Helper()
	for _, call := range []string{"/freeze", "/thaw"} {
		s.eventually(fmt.Sprintf("call %d of %s in the client's log", times, call), func() bool {
			log, err := s.node.ClientLog()
			if err != nil {
				s.t.Fatal(err)
			}
			n := 0
			for line := range strings.Lines(log) {
				if strings.Contains(line, "volume is controlled") && strings.Contains(line, "volume=guest") && strings.Contains(line, call) {
					n++
				}
			}
			return n >= times
		})
	}
	all, _, err := s.API.Jobs().Allocations("cradle-csi", false, nil)
	if err != nil || len(all) == 0 {
		s.t.Fatal(all, err)
	}
	if text := s.Logs(s.t, all[0].ID, "cradle-csi", "stderr"); strings.Contains(text, "hold still") {
		s.t.Errorf("the guest did not hold still:\n%s", text)
	}
}

func (s *storehouse) kill(name string) {
	s.t.Helper()
	if !s.killed(name) {
		s.t.Fatalf("there is no %s", name)
	}
}

// killed kills a program of the node as kill -9 does; false is that there is none, which may just be starting again.
func (s *storehouse) killed(name string) bool {
	s.t.Helper()
	all, err := s.node.Processes()
	if err != nil {
		s.t.Fatal(err)
	}
	for _, p := range all {
		if !strings.HasPrefix(p.Name(), name) {
			continue
		}
		process, err := os.FindProcess(p.PID)
		if err == nil {
			err = process.Kill()
		}
		if err != nil {
			s.t.Fatalf("kill %s: %v", name, err)
		}
		return true
	}
	return false
}

// example is a file of examples/nomad/volumes for this node's paths.
func (s *storehouse) example(name string) string {
	s.t.Helper()
	text, err := os.ReadFile(filepath.Join(s.root, "examples/nomad/volumes", name))
	if err != nil {
		s.t.Fatal(err)
	}
	return strings.NewReplacer("/usr/local/bin/", filepath.Join(s.root, "bin")+"/", "/var/lib/cradle/filer", filepath.Join(s.node.Dir, "filer"),
		"/var/lib/cradle/volumes", filepath.Join(s.node.Dir, "volumes"), "/var/lib/nomad", filepath.Join(s.node.Dir, "nomad")).Replace(string(text))
}

// volume makes a volume from its example, or changes it: former text, text, …
func (s *storehouse) volume(name string, changes ...string) {
	s.t.Helper()
	text := strings.NewReplacer(changes...).Replace(s.example(name + ".volume.hcl"))
	s.used[name] = true
	path := filepath.Join(s.t.TempDir(), "volume.hcl")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		s.t.Fatal(err)
	}
	s.CLI(s.t, "volume", "create", path)
}

func (s *storehouse) job(name, volume string, block bool, at, script, kind string) string {
	attachment := "file-system"
	if block {
		attachment = "block-device"
	}
	claim := fmt.Sprintf(`
      source          = %q
      attachment_mode = %q
      access_mode     = "single-node-writer"`, volume, attachment)
	return s.pod(strings.ReplaceAll(name, " ", "-"), kind, "", claim, at, script)
}

// pod is a job with a volume as claim says.
func (s *storehouse) pod(name, kind, network, claim, at, script string) string {
	return fmt.Sprintf(`
job %q {
  type = %q
  group "g" {
    %s
    volume "v" {
      type            = "csi"%s
    }
    task "main" {
      driver = "cradle"
      volume_mount {
        volume      = "v"
        destination = %q
      }
      config {
        image   = "oci:%s"
        command = "sh"
        args    = ["-c", %q]
      }
      kill_timeout = "1s"
      resources {
        cpu    = 100
        memory = 64
      }
    }
  }
}`, name, kind, network, claim, at, s.image, script)
}

// completes runs a pod to its end and returns its output.
func (s *storehouse) completes(name, volume string, block bool, at, script string) string {
	s.t.Helper()
	a := s.UntilEnded(s.t, s.Run(s.t, s.job(name, volume, block, at, script, "batch")))
	out := s.Logs(s.t, a.ID, "main", "stdout")
	if a.ClientStatus != "complete" {
		s.t.Fatalf("job %s: %s\n%s%s\n%s", name, a.ClientStatus, out, s.Logs(s.t, a.ID, "main", "stderr"), s.Describe())
	}
	s.released(volume)
	return out
}

// released waits until a volume is neither mounted nor claimed.
func (s *storehouse) released(name string) {
	s.t.Helper()
	s.eventually("the end of the mounts of "+name, func() bool {
		table, err := os.ReadFile(fmt.Sprintf("/proc/%d/mountinfo", s.node.PID()))
		return err == nil && !strings.Contains(string(table), "/"+name+"/r")
	})
	s.eventually("the end of the claims of "+name, func() bool {
		v, _, err := s.API.CSIVolumes().Info(name, nil)
		return err == nil && len(v.ReadAllocs)+len(v.WriteAllocs) == 0
	})
}

func (s *storehouse) eventually(what string, f func() bool) {
	s.t.Helper()
	for end := time.Now().Add(nomadtest.Patience); !f(); time.Sleep(100 * time.Millisecond) {
		if time.Now().After(end) {
			s.t.Fatalf("%s: not within %v\n%s", what, nomadtest.Patience, s.Describe())
		}
	}
}

// clear ends what has volumes and removes those, while there is a plugin that can.
func (s *storehouse) clear() {
	jobs, _, err := s.API.Jobs().List(nil)
	if err != nil {
		s.t.Error(err)
	}
	for _, j := range jobs {
		if j.ID != "cradle-csi" && j.ID != "cradle-filer" && j.Status != "dead" {
			s.Stop(s.t, j.ID)
		}
	}
	for name := range s.used {
		s.released(name)
	}
	if s.used["copy"] {
		s.CLI(s.t, "volume", "delete", "copy")
		s.CLI(s.t, "volume", "snapshot", "delete", "cradle", "guest@running")
		delete(s.used, "copy")
	}
	for name := range s.used {
		s.CLI(s.t, "volume", "delete", name)
	}
	if left, err := os.ReadDir(s.node.Path(spec.DirectDir)); len(left) > 0 || err != nil && !os.IsNotExist(err) {
		s.t.Errorf("left of direct attachments: %v, %v", left, err)
	}
}
