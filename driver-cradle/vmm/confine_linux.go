package vmm

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// confineName is the name under which Confine recognises that this program was executed to become a confined one.
const confineName = "cradle-confine"

// sharesDir is where a confined process finds its shares.
const sharesDir = "/share"

// A confinement says what a process gets to see of the host: /usr to read, its shares, a few devices, the files that it inherits.
// It is in its own mount, pid, ipc and uts namespaces, in an empty network namespace unless Network is set, and runs as a user of
// its own that nothing belongs to. The signals that end services do not reach it, only SIGKILL does.
type confinement struct {
	Path    string   // of the program
	Args    []string // without the program's name
	UID     int      // and GID
	Caps    []int    // kept; all others are dropped for good
	Shares  []bind
	KVM     bool   // gets a /dev/kvm of its own
	Mount   string // a directory for the new root to be mounted on, in the process's own namespace
	Leashed bool   // dies with its parent
	Network bool   // in the host's network namespace
	AllProc bool   // sees all of /proc that everybody may read
	NoFile  uint64 // RLIMIT_NOFILE
	Nice    int    // 0: the launcher's
	NoTHP   bool   // no transparent huge pages
	Env     []string
}

type bind struct {
	Name     string
	Path     string
	ReadOnly bool
}

// shareCaps are what a 9p server needs to serve files as their owners. Making device nodes is none of it.
var shareCaps = []int{unix.CAP_CHOWN, unix.CAP_DAC_OVERRIDE, unix.CAP_FOWNER, unix.CAP_FSETID}

// Users of confined processes come from a range that systemd and Debian leave to nobody (systemd.git docs/UIDS-GIDS.md), one for
// each run directory: should two coincide, they still are in different pid and mount namespaces.
const (
	DefaultFirstUID = 0x7f000000
	userMask        = 0xffff
)

// oomScore makes the kernel prefer a pod to the host's own services when memory runs out.
const oomScore = 200

// Confine does not return if this process was executed by this package: it turns into a confined one, or does what else needs a
// process of its own. Programs that use vmm.Start call it first thing in main.
func Confine() {
	if len(os.Args) == 0 {
		return
	}
	var err error
	switch os.Args[0] {
	case confineName:
		runtime.LockOSThread() // most of what follows is a thread's own
		err = confine()
	case measureName:
		err = timeKVM()
	default:
		return
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "%s: %v\n", os.Args[0], err)
		os.Exit(1)
	}
	os.Exit(0)
}

func confine() error {
	var c confinement
	if err := ignoreEnders(); err != nil {
		return err
	}
	config, goes, err := ownFiles()
	if err != nil {
		return err
	}
	if err := json.NewDecoder(config).Decode(&c); err != nil {
		return fmt.Errorf("configuration: %w", err)
	}
	config.Close()
	if err := os.WriteFile("/proc/self/oom_score_adj", fmt.Append(nil, oomScore), 0); err != nil {
		return err
	}
	if c.Nice != 0 {
		if err := unix.Setpriority(unix.PRIO_PROCESS, 0, c.Nice); err != nil {
			return fmt.Errorf("set priority: %w", err)
		}
	}
	if c.NoTHP {
		if err := unix.Prctl(unix.PR_SET_THP_DISABLE, 1, 0, 0, 0); err != nil {
			return fmt.Errorf("disable transparent huge pages: %w", err)
		}
	}
	if err := c.enterRoot(); err != nil {
		return err
	}
	if err := unix.Sethostname([]byte("cradle")); err != nil {
		return fmt.Errorf("set host name: %w", err)
	}
	for resource, limit := range map[int]uint64{unix.RLIMIT_CORE: 0, unix.RLIMIT_NOFILE: c.NoFile, unix.RLIMIT_NPROC: maxThreads} {
		if err := limitTo(resource, limit); err != nil {
			return err
		}
	}
	if err := c.dropPrivileges(); err != nil {
		return err
	}
	if c.Leashed {
		// After the last change of credentials, which clears it.
		if err := unix.Prctl(unix.PR_SET_PDEATHSIG, uintptr(unix.SIGKILL), 0, 0, 0); err != nil {
			return fmt.Errorf("set parent-death signal: %w", err)
		}
	}
	if _, err := io.ReadFull(goes, make([]byte, 1)); err != nil {
		return errGone
	}
	// A launcher that said go and died before the signal was set shows by the other end of the pipe, which it never closes.
	if c.Leashed && hungUp(goes) {
		return errGone
	}
	err = unix.Exec(c.Path, append([]string{filepath.Base(c.Path)}, c.Args...), append([]string{"PATH=/usr/bin", "LC_ALL=C"}, c.Env...))
	return fmt.Errorf("execute %s: %w", c.Path, err)
}

// enders are the signals that whole sessions, services and cgroups are sent when they are to end.
var enders = []unix.Signal{unix.SIGHUP, unix.SIGINT, unix.SIGQUIT, unix.SIGTERM}

// ignoreEnders leaves the end of the program to the launcher, which has the pod stopped first. QEMU has handlers of its own, which
// power the machine off at once; but it only ever adds to the signals that are blocked, and those stay so when a program is executed.
func ignoreEnders() error {
	var set unix.Sigset_t
	for _, s := range enders {
		set.Val[(s-1)/64] |= 1 << ((s - 1) % 64)
	}
	if err := unix.PthreadSigmask(unix.SIG_BLOCK, &set, nil); err != nil {
		return fmt.Errorf("block signals: %w", err)
	}
	return nil
}

var errGone = errors.New("the launcher has gone")

func hungUp(f *os.File) bool {
	fds := []unix.PollFd{{Fd: int32(f.Fd())}}
	for {
		_, err := unix.Poll(fds, 0)
		if !errors.Is(err, unix.EINTR) {
			return err != nil || fds[0].Revents&unix.POLLHUP != 0
		}
	}
}

// maxThreads bounds the threads of a confined process's user; QEMU has one for each virtual processor and at most 64 for its disks.
const maxThreads = 1024

// limitTo sets a resource limit, or leaves it where it is lower.
func limitTo(resource int, limit uint64) error {
	var now unix.Rlimit
	err := unix.Getrlimit(resource, &now)
	if err == nil {
		limit = min(limit, now.Max)
		err = unix.Setrlimit(resource, &unix.Rlimit{Cur: limit, Max: limit})
	}
	if err != nil {
		return fmt.Errorf("set limit %d to %d: %w", resource, limit, err)
	}
	return nil
}

// ownFiles opens the configuration, whose number is the only argument, and the go-ahead behind it. The program does not inherit them.
func ownFiles() (config, goes *os.File, err error) {
	if len(os.Args) != 2 {
		return nil, nil, errors.New("this is no command")
	}
	n, err := strconv.Atoi(os.Args[1])
	if err != nil || n < 3 {
		return nil, nil, errors.New("this is no command")
	}
	// With these two go all files that the launcher has inherited itself and does not know of.
	if err := unix.CloseRange(uint(n), math.MaxUint32, unix.CLOSE_RANGE_CLOEXEC); err != nil {
		return nil, nil, fmt.Errorf("close inherited files: %w", err)
	}
	return os.NewFile(uintptr(n), "config"), os.NewFile(uintptr(n+1), "go-ahead"), nil
}

// enterRoot builds a root of its own and makes it the only thing there is.
func (c *confinement) enterRoot() error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	// Everything is taken before the new root covers a part of the old one.
	trees, err := c.trees()
	if err != nil {
		return err
	}
	if err := unix.Mount("cradle", c.Mount, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "mode=755,size=1m,nr_inodes=4k"); err != nil {
		return fmt.Errorf("mount new root: %w", err)
	}
	if err := os.Chdir(c.Mount); err != nil {
		return err
	}
	for _, dir := range []string{"proc", "dev", "etc", "usr", sharesDir[1:]} {
		if err := os.Mkdir(dir, 0o755); err != nil {
			return fmt.Errorf("new root: %w", err)
		}
	}
	if err := c.makeDevices(); err != nil {
		return err
	}
	for _, t := range trees {
		if err := t.attach(); err != nil {
			return err
		}
	}
	if err := c.links(); err != nil {
		return err
	}
	if err := c.mountProc(); err != nil {
		return fmt.Errorf("mount proc: %w", err)
	}
	if err := unix.PivotRoot(".", "."); err != nil {
		return fmt.Errorf("pivot root: %w", err)
	}
	// The old root lies on the new one's place now (pivot_root(2), NOTES).
	if err := unix.Unmount(".", unix.MNT_DETACH); err != nil {
		return fmt.Errorf("unmount old root: %w", err)
	}
	if err := os.Chdir("/"); err != nil {
		return err
	}
	for _, dir := range []string{"/", "/dev"} {
		if err := unix.MountSetattr(unix.AT_FDCWD, dir, 0, &unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY}); err != nil {
			return fmt.Errorf("make %s read-only: %w", dir, err)
		}
	}
	return nil
}

// mountProc shows of /proc what concerns the process itself. Besides that there are sysctls and sysrq-trigger, which belong to root, as virtiofsd has to be,
// or to whoever may override permissions of files, as QEMU has to where it serves shares.
func (c *confinement) mountProc() error {
	const flags = unix.MS_RDONLY | unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC
	if !c.AllProc {
		return unix.Mount("proc", "proc", "proc", flags, "subset=pid")
	}
	if err := unix.Mount("proc", "proc", "proc", flags, ""); err != nil {
		return err
	}
	entries, err := os.ReadDir("proc")
	if err != nil {
		return err
	}
	for _, e := range entries {
		fi, err := e.Info()
		if err != nil || !fi.Mode().IsRegular() || fi.Mode()&0o004 != 0 {
			continue // a process that has ended, or nothing that is root's alone
		}
		if err := unix.Mount("dev/null", filepath.Join("proc", e.Name()), "", unix.MS_BIND, ""); err != nil {
			return fmt.Errorf("cover %s: %w", e.Name(), err)
		}
	}
	return nil
}

// makeDevices mounts the new root's /dev. Only kvm is a node of its own there: on some hosts it is root's alone, and QEMU is not root.
func (c *confinement) makeDevices() error {
	if err := unix.Mount("cradle", "dev", "tmpfs", unix.MS_NOSUID|unix.MS_NOEXEC, "mode=755,size=64k,nr_inodes=16"); err != nil {
		return fmt.Errorf("mount new root's /dev: %w", err)
	}
	if !c.KVM {
		return nil
	}
	var st unix.Stat_t
	if err := unix.Stat(kvmDevice, &st); err != nil {
		return fmt.Errorf("stat %s: %w", kvmDevice, err)
	}
	node := kvmDevice[1:]
	if err := unix.Mknod(node, unix.S_IFCHR|0o600, int(st.Rdev)); err != nil {
		return fmt.Errorf("make the new root's %s: %w", kvmDevice, err)
	}
	if err := os.Chown(node, c.UID, c.UID); err != nil {
		return fmt.Errorf("make the new root's %s: %w", kvmDevice, err)
	}
	return nil
}

// A tree is a piece of the host's file system, detached, on its way into the new root.
type tree struct {
	fd   int
	to   string // relative to the new root
	file bool
}

// trees takes what the process is to see.
func (c *confinement) trees() ([]tree, error) {
	const locked = unix.MOUNT_ATTR_RDONLY | unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV
	type source struct {
		from, to string
		attr     uint64
		optional bool
	}
	sources := []source{{"/usr", "usr", locked, false}, {"/etc/ld.so.cache", "etc/ld.so.cache", locked | unix.MOUNT_ATTR_NOEXEC, true}}
	for _, d := range libraryDirs {
		if fi, err := os.Lstat("/" + d); err == nil && fi.IsDir() {
			sources = append(sources, source{"/" + d, d, locked, false})
		}
	}
	if prefix := filepath.Dir(filepath.Dir(c.Path)); prefix != "/" && !strings.HasPrefix(c.Path, "/usr/") {
		sources = append(sources, source{prefix, prefix[1:], locked, false}) // a QEMU of one's own, with its firmware beside it
	}
	for _, d := range []string{"/dev/null", "/dev/urandom"} {
		sources = append(sources, source{d, d[1:], unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NOEXEC, false})
	}
	for _, s := range c.Shares {
		attr := uint64(unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV)
		if s.ReadOnly {
			attr |= unix.MOUNT_ATTR_RDONLY
		}
		sources = append(sources, source{s.Path, filepath.Join(sharesDir[1:], s.Name), attr, false})
	}
	var trees []tree
	for _, s := range sources {
		fi, err := os.Stat(s.from)
		if s.optional && errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		fd, err := unix.OpenTree(unix.AT_FDCWD, s.from, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_RECURSIVE)
		if err != nil {
			return nil, fmt.Errorf("take %s: %w", s.from, err)
		}
		if err := unix.MountSetattr(fd, "", unix.AT_EMPTY_PATH|unix.AT_RECURSIVE, &unix.MountAttr{Attr_set: s.attr}); err != nil {
			return nil, fmt.Errorf("restrict %s: %w", s.from, err)
		}
		trees = append(trees, tree{fd, s.to, !fi.IsDir()})
	}
	return trees, nil
}

// attach puts a tree into the new root, which is the working directory.
func (t tree) attach() error {
	if err := os.MkdirAll(filepath.Dir(t.to), 0o755); err != nil {
		return fmt.Errorf("new root: %w", err)
	}
	var err error
	if t.file {
		err = os.WriteFile(t.to, nil, 0o600)
	} else {
		err = os.MkdirAll(t.to, 0o755)
	}
	if err != nil {
		return fmt.Errorf("new root: %w", err)
	}
	if err := unix.MoveMount(t.fd, "", unix.AT_FDCWD, t.to, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		return fmt.Errorf("attach %s: %w", t.to, err)
	}
	return unix.Close(t.fd)
}

// libraryDirs are links into /usr, or directories on hosts that have not merged them.
var libraryDirs = []string{"lib", "lib32", "lib64", "libx32"}

func (c *confinement) links() error {
	for _, name := range libraryDirs {
		target, err := os.Readlink("/" + name)
		if err != nil {
			continue
		}
		if err := os.Symlink(target, name); err != nil {
			return fmt.Errorf("new root: %w", err)
		}
	}
	return nil
}

// dropPrivileges leaves the process its user and capabilities, for good.
func (c *confinement) dropPrivileges() error {
	kept := [2]uint32{}
	for _, n := range c.Caps {
		kept[n/32] |= 1 << (n % 32)
	}
	for n := 0; ; n++ {
		if kept[min(n/32, 1)]&(1<<(n%32)) != 0 && n < 64 {
			continue
		}
		err := unix.Prctl(unix.PR_CAPBSET_DROP, uintptr(n), 0, 0, 0)
		if errors.Is(err, unix.EINVAL) {
			break // behind the kernel's last capability
		}
		if err != nil {
			return fmt.Errorf("drop capability %d: %w", n, err)
		}
	}
	if err := unix.Prctl(unix.PR_SET_KEEPCAPS, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("keep capabilities: %w", err)
	}
	if err := unix.Setgroups(nil); err != nil {
		return fmt.Errorf("set groups: %w", err)
	}
	// Directly: package unix would have all threads do it, and this one alone becomes the program.
	id := uintptr(c.UID)
	if _, _, errno := unix.RawSyscall(unix.SYS_SETRESGID, id, id, id); errno != 0 {
		return fmt.Errorf("set group: %w", errno)
	}
	if _, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, id, id, id); errno != 0 {
		return fmt.Errorf("set user: %w", errno)
	}
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	for i := range data {
		data[i] = unix.CapUserData{Effective: kept[i], Permitted: kept[i], Inheritable: kept[i]}
	}
	if err := unix.Capset(&header, &data[0]); err != nil {
		return fmt.Errorf("set capabilities: %w", err)
	}
	for _, n := range c.Caps {
		if err := unix.Prctl(unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_RAISE, uintptr(n), 0, 0); err != nil {
			return fmt.Errorf("keep capability %d: %w", n, err)
		}
	}
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("set no_new_privs: %w", err)
	}
	return nil
}
