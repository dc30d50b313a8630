package pod

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/cradlestack/cradlestack/spec"
)

// FSType tells which file system that a guest can mount is on an image or a block device of the host: ext4, xfs, or "" for nothing and anything else.
func FSType(path string) (string, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return "", err
	}
	defer f.Close()
	size, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return "", fmt.Errorf("%s: %w", path, err)
	}
	found, err := identify(f, size)
	if err != nil {
		return "", fmt.Errorf("%s: %w", path, err)
	}
	if mkfs[found].arguments == nil {
		found = ""
	}
	return found, nil
}

// prepareBlock makes a block volume ready to be attached: a blank one gets its file system, one that holds anything else is refused.
// The host never mounts it. mounted says whether a container mounts it; where it is only used raw, its content is nobody's business.
func prepareBlock(ctx context.Context, v *spec.Volume, path string, mounted bool) error {
	if err := prepare(ctx, v.Block, path, mounted); err != nil {
		return fmt.Errorf("volume %s: %w", v.Name, err)
	}
	return nil
}

func prepare(ctx context.Context, b *spec.BlockVolume, path string, mounted bool) error {
	f, size, err := openDisk(path, b.ReadOnly)
	if err != nil {
		return err
	}
	defer f.Close()
	if !mounted {
		return nil
	}
	want := b.FSType
	if want == "" {
		want = "ext4"
	}
	found, err := identify(f, size)
	if err == nil && found == contentBlank {
		found, err = searchData(ctx, f, size)
	}
	switch {
	case err != nil:
		return fmt.Errorf("%s: %w", path, err)
	case found == want:
		return nil
	case found == "xfs" || found == "ext4":
		return fmt.Errorf("%s holds an %s file system, and %s is asked for: set its fsType to %s to use it as it is", path, found, want, found)
	case found != contentBlank:
		return fmt.Errorf("%s holds %s and is not overwritten: name another, or, if nobody needs that, clear it with %s", path, found, clearing(f, path, size))
	case b.ReadOnly:
		return fmt.Errorf("%s is blank, and read-only: there is nothing to mount", path)
	}
	return makeFilesystem(ctx, want, f, path)
}

// clearing is a command that makes a disk blank; wipefs would leave what it does not know.
func clearing(f *os.File, path string, size int64) string {
	if fi, err := f.Stat(); err == nil && !fi.Mode().IsRegular() {
		return "blkdiscard -z " + path
	}
	return fmt.Sprintf("truncate -s 0 %s && truncate -s %d %[1]s", path, size)
}

// searchData looks for data in the whole of a disk whose beginning and end are blank: contentBlank or contentUnknown. Of an image file it
// reads everything that is not a hole; of a block device that is larger than maxSearched, which has no holes to tell, samples that lie where
// ext4 keeps copies of its superblock (multiples of 128 MiB).
func searchData(ctx context.Context, f *os.File, size int64) (string, error) {
	fi, err := f.Stat()
	if err != nil {
		return "", err
	}
	if !fi.Mode().IsRegular() && size > maxSearched {
		const group = 128 << 20
		stride := max(1, size/(samples*group)) * group
		for at := int64(0); at < size; at += stride {
			if blank, err := blankRange(ctx, f, at, min(at+sampleSize, size)); err != nil || !blank {
				return contentUnknown, err
			}
		}
		return contentBlank, nil
	}
	for at := int64(0); at < size; {
		end := size
		if fi.Mode().IsRegular() {
			at, err = unix.Seek(int(f.Fd()), at, unix.SEEK_DATA)
			if errors.Is(err, unix.ENXIO) {
				return contentBlank, nil // only a hole is left
			}
			if err == nil {
				end, err = unix.Seek(int(f.Fd()), at, unix.SEEK_HOLE)
			}
			if err != nil {
				return "", fmt.Errorf("look for data: %w", err)
			}
		}
		if blank, err := blankRange(ctx, f, at, end); err != nil || !blank {
			return contentUnknown, err
		}
		at = end
	}
	return contentBlank, nil
}

const (
	maxSearched = 1 << 30
	samples     = 1024 // at least as many of a disk that holds as many groups
	sampleSize  = 64 << 10
)

// blankRange says whether the bytes in [at, end) are zero.
func blankRange(ctx context.Context, r io.ReaderAt, at, end int64) (bool, error) {
	buf := make([]byte, min(end-at, 1<<20))
	for at < end {
		if ctx.Err() != nil {
			return false, context.Cause(ctx)
		}
		n, err := r.ReadAt(buf[:min(end-at, int64(len(buf)))], at)
		if err != nil && (err != io.EOF || n == 0) {
			return false, fmt.Errorf("look for data: %w", err)
		}
		if !zero(buf[:n]) {
			return false, nil
		}
		at += int64(n)
	}
	return true, nil
}

// openDisk opens an image file or block device that nobody else uses. The lock ends with the file: a running machine holds QEMU's
// own, which is checked here.
func openDisk(path string, readOnly bool) (_ *os.File, size int64, err error) {
	flags := os.O_RDWR | unix.O_NONBLOCK
	if readOnly {
		flags = os.O_RDONLY | unix.O_NONBLOCK
	}
	fi, err := os.Stat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, 0, fmt.Errorf("%s does not exist: make an empty image with truncate -s 10G %s", path, path)
	case err != nil:
		return nil, 0, err
	case fi.Mode()&os.ModeDevice != 0 && fi.Mode()&os.ModeCharDevice == 0:
		claim, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK|unix.O_EXCL, 0) // fails while the host has it mounted
		if errors.Is(err, unix.EBUSY) {
			return nil, 0, fmt.Errorf("%s is in use on this host: unmount it first", path)
		} else if err != nil {
			return nil, 0, err
		}
		claim.Close()
	case !fi.Mode().IsRegular():
		return nil, 0, fmt.Errorf("%s is neither an image file nor a block device", path)
	}
	f, err := os.OpenFile(path, flags, 0)
	if err != nil {
		return nil, 0, err
	}
	defer func() {
		if err != nil {
			f.Close()
		}
	}()
	how := unix.LOCK_EX
	if readOnly {
		how = unix.LOCK_SH
	}
	if err := unix.Flock(int(f.Fd()), how|unix.LOCK_NB); errors.Is(err, unix.EWOULDBLOCK) {
		return nil, 0, inUse(path)
	} else if err != nil {
		return nil, 0, fmt.Errorf("lock %s: %w", path, err)
	}
	// QEMU marks what it does with an image by locks on single bytes from 100 on (qemu block/file-posix.c, RAW_LOCK_PERM_BASE); one
	// that writes it holds byte 101.
	const permWrite, perms = 101, 200
	lock := unix.Flock_t{Type: unix.F_WRLCK, Start: permWrite, Len: 1}
	if !readOnly {
		lock.Start, lock.Len = permWrite-1, perms
	}
	if err := unix.FcntlFlock(f.Fd(), unix.F_OFD_GETLK, &lock); err != nil {
		return nil, 0, fmt.Errorf("lock %s: %w", path, err)
	}
	if lock.Type != unix.F_UNLCK {
		return nil, 0, inUse(path)
	}
	if size, err = f.Seek(0, io.SeekEnd); err != nil {
		return nil, 0, fmt.Errorf("%s: %w", path, err)
	}
	if size == 0 {
		return nil, 0, fmt.Errorf("%s is empty: give it a size with truncate -s 10G %s", path, path)
	}
	if size%512 != 0 {
		return nil, 0, fmt.Errorf("%s has %d bytes, a disk has a multiple of 512: give it a size with truncate -s 10G %[1]s", path, size)
	}
	return f, size, nil
}

func inUse(path string) error {
	return fmt.Errorf("%s is in use by another pod: stop that one first (a volume is attached to one pod at a time)", path)
}

// mkfs is how a blank volume gets its file system. The programs' own checks for existing content stay on.
var mkfs = map[string]struct {
	arguments []string
	sparse    []string // added for an image without any content
	install   string
}{
	"ext4": {[]string{"mke2fs", "-q", "-t", "ext4", "-m", "0", "-E", "nodiscard"}, []string{"-E", "nodiscard,assume_storage_prezeroed=1"}, "apt-get install e2fsprogs"},
	"xfs":  {[]string{"mkfs.xfs", "-q", "-K"}, nil, "apt-get install xfsprogs"},
}

// makeFilesystem formats disk with further arguments. The program outlives this process should that be killed, and holds the disk's
// lock until it has finished: a file system is made as a whole or not begun.
func makeFilesystem(ctx context.Context, fsType string, disk *os.File, path string, arguments ...string) error {
	wait, err := beginFilesystem(ctx, fsType, disk, path, arguments...)
	if err != nil {
		return err
	}
	return wait()
}

func beginFilesystem(ctx context.Context, fsType string, disk *os.File, path string, arguments ...string) (wait func() error, err error) {
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	m := mkfs[fsType]
	program, err := exec.LookPath(m.arguments[0])
	if err != nil {
		return nil, fmt.Errorf("%s is missing: %s", m.arguments[0], m.install)
	}
	arguments = append(m.arguments[1:len(m.arguments):len(m.arguments)], arguments...)
	if _, err := disk.Seek(0, unix.SEEK_DATA); errors.Is(err, unix.ENXIO) {
		arguments = append(arguments, m.sparse...)
	}
	var out bytes.Buffer
	cmd := exec.Command(program, append(arguments, "/proc/self/fd/3")...)
	cmd.ExtraFiles = []*os.File{disk}
	cmd.Stdout, cmd.Stderr = &out, &out
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true} // nor does Ctrl-C reach it
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("make %s on %s: %w", fsType, path, err)
	}
	return func() error {
		err := cmd.Wait()
		if text := strings.TrimSpace(out.String()); err != nil && text != "" {
			err = errors.New(strings.ReplaceAll(text, "/proc/self/fd/3", path))
		}
		if err != nil {
			return fmt.Errorf("make %s on %s: %w", fsType, path, err)
		}
		return nil
	}, nil
}

// makeScratch makes the pod's writable disk: sparse, known to be all zeros, so that a guest that mounts it has nothing to initialize.
// Its small journal is for the guest's restarts; the host never reads it.
func makeScratch(ctx context.Context, path string, size spec.Bytes) (err error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o600)
	if err != nil {
		return err
	}
	defer func() {
		if err = errors.Join(err, f.Close()); err != nil {
			os.Remove(path)
		}
	}()
	if err := f.Truncate(int64(size) &^ 4095); err != nil {
		return fmt.Errorf("scratch disk of %v: %w", size, err)
	}
	journal := "size=8"
	if size < 64<<20 {
		journal = "size=4" // the least
	}
	return makeFilesystem(ctx, "ext4", f, path, "-b", "4096", "-I", "256", "-J", journal, "-O", "^resize_inode,sparse_super2",
		"-E", "nodiscard,packed_meta_blocks=1,root_owner=0:0,assume_storage_prezeroed=1")
}
