package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"strconv"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/cradlestack/cradlestack/bali/fetch"
	"github.com/cradlestack/cradlestack/bali/launch"
	"github.com/cradlestack/cradlestack/bali/seal"
)

// version is set by the Makefile.
var version = "development"

// cli is what every command shares.
type cli struct {
	stdin          io.Reader
	stdout, stderr io.Writer
	log            *slog.Logger

	keyFile   string
	trustFile string
	output    string
	quiet     bool
}

// run executes one command line.
func run(ctx context.Context, args []string, stdin io.Reader, stdout, stderr io.Writer) error {
	c := &cli{stdin: stdin, stdout: stdout, stderr: stderr}
	c.log = slog.New(lines{c})
	root := &cobra.Command{
		Use:   "bali",
		Short: "signed single-file images that become the service",
		Long: `bali packs a root file system into one signed .tar.gz and runs it: private
mounts, then execve. The process is the service; nothing is left to clean up.

Environment: BALI_KEY and BALI_TRUST are the defaults of --key and --trust.`,
		Version:      version,
		SilenceUsage: true, SilenceErrors: true,
	}
	root.SetArgs(args)
	root.SetIn(stdin)
	root.SetOut(stdout)
	root.SetErr(stderr)
	root.CompletionOptions.HiddenDefaultCmd = true
	f := root.PersistentFlags()
	f.StringVar(&c.keyFile, "key", os.Getenv("BALI_KEY"), "private key `FILE`, or KEY.pub whose private half an ssh-agent holds")
	f.StringVar(&c.trustFile, "trust", os.Getenv("BALI_TRUST"), "`FILE` with trusted identities (default /etc/bali/trust, or ~/.config/bali/trust for users)")
	f.BoolVarP(&c.quiet, "quiet", "q", false, "say nothing but errors")
	root.AddCommand(c.id(), c.trust(), c.build(), c.verify(), c.inspect(), c.extract(), c.run())
	root.AddCommand(c.service()...)
	return root.ExecuteContext(ctx)
}

// report prints an error and says which exit status it means.
func report(stderr io.Writer, err error) int {
	if err == nil {
		return 0
	}
	var child *exec.ExitError
	var service *launch.NotStarted
	var refused *refusal
	fmt.Fprintf(stderr, "bali: %s\n", message(err.Error()))
	switch {
	case errors.As(err, &service):
		return service.Code
	case errors.As(err, &refused):
		return launch.ExitRefused
	case errors.As(err, &child) && child.ExitCode() > 0:
		return child.ExitCode()
	}
	return 1
}

// refusal is an error of bali run itself, told from the service's by its exit
// status.
type refusal struct{ error }

func (r *refusal) Unwrap() error { return r.error }

// lines is a log handler for people: bali: what happened key=value.
type lines struct{ c *cli }

// Enabled asks for -q each time: bali build parses its flags late.
func (l lines) Enabled(_ context.Context, level slog.Level) bool {
	return level >= slog.LevelInfo && !l.c.quiet
}
func (l lines) WithAttrs([]slog.Attr) slog.Handler { return l }
func (l lines) WithGroup(string) slog.Handler      { return l }

func (l lines) Handle(_ context.Context, r slog.Record) error {
	var b strings.Builder
	b.WriteString("bali: " + r.Message)
	r.Attrs(func(a slog.Attr) bool {
		fmt.Fprintf(&b, " %s=%q", a.Key, a.Value.String())
		return true
	})
	_, err := fmt.Fprintln(l.c.stderr, message(b.String()))
	return err
}

// terminal reports whether progress has someone to look at it.
func (c *cli) terminal() bool {
	f, ok := c.stderr.(*os.File)
	return ok && !c.quiet && term.IsTerminal(int(f.Fd()))
}

// outputFlag adds -o json.
func (c *cli) outputFlag(cmd *cobra.Command) {
	cmd.Flags().StringVarP(&c.output, "output", "o", "text", "`FORMAT` of the output: text or json")
	cmd.PreRunE = func(*cobra.Command, []string) error {
		if c.output != "text" && c.output != "json" {
			return fmt.Errorf("--output %s: there are text and json", c.output)
		}
		return nil
	}
}

func (c *cli) json(v any) error {
	e := json.NewEncoder(c.stdout)
	e.SetIndent("", "  ")
	return e.Encode(v)
}

// bytesFlag is a size as people write it: 512M, 8G.
type bytesFlag int64

func (b *bytesFlag) String() string { return strconv.FormatInt(int64(*b), 10) }
func (b *bytesFlag) Type() string   { return "SIZE" }

func (b *bytesFlag) Set(s string) error {
	units := map[byte]int64{'K': 1 << 10, 'M': 1 << 20, 'G': 1 << 30, 'T': 1 << 40}
	digits, unit := strings.ToUpper(s), int64(1)
	if n := len(digits); n > 0 && units[digits[n-1]] != 0 {
		digits, unit = digits[:n-1], units[digits[n-1]]
	}
	n, err := strconv.ParseInt(digits, 10, 64)
	if err != nil || n <= 0 || n > (1<<62)/unit {
		return fmt.Errorf("want a size like 512M or 8G, not %q", s)
	}
	*b = bytesFlag(n * unit)
	return nil
}

// reading are the flags of commands that read an image.
type reading struct {
	maxSize    bytesFlag
	maxEntries int
	fetch      fetch.Options
}

func (r *reading) flags(cmd *cobra.Command) {
	r.maxSize = seal.DefaultMaxSize
	f := cmd.Flags()
	f.Var(&r.maxSize, "max-size", "refuse an image that unpacks to more")
	f.IntVar(&r.maxEntries, "max-entries", seal.DefaultMaxEntries, "refuse an image with more files")
	r.fetchFlags(cmd)
}

func (r *reading) fetchFlags(cmd *cobra.Command) {
	f := cmd.Flags()
	f.IntVar(&r.fetch.Retries, "retries", 5, "new attempts in a row without progress before giving up; 0 for none")
	f.DurationVar(&r.fetch.Idle, "idle", 0, "how long a transfer may stand still (default 30s)")
	f.StringVar(&r.fetch.SSHKey, "ssh-key", "", "private key `FILE` for sftp and scp besides the agent's")
	f.StringVar(&r.fetch.KnownHosts, "known-hosts", "", "`FILE` instead of ~/.ssh/known_hosts")
}

func (r *reading) limits() seal.Limits {
	return seal.Limits{MaxSize: int64(r.maxSize), MaxEntries: r.maxEntries}
}

// maxFile is more than an image within --max-size has itself, as no compressor
// adds so much; 0, for bali verify, which keeps nothing, is no limit. A server
// that never ends would fill the disk before a byte is verified.
func (r *reading) maxFile() int64 {
	if r.maxSize == 0 {
		return 0
	}
	return int64(r.maxSize + r.maxSize/8 + 1<<20)
}

// open starts reading a file or URL, with progress.
func (c *cli) open(ctx context.Context, where string, r *reading) (*source, error) {
	o := r.fetch
	o.Log = c.log
	s, err := fetch.New(where, o)
	if err != nil {
		return nil, err
	}
	return c.openSource(ctx, s, o, r)
}

func (c *cli) openSource(ctx context.Context, s fetch.Source, o fetch.Options, r *reading) (*source, error) {
	o.Log = c.log
	in, err := fetch.Open(ctx, s, o)
	if err != nil {
		return nil, err
	}
	return &source{Reader: in, bar: c.bar(in.Size(), "read"), max: r.maxFile()}, nil
}

// named says which image an error is about.
func named(where string, err error) error {
	return fmt.Errorf("%s: %w", fetch.Redacted(where), err)
}

// source is an image being read.
type source struct {
	*fetch.Reader
	bar io.WriteCloser
	max int64
}

func (s *source) Read(p []byte) (int, error) {
	n, err := s.Reader.Read(p)
	_, _ = s.bar.Write(p[:n]) // for the eye only
	if s.max > 0 && s.Offset() > s.max {
		return 0, fmt.Errorf("%w: it has more than %d bytes: raise --max-size if that is right", seal.ErrTooLarge, s.max)
	}
	return n, err
}

func (s *source) Close() error {
	s.bar.Close()
	return s.Reader.Close()
}
