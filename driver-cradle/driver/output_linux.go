package driver

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/cradlestack/cradlestack/driver-cradle/pod"
	"github.com/cradlestack/cradlestack/driver-cradle/wire"
	"github.com/cradlestack/cradlestack/spec"
)

// A task's output goes from the log in the guest to Nomad's named pipes. How far it has come is kept in a file that is mapped into memory: what a
// process has stored there is there after a kill -9, and storing costs nothing. Output is written in pieces that a pipe takes as a whole or
// not at all, and its place is stored right after each.

// A place is how far a container's output was delivered: everything before the mark, and so many bytes of the piece behind it.
type place struct {
	mark   wire.Mark
	within int
}

// The file of places: a magic number, then for each container of the pod two places, and the number of the one that counts.
const (
	placesMagic = "cradle-output-1\n"
	placesHead  = 64
	placeSize   = 64
	placesSize  = placesHead + spec.MaxContainers*placeSize
)

// places is the file, mapped.
type places struct{ mem []byte }

// openPlaces opens the file at path, or makes it.
func openPlaces(path string) (*places, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if err := f.Truncate(placesSize); err != nil {
		return nil, err
	}
	mem, err := unix.Mmap(int(f.Fd()), 0, placesSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("map %s: %w", path, err)
	}
	switch string(mem[:len(placesMagic)]) {
	case placesMagic:
	case string(make([]byte, len(placesMagic))):
		copy(mem, placesMagic)
	default:
		unix.Munmap(mem)
		return nil, fmt.Errorf("%s is no file of places", path)
	}
	return &places{mem}, nil
}

func (p *places) close() { unix.Munmap(p.mem) }

func (p *places) of(container int) []byte {
	return p.mem[placesHead+container*placeSize:][:placeSize]
}

// current is the number of the place that counts.
func current(entry []byte) *atomic.Uint32 { return (*atomic.Uint32)(unsafe.Pointer(&entry[0])) }

func (p *places) get(container int) place {
	e := p.of(container)
	slot := e[8+24*(current(e).Load()&1):]
	return place{
		wire.Mark{Segment: binary.NativeEndian.Uint64(slot), Offset: int64(binary.NativeEndian.Uint64(slot[8:]))},
		int(binary.NativeEndian.Uint64(slot[16:])),
	}
}

// set stores a place beside the one that counts, and then makes it count.
func (p *places) set(container int, at place) {
	e := p.of(container)
	next := current(e).Load()&1 ^ 1
	slot := e[8+24*next:]
	binary.NativeEndian.PutUint64(slot, at.mark.Segment)
	binary.NativeEndian.PutUint64(slot[8:], uint64(at.mark.Offset))
	binary.NativeEndian.PutUint64(slot[16:], uint64(at.within))
	current(e).Store(next)
}

// pipeBuf is what is written to a pipe as a whole (limits.h, PIPE_BUF).
const pipeBuf = 4096

// A sink is one of Nomad's named pipes. Held open for reading as well, it keeps what is in it while nobody reads. Nomad's reader takes the end of
// all writers for the end of the task: the pod's machine holds the pipes as well, while there is no plugin process.
type sink struct {
	mu   sync.Mutex
	file *os.File
}

// openSink opens a named pipe; without a path everything is thrown away.
func openSink(path string) (*sink, error) {
	if path == "" {
		path = os.DevNull
	}
	f, err := os.OpenFile(path, os.O_RDWR|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	return &sink{file: f}, nil
}

// patience is how long a write waits before it asks whether anybody still wants it.
const sinkPatience = 5 * time.Second

// write writes at most pipeBuf bytes, all of them or none. wanted is asked now and then while the pipe is full.
func (s *sink) write(p []byte, wanted func() error) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	for {
		_ = s.file.SetWriteDeadline(time.Now().Add(sinkPatience)) // /dev/null has none
		_, err := s.file.Write(p)
		if !errors.Is(err, os.ErrDeadlineExceeded) {
			return err
		}
		if err := wanted(); err != nil {
			return err
		}
	}
}

// A delivery brings the output of a pod's containers to Nomad.
type delivery struct {
	running *pod.Running
	places  *places
	sinks   [2]*sink // stdout, stderr
	stop    context.CancelCauseFunc
	work    sync.WaitGroup
	warn    func(string, ...any)
}

// newDelivery opens what a task's output goes to.
func newDelivery(placesPath string, rec *record, warn func(string, ...any)) (_ *delivery, err error) {
	d := &delivery{warn: warn}
	if d.places, err = openPlaces(placesPath); err != nil {
		return nil, err
	}
	for i, path := range []string{rec.Stdout, rec.Stderr} {
		if d.sinks[i], err = openSink(path); err != nil {
			d.close()
			return nil, fmt.Errorf("output of the task: %w", err)
		}
	}
	return d, nil
}

// files are the pipes.
func (d *delivery) files() []*os.File { return []*os.File{d.sinks[0].file, d.sinks[1].file} }

// begin delivers the output of a pod from where the last delivery has come to.
func (d *delivery) begin(r *pod.Running) {
	var ctx context.Context
	ctx, d.stop = context.WithCancelCause(context.Background())
	d.running = r
	for i, c := range r.Launch().Containers {
		d.work.Go(func() { d.follow(ctx, i, &c) })
	}
}

func (d *delivery) close() {
	for _, s := range d.sinks {
		if s != nil {
			s.file.Close()
		}
	}
	d.places.close()
}

// wait returns when all output was delivered.
func (d *delivery) wait() { d.work.Wait() }

// end stops the delivery. A later one goes on where this one has come to.
func (d *delivery) end(why error) {
	d.stop(why)
	d.work.Wait()
	d.close()
}

var errUnwanted = errors.New("nobody reads the task's output any more")

// follow delivers one container's output until it has ended for good, over broken connections to the guest.
func (d *delivery) follow(ctx context.Context, i int, c *spec.Container) {
	for wait := 20 * time.Millisecond; ; wait = min(2*wait, 2*time.Second) {
		before := d.places.get(i)
		err := d.followOnce(ctx, i, c)
		if err == nil || ctx.Err() != nil || errors.Is(err, errUnwanted) {
			return
		}
		if d.places.get(i) != before {
			wait = 20 * time.Millisecond
		}
		select {
		case <-d.running.Machine().Done():
			return
		case <-ctx.Done():
			return
		case <-time.After(wait):
			d.warn("output was interrupted", "container", c.Name, "error", err)
		}
	}
}

func (d *delivery) followOnce(ctx context.Context, i int, c *spec.Container) error {
	at := d.places.get(i)
	out, err := d.running.Guest().Output(ctx, c.Name, at.mark)
	if err != nil {
		return err
	}
	defer out.Close()
	defer context.AfterFunc(ctx, func() {
		for _, s := range d.sinks {
			_ = s.file.SetWriteDeadline(time.Unix(1, 0))
		}
	})()
	w := writer{d: d, ctx: ctx, container: i, at: at}
	if i > 0 {
		w.prefix = []byte(c.Name + ": ")
	}
	for {
		p, err := out.Next()
		if err == io.EOF {
			return w.rest()
		}
		if err != nil {
			return err
		}
		if err := w.piece(p); err != nil {
			return err
		}
	}
}

// A writer writes one container's pieces to the sinks. Those of the task's own container go as they are; of others, whole lines go, each after
// the container's name.
type writer struct {
	d         *delivery
	ctx       context.Context
	container int
	prefix    []byte
	at        place // everything before it was delivered
	// begun are the unfinished lines of both streams; while there is one, at does not move.
	begun [2][]byte
}

func (w *writer) piece(p wire.Piece) error {
	skip := min(w.at.within, len(p.Data))
	w.at.within = 0
	var err error
	if w.prefix == nil {
		err = w.raw(p, skip)
	} else {
		err = w.lines(p)
	}
	return err
}

// raw delivers a piece but its first skip bytes.
func (w *writer) raw(p wire.Piece, skip int) error {
	for skip < len(p.Data) {
		chunk := p.Data[skip:min(skip+pipeBuf, len(p.Data))]
		if err := w.write(p.Stream, chunk); err != nil {
			return err
		}
		if skip += len(chunk); skip < len(p.Data) {
			w.d.places.set(w.container, place{w.at.mark, skip})
		}
	}
	w.at = place{mark: p.Next}
	w.d.places.set(w.container, w.at)
	return nil
}

// lines delivers the lines that a piece finishes. The place moves on when no line is unfinished.
func (w *writer) lines(p wire.Piece) error {
	line := &w.begun[p.Stream-1]
	for rest := p.Data; len(rest) > 0; {
		n := bytes.IndexByte(rest, '\n') + 1
		whole := n > 0
		if !whole {
			n = len(rest)
		}
		n = min(n, max(pipeBuf-len(w.prefix)-1-len(*line), 1))
		*line = append(*line, rest[:n]...)
		rest = rest[n:]
		if (*line)[len(*line)-1] == '\n' || len(w.prefix)+len(*line)+1 >= pipeBuf {
			if err := w.flush(p.Stream); err != nil {
				return err
			}
		}
	}
	if len(w.begun[0])+len(w.begun[1]) == 0 {
		w.at = place{mark: p.Next}
		w.d.places.set(w.container, w.at)
	}
	return nil
}

// flush writes a stream's line.
func (w *writer) flush(stream byte) error {
	line := w.begun[stream-1]
	w.begun[stream-1] = line[:0]
	if len(line) == 0 {
		return nil
	}
	text := append(bytes.Clone(w.prefix), line...)
	if text[len(text)-1] != '\n' {
		text = append(text, '\n')
	}
	return w.write(stream, text)
}

// rest writes the lines that the container's end has finished.
func (w *writer) rest() error { return errors.Join(w.flush(1), w.flush(2)) }

func (w *writer) write(stream byte, p []byte) error {
	return w.d.sinks[stream-1].write(p, func() error {
		if w.ctx.Err() != nil {
			return context.Cause(w.ctx)
		}
		ctx, cancel := context.WithTimeout(w.ctx, sinkPatience)
		defer cancel()
		// A pod that runs waits for its reader; one that has ended does not.
		s, err := w.d.running.Status(ctx)
		if err == nil && s.State == wire.StateExited {
			return errUnwanted
		}
		return nil
	})
}
