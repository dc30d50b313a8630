package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/hashicorp/nomad/api"
	"github.com/spf13/cobra"

	filer "github.com/cradlestack/cradlestack/csi-plugin/filer/api"
	"github.com/cradlestack/cradlestack/csi-plugin/filer/volumes"
	"github.com/cradlestack/cradlestack/csi-plugin/mount"
	"github.com/cradlestack/cradlestack/csi-plugin/volume"
	"github.com/cradlestack/cradlestack/spec"
)

// A doctor looks for what crashes leave behind on this host and in Nomad, says what it found, and repairs it.
type doctor struct {
	c     *cli
	look  bool
	filer filerFlags
	gone  []string // volumes to abandon
	found int
}

func (c *cli) doctorCommand() *cobra.Command {
	d := &doctor{c: c}
	var nomad, plugin string
	cmd := &cobra.Command{
		Use: "doctor", Short: "find and repair what a crash left: half-made volumes, mounts, loop devices, claims", Args: cobra.NoArgs,
		Long: `Find and repair what a crash left on this host: volumes and snapshots that were not completed, file systems that are still frozen, loop devices
that nobody uses, records of direct attachments that ended. With --nomad also what Nomad's view and this host's differ in: mounts of allocations
that have ended, and claims on volumes by allocations that are gone.

Each thing is told on a line of its own. Nothing that is in use is touched.`,
		RunE: func(cmd *cobra.Command, _ []string) error { return d.run(cmd.Context(), nomad, plugin) },
	}
	f := cmd.Flags()
	c.backendFlags(f)
	d.filer.add(f, filer.Socket)
	f.BoolVar(&d.look, "look", false, "only say what there is to repair")
	f.StringArrayVar(&d.gone, "abandon", nil, "of --backend filer: take this volume away from this host, as its filer will not come back: who uses it gets errors, and what has not reached the filer is lost; more than once")
	f.StringVar(&nomad, "nomad", "", "address of Nomad's API to compare with; its other settings are in NOMAD_TOKEN and so on")
	f.StringVar(&plugin, "plugin", "cradle", "the plugin's id in Nomad")
	return cmd
}

func (d *doctor) report(found string) {
	d.found++
	done := "repaired"
	if d.look {
		done = "found"
	}
	fmt.Fprintf(d.c.stdout, "%s: %s\n", done, found)
}

func (d *doctor) run(ctx context.Context, nomad, plugin string) error {
	d.c.filer = d.filer
	f, _, err := d.filer.client()
	if err != nil {
		return err
	}
	if err := d.c.existing(); err != nil {
		return err
	}
	b, _, err := d.c.open(ctx)
	if err != nil {
		return err
	}
	defer b.Close()
	if err := d.abandon(ctx, b); err != nil {
		return err
	}
	var errs []error
	if nomad != "" {
		errs = append(errs, d.nomad(ctx, nomad, plugin))
	}
	if r, ok := b.(volume.Repairer); ok {
		errs = append(errs, r.Repair(ctx, d.look, d.report))
	}
	errs = append(errs, b.Ready(ctx), d.records(ctx, b, f))
	if err := errors.Join(errs...); err != nil {
		return err
	}
	if d.found == 0 {
		fmt.Fprintln(d.c.stdout, "nothing to repair")
	}
	return nil
}

// abandon takes volumes away whose filer will not come back.
func (d *doctor) abandon(ctx context.Context, b volume.Backend) error {
	if len(d.gone) == 0 {
		return nil
	}
	f, ok := b.(*volumes.Backend)
	if !ok {
		return fmt.Errorf("--abandon %s: it is for what this host has mounted from a filer (--backend filer)", d.gone[0])
	}
	for _, id := range d.gone {
		if err := f.Abandon(ctx, id, d.look, d.report); err != nil {
			return err
		}
	}
	return nil
}

// records removes those of direct attachments whose target is no mount any more.
func (d *doctor) records(ctx context.Context, b volume.Backend, f *filer.Client) error {
	entries, err := os.ReadDir(spec.DirectDir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	var errs []error
	for _, e := range entries {
		if filepath.Ext(e.Name()) == ".json" && !strings.HasPrefix(e.Name(), ".") {
			errs = append(errs, d.record(ctx, b, f, filepath.Join(spec.DirectDir, e.Name())))
		}
	}
	return errors.Join(errs...)
}

func (d *doctor) record(ctx context.Context, b volume.Backend, f *filer.Client, path string) error {
	data, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	r, err := spec.ParseDirectAttachment(path, data)
	if err != nil {
		d.report(fmt.Sprintf("%v", err))
	} else if mounted, err := mount.Is(r.Target); err != nil || mounted {
		return err
	} else {
		d.report(fmt.Sprintf("volume %s: the record of an attachment at %s, which has ended", r.Volume.Name, r.Target))
	}
	if d.look {
		return nil
	}
	if r != nil && r.Volume.NFS != nil {
		if f == nil {
			return fmt.Errorf("volume %s: its publication can't be ended without a filer; write --filer", r.Volume.Name)
		}
		if err := f.Unpublish(ctx, strings.TrimSuffix(filepath.Base(path), ".json")); err != nil {
			return err
		}
	}
	if r != nil && r.Volume.Ceph != nil {
		if a, ok := b.(volume.Attacher); ok {
			if err := a.Detach(ctx, r.Volume.Name, r.Target); err != nil {
				return err
			}
		}
		if err := os.Remove(r.Volume.Ceph.SecretFile); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return os.Remove(path)
}

// nomad compares mounts and claims with the allocations that there are. What is mounted and claimed is looked up first: whatever has begun
// since then is among the allocations.
func (d *doctor) nomad(ctx context.Context, address, plugin string) error {
	config := api.DefaultConfig()
	config.Address = address
	client, err := api.NewClient(config)
	if err != nil {
		return err
	}
	defer client.Close()
	targets, err := mount.Below("/csi/", "/"+plugin+"/per-alloc/")
	if err != nil {
		return err
	}
	q := (&api.QueryOptions{Namespace: api.AllNamespacesNamespace}).WithContext(ctx)
	volumes, err := claimed(ctx, client, plugin)
	if err != nil {
		return fmt.Errorf("nomad at %s: %w", address, err)
	}
	if len(targets)+len(volumes) == 0 { // of a plugin that is no more there may be some
		if _, _, err := client.CSIPlugins().Info(plugin, query(ctx, "")); notFound(err) {
			return fmt.Errorf("nomad at %s: --plugin %s: there is none of that id, and no volume or mount of it; \"nomad plugin status\" lists them", address, plugin)
		}
	}
	allocs, _, err := client.Allocations().List(q)
	if err != nil {
		return fmt.Errorf("nomad at %s: %w", address, err)
	}
	all, err := seesAll(ctx, client)
	if err != nil {
		return fmt.Errorf("nomad at %s: %w", address, err)
	}
	ended := map[string]bool{}
	for _, a := range allocs {
		ended[a.ID] = hasEnded(a)
	}
	var errs []error
	for _, target := range targets {
		alloc := allocOf(target, plugin)
		switch over, listed := ended[alloc]; {
		case over, !listed && all:
			errs = append(errs, d.mounted(target, alloc))
		case !listed:
			errs = append(errs, fmt.Errorf("%s: left alone: allocation %s is none that this token sees, and may run in a namespace that it does not; a management token (NOMAD_TOKEN) sees all", target, alloc))
		}
	}
	for _, v := range volumes {
		if err := d.claims(ctx, client, v); err != nil {
			errs = append(errs, fmt.Errorf("volume %s: end its claim: %w", v.ID, err))
		}
	}
	return errors.Join(errs...)
}

// seesAll says whether the token is shown every namespace's allocations. Another one's list leaves out the others', without a word.
func seesAll(ctx context.Context, client *api.Client) (bool, error) {
	token, _, err := client.ACLTokens().Self((&api.QueryOptions{}).WithContext(ctx))
	if err != nil {
		return false, err
	}
	return token.Type == "management" || token.AccessorID == "acls-disabled", nil // nomad/structs/acl.go, ACLsDisabledToken
}

// hasEnded says whether nothing of an allocation runs any more. Lost and unknown ones may, on a node that is cut off.
func hasEnded(a *api.AllocationListStub) bool {
	return a.ClientStatus == api.AllocClientStatusComplete || a.ClientStatus == api.AllocClientStatusFailed
}

// claimed returns the plugin's volumes with those who claim them.
func claimed(ctx context.Context, client *api.Client, plugin string) (all []*api.CSIVolume, err error) {
	q := (&api.QueryOptions{Namespace: api.AllNamespacesNamespace}).WithContext(ctx)
	stubs, _, err := client.CSIVolumes().List(q)
	if err != nil {
		return nil, err
	}
	for _, stub := range stubs {
		if stub.PluginID != plugin {
			continue
		}
		v, _, err := client.CSIVolumes().Info(stub.ID, (&api.QueryOptions{Namespace: stub.Namespace}).WithContext(ctx))
		if err != nil {
			return nil, err
		}
		all = append(all, v)
	}
	return all, nil
}

// allocOf is whose a mount is: CLIENT/csi/TYPE/PLUGIN/per-alloc/ALLOCATION/VOLUME/USE.
func allocOf(target, plugin string) string {
	_, rest, _ := strings.Cut(target, "/"+plugin+"/per-alloc/")
	alloc, _, _ := strings.Cut(rest, "/")
	return alloc
}

// mounted ends a mount of an allocation that has ended.
func (d *doctor) mounted(target, alloc string) error {
	d.report(fmt.Sprintf("%s: still mounted, and allocation %s has ended", target, alloc))
	if d.look {
		return nil
	}
	if err := mount.Detach(target); err != nil {
		return err
	}
	if err := os.Remove(target); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// claims ends those of allocations that have ended. Nomad ends all that a node has on a volume at once, so that one which lives keeps the
// others there.
func (d *doctor) claims(ctx context.Context, client *api.Client, v *api.CSIVolume) error {
	inUse := map[string]bool{} // by node
	for _, a := range v.Allocations {
		inUse[a.NodeID] = inUse[a.NodeID] || !hasEnded(a)
	}
	for _, a := range v.Allocations {
		if inUse[a.NodeID] {
			continue
		}
		d.report(fmt.Sprintf("volume %s: claimed by allocation %s, which has ended", v.ID, a.ID))
		if d.look {
			continue
		}
		w := (&api.WriteOptions{Namespace: v.Namespace}).WithContext(ctx)
		if err := client.CSIVolumes().Detach(v.ID, a.NodeID, w); err != nil {
			return err
		}
	}
	return nil
}
