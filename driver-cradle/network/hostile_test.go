//go:build vm

package network

import (
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// A packet is one that somebody sends who keeps to no rule. Its number is found again where it arrives.
type packet struct {
	name     string
	from, to netip.AddrPort
	protocol byte
	flags    byte   // of TCP
	fragment uint16 // of IPv4: flags and offset
	arrives  bool
}

const (
	syn, rst, ack = 0x02, 0x04, 0x10

	tcp, udp, icmp = unix.IPPROTO_TCP, unix.IPPROTO_UDP, unix.IPPROTO_ICMP
)

func at(s string) netip.AddrPort { return netip.MustParseAddrPort(s) }

// frame is the packet as one of Ethernet. Nobody checks the sum of TCP or UDP that a guest says is right.
func (p *packet) frame(number int, destination, source []byte) []byte {
	transport := make([]byte, 20)
	binary.BigEndian.PutUint16(transport, p.from.Port())
	binary.BigEndian.PutUint16(transport[2:], p.to.Port())
	switch p.protocol {
	case tcp:
		transport[12], transport[13] = 5<<4, p.flags
	case udp:
		binary.BigEndian.PutUint16(transport[4:], uint16(len(transport)))
	case icmp:
		transport[0], transport[1] = 8, 0 // an echo request
		binary.BigEndian.PutUint16(transport[2:], ^uint16(8<<8))
	}
	frame := append(append([]byte{}, destination...), source...)
	if p.from.Addr().Is6() {
		header := make([]byte, 40)
		binary.BigEndian.PutUint32(header, 6<<28|uint32(number))
		binary.BigEndian.PutUint16(header[4:], uint16(len(transport)))
		header[6], header[7] = p.protocol, 64
		copy(header[8:], p.from.Addr().AsSlice())
		copy(header[24:], p.to.Addr().AsSlice())
		return append(append(append(frame, 0x86, 0xdd), header...), transport...)
	}
	header := make([]byte, 20)
	header[0], header[8], header[9] = 4<<4|5, 64, p.protocol
	binary.BigEndian.PutUint16(header[2:], uint16(len(header)+len(transport)))
	binary.BigEndian.PutUint16(header[4:], uint16(number))
	binary.BigEndian.PutUint16(header[6:], p.fragment)
	copy(header[12:], p.from.Addr().AsSlice())
	copy(header[16:], p.to.Addr().AsSlice())
	var sum uint32
	for i := 0; i < len(header); i += 2 {
		sum += uint32(binary.BigEndian.Uint16(header[i:]))
	}
	binary.BigEndian.PutUint16(header[10:], ^uint16(sum+sum>>16))
	return append(append(append(frame, 0x08, 0x00), header...), transport...)
}

// numberOf is what frame was told.
func numberOf(frame []byte) int {
	if len(frame) < 34 {
		return -1
	}
	if binary.BigEndian.Uint16(frame[12:]) == unix.ETH_P_IPV6 {
		return int(binary.BigEndian.Uint32(frame[14:]) & 0xfffff)
	}
	return int(binary.BigEndian.Uint16(frame[18:]))
}

// rawSocket sends and receives whole frames at an interface. It hears only what comes in.
func rawSocket(name string) (*os.File, error) {
	link, err := netlink.LinkByName(name)
	if err != nil {
		return nil, err
	}
	all := binary.NativeEndian.Uint16([]byte{0, unix.ETH_P_ALL})
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, int(all))
	if err == nil {
		err = errors.Join(
			unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: all, Ifindex: link.Attrs().Index}), unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_IGNORE_OUTGOING, 1),
			unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 16<<20), // nothing is lost where nobody reads for a while
		)
	}
	return os.NewFile(uintptr(fd), name), err
}

const first = 1000 // number of a packet

// send writes the packets in a random order and the last one last, and checks which of them arrive. When the last one is there, so are those that should
// not be: of those that should, one may come later, as it was written on another processor.
func send(t *testing.T, packets []packet, write func(number int, p *packet) error, read func([]byte) (int, error)) {
	t.Helper()
	for _, i := range append(rand.Perm(len(packets)-1), len(packets)-1) {
		if err := write(first+i, &packets[i]); err != nil {
			t.Fatalf("%s: %v", packets[i].name, err)
		}
	}
	arrived, awaited := map[int]bool{}, map[int]bool{}
	for i, p := range packets {
		if p.arrives {
			awaited[i] = true
		}
	}
	for buf := make([]byte, 70<<10); len(awaited) > 0; {
		n, err := read(buf)
		if err != nil {
			t.Error(err)
			break
		}
		i := numberOf(buf[:n]) - first
		arrived[i] = true
		delete(awaited, i)
	}
	for i, p := range packets {
		if arrived[i] != p.arrives {
			t.Errorf("%s: %v to %v arrives: %v", p.name, p.from, p.to, arrived[i])
		}
	}
}

// What a guest sends gets to the namespace's sockets only where they have asked for it, or the launch has named them.
func TestRootHostileGuest(t *testing.T) {
	l := newLab(t)
	tap, _ := l.take(7777)
	defer tap.Close()
	listen := func(network, address string) netip.AddrPort {
		t.Helper()
		var port netip.AddrPort
		l.in(l.pod, func() error {
			if network == "udp" {
				c, err := net.ListenPacket(network, address)
				if err == nil {
					t.Cleanup(func() { c.Close() })
					port = c.LocalAddr().(*net.UDPAddr).AddrPort()
				}
				return err
			}
			s, err := net.Listen(network, address)
			if err == nil {
				t.Cleanup(func() { s.Close() })
				port = s.Addr().(*net.TCPAddr).AddrPort()
			}
			return err
		})
		return port
	}
	listen("tcp", "127.0.0.1:7777")
	listen("tcp", "10.88.0.5:7777")
	listen("tcp", "127.0.0.1:7778")
	listen("tcp", "[::]:7779")
	listen("udp", "127.0.0.1:7777")
	listen("udp", "[fd88::5]:7777")
	// A connection within the namespace, and one to the guest that is not answered yet.
	inner, err := l.dial("tcp", l.pod, "127.0.0.1:7777")
	if err != nil {
		t.Fatal(err)
	}
	defer inner.Close()
	client := inner.LocalAddr().(*net.TCPAddr).AddrPort()
	var calling int
	l.in(l.pod, func() (err error) {
		if calling, err = unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0); err != nil {
			return err
		}
		if err = unix.Bind(calling, &unix.SockaddrInet4{Port: 40000}); err == nil {
			if err = unix.Connect(calling, &unix.SockaddrInet4{Port: 80, Addr: loop4.As4()}); errors.Is(err, unix.EINPROGRESS) {
				err = nil
			}
		}
		return err
	})
	defer unix.Close(calling)
	// A datagram to the guest, and another that is from and to the same ports but another address.
	var asked net.PacketConn
	l.in(l.pod, func() (err error) { asked, err = net.ListenPacket("udp", "127.0.0.1:40001"); return err })
	defer asked.Close()
	if _, err := asked.WriteTo([]byte("hello"), net.UDPAddrFromAddrPort(at("127.0.0.1:53"))); err != nil {
		t.Fatal(err)
	}
	var lo *os.File
	l.in(l.pod, func() (err error) { lo, err = rawSocket("lo"); return err })
	defer lo.Close()
	lo.SetReadDeadline(time.Now().Add(time.Minute))

	var header [10]byte // struct virtio_net_hdr
	header[0] = unix.VIRTIO_NET_HDR_F_DATA_VALID
	loopback, pod, loopback6, pod6 := "169.254.255.2", "169.254.255.1", "[fd5e:91d3:7c0a::2]", "[fd5e:91d3:7c0a::1]"
	packets := []packet{
		{"opens a connection to an upstream", at("127.0.0.1:50000"), at(loopback + ":7777"), tcp, syn, 0, true},
		{"ends what it may open", at("127.0.0.1:50000"), at(loopback + ":7777"), tcp, rst, 0, true},
		{"answers a connection", at("127.0.0.1:80"), at(loopback + ":40000"), tcp, syn | ack, 0, true},
		{"answers a connection that is not there any more", at("127.0.0.1:80"), at(loopback + ":40002"), tcp, ack, 0, true},
		{"answers a datagram", at("127.0.0.1:53"), at(loopback + ":40001"), udp, 0, 0, true},
		{"opens another", at("127.0.0.1:50000"), at(loopback + ":7778"), tcp, syn, 0, false},
		{"opens another that listens on all addresses", at("127.0.0.1:50000"), at(loopback + ":7779"), tcp, syn, 0, false},
		{"opens one where it is called from", at("127.0.0.1:80"), at(loopback + ":40000"), tcp, syn, 0, false},
		{"opens one by the pod's address", at("10.88.0.5:50000"), at(pod + ":7777"), tcp, syn, 0, false},
		{"opens one from an address of somebody else", at("10.88.0.1:50000"), at(loopback + ":7777"), tcp, syn, 0, false},
		{"opens one across", at("10.88.0.5:50000"), at(loopback + ":7777"), tcp, syn, 0, false},
		{"opens one across", at("127.0.0.1:50000"), at(pod + ":7777"), tcp, syn, 0, false},
		{"opens one by IPv6", at("[fd88::5]:50000"), at(loopback6 + ":7779"), tcp, syn, 0, false},
		{"opens one by IPv6", at("[fd88::5]:50000"), at(pod6 + ":7779"), tcp, syn, 0, false},
		{"pretends to have one", at("127.0.0.1:50000"), at(loopback + ":7778"), tcp, ack, 0, false},
		{"resets one that is not its own", at("127.0.0.1:7777"), at(netip.AddrPortFrom(netip.MustParseAddr(loopback), client.Port()).String()), tcp, rst, 0, false},
		{"speaks on one that is not its own", at(netip.AddrPortFrom(loop4, client.Port()).String()), at(loopback + ":7777"), tcp, ack, 0, false},
		{"sends a datagram", at("127.0.0.1:53"), at(loopback + ":7777"), udp, 0, 0, false},
		{"sends a datagram", at("[fd88::5]:53"), at(pod6 + ":7777"), udp, 0, 0, false},
		{"answers from another port", at("127.0.0.1:54"), at(loopback + ":40001"), udp, 0, 0, false},
		{"answers from another address", at("10.88.0.5:53"), at(pod + ":40001"), udp, 0, 0, false},
		{"asks for an echo", at("127.0.0.1:0"), at(loopback + ":0"), icmp, 0, 0, false},
		{"speaks another protocol", at("127.0.0.1:0"), at(loopback + ":7777"), unix.IPPROTO_SCTP, 0, 0, false},
		{"pretends to be the namespace", at(loopback + ":50000"), at("127.0.0.1:7777"), tcp, syn, 0, false},
		{"sends to the loopback address", at("10.88.0.5:50000"), at("127.0.0.1:7777"), tcp, syn, 0, false},
		{"sends to the loopback address", at("[fd88::5]:50000"), at("[::1]:7779"), tcp, syn, 0, false},
		{"at last", at("127.0.0.1:50001"), at(loopback + ":7777"), tcp, syn, 0, true},
	}
	send(t, packets, func(number int, p *packet) error {
		_, err := tap.Write(append(header[:], p.frame(number, []byte{2, 0, 0, 0, 0, 9}, []byte{2, 0, 0, 0, 0, 8})...))
		return err
	}, lo.Read)

	// Frames with something wrong in them: none opens what the guest may not.
	random := rand.New(rand.NewPCG(1, 2))
	last, mac := &packets[len(packets)-1], []byte{2, 0, 0, 0, 0, 9}
	allowed := map[netip.AddrPort]bool{at("127.0.0.1:7777"): true, at("127.0.0.1:40000"): true, at("127.0.0.1:40001"): true}
	lo.SetReadDeadline(time.Now().Add(5 * time.Minute))
	for round := range 200 {
		for range 100 {
			frame := packets[random.IntN(len(packets))].frame(1, mac, mac)
			for range 1 + random.IntN(3) {
				frame[12+random.IntN(len(frame)-12)] = byte(random.Uint32())
			}
			frame = frame[:len(frame)-random.IntN(2)*random.IntN(len(frame)-14)]
			if _, err := tap.Write(append(header[:], frame...)); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := tap.Write(append(header[:], last.frame(first+round, mac, mac)...)); err != nil {
			t.Fatal(err)
		}
		for buf := make([]byte, 70<<10); ; {
			n, err := lo.Read(buf)
			if err != nil {
				t.Fatal(err)
			}
			if n < 54 || binary.BigEndian.Uint16(buf[12:]) != unix.ETH_P_IP || buf[14] != 4<<4|5 || buf[23] != tcp {
				continue
			}
			to := netip.AddrPortFrom(netip.AddrFrom4([4]byte(buf[30:34])), binary.BigEndian.Uint16(buf[36:]))
			if buf[47]&(syn|ack) == syn && binary.BigEndian.Uint16(buf[20:])&0x1fff == 0 && !allowed[to] {
				t.Errorf("the guest opens a connection to %v: % x", to, buf[:n])
			}
			if numberOf(buf[:n]) == first+round {
				break
			}
		}
	}
	if _, err := inner.Write([]byte("still there")); err != nil {
		t.Errorf("the guest has ended a connection that is not its own: %v", err)
	}
}

// Nobody outside is taken for the namespace, and nobody reaches the guest's loopback address.
func TestRootHostileNetwork(t *testing.T) {
	l := newLab(t)
	tap, _ := l.take()
	defer tap.Close()
	var v0 *os.File
	l.in(l.host, func() (err error) { v0, err = rawSocket("v0"); return err })
	defer v0.Close()
	tap.SetReadDeadline(time.Now().Add(time.Minute))
	send(t, []packet{
		{"speaks to the guest", at("10.88.0.1:50000"), at("10.88.0.5:80"), tcp, syn, 0, true},
		{"speaks to the guest", at("[fd88::1]:50000"), at("[fd88::5]:80"), tcp, syn, 0, true},
		{"speaks to it in fragments", at("10.88.0.1:50000"), at("10.88.0.5:80"), udp, 0, 0x2000, true},
		{"speaks to it in fragments", at("10.88.0.1:50000"), at("10.88.0.5:80"), udp, 0, 0x0007, true},
		{"pretends to be the namespace", at("169.254.255.2:50000"), at("10.88.0.5:80"), tcp, syn, 0, false},
		{"pretends to be the namespace", at("169.254.255.1:50000"), at("10.88.0.5:80"), udp, 0, 0, false},
		{"pretends to be the namespace", at("169.254.255.1:50000"), at("10.88.0.5:80"), udp, 0, 0x0007, false},
		{"pretends to be the namespace", at("[fd5e:91d3:7c0a::1]:50000"), at("[fd88::5]:80"), tcp, syn, 0, false},
		{"pretends to be the namespace", at("[fd5e:91d3:7c0a::2]:50000"), at("[fd88::5]:80"), udp, 0, 0, false},
		{"pretends to be the guest", at("127.0.0.1:50000"), at("10.88.0.5:80"), udp, 0, 0, false},
		{"speaks to the loopback address", at("10.88.0.1:50000"), at("127.0.0.1:80"), tcp, syn, 0, false},
		{"speaks to the loopback address", at("10.88.0.1:50000"), at("127.9.9.9:80"), udp, 0, 0, false},
		{"speaks to the loopback address", at("[fd88::1]:50000"), at("[::1]:80"), tcp, syn, 0, false},
		{"speaks to the namespace", at("10.88.0.1:50000"), at("169.254.255.2:80"), tcp, syn, 0, false},
		{"at last", at("10.88.0.1:50001"), at("10.88.0.5:80"), tcp, syn, 0, true},
	}, func(number int, p *packet) error {
		_, err := v0.Write(p.frame(number, []byte{0x02, 0x42, 0x0a, 0x58, 0, 5}, []byte{2, 0, 0, 0, 0, 8}))
		return err
	}, func(buf []byte) (int, error) {
		n, err := tap.Read(buf)
		if err == nil {
			n = copy(buf, buf[10:n]) // behind struct virtio_net_hdr
		}
		return n, err
	})
}
