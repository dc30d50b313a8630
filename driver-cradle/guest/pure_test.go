package guest

import (
	"bytes"
	"errors"
	"math"
	"slices"
	"strings"
	"testing"
	"unicode/utf8"

	"golang.org/x/sys/unix"

	"github.com/cradlestack/cradlestack/driver-cradle/wire"
	"github.com/cradlestack/cradlestack/spec"
)

const (
	passwdFile = "root:x:0:0:root:/root:/bin/sh\ndaemon:x:1:1::/usr/sbin:/bin/false\nbroken line\n1000:x:77:78::/home/number:/bin/sh\nadm:x:3:4::/var/adm:\nnohome:x:5:5:::\n"
	groupFile  = "root:x:0:\nadm:x:4:daemon,adm\nwheel:x:10:root,daemon\ntty:x:5:\nx:y\n"
)

// What a stage says reaches the agent whole, however long a command's name is.
func TestShortened(t *testing.T) {
	if got := shortened("short"); got != "short" {
		t.Errorf("a short text becomes %q", got)
	}
	got := shortened(`exec: "` + strings.Repeat("ä", 100_000) + `": not found`)
	if len(got) > 4<<10 || !strings.HasPrefix(got, `exec: "ää`) || !strings.HasSuffix(got, `ää": not found`) || !utf8.ValidString(got) {
		t.Errorf("a long text becomes %d bytes: %q", len(got), got)
	}
}

func TestFindUser(t *testing.T) {
	for _, x := range []struct {
		spec     string
		add      []string
		uid, gid int
		groups   []int
		home     string
		err      string
	}{
		{spec: "", uid: 0, gid: 0, groups: []int{0, 10}, home: "/root"},
		{spec: "daemon", uid: 1, gid: 1, groups: []int{1, 4, 10}, home: "/usr/sbin"},
		{spec: "1", uid: 1, gid: 1, groups: []int{1, 4, 10}, home: "/usr/sbin"},
		{spec: "daemon:tty", uid: 1, gid: 5, groups: []int{5}, home: "/usr/sbin"},
		{spec: "daemon:0", uid: 1, gid: 0, groups: []int{0}, home: "/usr/sbin"},
		{spec: "4711", uid: 4711, gid: 0, groups: []int{0}, home: "/"},
		{spec: "4711:4712", uid: 4711, gid: 4712, groups: []int{4712}, home: "/"},
		{spec: "1000", uid: 1000, gid: 0, groups: []int{0}, home: "/"}, // the user named 1000 is another one
		{spec: "nohome", uid: 5, gid: 5, groups: []int{5}, home: "/"},
		{spec: "daemon", add: []string{"tty", "99", "wheel"}, uid: 1, gid: 1, groups: []int{1, 4, 10, 5, 99}, home: "/usr/sbin"},
		{spec: "nobody", err: "unable to find user nobody: no matching entries in passwd file"},
		{spec: "root:nogroup", err: "unable to find group nogroup: no matching entries in group file"},
		{spec: "root", add: []string{"nogroup"}, err: "unable to find group nogroup: no matching entries in group file"},
		{spec: "-1", err: "uids and gids must be in range 0-2147483647"},
	} {
		u, err := findUser(x.spec, x.add, strings.NewReader(passwdFile), strings.NewReader(groupFile))
		if x.err != "" {
			if e, ok := errors.AsType[*stageError](err); !ok || e.Text != x.err || e.Code != exitRefused {
				t.Errorf("%q %v: error %v, want %q", x.spec, x.add, err, x.err)
			}
			continue
		}
		if err != nil {
			t.Errorf("%q %v: %v", x.spec, x.add, err)
			continue
		}
		slices.Sort(u.groups[1:])
		slices.Sort(x.groups[1:])
		if u.uid != x.uid || u.gid != x.gid || u.home != x.home || !slices.Equal(u.groups, x.groups) {
			t.Errorf("%q %v: %+v, want %+v", x.spec, x.add, *u, x)
		}
	}
	// An image without accounts.
	if u, err := findUser("12:34", nil, nil, nil); err != nil || u.uid != 12 || u.gid != 34 || u.home != "/" {
		t.Errorf("without files: %+v, %v", u, err)
	}
	if u, err := findUser("", []string{"5"}, nil, nil); err != nil || u.uid != 0 || !slices.Equal(u.groups, []int{0, 5}) {
		t.Errorf("root without files: %+v, %v", u, err)
	}
}

func FuzzFindUser(f *testing.F) {
	f.Add("daemon:tty", "wheel", passwdFile, groupFile)
	f.Add("0", "1", "root:x:99999999999:0::/:\n", "a:b:c:d,e")
	f.Add("x", "", strings.Repeat("a", 70000), ":::::")
	f.Fuzz(func(t *testing.T, spec, add, passwd, group string) {
		u, err := findUser(spec, []string{add}, strings.NewReader(passwd), strings.NewReader(group))
		if err != nil {
			return
		}
		for _, id := range append(u.groups, u.uid, u.gid) {
			if id < 0 || id > math.MaxInt32 {
				t.Errorf("id %d is none that the kernel takes", id)
			}
		}
		if u.home == "" {
			t.Error("no home")
		}
	})
}

func TestEnv(t *testing.T) {
	got := containerEnv([]string{"A=1", "PATH=/p", "B=", "A=2", "E=a=b"}, "host", true)
	if want := []string{"PATH=/p", "HOSTNAME=host", "TERM=xterm", "A=2", "B=", "E=a=b"}; !slices.Equal(got, want) {
		t.Errorf("container's environment %q, want %q", got, want)
	}
	got = mergeEnv([]string{"A=1", "AB=2"}, []string{"A", "C=3", "NOT"})
	if want := []string{"AB=2", "C=3"}; !slices.Equal(got, want) {
		t.Errorf("merged %q, want %q", got, want)
	}
	if v := lookupEnv([]string{"X=1", "XY=2", "X=3"}, "X"); v != "3" {
		t.Errorf("looked up %q", v)
	}
}

func TestCaps(t *testing.T) {
	for _, x := range []struct {
		privileged bool
		add, drop  []string
		want       capSet
	}{
		{want: 0xa80425fb},
		{privileged: true, drop: []string{"ALL"}, want: 0x1ffffffffff},
		{add: []string{"cap_net_admin"}, want: 0xa80425fb | 1<<unix.CAP_NET_ADMIN},
		{drop: []string{"CHOWN"}, want: 0xa80425fa},
		{add: []string{"NET_ADMIN"}, drop: []string{"ALL"}, want: 1 << unix.CAP_NET_ADMIN},
		{add: []string{"ALL"}, drop: []string{"CAP_SYS_ADMIN"}, want: 0x1ffffffffff &^ (1 << unix.CAP_SYS_ADMIN)},
		{add: []string{"all"}, drop: []string{"all"}, want: 0},
	} {
		got, err := resolveCaps(x.privileged, x.add, x.drop)
		if err != nil || got != x.want {
			t.Errorf("add %v, drop %v: %x, %v, want %x", x.add, x.drop, got, err, x.want)
		}
	}
	if _, err := resolveCaps(false, []string{"FLY"}, nil); !errors.Is(err, ErrInvalid) {
		t.Errorf("an unknown capability: %v", err)
	}
}

func TestLimits(t *testing.T) {
	got, err := resolveLimits([]spec.Ulimit{{Name: "nofile", Soft: 10, Hard: 20}, {Name: "memlock", Soft: -1, Hard: -1}})
	if err != nil {
		t.Fatal(err)
	}
	last := map[string]rlimit{}
	for _, l := range got {
		last[l.Name] = l
	}
	if l := last["nofile"]; l.Soft != 10 || l.Hard != 20 || l.Resource != unix.RLIMIT_NOFILE {
		t.Errorf("nofile %+v", l)
	}
	if l := last["memlock"]; l.Soft != math.MaxUint64 || l.Hard != math.MaxUint64 {
		t.Errorf("memlock %+v", l)
	}
	for _, u := range []spec.Ulimit{{Name: "nope"}, {Name: "core", Soft: 2, Hard: 1}, {Name: "core", Soft: -1, Hard: 1}} {
		if _, err := resolveLimits([]spec.Ulimit{u}); !errors.Is(err, ErrInvalid) {
			t.Errorf("%+v: %v", u, err)
		}
	}
}

func TestParseSignal(t *testing.T) {
	for s, want := range map[string]unix.Signal{
		"9": 9, "KILL": 9, "SIGKILL": 9, "sigterm": 15, "int": 2, "RTMIN": 34, "SIGRTMIN+3": 37, "RTMAX": 64, "rtmax-1": 63, "64": 64,
	} {
		if got, err := ParseSignal(s); err != nil || got != want {
			t.Errorf("%s: %d, %v, want %d", s, got, err, want)
		}
	}
	for _, s := range []string{"", "0", "65", "-1", "SIGNOPE", "RTMIN+31", "RTMIN-1", "RTMAX+1", "RTMIN+", "SIG", "RTMIN+99999999999"} {
		if got, err := ParseSignal(s); !errors.Is(err, ErrInvalid) {
			t.Errorf("%q: %d, %v", s, got, err)
		}
	}
}

func FuzzParseSignal(f *testing.F) {
	f.Add("RTMIN+3")
	f.Add("SIGSIGKILL")
	f.Fuzz(func(t *testing.T, s string) {
		if sig, err := ParseSignal(s); err == nil && (sig < 1 || sig > 64) {
			t.Errorf("%q is signal %d", s, sig)
		}
	})
}

func TestMountOptions(t *testing.T) {
	flags, data := parseMountOptions(unix.MS_NOSUID, "ro,suid, noatime,data=ordered,_netdev,x-systemd.automount,defaults,,uid=1")
	if flags != unix.MS_RDONLY|unix.MS_NOATIME || !slices.Equal(data, []string{"data=ordered", "uid=1"}) {
		t.Errorf("flags %x, data %q", flags, data)
	}
	flags, data, err := parseTmpfsOptions("exec,size=1m,mode=1770,rw")
	if err != nil || flags != unix.MS_NOSUID|unix.MS_NODEV || !slices.Equal(data, []string{"size=1m", "mode=1770"}) {
		t.Errorf("tmpfs: flags %x, data %q, %v", flags, data, err)
	}
	for _, bad := range []string{"nonsense", "size", "loop=/dev/sda"} {
		if _, _, err := parseTmpfsOptions(bad); !errors.Is(err, ErrInvalid) {
			t.Errorf("tmpfs option %s: %v", bad, err)
		}
	}
}

func FuzzTmpfsOptions(f *testing.F) {
	f.Add("exec,size=1m,mode=1770,rw")
	f.Add(",=,size==,mode")
	f.Fuzz(func(t *testing.T, s string) {
		_, data, err := parseTmpfsOptions(s)
		if err != nil {
			return
		}
		for _, o := range data {
			if name, _, _ := strings.Cut(o, "="); !tmpfsData[name] || strings.Contains(o, ",") {
				t.Errorf("%q lets %q pass", s, o)
			}
		}
	})
}

func TestFSKind(t *testing.T) {
	image := func(off int, magic string) []byte {
		b := make([]byte, 128<<10)
		copy(b[off:], magic)
		return b
	}
	for _, x := range []struct {
		want string
		data []byte
	}{
		{"blank", image(0, "")},
		{"blank", make([]byte, 512)},
		{"blank", nil},
		{"xfs", image(0, "XFSB")},
		{"ext4", image(1080, "\x53\xef")},
		{"erofs", image(1024, "\xe2\xe1\xf5\xe0")},
		{"", image(0, "somebody's data")},
		{"", image(64<<10+0x40, "_BHRfS_M")},
		{"", image(510, "\x55\xaa")},
	} {
		if got, err := fsKind(bytes.NewReader(x.data)); err != nil || got != x.want {
			t.Errorf("kind %q, %v, want %q", got, err, x.want)
		}
	}
}

func TestResolvConf(t *testing.T) {
	for want, dns := range map[string]wire.DNS{
		"": {},
		"nameserver 192.0.2.1\nsearch a.example b.example\noptions ndots:2 rotate\n": {Servers: []string{"192.0.2.1"}, Search: []string{"a.example", "b.example"}, Options: []string{"ndots:2", "rotate"}},
		"nameserver 192.0.2.1\nnameserver 192.0.2.2\n":                               {Servers: []string{"192.0.2.1", "192.0.2.2"}, Search: []string{"."}},
	} {
		if got := resolvConf(dns); got != want {
			t.Errorf("%+v becomes %q, want %q", dns, got, want)
		}
	}
}

func TestHosts(t *testing.T) {
	got := hostsFile("box", "example.org", []string{"10.0.2.15"}, []spec.HostEntry{{Name: "db", Address: "10.0.0.9"}})
	if want := defaultHosts + "10.0.0.9\tdb\n10.0.2.15\tbox.example.org box\n"; got != want {
		t.Errorf("hosts %q, want %q", got, want)
	}
}

func TestCgroupSettings(t *testing.T) {
	got := cgroupSettings(spec.Limits{Memory: 1 << 20, CPUs: 1.5, CPUShares: 1024, Pids: 9})
	want := [][2]string{{"memory.max", "1048576"}, {"cpu.max", "150000 100000"}, {"cpu.weight", "39"}, {"pids.max", "9"}}
	if !slices.Equal(got, want) {
		t.Errorf("settings %q, want %q", got, want)
	}
	if got := cgroupSettings(spec.Limits{}); got != nil {
		t.Errorf("no limits give %q", got)
	}
}

func TestUnescape(t *testing.T) {
	for s, want := range map[string]string{`/a\040b`: "/a b", `\134x`: `\x`, `/end\04`: `/end\04`, `\`: `\`, "": ""} {
		if got := unescape(s); got != want {
			t.Errorf("%q gives %q, want %q", s, got, want)
		}
	}
}

// run interprets a device program, as far as deviceProgram uses the machine.
func run(t *testing.T, program []bpfInsn, kind, major, minor, access uint32) bool {
	t.Helper()
	context := []uint32{access<<16 | kind, major, minor}
	var r [11]uint64
	for pc := 0; pc < len(program); pc++ {
		i := program[pc]
		dst, src := i.regs&15, i.regs>>4
		operand := uint64(i.imm)
		if i.code&unix.BPF_X != 0 {
			operand = r[src]
		}
		switch i.code &^ unix.BPF_X {
		case unix.BPF_LDX | unix.BPF_MEM | unix.BPF_W:
			r[dst] = uint64(context[i.off/4])
		case unix.BPF_ALU64 | unix.BPF_MOV:
			r[dst] = operand
		case unix.BPF_ALU | unix.BPF_AND:
			r[dst] &= operand
		case unix.BPF_ALU | unix.BPF_RSH:
			r[dst] >>= operand
		case unix.BPF_JMP | unix.BPF_JNE:
			if r[dst] != operand {
				pc += int(i.off)
			}
		case unix.BPF_JMP | unix.BPF_EXIT:
			return r[0] == 1
		default:
			t.Fatalf("instruction %+v", i)
		}
	}
	t.Fatal("ran off the end")
	return false
}

func TestDeviceProgram(t *testing.T) {
	const char, block, mknod, read, write = unix.BPF_DEVCG_DEV_CHAR, unix.BPF_DEVCG_DEV_BLOCK, unix.BPF_DEVCG_ACC_MKNOD, unix.BPF_DEVCG_ACC_READ, unix.BPF_DEVCG_ACC_WRITE
	program := deviceProgram(append([]deviceRule{{block, 8, 16, read}}, defaultDevices...))
	for _, x := range []struct {
		kind, major, minor, access uint32
		want                       bool
	}{
		{char, 1, 3, read | write, true},
		{char, 136, 77, read | write, true},
		{char, 10, 200, read, false},
		{char, 10, 200, mknod, true},
		{char, 10, 200, mknod | read, false},
		{block, 1, 3, read, false},
		{block, 8, 0, read, false},
		{block, 8, 0, mknod, true},
		{block, 8, 16, read, true},
		{block, 8, 16, read | write, false},
	} {
		if got := run(t, program, x.kind, x.major, x.minor, x.access); got != x.want {
			t.Errorf("%+v: %t", x, got)
		}
	}
	if source, target, access := splitDevice("dev/../dev/fuse::r"); source != "/dev/fuse" || target != source || access != read {
		t.Errorf("split %s %s %d", source, target, access)
	}
}
