package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"

	"github.com/spf13/cobra"

	"github.com/cradlestack/cradlestack/dockerapi/server"
	"github.com/cradlestack/cradlestack/internal/command"
)

// version is set by the linker.
var version = "development"

// defaultSocket is where the server listens, and what docker's context is told.
const defaultSocket = "/run/cradle/docker.sock"

// A cli is one invocation.
type cli struct {
	stdout, stderr io.Writer
}

// run executes a command line and returns the exit code.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	c := &cli{stdout: stdout, stderr: stderr}
	return command.Run(ctx, c.command(), args, stdout, stderr)
}

func (c *cli) command() *cobra.Command {
	root := command.Root("cradle-dockerapi", "docker's Engine API in front of Nomad", version)
	root.AddCommand(c.serveCommand(), c.contextCommand())
	return root
}

func (c *cli) serveCommand() *cobra.Command {
	o := options{Config: server.Config{Version: version}}
	cmd := &cobra.Command{
		Use: "serve", Short: "serve on a unix socket, and on TCP with mutual TLS", Args: cobra.NoArgs,
		Long: "Serve on a unix socket, and on TCP with mutual TLS. Nomad is found by NOMAD_ADDR, NOMAD_REGION and Nomad's other variables.",
		RunE: func(cmd *cobra.Command, _ []string) error { return c.serve(cmd.Context(), &o) },
	}
	f := cmd.Flags()
	f.StringVar(&o.socket, "socket", defaultSocket, "unix socket to listen on; empty for none")
	f.StringVar(&o.group, "socket-group", "", "group whose members may use the socket (default: only its owner, who may do what --namespace and --token-file allow)")
	f.StringVar(&o.Local.Namespace, "namespace", "default", "Nomad namespace of those who use the socket")
	f.StringVar(&o.Local.TokenFile, "token-file", "", "file with the Nomad token of those who use the socket (default: $NOMAD_TOKEN)")
	f.StringVar(&o.listen, "listen", "", "address to listen on with mutual TLS as well: 0.0.0.0:2376")
	f.StringVar(&o.tls.CA, "tls-ca", "", "PEM file of the authorities that sign clients' certificates")
	f.StringVar(&o.tls.Cert, "tls-cert", "", "PEM file of the server's certificate")
	f.StringVar(&o.tls.Key, "tls-key", "", "PEM file of its key")
	f.StringVar(&o.Clients, "clients", "", "JSON file that maps the common names of clients' certificates to namespaces and tokens; read anew when it changes")
	o.images.flags(f)
	f.StringVar(&o.VolumePlugin, "volume-plugin", server.DefaultVolumePlugin, "Nomad's CSI plugin that keeps volumes")
	f.StringVar(&o.VolumeDriver, "volume-driver", server.DefaultVolumeDriver, "driver of volumes that name none: lv2 (one container at a time), nfs or gfs (many)")
	f.BoolVar(&o.HostPaths, "host-paths", false, "let containers mount directories of their node: for a single node whose users are its operators")
	f.StringVar(&o.Pods, "pods", "", "state_dir of the task driver on this machine: what goes to a pod that is here does not go through Nomad, once Nomad has allowed it")
	f.StringVar(&o.Layouts, "image-layouts", "", "directory of OCI layouts on every node, whose names are images")
	f.BoolVar(&o.verbose, "verbose", false, "log requests that change nothing as well")
	return cmd
}

// options are serve's.
type options struct {
	server.Config
	socket, group, listen string
	tls                   server.TLSFiles
	images                imageOptions
	verbose               bool
}

func (c *cli) serve(ctx context.Context, o *options) error {
	level := slog.LevelInfo
	if o.verbose {
		level = slog.LevelDebug
	}
	o.Log = slog.New(slog.NewTextHandler(c.stderr, &slog.HandlerOptions{Level: level}))
	if o.socket == "" && o.listen == "" {
		return errors.New("nothing to listen on: give --socket or --listen")
	}
	images, err := o.images.open(ctx, o)
	if err != nil {
		return err
	}
	defer images.close()
	o.Registry, o.RegistryHost = images.registry, images.host
	s, err := server.New(o.Config)
	if err != nil {
		return err
	}
	defer s.Close()
	var listeners []net.Listener
	closeAll := func() {
		for _, l := range listeners {
			l.Close()
		}
	}
	if o.socket != "" {
		l, err := server.ListenUnix(o.socket, o.group)
		if err != nil {
			return fmt.Errorf("--socket: %w", err)
		}
		listeners = append(listeners, l)
	}
	if o.listen != "" {
		if o.Clients == "" {
			closeAll()
			return errors.New("--listen needs --clients: who is to have which namespace")
		}
		l, err := server.ListenTLS(o.listen, o.tls)
		if err != nil {
			closeAll()
			return fmt.Errorf("--listen: %w", err)
		}
		listeners = append(listeners, l)
	}
	for _, l := range listeners {
		o.Log.Info("serving", "network", l.Addr().Network(), "address", l.Addr().String(), "version", version)
	}
	return s.Serve(ctx, listeners...)
}

func (c *cli) contextCommand() *cobra.Command {
	var o contextOptions
	cmd := &cobra.Command{
		Use: "context NAME", Short: "print what docker context import takes", Args: cobra.ExactArgs(1),
		Example: "  cradle-dockerapi context cradle | docker context import cradle -\n" +
			"  cradle-dockerapi context cloud --host tcp://cloud.example.org:2376 --tls-ca ca.pem --tls-cert me.pem --tls-key me.key >cloud.tar",
		RunE: func(_ *cobra.Command, args []string) error {
			if err := writeContext(c.stdout, args[0], o); err != nil {
				return fmt.Errorf("context %s: %w", args[0], err)
			}
			return nil
		},
	}
	f := cmd.Flags()
	f.StringVar(&o.host, "host", "unix://"+defaultSocket, "where clients find the server: unix:///path, or tcp://host:port with the three files")
	f.StringVar(&o.tls.CA, "tls-ca", "", "PEM file of the authority that has signed the server's certificate")
	f.StringVar(&o.tls.Cert, "tls-cert", "", "PEM file of the client's certificate")
	f.StringVar(&o.tls.Key, "tls-key", "", "PEM file of its key")
	return cmd
}
