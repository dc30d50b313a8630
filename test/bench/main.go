// Command bench measures what the project promises about speed and prints it as a table: ratios within one run on one machine, alternatives
// interleaved, medians. It needs root, the programs in bin/, the example images and Debian's dockerd: make bench.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/cradlestack/cradlestack/test/dockerd"
	"github.com/cradlestack/cradlestack/test/programs"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:], os.Stdout, os.Stderr); err != nil {
		fmt.Fprintf(os.Stderr, "bench: %v\n", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string, stdout, stderr io.Writer) (err error) {
	flags := flag.NewFlagSet("bench", flag.ContinueOnError)
	flags.SetOutput(stderr)
	rounds := flags.Int("rounds", 20, "measurements of each alternative")
	pods := flags.Int("pods", 20, "pods started at once")
	many := flags.Int("many", 50, "pods with which the Nomad driver's memory is measured")
	idle := flags.Duration("idle", 30*time.Second, "how long an idle pod is watched")
	only := flags.String("only", "", "run only the parts in this list: start,image,exec,copy,crowd,idle,nomad,disk,volumes,nfs,dockerapi,bali,terraform")
	into := flags.String("write", "", "also put the table into this Markdown file, between <!-- table --> and <!-- /table -->")
	strict := flags.Bool("strict", false, "fail where a limit is exceeded")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if *only != "" && *into != "" {
		return errors.New("-write replaces the whole table: it goes without -only")
	}
	if os.Getuid() != 0 {
		return errors.New("root is needed: run make bench as root")
	}
	b, err := newBench(ctx, stderr, *rounds)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, b.close()) }()
	for _, part := range []struct {
		name string
		run  func(context.Context) error
	}{
		{"start", b.start},
		{"image", b.image},
		{"exec", b.exec},
		{"copy", b.copy},
		{"crowd", func(ctx context.Context) error { return b.crowd(ctx, *pods) }},
		{"idle", func(ctx context.Context) error { return b.idle(ctx, *idle) }},
		{"nomad", func(ctx context.Context) error { return b.nomad(ctx, *pods, *many) }},
		{"disk", b.guestDisk},
		{"volumes", b.volumes},
		{"nfs", b.nfs},
		{"dockerapi", b.dockerAPI},
		{"bali", b.bali},
		{"terraform", b.terraform},
	} {
		if *only != "" && !strings.Contains(","+*only+",", ","+part.name+",") {
			continue
		}
		fmt.Fprintf(stderr, "bench: %s\n", part.name)
		if err := part.run(ctx); err != nil {
			b.table.print(stdout) // what was measured before
			return fmt.Errorf("%s: %w", part.name, err)
		}
	}
	b.table.print(stdout)
	if *into != "" {
		if err := b.table.writeInto(*into); err != nil {
			return err
		}
	}
	if exceeded := b.table.exceeded(); *strict && len(exceeded) > 0 {
		return fmt.Errorf("over the limit: %s", strings.Join(exceeded, "; "))
	}
	return nil
}

// A bench holds what the measurements share.
type bench struct {
	rounds  int
	log     io.Writer
	dir     string // short, for sockets' paths
	cache   string // what is expensive to make
	kcradle string
	daemon  *dockerd.Daemon
	bare    *bareMachine
	table   table
	pods    int // summoned so far
}

func newBench(ctx context.Context, log io.Writer, rounds int) (b *bench, err error) {
	b = &bench{rounds: rounds, log: log}
	defer func() {
		if err != nil {
			err = errors.Join(err, b.close())
		}
	}()
	if b.kcradle, err = programs.Path("kcradle"); err != nil {
		return b, err
	}
	cache, err := os.UserCacheDir()
	if err != nil {
		return b, err
	}
	b.cache = filepath.Join(cache, "cradlestack", "bench")
	if b.dir, err = os.MkdirTemp("", "bench"); err != nil {
		return b, err
	}
	home := filepath.Join(b.dir, "d")
	if err := os.Mkdir(home, 0o700); err != nil {
		return b, err
	}
	if b.daemon, err = dockerd.Start(ctx, home); err != nil {
		return b, err
	}
	busybox, err := busyboxImage()
	if err != nil {
		return b, err
	}
	if err := b.daemon.Load(ctx, dockerBusybox, busybox); err != nil {
		return b, err
	}
	if b.bare, err = b.newBare(ctx); err != nil {
		return b, err
	}
	// The first start makes the template and warms the caches of all.
	for _, once := range []func(context.Context) (time.Duration, error){
		func(ctx context.Context) (time.Duration, error) { return b.echo(ctx, "auto", "") }, b.dockerEcho, b.bare.echo,
	} {
		if _, err := once(ctx); err != nil {
			return b, err
		}
	}
	return b, nil
}

func (b *bench) close() error {
	var errs []error
	if b.daemon != nil {
		errs = append(errs, b.daemon.Close())
	}
	if b.dir != "" {
		errs = append(errs, os.RemoveAll(b.dir))
	}
	return errors.Join(errs...)
}
