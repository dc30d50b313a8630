package nomadtest

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/netip"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"

	"github.com/cradlestack/cradlestack/internal/agents"
)

// A Node is a machine: namespaces of its own, its first process, which adopts and reaps orphans, and agents.
type Node struct {
	Name           string
	Dir            string     // the node's files; Nomad's data directory is nomad in it
	IP             netip.Addr // its address in the cluster
	Server, Client bool

	cluster *Cluster
	number  int
	config  agents.Config
	pid     atomic.Int64  // of the first process; whoever waits for the node asks while it crashes and boots
	gone    chan struct{} // closed when that has been waited for

	mu     sync.Mutex
	agents map[string]*agent // by program
	first  inventory         // before any agent ran
}

// cgroup is the node's, "/" to its own eyes.
func (n *Node) cgroup() string { return filepath.Join(n.cluster.id, n.Name) }

// leaf is where the node's processes begin: a v2 cgroup that hands controllers down has none itself.
func (n *Node) leaf() string { return filepath.Join(n.cgroup(), "init") }

// boot brings the machine up, without agents.
func (n *Node) boot() (err error) {
	n.Dir = filepath.Join(n.cluster.dir, fmt.Sprint(n.number))
	if err := os.MkdirAll(filepath.Join(n.Dir, "tmp"), 0o755); err != nil {
		return err
	}
	if err := makeCgroup(n.cgroup()); err != nil {
		return err
	}
	cmd := self(initName, n.Name, n.Dir, n.cgroup(), n.leaf())
	cmd.SysProcAttr = &unix.SysProcAttr{Setpgid: true, Cloneflags: unix.CLONE_NEWNS | unix.CLONE_NEWPID | unix.CLONE_NEWNET | unix.CLONE_NEWUTS | unix.CLONE_NEWIPC}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("first process of %s: %w", n.Name, err)
	}
	n.pid.Store(int64(cmd.Process.Pid))
	n.gone = make(chan struct{})
	line, err := bufio.NewReader(out).ReadString('\n')
	go func() {
		defer close(n.gone)
		cmd.Wait()
	}()
	if err != nil || line != "up\n" {
		return fmt.Errorf("first process of %s does not come up: %q, %w", n.Name, line, err)
	}
	if n.IP, err = n.cluster.network.plug(n.number, n.PID()); err != nil {
		return fmt.Errorf("network of %s: %w", n.Name, err)
	}
	if err := n.configure(); err != nil {
		return err
	}
	n.agents = map[string]*agent{}
	n.first, err = n.inventory()
	return err
}

// ClusterDir is a directory that all nodes have.
func (n *Node) ClusterDir() string { return n.cluster.dir }

// PID is the host's number of the node's first process; of one that has crashed, it was.
func (n *Node) PID() int { return int(n.pid.Load()) }

// Path is where the host finds a path of the node: mounts are the node's own.
func (n *Node) Path(path string) string {
	return filepath.Join("/proc", fmt.Sprint(n.PID()), "root", path)
}

// beInit is the first process of a node: NAME DIR CGROUP LEAF.
func beInit(args []string) error {
	children := make(chan os.Signal, 1)
	signal.Notify(children, unix.SIGCHLD)
	if err := setUp(args[0], args[1], args[2], args[3]); err != nil {
		return err
	}
	if _, err := io.WriteString(os.Stdout, "up\n"); err != nil {
		return err
	}
	for range children {
		for {
			if pid, err := unix.Wait4(-1, nil, unix.WNOHANG, nil); pid <= 0 || err != nil {
				break
			}
		}
	}
	return nil
}

func setUp(name, dir, cgroup, leaf string) error {
	trees, err := hierarchies()
	if err != nil {
		return err
	}
	// The root of the node's cgroups is where this process is when it gets a namespace of them.
	if err := joinCgroup(cgroup); err != nil {
		return err
	}
	if err := unix.Unshare(unix.CLONE_NEWCGROUP); err != nil {
		return fmt.Errorf("unshare cgroups: %w", err)
	}
	if err := errors.Join(makeCgroup(leaf), joinCgroup(leaf), handDown(cgroup)); err != nil {
		return err
	}
	if err := unix.Sethostname([]byte(name)); err != nil {
		return err
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	const tmpfs = "tmpfs"
	mount := func(what, at, kind, options string) error {
		if err := os.MkdirAll(at, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
		if err := unix.Mount(what, at, kind, 0, options); err != nil {
			return fmt.Errorf("mount %s at %s: %w", kind, at, err)
		}
		return nil
	}
	if err := mount("proc", "/proc", "proc", ""); err != nil {
		return err
	}
	if err := mount("sysfs", "/sys", "sysfs", ""); err != nil { // shows the interfaces of the network in which it is mounted
		return err
	}
	if trees[0].path != cgroups {
		if err := mount(tmpfs, cgroups, tmpfs, "mode=755"); err != nil {
			return err
		}
	}
	for _, h := range trees {
		kind := "cgroup"
		if h.v2 {
			kind = "cgroup2"
		}
		if err := mount(kind, h.path, kind, h.options); err != nil {
			return err
		}
	}
	// What a reboot takes along, and what CNI's plugins keep for all of a host.
	for _, at := range []string{"/run", "/var/lib/cni"} {
		if err := mount(tmpfs, at, tmpfs, "mode=755"); err != nil {
			return err
		}
	}
	// Another machine has another boot id.
	boot := filepath.Join(dir, "boot_id")
	if err := os.WriteFile(boot, []byte(uuid.NewString()+"\n"), 0o444); err != nil {
		return err
	}
	if err := unix.Mount(boot, "/proc/sys/kernel/random/boot_id", "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("mount boot id: %w", err)
	}
	return resolver(dir)
}

// resolver gives the node a resolv.conf: the host's names a server that is not to be reached from here.
func resolver(dir string) error {
	file := filepath.Join(dir, "resolv.conf")
	if err := os.WriteFile(file, []byte("nameserver "+gateway.Addr().String()+"\n"), 0o644); err != nil {
		return err
	}
	at := "/etc/resolv.conf"
	if to, err := os.Readlink(at); err == nil { // into /run, which is empty now
		if !filepath.IsAbs(to) {
			to = filepath.Join("/etc", to)
		}
		if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
			return err
		}
		at = to
	}
	f, err := os.OpenFile(at, os.O_CREATE, 0o644)
	if err != nil {
		return err
	}
	f.Close()
	if err := unix.Mount(file, at, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("mount resolv.conf: %w", err)
	}
	return nil
}

// env is the environment of the node's programs.
func (n *Node) env() []string { return agents.Environ(filepath.Join(n.Dir, "tmp")) }

// Command is a program that runs in the node, in its directory, when it is started by Start or one of the functions that use it.
func (n *Node) Command(ctx context.Context, name string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, "/proc/self/exe")
	cmd.Args = append([]string{enterName, fmt.Sprint(n.PID()), n.Dir, n.leaf(), name}, args...)
	cmd.Env = n.env()
	cmd.WaitDelay = 10 * time.Second
	return cmd
}

// Launch starts a command of the node's. Wait for it as for any other.
func (n *Node) Launch(cmd *exec.Cmd) error {
	done := make(chan error)
	go func() {
		// Never unlocked: the thread, whose children are the node's, ends with this goroutine.
		runtime.LockOSThread()
		done <- func() error {
			space, err := os.Open(fmt.Sprintf("/proc/%d/ns/pid", n.PID()))
			if err != nil {
				return fmt.Errorf("%s is down: %w", n.Name, err)
			}
			defer space.Close()
			if err := unix.Setns(int(space.Fd()), unix.CLONE_NEWPID); err != nil {
				return fmt.Errorf("enter process namespace of %s: %w", n.Name, err)
			}
			return cmd.Start()
		}()
	}()
	return <-done
}

// Output runs a program in the node and returns what it prints on standard output; an error has what it prints on the other.
func (n *Node) Output(ctx context.Context, name string, args ...string) (string, error) {
	cmd := n.Command(ctx, name, args...)
	var stdout, stderr strings.Builder
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := n.Launch(cmd)
	if err == nil {
		err = cmd.Wait()
	}
	if err != nil {
		return stdout.String(), fmt.Errorf("%s: %s %s: %w: %s", n.Name, name, strings.Join(args, " "), err, strings.TrimSpace(stderr.String()))
	}
	return stdout.String(), nil
}

// Crash is a power cut: every process dies, mounts and network are gone, files stay. Boot follows.
func (n *Node) Crash() error {
	if err := killCgroup(n.cgroup()); err != nil {
		return err
	}
	n.ended()
	return errors.Join(n.cluster.network.unplug(n.number), removeCgroup(n.cgroup()))
}

// Boot starts a node that has crashed, with its agents.
func (n *Node) Boot() error {
	if err := n.boot(); err != nil {
		return err
	}
	return n.StartAgents()
}

// ended waits for what was killed.
func (n *Node) ended() {
	<-n.gone
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, a := range n.agents {
		<-a.gone
	}
}

// settled adds what agents have set up for good to what may be there after their end.
func (n *Node) settled() error {
	now, err := n.inventory()
	if err != nil {
		return err
	}
	for thing := range now {
		if strings.HasPrefix(thing, "file ") || strings.HasPrefix(thing, "cgroup ") {
			n.first[thing] = true
		}
	}
	return nil
}

// shutDown ends the agents and says what remains.
func (n *Node) shutDown() error {
	if n.first == nil { // it has not come up
		return nil
	}
	select {
	case <-n.gone:
		return nil // crashed
	default:
	}
	if err := n.StopAgents(); err != nil {
		return err
	}
	return n.remains(n.first)
}

// release lets go of the node, whose processes the keeper has ended.
func (n *Node) release() {
	if n.gone != nil {
		n.ended()
	}
}
