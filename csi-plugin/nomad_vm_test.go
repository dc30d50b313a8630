//go:build vm

package main

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cradlestack/cradlestack/csi-plugin/volume/volumetest"
	"github.com/cradlestack/cradlestack/internal/nomadtest"
	"github.com/cradlestack/cradlestack/spec"
	"github.com/cradlestack/cradlestack/test/programs"
)

// A stack is a Nomad with the plugin.
type stack struct {
	*nomadtest.Cluster
	t       *testing.T
	node    *nomadtest.Node
	id      string // the plugin's
	plugins string // folder of host volume plugins
	zfs     bool   // backend zfs, each node with a zpool of its name; else dir
}

// dataset is where the node's plugin keeps its volumes with zfs.
func (s *stack) dataset() string { return s.node.Name + "/cradle" }

// startStack runs the plugin as its example says.
func startStack(t *testing.T) *stack {
	s := startNomad(t)
	s.plugin()
	return s
}

// startNomad is a Nomad without the plugin.
func startNomad(t *testing.T) *stack {
	s := &stack{t: t, id: "cradle", plugins: t.TempDir()}
	s.start(strings.ReplaceAll(s.example("cradle-host-volume"), "/var/lib/cradle/host-volumes", filepath.Join(s.plugins, "pool")))
	return s
}

// start runs a Nomad whose plugin of host volumes is a script.
func (s *stack) start(script string) {
	t := s.t
	if err := os.WriteFile(filepath.Join(s.plugins, "cradle-host-volume"), []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	s.Cluster = nomadtest.Start(t, nomadtest.Options{
		Drivers: []string{"raw_exec", "exec"}, Plugins: s.drivers(),
		Client: fmt.Sprintf("host_volume_plugin_dir = %q\nchroot_env {\n  \"/bin/busybox\" = \"/bin/busybox\"\n}", s.plugins),
		// Of the last two, empty folders stay: Nomad's, and the one of the records, which empty looks into.
		Keep: []string{"volumes", "nomad/client/csi", "/run/cradle", "nomad/host_volumes"},
	})
	s.node = s.Clients()[0]
	t.Cleanup(s.stopUsers)
}

// drivers is what Nomad's are told.
func (s *stack) drivers() map[string]nomadtest.Plugin {
	if s.zfs { // that machine's root is its initramfs, which nothing can be pivoted from
		return map[string]nomadtest.Plugin{"exec": {Config: "no_pivot_root = true"}}
	}
	return nil
}

// stopUsers ends the jobs that have volumes while there is a plugin that can unmount them.
func (s *stack) stopUsers() {
	if s.t.Failed() {
		s.lastWords()
	}
	jobs, _, err := s.API.Jobs().List(nil)
	if err != nil {
		s.t.Error(err)
	}
	for _, j := range jobs {
		if !strings.HasPrefix(j.ID, "cradle-csi") && j.Status != "dead" {
			s.Stop(s.t, j.ID)
		}
	}
	s.eventually("the end of all mounts", func() bool { return len(s.mounts("/csi/monolith/")) == 0 })
}

// lastWords shows what tasks have said last, the plugins' among them.
func (s *stack) lastWords() {
	for _, n := range s.Clients() {
		logs, _ := filepath.Glob(filepath.Join(n.Dir, "nomad/alloc/*/alloc/logs/*.std*.0"))
		for _, log := range logs {
			text, err := os.ReadFile(log)
			s.t.Logf("%s, %v:\n%s", log, err, text[max(0, len(text)-4<<10):])
		}
	}
}

// plugin runs the plugin and waits until Nomad has seen it.
func (s *stack) plugin() {
	s.t.Helper()
	s.Run(s.t, s.example("cradle-csi.nomad.hcl"))
	s.healthy()
}

func (s *stack) healthy() {
	s.t.Helper()
	s.eventually("a healthy plugin", func() bool {
		p, _, err := s.API.CSIPlugins().Info(s.id, nil)
		return err == nil && p.ControllersHealthy == 1 && p.NodesHealthy == 1
	})
}

func (s *stack) eventually(what string, f func() bool) {
	s.t.Helper()
	every := 100 * time.Millisecond
	if s.zfs { // in a machine that is emulated, where a look takes a second of its processors
		every = 3 * time.Second
	}
	for end := time.Now().Add(nomadtest.Patience); !f(); time.Sleep(every) {
		if time.Now().After(end) {
			s.t.Fatalf("%s: not within %v\n%s", what, nomadtest.Patience, s.Describe())
		}
	}
}

// example is a file of examples/nomad/volumes for this node's paths.
func (s *stack) example(name string) string {
	s.t.Helper()
	root, err := programs.Root()
	if err != nil {
		s.t.Fatal(err)
	}
	text, err := os.ReadFile(filepath.Join(root, "examples/nomad/volumes", name))
	if err != nil {
		s.t.Fatal(err)
	}
	changes := []string{"/usr/local/bin/cradle-csi", filepath.Join(root, "bin/cradle-csi")}
	if s.node != nil && s.zfs {
		changes = append(changes, `"--pool", "/var/lib/cradle/volumes"`, fmt.Sprintf(`"--backend", "zfs", "--pool", %q`, s.dataset()))
	}
	if s.node != nil {
		changes = append(changes, "/var/lib/cradle/volumes", filepath.Join(s.node.Dir, "volumes"), "/var/lib/nomad", filepath.Join(s.node.Dir, "nomad"),
			"/srv/cradle-cold", filepath.Join(s.Dir(), "cold"), "/etc/cradle/cold.key", filepath.Join(s.Dir(), "key"))
	}
	return strings.NewReplacer(changes...).Replace(string(text))
}

// volume makes a volume from its example, with changes: former text, text, …
func (s *stack) volume(name string, changes ...string) {
	s.t.Helper()
	s.CLI(s.t, "volume", "create", s.file(strings.NewReplacer(changes...).Replace(s.example(name+".volume.hcl"))))
}

// file writes a text to a file of its own.
func (s *stack) file(text string) string {
	s.t.Helper()
	path := filepath.Join(s.t.TempDir(), "spec.hcl")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		s.t.Fatal(err)
	}
	return path
}

// A use is a job with a volume.
type use struct {
	job, volume, script string
	block, readOnly     bool
	mode                string // default single-node-writer
}

func (u use) hcl() string {
	attachment, mode := "file-system", u.mode
	if u.block {
		attachment = "block-device"
	}
	if mode == "" {
		mode = "single-node-writer"
	}
	return fmt.Sprintf(`
job %q {
  type = "batch"
  group "g" {
    restart {
      attempts = 0
      mode     = "fail"
    }
    reschedule {
      attempts  = 0
      unlimited = false
    }
    volume "v" {
      type            = "csi"
      source          = %q
      attachment_mode = %q
      access_mode     = %q
      read_only       = %t
    }
    task "t" {
      driver = "exec"
      volume_mount {
        volume      = "v"
        destination = "/v"
      }
      config {
        command = "/bin/busybox"
        args    = ["sh", "-c", %q]
      }
    }
  }
}`, u.job, u.volume, attachment, mode, u.readOnly, "export PATH=/; b=/bin/busybox; set -e; "+u.script)
}

// completes runs a job to its end and returns its output.
func (s *stack) completes(u use) string {
	s.t.Helper()
	out := s.ended(u.hcl())
	s.released(u.volume)
	return out
}

// ended runs a job to its end, which has to be a good one, and returns its output.
func (s *stack) ended(hcl string) string {
	s.t.Helper()
	job := s.Run(s.t, hcl)
	a := s.UntilEnded(s.t, job)
	out := s.Logs(s.t, a.ID, "t", "stdout")
	if a.ClientStatus != "complete" {
		s.t.Fatalf("job %s: %s\n%s%s\n%s", job, a.ClientStatus, out, s.Logs(s.t, a.ID, "t", "stderr"), s.Describe())
	}
	return strings.TrimSpace(out)
}

// mounts are those below the node's directory that have a text in them: it sees what others have mounted on the host.
func (s *stack) mounts(text string) (found []string) {
	s.t.Helper()
	table, err := os.ReadFile(fmt.Sprintf("/proc/%d/mountinfo", s.node.PID()))
	if err != nil {
		s.t.Fatal(err)
	}
	for line := range strings.Lines(string(table)) {
		if strings.Contains(line, s.node.Dir+"/") && strings.Contains(line, text) {
			found = append(found, line)
		}
	}
	return found
}

// released waits until a volume is neither mounted nor claimed. Nomad 1.11 places a job for a volume that is claimed by another when
// something else happens, and not when the claim ends.
func (s *stack) released(name string) {
	s.t.Helper()
	s.eventually("the end of the mounts of "+name, func() bool { return len(s.mounts("/"+name+"/r")) == 0 })
	s.eventually("the end of the claims of "+name, func() bool {
		v, _, err := s.API.CSIVolumes().Info(name, nil)
		return err == nil && len(v.ReadAllocs)+len(v.WriteAllocs) == 0
	})
}

// TestRootNomad goes through what a user does with volumes, by Nomad's command line, with the examples as they stand.
func TestRootNomad(t *testing.T) {
	s := startNomad(t)
	s.part("Readme", testReadme) // which leaves the plugin
	s.volume("pages")            // its automatic snapshots come within a minute
	s.examples()
	s.part("HostVolume", testHostVolume)
}

// examples goes through all of CSI's but the README, with a volume pages that was just made.
func (s *stack) examples() {
	s.t.Helper()
	s.part("Files", testFiles)
	s.part("SnapshotAndClone", testSnapshotAndClone)
	s.part("Growth", testGrowth)
	s.part("BlockDevice", testBlockDevice)
	s.part("AttachedByTheGuest", testAttachedByTheGuest)
	s.part("Shared", testShared)
	s.part("Mistakes", testMistakes)
	s.eventually("automatic snapshots", func() bool {
		list := s.CLI(s.t, "volume", "snapshot", "list", "-plugin", "cradle")
		return strings.Contains(list, "pages@hourly-") && strings.Contains(list, "pages@monthly-")
	})
	for _, name := range []string{"database", "disk", "guest", "pages"} { // and the automatic ones with it
		s.CLI(s.t, "volume", "delete", name)
	}
	s.empty()
	s.part("Doctor", testDoctor)
}

// part runs a part of a test, which ends with it.
func (s *stack) part(name string, test func(*stack)) {
	s.t.Helper()
	if !s.t.Run(name, func(t *testing.T) {
		part := *s
		part.t = t
		test(&part)
	}) {
		s.t.FailNow()
	}
}

func testFiles(s *stack) {
	s.volume("database")
	s.completes(use{job: "write", volume: "database", script: "echo first >/v/file"})
	if got := s.completes(use{job: "read", volume: "database", script: "$b cat /v/file"}); got != "first" {
		s.t.Errorf("read %q", got)
	}
	s.released("database")
}

func testSnapshotAndClone(s *stack) {
	s.CLI(s.t, "volume", "snapshot", "create", "database", "before-upgrade")
	if list := s.CLI(s.t, "volume", "snapshot", "list", "-plugin", "cradle"); !strings.Contains(list, "database@before-upgrade") {
		s.t.Errorf("snapshots:\n%s", list)
	}
	s.completes(use{job: "write2", volume: "database", script: "echo second >/v/file"})
	s.volume("copy")
	if got := s.completes(use{job: "read2", volume: "copy", script: "$b cat /v/file"}); got != "first" {
		s.t.Errorf("the clone holds %q", got)
	}
	if _, stderr, code := s.TryCLI(s.t, "", "volume", "delete", "database"); code == 0 || !strings.Contains(stderr, "before-upgrade") {
		s.t.Errorf("delete a volume that has a snapshot: exit code %d, %s", code, stderr)
	}
	s.CLI(s.t, "volume", "snapshot", "delete", "cradle", "database@before-upgrade")
	s.released("copy")
	s.CLI(s.t, "volume", "delete", "copy")
}

func testGrowth(s *stack) {
	job := s.Run(s.t, use{job: "hold", volume: "database", script: "while test ! -e /v/end; do $b sleep 0.1; done; $b df -m /v"}.hcl())
	a := s.UntilRunning(s.t, job)
	s.volume("database", "320MiB", "640MiB")
	at := s.mounts("/per-alloc/" + a.ID)
	if len(at) != 1 {
		s.t.Fatalf("mounts of the allocation: %v", at)
	}
	target := strings.Fields(at[0])[4]
	if err := os.WriteFile(filepath.Join(s.node.Path(target), "end"), nil, 0o600); err != nil {
		s.t.Fatal(err)
	}
	s.UntilEnded(s.t, job)
	out := strings.Fields(s.Logs(s.t, a.ID, "t", "stdout"))
	if len(out) < 5 || len(out[len(out)-5]) != 3 || out[len(out)-5] < "500" {
		s.t.Errorf("df -m of the mounted file system says %q", out)
	}
	s.released("database")
}

func testBlockDevice(s *stack) {
	s.volume("disk")
	s.completes(use{job: "raw", volume: "disk", block: true, script: "test -b /v"})
	s.released("disk")
}

func testAttachedByTheGuest(s *stack) {
	s.volume("guest")
	job := s.Run(s.t, use{job: "direct", volume: "guest", script: "! echo x >/v/file; $b sleep 1000"}.hcl())
	a := s.UntilRunning(s.t, job)
	s.UntilLogsHave(s.t, a.ID, "t", "stderr", "Read-only file system")
	target := filepath.Join(s.node.Dir, "nomad/client/csi/monolith/cradle/per-alloc", a.ID, "guest/rw-file-system-single-node-writer")
	file := filepath.Join(spec.DirectDir, spec.DirectFile(target))
	data, err := os.ReadFile(s.node.Path(file))
	if err != nil {
		s.t.Fatal(err)
	}
	d, err := spec.ParseDirectAttachment(file, data)
	if err != nil {
		s.t.Fatal(err)
	}
	if d.Target != target || d.Volume.Name != "guest" || d.Volume.Block == nil || d.Limits.IOPS != 2000 || d.Limits.Bandwidth != 100<<20 {
		s.t.Errorf("the record is %s", data)
	}
	if size, err := sizeOf(d.Volume.Block.Path); err != nil || size != 1<<30 {
		s.t.Errorf("the image or device has %d bytes, %v", size, err)
	}
	if out, stderr, code := s.TryCLI(s.t, "", "volume", "delete", "guest"); code == 0 {
		s.t.Errorf("a volume in use is deleted: %s%s", out, stderr)
	}
	s.Stop(s.t, job)
	s.released("guest")
	s.eventually("the end of the record", func() bool {
		_, err := os.Stat(s.node.Path(file))
		return os.IsNotExist(err)
	})
}

// sizeOf is a file's or device's.
func sizeOf(path string) (int64, error) {
	f, err := os.Open(path)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	return f.Seek(0, io.SeekEnd)
}

func testShared(s *stack) {
	s.completes(use{job: "pages-write", volume: "pages", mode: "multi-node-multi-writer", script: "echo page >/v/index"})
	got := s.completes(use{
		job: "pages-read", volume: "pages", mode: "multi-node-reader-only", readOnly: true,
		script: "$b cat /v/index; if echo x 2>/dev/null >/v/index; then echo written; fi",
	})
	if got != "page" {
		s.t.Errorf("a reader has %q", got)
	}
	s.released("pages")
}

func testMistakes(s *stack) {
	for change, want := range map[[2]string]string{
		{`"lv2"`, `"gp"`}:                                     `parameter class: "gp" is none of nfs, lv2, gfs`,
		{`class = "lv2"`, `kind = "lv2"`}:                     `parameter "kind": there is none`,
		{`name         = "mistake"`, `name = "../etc"`}:       `volume name: "../etc" is no name`,
		{`"single-node-writer"`, `"multi-node-multi-writer"`}: `class lv2 has no access mode MULTI_NODE_MULTI_WRITER`,
		{`"320MiB"`, `"900TiB"`}:                              `no space`,
	} {
		spec := s.file(strings.NewReplacer(change[:]...).Replace(strings.ReplaceAll(s.example("database.volume.hcl"), `"database"`, `"mistake"`)))
		_, stderr, code := s.TryCLI(s.t, "", "volume", "create", spec)
		if code == 0 || !strings.Contains(stderr, want) {
			s.t.Errorf("%s → %s: exit code %d, %s; want %s", change[0], change[1], code, stderr, want)
		}
	}
}

// A dynamic host volume has its quota, is there after the client has been started again, and goes.
func testHostVolume(s *stack) {
	out := s.CLI(s.t, "volume", "create", s.file(s.example("local.volume.hcl")))
	hcl := func(job, script string) string {
		text := use{job: job, volume: "local", script: script, mode: "single-node-multi-writer"}.hcl()
		return strings.Replace(text, `"csi"`, `"host"`, 1)
	}
	run := func(job, script string) string { return s.ended(hcl(job, script)) }
	run("host-write", "echo kept >/v/file; if $b dd if=/dev/zero of=/v/big bs=1M count=100 2>/dev/null; then echo no quota; exit 1; fi; $b rm /v/big")
	if err := s.node.KillClient(); err != nil {
		s.t.Fatal(err)
	}
	if err := s.node.StartAgents(); err != nil {
		s.t.Fatal(err)
	}
	if got := run("host-read", "$b cat /v/file"); got != "kept" {
		s.t.Errorf("read %q", got)
	}
	_, id, _ := strings.Cut(out, "with ID ")
	id = strings.TrimSpace(strings.Split(id, "\n")[0])
	if len(s.mounts("/host_volumes/"+id)) == 0 {
		s.t.Errorf("volume %q is mounted nowhere: %s", id, out)
	}
	s.CLI(s.t, "volume", "delete", "-type", "host", id)
	if left := s.mounts("/host_volumes/"); len(left) > 0 {
		s.t.Errorf("left mounted: %v", left)
	}
}

// testReadme runs the README's commands, in a Nomad that has no plugin yet.
func testReadme(s *stack) {
	root, err := programs.Root()
	if err != nil {
		s.t.Fatal(err)
	}
	text, err := os.ReadFile(filepath.Join(root, "README.md"))
	if err != nil {
		s.t.Fatal(err)
	}
	_, block, _ := strings.Cut(string(text), "<!-- run in Nomad -->\n```sh\n")
	block, _, ok := strings.Cut(block, "```")
	if !ok || strings.Count(block, "\n") < 5 {
		s.t.Fatalf("the README has no commands for Nomad: %q", block)
	}
	for line := range strings.Lines(block) {
		args := strings.Fields(line)
		for i, arg := range args {
			if strings.HasSuffix(arg, ".hcl") {
				args[i] = s.file(s.example(arg))
			}
		}
		s.CLI(s.t, args[1:]...)
		if args[1] == "job" {
			s.healthy()
		}
	}
	s.empty()
}

// empty checks that nothing is left of any volume.
func (s *stack) empty() {
	s.t.Helper()
	if s.zfs {
		if out, err := exec.Command("zfs", "list", "-H", "-r", "-t", "all", "-o", "name", s.dataset()).CombinedOutput(); err != nil || strings.TrimSpace(string(out)) != s.dataset() {
			s.t.Errorf("left in the pool: %s, %v", out, err)
		}
	} else if names := volumetest.Left(s.t, filepath.Join(s.node.Dir, "volumes")); len(names) > 0 && !slices.Equal(names, []string{"note:"}) { // the pool's own
		s.t.Errorf("left in the pool: %v", names)
	}
	if records, err := os.ReadDir(s.node.Path(spec.DirectDir)); len(records) > 0 || err != nil && !os.IsNotExist(err) {
		s.t.Errorf("left of direct attachments: %v, %v", records, err)
	}
	if mounts := s.mounts("/csi/monolith/"); len(mounts) > 0 {
		s.t.Errorf("left mounted: %v", mounts)
	}
}

// TestRootNomadKilled kills the plugin, and then the whole node, under a job that writes: mounts outlive the plugin, and what was synced
// outlives the node.
func TestRootNomadKilled(t *testing.T) { testKilled(startStack(t)) }

func testKilled(s *stack) {
	t := s.t
	s.volume("database")
	const script = "i=$($b cat /v/last || echo 0); while :; do i=$(($i+1)); echo $i >/v/new; $b sync -f /v; $b mv /v/new /v/last; if test -e /v/end; then exit; fi; $b sleep 0.01; done"
	job := s.Run(t, use{job: "write", volume: "database", script: script}.hcl())
	a := s.UntilRunning(t, job)
	mounts := s.mounts("/per-alloc/" + a.ID)
	if len(mounts) != 1 {
		t.Fatalf("mounts of the allocation: %v", mounts)
	}
	inside := s.node.Path(strings.Fields(mounts[0])[4])
	last := func() string {
		data, err := os.ReadFile(filepath.Join(inside, "last"))
		if err != nil {
			t.Fatal(err)
		}
		return string(data)
	}
	s.eventually("a write", func() bool { _, err := os.Stat(filepath.Join(inside, "last")); return err == nil })

	for range 3 {
		if err := os.NewSyscallError("kill", s.kill("cradle-csi")); err != nil {
			t.Fatal(err)
		}
		before := last()
		s.eventually("another write without the plugin", func() bool { return last() != before })
	}
	s.healthy()
	if now := s.mounts("/per-alloc/" + a.ID); len(now) != 1 || now[0] != mounts[0] {
		t.Errorf("the mount was %s and is %v", mounts[0], now)
	}
	if err := os.WriteFile(filepath.Join(inside, "end"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	s.UntilEnded(t, job)
	s.released("database")

	s.completes(use{job: "clear", volume: "database", script: "$b rm /v/end"})
	job = s.Run(t, use{job: "again", volume: "database", script: script}.hcl())
	a = s.UntilRunning(t, job)
	inside = s.node.Path(strings.Fields(s.mounts("/per-alloc/" + a.ID)[0])[4])
	before := last()
	s.eventually("a write", func() bool { return last() != before })
	synced := last()
	if err := s.node.Crash(); err != nil {
		t.Fatal(err)
	}
	if err := s.node.Boot(); err != nil {
		t.Fatal(err)
	}
	s.healthy()
	s.Stop(t, job)
	s.released("database")
	got := s.completes(use{job: "look", volume: "database", script: "$b cat /v/last"})
	if atoi(t, got) < atoi(t, synced) {
		t.Errorf("%s was synced before the crash, and %s is there", strings.TrimSpace(synced), got)
	}
	s.released("database")
	s.CLI(t, "volume", "delete", "database")
	s.empty()
}

// testDoctor lets a task end while there is no plugin, under a client that forgets about it: Nomad 1.11 leaves the volume mounted
// for good. The doctor ends that, and what else is left over.
func testDoctor(s *stack) {
	t := s.t
	s.volume("database")
	job := s.Run(t, use{job: "orphan", volume: "database", script: "$b sleep 1000"}.hcl())
	a := s.UntilRunning(t, job)
	s.Stop(t, "cradle-csi")
	s.Stop(t, job)
	if err := s.node.KillClient(); err != nil {
		t.Fatal(err)
	}
	if err := s.node.StartAgents(); err != nil {
		t.Fatal(err)
	}
	s.plugin()

	pool, half := filepath.Join(s.node.Dir, "volumes"), ""
	if s.zfs {
		pool = s.dataset()
		half = pool + "/receive:half: a copy to or from cold storage did not come to its end"
		if out, err := exec.Command("zfs", "create", "-s", "-V", "16M", pool+"/receive:half").CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
	} else {
		half = pool + "/.half: it was not completed"
		if err := os.MkdirAll(filepath.Join(pool, ".half"), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	gone := filepath.Join(s.node.Dir, "tmp/target")
	record := fmt.Sprintf(`{"version": 1, "target": %q, "volume": {"name": "gone", "block": {"path": "/image"}}, "control": "/run/x.sock"}`, gone)
	direct := s.node.Path(spec.DirectDir)
	if err := os.MkdirAll(direct, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(direct, spec.DirectFile(gone)), []byte(record), 0o600); err != nil {
		t.Fatal(err)
	}

	doctor := func(more ...string) string {
		t.Helper()
		root, err := programs.Root()
		if err != nil {
			t.Fatal(err)
		}
		backend := "dir"
		if s.zfs {
			backend = "zfs"
		}
		out, err := s.node.Output(t.Context(), filepath.Join(root, "bin/cradle-csi"), append([]string{"doctor", "--backend", backend, "--pool", pool, "--nomad", "http://127.0.0.1:4646"}, more...)...)
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	wants := []string{
		"/per-alloc/" + a.ID + "/database/rw-file-system-single-node-writer: still mounted, and allocation " + a.ID + " has ended",
		half,
		"volume gone: the record of an attachment at " + gone,
	}
	for _, look := range []bool{true, false} {
		verb, args := "repaired: ", []string(nil)
		if look {
			verb, args = "found: ", []string{"--look"}
		}
		out := doctor(args...)
		for _, want := range wants {
			if !strings.Contains(out, verb) || !strings.Contains(out, want) {
				t.Errorf("look: %t: no %q in\n%s", look, want, out)
			}
		}
	}
	s.eventually("the end of the mount", func() bool { return len(s.mounts("/per-alloc/")) == 0 })
	if out := doctor(); out != "nothing to repair\n" {
		t.Errorf("again: %s", out)
	}
	s.completes(use{job: "next", volume: "database", script: "echo x >/v/file"})
	s.CLI(t, "volume", "delete", "database")
	s.empty()
}

func atoi(t *testing.T, s string) (n int) {
	t.Helper()
	if err := json.Unmarshal([]byte(strings.TrimSpace(s)), &n); err != nil {
		t.Fatalf("%q: %v", s, err)
	}
	return n
}

// kill ends a program of the node as kill -9 does.
func (s *stack) kill(name string) error {
	s.t.Helper()
	all, err := s.node.Processes()
	if err != nil {
		return err
	}
	for _, p := range all {
		if p.Name() == name {
			return killProcess(p.PID)
		}
	}
	return nil // it is just starting again
}

func killProcess(pid int) error {
	p, err := os.FindProcess(pid)
	if err != nil {
		return err
	}
	return p.Kill()
}
