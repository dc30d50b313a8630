//go:build vm

package vmm

import (
	"bufio"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/cradlestack/cradlestack/driver-cradle/boot"
	"github.com/cradlestack/cradlestack/internal/locked"
)

// launcherName makes this test binary start one machine, say so, and wait.
const launcherName = "test-launcher"

// eventually polls for what another process does; the bound is one for a machine that hangs, not for a slow one.
func eventually(f func() bool) bool {
	for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		if f() {
			return true
		}
	}
	return f()
}

// launch is the test launcher: its configuration is in the environment.
func launch() error {
	var c Config
	if err := json.Unmarshal([]byte(os.Getenv("LAUNCH")), &c); err != nil {
		return err
	}
	var err error
	if c.Package, err = boot.Open(os.Getenv("CRADLE_BOOT")); err != nil {
		return err
	}
	began := time.Now()
	ctx, cancel := testContext()
	defer cancel()
	m, err := Start(ctx, c)
	if err != nil {
		return err
	}
	if os.Getenv("LAUNCH_KEEP") != "no" {
		if err := m.Keep(); err != nil {
			return err
		}
	}
	fmt.Println("ready", m.Info().PID, time.Since(began).Microseconds())
	<-m.Done()
	return m.Err()
}

// A launcher is another process that starts a machine.
type launcher struct {
	*exec.Cmd
	out    *bufio.Reader
	stderr locked.Buffer
}

func startLauncher(t testing.TB, c Config) *launcher {
	t.Helper()
	dir := c.Package.Dir
	c.Package, c.Log = nil, nil
	data, err := json.Marshal(c)
	if err != nil {
		t.Fatal(err)
	}
	l := &launcher{Cmd: exec.Command("/proc/self/exe")}
	l.Args = []string{launcherName}
	l.Env = append(os.Environ(), "LAUNCH="+string(data), "CRADLE_BOOT="+dir)
	l.Stderr = &l.stderr
	out, err := l.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	l.out = bufio.NewReader(out)
	if err := l.Start(); err != nil {
		t.Fatal(err)
	}
	return l
}

// ready waits until the launcher's machine has answered.
func (l *launcher) ready(t testing.TB) (pid int, took time.Duration) {
	t.Helper()
	line, err := l.out.ReadString('\n')
	var us int64
	if _, serr := fmt.Sscanf(line, "ready %d %d", &pid, &us); err != nil || serr != nil {
		l.Wait()
		t.Fatalf("launcher: %q, %v: %s", line, err, l.stderr.String())
	}
	return pid, time.Duration(us) * time.Microsecond
}

// qemus are the processes of the machines that have this run directory, and its user.
func qemus(t testing.TB, dir string) (pids []string) {
	t.Helper()
	procs, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range procs {
		uid := fmt.Sprintf("Uid:\t%d\t", userOf(firstUID, dir))
		status, err := os.ReadFile(p + "/status")
		if err == nil && strings.Contains(string(status), uid) && !strings.Contains(string(status), "State:\tZ") {
			pids = append(pids, filepath.Base(p))
		}
	}
	return pids
}
