package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strings"
	"sync"

	nomadapi "github.com/hashicorp/nomad/api"

	"github.com/cradlestack/cradlestack/csi-plugin/filer/api"
	"github.com/cradlestack/cradlestack/csi-plugin/filer/gateway"
	"github.com/cradlestack/cradlestack/csi-plugin/volume"
)

// A caller is who has sent a request about a volume.
type caller struct {
	who       string // for the audit log, if something is to be changed
	namespace string // Nomad's; "" for root
	volume    string // as the backend calls it
}

// A nomad says who may do what with which volume.
type nomad struct {
	client *nomadapi.Client
	plugin string   // id of the plugin whose volumes these are
	limits sync.Map // namespaces that somebody had a right in → *gateway.Limit
}

// usersRate is how many requests a second a namespace's users have done.
const usersRate = 50

// An end is what is to be done at the end of a request.
type end struct {
	do      func()
	counted bool
}

type endKey struct{}

// limited lets no namespace take the connections and the time of all: its users' requests are counted from when Nomad has let them in.
func limited(handler http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		e := &end{do: func() {}}
		defer func() { e.do() }()
		handler.ServeHTTP(w, r.WithContext(context.WithValue(r.Context(), endKey{}, e)))
	})
}

// begin counts a request of a namespace, once.
func (n *nomad) begin(r *http.Request, namespace string) error {
	e, ok := r.Context().Value(endKey{}).(*end)
	if !ok || e.counted {
		return nil
	}
	l, _ := n.limits.LoadOrStore(namespace, gateway.NewLimit(usersRate))
	do, err := l.(*gateway.Limit).Begin(r.Context())
	if errors.Is(err, gateway.ErrBusy) {
		return fmt.Errorf("namespace %s: %w: too many of its requests are at work; try again", namespace, volume.ErrUnavailable)
	}
	if err == nil {
		e.do, e.counted = do, true
	}
	return err
}

func openNomad(address, plugin string) (*nomad, error) {
	config := nomadapi.DefaultConfig()
	config.Address = address
	config.SecretID = "" // callers show their own
	client, err := nomadapi.NewClient(config)
	if err != nil {
		return nil, fmt.Errorf("--nomad: %w", err)
	}
	return &nomad{client: client, plugin: plugin}, nil
}

func tokenOf(r *http.Request) string {
	// No token would be this process's.
	return cmp.Or(r.Header.Get(api.TokenHeader), "00000000-0000-0000-0000-000000000000")
}

func namespaceOf(r *http.Request) string {
	return cmp.Or(r.URL.Query().Get("namespace"), nomadapi.DefaultNamespace)
}

// admit asks Nomad with the caller's token whether it may read or change a volume: it has to have csi-read-volume or csi-write-volume in the namespace.
func (n *nomad) admit(r *http.Request, id string, change bool) (caller, error) {
	token, namespace := tokenOf(r), namespaceOf(r)
	c := caller{namespace: namespace}
	if change {
		c.who = n.who(r.Context(), token)
	}
	// Nomad's client makes a path of it. No other answer than that about a volume may be taken for one: a job's files, for example, are what who runs it wants.
	if id == "" || id == "." || id == ".." || strings.ContainsRune(id, '/') {
		return c, fmt.Errorf("volume %.80q of namespace %s: %w", id, namespace, volume.ErrNotFound)
	}
	q := (&nomadapi.QueryOptions{Namespace: namespace, AuthToken: token}).WithContext(r.Context())
	v, _, err := n.client.CSIVolumes().Info(url.PathEscape(id), q)
	if err != nil {
		return c, translated(err, fmt.Sprintf("volume %s of namespace %s", id, namespace), "csi-read-volume")
	}
	if v.ID != id || v.Namespace != namespace {
		return c, fmt.Errorf("volume %s of namespace %s: %w: Nomad answers with %q of %q", id, namespace, volume.ErrNotFound, v.ID, v.Namespace)
	}
	if v.PluginID != n.plugin {
		return c, fmt.Errorf("volume %s of namespace %s: %w here: it is plugin %s's", id, namespace, volume.ErrNotFound, v.PluginID)
	}
	c.volume = v.ExternalID
	if change {
		// Snapshots of no volume: nothing is done, once the right to it has been checked.
		w := (&nomadapi.WriteOptions{Namespace: namespace, AuthToken: token}).WithContext(r.Context())
		if _, err := n.client.Raw().Write("/v1/volumes/snapshot", nomadapi.CSISnapshotCreateRequest{Snapshots: []*nomadapi.CSISnapshot{}}, nil, w); err != nil {
			return c, translated(err, fmt.Sprintf("volume %s of namespace %s", id, namespace), "csi-write-volume")
		}
	}
	if err := n.begin(r, namespace); err != nil {
		return c, err
	}
	gateway.Admitted(r)
	return c, nil
}

// who names the owner of a token for the audit log.
func (n *nomad) who(ctx context.Context, token string) string {
	t, _, err := n.client.ACLTokens().Self((&nomadapi.QueryOptions{AuthToken: token}).WithContext(ctx))
	switch {
	case err != nil && strings.Contains(err.Error(), "ACL support disabled"):
		return "anybody (Nomad has no ACLs)"
	case err != nil:
		return "a token without a name"
	}
	return strings.TrimSpace(t.Name + " " + t.AccessorID)
}

// translated gives Nomad's answer its meaning.
func translated(err error, what, capability string) error {
	var unexpected nomadapi.UnexpectedResponseError
	if errors.As(err, &unexpected) && unexpected.HasStatusCode() {
		switch unexpected.StatusCode() {
		case http.StatusForbidden, http.StatusUnauthorized:
			return fmt.Errorf("%s: %w: the token needs the capability %s", what, api.ErrDenied, capability)
		case http.StatusNotFound:
			return fmt.Errorf("%s: %w", what, volume.ErrNotFound)
		}
	}
	return fmt.Errorf("%s: %w: Nomad: %w", what, volume.ErrUnavailable, err)
}
