package driver

import (
	"errors"
	"fmt"
	"maps"
	"math"
	"net/netip"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/hashicorp/nomad/client/allocdir"
	"github.com/hashicorp/nomad/plugins/drivers"

	"github.com/cradlestack/cradlestack/spec"
)

// A host is what podOf has to know of the client.
type host struct {
	cores   cores
	disk    spec.Bytes // default size of scratch disks
	variant string     // of the boot package
	// examine tells what is at a path: a directory, a file, or a block device; a raw image is given to a pod as a block device where Nomad
	// mounts it as one.
	examine func(path string) (pathKind, error)
	// direct is the record of a volume that is left to the guest, nil where there is none for a path.
	direct func(path string) (*spec.DirectAttachment, error)
	// fsType tells which file system a guest finds on a block device.
	fsType func(path string) (string, error)
	// allowed says why a task may not mount a directory of the host, nil where it may.
	allowed func(path string) error
	// within finds a path below a directory that tasks write to, without being led out of it.
	within func(root, path string) (string, error)
	// readEnv reads a file of environment variables below a directory that tasks write to.
	readEnv func(root, path string) ([]string, error)
}

type pathKind int

const (
	aDirectory pathKind = iota
	aFile
	aBlockDevice
)

// podOf turns a task into a pod. Its first container is the task's own and has the task's name. Errors name the key of the task's
// configuration.
func podOf(t *drivers.TaskConfig, c *taskConfig, h *host) (*spec.Pod, error) {
	p, _, err := attachedPodOf(t, c, h)
	return p, err
}

// attachedPodOf is podOf, and tells which of the pod's volumes are left to it by the CSI plugin.
func attachedPodOf(t *drivers.TaskConfig, c *taskConfig, h *host) (*spec.Pod, []attachment, error) {
	b := builder{task: t, config: c, host: h, pod: &spec.Pod{Name: nameOf(t.Name)}}
	b.resources()
	b.network()
	b.scratch()
	b.names()
	b.ownContainer()
	for _, name := range slices.Sorted(maps.Keys(c.Containers)) {
		b.container(name, c.Containers[name])
	}
	if err := errors.Join(b.errs...); err != nil {
		return nil, nil, err
	}
	if err := b.pod.Validate(); err != nil {
		return nil, nil, translate(b.pod, err)
	}
	return b.pod, b.attached, nil
}

// A builder makes a pod, and a list of what is wrong.
type builder struct {
	task   *drivers.TaskConfig
	config *taskConfig
	host   *host
	pod    *spec.Pod
	errs   []error

	attached []attachment
}

func (b *builder) wrong(key, format string, args ...any) {
	b.errs = append(b.errs, fmt.Errorf("%s: %s", key, fmt.Sprintf(format, args...)))
}

func (b *builder) size(key, s string) spec.Bytes {
	if s == "" {
		return 0
	}
	n, err := spec.ParseBytes(s)
	if err != nil {
		b.wrong(key, "%v", err)
	}
	return n
}

// integer reads a number without a fraction.
func (b *builder) integer(key, s string, least, most int64) int64 {
	if s == "" {
		return 0
	}
	n, err := strconv.ParseInt(s, 10, 64)
	if err != nil || n < least || n > most {
		b.wrong(key, "%q is no whole number from %d to %d", s, least, most)
		return 0
	}
	return n
}

// fraction reads a number that may have one.
func (b *builder) fraction(key, s string) float64 {
	if s == "" {
		return 0
	}
	n, err := strconv.ParseFloat(s, 64)
	if err != nil || !(n >= 0) || math.IsInf(n, 1) {
		b.wrong(key, "%q is no number from 0 on", s)
	}
	return n
}

func (b *builder) duration(key, s string) spec.Duration {
	d, err := parseDuration(s, 0)
	if err != nil {
		b.wrong(key, "%v", err)
	}
	return spec.Duration(d)
}

// resources makes the machine: as many processors as the task's share of the client needs, or as it has cores of its own; and the memory that
// the task may use at most.
func (b *builder) resources() {
	r := b.task.Resources
	if r == nil || r.NomadResources == nil {
		return
	}
	b.pod.Resources.CPUs = processors(len(r.NomadResources.Cpu.ReservedCores), r.NomadResources.Cpu.CpuShares, b.host.cores)
	if n := b.integer("vcpus", b.config.VCPUs, 0, spec.MaxCPUs); n > 0 {
		b.pod.Resources.CPUs = int(n)
		if b.host.cores.count > 0 {
			b.pod.Resources.CPUs = min(int(n), b.host.cores.count)
		}
	}
	if r.NomadResources.Memory.MemoryMaxMB < 0 {
		b.wrong("resources.memory_max", "a microVM has a size, and can't be without a limit: name the most that the task may use")
	}
	memory := max(r.NomadResources.Memory.MemoryMB, r.NomadResources.Memory.MemoryMaxMB)
	b.pod.Resources.Memory = spec.Bytes(memory) << 20
}

// processors is the number of a machine's.
func processors(reserved int, mhz int64, c cores) int {
	n := reserved
	if n == 0 && c.mhz > 0 {
		n = int(math.Ceil(float64(mhz)/c.mhz - 0.01)) // what is a core by the client's rounded figures is one
	}
	if c.count > 0 {
		n = min(n, c.count)
	}
	return min(max(n, 1), spec.MaxCPUs)
}

func (b *builder) scratch() {
	b.pod.Scratch.Size = b.host.disk
	if b.config.Disk != "" {
		b.pod.Scratch.Size = b.size("disk", b.config.Disk)
	}
	if id := b.config.ID; id != "" && !isPodID(id) {
		b.wrong("id", "%q is no pod's id: 64 lower-case hexadecimal digits", id)
	}
	if id := b.config.DiskID; id != "" && !isDiskID(id) {
		b.wrong("disk_id", "%q is no id: 1 to 64 letters, digits, _ . and -, a letter or digit first", id)
	}
	if b.config.DiskAction != "" && b.config.DiskAction != diskUse {
		b.wrong("disk_action", "%q is none of %s, %s, %s", b.config.DiskAction, diskUse, diskList, diskRemove)
	}
	if v := b.config.Variant; v != "" && v != b.host.variant {
		if v == "snp" {
			b.wrong("variant", "snp is not supported yet: leave it out")
		} else {
			b.wrong("variant", "this client's boot package is variant %s: leave it out, or constrain the job to clients whose driver.cradle.boot.variant is %s", b.host.variant, v)
		}
	}
	if _, err := parseDuration(b.config.PullTimeout, 0); err != nil {
		b.wrong("image_pull_timeout", "%v", err)
	}
}

func isPodID(id string) bool {
	return len(id) == 64 && strings.Trim(id, "0123456789abcdef") == ""
}

func isDiskID(id string) bool {
	if id == "" || len(id) > 64 {
		return false
	}
	for i, r := range id {
		switch {
		case r >= 'a' && r <= 'z', r >= 'A' && r <= 'Z', r >= '0' && r <= '9':
		case i > 0 && strings.ContainsRune("_.-", r):
		default:
			return false
		}
	}
	return true
}

func (b *builder) network() {
	n := &b.pod.Network
	b.pod.Hostname = b.config.Hostname
	if mode := b.config.NetworkMode; mode != "" && mode != "none" {
		b.wrong("network_mode", "%q: none, or nothing", mode)
	}
	if i := b.task.NetworkIsolation; i != nil && i.Path != "" {
		if b.config.NetworkMode != "" {
			b.wrong("network_mode", "the group has a network, which is the pod's: leave the group's network block out")
		}
		n.Mode, n.Netns = "netns", i.Path
		n.Upstreams, n.OnLink = b.upstreams(), b.onLink()
		if i.HostsConfig != nil && b.pod.Hostname == "" {
			b.pod.Hostname = i.HostsConfig.Hostname
		}
	} else if b.config.NetworkMode == "none" {
		n.Mode = "none"
		if len(b.config.Ports) > 0 || len(b.config.Upstreams) > 0 {
			b.wrong("network_mode", "ports and upstreams need a network")
		}
	} else {
		n.Mode = "user"
		b.publish()
		if len(b.config.Upstreams) > 0 {
			b.wrong("upstreams", "the other tasks' 127.0.0.1 is the host's, where a microVM doesn't get: set mode = \"bridge\" in the group's network block")
		}
	}
	for i, label := range b.config.Ports {
		if _, ok := b.ports()[label]; !ok {
			b.wrong(fmt.Sprintf("ports[%d]", i), "the group's network has no port %q", label)
		}
	}
	for _, label := range slices.Sorted(maps.Keys(b.config.HostIPs)) {
		if n.Mode == "netns" {
			continue // onLink has looked at it
		}
		if !slices.Contains(b.config.Ports, label) {
			b.wrong("host_ips."+label, "is no port that is forwarded to the pod")
		} else if _, err := netip.ParseAddr(b.config.HostIPs[label]); err != nil {
			b.wrong("host_ips."+label, "%q is no IP address: write one of the host's", b.config.HostIPs[label])
		}
	}
	if dns := b.task.DNS; dns != nil {
		n.DNS, n.DNSSearch, n.DNSOptions = dns.Servers, dns.Searches, dns.Options
	}
	for _, own := range []struct {
		list []string
		into *[]string
	}{{b.config.DNSServers, &n.DNS}, {b.config.DNSSearch, &n.DNSSearch}, {b.config.DNSOptions, &n.DNSOptions}} {
		if own.list != nil {
			*own.into = own.list
		}
	}
	n.MAC = b.config.MACAddress
	for i, e := range b.config.ExtraHosts {
		name, address, ok := strings.Cut(e, ":")
		if !ok || name == "" || address == "" {
			b.wrong(fmt.Sprintf("extra_hosts[%d]", i), "%q is no entry: write name:address", e)
			continue
		}
		n.ExtraHosts = append(n.ExtraHosts, spec.HostEntry{Name: name, Address: strings.Trim(address, "[]")})
	}
}

// names gives the pod the directory of the file whose names it answers for: a template replaces the file itself.
func (b *builder) names() {
	if b.config.NamesFile == "" {
		return
	}
	dir, file := filepath.Split(filepath.Clean(b.config.NamesFile))
	if !filepath.IsLocal(b.config.NamesFile) || dir == "" {
		b.wrong("names_file", "%q is no file in a directory of the task: write local/names/hosts", b.config.NamesFile)
		return
	}
	at, err := b.host.within(b.task.AllocDir, filepath.Join(b.task.Name, dir))
	if err != nil {
		b.wrong("names_file", "%v", err)
		return
	}
	volume := b.unusedName("names")
	b.pod.Volumes = append(b.pod.Volumes, spec.Volume{Name: volume, Directory: &spec.DirectoryVolume{Path: at, ReadOnly: true}})
	b.pod.Network.Names = volume + "/" + file
}

// upstreams are the ports that the task names, and those of the group's connect blocks: Nomad tells them by the environment (client/taskenv
// buildUpstreamsEnv), and the mesh's proxy listens there in the group's network namespace.
func (b *builder) upstreams() (ports []uint16) {
	for i, u := range b.config.Upstreams {
		port, err := strconv.ParseUint(u, 10, 16)
		if err != nil {
			b.wrong(fmt.Sprintf("upstreams[%d]", i), "%q is no port: 1 to 65535", u)
			continue
		}
		ports = append(ports, uint16(port))
	}
	for name, value := range b.task.Env {
		if port, err := strconv.ParseUint(value, 10, 16); err == nil && strings.HasPrefix(name, "NOMAD_UPSTREAM_PORT_") {
			ports = append(ports, uint16(port))
		}
	}
	slices.Sort(ports)
	return slices.Compact(ports)
}

// onLink are the ports that are to be at the host's 127.0.0.1 alone. CNI publishes at all of the host's addresses; connections to 127.0.0.1 come from the
// bridge, and others from outside of the pod's network.
func (b *builder) onLink() (ports []uint16) {
	inside := map[int]string{}
	allocated := b.ports()
	for _, label := range slices.Sorted(maps.Keys(allocated)) {
		if _, ok := b.config.HostIPs[label]; !ok {
			inside[allocated[label].inside()] = label
		}
	}
	for _, label := range slices.Sorted(maps.Keys(b.config.HostIPs)) {
		p, ok := allocated[label]
		open, both := inside[p.inside()]
		switch {
		case !ok:
			b.wrong("host_ips."+label, "the group's network has no port %q", label)
		case b.config.HostIPs[label] != "127.0.0.1":
			b.wrong("host_ips."+label, "%q: a port of a group network in mode bridge is at all addresses of its host, or at 127.0.0.1", b.config.HostIPs[label])
		case both:
			b.wrong("host_ips."+label, "the pod's port %d is at all addresses of the host as port %q: in a group network in mode bridge it is there, or at 127.0.0.1 alone", p.inside(), open)
		default:
			ports = append(ports, uint16(p.inside()))
		}
	}
	slices.Sort(ports)
	return slices.Compact(ports)
}

// publish forwards the ports that the task names, in a group whose network is the host's: a machine can't be in that.
func (b *builder) publish() {
	allocated := b.ports()
	if b.config.Ports == nil && len(allocated) > 0 {
		b.wrong("network", "the group's ports are in network mode host, where a microVM can't be: set mode = \"bridge\" in the group's network block, or name the ports that are to be forwarded to the pod in ports ([] for none)")
		return
	}
	for i, label := range b.config.Ports {
		p, ok := allocated[label]
		if !ok {
			continue // network has said so
		}
		if ip, ok := b.config.HostIPs[label]; ok {
			p.HostIP = ip
		}
		for _, protocol := range []string{"tcp", "udp"} {
			publish := spec.Publish{HostIP: p.HostIP, HostPort: uint16(p.Value), Port: uint16(p.inside()), Protocol: protocol}
			if strings.Contains(p.HostIP, ":") {
				b.wrong(fmt.Sprintf("ports[%d]", i), "%s is on an IPv6 address of the host, and only a group network in mode bridge has IPv6", label)
				break
			}
			b.pod.Network.Publish = append(b.pod.Network.Publish, publish)
		}
	}
}

// A port is one that Nomad has allocated: Value on the host, To in the task.
type port struct {
	Value, To int
	HostIP    string
}

// inside is the port in the task.
func (p port) inside() int {
	if p.To <= 0 {
		return p.Value
	}
	return p.To
}

func (b *builder) ports() map[string]port {
	m := map[string]port{}
	if r := b.task.Resources; r != nil && r.Ports != nil {
		for _, p := range *r.Ports {
			m[p.Label] = port{p.Value, p.To, p.HostIP}
		}
	}
	return m
}

// ownContainer is the task's.
func (b *builder) ownContainer() {
	cfg := &b.config.containerConfig
	if cfg.Image == "" {
		b.wrong("image", "is missing: name one, such as debian:12")
	}
	c := b.newContainer("", b.pod.Name, cfg)
	for _, name := range slices.Sorted(maps.Keys(b.task.Env)) {
		if !b.config.Bare || !strings.HasPrefix(name, "NOMAD_") {
			c.Env = append(c.Env, name+"="+b.task.Env[name])
		}
	}
	c.Env = append(c.Env, b.envFile("", cfg)...)
	if b.task.User != "" {
		if c.User != "" && c.User != b.task.User {
			b.wrong("user", "is %q, and the task's own user is %q: write it once", c.User, b.task.User)
		}
		c.User = b.task.User
	}
	c.Domainname = b.config.Domainname
	c.Lifecycle.Critical = cfg.Lifecycle == nil || enabled(cfg.Lifecycle.Critical, true)
	c.Resources.Memory = b.pod.Resources.Memory
	if len(b.task.Devices) > 0 {
		b.wrong("device", "%s can't be given to a microVM: use another driver for tasks with host devices", b.task.Devices[0].HostPath)
	}
	b.taskDirs(c)
	b.taskMounts(c)
	b.ownMounts("", c, cfg)
	b.pod.Containers = append(b.pod.Containers, *c)
}

// envFile is what a file of the task has for a container's environment.
func (b *builder) envFile(at string, cfg *containerConfig) []string {
	if cfg.EnvFile == "" {
		return nil
	}
	env, err := b.host.readEnv(b.task.TaskDir().Dir, cfg.EnvFile)
	if err != nil {
		b.wrong(at+"env_file", "%v", err)
	}
	return env
}

// container is a further one.
func (b *builder) container(name string, cfg *containerConfig) {
	at := fmt.Sprintf("container %q: ", name)
	if name != nameOf(name) {
		b.wrong(at+"name", "%q is no container's name: letters, digits, _ . and -, a letter or digit first", name)
	}
	if name == b.pod.Name {
		b.wrong(at+"name", "is the task's own container's: choose another")
	}
	c := b.newContainer(at, name, cfg)
	for _, name := range slices.Sorted(maps.Keys(b.task.Env)) {
		if _, own := cfg.Env[name]; !b.config.Bare && strings.HasPrefix(name, "NOMAD_") && !own {
			c.Env = append(c.Env, name+"="+b.task.Env[name])
		}
	}
	for _, name := range slices.Sorted(maps.Keys(cfg.Env)) {
		c.Env = append(c.Env, name+"="+cfg.Env[name])
	}
	c.Env = append(c.Env, b.envFile(at, cfg)...)
	c.StopSignal = cfg.StopSignal
	c.Lifecycle.Critical = cfg.Lifecycle != nil && enabled(cfg.Lifecycle.Critical, false)
	c.Resources.Memory = b.size(at+"memory", cfg.Memory)
	b.taskDirs(c)
	b.ownMounts(at, c, cfg)
	b.pod.Containers = append(b.pod.Containers, *c)
}

// newContainer is what all containers have in common. at is what goes before a key's name in errors.
func (b *builder) newContainer(at, name string, cfg *containerConfig) *spec.PodContainer {
	c := &spec.PodContainer{Name: name, Image: cfg.Image, User: cfg.User, WorkingDir: cfg.WorkDir}
	if cfg.Entrypoint != nil {
		c.Entrypoint = &cfg.Entrypoint
	}
	var command []string
	if cfg.Command != "" {
		command = append(command, cfg.Command)
	}
	if command = append(command, cfg.Args...); len(command) > 0 {
		c.Command = &command
	}
	c.Settings = spec.Settings{
		Labels: cfg.Labels, GroupAdd: cfg.GroupAdd, TTY: cfg.TTY, OpenStdin: cfg.Interactive, StdinOnce: cfg.StdinOnce, Init: cfg.Init, ReadOnly: cfg.ReadonlyRootfs,
		Privileged: cfg.Privileged, CapAdd: capabilities(cfg.CapAdd), CapDrop: capabilities(cfg.CapDrop), NoNewPrivs: cfg.NoNewPrivileges,
		WritableCgroups: cfg.WritableCgroups, Sysctls: cfg.Sysctl, ShmSize: b.size(at+"shm_size", cfg.ShmSize), Devices: cfg.Devices,
		Resources: spec.Limits{
			CPUs: b.fraction(at+"cpus", cfg.CPUs), Pids: b.integer(at+"pids_limit", cfg.PidsLimit, -1, math.MaxInt64),
			CPUShares: uint64(b.integer(at+"cpu_shares", cfg.CPUShares, 0, math.MaxInt64)), OOMScoreAdj: int(b.integer(at+"oom_score_adj", cfg.OOMScoreAdj, -1000, 1000)),
		},
		Logs: spec.Logs{MaxSize: b.size(at+"log_size", cfg.LogSize)},
	}
	if cfg.MaskedPaths != nil {
		c.MaskedPaths = &cfg.MaskedPaths
	}
	if cfg.ReadonlyPaths != nil {
		c.ReadonlyPaths = &cfg.ReadonlyPaths
	}
	for i, t := range cfg.Tmpfs {
		target, options, _ := strings.Cut(t, ":")
		if _, twice := c.Tmpfs[target]; twice {
			b.wrong(fmt.Sprintf("%stmpfs[%d]", at, i), "%s is there twice", target)
		}
		c.Tmpfs = with(c.Tmpfs, target, options)
	}
	for _, name := range slices.Sorted(maps.Keys(cfg.Ulimit)) {
		l, err := ulimit(name, cfg.Ulimit[name])
		if err != nil {
			b.wrong(at+"ulimit."+name, "%v", err)
		}
		c.Ulimits = append(c.Ulimits, l)
	}
	if h := cfg.Healthcheck; h != nil {
		c.Healthcheck = &spec.Healthcheck{
			Test: h.Test, Retries: int(b.integer(at+"healthcheck.retries", h.Retries, 0, math.MaxInt32)), Interval: b.duration(at+"healthcheck.interval", h.Interval), Timeout: b.duration(at+"healthcheck.timeout", h.Timeout),
			StartPeriod: b.duration(at+"healthcheck.start_period", h.StartPeriod), StartInterval: b.duration(at+"healthcheck.start_interval", h.StartInterval),
		}
	}
	if l := cfg.Lifecycle; l != nil {
		c.Lifecycle = spec.Lifecycle{
			RestartOnSuccess: l.RestartOnSuccess, RestartOnFailure: l.RestartOnFailure, MaxStarts: int(b.integer(at+"lifecycle.max_starts", l.MaxStarts, 0, math.MaxInt32)),
			RestartDelay: b.duration(at+"lifecycle.restart_delay", l.RestartDelay), Hold: b.duration(at+"lifecycle.hold", l.Hold),
		}
		for _, a := range l.After {
			c.Lifecycle.After = append(c.Lifecycle.After, spec.After{Container: a.Container, Until: a.Until})
		}
	}
	return c
}

func with(m map[string]string, name, value string) map[string]string {
	if m == nil {
		m = map[string]string{}
	}
	m[name] = value
	return m
}

// capabilities are written as users of Nomad's other drivers do: net_admin, CAP_NET_ADMIN, all.
func capabilities(names []string) []string {
	var out []string
	for _, n := range names {
		out = append(out, strings.TrimPrefix(strings.ToUpper(n), "CAP_"))
	}
	return out
}

// ulimit reads docker's form, soft:hard.
func ulimit(name, s string) (spec.Ulimit, error) {
	soft, hard, both := strings.Cut(s, ":")
	if !both {
		hard = soft
	}
	l := spec.Ulimit{Name: name}
	var err error
	if l.Soft, err = strconv.ParseInt(soft, 10, 64); err == nil {
		l.Hard, err = strconv.ParseInt(hard, 10, 64)
	}
	if err != nil {
		return l, fmt.Errorf("%q is no limit: write SOFT:HARD, or one number", s)
	}
	return l, nil
}

// taskDirs are the directories that Nomad has for every task.
func (b *builder) taskDirs(c *spec.PodContainer) {
	if b.task.AllocDir == "" || b.config.Bare {
		return
	}
	dir := b.task.TaskDir()
	for _, d := range []struct{ name, path, target string }{
		{"alloc", dir.SharedAllocDir, allocdir.SharedAllocContainerPath},
		{"local", dir.LocalDir, allocdir.TaskLocalContainerPath},
		{"secrets", dir.SecretsDir, allocdir.TaskSecretsContainerPath},
	} {
		if !b.hasVolume(d.name) {
			b.pod.Volumes = append(b.pod.Volumes, spec.Volume{Name: d.name, Directory: &spec.DirectoryVolume{Path: d.path}})
		}
		c.Mounts = append(c.Mounts, spec.Mount{Volume: d.name, Path: d.target, NoCopy: true})
	}
}

func (b *builder) hasVolume(name string) bool {
	return slices.ContainsFunc(b.pod.Volumes, func(v spec.Volume) bool { return v.Name == name })
}

// taskMounts are what Nomad mounts: host volumes, CSI volumes.
func (b *builder) taskMounts(c *spec.PodContainer) {
	for _, m := range b.task.Mounts {
		target := path.Join("/", m.TaskPath)
		at := "volume_mount " + target
		switch m.PropagationMode {
		case "", "private":
		default:
			b.wrong(at+": propagation_mode", "%s is not possible between a host and a microVM: use private", m.PropagationMode)
		}
		direct, err := b.host.direct(m.HostPath)
		if err != nil {
			b.wrong(at, "%v", err)
			continue
		}
		if direct != nil {
			b.attach(c, m, target, direct)
			made := &c.Mounts[len(c.Mounts)-1]
			made.NoCopy, made.Subpath = slices.Contains(b.config.NotCopied, target), b.config.Subpaths[target]
			continue
		}
		kind, err := b.host.examine(m.HostPath)
		if err != nil {
			b.wrong(at, "%v", err)
			continue
		}
		if kind == aBlockDevice {
			b.blockMount(at, c, m, target)
			continue
		}
		name := b.unusedName(nameOf(strings.TrimPrefix(target, "/")))
		fill := slices.Contains(b.config.Copied, target)
		b.pod.Volumes = append(b.pod.Volumes, spec.Volume{Name: name, Directory: &spec.DirectoryVolume{Path: m.HostPath, ReadOnly: m.Readonly, Fill: fill}})
		c.Mounts = append(c.Mounts, spec.Mount{Volume: name, Path: target, ReadOnly: m.Readonly, NoCopy: !fill, Subpath: b.config.Subpaths[target]})
	}
	for key, targets := range map[string][]string{
		"volume_copy": b.config.Copied, "volume_no_copy": b.config.NotCopied, "volume_subpath": slices.Sorted(maps.Keys(b.config.Subpaths)),
	} {
		for _, target := range targets {
			if !slices.ContainsFunc(b.task.Mounts, func(m *drivers.MountConfig) bool { return path.Join("/", m.TaskPath) == target }) {
				b.wrong(key, "%s is no destination of a volume_mount", target)
			}
		}
	}
}

// rawDevices is where raw block devices appear in a container, by their volumes' names.
const rawDevices = "/dev/volumes/"

// blockMount gives the machine a block device: its file system is mounted in the guest, or, below /dev, the device itself is there.
func (b *builder) blockMount(at string, c *spec.PodContainer, m *drivers.MountConfig, target string) {
	found, err := b.host.fsType(m.HostPath)
	if err != nil {
		b.wrong(at, "%v", err)
		return
	}
	block := &spec.BlockVolume{Path: m.HostPath, FSType: found, ReadOnly: m.Readonly}
	b.put(c, spec.Volume{Block: block}, spec.Mount{Path: target, Raw: strings.HasPrefix(target, "/dev/"), ReadOnly: m.Readonly, Subpath: b.config.Subpaths[target]})
}

// put gives the volume a name, and the container the mount of it. A raw device is at the path where that is below /dev, else at /dev/volumes/NAME.
func (b *builder) put(c *spec.PodContainer, v spec.Volume, m spec.Mount) (name string) {
	v.Name = b.unusedName(nameOf(strings.TrimPrefix(strings.TrimPrefix(m.Path, rawDevices), "/")))
	if m.Volume = v.Name; m.Raw && (m.Path == rawDevices+v.Name || !strings.HasPrefix(m.Path, "/dev/")) {
		m.Path = ""
	}
	b.pod.Volumes = append(b.pod.Volumes, v)
	c.Mounts = append(c.Mounts, m)
	return v.Name
}

// attach gives the machine a volume that the CSI plugin has left to it.
func (b *builder) attach(c *spec.PodContainer, m *drivers.MountConfig, target string, d *spec.DirectAttachment) {
	v := d.Volume
	a := attachment{ID: v.Name, Raw: d.Raw, Limits: d.Limits, Control: d.Control}
	if v.Block != nil {
		block := *v.Block
		block.ReadOnly = block.ReadOnly || m.Readonly
		if v.Block = &block; !block.ReadOnly {
			a.Path = block.Path
		}
	}
	if v.NFS != nil {
		nfs := *v.NFS
		nfs.ReadOnly = nfs.ReadOnly || m.Readonly
		v.NFS = &nfs
	}
	if v.Ceph != nil {
		ceph := *v.Ceph
		ceph.ReadOnly = ceph.ReadOnly || m.Readonly
		v.Ceph = &ceph
	}
	a.Volume = b.put(c, v, spec.Mount{Path: target, Raw: d.Raw, ReadOnly: m.Readonly})
	b.attached = append(b.attached, a)
}

func (b *builder) unusedName(name string) string {
	for n, try := 2, name; ; n++ {
		if !b.hasVolume(try) {
			return try
		}
		try = fmt.Sprintf("%s-%d", name, n)
	}
}

// ownMounts are what the configuration names.
func (b *builder) ownMounts(at string, c *spec.PodContainer, cfg *containerConfig) {
	for i, v := range cfg.Volumes {
		b.short(fmt.Sprintf("%svolumes[%d]", at, i), c, v)
	}
	for i, m := range cfg.Mounts {
		b.mount(fmt.Sprintf("%smount[%d]", at, i), c, m)
	}
}

// short reads SOURCE:TARGET[:OPTIONS].
func (b *builder) short(at string, c *spec.PodContainer, v string) {
	parts := strings.Split(v, ":")
	if len(parts) < 2 || len(parts) > 3 || parts[0] == "" {
		b.wrong(at, "%q is no volume: write SOURCE:TARGET or SOURCE:TARGET:ro", v)
		return
	}
	m := mountConfig{Type: "bind", Source: parts[0], Target: parts[1]}
	if !strings.ContainsRune(m.Source, '/') && m.Source != "." {
		m.Type = "volume"
	}
	if len(parts) == 3 {
		for _, o := range strings.Split(parts[2], ",") {
			switch o {
			case "ro":
				m.Readonly = true
			case "nocopy":
				m.NoCopy = true
			case "rw", "z", "Z", "":
			default:
				b.wrong(at, "option %q is none of ro, rw, nocopy", o)
			}
		}
	}
	b.mount(at, c, m)
}

func (b *builder) mount(at string, c *spec.PodContainer, m mountConfig) {
	target := path.Clean(m.Target)
	if !path.IsAbs(target) {
		b.wrong(at+".target", "%q is not absolute", m.Target)
		return
	}
	if m.Transport != "" && m.Type != "bind" || m.Options != "" && m.Type != "tmpfs" {
		b.wrong(at, "transport is of type bind alone, options of type tmpfs alone")
	}
	if m.Type == "tmpfs" && (m.Source != "" || m.Subpath != "" || m.NoCopy) {
		b.wrong(at, "source, subpath and no_copy are of volumes: a tmpfs begins empty")
	}
	mount := spec.Mount{Path: target, Subpath: m.Subpath, ReadOnly: m.Readonly, NoCopy: m.NoCopy}
	switch m.Type {
	case "", "volume":
		mount.Volume = m.Source
		if mount.Volume == "" {
			mount.Volume = b.unusedName(nameOf(strings.TrimPrefix(target, "/")))
		}
		if mount.Volume != nameOf(mount.Volume) {
			b.wrong(at+".source", "%q is no volume's name: letters, digits, _ . and -, a letter or digit first", m.Source)
			return
		}
		i := slices.IndexFunc(b.pod.Volumes, func(v spec.Volume) bool { return v.Name == mount.Volume })
		if i >= 0 && b.pod.Volumes[i].Scratch == nil {
			b.wrong(at+".source", "%s is the name of something that Nomad mounts: choose another for a volume of the pod", mount.Volume)
			return
		}
		if i < 0 {
			b.pod.Volumes = append(b.pod.Volumes, spec.Volume{Name: mount.Volume, Scratch: &spec.ScratchVolume{}})
		}
	case "bind":
		source, err := b.bindSource(m.Source)
		if err != nil {
			b.wrong(at+".source", "%v", err)
			return
		}
		mount.Volume, mount.NoCopy = b.unusedName(nameOf(strings.TrimPrefix(target, "/"))), true
		b.pod.Volumes = append(b.pod.Volumes, spec.Volume{Name: mount.Volume, Directory: &spec.DirectoryVolume{Path: source, ReadOnly: m.Readonly, Transport: m.Transport}})
	case "tmpfs":
		if _, twice := c.Tmpfs[target]; twice {
			b.wrong(at+".target", "%s is there twice", target)
		}
		options := m.Options
		if m.Readonly {
			options = strings.TrimPrefix(options+",ro", ",")
		}
		c.Tmpfs = with(c.Tmpfs, target, options)
		return
	case "task":
		own := b.pod.Containers
		if len(own) == 0 {
			b.wrong(at+".type", "task is for container blocks: here, name the volume")
			return
		}
		i := slices.IndexFunc(own[0].Mounts, func(o spec.Mount) bool { return o.Path == path.Clean(m.Source) })
		if i < 0 {
			b.wrong(at+".source", "the task's own container has nothing mounted at %q", m.Source)
			return
		}
		from := own[0].Mounts[i]
		mount.Volume, mount.NoCopy, mount.ReadOnly = from.Volume, from.NoCopy || m.NoCopy, from.ReadOnly || m.Readonly
		mount.Subpath = path.Join(from.Subpath, m.Subpath)
	default:
		b.wrong(at+".type", "%q is none of volume, bind, tmpfs, task", m.Type)
		return
	}
	c.Mounts = append(c.Mounts, mount)
}

// bindSource is a path of the host. A relative one is in the task's directory, and stays there.
func (b *builder) bindSource(source string) (string, error) {
	if source == "" {
		return "", errors.New("is missing: name a directory or a file")
	}
	if !filepath.IsAbs(source) {
		if !filepath.IsLocal(source) {
			return "", fmt.Errorf("%q leads out of the task's directory", source)
		}
		return b.host.within(b.task.AllocDir, filepath.Join(b.task.Name, source))
	}
	source = filepath.Clean(source)
	if err := b.host.allowed(source); err != nil {
		return "", err
	}
	kind, err := b.host.examine(source)
	if err == nil && kind == aBlockDevice {
		err = fmt.Errorf("%s is a block device: tasks get those as host volumes or CSI volumes", source)
	}
	return source, err
}

// nameOf makes a name of a pod, container or volume.
func nameOf(s string) string {
	name := strings.Map(func(r rune) rune {
		switch {
		case r >= 'a' && r <= 'z', r >= 'A' && r <= 'Z', r >= '0' && r <= '9', r == '_', r == '.', r == '-':
			return r
		}
		return '-'
	}, s)
	if name = strings.TrimLeft(name, "-._"); name == "" {
		return "task"
	}
	return name[:min(len(name), 100)]
}

// translate makes what spec says of a pod's fields into messages about the configuration's keys.
func translate(p *spec.Pod, err error) error {
	var all interface{ Unwrap() []error }
	if errors.As(err, &all) {
		var errs []error
		for _, e := range all.Unwrap() {
			errs = append(errs, translate(p, e))
		}
		return errors.Join(errs...)
	}
	var e *spec.Error
	if !errors.As(err, &e) {
		return err
	}
	message := podField.ReplaceAllStringFunc(e.Message, func(field string) string { return keyOf(p, field) })
	return fmt.Errorf("%s: %s", keyOf(p, e.Field), message)
}

// podField is a field of a container in a message.
var podField = regexp.MustCompile(`containers\[\d+\]\.\w+\[[^\]]*\](\.\w+)*`)

// keyOf is what the configuration calls a field of the pod. Mounts are called by where they are: which keys they come from, and in what order, spec does not know.
func keyOf(p *spec.Pod, field string) string {
	if i, rest, ok := element(field, "containers"); ok && i < len(p.Containers) {
		key := containerKeyOf(&p.Containers[i], rest)
		switch {
		case i == 0 && rest == "resources.memory":
			return rest // Nomad's
		case i > 0:
			return fmt.Sprintf("container %q: %s", p.Containers[i].Name, key)
		}
		return key
	}
	if i, rest, ok := element(field, "volumes"); ok && i < len(p.Volumes) {
		for _, c := range p.Containers {
			for _, m := range c.Mounts {
				if m.Volume == p.Volumes[i].Name {
					return mountKeyOf(&m, rest)
				}
			}
		}
	}
	return renamed(podFields, field)
}

func containerKeyOf(c *spec.PodContainer, field string) string {
	if i, rest, ok := element(field, "mounts"); ok && i < len(c.Mounts) {
		return mountKeyOf(&c.Mounts[i], rest)
	}
	if i, _, ok := element(field, "ulimits"); ok && i < len(c.Ulimits) {
		return "ulimit." + c.Ulimits[i].Name
	}
	return renamed(containerFields, field)
}

func mountKeyOf(m *spec.Mount, field string) string {
	at := m.Path
	if at == "" {
		at = rawDevices + m.Volume
	}
	if field == "" || field == "path" {
		return "mount " + at
	}
	return "mount " + at + ": " + renamed(mountFields, field)
}

// element takes a field of an element of a list apart: mounts[3].path is number 3 of mounts, and path.
func element(field, list string) (i int, rest string, ok bool) {
	rest, ok = strings.CutPrefix(field, list+"[")
	if !ok {
		return 0, "", false
	}
	number, rest, _ := strings.Cut(rest, "]")
	i, err := strconv.Atoi(number)
	return i, strings.TrimPrefix(rest, "."), err == nil
}

// renamed is the key of a field, with its number or name in a list or map.
func renamed(keys map[string]string, field string) string {
	name, rest := field, ""
	if i := strings.IndexByte(field, '['); i >= 0 {
		name, rest = field[:i], field[i:]
	}
	if key, ok := keys[name]; ok {
		return key + rest
	}
	return field
}

// What spec calls the keys of the configuration.
var (
	containerFields = map[string]string{
		"workingDir": "work_dir", "stopSignal": "stop_signal", "groupAdd": "group_add", "readOnly": "readonly_rootfs", "capAdd": "cap_add",
		"capDrop": "cap_drop", "sysctls": "sysctl", "maskedPaths": "masked_paths", "readonlyPaths": "readonly_paths", "shmSize": "shm_size",
		"resources.memory": "memory", "resources.cpus": "cpus", "resources.cpuShares": "cpu_shares",
		"healthcheck.startPeriod": "healthcheck.start_period", "healthcheck.startInterval": "healthcheck.start_interval",
	}
	mountFields = map[string]string{"volume": "source", "directory.path": "source", "directory.transport": "transport"}
	podFields   = map[string]string{
		"scratch.size": "disk", "resources.cpus": "resources.cpu",
		"network.dns": "dns_servers", "network.dnsSearch": "dns_search_domains", "network.dnsOptions": "dns_options", "network.extraHosts": "extra_hosts",
		"network.upstreams": "upstreams", "network.mac": "mac_address", "containers": "container",
	}
)
