package spec

import (
	"cmp"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"path"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Bounds that a valid document keeps.
const (
	MinMemory     Bytes = 16 << 20 // a guest's agent and one small container
	MaxMemory     Bytes = 16 << 40
	MaxCPUs             = 64
	MinScratch    Bytes = 16 << 20
	MaxScratch    Bytes = 1 << 50
	MaxContainers       = 64
	MaxLayers           = 500 // of one container: what overlayfs stacks; docker builds at most 127
	MaxVolumes          = 256
	MaxUpstreams        = 64
	MaxOnLink           = 256
	minLimit      Bytes = 6 << 20 // docker's least memory of a container

	maxName     = 128
	maxHostname = 64 // Linux HOST_NAME_MAX
	maxProblems = 20 // that one error tells of
)

// Validate says what of a Launch no guest could execute: *Error values without a place, joined. ParseLaunch calls it.
func (l *Launch) Validate() error {
	var v validator
	l.validate(&v)
	return v.err(func(*Error) {})
}

// Validate says what of a Pod can't be made into a Launch, as far as that is known without its images.
func (p *Pod) Validate() error {
	var v validator
	p.validate(&v)
	return v.err(func(*Error) {})
}

// A validator collects what is wrong.
type validator struct {
	problems []*Error
}

// reject notes that a field is wrong: what; what to do.
func (v *validator) reject(field, format string, args ...any) {
	if len(v.problems) < maxProblems {
		v.problems = append(v.problems, &Error{Field: field, Message: fmt.Sprintf(format, args...)})
	}
}

func (v *validator) err(locate func(*Error)) error {
	if len(v.problems) == 0 {
		return nil
	}
	for _, e := range v.problems {
		locate(e)
	}
	slices.SortStableFunc(v.problems, func(a, b *Error) int {
		return cmp.Or(cmp.Compare(a.Line, b.Line), cmp.Compare(a.Column, b.Column))
	})
	all := make([]error, len(v.problems))
	for i, e := range v.problems {
		all[i] = e
	}
	if len(all) == 1 {
		return all[0]
	}
	return errors.Join(all...)
}

func (l *Launch) validate(v *validator) {
	if l.Version != LaunchVersion {
		v.reject("version", "is %d; this program reads version %d", l.Version, LaunchVersion)
	}
	v.id("id", l.ID)
	v.name("name", l.Name)
	v.hostname("hostname", l.Hostname, true)
	v.pod(l.Resources, l.Boot, l.Network, l.Scratch)
	volumes := v.volumes(l.Volumes, false)
	l.Network.validateNames(v, volumes)

	names := make([]string, len(l.Containers))
	lives := make([]Lifecycle, len(l.Containers))
	healthy := map[string]bool{}
	ids := map[string]int{}
	for i, c := range l.Containers {
		names[i], lives[i] = c.Name, c.Lifecycle
		healthy[c.Name] = c.Healthcheck != nil && len(c.Healthcheck.Test) > 0 && c.Healthcheck.Test[0] != "NONE"
		field := index("containers", i)
		v.id(join(field, "id"), c.ID)
		if other, ok := ids[c.ID]; ok {
			v.reject(join(field, "id"), "is containers[%d]'s as well; give each container its own", other)
		}
		ids[c.ID] = i
		c.validate(v, field, volumes)
	}
	v.order(names, lives)
	for i, c := range l.Containers {
		for j, a := range c.Lifecycle.After {
			if has, known := healthy[a.Container]; a.Until == "healthy" && known && !has {
				v.reject(index(join(index("containers", i), "lifecycle.after"), j), "%s has no healthcheck and is never healthy; give it one, or wait until started", a.Container)
			}
		}
	}
}

func (p *Pod) validate(v *validator) {
	v.name("name", p.Name)
	v.hostname("hostname", p.Hostname, false)
	v.pod(p.Resources, p.Boot, p.Network, p.Scratch)
	volumes := v.volumes(p.Volumes, true)
	p.Network.validateNames(v, volumes)

	names := make([]string, len(p.Containers))
	lives := make([]Lifecycle, len(p.Containers))
	for i, c := range p.Containers {
		names[i], lives[i] = c.Name, c.Lifecycle
		c.validate(v, index("containers", i), volumes)
	}
	v.order(names, lives)
}

func (c *PodContainer) validate(v *validator, field string, volumes map[string]Volume) {
	if c.Image == "" {
		v.reject(join(field, "image"), "is missing; name one: debian:12, docker-archive:FILE, oci:DIR")
	}
	v.text(join(field, "image"), c.Image)
	if c.Entrypoint != nil {
		v.texts(join(field, "entrypoint"), *c.Entrypoint)
	}
	if c.Command != nil {
		v.texts(join(field, "command"), *c.Command)
	}
	v.texts(join(field, "env"), c.Env)
	for i, e := range c.Env {
		if e == "" || e[0] == '=' {
			v.reject(index(join(field, "env"), i), "%q has no name; write NAME=value, or NAME to remove one", e)
		}
	}
	v.process(field, c.User, c.WorkingDir, c.StopSignal, c.Healthcheck, false)
	c.Settings.validate(v, field, volumes)
}

func (c *Container) validate(v *validator, field string, volumes map[string]Volume) {
	onVolume := slices.ContainsFunc(c.Mounts, func(m Mount) bool { return m.Path == "/" })
	v.text(join(field, "image.reference"), c.Image.Reference)
	if c.Image.ID != "" || !onVolume {
		v.digest(join(field, "image.id"), c.Image.ID)
	}
	if c.Image.Digest != "" {
		v.digest(join(field, "image.digest"), c.Image.Digest)
	}
	switch {
	case len(c.Layers) == 0 && !onVolume:
		v.reject(join(field, "layers"), "are missing; summon the image again, or mount a volume at /")
	case len(c.Layers) > MaxLayers:
		v.reject(join(field, "layers"), "are %d; at most %d can be stacked", len(c.Layers), MaxLayers)
	}
	for i, l := range c.Layers {
		at := index(join(field, "layers"), i)
		v.digest(join(at, "diffId"), l.DiffID)
		v.inside(join(at, "file"), l.File, "the pod directory")
	}
	if len(c.Entrypoint)+len(c.Command) == 0 {
		v.reject(join(field, "command"), "nothing to run: the image has neither entrypoint nor command; give one")
	}
	v.texts(join(field, "entrypoint"), c.Entrypoint)
	v.texts(join(field, "command"), c.Command)
	v.texts(join(field, "env"), c.Env)
	for i, e := range c.Env {
		if name, _, ok := strings.Cut(e, "="); !ok || name == "" {
			v.reject(index(join(field, "env"), i), "%q is no assignment; write NAME=value", e)
		}
	}
	for i, p := range c.ExposedPorts {
		v.exposed(index(join(field, "exposedPorts"), i), p)
	}
	v.process(field, c.User, c.WorkingDir, c.StopSignal, c.Healthcheck, true)
	c.Settings.validate(v, field, volumes)
}

// process checks what Container and PodContainer both say of the process.
func (v *validator) process(field, user, dir, signal string, h *Healthcheck, resolved bool) {
	v.text(join(field, "user"), user)
	if strings.Count(user, ":") > 1 || strings.ContainsAny(user, "\n\r") {
		v.reject(join(field, "user"), "%q is no user; write user, user:group, uid or uid:gid", user)
	}
	if dir != "" {
		v.text(join(field, "workingDir"), dir)
		if dir[0] != '/' || slices.Contains(strings.Split(dir, "/"), "..") {
			v.reject(join(field, "workingDir"), "%q is not absolute; write a path from /, without ..", dir)
		}
	}
	if signal != "" && !KnownSignal(signal) {
		v.reject(join(field, "stopSignal"), "%q is no signal; write a name such as SIGTERM, or a number from 1 to 64", signal)
	}
	if h != nil {
		h.validate(v, join(field, "healthcheck"), resolved)
	}
}

func (h *Healthcheck) validate(v *validator, field string, resolved bool) {
	test := join(field, "test")
	v.texts(test, h.Test)
	switch {
	case len(h.Test) == 0:
		if resolved {
			v.reject(test, `is missing; write ["CMD", program, argument…], ["CMD-SHELL", line] or ["NONE"]`)
		}
	case h.Test[0] == "NONE" && len(h.Test) == 1, h.Test[0] == "CMD" && len(h.Test) > 1, h.Test[0] == "CMD-SHELL" && len(h.Test) == 2:
	default:
		v.reject(test, `%q is no test; write ["CMD", program, argument…], ["CMD-SHELL", line] or ["NONE"]`, h.Test)
	}
	v.period(join(field, "interval"), h.Interval)
	v.period(join(field, "timeout"), h.Timeout)
	v.period(join(field, "startPeriod"), h.StartPeriod)
	v.period(join(field, "startInterval"), h.StartInterval)
	if h.Retries < 0 {
		v.reject(join(field, "retries"), "is below 0; leave it out for 3")
	}
}

// period checks docker's least of a healthcheck's times.
func (v *validator) period(field string, d Duration) {
	if d != 0 && d < Duration(time.Millisecond) {
		v.reject(field, "%s is too short; at least 1ms, or leave it out", d)
	}
}

func (s *Settings) validate(v *validator, field string, volumes map[string]Volume) {
	v.hostname(join(field, "hostname"), s.Hostname, false)
	v.hostname(join(field, "domainname"), s.Domainname, false)
	for name, value := range s.Labels {
		if name == "" {
			v.reject(join(field, "labels"), "one has no name; give it one")
		}
		v.text(entry(join(field, "labels"), name), name+value)
	}
	for i, g := range s.GroupAdd {
		v.text(index(join(field, "groupAdd"), i), g)
		if g == "" || strings.ContainsAny(g, ": \n") {
			v.reject(index(join(field, "groupAdd"), i), "%q is no group; write its name or number", g)
		}
	}
	if s.StopTimeout != nil && *s.StopTimeout < 0 {
		v.reject(join(field, "stopTimeout"), "%s is below 0; 0s kills at once", s.StopTimeout)
	}
	v.capabilities(join(field, "capAdd"), s.CapAdd)
	v.capabilities(join(field, "capDrop"), s.CapDrop)
	v.systemPaths(join(field, "maskedPaths"), s.MaskedPaths)
	v.systemPaths(join(field, "readonlyPaths"), s.ReadonlyPaths)
	v.ulimits(join(field, "ulimits"), s.Ulimits)
	for name, value := range s.Sysctls {
		at := entry(join(field, "sysctls"), name)
		v.text(at, value)
		if !namespacedSysctl(name) {
			v.reject(at, "is no parameter that a container has for itself; net.*, fs.mqueue.*, kernel.sem, kernel.msg* and kernel.shm* are")
		}
	}
	if s.ShmSize < 0 {
		v.reject(join(field, "shmSize"), "is below 0; leave it out for %s", DefaultShmSize)
	}
	for i, d := range s.Devices {
		if d != "all" && (!clean(d) || !strings.HasPrefix(d, "/dev/")) {
			v.reject(index(join(field, "devices"), i), "%q is no device; write a path below /dev, or all", d)
		}
	}
	s.Resources.validate(v, join(field, "resources"))
	s.mounts(v, field, volumes)
	if s.Lifecycle.RestartDelay < 0 {
		v.reject(join(field, "lifecycle.restartDelay"), "%s is below 0; leave it out for docker's", s.Lifecycle.RestartDelay)
	}
	if s.Lifecycle.Hold < 0 {
		v.reject(join(field, "lifecycle.hold"), "%s is below 0; leave it out to start at once", s.Lifecycle.Hold)
	}
	if s.Lifecycle.MaxStarts < 0 {
		v.reject(join(field, "lifecycle.maxStarts"), "is below 0; leave it out for no limit")
	}
	if s.Logs.MaxSize < 0 {
		v.reject(join(field, "logs.maxSize"), "is below 0; leave it out for the default")
	}
}

func (l *Limits) validate(v *validator, field string) {
	if l.Memory != 0 && l.Memory < minLimit {
		v.reject(join(field, "memory"), "%s is too small; at least %s", l.Memory, minLimit)
	}
	if !(l.CPUs >= 0 && l.CPUs <= MaxCPUs) {
		v.reject(join(field, "cpus"), "%g is no number of processors; 0 (no limit) to %d", l.CPUs, MaxCPUs)
	}
	if l.CPUShares != 0 && (l.CPUShares < 2 || l.CPUShares > 262144) { // Linux cpu.shares
		v.reject(join(field, "cpuShares"), "%d is out of range; 2 to 262144, or leave it out", l.CPUShares)
	}
	if l.Pids < -1 {
		v.reject(join(field, "pids"), "%d is out of range; -1 or 0 is no limit", l.Pids)
	}
	if l.OOMScoreAdj < -1000 || l.OOMScoreAdj > 1000 {
		v.reject(join(field, "oomScoreAdj"), "%d is out of range; -1000 to 1000", l.OOMScoreAdj)
	}
}

// mounts checks that volumes exist and that no two things are mounted at the same place.
func (s *Settings) mounts(v *validator, field string, volumes map[string]Volume) {
	taken := map[string]string{}
	take := func(at, p string) {
		if other, ok := taken[p]; ok {
			v.reject(at, "%s is the place of %s as well; choose another", p, other)
		}
		taken[p] = at
	}
	for i, m := range s.Mounts {
		at := index(join(field, "mounts"), i)
		volume, ok := volumes[m.Volume]
		if !ok {
			v.reject(join(at, "volume"), "the pod has no volume %q; declare it under volumes", m.Volume)
		}
		if m.Raw {
			if ok && volume.Block == nil {
				v.reject(join(at, "raw"), "volume %q is no block volume; leave raw out", m.Volume)
			}
			if m.Subpath != "" {
				v.reject(join(at, "subpath"), "a raw device has no paths; leave it out")
			}
			node := "/dev/volumes/" + m.Volume
			if m.Path != "" {
				node = m.Path
				v.path(join(at, "path"), m.Path)
			}
			if !strings.HasPrefix(node, "/dev/") {
				v.reject(join(at, "path"), "a raw device appears below /dev; leave path empty for /dev/volumes/%s", m.Volume)
			}
			take(at, node)
			continue
		}
		if m.Subpath != "" {
			v.inside(join(at, "subpath"), m.Subpath, "the volume")
		}
		if v.path(join(at, "path"), m.Path); m.Path != "" {
			take(join(at, "path"), m.Path)
		}
	}
	paths := make([]string, 0, len(s.Tmpfs))
	for p := range s.Tmpfs {
		paths = append(paths, p)
	}
	slices.Sort(paths)
	for _, p := range paths {
		at := entry(join(field, "tmpfs"), p)
		v.options(at, s.Tmpfs[p])
		if v.path(at, p); p == "/" {
			v.reject(at, "a tmpfs can't be the root file system; choose another path")
		}
		take(at, p)
	}
}

func (v *validator) ulimits(field string, all []Ulimit) {
	seen := map[string]bool{}
	for i, u := range all {
		at := index(field, i)
		if !slices.Contains(ulimitNames, u.Name) {
			v.reject(join(at, "name"), "%q is no limit; known are %s", u.Name, strings.Join(ulimitNames, ", "))
		} else if seen[u.Name] {
			v.reject(join(at, "name"), "%s is there twice; keep one", u.Name)
		}
		seen[u.Name] = true
		if u.Soft < -1 || u.Hard < -1 {
			v.reject(at, "a limit is below -1; -1 is unlimited")
		}
		if u.Hard != -1 && (u.Soft > u.Hard || u.Soft == -1) {
			v.reject(join(at, "soft"), "%d is above the hard limit %d; lower it", u.Soft, u.Hard)
		}
	}
}

func (v *validator) capabilities(field string, all []string) {
	for i, c := range all {
		name := strings.TrimPrefix(strings.ToUpper(c), "CAP_")
		if name != "ALL" && !slices.Contains(capabilityNames, name) {
			v.reject(index(field, i), "%q is no capability; write one such as NET_ADMIN, or ALL", c)
		}
	}
}

func (v *validator) systemPaths(field string, all *[]string) {
	if all == nil {
		return
	}
	for i, p := range *all {
		v.text(index(field, i), p)
		if p == "/" || !clean(p) {
			v.reject(index(field, i), "%q is no path of a container; write one such as /proc/keys", p)
		}
	}
}

// pod checks what Launch and Pod both say of the VM.
func (v *validator) pod(r Resources, b Boot, n Network, s Scratch) {
	if r.Memory != 0 && r.Memory < MinMemory {
		v.reject("resources.memory", "%s is too small to boot; at least %s", r.Memory, MinMemory)
	}
	if r.Memory > MaxMemory {
		v.reject("resources.memory", "%s is too large; at most %s", r.Memory, MaxMemory)
	}
	if r.CPUs < 0 || r.CPUs > MaxCPUs {
		v.reject("resources.cpus", "%d is out of range; 1 to %d, or leave it out for 1", r.CPUs, MaxCPUs)
	}
	v.oneOf("boot.accel", b.Accel, "auto", "kvm", "tcg")
	v.oneOf("boot.start", b.Start, "auto", "template", "cold")
	n.validate(v)
	if s.Size != 0 && s.Size < MinScratch {
		v.reject("scratch.size", "%s is too small for a file system; at least %s", s.Size, MinScratch)
	}
	if s.Size > MaxScratch {
		v.reject("scratch.size", "%s is too large; at most %s", s.Size, MaxScratch)
	}
}

func (n *Network) validate(v *validator) {
	v.oneOf("network.mode", n.Mode, "user", "netns", "none")
	if n.Mode == "netns" {
		v.path("network.netns", n.Netns)
	} else if n.Netns != "" {
		v.reject("network.netns", `means nothing in mode %q; set mode to "netns", or leave it out`, n.Mode)
	}
	if len(n.Publish) > 0 && (n.Mode == "netns" || n.Mode == "none") {
		v.reject("network.publish", `ports are published in mode "user" alone; in a network namespace they are there already`)
	}
	seen := map[Publish]int{}
	for i, p := range n.Publish {
		at := index("network.publish", i)
		if p.HostIP != "" {
			v.address(join(at, "hostIp"), p.HostIP)
		}
		if p.Port == 0 {
			v.reject(join(at, "port"), "is missing; 1 to 65535")
		}
		v.oneOf(join(at, "protocol"), p.Protocol, "tcp", "udp")
		place := Publish{HostIP: p.HostIP, HostPort: p.HostPort, Protocol: p.Protocol}
		if place.Protocol == "" {
			place.Protocol = "tcp"
		}
		if other, ok := seen[place]; ok && p.HostPort != 0 {
			v.reject(join(at, "hostPort"), "%d is taken by network.publish[%d]; choose another", p.HostPort, other)
		}
		seen[place] = i
	}
	if n.MAC != "" {
		if mac, err := net.ParseMAC(n.MAC); err != nil || len(mac) != 6 || mac[0]&1 != 0 || slices.Max(mac) == 0 {
			v.reject("network.mac", "%q is no address of an interface; write one such as 02:00:00:12:34:56", n.MAC)
		} else if n.Mode == "none" {
			v.reject("network.mac", `is not possible in mode "none"; leave it out`)
		}
	}
	if len(n.Upstreams) > 0 && n.Mode != "netns" {
		v.reject("network.upstreams", `are services of a network namespace, in mode "netns" alone; leave them out`)
	}
	if len(n.Upstreams) > MaxUpstreams {
		v.reject("network.upstreams", "are %d; at most %d", len(n.Upstreams), MaxUpstreams)
	}
	for i, p := range n.Upstreams {
		if p == 0 {
			v.reject(index("network.upstreams", i), "0 is no port; 1 to 65535")
		}
		if other := slices.Index(n.Upstreams, p); other < i {
			v.reject(index("network.upstreams", i), "%d is upstreams[%d] as well; leave one out", p, other)
		}
	}
	if len(n.OnLink) > 0 && n.Mode != "netns" {
		v.reject("network.onLink", `are ports in a network namespace, in mode "netns" alone; leave them out`)
	}
	if len(n.OnLink) > MaxOnLink {
		v.reject("network.onLink", "are %d; at most %d", len(n.OnLink), MaxOnLink)
	}
	for i, p := range n.OnLink {
		if p == 0 {
			v.reject(index("network.onLink", i), "0 is no port; 1 to 65535")
		}
	}
	for i, a := range n.DNS {
		v.address(index("network.dns", i), a)
	}
	for i, d := range n.DNSSearch {
		v.word(index("network.dnsSearch", i), d)
	}
	for i, o := range n.DNSOptions {
		v.word(index("network.dnsOptions", i), o)
	}
	for i, h := range n.ExtraHosts {
		at := index("network.extraHosts", i)
		v.word(join(at, "name"), h.Name)
		v.address(join(at, "address"), h.Address)
	}
}

func (n *Network) validateNames(v *validator, volumes map[string]Volume) {
	if n.Names == "" {
		return
	}
	volume, file, _ := strings.Cut(n.Names, "/")
	if volumes[volume].Directory == nil {
		v.reject("network.names", "the pod has no directory volume %q; write VOLUME/FILE", volume)
	}
	v.inside("network.names", file, "the volume")
}

// volumes checks them and gives them by name.
func (v *validator) volumes(all []Volume, managed bool) map[string]Volume {
	if len(all) > MaxVolumes {
		v.reject("volumes", "are %d; at most %d", len(all), MaxVolumes)
	}
	byName := map[string]Volume{}
	for i, volume := range all {
		at := index("volumes", i)
		v.name(join(at, "name"), volume.Name)
		if _, ok := byName[volume.Name]; ok {
			v.reject(join(at, "name"), "%s is there twice; rename one", volume.Name)
		}
		byName[volume.Name] = volume
		v.oneOf(join(at, "class"), volume.Class, "lv2", "nfs", "gfs")
		volume.validate(v, at, managed)
	}
	return byName
}

// validate checks one volume. With managed, a class is enough: who runs the pod knows a volume of that name.
func (volume *Volume) validate(v *validator, field string, managed bool) {
	kinds := 0
	if b := volume.Block; b != nil {
		kinds++
		if at := join(field, "block.path"); strings.HasPrefix(b.Path, "/") {
			v.path(at, b.Path)
		} else {
			v.inside(at, b.Path, "the pod directory")
		}
		v.oneOf(join(field, "block.fsType"), b.FSType, "ext4", "xfs")
		v.options(join(field, "block.options"), b.Options)
	}
	if d := volume.Directory; d != nil {
		kinds++
		v.path(join(field, "directory.path"), d.Path)
		v.oneOf(join(field, "directory.transport"), d.Transport, "9p", "virtiofs")
	}
	if n := volume.NFS; n != nil {
		kinds++
		v.server(join(field, "nfs.address"), n.Address)
		v.path(join(field, "nfs.export"), n.Export)
		v.options(join(field, "nfs.options"), n.Options)
	}
	if c := volume.Ceph; c != nil {
		kinds++
		c.validate(v, join(field, "ceph"))
	}
	if t := volume.Tmpfs; t != nil {
		kinds++
		if t.Size < 0 {
			v.reject(join(field, "tmpfs.size"), "is below 0; leave it out for half of the memory")
		}
	}
	if volume.Scratch != nil {
		kinds++
	}
	if kinds != 1 && (kinds > 0 || volume.Class == "" || !managed) {
		v.reject(field, "has %d of block, directory, nfs, ceph, tmpfs and scratch; write exactly one", kinds)
	}
}

// validate checks what becomes mount options, which commas part.
func (c *CephVolume) validate(v *validator, field string) {
	if len(c.Monitors) == 0 {
		v.reject(join(field, "monitors"), "are none; name at least one, as HOST:PORT")
	}
	for i, m := range c.Monitors {
		v.server(index(join(field, "monitors"), i), m)
	}
	v.path(join(field, "path"), c.Path)
	for name, value := range map[string]string{"fileSystem": c.FileSystem, "client": c.Client} {
		if value == "" || len(value) > 1024 || strings.ContainsAny(value, ", \t\n\x00") {
			v.reject(join(field, name), "%.80q is no name", value)
		}
	}
	if strings.ContainsAny(c.Secret, ", \t\n\x00") {
		v.reject(join(field, "secret"), "is no key") // and is not told
	}
	if c.Secret != "" && c.SecretFile != "" {
		v.reject(join(field, "secret"), "is there, and a secretFile as well; leave one out")
	}
	if c.SecretFile != "" {
		v.path(join(field, "secretFile"), c.SecretFile)
	}
	v.options(join(field, "options"), c.Options)
}

// order checks the containers' names and that what they wait for can come.
func (v *validator) order(names []string, lives []Lifecycle) {
	switch {
	case len(names) == 0:
		v.reject("containers", "there is none; a pod has at least one")
	case len(names) > MaxContainers:
		v.reject("containers", "are %d; at most %d", len(names), MaxContainers)
		return
	}
	number := map[string]int{}
	for i, name := range names {
		at := join(index("containers", i), "name")
		v.name(at, name)
		if _, ok := number[name]; ok {
			v.reject(at, "%s is there twice; rename one", name)
		}
		number[name] = i
	}
	for i, life := range lives {
		for j, a := range life.After {
			at := index(join(index("containers", i), "lifecycle.after"), j)
			if _, ok := number[a.Container]; !ok {
				v.reject(join(at, "container"), "the pod has no container %q; name one of %s", a.Container, strings.Join(names, ", "))
			}
			v.oneOf(join(at, "until"), a.Until, "started", "healthy", "exited")
		}
	}
	if i := waitsForItself(lives, number); i >= 0 && len(number) == len(names) {
		v.reject(join(index("containers", i), "lifecycle.after"), "%s waits for itself in the end; break the circle", names[i])
	}
}

// waitsForItself finds a container on a circle, -1 where there is none.
func waitsForItself(lives []Lifecycle, number map[string]int) int {
	const (
		unseen = iota
		open
		done
	)
	state := make([]int, len(lives))
	var visit func(int) int
	visit = func(i int) int {
		switch state[i] {
		case open:
			return i
		case done:
			return -1
		}
		state[i] = open
		for _, a := range lives[i].After {
			if next, ok := number[a.Container]; ok {
				if circle := visit(next); circle >= 0 {
					return circle
				}
			}
		}
		state[i] = done
		return -1
	}
	for i := range lives {
		if circle := visit(i); circle >= 0 {
			return circle
		}
	}
	return -1
}

func (v *validator) oneOf(field, value string, allowed ...string) {
	if value != "" && !slices.Contains(allowed, value) {
		v.reject(field, "%q is none of %s; write one of them, or leave it out for %s", value, strings.Join(allowed, ", "), allowed[0])
	}
}

func (v *validator) id(field, id string) {
	if len(id) != 64 || !hexadecimal(id) {
		v.reject(field, "%q is no id; 64 lower-case hexadecimal digits", abbreviate(id))
	}
}

func (v *validator) digest(field, digest string) {
	hash, ok := strings.CutPrefix(digest, "sha256:")
	if !ok || len(hash) != 64 || !hexadecimal(hash) {
		v.reject(field, "%q is no digest; sha256: and 64 lower-case hexadecimal digits", abbreviate(digest))
	}
}

func hexadecimal(s string) bool {
	return strings.Trim(s, "0123456789abcdef") == ""
}

// name checks docker's rule for names of containers and volumes (moby daemon/names), except that one letter is enough.
func (v *validator) name(field, name string) {
	ok := name != "" && len(name) <= maxName && alphanumeric(name[0])
	for i := range len(name) {
		ok = ok && (alphanumeric(name[i]) || strings.IndexByte("_.-", name[i]) >= 0)
	}
	if !ok {
		v.reject(field, "%q is no name; letters, digits, _ . and -, a letter or digit first, at most %d", abbreviate(name), maxName)
	}
}

func alphanumeric(c byte) bool {
	return c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9'
}

func (v *validator) hostname(field, name string, required bool) {
	if name == "" && !required {
		return
	}
	ok := name != "" && len(name) <= maxHostname
	for i := range len(name) {
		ok = ok && (alphanumeric(name[i]) || strings.IndexByte("_.-", name[i]) >= 0)
	}
	if !ok {
		v.reject(field, "%q is no host name; letters, digits, - and ., at most %d", abbreviate(name), maxHostname)
	}
}

// text refuses what no path, argument or variable of a process can hold.
func (v *validator) text(field, s string) {
	if strings.IndexByte(s, 0) >= 0 {
		v.reject(field, "holds a NUL byte; remove it")
	}
}

func (v *validator) texts(field string, all []string) {
	for i, s := range all {
		v.text(index(field, i), s)
	}
}

// word refuses what would break a line of resolv.conf or hosts.
func (v *validator) word(field, s string) {
	if s == "" || strings.ContainsAny(s, " \t\r\n#\x00") {
		v.reject(field, "%q is no word; no spaces and no #", s)
	}
}

// options refuses mount options that would be cut in two or hide in a log.
func (v *validator) options(field, s string) {
	if strings.ContainsAny(s, " \t\r\n\x00") {
		v.reject(field, "%q are no mount options; separate them by commas, without spaces", s)
	}
}

func (v *validator) address(field, s string) {
	if _, err := netip.ParseAddr(s); err != nil {
		v.reject(field, "%q is no IP address; write 192.0.2.1 or 2001:db8::1", s)
	}
}

// server is host, address, host:port or [address]:port.
func (v *validator) server(field, s string) {
	host := s
	if _, err := netip.ParseAddr(s); err != nil {
		if i := strings.LastIndexByte(s, ':'); i >= 0 {
			port, err := strconv.ParseUint(s[i+1:], 10, 16)
			if err != nil || port == 0 {
				v.reject(field, "%q has no valid port; write host or host:port", s)
				return
			}
			host = strings.TrimSuffix(strings.TrimPrefix(s[:i], "["), "]")
		}
		if _, err := netip.ParseAddr(host); err == nil {
			return
		}
		v.hostname(field, host, true)
	}
}

// exposed is docker's N/protocol or N-M/protocol.
func (v *validator) exposed(field, s string) {
	ports, protocol, _ := strings.Cut(s, "/")
	from, to, isRange := strings.Cut(ports, "-")
	if !isRange {
		to = from
	}
	low, err1 := strconv.ParseUint(from, 10, 16)
	high, err2 := strconv.ParseUint(to, 10, 16)
	if err1 != nil || err2 != nil || low == 0 || low > high || !slices.Contains([]string{"tcp", "udp", "sctp"}, protocol) {
		v.reject(field, "%q is no port; write 80/tcp", s)
	}
}

// path is absolute and clean: what it says is where it leads.
func (v *validator) path(field, p string) {
	if v.text(field, p); !clean(p) {
		v.reject(field, "%q is no clean absolute path; write it from /, without .., //, and a slash at its end", p)
	}
}

func clean(p string) bool { return path.IsAbs(p) && path.Clean(p) == p }

// inside is a relative path that does not leave where it begins.
func (v *validator) inside(field, p, where string) {
	v.text(field, p)
	if p == "" || path.IsAbs(p) || path.Clean(p) != p || p == ".." || strings.HasPrefix(p, "../") {
		v.reject(field, "%q is no path inside %s; write it relative, without .., //, and a slash at its end", p, where)
	}
}

// abbreviate keeps a message on its line.
func abbreviate(s string) string {
	if len(s) > 80 {
		return s[:80] + "…"
	}
	return s
}

// ulimitNames are docker's (docker/go-units ulimit.go).
var ulimitNames = []string{
	"core", "cpu", "data", "fsize", "locks", "memlock", "msgqueue", "nice", "nofile", "nproc", "rss", "rtprio",
	"rttime", "sigpending", "stack",
}

// capabilityNames are Linux's up to CAP_CHECKPOINT_RESTORE (linux/capability.h), by number.
var capabilityNames = []string{
	"CHOWN", "DAC_OVERRIDE", "DAC_READ_SEARCH", "FOWNER", "FSETID", "KILL", "SETGID", "SETUID", "SETPCAP",
	"LINUX_IMMUTABLE", "NET_BIND_SERVICE", "NET_BROADCAST", "NET_ADMIN", "NET_RAW", "IPC_LOCK", "IPC_OWNER", "SYS_MODULE",
	"SYS_RAWIO", "SYS_CHROOT", "SYS_PTRACE", "SYS_PACCT", "SYS_ADMIN", "SYS_BOOT", "SYS_NICE", "SYS_RESOURCE", "SYS_TIME",
	"SYS_TTY_CONFIG", "MKNOD", "LEASE", "AUDIT_WRITE", "AUDIT_CONTROL", "SETFCAP", "MAC_OVERRIDE", "MAC_ADMIN", "SYSLOG",
	"WAKE_ALARM", "BLOCK_SUSPEND", "AUDIT_READ", "PERFMON", "BPF", "CHECKPOINT_RESTORE",
}

// signalNames are Linux's (signal(7)), without the real-time ones.
var signalNames = []string{
	"ABRT", "ALRM", "BUS", "CHLD", "CLD", "CONT", "FPE", "HUP", "ILL", "INT", "IO", "IOT", "KILL", "PIPE", "POLL", "PROF", "PWR",
	"QUIT", "SEGV", "STKFLT", "STOP", "SYS", "TERM", "TRAP", "TSTP", "TTIN", "TTOU", "URG", "USR1", "USR2", "VTALRM",
	"WINCH", "XCPU", "XFSZ",
}

// KnownSignal says whether docker knows a signal of that name: a number, or a name with or without SIG in any case; RTMIN+n, RTMAX-n.
func KnownSignal(s string) bool {
	if n, err := strconv.Atoi(s); err == nil {
		return n >= 1 && n <= 64
	}
	name := strings.TrimPrefix(strings.ToUpper(s), "SIG")
	for base, sign := range map[string]string{"RTMIN": "+", "RTMAX": "-"} {
		rest, ok := strings.CutPrefix(name, base)
		if !ok {
			continue
		}
		n, err := strconv.ParseUint(strings.TrimPrefix(rest, sign), 10, 8)
		return rest == "" || strings.HasPrefix(rest, sign) && err == nil && n <= 30 // moby/sys/signal: 34 to 64
	}
	return slices.Contains(signalNames, name)
}

// namespacedSysctl takes the parameters that a namespace of the container's own or the pod's network has
// (opencontainers/runtime-spec config-linux.md).
func namespacedSysctl(name string) bool {
	switch name {
	case "kernel.msgmax", "kernel.msgmnb", "kernel.msgmni", "kernel.sem", "kernel.shmall", "kernel.shmmax", "kernel.shmmni", "kernel.shm_rmid_forced":
		return true
	}
	for i := range len(name) {
		if !alphanumeric(name[i]) && strings.IndexByte("_.-", name[i]) < 0 {
			return false
		}
	}
	return !strings.Contains(name, "..") && (strings.HasPrefix(name, "net.") || strings.HasPrefix(name, "fs.mqueue."))
}
