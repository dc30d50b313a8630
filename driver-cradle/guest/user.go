package guest

import (
	"errors"
	"io"
	"io/fs"
	"os"
	"slices"

	"github.com/moby/sys/user"
	"golang.org/x/sys/unix"
)

// accountBytes bounds what is read of a container's /etc/passwd and /etc/group.
const accountBytes = 4 << 20

// An execUser is who a command runs as.
type execUser struct {
	uid, gid int
	groups   []int
	home     string
}

// groupIDs are the supplementary groups as the kernel takes them.
func (u *execUser) groupIDs() []uint32 {
	ids := make([]uint32, len(u.groups))
	for i, g := range u.groups {
		ids[i] = uint32(g)
	}
	return ids
}

// lookupUser finds a user, (name|uid)[:(group|gid)], and supplementary groups in the container's own files: its root is this process's.
func lookupUser(spec string, groupAdd []string) (*execUser, error) {
	passwd, group := openAccounts("/etc/passwd"), openAccounts("/etc/group")
	if passwd != nil {
		defer passwd.Close()
	}
	if group != nil {
		defer group.Close()
	}
	return findUser(spec, groupAdd, bounded(passwd), bounded(group))
}

// openAccounts opens a regular file; nil where there is none. An image may have put a FIFO or a device there.
func openAccounts(path string) *os.File {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC|unix.O_NOCTTY, 0)
	if err != nil {
		return nil
	}
	f := os.NewFile(uintptr(fd), path)
	if st, err := f.Stat(); err != nil || !st.Mode().IsRegular() {
		f.Close()
		return nil
	}
	return f
}

func bounded(f *os.File) io.ReadSeeker {
	if f == nil {
		return nil
	}
	return io.NewSectionReader(f, 0, accountBytes)
}

// findUser is docker's rule (moby daemon/oci_linux.go getUser), on files that may be missing.
func findUser(spec string, groupAdd []string, passwd, group io.ReadSeeker) (*execUser, error) {
	reader := func(r io.ReadSeeker) io.Reader {
		if r == nil {
			return nil
		}
		_, _ = r.Seek(0, io.SeekStart)
		return r
	}
	u, err := user.GetExecUser(spec, &user.ExecUser{Home: "/"}, reader(passwd), reader(group))
	if err != nil {
		return nil, &stageError{exitRefused, err.Error()}
	}
	// The primary group is among the supplementary ones, as docker has it since CVE-2022-36109.
	out := &execUser{uid: u.Uid, gid: u.Gid, groups: []int{u.Gid}, home: u.Home}
	add := u.Sgids
	if len(groupAdd) > 0 {
		more, err := user.GetAdditionalGroups(groupAdd, reader(group))
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, &stageError{exitRefused, err.Error()}
		}
		slices.Sort(more)
		add = append(add, more...)
	}
	for _, g := range add {
		if !slices.Contains(out.groups, g) {
			out.groups = append(out.groups, g)
		}
	}
	if out.home == "" {
		out.home = "/"
	}
	return out, nil
}
