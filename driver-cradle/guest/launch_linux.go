package guest

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"runtime"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/cradlestack/cradlestack/driver-cradle/guest/stdio"
)

// containerNamespaces are those of a new container; the cgroup namespace is made by the stage, once it is in the cgroup.
const containerNamespaces = unix.CLONE_NEWNS | unix.CLONE_NEWPID | unix.CLONE_NEWUTS | unix.CLONE_NEWIPC

// A command is a running process of a container and our ends of its streams.
type command struct {
	*process
	streams stdio.Streams
	master  *os.File // of its terminal, or nil
}

// A stageRequest says how to start a stage.
type stageRequest struct {
	config stageConfig
	cgroup string
	first  *process // Enter: the container's first process
	stdin  bool     // with a pipe; else /dev/null
}

// startStage starts a stage and returns when its command runs, or a *stageError says why it does not.
func (p *Pod) startStage(r stageRequest) (*command, error) {
	streams, theirs, err := openStreams(r.stdin, r.config.TTY)
	if err != nil {
		return nil, err
	}
	ok := false
	defer func() {
		closeFDs(theirs[:])
		if !ok {
			closeStreams(streams)
		}
	}()
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("make socket for the stage: %w", err)
	}
	conn, err := unixConn(pair[0])
	if err != nil {
		unix.Close(pair[1])
		return nil, err
	}
	defer conn.Close()
	proc, err := p.forkStage(r, theirs, pair[1])
	unix.Close(pair[1])
	if err != nil {
		return nil, fmt.Errorf("start the stage: %w", err)
	}
	config, err := json.Marshal(r.config)
	if err == nil {
		_, err = conn.Write(config)
	}
	if err != nil && !errors.Is(err, unix.EPIPE) {
		_ = proc.signal(unix.SIGKILL)
		proc.wait()
		return nil, fmt.Errorf("tell the stage: %w", err)
	}
	master, err := readStage(conn)
	if err != nil {
		proc.wait()
		return nil, err
	}
	if master != nil {
		streams.Stdin, streams.Stdout = master, master
	}
	ok = true
	return &command{proc, streams, master}, nil
}

// forkStage forks and executes this program as a stage, in the cgroup and the namespaces it is to be in.
func (p *Pod) forkStage(r stageRequest, streams [3]int, socket int) (*process, error) {
	cgroup, err := unix.Open(r.cgroup, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: r.cgroup, Err: err}
	}
	defer unix.Close(cgroup)
	attr := &syscall.ProcAttr{
		Dir:   "/",
		Env:   []string{"GOGC=off", "GOMAXPROCS=1"},
		Files: []uintptr{uintptr(streams[0]), uintptr(streams[1]), uintptr(streams[2]), uintptr(socket)},
		Sys:   &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: cgroup, Setsid: true},
	}
	start := func() (*process, error) { return p.children.start("/proc/self/exe", []string{stageName}, attr) }
	if r.first == nil {
		attr.Sys.Cloneflags = containerNamespaces
		return start()
	}
	pidfd, err := r.first.dupPidfd()
	if err != nil {
		return nil, err
	}
	defer unix.Close(pidfd)
	attr.Files = append(attr.Files, uintptr(pidfd))
	return inPidNamespace(pidfd, start)
}

// stageName is what this executable is called to be a stage.
const stageName = "cradle-stage"

// inPidNamespace calls fork on a thread whose children are in the pid namespace of a process. The thread ends with that.
func inPidNamespace(pidfd int, fork func() (*process, error)) (*process, error) {
	type result struct {
		p   *process
		err error
	}
	done := make(chan result)
	go func() {
		runtime.LockOSThread()
		var r result
		if err := unix.Setns(pidfd, unix.CLONE_NEWPID); err != nil {
			r.err = fmt.Errorf("enter pid namespace: %w", err)
		} else {
			r.p, r.err = fork()
		}
		done <- r
	}()
	r := <-done
	return r.p, r.err
}

// openStreams makes the pipes of a command: our ends, and theirs as descriptors for 0, 1 and 2. With a terminal all of theirs are
// /dev/null: the stage replaces them.
func openStreams(stdin, tty bool) (ours stdio.Streams, theirs [3]int, err error) {
	theirs = [3]int{-1, -1, -1}
	defer func() {
		if err != nil {
			closeFDs(theirs[:])
			closeStreams(ours)
		}
	}()
	for i := range theirs {
		if tty || i == 0 && !stdin {
			if theirs[i], err = unix.Open("/dev/null", unix.O_RDWR|unix.O_CLOEXEC, 0); err != nil {
				return ours, theirs, &os.PathError{Op: "open", Path: "/dev/null", Err: err}
			}
			continue
		}
		var fds [2]int
		if err = unix.Pipe2(fds[:], unix.O_CLOEXEC); err != nil {
			return ours, theirs, fmt.Errorf("make pipe: %w", err)
		}
		our, their := 0, 1
		if i == 0 {
			our, their = 1, 0
		}
		theirs[i] = fds[their]
		// Only our end may be non-blocking: a program gets what it expects.
		if err = unix.SetNonblock(fds[our], true); err != nil {
			unix.Close(fds[our])
			return ours, theirs, fmt.Errorf("make pipe: %w", err)
		}
		f := os.NewFile(uintptr(fds[our]), "stream")
		switch i {
		case 0:
			ours.Stdin = f
		case 1:
			ours.Stdout = f
		case 2:
			ours.Stderr = f
		}
	}
	return ours, theirs, nil
}

func closeStreams(s stdio.Streams) {
	for _, f := range []any{s.Stdin, s.Stdout, s.Stderr} {
		if f, ok := f.(*os.File); ok {
			f.Close()
		}
	}
}

func closeFDs(fds []int) {
	for _, fd := range fds {
		if fd >= 0 {
			unix.Close(fd)
		}
	}
}

func unixConn(fd int) (*net.UnixConn, error) {
	f := os.NewFile(uintptr(fd), "stage")
	defer f.Close()
	c, err := net.FileConn(f)
	if err != nil {
		return nil, fmt.Errorf("make socket for the stage: %w", err)
	}
	return c.(*net.UnixConn), nil
}

// resizeTTY sets a terminal's size.
func resizeTTY(master *os.File, h, w uint16) error {
	rc, err := master.SyscallConn()
	if err != nil {
		return err
	}
	var ierr error
	err = rc.Control(func(fd uintptr) {
		ierr = unix.IoctlSetWinsize(int(fd), unix.TIOCSWINSZ, &unix.Winsize{Row: h, Col: w})
	})
	return errors.Join(err, ierr)
}
