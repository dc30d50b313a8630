package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"time"

	"github.com/spf13/cobra"

	"github.com/cradlestack/cradlestack/driver-cradle/pod"
)

func (c *cli) stopCommand() *cobra.Command {
	var seconds int
	cmd := &cobra.Command{
		Use:   "stop DIR…",
		Short: "stop a pod: the stop signal, then SIGKILL after the grace time",
		Args:  cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx, cancel := interruptible(cmd)
			defer cancel()
			var grace *time.Duration
			if cmd.Flags().Changed("time") {
				d := time.Duration(max(0, seconds)) * time.Second
				grace = &d
			}
			return c.each(args, func(d *pod.Dir) error {
				_, err := d.Stop(ctx, grace)
				return unlessEnded(d, err)
			})
		},
		ValidArgsFunction: completePods,
	}
	cmd.Flags().IntVarP(&seconds, "time", "t", 10, "grace time in seconds (default: each container's own)")
	cmd.Flags().Lookup("time").DefValue = "0" // shown nowhere
	return cmd
}

// unlessEnded makes stopping a pod that has ended no error, as docker stop does.
func unlessEnded(d *pod.Dir, err error) error {
	if errors.Is(err, pod.ErrNotRunning) {
		if _, rerr := d.Report(); rerr == nil {
			return nil
		}
	}
	return err
}

func (c *cli) each(dirs []string, f func(*pod.Dir) error) error {
	var errs []error
	for _, dir := range dirs {
		d, err := c.open(dir)
		if err == nil {
			err = f(d)
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

func (c *cli) killCommand() *cobra.Command {
	var signal, container string
	cmd := &cobra.Command{
		Use:   "kill [-s SIGNAL] DIR…",
		Short: "end a pod's machine at once, or send its containers a signal",
		Args:  cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx, cancel := interruptible(cmd)
			defer cancel()
			return c.each(args, func(d *pod.Dir) error {
				if signal == "" && container == "" {
					_, err := d.Kill(ctx)
					return err
				}
				return c.signalContainers(ctx, d, container, signal)
			})
		},
		ValidArgsFunction: completePods,
	}
	cmd.Flags().StringVarP(&signal, "signal", "s", "", "send this signal to the containers instead: SIGHUP, 1")
	cmd.Flags().StringVarP(&container, "container", "c", "", "only this container")
	return cmd
}

func (c *cli) signalContainers(ctx context.Context, d *pod.Dir, container, signal string) error {
	launch, err := d.Launch()
	if err != nil {
		return err
	}
	var names []string
	if container != "" || len(launch.Containers) == 1 {
		one, err := pod.Lookup(launch, container)
		if err != nil {
			return fmt.Errorf("%s: %w", d.Path(), err)
		}
		names = []string{one.Name}
	} else {
		for _, o := range launch.Containers {
			names = append(names, o.Name)
		}
	}
	g, err := c.guestOf(ctx, d)
	if err != nil {
		return err
	}
	if signal == "" {
		signal = "SIGKILL"
	}
	var errs []error
	for _, name := range names {
		err := g.Call(ctx, http.MethodPost, "/containers/"+name+"/kill", url.Values{"signal": {signal}}, nil, nil)
		var r *pod.GuestError
		if errors.As(err, &r) && r.Code == http.StatusConflict && len(names) > 1 {
			continue // it does not run
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("kill container %s: %w", name, err))
		}
	}
	return errors.Join(errs...)
}

func (c *cli) removeCommand() *cobra.Command {
	var force bool
	cmd := &cobra.Command{
		Use:   "rm [-f] DIR…",
		Short: "remove a pod directory",
		Long:  "rm removes pod directories with their scratch disks and logs. Images stay in the cache (kcradle images gc), volumes where they are.",
		Args:  cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx, cancel := interruptible(cmd)
			defer cancel()
			var errs []error
			for _, dir := range args {
				errs = append(errs, c.remove(ctx, dir, force))
			}
			return errors.Join(errs...)
		},
		ValidArgsFunction: completePods,
	}
	cmd.Flags().BoolVarP(&force, "force", "f", false, "kill the pod if it runs")
	return cmd
}

func (c *cli) remove(ctx context.Context, dir string, force bool) error {
	d, err := c.open(dir)
	if errors.Is(err, pod.ErrNoPod) {
		if rerr := pod.RemoveRemains(dir); !errors.Is(rerr, pod.ErrNoPod) {
			return rerr
		}
	}
	if err != nil {
		return err
	}
	err = d.Remove()
	if force && errors.Is(err, pod.ErrRunning) {
		if _, err := d.Kill(ctx); err != nil && !errors.Is(err, pod.ErrNotRunning) {
			return err
		}
		err = d.Remove()
	}
	return err
}
