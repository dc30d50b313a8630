package vmm

import (
	"cmp"
	"encoding/json"
	"fmt"
	"hash/fnv"
	"io"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"syscall"

	"golang.org/x/sys/unix"
)

// A child is a confined process that this process has started and that waits for its go-ahead. A nil one is none.
type child struct {
	*process
	start uint64
	goes  *os.File // closed when the child has ended: as long as it is open, the child knows that this process lives
}

// goAhead lets the child become the program.
func (c *child) goAhead() error {
	if c == nil {
		return nil
	}
	_, err := c.goes.Write([]byte{1})
	return err
}

// abort ends the child before its go-ahead.
func (c *child) abort() {
	if c == nil {
		return
	}
	_ = c.kill() // a child of this process: it can
	c.file.Close()
}

// spawn executes this program again, in cgroup (nil: where this process is), as the confined program that c describes. files are
// inherited, numbered from 3.
func spawn(c *confinement, files []*os.File, cgroup *os.File, stderr io.Writer) (*child, error) {
	config, configEnd, err := os.Pipe()
	if err != nil {
		return nil, fmt.Errorf("start %s: %w", c.Path, err)
	}
	defer config.Close()
	defer configEnd.Close()
	goes, goesEnd, err := os.Pipe()
	if err != nil {
		return nil, fmt.Errorf("start %s: %w", c.Path, err)
	}
	defer goes.Close()

	cmd := &exec.Cmd{
		Path: "/proc/self/exe", Args: []string{confineName, strconv.Itoa(3 + len(files))}, Env: []string{"GOMAXPROCS=1"},
		ExtraFiles: append(files[:len(files):len(files)], config, goes), Stderr: stderr,
		SysProcAttr: &syscall.SysProcAttr{
			Setsid:     true, // a terminal's Ctrl-C is the launcher's
			Cloneflags: unix.CLONE_NEWNS | unix.CLONE_NEWPID | unix.CLONE_NEWIPC | unix.CLONE_NEWUTS | unix.CLONE_NEWCGROUP,
		},
	}
	if !c.Network {
		cmd.SysProcAttr.Cloneflags |= unix.CLONE_NEWNET
	}
	if cgroup != nil {
		cmd.SysProcAttr.UseCgroupFD, cmd.SysProcAttr.CgroupFD = true, int(cgroup.Fd())
	}
	p, start, err := run(cmd, goesEnd)
	if err != nil {
		return nil, fmt.Errorf("start %s: %w", c.Path, err)
	}
	ch := &child{p, start, goesEnd}
	if err := json.NewEncoder(configEnd).Encode(c); err != nil {
		ch.abort()
		return nil, fmt.Errorf("start %s: %w", c.Path, err)
	}
	return ch, nil
}

// run starts a command and sees to it that it is waited for, and leash closed then. The parent-death signal is sent when the thread that forked ends:
// this one lives as long as the child does.
func run(cmd *exec.Cmd, leash *os.File) (*process, uint64, error) {
	type result struct {
		p     *process
		start uint64
		err   error
	}
	started := make(chan result, 1)
	go func() {
		runtime.LockOSThread()
		defer leash.Close()
		if err := cmd.Start(); err != nil {
			started <- result{err: err}
			return
		}
		start, err := startTime(cmd.Process.Pid)
		var p *process
		if err == nil {
			p, err = openProcess(cmd.Process.Pid, start)
		}
		if err != nil {
			cmd.Process.Kill()
			started <- result{err: err}
			cmd.Wait()
			return
		}
		reaped := make(chan error, 1)
		p.reaped = reaped
		started <- result{p, start, nil}
		reaped <- cmd.Wait() // all of its stderr has been read by then
	}()
	r := <-started
	return r.p, r.start, r.err
}

// userOf is the user that a run directory's processes get, of those from first on; 0: the default.
func userOf(first int, dir string) int {
	h := fnv.New32a()
	h.Write([]byte(dir))
	return cmp.Or(first, DefaultFirstUID) + int(h.Sum32()&userMask)
}
