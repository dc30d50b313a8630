package vdocker

import (
	"errors"
	"io"
	"os"
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Large files go past the page cache, where the file system can: the guest's memory is small, its processor does not copy them once
// more, and the disk works while the next piece is on its way through the stream.

// directSize is from where on that is worth the effort.
const directSize = 8 << 20

const (
	smallPiece = 1 << 20
	largePiece = 4 << 20
	pieces     = 2
	maxParts   = 64 // at a time; a piece with holes is written in parts
)

// large belongs to the one bulk that has large pieces: each piece costs the file system and the disk's driver something besides its
// bytes, but several of that size are too much for a small guest.
var large sync.Mutex

// bulk moves one file at a time.
type bulk struct {
	memory []byte
	size   int64          // of a piece
	bufs   [pieces][]byte // in huge pages, where there are some: the fewer pages, the less there is to do for each piece
	aio    *aio
	direct bool // the file of the moment goes past the page cache
}

// open prepares for a file and tells whether it can go past the page cache.
func (b *bulk) open(f *os.File) bool {
	if b.memory == nil {
		b.size = smallPiece
		if hasRoom() && large.TryLock() {
			b.size = largePiece
		}
		size := uintptr(pieces * b.size)
		memory, err := unix.Mmap(-1, 0, int(2*size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_NORESERVE)
		if err != nil {
			b.giveUp()
			return false
		}
		b.memory = memory
		aligned := memory[-uintptr(unsafe.Pointer(unsafe.SliceData(memory)))%size:][:size]
		_ = unix.Madvise(aligned, unix.MADV_HUGEPAGE)
		for i := range b.bufs {
			b.bufs[i] = aligned[int64(i)*b.size:][:b.size]
		}
	}
	if b.aio == nil {
		var err error
		if b.aio, err = newAIO(maxParts); err != nil {
			return false
		}
	}
	b.aio.quick = onScratch(f)
	b.direct = setDirect(f, true) == nil
	return b.direct
}

// hasRoom says whether large pieces are but a small part of the guest's memory.
func hasRoom() bool {
	var info unix.Sysinfo_t
	return unix.Sysinfo(&info) == nil && info.Totalram*uint64(info.Unit) >= 16*pieces*largePiece
}

// onScratch tells whether a file is a container's own: where its disk does not answer, nothing else in the pod does either.
func onScratch(f *os.File) bool {
	var st unix.Statfs_t
	return unix.Fstatfs(int(f.Fd()), &st) == nil && st.Type == unix.OVERLAYFS_SUPER_MAGIC
}

func (b *bulk) close() {
	b.stop()
	if b.memory != nil {
		_ = unix.Munmap(b.memory)
		b.memory = nil
	}
	b.giveUp()
}

func (b *bulk) giveUp() {
	if b.size == largePiece {
		large.Unlock()
	}
	b.size = 0
}

// stop waits for what is pending after an error.
func (b *bulk) stop() {
	if b.aio != nil {
		b.aio.close()
		b.aio = nil
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

// indirect lets the rest of the file go through the page cache.
func (b *bulk) indirect(f *os.File) error {
	b.direct = false
	return setDirect(f, false)
}

// moved makes sense of what wait gives: how much is done of a part, the rest being left to a call that tells why.
func (b *bulk) moved(f *os.File, res, want int) (int, error) {
	switch {
	case res == -int(unix.EINVAL) && b.direct: // the file system has other ideas about direct I/O
		return 0, b.indirect(f)
	case res < 0:
		return 0, unix.Errno(-res)
	case res < want && b.direct:
		return res, b.indirect(f)
	}
	return res, nil
}

// read gives size bytes of the file to write, reading ahead.
func (b *bulk) read(f *os.File, size int64, write func([]byte) error) (err error) {
	defer func() {
		if err != nil {
			b.stop()
		}
	}()
	var want, got [pieces]int
	ahead := int64(0)
	for at := int64(0); at < size; at += b.size {
		for ; ahead < min(size, at+pieces*b.size); ahead += b.size {
			k := int(ahead / b.size % pieces)
			want[k], got[k] = int(min(b.size, size-ahead)), -1
			if err := b.aio.submit(aioRead, f, b.bufs[k], ahead, k); err != nil {
				return err
			}
		}
		k := int(at / b.size % pieces)
		buf := b.bufs[k][:want[k]]
		for got[k] < 0 {
			i, res, err := b.aio.wait()
			if err != nil {
				return err
			}
			if got[i], err = b.moved(f, res, want[i]); err != nil {
				return &os.PathError{Op: "read", Path: f.Name(), Err: err}
			}
		}
		for n := got[k]; n < len(buf); {
			m, err := f.ReadAt(buf[n:], at+int64(n))
			if errors.Is(err, io.EOF) { // it has shrunk
				clear(buf[n+m:])
				break
			}
			if err != nil {
				return err
			}
			n += m
		}
		if err := write(buf); err != nil {
			return err
		}
	}
	return nil
}

// write fills the file with size bytes that read gives, writing behind. Blocks of zeros become holes.
func (b *bulk) write(f *os.File, size int64, read func([]byte) error) (err error) {
	defer func() {
		if err != nil {
			b.stop()
		}
	}()
	// A file system may write behind only inside of the file.
	if err := f.Truncate(size); err != nil {
		return err
	}
	type part struct {
		bytes []byte
		at    int64
		piece int
	}
	var parts [maxParts]part
	var pending [pieces]int // parts of a piece
	free := make([]int, 0, maxParts)
	for i := range parts {
		free = append(free, i)
	}
	wait := func() error {
		i, res, err := b.aio.wait()
		if err != nil {
			return err
		}
		p := &parts[i]
		n, err := b.moved(f, res, len(p.bytes))
		if err != nil {
			return &os.PathError{Op: "write", Path: f.Name(), Err: err}
		}
		if n < len(p.bytes) {
			if _, err := f.WriteAt(p.bytes[n:], p.at+int64(n)); err != nil {
				return err
			}
		}
		pending[p.piece]--
		free = append(free, i)
		return nil
	}
	for at := int64(0); at < size; at += b.size {
		k := int(at / b.size % pieces)
		for pending[k] > 0 {
			if err := wait(); err != nil {
				return err
			}
		}
		buf := b.bufs[k][:min(b.size, size-at)]
		if err := read(buf); err != nil {
			return err
		}
		if len(buf)%hole != 0 && b.direct { // the last piece
			for b.aio.pending > 0 {
				if err := wait(); err != nil {
					return err
				}
			}
			if err := b.indirect(f); err != nil {
				return err
			}
		}
		err := eachRun(buf, func(run []byte, skip int) error {
			for len(free) == 0 {
				if err := wait(); err != nil {
					return err
				}
			}
			i := free[len(free)-1]
			free = free[:len(free)-1]
			parts[i] = part{run, at + int64(skip), k}
			pending[k]++
			return b.aio.submit(aioWrite, f, run, parts[i].at, i)
		})
		if err != nil {
			return err
		}
	}
	for b.aio.pending > 0 {
		if err := wait(); err != nil {
			return err
		}
	}
	return nil
}
