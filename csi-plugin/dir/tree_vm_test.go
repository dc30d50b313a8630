//go:build vm

package dir

import (
	"context"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// copyOf copies the folder a to the folder b.
func copyOf(t *testing.T, dir string) (bool, error) {
	t.Helper()
	root, err := os.OpenRoot(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	return copyTree(t.Context(), root, "a", root, "b")
}

// TestRootTree compares a copy with everything that a directory can hold, by tar, which sees all of it.
func TestRootTree(t *testing.T) {
	for _, fsType := range []string{"ext4", "xfs"} {
		t.Run(fsType, func(t *testing.T) {
			dir := filesystem(t, fsType)
			command(t, "sh", "-ec", `cd "$0"; mkdir -p a/sub/deep a/empty; cd a
				echo text >file; ln file sub/hard; ln -s ../file sub/link; ln -s /etc/passwd outside; ln -s nowhere dangling
				mkfifo fifo; mknod null c 1 3; truncate -s 100M sparse; printf end >>sparse
				chmod 4755 file; chmod 1777 sub; chown 1234:5678 file sub/deep; chown -h 99:99 outside
				touch -d 2001-02-03T04:05:06.789 file sub; touch -h -d 2002-02-03 outside; touch -d 2003-02-03 .`, dir)
			if err := unix.Setxattr(filepath.Join(dir, "a/file"), "user.note", []byte("kept"), 0); err != nil {
				t.Fatal(err)
			}
			netRaw := "\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00" // linux/capability.h, vfs_cap_data
			if err := unix.Setxattr(filepath.Join(dir, "a/sparse"), "security.capability", []byte(netRaw), 0); err != nil {
				t.Fatal(err)
			}
			copied, err := copyOf(t, dir)
			if err != nil {
				t.Fatal(err)
			}
			value := make([]byte, 64)
			if n, err := unix.Getxattr(filepath.Join(dir, "b/sparse"), "security.capability", value); err != nil || string(value[:n]) != netRaw {
				t.Errorf("the capabilities of a file are %q, %v", value[:max(n, 0)], err)
			}
			if shares := fsType == "xfs"; copied == shares {
				t.Errorf("copied: %t", copied)
			}
			for _, f := range []string{"a", "b"} {
				command(t, "tar", "-C", filepath.Join(dir, f), "--sort=name", "--xattrs", "--format=pax", "--pax-option=delete=atime,delete=ctime", "-cf", filepath.Join(dir, f+".tar"), ".")
			}
			command(t, "cmp", filepath.Join(dir, "a.tar"), filepath.Join(dir, "b.tar"))
			var a, b unix.Stat_t
			if err := unix.Stat(filepath.Join(dir, "b/file"), &a); err != nil {
				t.Fatal(err)
			}
			if err := unix.Stat(filepath.Join(dir, "b/sub/hard"), &b); err != nil || a.Ino != b.Ino {
				t.Errorf("the two names of a file are two files: %v", err)
			}
			if err := unix.Stat(filepath.Join(dir, "b/sparse"), &a); err != nil || a.Blocks*512 > 1<<20 {
				t.Errorf("a file that is a hole takes %d bytes, %v", a.Blocks*512, err)
			}
		})
	}
}

// TestRootTreeHostile copies a folder whose owner swaps directories and files for links that lead out of it, all the time: nothing of what
// they lead to is in any copy.
func TestRootTreeHostile(t *testing.T) {
	dir := t.TempDir()
	secret := filepath.Join(dir, "secret")
	command(t, "sh", "-ec", `mkdir "$0"; echo classified >"$0/file"; cd "$1"; mkdir -p a/d; echo x >a/d/file; echo x >a/file`, secret, dir)
	ctx, cancel := context.WithCancel(t.Context())
	var g sync.WaitGroup
	swap := func(name, to string) {
		at, aside := filepath.Join(dir, "a", name), filepath.Join(dir, "a", "."+name)
		for ctx.Err() == nil {
			os.Rename(at, aside)
			os.Symlink(to, at)
			os.Remove(at)
			os.Rename(aside, at)
		}
	}
	g.Go(func() { swap("d", secret) })
	g.Go(func() { swap("file", filepath.Join(secret, "file")) })
	copies := 0
	for end := time.Now().Add(2 * time.Second); copies == 0 || time.Now().Before(end); {
		if _, err := copyOf(t, dir); err == nil { // else it met a link that leads out
			copies++
			err := filepath.WalkDir(filepath.Join(dir, "b"), func(path string, d os.DirEntry, err error) error {
				if err == nil && d.Type().IsRegular() {
					if data, rerr := os.ReadFile(path); rerr != nil || string(data) != "x\n" {
						t.Errorf("%s holds %q, %v", path, data, rerr)
					}
				}
				return err
			})
			if err != nil {
				t.Error(err)
			}
		}
		if err := os.RemoveAll(filepath.Join(dir, "b")); err != nil {
			t.Fatal(err)
		}
	}
	cancel()
	g.Wait()
}
