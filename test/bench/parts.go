package main

import (
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"

	"github.com/cradlestack/cradlestack/driver-cradle/wire"
	"github.com/cradlestack/cradlestack/test/programs"
)

// interleave measures alternatives in turn, so that whatever else the machine does meets all of them.
func (b *bench) interleave(ctx context.Context, all ...func(context.Context) (time.Duration, error)) ([]time.Duration, error) {
	times := make([][]time.Duration, len(all))
	for round := range b.rounds {
		for i, one := range all {
			d, err := one(ctx)
			if err != nil {
				return nil, fmt.Errorf("round %d: %w", round+1, err)
			}
			times[i] = append(times[i], d)
		}
	}
	medians := make([]time.Duration, len(all))
	for i := range all {
		medians[i] = median(times[i])
	}
	return medians, nil
}

// start: echo in busybox, to its first byte.
func (b *bench) start(ctx context.Context) error {
	m, err := b.interleave(ctx,
		b.bare.echo,
		func(ctx context.Context) (time.Duration, error) { return b.echo(ctx, "template", "") },
		func(ctx context.Context) (time.Duration, error) { return b.echo(ctx, "cold", "") },
		b.dockerEcho)
	if err != nil {
		return err
	}
	bare, template, cold, dockerd := m[0], m[1], m[2], m[3]
	b.table.compare("`kcradle run` busybox `echo`, from a template", seconds(template), "bare cold boot "+seconds(bare), ratio(template, bare), 0.5, 0)
	b.table.compare("the same, cold", seconds(cold), "bare cold boot "+seconds(bare), ratio(cold, bare), 1.25, 0)
	b.table.compare("the same, from a template", seconds(template), "`docker run --rm` "+seconds(dockerd), ratio(template, dockerd), 0, 0)
	return nil
}

// image: a large image against a small one.
func (b *bench) image(ctx context.Context) error {
	small, err := b.sized(4 << 20)
	if err != nil {
		return err
	}
	large, err := b.sized(1 << 30)
	if err != nil {
		return err
	}
	m, err := b.interleave(ctx,
		func(ctx context.Context) (time.Duration, error) { return b.echo(ctx, "template", small) },
		func(ctx context.Context) (time.Duration, error) { return b.echo(ctx, "template", large) })
	if err != nil {
		return err
	}
	b.table.compare("image of 1 GiB", seconds(m[1]), "image of 4 MiB "+seconds(m[0]), ratio(m[1], m[0]), 1.15, 0)
	return nil
}

func busyboxImage() (v1.Image, error) {
	dir, err := programs.Image("busybox")
	if err != nil {
		return nil, err
	}
	return programs.OnlyImage(dir)
}

// sized is busybox with one more layer of that many random bytes.
func (b *bench) sized(size int64) (string, error) {
	dir := filepath.Join(b.cache, fmt.Sprintf("image-%d", size))
	if _, err := os.Stat(dir); err == nil {
		return dir, nil
	}
	base, err := busyboxImage()
	if err != nil {
		return "", err
	}
	if err := os.MkdirAll(b.cache, 0o755); err != nil {
		return "", err
	}
	work, err := os.MkdirTemp(b.cache, "making")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(work)
	if err := randomFile(filepath.Join(work, "blob"), size); err != nil {
		return "", err
	}
	tar := filepath.Join(work, "layer.tar")
	if out, err := exec.Command("tar", "-C", work, "--owner=0", "--group=0", "--numeric-owner", "--mtime=@0", "-cf", tar, "blob").CombinedOutput(); err != nil {
		return "", fmt.Errorf("tar: %w: %s", err, out)
	}
	layer, err := tarball.LayerFromFile(tar, tarball.WithCompressionLevel(gzip.NoCompression))
	if err != nil {
		return "", err
	}
	image, err := mutate.AppendLayers(base, layer)
	if err != nil {
		return "", err
	}
	path, err := layout.Write(filepath.Join(work, "oci"), empty.Index)
	if err != nil {
		return "", err
	}
	if err := path.AppendImage(image); err != nil {
		return "", err
	}
	return dir, os.Rename(filepath.Join(work, "oci"), dir)
}

func randomFile(path string, size int64) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	_, err = io.CopyN(f, rand.NewChaCha8([32]byte{}), size)
	return errors.Join(err, f.Close())
}

// resident starts a pod that stays, from a template.
func (b *bench) resident(ctx context.Context) (dir string, p *process, err error) {
	image, err := programs.Image("busybox")
	if err != nil {
		return "", nil, err
	}
	if dir, err = b.summon(ctx, alone, image, "template", "sh", "-c", "echo up; exec sleep 100000"); err != nil {
		return "", nil, err
	}
	p, err = firstByte(ctx, b.kcradle, "run", dir)
	return dir, p, err
}

// exec: docker exec of true, on both.
func (b *bench) exec(ctx context.Context) (err error) {
	dir, p, err := b.resident(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, p.stop(dir, b.kcradle)) }()
	if _, err := docker(ctx, b.daemon.Host, "run", "-d", "--name", "resident", "--network", "none", dockerBusybox, "sleep", "100000"); err != nil {
		return err
	}
	execTrue := func(host, name string) func(context.Context) (time.Duration, error) {
		return func(ctx context.Context) (time.Duration, error) {
			return docker(ctx, host, "exec", name, "true")
		}
	}
	m, err := b.interleave(ctx, execTrue("unix://"+filepath.Join(dir, "vdocker.sock"), "bench"), execTrue(b.daemon.Host, "resident"))
	if err != nil {
		return err
	}
	b.table.compare("`docker exec true`, through vdocker", seconds(m[0]), "dockerd "+seconds(m[1]), ratio(m[0], m[1]), 0, 0)
	return nil
}

const (
	copySize   = 256 << 20
	copyRounds = 5
)

// copy: docker cp of a large file each way against the control stream alone.
func (b *bench) copy(ctx context.Context) (err error) {
	raw, err := b.startRaw(ctx)
	if err != nil {
		return err
	}
	defer raw.close()
	dir, p, err := b.resident(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, p.stop(dir, b.kcradle)) }()
	host := "unix://" + filepath.Join(dir, "vdocker.sock")
	file := filepath.Join(b.dir, "blob")
	if err := randomFile(file, copySize); err != nil {
		return err
	}
	defer os.Remove(file)
	rounds := b.rounds
	b.rounds = min(rounds, copyRounds)
	defer func() { b.rounds = rounds }()
	m, err := b.interleave(ctx, raw.send,
		func(ctx context.Context) (time.Duration, error) {
			return docker(ctx, host, "cp", "-q", file, "bench:/blob")
		},
		raw.receive,
		func(ctx context.Context) (time.Duration, error) {
			return docker(ctx, host, "cp", "-q", "bench:/blob", filepath.Join(b.dir, "back"))
		})
	if err != nil {
		return err
	}
	if out, err := exec.Command("cmp", file, filepath.Join(b.dir, "back")).CombinedOutput(); err != nil {
		return fmt.Errorf("what came back differs: %s", out)
	}
	speed := func(d time.Duration) string { return fmt.Sprintf("%.0f MB/s", copySize/1e6/d.Seconds()) }
	b.table.compare("`docker cp` of 256 MiB into a pod", speed(m[1]), "raw control stream "+speed(m[0]), ratio(m[0], m[1]), 0, 0.6)
	b.table.compare("`docker cp` of 256 MiB out of a pod", speed(m[3]), "raw control stream "+speed(m[2]), ratio(m[2], m[3]), 0, 0.6)
	return nil
}

// A rawMachine answers only /sink and /source.
type rawMachine struct {
	cmd     *exec.Cmd
	session *wire.Session
	client  http.Client
}

// startRaw boots the bare machine with rawguest as its init, and its control port on a socket.
func (b *bench) startRaw(ctx context.Context) (*rawMachine, error) {
	dir := filepath.Join(b.dir, "raw")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	root, err := programs.Root()
	if err != nil {
		return nil, err
	}
	build := exec.CommandContext(ctx, "go", "build", "-trimpath", "-o", filepath.Join(dir, "init"), "./test/bench/rawguest")
	build.Dir, build.Env = root, append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("go build rawguest: %w: %s", err, out)
	}
	initramfs, err := pack(dir, filepath.Join(b.dir, "raw.cpio"))
	if err != nil {
		return nil, err
	}
	socket := filepath.Join(b.dir, "raw.sock")
	args := append([]string(nil), b.bare.args...)
	for i := range args {
		switch {
		case args[i] == "-initrd":
			args[i+1] = initramfs
		case args[i] == "null,id=control":
			args[i] = "socket,server=on,wait=off,id=control,path=" + socket
		}
	}
	m := &rawMachine{cmd: exec.CommandContext(ctx, b.bare.qemu, args...)}
	var console bytes.Buffer
	m.cmd.Stdout, m.cmd.Stderr = &console, &console
	if err := m.cmd.Start(); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, stepTimeout)
	defer cancel()
	for {
		conn, err := net.Dial("unix", socket)
		if err == nil {
			m.session, err = wire.Dial(ctx, conn, nil)
		}
		if err == nil {
			break
		}
		if ctx.Err() != nil {
			m.close()
			return nil, fmt.Errorf("raw machine: %w\n%s", err, &console)
		}
		time.Sleep(20 * time.Millisecond)
	}
	m.client.Transport = &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) { return m.session.Open(ctx) }, DisableCompression: true}
	return m, nil
}

func (m *rawMachine) close() {
	if m.session != nil {
		m.session.Close()
	}
	m.cmd.Process.Kill()
	m.cmd.Wait()
}

func (m *rawMachine) send(ctx context.Context) (time.Duration, error) {
	begin := time.Now()
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://guest/sink", io.LimitReader(zeros{}, copySize))
	if err != nil {
		return 0, err
	}
	answer, err := m.do(req)
	if want := strconv.Itoa(copySize) + " <nil>"; err == nil && answer != want {
		err = fmt.Errorf("the guest got %s bytes, not %s", answer, want)
	}
	return time.Since(begin), err
}

func (m *rawMachine) receive(ctx context.Context) (time.Duration, error) {
	begin := time.Now()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://guest/source?bytes="+strconv.Itoa(copySize), nil)
	if err != nil {
		return 0, err
	}
	_, err = m.do(req)
	return time.Since(begin), err
}

// do gives the beginning of the answer and reads all of it.
func (m *rawMachine) do(req *http.Request) (string, error) {
	resp, err := m.client.Do(req)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	var begin strings.Builder
	if _, err := io.CopyN(&begin, resp.Body, 64); err != nil && !errors.Is(err, io.EOF) {
		return "", err
	}
	_, err = io.Copy(io.Discard, resp.Body)
	return begin.String(), err
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }

// crowd: many pods at once.
func (b *bench) crowd(ctx context.Context, n int) (err error) {
	took, processes, err := b.together(ctx, alone, n)
	defer func() { err = errors.Join(err, b.stopAll(processes)) }()
	if err != nil {
		return err
	}
	var qemu, rest int64
	for _, p := range processes {
		q, r, err := memory(p.cmd.Process.Pid)
		if err != nil {
			return err
		}
		qemu, rest = qemu+q, rest+r
	}
	b.table.report(fmt.Sprintf("%d pods started at once, all have answered", n), seconds(took), "", "", false)
	b.table.report("proportional memory of each of them", mib(qemu/int64(n))+" QEMU", mib(rest/int64(n))+" kcradle", "", false)
	return nil
}

// together starts pods that stay, all at once, and returns when the last one has answered. stopAll ends them, also after an error.
func (b *bench) together(ctx context.Context, flags []string, n int) (took time.Duration, pods map[string]*process, err error) {
	image, err := programs.Image("busybox")
	if err != nil {
		return 0, nil, err
	}
	dirs := make([]string, n)
	for i := range dirs {
		if dirs[i], err = b.summon(ctx, flags, image, "template", "sh", "-c", "echo up; exec sleep 100000"); err != nil {
			return 0, nil, err
		}
	}
	processes, errs := make([]*process, n), make([]error, n)
	begin := time.Now()
	var all sync.WaitGroup
	for i := range n {
		all.Go(func() { processes[i], errs[i] = firstByte(ctx, b.kcradle, "run", dirs[i]) })
	}
	all.Wait()
	took = time.Since(begin)
	pods = map[string]*process{}
	for i, p := range processes {
		if p != nil {
			pods[dirs[i]] = p
		}
	}
	return took, pods, errors.Join(errs...)
}

func (b *bench) stopAll(pods map[string]*process) error {
	var errs []error
	for dir, p := range pods {
		errs = append(errs, p.stop(dir, b.kcradle))
	}
	return errors.Join(errs...)
}

// memory is what a pod takes: its QEMU, and the rest of its processes.
func memory(launcher int) (qemu, rest int64, err error) {
	pids, err := tree(launcher)
	if err != nil {
		return 0, 0, err
	}
	for _, pid := range pids {
		n, err := pss([]int{pid})
		if err != nil {
			return 0, 0, err
		}
		if isQEMU(pid) {
			qemu += n
		} else {
			rest += n
		}
	}
	return qemu, rest, nil
}

// idle: what a pod costs that does nothing.
func (b *bench) idle(ctx context.Context, watch time.Duration) (err error) {
	dir, p, err := b.resident(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, p.stop(dir, b.kcradle)) }()
	bare, err := b.bare.boot(ctx)
	if err != nil {
		return err
	}
	defer func() {
		bare.cmd.Process.Kill()
		bare.cmd.Wait()
	}()
	pod, err := tree(p.cmd.Process.Pid)
	if err != nil {
		return err
	}
	floor := []int{bare.cmd.Process.Pid}
	// Let both come to rest.
	if err := sleep(ctx, 3*time.Second); err != nil {
		return err
	}
	podBefore, err := cpu(pod)
	if err != nil {
		return err
	}
	floorBefore, err := cpu(floor)
	if err != nil {
		return err
	}
	if err := sleep(ctx, watch); err != nil {
		return err
	}
	podAfter, err := cpu(pod)
	if err != nil {
		return err
	}
	floorAfter, err := cpu(floor)
	if err != nil {
		return err
	}
	qemu, rest, err := memory(p.cmd.Process.Pid)
	if err != nil {
		return err
	}
	floorMemory, err := pss(floor)
	if err != nil {
		return err
	}
	share := func(d time.Duration) float64 { return 100 * d.Seconds() / watch.Seconds() }
	percent := func(d time.Duration) string { return fmt.Sprintf("%.2f %% of a core", share(d)) }
	b.table.report(fmt.Sprintf("an idle pod, processor over %s", watch), percent(podAfter-podBefore), "bare idle QEMU "+percent(floorAfter-floorBefore), "at most 0.5 %", share(podAfter-podBefore) > 0.5)
	b.table.report("an idle pod, proportional memory", fmt.Sprintf("%s QEMU, %s kcradle", mib(qemu), mib(rest)), "bare idle QEMU "+mib(floorMemory), "at most 30 MiB", qemu+rest > 30<<20)
	return nil
}

func sleep(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-time.After(d):
		return nil
	}
}
