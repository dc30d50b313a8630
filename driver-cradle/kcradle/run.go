package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"sync"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/cradlestack/cradlestack/driver-cradle/pod"
	"github.com/cradlestack/cradlestack/spec"
)

func (c *cli) runCommand() *cobra.Command {
	var flags podFlags
	var pull pullFlags
	var detach, remove bool
	cmd := &cobra.Command{
		Use:   "run DIR | run --rm [flags] IMAGE [COMMAND…]",
		Short: "boot a pod and become it",
		Long: `run boots the pod in DIR and becomes it: output, input, terminal and signals are the container's, and so is the exit code. SIGTERM, or Ctrl-C a second time,
stops the pod: the stop signal, then SIGKILL after the grace time; once more ends it at once. Every other signal goes to the container. With -d the pod
goes on in the background.

With --rm and an image the pod lives in a temporary directory of the cache that is removed at its end; flags are those of kcradle summon.

Exit codes are docker's: the container's, 128+n when signal n ended it, 127 when its command was not found, 126 when it can't be executed, 125 when there was
nothing to run.`,
		Args: cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			c.failure = exitRefused
			if !remove || isPod(args[0]) {
				if err := parseBehind(cmd, args[1:]); err != nil {
					return err
				}
				if err := c.notForDirectories(cmd); err != nil {
					return err
				}
				if detach && remove {
					return errKept
				}
				if detach {
					return c.runDetached(cmd.Context(), args[0], pull.quiet)
				}
				d, err := c.open(args[0])
				if err != nil {
					return err
				}
				return c.runForeground(cmd.Context(), d, pull.quiet, remove)
			}
			if detach {
				return errKept
			}
			return c.runImage(cmd, &flags, &pull, args)
		},
	}
	cmd.Flags().Bool("help", false, "help for run")
	flags.register(cmd.Flags())
	pull.register(cmd)
	cmd.Flags().BoolVarP(&detach, "detach", "d", false, "start the pod in the background and print its id")
	cmd.Flags().BoolVar(&remove, "rm", false, "remove the directory at the end")
	cmd.Flags().SetInterspersed(false)
	return cmd
}

var errKept = errors.New("-d keeps the pod, --rm removes it: summon a directory, run that with -d, and remove it with kcradle rm")

func isPod(path string) bool {
	_, err := os.Stat(filepath.Join(path, pod.LaunchFile))
	return err == nil
}

// parseBehind reads flags that stand behind the directory.
func parseBehind(cmd *cobra.Command, args []string) error {
	if err := cmd.Flags().Parse(args); err != nil {
		return err
	}
	if cmd.Flags().NArg() > 0 {
		return fmt.Errorf("%s takes one directory: its command is in %s (for an image: kcradle run --rm IMAGE COMMAND…)", cmd.Name(), pod.LaunchFile)
	}
	return nil
}

// notForDirectories refuses flags that only describe a new pod.
func (c *cli) notForDirectories(cmd *cobra.Command) error {
	var err error
	cmd.Flags().Visit(func(f *pflag.Flag) {
		switch f.Name {
		case "detach", "rm", "root", "boot", "verbose", "accel", "start", "quiet":
		default:
			err = fmt.Errorf("--%s describes a new pod: edit %s, or give it to kcradle summon", f.Name, pod.LaunchFile)
		}
	})
	return err
}

func (c *cli) runImage(cmd *cobra.Command, flags *podFlags, pull *pullFlags, args []string) (err error) {
	ctx, cancel := interruptible(cmd)
	defer cancel()
	store, err := c.store()
	if err != nil {
		return err
	}
	base, removeBase, err := store.TempDir(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, removeBase()) }()
	dir := filepath.Join(base, "pod")
	p, makes, err := c.describe(flags, dir, args[0], args[1:])
	if err != nil {
		return err
	}
	d, err := c.summon(ctx, dir, p, makes, pull, "")
	if err != nil {
		return err
	}
	return c.runForeground(cmd.Context(), d, pull.quiet, true)
}

func (c *cli) startOptions() (pod.StartOptions, error) {
	cache, err := c.cacheDir()
	return pod.StartOptions{CacheDir: cache, Boot: c.bootDir}, err
}

// runForeground becomes the pod.
func (c *cli) runForeground(ctx context.Context, d *pod.Dir, quiet, remove bool) (err error) {
	signals := make(chan os.Signal, 64)
	signal.Notify(signals)
	defer signal.Stop(signals)
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	options, err := c.startOptions()
	if err != nil {
		return err
	}
	options.Hold, options.DiscardLogs = true, remove
	bar := c.fillProgress(quiet)
	options.Progress = bar.tell()
	if launch, err := d.Launch(); err != nil {
		return err
	} else if len(launch.Containers) == 1 {
		options.Attach, options.Stdin = launch.Containers[0].Name, launch.Containers[0].OpenStdin
		if launch.Containers[0].TTY {
			options.ConsoleSize = c.terminalSize()
		}
	}
	type started struct {
		r   *pod.Running
		err error
	}
	begun := make(chan started, 1)
	go func() {
		r, err := d.Start(ctx, options)
		bar.done()
		begun <- started{r, err}
	}()
	var early []os.Signal
	var r *pod.Running
	for r == nil {
		select {
		case s := <-begun:
			if s.err != nil {
				return s.err
			}
			r = s.r
		case s := <-signals:
			switch s {
			case unix.SIGINT, unix.SIGTERM, unix.SIGHUP, unix.SIGQUIT:
				cancel(fmt.Errorf("ended by %v", s))
				if s := <-begun; s.r != nil { // it was too late
					r = s.r
					early = append(early, unix.SIGTERM)
				} else {
					return errors.Join(s.err, c.removeIf(d, remove))
				}
			}
		}
	}
	f := &foreground{cli: c, pod: r}
	var helpers sync.WaitGroup
	over := make(chan struct{})
	helpers.Go(func() {
		for _, s := range early {
			f.signal(s)
		}
		for {
			select {
			case s := <-signals:
				f.signal(s)
			case <-over:
				return
			}
		}
	})
	defer slimLater()()
	aerr := f.attach()
	r.Release()
	report, err := r.Wait(context.Background())
	close(over)
	helpers.Wait()
	f.others.Wait()
	if err == nil {
		err = aerr
	}
	if report != nil {
		if err != nil {
			fmt.Fprintln(c.stderr, "kcradle:", err)
		}
		failed := err != nil
		if err = c.tell(report); err == nil && failed {
			err = exitError(exitRefused) // the container has succeeded, and we have not
		}
	}
	return errors.Join(err, c.removeIf(d, remove))
}

func (c *cli) removeIf(d *pod.Dir, remove bool) error {
	if !remove {
		return nil
	}
	return d.Remove()
}

// tell says what a report has to say beside its exit code, which it returns.
func (c *cli) tell(r *pod.Report) error {
	switch {
	case r.Failure != "":
		return fmt.Errorf("the pod's machine ended: %s", r.Failure)
	case r.Status.Error != "":
		fmt.Fprintln(c.stderr, "kcradle:", r.Status.Error)
	}
	if r.Status.ExitCode != 0 {
		return exitError(r.Status.ExitCode)
	}
	return nil
}

// A foreground is a pod that this program has become.
type foreground struct {
	*cli
	pod    *pod.Running
	others sync.WaitGroup

	interrupts, terminations int
	terminated               time.Time
}

// attach connects our streams with the containers' until they have ended.
func (f *foreground) attach() error {
	containers := f.pod.Launch().Containers
	if len(containers) == 1 {
		return f.attachTo(&containers[0], f.stdout, f.stderr, true)
	}
	out, err := &lineMixer{w: f.stdout}, &lineMixer{w: f.stderr}
	for i := range containers {
		out.width = max(out.width, len(containers[i].Name))
	}
	err.width = out.width
	var g errgroup.Group
	for i := range containers {
		c := &containers[i]
		o, e := &prefixed{lineMixer: out, name: c.Name}, &prefixed{lineMixer: err, name: c.Name}
		g.Go(func() error {
			aerr := f.attachTo(c, o, e, false)
			return errors.Join(aerr, o.flush(), e.flush())
		})
	}
	return g.Wait()
}

func (f *foreground) attachTo(c *spec.Container, stdout, stderr io.Writer, alone bool) error {
	ctx, cancel := context.WithCancel(context.Background())
	var watcher sync.WaitGroup
	defer watcher.Wait()
	defer cancel()
	watcher.Go(func() {
		select {
		case <-f.pod.Machine().Done():
			cancel()
		case <-ctx.Done():
		}
	})
	withStdin := alone && c.OpenStdin
	path := "/containers/" + c.Name
	s := f.pod.Attached()
	if s == nil {
		var err error
		if s, err = f.pod.Guest().Hijack(ctx, path+"/attach", pod.AttachQuery(f.pod.Started(), withStdin), nil); err != nil {
			return fmt.Errorf("attach to container %s: %w", c.Name, err)
		}
	}
	defer s.Close()
	if alone && c.TTY {
		t, err := f.takeTerminal(ctx, f.pod.Guest(), path, withStdin)
		if err != nil {
			return err
		}
		defer t.giveBack()
	}
	if withStdin {
		f.feed(s)
	}
	var err error
	if c.TTY {
		_, err = io.Copy(stdout, s)
	} else {
		err = demux(s, stdout, stderr)
	}
	if errors.Is(err, unix.EPIPE) {
		// Whoever read our output has gone. As for a process of theirs, that is the end.
		f.end(1)
		return nil
	}
	if err != nil && ctx.Err() == nil {
		return fmt.Errorf("output of container %s: %w", c.Name, err)
	}
	return nil
}

// sameSignal is how soon after a SIGTERM another one is still the same request: timeout(1) sends it to the process and to its group.
const sameSignal = time.Second

// signal passes a signal on, or stops the pod.
func (f *foreground) signal(s os.Signal) {
	sig, ok := s.(syscall.Signal)
	if !ok {
		return
	}
	switch sig {
	case unix.SIGCHLD, unix.SIGURG, unix.SIGPIPE, unix.SIGWINCH:
	case unix.SIGTERM:
		if time.Since(f.terminated) < sameSignal {
			return
		}
		f.terminated = time.Now()
		f.terminations++
		f.end(f.terminations)
	case unix.SIGINT:
		f.interrupts++
		if f.interrupts > 1 {
			f.end(f.interrupts - 1)
			return
		}
		f.forward(sig)
	default:
		f.forward(sig)
	}
}

// end stops the pod, and kills it when asked again.
func (f *foreground) end(times int) {
	f.others.Go(func() {
		var err error
		if times == 1 {
			_, err = f.pod.Stop(context.Background(), nil)
		} else {
			_, err = f.pod.Kill(context.Background())
		}
		if err != nil {
			fmt.Fprintln(f.stderr, "kcradle:", err)
		}
	})
}

func (f *foreground) forward(sig syscall.Signal) {
	f.others.Go(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		if err := f.pod.Signal(ctx, "", strconv.Itoa(int(sig))); err != nil {
			select {
			case <-f.pod.Machine().Done():
			default:
				if sig == unix.SIGCONT { // it comes with SIGTERM, to whatever may be stopped
					return
				}
				fmt.Fprintf(f.stderr, "kcradle: pass on %v: %v\n", sig, err)
			}
		}
	})
}

// A lineMixer writes the lines of several containers with their names in front.
type lineMixer struct {
	mu    sync.Mutex
	w     io.Writer
	width int
}

type prefixed struct {
	*lineMixer
	name string
	line []byte
}

func (p *prefixed) Write(b []byte) (int, error) {
	p.line = append(p.line, b...)
	for {
		n, line, err := bufio.ScanLines(p.line, false)
		if n == 0 || err != nil {
			if len(p.line) < 64<<10 {
				return len(b), nil
			}
			n, line = len(p.line), p.line
		}
		if err := p.write(line); err != nil {
			return 0, err
		}
		p.line = p.line[n:]
	}
}

func (p *prefixed) write(line []byte) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	_, err := fmt.Fprintf(p.w, "%-*s | %s\n", p.width, p.name, line)
	return err
}

func (p *prefixed) flush() error {
	if len(p.line) == 0 {
		return nil
	}
	line := p.line
	p.line = nil
	return p.write(line)
}

// guestOf is the server of a pod that runs; where nobody attends to it, a monitor is started that does.
func (c *cli) guestOf(ctx context.Context, d *pod.Dir) (*pod.Guest, error) {
	pid, err := d.Attendant()
	if err != nil {
		return nil, err
	}
	if pid == 0 {
		running, err := d.Running()
		if err != nil {
			return nil, err
		}
		if !running {
			return nil, fmt.Errorf("%s: %w: kcradle run %[1]s starts it", d.Path(), pod.ErrNotRunning)
		}
		if err := c.spawnMonitor(ctx, d, nil, true); err != nil {
			// Another command may have been first, or the machine has ended just now.
			if pid, perr := d.Attendant(); perr == nil && pid == 0 {
				if running, rerr := d.Running(); rerr == nil && !running {
					err = fmt.Errorf("%s: %w", d.Path(), pod.ErrNotRunning)
				}
				return nil, err
			}
		}
	}
	if err := d.AwaitSettled(ctx); err != nil {
		return nil, err
	}
	return d.Guest(), nil
}
