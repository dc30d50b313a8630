// Package vmm starts, watches and ends one virtual machine: one QEMU process.
//
// Start boots a machine, or restores it from a template, and returns when the agent in the guest has answered. The Machine then is
// the host's end of everything: streams to the guest (package wire), disks, statistics, the reason of its end. TakeUp makes a Machine
// of one that an earlier process has started.
//
// QEMU runs confined. Programs that start machines call Confine first thing in main: this package executes them again, under
// another name, to become QEMU.
//
// vmm imports spec, wire and boot; it may import neither Nomad nor a registry client.
package vmm

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"time"

	"github.com/cradlestack/cradlestack/driver-cradle/boot"
	"github.com/cradlestack/cradlestack/spec"
)

// Accelerators and ways to start, as spec.Boot has them.
const (
	Auto     = "auto"
	KVM      = "kvm"
	TCG      = "tcg"
	Template = "template"
	Cold     = "cold"
)

// Modes of a network.
const (
	NetNone = "none"
	NetUser = "user"
	NetTap  = "tap"
)

// A Config says what machine to start.
type Config struct {
	Package *boot.Package
	Accel   string     // Auto (default), KVM, TCG
	Start   string     // Auto (default), Template, Cold
	Memory  spec.Bytes // what the containers may use together; the machine gets the size class above it
	CPUs    int        // default 1; the machine gets at most as many as this process may use

	Disks    []Disk  // Machine.LUN tells where the guest finds them
	Shares   []Share // entries of the one 9p device, whose mount tag is wire.ShareTag
	Virtiofs []Share // entries of the one virtiofs device, whose mount tag is VirtiofsTag; needs a cold start
	Net      Net

	RunDir   string   // state, sockets, console.log; made with mode 0700
	CacheDir string   // templates are in CacheDir/templates
	Detached bool     // the machine goes on when the process that started it ends
	Cgroup   string   // directory of the cgroup (version 2) that QEMU starts in; default: that of this process
	Join     []string // directories of further cgroups, of version 1, that QEMU is put into before it begins

	// FirstUID is the first of the 65536 users, and groups, of which QEMU runs as one: each run directory has its own. They are to own nothing.
	// Default: DefaultFirstUID.
	FirstUID int

	// HelloTimeout bounds the time from QEMU's start to the agent's answer. Default: two minutes, and 20 seconds of that for a
	// machine from a template.
	HelloTimeout time.Duration
	Log          *slog.Logger // default: nowhere
}

// A Disk is a raw image or a block device.
type Disk struct {
	Key      string `json:"key"` // the caller's name for it
	Path     string `json:"path"`
	ReadOnly bool   `json:"readOnly,omitempty"`

	// Internal is a disk whose size and name the guest does not care for, once it is told where the disk is. In a machine from a template it
	// takes a place that the guest has known since before it was saved: nothing has to be found and looked at.
	Internal bool `json:"internal,omitempty"`
}

// A Share is a directory or a file of the host.
type Share struct {
	Name     string // of the entry: one path element
	Path     string
	ReadOnly bool
}

// Net is the machine's one network interface. It is there in every mode: a guest from a template has the devices of its template.
type Net struct {
	Mode    string         // NetNone (default), NetUser, NetTap
	Publish []spec.Publish // NetUser
	Tap     *os.File       // NetTap: a queue of the tap device; Start does not close it
	MAC     string         // at a cold start; the guest sets what wire.Interface says in any case
}

// Info tells how a machine was started, and what has gone wrong on the host since.
type Info struct {
	PID       int            `json:"pid"`
	Accel     string         `json:"accel"` // KVM, TCG
	AccelWhy  string         `json:"accelWhy,omitempty"`
	Start     string         `json:"start"` // Template, Cold
	StartWhy  string         `json:"startWhy,omitempty"`
	Template  string         `json:"template,omitempty"` // its name
	Memory    spec.Bytes     `json:"memory"`             // of the machine
	CPUs      int            `json:"cpus"`
	Package   string         `json:"package"` // digest
	Publish   []spec.Publish `json:"publish,omitempty"`
	StartedAt time.Time      `json:"startedAt"`

	DiskErrors []*DiskError `json:"diskErrors,omitempty"` // one for each disk that has failed on the host since
}

// MinMemory is the least that containers can be given, as docker has it.
const MinMemory spec.Bytes = 6 << 20

// MachineSize is the memory of the machine whose containers may use so much of it together.
func MachineSize(memory spec.Bytes) spec.Bytes { return class(memory) }

// classes are the sizes of machines in MiB: one template serves all pods of a class, the exact limit holds in the guest.
func class(memory spec.Bytes) spec.Bytes {
	// Kernel, agent and page structures (1/64) of an idle guest take about 45 MiB.
	need := memory + memory/32 + 56<<20
	for size := spec.Bytes(128 << 20); ; size *= 2 {
		if need <= size {
			return size
		}
		if need <= size+size/2 {
			return size + size/2
		}
	}
}

// check completes the configuration with its defaults.
func (c *Config) check() error {
	if c.Package == nil {
		return errors.New("start machine: no boot package")
	}
	if c.RunDir == "" || c.CacheDir == "" {
		return errors.New("start machine: no run or cache directory")
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	for _, s := range []struct {
		value   *string
		what    string
		allowed []string
	}{
		{&c.Accel, "accelerator", []string{Auto, KVM, TCG}},
		{&c.Start, "start", []string{Auto, Template, Cold}},
		{&c.Net.Mode, "network mode", []string{NetNone, NetUser, NetTap}},
	} {
		if *s.value == "" {
			*s.value = s.allowed[0]
		}
		if *s.value != s.allowed[0] && *s.value != s.allowed[1] && *s.value != s.allowed[2] {
			return fmt.Errorf("start machine: %s %q is none of %v", s.what, *s.value, s.allowed)
		}
	}
	if c.Net.Mode == NetTap && c.Net.Tap == nil {
		return errors.New("start machine: network mode tap without a tap")
	}
	if c.Memory == 0 {
		c.Memory = spec.DefaultMemory
	}
	if c.Memory < MinMemory {
		return fmt.Errorf("start machine: %v of memory is too little, the least is %v: give the pod more memory", c.Memory, MinMemory)
	}
	if host := hostMemory(); host > 0 && c.Memory > host {
		return fmt.Errorf("start machine: %v of memory is more than the host's %v: give the pod less memory", c.Memory, host)
	}
	if c.CPUs == 0 {
		c.CPUs = 1
	}
	if c.CPUs < 1 || c.CPUs > maxCPUs {
		return fmt.Errorf("start machine: %d processors, allowed are 1 to %d", c.CPUs, maxCPUs)
	}
	if have := runtime.NumCPU(); c.CPUs > have {
		// More would only wait for each other. Emulated ones do so from the first instruction on: 64 of them on two take minutes to boot.
		c.Log.Warn("machine gets fewer processors than asked for: this process may use no more", "asked", c.CPUs, "gets", have)
		c.CPUs = have
	}
	if c.HelloTimeout == 0 {
		c.HelloTimeout = helloTimeout
	}
	if len(c.Virtiofs) > 0 && c.Start == Template {
		return errors.New("start machine: virtiofs needs a cold start: use 9p, or let the start be automatic")
	}
	seen := map[string]bool{}
	for _, s := range append(c.Shares[:len(c.Shares):len(c.Shares)], c.Virtiofs...) {
		if s.Name == "" || s.Name == "." || s.Name == ".." || filepath.Base(s.Name) != s.Name || seen[s.Name] {
			return fmt.Errorf("start machine: share name %q is taken or no path element", s.Name)
		}
		seen[s.Name] = true
		if _, err := os.Stat(s.Path); err != nil {
			return fmt.Errorf("start machine: share %s: %w", s.Name, err)
		}
	}
	var err error
	if c.CacheDir, err = filepath.Abs(c.CacheDir); err != nil {
		return fmt.Errorf("start machine: %w", err)
	}
	if c.Net.Publish, err = completePublish(c.Net.Publish); err != nil {
		return fmt.Errorf("start machine: %w", err)
	}
	if len(c.Net.Publish) > 0 && c.Net.Mode != NetUser {
		return fmt.Errorf("start machine: publishing ports takes network mode %s", NetUser)
	}
	if c.RunDir, err = filepath.Abs(c.RunDir); err != nil {
		return fmt.Errorf("start machine: %w", err)
	}
	return nil
}

const (
	maxCPUs             = 64 // CONFIG_NR_CPUS of the guest
	helloTimeout        = 2 * time.Minute
	restoreHelloTimeout = 20 * time.Second
)

// NeedRoot fails where this process can't start machines.
func NeedRoot() error {
	if os.Geteuid() != 0 {
		return errors.New("not root, who alone may make a machine's namespaces, taps and disks: try again with sudo")
	}
	return nil
}

// Start starts a machine and returns when its agent has answered hello. Where the configuration leaves it open, a machine that does
// not come up from its template is booted cold, and one that does not come up with KVM is started once with TCG; Info says why.
func Start(ctx context.Context, c Config) (*Machine, error) {
	if err := c.check(); err != nil {
		return nil, err
	}
	if err := NeedRoot(); err != nil {
		return nil, fmt.Errorf("start machine: %w", err)
	}
	q, err := findQEMU(ctx, c.CacheDir)
	if err != nil {
		return nil, err
	}
	accel, why, err := c.accelerator()
	if err != nil {
		return nil, err
	}
	return c.startOn(ctx, q, accel, why)
}

// startOn starts with accel, or else with TCG where the choice is ours.
func (c *Config) startOn(ctx context.Context, q *qemu, accel, why string) (*Machine, error) {
	m, err := c.startWith(ctx, q, accel, why)
	if err != nil && c.Accel == Auto && accel == KVM && ctx.Err() == nil && !errors.Is(err, ErrKilled) {
		c.Log.Warn("machine did not come up with kvm, starting it with tcg", "error", err)
		m, err = c.startWith(ctx, q, TCG, "kvm failed: "+err.Error())
	}
	return m, err
}

func (c *Config) startWith(ctx context.Context, q *qemu, accel, accelWhy string) (*Machine, error) {
	info := Info{
		Accel: accel, AccelWhy: accelWhy, Start: Template, Memory: class(c.Memory), CPUs: c.CPUs, Package: c.Package.Digest,
	}
	switch {
	case c.Start == Cold:
	case len(c.Virtiofs) > 0:
		info.StartWhy = "virtiofs needs a cold start"
	default:
		m, err := c.fromTemplate(ctx, q, info)
		var re restoreError
		if err == nil || c.Start == Template || ctx.Err() != nil || !errors.As(err, &re) {
			return m, err
		}
		info.StartWhy = err.Error()
		c.Log.Warn("starting cold", "error", err)
	}
	info.Start = Cold
	return c.boot(ctx, q, info, nil)
}

// fromTemplate restores a machine from its template. A template that does not restore twice in a row is removed; that a machine was
// killed while it started, or nobody wants it any more, says nothing about its template.
func (c *Config) fromTemplate(ctx context.Context, q *qemu, info Info) (*Machine, error) {
	k, err := c.key(q, info.Accel)
	if err != nil {
		return nil, restoreError{fmt.Errorf("start machine: %w", err)}
	}
	ts := OpenTemplates(c.CacheDir, c.Log)
	for again := false; ; again = true {
		t, err := ts.open(ctx, c, q, k)
		if err != nil {
			return nil, restoreError{fmt.Errorf("start machine: %w", err)}
		}
		m, err := c.boot(ctx, q, info, t)
		var re restoreError
		switch {
		case err == nil:
			ts.restored(k.String())
			return m, nil
		case ctx.Err() != nil || !errors.As(err, &re):
			return nil, err
		case again:
			ts.spoil(k.String(), err)
			return nil, err
		}
		c.Log.Warn("restoring again", "error", err)
	}
}
