package vmm

import (
	"bytes"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
)

// maxConsole is how much of the guest's console is kept: a guest can write for ever, the host's disk can't.
const maxConsole = 64 << 10

// A console keeps the last output of the guest's serial port in a file.
type console struct {
	conn net.Conn
	done chan struct{}

	mu   sync.Mutex
	file *os.File
	tail []byte // what the file holds
}

// newConsole reads conn until it ends. The file goes on where an earlier process has left it.
func newConsole(dir string, conn net.Conn) (*console, error) {
	f, err := os.OpenFile(filepath.Join(dir, consoleFile), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		conn.Close()
		return nil, err
	}
	c := &console{conn: conn, done: make(chan struct{}), file: f}
	if c.tail, err = io.ReadAll(io.LimitReader(f, maxConsole)); err != nil {
		conn.Close()
		return nil, errors.Join(err, f.Close())
	}
	go c.read()
	return c, nil
}

func (c *console) read() {
	defer close(c.done)
	defer c.conn.Close()
	buf := make([]byte, 4<<10)
	for {
		n, err := c.conn.Read(buf)
		c.keep(buf[:n])
		if err != nil {
			return
		}
	}
}

// keep appends to the file, or writes it anew with the later half when it is full. An error of the disk is none of the machine's.
func (c *console) keep(p []byte) {
	if len(p) == 0 {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.tail)+len(p) <= maxConsole {
		_, _ = c.file.WriteAt(p, int64(len(c.tail))) // a full disk must not end the pod; tail has it
		c.tail = append(c.tail, p...)
		return
	}
	c.tail = append(c.tail[max(0, len(c.tail)-maxConsole/2):], p...)
	c.tail = append([]byte(nil), c.tail...)
	_, _ = c.file.WriteAt(c.tail, 0)
	_ = c.file.Truncate(int64(len(c.tail)))
}

// close ends reading after what has already arrived.
func (c *console) close() {
	c.conn.Close()
	<-c.done
	c.file.Close()
}

// ended waits until QEMU, which has ended, has nothing more to say.
func (c *console) ended() { <-c.done }

func (c *console) text() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return string(c.tail)
}

// A PanicError is the end of a machine whose guest kernel panicked.
type PanicError struct {
	Reason  string // Attempted to kill init! exitcode=0x00000100
	Agent   string // where the kernel panicked because the agent, its init, ended: what that has said
	Console string // the last lines
}

func (e *PanicError) Error() string {
	text := "guest kernel panic: " + e.Reason
	if e.Agent != "" {
		text = "the agent in the guest has failed: " + e.Agent
	}
	return strings.TrimSuffix(text+"\n"+e.Console, "\n")
}

const (
	panicMark = "Kernel panic - not syncing: "
	initEnded = "Attempted to kill init!"
	agentLog  = `msg="` + agentGaveUp + `" error=`

	// agentGaveUp is what package guest logs when its main function returns.
	agentGaveUp = "the agent can't go on"
)

// findPanic looks for a kernel panic in the console.
func findPanic(text string) *PanicError {
	i := strings.LastIndex(text, panicMark)
	if i < 0 {
		return nil
	}
	reason, _, _ := strings.Cut(text[i+len(panicMark):], "\n")
	p := &PanicError{Reason: printable(reason), Console: lastLines(text, 20)}
	if says, stack, ok := agentsEnd(text[:i]); ok && strings.HasPrefix(p.Reason, initEnded) {
		p.Agent, p.Console = says, stack // which may be long before the last lines
	}
	return p
}

// agentsEnd finds what the agent said when it ended: Go's report of a panic or a fatal error with the stack, or the agent's own.
func agentsEnd(text string) (says, stack string, ok bool) {
	lines := strings.SplitAfter(text, "\n")
	for i := len(lines) - 1; i >= 0; i-- {
		line := strings.TrimSpace(lines[i])
		if _, why, ok := strings.Cut(line, agentLog); ok {
			return printable(why), "", true
		}
		if strings.HasPrefix(line, "panic: ") || strings.HasPrefix(line, "fatal error: ") {
			return printable(line), lastLines(strings.Join(lines[i+1:min(len(lines), i+21)], ""), 20), true
		}
	}
	return "", "", false
}

// lastLines gives the last n lines of foreign text, fit for a terminal.
func lastLines(text string, n int) string {
	lines := strings.Split(strings.TrimRight(text, "\r\n"), "\n")
	lines = lines[max(0, len(lines)-n):]
	for i, l := range lines {
		lines[i] = printable(l)
	}
	return strings.Join(lines, "\n")
}

// printable takes out what could make a terminal do things.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if r == '\t' || r >= ' ' && r != 0x7f && (r < 0x80 || r >= 0xa0) {
			return r
		}
		return -1
	}, s)
}

// A tailBuffer keeps the last bytes written to it.
type tailBuffer struct {
	mu   sync.Mutex
	data []byte
}

func (t *tailBuffer) Write(p []byte) (int, error) {
	const limit = 8 << 10
	t.mu.Lock()
	defer t.mu.Unlock()
	t.data = append(t.data, p...)
	if len(t.data) > limit {
		t.data = bytes.Clone(t.data[len(t.data)-limit:])
	}
	return len(p), nil
}

func (t *tailBuffer) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return strings.TrimSpace(string(t.data))
}
