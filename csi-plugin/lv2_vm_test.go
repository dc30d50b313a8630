//go:build vm

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/nomad/api"

	"github.com/cradlestack/cradlestack/csi-plugin/cold"
	"github.com/cradlestack/cradlestack/csi-plugin/volume"
	"github.com/cradlestack/cradlestack/internal/nomadtest"
	"github.com/cradlestack/cradlestack/test/programs"
)

// startHosts is a Nomad with two nodes, each with a plugin of its own as the example says, and cold storage that both have.
func startHosts(t *testing.T) *stack {
	s := &stack{t: t}
	s.startHosts()
	return s
}

func (s *stack) startHosts() {
	t := s.t
	server := ""
	if s.zfs { // in a machine that is emulated, and may stand still for a while beside others
		server = `heartbeat_grace = "2m"`
	}
	s.Cluster = nomadtest.Start(t, nomadtest.Options{
		Server: server, Clients: 2, Drivers: []string{"raw_exec", "exec"}, Plugins: s.drivers(),
		Client: "chroot_env {\n  \"/bin/busybox\" = \"/bin/busybox\"\n}",
		Keep:   []string{"volumes", "nomad/client/csi", "/run/cradle"},
	})
	newKey(t, filepath.Join(s.Dir(), "key"))
	for _, n := range s.Clients() {
		s.on(n)
		job := s.example("cradle-csi-host.nomad.hcl")
		if s.zfs { // where the copies' folder is in memory, which counts as that of who has written it
			job = strings.Replace(job, `driver = "raw_exec"`, "driver = \"raw_exec\"\n      resources {\n        memory = 1024\n      }", 1)
		}
		s.CLI(t, "job", "run", "-detach", "-var", "node="+n.Name, s.file(job))
	}
	for _, n := range s.Clients() {
		s.on(n)
		s.healthy()
	}
	t.Cleanup(s.stopUsers)
}

// on makes a node the one that is spoken of.
func (s *stack) on(n *nomadtest.Node) { s.node, s.id = n, "cradle-"+n.Name }

// csi is a cradle-csi that runs beside the server once it is launched, and what it prints.
func (s *stack) csi(args ...string) (*exec.Cmd, *bytes.Buffer) {
	s.t.Helper()
	program, err := programs.Path("cradle-csi")
	if err != nil {
		s.t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), nomadtest.Patience)
	s.t.Cleanup(cancel)
	cmd := s.Server().Command(ctx, program, args...)
	cmd.Env = s.Env()
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	return cmd, &out
}

func (s *stack) try(args ...string) (string, error) {
	s.t.Helper()
	cmd, out := s.csi(args...)
	if err := s.Server().Launch(cmd); err != nil {
		s.t.Fatal(err)
	}
	err := cmd.Wait()
	return out.String(), err
}

// here runs cradle-csi on the node, for its plugin.
func (s *stack) here(args ...string) (string, error) {
	s.t.Helper()
	program, err := programs.Path("cradle-csi")
	if err != nil {
		s.t.Fatal(err)
	}
	cmd := s.node.Command(s.t.Context(), program, append(args, "--endpoint", s.socket())...)
	cmd.Env = append(cmd.Env, "NOMAD_ADDR=http://"+s.Server().IP.String()+":4646")
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := s.node.Launch(cmd); err != nil {
		s.t.Fatal(err)
	}
	err = cmd.Wait()
	return out.String(), err
}

// socket is the plugin's on the node; what former allocations have left serves nobody.
func (s *stack) socket() string {
	s.t.Helper()
	all, _, err := s.API.Jobs().Allocations("cradle-csi-"+s.node.Name, true, nil)
	if err != nil {
		s.t.Fatal(err)
	}
	i := slices.IndexFunc(all, func(a *api.AllocationListStub) bool { return nomadtest.Running(a) })
	if i < 0 {
		s.t.Fatalf("no plugin runs on %s", s.node.Name)
	}
	return filepath.Join(s.node.Dir, "nomad/client/csi/plugins", all[i].ID, "csi.sock")
}

// copied waits for a copy of what the volume holds by now: without its snapshot of this hour, and started anew, the plugin makes one at once.
func (s *stack) copied(id string) {
	s.t.Helper()
	since := time.Now().Truncate(time.Second)
	var listed string
	s.eventually("a list of snapshots", func() bool { // Nomad has to have heard that the plugin, which may just have been started, has such a list
		out, _, code := s.TryCLI(s.t, "", "volume", "snapshot", "list", "-plugin", s.id)
		listed = out
		return code == 0
	})
	for _, field := range strings.Fields(listed) {
		if strings.HasPrefix(field, id+"@cold-") {
			s.eventually("the end of "+field, func() bool { // it is in use as long as it is being copied
				_, stderr, code := s.TryCLI(s.t, "", "volume", "snapshot", "delete", s.id, field)
				if code != 0 && !strings.Contains(stderr, "in use") {
					s.t.Fatalf("delete snapshot %s: %s", field, stderr)
				}
				return code == 0
			})
		}
	}
	key, err := cold.ReadKey(filepath.Join(s.Dir(), "key"))
	if err != nil {
		s.t.Fatal(err)
	}
	folder, err := cold.OpenFolder(filepath.Join(s.Dir(), "cold"))
	if err != nil {
		s.t.Fatal(err)
	}
	vault := cold.NewVault(folder, key)
	former, err := vault.Find(s.t.Context(), id) // which may be of this second, too
	if err != nil && !errors.Is(err, volume.ErrNotFound) {
		s.t.Fatal(err)
	}
	if err := s.kill("cradle-csi"); err != nil {
		s.t.Fatal(err)
	}
	s.eventually("a copy of "+id, func() bool {
		c, err := vault.Find(s.t.Context(), id)
		return err == nil && !c.Taken.Before(since) && c != former
	})
	s.healthy()
}

// keeps is a job that compares the files of a volume, should it have some, with their sums, and then writes others.
func keeps(volume string) string {
	const script = `cd /v
if test -e sums; then $b sha256sum -c sums; $b rm sums; echo all is whole; fi
for i in 1 2 3 4 5; do $b dd if=/dev/urandom of=file$i bs=1M count=8 2>/dev/null; done
$b sha256sum file* >sums.new; $b mv sums.new sums; $b sync -f .; echo all is written
while :; do $b sleep 1; done`
	return strings.Replace(use{job: "keeps", volume: volume, script: script}.hcl(), `type = "batch"`, `type = "service"`, 1)
}

// whole waits until the job runs on the node and has found all files as they were.
func (s *stack) whole() *api.AllocationListStub {
	s.t.Helper()
	a := s.UntilAlloc(s.t, "keeps", "a place on "+s.node.Name, func(a *api.AllocationListStub) bool {
		return a.NodeName == s.node.Name && nomadtest.Running(a)
	})
	s.UntilLogsHave(s.t, a.ID, "t", "stdout", "all is whole")
	return a
}

// ledger is the allocation of a job that keeps files in a new volume of that name on a node.
func (s *stack) ledger(n *nomadtest.Node) *api.AllocationListStub {
	s.t.Helper()
	s.on(n)
	s.volume("ledger", "cradle-node1", s.id)
	s.Run(s.t, keeps("ledger"))
	return s.UntilRunning(s.t, "keeps")
}

// destroyed ends that job once its files are written and copied, and takes the volume away without anybody's knowledge; with zfs the whole pool.
func (s *stack) destroyed(a *api.AllocationListStub) {
	s.t.Helper()
	s.UntilLogsHave(s.t, a.ID, "t", "stdout", "all is written")
	s.copied("ledger")
	s.Stop(s.t, "keeps")
	s.released("ledger")
	if s.zfs {
		s.newZpool()
		return
	}
	if err := os.RemoveAll(filepath.Join(s.node.Dir, "volumes/ledger")); err != nil {
		s.t.Fatal(err)
	}
}

// newZpool destroys the node's zpool and makes it anew, as an operator does with new disks. The plugin is started again then, which makes its dataset.
func (s *stack) newZpool() {
	s.t.Helper()
	name := s.node.Name
	disk := strings.Fields(s.command("zpool", "list", "-H", "-P", "-v", "-o", "name", name))[1]
	s.eventually("the end of the zpool", func() bool { return exec.Command("zpool", "destroy", "-f", name).Run() == nil }) // the plugin may just look at it
	s.eventually("word of the missing zpool", func() bool {
		_, stderr, code := s.TryCLI(s.t, "", "volume", "snapshot", "list", "-plugin", s.id)
		return code != 0 && strings.Contains(stderr+s.unhealthy(), "import its zpool")
	})
	s.command("zpool", "create", "-f", "-O", "mountpoint=none", name, disk)
	if err := s.kill("cradle-csi"); err != nil {
		s.t.Fatal(err)
	}
	s.eventually("the plugin's dataset", func() bool { return exec.Command("zfs", "list", s.dataset()).Run() == nil })
}

// unhealthy is why Nomad does not ask the node's plugin for anything; "" where it does.
func (s *stack) unhealthy() string {
	s.t.Helper()
	stubs, _, err := s.API.Nodes().List(nil)
	if err != nil {
		s.t.Fatal(err)
	}
	for _, stub := range stubs {
		if stub.Name != s.node.Name {
			continue
		}
		n, _, err := s.API.Nodes().Info(stub.ID, nil)
		if err != nil {
			s.t.Fatal(err)
		}
		if c := n.CSIControllerPlugins[s.id]; c != nil && !c.Healthy {
			return c.HealthDescription
		}
	}
	return ""
}

// command runs a program of the host's, which has to succeed.
func (s *stack) command(name string, args ...string) string {
	s.t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		s.t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

// TestRootNomadHosts is the short form of what lv2_soak_test.go does with two hosts: a volume that was destroyed comes back on the other one, and its files are copied to one of another
// class on the first.
func TestRootNomadHosts(t *testing.T) {
	s := startHosts(t)
	one, two := s.Clients()[0], s.Clients()[1]
	s.destroyed(s.ledger(one))
	if out, err := s.try("lv2", "restore", "ledger", "--to", two.Name); err != nil || !strings.HasSuffix(out, "volume ledger is on node "+two.Name+" now\n") {
		t.Fatalf("%v\n%s", err, out)
	}
	s.on(two)
	s.Run(t, keeps("ledger"))
	b := s.whole()
	s.UntilLogsHave(t, b.ID, "t", "stdout", "all is written")
	s.Stop(t, "keeps")
	s.released("ledger")
	if out, err := s.try("copy", "ledger", "--as", "pages", "--class", "nfs", "--to", one.Name); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	s.CLI(t, "volume", "delete", "ledger")
	s.empty()
	s.on(one)
	if out := s.completes(use{job: "look", volume: "pages", script: "cd /v; $b sha256sum -c -s sums; echo all is whole"}); out != "all is whole" {
		t.Errorf("the copy: %s", out)
	}
	s.CLI(t, "volume", "delete", "pages")
	s.empty()
}

// A volume of a job with per_alloc has an id in Nomad that can be no plugin's name for it.
func TestRootNomadNumbered(t *testing.T) {
	s := startHosts(t)
	one, two := s.Clients()[0], s.Clients()[1]
	const id = "ledger[0]"
	s.on(one)
	s.volume("ledger", "cradle-node1", s.id, `= "ledger"`+"\nname", fmt.Sprintf("= %q\nname", id))
	s.copied("ledger")
	if err := os.RemoveAll(filepath.Join(s.node.Dir, "volumes/ledger")); err != nil {
		t.Fatal(err)
	}
	if out, err := s.try("lv2", "restore", id, "--to", two.Name); err != nil || !strings.HasSuffix(out, "volume "+id+" is on node "+two.Name+" now\n") {
		t.Fatalf("%v\n%s", err, out)
	}
	s.on(two)
	if v, _, err := s.API.CSIVolumes().Info(id, nil); err != nil || v.PluginID != s.id || v.ExternalID != "ledger" {
		t.Errorf("Nomad knows %+v, %v", v, err)
	}
	s.CLI(t, "volume", "delete", id)
	s.empty()
}

// A volume that was restored on a node, deleted, made anew on another one and lost there comes back on that node with a generation of its own: the lost one can't come back, as it could while both
// had the same.
func TestRootNomadAnew(t *testing.T) {
	s := startHosts(t)
	one, two := s.Clients()[0], s.Clients()[1]
	lose := func() (back func()) { // the volume's folder is away, as with its host
		t.Helper()
		was := filepath.Join(s.node.Dir, "volumes/ledger")
		if err := os.Rename(was, s.node.Dir+"/lost"); err != nil {
			t.Fatal(err)
		}
		return func() {
			t.Helper()
			if err := os.Rename(s.node.Dir+"/lost", was); err != nil {
				t.Fatal(err)
			}
		}
	}
	restore := func() {
		t.Helper()
		for range 2 { // the second time nothing is left to do
			if out, err := s.try("lv2", "restore", "ledger", "--to", two.Name); err != nil || !strings.HasSuffix(out, "volume ledger is on node "+two.Name+" now\n") {
				t.Fatalf("%v\n%s", err, out)
			}
		}
	}
	discard := func(want string) {
		t.Helper()
		if out, err := s.here("lv2", "discard", "ledger"); !strings.Contains(out, want) {
			t.Errorf("discard on %s: %v, %s; want %s", s.node.Name, err, out, want)
		}
	}
	s.on(one)
	s.volume("ledger", "cradle-node1", s.id)
	s.copied("ledger")
	back := lose()
	restore()
	back()
	discard("generation 0 is removed; generation 1 is on node " + two.Name)
	s.CLI(t, "volume", "delete", "ledger")
	s.volume("ledger", "cradle-node1", s.id)
	s.copied("ledger")
	back = lose()
	restore()
	back()
	discard("generation 1 is removed; generation 2 is on node " + two.Name)
	s.on(two)
	discard("it is the one that is in use")
	s.CLI(t, "volume", "delete", "ledger")
	s.empty()
}
