package launch

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"
	"strconv"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

// account is who the service runs as.
type account struct {
	uid, gid int
	groups   []int
	home     string
}

// maxAccounts bounds what is read of the image's passwd and group.
const maxAccounts = 4 << 20

// lookup resolves NAME|UID[:GROUP|GID] in /etc/passwd and /etc/group, which are
// the image's by now. A number needs no entry.
func lookup(spec string) (*account, error) {
	name, group, hasGroup := strings.Cut(spec, ":")
	a := &account{}
	known := false
	err := each("/etc/passwd", 7, func(f []string) bool {
		uid, uerr := id(f[2])
		gid, gerr := id(f[3])
		if uerr != nil || gerr != nil || f[0] != name && f[2] != name {
			return true
		}
		known = true
		name, a.uid, a.gid, a.home = f[0], uid, gid, f[5]
		return false
	})
	if err != nil {
		return nil, err
	}
	if !known {
		if a.uid, err = id(name); err != nil {
			return nil, fmt.Errorf("user %q is not in the image's /etc/passwd", name)
		}
		a.gid = 0
	}
	if hasGroup {
		known = false
		err = each("/etc/group", 4, func(f []string) bool {
			gid, gerr := id(f[2])
			if gerr != nil || f[0] != group && f[2] != group {
				return true
			}
			known, a.gid = true, gid
			return false
		})
		if err != nil {
			return nil, err
		}
		if !known {
			if a.gid, err = id(group); err != nil {
				return nil, fmt.Errorf("group %q is not in the image's /etc/group", group)
			}
		}
		a.groups = []int{a.gid}
		return a, nil
	}
	a.groups = []int{a.gid}
	return a, each("/etc/group", 4, func(f []string) bool {
		gid, err := id(f[2])
		if err == nil && slices.Contains(strings.Split(f[3], ","), name) && !slices.Contains(a.groups, gid) {
			a.groups = append(a.groups, gid)
		}
		return true
	})
}

// id reads a user or group id. What doesn't fit is none: cut to 32 bits it would
// be another, and all ones mean "leave it" to setresuid(2), which would leave
// root.
func id(s string) (int, error) {
	n, err := strconv.ParseUint(s, 10, 32)
	if err == nil && n == 1<<32-1 {
		err = errors.New("no id")
	}
	return int(n), err
}

// each calls f with the fields of every well-formed line.
func each(name string, fields int, f func([]string) bool) error {
	file, err := os.Open(name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer file.Close()
	lines := bufio.NewScanner(io.LimitReader(file, maxAccounts))
	lines.Buffer(nil, maxAccounts)
	for lines.Scan() {
		if p := strings.Split(lines.Text(), ":"); len(p) == fields && !f(p) {
			return nil
		}
	}
	return lines.Err()
}

// become changes the ids of this thread, which execve makes the process. The
// ambient capabilities that the caller gave (AmbientCapabilities= of systemd)
// outlive it; the others go as setuid(2) says.
func (a *account) become() error {
	ambient, err := ambientCaps()
	if err != nil {
		return err
	}
	groups := make([]uint32, len(a.groups))
	for i, g := range a.groups {
		groups[i] = uint32(g)
	}
	if len(ambient) > 0 {
		if err := unix.Prctl(unix.PR_SET_KEEPCAPS, 1, 0, 0, 0); err != nil {
			return err
		}
	}
	// the raw calls: the syscall package's change all threads, which die anyway
	var list unsafe.Pointer
	if len(groups) > 0 {
		list = unsafe.Pointer(&groups[0])
	}
	if _, _, e := unix.RawSyscall(unix.SYS_SETGROUPS, uintptr(len(groups)), uintptr(list), 0); e != 0 {
		return fmt.Errorf("setgroups: %w", e)
	}
	if _, _, e := unix.RawSyscall(unix.SYS_SETRESGID, uintptr(a.gid), uintptr(a.gid), uintptr(a.gid)); e != 0 {
		return fmt.Errorf("setresgid: %w", e)
	}
	if _, _, e := unix.RawSyscall(unix.SYS_SETRESUID, uintptr(a.uid), uintptr(a.uid), uintptr(a.uid)); e != 0 {
		return fmt.Errorf("setresuid: %w", e)
	}
	if a.uid == 0 || len(ambient) == 0 {
		return nil
	}
	return raise(ambient)
}

func ambientCaps() ([]int, error) {
	var out []int
	for c := range unix.CAP_LAST_CAP + 1 {
		set, err := unix.PrctlRetInt(unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_IS_SET, uintptr(c), 0, 0)
		if errors.Is(err, unix.EINVAL) {
			break // this kernel has fewer
		}
		if err != nil {
			return nil, err
		}
		if set == 1 {
			out = append(out, c)
		}
	}
	return out, nil
}

// raise makes exactly these capabilities permitted, effective, inheritable and
// ambient.
func raise(caps []int) error {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	for _, c := range caps {
		d := &data[c/32]
		d.Permitted |= 1 << (c % 32)
		d.Effective |= 1 << (c % 32)
		d.Inheritable |= 1 << (c % 32)
	}
	if err := unix.Capset(&header, &data[0]); err != nil {
		return fmt.Errorf("keep capabilities: %w", err)
	}
	for _, c := range caps {
		if err := unix.Prctl(unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_RAISE, uintptr(c), 0, 0); err != nil {
			return fmt.Errorf("keep capability %d: %w", c, err)
		}
	}
	return nil
}
