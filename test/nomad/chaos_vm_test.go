//go:build vm

package nomad

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/nomad/api"
	"golang.org/x/sys/unix"

	"github.com/cradlestack/cradlestack/internal/nomadtest"
	"github.com/cradlestack/cradlestack/test/programs"
)

// TestVMChaos is the short form of the drill: a few jobs, a few kills.
func TestVMChaos(t *testing.T) { chaos(t, 4, 12) }

const churning = `
job "churn-%[1]d" {
  group "g" {
    %[3]s
    restart {
      attempts = 1000
      interval = "1h"
      delay    = "1s"
      mode     = "delay"
    }
    reschedule {
      delay          = "5s"
      delay_function = "constant"
      unlimited      = true
    }
    task "t" {
      driver       = "cradle"
      kill_timeout = "2s"
      config {
        image   = "oci:%[2]s"
        command = "sh"
        args    = ["-c", "trap 'exit 0' TERM; mkdir -p /www; echo %[1]d >/www/index.html; httpd -p 80 -h /www; while true; do sleep 1; done"]
      }
      resources {
        cpu    = 50
        memory = 64
      }
    }
  }
}`

// chaos runs jobs, stops and starts some, and meanwhile kills clients, plugins, machines and whatever else runs on a node. At the end what Nomad says
// is what runs, and after the jobs' end nothing is left: nomadtest looks.
func chaos(t *testing.T, jobs, kills int) {
	image, err := programs.Image("busybox")
	if err != nil {
		t.Fatal(err)
	}
	// What Nomad and CNI's plugins themselves leave where the client is killed in the middle of setting up an allocation's network or of taking it down; folders
	// of an allocation whose removal was interrupted, or which the client forgets as the driver ends while it takes the allocation up ("error running alloc");
	// cgroups of a task whose removal Nomad tries again later, unless it is killed before; and the process for a task's logs that a client has started and
	// was killed before it could note that.
	const alloc = `nomad/alloc/[0-9a-f-]{36}`
	o := nomadtest.Options{Tolerate: regexp.MustCompile(`^(firewall rule |file (/var/lib/cni/results|/run/cni/nomad|/run/netns)/|mount nsfs at /run/netns/|network interface veth|` +
		`file ` + alloc + `(/(alloc|t)(/(data|logs|tmp|local|private|secrets)(/\.?t\.\w+\.\w+)?)?)?$|mount tmpfs at \S+/` + alloc + `/t/(private|secrets)$|` +
		`cgroup /\w+//nomad/[0-9a-f-]{36}\.t$|process \d+ of \d+: \S+/nomad logmon$)`)}
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
	// Allocations with a network of their own do not survive that their client is killed in their first minute (nomadtest.KillClient), others do.
	network := []string{`network {
      mode = "bridge"
      port "http" {
        to = 80
      }
    }`, ""}
	start := func(i int) { c.Run(t, fmt.Sprintf(churning, i, image, network[i%2])) }
	for i := range jobs {
		start(i)
	}
	count := map[string]int{}
	for done := 0; done < kills; {
		time.Sleep(time.Duration(random.IntN(1500)) * time.Millisecond)
		if random.IntN(3) == 0 { // a job ends and begins again
			i := random.IntN(jobs)
			if _, _, err := c.API.Jobs().Deregister(fmt.Sprintf("churn-%d", i), random.IntN(2) == 0, nil); err != nil {
				t.Fatal(err)
			}
			start(i)
		}
		if n.ClientPID() == 0 && random.IntN(2) == 0 { // or it stays away for another kill or two
			if err := n.StartAgents(); err != nil {
				t.Fatal(err)
			}
		}
		all, err := n.Processes()
		if err != nil {
			t.Fatal(err)
		}
		kind, pid := victim(random, n, all)
		if pid == 0 {
			continue
		}
		if kind == "client" {
			err = n.KillClient()
		} else if err = unix.Kill(pid, unix.SIGKILL); errors.Is(err, unix.ESRCH) {
			continue // it has just ended
		}
		if err != nil {
			t.Fatal(err)
		}
		count[kind]++
		done++
	}
	t.Logf("killed: %v", count)
	if err := n.StartAgents(); err != nil {
		t.Fatal(err)
	}

	// Every job has come to rest, with one pod each that answers.
	var alive []*api.AllocationListStub
	settle := func() error {
		ctx, cancel := context.WithTimeout(t.Context(), nomadtest.Patience)
		defer cancel()
		return c.Wait(ctx, "one running allocation of each job", func(s *nomadtest.State) bool {
			alive = alive[:0]
			for i := range jobs {
				a := theOne(s.Of(fmt.Sprintf("churn-%d", i)))
				if a == nil {
					return false
				}
				alive = append(alive, a)
			}
			return true
		})
	}
	err = settle()
	deaf := deaf(t, c, n)
	var doubled []string
	if err != nil {
		doubled = tellUnsettled(t, c, n, jobs)
	}
	if err != nil && len(deaf)+len(doubled) == 0 {
		tellGoroutines(t, n)
		t.Fatal(err)
	}
	if len(deaf) > 0 {
		t.Logf("allocations to which Nomad's client does not listen: %v", deaf)
		if err := errors.Join(n.KillClient(), n.StartAgents()); err != nil {
			t.Fatal(err)
		}
	}
	for _, job := range doubled {
		t.Logf("Nomad wants more than one allocation of %s; it is made to look again", job)
		if _, _, err := c.API.Jobs().ForceEvaluate(job, nil); err != nil {
			t.Fatal(err)
		}
	}
	if err := settle(); err != nil {
		tellUnsettled(t, c, n, jobs)
		tellGoroutines(t, n)
		t.Fatal(err)
	}
	for _, a := range alive {
		i := strings.TrimPrefix(a.JobID, "churn-")
		var got string
		for begin := time.Now(); got != i+"\n" && time.Since(begin) < nomadtest.Patience; time.Sleep(200 * time.Millisecond) { // it may have just begun
			var stderr string
			got, stderr, _ = c.TryCLI(t, "", "alloc", "exec", a.ID, "cat", "/www/index.html")
			got += stderr
		}
		if got != i+"\n" {
			t.Errorf("the pod of job %s says %q", a.JobID, got)
		}
	}
	// As many machines as pods, once those without a task are gone.
	var machines int
	for begin := time.Now(); time.Since(begin) < nomadtest.Patience; time.Sleep(200 * time.Millisecond) {
		all, err := n.Processes()
		if err != nil {
			t.Fatal(err)
		}
		machines = 0
		for _, p := range all {
			if isMachine(p) {
				machines++
			}
		}
		if machines == len(alive) {
			break
		}
	}
	if machines != len(alive) {
		t.Errorf("%d machines run, for %d allocations", machines, len(alive))
	}
	if t.Failed() {
		all, _ := n.Processes()
		for _, p := range all {
			t.Logf("%d of %d: %s", p.PID, p.Parent, strings.Join(p.Args, " ")[:min(200, len(strings.Join(p.Args, " ")))])
		}
	}
}

// theOne is the running allocation of a job, if that has come to rest.
func theOne(all []*api.AllocationListStub) (one *api.AllocationListStub) {
	for _, a := range all {
		switch {
		case nomadtest.Running(a) && one == nil:
			one = a
		case nomadtest.Ended(a), a.ClientStatus == api.AllocClientStatusPending && a.DesiredStatus != api.AllocDesiredStatusRun: // it has never begun
		default:
			return nil
		}
	}
	return one
}

// tellUnsettled shows what server and client know and have logged of jobs that have not come to rest. It returns those of which Nomad's server wants more
// than the one allocation that the job has, with nothing left to look at, and whose client has not begun with the surplus ones: no task has an event, so no
// driver has heard of them. The client has such a one wait for the end of its predecessor. Nomad's scheduler (1.11) replaces an allocation that has failed
// also where another runs (scheduler/reconciler: computePlacements), and stops one of two when it looks again.
func tellUnsettled(t *testing.T, c *nomadtest.Cluster, n *nomadtest.Node, jobs int) (doubled []string) {
	t.Helper()
	for i := range jobs {
		job := fmt.Sprintf("churn-%d", i)
		all, _, err := c.API.Jobs().Allocations(job, true, nil)
		if err != nil {
			t.Fatal(err)
		}
		if theOne(all) != nil {
			continue
		}
		evals, _, err := c.API.Jobs().Evaluations(job, nil)
		if err != nil {
			t.Fatal(err)
		}
		var text strings.Builder
		things := []string{"job_id=" + job + " "}
		running, waiting, idle := 0, 0, true
		for _, a := range all {
			if a.DesiredStatus == api.AllocDesiredStatusRun && !nomadtest.Ended(a) {
				if nomadtest.Running(a) {
					running++
				} else if a.ClientStatus == api.AllocClientStatusPending && len(a.TaskStates) == 0 {
					waiting++
				} else {
					idle = false
				}
			}
			full, _, err := c.API.Allocations().Info(a.ID, nil)
			if err != nil {
				t.Fatal(err)
			}
			fmt.Fprintf(&text, "%s of version %d, %d to %d: %s (%s), wanted %s (%s); after %q, before %q, follow-up %q\n", a.ID, a.JobVersion, a.CreateIndex, a.ModifyIndex,
				a.ClientStatus, a.ClientDescription, a.DesiredStatus, a.DesiredDescription, full.PreviousAllocation, full.NextAllocation, full.FollowupEvalID)
			if !nomadtest.Ended(a) {
				things = append(things, a.ID)
			}
		}
		for _, e := range evals {
			idle = idle && e.Status != "pending" && e.Status != "blocked"
		}
		t.Logf("%s has not come to rest\n%s%s", job, &text, told(t, n, things...))
		if running == 1 && waiting > 0 && idle {
			doubled = append(doubled, job)
		}
	}
	return doubled
}

var failedToAdd = regexp.MustCompile(`client: error (?:adding|running) alloc: .* alloc_id=(\S+)`)

// deaf lists live allocations that the client does not listen to until it is started again. Where a driver's process ends while Nomad 1.11 adds an allocation,
// the client calls that failed, may add it nevertheless, as it asks for allocations and adds them at the same time, and then ignores what the server wants of
// it (client/client.go: invalidAllocs, watchAllocations).
func deaf(t *testing.T, c *nomadtest.Cluster, n *nomadtest.Node) (allocs []string) {
	log, err := n.ClientLog()
	if err != nil {
		t.Fatal(err)
	}
	begin := strings.LastIndex(log, "Nomad agent started!")
	for _, m := range failedToAdd.FindAllStringSubmatch(log[max(begin, 0):], -1) {
		a, _, err := c.API.Allocations().Info(m[1], nil)
		var answer api.UnexpectedResponseError
		if errors.As(err, &answer) && answer.StatusCode() == http.StatusNotFound {
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		if a.ClientStatus == api.AllocClientStatusRunning || a.ClientStatus == api.AllocClientStatusPending {
			allocs = append(allocs, a.ID)
		}
	}
	return allocs
}

// tellGoroutines ends plugins and client such that they say what each goroutine waits for: the client in its log, plugins here, as those that an earlier
// client started have nobody who reads it.
func tellGoroutines(t *testing.T, n *nomadtest.Node) {
	client := n.ClientPID()
	if client != 0 {
		unix.Kill(client, unix.SIGSTOP) // it reads what its own plugins say
	}
	all, err := n.Processes()
	if err != nil {
		t.Error(err)
	}
	for _, p := range all {
		if !isPlugin(n, p) {
			continue
		}
		pipe, err := os.Open(fmt.Sprintf("/proc/%d/fd/2", p.PID))
		if err != nil {
			t.Error(err)
			continue
		}
		unix.Kill(p.PID, unix.SIGQUIT)
		pipe.SetReadDeadline(time.Now().Add(5 * time.Second)) // what it has started may hold its end
		b, err := io.ReadAll(pipe)
		pipe.Close()
		t.Logf("%d: %v\n%s", p.PID, err, b)
	}
	if client != 0 {
		unix.Kill(client, unix.SIGQUIT)
		unix.Kill(client, unix.SIGCONT)
		time.Sleep(3 * time.Second)
	}
}

func isMachine(p nomadtest.Process) bool {
	return strings.HasPrefix(p.Name(), "qemu-system") && p.State != 'Z'
}

func isPlugin(n *nomadtest.Node, p nomadtest.Process) bool {
	return strings.HasPrefix(p.Args[0], filepath.Join(n.Dir, "plugins")+"/")
}

// kinds of processes that die, by how often they are chosen. A client is away for a while, and there is only one.
var kinds = []string{"client", "plugin", "plugin", "machine", "machine", "machine", "logmon", "other", "other"}

// victim chooses what dies next; there may be none of its kind.
func victim(random *rand.Rand, n *nomadtest.Node, all []nomadtest.Process) (kind string, pid int) {
	kind = kinds[random.IntN(len(kinds))]
	client := n.ClientPID()
	var pids []int
	for _, p := range all {
		is := "other" // helpers of the plugin, CNI's plugins
		switch {
		case p.PID == client:
			is = "client"
		case isPlugin(n, p):
			is = "plugin"
		case isMachine(p):
			is = "machine"
		case len(p.Args) > 1 && p.Args[1] == "logmon":
			is = "logmon"
		case len(p.Args) > 1 && p.Args[1] == "agent", p.State == 'Z':
			continue
		}
		if is == kind {
			pids = append(pids, p.PID)
		}
	}
	if len(pids) == 0 {
		return kind, 0
	}
	return kind, pids[random.IntN(len(pids))]
}
