package vmm

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// maxQMP bounds one message of QEMU: a guest that has taken over its QEMU must not take the launcher's memory as well.
const maxQMP = 4 << 20

// errQMPClosed is the error of calls that QEMU's end has overtaken.
var errQMPClosed = errors.New("QEMU closed its monitor")

// A monitor is a QMP client (qemu.git docs/interop/qmp-spec.txt).
type monitor struct {
	conn  *net.UnixConn
	event func(name string, data json.RawMessage) // called in order, by the reader

	mu      sync.Mutex
	next    int
	waiting map[int]chan qmpReply // nil: closed
	done    chan struct{}         // the reader has ended
}

type qmpReply struct {
	Return json.RawMessage `json:"return"`
	Error  *qmpError       `json:"error"`
	ID     *int            `json:"id"`
	Event  string          `json:"event"`
	Data   json.RawMessage `json:"data"`
}

type qmpError struct {
	Class string `json:"class"`
	Desc  string `json:"desc"`
}

func (e *qmpError) Error() string { return e.Desc }

// newMonitor owns conn from then on. The first call has to be qmp_capabilities.
func newMonitor(conn *net.UnixConn, event func(string, json.RawMessage)) *monitor {
	q := &monitor{conn: conn, event: event, waiting: map[int]chan qmpReply{}, done: make(chan struct{})}
	go q.read()
	return q
}

func (q *monitor) close() {
	q.conn.Close()
	<-q.done
}

func (q *monitor) read() {
	defer close(q.done)
	defer q.conn.Close()
	s := bufio.NewScanner(q.conn)
	s.Buffer(nil, maxQMP)
	for s.Scan() {
		var r qmpReply
		if err := json.Unmarshal(s.Bytes(), &r); err != nil {
			break
		}
		switch {
		case r.Event != "":
			q.event(r.Event, r.Data)
		case r.ID != nil:
			q.mu.Lock()
			c := q.waiting[*r.ID]
			delete(q.waiting, *r.ID)
			q.mu.Unlock()
			if c != nil {
				c <- r
			}
		}
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	for _, c := range q.waiting {
		close(c)
	}
	q.waiting = nil
}

// call executes a command, passing files along with it, and decodes what it returns into reply unless that is nil.
func (q *monitor) call(ctx context.Context, command string, args, reply any, files ...*os.File) error {
	return q.begin(ctx, command, args, files...)(reply)
}

// begin sends a command and returns what waits for its answer.
func (q *monitor) begin(ctx context.Context, command string, args any, files ...*os.File) (wait func(reply any) error) {
	c := make(chan qmpReply, 1)
	id, err := q.send(command, args, files, c)
	if err != nil {
		return func(any) error { return fmt.Errorf("qmp %s: %w", command, err) }
	}
	return func(reply any) error {
		select {
		case r, ok := <-c:
			switch {
			case !ok:
				return fmt.Errorf("qmp %s: %w", command, errQMPClosed)
			case r.Error != nil:
				return fmt.Errorf("qmp %s: %w", command, r.Error)
			case reply != nil:
				if err := json.Unmarshal(r.Return, reply); err != nil {
					return fmt.Errorf("qmp %s: answer: %w", command, err)
				}
			}
			return nil
		case <-ctx.Done():
			q.mu.Lock()
			delete(q.waiting, id)
			q.mu.Unlock()
			return fmt.Errorf("qmp %s: %w", command, context.Cause(ctx))
		}
	}
}

// calls are commands that were sent and are answered in that order.
type calls []func(reply any) error

func (c *calls) add(wait func(reply any) error) { *c = append(*c, wait) }

// wait gives the first failure.
func (c *calls) wait() error {
	for _, wait := range *c {
		if err := wait(nil); err != nil {
			return err
		}
	}
	return nil
}

func (q *monitor) send(command string, args any, files []*os.File, c chan qmpReply) (id int, err error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.waiting == nil {
		return 0, errQMPClosed
	}
	q.next++
	id = q.next
	m := map[string]any{"execute": command, "id": id}
	if args != nil {
		m["arguments"] = args
	}
	line, err := json.Marshal(m)
	if err != nil {
		return 0, err
	}
	line = append(line, '\n')
	if len(files) > 0 {
		fds := make([]int, len(files))
		for i, f := range files {
			fds[i] = int(f.Fd())
		}
		// The files travel with the first byte; QEMU keeps them for the command that it reads.
		n, _, err := q.conn.WriteMsgUnix(line, unix.UnixRights(fds...), nil)
		if err != nil {
			return 0, err
		}
		line = line[n:]
	}
	q.waiting[id] = c
	if _, err := q.conn.Write(line); err != nil {
		delete(q.waiting, id)
		if errors.Is(err, unix.EPIPE) || errors.Is(err, net.ErrClosed) || errors.Is(err, io.EOF) {
			err = errQMPClosed
		}
		return 0, err
	}
	return id, nil
}
