// Package api is what cradle-filer answers on its unix socket, to who has the key of its set, and to Nomad's users, and the client of it. Whoever may open the
// socket, or has that key, decides who sees which volume: both are root's. It knows volumes, and no protocol that they are served by.
//
//	PUT    /publications/{id}       Publication → Publication, with all that a client needs; again: the same
//	DELETE /publications/{id}       its clients see nothing any more; one that is not there is no error
//	GET    /publications            []Publication
//	PUT    /grants/{id}             Grant → Grant, with its secret; again: the same
//	DELETE /grants/{id}             nobody gets in by it any more; one that is not there is no error
//	GET    /grants                  []Grant, without secrets
//	GET    /volumes/{id}/stats      spec.VolumeStats of a published volume
//	POST   /volumes/{id}/grow       its file system fills the volume, which has become larger
//	PUT    /volumes/{id}            Request → volume.Volume, which is made where it is not there; again: the same
//	DELETE /volumes/{id}            it is gone, with its automatic snapshots; one that is not there is no error
//	GET    /volumes/{id}            volume.Volume
//	GET    /volumes                 Volumes
//	POST   /volumes/{id}/expand     Size → Size, which a published one's file system fills
//	PUT    /snapshots/{id}          volume.Snapshot: VOLUME@NAME is taken, with the parameter automatic as one of the schedule's; again: the same
//	DELETE /snapshots/{id}          it is gone; one that is not there is no error
//	GET    /snapshots?volume=       []volume.Snapshot of one volume, or of all, by id
//	GET    /capacity                Size that a new volume with these parameters can have
//	GET    /backend                 Backend
//	GET    /ready                   an error says why nothing can be kept
//	GET    /status                  Status
//	POST   /switch                  another filer of the set takes over
//
// To Nomad's users it answers what is about their volumes' snapshots and their namespaces' grants alone. They show a token in the header X-Nomad-Token; {id} of a
// volume is Nomad's, and that of a grant one of the namespace's own, of the parameter namespace.
//
//	GET    /volumes/{id}/snapshots          []Snapshot, by time
//	PUT    /volumes/{id}/snapshots/{name}   takes one → Snapshot; again: the same
//	POST   /volumes/{id}/rollback           Rollback → RolledBack
//	GET    /volumes/{id}/schedule           Schedule
//	PUT    /volumes/{id}/schedule           Schedule → Schedule
//	GET    /volumes/{id}/diff?from=&to=     []tree.Difference of a snapshot to another, or to the volume
//	PUT    /grants/{id}                     Grant → Grant; its secret is in the Variable as well. Again: the same
//	DELETE /grants/{id}                     nobody gets in by it any more, and the Variable is gone
//	GET    /grants                          []Grant of the namespace, without secrets
package api

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strings"
	"syscall"
	"time"

	"github.com/cradlestack/cradlestack/csi-plugin/tree"
	"github.com/cradlestack/cradlestack/csi-plugin/volume"
	"github.com/cradlestack/cradlestack/internal/jsonhttp"
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
	Engine       string    `json:"engine"` // of NFS; "" of one that stands by
	Address      string    `json:"address"`
	Volumes      int       `json:"volumes"`
	Publications int       `json:"publications"`
	Grants       int       `json:"grants"`
	WebDAV       string    `json:"webdav,omitempty"` // URL, where that is served
	S3           string    `json:"s3,omitempty"`     // URL, where that is served
	Set          *Set      `json:"set,omitempty"`    // nil of a filer that is alone
}

// A Set are filers of which one serves.
type Set struct {
	Name        string    `json:"name"`
	Member      string    `json:"member"`           // that answers this
	Active      string    `json:"active,omitempty"` // "" while there is none
	Serving     bool      `json:"serving"`          // clients are answered
	ActiveSince time.Time `json:"activeSince"`
	Why         string    `json:"why"` // it moved there
	Standby     []string  `json:"standby,omitempty"`
	Waits       string    `json:"waits,omitempty"`  // for what the member that answers this waits: it could not serve when it had the lock, or can't go on
	Consul      string    `json:"consul,omitempty"` // why it is not to be relied on; "" while it answers
}

// A Snapshot is a volume's state at one time.
type Snapshot struct {
	Name      string    `json:"name"`
	Created   time.Time `json:"created"`
	Automatic bool      `json:"automatic,omitempty"` // it goes with its volume
}

// A Schedule says how many of each kind of a volume's automatic snapshots are kept.
type Schedule struct {
	Snapshots string `json:"snapshots"`         // hourly=24,daily=7, or none; to be set, "" is what the volume was made with
	Changed   bool   `json:"changed,omitempty"` // since the volume was made
}

// A Rollback makes a volume what it was.
type Rollback struct {
	Snapshot string `json:"snapshot"`
	Path     string `json:"path,omitempty"` // in the volume: with all below, that alone
}

// RolledBack is what it took.
type RolledBack struct {
	Undo    string `json:"undo"`    // the snapshot of what was before
	Entries int    `json:"entries"` // files and directories that were made, changed or removed
	Bytes   int64  `json:"bytes"`   // that were written
}

// ErrDenied is what Nomad does not let the caller do.
var ErrDenied = errors.New("permission denied")

// An Error is the body of an answer that is one.
type Error struct {
	Message string `json:"message"`
	Kind    string `json:"kind,omitempty"` // of the sentinel in package volume
}

// ErrAway is that no filer serves at the moment, or that the one which did has ended before it has answered: the same call may succeed as soon as one serves.
var ErrAway error = &sort{volume.ErrUnavailable}

// ErrGoesOn is what takes longer than a call does. It goes on, and the same call tells what has become of it.
var ErrGoesOn error = &sort{volume.ErrUnavailable}

// A sort of an error.
type sort struct{ error }

func (s *sort) Unwrap() error { return s.error }

// kinds are the sentinels that outlast the way through a socket, with the HTTP codes that they have there. What is a sort of another one comes before it.
var kinds = []struct {
	kind string
	is   error
	code int
}{
	{"away", ErrAway, http.StatusServiceUnavailable},
	{"goes on", ErrGoesOn, http.StatusServiceUnavailable},
	{"not found", volume.ErrNotFound, http.StatusNotFound},
	{"exists", volume.ErrExists, http.StatusConflict},
	{"in use", volume.ErrInUse, http.StatusConflict},
	{"busy", volume.ErrBusy, http.StatusConflict},
	{"no space", volume.ErrNoSpace, http.StatusInsufficientStorage},
	{"range", volume.ErrRange, http.StatusBadRequest},
	{"invalid", volume.ErrInvalid, http.StatusBadRequest},
	{"foreign", volume.ErrForeign, http.StatusConflict},
	{"unavailable", volume.ErrUnavailable, http.StatusServiceUnavailable},
	{"denied", ErrDenied, http.StatusForbidden},
	{"unsupported", errors.ErrUnsupported, http.StatusNotImplemented},
}

// Explain is the body and the HTTP code of an error.
func Explain(err error) (Error, int) {
	for _, k := range kinds {
		if errors.Is(err, k.is) {
			return Error{err.Error(), k.kind}, k.code
		}
	}
	return Error{Message: err.Error()}, http.StatusInternalServerError
}

// explained is the reverse.
func explained(r *jsonhttp.Refusal) error {
	var e Error
	if json.Unmarshal(r.Body, &e) != nil || e.Message == "" {
		e.Message = r.Error()
		if r.Code == http.StatusServiceUnavailable { // by who had the lease
			return &remoteError{e.Message, ErrAway}
		}
	}
	return e.err()
}

func (e Error) err() error {
	for _, k := range kinds {
		if k.kind == e.Kind {
			return &remoteError{e.Message, k.is}
		}
	}
	return &remoteError{e.Message, nil}
}

// A remote error keeps its sentinel.
type remoteError struct {
	message string
	is      error
}

func (e *remoteError) Error() string { return e.message }
func (e *remoteError) Unwrap() error { return e.is }

// A Client calls a filer: at its socket, or from another host as who has the key of its set, or as one of Nomad's users.
type Client struct {
	Socket string

	Address string // host:port of any filer of a set; "" for the socket
	KeyFile string // which has the set's key

	URL              string // "" for root
	Token, Namespace string // Nomad's
}

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

// Snapshots are a volume's, by time.
func (c Client) Snapshots(ctx context.Context, volume string) (all []Snapshot, err error) {
	return all, c.call(ctx, http.MethodGet, "/volumes/"+url.PathEscape(volume)+"/snapshots", nil, &all)
}

// Snapshot takes one.
func (c Client) Snapshot(ctx context.Context, volume, name string) (s Snapshot, err error) {
	return s, c.call(ctx, http.MethodPut, "/volumes/"+url.PathEscape(volume)+"/snapshots/"+url.PathEscape(name), nil, &s)
}

// Schedule is which of a volume's automatic snapshots are kept.
func (c Client) Schedule(ctx context.Context, volume string) (s Schedule, err error) {
	return s, c.call(ctx, http.MethodGet, "/volumes/"+url.PathEscape(volume)+"/schedule", nil, &s)
}

// Reschedule changes that.
func (c Client) Reschedule(ctx context.Context, volume, snapshots string) (s Schedule, err error) {
	return s, c.call(ctx, http.MethodPut, "/volumes/"+url.PathEscape(volume)+"/schedule", Schedule{Snapshots: snapshots}, &s)
}

// Rollback makes a volume, or a path in it, what it was when a snapshot was taken.
func (c Client) Rollback(ctx context.Context, volume string, r Rollback) (done RolledBack, err error) {
	return done, c.call(ctx, http.MethodPost, "/volumes/"+url.PathEscape(volume)+"/rollback", r, &done)
}

// Diff tells what has changed since a snapshot, until another or ("") until now.
func (c Client) Diff(ctx context.Context, volume, from, to string) (all []tree.Difference, err error) {
	q := url.Values{"from": {from}, "to": {to}}
	return all, c.call(ctx, http.MethodGet, "/volumes/"+url.PathEscape(volume)+"/diff?"+q.Encode(), nil, &all)
}

// Status is how the filer does.
func (c Client) Status(ctx context.Context) (s Status, err error) {
	return s, c.call(ctx, http.MethodGet, "/status", nil, &s)
}

// Switch has another filer of the set take over from this one, and returns when it serves.
func (c Client) Switch(ctx context.Context) error {
	return c.call(ctx, http.MethodPost, "/switch", nil, nil)
}

func (c Client) call(ctx context.Context, method, path string, in, out any) error {
	at := c.Socket
	var err error
	switch {
	case c.URL != "":
		at = c.URL
		err = c.ask(ctx, method, path, in, out)
	case c.Address != "":
		at = c.Address
		err = c.askPeer(ctx, method, path, in, out)
	default:
		err = jsonhttp.Call(ctx, c.Socket, method, path, in, out)
	}
	var refusal *jsonhttp.Refusal
	var unreached *net.OpError
	switch {
	case errors.As(err, &refusal):
		return explained(refusal)
	case errors.As(err, &unreached) && unreached.Op == "dial":
		return fmt.Errorf("%w: no filer answers at %s: %w; start cradle-filer", ErrAway, at, err)
	case err != nil && ctx.Err() == nil && cut(err):
		return fmt.Errorf("%w: the filer at %s has not answered: %w", ErrAway, at, err)
	case err != nil:
		return fmt.Errorf("filer at %s: %w", at, err)
	}
	return nil
}

// cut says whether an error is that of a connection whose other end has ended, or does not answer.
func cut(err error) bool {
	var n net.Error
	return errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE) || errors.As(err, &n) && n.Timeout()
}

// ask asks as one of Nomad's users.
func (c Client) ask(ctx context.Context, method, path string, in, out any) error {
	u, err := url.Parse(strings.TrimSuffix(c.URL, "/") + path)
	if err != nil {
		return err
	}
	q := u.Query()
	q.Set("namespace", c.Namespace)
	u.RawQuery = q.Encode()
	return jsonhttp.Do(ctx, http.DefaultTransport, method, u.String(), http.Header{TokenHeader: {c.Token}}, in, out)
}

// TokenHeader is where a caller shows its token, as to Nomad.
const TokenHeader = "X-Nomad-Token"
