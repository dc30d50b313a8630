// Command stack runs one node of the stack in the background: make up, make down, make env.
//
//	stack [-dir DIR] up|down|env|clean
package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"

	"github.com/cradlestack/cradlestack/internal/stack"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:], os.Stdout, os.Stderr); err != nil {
		fmt.Fprintf(os.Stderr, "stack: %v\n", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	flags := flag.NewFlagSet("stack", flag.ContinueOnError)
	flags.SetOutput(stderr)
	def := stack.DefaultDir
	if dir := os.Getenv("CRADLESTACK_DIR"); dir != "" {
		def = dir
	}
	dir := flags.String("dir", def, "everything that the stack has (or $CRADLESTACK_DIR)")
	if err := flags.Parse(args); err != nil {
		return err
	}
	switch flags.Arg(0) {
	case "up":
		s, err := stack.Up(ctx, *dir)
		if err != nil {
			return err
		}
		fmt.Fprint(stdout, s.Usage())
		return nil
	case "down":
		return stack.Down(ctx, *dir)
	case "clean":
		return stack.Clean(ctx, *dir)
	case "env":
		env, err := stack.Env(*dir)
		if err != nil {
			return err
		}
		fmt.Fprint(stdout, env)
		return nil
	default:
		return fmt.Errorf("usage: stack [-dir DIR] up|down|env|clean")
	}
}
