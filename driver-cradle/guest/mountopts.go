package guest

import (
	"fmt"
	"strings"

	"golang.org/x/sys/unix"
)

// mountFlags are the options that mount(8) turns into flags; set or cleared.
var mountFlags = map[string]struct {
	flag  uintptr
	clear bool
}{
	"ro": {unix.MS_RDONLY, false}, "rw": {unix.MS_RDONLY, true},
	"nosuid": {unix.MS_NOSUID, false}, "suid": {unix.MS_NOSUID, true},
	"nodev": {unix.MS_NODEV, false}, "dev": {unix.MS_NODEV, true},
	"noexec": {unix.MS_NOEXEC, false}, "exec": {unix.MS_NOEXEC, true},
	"sync": {unix.MS_SYNCHRONOUS, false}, "async": {unix.MS_SYNCHRONOUS, true},
	"dirsync": {unix.MS_DIRSYNC, false},
	"mand":    {unix.MS_MANDLOCK, false}, "nomand": {unix.MS_MANDLOCK, true},
	"noatime": {unix.MS_NOATIME, false}, "atime": {unix.MS_NOATIME, true},
	"nodiratime": {unix.MS_NODIRATIME, false}, "diratime": {unix.MS_NODIRATIME, true},
	"relatime": {unix.MS_RELATIME, false}, "norelatime": {unix.MS_RELATIME, true},
	"strictatime": {unix.MS_STRICTATIME, false}, "nostrictatime": {unix.MS_STRICTATIME, true},
	"lazytime": {unix.MS_LAZYTIME, false}, "nolazytime": {unix.MS_LAZYTIME, true},
	"defaults": {0, false},
}

// ignoredOptions mean something to mount(8), systemd or docker, and nothing to the kernel.
var ignoredOptions = map[string]bool{
	"auto": true, "noauto": true, "nofail": true, "_netdev": true, "user": true, "nouser": true, "users": true, "bg": true, "fg": true,
	"private": true, "rprivate": true, "shared": true, "rshared": true, "slave": true, "rslave": true,
}

// parseMountOptions splits a mount(8) option string into flags and what the file system gets to read.
func parseMountOptions(flags uintptr, options string) (uintptr, []string) {
	var data []string
	for o := range strings.SplitSeq(options, ",") {
		o = strings.TrimSpace(o)
		if f, ok := mountFlags[o]; ok {
			if f.clear {
				flags &^= f.flag
			} else {
				flags |= f.flag
			}
			continue
		}
		if o != "" && !ignoredOptions[o] && !strings.HasPrefix(o, "x-") {
			data = append(data, o)
		}
	}
	return flags, data
}

// tmpfsData are the options docker lets pass to a tmpfs, moby/sys/mount.
var tmpfsData = map[string]bool{
	"size": true, "mode": true, "uid": true, "gid": true, "nr_inodes": true, "nr_blocks": true, "mpol": true, "huge": true,
}

// parseTmpfsOptions reads docker's --tmpfs options: noexec, nosuid, nodev unless said otherwise.
func parseTmpfsOptions(options string) (flags uintptr, data []string, err error) {
	flags, data = parseMountOptions(unix.MS_NOEXEC|unix.MS_NOSUID|unix.MS_NODEV, options)
	for _, o := range data {
		if name, _, set := strings.Cut(o, "="); !set || !tmpfsData[name] {
			return 0, nil, &stateError{ErrInvalid, fmt.Sprintf("invalid tmpfs option %q", o)}
		}
	}
	return flags, data, nil
}
