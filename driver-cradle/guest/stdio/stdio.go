// Package stdio is everything about a container's three streams: the log on disk, the clients attached to it, its terminal.
//
// A container's output is kept as a transcript: what one read of the container's pipe gave is one record of the log, with its time
// and its stream, written before anybody else sees it. Whoever follows, a log reader or an attached client, reads the log's files at
// its own pace. So nobody needs a queue, a slow reader costs neither memory nor the container's time, nothing is lost or doubled
// between what was logged before and what comes after, and output is as durable as the disk below.
//
// Lines exist only when a log is read: reading finds the line ends, gives timestamps, and holds an unfinished line back until it ends
// or the container does, as docker does.
//
// The log is bounded: it is kept in segments of which the oldest is removed. A log reader that is slower than a whole log then goes on
// with the oldest segment that is left; an attached client is waited for at that point, as a pipe would (docker waits after 1 MB).
//
// stdio is part of the guest's initramfs. It imports spec at most.
package stdio

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"
)

// Stream is one of a container's output streams, with docker's numbers (stdcopy).
type Stream uint8

// The streams. A terminal has stdout only.
const (
	Stdout Stream = 1
	Stderr Stream = 2
)

// ErrDetached is what Attach returns when the client has typed the detach keys.
var ErrDetached = errors.New("read escape sequence")

// DefaultMaxSize bounds a log for which Options say nothing.
const DefaultMaxSize = 1 << 30

// Options of a container's streams.
type Options struct {
	TTY       bool
	OpenStdin bool
	StdinOnce bool  // stdin ends with the first attached client's
	MaxSize   int64 // bytes of log kept on disk, 0 is DefaultMaxSize
}

// IO is the streams of one container, through all its starts, or of one exec.
type IO struct {
	opts  Options
	log   *log   // nil: unlogged
	relay *relay // nil: logged
	stdin stdin
}

// Open opens the log in dir, or begins one. A torn end, as a killed VM leaves it, is cut off; the rest is kept.
func Open(dir string, o Options) (*IO, error) {
	if o.MaxSize <= 0 {
		o.MaxSize = DefaultMaxSize
	}
	l, err := openLog(dir, o.MaxSize)
	if err != nil {
		return nil, fmt.Errorf("open log %s: %w", dir, err)
	}
	return &IO{opts: o, log: l, stdin: stdin{once: o.StdinOnce && !o.TTY}}, nil
}

// Unlogged makes the streams of a process whose output goes to one attached client and is kept nowhere, such as an exec. The
// client attaches before Run; without one, output is thrown away. The process waits for a slow client, and for none that has gone.
// Its stdin ends with the client's.
func Unlogged(o Options) *IO { return &IO{opts: o, relay: newRelay(), stdin: stdin{once: !o.TTY}} }

// Options are those that the streams were opened with.
func (o *IO) Options() Options { return o.opts }

// Path of the log's directory, "" when unlogged.
func (o *IO) Path() string {
	if o.log == nil {
		return ""
	}
	return o.log.dir
}

// Close closes the log's files. The container must have ended, and every reader's context too.
func (o *IO) Close() error {
	if o.log == nil {
		return nil
	}
	return o.log.close()
}

// Streams are our ends of one start's streams. Those that are an io.Closer are closed when done with. With a terminal, Stdin and
// Stdout are its master and Stderr is nil. Stdin is nil where the container has none.
type Streams struct {
	Stdin  io.Writer
	Stdout io.Reader
	Stderr io.Reader
}

// Run begins a start of the container: its output is logged (or relayed), its stdin fed by whoever is attached. The channel is closed
// when all output streams have ended, everything is in the log and stdin is closed; the next start waits for that. Files must be such
// that Close makes a pending Read or Write return (pipes; a terminal's master opened with O_NONBLOCK).
func (o *IO) Run(s Streams) (drained <-chan struct{}) {
	feed := o.stdin.begin(s.Stdin)
	if o.log != nil {
		o.log.begin()
	}
	var pumps sync.WaitGroup
	pump := func(stream Stream, r io.Reader) {
		if r == nil {
			return
		}
		pumps.Go(func() {
			o.pump(stream, r)
			closeIf(r)
		})
	}
	pump(Stdout, s.Stdout)
	pump(Stderr, s.Stderr)
	done := make(chan struct{})
	go func() {
		pumps.Wait()
		feed.end()
		if o.log != nil {
			o.log.endRun()
		} else {
			o.relay.endRun()
		}
		close(done)
	}()
	return done
}

// pump moves one stream into the log. The payload is read to where the record needs it: nothing is copied.
func (o *IO) pump(stream Stream, r io.Reader) {
	buf := make([]byte, headerLen+maxPayload+trailerLen)
	for {
		n, err := r.Read(buf[headerLen : headerLen+maxPayload])
		if n > 0 {
			if o.log != nil {
				o.log.append(stream, buf[:headerLen+n+trailerLen])
			} else {
				o.relay.write(stream, buf[headerLen:headerLen+n])
			}
		}
		if err != nil { // the end; of a terminal: EIO
			return
		}
	}
}

// AttachOptions say what a client wants.
type AttachOptions struct {
	// Stdin feeds the container. It is closed when the attachment ends, which must make a pending Read return.
	Stdin io.ReadCloser
	// Stdout and Stderr take the output; nil: not wanted. The caller makes a pending Write return when ctx ends.
	Stdout, Stderr io.Writer

	Logs       bool      // first, everything that is in the log
	Since      time.Time // but what is from before
	Stream     bool      // then what comes, until the container ends
	DetachKeys []byte    // typing these ends the attachment; nil: none do

	// Restarts, when not nil, lets the attachment go on over restarts of the container until Restarts is closed.
	Restarts <-chan struct{}
	// Attached, when not nil, is called once nothing written from then on will be missed, before anything is read or written.
	Attached func() error
}

// Attach connects a client until the container's run ends (the next one's, when it isn't running), ctx ends, writing to the client
// fails, or it types the detach keys (ErrDetached). The end of the client's stdin alone does not end it.
func (o *IO) Attach(ctx context.Context, a AttachOptions) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var out interface {
		copyTo(context.Context, AttachOptions) error
		release()
	}
	if o.log != nil {
		out = o.log.attach(a)
	} else {
		out = o.relay.attach()
	}
	defer out.release()
	feed := o.stdin.current()
	if a.Attached != nil {
		if err := a.Attached(); err != nil {
			closeIf(a.Stdin)
			return err
		}
	}
	if a.Stdin != nil {
		fed := make(chan struct{})
		go func() {
			defer close(fed)
			if o.stdin.copyFrom(ctx, feed, a.Stdin, a.DetachKeys, a.Restarts != nil) {
				cancel(ErrDetached)
			}
		}()
		defer func() {
			cancel(nil)
			a.Stdin.Close()
			<-fed
		}()
	}
	err := out.copyTo(ctx, a)
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return err
}

// LogOptions say which lines to read, in docker's terms.
type LogOptions struct {
	Stdout, Stderr io.Writer // nil: not wanted
	Timestamps     bool      // each line begins with its time, RFC 3339 with nanoseconds
	Since, Until   time.Time // lines that ended in [Since, Until]; zero: no limit
	Tail           int       // the last so many of these lines; negative: all
	Follow         bool      // go on until the container ends, if it is running

	// Restarts, when not nil, lets Follow go on over restarts of the container until Restarts is closed.
	Restarts <-chan struct{}
	// Idle, when not nil, is called before waiting for more output: the time to flush a buffer.
	Idle func() error
}

// ReadLogs writes lines of the log. Each Write gets whole lines of one stream, or a part of a line longer than 16 KiB.
func (o *IO) ReadLogs(ctx context.Context, lo LogOptions) error {
	if o.log == nil {
		return errors.New("these streams are not logged")
	}
	return o.log.readLines(ctx, lo)
}

// Usage gives the size of the log in bytes.
func (o *IO) Usage() int64 {
	if o.log == nil {
		return 0
	}
	return o.log.usage()
}

func closeIf(v any) {
	if c, ok := v.(io.Closer); ok && c != nil {
		c.Close()
	}
}
