// Package command is the frame of the command lines of programs that serve: a root command with its version, errors told by name, an end when asked.
package command

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"

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
		fmt.Fprintf(stderr, "%s: %s\n", root.Name(), strings.TrimRight(line, "\n"))
	}
	return 1
}

// TaskAPI is the address at which Nomad answers a task that has an identity; "" for any other process.
func TaskAPI() string {
	socket := filepath.Join(os.Getenv("NOMAD_SECRETS_DIR"), "api.sock")
	if _, err := os.Stat(socket); err != nil || os.Getenv("NOMAD_TOKEN") == "" {
		return ""
	}
	return "unix://" + socket
}
