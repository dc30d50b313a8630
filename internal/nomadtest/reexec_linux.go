package nomadtest

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"strings"

	"golang.org/x/sys/unix"
)

// The names under which a test's program starts itself again.
const (
	keeperName = "nomadtest-keeper" // ends a cluster when its test has ended
	initName   = "nomadtest-init"   // the first process of a node
	enterName  = "nomadtest-enter"  // becomes a program inside of a node
)

// Before any test runs, a program that was started as one of ours becomes that. It must be the main thread: namespaces are those of a thread.
func init() {
	roles := map[string]func([]string) error{keeperName: keep, initName: beInit, enterName: enter}
	role, ours := roles[os.Args[0]]
	if !ours {
		return
	}
	runtime.LockOSThread()
	if err := role(os.Args[1:]); err != nil {
		fmt.Fprintf(os.Stderr, "%s: %v\n", os.Args[0], err)
		os.Exit(1)
	}
	os.Exit(0)
}

// self is a command that starts this program as one of the above.
func self(name string, args ...string) *exec.Cmd {
	return &exec.Cmd{Path: "/proc/self/exe", Args: append([]string{name}, args...), Stderr: os.Stderr}
}

// A keeper outlives the test by the moment that it takes to end what the test has started.
type keeper struct {
	cmd   *exec.Cmd
	alive io.Closer // closed, by us or by our death: the cluster has to end
	out   *strings.Builder
}

func startKeeper(id, dir string) (*keeper, error) {
	if err := sweepDead(); err != nil {
		return nil, err
	}
	if err := os.Mkdir(dir, 0o755); err != nil {
		return nil, err
	}
	k := &keeper{cmd: self(keeperName, id, dir), out: new(strings.Builder)}
	k.cmd.Stdout, k.cmd.Stderr = k.out, k.out
	k.cmd.SysProcAttr = &unix.SysProcAttr{Setpgid: true} // a terminal's Ctrl-C is for the test
	alive, err := k.cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	k.alive = alive
	if err := k.cmd.Start(); err != nil {
		return nil, errors.Join(err, os.Remove(dir))
	}
	if err := errors.Join(handDown(""), makeCgroup(id), handDown(id)); err != nil {
		return nil, errors.Join(err, k.close())
	}
	return k, nil
}

func (k *keeper) close() error {
	k.alive.Close()
	if err := k.cmd.Wait(); err != nil {
		return fmt.Errorf("end of the cluster: %w: %s", err, strings.TrimSpace(k.out.String()))
	}
	return nil
}

// keep waits for the test's end.
func keep(args []string) error {
	id, dir := args[0], args[1]
	if _, err := io.Copy(io.Discard, os.Stdin); err != nil {
		return err
	}
	return sweep(id, dir)
}

// sweep ends every process of a cluster, which takes the mounts and network along, and removes its cgroups, loop devices and files.
func sweep(id, dir string) error {
	if err := killCgroup(id); err != nil {
		return err
	}
	if err := removeCgroup(id); err != nil {
		return err
	}
	if err := freeLoops(dir); err != nil {
		return err
	}
	return os.RemoveAll(dir)
}

// enter becomes a program inside a node: NODE DIR CGROUP PROGRAM [ARG…]. NODE is its first process; the process namespace is that of the caller's children already.
func enter(args []string) error {
	node, dir, cgroup, argv := args[0], args[1], args[2], args[3:]
	if err := joinCgroup(cgroup); err != nil {
		return err
	}
	// A thread that shares its root and working directory with others can't have mounts of its own.
	if err := unix.Unshare(unix.CLONE_FS); err != nil {
		return fmt.Errorf("unshare: %w", err)
	}
	var spaces []*os.File
	for _, name := range []string{"cgroup", "ipc", "uts", "net", "mnt"} {
		f, err := os.Open("/proc/" + node + "/ns/" + name)
		if err != nil {
			return err
		}
		spaces = append(spaces, f)
	}
	for _, f := range spaces {
		if err := unix.Setns(int(f.Fd()), 0); err != nil {
			return fmt.Errorf("enter %s: %w", f.Name(), err)
		}
	}
	if err := os.Chdir(dir); err != nil {
		return err
	}
	path, err := exec.LookPath(argv[0])
	if err != nil {
		return err
	}
	return unix.Exec(path, argv, os.Environ())
}
