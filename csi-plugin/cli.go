package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"golang.org/x/sync/errgroup"

	"github.com/cradlestack/cradlestack/csi-plugin/ceph"
	"github.com/cradlestack/cradlestack/csi-plugin/cold"
	"github.com/cradlestack/cradlestack/csi-plugin/dir"
	"github.com/cradlestack/cradlestack/csi-plugin/filer/api"
	"github.com/cradlestack/cradlestack/csi-plugin/filer/volumes"
	"github.com/cradlestack/cradlestack/csi-plugin/rpc"
	"github.com/cradlestack/cradlestack/csi-plugin/volume"
	"github.com/cradlestack/cradlestack/csi-plugin/zfs"
	"github.com/cradlestack/cradlestack/internal/command"
	"github.com/cradlestack/cradlestack/spec"
)

// version is set by the linker.
var version = "development"

// A cli is one invocation.
type cli struct {
	stdout, stderr io.Writer

	backend   string
	pools     []string
	endpoint  string
	nomad     string
	nodeID    string
	zone      string
	metrics   string
	filer     filerFlags
	networks  []string
	verbose   bool
	cold      coldFlags
	snapshots string
	ceph      cephFlags

	local bool // what open has said of the backend
}

// filerFlags say which filer serves file volumes to guests.
type filerFlags struct{ where, key string }

// cephFlags say which cluster, and as whom.
type cephFlags struct{ conf, id, keyring string }

// run executes a command line and returns the exit code.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	c := &cli{stdout: stdout, stderr: stderr}
	return command.Run(ctx, c.command(), args, stdout, stderr)
}

func (c *cli) command() *cobra.Command {
	root := command.Root("cradle-csi", "keep volumes for Nomad jobs: a CSI plugin", version)
	root.AddCommand(
		c.serveCommand("controller", "serve the Controller service: make, delete, snapshot, grow volumes", true, false),
		c.serveCommand("node", "serve the Node service: attach volumes on this host", false, true),
		c.serveCommand("monolith", "serve both", true, true),
		c.hostVolumeCommand(),
		c.doctorCommand(),
		c.coldCommand(),
		c.lv2Command(),
		c.copyCommand(),
	)
	return root
}

func (c *cli) serveCommand(name, short string, controller, node bool) *cobra.Command {
	cmd := &cobra.Command{
		Use: name, Short: short, Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return c.serve(cmd.Context(), controller, node) },
	}
	f := cmd.Flags()
	c.backendFlags(f)
	f.StringVar(&c.endpoint, "endpoint", defaultEndpoint(), "unix socket to serve on ($CSI_ENDPOINT, which Nomad sets)")
	f.StringVar(&c.nodeID, "node-id", hostname(), "this host's name in the topology: its volumes stay on the host of that name (default: the host's name)")
	f.Lookup("node-id").DefValue = "" // what the help says is the same on each host
	f.StringVar(&c.zone, "zone", "", "zone that this host is in")
	f.StringVar(&c.nomad, "nomad", command.TaskAPI(), "address of Nomad's API, which knows what was restored on another host; its token is in NOMAD_TOKEN (default: the task API, where the task has an identity)")
	f.StringVar(&c.metrics, "metrics", "", "address to serve Prometheus metrics on, at /metrics, to whoever reaches it: 10.0.0.1:9809, or :9809 for 127.0.0.1 alone")
	c.filer.add(f, "")
	f.StringArrayVar(&c.networks, "filer-network", nil, "network (10.1.0.0/16) that pods of this host have, for the filer to know them; its addresses and bridges are known; more than once")
	f.BoolVar(&c.verbose, "verbose", false, "log calls that change nothing as well")
	if controller {
		f.StringVar(&c.snapshots, "snapshots", "", "automatic snapshots of file volumes that are made without the parameter snapshots, or none (default: "+usualSnapshots+" with --backend zfs, where they cost nothing, or a filer that has it; none with others)")
		c.cold.add(f)
	}
	return cmd
}

func (o *filerFlags) add(f *pflag.FlagSet, usual string) {
	f.StringVar(&o.where, "filer", usual, "socket of the cradle-filer that serves file volumes to guests: "+api.Socket+"; or HOST:PORT of any filer of a set, which takes --filer-key: files.service.consul:"+api.PeersPort)
	f.StringVar(&o.key, "filer-key", "", "file with the key of the set that --filer is of: handles.key of its state directory, which is in the pool")
}

// client returns the filer's, nil where there is none. shared says that it is one of a set.
func (o *filerFlags) client() (filer *api.Client, shared bool, err error) {
	switch shared = o.where != "" && !strings.Contains(o.where, "/"); {
	case shared && o.key == "":
		return nil, shared, fmt.Errorf("--filer %s: it answers those who have the key of its set; name its file with --filer-key", o.where)
	case shared:
		return &api.Client{Address: o.where, KeyFile: o.key}, shared, nil
	case o.where != "":
		return &api.Client{Socket: o.where}, shared, nil
	}
	return nil, shared, nil
}

func (c *cli) backendFlags(f *pflag.FlagSet) {
	f.StringVar(&c.backend, "backend", "dir", "what keeps the volumes: dir, zfs, ceph, filer (that of --filer, or of a set, which has the storage: this host needs none)")
	f.StringArrayVar(&c.pools, "pool", nil, "where: a directory (dir, default /var/lib/cradle/volumes), a dataset (zfs), or a file system, or FILESYSTEM/GROUP (ceph); NAME=WHERE to be chosen by the parameter pool; more than once, the first is the default")
	f.StringVar(&c.ceph.conf, "ceph-conf", "/etc/ceph/ceph.conf", "of --backend ceph: the cluster's configuration")
	f.StringVar(&c.ceph.id, "ceph-id", "cradle", "of --backend ceph: the client whose key this plugin has, without client.")
	f.StringVar(&c.ceph.keyring, "ceph-keyring", "", "of --backend ceph: the file that has the key (default: what the configuration names)")
}

func defaultEndpoint() string { return env("CSI_ENDPOINT", "unix:///run/cradle/csi.sock") }

func env(name, fallback string) string {
	if v := os.Getenv(name); v != "" {
		return v
	}
	return fallback
}

func hostname() string {
	name, err := os.Hostname()
	if err != nil {
		return "" // which serve refuses
	}
	return name
}

// onFiler is the backend that has a filer keep the volumes.
const onFiler = "filer"

// A keeper is a backend that holds something open.
type keeper interface {
	volume.Backend
	io.Closer
}

// open opens the backend. local says whether a volume is on this host alone.
func (c *cli) open(ctx context.Context) (b keeper, local bool, err error) {
	pools := c.pools
	if err := volume.CheckPools(pools); err != nil {
		return nil, false, err
	}
	switch c.backend {
	case "dir":
		all, err := c.directories()
		if err != nil {
			return nil, false, err
		}
		b, err := dir.Open(all)
		return b, true, err
	case "zfs":
		all, err := zfs.ParsePools(pools)
		if err != nil {
			return nil, false, err
		}
		b, err := zfs.Open(ctx, all, zfs.Locks)
		return b, true, err
	case "ceph":
		var all []ceph.Pool
		for _, p := range pools {
			name, where, err := volume.SplitPool(p)
			if err != nil {
				return nil, false, err
			}
			pool, err := ceph.ParsePool(name, where)
			if err != nil {
				return nil, false, err
			}
			all = append(all, pool)
		}
		b, err := ceph.Open(all, ceph.Config{Conf: c.ceph.conf, ID: c.ceph.id, Keyring: c.ceph.keyring, Host: hostname()})
		return b, false, err
	case onFiler:
		f, shared, err := c.filer.client()
		switch {
		case err != nil:
			return nil, false, err
		case f == nil:
			return nil, false, errors.New("--backend filer: name the filer that has the volumes with --filer; what has no such flag is for volumes that are on this host")
		case len(pools) > 0:
			return nil, false, fmt.Errorf("--pool %s: with --backend filer the pools are those of the filer; leave it out", pools[0])
		}
		return volumes.Open(*f), !shared, nil
	default:
		return nil, false, fmt.Errorf("--backend %s: there is none of that name; dir, zfs, ceph and filer are known", c.backend)
	}
}

// directories are the pools of the backend dir.
func (c *cli) directories() (all []dir.Pool, err error) {
	pools := c.pools
	if len(pools) == 0 {
		pools = []string{"/var/lib/cradle/volumes"}
	}
	for _, p := range pools {
		name, path, err := volume.SplitPool(p)
		if err == nil {
			path, err = filepath.Abs(path)
		}
		if err != nil {
			return nil, err
		}
		all = append(all, dir.Pool{Name: name, Path: path})
	}
	return all, nil
}

// existing refuses a pool that is not there, for a command that only looks: open would make it, and nothing would be found in it.
func (c *cli) existing() error {
	if c.backend != "dir" {
		return nil
	}
	all, err := c.directories()
	for _, p := range all {
		if _, serr := os.Stat(p.Path); err == nil && serr != nil {
			err = fmt.Errorf("pool %s: %w; write the plugin's own --backend and --pool", p.Name, serr)
		}
	}
	return err
}

// maxSegment is the length of a topology's value (CSI spec, Topology).
const maxSegment = 63

// segment checks a name that becomes a topology's value.
func segment(flag, value string) error {
	if !volume.ValidName(value) || len(value) > maxSegment {
		return fmt.Errorf("--%s %q: letters, digits, _ . and -, a letter or digit first, at most %d", flag, value, maxSegment)
	}
	return nil
}

func (c *cli) serve(ctx context.Context, controller, node bool) error {
	if err := segment("node-id", c.nodeID); err != nil {
		return err
	}
	if c.zone != "" {
		if err := segment("zone", c.zone); err != nil {
			return err
		}
	}
	filer, shared, err := c.filer.client()
	if err != nil {
		return err
	}
	var networks []netip.Prefix
	for _, text := range c.networks {
		p, err := netip.ParsePrefix(text)
		if err != nil {
			return fmt.Errorf("--filer-network %s: it is no network such as 10.1.0.0/16", text)
		}
		networks = append(networks, p.Masked())
	}
	vault, err := c.cold.open()
	if err != nil {
		return err
	}
	b, local, err := c.open(ctx)
	if err != nil {
		return err
	}
	source, ok := b.(cold.Source)
	if vault != nil && !ok {
		return errors.Join(fmt.Errorf("--cold: backend %s makes no copies; leave it out", c.backend), b.Close())
	}
	owner, err := owners(c.nomad)
	if err != nil {
		return errors.Join(err, b.Close())
	}
	l, err := rpc.Listen(c.endpoint)
	if err != nil {
		return errors.Join(err, b.Close())
	}
	level := slog.LevelInfo
	if c.verbose {
		level = slog.LevelDebug
	}
	log := slog.New(slog.NewTextHandler(c.stderr, &slog.HandlerOptions{Level: level}))
	log.Info("serving", "endpoint", c.endpoint, "backend", c.backend, "node", c.nodeID, "version", version)
	if vault != nil && owner == nil {
		log.Warn("there is no Nomad to ask which volumes were restored on another host: nothing keeps them from being used here as well (--nomad)")
	}
	if r, ok := b.(volume.Repairer); ok {
		if err := r.Repair(ctx, false, func(found string) { log.Warn("repaired", "found", found) }); err != nil {
			log.Warn("repair", "error", err)
		}
	}
	var taken chan struct{}
	if vault != nil {
		taken = make(chan struct{}, 1)
	}
	registry := prometheus.NewRegistry()
	kept, err := c.usual(b)
	if err != nil {
		return errors.Join(fmt.Errorf("--snapshots: %w", err), l.Close(), b.Close())
	}
	s := rpc.New(rpc.Config{
		Backend: b, Controller: controller, Node: node, NodeID: c.nodeID, Zone: c.zone, Local: local && !shared, Shared: shared && c.backend != onFiler, Cold: taken, Owner: owner, Snapshots: kept,
		Version: version, Filer: filer, Networks: networks, DirectDir: spec.DirectDir, Log: log, Metrics: registry,
	})
	g, ctx := errgroup.WithContext(ctx)
	if c.metrics != "" {
		m, err := command.ListenMetrics(c.metrics)
		if err != nil {
			return errors.Join(err, l.Close(), b.Close())
		}
		g.Go(func() error { return serveMetrics(ctx, m, registry) })
	}
	g.Go(func() error { return s.Serve(ctx, l) })
	if controller {
		g.Go(func() error { return s.Schedule(ctx) })
	}
	if vault != nil {
		g.Go(func() error { return cold.NewKeeper(source, vault, log, registry).Run(ctx, taken) })
	}
	return errors.Join(g.Wait(), b.Close())
}

// storage is the name of the backend that has the volumes, be it a filer's.
func (c *cli) storage(ctx context.Context, b volume.Backend) (string, error) {
	f, ok := b.(*volumes.Backend)
	if !ok {
		return c.backend, nil
	}
	far, err := f.Far(ctx)
	return far.Name, err
}

// suit leaves out of a request what another backend's volume was made with, and the one of a name does not have: such a volume is not one that somebody asks for here.
func suit(storage string, r *volume.Request) {
	if storage != "zfs" {
		r.Compression = ""
	}
	if storage != "zfs" || !r.Block() {
		r.BlockSize = 0
	}
	if !r.Block() && (storage != "dir" || r.Size == 0) {
		r.FS = ""
	}
}

// usualSnapshots are those of file volumes whose parameters do not say.
const usualSnapshots = "hourly=24,daily=7,weekly=4,monthly=6"

// usual is the schedule of file volumes whose parameters do not say. Without a flag they have one where a snapshot is made at once and shares what does not change.
func (c *cli) usual(b volume.Backend) (func(context.Context) (volume.Retention, error), error) {
	if c.snapshots != "" {
		r, err := volume.ParseRetention(c.snapshots)
		return func(context.Context) (volume.Retention, error) { return r, nil }, err
	}
	return func(ctx context.Context) (volume.Retention, error) {
		name, err := c.storage(ctx, b)
		if err != nil {
			return volume.Retention{}, err
		}
		if name == "zfs" {
			return volume.ParseRetention(usualSnapshots)
		}
		return volume.Retention{}, nil
	}, nil
}

// serveMetrics answers Prometheus until ctx ends.
func serveMetrics(ctx context.Context, l net.Listener, registry *prometheus.Registry) error {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(registry, promhttp.HandlerOpts{}))
	server := &http.Server{Handler: mux, ReadHeaderTimeout: 10 * time.Second}
	stop := context.AfterFunc(ctx, func() { server.Close() })
	defer stop()
	if err := server.Serve(l); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}
