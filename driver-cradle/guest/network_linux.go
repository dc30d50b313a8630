package guest

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/cradlestack/cradlestack/driver-cradle/wire"
)

// loopbackUp makes 127.0.0.1 and ::1 work; the kernel adds the addresses. It is in the way of every cold boot, so it takes the short
// way of ioctls.
func loopbackUp() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("set interface lo up: %w", err)
	}
	defer unix.Close(fd)
	ifr, err := unix.NewIfreq("lo")
	if err != nil {
		return fmt.Errorf("set interface lo up: %w", err)
	}
	ifr.SetUint16(unix.IFF_UP | unix.IFF_RUNNING)
	if err := unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, ifr); err != nil {
		return fmt.Errorf("set interface lo up: %w", err)
	}
	return nil
}

// setUpInterface gives an interface what the host decided; nothing is asked of the network.
func setUpInterface(i wire.Interface) error {
	link, err := netlink.LinkByName(i.Name)
	if err != nil {
		return fmt.Errorf("find interface %s: %w", i.Name, err)
	}
	fail := func(what string, err error) error { return fmt.Errorf("interface %s: %s: %w", i.Name, what, err) }
	if i.MAC != "" {
		mac, err := net.ParseMAC(i.MAC)
		if err != nil {
			return fail("mac", err)
		}
		if mac.String() != link.Attrs().HardwareAddr.String() {
			if err := netlink.LinkSetHardwareAddr(link, mac); err != nil {
				return fail("set mac "+i.MAC, err)
			}
		}
	}
	if i.MTU != 0 && i.MTU != link.Attrs().MTU {
		if err := netlink.LinkSetMTU(link, i.MTU); err != nil {
			return fail(fmt.Sprintf("set mtu %d", i.MTU), err)
		}
	}
	// As docker: an interface without an IPv6 address has no IPv6, not even on the link.
	v6 := "1"
	for _, a := range i.Addresses {
		if a.Addr().Is6() {
			v6 = "0"
		}
	}
	conf := "net/ipv6/conf/" + i.Name + "/"
	for _, s := range [][2]string{{"disable_ipv6", v6}, {"accept_ra", "0"}, {"accept_dad", "0"}} {
		if err := setSysctl(conf+s[0], s[1]); err != nil && !errors.Is(err, os.ErrNotExist) {
			return fail("sysctl "+s[0], err)
		}
	}
	if err := netlink.LinkSetUp(link); err != nil {
		return fail("set up", err)
	}
	for _, a := range i.Addresses {
		addr := &netlink.Addr{IPNet: ipNet(a)}
		if a.Addr().Is6() {
			addr.Flags = unix.IFA_F_NODAD
		}
		if err := netlink.AddrReplace(link, addr); err != nil {
			return fail("add address "+a.String(), err)
		}
	}
	for _, r := range i.Routes {
		if err := netlink.RouteReplace(route(link.Attrs().Index, r)); err != nil {
			return fail("add route to "+r.Destination.String(), err)
		}
	}
	if i.Namespace != nil {
		if err := knowNamespace(link, i.Namespace); err != nil {
			return fail("know the network namespace", err)
		}
	}
	return nil
}

// knowNamespace makes the host's network namespace a neighbor on link. Services at 127.0.0.1 answer it: from elsewhere the host lets nothing in that is for them.
func knowNamespace(link netlink.Link, n *wire.Namespace) error {
	mac, err := net.ParseMAC(n.MAC)
	if err != nil {
		return err
	}
	for _, s := range [][2]string{
		{"net/ipv4/conf/" + link.Attrs().Name + "/route_localnet", "1"},
		{"net/ipv4/ip_local_port_range", fmt.Sprint(n.LocalPorts[0], n.LocalPorts[1])},
	} {
		if err := setSysctl(s[0], s[1]); err != nil {
			return err
		}
	}
	for _, a := range []netip.Addr{n.IP4, n.IP6, n.Loopback4, n.Loopback6} {
		if !a.IsValid() {
			continue
		}
		r := route(link.Attrs().Index, wire.Route{Destination: netip.PrefixFrom(a, a.BitLen())})
		if a == n.Loopback4 {
			r.Src = loopback4.AsSlice()
		}
		if err := netlink.RouteReplace(r); err != nil {
			return fmt.Errorf("add route to %v: %w", a, err)
		}
		neighbor := &netlink.Neigh{LinkIndex: link.Attrs().Index, IP: a.AsSlice(), HardwareAddr: mac, State: netlink.NUD_PERMANENT}
		if err := netlink.NeighSet(neighbor); err != nil {
			return fmt.Errorf("add neighbor %v: %w", a, err)
		}
	}
	return nil
}

func route(index int, r wire.Route) *netlink.Route {
	n := &netlink.Route{LinkIndex: index, Dst: ipNet(r.Destination.Masked()), Priority: r.Metric}
	if r.Via.IsValid() {
		n.Gw = r.Via.AsSlice()
		// A gateway need not be inside a prefix of the interface (/32 addresses): the host says it is on the link.
		n.SetFlag(netlink.FLAG_ONLINK)
	} else {
		n.Scope = netlink.SCOPE_LINK
	}
	if r.Destination.Addr().Is6() && !r.Via.IsValid() {
		n.Scope = netlink.SCOPE_UNIVERSE // IPv6 routes have no scope
	}
	if r.Source.IsValid() {
		n.Src = r.Source.AsSlice()
	}
	return n
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

// resolvConf is the content of /etc/resolv.conf.
func resolvConf(d wire.DNS) string {
	var b strings.Builder
	for _, s := range d.Servers {
		b.WriteString("nameserver " + s + "\n")
	}
	if len(d.Search) > 0 && !slices.Equal(d.Search, []string{"."}) { // docker's way to say none
		b.WriteString("search " + strings.Join(d.Search, " ") + "\n")
	}
	if len(d.Options) > 0 {
		b.WriteString("options " + strings.Join(d.Options, " ") + "\n")
	}
	return b.String()
}
