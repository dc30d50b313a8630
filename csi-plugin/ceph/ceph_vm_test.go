//go:build vm

package ceph

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cradlestack/cradlestack/csi-plugin/mount"
	"github.com/cradlestack/cradlestack/csi-plugin/volume"
	"github.com/cradlestack/cradlestack/csi-plugin/volume/volumetest"
	"github.com/cradlestack/cradlestack/internal/cephtest"
	"github.com/cradlestack/cradlestack/spec"
)

func TestMain(m *testing.M) { suite.Main(m) }

var (
	cluster *cephtest.Cluster
	groups  int
)

// lab is one cluster for the tests of a test with its subtests.
func lab(t *testing.T) *cephtest.Cluster {
	t.Helper()
	cluster = cephtest.Lab(t)
	return cluster
}

// fresh is a pool that is empty, on a host of its own: CONF|GROUP|DIRECTORY.
func fresh(t *testing.T) string {
	t.Helper()
	groups++
	dir := t.TempDir()
	if _, err := cluster.Plugin(t.Context(), "../../examples/nomad/volumes/ceph-client.sh", fmt.Sprint("group", groups)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		points, err := mount.Below(dir + "/")
		if err != nil || len(points) > 0 {
			t.Errorf("left mounted: %v, %v", points, err)
		}
		for _, p := range points {
			_ = mount.Detach(p)
		}
	})
	return fmt.Sprintf("%s|group%d|%s", cluster.Conf, groups, dir)
}

func open(storage string) (*Backend, error) {
	parts := strings.Split(storage, "|")
	p, err := ParsePool("default", cephtest.FS+"/"+parts[1])
	if err != nil {
		return nil, err
	}
	keyring := filepath.Join(filepath.Dir(parts[0]), parts[1]+".keyring")
	return Open([]Pool{p}, Config{Conf: parts[0], ID: parts[1], Keyring: keyring, Host: "host-" + filepath.Base(filepath.Dir(parts[2])), Dir: parts[2]})
}

var suite = volumetest.Suite{
	New:     fresh,
	Open:    func(storage string) (volume.Backend, error) { return open(storage) },
	Classes: []string{volume.GFS},
	Slow:    true,
	Rest: func(t *testing.T, storage string) []string {
		t.Helper()
		b, err := open(storage)
		if err != nil {
			t.Fatal(err)
		}
		var rest []string
		err = b.with(t.Context(), func(ctx context.Context, s *session) error {
			ids, err := s.ids(ctx, b.pools[0])
			if err != nil {
				return err
			}
			rest = append(rest, ids...)
			return err
		})
		if err == nil {
			var keys []string
			keys, err = keysOf(t, b.pools[0].Group)
			rest = append(rest, keys...)
		}
		if err != nil {
			t.Fatal(err)
		}
		for _, dir := range []string{"run", "mounts"} {
			entries, _ := os.ReadDir(filepath.Join(b.config.Dir, dir))
			for _, e := range entries {
				rest = append(rest, dir+"/"+e.Name())
			}
		}
		return rest
	},
}

// keysOf are the clients that were made for the volumes of a group, by the administrator's eyes.
func keysOf(t *testing.T, group string) (keys []string, err error) {
	t.Helper()
	text, err := cluster.Ceph(t.Context(), "auth", "ls", "-f", "json")
	if err != nil {
		return nil, err
	}
	var dump struct {
		All []struct {
			Entity string `json:"entity"`
		} `json:"auth_dump"`
	}
	err = json.Unmarshal([]byte(text), &dump)
	for _, one := range dump.All {
		if strings.HasPrefix(one.Entity, "client.cradle:"+cephtest.FS+":"+group+":") {
			keys = append(keys, one.Entity)
		}
	}
	return keys, err
}

// TestRootCeph runs on a real cluster what finds most; the whole suite is TestRootSoakCeph's.
func TestRootCeph(t *testing.T) {
	lab(t)
	t.Run("Suite", func(t *testing.T) { suite.Methods(t, "Create", "Delete") })
	t.Run("Isolated", testIsolated)
	t.Run("Hosts", func(t *testing.T) { testHosts(t, 40) })
	t.Run("Direct", testDirect)
	t.Run("Files", testFiles)
	t.Run("Bad", testBad)
}

// gfs is a request.
func gfs(name string) volume.Request {
	return volume.Request{Name: name, Size: 64 << 20, Parameters: volume.Parameters{Class: volume.GFS}}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// staged mounts a volume, and unmounts it when the test has ended.
func staged(t *testing.T, b *Backend, id string) string {
	t.Helper()
	source, err := b.Stage(t.Context(), id, volume.Use{As: volume.AsFiles})
	must(t, err)
	t.Cleanup(func() {
		if err := b.Unstage(context.WithoutCancel(t.Context()), id); err != nil {
			t.Error(err)
		}
	})
	return source.Directory
}

// A volume's key reads no file and no object of another one, a clone's none of its origin, and nothing of the cluster's.
func testIsolated(t *testing.T) {
	ctx := t.Context()
	b, err := open(fresh(t))
	must(t, err)
	for _, id := range []string{"mine", "foreign"} {
		_, err := b.Create(ctx, gfs(id))
		must(t, err)
		must(t, os.WriteFile(filepath.Join(staged(t, b, id), "file"), []byte("of "+id), 0o600))
	}
	clone := gfs("clone")
	clone.Origin.Volume = "foreign"
	_, err = b.Clone(ctx, clone, nil)
	must(t, err)
	staged(t, b, "clone")
	var foreign *found
	must(t, b.with(ctx, func(ctx context.Context, s *session) error {
		foreign, err = s.find(ctx, "foreign")
		return err
	}))
	rados := func(id string, args ...string) (string, error) {
		m := b.mounting(id)
		client := (&found{pool: b.pools[0], id: id}).clientsOf() + b.attachment("")
		ctx, cancel := context.WithTimeout(ctx, time.Minute)
		defer cancel()
		out, err := exec.CommandContext(ctx, args[0], append([]string{"-c", cluster.Conf, "-n", "client." + client, "-k", m.file("keyring")}, args[1:]...)...).CombinedOutput()
		return string(out), err
	}
	objects := []string{"rados", "-p", foreign.data, "-N", foreign.namespace, "ls"}
	if out, err := rados("foreign", objects...); err != nil || strings.TrimSpace(out) == "" {
		t.Fatalf("the volume's own key sees no objects, so that nothing is tested: %s, %v", out, err)
	}
	for _, id := range []string{"mine", "clone"} {
		if out, err := rados(id, objects...); err == nil {
			t.Errorf("the key of %s lists the objects of foreign: %s", id, out)
		}
		if out, err := rados(id, "ceph", "config-key", "ls"); err == nil {
			t.Errorf("the key of %s reads the cluster's secrets: %s", id, out)
		}
		if out, err := rados(id, "ceph", "auth", "ls"); err == nil {
			t.Errorf("the key of %s reads other keys: %s", id, out)
		}
		point := filepath.Join(t.TempDir(), "m")
		must(t, os.Mkdir(point, 0o700))
		if out, err := rados(id, "ceph-fuse", point, "-r", foreign.path, "--client_mount_timeout=10"); err == nil {
			t.Errorf("the key of %s mounts foreign: %s", id, out)
			_ = mount.Detach(point)
		}
	}
}

// What one host has written the other one reads, every time, and a lock that one has the other one does not get.
func testHosts(t *testing.T, rounds int) {
	ctx := t.Context()
	one, err := open(fresh(t))
	must(t, err)
	other := *one
	other.config.Host, other.config.Dir = "other", t.TempDir()
	_, err = one.Create(ctx, gfs("v"))
	must(t, err)
	dirs := []string{staged(t, one, "v"), staged(t, &other, "v")}
	if err := one.Delete(ctx, "v"); !errors.Is(err, volume.ErrInUse) {
		t.Errorf("delete a volume that two hosts have mounted: %v", err)
	}
	for i := range rounds {
		name, want := fmt.Sprint("file", i%3), fmt.Sprintf("%d%s", i, strings.Repeat("x", i%5000))
		must(t, os.WriteFile(filepath.Join(dirs[i%2], name), []byte(want), 0o600))
		got, err := os.ReadFile(filepath.Join(dirs[1-i%2], name))
		if err != nil || string(got) != want {
			t.Fatalf("round %d: read %.20q, %v; want %.20q", i, got, err, want)
		}
	}
	var files [2]*os.File
	for i, dir := range dirs {
		files[i], err = os.OpenFile(filepath.Join(dir, "lock"), os.O_RDWR|os.O_CREATE, 0o600)
		must(t, err)
		defer files[i].Close()
	}
	for range rounds / 10 {
		for i, f := range files {
			must(t, unix.Flock(int(f.Fd()), unix.LOCK_EX))
			if err := unix.Flock(int(files[1-i].Fd()), unix.LOCK_EX|unix.LOCK_NB); !errors.Is(err, unix.EWOULDBLOCK) {
				t.Fatalf("two hosts have one flock: %v", err)
			}
			must(t, unix.Flock(int(f.Fd()), unix.LOCK_UN))
			l := unix.Flock_t{Type: unix.F_WRLCK, Len: 10}
			must(t, unix.FcntlFlock(f.Fd(), unix.F_SETLK, &l))
			theirs := l
			if err := unix.FcntlFlock(files[1-i].Fd(), unix.F_SETLK, &theirs); !errors.Is(err, unix.EAGAIN) && !errors.Is(err, unix.EACCES) {
				t.Fatalf("two hosts have one fcntl lock: %v", err)
			}
			l.Type = unix.F_UNLCK
			must(t, unix.FcntlFlock(f.Fd(), unix.F_SETLK, &l))
		}
	}
}

// What a guest mounts is its own, and worthless once the volume is taken from it, also for a guest that still has it mounted.
func testDirect(t *testing.T) {
	ctx := t.Context()
	b, err := open(fresh(t))
	must(t, err)
	r := gfs("v")
	r.Direct = true
	_, err = b.Create(ctx, r)
	must(t, err)
	if _, err := b.Stage(ctx, "v", volume.Use{As: volume.AsFiles}); !errors.Is(err, volume.ErrInvalid) {
		t.Errorf("a host has a guest's volume: %v", err)
	}
	v, err := b.Attach(ctx, "v", "/alloc/1", false)
	must(t, err)
	again, err := b.Attach(ctx, "v", "/alloc/1", false)
	must(t, err)
	other, err := b.Attach(ctx, "v", "/alloc/2", true)
	must(t, err)
	if v.Ceph.Secret == "" || again.Ceph.Secret != v.Ceph.Secret || other.Ceph.Secret == v.Ceph.Secret || !other.Ceph.ReadOnly {
		t.Fatalf("attached %+v, again %+v, elsewhere %+v", v.Ceph, again.Ceph, other.Ceph)
	}
	guest := b.mounting("guest")
	must(t, guest.up(ctx, func() (*spec.CephVolume, error) { return v.Ceph, nil }))
	must(t, os.WriteFile(filepath.Join(guest.point(), "file"), []byte("x"), 0o600))
	if err := b.Delete(ctx, "v"); !errors.Is(err, volume.ErrInUse) {
		t.Errorf("delete a volume that a guest has mounted: %v", err)
	}
	must(t, b.Detach(ctx, "v", "/alloc/1"))
	must(t, b.Detach(ctx, "v", "/alloc/1"))
	f, err := os.OpenFile(filepath.Join(guest.point(), "file"), os.O_WRONLY, 0)
	if err == nil {
		_, err = f.Write([]byte("from who has it no more"))
		err = errors.Join(err, f.Sync(), f.Close())
	}
	if err == nil {
		t.Error("a guest writes to a volume that was taken from it")
	}
	must(t, syscall.Kill(fuseOf(t, guest.point()), syscall.SIGKILL))
	must(t, guest.down(ctx))
	must(t, b.Delete(ctx, "v")) // with the other key
	if rest := suite.Rest(t, fmt.Sprintf("%s|%s|%s", cluster.Conf, b.pools[0].Group, b.config.Dir)); len(rest) > 0 {
		t.Errorf("left: %q", rest)
	}
}

// Quotas hold and grow while the volume is mounted; a ceph-fuse that has died is found, and what it had mounted is mounted again where it was.
func testFiles(t *testing.T) {
	ctx := t.Context()
	b, err := open(fresh(t))
	must(t, err)
	r := gfs("v")
	r.Size = 8 << 20
	_, err = b.Create(ctx, r)
	must(t, err)
	dir := staged(t, b, "v")
	if stats, err := mount.Stats(dir); err != nil || stats.Total != 8<<20 {
		t.Errorf("a volume of 8 MiB has %v, %v", stats.Total, err)
	}
	fill := func(n int) error {
		f, err := os.OpenFile(filepath.Join(dir, "big"), os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
		must(t, err)
		_, err = f.Write(make([]byte, n))
		return errors.Join(err, f.Close())
	}
	if err := fill(40 << 20); !errors.Is(err, unix.EDQUOT) && !errors.Is(err, unix.ENOSPC) {
		t.Errorf("40 MiB on 8 MiB: %v", err)
	}
	if n, err := b.Expand(ctx, "v", 64<<20, 0); err != nil || n != 64<<20 {
		t.Errorf("expand: %d, %v", n, err)
	}
	must(t, fill(20<<20))
	as := func(caps, script string) error {
		cmd := exec.CommandContext(ctx, "setpriv", "--reuid", "4242", "--regid", "4242", "--clear-groups", "--inh-caps", caps, "--ambient-caps", caps, "sh", "-c", script)
		cmd.Dir = dir
		out, err := cmd.CombinedOutput()
		if err != nil {
			err = fmt.Errorf("%w: %s", err, out)
		}
		return err
	}
	must(t, os.WriteFile(filepath.Join(dir, "roots"), []byte("x"), 0o600))
	if err := as("+chown,+dac_override,+fowner,+fsetid", "echo y >>roots && echo x >made && chown 5:6 made && chmod 4711 made && mv made roots"); err != nil {
		t.Errorf("a pod's QEMU, which is not root: %v", err)
	}
	if err := as("-all", "echo y >>roots"); err == nil {
		t.Error("anybody writes to root's files")
	}
	if err := as("-all", "echo x >made"); err == nil {
		t.Error("anybody makes files in root's directory")
	}
	if _, err := b.Expand(ctx, "v", 1<<20, 2<<20); !errors.Is(err, volume.ErrRange) {
		t.Errorf("shrink: %v", err)
	}
	target := filepath.Join(t.TempDir(), "published")
	must(t, os.Mkdir(target, 0o700))
	must(t, mount.Bind(dir, target, mount.Options{}))
	defer func() { _ = mount.Detach(target) }()
	pid := fuseOf(t, dir)
	must(t, syscall.Kill(pid, syscall.SIGKILL))
	_, err = os.ReadDir(target)
	for begin := time.Now(); err == nil && time.Since(begin) < time.Minute; _, err = os.ReadDir(target) {
	}
	if !errors.Is(err, unix.ENOTCONN) && !errors.Is(err, unix.ECONNABORTED) {
		t.Fatalf("without its ceph-fuse: %v", err)
	}
	found := repaired(t, b, true)
	if len(found) != 1 || !strings.Contains(found[0], "volume v: its ceph-fuse has died") {
		t.Errorf("found %q", found)
	}
	repaired(t, b, false)
	must(t, b.with(ctx, func(ctx context.Context, s *session) error {
		f, err := s.volume(ctx, "v")
		must(t, err)
		if clients, err := s.clients(ctx, f, f.path); err != nil || len(clients) != 1 {
			t.Errorf("the one that has died still has a session, with its files and locks: %+v, %v", clients, err)
		}
		return nil
	}))
	for _, at := range []string{dir, target} {
		if fi, err := os.Stat(filepath.Join(at, "big")); err != nil || fi.Size() != 20<<20 {
			t.Errorf("%s: repaired: %v", at, err)
		}
	}
	if found := repaired(t, b, false); len(found) != 0 {
		t.Errorf("again: %q", found)
	}
	must(t, mount.Detach(target))
}

func repaired(t *testing.T, b *Backend, look bool) (found []string) {
	t.Helper()
	must(t, b.Repair(t.Context(), look, func(s string) { found = append(found, s) }))
	return found
}

// fuseOf finds the ceph-fuse that has mounted dir.
func fuseOf(t *testing.T, dir string) int {
	t.Helper()
	all, err := filepath.Glob("/proc/[0-9]*/cmdline")
	must(t, err)
	for _, path := range all {
		text, _ := os.ReadFile(path)
		if args := strings.Split(string(text), "\x00"); filepath.Base(args[0]) == "ceph-fuse" && slices.Contains(args, dir) {
			if strings.Contains(string(text), "key =") {
				t.Error("a key is in the arguments")
			}
			pid, err := strconv.Atoi(filepath.Base(filepath.Dir(path)))
			must(t, err)
			return pid
		}
	}
	t.Fatalf("no ceph-fuse has mounted %s", dir)
	return 0
}

// What can't be is refused in words, and a cluster that does not answer is unavailable.
func testBad(t *testing.T) {
	ctx := t.Context()
	b, err := open(fresh(t))
	must(t, err)
	for what, p := range map[string]volume.Parameters{
		"class nfs": {Class: volume.NFS}, "class lv2": {Class: volume.LV2}, "fs": {Class: volume.GFS, FS: "xfs"},
		"compression": {Class: volume.GFS, Compression: "lz4"}, "volblocksize": {Class: volume.GFS, BlockSize: 4096},
	} {
		if _, err := b.Create(ctx, volume.Request{Name: "v", Parameters: p}); !errors.Is(err, volume.ErrInvalid) {
			t.Errorf("%s: %v", what, err)
		}
	}
	none := *b
	none.pools = []Pool{{Name: "default", FS: "none", Group: "g"}}
	if _, err := none.Create(ctx, gfs("v")); !errors.Is(err, volume.ErrUnavailable) {
		t.Errorf("a file system that is not there: %v", err)
	}
	stranger := *b
	stranger.config.ID = "stranger"
	if err := stranger.Ready(ctx); !errors.Is(err, volume.ErrUnavailable) || strings.Contains(err.Error(), "Traceback") {
		t.Errorf("a client that is not there: %v", err)
	}
	must(t, cluster.Signal("ceph-mon", syscall.SIGSTOP))
	err = b.Ready(ctx)
	must(t, cluster.Signal("ceph-mon", syscall.SIGCONT))
	if !errors.Is(err, volume.ErrUnavailable) {
		t.Errorf("no monitor: %v", err)
	}
	must(t, b.Ready(ctx))
}
