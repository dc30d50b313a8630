package vmm

import (
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"syscall"
)

// A child is a QEMU process that this process has started and that waits for its go-ahead.
type child struct {
	*process
	start uint64
	goes  *os.File
}

func (c *child) goAhead() { c.goes.Close() }

func (c *child) abort() {
	c.kill()
	c.goes.Close()
	c.file.Close()
}

// spawn starts a program. With leashed, it dies with this process.
func spawn(path string, args []string, files []*os.File, stderr io.Writer, leashed bool) (*child, error) {
	type result struct {
		child *child
		err   error
	}
	started := make(chan result)
	go func() {
		// The parent-death signal is sent when the thread that forked ends: it is this goroutine's, up to the child's end.
		runtime.LockOSThread()
		cmd := exec.Command(path, args...)
		cmd.ExtraFiles = files
		cmd.Stderr = stderr
		cmd.SysProcAttr = &syscall.SysProcAttr{}
		if leashed {
			cmd.SysProcAttr.Pdeathsig = syscall.SIGKILL
		}
		if err := cmd.Start(); err != nil {
			started <- result{err: err}
			return
		}
		st, err := startTime(cmd.Process.Pid)
		var p *process
		if err == nil {
			p, err = openProcess(cmd.Process.Pid, st)
		}
		if err != nil {
			cmd.Process.Kill()
			cmd.Wait()
			started <- result{err: fmt.Errorf("start %s: %w", path, err)}
			return
		}
		r, _, _ := os.Pipe()
		started <- result{child: &child{p, st, r}}
		cmd.Wait() // its status says nothing that the monitor, stderr and the console don't say better
	}()
	r := <-started
	return r.child, r.err
}
