package driver

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/hashicorp/nomad/plugins/drivers"
	"github.com/hashicorp/nomad/plugins/drivers/proto"

	"github.com/cradlestack/cradlestack/driver-cradle/pod"
	"github.com/cradlestack/cradlestack/spec"
)

// exitRefused is the exit code of a tunnel that there is not, or no longer.
const exitRefused = 125

// tunnel connects an exec's stream with docker's API of the task's pod, as spec.TunnelCommand says.
func (d *Driver) tunnel(ctx context.Context, taskID string, command []string, tty bool, stream drivers.ExecTaskStream) error {
	out := &frames{stream: stream}
	conn, at, err := d.dialTunnel(ctx, taskID, command, tty)
	if err != nil {
		return refuse(ctx, err, stream, out)
	}
	code := 0
	if err := carry(ctx, conn, at, stream, out); err != nil {
		_ = out.tell(err.Error() + "\n") // nobody is there who could be told otherwise
		code = exitRefused
	}
	return stream.Send(drivers.NewExecStreamingResponseExit(code))
}

// refuse says why there is no tunnel.
func refuse(ctx context.Context, why error, stream drivers.ExecTaskStream, out *frames) error {
	_ = out.tell(why.Error() + "\n") // as above
	if err := stream.Send(drivers.NewExecStreamingResponseExit(exitRefused)); err != nil {
		return err
	}
	ignored, typed := io.Pipe()
	ignored.Close()
	all := make(chan struct{})
	go listen(ctx, stream, typed, make(chan drivers.TerminalSize, 2), all) // it ends with the stream, which is after this function
	untilPassed(ctx, all)
	return nil
}

// dialTunnel connects to a pod, and says where that is to be had as well.
func (d *Driver) dialTunnel(ctx context.Context, taskID string, command []string, tty bool) (conn *net.UnixConn, at string, err error) {
	switch {
	case len(command) > 1:
		return nil, "", fmt.Errorf("%s takes no arguments: it is a connection to docker's API of the pod", spec.TunnelCommand)
	case tty:
		return nil, "", fmt.Errorf("%s is a stream of bytes: switch the terminal off (-t=false)", spec.TunnelCommand)
	}
	t, err := d.task(taskID)
	if err != nil {
		return nil, "", err
	}
	if _, err := t.live(); err != nil {
		return nil, "", err
	}
	dir := filepath.Join(t.dir, podDir)
	p, err := pod.Open(dir, d.log)
	if err != nil {
		return nil, "", err
	}
	c, err := p.Dial(ctx)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ECONNREFUSED) {
		return nil, "", errTaskEnded // its end is not noted yet
	}
	if err != nil {
		return nil, "", err
	}
	return c.(*net.UnixConn), filepath.Join(dir, pod.SocketFile), nil
}

// Sizes of what a tunnel carries at once: Nomad's agents take each message apart twice, whatever its size.
const (
	leastCarried = 4 << 10
	mostCarried  = 128 << 10
)

// carry tells where conn leads and copies until both directions have ended, one of the sides is gone, or ctx ends.
func carry(ctx context.Context, conn *net.UnixConn, at string, stream drivers.ExecTaskStream, out *frames) error {
	var output sync.WaitGroup
	defer output.Wait()
	defer conn.Close()
	for _, line := range []string{spec.TunnelAt + at + "\n", spec.TunnelReady} {
		if err := out.tell(line); err != nil {
			return err
		}
	}
	caller := caller{conn: conn, stream: stream, ended: make(chan struct{}), gone: make(chan error, 1)}
	caller.waits.Store(now().UnixNano())
	go caller.listen() // it ends with the stream, which is after this function
	back := make(chan error, 1)
	output.Go(func() { back <- giveBack(conn, out) })
	beat := time.NewTicker(spec.TunnelHeartbeat)
	defer beat.Stop()
	for in := caller.ended; in != nil || back != nil; {
		select {
		case <-in:
			in = nil
		case err := <-caller.gone:
			return err
		case err := <-back:
			if err != nil {
				return err
			}
			back = nil
		case <-beat.C:
			if since := caller.waits.Load(); since != 0 && now().Sub(time.Unix(0, since)) > spec.TunnelPatience {
				return nil // nobody is there any more
			}
			if err := out.send(&drivers.ExecTaskStreamingResponseMsg{}); err != nil {
				return err
			}
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	return nil
}

// A caller is who sends what goes to the pod.
type caller struct {
	conn   *net.UnixConn
	stream drivers.ExecTaskStream
	waits  atomic.Int64  // since when for the next message, in nanoseconds since 1970; 0 while the pod is to take one
	ended  chan struct{} // closed when it has nothing more to send
	gone   chan error    // nil: it has said goodbye
}

// listen passes on what the client sends, and goes on listening when that has ended. A pod that takes no more may still have something to say.
func (c *caller) listen() {
	deaf := false
	for {
		c.waits.Store(now().UnixNano())
		m, err := c.stream.Recv()
		c.waits.Store(0)
		switch {
		case errors.Is(err, io.EOF), err == nil && m.TtySize != nil && m.TtySize.Height == 0 && m.TtySize.Width == 0:
			c.gone <- nil
			return
		case err != nil:
			c.gone <- err
			return
		case m.Stdin == nil || deaf && !m.Stdin.Close:
		case !m.Stdin.Close:
			_, err := c.conn.Write(m.Stdin.Data)
			deaf = err != nil
		default:
			deaf = true
			_ = c.conn.CloseWrite() // fails only where the pod has gone, which the other direction tells
			select {
			case <-c.ended:
			default:
				close(c.ended)
			}
		}
	}
}

// giveBack passes on what the pod sends.
func giveBack(conn *net.UnixConn, out *frames) error {
	buf := make([]byte, leastCarried)
	for {
		n, err := conn.Read(buf)
		if n > 0 {
			if _, err := out.stdout(buf[:n]); err != nil {
				return err
			}
		}
		switch {
		case errors.Is(err, io.EOF):
			return out.tell(spec.TunnelEOF)
		case err != nil:
			return fmt.Errorf("the pod's connection: %w", err)
		case n == len(buf) && n < mostCarried:
			buf = make([]byte, 2*n)
		}
	}
}

// frames are messages to Nomad's client; several goroutines send them.
type frames struct {
	mu     sync.Mutex
	stream drivers.ExecTaskStream
}

func (f *frames) send(m *drivers.ExecTaskStreamingResponseMsg) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.stream.Send(m)
}

func (f *frames) stdout(p []byte) (int, error) {
	return len(p), f.send(&drivers.ExecTaskStreamingResponseMsg{Stdout: &proto.ExecTaskStreamingIOOperation{Data: p}})
}

func (f *frames) stderr(p []byte) (int, error) {
	return len(p), f.send(&drivers.ExecTaskStreamingResponseMsg{Stderr: &proto.ExecTaskStreamingIOOperation{Data: p}})
}

func (f *frames) tell(text string) error {
	_, err := f.stderr([]byte(text))
	return err
}
