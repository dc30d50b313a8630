package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/hashicorp/nomad/api"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/cradlestack/cradlestack/csi-plugin/rpc"
	"github.com/cradlestack/cradlestack/csi-plugin/volume"
)

func (c *cli) lv2Command() *cobra.Command {
	cmd := &cobra.Command{Use: "lv2", Short: "bring a block volume back whose host is lost"}
	cmd.AddCommand(c.lv2RestoreCommand(), c.lv2ReceiveCommand(), c.lv2DiscardCommand())
	return cmd
}

func (c *cli) lv2RestoreCommand() *cobra.Command {
	r := &restore{c: c}
	cmd := &cobra.Command{
		Use: "restore VOLUME --to NODE", Short: "make the newest copy of a volume the volume, on another node", Args: cobra.ExactArgs(1),
		Long: `Make the newest copy of a volume in cold storage the volume, on another node: there it is received, then Nomad is told that it is there, and jobs
that use it are placed anew. The former one can't be attached any more, should its host come back. What was written after the copy was taken is lost.

Interrupted, the same command goes on where it was. Nomad's address and token are in NOMAD_ADDR, NOMAD_TOKEN and so on; cold storage is what the plugin
on the node has. A volume that an allocation uses on a node that is up is refused.`,
		RunE: func(cmd *cobra.Command, args []string) error { return r.run(cmd.Context(), args[0]) },
	}
	f := cmd.Flags()
	f.StringVar(&r.to, "to", "", "the node, by name")
	f.StringVar(&r.into, "into", "", "name of its pool (default: the first)")
	f.StringVar(&r.namespace, "namespace", env("NOMAD_NAMESPACE", api.DefaultNamespace), "the volume's namespace ($NOMAD_NAMESPACE)")
	_ = cmd.MarkFlagRequired("to")
	return cmd
}

// A restore of a volume on another node.
type restore struct {
	c                   *cli
	to, into, namespace string
}

func (r *restore) run(ctx context.Context, id string) error {
	n, err := openNomad(r.c, r.namespace)
	if err != nil {
		return err
	}
	defer n.client.Close()
	p, err := n.placeAt(ctx, r.to, "", "")
	if err != nil {
		return err
	}
	now, err := n.registered(ctx, id)
	if err != nil {
		return err
	}
	var o owner
	if now == nil {
		o, err = n.forgotten(ctx, p.alloc.Namespace, id)
	} else {
		o, err = readOwner(ctx, n.client, p.alloc.Namespace, stored(now, id))
	}
	if err != nil {
		return err
	}
	want := p.has(cmp.Or(now, o.volume))
	if err := volume.CheckName("volume "+id+": what the plugin calls it", stored(want, id)); err != nil { // it becomes an argument
		return err
	}
	if class := classOf(want); class != volume.LV2 {
		return fmt.Errorf("volume %s: it is of class %s; cold storage has block volumes, lv2", id, class)
	}
	restored := now != nil && now.PluginID == p.plugin && o.Node == p.node.Name // by a call before
	if !restored {
		err = n.unused(ctx, now)
	}
	if err == nil && now != nil && !restored {
		err = n.sole(ctx, now, func(other *api.CSIVolumeListStub) bool { return other.PluginID == p.plugin && o.Node == p.node.Name })
	}
	if err != nil {
		return err
	}
	generation, written := o.Generation, true // or it was lost again
	if !restored {
		generation, written = o.begin(p.node.Name, now)
	}
	if !written {
		if err := o.write(ctx, n.client, p.alloc.Namespace, stored(want, id)); err != nil {
			return err
		}
	}
	err = n.unlessCut(ctx, func() error {
		return n.exec(ctx, p, nil, r.c.stdout, "lv2", "receive", stored(want, id), "--generation", strconv.Itoa(generation), "--into", r.into)
	})
	if err != nil {
		return err
	}
	former := o.Owner
	if !restored { // its host may have come back meanwhile
		if now, err = n.registered(ctx, id); err == nil {
			err = n.unused(ctx, now)
		}
		if err != nil {
			return err
		}
	}
	o.Generation, o.Node, o.volume = generation, p.node.Name, want
	if err := o.write(ctx, n.client, p.alloc.Namespace, stored(want, id)); err != nil {
		return err
	}
	// From here on the former one can't be staged. What was before has a claim, and stays the volume.
	if now, err = n.registered(ctx, id); err == nil && !restored {
		if err = n.unused(ctx, now); err != nil {
			o.Owner = former
			return errors.Join(err, o.write(context.WithoutCancel(ctx), n.client, p.alloc.Namespace, stored(want, id)))
		}
	}
	if err == nil {
		err = n.register(ctx, now, want)
	}
	if err == nil {
		err = n.evaluate(ctx, id)
	}
	if err != nil {
		return err
	}
	fmt.Fprintf(r.c.stdout, "volume %s is on node %s now\n", id, p.node.Name)
	return nil
}

func (c *cli) lv2ReceiveCommand() *cobra.Command {
	var generation int
	var into, endpoint string
	cmd := &cobra.Command{
		Use: "receive VOLUME", Short: "make the newest copy a volume, on this host: what restore runs on the node", Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := c.as(endpoint); err != nil {
				return err
			}
			stop := keepAlive(c.stderr)
			defer stop()
			return c.lv2Receive(cmd.Context(), args[0], into, generation)
		},
	}
	f := cmd.Flags()
	f.StringVar(&endpoint, "endpoint", defaultEndpoint(), "of the plugin whose pools and cold storage are used ($CSI_ENDPOINT, which Nomad sets)")
	f.IntVar(&generation, "generation", 0, "of the volume that is made")
	f.StringVar(&into, "into", "", "name of the pool (default: the first)")
	return cmd
}

// as takes the flags of the plugin that serves an endpoint.
func (c *cli) as(endpoint string) error {
	conn, err := net.Dial("unix", strings.TrimPrefix(endpoint, "unix://"))
	if err != nil {
		return fmt.Errorf("--endpoint %s: %w", endpoint, err)
	}
	defer conn.Close()
	raw, err := conn.(*net.UnixConn).SyscallConn()
	if err != nil {
		return err
	}
	var peer *unix.Ucred // who has begun to listen
	var perr error
	if err := raw.Control(func(fd uintptr) { peer, perr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) }); err != nil {
		return err
	}
	if perr != nil {
		return fmt.Errorf("--endpoint %s: who serves it: %w", endpoint, perr)
	}
	line, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", peer.Pid))
	if err != nil {
		return fmt.Errorf("--endpoint %s: who serves it: %w", endpoint, err)
	}
	args := strings.Split(strings.TrimSuffix(string(line), "\x00"), "\x00")
	cmd, flags, err := c.command().Find(args[1:])
	if err != nil || cmd.Flags().Lookup("cold") == nil || cmd.Flags().Lookup("endpoint") == nil {
		return fmt.Errorf("--endpoint %s: %q serves it, which is no controller of volumes", endpoint, args)
	}
	return cmd.ParseFlags(flags)
}

func (c *cli) lv2Receive(ctx context.Context, id, into string, generation int) error {
	b, _, err := c.open(ctx)
	if err != nil {
		return err
	}
	defer b.Close()
	vault, err := c.cold.vault()
	if err == nil {
		err = known(ctx, vault, b)
	}
	if err != nil {
		return err
	}
	v, err := b.Get(ctx, id)
	switch {
	case err == nil && v.Generation < generation:
		return fmt.Errorf("volume %s: this host has a former one, of generation %d; \"cradle-csi lv2 discard %[1]s\" here removes it for good", id, v.Generation)
	case err == nil && v.Generation > generation:
		return fmt.Errorf("volume %s: this host has one of generation %d, and it is %d that is to be restored", id, v.Generation, generation)
	case err != nil && !errors.Is(err, volume.ErrNotFound):
		return err
	}
	there := err == nil
	if there {
		owner, err := owners(c.nomad)
		if err != nil {
			return err
		}
		pending, err := pending(ctx, owner, v)
		if err != nil {
			return err
		}
		if !pending {
			fmt.Fprintf(c.stdout, "volume %s: it is there, made of %s\n", id, v.Origin)
			return nil
		}
	}
	one, err := vault.Find(ctx, id)
	if err != nil {
		return err
	}
	// It was used, whatever Nomad knows, which may have forgotten: what is pending is neither staged nor copied.
	if there && (v.Used || v.Origin.Copy == one.String() || v.Created.Equal(one.Born)) {
		fmt.Fprintf(c.stdout, "volume %s: it is there, made of %s\n", id, v.Origin)
		return nil
	}
	if there { // the former volume was used, and copied, since the call that made this one was interrupted
		fmt.Fprintf(c.stdout, "volume %s: %s, of which it was made, is not the newest copy any more\n", id, v.Origin)
		if err := b.Delete(ctx, id); err != nil {
			return err
		}
	}
	return c.receive(ctx, b, vault, one, volume.Request{Name: id, Generation: generation, Parameters: volume.Parameters{Pool: into}})
}

func (c *cli) lv2DiscardCommand() *cobra.Command {
	var endpoint string
	cmd := &cobra.Command{
		Use: "discard VOLUME", Short: "remove what this host has of a volume that was restored on another, or what cold restore has made", Args: cobra.ExactArgs(1),
		Long: `Remove what this host has of a volume that was restored on another node, for good, or what "cold restore" has made here and nobody has used. The one
that Nomad knows is never removed. Nomad's address and token are in NOMAD_ADDR, NOMAD_TOKEN and so on.`,
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := c.as(endpoint); err != nil {
				return err
			}
			return c.lv2Discard(cmd.Context(), args[0])
		},
	}
	cmd.Flags().StringVar(&endpoint, "endpoint", defaultEndpoint(), "of the plugin whose pools are meant ($CSI_ENDPOINT, which Nomad sets)")
	return cmd
}

func (c *cli) lv2Discard(ctx context.Context, id string) error {
	config := api.DefaultConfig()
	client, err := api.NewClient(config)
	if err != nil {
		return err
	}
	defer client.Close()
	b, _, err := c.open(ctx)
	if err != nil {
		return err
	}
	defer b.Close()
	v, err := b.Get(ctx, id)
	if err != nil {
		return err
	}
	o, err := readOwner(ctx, client, config.Namespace, id)
	if err != nil {
		return err
	}
	looked := v.Generation == 0 && o.Generation == 0 && v.Origin.Copy != "" && !v.Used // what cold restore has made
	replaced := o.replaced(c.nodeID) && v.Generation == o.Generation
	if looked || replaced {
		unknown, err := unknown(ctx, client, id, c.nodeID)
		if err != nil {
			return err
		}
		looked, replaced = looked && unknown, replaced && unknown
	}
	if v.Generation == o.Generation && !looked && !replaced {
		return fmt.Errorf("volume %s: it is the one that is in use; \"nomad volume delete %[1]s\" removes it", id)
	}
	if !looked && !replaced && !o.former(v.Generation) {
		return fmt.Errorf("volume %s: it is of generation %d, of which Nomad's namespace %s does not know that it was given up; set NOMAD_NAMESPACE to that of the plugin's job", id, v.Generation, config.Namespace)
	}
	if err := b.Delete(ctx, id); err != nil {
		return err
	}
	if looked {
		fmt.Fprintf(c.stdout, "volume %s: it is removed; it was made of %s, and nobody has used it\n", id, v.Origin)
		return nil
	}
	if replaced {
		fmt.Fprintf(c.stdout, "volume %s: generation %d of before it was made anew on another node is removed; generation %d may be restored here\n", id, v.Generation, o.next.Generation)
		return nil
	}
	fmt.Fprintf(c.stdout, "volume %s: generation %d is removed; generation %d is on node %s\n", id, v.Generation, o.Generation, cmp.Or(o.Node, "that made it"))
	return nil
}

// unknown says whether Nomad has no volume that the plugin on a node calls so: then none that was made of a copy is one that jobs could have.
func unknown(ctx context.Context, client *api.Client, id, node string) (bool, error) {
	all, err := seesAll(ctx, client)
	if err == nil && !all {
		err = fmt.Errorf("volume %s: whether Nomad has it, a management token alone (NOMAD_TOKEN) sees in all namespaces", id)
	}
	if err != nil {
		return false, err
	}
	volumes, _, err := client.CSIVolumes().List(query(ctx, api.AllNamespacesNamespace))
	return !slices.ContainsFunc(volumes, func(v *api.CSIVolumeListStub) bool {
		return cmp.Or(v.ExternalID, v.ID) == id && (len(v.Topologies) == 0 || slices.ContainsFunc(v.Topologies, func(t *api.CSITopology) bool {
			return cmp.Or(t.Segments[rpc.TopologyHost], node) == node
		}))
	}), err
}
