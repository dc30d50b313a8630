package driver

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cradlestack/cradlestack/driver-cradle/wire"
	"github.com/cradlestack/cradlestack/spec"
)

func TestPlaces(t *testing.T) {
	path := filepath.Join(t.TempDir(), "output")
	p, err := openPlaces(path)
	if err != nil {
		t.Fatal(err)
	}
	if got := p.get(0, 1); got != (place{}) {
		t.Errorf("a new file has %+v", got)
	}
	want := map[int]place{}
	for i := range 2 * spec.MaxContainers {
		for n := range 3 { // the last one counts
			want[i] = place{wire.Mark{Segment: uint64(i), Offset: int64(1000*i + n)}, n}
			p.set(i/2, byte(i%2+1), want[i])
		}
	}
	p.close()
	if p, err = openPlaces(path); err != nil {
		t.Fatal(err)
	}
	defer p.close()
	for i := range 2 * spec.MaxContainers {
		if got := p.get(i/2, byte(i%2+1)); got != want[i] {
			t.Errorf("entry %d: %+v, want %+v", i, got, want[i])
		}
	}
	// What is half stored does not count.
	entry := p.of(3, 2)
	clear(entry[8+24*(current(entry).Load()&1^1):][:24])
	if got := p.get(3, 2); got != want[7] {
		t.Errorf("beside a half stored place: %+v, want %+v", got, want[7])
	}
}

func FuzzPlaces(f *testing.F) {
	f.Add([]byte(placesMagic))
	f.Add([]byte("cradle-output-0\n"))
	f.Add(bytes.Repeat([]byte{0xff}, placesSize))
	f.Add(append([]byte(placesMagic), bytes.Repeat([]byte{0xff}, placesSize)...))
	f.Fuzz(func(t *testing.T, data []byte) {
		path := filepath.Join(t.TempDir(), "output")
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
		p, err := openPlaces(path)
		if err != nil {
			return
		}
		defer p.close()
		for i := range spec.MaxContainers {
			for stream := range byte(2) {
				if at := p.get(i, stream+1); at.within < 0 || at.mark.Offset < 0 {
					t.Errorf("place %+v", at)
				}
				p.set(i, stream+1, place{within: 1})
				if got := p.get(i, stream+1); got != (place{within: 1}) {
					t.Errorf("place %+v", got)
				}
			}
		}
	})
}

// A gutter is a delivery into named pipes, and what comes out of them.
type gutter struct {
	*delivery
	t     *testing.T
	paths [2]string
	ends  [2]int // for reading
}

func newGutter(t *testing.T) *gutter {
	t.Helper()
	g := &gutter{t: t}
	dir := t.TempDir()
	for i := range g.paths {
		g.paths[i] = filepath.Join(dir, fmt.Sprint(i+1))
		if err := unix.Mkfifo(g.paths[i], 0o600); err != nil {
			t.Fatal(err)
		}
		end, err := unix.Open(g.paths[i], unix.O_RDWR|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		g.ends[i] = end
		t.Cleanup(func() { unix.Close(end) })
	}
	g.open(filepath.Join(dir, "output"))
	return g
}

func (g *gutter) open(places string) {
	g.t.Helper()
	d, err := newDelivery(places, &record{Stdout: g.paths[0], Stderr: g.paths[1]}, func(string, *os.File) error { return nil }, func(string, ...any) {})
	if err != nil {
		g.t.Fatal(err)
	}
	g.delivery = d
}

// came is what has come out of a stream since the last call.
func (g *gutter) came(stream byte) string {
	g.t.Helper()
	var out []byte
	buf := make([]byte, 64<<10)
	for {
		n, err := unix.Read(g.ends[stream-1], buf)
		if err == unix.EAGAIN || n == 0 {
			return string(out)
		}
		if err != nil {
			g.t.Fatal(err)
		}
		out = append(out, buf[:n]...)
	}
}

// pieces makes a container's output of random lines, cut at random places, and the marks that a guest would count.
func pieces(random *rand.Rand) (all []wire.Piece, text [2]string) {
	mark := wire.Mark{Segment: 1}
	for range 40 {
		p := wire.Piece{Stream: byte(1 + random.IntN(2))}
		for range random.IntN(4) {
			line := strings.Repeat(string(rune('a'+random.IntN(26))), random.IntN(60))
			if random.IntN(20) == 0 {
				line = strings.Repeat("long", 2000)
			}
			p.Data = append(p.Data, line...)
			if random.IntN(3) > 0 {
				p.Data = append(p.Data, '\n')
			}
		}
		if mark.Offset += int64(len(p.Data)) + 20; mark.Offset > 5000 {
			mark = wire.Mark{Segment: mark.Segment + 1, Offset: int64(len(p.Data)) + 20}
		}
		p.Next = mark
		all = append(all, p)
		text[p.Stream-1] += string(p.Data)
	}
	return all, text
}

// prefixed is what whole lines become.
func prefixed(prefix, text string) string {
	var b strings.Builder
	for line := range strings.Lines(text) {
		for line = strings.TrimSuffix(line, "\n"); ; {
			n := min(len(line), pipeBuf-len(prefix)-1)
			b.WriteString(prefix + line[:n] + "\n")
			if line = line[n:]; line == "" {
				break
			}
		}
	}
	return b.String()
}

// Whoever delivers is ended at random moments, and the next one goes on: nothing is missing and nothing is there twice.
func TestDeliveryGoesOn(t *testing.T) {
	for seed := range uint64(200) {
		for container, prefix := range []string{"", "side: "} {
			random := rand.New(rand.NewPCG(seed, uint64(container)))
			all, text := pieces(random)
			g := newGutter(t)
			var got [2]string
			for over := false; !over; {
				w := g.writer(t.Context(), container, "side")
				begin := slices.IndexFunc(all, func(p wire.Piece) bool { return w.begin().Before(p.Next) })
				if over = begin < 0; over {
					begin = len(all)
				}
				for i, p := range all[begin:] {
					if err := w.piece(p); err != nil {
						t.Fatal(err)
					}
					got[0], got[1] = got[0]+g.came(1), got[1]+g.came(2)
					if over = begin+i == len(all)-1; !over && random.IntN(5) == 0 {
						break
					}
				}
				if over {
					if err := w.rest(); err != nil {
						t.Fatal(err)
					}
					// Its successor finds nothing to do.
					w = g.writer(t.Context(), container, "side")
					for _, p := range all {
						if w.begin().Before(p.Next) {
							t.Fatalf("seed %d: a piece is delivered after the end", seed)
						}
					}
				}
				got[0], got[1] = got[0]+g.came(1), got[1]+g.came(2)
			}
			for i := range text {
				want := text[i]
				if container > 0 {
					want = prefixed(prefix, want)
				}
				if got[i] != want {
					t.Fatalf("seed %d, container %d, stream %d:\n%q\nwant\n%q", seed, container, i+1, got[i], want)
				}
			}
			g.close()
		}
	}
}

// A pipe that nobody reads holds up the writer, until the writing is not wanted any more.
func TestSinkIsFull(t *testing.T) {
	g := newGutter(t)
	defer g.close()
	ctx, cancel := context.WithCancelCause(t.Context())
	w := g.writer(ctx, 0, "main")
	full := make(chan error)
	go func() {
		for {
			w.last.Offset += pipeBuf
			if err := w.piece(wire.Piece{Stream: 1, Next: w.last, Data: make([]byte, pipeBuf)}); err != nil {
				full <- err
				return
			}
		}
	}()
	select {
	case err := <-full:
		t.Fatalf("it is not waited for: %v", err)
	case <-time.After(50 * time.Millisecond):
	}
	cancel(io.ErrClosedPipe)
	_ = g.sinks[0].file.SetWriteDeadline(time.Unix(1, 0)) // as followOnce does
	if err := <-full; err != io.ErrClosedPipe {
		t.Errorf("the writer ends with %v", err)
	}
}

func TestSinkWithoutPath(t *testing.T) {
	s, err := openSink("")
	if err != nil {
		t.Fatal(err)
	}
	defer s.file.Close()
	if err := s.write([]byte("gone"), func() error { return nil }); err != nil {
		t.Error(err)
	}
	if _, err := openSink(filepath.Join(t.TempDir(), "missing")); err == nil {
		t.Error("a sink that is not there opens")
	}
}
