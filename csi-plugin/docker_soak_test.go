//go:build vm && soak

package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/cradlestack/cradlestack/test/dockerd"
	"github.com/cradlestack/cradlestack/test/programs"
)

// TestRootSoakDocker runs the plugin in a container of docker's, as docs/csi.md says: what it mounts the host sees, also after the container was killed, and the next one takes it
// away. Where the host would not see it, it is refused.
func TestRootSoakDocker(t *testing.T) {
	dir := shortDir(t)
	home, at := filepath.Join(dir, "d"), filepath.Join(dir, "at")
	for _, d := range []string{home, at} {
		if err := os.Mkdir(d, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	root, err := programs.Root()
	if err != nil {
		t.Fatal(err)
	}
	d := dockerd.ForTest(t, home)
	do := func(cmd *exec.Cmd) string {
		t.Helper()
		cmd.Env = append(os.Environ(), "DOCKER_HOST="+d.Host, "XDG_CONFIG_HOME="+dir+"/config", "PATH="+root+"/bin:"+os.Getenv("PATH"))
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("%v: %v\n%s", cmd.Args, err, out)
		}
		return string(out)
	}
	host := func(script string) string {
		t.Helper()
		return do(d.Mounts(t.Context(), "sh", "-ec", script))
	}
	do(exec.CommandContext(t.Context(), "sh", "-ec", `bali id >/dev/null
"$0/examples/bootstrap/images.sh" "$1" cradle-csi
docker import -c 'ENTRYPOINT ["/bin/cradle-csi"]' -c 'ENV PATH=/bin' "$1/cradle-csi.tar.gz" cradle-csi`, root, dir))
	host("mount --bind " + at + " " + at + " && mount --make-rshared " + at)
	defer host("umount " + at)
	run := func(name, volumes string) {
		t.Helper()
		do(exec.CommandContext(t.Context(), "docker", "run", "-d", "--name", name, "--network", "none", "--cap-add", "SYS_ADMIN", "--security-opt", "apparmor=unconfined",
			"--device-cgroup-rule", "b 7:* rmw", "--device-cgroup-rule", "c 10:237 rmw", "-v", "/dev:/dev", "-v", volumes, "cradle-csi", "monolith", "--pool", at+"/pool", "--endpoint", "unix://"+at+"/csi.sock", "--node-id", "host"))
	}
	conn, err := grpc.NewClient("unix://"+at+"/csi.sock", grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithDefaultCallOptions(grpc.WaitForReady(true)))
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
	writer := &csi.VolumeCapability{
		AccessType: &csi.VolumeCapability_Mount{Mount: &csi.VolumeCapability_MountVolume{}},
		AccessMode: &csi.VolumeCapability_AccessMode{Mode: csi.VolumeCapability_AccessMode_SINGLE_NODE_WRITER},
	}
	stage := &csi.NodeStageVolumeRequest{VolumeId: "v", StagingTargetPath: at + "/staging", VolumeCapability: writer}
	publish := &csi.NodePublishVolumeRequest{VolumeId: "v", StagingTargetPath: at + "/staging", TargetPath: at + "/target", VolumeCapability: writer}

	run("private", at+":"+at)
	must(controller.CreateVolume(t.Context(), &csi.CreateVolumeRequest{
		Name: "v", CapacityRange: &csi.CapacityRange{RequiredBytes: 64 << 20}, VolumeCapabilities: []*csi.VolumeCapability{writer}, Parameters: map[string]string{"class": "lv2"},
	}))
	must(node.NodeStageVolume(t.Context(), stage))
	if _, err := node.NodePublishVolume(t.Context(), publish); status.Code(err) != codes.FailedPrecondition || !strings.Contains(err.Error(), "is seen in the plugin's mount namespace alone") {
		t.Errorf("published where the host does not see it: %v", err)
	}
	do(exec.CommandContext(t.Context(), "docker", "rm", "-f", "private"))

	run("csi", at+":"+at+":rshared")
	must(node.NodeStageVolume(t.Context(), stage))
	must(node.NodePublishVolume(t.Context(), publish))
	host("mountpoint -q " + at + "/target; echo kept >" + at + "/target/file; sync -f " + at + "/target")
	do(exec.CommandContext(t.Context(), "docker", "kill", "csi"))
	if kept := host("mountpoint -q " + at + "/target; cat " + at + "/target/file; echo more >>" + at + "/target/file"); kept != "kept\n" {
		t.Errorf("after the plugin's end the host has %q", kept)
	}
	do(exec.CommandContext(t.Context(), "docker", "start", "csi"))
	must(node.NodeUnpublishVolume(t.Context(), &csi.NodeUnpublishVolumeRequest{VolumeId: "v", TargetPath: publish.TargetPath}))
	must(node.NodeUnstageVolume(t.Context(), &csi.NodeUnstageVolumeRequest{VolumeId: "v", StagingTargetPath: stage.StagingTargetPath}))
	must(controller.DeleteVolume(t.Context(), &csi.DeleteVolumeRequest{VolumeId: "v"}))
	if left := host("ls -A " + at + "/pool; grep -c ' " + at + "/' /proc/1/mountinfo || true"); left != ".lock\n0\n" {
		t.Errorf("left on the host: %s", left)
	}
	do(exec.CommandContext(t.Context(), "docker", "rm", "-f", "csi"))
}
