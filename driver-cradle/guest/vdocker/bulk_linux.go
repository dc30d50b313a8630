package vdocker

import (
	"errors"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// Large files go past the page cache, where the file system can: the guest's memory is small, its processor does not copy them once
// more, and the disk works while the next piece is on its way through the stream.

// directSize is from where on that is worth the effort.
const directSize = 8 << 20

// bulk has the buffers for one transfer at a time, aligned as direct I/O asks.
type bulk struct{ bufs [2][]byte }

// buffers gives them, made at the first use.
func (b *bulk) buffers() (free chan []byte, err error) {
	free = make(chan []byte, len(b.bufs))
	for i := range b.bufs {
		if b.bufs[i] == nil {
			if b.bufs[i], err = unix.Mmap(-1, 0, copyBuffer, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS); err != nil {
				return nil, os.NewSyscallError("mmap", err)
			}
		}
		free <- b.bufs[i]
	}
	return free, nil
}

func (b *bulk) close() {
	for _, buf := range b.bufs {
		if buf != nil {
			_ = unix.Munmap(buf)
		}
	}
}

// setDirect switches direct I/O of an open file.
func setDirect(f *os.File, on bool) error {
	flags, err := unix.FcntlInt(f.Fd(), unix.F_GETFL, 0)
	if err != nil {
		return err
	}
	flags &^= unix.O_DIRECT
	if on {
		flags |= unix.O_DIRECT
	}
	_, err = unix.FcntlInt(f.Fd(), unix.F_SETFL, flags)
	return err
}

// piece is a part of a file.
type piece struct {
	bytes []byte
	err   error
}

// read gives size bytes of the file to write, reading ahead.
func (b *bulk) read(f *os.File, size int64, write func([]byte) error) error {
	free, err := b.buffers()
	if err != nil {
		return err
	}
	direct := setDirect(f, true) == nil
	full := make(chan piece, len(b.bufs))
	go func() {
		defer close(full)
		for at := int64(0); at < size; {
			buf, ok := <-free
			if !ok {
				return
			}
			n, err := f.ReadAt(buf, at)
			if errors.Is(err, unix.EINVAL) && direct {
				direct = false
				if err = setDirect(f, false); err == nil {
					n, err = f.ReadAt(buf, at)
				}
			}
			if errors.Is(err, io.EOF) {
				// It has shrunk, or this is its end.
				clear(buf[n:])
				n, err = len(buf), nil
			}
			at += int64(n)
			full <- piece{buf[:n], err}
			if err != nil {
				return
			}
		}
	}()
	left := size
	for p := range full {
		if err == nil {
			err = p.err
		}
		if err != nil {
			continue
		}
		n := min(int64(len(p.bytes)), left)
		left -= n
		if err = write(p.bytes[:n]); err != nil {
			close(free)
			continue
		}
		free <- p.bytes[:cap(p.bytes)]
	}
	return err
}

// write fills the file with size bytes that read gives, writing behind. Blocks of zeros become holes.
func (b *bulk) write(f *os.File, size int64, read func([]byte) error) error {
	free, err := b.buffers()
	if err != nil {
		return err
	}
	direct := setDirect(f, true) == nil
	full, failed := make(chan []byte, len(b.bufs)), make(chan error, 1)
	written := make(chan struct{})
	go func() {
		defer close(written)
		at := int64(0)
		for buf := range full {
			if direct && len(buf)%hole != 0 { // the last piece
				direct = false
				_ = setDirect(f, false)
			}
			err := writeSparse(f, buf, at)
			if errors.Is(err, unix.EINVAL) && direct {
				direct = false
				if err = setDirect(f, false); err == nil {
					err = writeSparse(f, buf, at)
				}
			}
			if err != nil {
				failed <- err
				return
			}
			at += int64(len(buf))
			free <- buf[:cap(buf)]
		}
	}()
	for left := size; left > 0 && err == nil; {
		select {
		case buf := <-free:
			buf = buf[:min(left, int64(len(buf)))]
			if err = read(buf); err == nil {
				left -= int64(len(buf))
				full <- buf
			}
		case err = <-failed:
		}
	}
	close(full)
	<-written
	select {
	case werr := <-failed:
		err = errors.Join(err, werr)
	default:
	}
	if err != nil {
		return err
	}
	return f.Truncate(size)
}
