//go:build vm

package guest_test

import (
	"bytes"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cradlestack/cradlestack/driver-cradle/vmm"
	"github.com/cradlestack/cradlestack/driver-cradle/wire"
	"github.com/cradlestack/cradlestack/spec"
)

// ganesha serves dir over NFS on an address of this machine that a guest can reach, which is none of the loopback interface.
func ganesha(t *testing.T, dir string) (address string) {
	t.Helper()
	path, err := exec.LookPath("ganesha.nfsd")
	if err != nil {
		t.Fatal("no NFS server: apt-get install nfs-ganesha nfs-ganesha-vfs")
	}
	conn, err := net.Dial("udp", "192.0.2.1:9") // sends nothing: it asks for the address that packets would have
	if err != nil {
		t.Fatalf("no address for the NFS server: %v", err)
	}
	host := conn.LocalAddr().(*net.UDPAddr).IP.String()
	conn.Close()
	l, err := net.Listen("tcp", host+":0")
	if err != nil {
		t.Fatal(err)
	}
	address = l.Addr().String()
	port := l.Addr().(*net.TCPAddr).Port
	l.Close()
	work := t.TempDir()
	config := fmt.Sprintf(`
NFS_CORE_PARAM { NFS_Port = %d; Protocols = 4; Enable_NLM = false; Enable_RQUOTA = false; Bind_addr = %s; mount_path_pseudo = true; }
NFSV4 { Graceless = true; RecoveryRoot = %q; }
EXPORT { Export_Id = 1; Path = %q; Pseudo = "/data"; Access_Type = RW; Squash = No_Root_Squash; SecType = sys; Protocols = 4; Transports = TCP; FSAL { Name = VFS; } }
LOG { Default_Log_Level = WARN; }
`, port, host, work, dir)
	file := filepath.Join(work, "ganesha.conf")
	if err := os.WriteFile(file, []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	var log bytes.Buffer
	cmd := exec.CommandContext(t.Context(), path, "-F", "-f", file, "-L", "STDOUT", "-p", filepath.Join(work, "pid"))
	cmd.Stdout, cmd.Stderr = &log, &log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
		if t.Failed() {
			t.Logf("ganesha:\n%s", log.String())
		}
	})
	for end := time.Now().Add(time.Minute); ; time.Sleep(50 * time.Millisecond) {
		if conn, err := net.Dial("tcp", address); err == nil {
			conn.Close()
			return address
		}
		if time.Now().After(end) {
			t.Fatalf("ganesha does not listen:\n%s", log.String())
		}
	}
}

func TestVMNFS(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "in"), []byte("from the server\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	address := ganesha(t, dir)
	p := podSpec{net: vmm.Net{Mode: vmm.NetUser}}
	p.ifs = []wire.Interface{{
		Name: "eth0", Addresses: []netip.Prefix{netip.MustParsePrefix("10.0.2.15/24")},
		Routes: []wire.Route{{Destination: netip.MustParsePrefix("0.0.0.0/0"), Via: netip.MustParseAddr("10.0.2.2")}},
	}}
	p.Volumes = []spec.Volume{
		{Name: "v4", NFS: &spec.NFSVolume{Address: address, Export: "/data", Options: "vers=4.1"}},
		{Name: "any", NFS: &spec.NFSVolume{Address: address, Export: "/data", ReadOnly: true}},
	}
	p.Containers = []spec.Container{
		with(sh("c", "cat /v4/in; echo two > /v4/two; chown 12:34 /v4/two; cat /v4/two; touch /any/x 2>/dev/null || echo refused; grep ' /\\(v4\\|any\\) ' /proc/mounts | sed 's/.*\\(vers=[0-9.]*\\).*/\\1/'"), "v4:/v4", "any:/any"),
	}
	m := boots(t, p)
	m.ends()
	m.printed("c", "from the server\ntwo\nrefused\nvers=4.2\nvers=4.1\n")
	var st unix.Stat_t
	if err := unix.Stat(filepath.Join(dir, "two"), &st); err != nil || st.Uid != 12 || st.Gid != 34 {
		t.Errorf("what the guest wrote: %v, owner %d:%d", err, st.Uid, st.Gid)
	}
	if err := m.call("POST", wire.PathShutdown, nil, nil); err != nil {
		t.Error(err)
	}

	p = podSpec{net: p.net, ifs: p.ifs}
	p.Volumes = []spec.Volume{{Name: "v", NFS: &spec.NFSVolume{Address: address, Export: "/nope", Options: "vers=4.1"}}}
	p.Containers = []spec.Container{with(sh("c", "true"), "v:/v")}
	if _, err := tryBoot(t, p); err == nil || !strings.HasPrefix(err.Error(), "volume v: nfs "+strings.Split(address, ":")[0]+":/nope: ") {
		t.Errorf("an export that is not there: %v", err)
	}
}

// TestVMNFSFilledOnce: pods that start at the same time on one empty volume all find the image's content there, complete, and what the
// first of them writes stays.
func TestVMNFSFilledOnce(t *testing.T) {
	dir := t.TempDir()
	address := ganesha(t, dir)
	var pods sync.WaitGroup
	machines, errs := make([]*machine, 2), make([]error, 2)
	for i := range machines {
		p := podSpec{net: vmm.Net{Mode: vmm.NetUser}}
		p.ifs = []wire.Interface{{
			Name: "eth0", Addresses: []netip.Prefix{netip.MustParsePrefix("10.0.2.15/24")},
			Routes: []wire.Route{{Destination: netip.MustParsePrefix("0.0.0.0/0"), Via: netip.MustParseAddr("10.0.2.2")}},
		}}
		p.Volumes = []spec.Volume{{Name: "v", NFS: &spec.NFSVolume{Address: address, Export: "/data"}}}
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
