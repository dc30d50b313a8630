//go:build vm

package nomad

import (
	"fmt"
	"math/rand/v2"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/nomad/api"

	"github.com/cradlestack/cradlestack/internal/nomadtest"
	"github.com/cradlestack/cradlestack/test/programs"
)

const keeping = `
job "keeping-%[1]d" {
  group "g" {
    restart {
      attempts = 100
      interval = "1h"
      delay    = "1s"
      mode     = "delay"
    }
    task "t" {
      driver       = "cradle"
      kill_timeout = "2s"
      config {
        image   = "oci:%[2]s"
        command = "sh"
        args    = ["-c", "trap 'exit 0' TERM; n=$(cat /root/n || echo 0); echo begin $n; while :; do n=$((n+1)); echo $n >/root/new; sync; mv /root/new /root/n; sync; echo $n; sleep 0.02; done"]
        disk    = "64MiB"
        disk_id = "box"
      }
      resources {
        cpu    = 50
        memory = 64
      }
    }
  }
}`

const disks = `
job "disks" {
  type = "batch"
  group "g" {
    task "t" {
      driver = "cradle"
      config {
        disk_action = %q
        %s
      }
    }
  }
}`

// TestVMKeptDiskKilled is the short form of the drill.
func TestVMKeptDiskKilled(t *testing.T) { keptDiskKilled(t, 2) }

// keptDiskKilled has job after job count on one kept disk, while the client, the driver, both or the machine are killed at random moments. What a task has
// told was on the disk before, so the next one goes on from there or from later.
func keptDiskKilled(t *testing.T, rounds int) {
	image, err := programs.Image("busybox")
	if err != nil {
		t.Fatal(err)
	}
	o := nomadtest.Options{Client: "gc_max_allocs = 1000", Tolerate: forgottenLogs}
	// A pod whose start Nomad has given up as the driver died is ended after that.
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
	counted := 0 // that some task has told
	for i := range rounds {
		job := c.Run(t, fmt.Sprintf(keeping, i, image))
		time.Sleep(time.Duration(random.Int64N(int64(2 * time.Second))))
		who := []string{"plugin", "client", "both", "machine"}[random.IntN(4)]
		hit[who]++
		if err := kill(n, who); err != nil {
			t.Fatal(err)
		}
		if err := n.StartAgents(); err != nil {
			t.Fatal(err)
		}
		a := c.UntilRunning(t, job)
		c.UntilAnswers(t, a.ID)
		begin := -1
		out := c.UntilLogs(t, a.ID, "t", "stdout", func(s string) bool {
			if begin < 0 && s != "" {
				begin = strings.Count(s, "\n")
			}
			return s != "" && strings.Count(s, "\n") >= begin+20
		})
		for line := range strings.Lines(out[:strings.LastIndexByte(out, '\n')+1]) {
			number, begun := strings.CutPrefix(strings.TrimSpace(line), "begin ")
			found, err := strconv.Atoi(number)
			switch {
			case err != nil:
				t.Fatalf("round %d, %s killed: the log has the line %q", i, who, line)
			case begun && found < counted:
				t.Errorf("round %d, %s killed: %d was told, and the disk has %d", i, who, counted, found)
			}
			counted = max(counted, found)
		}
		c.Stop(t, job)
		if _, _, err := c.API.Jobs().Deregister(job, true, nil); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("killed: %v; counted to %d", hit, counted)
	action := func(what, config string) string {
		a := c.UntilEnded(t, c.Run(t, fmt.Sprintf(disks, what, config)))
		if a.ClientStatus != api.AllocClientStatusComplete {
			t.Errorf("%s: %s", what, c.Describe())
		}
		out := c.Logs(t, a.ID, "t", "stdout")
		c.CLI(t, "job", "stop", "-purge", "disks")
		return out
	}
	if list := action("list", ""); strings.Count(list, "\n") != 1 {
		t.Errorf("the list of disks is %q", list)
	}
	action("remove", `disk_id = "box"`)
	if list := action("list", ""); list != "" {
		t.Errorf("after its removal the list of disks is %q", list)
	}
}
