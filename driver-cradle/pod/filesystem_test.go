package pod

import (
	"bytes"
	"encoding/binary"
	"testing"
)

func TestIdentify(t *testing.T) {
	const size = 8 << 20
	at := func(offset int, s string) map[int]string { return map[int]string{offset: s} }
	for _, c := range []struct {
		name    string
		content map[int]string
		want    string
	}{
		{"blank", nil, contentBlank},
		{"blank but beyond what is looked at", at(4<<20, "x"), contentBlank},
		{"ext4", at(1080, "\x53\xef"), "ext4"},
		{"ext4 with a boot sector", map[int]string{510: "\x55\xaa", 1080: "\x53\xef"}, "ext4"},
		{"xfs", at(0, "XFSB\x00\x00\x10\x00"), "xfs"},
		{"btrfs", at(0x10040, "_BHRfS_M"), "btrfs"},
		{"LUKS", at(0, "LUKS\xba\xbe\x00\x02"), "a LUKS volume"},
		{"LUKS before the ext4 of before", map[int]string{0: "LUKS\xba\xbe", 1080: "\x53\xef"}, "a LUKS volume"},
		{"partitions", at(510, "\x55\xaa"), "a partition table (MBR)"},
		{"gpt", map[int]string{510: "\x55\xaa", 512: "EFI PART"}, "a partition table (GPT)"},
		{"gpt at the end only", at(size-512, "EFI PART"), "a partition table (GPT)"},
		{"lvm", at(512, "LABELONE"), "an LVM physical volume"},
		{"zfs", at(128<<10+5<<10, "\x0c\xb1\xba\x00\x00\x00\x00\x00"), "a zfs pool"},
		{"raid at the end", at(size-65536, "\xfc\x4e\x2b\xa9"), "a RAID member"},
		{"qcow2", at(0, "QFI\xfb\x00\x00\x00\x03"), "a qcow2 image (convert it with qemu-img convert -O raw)"},
		{"ntfs", map[int]string{3: "NTFS    ", 510: "\x55\xaa"}, "ntfs"},
		{"swap", at(4086, "SWAPSPACE2"), "swap space"},
		{"text", at(0, "dear diary"), contentUnknown},
		{"one bit in the first MiB", at(1<<20-1, "\x01"), contentUnknown},
		{"one bit in the last 64 KiB", at(size-1, "\x80"), contentUnknown},
	} {
		t.Run(c.name, func(t *testing.T) {
			disk := make([]byte, size)
			for offset, s := range c.content {
				copy(disk[offset:], s)
			}
			got, err := identify(bytes.NewReader(disk), size)
			if err != nil || got != c.want {
				t.Errorf("got %q, %v, want %q", got, err, c.want)
			}
		})
	}
}

func FuzzIdentify(f *testing.F) {
	f.Add([]byte{}, uint16(0))
	f.Add([]byte("XFSB"), uint16(600))
	f.Fuzz(func(t *testing.T, head []byte, more uint16) {
		disk := append(head, make([]byte, more)...)
		got, err := identify(bytes.NewReader(disk), int64(len(disk)))
		if err != nil {
			t.Fatal(err)
		}
		if blank := len(bytes.Trim(disk, "\x00")) == 0; blank != (got == contentBlank) {
			t.Errorf("%d bytes, blank %v: %q", len(disk), blank, got)
		}
	})
}

func frame(stream byte, text string) string {
	var h [8]byte
	h[0] = stream
	binary.BigEndian.PutUint32(h[4:], uint32(len(text)))
	return string(h[:]) + text
}
