//go:build vm

package guest_test

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/cradlestack/cradlestack/driver-cradle/vmm"
	"github.com/cradlestack/cradlestack/driver-cradle/wire"
	"github.com/cradlestack/cradlestack/internal/nfstest"
	"github.com/cradlestack/cradlestack/spec"
)

// serveNFS serves dir to guests.
func serveNFS(t *testing.T, dir string) *nfstest.Server {
	t.Helper()
	s, err := nfstest.Serve(t.Context(), dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("the NFS server:\n%s", s.Log())
		}
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

func TestVMNFS(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "in"), []byte("from the server\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	server := serveNFS(t, dir)
	address := server.Host + ":2049"
	p := podSpec{net: vmm.Net{Mode: vmm.NetUser}}
	p.ifs = []wire.Interface{{
		Name: "eth0", Addresses: []netip.Prefix{netip.MustParsePrefix("10.0.2.15/24")},
		Routes: []wire.Route{{Destination: netip.MustParsePrefix("0.0.0.0/0"), Via: netip.MustParseAddr("10.0.2.2")}},
	}}
	p.Volumes = []spec.Volume{
		{Name: "v4", NFS: &spec.NFSVolume{Address: address, Export: nfstest.Export, Options: "vers=4.1"}},
		{Name: "any", NFS: &spec.NFSVolume{Address: address, Export: nfstest.Export, ReadOnly: true}},
		// Version 3 asks the portmapper for what it is not told, or tries the port that it is told.
		{Name: "v3", NFS: &spec.NFSVolume{Address: server.Host, Export: nfstest.Export, Options: "vers=3"}},
		{Name: "v3port", NFS: &spec.NFSVolume{Address: address, Export: nfstest.Export, Options: "vers=3"}},
		{Name: "v3mountport", NFS: &spec.NFSVolume{Address: address, Export: nfstest.Export, Options: "vers=3,mountport=20048", ReadOnly: true}},
	}
	const mounted = "; grep -E ' /v ' /proc/mounts | sed 's/.*\\(vers=[0-9.]*\\).*/\\1/'"
	p.Containers = []spec.Container{
		with(sh("v4", "cat /v/in; echo two > /v/two; chown 12:34 /v/two; cat /v/two"+mounted), "v4:/v"),
		with(sh("any", "cat /v/in; touch /v/x 2>/dev/null || echo refused"+mounted), "any:/v"),
		with(sh("v3", "cat /v/in; echo three > /v/three; chown 56:78 /v/three; mv /v/three /v/3; ln -s 3 /v/link; cat /v/link; echo three | cmp - /v/3 && echo same"+mounted), "v3:/v"),
		with(sh("v3port", "cat /v/in; echo x > /v/removed; exec 3</v/removed; rm /v/removed; cat <&3"+mounted), "v3port:/v"),
		with(sh("v3mountport", "cat /v/in; touch /v/x 2>/dev/null || echo refused"+mounted), "v3mountport:/v"),
	}
	m := boots(t, p)
	m.ends()
	m.printed("v4", "from the server\ntwo\nvers=4.1\n")
	m.printed("any", "from the server\nrefused\nvers=4.2\n")
	m.printed("v3", "from the server\nthree\nsame\nvers=3\n")
	m.printed("v3port", "from the server\nx\nvers=3\n")
	m.printed("v3mountport", "from the server\nrefused\nvers=3\n")
	for name, want := range map[string][2]uint32{"two": {12, 34}, "3": {56, 78}} {
		var st unix.Stat_t
		if err := unix.Stat(filepath.Join(dir, name), &st); err != nil || st.Uid != want[0] || st.Gid != want[1] {
			t.Errorf("%s, which the guest wrote: %v, owner %d:%d", name, err, st.Uid, st.Gid)
		}
	}
	if err := m.call("POST", wire.PathShutdown, nil, nil); err != nil {
		t.Error(err)
	}

	p = podSpec{net: p.net, ifs: p.ifs}
	p.Volumes = []spec.Volume{{Name: "v", NFS: &spec.NFSVolume{Address: address, Export: "/nope", Options: "vers=4.1"}}}
	p.Containers = []spec.Container{with(sh("c", "true"), "v:/v")}
	if _, err := tryBoot(t, p); err == nil || !strings.HasPrefix(err.Error(), "volume v: nfs "+server.Host+":/nope: ") {
		t.Errorf("an export that is not there: %v", err)
	}
}

// TestVMNFSFilledOnce: pods that start at the same time on one empty volume all find the image's content there, complete, and what the
// first of them writes stays.
func TestVMNFSFilledOnce(t *testing.T) {
	dir := t.TempDir()
	server := serveNFS(t, dir)
	var pods sync.WaitGroup
	machines, errs := make([]*machine, 2), make([]error, 2)
	for i := range machines {
		p := podSpec{net: vmm.Net{Mode: vmm.NetUser}}
		p.ifs = []wire.Interface{{
			Name: "eth0", Addresses: []netip.Prefix{netip.MustParsePrefix("10.0.2.15/24")},
			Routes: []wire.Route{{Destination: netip.MustParsePrefix("0.0.0.0/0"), Via: netip.MustParseAddr("10.0.2.2")}},
		}}
		p.Volumes = []spec.Volume{{Name: "v", NFS: &spec.NFSVolume{Address: server.Host, Export: nfstest.Export}}}
		p.Containers = []spec.Container{with(sh("c", fmt.Sprintf("echo mine > /bin/of%d; ls -A /bin | grep -v ^of | sort", i)), "v:/bin")}
		pods.Go(func() { machines[i], errs[i] = tryBoot(t, p) })
	}
	pods.Wait()
	outputs := make([]string, 2)
	for i, m := range machines {
		if errs[i] != nil {
			t.Fatal(errs[i])
		}
		m.ends()
		stdout, stderr := m.logs("c")
		outputs[i] = stdout + stderr
	}
	if outputs[0] != outputs[1] || !strings.Contains(outputs[0], "\nbusybox\n") {
		t.Errorf("the pods saw %q and %q", outputs[0], outputs[1])
	}
	entries, err := os.ReadDir(dir)
	if want := strings.Count(outputs[0], "\n") + 2; err != nil || len(entries) != want {
		t.Errorf("the volume has %d entries, want %d (%v)", len(entries), want, err)
	}
	for _, name := range []string{"of0", "of1"} {
		if data, err := os.ReadFile(filepath.Join(dir, name)); err != nil || string(data) != "mine\n" {
			t.Errorf("%s: %q, %v", name, data, err)
		}
	}
}
