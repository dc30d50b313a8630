// Package cgroup removes cgroups, of which tests and make up make whole trees. Any code that is not part of a product's program may import it.
package cgroup

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// patience bounds how long the kernel may keep a cgroup whose processes have been killed.
const patience = time.Minute

// RemoveTree removes the cgroup at a path with all below; there need not be one. The kernel lets go of one a moment after its last process has died.
func RemoveTree(path string) error {
	entries, err := os.ReadDir(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, e := range entries {
		if e.IsDir() {
			if err := RemoveTree(filepath.Join(path, e.Name())); err != nil {
				return err
			}
		}
	}
	for begin := time.Now(); ; time.Sleep(10 * time.Millisecond) {
		err := unix.Rmdir(path)
		if err == nil || errors.Is(err, unix.ENOENT) {
			return nil
		}
		if !errors.Is(err, unix.EBUSY) || time.Since(begin) > patience {
			return &fs.PathError{Op: "rmdir", Path: path, Err: err}
		}
	}
}
