package main

import (
	"bufio"
	"encoding/csv"
	"errors"
	"fmt"
	"math"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/docker/go-connections/nat"
	units "github.com/docker/go-units"
	"github.com/spf13/pflag"

	"github.com/cradlestack/cradlestack/spec"
)

// podFlags are the flags that describe a pod of one container. Those that docker run has as well are spelled and mean the same.
type podFlags struct {
	flags *pflag.FlagSet

	name, hostname, domainname, entrypoint, user, workdir, stopSignal string
	env, envFile, volume, mount, publish, tmpfs, label, capAdd        []string
	upstream                                                          []string
	capDrop, device, dns, dnsSearch, dnsOption, addHost, groupAdd     []string
	sysctl, ulimit, securityOpt                                       []string
	network, netns, memory, shmSize, scratchSize, logMaxSize          string
	accel, start, restart                                             string
	cpus                                                              float64
	pidsLimit                                                         int64
	cpuShares                                                         uint64
	oomScoreAdj                                                       int
	stopTimeout                                                       int
	tty, interactive, init, readOnly, privileged                      bool

	healthCmd                                                                    string
	healthInterval, healthTimeout, healthStartPeriod, healthStartInterval, delay time.Duration
	healthRetries                                                                int
	noHealthcheck                                                                bool
}

func (p *podFlags) register(f *pflag.FlagSet) {
	p.flags = f
	f.StringVar(&p.name, "name", "", "`name` of the pod and its container (default: the directory's)")
	f.StringVarP(&p.hostname, "hostname", "h", "", "host `name` in the container (default: the first 12 digits of its id)")
	f.StringVar(&p.domainname, "domainname", "", "NIS domain `name`")
	f.StringVar(&p.entrypoint, "entrypoint", "", "`program` that replaces the image's entrypoint; \"\" clears it")
	f.StringVarP(&p.user, "user", "u", "", "`user[:group]`, by name or number")
	f.StringVarP(&p.workdir, "workdir", "w", "", "working `directory`")
	f.StringVar(&p.stopSignal, "stop-signal", "", "`signal` that asks the container to end")
	f.IntVar(&p.stopTimeout, "stop-timeout", 10, "`seconds` from the stop signal to SIGKILL")
	f.StringArrayVarP(&p.env, "env", "e", nil, "`NAME=value`, or NAME for the value of this environment's")
	f.StringArrayVar(&p.envFile, "env-file", nil, "read variables from a `file`, one on each line")
	f.StringArrayVarP(&p.volume, "volume", "v", nil, "`SOURCE:PATH[:options]`; see kcradle summon --help")
	f.StringArrayVar(&p.mount, "mount", nil, "`type=T,source=S,target=T`; see kcradle summon --help")
	f.StringArrayVarP(&p.publish, "publish", "p", nil, "`[[address:]host port:]port[/udp]`; without a host port one is chosen")
	f.StringArrayVar(&p.tmpfs, "tmpfs", nil, "`PATH[:options]`: mount a tmpfs")
	f.StringArrayVarP(&p.label, "label", "l", nil, "`NAME=value`")
	f.StringArrayVar(&p.capAdd, "cap-add", nil, "add a `capability`")
	f.StringArrayVar(&p.capDrop, "cap-drop", nil, "drop a `capability`, or ALL")
	f.StringArrayVar(&p.device, "device", nil, "give a `device` of the guest: /dev/net/tun, or all")
	f.StringArrayVar(&p.dns, "dns", nil, "resolver's `address`")
	f.StringArrayVar(&p.dnsSearch, "dns-search", nil, "search `domain`")
	f.StringArrayVar(&p.dnsOption, "dns-option", nil, "`option` of resolv.conf")
	f.StringArrayVar(&p.addHost, "add-host", nil, "`NAME:address`, added to /etc/hosts; address host-gateway is this host's, now")
	f.StringArrayVar(&p.groupAdd, "group-add", nil, "supplementary `group`")
	f.StringArrayVar(&p.sysctl, "sysctl", nil, "`NAME=value`")
	f.StringArrayVar(&p.ulimit, "ulimit", nil, "`NAME=soft[:hard]`")
	f.StringArrayVar(&p.securityOpt, "security-opt", nil, "`option`: only no-new-privileges means something here")
	f.StringVar(&p.network, "network", "user", "`mode`: user (through this host's network), none (only a loopback)")
	f.StringArrayVar(&p.upstream, "upstream", nil, "TCP `port` of a service at 127.0.0.1 of the network namespace that containers reach at theirs")
	f.StringVar(&p.netns, "netns", "", "take over the interface of the network namespace at `path`: /run/netns/NAME, /proc/PID/ns/net")
	f.StringVarP(&p.memory, "memory", "m", "", fmt.Sprintf("`size` of what the containers may use, exactly (default %v)", spec.DefaultMemory))
	f.Float64Var(&p.cpus, "cpus", 0, "`number` of processors (default 1); a fraction limits the container's share")
	f.Uint64Var(&p.cpuShares, "cpu-shares", 0, "weight against the pod's other containers, 1024 is one share")
	f.IntVar(&p.oomScoreAdj, "oom-score-adj", 0, "which process ends first when memory runs out, -1000 to 1000")
	f.Int64Var(&p.pidsLimit, "pids-limit", 0, "greatest `number` of processes")
	f.StringVar(&p.shmSize, "shm-size", "", fmt.Sprintf("`size` of /dev/shm (default %v)", spec.DefaultShmSize))
	f.StringVar(&p.scratchSize, "scratch-size", "", fmt.Sprintf("`size` of the writable disk, which grows as it is used (default %v)", spec.DefaultScratchSize))
	f.StringVar(&p.logMaxSize, "log-max-size", "", "`size` of the output that is kept")
	f.StringVar(&p.accel, "accel", "", "`accelerator`: auto, kvm, tcg")
	f.StringVar(&p.start, "start", "", "`way` in which the machine comes up: auto, template, cold")
	f.StringVar(&p.restart, "restart", "no", "`policy`: no, always, unless-stopped, on-failure[:times]")
	f.DurationVar(&p.delay, "restart-delay", 0, "`time` to wait before each restart (default: 100ms doubling up to a minute)")
	f.BoolVarP(&p.tty, "tty", "t", false, "give the container a terminal")
	f.BoolVarP(&p.interactive, "interactive", "i", false, "keep standard input open")
	f.BoolVar(&p.init, "init", false, "run an init as pid 1 that forwards signals and reaps processes")
	f.BoolVar(&p.readOnly, "read-only", false, "mount the container's root file system read-only")
	f.BoolVar(&p.privileged, "privileged", false, "all capabilities and devices, inside the guest")
	f.StringVar(&p.healthCmd, "health-cmd", "", "`command` that checks health")
	f.DurationVar(&p.healthInterval, "health-interval", 0, "`time` between checks")
	f.DurationVar(&p.healthTimeout, "health-timeout", 0, "`time` after which a check has failed")
	f.DurationVar(&p.healthStartPeriod, "health-start-period", 0, "`time` at the start in which failures do not count")
	f.DurationVar(&p.healthStartInterval, "health-start-interval", 0, "`time` between checks at the start")
	f.IntVar(&p.healthRetries, "health-retries", 0, "`number` of failures in a row that make it unhealthy")
	f.BoolVar(&p.noHealthcheck, "no-healthcheck", false, "do not run the image's healthcheck")
}

// volumesHelp explains -v and --mount.
const volumesHelp = `Volumes, as -v SOURCE:PATH[:option,…]:

  DIRECTORY:PATH               a directory of the host (./files: a name without a slash is NAME), made where missing
  FILE:PATH                    a file of the host (likewise)
  IMAGE.img:PATH, /dev/X:PATH  a raw image (.img, .raw) or block device: formatted ext4 when blank, mounted by the guest
  nfs://HOST/EXPORT:PATH       mounted by the guest
  NAME:PATH, PATH              a directory on the pod's scratch disk

PATH / makes the volume the container's root file system: what is installed there stays. Options: ro; nocopy; virtiofs (DIRECTORY); block, xfs,
size=SIZE (IMAGE: make it, sparse, where missing).

--mount type=bind|block|nfs|volume|tmpfs,source=SOURCE,target=PATH takes the same and readonly, fstype=, options=, subpath=, name=,
transport=virtiofs, tmpfs-size=, and raw (block: no mount, the device is /dev/volumes/NAME).`

// pod makes the Pod that the flags describe. Paths become absolute; directories and images that volumes are to be made in are not made yet: make does.
func (p *podFlags) pod(name, image string, command []string) (pod *spec.Pod, make []func() error, err error) {
	workdir := p.workdir
	if filepath.IsAbs(workdir) {
		workdir = filepath.Clean(workdir)
	}
	c := spec.PodContainer{Name: name, Image: image, User: p.user, WorkingDir: workdir, StopSignal: p.stopSignal}
	if p.name != "" {
		name, c.Name = p.name, p.name
	}
	if p.flags.Changed("entrypoint") {
		entrypoint := []string{}
		if p.entrypoint != "" {
			entrypoint = append(entrypoint, p.entrypoint)
		}
		c.Entrypoint = &entrypoint
	}
	if len(command) > 0 {
		c.Command = &command
	}
	s := &c.Settings
	*s = spec.Settings{
		Hostname: p.hostname, Domainname: p.domainname, GroupAdd: p.groupAdd, TTY: p.tty, OpenStdin: p.interactive, StdinOnce: p.interactive,
		Init: p.init, ReadOnly: p.readOnly, Privileged: p.privileged, CapAdd: p.capAdd, CapDrop: p.capDrop,
		Resources: spec.Limits{Pids: p.pidsLimit, CPUShares: p.cpuShares, OOMScoreAdj: p.oomScoreAdj},
	}
	if p.flags.Changed("stop-timeout") {
		d := spec.Duration(time.Duration(p.stopTimeout) * time.Second)
		if p.stopTimeout < 0 {
			d = spec.Duration(math.MaxInt32 * time.Second) // docker: wait for ever
		}
		s.StopTimeout = &d
	}
	pod = &spec.Pod{
		Name: name, Boot: spec.Boot{Accel: p.accel, Start: p.start},
		Network: spec.Network{DNS: p.dns, DNSSearch: p.dnsSearch, DNSOptions: p.dnsOption},
	}
	volumes := volumeSet{pod: pod, container: &c}
	for _, step := range []func() error{
		func() (err error) { c.Env, err = p.environment(); return err },
		func() (err error) { s.Labels, err = assignments("label", p.label, true); return err },
		func() (err error) { s.Sysctls, err = assignments("sysctl", p.sysctl, false); return err },
		func() (err error) { s.Ulimits, err = parseUlimits(p.ulimit); return err },
		func() (err error) { s.Devices, err = parseDevices(p.device); return err },
		func() (err error) { s.Tmpfs, err = parseTmpfs(p.tmpfs); return err },
		func() error { return parseSize("shm-size", p.shmSize, &s.ShmSize) },
		func() error { return parseSize("log-max-size", p.logMaxSize, &s.Logs.MaxSize) },
		func() error { return p.memoryLimit(pod, s) },
		func() error { return parseSize("scratch-size", p.scratchSize, &pod.Scratch.Size) },
		func() error { return p.security(s) },
		func() error { return p.processors(pod, s) },
		func() error { return p.lifecycle(s) },
		func() error { return p.health(&c) },
		func() error { return p.connect(&pod.Network) },
		func() error { return volumes.all(p.volume, p.mount) },
	} {
		if err := step(); err != nil {
			return nil, nil, err
		}
	}
	pod.Containers = []spec.PodContainer{c}
	return pod, volumes.make, nil
}

func (p *podFlags) environment() ([]string, error) {
	var out []string
	for _, file := range p.envFile {
		f, err := os.Open(file)
		if err != nil {
			return nil, fmt.Errorf("--env-file: %w", err)
		}
		defer f.Close()
		lines := bufio.NewScanner(f)
		for n := 1; lines.Scan(); n++ {
			line := strings.TrimLeft(strings.TrimPrefix(lines.Text(), "\ufeff"), " \t")
			if line == "" || line[0] == '#' {
				continue
			}
			name, _, _ := strings.Cut(line, "=")
			if name == "" || strings.ContainsAny(name, " \t") {
				return nil, fmt.Errorf("--env-file %s:%d: %q is no variable: write NAME=value", file, n, line)
			}
			out = appendVariable(out, line, false)
		}
		if err := lines.Err(); err != nil {
			return nil, fmt.Errorf("--env-file %s: %w", file, err)
		}
	}
	for _, e := range p.env {
		if e == "" || e[0] == '=' {
			return nil, fmt.Errorf("--env %q: write NAME=value, or NAME", e)
		}
		out = appendVariable(out, e, true)
	}
	return out, nil
}

// appendVariable adds NAME=value; NAME alone takes this process's value, and where it has none, removes the image's (as docker does for -e, not
// for files).
func appendVariable(env []string, v string, remove bool) []string {
	if strings.Contains(v, "=") {
		return append(env, v)
	}
	if value, ok := os.LookupEnv(v); ok {
		return append(env, v+"="+value)
	}
	if remove {
		return append(env, v)
	}
	return env
}

func assignments(flag string, all []string, empty bool) (map[string]string, error) {
	if len(all) == 0 {
		return nil, nil
	}
	m := map[string]string{}
	for _, a := range all {
		name, value, ok := strings.Cut(a, "=")
		if name == "" || !ok && !empty {
			return nil, fmt.Errorf("--%s %q: write NAME=value", flag, a)
		}
		m[name] = value
	}
	return m, nil
}

func parseUlimits(all []string) ([]spec.Ulimit, error) {
	var out []spec.Ulimit
	for _, u := range all {
		l, err := units.ParseUlimit(u)
		if err != nil {
			return nil, fmt.Errorf("--ulimit %s: %w", u, err)
		}
		out = append(out, spec.Ulimit{Name: l.Name, Soft: l.Soft, Hard: l.Hard})
	}
	return out, nil
}

func parseDevices(all []string) ([]string, error) {
	var out []string
	for _, d := range all {
		from, to, _ := strings.Cut(d, ":")
		to, _, _ = strings.Cut(to, ":")
		if strings.HasPrefix(to, "/") && to != from {
			return nil, fmt.Errorf("--device %s: a guest's device keeps its name: write %s", d, from)
		}
		out = append(out, from)
	}
	return out, nil
}

func parseTmpfs(all []string) (map[string]string, error) {
	if len(all) == 0 {
		return nil, nil
	}
	m := map[string]string{}
	for _, t := range all {
		path, options, _ := strings.Cut(t, ":")
		if !filepath.IsAbs(path) {
			return nil, fmt.Errorf("--tmpfs %s: the path is not absolute", t)
		}
		m[filepath.Clean(path)] = options
	}
	return m, nil
}

func parseSize(flag, s string, into *spec.Bytes) error {
	if s == "" {
		return nil
	}
	b, err := spec.ParseBytes(s)
	if err != nil {
		return fmt.Errorf("--%s: %w", flag, err)
	}
	if b <= 0 {
		return fmt.Errorf("--%s %s: not above 0", flag, s)
	}
	*into = b
	return nil
}

// memoryLimit bounds the pod as a whole, and the container as well: programs look at their own limit to size themselves.
func (p *podFlags) memoryLimit(pod *spec.Pod, s *spec.Settings) error {
	err := parseSize("memory", p.memory, &pod.Resources.Memory)
	s.Resources.Memory = pod.Resources.Memory
	return err
}

func (p *podFlags) security(s *spec.Settings) error {
	for _, o := range p.securityOpt {
		switch o {
		case "no-new-privileges", "no-new-privileges:true", "no-new-privileges=true":
			s.NoNewPrivs = true
		case "seccomp=unconfined", "apparmor=unconfined", "label=disable", "label:disable":
			// There is none of these inside the guest.
		default:
			return fmt.Errorf("--security-opt %s: only no-new-privileges means something inside a microVM", o)
		}
	}
	return nil
}

func (p *podFlags) processors(pod *spec.Pod, s *spec.Settings) error {
	if !(p.cpus >= 0 && p.cpus <= spec.MaxCPUs) {
		return fmt.Errorf("--cpus %g: 0 to %d", p.cpus, spec.MaxCPUs)
	}
	whole := math.Ceil(p.cpus)
	pod.Resources.CPUs = int(whole)
	if p.cpus != whole {
		s.Resources.CPUs = p.cpus
	}
	return nil
}

func (p *podFlags) lifecycle(s *spec.Settings) error {
	s.Lifecycle.RestartDelay = spec.Duration(p.delay)
	policy, times, bounded := strings.Cut(p.restart, ":")
	switch policy {
	case "", "no":
	case "always", "unless-stopped":
		s.Lifecycle.RestartOnSuccess, s.Lifecycle.RestartOnFailure = true, true
	case "on-failure":
		s.Lifecycle.RestartOnFailure = true
		if bounded {
			n, err := strconv.Atoi(times)
			if err != nil || n < 0 {
				return fmt.Errorf("--restart %s: %q is no number of restarts", p.restart, times)
			}
			if n > 0 {
				s.Lifecycle.MaxStarts = n + 1
			}
		}
		return nil
	default:
		return fmt.Errorf("--restart %s: none of no, always, unless-stopped, on-failure[:times]", p.restart)
	}
	if bounded {
		return fmt.Errorf("--restart %s: only on-failure takes a number of restarts", p.restart)
	}
	return nil
}

func (p *podFlags) health(c *spec.PodContainer) error {
	h := spec.Healthcheck{
		Interval: spec.Duration(p.healthInterval), Timeout: spec.Duration(p.healthTimeout), StartPeriod: spec.Duration(p.healthStartPeriod),
		StartInterval: spec.Duration(p.healthStartInterval), Retries: p.healthRetries,
	}
	set := p.healthCmd != "" || h.Interval != 0 || h.Timeout != 0 || h.StartPeriod != 0 || h.StartInterval != 0 || h.Retries != 0
	switch {
	case p.noHealthcheck && set:
		return errors.New("--no-healthcheck and --health-… exclude each other")
	case p.noHealthcheck:
		c.Healthcheck = &spec.Healthcheck{Test: []string{"NONE"}}
	case set:
		if p.healthCmd != "" {
			h.Test = []string{"CMD-SHELL", p.healthCmd}
		}
		c.Healthcheck = &h
	}
	return nil
}

func (p *podFlags) connect(n *spec.Network) error {
	n.Mode = p.network
	switch {
	case p.netns != "" && p.flags.Changed("network"):
		return errors.New("--netns and --network exclude each other")
	case p.netns != "":
		path, err := filepath.Abs(p.netns)
		if err != nil {
			return err
		}
		n.Mode, n.Netns = "netns", path
	case p.network == "bridge" || p.network == "default":
		n.Mode = "user"
	case p.network != "user" && p.network != "none":
		return fmt.Errorf("--network %s: user or none; for anything else prepare a network namespace and name it with --netns", p.network)
	}
	for _, u := range p.upstream {
		port, err := strconv.ParseUint(u, 10, 16)
		if err != nil {
			return fmt.Errorf("--upstream %s: no port", u)
		}
		n.Upstreams = append(n.Upstreams, uint16(port))
	}
	for _, port := range p.publish {
		mappings, err := nat.ParsePortSpec(port)
		if err != nil {
			return fmt.Errorf("--publish %s: %w", port, err)
		}
		for _, m := range mappings {
			guest, err := strconv.ParseUint(m.Port.Port(), 10, 16)
			if err != nil {
				return fmt.Errorf("--publish %s: %w", port, err)
			}
			host := uint64(0)
			if m.Binding.HostPort != "" {
				if host, err = strconv.ParseUint(m.Binding.HostPort, 10, 16); err != nil {
					return fmt.Errorf("--publish %s: one host port for each port: %w", port, err)
				}
			}
			n.Publish = append(n.Publish, spec.Publish{HostIP: m.Binding.HostIP, HostPort: uint16(host), Port: uint16(guest), Protocol: m.Port.Proto()})
		}
	}
	for _, h := range p.addHost {
		name, address, ok := strings.Cut(h, ":")
		if i := strings.IndexByte(h, '='); i >= 0 && (!ok || i < len(name)) {
			name, address = h[:i], h[i+1:]
		}
		if address == "host-gateway" {
			var err error
			if address, err = hostAddress(); err != nil {
				return fmt.Errorf("--add-host %s: %w: write the host's address", h, err)
			}
		}
		if name == "" || address == "" {
			return fmt.Errorf("--add-host %s: write NAME:address", h)
		}
		n.ExtraHosts = append(n.ExtraHosts, spec.HostEntry{Name: name, Address: strings.Trim(address, "[]")})
	}
	return nil
}

// hostAddress is the address that others reach this host at: it has a route to the outside. Nothing is sent.
func hostAddress() (string, error) {
	c, err := net.Dial("udp4", "192.0.2.1:9") // RFC 5737: nobody's
	if err != nil {
		return "", err
	}
	defer c.Close()
	host, _, err := net.SplitHostPort(c.LocalAddr().String())
	return host, err
}

// A volumeSet puts volumes into a pod and mounts them in its container.
type volumeSet struct {
	pod       *spec.Pod
	container *spec.PodContainer
	make      []func() error
}

func (v *volumeSet) all(volumes, mounts []string) error {
	for _, s := range volumes {
		if err := v.short(s); err != nil {
			return fmt.Errorf("--volume %s: %w", s, err)
		}
	}
	for _, s := range mounts {
		if err := v.long(s); err != nil {
			return fmt.Errorf("--mount %s: %w", s, err)
		}
	}
	return nil
}

// A mountRequest is what -v and --mount both say.
type mountRequest struct {
	kind, source, target, name, subpath string
	readOnly, noCopy, raw, virtiofs     bool
	fsType, options                     string
	size, tmpfsSize                     spec.Bytes
	create                              bool // a missing directory
}

// short is -v.
func (v *volumeSet) short(s string) error {
	m := mountRequest{create: true}
	if rest, ok := strings.CutPrefix(s, "nfs://"); ok {
		// The host may be an address with a port: what follows the export is the last part that begins with a slash.
		i := strings.LastIndex(rest, ":/")
		if i < 0 {
			return errors.New("write nfs://HOST/EXPORT:PATH")
		}
		m.kind, m.source = "nfs", rest[:i]
		rest, options, _ := strings.Cut(rest[i+1:], ":")
		m.target = rest
		if err := m.shortOptions(options); err != nil {
			return err
		}
		return v.add(m)
	}
	parts := strings.SplitN(s, ":", 3)
	switch len(parts) {
	case 1:
		m.kind, m.target = "volume", parts[0]
	default:
		m.source, m.target = parts[0], parts[1]
		if len(parts) == 3 {
			if err := m.shortOptions(parts[2]); err != nil {
				return err
			}
		}
	}
	if m.source == "" && len(parts) > 1 {
		return errors.New("the source is empty")
	}
	if m.kind == "" {
		m.kind = m.guess()
	}
	return v.add(m)
}

func (m *mountRequest) shortOptions(s string) error {
	for _, o := range strings.Split(s, ",") {
		name, value, _ := strings.Cut(o, "=")
		switch name {
		case "", "rw", "z", "Z", "private", "rprivate", "cached", "delegated", "consistent", "shared", "rshared", "slave", "rslave":
			// What docker's options say of labels and propagation means nothing between two machines.
		case "ro":
			m.readOnly = true
		case "nocopy":
			m.noCopy = true
		case "virtiofs":
			m.virtiofs = true
		case "bind":
			m.kind = "bind"
		case "block", "ext4", "xfs":
			m.kind = "block"
			if name != "block" {
				m.fsType = name
			}
		case "size":
			m.kind = "block"
			if err := parseSize("volume size", value, &m.size); err != nil {
				return err
			}
		default:
			if m.kind == "nfs" {
				m.options = strings.TrimPrefix(m.options+","+o, ",")
				continue
			}
			return fmt.Errorf("option %q is none of ro, nocopy, virtiofs, bind, block, xfs, size=", o)
		}
	}
	return nil
}

// guess tells what a source of -v is.
func (m *mountRequest) guess() string {
	isDisk := strings.HasSuffix(m.source, ".img") || strings.HasSuffix(m.source, ".raw")
	if !strings.ContainsAny(m.source[:1], ".~") && !strings.Contains(m.source, "/") && !isDisk {
		return "volume"
	}
	fi, err := os.Stat(m.source)
	switch {
	case err == nil && fi.Mode()&os.ModeDevice != 0 && fi.Mode()&os.ModeCharDevice == 0:
		return "block"
	case isDisk && (err != nil || fi.Mode().IsRegular()):
		return "block"
	}
	return "bind"
}

// long is --mount.
func (v *volumeSet) long(s string) error {
	fields, err := csv.NewReader(strings.NewReader(s)).Read()
	if err != nil {
		return err
	}
	m := mountRequest{kind: "volume"}
	for _, f := range fields {
		name, value, hasValue := strings.Cut(f, "=")
		yes := !hasValue || value == "true" || value == "1"
		switch strings.ToLower(name) {
		case "type":
			m.kind = value
		case "source", "src":
			m.source = value
		case "target", "dst", "destination":
			m.target = value
		case "readonly", "ro":
			m.readOnly = yes
		case "volume-nocopy", "nocopy":
			m.noCopy = yes
		case "volume-subpath", "subpath":
			m.subpath = value
		case "raw":
			m.raw = yes
		case "name":
			m.name = value
		case "fstype":
			m.fsType = value
		case "options":
			m.options = value
		case "transport":
			m.virtiofs = value == "virtiofs"
			if value != "virtiofs" && value != "9p" {
				return fmt.Errorf("transport %q is neither 9p nor virtiofs", value)
			}
		case "size":
			err = parseSize("size", value, &m.size)
		case "tmpfs-size":
			err = parseSize("tmpfs-size", value, &m.tmpfsSize)
		case "bind-propagation", "consistency", "volume-driver", "tmpfs-mode":
			if name == "volume-driver" && value != "local" {
				return fmt.Errorf("volume driver %s: there is only local", value)
			}
			if name == "tmpfs-mode" {
				m.options = "mode=" + value
			}
		default:
			return fmt.Errorf("unknown field %q", name)
		}
		if err != nil {
			return err
		}
	}
	return v.add(m)
}

func (v *volumeSet) add(m mountRequest) error {
	if !m.raw && !filepath.IsAbs(m.target) {
		return fmt.Errorf("the target %q is no absolute path", m.target)
	}
	if m.target != "" {
		m.target = filepath.Clean(m.target)
	}
	if m.kind == "tmpfs" {
		return v.tmpfs(m)
	}
	volume := spec.Volume{Name: m.name}
	switch m.kind {
	case "bind":
		path, err := absolute(m.source)
		if err != nil {
			return err
		}
		volume.Directory = &spec.DirectoryVolume{Path: path, ReadOnly: m.readOnly}
		if m.virtiofs {
			volume.Directory.Transport = "virtiofs"
		}
		if _, err := os.Stat(path); m.create && err != nil {
			if strings.HasPrefix(path, "/dev/") { // it was meant to be a disk
				return fmt.Errorf("there is no device %s: see lsblk", path)
			}
			v.make = append(v.make, func() error { return os.MkdirAll(path, 0o755) }) // as docker does
		}
	case "block":
		path, err := absolute(m.source)
		if err != nil {
			return err
		}
		volume.Block = &spec.BlockVolume{Path: path, FSType: m.fsType, ReadOnly: m.readOnly, Options: m.options}
		if m.size > 0 {
			v.make = append(v.make, func() error { return makeImage(path, m.size) })
		}
		if m.raw && volume.Name == "" {
			volume.Name = nameOf(strings.TrimSuffix(filepath.Base(path), filepath.Ext(path)))
		}
	case "nfs":
		host, export, ok := strings.Cut(strings.TrimPrefix(m.source, "nfs://"), "/")
		if !ok || host == "" {
			return errors.New("write the NFS source as HOST/EXPORT")
		}
		volume.NFS = &spec.NFSVolume{Address: strings.TrimSuffix(host, ":"), Export: filepath.Clean("/" + export), Options: m.options, ReadOnly: m.readOnly}
	case "volume":
		volume.Scratch = &spec.ScratchVolume{}
		if volume.Name == "" {
			volume.Name = m.source
		}
	default:
		return fmt.Errorf("type %q is none of bind, block, nfs, volume, tmpfs", m.kind)
	}
	if m.raw && m.kind != "block" {
		return errors.New("only a block volume can be raw")
	}
	if volume.Name == "" {
		volume.Name = v.unused(nameOf(m.target))
	}
	known := slices.IndexFunc(v.pod.Volumes, func(o spec.Volume) bool { return o.Name == volume.Name })
	if known < 0 {
		v.pod.Volumes = append(v.pod.Volumes, volume)
	} else if volume.Scratch == nil || v.pod.Volumes[known].Scratch == nil {
		return fmt.Errorf("there is a volume %s already: name another", volume.Name)
	}
	v.container.Mounts = append(v.container.Mounts, spec.Mount{
		Volume: volume.Name, Path: m.target, Subpath: m.subpath, ReadOnly: m.readOnly, NoCopy: m.noCopy, Raw: m.raw,
	})
	return nil
}

func (v *volumeSet) tmpfs(m mountRequest) error {
	options := m.options
	if m.tmpfsSize > 0 {
		options = strings.TrimPrefix(fmt.Sprintf("%s,size=%d", options, int64(m.tmpfsSize)), ",")
	}
	if m.readOnly {
		options = strings.TrimPrefix(options+",ro", ",")
	}
	if v.container.Tmpfs == nil {
		v.container.Tmpfs = map[string]string{}
	}
	v.container.Tmpfs[m.target] = options
	return nil
}

// nameOf makes a volume's name of a path.
func nameOf(path string) string {
	name := strings.Map(func(r rune) rune {
		switch {
		case r >= 'a' && r <= 'z', r >= 'A' && r <= 'Z', r >= '0' && r <= '9', r == '_', r == '.', r == '-':
			return r
		}
		return '-'
	}, path)
	if name = strings.TrimLeft(name, "-._"); name == "" {
		return "root"
	}
	return name[:min(len(name), 100)]
}

func (v *volumeSet) unused(name string) string {
	taken := func(n string) bool {
		return slices.ContainsFunc(v.pod.Volumes, func(o spec.Volume) bool { return o.Name == n })
	}
	for n := 2; ; n++ {
		if !taken(name) {
			return name
		}
		if next := fmt.Sprintf("%s-%d", name, n); !taken(next) {
			return next
		}
	}
}

func absolute(path string) (string, error) {
	if path == "" {
		return "", errors.New("the source is empty")
	}
	if rest, ok := strings.CutPrefix(path, "~/"); ok {
		home, err := os.UserHomeDir()
		if err != nil {
			return "", err
		}
		path = filepath.Join(home, rest)
	}
	return filepath.Abs(path)
}

// makeImage makes a sparse image where there is none.
func makeImage(path string, size spec.Bytes) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if errors.Is(err, os.ErrExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if err := errors.Join(f.Truncate(int64(size)), f.Close()); err != nil {
		os.Remove(path)
		return err
	}
	return nil
}
