package stack

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cradlestack/cradlestack/internal/agents"
)

// A process is an agent in the background. Its number alone would mean another one some day.
type process struct {
	PID    int    `json:"pid"`
	Start  string `json:"start"` // field 22 of /proc/PID/stat
	Boot   string `json:"boot"`  // of the host
	Digest string `json:"digest"`
}

func (p process) alive() bool {
	return p.PID != 0 && p.Boot == bootID() && p.Start == startOf(p.PID)
}

// startOf is when a process began, in the kernel's ticks; "" where there is none that has not ended.
func startOf(pid int) string {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return ""
	}
	// The command in parentheses may hold anything (proc(5)).
	fields := strings.Fields(string(data[bytes.LastIndexByte(data, ')')+1:]))
	if len(fields) < 20 || fields[0] == "Z" {
		return ""
	}
	return fields[19]
}

func bootID() string {
	data, _ := os.ReadFile("/proc/sys/kernel/random/boot_id") // every Linux has it
	return strings.TrimSpace(string(data))
}

// end asks the process to end, and kills it where that takes too long.
func (p process) end(limit time.Duration) error {
	fd, err := unix.PidfdOpen(p.PID, 0)
	if errors.Is(err, unix.ESRCH) {
		return nil
	}
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if !p.alive() { // only now, with the process held, is it certain which one it is
		return nil
	}
	for _, signal := range []unix.Signal{unix.SIGINT, unix.SIGKILL} {
		if err := unix.PidfdSendSignal(fd, signal, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
			return err
		}
		for deadline := time.Now().Add(limit); ; {
			n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, int(max(0, time.Until(deadline)).Milliseconds()))
			if n > 0 {
				return nil
			}
			if err != nil && !errors.Is(err, unix.EINTR) {
				return err
			}
			if time.Now().After(deadline) {
				break
			}
		}
	}
	return fmt.Errorf("process %d does not end", p.PID)
}

// start starts a process that outlives us, with more variables in its environment than all have.
func (s *Stack) start(argv []string, log string, env ...string) (process, error) {
	cgroup, err := os.Open(s.cgroup())
	if err != nil {
		return process{}, err
	}
	defer cgroup.Close()
	out, err := os.OpenFile(log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return process{}, err
	}
	defer out.Close()
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.Stdout, cmd.Stderr = out, out
	cmd.Dir, cmd.Env = s.dir, append(agents.Environ(filepath.Join(s.dir, "tmp")), env...)
	cmd.SysProcAttr = &unix.SysProcAttr{Setsid: true, UseCgroupFD: true, CgroupFD: int(cgroup.Fd())}
	if err := cmd.Start(); err != nil {
		return process{}, err
	}
	p := process{PID: cmd.Process.Pid, Start: startOf(cmd.Process.Pid), Boot: bootID()}
	go cmd.Wait() // as long as we are its parent
	return p, nil
}

// unified is where version 2 of cgroups is mounted, beside version 1 or alone.
func unified() string {
	const beside = "/sys/fs/cgroup/unified"
	if _, err := os.Stat(filepath.Join(beside, "cgroup.procs")); err == nil {
		return beside
	}
	return "/sys/fs/cgroup"
}

// cgroup is the stack's. Its name is that of the bridge, which no other stack has.
func (s *Stack) cgroup() string { return filepath.Join(unified(), "cradlestack-"+s.record.Bridge) }
