package main

import (
	"cmp"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/cradlestack/cradlestack/csi-plugin/filer/api"
	"github.com/cradlestack/cradlestack/internal/command"
)

// version is set by the linker.
var version = "development"

// A cli is one invocation.
type cli struct {
	stdout, stderr io.Writer

	socket    string
	address   string
	keyFile   string
	url       string
	namespace string
	output    string
}

// run executes a command line and returns the exit code.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	c := &cli{stdout: stdout, stderr: stderr}
	return command.Run(ctx, c.command(), args, stdout, stderr)
}

func (c *cli) command() *cobra.Command {
	root := command.Root("cradle-filer", "serve file volumes over NFS, WebDAV and S3", version)
	root.PersistentFlags().StringVar(&c.socket, "socket", cmp.Or(os.Getenv("CRADLE_FILER_SOCKET"), api.Socket), "unix socket that the filer is controlled by ($CRADLE_FILER_SOCKET)")
	root.PersistentFlags().StringVar(&c.address, "filer", os.Getenv("CRADLE_FILER"), "HOST:PORT of any filer of a set, such as files.service.consul:"+api.PeersPort+", instead of the socket; it takes --filer-key ($CRADLE_FILER)")
	root.PersistentFlags().StringVar(&c.keyFile, "filer-key", os.Getenv("CRADLE_FILER_KEY"), "file with the key of the set that --filer is of: handles.key of its state directory ($CRADLE_FILER_KEY)")
	root.AddCommand(c.serveCommand(), c.publishCommand(), c.unpublishCommand(), c.publicationsCommand(),
		c.grantCommand(), c.revokeCommand(), c.grantsCommand(), c.statusCommand(), c.switchCommand(), c.wardenCommand(),
		c.snapshotCommand(), c.snapshotsCommand(), c.scheduleCommand(), c.rollbackCommand(), c.diffCommand())
	return root
}

func (c *cli) filer() api.Client {
	return api.Client{Socket: c.socket, Address: c.address, KeyFile: c.keyFile}
}

// volumes is the filer for what users do: root by its socket, others by its API.
func (c *cli) volumes() api.Client {
	return api.Client{Socket: c.socket, Address: c.address, KeyFile: c.keyFile, URL: c.url, Token: os.Getenv("NOMAD_TOKEN"), Namespace: c.namespace}
}

func (c *cli) formatFlag(cmd *cobra.Command) {
	cmd.Flags().StringVarP(&c.output, "output", "o", "", "json: for machines")
}

// print writes v as JSON where that was asked for, else what text does.
func (c *cli) print(v any, text func(w io.Writer)) error {
	switch c.output {
	case "json":
		e := json.NewEncoder(c.stdout)
		e.SetIndent("", "  ")
		return e.Encode(v)
	case "":
		w := tabwriter.NewWriter(c.stdout, 0, 0, 2, ' ', 0)
		text(w)
		return w.Flush()
	}
	return fmt.Errorf("--output %s: there is only json", c.output)
}

func (c *cli) publishCommand() *cobra.Command {
	var p api.Publication
	var clients []string
	cmd := &cobra.Command{
		Use: "publish VOLUME", Short: "let clients mount a volume, and say how", Args: cobra.ExactArgs(1),
		Long: `Let the clients at some addresses mount a volume. What is printed has the path to mount, which holds a secret: whoever knows it and
is at one of the addresses has the volume. Nomad's volumes with attach=direct are published by cradle-csi.`,
		RunE: func(cmd *cobra.Command, args []string) error {
			p.Volume = args[0]
			if p.ID == "" {
				p.ID = "manual-" + strings.ToLower(rand.Text()[:12])
			}
			for _, text := range clients {
				prefix, err := parseClient(text)
				if err != nil {
					return err
				}
				p.Clients = append(p.Clients, prefix)
			}
			p, err := c.filer().Publish(cmd.Context(), p)
			if err != nil {
				return err
			}
			return c.print(p, func(w io.Writer) {
				fmt.Fprintf(w, "publication\t%s\n", p.ID)
				host, port, _ := net.SplitHostPort(p.Address)
				if strings.Contains(host, ":") { // of IPv6
					host = "[" + host + "]"
				}
				ports := "port=" + port
				if strings.HasPrefix(p.Options, "vers=3") {
					ports += ",mountport=" + port
				}
				fmt.Fprintf(w, "a host\tmount -t nfs -o %s,%s %s:%s DIRECTORY\n", p.Options, ports, host, p.Export)
				fmt.Fprintf(w, "a pod\tkcradle summon --mount 'type=nfs,source=nfs://%s%s,target=PATH,\"options=%s\"' …\n", p.Address, p.Export, p.Options) // of CSV, in which options are one field
			})
		},
	}
	f := cmd.Flags()
	f.StringVar(&p.ID, "id", "", "name of the publication: published again under it, it stays the same (default a new one)")
	f.BoolVar(&p.ReadOnly, "read-only", false, "nothing can be changed through it")
	f.StringArrayVar(&clients, "client", nil, "address or network (10.1.0.0/16) from which it can be mounted; more than once")
	c.formatFlag(cmd)
	cmd.MarkFlagRequired("client")
	return cmd
}

// parseClient reads an address or a network.
func parseClient(text string) (netip.Prefix, error) {
	if a, err := netip.ParseAddr(text); err == nil {
		return netip.PrefixFrom(a, a.BitLen()), nil
	}
	p, err := netip.ParsePrefix(text)
	if err != nil {
		return p, fmt.Errorf("--client %s: it is neither an address nor a network such as 10.1.0.0/16", text)
	}
	return p.Masked(), nil
}

func (c *cli) unpublishCommand() *cobra.Command {
	return &cobra.Command{
		Use: "unpublish PUBLICATION…", Short: "end publications: their clients see nothing any more", Args: cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			var errs []error
			for _, id := range args {
				errs = append(errs, c.filer().Unpublish(cmd.Context(), id))
			}
			return errors.Join(errs...)
		},
	}
}

func (c *cli) publicationsCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use: "publications", Short: "list who may mount what", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			all, err := c.filer().Publications(cmd.Context())
			if err != nil {
				return err
			}
			return c.print(all, func(w io.Writer) {
				fmt.Fprintln(w, "PUBLICATION\tVOLUME\tACCESS\tCLIENTS")
				for _, p := range all {
					fmt.Fprintf(w, "%s\t%s\t%s\t%s\n", p.ID, p.Volume, access(p.ReadOnly), join(p.Clients))
				}
			})
		},
	}
	c.formatFlag(cmd)
	return cmd
}

func access(readOnly bool) string {
	if readOnly {
		return "read-only"
	}
	return "read-write"
}

func join(clients []netip.Prefix) string {
	var all []string
	for _, p := range clients {
		all = append(all, p.String())
	}
	return strings.Join(all, " ")
}

func (c *cli) statusCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use: "status", Short: "say how the filer does", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			s, err := c.filer().Status(cmd.Context())
			if err != nil {
				return err
			}
			return c.print(s, func(w io.Writer) {
				state := "serving"
				if s.Set != nil {
					state = printSet(w, *s.Set)
				}
				fmt.Fprintf(w, "%s\tsince %s, for %s\n", state, s.Since.UTC().Format(time.RFC3339), time.Since(s.Since).Round(time.Second))
				fmt.Fprintf(w, "address\t%s\n", s.Address)
				if s.Engine != "" {
					fmt.Fprintf(w, "engine\t%s\n", s.Engine)
				}
				if s.WebDAV != "" {
					fmt.Fprintf(w, "webdav\t%s\n", s.WebDAV)
				}
				if s.S3 != "" {
					fmt.Fprintf(w, "s3\t%s\n", s.S3)
				}
				fmt.Fprintf(w, "volumes\t%d, published %d times, granted %d times\n", s.Volumes, s.Publications, s.Grants)
				fmt.Fprintf(w, "version\t%s\n", s.Version)
			})
		},
	}
	c.formatFlag(cmd)
	return cmd
}

// printSet prints how a set does, and returns what this member of it is doing.
func printSet(w io.Writer, s api.Set) (state string) {
	fmt.Fprintf(w, "set\t%s\n", s.Name)
	switch {
	case s.Active == "":
		fmt.Fprintf(w, "active\tnone\n")
	case s.Serving:
		fmt.Fprintf(w, "active\t%s, since %s, as %s\n", s.Active, s.ActiveSince.UTC().Format(time.RFC3339), s.Why)
	default:
		fmt.Fprintf(w, "active\t%s, which answers nobody yet, as %s\n", s.Active, s.Why)
	}
	fmt.Fprintf(w, "standing by\t%s\n", cmp.Or(strings.Join(s.Standby, " "), "none"))
	if s.Waits != "" {
		fmt.Fprintf(w, "waits for\t%s\n", s.Waits)
	}
	if s.Consul != "" {
		fmt.Fprintf(w, "Consul\t%s\n", s.Consul)
	}
	if s.Member == s.Active {
		return s.Member + " active"
	}
	return s.Member + " standing by"
}

func (c *cli) switchCommand() *cobra.Command {
	return &cobra.Command{
		Use: "switch", Short: "have another filer of the set take over, such as before maintenance", Args: cobra.NoArgs,
		Long: `Have another filer of the set take over from the active one; any of them can be asked. Calls that have begun are answered before; clients go on with the other one.
It returns when that serves.`,
		RunE: func(cmd *cobra.Command, _ []string) error { return c.filer().Switch(cmd.Context()) },
	}
}
