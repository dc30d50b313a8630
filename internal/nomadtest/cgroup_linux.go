package nomadtest

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cradlestack/cradlestack/internal/cgroup"
)

// cgroups is where hosts mount them: one hierarchy (v2), or one per controller (v1) and usually v2 beside.
const cgroups = "/sys/fs/cgroup"

// A hierarchy is a mounted tree of cgroups.
type hierarchy struct {
	path    string // of its root
	v2      bool
	options string // for mounting it again: the controllers of v1
}

// hierarchies lists those that are mounted, in the order of mounting.
func hierarchies() ([]hierarchy, error) {
	mounts, err := mountsOf("self")
	if err != nil {
		return nil, err
	}
	var all []hierarchy
	for _, m := range mounts {
		if !strings.HasPrefix(m.point, cgroups) {
			continue
		}
		switch m.kind {
		case "cgroup2":
			all = append(all, hierarchy{path: m.point, v2: true})
		case "cgroup":
			var controllers []string
			for o := range strings.SplitSeq(m.super, ",") {
				if o != "rw" && o != "ro" && !strings.HasPrefix(o, "release_agent=") {
					controllers = append(controllers, o)
				}
			}
			all = append(all, hierarchy{path: m.point, options: strings.Join(controllers, ",")})
		}
	}
	if len(all) == 0 {
		return nil, fmt.Errorf("no cgroups are mounted below %s", cgroups)
	}
	return all, nil
}

// unified is the root of the v2 hierarchy.
func unified() (string, error) {
	all, err := hierarchies()
	if err != nil {
		return "", err
	}
	for _, h := range all {
		if h.v2 {
			return h.path, nil
		}
	}
	return "", errors.New("cgroup v2 is not mounted: mount -t cgroup2 none /sys/fs/cgroup/unified")
}

// needed are the controllers that Nomad wants to have.
var needed = []string{"cpuset", "cpu", "io", "memory", "pids"}

// makeCgroup makes a cgroup of this name in every hierarchy.
func makeCgroup(name string) error {
	all, err := hierarchies()
	if err != nil {
		return err
	}
	for _, h := range all {
		dir := filepath.Join(h.path, name)
		if err := os.Mkdir(dir, 0o755); err != nil {
			return err
		}
		if !h.v2 && strings.Contains(h.options, "cpuset") {
			// It begins with nothing, where no process can be.
			for _, file := range []string{"cpuset.cpus", "cpuset.mems"} {
				value, err := os.ReadFile(filepath.Join(filepath.Dir(dir), file))
				if err == nil {
					err = os.WriteFile(filepath.Join(dir, file), value, 0)
				}
				if err != nil {
					return err
				}
			}
		}
	}
	return nil
}

// handDown gives the cgroups in this one its controllers: what it does not hand down they don't have. Where v1 has the controllers, there are none. No process may be in
// it, unless it is the root of all.
func handDown(name string) error {
	all, err := hierarchies()
	if err != nil {
		return err
	}
	for _, h := range all {
		if !h.v2 {
			continue
		}
		dir := filepath.Join(h.path, name)
		controllers, err := os.ReadFile(filepath.Join(dir, "cgroup.controllers"))
		if err != nil {
			return err
		}
		for c := range strings.FieldsSeq(string(controllers)) {
			if !slices.Contains(needed, c) {
				continue
			}
			if err := os.WriteFile(filepath.Join(dir, "cgroup.subtree_control"), []byte("+"+c), 0); err != nil {
				return fmt.Errorf("hand controller %s of cgroup %s down: %w", c, name, err)
			}
		}
	}
	return nil
}

// joinCgroup takes this process into the cgroup.
func joinCgroup(name string) error {
	all, err := hierarchies()
	if err != nil {
		return err
	}
	for _, h := range all {
		if err := os.WriteFile(filepath.Join(h.path, name, "cgroup.procs"), []byte("0"), 0); err != nil {
			return err
		}
	}
	return nil
}

// killCgroup ends every process in a cgroup and below, and waits for that.
func killCgroup(name string) error {
	root, err := unified()
	if err != nil {
		return err
	}
	dir := filepath.Join(root, name)
	for begin := time.Now(); ; time.Sleep(10 * time.Millisecond) {
		err := os.WriteFile(filepath.Join(dir, "cgroup.kill"), []byte("1"), 0)
		var events []byte
		if err == nil {
			events, err = os.ReadFile(filepath.Join(dir, "cgroup.events"))
		}
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENODEV) { // who else sweeps has removed it
			return nil
		}
		if err != nil {
			return err
		}
		if strings.Contains(string(events), "populated 0") {
			return nil
		}
		if time.Since(begin) > time.Minute {
			return fmt.Errorf("processes of cgroup %s don't die: %v", name, cgroupProcesses(dir))
		}
	}
}

// cgroupProcesses are those in a cgroup and below; one that is being removed has none.
func cgroupProcesses(dir string) (pids []int) {
	text, _ := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
	for f := range strings.FieldsSeq(string(text)) {
		if pid, err := strconv.Atoi(f); err == nil {
			pids = append(pids, pid)
		}
	}
	below, _ := os.ReadDir(dir)
	for _, e := range below {
		if e.IsDir() {
			pids = append(pids, cgroupProcesses(filepath.Join(dir, e.Name()))...)
		}
	}
	return pids
}

// removeCgroup removes a cgroup with all below in every hierarchy.
func removeCgroup(name string) error {
	all, err := hierarchies()
	if err != nil {
		return err
	}
	for _, h := range all {
		if err := cgroup.RemoveTree(filepath.Join(h.path, name)); err != nil {
			return err
		}
	}
	return nil
}

// sweepDead removes what is left of clusters whose test and keeper were both killed.
func sweepDead() error {
	root, err := unified()
	if err != nil {
		return err
	}
	left, err := filepath.Glob(filepath.Join(root, "nt-*-*"))
	if err != nil {
		return err
	}
	for _, dir := range left {
		id := filepath.Base(dir)
		pid, err := strconv.Atoi(strings.Split(id, "-")[1])
		if err != nil || !errors.Is(unix.Kill(pid, 0), unix.ESRCH) {
			continue
		}
		if hasKeeper(id) {
			continue
		}
		if err := sweep(id, filepath.Join("/tmp", id)); err != nil {
			return err
		}
	}
	return nil
}

// hasKeeper says whether a cluster's keeper is alive and will see to it.
func hasKeeper(id string) bool {
	lines, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, line := range lines {
		if text, err := os.ReadFile(line); err == nil && strings.HasPrefix(string(text), keeperName+"\x00"+id+"\x00") {
			return true
		}
	}
	return false
}
