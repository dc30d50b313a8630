package mount

import (
	"context"
	"errors"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Who copies a volume, and who deletes it meanwhile, agree by locks of names that no volume has, in whatever processes they are.
const (
	Copying    = "copy:"    // + a volume's name: something is open, or there is something else, that is in the way of the volume's deletion
	saving     = "save:"    // + a volume's name: a copy is being made of it
	reclaiming = "reclaim:" // + a volume's name: it is being deleted, and no copy is to be in the way
)

// A Lease is what is read of a volume until it is closed, or somebody reclaims the volume.
type Lease struct {
	id     string
	locks  *os.File
	ctx    context.Context // ends when the volume is reclaimed
	cancel context.CancelCauseFunc

	watch  sync.WaitGroup
	closed chan struct{}

	mu      sync.RWMutex // held for reading by who reads
	disk    *os.File     // nil before Read
	release func() error
	over    error // why there is nothing to read any more
	err     error // release's
}

// Lend waits until nobody else makes a copy of a volume. f is a file of locks, which it takes over. Once somebody reclaims the volume, its context ends with the cause gone, and the caller closes it; or, where
// it reads already, all further reading fails with gone, as soon as what was being read is: who makes the copy closes it when it comes to that.
func Lend(ctx context.Context, f *os.File, id string, gone error) (*Lease, error) {
	f, err := Lock(ctx, f, saving+id)
	if err == nil {
		f, err = Lock(ctx, f, Copying+id) // after that: who waits for the right to make a copy is in nobody's way
	}
	if err != nil {
		return nil, err
	}
	l := &Lease{id: id, locks: f, closed: make(chan struct{})}
	l.ctx, l.cancel = context.WithCancelCause(Holding(ctx, f))
	l.watch.Go(func() { l.look(gone) })
	return l, nil
}

// Context is for what is done before reading begins. What runs with it keeps the lease's locks.
func (l *Lease) Context() context.Context { return l.ctx }

// lookEvery is how often a lease looks whether its volume is reclaimed.
const lookEvery = 100 * time.Millisecond

func (l *Lease) look(gone error) {
	t := time.NewTicker(lookEvery)
	defer t.Stop()
	for {
		select {
		case <-l.closed:
			return
		case <-t.C:
		}
		by := unix.Flock_t{Type: unix.F_WRLCK, Start: lockOffset(reclaiming + l.id), Len: 1}
		if err := unix.FcntlFlock(l.locks.Fd(), unix.F_OFD_GETLK, &by); err == nil && by.Type != unix.F_UNLCK {
			l.cancel(gone)
			l.mu.Lock()
			defer l.mu.Unlock()
			if l.disk != nil {
				l.end(gone)
			} // else who opens it is still at work
			return
		}
	}
}

// Read begins with reading from a disk, which the lease closes. release, which is called once, undoes what was done for that.
func (l *Lease) Read(disk *os.File, release func() error) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.disk, l.release = disk, release
	if l.ctx.Err() == nil {
		return nil
	}
	l.end(context.Cause(l.ctx))
	return errors.Join(l.over, l.err)
}

// ReadAt is io.ReaderAt's.
func (l *Lease) ReadAt(p []byte, off int64) (int, error) {
	l.mu.RLock()
	defer l.mu.RUnlock()
	if l.over != nil {
		return 0, l.over
	}
	return l.disk.ReadAt(p, off)
}

// end lets go of the disk, and of the volume, but not yet of the right to make a copy: whoever makes the next one would not know of what this one still writes.
func (l *Lease) end(why error) {
	if l.over != nil {
		return
	}
	l.over = why
	if l.disk != nil {
		l.err = errors.Join(l.disk.Close(), l.release())
	}
	l.err = errors.Join(l.err, Unlock(l.ctx, Copying+l.id, saving+l.id))
}

// Close is io.Closer's. It ends a lease from which nothing was read, too.
func (l *Lease) Close() error {
	close(l.closed)
	l.watch.Wait()
	l.mu.Lock()
	defer l.mu.Unlock()
	l.end(os.ErrClosed)
	l.cancel(os.ErrClosed)
	return errors.Join(l.err, l.locks.Close())
}

// Reclaim has who reads a volume by a Lease let go of it, and waits for that. Until f, a file of locks, is closed nobody begins anew. It gives up with the error of hopeless, where that is
// not nil, which is asked every second.
func Reclaim(ctx context.Context, f *os.File, id string, hopeless func() error) error {
	for _, name := range []string{reclaiming, Copying} {
		if err := lockByte(ctx, f, lockOffset(name+id), hopeless); err != nil {
			return err
		}
	}
	return nil
}
