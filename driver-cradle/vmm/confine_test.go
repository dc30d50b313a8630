//go:build vm

package vmm

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cradlestack/cradlestack/internal/locked"
)

// hostileArg makes this test binary, run in QEMU's place, look for ways out instead of testing.
const hostileArg = "hostile"

// A report is what a hostile program has found.
type report struct {
	Status  map[string]string // /proc/self/status
	Mounts  []string          // mount points
	Pids    []string
	Proc    []string // what else is in /proc
	Found   []string // what should not have worked
	Links   []string // interfaces
	Share   string   // content of the file in the share
	Files   []string // open file descriptors
	Readers []string // regular files outside of /usr, /proc and the program's own directory
	Limits  map[string]uint64
}

func hostile() {
	r := report{Status: map[string]string{}, Limits: map[string]uint64{}}
	status, _ := os.ReadFile("/proc/self/status")
	for line := range strings.Lines(string(status)) {
		name, value, _ := strings.Cut(line, ":")
		r.Status[name] = strings.TrimSpace(value)
	}
	mounts, _ := os.ReadFile("/proc/self/mounts")
	for line := range strings.Lines(string(mounts)) {
		r.Mounts = append(r.Mounts, strings.Fields(line)[1])
	}
	entries, _ := os.ReadDir("/proc")
	for _, e := range entries {
		if _, err := strconv.Atoi(e.Name()); err == nil {
			r.Pids = append(r.Pids, e.Name())
		} else {
			r.Proc = append(r.Proc, e.Name())
		}
	}
	links, _ := net.Interfaces()
	for _, l := range links {
		r.Links = append(r.Links, l.Name)
	}
	for name, attempt := range map[string]func() error{
		"write to /usr":              func() error { return os.WriteFile("/usr/x", nil, 0o600) },
		"write to /":                 func() error { return os.WriteFile("/x", nil, 0o600) },
		"write to /etc":              func() error { return os.WriteFile("/etc/x", nil, 0o600) },
		"write to /dev":              func() error { return os.WriteFile("/dev/x", nil, 0o600) },
		"read /etc/shadow":           func() error { _, err := os.ReadFile("/etc/shadow"); return err },
		"write to a read-only share": func() error { return os.WriteFile("/share/ro/x", nil, 0o600) },
		"remount /usr":               func() error { return unix.Mount("", "/usr", "", unix.MS_REMOUNT|unix.MS_BIND, "") },
		"mount":                      func() error { return unix.Mount("x", "/share", "tmpfs", 0, "") },
		"unshare with a user":        func() error { return unix.Unshare(unix.CLONE_NEWUSER | unix.CLONE_NEWNS) },
		"become root":                func() error { return unix.Setresuid(0, 0, 0) },
		"make a device":              func() error { return unix.Mknod("/share/rw/sda", unix.S_IFBLK|0o600, int(unix.Mkdev(8, 0))) },
		"raise a limit":              func() error { return unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{Cur: 1, Max: 1}) },
		"trace":                      func() error { return unix.PtraceAttach(1) },
		"load a program": func() error {
			_, err := unix.PerfEventOpen(&unix.PerfEventAttr{Type: unix.PERF_TYPE_TRACEPOINT}, -1, 0, -1, 0)
			return err
		},
		"open the parent's memory": func() error { _, err := os.ReadFile("/proc/1/root/../../etc/shadow"); return err },
		"open what restarts the host": func() error { // opening it does nothing yet
			f, err := os.OpenFile("/proc/sysrq-trigger", os.O_WRONLY, 0)
			if err == nil {
				f.Close()
			}
			return err
		},
		"lower its badness": func() error { return os.WriteFile("/proc/self/oom_score_adj", []byte("-500"), 0) },
		"connect to the host": func() error {
			c, err := net.DialTimeout("tcp", os.Args[2], time.Second)
			if err == nil {
				c.Close()
			}
			return err
		},
	} {
		if attempt() == nil {
			r.Found = append(r.Found, name)
		}
	}
	data, _ := os.ReadFile("/share/rw/file")
	r.Share = string(data)
	fds, _ := os.ReadDir("/proc/self/fd")
	for _, e := range fds {
		target, err := os.Readlink("/proc/self/fd/" + e.Name())
		if err == nil && !strings.HasPrefix(target, "anon_inode:") && target != "/proc/1/fd" && !strings.HasSuffix(target, "/fd") {
			r.Files = append(r.Files, e.Name()+" "+target)
		}
	}
	exe, _ := os.Executable()
	own := filepath.Dir(filepath.Dir(exe))
	filepath.WalkDir("/", func(path string, d fs.DirEntry, err error) error {
		if path == "/usr" || path == "/proc" || path == "/dev" || path == own {
			return filepath.SkipDir
		}
		if err == nil && d.Type().IsRegular() {
			r.Readers = append(r.Readers, path)
		}
		return nil
	})
	for name, resource := range map[string]int{"core": unix.RLIMIT_CORE, "nofile": unix.RLIMIT_NOFILE} {
		var l unix.Rlimit
		unix.Getrlimit(resource, &l)
		r.Limits[name] = l.Max
	}
	json.NewEncoder(os.Stderr).Encode(r)
}

// runHostile runs this test binary confined as QEMU would be and returns its report.
func runHostile(t *testing.T, c confinement, arg string) report {
	t.Helper()
	extra, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer extra.Close()
	var r report
	c.UID = DefaultFirstUID
	confined(t, c, extra, &r, hostileArg, arg)
	return r
}

// confined runs this test binary confined as QEMU would be, with file 3 and these arguments, and decodes what it writes to its standard error.
func confined(t *testing.T, c confinement, file *os.File, v any, args ...string) {
	t.Helper()
	exe := hostileProgram(t)
	c.Path, c.Args, c.Mount, c.NoFile = exe, args, t.TempDir(), 100
	var out locked.Buffer
	ch, err := spawn(&c, []*os.File{file}, nil, &out)
	if err != nil {
		t.Fatal(err)
	}
	if err := ch.goAhead(); err != nil {
		t.Fatalf("%v: %s", err, out.String())
	}
	if err := ch.wait(); err != nil {
		t.Fatal(err)
	}
	ch.file.Close()
	if !eventually(func() bool { return json.Unmarshal([]byte(out.String()), v) == nil }) {
		t.Fatalf("the program says %s", out.String())
	}
}

// hostileProgram is this test binary where another user may execute it.
func hostileProgram(t *testing.T) string {
	t.Helper()
	path := filepath.Join(shared.dir, "hostile", "bin", "program")
	if _, err := os.Stat(path); err == nil {
		return path
	}
	exe, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, exe, 0o755); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestVMConfinementHolds(t *testing.T) {
	config(t)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	rw, ro := t.TempDir(), t.TempDir()
	os.Chmod(rw, 0o777)
	if err := os.WriteFile(filepath.Join(rw, "file"), []byte("shared"), 0o600); err != nil {
		t.Fatal(err)
	}
	shares := []bind{{"rw", rw, false}, {"ro", ro, true}}

	for name, c := range map[string]confinement{
		"without shares": {},
		"with shares":    {Shares: shares, Caps: shareCaps},
	} {
		t.Run(name, func(t *testing.T) {
			r := runHostile(t, c, l.Addr().String())
			if len(r.Found) > 0 {
				t.Errorf("the confined program could %q", r.Found)
			}
			caps, content := uint64(0), ""
			for _, n := range c.Caps {
				caps |= 1 << n
			}
			if len(c.Shares) > 0 {
				content = "shared"
			}
			if r.Share != content {
				t.Errorf("the share's file reads %q, want %q", r.Share, content)
			}
			for _, set := range []string{"CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"} {
				if r.Status[set] != fmt.Sprintf("%016x", caps) {
					t.Errorf("%s is %s, want %016x", set, r.Status[set], caps)
				}
			}
			for field, want := range map[string]string{"NoNewPrivs": "1", "Groups": "", "NSpid": "1"} {
				if r.Status[field] != want {
					t.Errorf("%s is %q, want %q", field, r.Status[field], want)
				}
			}
			if uid := strings.Fields(r.Status["Uid"]); len(uid) != 4 || uid[0] == "0" || len(slices.Compact(uid)) != 1 {
				t.Errorf("user ids are %v", uid)
			}
			if !slices.Equal(r.Pids, []string{"1"}) {
				t.Errorf("visible processes: %v", r.Pids)
			}
			if !slices.Equal(r.Proc, []string{"self", "thread-self"}) {
				t.Errorf("in /proc are besides processes %v", r.Proc)
			}
			if !slices.Equal(r.Links, []string{"lo"}) {
				t.Errorf("network interfaces: %v", r.Links)
			}
			if len(r.Files) != 4 { // 0, 1, 2 and the one that it inherits
				t.Errorf("open files: %v", r.Files)
			}
			if r.Limits["core"] != 0 || r.Limits["nofile"] != 100 {
				t.Errorf("limits: %v", r.Limits)
			}
			for _, f := range r.Readers {
				if f != "/etc/ld.so.cache" && !strings.HasPrefix(f, "/share/") {
					t.Errorf("it sees %s", f)
				}
			}
			for _, m := range r.Mounts {
				ok := slices.Contains([]string{"/", "/usr", "/proc", "/dev", "/dev/null", "/dev/urandom", "/etc/ld.so.cache"}, m)
				if !ok && m != filepath.Dir(filepath.Dir(hostileProgram(t))) && !strings.HasPrefix(m, "/share/") {
					t.Errorf("it has a mount on %s", m)
				}
			}
		})
	}
}

// A child whose launcher is gone does not become the program: neither before the go-ahead, nor after one that was given before the
// parent-death signal was set.
func TestVMConfinedChildNeedsItsLauncher(t *testing.T) {
	config(t)
	for name, last := range map[string]func(*child) error{
		"before the go-ahead": func(*child) error { return nil },
		"after the go-ahead":  (*child).goAhead,
	} {
		t.Run(name, func(t *testing.T) {
			var out locked.Buffer
			c := confinement{Path: "/usr/bin/true", Mount: t.TempDir(), UID: DefaultFirstUID, Leashed: true, NoFile: 100}
			ch, err := spawn(&c, nil, nil, &out)
			if err != nil {
				t.Fatal(err)
			}
			if err := last(ch); err != nil {
				t.Fatal(err)
			}
			ch.goes.Close()
			if err := ch.wait(); err != nil {
				t.Fatal(err)
			}
			ch.file.Close()
			if !eventually(func() bool { return strings.Contains(out.String(), errGone.Error()) }) {
				t.Errorf("the child says %q", out.String())
			}
		})
	}
}

func TestVMRunsConfined(t *testing.T) {
	for _, how := range []string{Cold, Template} {
		c := config(t)
		c.Start = how
		m := start(t, c)
		proc := fmt.Sprintf("/proc/%d/", m.Info().PID)
		status, err := os.ReadFile(proc + "status")
		if err != nil {
			t.Fatal(err)
		}
		uid := userOf(firstUID, c.RunDir)
		for _, want := range []string{
			"Seccomp:\t2", "NoNewPrivs:\t1", "CapEff:\t0000000000000000", "CapPrm:\t0000000000000000", "CapBnd:\t0000000000000000",
			fmt.Sprintf("Uid:\t%d\t%d\t%d\t%d", uid, uid, uid, uid), "Groups:\t \n",
		} {
			if !bytes.Contains(status, []byte(want)) {
				t.Errorf("QEMU's status lacks %q:\n%s", want, status)
			}
		}
		for _, ns := range []string{"mnt", "pid", "ipc", "uts", "net", "cgroup"} {
			mine, _ := os.Readlink("/proc/self/ns/" + ns)
			theirs, err := os.Readlink(proc + "ns/" + ns)
			if err != nil || mine == theirs {
				t.Errorf("QEMU is in this process's %s namespace (%v)", ns, err)
			}
		}
		mine, err := procStat(os.Getpid())
		if err != nil {
			t.Fatal(err)
		}
		if fields, err := procStat(m.Info().PID); err != nil || fields[19-3] != mine[19-3] {
			t.Errorf("QEMU's nice value is not this process's: %v, %v", fields, err)
		}
		if data, _ := os.ReadFile(proc + "oom_score_adj"); strings.TrimSpace(string(data)) != strconv.Itoa(oomScore) {
			t.Errorf("oom_score_adj is %s", data)
		}
		if _, err := os.Stat(proc + "root/etc/passwd"); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("QEMU's root has /etc/passwd: %v", err)
		}
	}
}
