// Package fetch reads a file from wherever it lies: a path, http(s), sftp or
// scp, S3. A broken transfer is taken up where it stopped.
//
// Nothing here is trusted and nothing is checked: what arrives is only good
// once bali/seal says so. The package imports nothing of this repository.
package fetch

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net/url"
	"strings"
	"time"
)

// Source is where a file can be read from any offset.
type Source interface {
	// Open starts reading at an offset; a negative one counts from the end.
	Open(ctx context.Context, offset int64) (Part, error)
	// String names the source, without secrets.
	String() string
}

// Part is a file from Start to its end.
type Part struct {
	io.ReadCloser
	// Start is the offset asked for, or 0 from a source that only gives all.
	Start int64
	// Size is the whole file's, -1 if the source doesn't say.
	Size int64
}

// Options say how patient to be.
type Options struct {
	// Retries is how often a transfer that failed is taken up again without one
	// byte of progress; 0 is never.
	Retries int
	// Idle is how long a transfer may stand still; 0 is 30 s.
	Idle time.Duration
	// SSHKey is a private key file for sftp and scp besides the agent's keys.
	SSHKey string
	// KnownHosts replaces ~/.ssh/known_hosts and /etc/ssh/ssh_known_hosts.
	KnownHosts string
	// Log is told about retries.
	Log *slog.Logger
}

// ErrChanged says that the file became another one while it was read.
var ErrChanged = errors.New("the file changed while it was fetched: start again")

// ErrWhole says that a source can't be read in parts.
var ErrWhole = errors.New("it can only be read as a whole")

// permanent marks an error that trying again doesn't help.
type permanent struct{ error }

func (p permanent) Unwrap() error { return p.error }

// New finds the source for a URL or path.
func New(where string, o Options) (Source, error) {
	scheme, _, ok := strings.Cut(where, "://")
	if !ok {
		return file(where), nil
	}
	u, err := url.Parse(where)
	if err != nil {
		var ue *url.Error
		if errors.As(err, &ue) {
			err = ue.Err // it names the URL, with its password
		}
		return nil, err
	}
	switch scheme {
	case "file":
		if u.Host != "" && u.Host != "localhost" {
			return nil, fmt.Errorf("%s: a file URL has no host: write file:///path", where)
		}
		return file(u.Path), nil
	case "http", "https":
		return newHTTP(u), nil
	case "sftp", "scp":
		return newSFTP(u, o)
	case "s3":
		return newS3(u)
	}
	return nil, fmt.Errorf("%s: unknown scheme %q: bali reads paths, file, http, https, sftp, scp and s3 URLs", redacted(u), scheme)
}

// IsURL tells a URL from a path.
func IsURL(where string) bool { return strings.Contains(where, "://") }

// Redacted is where without what may be secret in it, fit for messages: a
// password, and the query, in which presigned URLs have their signature. This
// package's errors don't name the source: who asked for it does.
func Redacted(where string) string {
	if !IsURL(where) {
		return where
	}
	u, err := url.Parse(where)
	if err != nil {
		scheme, _, _ := strings.Cut(where, "://")
		return scheme + "://xxxxx"
	}
	return redacted(u)
}

func redacted(u *url.URL) string {
	r := *u
	if r.RawQuery != "" {
		r.RawQuery = "xxxxx"
	}
	return r.Redacted()
}

// Tail gives the last n bytes, without retries: it is a question, not a need.
func Tail(ctx context.Context, s Source, n int64) ([]byte, error) {
	part, err := s.Open(ctx, -n)
	if err != nil {
		return nil, err
	}
	defer part.Close()
	return io.ReadAll(io.LimitReader(part, n))
}

// Reader reads a source from its start to its end through failures.
type Reader struct {
	ctx    context.Context // owned: cancelled by Close
	cancel context.CancelCauseFunc
	src    Source
	opt    Options
	body   io.ReadCloser
	idle   *time.Timer
	at     int64 // where body stands
	offset int64 // how much was given out: body's bytes before it are passed over
	size   int64
	fails  int
	err    error
}

// Open starts reading. Close must follow.
func Open(ctx context.Context, s Source, o Options) (*Reader, error) {
	if o.Idle == 0 {
		o.Idle = 30 * time.Second
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	r := &Reader{src: s, opt: o, size: -1}
	r.ctx, r.cancel = context.WithCancelCause(ctx)
	if err := r.open(); err != nil {
		r.cancel(err)
		return nil, err
	}
	return r, nil
}

// Size is the file's size, -1 if unknown.
func (r *Reader) Size() int64 { return r.size }

// Offset is how much was read.
func (r *Reader) Offset() int64 { return r.offset }

// open connects at the current offset, again and again within the limits.
func (r *Reader) open() error {
	for {
		ctx, cancel := context.WithCancelCause(r.ctx)
		r.idle = time.AfterFunc(r.opt.Idle, func() {
			cancel(fmt.Errorf("nothing came for %v", r.opt.Idle))
		})
		part, err := r.src.Open(ctx, r.offset)
		switch {
		case err != nil:
			if ctx.Err() != nil {
				err = context.Cause(ctx)
			}
			r.idle.Stop()
			cancel(err)
		case r.size >= 0 && part.Size >= 0 && part.Size != r.size:
			part.Close()
			r.idle.Stop()
			cancel(ErrChanged)
			return ErrChanged
		default:
			r.body, r.at = &cancelling{part, cancel}, part.Start
			if part.Size >= 0 {
				r.size = part.Size
			}
			return nil
		}
		if err := r.failed(err); err != nil {
			return err
		}
	}
}

// failed waits before the next attempt, or says that there is none.
func (r *Reader) failed(err error) error {
	var p permanent
	if errors.As(err, &p) {
		return p.error
	}
	if r.ctx.Err() != nil {
		return context.Cause(r.ctx)
	}
	if r.fails++; r.fails > r.opt.Retries {
		return fmt.Errorf("%w (after %d attempts)", err, r.fails)
	}
	wait := min(200*time.Millisecond<<r.fails, 10*time.Second)
	wait = wait/2 + rand.N(wait/2)
	r.opt.Log.Info("trying again", "source", r.src.String(), "offset", r.offset, "wait", wait.Round(time.Millisecond), "reason", err)
	select {
	case <-time.After(wait):
		return nil
	case <-r.ctx.Done():
		return context.Cause(r.ctx)
	}
}

func (r *Reader) Read(p []byte) (int, error) {
	for {
		if r.err != nil {
			return 0, r.err
		}
		q := p
		if behind := r.offset - r.at; behind > 0 {
			q = q[:min(int64(len(q)), behind)]
		}
		n, err := r.body.Read(q)
		if n > 0 {
			r.idle.Reset(r.opt.Idle)
			r.at += int64(n)
			if r.at <= r.offset {
				continue
			}
			r.offset, r.fails = r.at, 0
			return n, nil
		}
		if err == nil {
			continue
		}
		r.idle.Stop()
		r.body.Close()
		if errors.Is(err, io.EOF) {
			if r.at >= r.offset && (r.size < 0 || r.offset == r.size) {
				r.err = io.EOF
				continue
			}
			err = io.ErrUnexpectedEOF
		}
		if r.offset > r.size && r.size >= 0 {
			r.err = ErrChanged
			continue
		}
		if r.err = r.failed(err); r.err == nil {
			r.err = r.open()
		}
	}
}

// Close ends the transfer.
func (r *Reader) Close() error {
	r.idle.Stop()
	r.cancel(context.Canceled)
	return r.body.Close()
}

// cancelling ends a transfer's context with its body.
type cancelling struct {
	io.ReadCloser
	cancel context.CancelCauseFunc
}

func (c *cancelling) Close() error {
	err := c.ReadCloser.Close()
	c.cancel(context.Canceled)
	return err
}
