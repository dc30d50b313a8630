//go:build vm && soak

package nomad

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/cradlestack/cradlestack/internal/nomadtest"
	"github.com/cradlestack/cradlestack/spec"
	"github.com/cradlestack/cradlestack/test/programs"
)

// TestVMSoakFilerSet: pods on two nodes have one volume from a set of filers, whose members run there as a job, on a directory that both have. Each is killed while it is
// the active one, and hands over; who writes waits and goes on.
func TestVMSoakFilerSet(t *testing.T) {
	filerSet(t, func(pool string) string { return fmt.Sprintf(`"--pool", %q`, pool) })
}

// TestVMSoakFilerSetBackend: the same, of plugins that have the active filer keep the volumes.
func TestVMSoakFilerSetBackend(t *testing.T) {
	filerSet(t, func(string) string { return `"--backend", "filer"` })
}

func filerSet(t *testing.T, keep func(pool string) string) {
	s := &storehouse{t: t, used: map[string]bool{}}
	var err error
	if s.root, err = programs.Root(); err != nil {
		t.Fatal(err)
	}
	if s.image, err = programs.Image("busybox"); err != nil {
		t.Fatal(err)
	}
	o := nomadtest.Options{Clients: 2, Consul: true, Drivers: []string{"raw_exec"}, Keep: []string{"filer", "nomad/client/csi", "/run/cradle"}}
	if err := o.Cradle(""); err != nil {
		t.Fatal(err)
	}
	s.Cluster = nomadtest.Start(t, o)
	pool := filepath.Join(s.Dir(), "shared", "volumes")
	if err := os.MkdirAll(pool, 0o700); err != nil {
		t.Fatal(err)
	}
	nodes := s.Clients()
	bytes := nodes[0].IP.As4()
	bytes[3] = 250
	floating := netip.AddrFrom4(bytes)
	s.node = nodes[0]
	replace := strings.NewReplacer("10.1.2.9", floating.String(), "/mnt/shared/volumes", pool,
		`"--pool", "`+filepath.Join(s.node.Dir, "volumes")+`", "--filer", "/run/cradle/filer/api.sock"`,
		fmt.Sprintf(`%s, "--filer", "%s:2051", "--filer-key", %q`, keep(pool), floating, filepath.Join(pool, ".cradle-filer@state/handles.key")))
	s.Run(t, replace.Replace(s.example("cradle-filers.nomad.hcl")))
	for _, n := range nodes { // these have not all the same data_dir, as hosts do
		text := strings.ReplaceAll(replace.Replace(s.example("cradle-csi.nomad.hcl")), s.node.Dir, n.Dir)
		s.Run(t, strings.Replace(text, `job "cradle-csi" {`, fmt.Sprintf("job \"cradle-csi-%s\" {\n%s", n.Name, on(n)), 1))
	}
	s.eventually("healthy plugins", func() bool {
		p, _, err := s.API.CSIPlugins().Info("cradle", nil)
		return err == nil && p.ControllersHealthy == 2 && p.NodesHealthy == 2
	})
	type set struct {
		Active  string
		Serving bool
		Standby []string
	}
	status := func(n *nomadtest.Node) set {
		var st struct{ Set set }
		text, err := n.Output(t.Context(), filepath.Join(s.root, "bin/cradle-filer"), "status", "-o", "json")
		if err == nil {
			err = json.Unmarshal([]byte(text), &st)
		}
		if err != nil {
			t.Logf("%s: %v", n.Name, err)
		}
		return st.Set
	}
	active := func() (is, other *nomadtest.Node) {
		t.Helper()
		s.eventually("an active filer and one that stands by", func() bool {
			for i, n := range nodes {
				if st := status(n); st.Active == n.Name && st.Serving && len(st.Standby) == 1 {
					is, other = n, nodes[1-i]
					return true
				}
			}
			return false
		})
		return is, other
	}
	active()
	if _, said, code := s.TryCLI(t, strings.ReplaceAll(s.example("shared.volume.hcl"), `"shared"`, `"sized"`), "volume", "create", "-"); code == 0 || !strings.Contains(said, "without a size") {
		t.Errorf("a volume with a size on a set's pool: exit code %d, %s", code, said)
	}
	s.volume("shared", `capacity_min = "64MiB"`, "")
	t.Cleanup(func() {
		for _, n := range nodes {
			s.node = n
			s.released("shared")
		}
		s.CLI(t, "volume", "delete", "shared")
		for _, n := range nodes {
			if left, err := os.ReadDir(n.Path(spec.DirectDir)); len(left) > 0 || err != nil && !os.IsNotExist(err) {
				t.Errorf("left of direct attachments on %s: %v, %v", n.Name, left, err)
			}
		}
	})
	w := &appenders{storehouse: s}
	for i, n := range nodes {
		w.start(fmt.Sprintf("on-%d", i), on(n))
	}
	w.goOn("their start")
	for range 2 { // of either node's
		was, other := active()
		s.node = was
		s.kill("cradle-filer")
		s.eventually("the filer of "+other.Name+" to be the active one", func() bool { return status(other).Active == other.Name })
		w.goOn("the filer's end on " + was.Name)
	}
	was, other := active()
	if out, err := other.Output(t.Context(), filepath.Join(s.root, "bin/cradle-filer"), "switch"); err != nil {
		t.Fatalf("switch: %v: %s", err, out)
	}
	if now, _ := active(); now == was {
		t.Error("cradle-filer switch has changed nothing")
	}
	w.goOn("the switch")
	s.CLI(t, "volume", "snapshot", "create", "shared", "running")
	w.goOn("a snapshot")
	said := map[string]int{}
	for name := range w.allocs {
		s.Stop(t, name)
		said[name] = w.last(name)
	}
	_, other = active()
	read := s.UntilEnded(t, s.Run(t, s.shared("reader", "batch", on(other), "multi-node-reader-only", true, "wc -l </v/on-0; wc -l </v/on-1; touch /v/x 2>/dev/null || echo refused; wc -l </v/.snapshots/running/on-0")))
	var first, second, before int
	var refused string
	if _, err := fmt.Sscan(s.Logs(t, read.ID, "main", "stdout"), &first, &second, &refused, &before); err != nil || first < said["on-0"] || second < said["on-1"] || refused != "refused" || before == 0 || before > first {
		t.Errorf("the reader sees %d and %d lines, %q, %d in the snapshot, %v; %v were acknowledged", first, second, refused, before, err, said)
	}
	s.CLI(t, "volume", "snapshot", "delete", "cradle", "shared@running")
}

// on is the constraint of a job for a node.
func on(n *nomadtest.Node) string {
	return fmt.Sprintf("constraint {\n attribute = \"${node.unique.name}\"\n value = %q\n}", n.Name)
}
