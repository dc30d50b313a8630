package vmm

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/cradlestack/cradlestack/driver-cradle/hostfile"
	"github.com/cradlestack/cradlestack/driver-cradle/wire"
)

// A Machine is a running virtual machine that this process attends to.
type Machine struct {
	dir  string
	root *os.File // the run directory: sockets in it are reached through it, whatever its path's length
	lock *os.File
	log  *slog.Logger

	template *memory // that the guest's memory is a copy of, nil after a cold start
	process  *process
	daemon   *process    // virtiofsd, or nil; it ends with its connection to QEMU
	stderr   *tailBuffer // nil for a machine that was taken up
	monitor  *monitor
	console  *console
	client   *http.Client

	life context.Context // until the machine has ended or was let go
	end  context.CancelCauseFunc
	done chan struct{}
	err  error // valid once done is closed

	dialing chan struct{} // holds one token: the right to begin a session

	mu      sync.Mutex
	state   state
	session *wire.Session
	killed  bool
	closed  bool
	ended   bool
	reason  string                   // of QEMU's SHUTDOWN event
	events  map[string]chan struct{} // that somebody waits for
}

// errClosed is the error of everything that is asked of a Machine after Close.
var errClosed = errors.New("machine was let go")

// Done is closed when QEMU has ended or the Machine was closed.
func (m *Machine) Done() <-chan struct{} { return m.done }

// Err tells, once Done is closed, why the machine ended: nil after Kill and Close, a *PanicError after a guest's panic.
func (m *Machine) Err() error {
	select {
	case <-m.done:
		return m.err
	default:
		return nil
	}
}

// Info tells how the machine was started, and which of its disks have failed.
func (m *Machine) Info() Info {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.state.Info
}

// Console is the last output of the guest's console, at most 64 KiB.
func (m *Machine) Console() string { return m.console.text() }

// Kill ends the machine at once and returns when it has ended.
func (m *Machine) Kill() error {
	m.mu.Lock()
	if m.ended {
		m.mu.Unlock()
		return nil
	}
	if m.reason == "" {
		m.killed = true
	}
	m.mu.Unlock()
	if err := m.process.kill(); err != nil {
		return err
	}
	<-m.done
	return nil
}

// Keep makes the machine one that another process can take up. Until then its start is not complete, and whoever comes after this process ends it.
func (m *Machine) Keep() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.state.Ready = true
	return m.state.write(m.dir)
}

// Close lets the machine go without ending it (one that is not Detached ends with the process that started it). Everything that Open
// returned ends.
func (m *Machine) Close() error {
	m.mu.Lock()
	if m.closed {
		m.mu.Unlock()
		return nil
	}
	m.closed = true
	m.mu.Unlock()
	m.end(errClosed)
	m.client.CloseIdleConnections()
	m.process.file.Close() // watch returns
	<-m.done
	if m.daemon != nil {
		m.daemon.file.Close()
	}
	m.monitor.close()
	m.console.close()
	return errors.Join(m.root.Close(), hostfile.Unlock(m.lock))
}

// watch waits for QEMU's end and finds out about the reason.
func (m *Machine) watch() {
	defer close(m.done)
	ended := m.process.wait() == nil
	if ended {
		m.gone()
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.ended = ended
	m.template.release()
	if ended && !m.killed {
		m.err = m.postMortem(m.reason)
	}
	if m.err != nil {
		m.end(m.err)
	}
	m.end(errEnded)
	if m.session != nil {
		m.session.Close()
	}
}

// gone removes what another process would take up.
func (m *Machine) gone() {
	if m.daemon != nil {
		_ = m.daemon.kill() // it ends with QEMU by itself
	}
	m.console.ended()
	<-m.monitor.done
	m.sweep()
}

// sweep removes what a machine that has ended leaves.
func (m *Machine) sweep() {
	removeRun(m.root)
	if m.state.Group != "" {
		removeGroup(m.state.Group)
	}
}

func removeRun(root *os.File) {
	for _, name := range []string{stateFile, controlSock, qmpSock, consoleSock, virtiofsSock} {
		os.Remove(via(root, name))
	}
}

// postMortem finds out why QEMU ended without having been asked to; reason is that of its SHUTDOWN event.
func (m *Machine) postMortem(reason string) error {
	var how error
	if m.process.reaped != nil {
		how = <-m.process.reaped
	}
	if p := findPanic(m.console.text()); p != nil {
		return p
	}
	if reason == "host-signal" {
		return fmt.Errorf("QEMU ended after a signal: %w", ErrKilled)
	}
	if reason != "" {
		return fmt.Errorf("the guest ended by itself (%s)", reason)
	}
	says := ""
	if m.stderr != nil {
		if text := withoutWarnings(m.stderr.String()); text != "" {
			says = ": " + lastLines(text, 5)
		}
	}
	var exit *exec.ExitError
	if errors.As(how, &exit) {
		if status, ok := exit.Sys().(syscall.WaitStatus); ok && status.Signaled() {
			return &signalError{status.Signal(), says}
		}
	}
	return errors.New("QEMU ended" + says)
}

// ErrKilled is part of the error of a machine whose QEMU somebody else has ended: an operator, another process by Kill, the kernel for
// want of memory.
var ErrKilled = errors.New("killed from outside")

// A signalError is QEMU's end by a signal. Those that it does not send itself are ErrKilled.
type signalError struct {
	signal syscall.Signal
	says   string
}

func (e *signalError) Error() string {
	return fmt.Sprintf("QEMU was killed by signal %d (%v)%s", e.signal, e.signal, e.says)
}

func (e *signalError) Is(target error) bool {
	return target == ErrKilled && (e.signal == syscall.SIGKILL || slices.Contains(enders, e.signal))
}

// withoutWarnings drops QEMU's warnings, which tell nothing about its end.
func withoutWarnings(text string) string {
	var kept strings.Builder
	for line := range strings.Lines(text) {
		if !strings.Contains(line, ": warning: ") {
			kept.WriteString(line)
		}
	}
	return kept.String()
}

// onEvent is called by the monitor's reader.
func (m *Machine) onEvent(name string, data json.RawMessage) {
	var e struct {
		Reason string `json:"reason"`
		Device string `json:"device"`
		Status string `json:"status"`
		ID     string `json:"id"`
		Open   bool   `json:"open"`
	}
	if json.Unmarshal(data, &e) != nil {
		return
	}
	if name == "BLOCK_IO_ERROR" {
		m.diskFailed(data)
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	switch name {
	case "SHUTDOWN":
		m.reason = e.Reason
	case "DEVICE_DELETED":
		m.happened("deleted " + e.Device)
	case "VSERPORT_CHANGE":
		if e.ID == "control" && e.Open {
			m.happened("agent")
		}
	case "MIGRATION":
		m.happened("migration " + e.Status)
	}
}

func (m *Machine) happened(what string) {
	if c, ok := m.events[what]; ok {
		close(c)
		delete(m.events, what)
	}
}

// expect returns a channel that is closed when an event has come. Call it before what causes the event.
func (m *Machine) expect(what string) <-chan struct{} {
	m.mu.Lock()
	defer m.mu.Unlock()
	c := make(chan struct{})
	m.events[what] = c
	return c
}

// await waits for one of two events (the second may be nil), QEMU's end or ctx.
func (m *Machine) await(ctx context.Context, first, second <-chan struct{}) (<-chan struct{}, error) {
	select {
	case <-first:
		return first, nil
	case <-second:
		return second, nil
	case <-m.monitor.done:
		return nil, errQMPClosed
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

// QMP executes one command of QEMU's machine protocol.
func (m *Machine) QMP(ctx context.Context, command string, args, reply any) error {
	return m.monitor.call(ctx, command, args, reply)
}

// Hold gives QEMU a file to have open as long as it lives, without using it: the writing end of a pipe whose reader is not to see an end when this process
// ends. Another one of the same name takes its place.
func (m *Machine) Hold(ctx context.Context, name string, f *os.File) error {
	return m.monitor.call(ctx, "getfd", map[string]any{"fdname": name}, nil, f)
}

// Open opens a stream to the guest. It begins a new session when the last one has broken.
func (m *Machine) Open(ctx context.Context) (net.Conn, error) {
	for try := 0; ; try++ {
		s, err := m.attached(ctx)
		if err != nil {
			return nil, err
		}
		c, err := s.Open(ctx)
		if err == nil {
			return c, nil
		}
		if try == 1 || ctx.Err() != nil {
			return nil, fmt.Errorf("guest: %w", err)
		}
		s.Close()
	}
}

// attached returns the session, a new one when there is none.
func (m *Machine) attached(ctx context.Context) (*wire.Session, error) { return m.attachedAt(ctx, nil) }

// attachedAt is attached for a guest that may have to be born first.
func (m *Machine) attachedAt(ctx context.Context, birth func() *wire.Birth) (*wire.Session, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	defer context.AfterFunc(m.life, func() { cancel(context.Cause(m.life)) })()
	select {
	case <-m.dialing:
		defer func() { m.dialing <- struct{}{} }()
	case <-ctx.Done():
		return nil, fmt.Errorf("guest: %w", context.Cause(ctx))
	}
	m.mu.Lock()
	s := m.session
	m.mu.Unlock()
	if s != nil && !s.IsClosed() {
		return s, nil
	}
	if m.life.Err() != nil {
		return nil, fmt.Errorf("guest: %w", context.Cause(m.life))
	}
	conn, err := dialUnix(m.root, controlSock)
	if err != nil {
		return nil, fmt.Errorf("guest: %w", err)
	}
	if s, err = wire.Dial(ctx, conn, birth); err != nil {
		return nil, fmt.Errorf("guest: %w", err)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.life.Err() != nil { // watch has closed the session before
		s.Close()
		return nil, fmt.Errorf("guest: %w", context.Cause(m.life))
	}
	m.session = s
	return s, nil
}

var errEnded = errors.New("the machine has ended")

// Client speaks HTTP with the guest. The host part of URLs is ignored.
func (m *Machine) Client() *http.Client { return m.client }

func (m *Machine) newClient() *http.Client {
	return &http.Client{
		Transport: &http.Transport{
			DialContext:        func(ctx context.Context, _, _ string) (net.Conn, error) { return m.Open(ctx) },
			DisableKeepAlives:  true, // a stream costs nothing, and an idle one could be of a session that is gone
			DisableCompression: true,
		},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
}

// hello makes the guest an individual. It returns when the agent has answered.
func (m *Machine) hello(ctx context.Context) error {
	_, err := m.attachedAt(ctx, func() *wire.Birth { // called when the agent answers, which may take a second
		b := &wire.Birth{Time: time.Now()}
		rand.Read(b.Entropy[:])
		return b
	})
	return err
}
