//go:build vm

package vmm

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cradlestack/cradlestack/driver-cradle/boot"
	"github.com/cradlestack/cradlestack/driver-cradle/boot/boottest"
	"github.com/cradlestack/cradlestack/internal/locked"
)

func takenPort(t *testing.T) uint16 {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return uint16(l.Addr().(*net.TCPAddr).Port)
}

// hangingPackage is a boot package whose agent says a word and does nothing.
func hangingPackage(t *testing.T) *boot.Package {
	t.Helper()
	p, err := boottest.Build(filepath.Join(t.TempDir(), "boot"), "./testdata/agent", boot.VariantDefault, "agent=hang")
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func TestVMManyDisks(t *testing.T) {
	const n = 60
	for _, how := range []string{Cold, Template} {
		t.Run(how, func(t *testing.T) {
			c := config(t)
			c.Start = how
			for i := range n {
				c.Disks = append(c.Disks, Disk{Key: fmt.Sprint(i), Path: image(t, fmt.Sprintf("disk %d", i), 1<<20), ReadOnly: i%2 == 0})
			}
			began := time.Now()
			m := start(t, c)
			t.Logf("start with %d disks: %v", n, time.Since(began))
			for _, i := range []int{0, 1, n / 2, n - 1} {
				var got string
				ask(t, m, "read", url.Values{"lun": {fmt.Sprint(i)}}, &got)
				if got != fmt.Sprintf("disk %d", i) {
					t.Errorf("LUN %d reads %q", i, got)
				}
			}
			t.Logf("all of them visible: %v", time.Since(began))
			sizes := map[string]int64{}
			if !eventually(func() bool { ask(t, m, "disks", nil, &sizes); return len(sizes) == n }) {
				t.Errorf("the guest sees %d disks", len(sizes))
			}
		})
	}
}

// Internal disks are where the guest of a template expects them. What else is plugged in comes behind.
func TestVMInternalDisks(t *testing.T) {
	for _, how := range []string{Cold, Template} {
		t.Run(how, func(t *testing.T) {
			c := config(t)
			c.Start = how
			c.Disks = []Disk{
				{Key: "volume", Path: image(t, "volume", 3<<20)},
				{Key: "scratch", Path: image(t, "scratch", 1<<20), Internal: true},
			}
			for i := range 5 {
				text := fmt.Sprint("layer ", i)
				c.Disks = append(c.Disks, Disk{Key: text, Path: image(t, text, 1<<20), ReadOnly: true, Internal: true})
			}
			m := start(t, c)
			added := Disk{Key: "added", Path: image(t, "added", 1<<20)}
			if _, err := m.AddDisk(t.Context(), added); err != nil {
				t.Fatal(err)
			}
			all, seen := append(c.Disks, added), map[int]bool{}
			for _, d := range all {
				lun, ok := m.LUN(d.Key)
				if !ok || seen[lun] {
					t.Fatalf("disk %s: LUN %d, %v", d.Key, lun, ok)
				}
				seen[lun] = true
				var got string
				if ask(t, m, "read", url.Values{"lun": {fmt.Sprint(lun)}}, &got); got != d.Key {
					t.Errorf("LUN %d is %q, want %q", lun, got, d.Key)
				}
				err := try(t, m, "write", url.Values{"lun": {fmt.Sprint(lun)}, "text": {"changed"}}, nil)
				if (err != nil) != d.ReadOnly {
					t.Errorf("write to %s: %v", d.Key, err)
				}
				if data, err := os.ReadFile(d.Path); err != nil || strings.HasPrefix(string(data), "changed") == d.ReadOnly {
					t.Errorf("%s after a write: %.10q, %v", d.Key, data, err)
				}
			}
			lun, _ := m.LUN("volume")
			var sizes map[string]int64
			if ask(t, m, "disks", nil, &sizes); sizes[fmt.Sprint(lun)] != 3<<20 {
				t.Errorf("the guest sees a volume of 3 MiB with %d bytes", sizes[fmt.Sprint(lun)])
			}
			if stats, err := m.Stats(t.Context()); err != nil || len(stats.Disks) != len(all) {
				t.Errorf("statistics of %d disks, want %d: %v", len(stats.Disks), len(all), err)
			}
			if _, ok := m.LUN("none"); ok {
				t.Error("a disk that is not there has a LUN")
			}
		})
	}
}

// An image whose host has no space left: the guest's program gets the error at once, the launcher says which file system it is, and the
// machine goes on.
func TestVMHostDiskFull(t *testing.T) {
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=4m"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	c := config(t)
	c.Start = Template
	var log locked.Buffer
	c.Log = slog.New(slog.NewTextHandler(&log, nil))
	path := filepath.Join(dir, "scratch.img")
	if err := errors.Join(os.WriteFile(path, nil, 0o600), os.Truncate(path, 16<<20)); err != nil {
		t.Fatal(err)
	}
	c.Disks = []Disk{{Key: "layer", Path: image(t, "fine", 1<<20)}, {Key: "scratch", Path: path}}
	m := start(t, c)
	for range 2 {
		err := try(t, m, "fill", url.Values{"lun": {"1"}, "mib": {"16"}}, nil)
		// The kernel makes EIO of whatever a block device's page cache meets; a file system on it has ENOSPC.
		if err == nil || !strings.Contains(err.Error(), "input/output error") {
			t.Fatalf("writing 16 MiB to a host's 4: %v", err)
		}
	}
	// QEMU tells it beside the guest's answer, and it is on record last.
	if !eventually(func() bool { info, err := ReadInfo(c.RunDir); return err == nil && len(info.DiskErrors) > 0 }) {
		t.Error("it is not on record")
	}
	errs := m.Info().DiskErrors
	if len(errs) != 1 || errs[0].LUN != 1 || errs[0].Key != "scratch" || !errs[0].NoSpace || errs[0].Mount != dir || errs[0].Operation != "write" {
		t.Errorf("%+v", errs)
	}
	if info, err := ReadInfo(c.RunDir); err != nil || len(info.DiskErrors) != 1 {
		t.Errorf("on record: %+v, %v", info, err)
	}
	said := log.String()
	if strings.Count(said, "a disk of the machine fails") != 1 || !strings.Contains(said, path) || !strings.Contains(said, dir+" is full: free space there") {
		t.Errorf("the log says %q", said)
	}
	var got string
	if ask(t, m, "read", url.Values{"lun": {"0"}}, &got); got != "fine" {
		t.Errorf("the other disk reads %q", got)
	}
	if err := unix.Mount("", dir, "", unix.MS_REMOUNT, "size=32m"); err != nil {
		t.Fatal(err)
	}
	ask(t, m, "fill", url.Values{"lun": {"1"}, "mib": {"16"}}, nil)
}

func TestVMDiskLife(t *testing.T) {
	c := config(t)
	c.Start = Template
	c.Disks = []Disk{{Key: "a", Path: image(t, "first", 1<<20)}}
	m := start(t, c)
	ctx, cancel := testContext()
	defer cancel()
	added := Disk{Key: "b", Path: image(t, "second", 1<<20)}
	lun, err := m.AddDisk(ctx, added)
	if err != nil || lun != 1 {
		t.Fatalf("AddDisk: %d, %v", lun, err)
	}
	if want := ringHere(t, added) && mustQEMU(t, c).ioUring; hasRing(t, m) != want {
		t.Errorf("QEMU uses io_uring: %v, want %v", !want, want)
	}
	ask(t, m, "write", url.Values{"lun": {"1"}, "text": {"changed"}}, nil)

	if err := m.ResizeDisk(ctx, lun, 4<<20); err != nil {
		t.Fatal(err)
	}
	var sizes map[string]int64
	if !eventually(func() bool { ask(t, m, "disks", nil, &sizes); return sizes["1"] == 4<<20 }) {
		t.Errorf("sizes after growing: %v", sizes)
	}
	if fi, _ := os.Stat(added.Path); fi.Size() != 4<<20 {
		t.Errorf("the image has %d bytes", fi.Size())
	}
	if err := m.ResizeDisk(ctx, lun, 1<<20); !errors.Is(err, ErrShrink) {
		t.Errorf("shrinking: %v", err)
	}

	stats, err := m.Stats(ctx)
	if err != nil || len(stats.Disks) != 2 || stats.CPU == 0 || stats.PSS == 0 {
		t.Fatalf("%+v, %v", stats, err)
	}
	if d := stats.Disks[1]; d.LUN != 1 || d.Key != "b" || d.WriteBytes != 4096 { // a page
		t.Errorf("%+v", d)
	}

	if err := m.Throttle(ctx, lun, Throttle{WriteOps: 5}); err != nil {
		t.Fatal(err)
	}
	before := time.Now()
	for range 10 {
		ask(t, m, "write", url.Values{"lun": {"1"}, "text": {"slowly"}}, nil)
	}
	if took := time.Since(before); took < time.Second {
		t.Errorf("10 writes at 5 a second took %v", took)
	}
	if err := m.Throttle(ctx, lun, Throttle{}); err != nil {
		t.Fatal(err)
	}

	if err := m.RemoveDisk(ctx, lun); err != nil {
		t.Fatal(err)
	}
	if !eventually(func() bool { sizes = nil; ask(t, m, "disks", nil, &sizes); return len(sizes) == 1 }) {
		t.Errorf("disks after removing one: %v", sizes)
	}
	if lun, err = m.AddDisk(ctx, added); err != nil || lun != 1 {
		t.Errorf("the same disk again: LUN %d, %v", lun, err)
	}
	if err := m.RemoveDisk(ctx, 7); err == nil {
		t.Error("a disk that is not there was removed")
	}
}

// ringHere tells whether a disk may be served by io_uring.
func ringHere(t *testing.T, d Disk) bool {
	t.Helper()
	f, p, err := d.open(ioUringAllowed())
	if err != nil {
		t.Fatal(err)
	}
	f.Close()
	return p.ioUring
}

func hasRing(t *testing.T, m *Machine) bool {
	t.Helper()
	dir := fmt.Sprintf("/proc/%d/fd", m.Info().PID)
	files, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		if to, _ := os.Readlink(filepath.Join(dir, f.Name())); to == "anon_inode:[io_uring]" {
			return true
		}
	}
	return false
}
