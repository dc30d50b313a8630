package network

import (
	"errors"
	"fmt"
	"io/fs"
	"net"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/cradlestack/cradlestack/driver-cradle/wire"
)

// filterPref is the priority of our filters, by which a later process knows those that a killed one has left.
const filterPref = 0xc4ad

// connect hands what arrives at link to the tap, and what arrives at the tap to link, but for what is the namespace's own. Where that can't be told
// apart, the guest gets everything, and why says the reason.
func connect(link netlink.Link, i *wire.Interface, upstreams, onLink []uint16) (why error, err error) {
	// Nobody but the guest speaks on the tap.
	if err := setSysctl("net/ipv6/conf/"+tapName+"/disable_ipv6", "1"); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	tap, err := netlink.LinkByName(tapName)
	if err != nil {
		return nil, fmt.Errorf("tap %s: %w", tapName, err)
	}
	if err := netlink.LinkSetMTU(tap, i.MTU); err != nil {
		return nil, fmt.Errorf("tap %s: set MTU %d: %w", tapName, i.MTU, err)
	}
	if err := netlink.LinkSetARPOff(tap); err != nil {
		return nil, fmt.Errorf("tap %s: %w", tapName, err)
	}
	if err := netlink.LinkSetUp(tap); err != nil {
		return nil, fmt.Errorf("tap %s: set up: %w", tapName, err)
	}
	if i.Namespace, why = share(link, tap, i, upstreams, onLink); why == nil {
		return nil, nil
	}
	if err := disconnect(link); err != nil {
		return why, err
	}
	if err := redirect(tap, link); err != nil {
		return why, err
	}
	return why, redirect(link, tap)
}

// share connects link and tap by programs that know the namespace's sockets.
func share(link, tap netlink.Link, i *wire.Interface, upstreams, onLink []uint16) (*wire.Namespace, error) {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return nil, fmt.Errorf("interface lo: %w", err)
	}
	s := sharing{
		pod: link.Attrs().Index, tap: tap.Attrs().Index, lo: lo.Attrs().Index,
		mac: [6]byte(link.Attrs().HardwareAddr), upstreams: upstreams, networks: i.Addresses, onLink: onLink,
	}
	n := &wire.Namespace{MAC: net.HardwareAddr(namespaceMAC[:]).String(), IP4: namespace4, Loopback4: namespaceLoop4, Upstreams: upstreams}
	for _, p := range i.Addresses {
		s.addresses = append(s.addresses, p.Addr())
		if p.Addr().Is6() {
			n.IP6, n.Loopback6 = namespace6, namespaceLoop6
		}
	}
	datagrams, err := newDatagrams()
	if err != nil {
		return nil, fmt.Errorf("BPF map: %w", err)
	}
	defer datagrams.Close()
	s.datagrams = datagrams.FD()

	before, err := readSettings()
	if err != nil {
		return nil, err
	}
	// The record of how it was before is there as long as there is something to put back.
	if err := addProgram(lo, netlink.HANDLE_MIN_EGRESS, "cradle_ns", before.String(), s.fromNamespace()); err != nil {
		return nil, err
	}
	if n.LocalPorts, err = before.change(); err != nil {
		return nil, err
	}
	if err := addProgram(tap, netlink.HANDLE_MIN_INGRESS, "cradle_guest", "cradle", s.fromGuest()); err != nil {
		return nil, err
	}
	if err := addProgram(link, netlink.HANDLE_MIN_INGRESS, "cradle_net", "cradle", s.fromNetwork()); err != nil {
		return nil, err
	}
	return n, nil
}

// addProgram attaches a program to one side of an interface.
func addProgram(link netlink.Link, side uint32, name, label string, code asm.Instructions) error {
	prog, err := ebpf.NewProgram(&ebpf.ProgramSpec{Name: name, Type: ebpf.SchedCLS, Instructions: code, License: "Apache-2.0"})
	if err != nil {
		return fmt.Errorf("program %s: %w", name, err)
	}
	defer prog.Close()
	q, err := addQdisc(link)
	if err != nil {
		return err
	}
	if side == netlink.HANDLE_MIN_EGRESS && q.Type() != "clsact" {
		return fmt.Errorf("interface %s: somebody has given it an %s qdisc: clsact is needed, and there is room for one", link.Attrs().Name, q.Type())
	}
	f := &netlink.BpfFilter{
		FilterAttrs: netlink.FilterAttrs{LinkIndex: link.Attrs().Index, Parent: side, Priority: filterPref, Protocol: unix.ETH_P_ALL},
		Fd:          prog.FD(), Name: label, DirectAction: true,
	}
	if err := netlink.FilterAdd(f); err != nil {
		return fmt.Errorf("interface %s: attach program %s: %w: the host's kernel needs cls_bpf", link.Attrs().Name, name, err)
	}
	return nil
}

// redirect sends everything that arrives at from out of to.
func redirect(from, to netlink.Link) error {
	if _, err := addQdisc(from); err != nil {
		return err
	}
	// Of the classifiers that match everything u32 is the one that every distribution's kernel has.
	f := &netlink.U32{
		FilterAttrs: netlink.FilterAttrs{LinkIndex: from.Attrs().Index, Parent: netlink.HANDLE_MIN_INGRESS, Priority: filterPref, Protocol: unix.ETH_P_ALL},
		Sel:         &netlink.TcU32Sel{Flags: netlink.TC_U32_TERMINAL, Nkeys: 1, Keys: []netlink.TcU32Key{{}}},
		Actions:     []netlink.Action{netlink.NewMirredAction(to.Attrs().Index)},
	}
	if err := netlink.FilterAdd(f); err != nil {
		return fmt.Errorf("interface %s: redirect to %s: %w: the host's kernel needs cls_u32 and act_mirred", from.Attrs().Name, to.Attrs().Name, err)
	}
	return nil
}

// addQdisc gives link what filters are attached to, unless it has that.
func addQdisc(link netlink.Link) (netlink.Qdisc, error) {
	if q, err := ingress(link); err != nil || q != nil {
		return q, err
	}
	q := &netlink.Clsact{QdiscAttrs: netlink.QdiscAttrs{LinkIndex: link.Attrs().Index, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_CLSACT}}
	if err := netlink.QdiscAdd(q); err != nil {
		return nil, fmt.Errorf("interface %s: add clsact qdisc: %w: the host's kernel needs sch_ingress", link.Attrs().Name, err)
	}
	return q, nil
}

// ingress is link's ingress or clsact qdisc, of which there is room for one, or nil.
func ingress(link netlink.Link) (netlink.Qdisc, error) {
	qdiscs, err := netlink.QdiscList(link)
	if err != nil {
		return nil, fmt.Errorf("interface %s: list qdiscs: %w", link.Attrs().Name, err)
	}
	for _, q := range qdiscs {
		if q.Attrs().Handle == netlink.MakeHandle(0xffff, 0) {
			return q, nil
		}
	}
	return nil, nil
}

// removeStale removes what a process that was killed has left in the namespace whose interface link is. It fails with ErrInUse while the tap is there.
func removeStale(link netlink.Link) error {
	if _, err := netlink.LinkByName(tapName); err == nil {
		return ErrInUse
	} else if !errors.As(err, new(netlink.LinkNotFoundError)) {
		return fmt.Errorf("tap %s: %w", tapName, err)
	}
	return disconnect(link)
}

// disconnect puts the namespace back as it was before connect. What is on the tap goes with that.
func disconnect(link netlink.Link) error {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("interface lo: %w", err)
	}
	return errors.Join(removeFilters(link), removeFilters(lo))
}

// removeFilters removes our filters from link, and the qdisc where nobody else has a filter there. One that is empty is of a process that was killed
// before its first filter or after its last.
func removeFilters(link netlink.Link) error {
	name := link.Attrs().Name
	q, err := ingress(link)
	if err != nil || q == nil {
		return err
	}
	others := false
	var ours []netlink.Filter
	for _, side := range []uint32{netlink.HANDLE_MIN_INGRESS, netlink.HANDLE_MIN_EGRESS} {
		if side == netlink.HANDLE_MIN_EGRESS && q.Type() != "clsact" {
			continue
		}
		filters, err := netlink.FilterList(link, side)
		if err != nil {
			return fmt.Errorf("interface %s: list filters: %w", name, err)
		}
		for _, f := range filters {
			if f.Attrs().Priority == filterPref {
				ours = append(ours, f)
			} else {
				others = true
			}
		}
	}
	for _, f := range ours {
		if b, ok := f.(*netlink.BpfFilter); ok {
			if err := restoreSettings(b.Name); err != nil {
				return err
			}
		}
		f.Attrs().Handle = 0 // all of this priority: u32 lists its tables as well
		if err := netlink.FilterDel(f); err != nil && !errors.Is(err, unix.ENOENT) {
			return fmt.Errorf("interface %s: remove filter: %w", name, err)
		}
	}
	if others || len(ours) == 0 && q.Type() != "clsact" {
		return nil
	}
	if err := netlink.QdiscDel(q); err != nil && !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("interface %s: remove %s qdisc: %w", name, q.Type(), err)
	}
	return nil
}
