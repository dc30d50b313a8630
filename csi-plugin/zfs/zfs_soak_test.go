//go:build vm && soak

package zfs

import (
	"path"
	"strings"
	"testing"

	"github.com/cradlestack/cradlestack/csi-plugin/volume/volumetest"
)

// TestVMSoakZFS runs the suite whole, but for the kills: with xfs as well.
func TestVMSoakZFS(t *testing.T) {
	inLab(t, "zpool create -f -O mountpoint=none tank /dev/vda1\n./zfs.test -test.v -test.run 'TestZFS$' -test.skip 'TestZFS/Killed'\n")
}

// TestVMSoakZFSKilled kills every call at every step, in a machine that has ZFS, and has families of clones go in every order. A step is some fifty
// programs, which take that machine a third of a second each at best: each call has a machine of its own, so that one can be run alone.
func TestVMSoakZFSKilled(t *testing.T) {
	tests := []string{"TestFamilies"}
	for _, name := range volumetest.Operations() {
		tests = append(tests, "TestZFS/Killed/^"+name+"$")
	}
	for _, test := range tests {
		t.Run(strings.Trim(path.Base(test), "^$"), func(t *testing.T) {
			inLab(t, "zpool create -f -O mountpoint=none tank /dev/vda1\n./zfs.test -test.v -test.timeout 1h -test.run '"+test+"'\n")
		})
	}
}

// TestVMSoakZFSCold copies a zvol to cold storage as the plugin does by itself, loses it, and has it back in another pool; and has a bucket that nobody serves.
func TestVMSoakZFSCold(t *testing.T) {
	inLab(t, "zpool create -f -O mountpoint=none tank /dev/vda1\n./csi.test -test.v -test.run 'TestZFSCold'\n")
}

// TestVMSoakZFSSanity runs csi-sanity for each kind of volume, and looks whether it left something.
func TestVMSoakZFSSanity(t *testing.T) {
	inLab(t, "zpool create -f -O mountpoint=none tank /dev/vda1\n./csi.test -test.v -test.timeout 1h -test.run 'TestZFSSanity'\n")
}
