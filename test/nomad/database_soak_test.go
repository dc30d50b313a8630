//go:build vm && soak

package nomad

import (
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/hashicorp/nomad/api"

	"github.com/cradlestack/cradlestack/test/programs"
)

// inserts is a database on a block volume that its guest attaches, and a client beside it that says which rows are committed.
const inserts = `
job "database" {
  group "g" {
    restart {
      attempts = 1000
      interval = "24h"
      delay    = "1s"
      mode     = "delay"
    }
    volume "data" {
      type            = "csi"
      source          = "guest"
      attachment_mode = "file-system"
      access_mode     = "single-node-writer"
    }
    task "main" {
      driver       = "cradle"
      kill_timeout = "30s"
      volume_mount {
        volume      = "data"
        destination = "/var/lib/mysql"
      }
      env {
        MARIADB_ROOT_PASSWORD = "secret"
        MARIADB_DATABASE      = "shop"
      }
      config {
        image      = "oci:%s"
        entrypoint = ["sh"]
        args       = ["-ec", %q]
      }
      resources {
        cpu    = 500
        memory = 512
      }
    }
  }
}`

const insertsScript = `docker-entrypoint.sh mariadbd & sql="mariadb -h 127.0.0.1 -psecret -N -B --unbuffered shop"
until $sql -e "CREATE TABLE IF NOT EXISTS goods (id INT PRIMARY KEY)" 2>/dev/null; do sleep 0.2; done
set -- $($sql -e "SELECT COUNT(*), COALESCE(MAX(id), 0) FROM goods"); echo "found $1 up to $2"
i=$2; while test $i -lt %d; do i=$((i+1)); sleep 0.1; echo "INSERT INTO goods VALUES ($i); SELECT 'committed', $i;"; done | $sql
echo all; wait`

// TestVMSoakDatabase has a database commit rows, one after another, while machine, client, driver and CSI plugin are killed in random order, each after some rows
// more. What the database has said to be committed is there each time it comes up again.
func TestVMSoakDatabase(t *testing.T) {
	const rows, every = 1000, 40
	s := startStorehouse(t, "telemetry {\n  publish_allocation_metrics = true\n  collection_interval = \"1s\"\n}\n") // see untilFollowed
	image, err := programs.Image("mariadb")
	if err != nil {
		t.Fatal(err)
	}
	s.volume("guest", `iops      = "2000"`, "", `bandwidth = "100MiB"`, "")
	job := s.Run(t, fmt.Sprintf(inserts, image, fmt.Sprintf(insertsScript, rows)))
	a := s.UntilRunning(t, job)
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	hit := map[string]int{}
	said := committed{}
	ended := func(out string) bool { return strings.HasSuffix(out, "\nall\n") }
	for next := every; ; next = said.last + every {
		s.untilFollowed(a.ID)
		out := s.UntilLogs(t, a.ID, "main", "stdout", func(out string) bool { return said.read(t, out).last >= next || ended(out) })
		if ended(out) {
			break
		}
		who := []string{"qemu-system", "qemu-system", "nomad-driver-cradle", "cradle-csi", "client"}[random.IntN(5)]
		t.Logf("%s is killed, and row %d is committed", who, said.last)
		switch {
		case who == "client":
			if err := s.node.KillClient(); err != nil {
				t.Fatal(err)
			}
			if err := s.node.StartAgents(); err != nil {
				t.Fatal(err)
			}
		case !s.killed(who):
			who += ", which was not there"
		}
		hit[who]++
	}
	s.healthy()
	s.Stop(t, job)
	s.released("guest")
	// One that was put away tells what there is in the end.
	job = s.Run(t, strings.Replace(fmt.Sprintf(inserts, image, fmt.Sprintf(insertsScript, rows)), `"database"`, `"again"`, 1))
	a = s.UntilRunning(t, job)
	if out := s.UntilLogsHave(t, a.ID, "main", "stdout", "\nall\n"); !strings.Contains(out, fmt.Sprintf("found %d up to %[1]d\n", rows)) {
		t.Errorf("in the end the database says\n%s", out)
	}
	s.Stop(t, job)
	s.released("guest")
	t.Logf("%d rows were committed, %d starts, killed: %v", rows, said.starts, hit)
	if want := 1 + hit["qemu-system"]; said.starts < want {
		t.Errorf("machines were killed %d times, and the database has started %d times", hit["qemu-system"], said.starts)
	}
}

// untilFollowed waits until the client knows how much a task takes, which it begins to ask once it has started it, or taken it up again. Before that, Nomad 1.11 gives up a
// task whose driver ends.
func (s *storehouse) untilFollowed(alloc string) {
	s.t.Helper()
	s.UntilAnswers(s.t, alloc)
	s.eventually("the client's figures of the task", func() bool {
		use, err := s.API.Allocations().Stats(&api.Allocation{ID: alloc}, nil)
		return err == nil && use.Tasks["main"] != nil
	})
}

// committed is what a log says of a database's rows.
type committed struct{ last, starts int }

// read reads all of a log: no row that was committed is missing at a start, and none is without those before it.
func (c *committed) read(t *testing.T, log string) committed {
	t.Helper()
	*c = committed{}
	for line := range strings.Lines(log) {
		var n, most int
		if i := strings.Index(line, "found "); i > 0 { // the line before was not completed
			line = line[i:]
		}
		if _, err := fmt.Sscanf(line, "found %d up to %d\n", &n, &most); err == nil {
			if n != most || n < c.last {
				t.Fatalf("row %d was committed, and at the next start there are %d, up to %d", c.last, n, most)
			}
			c.last, c.starts = n, c.starts+1
		} else if _, err := fmt.Sscanf(line, "committed\t%d\n", &n); err == nil {
			if n != c.last+1 {
				t.Fatalf("row %d follows row %d", n, c.last)
			}
			c.last = n
		}
	}
	return *c
}
