package stdio

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// keepSegments is into how many files a log's maximum size is divided, so how much of it a rotation throws away.
const keepSegments = 8

// Where the disk takes nothing any more, output goes on in memory: the latest one or two segments of this size are kept.
const memorySegment = 256 << 10

// log is the transcript of a container's output, in files named by number. The last one is written.
type log struct {
	dir        string
	segmentMax int64

	mu       sync.Mutex
	segments []*segment // oldest first, never empty
	opened   place      // its end when this guest opened it
	last     int64      // time of the last record: times never go back
	mid      mids       // after the last record
	run      int        // number of the current or last run
	running  bool
	changed  chan struct{}        // closed at the next change; nil: nobody waits
	pinned   map[*cursor]struct{} // what they have still to read is not removed
	moved    *sync.Cond           // a pinned cursor has gone on to another segment, or away
}

// segment is one file. Its fields are guarded by log.mu; the file is read without it.
type segment struct {
	seq    uint64
	file   *os.File
	size   int64 // of the complete records: nobody reads beyond
	first  int64 // time of the first record
	memory bool
	refs   int // cursors on it
	gone   bool
}

func segmentName(seq uint64) string { return fmt.Sprintf("%010d.log", seq) }

func openLog(dir string, maxSize int64) (*log, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	l := &log{dir: dir, segmentMax: max(maxSize/keepSegments, maxRecord), pinned: map[*cursor]struct{}{}}
	l.moved = sync.NewCond(&l.mu)
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	for _, e := range entries {
		seq, err := strconv.ParseUint(trimSuffix(e.Name(), ".log"), 10, 63)
		if err != nil || e.Name() != segmentName(seq) {
			continue
		}
		if err := l.openSegment(seq); err != nil {
			l.close()
			return nil, err
		}
	}
	slices.SortFunc(l.segments, func(a, b *segment) int { return cmp.Compare(a.seq, b.seq) })
	if err := l.recover(); err != nil {
		l.close()
		return nil, err
	}
	l.opened = l.end()
	return l, nil
}

func trimSuffix(s, suffix string) string {
	if len(s) > len(suffix) && s[len(s)-len(suffix):] == suffix {
		return s[:len(s)-len(suffix)]
	}
	return ""
}

func (l *log) openSegment(seq uint64) error {
	f, err := os.OpenFile(filepath.Join(l.dir, segmentName(seq)), os.O_RDWR|unix.O_NOFOLLOW, 0)
	if err != nil {
		return err
	}
	info, err := f.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = fmt.Errorf("%s is no regular file", f.Name())
	}
	if err != nil {
		f.Close()
		return err
	}
	s := &segment{seq: seq, file: f, size: info.Size()}
	l.segments = append(l.segments, s)
	return nil
}

// recover brings an earlier guest's log into order: the torn end is cut off, and a run that nobody ended is ended.
func (l *log) recover() error {
	for _, s := range l.segments {
		var b [headerLen]byte
		if _, err := s.file.ReadAt(b[:], 0); err == nil {
			s.first = recordTime(b[:])
		} else if !errors.Is(err, io.EOF) {
			return err
		}
	}
	if len(l.segments) == 0 {
		return l.newSegment()
	}
	s := l.segments[len(l.segments)-1]
	last, whole := s.lastRecord()
	if !whole {
		last = s.cutTorn()
		if err := s.file.Truncate(s.size); err != nil {
			return err
		}
	}
	for i := len(l.segments) - 2; i >= 0 && last == nil; i-- {
		last, _ = l.segments[i].lastRecord()
	}
	if last == nil {
		return nil
	}
	l.last, l.mid = last.time, midsAfter(*last)
	if !last.end {
		l.endRun()
	}
	return nil
}

// lastRecord finds the last record by the file's last bytes. It tells whether the file is empty or ends with a record.
func (s *segment) lastRecord() (*record, bool) {
	if s.size == 0 {
		return nil, true
	}
	b := make([]byte, min(s.size, maxRecord))
	if _, err := s.file.ReadAt(b, s.size-int64(len(b))); err != nil {
		return nil, false
	}
	n := recordLen(b[max(0, len(b)-trailerLen):])
	if n == 0 || n > int64(len(b)) {
		return nil, false
	}
	r, err := parse(b[int64(len(b))-n:])
	return &r, err == nil && r.size() == n
}

// cutTorn reads from the beginning to find where the whole records end. Of the last one's payload it gives only the last byte.
func (s *segment) cutTorn() *record {
	var last *record
	limit := s.size
	c := cursor{seg: s, limit: limit}
	for c.off < limit {
		r, err := c.load()
		if err != nil {
			break
		}
		c.off += r.size()
		r.payload = bytes.Clone(r.payload[max(0, len(r.payload)-1):])
		last = &r
	}
	s.size = c.off
	return last
}

func (l *log) close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	var errs []error
	for _, s := range l.segments {
		errs = append(errs, s.file.Close())
	}
	l.segments = nil
	return errors.Join(errs...)
}

func (l *log) usage() (n int64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, s := range l.segments {
		n += s.size
	}
	return n
}

// begin starts a run.
func (l *log) begin() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.run++
	l.running = true
}

// endRun ends it: unfinished lines are finished by it.
func (l *log) endRun() {
	b := make([]byte, headerLen+trailerLen)
	l.mu.Lock()
	defer l.mu.Unlock()
	l.put(record{end: true}, b)
	l.mid = mids{}
	l.running = false
}

// append logs what b has between the room for a header and that for a trailer.
func (l *log) append(stream Stream, b []byte) {
	payload := b[headerLen : len(b)-trailerLen]
	l.mu.Lock()
	defer l.mu.Unlock()
	l.put(record{stream: stream, payload: payload}, b)
	*l.mid.of(stream) = payload[len(payload)-1] != '\n'
}

// put writes a record at the end of the log. With the disk full it makes room at the log's own cost, then goes on in memory; the
// container is never told.
func (l *log) put(r record, b []byte) {
	for range keepSegments {
		s := l.room(int64(len(b)))
		if s == nil {
			return
		}
		r.time = max(l.last, time.Now().UnixNano())
		r.mid = l.mid
		frame(b, r)
		if _, err := s.file.WriteAt(b, s.size); err == nil {
			if s.size == 0 {
				s.first = r.time
			}
			s.size += int64(len(b))
			l.last = r.time
			l.wake()
			return
		}
		_ = s.file.Truncate(s.size) // the next write begins at size anyway
		l.makeRoom()
	}
}

// wake tells those who wait for a change.
func (l *log) wake() {
	if l.changed != nil {
		close(l.changed)
		l.changed = nil
	}
}

// room gives the segment that n more bytes go to, after rotating if need be, and after waiting for attached clients whose
// unread output would be rotated away. nil: the log is closed.
func (l *log) room(n int64) *segment {
	for len(l.segments) > 0 {
		s := l.segments[len(l.segments)-1]
		limit := l.segmentMax
		if s.memory {
			limit = memorySegment
		}
		if s.size == 0 || s.size+n <= limit {
			return s
		}
		if len(l.segments) >= keepSegments && l.holds(l.segments[0]) {
			l.moved.Wait()
			continue
		}
		if l.newSegment() != nil {
			l.newMemorySegment()
		}
		for len(l.segments) > keepSegments {
			l.remove(0)
		}
	}
	return nil
}

// holds tells whether a pinned cursor has still to read s.
func (l *log) holds(s *segment) bool {
	for c := range l.pinned {
		if c.seg.seq <= s.seq {
			return true
		}
	}
	return false
}

// makeRoom answers a write that failed: the log gives up its oldest files, then the disk.
func (l *log) makeRoom() {
	if len(l.segments) > 2 && !l.segments[0].memory && !l.holds(l.segments[0]) {
		l.remove(0)
		return
	}
	l.newMemorySegment()
}

func (l *log) nextSeq() uint64 {
	if len(l.segments) == 0 {
		return 1
	}
	return l.segments[len(l.segments)-1].seq + 1
}

func (l *log) newSegment() error {
	seq := l.nextSeq()
	f, err := os.OpenFile(filepath.Join(l.dir, segmentName(seq)), os.O_RDWR|os.O_CREATE|os.O_TRUNC|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return err
	}
	l.segments = append(l.segments, &segment{seq: seq, file: f})
	return nil
}

// newMemorySegment goes on in memory; of older segments there, one is kept.
func (l *log) newMemorySegment() {
	fd, err := unix.MemfdCreate("log", unix.MFD_CLOEXEC)
	if err != nil {
		return
	}
	name := segmentName(l.nextSeq())
	l.segments = append(l.segments, &segment{seq: l.nextSeq(), file: os.NewFile(uintptr(fd), name), memory: true})
	inMemory := 0
	for i := len(l.segments) - 1; i >= 0; i-- {
		if !l.segments[i].memory {
			continue
		}
		if inMemory++; inMemory > 2 && !l.holds(l.segments[i]) {
			l.remove(i)
		}
	}
}

func (l *log) remove(i int) {
	s := l.segments[i]
	l.segments = slices.Delete(l.segments, i, i+1)
	if !s.memory {
		if err := os.Remove(filepath.Join(l.dir, segmentName(s.seq))); err != nil && !errors.Is(err, fs.ErrNotExist) {
			_ = s.file.Truncate(0) // then at least its space is free
		}
	}
	s.gone = true
	s.closeUnused()
}

func (s *segment) closeUnused() {
	if s.gone && s.refs == 0 {
		s.file.Close()
	}
}
