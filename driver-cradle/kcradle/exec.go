package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"

	"github.com/spf13/cobra"

	"github.com/cradlestack/cradlestack/driver-cradle/pod"
)

// execConfig is docker's (moby api/swagger.yaml, ExecConfig).
type execConfig struct {
	AttachStdin, AttachStdout, AttachStderr, Tty, Privileged bool
	Env, Cmd                                                 []string
	User, WorkingDir                                         string    `json:",omitempty"`
	ConsoleSize                                              [2]uint16 `json:",omitzero"` // rows, columns
}

func (c *cli) execCommand() *cobra.Command {
	var e execConfig
	var container string
	var detach bool
	cmd := &cobra.Command{
		Use:   "exec [flags] DIR COMMAND [ARGUMENT…]",
		Short: "run a command in a container of a running pod",
		Args:  cobra.MinimumNArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			d, err := c.open(args[0])
			if err != nil {
				return err
			}
			for i, v := range e.Env {
				if !strings.Contains(v, "=") {
					e.Env = append(e.Env[:i:i], append(appendVariable(nil, v, false), e.Env[i+1:]...)...)
				}
			}
			e.Cmd, e.AttachStdout, e.AttachStderr = args[1:], !detach, !detach
			return c.exec(cmd.Context(), d, container, &e, detach)
		},
		ValidArgsFunction: completePods,
	}
	f := cmd.Flags()
	f.StringVarP(&container, "container", "c", "", "container, by name or the beginning of its id (default: the only one)")
	f.BoolVarP(&e.AttachStdin, "interactive", "i", false, "pass standard input on")
	f.BoolVarP(&e.Tty, "tty", "t", false, "give the command a terminal")
	f.BoolVarP(&detach, "detach", "d", false, "do not wait for the command")
	f.BoolVar(&e.Privileged, "privileged", false, "all capabilities")
	f.StringArrayVarP(&e.Env, "env", "e", nil, "NAME=value, or NAME for the value of this environment's")
	f.StringVarP(&e.User, "user", "u", "", "user[:group] (default: the container's)")
	f.StringVarP(&e.WorkingDir, "workdir", "w", "", "working directory (default: the container's)")
	f.SetInterspersed(false)
	return cmd
}

func (c *cli) exec(ctx context.Context, d *pod.Dir, container string, e *execConfig, detach bool) error {
	err := c.execIn(ctx, d, container, e, detach)
	if err == nil || errors.As(err, new(exitError)) || errors.As(err, new(*pod.GuestError)) {
		return err
	}
	if serr := d.AwaitSettled(ctx); errors.Is(serr, pod.ErrNotRunning) {
		return serr // it has ended just now
	}
	return err
}

func (c *cli) execIn(ctx context.Context, d *pod.Dir, container string, e *execConfig, detach bool) error {
	if e.Tty && e.AttachStdin && !isTerminal(c.stdin) {
		return errors.New("exec -it: standard input is no terminal: leave -t out")
	}
	if e.Tty {
		e.ConsoleSize = c.terminalSize()
	}
	name, err := containerName(d, container)
	if err != nil {
		return err
	}
	g, err := c.guestOf(ctx, d)
	if err != nil {
		return err
	}
	var made struct{ ID string }
	if err := g.Call(ctx, http.MethodPost, "/containers/"+name+"/exec", nil, e, &made); err != nil {
		return fmt.Errorf("exec in container %s: %w", name, err)
	}
	path := "/exec/" + made.ID
	start := struct{ Detach, Tty bool }{detach, e.Tty}
	if detach {
		if err := g.Call(ctx, http.MethodPost, path+"/start", nil, start, nil); err != nil {
			return fmt.Errorf("exec in container %s: %w", name, err)
		}
		return nil
	}
	s, err := g.Hijack(ctx, path+"/start", nil, start)
	if err != nil {
		var r *pod.GuestError
		if errors.As(err, &r) {
			c.failure = execCode(r.Message)
		}
		return fmt.Errorf("exec in container %s: %w", name, err)
	}
	defer s.Close()
	if e.Tty {
		t, err := c.takeTerminal(ctx, g, path, e.AttachStdin)
		if err != nil {
			return err
		}
		defer t.giveBack()
	}
	if e.AttachStdin {
		c.feed(s)
	} else if err := s.CloseWrite(); err != nil {
		return err
	}
	if e.Tty {
		_, err = io.Copy(c.stdout, s)
	} else {
		err = demux(s, c.stdout, c.stderr)
	}
	if err != nil {
		return fmt.Errorf("output of the command: %w", err)
	}
	var state struct {
		Running  bool
		ExitCode *int
	}
	if err := g.Call(ctx, http.MethodGet, path+"/json", nil, nil, &state); err != nil {
		return fmt.Errorf("exit code of the command: %w", err)
	}
	if state.ExitCode != nil && *state.ExitCode != 0 {
		return exitError(*state.ExitCode)
	}
	return nil
}

// execCode is docker's exit code for a command that was not executed.
func execCode(message string) int {
	switch {
	case strings.Contains(message, "not found"), strings.Contains(message, "no such file"):
		return 127
	case strings.Contains(message, "permission denied"), strings.Contains(message, "not executable"):
		return 126
	}
	return exitFailure
}

// containerName resolves what the user calls a container of a pod.
func containerName(d *pod.Dir, name string) (string, error) {
	launch, err := d.Launch()
	if err != nil {
		return "", err
	}
	c, err := pod.Lookup(launch, name)
	if err != nil {
		return "", fmt.Errorf("%s: %w", d.Path(), err)
	}
	return c.Name, nil
}

func completePods(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
	return nil, cobra.ShellCompDirectiveFilterDirs
}
