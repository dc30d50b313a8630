package guest

import (
	"sync"
	"time"
)

// An Event is what docker's GET /events tells about a container.
type Event struct {
	Type       string // container
	Action     string // create, start, die, stop, kill, restart, pause, unpause, oom, health_status: healthy, exec_start: …
	ID         string // of the container
	Attributes map[string]string
	Time       time.Time
}

const (
	eventHistory = 256 // events kept for Subscribe's past
	eventBacklog = 256 // events a subscriber may lag behind before it is dropped
)

// A bus keeps the last events and passes new ones on. A subscriber that does not keep up is cut off: its channel is closed.
type bus struct {
	mu   sync.Mutex
	past []Event
	subs map[chan Event]struct{}
}

func (b *bus) emit(e Event) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if len(b.past) == eventHistory {
		b.past = append(b.past[:0], b.past[1:]...)
	}
	b.past = append(b.past, e)
	for ch := range b.subs {
		select {
		case ch <- e:
		default:
			delete(b.subs, ch)
			close(ch)
		}
	}
}

func (b *bus) subscribe(since time.Time) (past []Event, live <-chan Event, cancel func()) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if !since.IsZero() {
		for _, e := range b.past {
			if !e.Time.Before(since) {
				past = append(past, e)
			}
		}
	}
	ch := make(chan Event, eventBacklog)
	if b.subs == nil {
		b.subs = make(map[chan Event]struct{})
	}
	b.subs[ch] = struct{}{}
	return past, ch, func() {
		b.mu.Lock()
		defer b.mu.Unlock()
		if _, ok := b.subs[ch]; ok {
			delete(b.subs, ch)
			close(ch)
		}
	}
}
