package pod

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/cradlestack/cradlestack/spec"
)

// A log that was brought home is what docker's logs call answers with timestamps: frames of one stream each (moby
// api/swagger.yaml, ContainerAttach, "Stream format"), in which every line begins with its time. With a terminal there is one stream
// without frames.

const (
	frameHeader = 8
	maxFrame    = 1 << 20
	maxSaved    = 4 << 30 // of one container; the guest's own bound is lower
)

// saveLogs brings the logs of all containers home.
func (r *Running) saveLogs() error {
	dir := r.dir.join(runDir, logsDir)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	var errs []error
	for _, c := range r.spec.Containers {
		errs = append(errs, r.saveLog(c.Name, filepath.Join(dir, c.Name)))
	}
	return errors.Join(errs...)
}

func (r *Running) saveLog(container, path string) (err error) {
	q := url.Values{"stdout": {"1"}, "stderr": {"1"}, "timestamps": {"1"}}
	// No deadline as a whole, a log may be long; silence ends it, as does the machine's end.
	ctx, cancel := context.WithCancelCause(r.ctx)
	defer cancel(nil)
	silence := time.AfterFunc(maxSilence, func() { cancel(errors.New("the guest has fallen silent")) })
	defer silence.Stop()
	resp, err := r.Guest().Get(ctx, http.MethodGet, "/containers/"+container+"/logs", q, nil) //nolint:bodyclose // it is, below; the linter loses it in the closure
	if err != nil {
		return fmt.Errorf("logs of container %s: %w", container, err)
	}
	defer resp.Body.Close()
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+"-")
	if err != nil {
		return err
	}
	alive := readerFunc(func(p []byte) (int, error) {
		n, err := resp.Body.Read(p)
		silence.Reset(maxSilence)
		return n, err
	})
	_, err = io.Copy(f, io.LimitReader(alive, maxSaved))
	if err = errors.Join(err, f.Close()); err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		os.Remove(f.Name())
		return fmt.Errorf("logs of container %s: %w", container, err)
	}
	return nil
}

const maxSilence = time.Minute

type readerFunc func([]byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }

// LogOptions say which lines to read, as docker's.
type LogOptions struct {
	Stdout, Stderr io.Writer // nil: not wanted
	Timestamps     bool
	Since, Until   time.Time // zero: no limit
	Tail           int       // the last so many lines; negative: all
}

// Logs writes what a container of a pod that has ended has put out, of all its runs since it was summoned.
func (d *Dir) Logs(container string, o LogOptions) error {
	launch, err := d.Launch()
	if err != nil {
		return err
	}
	c, err := Lookup(launch, container)
	if err != nil {
		return fmt.Errorf("%s: %w", d.path, err)
	}
	_, reportErr := d.Report() // also reports the end of a run that nobody saw
	f, err := os.Open(d.join(runDir, logsDir, c.Name))
	if errors.Is(err, fs.ErrNotExist) {
		if reportErr != nil {
			return reportErr
		}
		return fmt.Errorf("%s: the machine ended before the logs of the last run were saved: what of them has reached the scratch disk is there again in the next run", d.path)
	}
	if err != nil {
		return err
	}
	defer f.Close()
	if o.Tail >= 0 {
		var count lineCounter
		counting := o
		counting.Stdout, counting.Stderr, counting.Tail = wanted(o.Stdout, &count), wanted(o.Stderr, &count), -1
		if err := copyLog(f, c.TTY, counting, 0); err != nil {
			return fmt.Errorf("%s: %w", f.Name(), err)
		}
		if _, err := f.Seek(0, io.SeekStart); err != nil {
			return err
		}
		return copyLog(f, c.TTY, o, max(0, count.lines-o.Tail))
	}
	if err := copyLog(f, c.TTY, o, 0); err != nil {
		return fmt.Errorf("%s: %w", f.Name(), err)
	}
	return nil
}

// Lookup finds a container by its name or the beginning of its id; "" is the only one.
func Lookup(launch *spec.Launch, name string) (*spec.Container, error) {
	if name == "" {
		if len(launch.Containers) == 1 {
			return &launch.Containers[0], nil
		}
		var names []string
		for _, c := range launch.Containers {
			names = append(names, c.Name)
		}
		return nil, fmt.Errorf("the pod has %d containers (%s): name one of them with -c", len(names), strings.Join(names, ", "))
	}
	for i := range launch.Containers {
		if launch.Containers[i].Name == name {
			return &launch.Containers[i], nil
		}
	}
	var found *spec.Container
	for i := range launch.Containers {
		if c := &launch.Containers[i]; len(name) <= len(c.ID) && c.ID[:len(name)] == name {
			if found != nil {
				return nil, fmt.Errorf("more than one container's id begins with %s: give more of it", name)
			}
			found = c
		}
	}
	if found == nil {
		return nil, fmt.Errorf("the pod has no container %s", name)
	}
	return found, nil
}

func wanted(w io.Writer, instead io.Writer) io.Writer {
	if w == nil {
		return nil
	}
	return instead
}

type lineCounter struct{ lines int }

func (c *lineCounter) Write(p []byte) (int, error) {
	c.lines++
	return len(p), nil
}

// copyLog reads a log that was brought home and writes, with one Write each, the lines that are wanted but the first skip of them.
func copyLog(r io.Reader, tty bool, o LogOptions, skip int) error {
	br := bufio.NewReaderSize(r, 64<<10)
	if tty {
		s := lineSplitter{o: &o, w: o.Stdout, skip: &skip}
		for {
			chunk, err := br.ReadSlice('\n')
			if werr := s.write(chunk); werr != nil {
				return werr
			}
			if err == io.EOF {
				return s.end()
			}
			if err != nil && !errors.Is(err, bufio.ErrBufferFull) {
				return err
			}
		}
	}
	streams := [2]lineSplitter{{o: &o, w: o.Stdout, skip: &skip}, {o: &o, w: o.Stderr, skip: &skip}}
	var header [frameHeader]byte
	frame := make([]byte, 0, 64<<10)
	for {
		if _, err := io.ReadFull(br, header[:]); err == io.EOF {
			return errors.Join(streams[0].end(), streams[1].end())
		} else if err != nil {
			return fmt.Errorf("log is cut off: %w", err)
		}
		n := binary.BigEndian.Uint32(header[4:])
		if header[0] < 1 || header[0] > 2 || n > maxFrame {
			return errors.New("log is damaged")
		}
		frame = append(frame[:0], make([]byte, n)...)
		if _, err := io.ReadFull(br, frame); err != nil {
			return fmt.Errorf("log is cut off: %w", err)
		}
		if err := streams[header[0]-1].write(frame); err != nil {
			return err
		}
	}
}

// A lineSplitter puts the lines of one stream together.
type lineSplitter struct {
	o    *LogOptions
	w    io.Writer
	skip *int
	line []byte
}

func (s *lineSplitter) write(p []byte) error {
	for len(p) > 0 {
		i := indexNewline(p)
		s.line = append(s.line, p[:i]...)
		p = p[i:]
		if s.line[len(s.line)-1] != '\n' && len(s.line) < maxFrame {
			return nil
		}
		if err := s.end(); err != nil {
			return err
		}
	}
	return nil
}

// indexNewline is the length of p's first line with its end.
func indexNewline(p []byte) int {
	for i, b := range p {
		if b == '\n' {
			return i + 1
		}
	}
	return len(p)
}

func (s *lineSplitter) end() error {
	line := s.line
	s.line = s.line[:0]
	if s.w == nil || len(line) == 0 {
		return nil
	}
	var at time.Time
	for i, b := range line {
		if b == ' ' {
			if t, err := time.Parse(time.RFC3339Nano, string(line[:i])); err == nil {
				at = t
				if !s.o.Timestamps {
					line = line[i+1:]
				}
			}
			break
		}
	}
	if !at.IsZero() && (at.Before(s.o.Since) || !s.o.Until.IsZero() && at.After(s.o.Until)) {
		return nil
	}
	if *s.skip > 0 {
		*s.skip--
		return nil
	}
	_, err := s.w.Write(line)
	return err
}
