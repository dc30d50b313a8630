package registry

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/distribution/reference"
	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/remote/transport"
	registrytypes "github.com/moby/moby/api/types/registry"

	"github.com/cradlestack/cradlestack/internal/stalled"
)

// idleTimeout ends a transfer of which nothing has come for so long.
const idleTimeout = time.Minute

var errStalled = fmt.Errorf("nothing has come for %s", idleTimeout)

// An upstream is how other registries are reached: with TLS, and not at addresses that mean this machine, unless the operator has named them. A tenant names the
// host, so what the server can reach and the tenant can't is not for the asking.
type upstream struct {
	insecure               []string
	strict, proxied, loose *http.Transport
}

func newUpstream(insecure []string) *upstream {
	base := http.DefaultTransport.(*http.Transport).Clone()
	base.ResponseHeaderTimeout = 5 * time.Minute // a registry may check a large blob before it answers
	u := &upstream{insecure: insecure, strict: base, proxied: base.Clone(), loose: base.Clone()}
	dialer := &net.Dialer{Timeout: 30 * time.Second, KeepAlive: 30 * time.Second, Control: refuseLocal}
	u.strict.Proxy, u.strict.DialContext = nil, dialer.DialContext
	u.loose.TLSClientConfig = &tls.Config{InsecureSkipVerify: true} //nolint:gosec // what the operator asked for by name
	return u
}

func (u *upstream) close() {
	for _, t := range []*http.Transport{u.strict, u.proxied, u.loose} {
		t.CloseIdleConnections()
	}
}

// refuseLocal is called with the address that a name has led to.
func refuseLocal(_, address string, _ syscall.RawConn) error {
	a, err := netip.ParseAddrPort(address)
	if err != nil {
		return err
	}
	ip := a.Addr().Unmap()
	if ip.IsLoopback() || ip.IsUnspecified() || ip.IsLinkLocalUnicast() || ip.IsMulticast() {
		return fmt.Errorf("%s is an address of the server itself: the operator has to name the registry with --insecure-registry", ip)
	}
	return nil
}

func (u *upstream) isInsecure(host string) bool {
	bare, _, err := net.SplitHostPort(host)
	return slices.Contains(u.insecure, host) || err == nil && slices.Contains(u.insecure, bare)
}

// RoundTrip sends a request, a redirected one and one for a token too.
func (u *upstream) RoundTrip(req *http.Request) (*http.Response, error) {
	t := u.strict
	switch {
	case u.isInsecure(req.URL.Host):
		t = u.loose
	case req.URL.Scheme != "https":
		return nil, fmt.Errorf("%s has no TLS: the operator has to name it with --insecure-registry", req.URL.Host)
	default:
		if proxy, err := http.ProxyFromEnvironment(req); err == nil && proxy != nil {
			t = u.proxied
		}
	}
	ctx, cancel := context.WithCancelCause(req.Context())
	resp, err := t.RoundTrip(req.WithContext(ctx))
	if err != nil {
		cancel(nil)
		return nil, err
	}
	resp.Body = stalled.Body(ctx, cancel, resp.Body, idleTimeout, errStalled)
	return resp, nil
}

// remoteName is a name as the registry client has it.
func (r *Registry) remoteName(n reference.Named) (name.Reference, error) {
	opts := []name.Option{name.WeakValidation}
	if r.upstream.isInsecure(reference.Domain(n)) {
		opts = append(opts, name.Insecure)
	}
	ref, err := name.ParseReference(n.String(), opts...)
	if err != nil {
		return nil, errorf(ErrInvalid, "%v", err)
	}
	return ref, nil
}

// Login checks credentials with another registry, HOST[:PORT].
func (r *Registry) Login(ctx context.Context, host string, c registrytypes.AuthConfig) error {
	var opts []name.Option
	if r.upstream.isInsecure(host) {
		opts = append(opts, name.Insecure)
	}
	to, err := name.NewRegistry(host, opts...)
	if err != nil {
		return errorf(ErrInvalid, "%v", err)
	}
	t, err := transport.NewWithContext(ctx, to, authenticator(c), r.upstream, nil)
	if err == nil {
		err = probe(ctx, t, to)
	}
	var te *transport.Error
	var ue *url.Error
	switch {
	case errors.As(err, &te) && (te.StatusCode == http.StatusUnauthorized || te.StatusCode == http.StatusForbidden):
		return errorf(ErrUnauthorized, "login attempt to %s failed with status %d: %s", host, te.StatusCode, diagnosis(te))
	case errors.As(err, &te):
		return errorf(ErrUnavailable, "%s answers %d: %s", host, te.StatusCode, diagnosis(te))
	case errors.As(err, &ue):
		return errorf(ErrUnavailable, "%s can't be reached: %v", host, ue.Err)
	}
	return err
}

// probe asks a registry for nothing but to be let in.
func probe(ctx context.Context, t http.RoundTripper, to name.Registry) error {
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, to.Scheme()+"://"+to.RegistryStr()+"/v2/", nil)
	if err != nil {
		return err
	}
	answer, err := (&http.Client{Transport: t}).Do(r)
	if err != nil {
		return err
	}
	defer answer.Body.Close()
	return transport.CheckError(answer, http.StatusOK)
}

// authenticator is what docker's client has sent with X-Registry-Auth.
func authenticator(c registrytypes.AuthConfig) authn.Authenticator {
	if c.Username == "" && c.Password == "" && c.Auth == "" && c.IdentityToken == "" && c.RegistryToken == "" {
		return authn.Anonymous
	}
	return authn.FromConfig(authn.AuthConfig{
		Username: c.Username, Password: c.Password, Auth: c.Auth, IdentityToken: c.IdentityToken, RegistryToken: c.RegistryToken,
	})
}

// explain turns what the registry client says into what docker's would.
func explain(n reference.Named, push bool, err error) error {
	var te *transport.Error
	var ue *url.Error
	switch {
	case err == nil, errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return err
	case errors.As(err, &te):
		said := diagnosis(te)
		switch te.StatusCode {
		case http.StatusUnauthorized, http.StatusForbidden:
			if push {
				return errorf(ErrUnauthorized, "push access denied for %s: it may require 'docker login': %s", reference.FamiliarName(n), said)
			}
			return errorf(ErrNotFound, "pull access denied for %s, repository does not exist or may require 'docker login': %s", reference.FamiliarName(n), said)
		case http.StatusNotFound:
			return errorf(ErrNotFound, "manifest for %s not found: %s", reference.FamiliarString(n), said)
		case http.StatusTooManyRequests:
			return errorf(ErrUnavailable, "toomanyrequests: %s limits the rate: wait, or docker login", reference.Domain(n))
		}
		return errorf(ErrUnavailable, "%s answers %d: %s", reference.Domain(n), te.StatusCode, said)
	case errors.As(err, &ue):
		return errorf(ErrUnavailable, "%s can't be reached: %v", reference.Domain(n), ue.Err)
	case strings.Contains(err.Error(), "no child with platform"), strings.Contains(err.Error(), "no matching"): // the client has no type for it
		return errorf(ErrNotFound, "no matching manifest for the platform in the manifest list entries of %s", reference.FamiliarString(n))
	}
	return err
}

// diagnosis is what a registry has said of an error, within bounds: it is a stranger's text.
func diagnosis(te *transport.Error) string {
	if len(te.Errors) == 0 {
		return http.StatusText(te.StatusCode)
	}
	d := te.Errors[0]
	return strings.ToLower(strings.ReplaceAll(fmt.Sprintf("%.60s", d.Code), "_", " ")) + ": " + fmt.Sprintf("%.200q", d.Message)
}
