package crowd

import (
	"net/netip"
	"testing"
)

func TestCrowd(t *testing.T) {
	c := Crowd{Most: 3, MostOfOne: 2}
	a, b := netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("fd00::1")
	for i, step := range []struct {
		client netip.Addr
		want   bool
	}{{a, true}, {a, true}, {a, false}, {b, true}, {b, false}} {
		if got := c.Admit(step.client); got != step.want {
			t.Errorf("%d: %v is admitted: %t", i, step.client, got)
		}
	}
	c.Leave(a)
	if c.Admit(b); c.all != 3 || len(c.of) != 2 {
		t.Errorf("there are %d of %v", c.all, c.of)
	}
	for _, client := range []netip.Addr{a, b, b} {
		c.Leave(client)
	}
	if c.all != 0 || len(c.of) != 0 {
		t.Errorf("nobody is there any more, and there are %d of %v", c.all, c.of)
	}
}
