package driver

import (
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/cradlestack/cradlestack/driver-cradle/pod"
)

// aProcess is one that lives until the test ends or somebody kills it; gone is closed then.
func aProcess(t *testing.T) (pid int, gone <-chan struct{}) {
	t.Helper()
	return launch(t, exec.Command("sleep", "1000"))
}

func launch(t *testing.T, cmd *exec.Cmd) (pid int, gone <-chan struct{}) {
	t.Helper()
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		cmd.Wait()
	}()
	t.Cleanup(func() {
		cmd.Process.Kill()
		<-ended
	})
	return cmd.Process.Pid, ended
}

// held makes a lock file that somebody holds.
func held(t *testing.T, o any) (path string, lock *os.File) {
	t.Helper()
	path = filepath.Join(t.TempDir(), pluginLock)
	data, err := json.Marshal(o)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
	if lock, err = os.OpenFile(path, os.O_RDWR, 0); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { lock.Close() })
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	return path, lock
}

func TestTakeOver(t *testing.T) {
	log := slog.New(slog.DiscardHandler)
	me := self()
	pid, _ := aProcess(t)
	another, _ := aProcess(t)

	t.Run("nobody has it", func(t *testing.T) {
		path := filepath.Join(t.TempDir(), pluginLock)
		for range 2 { // the second finds what the first has left
			f, err := takeOver(t.Context(), path, log)
			if err != nil {
				t.Fatal(err)
			}
			if o, err := readOwner(f); err != nil || o != me {
				t.Errorf("the owner is %+v, %v", o, err)
			}
			f.Close()
		}
	})
	t.Run("another client's", func(t *testing.T) {
		path, _ := held(t, owner{PID: pid, Start: startOf(pid), Client: another, ClientStart: startOf(another)})
		if _, err := takeOver(t.Context(), path, log); err == nil || !strings.Contains(err.Error(), "give each client a state_dir of its own") {
			t.Errorf("it is taken: %v", err)
		}
		if startOf(pid) == "" {
			t.Error("its plugin was ended")
		}
	})
	for name, client := range map[string]owner{
		"the same client's":          {Client: me.Client, ClientStart: me.ClientStart},
		"of a client that has ended": {Client: another, ClientStart: startOf(another) + "0"}, // its number was given again
	} {
		t.Run(name, func(t *testing.T) {
			pid, gone := aProcess(t)
			client.PID, client.Start = pid, startOf(pid)
			path, lock := held(t, client)
			go func() {
				<-gone
				lock.Close()
			}()
			f, err := takeOver(t.Context(), path, log)
			if err != nil {
				t.Fatal(err)
			}
			f.Close()
			if startOf(pid) != "" {
				t.Error("the earlier plugin process lives")
			}
		})
	}
	t.Run("of a process that can't be known", func(t *testing.T) {
		for _, o := range []any{"nonsense", owner{}, owner{PID: pid, Start: "1", Client: another, ClientStart: "1"}} {
			path, _ := held(t, o)
			ctx, cancel := context.WithCancelCause(t.Context())
			cancel(errShutdown)
			if _, err := takeOver(ctx, path, log); !errors.Is(err, errShutdown) {
				t.Errorf("%+v: %v", o, err)
			}
		}
		if startOf(pid) == "" {
			t.Error("a process was ended that only has the number of an earlier one")
		}
	})
}

func TestEndOnlyWhoIsMeant(t *testing.T) {
	pid, gone := aProcess(t)
	if err := end(pid, startOf(pid)+"0"); err != nil || startOf(pid) == "" {
		t.Errorf("another process: %v", err)
	}
	if err := end(pid, startOf(pid)); err != nil {
		t.Error(err)
	}
	<-gone
	if err := end(pid, "1"); err != nil || startOf(pid) != "" {
		t.Errorf("a process that is gone: %v", err)
	}
}

func TestRecord(t *testing.T) {
	dir := t.TempDir()
	want := record{Version: recordVersion, ID: "a/b/c", AllocID: "a", Name: "b", Stdout: "/out", Stderr: "/err", Created: now().UTC().Round(0)}
	if err := want.write(dir); err != nil {
		t.Fatal(err)
	}
	got, err := readRecord(dir)
	if err != nil || !reflect.DeepEqual(*got, want) {
		t.Errorf("%+v, %v; want %+v", got, err, want)
	}
	for text, message := range map[string]string{
		"":                                      "unexpected end",
		"{":                                     "unexpected end",
		`{"version": 2}`:                        "version 2, this program reads version 1",
		`{"version": 1, "id": 7}`:               "cannot unmarshal",
		strings.Repeat(" ", 2<<20) + `{"id":1}`: "",
	} {
		if err := os.WriteFile(filepath.Join(dir, recordFile), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if r, err := readRecord(dir); err == nil || !strings.Contains(err.Error(), message) {
			t.Errorf("%.40q is %+v, %v; want %q", text, r, err, message)
		}
	}
}

// Whatever Nomad calls a task, its directory is one of its own right below the others.
func TestDirOf(t *testing.T) {
	s := &state{dir: "/state"}
	seen := map[string]bool{}
	for _, id := range []string{"a/t/1", "a/t/2", "", "../../etc", strings.Repeat("x", 5000)} {
		for _, name := range []string{"t", "..", "a/b", "", strings.Repeat("long", 100), "\x00\n"} {
			dir := s.dirOf(id+name, name)
			if filepath.Dir(dir) != "/state/tasks" || len(filepath.Base(dir)) > 100 || filepath.Clean(dir) != dir || seen[dir] {
				t.Errorf("task %.20q %.20q is in %s", id, name, dir)
			}
			seen[dir] = true
		}
	}
}

// What a plugin process has left that was killed while it made a pod does not keep its successor from starting the task under the same id, and is not
// taken away under it.
func TestBeginWhereSomethingIsLeft(t *testing.T) {
	for name, leave := range map[string]func(dir string) error{
		"nothing":     func(string) error { return nil },
		"a directory": func(dir string) error { return os.Mkdir(dir, 0o711) },
		"a record": func(dir string) error {
			return errors.Join(os.Mkdir(dir, 0o711), (&record{Version: recordVersion, ID: "alloc/t/1", AllocID: "alloc", Name: "t"}).write(dir))
		},
		"half a pod": func(dir string) error {
			return errors.Join(os.MkdirAll(filepath.Join(dir, podDir, "layers"), 0o711), (&record{Version: recordVersion, ID: "alloc/t/1", AllocID: "alloc", Name: "t"}).write(dir))
		},
	} {
		t.Run(name, func(t *testing.T) {
			d := New(hclogNull).(*Driver)
			defer d.Close()
			s := &state{dir: t.TempDir(), log: slog.New(slog.DiscardHandler)}
			if err := os.Mkdir(filepath.Join(s.dir, tasksDir), 0o711); err != nil {
				t.Fatal(err)
			}
			config := aTaskConfig("alloc/t/1", "alloc", "t")
			if err := leave(s.dirOf(config.ID, config.Name)); err != nil {
				t.Fatal(err)
			}
			var err error
			if s.found, err = s.remnants(); err != nil {
				t.Fatal(err)
			}
			b, err := d.begin(s, config)
			if err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(filepath.Join(b.dir, "mine"), nil, 0o600); err != nil {
				t.Fatal(err)
			}
			if _, err := d.begin(s, config); err == nil {
				t.Error("it is begun twice")
			}
			for _, r := range s.found {
				for _, soon := range []bool{true, false} {
					if err := d.clearOrphan(s, r, soon); err != nil {
						t.Error(err)
					}
				}
			}
			if _, err := os.Stat(filepath.Join(b.dir, "mine")); err != nil {
				t.Errorf("the task's directory was removed while it was being started: %v", err)
			}
			d.begun(b)
			for _, r := range s.found { // nobody has it any more, and it is no pod
				if err := d.clearOrphan(s, r, true); err != nil {
					t.Error(err)
				}
				if _, err := os.Stat(b.dir); !errors.Is(err, os.ErrNotExist) {
					t.Errorf("what was found is still there: %v", err)
				}
			}
			if _, err := pod.Open(filepath.Join(b.dir, podDir), nil); err == nil {
				t.Error("there is a pod")
			}
		})
	}
}

// A client that was killed while it started a task starts it again when it is back, with another id. What is still being done for the first start, in the
// plugin process that lives on, is called off.
func TestBeginCallsOffTheStartForAnEarlierClient(t *testing.T) {
	d := New(hclogNull).(*Driver)
	defer d.Close()
	s := &state{dir: t.TempDir(), log: slog.New(slog.DiscardHandler)}
	if err := os.Mkdir(filepath.Join(s.dir, tasksDir), 0o711); err != nil {
		t.Fatal(err)
	}
	first, err := d.begin(s, aTaskConfig("alloc/t/1", "alloc", "t"))
	if err != nil {
		t.Fatal(err)
	}
	other, err := d.begin(s, aTaskConfig("alloc/side/1", "alloc", "side"))
	if err != nil {
		t.Fatal(err)
	}
	defer d.begun(other)
	go func() {
		<-first.ctx.Done()
		if err := (&record{Version: recordVersion, ID: "alloc/t/1", AllocID: "alloc", Name: "t"}).write(first.dir); err != nil {
			t.Error(err)
		}
		d.begun(first)
	}()
	second, err := d.begin(s, aTaskConfig("alloc/t/2", "alloc", "t"))
	if err != nil {
		t.Fatal(err)
	}
	defer d.begun(second)
	if why := context.Cause(first.ctx); why != errCalledOff {
		t.Errorf("the first start was ended with %v", why)
	}
	if left, err := filepath.Glob(filepath.Join(first.dir, "*")); err != nil || len(left) > 0 {
		t.Errorf("left of the first start: %v %v", left, err)
	}
	if other.ctx.Err() != nil || second.ctx.Err() != nil {
		t.Error("another start was called off")
	}
}
