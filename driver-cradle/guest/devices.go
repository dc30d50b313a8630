package guest

import (
	"path"
	"strings"

	"golang.org/x/sys/unix"
)

// A deviceRule lets the processes of a cgroup use devices; -1 is any number.
type deviceRule struct {
	kind         uint32 // unix.BPF_DEVCG_DEV_CHAR, unix.BPF_DEVCG_DEV_BLOCK
	major, minor int64
	access       uint32 // of unix.BPF_DEVCG_ACC_*
}

const allAccess = unix.BPF_DEVCG_ACC_MKNOD | unix.BPF_DEVCG_ACC_READ | unix.BPF_DEVCG_ACC_WRITE

// defaultDevices are docker's (moby daemon/pkg/oci/defaults.go, runc specconv.AllowedDevices): any node may be made, and only these
// can be used. The disks of the pod are not among them.
var defaultDevices = []deviceRule{
	{unix.BPF_DEVCG_DEV_CHAR, -1, -1, unix.BPF_DEVCG_ACC_MKNOD},
	{unix.BPF_DEVCG_DEV_BLOCK, -1, -1, unix.BPF_DEVCG_ACC_MKNOD},
	{unix.BPF_DEVCG_DEV_CHAR, 1, 3, allAccess},    // null
	{unix.BPF_DEVCG_DEV_CHAR, 1, 5, allAccess},    // zero
	{unix.BPF_DEVCG_DEV_CHAR, 1, 7, allAccess},    // full
	{unix.BPF_DEVCG_DEV_CHAR, 1, 8, allAccess},    // random
	{unix.BPF_DEVCG_DEV_CHAR, 1, 9, allAccess},    // urandom
	{unix.BPF_DEVCG_DEV_CHAR, 5, 0, allAccess},    // tty
	{unix.BPF_DEVCG_DEV_CHAR, 5, 1, allAccess},    // console
	{unix.BPF_DEVCG_DEV_CHAR, 5, 2, allAccess},    // ptmx
	{unix.BPF_DEVCG_DEV_CHAR, 136, -1, allAccess}, // pts
}

// deviceProgram is a BPF_PROG_TYPE_CGROUP_DEVICE program that lets through what one of the rules allows. Its context is struct
// bpf_cgroup_dev_ctx: access << 16 | kind, major, minor.
func deviceProgram(rules []deviceRule) []bpfInsn {
	const (
		load   = unix.BPF_LDX | unix.BPF_MEM | unix.BPF_W
		move   = unix.BPF_ALU64 | unix.BPF_MOV
		and    = unix.BPF_ALU | unix.BPF_AND
		shift  = unix.BPF_ALU | unix.BPF_RSH
		differ = unix.BPF_JMP | unix.BPF_JNE
		exit   = unix.BPF_JMP | unix.BPF_EXIT
	)
	program := []bpfInsn{
		{load, reg(2, 1), 0, 0},
		{move | unix.BPF_X, reg(3, 2), 0, 0},
		{and, reg(2, 0), 0, 0xffff}, // r2: kind
		{shift, reg(3, 0), 0, 16},   // r3: access
		{load, reg(4, 1), 4, 0},     // r4: major
		{load, reg(5, 1), 8, 0},     // r5: minor
	}
	for _, r := range rules {
		checks := []bpfInsn{{differ, reg(2, 0), 0, int32(r.kind)}}
		if r.access != allAccess {
			checks = append(checks,
				bpfInsn{move | unix.BPF_X, reg(1, 3), 0, 0}, bpfInsn{and, reg(1, 0), 0, int32(r.access)}, bpfInsn{differ | unix.BPF_X, reg(1, 3), 0, 0})
		}
		if r.major >= 0 {
			checks = append(checks, bpfInsn{differ, reg(4, 0), 0, int32(r.major)})
		}
		if r.minor >= 0 {
			checks = append(checks, bpfInsn{differ, reg(5, 0), 0, int32(r.minor)})
		}
		allow := []bpfInsn{{move, reg(0, 0), 0, 1}, {exit, 0, 0, 0}}
		for i := range checks {
			if checks[i].code&^unix.BPF_X == differ {
				checks[i].off = int16(len(checks) - i - 1 + len(allow)) // to the next rule
			}
		}
		program = append(append(program, checks...), allow...)
	}
	return append(program, bpfInsn{move, reg(0, 0), 0, 0}, bpfInsn{exit, 0, 0, 0})
}

// splitDevice reads docker's HOST[:CONTAINER[:rwm]].
func splitDevice(device string) (source, target string, access uint32) {
	source, rest, _ := strings.Cut(device, ":")
	target, modes, _ := strings.Cut(rest, ":")
	source = path.Clean("/" + source)
	if target == "" {
		target = source
	}
	for _, m := range modes {
		access |= map[rune]uint32{'r': unix.BPF_DEVCG_ACC_READ, 'w': unix.BPF_DEVCG_ACC_WRITE, 'm': unix.BPF_DEVCG_ACC_MKNOD}[m]
	}
	if access == 0 {
		access = allAccess
	}
	return source, path.Clean("/" + target), access
}
