package vmm

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cradlestack/cradlestack/driver-cradle/hostfile"
	"github.com/cradlestack/cradlestack/spec"
)

// init makes a Machine that knows nothing but its run directory.
func (m *Machine) init(dir string) {
	m.dir = dir
	m.done = make(chan struct{})
	m.dialing = make(chan struct{}, 1)
	m.dialing <- struct{}{}
	m.events = map[string]chan struct{}{}
	m.life, m.end = context.WithCancelCause(context.Background())
	m.client = m.newClient()
}

// newMachine makes the run directory ready for a new machine.
func newMachine(c *Config, info Info) (_ *Machine, err error) {
	boot, err := bootID()
	if err != nil {
		return nil, fmt.Errorf("start machine: %w", err)
	}
	if err := os.MkdirAll(c.RunDir, 0o700); err != nil {
		return nil, fmt.Errorf("start machine: %w", err)
	}
	m := &Machine{
		log: c.Log, stderr: &tailBuffer{},
		state: state{Version: stateVersion, BootID: boot, Info: info, Disks: map[int]Disk{}},
	}
	m.init(c.RunDir)
	if err := m.open(); err != nil {
		return nil, fmt.Errorf("start machine: %w", err)
	}
	if err := m.clear(); err != nil {
		return nil, errors.Join(fmt.Errorf("start machine: %w", err), m.root.Close(), hostfile.Unlock(m.lock))
	}
	return m, nil
}

// ErrRunning is what Start returns where a machine lives already.
var ErrRunning = errors.New("a machine is running already")

// clear removes what a machine that has ended left in the run directory.
func (m *Machine) clear() error {
	s, err := readState(m.dir)
	if errors.Is(err, ErrNotRunning) {
		s, err = nil, nil
	}
	if err != nil {
		return err
	}
	if s != nil {
		p, err := s.lives()
		if err == nil {
			p.file.Close()
			return fmt.Errorf("%s: %w as process %d", m.dir, ErrRunning, s.PID)
		}
		if !errors.Is(err, ErrNotRunning) {
			return err
		}
		old := Machine{state: *s, root: m.root}
		old.endDaemon()
		old.sweep()
	}
	removeRun(m.root)
	return ignoreNotExist(os.Remove(via(m.root, consoleFile)))
}

// A role is what a machine's memory is to it: its own, the template that it becomes, or the template that it comes from.
type role struct {
	ram      *os.File // nil: its own
	shared   bool     // the guest's writes go into ram
	incoming bool     // it waits for the rest of its state
}

// A restoreError is a failure of the template, in contrast to one of the pod's own disks and ports, and to somebody's killing it.
type restoreError struct{ error }

func (e restoreError) Unwrap() error { return e.error }

// boot starts QEMU and brings the guest to its hello, from t (which it takes over) or, where that is nil, cold. Nothing is left when it
// fails. A QEMU that may not use io_uring is not asked to again: a template is to be restored another time then, and its error says so.
func (c *Config) boot(ctx context.Context, q *qemu, info Info, t *template) (*Machine, error) {
	m, err := c.bootOnce(ctx, q, info, t)
	if err != nil && q.ioUring && ioUringRefused(err.Error()) {
		q.ioUring = false
		c.Log.Warn("disks are served by threads", "error", err)
		if t == nil {
			return c.bootOnce(ctx, q, info, nil)
		}
		return nil, restoreError{err}
	}
	return m, err
}

func (c *Config) bootOnce(ctx context.Context, q *qemu, info Info, t *template) (*Machine, error) {
	m, err := newMachine(c, info)
	if err != nil {
		t.release()
		return nil, err
	}
	timeout, r := c.HelloTimeout, role{}
	if t != nil {
		timeout, r = min(timeout, restoreHelloTimeout), role{ram: t.memory.file, incoming: true}
		m.template, m.state.Info.Template = t.memory, t.Name
	}
	ctx, cancel := context.WithTimeoutCause(ctx, timeout, fmt.Errorf("the guest did not answer within %v", timeout))
	defer cancel()
	m.state.Info.StartedAt = time.Now()
	places, later := c.arrange(t != nil)
	if err := m.launch(c, q, r, places); err != nil {
		return nil, err
	}
	if err := m.bringUp(ctx, c, t, later); err != nil {
		var re restoreError
		ofTemplate := errors.As(err, &re)
		if ofTemplate {
			err = re.error
		}
		err = m.abandon(ctx, err)
		if d, used := m.contended(); used {
			return nil, fmt.Errorf("start machine: attach disk %s: %w", d.Key, inUse(err, d))
		}
		if ofTemplate && !errors.Is(err, ErrKilled) {
			return nil, restoreError{fmt.Errorf("start machine: restore template %s: %w", t.Name, err)}
		}
		return nil, fmt.Errorf("start machine: %w", err)
	}
	return m, nil
}

// abandon ends a machine that did not come up and adds what its remains tell.
func (m *Machine) abandon(ctx context.Context, err error) error {
	if ctx.Err() == nil {
		m.letEnd(ctx)
	}
	if kerr := m.Kill(); kerr != nil {
		err = errors.Join(err, kerr)
	}
	if merr := m.Err(); merr != nil {
		err = merr
	} else if text := lastLines(m.console.text(), 10); text != "" {
		err = fmt.Errorf("%w; the console's last lines:\n%s", err, text)
	}
	return errors.Join(err, m.Close())
}

// letEnd waits for the end of a QEMU that is ending by itself, so that its reason and not that of Kill is known. Whatever broke first,
// one that ends does not answer any more: it has closed its monitor when its threads are gone, and no sooner.
func (m *Machine) letEnd(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, answerTimeout)
	defer cancel()
	if err := m.QMP(ctx, "query-name", nil, nil); err == nil || ctx.Err() != nil {
		return
	}
	select {
	case <-m.done:
	case <-time.After(endTimeout):
	}
}

const (
	answerTimeout = time.Second      // of a QEMU that is there
	endTimeout    = 10 * time.Second // of one that is ending; the kernel has its memory to free
)

// bringUp talks a new QEMU's guest into life, and plugs in the disks that it does not have yet.
func (m *Machine) bringUp(ctx context.Context, c *Config, t *template, disks []Disk) error {
	guest := func(err error) error {
		if err != nil && t != nil {
			return restoreError{err}
		}
		return err
	}
	if t != nil {
		if err := m.restore(ctx, t); err != nil {
			return guest(err)
		}
	} else if err := m.QMP(ctx, "qmp_capabilities", nil, nil); err != nil {
		return err
	}
	for i, d := range disks {
		if err := m.plug(ctx, m.state.Places+i, d); err != nil {
			return err
		}
	}
	if c.Net.Mode == NetUser {
		if err := m.plugUserNet(ctx, c.Net.Publish); err != nil {
			return err
		}
	}
	if t != nil {
		if err := m.QMP(ctx, "cont", nil, nil); err != nil {
			return guest(err)
		}
	}
	if err := m.hello(ctx); err != nil {
		return guest(err)
	}
	if t == nil {
		return m.calm()
	}
	return nil
}

// via gives a path below a directory that is short enough for a socket's address.
func via(root *os.File, name string) string {
	return fmt.Sprintf("/proc/self/fd/%d/%s", root.Fd(), name)
}

func dialUnix(root *os.File, name string) (*net.UnixConn, error) {
	return net.DialUnix("unix", nil, &net.UnixAddr{Name: via(root, name), Net: "unix"})
}

// listenUnix makes a listening socket for QEMU.
func listenUnix(root *os.File, name string) (*os.File, error) {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("socket %s: %w", name, err)
	}
	f := os.NewFile(uintptr(fd), name)
	if err := unix.Bind(fd, &unix.SockaddrUnix{Name: via(root, name)}); err != nil {
		f.Close()
		return nil, fmt.Errorf("bind %s: %w", name, err)
	}
	if err := errors.Join(unix.Listen(fd, 4), os.Chmod(via(root, name), 0o600)); err != nil {
		f.Close()
		return nil, fmt.Errorf("listen on %s: %w", name, err)
	}
	return f, nil
}

// launch starts the QEMU process and attends to it.
func (m *Machine) launch(c *Config, q *qemu, r role, places []place) (err error) {
	var files inherited
	defer files.close()
	info := &m.state.Info
	h := c.hardware(info.Accel, info.Memory)
	h.ramShared, h.incoming, h.pageReporting = r.shared, r.incoming, r.ram == nil
	started := false
	defer func() {
		if !started {
			m.sweep()
			m.template.release()
			err = errors.Join(fmt.Errorf("start machine: %w", err), m.root.Close(), hostfile.Unlock(m.lock))
		}
	}()
	khz, err := tscKHz()
	if err != nil {
		return err
	}
	h.args = kernelArgs(c.Package.Manifest.Args, info.Accel, khz)
	if r.ram == nil && c.Net.MAC != "" {
		h.mac = c.Net.MAC
	}
	if !r.incoming {
		if h.kernel, err = files.open(c.Package.Kernel()); err != nil {
			return err
		}
		if h.initramfs, err = files.open(c.Package.Initramfs()); err != nil {
			return err
		}
	}
	m.state.Places, h.places = len(places), places
	m.state.IOUring = q.ioUring && ioUringAllowed()
	for lun := range places {
		p := &places[lun]
		if p.disk == nil {
			continue
		}
		f, protocol, err := p.disk.open(m.state.IOUring)
		if err != nil {
			return fmt.Errorf("attach disk %s: %w", p.disk.Key, err)
		}
		p.number, p.protocol = files.add(f), protocol
		m.state.Disks[lun] = *p.disk
	}
	for _, s := range []struct {
		number *int
		name   string
	}{{&h.control, controlSock}, {&h.qmp, qmpSock}, {&h.console, consoleSock}} {
		l, err := listenUnix(m.root, s.name)
		if err != nil {
			return err
		}
		*s.number = files.add(l)
	}
	if c.Net.Mode == NetTap {
		if h.tap, err = files.dup(c.Net.Tap); err != nil {
			return err
		}
	}
	if r.ram != nil {
		if h.ram, err = files.dup(r.ram); err != nil {
			return err
		}
	}
	// What this process holds of QEMU's is there before QEMU is: from here on the machine's own ways of ending apply.
	monitor, err := dialUnix(m.root, qmpSock)
	if err != nil {
		return err
	}
	console, err := dialUnix(m.root, consoleSock)
	if err != nil {
		return errors.Join(err, monitor.Close())
	}
	conf := confinement{
		Path: q.path, UID: userOf(c.FirstUID, m.dir), Mount: m.dir, Leashed: !c.Detached, NoFile: qemuFiles, Network: c.Net.Mode == NetUser,
		KVM: info.Accel == KVM,
	}
	// An idle QEMU is smaller by 6 MiB with one arena for its many threads, which hardly allocate, and without huge pages in the
	// cache of translated code, which is not slower for it. With KVM there is no such cache, and huge pages are the guest's.
	conf.Env, conf.NoTHP = []string{"MALLOC_ARENA_MAX=1"}, info.Accel == TCG
	if !r.incoming {
		conf.Nice = bootNice
	}
	for _, s := range c.Shares {
		conf.Shares = append(conf.Shares, bind(s))
		conf.Caps = shareCaps
	}
	for _, p := range c.Net.Publish {
		if p.HostPort != 0 && p.HostPort < firstFreePort() {
			conf.Caps = append(conf.Caps[:len(conf.Caps):len(conf.Caps)], unix.CAP_NET_BIND_SERVICE)
			break
		}
	}
	group, err := c.cgroup()
	if err != nil {
		return errors.Join(err, monitor.Close(), console.Close())
	}
	defer group.Close()
	if c.Net.Mode == NetUser {
		m.state.Group = group.Name()
	}
	var daemon *child
	if len(c.Virtiofs) > 0 {
		var conn *os.File
		if daemon, conn, err = m.spawnVirtiofs(c, group); err != nil {
			return errors.Join(err, monitor.Close(), console.Close())
		}
		h.virtiofs = files.add(conn)
		m.daemon, m.state.Virtiofs = daemon.process, &daemonHandle{daemon.pid, daemon.start}
	}
	conf.Args = h.arguments()
	child, err := spawn(&conf, files.list, group, m.stderr)
	if err != nil {
		daemon.abort()
		return errors.Join(err, monitor.Close(), console.Close())
	}
	m.process = child.process
	info.PID, m.state.PID, m.state.StartTime = child.pid, child.pid, child.start
	if m.console, err = newConsole(m.dir, console); err == nil {
		// The state is there before QEMU does anything: whoever comes after this process finds it.
		err = m.state.write(m.dir)
	}
	if err != nil {
		daemon.abort()
		child.abort()
		return errors.Join(err, monitor.Close(), console.Close())
	}
	m.monitor = newMonitor(monitor, m.onEvent)
	started = true
	go m.watch()
	if err := c.join(child, daemon); err != nil {
		daemon.abort()
		return errors.Join(fmt.Errorf("start machine: %w", err), m.Kill(), m.Close())
	}
	// Who ends before its go-ahead is watch's to report.
	if err := errors.Join(daemon.goAhead(), child.goAhead()); err != nil {
		m.log.Debug("go-ahead", "error", err)
	}
	return nil
}

// cgroup opens the one that QEMU starts in; nil is this process's own.
func (c *Config) cgroup() (*os.File, error) {
	if c.Net.Mode == NetUser {
		return noLoopback(c.Cgroup)
	}
	if c.Cgroup == "" {
		return nil, nil
	}
	return os.Open(c.Cgroup)
}

// join puts processes that wait for their go-ahead into the configuration's further cgroups.
func (c *Config) join(children ...*child) error {
	for _, group := range c.Join {
		for _, ch := range children {
			if ch == nil {
				continue
			}
			if err := os.WriteFile(filepath.Join(group, "cgroup.procs"), []byte(strconv.Itoa(ch.pid)), 0); err != nil {
				return fmt.Errorf("join cgroup %s: %w", group, err)
			}
		}
	}
	return nil
}

// bootNice lets a booting guest measure its timers undisturbed: one that loses ticks then falls back to a timer that costs it a
// hundredth of a processor for as long as it lives. The agent's hello ends it.
const bootNice = -15

// calm gives QEMU's threads the priority of this process's. New threads have their creator's, so what appears meanwhile is found in
// the second round.
func (m *Machine) calm() error {
	// The system call's answer is 20 less the priority (getpriority(2)).
	p, err := unix.Getpriority(unix.PRIO_PROCESS, 0)
	if err != nil {
		return fmt.Errorf("get priority: %w", err)
	}
	for range 2 {
		tasks, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", m.process.pid))
		if err != nil {
			return ignoreNotExist(err)
		}
		for _, t := range tasks {
			tid, err := strconv.Atoi(t.Name())
			if err != nil {
				continue
			}
			if err := unix.Setpriority(unix.PRIO_PROCESS, tid, 20-p); err != nil && !errors.Is(err, unix.ESRCH) {
				return fmt.Errorf("set priority of thread %d: %w", tid, err)
			}
		}
	}
	return nil
}

// qemuFiles is how many files QEMU may have open: 9p keeps those of the guest open as long as it can.
const qemuFiles = 16 << 10

// hardware is what machines of this configuration have in common, whatever their role.
func (c *Config) hardware(accel string, memory spec.Bytes) hardware {
	return hardware{
		machine: append([]string{c.Package.Manifest.Machine.Type}, c.Package.Manifest.Machine.Options...),
		globals: c.Package.Manifest.Machine.Globals,
		accel:   accel, memory: memory, cpus: c.CPUs, mac: templateMAC, shares: sharesDir,
	}
}

// Files that a new process inherits are numbered from 3.
type inherited struct{ list []*os.File }

// add takes f over.
func (i *inherited) add(f *os.File) (number int) {
	i.list = append(i.list, f)
	return 2 + len(i.list)
}

func (i *inherited) open(path string) (number int, err error) {
	f, err := os.Open(path)
	if err != nil {
		return 0, err
	}
	return i.add(f), nil
}

func (i *inherited) dup(f *os.File) (number int, err error) {
	rc, err := f.SyscallConn() // Fd would make it blocking
	if err != nil {
		return 0, err
	}
	var fd int
	cerr := rc.Control(func(of uintptr) { fd, err = unix.FcntlInt(of, unix.F_DUPFD_CLOEXEC, 0) })
	if err = errors.Join(cerr, err); err != nil {
		return 0, fmt.Errorf("duplicate %s: %w", f.Name(), err)
	}
	return i.add(os.NewFile(uintptr(fd), f.Name())), nil
}

func (i *inherited) close() {
	for _, f := range i.list {
		f.Close()
	}
}
