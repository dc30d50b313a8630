package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/spf13/cobra"
	"golang.org/x/crypto/ssh"

	"github.com/cradlestack/cradlestack/bali/seal"
	gather "github.com/cradlestack/cradlestack/bali/source"
)

// building are the flags of bali build.
type building struct {
	from, platform, timestamp, owner string
	zstd, unsigned, devices          bool
	maxSize                          bytesFlag

	entrypoint, cmd, env []string
	workdir, user        string
}

func (c *cli) build() *cobra.Command {
	b := building{maxSize: seal.DefaultMaxSize}
	cmd := &cobra.Command{
		Use:   "build OUT.tar.gz [--from SOURCE | docker build arguments]",
		Short: "make a signed image",
		Long: `Make a signed image from a Dockerfile, by docker buildx build or docker build:

  bali build app.tar.gz -f Dockerfile .

or from a SOURCE, without docker:

  docker-archive:FILE   what docker save writes
  oci:DIR[:TAG]         an OCI layout
  REGISTRY/REPO:TAG     an image in a registry, with docker's credentials
  ./DIR, dir:DIR        a folder; all in it belongs to root without --owner keep

OUT.tar.zst, or --zstd, compresses with zstd; OUT - writes to standard output.
The same input gives the same bytes, and --timestamp, or SOURCE_DATE_EPOCH in
the environment, makes every file equally old.`,
		DisableFlagParsing: true, // docker's flags are not ours to refuse
	}
	f := cmd.Flags()
	f.StringVar(&b.from, "from", "", "build from `SOURCE` instead of a Dockerfile")
	f.StringVar(&b.platform, "platform", "", "`OS/ARCH` to choose, or to build for")
	f.StringVar(&b.timestamp, "timestamp", os.Getenv("SOURCE_DATE_EPOCH"), "`TIME` of every file: seconds since 1970 or RFC 3339")
	f.StringVar(&b.owner, "owner", "root", "whose the files of a folder are: root, or keep")
	f.BoolVar(&b.zstd, "zstd", false, "compress with zstd")
	f.BoolVar(&b.unsigned, "unsigned", false, "don't sign")
	f.BoolVar(&b.devices, "devices", false, "keep device nodes")
	f.Var(&b.maxSize, "max-size", "refuse a source that unpacks to more")
	f.StringArrayVar(&b.entrypoint, "entrypoint", nil, "`WORD` of the entrypoint; repeat for more")
	f.StringArrayVar(&b.cmd, "cmd", nil, "`WORD` of the default arguments; repeat for more")
	f.StringArrayVar(&b.env, "env", nil, "`NAME=VALUE` to add to the image's environment")
	f.StringVar(&b.workdir, "workdir", "", "working `DIR`")
	f.StringVar(&b.user, "user", "", "`NAME[:GROUP]` or numbers")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		ours, docker := splitFlags(cmd, args)
		cmd.DisableFlagParsing = false
		if err := cmd.ParseFlags(ours); err != nil {
			return err
		}
		if help, _ := cmd.Flags().GetBool("help"); help {
			return cmd.Help()
		}
		if b.from != "" && slices.Contains(docker, "-q") { // no docker that it could be for
			c.quiet = true
			docker = slices.DeleteFunc(docker, func(a string) bool { return a == "-q" })
		}
		if len(docker) == 0 {
			return errors.New("build needs a file to write: bali build OUT.tar.gz …")
		}
		return c.buildTo(cmd.Context(), &b, docker[0], docker[1:])
	}
	return cmd
}

// splitFlags takes bali's own flags out of a command line that is otherwise
// docker's. All after -- is docker's.
func splitFlags(cmd *cobra.Command, args []string) (ours, rest []string) {
	for i := 0; i < len(args); i++ {
		a := args[i]
		if a == "--" {
			return ours, append(rest, args[i+1:]...)
		}
		name, _, hasValue := strings.Cut(strings.TrimPrefix(a, "--"), "=")
		f := cmd.Flag(name)
		switch {
		case a == "-h" || a == "-q" && len(rest) == 0:
			ours = append(ours, a)
		case !strings.HasPrefix(a, "--") || f == nil && name != "help":
			rest = append(rest, a)
		case hasValue || f == nil || f.NoOptDefVal != "" || i+1 == len(args):
			ours = append(ours, a)
		default:
			ours = append(ours, a, args[i+1])
			i++
		}
	}
	return ours, rest
}

func (b *building) options(c *cli) (gather.Options, error) {
	o := gather.Options{
		Devices: b.devices, MaxSize: int64(b.maxSize), KeepOwners: b.owner == "keep",
		Warn: func(format string, args ...any) { c.log.Warn(fmt.Sprintf(format, args...)) },
	}
	if b.owner != "keep" && b.owner != "root" {
		return o, fmt.Errorf("--owner %s: there are root and keep", b.owner)
	}
	if b.platform != "" {
		p, err := v1.ParsePlatform(b.platform)
		if err != nil {
			return o, fmt.Errorf("--platform: %w", err)
		}
		o.Platform = *p
	}
	if b.timestamp != "" {
		t, err := strconv.ParseInt(b.timestamp, 10, 64)
		if err != nil {
			at, err := time.Parse(time.RFC3339, b.timestamp)
			if err != nil {
				return o, fmt.Errorf("--timestamp %s: want seconds since 1970 or a time like 2006-01-02T15:04:05Z", b.timestamp)
			}
			t = at.Unix()
		}
		o.Timestamp = &t
	}
	return o, nil
}

func (c *cli) buildTo(ctx context.Context, b *building, out string, docker []string) error {
	o, err := b.options(c)
	if err != nil {
		return err
	}
	var signer ssh.Signer
	if !b.unsigned { // before the long part
		var done func()
		if signer, done, err = c.signer(); err != nil {
			return err
		}
		defer done()
	}
	var root *gather.Rootfs
	switch {
	case b.from != "" && len(docker) > 0:
		return fmt.Errorf("--from takes no docker arguments: %q", docker)
	case b.from != "":
		bar := c.bar(-1, "gather")
		o.Progress = bar
		root, err = gather.Open(ctx, b.from, o)
		bar.Close()
	default:
		root, err = c.dockerBuild(ctx, b, out, docker, o)
	}
	if err != nil {
		return err
	}
	defer root.Close()
	b.describe(&root.Image)
	s, n, err := c.writeImage(ctx, b, out, root, o, signer)
	if err != nil {
		return err
	}
	c.log.Info("built", "image", out, "digest", s.Digest(), "bytes", n)
	return nil
}

// describe lays what the command line says over what the source says.
func (b *building) describe(i *seal.Image) {
	if len(b.entrypoint) > 0 {
		i.Entrypoint, i.Cmd = b.entrypoint, nil // as docker run --entrypoint
	}
	if len(b.cmd) > 0 {
		i.Cmd = b.cmd
	}
	for _, e := range b.env {
		name, _, _ := strings.Cut(e, "=")
		i.Env = slices.DeleteFunc(slices.Clone(i.Env), func(old string) bool { return strings.HasPrefix(old, name+"=") })
		i.Env = append(i.Env, e)
	}
	if b.workdir != "" {
		i.Workdir = b.workdir
	}
	if b.user != "" {
		i.User = b.user
	}
}

// beside is a file for the time of a build: always the same, so that the next
// build takes the place of one that was killed.
func beside(out, what string) string {
	return filepath.Join(filepath.Dir(out), "."+filepath.Base(out)+"."+what)
}

// writeImage writes beside the target and moves it there when it is whole. What
// a link leads to takes the place of no link, and a pipe or device, like
// /dev/null, is written to.
func (c *cli) writeImage(ctx context.Context, b *building, out string, root *gather.Rootfs, o gather.Options, signer ssh.Signer) (s *seal.Signature, n int64, err error) {
	if out == "-" {
		return c.packTo(ctx, c.stdout, b.zstd, root, o, signer)
	}
	zstd := b.zstd || strings.HasSuffix(out, ".zst") || strings.HasSuffix(out, ".tzst")
	if fi, err := os.Stat(out); err == nil && !fi.Mode().IsRegular() {
		f, err := os.OpenFile(out, os.O_WRONLY, 0)
		if err != nil {
			return nil, 0, err
		}
		s, n, err = c.packTo(ctx, f, zstd, root, o, signer)
		return s, n, errors.Join(err, f.Close())
	}
	if real, err := filepath.EvalSymlinks(out); err == nil {
		out = real
	}
	partial := beside(out, "partial")
	f, err := os.OpenFile(partial, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o644)
	if err != nil {
		return nil, 0, err
	}
	s, n, err = c.packTo(ctx, f, zstd, root, o, signer)
	if err = errors.Join(err, f.Sync(), f.Close()); err == nil {
		err = os.Rename(partial, out)
	}
	if err != nil {
		os.Remove(partial)
	}
	return s, n, err
}

// packTo writes an image to a stream.
func (c *cli) packTo(ctx context.Context, to io.Writer, zstd bool, root *gather.Rootfs, o gather.Options, signer ssh.Signer) (*seal.Signature, int64, error) {
	comp := seal.Gzip
	if zstd {
		comp = seal.Zstd
	}
	count := &counter{w: to}
	var stamp int64
	if o.Timestamp != nil {
		stamp = *o.Timestamp
	}
	w, err := seal.NewWriter(count, &root.Image, comp, stamp)
	if err != nil {
		return nil, 0, err
	}
	bar := c.bar(root.Size, "pack")
	defer bar.Close()
	w.Progress = bar
	if err := root.Write(ctx, w); err != nil {
		return nil, 0, err
	}
	s, err := w.Seal(signer)
	return s, count.n, err
}

type counter struct {
	w io.Writer
	n int64
}

func (c *counter) Write(p []byte) (int, error) {
	n, err := c.w.Write(p)
	c.n += int64(n)
	return n, err
}

// dockerBuild lets docker build, and reads the result as docker writes it.
func (c *cli) dockerBuild(ctx context.Context, b *building, out string, args []string, o gather.Options) (*gather.Rootfs, error) {
	if _, err := exec.LookPath("docker"); err != nil {
		return nil, fmt.Errorf("%w: install docker, or build without it by --from", err)
	}
	if b.platform != "" {
		args = append([]string{"--platform", b.platform}, args...)
	}
	buildx := exec.CommandContext(ctx, "docker", "buildx", "version").Run() == nil
	if buildx && ownBuilder(ctx, args) {
		return c.fromDocker(ctx, o, append([]string{"buildx", "build", "--output", "type=docker,dest=-"}, args...))
	}
	// Docker's own builder gives images only to docker's store, where they are
	// the cache of the next build.
	iidFile := beside(out, "iid")
	defer os.Remove(iidFile)
	argv := []string{"build", "--iidfile", iidFile}
	if buildx {
		argv = []string{"buildx", "build", "--load", "--iidfile", iidFile}
	}
	cmd := exec.CommandContext(ctx, "docker", append(argv, args...)...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = c.stdin, c.stderr, c.stderr // stdout may be the image
	if err := cmd.Run(); err != nil {
		return nil, fmt.Errorf("docker build: %w", err)
	}
	iid, err := os.ReadFile(iidFile)
	if err != nil {
		return nil, fmt.Errorf("docker build left no image id: %w", err)
	}
	return c.fromDocker(ctx, o, []string{"save", strings.TrimSpace(string(iid))})
}

// fromDocker reads the image that a docker command writes, while it does.
func (c *cli) fromDocker(ctx context.Context, o gather.Options, argv []string) (*gather.Rootfs, error) {
	cmd := exec.CommandContext(ctx, "docker", argv...)
	cmd.Stdin, cmd.Stderr = c.stdin, c.stderr
	stream, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	root, err := gather.DockerArchive(ctx, stream, o)
	if err != nil {
		// to its end: a docker that failed has the better reason
		_, _ = io.Copy(io.Discard, stream)
	}
	if werr := cmd.Wait(); werr != nil {
		if root != nil {
			root.Close()
		}
		return nil, fmt.Errorf("docker %s: %w", argv[0], werr)
	}
	return root, err
}

// ownBuilder reports whether buildx builds with a builder that is not docker's
// own: those can write an image to a stream.
func ownBuilder(ctx context.Context, args []string) bool {
	inspect := []string{"buildx", "inspect"}
	for i, a := range args {
		if name, ok := strings.CutPrefix(a, "--builder="); ok {
			inspect = append(inspect, name)
		} else if a == "--builder" && i+1 < len(args) {
			inspect = append(inspect, args[i+1])
		}
	}
	out, err := exec.CommandContext(ctx, "docker", inspect...).Output()
	if err != nil {
		return false // the build says why
	}
	for l := range strings.Lines(string(out)) {
		if driver, ok := strings.CutPrefix(l, "Driver:"); ok {
			return strings.TrimSpace(driver) != "docker"
		}
	}
	return false
}
