package pod

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
)

// What is read of a disk to tell what is on it: everything that mkfs, partitioning and RAID tools look at is in there. Where that is blank,
// searchData looks at the rest.
const (
	headSize = 1 << 20
	tailSize = 64 << 10
)

// Answers of identify that are no file system of ours.
const (
	contentBlank   = ""
	contentUnknown = "data of no known kind"
)

// identify tells what a disk holds: contentBlank, ext4, xfs, or the name of something that is never to be overwritten. size is the
// disk's in bytes. It reads, and executes nothing: a disk may come from a hostile guest.
func identify(disk io.ReaderAt, size int64) (string, error) {
	head := make([]byte, min(size, headSize))
	tail := make([]byte, min(size, tailSize))
	if _, err := disk.ReadAt(head, 0); err != nil && err != io.EOF {
		return "", fmt.Errorf("read its beginning: %w", err)
	}
	if _, err := disk.ReadAt(tail, size-int64(len(tail))); err != nil && err != io.EOF {
		return "", fmt.Errorf("read its end: %w", err)
	}
	if zero(head) && zero(tail) {
		return contentBlank, nil
	}
	for _, s := range signatures {
		from := head
		if s.fromEnd {
			from = tail
		}
		at := s.at
		if s.fromEnd {
			at = len(tail) - s.at
		}
		if at >= 0 && at+len(s.magic) <= len(from) && string(from[at:at+len(s.magic)]) == s.magic {
			return s.name, nil
		}
	}
	// zfs keeps an array of uberblocks in each label (zfs vdev_impl.h), the magic number in either byte order.
	for at := 128 << 10; at+8 <= len(head) && at < 256<<10; at += 1 << 10 {
		if n := head[at : at+8]; binary.LittleEndian.Uint64(n) == 0x00bab10c || binary.BigEndian.Uint64(n) == 0x00bab10c {
			return "a zfs pool", nil
		}
	}
	return contentUnknown, nil
}

func zero(b []byte) bool {
	const step = 4096
	var zeros [step]byte
	for len(b) > step {
		if !bytes.Equal(b[:step], zeros[:]) {
			return false
		}
		b = b[step:]
	}
	return bytes.Equal(b, zeros[:len(b)])
}

// signatures are magic numbers as libblkid and the kernel know them, the more telling first.
var signatures = []struct {
	name    string
	at      int
	magic   string
	fromEnd bool // at counts back from the end
}{
	{name: "a LUKS volume", magic: "LUKS\xba\xbe"},
	{name: "a qcow2 image (convert it with qemu-img convert -O raw)", magic: "QFI\xfb"},
	{name: "a VMDK image (convert it with qemu-img convert -O raw)", magic: "KDMV"},
	{name: "a VHDX image (convert it with qemu-img convert -O raw)", magic: "vhdxfile"},
	{name: "a VHD image (convert it with qemu-img convert -O raw)", magic: "conectix", at: 512, fromEnd: true},
	{name: "a RAID member", at: 4096, magic: "\xfc\x4e\x2b\xa9"},
	{name: "a RAID member", magic: "\xfc\x4e\x2b\xa9"},
	{name: "a RAID member", at: 8192, fromEnd: true, magic: "\xfc\x4e\x2b\xa9"},
	{name: "a RAID member", at: 65536, fromEnd: true, magic: "\xfc\x4e\x2b\xa9"},
	{name: "an LVM physical volume", at: 0, magic: "LABELONE"},
	{name: "an LVM physical volume", at: 512, magic: "LABELONE"},
	{name: "an LVM physical volume", at: 1024, magic: "LABELONE"},
	{name: "an LVM physical volume", at: 1536, magic: "LABELONE"},
	{name: "a ceph bluestore device", magic: "bluestore block device"},
	{name: "ext4", at: 1024 + 56, magic: "\x53\xef"}, // ext2 and ext3 as well: the same driver mounts them
	{name: "xfs", magic: "XFSB"},
	{name: "btrfs", at: 0x10040, magic: "_BHRfS_M"},
	{name: "bcachefs", at: 4096 + 24, magic: "\xc6\x85\x73\xf6\x66\xce\x90\xa9\xd9\x6a\x60\xcf\x80\x3d\xf7\xef"},
	{name: "bcachefs", at: 4096 + 24, magic: "\xc6\x85\x73\xf6\x4e\x1a\x45\xca\x82\x65\xf5\x7f\x48\xba\x6d\x81"},
	{name: "f2fs", at: 1024, magic: "\x10\x20\xf5\xf2"},
	{name: "erofs", at: 1024, magic: "\xe2\xe1\xf5\xe0"},
	{name: "squashfs", magic: "hsqs"},
	{name: "jfs", at: 32768, magic: "JFS1"},
	{name: "reiserfs", at: 65536 + 52, magic: "ReIsEr"},
	{name: "a GFS2 file system", at: 65536, magic: "\x01\x16\x19\x70"},
	{name: "an ISO 9660 image", at: 32769, magic: "CD001"},
	{name: "swap space", at: 4096 - 10, magic: "SWAPSPACE2"},
	{name: "swap space", at: 4096 - 10, magic: "SWAP-SPACE"},
	{name: "ntfs", at: 3, magic: "NTFS    "},
	{name: "exfat", at: 3, magic: "EXFAT   "},
	{name: "a FAT file system", at: 82, magic: "FAT32   "},
	{name: "a FAT file system", at: 54, magic: "FAT16   "},
	{name: "a FAT file system", at: 54, magic: "FAT12   "},
	{name: "a partition table (GPT)", at: 512, magic: "EFI PART"},
	{name: "a partition table (GPT)", at: 4096, magic: "EFI PART"},
	{name: "a partition table (GPT)", at: 512, fromEnd: true, magic: "EFI PART"},
	{name: "a partition table (GPT)", at: 4096, fromEnd: true, magic: "EFI PART"},
	{name: "a partition table (MBR)", at: 510, magic: "\x55\xaa"},
}
