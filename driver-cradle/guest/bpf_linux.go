package guest

import (
	"fmt"
	"os"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// attachProgram has a program decide about what the processes of a cgroup do. A cgroup below it may have one of its own instead.
func attachProgram(cgroup string, kind, attach uint32, program []bpfInsn) error {
	dir, err := unix.Open(cgroup, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return &os.PathError{Op: "open", Path: cgroup, Err: err}
	}
	defer unix.Close(dir)
	license := []byte("GPL\x00")
	load := struct {
		kind, insns      uint32
		program, license uint64
		level, size      uint32 // of the verifier's log: none
		log              uint64
		version, flags   uint32
		name             [16]byte
		link, attach     uint32
	}{
		kind: kind, insns: uint32(len(program)), attach: attach,
		program: uint64(uintptr(unsafe.Pointer(&program[0]))), license: uint64(uintptr(unsafe.Pointer(&license[0]))),
	}
	fd, err := bpf(unix.BPF_PROG_LOAD, unsafe.Pointer(&load), unsafe.Sizeof(load))
	runtime.KeepAlive(program)
	runtime.KeepAlive(license)
	if err != nil {
		return fmt.Errorf("load program for %s: %w", cgroup, err)
	}
	defer unix.Close(fd)
	how := struct{ target, program, kind, flags, replace uint32 }{
		target: uint32(dir), program: uint32(fd), kind: attach, flags: unix.BPF_F_ALLOW_OVERRIDE,
	}
	if _, err := bpf(unix.BPF_PROG_ATTACH, unsafe.Pointer(&how), unsafe.Sizeof(how)); err != nil {
		return fmt.Errorf("attach program to %s: %w", cgroup, err)
	}
	return nil
}

func bpf(command uintptr, attr unsafe.Pointer, size uintptr) (int, error) {
	n, _, errno := unix.Syscall(unix.SYS_BPF, command, uintptr(attr), size)
	if errno != 0 {
		return -1, errno
	}
	return int(n), nil
}
