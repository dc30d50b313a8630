// Package crowd counts clients' connections by address: nobody takes them all.
package crowd

import (
	"net/netip"
	"sync"
)

// A Crowd is those that there are.
type Crowd struct {
	Most, MostOfOne int // of all, and of one address

	mu  sync.Mutex
	all int
	of  map[netip.Addr]int
}

// Admit counts one more, unless there are too many.
func (c *Crowd) Admit(client netip.Addr) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.all >= c.Most || c.of[client] >= c.MostOfOne {
		return false
	}
	if c.of == nil {
		c.of = map[netip.Addr]int{}
	}
	c.all++
	c.of[client]++
	return true
}

// Leave is the reverse.
func (c *Crowd) Leave(client netip.Addr) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.all--
	if c.of[client]--; c.of[client] == 0 {
		delete(c.of, client)
	}
}
