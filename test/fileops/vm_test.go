//go:build vm

package main

import (
	"archive/tar"
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"

	"github.com/cradlestack/cradlestack/internal/filertest"
	"github.com/cradlestack/cradlestack/internal/mountns"
	"github.com/cradlestack/cradlestack/internal/nfstest"
	"github.com/cradlestack/cradlestack/test/programs"
)

func TestMain(m *testing.M) {
	mountns.Own()
	os.Exit(m.Run())
}

// A kind of file system that a container can have at /v/d.
type kind struct {
	name    string
	flags   []string // of kcradle summon
	without string   // what it is known not to do, see docs/volumes.md
	host    string   // the same directory on this host, "" where there is none
	fsck    []string // checks the volume after the pod's end
}

func kinds(t *testing.T) []kind {
	t.Helper()
	dir := t.TempDir()
	share := func(name string) string {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Join(path, "d"), 0o755); err != nil {
			t.Fatal(err)
		}
		return path
	}
	nfs := func(version string) []string {
		server, err := nfstest.Serve(t.Context(), share("nfs"+version))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := server.Close(); err != nil {
				t.Error(err)
			}
		})
		return []string{"--mount", "type=nfs,source=nfs://" + server.Host + nfstest.Export + ",target=/v,options=vers=" + version}
	}
	ext4, xfs, root := filepath.Join(dir, "ext4.img"), filepath.Join(dir, "xfs.img"), filepath.Join(dir, "root.img")
	return append([]kind{
		{name: "overlay", without: "copyup"}, // the container's root, /v/d being in a layer of the image
		{name: "scratch", flags: []string{"-v", "named:/v"}},
		{name: "block ext4", flags: []string{"-v", ext4 + ":/v:size=600M"}, fsck: []string{"e2fsck", "-fn", ext4}},
		{name: "block xfs", flags: []string{"-v", xfs + ":/v:xfs,size=600M"}, fsck: []string{"xfs_repair", "-n", xfs}},
		{name: "block at root", flags: []string{"-v", root + ":/:size=600M"}, fsck: []string{"e2fsck", "-fn", root}},
		{name: "9p", flags: []string{"-v", share("9p") + ":/v"}, host: share("9p"), without: "maplinked,unlinked,nanoseconds"},
		{name: "virtiofs", flags: []string{"-v", share("virtiofs") + ":/v:virtiofs"}, host: share("virtiofs"), without: "mapappend"},
		{name: "NFS 3", flags: nfs("3"), host: filepath.Join(dir, "nfs3"), without: "unlinkedlinks,linktimes,reasons"},
		{name: "NFS 4.2", flags: nfs("4.2"), host: filepath.Join(dir, "nfs4.2"), without: "unlinkedlinks,linktimes,reasons"},
	}, engines(t)...)
}

// engines are the volumes of cradle-filer, one by each of its engines.
func engines(t *testing.T) []kind {
	t.Helper()
	filer, production := filertest.Start(t), filertest.Start(t, "--engine", "ganesha")
	files, produced := filer.Volume("files", 600<<20, nil), production.Volume("files", 600<<20, nil)
	return []kind{
		{name: "cradle-filer", flags: []string{"--mount", filer.Publish("files").Mount("/v")}, host: files, without: "unlinkedlinks,linktimes,reasons"},
		{name: "cradle-filer by NFS-Ganesha", flags: []string{"--mount", production.Publish("files").Mount("/v")}, host: produced, without: "unlinkedlinks,linktimes,reasons"},
	}
}

// Files on every kind of volume are what they are on a local file system, to the guest, after a restart of the pod, and to this host where it has them.
func TestVMFileOperations(t *testing.T) { fileOperations(t, kinds(t), "-ops", "160") }

// prepare is the path of kcradle, and a folder with this program and the image that has it.
func prepare(t *testing.T) (kcradle, dir, image string) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Fatal("tests of virtual machines need root")
	}
	kcradle, err := programs.Path("kcradle")
	if err != nil {
		t.Fatal(err)
	}
	dir = t.TempDir()
	if image, err = buildImage(dir); err != nil {
		t.Fatal(err)
	}
	return kcradle, dir, image
}

func fileOperations(t *testing.T, kinds []kind, how ...string) {
	t.Helper()
	kcradle, dir, image := prepare(t)
	for _, k := range kinds {
		t.Run(k.name, func(t *testing.T) { k.operations(t, kcradle, dir, image, how...) })
	}
}

func (k kind) operations(t *testing.T, kcradle, dir, image string, how ...string) {
	pod := filepath.Join(t.TempDir(), "pod")
	run := func(args ...string) string {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
		defer cancel()
		cmd := exec.CommandContext(ctx, kcradle, args...)
		cmd.WaitDelay = time.Minute
		var stdout, stderr bytes.Buffer
		cmd.Stdout, cmd.Stderr = &stdout, &stderr
		if err := cmd.Run(); err != nil {
			t.Fatalf("kcradle %s: %v\n%s%s", args[0], err, &stdout, &stderr)
		}
		return stdout.String()
	}
	t.Cleanup(func() { exec.Command(kcradle, "rm", "-f", pod).Run() })
	check := fmt.Sprintf("mkdir -p /v/d; test -e /v/done || /bin/fileops check -drop -workers 3 %s -without '%s' /v/d /reference >&2 || exit 9; touch /v/done; exec /bin/fileops list /v/d", strings.Join(how, " "), k.without)
	args := append([]string{"summon", pod, "oci:" + image, "--privileged", "-m", "256m", "--tmpfs", "/reference:size=150m"}, k.flags...)
	run(append(args, "--", "sh", "-c", check)...)
	first := run("run", pod)
	t.Log(did(t, kcradle, pod))
	if strings.Count(first, "\n") < 4 { // the directory, and one of each worker's: chance may have removed all in them
		t.Errorf("only these files are left:\n%s", first)
	}
	if second := run("run", pod); second != first {
		t.Errorf("after a restart of the pod:\n%s\nbefore:\n%s", second, first)
	}
	if k.host != "" {
		var seen strings.Builder
		if err := output(filepath.Join(dir, "fileops"), &seen, "list", filepath.Join(k.host, "d")); err != nil || seen.String() != first {
			t.Errorf("this host sees (%v)\n%s\nthe guest\n%s", err, &seen, first)
		}
	}
	if k.fsck != nil {
		if out, err := exec.Command(k.fsck[0], k.fsck[1:]...).CombinedOutput(); err != nil {
			t.Errorf("%v: %v\n%s", k.fsck, err, out)
		}
	}
}

// buildImage makes an image with this command and, beside it, the command itself: fileops.
func buildImage(dir string) (image string, err error) {
	tool := filepath.Join(dir, "fileops")
	build := exec.Command("go", "build", "-o", tool, ".")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		return "", fmt.Errorf("go build: %w\n%s", err, out)
	}
	image = filepath.Join(dir, "image")
	return image, writeImage(image, tool)
}

// did is what check said in the end.
func did(t *testing.T, kcradle, pod string) string {
	t.Helper()
	out, err := exec.Command(kcradle, "logs", pod).CombinedOutput()
	for line := range strings.Lines(string(out)) {
		if strings.Contains(line, " operations, seed ") {
			return strings.TrimSpace(line)
		}
	}
	t.Errorf("nothing was checked: %v, %s", err, out)
	return ""
}

func output(program string, stdout io.Writer, args ...string) error {
	cmd := exec.Command(program, args...)
	cmd.Stdout = stdout
	return cmd.Run()
}

// writeImage writes an OCI layout of busybox with the tool and, in a layer of its own, some files in /v/d.
func writeImage(dir, tool string) error {
	busybox, err := programs.Image("busybox")
	if err != nil {
		return err
	}
	index, err := layout.ImageIndexFromPath(busybox)
	if err != nil {
		return err
	}
	manifest, err := index.IndexManifest()
	if err != nil {
		return err
	}
	image, err := index.Image(manifest.Manifests[0].Digest)
	if err != nil {
		return err
	}
	program, err := os.ReadFile(tool)
	if err != nil {
		return err
	}
	content := []*tar.Header{{Name: "v/d/", Mode: 0o755, Typeflag: tar.TypeDir}}
	for worker := range 3 {
		at := fmt.Sprintf("v/d/worker%d/", worker)
		content = append(content, &tar.Header{Name: at, Mode: 0o755, Typeflag: tar.TypeDir})
		for _, name := range names[:2] {
			content = append(content, &tar.Header{Name: at + name + "/", Mode: 0o755, Typeflag: tar.TypeDir})
			for _, file := range names[2:6] {
				content = append(content, &tar.Header{Name: at + name + "/" + file, Mode: 0o644, Size: 10_000, Typeflag: tar.TypeReg})
			}
		}
	}
	for _, layer := range [][]*tar.Header{{{Name: "bin/fileops", Mode: 0o755, Size: int64(len(program)), Typeflag: tar.TypeReg}}, content} {
		var b bytes.Buffer
		w := tar.NewWriter(&b)
		for _, h := range layer {
			if err := w.WriteHeader(h); err != nil {
				return err
			}
			data := bytes.Repeat([]byte("of a layer"), 1000)
			if h.Name == "bin/fileops" {
				data = program
			}
			if _, err := w.Write(data[:h.Size]); err != nil {
				return err
			}
		}
		if err := w.Close(); err != nil {
			return err
		}
		var l v1.Layer
		if l, err = tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(b.Bytes())), nil }); err != nil {
			return err
		}
		if image, err = mutate.AppendLayers(image, l); err != nil {
			return err
		}
	}
	_, err = layout.Write(dir, mutate.AppendManifests(empty.Index, mutate.IndexAddendum{Add: image}))
	return err
}
