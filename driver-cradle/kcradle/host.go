package main

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/cradlestack/cradlestack/driver-cradle/boot"
	"github.com/cradlestack/cradlestack/driver-cradle/network"
	"github.com/cradlestack/cradlestack/driver-cradle/vmm"
	"github.com/cradlestack/cradlestack/spec"
)

func (c *cli) versionCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "version",
		Short: "show this program's version",
		Args:  cobra.NoArgs,
		Run: func(*cobra.Command, []string) {
			fmt.Fprintf(c.stdout, "kcradle %s (%s %s/%s)\n", version, runtime.Version(), runtime.GOOS, runtime.GOARCH)
		},
	}
}

func (c *cli) templateCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "template", Short: "make, list and remove the saved machines that pods start from", Aliases: []string{"templates"}}
	cmd.AddCommand(c.templateBuild(), c.templateList(), c.templateRemove(), c.templateGC())
	return cmd
}

func (c *cli) templates() (*vmm.Templates, string, error) {
	cache, err := c.cacheDir()
	if err != nil {
		return nil, "", err
	}
	return vmm.OpenTemplates(cache, c.log()), cache, nil
}

func (c *cli) templateBuild() *cobra.Command {
	var memory, accel string
	var cpus int
	cmd := &cobra.Command{
		Use:   "build",
		Short: "make the template for pods of a size, unless it is there",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx, cancel := interruptible(cmd)
			defer cancel()
			pkg, err := c.findBoot()
			if err != nil {
				return err
			}
			t, cache, err := c.templates()
			if err != nil {
				return err
			}
			config := vmm.Config{Package: pkg, Accel: accel, CPUs: cpus, Memory: spec.DefaultMemory, CacheDir: cache, Net: vmm.Net{Mode: vmm.NetUser}, Log: c.log()}
			if err := parseSize("memory", memory, &config.Memory); err != nil {
				return err
			}
			info, err := t.Build(ctx, config)
			if err != nil {
				return err
			}
			fmt.Fprintln(c.stdout, info.Name)
			return nil
		},
	}
	cmd.Flags().StringVarP(&memory, "memory", "m", "", fmt.Sprintf("what the containers of the pods use (default %v)", spec.DefaultMemory))
	cmd.Flags().IntVar(&cpus, "cpus", 1, "processors of the pods")
	cmd.Flags().StringVar(&accel, "accel", "auto", "accelerator: auto, kvm, tcg")
	return cmd
}

func (c *cli) templateList() *cobra.Command {
	cmd := &cobra.Command{Use: "ls", Short: "list the templates", Args: cobra.NoArgs}
	asJSON := outputFlag(cmd)
	cmd.RunE = func(*cobra.Command, []string) error {
		wantJSON, err := asJSON()
		if err != nil {
			return err
		}
		t, _, err := c.templates()
		if err != nil {
			return err
		}
		list, err := t.List()
		if err != nil {
			return err
		}
		if wantJSON {
			return c.printJSON(append([]vmm.TemplateInfo{}, list...))
		}
		w := tabwriter.NewWriter(c.stdout, 0, 8, 3, ' ', 0)
		fmt.Fprintln(w, "TEMPLATE\tMEMORY\tCPUS\tACCEL\tPACKAGE\tSIZE\tUSED")
		for _, i := range list {
			fmt.Fprintf(w, "%s\t%v\t%d\t%s\t%s\t%s\t%s ago\n", i.Name, i.Key.Memory, i.Key.CPUs, i.Key.Accel, short(i.Key.Package), people(i.RAMBytes), since0(i.Used))
		}
		return w.Flush()
	}
	return cmd
}

func (c *cli) templateRemove() *cobra.Command {
	return &cobra.Command{
		Use:   "rm TEMPLATE…",
		Short: "remove templates; pods that run go on",
		Args:  cobra.MinimumNArgs(1),
		RunE: func(_ *cobra.Command, args []string) error {
			t, _, err := c.templates()
			if err != nil {
				return err
			}
			var errs []error
			for _, name := range args {
				errs = append(errs, t.Remove(name))
			}
			return errors.Join(errs...)
		},
	}
}

func (c *cli) templateGC() *cobra.Command {
	var unused time.Duration
	var keep string
	cmd := &cobra.Command{
		Use:   "gc",
		Short: "remove templates that were not used for long, and what killed processes have left",
		Args:  cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			t, _, err := c.templates()
			if err != nil {
				return err
			}
			limit := vmm.Limit{Unused: unused}
			var size spec.Bytes
			if err := parseSize("keep", keep, &size); err != nil {
				return err
			}
			limit.Bytes = int64(size)
			removed, err := t.GC(limit)
			for _, name := range removed {
				fmt.Fprintln(c.stdout, name)
			}
			return err
		},
	}
	cmd.Flags().DurationVar(&unused, "unused", 30*24*time.Hour, "remove those that were not used for so long")
	cmd.Flags().StringVar(&keep, "keep", "", "remove the least recently used until the rest takes at most so much: 2GB")
	return cmd
}

func (c *cli) bootCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "boot", Short: "make and check boot packages: the guest's kernel and agent"}
	var o boot.BuildOptions
	build := &cobra.Command{
		Use:   "build --kernel FILE --agent FILE DIR",
		Short: "make a boot package",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx, cancel := interruptible(cmd)
			defer cancel()
			o.Out = args[0]
			return boot.Build(ctx, o)
		},
	}
	f := build.Flags()
	f.StringVar(&o.Variant, "variant", boot.VariantDefault, "default: own kernel, stock: the distribution's")
	f.StringVar(&o.Kernel, "kernel", "", "vmlinux with a PVH entry; stock: vmlinuz")
	f.StringVar(&o.Agent, "agent", "", "the static program cradle-init")
	f.StringVar(&o.Modules, "modules", "", "stock: /lib/modules/VERSION of that kernel")
	build.MarkFlagRequired("kernel")
	build.MarkFlagRequired("agent")
	verify := &cobra.Command{
		Use:   "verify [DIR]",
		Short: "check a boot package against its manifest",
		Args:  cobra.MaximumNArgs(1),
		RunE: func(_ *cobra.Command, args []string) error {
			if len(args) == 1 {
				c.bootDir = args[0]
			}
			p, err := c.findBoot()
			if err == nil {
				err = p.Verify()
			}
			if err == nil {
				fmt.Fprintf(c.stdout, "%s: %s %s\n", p.Dir, p.Manifest.Variant, p.Digest)
			}
			return err
		},
	}
	cmd.AddCommand(build, verify)
	return cmd
}

// A finding is one thing that doctor looked at.
type finding struct {
	What   string `json:"what"`
	OK     bool   `json:"ok"`
	Detail string `json:"detail"`
	Remedy string `json:"remedy,omitempty"`
}

func (c *cli) doctorCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "doctor", Short: "tell what this host has for running pods, and what is missing", Args: cobra.NoArgs}
	asJSON := outputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		wantJSON, err := asJSON()
		if err != nil {
			return err
		}
		findings := c.examine(cmd.Context())
		if wantJSON {
			err = c.printJSON(findings)
		} else {
			w := tabwriter.NewWriter(c.stdout, 0, 8, 2, ' ', 0)
			for _, f := range findings {
				mark := "ok"
				if !f.OK {
					mark = "!!"
				}
				fmt.Fprintf(w, "%s\t%s\t%s\n", mark, f.What, f.Detail)
				if f.Remedy != "" {
					fmt.Fprintf(w, "\t\t%s\n", f.Remedy)
				}
			}
			err = w.Flush()
		}
		for _, f := range findings {
			if !f.OK && err == nil {
				err = exitError(exitFailure)
			}
		}
		return err
	}
	return cmd
}

func (c *cli) examine(ctx context.Context) []finding {
	var all []finding
	add := func(what, detail string, err error, remedy string) {
		f := finding{What: what, OK: err == nil, Detail: detail}
		if err != nil {
			f.Detail, f.Remedy = err.Error(), remedy
		}
		all = append(all, f)
	}
	add("user", "root", vmm.NeedRoot(), "")

	cache, err := c.cacheDir()
	detail := cache
	if err == nil {
		err = unix.Access(cache, unix.W_OK)
		var st unix.Statfs_t
		if err == nil && unix.Statfs(cache, &st) == nil {
			detail = fmt.Sprintf("%s, %s free", cache, people(int64(st.Bavail)*st.Bsize))
		}
	}
	add("cache", detail, err, "name another directory with --root or $CRADLE_ROOT")

	path, qemu, err := vmm.FindQEMU(ctx, cache)
	add("qemu", fmt.Sprintf("%s, %s", qemu, path), err, "")
	accel, why, err := vmm.Accelerator(vmm.Auto, cache)
	detail = accel + reason(why)
	add("accelerator", detail, err, "")

	p, err := c.findBoot()
	if err == nil {
		detail, err = fmt.Sprintf("%s: %s, %s", p.Dir, p.Manifest.Variant, short(p.Digest)), p.Verify()
	}
	add("boot package", detail, err, "")
	unshared, err := network.Probe()
	if err == nil && unshared != nil {
		err = fmt.Errorf("in a network namespace that a pod takes over, all other processes would be cut off: %w", unshared)
	}
	add("network namespaces", "shared by pods and other processes", err, "modprobe tun sch_ingress cls_bpf; without cls_bpf: modprobe cls_u32 act_mirred")

	t := vmm.OpenTemplates(cache, c.log())
	list, err := t.List()
	add("templates", fmt.Sprint(len(list)), err, "kcradle template gc")
	return all
}
