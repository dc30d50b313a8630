//go:build vm

package main

import (
	"context"
	"errors"
	"net"
	"net/http"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/cradlestack/cradlestack/spec"
)

// A snapshot that is a copy may take longer than its caller waits. It goes on, and who asks again gets it: here a guest takes its time to hold still.
func TestRootSnapshotOutlastsItsCall(t *testing.T) {
	dir := shortDir(t)
	target, staging := filepath.Join(dir, "target"), filepath.Join(dir, "staging")
	conn, err := grpc.NewClient(serve(t, dir, dirPool(t, dir)), grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithDefaultCallOptions(grpc.WaitForReady(true)))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	controller, node := csi.NewControllerClient(conn), csi.NewNodeClient(conn)
	must := func(_ any, err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	ctx := t.Context()
	writer := &csi.VolumeCapability{
		AccessType: &csi.VolumeCapability_Mount{Mount: &csi.VolumeCapability_MountVolume{}},
		AccessMode: &csi.VolumeCapability_AccessMode{Mode: csi.VolumeCapability_AccessMode_SINGLE_NODE_WRITER},
	}
	must(controller.CreateVolume(ctx, &csi.CreateVolumeRequest{
		Name: "v", CapacityRange: &csi.CapacityRange{RequiredBytes: 64 << 20}, VolumeCapabilities: []*csi.VolumeCapability{writer},
		Parameters: map[string]string{"class": "lv2", "attach": "direct"},
	}))
	must(node.NodeStageVolume(ctx, &csi.NodeStageVolumeRequest{VolumeId: "v", StagingTargetPath: staging, VolumeCapability: writer}))
	must(node.NodePublishVolume(ctx, &csi.NodePublishVolumeRequest{VolumeId: "v", StagingTargetPath: staging, TargetPath: target, VolumeCapability: writer}))

	var thaws atomic.Int32
	asked, goOn := make(chan struct{}, 100), make(chan struct{})
	mux := http.NewServeMux()
	mux.HandleFunc("POST "+spec.DirectFreezePath, func(w http.ResponseWriter, _ *http.Request) {
		asked <- struct{}{}
		<-goOn
		w.WriteHeader(http.StatusNoContent)
	})
	mux.HandleFunc("POST "+spec.DirectThawPath, func(w http.ResponseWriter, _ *http.Request) {
		thaws.Add(1)
		w.WriteHeader(http.StatusNoContent)
	})
	l, err := net.Listen("unix", filepath.Join(spec.DirectDir, spec.DirectSocket(target)))
	if err != nil {
		t.Fatal(err)
	}
	guest := &http.Server{Handler: mux}
	served := make(chan error)
	go func() { served <- guest.Serve(l) }()
	defer func() {
		guest.Close()
		if err := <-served; !errors.Is(err, http.ErrServerClosed) {
			t.Error(err)
		}
	}()

	request := &csi.CreateSnapshotRequest{SourceVolumeId: "v", Name: "s"}
	impatient, cancel := context.WithCancel(ctx)
	go func() { <-asked; cancel() }()
	if _, err := controller.CreateSnapshot(impatient, request); status.Code(err) != codes.Canceled {
		t.Fatalf("the first call: %v", err)
	}
	again := time.Now()
	go func() {
		time.Sleep(100 * time.Millisecond) // the second one waits by then, as a rule
		close(goOn)
	}()
	s, err := controller.CreateSnapshot(ctx, request)
	if err != nil {
		t.Fatal(err)
	}
	if made := s.Snapshot.CreationTime.AsTime(); !s.Snapshot.ReadyToUse || !made.Before(again) || thaws.Load() != 1 {
		t.Errorf("the second call, of %v, has a snapshot of %v, for which the guest was thawed %d times: it was made anew", again, made, thaws.Load())
	}
	must(controller.DeleteSnapshot(ctx, &csi.DeleteSnapshotRequest{SnapshotId: s.Snapshot.SnapshotId}))
	must(node.NodeUnpublishVolume(ctx, &csi.NodeUnpublishVolumeRequest{VolumeId: "v", TargetPath: target}))
	must(node.NodeUnstageVolume(ctx, &csi.NodeUnstageVolumeRequest{VolumeId: "v", StagingTargetPath: staging}))
	must(controller.DeleteVolume(ctx, &csi.DeleteVolumeRequest{VolumeId: "v"}))
}
