// Package translate turns what docker's clients ask for into the project's vocabulary, and back: a container's configuration becomes a spec.Pod,
// and what Nomad tells of it becomes docker's states and texts.
//
// It is pure: it asks nobody, so that all of it is tested with requests as clients have sent them. What a microVM can't do is refused with the
// reason; nothing is left out silently.
package translate

import (
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"math"
	"net/http"
	"net/netip"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/docker/go-units"
	dockerspec "github.com/moby/docker-image-spec/specs-go/v1"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/mount"
	"github.com/moby/moby/api/types/network"
	"github.com/moby/moby/api/types/volume"
	"golang.org/x/sys/unix"

	"github.com/cradlestack/cradlestack/internal/dockerhttp"
	"github.com/cradlestack/cradlestack/spec"
)

// Own is the name that every pod's own container has inside of the pod, and that its task has. Docker's name of the container can change.
const Own = "main"

// Platform is that of the nodes.
const Platform = "linux/amd64"

// Networks that are always there.
const (
	Bridge = "bridge"
	None   = "none"
)

// An Image is what a container is made of.
type Image struct {
	Reference string // what the nodes pull
	Audience  string // of the identity with which they ask for it, "" where they need none
	ID        string // of the configuration, sha256:…
	Config    dockerspec.DockerOCIImageConfig
	Platform  string // linux/arm/v7, where nodes run another one
}

// Rules are what an operator allows and has chosen.
type Rules struct {
	// HostPaths lets containers mount directories of the node: a choice for single nodes whose users are its operators anyway.
	HostPaths bool
	// Inherited are the mounts of the containers that --volumes-from names.
	Inherited []mount.Mount
}

// A Container is what a request comes to.
type Container struct {
	Config   *container.Config     // with the image's, as docker inspect shows it
	Host     *container.HostConfig // with docker's defaults
	Networks map[string]*network.EndpointSettings

	Pod      *spec.Pod
	Zone     string                 // kr.zone
	Volumes  []volume.CreateRequest // of the namespace, that the pod mounts, and how they are made where they are not there
	Warnings []string
	// Ranges are those from which the node's ports of some of the pod's published ones are to be chosen, by their index.
	Ranges map[int]PortRange
}

// A PortRange is one of docker's: -p 8000-8010:80.
type PortRange struct {
	First uint16 `json:"first"`
	Last  uint16 `json:"last"`
}

// nameRule is docker's (moby daemon/names).
var nameRule = regexp.MustCompile(`^/?[a-zA-Z0-9][a-zA-Z0-9_.-]+$`)

// Name checks a container's name and gives it without the slash that docker writes in front.
func Name(name string) (string, error) {
	if !nameRule.MatchString(name) {
		return "", dockerhttp.Invalid("Invalid container name (%s), only [a-zA-Z0-9][a-zA-Z0-9_.-] are allowed", name)
	}
	return strings.TrimPrefix(name, "/"), nil
}

// Create checks a request to create the container id and turns it into a pod.
func Create(r *container.CreateRequest, id string, image *Image, rules Rules) (*Container, error) {
	if r.Config == nil {
		return nil, dockerhttp.Invalid("config cannot be empty in order to create a container")
	}
	b := &builder{id: id, image: image, rules: rules, config: *r.Config}
	if r.HostConfig != nil {
		b.host = *r.HostConfig
	}
	if r.NetworkingConfig != nil {
		b.networks = r.NetworkingConfig.EndpointsConfig
	}
	b.pod = &spec.Pod{Name: Own, Containers: []spec.PodContainer{{Name: Own, Image: image.Reference}}}
	b.own = &b.pod.Containers[0]
	if image.Platform != "" { // moby daemon/create.go
		b.warn("The requested image's platform (" + image.Platform + ") does not match the detected host platform (" + Platform + ") and no specific platform was requested")
	}
	if err := checkJoin(r); err != nil {
		return nil, err
	}
	for _, step := range []func() error{b.merge, b.process, b.refuse, b.resources, b.restart, b.privileges, b.logs, b.labels, b.network, b.mounts} {
		if err := step(); err != nil {
			return nil, err
		}
	}
	if err := b.pod.Validate(); err != nil {
		return nil, dockerhttp.Invalid("%s", strings.ReplaceAll(err.Error(), "containers[0].", ""))
	}
	return &Container{
		Config: &b.config, Host: &b.host, Networks: b.networks, Pod: b.pod, Zone: b.zone, Volumes: b.volumes, Warnings: b.warnings, Ranges: b.ranges,
	}, nil
}

// A builder makes a pod of a request.
type builder struct {
	id    string
	image *Image
	rules Rules

	config   container.Config
	host     container.HostConfig
	networks map[string]*network.EndpointSettings

	pod      *spec.Pod
	own      *spec.PodContainer
	zone     string
	volumes  []volume.CreateRequest
	warnings []string
	ranges   map[int]PortRange
	joins    bool // another one's machine
}

func (b *builder) warn(text string) { b.warnings = append(b.warnings, text) }

// merge completes the configuration with the image's (moby daemon/commit.go, merge).
func (b *builder) merge() error {
	c, from := &b.config, &b.image.Config
	c.User, c.WorkingDir, c.StopSignal = cmp.Or(c.User, from.User), cmp.Or(c.WorkingDir, from.WorkingDir), cmp.Or(c.StopSignal, from.StopSignal)
	ports := network.PortSet{}
	for p := range c.ExposedPorts {
		ports[p] = struct{}{}
	}
	for text := range from.ExposedPorts {
		p, err := network.ParsePort(text)
		if err != nil {
			return dockerhttp.Invalid("the image's port %q: %v", text, err)
		}
		ports[p] = struct{}{}
	}
	if c.ExposedPorts = ports; len(ports) == 0 {
		c.ExposedPorts = nil
	}
	env, err := mergeEnv(from.Env, c.Env)
	if err != nil {
		return err
	}
	c.Env = env
	c.Labels = union(from.Labels, c.Labels)
	c.Volumes = union(from.Volumes, c.Volumes)
	if len(c.Volumes) == 0 {
		c.Volumes = nil
	}
	if len(c.Entrypoint) == 0 {
		if len(c.Cmd) == 0 {
			c.Cmd = from.Cmd
		}
		if c.Entrypoint == nil {
			c.Entrypoint = from.Entrypoint
		}
	}
	if len(c.Entrypoint) == 1 && c.Entrypoint[0] == "" { // --entrypoint ""
		c.Entrypoint = nil
	}
	if of := from.Healthcheck; c.Healthcheck == nil {
		c.Healthcheck = of
	} else if of != nil {
		h := *c.Healthcheck
		if len(h.Test) == 0 {
			h.Test = of.Test
		}
		h.Interval, h.Timeout, h.Retries = cmp.Or(h.Interval, of.Interval), cmp.Or(h.Timeout, of.Timeout), cmp.Or(h.Retries, of.Retries)
		h.StartPeriod, h.StartInterval = cmp.Or(h.StartPeriod, of.StartPeriod), cmp.Or(h.StartInterval, of.StartInterval)
		c.Healthcheck = &h
	}
	return nil
}

// union has the second one's values where both have one.
func union[V any](a, b map[string]V) map[string]V {
	m := map[string]V{}
	for _, from := range []map[string]V{a, b} {
		for name, value := range from {
			m[name] = value
		}
	}
	return m
}

// mergeEnv gives the request's variables, then those of the image that it does not name. Each name is there once; NAME alone removes the image's.
func mergeEnv(image, asked []string) ([]string, error) {
	var env []string
	at := map[string]int{}
	for _, e := range asked {
		name, _, _ := strings.Cut(e, "=")
		if name == "" || strings.ContainsRune(e, 0) {
			return nil, dockerhttp.Invalid("invalid environment variable: %s", e)
		}
		if i, known := at[name]; known {
			env[i] = e
			continue
		}
		at[name] = len(env)
		env = append(env, e)
	}
	for _, e := range image {
		name, _, _ := strings.Cut(e, "=")
		if _, known := at[name]; !known {
			env = append(env, e)
		}
	}
	return slices.DeleteFunc(env, func(e string) bool { return !strings.Contains(e, "=") }), nil
}

// ownEnv is what the pod has to be told beside the image's environment: variables of its own, and the names of those that it is not to have.
func ownEnv(image, merged []string) []string {
	var env []string
	for _, e := range merged {
		if !slices.Contains(image, e) {
			env = append(env, e)
		}
	}
	for _, e := range image {
		name, _, _ := strings.Cut(e, "=")
		if !slices.ContainsFunc(merged, func(m string) bool { return strings.HasPrefix(m, name+"=") }) {
			env = append(env, name)
		}
	}
	return env
}

func (b *builder) process() error {
	c, own := &b.config, b.own
	if len(c.Entrypoint) == 0 && len(c.Cmd) == 0 {
		return dockerhttp.Invalid("no command specified")
	}
	entrypoint := append([]string{}, c.Entrypoint...)
	own.Entrypoint = &entrypoint
	if len(c.Cmd) > 0 {
		command := slices.Clone(c.Cmd)
		own.Command = &command
	}
	own.Env, own.User, own.StopSignal = ownEnv(b.image.Config.Env, c.Env), c.User, signalName(c.StopSignal)
	if c.WorkingDir != "" {
		if !path.IsAbs(c.WorkingDir) {
			return dockerhttp.Invalid("the working directory '%s' is invalid, it needs to be an absolute path", c.WorkingDir)
		}
		c.WorkingDir = path.Clean(c.WorkingDir)
		own.WorkingDir = c.WorkingDir
	}
	if t := c.StopTimeout; t != nil {
		timeout := spec.Duration(time.Duration(*t) * time.Second)
		if *t < 0 {
			b.warn("A negative stop timeout is no limit in docker; here it is an hour.")
			timeout = spec.Duration(time.Hour)
		}
		own.StopTimeout = &timeout
	}
	c.Hostname = cmp.Or(c.Hostname, b.id[:12])
	b.pod.Hostname, own.Domainname = c.Hostname, c.Domainname
	own.TTY, own.OpenStdin, own.StdinOnce = c.Tty, c.OpenStdin, c.StdinOnce
	own.Init = b.host.Init != nil && *b.host.Init
	return b.health()
}

// signalName is a signal as Nomad writes it, by which nodes are chosen: docker's clients say TERM, sigterm and 15 as well.
func signalName(text string) string {
	if n, err := strconv.Atoi(text); err == nil {
		return cmp.Or(unix.SignalName(unix.Signal(n)), text)
	}
	name := strings.ToUpper(text)
	if !strings.HasPrefix(name, "SIG") {
		name = "SIG" + name
	}
	if unix.SignalNum(name) == 0 {
		return text
	}
	return name
}

func (b *builder) health() error {
	h := b.config.Healthcheck
	if h == nil {
		return nil
	}
	for _, d := range []struct {
		name  string
		value time.Duration
	}{{"Interval", h.Interval}, {"Timeout", h.Timeout}, {"StartPeriod", h.StartPeriod}, {"StartInterval", h.StartInterval}} {
		if d.value != 0 && d.value < container.MinimumDuration {
			return dockerhttp.Invalid("%s in Healthcheck cannot be less than %s", d.name, container.MinimumDuration)
		}
	}
	if h.Retries < 0 {
		return dockerhttp.Invalid("Retries in Healthcheck cannot be negative")
	}
	if len(h.Test) == 0 {
		return nil
	}
	b.own.Healthcheck = &spec.Healthcheck{
		Test: h.Test, Interval: spec.Duration(h.Interval), Timeout: spec.Duration(h.Timeout), StartPeriod: spec.Duration(h.StartPeriod),
		StartInterval: spec.Duration(h.StartInterval), Retries: h.Retries,
	}
	return nil
}

// refused answers what is not possible, with the reason.
func refused(option, why string) error {
	return dockerhttp.NewError(http.StatusBadRequest, option+" is not possible: "+why)
}

const joinFirst = "containers that share that are in one microVM, and have its network: add --network container: of the same container"

const ownKernel = "the container has a kernel of its own, in a microVM"

// refuse finds what a microVM can't do.
func (b *builder) refuse() error {
	h := &b.host
	if _, empty := h.Annotations[""]; empty {
		return dockerhttp.Invalid("invalid Annotations: the empty string is not permitted as an annotation key")
	}
	switch {
	case h.PidMode != "" && !h.PidMode.Valid():
		return dockerhttp.Invalid("invalid PID mode: %s", h.PidMode)
	case h.PidMode.IsHost():
		return refused("--pid "+string(h.PidMode), ownKernel)
	case h.PidMode.IsContainer() && !h.NetworkMode.IsContainer():
		return refused("--pid "+string(h.PidMode), joinFirst)
	case h.IpcMode.IsHost():
		return refused("--ipc "+string(h.IpcMode), ownKernel)
	case h.IpcMode.IsContainer() && !h.NetworkMode.IsContainer():
		return refused("--ipc "+string(h.IpcMode), joinFirst)
	case !h.IpcMode.Valid():
		return dockerhttp.Invalid("invalid IPC mode: %s", h.IpcMode)
	case h.IpcMode.IsNone():
		return refused("--ipc none", "the container has an IPC namespace and /dev/shm")
	case h.UTSMode.IsHost():
		return refused("--uts host", ownKernel)
	case h.UTSMode != "":
		return dockerhttp.Invalid("invalid UTS mode: %s", h.UTSMode)
	case h.UsernsMode != "":
		return refused("--userns "+string(h.UsernsMode), ownKernel)
	case h.CgroupnsMode.IsHost():
		return refused("--cgroupns host", ownKernel)
	case !h.CgroupnsMode.Valid():
		return dockerhttp.Invalid("invalid cgroup namespace mode: %v", h.CgroupnsMode)
	case h.CgroupParent != "", h.Cgroup != "":
		return refused("--cgroup-parent", "the container's cgroups are its microVM's")
	case len(h.DeviceRequests) > 0:
		return refused("--gpus", "devices of the node can't be given to a microVM yet")
	case len(h.DeviceCgroupRules) > 0:
		return refused("--device-cgroup-rule", "the devices are the microVM's: use --device, or --privileged")
	case len(h.Links) > 0 && (h.NetworkMode == "" || !IsOwn(string(h.NetworkMode))):
		return refused("--link", linkAlone)
	case h.Runtime != "" && h.Runtime != "cradle" && h.Runtime != "runc":
		return dockerhttp.Invalid("unknown or invalid runtime name: %s", h.Runtime)
	case h.Isolation != "" && !h.Isolation.IsDefault():
		return dockerhttp.Invalid("invalid isolation %q: it is a microVM's always", h.Isolation)
	case h.Umask != nil:
		return refused("Umask", "not supported yet")
	case b.config.NetworkDisabled:
		h.NetworkMode = None
	}
	h.IpcMode = cmp.Or(h.IpcMode, container.IPCModePrivate)
	h.CgroupnsMode = cmp.Or(h.CgroupnsMode, container.CgroupnsModePrivate)
	h.Runtime = cmp.Or(h.Runtime, "cradle")
	return nil
}

// leastMemory is docker's lower limit, which is said of --memory (moby daemon/daemon_unix.go).
const leastMemory = 6 << 20

func (b *builder) resources() error {
	if err := checkResources(&b.host.Resources); err != nil {
		return err
	}
	h, own := &b.host, b.own
	switch {
	case h.OomScoreAdj < -1000 || h.OomScoreAdj > 1000:
		return dockerhttp.Invalid("Invalid value %d, range for oom score adj is [-1000, 1000]", h.OomScoreAdj)
	case h.ShmSize < 0:
		return dockerhttp.Invalid("SHM size can not be less than 0")
	}
	if b.pod.Resources.Memory = spec.Bytes(h.Memory); h.Memory > 0 {
		b.pod.Resources.Memory = max(b.pod.Resources.Memory, spec.MinMemory) // less does not boot
		if h.MemorySwap != h.Memory {
			b.warn("Your kernel does not support swap limit capabilities or the cgroup is not mounted. Memory limited without swap.")
		}
	}
	if h.MemoryReservation > 0 {
		b.warn("Your kernel does not support memory soft limit capabilities or the cgroup is not mounted. Limitation discarded.")
	}
	if s := h.MemorySwappiness; s != nil && *s != -1 {
		b.warn("Your kernel does not support memory swappiness capabilities or the cgroup is not mounted. Memory swappiness discarded.")
	}
	if d := h.OomKillDisable; d != nil && *d {
		b.warn("Your kernel does not support OomKillDisable. OomKillDisable discarded.")
	}
	if cpus := CPUs(&h.Resources); cpus > 0 {
		b.pod.Resources.CPUs, own.Resources.CPUs = min(int(math.Ceil(cpus)), spec.MaxCPUs), cpus
	}
	own.Resources.CPUShares, own.Resources.OOMScoreAdj = uint64(h.CPUShares), h.OomScoreAdj
	if p := h.PidsLimit; p != nil && *p > 0 {
		own.Resources.Pids = *p
	}
	h.ShmSize = cmp.Or(h.ShmSize, int64(spec.DefaultShmSize))
	own.ShmSize = spec.Bytes(h.ShmSize)
	for _, u := range h.Ulimits {
		own.Ulimits = append(own.Ulimits, spec.Ulimit{Name: u.Name, Soft: u.Soft, Hard: u.Hard})
	}
	for name, value := range h.StorageOpt {
		if name != "size" {
			return dockerhttp.Invalid("--storage-opt %s: only size is known", name)
		}
		n, err := units.RAMInBytes(value)
		if err != nil || n <= 0 {
			return dockerhttp.Invalid("--storage-opt size=%s: no size", value)
		}
		b.pod.Scratch.Size = spec.Bytes(n)
	}
	return nil
}

// checkResources has docker's messages where docker has one (moby daemon/daemon_unix.go, verifyPlatformContainerResources).
func checkResources(r *container.Resources) error {
	const disks = "limits of a disk are its volume's: docker volume create -o iops=…"
	switch {
	case r.Memory < 0, r.Memory > 0 && r.Memory < leastMemory:
		return dockerhttp.Invalid("Minimum memory limit allowed is 6MB")
	case r.Memory > 0 && r.MemorySwap > 0 && r.MemorySwap < r.Memory:
		return dockerhttp.Invalid("Minimum memoryswap limit should be larger than memory limit, see usage")
	case r.Memory == 0 && r.MemorySwap > 0:
		return dockerhttp.Invalid("You should always set the Memory limit when using Memoryswap limit, see usage")
	case r.Memory > 0 && r.MemoryReservation > r.Memory:
		return dockerhttp.Invalid("Minimum memory limit can not be less than memory reservation limit, see usage")
	case r.NanoCPUs > 0 && (r.CPUPeriod > 0 || r.CPUQuota > 0):
		return dockerhttp.Invalid("Conflicting options: Nano CPUs and CPU Period cannot both be set.")
	case r.NanoCPUs < 0 || r.NanoCPUs > spec.MaxCPUs*1e9:
		return dockerhttp.Invalid("Range of CPUs is from 0.01 to %d.00, as there are only %[1]d CPUs available", spec.MaxCPUs)
	case r.CPUPeriod != 0 && (r.CPUPeriod < 1000 || r.CPUPeriod > 1000000):
		return dockerhttp.Invalid("CPU cfs period can not be less than 1ms (i.e. 1000) or larger than 1s (i.e. 1000000)")
	case r.CPUQuota > 0 && r.CPUQuota < 1000:
		return dockerhttp.Invalid("CPU cfs quota can not be less than 1ms (i.e. 1000)")
	case r.CPUShares < 0:
		return dockerhttp.Invalid("invalid CPU shares (%d): value must be a positive integer", r.CPUShares)
	case r.CpusetCpus != "" || r.CpusetMems != "":
		return refused("--cpuset-cpus and --cpuset-mems", "the container's processors are its microVM's: use --cpus")
	case r.CPURealtimePeriod != 0 || r.CPURealtimeRuntime != 0:
		return refused("--cpu-rt-period and --cpu-rt-runtime", "the guest's kernel has no realtime groups")
	case r.BlkioWeight != 0 || len(r.BlkioWeightDevice) > 0:
		return refused("--blkio-weight", disks)
	case len(r.BlkioDeviceReadBps)+len(r.BlkioDeviceWriteBps)+len(r.BlkioDeviceReadIOps)+len(r.BlkioDeviceWriteIOps) > 0:
		return refused("--device-read-bps and its like", disks)
	case r.CPUCount != 0 || r.CPUPercent != 0 || r.IOMaximumIOps != 0 || r.IOMaximumBandwidth != 0:
		return dockerhttp.Invalid("options of Windows containers are not possible for Linux containers")
	}
	return nil
}

// CPUs is the limit in processors, 0 where there is none.
func CPUs(r *container.Resources) float64 {
	if r.CPUQuota > 0 {
		return float64(r.CPUQuota) / float64(cmp.Or(r.CPUPeriod, 100000))
	}
	return float64(r.NanoCPUs) / 1e9
}

// restart gives the guest the rule: it starts the container again in the same machine, with docker's delays.
func (b *builder) restart() error {
	p := &b.host.RestartPolicy
	if err := container.ValidateRestartPolicy(*p); err != nil {
		return dockerhttp.Invalid("%v", err)
	}
	if b.host.AutoRemove && !p.IsNone() {
		return dockerhttp.Invalid("can't create 'AutoRemove' container with restart policy")
	}
	p.Name = cmp.Or(p.Name, container.RestartPolicyDisabled)
	l := &b.own.Lifecycle
	l.Critical = true
	switch {
	case p.IsAlways(), p.IsUnlessStopped():
		l.RestartOnSuccess, l.RestartOnFailure = true, true
	case p.IsOnFailure():
		l.RestartOnFailure = true
		if p.MaximumRetryCount > 0 {
			l.MaxStarts = p.MaximumRetryCount + 1
		}
	}
	return nil
}

// guestDevices are those that the guest has.
var guestDevices = []string{"/dev/net/tun", "/dev/fuse"}

func (b *builder) privileges() error {
	h, own := &b.host, b.own
	own.Privileged, own.ReadOnly = h.Privileged, h.ReadonlyRootfs
	own.CapAdd, own.CapDrop = capabilities(h.CapAdd), capabilities(h.CapDrop)
	own.GroupAdd, own.Sysctls = h.GroupAdd, h.Sysctls
	b.systemPaths()
	for _, o := range h.SecurityOpt {
		name, value, ok := strings.Cut(o, "=")
		if !ok {
			name, value, _ = strings.Cut(o, ":")
		}
		switch {
		case name == "no-new-privileges":
			on, err := strconv.ParseBool(cmp.Or(value, "true"))
			if err != nil {
				return dockerhttp.Invalid("invalid --security-opt 2: %q", o)
			}
			own.NoNewPrivs = on
		case name == "writable-cgroups":
			switch value {
			case "", "true":
				own.WritableCgroups = true
			case "false":
			default:
				return dockerhttp.Invalid("invalid --security-opt 2: %q", o)
			}
		case (name == "seccomp" || name == "apparmor") && value == "unconfined", name == "label" && value == "disable", name == "seccomp" && value == "builtin":
			// It is so: what confines the container is its microVM.
		case name != "seccomp" && name != "apparmor" && name != "label":
			return dockerhttp.Invalid("invalid --security-opt 2: %q", o)
		default:
			return refused("--security-opt "+o, "the guest's kernel has neither AppArmor nor SELinux, and seccomp profiles can't be chosen; the microVM is what confines the container")
		}
	}
	for _, d := range h.Devices {
		inside := cmp.Or(d.PathInContainer, d.PathOnHost)
		if d.PathOnHost != inside || !slices.Contains(guestDevices, inside) {
			return refused("--device "+d.PathOnHost, "devices of the node can't be given to a microVM; of its own it has "+strings.Join(guestDevices, " and "))
		}
		own.Devices = append(own.Devices, inside)
	}
	return nil
}

// Docker's paths that a container sees nothing of, or can't write to (moby daemon/pkg/oci/defaults.go).
var (
	maskedPaths = []string{
		"/proc/asound", "/proc/acpi", "/proc/interrupts", "/proc/kcore", "/proc/keys", "/proc/latency_stats", "/proc/timer_list", "/proc/timer_stats",
		"/proc/sched_debug", "/proc/scsi", "/sys/firmware", "/sys/devices/virtual/powercap",
	}
	readonlyPaths = []string{"/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"}
)

// systemPaths gives the pod the lists of docker run --security-opt systempaths=unconfined and its like; the defaults are the guest's own.
func (b *builder) systemPaths() {
	h, own := &b.host, b.own
	if h.MaskedPaths != nil {
		own.MaskedPaths = &h.MaskedPaths
	} else if !h.Privileged {
		h.MaskedPaths = maskedPaths
	}
	if h.ReadonlyPaths != nil {
		own.ReadonlyPaths = &h.ReadonlyPaths
	} else if !h.Privileged {
		h.ReadonlyPaths = readonlyPaths
	}
}

func capabilities(names []string) []string {
	var out []string
	for _, n := range names {
		out = append(out, strings.TrimPrefix(strings.ToUpper(n), "CAP_"))
	}
	return out
}

// logs takes the options of docker's two log drivers that docker logs works with.
func (b *builder) logs() error {
	c := &b.host.LogConfig
	c.Type = cmp.Or(c.Type, "json-file")
	if c.Type != "json-file" && c.Type != "local" {
		return refused("--log-driver "+c.Type, "the pod keeps the output, for docker logs: json-file and local are the same")
	}
	size, files := int64(0), 1
	for name, value := range c.Config {
		var err error
		switch name {
		case "max-size":
			if size, err = units.RAMInBytes(value); err == nil && size <= 0 {
				err = fmt.Errorf("%s is no size", value)
			}
		case "max-file":
			if files, err = strconv.Atoi(value); err == nil && (files <= 0 || files > 1000) {
				err = fmt.Errorf("%s is no number of files", value)
			}
		case "compress", "mode", "labels", "labels-regex", "env", "env-regex", "tag", "max-buffer-size":
			// How docker writes its files: there are none.
		default:
			return dockerhttp.Invalid("unknown log opt '%s' for %s log driver", name, c.Type)
		}
		if err != nil {
			return dockerhttp.Invalid("invalid log opt %s: %v", name, err)
		}
	}
	if size > 0 {
		b.own.Logs.MaxSize = spec.Bytes(min(size, math.MaxInt64/int64(files)) * int64(files))
	}
	return nil
}

// zoneRule is that of a CSI topology's values, which zones are.
var zoneRule = regexp.MustCompile(`^[a-zA-Z0-9][a-zA-Z0-9_.-]{0,62}$`)

// labels reads those that mean something here, beside what they are to others.
func (b *builder) labels() error {
	for name, value := range b.config.Labels {
		switch {
		case !strings.HasPrefix(name, "kr."):
		case name == "kr.zone":
			if b.zone = value; !zoneRule.MatchString(value) {
				return dockerhttp.Invalid("label %s=%s: a zone is letters, digits, _ . and -, at most 63", name, value)
			}
		case name == "kr.res.mem":
			n, err := spec.ParseBytes(value)
			if err != nil || n < spec.MinMemory || n > spec.MaxMemory {
				return dockerhttp.Invalid("label %s=%s: a size from %s to %s, such as 512MiB", name, value, spec.Bytes(spec.MinMemory), spec.Bytes(spec.MaxMemory))
			}
			if b.host.Memory == 0 {
				b.pod.Resources.Memory = n
			}
		case name == "kr.res.cpu":
			n, err := strconv.ParseFloat(value, 64)
			if err != nil || n < 0.01 || n > spec.MaxCPUs {
				return dockerhttp.Invalid("label %s=%s: a number of processors from 0.01 to %d", name, value, spec.MaxCPUs)
			}
			if CPUs(&b.host.Resources) == 0 {
				b.pod.Resources.CPUs, b.own.Resources.CPUs = int(math.Ceil(n)), n
			}
		case strings.HasPrefix(name, "kr.ingress."), name == "kr.res.snp", name == "kr.network.policy":
			return dockerhttp.Errorf(http.StatusNotImplemented, "label %s is not supported yet: leave it out", name)
		default:
			return dockerhttp.Invalid("label %s: of those that begin with kr. there are kr.zone, kr.res.mem and kr.res.cpu", name)
		}
	}
	if len(b.config.Labels) > 0 {
		b.own.Labels = b.config.Labels
	}
	return nil
}

func (b *builder) network() error {
	h, n := &b.host, &b.pod.Network
	switch mode := h.NetworkMode; {
	case mode.IsHost():
		return refused("--network host", "a microVM has a network of its own: publish the ports with -p")
	case mode.IsContainer():
		return b.join()
	case mode.IsNone():
		n.Mode = None
	case mode == "" || mode.IsDefault():
		h.NetworkMode = Bridge
	}
	if err := b.endpoints(); err != nil {
		return err
	}
	for _, a := range h.DNS {
		n.DNS = append(n.DNS, a.String())
	}
	n.DNSSearch, n.DNSOptions = h.DNSSearch, h.DNSOptions
	for _, e := range h.ExtraHosts {
		name, address, ok := strings.Cut(e, "=")
		if !ok {
			name, address, ok = strings.Cut(e, ":")
		}
		address = strings.Trim(address, "[]")
		if !ok || name == "" {
			return dockerhttp.Invalid("bad format for add-host: %q", e)
		}
		if address == "host-gateway" {
			return refused("--add-host "+e, "a pod's node is not to be reached from it")
		}
		if _, err := netip.ParseAddr(address); err != nil {
			return dockerhttp.Invalid("invalid IP address in add-host: %q", address)
		}
		n.ExtraHosts = append(n.ExtraHosts, spec.HostEntry{Name: name, Address: address})
	}
	return b.ports()
}

// endpoints are the container's places on networks: that of its mode at least.
func (b *builder) endpoints() error {
	all := map[string]*network.EndpointSettings{}
	for name, e := range b.networks {
		if err := Endpoint(name, e); err != nil {
			return err
		}
		if container.NetworkMode(name).IsDefault() {
			name = Bridge
		}
		if e == nil {
			e = &network.EndpointSettings{}
		}
		if mac := e.MacAddress.String(); mac != "" {
			if own := &b.pod.Network.MAC; *own != "" && *own != mac {
				return dockerhttp.Invalid("a container has one interface for all of its networks, and one address of it: %s or %s", *own, mac)
			}
			b.pod.Network.MAC = mac
		}
		all[name] = e
	}
	own := string(b.host.NetworkMode)
	if all[own] == nil {
		all[own] = &network.EndpointSettings{}
	}
	if b.networks = all; len(all) > 1 && all[None] != nil {
		return dockerhttp.Invalid("conflicting options: cannot attach a container to no network (none) and to another one")
	}
	return nil
}

// ports are published by the node: a fixed one, or one that Nomad chooses.
func (b *builder) ports() error {
	h := &b.host
	if h.NetworkMode.IsNone() {
		return nil // docker says nothing either
	}
	all := make([]network.Port, 0, len(h.PortBindings))
	for p := range h.PortBindings {
		all = append(all, p)
	}
	if h.PublishAllPorts {
		for p := range b.config.ExposedPorts {
			if _, ok := h.PortBindings[p]; !ok {
				all = append(all, p)
			}
		}
	}
	slices.SortFunc(all, func(a, b network.Port) int {
		return cmp.Or(cmp.Compare(a.Num(), b.Num()), cmp.Compare(a.Proto(), b.Proto()))
	})
	for _, p := range all {
		bindings := h.PortBindings[p]
		if len(bindings) == 0 {
			bindings = []network.PortBinding{{}}
		}
		for _, binding := range bindings {
			publish, last, err := published(p, binding)
			if err != nil {
				return err
			}
			if publish == nil {
				continue
			}
			if last > publish.HostPort {
				if b.ranges == nil {
					b.ranges = map[int]PortRange{}
				}
				b.ranges[len(b.pod.Network.Publish)] = PortRange{publish.HostPort, last}
			} else if b.takes(publish) {
				return dockerhttp.Invalid("port %d is published twice: a container has each port of its node once, for tcp and udp", publish.HostPort)
			}
			b.pod.Network.Publish = append(b.pod.Network.Publish, *publish)
		}
	}
	return nil
}

// takes says whether a port of the node is published already, other than with its other protocol.
func (b *builder) takes(p *spec.Publish) bool {
	return p.HostPort != 0 && slices.ContainsFunc(b.pod.Network.Publish, func(o spec.Publish) bool {
		return o.HostPort == p.HostPort && (o.Port != p.Port || o.HostIP != p.HostIP || o.Protocol == p.Protocol)
	})
}

// published is one binding, and the last port of a range that begins with its HostPort; nil for [::], which goes with 0.0.0.0.
func published(p network.Port, binding network.PortBinding) (out *spec.Publish, last uint16, err error) {
	out = &spec.Publish{Port: p.Num()}
	switch p.Proto() {
	case network.TCP:
	case network.UDP:
		out.Protocol = "udp"
	default:
		return nil, 0, refused("-p "+p.String(), "tcp and udp can be published")
	}
	if text := binding.HostPort; text != "" && text != "0" {
		from, to, isRange := strings.Cut(text, "-")
		if !isRange {
			to = from
		}
		first, err := strconv.ParseUint(from, 10, 16)
		end, err2 := strconv.ParseUint(to, 10, 16)
		if err != nil || err2 != nil || first == 0 || end < first {
			return nil, 0, dockerhttp.Invalid("invalid port specification: %q", text)
		}
		out.HostPort, last = uint16(first), uint16(end)
	}
	switch ip := binding.HostIP; {
	case !ip.IsValid(), ip.Is4() && ip.IsUnspecified():
		out.HostIP = netip.IPv4Unspecified().String()
	case ip.IsUnspecified():
		return nil, 0, nil
	case ip.Is6():
		return nil, 0, refused("-p ["+ip.String()+"]:"+binding.HostPort+":"+p.String(), "ports are published at IPv4 addresses")
	default:
		out.HostIP = ip.String()
	}
	return out, last, nil
}

// short makes a name of a path.
func short(p string) string {
	sum := sha256.Sum256([]byte(p))
	return hex.EncodeToString(sum[:6])
}
