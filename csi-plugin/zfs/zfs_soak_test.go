//go:build vm && soak

package zfs

import (
	"errors"
	"os"
	"path"
	"path/filepath"
	"strings"
	"testing"

	"github.com/cradlestack/cradlestack/csi-plugin/volume/volumetest"
	"github.com/cradlestack/cradlestack/test/programs"
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

// TestVMSoakZFSCold copies a zvol to cold storage as the plugin does by itself, loses it, and has it back in another pool; and has a bucket that nobody serves, and a pool that gets full while
// a copy is received.
func TestVMSoakZFSCold(t *testing.T) {
	inLab(t, "zpool create -f -O mountpoint=none tank /dev/vda1\n./zfs.test -test.v -test.run 'TestReceiveFull'\n./csi.test -test.v -test.run 'TestZFSCold'\n")
}

// TestVMSoakZFSSanity runs csi-sanity for each kind of volume, and looks whether it left something.
func TestVMSoakZFSSanity(t *testing.T) {
	inLab(t, "zpool create -f -O mountpoint=none tank /dev/vda1\n./csi.test -test.v -test.timeout 1h -test.run 'TestZFSSanity'\n")
}

// TestVMSoakZFSNomad runs a Nomad in that machine, and with it what users do with volumes: all that the examples show, and what happens under jobs that go on.
func TestVMSoakZFSNomad(t *testing.T) {
	for name, test := range map[string]string{"Examples": "TestZFSNomad", "Live": "TestZFSNomadLive", "Killed": "TestZFSNomadKilled", "Drained": "TestZFSNomadDrained"} {
		t.Run(name, func(t *testing.T) { nomadInLab(t, test, "zpool create -f -O mountpoint=none server /dev/vda1") })
	}
}

// TestVMSoakZFSHosts is TestVMSoakHosts with two nodes and two zpools, in a machine for each part.
func TestVMSoakZFSHosts(t *testing.T) {
	for name, test := range map[string]string{"Copied": "TestZFSNomadCopied", "Drained": "TestZFSNomadMoved", "Lost": "TestZFSNomadNodeLost"} {
		t.Run(name, func(t *testing.T) { nomadInLab(t, test, twoZpools) })
	}
}

// TestVMSoakZFSLost is the restore drill of TestVMSoakLost with two nodes and two zpools, of which the one that has the volume is destroyed.
func TestVMSoakZFSLost(t *testing.T) { nomadInLab(t, "TestZFSNomadLost", twoZpools) }

// TestVMSoakFilerNomad has Nomad's tasks on volumes of their host's filer, which the host's kernel mounts.
func TestVMSoakFilerNomad(t *testing.T) {
	nomadInLab(t, "TestZFSNomadFiler", "zpool create -f -O mountpoint=none server /dev/vda1")
}

// twoZpools are of the nodes' names.
const twoZpools = `zpool create -f -O mountpoint=none client1 /dev/vda1
truncate -s 1G /client2
zpool create -f -O mountpoint=none client2 /client2`

// nomadInLab runs a test of csi-plugin that needs Nomad. For what nomadtest wants of a host: cgroups, CNI's plugins, and iptables-save, which has nothing to say where the
// kernel has no iptables. The job's directory is laid out as the repository's is. Nomad takes no storage of a file system that does not say how large it is, as an initramfs.
func nomadInLab(t *testing.T, test, zpools string) {
	t.Setenv("ZFSLAB_CPUS", "2")
	t.Setenv("ZFSLAB_MEMORY", "4096")
	inLabWith(t, `mount -t cgroup2 none /sys/fs/cgroup
mount -t tmpfs -o size=2g tmp /tmp
mkdir -p /opt/cni/bin /var/lib
cp bridge /opt/cni/bin/
for program in iptables-save ip6tables-save; do printf '#!/bin/sh\n' >/bin/$program; chmod +x /bin/$program; done
echo root:x:0:0::/root:/bin/sh >/etc/passwd; echo nobody:x:65534:65534::/:/bin/sh >>/etc/passwd
echo root:x:0: >/etc/group; echo nogroup:x:65534: >>/etc/group
`+zpools+`
NOMADTEST_PATIENCE=10m ./csi.test -test.v -test.timeout 2h -test.run '^`+test+`$'
`, func(dir string) {
		root, err := programs.Root()
		if err != nil {
			t.Fatal(err)
		}
		nomad, err := programs.Tool("nomad")
		if err != nil {
			t.Fatal(err)
		}
		tools := filepath.Join(dir, "tools")
		for link, to := range map[string]string{
			"arch_test.go": filepath.Join(root, "arch_test.go"), "bin/cradle-csi": filepath.Join(root, "bin/cradle-csi"), "bin/cradle-filer": filepath.Join(root, "bin/cradle-filer"), "nomad": nomad,
			"examples/nomad/volumes": filepath.Join(root, "examples/nomad/volumes"), "bridge": "/usr/lib/cni/bridge",
		} {
			at := filepath.Join(dir, link)
			if err := errors.Join(os.MkdirAll(filepath.Dir(at), 0o755), os.Symlink(to, at)); err != nil {
				t.Fatal(err)
			}
		}
		err = errors.Join(os.MkdirAll(tools, 0o755), os.WriteFile(filepath.Join(tools, "build.sh"), []byte("#!/bin/sh\necho /job/$1\n"), 0o755))
		if err != nil {
			t.Fatal(err)
		}
	})
}
