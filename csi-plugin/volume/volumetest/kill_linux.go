package volumetest

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"syscall"

	"golang.org/x/sys/unix"
)

// steps are the system calls that change something outside the process: in between, a kill makes no difference.
var steps = map[uint64]bool{
	unix.SYS_OPENAT: true, // that creates; see isStep
	unix.SYS_WRITE:  true, unix.SYS_PWRITE64: true, unix.SYS_COPY_FILE_RANGE: true, unix.SYS_SENDFILE: true, unix.SYS_SPLICE: true,
	unix.SYS_FTRUNCATE: true, unix.SYS_FALLOCATE: true, unix.SYS_FSYNC: true, unix.SYS_FDATASYNC: true, unix.SYS_SYNCFS: true,
	unix.SYS_MKDIRAT: true, unix.SYS_MKNODAT: true, unix.SYS_LINKAT: true, unix.SYS_SYMLINKAT: true, unix.SYS_UNLINKAT: true,
	unix.SYS_RENAMEAT: true, unix.SYS_RENAMEAT2: true, unix.SYS_FCHMOD: true, unix.SYS_FCHMODAT: true, unix.SYS_FCHOWNAT: true,
	unix.SYS_FCHMODAT2: true, unix.SYS_UTIMENSAT: true, unix.SYS_FSETXATTR: true, unix.SYS_MOUNT: true, unix.SYS_UMOUNT2: true,
	unix.SYS_EXECVE: true,
}

// requests are those of ioctl that change something: loop devices, reflinks, freezing and thawing.
var requests = map[uint64]bool{
	unix.LOOP_CONFIGURE: true, unix.LOOP_CLR_FD: true, unix.LOOP_SET_STATUS64: true, unix.LOOP_SET_CAPACITY: true,
	unix.FICLONE: true, 0xc0045877: true, 0xc0045878: true,
}

func isStep(r *syscall.PtraceRegs) bool {
	switch r.Orig_rax {
	case unix.SYS_OPENAT:
		return r.Rdx&unix.O_CREAT != 0
	case unix.SYS_WRITE:
		return r.Rdx >= 16 // the runtime's own wake-ups are shorter
	case unix.SYS_IOCTL:
		return requests[r.Rsi&0xffffffff]
	case unix.SYS_CLONE:
		return r.Rdi&unix.CLONE_THREAD == 0
	}
	return steps[r.Orig_rax]
}

// killed runs cmd and kills it, with SIGKILL, when it is about to do its n-th step, n from 1. It returns false where the program has
// ended before that, with success. The programs that cmd starts are not killed, as they would not be either with a plugin.
func killed(cmd *exec.Cmd, n int) (bool, error) {
	type result struct {
		killed bool
		err    error
	}
	done := make(chan result)
	go func() {
		runtime.LockOSThread() // who traces is a thread; it ends with this goroutine
		k, err := trace(cmd, n)
		done <- result{k, err}
	}()
	r := <-done
	return r.killed, r.err
}

func trace(cmd *exec.Cmd, n int) (killed bool, err error) {
	cmd.SysProcAttr = &syscall.SysProcAttr{Ptrace: true, Setpgid: true}
	if err := cmd.Start(); err != nil {
		return false, err
	}
	pid := cmd.Process.Pid
	defer func() { _ = cmd.Process.Release() }()
	var ws syscall.WaitStatus
	if _, err := syscall.Wait4(pid, &ws, syscall.WALL, nil); err != nil {
		return false, fmt.Errorf("wait for the traced program: %w", err)
	}
	const options = unix.PTRACE_O_TRACESYSGOOD | unix.PTRACE_O_TRACECLONE | unix.PTRACE_O_EXITKILL
	if err := syscall.PtraceSetOptions(pid, options); err != nil {
		return false, fmt.Errorf("ptrace: %w", err)
	}
	if err := syscall.PtraceSyscall(pid, 0); err != nil {
		return false, fmt.Errorf("ptrace: %w", err)
	}
	for count := 0; ; {
		tid, err := syscall.Wait4(-pid, &ws, syscall.WALL, nil)
		switch {
		case errors.Is(err, syscall.EINTR):
			continue
		case err != nil:
			return killed, fmt.Errorf("wait for the traced program: %w", err)
		case tid == pid && ws.Signaled():
			return killed, nil
		case tid == pid && ws.Exited():
			if ws.ExitStatus() != 0 {
				return killed, fmt.Errorf("the traced program: exit code %d", ws.ExitStatus())
			}
			return killed, nil
		case !ws.Stopped():
			continue // another thread has ended
		}
		signal := 0
		switch s := ws.StopSignal(); {
		case s == syscall.SIGTRAP|0x80: // on entry and on return of a system call
			var regs syscall.PtraceRegs
			if syscall.PtraceGetRegs(tid, &regs) == nil && int64(regs.Rax) == -int64(syscall.ENOSYS) && isStep(&regs) {
				if count++; count == n && !killed {
					killed = true
					if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
						return false, err
					}
				}
			}
		case s != syscall.SIGTRAP && s != syscall.SIGSTOP:
			signal = int(s) // the program's own: the runtime interrupts threads so
		}
		_ = syscall.PtraceSyscall(tid, signal) // a thread that is killed just now is no longer there
	}
}

// Operation is the command that performs one of the operations that Killed kills, in a process of its own.
func Operation(storage, operation string) *exec.Cmd {
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), childStorage+"="+storage, childOperation+"="+operation, "GOMAXPROCS=1", "GOGC=off")
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	return cmd
}

// Names of environment variables.
const (
	childStorage   = "VOLUMETEST_STORAGE"
	childOperation = "VOLUMETEST_OPERATION"
)
