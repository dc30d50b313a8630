package guest

import (
	"errors"
	"fmt"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/cradlestack/cradlestack/spec"
)

// mountCeph mounts a directory of a CephFS by the kernel's own client. The key is in the kernel's memory alone, and /proc/mounts does not tell it.
func mountCeph(c *spec.CephVolume, at string) error {
	var uts unix.Utsname
	if err := unix.Uname(&uts); err != nil {
		return fmt.Errorf("uname: %w", err)
	}
	if release := unix.ByteSliceToString(uts.Release[:]); !spec.CephCoherent(release) {
		return fmt.Errorf("this boot package's kernel, %s, reads files of CephFS wrong to which others write (Linux before 6.12.7): use the package %q", release, "default")
	}
	flags, data := parseMountOptions(0, c.Options)
	source, own := c.Mount()
	for _, o := range own {
		name, _, _ := strings.Cut(o, "=")
		if _, set := spec.MountOption(data, name); set {
			return &stateError{ErrInvalid, fmt.Sprintf("ceph option %s is set by the guest itself", name)}
		}
	}
	if c.ReadOnly {
		flags |= unix.MS_RDONLY
	}
	err := mount(source, at, "ceph", flags, strings.Join(append(own, data...), ","))
	switch {
	case errors.Is(err, unix.ENODEV):
		return fmt.Errorf("this boot package's kernel has no CephFS: use the package %q: %w", "default", err)
	case errors.Is(err, unix.EACCES), errors.Is(err, unix.EPERM):
		err = fmt.Errorf("the cluster does not know client.%s by its key any more: %w", c.Client, err)
	case errors.Is(err, unix.ETIMEDOUT), errors.Is(err, unix.EIO), errors.Is(err, unix.EHOSTUNREACH):
		err = fmt.Errorf("no monitor, or no metadata server, answers: does the pod's network lead there?: %w", err)
	}
	if err != nil {
		return fmt.Errorf("ceph %s: %w", source, err)
	}
	return nil
}
