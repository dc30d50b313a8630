// Package crowd counts clients' connections by address: nobody takes them all, and who has not shown that he may be here keeps nobody out.
package crowd

import (
	"container/list"
	"net/netip"
	"sync"
	"sync/atomic"
)

// A Crowd is those that there are.
type Crowd struct {
	Most, MostOfOne int // of all, and of one address

	mu        sync.Mutex
	all       int
	of        map[netip.Addr]int
	strangers list.List // of *Guest, the longest first
}

// A Guest is a connection.
type Guest struct {
	crowd  *Crowd
	client netip.Addr
	end    func()

	known atomic.Bool
	place *list.Element // among the strangers; nil of one that is known, or has gone
	gone  bool
}

// Admit counts one more. Where there are too many, the stranger that has been here longest goes, by its end; nil is that all of them are known.
func (c *Crowd) Admit(client netip.Addr, end func()) *Guest {
	c.mu.Lock()
	var goes *Guest
	if c.all >= c.Most || c.of[client] >= c.MostOfOne {
		for e := c.strangers.Front(); e != nil && goes == nil; e = e.Next() {
			if g := e.Value.(*Guest); c.of[client] < c.MostOfOne || g.client == client {
				goes = g
			}
		}
		if goes == nil {
			c.mu.Unlock()
			return nil
		}
		goes.leave()
	}
	if c.of == nil {
		c.of = map[netip.Addr]int{}
	}
	c.all++
	c.of[client]++
	g := &Guest{crowd: c, client: client, end: end}
	g.place = c.strangers.PushBack(g)
	c.mu.Unlock()
	if goes != nil {
		goes.end()
	}
	return g
}

// Know says that it has shown something that only those have who may be here.
func (g *Guest) Know() {
	if g.known.Swap(true) {
		return
	}
	g.crowd.mu.Lock()
	defer g.crowd.mu.Unlock()
	g.unlist()
}

// Leave is the reverse of Admit.
func (g *Guest) Leave() {
	g.crowd.mu.Lock()
	defer g.crowd.mu.Unlock()
	g.leave()
}

// leave takes it out of the count. The crowd is locked.
func (g *Guest) leave() {
	if g.gone {
		return
	}
	g.gone = true
	c := g.crowd
	c.all--
	if c.of[g.client]--; c.of[g.client] == 0 {
		delete(c.of, g.client)
	}
	g.unlist()
}

func (g *Guest) unlist() {
	if g.place != nil {
		g.crowd.strangers.Remove(g.place)
		g.place = nil
	}
}
