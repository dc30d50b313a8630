package main

import (
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/cradlestack/cradlestack/csi-plugin/dir"
	"github.com/cradlestack/cradlestack/csi-plugin/filer/api"
	"github.com/cradlestack/cradlestack/csi-plugin/filer/lease"
	"github.com/cradlestack/cradlestack/csi-plugin/filer/nfs"
	"github.com/cradlestack/cradlestack/csi-plugin/volume"
	"github.com/cradlestack/cradlestack/csi-plugin/zfs"
	"github.com/cradlestack/cradlestack/internal/durable"
)

// A server is the command's flags.
type server struct {
	*cli
	backend string
	pools   []string
	listen  string
	address string
	state   string
	engine  string
	trust   bool
	users   usersAPI
	set     setFlags
	verbose bool

	collected string // the address of metrics
	metrics   *metrics
	gateways
}

func (c *cli) serveCommand() *cobra.Command {
	s := &server{cli: c, metrics: newMetrics()}
	cmd := &cobra.Command{
		Use: "serve", Short: "serve the file volumes of this host", Args: cobra.NoArgs,
		Long: `Serve the file volumes that cradle-csi keeps on this host, as far as they are published (NFS) or granted (WebDAV, S3). It can be killed and started again at any time: clients
wait meanwhile, and go on with the files that they have open.`,
		RunE: func(cmd *cobra.Command, _ []string) error { return s.run(cmd.Context()) },
	}
	f := cmd.Flags()
	f.StringVar(&s.backend, "backend", onDirectories, "what keeps the volumes, as cradle-csi has it: "+onDirectories+", "+onZFS)
	f.StringArrayVar(&s.pools, "pool", nil, "the directory or dataset that the volumes are in, or NAME=DIRECTORY, as cradle-csi has it; more than once (default of --backend "+onDirectories+": "+usualPool+")")
	f.StringVar(&s.listen, "listen", ":2049", "address to serve NFS on")
	f.StringVar(&s.address, "address", "", "HOST or HOST:PORT that clients reach it by (default: that of --listen, or this host's)")
	f.StringVar(&s.state, "state", "", "directory (default "+usualState+", of a set: in the first pool) for grants, WebDAV's locks, the audit log, and the key of file handles: with another key, clients lose the files that they have open")
	f.StringVar(&s.engine, "engine", embedded, "what serves NFS: "+embedded+", or "+byGanesha+" (the packages nfs-ganesha and nfs-ganesha-vfs), with NFS 4.1 and locks between clients")
	f.BoolVar(&s.trust, "trust-clients", false, "with --engine "+byGanesha+": have it talk to clients itself, over version 3 as well where there is a portmapper; those that make up file handles reach all files of a file system then")
	s.gateways.flags(f)
	s.users.flags(f)
	s.set.flags(f)
	f.StringVar(&s.collected, "metrics", "", "address to serve Prometheus metrics on, at /metrics, to whoever reaches it: 10.0.0.1:9810, or :9810 for 127.0.0.1 alone")
	f.BoolVar(&s.verbose, "verbose", false, "log more")
	return cmd
}

func (s *server) run(ctx context.Context) error {
	if os.Geteuid() != 0 {
		return errors.New("this needs root: files are opened by handle, and for their users")
	}
	switch {
	case s.engine != embedded && s.engine != byGanesha:
		return fmt.Errorf("--engine %s: it is %s or %s", s.engine, embedded, byGanesha)
	case s.backend != onDirectories && s.backend != onZFS:
		return fmt.Errorf("--backend %s: it is %s or %s", s.backend, onDirectories, onZFS)
	case s.trust && s.engine == embedded:
		return errors.New("--trust-clients is for --engine " + byGanesha + ": the other trusts none")
	}
	unix.Umask(0) // modes are what clients say
	level := slog.LevelInfo
	if s.verbose {
		level = slog.LevelDebug
	}
	log := slog.New(slog.NewTextHandler(s.stderr, &slog.HandlerOptions{Level: level}))
	control, err := listenControl(s.socket)
	if err != nil {
		return err
	}
	defer control.Close()
	collected, err := s.metrics.listen(s.collected, log)
	if err != nil {
		return err
	}
	if collected != nil {
		defer collected.Close()
	}
	if s.set.name != "" {
		return s.runSet(ctx, control, collected, log)
	}
	if s.backend == onZFS {
		datasets, err := s.datasets()
		if err == nil {
			s.metrics.zpools, err = zfs.Zpools(datasets)
		}
		if err != nil {
			return err
		}
	}
	b, err := s.open(ctx)
	if err != nil {
		return err
	}
	defer b.Close()
	always := lease.New()
	always.Extend(lease.Forever)
	state := cmp.Or(s.state, usualState)
	t, err := s.begin(ctx, place{backend: b, state: state, kept: filepath.Dir(s.socket)}, always, nil, log)
	if err != nil {
		return err
	}
	s.metrics.serves(t)
	t.group.Go(func() error { return serveHTTP(t.long, control, t.handler()) })
	if collected != nil {
		t.group.Go(func() error { return serveHTTP(t.long, collected, s.metrics.handler()) })
	}
	<-t.long.Done()
	return errors.Join(t.end(context.Cause(t.long)), t.saveReplies())
}

// The engines.
const embedded, byGanesha = "embedded", "ganesha"

const usualState = "/var/lib/cradle/filer"

// saveReplies lets the next process know what was answered: a client that did not hear it asks again.
func (t *term) saveReplies() error {
	if t.nfs == nil {
		return nil
	}
	var b bytes.Buffer
	if err := t.nfs.Save(&b); err != nil {
		return err
	}
	return durable.WriteFile(filepath.Join(t.kept, repliesFile), b.Bytes())
}

func (t *term) loadReplies() error {
	if t.nfs == nil {
		return nil
	}
	path := filepath.Join(t.kept, repliesFile)
	data, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err == nil {
		err = os.Remove(path) // after the next end, what is in it is old
	}
	if err == nil {
		err = t.nfs.Load(bytes.NewReader(data))
	}
	return err
}

const repliesFile = "replies"

// The backends.
const onDirectories, onZFS = "dir", "zfs"

const usualPool = "/var/lib/cradle/volumes"

// A keeper is a backend that holds something open.
type keeper interface {
	volume.Backend
	io.Closer
}

func (s *server) open(ctx context.Context) (keeper, error) {
	if err := volume.CheckPools(s.pools); err != nil {
		return nil, err
	}
	if s.backend == onZFS {
		datasets, err := s.datasets()
		if err != nil {
			return nil, err
		}
		return zfs.Open(ctx, datasets, zfs.Locks)
	}
	pools, err := s.directories()
	if err != nil {
		return nil, err
	}
	return dir.Open(pools)
}

func (s *server) datasets() (pools []zfs.Pool, err error) {
	if len(s.pools) == 0 {
		return nil, errors.New("--pool: name the dataset that volumes are kept below, such as tank/cradle")
	}
	return zfs.ParsePools(s.pools)
}

func (s *server) directories() (pools []dir.Pool, err error) {
	all := s.pools
	if len(all) == 0 {
		all = []string{usualPool}
	}
	for _, p := range all {
		name, path, err := volume.SplitPool(p)
		if err == nil {
			path, err = filepath.Abs(path)
		}
		if err != nil {
			return nil, err
		}
		pools = append(pools, dir.Pool{Name: name, Path: path})
	}
	return pools, nil
}

const handlesKey = "handles.key"

// readKey reads the key of file handles, or makes one.
func readKey(state string) (key [nfs.KeySize]byte, err error) {
	if err := os.MkdirAll(state, 0o700); err != nil {
		return key, err
	}
	path := filepath.Join(state, handlesKey)
	data, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		data = make([]byte, nfs.KeySize)
		rand.Read(data)
		err = durable.WriteFile(path, data)
	}
	if err == nil && len(data) != nfs.KeySize {
		err = fmt.Errorf("%s: it has %d bytes, a key has %d; restore it, or remove it and have clients mount again", path, len(data), nfs.KeySize)
	}
	copy(key[:], data)
	return key, err
}

// listenControl makes the socket. One that nobody serves any more is replaced.
func listenControl(path string) (net.Listener, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, err
	}
	if c, err := net.DialTimeout("unix", path, time.Second); err == nil {
		c.Close()
		return nil, fmt.Errorf("socket %s: another filer serves it; stop that first, or name another socket", path)
	}
	if fi, err := os.Lstat(path); err == nil && fi.Mode().Type() == fs.ModeSocket {
		if err := os.Remove(path); err != nil {
			return nil, err
		}
	}
	l, err := net.Listen("unix", path)
	if err != nil {
		return nil, err
	}
	if err := os.Chmod(path, 0o600); err != nil {
		return nil, errors.Join(err, l.Close())
	}
	return l, nil
}

// resolve reads an address to listen on.
func resolve(listen string) (netip.AddrPort, error) {
	a, err := net.ResolveTCPAddr("tcp", listen)
	if err != nil {
		return netip.AddrPort{}, fmt.Errorf("--listen: %w", err)
	}
	at := a.AddrPort()
	if !at.Addr().IsValid() { // :PORT
		at = netip.AddrPortFrom(netip.IPv6Unspecified(), at.Port())
	}
	return netip.AddrPortFrom(at.Addr().Unmap(), at.Port()), nil
}

// reachable is the address that clients are told.
func reachable(asked string, listens netip.AddrPort) (string, error) {
	port := fmt.Sprint(listens.Port())
	switch {
	case asked != "":
		if _, _, err := net.SplitHostPort(asked); err == nil {
			return asked, nil
		}
		return net.JoinHostPort(asked, port), nil
	case !listens.Addr().IsUnspecified():
		return listens.String(), nil
	}
	// By the default route, if there is one: nothing is sent.
	if c, err := net.Dial("udp4", "203.0.113.1:9"); err == nil {
		defer c.Close()
		if local, isUDP := c.LocalAddr().(*net.UDPAddr); isUDP && local.IP.IsGlobalUnicast() {
			return net.JoinHostPort(local.IP.String(), port), nil
		}
	}
	all, err := net.Interfaces()
	if err != nil {
		return "", err
	}
	ip, err := firstAddress(all, (*net.Interface).Addrs)
	if err != nil {
		return "", err
	}
	return net.JoinHostPort(ip.String(), port), nil
}

// firstAddress is the first IPv4 address of a host. One that a loopback interface has may be there for a service that moves, or belong to a program: it is taken where
// there is no other.
func firstAddress(all []net.Interface, addresses func(*net.Interface) ([]net.Addr, error)) (net.IP, error) {
	for _, loopback := range []net.Flags{0, net.FlagLoopback} {
		for _, i := range all {
			if i.Flags&net.FlagLoopback != loopback {
				continue
			}
			of, err := addresses(&i)
			if err != nil { // it has gone since
				continue
			}
			for _, a := range of {
				if n, isNet := a.(*net.IPNet); isNet && n.IP.To4() != nil && n.IP.IsGlobalUnicast() {
					return n.IP, nil
				}
			}
		}
	}
	return nil, errors.New("this host has no address that pods could reach; say one with --address")
}

// serveHTTP answers until ctx ends.
func serveHTTP(ctx context.Context, l net.Listener, h http.Handler) error {
	s := &http.Server{Handler: h, ReadHeaderTimeout: 10 * time.Second}
	stop := context.AfterFunc(ctx, func() { s.Close() })
	defer stop()
	if err := s.Serve(l); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

// maxRequest bounds what is read of a request.
const maxRequest = 1 << 20

// read reads what a request has sent.
func read(r *http.Request, what string, into any) error {
	if err := json.NewDecoder(io.LimitReader(r.Body, maxRequest)).Decode(into); err != nil {
		return volume.Invalid(what, "%v", err)
	}
	return nil
}

func (f *filer) handler() http.Handler {
	mux := http.NewServeMux()
	handle := handleJSON(mux, f.log)
	handle("PUT /publications/{id}", func(r *http.Request) (any, error) {
		var p api.Publication
		if err := read(r, "publication", &p); err != nil {
			return nil, err
		}
		p.ID = r.PathValue("id")
		return f.publish(r.Context(), p)
	})
	handle("DELETE /publications/{id}", func(r *http.Request) (any, error) {
		return struct{}{}, f.unpublish(r.Context(), r.PathValue("id"))
	})
	handle("GET /publications", func(*http.Request) (any, error) { return f.publications() })
	handle("PUT /grants/{id}", func(r *http.Request) (any, error) {
		var g api.Grant
		if err := read(r, "grant", &g); err != nil {
			return nil, err
		}
		g.ID, g.Tenant = r.PathValue("id"), nil
		return f.grant(r.Context(), g)
	})
	handle("DELETE /grants/{id}", func(r *http.Request) (any, error) {
		return struct{}{}, f.revoke(r.Context(), r.PathValue("id"))
	})
	handle("GET /grants", func(*http.Request) (any, error) { return f.grants() })
	handle("GET /volumes/{id}/stats", func(r *http.Request) (any, error) { return f.stats(r.PathValue("id")) })
	handle("POST /volumes/{id}/grow", func(r *http.Request) (any, error) {
		return struct{}{}, f.grow(r.Context(), r.PathValue("id"))
	})
	handle("GET /status", func(*http.Request) (any, error) { return f.status() })
	handle("POST /switch", func(*http.Request) (any, error) { // a set's member answers that itself
		return nil, volume.Invalid("switch", "this filer is alone, and no other one can take over; those of a set (serve --set) can")
	})
	f.handleVolumes(mux)
	f.handleSnapshots(mux, func(r *http.Request, id string, _ bool) (caller, error) { return caller{who: "root", volume: id}, nil })
	return mux
}

// handleJSON adds to what is answered, in JSON.
func handleJSON(mux *http.ServeMux, log *slog.Logger) func(pattern string, answer func(r *http.Request) (any, error)) {
	return func(pattern string, answer func(r *http.Request) (any, error)) {
		mux.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) {
			out, err := answer(r)
			if err != nil {
				log.Warn("request", "method", r.Method, "path", r.URL.Path, "error", err)
			}
			answerJSON(w, out, err)
		})
	}
}

func answerJSON(w http.ResponseWriter, out any, err error) {
	code := http.StatusOK
	if err != nil {
		out, code = api.Explain(err)
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	_ = json.NewEncoder(w).Encode(out) // the caller has gone
}
