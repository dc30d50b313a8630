//go:build vm

package main

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/cradlestack/cradlestack/csi-plugin/filer/api"
	"github.com/cradlestack/cradlestack/internal/locked"
	"github.com/cradlestack/cradlestack/spec"
)

// TestRootPlugin: cradle-csi on a host without a filer has volumes published by a set's filers, whichever is active, at the address of one that stands by; while the active
// one dies it waits for the next. What it publishes its host's guests mount.
func TestRootPlugin(t *testing.T) {
	onPlugin(t, func(p *pair) []string { return []string{"--pool", p.pool} })
}

// TestRootPluginFiler: so does one on a host that has not the volumes' storage, which has the active filer make, grow and delete them, and take snapshots.
func TestRootPluginFiler(t *testing.T) {
	onPlugin(t, func(*pair) []string { return []string{"--backend", "filer"} })
}

// anybody is how a volume is asked for that many write to on many hosts.
var anybody = &csi.VolumeCapability{
	AccessType: &csi.VolumeCapability_Mount{Mount: &csi.VolumeCapability_MountVolume{}}, AccessMode: &csi.VolumeCapability_AccessMode{Mode: csi.VolumeCapability_AccessMode_MULTI_NODE_MULTI_WRITER},
}

func onPlugin(t *testing.T, keep func(*pair) []string) {
	p := newPair(t, 3*time.Second)
	active, other := p.active()
	socket, key := p.file("csi.sock"), filepath.Join(p.pool, setState, "handles.key")
	args := append([]string{"monolith", "--endpoint", "unix://" + socket, "--node-id", "client", "--filer", other.address + ":" + api.PeersPort}, keep(p)...)
	if out, err := exec.CommandContext(t.Context(), p.programs["cradle-csi"], args...).CombinedOutput(); err == nil || !strings.Contains(string(out), "name its file with --filer-key") {
		t.Errorf("without a key: %s, %v", out, err)
	}
	conn, root := p.plugin(socket, append(args, "--filer-key", key)...)
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	must := func(_ any, err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(csi.NewIdentityClient(conn).Probe(ctx, &csi.ProbeRequest{}, grpc.WaitForReady(true)))
	controller, node := csi.NewControllerClient(conn), csi.NewNodeClient(conn)
	must(controller.CreateVolume(ctx, &csi.CreateVolumeRequest{Name: "shared", VolumeCapabilities: []*csi.VolumeCapability{anybody}, Parameters: map[string]string{"class": "nfs", "attach": "direct"}}))
	t.Cleanup(func() {
		if _, err := controller.DeleteVolume(context.WithoutCancel(ctx), &csi.DeleteVolumeRequest{VolumeId: "shared"}); err != nil {
			t.Error(err)
		}
	})
	staging := func(name string) string { return p.file("staging-" + name) }
	publish := func(name string) (d spec.DirectAttachment) {
		t.Helper()
		must(nil, os.MkdirAll(staging(name), 0o700))
		must(node.NodeStageVolume(ctx, &csi.NodeStageVolumeRequest{VolumeId: "shared", StagingTargetPath: staging(name), VolumeCapability: anybody}))
		must(node.NodePublishVolume(ctx, &csi.NodePublishVolumeRequest{VolumeId: "shared", StagingTargetPath: staging(name), TargetPath: p.file(name), VolumeCapability: anybody}))
		text, err := os.ReadFile(filepath.Join(root, spec.DirectDir, spec.DirectFile(p.file(name))))
		must(nil, err)
		must(nil, json.Unmarshal(text, &d))
		if d.Volume.NFS == nil {
			t.Fatalf("the record is %s", text)
		}
		return d
	}
	unpublish := func(name string) {
		t.Helper()
		must(node.NodeUnpublishVolume(ctx, &csi.NodeUnpublishVolumeRequest{VolumeId: "shared", TargetPath: p.file(name)}))
		must(node.NodeUnstageVolume(ctx, &csi.NodeUnstageVolumeRequest{VolumeId: "shared", StagingTargetPath: staging(name)}))
	}
	use := func(d spec.DirectAttachment, file string) {
		t.Helper()
		c := p.nfs(d.Volume.NFS.Address)
		defer c.close()
		must(nil, c.write(c.open(d.Volume.NFS.Export, file), 0, []byte("by "+file), true))
		if text, err := os.ReadFile(filepath.Join(p.pool, "shared", "data", file)); err != nil || string(text) != "by "+file {
			t.Errorf("the volume has %q, %v", text, err)
		}
	}
	first := publish("first")
	use(first, "first")
	if s, err := node.NodeGetVolumeStats(ctx, &csi.NodeGetVolumeStatsRequest{VolumeId: "shared", VolumePath: p.file("first")}); err != nil || len(s.Usage) == 0 || s.Usage[0].Total == 0 {
		t.Errorf("its stats are %v, %v", s, err)
	}
	if _, err := node.NodePublishVolume(ctx, &csi.NodePublishVolumeRequest{VolumeId: "absent", StagingTargetPath: staging("x"), TargetPath: p.file("x"), VolumeCapability: anybody}); status.Code(err) != codes.NotFound {
		t.Errorf("what is not there is published: %v", err)
	}
	// The plugin asks one that stands by while the active one is dead.
	p.signal(active.filer.Pid, unix.SIGKILL)
	use(publish("second"), "second")
	if _, err := controller.DeleteVolume(ctx, &csi.DeleteVolumeRequest{VolumeId: "shared"}); status.Code(err) != codes.FailedPrecondition {
		t.Errorf("what is published is deleted: %v", err)
	}
	active.again()
	if out, err := other.command("publications", "-o", "json"); err != nil || strings.Count(out, `"shared"`) != 2 {
		t.Errorf("there are %s, %v", out, err)
	}
	use(first, "third")
	// A snapshot, and a volume of it, as the filer that was active before is so again.
	p.eventually("both stand", p.settled)
	if out, err := other.command("switch"); err != nil {
		t.Fatalf("switch: %v: %s", err, out)
	}
	must(controller.CreateSnapshot(ctx, &csi.CreateSnapshotRequest{SourceVolumeId: "shared", Name: "then"}))
	must(controller.CreateVolume(ctx, &csi.CreateVolumeRequest{
		Name: "clone", VolumeCapabilities: []*csi.VolumeCapability{anybody}, Parameters: map[string]string{"class": "nfs", "attach": "direct"},
		VolumeContentSource: &csi.VolumeContentSource{Type: &csi.VolumeContentSource_Snapshot{Snapshot: &csi.VolumeContentSource_SnapshotSource{SnapshotId: "shared@then"}}},
	}))
	if text, err := os.ReadFile(filepath.Join(p.pool, "clone", "data", "third")); err != nil || string(text) != "by third" {
		t.Errorf("the clone has %q, %v", text, err)
	}
	if list, err := controller.ListVolumes(ctx, &csi.ListVolumesRequest{}); err != nil || len(list.Entries) != 3 { // with the pair's own
		t.Errorf("there are %v, %v", list, err)
	}
	if _, err := controller.CreateVolume(ctx, &csi.CreateVolumeRequest{
		Name: "sized", VolumeCapabilities: []*csi.VolumeCapability{anybody}, Parameters: map[string]string{"class": "nfs"}, CapacityRange: &csi.CapacityRange{RequiredBytes: 1 << 20},
	}); status.Code(err) != codes.InvalidArgument {
		t.Errorf("an image on two hosts is made: %v", err)
	}
	must(controller.DeleteVolume(ctx, &csi.DeleteVolumeRequest{VolumeId: "clone"}))
	must(controller.DeleteSnapshot(ctx, &csi.DeleteSnapshotRequest{SnapshotId: "shared@then"}))
	unpublish("first")
	unpublish("second")
	if out, err := other.command("publications", "-o", "json"); err != nil || strings.TrimSpace(out) != "[]" {
		t.Errorf("at the end there are %s, %v", out, err)
	}
	c := p.nfs(first.Volume.NFS.Address)
	defer c.close()
	if reply := c.call(c.record(-1, []byte(first.Volume.NFS.Export), nil)); binary.BigEndian.Uint32(reply) == 0 {
		t.Error("what was unpublished can be mounted")
	}
}

// plugin runs cradle-csi on the clients' host. root is where it has its files.
func (p *pair) plugin(socket string, args ...string) (conn *grpc.ClientConn, root string) {
	p.t.Helper()
	// Its mounts are its own, and shared as a host's are: this host may have a plugin, with records in /run.
	cmd := exec.Command("ip", append([]string{"netns", "exec", p.ns("cl"), "bash", "-c", `mount --make-rprivate / && mount --make-rshared / && mount -t tmpfs tmpfs /run && exec "$@"`, "csi", p.programs["cradle-csi"]}, args...)...)
	var log locked.Buffer
	cmd.Stdout, cmd.Stderr = &log, &log
	if err := cmd.Start(); err != nil {
		p.t.Fatal(err)
	}
	p.t.Cleanup(func() {
		cmd.Process.Signal(unix.SIGTERM)
		if err := cmd.Wait(); err != nil || p.t.Failed() {
			p.t.Errorf("cradle-csi: %v\n%s", err, log.String())
		}
	})
	conn, err := grpc.NewClient("passthrough:///csi", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", socket)
		}))
	if err != nil {
		p.t.Fatal(err)
	}
	p.t.Cleanup(func() { conn.Close() })
	return conn, fmt.Sprintf("/proc/%d/root", cmd.Process.Pid)
}
