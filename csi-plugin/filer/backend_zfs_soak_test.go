//go:build vm && soak

package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/cradlestack/cradlestack/csi-plugin/filer/api"
	"github.com/cradlestack/cradlestack/spec"
)

// TestVMSoakBackendZFS: cradle-csi on a host without ZFS has a set's volumes on a zpool, which two machines have in turns, made, published, grown, snapshotted, cloned and deleted.
// Meanwhile the set is switched, and the active filer killed: each call succeeds as if nothing had been, and clients see nothing but a pause.
func TestVMSoakBackendZFS(t *testing.T) {
	ms := newMachines(t, embedded)
	p := ms.pair
	socket := p.file("csi.sock")
	conn, root := p.plugin(socket, "monolith", "--endpoint", "unix://"+socket, "--node-id", "client", "--zone", "zone", "--backend", "filer", "--filer", ms.both[1].address+":"+api.PeersPort, "--filer-key", p.file("peers.key"))
	ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
	defer cancel()
	must := func(_ any, err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(csi.NewIdentityClient(conn).Probe(ctx, &csi.ProbeRequest{}, grpc.WaitForReady(true)))
	controller, node := csi.NewControllerClient(conn), csi.NewNodeClient(conn)
	const mib = int64(1 << 20)
	size := 64 * mib
	made, err := controller.CreateVolume(ctx, &csi.CreateVolumeRequest{
		Name: "shared", VolumeCapabilities: []*csi.VolumeCapability{anybody}, Parameters: map[string]string{"class": "nfs", "attach": "direct"}, CapacityRange: &csi.CapacityRange{RequiredBytes: size},
	})
	must(made, err)
	if v := made.Volume; v.CapacityBytes != size || len(v.AccessibleTopology) != 1 || len(v.AccessibleTopology[0].Segments) != 1 || v.VolumeContext["snapshots"] == "" {
		t.Errorf("made %v", v)
	}
	staging, target := p.file("staging"), p.file("target")
	must(nil, os.MkdirAll(staging, 0o700))
	must(node.NodeStageVolume(ctx, &csi.NodeStageVolumeRequest{VolumeId: "shared", StagingTargetPath: staging, VolumeCapability: anybody}))
	must(node.NodePublishVolume(ctx, &csi.NodePublishVolumeRequest{VolumeId: "shared", StagingTargetPath: staging, TargetPath: target, VolumeCapability: anybody}))
	var d spec.DirectAttachment
	text, err := os.ReadFile(filepath.Join(root, spec.DirectDir, spec.DirectFile(target)))
	must(nil, errors.Join(err, json.Unmarshal(text, &d)))
	nfs := p.nfs(d.Volume.NFS.Address)
	defer nfs.close()
	handle := nfs.open(d.Volume.NFS.Export, "file")
	page := func(round int) []byte { return bytes.Repeat([]byte{byte('a' + round)}, 4096) }
	for round, move := range []string{"switch", "kill", "kill", "switch"} {
		active, other := ms.active()
		moved := make(chan error, 1)
		go func() {
			time.Sleep(time.Duration(round) * 300 * time.Millisecond)
			var err error
			if move == "kill" {
				_, err = active.run("kill -9 $(ps | grep '[c]radle-filer serve' | awk '{print $1}')")
			} else {
				_, err = active.run("./cradle-filer switch")
			}
			moved <- err
		}()
		snapshot, clone := fmt.Sprintf("then-%d", round), fmt.Sprintf("clone-%d", round)
		size += 16 * mib
		must(nil, nfs.write(handle, round*4096, page(round), true))
		must(controller.CreateSnapshot(ctx, &csi.CreateSnapshotRequest{SourceVolumeId: "shared", Name: snapshot}))
		grown, err := controller.ControllerExpandVolume(ctx, &csi.ControllerExpandVolumeRequest{VolumeId: "shared", CapacityRange: &csi.CapacityRange{RequiredBytes: size}})
		if must(grown, err); grown.CapacityBytes != size {
			t.Errorf("grown to %d it has %d", size, grown.CapacityBytes)
		}
		must(node.NodeExpandVolume(ctx, &csi.NodeExpandVolumeRequest{VolumeId: "shared", VolumePath: target, CapacityRange: &csi.CapacityRange{RequiredBytes: size}}))
		must(controller.CreateVolume(ctx, &csi.CreateVolumeRequest{
			Name: clone, VolumeCapabilities: []*csi.VolumeCapability{anybody}, Parameters: map[string]string{"class": "nfs", "attach": "direct"},
			VolumeContentSource: &csi.VolumeContentSource{Type: &csi.VolumeContentSource_Snapshot{Snapshot: &csi.VolumeContentSource_SnapshotSource{SnapshotId: "shared@" + snapshot}}},
		}))
		if _, err := controller.DeleteVolume(ctx, &csi.DeleteVolumeRequest{VolumeId: "shared"}); status.Code(err) != codes.FailedPrecondition {
			t.Fatalf("what is published is deleted: %v", err)
		}
		stats, err := node.NodeGetVolumeStats(ctx, &csi.NodeGetVolumeStatsRequest{VolumeId: "shared", VolumePath: target})
		if must(stats, err); stats.Usage[0].Total != size {
			t.Errorf("of %d bytes there are %v", size, stats)
		}
		if err := <-moved; err != nil {
			t.Errorf("%s: %v", move, err)
		}
		if move == "switch" {
			other.serves()
		}
		p.eventually("a filer serves, and the other stands by", ms.settled)
		now, _ := ms.active()
		if out := now.must("mkdir -p /clone && mount -t zfs -o ro tank/cradle/" + clone + " /clone && head -c 4096 /clone/file | sha256sum && umount /clone"); !strings.Contains(out, fmt.Sprintf("%x", sha256.Sum256(page(0)))) {
			t.Errorf("the clone of round %d has another page: %s", round, out)
		}
		must(controller.DeleteVolume(ctx, &csi.DeleteVolumeRequest{VolumeId: clone}))
		must(controller.DeleteSnapshot(ctx, &csi.DeleteSnapshotRequest{SnapshotId: "shared@" + snapshot}))
		t.Logf("round %d: %s, then %s serves", round, move, now.name)
	}
	p.eventually("a snapshot is taken by schedule", func() error {
		all, err := controller.ListSnapshots(ctx, &csi.ListSnapshotsRequest{SourceVolumeId: "shared"})
		if err == nil && !strings.Contains(fmt.Sprint(all), "shared@hourly-") {
			err = fmt.Errorf("there are %v", all)
		}
		return err
	})
	must(node.NodeUnpublishVolume(ctx, &csi.NodeUnpublishVolumeRequest{VolumeId: "shared", TargetPath: target}))
	must(node.NodeUnstageVolume(ctx, &csi.NodeUnstageVolumeRequest{VolumeId: "shared", StagingTargetPath: staging}))
	must(controller.DeleteVolume(ctx, &csi.DeleteVolumeRequest{VolumeId: "shared"}))
	must(controller.DeleteVolume(ctx, &csi.DeleteVolumeRequest{VolumeId: "vol"}))
	now, _ := ms.active()
	if out := strings.Fields(now.must("zfs list -H -o name -t all -r tank/cradle")); len(out) != 2 {
		t.Errorf("at the end there are %v", out)
	}
}
