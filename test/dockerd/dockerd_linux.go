// Package dockerd starts a dockerd of its own, Debian's, to compare with: on its own folders and socket, without a bridge, in
// namespaces that end with it, so that it neither meets another dockerd of the machine nor leaves anything behind.
package dockerd

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"golang.org/x/sys/unix"

	"github.com/cradlestack/cradlestack/internal/cgroup"
	"github.com/cradlestack/cradlestack/test/programs"
)

// startTimeout bounds the wait for dockerd's first answer.
const startTimeout = 5 * time.Minute

// daemons counts those of this process.
var daemons atomic.Int64

// A Daemon is a running dockerd.
type Daemon struct {
	Host string // for docker -H and DOCKER_HOST

	dir    string
	cgroup string
	cmd    *exec.Cmd
	exited chan struct{} // closed when cmd has been waited for
}

// Start starts dockerd with everything of its in dir, which must be short: a socket's path has at most 107 bytes.
func Start(ctx context.Context, dir string) (*Daemon, error) { return start(ctx, dir) }

// start has unshare make more namespaces.
func start(ctx context.Context, dir string, more ...string) (*Daemon, error) {
	for _, tool := range []string{"dockerd", "containerd", "runc", "docker", "unshare"} {
		if _, err := exec.LookPath(tool); err != nil {
			return nil, fmt.Errorf("%w: apt-get install --no-install-recommends docker.io", err)
		}
	}
	d := &Daemon{
		Host:   "unix://" + filepath.Join(dir, "docker.sock"),
		dir:    dir,
		cgroup: fmt.Sprintf("cradle-test-%d-%d", os.Getpid(), daemons.Add(1)),
		exited: make(chan struct{}),
	}
	log, err := os.Create(filepath.Join(dir, "log"))
	if err != nil {
		return nil, err
	}
	defer log.Close()
	// The process namespace takes dockerd's containerd and every container down with it, the mount namespace their mounts.
	d.cmd = exec.Command("unshare", append(more, "--mount", "--pid", "--fork", "--kill-child", "--mount-proc",
		"sh", "-c", `ip link set lo up; exec "$@"`, "sh", // a new network's is down
		"dockerd", "--data-root", filepath.Join(dir, "root"), "--exec-root", filepath.Join(dir, "exec"), "--pidfile", filepath.Join(dir, "pid"),
		"--host", d.Host, "--bridge", "none", "--iptables=false", "--ip-masq=false", "--cgroup-parent", "/"+d.cgroup,
		"--storage-driver", "overlay2", "--log-level", "warn")...)
	d.cmd.Stdout, d.cmd.Stderr = log, log
	d.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	started := make(chan error)
	go func() {
		defer close(d.exited)
		// Pdeathsig comes when the thread ends that has started the process.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := d.cmd.Start()
		if started <- err; err == nil {
			d.cmd.Wait()
		}
	}()
	if err := <-started; err != nil {
		return nil, fmt.Errorf("start dockerd: %w", err)
	}
	if err := d.ready(ctx); err != nil {
		return nil, errors.Join(err, d.Close())
	}
	return d, nil
}

func (d *Daemon) ready(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	for {
		if err := exec.CommandContext(ctx, "docker", "-H", d.Host, "version").Run(); err == nil {
			return nil
		}
		select {
		case <-d.exited:
			return fmt.Errorf("dockerd ended: %s\n%s", d.cmd.ProcessState, d.log())
		case <-ctx.Done():
			return fmt.Errorf("dockerd does not answer: %w\n%s", context.Cause(ctx), d.log())
		case <-time.After(50 * time.Millisecond):
		}
	}
}

func (d *Daemon) log() string {
	text, _ := os.ReadFile(filepath.Join(d.dir, "log"))
	return string(text[max(0, len(text)-4096):])
}

// Load gives the daemon an image.
func (d *Daemon) Load(ctx context.Context, reference string, image v1.Image) error {
	return LoadInto(ctx, d.Host, d.dir, reference, image)
}

// LoadInto gives an image to whoever answers docker's API at host, by way of a directory.
func LoadInto(ctx context.Context, host, dir, reference string, image v1.Image) error {
	tag, err := name.NewTag(reference)
	if err != nil {
		return err
	}
	file := filepath.Join(dir, "load.tar")
	defer os.Remove(file)
	if err := tarball.WriteToFile(file, tag, image); err != nil {
		return fmt.Errorf("write %s: %w", reference, err)
	}
	if out, err := exec.CommandContext(ctx, "docker", "-H", host, "load", "-i", file).CombinedOutput(); err != nil {
		return fmt.Errorf("docker load %s: %w: %s", reference, err, bytes.TrimSpace(out))
	}
	return nil
}

// LoadLayout gives the daemon the only image of an OCI layout.
func (d *Daemon) LoadLayout(ctx context.Context, reference, dir string) error {
	image, err := programs.OnlyImage(dir)
	if err != nil {
		return err
	}
	return d.Load(ctx, reference, image)
}

// ForTest starts a daemon, with its files in dir, that ends with the test.
func ForTest(t *testing.T, dir string) *Daemon {
	t.Helper()
	return forTest(t, dir)
}

// ForNetworks is ForTest of a daemon whose containers can be on networks: it has the network's namespace to itself.
func ForNetworks(t *testing.T, dir string) *Daemon {
	t.Helper()
	return forTest(t, dir, "--net")
}

// Inside is a program that runs in the daemon's network.
func (d *Daemon) Inside(ctx context.Context, name string, args ...string) *exec.Cmd {
	return exec.CommandContext(ctx, "nsenter", append([]string{fmt.Sprintf("--net=/proc/%d/ns/net", d.cmd.Process.Pid), name}, args...)...)
}

// Mounts is a program that sees the daemon's mounts, as a program of the host does where the daemon is its.
func (d *Daemon) Mounts(ctx context.Context, name string, args ...string) *exec.Cmd {
	return exec.CommandContext(ctx, "nsenter", append([]string{fmt.Sprintf("--mount=/proc/%d/ns/mnt", d.cmd.Process.Pid), name}, args...)...)
}

func forTest(t *testing.T, dir string, more ...string) *Daemon {
	t.Helper()
	d, err := start(t.Context(), dir, more...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	})
	return d
}

// Close ends the daemon with all containers.
func (d *Daemon) Close() error {
	// The last process of the namespace to die is its init; unshare, which waits for it, dies after it.
	if err := unix.Kill(-d.cmd.Process.Pid, unix.SIGKILL); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("end dockerd: %w", err)
	}
	<-d.exited
	return removeCgroups(d.cgroup)
}

// removeCgroups removes what dockerd made in each hierarchy (v1) or the one (v2).
func removeCgroups(name string) error {
	var errs []error
	for _, pattern := range []string{"/sys/fs/cgroup/", "/sys/fs/cgroup/*/"} {
		tops, err := filepath.Glob(pattern + name)
		if err != nil {
			return err
		}
		for _, top := range tops {
			errs = append(errs, cgroup.RemoveTree(top))
		}
	}
	return errors.Join(errs...)
}
