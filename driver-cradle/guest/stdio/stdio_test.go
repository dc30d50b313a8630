package stdio

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cradlestack/cradlestack/internal/locked"
)

// container is the other end of a run's streams.
type container struct {
	stdin          *os.File
	stdout, stderr *os.File
	drained        <-chan struct{}
}

func start(t testing.TB, o *IO) *container {
	t.Helper()
	pipe := func() (r, w *os.File) {
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { r.Close(); w.Close() })
		return r, w
	}
	c := &container{}
	var s Streams
	var out, errr *os.File
	out, c.stdout = pipe()
	errr, c.stderr = pipe()
	s.Stdout, s.Stderr = out, errr
	if o.opts.OpenStdin {
		var in *os.File
		c.stdin, in = pipe()
		s.Stdin = in
	}
	c.drained = o.Run(s)
	return c
}

func (c *container) exit(t testing.TB) {
	t.Helper()
	c.stdout.Close()
	c.stderr.Close()
	if c.stdin != nil {
		c.stdin.Close()
	}
	within(t, c.drained, "drained")
}

func within(t testing.TB, c <-chan struct{}, what string) {
	t.Helper()
	select {
	case <-c:
	case <-time.After(2 * time.Minute):
		buf := make([]byte, 1<<20)
		t.Fatalf("%s: not within 2 minutes\n%s", what, buf[:runtime.Stack(buf, true)])
	}
}

func open(t testing.TB, o Options) *IO {
	t.Helper()
	s, err := Open(filepath.Join(t.TempDir(), "log"), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

// logged gives what ReadLogs writes, stderr's writes in brackets.
func logged(t testing.TB, o *IO, lo LogOptions) string {
	t.Helper()
	var b strings.Builder
	lo.Stdout = &b
	lo.Stderr = writerFunc(func(p []byte) (int, error) { return fmt.Fprintf(&b, "[%s]", p) })
	if err := o.ReadLogs(t.Context(), lo); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) {
	if _, err := f(p); err != nil {
		return 0, err
	}
	return len(p), nil
}

func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for range 24_000 {
		if ok() {
			return
		}
		time.Sleep(5 * time.Millisecond)
	}
	t.Fatalf("never: %s", what)
}

// say writes to the container's stream and waits until it is logged, so that the order is known.
func say(t testing.TB, o *IO, w io.Writer, s string) {
	t.Helper()
	before := o.Usage()
	if _, err := io.WriteString(w, s); err != nil {
		t.Fatal(err)
	}
	want := before + int64(len(s)+headerLen+trailerLen)
	eventually(t, "logged "+s, func() bool { return o.Usage() >= want })
}

func TestLines(t *testing.T) {
	o := open(t, Options{})
	c := start(t, o)
	say(t, o, c.stdout, "one\ntw")
	say(t, o, c.stderr, "bad\nwor")
	say(t, o, c.stdout, "o\nthree\nfour")
	say(t, o, c.stderr, "se\n")
	for _, tt := range []struct {
		name string
		lo   LogOptions
		want string
	}{
		{"all", LogOptions{Tail: -1}, "one\n[bad\n]two\nthree\n[worse\n]four"},
		{"none", LogOptions{Tail: 0}, ""},
		{"unfinished line counts", LogOptions{Tail: 1}, "four"},
		{"two", LogOptions{Tail: 2}, "[worse\n]four"},
		{"line begun before another stream's", LogOptions{Tail: 4}, "two\nthree\n[worse\n]four"},
		{"five", LogOptions{Tail: 5}, "[bad\n]two\nthree\n[worse\n]four"},
		{"more than there are", LogOptions{Tail: 100}, "one\n[bad\n]two\nthree\n[worse\n]four"},
	} {
		if got := logged(t, o, tt.lo); got != tt.want {
			t.Errorf("%s: got %q, want %q", tt.name, got, tt.want)
		}
	}
	c.exit(t)
	if got, want := logged(t, o, LogOptions{Tail: 2}), "[worse\n]four"; got != want {
		t.Errorf("after the end: got %q, want %q", got, want)
	}
	c = start(t, o)
	say(t, o, c.stdout, "again\n")
	c.exit(t)
	if got, want := logged(t, o, LogOptions{Tail: 3}), "[worse\n]fouragain\n"; got != want {
		t.Errorf("after a restart: got %q, want %q", got, want)
	}
}

func TestTimes(t *testing.T) {
	o := open(t, Options{})
	c := start(t, o)
	say(t, o, c.stdout, "early\nlate")
	between := time.Now()
	time.Sleep(2 * time.Millisecond)
	say(t, o, c.stdout, "r\n")
	say(t, o, c.stderr, "bad\n")
	c.exit(t)
	for name, tt := range map[string]struct {
		lo   LogOptions
		want string
	}{
		"since":          {LogOptions{Tail: -1, Since: between}, "later\n[bad\n]"},
		"until":          {LogOptions{Tail: -1, Until: between}, "early\n"},
		"tail and until": {LogOptions{Tail: 1, Until: between}, "early\n"},
		"tail and since": {LogOptions{Tail: 10, Since: between}, "later\n[bad\n]"},
		"since now":      {LogOptions{Tail: -1, Since: time.Now()}, ""},
	} {
		if got := logged(t, o, tt.lo); got != tt.want {
			t.Errorf("%s: got %q, want %q", name, got, tt.want)
		}
	}
	var times []time.Time
	for line := range strings.Lines(logged(t, o, LogOptions{Tail: -1, Timestamps: true})) {
		stamp, text, found := strings.Cut(strings.Trim(line, "[]\n"), " ")
		if !found {
			continue // the bracket that closes stderr's write
		}
		at, err := time.Parse(time.RFC3339Nano, stamp)
		if err != nil || len(stamp) != len("2006-01-02T15:04:05.000000000Z") || text == "" {
			t.Errorf("line %q: %v", line, err)
		}
		times = append(times, at)
	}
	if len(times) != 3 || !times[0].Before(between) || !times[1].After(between) || times[2].Before(times[1]) {
		t.Errorf("times %v, between %v", times, between)
	}
}

func TestTimestampOncePerLongLine(t *testing.T) {
	o := open(t, Options{})
	c := start(t, o)
	long := strings.Repeat("x", 3*maxHeld)
	say(t, o, c.stdout, long)
	say(t, o, c.stdout, long+"\nshort\n")
	c.exit(t)
	got := logged(t, o, LogOptions{Tail: -1, Timestamps: true})
	if n := strings.Count(got, "Z "); n != 2 || !strings.Contains(got, " "+long+long+"\n") {
		t.Errorf("%d timestamps for 2 lines", n)
	}
}

// TestRandomAgainstModel writes output at random, rotating, reopening, and compares every tail with what a simple model says.
func TestRandomAgainstModel(t *testing.T) {
	for seed := range uint64(30) {
		rnd := rand.New(rand.NewPCG(seed, 1))
		dir := filepath.Join(t.TempDir(), "log")
		reopen := func() *log {
			l, err := openLog(dir, 8*maxRecord)
			if err != nil {
				t.Fatal(err)
			}
			return l
		}
		l := reopen()
		type line struct {
			stream int
			text   string
		}
		var lines []line
		held := [2]string{}
		end := func() {
			for s := range held {
				if held[s] != "" {
					lines = append(lines, line{s, held[s]})
					held[s] = ""
				}
			}
		}
		l.begin()
		for range 400 {
			switch n := rnd.IntN(100); {
			case n < 4:
				l.endRun()
				end()
				l.begin()
			case n < 6:
				l.close()
				l = reopen()
				end()
				l.begin()
			default:
				s := rnd.IntN(2)
				p := make([]byte, 1+rnd.IntN(60))
				if rnd.IntN(20) == 0 {
					p = make([]byte, 1+rnd.IntN(9000))
				}
				for i := range p {
					p[i] = "abc\n"[min(3, rnd.IntN(30)/9)]
				}
				b := make([]byte, headerLen+len(p)+trailerLen)
				copy(b[headerLen:], p)
				l.append(Stream(s+1), b)
				rest := held[s] + string(p)
				for {
					i := strings.IndexByte(rest, '\n')
					if i < 0 {
						break
					}
					lines = append(lines, line{s, rest[:i+1]})
					rest = rest[i+1:]
				}
				held[s] = rest
			}
		}
		end()
		for range 60 {
			n := rnd.IntN(len(lines) + 10)
			want := 1 + rnd.IntN(3) // streams
			var got strings.Builder
			lo := LogOptions{Tail: n}
			var wanted []string
			if want&1 != 0 {
				lo.Stdout = &got
			}
			if want&2 != 0 {
				lo.Stderr = &got
			}
			for i := len(lines) - 1; i >= 0 && len(wanted) < n; i-- {
				if want>>lines[i].stream&1 != 0 {
					wanted = append(wanted, lines[i].text)
				}
			}
			slices.Reverse(wanted)
			model := strings.Join(wanted, "")
			if err := l.readLines(t.Context(), lo); err != nil {
				t.Fatal(err)
			}
			if got.String() != model {
				t.Fatalf("seed %d, tail %d of %d, streams %b: got %d bytes %.80q…, want %d bytes %.80q…", seed, n, len(lines), want, got.Len(), got.String(), len(model), model)
			}
		}
		l.close()
	}
}

func TestRotation(t *testing.T) {
	const size = 8 * maxRecord
	o := open(t, Options{MaxSize: size})
	c := start(t, o)
	const n = 200_000
	go func() {
		w := &bytes.Buffer{}
		for i := range n {
			fmt.Fprintf(w, "line %d\n", i)
			if w.Len() > 5000 {
				w.WriteTo(c.stdout)
			}
		}
		w.WriteTo(c.stdout)
		c.stdout.Close()
		c.stderr.Close()
	}()
	within(t, c.drained, "drained")
	if got := o.Usage(); got > size || got < size/2 {
		t.Errorf("%d bytes kept, limit %d", got, size)
	}
	files, _ := os.ReadDir(o.Path())
	if len(files) > keepSegments {
		t.Errorf("%d files", len(files))
	}
	got := logged(t, o, LogOptions{Tail: -1})
	if !strings.HasSuffix(got, fmt.Sprintf("line %d\n", n-1)) {
		t.Errorf("the end is missing: %q", got[max(0, len(got)-40):])
	}
	first := got[strings.IndexByte(got, '\n')+1:]
	var i int
	fmt.Sscanf(first, "line %d", &i)
	for line := range strings.Lines(first) {
		if line != fmt.Sprintf("line %d\n", i) {
			t.Fatalf("gap before %q", line)
		}
		i++
	}
}

func TestFollow(t *testing.T) {
	o := open(t, Options{MaxSize: 64 * maxRecord})
	c := start(t, o)
	say(t, o, c.stdout, "before\n")
	const followers, n = 8, 20_000
	var wg sync.WaitGroup
	sums := make([]locked.Buffer, followers)
	for i := range followers {
		wg.Go(func() {
			if err := o.ReadLogs(t.Context(), LogOptions{Tail: -1, Follow: true, Stdout: &sums[i]}); err != nil {
				t.Error(err)
			}
		})
	}
	var want strings.Builder
	want.WriteString("before\n")
	for i := range n {
		s := fmt.Sprintf("line %d\n", i)
		want.WriteString(s)
		io.WriteString(c.stdout, s)
	}
	c.exit(t)
	wg.Wait()
	for i := range sums {
		if sums[i].String() != want.String() {
			t.Errorf("follower %d has %d bytes, want %d", i, len(sums[i].String()), want.Len())
		}
	}
}

func TestFollowHoldsUnfinishedLineBack(t *testing.T) {
	o := open(t, Options{})
	c := start(t, o)
	say(t, o, c.stdout, "done\nprompt: ")
	var got locked.Buffer
	idle := make(chan struct{}, 100)
	done := make(chan struct{})
	go func() {
		defer close(done)
		err := o.ReadLogs(t.Context(), LogOptions{Tail: 1, Follow: true, Stdout: &got, Idle: func() error { idle <- struct{}{}; return nil }})
		if err != nil {
			t.Error(err)
		}
	}()
	<-idle
	if got.String() != "done\n" {
		t.Errorf("got %q", got.String())
	}
	say(t, o, c.stdout, "yes\n")
	c.exit(t)
	within(t, done, "end of follow")
	if got.String() != "done\nprompt: yes\n" {
		t.Errorf("got %q", got.String())
	}
}

func TestFollowOverRestarts(t *testing.T) {
	o := open(t, Options{})
	final, done := make(chan struct{}), make(chan struct{})
	var got locked.Buffer
	go func() {
		defer close(done)
		if err := o.ReadLogs(t.Context(), LogOptions{Tail: -1, Follow: true, Stdout: &got, Restarts: final}); err != nil {
			t.Error(err)
		}
	}()
	want := ""
	for i := range 3 {
		c := start(t, o)
		fmt.Fprintf(c.stdout, "run %d\n", i)
		want += fmt.Sprintf("run %d\n", i)
		c.exit(t)
	}
	close(final)
	within(t, done, "end of follow")
	if got.String() != want {
		t.Errorf("got %q", got.String())
	}
}

func TestFollowUntil(t *testing.T) {
	o := open(t, Options{})
	c := start(t, o)
	defer c.exit(t)
	say(t, o, c.stdout, "one\n")
	if got := logged(t, o, LogOptions{Tail: -1, Follow: true, Until: time.Now().Add(50 * time.Millisecond)}); got != "one\n" {
		t.Errorf("got %q", got)
	}
}

// TestSlowFollower: one that reads nothing costs the container nothing, and afterwards goes on with what is left.
func TestSlowFollower(t *testing.T) {
	o := open(t, Options{MaxSize: 8 * maxRecord})
	c := start(t, o)
	say(t, o, c.stdout, "first\n")
	stuck, free := make(chan struct{}), make(chan struct{})
	done := make(chan struct{})
	var got locked.Buffer
	go func() {
		defer close(done)
		var once sync.Once
		err := o.ReadLogs(t.Context(), LogOptions{Tail: -1, Follow: true, Stdout: writerFunc(func(p []byte) (int, error) {
			once.Do(func() { close(stuck); <-free })
			return got.Write(p)
		})})
		if err != nil {
			t.Error(err)
		}
	}()
	within(t, stuck, "follower")
	line := []byte(strings.Repeat("y", 99) + "\n")
	for range 100_000 { // far more than the log and all pipes hold
		if _, err := c.stdout.Write(line); err != nil {
			t.Fatal(err)
		}
	}
	c.stdout.WriteString("last\n")
	c.exit(t)
	close(free)
	within(t, done, "end of follow")
	if s := got.String(); !strings.HasSuffix(s, "y\nlast\n") || int64(len(s)) > 9*maxRecord {
		t.Errorf("got %d bytes, ending %q", len(s), s[max(0, len(s)-20):])
	}
}

// TestSlowAttached: an attached client loses nothing; the container waits for it when the log is full.
func TestSlowAttached(t *testing.T) {
	o := open(t, Options{MaxSize: 8 * maxRecord})
	c := start(t, o)
	r, w := io.Pipe()
	attached := attach(t, o, AttachOptions{Stream: true, Stdout: w})
	const size = 40 * maxRecord
	go func() {
		rnd := rand.New(rand.NewPCG(7, 7))
		b := make([]byte, 8192)
		for n := 0; n < size; n += len(b) {
			for i := range b {
				b[i] = byte(rnd.Uint32())
			}
			c.stdout.Write(b)
		}
		c.stdout.Close()
		c.stderr.Close()
	}()
	eventually(t, "log full", func() bool { return o.Usage() > 4*maxRecord })
	go func() { <-attached.done; w.Close() }()
	rnd := rand.New(rand.NewPCG(7, 7))
	got, err := io.ReadAll(r)
	if err != nil || len(got) != size/8192*8192+8192 {
		t.Fatalf("got %d bytes: %v", len(got), err)
	}
	for i, b := range got {
		if b != byte(rnd.Uint32()) {
			t.Fatalf("byte %d differs", i)
		}
	}
	within(t, c.drained, "drained")
}

func TestAttachedClientThatGoesFreesTheContainer(t *testing.T) {
	o := open(t, Options{MaxSize: 8 * maxRecord})
	c := start(t, o)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	ready := make(chan struct{})
	go func() {
		done <- o.Attach(ctx, AttachOptions{Stream: true, Attached: func() error { close(ready); return nil }, Stdout: writerFunc(func([]byte) (int, error) {
			<-ctx.Done()
			return 0, ctx.Err()
		})})
	}()
	within(t, ready, "attached")
	go func() {
		b := make([]byte, 8192)
		for range 40 * maxRecord / 8192 {
			c.stdout.Write(b)
		}
		c.stdout.Close()
		c.stderr.Close()
	}()
	eventually(t, "log full", func() bool { return o.Usage() > 4*maxRecord })
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Errorf("attach: %v", err)
	}
	within(t, c.drained, "drained")
}

type attachedClient struct {
	done chan struct{}
	err  error
}

// attach returns when the client misses nothing any more.
func attach(t testing.TB, o *IO, a AttachOptions) *attachedClient {
	t.Helper()
	c := &attachedClient{done: make(chan struct{})}
	ready := make(chan struct{})
	a.Attached = func() error { close(ready); return nil }
	ctx := t.Context()
	go func() {
		defer close(c.done)
		c.err = o.Attach(ctx, a)
	}()
	within(t, ready, "attached")
	return c
}

// TestAttachLogsAndStream: what was logged and what comes, without a lost or doubled byte, while the container is writing.
func TestAttachLogsAndStream(t *testing.T) {
	o := open(t, Options{})
	c := start(t, o)
	const n = 50_000
	half := make(chan struct{})
	go func() {
		for i := range n {
			fmt.Fprintf(c.stdout, "%d ", i)
			if i == n/2 {
				close(half)
			}
		}
		c.stdout.Close()
		c.stderr.Close()
	}()
	within(t, half, "half")
	var got locked.Buffer
	a := attach(t, o, AttachOptions{Logs: true, Stream: true, Stdout: &got})
	within(t, a.done, "attach")
	var want strings.Builder
	for i := range n {
		fmt.Fprintf(&want, "%d ", i)
	}
	if a.err != nil || got.String() != want.String() {
		t.Errorf("got %d bytes, want %d: %v", len(got.String()), want.Len(), a.err)
	}
}

func TestAttachBeforeStartAndToOneRun(t *testing.T) {
	o := open(t, Options{OpenStdin: true, StdinOnce: true})
	var out, errs locked.Buffer
	a := attach(t, o, AttachOptions{Stream: true, Stdin: io.NopCloser(strings.NewReader("typed before the start")), Stdout: &out, Stderr: &errs})
	c := start(t, o)
	in, err := io.ReadAll(c.stdin) // ends: StdinOnce
	if string(in) != "typed before the start" || err != nil {
		t.Errorf("stdin %q: %v", in, err)
	}
	say(t, o, c.stdout, "out")
	say(t, o, c.stderr, "err")
	c.exit(t)
	within(t, a.done, "attach")
	if a.err != nil || out.String() != "out" || errs.String() != "err" {
		t.Errorf("got %q %q: %v", out.String(), errs.String(), a.err)
	}
}

func TestStdinStaysOpenWithoutOnce(t *testing.T) {
	o := open(t, Options{OpenStdin: true})
	c := start(t, o)
	for _, s := range []string{"one", "two"} {
		a := attach(t, o, AttachOptions{Stream: true, Stdin: io.NopCloser(strings.NewReader(s))})
		b := make([]byte, 3)
		if _, err := io.ReadFull(c.stdin, b); err != nil || string(b) != s {
			t.Fatalf("stdin %q: %v", b, err)
		}
		defer within(t, a.done, "attach")
	}
	c.exit(t)
}

func TestDetachKeys(t *testing.T) {
	o := open(t, Options{OpenStdin: true, TTY: true})
	c := start(t, o)
	r, w := io.Pipe()
	a := attach(t, o, AttachOptions{Stream: true, Stdin: r, DetachKeys: []byte{16, 17}})
	go io.WriteString(w, "a\x10b")
	b := make([]byte, 3)
	if _, err := io.ReadFull(c.stdin, b); err != nil || string(b) != "a\x10b" {
		t.Fatalf("stdin %q: %v", b, err)
	}
	io.WriteString(w, "\x10")
	io.WriteString(w, "\x11")
	within(t, a.done, "attach")
	if !errors.Is(a.err, ErrDetached) {
		t.Errorf("attach: %v", a.err)
	}
	c.exit(t)
}

// TestClientLeavesWhileContainerReadsNothing: the client's input is stuck, its attachment is not.
func TestClientLeavesWhileContainerReadsNothing(t *testing.T) {
	o := open(t, Options{OpenStdin: true})
	c := start(t, o)
	ctx, cancel := context.WithCancel(t.Context())
	r, w := io.Pipe()
	done := make(chan error)
	go func() { done <- o.Attach(ctx, AttachOptions{Stream: true, Stdin: r}) }()
	for range 9 { // a pipe holds eight of these: the last is stuck
		if _, err := w.Write(make([]byte, 8<<10)); err != nil {
			t.Fatal(err)
		}
	}
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Errorf("attach: %v", err)
	}
	c.exit(t)
}

// A transcript is of one guest's time: it begins where that has opened the log, whatever an earlier guest, which may have been killed, had delivered of it. It is
// the host's to take until that has the guest shut down, which closes the log: then it has had all of it.
func TestTranscript(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "log")
	ended := make(chan struct{})
	close(ended)
	transcript := func(o *IO, after Mark) (text string, end Mark) {
		t.Helper()
		end = after
		err := o.Transcript(t.Context(), after, ended, func(_ Stream, next Mark, data []byte) error {
			text, end = text+string(data), next
			return nil
		}, func() error { return nil })
		if err != nil {
			t.Error(err)
		}
		return text, end
	}
	var end Mark
	for i, words := range []string{"first\n", "second, which is longer\n", "third\n"} {
		o, err := Open(dir, Options{})
		if err != nil {
			t.Fatal(err)
		}
		c := start(t, o)
		say(t, o, c.stdout, words)
		got, middle := transcript(o, Mark{})
		if got != words {
			t.Errorf("the transcript is %q, want %q", got, words)
		}
		say(t, o, c.stdout, "more\n")
		c.exit(t)
		if got, end = transcript(o, middle); got != "more\n" {
			t.Errorf("going on, the transcript is %q", got)
		}
		o.Close()
		for _, after := range []Mark{{}, middle, end} {
			if got, _ := transcript(o, after); got != "" {
				t.Errorf("after its end the transcript is %q", got)
			}
		}
		if i == 0 { // as if the machine had been killed before all of it was on its disk
			if err := os.Truncate(filepath.Join(dir, segmentName(1)), 10); err != nil {
				t.Fatal(err)
			}
		}
	}
}

func TestUnlogged(t *testing.T) {
	o := Unlogged(Options{OpenStdin: true})
	var out, errs locked.Buffer
	a := attach(t, o, AttachOptions{Stream: true, Stdin: io.NopCloser(strings.NewReader("input")), Stdout: &out, Stderr: &errs})
	c := start(t, o)
	if in, err := io.ReadAll(c.stdin); string(in) != "input" || err != nil {
		t.Errorf("stdin %q: %v", in, err)
	}
	io.WriteString(c.stdout, "out")
	io.WriteString(c.stderr, "err")
	c.exit(t)
	within(t, a.done, "attach")
	if a.err != nil || out.String() != "out" || errs.String() != "err" {
		t.Errorf("got %q %q: %v", out.String(), errs.String(), a.err)
	}

	o = Unlogged(Options{})
	c = start(t, o) // nobody attached: thrown away
	if _, err := c.stdout.Write(make([]byte, 1<<20)); err != nil {
		t.Error(err)
	}
	c.exit(t)
}

func TestTornEnd(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "log")
	o, err := Open(dir, Options{})
	if err != nil {
		t.Fatal(err)
	}
	c := start(t, o)
	say(t, o, c.stdout, "kept\nhal")
	whole := o.Usage()
	say(t, o, c.stdout, "lost, torn\n")
	c.exit(t)
	o.Close()
	file := filepath.Join(dir, segmentName(1))
	all, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	for cut := whole; cut < int64(len(all)); cut++ {
		torn := append(bytes.Clone(all[:cut]), make([]byte, cut%7)...)
		if err := os.WriteFile(file, torn, 0o600); err != nil {
			t.Fatal(err)
		}
		o, err := Open(dir, Options{})
		if err != nil {
			t.Fatal(err)
		}
		want := "kept\nhal"
		if cut >= int64(len(all))-headerLen-trailerLen {
			want += "lost, torn\n"
		}
		if got := logged(t, o, LogOptions{Tail: -1}); got != want {
			t.Errorf("cut at %d of %d: got %q", cut, len(all), got)
		}
		c := start(t, o)
		say(t, o, c.stdout, "after\n")
		c.exit(t)
		if got := logged(t, o, LogOptions{Tail: 2}); !strings.HasSuffix(got, "after\n") {
			t.Errorf("cut at %d: after writing on: %q", cut, got)
		}
		o.Close()
	}
}

// FuzzLog opens, reads and continues a log made of any bytes.
func FuzzLog(f *testing.F) {
	dir := filepath.Join(f.TempDir(), "log")
	o, err := Open(dir, Options{})
	if err != nil {
		f.Fatal(err)
	}
	c := start(f, o)
	say(f, o, c.stdout, "one\ntwo")
	say(f, o, c.stderr, "bad\n")
	c.exit(f)
	o.Close()
	seed, _ := os.ReadFile(filepath.Join(dir, segmentName(1)))
	f.Add(seed, seed)
	f.Add(seed[:len(seed)-3], []byte{})
	f.Add([]byte{}, seed[5:])
	f.Fuzz(func(t *testing.T, a, b []byte) {
		dir := t.TempDir()
		os.WriteFile(filepath.Join(dir, segmentName(1)), a, 0o600)
		os.WriteFile(filepath.Join(dir, segmentName(2)), b, 0o600)
		l, err := openLog(dir, 8*maxRecord)
		if err != nil {
			t.Fatal(err)
		}
		defer l.close()
		for _, tail := range []int{-1, 1, 3} {
			for _, since := range []time.Time{{}, time.Unix(1e9, 0)} {
				lo := LogOptions{Tail: tail, Since: since, Timestamps: true, Stdout: io.Discard, Stderr: io.Discard}
				if err := l.readLines(t.Context(), lo); err != nil {
					t.Fatal(err)
				}
			}
		}
		l.begin()
		rec := append(make([]byte, headerLen), "\nlast\n----"...)
		l.append(Stdout, rec)
		l.endRun()
		var got strings.Builder
		if err := l.readLines(t.Context(), LogOptions{Tail: 1, Stdout: &got, Stderr: io.Discard}); err != nil {
			t.Fatal(err)
		}
		if got.String() != "last\n" {
			t.Fatalf("what is written afterwards reads as %q", got.String())
		}
	})
}

func FuzzRecord(f *testing.F) {
	b := make([]byte, headerLen+3+trailerLen)
	copy(b[headerLen:], "abc")
	frame(b, record{time: 5, stream: Stderr, mid: mids{true, false}, payload: b[headerLen : headerLen+3]})
	f.Add(b)
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := parse(b)
		if err != nil {
			return
		}
		again := make([]byte, r.size())
		copy(again[headerLen:], r.payload)
		frame(again, r)
		if !bytes.Equal(again, b[:r.size()]) {
			t.Fatalf("%x parses, but is written as %x", b, again)
		}
	})
}

func TestNothingLeaks(t *testing.T) {
	before := runtime.NumGoroutine()
	files := openFiles(t)
	o, err := Open(filepath.Join(t.TempDir(), "log"), Options{OpenStdin: true, MaxSize: 8 * maxRecord})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	c := start(t, o)
	var wg sync.WaitGroup
	for range 20 {
		r, _ := io.Pipe()
		wg.Go(func() { o.Attach(ctx, AttachOptions{Stream: true, Stdin: r, Stdout: io.Discard}) })
		wg.Go(func() { o.ReadLogs(ctx, LogOptions{Follow: true, Tail: -1, Stdout: io.Discard}) })
	}
	for range 100 {
		c.stdout.Write(make([]byte, maxPayload))
	}
	cancel()
	wg.Wait()
	c.exit(t)
	o.Close()
	eventually(t, "goroutines gone", func() bool { return runtime.NumGoroutine() <= before })
	eventually(t, "files closed", func() bool { return openFiles(t) <= files })
}

func openFiles(t testing.TB) int {
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(fds)
}

// BenchmarkLog: what the log costs a container that writes as fast as it can, against a pipe that is only read.
func BenchmarkLog(b *testing.B) {
	for name, size := range map[string]int{"chunks": 64 << 10, "lines": 100} {
		line := append(bytes.Repeat([]byte("x"), size-1), '\n')
		b.Run(name+"/logged", func(b *testing.B) {
			o := open(b, Options{MaxSize: 64 << 20})
			c := start(b, o)
			b.SetBytes(int64(size))
			for b.Loop() {
				c.stdout.Write(line)
			}
			c.exit(b)
		})
		b.Run(name+"/thrown away", func(b *testing.B) {
			o := Unlogged(Options{})
			c := start(b, o)
			b.SetBytes(int64(size))
			for b.Loop() {
				c.stdout.Write(line)
			}
			c.exit(b)
		})
	}
}

func TestAttachSince(t *testing.T) {
	o := open(t, Options{})
	c := start(t, o)
	say(t, o, c.stdout, "before")
	c.exit(t)
	time.Sleep(2 * time.Millisecond)
	begin := time.Now()
	c = start(t, o)
	say(t, o, c.stdout, "now")
	var out locked.Buffer
	a := attach(t, o, AttachOptions{Logs: true, Stream: true, Since: begin, Stdout: &out})
	say(t, o, c.stdout, "later")
	c.exit(t)
	within(t, a.done, "the attachment goes on")
	if got := out.String(); got != "nowlater" {
		t.Errorf("attached client got %q", got)
	}
}
