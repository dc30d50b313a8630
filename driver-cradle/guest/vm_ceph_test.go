//go:build vm

package guest_test

import (
	"encoding/json"
	"net/netip"
	"strings"
	"testing"

	"github.com/cradlestack/cradlestack/driver-cradle/vmm"
	"github.com/cradlestack/cradlestack/driver-cradle/wire"
	"github.com/cradlestack/cradlestack/internal/cephtest"
	"github.com/cradlestack/cradlestack/spec"
)

// TestVMCeph: two machines have one directory of a CephFS, each by its own kernel; what one has written the other reads, the quota is the size that they see,
// and the key is nowhere that a container sees.
func TestVMCeph(t *testing.T) {
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
	volume := spec.CephVolume{Monitors: []string{c.Host + ":3300"}, FileSystem: cephtest.FS, Path: path, Client: "cradle:v", Secret: made[0].Key}
	pod := func(name, script string, v spec.CephVolume) podSpec {
		p := podSpec{net: vmm.Net{Mode: vmm.NetUser}}
		p.ifs = []wire.Interface{{
			Name: "eth0", Addresses: []netip.Prefix{netip.MustParsePrefix("10.0.2.15/24")},
			Routes: []wire.Route{{Destination: netip.MustParsePrefix("0.0.0.0/0"), Via: netip.MustParseAddr("10.0.2.2")}},
		}}
		p.Volumes = []spec.Volume{{Name: "v", Ceph: &v}}
		p.Containers = []spec.Container{with(sh(name, script), "v:/v")}
		return p
	}
	wrong := volume
	wrong.Secret = "AQBY1QhruhogIhAAQz+rIO5WEUFPXC0trpAo4A=="
	if _, err := tryBoot(t, pod("c", "true", wrong)); err == nil || !strings.Contains(err.Error(), "volume v: ceph ") || strings.Contains(err.Error(), wrong.Secret) {
		t.Errorf("a wrong key: %v", err)
	}
	first := boots(t, pod("first", `echo one > /v/one; touch /v/ready
until [ -e /v/tried ]; do sleep 0.2; done; cat /v/two; df -k /v | tail -n 1 | awk '{ print $(NF-4) }'; grep ' /v ' /proc/mounts | sed 's/.*secret=\([^,]*\).*/\1/'`, volume))
	second := boots(t, pod("second", `until [ -e /v/ready ]; do sleep 0.2; done; cat /v/one; echo two > /v/two; touch /v/tried`, volume))
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
	m := boots(t, pod("reader", "cat /v/two; touch /v/x 2>/dev/null || echo refused", read))
	m.ends()
	m.printed("reader", "two\nrefused\n")
}
