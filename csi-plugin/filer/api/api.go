// Package api is what cradle-filer answers on its unix socket, and the client of it. Whoever may open the socket decides who sees which volume: it is
// root's. It knows volumes, and no protocol that they are served by.
//
//	PUT    /publications/{id}       Publication → Publication, with all that a client needs; again: the same
//	DELETE /publications/{id}       its clients see nothing any more; one that is not there is no error
//	GET    /publications            []Publication
//	PUT    /grants/{id}             Grant → Grant, with its secret; again: the same
//	DELETE /grants/{id}             nobody gets in by it any more; one that is not there is no error
//	GET    /grants                  []Grant, without secrets
//	GET    /volumes/{id}/stats      spec.VolumeStats of a published volume
//	POST   /volumes/{id}/grow       its file system fills the volume, which has become larger
//	GET    /status                  Status
package api

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"time"

	"github.com/cradlestack/cradlestack/csi-plugin/volume"
	"github.com/cradlestack/cradlestack/internal/unixhttp"
	"github.com/cradlestack/cradlestack/spec"
)

// Socket is where a filer listens unless it is told otherwise.
const Socket = "/run/cradle/filer/api.sock"

// A Publication lets some clients see a volume.
type Publication struct {
	ID       string         `json:"id"`
	Volume   string         `json:"volume"`
	ReadOnly bool           `json:"readOnly,omitempty"`
	Clients  []netip.Prefix `json:"clients"` // from where it can be mounted

	// What the filer adds.
	Address string `json:"address,omitempty"` // host:port
	Export  string `json:"export,omitempty"`  // the path to mount. It holds a secret: who knows it, and is among Clients, has the volume
	Options string `json:"options,omitempty"` // to mount it with
}

// NFS is the publication as a guest mounts it.
func (p Publication) NFS() *spec.NFSVolume {
	return &spec.NFSVolume{Address: p.Address, Export: p.Export, Options: p.Options, ReadOnly: p.ReadOnly}
}

// Status is how a filer does.
type Status struct {
	Version      string    `json:"version"`
	Since        time.Time `json:"since"`
	Address      string    `json:"address"`
	Volumes      int       `json:"volumes"`
	Publications int       `json:"publications"`
	Grants       int       `json:"grants"`
	WebDAV       string    `json:"webdav,omitempty"` // URL, where that is served
}

// An Error is the body of an answer that is one.
type Error struct {
	Message string `json:"message"`
	Kind    string `json:"kind,omitempty"` // of the sentinel in package volume
}

// kinds are the sentinels that outlast the way through a socket, with the HTTP codes that they have there.
var kinds = map[string]struct {
	is   error
	code int
}{
	"not found":   {volume.ErrNotFound, http.StatusNotFound},
	"exists":      {volume.ErrExists, http.StatusConflict},
	"in use":      {volume.ErrInUse, http.StatusConflict},
	"no space":    {volume.ErrNoSpace, http.StatusInsufficientStorage},
	"invalid":     {volume.ErrInvalid, http.StatusBadRequest},
	"foreign":     {volume.ErrForeign, http.StatusConflict},
	"unavailable": {volume.ErrUnavailable, http.StatusServiceUnavailable},
}

// Explain is the body and the HTTP code of an error.
func Explain(err error) (Error, int) {
	for kind, k := range kinds {
		if errors.Is(err, k.is) {
			return Error{err.Error(), kind}, k.code
		}
	}
	return Error{Message: err.Error()}, http.StatusInternalServerError
}

// A remote error keeps its sentinel.
type remoteError struct {
	message string
	is      error
}

func (e *remoteError) Error() string { return e.message }
func (e *remoteError) Unwrap() error { return e.is }

// A Client calls a filer.
type Client struct{ Socket string }

// Publish lets clients see a volume, and says how.
func (c Client) Publish(ctx context.Context, p Publication) (Publication, error) {
	var out Publication
	return out, c.call(ctx, http.MethodPut, "/publications/"+url.PathEscape(p.ID), p, &out)
}

// Unpublish ends a publication.
func (c Client) Unpublish(ctx context.Context, id string) error {
	return c.call(ctx, http.MethodDelete, "/publications/"+url.PathEscape(id), nil, nil)
}

// Publications are all that there are.
func (c Client) Publications(ctx context.Context) (all []Publication, err error) {
	return all, c.call(ctx, http.MethodGet, "/publications", nil, &all)
}

// Stats are a published volume's.
func (c Client) Stats(ctx context.Context, volume string) (s spec.VolumeStats, err error) {
	return s, c.call(ctx, http.MethodGet, "/volumes/"+url.PathEscape(volume)+"/stats", nil, &s)
}

// Grow lets a published volume's file system fill it. One that is not published grows when it is.
func (c Client) Grow(ctx context.Context, volume string) error {
	return c.call(ctx, http.MethodPost, "/volumes/"+url.PathEscape(volume)+"/grow", nil, nil)
}

// Status is how the filer does.
func (c Client) Status(ctx context.Context) (s Status, err error) {
	return s, c.call(ctx, http.MethodGet, "/status", nil, &s)
}

func (c Client) call(ctx context.Context, method, path string, in, out any) error {
	err := unixhttp.Call(ctx, c.Socket, method, path, in, out)
	var refusal *unixhttp.Refusal
	var unreached *net.OpError
	switch {
	case errors.As(err, &refusal):
		var e Error
		if json.Unmarshal(refusal.Body, &e) != nil || e.Message == "" {
			e.Message = refusal.Error()
		}
		return &remoteError{e.Message, kinds[e.Kind].is}
	case errors.As(err, &unreached) && unreached.Op == "dial":
		return fmt.Errorf("%w: no filer answers at %s: %w; start cradle-filer", volume.ErrUnavailable, c.Socket, err)
	case err != nil:
		return fmt.Errorf("filer at %s: %w", c.Socket, err)
	}
	return nil
}
