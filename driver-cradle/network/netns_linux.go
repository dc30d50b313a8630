package network

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"runtime"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/cradlestack/cradlestack/driver-cradle/wire"
)

// tapName is the tap's in the pod's namespace. It vanishes with the last process that has it open.
const tapName = "cradle0"

// redirectPref is the priority of our filters, by which a later process knows those that a killed one has left.
const redirectPref = 0xc4ad

// ErrInUse is what Take returns where another machine has the namespace.
var ErrInUse = errors.New("network namespace is in use by another pod")

// Take makes a tap in the network namespace at path and connects it with the pod's interface there. The interface describes what the guest
// has to set up. The connection lasts as long as the tap is open; Release removes what is left then.
func Take(ctx context.Context, path string) (tap *os.File, i wire.Interface, err error) {
	err = inNamespace(path, func() error {
		if tap, i, err = take(); err != nil && tap != nil {
			tap.Close()
			tap = nil
		}
		return err
	})
	if err == nil && ctx.Err() != nil {
		err = errors.Join(context.Cause(ctx), tap.Close(), Release(path))
		tap = nil
	}
	if err != nil {
		return nil, wire.Interface{}, fmt.Errorf("take over network namespace %s: %w", path, err)
	}
	return tap, i, nil
}

// Release removes from the namespace at path what a Take has left whose tap is gone. A namespace that is gone itself is no error, one that is
// in use is left alone.
func Release(path string) error {
	err := inNamespace(path, func() error {
		link, err := podInterface()
		if err != nil {
			return err
		}
		_, err = removeStale(link)
		return err
	})
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, errNoNamespace) || errors.Is(err, errNoInterface) || errors.Is(err, ErrInUse) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("release network namespace %s: %w", path, err)
	}
	return nil
}

var (
	errNoNamespace = errors.New("this is no network namespace: name a file such as /run/netns/NAME or /proc/PID/ns/net")
	errNoInterface = errors.New("there is no interface but the loopback: the pod's network has to be set up first")
)

// inNamespace runs f on a thread of its own that is in the network namespace.
func inNamespace(path string, f func() error) error {
	ns, err := os.Open(path)
	if err != nil {
		return err
	}
	defer ns.Close()
	var st unix.Statfs_t
	if err := unix.Fstatfs(int(ns.Fd()), &st); err != nil {
		return err
	}
	if st.Type != unix.NSFS_MAGIC {
		return errNoNamespace
	}
	done := make(chan error, 1)
	go func() {
		// Never unlocked: the thread ends with this goroutine instead of serving others from the wrong namespace.
		runtime.LockOSThread()
		if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
			if errors.Is(err, unix.EINVAL) {
				err = errNoNamespace
			}
			done <- err
			return
		}
		done <- f()
	}()
	return <-done
}

func take() (*os.File, wire.Interface, error) {
	link, err := podInterface()
	if err != nil {
		return nil, wire.Interface{}, err
	}
	ingress, err := removeStale(link)
	if err != nil {
		return nil, wire.Interface{}, err
	}
	i, err := describe(link)
	if err != nil {
		return nil, wire.Interface{}, err
	}
	tap, err := openTap()
	if err != nil {
		return nil, wire.Interface{}, err
	}
	if err := connect(link, i.MTU, ingress); err != nil {
		return tap, wire.Interface{}, errors.Join(err, disconnect(link))
	}
	return tap, i, nil
}

// podInterface is the namespace's interface towards the network: eth0, else the one with a default route, else the first that is up.
func podInterface() (netlink.Link, error) {
	links, err := netlink.LinkList()
	if err != nil {
		return nil, fmt.Errorf("list interfaces: %w", err)
	}
	links = slices.DeleteFunc(links, func(l netlink.Link) bool {
		a := l.Attrs()
		return a.Flags&unix.IFF_LOOPBACK != 0 || a.Name == tapName || a.RawFlags&unix.IFF_UP == 0 || len(a.HardwareAddr) != 6
	})
	if len(links) == 0 {
		return nil, errNoInterface
	}
	if i := slices.IndexFunc(links, func(l netlink.Link) bool { return l.Attrs().Name == "eth0" }); i >= 0 {
		return links[i], nil
	}
	routes, err := netlink.RouteListFiltered(unix.AF_UNSPEC, &netlink.Route{Table: unix.RT_TABLE_MAIN}, netlink.RT_FILTER_TABLE)
	if err != nil {
		return nil, fmt.Errorf("list routes: %w", err)
	}
	for _, r := range routes {
		if r.Dst != nil && r.Dst.IP != nil && !r.Dst.IP.IsUnspecified() {
			continue
		}
		if i := slices.IndexFunc(links, func(l netlink.Link) bool { return l.Attrs().Index == r.LinkIndex }); i >= 0 {
			return links[i], nil
		}
	}
	return links[0], nil
}

// describe reads what the guest is to set up.
func describe(link netlink.Link) (wire.Interface, error) {
	a := link.Attrs()
	i := wire.Interface{Name: "eth0", MAC: a.HardwareAddr.String(), MTU: a.MTU}
	addrs, err := netlink.AddrList(link, unix.AF_UNSPEC)
	if err != nil {
		return i, fmt.Errorf("addresses of %s: %w", a.Name, err)
	}
	for _, addr := range addrs {
		ip, ok := netip.AddrFromSlice(addr.IP)
		ones, _ := addr.Mask.Size()
		if !ok || ip.Unmap().IsLinkLocalUnicast() && ip.Is6() {
			continue // the guest makes that of the MAC
		}
		i.Addresses = append(i.Addresses, netip.PrefixFrom(ip.Unmap(), ones))
	}
	routes, err := netlink.RouteListFiltered(unix.AF_UNSPEC, &netlink.Route{LinkIndex: a.Index, Table: unix.RT_TABLE_MAIN}, netlink.RT_FILTER_OIF|netlink.RT_FILTER_TABLE)
	if err != nil {
		return i, fmt.Errorf("routes of %s: %w", a.Name, err)
	}
	for _, r := range routes {
		if r.Protocol == unix.RTPROT_KERNEL || r.Type != unix.RTN_UNICAST {
			continue // these come with the addresses
		}
		out, ok := describeRoute(&r)
		if !ok {
			continue
		}
		if r.Flags&unix.RTNH_F_ONLINK != 0 && out.Via.IsValid() {
			i.Routes = append(i.Routes, wire.Route{Destination: netip.PrefixFrom(out.Via, out.Via.BitLen())})
		}
		i.Routes = append(i.Routes, out)
	}
	// A gateway has to be known before what is behind it.
	var direct, behind []wire.Route
	for _, r := range i.Routes {
		if r.Via.IsValid() {
			behind = append(behind, r)
		} else {
			direct = append(direct, r)
		}
	}
	i.Routes = append(direct, behind...)
	return i, nil
}

func describeRoute(r *netlink.Route) (wire.Route, bool) {
	out := wire.Route{Metric: r.Priority}
	if gw, ok := netip.AddrFromSlice(r.Gw); ok {
		out.Via = gw.Unmap()
	}
	if src, ok := netip.AddrFromSlice(r.Src); ok {
		out.Source = src.Unmap()
	}
	if r.Dst != nil && len(r.Dst.IP) > 0 {
		ip, ok := netip.AddrFromSlice(r.Dst.IP)
		ones, _ := r.Dst.Mask.Size()
		out.Destination = netip.PrefixFrom(ip.Unmap(), ones)
		return out, ok && !(ip.Is6() && (ip.IsLinkLocalUnicast() || ip.IsMulticast()))
	}
	if r.Family == unix.AF_INET6 || out.Via.Is6() {
		out.Destination = netip.PrefixFrom(netip.IPv6Unspecified(), 0)
	} else {
		out.Destination = netip.PrefixFrom(netip.IPv4Unspecified(), 0)
	}
	return out, true
}

// openTap makes the tap. Packets carry a virtio-net header, so that checksums and segmentation are left to whoever can do them best.
func openTap() (*os.File, error) {
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("open /dev/net/tun: %w: the host's kernel needs the tun module (modprobe tun)", err)
	}
	ifr, err := unix.NewIfreq(tapName)
	if err == nil {
		ifr.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
		err = unix.IoctlIfreq(fd, unix.TUNSETIFF, ifr)
	}
	if err != nil {
		unix.Close(fd)
		if errors.Is(err, unix.EBUSY) {
			return nil, ErrInUse
		}
		return nil, fmt.Errorf("make tap %s: %w", tapName, err)
	}
	return os.NewFile(uintptr(fd), "/dev/net/tun"), nil // not before: only now can it be waited for
}

// connect hands what arrives at link to the tap, and what arrives at the tap to link.
func connect(link netlink.Link, mtu int, hasIngress bool) error {
	// Nobody but the guest speaks on the tap.
	if err := os.WriteFile("/proc/sys/net/ipv6/conf/"+tapName+"/disable_ipv6", []byte("1"), 0); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	tap, err := netlink.LinkByName(tapName)
	if err != nil {
		return fmt.Errorf("tap %s: %w", tapName, err)
	}
	if err := netlink.LinkSetMTU(tap, mtu); err != nil {
		return fmt.Errorf("tap %s: set MTU %d: %w", tapName, mtu, err)
	}
	if err := netlink.LinkSetARPOff(tap); err != nil {
		return fmt.Errorf("tap %s: %w", tapName, err)
	}
	if err := netlink.LinkSetUp(tap); err != nil {
		return fmt.Errorf("tap %s: set up: %w", tapName, err)
	}
	if err := redirect(tap, link, false); err != nil {
		return err
	}
	return redirect(link, tap, hasIngress)
}

// redirect sends everything that arrives at from out of to.
func redirect(from, to netlink.Link, hasIngress bool) error {
	index := from.Attrs().Index
	if !hasIngress {
		q := &netlink.Ingress{QdiscAttrs: netlink.QdiscAttrs{LinkIndex: index, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_INGRESS}}
		if err := netlink.QdiscAdd(q); err != nil {
			return fmt.Errorf("interface %s: add ingress qdisc: %w: the host's kernel needs sch_ingress", from.Attrs().Name, err)
		}
	}
	// Of the classifiers that match everything u32 is the one that every distribution's kernel has.
	f := &netlink.U32{
		FilterAttrs: netlink.FilterAttrs{LinkIndex: index, Parent: netlink.HANDLE_MIN_INGRESS, Priority: redirectPref, Protocol: unix.ETH_P_ALL},
		Sel:         &netlink.TcU32Sel{Flags: netlink.TC_U32_TERMINAL, Nkeys: 1, Keys: []netlink.TcU32Key{{}}},
		Actions:     []netlink.Action{netlink.NewMirredAction(to.Attrs().Index)},
	}
	if err := netlink.FilterAdd(f); err != nil {
		return fmt.Errorf("interface %s: redirect to %s: %w: the host's kernel needs cls_u32 and act_mirred", from.Attrs().Name, to.Attrs().Name, err)
	}
	return nil
}

// removeStale removes what a process that was killed has left on link. It says whether link has an ingress qdisc, of somebody else's. It fails
// with ErrInUse while the tap is there.
func removeStale(link netlink.Link) (ingress bool, err error) {
	if _, err := netlink.LinkByName(tapName); err == nil {
		return false, ErrInUse
	} else if !errors.As(err, new(netlink.LinkNotFoundError)) {
		return false, fmt.Errorf("tap %s: %w", tapName, err)
	}
	if err := disconnect(link); err != nil {
		return false, err
	}
	return hasIngress(link)
}

// disconnect removes our filter from link, and the ingress qdisc where nobody else has a filter there.
func disconnect(link netlink.Link) error {
	name := link.Attrs().Name
	ingress, err := hasIngress(link)
	if err != nil || !ingress {
		return err
	}
	filters, err := netlink.FilterList(link, netlink.HANDLE_MIN_INGRESS)
	if err != nil {
		return fmt.Errorf("interface %s: list filters: %w", name, err)
	}
	ours := false
	for _, f := range filters {
		if f.Attrs().Priority != redirectPref {
			continue
		}
		ours = true
		del := &netlink.U32{FilterAttrs: netlink.FilterAttrs{
			LinkIndex: link.Attrs().Index, Parent: netlink.HANDLE_MIN_INGRESS, Priority: redirectPref, Protocol: unix.ETH_P_ALL,
		}}
		if err := netlink.FilterDel(del); err != nil && !errors.Is(err, unix.ENOENT) {
			return fmt.Errorf("interface %s: remove redirection: %w", name, err)
		}
		break // all of one priority go at once
	}
	if !ours {
		return nil
	}
	if filters, err = netlink.FilterList(link, netlink.HANDLE_MIN_INGRESS); err != nil {
		return fmt.Errorf("interface %s: list filters: %w", name, err)
	}
	if len(filters) > 0 {
		return nil
	}
	q := &netlink.Ingress{QdiscAttrs: netlink.QdiscAttrs{LinkIndex: link.Attrs().Index, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_INGRESS}}
	if err := netlink.QdiscDel(q); err != nil && !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("interface %s: remove ingress qdisc: %w", name, err)
	}
	return nil
}

// hasIngress says whether link has an ingress or clsact qdisc: there is room for one.
func hasIngress(link netlink.Link) (bool, error) {
	qdiscs, err := netlink.QdiscList(link)
	if err != nil {
		return false, fmt.Errorf("interface %s: list qdiscs: %w", link.Attrs().Name, err)
	}
	return slices.ContainsFunc(qdiscs, func(q netlink.Qdisc) bool {
		return q.Attrs().Handle == netlink.MakeHandle(0xffff, 0)
	}), nil
}
