package wire

import (
	"encoding/binary"
	"fmt"
	"io"
	"strconv"
	"strings"
)

// A Mark is a place between two pieces of a container's output, as the guest's log counts; the zero Mark is the beginning of the pod's run. It holds as
// long as that: a machine that is killed takes along the end of its log.
type Mark struct {
	Segment uint64 `json:"segment"`
	Offset  int64  `json:"offset"`
}

// Before says whether what is behind m begins earlier than what is behind n.
func (m Mark) Before(n Mark) bool {
	return m.Segment < n.Segment || m.Segment == n.Segment && m.Offset < n.Offset
}

// String is how PathOutput takes a mark.
func (m Mark) String() string { return fmt.Sprintf("%d.%d", m.Segment, m.Offset) }

// ParseMark reads what Mark.String writes; "" is the zero Mark.
func ParseMark(s string) (Mark, error) {
	if s == "" {
		return Mark{}, nil
	}
	segment, offset, _ := strings.Cut(s, ".")
	var m Mark
	var err error
	if m.Segment, err = strconv.ParseUint(segment, 10, 64); err == nil {
		m.Offset, err = strconv.ParseInt(offset, 10, 64)
	}
	if err != nil || m.Offset < 0 {
		return Mark{}, fmt.Errorf("%q is no mark", s)
	}
	return m, nil
}

// A Piece of a container's output is what one read of its pipe or terminal gave.
type Piece struct {
	Stream byte // 1: stdout, 2: stderr
	Next   Mark // behind it
	Data   []byte
}

// A piece on the wire, big-endian: stream, 3 zero bytes, uint32 length, uint64 segment, int64 offset, data.
const (
	pieceHeader = 24
	maxPiece    = 64 << 10
)

// AppendPiece adds a piece to what is to be sent.
func AppendPiece(b []byte, p Piece) []byte {
	b = append(b, p.Stream, 0, 0, 0)
	b = binary.BigEndian.AppendUint32(b, uint32(len(p.Data)))
	b = binary.BigEndian.AppendUint64(b, p.Next.Segment)
	b = binary.BigEndian.AppendUint64(b, uint64(p.Next.Offset))
	return append(b, p.Data...)
}

// A PieceReader reads what AppendPiece has written. The guest may be hostile: a length that no piece has is an error.
type PieceReader struct {
	r   io.Reader
	buf [pieceHeader + maxPiece]byte
}

// NewPieceReader reads pieces from r, which should be buffered.
func NewPieceReader(r io.Reader) *PieceReader { return &PieceReader{r: r} }

// Next gives the next piece, whose Data is valid until the call after it. The error is io.EOF at the end.
func (r *PieceReader) Next() (Piece, error) {
	h := r.buf[:pieceHeader]
	if _, err := io.ReadFull(r.r, h); err != nil {
		return Piece{}, err
	}
	p := Piece{Stream: h[0], Next: Mark{binary.BigEndian.Uint64(h[8:]), int64(binary.BigEndian.Uint64(h[16:]))}}
	n := binary.BigEndian.Uint32(h[4:])
	if p.Stream < 1 || p.Stream > 2 || h[1]|h[2]|h[3] != 0 || n > maxPiece || p.Next.Offset < 0 {
		return Piece{}, fmt.Errorf("the guest sent %x instead of a piece of output", h)
	}
	p.Data = r.buf[pieceHeader : pieceHeader+n]
	if _, err := io.ReadFull(r.r, p.Data); err != nil {
		return Piece{}, io.ErrUnexpectedEOF
	}
	return p, nil
}
