package stdio

import (
	"context"
	"errors"
	"io"
	"sync"

	"github.com/moby/term"
)

// stdin connects clients that type with a container that reads, each coming and going as it likes.
type stdin struct {
	once bool // a client's end ends it

	mu   sync.Mutex
	feed *feed // of the current run, else of the next
}

// feed is the stdin of one run.
type feed struct {
	chunks  chan chunk
	close   chan struct{} // asks for the container's stdin to be closed
	closing sync.Once
	over    chan struct{} // closed when nothing is taken any more
	w       io.Writer
	idle    chan struct{} // the goroutine has ended
}

// chunk is input on its way; done is closed when its bytes may be used again.
type chunk struct {
	bytes []byte
	done  chan struct{}
}

// current gives the feed of the current run, else that of the next one, whose input waits for it.
func (s *stdin) current() *feed {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.feed == nil || isClosed(s.feed.idle) {
		s.feed = &feed{chunks: make(chan chunk), close: make(chan struct{}), over: make(chan struct{}), idle: make(chan struct{})}
	}
	return s.feed
}

// begin connects the feed to a run's stdin. A container without one reads nothing: what is typed is thrown away.
func (s *stdin) begin(w io.Writer) *feed {
	if w == nil {
		w = io.Discard
	}
	f := s.current()
	f.w = w
	go f.run()
	return f
}

// run is the only one who writes to the container, so that a client can leave while the container is not reading.
func (f *feed) run() {
	defer close(f.idle)
	defer close(f.over)
	for {
		select {
		case c := <-f.chunks:
			_, err := f.w.Write(c.bytes)
			close(c.done)
			if err != nil {
				return
			}
		case <-f.close:
			closeIf(f.w)
			return
		}
	}
}

// end ends the run's stdin; a write that is still pending returns because its file is closed.
func (f *feed) end() {
	f.shut()
	closeIf(f.w)
	<-f.idle
}

func (f *feed) shut() { f.closing.Do(func() { close(f.close) }) }

// send hands input to the container and waits until it is taken. false: the container takes none any more, or ctx has ended, and b
// may still be in use.
func (f *feed) send(ctx context.Context, b []byte) bool {
	c := chunk{b, make(chan struct{})}
	select {
	case f.chunks <- c:
	case <-f.over:
		return false
	case <-ctx.Done():
		return false
	}
	select {
	case <-c.done:
		return true
	case <-ctx.Done():
		return false
	}
}

// copyFrom feeds what a client types until it ends or the container takes no more. It tells whether the client typed the detach keys.
func (s *stdin) copyFrom(ctx context.Context, f *feed, r io.Reader, keys []byte, again bool) (detached bool) {
	if len(keys) > 0 {
		r = term.NewEscapeProxy(r, keys)
	}
	buf := make([]byte, 32<<10)
	for {
		n, err := r.Read(buf)
		if n > 0 {
			for !f.send(ctx, buf[:n]) {
				if ctx.Err() != nil || !again {
					return false
				}
				f = s.current()
			}
		}
		if errors.As(err, new(term.EscapeError)) {
			return true
		}
		if err != nil {
			if s.once {
				f.shut()
			}
			return false
		}
	}
}
