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
	return lock(ctx, f, nil, names...)
}

func lock(ctx context.Context, f *os.File, hopeless func() error, names ...string) (*os.File, error) {
	offsets := make([]int64, len(names))
	for i, name := range names {
		offsets[i] = lockOffset(name)
	}
	slices.Sort(offsets) // in one order, so that no two wait for each other
	for _, at := range offsets {
		if err := lockByte(ctx, f, at, hopeless); err != nil {
			f.Close()
			return nil, fmt.Errorf("lock volume %s: %w", names[0], err)
		}
	}
	return f, nil
}

func lockOffset(name string) int64 {
	h := fnv.New64a()
	h.Write([]byte(name))
	return int64(h.Sum64() >> 2)
}

// Locks is the file of a backend's locks, which Lock takes.
type Locks string

// Open opens the file: locks that are taken by that end with it.
func (l Locks) Open() (*os.File, error) {
	return os.OpenFile(string(l), os.O_RDWR|os.O_CREATE, 0o600)
}

// Take takes the locks of these names until unlock. The programs that run with the context which it returns, and are given what Held has, have them as well:
// they outlast this process where those do.
func (l Locks) Take(ctx context.Context, names ...string) (held context.Context, unlock func(), err error) {
	return l.TakeUnless(ctx, nil, names...)
}

// TakeUnless is Take that gives up with the error of hopeless, which is asked every second while somebody else has the locks.
func (l Locks) TakeUnless(ctx context.Context, hopeless func() error, names ...string) (held context.Context, unlock func(), err error) {
	f, err := l.Open()
	if err == nil {
		f, err = lock(ctx, f, hopeless, names...)
	}
	if err != nil {
		return nil, nil, err
	}
	return context.WithValue(ctx, heldKey{}, f), func() { f.Close() }, nil
}

// Unlock ends the lock of a name before the others that ctx, from Take, has; not where keep, which goes on, shares its byte.
func Unlock(ctx context.Context, name, keep string) error {
	at := lockOffset(name)
	if at == lockOffset(keep) {
		return nil
	}
	return os.NewSyscallError("fcntl", unix.FcntlFlock(Held(ctx).Fd(), unix.F_OFD_SETLK, &unix.Flock_t{Type: unix.F_UNLCK, Start: at, Len: 1}))
}

// atWork is how long Alone waits for another process to be done.
const atWork = time.Second

// Alone runs do with a lock, unless somebody is at work.
func (l Locks) Alone(ctx context.Context, name string, do func(context.Context) error) error {
	waiting, cancel := context.WithTimeout(ctx, atWork)
	defer cancel()
	held, unlock, err := l.Take(waiting, name)
	if err != nil {
		if waiting.Err() != nil && ctx.Err() == nil {
			return nil
		}
		return err
	}
	defer unlock()
	return do(context.WithoutCancel(held))
}

// Holding has the programs that run with a context keep f open, as they do locks: its end says that they have ended.
func Holding(ctx context.Context, f *os.File) context.Context {
	return context.WithValue(ctx, heldKey{}, f)
}

type heldKey struct{}

// Held is the file whose locks a context was returned with, nil where it was not.
func Held(ctx context.Context) *os.File {
	f, _ := ctx.Value(heldKey{}).(*os.File)
	return f
}

// Keep is another hold of the locks that a context has, if any: they last until release as well, whatever becomes of the first one.
func Keep(ctx context.Context) (kept context.Context, release func(), err error) {
	f := Held(ctx)
	if f == nil {
		return ctx, func() {}, nil
	}
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0) // of the same open file, which the locks are of
	if err != nil {
		return nil, nil, os.NewSyscallError("fcntl", err)
	}
	other := os.NewFile(uintptr(fd), f.Name())
	return context.WithValue(ctx, heldKey{}, other), func() { other.Close() }, nil
}

func lockByte(ctx context.Context, f *os.File, at int64, hopeless func() error) error {
	l := unix.Flock_t{Type: unix.F_WRLCK, Start: at, Len: 1}
	asked := time.Now()
	for wait := time.Millisecond; ; wait = min(2*wait, 50*time.Millisecond) {
		err := unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLK, &l)
		if !errors.Is(err, unix.EAGAIN) {
			return err
		}
		if hopeless != nil && time.Since(asked) > time.Second {
			asked = time.Now()
			if err := hopeless(); err != nil {
				return err
			}
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(wait):
		}
	}
}
