//go:build vm && soak && zfslab

package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/cradlestack/cradlestack/csi-plugin/filer/api"
	"github.com/cradlestack/cradlestack/internal/locked"
	"github.com/cradlestack/cradlestack/test/programs"
)

// The tests in this file run in a machine whose kernel has an NFS client, and the pool tank: TestVMSoakFilerMounts starts it.

// A mounter is a host that has volumes mounted which a filer keeps: a network and a mount namespace, and a plugin in them.
type mounter struct {
	t      *testing.T
	name   string
	dir    string
	filer  []string  // flags that say which
	holder *exec.Cmd // of the namespaces, whatever becomes of the plugin
	plugin *exec.Cmd
	log    locked.Buffer
	conn   *grpc.ClientConn
	csi.ControllerClient
	csi.NodeClient
}

// newMounter is a host in a network namespace, with the same name in Nomad as all others.
func newMounter(t *testing.T, netns, name string, filer ...string) *mounter {
	t.Helper()
	dir, err := os.MkdirTemp("", name+"-")
	if err != nil {
		t.Fatal(err)
	}
	m := &mounter{t: t, name: name, dir: dir, filer: filer}
	if err := os.Mkdir(m.file("state"), 0o700); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		m.kill()
		m.lose()
		if t.Failed() {
			t.Logf("%s:\n%s", name, m.log.String())
		}
		os.RemoveAll(dir)
	})
	m.boot(netns)
	return m
}

// boot gives it mounts of its own.
func (m *mounter) boot(netns string) {
	m.t.Helper()
	m.holder = exec.Command("ip", "netns", "exec", netns, "sh", "-c", `mount --make-rprivate / && mount --make-rshared / && mount -t tmpfs tmpfs /run && mkdir -p /var/lib/cradle && mount --bind "$0" /var/lib/cradle && mount --make-private /var/lib/cradle && mount --make-rshared / && echo up && exec sleep 100000`, m.file("state"))
	out, err := m.holder.StdoutPipe()
	m.holder.Stderr = &m.log
	if err == nil {
		err = m.holder.Start()
	}
	if err != nil {
		m.t.Fatal(err)
	}
	if line, err := bufio.NewReader(out).ReadString('\n'); err != nil || line != "up\n" {
		m.t.Fatalf("%s does not come up: %q, %v\n%s", m.name, line, err, m.log.String())
	}
}

// lose ends it as a power cut does: its mounts are gone.
func (m *mounter) lose() {
	m.holder.Process.Kill()
	m.holder.Wait()
}

func (m *mounter) file(name string) string { return filepath.Join(m.dir, name) }

// seen is a file as the test reaches it.
func (m *mounter) seen(path string) string {
	return fmt.Sprintf("/proc/%d/root%s", m.holder.Process.Pid, path)
}

// in is a command on this host.
func (m *mounter) in(args ...string) *exec.Cmd {
	return exec.Command("nsenter", append([]string{"-t", fmt.Sprint(m.holder.Process.Pid), "-m", "-n"}, args...)...)
}

func (m *mounter) start() {
	m.t.Helper()
	program, err := programs.Path("cradle-csi")
	if err != nil {
		m.t.Fatal(err)
	}
	m.plugin = m.in(append([]string{program, "monolith", "--backend", "filer", "--endpoint", "unix://" + m.file("csi.sock"), "--node-id", "host"}, m.filer...)...)
	m.plugin.Stdout, m.plugin.Stderr = &m.log, &m.log
	if err := m.plugin.Start(); err != nil {
		m.t.Fatal(err)
	}
	if m.conn, err = grpc.NewClient("passthrough:///csi", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", m.file("csi.sock"))
		})); err != nil {
		m.t.Fatal(err)
	}
	m.ControllerClient, m.NodeClient = csi.NewControllerClient(m.conn), csi.NewNodeClient(m.conn)
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
	defer cancel()
	if _, err := csi.NewIdentityClient(m.conn).GetPluginInfo(ctx, &csi.GetPluginInfoRequest{}, grpc.WaitForReady(true)); err != nil {
		m.t.Fatalf("%s: %v\n%s", m.name, err, m.log.String())
	}
}

// kill ends the plugin at whatever it does.
func (m *mounter) kill() {
	if m.plugin == nil {
		return
	}
	m.conn.Close()
	m.plugin.Process.Kill()
	m.plugin.Wait()
	m.plugin = nil
}

var (
	writes = mode(csi.VolumeCapability_AccessMode_MULTI_NODE_MULTI_WRITER)
	reads  = mode(csi.VolumeCapability_AccessMode_MULTI_NODE_READER_ONLY)
)

func mode(m csi.VolumeCapability_AccessMode_Mode) *csi.VolumeCapability {
	return &csi.VolumeCapability{AccessType: &csi.VolumeCapability_Mount{Mount: &csi.VolumeCapability_MountVolume{}}, AccessMode: &csi.VolumeCapability_AccessMode{Mode: m}}
}

func (m *mounter) must(what string, err error) {
	m.t.Helper()
	if err != nil {
		m.t.Fatalf("%s: %s: %v\n%s", m.name, what, err, m.log.String())
	}
}

func (m *mounter) within() context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
	m.t.Cleanup(cancel)
	return ctx
}

func (m *mounter) create(id string, size int64, parameters ...string) {
	m.t.Helper()
	p := map[string]string{"class": "nfs", "snapshots": "none"} // which would be in the way for minutes in an emulated machine
	for i := 0; i < len(parameters); i += 2 {
		p[parameters[i]] = parameters[i+1]
	}
	_, err := m.CreateVolume(m.within(), &csi.CreateVolumeRequest{Name: id, VolumeCapabilities: []*csi.VolumeCapability{writes}, Parameters: p, CapacityRange: &csi.CapacityRange{RequiredBytes: size}})
	m.must("create", err)
}

func (m *mounter) staging(id string, c *csi.VolumeCapability) string {
	return m.file(fmt.Sprintf("staging-%s-%d", id, c.AccessMode.Mode))
}

func (m *mounter) stage(id string, c *csi.VolumeCapability) error {
	if err := os.MkdirAll(m.staging(id, c), 0o700); err != nil {
		return err
	}
	_, err := m.NodeStageVolume(m.within(), &csi.NodeStageVolumeRequest{VolumeId: id, StagingTargetPath: m.staging(id, c), VolumeCapability: c})
	return err
}

func (m *mounter) publish(id string, c *csi.VolumeCapability, target string) error {
	_, err := m.NodePublishVolume(m.within(), &csi.NodePublishVolumeRequest{VolumeId: id, StagingTargetPath: m.staging(id, c), TargetPath: m.file(target), VolumeCapability: c})
	return err
}

func (m *mounter) attach(id string, c *csi.VolumeCapability, target string) {
	m.t.Helper()
	m.must("stage", m.stage(id, c))
	m.must("publish", m.publish(id, c, target))
}

func (m *mounter) unpublish(id, target string) error {
	_, err := m.NodeUnpublishVolume(m.within(), &csi.NodeUnpublishVolumeRequest{VolumeId: id, TargetPath: m.file(target)})
	return err
}

func (m *mounter) unstage(id string, c *csi.VolumeCapability) error {
	_, err := m.NodeUnstageVolume(m.within(), &csi.NodeUnstageVolumeRequest{VolumeId: id, StagingTargetPath: m.staging(id, c)})
	return err
}

func (m *mounter) detach(id string, c *csi.VolumeCapability, target string) {
	m.t.Helper()
	m.must("unpublish", m.unpublish(id, target))
	m.must("unstage", m.unstage(id, c))
}

func (m *mounter) write(path, text string) {
	m.t.Helper()
	m.must("write", os.WriteFile(m.seen(path), []byte(text), 0o644))
}

func (m *mounter) is(path, want string) {
	m.t.Helper()
	if text, err := os.ReadFile(m.seen(path)); err != nil || string(text) != want {
		m.t.Errorf("%s: %s has %q, %v; want %q", m.name, path, text, err, want)
	}
}

// mounted are the lines of its mounts that have a text.
func (m *mounter) mounted(text string) (lines []string) {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/mounts", m.holder.Process.Pid))
	if err != nil {
		m.t.Fatal(err)
	}
	for line := range strings.Lines(string(data)) {
		if strings.Contains(line, text) {
			lines = append(lines, line)
		}
	}
	return lines
}

func (m *mounter) total(id, target string) int64 {
	m.t.Helper()
	s, err := m.NodeGetVolumeStats(m.within(), &csi.NodeGetVolumeStatsRequest{VolumeId: id, VolumePath: m.file(target)})
	m.must("stats", err)
	return s.Usage[0].Total
}

func (m *mounter) doctor(args ...string) string {
	m.t.Helper()
	program, err := programs.Path("cradle-csi")
	if err != nil {
		m.t.Fatal(err)
	}
	out, err := m.in(append(append([]string{program, "doctor", "--backend", "filer"}, m.filer...), args...)...).CombinedOutput()
	m.must("doctor: "+string(out), err)
	return string(out)
}

// rest is what is left of attachments.
func (m *mounter) rest() {
	m.t.Helper()
	if lines := m.mounted(" nfs"); len(lines) > 0 {
		m.t.Errorf("%s: still mounted: %q", m.name, lines)
	}
	for _, dir := range []string{"notes", "mounts"} {
		if entries, err := os.ReadDir(m.file("state/nfs/" + dir)); err != nil && !os.IsNotExist(err) || len(entries) > 0 {
			m.t.Errorf("%s: %s has %v, %v", m.name, dir, entries, err)
		}
	}
}

// A syncer writes lines, each of them synced before the next one.
type syncer struct {
	cmd  *exec.Cmd
	path string
	out  locked.Buffer
}

// writes starts one.
func (m *mounter) writer(path string) *syncer {
	m.t.Helper()
	w := &syncer{path: m.seen(path)}
	self, err := os.Executable()
	m.must("writer", err)
	w.cmd = m.in(self, "-test.run", "^TestLabWriter$")
	w.cmd.Env = append(os.Environ(), "LAB_WRITER="+path)
	w.cmd.Stdout, w.cmd.Stderr = &w.out, &w.out
	m.must("writer", w.cmd.Start())
	return w
}

var acknowledged = regexp.MustCompile(`(?m)^synced (\d+)$`)

func (w *syncer) lines() int { return len(acknowledged.FindAllString(w.out.String(), -1)) }

// grows waits until more lines are acknowledged.
func (m *mounter) grows(w *syncer, by int) {
	m.t.Helper()
	from := w.lines()
	m.until("the writer goes on", func() error {
		if n := w.lines(); n < from+by {
			return fmt.Errorf("it has written %d lines, and had %d: %s", n, from, w.out.String()[max(0, len(w.out.String())-200):])
		}
		return nil
	})
}

func (m *mounter) until(what string, f func() error) {
	m.t.Helper()
	err := f()
	for end := time.Now().Add(5 * time.Minute); err != nil; err = f() {
		if time.Now().After(end) {
			m.t.Fatalf("%s: %v\n%s", what, err, m.log.String())
		}
		time.Sleep(100 * time.Millisecond)
	}
}

// ends ends a writer, and compares what is there with what it was told.
func (m *mounter) ends(w *syncer) {
	m.t.Helper()
	w.cmd.Process.Kill()
	w.cmd.Wait()
	if strings.Contains(w.out.String(), "failed") {
		m.t.Errorf("%s: the writer: %s", m.name, w.out.String())
	}
	text, err := os.ReadFile(w.path)
	m.must("read", err)
	lines := strings.Split(string(text), "\n")
	n := w.lines()
	if len(lines)-1 < n {
		m.t.Errorf("%s: %d lines of %d are there", m.name, len(lines)-1, n)
	}
	for i := range min(n, len(lines)-1) {
		if lines[i] != fmt.Sprintf("line %d", i) {
			m.t.Fatalf("%s: line %d is %q", m.name, i, lines[i])
		}
	}
	m.t.Logf("%s: %d lines", m.name, n)
}

// TestLabWriter is the writer.
func TestLabWriter(t *testing.T) {
	path := os.Getenv("LAB_WRITER")
	if path == "" {
		return
	}
	f, err := os.Create(path)
	for i := 0; err == nil; i++ {
		began := time.Now()
		if _, err = fmt.Fprintf(f, "line %d\n", i); err == nil {
			err = f.Sync()
		}
		if err == nil {
			fmt.Printf("synced %d\n", i)
		}
		if took := time.Since(began); took > 2*time.Second {
			fmt.Printf("took %v\n", took.Round(100*time.Millisecond))
		}
	}
	fmt.Printf("failed: %v\n", err)
	os.Exit(1)
}

// A single is a filer that is alone, with two hosts.
type single struct {
	*testing.T
	dir    string
	flags  []string
	filer  *exec.Cmd
	log    locked.Buffer
	client api.Client
	a, b   *mounter
}

// network makes a bridge with two namespaces.
func network(t *testing.T) {
	t.Helper()
	script := `set -e
ip link add name lab0 type bridge; ip link set lab0 up; ip addr add 10.88.0.1/24 dev lab0; ip -6 addr add fd88::1/64 dev lab0 nodad
for i in 2 3; do
	ip netns add lab$i; ip link add lab$i type veth peer name eth0 netns lab$i; ip link set lab$i master lab0 up
	ip -n lab$i link set lo up; ip -n lab$i link set eth0 up; ip -n lab$i addr add 10.88.0.$i/24 dev eth0; ip -n lab$i -6 addr add fd88::$i/64 dev eth0 nodad
done`
	if out, err := exec.Command("bash", "-c", script).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	t.Cleanup(func() { exec.Command("bash", "-c", "ip netns del lab2; ip netns del lab3; ip link del lab0").Run() })
}

func newSingle(t *testing.T, dataset string, flags ...string) *single {
	t.Helper()
	network(t)
	dir, err := os.MkdirTemp("", "single-")
	if err != nil {
		t.Fatal(err)
	}
	s := &single{T: t, dir: dir, client: api.Client{Socket: filepath.Join(dir, "run/api.sock")}}
	s.flags = append([]string{"serve", "--backend", "zfs", "--pool", dataset, "--state", filepath.Join(dir, "state"), "--socket", s.client.Socket}, flags...)
	t.Cleanup(func() {
		s.stop(unix.SIGTERM)
		if t.Failed() {
			t.Logf("the filer:\n%s", s.log.String())
		}
	})
	s.serve()
	s.a, s.b = newMounter(t, "lab2", "a", "--filer", s.client.Socket), newMounter(t, "lab3", "b", "--filer", s.client.Socket)
	s.a.start()
	s.b.start()
	return s
}

func (s *single) serve() {
	s.Helper()
	program, err := programs.Path("cradle-filer")
	if err != nil {
		s.Fatal(err)
	}
	s.filer = exec.Command(program, s.flags...)
	s.filer.Stdout, s.filer.Stderr = &s.log, &s.log
	s.filer.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := s.filer.Start(); err != nil {
		s.Fatal(err)
	}
	for end := time.Now().Add(3 * time.Minute); ; time.Sleep(100 * time.Millisecond) {
		_, err := s.client.Status(context.Background())
		if err == nil {
			return
		}
		if time.Now().After(end) {
			s.Fatalf("the filer does not serve: %v\n%s", err, s.log.String())
		}
	}
}

func (s *single) stop(signal syscall.Signal) {
	if s.filer == nil {
		return
	}
	s.filer.Process.Signal(signal)
	s.filer.Wait()
	s.filer = nil
}

func (s *single) command(args ...string) string {
	s.Helper()
	program, err := programs.Path("cradle-filer")
	if err != nil {
		s.Fatal(err)
	}
	out, err := exec.Command(program, append(args, "--socket", s.client.Socket)...).CombinedOutput()
	if err != nil {
		s.Fatalf("cradle-filer %v: %v: %s", args, err, out)
	}
	return string(out)
}

func (s *single) publications(want int) (all []api.Publication) {
	s.Helper()
	all, err := s.client.Publications(context.Background())
	if err != nil || len(all) != want {
		s.Errorf("there are the publications %+v, %v; want %d", all, err, want)
	}
	return all
}

func code(t *testing.T, what string, err error, want codes.Code, text string) {
	t.Helper()
	if status.Code(err) != want || !strings.Contains(err.Error(), text) {
		t.Errorf("%s: %v; want %v, %q", what, err, want, text)
	}
}

func TestLabMountsEmbedded(t *testing.T) {
	s := newSingle(t, "tank/embedded", "--listen", "10.88.0.1:2049")
	s.uses("vers=3")
	s.dies()
	s.loses()
	s.abandons()
	s.steps()
}

// TestLabMountsIPv6: the kernel wants tcp6 for it.
func TestLabMountsIPv6(t *testing.T) {
	s := newSingle(t, "tank/six", "--listen", "[fd88::1]:2049")
	s.uses("vers=3")
}

func TestLabMountsGanesha(t *testing.T) {
	s := newSingle(t, "tank/ganesha", "--engine", "ganesha", "--listen", "10.88.0.1:2049")
	s.uses("vers=4.1")
	s.dies()
	s.loses()
	s.abandons()
}

// uses does what volumes are for, on two hosts at once.
func (s *single) uses(version string) {
	t, a, b := s.T, s.a, s.b
	a.create("vol", 64<<20)
	a.attach("vol", writes, "t")
	b.attach("vol", writes, "t")
	a.attach("vol", writes, "t") // again
	for _, m := range []*mounter{a, b} {
		lines := m.mounted(" " + m.file("t") + " ")
		if len(lines) != 1 {
			t.Fatalf("%s has %q", m.name, lines)
		}
		for _, o := range []string{version, "nosuid", "nodev", "hard", "timeo=100", "retrans=3"} {
			if !strings.Contains(lines[0], o) {
				t.Errorf("%s: no %s in %q", m.name, o, lines[0])
			}
		}
	}
	all := s.publications(2)
	for _, p := range all {
		for _, c := range p.Clients {
			if !c.IsSingleIP() {
				t.Errorf("it is published for %v", c)
			}
		}
	}
	a.write(a.file("t/by-a"), "one")
	b.is(b.file("t/by-a"), "one")
	b.write(b.file("t/by-b"), "two")
	a.is(a.file("t/by-b"), "two")

	if n := a.total("vol", "t"); n < 60<<20 || n > 70<<20 {
		t.Errorf("it has %d bytes", n)
	}
	_, err := b.ControllerExpandVolume(b.within(), &csi.ControllerExpandVolumeRequest{VolumeId: "vol", CapacityRange: &csi.CapacityRange{RequiredBytes: 96 << 20}})
	b.must("expand", err)
	r, err := a.NodeExpandVolume(a.within(), &csi.NodeExpandVolumeRequest{VolumeId: "vol", VolumePath: a.file("t"), CapacityRange: &csi.CapacityRange{RequiredBytes: 96 << 20}})
	a.must("expand the node's", err)
	if n := a.total("vol", "t"); r.CapacityBytes != 96<<20 || n < 90<<20 || n > 100<<20 {
		t.Errorf("grown it has %d and %d bytes", r.CapacityBytes, n)
	}

	// A target for readers, and one whose whole host reads.
	b.attach("vol", reads, "r")
	b.is(b.file("r/by-a"), "one")
	if err := os.WriteFile(b.seen(b.file("r/x")), nil, 0o644); !errors.Is(err, unix.EROFS) {
		t.Errorf("a reader writes: %v", err)
	}
	b.detach("vol", reads, "r")
	a.create("seen", 0)
	a.attach("seen", writes, "seen")
	a.write(a.file("seen/file"), "text")
	b.attach("seen", reads, "seen")
	b.is(b.file("seen/file"), "text")
	for _, name := range []string{"seen/x", "seen/file"} {
		if err := os.WriteFile(b.seen(b.file(name)), nil, 0o644); !errors.Is(err, unix.EROFS) {
			t.Errorf("a host that reads writes %s: %v", name, err)
		}
	}
	b.attach("seen", writes, "written") // at once: its kernel has kept no refusal
	b.write(b.file("written/file"), "other")
	a.is(a.file("seen/file"), "other")
	b.detach("seen", reads, "seen")
	b.write(b.file("written/file"), "third")
	b.detach("seen", writes, "written")
	s.publications(3) // though it has another volume of this filer mounted
	a.detach("seen", writes, "seen")
	_, err = a.DeleteVolume(a.within(), &csi.DeleteVolumeRequest{VolumeId: "seen"})
	a.must("delete", err)

	t.Log("both hosts have used it")

	// A rollback is seen.
	s.command("snapshot", "vol", "s")
	a.write(a.file("t/by-a"), "changed")
	b.is(b.file("t/by-a"), "changed")
	s.command("rollback", "vol", "s")
	a.is(a.file("t/by-a"), "one")
	b.is(b.file("t/by-a"), "one")
	a.is(a.file("t/.snapshots/s/by-b"), "two")

	t.Log("it was rolled back")

	// The plugin is killed, and whatever starts next finds nothing to do.
	was := a.mounted(" nfs")
	a.kill()
	if out := a.doctor(); out != "nothing to repair\n" {
		t.Errorf("doctor: %s", out)
	}
	a.start()
	if now := a.mounted(" nfs"); strings.Join(now, "") != strings.Join(was, "") {
		t.Errorf("mounts were %q and are %q", was, now)
	}
	code(t, "delete what is attached", func() error {
		_, err := a.DeleteVolume(a.within(), &csi.DeleteVolumeRequest{VolumeId: "vol"})
		return err
	}(), codes.FailedPrecondition, "vol")

	// What is open at the place where it is staged is in use.
	f, err := os.Open(b.seen(b.staging("vol", writes) + "/by-a"))
	b.must("open", err)
	b.must("unpublish", b.unpublish("vol", "t"))
	code(t, "unstage what is open", b.unstage("vol", writes), codes.FailedPrecondition, "end what still uses it")
	f.Close()
	b.must("unstage", b.unstage("vol", writes))
	b.must("unstage again", b.unstage("vol", writes))
	b.rest()
	s.publications(1)
	b.attach("vol", writes, "t")
	b.is(b.file("t/by-a"), "one")
	b.detach("vol", writes, "t")
	a.detach("vol", writes, "t")
	a.rest()
	s.publications(0)
	t.Log("all of its uses have come to their end")
}

// dies has the filer away, and killed, under mounts.
func (s *single) dies() {
	t, a := s.T, s.a
	a.attach("vol", writes, "t")
	w := a.writer(a.file("t/lines"))
	a.grows(w, 5)
	for range 2 {
		s.stop(unix.SIGKILL)
		s.serve()
		a.grows(w, 5)
	}
	s.stop(unix.SIGTERM)
	began := time.Now()
	_, err := a.NodeGetVolumeStats(a.within(), &csi.NodeGetVolumeStatsRequest{VolumeId: "vol", VolumePath: a.file("t")})
	code(t, "stats without a filer", err, codes.Unavailable, "what is mounted there does not answer")
	t.Logf("stats: %v, after %v", err, time.Since(began).Round(time.Second))
	s.serve()
	a.grows(w, 5)
	a.ends(w)

	s.stop(unix.SIGTERM)
	for range 2 { // which needs the filer for nothing
		a.must("unpublish", a.unpublish("vol", "t"))
	}
	began = time.Now()
	err = a.unstage("vol", writes)
	code(t, "unstage without a filer", err, codes.Unavailable, "does not answer")
	t.Logf("unstage: %v, after %v", err, time.Since(began).Round(time.Second))
	s.serve()
	a.until("it is unstaged", func() error { return a.unstage("vol", writes) })
	a.rest()
	s.publications(0)
}

// loses has the filer lose its publications, and a host its mounts.
func (s *single) loses() {
	t, a := s.T, s.a
	a.attach("vol", writes, "t")
	a.write(a.file("t/kept"), "kept")
	s.stop(unix.SIGTERM)
	if err := os.RemoveAll(filepath.Join(filepath.Dir(s.client.Socket), "publications")); err != nil {
		t.Fatal(err)
	}
	s.serve()
	s.publications(0)
	if out := a.doctor("--look"); !strings.Contains(out, "found: volume vol: mounted from a publication that the filer has no more") {
		t.Errorf("doctor --look: %s", out)
	}
	if out := a.doctor(); !strings.Contains(out, "repaired: volume vol: ") {
		t.Errorf("doctor: %s", out)
	}
	a.is(a.file("t/kept"), "kept")
	t.Log("what the filer had lost is mounted again")
	if out := a.doctor(); out != "nothing to repair\n" {
		t.Errorf("doctor, again: %s", out)
	}
	s.publications(1)

	// As it is when that is killed on the way.
	notes := a.file("state/nfs/notes/vol.json")
	var note map[string]any
	text, err := os.ReadFile(notes)
	if err == nil {
		err = json.Unmarshal(text, &note)
	}
	a.must("note", err)
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	a.must("boot", err)
	note["boot"] = strings.TrimSpace(string(boot))
	note["former"], note["places"] = "former", []map[string]string{{"at": a.file("t"), "root": "/", "options": "rw,nosuid,nodev"}, {"at": a.file("unpublished"), "root": "/", "options": "rw"}}
	text, err = json.Marshal(note)
	if err == nil {
		err = os.WriteFile(notes, text, 0o600)
	}
	a.must("note", err)
	a.must("umount", a.in("umount", a.file("t")).Run())
	if out := a.doctor(); !strings.Contains(out, "repaired: volume vol: ") {
		t.Errorf("doctor, after a kill: %s", out)
	}
	a.is(a.file("t/kept"), "kept")
	if out := a.doctor(); out != "nothing to repair\n" {
		t.Errorf("doctor, again: %s", out)
	}
	t.Log("what a kill had left away is mounted again")

	// Its host is lost, and comes back.
	a.kill()
	a.lose()
	a.boot("lab2")
	s.publications(1)
	a.start()
	s.publications(0)
	a.rest()
	if log := a.log.String(); !strings.Contains(log, "volume vol: published for this host, and not mounted") {
		t.Errorf("the plugin says nothing of it:\n%s", log)
	}
	t.Log("its host was lost")
}

// abandons has a filer go for good while somebody writes.
func (s *single) abandons() {
	t, a := s.T, s.a
	a.attach("vol", writes, "t")
	w := a.writer(a.file("t/lost"))
	a.grows(w, 5)
	s.stop(unix.SIGKILL)
	a.kill()
	program, err := programs.Path("cradle-csi")
	a.must("doctor", err)
	out, err := a.in(append([]string{program, "doctor", "--backend", "filer", "--abandon", "vol"}, a.filer...)...).CombinedOutput()
	if !strings.Contains(string(out), "repaired: volume vol: taken away from this host") || !strings.Contains(string(out), "no filer answers") {
		t.Errorf("doctor --abandon: %s, %v", out, err)
	}
	a.rest()
	w.cmd.Process.Kill() // which a process that waits for NFS takes
	w.cmd.Wait()
	s.serve()
	left := s.publications(1)
	for _, p := range left {
		s.command("unpublish", p.ID)
	}
	a.start()
	t.Log("it was abandoned")
	a.must("unpublish", a.unpublish("vol", "t"))
	a.must("unstage", a.unstage("vol", writes))
	a.attach("vol", writes, "t")
	a.detach("vol", writes, "t")
	a.rest()
	s.publications(0)
}

// steps kills the plugin in the middle of what it does, again and again.
func (s *single) steps() {
	a := s.a
	for round := range 12 {
		for _, do := range []func() error{
			func() error { return a.stage("vol", writes) },
			func() error { return a.unstage("vol", writes) },
		} {
			done := make(chan error, 1)
			go func() { done <- do() }()
			time.Sleep(time.Duration(rand.IntN(250)) * time.Millisecond)
			a.kill()
			<-done
			a.start()
			a.must(fmt.Sprintf("round %d", round), do())
		}
		a.rest()
		s.publications(0)
	}
}

// TestLabMountsSanity is csi-sanity, with volumes that this host mounts from a filer.
func TestLabMountsSanity(t *testing.T) {
	s := newSingle(t, "tank/sanity", "--listen", "10.88.0.1:2049")
	sanity, err := programs.Tool("csi-sanity")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(s.a.file("parameters.yaml"), []byte("class: nfs\nsnapshots: none\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	out, err := s.a.in(sanity, "--csi.endpoint", "unix://"+s.a.file("csi.sock"), "--csi.mountdir", s.a.file("mnt"), "--csi.stagingdir", s.a.file("staging"),
		"--csi.testvolumesize", "314572800", "--csi.testvolumeexpandsize", "335544320", "--csi.testvolumeparameters", s.a.file("parameters.yaml"), "--ginkgo.no-color",
		"--ginkgo.json-report", s.a.file("report.json")).CombinedOutput()
	if err != nil {
		t.Errorf("csi-sanity: %v\n%s", err, out[max(0, len(out)-8<<10):])
	}
	var suites []struct {
		SpecReports []struct{ LeafNodeText, State string }
	}
	data, err := os.ReadFile(s.a.file("report.json"))
	if err == nil {
		err = json.Unmarshal(data, &suites)
	}
	if err != nil {
		t.Fatal(err)
	}
	passed := 0
	for _, spec := range suites[0].SpecReports {
		if spec.State == "passed" {
			passed++
		}
	}
	t.Logf("%d specs passed", passed)
	if passed < 70 {
		t.Errorf("only %d specs passed", passed)
	}
	s.a.rest()
	s.publications(0)
}

// TestLabSet is a host that has a volume mounted from a set of filers, which moves under it: TestVMSoakFilerMountsSet has that do so, and says when it is enough.
func TestLabSet(t *testing.T) {
	m := newMounter(t, "lab", "client", "--filer", os.Getenv("LAB_SET"), "--filer-key", "/job/set.key")
	m.start()
	m.create("shared", 0)
	m.attach("shared", writes, "t")
	w := m.writer(m.file("t/lines"))
	for {
		if _, err := os.Stat(m.seen(m.file("t/end"))); err == nil {
			break
		} else if !errors.Is(err, os.ErrNotExist) {
			t.Fatal(err)
		}
		time.Sleep(time.Second)
	}
	t.Logf("%d lines, %q", w.lines(), regexp.MustCompile(`took \S+`).FindAllString(w.out.String(), -1))
	m.ends(w)
	m.detach("shared", writes, "t")
	m.rest()
	_, err := m.DeleteVolume(m.within(), &csi.DeleteVolumeRequest{VolumeId: "shared"})
	m.must("delete", err)
}
