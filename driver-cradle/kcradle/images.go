package main

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/cradlestack/cradlestack/driver-cradle/boot"
	"github.com/cradlestack/cradlestack/driver-cradle/image"
	"github.com/cradlestack/cradlestack/driver-cradle/pod"
	"github.com/cradlestack/cradlestack/spec"
)

func (c *cli) imagesCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "images", Short: "list, fetch and remove images in the cache", Aliases: []string{"image"}}
	cmd.AddCommand(c.imagesList(), c.imagesPull(), c.imagesRemove(), c.imagesGC())
	return cmd
}

// An imageInfo is what images ls shows; as JSON it is stable.
type imageInfo struct {
	Reference string     `json:"reference"`
	ID        string     `json:"id"`
	Digest    string     `json:"digest,omitempty"`
	Platform  string     `json:"platform"`
	Layers    int        `json:"layers"`
	Size      spec.Bytes `json:"size"`
	Created   time.Time  `json:"created,omitzero"`
	Used      time.Time  `json:"used"`
}

func describeImage(img *image.Image) imageInfo {
	return imageInfo{img.Reference, img.ID, img.Digest, img.Platform, len(img.Layers), spec.Bytes(img.Size), img.Created, img.Used}
}

func (c *cli) imagesList() *cobra.Command {
	cmd := &cobra.Command{Use: "ls", Short: "list the images in the cache, the one used last first", Args: cobra.NoArgs}
	asJSON := outputFlag(cmd)
	cmd.RunE = func(*cobra.Command, []string) error {
		wantJSON, err := asJSON()
		if err != nil {
			return err
		}
		store, err := c.store()
		if err != nil {
			return err
		}
		list, err := store.List()
		if err != nil {
			return err
		}
		infos := []imageInfo{}
		for _, img := range list {
			infos = append(infos, describeImage(img))
		}
		if wantJSON {
			return c.printJSON(infos)
		}
		w := tabwriter.NewWriter(c.stdout, 0, 8, 3, ' ', 0)
		fmt.Fprintln(w, "IMAGE\tID\tPLATFORM\tLAYERS\tSIZE\tUSED")
		for _, i := range infos {
			fmt.Fprintf(w, "%s\t%s\t%s\t%d\t%s\t%s ago\n", i.Reference, short(i.ID), i.Platform, i.Layers, people(int64(i.Size)), since0(i.Used))
		}
		return w.Flush()
	}
	return cmd
}

func short(digest string) string {
	hex := strings.TrimPrefix(digest, "sha256:")
	return hex[:min(12, len(hex))]
}

// people writes a size for people: 12.3 MB.
func people(n int64) string {
	const k = 1000
	f, unit := float64(n), ""
	for _, u := range []string{"k", "M", "G", "T"} {
		if f < k {
			break
		}
		f, unit = f/k, u
	}
	if unit == "" {
		return fmt.Sprintf("%d B", n)
	}
	return fmt.Sprintf("%.1f %sB", f, unit)
}

func (c *cli) imagesPull() *cobra.Command {
	var pull pullFlags
	cmd := &cobra.Command{
		Use:   "pull IMAGE…",
		Short: "bring images into the cache",
		Args:  cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx, cancel := interruptible(cmd)
			defer cancel()
			store, err := c.store()
			if err != nil {
				return err
			}
			for _, ref := range args {
				bar := c.progress(pull.quiet)
				o := pull.options(bar.update)
				o.Force = true
				img, err := store.Pull(ctx, ref, o)
				bar.done()
				if err != nil {
					return err
				}
				fmt.Fprintln(c.stdout, img.ID)
			}
			return nil
		},
	}
	pull.register(cmd)
	cmd.Flags().MarkHidden("pull")
	return cmd
}

func (c *cli) imagesRemove() *cobra.Command {
	return &cobra.Command{
		Use:   "rm IMAGE…",
		Short: "remove images, by reference or id, and the layers that nothing else needs",
		Args:  cobra.MinimumNArgs(1),
		RunE: func(_ *cobra.Command, args []string) error {
			store, err := c.store()
			if err != nil {
				return err
			}
			var errs []error
			for _, ref := range args {
				errs = append(errs, store.Remove(ref))
			}
			return errors.Join(errs...)
		},
	}
}

func (c *cli) imagesGC() *cobra.Command {
	var o image.GCOptions
	var size string
	cmd := &cobra.Command{
		Use:   "gc",
		Short: "remove images that were not used for long, and what nothing refers to",
		Long:  "gc removes layers that no image and no pod directory needs, and what killed processes have left. With --unused or --keep it removes images as well, never those of a pod directory.",
		Args:  cobra.NoArgs,
	}
	asJSON := outputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		wantJSON, err := asJSON()
		if err != nil {
			return err
		}
		var keep spec.Bytes
		if err := parseSize("keep", size, &keep); err != nil {
			return err
		}
		o.MaxSize = int64(keep)
		store, err := c.store()
		if err != nil {
			return err
		}
		ctx, cancel := interruptible(cmd)
		defer cancel()
		report, err := store.GC(ctx, o)
		if err != nil {
			return err
		}
		if wantJSON {
			return c.printJSON(struct {
				Images []string   `json:"images"`
				Layers []string   `json:"layers"`
				Freed  spec.Bytes `json:"freed"`
				Kept   spec.Bytes `json:"kept"`
			}{append([]string{}, report.Images...), append([]string{}, report.Layers...), spec.Bytes(report.Freed), spec.Bytes(report.Kept)})
		}
		for _, ref := range report.Images {
			fmt.Fprintln(c.stdout, ref)
		}
		fmt.Fprintf(c.stdout, "%d images, %d layers: %s freed, %s kept\n", len(report.Images), len(report.Layers), people(report.Freed), people(report.Kept))
		return nil
	}
	cmd.Flags().DurationVar(&o.MaxAge, "unused", 0, "remove images that were not used for so long: 720h")
	cmd.Flags().StringVar(&size, "keep", "", "remove images, the least recently used first, until the rest takes at most so much: 20GB")
	cmd.Flags().BoolVar(&o.DryRun, "dry-run", false, "only tell")
	return cmd
}

func (c *cli) verifyCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "verify DIR…",
		Short: "check a pod's layers and boot package against their digests",
		Args:  cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx, cancel := interruptible(cmd)
			defer cancel()
			return c.each(args, func(d *pod.Dir) error { return c.verify(ctx, d) })
		},
		ValidArgsFunction: completePods,
	}
}

func (c *cli) verify(ctx context.Context, d *pod.Dir) error {
	launch, err := d.Launch()
	if err != nil {
		return err
	}
	var errs []error
	seen := map[string]bool{}
	for _, container := range launch.Containers {
		for _, l := range container.Layers {
			if seen[l.DiffID] {
				continue
			}
			seen[l.DiffID] = true
			errs = append(errs, image.VerifyLayer(ctx, filepath.Join(d.Path(), l.File), l.DiffID))
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
		}
	}
	p, err := boot.Open(d.BootPackage())
	if err == nil {
		err = p.Verify()
	}
	if err := errors.Join(append(errs, err)...); err != nil {
		return err
	}
	_, err = fmt.Fprintf(c.stdout, "%s: %d layers and boot package %s are as they were made\n", d.Path(), len(seen), short(p.Digest))
	return err
}
