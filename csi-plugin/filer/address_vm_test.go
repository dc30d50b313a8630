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
		pair := func(host string) (net.Conn, net.Conn) {
			client, err := (&net.Dialer{LocalAddr: from}).Dial("tcp", net.JoinHostPort(host, port))
			for end := time.Now().Add(time.Minute); errors.Is(err, unix.ENETUNREACH) && time.Now().Before(end); { // its route comes a moment after the address
				time.Sleep(time.Millisecond)
				client, err = (&net.Dialer{LocalAddr: from}).Dial("tcp", net.JoinHostPort(host, port))
			}
			if err != nil {
				t.Fatal(err)
			}
			server, err := l.Accept()
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { errors.Join(client.Close(), server.Close()) })
			return client, server
		}
		connect := func(host string) net.Conn { client, _ := pair(host); return client }
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
		// What the process has closed is not left to answer clients that come from the same port later on: neither where they have closed it as well, nor where they have not.
		left := func() int { return len(a.connections(closed)) }
		for _, both := range []bool{true, false} {
			for what, end := range map[string]func() error{"removed": a.remove, "added": a.add} {
				if err := a.add(); err != nil {
					t.Fatal(err)
				}
				client, server := pair(a.prefix.Addr().String())
				if err := server.Close(); err != nil {
					t.Fatal(err)
				}
				if both {
					if err := client.Close(); err != nil {
						t.Fatal(err)
					}
				}
				if left() == 0 {
					t.Fatalf("%s: a connection that was closed is not there any more", a)
				}
				if err := end(); err != nil {
					t.Fatal(err)
				}
				if n := left(); n > 0 {
					t.Errorf("%s is %s: %d connections are left of those that were closed (by the client, too: %t)", a, what, n, both)
				}
			}
		}
	}
}
