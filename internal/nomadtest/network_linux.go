package nomadtest

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"strconv"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// Nodes are 10.77.0.N and fd77::N, behind a switch that is 10.77.0.254. All of this is in namespaces: the host has no trace of it.
var (
	gateway  = netip.MustParsePrefix("10.77.0.254/24")
	gateway6 = netip.MustParsePrefix("fd77::fe/64")
)

// A network is a namespace with a bridge. Nothing but this process holds it, so it ends with it.
type network struct {
	space  *os.File
	handle *netlink.Handle
	bridge netlink.Link
}

func newNetwork() (w *network, err error) {
	w = &network{}
	if err := onThread(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("unshare network: %w", err)
		}
		w.space, err = os.Open("/proc/thread-self/ns/net")
		return err
	}); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			w.close()
		}
	}()
	if w.handle, err = netlink.NewHandleAt(netns.NsHandle(int(w.space.Fd())), unix.NETLINK_ROUTE); err != nil {
		return nil, err
	}
	if err := w.handle.LinkAdd(&netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "switch"}}); err != nil {
		return nil, err
	}
	if w.bridge, err = w.handle.LinkByName("switch"); err != nil {
		return nil, err
	}
	return w, up(w.handle, "switch", gateway, gateway6)
}

func (w *network) close() {
	if w.handle != nil {
		w.handle.Close()
	}
	if w.space != nil {
		w.space.Close()
	}
}

// plug connects a node with the switch.
func (w *network) plug(number, pid int) (netip.Addr, error) {
	space, err := os.Open(fmt.Sprintf("/proc/%d/ns/net", pid))
	if err != nil {
		return netip.Addr{}, err
	}
	defer space.Close()
	if err := w.handle.LinkAdd(&netlink.Veth{
		LinkAttrs: netlink.LinkAttrs{Name: port(number), MasterIndex: w.bridge.Attrs().Index},
		PeerName:  "eth0", PeerNamespace: netlink.NsFd(int(space.Fd())),
	}); err != nil {
		return netip.Addr{}, fmt.Errorf("add veth: %w", err)
	}
	if err := up(w.handle, port(number)); err != nil {
		return netip.Addr{}, err
	}
	node, err := netlink.NewHandleAt(netns.NsHandle(int(space.Fd())), unix.NETLINK_ROUTE)
	if err != nil {
		return netip.Addr{}, err
	}
	defer node.Close()
	own := numbered(gateway, number)
	if err := errors.Join(up(node, "lo"), up(node, "eth0", own, numbered(gateway6, number))); err != nil {
		return netip.Addr{}, err
	}
	for _, g := range []netip.Prefix{gateway, gateway6} {
		if err := node.RouteAdd(&netlink.Route{Gw: g.Addr().AsSlice()}); err != nil {
			return netip.Addr{}, fmt.Errorf("default route by %s: %w", g.Addr(), err)
		}
	}
	return own.Addr(), nil
}

// unplug takes a node's cable away, both ends of it, whoever still has its network.
func (w *network) unplug(number int) error {
	link, err := w.handle.LinkByName(port(number))
	if errors.As(err, &netlink.LinkNotFoundError{}) {
		return nil
	}
	if err != nil {
		return err
	}
	if err := w.handle.LinkDel(link); !errors.Is(err, unix.ENODEV) { // it ends with its other end, in the node's network
		return err
	}
	return nil
}

// Attach puts another network namespace, by its name in /run/netns, at the switch: nodes reach the address that it has. It ends with either.
func (c *Cluster) Attach(namespace string, address netip.Addr) error {
	space, err := os.Open(filepath.Join("/run/netns", namespace))
	if err != nil {
		return err
	}
	defer space.Close()
	const number = 200 // of no node
	w := c.network
	if err := w.handle.LinkAdd(&netlink.Veth{
		LinkAttrs: netlink.LinkAttrs{Name: port(number), MasterIndex: w.bridge.Attrs().Index},
		PeerName:  "switch0", PeerNamespace: netlink.NsFd(int(space.Fd())),
	}); err != nil {
		return fmt.Errorf("add veth: %w", err)
	}
	there, err := netlink.NewHandleAt(netns.NsHandle(int(space.Fd())), unix.NETLINK_ROUTE)
	if err != nil {
		return err
	}
	defer there.Close()
	by := numbered(gateway, number)
	if err := errors.Join(up(w.handle, port(number)), up(there, "switch0", by)); err != nil {
		return err
	}
	if err := w.handle.RouteAdd(&netlink.Route{
		Dst: &net.IPNet{IP: address.AsSlice(), Mask: net.CIDRMask(address.BitLen(), address.BitLen())}, Gw: by.Addr().AsSlice(),
	}); err != nil {
		return fmt.Errorf("route to %s: %w", address, err)
	}
	return onThread(func() error { // what nodes send to their gateway it hands on
		if err := unix.Setns(int(w.space.Fd()), unix.CLONE_NEWNET); err != nil {
			return err
		}
		return os.WriteFile("/proc/sys/net/ipv4/ip_forward", []byte("1"), 0)
	})
}

// numbered is a node's address in a network.
func numbered(g netip.Prefix, number int) netip.Prefix {
	b := g.Addr().AsSlice()
	b[len(b)-1] = byte(number)
	a, _ := netip.AddrFromSlice(b)
	return netip.PrefixFrom(a, g.Bits())
}

func port(number int) string { return "port" + strconv.Itoa(number) }

func up(h *netlink.Handle, name string, addresses ...netip.Prefix) error {
	link, err := h.LinkByName(name)
	if err != nil {
		return err
	}
	for _, a := range addresses {
		address := &netlink.Addr{IPNet: &net.IPNet{IP: a.Addr().AsSlice(), Mask: net.CIDRMask(a.Bits(), a.Addr().BitLen())}}
		if a.Addr().Is6() {
			address.Flags = unix.IFA_F_NODAD // usable at once
		}
		if err := h.AddrAdd(link, address); err != nil {
			return fmt.Errorf("add address %s: %w", a, err)
		}
	}
	return h.LinkSetUp(link)
}

// onThread runs f on a thread that ends with it, so that f may change the thread's namespaces.
func onThread(f func() error) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread()
		done <- f()
	}()
	return <-done
}

// inNetwork runs f on a thread in the node's network.
func (n *Node) inNetwork(f func() error) error {
	return onThread(func() error {
		space, err := os.Open(fmt.Sprintf("/proc/%d/ns/net", n.PID()))
		if err != nil {
			return fmt.Errorf("%s is down: %w", n.Name, err)
		}
		defer space.Close()
		if err := unix.Setns(int(space.Fd()), unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("enter network of %s: %w", n.Name, err)
		}
		return f()
	})
}

// Dial connects to an address, no name, as a program in the node would.
func (n *Node) Dial(ctx context.Context, network, address string) (conn net.Conn, err error) {
	err = n.inNetwork(func() (err error) {
		conn, err = new(net.Dialer).DialContext(ctx, network, address)
		return err
	})
	return conn, err
}

// Listen listens in the node: a test's server that pods are to reach.
func (n *Node) Listen(network, address string) (l net.Listener, err error) {
	err = n.inNetwork(func() (err error) {
		l, err = net.Listen(network, address)
		return err
	})
	return l, err
}

// HTTP is a client whose connections begin in the node.
func (n *Node) HTTP() *http.Client {
	return &http.Client{Transport: &http.Transport{DialContext: n.Dial}}
}
