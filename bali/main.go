// Command bali builds signed single-file images and runs them: the process
// becomes the service. docs/bali.md is its manual, docs/bali-format.md its file
// format. It imports nothing else of this repository.
package main

import (
	"context"
	"errors"
	"os"
	"os/signal"
	"syscall"
	"time"
)

func main() {
	ctx := untilSignal()
	code := report(os.Stderr, run(ctx, os.Args[1:], os.Stdin, os.Stdout, os.Stderr))
	var by ended
	if errors.As(context.Cause(ctx), &by) && code != 0 {
		by.die()
	}
	os.Exit(code)
}

// untilSignal ends with the first signal; a second one ends what doesn't listen
// to that.
func untilSignal() context.Context {
	ctx, cancel := context.WithCancelCause(context.Background())
	ending := []os.Signal{syscall.SIGTERM}
	if !signal.Ignored(os.Interrupt) {
		ending = append(ending, os.Interrupt)
	}
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, ending...)
	go func() {
		s := <-signals
		signal.Reset(ending...)
		cancel(ended{s})
	}()
	return ctx
}

// ended is the cause of what a signal ended.
type ended struct{ os.Signal }

func (e ended) Error() string { return e.String() + " signal received" }

// die ends the process by its signal: to systemd a service that is stopped while
// bali still fetches it has not failed, and to a shell it is an interrupt.
func (e ended) die() {
	if s, ok := e.Signal.(syscall.Signal); ok && syscall.Kill(os.Getpid(), s) == nil {
		time.Sleep(time.Second) // it comes at any moment
	}
}
