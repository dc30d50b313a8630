package server

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/nomad/api"

	"github.com/cradlestack/cradlestack/internal/dockerhttp"
)

// An Access is what a client may touch: a namespace of Nomad's, with a token that Nomad judges.
type Access struct {
	Namespace string `json:"namespace"`
	TokenFile string `json:"tokenFile,omitempty"` // "": the server's own, $NOMAD_TOKEN
}

// A tenant is an Access with a client of Nomad's. All requests of those who have it share it.
type tenant struct {
	Access
	server *Server
	config *api.Config
	nomad  *api.Client

	watch   *watch
	log     *eventLog
	records recordCache
	otherPods
	sessions
	starting   startSet
	attendants attendants

	end context.CancelCauseFunc
}

type connKey struct{}

// identify keeps a request's connection: over a unix socket there is no certificate.
func identify(ctx context.Context, c net.Conn) context.Context {
	return context.WithValue(ctx, connKey{}, c)
}

// isLocal says whether a request came over the unix socket.
func isLocal(r *http.Request) bool {
	c, _ := r.Context().Value(connKey{}).(net.Conn)
	return c != nil && c.LocalAddr().Network() == "unix"
}

// clientName is who asks: the common name of the certificate, which the listener has verified.
func clientName(r *http.Request) string {
	switch {
	case isLocal(r):
		return "local"
	case r.TLS != nil && len(r.TLS.PeerCertificates) > 0:
		return r.TLS.PeerCertificates[0].Subject.CommonName
	}
	return ""
}

// tenant is the one that a request belongs to.
func (s *Server) tenant(r *http.Request) (*tenant, error) {
	if isLocal(r) {
		return s.tenantOf(s.Local)
	}
	name := clientName(r)
	if name == "" {
		return nil, dockerhttp.Errorf(http.StatusForbidden, "who are you? Connect with a certificate that has a common name")
	}
	a, err := s.clients.access(name)
	if errors.Is(err, errUnknownClient) {
		return nil, dockerhttp.Errorf(http.StatusForbidden, "client %q has no namespace here: ask the operator for one", name)
	}
	if err != nil {
		s.Log.Error("who may do what", "error", err)
		return nil, errors.New("the server's list of clients can't be read: tell its operator")
	}
	return s.tenantOf(a)
}

func (s *Server) tenantOf(a Access) (*tenant, error) {
	token := s.Nomad.SecretID
	if a.TokenFile != "" {
		data, err := os.ReadFile(a.TokenFile)
		if err != nil {
			s.Log.Error("token of a namespace", "namespace", a.Namespace, "error", err)
			return nil, fmt.Errorf("the Nomad token of namespace %s can't be read: tell the operator", a.Namespace)
		}
		token = strings.TrimSpace(string(data))
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if t := s.tenants[a]; t != nil && t.config.SecretID == token {
		return t, nil
	}
	if s.ctx.Err() != nil {
		return nil, context.Cause(s.ctx)
	}
	c := *s.Nomad
	c.Namespace, c.SecretID = a.Namespace, token
	client, err := newNomad(c)
	if err != nil {
		return nil, err
	}
	t := &tenant{Access: a, server: s, config: &c, nomad: client, watch: newWatch(), log: newEventLog()}
	if old := s.tenants[a]; old != nil {
		old.end(errors.New("the namespace has another token now"))
	}
	ctx, cancel := context.WithCancelCause(s.ctx)
	t.end = cancel
	s.tenants[a] = t
	s.work.Go(func() { t.follow(ctx) })
	s.work.Go(func() { t.writeEvents(ctx) })
	return t, nil
}

// A clientsFile maps common names to accesses: {"clients": {"alice": {"namespace": "team-a", "tokenFile": "/etc/cradle/team-a.token"}}}.
type clientsFile struct {
	path string

	mu       sync.Mutex
	modified time.Time
	size     int64
	clients  map[string]Access
}

var errUnknownClient = errors.New("unknown client")

// access reads the file anew when it has changed.
func (f *clientsFile) access(name string) (Access, error) {
	if f.path == "" {
		return Access{}, errUnknownClient
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	info, err := os.Stat(f.path)
	if err != nil {
		return Access{}, err
	}
	if f.clients == nil || !info.ModTime().Equal(f.modified) || info.Size() != f.size {
		data, err := os.ReadFile(f.path)
		if err != nil {
			return Access{}, err
		}
		if f.clients, err = parseClients(data); err != nil {
			return Access{}, fmt.Errorf("%s: %w", f.path, err)
		}
		f.modified, f.size = info.ModTime(), info.Size()
	}
	a, ok := f.clients[name]
	if !ok {
		return Access{}, errUnknownClient
	}
	return a, nil
}

// all are the accesses of all clients, as far as the file can be read.
func (f *clientsFile) all() []Access {
	_, _ = f.access("") // reads it; what is wrong with it a client is told
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Collect(maps.Values(f.clients))
}

func parseClients(data []byte) (map[string]Access, error) {
	var file struct {
		Clients map[string]Access `json:"clients"`
	}
	d := json.NewDecoder(bytes.NewReader(data))
	d.DisallowUnknownFields()
	if err := d.Decode(&file); err != nil {
		return nil, err
	}
	if len(file.Clients) == 0 {
		return nil, errors.New(`there are no clients in it: write {"clients": {"NAME": {"namespace": "NAMESPACE", "tokenFile": "FILE"}}}`)
	}
	for name, a := range file.Clients {
		if name == "" {
			return nil, errors.New("a client has no name")
		}
		if a.Namespace == "" || a.TokenFile == "" {
			return nil, fmt.Errorf("client %s: namespace and tokenFile are both needed", name)
		}
	}
	return file.Clients, nil
}
