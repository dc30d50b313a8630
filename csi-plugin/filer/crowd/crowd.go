// Package crowd counts clients' connections by address: nobody takes them all, and who has not shown that he may be here, or does nothing, keeps nobody out.
package crowd

import (
	"container/list"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"
)

// A Crowd is those that there are.
type Crowd struct {
	Most, MostOfOne int           // of all, and of one address
	Idle            time.Duration // after which without a call one that is known may go where there are too many of all

	mu        sync.Mutex
	began     time.Time
	look      time.Duration // before which, after began, none has been idle for so long
	all       int
	of        map[netip.Addr]int
	strangers list.List // of *Guest, the longest first
	known     list.List // of *Guest
}

// A Guest is a connection.
type Guest struct {
	crowd  *Crowd
	client netip.Addr
	end    func()

	calls atomic.Int64 // at work
	since atomic.Int64 // when, after the crowd's began, the last one has ended
	known atomic.Bool
	place *list.Element // among the strangers, or the known; nil of one that has gone
	gone  bool
}

// Admit counts one more. Where there are too many, the stranger that has been here longest goes, by its end; after the strangers, of all, the one that has been idle for
// longest. nil is that there is neither.
func (c *Crowd) Admit(client netip.Addr, end func()) *Guest {
	c.mu.Lock()
	if c.began.IsZero() {
		c.began = time.Now()
	}
	var goes *Guest
	if c.all >= c.Most || c.of[client] >= c.MostOfOne {
		for e := c.strangers.Front(); e != nil && goes == nil; e = e.Next() {
			if g := e.Value.(*Guest); c.of[client] < c.MostOfOne || g.client == client {
				goes = g
			}
		}
		if goes == nil && c.of[client] < c.MostOfOne {
			goes = c.idlest()
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
	g.since.Store(int64(time.Since(c.began)))
	g.place = c.strangers.PushBack(g)
	c.mu.Unlock()
	if goes != nil {
		goes.end()
	}
	return g
}

// idlest is who has been idle for longest, if that is for long. The crowd is locked. However often it is asked, it looks at them once in that time where it finds nobody.
func (c *Crowd) idlest() (idlest *Guest) {
	now := time.Since(c.began)
	if now < c.look {
		return nil
	}
	next, least := now+c.Idle, now-c.Idle
	for e := c.known.Front(); e != nil; e = e.Next() {
		g := e.Value.(*Guest)
		if g.calls.Load() > 0 {
			continue
		}
		since := time.Duration(g.since.Load())
		next = min(next, since+c.Idle)
		if since <= least {
			idlest, least = g, since
		}
	}
	if idlest == nil {
		c.look = next
	}
	return idlest
}

// Begin says that a call of its is at work until End.
func (g *Guest) Begin() { g.calls.Add(1) }

// End is the reverse of Begin.
func (g *Guest) End() {
	g.since.Store(int64(time.Since(g.crowd.began)))
	g.calls.Add(-1)
}

// Know says that it has shown something that only those have who may be here.
func (g *Guest) Know() {
	if g.known.Swap(true) {
		return
	}
	g.crowd.mu.Lock()
	defer g.crowd.mu.Unlock()
	if !g.gone {
		g.unlist()
		g.place = g.crowd.known.PushBack(g)
	}
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
		g.crowd.strangers.Remove(g.place) // which does nothing to one of the other list
		g.crowd.known.Remove(g.place)
		g.place = nil
	}
}
