package seal

import (
	"crypto/sha512"
	"errors"
	"fmt"
	"hash"
	"io"
)

const (
	chunkLen = 256 << 10
	chunks   = 4
)

// intake reads a file once: it gives out the payload, keeps back the trailer,
// and hashes every payload byte that it gives out, on a goroutine of its own.
type intake struct {
	src  io.Reader
	comp Compression
	// unsigned lets a file without trailer pass, all of it payload.
	unsigned bool

	ring  [chunks]chunk
	next  int
	cur   []byte // what Read has not given out yet
	held  []byte // the last bytes read: the trailer, and as much before it
	hash  hash.Hash
	work  chan *chunk
	done  chan struct{}
	sig   *Signature // after EOF; nil if unsigned
	end   error      // what Read says after cur: io.EOF once the trailer was seen
	total int64      // bytes read from src
}

type chunk struct {
	buf    []byte
	data   []byte
	hashed chan struct{}
}

func newIntake(src io.Reader, unsigned bool) (*intake, error) {
	first := make([]byte, 4)
	if n, err := io.ReadFull(src, first); err != nil {
		if errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, io.EOF) {
			return nil, fmt.Errorf("%w: it has %d bytes", ErrFormat, n)
		}
		return nil, err
	}
	comp, err := sniff(first)
	if err != nil {
		return nil, err
	}
	in := &intake{
		src: src, comp: comp, unsigned: unsigned, held: first, total: int64(len(first)),
		hash: sha512.New(), work: make(chan *chunk, chunks), done: make(chan struct{}),
	}
	for i := range in.ring {
		in.ring[i].hashed = make(chan struct{}, 1)
		in.ring[i].hashed <- struct{}{}
	}
	go func() {
		defer close(in.done)
		for c := range in.work {
			in.hash.Write(c.data)
			c.hashed <- struct{}{}
		}
	}()
	return in, nil
}

// close ends the hashing goroutine; no Read may follow.
func (in *intake) close() {
	if in.work != nil {
		close(in.work)
		<-in.done
		in.work = nil
	}
}

func (in *intake) Read(p []byte) (int, error) {
	for len(in.cur) == 0 {
		if in.end != nil {
			return 0, in.end
		}
		in.fill()
	}
	n := copy(p, in.cur)
	in.cur = in.cur[n:]
	return n, nil
}

// fill reads the next chunk. Two trailers' worth of bytes stays back: at the
// end the second is the trailer, and the first must not be one.
func (in *intake) fill() {
	c := &in.ring[in.next]
	in.next = (in.next + 1) % chunks
	<-c.hashed
	if c.buf == nil {
		c.buf = make([]byte, chunkLen)
	}
	n := copy(c.buf, in.held)
	m, err := io.ReadAtLeast(in.src, c.buf[n:], 1)
	in.total += int64(m)
	data := c.buf[:n+m]
	keep := 2 * in.comp.trailerLen()
	switch {
	case err == nil:
		keep = min(keep, len(data))
	case errors.Is(err, io.EOF):
		keep, in.end = in.finish(data)
	default:
		in.end = err
		keep = len(data)
	}
	in.held = append(in.held[:0], data[len(data)-keep:]...)
	c.data = data[:len(data)-keep]
	in.cur = c.data
	in.work <- c
}

// finish looks at the end of the file and says how many bytes of it are no
// payload.
func (in *intake) finish(data []byte) (int, error) {
	t := in.comp.trailerLen()
	if len(data) >= t {
		sig, err := parseTrailer(in.comp, data[len(data)-t:])
		switch {
		case err == nil:
			if rest := data[:len(data)-t]; len(rest) >= t {
				if _, err := parseTrailer(in.comp, rest[len(rest)-t:]); !errors.Is(err, ErrUnsigned) {
					return len(data), fmt.Errorf("%w: the file is signed twice", ErrSignature)
				}
			}
			in.sig = sig
			return t, io.EOF
		case !errors.Is(err, ErrUnsigned):
			return len(data), err
		}
	}
	if in.unsigned {
		return 0, io.EOF
	}
	return len(data), fmt.Errorf("%w at the end of the file: it was never signed, is cut off, or something was appended", ErrUnsigned)
}

// signature is asked for at the end of the payload. It is verified.
func (in *intake) signature() (*Signature, error) {
	if !errors.Is(in.end, io.EOF) || len(in.cur) > 0 {
		return nil, errors.New("seal: signature asked for before the end of the payload")
	}
	in.close()
	if in.sig == nil {
		s := new(Signature)
		in.hash.Sum(s.Payload[:0])
		return s, ErrUnsigned
	}
	in.hash.Sum(in.sig.Payload[:0])
	return in.sig, in.sig.Verify()
}
