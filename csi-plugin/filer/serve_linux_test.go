package main

import (
	"net"
	"testing"
)

func TestFirstAddress(t *testing.T) {
	lo, eth0, eth1 := net.Interface{Name: "lo", Flags: net.FlagLoopback}, net.Interface{Name: "eth0"}, net.Interface{Name: "eth1"}
	has := map[string][]string{"lo": {"127.0.0.1/8", "10.9.9.9/32"}, "eth0": {"fe80::1/64", "169.254.1.1/16", "2001:db8::1/64"}, "eth1": {"192.0.2.1/24", "192.0.2.2/24"}}
	addresses := func(i *net.Interface) (out []net.Addr, _ error) {
		for _, text := range has[i.Name] {
			ip, n, err := net.ParseCIDR(text)
			if err != nil {
				return nil, err
			}
			out = append(out, &net.IPNet{IP: ip, Mask: n.Mask})
		}
		return out, nil
	}
	for want, all := range map[string][]net.Interface{"192.0.2.1": {lo, eth0, eth1}, "10.9.9.9": {lo, eth0}, "<nil>": {eth0}} {
		if got, err := firstAddress(all, addresses); got.String() != want || (err == nil) != (want != "<nil>") {
			t.Errorf("of %v it is %v, %v, and should be %s", all, got, err, want)
		}
	}
}
