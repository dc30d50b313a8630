//go:build vm && soak

package main

import (
	"bytes"
	mathrand "math/rand/v2"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/nomad/api"
	"golang.org/x/sys/unix"

	"github.com/cradlestack/cradlestack/internal/nomadtest"
)

// TestVMSoakHosts does what takes more than one host.
func TestVMSoakHosts(t *testing.T) {
	testHosts(startHosts(t), testCopy, testDrain, testLost)
}

func testHosts(s *stack, tests ...func(*stack)) {
	for _, test := range tests {
		test(s)
	}
	for _, n := range s.Clients() {
		s.on(n)
		s.empty()
	}
}

// testLost loses a host. Its volume comes back on the other one, of the newest copy; and when the host does, what it has of the volume can't be used.
func testLost(s *stack) {
	t := s.t
	one, two := s.Clients()[0], s.Clients()[1]
	s.on(one)
	s.volume("ledger", "cradle-node1", s.id)
	s.Run(t, keeps("ledger"))
	a := s.UntilRunning(t, "keeps")
	s.UntilLogsHave(t, a.ID, "t", "stdout", "all is written")
	s.volume("ledger", `"ledger"`, `"spare"`, `"cradle-node1"`, `"`+s.id+`"`+"\nclone_id = \"ledger\"")
	s.copied("ledger")
	s.copied("spare")

	if out, err := s.try("lv2", "restore", "ledger", "--to", two.Name); err == nil || !strings.Contains(out, "uses it on node "+one.Name+", which is ready: stop job keeps first") {
		t.Errorf("restored a volume in use: %v\n%s", err, out)
	}
	if err := one.Crash(); err != nil {
		t.Fatal(err)
	}
	s.Until(t, "the loss of "+one.Name, func(st *nomadtest.State) bool { return st.Node(one.Name).Status == api.NodeStatusDown })
	s.on(two)
	begin := time.Now()
	if out, err := s.try("lv2", "restore", "spare", "--to", two.Name); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	took := time.Since(begin)
	kills, _ := s.betweenKills(took, interruptions, "lv2", "restore", "ledger", "--to", two.Name)
	for range 2 { // the second time nothing is left to do
		if out, err := s.try("lv2", "restore", "ledger", "--to", two.Name); err != nil || !strings.HasSuffix(out, "volume ledger is on node "+two.Name+" now\n") {
			t.Fatalf("%v\n%s", err, out)
		}
	}
	b := s.whole()
	v, _, err := s.API.CSIVolumes().Info("ledger", nil)
	if err != nil || v.PluginID != s.id || v.Context["cold"] == "" {
		t.Errorf("Nomad knows %+v, %v", v, err)
	}
	restores := 1
	for ; kills < interruptions; restores++ { // what was restored is deleted, and restored again
		s.CLI(t, "volume", "delete", "spare")
		more, _ := s.betweenKills(took, interruptions-kills, "lv2", "restore", "spare", "--to", two.Name)
		kills += more
		if out, err := s.try("lv2", "restore", "spare", "--to", two.Name); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
	}
	t.Logf("a restore takes %v; %d were interrupted %d times", took.Round(time.Millisecond), restores, kills)
	if out := s.completes(use{job: "look", volume: "spare", script: "cd /v; $b sha256sum -c -s sums && echo all is whole"}); out != "all is whole" {
		t.Errorf("the other volume that was restored: %s", out)
	}
	s.released("spare")
	s.CLI(t, "volume", "delete", "spare")

	s.on(one)
	if err := one.Boot(); err != nil {
		t.Fatal(err)
	}
	s.healthy()
	s.CLI(t, "volume", "register", s.file(`id = "former"
name        = "former"
type        = "csi"
external_id = "ledger"
plugin_id   = "`+s.id+`"
capability {
  access_mode     = "single-node-writer"
  attachment_mode = "file-system"
}
topology_request {
  required {
    topology {
      segments { "csi.cradlestack.org/host" = "`+one.Name+`" }
    }
  }
}`))
	s.Run(t, use{job: "former", volume: "former", script: "echo used"}.hcl())
	s.UntilAlloc(t, "former", "its refusal", func(a *api.AllocationListStub) bool {
		return a.TaskStates["t"] != nil && slices.ContainsFunc(a.TaskStates["t"].Events, func(e *api.TaskEvent) bool {
			return strings.Contains(e.DisplayMessage, "it was restored on node "+two.Name)
		})
	})
	s.Stop(t, "former")
	s.eventually("the end of the claim", func() bool { return s.API.CSIVolumes().Deregister("former", true, nil) == nil })
	for _, id := range []string{"ledger", "spare"} {
		if out, err := s.here("lv2", "discard", id); err != nil || !strings.Contains(out, "volume "+id+": generation 0 is removed; generation 1 is on node "+two.Name) {
			t.Errorf("discard: %v, %s", err, out)
		}
	}
	s.on(two)
	if out, err := s.here("lv2", "discard", "ledger"); err == nil || !strings.Contains(out, "it is the one that is in use") {
		t.Errorf("discarded what is in use: %v, %s", err, out)
	}
	if now := s.UntilRunning(t, "keeps"); now.ID != b.ID {
		t.Errorf("allocation %s is followed by %s", b.ID, now.ID)
	}
	s.Stop(t, "keeps")
	s.released("ledger")
	s.CLI(t, "volume", "delete", "ledger")
}

// testCopy copies files to a volume of another class on the other host, and from there to a third, while the command is killed at random moments.
func testCopy(s *stack) {
	t := s.t
	one, two := s.Clients()[0], s.Clients()[1]
	s.on(one)
	s.volume("pages", `"cradle"`, `"`+s.id+`"`)
	megabytes := "8"
	if s.zfs { // in a machine that is emulated, where Nomad takes a minute for two
		megabytes = "1"
	}
	s.completes(use{job: "fill", volume: "pages", script: `cd /v; $b mkdir -p deep/er; for i in 1 2 3 4; do $b dd if=/dev/urandom of=deep/file$i bs=1M count=` + megabytes + ` 2>/dev/null; done
echo x >deep/er/x; $b chown 1000:1001 deep/er/x; $b chmod 4751 deep/er/x; $b ln deep/er/x deep/hard; $b ln -s er/x deep/soft; $b truncate -s 1G sparse; $b sha256sum deep/file* >sums`})
	look := func(job, volume string) string {
		return s.completes(use{job: job, volume: volume, script: `cd /v; $b sha256sum -c -s sums; $b readlink deep/soft; $b ls -A . deep; $b stat -c '%a %u %g %h %s %Y' deep/er/x deep/hard sparse; test "$($b du -k sparse | $b cut -f1)" -lt 1024 && echo holes`})
	}
	was := look("look1", "pages")
	s.copiedUnderKills("pages", "pages-block", "--to", two.Name, "--class", "lv2")
	s.on(two)
	if now := look("look2", "pages-block"); now != was {
		t.Errorf("copied to a block volume:\n%s\nwant\n%s", now, was)
	}
	s.copiedUnderKills("pages-block", "pages-files", "--class", "nfs", "--size", "100MiB")
	if now := look("look3", "pages-files"); now != was {
		t.Errorf("copied to a volume of files:\n%s\nwant\n%s", now, was)
	}
	for args, want := range map[string]string{
		"copy none --as x": "volume none: Nomad knows none in namespace default",
		"copy pages --as pages-files --to " + two.Name: "volume pages-files: it is there, and no copy that was begun",
		"copy pages --as x --zone moon":                "--zone moon: in it there is no healthy plugin",
		"copy pages --as x --to moon":                  "--to moon: Nomad has no such node",
		"copy pages --as ../x":                         "--as: \"../x\" is no name",
		"copy pages --as x --class gp":                 "parameter class: \"gp\" is none of nfs, lv2, gfs",
	} {
		if out, err := s.try(strings.Fields(args)...); err == nil || !strings.Contains(out, want) {
			t.Errorf("%s: %v, %s; want %s", args, err, out, want)
		}
	}
	for _, n := range s.Clients() {
		s.eventually("the end of the parts of killed copies", func() bool {
			all, err := n.Processes()
			return err == nil && !slices.ContainsFunc(all, func(p nomadtest.Process) bool {
				return len(p.Args) > 1 && p.Name() == "cradle-csi" && p.Args[1] == "copy"
			})
		})
	}
	for _, id := range []string{"pages", "pages-block", "pages-files"} {
		s.CLI(t, "volume", "delete", id)
	}
}

// testDrain drains a node whose volume has one writer, and lets it come back: the job is placed anew without a person.
func testDrain(s *stack) {
	s.on(s.Clients()[0])
	s.volume("ledger", "cradle-node1", s.id)
	s.drained("ledger")
	s.CLI(s.t, "volume", "delete", "ledger")
}

// drained is what testDrain does with a volume.
func (s *stack) drained(volume string) {
	s.t.Helper()
	t := s.t
	s.Run(t, keeps(volume))
	a := s.UntilRunning(t, "keeps")
	s.UntilLogsHave(t, a.ID, "t", "stdout", "all is written")
	var id string
	s.Until(t, "the node", func(st *nomadtest.State) bool { id = st.Node(s.node.Name).ID; return true })
	s.CLI(t, "node", "drain", "-enable", "-yes", "-ignore-system", "-deadline", "1m", id)
	s.released(volume)
	s.CLI(t, "node", "drain", "-disable", "-yes", id)
	if b := s.whole(); b.ID == a.ID {
		t.Errorf("allocation %s was never drained", a.ID)
	}
	s.Stop(t, "keeps")
	s.released(volume)
}

// copiedUnderKills copies a volume by a command that is killed at random moments, all over the time that it took when it was left alone.
func (s *stack) copiedUnderKills(from, to string, more ...string) {
	s.t.Helper()
	command := append([]string{"copy", from, "--as", to}, more...)
	begin := time.Now()
	if out, err := s.try(command...); err != nil {
		s.t.Fatalf("%v\n%s", err, out)
	}
	took := time.Since(begin)
	kills, copies := 0, 0
	for ; kills < interruptions; copies++ {
		s.CLI(s.t, "volume", "delete", to)
		more, ended := s.betweenKills(took, interruptions-kills, command...)
		kills += more
		if ended {
			continue
		}
		if out, err := s.try(command...); err != nil && !strings.Contains(out, copiedBefore) {
			s.t.Fatalf("%v\n%s", err, out)
		}
	}
	s.t.Logf("a copy takes %v; %d were interrupted %d times", took.Round(time.Millisecond), copies, kills)
}

// copiedBefore is what copy says where the one before it came to its end just before it was killed.
const copiedBefore = "it is there, and no copy that was begun"

// interruptions is how often a command that goes on where it was is killed, however often it has to begin for that.
const interruptions = 5

// betweenKills runs a command that is killed at random moments, until it comes to its end or was killed often enough.
func (s *stack) betweenKills(most time.Duration, enough int, args ...string) (kills int, ended bool) {
	s.t.Helper()
	for kills < enough {
		cmd, out := s.csi(args...)
		begin := time.Now()
		if err := s.Server().Launch(cmd); err != nil {
			s.t.Fatal(err)
		}
		time.AfterFunc(mathrand.N(most), func() { cmd.Process.Kill() })
		err := cmd.Wait()
		if err == nil || strings.Contains(out.String(), copiedBefore) {
			return kills, true
		}
		if strings.Contains(out.String(), "cradle-csi: ") {
			s.t.Fatalf("it was not the kill: %v\n%s", err, out)
		}
		kills++
		s.t.Logf("%s, killed after %v: %q", args[0], time.Since(begin).Round(time.Millisecond), out)
	}
	return kills, false
}

// TestVMSoakLost is the restore drill: what a job has written is copied, the volume is destroyed, and it is restored on the other node by a command that is
// killed at random moments; there the job has to find every byte. The first one is left alone, to know how long it takes: the moments are of all that time. It goes to and fro until 20
// restores were interrupted, none more than five times.
func TestVMSoakLost(t *testing.T) { testRestores(startHosts(t)) }

func testRestores(s *stack) {
	t := s.t
	from, to := s.Clients()[0], s.Clients()[1]
	a := s.ledger(from)
	kills, restored := 0, 0
	var took time.Duration
	for ; kills < 20; restored++ {
		s.destroyed(a)
		if took > 0 {
			more, _ := s.betweenKills(took, min(interruptions, 20-kills), "lv2", "restore", "ledger", "--to", to.Name)
			kills += more
		}
		begin := time.Now()
		if out, err := s.try("lv2", "restore", "ledger", "--to", to.Name); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		if took == 0 {
			took = time.Since(begin)
			t.Logf("a restore takes %v", took)
		}
		s.on(to)
		s.Run(t, keeps("ledger"))
		a = s.whole()
		from, to = to, from
	}
	t.Logf("restored %d times, interrupted %d times", restored, kills)
	s.Stop(t, "keeps")
	s.released("ledger")
	s.CLI(t, "volume", "delete", "ledger")
	for _, n := range s.Clients() {
		s.on(n)
		s.empty()
	}
}

// TestVMSoakCopiedAgain repeats a copy that was interrupted once Nomad knew of the new volume, when a job has written to that; and while one has it.
func TestVMSoakCopiedAgain(t *testing.T) {
	s := startHosts(t)
	s.on(s.Clients()[0])
	s.volume("pages", `"cradle"`, `"`+s.id+`"`)
	s.completes(use{job: "fill", volume: "pages", script: "echo page >/v/index"})
	again := func(want string) {
		t.Helper()
		if out, err := s.try("copy", "pages", "--as", "new"); err != nil && !strings.Contains(out, "cradle-csi: ") || !strings.Contains(out, want) {
			t.Errorf("%v, %s; want %s", err, out, want)
		}
	}
	again("volume new on node " + s.node.Name + " has what pages has: 1 files and directories, 5B were sent")
	// As a call leaves it that is killed before the last thing that it does.
	s.completes(use{job: "write", volume: "new", script: `printf 'pages\nwhole\n' >/v/.cradle-copy; echo mine >/v/index`})
	s.Run(t, use{job: "uses", volume: "new", script: "while :; do $b sleep 1; done"}.hcl())
	s.UntilRunning(t, "uses")
	again("volume new: allocation ")
	s.Stop(t, "uses")
	s.released("new")
	again("has what pages has: 0 files and directories, 0B were sent")
	if out := s.completes(use{job: "look", volume: "new", script: "$b ls -A /v; $b cat /v/index"}); out != "index\nmine" {
		t.Errorf("the job's volume holds %q", out)
	}
	again("volume new: it is there, and no copy that was begun")
	// Nor is another volume's name taken, on whichever node that is.
	s.volume("ledger", "cradle-node1", s.id)
	out, err := s.try("copy", "pages", "--as", "ledger", "--to", s.Clients()[1].Name)
	if err == nil || !strings.Contains(out, "volume ledger: it is there, and no copy that was begun") {
		t.Errorf("%v, %s", err, out)
	}
	if v, _, err := s.API.CSIVolumes().Info("ledger", nil); err != nil || v.PluginID != s.id {
		t.Errorf("ledger is now %+v, %v", v, err)
	}
	for _, id := range []string{"ledger", "new", "pages"} {
		s.CLI(t, "volume", "delete", id)
	}
	for _, n := range s.Clients() {
		s.on(n)
		s.empty()
	}
}

// TestVMSoakRestoredLate has a restore that is interrupted once the volume is on the other node, and is repeated when the former one has been used, and copied, again: then the other
// node gets what was written meanwhile. What a restore leaves that is given up can be discarded, and is neither used nor copied.
func TestVMSoakRestoredLate(t *testing.T) {
	s := startHosts(t)
	one, two := s.Clients()[0], s.Clients()[1]
	s.on(one)
	s.volume("ledger", "cradle-node1", s.id)
	write := func(text string) {
		t.Helper()
		s.completes(use{job: "write-" + text, volume: "ledger", script: "$b dd if=/dev/urandom of=/v/much bs=1M count=40 2>/dev/null; echo " + text + " >/v/file"})
		s.released("ledger")
	}
	read := func(want string) {
		t.Helper()
		if out := s.completes(use{job: "read-" + want + "-" + s.node.Name, volume: "ledger", script: "$b cat /v/file"}); out != want {
			t.Errorf("on %s it holds %q, not %q", s.node.Name, out, want)
		}
		s.released("ledger")
	}
	// begun is a restore whose receiving stands still until goOn.
	begun := func(to *nomadtest.Node) (cmd *exec.Cmd, out *bytes.Buffer, goOn func()) {
		t.Helper()
		cmd, out = s.csi("lv2", "restore", "ledger", "--to", to.Name)
		if err := s.Server().Launch(cmd); err != nil {
			t.Fatal(err)
		}
		receives := 0
		s.eventually("the receiving", func() bool {
			all, err := to.Processes()
			if err != nil {
				t.Fatal(err)
			}
			for _, p := range all {
				if len(p.Args) > 2 && p.Name() == "cradle-csi" && p.Args[2] == "receive" {
					receives = p.PID
				}
			}
			return receives != 0
		})
		signal := func(sig unix.Signal) {
			t.Helper()
			if err := unix.Kill(receives, sig); err != nil {
				t.Fatal(err)
			}
		}
		signal(unix.SIGSTOP)
		return cmd, out, func() { t.Helper(); signal(unix.SIGCONT) }
	}
	interrupted := func(to *nomadtest.Node, generation string) {
		t.Helper()
		cmd, out, goOn := begun(to)
		cmd.Process.Kill()
		if err := cmd.Wait(); err == nil {
			t.Fatalf("it came to its end before it was killed: %s", out)
		}
		goOn()
		s.on(to) // what it had begun there comes to its end
		if out, err := s.here("lv2", "receive", "ledger", "--generation", generation); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
	}
	write("first")
	s.copied("ledger")
	interrupted(two, "1")
	if err := s.kill("cradle-csi"); err != nil { // it looks for what is to be copied as it starts
		t.Fatal(err)
	}
	s.healthy()
	s.on(one)
	read("first")
	write("second")
	s.copied("ledger")

	restore := func(to *nomadtest.Node, want string) {
		t.Helper()
		out, err := s.try("lv2", "restore", "ledger", "--to", to.Name)
		if err != nil || !strings.Contains(out, want) || !strings.HasSuffix(out, "volume ledger is on node "+to.Name+" now\n") {
			t.Fatalf("%v, want %q\n%s", err, want, out)
		}
		s.on(to)
	}
	cmd, out, goOn := begun(two)
	s.Run(t, use{job: "back", volume: "ledger", script: "while :; do $b sleep 1; done"}.hcl())
	s.UntilRunning(t, "back")
	goOn()
	if err := cmd.Wait(); err == nil || !strings.Contains(out.String(), "uses it on node "+one.Name) {
		t.Fatalf("restored while its host came back: %v\n%s", err, out)
	}
	s.Stop(t, "back")
	s.released("ledger")
	read("second")
	write("third")
	s.copied("ledger")
	restore(two, "of which it was made, is not the newest copy any more")
	read("third")
	restore(two, "it is there, made of copy ledger@")
	s.on(one)
	if out, err := s.here("lv2", "discard", "ledger"); err != nil || !strings.Contains(out, "generation 0 is removed; generation 1 is on node "+two.Name) {
		t.Errorf("discard: %v, %s", err, out)
	}

	interrupted(one, "2") // and given up
	if out, err := s.here("lv2", "discard", "ledger"); err != nil || !strings.Contains(out, "generation 2 is removed; generation 1 is on node "+two.Name) {
		t.Errorf("discard what was given up: %v, %s", err, out)
	}
	s.empty()
	s.on(two)
	if out, err := s.here("lv2", "discard", "ledger"); err == nil || !strings.Contains(out, "it is the one that is in use") {
		t.Errorf("discarded what is in use: %v, %s", err, out)
	}
	write("fourth")
	s.copied("ledger")
	restore(one, "restored from ledger@")
	read("fourth")
	s.CLI(t, "volume", "delete", "ledger")
	s.on(two)
	if out, err := s.here("lv2", "discard", "ledger"); err != nil || !strings.Contains(out, "generation 1 is removed; generation 2 is on node "+one.Name) {
		t.Errorf("discard: %v, %s", err, out)
	}
	for _, n := range s.Clients() {
		s.on(n)
		s.empty()
	}
}

// TestRootSoakSanity is TestRootSanity for class gfs, which with dir is nfs, and for no parameters at all.
func TestRootSoakSanity(t *testing.T) {
	eachSanity(t, map[string]string{"shared": `class: gfs`, "none": ``})
}
