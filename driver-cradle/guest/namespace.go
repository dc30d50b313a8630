package guest

import (
	"encoding/binary"
	"net/netip"

	"golang.org/x/sys/unix"

	"github.com/cradlestack/cradlestack/driver-cradle/wire"
)

// Programs of type BPF_PROG_TYPE_CGROUP_SOCK_ADDR change the addresses that containers' processes name and are told. Those of a namespace hide the
// address by which the guest knows it: a process that connects to an upstream at 127.0.0.1 gets to the namespace's, and one that asks who has connected
// is told the address that it was called by, as if both were in one namespace. Those of the resolver are in resolver_linux.go.

// Offsets in struct bpf_sock_addr and struct bpf_sock (linux/bpf.h).
const (
	addrIP4    = 4
	addrIP6    = 8
	addrPort   = 24
	addrType   = 32
	addrSocket = 64
	sockIP4    = 24
	sockIP6    = 28
)

var (
	loopback4 = netip.AddrFrom4([4]byte{127, 0, 0, 1})
	loopback6 = netip.IPv6Loopback()
)

// words are an address as the kernel has it, in words of this machine.
func words(a netip.Addr) []int32 {
	var w []int32
	for b := a.AsSlice(); len(b) > 0; b = b[4:] {
		w = append(w, int32(binary.NativeEndian.Uint32(b)))
	}
	return w
}

// mapped is an IPv4 address as a socket of IPv6 has it.
func mapped(a netip.Addr) netip.Addr { return netip.AddrFrom16(a.As16()) }

// A sockAddrCase is what a program does if all fields of its context have these values.
type sockAddrCase struct {
	fields []sockAddrField
	do     []bpfInsn
}

type sockAddrField struct {
	offset int16
	value  int32
}

func isAddress(offset int16, a netip.Addr) []sockAddrField {
	var f []sockAddrField
	for i, w := range words(a) {
		f = append(f, sockAddrField{offset + int16(4*i), w})
	}
	return f
}

func isPort(port uint16) sockAddrField { return sockAddrField{addrPort, portWord(port)} }

// portWord is a port as the kernel has it.
func portWord(port uint16) int32 {
	return int32(binary.NativeEndian.Uint16([]byte{byte(port >> 8), byte(port)}))
}

// setPort replaces the port.
func setPort(port uint16) []bpfInsn {
	return []bpfInsn{{unix.BPF_ALU | unix.BPF_MOV, reg(2, 0), 0, portWord(port)}, {unix.BPF_STX | unix.BPF_MEM | unix.BPF_W, reg(1, 2), addrPort, 0}}
}

// setAddress replaces the address.
func setAddress(offset int16, a netip.Addr) []bpfInsn {
	var program []bpfInsn
	for i, w := range words(a) {
		program = append(program, bpfInsn{unix.BPF_ALU | unix.BPF_MOV, reg(2, 0), 0, w}, bpfInsn{unix.BPF_STX | unix.BPF_MEM | unix.BPF_W, reg(1, 2), offset + int16(4*i), 0})
	}
	return program
}

// setOwn replaces n words of the address by the socket's own.
func setOwn(offset, own int16, n int) []bpfInsn {
	program := []bpfInsn{{unix.BPF_LDX | unix.BPF_MEM | unix.BPF_DW, reg(3, 1), addrSocket, 0}}
	for i := range int16(n) {
		program = append(program, bpfInsn{unix.BPF_LDX | unix.BPF_MEM | unix.BPF_W, reg(2, 3), own + 4*i, 0}, bpfInsn{unix.BPF_STX | unix.BPF_MEM | unix.BPF_W, reg(1, 2), offset + 4*i, 0})
	}
	return program
}

// sockAddrProgram does what the first case that holds says, and lets the call go on.
func sockAddrProgram(cases []sockAddrCase) []bpfInsn {
	const differs32 = 0x06 | unix.BPF_JNE // BPF_JMP32
	end := []bpfInsn{{unix.BPF_ALU64 | unix.BPF_MOV, reg(0, 0), 0, 1}, {unix.BPF_JMP | unix.BPF_EXIT, 0, 0, 0}}
	var program []bpfInsn
	for _, c := range cases {
		rest := len(c.do) + len(end)
		for i, f := range c.fields {
			next := 2*(len(c.fields)-i-1) + rest
			program = append(program, bpfInsn{unix.BPF_LDX | unix.BPF_MEM | unix.BPF_W, reg(2, 1), f.offset, 0}, bpfInsn{differs32, reg(2, 0), int16(next), f.value})
		}
		program = append(append(program, c.do...), end...)
	}
	return append(program, end...)
}

// sockAddrCases are by attach type: a cgroup has one program of each.
type sockAddrCases map[uint32][]sockAddrCase

// attach attaches the programs to the cgroup of all containers.
func (all sockAddrCases) attach() error {
	for attach, cases := range all {
		if err := attachProgram(podCgroup, unix.BPF_PROG_TYPE_CGROUP_SOCK_ADDR, attach, sockAddrProgram(cases)); err != nil {
			return err
		}
	}
	return nil
}

func (all sockAddrCases) add(more sockAddrCases) {
	for attach, cases := range more {
		all[attach] = append(all[attach], cases...)
	}
}

// namespaceCases are those of a namespace that is shared with the host's processes.
func namespaceCases(n *wire.Namespace) sockAddrCases {
	var connect4, connect6 []sockAddrCase
	for _, port := range n.Upstreams {
		is := []sockAddrField{isPort(port), {addrType, unix.SOCK_STREAM}}
		connect4 = append(connect4, sockAddrCase{append(isAddress(addrIP4, loopback4), is...), setAddress(addrIP4, n.Loopback4)})
		connect6 = append(connect6, sockAddrCase{append(isAddress(addrIP6, mapped(loopback4)), is...), setAddress(addrIP6, mapped(n.Loopback4))})
	}
	var peer4, peer6 []sockAddrCase
	for _, a := range []netip.Addr{n.IP4, n.Loopback4} {
		peer4 = append(peer4, sockAddrCase{isAddress(addrIP4, a), setOwn(addrIP4, sockIP4, 1)})
		peer6 = append(peer6, sockAddrCase{isAddress(addrIP6, mapped(a)), setOwn(addrIP6+12, sockIP4, 1)})
	}
	if n.IP6.IsValid() {
		peer6 = append(peer6, sockAddrCase{isAddress(addrIP6, n.IP6), setOwn(addrIP6, sockIP6, 4)}, sockAddrCase{isAddress(addrIP6, n.Loopback6), setAddress(addrIP6, loopback6)})
	}
	return sockAddrCases{
		unix.BPF_CGROUP_INET4_CONNECT:     connect4,
		unix.BPF_CGROUP_INET6_CONNECT:     connect6,
		unix.BPF_CGROUP_INET4_GETPEERNAME: peer4,
		unix.BPF_CGROUP_INET6_GETPEERNAME: peer6,
	}
}
