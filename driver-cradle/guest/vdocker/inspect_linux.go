package vdocker

import (
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/docker/go-units"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/mount"
	"github.com/moby/moby/api/types/network"
	"github.com/moby/moby/api/types/storage"

	"github.com/cradlestack/cradlestack/driver-cradle/guest"
	"github.com/cradlestack/cradlestack/driver-cradle/wire"
	"github.com/cradlestack/cradlestack/internal/dockerhttp"
	"github.com/cradlestack/cradlestack/spec"
)

// networkName is the pod's network, as docker's clients see it: every pod has one, which all its containers share.
const networkName = "pod"

func (a *api) inspect(w http.ResponseWriter, r *http.Request, c *guest.Container) error {
	s := c.Spec()
	l := &a.pod.Launch().Launch
	state := c.State()
	argv := slices.Concat(s.Entrypoint, s.Command)
	path, args := "", []string{}
	if len(argv) > 0 {
		path, args = argv[0], argv[1:]
	}
	out := dockerhttp.InspectedContainer{InspectResponse: container.InspectResponse{
		ID: s.ID, Name: "/" + s.Name, Created: stamp(c.Created()), Path: path, Args: args, State: inspectState(state),
		Image: s.Image.ID, LogPath: c.IO().Path(), RestartCount: state.RestartCount, Driver: "overlay", Platform: "linux",
		HostConfig: hostConfig(c, l), Mounts: mountPoints(s, l), Config: config(s, l),
	}}
	for _, e := range c.Execs() {
		if e.State().Running {
			out.ExecIDs = append(out.ExecIDs, e.ID())
		}
	}
	if upper := c.Upper(); upper != "" {
		dir := filepath.Dir(upper)
		lowers := slices.Clone(c.Lowers())
		slices.Reverse(lowers)
		out.GraphDriver = &storage.DriverData{Name: "overlay", Data: map[string]string{
			"LowerDir": strings.Join(lowers, ":"), "UpperDir": upper, "WorkDir": filepath.Join(dir, "work"), "MergedDir": c.Rootfs(),
		}}
		out.ResolvConfPath = filepath.Join(dir, "files", "resolv.conf")
		out.HostnamePath = filepath.Join(dir, "files", "hostname")
		out.HostsPath = filepath.Join(dir, "files", "hosts")
	}
	if dockerhttp.Truth(r, "size") {
		writable, all, err := sizes(c)
		if err != nil {
			return err
		}
		out.SizeRw, out.SizeRootFs = &writable, &all
	}
	out.NetworkSettings = a.networkSettings(s, state.Running)
	return dockerhttp.Answer(w, http.StatusOK, out)
}

// stamp writes a time as docker does, the zero time as year 1.
func stamp(t time.Time) string { return t.UTC().Format(time.RFC3339Nano) }

func inspectState(s guest.State) *container.State {
	out := &container.State{
		Status: container.ContainerState(s.Status), Running: s.Running, Paused: s.Paused, Restarting: s.Restarting, OOMKilled: s.OOMKilled, Dead: s.Dead,
		Pid: s.Pid, ExitCode: s.ExitCode, Error: s.Error, StartedAt: stamp(s.StartedAt), FinishedAt: stamp(s.FinishedAt),
	}
	if h := s.Health; h != nil {
		out.Health = &container.Health{Status: container.HealthStatus(h.Status), FailingStreak: h.FailingStreak, Log: []*container.HealthcheckResult{}}
		for _, p := range h.Log {
			out.Health.Log = append(out.Health.Log, &container.HealthcheckResult{Start: p.Start, End: p.End, ExitCode: p.ExitCode, Output: p.Output})
		}
	}
	return out
}

func config(s spec.Container, l *spec.Launch) *container.Config {
	out := &container.Config{
		Hostname: hostname(s, l), Domainname: s.Domainname, User: s.User, AttachStdin: s.OpenStdin, AttachStdout: true, AttachStderr: true,
		Tty: s.TTY, OpenStdin: s.OpenStdin, StdinOnce: s.StdinOnce, Env: s.Env, Cmd: s.Command, Entrypoint: s.Entrypoint,
		Image: s.Image.Reference, WorkingDir: s.WorkingDir, Labels: labels(s), StopSignal: s.StopSignal,
	}
	for _, p := range s.ExposedPorts {
		if port, err := network.ParsePort(p); err == nil {
			if out.ExposedPorts == nil {
				out.ExposedPorts = network.PortSet{}
			}
			out.ExposedPorts[port] = struct{}{}
		}
	}
	if s.StopTimeout != nil {
		seconds := int(time.Duration(*s.StopTimeout).Seconds())
		out.StopTimeout = &seconds
	}
	if h := s.Healthcheck; h != nil {
		out.Healthcheck = &container.HealthConfig{
			Test: h.Test, Interval: time.Duration(h.Interval), Timeout: time.Duration(h.Timeout), StartPeriod: time.Duration(h.StartPeriod),
			StartInterval: time.Duration(h.StartInterval), Retries: h.Retries,
		}
	}
	return out
}

// labels are the image's and the container's, as docker merges them.
func labels(s spec.Container) map[string]string {
	out := map[string]string{}
	for _, m := range []map[string]string{s.Image.Labels, s.Labels} {
		for k, v := range m {
			out[k] = v
		}
	}
	return out
}

func hostname(s spec.Container, l *spec.Launch) string {
	switch {
	case s.Hostname != "":
		return s.Hostname
	case l.Hostname != "":
		return l.Hostname
	}
	return s.ID[:min(12, len(s.ID))]
}

// Docker's paths that a container sees nothing of, or can't write to (moby daemon/pkg/oci/defaults.go).
var (
	maskedPaths = []string{
		"/proc/acpi", "/proc/asound", "/proc/interrupts", "/proc/kcore", "/proc/keys", "/proc/latency_stats", "/proc/sched_debug", "/proc/scsi",
		"/proc/timer_list", "/proc/timer_stats", "/sys/devices/virtual/powercap", "/sys/firmware",
	}
	readonlyPaths = []string{"/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"}
)

func hostConfig(c *guest.Container, l *spec.Launch) *container.HostConfig {
	s := c.Spec()
	out := &container.HostConfig{
		NetworkMode: networkName, RestartPolicy: restartPolicy(s.Lifecycle), LogConfig: container.LogConfig{Type: "cradle", Config: map[string]string{}},
		CapAdd: s.CapAdd, CapDrop: s.CapDrop, CgroupnsMode: container.CgroupnsModePrivate, IpcMode: container.IPCModePrivate, GroupAdd: s.GroupAdd,
		OomScoreAdj: s.Resources.OOMScoreAdj, Privileged: s.Privileged, ReadonlyRootfs: s.ReadOnly, Tmpfs: s.Tmpfs, Sysctls: s.Sysctls,
		ShmSize: int64(s.ShmSize), Runtime: "cradle", DNSSearch: l.Network.DNSSearch, DNSOptions: l.Network.DNSOptions, PortBindings: bindings(l),
	}
	if s.Logs.MaxSize > 0 {
		out.LogConfig.Config["max-size"] = strconv.FormatInt(int64(s.Logs.MaxSize), 10)
	}
	if out.ShmSize == 0 {
		out.ShmSize = int64(spec.DefaultShmSize)
	}
	if s.Init {
		out.Init = &s.Init
	}
	if s.NoNewPrivs {
		out.SecurityOpt = []string{"no-new-privileges"}
	}
	if s.WritableCgroups {
		out.SecurityOpt = append(out.SecurityOpt, "writable-cgroups=true")
	}
	if !s.Privileged {
		out.MaskedPaths, out.ReadonlyPaths = maskedPaths, readonlyPaths
	}
	if s.MaskedPaths != nil {
		out.MaskedPaths = *s.MaskedPaths
	}
	if s.ReadonlyPaths != nil {
		out.ReadonlyPaths = *s.ReadonlyPaths
	}
	for _, d := range l.Network.DNS {
		if ip, err := netip.ParseAddr(d); err == nil {
			out.DNS = append(out.DNS, ip)
		}
	}
	for _, h := range l.Network.ExtraHosts {
		out.ExtraHosts = append(out.ExtraHosts, h.Name+":"+h.Address)
	}
	for _, d := range s.Devices {
		out.Devices = append(out.Devices, container.DeviceMapping{PathOnHost: d, PathInContainer: d, CgroupPermissions: "rwm"})
	}
	for _, u := range s.Ulimits {
		out.Ulimits = append(out.Ulimits, &units.Ulimit{Name: u.Name, Soft: u.Soft, Hard: u.Hard})
	}
	for _, m := range mountPoints(s, l) {
		if m.Type == mount.TypeBind {
			mode := "rw"
			if !m.RW {
				mode = "ro"
			}
			out.Binds = append(out.Binds, m.Source+":"+m.Destination+":"+mode)
			continue
		}
		out.Mounts = append(out.Mounts, mount.Mount{Type: m.Type, Source: m.Name, Target: m.Destination, ReadOnly: !m.RW})
	}
	limits(c, out)
	return out
}

// limits are those in force, which docker update may have changed.
func limits(c *guest.Container, h *container.HostConfig) {
	s := c.Spec().Resources
	h.CPUShares = int64(s.CPUShares)
	if n, ok := cgroupNumber(c.Cgroup(), "memory.max"); ok {
		h.Memory = int64(n)
	}
	if n, ok := cgroupNumber(c.Cgroup(), "memory.low"); ok {
		h.MemoryReservation = int64(n)
	}
	if quota, period, ok := cpuMax(c.Cgroup()); ok {
		h.NanoCPUs = int64(float64(quota) / float64(period) * 1e9)
	}
	if n, ok := cgroupNumber(c.Cgroup(), "pids.max"); ok {
		pids := int64(n)
		h.PidsLimit = &pids
	}
}

func restartPolicy(l spec.Lifecycle) container.RestartPolicy {
	switch {
	case l.RestartOnSuccess:
		return container.RestartPolicy{Name: container.RestartPolicyAlways}
	case l.RestartOnFailure:
		return container.RestartPolicy{Name: container.RestartPolicyOnFailure, MaximumRetryCount: max(l.MaxStarts-1, 0)}
	}
	return container.RestartPolicy{Name: container.RestartPolicyDisabled}
}

// bindings are the ports that the host publishes for the pod.
func bindings(l *spec.Launch) network.PortMap {
	out := network.PortMap{}
	for _, p := range l.Network.Publish {
		proto := network.IPProtocol(p.Protocol)
		if proto == "" {
			proto = network.TCP
		}
		port, ok := network.PortFrom(p.Port, proto)
		if !ok {
			continue
		}
		ip, _ := netip.ParseAddr(p.HostIP)
		out[port] = append(out[port], network.PortBinding{HostIP: ip, HostPort: strconv.Itoa(int(p.HostPort))})
	}
	return out
}

func mountPoints(s spec.Container, l *spec.Launch) []container.MountPoint {
	out := []container.MountPoint{}
	for _, m := range s.Mounts {
		i := slices.IndexFunc(l.Volumes, func(v spec.Volume) bool { return v.Name == m.Volume })
		if i < 0 || m.Raw {
			continue
		}
		v := l.Volumes[i]
		p := container.MountPoint{Type: mount.TypeVolume, Name: v.Name, Destination: filepath.Clean(m.Path), RW: !m.ReadOnly && !readOnly(v)}
		p.Driver = "local"
		if v.Class != "" {
			p.Driver = v.Class
		}
		switch {
		case v.Directory != nil:
			p = container.MountPoint{Type: mount.TypeBind, Source: v.Directory.Path, Destination: p.Destination, RW: p.RW, Propagation: mount.PropagationRPrivate}
		case v.Block != nil:
			p.Source = v.Block.Path
		case v.NFS != nil:
			p.Source = v.NFS.Address + ":" + v.NFS.Export
		case v.Ceph != nil:
			p.Source = strings.Join(v.Ceph.Monitors, ",") + ":" + v.Ceph.Path
		case v.Tmpfs != nil:
			p = container.MountPoint{Type: mount.TypeTmpfs, Destination: p.Destination, RW: p.RW}
		}
		out = append(out, p)
	}
	return out
}

func readOnly(v spec.Volume) bool {
	return v.Block != nil && v.Block.ReadOnly || v.Directory != nil && v.Directory.ReadOnly || v.NFS != nil && v.NFS.ReadOnly || v.Ceph != nil && v.Ceph.ReadOnly
}

func (a *api) networkSettings(s spec.Container, running bool) dockerhttp.NetworkSettings {
	l := a.pod.Launch()
	out := dockerhttp.NetworkSettings{NetworkSettings: container.NetworkSettings{Ports: ports(s, &l.Launch), Networks: map[string]*network.EndpointSettings{}}}
	out.Networks[networkName] = &network.EndpointSettings{NetworkID: l.Launch.ID}
	if !running {
		out.Ports = network.PortMap{}
		return out
	}
	out.SandboxID = l.Launch.ID
	e := endpoint(l)
	out.Networks[networkName] = e
	if e.IPAddress.IsValid() {
		out.IPAddress, out.IPPrefixLen = e.IPAddress.String(), e.IPPrefixLen
	}
	if e.Gateway.IsValid() {
		out.Gateway = e.Gateway.String()
	}
	if e.GlobalIPv6Address.IsValid() {
		out.GlobalIPv6Address, out.GlobalIPv6PrefixLen = e.GlobalIPv6Address.String(), e.GlobalIPv6PrefixLen
	}
	if e.IPv6Gateway.IsValid() {
		out.IPv6Gateway = e.IPv6Gateway.String()
	}
	out.EndpointID, out.MacAddress = e.EndpointID, e.MacAddress.String()
	return out
}

// endpoint is the pod's first interface.
func endpoint(l *wire.Launch) *network.EndpointSettings {
	e := &network.EndpointSettings{NetworkID: l.Launch.ID, EndpointID: l.Launch.ID}
	if len(l.Interfaces) == 0 {
		return e
	}
	i := l.Interfaces[0]
	if mac, err := net.ParseMAC(i.MAC); err == nil {
		e.MacAddress = network.HardwareAddr(mac)
	} else if dev, err := net.InterfaceByName(i.Name); err == nil {
		e.MacAddress = network.HardwareAddr(dev.HardwareAddr)
	}
	for _, p := range i.Addresses {
		switch {
		case p.Addr().Is4() && !e.IPAddress.IsValid():
			e.IPAddress, e.IPPrefixLen = p.Addr(), p.Bits()
		case p.Addr().Is6() && !p.Addr().IsLinkLocalUnicast() && !e.GlobalIPv6Address.IsValid():
			e.GlobalIPv6Address, e.GlobalIPv6PrefixLen = p.Addr(), p.Bits()
		}
	}
	for _, r := range i.Routes {
		if r.Destination.IsValid() && r.Destination.Bits() > 0 || !r.Via.IsValid() {
			continue
		}
		if r.Via.Is4() {
			e.Gateway = r.Via
		} else {
			e.IPv6Gateway = r.Via
		}
	}
	return e
}

// ports are the published ones and the container's exposed ones.
func ports(s spec.Container, l *spec.Launch) network.PortMap {
	out := bindings(l)
	for _, p := range s.ExposedPorts {
		if port, err := network.ParsePort(p); err == nil && out[port] == nil {
			out[port] = nil
		}
	}
	return out
}

// list answers docker ps.
func (a *api) list(w http.ResponseWriter, r *http.Request) error {
	f, err := dockerhttp.ParseFilters(r, "id", "name", "label", "status", "exited", "ancestor", "health", "before", "since", "volume", "network", "publish", "expose", "is-task", "isolation")
	if err != nil {
		return err
	}
	limit := 0
	if v := dockerhttp.Parameter(r, "limit"); v != "" {
		if limit, err = strconv.Atoi(v); err != nil {
			return dockerhttp.Invalid("limit: %q is no number", v)
		}
	}
	all := dockerhttp.Truth(r, "all") || limit > 0 || len(f["status"]) > 0 || len(f["exited"]) > 0
	sized := dockerhttp.Truth(r, "size")
	out := []container.Summary{}
	containers := slices.Clone(a.pod.Containers())
	slices.Reverse(containers) // docker's: the latest first
	for _, c := range containers {
		state := c.State()
		if !all && !state.Running {
			continue
		}
		ok, err := a.selects(f, c, state)
		if err != nil {
			return err
		}
		if !ok {
			continue
		}
		s, err := a.summary(c, state, sized)
		if err != nil {
			return err
		}
		if out = append(out, s); limit > 0 && len(out) == limit {
			break
		}
	}
	return dockerhttp.Answer(w, http.StatusOK, out)
}

func (a *api) selects(f dockerhttp.Filters, c *guest.Container, state guest.State) (bool, error) {
	s := c.Spec()
	l := &a.pod.Launch().Launch
	for _, v := range f["status"] {
		if err := container.ValidateContainerState(container.ContainerState(v)); err != nil {
			return false, dockerhttp.Invalid("%v", err)
		}
	}
	for _, v := range f["health"] {
		if err := container.ValidateHealthStatus(container.HealthStatus(v)); err != nil {
			return false, dockerhttp.Invalid("%v", err)
		}
	}
	for _, v := range f["exited"] {
		if _, err := strconv.Atoi(v); err != nil {
			return false, dockerhttp.Invalid("invalid filter 'exited=%s'", v)
		}
	}
	health := "none"
	if state.Health != nil {
		health = state.Health.Status
	}
	ok := f.Any("id", func(v string) bool { return v != "" && strings.HasPrefix(s.ID, v) || dockerhttp.Matches(v, s.ID) }) &&
		f.Any("name", func(v string) bool { return dockerhttp.Matches(v, s.Name) || dockerhttp.Matches(v, "/"+s.Name) }) &&
		f.Labels("label", labels(s), false) &&
		f.Any("status", func(v string) bool { return v == state.Status }) &&
		f.Any("exited", func(v string) bool {
			return v == strconv.Itoa(state.ExitCode) && !state.Running && !state.FinishedAt.IsZero()
		}) &&
		f.Any("health", func(v string) bool { return v == health }) &&
		f.Any("ancestor", func(v string) bool { return isImage(s.Image, v) }) &&
		f.Any("network", func(v string) bool { return v == networkName || v == l.ID }) &&
		f.Any("volume", func(v string) bool {
			return slices.ContainsFunc(mountPoints(s, l), func(m container.MountPoint) bool { return v == m.Name || v == m.Destination || v == m.Source })
		}) &&
		f.Any("publish", func(v string) bool { return hasPort(bindings(l), v) }) &&
		f.Any("expose", func(v string) bool { return hasPort(ports(s, l), v) }) &&
		f.Any("is-task", func(v string) bool { return v == "false" || v == "0" })
	for name, after := range map[string]bool{"since": true, "before": false} {
		for _, v := range f[name] {
			other, err := a.pod.Lookup(v)
			if err != nil {
				return false, err
			}
			order := slices.Index(a.pod.Containers(), c) - slices.Index(a.pod.Containers(), other)
			ok = ok && (after && order > 0 || !after && order < 0)
		}
	}
	return ok, nil
}

func hasPort(m network.PortMap, want string) bool {
	p, err := network.ParsePort(want)
	if err != nil {
		return false
	}
	_, ok := m[p]
	return ok
}

func isImage(i spec.Image, want string) bool {
	id := strings.TrimPrefix(i.ID, "sha256:")
	hex := strings.TrimPrefix(want, "sha256:")
	if want == i.Reference || want == i.Digest || len(hex) >= 4 && strings.HasPrefix(id, hex) {
		return true
	}
	name, tag := i.Reference, ""
	if colon := strings.LastIndexByte(name, ':'); colon > strings.LastIndexByte(name, '/') {
		name, tag = name[:colon], name[colon+1:]
	}
	return want == name && (tag == "" || tag == "latest") || want == name+":latest" && tag == ""
}

func (a *api) summary(c *guest.Container, state guest.State, sized bool) (container.Summary, error) {
	s := c.Spec()
	l := a.pod.Launch()
	out := container.Summary{
		ID: s.ID, Names: []string{"/" + s.Name}, Image: s.Image.Reference, ImageID: s.Image.ID, Command: strings.Join(slices.Concat(s.Entrypoint, s.Command), " "),
		Created: c.Created().Unix(), Labels: labels(s), State: container.ContainerState(state.Status), Status: statusText(state, time.Now()),
		Mounts: mountPoints(s, &l.Launch), Ports: []container.PortSummary{},
	}
	out.HostConfig.NetworkMode = networkName
	e := &network.EndpointSettings{NetworkID: l.Launch.ID}
	if state.Running {
		e = endpoint(l)
		out.Ports = portSummaries(ports(s, &l.Launch))
	}
	out.NetworkSettings = &container.NetworkSettingsSummary{Networks: map[string]*network.EndpointSettings{networkName: e}}
	if state.Health != nil {
		out.Health = &container.HealthSummary{Status: container.HealthStatus(state.Health.Status), FailingStreak: state.Health.FailingStreak}
	}
	if sized {
		var err error
		if out.SizeRw, out.SizeRootFs, err = sizes(c); err != nil {
			return out, err
		}
	}
	return out, nil
}

func portSummaries(m network.PortMap) []container.PortSummary {
	out := []container.PortSummary{}
	for port, bound := range m {
		p := container.PortSummary{PrivatePort: port.Num(), Type: string(port.Proto())}
		if len(bound) == 0 {
			out = append(out, p)
		}
		for _, b := range bound {
			n, _ := strconv.ParseUint(b.HostPort, 10, 16)
			p.PublicPort, p.IP = uint16(n), b.HostIP
			if !p.IP.IsValid() {
				p.IP = netip.IPv4Unspecified()
			}
			out = append(out, p)
		}
	}
	slices.SortFunc(out, func(a, b container.PortSummary) int {
		return strings.Compare(fmt.Sprintf("%05d/%s/%05d", a.PrivatePort, a.Type, a.PublicPort), fmt.Sprintf("%05d/%s/%05d", b.PrivatePort, b.Type, b.PublicPort))
	})
	return out
}

// statusText is docker's sentence (moby daemon/container/state.go String).
func statusText(s guest.State, now time.Time) string {
	up := units.HumanDuration(now.Sub(s.StartedAt))
	switch {
	case s.Restarting:
		return fmt.Sprintf("Restarting (%d) %s ago", s.ExitCode, units.HumanDuration(now.Sub(s.FinishedAt)))
	case s.Paused:
		return fmt.Sprintf("Up %s (Paused)", up)
	case s.Running && s.Health != nil && s.Health.Status == guest.HealthStarting:
		return fmt.Sprintf("Up %s (health: starting)", up)
	case s.Running && s.Health != nil:
		return fmt.Sprintf("Up %s (%s)", up, s.Health.Status)
	case s.Running:
		return "Up " + up
	case s.Dead:
		return "Dead"
	case s.Status == wire.StateCreated:
		return "Created"
	case s.FinishedAt.IsZero():
		return ""
	}
	return fmt.Sprintf("Exited (%d) %s ago", s.ExitCode, units.HumanDuration(now.Sub(s.FinishedAt)))
}

// cgroupNumber reads a limit of a cgroup; false: there is none.
func cgroupNumber(dir, file string) (uint64, bool) {
	data, err := os.ReadFile(filepath.Join(dir, file))
	if err != nil {
		return 0, false
	}
	n, err := strconv.ParseUint(strings.TrimSpace(string(data)), 10, 64)
	return n, err == nil && n > 0
}

func cpuMax(dir string) (quota, period uint64, ok bool) {
	data, err := os.ReadFile(filepath.Join(dir, "cpu.max"))
	if err != nil {
		return 0, 0, false
	}
	_, err = fmt.Sscan(string(data), &quota, &period)
	return quota, period, err == nil && period > 0
}
