package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"github.com/cradlestack/cradlestack/driver-cradle/boot"
	"github.com/cradlestack/cradlestack/driver-cradle/image"
	"github.com/cradlestack/cradlestack/driver-cradle/pod"
)

// version is set by the linker.
var version = "development"

// Exit codes of our own, as docker has them.
const (
	exitFailure = 1   // a command failed
	exitRefused = 125 // run and exec: nothing was run
)

// A cli is one invocation.
type cli struct {
	stdin  *os.File
	stdout io.Writer
	stderr io.Writer

	root    string
	bootDir string
	verbose bool
	failure int // exit code of an error
}

// An exitError ends the program with a code and without a message: somebody else's exit code, or one whose message was printed.
type exitError int

func (e exitError) Error() string { return fmt.Sprintf("exit code %d", int(e)) }

// run executes a command line and returns the exit code.
func run(args []string, stdin *os.File, stdout, stderr io.Writer) int {
	c := &cli{stdin: stdin, stdout: stdout, stderr: stderr, failure: exitFailure}
	cmd := c.command()
	cmd.SetArgs(args)
	cmd.SetIn(stdin)
	cmd.SetOut(stdout)
	cmd.SetErr(stderr)
	err := cmd.ExecuteContext(context.Background())
	var exit exitError
	switch {
	case err == nil:
		return 0
	case errors.As(err, &exit):
		return int(exit)
	}
	for line := range strings.Lines(err.Error()) {
		if line = strings.TrimRight(line, "\n\t "); line != "" { // cobra's suggestions come with empty ones
			fmt.Fprintf(stderr, "kcradle: %s\n", line)
		}
	}
	return c.failure
}

func (c *cli) command() *cobra.Command {
	root := &cobra.Command{
		Use:           "kcradle",
		Short:         "run docker images in microVMs",
		SilenceErrors: true,
		SilenceUsage:  true,
		Version:       version,
	}
	root.SetVersionTemplate("kcradle {{.Version}}\n")
	flags := root.PersistentFlags()
	flags.StringVar(&c.root, "root", env("CRADLE_ROOT", "/var/lib/cradle"), "directory of the cache: layers of images, templates ($CRADLE_ROOT)")
	flags.StringVar(&c.bootDir, "boot", "", "boot package ($CRADLE_BOOT; else boot/ beside kcradle, /usr/lib/cradle/boot)")
	flags.BoolVar(&c.verbose, "verbose", false, "say on standard error what is decided and why")
	root.AddGroup(&cobra.Group{ID: "pod", Title: "Pods:"}, &cobra.Group{ID: "host", Title: "This host:"})
	for _, cmd := range []*cobra.Command{
		c.summonCommand(), c.runCommand(), c.execCommand(), c.logsCommand(), c.statusCommand(), c.stopCommand(), c.killCommand(), c.removeCommand(),
		c.verifyCommand(),
	} {
		cmd.GroupID = "pod"
		root.AddCommand(cmd)
	}
	for _, cmd := range []*cobra.Command{c.imagesCommand(), c.templateCommand(), c.bootCommand(), c.doctorCommand(), c.versionCommand()} {
		cmd.GroupID = "host"
		root.AddCommand(cmd)
	}
	root.AddCommand(c.monitorCommand())
	c.tellUsage(root)
	return root
}

// tellUsage makes what is wrong with a command line come with the right one.
func (c *cli) tellUsage(cmd *cobra.Command) {
	for _, sub := range cmd.Commands() {
		c.tellUsage(sub)
		refused := func(err error) error {
			if sub.Name() == "run" {
				c.failure = exitRefused // as of docker run
			}
			return err
		}
		sub.SetFlagErrorFunc(func(_ *cobra.Command, err error) error {
			return refused(fmt.Errorf("%w: see %s --help", err, sub.CommandPath()))
		})
		if sub.HasSubCommands() {
			sub.RunE, sub.DisableFlagsInUseLine = group, true
		}
		args := sub.Args
		if args == nil {
			continue
		}
		sub.Args = func(cmd *cobra.Command, list []string) error {
			err := args(cmd, list)
			if err != nil && (strings.Contains(err.Error(), "arg(s)") || strings.HasPrefix(err.Error(), "unknown command")) { // cobra's own
				err = fmt.Errorf("%s: wrong number of arguments: %s", sub.Name(), sub.UseLine())
			}
			if err != nil {
				return refused(err)
			}
			return nil
		}
	}
}

// group runs a command that is only there for the ones below it.
func group(cmd *cobra.Command, args []string) error {
	if len(args) > 0 {
		return fmt.Errorf("there is no command %q: see %s --help", args[0], cmd.CommandPath())
	}
	return cmd.Help()
}

func env(name, fallback string) string {
	if v := os.Getenv(name); v != "" {
		return v
	}
	return fallback
}

func (c *cli) log() *slog.Logger {
	level := slog.LevelWarn
	if c.verbose {
		level = slog.LevelDebug
	}
	return slog.New(&plainHandler{w: c.stderr, level: level})
}

// store opens the cache.
func (c *cli) store() (*image.Store, error) {
	s, err := image.Open(c.root)
	if errors.Is(err, fs.ErrPermission) {
		err = fmt.Errorf("%w: run kcradle as root, or name a directory of your own with --root", err)
	}
	return s, err
}

// cacheDir is the cache's absolute path; the directory is there.
func (c *cli) cacheDir() (string, error) {
	dir, err := filepath.Abs(c.root)
	if err != nil {
		return "", err
	}
	return dir, os.MkdirAll(dir, 0o755)
}

// findBoot is the boot package that was asked for, else the default one, else the one for a quick set-up.
func (c *cli) findBoot() (*boot.Package, error) {
	p, err := boot.Find(c.bootDir, boot.VariantDefault)
	if errors.Is(err, boot.ErrNoPackage) && c.bootDir == "" && os.Getenv("CRADLE_BOOT") == "" {
		if stock, serr := boot.Find("", boot.VariantStock); serr == nil {
			return stock, nil
		}
	}
	return p, err
}

func (c *cli) open(dir string) (*pod.Dir, error) {
	if dir == "" {
		return nil, errNameless
	}
	return pod.Open(dir, c.log())
}

// errNameless keeps a variable that is not set from meaning the working directory.
var errNameless = errors.New(`"" is no directory: name that of a pod`)

func (c *cli) printJSON(v any) error {
	e := json.NewEncoder(c.stdout)
	e.SetIndent("", "  ")
	return e.Encode(v)
}

// outputFlag is -o; it returns a function that says whether JSON is wanted.
func outputFlag(cmd *cobra.Command) func() (bool, error) {
	format := cmd.Flags().StringP("output", "o", "text", "output format: text, json")
	cmd.RegisterFlagCompletionFunc("output", cobra.FixedCompletions([]string{"text", "json"}, cobra.ShellCompDirectiveNoFileComp))
	return func() (bool, error) {
		switch *format {
		case "text", "json":
			return *format == "json", nil
		}
		return false, fmt.Errorf("output format %q is neither text nor json", *format)
	}
}
