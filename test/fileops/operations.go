package main

import (
	"crypto/sha256"
	"fmt"
	"os"
	"runtime/debug"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// operations and how often they are done.
var operations = []struct {
	weight int
	do     func(*world) error
}{
	{12, (*world).open},
	{4, func(w *world) error { return w.withHandle(func(i int) error { return w.closeHandle(i) }) }},
	{20, (*world).write},
	{14, (*world).read},
	{5, (*world).truncate},
	{3, (*world).allocate},
	{6, (*world).mapped},
	{3, (*world).sync},
	{3, (*world).fstat},
	{6, (*world).mkdir},
	{6, (*world).rmdir},
	{5, (*world).unlink},
	{8, (*world).rename},
	{6, (*world).link},
	{3, (*world).symlink},
	{5, (*world).lstat},
	{3, (*world).chmod},
	{3, (*world).chown},
	{3, (*world).utimes},
	{4, (*world).readdir},
	{3, (*world).truncatePath},
}

func (w *world) withHandle(do func(i int) error) error {
	if len(w.handles) == 0 {
		return w.open()
	}
	return do(w.rnd.IntN(len(w.handles)))
}

func (w *world) open() error {
	if len(w.handles) >= maxHandles {
		if err := w.closeHandle(w.rnd.IntN(len(w.handles))); err != nil {
			return err
		}
	}
	path, mode := w.path(), mode([]uint32{0o600, 0o644, 0o666, 0o400, 0o000}[w.rnd.IntN(5)])
	if w.rnd.IntN(2) == 0 {
		path = w.there()
	}
	flags := []int{unix.O_RDONLY, unix.O_RDWR, unix.O_RDWR, unix.O_RDWR, unix.O_WRONLY}[w.rnd.IntN(5)]
	if w.missing["copyup"] && flags == unix.O_RDONLY {
		flags = unix.O_RDWR
	}
	for _, more := range []struct{ flag, of int }{
		{unix.O_CREAT, 2}, {unix.O_EXCL, 6}, {unix.O_TRUNC, 6}, {unix.O_APPEND, 5}, {unix.O_NOFOLLOW, 8}, {unix.O_SYNC, 12},
	} {
		if w.rnd.IntN(more.of) == 0 {
			flags |= more.flag
		}
	}
	if flags&unix.O_CREAT == 0 {
		flags &^= unix.O_EXCL // means nothing defined
	}
	if flags&(unix.O_TRUNC|unix.O_ACCMODE) == unix.O_TRUNC|unix.O_RDONLY {
		flags &^= unix.O_TRUNC // likewise
	}
	h := &handle{fd: [2]int{-1, -1}}
	err := w.both(fmt.Sprintf("open %q %#x %o", path, flags, mode), func(side int) string {
		fd, err := unix.Open(w.at(side, path), flags|unix.O_CLOEXEC, mode)
		if err != nil {
			var st unix.Stat_t
			if err == unix.ELOOP && w.missing["reasons"] && flags&unix.O_EXCL != 0 && unix.Lstat(w.at(side, path), &st) == nil && st.Mode&unix.S_IFMT == unix.S_IFLNK {
				err = unix.EEXIST
			}
			return errno(err)
		}
		h.fd[side] = fd
		var st unix.Stat_t
		if err := unix.Fstat(fd, &st); err != nil {
			return "fstat " + errno(err)
		}
		return "ok " + status(&st)
	})
	if h.fd[subject] >= 0 && h.fd[reference] >= 0 {
		w.handles = append(w.handles, h)
	}
	return err
}

func (w *world) closeHandle(i int) error {
	h := w.handles[i]
	w.handles = slices.Delete(w.handles, i, i+1)
	return w.both(fmt.Sprintf("close %d", h.fd[reference]), func(side int) string { return errno(unix.Close(h.fd[side])) })
}

// size is small, a page and a bit, or large.
func (w *world) size(most int) int {
	switch w.rnd.IntN(4) {
	case 0:
		return w.rnd.IntN(100)
	case 1:
		return min(most, 4096*(1+w.rnd.IntN(4))+w.rnd.IntN(3)-1)
	}
	return w.rnd.IntN(most)
}

func (w *world) data(n int) []byte {
	b := make([]byte, n)
	pattern := w.rnd.Uint64()
	for i := range b {
		b[i] = byte(pattern>>(i&7*8)) + byte(i>>8)
	}
	return b
}

func (w *world) write() error {
	return w.withHandle(func(i int) error {
		h, at := w.handles[i], int64(w.size(maxFile-64<<10))
		b := w.data(w.size(64 << 10))
		return w.both(fmt.Sprintf("write %d at %d: %d bytes", h.fd[reference], at, len(b)), func(side int) string {
			n, err := unix.Pwrite(h.fd[side], b, at)
			return fmt.Sprint(n, " ", errno(err))
		})
	})
}

func (w *world) read() error {
	return w.withHandle(func(i int) error {
		h, at, n := w.handles[i], int64(w.size(maxFile)), w.size(64<<10)
		return w.both(fmt.Sprintf("read %d at %d: %d bytes", h.fd[reference], at, n), func(side int) string {
			b := make([]byte, n)
			n, err := unix.Pread(h.fd[side], b, at)
			return fmt.Sprintf("%d %s %x", n, errno(err), digest(b[:max(n, 0)]))
		})
	})
}

func digest(b []byte) []byte {
	sum := sha256.Sum256(b)
	return sum[:8]
}

func (w *world) truncate() error {
	return w.withHandle(func(i int) error {
		h, size := w.handles[i], int64(w.size(maxFile))
		return w.both(fmt.Sprintf("truncate %d to %d", h.fd[reference], size), func(side int) string { return errno(unix.Ftruncate(h.fd[side], size)) })
	})
}

func (w *world) truncatePath() error {
	path, size := w.there(), int64(w.size(maxFile))
	return w.both(fmt.Sprintf("truncate %q to %d", path, size), func(side int) string { return errno(unix.Truncate(w.at(side, path), size)) })
}

func (w *world) allocate() error {
	return w.withHandle(func(i int) error {
		h, at, size := w.handles[i], int64(w.size(maxFile/2)), int64(w.size(maxFile/2))
		mode := []uint32{0, unix.FALLOC_FL_KEEP_SIZE, unix.FALLOC_FL_KEEP_SIZE | unix.FALLOC_FL_PUNCH_HOLE}[w.rnd.IntN(3)]
		return w.both(fmt.Sprintf("allocate %d mode %d at %d: %d bytes", h.fd[reference], mode, at, size), func(side int) string {
			return errno(unix.Fallocate(h.fd[side], mode, at, size))
		})
	})
}

// mapped reads a part of a file through a mapping, and writes to it.
func (w *world) mapped() error {
	return w.withHandle(func(i int) error {
		h, writes := w.handles[i], w.rnd.IntN(2) == 0
		var st unix.Stat_t
		if err := unix.Fstat(h.fd[reference], &st); err != nil || st.Size == 0 || st.Mode&unix.S_IFMT != unix.S_IFREG {
			return err
		}
		if w.missing["maplinked"] && st.Nlink != 1 || w.missing["mapappend"] && writes && w.appended(st.Ino) {
			return nil
		}
		from := w.rnd.Int64N(st.Size) &^ 4095
		n := int(min(st.Size-from, int64(1+w.rnd.IntN(64<<10))))
		b := w.data(w.rnd.IntN(n) + 1)
		what := "map"
		protection := unix.PROT_READ
		if writes {
			what, protection = fmt.Sprintf("map and write %d bytes of", len(b)), protection|unix.PROT_WRITE
		}
		return w.both(fmt.Sprintf("%s %d at %d: %d bytes", what, h.fd[reference], from, n), func(side int) string {
			m, err := unix.Mmap(h.fd[side], from, n, protection, unix.MAP_SHARED)
			if err != nil {
				return errno(err)
			}
			defer unix.Munmap(m)
			return touch(m, b, writes)
		})
	})
}

// appended says whether a file is open for appending.
func (w *world) appended(ino uint64) bool {
	return slices.ContainsFunc(w.handles, func(h *handle) bool {
		var st unix.Stat_t
		flags, err := unix.FcntlInt(uintptr(h.fd[reference]), unix.F_GETFL, 0)
		return err == nil && flags&unix.O_APPEND != 0 && unix.Fstat(h.fd[reference], &st) == nil && st.Ino == ino
	})
}

// touch reads from a mapping and writes b to it.
func touch(m, b []byte, writes bool) (result string) {
	defer func() {
		if fault := recover(); fault != nil {
			result = fmt.Sprint(fault) // SIGBUS, where there is no file behind the mapping
		}
	}()
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	sum := digest(m)
	if !writes {
		return fmt.Sprintf("%x", sum)
	}
	copy(m, b)
	return fmt.Sprintf("%x, %s", sum, errno(unix.Msync(m, unix.MS_SYNC)))
}

func (w *world) sync() error {
	return w.withHandle(func(i int) error {
		h, data := w.handles[i], w.rnd.IntN(2) == 0
		return w.both(fmt.Sprintf("sync %d", h.fd[reference]), func(side int) string {
			if data {
				return errno(unix.Fdatasync(h.fd[side]))
			}
			return errno(unix.Fsync(h.fd[side]))
		})
	})
}

func (w *world) fstat() error {
	return w.withHandle(func(i int) error {
		h := w.handles[i]
		var st unix.Stat_t
		if err := unix.Fstat(h.fd[reference], &st); err != nil || st.Nlink == 0 {
			return err // without a name: how many links it has is told in different ways
		}
		return w.both(fmt.Sprintf("fstat %d", h.fd[reference]), func(side int) string {
			var st unix.Stat_t
			if err := unix.Fstat(h.fd[side], &st); err != nil {
				return errno(err)
			}
			return status(&st)
		})
	})
}

func (w *world) mkdir() error {
	path, mode := w.path(), []uint32{0o755, 0o700, 0o1777}[w.rnd.IntN(3)]
	return w.both(fmt.Sprintf("mkdir %q %o", path, mode), func(side int) string { return errno(unix.Mkdir(w.at(side, path), mode)) })
}

func (w *world) rmdir() error {
	// A client of NFS keeps open files that have lost their names where they were.
	if err := w.closeUnlinked(); err != nil {
		return err
	}
	path := w.there()
	return w.both(fmt.Sprintf("rmdir %q", path), func(side int) string { return errno(unix.Rmdir(w.at(side, path))) })
}

func (w *world) closeUnlinked() error {
	for i := len(w.handles) - 1; i >= 0; i-- {
		var st unix.Stat_t
		if err := unix.Fstat(w.handles[i].fd[reference], &st); err != nil || st.Nlink > 0 {
			continue
		}
		if err := w.closeHandle(i); err != nil {
			return err
		}
	}
	return nil
}

// closeNamed closes what is open of the file with that name, where the file system has trouble with files that lose their names.
func (w *world) closeNamed(path string) error {
	var named, open unix.Stat_t
	there := unix.Lstat(w.at(reference, path), &named) == nil
	if !there || !w.missing["unlinked"] && !(w.missing["unlinkedlinks"] && named.Nlink > 1) {
		return nil
	}
	for i := len(w.handles) - 1; i >= 0; i-- {
		if err := unix.Fstat(w.handles[i].fd[reference], &open); err != nil || open.Ino != named.Ino {
			continue
		}
		if err := w.closeHandle(i); err != nil {
			return err
		}
	}
	return nil
}

func (w *world) unlink() error {
	path := w.there()
	if err := w.closeNamed(path); err != nil {
		return err
	}
	return w.both(fmt.Sprintf("unlink %q", path), func(side int) string { return errno(unix.Unlink(w.at(side, path))) })
}

func (w *world) rename() error {
	from, to := w.there(), w.path()
	if err := w.closeNamed(to); err != nil {
		return err
	}
	if err := w.closeUnlinked(); err != nil { // they may be in the directory that is replaced
		return err
	}
	flags := uint([]int{0, 0, 0, unix.RENAME_NOREPLACE, unix.RENAME_EXCHANGE}[w.rnd.IntN(5)])
	return w.both(fmt.Sprintf("rename %q %q %d", from, to, flags), func(side int) string {
		err := unix.Renameat2(unix.AT_FDCWD, w.at(side, from), unix.AT_FDCWD, w.at(side, to), flags)
		if err == unix.EEXIST && w.missing["reasons"] && flags == unix.RENAME_NOREPLACE && within(to, from) {
			err = unix.EINVAL
		}
		if side == subject && (flags != 0 && err == unix.EINVAL && !within(from, to) && !within(to, from) || err == unix.EXDEV) {
			return "EOPNOTSUPP" // no such flags; or a directory that a layer of an image has, which overlayfs does not move
		}
		return errno(err)
	})
}

// within says whether a path is below another one: moving something into itself is EINVAL everywhere.
func within(path, dir string) bool { return strings.HasPrefix(path+"/", dir+"/") }

func (w *world) link() error {
	from, to := w.there(), w.path()
	return w.both(fmt.Sprintf("link %q %q", from, to), func(side int) string {
		err := unix.Linkat(unix.AT_FDCWD, w.at(side, from), unix.AT_FDCWD, w.at(side, to), 0)
		var st unix.Stat_t
		if err == unix.EEXIST && w.missing["reasons"] && unix.Lstat(w.at(side, from), &st) == nil && st.Mode&unix.S_IFMT == unix.S_IFDIR {
			err = unix.EPERM
		}
		return errno(err)
	})
}

func (w *world) symlink() error {
	to, path := w.path(), w.path()
	return w.both(fmt.Sprintf("symlink %q %q", to, path), func(side int) string { return errno(unix.Symlink(to, w.at(side, path))) })
}

func (w *world) lstat() error {
	path := w.there()
	return w.both(fmt.Sprintf("lstat %q", path), func(side int) string {
		text, err := describe(w.at(side, path))
		if err != nil {
			return errno(err)
		}
		return text
	})
}

func (w *world) chmod() error {
	path, mode := w.there(), mode(uint32(w.rnd.IntN(0o1000)))
	return w.both(fmt.Sprintf("chmod %q %o", path, mode), func(side int) string { return errno(unix.Chmod(w.at(side, path), mode)) })
}

func (w *world) chown() error {
	path, uid, gid := w.there(), w.rnd.IntN(3)*1000, w.rnd.IntN(3)*1000
	return w.both(fmt.Sprintf("chown %q %d:%d", path, uid, gid), func(side int) string { return errno(unix.Lchown(w.at(side, path), uid, gid)) })
}

func (w *world) utimes() error {
	path, grain := w.there(), int64(1)
	if w.missing["nanoseconds"] {
		grain = 1e9
	}
	times := []unix.Timespec{{Sec: w.rnd.Int64N(2e9), Nsec: w.rnd.Int64N(1e9)}, {Sec: w.rnd.Int64N(2e9), Nsec: w.rnd.Int64N(1e9)}}
	return w.both(fmt.Sprintf("utimes %q", path), func(side int) string {
		var st unix.Stat_t
		if w.missing["linktimes"] && unix.Lstat(w.at(reference, path), &st) == nil && st.Mode&unix.S_IFMT == unix.S_IFLNK {
			return "a link"
		}
		if err := unix.UtimesNanoAt(unix.AT_FDCWD, w.at(side, path), times, unix.AT_SYMLINK_NOFOLLOW); err != nil {
			return errno(err)
		}
		if err := unix.Lstat(w.at(side, path), &st); err != nil {
			return "lstat " + errno(err)
		}
		return fmt.Sprint(st.Mtim.Sec, st.Mtim.Nsec/grain)
	})
}

func (w *world) readdir() error {
	path := "."
	if w.rnd.IntN(3) > 0 {
		path = w.there()
	}
	return w.both(fmt.Sprintf("readdir %q", path), func(side int) string {
		entries, err := os.ReadDir(w.at(side, path))
		if err != nil {
			return errno(err)
		}
		var all []string
		for _, e := range entries {
			if !strings.HasPrefix(e.Name(), ".nfs0") {
				all = append(all, fmt.Sprintf("%q %v", e.Name(), e.Type()))
			}
		}
		return strings.Join(all, ", ")
	})
}
