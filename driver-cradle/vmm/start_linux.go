package vmm

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// newMachine makes the run directory ready for a new machine.
func newMachine(c *Config, info Info) (_ *Machine, err error) {
	if err := os.MkdirAll(c.RunDir, 0o700); err != nil {
		return nil, fmt.Errorf("start machine: %w", err)
	}
	m := &Machine{
		dir: c.RunDir, log: c.Log, stderr: &tailBuffer{}, done: make(chan struct{}), dialing: make(chan struct{}, 1),
		events: map[string]chan struct{}{},
		state:  state{Version: stateVersion, Info: info, Disks: map[int]Disk{}},
	}
	m.dialing <- struct{}{}
	m.life, m.end = context.WithCancelCause(context.Background())
	m.client = m.newClient()
	if m.lock, err = attend(c.RunDir); err != nil {
		return nil, fmt.Errorf("start machine: %w", err)
	}
	defer func() {
		if err != nil {
			m.lock.Close()
		}
	}()
	if m.root, err = os.Open(c.RunDir); err != nil {
		return nil, fmt.Errorf("start machine: %w", err)
	}
	defer func() {
		if err != nil {
			m.root.Close()
		}
	}()
	if s, err := readState(c.RunDir); err == nil {
		p, err := s.lives()
		if err == nil {
			p.file.Close()
			return nil, fmt.Errorf("start machine: %s: process %d is running it already", c.RunDir, s.PID)
		}
		if !errors.Is(err, ErrNotRunning) {
			return nil, fmt.Errorf("start machine: %w", err)
		}
	}
	if m.state.BootID, err = bootID(); err != nil {
		return nil, fmt.Errorf("start machine: %w", err)
	}
	removeRun(m.root)
	os.Remove(filepath.Join(c.RunDir, consoleFile))
	return m, nil
}

// boot starts QEMU and brings the guest to its hello, from t or, where that is nil, cold. Nothing is left when it fails.
func (c *Config) boot(ctx context.Context, q *qemu, info Info, t *template) (*Machine, error) {
	m, err := newMachine(c, info)
	if err != nil {
		return nil, err
	}
	timeout := c.HelloTimeout
	if t != nil {
		timeout = min(timeout, restoreHelloTimeout)
	}
	ctx, cancel := context.WithTimeoutCause(ctx, timeout, fmt.Errorf("the guest did not answer within %v", timeout))
	defer cancel()
	m.state.Info.StartedAt = time.Now()
	if err := m.launch(c, q, t); err != nil {
		return nil, err
	}
	if err := m.bringUp(ctx, c, t); err != nil {
		return nil, fmt.Errorf("start machine: %w", m.abandon(err))
	}
	return m, nil
}

// abandon ends a machine that did not come up and adds what its remains tell.
func (m *Machine) abandon(err error) error {
	if errors.Is(err, errQMPClosed) {
		select { // QEMU is ending by itself: let it say why
		case <-m.done:
		case <-time.After(time.Second):
		}
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

// bringUp talks a new QEMU's guest into life.
func (m *Machine) bringUp(ctx context.Context, c *Config, t *template) error {
	if err := m.QMP(ctx, "qmp_capabilities", nil, nil); err != nil {
		return err
	}
	if t != nil {
		if err := m.restore(ctx, t); err != nil {
			return fmt.Errorf("restore template: %w", err)
		}
	}
	for lun, d := range c.Disks {
		if err := m.plug(ctx, lun, d); err != nil {
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
			return err
		}
	}
	if err := m.hello(ctx); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.state.Ready = true
	return m.state.write(m.dir)
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
func (m *Machine) launch(c *Config, q *qemu, t *template) (err error) {
	var files inherited
	defer files.close()
	info := &m.state.Info
	h := hardware{
		accel: info.Accel, memory: info.Memory, cpus: info.CPUs,
		machine: append([]string{c.Package.Manifest.Machine.Type}, c.Package.Manifest.Machine.Options...),
		globals: c.Package.Manifest.Machine.Globals,
		mac:     templateMAC, pageReporting: t == nil, sandbox: true,
	}
	started := false
	defer func() {
		if !started {
			removeRun(m.root)
			err = errors.Join(fmt.Errorf("start machine: %w", err), m.root.Close(), m.lock.Close())
		}
	}()
	if h.args, err = kernelArgs(c.Package.Manifest.Args, info.Accel); err != nil {
		return err
	}
	if t == nil && c.Net.MAC != "" {
		h.mac = c.Net.MAC
	}
	for _, f := range []struct {
		number *int
		path   string
	}{{&h.kernel, c.Package.Kernel()}, {&h.initramfs, c.Package.Initramfs()}} {
		if *f.number, err = files.open(f.path); err != nil {
			return err
		}
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
	if t != nil {
		h.incoming = true
		if h.ram, err = files.dup(t.ram); err != nil {
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
	child, err := spawn(q.path, h.arguments(), files.list, m.stderr, !c.Detached)
	if err != nil {
		return errors.Join(err, monitor.Close(), console.Close())
	}
	m.process = child.process
	info.PID, m.state.PID, m.state.StartTime = child.pid, child.pid, child.start
	if m.console, err = newConsole(m.dir, console); err == nil {
		// The state is there before QEMU does anything: whoever comes after this process finds it.
		err = m.state.write(m.dir)
	}
	if err != nil {
		child.abort()
		return errors.Join(err, monitor.Close(), console.Close())
	}
	m.monitor = newMonitor(monitor, m.onEvent)
	started = true
	go m.watch()
	child.goAhead()
	return nil
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
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return 0, fmt.Errorf("duplicate %s: %w", f.Name(), err)
	}
	return i.add(os.NewFile(uintptr(fd), f.Name())), nil
}

func (i *inherited) close() {
	for _, f := range i.list {
		f.Close()
	}
}
