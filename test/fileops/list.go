package main

import (
	"crypto/sha256"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// list describes all that is below dir, one line each: path, type and mode, owner, links, size, content.
func list(dir string) (string, error) {
	var b strings.Builder
	err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name, err := filepath.Rel(dir, path)
		if err != nil {
			return err
		}
		line, err := describe(path)
		fmt.Fprintf(&b, "%q %s\n", name, line)
		return err
	})
	return b.String(), err
}

func describe(path string) (string, error) {
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		return "", &os.PathError{Op: "lstat", Path: path, Err: err}
	}
	text := status(&st)
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFLNK:
		to, err := os.Readlink(path)
		return fmt.Sprintf("%s -> %q", text, to), err
	case unix.S_IFREG:
		f, err := os.Open(path)
		if err != nil {
			return "", err
		}
		defer f.Close()
		h := sha256.New()
		n, err := io.Copy(h, f)
		if err == nil && n != st.Size {
			err = fmt.Errorf("%s has %d bytes to read, and a size of %d", path, n, st.Size)
		}
		return fmt.Sprintf("%s %x", text, h.Sum(nil)[:8]), err
	}
	return text, nil
}

// status is the part of a file's attributes that is the same on all file systems: not the size of directories, nor how many links they have.
func status(st *unix.Stat_t) string {
	text := fmt.Sprintf("%o %d:%d", st.Mode, st.Uid, st.Gid)
	if st.Mode&unix.S_IFMT != unix.S_IFDIR {
		text += fmt.Sprintf(" %d links %d bytes", st.Nlink, st.Size)
	}
	return text
}
