package guest

import (
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cradlestack/cradlestack/driver-cradle/wire"
)

// resolverAddress is docker's for the resolver that containers of a network ask.
var resolverAddress = netip.MustParseAddr("127.0.0.11")

const (
	dnsPort         = 53
	resolverQueries = 256             // at once; more have to wait
	upstreamTimeout = 4 * time.Second // clients ask again after 5
	maxDatagram     = 512             // of an answer of ours (RFC 1035 §2.3.4)
	idleQuery       = 10 * time.Second
)

// A resolver answers for names in a file that the host writes, and asks DNS for others. It listens at a port that nobody else wants: programs send
// containers there who ask port 53, which so stays free for a container that is a DNS server itself.
type resolver struct {
	file    string
	servers []string
	port    uint16
	packets *net.UDPConn
	streams *net.TCPListener
	slots   chan struct{}
}

func openResolver(file string, servers []string) (*resolver, error) {
	r := &resolver{file: file, servers: servers, slots: make(chan struct{}, resolverQueries)}
	var err error
	for range 10 { // the port has to be free for both
		if r.packets, err = net.ListenUDP("udp4", net.UDPAddrFromAddrPort(netip.AddrPortFrom(resolverAddress, 0))); err != nil {
			break
		}
		at := r.packets.LocalAddr().(*net.UDPAddr).AddrPort()
		if r.streams, err = net.ListenTCP("tcp4", net.TCPAddrFromAddrPort(at)); err == nil {
			r.port = at.Port()
			return r, nil
		}
		r.packets.Close()
	}
	return nil, fmt.Errorf("listen at %v for questions about names: %w", resolverAddress, err)
}

// serve answers as long as the guest runs.
func (r *resolver) serve() {
	go r.serveStreams()
	buf := make([]byte, 64<<10)
	for {
		n, from, err := r.packets.ReadFromUDPAddrPort(buf)
		if err != nil {
			return
		}
		query := append([]byte(nil), buf[:n]...)
		r.slots <- struct{}{}
		go func() {
			defer func() { <-r.slots }()
			answer := r.answer(query, false)
			if answer != nil {
				_, _ = r.packets.WriteToUDPAddrPort(answer, from)
			}
		}()
	}
}

func (r *resolver) serveStreams() {
	for {
		conn, err := r.streams.AcceptTCP()
		if err != nil {
			return
		}
		r.slots <- struct{}{}
		go func() {
			defer func() { <-r.slots }()
			defer conn.Close()
			for {
				_ = conn.SetDeadline(time.Now().Add(idleQuery))
				query, err := readStream(conn)
				if err != nil {
					return
				}
				answer := r.answer(query, true)
				if answer == nil || writeStream(conn, answer) != nil {
					return
				}
			}
		}()
	}
}

// answer answers one question, as long as a stream or a datagram may be.
func (r *resolver) answer(query []byte, stream bool) []byte {
	// Nobody tells when the host has written the file anew. It is small, and its reading as quick as a question to anybody else.
	file, err := os.ReadFile(r.file)
	if err == nil {
		if answer := parseNames(file).answer(query); answer != nil {
			if len(answer) > maxDatagram && !stream {
				return truncated(answer)
			}
			return answer
		}
	}
	for _, server := range r.servers {
		if answer, err := ask(server, query, stream); err == nil {
			return answer
		}
	}
	return failure(query)
}

// ask passes a question on as it is.
func ask(server string, query []byte, stream bool) ([]byte, error) {
	network := "udp"
	if stream {
		network = "tcp"
	}
	conn, err := net.DialTimeout(network, net.JoinHostPort(server, fmt.Sprint(dnsPort)), upstreamTimeout)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(upstreamTimeout))
	if stream {
		if err := writeStream(conn, query); err != nil {
			return nil, err
		}
		return readStream(conn)
	}
	if _, err := conn.Write(query); err != nil {
		return nil, err
	}
	buf := make([]byte, 64<<10)
	n, err := conn.Read(buf)
	return buf[:n], err
}

// Over TCP, each message follows its length (RFC 1035 §4.2.2).
func readStream(r io.Reader) ([]byte, error) {
	var length [2]byte
	if _, err := io.ReadFull(r, length[:]); err != nil {
		return nil, err
	}
	message := make([]byte, binary.BigEndian.Uint16(length[:]))
	_, err := io.ReadFull(r, message)
	return message, err
}

func writeStream(w io.Writer, message []byte) error {
	_, err := w.Write(append(binary.BigEndian.AppendUint16(nil, uint16(len(message))), message...))
	return err
}

// resolverCases send those to the resolver's port who ask 127.0.0.11 at port 53, and have its answers come from there.
func resolverCases(port uint16) sockAddrCases {
	ask := []sockAddrCase{{append(isAddress(addrIP4, resolverAddress), isPort(dnsPort)), setPort(port)}}
	told := []sockAddrCase{{append(isAddress(addrIP4, resolverAddress), isPort(port)), setPort(dnsPort)}}
	return sockAddrCases{
		unix.BPF_CGROUP_INET4_CONNECT:     ask,
		unix.BPF_CGROUP_UDP4_SENDMSG:      ask,
		unix.BPF_CGROUP_UDP4_RECVMSG:      told,
		unix.BPF_CGROUP_INET4_GETPEERNAME: told,
	}
}

// dns is what containers have in resolv.conf.
func (p *Pod) dns() wire.DNS {
	d := p.launch.DNS
	if p.launch.Launch.Network.Names != "" {
		d.Servers, d.Options = []string{resolverAddress.String()}, append([]string{"ndots:0"}, d.Options...)
	}
	return d
}
