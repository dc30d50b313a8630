package stdio

import (
	"context"
	"io"
	"sync"
)

// attachment is a client's way through the log.
type attachment struct {
	c        *cursor
	stream   bool
	from     place // what is before was there when the client came
	run      int
	restarts <-chan struct{}
}

func (l *log) attach(o AttachOptions) *attachment {
	l.mu.Lock()
	defer l.mu.Unlock()
	a := &attachment{stream: o.Stream, from: l.end(), run: l.awaited(), restarts: o.Restarts}
	if o.Logs {
		a.c = l.newCursor(l.segmentAt(o.Since), 0)
	} else {
		a.c = l.newCursor(l.segments[len(l.segments)-1], -1)
	}
	if o.Stream {
		l.pinned[a.c] = struct{}{}
	}
	return a
}

func (a *attachment) release() { a.c.close() }

func (a *attachment) copyTo(ctx context.Context, o AttachOptions) error {
	for ctx.Err() == nil {
		over := isClosed(a.restarts)
		r, p, ok := a.c.next()
		switch {
		case ok && !a.stream && !p.before(a.from):
			return nil
		case ok && r.end:
			if a.restarts == nil && !p.before(a.from) {
				return nil
			}
		case ok:
			w := o.Stdout
			if r.stream == Stderr {
				w = o.Stderr
			}
			if w != nil && (o.Since.IsZero() || r.time >= o.Since.UnixNano()) {
				if _, err := w.Write(r.payload); err != nil {
					return err
				}
			}
		case !a.stream || over:
			return nil
		default:
			changed, ended := a.c.changes(a.run)
			if changed == nil {
				continue
			}
			if ended && a.restarts == nil {
				return nil
			}
			select {
			case <-changed:
			case <-a.restarts:
			case <-ctx.Done():
			}
		}
	}
	return context.Cause(ctx)
}

func isClosed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

// relay hands the output of an unlogged process to its one client.
type relay struct {
	mu       sync.Mutex // held while the client is written to
	arrived  *sync.Cond
	expected bool // a client is about to come
	out, err io.Writer
	failed   chan struct{} // closed when writing to the client has failed
	ended    chan struct{}
}

func newRelay() *relay {
	r := &relay{failed: make(chan struct{}), ended: make(chan struct{})}
	r.arrived = sync.NewCond(&r.mu)
	return r
}

func (r *relay) endRun() { close(r.ended) }

func (r *relay) write(stream Stream, p []byte) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for r.expected {
		r.arrived.Wait()
	}
	w := r.out
	if stream == Stderr {
		w = r.err
	}
	if w == nil {
		return
	}
	if _, err := w.Write(p); err != nil {
		r.out, r.err = nil, nil
		close(r.failed)
	}
}

func (r *relay) attach() *relay {
	r.set(true, nil, nil)
	return r
}

// release waits for a write that is under way: what it was given is not touched any more.
func (r *relay) release() { r.set(false, nil, nil) }

func (r *relay) set(expected bool, out, err io.Writer) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.expected, r.out, r.err = expected, out, err
	r.arrived.Broadcast()
}

func (r *relay) copyTo(ctx context.Context, o AttachOptions) error {
	r.set(false, o.Stdout, o.Stderr)
	select {
	case <-r.ended:
		return nil
	case <-r.failed:
		return io.ErrClosedPipe
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}
