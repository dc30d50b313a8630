//go:build vm

package guest_test

import (
	"strings"
	"testing"
	"time"

	"github.com/cradlestack/cradlestack/driver-cradle/wire"
	"github.com/cradlestack/cradlestack/spec"
)

// A runCase is one container of TestVMContainers: what it is, and what has to come out of it.
type runCase struct {
	c      spec.Container
	stdout string
	stderr string
	code   int
	reason string // why it could not start
	oom    bool
}

func settings(c spec.Container, set func(*spec.Container)) spec.Container {
	set(&c)
	return c
}

// TestVMContainers runs one container per case in one VM and compares what docker would print.
func TestVMContainers(t *testing.T) {
	duration := func(d time.Duration) *spec.Duration { s := spec.Duration(d); return &s }
	cases := []runCase{
		{c: sh("streams", "echo out; echo err >&2"), stdout: "out\n", stderr: "err\n"},
		{c: sh("code", "exit 7"), code: 7},
		{c: sh("signal", "{ sleep 100 & kill -9 $!; wait $!; } 2>/dev/null"), code: 137},
		{
			c:    spec.Container{Name: "notfound", Command: []string{"nope"}},
			code: 127, reason: `exec: "nope": executable file not found in $PATH`,
		},
		{
			c:    spec.Container{Name: "nopath", Command: []string{"/no/pe"}},
			code: 127, reason: `exec: "/no/pe": stat /no/pe: no such file or directory`,
		},
		{
			c:    spec.Container{Name: "notexecutable", Command: []string{"/etc/passwd"}},
			code: 126, reason: `exec: "/etc/passwd": permission denied`,
		},
		{
			c:    settings(sh("nouser", "true"), func(c *spec.Container) { c.User = "nobodyatall" }),
			code: 125, reason: "unable to find user nobodyatall: no matching entries in passwd file",
		},
		{c: sh("env", "echo $PATH:$HOSTNAME:$HOME:$TERM:"), stdout: "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:0123456789ab:/root::\n"},
		{
			c:      settings(sh("user", "id; echo $HOME; pwd; touch /nope"), func(c *spec.Container) { c.User, c.WorkingDir = "1234:4321", "/made/dir" }),
			stdout: "uid=1234 gid=4321 groups=4321\n/\n/made/dir\n", stderr: "touch: /nope: Permission denied\n", code: 1,
		},
		{
			c:      settings(sh("groupadd", "id -G"), func(c *spec.Container) { c.GroupAdd = []string{"7777", "8888"} }),
			stdout: "0 10 7777 8888\n",
		},
		{c: sh("hostname", "hostname; cat /etc/hostname; cat /proc/sys/kernel/hostname"), stdout: strings.Repeat("0123456789ab\n", 3)},
		{
			c:      settings(sh("names", "hostname; dnsdomainname 2>/dev/null; cat /proc/sys/kernel/domainname"), func(c *spec.Container) { c.Hostname, c.Domainname = "box", "example.org" }),
			stdout: "box\nexample.org\n",
		},
		{c: sh("resolv", "cat /etc/resolv.conf"), stdout: "nameserver 192.0.2.53\nsearch example.org\noptions ndots:2\n"},
		{
			c: sh("dev", "cd /dev; for f in null zero full random urandom tty ptmx fd stdin stdout stderr shm mqueue pts; do stat -c '%n %F' $f; done; ls /dev | grep -vc core"),
			stdout: "null character special file\nzero character special file\nfull character special file\nrandom character special file\n" +
				"urandom character special file\ntty character special file\nptmx symbolic link\nfd symbolic link\nstdin symbolic link\n" +
				"stdout symbolic link\nstderr symbolic link\nshm directory\nmqueue directory\npts directory\n14\n",
		},
		{c: sh("shm", "df -k /dev/shm | tail -1 | awk '{print $2}'"), stdout: "65536\n"},
		{
			c:      settings(sh("shmsize", "df -k /dev/shm | tail -1 | awk '{print $2}'"), func(c *spec.Container) { c.ShmSize = 8 << 20 }),
			stdout: "8192\n",
		},
		{
			c:      sh("masks", "ls /proc/acpi /sys/firmware 2>/dev/null | grep -v : | wc -w; echo 1 > /proc/sys/kernel/pid_max; echo h > /proc/sysrq-trigger"),
			stdout: "0\n", stderr: "sh: can't create /proc/sys/kernel/pid_max: Read-only file system\nsh: can't create /proc/sysrq-trigger: Read-only file system\n", code: 1,
		},
		{c: sh("caps", "grep Cap /proc/self/status | awk '{print $2}'"), stdout: "0000000000000000\n00000000a80425fb\n00000000a80425fb\n00000000a80425fb\n0000000000000000\n"},
		{
			c:      settings(sh("capuser", "grep -E 'Cap(Prm|Eff|Bnd)' /proc/self/status | awk '{print $2}'"), func(c *spec.Container) { c.User = "1000" }),
			stdout: "0000000000000000\n0000000000000000\n00000000a80425fb\n",
		},
		{
			c: settings(sh("capadd", "grep CapBnd /proc/self/status | awk '{print $2}'"), func(c *spec.Container) {
				c.CapAdd, c.CapDrop = []string{"NET_ADMIN"}, []string{"ALL"}
			}),
			stdout: "0000000000001000\n",
		},
		{
			c: settings(sh("privileged", "grep CapEff /proc/self/status | awk '{print $2}'; test -b /dev/sda && echo sda; mount -t tmpfs none /tmp && echo mounted; test -w /sys/fs/cgroup/cgroup.procs && echo writable"), func(c *spec.Container) {
				c.Privileged = true
			}),
			stdout: "000001ffffffffff\nsda\nmounted\nwritable\n",
		},
		{
			c:      settings(sh("nnp", "grep NoNewPrivs /proc/self/status"), func(c *spec.Container) { c.NoNewPrivs = true }),
			stdout: "NoNewPrivs:\t1\n",
		},
		{
			c: settings(sh("readonly", "touch /x; touch /dev/shm/x /tmp/y && echo written; echo x > /etc/hosts"), func(c *spec.Container) {
				c.ReadOnly, c.Tmpfs = true, map[string]string{"/tmp": ""}
			}),
			code: 1, stdout: "written\n", stderr: "touch: /x: Read-only file system\nsh: can't create /etc/hosts: Read-only file system\n",
		},
		{
			c: settings(sh("tmpfs", "grep ' /a/b ' /proc/mounts | sed 's/,inode64//'; stat -c %a /a/b"), func(c *spec.Container) {
				c.Tmpfs = map[string]string{"/a/b": "size=1m,mode=0700,exec"}
			}),
			stdout: "tmpfs /a/b tmpfs rw,nosuid,nodev,relatime,size=1024k,mode=700 0 0\n700\n",
		},
		{
			c: settings(sh("ulimits", "ulimit -n; ulimit -c; ulimit -u"), func(c *spec.Container) {
				c.Ulimits = []spec.Ulimit{{Name: "nofile", Soft: 512, Hard: 1024}}
			}),
			stdout: "512\nunlimited\nunlimited\n",
		},
		{c: sh("nofile", "ulimit -n"), stdout: "1048576\n"},
		{
			c: settings(sh("sysctl", "cat /proc/sys/kernel/msgmax /proc/sys/net/ipv4/ip_unprivileged_port_start"), func(c *spec.Container) {
				c.Sysctls = map[string]string{"kernel.msgmax": "4096"}
			}),
			stdout: "4096\n0\n",
		},
		{
			c:      settings(sh("devices", "test -c /dev/net/tun && test -c /dev/fuse && echo both"), func(c *spec.Container) { c.Devices = []string{"/dev/net/tun", "/dev/fuse"} }),
			stdout: "both\n",
		},
		{
			c:      sh("disks", "mknod /sda b 8 0; mknod /tun c 10 200; mknod /null c 1 3; cat /sda /tun; echo x > /null && echo null"),
			stdout: "null\n", stderr: "cat: can't open '/sda': Operation not permitted\ncat: can't open '/tun': Operation not permitted\n",
		},
		{
			c:      settings(sh("devmode", "head -c 1 /dev/ro | wc -c; echo x > /dev/ro"), func(c *spec.Container) { c.Devices = []string{"/dev/sda:/dev/ro:r"} }),
			stdout: "1\n", stderr: "sh: can't create /dev/ro: Operation not permitted\n", code: 1,
		},
		{
			c:      settings(sh("init", "cat /proc/1/cmdline | tr '\\0' ' '; (sleep 0.2 &) ; kill -9 $$"), func(c *spec.Container) { c.Init = true }),
			stdout: "/sbin/docker-init -- sh -c cat /proc/1/cmdline | tr '\\0' ' '; (sleep 0.2 &) ; kill -9 $$ ", code: 137,
		},
		{
			c:    settings(sh("oom", "exec tail -f /dev/zero"), func(c *spec.Container) { c.Resources.Memory = 16 << 20 }),
			code: 137, oom: true,
		},
		{
			c: settings(sh("cgroup", "cd /sys/fs/cgroup; cat memory.max cpu.max pids.max cpu.weight; cat /proc/self/cgroup; mkdir x"), func(c *spec.Container) {
				c.Resources = spec.Limits{Memory: 32 << 20, CPUs: 0.5, Pids: 50, CPUShares: 512}
			}),
			stdout: "33554432\n50000 100000\n50\n20\n0::/\n", stderr: "mkdir: can't create directory 'x': Read-only file system\n", code: 1,
		},
		{c: sh("pid1", "echo $$; set -- /proc/[0-9]*; echo $#"), stdout: "1\n1\n"},
		{c: sh("fds", "ls /proc/self/fd | wc -l"), stdout: "4\n"},
		{c: sh("mountleak", "grep -c cradle /proc/self/mountinfo; awk '{print $5}' /proc/self/mountinfo | sort | head -3 | tr '\\n' ' '"), stdout: "4\n/ /dev /dev/mqueue "},
		{
			c:      settings(sh("term", "tty; echo $TERM; ls -l /dev/console | cut -c1"), func(c *spec.Container) { c.TTY = true }),
			stdout: "/dev/pts/0\r\nxterm\r\nc\r\n",
		},
		{
			c:    settings(sh("graceful", "trap 'echo bye; exit 3' INT; echo ready; sleep 1000 & wait"), func(c *spec.Container) { c.StopSignal, c.StopTimeout = "SIGINT", duration(time.Minute) }),
			code: 3, stdout: "ready\nbye\n",
		},
		{
			c:    settings(sh("stubborn", "trap '' TERM; echo ready; while :; do sleep 1; done"), func(c *spec.Container) { c.StopTimeout = duration(100 * time.Millisecond) }),
			code: 137, stdout: "ready\n",
		},
	}
	p := podSpec{dns: wire.DNS{Servers: []string{"192.0.2.53"}, Search: []string{"example.org"}, Options: []string{"ndots:2"}}}
	p.Resources.Memory = 256 << 20
	for _, c := range cases {
		p.Containers = append(p.Containers, c.c)
	}
	m := boots(t, p)
	for _, name := range []string{"graceful", "stubborn"} {
		m.prints(name, "ready\n")
	}
	if err := m.do("graceful", "stop"); err != nil {
		t.Error(err)
	}
	if err := m.do("stubborn", "stop"); err != nil {
		t.Error(err)
	}
	status := m.ends()
	for i, c := range cases {
		t.Run(c.c.Name, func(t *testing.T) {
			s := status.Containers[i]
			stdout, stderr := m.logs(c.c.Name)
			if stdout != c.stdout {
				t.Errorf("stdout %q, want %q", stdout, c.stdout)
			}
			if stderr != c.stderr {
				t.Errorf("stderr %q, want %q", stderr, c.stderr)
			}
			if s.ExitCode != c.code || s.Error != c.reason || s.OOMKilled != c.oom {
				t.Errorf("exit code %d, error %q, oom %t, want %d, %q, %t", s.ExitCode, s.Error, s.OOMKilled, c.code, c.reason, c.oom)
			}
		})
	}
}

// What is hidden from a container, and write-protected, is its own to choose.
func TestVMShield(t *testing.T) {
	var p podSpec
	p.Containers = []spec.Container{settings(sh("c", "cat /proc/version; cat /proc/sys/kernel/pid_max > /proc/sys/kernel/pid_max && echo writable; mkdir /sys/fs/cgroup/own && echo own; grep -o ' /sys sysfs ro' /proc/mounts; echo x > /proc/uptime"), func(c *spec.Container) {
		c.MaskedPaths, c.ReadonlyPaths, c.WritableCgroups = &[]string{"/proc/version"}, &[]string{"/proc/uptime"}, true
	})}
	m := boots(t, p)
	m.ends()
	stdout, stderr := m.logs("c")
	if stdout != "writable\nown\n /sys sysfs ro\n" || stderr != "sh: can't create /proc/uptime: Read-only file system\n" {
		t.Errorf("%q, %q", stdout, stderr)
	}
}
