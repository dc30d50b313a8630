package vdocker

import (
	"os"
	"strings"
	"testing"
	"time"

	"github.com/moby/moby/api/types/container"

	"github.com/cradlestack/cradlestack/driver-cradle/guest"
	"github.com/cradlestack/cradlestack/spec"
)

func TestStatusText(t *testing.T) {
	now := time.Now()
	ago := func(d time.Duration) time.Time { return now.Add(-d) }
	for want, s := range map[string]guest.State{
		"Up 5 minutes":                   {Running: true, StartedAt: ago(5 * time.Minute)},
		"Up 5 minutes (Paused)":          {Running: true, Paused: true, StartedAt: ago(5 * time.Minute)},
		"Up 5 minutes (healthy)":         {Running: true, StartedAt: ago(5 * time.Minute), Health: &guest.Health{Status: "healthy"}},
		"Up 1 second (health: starting)": {Running: true, StartedAt: ago(time.Second), Health: &guest.Health{Status: "starting"}},
		"Exited (3) 2 hours ago":         {Status: "exited", ExitCode: 3, FinishedAt: ago(2 * time.Hour)},
		"Restarting (1) 2 seconds ago":   {Running: true, Restarting: true, ExitCode: 1, FinishedAt: ago(2 * time.Second)},
		"Created":                        {Status: "created"},
	} {
		if got := statusText(s, now); got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	}
}

func TestIsImage(t *testing.T) {
	i := spec.Image{Reference: "registry:5000/a/busybox:1.36", ID: "sha256:0123456789abcdef", Digest: "sha256:fedc"}
	for want, ok := range map[string]bool{
		"registry:5000/a/busybox:1.36": true, "registry:5000/a/busybox": false, "0123456789ab": true, "sha256:0123456789abcdef": true, "012": false, "sha256:fedc": true, "busybox": false,
	} {
		if isImage(i, want) != ok {
			t.Errorf("%s: %v", want, !ok)
		}
	}
	if i.Reference = "busybox"; !isImage(i, "busybox:latest") || !isImage(i, "busybox") {
		t.Error("a reference without a tag is latest")
	}
}

func TestUpdateSettings(t *testing.T) {
	pids, none := int64(50), int64(0)
	for _, tt := range []struct {
		u    container.UpdateConfig
		want string
	}{
		{container.UpdateConfig{Resources: container.Resources{Memory: 64 << 20, MemorySwap: -1}}, "memory.max=67108864"},
		{container.UpdateConfig{Resources: container.Resources{NanoCPUs: 5e8}}, "cpu.max=50000 100000"},
		{container.UpdateConfig{Resources: container.Resources{CPUQuota: 20000, CPUPeriod: 50000}}, "cpu.max=20000 50000"},
		{container.UpdateConfig{Resources: container.Resources{CPUQuota: -1}}, "cpu.max=max 100000"},
		{container.UpdateConfig{Resources: container.Resources{CPUShares: 1024}}, "cpu.weight=39"},
		{container.UpdateConfig{Resources: container.Resources{PidsLimit: &pids}}, "pids.max=50"},
		{container.UpdateConfig{Resources: container.Resources{PidsLimit: &none}}, "pids.max=max"},
		{container.UpdateConfig{Resources: container.Resources{Memory: 1}}, "400"},
		{container.UpdateConfig{Resources: container.Resources{NanoCPUs: 1e9, CPUQuota: 1000}}, "400"},
		{container.UpdateConfig{Resources: container.Resources{CpusetCpus: "0"}}, "501"},
	} {
		settings, err := cgroupSettings(tt.u)
		var got []string
		for _, s := range settings {
			got = append(got, s[0]+"="+s[1])
		}
		if err != nil {
			got = []string{map[int]string{400: "400", 501: "501"}[status(err)]}
		}
		if strings.Join(got, " ") != tt.want {
			t.Errorf("%+v: %q, %v; want %s", tt.u.Resources, got, err, tt.want)
		}
	}
}

func TestPsColumns(t *testing.T) {
	for args, want := range map[string]string{
		"": "UID PID PPID C STIME TTY TIME CMD", "-ef": "UID PID PPID C STIME TTY TIME CMD", "-f -e": "UID PID PPID C STIME TTY TIME CMD",
		"aux": "USER PID %CPU %MEM VSZ RSS TTY STAT START TIME COMMAND", "-e": "PID TTY TIME CMD", "ax": "PID TTY STAT TIME COMMAND",
		"-o pid,comm": "PID COMMAND", "-eo pid,user=WHO,args": "PID WHO COMMAND", "-opid": "PID", "-o pid -o %cpu": "PID %CPU",
	} {
		cols, err := psColumns(args)
		var titles []string
		for _, c := range cols {
			titles = append(titles, c.title)
		}
		if got := strings.Join(titles, " "); err != nil || got != want {
			t.Errorf("%q: %q, %v; want %q", args, got, err, want)
		}
	}
	for _, args := range []string{"-o", "-o nosuch", "--format=pid,x"} {
		if cols, err := psColumns(args); status(err) != 400 {
			t.Errorf("%q: %v, %v", args, cols, err)
		}
	}
}

func TestReadProcess(t *testing.T) {
	p, err := readProcess(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	s := newMachineState(map[uint32]string{uint32(os.Getuid()): "me"})
	if p.pid != os.Getpid() || p.ppid != os.Getppid() || p.userName(s) != "me" || !strings.Contains(p.args, "vdocker.test") || p.resident == 0 {
		t.Errorf("this process is %+v", p)
	}
	if age := time.Since(p.started(s)); age < 0 || age > time.Hour {
		t.Errorf("it started %v ago", age)
	}
	for _, text := range []string{"", "1", "1 (", ") (", "1 (a) R 1 2"} {
		if p, err := parseStat(text); err == nil {
			t.Errorf("%q is %+v", text, p)
		}
	}
	if p, err := parseStat("7 (a) (b) S 1 7 7 34817 7 4194560 1 0 0 0 12 34 0 0 20 0 3 0 500 4096 2 0"); err != nil || p.comm != "a) (b" || p.ttyName() != "pts/1" || p.flags() != "Ssl+" || p.user != 12 {
		t.Errorf("%+v, %v", p, err)
	}
}

func TestParseNetDev(t *testing.T) {
	got := parseNetDev(`Inter-|   Receive                                                |  Transmit
 face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo colls carrier compressed
    lo:     100       1    0    0    0     0          0         0      100       1    0    0    0     0       0          0
  eth0:12345678     90    1    2    0     0          0         0     4321      43    3    4    0     0       0          0
`)
	want := container.NetworkStats{RxBytes: 12345678, RxPackets: 90, RxErrors: 1, RxDropped: 2, TxBytes: 4321, TxPackets: 43, TxErrors: 3, TxDropped: 4}
	if len(got) != 1 || got["eth0"] != want {
		t.Errorf("got %+v", got)
	}
}

func TestFramesOfLines(t *testing.T) {
	var b strings.Builder
	out, _ := outputs(&b, false, true, true, true)
	out.Write([]byte("ab\n\nc"))
	if got := b.String(); got != "\x01\x00\x00\x00\x00\x00\x00\x03ab\n\x01\x00\x00\x00\x00\x00\x00\x01\n\x01\x00\x00\x00\x00\x00\x00\x01c" {
		t.Errorf("got %q", got)
	}
	b.Reset()
	const lines = framePayload // of a byte and its end: more than one buffer
	if n, err := out.Write([]byte(strings.Repeat("x\n", lines))); n != 2*lines || err != nil || b.Len() != lines*(frameHeader+2) {
		t.Errorf("wrote %d as %d: %v", n, b.Len(), err)
	}
}

func TestFrames(t *testing.T) {
	var b strings.Builder
	out, errs := outputs(&b, false, true, true, false)
	out.Write([]byte("ab"))
	errs.Write([]byte("c"))
	if got := b.String(); got != "\x01\x00\x00\x00\x00\x00\x00\x02ab\x02\x00\x00\x00\x00\x00\x00\x01c" {
		t.Errorf("got %q", got)
	}
	b.Reset()
	if n, err := out.Write(make([]byte, framePayload+1)); n != framePayload+1 || err != nil || b.Len() != n+2*frameHeader {
		t.Errorf("wrote %d as %d: %v", n, b.Len(), err)
	}
	if out, errs := outputs(&b, true, true, true, true); out != &b || errs != nil {
		t.Error("a terminal's stream is not raw")
	}
}
