package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/cradlestack/cradlestack/bali/cache"
	"github.com/cradlestack/cradlestack/bali/fetch"
	"github.com/cradlestack/cradlestack/bali/launch"
	"github.com/cradlestack/cradlestack/bali/seal"
)

// running are the flags of bali run.
type running struct {
	reading
	identities, env, volumes, entrypoint []string
	insecure, setid, devices             bool
	user, workdir, size, cache           string
	oom                                  int
	hasOOM                               bool
}

func (c *cli) run() *cobra.Command {
	var r running
	cmd := &cobra.Command{
		Use:   "run FILE|URL [-- CMD…]",
		Short: "verify an image and become its service",
		Long: `Fetch and verify an image, and become its service: this process, with its id,
cgroup, limits, environment, open files and signals, in a file system of its
own. Nothing of the image runs, and nothing outside a private mount is written,
before the signature over every byte is found good.

CMD replaces the image's default arguments. Variables of the environment hold
unless the image sets them, and -e wins over both. Folders that systemd or Nomad
made for the service are there at the same path.

Exit status: the service's own; 125 if bali refused or failed, 126 if the
command could not be started, 127 if it is not in the image.`,
		Args: func(cmd *cobra.Command, args []string) error {
			switch n := cmd.ArgsLenAtDash(); {
			case len(args) == 0 || n == 0:
				return &refusal{errors.New("run needs an image: bali run FILE|URL")}
			case n < 0 && len(args) > 1 || n > 1:
				return &refusal{fmt.Errorf("unexpected %q: the command comes after --", args[1])}
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			r.hasOOM = cmd.Flags().Changed("oom-score-adj")
			if err := c.runImage(cmd.Context(), &r, args[0], args[1:]); err != nil {
				return &refusal{fmt.Errorf("run %s: %w", fetch.Redacted(args[0]), err)}
			}
			return nil
		},
	}
	// its 1 would pass for the service's
	cmd.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return &refusal{err} })
	f := cmd.Flags()
	f.StringArrayVarP(&r.identities, "identity", "i", nil, "accept this identity and no other")
	f.BoolVar(&r.insecure, "insecure", false, "run an image that nobody, or anybody, signed")
	f.StringArrayVarP(&r.env, "env", "e", nil, "`NAME[=VALUE]` to set; without a value the caller's wins over the image's")
	f.StringArrayVarP(&r.volumes, "volume", "v", nil, "`HOST:PATH[:ro|rslave|rprivate]` to share with the host")
	f.StringArrayVar(&r.entrypoint, "entrypoint", nil, "`WORD` of the entrypoint instead of the image's; repeat for more")
	f.StringVar(&r.user, "user", "", "`NAME[:GROUP]` or numbers, instead of the image's")
	f.StringVar(&r.workdir, "workdir", "", "working `DIR` instead of the image's")
	f.StringVar(&r.cache, "cache", "", "keep the unpacked image in `DIR`, and start from there when the source is away")
	f.StringVar(&r.size, "size", "", "`SIZE` of the writable root, like 2G or 80% (default half the memory)")
	f.BoolVar(&r.setid, "setid", false, "let setuid programs and file capabilities of the image work")
	f.BoolVar(&r.devices, "devices", false, "let device nodes of the image work")
	f.IntVar(&r.oom, "oom-score-adj", 0, "the service's OOM score `ADJ`ustment (default the caller's; 0 below Nomad, which lowers it)")
	r.flags(cmd)
	return cmd
}

func (c *cli) runImage(ctx context.Context, r *running, where string, command []string) error {
	p, err := c.policy(r.identities, r.insecure)
	if err != nil {
		return err
	}
	if err := checkEnv(r.env); err != nil {
		return err
	}
	cfg := launch.Config{User: r.user, Workdir: r.workdir}
	for _, v := range r.volumes {
		volume, err := launch.ParseVolume(v)
		if err != nil {
			return err
		}
		cfg.Volumes = append(cfg.Volumes, volume)
	}
	root, err := launch.NewRoot(r.size, r.setid, r.devices)
	if err != nil {
		return err
	}
	var image *seal.Image
	if r.cache == "" {
		image, err = c.unpackRoot(ctx, r, where, p, root)
	} else {
		image, err = c.cachedRoot(ctx, r, where, p, root)
	}
	if err != nil {
		return err
	}
	if err := rightPlatform(image); err != nil {
		return err
	}
	r.configure(&cfg, image, os.Environ(), command)
	return root.Exec(ctx, cfg)
}

// unpackRoot reads the image once: it is hashed while it is unpacked into a
// mount that nobody sees.
func (c *cli) unpackRoot(ctx context.Context, r *running, where string, p *policy, root *launch.Root) (*seal.Image, error) {
	src, err := c.open(ctx, where, &r.reading)
	if err != nil {
		return nil, err
	}
	defer src.Close()
	l := r.limits()
	l.Unsigned = r.insecure
	reader, err := seal.NewReader(src, l)
	if err != nil {
		return nil, err
	}
	defer reader.Close()
	if err := rightPlatform(reader.Image()); err != nil {
		return nil, err
	}
	u := seal.Unpack{Owners: true, Setid: r.setid, Devices: r.devices}
	s, err := u.Into(ctx, reader, root.Dir())
	if err := p.accept(s, err); err != nil {
		return nil, err
	}
	return reader.Image(), nil
}

// cachedRoot starts from the unpacked copy of the image that the source has
// now, which is made if it is missing; if the source can't be asked, from the
// copy it had last.
func (c *cli) cachedRoot(ctx context.Context, r *running, where string, p *policy, root *launch.Root) (*seal.Image, error) {
	if r.insecure {
		return nil, errors.New("--cache and --insecure: only signed images can be cached")
	}
	store, err := cache.Open(r.cache)
	if err != nil {
		return nil, err
	}
	r.fetch.Log = c.log
	src, err := fetch.New(where, r.fetch)
	if err != nil {
		return nil, err
	}
	name, err := absolute(where)
	if err != nil {
		return nil, err
	}
	entry, err := c.cacheEntry(ctx, r, store, name, src, p)
	if err != nil {
		return nil, err
	}
	s, dir, err := entry.Verify(ctx)
	if err == nil {
		err = p.accept(s, nil)
	}
	if err != nil {
		return nil, fmt.Errorf("cache %s: %w", entry.Path, err)
	}
	root.Lower, root.LowerDir = entry.Tree(), dir
	return cache.Image(dir)
}

// askWithin is how long a source may think about what it has. A service doesn't
// wait for a server that is gone when it can start without.
const askWithin = 10 * time.Second

func (c *cli) cacheEntry(ctx context.Context, r *running, store *cache.Store, name string, src fetch.Source, p *policy) (*cache.Entry, error) {
	last, err := ask(ctx, src, r.fetch.Idle)
	if err == nil {
		claim, err := seal.ParseTrailer(last)
		if err != nil {
			return nil, err
		}
		if _, err := p.who(claim.Identity); err != nil {
			return nil, err
		}
		if e := store.Find(claim); e != nil {
			return e, store.Remember(name, e)
		}
	} else if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	known := store.Recall(name)
	if known != nil && err != nil && !errors.Is(err, fetch.ErrWhole) {
		return c.away(known, err), nil
	}
	o := r.fetch
	if known != nil && err != nil {
		o.Retries = 0
	}
	e, err := c.addTo(ctx, store, src, r, o, p)
	switch {
	case err == nil:
		return e, store.Remember(name, e)
	case known == nil || ctx.Err() != nil || seal.IsRefusal(err):
		return nil, err
	}
	return c.away(known, err), nil
}

func (c *cli) away(known *cache.Entry, reason error) *cache.Entry {
	c.log.Warn("the source is away, starting from the cache", "reason", reason)
	return known
}

func ask(ctx context.Context, src fetch.Source, idle time.Duration) ([]byte, error) {
	within := askWithin
	if idle > 0 {
		within = min(within, idle)
	}
	ctx, cancel := context.WithTimeoutCause(ctx, within, fmt.Errorf("no answer within %v", within))
	defer cancel()
	last, err := fetch.Tail(ctx, src, seal.TrailerLen)
	if err != nil && ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	return last, err
}

func (c *cli) addTo(ctx context.Context, store *cache.Store, src fetch.Source, r *running, o fetch.Options, p *policy) (*cache.Entry, error) {
	in, err := c.openSource(ctx, src, o, &r.reading)
	if err != nil {
		return nil, err
	}
	defer in.Close()
	return store.Add(ctx, in, r.limits(), r.devices, p.accept)
}

// configure joins the caller's, the image's and the command line's words.
func (r *running) configure(cfg *launch.Config, i *seal.Image, caller, command []string) {
	cfg.Argv = slices.Concat(i.Entrypoint, i.Cmd)
	switch {
	case len(r.entrypoint) > 0:
		cfg.Argv = slices.Concat(r.entrypoint, command)
	case len(command) > 0:
		cfg.Argv = slices.Concat(i.Entrypoint, command)
	}
	if cfg.User == "" {
		cfg.User = i.User
	}
	if cfg.Workdir == "" {
		cfg.Workdir = i.Workdir
	}
	cfg.Env = environment(caller, i.Env, r.env)
	switch {
	case r.hasOOM:
		cfg.OOMScoreAdj = &r.oom
	case underNomad(caller) && oomScoreAdj() < 0:
		cfg.OOMScoreAdj = new(int)
	}
}

// environment is the caller's, then the image's, then the command line's. A
// name without value keeps the caller's, and takes the image's away if the caller
// has none, as docker run does.
func environment(caller, image, flags []string) []string {
	values := make(map[string]string)
	set := func(list []string) {
		for _, e := range list {
			if k, v, ok := strings.Cut(e, "="); ok {
				values[k] = v
			}
		}
	}
	set(caller)
	set(image)
	for _, f := range flags {
		if !strings.Contains(f, "=") {
			delete(values, f)
			set(slices.DeleteFunc(slices.Clone(caller), func(e string) bool { return !strings.HasPrefix(e, f+"=") }))
		}
	}
	set(flags)
	out := make([]string, 0, len(values))
	for _, k := range sortedKeys(values) {
		out = append(out, k+"="+values[k])
	}
	return out
}

// underNomad: Nomad lowers its own OOM score, and its children inherit that: a
// task would be the last thing the kernel ends.
func underNomad(env []string) bool {
	return slices.ContainsFunc(env, func(e string) bool { return strings.HasPrefix(e, "NOMAD_ALLOC_ID=") })
}

func oomScoreAdj() int {
	b, err := os.ReadFile("/proc/self/oom_score_adj")
	if err != nil {
		return 0
	}
	var n int
	if _, err := fmt.Sscan(string(b), &n); err != nil {
		return 0
	}
	return n
}
