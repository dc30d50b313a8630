package fetch

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
)

// file is a path. Pipes and standard input as /dev/stdin work, once.
type file string

func (f file) String() string { return string(f) }

func (f file) Open(ctx context.Context, offset int64) (Part, error) {
	h, err := os.Open(string(f))
	if err != nil {
		var pe *fs.PathError
		if errors.As(err, &pe) {
			err = pe.Err
		}
		return Part{}, permanent{err}
	}
	fi, err := h.Stat()
	if err != nil {
		h.Close()
		return Part{}, permanent{err}
	}
	size := fi.Size()
	switch {
	case fi.IsDir():
		h.Close()
		return Part{}, permanent{fmt.Errorf("it is a folder, not an image: make one with bali build OUT --from %s", f)}
	case !fi.Mode().IsRegular():
		if offset != 0 {
			h.Close()
			return Part{}, permanent{ErrWhole}
		}
		// a pipe may say nothing for ever
		return Part{&pipe{h, context.AfterFunc(ctx, func() { h.Close() })}, 0, -1}, nil
	case offset < 0:
		offset = max(size+offset, 0)
	}
	if _, err := h.Seek(offset, io.SeekStart); err != nil {
		h.Close()
		return Part{}, permanent{err}
	}
	return Part{h, offset, size}, nil
}

// pipe ends with its context.
type pipe struct {
	*os.File
	stop func() bool
}

func (p *pipe) Close() error {
	p.stop()
	return p.File.Close()
}
