package driver

import (
	"maps"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/hashicorp/nomad/nomad/structs"
	"github.com/hashicorp/nomad/plugins/drivers"
)

func resources(memory, memoryMax, shares int64, cpuset string) *drivers.TaskConfig {
	return &drivers.TaskConfig{AllocID: "alloc", Name: "t", Resources: &drivers.Resources{
		NomadResources: &structs.AllocatedTaskResources{Memory: structs.AllocatedMemoryResources{MemoryMB: memory, MemoryMaxMB: memoryMax}},
		LinuxResources: &drivers.LinuxResources{CPUShares: shares, CpusetCpus: cpuset},
	}}
}

// What a machine may take of its host: all of its memory and QEMU's, which a task that keeps within its own never feels; its share of processors.
func TestLimits(t *testing.T) {
	for name, test := range map[string]struct {
		task   *drivers.TaskConfig
		v1, v2 map[string]string
	}{
		"small": {
			resources(64, 0, 100, ""),
			map[string]string{"memory.limit_in_bytes": "500", "memory.soft_limit_in_bytes": "500", "cpu.shares": "100"},
			map[string]string{"memory.max": "500", "memory.low": "500", "cpu.weight": "4"},
		},
		"oversubscribed": {
			resources(64, 128, 1024, "1,3"),
			map[string]string{"memory.limit_in_bytes": "500", "memory.soft_limit_in_bytes": "67108864", "cpu.shares": "1024", "cpuset.cpus": "1,3"},
			map[string]string{"memory.max": "500", "memory.low": "67108864", "cpu.weight": "39", "cpuset.cpus": "1,3"},
		},
		"most": {
			resources(64, 0, 1<<40, ""),
			map[string]string{"memory.limit_in_bytes": "500", "memory.soft_limit_in_bytes": "500", "cpu.shares": "262144"},
			map[string]string{"memory.max": "500", "memory.low": "500", "cpu.weight": "10000"},
		},
		"least": {
			resources(64, 0, 1, ""),
			map[string]string{"memory.limit_in_bytes": "500", "memory.soft_limit_in_bytes": "500", "cpu.shares": "2"},
			map[string]string{"memory.max": "500", "memory.low": "500", "cpu.weight": "1"},
		},
		"none": {&drivers.TaskConfig{}, map[string]string{}, map[string]string{}},
	} {
		all := limits(test.task, 400, 100)
		v1, v2 := map[string]string{}, map[string]string{}
		for _, s := range all {
			v1[s.v1], v2[s.v2] = s.v1Value, s.v2Value
		}
		if !maps.Equal(v1, test.v1) || !maps.Equal(v2, test.v2) {
			t.Errorf("%s: version 1 %v, want %v; version 2 %v, want %v", name, v1, test.v1, v2, test.v2)
		}
	}
}

// Limits go to the files that there are: a controller that is missing, or not delegated, is no error; a value that the kernel refuses is.
func TestLimitsAreSet(t *testing.T) {
	read := func(path string) string {
		data, _ := os.ReadFile(path)
		return string(data)
	}
	dir := t.TempDir()
	all := limits(resources(64, 0, 100, "0"), 400, 100)
	for _, file := range []string{"memory.max", "cpu.weight"} {
		if err := os.WriteFile(filepath.Join(dir, file), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	g := cgroups{unified: dir}
	// os.WriteFile makes files, which a cgroup's directory does not: it is as if all controllers were there.
	if err := g.set(all); err != nil {
		t.Fatal(err)
	}
	if read(filepath.Join(dir, "memory.max")) != "500" || read(filepath.Join(dir, "cpu.weight")) != "4" || read(filepath.Join(dir, "cpuset.cpus")) != "0" {
		t.Error("version 2 is not set")
	}
	memory := t.TempDir()
	g = cgroups{v1: map[string]string{"memory": memory}} // cpu and cpuset are not Nomad's
	if err := g.set(all); err != nil {
		t.Fatal(err)
	}
	if read(filepath.Join(memory, "memory.limit_in_bytes")) != "500" {
		t.Error("version 1 is not set")
	}
	g = cgroups{unified: filepath.Join(dir, "memory.max")}
	if err := g.set(all); err == nil || !strings.Contains(err.Error(), "cgroup of the task: set ") {
		t.Errorf("what can't be set: %v", err)
	}
}

func TestQEMUOverhead(t *testing.T) {
	const mib, gib = 1 << 20, 1 << 30
	if kvm, tcg := qemuOverhead("kvm", 256*mib, 16*gib), qemuOverhead("tcg", 256*mib, 16*gib); kvm != 196*mib || tcg != kvm+gib {
		t.Errorf("with KVM %v, emulated %v", kvm, tcg)
	}
	if small := qemuOverhead("tcg", 64*mib, 1*gib); small != 193*mib+128*mib {
		t.Errorf("emulated on a small host %v", small)
	}
}
