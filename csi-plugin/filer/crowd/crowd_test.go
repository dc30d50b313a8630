package crowd

import (
	"net/netip"
	"testing"
	"testing/synctest"
	"time"
)

func TestCrowd(t *testing.T) {
	c := Crowd{Most: 3, MostOfOne: 2, Idle: time.Hour}
	a, b := netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("fd00::1")
	ended := map[int]bool{}
	guests := map[int]*Guest{}
	for i, step := range []struct {
		client netip.Addr
		known  bool
		ends   int // who has to go; -1 for nobody
		none   bool
	}{
		0: {client: a, known: true, ends: -1},
		1: {client: a, ends: -1},
		2: {client: a, ends: 1},                         // as of that address there are too many, and 0 is known
		3: {client: b, ends: -1},                        // of another one there are not
		4: {client: b, ends: 2},                         // but of all: whoever is the longest stranger
		5: {client: b, ends: 3, known: true},            // of b again
		6: {client: b, ends: 4, known: true},            // likewise
		7: {client: b, ends: -1, none: true},            // all are known
		8: {client: netip.Addr{}, ends: -1, none: true}, // and here as well
	} {
		g := c.Admit(step.client, func() { ended[i] = true })
		if (g == nil) != step.none {
			t.Fatalf("%d: %v is admitted: %t", i, step.client, g != nil)
		}
		if guests[i] = g; g != nil && step.known {
			g.Know()
			g.Know()
		}
		if step.ends >= 0 {
			if !ended[step.ends] {
				t.Errorf("%d: %d has not been ended, but %v", i, step.ends, ended)
			}
			guests[step.ends].Leave() // as it does once it has ended
		}
		delete(ended, step.ends)
		if len(ended) > 0 {
			t.Fatalf("%d: ended are %v, and not %d alone", i, ended, step.ends)
		}
	}
	if c.all != 3 || len(c.of) != 2 || c.strangers.Len() != 0 || c.known.Len() != 3 {
		t.Errorf("there are %d of %v, with %d strangers", c.all, c.of, c.strangers.Len())
	}
	guests[5].Leave()
	guests[5].Leave()
	if guests[9] = c.Admit(b, nil); guests[9] == nil {
		t.Error("nobody is admitted after one has left")
	}
	for _, i := range []int{0, 6, 9} {
		guests[i].Leave()
	}
	guests[9].Know() // late
	if c.all != 0 || len(c.of) != 0 || c.strangers.Len() != 0 || c.known.Len() != 0 {
		t.Errorf("nobody is there any more, and there are %d of %v, with %d strangers", c.all, c.of, c.strangers.Len())
	}
}

// Where all are known, who has been idle for longest goes, if that is for long: neither one with a call at work, nor one that had a call since, nor one for another of an
// address that has too many itself.
func TestCrowdIdle(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := Crowd{Most: 4, MostOfOne: 3, Idle: time.Minute}
		a, b := netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("fd00::1")
		ended := map[int]bool{}
		var guests []*Guest
		admit := func(client netip.Addr) bool {
			g := c.Admit(client, func() { ended[len(guests)] = true })
			if g == nil {
				return false
			}
			g.Know()
			guests = append(guests, g)
			return true
		}
		of := func(i int, client netip.Addr) {
			t.Helper()
			if g := c.Admit(client, func() { ended[i] = true }); g == nil {
				t.Fatalf("%d is not admitted", i)
			} else {
				g.Know()
				guests = append(guests, g)
			}
			time.Sleep(time.Second)
		}
		for i, client := range []netip.Addr{a, a, a, b} {
			of(i, client)
		}
		if admit(b) {
			t.Fatal("one is admitted where nobody has been idle for long")
		}
		guests[0].Begin()
		guests[1].Begin()
		guests[1].End()
		time.Sleep(58 * time.Second) // 2 has been idle for a minute
		guests[1].Begin()
		guests[1].Begin()
		guests[1].End()
		if admit(a) {
			t.Error("one more is admitted of an address that has too many")
		}
		of(4, b)
		if !ended[2] || len(ended) != 1 {
			t.Fatalf("ended are %v", ended)
		}
		guests[2].Leave()
		of(5, b)
		if !ended[3] || len(ended) != 2 {
			t.Fatalf("ended are %v", ended)
		}
		if admit(a) {
			t.Error("one is admitted where two are at work, and two have just come")
		}
		guests[1].End()
		time.Sleep(57 * time.Second)
		if admit(a) {
			t.Error("one is admitted where nobody has been idle for long")
		}
		time.Sleep(time.Second) // 4 has been idle for a minute
		of(6, a)
		if !ended[4] || len(ended) != 3 {
			t.Fatalf("ended are %v", ended)
		}
		if c.all != 4 || c.known.Len() != 4 {
			t.Errorf("there are %d, of whom %d are known", c.all, c.known.Len())
		}
	})
}
