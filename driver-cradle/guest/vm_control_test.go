//go:build vm

package guest_test

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cradlestack/cradlestack/driver-cradle/guest"
	"github.com/cradlestack/cradlestack/driver-cradle/vmm"
	"github.com/cradlestack/cradlestack/driver-cradle/wire"
	"github.com/cradlestack/cradlestack/spec"
)

func TestVMExec(t *testing.T) {
	p := podSpec{}
	c := sh("c", "echo up; exec sleep 1000")
	c.Env = []string{"A=container", "B=container"}
	c.Resources.Pids = 64
	c.Resources.OOMScoreAdj = 123
	limited := settings(sh("limited", "echo up; exec sleep 1000"), func(c *spec.Container) {
		c.Ulimits, c.NoNewPrivs = []spec.Ulimit{{Name: "nofile", Soft: 100, Hard: 200}}, true
	})
	c.Lifecycle.Critical = true
	p.Containers = []spec.Container{c, limited}
	m := boots(t, p)
	m.prints("c", "up")
	m.prints("limited", "up")
	for _, x := range []struct {
		name   string
		cfg    guest.ExecConfig
		stdin  string
		stdout string
		stderr string
		code   int
		fails  string
	}{
		{name: "streams", cfg: guestExec("sh", "-c", "echo out; echo err >&2; exit 5"), stdout: "out\n", stderr: "err\n", code: 5},
		{name: "env", cfg: guest.ExecConfig{Args: []string{"sh", "-c", "echo $A $B $C $HOME"}, Env: []string{"B=exec", "C=exec"}}, stdout: "container exec exec /root\n"},
		{name: "user", cfg: guest.ExecConfig{Args: []string{"id", "-u"}, User: "65534:65534"}, stdout: "65534\n"},
		{name: "workdir", cfg: guest.ExecConfig{Args: []string{"pwd"}, WorkingDir: "/etc"}, stdout: "/etc\n"},
		{name: "no workdir", cfg: guest.ExecConfig{Args: []string{"pwd"}, WorkingDir: "/nope"}, code: 127, fails: `chdir to cwd ("/nope") failed: no such file or directory`},
		{name: "stdin", cfg: guestExec("cat"), stdin: "through\n", stdout: "through\n"},
		{name: "tty", cfg: guest.ExecConfig{Args: []string{"sh", "-c", "stty size; tty; echo $TERM"}, TTY: true, Rows: 24, Cols: 100}, stdout: "24 100\r\n/dev/pts/0\r\nxterm\r\n"},
		{name: "not found", cfg: guestExec("nope"), code: 127, fails: `exec: "nope": executable file not found in $PATH`},
		{name: "not executable", cfg: guestExec("/etc/passwd"), code: 126, fails: `exec: "/etc/passwd": permission denied`},
		{name: "namespaces", cfg: guestExec("sh", "-c", "cat /proc/1/comm; cat /proc/self/cgroup; hostname"), stdout: "sleep\n0::/\n0123456789ab\n"},
		{name: "caps", cfg: guestExec("grep", "CapEff", "/proc/self/status"), stdout: "CapEff:\t00000000a80425fb\n"},
		{name: "privileged", cfg: guest.ExecConfig{Args: []string{"grep", "CapEff", "/proc/self/status"}, Privileged: true}, stdout: "CapEff:\t000001ffffffffff\n"},
		{name: "killed", cfg: guestExec("sh", "-c", "kill -KILL $$"), code: 137},
		{name: "signal ignored", cfg: guestExec("grep", "-E", "Sig(Blk|Ign)", "/proc/self/status"), stdout: "SigBlk:\t0000000000000000\nSigIgn:\t0000000000000000\n"},
		{name: "fds", cfg: guestExec("sh", "-c", "ls /proc/self/fd | wc -l"), stdout: "4\n"},
	} {
		t.Run(x.name, func(t *testing.T) {
			e := m.exec("c", x.cfg, x.stdin)
			if e.Stdout != x.stdout || e.Stderr != x.stderr || e.Code != x.code || e.Error != x.fails {
				t.Errorf("got %+v, want %q, %q, %d, %q", e, x.stdout, x.stderr, x.code, x.fails)
			}
			t.Logf("started in %s, took %s µs", e.Started, e.Took)
		})
	}
	for _, x := range [][3]string{
		{"c", "ulimit -n; ulimit -c; cat /proc/self/oom_score_adj", "1048576\nunlimited\n123\n"},
		{"limited", "ulimit -n; ulimit -Hn; cat /proc/self/oom_score_adj; grep NoNew /proc/self/status; sleep 0", "100\n200\n0\nNoNewPrivs:\t1\n"},
	} {
		if e := m.exec(x[0], guestExec("sh", "-c", x[1]), ""); e.Stdout != x[2] {
			t.Errorf("exec in %s: %+v, want %q", x[0], e, x[2])
		}
	}
	e := m.exec("c", guest.ExecConfig{Args: []string{"sh", "-c", "id -G; grep -E 'Cap(Prm|Eff|Bnd)' /proc/self/status | cut -f2"}, User: "1000:1001"}, "")
	if want := "1001\n0000000000000000\n0000000000000000\n00000000a80425fb\n"; e.Stdout != want {
		t.Errorf("exec as a user: %+v, want %q", e, want)
	}
	t.Run("many", func(t *testing.T) {
		for i := range 150 {
			if e := m.exec("c", guestExec("true"), ""); e.Code != 0 || e.Error != "" {
				t.Fatalf("exec %d: %+v", i, e)
			}
		}
	})
	t.Run("fork bomb", func(t *testing.T) {
		m.exec("c", guestExec("sh", "-c", "i=0; while [ $i -lt 200 ]; do sleep 100 >/dev/null 2>&1 & i=$((i+1)); done"), "")
		if s := m.state("c"); !s.Running {
			t.Errorf("state %+v after the pids limit was hit", s)
		}
	})
	var pids []int
	if err := m.call("GET", "/pids?c=c", nil, &pids); err != nil || len(pids) < 2 || !slices.Contains(pids, m.state("c").Pid) {
		t.Errorf("pids %v, %v", pids, err)
	}
	if err := m.do("c", "kill", "signal", "KILL"); err != nil {
		t.Error(err)
	}
	if s := m.ends(); s.ExitCode != 137 || s.Containers[0].OOMKilled {
		t.Errorf("status %+v", s)
	}
}

func TestVMControl(t *testing.T) {
	p := podSpec{}
	tty := sh("tty", "trap 'stty size' WINCH; echo up; while :; do sleep 0.1; done")
	tty.TTY = true
	cat := sh("cat", "cat")
	cat.OpenStdin, cat.StdinOnce = true, true
	health := sh("health", "echo up; sleep 1000")
	health.Healthcheck = &spec.Healthcheck{Test: []string{"CMD-SHELL", "echo probed; test -e /ok"}, Interval: spec.Duration(200 * time.Millisecond), Retries: 2}
	main := sh("main", "trap 'exit 0' TERM; echo run; sleep 1000 & wait")
	main.Lifecycle.Critical = true
	p.Containers = []spec.Container{main, tty, cat, health}
	p.Containers = append(p.Containers, settings(sh("dependent", "echo healthy now"), func(c *spec.Container) {
		c.Lifecycle.After = []spec.After{{Container: "health", Until: "healthy"}}
	}))
	m := boots(t, p)
	m.prints("main", "run")

	m.prints("tty", "up")
	if err := m.do("tty", "resize"); err != nil {
		t.Error(err)
	}
	m.prints("tty", "33 77")

	var out [2]string
	if err := m.call("POST", "/attach?c=cat&stdin=typed", nil, &out); err != nil || out[0] != "typed" {
		t.Errorf("attach: %q, %v", out, err)
	}

	// Health: failing, then healthy; its dependent starts then and not before.
	wait := func(what string, f func() bool) {
		t.Helper()
		for end := time.Now().Add(patience); !f(); time.Sleep(20 * time.Millisecond) {
			if time.Now().After(end) {
				t.Fatalf("%s: did not come; %+v", what, m.state("health").Health)
			}
		}
	}
	wait("unhealthy", func() bool { return m.state("health").Health.Status == guest.HealthUnhealthy })
	if s := m.state("dependent"); s.Status != wire.StateCreated {
		t.Errorf("dependent is %s before the other is healthy", s.Status)
	}
	if e := m.exec("health", guestExec("touch", "/ok"), ""); e.Code != 0 {
		t.Errorf("%+v", e)
	}
	wait("healthy", func() bool { return m.state("health").Health.Status == guest.HealthHealthy })
	m.prints("dependent", "healthy now")
	h := m.state("health").Health
	if last := h.Log[len(h.Log)-1]; len(h.Log) > 5 || last.ExitCode != 0 || last.Output != "probed\n" || h.FailingStreak != 0 {
		t.Errorf("health log %+v", h)
	}

	if err := m.do("main", "pause"); err != nil {
		t.Error(err)
	}
	if s := m.state("main"); !s.Paused || s.Status != wire.StatePaused || !s.Running {
		t.Errorf("paused: %+v", s)
	}
	if err := m.do("main", "unpause"); err != nil {
		t.Error(err)
	}
	if err := m.do("main", "unpause"); err == nil || !strings.HasSuffix(err.Error(), "is not paused") {
		t.Errorf("unpause of a running container: %v", err)
	}
	first := m.state("main")
	if err := m.do("main", "restart"); err != nil {
		t.Error(err)
	}
	if s := m.state("main"); !s.Running || s.Pid == first.Pid || !s.StartedAt.After(first.StartedAt) {
		t.Errorf("restarted: %+v", s)
	}
	m.prints("main", "run\nrun\n")
	if err := m.do("main", "start"); err == nil || err.Error() != "container is already running" {
		t.Errorf("start of a running container: %v", err)
	}
	if err := m.do("health", "stop", "timeout", "10ms"); err != nil {
		t.Error(err)
	}
	if s := m.state("health"); s.Running || s.ExitCode != 137 {
		t.Errorf("stopped: %+v", s)
	}
	if err := m.do("health", "start"); err != nil {
		t.Error(err)
	}
	if s := m.state("health"); !s.Running {
		t.Errorf("started again: %+v", s)
	}
	var actions []string
	if err := m.call("GET", "/events?c=health", nil, &actions); err != nil {
		t.Error(err)
	}
	for _, want := range []string{"create", "start", "health_status: unhealthy", "health_status: healthy", "kill", "die", "stop"} {
		if !slices.Contains(actions, want) {
			t.Errorf("events %q lack %s", actions, want)
		}
	}
	var stats wire.Stats
	if err := m.call("GET", wire.PathStats, nil, &stats); err != nil || stats.MemoryTotal == 0 || stats.MemoryUsed == 0 || stats.CPU == 0 {
		t.Errorf("stats %+v, %v", stats, err)
	}
	// The end of the critical one ends the pod.
	if err := m.do("main", "stop"); err != nil {
		t.Error(err)
	}
	s := m.ends()
	if s.ExitCode != 0 || s.State != wire.StateExited {
		t.Errorf("status %+v", s)
	}
	for _, c := range s.Containers {
		if c.State != wire.StateExited {
			t.Errorf("container %s is %s after the pod's end", c.Name, c.State)
		}
	}
	if err := m.do("main", "start"); err == nil || !strings.Contains(err.Error(), "pod has ended") {
		t.Errorf("start after the pod's end: %v", err)
	}
}

func TestVMLifecycle(t *testing.T) {
	p := podSpec{}
	p.Volumes = []spec.Volume{{Name: "v", Scratch: &spec.ScratchVolume{}}}
	prepare := with(sh("prepare", "echo prepared > /v/f"), "v:/v")
	worker := after(with(sh("worker", "cat /v/f; n=$(cat /v/n 2>/dev/null || echo 0); n=$((n+1)); echo $n > /v/n; echo start $n; test $n -ge 3"), "v:/v"), "prepare")
	worker.Lifecycle.RestartOnFailure, worker.Lifecycle.RestartDelay = true, spec.Duration(50*time.Millisecond)
	bounded := sh("bounded", "echo again; exit 9")
	bounded.Lifecycle.RestartOnFailure, bounded.Lifecycle.MaxStarts = true, 2
	never := after(sh("never", "true"), "bounded")
	p.Containers = []spec.Container{prepare, worker, bounded, never}
	m := boots(t, p)
	s := m.ends()
	m.printed("worker", "prepared\nstart 1\nprepared\nstart 2\nprepared\nstart 3\n")
	m.printed("bounded", "again\nagain\n")
	for i, want := range []struct{ starts, code int }{{1, 0}, {3, 0}, {2, 9}, {0, 125}} {
		if c := s.Containers[i]; c.Starts != want.starts || c.ExitCode != want.code {
			t.Errorf("%s: %d starts, exit code %d, want %+v", c.Name, c.Starts, c.ExitCode, want)
		}
	}
	if got := s.Containers[3].Error; got != "waits for bounded, which ended with 9 before it came that far" {
		t.Errorf("error of never: %q", got)
	}
}

func TestVMShutdown(t *testing.T) {
	p := podSpec{}
	p.Containers = []spec.Container{sh("a", "trap 'echo bye; sleep 0.3; exit 4' TERM; echo up; sleep 1000 & wait"), sh("b", "trap '' TERM; echo up; sleep 1000")}
	m := boots(t, p)
	m.prints("a", "up")
	m.prints("b", "up")
	begin := time.Now()
	var s wire.Status
	if err := m.call("POST", wire.PathShutdown+"?timeout=5", nil, &s); err != nil {
		t.Fatal(err)
	}
	if s.State != wire.StateExited || s.Containers[0].ExitCode != 4 || s.Containers[1].ExitCode != 137 {
		t.Errorf("status %+v", s)
	}
	t.Logf("shut down in %s", time.Since(begin))
}

func TestVMNetwork(t *testing.T) {
	p := podSpec{net: vmm.Net{Mode: vmm.NetUser, Publish: []spec.Publish{{HostIP: "127.0.0.1", Port: 8080}}}}
	p.ifs = []wire.Interface{{
		Name: "eth0", MAC: "02:00:00:12:34:56", MTU: 1400,
		Addresses: []netip.Prefix{netip.MustParsePrefix("10.0.2.15/24"), netip.MustParsePrefix("fd00::5/64")},
		Routes: []wire.Route{
			{Destination: netip.MustParsePrefix("0.0.0.0/0"), Via: netip.MustParseAddr("10.0.2.2")},
			{Destination: netip.MustParsePrefix("192.0.2.0/24"), Metric: 7},
			{Destination: netip.MustParsePrefix("::/0"), Via: netip.MustParseAddr("fd00::1")},
			{Destination: netip.MustParsePrefix("2001:db8::/32")},
		},
	}}
	p.Network.ExtraHosts = []spec.HostEntry{{Name: "peer", Address: "10.0.2.2"}}
	p.Containers = []spec.Container{
		sh("ip", "ip -o addr show dev eth0 | awk '{print $3,$4}'; cat /sys/class/net/eth0/address /sys/class/net/eth0/mtu; ip route; ip -6 route | grep -v fe80 | awk '{print $1,$2,$3}'; ip -o addr show lo | awk '{print $4}'"),
		sh("serve", "echo ready; echo from the guest | nc -l -p 8080"),
		sh("hosts", "tail -3 /etc/hosts"),
		settings(sh("lowport", "nc -l -p 80 & until netstat -ltn | grep -q ':80 '; do kill -0 $! || exit; sleep 0.1; done; kill $!; echo listens"), func(c *spec.Container) { c.User = "1000" }),
	}
	m := boots(t, p)
	m.prints("serve", "ready")
	if got := read(t, fmt.Sprintf("127.0.0.1:%d", m.Info().Publish[0].HostPort)); got != "from the guest\n" {
		t.Errorf("the published port says %q", got)
	}
	m.ends()
	m.printed("hosts", "10.0.2.2\tpeer\n10.0.2.15\t0123456789ab\nfd00::5\t0123456789ab\n")
	m.printed("lowport", "listens\n")
	stdout, stderr := m.logs("ip")
	for _, want := range []string{
		"inet 10.0.2.15/24\n", "inet6 fd00::5/64\n", "02:00:00:12:34:56\n1400\n", "default via 10.0.2.2 dev eth0", "192.0.2.0/24 dev eth0 scope link  metric 7",
		"default via fd00::1", "2001:db8::/32 dev eth0", "127.0.0.1/8\n::1/128\n",
	} {
		if !strings.Contains(stdout, want) {
			t.Errorf("ip printed %q, %q without %q", stdout, stderr, want)
		}
	}
}

// read connects until something is read: QEMU accepts before the guest does.
func read(t *testing.T, address string) string {
	t.Helper()
	for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(100 * time.Millisecond) {
		conn, err := net.Dial("tcp", address)
		if err != nil {
			t.Fatal(err)
		}
		data, err := io.ReadAll(conn)
		conn.Close()
		if err == nil && len(data) > 0 {
			return string(data)
		}
	}
	t.Fatalf("nothing to read at %s", address)
	return ""
}

// A panic while the agent answers a call is that call's. One in the background ends the pod, and is told as what it is.
func TestVMAgentPanics(t *testing.T) {
	p := podSpec{}
	p.Containers = []spec.Container{sh("c", "echo up; sleep 1000")}
	m := boots(t, p)
	m.prints("c", "up")
	for range 3 {
		if err := m.call("POST", "/panic?in=handler", nil, nil); err == nil {
			t.Error("a handler that panics answers")
		}
	}
	if s := m.state("c"); !s.Running {
		t.Errorf("after panics of handlers: %+v", s)
	}
	_ = m.call("POST", "/panic?in=background", nil, nil) // there may be no answer
	select {
	case <-m.Done():
	case <-time.After(patience):
		t.Fatal("the machine goes on without its agent")
	}
	var panicked *vmm.PanicError
	if err := m.Err(); !errors.As(err, &panicked) || panicked.Agent != "panic: in the background" || !strings.Contains(err.Error(), "the agent in the guest has failed: panic: in the background\n\ngoroutine ") {
		t.Errorf("the machine's end: %v", err)
	}
}
