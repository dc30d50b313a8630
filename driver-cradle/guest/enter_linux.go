package guest

import (
	"errors"
	"fmt"
	"os"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/cradlestack/cradlestack/driver-cradle/guest/stdio"
)

// runInside runs a command in a running container without a stage, which takes a third of the time: a thread of the agent's enters the
// container's namespaces, takes on what a child inherits from its thread, and forks. Resource limits and the OOM score are the
// process's, not the thread's: the child has the agent's, which are docker's default; commands with others take a stage.
func (p *Pod) runInside(r stageRequest) (*command, error) {
	c := &r.config
	streams, theirs, err := openStreams(r.stdin, c.TTY)
	if err != nil {
		return nil, err
	}
	defer func() { closeFDs(theirs[:]) }()
	pidfd, err := r.first.dupPidfd()
	if err != nil {
		closeStreams(streams)
		return nil, &stateError{ErrNotRunning, "container is not running"}
	}
	defer unix.Close(pidfd)
	cgroup, err := openCgroup(r.cgroup)
	if err != nil {
		closeStreams(streams)
		return nil, err
	}
	defer unix.Close(cgroup)
	cmd, err := onThread(func() (*command, error) { return p.forkInside(c, pidfd, cgroup, streams, theirs) })
	if err != nil {
		closeStreams(streams)
		return nil, err
	}
	return cmd, nil
}

// forkInside is called on a thread that is never used again.
func (p *Pod) forkInside(c *stageConfig, pidfd, cgroup int, streams stdio.Streams, theirs [3]int) (_ *command, err error) {
	if err := unix.Unshare(unix.CLONE_FS); err != nil {
		return nil, fmt.Errorf("unshare the root directory: %w", err)
	}
	if err := unix.Setns(pidfd, unix.CLONE_NEWNS|unix.CLONE_NEWUTS|unix.CLONE_NEWIPC|unix.CLONE_NEWCGROUP|unix.CLONE_NEWPID); err != nil {
		return nil, fmt.Errorf("enter the container: %w", err)
	}
	u, err := lookupUser(c.User, c.Groups)
	if err != nil {
		return nil, err
	}
	var master, slave *os.File
	if c.TTY {
		if master, slave, err = makeTTY(c); err != nil {
			return nil, err
		}
		defer slave.Close()
		defer func() {
			if err != nil {
				master.Close()
			}
		}()
		fd := int(slave.Fd())
		if err := unix.Fchown(fd, u.uid, -1); err != nil {
			return nil, fmt.Errorf("give terminal to user %d: %w", u.uid, err)
		}
		theirs = [3]int{fd, fd, fd}
		streams.Stdin, streams.Stdout = master, master
	} else if err := giveStreams(theirs, u.uid); err != nil {
		return nil, err
	}
	path, err := findAs(c, u)
	if err != nil {
		return nil, err
	}
	if err := boundCaps(c.Caps); err != nil {
		return nil, err
	}
	if err := forbidPrivs(c); err != nil {
		return nil, err
	}
	env := c.Env
	if lookupEnv(env, "HOME") == "" {
		env = mergeEnv(env, []string{"HOME=" + u.home})
	}
	proc, err := p.children.start(path, c.Args, &syscall.ProcAttr{
		Env:   env,
		Files: []uintptr{uintptr(theirs[0]), uintptr(theirs[1]), uintptr(theirs[2])},
		Sys: &syscall.SysProcAttr{
			Setsid: true, Setctty: c.TTY, Ctty: 0,
			Credential:  &syscall.Credential{Uid: uint32(u.uid), Gid: uint32(u.gid), Groups: u.groupIDs()},
			UseCgroupFD: true, CgroupFD: cgroup,
		},
	})
	if err == nil {
		return &command{proc, streams, master}, nil
	}
	switch {
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.EACCES):
		return nil, &stageError{codeOf(err), fmt.Sprintf("exec %s: %v", path, err)}
	case errors.Is(err, unix.ENOEXEC):
		return nil, &stageError{exitNotExecutable, fmt.Sprintf("exec %s: %v", path, err)}
	}
	return nil, fmt.Errorf("fork: %w", err)
}

// findAs changes to the working directory and finds the command as the user would.
func findAs(c *stageConfig, u *execUser) (path string, err error) {
	cwd := c.Cwd
	if cwd == "" {
		cwd = "/"
	}
	chdirErr := unix.Chdir(cwd)
	// Of this thread, and undone before the fork: root without CAP_DAC_OVERRIDE could not put a child into a cgroup.
	ids := u.groupIDs()
	var first *uint32
	if len(ids) > 0 {
		first = &ids[0]
	}
	if err := rawSetgroups(len(ids), first); err != nil {
		return "", fmt.Errorf("set groups: %w", err)
	}
	setFSIDs(u.uid, u.gid)
	defer setFSIDs(0, 0)
	if chdirErr != nil {
		if err := unix.Chdir(cwd); err != nil {
			return "", &stageError{codeOf(err), fmt.Sprintf("chdir to cwd (%q) failed: %v", cwd, err)}
		}
	}
	if len(c.Args) == 0 || c.Args[0] == "" {
		return "", &stageError{exitRefused, "no command specified"}
	}
	return lookPath(c.Args[0], lookupEnv(c.Env, "PATH"))
}

// setFSIDs changes as whom this thread uses files. A user id but 0 also takes the capabilities over files away, until it is 0 again.
func setFSIDs(uid, gid int) {
	_, _, _ = unix.RawSyscall(unix.SYS_SETFSGID, uintptr(gid), 0, 0)
	_, _, _ = unix.RawSyscall(unix.SYS_SETFSUID, uintptr(uid), 0, 0)
}
