package seal

import (
	"archive/tar"
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
)

// Limits bound what a file may make its reader do. Zero values are defaults.
type Limits struct {
	// MaxSize bounds the unpacked payload in bytes, tar headers included.
	MaxSize int64
	// MaxEntries bounds the number of entries.
	MaxEntries int
	// Unsigned lets a file without signature be read to its end. A signature
	// that is there must be good all the same.
	Unsigned bool
}

// The defaults of Limits, and what no image of the format exceeds.
const (
	DefaultMaxSize    = 8 << 30
	DefaultMaxEntries = 1 << 20
	maxEntriesCeiling = 1 << 24
	zstdWindow        = 8 << 20
)

// Verify reads a whole file and checks the signature over it, without
// unpacking. It returns what the file says about its signer even with an
// ErrSignature.
func Verify(ctx context.Context, src io.Reader) (*Signature, error) {
	in, err := newIntake(src, false)
	if err != nil {
		return nil, err
	}
	defer in.close()
	for in.end == nil {
		if err := ctx.Err(); err != nil {
			return nil, context.Cause(ctx)
		}
		in.fill()
	}
	if !errors.Is(in.end, io.EOF) {
		return nil, in.end
	}
	in.cur = nil
	return in.signature()
}

// Reader gives an image's entries in one pass. Whatever it gives is
// unauthenticated until Finish has returned nil.
type Reader struct {
	in    *intake
	br    *bufio.Reader
	dec   io.Reader
	close func()
	limit *limited
	tar   *tar.Reader
	guard *guard
	image *Image
	first []*Entry // the entries that NewReader has read already
	desc  []byte
	cur   *Entry
	body  io.Reader
	done  bool
}

// NewReader starts reading and parses the description. Close must follow.
func NewReader(src io.Reader, l Limits) (*Reader, error) {
	if l.MaxSize == 0 {
		l.MaxSize = DefaultMaxSize
	}
	if l.MaxEntries == 0 {
		l.MaxEntries = DefaultMaxEntries
	}
	in, err := newIntake(src, l.Unsigned)
	if err != nil {
		return nil, err
	}
	r := &Reader{in: in, close: func() {}, guard: newGuard(l.MaxEntries)}
	if err := r.start(l.MaxSize); err != nil {
		r.Close()
		return nil, err
	}
	return r, nil
}

func (r *Reader) start(maxSize int64) error {
	r.br = bufio.NewReaderSize(r.in, 64<<10)
	switch r.in.comp {
	case Gzip:
		z, err := gzip.NewReader(r.br)
		if err != nil {
			return r.explain(err)
		}
		z.Multistream(false)
		r.dec = z
	case Zstd:
		z, err := zstd.NewReader(&zstdFrame{r: r.br}, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxWindow(zstdWindow))
		if err != nil {
			return r.explain(err)
		}
		r.dec, r.close = z, z.Close
	}
	r.limit = &limited{r: r.dec, left: maxSize, max: maxSize}
	r.tar = tar.NewReader(r.limit)
	for range 2 {
		e, err := r.read()
		if err != nil {
			return err
		}
		r.first = append(r.first, e)
	}
	desc, err := io.ReadAll(r.tar) // guard has bounded its size
	if err != nil {
		return r.explain(err)
	}
	r.desc = desc
	r.image, err = parseImage(desc)
	return err
}

// Image is the description, unauthenticated like everything before Finish.
func (r *Reader) Image() *Image { return r.image }

// Consumed is how many bytes of the file have been read so far.
func (r *Reader) Consumed() int64 { return r.in.total }

// Next gives the next entry, io.EOF after the last. Read gives its content.
func (r *Reader) Next() (*Entry, error) {
	if len(r.first) > 0 {
		e := r.first[0]
		r.first = r.first[1:]
		r.cur, r.body = e, bytes.NewReader(nil)
		if e.Kind == File {
			r.body = bytes.NewReader(r.desc)
		}
		return e, nil
	}
	e, err := r.read()
	r.cur, r.body = e, r.tar
	return e, err
}

func (r *Reader) read() (*Entry, error) {
	h, err := r.tar.Next()
	if errors.Is(err, io.EOF) {
		if r.guard.count < 2 {
			return nil, fmt.Errorf("%w: %s is missing", ErrFormat, ImagePath)
		}
		r.done = true
		return nil, io.EOF
	}
	if err != nil {
		return nil, r.explain(err)
	}
	e, err := FromHeader(h)
	if err != nil {
		return nil, err
	}
	return e, r.guard.admit(e)
}

// Read reads the content of the entry that Next gave.
func (r *Reader) Read(p []byte) (int, error) {
	n, err := r.body.Read(p)
	if err != nil && !errors.Is(err, io.EOF) {
		err = r.explain(err)
	}
	return n, err
}

// Finish reads what is left and gives the verified signature: it returns nil
// only if a good signature covers every byte of the file, or, with
// Limits.Unsigned, if there is none at all (ErrUnsigned is returned then, and
// the caller decides). Every entry must have been read with Next.
func (r *Reader) Finish() (*Signature, error) {
	if !r.done {
		return nil, errors.New("seal: Finish before the last entry")
	}
	var one [1]byte
	// archive/tar stops after two zero blocks, the decompressor must be there too
	if n, err := io.ReadFull(r.limit, one[:]); n > 0 {
		return nil, fmt.Errorf("%w: data after the end of the archive", ErrFormat)
	} else if !errors.Is(err, io.EOF) {
		return nil, r.explain(err)
	}
	if _, err := r.br.ReadByte(); err == nil {
		return nil, fmt.Errorf("%w: something was put between the image and its signature", ErrFormat)
	} else if !errors.Is(err, io.EOF) {
		return nil, err
	}
	return r.in.signature()
}

// Close releases what the reader holds, not the source. It does not wait for
// the source.
func (r *Reader) Close() {
	r.close()
	r.in.close()
}

// explain tells a damaged file from an unreadable one: errors of the source and
// of the limits stay what they are, what a parser says becomes ErrFormat.
func (r *Reader) explain(err error) error {
	switch {
	case r.in.end != nil && !errors.Is(r.in.end, io.EOF):
		return r.in.end
	case errors.Is(err, ErrTooLarge):
		return err
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return fmt.Errorf("%w: it ends too early", ErrFormat)
	}
	return fmt.Errorf("%w: %w", ErrFormat, err)
}

// limited fails once more than max bytes would have been read.
type limited struct {
	r         io.Reader
	left, max int64
}

func (l *limited) Read(p []byte) (int, error) {
	if l.left < 0 {
		return 0, fmt.Errorf("%w: it unpacks to more than %d bytes: raise --max-size if that is right", ErrTooLarge, l.max)
	}
	if int64(len(p)) > l.left+1 {
		p = p[:l.left+1]
	}
	n, err := l.r.Read(p)
	l.left -= int64(n)
	if l.left < 0 {
		n, err = max(n-1, 0), nil
	}
	return n, err
}
