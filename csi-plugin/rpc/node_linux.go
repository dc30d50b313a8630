package rpc

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/cradlestack/cradlestack/csi-plugin/mount"
	"github.com/cradlestack/cradlestack/csi-plugin/volume"
	"github.com/cradlestack/cradlestack/spec"
)

// node serves the Node service. It keeps nothing: what is staged and published is what the mount table and the records say.
type node struct {
	csi.UnimplementedNodeServer
	*Server
}

func (s *node) NodeGetCapabilities(context.Context, *csi.NodeGetCapabilitiesRequest) (*csi.NodeGetCapabilitiesResponse, error) {
	has := []csi.NodeServiceCapability_RPC_Type{
		csi.NodeServiceCapability_RPC_STAGE_UNSTAGE_VOLUME,
		csi.NodeServiceCapability_RPC_GET_VOLUME_STATS,
	}
	if _, ok := s.config.Backend.(volume.Expander); ok {
		has = append(has, csi.NodeServiceCapability_RPC_EXPAND_VOLUME)
	}
	var caps []*csi.NodeServiceCapability
	for _, t := range has {
		caps = append(caps, &csi.NodeServiceCapability{Type: &csi.NodeServiceCapability_Rpc{Rpc: &csi.NodeServiceCapability_RPC{Type: t}}})
	}
	return &csi.NodeGetCapabilitiesResponse{Capabilities: caps}, nil
}

func (s *node) NodeGetInfo(context.Context, *csi.NodeGetInfoRequest) (*csi.NodeGetInfoResponse, error) {
	return &csi.NodeGetInfoResponse{NodeId: s.config.NodeID, AccessibleTopology: &csi.Topology{Segments: s.topology()}}, nil
}

// checkPath takes what a caller may name as a place to mount on.
func checkPath(field, path string) error {
	switch {
	case path == "":
		return invalid("%s: it is missing", field)
	case !filepath.IsAbs(path) || len(path) >= unix.PathMax || strings.IndexByte(path, 0) >= 0 || filepath.Clean(path) == "/":
		return invalid("%s: %.80q is no absolute path that something could be mounted on", field, path)
	}
	return nil
}

// begin checks what the calls that attach have in common, and takes the volume.
func (s *node) begin(ctx context.Context, id string, c *csi.VolumeCapability) (v volume.Volume, w wish, unlock func(), err error) {
	if c == nil {
		return v, w, nil, invalid("volume capability: there is none; say access mode and access type")
	}
	if unlock, err = s.lock(ctx, id); err != nil {
		return v, w, nil, err
	}
	if v, err = s.config.Backend.Get(ctx, id); err == nil {
		w, err = wishFor(c, v)
	}
	if err == nil {
		err = s.own(ctx, v)
	}
	if err != nil {
		unlock()
	}
	return v, w, unlock, err
}

// own refuses a volume that was restored on another host, or is not wholly restored on this one.
func (s *node) own(ctx context.Context, v volume.Volume) error {
	if s.config.Owner == nil || !v.Block() {
		return nil
	}
	o, err := s.owner(ctx, v.ID)
	if err != nil || v.Generation == o.Generation {
		return err
	}
	if v.Generation > o.Generation {
		return failed("volume %s: its restoring has not come to its end; repeat \"cradle-csi lv2 restore\"", v.ID)
	}
	return failed("volume %s: it was restored on node %s, and what this host has is of before; \"cradle-csi lv2 discard %[1]s\" removes that", v.ID, o.Node)
}

func (s *node) NodeStageVolume(ctx context.Context, req *csi.NodeStageVolumeRequest) (*csi.NodeStageVolumeResponse, error) {
	if err := checkPath("staging target path", req.GetStagingTargetPath()); err != nil {
		return nil, err
	}
	v, w, unlock, err := s.begin(ctx, req.GetVolumeId(), req.GetVolumeCapability())
	if err != nil {
		return nil, err
	}
	err = waits(ctx, v.ID, unlock, func(ctx context.Context) error {
		if v.Served() { // by the filer, which stages it as soon as somebody is to see it, or from the storage itself
			return nil
		}
		source, err := s.config.Backend.Stage(ctx, v.ID, use(v, w, false))
		if err != nil || v.Direct || w.block {
			return err
		}
		return mount.Place(ctx, source.Device, source.Directory, source.FSType, filepath.Clean(req.GetStagingTargetPath()), w.options)
	})
	if err != nil {
		return nil, err
	}
	return &csi.NodeStageVolumeResponse{}, nil
}

// storing is how long a call waits for a volume's disk: one that has failed may never answer who mounts or unmounts.
const storing = 90 * time.Second

// waits does what has a volume's lock. Where that takes long it goes on without the call, and has the lock until it has come to its end.
func waits(ctx context.Context, id string, unlock func(), do func(context.Context) error) error {
	done := make(chan error, 1)
	go func() {
		defer unlock()
		done <- do(context.WithoutCancel(ctx))
	}()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
	case <-time.After(storing):
	}
	return fmt.Errorf("volume %s: %w: its storage has not answered yet, and what was begun goes on: see dmesg, and zpool status where it is in a zpool", id, volume.ErrUnavailable)
}

func use(v volume.Volume, w wish, readOnly bool) volume.Use {
	switch {
	case v.Direct:
		return volume.Use{As: volume.AsGuest}
	case w.block:
		return volume.Use{As: volume.AsRaw, ReadOnly: readOnly || w.readOnly}
	}
	return volume.Use{As: volume.AsFiles}
}

// orElse is the first of two errors that is one.
func orElse(err, other error) error {
	if err != nil {
		return err
	}
	return other
}

func (s *node) NodeUnstageVolume(ctx context.Context, req *csi.NodeUnstageVolumeRequest) (*csi.NodeUnstageVolumeResponse, error) {
	if err := checkPath("staging target path", req.GetStagingTargetPath()); err != nil {
		return nil, err
	}
	unlock, err := s.lock(ctx, req.GetVolumeId())
	if err != nil {
		return nil, err
	}
	err = waits(ctx, req.GetVolumeId(), unlock, func(ctx context.Context) error {
		err := placed(filepath.Clean(req.GetStagingTargetPath()))
		if err == nil {
			err = mount.Unmount(filepath.Clean(req.GetStagingTargetPath()))
		}
		if errors.Is(err, unix.EBUSY) {
			return failed("volume %s: %v: end what still uses it", req.GetVolumeId(), err)
		}
		if err != nil {
			return err
		}
		return s.config.Backend.Unstage(ctx, req.GetVolumeId())
	})
	if err != nil {
		return nil, err
	}
	return &csi.NodeUnstageVolumeResponse{}, nil
}

func (s *node) NodePublishVolume(ctx context.Context, req *csi.NodePublishVolumeRequest) (*csi.NodePublishVolumeResponse, error) {
	if err := checkPath("target path", req.GetTargetPath()); err != nil {
		return nil, err
	}
	v, w, unlock, err := s.begin(ctx, req.GetVolumeId(), req.GetVolumeCapability())
	if err != nil {
		return nil, err
	}
	defer unlock()
	if req.GetStagingTargetPath() == "" {
		return nil, failed("staging target path: it is missing; stage the volume first")
	}
	if err := checkPath("staging target path", req.GetStagingTargetPath()); err != nil {
		return nil, err
	}
	target := filepath.Clean(req.GetTargetPath())
	if err := os.MkdirAll(filepath.Dir(target), 0o750); err != nil {
		return nil, err
	}
	if unseen, err := mount.Unseen(filepath.Dir(target)); err != nil {
		return nil, err
	} else if unseen {
		return nil, failed("target path %s: what is mounted there is seen in the plugin's mount namespace alone; share the directory with the host (of bali run: -v), and have it on a shared mount there: mount --make-rshared /", target)
	}
	w.readOnly = w.readOnly || req.GetReadonly()
	switch {
	case v.Direct:
		err = s.publishDirect(ctx, v, target, w)
	case w.block:
		err = s.publishDevice(ctx, v, target, w)
	default:
		err = publishFiles(filepath.Clean(req.GetStagingTargetPath()), target, w)
	}
	if err != nil {
		return nil, err
	}
	return &csi.NodePublishVolumeResponse{}, nil
}

// publishFiles makes what is staged appear at the target.
func publishFiles(staging, target string, w wish) error {
	staged, err := mount.At(staging)
	if err != nil {
		return err
	}
	if staged == nil {
		return failed("%s: nothing is staged there; stage the volume first", staging)
	}
	if err := os.Mkdir(target, 0o750); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	at, err := mount.At(target)
	if err != nil {
		return err
	}
	options := w.options
	if w.readOnly {
		options = options.ReadOnly()
	}
	if at == nil {
		if mount.IsNFS(staged) { // whose server may be away
			if err := answered(staging, func() error { _, err := mount.Stats(staging); return err }); err != nil {
				return err
			}
		}
		return mount.Bind(staging, target, options)
	}
	return published(target, at.Major == staged.Major && at.Minor == staged.Minor && at.Root == staged.Root, mount.IsReadOnly(at), w.readOnly)
}

// published judges what is at a target already.
func published(target string, same, readOnly, wantReadOnly bool) error {
	switch {
	case !same:
		return status.Errorf(codes.AlreadyExists, "%s: something else is mounted there", target)
	case readOnly != wantReadOnly:
		return status.Errorf(codes.AlreadyExists, "%s: the volume is published there already, read-only: %t", target, readOnly)
	}
	return nil
}

// publishDevice makes the volume's block device appear at the target.
func (s *node) publishDevice(ctx context.Context, v volume.Volume, target string, w wish) error {
	source, err := s.config.Backend.Stage(ctx, v.ID, use(v, w, w.readOnly))
	if err != nil {
		return err
	}
	f, err := os.OpenFile(target, os.O_CREATE|os.O_RDONLY|unix.O_NONBLOCK|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return err
	}
	f.Close()
	mounted, err := mount.Is(target)
	if err != nil {
		return err
	}
	if !mounted {
		return mount.BindDevice(source.Device, target)
	}
	same, err := mount.SameDevice(source.Device, target)
	return orElse(err, published(target, same, w.readOnly, w.readOnly))
}

func (s *node) NodeUnpublishVolume(ctx context.Context, req *csi.NodeUnpublishVolumeRequest) (*csi.NodeUnpublishVolumeResponse, error) {
	if err := checkPath("target path", req.GetTargetPath()); err != nil {
		return nil, err
	}
	unlock, err := s.lock(ctx, req.GetVolumeId())
	if err != nil {
		return nil, err
	}
	defer unlock()
	target := filepath.Clean(req.GetTargetPath())
	if err := placed(target); err != nil {
		return nil, err
	}
	// The task has ended. Should a process of it be left, it keeps the files that it has open and nobody waits for it.
	if err := mount.Detach(target); err != nil {
		return nil, err
	}
	if err := s.unserve(ctx, req.GetVolumeId(), target); err != nil {
		return nil, err
	}
	if err := s.forget(target); err != nil {
		return nil, err
	}
	fi, err := os.Lstat(target)
	if err == nil && !fi.IsDir() && (!fi.Mode().IsRegular() || fi.Size() > 0) {
		return nil, failed("target path %s: it is left alone, as no volume is published on such a file", target)
	}
	if err == nil {
		err = os.Remove(target)
	}
	switch {
	case errors.Is(err, unix.ENOTEMPTY):
		return nil, failed("target path %s: it is left alone, as what is in the directory is no volume's", target)
	case err != nil && !errors.Is(err, fs.ErrNotExist):
		return nil, err
	}
	return &csi.NodeUnpublishVolumeResponse{}, nil
}

// placed refuses to take away what no volume can be: a caller's mistake would cost the host its /proc.
func placed(path string) error {
	at, err := mount.At(path)
	if err == nil && at != nil && !mount.Placed(at) {
		err = failed("%s: what is mounted there is no volume but %s, and is left alone", path, at.FSType)
	}
	return err
}

func (s *node) NodeGetVolumeStats(ctx context.Context, req *csi.NodeGetVolumeStatsRequest) (*csi.NodeGetVolumeStatsResponse, error) {
	v, path, err := s.at(ctx, s.local, req.GetVolumeId(), req.GetVolumePath())
	if err != nil {
		return nil, err
	}
	var fi fs.FileInfo
	var files spec.VolumeStats
	err = answered(path, func() (err error) {
		if fi, err = os.Stat(path); err == nil && fi.IsDir() {
			files, err = mount.Stats(path)
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	bytes := func(total, used, available int64) *csi.VolumeUsage {
		return &csi.VolumeUsage{Unit: csi.VolumeUsage_BYTES, Total: total, Used: used, Available: available}
	}
	var stats spec.VolumeStats
	switch {
	case fi.Mode().Type() == fs.ModeDevice:
		return &csi.NodeGetVolumeStatsResponse{Usage: []*csi.VolumeUsage{bytes(v.Size, 0, 0)}}, nil
	case s.served(v.Parameters):
		stats, err = s.filerStats(ctx, v.ID)
	case v.Direct:
		if stats, err = s.guestStats(ctx, path); errors.Is(err, errNoGuest) {
			return &csi.NodeGetVolumeStatsResponse{Usage: []*csi.VolumeUsage{bytes(v.Size, 0, 0)}}, nil
		}
	default:
		stats = files
	}
	if err != nil {
		return nil, err
	}
	return &csi.NodeGetVolumeStatsResponse{Usage: []*csi.VolumeUsage{
		bytes(int64(stats.Total), int64(stats.Used), int64(stats.Available)),
		{Unit: csi.VolumeUsage_INODES, Total: int64(stats.Inodes), Used: int64(stats.InodesUsed), Available: int64(stats.InodesAvailable)},
	}}, nil
}

// patience is how long a mount may take to answer: of a cluster that does not it never would.
const patience = 20 * time.Second

// answered does something to what is mounted at path, unless that does not answer.
func answered(path string, do func() error) error {
	return mount.Answered(path, patience, volume.ErrUnavailable, do)
}

// at finds a volume that is published or staged at a path.
func (s *node) at(ctx context.Context, get func(context.Context, string) (volume.Volume, error), id, path string) (volume.Volume, string, error) {
	if id == "" {
		return volume.Volume{}, "", invalid("volume id: it is missing")
	}
	if path == "" {
		return volume.Volume{}, "", invalid("volume path: it is missing")
	}
	v, err := get(ctx, id)
	if err != nil {
		return v, "", err
	}
	mounted := false
	if checkPath("volume path", path) == nil { // else nothing can be there
		path = filepath.Clean(path)
		mounted, err = mount.Is(path)
	}
	if err == nil && !mounted {
		err = fmt.Errorf("volume %s: %w at %.80q", id, volume.ErrNotFound, path)
	}
	return v, path, err
}

func (s *node) NodeExpandVolume(ctx context.Context, req *csi.NodeExpandVolumeRequest) (*csi.NodeExpandVolumeResponse, error) {
	e, ok := s.config.Backend.(volume.Expander)
	if !ok {
		return nil, status.Error(codes.Unimplemented, "this backend's volumes can't grow")
	}
	unlock, err := s.lock(ctx, req.GetVolumeId())
	if err != nil {
		return nil, err
	}
	defer unlock()
	v, path, err := s.at(ctx, s.config.Backend.Get, req.GetVolumeId(), req.GetVolumePath())
	if err != nil {
		return nil, err
	}
	if c := req.GetVolumeCapability(); c != nil {
		if _, err := wishFor(c, v); err != nil {
			return nil, err
		}
	}
	if v.Size == 0 {
		return &csi.NodeExpandVolumeResponse{}, nil
	}
	if v.Size < req.GetCapacityRange().GetRequiredBytes() {
		return nil, status.Errorf(codes.OutOfRange, "volume %s has %v; expand it with ControllerExpandVolume first", v.ID, spec.Bytes(v.Size))
	}
	if _, err := e.Expand(ctx, v.ID, 0, 0); err != nil { // its devices learn of the new size
		return nil, err
	}
	at, err := mount.At(path)
	switch {
	case err != nil || at == nil:
	case s.served(v.Parameters):
		err = s.filerGrow(ctx, v.ID)
	case v.Direct && v.Block():
		err = s.guestResize(ctx, path, v.Size)
	case at.FSType == "ext4" || at.FSType == "xfs":
		err = mount.Grow(ctx, at.Source, path, at.FSType)
	}
	if err != nil {
		return nil, err
	}
	return &csi.NodeExpandVolumeResponse{CapacityBytes: v.Size}, nil
}
