package guest

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cradlestack/cradlestack/driver-cradle/wire"
	"github.com/cradlestack/cradlestack/spec"
)

// A Pod is what this guest runs. It is empty until the launch.
type Pod struct {
	log      *slog.Logger
	children *children
	uevents  *uevents
	bus      bus
	crew     *crew
	ending   StopOptions // of the pod's end; guarded by crew's mutex

	fill atomic.Pointer[wire.Filling] // of the launch

	launching sync.Mutex // one launch at a time, and one in all
	launchErr error      // what became of it

	mu         sync.Mutex // guards what follows
	launch     *wire.Launch
	containers []*Container
	volumes    map[string]*volume
	places     int // cgroups that containers have had

	joining sync.Mutex        // one container joins or leaves at a time
	layers  map[string]string // where they are mounted, by DiffID; of joining, once the pod is launched

	parked  chan *stage // at most one
	scratch string      // where the scratch disk is mounted
	ended   chan struct{}
	down    sync.Once
}

func newPod(log *slog.Logger, c *children, u *uevents) *Pod {
	return &Pod{
		log: log, children: c, uevents: u, crew: newCrew(), volumes: make(map[string]*volume), parked: make(chan *stage, 1), ended: make(chan struct{}),
	}
}

// Launch is what the pod was launched with, nil before that.
func (p *Pod) Launch() *wire.Launch {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.launch
}

// Containers in the Launch's order, none before that.
func (p *Pod) Containers() []*Container {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.containers
}

// Lookup finds a container by name, id, or the beginning of an id that is no other's.
func (p *Pod) Lookup(nameOrID string) (*Container, error) {
	name := strings.TrimPrefix(nameOrID, "/")
	var found []*Container
	for _, c := range p.Containers() {
		if c.spec.Name == name || c.spec.ID == name {
			return c, nil
		}
		if name != "" && strings.HasPrefix(c.spec.ID, name) {
			found = append(found, c)
		}
	}
	switch len(found) {
	case 1:
		return found[0], nil
	case 0:
		return nil, &stateError{ErrNotFound, "No such container: " + nameOrID}
	}
	return nil, &stateError{ErrInvalid, "Multiple IDs found with provided prefix: " + nameOrID}
}

// LookupExec finds an exec by its id.
func (p *Pod) LookupExec(id string) (*Exec, error) {
	for _, c := range p.Containers() {
		for _, e := range c.Execs() {
			if e.id == id {
				return e, nil
			}
		}
	}
	return nil, &stateError{ErrNotFound, "No such exec instance: " + id}
}

// Subscribe gives the events since a time (none for the zero time) and those that follow. A subscriber that falls far behind is cut
// off: the channel is closed.
func (p *Pod) Subscribe(since time.Time) (past []Event, live <-chan Event, cancel func()) {
	return p.bus.subscribe(since)
}

// start launches the pod: disks, network and volumes are there when it returns, containers start as their lifecycle says. The same
// launch again, by a host that did not get the answer, is no error.
func (p *Pod) start(ctx context.Context, l *wire.Launch) error {
	p.launching.Lock()
	defer p.launching.Unlock()
	if have := p.Launch(); have != nil {
		if have.Launch.ID == l.Launch.ID {
			return p.launchErr
		}
		return &stateError{ErrConflict, "this guest runs pod " + have.Launch.Name + " already"}
	}
	p.mu.Lock()
	p.launch = l
	p.mu.Unlock()
	if p.launchErr = p.prepare(ctx); p.launchErr != nil {
		return p.launchErr
	}
	p.crew.begin()
	go p.supervise()
	return nil
}

// prepare makes everything that the containers need.
func (p *Pod) prepare(ctx context.Context) error {
	l := p.launch
	if len(l.Launch.Containers) == 0 {
		return &stateError{ErrInvalid, "the launch has no containers"}
	}
	var wg sync.WaitGroup
	var netErr, scratchErr, layerErr error
	wg.Go(func() { netErr = p.setUpNetwork() })
	wg.Go(func() { scratchErr = p.mountScratch(ctx) })
	wg.Go(func() { p.layers, layerErr = p.mountLayers(ctx) })
	if err := limitPod(l.Launch.Resources); err != nil {
		return fmt.Errorf("limit the pod: %w", err)
	}
	wg.Wait()
	if err := errors.Join(netErr, scratchErr, layerErr); err != nil {
		return err
	}
	if err := p.mountVolumes(ctx); err != nil {
		return err
	}
	var containers []*Container
	for i := range l.Launch.Containers {
		c, err := p.newContainer(i, &l.Launch.Containers[i])
		if err != nil {
			return fmt.Errorf("container %s: %w", l.Launch.Containers[i].Name, err)
		}
		containers = append(containers, c)
		p.crew.units = append(p.crew.units, c.unit)
	}
	p.mu.Lock()
	p.containers, p.places = containers, len(containers)
	p.mu.Unlock()
	return nil
}

func (p *Pod) setUpNetwork() error {
	if err := os.MkdirAll("/etc", 0o755); err != nil {
		return err
	}
	// For the agent's own look-ups (NFS servers).
	if err := os.WriteFile("/etc/resolv.conf", []byte(resolvConf(p.launch.DNS)), 0o644); err != nil {
		return err
	}
	programs := sockAddrCases{}
	for _, i := range p.launch.Interfaces {
		if err := setUpInterface(i); err != nil {
			return err
		}
		if i.Namespace != nil {
			programs.add(namespaceCases(i.Namespace))
		}
	}
	if names := p.launch.Launch.Network.Names; names != "" {
		r, err := openResolver(filepath.Join(runDir, "volumes", names), p.launch.DNS.Servers)
		if err != nil {
			return err
		}
		go r.serve()
		programs.add(resolverCases(r.port))
	}
	return programs.attach()
}

func (p *Pod) mountScratch(ctx context.Context) error {
	lun, ok := p.disk(wire.DiskScratch)
	if !ok {
		return &stateError{ErrInvalid, "the host attached no scratch disk"}
	}
	dev, err := p.uevents.disk(ctx, wire.DiskScratch, lun)
	if err != nil {
		return err
	}
	at := filepath.Join(runDir, "scratch")
	if err := os.Mkdir(at, 0o700); err != nil {
		return err
	}
	if err := mount(dev, at, "ext4", unix.MS_NOATIME, "discard"); err != nil {
		return fmt.Errorf("scratch disk: %w", err)
	}
	p.scratch = at
	return nil
}

// mountLayers mounts every layer once and gives its place by DiffID.
func (p *Pod) mountLayers(ctx context.Context) (map[string]string, error) {
	at := make(map[string]string)
	var wg sync.WaitGroup
	var mu sync.Mutex
	var errs []error
	for _, d := range p.launch.Disks {
		diffID, ok := strings.CutPrefix(d.Key, wire.DiskLayer)
		if !ok {
			continue
		}
		dir := layerDir(d.LUN)
		at[diffID] = dir
		wg.Go(func() {
			if err := p.mountLayer(ctx, d, dir); err != nil {
				mu.Lock()
				defer mu.Unlock()
				errs = append(errs, err)
			}
		})
	}
	wg.Wait()
	return at, errors.Join(errs...)
}

func (p *Pod) mountLayer(ctx context.Context, d wire.Disk, dir string) error {
	dev, err := p.uevents.disk(ctx, d.Key, d.LUN)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	if err := mount(dev, dir, "ext4", unix.MS_RDONLY|unix.MS_NOATIME, ""); err != nil {
		return fmt.Errorf("%s: %w", d.Key, err)
	}
	return nil
}

// supervise ends the pod: when its end is decided, everything that still runs is stopped.
func (p *Pod) supervise() {
	<-p.crew.over
	p.crew.mu.Lock()
	ending := p.ending
	p.crew.mu.Unlock()
	var wg sync.WaitGroup
	for i, c := range p.Containers() {
		wg.Go(func() { _ = c.stop(context.Background(), ending.signal(i), ending.Grace, "") })
	}
	wg.Wait()
	<-p.crew.ended
	if p.scratch != "" {
		if err := syncFS(p.scratch); err != nil {
			p.log.Warn("sync scratch disk", "error", err)
		}
	}
	close(p.ended)
}

// Status of the pod now.
func (p *Pod) Status() wire.Status {
	s := wire.Status{State: wire.StateCreated, Containers: []wire.ContainerStatus{}, Filling: p.fill.Load()}
	containers := p.Containers()
	if containers != nil {
		s.State = wire.StateRunning
	}
	for _, c := range containers {
		s.Containers = append(s.Containers, c.status())
	}
	select {
	case <-p.ended:
		s.State = wire.StateExited
		p.crew.mu.Lock()
		s.ExitCode, s.Error = p.crew.code, p.crew.reason
		p.crew.mu.Unlock()
	default:
	}
	return s
}

// filling makes the status tell how far the filling of a volume has come; filled ends that.
func (p *Pod) filling(volume string, total int64) (copied func(int)) {
	f := wire.Filling{Volume: volume, Total: total}
	return func(n int) {
		f.Done += int64(n)
		now := f
		p.fill.Store(&now)
	}
}

func (p *Pod) filled() { p.fill.Store(nil) }

// Wait gives the status as soon as the pod has ended.
func (p *Pod) Wait(ctx context.Context) (wire.Status, error) {
	select {
	case <-p.ended:
		return p.Status(), nil
	case <-ctx.Done():
		return wire.Status{}, context.Cause(ctx)
	}
}

// StopOptions say how a pod is stopped.
type StopOptions struct {
	Grace  *time.Duration // of all containers; nil: each its own stop timeout
	Signal string         // to the first container; "": its own stop signal, as the others get theirs
}

// signal is the i-th container's.
func (o *StopOptions) signal(i int) string {
	if i == 0 {
		return o.Signal
	}
	return ""
}

// Stop ends the pod: all containers get their stop signals and, after the grace time, SIGKILL. Their logs can still be read afterwards.
func (p *Pod) Stop(ctx context.Context, o StopOptions) (wire.Status, error) {
	if p.Containers() == nil {
		return p.Status(), nil
	}
	for _, v := range p.allVolumes() {
		if _, err := v.thaw(); err != nil && !errors.Is(err, ErrInvalid) {
			p.log.Warn("thaw", "error", err)
		}
	}
	p.crew.mu.Lock()
	hurry := p.crew.stopping && o.Grace != nil
	if !p.crew.stopping {
		p.ending = o
	}
	p.crew.stop()
	p.crew.mu.Unlock()
	if hurry {
		for i, c := range p.Containers() {
			go func() { _ = c.stop(ctx, o.signal(i), o.Grace, "") }()
		}
	}
	return p.Wait(ctx)
}

// Shutdown stops the pod, then unmounts the volumes and writes everything to the disks. The guest is of no use after that.
func (p *Pod) Shutdown(ctx context.Context, o StopOptions) (wire.Status, error) {
	if p.Containers() == nil {
		unix.Sync()
		return p.Status(), nil
	}
	if s, err := p.Stop(ctx, o); err != nil {
		return s, err
	}
	var err error
	p.down.Do(func() { err = p.unmountAll() })
	return p.Status(), err
}

// unmountAll leaves every disk clean. A busy mount is made read-only, which writes it out as well.
func (p *Pod) unmountAll() error {
	var errs []error
	for _, c := range p.Containers() {
		c.io.Close()
		errs = append(errs, unmountBelow(c.rootfs))
	}
	for _, dir := range []string{"volumes", "share", "scratch"} {
		at := filepath.Join(runDir, dir)
		list, err := mountsBelow(at)
		errs = append(errs, err)
		for _, m := range list {
			if unix.Unmount(m, unix.UMOUNT_NOFOLLOW) == nil {
				continue
			}
			_ = unix.Mount("", m, "", unix.MS_REMOUNT|unix.MS_RDONLY, "")
			if err := unix.Unmount(m, unix.UMOUNT_NOFOLLOW|unix.MNT_DETACH); err != nil {
				errs = append(errs, &os.PathError{Op: "unmount", Path: m, Err: err})
			}
		}
	}
	unix.Sync()
	return errors.Join(errs...)
}

// Freeze makes a block volume's file system quiet and complete on its disk until Thaw, or for that time (0: without an end).
func (p *Pod) Freeze(volume string, timeout time.Duration) error {
	v, err := p.volume(volume)
	if err != nil {
		return err
	}
	return v.freeze(timeout)
}

// Thaw ends a Freeze.
func (p *Pod) Thaw(volume string) (wire.Thawed, error) {
	v, err := p.volume(volume)
	if err != nil {
		return wire.Thawed{}, err
	}
	was, err := v.thaw()
	return wire.Thawed{Frozen: was}, err
}

// Usage tells how full a volume is.
func (p *Pod) Usage(volume string) (spec.VolumeStats, error) {
	v, err := p.volume(volume)
	if err != nil {
		return spec.VolumeStats{}, err
	}
	return v.usage()
}

// Grow makes a block volume's file system as large as its disk has become.
func (p *Pod) Grow(volume string) error {
	v, err := p.volume(volume)
	if err != nil {
		return err
	}
	return v.grow()
}

func (p *Pod) volume(name string) (*volume, error) {
	if p.Containers() != nil {
		if v := p.volumeNamed(name); v != nil {
			return v, nil
		}
	}
	return nil, &stateError{ErrNotFound, "No such volume: " + name}
}

// volumeNamed is nil where there is none.
func (p *Pod) volumeNamed(name string) *volume {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.volumes[name]
}

func (p *Pod) allVolumes() []*volume {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Collect(maps.Values(p.volumes))
}

// Stats of the guest as a whole.
func (p *Pod) Stats() (wire.Stats, error) {
	var s wire.Stats
	data, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return s, err
	}
	for line := range strings.Lines(string(data)) {
		f := strings.Fields(line)
		if len(f) < 2 {
			continue
		}
		kib, _ := strconv.ParseUint(f[1], 10, 64)
		switch f[0] {
		case "MemTotal:":
			s.MemoryTotal = kib << 10
		case "MemAvailable:":
			s.MemoryAvailable = kib << 10
		}
	}
	s.MemoryUsed = cgroupValue(podCgroup, "memory.current", "")
	if cache := cgroupValue(podCgroup, "memory.stat", "inactive_file"); cache < s.MemoryUsed {
		s.MemoryUsed -= cache
	}
	s.CPU = cgroupValue(podCgroup, "cpu.stat", "usage_usec") * 1000
	return s, nil
}
