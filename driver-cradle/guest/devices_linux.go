package guest

import "golang.org/x/sys/unix"

// limitDevices lets the processes of a cgroup use only what the rules allow. A cgroup below it may have rules of its own instead.
func limitDevices(cgroup string, rules []deviceRule) error {
	return attachProgram(cgroup, unix.BPF_PROG_TYPE_CGROUP_DEVICE, unix.BPF_CGROUP_DEVICE, deviceProgram(rules))
}

// deviceRules are a container's own, nil where it has docker's default.
func (c *Container) deviceRules() []deviceRule {
	s := c.spec
	if s.Privileged {
		return []deviceRule{{unix.BPF_DEVCG_DEV_CHAR, -1, -1, allAccess}, {unix.BPF_DEVCG_DEV_BLOCK, -1, -1, allAccess}}
	}
	var own []deviceRule
	for _, d := range s.Devices {
		if d == "all" {
			return []deviceRule{{unix.BPF_DEVCG_DEV_CHAR, -1, -1, allAccess}, {unix.BPF_DEVCG_DEV_BLOCK, -1, -1, allAccess}}
		}
		if r, ok := ruleOf(d); ok {
			own = append(own, r)
		}
	}
	for _, n := range c.nodes {
		own = append(own, deviceRule{unix.BPF_DEVCG_DEV_BLOCK, int64(unix.Major(n.Dev)), int64(unix.Minor(n.Dev)), allAccess})
	}
	if own == nil {
		return nil
	}
	return append(own, defaultDevices...)
}

// ruleOf lets a device of the guest be used, docker's HOST[:CONTAINER[:rwm]]. One that is not there is the stage's to report.
func ruleOf(device string) (deviceRule, bool) {
	path, _, access := splitDevice(device)
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return deviceRule{}, false
	}
	r := deviceRule{unix.BPF_DEVCG_DEV_CHAR, int64(unix.Major(st.Rdev)), int64(unix.Minor(st.Rdev)), access}
	if st.Mode&unix.S_IFMT == unix.S_IFBLK {
		r.kind = unix.BPF_DEVCG_DEV_BLOCK
	}
	return r, true
}
