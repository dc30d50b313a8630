package vmm

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// All pods of a template on a host map one memfd that is sealed: not one of them, nor a QEMU that its guest has taken over, can change
// what the others see. It lives as long as somebody holds it: each process that starts machines from it says so in the template's
// directory (holders/PID-STARTTIME, holding the file descriptor's number), where the next one finds it.

const seals = unix.F_SEAL_WRITE | unix.F_SEAL_SHRINK | unix.F_SEAL_GROW | unix.F_SEAL_SEAL

const pageSize = 4096

var zeroPage [pageSize]byte

func memfdName(key string) string { return "cradle-template-" + key }

func newMemfd(key string, size int64) (*os.File, error) {
	fd, err := unix.MemfdCreate(memfdName(key), unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING|unix.MFD_NOEXEC_SEAL)
	if errors.Is(err, unix.EINVAL) { // before Linux 6.3
		fd, err = unix.MemfdCreate(memfdName(key), unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	}
	if err != nil {
		return nil, fmt.Errorf("memfd_create: %w", err)
	}
	f := os.NewFile(uintptr(fd), memfdName(key))
	// QEMU runs as another user and opens it by /proc/self/fd.
	if err := errors.Join(f.Truncate(size), f.Chmod(0o666)); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

func seal(f *os.File) error {
	if _, err := unix.FcntlInt(f.Fd(), unix.F_ADD_SEALS, seals); err != nil {
		return fmt.Errorf("seal template memory: %w", err)
	}
	return nil
}

// digestSparse copies the pages of from that are not zero to to, which may be nil, and returns how many they are and their digest:
// sha256 over each one's offset (64 bits, little-endian) and content.
func digestSparse(to, from *os.File) (pages int64, digest string, err error) {
	h := sha256.New()
	buf := make([]byte, 256*pageSize)
	err = eachExtent(from, func(start, end int64) error {
		for off := start; off < end; {
			n, err := from.ReadAt(buf[:min(int64(len(buf)), end-off)], off)
			if err != nil {
				return err // sizes are whole pages: the file is being changed
			}
			for i := 0; i < n; i += pageSize {
				page := buf[i : i+pageSize]
				if bytes.Equal(page, zeroPage[:]) {
					continue
				}
				pages++
				at := off + int64(i)
				h.Write(binary.LittleEndian.AppendUint64(nil, uint64(at)))
				h.Write(page)
				if to != nil {
					if _, err := to.WriteAt(page, at); err != nil {
						return err
					}
				}
			}
			off += int64(n)
		}
		return nil
	})
	return pages, hex.EncodeToString(h.Sum(nil)), err
}

// eachExtent calls f for each piece of a file that is no hole, in whole pages.
func eachExtent(file *os.File, f func(start, end int64) error) error {
	fi, err := file.Stat()
	if err != nil {
		return err
	}
	size, fd := fi.Size(), int(file.Fd())
	for off := int64(0); off < size; {
		start, err := unix.Seek(fd, off, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("%s: %w", file.Name(), err)
		}
		end, err := unix.Seek(fd, start, unix.SEEK_HOLE)
		if err != nil {
			return fmt.Errorf("%s: %w", file.Name(), err)
		}
		start, end = start&^(pageSize-1), min((end+pageSize-1)&^(pageSize-1), size)
		if err := f(start, end); err != nil {
			return err
		}
		off = end
	}
	return nil
}

// copyExtents copies what is no hole, without looking at it, inside the kernel.
func copyExtents(to, from *os.File) error {
	return eachExtent(from, func(start, end int64) error {
		if _, err := unix.Seek(int(to.Fd()), start, io.SeekStart); err != nil {
			return fmt.Errorf("%s: %w", to.Name(), err)
		}
		for start < end {
			n, err := unix.Sendfile(int(to.Fd()), int(from.Fd()), &start, int(end-start))
			if errors.Is(err, unix.EINTR) {
				continue
			}
			if err == nil && n == 0 {
				err = io.ErrUnexpectedEOF
			}
			if err != nil {
				return fmt.Errorf("copy %s: %w", from.Name(), err)
			}
		}
		return nil
	})
}

// A memory is a template's RAM as this process holds it.
type memory struct {
	file *os.File
	id   string // of the template's directory: a template that was made again is another one
	refs int
	note string // path of the holder's note

	filled chan struct{} // closed when all of it is there and sealed, or err says why not
	err    error
}

// held are the memories that this process holds, by template directory.
var held = struct {
	sync.Mutex
	memories map[string]*memory
}{memories: map[string]*memory{}}

// hold gives the memory of the template in dir: the one this process has, or another holder's, or a new one that fill has made. What fill
// returns besides finishes it, while others already begin to use it.
func hold(dir string, size int64, digest string, fill func() (*os.File, func() error, error)) (*memory, error) {
	held.Lock()
	defer held.Unlock()
	id := dir + " " + digest
	if m := held.memories[id]; m != nil {
		m.refs++
		return m, nil
	}
	m := &memory{file: adopt(dir, size), id: id, refs: 1, filled: make(chan struct{})}
	finish, unlock := func() error { return nil }, func() {}
	if m.file == nil {
		m.file, unlock = claim(dir, size)
	}
	if m.file == nil {
		var err error
		if m.file, finish, err = fill(); err != nil {
			unlock()
			return nil, err
		}
	}
	held.memories[id] = m
	go func() {
		defer close(m.filled)
		defer unlock()
		if m.err = finish(); m.err == nil {
			m.err = m.announce(dir)
		}
	}()
	return m, nil
}

// fillTimeout is how long a process waits for another one to fill the memory that both need.
const fillTimeout = 5 * time.Second

// claim gives the memory that another process has just filled, or none and the right to fill it: of many that start at once, one fills it and the others use the
// same. Where that one takes too long, there is neither, and whoever has waited fills one of its own.
func claim(dir string, size int64) (file *os.File, unlock func()) {
	nobody := func() {}
	f, err := os.OpenFile(filepath.Join(dir, "filling"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, nobody // this only saves memory
	}
	for begin := time.Now(); ; time.Sleep(2 * time.Millisecond) {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		// What was announced until the lock was had is seen now.
		if file := adopt(dir, size); file != nil {
			f.Close()
			return file, nobody
		}
		if err == nil {
			return nil, func() { f.Close() }
		}
		if time.Since(begin) > fillTimeout {
			f.Close()
			return nil, nobody
		}
	}
}

// wait returns when the memory is complete.
func (m *memory) wait(ctx context.Context) error {
	select {
	case <-m.filled:
		return m.err
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// release lets go of a memory; with its last user it is gone from this process.
func (m *memory) release() {
	if m == nil {
		return
	}
	held.Lock()
	defer held.Unlock()
	if m.refs--; m.refs > 0 {
		return
	}
	delete(held.memories, m.id)
	<-m.filled
	if m.note != "" {
		os.Remove(m.note)
	}
	m.file.Close()
}

func (m *memory) announce(dir string) error {
	start, err := startTime(os.Getpid())
	if err != nil {
		return err
	}
	holders := filepath.Join(dir, "holders")
	if err := os.MkdirAll(holders, 0o700); err != nil {
		return err
	}
	m.note = filepath.Join(holders, fmt.Sprintf("%d-%d", os.Getpid(), start))
	return os.WriteFile(m.note, strconv.AppendUint(nil, uint64(m.file.Fd()), 10), 0o600)
}

// adopt opens the memory of a process that holds it, nil if there is none. Notes of processes that have ended are removed.
func adopt(dir string, size int64) *os.File {
	notes, err := os.ReadDir(filepath.Join(dir, "holders"))
	if err != nil {
		return nil
	}
	for _, n := range notes {
		p, s, _ := strings.Cut(n.Name(), "-")
		pid, perr := strconv.Atoi(p)
		start, serr := strconv.ParseUint(s, 10, 64)
		if perr != nil || serr != nil {
			continue
		}
		path := filepath.Join(dir, "holders", n.Name())
		if now, err := startTime(pid); err != nil || now != start {
			os.Remove(path)
			continue
		}
		data, err := os.ReadFile(path)
		if err != nil {
			continue
		}
		fd, err := strconv.ParseUint(string(data), 10, 31)
		if err != nil {
			continue
		}
		if f := adoptFrom(pid, start, fd, filepath.Base(dir), size); f != nil {
			return f
		}
	}
	return nil
}

// adoptFrom opens file descriptor fd of a process of root's, if it is a template's memory with all its seals. What a process of
// another user holds could be anything.
func adoptFrom(pid int, start, fd uint64, key string, size int64) *os.File {
	var st unix.Stat_t
	if unix.Stat(fmt.Sprintf("/proc/%d", pid), &st) != nil || st.Uid != 0 {
		return nil
	}
	f, err := os.OpenFile(fmt.Sprintf("/proc/%d/fd/%d", pid, fd), os.O_RDWR, 0)
	if err != nil {
		return nil
	}
	// The number may have become another process's, or the descriptor another file's, since the note was written.
	now, err := startTime(pid)
	if err == nil && now == start && isSealedMemory(f, key, size) {
		return f
	}
	f.Close()
	return nil
}

func isSealedMemory(f *os.File, key string, size int64) bool {
	fi, err := f.Stat()
	if err != nil || fi.Size() != size {
		return false
	}
	name, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", f.Fd()))
	if err != nil || name != "/memfd:"+memfdName(key)+" (deleted)" {
		return false
	}
	got, err := unix.FcntlInt(f.Fd(), unix.F_GET_SEALS, 0)
	return err == nil && got&seals == seals
}
