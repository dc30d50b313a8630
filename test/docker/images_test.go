//go:build vm

package docker

import (
	"archive/tar"
	"bytes"
	"io"
	"path/filepath"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"

	"github.com/cradlestack/cradlestack/test/programs"
)

// images are busybox with what the cases need on top, by name.
func images(t *testing.T) map[string]v1.Image {
	t.Helper()
	plain := withLayer(t, busybox(t), users()...)
	configured := func(base v1.Image, edit func(*v1.Config)) v1.Image {
		file, err := base.ConfigFile()
		if err != nil {
			t.Fatal(err)
		}
		file = file.DeepCopy()
		edit(&file.Config)
		image, err := mutate.Config(base, file.Config)
		if err != nil {
			t.Fatal(err)
		}
		return image
	}
	return map[string]v1.Image{
		"plain": plain,
		"everything": configured(plain, func(c *v1.Config) {
			c.Entrypoint = []string{"echo", "entry"}
			c.Cmd = []string{"first argument", "second"}
			c.Env = append(c.Env, "COLOR=blue", "EMPTY=", "SPACED=a b  c", "QUOTED='x'\"y\"")
			c.Labels = map[string]string{"org.example.color": "blue", "org.example.empty": ""}
			c.ExposedPorts = map[string]struct{}{"80/tcp": {}, "53/udp": {}}
			c.StopSignal = "SIGUSR1"
			c.WorkingDir = "/etc"
		}),
		"shellform": configured(plain, func(c *v1.Config) {
			c.Entrypoint = []string{"/bin/sh", "-c", `echo shell $0 $*`}
			c.Cmd = []string{"zero", "one", "two"}
		}),
		"app": configured(plain, func(c *v1.Config) {
			c.User = "app"
			c.WorkingDir = "/made/by/the/runtime"
		}),
		"appgroup": configured(plain, func(c *v1.Config) { c.User = "app:extra" }),
		"usr1":     configured(plain, func(c *v1.Config) { c.StopSignal = "SIGUSR1" }),
		"quit": configured(plain, func(c *v1.Config) {
			c.StopSignal = "3"
			c.Cmd = []string{"sh", "-c", "trap 'echo quit; exit 7' QUIT; echo ready; while :; do sleep 0.1; done"}
		}),
		"volume": configured(withLayer(t, plain, volumeContent()...), func(c *v1.Config) {
			c.Volumes = map[string]struct{}{"/data": {}, "/empty": {}, "/missing/deep": {}}
		}),
		"healthy": configured(plain, func(c *v1.Config) {
			c.Healthcheck = &v1.HealthConfig{Test: []string{"CMD-SHELL", "echo checked; test -e /tmp/well"}, Interval: 300 * time.Millisecond, Timeout: time.Minute, Retries: 2}
		}),
		"repeated": withLayer(t, withLayer(t, withLayer(t, plain, repeated()...), between()...), repeated()...),
		"layers":   withLayer(t, withLayer(t, plain, below()...), above()...),
		"noexec": configured(withLayer(t, plain,
			entry{name: "script-no-x", mode: 0o644, text: "#!/bin/sh\necho never\n"},
			entry{name: "no-interpreter", mode: 0o755, text: "#!/not/there\n"},
			entry{name: "script", mode: 0o755, text: "#!/bin/sh\necho script \"$@\"\n"},
			entry{name: "garbage", mode: 0o755, text: "\x01\x02\x03\x04"},
		), func(c *v1.Config) { c.Cmd = nil }),
	}
}

func busybox(t *testing.T) v1.Image {
	t.Helper()
	dir, err := programs.Image("busybox")
	if err != nil {
		t.Fatal(err)
	}
	image, err := programs.OnlyImage(dir)
	if err != nil {
		t.Fatal(err)
	}
	return image
}

// writeLayout writes the image where kcradle reads it.
func writeLayout(t *testing.T, dir, name string, image v1.Image) string {
	t.Helper()
	dir = filepath.Join(dir, name)
	path, err := layout.Write(dir, empty.Index)
	if err != nil {
		t.Fatal(err)
	}
	if err := path.AppendImage(image); err != nil {
		t.Fatal(err)
	}
	return dir
}

// An entry of a layer: a file unless kind says otherwise.
type entry struct {
	name     string
	kind     byte // tar.Type…; 0 is a regular file
	mode     int64
	uid, gid int
	text     string // a file's content, a link's target
	size     int64  // of a file of zeros
	major    int64
	minor    int64
	xattrs   map[string]string
}

func withLayer(t *testing.T, base v1.Image, entries ...entry) v1.Image {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, e := range entries {
		h := &tar.Header{Name: e.name, Typeflag: e.kind, Mode: e.mode, Uid: e.uid, Gid: e.gid, ModTime: time.Unix(1700000000, 0), Devmajor: e.major, Devminor: e.minor}
		content := []byte(e.text)
		switch e.kind {
		case 0:
			h.Typeflag = tar.TypeReg
			if e.size > 0 {
				content = make([]byte, e.size)
			}
			h.Size = int64(len(content))
		case tar.TypeLink, tar.TypeSymlink:
			h.Linkname, content = e.text, nil
		}
		for name, value := range e.xattrs {
			h.PAXRecords = map[string]string{"SCHILY.xattr." + name: value}
		}
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(content); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	layer, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(b.Bytes())), nil })
	if err != nil {
		t.Fatal(err)
	}
	image, err := mutate.AppendLayers(base, layer)
	if err != nil {
		t.Fatal(err)
	}
	return image
}

func users() []entry {
	return []entry{
		{name: "etc", kind: tar.TypeDir, mode: 0o755},
		{name: "etc/passwd", mode: 0o644, text: "root:x:0:0:root:/root:/bin/sh\napp:x:1000:1000:App:/home/app:/bin/sh\nlonely:x:1001:1001::/:/bin/sh\n"},
		{name: "etc/group", mode: 0o644, text: "root:x:0:\napp:x:1000:\nextra:x:2000:app,root\nmore:x:2001:lonely,app\nunused:x:3000:\n"},
		{name: "home", kind: tar.TypeDir, mode: 0o755},
		{name: "home/app", kind: tar.TypeDir, mode: 0o750, uid: 1000, gid: 1000},
		{name: "tmp", kind: tar.TypeDir, mode: 0o1777},
		{name: "mnt", kind: tar.TypeDir, mode: 0o755},
	}
}

func volumeContent() []entry {
	return []entry{
		{name: "data", kind: tar.TypeDir, mode: 0o2750, uid: 1000, gid: 2000},
		{name: "data/file", mode: 0o640, uid: 1000, gid: 2000, text: "content\n"},
		{name: "data/sub", kind: tar.TypeDir, mode: 0o700, uid: 1001, gid: 1001},
		{name: "data/sub/set-user-id", mode: 0o4755, text: "x"},
		{name: "data/link", kind: tar.TypeSymlink, mode: 0o777, text: "sub/set-user-id"},
		{name: "data/hard", kind: tar.TypeLink, mode: 0o640, uid: 1000, gid: 2000, text: "data/file"},
		{name: "empty", kind: tar.TypeDir, mode: 0o711, uid: 7, gid: 8},
	}
}

func repeated() []entry {
	return []entry{
		{name: "x", kind: tar.TypeDir, mode: 0o755},
		{name: "x/kept", mode: 0o644, text: "kept\n"},
		{name: "x/file", mode: 0o644, text: "first\n"},
	}
}

func between() []entry {
	return []entry{
		{name: "x/.wh.kept", mode: 0o644},
		{name: "x/file", mode: 0o644, text: "second\n"},
		{name: "x/between", mode: 0o644, text: "second\n"},
	}
}

func below() []entry {
	return []entry{
		{name: "x", kind: tar.TypeDir, mode: 0o755},
		{name: "x/removed", mode: 0o644, text: "gone"},
		{name: "x/replaced", mode: 0o644, text: "old"},
		{name: "x/kept", mode: 0o604, uid: 12, gid: 34, text: "kept"},
		{name: "x/directory-removed", kind: tar.TypeDir, mode: 0o755},
		{name: "x/directory-removed/file", mode: 0o644, text: "gone"},
		{name: "x/opaque", kind: tar.TypeDir, mode: 0o755},
		{name: "x/opaque/hidden", mode: 0o644, text: "gone"},
		{name: "x/becomes-directory", mode: 0o644, text: "file"},
		{name: "x/becomes-file", kind: tar.TypeDir, mode: 0o755},
		{name: "x/becomes-file/inner", mode: 0o644, text: "gone"},
		{name: "x/one", mode: 0o644, text: "two names"},
		{name: "x/other", kind: tar.TypeLink, mode: 0o644, text: "x/one"},
		{name: "x/sticky", kind: tar.TypeDir, mode: 0o1777},
		{name: "x/fifo", kind: tar.TypeFifo, mode: 0o600},
		{name: "x/null", kind: tar.TypeChar, mode: 0o666, major: 1, minor: 3},
		{name: "x/zeros", mode: 0o600, size: 3 << 20},
		{name: "x/able", mode: 0o755, text: "x", xattrs: map[string]string{"security.capability": "\x01\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"}},
		{name: "x/dangling", kind: tar.TypeSymlink, mode: 0o777, text: "/nowhere/at/all"},
		{name: "x/ümläut €", mode: 0o644, text: "name"},
	}
}

func above() []entry {
	return []entry{
		{name: "x/.wh.removed", mode: 0o644},
		{name: "x/.wh.directory-removed", mode: 0o644},
		{name: "x/replaced", mode: 0o600, text: "new"},
		{name: "x/opaque", kind: tar.TypeDir, mode: 0o700},
		{name: "x/opaque/.wh..wh..opq", mode: 0o644},
		{name: "x/opaque/shown", mode: 0o644, text: "here"},
		{name: "x/becomes-directory", kind: tar.TypeDir, mode: 0o755},
		{name: "x/becomes-directory/inner", mode: 0o644, text: "here"},
		{name: "x/becomes-file", mode: 0o644, text: "file now"},
	}
}
