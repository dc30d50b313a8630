package guest

import (
	"errors"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"golang.org/x/sys/unix"
)

// initName is what docker calls the reaping init of --init, and what this executable is called to be it.
const initName = "/sbin/docker-init"

// initExecutable is this executable as a stage inside the container finds it.
func initExecutable() (string, error) { return "/proc/self/exe", nil }

// runInit is pid 1 of a container with init: args is the command. Signals are passed on, orphans reaped; it ends as its child ends.
func runInit(args []string) int {
	unix.CloseOnExec(stageSocket)
	// Before the fork, or a signal that comes early is lost.
	signals := make(chan os.Signal, 64)
	signal.Notify(signals)
	path, err := lookPath(args[0], os.Getenv("PATH"))
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return exitNotFound
	}
	tty := isTerminal(0)
	child, err := syscall.ForkExec(path, args, &syscall.ProcAttr{
		Env:   os.Environ(),
		Files: []uintptr{0, 1, 2},
		Sys:   &syscall.SysProcAttr{Setpgid: !tty, Foreground: tty, Ctty: 0},
	})
	if err != nil {
		fmt.Fprintf(os.Stderr, "exec %s: %v\n", path, err)
		return exitNotExecutable
	}
	unix.Close(stageSocket) // the agent says from now on that the container runs
	for s := range signals {
		switch s {
		case unix.SIGCHLD:
			if code, ended := reapAll(child); ended {
				return code
			}
		case unix.SIGURG: // Go's own
		default:
			_ = unix.Kill(child, s.(unix.Signal))
		}
	}
	return 0
}

// reapAll reaps every child that has ended, and gives the exit code if it was the one.
func reapAll(child int) (code int, ended bool) {
	for {
		var ws unix.WaitStatus
		pid, err := unix.Wait4(-1, &ws, unix.WNOHANG, nil)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case err != nil || pid <= 0:
			return code, ended
		case pid == child && ws.Signaled():
			code, ended = 128+int(ws.Signal()), true
		case pid == child:
			code, ended = ws.ExitStatus(), true
		}
	}
}

func isTerminal(fd int) bool {
	_, err := unix.IoctlGetTermios(fd, unix.TCGETS)
	return err == nil
}
