package vmm

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/cradlestack/cradlestack/driver-cradle/hostfile"
)

// Files in a run directory.
const (
	stateFile   = "vm.json"
	lockFile    = "vm.lock"
	consoleFile = "console.log"
	controlSock = "control.sock"
	qmpSock     = "qmp.sock"
	consoleSock = "console.sock"
)

// ErrNotRunning is what TakeUp returns where no machine lives.
var ErrNotRunning = errors.New("no machine is running")

// ErrIncomplete is what TakeUp returns, together with ErrNotRunning, for a machine whose start was not complete, and which it has ended, unless that had ended itself.
var ErrIncomplete = errors.New("its start was not complete")

// ErrAttended is what Start and TakeUp return where another process has the machine.
var ErrAttended = errors.New("another process attends to this machine")

const stateVersion = 1

// A state is what another process needs to take a machine up.
type state struct {
	Version   int           `json:"version"`
	BootID    string        `json:"bootId"`
	PID       int           `json:"pid"`
	StartTime uint64        `json:"startTime"` // clock ticks since boot
	Ready     bool          `json:"ready"`     // see Machine.Keep
	Info      Info          `json:"info"`
	Disks     map[int]Disk  `json:"disks,omitempty"`  // by LUN
	Places    int           `json:"places,omitempty"` // LUNs below are taken, be it by nothing
	IOUring   bool          `json:"ioUring,omitempty"`
	Virtiofs  *daemonHandle `json:"virtiofs,omitempty"`
	Group     string        `json:"group,omitempty"` // the cgroup without a way to the loopback interface that QEMU is in
}

type daemonHandle struct {
	PID       int    `json:"pid"`
	StartTime uint64 `json:"startTime"`
}

func readState(dir string) (*state, error) {
	f, err := os.Open(filepath.Join(dir, stateFile))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, ErrNotRunning
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var s state
	if err := json.NewDecoder(io.LimitReader(f, 4<<20)).Decode(&s); err != nil {
		return nil, fmt.Errorf("%s: %w", f.Name(), err)
	}
	if s.Version != stateVersion {
		return nil, fmt.Errorf("%s: version %d, this program reads version %d", f.Name(), s.Version, stateVersion)
	}
	return &s, nil
}

func (s *state) write(dir string) error {
	data, err := json.MarshalIndent(s, "", "  ")
	if err != nil {
		return err
	}
	return hostfile.Replace(filepath.Join(dir, stateFile), append(data, '\n'))
}

// lives opens the process that the state names, if it is still the same one.
func (s *state) lives() (*process, error) {
	boot, err := bootID()
	if err != nil {
		return nil, err
	}
	if s.BootID != boot {
		return nil, ErrNotRunning
	}
	return openProcess(s.PID, s.StartTime)
}

// attend makes this process the one that has the machine of a run directory, until the file is closed.
func attend(dir string) (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(dir, lockFile), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			err = fmt.Errorf("%s: %w", dir, ErrAttended)
		}
		return nil, err
	}
	return f, nil
}
