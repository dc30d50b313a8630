//go:build vm && soak

package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/cradlestack/cradlestack/test/programs"
)

// TestVMSoakGaneshaZFS: in a machine with ZFS, NFS-Ganesha serves a volume and its snapshots, by what is mounted when a client comes to it, while the filer is killed;
// nothing of them keeps the zpool from being exported once the filer has ended.
func TestVMSoakGaneshaZFS(t *testing.T) {
	const script = `set -e
cp -a system/. /
hostname zfs
zpool create -o cachefile=none -O mountpoint=none tank /dev/vda1
DHV_VOLUME_ID=vol DHV_VOLUMES_DIR=/mounts DHV_CAPACITY_MIN_BYTES=67108864 DHV_PARAMETERS={} ./cradle-csi host-volume create --backend zfs --pool tank/cradle
umount /mounts/*
until_() { n=0; until "$@" >/tmp/out 2>&1; do n=$((n+1)); if [ $n -gt 60 ]; then cat /tmp/out /filer.log; exit 1; fi; sleep 1; done; }
serve() {
	./cradle-filer serve --engine ganesha --backend zfs --pool tank/cradle --state /state --listen 127.0.0.1:20490 >>/filer.log 2>&1 &
	pid=$!
	until_ ./cradle-filer status
}
is() { if [ "$1" != "$2" ]; then echo "there is '$2', not '$1'"; cat /filer.log; exit 1; fi; }
refused() { if "$@" >/tmp/out 2>&1; then echo "done: $*"; exit 1; fi; }
mounted() { grep -c 'tank/cradle/vol@.*filer:snapshot' /proc/mounts || true; }
at() { echo "nfs://127.0.0.1$path/$1?nfsport=20490&version=4&auto-traverse-mounts=0"; }
text() { until_ nfs-cat "$(at "$1")"; cat /tmp/out; } # after a start clients wait until those of before could be there
put() { echo "$2" >/tmp/put; nfs-cp /tmp/put "$(at "$1")"; }
names() { nfs-ls "$(at "$1")" | awk '{print $NF}' | sort | tr '\n' ' '; }
serve
path=$(./cradle-filer publish vol --client 127.0.0.1 -o json | sed -n 's/.*"export": *"\([^"]*\)".*/\1/p')
put file first
is s "$(./cradle-filer snapshot vol s)"
put other second
is 's ' "$(names .snapshots)"
is 0 "$(mounted)"
is first "$(text .snapshots/s/file)"
is second "$(text other)"
is 1 "$(mounted)"
refused put .snapshots/s/new text
refused nfs-cat "$(at .snapshots/s/other)"
kill -9 $pid
serve
is 0 "$(mounted)"
is first "$(text .snapshots/s/file)"
./cradle-filer snapshot vol t
./cradle-filer rollback vol s
is first "$(text file)"
refused nfs-cat "$(at other)"
is second "$(text .snapshots/t/other)"
is 2 "$(mounted)"
kill $pid
wait $pid
is 0 "$(mounted)"
umount /run/cradle/filer/volumes/vol
zpool export tank
echo all passed
`
	lab, err := programs.Lab()
	if err != nil {
		t.Fatal(err)
	}
	job := t.TempDir()
	for _, name := range []string{"cradle-filer", "cradle-csi"} {
		program, err := programs.Path(name)
		if err == nil {
			err = os.Symlink(program, filepath.Join(job, name))
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	ganeshaSystem(t, job, "zfs", "/usr/bin/nfs-ls", "/usr/bin/nfs-cat", "/usr/bin/nfs-cp")
	if err := os.WriteFile(filepath.Join(job, "run.sh"), []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(lab, "run", job)
	cmd.Env = append(os.Environ(), "ZFSLAB_TIMEOUT=1200")
	out, err := cmd.CombinedOutput()
	if err != nil || !strings.Contains(string(out), "all passed") {
		t.Fatal(fmt.Errorf("%w\n%s", err, out[max(0, len(out)-16<<10):]))
	}
}

// ganeshaSystem puts into a machine's job what NFS-Ganesha, and more programs of this host, need there: "cp -a system/. /".
func ganeshaSystem(t testing.TB, job, hostname string, more ...string) {
	t.Helper()
	system := filepath.Join(job, "system")
	add := func(path string) {
		t.Helper()
		to := filepath.Join(system, path)
		if _, err := os.Stat(to); err == nil {
			return
		}
		data, err := os.ReadFile(path)
		if err == nil {
			err = errors.Join(os.MkdirAll(filepath.Dir(to), 0o755), os.WriteFile(to, data, 0o755))
		}
		if err != nil {
			t.Fatalf("%v: apt-get install nfs-ganesha nfs-ganesha-vfs libnfs-utils", err)
		}
	}
	plugins, err := filepath.Glob("/usr/lib/*/libnfsidmap/nsswitch.so")
	if err != nil {
		t.Fatal(err)
	}
	vfs, err := filepath.Glob("/usr/lib/*/ganesha/libfsalvfs.so")
	if err != nil || len(vfs) == 0 || len(plugins) == 0 {
		t.Fatalf("no libfsalvfs.so, or no nsswitch.so (%v): apt-get install nfs-ganesha nfs-ganesha-vfs libnfs-utils", err)
	}
	for _, program := range slices.Concat(vfs, plugins, []string{"/usr/bin/ganesha.nfsd"}, more) {
		add(program)
		out, err := exec.Command("ldd", program).CombinedOutput()
		if err != nil {
			t.Fatalf("ldd %s: %v\n%s", program, err, out)
		}
		for _, field := range strings.Fields(string(out)) {
			if strings.HasPrefix(field, "/") {
				add(strings.TrimSuffix(field, ":"))
			}
		}
	}
	add("/etc/netconfig")
	for name, text := range map[string]string{"hosts": "127.0.0.1 localhost " + hostname + "\n", "passwd": "root:x:0:0::/:/bin/sh\n", "idmapd.conf": "", "nsswitch.conf": "passwd: files\n"} {
		if err := os.WriteFile(filepath.Join(system, "etc", name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}
