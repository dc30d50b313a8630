package ceph

import (
	"errors"
	"strings"
	"testing"

	"github.com/cradlestack/cradlestack/csi-plugin/volume"
)

func TestExplained(t *testing.T) {
	for text, want := range map[string]error{
		"Error ENOENT: subvolume 'v' does not exist":                                             volume.ErrNotFound,
		"Error ENOENT: subvolume group 'g' does not exist":                                       errNoGroup,
		"Error ENOENT: FS 'none' not found":                                                      volume.ErrUnavailable,
		"Error ENOSPC: error in mkdir /volumes/g/w":                                              volume.ErrNoSpace,
		"Error EINVAL: exception in subvolume metadata: No space left on device":                 volume.ErrNoSpace,
		"Error EINVAL: invalid command":                                                          volume.ErrUnavailable,
		"Error EINVAL: key for client.x exists but cap mds does not match":                       errInvalid,
		"2026-11-27T14:00:00 7f0 -1 x\nError EACCES: access denied: does your client key have …": volume.ErrUnavailable,
		"Traceback (most recent call last):\nrados.ObjectNotFound: error connecting":             volume.ErrUnavailable,
	} {
		err := explained(text)
		if !errors.Is(err, want) || strings.Contains(err.Error(), "Traceback") {
			t.Errorf("%s: %v; want %v", text, err, want)
		}
	}
}
