package guest

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// copyMark is in a volume while content is being copied into it: a copy that was cut short begins anew.
const copyMark = ".cradle-copying"

// fillVolume copies the image's content, a directory, into a volume if that is empty. shared says that other guests may have the volume
// at the same time: what is there is theirs. copied, which may be nil, is told how many bytes each piece has.
func fillVolume(volume, source string, shared bool, copied func(int)) error {
	entries, err := os.ReadDir(volume)
	if err != nil {
		return err
	}
	interrupted := false
	for _, e := range entries {
		interrupted = interrupted || e.Name() == copyMark
	}
	if len(entries) > 0 && !interrupted {
		return nil
	}
	st, err := os.Lstat(source)
	if errors.Is(err, fs.ErrNotExist) || err == nil && !st.IsDir() {
		return nil // the image has nothing there
	}
	if err != nil {
		return err
	}
	if shared {
		return fillShared(volume, source, defaultPace, copied)
	}
	for _, e := range entries {
		if e.Name() != copyMark {
			if err := os.RemoveAll(filepath.Join(volume, e.Name())); err != nil {
				return err
			}
		}
	}
	mark := filepath.Join(volume, copyMark)
	if err := os.WriteFile(mark, nil, 0o600); err != nil {
		return err
	}
	if err := copyTree(source, volume, "", copied); err != nil {
		return err
	}
	return os.Remove(mark)
}

// A pace is how guests that share a volume see of each other that they live.
type pace struct {
	beat  time.Duration // how often the one who copies touches the mark
	dead  time.Duration // an untouched mark is that of a guest that is no more
	every time.Duration // how often one who waits looks
}

var defaultPace = pace{beat: 2 * time.Second, dead: 30 * time.Second, every: 250 * time.Millisecond}

// fillShared fills a volume that other guests may be filling or using. The first to make the mark copies and touches the mark all the
// while; the others wait until it is gone. No lock would do: NFSv3 and 9p have none that other guests see. Where the copier has died,
// whoever notices goes on. That never removes or replaces anything, and files appear under their names when they are complete: should
// a guest that was only paused come back, two of them copying do no harm.
func fillShared(volume, source string, p pace, copied func(int)) error {
	mark := filepath.Join(volume, copyMark)
	f, err := os.OpenFile(mark, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	switch {
	case err == nil:
		if err := f.Close(); err != nil {
			return err
		}
		// What was copied in between is complete, and the mark was not needed.
		if filled, err := hasContent(volume); err != nil || filled {
			return errors.Join(err, os.Remove(mark))
		}
	case errors.Is(err, fs.ErrExist):
		if done, err := awaitCopy(mark, p); err != nil || done {
			return err
		}
	default:
		return err
	}
	stop := touch(mark, p.beat)
	defer stop()
	if err := copyTree(source, volume, copyMark+"-"+rand.Text(), copied); err != nil {
		return err
	}
	stop()
	entries, err := os.ReadDir(volume)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), copyMark) { // the mark, and files that a copier before did not finish
			if err := os.Remove(filepath.Join(volume, e.Name())); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return err
			}
		}
	}
	return nil
}

// hasContent says whether there is anything in a volume but marks.
func hasContent(volume string) (bool, error) {
	entries, err := os.ReadDir(volume)
	for _, e := range entries {
		if !strings.HasPrefix(e.Name(), copyMark) {
			return true, nil
		}
	}
	return false, err
}

// awaitCopy waits until another guest's copy is complete; false: that guest has died.
func awaitCopy(mark string, p pace) (done bool, err error) {
	var last time.Time
	for since := time.Now(); ; time.Sleep(p.every) {
		f, err := os.Open(mark) // on NFS, opening is what asks the server
		if errors.Is(err, fs.ErrNotExist) {
			return true, nil
		}
		if err == nil {
			var st fs.FileInfo
			st, err = f.Stat()
			f.Close()
			if err == nil && !st.ModTime().Equal(last) {
				last, since = st.ModTime(), time.Now()
			}
		}
		if err != nil && !errors.Is(err, unix.ESTALE) {
			return false, err
		}
		if time.Since(since) > p.dead {
			return false, nil
		}
	}
}

// touch sets the time of a file again and again until stop is called, by the clock of the server that has it.
func touch(path string, every time.Duration) (stop func()) {
	quit, over := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(over)
		now := []unix.Timespec{{Nsec: unix.UTIME_NOW}, {Nsec: unix.UTIME_NOW}}
		for {
			_ = unix.UtimesNanoAt(unix.AT_FDCWD, path, now, unix.AT_SYMLINK_NOFOLLOW)
			select {
			case <-quit:
				return
			case <-time.After(every):
			}
		}
	}()
	return func() {
		if !isClosed(quit) {
			close(quit)
		}
		<-over
	}
}

func isClosed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

// copyTree copies what is in source, and source's own attributes, to target, and has it on the disk when it returns. With part, others
// may write to target too: what is there stays, and files are made under that name first.
func copyTree(source, target, part string, copied func(int)) error {
	from, err := os.Open(source)
	if err != nil {
		return err
	}
	defer from.Close()
	to, err := os.Open(target)
	if err != nil {
		return err
	}
	defer to.Close()
	if copied == nil {
		copied = func(int) {}
	}
	c := copier{
		root: to, part: part, copied: copied, links: make(map[inode]string),
		buf: make([]byte, 1<<20), names: make([]byte, 64<<10), value: make([]byte, 64<<10),
	}
	if err := c.directory(from, to, "."); err != nil {
		return fmt.Errorf("copy the image's content: %w", err)
	}
	return syncFS(target)
}

// syncFS writes a file system's dirty pages to its disk.
func syncFS(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := unix.Syncfs(int(f.Fd())); err != nil {
		return &os.PathError{Op: "sync", Path: dir, Err: err}
	}
	return nil
}

type inode struct{ dev, ino uint64 }

// A copier copies a tree with owners, modes, times, extended attributes, devices and hard links. Everything goes by descriptors of
// directories: no link that somebody else puts into target is followed, and no long path is walked for each of many small files.
type copier struct {
	root   *os.File
	part   string
	copied func(int)
	links  map[inode]string // what has more than one name → its copy, from root

	buf, names, value []byte
}

// directory copies what is in a directory, then its attributes. at is its path from root.
func (c *copier) directory(from, to *os.File, at string) error {
	list, err := from.ReadDir(-1)
	if err != nil {
		return err
	}
	for _, e := range list {
		if err := c.entry(from, to, at, e.Name()); err != nil {
			return err
		}
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(from.Fd()), &st); err != nil {
		return &os.PathError{Op: "stat", Path: from.Name(), Err: err}
	}
	return c.attributes(int(from.Fd()), int(to.Fd()), &st, at)
}

func (c *copier) entry(from, to *os.File, at, name string) error {
	path := filepath.Join(at, name)
	var st unix.Stat_t
	if err := unix.Fstatat(int(from.Fd()), name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return &os.PathError{Op: "stat", Path: path, Err: err}
	}
	kind := st.Mode & unix.S_IFMT
	if kind != unix.S_IFDIR && st.Nlink > 1 {
		id := inode{st.Dev, st.Ino}
		if first, ok := c.links[id]; ok {
			if err := unix.Linkat(int(c.root.Fd()), first, int(to.Fd()), name, 0); err != nil && !c.there(err) {
				return &os.LinkError{Op: "link", Old: first, New: path, Err: err}
			}
			return nil
		}
		c.links[id] = path
	}
	switch kind {
	case unix.S_IFDIR:
		return c.subdirectory(from, to, name, path, &st)
	case unix.S_IFREG:
		return c.file(from, to, name, path, &st)
	default:
		return c.special(from, to, name, path, &st)
	}
}

// there says whether an error is that somebody else has made the entry before.
func (c *copier) there(err error) bool { return c.part != "" && errors.Is(err, unix.EEXIST) }

func (c *copier) subdirectory(from, to *os.File, name, path string, st *unix.Stat_t) error {
	if err := unix.Mkdirat(int(to.Fd()), name, st.Mode&0o777); err != nil && !c.there(err) {
		return &os.PathError{Op: "mkdir", Path: path, Err: err}
	}
	source, err := openAt(from, name, path)
	if err != nil {
		return err
	}
	defer source.Close()
	target, err := openAt(to, name, path)
	if c.part != "" && (errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ELOOP)) {
		return nil // somebody else has something else there
	}
	if err != nil {
		return err
	}
	defer target.Close()
	return c.directory(source, target, path)
}

// openAt opens a directory in another one.
func openAt(dir *os.File, name, path string) (*os.File, error) {
	fd, err := unix.Openat(int(dir.Fd()), name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: path, Err: err}
	}
	return os.NewFile(uintptr(fd), path), nil
}

func (c *copier) file(from, to *os.File, name, path string, st *unix.Stat_t) error {
	in, err := unix.Openat(int(from.Fd()), name, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return &os.PathError{Op: "open", Path: path, Err: err}
	}
	defer unix.Close(in)
	dir, first := int(to.Fd()), name
	if c.part != "" {
		var have unix.Stat_t
		if err := unix.Fstatat(dir, name, &have, unix.AT_SYMLINK_NOFOLLOW); err == nil {
			return nil
		}
		dir, first = int(c.root.Fd()), c.part
	}
	out, err := unix.Openat(dir, first, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_CLOEXEC, st.Mode&0o777)
	if err != nil {
		return &os.PathError{Op: "create", Path: path, Err: err}
	}
	err = c.content(in, out, st.Size)
	if err == nil {
		err = c.attributes(in, out, st, path)
	}
	if cerr := unix.Close(out); err == nil && cerr != nil {
		err = &os.PathError{Op: "close", Path: path, Err: cerr}
	}
	if err == nil && c.part != "" {
		err = c.install(to, name, path)
	}
	return err
}

// content copies a file of that size.
func (c *copier) content(in, out int, size int64) error {
	for done := int64(0); ; {
		n, err := unix.Read(in, c.buf)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return fmt.Errorf("read: %w", err)
		}
		for b := c.buf[:n]; len(b) > 0; {
			w, err := unix.Write(out, b)
			if err != nil && err != unix.EINTR {
				return fmt.Errorf("write: %w", err)
			}
			b = b[max(w, 0):]
		}
		c.copied(n)
		if done += int64(n); n == 0 || done >= size {
			return nil
		}
	}
}

// install gives the finished file its name, if that is free.
func (c *copier) install(to *os.File, name, path string) error {
	root, dir := int(c.root.Fd()), int(to.Fd())
	err := unix.Linkat(root, c.part, dir, name, 0)
	if errors.Is(err, unix.EPERM) || errors.Is(err, unix.EOPNOTSUPP) { // no hard links there
		if err := unix.Renameat(root, c.part, dir, name); err != nil {
			return &os.LinkError{Op: "rename", Old: c.part, New: path, Err: err}
		}
		return nil
	}
	if err != nil && !c.there(err) {
		return &os.LinkError{Op: "link", Old: c.part, New: path, Err: err}
	}
	if err := unix.Unlinkat(root, c.part, 0); err != nil {
		return &os.PathError{Op: "remove", Path: c.part, Err: err}
	}
	return nil
}

// special copies symbolic links, devices, pipes and sockets.
func (c *copier) special(from, to *os.File, name, path string, st *unix.Stat_t) error {
	dir := int(to.Fd())
	var err error
	if st.Mode&unix.S_IFMT == unix.S_IFLNK {
		n := 0
		if n, err = unix.Readlinkat(int(from.Fd()), name, c.buf); err == nil {
			err = unix.Symlinkat(string(c.buf[:n]), dir, name)
		}
	} else {
		err = unix.Mknodat(dir, name, st.Mode, int(st.Rdev))
	}
	if c.there(err) {
		return nil
	}
	if err == nil {
		err = unix.Fchownat(dir, name, int(st.Uid), int(st.Gid), unix.AT_SYMLINK_NOFOLLOW)
	}
	if err == nil && st.Mode&unix.S_IFMT != unix.S_IFLNK {
		err = chmodAt(dir, name, st.Mode&0o7777)
	}
	if err == nil {
		err = unix.UtimesNanoAt(dir, name, []unix.Timespec{st.Atim, st.Mtim}, unix.AT_SYMLINK_NOFOLLOW)
	}
	if err != nil {
		return &os.PathError{Op: "make", Path: path, Err: err}
	}
	return nil
}

// chmodAt follows no link, which fchmodat can't without a newer kernel.
func chmodAt(dir int, name string, mode uint32) error {
	fd, err := unix.Openat(dir, name, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return unix.Chmod(fmt.Sprintf("/proc/self/fd/%d", fd), mode)
}

// attributes gives a file or directory what another one has besides its content. Looking costs much less than a change that the file
// system's journal takes. The owner comes before the mode: chown clears setuid.
func (c *copier) attributes(from, to int, st *unix.Stat_t, path string) error {
	var have unix.Stat_t
	if err := unix.Fstat(to, &have); err != nil {
		return &os.PathError{Op: "stat", Path: path, Err: err}
	}
	owned := have.Uid == st.Uid && have.Gid == st.Gid
	if !owned {
		if err := unix.Fchown(to, int(st.Uid), int(st.Gid)); err != nil {
			return &os.PathError{Op: "chown", Path: path, Err: err}
		}
	}
	if !owned || have.Mode != st.Mode {
		if err := unix.Fchmod(to, st.Mode&0o7777); err != nil {
			return &os.PathError{Op: "chmod", Path: path, Err: err}
		}
	}
	if err := c.xattrs(from, to, path); err != nil {
		return err
	}
	if err := setTimes(to, &[2]unix.Timespec{st.Atim, st.Mtim}); err != nil {
		return &os.PathError{Op: "set times of", Path: path, Err: err}
	}
	return nil
}

// setTimes is futimens(3).
func setTimes(fd int, times *[2]unix.Timespec) error {
	if _, _, errno := unix.Syscall6(unix.SYS_UTIMENSAT, uintptr(fd), 0, uintptr(unsafe.Pointer(times)), 0, 0, 0); errno != 0 {
		return errno
	}
	return nil
}

// xattrs copies extended attributes; a file system that can't hold one goes without it.
func (c *copier) xattrs(from, to int, path string) error {
	n, err := unix.Flistxattr(from, c.names)
	if errors.Is(err, unix.ENOTSUP) || n == 0 {
		return nil
	}
	if err != nil {
		return &os.PathError{Op: "list attributes of", Path: path, Err: err}
	}
	for _, name := range splitNul(c.names[:n]) {
		v, err := unix.Fgetxattr(from, name, c.value)
		if err != nil {
			continue
		}
		err = unix.Fsetxattr(to, name, c.value[:v], 0)
		if err != nil && !errors.Is(err, unix.ENOTSUP) && !errors.Is(err, unix.EPERM) {
			return &os.PathError{Op: "set attribute " + name + " of", Path: path, Err: err}
		}
	}
	return nil
}

func splitNul(b []byte) []string {
	var out []string
	start := 0
	for i, c := range b {
		if c == 0 {
			if i > start {
				out = append(out, string(b[start:i]))
			}
			start = i + 1
		}
	}
	return out
}
