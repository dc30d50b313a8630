package guest

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// A stageConfig tells a stage what to become. It goes over the stage's socket as JSON.
type stageConfig struct {
	Rootfs     string            `json:",omitempty"`
	Hostname   string            `json:",omitempty"`
	Domainname string            `json:",omitempty"`
	ReadOnly   bool              `json:",omitempty"`
	Init       bool              `json:",omitempty"`
	ShmSize    int64             `json:",omitempty"`
	SharedShm  bool              `json:",omitempty"` // /dev/shm is another container's, at stageShm
	Sysctls    map[string]string `json:",omitempty"`
	Devices    []string          `json:",omitempty"`
	Nodes      []deviceNode      `json:",omitempty"`
	Mounts     []lateMount       `json:",omitempty"`

	Args       []string
	Env        []string
	Cwd        string
	User       string
	Groups     []string `json:",omitempty"`
	TTY        bool     `json:",omitempty"`
	Rows, Cols uint16   `json:",omitempty"`
	Caps       capSet
	Privileged bool     `json:",omitempty"`
	Shield     *shield  `json:",omitempty"` // another one than the stage has made
	NoNewPrivs bool     `json:",omitempty"`
	Limits     []rlimit `json:",omitempty"`
	OOMScore   int      `json:",omitempty"`
}

// A shield is what of /proc and /sys is hidden from a container, and write-protected.
type shield struct {
	Masked          []string `json:",omitempty"`
	ReadOnly        []string `json:",omitempty"`
	WritableSys     bool     `json:",omitempty"`
	WritableCgroups bool     `json:",omitempty"`
}

// A lateMount is one below /dev, /proc or /sys: it comes after those.
type lateMount struct {
	Source   string // path in the agent's tree; "" makes a tmpfs
	File     bool
	ReadOnly bool
	Target   string
	Flags    uintptr // tmpfs
	Options  string  // tmpfs
}

// A deviceNode is a block volume that the container gets raw.
type deviceNode struct {
	Path string
	Dev  uint64
}

// A stageError is why a stage could not become its command, with the exit code docker gives that.
type stageError struct {
	Code int
	Text string
}

func (e *stageError) Error() string { return e.Text }

// docker's exit codes for what never ran.
const (
	exitRefused       = 125
	exitNotExecutable = 126
	exitNotFound      = 127
)

// File descriptors of a stage beyond stdio.
const (
	stageSocket = 3 // the agent: config in; then the tty's master, or an error, out; closed by a successful execve, or by the init
	stagePidfd  = 4 // entering: the container's first process
	stageShm    = 4 // sharing another container's IPC: its /dev/shm
)

// runStage is the life of a stage: it does not return if all goes well. One that enters a running container inherits a pidfd of its
// first process; the others are in new namespaces already, and build the container's inside.
func runStage(kind string) {
	// What is per thread (namespaces, capabilities, ids) is set on the one that executes the command.
	runtime.LockOSThread()
	unix.CloseOnExec(stageSocket)
	unix.CloseOnExec(stageShm) // where there is one
	err := becomeCommand(kind)
	e, ok := errors.AsType[*stageError](err)
	if !ok {
		e = &stageError{exitRefused, err.Error()}
	}
	e.Text = shortened(e.Text)
	out, _ := json.Marshal(e)
	_, _ = unix.Write(stageSocket, out)
	os.Exit(exitRefused)
}

func becomeCommand(kind string) error {
	entering := kind == stageEnters
	if !entering {
		// Until the config comes, what the agent mounts appears here too, and nothing of this one there.
		if err := mount("", "/", "", unix.MS_REC|unix.MS_SLAVE, ""); err != nil {
			return err
		}
		// What is the same for nearly all containers is made before the config: a parked stage has it in its template.
		if err := makeSystem(kind == stagePrivileged); err != nil {
			return err
		}
	}
	var c stageConfig
	_ = json.Unmarshal([]byte("{}"), &c) // what this type looks like is known when the config comes
	if err := readConfig(&c); err != nil {
		return err
	}
	if entering {
		if err := enter(); err != nil {
			return err
		}
	} else if err := buildInside(&c); err != nil {
		return err
	}
	slave, err := openTTY(&c)
	if err != nil {
		return err
	}
	if !entering {
		if err := finishInside(&c, slave); err != nil {
			return err
		}
	}
	return execute(&c, slave, entering)
}

// readConfig sleeps until the agent sends the config, and takes the streams that come with it.
func readConfig(c *stageConfig) error {
	buf, oob := make([]byte, 16<<10), make([]byte, unix.CmsgSpace(3*4))
	var n, oobn int
	for {
		var err error
		n, oobn, _, _, err = unix.Recvmsg(stageSocket, buf, oob, unix.MSG_CMSG_CLOEXEC)
		if err == nil {
			break
		}
		if err != unix.EINTR {
			return fmt.Errorf("read config: %w", err)
		}
	}
	if n == 0 {
		os.Exit(0) // never needed
	}
	streams, err := receivedFDs(oob[:oobn])
	if err != nil || len(streams) != 3 {
		return fmt.Errorf("read config: %d streams came with it: %w", len(streams), err)
	}
	for i, fd := range streams {
		if err := unix.Dup3(fd, i, 0); err != nil {
			return fmt.Errorf("take stream %d: %w", i, err)
		}
		unix.Close(fd)
	}
	rest := io.MultiReader(bytes.NewReader(buf[:n]), os.NewFile(stageSocket, "agent"))
	if err := json.NewDecoder(rest).Decode(c); err != nil {
		return fmt.Errorf("read config: %w", err)
	}
	return nil
}

// enter joins the namespaces of a running container but the pid namespace, in which the agent has forked this process already.
func enter() error {
	if err := unix.Unshare(unix.CLONE_FS); err != nil {
		return fmt.Errorf("unshare the root directory: %w", err)
	}
	if err := unix.Setns(stagePidfd, unix.CLONE_NEWNS|unix.CLONE_NEWUTS|unix.CLONE_NEWIPC|unix.CLONE_NEWCGROUP); err != nil {
		return fmt.Errorf("enter the container: %w", err)
	}
	return unix.Close(stagePidfd)
}

// inside is where a stage makes the container's /proc, /dev and /sys.
const inside = runDir + "/inside"

// systemDirs are the directories whose content is never the image's.
var systemDirs = []string{"proc", "dev", "sys"}

// A systemMount is one of the file systems that docker mounts into every container.
type systemMount struct {
	path, fstype string
	flags        uintptr
	data         string
}

const lockedMount = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC

var systemMounts = []systemMount{
	{"/proc", "proc", lockedMount, ""},
	{"/dev", "tmpfs", unix.MS_NOSUID | unix.MS_STRICTATIME, "mode=755,size=65536k"},
	{"/dev/pts", "devpts", unix.MS_NOSUID | unix.MS_NOEXEC, "newinstance,ptmxmode=0666,mode=0620,gid=5"},
	{"/dev/mqueue", "mqueue", lockedMount, ""},
	{"/dev/shm", "tmpfs", lockedMount, "mode=1777,size=65536k"},
	{"/sys", "sysfs", lockedMount, ""},
	{"/sys/fs/cgroup", "cgroup2", lockedMount, ""}, // its root is the cgroup that the stage is in
}

// makeSystem makes /proc, /dev and /sys as docker does, in a place of this stage's own.
func makeSystem(privileged bool) error {
	if err := unix.Unshare(unix.CLONE_NEWCGROUP); err != nil {
		return fmt.Errorf("make cgroup namespace: %w", err)
	}
	if err := mount("tmpfs", inside, "tmpfs", 0, "mode=700"); err != nil {
		return err
	}
	for _, dir := range systemDirs {
		if err := os.Mkdir(filepath.Join(inside, dir), 0o755); err != nil {
			return err
		}
	}
	for _, m := range systemMounts {
		if err := os.MkdirAll(inside+m.path, 0o755); err != nil {
			return err
		}
		if err := mount(m.fstype, inside+m.path, m.fstype, m.flags, m.data); err != nil {
			return err
		}
	}
	if err := makeDevices(inside + "/dev"); err != nil || privileged {
		return err
	}
	return defaultShield.raise(inside)
}

// buildInside puts that into Rootfs with what the config adds, and makes Rootfs the root.
func buildInside(c *stageConfig) error {
	if err := mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return err
	}
	if err := adaptSystem(c); err != nil {
		return err
	}
	for _, dir := range systemDirs {
		at, err := openMountPoint(c.Rootfs, "/"+dir, false)
		if err != nil {
			return err
		}
		err = unix.MoveMount(unix.AT_FDCWD, filepath.Join(inside, dir), unix.AT_FDCWD, at.path(), unix.MOVE_MOUNT_T_SYMLINKS)
		at.Close()
		if err != nil {
			return &os.PathError{Op: "mount", Path: "/" + dir, Err: err}
		}
	}
	for _, m := range c.Mounts {
		if err := mountLate(c.Rootfs, m); err != nil {
			return err
		}
	}
	return pivot(c.Rootfs)
}

// adaptSystem makes /proc, /dev and /sys what the config wants.
func adaptSystem(c *stageConfig) error {
	for _, own := range c.Mounts {
		if slices.ContainsFunc(systemMounts, func(m systemMount) bool { return m.path == own.Target }) {
			if err := unix.Unmount(inside+own.Target, unix.MNT_DETACH); err != nil {
				return &os.PathError{Op: "unmount", Path: own.Target, Err: err}
			}
		}
	}
	switch {
	case slices.ContainsFunc(c.Mounts, func(m lateMount) bool { return m.Target == "/dev/shm" }):
	case c.SharedShm:
		if err := unix.Unmount(inside+"/dev/shm", unix.MNT_DETACH); err != nil {
			return &os.PathError{Op: "unmount", Path: "/dev/shm", Err: err}
		}
		if err := unix.MoveMount(stageShm, "", unix.AT_FDCWD, inside+"/dev/shm", unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
			return &os.PathError{Op: "mount", Path: "/dev/shm", Err: err}
		}
	case c.ShmSize != defaultShmSize:
		if err := mount("", inside+"/dev/shm", "", unix.MS_REMOUNT|lockedMount, fmt.Sprintf("size=%d", c.ShmSize)); err != nil {
			return err
		}
	}
	return addDevices(c)
}

const defaultShmSize = 64 << 20

func mountLate(root string, m lateMount) error {
	at, err := openMountPoint(root, m.Target, m.File)
	if err != nil {
		return err
	}
	defer at.Close()
	if m.Source == "" {
		return mount("tmpfs", at.path(), "tmpfs", m.Flags, m.Options)
	}
	var attributes uint64
	if m.ReadOnly {
		attributes = unix.MOUNT_ATTR_RDONLY
	}
	return bind(m.Source, at.path(), attributes)
}

// pivot makes dir the root of this mount namespace and lets go of everything else.
func pivot(dir string) error {
	if err := unix.Chdir(dir); err != nil {
		return fmt.Errorf("enter %s: %w", dir, err)
	}
	// Old and new root on the same place, pivot_root(2): the old one is then on top and is taken away.
	if err := unix.PivotRoot(".", "."); err != nil {
		return fmt.Errorf("pivot to %s: %w", dir, err)
	}
	if err := unix.Unmount(".", unix.MNT_DETACH); err != nil {
		return fmt.Errorf("let go of the old root: %w", err)
	}
	return unix.Chdir("/")
}

// standardDevices are docker's, moby daemon/pkg/oci/defaults.go and runc's.
var standardDevices = []struct {
	name  string
	major uint32
	minor uint32
}{{"null", 1, 3}, {"zero", 1, 5}, {"full", 1, 7}, {"random", 1, 8}, {"urandom", 1, 9}, {"tty", 5, 0}}

// makeDevices fills a fresh /dev with what every container has.
func makeDevices(dev string) error {
	old := unix.Umask(0)
	defer unix.Umask(old)
	for _, d := range standardDevices {
		if err := makeNode(dev+"/"+d.name, unix.S_IFCHR|0o666, unix.Mkdev(d.major, d.minor)); err != nil {
			return err
		}
	}
	for _, l := range [][2]string{
		{"/proc/self/fd", "fd"},
		{"/proc/self/fd/0", "stdin"},
		{"/proc/self/fd/1", "stdout"},
		{"/proc/self/fd/2", "stderr"},
		{"pts/ptmx", "ptmx"},
		{"/proc/kcore", "core"},
	} {
		if l[1] == "core" && !exists(l[0]) {
			continue
		}
		if err := os.Symlink(l[0], dev+"/"+l[1]); err != nil {
			return err
		}
	}
	return nil
}

// addDevices adds those of the guest that the config names, and raw volumes.
func addDevices(c *stageConfig) error {
	const dev = inside + "/dev"
	old := unix.Umask(0)
	defer unix.Umask(old)
	all := c.Privileged || slices.Contains(c.Devices, "all")
	devices := c.Devices
	if all {
		devices = guestDevices()
	}
	for _, d := range devices {
		if err := copyDevice(dev, d); err != nil && !all { // of all devices, one may just be coming or going
			return err
		}
	}
	for _, n := range c.Nodes {
		path := dev + strings.TrimPrefix(n.Path, "/dev")
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return err
		}
		if exists(path) {
			return fmt.Errorf("raw volume at %s: something else is there: choose another path", n.Path)
		}
		if err := makeNode(path, unix.S_IFBLK|0o660, n.Dev); err != nil {
			return err
		}
	}
	return nil
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

func makeNode(path string, mode uint32, dev uint64) error {
	if err := unix.Mknod(path, mode, int(dev)); err != nil && !errors.Is(err, unix.EEXIST) {
		return &os.PathError{Op: "make device", Path: path, Err: err}
	}
	return nil
}

// guestDevices lists the guest's own device nodes.
func guestDevices() []string {
	var found []string
	_ = filepath.WalkDir("/dev", func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.Type()&fs.ModeDevice != 0 {
			found = append(found, path)
		}
		return nil
	})
	return found
}

// copyDevice makes a node of the guest's devtmpfs in a container's /dev.
func copyDevice(dev, device string) error {
	source, target, _ := splitDevice(device)
	var st unix.Stat_t
	if err := unix.Stat(source, &st); err != nil || st.Mode&unix.S_IFMT != unix.S_IFCHR && st.Mode&unix.S_IFMT != unix.S_IFBLK {
		return fmt.Errorf("device %s: there is no such device in the guest", source)
	}
	rel, ok := strings.CutPrefix(target, "/dev/")
	if !ok {
		return fmt.Errorf("device %s: %s is not below /dev", source, target)
	}
	if err := os.MkdirAll(filepath.Dir(dev+"/"+rel), 0o755); err != nil {
		return err
	}
	path := dev + "/" + rel
	if err := makeNode(path, st.Mode, st.Rdev); err != nil {
		return err
	}
	return os.Lchown(path, int(st.Uid), int(st.Gid))
}

// docker's masks, moby daemon/pkg/oci/defaults.go.
var (
	maskedPaths = []string{
		"/proc/asound", "/proc/acpi", "/proc/interrupts", "/proc/kcore", "/proc/keys", "/proc/latency_stats", "/proc/timer_list", "/proc/timer_stats",
		"/proc/sched_debug", "/proc/scsi", "/sys/firmware", "/sys/devices/virtual/powercap",
	}
	readOnlyPaths = []string{"/proc/bus", "/proc/fs", "/proc/irq", "/proc/sysrq-trigger"} // and procSys, after the sysctls

	defaultShield = shield{Masked: maskedPaths, ReadOnly: readOnlyPaths}
)

const procSys = "/proc/sys"

// finishInside does what needs the container's own view: it is the root now.
func finishInside(c *stageConfig, slave *os.File) error {
	if slave != nil {
		if err := bindConsole(slave); err != nil {
			return err
		}
	}
	if err := unix.Sethostname([]byte(c.Hostname)); err != nil {
		return fmt.Errorf("set hostname %q: %w", c.Hostname, err)
	}
	if c.Domainname != "" {
		if err := unix.Setdomainname([]byte(c.Domainname)); err != nil {
			return fmt.Errorf("set domainname %q: %w", c.Domainname, err)
		}
	}
	for name, value := range c.Sysctls {
		if err := setSysctl(name, value); err != nil {
			return fmt.Errorf("sysctl %s: %w", name, err)
		}
	}
	switch {
	case c.Shield != nil:
		if err := c.Shield.raise(""); err != nil {
			return err
		}
	case !c.Privileged:
		if err := bind(procSys, procSys, unix.MOUNT_ATTR_RDONLY); err != nil {
			return err
		}
	}
	if c.ReadOnly {
		var st unix.Statfs_t
		if err := unix.Statfs("/", &st); err != nil {
			return fmt.Errorf("statfs /: %w", err)
		}
		keep := uintptr(st.Flags) & (unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC)
		if err := mount("", "/", "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY|keep, ""); err != nil {
			return err
		}
	}
	return nil
}

func bindConsole(slave *os.File) error {
	f, err := os.OpenFile("/dev/console", os.O_CREATE|os.O_WRONLY|os.O_EXCL|unix.O_NOFOLLOW, 0o600)
	if err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	if err == nil {
		f.Close()
	}
	return bind(slave.Name(), "/dev/console", 0)
}

// raise hides and write-protects what is below root.
func (s *shield) raise(root string) error {
	for _, path := range []string{"/sys/fs/cgroup", "/sys"} {
		if s.WritableSys || s.WritableCgroups && path != "/sys" {
			continue
		}
		if err := mount("", root+path, "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY|lockedMount, ""); err != nil {
			return err
		}
	}
	for _, p := range s.Masked {
		st, err := os.Stat(root + p)
		if err != nil {
			continue
		}
		if st.IsDir() {
			err = mount("tmpfs", root+p, "tmpfs", unix.MS_RDONLY, "size=0,nr_inodes=1")
		} else {
			err = bind("/dev/null", root+p, 0)
		}
		if err != nil {
			return err
		}
	}
	for _, p := range s.ReadOnly {
		if !exists(root + p) {
			continue
		}
		if err := bind(root+p, root+p, unix.MOUNT_ATTR_RDONLY); err != nil {
			return err
		}
	}
	return nil
}

// openTTY makes a terminal and hands its master to the agent.
func openTTY(c *stageConfig) (slave *os.File, err error) {
	if !c.TTY {
		return nil, nil
	}
	master, slave, err := makeTTY(c)
	if err != nil {
		return nil, err
	}
	defer master.Close()
	if err := unix.Sendmsg(stageSocket, []byte{ttyMark}, unix.UnixRights(int(master.Fd())), nil, 0); err != nil {
		return nil, fmt.Errorf("hand over terminal: %w", err)
	}
	return slave, nil
}

// makeTTY makes a terminal of the container's own devpts.
func makeTTY(c *stageConfig) (master, slave *os.File, err error) {
	fd, err := unix.Open("/dev/pts/ptmx", unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("make terminal: %w", err)
	}
	master = os.NewFile(uintptr(fd), "tty")
	defer func() {
		if err != nil {
			master.Close()
		}
	}()
	n, err := unix.IoctlGetInt(fd, unix.TIOCGPTN)
	if err != nil {
		return nil, nil, fmt.Errorf("number of terminal: %w", err)
	}
	if err := unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0); err != nil {
		return nil, nil, fmt.Errorf("unlock terminal: %w", err)
	}
	if c.Rows != 0 && c.Cols != 0 {
		if err := unix.IoctlSetWinsize(fd, unix.TIOCSWINSZ, &unix.Winsize{Row: c.Rows, Col: c.Cols}); err != nil {
			return nil, nil, fmt.Errorf("size of terminal: %w", err)
		}
	}
	slave, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("open terminal: %w", err)
	}
	return master, slave, nil
}

// What a stage says: ttyMark goes with the master's descriptor, execMark comes right before execve, and an error's JSON begins with a
// brace.
const (
	ttyMark  = 't'
	execMark = 'x'
)

// shortened leaves out the middle of a text that nobody would read and the agent would not take: a command may be of any length.
func shortened(text string) string {
	const longest = 4 << 10
	if len(text) <= longest {
		return text
	}
	return strings.ToValidUTF8(text[:longest/2], "") + "…" + strings.ToValidUTF8(text[len(text)-longest/4:], "")
}

// errStageDied is what there is to say of a stage that ended before its command began, without an error of its own.
var errStageDied = errors.New("the process that prepares the command ended unexpectedly")

// readStage reads what a stage has to say: nothing more once its command runs (nil), the master of its terminal, or why it failed.
func readStage(conn *net.UnixConn) (master *os.File, err error) {
	buf, oob := make([]byte, 4096), make([]byte, unix.CmsgSpace(4))
	var text []byte
	executes := false
	for {
		n, oobn, _, _, rerr := conn.ReadMsgUnix(buf, oob)
		if oobn > 0 {
			if f := receivedFile(oob[:oobn], "tty"); f != nil {
				master = f
			}
		}
		for _, b := range buf[:max(n, 0)] {
			switch {
			case len(text) > 0 || b != ttyMark && b != execMark:
				text = append(text, b)
			case b == execMark:
				executes = true
			}
		}
		if n <= 0 || rerr != nil || len(text) > 64<<10 {
			break
		}
	}
	if len(text) == 0 && executes {
		return master, nil
	}
	if master != nil {
		master.Close()
	}
	if len(text) == 0 {
		return nil, errStageDied
	}
	e := &stageError{Code: exitRefused}
	if err := json.Unmarshal(text, e); err != nil {
		e.Text = "the stage said " + string(text)
	}
	return nil, e
}

// receivedFile takes the descriptor out of a control message. A terminal's master is made non-blocking, so that reads end by Close.
func receivedFile(oob []byte, name string) *os.File {
	fds, err := receivedFDs(oob)
	if err != nil || len(fds) == 0 {
		return nil
	}
	unix.CloseOnExec(fds[0])
	_ = unix.SetNonblock(fds[0], true)
	return os.NewFile(uintptr(fds[0]), name)
}

func receivedFDs(oob []byte) ([]int, error) {
	msgs, err := unix.ParseSocketControlMessage(oob)
	if err != nil || len(msgs) == 0 {
		return nil, err
	}
	return unix.ParseUnixRights(&msgs[0])
}

// execute takes on the user, limits and capabilities and becomes the command.
func execute(c *stageConfig, slave *os.File, entering bool) error {
	u, err := lookupUser(c.User, c.Groups)
	if err != nil {
		return err
	}
	if err := takeStreams(slave, u.uid); err != nil {
		return err
	}
	if err := limitSelf(c); err != nil {
		return err
	}
	if lookupEnv(c.Env, "HOME") == "" {
		c.Env = mergeEnv(c.Env, []string{"HOME=" + u.home})
	}
	cwd := c.Cwd
	if cwd == "" {
		cwd = "/"
	}
	if !entering {
		// Best effort as in runc: what could not be made is seen by chdir.
		_ = os.MkdirAll(cwd, 0o755)
	}
	chdirErr := unix.Chdir(cwd)
	if err := takeUser(c, u); err != nil {
		return err
	}
	if chdirErr != nil {
		// The user may reach it where root without CAP_DAC_OVERRIDE does not.
		if err := unix.Chdir(cwd); err != nil {
			return &stageError{codeOf(err), fmt.Sprintf("chdir to cwd (%q) failed: %v", cwd, err)}
		}
	}
	if len(c.Args) == 0 {
		return &stageError{exitRefused, "no command specified"}
	}
	path, err := lookPath(c.Args[0], lookupEnv(c.Env, "PATH"))
	if err != nil {
		return err
	}
	argv := c.Args
	if c.Init {
		self, err := initExecutable()
		if err != nil {
			return err
		}
		path, argv = self, append([]string{initName, "--"}, c.Args...)
		// It closes the socket itself, when it takes signals: one that comes before would end it, or be lost.
		if _, err := unix.FcntlInt(stageSocket, unix.F_SETFD, 0); err != nil {
			return fmt.Errorf("hand the agent's socket on: %w", err)
		}
	}
	if _, err := unix.Write(stageSocket, []byte{execMark}); err != nil {
		return fmt.Errorf("tell the agent: %w", err)
	}
	err = syscall.Exec(path, argv, c.Env)
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EACCES) {
		return &stageError{codeOf(err), fmt.Sprintf("exec %s: %v", path, err)}
	}
	// As runc: the container has started, says so itself, and ends with 1.
	fmt.Fprintf(os.Stderr, "exec %s: %v\n", path, err)
	unix.Close(stageSocket)
	os.Exit(1)
	return nil
}

func codeOf(err error) int {
	switch {
	case errors.Is(err, unix.ENOENT):
		return exitNotFound
	case errors.Is(err, unix.EACCES), errors.Is(err, unix.EPERM):
		return exitNotExecutable
	}
	return exitRefused
}

// takeStreams makes the terminal stdin, stdout and stderr, or gives the pipes to the user.
func takeStreams(slave *os.File, uid int) error {
	if _, err := unix.Setsid(); err != nil && !errors.Is(err, unix.EPERM) { // EPERM: leads one already
		return fmt.Errorf("begin session: %w", err)
	}
	if slave == nil {
		return giveStreams([3]int{0, 1, 2}, uid)
	}
	fd := int(slave.Fd())
	if err := unix.Fchown(fd, uid, -1); err != nil {
		return fmt.Errorf("give terminal to user %d: %w", uid, err)
	}
	if err := unix.IoctlSetInt(fd, unix.TIOCSCTTY, 0); err != nil {
		return fmt.Errorf("take terminal: %w", err)
	}
	for i := range 3 {
		if err := unix.Dup3(fd, i, 0); err != nil {
			return fmt.Errorf("take terminal as stream %d: %w", i, err)
		}
	}
	return nil
}

// giveStreams makes pipes the user's, who may want to open /dev/stdout.
func giveStreams(fds [3]int, uid int) error {
	var null unix.Stat_t
	if err := unix.Stat("/dev/null", &null); err != nil {
		return fmt.Errorf("stat /dev/null: %w", err)
	}
	for i, fd := range fds {
		var st unix.Stat_t
		if err := unix.Fstat(fd, &st); err != nil {
			return fmt.Errorf("stat stream %d: %w", i, err)
		}
		if st.Rdev == null.Rdev && st.Mode&unix.S_IFMT == unix.S_IFCHR || int(st.Uid) == uid {
			continue
		}
		if err := unix.Fchown(fd, uid, int(st.Gid)); err != nil {
			return fmt.Errorf("give stream %d to user %d: %w", i, uid, err)
		}
	}
	return nil
}

func limitSelf(c *stageConfig) error {
	if err := setLimits(c.Limits); err != nil {
		return err
	}
	if err := os.WriteFile("/proc/self/oom_score_adj", fmt.Appendln(nil, c.OOMScore), 0); err != nil {
		return fmt.Errorf("set oom_score_adj: %w", err)
	}
	return nil
}

// takeUser changes this thread's ids and capabilities for good, in the order that leaves each step possible.
func takeUser(c *stageConfig, u *execUser) error {
	if err := boundCaps(c.Caps); err != nil {
		return err
	}
	if err := unix.Prctl(unix.PR_SET_KEEPCAPS, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("keep capabilities: %w", err)
	}
	groups := u.groupIDs()
	// Raw calls: the package syscall's would change all threads, and this one is all that is left after execve.
	var first *uint32
	if len(groups) > 0 {
		first = &groups[0]
	}
	if err := rawSetgroups(len(groups), first); err != nil {
		return fmt.Errorf("set groups: %w", err)
	}
	if _, _, errno := unix.RawSyscall(unix.SYS_SETRESGID, uintptr(u.gid), uintptr(u.gid), uintptr(u.gid)); errno != 0 {
		return fmt.Errorf("set group %d: %w", u.gid, errno)
	}
	if _, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, uintptr(u.uid), uintptr(u.uid), uintptr(u.uid)); errno != 0 {
		return fmt.Errorf("set user %d: %w", u.uid, errno)
	}
	if err := unix.Prctl(unix.PR_SET_KEEPCAPS, 0, 0, 0, 0); err != nil {
		return fmt.Errorf("keep capabilities no more: %w", err)
	}
	lo, hi := uint32(c.Caps), uint32(c.Caps>>32)
	if max, err := lastCapability(); err == nil && max < 63 {
		valid := uint64(1)<<(max+1) - 1
		lo, hi = lo&uint32(valid), hi&uint32(valid>>32)
	}
	// Nothing inheritable, as docker since CVE-2022-24769.
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	data := [2]unix.CapUserData{{Effective: lo, Permitted: lo}, {Effective: hi, Permitted: hi}}
	if err := unix.Capset(&header, &data[0]); err != nil {
		return fmt.Errorf("set capabilities: %w", err)
	}
	return forbidPrivs(c)
}

// boundCaps takes capabilities away from this thread's bounding set for good.
func boundCaps(keep capSet) error {
	for n := range capabilities {
		if keep&(1<<n) != 0 {
			continue
		}
		if err := unix.Prctl(unix.PR_CAPBSET_DROP, uintptr(n), 0, 0, 0); err != nil && !errors.Is(err, unix.EINVAL) { // EINVAL: not in this kernel
			return fmt.Errorf("drop capability %s: %w", capabilities[n], err)
		}
	}
	return nil
}

func forbidPrivs(c *stageConfig) error {
	if !c.NoNewPrivs {
		return nil
	}
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("set no_new_privs: %w", err)
	}
	return nil
}

// lookPath finds the command as runc does, with Go's own words (os/exec.LookPath).
func lookPath(name, path string) (string, error) {
	if strings.Contains(name, "/") {
		if err := executable(name); err != nil {
			return "", &stageError{codeOf(errors.Unwrap(err)), fmt.Sprintf("exec: %q: %v", name, err)}
		}
		return name, nil
	}
	for dir := range strings.SplitSeq(path, ":") {
		if dir == "" {
			dir = "."
		}
		if p := filepath.Join(dir, name); executable(p) == nil {
			return p, nil
		}
	}
	return "", &stageError{exitNotFound, fmt.Sprintf("exec: %q: executable file not found in $PATH", name)}
}

// executable says why path can't be executed by this user.
func executable(path string) error {
	st, err := os.Stat(path)
	if err != nil {
		return err
	}
	if st.IsDir() {
		return wrapped{unix.EACCES, "is a directory"}
	}
	if err := unix.Faccessat(unix.AT_FDCWD, path, unix.X_OK, unix.AT_EACCESS); err != nil || st.Mode()&0o111 == 0 {
		return wrapped{unix.EACCES, "permission denied"}
	}
	return nil
}

// wrapped is an error number in other words.
type wrapped struct {
	error
	text string
}

func (w wrapped) Error() string { return w.text }
func (w wrapped) Unwrap() error { return w.error }
