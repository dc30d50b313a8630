// Package rpc serves the Container Storage Interface (CSI spec v1.12.0): the Identity, Controller and Node services over one
// volume.Backend. It translates between CSI and package volume and decides nothing about storage; no backend is imported here.
//
// Calls for one volume wait for each other, those for different volumes run at the same time. Nomad takes Aborted for final,
// so a second call for a busy volume is not refused, and ends only with its own deadline. Aborted is what would wait for a copy that may take hours.
package rpc

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/cradlestack/cradlestack/csi-plugin/filer/api"
	"github.com/cradlestack/cradlestack/csi-plugin/volume"
	"github.com/cradlestack/cradlestack/internal/keyed"
)

// Name is what the plugin calls itself, and the prefix of its topology's keys.
const Name = "csi.cradlestack.org"

// The topology's keys.
const (
	TopologyHost = Name + "/host"
	TopologyZone = Name + "/zone"
)

// Config says what to serve.
type Config struct {
	Backend    volume.Backend
	Controller bool   // serve the Controller service
	Node       bool   // serve the Node service
	NodeID     string // of this host in the topology
	Zone       string // of this host; "" is none
	Local      bool   // a volume is reachable on the host that made it alone; else in its zone
	Version    string // of this program

	// Owner says which of the block volumes of a name on several hosts is the one to be used. Where it is nil, that is the one here.
	Owner func(ctx context.Context, id string) (Owner, error)

	// Cold gets a word each time that Schedule has taken a snapshot for cold storage, for whom copies volumes there; nil where nobody does.
	Cold chan<- struct{}

	// Snapshots are taken by schedule of file volumes whose parameters do not say which; nil for none.
	Snapshots func(context.Context) (volume.Retention, error)

	Filer     *api.Client    // that serves file volumes to guests; nil for none
	Shared    bool           // the filer is one of a set: the pool is on all hosts that make volumes, and holds nothing that one host alone may have mounted
	Networks  []netip.Prefix // of pods, besides this host's own addresses and bridges
	DirectDir string         // where records of directly attached volumes are: spec.DirectDir
	Log       *slog.Logger
	Metrics   prometheus.Registerer // nil for none
}

// An Owner of a block volume is the host that has it. The zero value is the one that made it.
type Owner struct {
	Generation int
	Node       string // its name
}

// owner is Config.Owner's answer.
func (s *Server) owner(ctx context.Context, id string) (Owner, error) {
	if s.config.Owner == nil {
		return Owner{}, nil
	}
	return s.config.Owner(ctx, id)
}

// A Server answers CSI calls.
type Server struct {
	config  Config
	grpc    *grpc.Server
	busy    keyed.Lock
	metrics *metrics

	lasting context.Context // of what outlasts its call: complete
	end     context.CancelCauseFunc
	work    sync.WaitGroup
}

// errEnds is why what outlasts its call does not come to its end.
var errEnds = fmt.Errorf("%w: the plugin ends", volume.ErrUnavailable)

// New returns a server that is not listening yet.
func New(c Config) *Server {
	s := &Server{config: c, metrics: newMetrics(c)}
	s.lasting, s.end = context.WithCancelCause(context.Background())
	s.grpc = grpc.NewServer(grpc.UnaryInterceptor(s.intercept), grpc.MaxRecvMsgSize(maxMessage))
	csi.RegisterIdentityServer(s.grpc, &identity{Server: s})
	if c.Controller {
		csi.RegisterControllerServer(s.grpc, &controller{Server: s})
	}
	if c.Node {
		csi.RegisterNodeServer(s.grpc, &node{Server: s})
	}
	return s
}

// maxMessage bounds what one call can make the server hold.
const maxMessage = 1 << 20

// Listen makes the unix socket of an endpoint, unix:///path or a path. A socket that nobody serves any more is replaced.
func Listen(endpoint string) (net.Listener, error) {
	path := strings.TrimPrefix(endpoint, "unix://")
	if path == "" || strings.Contains(path, "://") {
		return nil, fmt.Errorf("endpoint %q is no unix socket; write unix:///run/cradle/csi.sock", endpoint)
	}
	if c, err := net.DialTimeout("unix", path, time.Second); err == nil {
		c.Close()
		return nil, fmt.Errorf("endpoint %s: another program serves it; stop that first, or name another socket", path)
	}
	if fi, err := os.Lstat(path); err == nil && fi.Mode().Type() == os.ModeSocket {
		if err := os.Remove(path); err != nil {
			return nil, fmt.Errorf("endpoint %s: %w", path, err)
		}
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil { // /run/cradle, which is empty after a boot
		return nil, fmt.Errorf("endpoint %s: %w", path, err)
	}
	l, err := net.Listen("unix", path)
	if err != nil {
		return nil, fmt.Errorf("endpoint %s: %w", path, err)
	}
	if err := os.Chmod(path, 0o600); err != nil {
		return nil, errors.Join(fmt.Errorf("endpoint %s: %w", path, err), l.Close())
	}
	return l, nil
}

// Serve answers calls until ctx ends, then those that had begun. What is mounted stays so.
func (s *Server) Serve(ctx context.Context, l net.Listener) error {
	stop := context.AfterFunc(ctx, s.grpc.GracefulStop)
	defer stop()
	defer s.work.Wait()
	defer s.end(errEnds)
	return s.grpc.Serve(l)
}

// complete has do come to its end, or to the server's, also where the call's time is up: a copy may take longer than Nomad waits for an answer (two minutes,
// client/csi_endpoint.go, CSIPluginRequestTimeout), and would never be there if each call began anew. Who asks again waits for unlock.
func (s *Server) complete(ctx context.Context, what string, unlock func(), do func(context.Context) error) error {
	done := make(chan error, 1)
	s.work.Go(func() {
		defer unlock()
		err := do(s.lasting)
		if ctx.Err() != nil {
			s.config.Log.Info("it has come to its end after its call's time was up", "what", what, "error", err)
		}
		done <- err
	})
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return fmt.Errorf("%s: it goes on; ask again: %w", what, context.Cause(ctx))
	}
}

// intercept logs every call and translates its error.
func (s *Server) intercept(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (resp any, err error) {
	began := time.Now()
	resp, err = handler(ctx, req)
	err = translate(err)
	method := info.FullMethod[strings.LastIndexByte(info.FullMethod, '/')+1:]
	took := time.Since(began)
	s.metrics.count(method, status.Code(err), took)
	args := []any{"method", method, "took", took.Round(time.Microsecond)}
	// Of a request only its subject is logged: secrets, and options that hold some, are in the rest.
	switch r := req.(type) {
	case interface{ GetVolumeId() string }:
		args = append(args, "volume", subject(r.GetVolumeId()))
	case interface{ GetSnapshotId() string }:
		args = append(args, "snapshot", subject(r.GetSnapshotId()))
	case interface{ GetName() string }:
		args = append(args, "name", subject(r.GetName()))
	}
	switch {
	case err == nil && quiet[method]:
		s.config.Log.Debug("call", args...)
	case err == nil:
		s.config.Log.Info("call", args...)
	default:
		s.config.Log.Warn("call failed", append(args, "code", status.Code(err).String(), "error", status.Convert(err).Message())...)
	}
	return resp, err
}

// subject is a caller's name for something, as far as one can be long.
func subject(s string) string { return s[:min(len(s), 2*volume.MaxName+1)] }

// quiet are calls that change nothing and come all the time.
var quiet = map[string]bool{
	"Probe": true, "GetPluginInfo": true, "GetPluginCapabilities": true, "ControllerGetCapabilities": true, "NodeGetCapabilities": true,
	"NodeGetInfo": true, "NodeGetVolumeStats": true, "ListVolumes": true, "ListSnapshots": true, "GetCapacity": true, "ControllerGetVolume": true,
}

// invalid is an InvalidArgument.
func invalid(format string, args ...any) error {
	return status.Errorf(codes.InvalidArgument, format, args...)
}

// failed is a FailedPrecondition.
func failed(format string, args ...any) error {
	return status.Errorf(codes.FailedPrecondition, format, args...)
}
