package driver

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/hashicorp/nomad/plugins/drivers"
	"golang.org/x/sys/unix"

	"github.com/cradlestack/cradlestack/driver-cradle/hostfile"
	"github.com/cradlestack/cradlestack/driver-cradle/vmm"
	"github.com/cradlestack/cradlestack/spec"
)

// Nomad makes cgroups for every task: a driver puts the task's processes into them and sets the limits, and Nomad removes them in the end. Here the
// process is the pod's machine.

// cgroups are those of one task.
type cgroups struct {
	unified string            // version 2
	v1      map[string]string // version 1, by controller
}

// cgroupsOf finds a task's cgroups, none where Nomad manages none. What Nomad says is the directory of the task's cpuset: with version 2 that is all there
// is; with version 1 it is shared by all tasks that have no cores of their own, and the others have the task's name.
func cgroupsOf(t *drivers.TaskConfig) cgroups {
	var g cgroups
	if t.Resources == nil || t.Resources.LinuxResources == nil {
		return g
	}
	dir := t.Resources.LinuxResources.CpusetCgroupPath
	var st unix.Statfs_t
	if dir == "" || unix.Statfs(dir, &st) != nil {
		return g
	}
	if st.Type == unix.CGROUP2_SUPER_MAGIC {
		g.unified = dir
		return g
	}
	root, rest, ok := strings.Cut(dir, "/cpuset/")
	if !ok {
		return g
	}
	scope := t.AllocID + "." + t.Name
	parent := filepath.Dir(strings.TrimSuffix(rest, "/"+scope)) // without share or reserve
	g.v1 = map[string]string{"cpuset": dir}
	for _, controller := range []string{"freezer", "cpu", "memory"} {
		d := filepath.Join(root, controller, parent, scope)
		if fi, err := os.Stat(d); err == nil && fi.IsDir() {
			g.v1[controller] = d
		}
	}
	return g
}

// dirs are the cgroups of version 1.
func (g *cgroups) dirs() []string {
	var dirs []string
	for _, d := range g.v1 {
		dirs = append(dirs, d)
	}
	return dirs
}

// A setting is one file of a cgroup.
type setting struct {
	controller string // version 1
	v1, v2     string // names of the file, "" where the version has none
	v1Value    string
	v2Value    string
}

// limits are what a machine may take of the host. Its memory is bounded in the guest, where the task feels it; on the host, the bound is what the machine
// and QEMU around it take at most, so that it never hits a task that keeps within its own: it is there for a QEMU that a guest has taken over.
func limits(t *drivers.TaskConfig, machine, overhead spec.Bytes) []setting {
	r := t.Resources
	if r == nil || r.NomadResources == nil || r.LinuxResources == nil {
		return nil
	}
	hard := strconv.FormatInt(int64(machine+overhead), 10)
	reserved := machine + overhead
	if r.NomadResources.Memory.MemoryMaxMB > r.NomadResources.Memory.MemoryMB {
		reserved = spec.Bytes(r.NomadResources.Memory.MemoryMB) << 20
	}
	soft := strconv.FormatInt(int64(reserved), 10)
	all := []setting{
		{"memory", "memory.limit_in_bytes", "memory.max", hard, hard},
		{"memory", "memory.soft_limit_in_bytes", "memory.low", soft, soft},
	}
	if shares := r.LinuxResources.CPUShares; shares > 0 {
		shares = min(max(shares, 2), 262144)
		// runc's conversion: shares 2…262144 to weight 1…10000.
		all = append(all, setting{"cpu", "cpu.shares", "cpu.weight", strconv.FormatInt(shares, 10), strconv.FormatInt(1+(shares-2)*9999/262142, 10)})
	}
	if cpus := r.LinuxResources.CpusetCpus; cpus != "" {
		all = append(all, setting{"cpuset", "cpuset.cpus", "cpuset.cpus", cpus, cpus})
	}
	return all
}

// set sets limits.
func (g *cgroups) set(all []setting) error {
	for _, s := range all {
		path, value := filepath.Join(g.unified, s.v2), s.v2Value
		if g.unified == "" {
			dir, ok := g.v1[s.controller]
			if !ok {
				continue
			}
			path, value = filepath.Join(dir, s.v1), s.v1Value
		}
		err := os.WriteFile(path, []byte(value), 0)
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, fs.ErrPermission) {
			continue // the controller is not there, or not Nomad's to use
		}
		if err != nil {
			return fmt.Errorf("cgroup of the task: set %s to %s: %w", filepath.Base(path), value, err)
		}
	}
	return nil
}

// qemuOverhead is what QEMU takes beside the machine's memory at most: itself, buffers for disks and network, the page tables of the machine; and,
// where it emulates the processor, translated code, of which it keeps an eighth of the host's memory or 1 GiB (qemu accel/tcg/region.c,
// DEFAULT_CODE_GEN_BUFFER_SIZE).
func qemuOverhead(accel string, machine, host spec.Bytes) spec.Bytes {
	overhead := 192<<20 + machine/64
	if accel != vmm.KVM {
		overhead += min(1<<30, host/8)
	}
	return overhead
}

// hostMemory reads /proc/meminfo.
func hostMemory() spec.Bytes {
	data, err := hostfile.Read("/proc/meminfo", 64<<10)
	if err != nil {
		return 0
	}
	for line := range strings.Lines(string(data)) {
		if f := strings.Fields(line); len(f) > 1 && f[0] == "MemTotal:" {
			kib, _ := strconv.ParseInt(f[1], 10, 64)
			return spec.Bytes(kib) << 10
		}
	}
	return 0
}

// confine prepares the cgroups of a task for its machine.
func confine(t *drivers.TaskConfig, p *spec.Pod, c *config) (cgroups, error) {
	g := cgroupsOf(t)
	if g.unified == "" && g.v1 == nil {
		return g, nil
	}
	accel, _, err := vmm.Accelerator(c.Accelerator, c.CacheDir)
	if err != nil {
		return g, err
	}
	machine := vmm.MachineSize(p.Resources.Memory)
	return g, g.set(limits(t, machine, qemuOverhead(accel, machine, hostMemory())))
}
