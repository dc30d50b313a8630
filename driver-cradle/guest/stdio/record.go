package stdio

import (
	"encoding/binary"
	"errors"
)

// A record is one piece of output, as it was read from the container, or the end of a run. Little-endian:
//
//	word    uint32   payload length (bits 0–23), flags (24–27), 0xA (28–31)
//	check   uint32   word mixed with time
//	time    int64    nanoseconds since 1970
//	payload
//	trailer uint32   word again: the way back from the end
const (
	headerLen  = 16
	trailerLen = 4
	maxPayload = 64 << 10 // what a pipe holds
	maxRecord  = headerLen + maxPayload + trailerLen
)

const (
	flagStderr uint32 = 1 << (24 + iota) // stream of the payload
	flagOutMid                           // before this record, stdout is in the middle of a line
	flagErrMid                           // likewise stderr
	flagEnd                              // a run has ended: so have its lines; no payload
	lengthMask uint32 = 1<<24 - 1
	marker     uint32 = 0xA << 28
)

var errTorn = errors.New("torn or corrupt record")

type record struct {
	time    int64
	stream  Stream
	mid     mids
	end     bool
	payload []byte // shares memory with what was parsed
}

// mids tells for each stream whether it is in the middle of a line.
type mids [2]bool

func (m *mids) of(s Stream) *bool { return &m[s-1] }

// size is that of the whole record in the log.
func (r record) size() int64 { return int64(headerLen + len(r.payload) + trailerLen) }

func (r record) word() uint32 {
	w := marker | uint32(len(r.payload))
	if r.stream == Stderr {
		w |= flagStderr
	}
	if r.mid[0] {
		w |= flagOutMid
	}
	if r.mid[1] {
		w |= flagErrMid
	}
	if r.end {
		w |= flagEnd
	}
	return w
}

func check(word uint32, time int64) uint32 {
	x := (uint64(time) ^ uint64(word)<<32 ^ uint64(word)) * 0x9E3779B97F4A7C15
	return uint32(x >> 32)
}

// frame fills in what surrounds the payload in b, which has room for it: header, payload, trailer.
func frame(b []byte, r record) {
	w := r.word()
	binary.LittleEndian.PutUint32(b, w)
	binary.LittleEndian.PutUint32(b[4:], check(w, r.time))
	binary.LittleEndian.PutUint64(b[8:], uint64(r.time))
	binary.LittleEndian.PutUint32(b[len(b)-trailerLen:], w)
}

// recordLen gives the size of the record whose word (header's or trailer's) begins b, 0 when that is none.
func recordLen(b []byte) int64 {
	if len(b) < 4 {
		return 0
	}
	w := binary.LittleEndian.Uint32(b)
	n := w & lengthMask
	if w&marker != marker || w>>28 != marker>>28 || n > maxPayload || (n == 0) != (w&flagEnd != 0) {
		return 0
	}
	return int64(headerLen + n + trailerLen)
}

// parse reads the record at the beginning of b.
func parse(b []byte) (record, error) {
	n := recordLen(b)
	if n == 0 || n > int64(len(b)) {
		return record{}, errTorn
	}
	w := binary.LittleEndian.Uint32(b)
	r := record{
		time:    int64(binary.LittleEndian.Uint64(b[8:])),
		stream:  Stdout,
		mid:     mids{w&flagOutMid != 0, w&flagErrMid != 0},
		end:     w&flagEnd != 0,
		payload: b[headerLen : n-trailerLen],
	}
	if w&flagStderr != 0 {
		r.stream = Stderr
	}
	if binary.LittleEndian.Uint32(b[4:]) != check(w, r.time) || binary.LittleEndian.Uint32(b[n-trailerLen:]) != w {
		return record{}, errTorn
	}
	return r, nil
}
