//go:build vm

package driver

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/hashicorp/nomad/plugins/drivers"
	"golang.org/x/sys/unix"
)

// A task's machine is in the cgroups that Nomad has made for the task, of version 2 and of version 1, wherever they are mounted.
func TestVMCgroups(t *testing.T) {
	v2, v1 := "/sys/fs/cgroup", ""
	if _, err := os.Stat("/sys/fs/cgroup/unified/cgroup.procs"); err == nil {
		v2, v1 = "/sys/fs/cgroup/unified", "/sys/fs/cgroup"
	}
	name := fmt.Sprintf("driver-test-%d", os.Getpid())
	make := func(t *testing.T, dirs ...string) {
		for _, dir := range dirs {
			if err := os.Mkdir(dir, 0o755); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { // the machine is gone, so it can be removed
				if err := unix.Rmdir(dir); err != nil {
					t.Errorf("rmdir %s: %v", dir, err)
				}
			})
		}
	}
	// A machine whose network is the host's has a cgroup of its own below, where the host's loopback is not to be had.
	within := func(dir string) (machines int) {
		t.Helper()
		err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
			if errors.Is(err, fs.ErrNotExist) { // it has just been removed
				return nil
			}
			if err != nil || e.Name() != "cgroup.procs" {
				return err
			}
			data, err := os.ReadFile(path)
			if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENODEV) {
				return nil
			}
			for pid := range strings.FieldsSeq(string(data)) {
				if exe, err := os.Readlink("/proc/" + pid + "/exe"); err == nil && strings.HasPrefix(filepath.Base(exe), "qemu-system") {
					machines++
				}
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		return machines
	}
	t.Run("version 2", func(t *testing.T) {
		dir := filepath.Join(v2, name)
		make(t, dir)
		c := newClient(t, nil)
		task := c.task("sleep 1000", func(t *drivers.TaskConfig, _ *taskConfig) { t.Resources.LinuxResources.CpusetCgroupPath = dir })
		c.start(task)
		if n := within(dir); n != 1 {
			t.Errorf("the cgroup has %d machines", n)
		}
		if limit, err := os.ReadFile(filepath.Join(dir, "memory.max")); err == nil { // where version 2 has the controller
			checkLimit(t, string(limit))
		}
		if err := c.driver.DestroyTask(task.ID, true); err != nil {
			t.Fatal(err)
		}
		if n := within(dir); n != 0 {
			t.Errorf("after the task's end the cgroup has %d machines", n)
		}
	})
	t.Run("version 1", func(t *testing.T) {
		if v1 == "" {
			t.Log("this host has version 2 alone") // there is nothing to be in
			return
		}
		c := newClient(t, nil)
		var scope string
		cpuset := filepath.Join(v1, "cpuset", name)
		make(t, cpuset, filepath.Join(cpuset, "share"))
		for _, dir := range []string{cpuset, filepath.Join(cpuset, "share")} {
			for _, file := range []string{"cpuset.cpus", "cpuset.mems"} {
				value, err := os.ReadFile(filepath.Join(filepath.Dir(dir), file))
				if err == nil {
					err = os.WriteFile(filepath.Join(dir, file), value, 0)
				}
				if err != nil {
					t.Fatal(err)
				}
			}
		}
		task := c.task("sleep 1000", func(t *drivers.TaskConfig, _ *taskConfig) {
			t.Resources.LinuxResources.CpusetCgroupPath = filepath.Join(cpuset, "share")
			t.Resources.LinuxResources.CPUShares = 100
			scope = t.AllocID + "." + t.Name
		})
		dirs := map[string]string{}
		for _, controller := range []string{"freezer", "cpu", "memory"} {
			dirs[controller] = filepath.Join(v1, controller, name, scope)
			make(t, filepath.Dir(dirs[controller]), dirs[controller])
		}
		c.start(task)
		dirs["cpuset"] = filepath.Join(cpuset, "share")
		for controller, dir := range dirs {
			if n := within(dir); n != 1 {
				t.Errorf("the cgroup of %s has %d machines", controller, n)
			}
		}
		limit, err := os.ReadFile(filepath.Join(dirs["memory"], "memory.limit_in_bytes"))
		if err != nil {
			t.Fatal(err)
		}
		checkLimit(t, string(limit))
		if shares, err := os.ReadFile(filepath.Join(dirs["cpu"], "cpu.shares")); err != nil || string(shares) != "100\n" {
			t.Errorf("cpu.shares is %q, %v", shares, err)
		}
		if err := c.driver.DestroyTask(task.ID, true); err != nil {
			t.Fatal(err)
		}
		for controller, dir := range dirs {
			if n := within(dir); n != 0 {
				t.Errorf("after the task's end the cgroup of %s has %d machines", controller, n)
			}
		}
	})
}

// A kernel with all controllers in version 2 takes every limit as it is written. Many a host that tests has them in version 1; a guest has not.
func TestVMCgroupLimitsOfVersion2(t *testing.T) {
	script, want := `set -e
		cd /sys/fs/cgroup
		mkdir own task
		echo $$ >own/cgroup.procs
		echo +cpu +cpuset +memory >cgroup.subtree_control
	`, ""
	for _, s := range limits(resources(64, 128, 100, "0"), 256<<20, 192<<20) {
		script += fmt.Sprintf("echo %s >task/%s; cat task/%[2]s\n", s.v2Value, s.v2)
		want += s.v2Value + "\n"
	}
	c := newClient(t, nil)
	task := c.task(script, func(_ *drivers.TaskConfig, cfg *taskConfig) { cfg.Privileged = true })
	c.start(task)
	c.wait(task)
	c.logs(task, "stdout", want)
	c.logs(task, "stderr", "")
	if strings.Count(want, "\n") != 4 {
		t.Errorf("there are other limits than memory's two, the weight and the processors: %q", want)
	}
}

// checkLimit checks the bound on a machine of 64 MiB: above what it takes in all, and not without end.
func checkLimit(t *testing.T, text string) {
	t.Helper()
	limit, err := strconv.ParseInt(strings.TrimSpace(text), 10, 64)
	if err != nil || limit < 256<<20 || limit > 4<<30 {
		t.Errorf("the limit is %q", text)
	}
}
