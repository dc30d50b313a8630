package vmm

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"github.com/cradlestack/cradlestack/driver-cradle/hostfile"
)

// takeUpTimeout bounds QEMU's answer to a new process: one that hangs is no machine any more.
const takeUpTimeout = 20 * time.Second

// endingTimeout is how long a machine that can't be taken up may need to be gone.
const endingTimeout = 2 * time.Second

// TakeUp attends to the machine that an earlier process has started in runDir. Where none lives it returns ErrNotRunning, together
// with a *PanicError if the guest's kernel panicked meanwhile; where another process attends to it, ErrAttended. A machine that was
// not kept is ended, if it has not by itself: ErrIncomplete.
func TakeUp(ctx context.Context, runDir string) (*Machine, error) {
	runDir, err := filepath.Abs(runDir)
	if err != nil {
		return nil, fmt.Errorf("take up machine: %w", err)
	}
	m, err := takeUp(ctx, runDir)
	if err != nil {
		return nil, fmt.Errorf("take up machine %s: %w", runDir, err)
	}
	return m, nil
}

func takeUp(ctx context.Context, dir string) (_ *Machine, err error) {
	if _, err := readState(dir); err != nil {
		if errors.Is(err, ErrNotRunning) {
			err = errors.Join(err, sweepUnstarted(dir))
		}
		return nil, err
	}
	m := &Machine{log: slog.New(slog.DiscardHandler)}
	m.init(dir)
	if err := m.open(); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, m.root.Close(), hostfile.Unlock(m.lock))
		}
	}()
	s, err := readState(dir) // again: the process that had the machine may have ended it just now
	if err != nil {
		return nil, err
	}
	m.state = *s
	if m.state.Disks == nil {
		m.state.Disks = map[int]Disk{}
	}
	m.process, err = s.lives()
	if errors.Is(err, ErrNotRunning) {
		if !s.Ready { // it has ended with the process that started it
			err = errors.Join(err, ErrIncomplete)
		}
		return nil, errors.Join(err, m.remains())
	}
	if err != nil {
		return nil, err
	}
	if !s.Ready {
		err := m.process.kill()
		if err == nil {
			err = m.process.wait()
		}
		m.process.file.Close()
		return nil, errors.Join(ErrNotRunning, ErrIncomplete, err, m.remains())
	}
	if err = m.connect(ctx); err != nil {
		// Its end may have begun while it was still to be seen: a launcher's death takes a moment to reach it.
		if m.process.endsWithin(endingTimeout) {
			m.process.file.Close()
			return nil, errors.Join(ErrNotRunning, m.remains())
		}
		return nil, errors.Join(err, m.process.file.Close())
	}
	go m.watch()
	return m, nil
}

// connect opens the machine's monitor and console.
func (m *Machine) connect(ctx context.Context) error {
	monitor, err := dialUnix(m.root, qmpSock)
	if err != nil {
		return err
	}
	conn, err := dialUnix(m.root, consoleSock)
	if err != nil {
		return errors.Join(err, monitor.Close())
	}
	if m.console, err = newConsole(m.dir, conn); err != nil {
		return errors.Join(err, monitor.Close())
	}
	if d := m.state.Virtiofs; d != nil {
		// One that has died is the guest's to notice.
		if m.daemon, err = openProcess(d.PID, d.StartTime); err != nil {
			m.daemon = nil
		}
	}
	m.monitor = newMonitor(monitor, m.onEvent)
	ctx, cancel := context.WithTimeoutCause(ctx, takeUpTimeout, errors.New("QEMU does not answer"))
	defer cancel()
	if err := m.QMP(ctx, "qmp_capabilities", nil, nil); err != nil {
		m.monitor.close()
		m.console.close()
		return err
	}
	return nil
}

// remains clears away what a machine that has ended unattended left, and tells about its end.
func (m *Machine) remains() error {
	m.endDaemon()
	m.sweep()
	data, err := hostfile.Read(via(m.root, consoleFile), maxConsole)
	if err != nil {
		return ignoreNotExist(err)
	}
	if p := findPanic(string(data)); p != nil {
		return p
	}
	return nil
}

// sweepUnstarted removes what a process has left that was killed before its machine was there.
func sweepUnstarted(dir string) error {
	root, err := os.Open(dir)
	if err != nil {
		return ignoreNotExist(err)
	}
	defer root.Close()
	lock, err := attend(dir)
	if errors.Is(err, ErrAttended) {
		return nil // it is just starting
	}
	if err != nil {
		return err
	}
	if _, err := readState(dir); errors.Is(err, ErrNotRunning) {
		removeRun(root)
	}
	return hostfile.Unlock(lock)
}

// endDaemon ends a virtiofs daemon that outlived its machine.
func (m *Machine) endDaemon() {
	if d := m.state.Virtiofs; d != nil {
		if p, err := openProcess(d.PID, d.StartTime); err == nil {
			_ = p.kill() // it may have ended with QEMU
			p.file.Close()
		}
	}
}

// open attends to the run directory.
func (m *Machine) open() (err error) {
	if m.lock, err = attend(m.dir); err != nil {
		return err
	}
	if m.root, err = os.Open(m.dir); err != nil {
		return errors.Join(err, hostfile.Unlock(m.lock))
	}
	return nil
}
