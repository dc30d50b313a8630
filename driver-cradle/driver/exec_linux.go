package driver

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/nomad/plugins/drivers"
	"github.com/hashicorp/nomad/plugins/drivers/proto"

	"github.com/cradlestack/cradlestack/driver-cradle/pod"
	"github.com/cradlestack/cradlestack/spec"
)

// ExecTask runs a command in the task's container and collects its output.
func (d *Driver) ExecTask(taskID string, cmd []string, timeout time.Duration) (*drivers.ExecTaskResult, error) {
	t, err := d.task(taskID)
	if err != nil {
		return nil, err
	}
	if len(cmd) > 0 && cmd[0] == spec.TunnelCommand {
		return nil, fmt.Errorf("%s is a connection, and nothing that a check could execute", spec.TunnelCommand)
	}
	ctx, cancel := d.ctx, context.CancelFunc(func() {})
	if timeout > 0 {
		ctx, cancel = context.WithTimeoutCause(d.ctx, timeout, fmt.Errorf("the command did not end within %v", timeout))
	}
	defer cancel()
	var out, errs limited
	result, err := t.exec(ctx, execution{command: cmd, stdout: &out, stderr: &errs})
	if err != nil {
		return nil, err
	}
	return &drivers.ExecTaskResult{Stdout: out.Bytes(), Stderr: errs.Bytes(), ExitResult: result}, nil
}

// A limited buffer keeps the beginning of what is written.
type limited struct{ bytes.Buffer }

const maxCollected = 4 << 20

func (l *limited) Write(p []byte) (int, error) {
	l.Buffer.Write(p[:min(len(p), max(maxCollected-l.Len(), 0))])
	return len(p), nil
}

// ExecTaskStreamingRaw runs a command in a container of the task, connected with Nomad's client; or it is a tunnel.
func (d *Driver) ExecTaskStreamingRaw(ctx context.Context, taskID string, command []string, tty bool, stream drivers.ExecTaskStream) error {
	if len(command) > 0 && command[0] == spec.TunnelCommand {
		return d.tunnel(ctx, taskID, command, tty, stream)
	}
	t, err := d.task(taskID)
	if err != nil {
		return err
	}
	out := &frames{stream: stream}
	stdin, typed := io.Pipe()
	defer stdin.Close() // who waits for input to be taken
	sizes := make(chan drivers.TerminalSize, 2)
	all := make(chan struct{})
	go listen(ctx, stream, typed, sizes, all) // it ends with the stream, which is after this function
	result, err := t.exec(ctx, execution{
		command: command, tty: tty, stdin: stdin, resize: sizes, stdout: writerFunc(out.stdout), stderr: writerFunc(out.stderr),
	})
	if err != nil {
		return err
	}
	end := &proto.ExecTaskStreamingIOOperation{Close: true}
	for _, m := range []*drivers.ExecTaskStreamingResponseMsg{{Stdout: end}, {Stderr: end}, drivers.NewExecStreamingResponseExit(result.ExitCode)} {
		if err := stream.Send(m); err != nil {
			return err
		}
	}
	untilPassed(ctx, all)
	return nil
}

// untilPassed waits for the end of what Nomad's client sends to a command that has ended. The client loses what it has not read yet, the exit code above all, if the stream ends
// before it has passed its input on (plugins/drivers/client.go, ExecTaskStreamingRaw): its user is told "unexpected EOF". Nobody waits for this: who has the exit code is done.
func untilPassed(ctx context.Context, all <-chan struct{}) {
	select {
	case <-all:
	case <-time.After(inputPatience):
	case <-ctx.Done():
	}
}

// inputPatience is how long the end of the input may come after that of the command.
const inputPatience = time.Second

// listen takes what Nomad's client sends to a command. It closes all when that was everything.
func listen(ctx context.Context, stream drivers.ExecTaskStream, typed *io.PipeWriter, sizes chan<- drivers.TerminalSize, all chan<- struct{}) {
	over := sync.OnceFunc(func() { close(all) })
	for {
		m, err := stream.Recv()
		if err != nil {
			over()
			return
		}
		switch {
		case m.Stdin != nil && m.Stdin.Close:
			typed.Close()
			over()
		case m.Stdin != nil:
			_, _ = typed.Write(m.Stdin.Data) // a command may have ended, or take no input
		case m.TtySize != nil:
			select {
			case sizes <- drivers.TerminalSize{Height: int(m.TtySize.Height), Width: int(m.TtySize.Width)}:
			case <-ctx.Done():
				return
			}
		}
	}
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }

// An execution is a command that is to be run.
type execution struct {
	command        []string
	tty            bool
	stdin          io.ReadCloser // nil: none
	stdout, stderr io.Writer
	resize         <-chan drivers.TerminalSize
}

// containerOption is how a command is run in another container than the task's own.
const containerOption = "--container="

// target finds the container that a command is for.
func (e *execution) target(r *pod.Running) (string, error) {
	containers := r.Launch().Containers
	if len(e.command) == 0 {
		return "", errors.New("there is no command")
	}
	if e.command[0]+"=" == containerOption {
		return "", fmt.Errorf("write %sNAME, with the name of one of the pod's containers", containerOption)
	}
	name, ok := strings.CutPrefix(e.command[0], containerOption)
	if !ok {
		return containers[0].Name, nil
	}
	e.command = e.command[1:]
	if len(e.command) == 0 {
		return "", fmt.Errorf("there is no command behind %s%s", containerOption, name)
	}
	var known []string
	for _, c := range containers {
		if c.Name == name {
			return name, nil
		}
		known = append(known, c.Name)
	}
	return "", fmt.Errorf("the pod has no container %q: it has %s", name, strings.Join(known, ", "))
}

// exec runs a command to its end. A command that can't be run is a result, with docker's exit code for it.
func (t *task) exec(ctx context.Context, e execution) (*drivers.ExitResult, error) {
	r, err := t.ready(ctx)
	if err != nil {
		return nil, err
	}
	container, err := e.target(r)
	if err != nil {
		return e.refused(err.Error()), nil
	}
	// docker's ExecConfig (moby api/swagger.yaml).
	create := map[string]any{
		"AttachStdin": e.stdin != nil, "AttachStdout": true, "AttachStderr": !e.tty, "Tty": e.tty, "Cmd": e.command,
	}
	size, sized := e.firstSize()
	if sized {
		create["ConsoleSize"] = [2]int{size.Height, size.Width}
	}
	var made struct{ ID string }
	g := r.Guest()
	var refused *pod.GuestError
	if err := g.Call(ctx, http.MethodPost, "/containers/"+container+"/exec", nil, create, &made); errors.As(err, &refused) {
		return e.refused(refused.Message), nil
	} else if err != nil {
		return nil, fmt.Errorf("exec in container %s: %w", container, err)
	}
	path := "/exec/" + made.ID
	s, err := g.Hijack(ctx, path+"/start", nil, map[string]bool{"Tty": e.tty})
	if errors.As(err, &refused) {
		return e.refused(refused.Message), nil
	}
	if err != nil {
		return nil, fmt.Errorf("exec in container %s: %w", container, err)
	}
	if err := t.stream(ctx, g, path, s, &e); err != nil {
		return nil, fmt.Errorf("exec in container %s: %w", container, err)
	}
	var state struct{ ExitCode *int }
	if err := g.Call(ctx, http.MethodGet, path+"/json", nil, nil, &state); err != nil {
		return nil, fmt.Errorf("exit code of the command in container %s: %w", container, err)
	}
	if state.ExitCode == nil {
		return nil, fmt.Errorf("exec in container %s: the connection ended before the command", container)
	}
	return &drivers.ExitResult{ExitCode: *state.ExitCode}, nil
}

// refused is the result of a command that is not run: why is told on its standard error.
func (e *execution) refused(why string) *drivers.ExitResult {
	fmt.Fprintln(e.stderr, why)
	return &drivers.ExitResult{ExitCode: execCode(why)}
}

// execCode is docker's exit code for a command that was not executed.
func execCode(message string) int {
	switch {
	case strings.Contains(message, "not found"), strings.Contains(message, "no such file"):
		return 127
	case strings.Contains(message, "permission denied"):
		return 126
	}
	return 125
}

// firstSize is a terminal size that is known already.
func (e *execution) firstSize() (size drivers.TerminalSize, ok bool) {
	if !e.tty {
		return size, false
	}
	for {
		select {
		case s, open := <-e.resize:
			if !open {
				return size, ok
			}
			size, ok = s, true
		default:
			return size, ok
		}
	}
}

// stream connects a command that has started with its client, until its output ends.
func (t *task) stream(ctx context.Context, g *pod.Guest, path string, s *pod.Stream, e *execution) error {
	ctx, cancel := context.WithCancelCause(ctx)
	var helpers sync.WaitGroup
	defer helpers.Wait()
	defer cancel(nil)
	stop := context.AfterFunc(ctx, func() { s.Close() })
	defer func() {
		stop()
		s.Close()
	}()
	if e.stdin != nil {
		// Nomad's Reader may not return before the client goes: nobody waits for it.
		go func() {
			_, _ = io.Copy(s, e.stdin) // the command may have closed its input
			_ = s.CloseWrite()
		}()
	} else if err := s.CloseWrite(); err != nil {
		return err
	}
	if e.tty && e.resize != nil {
		helpers.Go(func() { e.followSize(ctx, g, path) })
	}
	var err error
	if e.tty {
		_, err = io.Copy(e.stdout, s)
	} else {
		err = demultiplex(s, e.stdout, e.stderr)
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return err
}

// followSize tells the guest each new size of the terminal. The stream is there a moment before the command, which has no size then: it is told again.
func (e *execution) followSize(ctx context.Context, g *pod.Guest, path string) {
	var size drivers.TerminalSize
	var again <-chan time.Time
	for sizes := e.resize; sizes != nil || again != nil; {
		select {
		case next, ok := <-sizes:
			if !ok {
				sizes = nil
				continue
			}
			size = next
		case <-again:
		case <-ctx.Done():
			return
		}
		q := url.Values{"h": {strconv.Itoa(size.Height)}, "w": {strconv.Itoa(size.Width)}}
		again = nil
		if err := g.Call(ctx, http.MethodPost, path+"/resize", q, nil, nil); err != nil {
			again = time.After(20 * time.Millisecond)
		}
	}
}

// demultiplex takes docker's stream apart: frames with a header of 8 bytes, the stream's number first, the length big-endian last.
func demultiplex(r io.Reader, stdout, stderr io.Writer) error {
	var header [8]byte
	for {
		if _, err := io.ReadFull(r, header[:]); err == io.EOF {
			return nil
		} else if err != nil {
			return err
		}
		w := stdout
		switch header[0] {
		case 1:
		case 2:
			w = stderr
		default:
			return fmt.Errorf("the guest sent %x instead of a frame's header", header)
		}
		if _, err := io.CopyN(w, r, int64(binary.BigEndian.Uint32(header[4:]))); err != nil {
			return err
		}
	}
}
