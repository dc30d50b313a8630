package zfs

import (
	"bufio"
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"slices"

	"github.com/cradlestack/cradlestack/csi-plugin/volume"
)

// A send stream is a sequence of records of this size, some of them followed by data (include/sys/zfs_ioctl.h, dmu_replay_record).
const recordSize = 312

// Kinds of records, in the order of the enum there.
const (
	drrBegin = iota
	drrObject
	drrFreeObjects
	drrWrite
	drrFree
	drrEnd
	drrWriteByRef
	drrSpill
)

// zvolData is the number of the object that holds a zvol's blocks (include/sys/zvol.h, ZVOL_OBJ).
const zvolData = 1

// ranges reads the stream of a zvol, as "zfs send" without options writes it, and returns which bytes it has, with holes also which
// have become zeros.
func ranges(r *bufio.Reader, size int64, holes bool) ([]volume.Range, error) {
	var all []volume.Range
	add := func(start, length uint64) {
		if start >= uint64(size) {
			return
		}
		end := uint64(size)
		if length < end-start { // a hole to the end has all bits set
			end = start + length
		}
		if n := len(all); n > 0 && all[n-1].End >= int64(start) && all[n-1].Start <= int64(start) {
			all[n-1].End = max(all[n-1].End, int64(end))
		} else {
			all = append(all, volume.Range{Start: int64(start), End: int64(end)})
		}
	}
	var rec [recordSize]byte
	u64 := func(at int) uint64 { return binary.LittleEndian.Uint64(rec[at:]) }
	u32 := func(at int) uint32 { return binary.LittleEndian.Uint32(rec[at:]) }
	for first := true; ; first = false {
		if _, err := io.ReadFull(r, rec[:]); err != nil {
			return nil, fmt.Errorf("a send stream ends before its end: %w", err)
		}
		kind := u32(0)
		if first != (kind == drrBegin) {
			return nil, errors.New("a send stream does not begin as one")
		}
		data := uint64(0) // bytes that follow
		switch kind {
		case drrBegin:
			data = uint64(u32(4))
		case drrObject: // object, type, bonus type, block size, bonus length
			data = (uint64(u32(28)) + 7) &^ 7
		case drrWrite: // object, type, padding, offset, length
			data = u64(32)
			if u64(8) == zvolData {
				add(u64(24), data)
			}
		case drrFree: // object, offset, length
			if holes && u64(8) == zvolData {
				add(u64(16), u64(24))
			}
		case drrSpill: // object, length
			data = u64(16)
		case drrFreeObjects:
		case drrEnd:
			return sorted(all), nil
		default:
			return nil, fmt.Errorf("a send stream has a record of kind %d, which is none of a stream without options", kind)
		}
		if data > maxData {
			return nil, fmt.Errorf("a send stream has a record of %d bytes", data)
		}
		if _, err := r.Discard(int(data)); err != nil {
			return nil, fmt.Errorf("a send stream ends before its end: %w", err)
		}
	}
}

// maxData is the size of the largest block (SPA_MAXBLOCKSIZE).
const maxData = 16 << 20

// sorted puts ranges in order, each byte in one.
func sorted(all []volume.Range) []volume.Range {
	slices.SortFunc(all, func(a, b volume.Range) int { return cmp.Compare(a.Start, b.Start) })
	out := all[:0]
	for _, r := range all {
		if n := len(out); n > 0 && out[n-1].End >= r.Start {
			out[n-1].End = max(out[n-1].End, r.End)
		} else {
			out = append(out, r)
		}
	}
	return out
}
