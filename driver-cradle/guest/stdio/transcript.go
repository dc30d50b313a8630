package stdio

import "context"

// A Mark is a place between two pieces of a container's output; the zero Mark is where it was when this guest opened the log.
type Mark struct {
	Segment uint64
	Offset  int64
}

// Transcript gives what the container has put out after a mark, piece by piece as it was read from the container, and then what comes, over
// restarts until ended is closed. A piece that has been given comes with the mark behind it, where a later Transcript goes on. The
// container waits for a reader that would otherwise miss what is rotated away; what was rotated away while nobody read is left out. idle is
// called before waiting: the time to flush a buffer.
func (o *IO) Transcript(ctx context.Context, after Mark, ended <-chan struct{}, give func(Stream, Mark, []byte) error, idle func() error) error {
	c := o.log.transcript(place{after.Segment, after.Offset})
	if c == nil {
		return idle()
	}
	defer c.close()
	for ctx.Err() == nil {
		over := isClosed(ended)
		r, p, ok := c.next()
		switch {
		case ok && r.end:
		case ok:
			if err := give(r.stream, Mark{p.seq, p.off + r.size()}, r.payload); err != nil {
				return err
			}
		case over:
			return idle()
		default:
			changed, _ := c.changes(0)
			if changed == nil {
				continue
			}
			if err := idle(); err != nil {
				return err
			}
			select {
			case <-changed:
			case <-ended:
			case <-ctx.Done():
			}
		}
	}
	return context.Cause(ctx)
}

// transcript pins a cursor at p, the zero place being where this guest has opened the log: what was before has had its own host. A place that is not in
// the log is taken for its beginning. A log that was closed has none: its host has taken everything before it had the guest shut down.
func (l *log) transcript(p place) *cursor {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.segments) == 0 {
		return nil
	}
	if p == (place{}) {
		p = l.opened
	}
	c := (*cursor)(nil)
	for _, s := range l.segments {
		if s.seq == p.seq && p.off >= 0 && p.off <= s.size {
			c = l.newCursor(s, p.off)
		}
	}
	if c == nil {
		first := l.segments[0]
		for _, s := range l.segments {
			if s.seq > p.seq {
				first = s
				break
			}
		}
		c = l.newCursor(first, 0)
	}
	l.pinned[c] = struct{}{}
	return c
}
