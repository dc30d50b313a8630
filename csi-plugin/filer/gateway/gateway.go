// Package gateway is what the filer's protocols over HTTP have in common. It imports the lease.
package gateway

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"time"

	"golang.org/x/net/netutil"
	"golang.org/x/time/rate"

	"github.com/cradlestack/cradlestack/csi-plugin/filer/lease"
)

const (
	maxConnections = 1000
	headerTime     = 30 * time.Second // for a request's head
)

// Serve answers clients on l, which may be one of TLS, until ctx ends, then those whose requests had begun, as far as the lease lets it. maxHeader bounds a
// request's head.
func Serve(ctx context.Context, l net.Listener, handler http.Handler, maxHeader int, by *lease.Lease, log *slog.Logger) error {
	h := &http.Server{Handler: Under(by, handler), ReadHeaderTimeout: headerTime, IdleTimeout: 2 * time.Minute, MaxHeaderBytes: maxHeader, ErrorLog: slog.NewLogLogger(log.Handler(), slog.LevelDebug)}
	ended := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(ended)
		patience, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
		defer cancel()
		if !by.Holds() || h.Shutdown(patience) != nil {
			h.Close()
		}
	})
	err := h.Serve(netutil.LimitListener(l, maxConnections))
	if !stop() {
		<-ended
	}
	if errors.Is(err, http.ErrServerClosed) {
		return nil
	}
	return err
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

// Limiter has so many requests a second done, twice as many at a time, of 0 all.
func Limiter(perSecond float64) *rate.Limiter {
	limit := rate.Limit(perSecond)
	if perSecond <= 0 {
		limit = rate.Inf
	}
	return rate.NewLimiter(limit, max(1, int(min(2*limit, 10_000))))
}
