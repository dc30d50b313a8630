package stack

import (
	"context"
	"errors"
	"fmt"
	"hash/crc32"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/cradlestack/cradlestack/internal/agents"
	"github.com/cradlestack/cradlestack/internal/cgroup"
)

const forwarding = "/proc/sys/net/ipv4/ip_forward"

// lockHost keeps other stacks from coming up and from being swept until done is called: none is to choose what another has chosen and does not use yet, or
// to remove what all share while another begins to use it.
func lockHost(ctx context.Context) (done func(), err error) {
	dir, err := os.Open(unified()) // every stack has its cgroup there
	if err != nil {
		return nil, err
	}
	if err := agents.Retry(ctx, "another stack that comes up or goes down on this host", func() error {
		return unix.Flock(int(dir.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	}); err != nil {
		dir.Close()
		return nil, err
	}
	return func() { dir.Close() }, nil
}

// settleIn chooses ports, bridge and addresses that nobody else on the host has. The ports are for good: Nomad and Consul remember them.
func (s *Stack) settleIn() error {
	from, first := 10000, 0
	if s.dir != DefaultDir { // others come and go while one is down, and don't begin with what that one has had
		sum := crc32.ChecksumIEEE([]byte(s.dir))
		from, first = 20000+int(sum%40)*100, int(sum%bridges)
	}
	if s.record.Offset == 0 {
		for try := from; try < 45000 && s.record.Offset == 0; try += 100 {
			if portsFree(agents.DefaultPorts(try), order...) == nil {
				s.record.Offset = try
			}
		}
		if s.record.Offset == 0 {
			return errors.New("this host has no free ports")
		}
	}
	s.record.Bridge = ""
	for i := first; s.record.Bridge == ""; i++ {
		s.record.Bridge = "cradle" + strconv.Itoa(i)
		_, err := netlink.LinkByName(s.record.Bridge)
		if errors.As(err, &netlink.LinkNotFoundError{}) {
			// Of several stacks, one makes the cgroup: it has the name.
			err = os.Mkdir(s.cgroup(), 0o755)
		} else if err == nil {
			err = fs.ErrExist
		}
		if errors.Is(err, fs.ErrExist) {
			s.record.Bridge = ""
		} else if err != nil {
			return err
		}
	}
	var err error
	if s.record.Subnet, err = freeSubnet(s.record.Bridge); err != nil {
		return err
	}
	text, err := os.ReadFile(forwarding)
	if err != nil {
		return err
	}
	s.record.Forwarded = strings.TrimSpace(string(text)) != "0"
	return s.save()
}

// bridges are how many stacks of a host can have addresses.
const bridges = 16

// freeSubnet is one of 4096 addresses that no route of the host's leads to. Stacks that are down have none: the bridge's number keeps them apart.
func freeSubnet(bridge string) (string, error) {
	routes, err := netlink.RouteList(nil, netlink.FAMILY_V4)
	if err != nil {
		return "", fmt.Errorf("list routes: %w", err)
	}
	number, err := strconv.Atoi(strings.TrimPrefix(bridge, "cradle"))
	if err != nil {
		return "", err
	}
	for i := range bridges {
		subnet := netip.PrefixFrom(netip.AddrFrom4([4]byte{172, 27, byte((number + i) % bridges * 16), 0}), 20)
		taken := slices.ContainsFunc(routes, func(r netlink.Route) bool {
			if r.Dst == nil || r.Dst.IP.IsUnspecified() {
				return false
			}
			a, ok := netip.AddrFromSlice(r.Dst.IP.To4())
			ones, _ := r.Dst.Mask.Size()
			return ok && netip.PrefixFrom(a, ones).Overlaps(subnet)
		})
		if !taken {
			return subnet.String(), nil
		}
	}
	return "", errors.New("all of 172.27.0.0/16, where pods get their addresses, is in use on this host")
}

// portsFree says which of an agent's ports another program has.
func (s *Stack) portsFree(c agents.Config, name string) error {
	if err := portsFree(c.Ports, name); err != nil {
		return fmt.Errorf("%w: end the program that has it (the stack keeps its ports; make clean removes it with its data)", err)
	}
	return nil
}

func portsFree(p agents.Ports, names ...string) error {
	for _, name := range names {
		for _, port := range portsOf(p, name) {
			// All addresses: a program that listens on them all takes the loopback interface's, too.
			l, err := net.Listen("tcp", fmt.Sprintf(":%d", port))
			if err != nil {
				return fmt.Errorf("port %d of %s is in use", port, name)
			}
			l.Close()
		}
	}
	return nil
}

// portsOf are the ports of one of a stack's processes.
func portsOf(p agents.Ports, name string) []int {
	return map[string][]int{
		agents.Consul: {p.ConsulHTTP, p.ConsulDNS, p.ConsulRPC, p.ConsulSerf, p.ConsulGRPC}, agents.Server: {p.HTTP, p.RPC, p.Serf}, agents.Client: {p.ClientHTTP},
		dockerAPI: {p.Registry},
	}[name]
}

// ports are all of the stack's, as Nomad reads them.
func (s *Stack) ports() string {
	var all []string
	for _, port := range []int{s.nfsPort(), s.filerAPIPort(), s.webdavPort(), s.s3Port()} {
		all = append(all, strconv.Itoa(port))
	}
	for _, name := range order {
		for _, port := range portsOf(agents.DefaultPorts(s.record.Offset), name) {
			all = append(all, strconv.Itoa(port))
		}
	}
	return strings.Join(all, ",")
}

// allocs are the allocations whose directories are there.
func (s *Stack) allocs() ([]string, error) {
	entries, err := os.ReadDir(filepath.Join(s.dir, "nomad", "alloc"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	var ids []string
	for _, e := range entries {
		ids = append(ids, e.Name())
	}
	return ids, err
}

// mounts are those below the stack's directory, and the network namespaces of its allocations; the last ones first.
func (s *Stack) mounts() ([]string, error) {
	ids, err := s.allocs()
	if err != nil {
		return nil, err
	}
	text, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	var points []string
	for line := range strings.Lines(string(text)) {
		fields := strings.Fields(line)
		if len(fields) < 5 {
			return nil, fmt.Errorf("mountinfo: %q", line)
		}
		point := fields[4]
		if strings.HasPrefix(point, s.dir+"/") || filepath.Dir(point) == netnsDir && slices.Contains(ids, filepath.Base(point)) {
			points = append(points, point)
		}
	}
	slices.Reverse(points)
	return points, nil
}

const netnsDir = "/run/netns"

// sweep removes what agents leave on the host by design, and what they could not clear up.
func (s *Stack) sweep(ctx context.Context) error {
	done, err := lockHost(ctx)
	if err != nil {
		return err
	}
	defer done()
	ids, err := s.allocs()
	if err != nil {
		return err
	}
	forgetAddresses(ids)
	return errors.Join(s.killAll(ids), s.unmountAll(), s.removeNetwork(), removeShared(), cgroup.RemoveTree(s.cgroup()))
}

// killAll ends what is left of the stack's processes: those in its cgroup, and those that Nomad has put into one of a task.
func (s *Stack) killAll(ids []string) error {
	dirs := []string{s.cgroup()}
	for _, id := range ids {
		tasks, _ := filepath.Glob(unified() + "/nomad.slice/*/" + id + ".*")
		dirs = append(dirs, tasks...)
	}
	for _, dir := range dirs {
		for begin := time.Now(); ; time.Sleep(10 * time.Millisecond) {
			if err := os.WriteFile(filepath.Join(dir, "cgroup.kill"), []byte("1"), 0); errors.Is(err, fs.ErrNotExist) {
				break
			} else if err != nil {
				return err
			}
			events, err := os.ReadFile(filepath.Join(dir, "cgroup.events"))
			if err != nil || strings.Contains(string(events), "populated 0") {
				break
			}
			if time.Since(begin) > endLimit {
				return fmt.Errorf("processes in %s don't die", dir)
			}
		}
		if dir != s.cgroup() {
			if err := cgroup.RemoveTree(dir); err != nil {
				return err
			}
		}
	}
	return nil
}

func (s *Stack) unmountAll() error {
	points, err := s.mounts()
	if err != nil {
		return err
	}
	for _, p := range points {
		if err := unix.Unmount(p, unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) {
			return fmt.Errorf("unmount %s: %w", p, err)
		}
		if filepath.Dir(p) == netnsDir {
			os.Remove(p)
		}
	}
	return nil
}

// forgetAddresses removes what CNI's plugins remember of allocations that Nomad could not take away from them.
func forgetAddresses(ids []string) {
	for _, id := range ids {
		results, _ := filepath.Glob("/var/lib/cni/results/nomad-" + id + "-*")
		for _, r := range results {
			os.Remove(r)
		}
	}
	for _, dir := range []string{"/run/cni/nomad", "/var/lib/cni/networks/nomad"} {
		leases, _ := filepath.Glob(dir + "/*.*.*.*")
		for _, lease := range leases {
			text, err := os.ReadFile(lease)
			if err != nil {
				continue
			}
			if owner, _, _ := strings.Cut(string(text), "\n"); slices.Contains(ids, strings.TrimSpace(owner)) {
				os.Remove(lease)
			}
		}
	}
}

// removeNetwork removes the bridge, and the firewall's rules and chains that nobody needs without it.
func (s *Stack) removeNetwork() error {
	bridge, err := netlink.LinkByName(s.record.Bridge)
	if err == nil {
		err = netlink.LinkDel(bridge)
	}
	if err != nil && !errors.As(err, &netlink.LinkNotFoundError{}) {
		return fmt.Errorf("remove bridge %s: %w", s.record.Bridge, err)
	}
	for _, table := range []string{"filter", "nat"} {
		if err := clearTable(table, s.record.Bridge); err != nil {
			return err
		}
	}
	if s.record.Forwarded {
		return nil
	}
	// Other bridges' owners may rely on what ours has switched on.
	links, err := netlink.LinkList()
	if err != nil || slices.ContainsFunc(links, func(l netlink.Link) bool { return l.Type() == "bridge" }) {
		return err
	}
	return os.WriteFile(forwarding, []byte("0"), 0)
}

// clearTable removes what is not needed without a bridge. Others, as Nomad's plugins, change the table at any moment: what they have changed is looked at again.
func clearTable(table, bridge string) error {
	for try := 0; ; try++ {
		rules, err := command("", "iptables-save", "-t", table)
		if err != nil {
			return err
		}
		edit := unneeded(table, rules, bridge)
		if edit == "" {
			return nil
		}
		if _, err = command(edit, "iptables-restore", "--wait", "--noflush"); err == nil || try == 10 {
			return err
		}
	}
}

var ruleChain = regexp.MustCompile(`^-A (\S+)`)

// unneeded is what iptables-restore has to be told to remove the rules of a bridge, and the chains of Nomad's and CNI's plugins where no pod has
// rules in them: they are made anew for the next one. Its first argument is what iptables-save prints of a table.
func unneeded(table, rules, bridge string) string {
	fixed := map[string][]string{ // chains, and what their rules contain that are there without a pod
		"filter": {"CNI-FORWARD", "NOMAD-ADMIN"},
		"nat":    {"CNI-HOSTPORT-DNAT", "CNI-HOSTPORT-MASQ", "CNI-HOSTPORT-SETMARK"},
	}[table]
	var ours, rest, jumps []string
	used := false
	there := map[string]bool{}
	for line := range strings.Lines(rules) {
		line = strings.TrimSpace(line)
		if name, ok := strings.CutPrefix(line, ":"); ok {
			name, _, _ = strings.Cut(name, " ")
			there[name] = slices.Contains(fixed, name)
			// A chain of one pod's, whoever's that is.
			used = used || strings.HasPrefix(name, "CNI-") && !slices.Contains(fixed, name)
			continue
		}
		m := ruleChain.FindStringSubmatch(line)
		if m == nil {
			continue
		}
		switch {
		case strings.Contains(line, "-o "+bridge+" "):
			ours = append(ours, line)
		case slices.Contains(fixed, m[1]):
			rest = append(rest, line)
			used = used || m[1] == "NOMAD-ADMIN" || m[1] == "CNI-FORWARD" && !strings.HasSuffix(line, "-j NOMAD-ADMIN") || m[1] == "CNI-HOSTPORT-DNAT"
		case slices.ContainsFunc(fixed, func(c string) bool { return strings.HasSuffix(line, "-j "+c) }):
			jumps = append(jumps, line)
		}
	}
	var edit []string
	for _, line := range ours {
		edit = append(edit, "-D"+strings.TrimPrefix(line, "-A"))
	}
	if !used {
		for _, line := range slices.Concat(jumps, rest) {
			edit = append(edit, "-D"+strings.TrimPrefix(line, "-A"))
		}
		for _, c := range fixed {
			if there[c] {
				edit = append(edit, "-X "+c)
			}
		}
	}
	if len(edit) == 0 {
		return ""
	}
	return "*" + table + "\n" + strings.Join(edit, "\n") + "\nCOMMIT\n"
}

// removeShared removes what all of a host's Nomads use: cgroups in which they make those of tasks, the folder of network namespaces, which they
// make a mountpoint, and what CNI's plugins keep for the next address. It does nothing while another Nomad is there.
func removeShared() error {
	programs, err := filepath.Glob("/proc/[0-9]*/exe")
	if err != nil {
		return err
	}
	for _, p := range programs {
		if exe, err := os.Readlink(p); err == nil && strings.TrimSuffix(filepath.Base(exe), " (deleted)") == "nomad" {
			return nil
		}
	}
	// Folders from the leaves up, where there is nothing in them.
	remove := func(patterns ...string) {
		for _, pattern := range patterns {
			found, _ := filepath.Glob(pattern)
			for _, f := range found {
				if info, err := os.Stat(f); err == nil && info.IsDir() {
					_ = unix.Rmdir(f) // it is another's if there is something in it
				}
			}
		}
	}
	remove("/sys/fs/cgroup/*/nomad/*", "/sys/fs/cgroup/*/nomad", "/sys/fs/cgroup/nomad.slice/*", "/sys/fs/cgroup/nomad.slice")
	for _, dir := range []string{"/run/cni", "/var/lib/cni/networks"} {
		if leases, _ := filepath.Glob(dir + "/nomad/*.*.*.*"); len(leases) == 0 {
			os.Remove(dir + "/nomad/last_reserved_ip.0")
			os.Remove(dir + "/nomad/lock")
		}
	}
	// /var/lib/cni itself stays: what another mount namespace has mounted there would go with it.
	remove("/run/cni/nomad", "/run/cni", "/var/lib/cni/networks/nomad", "/var/lib/cni/networks", "/var/lib/cni/results")
	if names, err := os.ReadDir(netnsDir); err == nil && len(names) == 0 {
		_ = unix.Unmount(netnsDir, 0) // it need not be one
	}
	return nil
}
