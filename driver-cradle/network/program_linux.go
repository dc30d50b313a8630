package network

import (
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"golang.org/x/sys/unix"
)

// What the guest sees the namespace's processes as when they speak with it by an address that both have: one of the pod's, or the loopback address. They
// appear on no wire: 169.254.255.0/24 is never chosen by hosts themselves (RFC 3927 §2.1), the others are of a random fd00::/8 prefix of ours (RFC 4193).
var (
	namespace4     = netip.MustParseAddr("169.254.255.1")
	namespaceLoop4 = netip.MustParseAddr("169.254.255.2")
	namespace6     = netip.MustParseAddr("fd5e:91d3:7c0a::1")
	namespaceLoop6 = netip.MustParseAddr("fd5e:91d3:7c0a::2")

	loop4 = netip.MustParseAddr("127.0.0.1")
	loop6 = netip.IPv6Loopback()
)

// namespaceMAC is the link-layer address that goes with them.
var namespaceMAC = [6]byte{0x02, 0xc4, 0xad, 0, 0, 1}

// A sharing is what the programs know that let the guest and the namespace's own processes share the pod interface's addresses.
type sharing struct {
	pod, tap, lo int // indexes of interfaces
	mac          [6]byte
	addresses    []netip.Addr   // of the pod
	networks     []netip.Prefix // that the pod's interface is in
	upstreams    []uint16
	onLink       []uint16
	datagrams    int // file descriptor of the map of those
}

// A way is one by which the namespace's processes get to the guest: what they send to an address of theirs comes to the guest's address, from one that
// stands for the namespace.
type way struct{ inside, guest, namespace netip.Addr }

func (s *sharing) ways(f *family) (all []way) {
	if f == &ip4 {
		all = append(all, way{loop4, loop4, namespaceLoop4})
	}
	for _, a := range s.addresses {
		switch {
		case a.Is4() && f == &ip4:
			all = append(all, way{a, a, namespace4})
		case a.Is6() && f == &ip6:
			if len(all) == 0 {
				all = append(all, way{loop6, a, namespaceLoop6}) // the guest's kernel takes ::1 from no other interface
			}
			all = append(all, way{a, a, namespace6})
		}
	}
	return all
}

// newDatagrams makes the map of datagrams that the namespace's processes have sent to the guest: key as putDatagramKey makes it, value the time.
func newDatagrams() (*ebpf.Map, error) {
	return ebpf.NewMap(&ebpf.MapSpec{Name: "cradle_datagram", Type: ebpf.LRUHash, KeySize: datagramKeySize, ValueSize: 8, MaxEntries: 4096})
}

// datagramAnswer is how long a datagram may be answered; netfilter's time for it (nf_conntrack_udp_timeout_stream).
const datagramAnswer = 120_000_000_000 // nanoseconds

// A family is what differs between IPv4 and IPv6.
type family struct {
	name      string
	size      int16 // of an address
	addresses int32 // offset in the header: source, then destination
	protocol  int32 // offset in the header
	echo      int32 // ICMP type of an echo request
	icmp      int32 // its protocol
	ether     uint16
}

var (
	ip4 = family{name: "4", size: 4, addresses: 12, protocol: 9, echo: 8, icmp: unix.IPPROTO_ICMP, ether: unix.ETH_P_IP}
	ip6 = family{name: "6", size: 16, addresses: 8, protocol: 6, echo: 128, icmp: unix.IPPROTO_ICMPV6, ether: unix.ETH_P_IPV6}
)

// The stack below the frame pointer. A pair is a packet's source and destination address, followed by its two ports: struct bpf_sock_tuple.
const (
	stackPair   = -40  // of the packet
	stackNew    = -80  // that it gets, and for look-ups
	stackHeader = -104 // bytes of a header, 24
	stackKey    = -128 // of the map, 24
	stackValue  = -136

	datagramKeySize = 24
)

// Offsets in struct __sk_buff and struct bpf_sock (linux/bpf.h), in an Ethernet frame and in TCP's header.
const (
	skbProtocol = 16
	skbVLAN     = 20
	sockState   = 72

	etherHeader = 14
	ip4Checksum = 10
	ip4Fragment = 6
	ip6Header   = 40
	tcpChecksum = 16
	udpChecksum = 6
	tcpFlags    = 13
)

// Verdicts (linux/pkt_cls.h). Other filters of the interface see what is left to the namespace.
const (
	verdictNamespace = -1 // TC_ACT_UNSPEC
	verdictDrop      = 2  // TC_ACT_SHOT
)

const tcpListen = 10 // TCP_LISTEN of net/tcp_states.h, as bpf_sock.state tells it

// code is a program being written. In R6 is the context, in R7 the offset of the transport header, in R8 its protocol.
type code struct {
	asm.Instructions
	labels []string
	unique int
}

func (c *code) add(ins ...asm.Instruction) {
	for _, i := range ins {
		for _, l := range c.labels {
			i = i.WithSymbol(l)
		}
		c.labels = nil
		c.Instructions = append(c.Instructions, i)
	}
}

// label names the next instruction. Each has room for one name.
func (c *code) label(name string) {
	if len(c.labels) > 0 {
		c.add(asm.Mov.Reg(asm.R6, asm.R6))
	}
	c.labels = append(c.labels, name)
}

func (c *code) newLabel() string {
	c.unique++
	return fmt.Sprint("_", c.unique)
}

// big is a 16-bit number as a packet has it, loaded as a word of this machine.
func big(n uint16) int32 {
	return int32(binary.NativeEndian.Uint16([]byte{byte(n >> 8), byte(n)}))
}

// words are an address as a packet has it, loaded in words.
func words(a netip.Addr) []int32 {
	var w []int32
	for b := a.AsSlice(); len(b) > 0; b = b[4:] {
		w = append(w, int32(binary.NativeEndian.Uint32(b)))
	}
	return w
}

// load copies n bytes of the packet from offset, plus R7 where that is asked for, to the stack.
func (c *code) load(transport bool, offset int32, to int16, n int32, short string) {
	c.add(asm.Mov.Imm(asm.R2, offset))
	if transport {
		c.add(asm.Add.Reg(asm.R2, asm.R7))
	}
	c.add(
		asm.Mov.Reg(asm.R1, asm.R6),
		asm.Mov.Reg(asm.R3, asm.RFP),
		asm.Add.Imm(asm.R3, int32(to)),
		asm.Mov.Imm(asm.R4, n),
		asm.FnSkbLoadBytes.Call(),
		asm.JNE.Imm(asm.R0, 0, short),
	)
}

// store copies n bytes from the stack into the packet.
func (c *code) store(from int16, offset, n int32) {
	c.add(
		asm.Mov.Reg(asm.R1, asm.R6),
		asm.Mov.Imm(asm.R2, offset),
		asm.Mov.Reg(asm.R3, asm.RFP),
		asm.Add.Imm(asm.R3, int32(from)),
		asm.Mov.Imm(asm.R4, n),
		asm.Mov.Imm(asm.R5, 0),
		asm.FnSkbStoreBytes.Call(),
	)
}

// jumpUnless goes to otherwise unless the address on the stack is a.
func (c *code) jumpUnless(at int16, a netip.Addr, otherwise string) {
	for i, w := range words(a) {
		c.add(asm.LoadMem(asm.R2, asm.RFP, at+int16(4*i), asm.Word), asm.JNE.Imm32(asm.R2, w, otherwise))
	}
}

// jumpIf goes to then if the address on the stack is a.
func (c *code) jumpIf(at int16, a netip.Addr, then string) {
	no := c.newLabel()
	c.jumpUnless(at, a, no)
	c.add(asm.Ja.Label(then))
	c.label(no)
}

// put writes an address to the stack.
func (c *code) put(to int16, a netip.Addr) {
	for i, w := range words(a) {
		c.add(asm.StoreImm(asm.RFP, to+int16(4*i), int64(w), asm.Word))
	}
}

func (c *code) copy(to, from, size int16) {
	for i := int16(0); i < size; i += 4 {
		c.add(asm.LoadMem(asm.R2, asm.RFP, from+i, asm.Word), asm.StoreMem(asm.RFP, to+i, asm.R2, asm.Word))
	}
}

func (c *code) exit(verdict int32) { c.add(asm.Mov.Imm(asm.R0, verdict), asm.Return()) }

// redirect hands the packet to an interface: to be sent by it, or with BPF_F_INGRESS as if it had come from it.
func (c *code) redirect(link int, flags int32) {
	c.add(asm.Mov.Imm(asm.R1, int32(link)), asm.Mov.Imm(asm.R2, flags), asm.FnRedirect.Call(), asm.Return())
}

func begin() *code {
	c := new(code)
	c.add(asm.Mov.Reg(asm.R6, asm.R1))
	return c
}

// byFamily goes on at "4" or "6", for frames of a VLAN at other. What is of neither family goes on here, its protocol in R2.
func (c *code) byFamily(other string) {
	c.add(
		asm.LoadMem(asm.R2, asm.R6, skbVLAN, asm.Word),
		asm.JNE.Imm(asm.R2, 0, other),
		asm.LoadMem(asm.R2, asm.R6, skbProtocol, asm.Word),
		asm.JEq.Imm(asm.R2, big(ip4.ether), ip4.name),
		asm.JEq.Imm(asm.R2, big(ip6.ether), ip6.name),
	)
}

// pair reads a packet's addresses.
func (c *code) pair(f *family, short string) {
	c.load(false, etherHeader+f.addresses, stackPair, 2*int32(f.size), short)
}

// header reads a packet's protocol and where its transport header is. Later fragments of a datagram, which have none, are left to
// fragment; so are first ones where anyFragment says so.
func (c *code) header(f *family, short, fragment string, anyFragment bool) {
	c.load(false, etherHeader, stackHeader, 12, short)
	c.add(asm.LoadMem(asm.R8, asm.RFP, stackHeader+int16(f.protocol), asm.Byte))
	if f == &ip4 {
		c.add(
			asm.LoadMem(asm.R7, asm.RFP, stackHeader, asm.Byte),
			asm.And.Imm(asm.R7, 0xf), // header length in words
			asm.LSh.Imm(asm.R7, 2),
			asm.Add.Imm(asm.R7, etherHeader),
			asm.LoadMem(asm.R2, asm.RFP, stackHeader+ip4Fragment, asm.Half),
		)
		mask := uint16(0x1fff)
		if anyFragment {
			mask = 0x3fff // "more fragments" too
		}
		c.add(asm.And.Imm(asm.R2, big(mask)), asm.JNE.Imm(asm.R2, 0, fragment))
		return
	}
	c.add(asm.Mov.Imm(asm.R7, etherHeader+ip6Header))
	if anyFragment {
		c.add(asm.JEq.Imm(asm.R8, unix.IPPROTO_FRAGMENT, fragment))
		return
	}
	whole := c.newLabel()
	c.add(asm.JNE.Imm(asm.R8, unix.IPPROTO_FRAGMENT, whole))
	c.load(true, 0, stackHeader, 8, short) // next header, reserved, offset << 3 | more, identification
	c.add(
		asm.LoadMem(asm.R8, asm.RFP, stackHeader, asm.Byte),
		asm.Add.Imm(asm.R7, 8),
		asm.LoadMem(asm.R2, asm.RFP, stackHeader+2, asm.Half),
		asm.And.Imm(asm.R2, big(0xfff8)),
		asm.JNE.Imm(asm.R2, 0, fragment),
	)
	c.label(whole)
}

// lookUp finds the socket of the namespace that a packet with these addresses and ports is for; R0 is 0 where there is none.
func (c *code) lookUp(f *family, function asm.BuiltinFunc, tuple int16) {
	const currentNamespace = -1 // BPF_F_CURRENT_NETNS
	c.add(
		asm.Mov.Reg(asm.R1, asm.R6),
		asm.Mov.Reg(asm.R2, asm.RFP),
		asm.Add.Imm(asm.R2, int32(tuple)),
		asm.Mov.Imm(asm.R3, 2*int32(f.size)+4),
		asm.Mov.Imm(asm.R4, currentNamespace),
		asm.Mov.Imm(asm.R5, 0),
		function.Call(),
	)
}

func (c *code) release() { c.add(asm.Mov.Reg(asm.R1, asm.R0), asm.FnSkRelease.Call()) }

// leaveToSockets goes to namespace if a socket there is for the TCP segment or UDP datagram at stackPair. Of other protocols it goes to other.
func (c *code) leaveToSockets(f *family, namespace, other string) {
	udp, owned, free := c.newLabel(), c.newLabel(), c.newLabel()
	c.add(asm.JEq.Imm(asm.R8, unix.IPPROTO_UDP, udp), asm.JNE.Imm(asm.R8, unix.IPPROTO_TCP, other))
	c.lookUp(f, asm.FnSkcLookupTcp, stackPair)
	c.add(asm.JNE.Imm(asm.R0, 0, owned), asm.Ja.Label(free))
	c.label(owned)
	c.release()
	c.add(asm.Ja.Label(namespace))
	c.label(udp)
	c.lookUp(f, asm.FnSkLookupUdp, stackPair)
	c.add(asm.JEq.Imm(asm.R0, 0, free))
	c.release()
	c.add(asm.Ja.Label(namespace))
	c.label(free)
}

// rewrite gives the packet the addresses at stackNew and the link-layer addresses, and corrects its checksums. A fragment that is not the first has
// no transport header; then transport is false.
func (c *code) rewrite(f *family, transport bool, destination, source [6]byte) {
	size := 2 * int32(f.size)
	c.add(
		asm.Mov.Reg(asm.R1, asm.RFP),
		asm.Add.Imm(asm.R1, stackPair),
		asm.Mov.Imm(asm.R2, size),
		asm.Mov.Reg(asm.R3, asm.RFP),
		asm.Add.Imm(asm.R3, stackNew),
		asm.Mov.Imm(asm.R4, size),
		asm.Mov.Imm(asm.R5, 0),
		asm.FnCsumDiff.Call(),
		asm.Mov.Reg(asm.R9, asm.R0),
	)
	if transport {
		const pseudo, zeroIsNone = 0x10, 0x20 // BPF_F_PSEUDO_HDR, BPF_F_MARK_MANGLED_0
		udp, sum := c.newLabel(), c.newLabel()
		c.add(
			asm.JEq.Imm(asm.R8, unix.IPPROTO_UDP, udp),
			asm.Mov.Imm(asm.R2, tcpChecksum),
			asm.Mov.Imm(asm.R5, pseudo),
			asm.Ja.Label(sum),
		)
		c.label(udp)
		c.add(asm.Mov.Imm(asm.R2, udpChecksum), asm.Mov.Imm(asm.R5, pseudo|zeroIsNone))
		c.label(sum)
		c.add(
			asm.Mov.Reg(asm.R1, asm.R6),
			asm.Add.Reg(asm.R2, asm.R7),
			asm.Mov.Imm(asm.R3, 0),
			asm.Mov.Reg(asm.R4, asm.R9),
			asm.FnL4CsumReplace.Call(),
		)
	}
	if f == &ip4 {
		c.add(
			asm.Mov.Reg(asm.R1, asm.R6),
			asm.Mov.Imm(asm.R2, etherHeader+ip4Checksum),
			asm.Mov.Imm(asm.R3, 0),
			asm.Mov.Reg(asm.R4, asm.R9),
			asm.Mov.Imm(asm.R5, 0),
			asm.FnL3CsumReplace.Call(),
		)
	}
	c.store(stackNew, etherHeader+f.addresses, size)
	macs := append(destination[:], source[:]...)
	for i := 0; i < len(macs); i += 4 {
		c.add(asm.StoreImm(asm.RFP, stackHeader+int16(i), int64(int32(binary.NativeEndian.Uint32(macs[i:]))), asm.Word))
	}
	c.store(stackHeader, 0, int32(len(macs)))
}

// putDatagramKey writes the map's key to the stack: the address that both sides have, the port in the namespace, the guest's port.
func (c *code) putDatagramKey(f *family, address, inside, guests int16) {
	for i := int16(0); i < datagramKeySize; i += 4 {
		c.add(asm.StoreImm(asm.RFP, stackKey+i, 0, asm.Word))
	}
	c.copy(stackKey, address, f.size)
	for i, at := range []int16{inside, guests} {
		c.add(asm.LoadMem(asm.R2, asm.RFP, at, asm.Half), asm.StoreMem(asm.RFP, stackKey+16+2*int16(i), asm.R2, asm.Half))
	}
}

// fromNetwork is the program for what arrives at the pod's interface. It goes to the namespace where a socket there is for it, else to the guest.
// What concerns the link, and errors about packets that either may have sent, go to both.
func (s *sharing) fromNetwork() asm.Instructions {
	c := begin()
	c.load(false, 0, stackHeader, 4, "guest")
	c.add(
		asm.LoadMem(asm.R9, asm.RFP, stackHeader, asm.Byte),
		asm.And.Imm(asm.R9, 1), // sent to many
	)
	c.byFamily("guest")
	c.add(asm.JEq.Imm(asm.R2, big(unix.ETH_P_ARP), "both"), asm.Ja.Label("guest"))
	for _, f := range []*family{&ip4, &ip6} {
		c.label(f.name)
		c.pair(f, "guest")
		// Nobody outside is the namespace, nor has a way to the guest's loopback addresses, which it lets the namespace have.
		c.refuseInner(f, stackPair)
		c.refuseInner(f, stackPair+f.size)
		c.add(asm.JNE.Imm(asm.R9, 0, "both"))
		// A datagram whose first fragment is not there is thrown away without a word, so both may have the others.
		c.header(f, "guest", "both", false)
		c.load(true, 0, stackPair+2*f.size, 4, "guest")
		s.keepOnLink(c, f)
		c.leaveToSockets(f, "namespace", "other"+f.name)
		c.add(asm.Ja.Label("guest"))
		c.label("other" + f.name)
		c.add(
			asm.JNE.Imm(asm.R8, f.icmp, "guest"),
			asm.LoadMem(asm.R2, asm.RFP, stackPair+2*f.size, asm.Byte),
			asm.JEq.Imm(asm.R2, f.echo, "guest"),
			asm.Ja.Label("both"),
		)
	}
	c.label("both")
	c.add(
		asm.Mov.Reg(asm.R1, asm.R6),
		asm.Mov.Imm(asm.R2, int32(s.tap)),
		asm.Mov.Imm(asm.R3, 0),
		asm.FnCloneRedirect.Call(),
	)
	c.label("namespace")
	c.exit(verdictNamespace)
	c.label("guest")
	c.redirect(s.tap, 0)
	c.label("drop")
	c.exit(verdictDrop)
	return c.Instructions
}

// keepOnLink drops what would open a connection, or is a datagram, to a port that is for the interface's own networks, and comes from elsewhere.
func (s *sharing) keepOnLink(c *code, f *family) {
	if len(s.onLink) == 0 {
		return
	}
	kept, source, pass := c.newLabel(), c.newLabel(), c.newLabel()
	known := c.newLabel()
	c.add(asm.JEq.Imm(asm.R8, unix.IPPROTO_TCP, known), asm.JEq.Imm(asm.R8, unix.IPPROTO_UDP, known))
	if f == &ip6 { // what is behind further headers is not seen
		c.add(asm.JNE.Imm(asm.R8, f.icmp, source))
	}
	c.add(asm.Ja.Label(pass))
	c.label(known)
	c.add(asm.LoadMem(asm.R2, asm.RFP, stackPair+2*f.size+2, asm.Half))
	for _, p := range s.onLink {
		c.add(asm.JEq.Imm(asm.R2, big(p), kept))
	}
	c.add(asm.Ja.Label(pass))
	c.label(kept)
	c.add(asm.JEq.Imm(asm.R8, unix.IPPROTO_UDP, source))
	c.load(true, tcpFlags, stackHeader, 1, "drop")
	c.add(
		asm.LoadMem(asm.R2, asm.RFP, stackHeader, asm.Byte),
		asm.And.Imm(asm.R2, 0x12), // SYN, ACK
		asm.JNE.Imm(asm.R2, 0x02, pass),
	)
	c.label(source)
	for _, n := range s.networks {
		if n.Addr().BitLen() != 8*int(f.size) {
			continue
		}
		next := c.newLabel()
		mask := net.CIDRMask(n.Bits(), n.Addr().BitLen())
		for i, w := range words(n.Masked().Addr()) {
			c.add(
				asm.LoadMem(asm.R2, asm.RFP, stackPair+int16(4*i), asm.Word),
				asm.And.Imm(asm.R2, int32(binary.NativeEndian.Uint32(mask[4*i:]))),
				asm.JNE.Imm32(asm.R2, w, next),
			)
		}
		c.add(asm.Ja.Label(pass))
		c.label(next)
	}
	c.add(asm.Ja.Label("drop"))
	c.label(pass)
}

// refuseInner goes to drop if the address on the stack is one of those that only the namespace and the guest know.
func (c *code) refuseInner(f *family, at int16) {
	inner := []netip.Addr{loop6, namespace6, namespaceLoop6}
	if f == &ip4 {
		c.add(asm.LoadMem(asm.R2, asm.RFP, at, asm.Byte), asm.JEq.Imm(asm.R2, 127, "drop"))
		inner = []netip.Addr{namespace4, namespaceLoop4}
	}
	for _, a := range inner {
		c.jumpIf(at, a, "drop")
	}
}

// fromNamespace is the program for what the namespace's processes send to the namespace's own addresses. Where no socket there is for it, the guest
// gets it, from an address that the guest can answer.
func (s *sharing) fromNamespace() asm.Instructions {
	c := begin()
	c.byFamily("namespace")
	c.label("namespace")
	c.exit(verdictNamespace)
	for _, f := range []*family{&ip4, &ip6} {
		source, destination := int16(stackPair), int16(stackPair)+f.size
		c.label(f.name)
		ways := s.ways(f)
		if len(ways) == 0 {
			c.add(asm.Ja.Label("namespace"))
			continue
		}
		c.pair(f, "namespace")
		c.header(f, "namespace", "namespace", true)
		send := "send" + f.name
		for _, w := range ways {
			next := c.newLabel()
			c.jumpUnless(source, w.inside, next)
			c.jumpUnless(destination, w.inside, next)
			c.put(stackNew, w.namespace)
			c.put(stackNew+f.size, w.guest)
			c.add(asm.Ja.Label(send))
			c.label(next)
		}
		c.add(asm.Ja.Label("namespace"))
		c.label(send)
		ports := stackPair + 2*f.size
		c.load(true, 0, ports, 4, "namespace")
		c.leaveToSockets(f, "namespace", "namespace")
		remembered := c.newLabel()
		c.add(asm.JNE.Imm(asm.R8, unix.IPPROTO_UDP, remembered))
		c.putDatagramKey(f, destination, ports, ports+2)
		c.add(
			asm.FnKtimeGetNs.Call(),
			asm.StoreMem(asm.RFP, stackValue, asm.R0, asm.DWord),
			asm.LoadMapPtr(asm.R1, s.datagrams),
			asm.Mov.Reg(asm.R2, asm.RFP),
			asm.Add.Imm(asm.R2, stackKey),
			asm.Mov.Reg(asm.R3, asm.RFP),
			asm.Add.Imm(asm.R3, stackValue),
			asm.Mov.Imm(asm.R4, 0), // BPF_ANY
			asm.FnMapUpdateElem.Call(),
		)
		c.label(remembered)
		c.rewrite(f, true, s.mac, namespaceMAC)
		c.redirect(s.tap, 0)
	}
	return c.Instructions
}

// fromGuest is the program for what the guest sends. To the namespace's processes it may send answers, and open connections to upstreams; all else
// leaves by the pod's interface.
func (s *sharing) fromGuest() asm.Instructions {
	c := begin()
	c.byFamily("out")
	c.label("out")
	c.redirect(s.pod, 0)
	c.label("drop")
	c.exit(verdictDrop)
	for _, f := range []*family{&ip4, &ip6} {
		source, destination := int16(stackPair), int16(stackPair)+f.size
		inject, later, inward := "inject"+f.name, "later"+f.name, "inward"+f.name
		c.label(f.name)
		c.pair(f, "out")
		ways := s.ways(f)
		for _, w := range ways {
			next := c.newLabel()
			c.jumpUnless(source, w.guest, next)
			c.jumpUnless(destination, w.namespace, next)
			c.put(stackNew, w.inside)
			c.put(stackNew+f.size, w.inside)
			c.add(asm.Ja.Label(inward))
			c.label(next)
		}
		c.refuseInner(f, source)
		c.refuseInner(f, destination)
		c.add(asm.Ja.Label("out"))
		if len(ways) == 0 {
			continue
		}

		c.label(inward)
		c.header(f, "drop", later, false)
		ports := stackNew + 2*f.size
		c.load(true, 0, ports, 4, "drop")
		udp, upstream := "udp"+f.name, "upstream"+f.name
		c.add(asm.JEq.Imm(asm.R8, unix.IPPROTO_UDP, udp), asm.JNE.Imm(asm.R8, unix.IPPROTO_TCP, "drop"))

		// TCP: a new connection is one to an upstream or none.
		c.load(true, tcpFlags, stackHeader, 1, "drop")
		c.add(
			asm.LoadMem(asm.R2, asm.RFP, stackHeader, asm.Byte),
			asm.And.Imm(asm.R2, 0x12), // SYN, ACK
			asm.JEq.Imm(asm.R2, 0x02, upstream),
		)
		c.lookUp(f, asm.FnSkcLookupTcp, stackNew)
		c.add(
			asm.JEq.Imm(asm.R0, 0, inject), // the namespace will say that there is no such connection
			asm.LoadMem(asm.R9, asm.R0, sockState, asm.Word),
		)
		c.release()
		c.add(asm.JEq.Imm(asm.R9, tcpListen, upstream)) // the last step of opening one, where the namespace uses cookies
		// A connection between two of the namespace's processes is not the guest's to speak on: the other end has a socket there as well.
		c.add(
			asm.LoadMem(asm.R2, asm.RFP, ports, asm.Half),
			asm.LoadMem(asm.R3, asm.RFP, ports+2, asm.Half),
			asm.StoreMem(asm.RFP, ports, asm.R3, asm.Half),
			asm.StoreMem(asm.RFP, ports+2, asm.R2, asm.Half),
		)
		c.lookUp(f, asm.FnSkcLookupTcp, stackNew)
		c.add(asm.JEq.Imm(asm.R0, 0, inject), asm.LoadMem(asm.R9, asm.R0, sockState, asm.Word))
		c.release()
		c.add(asm.JEq.Imm(asm.R9, tcpListen, inject), asm.Ja.Label("drop"))

		c.label(upstream)
		if f == &ip4 && len(s.upstreams) > 0 {
			c.jumpUnless(stackNew, loop4, "drop")
			c.add(asm.LoadMem(asm.R2, asm.RFP, ports+2, asm.Half))
			for _, p := range s.upstreams {
				c.add(asm.JEq.Imm(asm.R2, big(p), inject))
			}
		}
		c.add(asm.Ja.Label("drop"))

		c.label(udp)
		c.putDatagramKey(f, stackNew, ports+2, ports)
		c.add(
			asm.LoadMapPtr(asm.R1, s.datagrams),
			asm.Mov.Reg(asm.R2, asm.RFP),
			asm.Add.Imm(asm.R2, stackKey),
			asm.FnMapLookupElem.Call(),
			asm.JEq.Imm(asm.R0, 0, "drop"),
			asm.LoadMem(asm.R9, asm.R0, 0, asm.DWord),
			asm.FnKtimeGetNs.Call(),
			asm.Sub.Reg(asm.R0, asm.R9),
			asm.LoadImm(asm.R2, datagramAnswer, asm.DWord),
			asm.JGT.Reg(asm.R0, asm.R2, "drop"),
		)
		c.label(inject)
		c.rewrite(f, true, [6]byte{}, [6]byte{}) // the loopback interface's
		c.redirect(s.lo, unix.BPF_F_INGRESS)
		c.label(later)
		c.add(asm.JNE.Imm(asm.R8, unix.IPPROTO_UDP, "drop")) // TCP has no need of fragments
		c.rewrite(f, false, [6]byte{}, [6]byte{})
		c.redirect(s.lo, unix.BPF_F_INGRESS)
	}
	return c.Instructions
}
