package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/cradlestack/cradlestack/driver-cradle/pod"
)

func (c *cli) logsCommand() *cobra.Command {
	var container, since, until, tail string
	var follow, timestamps bool
	cmd := &cobra.Command{
		Use:   "logs [flags] DIR",
		Short: "show what a container has put out, also after the pod's end",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			d, err := c.open(args[0])
			if err != nil {
				return err
			}
			o := pod.LogOptions{Stdout: c.stdout, Stderr: c.stderr, Timestamps: timestamps, Tail: -1}
			now := time.Now()
			if o.Since, err = parseTime(since, now); err != nil {
				return fmt.Errorf("--since: %w", err)
			}
			if o.Until, err = parseTime(until, now); err != nil {
				return fmt.Errorf("--until: %w", err)
			}
			if tail != "all" {
				if o.Tail, err = strconv.Atoi(tail); err != nil {
					return fmt.Errorf("--tail: %q is no number of lines", tail)
				}
			}
			ctx, cancel := signal.NotifyContext(cmd.Context(), os.Interrupt)
			defer cancel()
			running, err := d.Running()
			if err != nil {
				return err
			}
			if running {
				err = c.guestLogs(ctx, d, container, o, follow)
				if ctx.Err() != nil {
					return exitError(130)
				}
				if !errors.Is(err, pod.ErrNotRunning) {
					return err
				}
			}
			return d.Logs(container, o)
		},
		ValidArgsFunction: completePods,
	}
	f := cmd.Flags()
	f.StringVarP(&container, "container", "c", "", "container, by name or the beginning of its id (default: the only one)")
	f.BoolVarP(&follow, "follow", "f", false, "go on until the container ends")
	f.BoolVarP(&timestamps, "timestamps", "t", false, "show when each line was written")
	f.StringVar(&since, "since", "", "only lines from then on: a time (2026-01-02T15:04:05) or how long ago (10m)")
	f.StringVar(&until, "until", "", "only lines until then")
	f.StringVarP(&tail, "tail", "n", "all", "only the last so many lines")
	return cmd
}

func (c *cli) guestLogs(ctx context.Context, d *pod.Dir, container string, o pod.LogOptions, follow bool) error {
	launch, err := d.Launch()
	if err != nil {
		return err
	}
	of, err := pod.Lookup(launch, container)
	if err != nil {
		return fmt.Errorf("%s: %w", d.Path(), err)
	}
	g, err := c.guestOf(ctx, d)
	if err != nil {
		return err
	}
	q := url.Values{"stdout": {"1"}, "stderr": {"1"}}
	if o.Timestamps {
		q.Set("timestamps", "1")
	}
	if follow {
		q.Set("follow", "1")
	}
	if o.Tail >= 0 {
		q.Set("tail", strconv.Itoa(o.Tail))
	}
	for name, t := range map[string]time.Time{"since": o.Since, "until": o.Until} {
		if !t.IsZero() {
			q.Set(name, fmt.Sprintf("%d.%09d", t.Unix(), t.Nanosecond()))
		}
	}
	resp, err := g.Get(ctx, http.MethodGet, "/containers/"+of.Name+"/logs", q, nil)
	if err != nil {
		if serr := d.AwaitSettled(ctx); errors.Is(serr, pod.ErrNotRunning) {
			return serr // it has ended just now
		}
		return fmt.Errorf("logs of container %s: %w", of.Name, err)
	}
	defer resp.Body.Close()
	if of.TTY {
		_, err = io.Copy(o.Stdout, resp.Body)
		return err
	}
	return demux(resp.Body, o.Stdout, o.Stderr)
}

// parseTime reads what docker logs --since takes: RFC 3339 or a part of it, seconds since 1970, or a duration before now.
func parseTime(s string, now time.Time) (time.Time, error) {
	if s == "" {
		return time.Time{}, nil
	}
	if d, err := time.ParseDuration(s); err == nil {
		return now.Add(-d), nil
	}
	if whole, fraction, _ := strings.Cut(s, "."); len(fraction) <= 9 {
		seconds, err := strconv.ParseInt(whole, 10, 64)
		nanos, ferr := strconv.ParseInt((fraction + "000000000")[:9], 10, 64)
		if err == nil && ferr == nil && seconds > 9999 {
			return time.Unix(seconds, nanos), nil
		}
	}
	for _, layout := range []string{time.RFC3339Nano, "2006-01-02T15:04:05.999999999", "2006-01-02T15:04", "2006-01-02T15", "2006-01-02", "2006-01-02 15:04:05"} {
		if t, err := time.ParseInLocation(layout, s, time.Local); err == nil {
			return t, nil
		}
	}
	return time.Time{}, fmt.Errorf("%q is neither a time such as 2026-01-02T15:04:05 nor a duration such as 10m", s)
}
