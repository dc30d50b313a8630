// Package command is the frame of the command lines of programs that serve: a root command with its version, errors told by name, an end when asked.
package command

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"unicode/utf8"

	"github.com/spf13/cobra"
)

// Main executes the program's command line until it ends or is asked to, and exits with its code.
func Main(run func(ctx context.Context, args []string, stdout, stderr io.Writer) int) {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	code := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}

// Root is a program's command, with one below it that prints the version.
func Root(name, short, version string) *cobra.Command {
	root := &cobra.Command{Use: name, Short: short, SilenceErrors: true, SilenceUsage: true, Version: version}
	root.SetVersionTemplate(name + " {{.Version}}\n")
	root.AddCommand(&cobra.Command{
		Use: "version", Short: "print the version", Args: cobra.NoArgs,
		Run: func(cmd *cobra.Command, _ []string) { fmt.Fprintf(cmd.OutOrStdout(), "%s %s\n", name, version) },
	})
	return root
}

// Run executes a command line and returns the exit code.
func Run(ctx context.Context, root *cobra.Command, args []string, stdout, stderr io.Writer) int {
	root.SetArgs(args)
	root.SetOut(stdout)
	root.SetErr(stderr)
	err := root.ExecuteContext(ctx)
	if err == nil {
		return 0
	}
	for line := range strings.Lines(err.Error()) {
		fmt.Fprintf(stderr, "%s: %s\n", root.Name(), Plain(strings.TrimRight(line, "\n")))
	}
	return 1
}

// Plain is text in which others may have had a hand, such as a file's name, as a terminal is to get it: what is not to be seen is written as Go writes it.
func Plain(text string) string {
	var b strings.Builder
	for len(text) > 0 {
		r, n := utf8.DecodeRuneInString(text)
		switch quoted := strconv.Quote(text[:n]); {
		case r == '\t', strconv.IsPrint(r) && (r != utf8.RuneError || n > 1):
			b.WriteString(text[:n])
		default:
			b.WriteString(quoted[1 : len(quoted)-1])
		}
		text = text[n:]
	}
	return b.String()
}

// TaskAPI is the address at which Nomad answers a task that has an identity; "" for any other process.
func TaskAPI() string {
	socket := filepath.Join(os.Getenv("NOMAD_SECRETS_DIR"), "api.sock")
	if _, err := os.Stat(socket); err != nil || os.Getenv("NOMAD_TOKEN") == "" {
		return ""
	}
	return "unix://" + socket
}
