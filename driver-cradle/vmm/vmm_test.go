package vmm

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cradlestack/cradlestack/driver-cradle/boot"
	"github.com/cradlestack/cradlestack/internal/golden"
	"github.com/cradlestack/cradlestack/spec"
)

func testConfig() Config {
	return Config{
		Package: &boot.Package{Digest: "d1", Manifest: boot.Manifest{
			Machine: boot.Machine{Type: "microvm", Options: []string{"acpi=off"}, Globals: []string{"virtio-mmio.force-legacy=false"}},
			Args:    []string{"console=ttyS0", "quiet"},
		}},
		Memory: 64 << 20, CPUs: 2, RunDir: "/run/pod",
	}
}

// Who is not root is told that, and not of the first thing that fails.
func TestStartNeedsRoot(t *testing.T) {
	c := testConfig()
	c.CacheDir = "/nonexistent"
	failed := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with this goroutine, and its user with that
		if os.Geteuid() == 0 {
			// Directly: package unix would have all threads do it.
			if _, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, ^uintptr(0), 65534, ^uintptr(0)); errno != 0 {
				failed <- errno
				return
			}
		}
		_, err := Start(t.Context(), c)
		failed <- err
	}()
	if err := <-failed; err == nil || !strings.Contains(err.Error(), "not root") {
		t.Errorf("Start: %v", err)
	}
}

func TestArguments(t *testing.T) {
	for name, change := range map[string]func(*hardware){
		"cold": func(h *hardware) {
			h.kernel, h.initramfs, h.args, h.pageReporting = 3, 4, "quiet tsc_early_khz=2000000", true
		},
		"restored": func(h *hardware) { h.ram, h.incoming = 6, true },
		"restored with disks": func(h *hardware) {
			h.ram, h.incoming, h.places = 6, true, emptyPlaces(4)
			h.places[0].disk, h.places[0].protocol, h.places[0].number = &Disk{}, protocol{driver: "file"}, 7
			h.places[1].disk, h.places[1].protocol, h.places[1].number = &Disk{}, protocol{"file", true}, 8
		},
		"virtiofs": func(h *hardware) { h.kernel, h.initramfs, h.virtiofs, h.tap, h.accel = 3, 4, 9, 7, KVM },
	} {
		t.Run(name, func(t *testing.T) {
			c := testConfig()
			h := c.hardware(TCG, 128<<20)
			h.control, h.qmp, h.console = 10, 11, 12
			change(&h)
			got := strings.Join(h.arguments(), "\n") + "\n"
			golden.Compare(t, filepath.Join("testdata", "arguments-"+strings.ReplaceAll(name, " ", "-")+".txt"), []byte(got))
		})
	}
}

func TestClass(t *testing.T) {
	for memory, want := range map[spec.Bytes]spec.Bytes{
		6 << 20: 128 << 20, 64 << 20: 128 << 20, 128 << 20: 192 << 20, 190 << 20: 256 << 20, 256 << 20: 384 << 20,
		1 << 30: 1536 << 20, 2 << 30: 3 << 30, 64 << 30: 96 << 30,
	} {
		if got := class(memory); got != want {
			t.Errorf("class(%v) = %v, want %v", memory, got, want)
		}
	}
}

func TestParseVersion(t *testing.T) {
	for in, want := range map[string]string{
		"QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18+b3)\nCopyright": "7.2.22 (Debian 1:7.2+dfsg-7+deb12u18+b3)",
		"QEMU emulator version 10.0.13\n":                                           "10.0.13",
		"QEMU emulator version 6.2.0 (Debian 1:6.2+dfsg-2ubuntu6)\n":                "",
		"something else": "",
	} {
		got, err := parseVersion([]byte(in))
		if got != want || (err == nil) != (want != "") {
			t.Errorf("parseVersion(%q) = %q, %v", in, got, err)
		}
	}
}

// A machine may be restored only into an equal one: whatever makes a difference to QEMU or the guest is in the key.
func TestKeyHasEverythingThatMatters(t *testing.T) {
	keyOf := func(change func(*Config, *qemu)) string {
		c, q := testConfig(), &qemu{version: "7.2"}
		change(&c, q)
		k, err := c.key(q, TCG)
		if err != nil {
			t.Fatal(err)
		}
		return k.String()
	}
	base := keyOf(func(*Config, *qemu) {})
	if !templateName.MatchString(base) {
		t.Errorf("key %q is no template name", base)
	}
	for name, change := range map[string]func(*Config, *qemu){
		"package":          func(c *Config, _ *qemu) { c.Package.Digest = "d2" },
		"memory class":     func(c *Config, _ *qemu) { c.Memory = 512 << 20 },
		"processors":       func(c *Config, _ *qemu) { c.CPUs = 1 },
		"QEMU":             func(_ *Config, q *qemu) { q.version = "10.0" },
		"kernel args":      func(c *Config, _ *qemu) { c.Package.Manifest.Args = nil },
		"places for disks": func(c *Config, _ *qemu) { c.Disks = []Disk{{Key: "a", Internal: true}} },
		"more places":      func(c *Config, _ *qemu) { c.Disks = []Disk{{Key: "a", Internal: true, ReadOnly: true}} },
		"machine option":   func(c *Config, _ *qemu) { c.Package.Manifest.Machine.Options = []string{"acpi=on"} },
	} {
		if keyOf(change) == base {
			t.Errorf("the key does not depend on the %s", name)
		}
	}
	for name, change := range map[string]func(*Config, *qemu){
		"memory in the class": func(c *Config, _ *qemu) { c.Memory = 60 << 20 },
		"user network":        func(c *Config, _ *qemu) { c.Net = Net{Mode: NetUser, Publish: []spec.Publish{{Port: 80}}} },
		"shares and disks":    func(c *Config, _ *qemu) { c.Shares, c.Disks = []Share{{"a", "/b", true}}, []Disk{{Key: "a"}} },
		"run directory":       func(c *Config, _ *qemu) { c.RunDir = "/elsewhere" },
	} {
		if keyOf(change) != base {
			t.Errorf("the key depends on %s", name)
		}
	}
}

func TestArrange(t *testing.T) {
	layers := func(n int) (disks []Disk) {
		for i := range n {
			disks = append(disks, Disk{Key: fmt.Sprint("layer ", i), ReadOnly: true, Internal: true})
		}
		return disks
	}
	scratch := []Disk{{Key: "scratch", Internal: true}}
	volumes := []Disk{{Key: "volume"}, {Key: "read-only volume", ReadOnly: true}}
	for name, tt := range map[string]struct {
		disks         []Disk
		places, taken int
		later         string
	}{
		"nothing":            {nil, 0, 0, ""},
		"volumes only":       {volumes, 0, 0, "[volume read-only volume]"},
		"scratch":            {scratch, 1, 1, ""},
		"one layer":          {slices.Concat(scratch, layers(1)), 2, 2, ""},
		"two layers":         {slices.Concat(scratch, layers(2), volumes), 4, 3, "[volume read-only volume]"},
		"seven layers":       {slices.Concat(scratch, layers(7)), 8, 8, ""},
		"layers, no scratch": {layers(4), 8, 4, ""},
		"all the layers":     {slices.Concat(scratch, layers(63)), 64, 64, ""},
		"too many layers":    {slices.Concat(scratch, layers(65)), 64, 64, "[layer 63 layer 64]"},
	} {
		c := Config{Disks: tt.disks}
		places, later := c.arrange(true)
		taken, keys := 0, []string{}
		for lun, p := range places {
			if p.readOnly != (lun > 0) {
				t.Errorf("%s: place %d is read-only: %v", name, lun, p.readOnly)
			}
			if p.disk != nil {
				taken++
				if p.disk.ReadOnly != p.readOnly || !p.disk.Internal {
					t.Errorf("%s: place %d has %+v", name, lun, *p.disk)
				}
			}
		}
		for _, d := range later {
			keys = append(keys, d.Key)
		}
		if got := fmt.Sprint(keys); len(places) != tt.places || taken != tt.taken || got != cmp.Or(tt.later, "[]") {
			t.Errorf("%s: %d places, %d of them taken, later %s", name, len(places), taken, got)
		}
		if places, later := c.arrange(false); len(places) != len(tt.disks) || later != nil {
			t.Errorf("%s: a machine that boots has %d places, later %v", name, len(places), later)
		}
	}
}

func TestFindPanic(t *testing.T) {
	text := "[ 1.0] ok\n[ 2.0] Kernel panic - not syncing: Attempted to kill init! exitcode=0x00000300\n[ 2.1] CPU: 0\x1b[31m\n"
	p := findPanic(text)
	if p == nil || p.Reason != "Attempted to kill init! exitcode=0x00000300" || strings.Contains(p.Error(), "\x1b") {
		t.Errorf("findPanic: %+v", p)
	}
	const end = "[    2.000000] Kernel panic - not syncing: Attempted to kill init! exitcode=0x00000200\r\n[    2.1] CPU: 0\r\n"
	for said, want := range map[string]string{
		"panic: runtime error: index out of range [3] with length 3\r\n\r\ngoroutine 7 [running]:\r\nguest.(*Pod).supervise\r\n": "panic: runtime error: index out of range [3] with length 3\n\ngoroutine 7 [running]:\nguest.(*Pod).supervise",
		"fatal error: concurrent map writes\r\n": "fatal error: concurrent map writes",
		"time=2026-11-25T00:00:00Z level=ERROR msg=\"the agent can't go on\" error=\"mount /proc: no such device\"\r\n": "\"mount /proc: no such device\"",
	} {
		if p := findPanic("boot\r\npanic: an old one\r\n" + said + end); p == nil || !strings.Contains(p.Error(), "the agent in the guest has failed: "+want) {
			t.Errorf("findPanic: %v, want one that says %q", p, want)
		}
	}
	if p := findPanic("all is well"); p != nil {
		t.Errorf("findPanic finds %+v", p)
	}
}

// The file never exceeds its bound and always ends with the last output, across processes.
func TestConsoleKeepsTheTail(t *testing.T) {
	dir := t.TempDir()
	all := ""
	for range 3 {
		server, client := net.Pipe()
		c, err := newConsole(dir, client)
		if err != nil {
			t.Fatal(err)
		}
		for i := range 40 {
			line := strings.Repeat(string(rune('a'+i%26)), 1000) + "\n"
			all += line
			if _, err := server.Write([]byte(line)); err != nil {
				t.Fatal(err)
			}
		}
		server.Close()
		c.ended()
		c.close()
		got, err := os.ReadFile(filepath.Join(dir, consoleFile))
		if err != nil {
			t.Fatal(err)
		}
		if len(got) > maxConsole || len(got) < min(len(all), maxConsole/2) || !strings.HasSuffix(all, string(got)) {
			t.Errorf("after %d bytes the file has %d, a tail: %v", len(all), len(got), strings.HasSuffix(all, string(got)))
		}
	}
}

func TestHostPorts(t *testing.T) {
	table := `Hub 0 (net):
  Protocol[State]    FD  Source Address  Port   Dest. Address  Port RecvQ SendQ
  TCP[HOST_FORWARD]  12       127.0.0.1 42067       10.0.2.15    80     0     0
  TCP[HOST_FORWARD]  13               * 42068       10.0.2.15    80     0     0
  UDP[HOST_FORWARD]  14       127.0.0.1 42069       10.0.2.15    53     0     0
`
	ports, err := hostPorts(table, []spec.Publish{
		{HostIP: "0.0.0.0", Port: 80, Protocol: "tcp"},
		{HostIP: "127.0.0.1", Port: 53, Protocol: "udp"},
		{HostIP: "127.0.0.1", Port: 80, Protocol: "tcp"},
		{HostIP: "127.0.0.1", HostPort: 99, Port: 99, Protocol: "tcp"},
	})
	if err != nil {
		t.Fatal(err)
	}
	for i, want := range []uint16{42068, 42069, 42067, 99} {
		if ports[i].HostPort != want {
			t.Errorf("port %d is published on %d, want %d", i, ports[i].HostPort, want)
		}
	}
	if _, err := hostPorts("", []spec.Publish{{Port: 80}}); err == nil {
		t.Error("a port that QEMU does not list was found")
	}
}

// fakeQEMU answers QMP commands with the given lines.
func fakeQEMU(t *testing.T, answer func(id int) string) *monitor {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	var conns [2]*net.UnixConn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "qmp")
		c, err := net.FileConn(f)
		if err != nil {
			t.Fatal(err)
		}
		f.Close()
		conns[i] = c.(*net.UnixConn)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		defer conns[0].Close()
		conns[0].Write([]byte(`{"QMP": {"version": {}, "capabilities": []}}` + "\n"))
		d := json.NewDecoder(conns[0])
		for {
			var c struct{ ID int }
			if d.Decode(&c) != nil {
				return
			}
			if _, err := conns[0].Write([]byte(answer(c.ID))); err != nil {
				return
			}
		}
	}()
	q := newMonitor(conns[1], func(string, json.RawMessage) {})
	t.Cleanup(func() { q.close(); <-done })
	return q
}

func TestMonitor(t *testing.T) {
	ctx := t.Context()
	q := fakeQEMU(t, func(id int) string {
		return `{"event": "STOP", "data": {}}` + "\n" + `{"return": {"status": "running"}, "id": ` + string(rune('0'+id)) + "}\n"
	})
	var s struct{ Status string }
	if err := q.call(ctx, "query-status", nil, &s); err != nil || s.Status != "running" {
		t.Errorf("%+v, %v", s, err)
	}

	q = fakeQEMU(t, func(id int) string {
		return `{"error": {"class": "GenericError", "desc": "no such device"}, "id": ` + string(rune('0'+id)) + "}\n"
	})
	if err := q.call(ctx, "device_del", nil, nil); err == nil || err.Error() != "qmp device_del: no such device" {
		t.Errorf("%v", err)
	}

	for name, garbage := range map[string]string{
		"no JSON": "}{\n", "endless line": strings.Repeat("x", maxQMP+1), "end": "",
	} {
		q = fakeQEMU(t, func(int) string { return garbage })
		if garbage == "" {
			q.conn.CloseRead()
		}
		if err := q.call(ctx, "stop", nil, nil); !errors.Is(err, errQMPClosed) {
			t.Errorf("%s: %v", name, err)
		}
	}

	q = fakeQEMU(t, func(int) string { return `{"return": {}, "id": 99}` + "\n" })
	short, cancel := context.WithTimeout(ctx, 10*time.Millisecond)
	defer cancel()
	if err := q.call(short, "stop", nil, nil); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("no answer: %v", err)
	}
}

// Where QEMU may not have a ring after all, a disk that is plugged in is served by threads, and so is every later one.
func TestDiskWithoutIOUring(t *testing.T) {
	answers := []string{
		`"error": {"class": "GenericError", "desc": "Unable to use io_uring: failed to init linux io_uring ring: Operation not permitted"}`,
		`"return": {}`,
	}
	asked := 0
	q := fakeQEMU(t, func(id int) string {
		answer := answers[min(asked, len(answers)-1)]
		asked++
		return fmt.Sprintf("{%s, \"id\": %d}\n", answer, id)
	})
	m := &Machine{monitor: q, log: slog.New(slog.DiscardHandler), state: state{IOUring: true}}
	if err := m.addNode(t.Context(), 3, protocol{"file", true}, false); err != nil || m.state.IOUring {
		t.Errorf("%v, io_uring for the next one: %v", err, m.state.IOUring)
	}
	if err := m.addNode(t.Context(), 4, protocol{"file", true}, false); err != nil {
		t.Error(err)
	}
	if asked != 3 {
		t.Errorf("QEMU was asked %d times, want 3: twice for the first", asked)
	}
	answers = []string{`"error": {"class": "GenericError", "desc": "Failed to get lock"}`}
	if err := m.addNode(t.Context(), 5, protocol{"file", true}, false); err == nil || asked != 4 {
		t.Errorf("another failure: %v, asked %d times", err, asked)
	}
}

func TestSparseCopyAndSeal(t *testing.T) {
	const size = 64 * pageSize
	from, err := newMemfd("test", size)
	if err != nil {
		t.Fatal(err)
	}
	defer from.Close()
	for _, at := range []int64{0, 7 * pageSize, size - pageSize} {
		if _, err := from.WriteAt([]byte("page"), at); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := from.WriteAt(make([]byte, pageSize), 9*pageSize); err != nil { // allocated, but zero
		t.Fatal(err)
	}
	file, err := os.Create(filepath.Join(t.TempDir(), "ram"))
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	if err := file.Truncate(size); err != nil {
		t.Fatal(err)
	}
	pages, digest, err := digestSparse(file, from)
	if err != nil || pages != 3 {
		t.Fatalf("%d pages, %v", pages, err)
	}
	if _, again, err := digestSparse(nil, file); err != nil || again != digest {
		t.Errorf("the copy's digest is %s, %v, want %s", again, err, digest)
	}
	third, err := newMemfd("test", size)
	if err != nil {
		t.Fatal(err)
	}
	defer third.Close()
	if err := copyExtents(third, file); err != nil {
		t.Fatal(err)
	}
	if _, again, err := digestSparse(nil, third); err != nil || again != digest {
		t.Errorf("the extents' digest is %s, %v, want %s", again, err, digest)
	}
	if isSealedMemory(from, "test", size) {
		t.Error("memory without seals is taken for sealed")
	}
	if err := seal(from); err != nil {
		t.Fatal(err)
	}
	if !isSealedMemory(from, "test", size) || isSealedMemory(from, "other", size) || isSealedMemory(from, "test", size/2) {
		t.Error("sealed memory is not recognised")
	}
	if isSealedMemory(file, "ram", size) {
		t.Error("a file is taken for memory")
	}
	if _, err := from.WriteAt([]byte("x"), 0); !errors.Is(err, unix.EPERM) {
		t.Errorf("write to sealed memory: %v", err)
	}
}

// Notes in a template's directory may name anything: what they name is looked at before it is trusted.
func TestAdoptIgnoresWrongNotes(t *testing.T) {
	dir := t.TempDir()
	holders := filepath.Join(dir, "holders")
	if err := os.Mkdir(holders, 0o700); err != nil {
		t.Fatal(err)
	}
	for name, content := range map[string]string{
		"no-number": "1", "999999999-1": "1", "1": "x", "1-1-1": "1",
	} {
		if err := os.WriteFile(filepath.Join(holders, name), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if f := adopt(dir, pageSize); f != nil {
		t.Errorf("adopted %s", f.Name())
	}
	if _, err := os.Stat(filepath.Join(holders, "999999999-1")); err == nil {
		t.Error("the note of a process that is gone is still there")
	}
}

func TestStateIsRefusedWhenForeign(t *testing.T) {
	dir := t.TempDir()
	if _, err := readState(dir); !errors.Is(err, ErrNotRunning) {
		t.Errorf("no state: %v", err)
	}
	for _, s := range []string{"", "{}", `{"version": 99}`, "[]"} {
		if err := os.WriteFile(filepath.Join(dir, stateFile), []byte(s), 0o600); err != nil {
			t.Fatal(err)
		}
		if got, err := readState(dir); err == nil {
			t.Errorf("state %q was read: %+v", s, got)
		}
	}
}

func TestProcessIsTheOneThatWasMeant(t *testing.T) {
	start, err := startTime(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	p, err := openProcess(os.Getpid(), start)
	if err != nil {
		t.Fatal(err)
	}
	if p.ended() {
		t.Error("this process has ended")
	}
	p.file.Close()
	if _, err := openProcess(os.Getpid(), start-1); !errors.Is(err, ErrNotRunning) {
		t.Errorf("another start time: %v", err)
	}
	if _, err := openProcess(1<<22+1, start); !errors.Is(err, ErrNotRunning) {
		t.Errorf("a number that no process has: %v", err)
	}
}

func TestTSCFrequency(t *testing.T) {
	khz, err := tscKHz()
	if err != nil || khz < 100_000 || khz > 20_000_000 {
		t.Errorf("%d kHz, %v", khz, err)
	}
}

func FuzzHostPorts(f *testing.F) {
	f.Add("  TCP[HOST_FORWARD]  12       127.0.0.1 42067       10.0.2.15    80     0     0\n")
	f.Fuzz(func(t *testing.T, table string) {
		ports, err := hostPorts(table, []spec.Publish{{HostIP: "127.0.0.1", Port: 80, Protocol: "tcp"}})
		if err == nil && len(ports) != 1 {
			t.Errorf("%v", ports)
		}
	})
}

// What a guest writes on its console reaches terminals.
func FuzzPrintable(f *testing.F) {
	f.Add("Kernel panic - not syncing: \x1b]0;title\x07\n")
	f.Fuzz(func(t *testing.T, text string) {
		for _, s := range []string{lastLines(text, 3), func() string {
			if p := findPanic(text); p != nil {
				return p.Error()
			}
			return ""
		}()} {
			for _, r := range s {
				if r != '\n' && r != '\t' && (r < ' ' || r >= 0x7f && r < 0xa0) {
					t.Errorf("%q got through", r)
				}
			}
		}
	})
}

// A template that does not restore is left alone for a minute, for longer each time, and is as good as any once it restores.
func TestTemplateFailures(t *testing.T) {
	ts := OpenTemplates(t.TempDir(), nil)
	name := strings.Repeat("0f", 16)
	for _, minutes := range []int{1, 2, 4, 8, 16, 32, 60, 60} {
		if err := os.MkdirAll(filepath.Join(ts.Dir, name), 0o700); err != nil {
			t.Fatal(err)
		}
		ts.spoil(name, errors.New("no state of any machine"))
		if _, err := os.Stat(filepath.Join(ts.Dir, name)); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("the template is still there: %v", err)
		}
		if why, ok := ts.broken(name); !ok || why != "no state of any machine" {
			t.Errorf("broken: %v because of %q", ok, why)
		}
		if f, _, _ := ts.failure(name); f.pause() != time.Duration(minutes)*time.Minute {
			t.Errorf("pause after %d failures: %v, want %d minutes", f.Times, f.pause(), minutes)
		}
		f, _, _ := ts.failure(name)
		past := time.Now().Add(-f.pause())
		if err := os.Chtimes(filepath.Join(ts.Dir, name+brokenExt), past, past); err != nil {
			t.Fatal(err)
		}
		if why, ok := ts.broken(name); ok {
			t.Errorf("broken after %v: %s", f.pause(), why)
		}
	}
	ts.restored(name)
	if f, _, ok := ts.failure(name); ok {
		t.Errorf("a template that has restored since: %+v", f)
	}
}

// A machine gets no more processors than there are to run them, and that is said.
func TestProcessorsAreTheHosts(t *testing.T) {
	for asked, want := range map[int]int{0: 1, 1: 1, maxCPUs: min(maxCPUs, runtime.NumCPU())} {
		var log bytes.Buffer
		c := Config{Package: new(boot.Package), RunDir: t.TempDir(), CacheDir: t.TempDir(), CPUs: asked, Log: slog.New(slog.NewTextHandler(&log, nil))}
		if err := c.check(); err != nil {
			t.Fatal(err)
		}
		if warned := strings.Contains(log.String(), "fewer processors"); c.CPUs != want || warned != (want < asked) {
			t.Errorf("%d processors asked for: %d, %s", asked, c.CPUs, &log)
		}
	}
}
