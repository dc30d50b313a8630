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
	"github.com/cradlestack/cradlestack/spec"
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
	first  *process // of the running container to enter; nil: a new one
	stdin  bool     // with a pipe; else /dev/null

	pid, ipc *process // whose namespace a new one shares; nil: its own
}

// A stage is a process that waits for its config.
type stage struct {
	*process
	conn *net.UnixConn
}

// parkStage starts the stage of the first container before anybody asks for it: as part of a template it costs nothing at start. What
// the agent mounts later propagates into its mount namespace.
func (p *Pod) parkStage() error {
	if err := makeCgroup(containerCgroup(0), spec.Limits{}); err != nil {
		return err
	}
	s, err := p.forkStage(stageNew, stageRequest{cgroup: containerCgroup(0)})
	if err != nil {
		return err
	}
	p.parked <- s
	return nil
}

// takeStage gives a stage in the cgroup asked for: the parked one, if that is the first container's, or a new one.
func (p *Pod) takeStage(r stageRequest) (*stage, error) {
	kind := stageNew
	switch {
	case r.first != nil:
		kind = stageEnters
	case r.config.Privileged, r.config.Shield != nil:
		kind = stagePrivileged
	}
	if r.first == nil && r.cgroup == containerCgroup(0) {
		select {
		case s := <-p.parked:
			if kind == stageNew && !s.ended() {
				return s, nil
			}
			s.abandon()
		default:
		}
	}
	return p.forkStage(kind, r)
}

// abandon ends a stage that did not become anything.
func (s *stage) abandon() {
	s.conn.Close()
	_ = s.signal(unix.SIGKILL)
	s.wait()
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
	s, err := p.takeStage(r)
	if err != nil {
		return nil, fmt.Errorf("start the stage: %w", err)
	}
	r.config.SharedShm = r.ipc != nil
	config, err := json.Marshal(r.config)
	if err == nil {
		err = sendConfig(s.conn, config, theirs)
	}
	if err != nil && !errors.Is(err, unix.EPIPE) {
		s.abandon()
		return nil, fmt.Errorf("tell the stage: %w", err)
	}
	defer s.conn.Close()
	master, err := readStage(s.conn)
	if err != nil {
		s.wait()
		return nil, err
	}
	if master != nil {
		streams.Stdin, streams.Stdout = master, master
	}
	ok = true
	return &command{s.process, streams, master}, nil
}

// sendConfig sends the config, and with its first bytes the streams.
func sendConfig(conn *net.UnixConn, config []byte, streams [3]int) error {
	n, _, err := conn.WriteMsgUnix(config, unix.UnixRights(streams[:]...), nil)
	if err == nil && n < len(config) {
		_, err = conn.Write(config[n:])
	}
	return err
}

// forkStage forks and executes this program as a stage: in the pid namespace of the request's first, or in new namespaces.
func (p *Pod) forkStage(kind string, r stageRequest) (*stage, error) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("make socket: %w", err)
	}
	defer unix.Close(pair[1])
	conn, err := unixConn(pair[0])
	if err != nil {
		return nil, err
	}
	proc, err := p.forkWith(kind, r, pair[1])
	if err != nil {
		conn.Close()
		return nil, err
	}
	return &stage{proc, conn}, nil
}

func (p *Pod) forkWith(kind string, r stageRequest, socket int) (*process, error) {
	null, err := unix.Open("/dev/null", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: "/dev/null", Err: err}
	}
	defer unix.Close(null)
	attr := &syscall.ProcAttr{
		Dir:   "/",
		Env:   []string{"GOGC=off", "GOMAXPROCS=1", "GODEBUG=asyncpreemptoff=1"},
		Files: []uintptr{uintptr(null), uintptr(null), uintptr(null), uintptr(socket)},
		Sys:   &syscall.SysProcAttr{Setsid: true},
	}
	fd, err := openCgroup(r.cgroup)
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	attr.Sys.UseCgroupFD, attr.Sys.CgroupFD = true, fd
	start := func() (*process, error) { return p.children.start("/proc/self/exe", []string{stageName, kind}, attr) }
	if r.first == nil {
		attr.Sys.Cloneflags = containerNamespaces
		if r.pid == nil && r.ipc == nil {
			return start()
		}
		return sharing(r, attr, start)
	}
	pidfd, err := r.first.dupPidfd()
	if err != nil {
		return nil, err
	}
	defer unix.Close(pidfd)
	attr.Files = append(attr.Files, uintptr(pidfd))
	return onThread(func() (*process, error) {
		if err := unix.Setns(pidfd, unix.CLONE_NEWPID); err != nil {
			return nil, fmt.Errorf("enter pid namespace: %w", err)
		}
		return start()
	})
}

// sharing starts a stage in namespaces of which some are another container's. The stage gets the other one's /dev/shm as stageShm.
func sharing(r stageRequest, attr *syscall.ProcAttr, start func() (*process, error)) (*process, error) {
	if r.ipc != nil {
		shm, err := sharedMemory(r.ipc)
		if err != nil {
			return nil, fmt.Errorf("share /dev/shm: %w", err)
		}
		defer unix.Close(shm)
		attr.Files = append(attr.Files, uintptr(shm))
	}
	return onThread(func() (*process, error) {
		for _, share := range []struct {
			with *process
			kind int
		}{{r.pid, unix.CLONE_NEWPID}, {r.ipc, unix.CLONE_NEWIPC}} {
			if share.with == nil {
				continue
			}
			if err := enterOf(share.with, share.kind); err != nil {
				return nil, err
			}
			attr.Sys.Cloneflags &^= uintptr(share.kind)
		}
		return start()
	})
}

// enterOf has this thread, and of a process namespace its children, enter a namespace of a container's.
func enterOf(first *process, kind int) error {
	pidfd, err := first.dupPidfd()
	if err != nil {
		return err
	}
	defer unix.Close(pidfd)
	if err := unix.Setns(pidfd, kind); err != nil {
		return fmt.Errorf("enter a container's namespace: %w", err)
	}
	return nil
}

// sharedMemory is a container's /dev/shm, to be mounted elsewhere.
func sharedMemory(first *process) (int, error) {
	return onThread(func() (int, error) {
		if err := unix.Unshare(unix.CLONE_FS); err != nil {
			return -1, fmt.Errorf("unshare the root directory: %w", err)
		}
		if err := enterOf(first, unix.CLONE_NEWNS); err != nil {
			return -1, err
		}
		fd, err := unix.OpenTree(unix.AT_FDCWD, "/dev/shm", unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_SYMLINK_NOFOLLOW)
		if err != nil {
			return -1, &os.PathError{Op: "open", Path: "/dev/shm", Err: err}
		}
		return fd, nil
	})
}

func openCgroup(dir string) (int, error) {
	fd, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, &os.PathError{Op: "open", Path: dir, Err: err}
	}
	return fd, nil
}

// stageName is what this executable is called to be a stage, and its argument is of what kind.
const (
	stageName       = "cradle-stage"
	stageNew        = "new"
	stagePrivileged = "privileged"
	stageEnters     = "enter"
)

// onThread calls f on a thread of its own, which ends with it: f may change what belongs to a thread.
func onThread[T any](f func() (T, error)) (T, error) {
	var v T
	var err error
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread()
		v, err = f()
	}()
	<-done
	return v, err
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
