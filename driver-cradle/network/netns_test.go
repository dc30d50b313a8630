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
	"testing"
	"time"

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
	for deadline := time.Now().Add(20 * time.Second); time.Now().Before(deadline); {
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
func (l *lab) take() (*os.File, wire.Interface) {
	l.t.Helper()
	tap, i, err := Take(l.t.Context(), l.pod)
	if err != nil {
		l.t.Fatal(err)
	}
	return tap, i
}

// plug makes the guest's namespace the machine behind the tap: an interface of its own is set up as told, and what arrives at one
// tap is written to the other, as QEMU does. Closing taps ends it.
func (l *lab) plug(tap *os.File, i wire.Interface) (unplug func()) {
	l.t.Helper()
	var inner *os.File
	l.in(l.guest, func() (err error) {
		if inner, err = openTap(); err != nil {
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
		return nil
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
	return func() {
		tap.SetReadDeadline(time.Unix(1, 0))
		inner.Close()
		<-done
		<-done
		tap.SetReadDeadline(time.Time{})
	}
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
			l.exchange(network, direction.server, direction.client, direction.name == "in")
		}
	}
	if _, _, err := Take(t.Context(), l.pod); !errors.Is(err, ErrInUse) {
		t.Errorf("taking a namespace over twice: %v", err)
	}
	if err := Release(l.pod); err != nil {
		t.Errorf("Release of a namespace in use: %v", err)
	}
	if !l.answers("10.88.0.5") {
		t.Error("Release cut off a namespace in use")
	}
	unplug()

	// As after a process that was killed: only the tap goes.
	tap.Close()
	tap, _ = l.take()
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
	if q := l.run("tc", "-n", strings.TrimPrefix(l.pod, "/run/netns/"), "qdisc", "show", "dev", "eth0"); strings.Contains(q, "ingress") {
		t.Errorf("qdisc left: %s", q)
	}
}

// state is what the pod's namespace has set up.
func (l *lab) state() string {
	s := l.ip(l.pod, "-o addr show dev eth0") + l.ip(l.pod, "route") + l.ip(l.pod, "-6 route")
	return strings.ReplaceAll(s, " tentative", "")
}

// exchange sends a message from client to server, and back.
func (l *lab) exchange(network, server, client string, toGuest bool) {
	l.t.Helper()
	host, guest := "10.88.0.1", "10.88.0.5"
	if strings.HasSuffix(network, "6") {
		host, guest = "fd88::1", "fd88::5"
	}
	address := net.JoinHostPort(host, "7777")
	if toGuest {
		address = net.JoinHostPort(guest, "7777")
	}
	large := strings.Repeat("x", 500_000)
	if strings.HasPrefix(network, "udp") {
		large = strings.Repeat("x", 5_000) // in fragments
	}
	answered := make(chan error, 1)
	if strings.HasPrefix(network, "udp") {
		var c net.PacketConn
		l.in(server, func() (err error) { c, err = net.ListenPacket(network, address); return err })
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
		l.in(server, func() (err error) { listener, err = net.Listen(network, address); return err })
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
	var c net.Conn
	ctx, cancel := context.WithTimeout(l.t.Context(), 10*time.Second)
	defer cancel()
	l.in(client, func() (err error) { c, err = new(net.Dialer).DialContext(ctx, network, address); return err })
	defer c.Close()
	c.SetDeadline(time.Now().Add(10 * time.Second))
	go io.WriteString(c, large)
	got := make([]byte, len(large))
	if _, err := io.ReadFull(c, got); err != nil || string(got) != large {
		l.t.Errorf("%s %s: %v", network, address, err)
	}
	if err := <-answered; err != nil {
		l.t.Errorf("%s %s: server: %v", network, address, err)
	}
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
	if f := l.run("tc", "-n", ns, "filter", "show", "dev", "eth0", "ingress"); !strings.Contains(f, "pref 60000") || strings.Contains(f, fmt.Sprint("pref ", redirectPref)) {
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
		tap, _, err := Take(t.Context(), path)
		if err == nil {
			tap.Close()
			t.Errorf("Take(%s) succeeds", path)
		}
		t.Log(err)
		if err := Release(path); err != nil {
			t.Errorf("Release(%s): %v", path, err)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, _, err := Take(ctx, l.pod); !errors.Is(err, context.Canceled) {
		t.Errorf("Take after the context's end: %v", err)
	}
	if links := l.ip(l.pod, "-o link"); strings.Contains(links, tapName) {
		t.Errorf("a tap is left: %s", links)
	}
}
