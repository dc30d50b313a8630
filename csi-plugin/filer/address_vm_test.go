//go:build vm

package main

import (
	"errors"
	"net"
	"net/netip"
	"runtime"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// TestRootFloatingReset: who has a connection to the address hears of its end when that is taken away, though the process at its other end closes nothing. Others go on.
func TestRootFloatingReset(t *testing.T) {
	runtime.LockOSThread() // which ends with the test, and its namespace
	if _, err := netns.New(); err != nil {
		t.Fatal(err)
	}
	lo, err := netlink.LinkByName("lo")
	if err == nil {
		err = netlink.LinkSetUp(lo)
	}
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range []*floating{{netip.MustParsePrefix("10.77.0.9/24"), "lo"}, {netip.MustParsePrefix("fd00::9/64"), "lo"}} {
		if err := a.add(); err != nil {
			t.Fatal(err)
		}
		l, err := net.Listen("tcp", ":0") // of both families
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		_, port, _ := net.SplitHostPort(l.Addr().String())
		from := &net.TCPAddr{IP: net.IPv6loopback}
		if a.prefix.Addr().Is4() {
			from.IP = net.IPv4(127, 0, 0, 1)
		}
		connect := func(host string) net.Conn {
			client, err := (&net.Dialer{LocalAddr: from}).Dial("tcp", net.JoinHostPort(host, port))
			if err != nil {
				t.Fatal(err)
			}
			server, err := l.Accept()
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { errors.Join(client.Close(), server.Close()) })
			return client
		}
		its, other := connect(a.prefix.Addr().String()), connect(from.IP.String())
		if err := a.remove(); err != nil {
			t.Fatal(err)
		}
		its.SetReadDeadline(time.Now().Add(10 * time.Second))
		if _, err := its.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNRESET) {
			t.Errorf("%s: the client hears %v", a, err)
		}
		if _, err := other.Write([]byte("x")); err != nil {
			t.Errorf("%s: a connection to another address: %v", a, err)
		}
	}
}
