//go:build vm

package main

import (
	"bytes"
	"cmp"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/binary"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/big"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/uuid"
	consulapi "github.com/hashicorp/consul/api"
	"github.com/minio/minio-go/v7"
	"github.com/minio/minio-go/v7/pkg/credentials"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/cradlestack/cradlestack/csi-plugin/filer/api"
	"github.com/cradlestack/cradlestack/internal/locked"
	"github.com/cradlestack/cradlestack/test/programs"
)

// TestRootFailover does to the active one of two filers, once each, what TestRootSoakFailover does again and again.
func TestRootFailover(t *testing.T) { failOver(t, len(drills), 3*time.Second, embedded) }

// The drills: what is done to the active filer, or around it. Each returns once another one is to be active, or that is not to be expected.
var drills = []struct {
	name string
	do   func(p *pair, active, other *host)
}{
	{"killed", func(p *pair, active, other *host) {
		active.sends(unix.SIGKILL)
		p.moved(other)
		active.again()
	}},
	{"switched", func(p *pair, active, other *host) {
		if out, err := active.command("switch"); err != nil {
			p.t.Errorf("switch: %v: %s", err, out)
		}
		p.moved(other)
	}},
	{"stopped", func(p *pair, active, other *host) {
		active.sends(unix.SIGTERM)
		p.moved(other)
		active.again()
	}},
	// The filer is frozen, and continued when another one is active: if it is there still.
	{"frozen", func(p *pair, active, other *host) {
		active.sends(unix.SIGSTOP)
		p.moved(other)
		active.sends(unix.SIGCONT)
		active.again()
	}},
	// All of the host's filer is frozen, its warden too, and the filer wakes up first.
	{"suspended", func(p *pair, active, other *host) {
		all := active.processes()
		for _, pid := range all {
			p.signal(pid, unix.SIGSTOP)
		}
		p.moved(other)
		active.sends(unix.SIGCONT)
		time.Sleep(200 * time.Millisecond)
		for _, pid := range all {
			p.signal(pid, unix.SIGCONT)
		}
		active.await() // it may have been killed, or have seen by itself that it is not the active one
	}},
	{"Consul's leader killed", func(p *pair, _, _ *host) {
		leader := p.leader()
		p.signal(leader.consul.Process.Pid, unix.SIGKILL)
		_ = leader.consul.Wait()
		p.eventually("Consul has another leader", func() error {
			if l := p.leader(); l == nil || l == leader {
				return errors.New("it has not")
			}
			return nil
		})
		leader.startConsul()
	}},
	// Nothing of Consul answers, for longer than the lease: the active filer says so, and goes on, or another one does, when it answers again.
	{"Consul away", func(p *pair, active, _ *host) {
		for _, h := range p.hosts {
			p.signal(h.consul.Process.Pid, unix.SIGSTOP)
		}
		p.eventually("the active filer says that Consul does not answer", func() error {
			s, err := active.status()
			if err == nil && s.Set.Consul == "" {
				err = errors.New("it does not")
			}
			return err
		})
		time.Sleep(p.lease)
		for _, h := range p.hosts {
			p.signal(h.consul.Process.Pid, unix.SIGCONT)
		}
		p.eventually("a filer is active, and the other stands by", func() error {
			for _, h := range p.hosts[:2] {
				select {
				case <-h.ended:
					h.startFiler()
				default:
				}
			}
			return p.settled()
		})
	}},
	{"cut off", func(p *pair, active, other *host) {
		p.ip("-n", p.ns("sw"), "link", "set", "dev", active.name, "down")
		p.moved(other)
		p.ip("-n", p.ns("sw"), "link", "set", "dev", active.name, "up")
	}},
}

// A pair is two filers over one directory, on hosts that are network namespaces, with a third one for Consul, and clients in a fourth.
type pair struct {
	looks    time.Duration // between two looks of eventually
	t        testing.TB
	lease    time.Duration
	flags    []string // of each filer
	dir      string
	pool     string
	id       string
	programs map[string]string
	roots    *x509.CertPool
	hosts    []*host // a, b, c

	management, token string // Consul's: the tests' own, and the filers', which may do what docs/nfs.md says and nothing else
}

type host struct {
	*pair
	name, address string
	consul        *exec.Cmd
	filer         *os.Process
	ended         chan struct{} // closed at its end
	api           *consulapi.Client
	log           locked.Buffer
	agent         locked.Buffer
}

const serviceAddress = "10.77.0.9"

func (p *pair) ns(name string) string { return p.id + name }

func (p *pair) ip(args ...string) {
	p.t.Helper()
	if out, err := exec.Command("ip", args...).CombinedOutput(); err != nil {
		p.t.Fatalf("ip %v: %v: %s", args, err, out)
	}
}

func (p *pair) signal(pid int, s unix.Signal) { _ = unix.Kill(pid, s) } // it may have ended

// sends sends the host's filer a signal, if it is there: its number can be another process's by now.
func (h *host) sends(s unix.Signal) { _ = h.filer.Signal(s) }

// eventually waits: on a host that is short of processors an emulated machine takes minutes to boot.
func (p *pair) eventually(what string, f func() error) {
	p.t.Helper()
	err := f()
	for end := time.Now().Add(15 * time.Minute); err != nil; err = f() {
		if time.Now().After(end) {
			for _, h := range p.hosts {
				p.t.Logf("%s:\n%s", h.name, h.log.String())
			}
			p.t.Fatalf("%s: %v", what, err)
		}
		time.Sleep(cmp.Or(p.looks, 20*time.Millisecond))
	}
}

// dial connects from the clients' host.
func (p *pair) dial(ctx context.Context, network, address string) (net.Conn, error) {
	return p.from(ctx, "cl", network, address)
}

// from connects from a host: a socket is of the namespace in which it was made.
func (p *pair) from(ctx context.Context, host, network, address string) (net.Conn, error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	own, err := netns.Get()
	if err != nil {
		return nil, err
	}
	defer own.Close()
	its, err := netns.GetFromName(p.ns(host))
	if err != nil {
		return nil, err
	}
	defer its.Close()
	if err := netns.Set(its); err != nil {
		return nil, err
	}
	defer func() {
		if err := netns.Set(own); err != nil {
			panic(err)
		}
	}()
	return (&net.Dialer{Timeout: time.Second}).DialContext(ctx, network, address)
}

func newPair(t testing.TB, lease time.Duration, flags ...string) *pair {
	t.Helper()
	if os.Getuid() != 0 {
		t.Fatal("this needs root")
	}
	dir, err := os.MkdirTemp("", "failover-") // for unix sockets, t.TempDir's paths are too long
	if err != nil {
		t.Fatal(err)
	}
	p := &pair{t: t, lease: lease, flags: flags, dir: dir, pool: filepath.Join(dir, "pool"), id: fmt.Sprintf("fo%d", os.Getpid()), programs: map[string]string{}, management: uuid.NewString()}
	for _, name := range []string{"cradle-filer", "cradle-csi"} {
		if p.programs[name], err = programs.Path(name); err != nil {
			t.Fatal(err)
		}
	}
	if p.programs["consul"], err = programs.Tool("consul"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.end)
	p.certify()
	p.ip("netns", "add", p.ns("sw"))
	p.ip("-n", p.ns("sw"), "link", "add", "name", "bridge0", "type", "bridge")
	p.ip("-n", p.ns("sw"), "link", "set", "bridge0", "up")
	for i, name := range []string{"a", "b", "c", "cl"} {
		ns := p.ns(name)
		p.ip("netns", "add", ns)
		p.ip("-n", p.ns("sw"), "link", "add", "name", name, "type", "veth", "peer", "name", "eth0", "netns", ns)
		p.ip("-n", p.ns("sw"), "link", "set", "dev", name, "master", "bridge0", "up")
		h := &host{pair: p, name: name, address: fmt.Sprintf("10.77.0.%d", i+1)}
		p.ip("-n", ns, "addr", "add", h.address+"/24", "dev", "eth0")
		p.ip("-n", ns, "link", "set", "eth0", "up")
		p.ip("-n", ns, "link", "set", "lo", "up")
		if name == "cl" {
			break
		}
		p.hosts = append(p.hosts, h)
		config := consulapi.DefaultNonPooledConfig()
		config.Address, config.Token = "127.0.0.1:8500", p.management
		config.Transport.DialContext = func(ctx context.Context, network, address string) (net.Conn, error) {
			return p.from(ctx, name, network, address)
		}
		if h.api, err = consulapi.NewClient(config); err != nil {
			t.Fatal(err)
		}
		h.startConsul()
	}
	if err := os.Mkdir(p.pool, 0o700); err != nil {
		t.Fatal(err)
	}
	p.volume("create")
	p.eventually("Consul has a leader", func() error {
		if p.leader() == nil {
			return errors.New("it has not")
		}
		return nil
	})
	p.eventually("Consul makes a token", p.makeToken)
	for _, h := range p.hosts[:2] {
		h.startFiler()
	}
	p.eventually("a filer is active, and the other stands by", p.settled)
	return p
}

func (p *pair) end() {
	if p.t.Failed() {
		for _, h := range p.hosts {
			p.t.Logf("%s:\n%s", h.name, h.log.String())
		}
	}
	for _, h := range p.hosts {
		if h.filer != nil {
			for _, pid := range h.processes() { // a drill may have stopped them
				p.signal(pid, unix.SIGCONT)
			}
			h.sends(unix.SIGTERM)
			<-h.ended
		}
	}
	for _, h := range p.hosts {
		for _, pid := range h.processes() {
			p.t.Errorf("process %d of %s is left", pid, h.name)
			p.signal(pid, unix.SIGKILL)
		}
		if h.consul != nil && h.consul.ProcessState == nil {
			h.consul.Process.Kill()
			h.consul.Wait()
		}
	}
	if _, err := os.Stat(p.pool); err == nil {
		p.volume("delete")
	}
	for _, name := range []string{"sw", "a", "b", "c", "cl"} {
		if _, err := os.Stat("/run/netns/" + p.ns(name)); err != nil {
			continue // it had not come that far
		}
		if out, err := exec.Command("ip", "netns", "del", p.ns(name)).CombinedOutput(); err != nil {
			p.t.Errorf("ip netns del %s: %v: %s", p.ns(name), err, out)
		}
	}
	os.RemoveAll(p.dir)
}

// volume makes or deletes the volume, a directory of the pool.
func (p *pair) volume(operation string) {
	cmd := exec.Command(p.programs["cradle-csi"], "host-volume", operation, "--pool", p.pool)
	cmd.Env = append(os.Environ(), "DHV_VOLUME_ID=vol", "DHV_VOLUMES_DIR="+filepath.Join(p.dir, "mounts"), "DHV_CAPACITY_MIN_BYTES=0", "DHV_PARAMETERS={}")
	if out, err := cmd.CombinedOutput(); err != nil {
		p.t.Errorf("cradle-csi host-volume %s: %v\n%s", operation, err, out)
	}
}

func (p *pair) file(name string) string { return filepath.Join(p.dir, name) }

func (p *pair) certify() {
	public, private, err := ed25519.GenerateKey(nil)
	if err != nil {
		p.t.Fatal(err)
	}
	c := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "failover"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, IPAddresses: []net.IP{net.ParseIP(serviceAddress)},
	}
	cert, err := x509.CreateCertificate(rand.Reader, c, c, public, private)
	if err != nil {
		p.t.Fatal(err)
	}
	key, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		p.t.Fatal(err)
	}
	text := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert})
	if err := errors.Join(os.WriteFile(p.file("tls.crt"), text, 0o600), os.WriteFile(p.file("tls.key"), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: key}), 0o600)); err != nil {
		p.t.Fatal(err)
	}
	p.roots = x509.NewCertPool()
	p.roots.AppendCertsFromPEM(text)
}

func (h *host) start(out io.Writer, args ...string) *exec.Cmd {
	cmd := exec.Command("ip", append([]string{"netns", "exec", h.ns(h.name)}, args...)...)
	cmd.Stdout, cmd.Stderr = out, out
	cmd.Env = append(os.Environ(), consulapi.HTTPTokenEnvName+"="+h.token)
	if err := cmd.Start(); err != nil {
		h.t.Fatal(err)
	}
	return cmd
}

func (h *host) startConsul() {
	h.t.Helper()
	config := h.file("consul-" + h.name + ".hcl")
	text := fmt.Sprintf(`
node_name = %q
data_dir = %q
bind_addr = %q
client_addr = "127.0.0.1"
server = true
bootstrap_expect = 3
retry_join = ["10.77.0.1", "10.77.0.2", "10.77.0.3"]
retry_interval = "1s"
disable_update_check = true
leave_on_terminate = false
log_level = "warn"
performance { raft_multiplier = 1 }
acl {
  enabled = true
  default_policy = "deny"
  tokens {
    initial_management = %[4]q
    agent = %[4]q
  }
}
ports {
  grpc = -1
  grpc_tls = -1
  serf_wan = -1
  dns = 8600
}
`, h.name, h.file("consul-"+h.name), h.address, h.management)
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		h.t.Fatal(err)
	}
	h.consul = h.start(&h.agent, h.programs["consul"], "agent", "-config-file", config)
}

// makeToken makes the filers' token, of the policy that docs/nfs.md has.
func (p *pair) makeToken() error {
	docs, err := os.ReadFile("../../docs/nfs.md")
	if err != nil {
		p.t.Fatal(err)
	}
	_, policy, found := strings.Cut(string(docs), "```hcl\n# policy.hcl\n")
	policy, _, ends := strings.Cut(policy, "```")
	if !found || !ends {
		p.t.Fatal("docs/nfs.md has no policy for Consul")
	}
	acl := p.hosts[0].api.ACL()
	made, _, err := acl.PolicyCreate(&consulapi.ACLPolicy{Name: "filers-" + uuid.NewString(), Rules: policy}, nil)
	if err != nil {
		return err
	}
	token, _, err := acl.TokenCreate(&consulapi.ACLToken{Policies: []*consulapi.ACLLink{{ID: made.ID}}}, nil)
	if err == nil {
		p.token = token.SecretID
	}
	return err
}

// leader is the host whose Consul leads, nil if there is none.
func (p *pair) leader() *host {
	for _, asked := range p.hosts {
		at, err := asked.api.Status().Leader()
		for _, h := range p.hosts {
			if err == nil && strings.HasPrefix(at, h.address+":") {
				return h
			}
		}
	}
	return nil
}

func (h *host) socket() string { return h.file(h.name + "/api.sock") }

func (h *host) startFiler() {
	h.t.Helper()
	cmd := h.start(&h.log, append([]string{
		h.programs["cradle-filer"], "serve", "--set", "files", "--member", h.name, "--socket", h.socket(), "--pool", h.pool, "--floating", serviceAddress + "/24@eth0",
		"--webdav", ":8443", "--s3", ":9000", "--tls-cert", h.file("tls.crt"), "--tls-key", h.file("tls.key"), "--rate", "0", "--lease", h.lease.String(),
	}, h.flags...)...)
	ended := make(chan struct{})
	h.filer, h.ended = cmd.Process, ended
	go func() {
		defer close(ended)
		if err := cmd.Wait(); err != nil {
			fmt.Fprintf(&h.log, "the filer has ended: %v\n", err)
		}
	}()
}

// again waits for the end of the filer's process and starts another, as an init system does.
func (h *host) again() {
	h.t.Helper()
	<-h.ended
	h.startFiler()
}

// await does that where the process ends, and else waits until it stands by.
func (h *host) await() {
	h.t.Helper()
	h.eventually("the filer of "+h.name+" stands by, or has ended", func() error {
		select {
		case <-h.ended:
			h.startFiler()
			return nil
		default:
		}
		s, err := h.status()
		if err == nil && s.Set.Active == h.name {
			err = errors.New("it is the active one")
		}
		return err
	})
}

// processes are those of the host's filer.
func (h *host) processes() (pids []int) {
	commands, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	its, err := os.Stat("/run/netns/" + h.ns(h.name))
	if err != nil {
		return nil
	}
	for _, path := range commands {
		command, err := os.ReadFile(path)
		if err != nil || !strings.Contains(string(command), "cradle-filer\x00serve") && !strings.Contains(string(command), "\x00warden") && !strings.Contains(string(command), "cradle-s3") && !strings.Contains(string(command), "ganesha.nfsd") {
			continue
		}
		pid, _ := strconv.Atoi(filepath.Base(filepath.Dir(path)))
		if ns, err := os.Stat(fmt.Sprintf("/proc/%d/ns/net", pid)); err == nil && os.SameFile(ns, its) {
			pids = append(pids, pid)
		}
	}
	return pids
}

func (h *host) command(args ...string) (string, error) {
	var out, errs bytes.Buffer
	cmd := exec.Command(h.programs["cradle-filer"], append(args, "--socket", h.socket())...)
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil {
		return "", fmt.Errorf("cradle-filer %v: %w: %s", args, err, &errs)
	}
	return out.String(), nil
}

func (h *host) status() (s api.Status, err error) {
	ctx, cancel := context.WithTimeout(h.t.Context(), 3*time.Second)
	defer cancel()
	s, err = api.Client{Socket: h.socket()}.Status(ctx)
	if err == nil && s.Set == nil {
		err = errors.New("it is of no set")
	}
	return s, err
}

// settled says whether both filers agree about which of them is active, and that the other stands by.
func (p *pair) settled() error {
	var said []string
	for _, h := range p.hosts[:2] {
		s, err := h.status()
		if err != nil {
			return fmt.Errorf("%s: %w", h.name, err)
		}
		if !s.Set.Serving || len(s.Set.Standby) != 1 || s.Set.Consul != "" {
			return fmt.Errorf("%s says %+v", h.name, *s.Set)
		}
		said = append(said, s.Set.Active)
	}
	if said[0] != said[1] {
		return fmt.Errorf("active are %v", said)
	}
	return nil
}

// active is the host whose filer is, and the other one.
func (p *pair) active() (active, other *host) {
	p.t.Helper()
	p.eventually("a filer is active, and the other stands by", p.settled)
	s, err := p.hosts[0].status()
	if err != nil {
		p.t.Fatal(err)
	}
	if s.Set.Active == "a" {
		return p.hosts[0], p.hosts[1]
	}
	return p.hosts[1], p.hosts[0]
}

// moved waits until a host's filer is active.
func (p *pair) moved(to *host) {
	p.t.Helper()
	p.eventually("the filer of "+to.name+" is active", func() error {
		s, err := to.status()
		if err == nil && (s.Set.Active != to.name || !s.Set.Serving) {
			err = fmt.Errorf("it says %+v", *s.Set)
		}
		return err
	})
}

// named waits until Consul's DNS names that host for the set, and no other.
func (p *pair) named(h *host) {
	p.t.Helper()
	p.eventually("Consul's DNS names "+h.name, func() error {
		all, _, err := h.api.Health().Service("files", "", true, nil)
		if err == nil && (len(all) != 1 || all[0].Node.Node != h.name || all[0].Service.Address != serviceAddress) {
			err = fmt.Errorf("it names %d, %+v", len(all), all)
		}
		return err
	})
}

// content is a version of one of a writer's pieces, whole by its checksum.
func content(writer string, piece, version int) []byte {
	b := bytes.Repeat(fmt.Appendf(nil, "%s %d %d\n", writer, piece, version), 400)[:2000]
	sum := sha256.Sum256(b)
	return append(b, sum[:]...)
}

// A writer writes new versions of its pieces all the time, and knows which was acknowledged.
type writer struct {
	name  string
	write func(piece int, data []byte) error // until it is acknowledged; an error is one that a client would see
	read  func(piece int) ([]byte, error)
	path  func(piece int) (file string, at int64) // in the pool

	mu    sync.Mutex // between a write and what is known of it
	known [pieces]int
	acks  atomic.Int64
	slow  atomic.Int64 // the longest, since it was asked for
}

// goingOn says whether all writers have got some more acknowledged since it was made.
func goingOn(t testing.TB, writers []*writer) func() error {
	var before []int64
	for _, w := range writers {
		before = append(before, w.acks.Load())
	}
	return func() error {
		for i, w := range writers {
			if w.acks.Load() < before[i]+5 && !t.Failed() {
				return fmt.Errorf("%s does not", w.name)
			}
		}
		return nil
	}
}

const pieces = 8

func (w *writer) run(ctx context.Context, t testing.TB) {
	for i := 0; ctx.Err() == nil; i++ {
		piece := i % pieces
		w.mu.Lock()
		begun := time.Now()
		err := w.write(piece, content(w.name, piece, w.known[piece]+1))
		if err == nil {
			w.known[piece]++
		}
		w.mu.Unlock()
		if err != nil {
			t.Errorf("%s: a client sees an error: %v", w.name, err)
			return
		}
		w.slow.Store(max(w.slow.Load(), int64(time.Since(begun))))
		w.acks.Add(1)
		time.Sleep(5 * time.Millisecond)
	}
}

// check reads all, by the protocol and on the pool, where the writer has a path in it: the last version is there, and no other.
func (w *writer) check(t testing.TB) {
	t.Helper()
	w.mu.Lock()
	defer w.mu.Unlock()
	for piece, version := range w.known {
		if version == 0 {
			continue
		}
		want := content(w.name, piece, version)
		got, err := w.read(piece)
		if err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s: piece %d is not version %d: %.60q, %v", w.name, piece, version, got, err)
		}
		if w.path == nil {
			continue
		}
		name, at := w.path(piece)
		f, err := os.Open(name)
		if err == nil {
			got = make([]byte, len(want))
			_, err = f.ReadAt(got, at)
			f.Close()
		}
		if err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s: piece %d in the pool is not version %d: %.60q, %v", w.name, piece, version, got, err)
		}
	}
}

func failOver(t *testing.T, rounds int, lease time.Duration, engine string) {
	p := newPair(t, lease, "--engine", engine)
	active, _ := p.active()
	run := func(args ...string) string {
		t.Helper()
		out, err := active.command(args...)
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	var pub api.Publication
	var grant api.Grant
	if err := errors.Join(json.Unmarshal([]byte(run("publish", "vol", "--client", "10.77.0.0/24", "-o", "json")), &pub), json.Unmarshal([]byte(run("grant", "vol", "-o", "json")), &grant)); err != nil {
		t.Fatal(err)
	}
	data := filepath.Join(p.pool, "vol", "data")
	nfs := p.nfs(pub.Address)
	defer nfs.close()
	dav := &http.Client{Transport: &http.Transport{DialContext: p.dial, TLSClientConfig: &tls.Config{RootCAs: p.roots, MinVersion: tls.VersionTLS12}}, Timeout: 10 * time.Second}
	locked := lockDAV(t, dav, grant)
	objects := p.objects(t, grant)
	file := filepath.Join(data, "nfs")
	overNFS := nfs.writer4
	if engine == embedded {
		overNFS = nfs.writer3
	}
	handle, first := overNFS(pub.Export, file)
	writers := []*writer{
		first,
		{
			name: "WebDAV", write: func(piece int, b []byte) error {
				header := http.Header{}
				if piece == 0 {
					header.Set("If", "(<"+locked+">)")
				}
				_, err := ask(dav, grant, http.MethodPut, fmt.Sprint("dav-", piece), b, header, http.StatusCreated, http.StatusNoContent)
				return err
			},
			read: func(piece int) ([]byte, error) {
				return ask(dav, grant, http.MethodGet, fmt.Sprint("dav-", piece), nil, nil, http.StatusOK)
			},
			path: func(piece int) (string, int64) { return filepath.Join(data, fmt.Sprint("dav-", piece)), 0 },
		},
		{
			name: "S3", write: func(piece int, b []byte) error {
				return tryS3(func(ctx context.Context) error {
					_, err := objects.PutObject(ctx, "vol", fmt.Sprint("s3-", piece), bytes.NewReader(b), int64(len(b)), minio.PutObjectOptions{})
					return err
				})
			},
			read: func(piece int) (b []byte, err error) {
				err = tryS3(func(ctx context.Context) error {
					o, err := objects.GetObject(ctx, "vol", fmt.Sprint("s3-", piece), minio.GetObjectOptions{})
					if err == nil {
						defer o.Close()
						b, err = io.ReadAll(o)
					}
					return err
				})
				return b, err
			},
			path: func(piece int) (string, int64) { return filepath.Join(data, fmt.Sprint("s3-", piece)), 0 },
		},
	}
	ctx, cancel := context.WithCancel(t.Context())
	var g sync.WaitGroup
	defer g.Wait()
	defer cancel()
	for _, w := range writers {
		g.Go(func() { w.run(ctx, t) })
	}
	var moves atomic.Int64
	g.Go(func() { moves.Store(int64(p.probe(ctx, nfs, handle))) })
	progress := func() { t.Helper(); p.eventually("the writers go on", goingOn(t, writers)) }
	pauses := map[string][]time.Duration{}
	for round := range rounds {
		d := drills[round%len(drills)]
		active, other := p.active()
		progress()
		for _, w := range writers {
			w.slow.Store(0)
		}
		d.do(p, active, other)
		progress()
		if round < rounds-1 {
			p.eventually("a filer is active, and the other stands by", p.settled)
			progress()
		}
		line := ""
		for _, w := range writers {
			slow := time.Duration(w.slow.Load())
			pauses[d.name+", "+w.name] = append(pauses[d.name+", "+w.name], slow)
			line += fmt.Sprintf("  %s %.2fs", w.name, slow.Seconds())
			w.check(t)
		}
		t.Logf("round %d, %s: the longest call%s", round+1, d.name, line)
		if t.Failed() {
			return
		}
	}
	for _, key := range slices.Sorted(maps.Keys(pauses)) {
		all := slices.Sorted(slices.Values(pauses[key]))
		t.Logf("%-32s median %6.2fs  worst %6.2fs  of %d", key, all[len(all)/2].Seconds(), all[len(all)-1].Seconds(), len(all))
	}
	// The lock and the property that were there at the beginning still are.
	if _, err := ask(dav, grant, http.MethodPut, "dav-0", []byte("x"), nil, http.StatusLocked); err != nil {
		t.Errorf("a file that is locked can be written: %v", err)
	}
	if text, err := ask(dav, grant, "PROPFIND", "dav-0", nil, http.Header{"Depth": {"0"}}, http.StatusMultiStatus); err != nil || !strings.Contains(string(text), "remembered") {
		t.Errorf("its property is gone: %v\n%s", err, text)
	}
	cancel()
	g.Wait()
	taken := 0
	for _, h := range p.hosts {
		taken += strings.Count(h.log.String(), `msg="has the lock"`)
	}
	if got := moves.Load(); got == 0 || got >= int64(taken) {
		t.Errorf("who answers has changed %d times, and the lock was taken %d times", got, taken)
	}
	for _, h := range p.hosts[:2] {
		if s, err := h.status(); err == nil && s.Set.Active == h.name {
			active = h
		}
	}
	if out, err := active.command("status"); err != nil || !strings.Contains(out, "active") || !strings.Contains(out, "standing by") {
		t.Errorf("status: %v\n%s", err, out)
	} else {
		t.Log("\n" + out)
	}
	if out, err := active.command("unpublish", pub.ID); err != nil {
		t.Error(out, err)
	}
	if out, err := active.command("revoke", grant.ID); err != nil {
		t.Error(out, err)
	}
}

// probe asks both hosts in turn, at their own addresses, until ctx ends, and counts how often another one answers than before.
func (p *pair) probe(ctx context.Context, c *nfsClient, handle []byte) (moves int) {
	last := ""
	for ctx.Err() == nil {
		for _, h := range p.hosts[:2] {
			short, cancel := context.WithTimeout(ctx, 300*time.Millisecond)
			conn, err := p.dial(short, "tcp", h.address+":2049")
			if err == nil {
				if _, err = exchangeRPC(short, conn, c.record(1, handle, nil)); err == nil && h.name != last {
					if last != "" {
						moves++
					}
					last = h.name
				}
				conn.Close()
			}
			cancel()
		}
		select {
		case <-ctx.Done():
		case <-time.After(20 * time.Millisecond):
		}
	}
	return moves
}

// An nfsClient is one as Linux is with the option hard: what is not answered is asked again, as the same call, for ever.
type nfsClient struct {
	*pair
	t       testing.TB // of the whole test: the pair's is that of a part while there is one
	address string
	xid     atomic.Uint32
	mu      sync.Mutex
	conn    net.Conn
}

func (p *pair) nfs(address string) *nfsClient { return &nfsClient{pair: p, t: p.t, address: address} }

func (c *nfsClient) close() {
	if c.conn != nil {
		c.conn.Close()
	}
}

func opaque(b, data []byte) []byte {
	b = binary.BigEndian.AppendUint32(b, uint32(len(data)))
	b = append(b, data...)
	return append(b, make([]byte, -len(data)&3)...)
}

// record is a call of root's (RFC 5531) to NFS, or to MOUNT where proc is negative.
func (c *nfsClient) record(proc int, handle, rest []byte) []byte {
	program := uint32(100003)
	if proc < 0 {
		program, proc = 100005, -proc
	}
	b := make([]byte, 4)
	for _, n := range []uint32{c.xid.Add(1), 0, 2, program, 3, uint32(proc), 1, 20, 0, 0, 0, 0, 0, 0, 0} {
		b = binary.BigEndian.AppendUint32(b, n)
	}
	b = append(opaque(b, handle), rest...)
	binary.BigEndian.PutUint32(b, uint32(len(b)-4)|1<<31)
	return b
}

// exchangeRPC sends a call and returns what is after the head of its reply.
func exchangeRPC(ctx context.Context, conn net.Conn, record []byte) ([]byte, error) {
	deadline, _ := ctx.Deadline()
	conn.SetDeadline(deadline)
	if _, err := conn.Write(record); err != nil {
		return nil, err
	}
	for {
		head := make([]byte, 4)
		if _, err := io.ReadFull(conn, head); err != nil {
			return nil, err
		}
		reply := make([]byte, binary.BigEndian.Uint32(head)&^(1<<31))
		if _, err := io.ReadFull(conn, reply); err != nil {
			return nil, err
		}
		if len(reply) < 28 || !bytes.Equal(reply[:4], record[4:8]) {
			continue
		}
		return reply[24:], nil
	}
}

// call asks until there is an answer. It has one connection, which it drops when there is none for two seconds: a host that has lost the address says nothing.
func (c *nfsClient) call(record []byte) []byte {
	c.mu.Lock()
	defer c.mu.Unlock()
	for c.t.Context().Err() == nil && !c.t.Failed() {
		ctx, cancel := context.WithTimeout(c.t.Context(), 2*time.Second)
		var err error
		if c.conn == nil {
			c.conn, err = c.dial(ctx, "tcp", c.address)
		}
		var reply []byte
		if err == nil {
			reply, err = exchangeRPC(ctx, c.conn, record)
		}
		cancel()
		if err == nil && binary.BigEndian.Uint32(reply) != 10008 { // NFS3ERR_JUKEBOX
			return reply
		}
		if err != nil && c.conn != nil {
			c.conn.Close()
			c.conn = nil
		}
		time.Sleep(20 * time.Millisecond)
	}
	return []byte{0, 0, 0, 255}
}

func (c *nfsClient) open(export, name string) []byte {
	c.t.Helper()
	root := c.call(c.record(-1, []byte(export), nil))
	if s := binary.BigEndian.Uint32(root); s != 0 {
		c.t.Fatalf("mount: %d", s)
	}
	dir := root[8 : 8+binary.BigEndian.Uint32(root[4:])]
	rest := opaque(nil, []byte(name))
	rest = append(rest, make([]byte, 4+6*4)...) // UNCHECKED, no attributes
	made := c.call(c.record(8, dir, rest))
	if s := binary.BigEndian.Uint32(made); s != 0 {
		c.t.Fatalf("create: %d", s)
	}
	return made[12 : 12+binary.BigEndian.Uint32(made[8:])]
}

// write writes so that it is on stable storage: at once, or by a COMMIT, and again where that says that it may be lost.
func (c *nfsClient) write(handle []byte, offset int, data []byte, stable bool) error {
	for {
		how := uint32(0)
		if stable {
			how = 2
		}
		rest := binary.BigEndian.AppendUint64(nil, uint64(offset))
		rest = binary.BigEndian.AppendUint32(rest, uint32(len(data)))
		rest = opaque(binary.BigEndian.AppendUint32(rest, how), data)
		reply := c.call(c.record(7, handle, rest))
		if s := binary.BigEndian.Uint32(reply); s != 0 {
			return fmt.Errorf("WRITE: %d", s)
		}
		verifier := reply[len(reply)-8:]
		if stable {
			return nil
		}
		reply = c.call(c.record(21, handle, make([]byte, 12)))
		if s := binary.BigEndian.Uint32(reply); s != 0 {
			return fmt.Errorf("COMMIT: %d", s)
		}
		if bytes.Equal(reply[len(reply)-8:], verifier) {
			return nil
		}
	}
}

func (c *nfsClient) read(handle []byte, offset, n int) ([]byte, error) {
	rest := binary.BigEndian.AppendUint64(nil, uint64(offset))
	reply := c.call(c.record(6, handle, binary.BigEndian.AppendUint32(rest, uint32(n))))
	if s := binary.BigEndian.Uint32(reply); s != 0 {
		return nil, fmt.Errorf("READ: %d", s)
	}
	at := 4 + 4 + 84 + 4 + 4 // status, attributes, count, end
	got := reply[at+4:]
	return got[:min(n, len(got))], nil
}

// writer3 makes a file, and writes it by version 3.
func (c *nfsClient) writer3(export, file string) (handle []byte, w *writer) {
	c.t.Helper()
	handle = c.open(export, filepath.Base(file))
	return handle, &writer{
		name: "NFS", write: func(piece int, b []byte) error { return c.write(handle, piece*4096, b, piece%2 == 0) },
		read: func(piece int) ([]byte, error) { return c.read(handle, piece*4096, len(content("NFS", piece, 1))) },
		path: func(piece int) (string, int64) { return file, int64(piece) * 4096 },
	}
}

// ask makes a request until it is answered: connections that end, and 503, are what clients of HTTP try again at.
func ask(c *http.Client, g api.Grant, method, name string, body []byte, header http.Header, want ...int) ([]byte, error) {
	for end := time.Now().Add(3 * time.Minute); ; time.Sleep(20 * time.Millisecond) {
		r, err := http.NewRequest(method, g.WebDAV+name, bytes.NewReader(body))
		if err != nil {
			return nil, err
		}
		r.SetBasicAuth(g.ID, g.Secret)
		maps.Copy(r.Header, header)
		resp, err := c.Do(r)
		if err != nil {
			if time.Now().After(end) {
				return nil, err
			}
			continue
		}
		text, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		switch {
		case resp.StatusCode == http.StatusServiceUnavailable || err != nil:
		case !slices.Contains(want, resp.StatusCode):
			return nil, fmt.Errorf("%s %s: %s: %.200s", method, name, resp.Status, text)
		default:
			return text, nil
		}
	}
}

// lockDAV makes a file with a lock and a property, and returns the lock's token.
func lockDAV(t *testing.T, c *http.Client, g api.Grant) string {
	t.Helper()
	text, err := ask(c, g, "LOCK", "dav-0", []byte(`<lockinfo xmlns="DAV:"><lockscope><exclusive/></lockscope><locktype><write/></locktype></lockinfo>`),
		http.Header{"Timeout": {"Second-86400"}}, http.StatusOK, http.StatusCreated)
	if err != nil {
		t.Fatal(err)
	}
	_, token, _ := strings.Cut(string(text), "<D:locktoken><D:href>")
	token, _, _ = strings.Cut(token, "<")
	if _, err := ask(c, g, "PROPPATCH", "dav-0", []byte(`<propertyupdate xmlns="DAV:"><set><prop><x xmlns="urn:x">remembered</x></prop></set></propertyupdate>`),
		http.Header{"If": {"(<" + token + ">)"}}, http.StatusMultiStatus); err != nil {
		t.Fatal(err)
	}
	return token
}

func (p *pair) objects(t *testing.T, g api.Grant) *minio.Client {
	t.Helper()
	c, err := minio.New(strings.Trim(strings.TrimPrefix(g.S3, "https://"), "/"), &minio.Options{
		Creds: credentials.NewStaticV4(g.ID, g.Secret, ""), Secure: true, Region: "us-east-1", MaxRetries: 1,
		Transport: &http.Transport{DialContext: p.dial, TLSClientConfig: &tls.Config{RootCAs: p.roots, MinVersion: tls.VersionTLS12}, ResponseHeaderTimeout: 10 * time.Second},
	})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// tryS3 does what S3's clients do: what got no answer, or 503, is tried again.
func tryS3(do func(ctx context.Context) error) error {
	for end := time.Now().Add(3 * time.Minute); ; time.Sleep(20 * time.Millisecond) {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		err := do(ctx)
		cancel()
		if err == nil {
			return nil
		}
		var refused minio.ErrorResponse
		if errors.As(err, &refused) && refused.StatusCode != 0 && refused.StatusCode != http.StatusServiceUnavailable || time.Now().After(end) {
			return err
		}
	}
}
