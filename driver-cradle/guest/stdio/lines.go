package stdio

import (
	"bytes"
	"context"
	"io"
	"time"
)

// maxHeld is how much of an unfinished line is held back, docker's figure.
const maxHeld = 16 << 10

// timeFormat is RFC 3339 with all nine digits, as docker writes it.
const timeFormat = "2006-01-02T15:04:05.000000000Z07:00"

func (l *log) readLines(ctx context.Context, lo LogOptions) error {
	l.mu.Lock()
	end, mid, run := l.end(), l.mid, l.awaited()
	follow := lo.Follow && (l.running || lo.Restarts != nil)
	l.mu.Unlock()

	var until <-chan time.Time
	if !lo.Until.IsZero() {
		left := time.Until(lo.Until)
		follow = follow && left > 0
		if follow {
			t := time.NewTimer(left)
			defer t.Stop()
			until = t.C
		}
	}
	if lo.Tail == 0 && !follow {
		return nil
	}
	from := l.find(lo, end, mid, follow)
	c := l.cursorAt(from.first())
	defer c.close()

	lines := newLineWriter(lo)
	for ctx.Err() == nil {
		over := isClosed(lo.Restarts)
		r, p, ok := c.next()
		switch {
		case ok && lines.tooLate(r.time):
			return nil
		case ok && !follow && !p.before(end):
			return lines.rest()
		case ok && r.end:
			if err := lines.flush(); err != nil {
				return err
			}
			if follow && lo.Restarts == nil && !p.before(end) {
				return nil
			}
		case ok:
			if err := lines.put(r.stream, from.cut(r, p), r.time); err != nil {
				return err
			}
		case !follow || over:
			return lines.rest()
		default:
			changed, ended := c.changes(run)
			if changed == nil {
				continue
			}
			if ended && lo.Restarts == nil {
				return lines.rest()
			}
			if lo.Idle != nil {
				if err := lo.Idle(); err != nil {
					return err
				}
			}
			select {
			case <-changed:
			case <-lo.Restarts:
			case <-until:
				return nil
			case <-ctx.Done():
			}
		}
	}
	return context.Cause(ctx)
}

// cursorAt reads from p on, or from what is left after it.
func (l *log) cursorAt(p place) *cursor {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, s := range l.segments {
		if s.seq == p.seq {
			return l.newCursor(s, p.off)
		}
		if s.seq > p.seq {
			return l.newCursor(s, 0)
		}
	}
	return l.newCursor(l.segments[len(l.segments)-1], -1)
}

// origin is where the wanted lines begin: for each stream a byte of a record's payload.
type origin [2]struct {
	place
	skip int
}

// first is the first place to read.
func (o *origin) first() place {
	if o[1].place.before(o[0].place) {
		return o[1].place
	}
	return o[0].place
}

// cut gives what a record has of the wanted lines.
func (o *origin) cut(r record, p place) []byte {
	at := o[r.stream-1]
	switch {
	case p.before(at.place):
		return nil
	case p == at.place:
		return r.payload[min(at.skip, len(r.payload)):]
	}
	return r.payload
}

// find finds where the lines that lo asks for begin, reading no more than it must: backwards for a tail, the one segment for a
// time. What is found is the beginning of lines; their times are looked at while writing.
func (l *log) find(lo LogOptions, end place, mid mids, follow bool) origin {
	s := search{left: lo.Tail}
	s.want[0], s.want[1] = lo.Stdout != nil, lo.Stderr != nil
	if !lo.Since.IsZero() {
		s.since = lo.Since.UnixNano()
	}
	if !lo.Until.IsZero() {
		s.until = lo.Until.UnixNano()
	}
	switch {
	case lo.Tail < 0 && s.since == 0:
		return s.origin
	case lo.Tail < 0:
		end, mid = l.firstSince(s.since, end, mid)
		s.startAt(end, mid)
	case lo.Tail == 0:
		s.startAt(end, mid)
	case !follow && s.until == 0:
		s.ended(end, mid, end)
	}
	if s.done() {
		return s.origin
	}
	next := end
	l.backwards(end, func(r record, p place) bool {
		s.look(r, p, next)
		next = p
		return !s.done()
	})
	return s.origin
}

// firstSince finds the first record of that time or later, and which lines are unfinished before it.
func (l *log) firstSince(since int64, end place, mid mids) (place, mids) {
	l.mu.Lock()
	seg := l.segmentAt(time.Unix(0, since))
	c := l.newCursor(seg, 0)
	l.mu.Unlock()
	defer c.close()
	for {
		r, p, ok := c.next()
		if !ok || !p.before(end) {
			return end, mid
		}
		if r.time >= since {
			return p, r.mid
		}
	}
}

// segmentAt gives the segment in which the first record of that time or later is, unless it is the next one's first. l.mu is held.
func (l *log) segmentAt(t time.Time) *segment {
	seg := l.segments[0]
	if t.IsZero() {
		return seg
	}
	for _, s := range l.segments {
		if s.size > 0 && s.first < t.UnixNano() {
			seg = s
		}
	}
	return seg
}

// search goes backwards through the log: first it counts the ends of wanted lines, then it looks, for each stream by itself, for where
// its first wanted line begins.
type search struct {
	want         [2]bool
	left         int // lines still to be found; 0: only beginnings are missing
	since, until int64
	origin       origin
	seeking      mids // streams whose beginning is missing
}

func (s *search) done() bool { return s.left == 0 && s.seeking == mids{} }

// startAt begins the output at p, with the beginnings of the lines that are unfinished there.
func (s *search) startAt(p place, mid mids) {
	s.left = 0
	for i := range s.origin {
		s.origin[i].place, s.origin[i].skip = p, 0
		s.seeking[i] = mid[i]
	}
}

// look takes in the record at p; next is the place after it.
func (s *search) look(r record, p, next place) {
	if s.left > 0 {
		switch {
		case s.until != 0 && r.time > s.until:
			return
		case r.time < s.since:
			s.startAt(next, midsAfter(r))
		case r.end:
			s.ended(p, r.mid, next)
			return
		case s.want[r.stream-1]:
			s.count(r, p)
			return
		}
	}
	if i := r.stream - 1; s.seeking[i] && s.left == 0 && !r.end {
		s.seek(i, r, p, len(r.payload))
	}
}

// midsAfter tells which lines are unfinished after r.
func midsAfter(r record) mids {
	if r.end {
		return mids{}
	}
	m := r.mid
	*m.of(r.stream) = r.payload[len(r.payload)-1] != '\n'
	return m
}

// ended counts the lines that a run's end at p has ended: stdout's, then stderr's.
func (s *search) ended(p place, mid mids, next place) {
	for i := 1; i >= 0 && s.left > 0; i-- {
		if !s.want[i] || !mid[i] {
			continue
		}
		if s.left--; s.left == 0 {
			s.startAt(p, mid)
			if i == 1 { // stdout's came before: not wanted
				s.origin[0].place, s.seeking[0] = next, false
			}
		}
	}
}

// count counts the lines that end in r.
func (s *search) count(r record, p place) {
	for k := bytes.LastIndexByte(r.payload, '\n'); k >= 0; k = bytes.LastIndexByte(r.payload[:k], '\n') {
		if s.left--; s.left == 0 {
			s.startAt(p, r.mid)
			s.seeking[r.stream-1] = true
			s.seek(r.stream-1, r, p, k)
			return
		}
	}
}

// seek looks in the first n bytes of r for the beginning of the line that goes on there.
func (s *search) seek(i Stream, r record, p place, n int) {
	j := bytes.LastIndexByte(r.payload[:n], '\n')
	if j < 0 && r.mid[i] {
		s.origin[i].place = place{}
		return
	}
	s.origin[i].place, s.origin[i].skip = p, j+1
	s.seeking[i] = false
}

// lineWriter makes lines of records.
type lineWriter struct {
	streams      [2]heldLine
	timestamps   bool
	since, until int64
	buf          []byte
}

// heldLine is a stream's unfinished line.
type heldLine struct {
	w     io.Writer
	bytes []byte
	begun bool  // a part of it has been written
	time  int64 // of the last part
}

func newLineWriter(lo LogOptions) *lineWriter {
	lw := &lineWriter{timestamps: lo.Timestamps}
	lw.streams[0].w, lw.streams[1].w = lo.Stdout, lo.Stderr
	if !lo.Since.IsZero() {
		lw.since = lo.Since.UnixNano()
	}
	if !lo.Until.IsZero() {
		lw.until = lo.Until.UnixNano()
	}
	return lw
}

func (lw *lineWriter) tooLate(t int64) bool { return lw.until != 0 && t > lw.until }

// put takes output in and writes the lines that it finishes, all of them at once.
func (lw *lineWriter) put(stream Stream, p []byte, t int64) error {
	h := &lw.streams[stream-1]
	if h.w == nil || len(p) == 0 {
		return nil
	}
	h.time = t
	end := bytes.LastIndexByte(p, '\n') + 1
	if end > 0 {
		if err := lw.write(h, p[:end], t); err != nil {
			return err
		}
	}
	h.bytes = append(h.bytes, p[end:]...)
	if len(h.bytes) < maxHeld {
		return nil
	}
	err := lw.write(h, nil, t)
	h.begun = true
	return err
}

// write writes what is held and what follows it.
func (lw *lineWriter) write(h *heldLine, p []byte, t int64) error {
	held := h.bytes
	begun := h.begun
	h.bytes, h.begun = h.bytes[:0], false
	if t < lw.since || len(held)+len(p) == 0 {
		return nil
	}
	if len(held) == 0 && !lw.timestamps {
		_, err := h.w.Write(p)
		return err
	}
	out := lw.buf[:0]
	stamp := time.Unix(0, t).UTC()
	atStart := !begun
	for _, text := range [][]byte{held, p} {
		if !lw.timestamps {
			out = append(out, text...)
			continue
		}
		for len(text) > 0 {
			if atStart {
				out = append(stamp.AppendFormat(out, timeFormat), ' ')
			}
			n := bytes.IndexByte(text, '\n') + 1
			if atStart = n > 0; !atStart {
				n = len(text)
			}
			out = append(out, text[:n]...)
			text = text[n:]
		}
	}
	lw.buf = out
	if cap(lw.buf) > 1<<20 { // a payload of nothing but line ends
		lw.buf = nil
	}
	_, err := h.w.Write(out)
	return err
}

// rest writes what is unfinished where reading ends; by a given time it had not ended.
func (lw *lineWriter) rest() error {
	if lw.until != 0 {
		return nil
	}
	return lw.flush()
}

// flush writes unfinished lines.
func (lw *lineWriter) flush() error {
	for i := range lw.streams {
		h := &lw.streams[i]
		if h.w == nil {
			continue
		}
		if err := lw.write(h, nil, h.time); err != nil {
			return err
		}
	}
	return nil
}
