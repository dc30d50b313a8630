package rpc

import (
	"cmp"
	"context"
	"errors"
	"strings"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/cradlestack/cradlestack/csi-plugin/volume"
)

type controller struct {
	csi.UnimplementedControllerServer
	*Server
}

func (s *controller) ControllerGetCapabilities(context.Context, *csi.ControllerGetCapabilitiesRequest) (*csi.ControllerGetCapabilitiesResponse, error) {
	has := []csi.ControllerServiceCapability_RPC_Type{
		csi.ControllerServiceCapability_RPC_CREATE_DELETE_VOLUME,
		csi.ControllerServiceCapability_RPC_LIST_VOLUMES,
		csi.ControllerServiceCapability_RPC_GET_VOLUME,
		csi.ControllerServiceCapability_RPC_GET_CAPACITY,
	}
	if _, ok := s.config.Backend.(volume.Snapshotter); ok {
		has = append(has, csi.ControllerServiceCapability_RPC_CREATE_DELETE_SNAPSHOT, csi.ControllerServiceCapability_RPC_LIST_SNAPSHOTS, csi.ControllerServiceCapability_RPC_GET_SNAPSHOT)
	}
	if _, ok := s.config.Backend.(volume.Cloner); ok {
		has = append(has, csi.ControllerServiceCapability_RPC_CLONE_VOLUME)
	}
	if _, ok := s.config.Backend.(volume.Expander); ok {
		has = append(has, csi.ControllerServiceCapability_RPC_EXPAND_VOLUME)
	}
	var caps []*csi.ControllerServiceCapability
	for _, t := range has {
		caps = append(caps, &csi.ControllerServiceCapability{Type: &csi.ControllerServiceCapability_Rpc{Rpc: &csi.ControllerServiceCapability_RPC{Type: t}}})
	}
	return &csi.ControllerGetCapabilitiesResponse{Capabilities: caps}, nil
}

func (s *controller) CreateVolume(ctx context.Context, req *csi.CreateVolumeRequest) (*csi.CreateVolumeResponse, error) {
	r := volume.Request{Name: req.GetName(), Size: req.GetCapacityRange().GetRequiredBytes(), Limit: req.GetCapacityRange().GetLimitBytes()}
	err := volume.CheckName("volume name", r.Name)
	if err == nil {
		r.Parameters, err = volume.ParseParameters(req.GetParameters())
	}
	for name := range req.GetMutableParameters() {
		err = cmp.Or(err, invalid("mutable parameter %.80q: volumes have none; use parameters", name))
	}
	_, said := req.GetParameters()["snapshots"]
	usual := err == nil && !said && !r.Block()
	if usual && s.config.Snapshots != nil {
		r.Snapshots, err = s.config.Snapshots(ctx)
	}
	if err == nil {
		err = wanted(req.GetVolumeCapabilities(), &r)
	}
	if err == nil {
		err = s.config.Keeps(r)
	}
	if err == nil {
		err = s.reachable(req.GetAccessibilityRequirements())
	}
	if err == nil {
		r.Origin, err = origin(req.GetVolumeContentSource())
	}
	if err != nil {
		return nil, err
	}
	unlock, err := s.busy.Lock(ctx, r.Name)
	if err != nil {
		return nil, err
	}
	var v volume.Volume
	err = s.complete(ctx, "volume "+r.Name, unlock, func(ctx context.Context) error {
		if r.Block() {
			o, err := s.owner(ctx, r.Name)
			if err != nil {
				return err
			}
			r.Generation = o.Generation
		}
		made, err := s.make(ctx, r)
		if usual && errors.Is(err, volume.ErrExists) { // it may be from before --snapshots was another
			if is, gerr := s.config.Backend.Get(ctx, r.Name); gerr == nil && is.Snapshots != r.Snapshots {
				r.Snapshots = is.Snapshots
				made, err = s.make(ctx, r)
			}
		}
		v = made
		return err
	})
	if err != nil {
		return nil, err
	}
	return &csi.CreateVolumeResponse{Volume: s.volume(v)}, nil
}

// Keeps says, with a volume.ErrInvalid, why this plugin makes no such volume, whatever its backend could.
func (c Config) Keeps(r volume.Request) error {
	_, attaches := c.Backend.(volume.Attacher)
	switch {
	case r.Cold != (volume.Retention{}) && c.Cold == nil:
		return volume.Invalid("parameter cold", "this plugin has no cold storage; start it with --cold, or leave the parameter out")
	case r.Served() && !attaches && c.Filer == nil:
		return volume.Invalid("parameter attach", "this plugin has no filer that a guest could mount the volume from; start it with --filer, or use attach=host")
	case c.Shared && (r.Block() || r.Size > 0 || r.Limit > 0):
		return volume.Invalid("volume "+r.Name, "one on the pool of a set of filers is of class nfs or gfs, and without a size: what has one is an image, which two hosts must not mount")
	}
	return nil
}

func (s *controller) make(ctx context.Context, r volume.Request) (volume.Volume, error) {
	if r.Origin == (volume.Origin{}) {
		return s.config.Backend.Create(ctx, r)
	}
	c, ok := s.config.Backend.(volume.Cloner)
	if !ok {
		return volume.Volume{}, invalid("volume content source: this backend makes no clones")
	}
	return c.Clone(ctx, r, s.hold(r.Origin.Volume))
}

// wanted checks all capabilities of a volume that is to be made. Its file system is the parameter's, else theirs.
func wanted(caps []*csi.VolumeCapability, r *volume.Request) error {
	if len(caps) == 0 {
		return invalid("volume capabilities: there is none; name at least one")
	}
	for _, c := range caps {
		w, err := read(c)
		if err != nil {
			return err
		}
		if reason := suits(c, r.Parameters); reason != "" {
			return invalid("volume capability: %s", reason)
		}
		if w.fsType != "" && w.fsType != "ext4" && w.fsType != "xfs" {
			return invalid("volume capability: there is no file system %.40q; ext4 and xfs are known", w.fsType)
		}
		if r.Block() || r.Size > 0 || r.Limit > 0 { // else the storage has its own
			r.FS = cmp.Or(r.FS, w.fsType)
		}
	}
	return nil
}

// reachable refuses a volume that would not be where it is wanted.
func (s *controller) reachable(r *csi.TopologyRequirement) error {
	if len(r.GetRequisite()) == 0 {
		return nil
	}
	for _, t := range r.GetRequisite() {
		if s.reaches(t.GetSegments()) {
			return nil
		}
	}
	return status.Errorf(codes.ResourceExhausted, "accessibility requirements: volumes made here are reachable at %v alone", s.topology())
}

// reaches says whether volumes that are made here can be used in a part of the topology: where they are not on this host alone, whatever host it names.
func (s *Server) reaches(segments map[string]string) bool {
	here := s.topology()
	for k, v := range segments {
		if here[k] != v && (k != TopologyHost || s.config.Local) {
			return false
		}
	}
	return true
}

// topology is where this host is.
func (s *Server) topology() map[string]string {
	t := map[string]string{TopologyHost: s.config.NodeID}
	if s.config.Zone != "" {
		t[TopologyZone] = s.config.Zone
	}
	return t
}

// accessible is where the volumes that are made here can be reached.
func (s *Server) accessible() []*csi.Topology {
	t := s.topology()
	if !s.config.Local {
		delete(t, TopologyHost)
	}
	if len(t) == 0 {
		return nil
	}
	return []*csi.Topology{{Segments: t}}
}

func origin(c *csi.VolumeContentSource) (o volume.Origin, err error) {
	switch {
	case c == nil:
	case c.GetSnapshot() != nil:
		o.Snapshot, err = volume.ParseSnapshotID(c.GetSnapshot().GetSnapshotId())
	case c.GetVolume() != nil:
		if o.Volume = c.GetVolume().GetVolumeId(); !volume.ValidName(o.Volume) {
			err = status.Errorf(codes.NotFound, "volume content source: there is no volume %.80q", o.Volume)
		}
	default:
		err = invalid("volume content source: it is neither a snapshot nor a volume")
	}
	return o, err
}

func (s *Server) volume(v volume.Volume) *csi.Volume {
	out := &csi.Volume{VolumeId: v.ID, CapacityBytes: v.Size, VolumeContext: v.Map(), AccessibleTopology: s.accessible()}
	switch {
	case v.Origin.Volume != "":
		out.ContentSource = &csi.VolumeContentSource{Type: &csi.VolumeContentSource_Volume{
			Volume: &csi.VolumeContentSource_VolumeSource{VolumeId: v.Origin.Volume},
		}}
	case v.Origin.Snapshot != (volume.SnapshotID{}):
		out.ContentSource = &csi.VolumeContentSource{Type: &csi.VolumeContentSource_Snapshot{
			Snapshot: &csi.VolumeContentSource_SnapshotSource{SnapshotId: v.Origin.Snapshot.String()},
		}}
	}
	return out
}

func (s *controller) DeleteVolume(ctx context.Context, req *csi.DeleteVolumeRequest) (*csi.DeleteVolumeResponse, error) {
	unlock, err := s.lock(ctx, req.GetVolumeId())
	if err != nil {
		return nil, err
	}
	defer unlock()
	if err := s.unattached(req.GetVolumeId()); err != nil {
		return nil, err
	}
	if err := s.config.Backend.Delete(ctx, req.GetVolumeId()); err != nil {
		return nil, err
	}
	return &csi.DeleteVolumeResponse{}, nil
}

// lock takes a volume that is there already.
func (s *Server) lock(ctx context.Context, id string) (unlock func(), err error) {
	if id == "" {
		return nil, invalid("volume id: it is missing")
	}
	return s.busy.Lock(ctx, id)
}

func (s *controller) ControllerGetVolume(ctx context.Context, req *csi.ControllerGetVolumeRequest) (*csi.ControllerGetVolumeResponse, error) {
	if req.GetVolumeId() == "" {
		return nil, invalid("volume id: it is missing")
	}
	v, err := s.config.Backend.Get(ctx, req.GetVolumeId())
	if err != nil {
		return nil, err
	}
	return &csi.ControllerGetVolumeResponse{Volume: s.volume(v), Status: &csi.ControllerGetVolumeResponse_VolumeStatus{}}, nil
}

func (s *controller) ValidateVolumeCapabilities(ctx context.Context, req *csi.ValidateVolumeCapabilitiesRequest) (*csi.ValidateVolumeCapabilitiesResponse, error) {
	if req.GetVolumeId() == "" {
		return nil, invalid("volume id: it is missing")
	}
	if len(req.GetVolumeCapabilities()) == 0 {
		return nil, invalid("volume capabilities: there is none; name at least one")
	}
	v, err := s.config.Backend.Get(ctx, req.GetVolumeId())
	if err != nil {
		return nil, err
	}
	for _, c := range req.GetVolumeCapabilities() {
		if _, err := read(c); err != nil {
			return &csi.ValidateVolumeCapabilitiesResponse{Message: status.Convert(err).Message()}, nil
		}
		if reason := suits(c, v.Parameters); reason != "" {
			return &csi.ValidateVolumeCapabilitiesResponse{Message: "volume " + v.ID + ": " + reason}, nil
		}
	}
	return &csi.ValidateVolumeCapabilitiesResponse{Confirmed: &csi.ValidateVolumeCapabilitiesResponse_Confirmed{
		VolumeContext: req.GetVolumeContext(), VolumeCapabilities: req.GetVolumeCapabilities(), Parameters: req.GetParameters(),
	}}, nil
}

func (s *controller) GetCapacity(ctx context.Context, req *csi.GetCapacityRequest) (*csi.GetCapacityResponse, error) {
	p, err := volume.ParseParameters(req.GetParameters())
	if err != nil {
		return nil, err
	}
	for _, c := range req.GetVolumeCapabilities() {
		if _, err := read(c); err != nil {
			return nil, err
		}
		if suits(c, p) != "" {
			return &csi.GetCapacityResponse{}, nil
		}
	}
	if t := req.GetAccessibleTopology(); t != nil && !s.reaches(t.GetSegments()) {
		return &csi.GetCapacityResponse{}, nil
	}
	n, err := s.config.Backend.Capacity(ctx, p)
	if err != nil {
		return nil, err
	}
	return &csi.GetCapacityResponse{AvailableCapacity: n}, nil
}

func (s *controller) ListVolumes(ctx context.Context, req *csi.ListVolumesRequest) (*csi.ListVolumesResponse, error) {
	all, err := s.config.Backend.List(ctx)
	if err != nil {
		return nil, err
	}
	some, next, err := page(all, func(v volume.Volume) string { return v.ID }, req.GetStartingToken(), req.GetMaxEntries())
	if err != nil {
		return nil, err
	}
	resp := &csi.ListVolumesResponse{NextToken: next}
	for _, v := range some {
		resp.Entries = append(resp.Entries, &csi.ListVolumesResponse_Entry{Volume: s.volume(v)})
	}
	return resp, nil
}

// page cuts a sorted list. A token is the id of the last entry of the page before: it stays right when others come and go.
func page[T any](all []T, id func(T) string, token string, most int32) (some []T, next string, err error) {
	const prefix = "after:"
	if most < 0 {
		return nil, "", invalid("max entries: %d is below 0", most)
	}
	if token != "" {
		after, ok := strings.CutPrefix(token, prefix)
		if !ok {
			return nil, "", status.Errorf(codes.Aborted, "starting token: %.80q is none of ours; begin again without one", token)
		}
		for len(all) > 0 && id(all[0]) <= after {
			all = all[1:]
		}
	}
	if most == 0 || int(most) >= len(all) {
		return all, "", nil
	}
	return all[:most], prefix + id(all[most-1]), nil
}

func (s *controller) ControllerExpandVolume(ctx context.Context, req *csi.ControllerExpandVolumeRequest) (*csi.ControllerExpandVolumeResponse, error) {
	e, ok := s.config.Backend.(volume.Expander)
	if !ok {
		return nil, status.Error(codes.Unimplemented, "this backend's volumes can't grow")
	}
	unlock, err := s.lock(ctx, req.GetVolumeId())
	if err != nil {
		return nil, err
	}
	defer unlock()
	c := req.GetCapacityRange()
	if c == nil {
		return nil, invalid("capacity range: it is missing")
	}
	if c.GetRequiredBytes() < 0 || c.GetLimitBytes() < 0 {
		return nil, status.Error(codes.OutOfRange, "capacity range: it is below 0")
	}
	v, err := s.config.Backend.Get(ctx, req.GetVolumeId())
	if err != nil {
		return nil, err
	}
	if req.GetVolumeCapability() != nil {
		if _, err := wishFor(req.GetVolumeCapability(), v); err != nil {
			return nil, err
		}
	}
	n, err := e.Expand(ctx, v.ID, c.GetRequiredBytes(), c.GetLimitBytes())
	if err != nil {
		return nil, err
	}
	return &csi.ControllerExpandVolumeResponse{CapacityBytes: n, NodeExpansionRequired: true}, nil
}

func (s *controller) snapshotter() (volume.Snapshotter, error) {
	b, ok := s.config.Backend.(volume.Snapshotter)
	if !ok {
		return nil, status.Error(codes.Unimplemented, "this backend takes no snapshots")
	}
	return b, nil
}

func (s *controller) CreateSnapshot(ctx context.Context, req *csi.CreateSnapshotRequest) (*csi.CreateSnapshotResponse, error) {
	b, err := s.snapshotter()
	if err != nil {
		return nil, err
	}
	id := volume.SnapshotID{Volume: req.GetSourceVolumeId(), Name: req.GetName()}
	if err := (volume.SnapshotRequest{ID: id}).Check(); err != nil {
		return nil, err
	}
	for name := range req.GetParameters() {
		return nil, invalid("parameter %.80q: snapshots have none", name)
	}
	unlock, err := s.lock(ctx, req.GetSourceVolumeId())
	if err != nil {
		return nil, err
	}
	var snap volume.Snapshot
	err = s.complete(ctx, "snapshot "+id.String(), unlock, func(ctx context.Context) error {
		taken, err := b.Snapshot(ctx, volume.SnapshotRequest{ID: id, Hold: s.hold(id.Volume)})
		snap = taken
		return err
	})
	if err != nil {
		return nil, err
	}
	if snap.Copied {
		s.config.Log.Info("the pool's file system shares no data between files: the snapshot is a copy", "snapshot", snap.ID.String())
	}
	return &csi.CreateSnapshotResponse{Snapshot: snapshot(snap)}, nil
}

func snapshot(s volume.Snapshot) *csi.Snapshot {
	return &csi.Snapshot{
		SnapshotId: s.ID.String(), SourceVolumeId: s.ID.Volume, SizeBytes: s.Size,
		CreationTime: timestamppb.New(s.Created), ReadyToUse: true,
	}
}

func (s *controller) DeleteSnapshot(ctx context.Context, req *csi.DeleteSnapshotRequest) (*csi.DeleteSnapshotResponse, error) {
	b, err := s.snapshotter()
	if err != nil {
		return nil, err
	}
	if req.GetSnapshotId() == "" {
		return nil, invalid("snapshot id: it is missing")
	}
	id, err := volume.ParseSnapshotID(req.GetSnapshotId())
	if err != nil {
		return &csi.DeleteSnapshotResponse{}, nil // there can't be one
	}
	unlock, err := s.busy.Lock(ctx, id.Volume)
	if err != nil {
		return nil, err
	}
	defer unlock()
	if err := b.DeleteSnapshot(ctx, id); err != nil {
		return nil, err
	}
	return &csi.DeleteSnapshotResponse{}, nil
}

func (s *controller) ListSnapshots(ctx context.Context, req *csi.ListSnapshotsRequest) (*csi.ListSnapshotsResponse, error) {
	all, err := s.snapshots(ctx, req.GetSourceVolumeId(), req.GetSnapshotId())
	if err != nil {
		return nil, err
	}
	some, next, err := page(all, func(s volume.Snapshot) string { return s.ID.String() }, req.GetStartingToken(), req.GetMaxEntries())
	if err != nil {
		return nil, err
	}
	resp := &csi.ListSnapshotsResponse{NextToken: next}
	for _, one := range some {
		resp.Entries = append(resp.Entries, &csi.ListSnapshotsResponse_Entry{Snapshot: snapshot(one)})
	}
	return resp, nil
}

// snapshots are all, those of a volume, or the one of an id. What is not there leaves the list empty.
func (s *controller) snapshots(ctx context.Context, of, one string) ([]volume.Snapshot, error) {
	b, err := s.snapshotter()
	if err != nil {
		return nil, err
	}
	if one != "" {
		id, err := volume.ParseSnapshotID(one)
		if errors.Is(err, volume.ErrNotFound) || of != "" && of != id.Volume {
			return nil, nil
		}
		of = id.Volume
	}
	if of != "" && !volume.ValidName(of) {
		return nil, nil
	}
	all, err := b.Snapshots(ctx, of)
	if err != nil {
		return nil, err
	}
	var some []volume.Snapshot
	for _, snap := range all {
		if one == "" || snap.ID.String() == one {
			some = append(some, snap)
		}
	}
	return some, nil
}

func (s *controller) GetSnapshot(ctx context.Context, req *csi.GetSnapshotRequest) (*csi.GetSnapshotResponse, error) {
	if req.GetSnapshotId() == "" {
		return nil, invalid("snapshot id: it is missing")
	}
	found, err := s.snapshots(ctx, "", req.GetSnapshotId())
	if err != nil {
		return nil, err
	}
	if len(found) == 0 {
		return nil, status.Errorf(codes.NotFound, "snapshot %.80q: there is none", req.GetSnapshotId())
	}
	return &csi.GetSnapshotResponse{Snapshot: snapshot(found[0])}, nil
}
