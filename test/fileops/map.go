package main

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// mappedSize ends within a page.
const mappedSize = 1<<20 + 123

// mapFile says what a shared mapping of a file has. With a seed it makes the file and writes that through the mapping, which others see once it returns.
func mapFile(path, seed string) (_ string, err error) {
	flags := os.O_RDWR
	if seed != "" {
		flags |= os.O_CREATE
	}
	f, err := os.OpenFile(path, flags, 0o644)
	if err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	if seed != "" {
		if err := f.Truncate(mappedSize); err != nil {
			return "", err
		}
	}
	m, err := unix.Mmap(int(f.Fd()), 0, mappedSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return "", &os.PathError{Op: "mmap", Path: path, Err: err}
	}
	defer func() { err = errors.Join(err, unix.Munmap(m)) }()
	if seed == "" {
		return fmt.Sprintf("%x", digest(m)), nil
	}
	for i := range m {
		m[i] = seed[i%len(seed)] ^ byte(i>>8)
	}
	// Another mapping, and who reads, see it before it is on stable storage.
	other, err := unix.Mmap(int(f.Fd()), 0, mappedSize, unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		return "", &os.PathError{Op: "mmap", Path: path, Err: err}
	}
	defer func() { err = errors.Join(err, unix.Munmap(other)) }()
	read, err := os.ReadFile(path)
	if err != nil {
		return "", err
	}
	if string(other) != string(m) || string(read) != string(m) {
		return "", fmt.Errorf("%s: the same file is %x by another mapping and %x to who reads, and should be %x", path, digest(other), digest(read), digest(m))
	}
	if err := unix.Msync(m, unix.MS_SYNC); err != nil {
		return "", &os.PathError{Op: "msync", Path: path, Err: err}
	}
	return fmt.Sprintf("%x", digest(m)), nil
}
