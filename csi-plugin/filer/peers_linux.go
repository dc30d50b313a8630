package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httputil"
	"os"
	"sync"
	"time"

	"github.com/cradlestack/cradlestack/csi-plugin/filer/api"
	"github.com/cradlestack/cradlestack/csi-plugin/filer/gateway"
)

// peers is how the filers of a set know each other: by a key that all have. It is in the pool, which one that has never been active may see only later.
type peers struct {
	file    string
	address string // where others reach this one: none that moves, as it would in the middle of a switch

	mu  sync.Mutex
	tls *tls.Config // once the key could be read
}

func (p *peers) config() (*tls.Config, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.tls != nil {
		return p.tls, nil
	}
	key, err := os.ReadFile(p.file)
	if err != nil {
		return nil, err
	}
	if p.tls, err = api.PeersTLS(key); err != nil {
		err = fmt.Errorf("%s: %w", p.file, err)
	}
	return p.tls, err
}

// maxPeers bounds connections. They are of who has not shown the key, too, who keep nobody out.
const maxPeers = 256

func (p *peers) listen(address string) (net.Listener, error) {
	l, err := net.Listen("tcp", address)
	if err != nil {
		return nil, fmt.Errorf("--peers: %w", err)
	}
	if p.address, err = reachable("", l.Addr().(*net.TCPAddr).AddrPort()); err != nil {
		return nil, errors.Join(fmt.Errorf("--peers: %w", err), l.Close())
	}
	return tls.NewListener(l, &tls.Config{
		MinVersion: tls.VersionTLS13, GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) { return p.config() },
	}), nil
}

// serve answers those who have the key until ctx ends.
func (p *peers) serve(ctx context.Context, l net.Listener, handler http.Handler) error {
	return gateway.ServeKnown(ctx, l, handler, maxPeers)
}

// forwarded is a header of what another member has passed on.
const forwarded = "X-Cradle-Filer-Forwarded"

// byTheActive has the active member answer: this one as handler says, or another one, to which the request is passed on. It waits while there is none.
func (m *member) byTheActive(handler func(t *term) http.Handler) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		patience := 2*m.set.lease + switchTime
		if r.Header.Get(forwarded) != "" { // who has passed it on asks again, which may be another one then
			patience = time.Second
		}
		ctx, cancel := context.WithTimeout(r.Context(), patience)
		defer cancel()
		var err error
		for ; ; m.pause(ctx, 100*time.Millisecond) {
			m.mu.Lock()
			t, active := m.term, m.tenure
			m.mu.Unlock()
			switch {
			case t != nil:
				handler(t).ServeHTTP(w, r)
				return
			case ctx.Err() != nil:
				if err == nil {
					err = fmt.Errorf("no filer of set %s serves", m.set.name)
				}
				answerJSON(w, nil, fmt.Errorf("%w: this filer stands by: %w; try again", api.ErrAway, err))
				return
			case r.Header.Get(forwarded) != "", active.Member == m.set.member, !active.Serving, active.Control == "":
				continue
			}
			var conn net.Conn
			if conn, err = m.peers.dial(ctx, active.Control); err == nil {
				passOn(conn, active.Control, w, r)
				return
			}
			err = fmt.Errorf("%s, which is active, does not answer: %w", active.Member, err)
		}
	}
}

// dial connects to another member.
func (p *peers) dial(ctx context.Context, address string) (net.Conn, error) {
	config, err := p.config()
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second) // one that is frozen takes connections
	defer cancel()
	return (&tls.Dialer{Config: config}).DialContext(ctx, "tcp", address)
}

// passOn has a request answered by who is at the other end of a connection.
func passOn(conn net.Conn, address string, w http.ResponseWriter, r *http.Request) {
	defer conn.Close()
	(&httputil.ReverseProxy{
		Rewrite: func(p *httputil.ProxyRequest) {
			p.Out.URL.Scheme, p.Out.URL.Host = "http", address
			p.Out.Header.Set(forwarded, "1")
		},
		Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(context.Context, string, string) (net.Conn, error) { return conn, nil }},
		ErrorHandler: func(w http.ResponseWriter, _ *http.Request, err error) {
			answerJSON(w, nil, fmt.Errorf("%w: the active filer has ended, or lost its lease, before it has answered: %w; see what is done, and try again", api.ErrAway, err))
		},
	}).ServeHTTP(w, r)
}
