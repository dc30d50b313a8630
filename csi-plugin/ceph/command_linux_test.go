package ceph

import (
	"errors"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/cradlestack/cradlestack/csi-plugin/volume"
)

func TestExplained(t *testing.T) {
	for _, test := range []struct {
		errno syscall.Errno
		text  string
		want  error
	}{
		{unix.ENOENT, "subvolume 'v' does not exist", volume.ErrNotFound},
		{unix.ENOENT, "subvolume group 'g' does not exist", errNoGroup},
		{unix.ENOENT, "FS 'none' not found", volume.ErrUnavailable},
		{unix.ENOSPC, "error in mkdir /volumes/g/w", volume.ErrNoSpace},
		{unix.EINVAL, "exception in subvolume metadata: No space left on device", volume.ErrNoSpace},
		{unix.EINVAL, "No handler found for 'fs subvolume ls'", volume.ErrUnavailable},
		{unix.ENOTSUP, "Warning: due to ceph-mgr restart, some PG states may not be up to date\nModule 'volumes' is not enabled/loaded", volume.ErrUnavailable},
		{unix.EINVAL, "key for client.x exists but cap mds does not match", errInvalid},
		{unix.EACCES, "access denied: does your client key have …", volume.ErrUnavailable},
		{unix.ETIMEDOUT, "", volume.ErrUnavailable},
	} {
		if err := explained(test.errno, test.text); !errors.Is(err, test.want) {
			t.Errorf("%v: %s: %v; want %v", test.errno, test.text, err, test.want)
		}
	}
}
