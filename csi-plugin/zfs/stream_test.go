package zfs

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"slices"
	"testing"

	"github.com/cradlestack/cradlestack/csi-plugin/volume"
)

// drr is a record of a send stream, with numbers by their offset and data behind it.
func drr(kind uint32, numbers map[int]uint64, data int) []byte {
	rec := make([]byte, recordSize+data)
	for at, n := range numbers {
		binary.LittleEndian.PutUint64(rec[at:], n)
	}
	binary.LittleEndian.PutUint32(rec, kind)
	return rec
}

func write(object, offset uint64, length int) []byte {
	return drr(drrWrite, map[int]uint64{8: object, 24: offset, 32: uint64(length)}, length)
}

func example() []byte {
	return slices.Concat(
		drr(drrBegin, nil, 0),
		drr(drrObject, map[int]uint64{24: 5 << 32}, 8),
		write(2, 0, 512),
		write(1, 16384, 16384), write(1, 32768, 16384),
		drr(drrFree, map[int]uint64{8: 1, 16: 65536, 24: 16384}, 0),
		write(1, 131072, 16384),
		drr(drrFree, map[int]uint64{8: 1, 16: 196608, 24: 1<<64 - 1}, 0),
		drr(drrFreeObjects, nil, 0),
		drr(drrEnd, nil, 0),
	)
}

func TestRanges(t *testing.T) {
	for _, c := range []struct {
		holes bool
		want  []volume.Range
	}{
		{false, []volume.Range{{Start: 16384, End: 49152}, {Start: 131072, End: 147456}}},
		{true, []volume.Range{{Start: 16384, End: 49152}, {Start: 65536, End: 81920}, {Start: 131072, End: 147456}, {Start: 196608, End: 1 << 20}}},
	} {
		got, err := ranges(bufio.NewReader(bytes.NewReader(example())), 1<<20, c.holes)
		if err != nil || !slices.Equal(got, c.want) {
			t.Errorf("holes: %t: %v, %v; want %v", c.holes, got, err, c.want)
		}
	}
	for what, data := range map[string][]byte{
		"nothing":            nil,
		"one that is cut":    example()[:len(example())-1],
		"one without begin":  example()[recordSize:],
		"an unknown record":  slices.Concat(drr(drrBegin, nil, 0), drr(8, nil, 0)),
		"an enormous record": slices.Concat(drr(drrBegin, nil, 0), drr(drrSpill, map[int]uint64{16: 1 << 60}, 0)),
	} {
		if got, err := ranges(bufio.NewReader(bytes.NewReader(data)), 1<<20, true); err == nil {
			t.Errorf("%s: %v", what, got)
		}
	}
}

func FuzzRanges(f *testing.F) {
	f.Add(example())
	f.Fuzz(func(t *testing.T, data []byte) {
		const size = 1 << 20
		all, err := ranges(bufio.NewReader(bytes.NewReader(data)), size, true)
		end := int64(-1)
		for _, r := range all {
			if err == nil && (r.Start <= end || r.End < r.Start || r.End > size) {
				t.Errorf("%v", all)
			}
			end = r.End
		}
	})
}
