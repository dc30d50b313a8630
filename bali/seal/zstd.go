package seal

import (
	"bufio"
	"errors"
	"io"
)

// zstdFrame gives the bytes of one frame (RFC 8878 §3.1.1) and then io.EOF: a
// decoder would go on to the next frame and pass over skippable ones, and so
// over whatever was put behind the archive.
type zstdFrame struct {
	r       *bufio.Reader
	left    int // bytes to give out before the next block header
	started bool
	sum     bool // a checksum follows the last block
	last    bool
	done    bool
}

func (f *zstdFrame) Read(p []byte) (int, error) {
	for f.left == 0 {
		if f.done {
			return 0, io.EOF
		}
		if err := f.next(); err != nil {
			return 0, err
		}
	}
	n, err := f.r.Read(p[:min(len(p), f.left)])
	f.left -= n
	if n > 0 {
		err = nil
	}
	return n, noEOF(err)
}

// next looks at the header of the frame or of a block and says how many bytes
// belong to it.
func (f *zstdFrame) next() error {
	switch {
	case !f.started:
		h, err := f.r.Peek(5)
		if err != nil {
			return noEOF(err)
		}
		d := h[4] // the frame header's descriptor
		single := d>>5&1 == 1
		f.left = 5 + []int{0, 1, 2, 4}[d&3] + []int{0, 2, 4, 8}[d>>6]
		if !single || d>>6 == 0 {
			f.left++ // the window's size, or the content's in one byte
		}
		f.started, f.sum = true, d>>2&1 == 1
	case f.last:
		f.done = true
		if f.sum {
			f.left = 4
		}
	default:
		h, err := f.r.Peek(3)
		if err != nil {
			return noEOF(err)
		}
		b := int(h[0]) | int(h[1])<<8 | int(h[2])<<16
		f.last, f.left = b&1 == 1, 3
		switch b >> 1 & 3 {
		case 1: // one byte that is repeated
			f.left++
		case 3:
			return errors.New("zstd block of reserved type")
		default:
			f.left += b >> 3
		}
	}
	return nil
}

func noEOF(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}
