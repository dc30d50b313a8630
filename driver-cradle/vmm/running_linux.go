package vmm

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
