// Package gateway is what the filer's protocols over HTTP have in common. It imports the lease.
package gateway

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/semaphore"
	"golang.org/x/time/rate"

	"github.com/cradlestack/cradlestack/csi-plugin/filer/lease"
)

const (
	maxConnections = 2000
	maxAtOnce      = 256              // requests of one grant
	maxOfOwner     = 512              // of all that somebody has
	headerTime     = 30 * time.Second // for a request's head
	stalled        = time.Minute      // without a byte in the middle of a request or its answer
)

// Serve answers clients on l, which may be one of TLS, until ctx ends, then those whose requests had begun, as far as the lease lets it. maxHeader bounds a
// request's head. meter is told of all of them; it may be nil. handler says by Admitted which requests may be here: others lose their connections first where
// there are too many.
func Serve(ctx context.Context, l net.Listener, handler http.Handler, maxHeader int, by *lease.Lease, meter Meter, log *slog.Logger) error {
	h := &http.Server{Handler: visit(pace(meter.around(Under(by, handler)), stalled)), ConnContext: remember, ReadHeaderTimeout: headerTime, IdleTimeout: 2 * time.Minute, MaxHeaderBytes: maxHeader, ErrorLog: slog.NewLogLogger(log.Handler(), slog.LevelDebug)}
	ended := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(ended)
		patience, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
		defer cancel()
		if !by.Holds() || h.Shutdown(patience) != nil {
			h.Close()
		}
	})
	d := &door{Listener: l, max: maxConnections}
	defer d.closing.Wait()
	err := h.Serve(d)
	if !stop() {
		<-ended
	}
	if errors.Is(err, http.ErrServerClosed) {
		return nil
	}
	return err
}

// ServeKnown answers clients on l until ctx ends, most of them at a time, where l lets nobody come as far as a request who has not shown who he is, as one of TLS
// can: others lose their connections first where there are too many.
func ServeKnown(ctx context.Context, l net.Listener, handler http.Handler, most int) error {
	known := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		Admitted(r)
		handler.ServeHTTP(w, r)
	})
	h := &http.Server{Handler: visit(known), ConnContext: remember, ReadHeaderTimeout: headerTime}
	stop := context.AfterFunc(ctx, func() { h.Close() })
	defer stop()
	d := &door{Listener: l, max: most}
	defer d.closing.Wait()
	if err := h.Serve(d); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

// Under lets requests begin, and be answered, as a lease says. One whose answer may not be given loses its connection.
func Under(by *lease.Lease, handler http.Handler) http.Handler {
	if by == nil {
		return handler
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		end, err := by.Begin(r.Context())
		if err != nil {
			w.Header().Set("Retry-After", "1")
			w.Header().Set("Connection", "close")
			http.Error(w, err.Error(), http.StatusServiceUnavailable)
			return
		}
		defer end()
		a := &answer{ResponseWriter: w, by: by}
		handler.ServeHTTP(a, r)
		a.check() // that of a handler which has said nothing
	})
}

type answer struct {
	http.ResponseWriter
	by *lease.Lease
}

func (a *answer) check() {
	if !a.by.Holds() {
		panic(http.ErrAbortHandler)
	}
}

// Unwrap is for http.ResponseController.
func (a *answer) Unwrap() http.ResponseWriter { return a.ResponseWriter }

func (a *answer) WriteHeader(code int) {
	a.check()
	a.ResponseWriter.WriteHeader(code)
}

func (a *answer) Write(p []byte) (int, error) {
	a.check()
	return a.ResponseWriter.Write(p)
}

// ErrStuck is that requests of a grant which has ended, or of a volume that is to be held, have no end, as the storage keeps them.
var ErrStuck = errors.New("the storage keeps requests that have begun")

// stuckAfter is how long they may take.
const stuckAfter = 10 * time.Second

// Endings are those of grants: nothing begins for them any more. The zero value is none.
type Endings struct {
	mu  sync.Mutex
	all map[string]*ending // by grant
}

type ending struct {
	late  time.Time
	ended chan struct{}
}

// Begin does what ends a grant once its requests have ended, which may have no end.
func (e *Endings) Begin(grant string, do func()) {
	one := &ending{time.Now().Add(stuckAfter), make(chan struct{})}
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.all == nil {
		e.all = map[string]*ending{}
	}
	e.all[grant] = one
	go func() { // which Wait waits for, or nobody where the storage keeps requests
		do()
		e.mu.Lock()
		defer e.mu.Unlock()
		delete(e.all, grant)
		close(one.ended)
	}()
}

// Wait waits for that of a grant, for as long as it may take from its beginning on: who asks again and again waits once. Where the storage keeps what had begun it is
// ErrStuck, again and again until that has ended.
func (e *Endings) Wait(grant string) error {
	e.mu.Lock()
	one := e.all[grant]
	e.mu.Unlock()
	if one == nil {
		return nil
	}
	select {
	case <-one.ended:
		return nil
	case <-time.After(time.Until(one.late)):
	}
	select {
	case <-one.ended:
		return nil
	default:
		return ErrStuck
	}
}

// WaitAll waits for all of them to their end.
func (e *Endings) WaitAll() {
	e.mu.Lock()
	all := slices.Collect(maps.Values(e.all))
	e.mu.Unlock()
	for _, one := range all {
		<-one.ended
	}
}

// A Meter is told of each request at its end: how it was answered, 0 where that was broken off, and how many bytes of content came and went.
type Meter func(method string, code int, in, out int64)

func (m Meter) around(handler http.Handler) http.Handler {
	if m == nil {
		return handler
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		a := &metered{ResponseWriter: w}
		in := &counted{ReadCloser: r.Body}
		if r.Body != nil && r.Body != http.NoBody {
			r.Body = in
		}
		broken := true
		defer func() {
			if broken {
				a.code = 0
			}
			m(r.Method, a.code, in.n.Load(), a.n)
		}()
		handler.ServeHTTP(a, r)
		broken = false
		if a.code == 0 {
			a.code = http.StatusOK // as net/http answers for a handler that has said nothing
		}
	})
}

type metered struct {
	http.ResponseWriter
	code int
	n    int64
}

// Unwrap is for http.ResponseController.
func (a *metered) Unwrap() http.ResponseWriter { return a.ResponseWriter }

func (a *metered) WriteHeader(code int) {
	if code >= 200 && a.code == 0 {
		a.code = code
	}
	a.ResponseWriter.WriteHeader(code)
}

func (a *metered) Write(p []byte) (int, error) {
	if a.code == 0 {
		a.code = http.StatusOK
	}
	n, err := a.ResponseWriter.Write(p)
	a.n += int64(n)
	return n, err
}

// A counted body may be read by others than the handler, which has returned meanwhile.
type counted struct {
	io.ReadCloser
	n atomic.Int64
}

func (c *counted) Read(p []byte) (int, error) {
	n, err := c.ReadCloser.Read(p)
	c.n.Add(int64(n))
	return n, err
}

// A Limit is what is done of one grant's requests.
type Limit struct {
	rate   *rate.Limiter
	atOnce *semaphore.Weighted
	owner  *semaphore.Weighted // of all that the grant's owner has; nil where that is this one
}

// NewLimit has so many requests a second done, of 0 all; twice as many at a time, and more have to wait.
func NewLimit(perSecond float64) *Limit {
	limit := rate.Limit(perSecond)
	if perSecond <= 0 {
		limit = rate.Inf
	}
	return &Limit{rate.NewLimiter(limit, max(1, int(min(2*limit, 10_000)))), semaphore.NewWeighted(maxAtOnce), nil}
}

// Owners are those who have grants: however many somebody makes, there are connections for others.
type Owners struct{ all sync.Map }

// NewLimit is that of one more grant of an owner's.
func (o *Owners) NewLimit(owner string, perSecond float64) *Limit {
	l := NewLimit(perSecond)
	all, _ := o.all.LoadOrStore(owner, semaphore.NewWeighted(maxOfOwner))
	l.owner = all.(*semaphore.Weighted)
	return l
}

// ErrBusy is a grant of which, or an owner of whose grants, so many requests are at work, or wait, that no other one does: it would keep other grants' connections.
var ErrBusy = errors.New("too many requests of this grant, or of its owner's others, at once; try again")

// Begin waits until a request may be done. It counts until end is called.
func (l *Limit) Begin(ctx context.Context) (end func(), err error) {
	if !l.atOnce.TryAcquire(1) {
		return nil, ErrBusy
	}
	if l.owner != nil && !l.owner.TryAcquire(1) {
		l.atOnce.Release(1)
		return nil, ErrBusy
	}
	end = func() {
		l.atOnce.Release(1)
		if l.owner != nil {
			l.owner.Release(1)
		}
	}
	if err := l.rate.Wait(ctx); err != nil {
		end()
		return nil, err
	}
	return end, nil
}
