// Package lease is the right to serve for some time: what a server asks before it begins a call, and again before it answers. It knows neither where the
// right comes from nor what is served, and imports nothing of ours.
package lease

import (
	"context"
	"errors"
	"sync"
	"time"
)

// ErrEnded is what nobody can begin any more under.
var ErrEnded = errors.New("another filer serves")

// A Lease holds until a moment that Extend moves on. One that has lapsed holds again once it is extended; one that has ended never does. The nil Lease holds
// for ever. It begins paused.
type Lease struct {
	now func() time.Duration

	mu      sync.Mutex
	until   time.Duration
	paused  bool
	ended   bool
	working int
	changed chan struct{} // closed when one of these is another; nil while nobody waits for that
}

// New returns a lease that does not hold yet.
func New() *Lease { return &Lease{now: Now, paused: true} }

// Forever is a moment that does not come.
const Forever = time.Duration(1<<63 - 1)

// change does f and wakes those that wait for it.
func (l *Lease) change(f func()) {
	l.mu.Lock()
	defer l.mu.Unlock()
	f()
	if l.changed != nil {
		close(l.changed)
		l.changed = nil
	}
}

// next is closed at the next change. The lock is held.
func (l *Lease) next() <-chan struct{} {
	if l.changed == nil {
		l.changed = make(chan struct{})
	}
	return l.changed
}

// Extend lets the lease hold until a moment, as Now counts, if that is later than what it had.
func (l *Lease) Extend(until time.Duration) { l.change(func() { l.until = max(l.until, until) }) }

// Open lets calls begin, Pause has them wait. What has begun goes on.
func (l *Lease) Open()  { l.change(func() { l.paused = false }) }
func (l *Lease) Pause() { l.change(func() { l.paused = true }) }

// Lapse has the lease hold no longer, and calls wait: nothing is answered before the end.
func (l *Lease) Lapse() { l.change(func() { l.until, l.paused = 0, true }) }

// End ends the lease for good: who waits in Begin gets ErrEnded.
func (l *Lease) End() { l.change(func() { l.ended = true }) }

func (l *Lease) holds() bool { return !l.ended && (l.until == Forever || l.now() < l.until) }

// Holds says whether what was done may be answered. It is asked once that is on stable storage: nobody else can have served meanwhile then.
func (l *Lease) Holds() bool {
	if l == nil {
		return true
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.holds()
}

// Begin waits until a call may begin, which lasts until end is called.
func (l *Lease) Begin(ctx context.Context) (end func(), err error) {
	if l == nil {
		return func() {}, nil
	}
	for {
		l.mu.Lock()
		switch {
		case l.ended:
			l.mu.Unlock()
			return nil, ErrEnded
		case l.begin():
			l.mu.Unlock()
			return l.finish, nil
		}
		changed := l.next()
		l.mu.Unlock()
		select {
		case <-changed:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}

// TryBegin is Begin for a call that does not wait.
func (l *Lease) TryBegin() (end func(), begun bool) {
	if l == nil {
		return func() {}, true
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.finish, l.begin()
}

// begin counts a call that may begin now. The lock is held.
func (l *Lease) begin() bool {
	if l.paused || !l.holds() {
		return false
	}
	l.working++
	return true
}

// Work is Begin for what prepares or ends the serving itself: it does not wait.
func (l *Lease) Work() (end func()) {
	l.change(func() { l.working++ })
	return l.finish
}

func (l *Lease) finish() { l.change(func() { l.working-- }) }

// Lapsed says whether the lease does not hold, and that nothing is being done which had begun while it did.
func (l *Lease) Lapsed() (lapsed, idle bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return !l.holds(), l.working == 0
}

// Idle waits until no call is at work. Calls that wait in Begin are not.
func (l *Lease) Idle(ctx context.Context) error {
	for {
		l.mu.Lock()
		if l.working == 0 {
			l.mu.Unlock()
			return nil
		}
		changed := l.next()
		l.mu.Unlock()
		select {
		case <-changed:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}
