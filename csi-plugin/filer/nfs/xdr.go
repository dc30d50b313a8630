package nfs

import "encoding/binary"

// A decoder reads XDR (RFC 4506) from a record. What it returns shares the record's memory. After the first thing that is not there, or
// longer than allowed, it is bad and returns zeros.
type decoder struct {
	b   []byte
	bad bool
}

func (d *decoder) take(n int) []byte {
	if d.bad || n > len(d.b) {
		d.bad = true
		return nil
	}
	out := d.b[:n:n]
	d.b = d.b[n:]
	return out
}

func (d *decoder) uint32() uint32 {
	if b := d.take(4); b != nil {
		return binary.BigEndian.Uint32(b)
	}
	return 0
}

func (d *decoder) uint64() uint64 {
	if b := d.take(8); b != nil {
		return binary.BigEndian.Uint64(b)
	}
	return 0
}

// opaque reads bytes of a length that comes first, at most limit.
func (d *decoder) opaque(limit int) []byte {
	n := d.uint32()
	if d.bad || uint64(n) > uint64(limit) {
		d.bad = true
		return nil
	}
	b := d.take(int(n))
	d.take(pad(int(n)))
	return b
}

// pad is how many zeros follow n bytes.
func pad(n int) int { return -n & 3 }

// An encoder appends XDR.
type encoder struct{ b []byte }

func (e *encoder) uint32(v uint32) { e.b = binary.BigEndian.AppendUint32(e.b, v) }
func (e *encoder) uint64(v uint64) { e.b = binary.BigEndian.AppendUint64(e.b, v) }

func (e *encoder) bool(v bool) {
	if v {
		e.uint32(1)
	} else {
		e.uint32(0)
	}
}

func (e *encoder) opaque(b []byte) {
	e.uint32(uint32(len(b)))
	e.b = append(e.b, b...)
	e.b = append(e.b, zeros[:pad(len(b))]...)
}

var zeros [4]byte
