package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/spf13/pflag"
	"golang.org/x/sync/errgroup"

	"github.com/cradlestack/cradlestack/csi-plugin/filer/api"
	"github.com/cradlestack/cradlestack/csi-plugin/filer/s3"
	"github.com/cradlestack/cradlestack/csi-plugin/filer/webdav"
)

// Gateways are the protocols that grants are for.
type gateways struct {
	webdav    string
	s3        string
	program   string // cradle-s3
	cert, key string
	perSecond float64
}

func (w *gateways) flags(f *pflag.FlagSet) {
	f.StringVar(&w.webdav, "webdav", "", "address to serve WebDAV on, such as :8443 (default: it is not served)")
	f.StringVar(&w.s3, "s3", "", "address to serve S3 on, such as :9000 (default: it is not served)")
	f.StringVar(&w.program, "s3-program", "", "the program cradle-s3 (default: the one beside this program)")
	f.StringVar(&w.cert, "tls-cert", "", "PEM file with the certificate for WebDAV and S3 and those that it is signed by; it is read again when it has changed")
	f.StringVar(&w.key, "tls-key", "", "PEM file with the certificate's key")
	f.Float64Var(&w.perSecond, "rate", 200, "requests by WebDAV, and as many by S3, that each grant's users have done in a second; more have to wait (0: as many as they like)")
}

// urls are where the gateways are reached.
type urls struct{ webdav, s3 string }

func (u urls) complete(g api.Grant) api.Grant {
	if u.webdav != "" {
		g.WebDAV = u.webdav + url.PathEscape(g.Volume) + "/"
	}
	if u.s3 != "" && s3.CheckBucket(g.Volume) == nil {
		g.S3 = u.s3
	}
	return g
}

// serve serves the gateways until ctx ends. closeAll ends the grants' use of volumes.
func (w *gateways) serve(ctx context.Context, g *errgroup.Group, f *filer) (closeAll func(), err error) {
	var listeners []net.Listener
	defer func() {
		if err != nil {
			for _, l := range listeners {
				err = errors.Join(err, l.Close())
			}
		}
	}()
	open := func(flag, address string) (l net.Listener, at string, err error) {
		if l, at, err = w.listen(flag, address, f.address); err == nil {
			listeners = append(listeners, l)
			f.log.Info("serving grants", "by", flag[2:], "listen", l.Addr(), "url", at)
		}
		return l, at, err
	}
	var dav, buckets net.Listener
	if w.webdav != "" {
		if dav, f.urls.webdav, err = open("--webdav", w.webdav); err != nil {
			return nil, err
		}
		f.webdav = webdav.New(filepath.Join(f.state, "webdav"), w.perSecond, f.log)
		f.webdav.Lease, f.webdav.Meter, f.webdav.Synced = f.lease, f.metrics.meter("webdav"), f.metrics.synced("webdav")
	}
	if w.s3 != "" {
		if buckets, f.urls.s3, err = open("--s3", w.s3); err != nil {
			return nil, err
		}
		if w.program == "" {
			self, err := os.Executable()
			if err != nil {
				return nil, err
			}
			w.program = filepath.Join(filepath.Dir(self), "cradle-s3")
		}
		if f.s3, err = s3.New(w.program, filepath.Join(f.dir, "s3"), w.perSecond, f.log); err != nil {
			return nil, fmt.Errorf("--s3-program: %w", err)
		}
		f.s3.Lease, f.s3.Leash, f.s3.Meter, f.s3.Synced = f.lease, f.leash, f.metrics.meter("s3"), f.metrics.synced("s3")
	}
	if f.webdav != nil {
		g.Go(func() error { return f.webdav.Serve(ctx, dav) })
	}
	if f.s3 != nil {
		g.Go(func() error { return f.s3.Serve(ctx, buckets) })
	}
	return func() {
		if f.webdav != nil {
			f.webdav.Close()
		}
		if f.s3 != nil {
			f.s3.Close()
		}
	}, nil
}

// listen opens a gateway's port, with TLS where a certificate is given. Secrets do not travel in clear text but on this host.
func (w *gateways) listen(flag, address, filer string) (l net.Listener, at string, err error) {
	if (w.cert == "") != (w.key == "") {
		return nil, "", errors.New("--tls-cert and --tls-key go together")
	}
	if l, err = net.Listen("tcp", address); err != nil {
		return nil, "", fmt.Errorf("%s: %w", flag, err)
	}
	a := l.Addr().(*net.TCPAddr).AddrPort()
	host, _, err := net.SplitHostPort(filer)
	if err != nil {
		return nil, "", errors.Join(err, l.Close())
	}
	if !a.Addr().IsUnspecified() {
		host = a.Addr().String()
	}
	authority := net.JoinHostPort(host, fmt.Sprint(a.Port()))
	if w.cert == "" {
		if !a.Addr().IsLoopback() {
			return nil, "", errors.Join(fmt.Errorf("%s %s: secrets would travel in clear text; give --tls-cert and --tls-key, or an address of 127.0.0.0/8", flag, address), l.Close())
		}
		return l, "http://" + authority + "/", nil
	}
	pair := &keyPair{cert: w.cert, key: w.key}
	if _, err := pair.get(nil); err != nil {
		return nil, "", errors.Join(err, l.Close())
	}
	return tls.NewListener(l, &tls.Config{MinVersion: tls.VersionTLS12, GetCertificate: pair.get, NextProtos: []string{"http/1.1"}}), "https://" + authority + "/", nil
}

// A keyPair is read again when its files have changed.
type keyPair struct {
	cert, key string

	mu      sync.Mutex
	changed [2]time.Time
	pair    *tls.Certificate
}

func (k *keyPair) get(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	var changed [2]time.Time
	for i, path := range []string{k.cert, k.key} {
		fi, err := os.Stat(path)
		if err != nil {
			return k.former(err)
		}
		changed[i] = fi.ModTime()
	}
	if k.pair == nil || changed != k.changed {
		pair, err := tls.LoadX509KeyPair(k.cert, k.key)
		if err != nil {
			return k.former(fmt.Errorf("certificate %s with key %s: %w", k.cert, k.key, err))
		}
		k.pair, k.changed = &pair, changed
	}
	return k.pair, nil
}

// former is the pair that was read before: one that is just being replaced, or was replaced by nonsense, ends no service.
func (k *keyPair) former(err error) (*tls.Certificate, error) {
	if k.pair != nil {
		return k.pair, nil
	}
	return nil, err
}
