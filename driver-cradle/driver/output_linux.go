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
	"github.com/cradlestack/cradlestack/driver-cradle/vmm"
	"github.com/cradlestack/cradlestack/driver-cradle/wire"
	"github.com/cradlestack/cradlestack/spec"
)

// A task's output goes from the log in the guest to Nomad's named pipes. How far it has come is kept in a file that is mapped into memory: what a
// process has stored there is there after a kill -9, and storing costs nothing. Output is written in pieces that a pipe takes as a whole or
// not at all, and its place is stored right after each.

// A place is how far a container's output, or that of one of its streams, was delivered: everything before the mark, and so many bytes of the piece behind
// it.
type place struct {
	mark   wire.Mark
	within int
}

// The file of places: a magic number, then for each stream of each container of the pod two places, and the number of the one that counts.
const (
	placesMagic = "cradle-output-2\n"
	placesHead  = 64
	placeSize   = 64
	placesSize  = placesHead + 2*spec.MaxContainers*placeSize
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

// of is the entry of a container's stream, 1 or 2.
func (p *places) of(container int, stream byte) []byte {
	return p.mem[placesHead+(2*container+int(stream)-1)*placeSize:][:placeSize]
}

// current is the number of the place that counts.
func current(entry []byte) *atomic.Uint32 { return (*atomic.Uint32)(unsafe.Pointer(&entry[0])) }

func (p *places) get(container int, stream byte) place {
	e := p.of(container, stream)
	slot := e[8+24*(current(e).Load()&1):]
	at := place{
		wire.Mark{Segment: binary.NativeEndian.Uint64(slot), Offset: int64(binary.NativeEndian.Uint64(slot[8:]))},
		int(binary.NativeEndian.Uint64(slot[16:])),
	}
	if at.mark.Offset < 0 || at.within < 0 { // a file that was damaged
		return place{}
	}
	return at
}

// set stores a place beside the one that counts, and then makes it count.
func (p *places) set(container int, stream byte, at place) {
	e := p.of(container, stream)
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

// goesNowhere says whether what is written there is thrown away.
func goesNowhere(path string) bool { return path == "" || path == os.DevNull }

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
	unheard bool     // nobody wants it: Nomad keeps no log of the task
	stop    context.CancelCauseFunc
	work    sync.WaitGroup
	warn    func(string, ...any)
}

// newDelivery opens what a task's output goes to. Each pipe is given to hold as soon as it is open: in between, the end of this process would be that of
// the pipe's reader.
func newDelivery(placesPath string, rec *record, hold func(name string, pipe *os.File) error, warn func(string, ...any)) (_ *delivery, err error) {
	d := &delivery{warn: warn, unheard: goesNowhere(rec.Stdout) && goesNowhere(rec.Stderr)}
	if d.places, err = openPlaces(placesPath); err != nil {
		return nil, err
	}
	for i, stream := range []struct{ name, path string }{{"stdout", rec.Stdout}, {"stderr", rec.Stderr}} {
		if d.sinks[i], err = openSink(stream.path); err == nil && !goesNowhere(stream.path) {
			err = hold(stream.name, d.sinks[i].file)
		}
		if err != nil {
			d.close()
			return nil, fmt.Errorf("output of the task: %w", err)
		}
	}
	return d, nil
}

// heldBy has a pod's machine hold pipes.
func heldBy(ctx context.Context, m *vmm.Machine) func(string, *os.File) error {
	return func(name string, pipe *os.File) error {
		ctx, cancel := context.WithTimeout(ctx, callTimeout)
		defer cancel()
		err := m.Hold(ctx, name, pipe)
		if err == nil {
			return nil
		}
		select {
		case <-m.Done():
			return nil // nothing is to outlive it
		case <-time.After(time.Second):
			return err
		}
	}
}

// begin delivers the output of a pod from where the last delivery has come to.
func (d *delivery) begin(r *pod.Running) {
	var ctx context.Context
	ctx, d.stop = context.WithCancelCause(context.Background())
	d.running = r
	if d.unheard {
		return
	}
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
		before := [2]place{d.places.get(i, 1), d.places.get(i, 2)}
		err := d.followOnce(ctx, i, c)
		if err == nil || ctx.Err() != nil || errors.Is(err, errUnwanted) {
			return
		}
		if before != [2]place{d.places.get(i, 1), d.places.get(i, 2)} {
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
	w := d.writer(ctx, i, c.Name)
	out, err := d.running.Guest().Output(ctx, c.Name, w.begin())
	if err != nil {
		return err
	}
	defer out.Close()
	defer context.AfterFunc(ctx, func() {
		for _, s := range d.sinks {
			_ = s.file.SetWriteDeadline(time.Unix(1, 0))
		}
	})()
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
	last      wire.Mark // behind the piece that came last
	streams   [2]stream
}

// A stream is stdout or stderr of a container. The pieces of the task's own are delivered in their order, whatever their stream: its places are the first's.
type stream struct {
	at    place  // everything before it was delivered
	skip  int    // of the first piece that is new
	begun []byte // the unfinished line behind at
}

// writer makes a writer that goes on where the last one has come to.
func (d *delivery) writer(ctx context.Context, container int, name string) *writer {
	w := &writer{d: d, ctx: ctx, container: container}
	for i := range w.streams {
		at := d.places.get(container, byte(i+1))
		w.streams[i] = stream{at: at, skip: at.within}
	}
	if container > 0 {
		w.prefix = []byte(name + ": ")
	}
	w.last = w.begin()
	return w
}

// begin is the mark behind which the first piece is that the writer needs.
func (w *writer) begin() wire.Mark {
	out, errs := w.streams[0].at.mark, w.streams[1].at.mark
	if w.prefix != nil && errs.Before(out) {
		return errs
	}
	return out
}

// move notes that everything before a place was delivered.
func (w *writer) move(stream byte, at place) {
	w.streams[stream-1].at = at
	w.d.places.set(w.container, stream, at)
}

func (w *writer) piece(p wire.Piece) error {
	before := w.last
	w.last = p.Next
	if w.prefix == nil {
		return w.raw(p, before)
	}
	return w.lines(p, before)
}

// raw delivers a piece, in pieces that a pipe takes as a whole.
func (w *writer) raw(p wire.Piece, before wire.Mark) error {
	done := min(w.streams[0].skip, len(p.Data))
	w.streams[0].skip = 0
	for done < len(p.Data) {
		chunk := p.Data[done:min(done+pipeBuf, len(p.Data))]
		if err := w.write(p.Stream, chunk); err != nil {
			return err
		}
		if done += len(chunk); done < len(p.Data) {
			w.move(1, place{before, done})
		}
	}
	w.move(1, place{mark: p.Next})
	return nil
}

// lines delivers the lines that a piece finishes.
func (w *writer) lines(p wire.Piece, before wire.Mark) error {
	s := &w.streams[p.Stream-1]
	if s.at.mark.Before(p.Next) { // else it was delivered, and is only here for the other stream's sake
		done := min(s.skip, len(p.Data))
		s.skip = 0
		for done < len(p.Data) {
			n := bytes.IndexByte(p.Data[done:], '\n') + 1
			if n == 0 {
				n = len(p.Data) - done
			}
			n = min(n, max(pipeBuf-len(w.prefix)-1-len(s.begun), 1))
			s.begun = append(s.begun, p.Data[done:done+n]...)
			done += n
			if s.begun[len(s.begun)-1] == '\n' || len(w.prefix)+len(s.begun)+1 >= pipeBuf {
				if err := w.flush(p.Stream, place{before, done}); err != nil {
					return err
				}
			}
		}
	}
	for i := range w.streams {
		if s := &w.streams[i]; len(s.begun) == 0 && s.at.mark.Before(p.Next) {
			w.move(byte(i+1), place{mark: p.Next})
		}
	}
	return nil
}

// flush writes a stream's line, which ends at a place.
func (w *writer) flush(stream byte, end place) error {
	s := &w.streams[stream-1]
	if len(s.begun) == 0 {
		return nil
	}
	text := append(bytes.Clone(w.prefix), s.begun...)
	if text[len(text)-1] != '\n' {
		text = append(text, '\n')
	}
	if err := w.write(stream, text); err != nil {
		return err
	}
	s.begun = s.begun[:0]
	w.move(stream, end)
	return nil
}

// rest writes the lines that the container's end has finished.
func (w *writer) rest() error {
	return errors.Join(w.flush(1, place{mark: w.last}), w.flush(2, place{mark: w.last}))
}

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
