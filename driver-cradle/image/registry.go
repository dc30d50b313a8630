package image

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/remote/transport"

	"github.com/cradlestack/cradlestack/internal/stalled"
)

// idleTimeout ends a transfer of which nothing has come for so long.
const idleTimeout = 60 * time.Second

var errStalled = fmt.Errorf("%w: nothing came for %s", ErrUnreachable, idleTimeout)

// A registrySource is an image in a registry, or in one of its mirrors.
type registrySource struct {
	ref     name.Reference
	opts    PullOptions
	session *session // closes the connections
}

func (s registrySource) resolve(ctx context.Context, platform string) (*resolved, error) {
	endpoints, err := s.endpoints()
	if err != nil {
		return nil, err
	}
	var firstErr error
	for _, e := range endpoints {
		ref := e.ref
		r, err := s.resolveAt(ctx, e, platform)
		if err == nil {
			return r, nil
		}
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		err = explain(ref, err)
		// The last endpoint is the registry itself: unless it can't be reached, its word counts.
		if firstErr == nil || !errors.Is(err, ErrUnreachable) {
			firstErr = err
		}
	}
	return nil, firstErr
}

// An endpoint is where an image may be had.
type endpoint struct {
	ref      name.Reference
	insecure bool // without TLS, or with whatever certificate
}

// insecure says whether a registry may be asked without TLS: this host's own, and those that the user has named.
func (s registrySource) insecure(registry string) bool {
	host := registry
	if h, _, err := net.SplitHostPort(registry); err == nil {
		host = h
	}
	ip := net.ParseIP(strings.Trim(host, "[]"))
	return host == "localhost" || ip != nil && ip.IsLoopback() || slices.Contains(s.opts.Insecure, registry)
}

// endpoints are the mirrors' names for the image, then its own.
func (s registrySource) endpoints() ([]endpoint, error) {
	host := s.ref.Context().RegistryStr()
	mirrors := s.opts.Mirrors[host]
	if host == name.DefaultRegistry {
		mirrors = append(slices.Clip(mirrors), s.opts.Mirrors["docker.io"]...)
	}
	var all []endpoint
	for _, m := range mirrors {
		opts := []name.Option{name.WeakValidation}
		rest, plain := strings.CutPrefix(m, "http://")
		rest = strings.TrimSuffix(strings.TrimPrefix(rest, "https://"), "/")
		mirrorHost, _, _ := strings.Cut(rest, "/")
		insecure := plain || s.insecure(mirrorHost)
		if insecure {
			opts = append(opts, name.Insecure)
		}
		repo, err := name.NewRepository(rest+"/"+s.ref.Context().RepositoryStr(), opts...)
		if err != nil {
			return nil, fmt.Errorf("mirror %q of %s: %w", m, host, err)
		}
		if d, ok := s.ref.(name.Digest); ok {
			all = append(all, endpoint{repo.Digest(d.DigestStr()), insecure})
		} else {
			all = append(all, endpoint{repo.Tag(s.ref.Identifier()), insecure})
		}
	}
	return append(all, endpoint{s.ref, s.insecure(host)}), nil
}

func (s registrySource) resolveAt(ctx context.Context, e endpoint, platform string) (*resolved, error) {
	ref, transport := e.ref, newTransport(e.insecure)
	s.session.closers = append(s.session.closers, transport)
	puller, err := remote.NewPuller(
		remote.WithAuthFromKeychain(s.opts.Keychain),
		remote.WithTransport(transport),
		remote.WithUserAgent("cradlestack"),
		remote.WithJobs(s.opts.Jobs),
	)
	if err != nil {
		return nil, err
	}
	repo := ref.Context()
	get := func(ctx context.Context, ref name.Reference) (*remote.Descriptor, error) {
		d, err := puller.Get(ctx, ref)
		if err == nil && len(d.Manifest) > maxManifest {
			err = fmt.Errorf("manifest: %w: more than %s", ErrTooLarge, formatSize(maxManifest))
		}
		return d, err
	}
	top, err := get(ctx, ref)
	if err != nil {
		return nil, err
	}
	m, d, err := manifest(ctx, top.Descriptor, top.Manifest, platform, func(ctx context.Context, d v1.Descriptor) ([]byte, error) {
		child, err := get(ctx, repo.Digest(d.Digest.String()))
		if err != nil {
			return nil, err
		}
		return child.Manifest, nil
	})
	if err != nil {
		return nil, err
	}

	open := func(ctx context.Context, digest v1.Hash) (io.ReadCloser, error) {
		if !isDigest(digest.String()) {
			return nil, fmt.Errorf("%w: %.100q is no sha256 digest", ErrCorrupt, digest.String())
		}
		l, err := puller.Layer(ctx, repo.Digest(digest.String()))
		if err != nil {
			return nil, explain(ref, err)
		}
		body, err := l.Compressed()
		if err != nil {
			return nil, explain(ref, err)
		}
		return &registryBody{body, ref}, nil
	}
	r := &resolved{digest: d.Digest.String(), id: m.Config.Digest.String()}
	body, err := open(ctx, m.Config.Digest)
	if err != nil {
		return nil, fmt.Errorf("configuration: %w", err)
	}
	defer body.Close()
	if r.config, err = readLimited("configuration", body, maxConfig); err != nil {
		return nil, err
	}
	for _, l := range m.Layers {
		r.blobs = append(r.blobs, blob{
			digest: l.Digest.String(), size: l.Size, mediaType: string(l.MediaType),
			open: func(ctx context.Context) (io.ReadCloser, error) { return open(ctx, l.Digest) },
		})
	}
	return r, nil
}

// A registryBody leaves the comparison of digests to the reader of the blob and explains the other errors.
type registryBody struct {
	io.ReadCloser
	ref name.Reference
}

func (b *registryBody) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	if err != nil && err != io.EOF {
		// go-containerregistry's verifying reader has no exported error type.
		if strings.HasPrefix(err.Error(), "error verifying ") {
			return n, io.EOF
		}
		err = explain(b.ref, err)
	}
	return n, err
}

// newTransport is docker's idea of a connection to a registry, with an end to stalled transfers.
func newTransport(insecure bool) *idleTransport {
	t := remote.DefaultTransport.(*http.Transport).Clone()
	if insecure {
		t.TLSClientConfig = &tls.Config{InsecureSkipVerify: true} //nolint:gosec // what the user asked for by name
	}
	return &idleTransport{t, insecure}
}

type idleTransport struct {
	inner *http.Transport
	plain bool // without TLS is allowed: go-containerregistry tries that with every private address
}

var errPlain = errors.New("not asked without TLS")

// Close ends the connections that are kept for another request.
func (t *idleTransport) Close() error {
	t.inner.CloseIdleConnections()
	return nil
}

func (t *idleTransport) RoundTrip(req *http.Request) (*http.Response, error) {
	if req.URL.Scheme != "https" && !t.plain {
		return nil, errPlain
	}
	ctx, cancel := context.WithCancelCause(req.Context())
	timer := time.AfterFunc(idleTimeout, func() { cancel(errStalled) })
	resp, err := t.inner.RoundTrip(req.WithContext(ctx))
	timer.Stop()
	if err != nil {
		if errors.Is(context.Cause(ctx), errStalled) {
			err = errStalled
		}
		cancel(nil)
		return nil, err
	}
	resp.Body = stalled.Body(ctx, cancel, resp.Body, idleTimeout, errStalled)
	return resp, nil
}

// explain turns what the registry client says into one line with a remedy.
func explain(ref name.Reference, err error) error {
	host := ref.Context().RegistryStr()
	login := host
	if host == name.DefaultRegistry {
		login = ""
	}
	var te *transport.Error
	var ne net.Error
	switch {
	case errors.As(err, &te):
		switch te.StatusCode {
		case http.StatusUnauthorized, http.StatusForbidden:
			return fmt.Errorf("%w by %s: the image does not exist or needs a login: run docker login%s", ErrUnauthorized, host, pad(login))
		case http.StatusNotFound:
			return fmt.Errorf("%w at %s: check name and tag", ErrNotFound, host)
		case http.StatusTooManyRequests:
			return fmt.Errorf("%w: %s limits the rate: wait, or run docker login%s", ErrUnreachable, host, pad(login))
		}
		return fmt.Errorf("%s answers %d %s", host, te.StatusCode, http.StatusText(te.StatusCode))
	case errors.Is(err, context.Canceled), errors.Is(err, errStalled), errors.Is(err, io.ErrUnexpectedEOF):
		return err
	case strings.Contains(err.Error(), "does not match requested digest"): // the client has no error type for it
		return fmt.Errorf("%w: %s sends another manifest than the one asked for", ErrCorrupt, host)
	case strings.Contains(err.Error(), "tls: failed to verify certificate: "): // of several tries, one
		_, why, _ := strings.Cut(err.Error(), "tls: failed to verify certificate: ")
		why, _, _ = strings.Cut(why, "; ")
		return fmt.Errorf("%w: the certificate of %s is not good: %s: have this host trust it, or name the registry as insecure", ErrUnreachable, host, why)
	case strings.Contains(err.Error(), "server gave HTTP response to HTTPS client"):
		return fmt.Errorf("%w: %s has no TLS: name it as an insecure registry", ErrUnreachable, host)
	case errors.As(err, &ne):
		return fmt.Errorf("%w: %w: check the network, or give a mirror", ErrUnreachable, rootCause(err))
	}
	return err
}

func pad(s string) string {
	if s == "" {
		return ""
	}
	return " " + s
}

// rootCause leaves out the URLs that net/http puts in front.
func rootCause(err error) error {
	var op *net.OpError
	if errors.As(err, &op) {
		return op
	}
	return err
}
