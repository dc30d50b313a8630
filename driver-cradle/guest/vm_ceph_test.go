//go:build vm

package guest_test

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/cradlestack/cradlestack/driver-cradle/vmm"
	"github.com/cradlestack/cradlestack/driver-cradle/wire"
	"github.com/cradlestack/cradlestack/internal/cephtest"
	"github.com/cradlestack/cradlestack/spec"
)

// cephVolume makes a cluster with a volume of 64 MiB.
func cephVolume(t *testing.T) spec.CephVolume {
	t.Helper()
	c := cephtest.Lab(t)
	ceph := func(args ...string) string {
		t.Helper()
		out, err := c.Ceph(t.Context(), args...)
		if err != nil {
			t.Fatal(err)
		}
		return strings.TrimSpace(out)
	}
	ceph("fs", "subvolumegroup", "create", cephtest.FS, "g")
	ceph("fs", "subvolume", "create", cephtest.FS, "v", "--group_name", "g", "--namespace-isolated", "--size", "67108864")
	path := ceph("fs", "subvolume", "getpath", cephtest.FS, "v", "--group_name", "g")
	var made []struct{ Key string }
	out := ceph("-f", "json", "auth", "get-or-create", "client.cradle:v", "mon", "allow r", "mds", "allow rw path="+path, "osd", "allow rw pool=data namespace=fsvolumens_v")
	if err := json.Unmarshal([]byte(out), &made); err != nil || len(made) != 1 {
		t.Fatalf("%s: %v", out, err)
	}
	return spec.CephVolume{Monitors: []string{c.Host + ":3300"}, FileSystem: cephtest.FS, Path: path, Client: "cradle:v", Secret: made[0].Key}
}

// cephPod is a pod that has the volume at /v, and a network that leads to the cluster.
func cephPod(name, script string, v spec.CephVolume) podSpec {
	p := podSpec{net: vmm.Net{Mode: vmm.NetUser}}
	p.ifs = []wire.Interface{{
		Name: "eth0", Addresses: []netip.Prefix{netip.MustParsePrefix("10.0.2.15/24")},
		Routes: []wire.Route{{Destination: netip.MustParsePrefix("0.0.0.0/0"), Via: netip.MustParseAddr("10.0.2.2")}},
	}}
	p.Volumes = []spec.Volume{{Name: "v", Ceph: &v}}
	p.Containers = []spec.Container{with(sh(name, script), "v:/v")}
	return p
}

// TestVMCeph: two machines have one directory of a CephFS, each by its own kernel; what one has written the other reads, the quota is the size that they see,
// and the key is nowhere that a container sees.
func TestVMCeph(t *testing.T) {
	volume := cephVolume(t)
	wrong := volume
	wrong.Secret = "AQBY1QhruhogIhAAQz+rIO5WEUFPXC0trpAo4A=="
	if _, err := tryBoot(t, cephPod("c", "true", wrong)); err == nil || !strings.Contains(err.Error(), "volume v: ceph ") || strings.Contains(err.Error(), wrong.Secret) {
		t.Errorf("a wrong key: %v", err)
	}
	first := boots(t, cephPod("first", `echo one > /v/one; touch /v/ready
until [ -e /v/tried ]; do sleep 0.2; done; cat /v/two; df -k /v | tail -n 1 | awk '{ print $(NF-4) }'; grep ' /v ' /proc/mounts | sed 's/.*secret=\([^,]*\).*/\1/'`, volume))
	second := boots(t, cephPod("second", `until [ -e /v/ready ]; do sleep 0.2; done; cat /v/one; echo two > /v/two; touch /v/tried`, volume))
	second.ends()
	first.ends()
	second.printed("second", "one\n")
	first.printed("first", "two\n65536\n<hidden>\n")
	for _, m := range []*machine{first, second} {
		if err := m.call("POST", wire.PathShutdown, nil, nil); err != nil {
			t.Error(err)
		}
	}
	read := volume
	read.ReadOnly = true
	m := boots(t, cephPod("reader", "cat /v/two; touch /v/x 2>/dev/null || echo refused", read))
	m.ends()
	m.printed("reader", "two\nrefused\n")
}

// TestVMCephGrowing: a file to which one machine appends is to the other one, at every moment, what was written until then: nothing is there twice, nothing is
// missing, and never is there less of it, however it is read.
func TestVMCephGrowing(t *testing.T) {
	volume := cephVolume(t)
	// Lines of one length would hide one that is there twice in place of the next.
	const lines = 300
	writer := boots(t, cephPod("writer", fmt.Sprintf(`until [ -e /v/ready ]; do sleep 0.1; done
n=0; while [ $n -lt %d ]; do n=$((n+1)); echo $n >>/v/f; done; echo written`, lines), volume))
	reader := boots(t, cephPod("reader", fmt.Sprintf(`: >/v/f; touch /v/ready; had=0; bad=0
check() { # NAME COMMAND…: what it says is 1, 2, …
	name=$1; shift
	got=$("$@" | awk '$0 != NR && !wrong { print "line " NR " is " $0; wrong = 1 } END { print NR }')
	case $got in
	*line*) echo "$name: $got"; bad=$((bad+1));;
	*) [ $got -ge $had ] || { echo "$name: $got lines after $had"; bad=$((bad+1)); }; had=$got;;
	esac
}
rounds=0
until [ $had -ge %d ] || [ $bad -ge 5 ]; do
	check "sendfile(2)" cat /v/f
	check "read(2)" dd if=/v/f bs=64k 2>/dev/null
	rounds=$((rounds+1))
done
echo "$had lines, $bad wrong"; echo "$rounds rounds" >&2`, lines), volume))
	writer.ends()
	reader.ends()
	stdout, stderr := reader.logs("reader")
	if want := fmt.Sprintf("%d lines, 0 wrong\n", lines); stdout != want {
		t.Errorf("it says\n%swant %s", stdout, want)
	}
	t.Log(stderr)
}
