package pod

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/cradlestack/cradlestack/driver-cradle/boot"
	"github.com/cradlestack/cradlestack/driver-cradle/hostfile"
	"github.com/cradlestack/cradlestack/driver-cradle/image"
	"github.com/cradlestack/cradlestack/driver-cradle/network"
	"github.com/cradlestack/cradlestack/driver-cradle/vmm"
	"github.com/cradlestack/cradlestack/driver-cradle/wire"
	"github.com/cradlestack/cradlestack/spec"
)

// StartOptions say how to start a pod; what launch.json says counts where they are zero.
type StartOptions struct {
	CacheDir    string             // templates are in CacheDir/templates
	Boot        string             // boot package instead of the directory's
	Accel       string             // auto, kvm, tcg
	Start       string             // auto, template, cold
	Detached    bool               // the pod goes on when this process ends
	DiscardLogs bool               // do not bring the containers' logs home at the end
	Progress    func(wire.Filling) // told again and again while an image's content is copied into a volume; nil: nobody wants to know
	Hold        bool               // keep the machine after the pod's end until Running.Release
	Joining     *Joining           // nil: no container joins the pod while it runs

	Limits map[string]spec.IOLimits // of block volumes, by name, from the first access on

	Cgroup   string   // see vmm.Config
	Join     []string // see vmm.Config
	FirstUID int      // see vmm.Config

	// Claim is what Dir.Claim has returned, maybe in another process that this one has inherited it from. Start takes it over.
	Claim *os.File

	// Attach is a container whose streams are connected as part of the start, see Running.Attached: it saves a round trip before the first byte
	// of output. Stdin says whether its input is wanted too.
	Attach string
	Stdin  bool

	ConsoleSize [2]uint16 // rows and columns of the containers' terminals at their start; zero: nobody looks at them
}

// Claim makes the run that is to come the pod's present one: who asks for the pod's end from now on means that, and nobody else can start or
// remove the pod. It waits for a run that is about to end. The claim is a file for StartOptions.Claim, and ends when it is closed.
func (d *Dir) Claim(ctx context.Context) (*os.File, error) {
	lock, err := d.awaitLock(ctx)
	if err == nil {
		lock, err = signed(lock, rand.Text())
	}
	if err != nil {
		return nil, fmt.Errorf("start pod: %w", err)
	}
	return lock, nil
}

// Start starts the pod and returns when the guest has been told what to run. Where it fails, nothing is left running.
func (d *Dir) Start(ctx context.Context, o StartOptions) (_ *Running, err error) {
	begin := time.Now()
	lock := o.Claim
	if lock == nil {
		if lock, err = d.Claim(ctx); err != nil {
			return nil, err
		}
	} else if _, run := readLock(lock); run != "" {
		if lock, err = signed(lock, run); err != nil {
			return nil, fmt.Errorf("start pod: %w", err)
		}
	}
	defer func() {
		if err != nil {
			hostfile.Unlock(lock)
		}
	}()
	ctx, done := d.stoppable(ctx)
	defer done()
	if err := d.awaitDying(ctx); err != nil {
		return nil, fmt.Errorf("start pod: %w", err)
	}
	launch, err := d.Launch()
	if err != nil {
		return nil, err // tells file, line and column
	}
	if err := vmm.NeedRoot(); err != nil {
		return nil, fmt.Errorf("start pod: %w", err)
	}
	if err := d.tidy(); err != nil {
		return nil, fmt.Errorf("start pod: %w", err)
	}
	if err := remove(d.join(runDir, statusFile)); err != nil {
		return nil, fmt.Errorf("start pod: %w", err)
	}
	defer func() {
		if err != nil && d.wasKilled() {
			err = errors.Join(fmt.Errorf("start pod %s: %w", launch.Name, errStopped), d.reportStopped(launch, begin))
		}
	}()
	c := vmm.Config{
		Accel: or(o.Accel, launch.Boot.Accel), Start: or(o.Start, launch.Boot.Start),
		Memory: launch.Resources.Memory, CPUs: launch.Resources.CPUs,
		RunDir: d.join(runDir), CacheDir: o.CacheDir, Detached: o.Detached, Cgroup: o.Cgroup, Join: o.Join, FirstUID: o.FirstUID, Log: d.log,
	}
	if c.Package, err = boot.Open(or(o.Boot, d.join(BootLink))); err != nil {
		return nil, fmt.Errorf("start pod: %w", err)
	}
	w := wire.Launch{Launch: *launch, ConsoleSize: o.ConsoleSize}
	if err := d.storage(ctx, launch, &c, &w); err != nil {
		return nil, fmt.Errorf("start pod %s: %w", launch.Name, err)
	}
	if o.Detached {
		if err := os.WriteFile(d.join(runDir, detachedFile), nil, 0o600); err != nil {
			return nil, fmt.Errorf("start pod %s: %w", launch.Name, err)
		}
	}
	// From here on there is something that another process would have to put away.
	if err := writeJSON(d.join(runDir, launchedFile), launch); err != nil {
		return nil, fmt.Errorf("start pod %s: %w", launch.Name, err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, d.tidy())
		}
	}()
	if err := connect(ctx, launch, d.log, &c, &w); err != nil {
		return nil, fmt.Errorf("start pod %s: %w", launch.Name, err)
	}
	started := time.Now()
	d.log.Debug("pod is prepared", "pod", launch.Name, "took", started.Sub(begin).Round(time.Microsecond))
	m, err := vmm.Start(ctx, c)
	if c.Net.Tap != nil {
		c.Net.Tap.Close() // QEMU has its own
	}
	if err != nil {
		return nil, fmt.Errorf("start pod %s: %w", launch.Name, err)
	}
	answered := time.Now()
	for i, disk := range w.Disks {
		w.Disks[i].LUN, _ = m.LUN(disk.Key)
	}
	d.log.Debug("machine answers", "pod", launch.Name, "took", answered.Sub(started).Round(time.Microsecond), "start", m.Info().Start)
	w.Launch.Network.Publish = m.Info().Publish // with the ports that were left open: docker's clients ask the guest
	r := d.running(m, lock, launch, started, o.DiscardLogs)
	r.joining = o.Joining
	for volume, limits := range o.Limits {
		err = errors.Join(err, r.Throttle(ctx, volume, limits))
	}
	if err == nil {
		err = r.launch(ctx, &w, &o)
	}
	if err == nil && d.wasKilled() {
		err = errStopped
	}
	if err == nil {
		err = m.Keep()
	}
	if err == nil {
		err = r.listen()
	}
	if err != nil {
		r.stop(err)
		if r.attached != nil {
			r.attached.Close()
		}
		return nil, errors.Join(fmt.Errorf("start pod %s: %w", launch.Name, err), m.Kill(), m.Close())
	}
	d.log.Debug("guest has set the pod up", "pod", launch.Name, "took", time.Since(answered).Round(time.Microsecond))
	if o.Hold {
		r.holds.Add(1)
	}
	go r.watch()
	return r, nil
}

// reportStopped leaves the report of a run that was ended before it had begun.
func (d *Dir) reportStopped(launch *spec.Launch, begin time.Time) error {
	report := Report{Version: reportVersion, StartedAt: begin, EndedAt: time.Now(), Status: endedStatus(launch, exitKilled)}
	report.Status.Error = errStopped.Error()
	return writeJSON(d.join(runDir, statusFile), report)
}

func or(a, b string) string {
	if a != "" {
		return a
	}
	return b
}

// awaitDying fails while a machine lives that nobody attends to. One that was not detached only takes a moment to follow its attendant, and one whose
// start was not complete is ended.
func (d *Dir) awaitDying(ctx context.Context) error {
	if err := vmm.EndIncomplete(d.join(runDir)); err != nil {
		return err
	}
	for wait := time.Millisecond; ; wait *= 2 {
		alive, err := d.machineAlive()
		if err != nil || !alive {
			return err
		}
		if _, err := os.Stat(d.join(runDir, detachedFile)); err == nil || wait > 5*time.Second {
			return &RunningError{Dir: d.path}
		}
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// tidy removes what a run has left whose attendant and machine are gone: its logs stay until the next ones replace them.
func (d *Dir) tidy() error {
	run := d.join(runDir, launchedFile)
	data, err := hostfile.Read(run, spec.MaxDocument)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	var launch spec.Launch
	if err := json.Unmarshal(data, &launch); err != nil {
		return fmt.Errorf("%s: %w", run, err)
	}
	if launch.Network.Mode == "netns" {
		if err := network.Release(launch.Network.Netns); err != nil {
			return err
		}
	}
	return errors.Join(remove(d.join(SocketFile)), remove(d.join(runDir, detachedFile)), remove(d.join(runDir, fillingFile)), remove(d.join(runDir, joinedFile)), remove(run))
}

func remove(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// storage makes the list of disks and directories: the scratch disk, the layers, the block volumes.
func (d *Dir) storage(ctx context.Context, launch *spec.Launch, c *vmm.Config, w *wire.Launch) error {
	add := func(key, path string, readOnly bool) {
		w.Disks = append(w.Disks, wire.Disk{Key: key, ReadOnly: readOnly}) // where it is turns out when the machine is there
		internal := !strings.HasPrefix(key, wire.DiskVolume)
		c.Disks = append(c.Disks, vmm.Disk{Key: key, Path: path, ReadOnly: readOnly, Internal: internal})
	}
	scratch := d.join(scratchFile)
	if _, err := os.Stat(scratch); errors.Is(err, fs.ErrNotExist) {
		if err := makeScratch(ctx, scratch, launch.Scratch.Size); err != nil {
			return err
		}
	}
	add(wire.DiskScratch, scratch, false)

	seen := map[string]bool{}
	for _, container := range launch.Containers {
		for _, l := range container.Layers {
			if seen[l.DiffID] {
				continue
			}
			seen[l.DiffID] = true
			path := d.join(l.File)
			if err := image.CheckLayer(ctx, path, l.DiffID); err != nil {
				return fmt.Errorf("image %s: %w", container.Image.Reference, err)
			}
			add(wire.DiskLayer+l.DiffID, path, true)
		}
	}
	for i := range launch.Volumes {
		v := &launch.Volumes[i]
		switch {
		case v.Block != nil:
			path := v.Block.Path
			if !filepath.IsAbs(path) {
				path = d.join(path)
			}
			if err := prepareBlock(ctx, v, path, isMounted(launch, v.Name)); err != nil {
				return err
			}
			add(wire.DiskVolume+v.Name, path, v.Block.ReadOnly)
		case v.Directory != nil:
			if err := share(v, c, w); err != nil {
				return fmt.Errorf("volume %s: %w", v.Name, err)
			}
		case v.Ceph != nil && v.Ceph.SecretFile != "":
			c, err := withSecret(v.Ceph)
			if err != nil {
				return fmt.Errorf("volume %s: %w", v.Name, err)
			}
			w.Launch.Volumes = slices.Clone(w.Launch.Volumes) // launch is written to a file
			w.Launch.Volumes[i].Ceph = c
		}
	}
	return nil
}

// withSecret is what the guest is told of a volume whose key is in a file.
func withSecret(v *spec.CephVolume) (*spec.CephVolume, error) {
	f, err := os.Open(v.SecretFile)
	if err != nil {
		return nil, fmt.Errorf("its key: %w", err)
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, 1<<10))
	if err != nil {
		return nil, fmt.Errorf("its key: %w", err)
	}
	c := *v
	if c.Secret, c.SecretFile = strings.TrimSpace(string(text)), ""; c.Secret == "" || strings.ContainsAny(c.Secret, ", \t\n\x00") {
		return nil, fmt.Errorf("its key: %s holds none", v.SecretFile)
	}
	return &c, nil
}

// isMounted says whether a container sees the volume's file system, and not only its raw device.
func isMounted(launch *spec.Launch, volume string) bool {
	return slices.ContainsFunc(launch.Containers, func(c spec.Container) bool {
		return slices.ContainsFunc(c.Mounts, func(m spec.Mount) bool { return m.Volume == volume && !m.Raw })
	})
}

func share(v *spec.Volume, c *vmm.Config, w *wire.Launch) error {
	path := v.Directory.Path
	fi, err := os.Stat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%s does not exist: make the directory first", path)
	}
	if err != nil {
		return err
	}
	if !fi.IsDir() && !fi.Mode().IsRegular() {
		return fmt.Errorf("%s is neither a directory nor a file", path)
	}
	s := vmm.Share{Name: v.Name, Path: path, ReadOnly: v.Directory.ReadOnly}
	dir := wire.Directory{Volume: v.Name, Tag: wire.ShareTag, Type: "9p", Path: s.Name, File: !fi.IsDir()}
	if v.Directory.Transport == "virtiofs" || v.Directory.Transport == "" && c.Package.Manifest.Variant == boot.VariantStock { // it has no 9p
		dir.Tag, dir.Type = vmm.VirtiofsTag, "virtiofs"
		c.Virtiofs = append(c.Virtiofs, s)
	} else {
		c.Shares = append(c.Shares, s)
	}
	w.Directories = append(w.Directories, dir)
	return nil
}

// connect decides on the pod's network; tidy undoes it once the machine has ended.
func connect(ctx context.Context, launch *spec.Launch, log *slog.Logger, c *vmm.Config, w *wire.Launch) error {
	n := &launch.Network
	w.DNS = wire.DNS{Servers: n.DNS, Search: n.DNSSearch, Options: n.DNSOptions}
	if n.Mode != "none" && len(n.DNS) == 0 {
		host, err := network.HostDNS()
		if err != nil {
			return err
		}
		w.DNS.Servers = host.Servers
		if len(host.Servers) == 0 {
			log.Warn("the host's resolvers listen on its loopback only, where no guest gets: names will not be found; set network.dns")
		}
		if len(w.DNS.Search) == 0 {
			w.DNS.Search = host.Search
		}
		if len(w.DNS.Options) == 0 {
			w.DNS.Options = host.Options
		}
	}
	switch n.Mode {
	case "none":
		c.Net.Mode = vmm.NetNone
	case "netns":
		l, err := network.Take(ctx, n.Netns, n.MAC, n.Upstreams, n.OnLink)
		if err != nil {
			return err
		}
		if l.Unshared != nil {
			log.Warn("the network namespace's own processes are cut off: the guest has its addresses alone", "pod", launch.Name, "netns", n.Netns, "error", l.Unshared)
		}
		c.Net = vmm.Net{Mode: vmm.NetTap, Tap: l.Tap, MAC: l.Interface.MAC}
		w.Interfaces = []wire.Interface{l.Interface}
	default:
		i := userInterface(launch.ID)
		if n.MAC != "" {
			i.MAC = n.MAC
		}
		c.Net = vmm.Net{Mode: vmm.NetUser, Publish: n.Publish, MAC: i.MAC}
		w.Interfaces = []wire.Interface{i}
	}
	return nil
}

// userInterface is what QEMU's user network expects of its guest (qemu-options.hx, -netdev user); it has IPv4 alone. The MAC is the pod's own.
func userInterface(id string) wire.Interface {
	return wire.Interface{
		Name: "eth0", MAC: fmt.Sprintf("02:%s:%s:%s:%s:%s", id[0:2], id[2:4], id[4:6], id[6:8], id[8:10]), MTU: 1500,
		Addresses: []netip.Prefix{netip.MustParsePrefix("10.0.2.15/24")},
		Routes:    []wire.Route{{Destination: netip.MustParsePrefix("0.0.0.0/0"), Via: netip.MustParseAddr("10.0.2.2")}},
	}
}
