package main

import (
	"bufio"
	"bytes"
	"context"
	_ "embed"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/cradlestack/cradlestack/test/programs"
)

// volumes: what the CSI plugin takes for snapshots, new volumes and long lists.
func (b *bench) volumes(ctx context.Context) error {
	if err := b.plugin(ctx); err != nil {
		return err
	}
	return b.zfs(ctx)
}

//go:embed diskguest/disk.c
var diskProgram string

const (
	diskSize    = 512 << 20
	diskRandom  = 10000 // requests of 4 KiB
	diskSteady  = 512   // requests of 1 MiB
	diskRounds  = 7
	diskTimeout = 10 * time.Minute
)

// guestDisk has one program measure one image: in a pod that attaches it as it does a direct block volume, and in the same QEMU with an init that starts it and passes its output on.
func (b *bench) guestDisk(ctx context.Context) error {
	dir := filepath.Join(b.dir, "disk")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	compile := exec.CommandContext(ctx, "gcc", "-static", "-O2", "-s", fmt.Sprintf("-DSIZE=%dLL", diskSize), fmt.Sprintf("-DRANDOM=%d", diskRandom), fmt.Sprintf("-DSEQUENTIAL=%d", diskSteady),
		"-x", "c", "-", "-o", filepath.Join(dir, "init"))
	compile.Stdin = strings.NewReader(diskProgram)
	if out, err := compile.CombinedOutput(); err != nil {
		return fmt.Errorf("gcc: %w: %s", err, out)
	}
	initramfs, err := pack(dir, filepath.Join(b.dir, "disk.cpio"))
	if err != nil {
		return err
	}
	image := filepath.Join(b.dir, "disk.img")
	if err := randomFile(image, diskSize); err != nil {
		return err
	}
	defer os.Remove(image)

	bare := func(device, kernelArgs string) func(context.Context) (map[string]time.Duration, error) {
		args := slices.Clone(b.bare.args)
		for i := range args {
			switch args[i] {
			case "-initrd":
				args[i+1] = initramfs
			case "-append":
				args[i+1] += kernelArgs
			}
		}
		args = append(args, "-drive", "if=none,id=measured,format=raw,file="+image, "-device", device+",drive=measured")
		return func(ctx context.Context) (map[string]time.Duration, error) {
			return diskTimes(ctx, true, b.bare.qemu, args...)
		}
	}
	pod := func(ctx context.Context) (map[string]time.Duration, error) {
		busybox, err := programs.Image("busybox")
		if err != nil {
			return nil, err
		}
		flags := append([]string{"--volume", dir + ":/measure:ro", "--mount", "type=block,raw,name=measured,source=" + image}, alone...)
		at, err := b.summon(ctx, flags, busybox, "template", "/measure/init", "/dev/volumes/measured")
		if err != nil {
			return nil, err
		}
		defer os.RemoveAll(at)
		return diskTimes(ctx, false, b.kcradle, "run", at)
	}
	const scsi = "scsi-hd,bus=scsi.0,scsi-id=0,lun=100"
	alternatives := []struct {
		name    string
		measure func(context.Context) (map[string]time.Duration, error)
	}{{"pod", pod}, {"virtio-scsi", bare(scsi, "")}, {"virtio-blk", bare("virtio-blk-device", "")}, {"virtio-scsi, alone", bare(scsi, " alone=1")}}
	all := make([]map[string][]time.Duration, len(alternatives))
	for round := range min(b.rounds, diskRounds) {
		for k := range alternatives {
			i := (round + k) % len(alternatives) // none has always the same one before it
			times, err := alternatives[i].measure(ctx)
			if err != nil {
				return fmt.Errorf("disk, round %d: %w", round+1, err)
			}
			if all[i] == nil {
				all[i] = map[string][]time.Duration{}
			}
			for name, d := range times {
				all[i][name] = append(all[i][name], d)
			}
			fmt.Fprintf(b.log, "bench: disk, round %d, %s: %v\n", round+1, alternatives[i].name, times)
		}
	}
	for _, row := range []struct {
		name, what, unit string
		amount           float64
	}{
		{"random-read", "4 KiB random reads", "/s", diskRandom},
		{"random-write", "4 KiB random writes", "/s", diskRandom},
		{"read", "1 MiB sequential reads", " MiB/s", diskSteady},
		{"write", "1 MiB sequential writes", " MiB/s", diskSteady},
	} {
		// What else the machine does only adds, and most to what is short.
		fastest := func(i int) time.Duration { return slices.Min(all[i][row.name]) }
		speed := func(i int) string { return fmt.Sprintf("%.0f%s", row.amount/fastest(i).Seconds(), row.unit) }
		b.table.compare("a guest's direct volume: "+row.what, speed(0), fmt.Sprintf("bare virtio-scsi disk %s, virtio-blk %s, virtio-scsi with one process alone %s", speed(1), speed(2), speed(3)),
			ratio(fastest(1), fastest(0)), 0, 0.95)
	}
	return nil
}

// diskTimes runs a machine, or a pod, until the program in it is done. Beside what that tells, cpu-NAME is the processor time of all processes for it.
func diskTimes(ctx context.Context, bare bool, program string, args ...string) (map[string]time.Duration, error) {
	ctx, cancel := context.WithTimeout(ctx, diskTimeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, program, args...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	cmd.WaitDelay = 5 * time.Second
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		return nil, err
	}
	times := map[string]time.Duration{}
	var said []string
	var last time.Duration
	done := false
	for lines := bufio.NewScanner(out); !done && lines.Scan(); {
		line := strings.TrimSpace(lines.Text())
		said = append(said, line)
		name, value, _ := strings.Cut(line, " ")
		if seconds, err := strconv.ParseFloat(value, 64); err == nil {
			times[name] = time.Duration(seconds * float64(time.Second))
		}
		if pids, err := tree(cmd.Process.Pid); err == nil {
			now, _ := cpu(pids)
			times["cpu-"+name], last = now-last, now
		}
		if done = name == "end"; name == "failed:" {
			break
		}
	}
	if bare || !done { // a bare machine does not end by itself
		cmd.Process.Kill()
	}
	_, _ = io.Copy(io.Discard, out)
	err = cmd.Wait()
	if !done || !bare && err != nil {
		return nil, fmt.Errorf("%s has not measured its disk: %w: %s\n%s", program, errors.Join(err, ctx.Err()), strings.Join(said, "; "), &stderr)
	}
	return times, nil
}

// A csiPlugin is cradle-csi on a pool of its own, an xfs of 200 GiB in a sparse file.
type csiPlugin struct {
	dir, pool  string
	cmd        *exec.Cmd
	stderr     bytes.Buffer
	conn       *grpc.ClientConn
	controller csi.ControllerClient
	node       csi.NodeClient
}

func (b *bench) startPlugin(ctx context.Context) (p *csiPlugin, err error) {
	p = &csiPlugin{dir: filepath.Join(b.dir, "csi"), pool: filepath.Join(b.dir, "csi/pool")}
	defer func() {
		if err != nil {
			err = errors.Join(err, p.close())
		}
	}()
	if err := os.MkdirAll(p.pool, 0o755); err != nil {
		return p, err
	}
	image := filepath.Join(p.dir, "xfs.img")
	if err := os.WriteFile(image, nil, 0o600); err != nil {
		return p, err
	}
	if err := os.Truncate(image, 200<<30); err != nil {
		return p, err
	}
	for _, args := range [][]string{{"mkfs.xfs", "-q", image}, {"mount", "-o", "loop", image, p.pool}} {
		if out, err := exec.CommandContext(ctx, args[0], args[1:]...).CombinedOutput(); err != nil {
			return p, fmt.Errorf("%s: %w: %s", strings.Join(args, " "), err, out)
		}
	}
	program, err := programs.Path("cradle-csi")
	if err != nil {
		return p, err
	}
	socket := filepath.Join(p.dir, "csi.sock")
	p.cmd = exec.Command(program, "monolith", "--pool", p.pool, "--endpoint", "unix://"+socket, "--node-id", "bench")
	p.cmd.Stderr = &p.stderr
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGTERM}
	if err := p.cmd.Start(); err != nil {
		p.cmd = nil
		return p, err
	}
	p.conn, err = grpc.NewClient("passthrough:///csi", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", socket)
		}))
	if err != nil {
		return p, err
	}
	p.controller, p.node = csi.NewControllerClient(p.conn), csi.NewNodeClient(p.conn)
	ctx, cancel := context.WithTimeout(ctx, stepTimeout)
	defer cancel()
	_, err = csi.NewIdentityClient(p.conn).Probe(ctx, &csi.ProbeRequest{}, grpc.WaitForReady(true))
	if err != nil {
		err = fmt.Errorf("cradle-csi: %w\n%s", err, &p.stderr)
	}
	return p, err
}

func (p *csiPlugin) close() error {
	var errs []error
	if p.conn != nil {
		errs = append(errs, p.conn.Close())
	}
	if p.cmd != nil {
		errs = append(errs, p.cmd.Process.Signal(syscall.SIGTERM))
		if err := p.cmd.Wait(); err != nil {
			errs = append(errs, fmt.Errorf("cradle-csi: %w\n%s", err, &p.stderr))
		}
	}
	if err := syscall.Unmount(p.pool, 0); err != nil && !errors.Is(err, syscall.EINVAL) && !errors.Is(err, syscall.ENOENT) {
		errs = append(errs, fmt.Errorf("unmount %s: %w", p.pool, err))
		return errors.Join(errs...) // nothing below it is removed
	}
	return errors.Join(append(errs, os.RemoveAll(p.dir))...)
}

func singleWriter() *csi.VolumeCapability {
	return &csi.VolumeCapability{
		AccessType: &csi.VolumeCapability_Mount{Mount: &csi.VolumeCapability_MountVolume{}},
		AccessMode: &csi.VolumeCapability_AccessMode{Mode: csi.VolumeCapability_AccessMode_SINGLE_NODE_WRITER},
	}
}

func (p *csiPlugin) create(ctx context.Context, name string, size int64, parameters map[string]string) error {
	_, err := p.controller.CreateVolume(ctx, &csi.CreateVolumeRequest{
		Name: name, CapacityRange: &csi.CapacityRange{RequiredBytes: size}, VolumeCapabilities: []*csi.VolumeCapability{singleWriter()}, Parameters: parameters,
	})
	return err
}

// pieces of 1 MiB are what both volumes have whose snapshots are compared, over their whole size.
const pieces = 512

func (p *csiPlugin) fill(name string, size int64) error {
	f, err := os.OpenFile(filepath.Join(p.pool, name, "image"), os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	piece := bytes.Repeat([]byte("data"), 1<<18)
	for i := range int64(pieces) {
		if _, err := f.WriteAt(piece, i*(size/pieces)); err != nil {
			return errors.Join(err, f.Close())
		}
	}
	return errors.Join(f.Sync(), f.Close())
}

// snapshot takes one and removes it, of which the first is timed.
func (p *csiPlugin) snapshot(ctx context.Context, name string) (time.Duration, error) {
	begin := time.Now()
	s, err := p.controller.CreateSnapshot(ctx, &csi.CreateSnapshotRequest{SourceVolumeId: name, Name: "bench"})
	took := time.Since(begin)
	if err == nil {
		_, err = p.controller.DeleteSnapshot(ctx, &csi.DeleteSnapshotRequest{SnapshotId: s.Snapshot.SnapshotId})
	}
	return took, err
}

// usable makes a block volume with a file system, to the first file in it, and removes it.
func (p *csiPlugin) usable(ctx context.Context) (time.Duration, error) {
	const name = "usable"
	staging, target := filepath.Join(p.dir, "staging"), filepath.Join(p.dir, "target")
	begin := time.Now()
	err := p.create(ctx, name, 1<<30, map[string]string{"class": "lv2"})
	if err == nil {
		_, err = p.node.NodeStageVolume(ctx, &csi.NodeStageVolumeRequest{VolumeId: name, StagingTargetPath: staging, VolumeCapability: singleWriter()})
	}
	if err == nil {
		_, err = p.node.NodePublishVolume(ctx, &csi.NodePublishVolumeRequest{VolumeId: name, StagingTargetPath: staging, TargetPath: target, VolumeCapability: singleWriter()})
	}
	if err == nil {
		err = os.WriteFile(filepath.Join(target, "file"), []byte("used"), 0o600)
	}
	took := time.Since(begin)
	_, e1 := p.node.NodeUnpublishVolume(ctx, &csi.NodeUnpublishVolumeRequest{VolumeId: name, TargetPath: target})
	_, e2 := p.node.NodeUnstageVolume(ctx, &csi.NodeUnstageVolumeRequest{VolumeId: name, StagingTargetPath: staging})
	_, e3 := p.controller.DeleteVolume(ctx, &csi.DeleteVolumeRequest{VolumeId: name})
	return took, errors.Join(err, e1, e2, e3)
}

// byHand is what a person does for the same.
func (p *csiPlugin) byHand(ctx context.Context) (time.Duration, error) {
	const script = `mkdir -p by-hand && truncate -s 1G image && mkfs.ext4 -q -F -m 0 -E nodiscard image && mount -o loop image by-hand && echo used >by-hand/file`
	begin := time.Now()
	cmd := exec.CommandContext(ctx, "sh", "-ec", script)
	cmd.Dir = p.pool
	out, err := cmd.CombinedOutput()
	took := time.Since(begin)
	if err != nil {
		err = fmt.Errorf("by hand: %w: %s", err, out)
	}
	unmount := syscall.Unmount(filepath.Join(p.pool, "by-hand"), 0)
	return took, errors.Join(err, unmount, os.Remove(filepath.Join(p.pool, "by-hand")), os.Remove(filepath.Join(p.pool, "image")))
}

const manyVolumes = 500

// plugin: cradle-csi's own work, by its socket as Nomad does.
func (b *bench) plugin(ctx context.Context) (err error) {
	p, err := b.startPlugin(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, p.close()) }()
	direct := map[string]string{"class": "lv2", "attach": "direct"}
	for name, size := range map[string]int64{"small": 1 << 30, "large": 100 << 30} {
		if err := errors.Join(p.create(ctx, name, size, direct), p.fill(name, size)); err != nil {
			return err
		}
	}
	m, err := b.interleave(ctx,
		func(ctx context.Context) (time.Duration, error) { return p.snapshot(ctx, "large") },
		func(ctx context.Context) (time.Duration, error) { return p.snapshot(ctx, "small") },
		p.usable, p.byHand)
	if err != nil {
		return err
	}
	b.table.compare("snapshot of a volume of 100 GiB that has 512 MiB of data, dir on xfs", seconds(m[0]), "of 1 GiB with as much "+seconds(m[1]), ratio(m[0], m[1]), 2, 0)
	b.table.compare("a new block volume, to the first file in it, dir on xfs", seconds(m[2]), "mkfs and mount by hand "+seconds(m[3]), ratio(m[2], m[3]), 0, 0)

	for i := range manyVolumes {
		if err := p.create(ctx, fmt.Sprintf("volume-%d", i), 1<<30, direct); err != nil {
			return err
		}
	}
	l, err := b.interleave(ctx, func(ctx context.Context) (time.Duration, error) {
		begin := time.Now()
		answer, err := p.controller.ListVolumes(ctx, &csi.ListVolumesRequest{})
		if n := len(answer.GetEntries()); err == nil && n != manyVolumes+2 {
			err = fmt.Errorf("%d volumes are listed; want %d", n, manyVolumes+2)
		}
		return time.Since(begin), err
	})
	if err != nil {
		return err
	}
	b.table.report(fmt.Sprintf("%d volumes listed, dir on xfs", manyVolumes), seconds(l[0]), "", "", false)
	return nil
}

// zfsFigure is what BenchmarkSnapshot of csi-plugin/zfs reports.
var zfsFigure = regexp.MustCompile(`([0-9.]+) s/(1GiB|100GiB)`)

// zfs has the backend's own benchmark run in the machine that has ZFS.
func (b *bench) zfs(ctx context.Context) error {
	root, err := programs.Root()
	if err != nil {
		return err
	}
	job := filepath.Join(b.dir, "zfs")
	if err := os.Mkdir(job, 0o755); err != nil {
		return err
	}
	script := fmt.Sprintf("set -e\nzpool create -f -O mountpoint=none tank /dev/vda1\n./zfs.test -test.run '^$' -test.bench '^BenchmarkSnapshot$' -test.benchtime %dx\n", b.rounds)
	if err := os.WriteFile(filepath.Join(job, "run.sh"), []byte(script), 0o755); err != nil {
		return err
	}
	lab := filepath.Join(root, "tools/zfs/lab.sh")
	var out []byte
	for _, args := range [][]string{
		{"go", "test", "-c", "-trimpath", "-tags", "zfslab", "-o", filepath.Join(job, "zfs.test"), "./csi-plugin/zfs"}, {lab, "build"}, {lab, "run", job},
	} {
		cmd := exec.CommandContext(ctx, args[0], args[1:]...)
		cmd.Dir, cmd.Env = root, append(os.Environ(), "CGO_ENABLED=0", "ZFSLAB_TIMEOUT=1800")
		if out, err = cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("%s: %w\n%s", strings.Join(args, " "), err, out)
		}
	}
	took := map[string]time.Duration{}
	for _, found := range zfsFigure.FindAllSubmatch(out, -1) {
		s, err := strconv.ParseFloat(string(found[1]), 64)
		if err != nil {
			return err
		}
		took[string(found[2])] = time.Duration(s * float64(time.Second))
	}
	if len(took) != 2 {
		return fmt.Errorf("the benchmark in the machine says\n%s", out)
	}
	b.table.compare("snapshot of a volume of 100 GiB that has 128 MiB of data, zfs in an emulated machine", seconds(took["100GiB"]), "of 1 GiB with as much "+seconds(took["1GiB"]),
		ratio(took["100GiB"], took["1GiB"]), 2, 0)
	return nil
}
