package dir

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// createNew are the flags of a file that must not be there yet.
const createNew = os.O_RDWR | os.O_CREATE | os.O_EXCL

// reflink makes an empty file share all data of another. errors.ErrUnsupported: their file system can't.
func reflink(to, from *os.File) error {
	err := unix.IoctlFileClone(int(to.Fd()), int(from.Fd()))
	switch {
	case err == nil:
		return nil
	case errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.ENOTTY), errors.Is(err, unix.EXDEV), errors.Is(err, unix.EINVAL):
		return fmt.Errorf("%w: %w", errors.ErrUnsupported, err)
	default:
		return &os.PathError{Op: "reflink", Path: from.Name(), Err: err}
	}
}

// copySparse copies what is not a hole into an empty file, which gets the same size.
func copySparse(ctx context.Context, to, from *os.File) error {
	size, err := from.Seek(0, io.SeekEnd)
	if err != nil {
		return err
	}
	if err := to.Truncate(size); err != nil {
		return err
	}
	for at := int64(0); at < size; {
		data, err := unix.Seek(int(from.Fd()), at, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			return nil // only a hole is left
		}
		if err != nil {
			return &os.PathError{Op: "seek", Path: from.Name(), Err: err}
		}
		hole, err := unix.Seek(int(from.Fd()), data, unix.SEEK_HOLE)
		if err != nil {
			return &os.PathError{Op: "seek", Path: from.Name(), Err: err}
		}
		if at, err = copyRange(ctx, to, from, data, hole); err != nil {
			return err
		}
	}
	return nil
}

// copyStep is how much is copied between two looks at the context.
const copyStep = 64 << 20

// copyRange copies the bytes in [at, end) and returns how far it came: a file that shrinks meanwhile ends early.
func copyRange(ctx context.Context, to, from *os.File, at, end int64) (int64, error) {
	for at < end {
		if ctx.Err() != nil {
			return at, context.Cause(ctx)
		}
		in, out := at, at
		n, err := unix.CopyFileRange(int(from.Fd()), &in, int(to.Fd()), &out, int(min(copyStep, end-at)), 0)
		if errors.Is(err, unix.EXDEV) || errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EOPNOTSUPP) {
			// Two file systems, of which not every pair can do it.
			var n64 int64
			n64, err = io.Copy(io.NewOffsetWriter(to, at), io.NewSectionReader(from, at, min(copyStep, end-at)))
			n = int(n64)
		}
		if err != nil {
			return at, fmt.Errorf("copy %s: %w", from.Name(), err)
		}
		if n == 0 {
			return end, nil
		}
		at += int64(n)
	}
	return at, nil
}
