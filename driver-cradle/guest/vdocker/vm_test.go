//go:build vm

// These tests run the real docker CLI, and docker's Go client, against a pod in a real VM. They need root, QEMU, e2fsprogs, the docker
// CLI and the images that `make images` makes.
package vdocker_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/client"
	"github.com/rogpeppe/go-internal/testscript"

	"github.com/cradlestack/cradlestack/driver-cradle/boot"
	"github.com/cradlestack/cradlestack/driver-cradle/boot/boottest"
	"github.com/cradlestack/cradlestack/driver-cradle/image"
	"github.com/cradlestack/cradlestack/driver-cradle/vmm"
	"github.com/cradlestack/cradlestack/driver-cradle/wire"
	"github.com/cradlestack/cradlestack/spec"
)

// shared is what all tests use: a boot package with this agent, and one pod, started by the first test that needs it.
var shared struct {
	dir   string
	pkg   *boot.Package
	store *image.Store

	once sync.Once
	pod  *pod
	err  error
}

func TestMain(m *testing.M) {
	vmm.Confine()
	boottest.Main(m, "./testdata/agent", func(dir string, p *boot.Package) (err error) {
		if _, err := exec.LookPath("docker"); err != nil {
			return errors.New("no docker CLI: apt-get install docker-cli, or docker.io on Debian 12")
		}
		shared.dir, shared.pkg = dir, p
		shared.store, err = image.Open(filepath.Join(dir, "images"))
		return err
	}, func() error {
		if shared.pod == nil {
			return nil
		}
		return shared.pod.end()
	})
}

// pod is a pod in a VM, with the socket that docker's clients talk to.
type pod struct {
	*vmm.Machine
	socket string
	listen net.Listener
	conns  sync.WaitGroup
}

func startPod(l spec.Launch) (_ *pod, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	dir, err := os.MkdirTemp(shared.dir, "pod-")
	if err != nil {
		return nil, err
	}
	scratch := filepath.Join(dir, "scratch")
	if err := os.WriteFile(scratch, nil, 0o600); err != nil {
		return nil, err
	}
	if err := os.Truncate(scratch, 4<<30); err != nil {
		return nil, err
	}
	if out, err := exec.Command("mkfs.ext4", "-q", "-F", "-E", "assume_storage_prezeroed=1", scratch).CombinedOutput(); err != nil {
		return nil, fmt.Errorf("mkfs.ext4: %w (apt-get install e2fsprogs)\n%s", err, out)
	}
	w := wire.Launch{Launch: l}
	disks := []vmm.Disk{{Key: wire.DiskScratch, Path: scratch}}
	for i := range w.Launch.Containers {
		c := &w.Launch.Containers[i]
		img, err := pull(ctx, c.Image.Reference)
		if err != nil {
			return nil, err
		}
		c.Image.ID, c.Image.Labels = img.ID, img.Config.Config.Labels
		c.Env = append(slices.Clone(img.Config.Config.Env), c.Env...)
		for _, layer := range img.Layers {
			c.Layers = append(c.Layers, spec.Layer{DiffID: layer.DiffID})
			key := wire.DiskLayer + layer.DiffID
			if !slices.ContainsFunc(disks, func(d vmm.Disk) bool { return d.Key == key }) {
				disks = append(disks, vmm.Disk{Key: key, Path: layer.Path, ReadOnly: true})
			}
		}
	}
	for lun, d := range disks {
		w.Disks = append(w.Disks, wire.Disk{Key: d.Key, LUN: lun, ReadOnly: d.ReadOnly})
	}
	p := &pod{socket: filepath.Join(dir, "vdocker.sock")}
	p.Machine, err = vmm.Start(ctx, vmm.Config{
		Package: shared.pkg, Accel: vmm.TCG, Start: vmm.Cold, Memory: 512 << 20, CPUs: 1, Disks: disks,
		RunDir: filepath.Join(dir, "run"), CacheDir: filepath.Join(shared.dir, "cache"),
	})
	if err != nil {
		return nil, err
	}
	if err := p.launch(ctx, w); err != nil {
		return nil, errors.Join(err, p.Kill(), p.Machine.Close())
	}
	if p.listen, err = net.Listen("unix", p.socket); err != nil {
		return nil, errors.Join(err, p.Kill(), p.Machine.Close())
	}
	p.conns.Go(p.serve)
	return p, p.started(ctx)
}

// started waits until every container has been started.
func (p *pod) started(ctx context.Context) error {
	c, err := client.New(client.WithHost("unix://" + p.socket))
	if err != nil {
		return err
	}
	defer c.Close()
	for {
		list, err := c.ContainerList(ctx, client.ContainerListOptions{All: true})
		if err != nil {
			return err
		}
		if !slices.ContainsFunc(list.Items, func(s container.Summary) bool { return s.State == container.StateCreated }) {
			return nil
		}
		time.Sleep(50 * time.Millisecond)
	}
}

func pull(ctx context.Context, name string) (*image.Image, error) {
	cache, err := os.UserCacheDir()
	if err != nil {
		return nil, err
	}
	dir := filepath.Join(cache, "cradlestack", "images", name)
	if _, err := os.Stat(dir); err != nil {
		return nil, fmt.Errorf("no image %s: make images", name)
	}
	return shared.store.Pull(ctx, "oci:"+dir, image.PullOptions{})
}

func (p *pod) launch(ctx context.Context, l wire.Launch) error {
	data, err := json.Marshal(l)
	if err != nil {
		return err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://guest"+wire.PathLaunch, bytes.NewReader(data))
	if err != nil {
		return err
	}
	resp, err := p.Client().Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode >= 300 {
		err = fmt.Errorf("launch: %s", answer)
	}
	return err
}

// serve passes connections on to the guest, byte for byte.
func (p *pod) serve() {
	for {
		c, err := p.listen.Accept()
		if err != nil {
			return
		}
		p.conns.Go(func() {
			g, err := p.Open(context.Background())
			if err != nil {
				c.Close()
				return
			}
			wire.Proxy(c, g)
		})
	}
}

func (p *pod) end() error {
	err := p.listen.Close()
	err = errors.Join(err, p.Kill(), p.Machine.Close())
	p.conns.Wait()
	return err
}

// thePod gives the pod that tests share. Each test has containers of its own in it.
func thePod(t testing.TB) *pod {
	t.Helper()
	shared.once.Do(func() { shared.pod, shared.err = startPod(launch()) })
	if shared.err != nil {
		t.Fatal(shared.err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("console:\n%s", shared.pod.Console())
		}
	})
	return shared.pod
}

// launch is the shared pod: one container for each thing to be seen.
func launch() spec.Launch {
	l := spec.Launch{
		Version: spec.LaunchVersion, ID: strings.Repeat("0123456789abcdef", 4), Name: "pod", Hostname: "podhost",
		Network: spec.Network{Publish: []spec.Publish{{HostPort: 8080, Port: 80}}},
		Volumes: []spec.Volume{{Name: "data", Scratch: &spec.ScratchVolume{}}, {Name: "fixed", Scratch: &spec.ScratchVolume{}}},
	}
	add := func(name string, c spec.Container, command ...string) {
		c.Name, c.ID = name, fmt.Sprintf("%02x%062x", len(l.Containers)+0xa0, len(l.Containers))
		if c.Image.Reference == "" {
			c.Image.Reference = "busybox"
		}
		if c.Command = command; len(command) == 0 {
			c.Command = []string{"sleep", "1000000"}
		}
		l.Containers = append(l.Containers, c)
	}
	zero := spec.Duration(0)
	quick := spec.Settings{StopTimeout: &zero}
	script := func(s string) []string { return []string{"sh", "-c", s} }

	add("idle", spec.Container{Settings: quick, ExposedPorts: []string{"80/tcp"}})
	add("talk", spec.Container{Settings: quick}, script("for i in $(seq 1 50); do echo out $i; echo err $i >&2; done; printf unfinished; exec sleep 1000000")...)
	add("tick", spec.Container{Settings: quick}, script("i=0; while [ $i -lt 60 ]; do i=$((i+1)); echo tick $i; sleep 1; done")...)
	add("code", spec.Container{Settings: quick}, script("echo said; exit 3")...)
	add("brief", spec.Container{Settings: quick}, script("exit 3")...)
	add("cat", spec.Container{Settings: spec.Settings{StopTimeout: &zero, OpenStdin: true, StdinOnce: true}}, "cat")
	add("shell", spec.Container{Settings: spec.Settings{StopTimeout: &zero, OpenStdin: true, TTY: true}}, "sh")
	add("files", spec.Container{Settings: quick})
	add("more", spec.Container{Settings: quick})
	add("user", spec.Container{Settings: quick, User: "1234:567", WorkingDir: "/tmp"})
	add("readonly", spec.Container{Settings: spec.Settings{
		StopTimeout: &zero, ReadOnly: true, Tmpfs: map[string]string{"/run": ""},
		Mounts: []spec.Mount{{Volume: "data", Path: "/data"}, {Volume: "fixed", Path: "/fixed", ReadOnly: true}},
	}})
	signals := script("trap 'echo got usr1' USR1; trap 'echo got term; exit 7' TERM; echo ready; while :; do sleep 0.1; done")
	minute := spec.Duration(time.Minute)
	add("trap", spec.Container{Settings: spec.Settings{StopTimeout: &minute, Labels: map[string]string{"purpose": "signals"}}}, signals...)
	add("watched", spec.Container{}, signals...)
	add("limits", spec.Container{Settings: spec.Settings{StopTimeout: &zero, Resources: spec.Limits{Memory: 64 << 20, CPUs: 0.5, Pids: 50}}})
	add("limited", spec.Container{Settings: spec.Settings{
		StopTimeout: &zero, Resources: spec.Limits{Memory: 64 << 20, CPUs: 0.5, Pids: 50}, Ulimits: []spec.Ulimit{{Name: "nofile", Soft: 1000, Hard: 2000}},
	}})
	add("term", spec.Container{Settings: spec.Settings{StopTimeout: &zero, OpenStdin: true, TTY: true}}, "sh")
	add("health", spec.Container{Settings: quick, Healthcheck: &spec.Healthcheck{Test: []string{"CMD-SHELL", "echo fine"}, Interval: spec.Duration(time.Second)}})
	return l
}

// dockerClient is docker's own.
func dockerClient(t testing.TB, p *pod) *client.Client {
	t.Helper()
	c, err := client.New(client.WithHost("unix://" + p.socket))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// docker runs the CLI.
func docker(t testing.TB, p *pod, stdin io.Reader, args ...string) (stdout, stderr string, code int) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "docker", args...)
	cmd.Env = append(os.Environ(), "DOCKER_HOST=unix://"+p.socket, "DOCKER_CONFIG="+shared.dir)
	var out, errs strings.Builder
	cmd.Stdin, cmd.Stdout, cmd.Stderr = stdin, &out, &errs
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatalf("docker %s: %v", strings.Join(args, " "), err)
	}
	return out.String(), errs.String(), cmd.ProcessState.ExitCode()
}

// TestVMDockerCLI runs the scripts: each is a page of the manual of what the docker CLI does with a pod.
func TestVMDockerCLI(t *testing.T) {
	p := thePod(t)
	testscript.Run(t, testscript.Params{
		Dir: "testdata",
		Setup: func(e *testscript.Env) error {
			e.Setenv("DOCKER_HOST", "unix://"+p.socket)
			e.Setenv("DOCKER_CONFIG", e.WorkDir)
			return nil
		},
	})
}
