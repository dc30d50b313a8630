package hostfile

import (
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// TestUnlock has another descriptor of a lock's file, as a child has between its fork and its exec.
func TestUnlock(t *testing.T) {
	path := filepath.Join(t.TempDir(), "lock")
	lock := func() *os.File {
		t.Helper()
		f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
		if err == nil {
			err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		}
		if err != nil {
			t.Fatal(err)
		}
		return f
	}
	f := lock()
	child, err := unix.Dup(int(f.Fd()))
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(child)
	if err := Unlock(f); err != nil {
		t.Fatal(err)
	}
	if err := Unlock(lock()); err != nil {
		t.Fatal(err)
	}
	if err := Unlock(f); err == nil {
		t.Error("the lock was given back twice")
	}
}
