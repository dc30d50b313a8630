package guest

import (
	"fmt"
	"os"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// limitDevices lets the processes of a cgroup use only what the rules allow. A cgroup below it may have rules of its own instead.
func limitDevices(cgroup string, rules []deviceRule) error {
	dir, err := unix.Open(cgroup, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return &os.PathError{Op: "open", Path: cgroup, Err: err}
	}
	defer unix.Close(dir)
	program := deviceProgram(rules)
	license := []byte("GPL\x00")
	load := struct {
		kind, insns      uint32
		program, license uint64
		level, size      uint32 // of the verifier's log: none
		log              uint64
		version, flags   uint32
	}{
		kind: unix.BPF_PROG_TYPE_CGROUP_DEVICE, insns: uint32(len(program)),
		program: uint64(uintptr(unsafe.Pointer(&program[0]))), license: uint64(uintptr(unsafe.Pointer(&license[0]))),
	}
	fd, err := bpf(unix.BPF_PROG_LOAD, unsafe.Pointer(&load), unsafe.Sizeof(load))
	runtime.KeepAlive(program)
	runtime.KeepAlive(license)
	if err != nil {
		return fmt.Errorf("load device rules: %w", err)
	}
	defer unix.Close(fd)
	attach := struct{ target, program, kind, flags, replace uint32 }{
		target: uint32(dir), program: uint32(fd), kind: unix.BPF_CGROUP_DEVICE, flags: unix.BPF_F_ALLOW_OVERRIDE,
	}
	if _, err := bpf(unix.BPF_PROG_ATTACH, unsafe.Pointer(&attach), unsafe.Sizeof(attach)); err != nil {
		return fmt.Errorf("attach device rules to %s: %w", cgroup, err)
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

// deviceRules are a container's own, nil where it has docker's default.
func (c *Container) deviceRules() []deviceRule {
	s := c.spec
	if s.Privileged {
		return []deviceRule{{unix.BPF_DEVCG_DEV_CHAR, -1, -1, allAccess}, {unix.BPF_DEVCG_DEV_BLOCK, -1, -1, allAccess}}
	}
	var own []deviceRule
	for _, d := range s.Devices {
		if d == "all" {
			return []deviceRule{{unix.BPF_DEVCG_DEV_CHAR, -1, -1, allAccess}, {unix.BPF_DEVCG_DEV_BLOCK, -1, -1, allAccess}}
		}
		if r, ok := ruleOf(d); ok {
			own = append(own, r)
		}
	}
	for _, n := range c.nodes {
		own = append(own, deviceRule{unix.BPF_DEVCG_DEV_BLOCK, int64(unix.Major(n.Dev)), int64(unix.Minor(n.Dev)), allAccess})
	}
	if own == nil {
		return nil
	}
	return append(own, defaultDevices...)
}

// ruleOf lets a device of the guest be used, docker's HOST[:CONTAINER[:rwm]]. One that is not there is the stage's to report.
func ruleOf(device string) (deviceRule, bool) {
	path, _, access := splitDevice(device)
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return deviceRule{}, false
	}
	r := deviceRule{unix.BPF_DEVCG_DEV_CHAR, int64(unix.Major(st.Rdev)), int64(unix.Minor(st.Rdev)), access}
	if st.Mode&unix.S_IFMT == unix.S_IFBLK {
		r.kind = unix.BPF_DEVCG_DEV_BLOCK
	}
	return r, true
}
