package guest

import (
	"context"
	"encoding/binary"
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

// uevents wakes whoever waits for the kernel to find a device. Between events it sleeps.
type uevents struct {
	mu   sync.Mutex
	next chan struct{} // closed at the next event

	known map[int]string // device nodes of the disks that were there when the agent parked, by LUN; they stay
}

// listenUevents opens the kernel's event socket; look for a device only after taking a channel from it.
func listenUevents() (*uevents, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_KOBJECT_UEVENT)
	if err != nil {
		return nil, fmt.Errorf("open uevent socket: %w", err)
	}
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: 1}); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("bind uevent socket: %w", err)
	}
	u := &uevents{next: make(chan struct{})}
	go u.run(os.NewFile(uintptr(fd), "uevents"))
	return u, nil
}

func (u *uevents) run(f *os.File) {
	buf := make([]byte, 8192)
	for {
		// What the event says does not matter: sysfs is looked at anew. An overflow of the socket (ENOBUFS) is an event too.
		if _, err := f.Read(buf); err != nil && !errors.Is(err, unix.ENOBUFS) {
			return
		}
		u.mu.Lock()
		close(u.next)
		u.next = make(chan struct{})
		u.mu.Unlock()
	}
}

func (u *uevents) wait() <-chan struct{} {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.next
}

// diskTimeout bounds the wait for a disk that the host says is there.
const diskTimeout = 30 * time.Second

// disk waits for the disk of a LUN and gives its device node. A hot-plugged disk is there when it opens: its node exists before that.
func (u *uevents) disk(ctx context.Context, key string, lun int) (string, error) {
	if dev, ok := u.known[lun]; ok {
		return dev, nil
	}
	ctx, cancel := context.WithTimeout(ctx, diskTimeout)
	defer cancel()
	for {
		event := u.wait()
		if dev, ok := findDisks()[lun]; ok {
			if err := opens(ctx, dev); err != nil {
				return "", fmt.Errorf("disk %s (LUN %d): %w", key, lun, err)
			}
			return dev, nil
		}
		select {
		case <-event:
		case <-ctx.Done():
			return "", fmt.Errorf("disk %s (LUN %d) did not appear within %s: is it attached to the VM?", key, lun, diskTimeout)
		}
	}
}

// scsiDevices has one entry for each SCSI device, named by host, channel, target and LUN.
const scsiDevices = "/sys/bus/scsi/devices"

// findDisks gives the device nodes of the disks on target 0, by LUN.
func findDisks() map[int]string {
	found := map[int]string{}
	entries, _ := os.ReadDir(scsiDevices) // none before the first device
	for _, e := range entries {
		address := strings.Split(e.Name(), ":")
		if len(address) != 4 || address[1] != "0" || address[2] != "0" {
			continue
		}
		lun, err := strconv.Atoi(address[3])
		if err != nil {
			continue
		}
		if blocks, err := os.ReadDir(filepath.Join(scsiDevices, e.Name(), "block")); err == nil && len(blocks) > 0 {
			found[lun] = "/dev/" + blocks[0].Name()
		}
	}
	return found
}

// opens waits, with bounded patience, until a device node opens: devtmpfs and the driver need a moment more than sysfs.
func opens(ctx context.Context, dev string) error {
	for wait := time.Millisecond; ; wait = min(2*wait, 200*time.Millisecond) {
		fd, err := unix.Open(dev, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err == nil {
			return unix.Close(fd)
		}
		if err != unix.ENXIO && err != unix.ENOENT && err != unix.EINTR {
			return &os.PathError{Op: "open", Path: dev, Err: err}
		}
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return &os.PathError{Op: "open", Path: dev, Err: err}
		}
	}
}

// fsKind tells a file system by its superblock: ext4, xfs, erofs, "blank" for nothing but zeros where superblocks are, "" for another.
func fsKind(r io.ReaderAt) (string, error) {
	// Superblocks: xfs at 0, erofs and ext at 1 KiB, reiserfs and btrfs at 64 KiB; a partition table in the first sector.
	head := make([]byte, 72<<10)
	if n, err := r.ReadAt(head, 0); err != nil && !errors.Is(err, io.EOF) {
		return "", fmt.Errorf("read superblock: %w", err)
	} else {
		head = head[:n]
	}
	at := func(off, n int) []byte {
		if len(head) < off+n {
			return make([]byte, n)
		}
		return head[off : off+n]
	}
	switch {
	case string(at(0, 4)) == "XFSB":
		return "xfs", nil
	case binary.LittleEndian.Uint32(at(1024, 4)) == 0xE0F5E1E2:
		return "erofs", nil
	case binary.LittleEndian.Uint16(at(1024+0x38, 2)) == 0xEF53:
		return "ext4", nil
	case len(strings.Trim(string(head), "\x00")) == 0:
		return "blank", nil
	}
	return "", nil
}

// fsKindOf is fsKind of a block device.
func fsKindOf(dev string) (string, error) {
	f, err := os.Open(dev)
	if err != nil {
		return "", err
	}
	defer f.Close()
	return fsKind(f)
}
