//go:build vm

package nomad

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/nomad/api"
	"golang.org/x/sys/unix"

	"github.com/cradlestack/cradlestack/internal/nomadtest"
	"github.com/cradlestack/cradlestack/test/programs"
)

const counts = `
job "counts-%[1]d" {
  group "g" {
    restart {
      attempts = 100
      interval = "1h"
      delay    = "1s"
      mode     = "delay"
    }
    task "t" {
      driver       = "cradle"
      kill_timeout = "10s"
      config {
        image   = "oci:%[2]s"
        command = "sh"
        args    = ["-c", "trap 'echo end; exit 0' TERM; i=0; while :; do i=$((i+1)); echo $i; sleep 0.02; done"]
      }
      resources {
        cpu    = 50
        memory = 64
      }
    }
  }
}`

// forgottenLogs are what Nomad leaves of a client that has started a task's log process, and is killed before it has told it what to read.
var forgottenLogs = regexp.MustCompile(`^process \d+ of \d+: \S+/nomad logmon$`)

// TestVMKilledInTheMiddle is the short form of the drill.
func TestVMKilledInTheMiddle(t *testing.T) { killedInTheMiddle(t, 3) }

// killedInTheMiddle kills the client, the plugin or both at a random moment of a task's start, of a command in it, and of its stop. What had begun before
// goes on, and its log has every line.
func killedInTheMiddle(t *testing.T, rounds int) {
	image, err := programs.Image("busybox")
	if err != nil {
		t.Fatal(err)
	}
	o := nomadtest.Options{Client: "gc_max_allocs = 1000", Tolerate: forgottenLogs}
	if err := o.Cradle(`    gc {
      orphan_delay = "20s"
    }`); err != nil {
		t.Fatal(err)
	}
	c := nomadtest.Start(t, o)
	n := c.Clients()[0]
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	hit := map[string]int{}
	plugins := 0 // that were killed in this round
	// killed kills somebody within a while, and brings the client back.
	killed := func(moment string, within time.Duration) {
		t.Helper()
		time.Sleep(time.Duration(random.Int64N(int64(within))))
		who := []string{"plugin", "client", "both"}[random.IntN(3)]
		if err := kill(n, who); err != nil {
			t.Fatal(err)
		}
		if who != "client" {
			plugins++
		}
		hit[moment+": "+who]++
		t.Logf("killed %s at %s", who, moment)
		time.Sleep(time.Duration(random.Int64N(int64(time.Second))))
		if err := n.StartAgents(); err != nil {
			t.Fatal(err)
		}
	}
	for i := range rounds {
		plugins = 0
		job := c.Run(t, fmt.Sprintf(counts, i, image))
		killed("start", time.Second)
		a := c.UntilRunning(t, job)
		lines := func(more int) (all []int) {
			t.Helper()
			c.UntilAnswers(t, a.ID)
			begin := -1
			out := c.UntilLogs(t, a.ID, "t", "stdout", func(s string) bool {
				if begin < 0 && s != "" {
					begin = strings.Count(s, "\n")
				}
				return strings.Count(s, "\n") >= begin+more && s != ""
			})
			return numbers(t, out)
		}
		before := lines(20)
		if runs := runsOf(t, before, plugins); runs > 2 {
			t.Errorf("round %d: the start has made %d runs", i, runs)
		}

		ctx, cancel := context.WithTimeout(t.Context(), nomadtest.Patience)
		cmd := n.Command(ctx, c.Nomad(), "alloc", "exec", "-i=false", a.ID, "sh", "-c", "for i in 1 2 3 4 5 6 7 8 9 10; do echo busy; sleep 0.5; done")
		cmd.Env = c.Env()
		var busy strings.Builder
		cmd.Stdout = &busy
		if err := n.Launch(cmd); err != nil {
			t.Fatal(err)
		}
		killed("exec", 500*time.Millisecond)
		// It may have begun after the kill, with the next plugin.
		if err := cmd.Wait(); ctx.Err() != nil || err == nil && busy.String() != strings.Repeat("busy\n", 10) {
			t.Errorf("round %d: a command whose client or plugin is killed ends with %v, having said %q", i, err, busy.String())
		}
		cancel()
		after := lines(20)
		if runsOf(t, after, plugins) != runsOf(t, before, plugins) {
			t.Errorf("round %d: the task was started again while a command ran in it", i)
		}
		eventually(t, "a command after that", func() bool { // the client may not have the next plugin's handle of the task yet
			out, _, _ := c.TryCLI(t, "", "alloc", "exec", a.ID, "echo", "still here")
			return out == "still here\n"
		})

		if _, _, err := c.API.Jobs().Deregister(job, false, nil); err != nil {
			t.Fatal(err)
		}
		killed("stop", 700*time.Millisecond)
		c.UntilWritten(t, c.UntilAlloc(t, job, "ended", func(ended *api.AllocationListStub) bool { return ended.ID == a.ID && nomadtest.Ended(ended) }))
		c.UntilAnswers(t, a.ID)
		out := c.Logs(t, a.ID, "t", "stdout")
		if all := numbers(t, strings.TrimSuffix(out, "end\n")); len(all) < len(after) || runsOf(t, all, plugins) != runsOf(t, before, plugins) {
			t.Errorf("round %d: of %d lines %d are left, in %d runs", i, len(after), len(all), runsOf(t, all, plugins))
		}
		if !strings.HasSuffix(out, "\nend\n") {
			t.Errorf("round %d: the last words are missing: %q", i, out[max(0, len(out)-40):])
		}
		all, _, err := c.API.Jobs().Allocations(job, true, nil)
		if err != nil {
			t.Fatal(err)
		}
		for _, one := range all {
			if one.ID != a.ID && !gaveUp(t, n, one) {
				t.Errorf("round %d: the job has needed another allocation\n%s\n%s", i, c.Describe(), told(t, n, job, a.ID, one.ID))
			}
			if s := one.TaskStates["t"]; s != nil && slices.ContainsFunc(s.Events, func(e *api.TaskEvent) bool { return e.Details["exit_code"] == "255" }) {
				t.Errorf("round %d: nobody has seen how the task has ended\n%s", i, c.Describe())
			}
		}
	}
	t.Logf("killed: %v", hit)
	var left []string
	for begin := time.Now(); time.Since(begin) < nomadtest.Patience; time.Sleep(100 * time.Millisecond) {
		if left, err = n.OpenLogs(); err == nil && len(left) == 0 {
			return
		}
	}
	t.Errorf("after the end of all tasks their output is still read: %v, %v", left, err)
}

// told are the lines of the agents' logs that name any of these things.
func told(t *testing.T, n *nomadtest.Node, things ...string) string {
	t.Helper()
	var lines []string
	for _, agent := range []string{"server", "client"} {
		log, err := os.ReadFile(filepath.Join(n.Dir, agent+".log"))
		if err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(string(log)) {
			if slices.ContainsFunc(things, func(thing string) bool { return strings.Contains(line, thing) }) {
				lines = append(lines, agent+": "+line)
			}
		}
	}
	return strings.Join(lines, "")
}

// gaveUp says whether Nomad has failed an allocation because its call to get to the plugin, or its second one to start the task, came to one that was killed. It
// does not try that again, whatever the restart policy (client/client.go, addAlloc; client/allocrunner/taskrunner/task_runner.go, runDriver).
func gaveUp(t *testing.T, n *nomadtest.Node, a *api.AllocationListStub) bool {
	t.Helper()
	log, err := n.ClientLog()
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range failedToAdd.FindAllStringSubmatch(log, -1) {
		if m[1] == a.ID {
			return true
		}
	}
	s := a.TaskStates["t"]
	return s != nil && slices.ContainsFunc(s.Events, func(e *api.TaskEvent) bool {
		return strings.Contains(e.DisplayMessage, "failed to start task after driver exited unexpectedly: plugin is shut down") ||
			strings.Contains(e.DisplayMessage, "failed to initialize driver after it exited unexpectedly: plugin is shut down")
	})
}

// numbers are the lines of a log; the last one may be unfinished.
func numbers(t *testing.T, out string) (all []int) {
	t.Helper()
	for line := range strings.Lines(out[:strings.LastIndexByte(out, '\n')+1]) {
		number, err := strconv.Atoi(strings.TrimSpace(line))
		if err != nil {
			t.Fatalf("the log has the line %q", line)
		}
		all = append(all, number)
	}
	return all
}

// runsOf counts how often a task has begun to count, and checks that it then has counted on. As often as a plugin was killed, a piece of output may be
// there twice: one that was written and not yet noted.
func runsOf(t *testing.T, all []int, twice int) (runs int) {
	t.Helper()
	last := 0
	for i, number := range all {
		switch {
		case number == 1:
			runs++
		case number == last+1:
		case number <= last && number > last-1000 && twice > 0:
			twice--
		default:
			t.Fatalf("line %d is %d, after %v, before %v", i+1, number, all[max(0, i-5):i], all[i+1:min(len(all), i+20)])
		}
		last = number
	}
	return runs
}

// kill kills the node's client, its plugin (which may not run just then), both, or the machines.
func kill(n *nomadtest.Node, who string) error {
	if who == "client" || who == "both" {
		if err := n.KillClient(); err != nil {
			return err
		}
	}
	all, err := n.Processes()
	if err != nil {
		return err
	}
	for _, p := range all {
		if who == "machine" && isMachine(p) || (who == "plugin" || who == "both") && isPlugin(n, p) {
			if err := unix.Kill(p.PID, unix.SIGKILL); err != nil && !errors.Is(err, unix.ESRCH) {
				return err
			}
		}
	}
	return nil
}
