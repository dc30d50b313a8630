// Package filertest runs cradle-filer for tests, on an address of its own that this host and guests with its network reach, over volumes that cradle-csi makes.
// It uses the programs in bin/ as their users do, and imports nothing of the product. It needs root.
package filertest

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/cradlestack/cradlestack/internal/locked"
	"github.com/cradlestack/cradlestack/test/programs"
)

// A Filer runs until the test's end.
type Filer struct {
	Host string // its address
	Pool string // the directory that its volumes are in

	t       testing.TB
	dir     string
	flags   []string
	filer   string
	csi     string
	cmd     *exec.Cmd
	ended   chan struct{} // closed at the process's end, of which it had
	outcome error
	log     locked.Buffer
	volumes []string
}

// Ports are none that a filer of this host has, which may be at all addresses.
const (
	port       = "20490"
	webdavPort = "20491"
	s3Port     = "20492"
)

// A Publication is what cradle-filer publish says.
type Publication struct{ ID, Address, Export, Options string }

// Mount is the publication as an argument of kcradle's --mount, which is a line of CSV.
func (p Publication) Mount(target string) string {
	return fmt.Sprintf(`type=nfs,source=nfs://%s%s,target=%s,"options=%s"`, p.Address, p.Export, target, p.Options)
}

var filers atomic.Int32

// Start starts a filer, with flags besides its own. At the test's end its volumes are gone, and nothing of it may be left.
func Start(t testing.TB, flags ...string) *Filer {
	t.Helper()
	if os.Getuid() != 0 {
		t.Fatal("tests of the filer need root")
	}
	dir, err := os.MkdirTemp("", "filertest-") // for unix sockets, t.TempDir's paths are too long
	if err != nil {
		t.Fatal(err)
	}
	f := &Filer{t: t, dir: dir, Pool: filepath.Join(dir, "pool"), flags: flags}
	for name, path := range map[string]*string{"cradle-filer": &f.filer, "cradle-csi": &f.csi} {
		if *path, err = programs.Path(name); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(f.end)
	if err := f.address(); err != nil {
		t.Fatal(err)
	}
	if err := f.certify(); err != nil {
		t.Fatal(err)
	}
	f.Run()
	return f
}

// address gives this host one more address, which is nobody else's: other processes do the same. Its label says who has it.
func (f *Filer) address() error {
	if err := sweep(); err != nil {
		return err
	}
	pid, n := os.Getpid(), filers.Add(1)
	f.Host = fmt.Sprintf("10.%d.%d.%d", 192+pid>>14&63, pid>>6&255, pid<<2&252|int(n)&3)
	out, err := exec.Command("ip", "addr", "add", f.Host+"/32", "dev", "lo", "label", fmt.Sprintf("lo:f%d", pid)).CombinedOutput()
	if err != nil {
		return fmt.Errorf("ip addr add %s: %w: %s", f.Host, err, out)
	}
	return nil
}

// sweep removes the addresses of tests that were killed.
func sweep() error {
	out, err := exec.Command("ip", "-o", "addr", "show", "dev", "lo").Output()
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(out)) {
		fields := strings.Fields(line)
		for _, label := range fields {
			pid, err := strconv.Atoi(strings.TrimSuffix(strings.TrimPrefix(label, "lo:f"), `\`))
			if !strings.HasPrefix(label, "lo:f") || err != nil || syscall.Kill(pid, 0) == nil || len(fields) < 4 {
				continue
			}
			_ = exec.Command("ip", "addr", "del", fields[3], "dev", "lo").Run() // somebody else may be sweeping
		}
	}
	return nil
}

// CA is a PEM file with the certificate that the filer shows.
func (f *Filer) CA() string { return filepath.Join(f.dir, "tls.crt") }

func (f *Filer) key() string { return filepath.Join(f.dir, "tls.key") }

// certify makes a certificate for the filer's address.
func (f *Filer) certify() error {
	public, private, err := ed25519.GenerateKey(nil)
	if err != nil {
		return err
	}
	c := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "filertest"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, IPAddresses: []net.IP{net.ParseIP(f.Host)},
	}
	cert, err := x509.CreateCertificate(rand.Reader, c, c, public, private)
	if err != nil {
		return err
	}
	key, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		return err
	}
	return errors.Join(os.WriteFile(f.CA(), pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert}), 0o600),
		os.WriteFile(f.key(), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: key}), 0o600))
}

// Run starts the filer, at the same address as before, and returns when it answers.
func (f *Filer) Run() {
	f.t.Helper()
	f.cmd = exec.Command(f.filer, append([]string{
		"serve", "--socket", f.Socket(), "--pool", f.Pool, "--state", f.State(), "--listen", net.JoinHostPort(f.Host, port),
		"--webdav", net.JoinHostPort(f.Host, webdavPort), "--s3", net.JoinHostPort(f.Host, s3Port), "--tls-cert", f.CA(), "--tls-key", f.key(),
	}, f.flags...)...)
	f.cmd.Stdout, f.cmd.Stderr = &f.log, &f.log
	if err := f.cmd.Start(); err != nil {
		f.t.Fatal(err)
	}
	cmd, ended := f.cmd, make(chan struct{})
	f.ended = ended
	go func() {
		defer close(ended)
		f.outcome = cmd.Wait()
	}()
	ctx, cancel := context.WithTimeout(f.t.Context(), 5*time.Minute)
	defer cancel()
	for exec.CommandContext(ctx, f.filer, "status", "--socket", f.Socket()).Run() != nil {
		select {
		case <-ended:
			f.t.Fatalf("the filer has ended: %v", f.outcome) // its log is told at the test's end
		case <-ctx.Done():
			f.t.Fatal("the filer does not answer")
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// Signal ends the filer's process by a signal and waits for its end.
func (f *Filer) Signal(s os.Signal) {
	f.t.Helper()
	if err := f.cmd.Process.Signal(s); err != nil {
		f.t.Fatal(err)
	}
	<-f.ended
	if s == syscall.SIGTERM && f.outcome != nil {
		f.t.Errorf("the filer's end: %v\n%s", f.outcome, f.log.String())
	}
}

// PID is the filer's.
func (f *Filer) PID() int { return f.cmd.Process.Pid }

// Log is what it has said.
func (f *Filer) Log() string { return f.log.String() }

// State is its state directory.
func (f *Filer) State() string { return filepath.Join(f.dir, "state") }

// Socket is where root asks it.
func (f *Filer) Socket() string { return filepath.Join(f.dir, "run", "api.sock") }

// Volume makes a file volume, with a quota where size is not 0, and returns where this host has its files.
func (f *Filer) Volume(name string, size int64, parameters map[string]string) (path string) {
	f.t.Helper()
	if err := f.hostVolume("create", name, size, parameters); err != nil {
		f.t.Fatal(err)
	}
	f.volumes = append(f.volumes, name)
	return filepath.Join(f.dir, "mounts", name)
}

func (f *Filer) hostVolume(operation, name string, size int64, parameters map[string]string) error {
	text, err := json.Marshal(parameters)
	if err != nil {
		return err
	}
	cmd := exec.Command(f.csi, "host-volume", operation, "--pool", f.Pool)
	cmd.Env = append(os.Environ(), "DHV_VOLUME_ID="+name, "DHV_VOLUMES_DIR="+filepath.Join(f.dir, "mounts"),
		fmt.Sprintf("DHV_CAPACITY_MIN_BYTES=%d", size), "DHV_PARAMETERS="+string(text))
	if parameters == nil {
		cmd.Env[len(cmd.Env)-1] = "DHV_PARAMETERS={}"
	}
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("cradle-csi host-volume %s %s: %w\n%s", operation, name, err, out)
	}
	return nil
}

// Publish publishes a volume to this host and to guests with its network.
func (f *Filer) Publish(volume string, flags ...string) Publication {
	f.t.Helper()
	out, err := f.Command(append([]string{"publish", volume, "--client", f.Host, "-o", "json"}, flags...)...)
	var p Publication
	if err == nil {
		err = json.Unmarshal([]byte(out), &p)
	}
	if err != nil {
		f.t.Fatal(err)
	}
	return p
}

// A Grant is what cradle-filer grant says.
type Grant struct{ ID, Secret, WebDAV, S3 string }

// Grant lets somebody use a volume.
func (f *Filer) Grant(volume string, flags ...string) Grant {
	f.t.Helper()
	out, err := f.Command(append([]string{"grant", volume, "-o", "json"}, flags...)...)
	var g Grant
	if err == nil {
		err = json.Unmarshal([]byte(out), &g)
	}
	if err != nil {
		f.t.Fatal(err)
	}
	return g
}

// Command runs cradle-filer against the filer.
func (f *Filer) Command(args ...string) (string, error) {
	var stdout, stderr bytes.Buffer
	cmd := exec.Command(f.filer, append(args, "--socket", f.Socket())...)
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return "", fmt.Errorf("cradle-filer %s: %w: %s", args[0], err, &stderr)
	}
	return stdout.String(), nil
}

// Must is Command, for what has to succeed.
func (f *Filer) Must(args ...string) string {
	f.t.Helper()
	out, err := f.Command(args...)
	if err != nil {
		f.t.Fatal(err)
	}
	return out
}

// end removes all of it, and tells what would not go.
func (f *Filer) end() {
	if f.t.Failed() {
		f.t.Logf("the filer:\n%s", f.log.String())
	}
	if err := f.clear(); err != nil {
		f.t.Error(err)
	}
	if f.Host != "" {
		if out, err := exec.Command("ip", "addr", "del", f.Host+"/32", "dev", "lo").CombinedOutput(); err != nil {
			f.t.Errorf("ip addr del %s: %v: %s", f.Host, err, out)
		}
	}
}

func (f *Filer) runs() bool {
	if f.ended == nil {
		return false
	}
	select {
	case <-f.ended:
		return false
	default:
		return true
	}
}

func (f *Filer) clear() error {
	var errs []error
	if f.runs() {
		out, err := f.Command("publications", "-o", "json")
		var all []Publication
		if err == nil {
			err = json.Unmarshal([]byte(out), &all)
		}
		errs = append(errs, err)
		for _, p := range all {
			_, err := f.Command("unpublish", p.ID)
			errs = append(errs, err)
		}
		var grants []Grant
		if out, err = f.Command("grants", "-o", "json"); err == nil {
			err = json.Unmarshal([]byte(out), &grants)
		}
		errs = append(errs, err)
		for _, g := range grants {
			_, err := f.Command("revoke", g.ID)
			errs = append(errs, err)
		}
		f.cmd.Process.Signal(syscall.SIGTERM)
		<-f.ended
	}
	for _, name := range f.volumes {
		errs = append(errs, f.hostVolume("delete", name, 0, nil))
	}
	table, err := os.ReadFile("/proc/self/mountinfo")
	for line := range strings.Lines(string(table)) {
		if strings.Contains(line, f.dir) {
			errs = append(errs, fmt.Errorf("still mounted: %s", line))
		}
	}
	if err := errors.Join(append(errs, err)...); err != nil {
		return err
	}
	return os.RemoveAll(f.dir)
}
