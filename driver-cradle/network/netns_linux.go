package network

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/cradlestack/cradlestack/driver-cradle/wire"
)

// tapName is the tap's in the pod's namespace. It vanishes with the last process that has it open.
const tapName = "cradle0"

// ErrInUse is what Take returns where another machine has the namespace.
var ErrInUse = errors.New("network namespace is in use by another pod: one machine has a namespace's addresses; run what shares them as further containers of that pod (in a Nomad task: container {} blocks)")

// A Link is a machine's connection with a pod's interface.
type Link struct {
	Tap       *os.File       // the machine's end; the connection lasts as long as it is open
	Interface wire.Interface // what the guest has to set up
	// Unshared says why the namespace's own processes hear nothing any more, where that is so. The guest has all of the network then.
	Unshared error
}

// Take makes a tap in the network namespace at path and connects it with the pod's interface there. The guest gets to the namespace's
// services at 127.0.0.1 whose ports are upstreams. The guest's ports onLink, of TCP and UDP, are reached from the interface's own networks alone. The interface gets the link-layer address mac, where that is not "". Release removes what is left when the tap
// is gone.
func Take(ctx context.Context, path, mac string, upstreams, onLink []uint16) (l *Link, err error) {
	err = inNamespace(path, func() error {
		l, err = take(mac, upstreams, onLink)
		return err
	})
	if err == nil && ctx.Err() != nil {
		err = errors.Join(context.Cause(ctx), l.Tap.Close(), Release(path))
	}
	if err != nil {
		return nil, fmt.Errorf("take over network namespace %s: %w", path, err)
	}
	return l, nil
}

// Release removes from the namespace at path what a Take has left whose tap is gone, or is about to go: a process that was told to end may have it
// for a moment longer. A namespace that is gone itself is no error, one that is in use is left alone.
func Release(path string) error {
	var err error
	for wait := time.Millisecond; ; wait *= 2 {
		err = inNamespace(path, func() error {
			link, err := podInterface()
			if err != nil {
				return err
			}
			return removeStale(link)
		})
		if !errors.Is(err, ErrInUse) || wait > releaseWait {
			break
		}
		time.Sleep(wait)
	}
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, errNoNamespace) || errors.Is(err, errNoInterface) || errors.Is(err, ErrInUse) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("release network namespace %s: %w", path, err)
	}
	return nil
}

// releaseWait is about how long Release waits for the end of a tap.
const releaseWait = 2 * time.Second

// Probe tries in a network namespace of its own what Take does: whether it can be done at all, and why (unshared) the processes of a pod's namespace would
// be cut off.
func Probe() (unshared, err error) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // as in inNamespace
		unshared, err = probe()
	}()
	<-done
	return unshared, err
}

func probe() (unshared, err error) {
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		return nil, fmt.Errorf("make a network namespace: %w", err)
	}
	outside, err := openTap("eth0")
	if err != nil {
		return nil, err
	}
	defer outside.Close()
	eth0, err := netlink.LinkByName("eth0")
	if err == nil {
		err = netlink.LinkSetUp(eth0)
	}
	if err != nil {
		return nil, fmt.Errorf("interface eth0: %w", err)
	}
	l, err := take("", nil, nil)
	if err != nil {
		return nil, err
	}
	return l.Unshared, l.Tap.Close()
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

func take(mac string, upstreams, onLink []uint16) (*Link, error) {
	link, err := podInterface()
	if err != nil {
		return nil, err
	}
	if err := removeStale(link); err != nil {
		return nil, err
	}
	if mac != "" {
		if link, err = readdress(link, mac); err != nil {
			return nil, err
		}
	}
	l := new(Link)
	if l.Interface, err = describe(link); err != nil {
		return nil, err
	}
	if l.Tap, err = openTap(tapName); err != nil {
		return nil, err
	}
	l.Unshared, err = connect(link, &l.Interface, upstreams, onLink)
	if err == nil && l.Unshared != nil && len(upstreams) > 0 {
		err = fmt.Errorf("upstreams are out of reach: %w", l.Unshared)
	}
	if err == nil && l.Unshared != nil && len(onLink) > 0 {
		err = fmt.Errorf("ports can't be kept to the interface's own networks: %w", l.Unshared)
	}
	if err != nil {
		return nil, errors.Join(err, disconnect(link), l.Tap.Close())
	}
	return l, nil
}

// readdress gives an interface another link-layer address.
func readdress(link netlink.Link, mac string) (netlink.Link, error) {
	address, err := net.ParseMAC(mac)
	if err == nil {
		err = netlink.LinkSetHardwareAddr(link, address)
	}
	if err == nil {
		link, err = netlink.LinkByIndex(link.Attrs().Index)
	}
	if err != nil {
		return nil, fmt.Errorf("give the interface the address %s: %w", mac, err)
	}
	return link, nil
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
func openTap(name string) (*os.File, error) {
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("open /dev/net/tun: %w: the host's kernel needs the tun module (modprobe tun)", err)
	}
	ifr, err := unix.NewIfreq(name)
	if err == nil {
		ifr.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
		err = unix.IoctlIfreq(fd, unix.TUNSETIFF, ifr)
	}
	if err != nil {
		unix.Close(fd)
		if errors.Is(err, unix.EBUSY) {
			return nil, ErrInUse
		}
		return nil, fmt.Errorf("make tap %s: %w", name, err)
	}
	return os.NewFile(uintptr(fd), "/dev/net/tun"), nil // not before: only now can it be waited for
}
