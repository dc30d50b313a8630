package nomadtest

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// settleTime is what the kernel and Nomad get for clearing away.
const settleTime = 2 * time.Minute

// An inventory is everything on a node that could be left behind, each thing described by a line.
type inventory map[string]bool

// remains waits for everything that was not there before to be gone, and tells what is not.
func (n *Node) remains(before inventory) error {
	var left []string
	for begin := time.Now(); ; time.Sleep(50 * time.Millisecond) {
		now, err := n.inventory()
		if err != nil {
			return err
		}
		left = left[:0]
		for _, thing := range slices.Sorted(maps.Keys(now)) {
			// A node that was booted meanwhile has copies of mounts that others had on the host then.
			inherited := n.first[thing] && strings.HasPrefix(thing, "mount ")
			if tolerated := n.cluster.o.Tolerate; !before[thing] && !inherited && (tolerated == nil || !tolerated.MatchString(thing)) {
				left = append(left, thing)
			}
		}
		if len(left) == 0 {
			return nil
		}
		if time.Since(begin) > settleTime {
			return fmt.Errorf("%s: left behind:\n  %s", n.Name, strings.Join(left, "\n  "))
		}
	}
}

// inventory looks at processes with the files they hold, mounts, network, cgroups, sockets, loop devices and files.
func (n *Node) inventory() (inventory, error) {
	all := inventory{}
	for _, look := range []func(inventory) error{n.firewall, n.processes, n.links, n.sockets, n.cgroupsBelow, n.loops, n.files} {
		if err := look(all); err != nil {
			return nil, fmt.Errorf("inventory of %s: %w", n.Name, err)
		}
	}
	return all, nil
}

// A Process is one of the node's.
type Process struct {
	PID, Parent int // as the host counts
	Args        []string
	State       byte
}

// Name is the program's, without its folder.
func (p Process) Name() string {
	if len(p.Args) == 0 {
		return ""
	}
	return filepath.Base(p.Args[0])
}

// Processes lists what runs in the node but its first process.
func (n *Node) Processes() ([]Process, error) {
	space, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/pid", n.PID()))
	if err != nil {
		return nil, err
	}
	dirs, err := os.ReadDir("/proc")
	if err != nil {
		return nil, err
	}
	inside := map[int]bool{}
	var all, others []Process
	for _, d := range dirs {
		pid, err := strconv.Atoi(d.Name())
		if err != nil {
			continue
		}
		p, err := process(pid)
		if err != nil {
			continue // it has ended meanwhile
		}
		its, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/pid", pid))
		switch {
		case pid == n.PID():
			inside[pid] = true
		case err == nil && its == space:
			inside[pid] = true
			all = append(all, p)
		default:
			others = append(others, p)
		}
	}
	// Process namespaces below the node's, by their ancestors. A zombie has none any more.
	for again := true; again; {
		again = false
		for i, p := range others {
			if p.PID != 0 && inside[p.Parent] {
				inside[p.PID] = true
				all = append(all, p)
				others[i] = Process{}
				again = true
			}
		}
	}
	return all, nil
}

// OpenLogs are the files of allocations that Nomad's processes for tasks' logs have open.
func (n *Node) OpenLogs() (all []string, err error) {
	list, err := n.Processes()
	if err != nil {
		return nil, err
	}
	for _, p := range list {
		if len(p.Args) < 2 || p.Args[1] != "logmon" {
			continue
		}
		files, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", p.PID))
		if err != nil {
			return nil, err
		}
		for _, f := range files {
			if to, err := os.Readlink(f); err == nil && strings.Contains(to, "/nomad/alloc/") {
				all = append(all, to)
			}
		}
	}
	return all, nil
}

func process(pid int) (Process, error) {
	dir := fmt.Sprintf("/proc/%d/", pid)
	stat, err := os.ReadFile(dir + "stat")
	if err != nil {
		return Process{}, err
	}
	// pid (name) state ppid …: the name may contain anything.
	open, end := bytes.IndexByte(stat, '('), bytes.LastIndexByte(stat, ')')
	fields := strings.Fields(string(stat[end+1:]))
	if open < 0 || len(fields) < 2 {
		return Process{}, fmt.Errorf("%sstat: %q", dir, stat)
	}
	parent, err := strconv.Atoi(fields[1])
	if err != nil {
		return Process{}, err
	}
	line, err := os.ReadFile(dir + "cmdline")
	if err != nil {
		return Process{}, err
	}
	p := Process{PID: pid, Parent: parent, State: fields[0][0]}
	if line = bytes.TrimRight(line, "\x00"); len(line) > 0 {
		p.Args = strings.Split(string(line), "\x00")
	} else {
		p.Args = []string{string(stat[open+1 : end])}
	}
	return p, nil
}

// processes are those that are neither agents nor their plugins. Of a plugin there is one, the agent's child or an orphan that the agent has found after it was
// killed: another is left over.
func (n *Node) processes(all inventory) error {
	list, err := n.Processes()
	if err != nil {
		return err
	}
	agents := map[int]string{}
	n.mu.Lock()
	for name, a := range n.agents {
		agents[a.cmd.Process.Pid] = name
	}
	n.mu.Unlock()
	spaces := map[string]bool{}
	if err := n.mounts(all, n.PID(), spaces); err != nil {
		return err
	}
	for _, p := range list {
		name := agents[p.PID]
		switch {
		case name != "":
		case (agents[p.Parent] != "" || p.Parent == n.PID()) && strings.HasPrefix(p.Args[0], filepath.Join(n.Dir, "plugins")+"/"):
			if name = "plugin " + p.Name(); all["process "+name] {
				name = ""
			}
		}
		if name == "" {
			all[fmt.Sprintf("process %d of %d: %s", p.PID, p.Parent, strings.Join(p.Args, " "))] = true
			continue
		}
		all["process "+name] = true
		// One that has ended meanwhile has none; EINVAL is how the kernel says so of its mountinfo.
		if err := n.mounts(all, p.PID, spaces); err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, unix.EINVAL) {
			return err
		}
		if strings.HasPrefix(name, "plugin ") {
			held(all, name, p.PID)
		}
	}
	return nil
}

// heldKinds are open files of which a plugin has some for every pod.
var heldKinds = regexp.MustCompile(`^(/dev/(net/tun|kvm|loop|vhost)|(net|mnt|pid):\[|anon_inode:\[pidfd\]|.*/nomad/alloc/)`)

// held counts the open files that belong to pods.
func held(all inventory, name string, pid int) {
	dir := fmt.Sprintf("/proc/%d/fd", pid)
	files, _ := os.ReadDir(dir) // of a process that has ended: none
	count := map[string]int{}
	for _, f := range files {
		to, err := os.Readlink(filepath.Join(dir, f.Name()))
		if err != nil || !heldKinds.MatchString(to) {
			continue
		}
		kind, _, _ := strings.Cut(to, ":[")
		count[kind]++
		all[fmt.Sprintf("open file of %s: %s (%d)", name, to[:min(len(to), 200)], count[kind])] = true
	}
}

// netnsDir is a folder that Nomad turns into a mountpoint and leaves so; anything in it is a namespace.
const netnsDir = "/run/netns"

// A mountpoint is a line of mountinfo.
type mountpoint struct{ point, kind, source, super string }

func mountsOf(pid string) ([]mountpoint, error) {
	text, err := os.ReadFile("/proc/" + pid + "/mountinfo")
	if err != nil {
		return nil, err
	}
	var all []mountpoint
	for line := range strings.Lines(string(text)) {
		before, after, ok := strings.Cut(strings.TrimSpace(line), " - ")
		b, a := strings.Fields(before), strings.Fields(after)
		if !ok || len(b) < 6 || len(a) < 3 {
			return nil, fmt.Errorf("mountinfo: %q", line)
		}
		point, err := strconv.Unquote(`"` + b[4] + `"`) // \040 is a blank
		if err != nil {
			point = b[4]
		}
		all = append(all, mountpoint{point: point, kind: a[0], source: a[1], super: a[2]})
	}
	return all, nil
}

// mounts are those of a process, once for each namespace.
func (n *Node) mounts(all inventory, pid int, spaces map[string]bool) error {
	space, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/mnt", pid))
	if err != nil {
		return err
	}
	if spaces[space] {
		return nil
	}
	spaces[space] = true
	mounts, err := mountsOf(strconv.Itoa(pid))
	if err != nil {
		return err
	}
	for _, m := range mounts {
		if m.point != netnsDir {
			all[fmt.Sprintf("mount %s at %s", m.kind, m.point)] = true
		}
	}
	return nil
}

// links are the network's interfaces but the bridge, which Nomad keeps.
func (n *Node) links(all inventory) error {
	space, err := os.Open(fmt.Sprintf("/proc/%d/ns/net", n.PID()))
	if err != nil {
		return err
	}
	defer space.Close()
	h, err := netlink.NewHandleAt(netns.NsHandle(int(space.Fd())), unix.NETLINK_ROUTE)
	if err != nil {
		return err
	}
	defer h.Close()
	links, err := h.LinkList()
	if err != nil {
		return err
	}
	for _, l := range links {
		if l.Attrs().Name != "nomad" {
			all[fmt.Sprintf("network interface %s (%s)", l.Attrs().Name, l.Type())] = true
		}
	}
	return nil
}

// ofPods tells a firewall's rules that are for one pod from what Nomad and CNI's plugins keep for all: such a rule has a chain of its own, the pod's address or its allocation.
var ofPods = regexp.MustCompile(`CNI-(DN-|SN-)?[0-9a-f]{20,}|172\.26\.\d+\.\d+/32|[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}`)

func (n *Node) firewall(all inventory) error {
	ctx, cancel := context.WithTimeout(context.Background(), Patience)
	defer cancel()
	for _, program := range []string{"iptables-save", "ip6tables-save"} {
		text, err := n.Output(ctx, program)
		if err != nil {
			return err
		}
		for line := range strings.Lines(text) {
			if ofPods.MatchString(line) {
				all["firewall rule "+strings.TrimSpace(line)] = true
			}
		}
	}
	return nil
}

// goPlugin are sockets that plugins make for agents; of one that is killed, its socket stays.
var goPlugin = regexp.MustCompile(`/tmp/plugin[0-9]+$`)

// sockets are those that listen: TCP, UDP, and Unix sockets that have a path.
func (n *Node) sockets(all inventory) error {
	dir := fmt.Sprintf("/proc/%d/net/", n.PID())
	for name, state := range map[string]string{"tcp": "0A", "tcp6": "0A", "udp": "07", "udp6": "07"} { // TCP_LISTEN, TCP_CLOSE: the kernel's net/tcp_states.h
		text, err := os.ReadFile(dir + name)
		if err != nil {
			return err
		}
		for line := range strings.Lines(string(text)) {
			if f := strings.Fields(line); len(f) > 3 && f[3] == state {
				all[fmt.Sprintf("socket %s %s", name, address(f[1]))] = true
			}
		}
	}
	text, err := os.ReadFile(dir + "unix")
	if err != nil {
		return err
	}
	const listening = "00010000" // __SO_ACCEPTCON
	for line := range strings.Lines(string(text)) {
		if f := strings.Fields(line); len(f) == 8 && f[3] == listening && !goPlugin.MatchString(f[7]) {
			all["socket "+f[7]] = true
		}
	}
	return nil
}

// address decodes one of /proc/net/tcp: words in the host's byte order, then the port.
func address(text string) string {
	ip, port, _ := strings.Cut(text, ":")
	b, err := hex.DecodeString(ip)
	p, err2 := strconv.ParseUint(port, 16, 16)
	if err != nil || err2 != nil || len(b)%4 != 0 {
		return text
	}
	for i := 0; i < len(b); i += 4 {
		slices.Reverse(b[i : i+4])
	}
	a, ok := netip.AddrFromSlice(b)
	if !ok {
		return text
	}
	return netip.AddrPortFrom(a, uint16(p)).String()
}

// nomads are the cgroups in which Nomad makes those of tasks.
var nomads = regexp.MustCompile(`^/(nomad(/share|/reserve)?|nomad\.slice(/share\.slice|/reserve\.slice)?)$`)

func (n *Node) cgroupsBelow(all inventory) error {
	trees, err := hierarchies()
	if err != nil {
		return err
	}
	for _, h := range trees {
		root := filepath.Join(h.path, n.cgroup())
		err := filepath.WalkDir(root, func(path string, e fs.DirEntry, err error) error {
			if errors.Is(err, fs.ErrNotExist) {
				return nil // removed meanwhile
			}
			if err == nil && e.IsDir() && !nomads.MatchString(strings.TrimPrefix(path, root)) {
				all[fmt.Sprintf("cgroup %s/%s", strings.TrimPrefix(h.path, cgroups), strings.TrimPrefix(path, root))] = true
			}
			return err
		})
		if err != nil {
			return err
		}
	}
	return nil
}

func (n *Node) loops(all inventory) error {
	devices, err := loopsOf(n.Dir)
	for device, file := range devices {
		all[fmt.Sprintf("loop device %s of %s", device, file)] = true
	}
	return err
}

// loopsOf finds the loop devices, which are the host's, of files below a folder.
func loopsOf(dir string) (map[string]string, error) {
	files, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	if err != nil {
		return nil, err
	}
	devices := map[string]string{}
	for _, f := range files {
		if backing, err := os.ReadFile(f); err == nil && strings.HasPrefix(string(backing), dir+"/") {
			devices["/dev/"+strings.Split(f, "/")[3]] = string(bytes.TrimSpace(backing))
		}
	}
	return devices, nil
}

// freeLoops lets go of the files.
func freeLoops(dir string) error {
	devices, err := loopsOf(dir)
	for device := range devices {
		f, openErr := os.Open(device)
		if openErr != nil {
			return openErr
		}
		_, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), unix.LOOP_CLR_FD, 0)
		f.Close()
		if errno != 0 && errno != unix.ENXIO { // free by now
			return fmt.Errorf("free %s: %w", device, errno)
		}
	}
	return err
}

// kept are files that agents and CNI's plugins have whatever the jobs, by paths below the node's directory, or absolute ones.
var kept = regexp.MustCompile(`^(server|consul|[a-z]+\.log|tmp/plugin[0-9]+|nomad(/alloc|/host_volumes|/client(/(client-id|secret-id|state\.db))?)?|alloc_mounts|` +
	`/run/(netns|xtables\.lock|lock|mount(/utab)?)|(/run|/var/lib)/cni(/(networks(/)?)?nomad(/(last_reserved_ip\.[0-9]+|lock))?|/networks|/results)?)$`)

// wholly are folders of which nothing depends on jobs.
var wholly = []string{"server", "consul"}

// files are those of the node's directory and of the folders that are the node's own.
func (n *Node) files(all inventory) error {
	mounts, err := mountsOf(strconv.Itoa(n.PID()))
	if err != nil {
		return err
	}
	// What is mounted is told of anyway, and who looks into it keeps it from being unmounted: Nomad tries that once and leaves the allocation's directory then.
	mounted := map[string]bool{}
	for _, m := range mounts {
		mounted[n.Path(m.point)] = m.point != netnsDir
	}
	walk := func(root, prefix string) error {
		return filepath.WalkDir(root, func(path string, e fs.DirEntry, err error) error {
			if errors.Is(err, fs.ErrNotExist) {
				return nil // removed meanwhile
			}
			if err != nil {
				return err
			}
			if path == root {
				return nil
			}
			name := prefix + strings.TrimPrefix(path, root+"/")
			if kept.MatchString(name) || slices.Contains(n.cluster.o.Keep, name) {
				if slices.Contains(wholly, name) || slices.Contains(n.cluster.o.Keep, name) {
					return fs.SkipDir
				}
				return nil
			}
			if all["file "+name] = true; mounted[path] && e.IsDir() {
				return fs.SkipDir
			}
			return nil
		})
	}
	// In the eyes of the node, which has mounts of its own.
	if err := walk(n.Path(n.Dir), ""); err != nil {
		return err
	}
	for _, dir := range []string{"/run", "/var/lib/cni"} {
		if err := walk(n.Path(dir), dir+"/"); err != nil {
			return err
		}
	}
	return nil
}
