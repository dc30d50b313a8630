// Package gateway is what the filer's protocols over HTTP have in common. It imports nothing of ours.
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
)

const (
	maxConnections = 1000
	headerTime     = 30 * time.Second // for a request's head
)

// Serve answers clients on l, which may be one of TLS, until ctx ends, then those whose requests had begun. maxHeader bounds a request's head.
func Serve(ctx context.Context, l net.Listener, handler http.Handler, maxHeader int, log *slog.Logger) error {
	h := &http.Server{Handler: handler, ReadHeaderTimeout: headerTime, IdleTimeout: 2 * time.Minute, MaxHeaderBytes: maxHeader, ErrorLog: slog.NewLogLogger(log.Handler(), slog.LevelDebug)}
	ended := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(ended)
		patience, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
		defer cancel()
		if h.Shutdown(patience) != nil {
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

// Limiter has so many requests a second done, twice as many at a time, of 0 all.
func Limiter(perSecond float64) *rate.Limiter {
	limit := rate.Limit(perSecond)
	if perSecond <= 0 {
		limit = rate.Inf
	}
	return rate.NewLimiter(limit, max(1, int(min(2*limit, 10_000))))
}
