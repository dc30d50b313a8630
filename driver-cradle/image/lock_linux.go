package image

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// lockPoll is how often a taken lock is tried again: flock(2) can be waited for, but then not given up.
const lockPoll = 20 * time.Millisecond

// A fileLock is an flock(2) on a file that exists for nothing else. It belongs to the open file, so it excludes
// goroutines of one process as well as processes, and it ends with the process.
type fileLock struct {
	file   *os.File
	unlink bool
}

// lockFile waits for the lock at path until ctx ends; how is unix.LOCK_EX or unix.LOCK_SH. A lock file that comes and goes
// (unlink) is removed by its last exclusive holder; taking it therefore checks that the name still means the locked file.
func lockFile(ctx context.Context, path string, how int, unlink bool) (*fileLock, error) {
	for {
		l, err := tryLock(path, how, unlink)
		if l != nil || err != nil {
			return l, err
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("wait for lock %s: %w", path, context.Cause(ctx))
		case <-time.After(lockPoll):
		}
	}
}

// tryLock returns nil, nil where someone else holds the lock.
func tryLock(path string, how int, unlink bool) (*fileLock, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	if err := flock(f, how|unix.LOCK_NB); err != nil {
		f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, nil
		}
		return nil, &fs.PathError{Op: "flock", Path: path, Err: err}
	}
	if !sameFile(f, path) {
		f.Close()
		return nil, nil
	}
	return &fileLock{f, unlink}, nil
}

func (l *fileLock) release() {
	if l.unlink {
		_ = os.Remove(l.file.Name())
	}
	l.file.Close()
}

func sameFile(f *os.File, path string) bool {
	a, err := f.Stat()
	if err != nil {
		return false
	}
	b, err := os.Stat(path)
	return err == nil && os.SameFile(a, b)
}

func flock(f *os.File, how int) error {
	for {
		err := unix.Flock(int(f.Fd()), how)
		if !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

// freeSpace is what an unprivileged writer could still write to the file system of path, and its whole size.
func freeSpace(path string) (free, total int64, err error) {
	var st unix.Statfs_t
	if err := unix.Statfs(path, &st); err != nil {
		return 0, 0, &fs.PathError{Op: "statfs", Path: path, Err: err}
	}
	return int64(st.Bavail) * st.Bsize, int64(st.Blocks) * st.Bsize, nil
}

const (
	lockExclusive = unix.LOCK_EX
	lockShared    = unix.LOCK_SH
)

// diskUsage is what a file takes, which is less than its size where it has holes.
func diskUsage(fi fs.FileInfo) int64 {
	if st, ok := fi.Sys().(*syscall.Stat_t); ok {
		return st.Blocks * 512
	}
	return fi.Size()
}
