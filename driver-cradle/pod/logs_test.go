package pod

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/cradlestack/cradlestack/driver-cradle/wire"
)

const (
	t1 = "2026-01-02T03:04:05.000000001Z"
	t2 = "2026-01-02T03:04:06.5Z"
	t3 = "2026-01-02T03:04:07Z"
)

// savedLog has lines that are cut into frames as a guest does it: several lines in one, a long line in several, an end without a newline.
var savedLog = frame(1, t1+" one\n"+t1+" two\n") + frame(2, t2+" er") + frame(1, t2+" three\n") + frame(2, "ror\n") + frame(1, t3+" no newline")

func TestCopyLog(t *testing.T) {
	at := func(s string) time.Time {
		v, err := time.Parse(time.RFC3339Nano, s)
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
	for _, c := range []struct {
		name        string
		o           LogOptions
		skip        int
		out, errors string
	}{
		{"all", LogOptions{}, 0, "one\ntwo\nthree\nno newline", "error\n"},
		{"timestamps", LogOptions{Timestamps: true}, 0, t1 + " one\n" + t1 + " two\n" + t2 + " three\n" + t3 + " no newline", t2 + " error\n"},
		{"since", LogOptions{Since: at(t2)}, 0, "three\nno newline", "error\n"},
		{"until", LogOptions{Until: at(t2)}, 0, "one\ntwo\nthree\n", "error\n"},
		{"tail", LogOptions{}, 3, "no newline", "error\n"},
	} {
		t.Run(c.name, func(t *testing.T) {
			var out, errors bytes.Buffer
			c.o.Stdout, c.o.Stderr = &out, &errors
			if err := copyLog(strings.NewReader(savedLog), false, c.o, c.skip); err != nil {
				t.Fatal(err)
			}
			if out.String() != c.out || errors.String() != c.errors {
				t.Errorf("stdout %q, stderr %q, want %q and %q", &out, &errors, c.out, c.errors)
			}
		})
	}
	var out bytes.Buffer
	if err := copyLog(strings.NewReader(t1+" a\r\n"+t2+" b\r\n"), true, LogOptions{Stdout: &out}, 1); err != nil || out.String() != "b\r\n" {
		t.Errorf("terminal: %q, %v", &out, err)
	}
	for _, damaged := range []string{savedLog[:len(savedLog)-3], "\x07\x00\x00\x00\x00\x00\x00\x01x", "\x01\x00\x00\x00\xff\xff\xff\xffx", "\x01\x00"} {
		if err := copyLog(strings.NewReader(damaged), false, LogOptions{}, 0); err == nil {
			t.Errorf("damaged log %q is read without an error", damaged)
		}
	}
}

func FuzzCopyLog(f *testing.F) {
	f.Add([]byte(savedLog), false)
	f.Add([]byte(t1+" a\n"), true)
	f.Fuzz(func(t *testing.T, data []byte, tty bool) {
		var out bytes.Buffer
		copyLog(bytes.NewReader(data), tty, LogOptions{Stdout: &out, Stderr: &out}, 0)
		if out.Len() > len(data) {
			t.Errorf("%d bytes of %d", out.Len(), len(data))
		}
	})
}

func TestLogsOfEndedPod(t *testing.T) {
	d := testPod(t)
	if err := d.Logs("", LogOptions{Tail: -1}); err == nil || !strings.Contains(err.Error(), ErrNotStarted.Error()) {
		t.Errorf("logs before the first run: %v", err)
	}
	if err := os.MkdirAll(d.join(runDir, logsDir), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := writeJSON(d.join(runDir, statusFile), Report{Version: reportVersion, Status: wire.Status{State: wire.StateExited}}); err != nil {
		t.Fatal(err)
	}
	if err := d.Logs("", LogOptions{Tail: -1}); err == nil || !strings.Contains(err.Error(), "scratch disk") {
		t.Errorf("logs of a run whose machine was killed: %v", err)
	}
	if err := os.WriteFile(d.join(runDir, logsDir, "test"), []byte(savedLog), 0o600); err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	if err := d.Logs(testID[:5], LogOptions{Stdout: &out, Tail: 2}); err != nil || out.String() != "three\nno newline" {
		t.Errorf("the last two lines of stdout: %q, %v", &out, err)
	}
	if err := d.Logs("other", LogOptions{}); err == nil {
		t.Error("logs of a container that does not exist")
	}
}

// testPod is a pod directory without what a machine would need.
func testPod(t *testing.T) *Dir {
	t.Helper()
	dir := t.TempDir()
	data, err := os.ReadFile("testdata/resolve/command-cleared.golden")
	if err != nil {
		t.Fatal(err)
	}
	text := strings.ReplaceAll(string(data), `"name": "x"`, `"name": "test"`)
	if err := os.WriteFile(filepath.Join(dir, LaunchFile), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	d, err := Open(dir, nil)
	if err != nil {
		t.Fatal(err)
	}
	return d
}
