//go:build vm && soak

package nomad

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strconv"
	"strings"
	"testing"
	"time"

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

// killedInTheMiddle kills the client, the plugin or both at a random moment of a task's start, of a command in it, and of its stop. What had begun before
// goes on, and its log has every line.
func killedInTheMiddle(t *testing.T, rounds int) {
	image, err := programs.Image("busybox")
	if err != nil {
		t.Fatal(err)
	}
	o := nomadtest.Options{Client: "gc_max_allocs = 1000"}
	if err := o.Cradle(`    gc {
      orphan_delay = "5s"
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
	// kill does so within a while, and brings the client back.
	kill := func(moment string, within time.Duration) {
		t.Helper()
		time.Sleep(time.Duration(random.Int64N(int64(within))))
		who := random.IntN(3)
		var errs []error
		if who != 0 {
			errs = append(errs, n.KillClient())
		}
		if who != 1 {
			plugins++
			errs = append(errs, killPlugin(n))
		}
		if err := errors.Join(errs...); err != nil {
			t.Fatal(err)
		}
		hit[moment+": "+[]string{"plugin", "client", "both"}[who]]++
		t.Logf("killed %s at %s", []string{"plugin", "client", "both"}[who], moment)
		time.Sleep(time.Duration(random.Int64N(int64(time.Second))))
		if err := n.StartAgents(); err != nil {
			t.Fatal(err)
		}
	}
	for i := range rounds {
		plugins = 0
		job := c.Run(t, fmt.Sprintf(counts, i, image))
		kill("start", time.Second)
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
		cmd := n.Command(ctx, c.Nomad(), "alloc", "exec", "-i=false", a.ID, "sh", "-c", "while :; do echo busy; sleep 0.1; done")
		cmd.Env = c.Env()
		if err := n.Launch(cmd); err != nil {
			t.Fatal(err)
		}
		kill("exec", 500*time.Millisecond)
		if err := cmd.Wait(); err == nil || ctx.Err() != nil {
			t.Errorf("round %d: a command whose client or plugin is killed ends with %v", i, err)
		}
		cancel()
		after := lines(20)
		if runsOf(t, after, plugins) != runsOf(t, before, plugins) {
			t.Errorf("round %d: the task was started again while a command ran in it", i)
		}
		if got := c.CLI(t, "alloc", "exec", a.ID, "echo", "still here"); got != "still here\n" {
			t.Errorf("round %d: a command after that says %q", i, got)
		}

		if _, _, err := c.API.Jobs().Deregister(job, false, nil); err != nil {
			t.Fatal(err)
		}
		kill("stop", 700*time.Millisecond)
		c.UntilAlloc(t, job, "ended", nomadtest.Ended)
		c.UntilAnswers(t, a.ID)
		out := c.Logs(t, a.ID, "t", "stdout")
		if all := numbers(t, strings.TrimSuffix(out, "end\n")); len(all) < len(after) || runsOf(t, all, plugins) != runsOf(t, before, plugins) {
			t.Errorf("round %d: of %d lines %d are left, in %d runs", i, len(after), len(all), runsOf(t, all, plugins))
		}
		if !strings.HasSuffix(out, "\nend\n") {
			t.Errorf("round %d: the last words are missing: %q", i, out[max(0, len(out)-40):])
		}
	}
	t.Logf("killed: %v", hit)
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
		case number == last+1:
			if number == 1 {
				runs++
			}
		case number == 1 && last > 30:
			runs++
		case number <= last && number > last-1000 && twice > 0:
			twice--
		default:
			t.Fatalf("line %d is %d, after %v, before %v", i+1, number, all[max(0, i-5):i], all[i+1:min(len(all), i+20)])
		}
		last = number
	}
	return runs
}

// killPlugin kills the driver, if it runs.
func killPlugin(n *nomadtest.Node) error {
	all, err := n.Processes()
	if err != nil {
		return err
	}
	for _, p := range all {
		if isPlugin(n, p) {
			if err := unix.Kill(p.PID, unix.SIGKILL); err != nil && !errors.Is(err, unix.ESRCH) {
				return err
			}
		}
	}
	return nil
}
