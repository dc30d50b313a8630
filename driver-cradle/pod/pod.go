// Package pod makes, starts, takes up and ends pods. A pod is a directory that holds everything one microVM needs:
//
//	launch.json    the Launch: what the guest executes; made to be read and edited
//	cradle         link to the boot package
//	layers/N.ext4  links to the images' layers in the shared cache
//	scratch.img    the writable disk: container layers, anonymous volumes, logs; grows as it is used
//	vdocker.sock   while it runs: docker's API for the containers
//	run/           of the present or the last run: the machine's state and console, the status at the end, the containers' logs
//
// Everything is private to the owner. The process that has started a pod or taken it up attends to it: it answers on vdocker.sock,
// waits for the end, and brings status and logs home. It may be killed at any time; a pod that was started detached goes on and the next one takes
// it up.
//
// pod imports spec, wire, boot, image, network and vmm, and never Nomad: kcradle and the Nomad driver both use it.
package pod

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cradlestack/cradlestack/driver-cradle/hostfile"
	"github.com/cradlestack/cradlestack/driver-cradle/vmm"
	"github.com/cradlestack/cradlestack/driver-cradle/wire"
	"github.com/cradlestack/cradlestack/spec"
)

// Names in a pod directory.
const (
	LaunchFile = "launch.json"
	BootLink   = "cradle"
	SocketFile = "vdocker.sock"

	layersDir    = "layers"
	scratchFile  = "scratch.img"
	runDir       = "run"
	lockFile     = "pod.lock"
	statusFile   = "status.json"
	launchedFile = "launch.json" // in runDir: what the run was started with
	killedFile   = "killed"      // in runDir: the name of the run that is to end, or was ended, on purpose
	detachedFile = "detached"    // in runDir: the run's machine goes on without its attendant
	fillingFile  = "filling"     // in runDir: how far the start is with copying an image's content into a volume
	logsDir      = "logs"
)

// What is asked of a pod in the wrong moment fails with one of these, for errors.Is.
var (
	ErrNoPod      = errors.New("no pod directory")
	ErrRunning    = errors.New("pod is running")
	ErrNotRunning = errors.New("pod is not running")
	ErrNotStarted = errors.New("pod has not run yet")
	ErrUnsettled  = errors.New("pod starts or ends")
)

// A RunningError is an ErrRunning that knows who attends to the pod.
type RunningError struct {
	Dir string
	PID int // of the attending process; 0 where that has died and the machine goes on
}

func (e *RunningError) Error() string {
	if e.PID == 0 {
		return fmt.Sprintf("%s is running, attended by nobody: kcradle status %[1]s takes it up, kcradle stop %[1]s ends it", e.Dir)
	}
	return fmt.Sprintf("%s is running (attended by process %d): kcradle stop %[1]s ends it", e.Dir, e.PID)
}

// Is makes it an ErrRunning.
func (e *RunningError) Is(target error) bool { return target == ErrRunning }

// A Dir is a pod directory.
type Dir struct {
	path string
	log  *slog.Logger
}

// Open returns the pod directory at path. log may be nil.
func Open(path string, log *slog.Logger) (*Dir, error) {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	path, err := filepath.Abs(path)
	if err != nil {
		return nil, err
	}
	if _, err := os.Stat(filepath.Join(path, LaunchFile)); errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%s: %w (it has no %s): make one with kcradle summon %s IMAGE", path, ErrNoPod, LaunchFile, path)
	} else if err != nil {
		return nil, err
	}
	return &Dir{path, log}, nil
}

// Path is absolute.
func (d *Dir) Path() string { return d.path }

func (d *Dir) join(elem ...string) string { return filepath.Join(append([]string{d.path}, elem...)...) }

// BootPackage is the path of the boot package.
func (d *Dir) BootPackage() string { return d.join(BootLink) }

// Machine tells about the machine of a pod that runs.
func (d *Dir) Machine() (*vmm.Info, error) { return vmm.ReadInfo(d.join(runDir)) }

// Launch reads and validates launch.json.
func (d *Dir) Launch() (*spec.Launch, error) {
	data, err := hostfile.Read(d.join(LaunchFile), spec.MaxDocument)
	if err != nil {
		return nil, err
	}
	return spec.ParseLaunch(d.join(LaunchFile), data)
}

// A Report is what is known of a pod's last run after its end.
type Report struct {
	Version   int         `json:"version"`
	StartedAt time.Time   `json:"startedAt"`
	EndedAt   time.Time   `json:"endedAt"`
	Status    wire.Status `json:"status"`
	// Failure says why the machine ended before the pod: a guest's panic, QEMU killed. The status is then what was last known.
	Failure string   `json:"failure,omitempty"`
	Machine vmm.Info `json:"machine"`
}

const reportVersion = 1

// Report returns that of the last run: ErrRunning before its end, ErrNotStarted before the first.
func (d *Dir) Report() (*Report, error) {
	r, err := d.readReport()
	if !errors.Is(err, fs.ErrNotExist) {
		return r, err
	}
	if running, err := d.Running(); err != nil || running {
		return nil, errors.Join(err, fmt.Errorf("%s: %w", d.path, ErrRunning))
	}
	if _, err := os.Stat(d.join(runDir, launchedFile)); err == nil {
		// It was started, and its machine has ended while nobody attended to it: whoever takes it up reports that.
		up, err := d.TakeUp(context.Background(), TakeUpOptions{})
		if err == nil {
			return nil, errors.Join(fmt.Errorf("%s: %w", d.path, ErrRunning), up.Detach())
		}
		if !errors.Is(err, ErrNotRunning) {
			return nil, err
		}
	}
	if r, err = d.readReport(); errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%s: %w", d.path, ErrNotStarted)
	}
	return r, err
}

func (d *Dir) readReport() (*Report, error) {
	path := d.join(runDir, statusFile)
	data, err := hostfile.Read(path, 16<<20)
	if err != nil {
		return nil, err
	}
	var r Report
	if err := json.Unmarshal(data, &r); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	if r.Version != reportVersion {
		return nil, fmt.Errorf("%s: version %d, this program reads version %d", path, r.Version, reportVersion)
	}
	return &r, nil
}

// Running says whether a process attends to the pod, or its machine lives on without one.
func (d *Dir) Running() (bool, error) {
	pid, err := d.Attendant()
	if err != nil || pid != 0 {
		return pid != 0, err
	}
	return d.machineAlive()
}

func (d *Dir) machineAlive() (bool, error) {
	_, err := vmm.Running(d.join(runDir))
	if errors.Is(err, vmm.ErrNotRunning) {
		return false, nil
	}
	return err == nil, err
}

// Attendant is the id of the process that attends to the pod, 0 where none does, -1 where it has not said yet.
func (d *Dir) Attendant() (pid int, err error) {
	f, err := os.OpenFile(d.join(runDir, lockFile), os.O_RDONLY, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return 0, nil
	}
	if err != nil {
		return 0, err
	}
	defer hostfile.Unlock(f)
	switch err := unix.Flock(int(f.Fd()), unix.LOCK_SH|unix.LOCK_NB); {
	case err == nil:
		return 0, nil
	case !errors.Is(err, unix.EWOULDBLOCK):
		return 0, fmt.Errorf("lock %s: %w", f.Name(), err)
	}
	if pid, _ = readLock(f); pid <= 0 {
		pid = -1
	}
	return pid, nil
}

// The lock's file says who has it, and names the run: whoever asks for a run's end says which one he means. It is written in one step.
const lockFormat = "%10d %s\n"

func readLock(f *os.File) (pid int, run string) {
	var text [64]byte
	n, _ := f.ReadAt(text[:], 0) // a file that says nothing is one of somebody who has only just begun
	_, _ = fmt.Sscanf(string(text[:n]), "%d %s", &pid, &run)
	return pid, run
}

// run is the name of the pod's present or last run, "" where it has none.
func (d *Dir) run() string {
	f, err := os.Open(d.join(runDir, lockFile))
	if err != nil {
		return ""
	}
	defer f.Close()
	_, run := readLock(f)
	return run
}

// attend makes this process the pod's attendant until the file is closed.
func (d *Dir) attend() (*os.File, error) {
	f, err := d.lock()
	if err != nil {
		return nil, err
	}
	_, run := readLock(f)
	return signed(f, run)
}

// signed writes into the lock's file that this process has it for that run.
func signed(f *os.File, run string) (*os.File, error) {
	text := fmt.Appendf(nil, lockFormat, os.Getpid(), run)
	_, err := f.WriteAt(text, 0)
	if err == nil {
		err = f.Truncate(int64(len(text)))
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

func (d *Dir) lock() (*os.File, error) {
	if err := os.MkdirAll(d.join(runDir), 0o700); err != nil {
		return nil, err
	}
	f, err := os.OpenFile(d.join(runDir, lockFile), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	// Whoever only looks has it for a moment.
	for range 50 {
		if err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); !errors.Is(err, unix.EWOULDBLOCK) {
			break
		}
		if pid, perr := d.Attendant(); perr == nil && pid != 0 && pid != -1 {
			f.Close()
			return nil, &RunningError{d.path, pid}
		}
		time.Sleep(time.Millisecond)
	}
	if errors.Is(err, unix.EWOULDBLOCK) {
		err = &RunningError{d.path, -1}
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

func writeJSON(path string, v any) error {
	data, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return err
	}
	return hostfile.Replace(path, append(data, '\n'))
}
