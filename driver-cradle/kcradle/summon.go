package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"golang.org/x/sys/unix"

	"github.com/cradlestack/cradlestack/driver-cradle/image"
	"github.com/cradlestack/cradlestack/driver-cradle/pod"
	"github.com/cradlestack/cradlestack/spec"
)

// pullFlags say how images are fetched.
type pullFlags struct {
	always   bool
	insecure []string
	mirrors  []string
	platform string
	quiet    bool
}

func (p *pullFlags) register(cmd *cobra.Command) {
	f := cmd.Flags()
	f.BoolVar(&p.always, "pull", false, "ask the registry also when the image is in the cache")
	f.StringArrayVar(&p.insecure, "insecure-registry", nil, "`host[:port]` that may be asked without TLS")
	f.StringArrayVar(&p.mirrors, "registry-mirror", nil, "`host[:port][/prefix]` that is asked for docker.io's images first; http:// in front: without TLS")
	f.StringVar(&p.platform, "platform", "", "`os/arch[/variant]` (default: the host's)")
	f.BoolVarP(&p.quiet, "quiet", "q", false, "no progress")
}

func (p *pullFlags) options(progress func(image.Progress)) image.PullOptions {
	return image.PullOptions{Force: p.always, Insecure: p.insecure, Mirrors: map[string][]string{"docker.io": p.mirrors}, Platform: p.platform, Progress: progress}
}

// interruptible gives a context that ends with Ctrl-C and the other signals that ask for an end.
func interruptible(cmd *cobra.Command) (context.Context, context.CancelFunc) {
	ends := []os.Signal{os.Interrupt, unix.SIGTERM, unix.SIGQUIT}
	if !signal.Ignored(unix.SIGHUP) { // as under nohup
		ends = append(ends, unix.SIGHUP)
	}
	return signal.NotifyContext(cmd.Context(), ends...)
}

func (c *cli) summonCommand() *cobra.Command {
	var flags podFlags
	var pull pullFlags
	var file, id string
	cmd := &cobra.Command{
		Use:   "summon DIR IMAGE [flags] [-- COMMAND…]",
		Short: "prepare a pod directory",
		Long: `summon makes the directory DIR, which holds everything that a pod needs: launch.json, links to the image's layers in the cache, the writable disk, a link to
the boot package. It is made to be read and edited; kcradle run boots it.

IMAGE is a registry reference (debian:12, with the credentials that docker has), docker-daemon:NAME, docker-archive:FILE or oci:DIR. What
follows -- replaces the image's command. With -f FILE the pod is read from a JSON file, which may have several containers.

` + volumesHelp,
		Args: func(cmd *cobra.Command, args []string) error {
			switch {
			case file != "" && len(args) == 1, file == "" && len(args) >= 2:
				return nil
			case file != "":
				return errors.New("summon -f FILE takes the directory only: kcradle summon DIR -f FILE")
			}
			return errors.New("name a directory and an image: kcradle summon DIR IMAGE [-- COMMAND…]")
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx, cancel := interruptible(cmd)
			defer cancel()
			var p *spec.Pod
			var makes []func() error
			var err error
			if args[0] == "" {
				return errNameless
			}
			if file != "" {
				if err := notBesideFile(cmd); err != nil {
					return err
				}
				p, err = readPod(file)
			} else {
				p, makes, err = c.describe(&flags, args[0], args[1], args[2:])
			}
			if err != nil {
				return err
			}
			_, err = c.summon(ctx, args[0], p, makes, &pull, id)
			return err
		},
	}
	cmd.Flags().Bool("help", false, "help for summon") // -h is the host name, as with docker
	flags.register(cmd.Flags())
	pull.register(cmd)
	cmd.Flags().StringVarP(&file, "file", "f", "", "read the pod from a JSON `file` (docs/launch-spec.md, Pod)")
	cmd.Flags().StringVar(&id, "id", "", "`id` of the pod, 64 hexadecimal digits (default: random)")
	return cmd
}

// notBesideFile refuses flags that describe what the file describes.
func notBesideFile(cmd *cobra.Command) error {
	var err error
	cmd.Flags().Visit(func(f *pflag.Flag) {
		switch f.Name {
		case "file", "id", "pull", "insecure-registry", "registry-mirror", "platform", "quiet", "root", "boot", "verbose":
		default:
			err = fmt.Errorf("-f and --%s exclude each other: write it into the file (docs/launch-spec.md, Pod)", f.Name)
		}
	})
	return err
}

func readPod(file string) (*spec.Pod, error) {
	data, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	return spec.ParsePod(file, data)
}

// describe makes a Pod of the command line; makes are the directories and images that it asks to make.
func (c *cli) describe(flags *podFlags, dir, image string, command []string) (p *spec.Pod, makes []func() error, err error) {
	path, err := filepath.Abs(dir)
	if err != nil {
		return nil, nil, err
	}
	if p, makes, err = flags.pod(nameOf(filepath.Base(path)), image, command); err != nil {
		return nil, nil, err
	}
	return p, makes, p.Validate()
}

// summon makes the pod, and then, when there is nothing left that may fail for want of an image, what makes say.
func (c *cli) summon(ctx context.Context, dir string, p *spec.Pod, makes []func() error, pull *pullFlags, id string) (*pod.Dir, error) {
	pkg, err := c.findBoot()
	if err != nil {
		return nil, err
	}
	store, err := c.store()
	if err != nil {
		return nil, err
	}
	bar := c.progress(pull.quiet)
	defer bar.done()
	d, err := pod.Summon(ctx, dir, p, pod.SummonOptions{Images: store, Boot: pkg, Pull: pull.options(bar.update), ID: id, Log: c.log()})
	if err != nil {
		return nil, fmt.Errorf("summon %s: %w", dir, err)
	}
	for _, f := range makes {
		if err := f(); err != nil {
			return nil, errors.Join(fmt.Errorf("summon %s: %w", dir, err), d.Remove())
		}
	}
	return d, nil
}
