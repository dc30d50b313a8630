package stdio

import (
	"cmp"
	"encoding/binary"
)

// recordTime is the time in a record's header.
func recordTime(header []byte) int64 { return int64(binary.LittleEndian.Uint64(header[8:])) }

// place is where a record begins.
type place struct {
	seq uint64
	off int64
}

func (p place) before(q place) bool {
	return cmp.Or(cmp.Compare(p.seq, q.seq), cmp.Compare(p.off, q.off)) < 0
}

// window is how much of a file a cursor reads at a time.
const window = 2 * maxRecord

// cursor reads the log forwards, record by record. It belongs to one goroutine.
type cursor struct {
	l     *log
	seg   *segment // guarded by l.mu for others
	off   int64    // of the next record
	limit int64    // up to here the segment is known to be written

	buf []byte
	at  int64 // offset of buf[0]
}

// newCursor is called with l.mu held. An offset of -1 is the segment's end.
func (l *log) newCursor(s *segment, off int64) *cursor {
	if off < 0 {
		off = s.size
	}
	s.refs++
	return &cursor{l: l, seg: s, off: off, limit: s.size}
}

func (c *cursor) close() {
	c.l.mu.Lock()
	defer c.l.mu.Unlock()
	delete(c.l.pinned, c)
	c.l.moved.Broadcast()
	c.leave()
}

func (c *cursor) leave() {
	c.seg.refs--
	c.seg.closeUnused()
}

// next gives the next record, valid until the call after it, and its place; false: there is none yet.
func (c *cursor) next() (record, place, bool) {
	for {
		if c.off < c.limit {
			r, err := c.load()
			if err != nil { // corrupt: what follows in this segment can't be found any more
				c.off = c.limit
				continue
			}
			p := place{c.seg.seq, c.off}
			c.off += r.size()
			return r, p, true
		}
		if !c.advance() {
			return record{}, place{}, false
		}
	}
}

// advance finds more to read: in this segment, or in the next one that is left.
func (c *cursor) advance() bool {
	c.l.mu.Lock()
	defer c.l.mu.Unlock()
	if c.limit != c.seg.size {
		c.limit = c.seg.size
		return true
	}
	for _, s := range c.l.segments {
		if s.seq <= c.seg.seq {
			continue
		}
		c.leave()
		s.refs++
		c.seg, c.off, c.limit = s, 0, s.size
		c.buf, c.at = c.buf[:0], 0
		c.l.moved.Broadcast()
		return true
	}
	return false
}

// load parses the record at c.off, reading the file where the window does not hold all of it.
func (c *cursor) load() (record, error) {
	if r, err := parse(c.held()); err == nil {
		return r, nil
	}
	if c.buf == nil {
		c.buf = make([]byte, 0, min(window, max(c.limit-c.off, 4096)))
	}
	if want := min(c.limit-c.off, window); int64(cap(c.buf)) < want {
		c.buf = make([]byte, 0, window)
	}
	c.buf = c.buf[:min(c.limit-c.off, int64(cap(c.buf)))]
	c.at = c.off
	n, err := c.seg.file.ReadAt(c.buf, c.off)
	c.buf = c.buf[:n]
	if n == 0 && err != nil {
		return record{}, err
	}
	return parse(c.buf)
}

// held is what the window has from c.off on.
func (c *cursor) held() []byte {
	if i := c.off - c.at; i >= 0 && i < int64(len(c.buf)) {
		return c.buf[i:]
	}
	return nil
}

// changes gives a channel that is closed when there is more to read or the run's state has changed; nil: there is more already.
// ended tells whether the run with that number has ended.
func (c *cursor) changes(run int) (changed <-chan struct{}, ended bool) {
	c.l.mu.Lock()
	defer c.l.mu.Unlock()
	if n := len(c.l.segments); n > 0 && (c.seg != c.l.segments[n-1] || c.off != c.seg.size) {
		return nil, false
	}
	if c.l.changed == nil {
		c.l.changed = make(chan struct{})
	}
	return c.l.changed, c.l.run > run || c.l.run == run && !c.l.running
}

// awaited is the number of the run that a newcomer follows: the current one, else the next. l.mu is held.
func (l *log) awaited() int {
	if l.running {
		return l.run
	}
	return l.run + 1
}

// end is the place of the next record to be written. l.mu is held.
func (l *log) end() place {
	s := l.segments[len(l.segments)-1]
	return place{s.seq, s.size}
}

// backwards calls f for the records before p, the last one first, until f says false. A corrupt record ends its segment.
func (l *log) backwards(p place, f func(record, place) bool) {
	var buf []byte
	for s := l.before(p.seq); s != nil; s = l.previous(s) {
		end := s.limit
		if s.seq == p.seq {
			end = p.off
		}
		at := end // offset of buf[0]
		buf = buf[:0]
		for end > 0 {
			n := recordLen(tail(buf[:end-at]))
			if n == 0 || n > end-at {
				if at == 0 || len(buf) > 0 && end-at >= maxRecord {
					break
				}
				at = max(0, end-window)
				if buf == nil {
					buf = make([]byte, window)
				}
				buf = buf[:end-at]
				if _, err := s.file.ReadAt(buf, at); err != nil {
					break
				}
				continue
			}
			r, err := parse(buf[end-at-n : end-at])
			if err != nil {
				break
			}
			end -= n
			if !f(r, place{s.seq, end}) {
				l.unhold(s)
				return
			}
		}
	}
}

// tail is the trailer of the record that ends b.
func tail(b []byte) []byte { return b[max(0, len(b)-trailerLen):] }

// heldSegment is a segment that stays open while it is looked at.
type heldSegment struct {
	*segment
	limit int64
}

// before gives the segment with that number, or the one before it.
func (l *log) before(seq uint64) *heldSegment {
	l.mu.Lock()
	defer l.mu.Unlock()
	for i := len(l.segments) - 1; i >= 0; i-- {
		if s := l.segments[i]; s.seq <= seq {
			s.refs++
			return &heldSegment{s, s.size}
		}
	}
	return nil
}

// previous lets go of s and gives the one before it.
func (l *log) previous(s *heldSegment) *heldSegment {
	defer l.unhold(s)
	return l.before(s.seq - 1)
}

func (l *log) unhold(s *heldSegment) {
	l.mu.Lock()
	defer l.mu.Unlock()
	s.refs--
	s.closeUnused()
}
