package vmm

import "context"

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

// Kill ends the machine of a run directory at once, whoever attends to it. It returns when QEMU has ended.
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
	return p.wait()
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
