package vdocker

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"sync/atomic"
	"time"

	"github.com/moby/term"

	"github.com/cradlestack/cradlestack/driver-cradle/guest"
	"github.com/cradlestack/cradlestack/driver-cradle/guest/stdio"
	"github.com/cradlestack/cradlestack/driver-cradle/wire"
	"github.com/cradlestack/cradlestack/internal/dockerhttp"
)

// Media types of a stream: raw from a terminal, else frames of stdout and stderr (api/swagger.yaml ContainerAttach).
const (
	rawStream         = "application/vnd.docker.raw-stream"
	multiplexedStream = "application/vnd.docker.multiplexed-stream"
)

func mediaType(tty bool) string {
	if tty {
		return rawStream
	}
	return multiplexedStream
}

// defaultDetachKeys are docker's: ctrl-p,ctrl-q.
var defaultDetachKeys = []byte{16, 17}

func detachKeys(r *http.Request, text string) ([]byte, error) {
	if text == "" {
		text = dockerhttp.Parameter(r, "detachKeys")
	}
	if text == "" {
		return defaultDetachKeys, nil
	}
	keys, err := term.ToBytes(text)
	if err != nil {
		return nil, dockerhttp.Invalid("invalid detach keys (%s) provided", text)
	}
	return keys, nil
}

// frames writes one stream of a multiplexed one: a header of 8 bytes (stream, 3 zeros, length big-endian) before each piece.
type frames struct {
	w      io.Writer
	stream stdio.Stream
	lines  bool // a piece for each line, as clients have it of docker logs
	buf    []byte
}

const (
	frameHeader  = 8
	framePayload = 64 << 10
)

func (f *frames) Write(p []byte) (n int, err error) {
	for n < len(p) {
		end := n
		for f.buf = f.buf[:0]; end < len(p) && len(f.buf) < framePayload; {
			piece := f.piece(p[end:])
			f.buf = append(f.buf, byte(f.stream), 0, 0, 0)
			f.buf = binary.BigEndian.AppendUint32(f.buf, uint32(len(piece)))
			f.buf = append(f.buf, piece...)
			end += len(piece)
		}
		if _, err := f.w.Write(f.buf); err != nil {
			return n, err
		}
		n = end
	}
	return n, nil
}

// piece is what of p the next frame takes.
func (f *frames) piece(p []byte) []byte {
	p = p[:min(len(p), framePayload)]
	if end := bytes.IndexByte(p, '\n'); f.lines && end >= 0 {
		return p[:end+1]
	}
	return p
}

// outputs makes the writers for a container's streams on top of w; unwanted ones are nil.
func outputs(w io.Writer, tty, stdout, stderr, lines bool) (out, errs io.Writer) {
	if stdout {
		out = w
		if !tty {
			out = &frames{w: w, stream: stdio.Stdout, lines: lines}
		}
	}
	if stderr && !tty {
		errs = &frames{w: w, stream: stdio.Stderr, lines: lines}
	}
	return out, errs
}

// logs answers docker logs. With restarts=1, a parameter of ours, following goes on over restarts until the container has ended for
// good.
func (a *api) logs(w http.ResponseWriter, r *http.Request, c *guest.Container) error {
	stdout, stderr := dockerhttp.Truth(r, "stdout"), dockerhttp.Truth(r, "stderr")
	if !stdout && !stderr {
		return dockerhttp.Invalid("Bad parameters: you must choose at least one stream")
	}
	lo := stdio.LogOptions{Timestamps: dockerhttp.Truth(r, "timestamps"), Follow: dockerhttp.Truth(r, "follow"), Tail: -1}
	var err error
	if lo.Since, err = dockerhttp.ParseTime(dockerhttp.Parameter(r, "since")); err != nil {
		return dockerhttp.Invalid("since: %v", err)
	}
	if lo.Until, err = dockerhttp.ParseTime(dockerhttp.Parameter(r, "until")); err != nil {
		return dockerhttp.Invalid("until: %v", err)
	}
	if n, err := strconv.Atoi(dockerhttp.Parameter(r, "tail")); err == nil && n >= 0 {
		lo.Tail = n
	}
	ctx := r.Context()
	if lo.Follow && dockerhttp.Truth(r, "restarts") {
		var stop func()
		lo.Restarts, stop = endedForGood(ctx, c)
		defer stop()
	}
	tty := c.Spec().TTY
	out := http.NewResponseController(w)
	lo.Idle = out.Flush
	lo.Stdout, lo.Stderr = outputs(w, tty, stdout, stderr, true)
	w.Header().Set("Content-Type", mediaType(tty))
	w.WriteHeader(http.StatusOK)
	if lo.Follow {
		if err := out.Flush(); err != nil {
			return nil
		}
	}
	if err := c.IO().ReadLogs(ctx, lo); err != nil && ctx.Err() == nil {
		panic(http.ErrAbortHandler) // what has been sent is not all: the client must see that
	}
	return nil
}

// endedForGood gives a channel that is closed when the container has ended and does not start again.
func endedForGood(ctx context.Context, c *guest.Container) (<-chan struct{}, func()) {
	ctx, cancel := context.WithCancel(ctx)
	ended, over := make(chan struct{}), make(chan struct{})
	wait := c.Awaiting(guest.WaitRemoved)
	go func() {
		defer close(over)
		if _, _, err := wait(ctx); err == nil {
			close(ended)
		}
	}()
	return ended, func() { cancel(); <-over }
}

// client is the other end of a hijacked connection.
type client struct {
	net.Conn
	in    *bufio.Reader
	gone  context.CancelCauseFunc
	taken atomic.Bool // its input has been closed by us: what a Read says then tells nothing about the client
	stop  func() bool
	ended chan struct{} // what only watches has ended
}

// maxLinger is how long a client may take to close its side when it has got everything.
const maxLinger = 10 * time.Second

// hijack takes the connection over from HTTP and begins the stream. When ctx ends, pending reads and writes return; gone ends it.
func hijack(ctx context.Context, gone context.CancelCauseFunc, w http.ResponseWriter, r *http.Request, tty bool) (*client, error) {
	upgrade := r.Header.Get("Upgrade") != ""
	conn, in, err := dockerhttp.Hijack(w)
	if err != nil {
		return nil, err
	}
	c := &client{Conn: conn, in: in, gone: gone}
	c.stop = context.AfterFunc(ctx, c.interrupt)
	if err := dockerhttp.BeginStream(conn, w.Header(), mediaType(tty), upgrade); err != nil {
		c.stop()
		conn.Close()
		return nil, err
	}
	return c, nil
}

func (c *client) interrupt() { _ = c.SetDeadline(time.Unix(1, 0)) }

// stdin is what the client sends.
func (c *client) stdin() io.ReadCloser { return &clientInput{c} }

type clientInput struct{ c *client }

// Read tells a client that has ended its input from one that is gone.
func (i *clientInput) Read(p []byte) (int, error) {
	n, err := i.c.in.Read(p)
	if err != nil && !errors.Is(err, io.EOF) && !i.c.taken.Load() {
		i.c.gone(err)
	}
	return n, err
}

// Close makes a pending Read return.
func (i *clientInput) Close() error {
	i.c.taken.Store(true)
	return i.c.SetReadDeadline(time.Unix(1, 0))
}

// watch notices when a client whose input nobody takes, or nobody takes any more, goes away.
func (c *client) watch(ctx context.Context) {
	if c.taken.CompareAndSwap(true, false) {
		_ = c.SetReadDeadline(time.Time{})
		if ctx.Err() != nil {
			c.interrupt() // which that may have undone
		}
	}
	c.ended = make(chan struct{})
	go func() {
		defer close(c.ended)
		_, _ = io.Copy(io.Discard, c.stdin())
	}()
}

// finish ends the connection without cutting off what the client has still to read: our side is closed first, then the client's
// input is read until it has noticed.
func (c *client) finish() {
	c.stop()
	defer c.Conn.Close()
	if c.ended != nil {
		_ = c.SetReadDeadline(time.Unix(1, 0))
		<-c.ended
	}
	w, ok := c.Conn.(interface{ CloseWrite() error })
	if !ok || c.SetWriteDeadline(time.Time{}) != nil || w.CloseWrite() != nil {
		return
	}
	if c.SetReadDeadline(time.Now().Add(maxLinger)) == nil {
		_, _ = io.Copy(io.Discard, c.in)
	}
}

// attach answers docker attach. restarts=1 and since as for logs; docker has neither.
func (a *api) attach(w http.ResponseWriter, r *http.Request, c *guest.Container) error {
	keys, err := detachKeys(r, "")
	if err != nil {
		return err
	}
	stream, replay := dockerhttp.Truth(r, "stream"), dockerhttp.Truth(r, "logs")
	if c.State().Status == wire.StatePaused {
		return dockerhttp.NewError(http.StatusConflict, fmt.Sprintf("container %s is paused, unpause the container before attach", r.PathValue("id")))
	}
	spec := c.Spec()
	ctx, gone := context.WithCancelCause(context.WithoutCancel(r.Context()))
	defer gone(nil)
	o := stdio.AttachOptions{Logs: replay, Stream: stream}
	if o.Since, err = dockerhttp.ParseTime(dockerhttp.Parameter(r, "since")); err != nil {
		return dockerhttp.Invalid("since: %v", err)
	}
	if stream && dockerhttp.Truth(r, "restarts") {
		var stop func()
		o.Restarts, stop = endedForGood(ctx, c)
		defer stop()
	}
	s := streams{
		attach: o, tty: spec.TTY, keys: keys,
		stdin: stream && dockerhttp.Truth(r, "stdin") && spec.OpenStdin, stdout: dockerhttp.Truth(r, "stdout"), stderr: dockerhttp.Truth(r, "stderr"),
		detached: func() { c.Emit("detach", nil) },
	}
	var exited func(context.Context) (int, string, error)
	s.began = func() error {
		exited = c.Awaiting(guest.WaitNextExit)
		c.Emit("attach", nil)
		return nil
	}
	if stream && o.Restarts == nil {
		// As docker: a client that asks when the stream has ended finds the container exited.
		s.finished = func(ctx context.Context) { _, _, _ = exited(ctx) }
	}
	return a.serveStreams(ctx, gone, w, r, c.IO(), s)
}

// streams are what a client is connected with.
type streams struct {
	attach                stdio.AttachOptions
	tty                   bool
	stdin, stdout, stderr bool
	keys                  []byte
	began                 func() error // the client misses nothing any more; an error is told to it
	detached              func()
	finished              func(context.Context) // before the connection ends
}

// serveStreams hijacks the connection and serves it to its end.
func (a *api) serveStreams(ctx context.Context, gone context.CancelCauseFunc, w http.ResponseWriter, r *http.Request, target *stdio.IO, s streams) error {
	var c *client
	out := lateWriter{}
	o := s.attach
	o.Stdout, o.Stderr = outputs(&out, s.tty, s.stdout, s.stderr, false)
	if s.stdin {
		o.Stdin = &lateInput{&c}
		if s.tty {
			o.DetachKeys = s.keys
		}
	}
	var hijackErr error
	o.Attached = func() error {
		c, hijackErr = hijack(ctx, gone, w, r, s.tty)
		if hijackErr != nil {
			return hijackErr
		}
		out.w = c
		if !s.stdin {
			c.watch(ctx)
		}
		if err := s.began(); err != nil {
			// As docker: the connection is a stream already, so the reason goes there.
			text, _ := outputs(c, s.tty, true, true, false)
			fmt.Fprintf(text, "%s\r\n", err)
			return err
		}
		return nil
	}
	err := target.Attach(ctx, o)
	if hijackErr != nil {
		return hijackErr
	}
	if errors.Is(err, stdio.ErrDetached) {
		s.detached()
	} else if err == nil && s.finished != nil {
		if s.stdin {
			c.watch(ctx)
		}
		s.finished(ctx)
	}
	c.finish()
	return nil
}

// lateWriter and lateInput stand for a connection that is there once the attachment is.
type lateWriter struct{ w io.Writer }

func (l *lateWriter) Write(p []byte) (int, error) { return l.w.Write(p) }

type lateInput struct{ c **client }

func (l *lateInput) Read(p []byte) (int, error) { return (*l.c).stdin().Read(p) }

func (l *lateInput) Close() error {
	if *l.c == nil {
		return nil
	}
	return (*l.c).stdin().Close()
}
