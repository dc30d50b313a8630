package main

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// A floating address is one that the active filer's host has, and no other.
type floating struct {
	prefix netip.Prefix // the address, with the bits of its network
	link   string
}

// parseFloating reads ADDRESS/BITS@INTERFACE.
func parseFloating(text string) (*floating, error) {
	if text == "" {
		return nil, nil
	}
	address, link, _ := strings.Cut(text, "@")
	prefix, err := netip.ParsePrefix(address)
	if err != nil || link == "" || prefix.Addr().Is4In6() {
		return nil, fmt.Errorf("--floating %s: it is not ADDRESS/BITS@INTERFACE, such as 10.1.2.9/24@eth0", text)
	}
	return &floating{prefix, link}, nil
}

func (a *floating) String() string { return a.prefix.String() + "@" + a.link }

func (a *floating) on(do func(link netlink.Link, address *netlink.Addr) error) error {
	link, err := netlink.LinkByName(a.link)
	if err != nil {
		return fmt.Errorf("interface %s: %w", a.link, err)
	}
	bits := a.prefix.Addr().BitLen()
	address := &netlink.Addr{IPNet: &net.IPNet{IP: a.prefix.Addr().AsSlice(), Mask: net.CIDRMask(a.prefix.Bits(), bits)}}
	if bits == 128 {
		address.Flags = unix.IFA_F_NODAD // the former one's host may still have it for a moment
	}
	if err := do(link, address); err != nil {
		return fmt.Errorf("address %s: %w", a, err)
	}
	return nil
}

// add gives the address to this host, which may have it already. What is left of connections from when it had it before is no one's: a client that comes from the same port as then, as kernels do for
// NFS, would be answered by it for minutes, and neither be heard nor told that its connection is no more.
func (a *floating) add() error {
	a.reset(closed)
	return a.on(netlink.AddrReplace)
}

// States of connections: parting ones are those whose client has not answered yet that this host has closed them.
var (
	opened  = []uint8{netlink.TCP_ESTABLISHED, netlink.TCP_CLOSE_WAIT}
	parting = []uint8{netlink.TCP_FIN_WAIT1, netlink.TCP_FIN_WAIT2, netlink.TCP_CLOSING, netlink.TCP_LAST_ACK}
	closed  = append(slices.Clip(parting), netlink.TCP_TIME_WAIT)
)

// connections are those to the address that are in one of some states.
func (a *floating) connections(states []uint8) (found []*netlink.Socket) {
	address := a.prefix.Addr()
	for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
		all, _ := netlink.SocketDiagTCP(family)
		for _, s := range all {
			at, _ := netip.AddrFromSlice(s.ID.Source)
			if at.Unmap() == address && slices.Contains(states, s.State) {
				found = append(found, s)
			}
		}
	}
	return found
}

// reset ends connections. A kernel without INET_DIAG_DESTROY leaves them.
func (a *floating) reset(states []uint8) {
	for _, s := range a.connections(states) {
		_ = destroy(s.Family, s.ID)
	}
}

// partingTime is how long clients may take to answer that connections are closed.
const partingTime = 200 * time.Millisecond

// parts waits until they have: without the address they could not, and would say so again and again to the next host that has it.
func (a *floating) parts() {
	for end := time.Now().Add(partingTime); len(a.connections(parting)) > 0 && time.Now().Before(end); {
		time.Sleep(10 * time.Millisecond)
	}
}

// destroy ends a connection (sock_diag(7), SOCK_DESTROY); netlink's own is of IPv4 alone.
func destroy(family uint8, id netlink.SocketID) error {
	var b [56]byte // struct inet_diag_req_v2
	b[0], b[1] = family, unix.IPPROTO_TCP
	binary.BigEndian.PutUint16(b[8:], id.SourcePort)
	binary.BigEndian.PutUint16(b[10:], id.DestinationPort)
	copy(b[12:28], id.Source)
	copy(b[28:44], id.Destination)
	binary.NativeEndian.PutUint32(b[44:], id.Interface)
	binary.NativeEndian.PutUint32(b[48:], id.Cookie[0])
	binary.NativeEndian.PutUint32(b[52:], id.Cookie[1])
	req := nl.NewNetlinkRequest(nl.SOCK_DESTROY, unix.NLM_F_ACK)
	req.AddRawData(b[:])
	_, err := req.Execute(unix.NETLINK_INET_DIAG, 0)
	return err
}

// remove takes it away. That it is not there is no error. Connections whose process can't close them, as calls of it wait in the kernel, are ended: their clients would wait as well, and not ask
// elsewhere.
func (a *floating) remove() error {
	a.reset(opened)
	a.parts()
	a.reset(closed)
	return a.on(func(link netlink.Link, address *netlink.Addr) error {
		err := netlink.AddrDel(link, address)
		if errors.Is(err, unix.EADDRNOTAVAIL) {
			return nil
		}
		return err
	})
}

// announcements are when neighbours are told, after the beginning: the first can be lost, and the former one's host may have answered them since.
var announcements = []time.Duration{0, 100 * time.Millisecond, 300 * time.Millisecond, time.Second, 3 * time.Second, 10 * time.Second}

// announce tells the neighbours again and again, until ctx ends.
func (a *floating) announce(ctx context.Context, failed func(error)) {
	begin := time.Now()
	for _, at := range announcements {
		select {
		case <-time.After(time.Until(begin.Add(at))):
		case <-ctx.Done():
			return
		}
		if err := a.tell(); err != nil {
			failed(err)
		}
	}
}

// tell sends what has neighbours correct their tables.
func (a *floating) tell() error {
	link, err := net.InterfaceByName(a.link)
	if err != nil {
		return fmt.Errorf("interface %s: %w", a.link, err)
	}
	if len(link.HardwareAddr) != 6 {
		return nil // no neighbours that have a table
	}
	if a.prefix.Addr().Is4() {
		err = tellARP(link, a.prefix.Addr())
	} else {
		err = tellND(link, a.prefix.Addr())
	}
	if err != nil {
		return fmt.Errorf("announce %s: %w", a, err)
	}
	return nil
}

// tellARP broadcasts gratuitous ARP (RFC 5227 §3), as a request and as a reply: neighbours heed one or the other.
func tellARP(link *net.Interface, address netip.Addr) error {
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	to := &unix.SockaddrLinklayer{Protocol: binary.NativeEndian.Uint16([]byte{unix.ETH_P_ARP >> 8, unix.ETH_P_ARP & 0xff}), Ifindex: link.Index, Halen: 6, Addr: [8]byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}}
	for _, operation := range []byte{1, 2} {
		packet := append([]byte{0, 1, 8, 0, 6, 4, 0, operation}, link.HardwareAddr...) // RFC 826
		packet = append(packet, address.AsSlice()...)
		if operation == 1 {
			packet = append(packet, make([]byte, 6)...)
		} else {
			packet = append(packet, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff)
		}
		packet = append(packet, address.AsSlice()...)
		if err := unix.Sendto(fd, packet, 0, to); err != nil {
			return err
		}
	}
	return nil
}

// tellND sends an unsolicited neighbour advertisement (RFC 4861 §7.2.6) to all nodes.
func tellND(link *net.Interface, address netip.Addr) error {
	fd, err := unix.Socket(unix.AF_INET6, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_ICMPV6)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	for option, value := range map[int]int{unix.IPV6_MULTICAST_HOPS: 255, unix.IPV6_MULTICAST_IF: link.Index} {
		if err := unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, option, value); err != nil {
			return os.NewSyscallError("setsockopt", err)
		}
	}
	if err := unix.Bind(fd, &unix.SockaddrInet6{Addr: address.As16()}); err != nil {
		return err
	}
	packet := append([]byte{136, 0, 0, 0, 0x20, 0, 0, 0}, address.AsSlice()...) // override; the kernel fills in the checksum
	packet = append(packet, 2, 1)                                               // target link-layer address
	packet = append(packet, link.HardwareAddr...)
	return unix.Sendto(fd, packet, 0, &unix.SockaddrInet6{Addr: netip.MustParseAddr("ff02::1").As16(), ZoneId: uint32(link.Index)})
}
