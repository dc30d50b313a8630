package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/cradlestack/cradlestack/csi-plugin/mount"
	"github.com/cradlestack/cradlestack/csi-plugin/volume"
)

// hostVolumeVersion is what Nomad shows as the node's attribute plugins.host_volume.NAME.version.
const hostVolumeVersion = "1.0.0"

// hostVolumeCommand is Nomad's protocol for dynamic host volumes (nomadproject.io, "Host Volume Plugin Specification"): one argument, the
// rest in the environment, JSON on standard output, of errors as well.
func (c *cli) hostVolumeCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use: "host-volume fingerprint|create|delete", Short: "be a plugin for Nomad's dynamic host volumes",
		Args: cobra.ExactArgs(1), ValidArgs: []string{"fingerprint", "create", "delete"},
		RunE: func(cmd *cobra.Command, args []string) error {
			answer, err := c.hostVolume(cmd.Context(), args[0])
			if err != nil {
				answer = map[string]string{"error": err.Error()}
			}
			return errors.Join(err, json.NewEncoder(c.stdout).Encode(answer))
		},
	}
	c.backendFlags(cmd.Flags())
	return cmd
}

func (c *cli) hostVolume(ctx context.Context, operation string) (answer any, err error) {
	if operation == "fingerprint" {
		return map[string]string{"version": hostVolumeVersion}, nil
	}
	b, _, err := c.open(ctx)
	if err != nil {
		return nil, err
	}
	defer b.Close()
	h, err := readHostVolume()
	if err != nil {
		return nil, err
	}
	switch operation {
	case "create":
		if err := h.readWishes(); err != nil {
			return nil, err
		}
		v, err := h.create(ctx, b)
		return map[string]any{"path": h.path, "bytes": v.Size}, err
	case "delete":
		return map[string]string{}, h.remove(ctx, b)
	default:
		return nil, fmt.Errorf("host-volume %s: there is no such operation; fingerprint, create and delete are known", operation)
	}
}

// A hostVolume is one that Nomad asks for.
type hostVolume struct {
	request volume.Request
	path    string // where it is mounted: in Nomad's folder for them, by its id
}

// readHostVolume reads Nomad's variables. A volume is named by its id: names are of a namespace, and others may have them too.
func readHostVolume() (h hostVolume, err error) {
	h.request.Name = os.Getenv("DHV_VOLUME_ID")
	if err := volume.CheckName("DHV_VOLUME_ID", h.request.Name); err != nil {
		return h, err
	}
	dir := os.Getenv("DHV_VOLUMES_DIR")
	if !filepath.IsAbs(dir) {
		return h, volume.Invalid("DHV_VOLUMES_DIR", "%q is no absolute path; Nomad's host_volumes_dir is one", dir)
	}
	h.path = filepath.Join(dir, h.request.Name)
	return h, nil
}

// readWishes reads what a volume is to be. Whatever it says, a volume can be deleted.
func (h *hostVolume) readWishes() (err error) {
	for name, into := range map[string]*int64{"DHV_CAPACITY_MIN_BYTES": &h.request.Size, "DHV_CAPACITY_MAX_BYTES": &h.request.Limit} {
		if *into, err = strconv.ParseInt(cmp.Or(os.Getenv(name), "0"), 10, 64); err != nil {
			return volume.Invalid(name, "%q is no number", os.Getenv(name))
		}
	}
	var parameters map[string]string
	if err := json.Unmarshal([]byte(cmp.Or(os.Getenv("DHV_PARAMETERS"), "{}")), &parameters); err != nil {
		return volume.Invalid("DHV_PARAMETERS", "%v", err)
	}
	if h.request.Parameters, err = volume.ParseParameters(parameters); err == nil && h.request.Direct {
		err = volume.Invalid("parameter attach", "a host volume is attached by the host; use a CSI volume for direct")
	}
	for name, kept := range map[string]volume.Retention{"cold": h.request.Cold, "snapshots": h.request.Snapshots} {
		if err == nil && kept != (volume.Retention{}) {
			err = volume.Invalid("parameter "+name, "nobody takes snapshots of a host volume; use a CSI volume, or leave it out")
		}
	}
	return err
}

// create makes the volume, or makes it larger, and mounts it. Nomad calls it again whenever it starts. Of a volume whose creation fails it knows nothing any more, not even its id: then
// there is none.
func (h hostVolume) create(ctx context.Context, b volume.Backend) (v volume.Volume, err error) {
	made := false
	defer func() {
		if err != nil && made {
			err = errors.Join(err, h.undo(context.WithoutCancel(ctx), b))
		}
	}()
	v, err = b.Get(ctx, h.request.Name)
	switch {
	case errors.Is(err, volume.ErrNotFound):
		// Its folder is made after the volume, and goes before it.
		if _, serr := os.Lstat(h.path); serr == nil {
			return v, fmt.Errorf("volume %s: %w: it was mounted on %s, and is in no pool now; is the pool's disk mounted? \"nomad volume delete -type host %[1]s\" gives it up", h.request.Name, volume.ErrUnavailable, h.path)
		}
		v, err = b.Create(ctx, h.request)
		made = err == nil
	case err == nil:
		v, err = h.grow(ctx, b, v)
	}
	if err != nil {
		return v, err
	}
	source, err := b.Stage(ctx, v.ID, volume.Use{As: volume.AsFiles})
	if err != nil {
		return v, err
	}
	return v, mount.Place(ctx, source.Device, source.Directory, source.FSType, h.path, mount.Options{})
}

// undo removes a volume that was made, and could not be mounted.
func (h hostVolume) undo(ctx context.Context, b volume.Backend) error {
	if err := mount.Unmount(h.path); err != nil {
		return err
	}
	_ = os.Remove(h.path) // which may never have been
	if err := b.Unstage(ctx, h.request.Name); err != nil {
		return err
	}
	return b.Delete(ctx, h.request.Name)
}

// grow compares a volume that is there with the request, which may be for a larger one.
func (h hostVolume) grow(ctx context.Context, b volume.Backend, v volume.Volume) (volume.Volume, error) {
	r := h.request
	r.FS, r.Size = cmp.Or(r.FS, v.FS), min(r.Size, v.Size)
	if err := v.Fits(r); err != nil {
		return v, err
	}
	e, ok := b.(volume.Expander)
	if h.request.Size <= v.Size || !ok {
		return v, v.Fits(volume.Request{Size: h.request.Size, Limit: h.request.Limit, Origin: v.Origin, Generation: v.Generation, Parameters: v.Parameters})
	}
	var err error
	v.Size, err = e.Expand(ctx, v.ID, h.request.Size, h.request.Limit)
	return v, err
}

func (h hostVolume) remove(ctx context.Context, b volume.Backend) error {
	id := h.request.Name
	err := mount.Unmount(h.path)
	if errors.Is(err, unix.EBUSY) {
		return fmt.Errorf("volume %s: %w: %w", id, volume.ErrInUse, err)
	}
	if err != nil {
		return err
	}
	if err := os.Remove(h.path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := b.Unstage(ctx, id); err != nil {
		return err
	}
	return b.Delete(ctx, id)
}
