package vmm

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cradlestack/cradlestack/driver-cradle/hostfile"
	"github.com/cradlestack/cradlestack/spec"
)

// Files of a template.
const (
	ramFile     = "ram"          // sparse
	vmState     = "state"        // of the devices, as QEMU migrates it
	keyFile     = "key.json"     // a TemplateInfo; its modification time is that of the last use
	checkedFile = "checked.json" // the identity of the ram file whose digest was right
	brokenExt   = ".broken"      // a failure of the template with this key
)

// A failure is why a template did not restore. Its file's modification time says when.
type failure struct {
	Why   string `json:"why"`
	Times int    `json:"times"` // in a row
}

const (
	firstPause = time.Minute
	maxPause   = time.Hour
)

// pause is how long the template is not made again: a minute, twice that after the next failure, an hour at most.
func (f failure) pause() time.Duration {
	pause := firstPause
	for range min(f.Times-1, 6) {
		pause *= 2
	}
	return min(pause, maxPause)
}

const maxState = 64 << 20

// A Key is everything that a template depends on: a machine may be restored only into an equal one.
type Key struct {
	Package string     `json:"package"` // digest of the boot package
	QEMU    string     `json:"qemu"`    // version
	Accel   string     `json:"accel"`
	CPU     string     `json:"cpu"` // model and, with KVM, the host's processor
	Memory  spec.Bytes `json:"memory"`
	CPUs    int        `json:"cpus"`
	Offload bool       `json:"offload"` // of the network interface: the tap has a virtio-net header
	Places  int        `json:"places"`  // for disks that the guest knows
	Devices string     `json:"devices"` // digest of QEMU's command line
}

// String is the template's name: 32 hexadecimal digits.
func (k Key) String() string {
	data, err := json.Marshal(k)
	if err != nil {
		panic(err) // a struct of strings and numbers
	}
	sum := sha256.Sum256(data)
	return hex.EncodeToString(sum[:16])
}

// TemplateInfo describes a template.
type TemplateInfo struct {
	Name     string    `json:"name"`
	Key      Key       `json:"key"`
	RAM      string    `json:"ram"`      // digest of the memory's pages that are not zero
	RAMBytes int64     `json:"ramBytes"` // of them
	State    string    `json:"state"`    // sha256
	Made     time.Time `json:"made"`
	Used     time.Time `json:"-"` // when a machine was last started from it
}

// Templates are the saved machines in CacheDir/templates.
type Templates struct {
	Dir string
	Log *slog.Logger
}

// OpenTemplates gives the templates of a cache directory.
func OpenTemplates(cacheDir string, log *slog.Logger) *Templates {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	return &Templates{Dir: filepath.Join(cacheDir, "templates"), Log: log}
}

// A template is one that this process holds.
type template struct {
	TemplateInfo
	memory *memory
	state  []byte
}

var templateName = regexp.MustCompile(`^[0-9a-f]{32}$`)

// ErrNoTemplate is what Remove returns for a name that no template has.
var ErrNoTemplate = errors.New("no such template")

// List gives all templates, by name.
func (t *Templates) List() ([]TemplateInfo, error) {
	entries, err := os.ReadDir(t.Dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list templates: %w", err)
	}
	var list []TemplateInfo
	for _, e := range entries {
		if !templateName.MatchString(e.Name()) {
			continue
		}
		info, err := t.info(e.Name())
		if err != nil {
			t.Log.Warn("unusable template", "name", e.Name(), "error", err)
			info = TemplateInfo{Name: e.Name()} // listed, so that it can be removed
		}
		list = append(list, info)
	}
	return list, nil
}

func (t *Templates) info(name string) (TemplateInfo, error) {
	f, err := os.Open(filepath.Join(t.Dir, name, keyFile))
	if err != nil {
		return TemplateInfo{}, err
	}
	defer f.Close()
	var info TemplateInfo
	if err := json.NewDecoder(io.LimitReader(f, 1<<20)).Decode(&info); err != nil {
		return TemplateInfo{}, fmt.Errorf("%s: %w", f.Name(), err)
	}
	fi, err := f.Stat()
	if err != nil {
		return TemplateInfo{}, err
	}
	info.Name, info.Used = name, fi.ModTime()
	return info, nil
}

// Remove deletes a template. Machines that run from it go on.
func (t *Templates) Remove(name string) error {
	if !templateName.MatchString(name) {
		return fmt.Errorf("remove template %q: %w", name, ErrNoTemplate)
	}
	unlock, err := t.lock(name)
	if err != nil {
		return fmt.Errorf("remove template %s: %w", name, err)
	}
	defer unlock()
	dir := filepath.Join(t.Dir, name)
	if _, err := os.Stat(dir); errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove template %s: %w", name, ErrNoTemplate)
	}
	// Under a name that nobody takes for a template first: whoever is killed here leaves none that is half there.
	gone := filepath.Join(t.Dir, "."+name+".removed")
	os.RemoveAll(gone)
	if err := os.Rename(dir, gone); err != nil {
		return fmt.Errorf("remove template %s: %w", name, err)
	}
	return os.RemoveAll(gone)
}

// A Limit bounds what GC leaves. Zero is no bound.
type Limit struct {
	Unused time.Duration // how long a template may lie unused
	Bytes  int64         // of all templates together, the least recently used go first
}

// GC removes templates beyond the limit and what killed processes have left. It returns the names of those removed.
func (t *Templates) GC(l Limit) (removed []string, err error) {
	list, err := t.List()
	if err != nil {
		return nil, err
	}
	slices.SortFunc(list, func(a, b TemplateInfo) int { return b.Used.Compare(a.Used) })
	var errs []error
	sum := int64(0)
	for _, info := range list {
		sum += info.RAMBytes
		if info.RAM != "" && (l.Unused == 0 || time.Since(info.Used) <= l.Unused) && (l.Bytes == 0 || sum <= l.Bytes) {
			continue
		}
		sum -= info.RAMBytes
		if err := t.Remove(info.Name); err != nil && !errors.Is(err, ErrNoTemplate) {
			errs = append(errs, err)
			continue
		}
		removed = append(removed, info.Name)
	}
	return removed, errors.Join(append(errs, t.sweep())...)
}

// sweep removes what was left half done and nobody is at work on.
func (t *Templates) sweep() error {
	entries, err := os.ReadDir(t.Dir)
	if err != nil {
		return ignoreNotExist(err)
	}
	var errs []error
	for _, e := range entries {
		name, isWork := strings.CutPrefix(e.Name(), ".")
		name, _, _ = strings.Cut(name, ".")
		if !templateName.MatchString(name) {
			continue
		}
		path := filepath.Join(t.Dir, e.Name())
		switch {
		case isWork:
			unlock, err := t.tryLock(name)
			if err != nil {
				continue // being made
			}
			errs = append(errs, os.RemoveAll(path))
			unlock()
		case strings.HasSuffix(e.Name(), brokenExt):
			if fi, err := e.Info(); err == nil && time.Since(fi.ModTime()) > maxPause {
				errs = append(errs, ignoreNotExist(os.Remove(path)))
			}
		}
	}
	return errors.Join(errs...)
}

func ignoreNotExist(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

func (t *Templates) lock(name string) (unlock func(), err error) { return t.flock(name, unix.LOCK_EX) }

func (t *Templates) tryLock(name string) (unlock func(), err error) {
	return t.flock(name, unix.LOCK_EX|unix.LOCK_NB)
}

// flock locks a template's name against being made and removed elsewhere.
func (t *Templates) flock(name string, how int) (func(), error) {
	if err := os.MkdirAll(t.Dir, 0o700); err != nil {
		return nil, err
	}
	f, err := os.OpenFile(filepath.Join(t.Dir, name+".lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	for {
		err := unix.Flock(int(f.Fd()), how)
		if err == nil {
			return func() { f.Close() }, nil
		}
		if !errors.Is(err, unix.EINTR) {
			f.Close()
			return nil, err
		}
	}
}

// Build makes the template that machines with this configuration start from, unless it is there.
func (t *Templates) Build(ctx context.Context, c Config) (TemplateInfo, error) {
	c.CacheDir = filepath.Dir(t.Dir)
	c.RunDir = t.Dir // not used: a template's machine runs in a directory of its own
	if err := c.check(); err != nil {
		return TemplateInfo{}, err
	}
	if err := NeedRoot(); err != nil {
		return TemplateInfo{}, fmt.Errorf("build template: %w", err)
	}
	q, err := findQEMU(ctx, c.CacheDir)
	if err != nil {
		return TemplateInfo{}, err
	}
	accel, _, err := c.accelerator()
	if err != nil {
		return TemplateInfo{}, err
	}
	k, err := c.key(q, accel)
	if err != nil {
		return TemplateInfo{}, err
	}
	m, err := t.open(ctx, &c, q, k)
	if err != nil {
		return TemplateInfo{}, err
	}
	m.release()
	return m.TemplateInfo, nil
}

func (t *template) release() {
	if t != nil {
		t.memory.release()
	}
}

// key is that of the template for this configuration.
func (c *Config) key(q *qemu, accel string) (Key, error) {
	offload, err := hasOffload(c.Net)
	if err != nil {
		return Key{}, err
	}
	k := Key{
		Package: c.Package.Digest, QEMU: q.version, Accel: accel, CPU: cpuModel(accel), Memory: class(c.Memory), CPUs: c.CPUs, Offload: offload,
		Places: c.placesNeeded(),
	}
	if accel == KVM {
		if k.CPU, err = hostCPU(); err != nil {
			return Key{}, err
		}
	}
	khz, err := tscKHz()
	if err != nil {
		return Key{}, err
	}
	// The kernel measures the frequency at each boot of the host, with an error that makes no other machine.
	const step = 10_000
	h := c.hardware(accel, k.Memory)
	h.places = emptyPlaces(k.Places)
	h.args = kernelArgs(c.Package.Manifest.Args, accel, (khz+step/2)/step*step)
	sum := sha256.Sum256([]byte(strings.Join(h.arguments(), "\x00")))
	k.Devices = hex.EncodeToString(sum[:16])
	return k, nil
}

// open holds the template with key k, making it first where it is missing or damaged.
func (t *Templates) open(ctx context.Context, c *Config, q *qemu, k Key) (*template, error) {
	name := k.String()
	if tm, err := t.take(name, k); err == nil {
		return tm, nil
	}
	if why, ok := t.broken(name); ok {
		return nil, fmt.Errorf("template %s did not restore lately: %s", name, why)
	}
	unlock, err := t.lock(name)
	if err != nil {
		return nil, fmt.Errorf("template %s: %w", name, err)
	}
	defer unlock()
	tm, err := t.take(name, k) // another process may have made it meanwhile
	if err == nil {
		return tm, nil
	}
	if !errors.Is(err, fs.ErrNotExist) {
		t.Log.Warn("template is damaged, making it again", "error", err)
	}
	if err := t.make(ctx, c, q, k); err != nil {
		return nil, fmt.Errorf("make template %s: %w", name, err)
	}
	return t.take(name, k)
}

// take holds a template that is there.
func (t *Templates) take(name string, k Key) (*template, error) {
	info, err := t.info(name)
	if err != nil {
		return nil, err
	}
	if info.Key != k {
		return nil, fmt.Errorf("template %s: %s names another key", name, keyFile)
	}
	dir := filepath.Join(t.Dir, name)
	tm := &template{TemplateInfo: info}
	if tm.state, err = hostfile.Read(filepath.Join(dir, vmState), maxState); err != nil {
		return nil, err
	}
	if sum := sha256.Sum256(tm.state); hex.EncodeToString(sum[:]) != info.State {
		return nil, fmt.Errorf("template %s: %s is damaged", name, vmState)
	}
	if tm.memory, err = hold(dir, int64(k.Memory), info.RAM, func() (*os.File, func() error, error) { return t.fill(dir, info) }); err != nil {
		return nil, err
	}
	now := time.Now()
	_ = os.Chtimes(filepath.Join(dir, keyFile), now, now) // only the order of eviction depends on it
	return tm, nil
}

// fill makes a memory of a template's file, and what finishes and seals it. The content is hashed once in a boot of the host, which takes
// longer than copying it; after that it is the same file as long as inode, size and change time are the same: nobody but root can write it,
// and not even root can do so without changing the latter.
func (t *Templates) fill(dir string, info TemplateInfo) (_ *os.File, finish func() error, err error) {
	ram, err := os.Open(filepath.Join(dir, ramFile))
	if err != nil {
		return nil, nil, err
	}
	defer func() {
		if err != nil {
			ram.Close()
		}
	}()
	now, err := identify(ram)
	if err != nil {
		return nil, nil, err
	}
	if now.Size != int64(info.Key.Memory) {
		return nil, nil, fmt.Errorf("template %s: %s is damaged", info.Name, ramFile)
	}
	f, err := newMemfd(info.Name, int64(info.Key.Memory))
	if err != nil {
		return nil, nil, err
	}
	defer func() {
		if err != nil {
			f.Close()
		}
	}()
	path := filepath.Join(dir, checkedFile)
	var then identity
	data, err := hostfile.Read(path, 64<<10)
	if err == nil && json.Unmarshal(data, &then) == nil && then == now {
		// QEMU has a lot to do before it looks at its memory.
		return f, func() error {
			defer ram.Close()
			if err := copyExtents(f, ram); err != nil {
				return err
			}
			return seal(f)
		}, nil
	}
	_, digest, err := digestSparse(f, ram)
	if err == nil && digest != info.RAM {
		err = fmt.Errorf("template %s: %s is damaged", info.Name, ramFile)
	}
	if err != nil {
		return nil, nil, err
	}
	if data, err := json.Marshal(now); err == nil {
		_ = hostfile.Replace(path, data) // without it the next one hashes again
	}
	return f, func() error { return errors.Join(seal(f), ram.Close()) }, nil
}

// An identity is that of a file's content, in one boot of the host.
type identity struct {
	BootID     string
	Dev, Inode uint64
	Size       int64
	Changed    int64 // nanoseconds
}

func identify(f *os.File) (identity, error) {
	boot, err := bootID()
	if err != nil {
		return identity{}, err
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return identity{}, fmt.Errorf("stat %s: %w", f.Name(), err)
	}
	return identity{boot, st.Dev, st.Ino, st.Size, st.Ctim.Nano()}, nil
}

// make boots a machine, waits until its agent is parked, and saves it. The caller has the template's lock.
func (t *Templates) make(ctx context.Context, c *Config, q *qemu, k Key) (err error) {
	name := k.String()
	t.Log.Info("making a template", "name", name, "memory", k.Memory.String(), "cpus", k.CPUs, "accel", k.Accel)
	work := filepath.Join(t.Dir, "."+name+".work")
	os.RemoveAll(work) // of a process that was killed
	defer func() { err = errors.Join(err, os.RemoveAll(work)) }()
	if err := os.MkdirAll(work, 0o700); err != nil {
		return err
	}
	if err := c.Package.Verify(); err != nil {
		return err
	}
	info := TemplateInfo{Name: name, Key: k}
	ram, err := newMemfd(name, int64(k.Memory))
	if err != nil {
		return err
	}
	defer ram.Close()
	state, err := c.park(ctx, q, k, ram, filepath.Join(work, "run"))
	if errors.Is(err, errSlowTimer) { // once: some kernels prefer it
		t.Log.Info("making the template again", "name", name, "reason", err)
		if err := errors.Join(ram.Truncate(0), ram.Truncate(int64(k.Memory))); err != nil {
			return err
		}
		state, err = c.park(ctx, q, k, ram, filepath.Join(work, "run"))
	}
	if err != nil && !errors.Is(err, errSlowTimer) {
		return err
	}
	if err := os.RemoveAll(filepath.Join(work, "run")); err != nil {
		return err
	}
	file, err := os.OpenFile(filepath.Join(work, ramFile), os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer file.Close()
	if err := file.Truncate(int64(k.Memory)); err != nil {
		return err
	}
	pages, digest, err := digestSparse(file, ram)
	if err != nil {
		return err
	}
	sum := sha256.Sum256(state)
	info.RAM, info.RAMBytes, info.State, info.Made = digest, pages*pageSize, hex.EncodeToString(sum[:]), time.Now().UTC()
	data, err := json.MarshalIndent(info, "", "  ")
	if err != nil {
		return err
	}
	if err := errors.Join(
		os.WriteFile(filepath.Join(work, vmState), state, 0o600),
		os.WriteFile(filepath.Join(work, keyFile), append(data, '\n'), 0o600),
	); err != nil {
		return err
	}
	dir := filepath.Join(t.Dir, name)
	if err := os.RemoveAll(dir); err != nil {
		return err
	}
	return os.Rename(work, dir)
}

// settled is how long a guest has to be idle before it is saved, settling how long it is waited for.
const (
	settled  = 200 * time.Millisecond
	settling = 10 * time.Second
)

// park boots a guest into ram, waits until its agent has opened the port and sleeps, and returns the state of its devices.
func (c *Config) park(ctx context.Context, q *qemu, k Key, ram *os.File, dir string) (state []byte, err error) {
	b := *c
	b.Disks, b.Shares, b.Net, b.RunDir, b.Detached = nil, nil, Net{Mode: NetNone}, dir, false
	b.Cgroup, b.Join = "", nil // what the template takes is not this pod's
	if k.Offload {
		tap, err := spareTap()
		if err != nil {
			return nil, err
		}
		defer tap.Close()
		b.Net = Net{Mode: NetTap, Tap: tap}
	}
	ctx, cancel := context.WithTimeoutCause(ctx, c.HelloTimeout, fmt.Errorf("the guest's agent did not come up within %v", c.HelloTimeout))
	defer cancel()
	m, err := newMachine(&b, Info{Accel: k.Accel, Start: Cold, Memory: k.Memory, CPUs: k.CPUs, Package: k.Package, StartedAt: time.Now()})
	if err != nil {
		return nil, err
	}
	parked := m.expect("agent")
	if err := m.launch(&b, q, role{ram: ram, shared: true}, emptyPlaces(k.Places)); err != nil {
		return nil, err
	}
	state, err = m.saveTemplate(ctx, parked)
	if err != nil && !errors.Is(err, errSlowTimer) {
		return nil, m.abandon(ctx, err)
	}
	return state, errors.Join(err, m.Kill(), m.Close())
}

// errSlowTimer comes with the state of a guest whose kernel did not trust the local APIC's timer: on a host that is so busy that the
// guest lost ticks while it compared the two, it falls back to the PIT, which wakes it 36 times a second for nothing. All pods of the
// template would do so for ever.
var errSlowTimer = errors.New("the guest fell back to a slow timer")

// usesPIT tells whether the idle guest gets interrupts of the PIT, ISA's number 0.
func (m *Machine) usesPIT(ctx context.Context) (bool, error) {
	var counts [2]int64
	for i := range counts {
		if i > 0 {
			select {
			case <-time.After(settled):
			case <-ctx.Done():
				return false, context.Cause(ctx)
			}
		}
		var text string
		if err := m.QMP(ctx, "human-monitor-command", map[string]any{"command-line": "info irq"}, &text); err != nil {
			return false, err
		}
		counts[i] = firstIRQ(text)
	}
	return counts[1]-counts[0] > 2, nil
}

// firstIRQ finds the count of interrupt 0 in QEMU's table; there is none of interrupts that never came, nor with KVM.
func firstIRQ(table string) int64 {
	for line := range strings.Lines(table) {
		if count, ok := strings.CutPrefix(strings.TrimSpace(line), "0: "); ok {
			n, _ := strconv.ParseInt(count, 10, 64)
			return n
		}
	}
	return 0
}

// saveTemplate stops the guest once its agent is parked and returns the state of the devices, with errSlowTimer if it is a poor one.
func (m *Machine) saveTemplate(ctx context.Context, parked <-chan struct{}) ([]byte, error) {
	if err := m.QMP(ctx, "qmp_capabilities", nil, nil); err != nil {
		return nil, err
	}
	if _, err := m.await(ctx, parked, nil); err != nil {
		return nil, err
	}
	if err := m.settle(ctx); err != nil {
		return nil, err
	}
	pit, err := m.usesPIT(ctx)
	if err != nil {
		return nil, err
	}
	if err := m.QMP(ctx, "stop", nil, nil); err != nil {
		return nil, err
	}
	if err := m.QMP(ctx, "migrate-set-capabilities", migrationCapabilities, nil); err != nil {
		return nil, err
	}
	r, w, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer r.Close()
	err = m.monitor.call(ctx, "getfd", map[string]any{"fdname": "state"}, nil, w)
	w.Close()
	if err != nil {
		return nil, err
	}
	var state []byte
	var rerr error
	var reader sync.WaitGroup
	reader.Go(func() {
		if state, rerr = io.ReadAll(io.LimitReader(r, maxState+1)); rerr == nil && len(state) > maxState {
			rerr = fmt.Errorf("the devices' state has more than %d bytes", maxState)
		}
	})
	completed, failed := m.expect("migration completed"), m.expect("migration failed")
	err = m.QMP(ctx, "migrate", map[string]any{"uri": "fd:state"}, nil)
	if err == nil {
		var what <-chan struct{}
		if what, err = m.await(ctx, completed, failed); err == nil && what == failed {
			err = errors.New("QEMU could not save the machine")
		}
	}
	if err != nil {
		r.SetReadDeadline(time.Unix(1, 0))
	}
	reader.Wait()
	if err = errors.Join(err, rerr); err == nil && pit {
		err = errSlowTimer
	}
	return state, err
}

// migrationCapabilities leave out the memory, and tell of the end by an event.
var migrationCapabilities = map[string]any{"capabilities": []map[string]any{
	{"capability": "x-ignore-shared", "state": true}, {"capability": "events", "state": true},
}}

// settle waits until QEMU has used next to no processor time for a while, or for long enough.
func (m *Machine) settle(ctx context.Context) error {
	last, err := cpuTime(m.process.pid)
	if err != nil {
		return err
	}
	for end := time.Now().Add(settling); time.Now().Before(end); {
		select {
		case <-time.After(settled):
		case <-m.life.Done():
			return context.Cause(m.life)
		case <-ctx.Done():
			return context.Cause(ctx)
		}
		now, err := cpuTime(m.process.pid)
		if err != nil {
			return err
		}
		if now-last <= clockTick {
			return nil
		}
		last = now
	}
	return nil
}

// restore makes an incoming QEMU the template's machine, stopped. The commands go to it together, while it is still starting.
func (m *Machine) restore(ctx context.Context, t *template) error {
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	defer r.Close()
	defer w.Close()
	var writer sync.WaitGroup
	defer writer.Wait()
	defer w.SetWriteDeadline(time.Unix(1, 0)) // where QEMU has not read it by then, it will not
	completed, failed := m.expect("migration completed"), m.expect("migration failed")
	var sent calls
	sent.add(m.monitor.begin(ctx, "qmp_capabilities", nil))
	sent.add(m.monitor.begin(ctx, "migrate-set-capabilities", migrationCapabilities))
	sent.add(m.monitor.begin(ctx, "getfd", map[string]any{"fdname": "state"}, r))
	if err := t.memory.wait(ctx); err != nil {
		return err
	}
	writer.Go(func() {
		defer w.Close()
		_, _ = w.Write(t.state) // QEMU says what is wrong with what it got
	})
	sent.add(m.monitor.begin(ctx, "migrate-incoming", map[string]any{"uri": "fd:state"}))
	if err := sent.wait(); err != nil {
		return err
	}
	what, err := m.await(ctx, completed, failed)
	if err == nil && what == failed {
		err = errors.New("QEMU could not load the machine")
	}
	return err
}

// failure reads how a template failed last, if it did.
func (t *Templates) failure(name string) (f failure, when time.Time, ok bool) {
	path := filepath.Join(t.Dir, name+brokenExt)
	fi, err := os.Stat(path)
	if err != nil {
		return failure{}, time.Time{}, false
	}
	data, err := hostfile.Read(path, 64<<10)
	if err != nil || json.Unmarshal(data, &f) != nil {
		return failure{}, time.Time{}, false
	}
	return f, fi.ModTime(), true
}

// broken tells why a template did not restore, as long as it is not to be made again.
func (t *Templates) broken(name string) (why string, ok bool) {
	f, when, ok := t.failure(name)
	return f.Why, ok && time.Since(when) < f.pause()
}

// spoil notes that a template does not restore and removes it.
func (t *Templates) spoil(name string, why error) {
	last, _, _ := t.failure(name)
	data, err := json.Marshal(failure{Why: why.Error(), Times: last.Times + 1})
	if err == nil {
		err = hostfile.Replace(filepath.Join(t.Dir, name+brokenExt), data)
	}
	if err := errors.Join(err, t.Remove(name)); err != nil {
		t.Log.Warn("remove a template that does not restore", "name", name, "error", err)
	}
}

// restored forgets earlier failures of a template.
func (t *Templates) restored(name string) {
	_ = os.Remove(filepath.Join(t.Dir, name+brokenExt)) // mostly there is none
}

// Verify reads a template's files and compares them with their digests.
func (t *Templates) Verify(name string) error {
	info, err := t.info(name)
	if err != nil {
		return fmt.Errorf("verify template %s: %w", name, err)
	}
	ram, err := os.Open(filepath.Join(t.Dir, name, ramFile))
	if err != nil {
		return fmt.Errorf("verify template: %w", err)
	}
	defer ram.Close()
	if _, digest, err := digestSparse(nil, ram); err != nil || digest != info.RAM {
		return errors.Join(fmt.Errorf("template %s: %s is damaged", name, ramFile), err)
	}
	return nil
}
