package mount

import (
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"os"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// Lock waits until nobody else, here or in another process, holds the lock of one of these names in the file, which it takes over. The file stays
// empty: each name has one byte of what it could hold, and two names that share one wait for each other. The lock ends when the file, and
// every copy of it that a child process has, is closed.
func Lock(ctx context.Context, f *os.File, names ...string) (*os.File, error) {
	offsets := make([]int64, len(names))
	for i, name := range names {
		h := fnv.New64a()
		h.Write([]byte(name))
		offsets[i] = int64(h.Sum64() >> 2)
	}
	slices.Sort(offsets) // in one order, so that no two wait for each other
	for _, at := range offsets {
		if err := lockByte(ctx, f, at); err != nil {
			f.Close()
			return nil, fmt.Errorf("lock volume %s: %w", names[0], err)
		}
	}
	return f, nil
}

func lockByte(ctx context.Context, f *os.File, at int64) error {
	l := unix.Flock_t{Type: unix.F_WRLCK, Start: at, Len: 1}
	for wait := time.Millisecond; ; wait = min(2*wait, 50*time.Millisecond) {
		err := unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLK, &l)
		if !errors.Is(err, unix.EAGAIN) {
			return err
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(wait):
		}
	}
}
