package vmm

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/cradlestack/cradlestack/driver-cradle/hostfile"
)

// Running returns the process id of the machine of a run directory, ErrNotRunning where none lives. It does not take the machine up.
func Running(runDir string) (pid int, err error) {
	s, err := readState(runDir)
	if err != nil {
		return 0, err
	}
	p, err := s.lives()
	if err != nil {
		return 0, err
	}
	return s.PID, p.file.Close()
}

// Kill ends the machine of a run directory at once, whoever attends to it, and returns when QEMU has ended. It asks nothing of QEMU
// or the guest: the process that the directory names by its id and start time gets SIGKILL, so it ends machines that hang as well, and
// those whose start is not completed. Where none lives it returns ErrNotRunning. What is left of the machine is cleared away by the
// process that attends to it, here if there is none.
func Kill(runDir string) error {
	s, err := readState(runDir)
	if err != nil {
		return err
	}
	p, err := s.lives()
	if err != nil {
		return err
	}
	defer p.file.Close()
	if err := p.kill(); err != nil {
		return err
	}
	if err := p.file.SetReadDeadline(time.Now().Add(killTimeout)); err != nil {
		return fmt.Errorf("wait for process %d: %w", s.PID, err)
	}
	if err := p.wait(); errors.Is(err, os.ErrDeadlineExceeded) {
		return fmt.Errorf("process %d was killed and has not ended within %v: it waits in the kernel, look for storage that hangs", s.PID, killTimeout)
	} else if err != nil {
		return fmt.Errorf("wait for process %d: %w", s.PID, err)
	}
	return s.bury(runDir)
}

// EndIncomplete ends the machine of a run directory if it was not kept and the process that has started it is gone: nobody can take it up.
func EndIncomplete(runDir string) error {
	s, err := readState(runDir)
	if errors.Is(err, ErrNotRunning) || err == nil && s.Ready {
		return nil
	}
	if err != nil {
		return err
	}
	lock, err := attend(runDir)
	if errors.Is(err, ErrAttended) {
		return nil
	}
	if err != nil {
		return err
	}
	hostfile.Unlock(lock)
	if err := Kill(runDir); !errors.Is(err, ErrNotRunning) {
		return err
	}
	return nil
}

// killTimeout bounds the time from SIGKILL to the process's end.
const killTimeout = 30 * time.Second

// bury clears away what the machine left, which has ended, unless a process attends to the directory or another machine is there by now.
func (s *state) bury(dir string) error {
	m := &Machine{dir: dir, state: *s}
	if err := m.open(); errors.Is(err, ErrAttended) {
		return nil
	} else if err != nil {
		return err
	}
	if now, err := readState(dir); err == nil && now.PID == s.PID && now.StartTime == s.StartTime {
		m.endDaemon()
		m.sweep()
	}
	return errors.Join(m.root.Close(), hostfile.Unlock(m.lock))
}

// ReadInfo tells how the machine of a run directory was started, whoever attends to it.
func ReadInfo(runDir string) (*Info, error) {
	s, err := readState(runDir)
	if err != nil {
		return nil, err
	}
	return &s.Info, nil
}

// FindQEMU tells which QEMU starts machines, and its version. The answer is kept in the cache directory.
func FindQEMU(ctx context.Context, cacheDir string) (path, version string, err error) {
	q, err := findQEMU(ctx, cacheDir)
	if err != nil {
		return "", "", err
	}
	return q.path, q.version, nil
}

// Accelerator tells what a machine that asks for accel (Auto, KVM, TCG) gets, and why.
func Accelerator(accel, cacheDir string) (got, why string, err error) {
	return (&Config{Accel: accel, CacheDir: cacheDir}).accelerator()
}
