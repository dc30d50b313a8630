// Package cephtest runs a real Ceph cluster for tests: one monitor, manager, object store (in memory) and metadata server, with the file system FS, in a network
// namespace of its own. This host reaches it, and so do guests whose network goes through this host. It needs root.
package cephtest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/cradlestack/cradlestack/internal/netnstest"
)

// FS is the cluster's file system.
const FS = "cephfs"

// A Cluster is running until Close.
type Cluster struct {
	Host string // its address
	Conf string // ceph.conf, which names the keyring of client.admin

	dir       string
	namespace *netnstest.Namespace
	daemons   map[string]*daemon
}

const packages = "apt-get install ceph-mon ceph-mgr ceph-osd ceph-mds ceph-fuse ceph-common"

// Lab starts a cluster for a test, which ends with it.
func Lab(t testing.TB) *Cluster {
	t.Helper()
	dir, err := os.MkdirTemp("", fmt.Sprintf("cephtest-%d-", os.Getpid())) // for unix sockets, t.TempDir's paths are too long
	if err != nil {
		t.Fatal(err)
	}
	c, err := Start(t.Context(), dir)
	if err != nil {
		t.Fatal(err)
	}
	if err := sweep(); err != nil { // their daemons went with their namespaces, as this one's was made
		t.Error(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Log(c.Log())
		}
		if err := c.Close(); err != nil {
			t.Error(err)
		}
		os.RemoveAll(dir)
	})
	return c
}

// sweep removes the directories of tests that were killed, and ends what has their file systems mounted.
func sweep() error {
	dirs, err := filepath.Glob(filepath.Join(os.TempDir(), "cephtest-*-*"))
	for _, dir := range dirs {
		var pid int
		if _, err := fmt.Sscanf(filepath.Base(dir), "cephtest-%d-", &pid); err != nil || syscall.Kill(pid, 0) == nil {
			continue
		}
		names, _ := filepath.Glob("/proc/[0-9]*/comm")
		for _, name := range names {
			if text, _ := os.ReadFile(name); string(text) != "ceph-fuse\n" {
				continue
			}
			args, _ := os.ReadFile(filepath.Join(filepath.Dir(name), "cmdline"))
			if pid, err := strconv.Atoi(filepath.Base(filepath.Dir(name))); err == nil && bytes.Contains(args, []byte("\x00"+dir+"/ceph.conf\x00")) {
				_ = syscall.Kill(pid, syscall.SIGKILL)
			}
		}
		err = errors.Join(err, os.RemoveAll(dir))
	}
	return err
}

// Start starts a cluster, and returns when its file system can be used. Its files are below dir.
func Start(ctx context.Context, dir string) (_ *Cluster, err error) {
	for _, program := range []string{"ceph", "ceph-mon", "ceph-mgr", "ceph-osd", "ceph-mds", "ceph-fuse", "ceph-authtool", "monmaptool"} {
		if _, err := exec.LookPath(program); err != nil {
			return nil, fmt.Errorf("no %s: %s", program, packages)
		}
	}
	namespace, err := netnstest.New("ceph")
	if err != nil {
		return nil, err
	}
	c := &Cluster{Host: namespace.Host, Conf: filepath.Join(dir, "ceph.conf"), dir: dir, namespace: namespace, daemons: map[string]*daemon{}}
	ctx, cancel := context.WithTimeout(ctx, 10*time.Minute)
	defer cancel()
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("ceph: %w\n%s", err, c.Log()), c.Close())
		}
	}()
	return c, c.start(ctx)
}

// A read lease outlasts a test: an object store of Ceph 16 that has stood still for longer than it, and is the only one of its placement groups, renews it, but what had
// been asked before it did so waits for ever ("active+clean+laggy").
const conf = `[global]
fsid = %[1]s
mon host = [v2:%[2]s:3300,v1:%[2]s:6789]
public addr = %[2]s
cluster addr = %[2]s
auth cluster required = cephx
auth service required = cephx
auth client required = cephx
auth allow insecure global id reclaim = false
keyring = %[3]s/keyring
run dir = %[3]s
pid file =
admin socket = %[3]s/$name.$pid.asok
log file = %[3]s/$name.log
osd pool default size = 1
osd pool default min size = 1
osd crush chooseleaf type = 0
osd pool default pg num = 8
osd pool default pgp num = 8
mon allow pool size one = true
mon allow pool delete = true
mon warn on pool no redundancy = false
mon data = %[3]s/mon
mon data avail crit = 0
mgr data = %[3]s/mgr
mgr initial modules = volumes
mgr disabled modules = dashboard restful cephadm
osd data = %[3]s/osd
osd objectstore = memstore
memstore device bytes = 4294967296
osd memory target = 939524096
osd scrub load threshold = 0.01
osd pool default read lease ratio = 1000
mds data = %[3]s/mds
[client]
admin socket =
log file =
`

func (c *Cluster) start(ctx context.Context) error {
	for _, d := range []string{"mon", "mgr", "osd", "mds"} {
		if err := os.MkdirAll(filepath.Join(c.dir, d), 0o700); err != nil {
			return err
		}
	}
	id, err := os.ReadFile("/proc/sys/kernel/random/uuid")
	if err != nil {
		return err
	}
	uuid := strings.TrimSpace(string(id))
	if err := os.WriteFile(c.Conf, fmt.Appendf(nil, conf, uuid, c.Host, c.dir), 0o600); err != nil {
		return err
	}
	keyring, monmap := filepath.Join(c.dir, "keyring"), filepath.Join(c.dir, "monmap")
	const all = "--gen-key|--cap|mon|allow *|--cap|osd|allow *|--cap|mds|allow *|--cap|mgr|allow *"
	for _, args := range []string{
		"ceph-authtool|-C|" + keyring + "|-n|mon.|--gen-key|--cap|mon|allow *",
		"ceph-authtool|" + keyring + "|-n|client.admin|" + all,
		"ceph-authtool|" + keyring + "|-n|mgr.x|" + all,
		"ceph-authtool|" + keyring + "|-n|osd.0|" + all,
		"ceph-authtool|" + keyring + "|-n|mds.a|" + all,
		fmt.Sprintf("monmaptool|--create|--fsid|%s|--addv|a|[v2:%[2]s:3300,v1:%[2]s:6789]|%s", uuid, c.Host, monmap),
		"ceph-mon|-c|" + c.Conf + "|-i|a|--mkfs|--monmap|" + monmap + "|--keyring|" + keyring,
	} {
		if err := c.run(ctx, strings.Split(args, "|")...); err != nil {
			return err
		}
	}
	if err := c.Daemon("ceph-mon", "a"); err != nil {
		return err
	}
	if err := c.Daemon("ceph-mgr", "x"); err != nil {
		return err
	}
	if _, err := c.Ceph(ctx, "osd", "new", uuid, "0"); err != nil {
		return err
	}
	if err := c.run(ctx, "ceph-osd", "-c", c.Conf, "-i", "0", "--mkfs", "--osd-uuid", uuid); err != nil {
		return err
	}
	if err := errors.Join(c.Daemon("ceph-osd", "0"), c.Daemon("ceph-mds", "a")); err != nil {
		return err
	}
	commands := "osd pool create meta 8\nosd pool create data 8\nfs new " + FS + " meta data\n"
	if out, err := c.command(ctx, strings.NewReader(commands)); err != nil {
		return fmt.Errorf("%w: %s", err, out)
	}
	for {
		out, err := c.command(ctx, strings.NewReader("mds stat\ndf detail\nfs subvolume ls "+FS+"\n"), "-f", "json")
		if err == nil && strings.Contains(out, "up:active") && strings.Contains(out, `"name":"data"`) {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("the file system is not there: %s, %w", out, err)
		case <-time.After(200 * time.Millisecond):
		}
	}
}

// Daemon starts one of the cluster's daemons, which does not run: ceph-mon a, ceph-mgr x, ceph-osd 0 or ceph-mds a. What a store in memory had is gone.
func (c *Cluster) Daemon(program, id string, options ...string) error {
	cmd := c.namespace.Command(context.Background(), append([]string{program, "-f", "-c", c.Conf, "-i", id}, options...)...)
	log, err := os.OpenFile(filepath.Join(c.dir, program+".out"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL} // with the thread that starts it
	started, ended := make(chan error), make(chan struct{})
	go func() {
		runtime.LockOSThread()
		defer close(ended)
		err := cmd.Start()
		started <- err
		if err == nil {
			_ = cmd.Wait()
		}
	}()
	if err := <-started; err != nil {
		return err
	}
	c.daemons[program] = &daemon{cmd.Process, ended}
	return nil
}

// MoveMonitor gives the monitor another address, as an operator does: one more is added there, ceph.conf names it, and the former one is removed.
func (c *Cluster) MoveMonitor(ctx context.Context) error {
	const id = "b"
	data, monmap := filepath.Join(c.dir, "mon-"+id), filepath.Join(c.dir, "monmap-"+id)
	if err := os.Mkdir(data, 0o700); err != nil {
		return err
	}
	if _, err := c.Ceph(ctx, "mon", "getmap", "-o", monmap); err != nil {
		return err
	}
	if err := c.run(ctx, "ceph-mon", "-c", c.Conf, "-i", id, "--mon-data", data, "--mkfs", "--monmap", monmap, "--keyring", filepath.Join(c.dir, "keyring")); err != nil {
		return err
	}
	former := c.daemons["ceph-mon"]
	address := fmt.Sprintf("[v2:%[1]s:3301,v1:%[1]s:6790]", c.Host)
	if err := c.Daemon("ceph-mon", id, "--mon-data", data, "--public-addrv", address); err != nil {
		return err
	}
	defer func() {
		_ = syscall.Kill(-former.Pid, syscall.SIGKILL)
		<-former.ended
	}()
	for {
		out, err := c.Ceph(ctx, "quorum_status", "-f", "json")
		if err == nil && strings.Contains(out, `"quorum_names":["a","b"]`) {
			break
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("the second monitor has not joined: %s, %w", out, err)
		case <-time.After(200 * time.Millisecond):
		}
	}
	text, err := os.ReadFile(c.Conf)
	if err != nil {
		return err
	}
	text = bytes.Replace(text, fmt.Appendf(nil, "[v2:%[1]s:3300,v1:%[1]s:6789]", c.Host), []byte(address), 1)
	if err := os.WriteFile(c.Conf, text, 0o600); err != nil {
		return err
	}
	_, err = c.Ceph(ctx, "mon", "rm", "a")
	return err
}

// A daemon is one that was started.
type daemon struct {
	*os.Process
	ended chan struct{}
}

// Kill kills a daemon.
func (c *Cluster) Kill(program string) {
	if d := c.daemons[program]; d != nil {
		_ = syscall.Kill(-d.Pid, syscall.SIGKILL)
		<-d.ended
		delete(c.daemons, program)
	}
}

// Signal sends one to a daemon: SIGSTOP makes it hang.
func (c *Cluster) Signal(program string, s syscall.Signal) error {
	return syscall.Kill(-c.daemons[program].Pid, s)
}

// Ceph runs a command of the program ceph as client.admin, and returns what it writes.
func (c *Cluster) Ceph(ctx context.Context, args ...string) (string, error) {
	out, err := c.command(ctx, nil, args...)
	if err != nil {
		err = fmt.Errorf("ceph %s: %w: %s", strings.Join(args, " "), err, out)
	}
	return out, err
}

// Plugin makes the client of a plugin that has a subvolume group, of the group's name, as an operator does: by examples/nomad/volumes/ceph-client.sh, whose path
// is script. It returns the file with its key.
func (c *Cluster) Plugin(ctx context.Context, script, group string) (keyring string, err error) {
	cmd := exec.CommandContext(ctx, "sh", script, FS, group, group)
	cmd.Env = append(os.Environ(), "CEPH_CONF="+c.Conf)
	var errs bytes.Buffer
	cmd.Stderr = &errs
	text, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("%s: %w: %s", script, err, errs.String())
	}
	keyring = filepath.Join(c.dir, group+".keyring")
	return keyring, os.WriteFile(keyring, text, 0o600)
}

// Namespace is the name of its network namespace.
func (c *Cluster) Namespace() string { return c.namespace.Name() }

func (c *Cluster) command(ctx context.Context, in io.Reader, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, "ceph", append([]string{"-c", c.Conf}, args...)...)
	cmd.Stdin = in
	var errs bytes.Buffer
	cmd.Stderr = &errs
	out, err := cmd.Output()
	if err != nil || bytes.Contains(errs.Bytes(), []byte("Error ")) {
		return errs.String(), errors.Join(err, errors.New("it failed"))
	}
	return string(out), nil
}

func (c *Cluster) run(ctx context.Context, args ...string) error {
	cmd := c.namespace.Command(ctx, args...)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w: %s", strings.Join(args, " "), err, out)
	}
	return nil
}

// Log is what the daemons have said last.
func (c *Cluster) Log() string {
	var b strings.Builder
	files, _ := filepath.Glob(filepath.Join(c.dir, "*.log"))
	outs, _ := filepath.Glob(filepath.Join(c.dir, "*.out"))
	for _, file := range append(files, outs...) {
		data, _ := os.ReadFile(file)
		fmt.Fprintf(&b, "%s:\n%s\n", filepath.Base(file), data[max(0, len(data)-4<<10):])
	}
	return b.String()
}

// Close ends the daemons and removes the namespace. Whoever has the file system mounted has to unmount it before.
func (c *Cluster) Close() error {
	for program := range c.daemons {
		c.Kill(program)
	}
	return c.namespace.Close()
}
