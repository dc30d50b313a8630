package mount

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
)

// Minimum is the size of the smallest file system of a type.
func Minimum(fsType string) int64 {
	if fsType == "xfs" {
		return 300 << 20 // mkfs.xfs 6.1 makes no smaller one
	}
	return 16 << 20 // with a journal
}

// makers by file system. A new volume is known to be all zeros, and its blocks are a loop device's.
var makers = map[string][]string{
	"ext4": {"mkfs.ext4", "-q", "-F", "-b", "4096", "-m", "0", "-E", "nodiscard,root_owner=0:0,assume_storage_prezeroed=1"},
	"xfs":  {"mkfs.xfs", "-q", "-f", "-K", "-b", "size=4096", "-s", "size=4096"},
}

// Format makes a file system on an image or block device that holds nothing but zeros, or what an interrupted Format left. The program
// outlives this process should that be killed; it holds hold open until it has finished, so that a lock on that keeps others away.
func Format(ctx context.Context, disk *os.File, fsType string, hold *os.File) error {
	args, ok := makers[fsType]
	if !ok {
		return fmt.Errorf("make %s on %s: there is no such file system", fsType, disk.Name())
	}
	err := run(ctx, []*os.File{disk, hold}, append(args[:len(args):len(args)], "/proc/self/fd/3"))
	if err == nil {
		err = disk.Sync()
	}
	if err != nil {
		return fmt.Errorf("make %s on %s: %w", fsType, disk.Name(), err)
	}
	return nil
}

// Grow makes a mounted file system as large as its device, which may be done again.
func Grow(ctx context.Context, device, path, fsType string) error {
	args := []string{"resize2fs", device}
	if fsType == "xfs" {
		args = []string{"xfs_growfs", path}
	}
	if err := run(ctx, nil, args); err != nil {
		if fsType != "xfs" && strings.Contains(err.Error(), "Permission denied to resize") { // resize2fs, of EPERM
			err = fmt.Errorf("it takes CAP_SYS_RESOURCE, which this process has not (docker: --cap-add SYS_RESOURCE); the volume has its new size already: %w", err)
		}
		return fmt.Errorf("grow the %s file system on %s: %w", fsType, path, err)
	}
	return nil
}

// packages that the programs are in.
var packages = map[string]string{"mkfs.ext4": "e2fsprogs", "resize2fs": "e2fsprogs", "mkfs.xfs": "xfsprogs", "xfs_growfs": "xfsprogs"}

// run ends early only before the program has started: half a file system helps nobody.
func run(ctx context.Context, files []*os.File, args []string) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	program, err := lookPath(args[0])
	if err != nil {
		return fmt.Errorf("%s is missing: apt-get install %s", args[0], packages[args[0]])
	}
	var out bytes.Buffer
	cmd := exec.Command(program, args[1:]...)
	cmd.Stdout, cmd.Stderr = &out, &out
	cmd.ExtraFiles = files
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	err = cmd.Run()
	if text := strings.TrimSpace(out.String()); err != nil && text != "" {
		err = errors.New(text)
	}
	return err
}

// fill is Grow for a file system that leaves a good part of its device unused: a clone that was made larger than its origin, or a device
// that grew while nothing was mounted.
func fill(ctx context.Context, device, path, fsType string) error {
	f, err := os.Open(device)
	if err != nil {
		return err
	}
	defer f.Close()
	size, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return err
	}
	used, err := extent(f, fsType)
	if err != nil {
		return fmt.Errorf("%s: %w", device, err)
	}
	if size-used < unfilled {
		return nil
	}
	return Grow(ctx, device, path, fsType)
}

// unfilled is what both file systems leave unused at most where their last group would be too small.
const unfilled = 16 << 20

// extent reads from the superblock how much of its device a file system takes: ext4's s_blocks_count and s_log_block_size
// (kernel Documentation/filesystems/ext4/super.rst), xfs's sb_dblocks and sb_blocksize (xfs_format.h).
func extent(f *os.File, fsType string) (int64, error) {
	var b [2048]byte
	if _, err := f.ReadAt(b[:], 0); err != nil {
		return 0, err
	}
	if fsType == "xfs" {
		return int64(binary.BigEndian.Uint64(b[8:])) * int64(binary.BigEndian.Uint32(b[4:])), nil
	}
	s := b[1024:]
	blocks := uint64(binary.LittleEndian.Uint32(s[0x4:])) | uint64(binary.LittleEndian.Uint32(s[0x150:]))<<32
	return int64(blocks << (10 + binary.LittleEndian.Uint32(s[0x18:]))), nil
}

// lookPath finds a program also where the environment has no PATH (Nomad starts host volume plugins so) or one for plain users.
func lookPath(name string) (string, error) {
	path, err := exec.LookPath(name)
	for _, dir := range []string{"/usr/sbin", "/sbin", "/usr/bin", "/bin"} {
		if err == nil {
			break
		}
		path, err = exec.LookPath(filepath.Join(dir, name))
	}
	return path, err
}
