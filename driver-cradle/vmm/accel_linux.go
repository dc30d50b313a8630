package vmm

func (c *Config) accelerator() (accel, why string, err error) { return TCG, "", nil }

func hostCPU() (string, error) { return "", nil }
