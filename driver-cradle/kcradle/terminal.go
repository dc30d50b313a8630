package main

import (
	"context"
	"io"
	"os"
	"os/signal"
	"sync"
	"time"

	"golang.org/x/sys/unix"
	"golang.org/x/term"

	"github.com/cradlestack/cradlestack/driver-cradle/pod"
)

// A terminal is the user's, lent to a container that has one of its own.
type terminal struct {
	restore func()
	stop    func()
}

// terminalSize is that of stdin, in rows and columns, zero where it is no terminal.
func (c *cli) terminalSize() [2]uint16 {
	width, height, err := term.GetSize(int(c.stdin.Fd()))
	if err != nil {
		return [2]uint16{}
	}
	return [2]uint16{uint16(height), uint16(width)}
}

// takeTerminal puts the terminal of stdin into raw mode and keeps the container's, at path, as large as it. Where stdin is none, it does
// nothing.
func (c *cli) takeTerminal(ctx context.Context, g *pod.Guest, path string, raw bool) (*terminal, error) {
	t := &terminal{restore: func() {}, stop: func() {}}
	if !term.IsTerminal(int(c.stdin.Fd())) {
		return t, nil
	}
	fd := int(c.stdin.Fd())
	if raw {
		before, err := term.MakeRaw(fd)
		if err != nil {
			return nil, err
		}
		t.restore = sync.OnceFunc(func() { _ = term.Restore(fd, before) })
	}
	changed := make(chan os.Signal, 1)
	signal.Notify(changed, unix.SIGWINCH)
	ctx, cancel := context.WithCancel(ctx)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			if width, height, err := term.GetSize(fd); err == nil {
				// A container that has not started yet refuses; its first size matters most.
				for wait := 5 * time.Millisecond; resize(ctx, g, path, width, height) != nil && ctx.Err() == nil && wait < 500*time.Millisecond; wait *= 2 {
					time.Sleep(wait)
				}
			}
			select {
			case <-changed:
			case <-ctx.Done():
				return
			}
		}
	}()
	t.stop = sync.OnceFunc(func() {
		signal.Stop(changed)
		cancel()
		<-done
	})
	return t, nil
}

// giveBack restores the user's terminal.
func (t *terminal) giveBack() {
	t.stop()
	t.restore()
}

// feed copies stdin into a stream until either ends. It is not waited for: nothing makes a read of stdin return.
func (c *cli) feed(s *pod.Stream) {
	go func() {
		_, _ = io.Copy(s, c.stdin) // it ends with either side, and the container learns of no other end
		_ = s.CloseWrite()
	}()
}
