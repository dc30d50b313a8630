//go:build vm

package network

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/cradlestack/cradlestack/driver-cradle/wire"
)

// A lab is a host with a bridge, a pod's namespace with an interface on it, and a namespace in place of a guest.
type lab struct {
	t                *testing.T
	host, pod, guest string // paths
}

const labMTU = 1400

func newLab(t *testing.T) *lab {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Fatal("needs root")
	}
	l := &lab{t: t}
	for name, path := range map[string]*string{"host": &l.host, "pod": &l.pod, "guest": &l.guest} {
		ns := fmt.Sprintf("cradle-%s-%d", name, os.Getpid())
		l.run("ip", "netns", "add", ns)
		t.Cleanup(func() { l.run("ip", "netns", "del", ns) })
		*path = "/run/netns/" + ns
	}
	l.ip(l.host, "link add br0 type bridge")
	l.ip(l.host, "link set br0 up")
	l.ip(l.host, "addr add 10.88.0.1/24 dev br0")
	l.ip(l.host, "addr add fd88::1/64 dev br0 nodad")
	l.ip(l.host, "link add v0 mtu 1400 type veth peer name eth0 mtu 1400 netns "+strings.TrimPrefix(l.pod, "/run/netns/"))
	l.ip(l.host, "link set v0 master br0 up")
	l.ip(l.pod, "link set lo up")
	l.ip(l.pod, "link set eth0 address 02:42:0a:58:00:05 up")
	l.ip(l.pod, "addr add 10.88.0.5/24 dev eth0")
	l.ip(l.pod, "addr add fd88::5/64 dev eth0 nodad")
	l.ip(l.pod, "route add default via 10.88.0.1")
	l.ip(l.pod, "route add 192.0.2.0/24 via 10.88.0.1 src 10.88.0.5 metric 7")
	l.ip(l.pod, "route add 198.51.100.0/24 via 169.254.1.1 dev eth0 onlink")
	l.ip(l.pod, "-6 route add default via fd88::1")
	return l
}

func (l *lab) run(name string, args ...string) string {
	l.t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		l.t.Fatalf("%s is missing: apt-get install iproute2 iputils-ping", name)
	}
	out, err := exec.Command(path, args...).CombinedOutput()
	if err != nil {
		l.t.Fatalf("%s %v: %v\n%s", name, args, err, out)
	}
	return string(out)
}

func (l *lab) ip(ns, command string) string {
	l.t.Helper()
	args := []string{"netns", "exec", strings.TrimPrefix(ns, "/run/netns/"), "ip"}
	return l.run("ip", append(args, strings.Fields(command)...)...)
}

// ping asks from the host whether address answers.
func (l *lab) ping(address string, more ...string) bool {
	if _, err := exec.LookPath("ping"); err != nil {
		l.t.Fatal("ping is missing: apt-get install iputils-ping")
	}
	args := append([]string{"netns", "exec", strings.TrimPrefix(l.host, "/run/netns/"), "ping", "-n", "-c", "2", "-i", "0.2", "-W", "2"}, more...)
	return exec.Command("ip", append(args, address)...).Run() == nil
}

// answers gives address some time to answer: neighbours that were asked for in vain are not asked again at once.
func (l *lab) answers(address string, more ...string) bool {
	for deadline := time.Now().Add(2 * time.Minute); time.Now().Before(deadline); {
		if l.ping(address, more...) {
			return true
		}
	}
	return false
}

func (l *lab) in(ns string, f func() error) {
	l.t.Helper()
	if err := inNamespace(ns, f); err != nil {
		l.t.Fatal(err)
	}
}

// take takes the pod's namespace over.
func (l *lab) take(upstreams ...uint16) (*os.File, wire.Interface) {
	l.t.Helper()
	link, err := Take(l.t.Context(), l.pod, "", upstreams, nil)
	if err != nil {
		l.t.Fatal(err)
	}
	if link.Unshared != nil {
		l.t.Errorf("the namespace is cut off: %v", link.Unshared)
	}
	return link.Tap, link.Interface
}

// plug makes the guest's namespace the machine behind the tap: an interface of its own is set up as told, and what arrives at one
// tap is written to the other, as QEMU does. Closing taps ends it.
func (l *lab) plug(tap *os.File, i wire.Interface) (unplug func()) {
	l.t.Helper()
	var inner *os.File
	l.in(l.guest, func() (err error) {
		if inner, err = openTap(tapName); err != nil {
			return err
		}
		link, err := netlink.LinkByName(tapName)
		if err != nil {
			return err
		}
		mac, err := net.ParseMAC(i.MAC)
		if err != nil {
			return err
		}
		if err := errors.Join(netlink.LinkSetName(link, "eth0"), netlink.LinkSetHardwareAddr(link, mac), netlink.LinkSetMTU(link, i.MTU), netlink.LinkSetUp(link)); err != nil {
			return err
		}
		for _, a := range i.Addresses {
			addr := &netlink.Addr{IPNet: &net.IPNet{IP: a.Addr().AsSlice(), Mask: net.CIDRMask(a.Bits(), a.Addr().BitLen())}, Flags: unix.IFA_F_NODAD}
			if err := netlink.AddrAdd(link, addr); err != nil {
				return fmt.Errorf("address %v: %w", a, err)
			}
		}
		for _, r := range i.Routes {
			d := r.Destination
			route := &netlink.Route{
				LinkIndex: link.Attrs().Index, Gw: r.Via.AsSlice(), Src: r.Source.AsSlice(), Priority: r.Metric,
				Dst: &net.IPNet{IP: d.Addr().AsSlice(), Mask: net.CIDRMask(d.Bits(), d.Addr().BitLen())},
			}
			if !r.Via.IsValid() {
				route.Scope = netlink.SCOPE_LINK
			}
			if err := netlink.RouteAdd(route); err != nil {
				return fmt.Errorf("route %+v: %w", r, err)
			}
		}
		if i.Namespace == nil {
			return nil
		}
		return know(link, i.Namespace)
	})
	done := make(chan struct{}, 2)
	pump := func(to, from *os.File) {
		defer func() { done <- struct{}{} }()
		buf := make([]byte, 70<<10)
		for {
			n, err := from.Read(buf)
			if err != nil {
				return
			}
			to.Write(buf[:n])
		}
	}
	go pump(inner, tap)
	go pump(tap, inner)
	return sync.OnceFunc(func() {
		tap.SetReadDeadline(time.Unix(1, 0))
		inner.Close()
		<-done
		<-done
		tap.SetReadDeadline(time.Time{})
	})
}

// know does what the guest does to have the namespace as a neighbor.
func know(link netlink.Link, n *wire.Namespace) error {
	mac, err := net.ParseMAC(n.MAC)
	if err != nil {
		return err
	}
	lo, err := netlink.LinkByName("lo")
	if err == nil {
		err = netlink.LinkSetUp(lo)
	}
	for _, a := range []netip.Addr{n.IP4, n.IP6, n.Loopback4, n.Loopback6} {
		neighbor := &netlink.Neigh{LinkIndex: link.Attrs().Index, IP: a.AsSlice(), HardwareAddr: mac, State: netlink.NUD_PERMANENT}
		route := &netlink.Route{
			LinkIndex: link.Attrs().Index, Scope: netlink.SCOPE_LINK,
			Dst: &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(a.BitLen(), a.BitLen())},
		}
		if a == n.Loopback4 {
			route.Src = net.IPv4(127, 0, 0, 1)
		}
		err = errors.Join(err, netlink.NeighSet(neighbor), netlink.RouteAdd(route))
	}
	return errors.Join(err, setSysctl("net/ipv4/conf/eth0/route_localnet", "1"))
}

func TestRootTake(t *testing.T) {
	l := newLab(t)
	if !l.answers("10.88.0.5") {
		t.Fatal("the pod's namespace does not answer before it is taken over")
	}
	before := l.state()
	tap, i := l.take()
	want := wire.Interface{
		Name: "eth0", MAC: "02:42:0a:58:00:05", MTU: labMTU,
		Addresses: []netip.Prefix{netip.MustParsePrefix("10.88.0.5/24"), netip.MustParsePrefix("fd88::5/64")},
	}
	if i.Name != want.Name || i.MAC != want.MAC || i.MTU != want.MTU || !slices.Equal(i.Addresses, want.Addresses) {
		t.Errorf("interface %+v, want %+v", i, want)
	}
	for _, r := range []wire.Route{
		{Destination: netip.MustParsePrefix("169.254.1.1/32")},
		{Destination: netip.MustParsePrefix("0.0.0.0/0"), Via: netip.MustParseAddr("10.88.0.1")},
		{Destination: netip.MustParsePrefix("192.0.2.0/24"), Via: netip.MustParseAddr("10.88.0.1"), Source: netip.MustParseAddr("10.88.0.5"), Metric: 7},
		{Destination: netip.MustParsePrefix("198.51.100.0/24"), Via: netip.MustParseAddr("169.254.1.1")},
		{Destination: netip.MustParsePrefix("::/0"), Via: netip.MustParseAddr("fd88::1"), Metric: 1024},
	} {
		if !slices.Contains(i.Routes, r) {
			t.Errorf("route %+v is missing in %+v", r, i.Routes)
		}
	}
	if i.Routes[0].Via.IsValid() {
		t.Errorf("a route via a gateway comes before the gateway's: %+v", i.Routes)
	}
	// The namespace has its addresses still, and must not use them.
	for _, address := range []string{"10.88.0.5", "fd88::5"} {
		l.ip(l.host, "neigh flush dev br0")
		if l.ping(address) {
			t.Errorf("the namespace's own stack answers for %s", address)
		}
	}

	unplug := l.plug(tap, i)
	for _, address := range []string{"10.88.0.5", "fd88::5"} {
		if !l.answers(address) {
			t.Errorf("no answer from the guest at %s", address)
		}
	}
	if !l.answers("10.88.0.5", "-M", "do", "-s", fmt.Sprint(labMTU-28)) {
		t.Error("a packet of the MTU's size does not pass")
	}
	for _, network := range []string{"tcp4", "tcp6", "udp4", "udp6"} {
		for _, direction := range []struct{ name, server, client string }{{"in", l.guest, l.host}, {"out", l.host, l.guest}} {
			host, guest := "10.88.0.1", "10.88.0.5"
			if strings.HasSuffix(network, "6") {
				host, guest = "fd88::1", "fd88::5"
			}
			address := host
			if direction.name == "in" {
				address = guest
			}
			if err := l.exchange(network, direction.server, direction.client, address, address); err != nil {
				t.Error(direction.name, err)
			}
		}
	}
	if _, err := Take(t.Context(), l.pod, "", nil, nil); !errors.Is(err, ErrInUse) {
		t.Errorf("taking a namespace over twice: %v", err)
	}
	if err := Release(l.pod); err != nil {
		t.Errorf("Release of a namespace in use: %v", err)
	}
	if !l.answers("10.88.0.5") {
		t.Error("Release cut off a namespace in use")
	}
	unplug()

	// As after a process that was killed: only the tap goes, and a child that is about to end has it longer.
	tap.Close()
	tap, _ = l.take()
	child := exec.Command("sleep", "0.3")
	child.ExtraFiles = []*os.File{tap}
	if err := child.Start(); err != nil {
		t.Fatal(err)
	}
	defer child.Wait()
	tap.Close()
	if err := Release(l.pod); err != nil {
		t.Fatal(err)
	}
	if !l.answers("10.88.0.5") {
		t.Error("the namespace does not have its interface back after Release")
	}
	if after := l.state(); after != before {
		t.Errorf("the namespace was changed:\n%s\n%s", before, after)
	}
	ns := strings.TrimPrefix(l.pod, "/run/netns/")
	if q := l.run("tc", "-n", ns, "qdisc", "show"); strings.Contains(q, "ingress") || strings.Contains(q, "clsact") {
		t.Errorf("qdisc left: %s", q)
	}

	// Killed before the first filter was there, or after the last was gone.
	for _, dev := range []string{"lo", "eth0"} {
		l.run("tc", "-n", ns, "qdisc", "add", "dev", dev, "clsact")
	}
	if err := Release(l.pod); err != nil {
		t.Fatal(err)
	}
	if q := l.run("tc", "-n", ns, "qdisc", "show"); strings.Contains(q, "clsact") {
		t.Errorf("qdisc left: %s", q)
	}
}

// The interface has the link-layer address that is asked for, and the guest with it.
func TestRootTakeAddress(t *testing.T) {
	const mac = "02:32:1c:23:00:04"
	l := newLab(t)
	link, err := Take(t.Context(), l.pod, mac, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	if link.Interface.MAC != mac {
		t.Errorf("the guest is told the address %s", link.Interface.MAC)
	}
	defer l.plug(link.Tap, link.Interface)()
	for _, address := range []string{"10.88.0.5", "fd88::5"} {
		l.ip(l.host, "neigh flush dev br0")
		if !l.answers(address) {
			t.Errorf("no answer from the guest at %s", address)
		}
	}
	if neighbors := l.ip(l.host, "neigh show dev br0"); !strings.Contains(neighbors, mac) {
		t.Errorf("it is not known by %s:\n%s", mac, neighbors)
	}
}

// state is what the pod's namespace has set up.
func (l *lab) state() string {
	s := l.ip(l.pod, "-o addr show dev eth0") + l.ip(l.pod, "route") + l.ip(l.pod, "-6 route")
	return strings.ReplaceAll(s, " tentative", "")
}

// exchange sends a message from client to server, and back: the server listens on one address, and is called by another.
func (l *lab) exchange(network, server, client, listen, call string) error {
	l.t.Helper()
	listen, call = net.JoinHostPort(listen, "7777"), net.JoinHostPort(call, "7777")
	datagrams := strings.HasPrefix(network, "udp")
	large := strings.Repeat("0123456789", 50_000)
	if datagrams {
		large = large[:5_000] // in fragments
	}
	answered := make(chan error, 1)
	if datagrams {
		var c net.PacketConn
		l.in(server, func() (err error) { c, err = net.ListenPacket(network, listen); return err })
		defer c.Close()
		go func() {
			buf := make([]byte, 10_000)
			n, from, err := c.ReadFrom(buf)
			if err == nil {
				_, err = c.WriteTo(buf[:n], from)
			}
			answered <- err
		}()
	} else {
		var listener net.Listener
		l.in(server, func() (err error) { listener, err = net.Listen(network, listen); return err })
		defer listener.Close()
		go func() {
			c, err := listener.Accept()
			if err == nil {
				_, err = io.CopyN(c, c, int64(len(large)))
				c.Close()
			}
			answered <- err
		}()
	}
	fail := func(err error) error {
		return fmt.Errorf("%s from %s to %s in %s: %w", network, client, call, server, err)
	}
	c, err := l.dial(network, client, call)
	if err != nil {
		return fail(err)
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(time.Minute))
	go io.WriteString(c, large)
	got := make([]byte, len(large))
	if _, err := io.ReadFull(c, got); err != nil {
		return fail(err)
	}
	if string(got) != large {
		return fail(errors.New("the answer is another"))
	}
	if err := <-answered; err != nil {
		return fail(fmt.Errorf("server: %w", err))
	}
	return nil
}

func (l *lab) dial(network, client, address string) (c net.Conn, err error) {
	ctx, cancel := context.WithTimeout(l.t.Context(), time.Minute)
	defer cancel()
	err = inNamespace(client, func() (err error) { c, err = new(net.Dialer).DialContext(ctx, network, address); return err })
	return c, err
}

// The namespace's own processes have the network beside the guest, and reach it as if it were in the namespace.
func TestRootShare(t *testing.T) {
	l := newLab(t)
	before := l.settings()
	tap, i := l.take(7777)
	if got := i.Namespace.LocalPorts; got != [2]uint16{46884, 60999} {
		t.Errorf("the guest's ports are %v", got)
	}
	defer tap.Close()
	unplug := l.plug(tap, i)
	defer unplug()
	if !l.answers("10.88.0.5") || !l.answers("fd88::5") {
		t.Fatal("no answer from the guest")
	}
	for _, c := range []struct{ name, server, client, listen, call string }{
		{"out", l.host, l.pod, "10.88.0.1", "10.88.0.1"},
		{"out", l.host, l.pod, "fd88::1", "fd88::1"},
		{"in", l.pod, l.host, "10.88.0.5", "10.88.0.5"},
		{"in", l.pod, l.host, "fd88::5", "fd88::5"},
		{"in to all addresses", l.pod, l.host, "0.0.0.0", "10.88.0.5"},
		{"within", l.pod, l.pod, "127.0.0.1", "127.0.0.1"},
		{"within", l.pod, l.pod, "10.88.0.5", "10.88.0.5"},
		{"within", l.pod, l.pod, "::1", "::1"},
		{"within", l.pod, l.pod, "fd88::5", "fd88::5"},
		{"guest in", l.guest, l.host, "10.88.0.5", "10.88.0.5"},
		{"guest out", l.host, l.guest, "10.88.0.1", "10.88.0.1"},
		{"to the guest", l.guest, l.pod, "127.0.0.1", "127.0.0.1"},
		{"to the guest", l.guest, l.pod, "0.0.0.0", "127.0.0.1"},
		{"to the guest", l.guest, l.pod, "10.88.0.5", "10.88.0.5"},
		{"to the guest", l.guest, l.pod, "fd88::5", "::1"},
		{"to the guest", l.guest, l.pod, "fd88::5", "fd88::5"},
		{"upstream", l.pod, l.guest, "127.0.0.1", "169.254.255.2"},
	} {
		for _, network := range []string{"tcp", "udp"} {
			if network == "udp" && c.name == "upstream" {
				continue
			}
			if err := l.exchange(network, c.server, c.client, c.listen, c.call); err != nil {
				t.Errorf("%s: %v", c.name, err)
			}
		}
	}
	for _, address := range []string{"127.0.0.1:7778", "10.88.0.5:7778", "[::1]:7778", "[fd88::5]:7778"} {
		if _, err := l.dial("tcp", l.pod, address); !errors.Is(err, unix.ECONNREFUSED) {
			t.Errorf("%s in the namespace: %v", address, err)
		}
	}
	if _, err := l.dial("tcp", l.guest, "169.254.255.2:7777"); !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("an upstream that nobody serves: %v", err)
	}
	for _, ns := range []string{l.pod, l.guest} {
		for _, address := range []string{"10.88.0.1", "fd88::1"} {
			l.run("ip", "netns", "exec", strings.TrimPrefix(ns, "/run/netns/"), "ping", "-n", "-c", "2", "-i", "0.2", "-W", "5", address)
		}
	}
	unplug()
	tap.Close()
	if err := Release(l.pod); err != nil {
		t.Fatal(err)
	}
	if after := l.settings(); after != before {
		t.Errorf("the namespace was changed:\n%s\n%s", before, after)
	}
}

// On a host where sockets can't be told apart the guest has the network alone, as it is told.
func TestRootUnshared(t *testing.T) {
	l := newLab(t)
	ns := strings.TrimPrefix(l.pod, "/run/netns/")
	l.run("tc", "-n", ns, "qdisc", "add", "dev", "lo", "ingress") // of another kind than is needed, and there is room for one
	before := l.settings()
	if _, err := Take(t.Context(), l.pod, "", []uint16{1}, nil); err == nil || !strings.Contains(err.Error(), "upstreams are out of reach") {
		t.Errorf("upstreams: %v", err)
	}
	if _, err := Take(t.Context(), l.pod, "", nil, []uint16{1}); err == nil || !strings.Contains(err.Error(), "ports can't be kept") {
		t.Errorf("ports for the interface's own networks: %v", err)
	}
	if after := l.settings(); after != before {
		t.Errorf("a Take that failed has changed the namespace:\n%s\n%s", before, after)
	}
	link, err := Take(t.Context(), l.pod, "", nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Log(link.Unshared)
	if link.Unshared == nil || link.Interface.Namespace != nil {
		t.Errorf("it is shared: %+v", link)
	}
	unplug := l.plug(link.Tap, link.Interface)
	if !l.answers("10.88.0.5") || !l.answers("fd88::5") {
		t.Error("no answer from the guest")
	}
	if err := l.exchange("tcp", l.host, l.guest, "10.88.0.1", "10.88.0.1"); err != nil {
		t.Error(err)
	}
	unplug()
	link.Tap.Close()
	if err := Release(l.pod); err != nil {
		t.Fatal(err)
	}
	if after := l.settings(); after != before {
		t.Errorf("the namespace was changed:\n%s\n%s", before, after)
	}
}

// What a port that is for the interface's own networks gets from elsewhere never comes to the guest, in either family; other ports get it.
func TestRootOnLink(t *testing.T) {
	l := newLab(t)
	l.ip(l.host, "addr add 203.0.113.9/32 dev br0")
	l.ip(l.host, "addr add 2001:db8::9/128 dev br0 nodad")
	link, err := Take(t.Context(), l.pod, "", nil, []uint16{7777, 7779})
	if err != nil {
		t.Fatal(err)
	}
	defer l.plug(link.Tap, link.Interface)()
	for _, f := range []struct{ near, far, guest string }{{"10.88.0.1", "203.0.113.9", "10.88.0.5"}, {"fd88::1", "2001:db8::9", "fd88::5"}} {
		dial := func(network, from, port string) (c net.Conn, err error) {
			d := net.Dialer{Control: func(_, _ string, c syscall.RawConn) (err error) {
				return errors.Join(c.Control(func(fd uintptr) {
					if network == "tcp" {
						err = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_SYNCNT, 1)
					}
				}), err)
			}}
			if d.LocalAddr = (&net.TCPAddr{IP: net.ParseIP(from)}); network == "udp" {
				d.LocalAddr = &net.UDPAddr{IP: net.ParseIP(from)}
			}
			err = inNamespace(l.host, func() (err error) { c, err = d.Dial(network, net.JoinHostPort(f.guest, port)); return err })
			return c, err
		}
		for port, kept := range map[string]bool{"7777": true, "7778": false} {
			var listener net.Listener
			var datagrams net.PacketConn
			l.in(l.guest, func() (err error) { listener, err = net.Listen("tcp", net.JoinHostPort(f.guest, port)); return err })
			defer listener.Close()
			l.in(l.guest, func() (err error) {
				datagrams, err = net.ListenPacket("udp", net.JoinHostPort(f.guest, port))
				return err
			})
			defer datagrams.Close()
			for _, from := range []string{f.far, f.near} {
				c, err := dial("tcp", from, port)
				if err == nil {
					c.Close()
				}
				if kept && from == f.far {
					if !errors.Is(err, unix.ETIMEDOUT) {
						t.Errorf("tcp from %s to %s port %s: %v, want no answer", from, f.guest, port, err)
					}
				} else if err != nil {
					t.Errorf("tcp from %s to %s port %s: %v", from, f.guest, port, err)
				}
				if c, err = dial("udp", from, port); err != nil {
					t.Fatal(err)
				}
				defer c.Close()
				if _, err := io.WriteString(c, from); err != nil {
					t.Fatal(err)
				}
			}
			want := f.far // that was sent first
			if kept {
				want = f.near
			}
			buf := make([]byte, 100)
			if n, _, err := datagrams.ReadFrom(buf); err != nil || string(buf[:n]) != want {
				t.Errorf("udp to %s port %s: %q comes first, %v; want %q", f.guest, port, buf[:n], err, want)
			}
		}
	}
}

// Programs for all kinds of pods pass the kernel's verifier.
func TestRootPrograms(t *testing.T) {
	datagrams, err := newDatagrams()
	if err != nil {
		t.Fatal(err)
	}
	defer datagrams.Close()
	var ports []uint16
	for p := range uint16(64) {
		ports = append(ports, 1000+p)
	}
	v4, v6 := netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("2001:db8::1")
	for _, s := range []sharing{
		{},
		{addresses: []netip.Addr{v4}},
		{addresses: []netip.Addr{v6}},
		{addresses: []netip.Addr{v4, v6, v4.Next(), v6.Next(), v4.Next().Next(), v6.Next().Next()}, upstreams: ports},
	} {
		s.datagrams = datagrams.FD()
		for name, code := range map[string]asm.Instructions{"from network": s.fromNetwork(), "from namespace": s.fromNamespace(), "from guest": s.fromGuest()} {
			prog, err := ebpf.NewProgram(&ebpf.ProgramSpec{Type: ebpf.SchedCLS, Instructions: code, License: "Apache-2.0"})
			if err != nil {
				t.Errorf("%s, %+v: %v", name, s, err)
				continue
			}
			prog.Close()
		}
	}
}

func TestRootProbe(t *testing.T) {
	if unshared, err := Probe(); unshared != nil || err != nil {
		t.Errorf("%v, %v", unshared, err)
	}
}

// settings are those of the pod's namespace that may have been changed, and what is attached to its interfaces.
func (l *lab) settings() string {
	ns := strings.TrimPrefix(l.pod, "/run/netns/")
	s := l.run("ip", "netns", "exec", ns, "sysctl", "net.ipv4.ip_local_port_range", "net.ipv4.conf.lo.accept_local", "net.ipv4.conf.lo.route_localnet")
	s += l.run("tc", "-n", ns, "qdisc", "show")
	for _, side := range []string{"ingress", "egress"} {
		for _, link := range []string{"eth0", "lo"} {
			out, _ := exec.Command("tc", "-n", ns, "filter", "show", "dev", link, side).Output() // there may be nothing to hold filters
			s += string(out)
		}
	}
	return s
}

// Somebody else's filter on the interface stays.
func TestRootForeignFilter(t *testing.T) {
	l := newLab(t)
	ns := strings.TrimPrefix(l.pod, "/run/netns/")
	l.run("tc", "-n", ns, "qdisc", "add", "dev", "eth0", "clsact")
	l.run("tc", "-n", ns, "filter", "add", "dev", "eth0", "ingress", "pref", "60000", "protocol", "ip", "u32", "match", "u32", "0", "0", "flowid", "1:1")
	tap, i := l.take()
	unplug := l.plug(tap, i)
	if !l.answers("10.88.0.5") {
		t.Error("no answer from the guest")
	}
	unplug()
	tap.Close()
	if err := Release(l.pod); err != nil {
		t.Fatal(err)
	}
	if f := l.run("tc", "-n", ns, "filter", "show", "dev", "eth0", "ingress"); !strings.Contains(f, "pref 60000") || strings.Contains(f, fmt.Sprint("pref ", filterPref)) {
		t.Errorf("filters are now:\n%s", f)
	}
}

func TestRootTakeRefuses(t *testing.T) {
	l := newLab(t)
	file := l.t.TempDir() + "/file"
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{file, "/proc/self/ns/mnt", "/nonexistent", l.guest} {
		link, err := Take(t.Context(), path, "", nil, nil)
		if err == nil {
			link.Tap.Close()
			t.Errorf("Take(%s) succeeds", path)
		}
		t.Log(err)
		if err := Release(path); err != nil {
			t.Errorf("Release(%s): %v", path, err)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := Take(ctx, l.pod, "", nil, nil); !errors.Is(err, context.Canceled) {
		t.Errorf("Take after the context's end: %v", err)
	}
	if links := l.ip(l.pod, "-o link"); strings.Contains(links, tapName) {
		t.Errorf("a tap is left: %s", links)
	}
}
