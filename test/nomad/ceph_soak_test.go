//go:build vm && soak

package nomad

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/hashicorp/nomad/api"

	"github.com/cradlestack/cradlestack/internal/cephtest"
	"github.com/cradlestack/cradlestack/internal/nomadtest"
	"github.com/cradlestack/cradlestack/spec"
	"github.com/cradlestack/cradlestack/test/programs"
)

// A reef is two nodes with the driver and the CSI plugin of examples/nomad/volumes for CephFS, and a cluster that keeps their volumes.
type reef struct {
	*storehouse
	ceph    *cephtest.Cluster
	keyring string
}

func startReef(t *testing.T) *reef {
	c := cephtest.Lab(t)
	r := &reef{storehouse: &storehouse{t: t, used: map[string]bool{}}, ceph: c}
	var err error
	if r.root, err = programs.Root(); err != nil {
		t.Fatal(err)
	}
	if r.keyring, err = c.Plugin(t.Context(), filepath.Join(r.root, "examples/nomad/volumes/ceph-client.sh"), "cradle"); err != nil {
		t.Fatal(err)
	}
	if r.image, err = programs.Image("busybox"); err != nil {
		t.Fatal(err)
	}
	o := nomadtest.Options{Clients: 2, Drivers: []string{"raw_exec"}, Keep: []string{"nomad/client/csi", "/run/cradle"}}
	if err := o.Cradle(""); err != nil {
		t.Fatal(err)
	}
	r.Cluster = nomadtest.Start(t, o)
	if err := r.Attach(c.Namespace(), netip.MustParseAddr(c.Host)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(r.clear)
	for _, n := range r.Clients() {
		r.plugin(n)
	}
	r.eventually("healthy plugins", func() bool {
		p, _, err := r.API.CSIPlugins().Info("cradle", nil)
		return err == nil && p.ControllersHealthy == 2 && p.NodesHealthy == 2
	})
	return r
}

// plugin runs the example on one node: these have not all the same data_dir, as hosts do.
func (r *reef) plugin(n *nomadtest.Node) {
	r.t.Helper()
	r.node = n
	r.Run(r.t, strings.NewReplacer(
		`job "cradle-csi-ceph" {`, fmt.Sprintf("job \"cradle-csi-%s\" {\n  constraint {\n    attribute = \"${node.unique.name}\"\n    value     = %q\n  }", n.Name, n.Name),
		`"--pool", "cephfs"`, fmt.Sprintf(`"--pool", "cephfs", "--ceph-conf", %q, "--ceph-keyring", %q`, r.ceph.Conf, r.keyring),
	).Replace(r.example("cradle-csi-ceph.nomad.hcl")))
}

// clear ends what has volumes and removes those; nothing of them is left in the cluster.
func (r *reef) clear() {
	jobs, _, err := r.API.Jobs().List(nil)
	if err != nil {
		r.t.Error(err)
	}
	for _, j := range jobs {
		if !strings.HasPrefix(j.ID, "cradle-csi-") && j.Status != "dead" {
			r.Stop(r.t, j.ID)
		}
	}
	for name := range r.used {
		r.released(name)
	}
	r.TryCLI(r.t, "", "volume", "snapshot", "delete", "cradle", "cluster@running")
	for name := range r.used {
		r.CLI(r.t, "volume", "delete", name)
	}
	ctx := context.WithoutCancel(r.t.Context())
	if out, err := r.ceph.Ceph(ctx, "fs", "subvolume", "ls", cephtest.FS, "--group_name", "cradle"); err != nil || strings.TrimSpace(out) != "[]" {
		r.t.Errorf("left in the file system: %s, %v", out, err)
	}
	if out, err := r.ceph.Ceph(ctx, "auth", "ls", "-f", "json"); err != nil || strings.Contains(out, `"entity":"client.cradle:`) {
		r.t.Errorf("keys are left: %s, %v", out, err)
	}
	for _, n := range r.Clients() {
		for _, dir := range []string{spec.DirectDir, "/run/cradle/ceph/mounts", "/run/cradle/ceph/run"} {
			if left, err := os.ReadDir(n.Path(dir)); len(left) > 0 || err != nil && !os.IsNotExist(err) {
				r.t.Errorf("left in %s of %s: %v, %v", dir, n.Name, left, err)
			}
		}
	}
}

// released waits until nobody has a volume, on either node.
func (r *reef) released(name string) {
	r.t.Helper()
	for _, n := range r.Clients() {
		r.node = n
		r.storehouse.released(name)
	}
}

const anywhere = "multi-node-multi-writer"

// on is a job with a volume on a node, on any where that is nil.
func (r *reef) on(n *nomadtest.Node, name, kind, volume, script string) string {
	where := ""
	if n != nil {
		where = fmt.Sprintf("constraint {\n attribute = \"${node.unique.name}\"\n value = %q\n}", n.Name)
	}
	claim := fmt.Sprintf("\n      source          = %q\n      attachment_mode = \"file-system\"\n      access_mode     = %q", volume, anywhere)
	return r.Run(r.t, r.pod(name, kind, where, claim, "/v", script))
}

// says runs a pod with a volume to its end, and returns what it says.
func (r *reef) says(n *nomadtest.Node, name, volume, script string) string {
	r.t.Helper()
	a := r.UntilEnded(r.t, r.on(n, name, "batch", volume, script))
	out := r.Logs(r.t, a.ID, "main", "stdout")
	if a.ClientStatus != "complete" {
		r.t.Fatalf("job %s: %s\n%s%s\n%s", name, a.ClientStatus, out, r.Logs(r.t, a.ID, "main", "stderr"), r.Describe())
	}
	return out
}

// doctor runs cradle-csi doctor on a node.
func (r *reef) doctor(n *nomadtest.Node) string {
	r.t.Helper()
	out, err := n.Output(r.t.Context(), filepath.Join(r.root, "bin/cradle-csi"), "doctor", "--backend", "ceph", "--pool", cephtest.FS, "--ceph-conf", r.ceph.Conf,
		"--ceph-keyring", r.keyring, "--nomad", "http://"+r.Server().IP.String()+":4646")
	if err != nil {
		r.t.Fatal(err)
	}
	return out
}

// TestVMSoakCeph goes through what users of class gfs do, on two nodes: volumes that guests mount themselves and volumes that hosts mount, each by two pods at once that write
// and read what the other has written, while they grow, are copied, plugins are killed, a node is drained, and a node loses its power.
func TestVMSoakCeph(t *testing.T) {
	r := startReef(t)
	one, two := r.Clients()[0], r.Clients()[1]
	r.volume("cluster")

	// Each writes its lines, and looks that the other's never become fewer.
	const writes = `o=0; n=$(cat /v/%[1]s 2>/dev/null | wc -l); while :; do n=$((n+1)); echo $n >>/v/%[1]s && sync /v/%[1]s || { echo failed; exit 1; }
k=$(cat /v/%[2]s 2>/dev/null | wc -l); test $k -ge $o || { echo "cat: $k after $o"; od -c /v/%[2]s | tail -n 3; }
m=$(wc -l 2>/dev/null </v/%[2]s || echo 0); test $m -ge $o || { echo "stale: $m after $o"; od -c /v/%[2]s | tail -n 3; sleep 1;  od -c /v/%[2]s | tail -n 3; exit 1; }; o=$m; echo $n $o; sleep 0.2; done`
	writers := map[string]string{} // → their allocation
	start := func(volume string) {
		t.Helper()
		for _, w := range []struct {
			node      *nomadtest.Node
			me, other string
		}{{one, "a", "b"}, {two, "b", "a"}} {
			name := volume + "-" + w.me
			job := r.on(w.node, name, "service", volume, "grep -o ' /v [a-z]*' /proc/mounts; "+fmt.Sprintf(writes, w.me, w.other))
			writers[name] = r.UntilRunning(t, job).ID
		}
	}
	last := func(name string) (mine, theirs int) {
		t.Helper()
		text := r.Logs(t, writers[name], "main", "stdout")
		if strings.Contains(text, "failed") || strings.Contains(text, "stale") {
			t.Fatalf("%s says %s\n%s", name, text[max(0, len(text)-200):], r.Logs(t, writers[name], "main", "stderr"))
		}
		lines := strings.Split(text[:strings.LastIndexByte(text, '\n')+1], "\n")
		if len(lines) < 3 {
			return 0, 0
		}
		words := strings.Fields(lines[len(lines)-2])
		mine, _ = strconv.Atoi(words[0])
		theirs, _ = strconv.Atoi(words[len(words)-1])
		return mine, theirs
	}
	goOn := func(after string) {
		t.Helper()
		for name := range writers {
			mine, theirs := last(name)
			r.eventually(fmt.Sprintf("%s going on after %s", name, after), func() bool {
				m, o := last(name)
				return m >= mine+3 && o >= theirs+3
			})
		}
	}
	if out := r.says(one, "quota", "cluster", "dd if=/dev/zero of=/v/big bs=1M count=200 2>&1 | grep -o 'No space left on device\\|Disk quota exceeded\\|Quota exceeded'; rm /v/big"); out == "" {
		t.Error("200 MiB are written to a volume of 64 MiB")
	}
	start("cluster")
	goOn("its start")
	if text := r.Logs(t, writers["cluster-a"], "main", "stdout"); !strings.HasPrefix(text, " /v ceph\n") {
		t.Errorf("the guest's mount: %.80s", text)
	}
	r.volume("cluster", `"64MiB"`, `"96MiB"`)
	r.CLI(t, "volume", "snapshot", "create", "cluster", "running")
	goOn("growth and a snapshot")
	if out := r.says(two, "size", "cluster", "df -P -m /v | tail -n 1 | while read dev size rest; do echo $size; done"); out != "96\n" {
		t.Errorf("grown to 96 MiB, a guest sees %q", out)
	}

	// The clone is mounted by the hosts.
	r.volume("copy", `"database@before-upgrade"`, `"cluster@running"`, `class = "lv2"`, `class = "gfs"`, `"single-node-writer"`, `"`+anywhere+`"`)
	start("copy")
	goOn("the clone")
	if text := r.Logs(t, writers["copy-a"], "main", "stdout"); strings.HasPrefix(text, " /v ceph\n") || !strings.HasPrefix(text, " /v ") {
		t.Errorf("what the host has mounted is to the guest %.80s", text)
	}
	for range 2 {
		r.kill("cradle-csi")
		goOn("the plugin's end")
	}
	r.healthyOn(2)
	r.CLI(t, "alloc", "restart", writers["copy-b"])
	r.UntilLogs(t, writers["copy-b"], "main", "stdout", func(text string) bool { return strings.Count(text, " /v ") == 2 })
	goOn("a restart")

	// again waits for the next allocations of the jobs that run on the second node alone.
	again := func() {
		t.Helper()
		for _, volume := range []string{"cluster", "copy"} {
			name := volume + "-b"
			writers[name] = r.UntilAlloc(t, name, "a new pod", func(a *api.AllocationListStub) bool {
				return a.ID != writers[name] && nomadtest.Running(a)
			}).ID
		}
	}
	r.drains(two, one)
	again()
	goOn("a drain")

	// Power is cut, with four attachments: what is stale is found when the node is back, and its pods are placed there again.
	if err := two.Crash(); err != nil {
		t.Fatal(err)
	}
	r.Until(t, "the loss of "+two.Name, func(st *nomadtest.State) bool { return st.Node(two.Name).Status == api.NodeStatusDown })
	if err := two.Boot(); err != nil {
		t.Fatal(err)
	}
	r.healthyOn(2)
	again()
	goOn("a power cut")
	for name := range writers {
		r.Stop(t, name)
	}
	clear(writers)
	for _, volume := range []string{"cluster", "copy"} {
		r.released(volume)
	}
	for _, n := range r.Clients() {
		r.doctor(n)
		if out := r.doctor(n); out != "nothing to repair\n" {
			t.Errorf("on %s there is always something to repair:\n%s", n.Name, out)
		}
	}
	if _, stderr, code := r.TryCLI(t, "", "volume", "delete", "cluster"); code == 0 || !strings.Contains(stderr, "cluster@running") {
		t.Errorf("delete a volume with a snapshot: exit code %d, %s", code, stderr)
	}
}

// healthyOn waits until so many plugins are healthy.
func (r *reef) healthyOn(nodes int) {
	r.t.Helper()
	r.eventually("healthy plugins", func() bool {
		p, _, err := r.API.CSIPlugins().Info("cradle", nil)
		return err == nil && p.ControllersHealthy == nodes && p.NodesHealthy == nodes
	})
}

// drains drains a node: a pod that may be anywhere goes on on the other one.
func (r *reef) drains(from, to *nomadtest.Node) {
	t := r.t
	id := func(n *nomadtest.Node) (id string) {
		r.Until(t, "node "+n.Name, func(st *nomadtest.State) bool { id = st.Node(n.Name).ID; return true })
		return id
	}
	r.CLI(t, "node", "eligibility", "-disable", id(to))
	job := r.on(nil, "mover", "service", "cluster", "echo x >>/v/moved; wc -l </v/moved; while :; do sleep 1; done")
	a := r.UntilRunning(t, job)
	r.UntilLogsHave(t, a.ID, "main", "stdout", "1\n")
	r.CLI(t, "node", "eligibility", "-enable", id(to))
	r.CLI(t, "node", "drain", "-enable", "-yes", "-ignore-system", "-deadline", "2m", id(from)) // returns when the node is empty
	b := r.UntilAlloc(t, job, "a place on "+to.Name, func(b *api.AllocationListStub) bool {
		return b.NodeName == to.Name && nomadtest.Running(b)
	})
	r.UntilLogsHave(t, b.ID, "main", "stdout", "2\n")
	r.CLI(t, "node", "drain", "-disable", "-yes", id(from))
	r.Stop(t, job)
}
