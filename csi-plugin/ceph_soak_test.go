//go:build vm && soak

package main

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/cradlestack/cradlestack/csi-plugin/mount"
	"github.com/cradlestack/cradlestack/internal/cephtest"
)

// startCeph is a cluster, and the flags of a plugin that has its group cradle there.
func startCeph(t *testing.T) (*cephtest.Cluster, []string) {
	t.Helper()
	c := cephtest.Lab(t)
	keyring, err := c.Plugin(t.Context(), "../examples/nomad/volumes/ceph-client.sh", "cradle")
	if err != nil {
		t.Fatal(err)
	}
	return c, []string{"--backend", "ceph", "--pool", cephtest.FS, "--ceph-conf", c.Conf, "--ceph-keyring", keyring}
}

// left is what the cluster has of the plugin's: subvolumes and keys.
func left(t *testing.T, c *cephtest.Cluster) (names []string) {
	t.Helper()
	ctx := context.WithoutCancel(t.Context())
	for args, what := range map[string]string{"fs subvolume ls " + cephtest.FS + " --group_name cradle -f json": `"name":"`, "auth ls -f json": `"entity":"client.cradle:`} {
		out, err := c.Ceph(ctx, strings.Fields(args)...)
		if err != nil {
			t.Error(err)
		}
		for _, part := range strings.Split(out, what)[1:] {
			name, _, _ := strings.Cut(part, `"`)
			names = append(names, name)
		}
	}
	return names
}

// ownRun gives the test's plugins a /run/cradle of their own, in the mounts that this process has for itself.
func ownRun(t *testing.T) {
	t.Helper()
	const dir = "/run/cradle"
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "mode=755"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Errorf("unmount %s: %v", dir, err)
		}
	})
}

// TestRootSoakCephSanity runs csi-sanity whole on a real cluster, for volumes of the host's, and then what a cluster or a mount that does not answer must not hold up.
func TestRootSoakCephSanity(t *testing.T) {
	ownRun(t)
	c, flags := startCeph(t)
	dir := shortDir(t)
	endpoint := sanity(t, dir, pool{flags, func() []string { return left(t, c) }}, "class: gfs")
	t.Run("Hangs", func(t *testing.T) { testCephHangs(t, c, dir, endpoint) })
}

func testCephHangs(t *testing.T, c *cephtest.Cluster, dir, endpoint string) {
	conn, err := grpc.NewClient(endpoint, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	controller, node := csi.NewControllerClient(conn), csi.NewNodeClient(conn)
	caps := &csi.VolumeCapability{
		AccessType: &csi.VolumeCapability_Mount{Mount: &csi.VolumeCapability_MountVolume{}},
		AccessMode: &csi.VolumeCapability_AccessMode{Mode: csi.VolumeCapability_AccessMode_MULTI_NODE_MULTI_WRITER},
	}
	ctx := t.Context()
	must := func(what string, err error) {
		t.Helper()
		if err != nil {
			t.Fatalf("%s: %v", what, err)
		}
	}
	wants := func(what string, err error, want codes.Code) {
		t.Helper()
		if status.Code(err) != want {
			t.Errorf("%s: %v; want %v", what, err, want)
		}
	}
	staging, target := filepath.Join(dir, "hang-staging"), filepath.Join(dir, "hang", "target")
	publish := func(id string) error {
		_, err := node.NodeStageVolume(ctx, &csi.NodeStageVolumeRequest{VolumeId: id, StagingTargetPath: staging, VolumeCapability: caps})
		if err == nil {
			_, err = node.NodePublishVolume(ctx, &csi.NodePublishVolumeRequest{VolumeId: id, StagingTargetPath: staging, TargetPath: target, VolumeCapability: caps})
		}
		return err
	}
	unpublish := func(id string) error {
		_, err := node.NodeUnpublishVolume(ctx, &csi.NodeUnpublishVolumeRequest{VolumeId: id, TargetPath: target})
		return err
	}
	unstage := func(id string) error {
		_, err := node.NodeUnstageVolume(ctx, &csi.NodeUnstageVolumeRequest{VolumeId: id, StagingTargetPath: staging})
		return err
	}
	create := func(id string, parameters map[string]string) {
		t.Helper()
		_, err := controller.CreateVolume(ctx, &csi.CreateVolumeRequest{Name: id, Parameters: parameters, VolumeCapabilities: []*csi.VolumeCapability{caps}})
		must("create "+id, err)
	}
	remove := func(id string) {
		t.Helper()
		_, err := controller.DeleteVolume(ctx, &csi.DeleteVolumeRequest{VolumeId: id})
		must("delete "+id, err)
	}
	gone := func() {
		t.Helper()
		if mounted, err := mount.Is(target); err != nil || mounted {
			t.Errorf("still mounted at %s: %t, %v", target, mounted, err)
		}
	}

	create("hangs", map[string]string{"class": "gfs"})
	must("publish", publish("hangs"))
	fuse := fuseFor(t, "hangs")
	must("stop", syscall.Kill(fuse, syscall.SIGSTOP))
	_, err = node.NodeGetVolumeStats(ctx, &csi.NodeGetVolumeStatsRequest{VolumeId: "hangs", VolumePath: target})
	wants("the statistics of a mount that hangs", err, codes.Unavailable)
	must("unpublish a mount that hangs", unpublish("hangs"))
	gone()
	wants("unstage a mount that hangs", unstage("hangs"), codes.Unavailable)
	must("continue", syscall.Kill(fuse, syscall.SIGCONT))
	must("unstage", unstage("hangs"))
	remove("hangs")

	create("direct", map[string]string{"class": "gfs", "attach": "direct"})
	must("publish", publish("direct"))
	must("stop", c.Signal("ceph-mon", syscall.SIGSTOP))
	wants("unpublish without a monitor", unpublish("direct"), codes.Unavailable)
	gone()
	must("continue", c.Signal("ceph-mon", syscall.SIGCONT))
	must("unpublish again", unpublish("direct"))
	must("unstage", unstage("direct"))
	remove("direct")
}

// fuseFor finds the ceph-fuse that this host's plugin has started for a volume.
func fuseFor(t *testing.T, id string) int {
	t.Helper()
	all, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range all {
		text, _ := os.ReadFile(path)
		if args := strings.Split(string(text), "\x00"); filepath.Base(args[0]) == "ceph-fuse" && slices.Contains(args, "/run/cradle/ceph/mounts/"+id) {
			pid, err := strconv.Atoi(filepath.Base(filepath.Dir(path)))
			if err != nil {
				t.Fatal(err)
			}
			return pid
		}
	}
	t.Fatalf("no ceph-fuse has mounted volume %s", id)
	return 0
}

// TestRootSoakCephCopy copies files from a directory of one host to CephFS, and from there to a block volume on the other host, by commands that are killed at random moments.
func TestRootSoakCephCopy(t *testing.T) {
	c, _ := startCeph(t)
	s := startHosts(t)
	if err := s.Attach(c.Namespace(), netip.MustParseAddr(c.Host)); err != nil {
		t.Fatal(err)
	}
	one, two := s.Clients()[0], s.Clients()[1]
	s.on(one)
	s.Run(t, strings.NewReplacer(
		`job "cradle-csi-ceph" {`, fmt.Sprintf("job \"cradle-csi-ceph\" {\n  constraint {\n    attribute = \"${node.unique.name}\"\n    value     = %q\n  }", one.Name),
		`"--pool", "cephfs"`, fmt.Sprintf(`"--pool", "cephfs", "--ceph-conf", %q, "--ceph-keyring", %q`, c.Conf, filepath.Join(filepath.Dir(c.Conf), "cradle.keyring")),
	).Replace(s.example("cradle-csi-ceph.nomad.hcl")))
	s.id = "cradle"
	s.healthy()
	t.Cleanup(func() {
		if names := left(t, c); len(names) > 0 {
			t.Errorf("left in the cluster: %q", names)
		}
	})

	s.on(one)
	s.volume("pages", `"cradle"`, `"`+s.id+`"`)
	s.completes(use{job: "fill", volume: "pages", script: `cd /v; $b mkdir -p deep/er; for i in 1 2 3 4; do $b dd if=/dev/urandom of=deep/file$i bs=1M count=8 2>/dev/null; done
echo x >deep/er/x; $b chown 1000:1001 deep/er/x; $b chmod 4751 deep/er/x; $b ln deep/er/x deep/hard; $b ln -s er/x deep/soft; $b truncate -s 20M sparse; $b sha256sum deep/file* sparse >sums`})
	look := func(job, volume string) string {
		t.Helper()
		return s.completes(use{job: job, volume: volume, script: `cd /v; $b sha256sum -c -s sums; $b readlink deep/soft; $b ls -A . deep; $b stat -c '%a %u %g %h %s %Y' deep/er/x deep/hard sparse`})
	}
	was := look("look1", "pages")
	s.copiedUnderKills("pages", "pages-gfs", "--class", "gfs", "--plugin", "cradle", "--size", "100MiB")
	v, _, err := s.API.CSIVolumes().Info("pages-gfs", nil)
	if err != nil || v.PluginID != "cradle" || v.Context["class"] != "gfs" {
		t.Fatalf("Nomad knows %+v, %v", v, err)
	}
	for _, topology := range v.Topologies {
		if host, ok := topology.Segments["csi.cradlestack.org/host"]; ok {
			t.Errorf("a volume of the cluster's is on host %s alone", host)
		}
	}
	if now := look("look2", "pages-gfs"); now != was {
		t.Errorf("copied to CephFS:\n%s\nwant\n%s", now, was)
	}
	s.copiedUnderKills("pages-gfs", "pages-block", "--to", two.Name, "--class", "lv2")
	s.on(two)
	if now := look("look3", "pages-block"); now != was {
		t.Errorf("copied to a block volume:\n%s\nwant\n%s", now, was)
	}
	for args, want := range map[string]string{
		"copy pages-gfs --as x --plugin moon": "--plugin moon: there is no healthy plugin",
		"copy pages-gfs --as x --class lv2":   "which is class gfs; for lv2 use another backend",
	} {
		if out, err := s.try(strings.Fields(args)...); err == nil || !strings.Contains(out, want) {
			t.Errorf("%s: %v, %s; want %s", args, err, out, want)
		}
	}
	for _, id := range []string{"pages", "pages-gfs", "pages-block"} {
		s.CLI(t, "volume", "delete", id)
	}
	for _, n := range s.Clients() {
		s.on(n)
		s.empty()
	}
}
