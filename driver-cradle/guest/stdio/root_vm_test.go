//go:build vm

package stdio

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cradlestack/cradlestack/internal/locked"
)

// TestRootDiskFull: with the disk full, the container goes on, whoever is attached gets everything, and the latest output is kept; the
// log goes back to the disk when it can.
func TestRootDiskFull(t *testing.T) {
	disk := t.TempDir()
	if err := unix.Mount("tmpfs", disk, "tmpfs", 0, "size=2m"); err != nil {
		t.Fatalf("mount tmpfs (needs root): %v", err)
	}
	defer func() {
		if err := unix.Unmount(disk, 0); err != nil {
			t.Errorf("something holds the disk: %v", err)
		}
	}()
	o, err := Open(filepath.Join(disk, "log"), Options{MaxSize: 64 << 20})
	if err != nil {
		t.Fatal(err)
	}
	c := start(t, o)
	say(t, o, c.stdout, "first\n")
	ballast := filepath.Join(disk, "ballast")
	f, err := os.Create(ballast)
	if err != nil {
		t.Fatal(err)
	}
	for err == nil {
		_, err = f.Write(make([]byte, 64<<10))
	}
	f.Close()

	var got locked.Buffer
	a := attach(t, o, AttachOptions{Stream: true, Stdout: &got})
	line := strings.Repeat("x", 999) + "\n"
	const n = 3000 // more than is kept in memory
	for i := range n {
		if _, err := c.stdout.WriteString(line); err != nil {
			t.Fatal(err)
		}
		if i%100 == 0 { // an attached client keeps up; what it has not read is waited for only when a whole log is full
			eventually(t, "client has it", func() bool { return len(got.String()) >= (i+1)*len(line) })
		}
	}
	eventually(t, "client has it all", func() bool { return len(got.String()) == n*len(line) })
	if kept := logged(t, o, LogOptions{Tail: 5}); kept != strings.Repeat(line, 5) {
		t.Errorf("the last lines are %d bytes", len(kept))
	}
	if usage := o.Usage(); usage > 2<<20+3*memorySegment {
		t.Errorf("%d bytes kept", usage)
	}
	if err := os.Remove(ballast); err != nil {
		t.Fatal(err)
	}
	for range 600 {
		c.stdout.WriteString(line)
	}
	c.stdout.WriteString("last\n")
	c.exit(t)
	within(t, a.done, "attach")
	o.Close()
	if o, err = Open(filepath.Join(disk, "log"), Options{}); err != nil {
		t.Fatal(err)
	}
	if kept := logged(t, o, LogOptions{Tail: 1, Since: time.Unix(1, 0)}); kept != "last\n" {
		t.Errorf("the disk has %q as the last line", kept)
	}
	o.Close()
}
