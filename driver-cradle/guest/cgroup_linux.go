package guest

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/cradlestack/cradlestack/spec"
)

// containerCgroup is the cgroup of the pod's n-th container. Its name is no id: the first one's is part of the template.
func containerCgroup(n int) string { return filepath.Join(podCgroup, "c"+strconv.Itoa(n)) }

// makeCgroup makes a container's cgroup with its limits.
func makeCgroup(dir string, l spec.Limits) error {
	if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	for _, s := range cgroupSettings(l) {
		if err := writeFile(filepath.Join(dir, s[0]), s[1]); err != nil {
			return err
		}
	}
	return nil
}

// cgroupSettings are docker's limits in cgroup v2's files.
func cgroupSettings(l spec.Limits) [][2]string {
	var out [][2]string
	if l.Memory > 0 {
		out = append(out, [2]string{"memory.max", strconv.FormatInt(int64(l.Memory), 10)})
	}
	if l.CPUs > 0 {
		const period = 100_000 // microseconds
		out = append(out, [2]string{"cpu.max", fmt.Sprintf("%d %d", max(int64(l.CPUs*period), 1000), period)})
	}
	if l.CPUShares > 0 {
		// runc's conversion: shares 2…262144 to weight 1…10000.
		shares := min(max(l.CPUShares, 2), 262144)
		out = append(out, [2]string{"cpu.weight", strconv.FormatUint(1+(shares-2)*9999/262142, 10)})
	}
	if l.Pids > 0 {
		out = append(out, [2]string{"pids.max", strconv.FormatInt(l.Pids, 10)})
	}
	return out
}

// limitPod gives the containers exactly the memory asked for, and keeps process numbers back for the agent.
func limitPod(r spec.Resources) error {
	memory := r.Memory
	if memory == 0 {
		memory = spec.DefaultMemory
	}
	if err := writeFile(podCgroup+"/memory.max", strconv.FormatInt(int64(memory), 10)); err != nil {
		return err
	}
	data, err := os.ReadFile("/proc/sys/kernel/threads-max")
	if err != nil {
		return err
	}
	threads, err := strconv.ParseInt(strings.TrimSpace(string(data)), 10, 64)
	if err != nil {
		return fmt.Errorf("threads-max: %w", err)
	}
	const reserve = 256
	return writeFile(podCgroup+"/pids.max", strconv.FormatInt(max(threads-reserve, reserve), 10))
}

// cgroupValue reads one number of a cgroup's flat-keyed file, such as oom_kill of memory.events; 0 where it is not.
func cgroupValue(dir, file, key string) uint64 {
	data, err := os.ReadFile(filepath.Join(dir, file))
	if err != nil {
		return 0
	}
	for line := range strings.Lines(string(data)) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), " ")
		if key == "" {
			value = name
		}
		if name == key || key == "" {
			n, _ := strconv.ParseUint(value, 10, 64)
			return n
		}
	}
	return 0
}

// cgroupPids lists the processes of a cgroup and of those that the container made below it.
func cgroupPids(dir string) ([]int, error) {
	var pids []int
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.Name() != "cgroup.procs" {
			return nil
		}
		data, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		for line := range strings.FieldsSeq(string(data)) {
			if pid, err := strconv.Atoi(line); err == nil && pid > 0 {
				pids = append(pids, pid)
			}
		}
		return nil
	})
	return pids, err
}

// clearCgroup removes what a container made inside its cgroup, so that its next start finds it as the first did.
func clearCgroup(dir string) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return
	}
	for _, e := range entries {
		if e.IsDir() {
			sub := filepath.Join(dir, e.Name())
			clearCgroup(sub)
			_ = unix.Rmdir(sub)
		}
	}
}
