// Package server answers docker's Engine API for Nomad: what a client asks for becomes jobs, variables and volumes of its namespace, and what
// concerns a running container is passed on to the docker API of its pod.
//
// The server has no state of its own. Everything lives in Nomad and in the registry, so that any number of servers can run, and one can be killed
// at any moment: another one, or the next one, goes on. Each group of routes has a file, whose routes are in Server.groups.
//
// It imports spec, nomadjob and Nomad's API client, and nothing of the driver: they meet in Nomad.
package server

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/nomad/api"
	"golang.org/x/sync/errgroup"

	"github.com/cradlestack/cradlestack/dockerapi/registry"
	"github.com/cradlestack/cradlestack/dockerapi/translate"
	"github.com/cradlestack/cradlestack/internal/dockerhttp"
)

// versions are those of docker's API: docker CLI 19.03 and later speak them. The greatest is that of moby/moby/api in go.mod.
var versions = dockerhttp.Versions{Min: 40, Max: 56, Server: "cradle (linux)"}

// Bounds of a request.
const (
	maxHeader     = 256 << 10 // credentials and filters stand in headers and in the URL
	headerTimeout = 30 * time.Second
	drainTimeout  = 5 * time.Second // for requests that run when the server ends
)

// A Config says what a Server serves.
type Config struct {
	Nomad   *api.Config // nil: what Nomad's environment variables say
	Local   Access      // of those who come over the unix socket
	Clients string      // file that maps certificates to Access; see identity.go
	// Pods is the task driver's state_dir on this machine, "" for none: to the pods there it is a short way.
	Pods string
	// HostPaths lets containers mount directories of their node: see translate.Rules.
	HostPaths bool
	// VolumePlugin is the CSI plugin whose volumes are docker's, VolumeDriver the class of those that name none.
	VolumePlugin, VolumeDriver string
	// RegistryHost is where nodes find Registry, HOST:PORT.
	RegistryHost string
	// Layouts is a directory of OCI layouts, whose names are images' names.
	Layouts string
	Version string
	Log     *slog.Logger
	// Registry keeps the images; nil: there are none. It stays its opener's to close.
	Registry *registry.Registry
}

// A Server answers docker's clients.
type Server struct {
	Config
	handler http.Handler
	clients clientsFile

	ctx    context.Context // ends with Close
	cancel context.CancelCauseFunc
	work   sync.WaitGroup

	uses []func(context.Context, *tenant) ([]registry.Use, error) // who knows which containers are made from images

	mu      sync.Mutex
	tenants map[Access]*tenant
}

// errClosed is why what a server does in the background ends.
var errClosed = errors.New("the server ends")

// What holds for volumes where a Config does not say.
const (
	DefaultVolumePlugin = "cradle"
	DefaultVolumeDriver = "lv2"
)

// New makes a server. Nomad need not be there yet.
func New(c Config) (*Server, error) {
	if c.Nomad == nil {
		c.Nomad = api.DefaultConfig()
	}
	c.VolumePlugin, c.VolumeDriver = or(c.VolumePlugin, DefaultVolumePlugin), or(c.VolumeDriver, DefaultVolumeDriver)
	if !slices.Contains(translate.Classes, c.VolumeDriver) {
		return nil, fmt.Errorf("volume driver %s: there are %s", c.VolumeDriver, strings.Join(translate.Classes, ", "))
	}
	s := &Server{Config: c, clients: clientsFile{path: c.Clients}, tenants: map[Access]*tenant{}}
	if c.Clients != "" {
		if _, err := s.clients.access(""); err != nil && !errors.Is(err, errUnknownClient) {
			return nil, err
		}
	}
	s.ctx, s.cancel = context.WithCancelCause(context.Background())
	rt := newRouter(s)
	for _, group := range s.groups() {
		group(rt)
	}
	s.handler = s.logged(versions.Handler(rt))
	return s, nil
}

// groups are the routes, a group to a file.
func (s *Server) groups() []func(*router) {
	return []func(*router){s.systemRoutes, s.containerRoutes, s.networkRoutes, s.imageRoutes, s.volumeRoutes, s.eventRoutes}
}

// ServeHTTP answers a request.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) { s.handler.ServeHTTP(w, r) }

// Serve answers on all listeners until ctx ends, and closes them. Requests that are under way then have a moment to end.
func (s *Server) Serve(ctx context.Context, listeners ...net.Listener) error {
	h := &http.Server{
		Handler: s, ReadHeaderTimeout: headerTimeout, MaxHeaderBytes: maxHeader,
		ErrorLog:    slog.NewLogLogger(s.Log.Handler(), slog.LevelDebug),
		ConnContext: identify,
		BaseContext: func(net.Listener) context.Context { return s.ctx },
	}
	s.watchAll(listeners)
	if s.Pods != "" {
		s.work.Go(func() { s.followAnswering(s.ctx) })
	}
	g, ctx := errgroup.WithContext(ctx)
	for _, l := range listeners {
		g.Go(func() error {
			if err := h.Serve(l); !errors.Is(err, http.ErrServerClosed) {
				return fmt.Errorf("serve on %s: %w", l.Addr(), err)
			}
			return nil
		})
	}
	g.Go(func() error {
		<-ctx.Done()
		end, cancel := context.WithTimeout(context.WithoutCancel(ctx), drainTimeout)
		defer cancel()
		if h.Shutdown(end) != nil {
			return h.Close()
		}
		return nil
	})
	return g.Wait()
}

// Close ends what the server does in the background.
func (s *Server) Close() {
	s.cancel(errClosed)
	s.work.Wait()
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, t := range s.tenants {
		t.nomad.Close()
	}
}
