//go:build vm

package vmm

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/url"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// thiefArg makes this test binary, run in QEMU's place, look for another machine's memory instead of testing.
const thiefArg = "thief"

// A prey is a machine whose memory is looked for: its process on the host, and where in that a secret lies.
type prey struct {
	PID     int
	Address uint64
	Secret  string
}

func thief() {
	var p prey
	if err := json.Unmarshal([]byte(os.Args[2]), &p); err != nil {
		panic(err)
	}
	json.NewEncoder(os.Stderr).Encode(p.hunt(os.NewFile(3, "template")))
}

// hunt tries to get at the memory of the machine and to read the template's, and returns what has worked. The thread that calls it has to end then: what it
// traces is let go by that.
func (p prey) hunt(template *os.File) []string {
	proc := fmt.Sprintf("/proc/%d/", p.PID)
	here := make([]byte, len(p.Secret))
	local := func() []unix.Iovec {
		iov := unix.Iovec{Base: &here[0]}
		iov.SetLen(len(here))
		return []unix.Iovec{iov}
	}
	remote := []unix.RemoteIovec{{Base: uintptr(p.Address), Len: len(here)}}
	open := func(path string) error {
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		defer f.Close()
		if fi, err := f.Stat(); err != nil || fi.IsDir() {
			return err
		}
		_, err = f.Read(make([]byte, 8))
		return err
	}
	is := func(n int, err error) error {
		if err == nil && string(here[:n]) != p.Secret {
			err = errors.New("something else is there")
		}
		return err
	}
	attempts := map[string]func() error{
		"process_vm_readv": func() error { return is(unix.ProcessVMReadv(p.PID, local(), remote, 0)) },
		"process_vm_writev": func() error {
			copy(here, p.Secret)
			_, err := unix.ProcessVMWritev(p.PID, local(), remote, 0)
			return err
		},
		"/proc/PID/mem": func() error {
			f, err := os.Open(proc + "mem")
			if err != nil {
				return err
			}
			defer f.Close()
			return is(f.ReadAt(here, int64(p.Address)))
		},
		"/proc/PID/maps": func() error { return open(proc + "maps") },
		"/proc/PID/fd":   func() error { return open(proc + "fd") },
		"/proc/PID/root": func() error { return open(proc + "root") },
		"ptrace":         func() error { return unix.PtraceSeize(p.PID) },
		"signal":         func() error { return unix.Kill(p.PID, 0) },
		"pidfd": func() error {
			fd, err := unix.PidfdOpen(p.PID, 0)
			if err == nil {
				unix.Close(fd)
			}
			return err
		},
		"kcmp": func() error { // with this process; KCMP_VM
			_, _, errno := unix.Syscall6(unix.SYS_KCMP, uintptr(os.Getpid()), uintptr(p.PID), 1, 0, 0, 0)
			return errnoOrNil(errno)
		},
		"perf_event_open": func() error {
			fd, err := unix.PerfEventOpen(&unix.PerfEventAttr{Type: unix.PERF_TYPE_SOFTWARE}, p.PID, -1, -1, 0)
			if err == nil {
				unix.Close(fd)
			}
			return err
		},
		"the secret in the template's memory": func() error {
			all, err := io.ReadAll(io.NewSectionReader(template, 0, 1<<40))
			if err == nil && len(all) == 0 {
				err = errors.New("the template is empty")
			}
			if err == nil && !bytes.Contains(all, []byte(p.Secret)) {
				err = errors.New("it is not there")
			}
			return err
		},
		"the template's memory for writing": func() error {
			f, err := os.OpenFile(fmt.Sprintf("/proc/self/fd/%d", template.Fd()), os.O_RDWR, 0)
			if err != nil {
				return err
			}
			defer f.Close()
			m, err := unix.Mmap(int(f.Fd()), 0, pageSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
			if err == nil {
				unix.Munmap(m)
				return nil
			}
			_, err = f.WriteAt([]byte("mine"), 0)
			return err
		},
	}
	for _, path := range []string{"/dev/mem", "/dev/kmem", "/proc/kcore", "/proc/kpageflags", "/dev/shm", "/sys/kernel/mm"} {
		attempts[path] = func() error { return open(path) }
	}
	for _, path := range []string{"/proc/sysrq-trigger", "/proc/sys/kernel/core_pattern"} { // by which the host's kernel would do it
		attempts[path] = func() error {
			f, err := os.OpenFile(path, os.O_WRONLY, 0)
			if err == nil {
				f.Close()
			}
			return err
		}
	}
	var worked []string
	for name, attempt := range attempts {
		if attempt() == nil {
			worked = append(worked, name)
		}
	}
	others, _ := filepath.Glob("/proc/[0-9]*")
	for _, dir := range others {
		if filepath.Base(dir) != strconv.Itoa(os.Getpid()) {
			worked = append(worked, "another process in /proc")
			break
		}
	}
	slices.Sort(worked)
	return worked
}

func errnoOrNil(errno syscall.Errno) error {
	if errno == 0 {
		return nil
	}
	return errno
}

// memoryOf calls found for each place in the guest's memory, as QEMU maps it, where text is.
func memoryOf(t *testing.T, m *Machine, text string, found func(address uint64)) {
	t.Helper()
	proc := fmt.Sprintf("/proc/%d/", m.Info().PID)
	maps, err := os.ReadFile(proc + "maps")
	if err != nil {
		t.Fatal(err)
	}
	mem, err := os.Open(proc + "mem")
	if err != nil {
		t.Fatal(err)
	}
	defer mem.Close()
	looked := false
	for line := range strings.Lines(string(maps)) {
		if !strings.Contains(line, "/memfd:"+memfdName("")) {
			continue
		}
		looked = true
		var from, to uint64
		if _, err := fmt.Sscanf(line, "%x-%x", &from, &to); err != nil {
			t.Fatal(err)
		}
		buf := make([]byte, to-from)
		if _, err := mem.ReadAt(buf, int64(from)); err != nil {
			t.Fatal(err)
		}
		for at := 0; ; {
			i := bytes.Index(buf[at:], []byte(text))
			if i < 0 {
				break
			}
			found(from + uint64(at+i))
			at += i + 1
		}
	}
	if !looked {
		t.Fatal("the machine does not map its template's memory")
	}
}

// What one machine has in its memory is in no other's, also not in that of one that starts from the same template later. Neither does whoever
// has taken a QEMU over get at it: not even as the other's user, with the template's memory in hand, and knowing process and address.
func TestVMMemoryIsAMachinesOwn(t *testing.T) {
	c := fromTemplate(t)
	one, two := start(t, again(t, c)), start(t, again(t, c))
	machines := map[string]*Machine{"the first's own secret": one, "the second's own secret": two}
	for secret, m := range machines {
		ask(t, m, "keep", url.Values{"text": {secret}}, nil)
	}
	three := start(t, again(t, c))
	for secret, owner := range machines {
		for _, m := range []*Machine{one, two, three} {
			n := 0
			memoryOf(t, m, secret, func(uint64) { n++ })
			if (n > 0) != (m == owner) {
				t.Errorf("%q is %d times in the memory of machine %d; its owner is %d", secret, n, m.Info().PID, owner.Info().PID)
			}
		}
	}
	for line := range strings.Lines(string(smaps(t, one))) {
		if flags, ok := strings.CutPrefix(line, "VmFlags:"); ok && slices.Contains(strings.Fields(flags), "mg") {
			t.Error("the host's kernel may merge pages of a machine with those of others")
			break
		}
	}

	p := prey{PID: one.Info().PID, Secret: "the first's own secret"}
	memoryOf(t, one, p.Secret, func(address uint64) { p.Address = address })
	template := templateFile(t, one)
	// Without confinement the same attempts show that they are ones.
	free := make(chan []string)
	go func() {
		runtime.LockOSThread() // and never unlocks it
		free <- p.hunt(template)
	}()
	got := <-free
	for _, name := range []string{"process_vm_readv", "/proc/PID/mem", "/proc/PID/fd", "ptrace", "pidfd", "signal", "another process in /proc", "/proc/sys/kernel/core_pattern"} {
		if !slices.Contains(got, name) {
			t.Errorf("without confinement %q does not work: %q", name, got)
		}
	}
	args, err := json.Marshal(p)
	if err != nil {
		t.Fatal(err)
	}
	shares := []bind{{"rw", t.TempDir(), false}}
	for name, c := range map[string]confinement{
		"as QEMU":                         {UID: userOf(firstUID, one.dir)},
		"as QEMU with shares and network": {UID: userOf(firstUID, one.dir), Shares: shares, Caps: shareCaps, Network: true},
		"as virtiofsd, which is root":     {Shares: shares, Caps: virtiofsCaps},
		"as the old virtiofsd":            {Shares: shares, Caps: virtiofsCaps, AllProc: true},
	} {
		confined(t, c, template, &got, thiefArg, string(args))
		if len(got) > 0 {
			t.Errorf("confined %s these work: %q", name, got)
		}
	}
}

func smaps(t *testing.T, m *Machine) []byte {
	t.Helper()
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps", m.Info().PID))
	if err != nil {
		t.Fatal(err)
	}
	return data
}

// templateFile opens the template's memory as a machine has it.
func templateFile(t *testing.T, m *Machine) *os.File {
	t.Helper()
	fds, _ := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", m.Info().PID))
	for _, path := range fds {
		if target, _ := os.Readlink(path); strings.HasPrefix(target, "/memfd:"+memfdName("")) {
			f, err := os.OpenFile(path, os.O_RDWR, 0)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { f.Close() })
			return f
		}
	}
	t.Fatal("the machine has no template memory open")
	return nil
}
