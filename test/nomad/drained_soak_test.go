//go:build vm && soak

package nomad

import (
	"testing"

	"github.com/cradlestack/cradlestack/internal/nomadtest"
)

// TestVMSoakDrained restarts pods that have a volume each, attached by the guest and by the host, and drains their node: without a person's doing each is placed anew, with
// what it had written.
func TestVMSoakDrained(t *testing.T) {
	s := startStorehouse(t, "")
	const script = "echo started >>/v/starts; sync; echo start $(wc -l </v/starts); exec sleep 100000"
	former := map[string]string{}
	for _, volume := range []string{"guest", "database"} {
		s.volume(volume)
		job := s.Run(t, s.job("has "+volume, volume, false, "/v", script, "service"))
		former[job] = s.UntilRunning(t, job).ID
	}
	for job, id := range former {
		s.UntilLogsHave(t, id, "main", "stdout", "start 1\n")
		s.CLI(t, "alloc", "restart", id)
		s.UntilLogsHave(t, id, "main", "stdout", "start 2\n")
		if now := s.UntilRunning(t, job).ID; now != id {
			t.Errorf("job %s: allocation %s was restarted, and %s runs", job, id, now)
		}
	}
	var node string
	s.Until(t, "the node", func(st *nomadtest.State) bool { node = st.Node(s.node.Name).ID; return true })
	s.CLI(t, "node", "drain", "-enable", "-yes", "-ignore-system", "-deadline", "2m", node)
	for volume := range s.used {
		s.released(volume)
	}
	s.CLI(t, "node", "drain", "-disable", "-yes", node)
	for job, id := range former {
		a := s.UntilRunning(t, job)
		if a.ID == id {
			t.Errorf("job %s: allocation %s was never drained", job, id)
		}
		s.UntilLogsHave(t, a.ID, "main", "stdout", "start 3\n")
		s.Stop(t, job)
	}
}
