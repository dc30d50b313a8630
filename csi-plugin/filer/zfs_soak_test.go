//go:build vm && soak

package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/minio/minio-go/v7"
	"golang.org/x/sys/unix"

	"github.com/cradlestack/cradlestack/csi-plugin/filer/api"
	"github.com/cradlestack/cradlestack/internal/locked"
	"github.com/cradlestack/cradlestack/test/programs"
)

// A machine is one that has ZFS, a disk that another one has as well, and a filer of their set, which is started again when it ends.
type machine struct {
	*pair
	name, address string
	engine        string
	servers       *servers
	net           *http.Client
	qemu          *exec.Cmd
	console       locked.Buffer
}

// boot starts it, and waits until it takes commands.
func (m *machine) boot(lab, disk string) {
	m.t.Helper()
	job := m.file(m.name)
	m.qemu = exec.Command("ip", "netns", "exec", m.ns("sw"), lab, "run", job)
	m.qemu.Env = append(os.Environ(), "TMPDIR="+m.dir, "ZFSLAB_TIMEOUT=7200", "ZFSLAB_DISK="+disk, "ZFSLAB_NET=tap,ifname="+m.name+",script=no,downscript=no", "ZFSLAB_MAC=52:54:00:77:00:0"+m.address[len(m.address)-1:],
		"ZFSLAB_QMP="+m.monitor())
	m.qemu.Stdout, m.qemu.Stderr = &m.console, &m.console
	m.qemu.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := m.qemu.Start(); err != nil {
		m.t.Fatal(err)
	}
	m.eventually(m.name+" takes commands", func() error {
		_, err := m.run("true")
		return err
	})
}

// hostID is its own, as printf has it.
func (m *machine) hostID() string { return `\1\1\1\` + m.address[len(m.address)-1:] }

func (m *machine) monitor() string { return m.file(m.name + ".qmp") }

// silence has its disk answer nothing any more, nor an error: what is asked of it is let through a byte in a second.
func (m *machine) silence() {
	m.t.Helper()
	c, err := net.Dial("unix", m.monitor())
	if err != nil {
		m.t.Fatal(err)
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(time.Minute))
	answers := json.NewDecoder(c)
	for _, command := range []string{
		"", // it speaks first
		`{"execute": "qmp_capabilities"}`,
		`{"execute": "block_set_io_throttle", "arguments": {"device": "d0", "bps": 1, "bps_rd": 0, "bps_wr": 0, "iops": 0, "iops_rd": 0, "iops_wr": 0}}`,
	} {
		var answer struct{ Error any }
		if _, err := io.WriteString(c, command); err != nil {
			m.t.Fatal(err)
		}
		if err := answers.Decode(&answer); err != nil || answer.Error != nil {
			m.t.Fatalf("QEMU says to %s: %v, %v", command, answer.Error, err)
		}
	}
}

// lose ends it, as a power cut does.
func (m *machine) lose() {
	if m.qemu == nil {
		return
	}
	_ = unix.Kill(-m.qemu.Process.Pid, unix.SIGKILL)
	_ = m.qemu.Wait()
	m.qemu = nil
}

// run has its shell do something.
func (m *machine) run(script string) (string, error) {
	resp, err := m.net.Post("http://"+m.address+":8080/cgi-bin/run", "text/plain", strings.NewReader(script+"\n"))
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	out, err := io.ReadAll(resp.Body)
	text, ok := strings.CutSuffix(string(out), "exit 0\n")
	if err == nil && !ok {
		err = fmt.Errorf("%s: %s: %.2000s", m.name, script, out)
	}
	return text, err
}

func (m *machine) must(script string) string {
	m.t.Helper()
	out, err := m.run(script)
	if err != nil {
		m.t.Fatal(err)
	}
	return out
}

func (m *machine) status() (s api.Status, err error) {
	out, err := m.run("./cradle-filer status -o json")
	if err == nil {
		err = json.Unmarshal([]byte(out), &s)
	}
	if err == nil && s.Set == nil {
		err = errors.New("it is of no set")
	}
	return s, err
}

// pids are of the processes with such a command line.
func (m *machine) pids(command string) string {
	m.t.Helper()
	out := m.must("ps | grep '[" + command[:1] + "]" + command[1:] + "' | awk '{print $1}'")
	pids := strings.Join(strings.Fields(out), " ")
	if pids == "" {
		m.t.Fatalf("%s has no process %s", m.name, command)
	}
	return pids
}

// hasPool says whether it could write to the zpool: in one that is suspended it can't, and never again.
func (m *machine) hasPool() bool {
	out, err := m.run("timeout 60 zpool list -H -o name; cat /proc/spl/kstat/zfs/tank/state 2>/dev/null") // which waits for an import that is at work
	return err == nil && slices.Contains(strings.Fields(out), "tank") && !slices.Contains(strings.Fields(out), "SUSPENDED")
}

// gaveUp waits until it has let go of all that others need, and says why, and has ZFS refuse to go on: its zpool is suspended. It is to be booted then.
func (m *machine) gaveUp(other *machine) {
	m.t.Helper()
	m.eventually(m.name+" says that its zpool is suspended", func() error {
		s, err := m.status()
		if err == nil && (s.Set.Active != other.name || !s.Set.Serving || !strings.Contains(s.Set.Waits, "zpool tank") || !strings.Contains(s.Set.Waits, "suspended") || slices.Contains(s.Set.Standby, m.name)) {
			err = fmt.Errorf("it says %+v", *s.Set)
		}
		return err
	})
	if s, err := other.status(); err != nil || !strings.Contains(s.Set.Why, "suspended") {
		m.t.Errorf("%s says that it serves as %q, %v", other.name, s.Set.Why, err)
	}
	if out := m.must("wget -q -O - http://127.0.0.1:9810/metrics"); !strings.Contains(out, `cradle_filer_zpool_suspended{zpool="tank"} 1`) || !strings.Contains(out, "cradle_filer_active 0") {
		m.t.Errorf("%s's metrics are\n%s", m.name, out)
	}
	m.lostAddress()
	if out, err := m.run("timeout 30 zpool clear tank"); err == nil {
		m.t.Errorf("zpool clear has %s go on with a zpool that the other one has: %s", m.name, out)
	} else {
		m.t.Logf("zpool clear says %v", err)
	}
}

// lostAddress waits until its host is out of the way of the other one, though processes may hang in it.
func (m *machine) lostAddress() {
	m.t.Helper()
	m.eventually(m.name+" has not the set's address", func() error {
		out, err := m.run("ip addr show dev eth0")
		if err == nil && strings.Contains(out, serviceAddress+"/") {
			err = errors.New("it has")
		}
		return err
	})
}

type zfsDrill struct {
	name string
	do   func(active, other *machine, boot func(*machine))
}

// zfsDrills are what happens to the active filer, or its machine. boot ends a machine and starts it again.
var zfsDrills = []zfsDrill{
	{"switched", func(active, _ *machine, _ func(*machine)) { active.must("./cradle-filer switch") }},
	{"killed", func(active, _ *machine, _ func(*machine)) {
		active.must("kill -9 " + active.pids("cradle-filer serve"))
	}},
	// Continued where another one is active: if it is there still.
	{"frozen", func(active, other *machine, _ func(*machine)) {
		pid := active.pids("cradle-filer serve")
		active.must("kill -STOP " + pid)
		other.serves()
		active.must("kill -CONT " + pid + " || true")
	}},
	// Nobody is left to export the zpool: the one that is started again does, whichever serves then.
	{"killed with its warden", func(active, _ *machine, _ func(*machine)) {
		active.must("kill -9 " + active.pids("exe warden") + " " + active.pids("cradle-filer serve"))
	}},
	{"host lost", func(active, other *machine, boot func(*machine)) {
		active.lose()
		other.serves()
		boot(active)
	}},
	// It finds out by itself, exports the zpool, and stands by once it is connected again.
	{"cut off", func(active, other *machine, _ func(*machine)) {
		active.ip("-n", active.ns("sw"), "link", "set", "dev", active.name, "down")
		other.serves()
		active.ip("-n", active.ns("sw"), "link", "set", "dev", active.name, "up")
	}},
	// To ZFS the two are one host: the other one does not stand by until it has a hostid of its own.
	{"same hostid", func(active, other *machine, _ func(*machine)) {
		other.must("printf '" + active.hostID() + "' >/etc/hostid; kill " + other.pids("cradle-filer serve"))
		other.eventually(other.name+" finds out that it has the hostid of "+active.name, func() error {
			s, err := other.status()
			if err == nil && (!strings.Contains(s.Set.Waits, "hostid") || slices.Contains(s.Set.Standby, other.name)) {
				err = fmt.Errorf("it says %+v", *s.Set)
			}
			return err
		})
		if out, err := active.run("./cradle-filer switch"); err == nil || !strings.Contains(err.Error(), "no other filer") {
			active.t.Errorf("then a switch says %s, %v", out, err)
		}
		other.must("printf '" + other.hostID() + "' >/etc/hostid; kill " + other.pids("cradle-filer serve"))
	}},
	{"Consul's leader killed", func(active, _ *machine, _ func(*machine)) { active.servers.killLeader() }},
	// ZFS gets errors at once. It writes again and again, which leaves a machine of one processor with little time for anything else, or lets the zpool be exported.
	{"disk gone", func(active, other *machine, boot func(*machine)) {
		active.must("echo 1 >/sys/block/vda/device/../remove")
		other.serves()
		active.lostAddress()
		boot(active)
	}},
	{"disk silent", func(active, other *machine, boot func(*machine)) {
		active.silence()
		other.serves()
		active.gaveUp(other)
		boot(active)
	}},
	{"disk silent, with failmode=panic", func(active, other *machine, boot func(*machine)) {
		active.must("zpool set failmode=panic tank")
		active.silence()
		ended := make(chan error, 1)
		go func() { ended <- active.qemu.Wait() }()
		select {
		case <-ended: // it boots itself, which QEMU takes for its end
		case <-time.After(3 * time.Minute):
			active.t.Errorf("%s has not booted itself", active.name)
		}
		other.serves()
		other.must("zpool set failmode=wait tank")
		boot(active)
	}},
	// ZFS is told not to mind that it can't write that it has the zpool, as it could where some disks answer.
	{"disk silent, and not suspended", func(active, other *machine, boot func(*machine)) {
		active.must("echo 0 >/sys/module/zfs/parameters/zfs_multihost_fail_intervals")
		active.silence()
		active.eventually(active.name+" says that a sync does not end", func() error {
			s, err := active.status()
			if err == nil && (s.Set.Active != active.name || !strings.Contains(s.Set.Waits, "a sync of pool")) {
				err = fmt.Errorf("it says %+v", *s.Set)
			}
			return err
		})
		if out := active.must("wget -q -O - http://127.0.0.1:9810/metrics"); !regexp.MustCompile(`cradle_filer_sync_waits_seconds [1-9]`).MatchString(out) {
			active.t.Errorf("%s's metrics are\n%s", active.name, out)
		}
		active.lose()
		other.serves()
		boot(active)
	}},
	// The process can't end, as calls of it wait for the disk for ever.
	{"disk silent, and killed", func(active, other *machine, boot func(*machine)) {
		active.silence()
		time.Sleep(time.Second) // for the writers' calls to be waiting
		active.must("kill -9 " + active.pids("cradle-filer serve"))
		other.serves()
		active.lostAddress()
		boot(active)
	}},
}

// servers are Consul's, three of them, on the host c.
type servers struct {
	*pair
	agents [3]*exec.Cmd
	log    locked.Buffer
}

var serverAddresses = [3]string{"10.77.0.3", "10.77.0.5", "10.77.0.6"}

func (s *servers) start(i int) {
	s.t.Helper()
	args := []string{
		"netns", "exec", s.ns("c"), s.programs["consul"], "agent", "-server", "-bootstrap-expect=3", "-node=c" + serverAddresses[i][len("10.77.0."):], "-bind=" + serverAddresses[i], "-client=" + serverAddresses[i],
		"-data-dir=" + s.file("consul"+serverAddresses[i]), "-log-level=warn", "-retry-interval=1s", "-hcl=performance { raft_multiplier = 1 }", "-hcl=ports { serf_wan = -1 }",
	}
	for _, a := range serverAddresses {
		args = append(args, "-retry-join="+a)
	}
	s.agents[i] = exec.Command("ip", args...)
	s.agents[i].Stdout, s.agents[i].Stderr = &s.log, &s.log
	if err := s.agents[i].Start(); err != nil {
		s.t.Fatal(err)
	}
}

// leader is the one that leads, -1 while there is none.
func (s *servers) leader() int {
	c := &http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, network, address string) (net.Conn, error) {
		return s.from(ctx, "c", network, address)
	}}}
	for _, asked := range serverAddresses {
		resp, err := c.Get("http://" + asked + ":8500/v1/status/leader")
		if err != nil {
			continue
		}
		said, _ := io.ReadAll(resp.Body)
		resp.Body.Close()
		for i, a := range serverAddresses {
			if strings.HasPrefix(string(said), `"`+a+":") && s.agents[i] != nil {
				return i
			}
		}
	}
	return -1
}

func (s *servers) stop(i int) {
	if s.agents[i] != nil {
		_ = s.agents[i].Process.Kill()
		_ = s.agents[i].Wait()
		s.agents[i] = nil
	}
}

// killLeader returns once another one leads, and the one that has is back.
func (s *servers) killLeader() {
	s.t.Helper()
	was := -1
	s.eventually("Consul has a leader", func() error {
		if was = s.leader(); was < 0 {
			return errors.New("it has none")
		}
		return nil
	})
	s.stop(was)
	s.eventually("Consul has another leader", func() error {
		if s.leader() < 0 {
			return errors.New("it has none")
		}
		return nil
	})
	s.start(was)
}

func (m *machine) serves() {
	m.t.Helper()
	m.eventually(m.name+" serves", func() error {
		s, err := m.status()
		if err == nil && (s.Set.Active != m.name || !s.Set.Serving) {
			err = fmt.Errorf("it says %+v", *s.Set)
		}
		return err
	})
}

// TestVMSoakFilerZFS: two machines have one disk with a zpool, and a filer each. Again and again something of zfsDrills happens to the active one, or its machine, its disk,
// its network, or Consul, while clients write: nothing that was acknowledged is lost or becomes older, no client sees more than a pause, and never have both the zpool imported,
// nor does one get it by force while the other has it.
func TestVMSoakFilerZFS(t *testing.T) {
	var names []string
	for _, d := range zfsDrills {
		names = append(names, d.name)
	}
	zfsFailOver(t, embedded, append(names, names...))
}

// TestVMSoakGaneshaFilerZFS: the same with NFS-Ganesha, whose calls wait in a zpool that is suspended, as do those of the filer's.
func TestVMSoakGaneshaFilerZFS(t *testing.T) {
	zfsFailOver(t, byGanesha, []string{"switched", "disk silent", "killed", "disk silent, and killed", "disk gone", "host lost"})
}

// machines are two that have a disk with a zpool, and a filer of their set each, with the volume vol.
type machines struct {
	*pair
	lab, disk string
	consul    *servers
	both      [2]*machine
}

func newMachines(t *testing.T, engine string) *machines {
	lab, err := programs.Lab()
	if err != nil {
		t.Fatal(err)
	}
	// A look is a program that is started in a machine that is emulated.
	p := &pair{t: t, looks: time.Second, dir: t.TempDir(), id: fmt.Sprintf("fz%d", os.Getpid()), programs: map[string]string{}}
	for _, name := range []string{"cradle-filer", "cradle-s3", "cradle-csi"} {
		if p.programs[name], err = programs.Path(name); err != nil {
			t.Fatal(err)
		}
	}
	if p.programs["consul"], err = programs.Tool("consul"); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"sw", "c", "cl"} {
		p.ip("netns", "add", p.ns(name))
		t.Cleanup(func() { p.ip("netns", "del", p.ns(name)) })
		p.ip("-n", p.ns(name), "link", "set", "lo", "up")
	}
	p.certify()
	p.ip("-n", p.ns("sw"), "link", "add", "name", "bridge0", "type", "bridge")
	p.ip("-n", p.ns("sw"), "link", "set", "bridge0", "up")
	for i, name := range []string{"c", "cl"} {
		p.ip("-n", p.ns("sw"), "link", "add", "name", name, "type", "veth", "peer", "name", "eth0", "netns", p.ns(name))
		p.ip("-n", p.ns("sw"), "link", "set", "dev", name, "master", "bridge0", "up")
		p.ip("-n", p.ns(name), "addr", "add", fmt.Sprintf("10.77.0.%d/24", 3+i), "dev", "eth0")
		p.ip("-n", p.ns(name), "link", "set", "eth0", "up")
	}
	consul := &servers{pair: p}
	for i, address := range serverAddresses {
		if i > 0 {
			p.ip("-n", p.ns("c"), "addr", "add", address+"/24", "dev", "eth0")
		}
		consul.start(i)
		t.Cleanup(func() { consul.stop(i) })
	}
	if err := os.WriteFile(p.file("peers.key"), bytes.Repeat([]byte("k"), 32), 0o600); err != nil {
		t.Fatal(err)
	}
	disk := p.file("disk")
	client := &http.Client{Transport: &http.Transport{DialContext: p.dial, DisableKeepAlives: true}, Timeout: 3 * time.Minute}
	var both [2]*machine
	for i, name := range []string{"a", "b"} {
		m := &machine{pair: p, name: name, engine: engine, address: fmt.Sprintf("10.77.0.%d", i+1), servers: consul, net: client}
		both[i] = m
		p.ip("-n", p.ns("sw"), "tuntap", "add", name, "mode", "tap")
		p.ip("-n", p.ns("sw"), "link", "set", "dev", name, "master", "bridge0", "up")
		m.prepare()
		t.Cleanup(func() {
			m.lose()
			if t.Failed() {
				text := m.console.String()
				t.Logf("%s:\n%s", m.name, text[max(0, len(text)-12<<10):])
			}
		})
	}
	for i, m := range both {
		if i == 0 {
			m.boot(lab, disk)
			m.must(`zpool create -o cachefile=none -O mountpoint=none tank /dev/vda1
DHV_VOLUME_ID=vol DHV_VOLUMES_DIR=/mounts DHV_CAPACITY_MIN_BYTES=67108864 DHV_PARAMETERS={} ./cradle-csi host-volume create --backend zfs --pool tank/cradle
umount /mounts/* 2>/dev/null || true
zpool export tank`)
		} else {
			m.boot(lab, disk)
		}
	}
	for _, m := range both {
		m.must("touch /start")
	}
	ms := &machines{p, lab, disk, consul, both}
	p.eventually("a filer serves, and the other stands by", ms.settled)
	return ms
}

func (ms *machines) settled() error {
	for _, m := range ms.both {
		s, err := m.status()
		if err == nil && (!s.Set.Serving || len(s.Set.Standby) != 1) {
			err = fmt.Errorf("%s says %+v", m.name, *s.Set)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func (ms *machines) active() (active, other *machine) {
	s, err := ms.both[0].status()
	if err == nil && s.Set.Active == ms.both[1].name {
		return ms.both[1], ms.both[0]
	}
	return ms.both[0], ms.both[1]
}

func zfsFailOver(t *testing.T, engine string, rounds []string) {
	ms := newMachines(t, engine)
	p, both, active := ms.pair, ms.both, ms.active
	var g sync.WaitGroup
	a, _ := active()
	var pub api.Publication
	var grant api.Grant
	if err := errors.Join(json.Unmarshal([]byte(a.must("./cradle-filer publish vol --client 10.77.0.0/24 -o json")), &pub), json.Unmarshal([]byte(a.must("./cradle-filer grant vol -o json")), &grant)); err != nil {
		t.Fatal(err)
	}
	nfs := p.nfs(pub.Address)
	defer nfs.close()
	dav := &http.Client{Transport: &http.Transport{DialContext: p.dial, TLSClientConfig: &tls.Config{RootCAs: p.roots, MinVersion: tls.VersionTLS12}}, Timeout: 10 * time.Second}
	put := func(text string) {
		t.Helper()
		if _, err := ask(dav, grant, http.MethodPut, "letter", []byte(text), nil, http.StatusCreated, http.StatusNoContent); err != nil {
			t.Fatal(err)
		}
	}
	put("then")
	a.must("./cradle-filer snapshot vol before")
	put("now")
	objects := p.objects(t, grant)
	former := func() { // which is open then, when the zpool is to be exported
		t.Helper()
		var text []byte
		then := func(err error) error {
			if err == nil && string(text) != "then" {
				t.Errorf("the snapshot has %q", text)
			}
			return err
		}
		// On a busy machine the set may move meanwhile.
		p.eventually("the snapshot, by WebDAV", func() (err error) {
			text, err = ask(dav, grant, http.MethodGet, ".snapshots/before/letter", nil, nil, http.StatusOK)
			return then(err)
		})
		p.eventually("the snapshot, by S3", func() error {
			return then(tryS3(func(ctx context.Context) error {
				o, err := objects.GetObject(ctx, "vol", ".snapshots/before/letter", minio.GetObjectOptions{})
				if err != nil {
					return err
				}
				defer o.Close()
				text, err = io.ReadAll(o)
				return err
			}))
		})
	}
	var overNFS *writer
	if engine == embedded {
		_, overNFS = nfs.writer3(pub.Export, "nfs")
		overNFS.path = nil
	} else {
		a.must("touch /run/cradle/filer/volumes/vol/nfs")
		_, overNFS = nfs.writes4(pub.Export, "nfs")
	}
	writers := []*writer{
		overNFS,
		{
			name: "WebDAV", write: func(piece int, b []byte) error {
				_, err := ask(dav, grant, http.MethodPut, fmt.Sprint("dav-", piece), b, nil, http.StatusCreated, http.StatusNoContent)
				return err
			},
			read: func(piece int) ([]byte, error) {
				return ask(dav, grant, http.MethodGet, fmt.Sprint("dav-", piece), nil, nil, http.StatusOK)
			},
		},
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer g.Wait()
	defer cancel()
	for _, w := range writers {
		g.Go(func() { w.run(ctx, t) })
	}
	var looked atomic.Int64
	g.Go(func() { // one that has the zpool both before and after the other one is seen to have it, has it at the same time
		for i := 0; ctx.Err() == nil; i++ {
			one, two := both[i%2], both[(i+1)%2]
			if one.hasPool() && two.hasPool() && one.hasPool() {
				t.Errorf("%s and %s have the zpool imported at the same time", one.name, two.name)
			}
			looked.Add(1)
		}
	})
	progress := func() { t.Helper(); p.eventually("the writers go on", goingOn(t, writers)) }
	pauses := map[string][]time.Duration{}
	for round, name := range rounds {
		d := zfsDrills[slices.IndexFunc(zfsDrills, func(d zfsDrill) bool { return d.name == name })]
		t.Run(d.name, func(t *testing.T) {
			p.t = t
			progress()
			a, b := active()
			if out, err := b.run("zpool import -f -N tank"); err == nil || !strings.Contains(err.Error(), "imported on") {
				t.Errorf("%s gets the zpool by force, while %s has it: %s, %v", b.name, a.name, out, err)
			}
			former()
			for _, w := range writers {
				w.slow.Store(0)
			}
			a, b = active() // on a busy machine the set may have moved meanwhile
			d.do(a, b, func(m *machine) {
				m.lose()
				m.boot(ms.lab, ms.disk)
				m.must("touch /start")
			})
			progress()
			p.eventually("a filer serves, and the other stands by", ms.settled)
			progress()
			line := ""
			for _, w := range writers {
				slow := time.Duration(w.slow.Load())
				pauses[d.name+", "+w.name] = append(pauses[d.name+", "+w.name], slow)
				line += fmt.Sprintf("  %s %.1fs", w.name, slow.Seconds())
				w.check(t)
			}
			now, _ := active()
			t.Logf("round %d: %s serves after %s; the longest call%s", round+1, now.name, a.name, line)
		})
		p.t = t
		if t.Failed() {
			return
		}
	}
	for _, d := range zfsDrills {
		for _, w := range writers {
			if all := pauses[d.name+", "+w.name]; len(all) > 0 {
				slices.Sort(all)
				t.Logf("%-32s median %6.2fs  worst %6.2fs  of %d", d.name+", "+w.name, all[len(all)/2].Seconds(), all[len(all)-1].Seconds(), len(all))
			}
		}
	}
	cancel()
	g.Wait()
	if looked.Load() == 0 {
		t.Error("nobody has looked at who has the zpool")
	}
	a, b := active()
	if out := a.must("./cradle-filer diff vol before"); !strings.Contains(out, "dav-0") {
		t.Errorf("what is new since the snapshot is\n%s", out)
	}
	for name, bring := range map[string]func() error{
		"by-webdav": func() error {
			_, err := ask(dav, grant, "COPY", ".snapshots/before/letter", nil, http.Header{"Destination": {grant.WebDAV + "by-webdav"}}, http.StatusCreated)
			return err
		},
		"by-s3": func() error {
			return tryS3(func(ctx context.Context) error {
				_, err := objects.CopyObject(ctx, minio.CopyDestOptions{Bucket: "vol", Object: "by-s3"}, minio.CopySrcOptions{Bucket: "vol", Object: ".snapshots/before/letter"})
				return err
			})
		},
	} {
		err := bring()
		text, rerr := ask(dav, grant, http.MethodGet, name, nil, nil, http.StatusOK)
		if err := errors.Join(err, rerr); err != nil || string(text) != "then" {
			t.Errorf("what came back %s is %q, %v", name, text, err)
		}
	}
	a.must("./cradle-filer rollback vol before")
	if out := a.must("./cradle-filer diff vol before"); strings.Contains(out, "dav-0") {
		t.Errorf("after the rollback there is\n%s", out)
	}
	t.Log("\n" + a.must("./cradle-filer status"))
	if out := a.must("zpool scrub -w tank; zpool status tank"); !strings.Contains(out, "No known data errors") {
		t.Errorf("the zpool is not well:\n%s", out)
	}
	a.must("./cradle-filer unpublish " + pub.ID + " && ./cradle-filer revoke " + grant.ID)
	a.must("./cradle-filer switch")
	b.serves()
}

// prepare makes what the machine is started with.
func (m *machine) prepare() {
	job := m.file(m.name)
	if err := os.MkdirAll(filepath.Join(job, "cgi-bin"), 0o755); err != nil {
		m.t.Fatal(err)
	}
	for name, path := range map[string]string{
		"cradle-filer": m.programs["cradle-filer"], "cradle-s3": m.programs["cradle-s3"], "cradle-csi": m.programs["cradle-csi"], "consul": m.programs["consul"],
		"peers.key": m.file("peers.key"), "tls.crt": m.file("tls.crt"), "tls.key": m.file("tls.key"),
	} {
		if err := os.Symlink(path, filepath.Join(job, name)); err != nil {
			m.t.Fatal(err)
		}
	}
	if m.engine == byGanesha {
		ganeshaSystem(m.t, job, m.name)
	}
	run := fmt.Sprintf(`set -e
[ ! -d system ] || cp -a system/. /
hostname %[1]s
printf '%[2]s' >/etc/hostid
ip addr flush dev eth0; ip addr add %[3]s/24 dev eth0
echo 127.0.0.1 localhost %[1]s >/etc/hosts
httpd -p 8080 -h /job
./consul agent -node=%[1]s -bind=%[3]s -retry-join=10.77.0.3 -retry-join=10.77.0.5 -retry-join=10.77.0.6 -retry-interval=1s -data-dir=/consul -log-level=warn &
echo 500 >/sys/module/zfs/parameters/zfs_multihost_interval # as docs/nfs.md has it
# There is no udev here, for which zpool import would wait half a minute, nor directories of disks alone.
mkdir /wrapped /import
ln -s /dev/vda1 /import/

printf '#!/bin/sh\nexport ZFS_VDEV_DEVID_OPT_OUT=YES ZPOOL_IMPORT_PATH=/import\nexec /sbin/zpool "$@"\n' >/wrapped/zpool
chmod +x /wrapped/zpool
export PATH=/wrapped:$PATH
until [ -e /start ]; do sleep 0.2; done
while :; do
  GOTRACEBACK=all ./cradle-filer serve --set files --member %[1]s --backend zfs --pool tank/cradle --peers-key peers.key --floating %[4]s/24@eth0 --webdav :8443 --s3 :9000 --tls-cert tls.crt --tls-key tls.key --rate 0 --metrics :9810 --engine %[5]s || true
  sleep 0.5
done
`, m.name, m.hostID(), m.address, serviceAddress, m.engine)
	cgi := "#!/bin/sh\nexport PATH=/wrapped:$PATH\nprintf 'Content-Type: text/plain\\r\\n\\r\\n'\ncd /job\nsh 2>&1\necho \"exit $?\"\n"
	if err := errors.Join(os.WriteFile(filepath.Join(job, "run.sh"), []byte(run), 0o755), os.WriteFile(filepath.Join(job, "cgi-bin/run"), []byte(cgi), 0o755)); err != nil {
		m.t.Fatal(err)
	}
}
