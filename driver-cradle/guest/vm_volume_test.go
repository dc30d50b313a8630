//go:build vm

package guest_test

import (
	"fmt"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/cradlestack/cradlestack/driver-cradle/vmm"
	"github.com/cradlestack/cradlestack/driver-cradle/wire"
	"github.com/cradlestack/cradlestack/spec"
)

// with mounts volumes into a container: NAME:PATH[:ro|raw|nocopy|sub=…].
func with(c spec.Container, mounts ...string) spec.Container {
	for _, s := range mounts {
		f := strings.Split(s, ":")
		m := spec.Mount{Volume: f[0], Path: f[1]}
		for _, o := range f[2:] {
			switch {
			case o == "ro":
				m.ReadOnly = true
			case o == "raw":
				m.Raw = true
			case o == "nocopy":
				m.NoCopy = true
			case strings.HasPrefix(o, "sub="):
				m.Subpath = o[4:]
			}
		}
		c.Mounts = append(c.Mounts, m)
	}
	return c
}

func after(c spec.Container, names ...string) spec.Container {
	for _, n := range names {
		c.Lifecycle.After = append(c.Lifecycle.After, spec.After{Container: n, Until: "exited"})
	}
	return c
}

func (m *machine) printed(name, want string) {
	m.Helper()
	stdout, stderr := m.logs(name)
	if stdout != want || stderr != "" {
		m.Errorf("%s printed %q and %q, want %q; %+v", name, stdout, stderr, want, m.state(name))
	}
}

func TestVMVolumes(t *testing.T) {
	share := t.TempDir()
	if err := os.WriteFile(filepath.Join(share, "in"), []byte("from the host\n"), 0o640); err != nil {
		t.Fatal(err)
	}
	if err := os.Chown(filepath.Join(share, "in"), 1234, 4321); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(filepath.Join(share, "sub", "deep"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(share, "sub", "deep", "f"), []byte("deep\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(filepath.Join(share, "own"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Chown(filepath.Join(share, "own"), 1234, 4321); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(share, "secret"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	single := filepath.Join(t.TempDir(), "single.conf")
	if err := os.WriteFile(single, []byte("one file\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	rawDisk := disk(t, "", 8<<20)
	p := podSpec{
		disks: []vmm.Disk{
			{Key: wire.DiskScratch, Path: disk(t, "ext4", 1<<30)},
			{Key: wire.DiskVolume + "ext", Path: disk(t, "ext4", 64<<20)},
			{Key: wire.DiskVolume + "xfs", Path: disk(t, "xfs", 320<<20)},
			{Key: wire.DiskVolume + "raw", Path: rawDisk},
		},
		shares: []vmm.Share{{Name: "dir", Path: share}, {Name: "conf", Path: single, ReadOnly: true}},
		dirs: []wire.Directory{
			{Volume: "dir", Tag: wire.ShareTag, Type: "9p", Path: "dir"}, {Volume: "conf", Tag: wire.ShareTag, Type: "9p", Path: "conf", File: true},
		},
	}
	p.Resources.Memory = 256 << 20
	p.Volumes = []spec.Volume{
		{Name: "ext", Block: &spec.BlockVolume{}},
		{Name: "xfs", Block: &spec.BlockVolume{FSType: "xfs", Options: "noatime,nodev"}},
		{Name: "raw", Block: &spec.BlockVolume{}},
		{Name: "dir", Directory: &spec.DirectoryVolume{Path: share}},
		{Name: "conf", Directory: &spec.DirectoryVolume{Path: single, ReadOnly: true}},
		{Name: "mem", Tmpfs: &spec.TmpfsVolume{Size: 1 << 20}},
		{Name: "local", Scratch: &spec.ScratchVolume{}},
		{Name: "etc", Scratch: &spec.ScratchVolume{}},
		{Name: "usr", Scratch: &spec.ScratchVolume{}},
		{Name: "outer", Scratch: &spec.ScratchVolume{}},
		{Name: "inner", Tmpfs: &spec.TmpfsVolume{}},
	}
	p.Containers = []spec.Container{
		with(sh("block", "ls -A /e /x; echo kept > /e/f; grep -E ' /(e|x) ' /proc/mounts | cut -d' ' -f2-4 | cut -d, -f1-3"), "ext:/e", "xfs:/x"),
		after(with(sh("blockro", "cat /e/f; touch /e/g 2>/dev/null || echo refused"), "ext:/e:ro"), "block"),
		with(sh("raw", "test -b /dev/volumes/raw && printf hello | dd of=/dev/volumes/raw conv=fsync 2>/dev/null && blockdev --getsize64 /dev/volumes/raw"), "raw:/:raw"),
		with(sh("node", "test -b /dev/a/node && test ! -e /dev/volumes && echo there"), "raw:/dev/a/node:raw"),
		with(sh("share", "cat /s/in; stat -c '%u:%g %a' /s/in; mkdir /s/made; echo back > /s/made/out; chown 77:88 /s/made/out; ln -s in /s/link; cat /c; echo x > /c || true"), "dir:/s", "conf:/c"),
		settings(with(sh("shareuser", "cat /s/in; echo mine > /s/own/f; chmod 600 /s/own/f; stat -c '%u:%g %a' /s/own/f; cat /s/secret; touch /s/denied; mv /s/own/f /s/own/g && ls /s/own"), "dir:/s"), func(c *spec.Container) {
			c.User = "1234:4321"
		}),
		with(sh("mem", "echo shared > /m/f; df -k /m | tail -1 | awk '{print $2}'"), "mem:/m"),
		after(with(sh("mem2", "cat /m/f"), "mem:/m"), "mem"),
		with(sh("copyup", "ls /etc/passwd; stat -c %a /new; id -un"), "etc:/etc", "local:/new"),
		with(sh("nocopy", "ls -A /usr | wc -l"), "usr:/usr:nocopy"),
		with(sh("nested", "echo a > /n/ext/f; cat /n/ext/f; ls /n"), "inner:/n/ext", "outer:/n"),
		with(sh("sub", "cat /sub/f"), "dir:/sub:sub=sub/deep"),
		after(with(sh("devshm", "mount | grep ' /dev/shm ' | cut -d' ' -f5"), "ext:/dev/shm"), "block"),
	}
	m := boots(t, p)
	m.ends()
	stdout, _ := m.logs("block")
	if want := "/e:\n\n/x:\n/e ext4 rw,relatime\n/x xfs rw,nodev,noatime\n"; stdout != want {
		t.Errorf("block volumes: %q, want %q", stdout, want)
	}
	m.printed("blockro", "kept\nrefused\n")
	m.printed("raw", "8388608\n")
	m.printed("node", "there\n")
	if data, err := os.ReadFile(rawDisk); err != nil || string(data[:5]) != "hello" {
		t.Errorf("raw volume holds %q, %v", data[:5], err)
	}
	stdout, stderr := m.logs("share")
	if stdout != "from the host\n1234:4321 640\none file\n" || !strings.Contains(stderr, "Read-only file system") {
		t.Errorf("share printed %q, %q", stdout, stderr)
	}
	stdout, stderr = m.logs("shareuser")
	if stdout != "from the host\n1234:4321 600\ng\n" || stderr != "cat: can't open '/s/secret': Permission denied\ntouch: /s/denied: Permission denied\n" {
		t.Errorf("a user of the share printed %q, %q", stdout, stderr)
	}
	var st unix.Stat_t
	if err := unix.Stat(filepath.Join(share, "made", "out"), &st); err != nil || st.Uid != 77 || st.Gid != 88 {
		t.Errorf("what the guest made in the share: %v, %d:%d", err, st.Uid, st.Gid)
	}
	if to, err := os.Readlink(filepath.Join(share, "link")); err != nil || to != "in" {
		t.Errorf("link in the share: %q, %v", to, err)
	}
	m.printed("mem", "1024\n")
	m.printed("mem2", "shared\n")
	m.printed("copyup", "/etc/passwd\n755\nroot\n")
	m.printed("nocopy", "0\n")
	m.printed("nested", "a\next\n")
	m.printed("sub", "deep\n")
	m.printed("devshm", "ext4\n")
}

func TestVMVolumeRefused(t *testing.T) {
	foreign := disk(t, "", 16<<20)
	if err := os.WriteFile(foreign, append([]byte("somebody's data"), make([]byte, 1<<20-15)...), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ name, path, fs, want string }{
		{"blank", disk(t, "", 16<<20), "", "volume v: its disk is blank"},
		{"foreign", foreign, "", "volume v: its disk holds neither ext4 nor xfs and is left as it is"},
		{"other", disk(t, "ext4", 16<<20), "xfs", "volume v: its disk holds ext4, not xfs"},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := podSpec{disks: []vmm.Disk{{Key: wire.DiskScratch, Path: disk(t, "ext4", 256<<20)}, {Key: wire.DiskVolume + "v", Path: c.path}}}
			p.Volumes = []spec.Volume{{Name: "v", Block: &spec.BlockVolume{FSType: c.fs}}}
			p.Containers = []spec.Container{with(sh("c", "true"), "v:/v")}
			before, err := os.ReadFile(c.path)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := tryBoot(t, p); err == nil || !strings.HasPrefix(err.Error(), c.want) {
				t.Errorf("launch: %v, want %s", err, c.want)
			}
			now, err := os.ReadFile(c.path)
			if err != nil || string(now) != string(before) {
				t.Errorf("the disk has changed (%v)", err)
			}
		})
	}
}

func TestVMVirtiofs(t *testing.T) {
	share, second := t.TempDir(), t.TempDir()
	for _, dir := range []string{share, second} {
		if err := os.WriteFile(filepath.Join(dir, "in"), []byte("from the host\n"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	p := podSpec{
		virtio: []vmm.Share{{Name: "one", Path: share}, {Name: "two", Path: second}},
		dirs: []wire.Directory{
			{Volume: "one", Tag: vmm.VirtiofsTag, Type: "virtiofs", Path: "one"}, {Volume: "two", Tag: vmm.VirtiofsTag, Type: "virtiofs", Path: "two"},
		},
	}
	p.Volumes = []spec.Volume{
		{Name: "one", Directory: &spec.DirectoryVolume{Path: share, Transport: "virtiofs"}},
		{Name: "two", Directory: &spec.DirectoryVolume{Path: second, Transport: "virtiofs", ReadOnly: true}},
	}
	p.Containers = []spec.Container{with(sh("c", "cat /1/in /2/in; echo back > /1/out; touch /2/x 2>/dev/null || echo refused; grep -c virtiofs /proc/mounts"), "one:/1", "two:/2")}
	m := boots(t, p)
	m.ends()
	m.printed("c", "from the host\nfrom the host\nrefused\n2\n")
	if data, err := os.ReadFile(filepath.Join(share, "out")); err != nil || string(data) != "back\n" {
		t.Errorf("what the guest wrote: %q, %v", data, err)
	}
}

// Forty layers and twenty volumes in one pod, with disks that appear in any order.
func TestVMManyDisks(t *testing.T) {
	p := podSpec{disks: []vmm.Disk{{Key: wire.DiskScratch, Path: disk(t, "ext4", 256<<20)}}}
	c := sh("c", "cat /layer*/f /v[0-9]*/f | sort -n | tr '\\n' ' '; cat /top")
	for i := range 40 {
		dir := t.TempDir()
		sub := filepath.Join(dir, fmt.Sprintf("layer%d", i))
		if err := os.Mkdir(sub, 0o755); err != nil {
			t.Fatal(err)
		}
		for name, content := range map[string]string{filepath.Join(sub, "f"): fmt.Sprintln(i), filepath.Join(dir, "top"): fmt.Sprintf("layer %d\n", i)} {
			if err := os.WriteFile(name, []byte(content), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		id := fmt.Sprintf("sha256:%064d", i)
		p.disks = append(p.disks, vmm.Disk{Key: wire.DiskLayer + id, Path: filled(t, dir), ReadOnly: true})
		c.Layers = append(c.Layers, spec.Layer{DiffID: id})
	}
	for i := range 20 {
		dir := t.TempDir()
		if err := os.WriteFile(filepath.Join(dir, "f"), fmt.Appendln(nil, 100+i), 0o644); err != nil {
			t.Fatal(err)
		}
		name := fmt.Sprintf("v%d", i)
		p.disks = append(p.disks, vmm.Disk{Key: wire.DiskVolume + name, Path: filled(t, dir)})
		p.Volumes = append(p.Volumes, spec.Volume{Name: name, Block: &spec.BlockVolume{}})
		c = with(c, name+":/"+name)
	}
	p.Containers = []spec.Container{c}
	m := boots(t, p)
	m.ends()
	var want strings.Builder
	for i := range 40 {
		fmt.Fprintf(&want, "%d ", i)
	}
	for i := range 20 {
		fmt.Fprintf(&want, "%d ", 100+i)
	}
	m.printed("c", want.String()+"layer 39\n")
}

// filled makes an ext4 file system with what is in dir.
func filled(t *testing.T, dir string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "disk")
	if out, err := exec.Command("mke2fs", "-q", "-t", "ext4", "-d", dir, path, "4M").CombinedOutput(); err != nil {
		t.Fatalf("mke2fs: %v (apt-get install e2fsprogs)\n%s", err, out)
	}
	return path
}

// An image with accounts, and directories whose owners and modes a volume has to have.
func TestVMDebian(t *testing.T) {
	p := podSpec{image: "debian"}
	p.Resources.Memory = 256 << 20
	p.Volumes = []spec.Volume{{Name: "mail", Scratch: &spec.ScratchVolume{}}, {Name: "tmp", Tmpfs: &spec.TmpfsVolume{}}, {Name: "log", Block: &spec.BlockVolume{}}}
	p.disks = []vmm.Disk{{Key: wire.DiskScratch, Path: disk(t, "ext4", 256<<20)}, {Key: wire.DiskVolume + "log", Path: disk(t, "ext4", 64<<20)}}
	p.Containers = []spec.Container{
		settings(sh("user", "id; echo $HOME"), func(c *spec.Container) { c.User, c.GroupAdd = "www-data", []string{"audio", "4242"} }),
		settings(sh("number", "id -un; id -gn"), func(c *spec.Container) { c.User = "33" }),
		settings(sh("group", "id"), func(c *spec.Container) { c.User = "daemon:staff" }),
		with(sh("copyup", "stat -c '%U:%G %a' /var/mail /tmp /var/log; ls -A /var/log | grep -c . ; stat -c '%U:%G %a' /var/log/btmp 2>/dev/null || true; test -e /var/log/lost+found || echo clean"), "mail:/var/mail", "tmp:/tmp", "log:/var/log"),
		sh("marks", "ls -d /.dockerenv; readlink /etc/mtab; ls /etc/hostname"),
	}
	m := boots(t, p)
	m.ends()
	m.printed("user", "uid=33(www-data) gid=33(www-data) groups=33(www-data),29(audio),4242\n/var/www\n")
	m.printed("number", "www-data\nwww-data\n")
	m.printed("group", "uid=1(daemon) gid=50(staff) groups=50(staff)\n")
	m.printed("marks", "/.dockerenv\n/proc/mounts\n/etc/hostname\n")
	stdout, stderr := m.logs("copyup")
	if !strings.HasPrefix(stdout, "root:mail 2775\nroot:root 1777\nroot:root 755\n") || !strings.HasSuffix(stdout, "clean\n") {
		t.Errorf("copied up: %q, %q", stdout, stderr)
	}
}

// A subpath never leads out of its volume.
func TestVMSubpathEscape(t *testing.T) {
	share := t.TempDir()
	if err := os.Symlink("/etc", filepath.Join(share, "abs")); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("../../..", filepath.Join(share, "rel")); err != nil {
		t.Fatal(err)
	}
	for _, sub := range []string{"abs", "rel", "rel/etc", "../.."} {
		p := podSpec{
			shares: []vmm.Share{{Name: "dir", Path: share}},
			dirs:   []wire.Directory{{Volume: "dir", Tag: wire.ShareTag, Type: "9p", Path: "dir"}},
		}
		p.Volumes = []spec.Volume{{Name: "dir", Directory: &spec.DirectoryVolume{Path: share}}}
		p.Containers = []spec.Container{with(sh("c", "true"), "dir:/d:sub="+sub)}
		if _, err := tryBoot(t, p); err == nil || !strings.Contains(err.Error(), "subpath "+sub+" of volume dir") {
			t.Errorf("subpath %s: %v", sub, err)
		}
	}
}

// A volume at / gets the image's content once and is the container's root from then on.
func TestVMRootVolume(t *testing.T) {
	root := disk(t, "ext4", 256<<20)
	run := func(line string) string {
		p := podSpec{disks: []vmm.Disk{{Key: wire.DiskScratch, Path: disk(t, "ext4", 256<<20)}, {Key: wire.DiskVolume + "root", Path: root}}}
		p.Volumes = []spec.Volume{{Name: "root", Block: &spec.BlockVolume{}}}
		p.Containers = []spec.Container{with(sh("c", line), "root:/")}
		m := boots(t, p)
		m.ends()
		stdout, stderr := m.logs("c")
		if err := m.call("POST", wire.PathShutdown, nil, nil); err != nil {
			t.Error(err)
		}
		if err := m.Kill(); err != nil {
			t.Error(err)
		}
		return stdout + stderr
	}
	if out := run("ls -A / | tr '\\n' ' '; echo first > /root/kept; ls -la /bin/busybox | cut -c1-10"); !strings.Contains(out, "bin dev etc") || !strings.HasSuffix(out, "-rwxr-xr-x\n") {
		t.Errorf("first start printed %q", out)
	}
	if out := run("cat /root/kept; hostname; cat /etc/hostname"); out != "first\n0123456789ab\n0123456789ab\n" {
		t.Errorf("second start printed %q", out)
	}
}

func TestVMVolumeControl(t *testing.T) {
	for _, kind := range []string{"ext4", "xfs"} {
		t.Run(kind, func(t *testing.T) {
			path := disk(t, kind, 400<<20)
			p := podSpec{disks: []vmm.Disk{{Key: wire.DiskScratch, Path: disk(t, "ext4", 256<<20)}, {Key: wire.DiskVolume + "v", Path: path}}}
			p.Volumes = []spec.Volume{{Name: "v", Block: &spec.BlockVolume{FSType: kind}}}
			p.Containers = []spec.Container{with(sh("c", "echo up; while :; do date +%N > /v/now && sync /v/now; df -k /v | tail -1 | awk '{print $2}' > /v/size; sleep 0.1; done"), "v:/v")}
			m := boots(t, p)
			m.prints("c", "up")
			query := "?" + url.Values{"volume": {"v"}}.Encode()
			if err := m.call("POST", wire.PathFreeze+query, nil, nil); err != nil {
				t.Fatal(err)
			}
			frozen, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			again, err := os.ReadFile(path)
			if err != nil || string(frozen) != string(again) {
				t.Errorf("a frozen volume's disk changes (%v)", err)
			}
			var thawed wire.Thawed
			if err := m.call("POST", wire.PathThaw+query, nil, &thawed); err != nil || !thawed.Frozen {
				t.Fatalf("thaw: %v, %v", thawed, err)
			}
			// A freeze with a time ends by itself; thawing comes too late then, and says so.
			if err := m.call("POST", wire.PathFreeze+query+"&timeout=0.2", nil, nil); err != nil {
				t.Fatal(err)
			}
			m.exec("c", guestExec("sh", "-c", "echo late >/v/late && sync /v/late"), "")
			if err := m.call("POST", wire.PathThaw+query, nil, &thawed); err != nil || thawed.Frozen {
				t.Errorf("thaw after the time: %v, %v", thawed, err)
			}
			var usage spec.VolumeStats
			if err := m.call("GET", wire.PathUsage+query, nil, &usage); err != nil || usage.Total < 300<<20 || usage.Used == 0 || usage.Used > usage.Total || usage.Inodes == 0 {
				t.Errorf("usage: %+v, %v", usage, err)
			}
			if err := m.ResizeDisk(t.Context(), 1, 800<<20); err != nil {
				t.Fatal(err)
			}
			if err := m.call("POST", wire.PathGrow+query, nil, nil); err != nil {
				t.Fatal(err)
			}
			e := m.exec("c", guestExec("sh", "-c", "df -k /v | tail -1 | awk '{print $2}'"), "")
			if size := strings.TrimSpace(e.Stdout); len(size) != 6 || size < "700000" {
				t.Errorf("after growing to 800 MiB the volume has %s KiB", size)
			}
			if err := m.call("POST", wire.PathGrow+"?volume=nope", nil, nil); err == nil || err.Error() != "No such volume: nope" {
				t.Errorf("grow of an unknown volume: %v", err)
			}
		})
	}
}
