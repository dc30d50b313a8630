//go:build vm

// These tests boot the project's kernel under QEMU with this agent in it, or the distribution's with CRADLE_TEST_VARIANT=stock. They
// need root, QEMU, e2fsprogs, xfsprogs, nfs-ganesha and the images that `make images` makes.
package guest_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/cradlestack/cradlestack/driver-cradle/boot"
	"github.com/cradlestack/cradlestack/driver-cradle/boot/boottest"
	"github.com/cradlestack/cradlestack/driver-cradle/guest"
	"github.com/cradlestack/cradlestack/driver-cradle/image"
	"github.com/cradlestack/cradlestack/driver-cradle/vmm"
	"github.com/cradlestack/cradlestack/driver-cradle/wire"
	"github.com/cradlestack/cradlestack/spec"
)

// shared is what all tests use: one boot package with this agent, one cache of images and templates.
var shared struct {
	dir   string
	pkg   *boot.Package
	store *image.Store
}

func TestMain(m *testing.M) {
	vmm.Confine()
	boottest.Main(m, "./testdata/agent", func(dir string, p *boot.Package) (err error) {
		shared.dir, shared.pkg = dir, p
		shared.store, err = image.Open(filepath.Join(dir, "images"))
		return err
	}, nil)
}

// pull gives a locally made image.
func pull(t testing.TB, name string) *image.Image {
	t.Helper()
	cache, err := os.UserCacheDir()
	if err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(cache, "cradlestack", "images", name)
	if _, err := os.Stat(dir); err != nil {
		t.Fatalf("no image %s: make images", name)
	}
	img, err := shared.store.Pull(t.Context(), "oci:"+dir, image.PullOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return img
}

// disk makes a sparse file with a file system of that kind, or a blank one for "".
func disk(t testing.TB, kind string, size int64) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(path, size); err != nil {
		t.Fatal(err)
	}
	args := map[string][]string{"ext4": {"-q", "-F", "-E", "assume_storage_prezeroed=1", path}, "xfs": {"-q", "-f", path}}[kind]
	if kind == "" {
		return path
	}
	if out, err := exec.Command("mkfs."+kind, args...).CombinedOutput(); err != nil {
		t.Fatalf("mkfs.%s: %v (apt-get install e2fsprogs xfsprogs)\n%s", kind, err, out)
	}
	return path
}

// A machine is a VM with a launched pod.
type machine struct {
	testing.TB
	*vmm.Machine
	launch wire.Launch
}

// A podSpec is what a test says of a pod; the rest is filled in.
type podSpec struct {
	spec.Launch
	image  string // of containers that name none; default busybox
	disks  []vmm.Disk
	shares []vmm.Share
	virtio []vmm.Share // by virtiofs
	net    vmm.Net
	ifs    []wire.Interface
	dirs   []wire.Directory
	dns    wire.DNS
	start  string
}

// patience is how long a test waits for what has to come, on a machine that may be busy with much else.
const patience = 5 * time.Minute

// boots launches a pod in a fresh VM and fails the test if the launch does not succeed.
func boots(t testing.TB, p podSpec) *machine {
	t.Helper()
	m, err := tryBoot(t, p)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func tryBoot(t testing.TB, p podSpec) (*machine, error) {
	t.Helper()
	l := wire.Launch{Launch: p.Launch, Interfaces: p.ifs, Directories: p.dirs, DNS: p.dns}
	l.Launch.Version = spec.LaunchVersion
	if l.Launch.ID == "" {
		l.Launch.ID = strings.Repeat("0123456789abcdef", 4)
	}
	if l.Launch.Hostname == "" {
		l.Launch.Hostname = l.Launch.ID[:12]
	}
	disks := append([]vmm.Disk{{Key: wire.DiskScratch, Path: disk(t, "ext4", 1<<30)}}, p.disks...)
	if len(p.disks) > 0 && p.disks[0].Key == wire.DiskScratch {
		disks = p.disks
	}
	have := map[string]bool{}
	for i := range l.Launch.Containers {
		c := &l.Launch.Containers[i]
		if c.ID == "" {
			c.ID = fmt.Sprintf("%02d%s", i, strings.Repeat("c0ffee", 11)[:62])
		}
		if c.Name == "" {
			c.Name = fmt.Sprintf("c%d", i)
		}
		if c.Layers != nil { // below the image's
			for _, l := range c.Layers {
				have[l.DiffID] = true
			}
		}
		name := c.Image.Reference
		if name == "" {
			name = p.image
		}
		if name == "" {
			name = "busybox"
		}
		img := pull(t, name)
		c.Image.Reference, c.Image.ID = img.Reference, img.ID
		if c.Entrypoint == nil && c.Command == nil {
			c.Entrypoint, c.Command = img.Config.Config.Entrypoint, img.Config.Config.Cmd
		}
		c.Env = append(append([]string{}, img.Config.Config.Env...), c.Env...)
		for _, layer := range img.Layers {
			c.Layers = append(c.Layers, spec.Layer{DiffID: layer.DiffID})
			if !have[layer.DiffID] {
				have[layer.DiffID] = true
				disks = append(disks, vmm.Disk{Key: wire.DiskLayer + layer.DiffID, Path: layer.Path, ReadOnly: true})
			}
		}
	}
	for lun, d := range disks {
		l.Disks = append(l.Disks, wire.Disk{Key: d.Key, LUN: lun, ReadOnly: d.ReadOnly})
	}
	if p.start == "" {
		p.start = vmm.Auto
	}
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	run := filepath.Join(t.TempDir(), "run")
	vm, err := vmm.Start(ctx, vmm.Config{
		Package: shared.pkg, Accel: vmm.TCG, Start: p.start, Memory: max(p.Resources.Memory, 128<<20), CPUs: max(p.Resources.CPUs, 1), Disks: disks,
		Shares: p.shares, Virtiofs: p.virtio, Net: p.net, RunDir: run, CacheDir: filepath.Join(shared.dir, "cache"),
	})
	if err != nil {
		t.Fatal(err)
	}
	m := &machine{t, vm, l}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("console:\n%s", vm.Console())
		}
		if err := errors.Join(vm.Kill(), vm.Close()); err != nil {
			t.Error(err)
		}
	})
	var s wire.Status
	return m, m.call("POST", wire.PathLaunch, l, &s)
}

// call makes a control call.
func (m *machine) call(method, path string, body, reply any) error {
	ctx, cancel := context.WithTimeout(m.Context(), patience)
	defer cancel()
	var in io.Reader
	if body != nil {
		data, err := json.Marshal(body)
		if err != nil {
			return err
		}
		in = bytes.NewReader(data)
	}
	req, err := http.NewRequestWithContext(ctx, method, "http://guest"+path, in)
	if err != nil {
		return err
	}
	resp, err := m.Client().Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(resp.Body)
	if err != nil {
		return err
	}
	if resp.StatusCode >= 300 {
		var e struct{ Message string }
		if json.Unmarshal(data, &e) != nil || e.Message == "" {
			return fmt.Errorf("%s %s: %s: %s", method, path, resp.Status, data)
		}
		return errors.New(e.Message)
	}
	if reply == nil {
		return nil
	}
	return json.Unmarshal(data, reply)
}

// ends waits for the pod's end.
func (m *machine) ends() wire.Status {
	m.Helper()
	var s wire.Status
	if err := m.call("GET", wire.PathWait, nil, &s); err != nil {
		m.Fatal(err)
	}
	return s
}

// logs gives what a container printed.
func (m *machine) logs(name string) (stdout, stderr string) {
	m.Helper()
	var out [2]string
	if err := m.call("GET", "/logs?c="+name, nil, &out); err != nil {
		m.Fatal(err)
	}
	return out[0], out[1]
}

// do has the test agent do something with a container.
func (m *machine) do(name, op string, more ...string) error {
	form := url.Values{"c": {name}, "op": {op}}
	for i := 0; i+1 < len(more); i += 2 {
		form.Set(more[i], more[i+1])
	}
	return m.call("POST", "/do?"+form.Encode(), nil, nil)
}

func (m *machine) state(name string) guest.State {
	m.Helper()
	var s guest.State
	if err := m.call("GET", "/state?c="+name, nil, &s); err != nil {
		m.Fatal(err)
	}
	return s
}

// An execution is what became of an exec.
type execution struct {
	Code                  int
	Stdout, Stderr, Error string
	Started, Took         string
}

func (m *machine) exec(name string, cfg guest.ExecConfig, stdin string) execution {
	m.Helper()
	data, err := json.Marshal(cfg)
	if err != nil {
		m.Fatal(err)
	}
	var e execution
	if err := m.call("POST", "/exec?"+url.Values{"c": {name}, "config": {string(data)}, "stdin": {stdin}}.Encode(), nil, &e); err != nil {
		m.Fatal(err)
	}
	return e
}

// sh is a container that runs a shell line.
func sh(name, line string) spec.Container {
	return spec.Container{Name: name, Command: []string{"sh", "-c", line}}
}

// prints waits until a container has printed a line.
func (m *machine) prints(name, line string) {
	m.Helper()
	for end := time.Now().Add(patience); ; time.Sleep(20 * time.Millisecond) {
		stdout, stderr := m.logs(name)
		if strings.Contains(stdout, line) {
			return
		}
		if time.Now().After(end) {
			m.Fatalf("container %s did not print %q: %q, %q, %+v", name, line, stdout, stderr, m.state(name))
		}
	}
}

func guestExec(args ...string) guest.ExecConfig { return guest.ExecConfig{Args: args} }
