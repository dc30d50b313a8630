package lease

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"
)

// newFrozen returns an open lease whose time is what the test says.
func newFrozen() (*Lease, *time.Duration) {
	l, now := New(), new(time.Duration)
	l.now = func() time.Duration { return *now }
	l.Open()
	return l, now
}

// TestHolds: a process that was frozen finds its lease lapsed, however long that took, and holding again only once it was extended from then on.
func TestHolds(t *testing.T) {
	l, now := newFrozen()
	if l.Holds() {
		t.Error("it holds before it was extended")
	}
	l.Extend(10)
	*now = 9
	if !l.Holds() {
		t.Error("it does not hold")
	}
	for _, later := range []time.Duration{10, 11, time.Hour} { // thawed
		*now = later
		if l.Holds() {
			t.Errorf("at %d it holds", later)
		}
	}
	l.Extend(5) // a reply to what was asked before the freeze
	if l.Holds() {
		t.Error("what was asked long ago extends it")
	}
	l.Extend(*now + 1)
	if !l.Holds() {
		t.Error("it does not hold again")
	}
	l.End()
	l.Extend(Forever - 1)
	if l.Holds() {
		t.Error("it holds after its end")
	}
	var none *Lease
	if end, err := none.Begin(t.Context()); err != nil || !none.Holds() {
		t.Errorf("the nil lease: %v", err)
	} else {
		end()
	}
}

// TestBegin: calls wait while the lease has lapsed or is paused, and fail after its end.
func TestBegin(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l, now := newFrozen()
		begun := make(chan error, 1)
		begin := func(ctx context.Context) {
			go func() {
				end, err := l.Begin(ctx)
				if err == nil {
					defer end()
				}
				begun <- err
			}()
			synctest.Wait()
		}
		waits := func(what string) {
			t.Helper()
			synctest.Wait()
			select {
			case err := <-begun:
				t.Fatalf("%s: a call has begun: %v", what, err)
			default:
			}
		}
		goesOn := func(want error) {
			t.Helper()
			synctest.Wait()
			select {
			case err := <-begun:
				if !errors.Is(err, want) {
					t.Errorf("%v, not %v", err, want)
				}
			default:
				t.Fatal("a call waits")
			}
		}
		begin(t.Context())
		waits("not extended")
		l.Extend(10)
		goesOn(nil)
		*now = 10
		begin(t.Context())
		waits("lapsed")
		*now = 1000
		l.Extend(20)
		waits("extended until what has passed")
		l.Extend(1001)
		goesOn(nil)
		l.Pause()
		begin(t.Context())
		waits("paused")
		if !l.Holds() {
			t.Error("what has begun can't be answered")
		}
		l.Lapse()
		l.Extend(1002)
		waits("lapsed and paused")
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		l.End()
		goesOn(ErrEnded)
		begin(ctx)
		goesOn(ErrEnded)
	})
}

// TestIdle: the end waits for what has begun.
func TestIdle(t *testing.T) {
	l, now := newFrozen()
	l.Extend(10)
	end, err := l.Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	work := l.Work()
	*now = 10
	if lapsed, idle := l.Lapsed(); !lapsed || idle {
		t.Errorf("lapsed %t, idle %t", lapsed, idle)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	end()
	if err := l.Idle(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("while there is work: %v", err)
	}
	work()
	if err := l.Idle(t.Context()); err != nil {
		t.Error(err)
	}
	if lapsed, idle := l.Lapsed(); !lapsed || !idle {
		t.Errorf("lapsed %t, idle %t", lapsed, idle)
	}
}

// TestNow: the clock goes on, and not back.
func TestNow(t *testing.T) {
	a, b := Now(), Now()
	if a <= 0 || b < a || b >= Forever {
		t.Errorf("%d, then %d", a, b)
	}
}
