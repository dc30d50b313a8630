// Package turns has a few of many things done at a time, of which some may never come to an end. It imports nothing of the product.
package turns

import (
	"context"
	"sync"
	"time"
)

// Turns are given to few at a time. One in which nothing happens for long is taken for stuck, and counts apart from then on: it keeps nobody waiting, until too many are. None of its fields changes
// after the first turn.
type Turns struct {
	AtOnce   int           // turns that are given at the same time
	Apart    int           // turns that may be stuck besides
	Patience time.Duration // after which one is, unless it says that it goes on

	once  sync.Once
	free  chan struct{}
	apart chan struct{}
	work  sync.WaitGroup
}

// Go waits for a turn, and has do done with it. It says false where ctx ends before. do calls goesOn as it does, should it last.
func (t *Turns) Go(ctx context.Context, do func(goesOn func())) bool {
	t.once.Do(func() {
		t.free, t.apart = make(chan struct{}, t.AtOnce), make(chan struct{}, t.Apart)
	})
	if ctx.Err() != nil {
		return false
	}
	select {
	case t.free <- struct{}{}:
	case <-ctx.Done():
		return false
	}
	t.work.Go(func() { t.turn(do) })
	return true
}

// Wait waits for the end of all turns.
func (t *Turns) Wait() { t.work.Wait() }

func (t *Turns) turn(do func(goesOn func())) {
	var mu sync.Mutex
	at := t.free // what the turn has a place of; nil when it is over
	var watch *time.Timer
	mu.Lock()
	watch = time.AfterFunc(t.Patience, func() {
		mu.Lock()
		defer mu.Unlock()
		if at != t.free {
			return
		}
		select {
		case t.apart <- struct{}{}:
			<-t.free
			at = t.apart
		default: // others are stuck; one of them may come to its end
			watch.Reset(t.Patience)
		}
	})
	mu.Unlock()
	do(func() {
		mu.Lock()
		defer mu.Unlock()
		if at == t.free {
			watch.Reset(t.Patience)
		}
	})
	watch.Stop()
	mu.Lock()
	defer mu.Unlock()
	<-at
	at = nil
}
