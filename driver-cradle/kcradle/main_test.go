package main

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"io"
	"log"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/rogpeppe/go-internal/testscript"

	"github.com/cradlestack/cradlestack/driver-cradle/boot"
	"github.com/cradlestack/cradlestack/driver-cradle/pod"
	"github.com/cradlestack/cradlestack/driver-cradle/vmm"
)

func TestMain(m *testing.M) {
	vmm.Confine()
	testscript.Main(tests{m}, map[string]func(){"kcradle": main})
}

type tests struct{ *testing.M }

// Run runs all tests and what they have asked for at the end.
func (m tests) Run() int {
	code := m.M.Run()
	for _, f := range atEnd {
		f()
	}
	return code
}

var atEnd []func()

// The scripts read as the manual does; what needs a machine is in testdata/vm.
func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir: "testdata/script",
		Setup: func(env *testscript.Env) error {
			env.Setenv("CRADLE_ROOT", filepath.Join(env.WorkDir, "cache"))
			env.Setenv("CRADLE_BOOT", filepath.Join(env.WorkDir, "boot"))
			if err := writeImage(filepath.Join(env.WorkDir, "image"), "amd64"); err != nil {
				return err
			}
			if err := writeImage(filepath.Join(env.WorkDir, "foreign"), "s390x"); err != nil {
				return err
			}
			return writeBootPackage(filepath.Join(env.WorkDir, "boot"))
		},
	})
}

// A mirror is asked first for what is docker.io's.
func TestRegistryMirror(t *testing.T) {
	mirror := httptest.NewServer(registry.New(registry.Logger(log.New(io.Discard, "", 0))))
	defer mirror.Close()
	img, err := anImage("amd64")
	if err != nil {
		t.Fatal(err)
	}
	ref, err := name.ParseReference(strings.TrimPrefix(mirror.URL, "http://") + "/hub/library/hello:1")
	if err != nil {
		t.Fatal(err)
	}
	if err := remote.Write(ref, img); err != nil {
		t.Fatal(err)
	}
	id, err := img.ConfigName()
	if err != nil {
		t.Fatal(err)
	}
	var stdout, stderr bytes.Buffer
	if code := run([]string{"--root", t.TempDir(), "images", "pull", "--registry-mirror", mirror.URL + "/hub", "hello:1"}, os.Stdin, &stdout, &stderr); code != 0 || stdout.String() != id.String()+"\n" {
		t.Errorf("exit code %d, %s%s", code, &stdout, &stderr)
	}
}

// A start that takes its time is told as what it is, not as an error.
func TestStatusOfSlowStart(t *testing.T) {
	t.Parallel()
	base := t.TempDir()
	dir := filepath.Join(base, "pod")
	if err := errors.Join(writeImage(filepath.Join(base, "image"), "amd64"), writeBootPackage(filepath.Join(base, "boot"))); err != nil {
		t.Fatal(err)
	}
	kcradle := func(args ...string) string {
		var stdout, stderr bytes.Buffer
		if code := run(append([]string{"--root", filepath.Join(base, "cache"), "--boot", filepath.Join(base, "boot")}, args...), os.Stdin, &stdout, &stderr); code != 0 {
			t.Fatalf("kcradle %v: exit code %d, %s", args, code, &stderr)
		}
		return stdout.String()
	}
	kcradle("summon", dir, "oci:"+filepath.Join(base, "image"))
	d, err := pod.Open(dir, nil)
	if err != nil {
		t.Fatal(err)
	}
	claim, err := d.Claim(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer claim.Close()
	if status := kcradle("status", dir); !strings.Contains(status, "): starting\n") {
		t.Errorf("the status is %s", status)
	}
}

// writeImage writes an OCI layout of an image with one file.
func writeImage(dir, architecture string) error {
	img, err := anImage(architecture)
	if err != nil {
		return err
	}
	index := mutate.AppendManifests(empty.Index, mutate.IndexAddendum{Add: img, Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: architecture}}})
	_, err = layout.Write(dir, index)
	return err
}

func anImage(architecture string) (v1.Image, error) {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	const text = "hello\n"
	if err := w.WriteHeader(&tar.Header{Name: "hello", Size: int64(len(text)), Mode: 0o644}); err != nil {
		return nil, err
	}
	io.WriteString(w, text)
	if err := w.Close(); err != nil {
		return nil, err
	}
	layer, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(b.Bytes())), nil })
	if err != nil {
		return nil, err
	}
	img, err := mutate.AppendLayers(empty.Image, layer)
	if err != nil {
		return nil, err
	}
	config, err := img.ConfigFile()
	if err != nil {
		return nil, err
	}
	config = config.DeepCopy()
	config.Architecture, config.OS = architecture, "linux"
	config.Config = v1.Config{
		Cmd: []string{"/hello"}, Env: []string{"PATH=/bin", "COLOR=red"}, WorkingDir: "/srv", User: "1:1", StopSignal: "SIGINT",
		Volumes: map[string]struct{}{"/data": {}}, ExposedPorts: map[string]struct{}{"80/tcp": {}},
	}
	return mutate.ConfigFile(img, config)
}

// writeBootPackage writes a package that is complete and boots nothing.
func writeBootPackage(dir string) error {
	if err := os.Mkdir(dir, 0o755); err != nil {
		return err
	}
	file := func(name, text string) (boot.File, error) {
		sum := sha256.Sum256([]byte(text))
		return boot.File{SHA256: hex.EncodeToString(sum[:]), Size: int64(len(text))}, os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644)
	}
	kernel, err := file(boot.KernelFile, "kernel")
	if err != nil {
		return err
	}
	initramfs, err := file(boot.InitramfsFile, "initramfs")
	if err != nil {
		return err
	}
	data, err := json.Marshal(boot.Manifest{Version: boot.ManifestVersion, Variant: "default", Kernel: kernel, Initramfs: initramfs, Machine: boot.Machine{Type: "microvm"}})
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, boot.ManifestFile), data, 0o644)
}
