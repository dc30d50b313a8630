package driver

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cradlestack/cradlestack/driver-cradle/hostfile"
	"github.com/cradlestack/cradlestack/driver-cradle/image"
	"github.com/cradlestack/cradlestack/driver-cradle/pod"
	"github.com/cradlestack/cradlestack/spec"
)

// A state is the state directory, while this process is the one that attends to its tasks.
type state struct {
	dir    string
	log    *slog.Logger
	images *image.Store
	disks  *disks
	lock   *os.File
	found  []remnant // that earlier plugin processes have left
}

const (
	pluginLock = "plugin.lock"
	tasksDir   = "tasks"
	disksDir   = "disks"
	recordFile = "task.json"
	outputFile = "output"
	podDir     = "pod"
)

// openState waits for an earlier plugin process to end, or ends it: Nomad starts another one only where it has given that up.
func openState(ctx context.Context, c *config, log *slog.Logger) (*state, error) {
	for _, dir := range []string{c.StateDir, filepath.Join(c.StateDir, tasksDir), filepath.Join(c.StateDir, disksDir), filepath.Join(c.StateDir, spec.AnsweringDir)} {
		if err := os.MkdirAll(dir, 0o711); err != nil {
			return nil, fmt.Errorf("state_dir: %w", err)
		}
	}
	if err := os.MkdirAll(c.CacheDir, 0o755); err != nil {
		return nil, fmt.Errorf("cache_dir: %w", err)
	}
	images, err := image.Open(c.CacheDir)
	if err != nil {
		return nil, fmt.Errorf("cache_dir: %w", err)
	}
	lock, err := takeOver(ctx, filepath.Join(c.StateDir, pluginLock), log)
	if err != nil {
		return nil, fmt.Errorf("state_dir: %w", err)
	}
	s := &state{dir: c.StateDir, log: log, images: images, lock: lock}
	if s.disks, err = openDisks(filepath.Join(c.StateDir, disksDir)); err != nil {
		return nil, errors.Join(fmt.Errorf("state_dir: %w", err), lock.Close())
	}
	if s.found, err = s.remnants(); err != nil {
		return nil, errors.Join(fmt.Errorf("state_dir: %w", err), lock.Close())
	}
	return s, nil
}

func (s *state) close() error { return s.lock.Close() }

// answers tells who watches the directory that a task's pod answers, which Nomad's servers are told some tenths of a second later: a file comes and goes.
func (s *state) answers(rec *record) error {
	if rec.AllocID == "" {
		return nil
	}
	at := filepath.Join(s.dir, spec.AnsweringDir, nameOf(rec.AllocID+"."+rec.Name))
	if err := os.WriteFile(at, nil, 0o600); err != nil {
		return err
	}
	return os.Remove(at)
}

// An owner is who holds a state directory: a plugin process, and the Nomad client that has started it.
type owner struct {
	PID         int    `json:"pid"`
	Start       string `json:"start"` // field 22 of /proc/PID/stat
	Client      int    `json:"client"`
	ClientStart string `json:"clientStart"`
}

func self() owner {
	o := owner{PID: os.Getpid(), Client: os.Getppid()}
	o.Start, o.ClientStart = startOf(o.PID), startOf(o.Client)
	return o
}

// startOf is when a process began, in the kernel's ticks: with its number it says which one is meant. "" where there is none.
func startOf(pid int) string {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return ""
	}
	// The command in parentheses may hold anything (proc(5)).
	fields := strings.Fields(string(data[strings.LastIndexByte(string(data), ')')+1:]))
	if len(fields) < 20 || fields[0] == "Z" {
		return ""
	}
	return fields[19]
}

// takeOverLimit bounds how long an earlier plugin process may take to be gone.
const takeOverLimit = 20 * time.Second

// takeOver locks the state directory. A plugin process that lost its Nomad client, or whose client has started this one instead, is ended: all that
// it knows is on disk. One of another client that lives is left alone.
func takeOver(ctx context.Context, path string, log *slog.Logger) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	me := self()
	deadline := time.Now().Add(takeOverLimit)
	for {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			break
		}
		if !errors.Is(err, unix.EWOULDBLOCK) {
			f.Close()
			return nil, fmt.Errorf("lock %s: %w", path, err)
		}
		other, err := readOwner(f)
		if err == nil && other.Start != "" && startOf(other.PID) == other.Start {
			if other.Client != me.Client && startOf(other.Client) == other.ClientStart && other.ClientStart != "" {
				f.Close()
				return nil, fmt.Errorf("%s is in use by the Nomad client with process id %d: give each client a state_dir of its own", filepath.Dir(path), other.Client)
			}
			log.Warn("ending an earlier plugin process that Nomad has given up", "pid", other.PID)
			if err := end(other.PID, other.Start); err != nil {
				f.Close()
				return nil, err
			}
		}
		if time.Now().After(deadline) {
			f.Close()
			return nil, fmt.Errorf("another plugin process holds %s and does not end", path)
		}
		select {
		case <-time.After(20 * time.Millisecond):
		case <-ctx.Done():
			f.Close()
			return nil, context.Cause(ctx)
		}
	}
	data, err := json.Marshal(me)
	if err == nil {
		if err = f.Truncate(0); err == nil {
			_, err = f.WriteAt(data, 0)
		}
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

func readOwner(f *os.File) (owner, error) {
	var o owner
	data, err := io.ReadAll(io.NewSectionReader(f, 0, 4<<10))
	if err == nil {
		err = json.Unmarshal(data, &o)
	}
	return o, err
}

// end kills one process, and no other that has its number by now.
func end(pid int, start string) error {
	fd, err := unix.PidfdOpen(pid, 0)
	if errors.Is(err, unix.ESRCH) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("end process %d: %w", pid, err)
	}
	defer unix.Close(fd)
	if startOf(pid) != start {
		return nil
	}
	if err := unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("end process %d: %w", pid, err)
	}
	return nil
}

// A record is task.json.
type record struct {
	Version int       `json:"version"`
	ID      string    `json:"id"` // of the task, Nomad's
	AllocID string    `json:"allocId"`
	Name    string    `json:"name"`
	Stdout  string    `json:"stdout"` // named pipes
	Stderr  string    `json:"stderr"`
	Disk    string    `json:"disk,omitempty"` // its name, see disks
	Created time.Time `json:"created"`

	Attached []attachment `json:"attached,omitempty"`
}

const recordVersion = 1

// dirOf is the directory of a task. Its name tells people which task it is, and no two tasks have the same.
func (s *state) dirOf(taskID, name string) string {
	sum := sha256.Sum256([]byte(taskID))
	name = nameOf(name)
	return filepath.Join(s.dir, tasksDir, name[:min(len(name), 40)]+"-"+hex.EncodeToString(sum[:8]))
}

func (r *record) write(dir string) error {
	data, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	return hostfile.Replace(filepath.Join(dir, recordFile), append(data, '\n'))
}

func readRecord(dir string) (*record, error) {
	path := filepath.Join(dir, recordFile)
	data, err := hostfile.Read(path, 1<<20)
	if err != nil {
		return nil, err
	}
	var r record
	if err := json.Unmarshal(data, &r); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	if r.Version != recordVersion {
		return nil, fmt.Errorf("%s: version %d, this program reads version %d", path, r.Version, recordVersion)
	}
	return &r, nil
}

// A remnant is a task's directory on disk, whether or not anybody attends to it.
type remnant struct {
	dir    string
	record *record // nil where it can't be read
}

// delivered says whether the task's output was, or was about to be, delivered: its pipes have been opened then.
func (r *remnant) delivered() bool {
	_, err := os.Stat(filepath.Join(r.dir, outputFile))
	return err == nil
}

// remnants lists the directories of all tasks.
func (s *state) remnants() ([]remnant, error) {
	entries, err := os.ReadDir(filepath.Join(s.dir, tasksDir))
	if err != nil {
		return nil, err
	}
	var all []remnant
	for _, e := range entries {
		if !e.IsDir() {
			continue
		}
		r := remnant{dir: filepath.Join(s.dir, tasksDir, e.Name())}
		if r.record, err = readRecord(r.dir); err != nil {
			s.log.Debug("task directory without a record", "dir", r.dir, "error", err)
		}
		all = append(all, r)
	}
	return all, nil
}

// clear ends the pod of a task directory, if one runs, and removes everything.
func (s *state) clear(ctx context.Context, dir string) error {
	p, err := pod.Open(filepath.Join(dir, podDir), s.log)
	switch {
	case errors.Is(err, pod.ErrNoPod):
	case err != nil:
		return err
	default:
		if _, err := p.Kill(ctx); err != nil && !errors.Is(err, pod.ErrNotRunning) && !errors.Is(err, pod.ErrNotStarted) {
			return err
		}
		if err := p.Remove(); err != nil {
			return err
		}
	}
	if r, err := readRecord(dir); err == nil {
		if err := removeControls(r.Attached); err != nil {
			return err
		}
	}
	return os.RemoveAll(dir)
}

// bootID tells one boot of the host from another.
func bootID() string {
	data, _ := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return strings.TrimSpace(string(data))
}
