package guest

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/cradlestack/cradlestack/spec"
)

// A crew is the containers of a pod as their lifecycle sees them: who waits for whom, who starts again, whose end ends the pod.
type crew struct {
	mu      sync.Mutex
	changed chan struct{} // closed and made anew at every change
	units   []*unit

	stopping bool          // nothing starts any more
	over     chan struct{} // closed when the pod's end is decided: the others are to be stopped
	ended    chan struct{} // closed when the last unit has ended after that
	decided  bool
	code     int    // of the unit whose end decided
	reason   string // why it could not start
}

// A unit is one container. What is below run is guarded by the crew's mutex.
type unit struct {
	name string
	rule spec.Lifecycle
	// guest units end with the pod and do not keep it from ending.
	guest bool
	// run is one start to its end. It calls crew.up as soon as the command runs. ctx ends when the unit is to stop before that.
	run func(ctx context.Context) outcome

	active     bool // a goroutine supervises it
	begun      bool // has run at least once
	running    bool
	healthy    bool
	restarting bool // waiting for its delay, or about to run again
	halt       bool // stopped by hand: does not start again by itself
	again      bool // starts again at once, whatever the rule says
	released   bool // is not held any more
	starts     int  // counts for MaxStarts
	restarts   int  // by rule
	delay      time.Duration
	last       outcome
}

// An outcome is how a start ended.
type outcome struct {
	code   int
	reason string // why the command could not be started; "" if it was
}

// exitDependency is the exit code of a container that could never start because of another one: docker's for its own failures.
const exitDependency = 125

func newCrew() *crew {
	return &crew{changed: make(chan struct{}), over: make(chan struct{}), ended: make(chan struct{})}
}

// change tells everyone who waits; the mutex is held.
func (c *crew) change() {
	close(c.changed)
	c.changed = make(chan struct{})
}

// begin starts the life of all units.
func (c *crew) begin() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, u := range c.units {
		u.active = true
	}
	for _, u := range c.units {
		go c.supervise(u, true)
	}
}

// supervise runs a unit until it has ended for good.
func (c *crew) supervise(u *unit, after bool) {
	if after {
		if reason := c.await(u); reason != "" {
			c.finish(u, outcome{exitDependency, reason})
			return
		}
	}
	for {
		c.mu.Lock()
		if c.stopping || u.halt {
			last := u.last
			c.mu.Unlock()
			c.finish(u, last)
			return
		}
		u.starts++
		c.mu.Unlock()

		begin := time.Now()
		o := u.run(context.Background())

		c.mu.Lock()
		u.running, u.healthy, u.last = false, false, o
		delay, again := c.next(u, o, time.Since(begin))
		u.restarting = again
		c.change()
		c.mu.Unlock()
		if !again {
			c.finish(u, o)
			return
		}
		c.sleep(u, delay)
	}
}

// docker's back-off, moby daemon/restartmanager.
const (
	firstDelay = 100 * time.Millisecond
	lastDelay  = time.Minute
	steadyRun  = 10 * time.Second // a start that lasted as long begins the back-off anew
)

// next says whether and when a unit starts again; the mutex is held.
func (c *crew) next(u *unit, o outcome, ran time.Duration) (delay time.Duration, again bool) {
	rule := u.rule
	switch {
	case !c.goesOn(u, o):
		return 0, false
	case u.again:
		u.again, u.halt = false, false
		return 0, true
	}
	u.restarts++
	if rule.RestartDelay > 0 {
		return time.Duration(rule.RestartDelay), true
	}
	if u.delay == 0 || ran >= steadyRun {
		u.delay = firstDelay
	} else {
		u.delay = min(2*u.delay, lastDelay)
	}
	return u.delay, true
}

// goesOn says whether a unit starts again that has ended so; the mutex is held.
func (c *crew) goesOn(u *unit, o outcome) bool {
	rule := u.rule
	switch {
	case c.stopping:
		return false
	case u.again:
		return true
	case u.halt, o.reason != "", rule.MaxStarts > 0 && u.starts >= rule.MaxStarts:
		return false
	case o.code == 0:
		return rule.RestartOnSuccess
	}
	return rule.RestartOnFailure
}

// sleep waits for a unit's delay, or until something about it was decided meanwhile.
func (c *crew) sleep(u *unit, delay time.Duration) {
	timer := time.NewTimer(delay)
	defer timer.Stop()
	for {
		c.mu.Lock()
		wake, changed := c.stopping || u.halt || u.again, c.changed
		c.mu.Unlock()
		if wake {
			break
		}
		select {
		case <-changed:
			continue
		case <-timer.C:
		}
		break
	}
	c.mu.Lock()
	u.again = false
	c.mu.Unlock()
}

// await waits for what the unit's rule names, and for its release. It gives the reason when what it names can never come.
func (c *crew) await(u *unit) (reason string) {
	hold := time.NewTimer(time.Duration(u.rule.Hold))
	defer hold.Stop()
	for {
		c.mu.Lock()
		wait := u.held()
		for _, a := range u.rule.After {
			met, never := c.met(a)
			if never != "" {
				c.mu.Unlock()
				return never
			}
			wait = wait || !met
		}
		stop, changed := c.stopping || u.halt, c.changed
		c.mu.Unlock()
		if stop || !wait {
			return ""
		}
		select {
		case <-changed:
		case <-hold.C:
			c.mu.Lock()
			u.released = true
			c.mu.Unlock()
		}
	}
}

// held says whether a unit waits for somebody to ask for its start; the mutex is held.
func (u *unit) held() bool { return u.rule.Hold > 0 && !u.released && !u.begun }

// met says whether a condition holds, or why it never will; the mutex is held.
func (c *crew) met(a spec.After) (met bool, never string) {
	for _, d := range c.units {
		if d.name != a.Container {
			continue
		}
		switch a.Until {
		case "", "started":
			met = d.begun
		case "healthy":
			met = d.healthy
		case "exited":
			met = !d.active && d.begun && d.last.code == 0 && d.last.reason == ""
		default:
			return false, fmt.Sprintf("waits for %s until %q, which is none of started, healthy, exited", a.Container, a.Until)
		}
		if !met && !d.active {
			return false, fmt.Sprintf("waits for %s, which ended with %d before it came that far", a.Container, d.last.code)
		}
		return met, ""
	}
	return false, fmt.Sprintf("waits for %s, which is not in the pod", a.Container)
}

// finish ends a unit for good and decides the pod's end.
func (c *crew) finish(u *unit, o outcome) {
	c.mu.Lock()
	defer c.mu.Unlock()
	u.active, u.running, u.restarting, u.last = false, false, false, o
	critical, active, own := false, false, false
	for _, other := range c.units {
		critical = critical || other.rule.Critical && !other.guest
		active = active || other.active
		own = own || other.active && !other.guest
	}
	if !c.decided && !u.guest && (u.rule.Critical || !critical && !own) {
		c.decided, c.code, c.reason = true, o.code, o.reason
		c.stop()
	}
	if c.stopping && !active {
		close(c.ended)
	}
	c.change()
}

// stop ends the pod: nothing starts any more, and whoever runs is to be stopped. The mutex is held.
func (c *crew) stop() {
	if !c.stopping {
		c.stopping = true
		close(c.over)
		c.change()
	}
}

// up says that the unit's command runs.
func (c *crew) up(u *unit) {
	u.running, u.begun, u.restarting, u.again = true, true, false, false
	c.change()
}

// add makes a unit one of the crew, held until it is released; false where the pod ends.
func (c *crew) add(u *unit) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.stopping {
		return false
	}
	u.active = true
	c.units = append(c.units, u)
	c.change()
	go c.supervise(u, true)
	return true
}

// rearm holds a unit anew that has ended for good; false where the pod ends. The mutex is held.
func (c *crew) rearm(u *unit) bool {
	if c.stopping {
		return false
	}
	u.active, u.begun, u.released, u.halt, u.again, u.starts, u.delay, u.last = true, false, false, false, false, 0, 0, outcome{}
	c.change()
	go c.supervise(u, true)
	return true
}

// remove takes a unit that has ended out of the crew.
func (c *crew) remove(u *unit) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.units = slices.DeleteFunc(c.units, func(other *unit) bool { return other == u })
	c.change()
}

// revive starts a unit that has ended for good. The mutex is held.
func (c *crew) revive(u *unit) {
	u.active, u.halt, u.again, u.starts, u.delay = true, false, false, 0, 0
	go c.supervise(u, false)
}
