//go:build vm

package image

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"golang.org/x/sys/unix"

	"github.com/cradlestack/cradlestack/test/dockerd"
)

func requireRoot(t testing.TB) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Fatal("this test mounts file systems: run it as root")
	}
}

// convert makes the layer's ext4 file and has e2fsck look at it.
func convert(t *testing.T, data []byte) string {
	t.Helper()
	requireTool(t, "e2fsck", "e2fsprogs")
	tree, err := scanTar(bytes.NewReader(data), layerBounds(DefaultMaxLayerSize))
	if err != nil {
		t.Fatal(err)
	}
	out, err := createSparse(t.Context(), filepath.Join(t.TempDir(), "ext4"))
	if err != nil {
		t.Fatal(err)
	}
	defer out.file.Close()
	if err := writeExt4(tree, bytes.NewReader(data), out); err != nil {
		t.Fatal(err)
	}
	fsck(t, out.file.Name())
	return out.file.Name()
}

func fsck(t *testing.T, path string) {
	t.Helper()
	if report, err := exec.Command("e2fsck", "-fn", path).CombinedOutput(); err != nil {
		t.Errorf("e2fsck: %v\n%s", err, report)
	}
}

// mountLayer mounts an ext4 file read-only for as long as the test runs.
func mountLayer(t *testing.T, path string) string {
	t.Helper()
	dir := t.TempDir()
	mount(t, dir, "-o", "ro,loop", path)
	return dir
}

func mount(t *testing.T, dir string, args ...string) {
	t.Helper()
	if out, err := exec.Command("mount", append(args, dir)...).CombinedOutput(); err != nil {
		t.Fatalf("mount %q: %v\n%s", args, err, out)
	}
	t.Cleanup(func() {
		if out, err := exec.Command("umount", dir).CombinedOutput(); err != nil {
			t.Errorf("umount %s: %v\n%s", dir, err, out)
		}
	})
}

// untar unpacks with GNU tar, the independent opinion.
func untar(t *testing.T, data []byte) string {
	t.Helper()
	dir := t.TempDir()
	cmd := exec.Command("tar", "-xpf", "-", "-C", dir, "--numeric-owner", "--xattrs", "--xattrs-include=*", "--delay-directory-restore")
	cmd.Stdin = bytes.NewReader(data)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("tar: %v\n%s", err, out)
	}
	return dir
}

// describeDir returns a line for every file below dir: all that a container could see of it.
func describeDir(t *testing.T, dir string) []string {
	t.Helper()
	var lines []string
	inodes := make(map[uint64]string)
	err := filepath.WalkDir(dir, func(p string, _ fs.DirEntry, err error) error {
		if err != nil || p == dir {
			return err
		}
		name, _ := filepath.Rel(dir, p)
		var st unix.Stat_t
		if err := unix.Lstat(p, &st); err != nil {
			return err
		}
		line := fmt.Sprintf("%s mode=%o owner=%d:%d rdev=%d:%d mtime=%d.%09d", name, st.Mode, st.Uid, st.Gid,
			unix.Major(st.Rdev), unix.Minor(st.Rdev), st.Mtim.Sec, st.Mtim.Nsec)
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFDIR:
			line += fmt.Sprint(" links=", st.Nlink)
		case unix.S_IFLNK:
			target, err := os.Readlink(p)
			if err != nil {
				return err
			}
			line += " -> " + target
		case unix.S_IFREG:
			f, err := os.Open(p)
			if err != nil {
				return err
			}
			sum, err := digestReader(f)
			f.Close()
			if err != nil {
				return err
			}
			line += fmt.Sprint(" size=", st.Size, " ", sum)
		}
		if st.Mode&unix.S_IFMT != unix.S_IFDIR {
			first, ok := inodes[st.Ino]
			if !ok {
				inodes[st.Ino], first = name, name
			}
			line += fmt.Sprint(" links=", st.Nlink, " inode of ", first)
		}
		line += xattrsOf(t, p)
		lines = append(lines, line)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	slices.Sort(lines)
	return lines
}

func xattrsOf(t *testing.T, p string) string {
	t.Helper()
	list := make([]byte, 1<<16)
	n, err := unix.Llistxattr(p, list)
	if err != nil {
		t.Fatalf("listxattr %s: %v", p, err)
	}
	var out []string
	for _, name := range strings.Split(strings.TrimSuffix(string(list[:n]), "\x00"), "\x00") {
		if name == "" {
			continue
		}
		value := make([]byte, 1<<16)
		n, err := unix.Lgetxattr(p, name, value)
		if err != nil {
			t.Fatalf("getxattr %s %s: %v", p, name, err)
		}
		out = append(out, fmt.Sprintf(" %s=%x", name, value[:n]))
	}
	slices.Sort(out)
	return strings.Join(out, "")
}

func compareDirs(t *testing.T, got, want []string) {
	t.Helper()
	for _, l := range got {
		if !slices.Contains(want, l) {
			t.Errorf("not so by tar: %s", l)
		}
	}
	for _, l := range want {
		if !slices.Contains(got, l) {
			t.Errorf("not in ext4:   %s", l)
		}
	}
}

// everything is a layer with all that tar can say and ext4 can hold.
func everything(t *testing.T) []byte {
	h := func(typ byte, name string, change func(*tar.Header)) entry {
		e := entry{Header: tar.Header{Typeflag: typ, Name: name, Mode: 0o644, ModTime: time.Unix(1700000000, 123456789)}}
		if change != nil {
			change(&e.Header)
		}
		return e
	}
	when := func(s int64) func(*tar.Header) {
		return func(h *tar.Header) { h.ModTime = time.Unix(s, 5) }
	}
	attrs := func(kv ...string) func(*tar.Header) {
		return func(h *tar.Header) {
			h.PAXRecords = make(map[string]string)
			for i := 0; i < len(kv); i += 2 {
				h.PAXRecords[xattrRecord+kv[i]] = kv[i+1]
			}
		}
	}
	long := strings.Repeat("long/", 60) + strings.Repeat("n", 255)
	capability := "\x01\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00" // cap_net_bind_service+ep
	entries := []entry{
		h(tar.TypeDir, "./", func(h *tar.Header) { h.Mode = 0o711 }),
		h(tar.TypeDir, "tmp/", func(h *tar.Header) { h.Mode = 0o1777 }),
		h(tar.TypeDir, "sgid/", func(h *tar.Header) { h.Mode, h.Gid = 0o2775, 50 }),
		h(tar.TypeReg, "suid", func(h *tar.Header) { h.Mode = 0o4755 }),
		h(tar.TypeReg, "owner", func(h *tar.Header) { h.Uid, h.Gid = 123456789, 4000000000 }),
		h(tar.TypeReg, "old", when(-1000000)), h(tar.TypeReg, "epoch", when(1)), h(tar.TypeReg, "y2038", when(1<<31)),
		h(tar.TypeReg, "y2106", when(1<<32+77)), h(tar.TypeReg, "y2200", when(7258118400)),
		h(tar.TypeChar, "null", func(h *tar.Header) { h.Devmajor, h.Devminor = 1, 3 }),
		h(tar.TypeBlock, "disk", func(h *tar.Header) { h.Devmajor, h.Devminor = 259, 70000 }),
		h(tar.TypeFifo, "fifo", nil),
		h(tar.TypeSymlink, "short", func(h *tar.Header) { h.Linkname, h.Mode = "../../x", 0o777 }),
		h(tar.TypeSymlink, "just59", func(h *tar.Header) { h.Linkname, h.Mode = strings.Repeat("5", 59), 0o777 }),
		h(tar.TypeSymlink, "just60", func(h *tar.Header) { h.Linkname, h.Mode = strings.Repeat("6", 60), 0o777 }),
		h(tar.TypeSymlink, "longest", func(h *tar.Header) { h.Linkname, h.Mode = strings.Repeat("s", 4095), 0o777 }),
		{Header: tar.Header{Typeflag: tar.TypeLink, Name: "link-to-symlink", Linkname: "short"}},
		{Header: tar.Header{Typeflag: tar.TypeLink, Name: "link-to-long-symlink", Linkname: "longest"}},
		{Header: tar.Header{Typeflag: tar.TypeLink, Name: "tmp/link-to-suid", Linkname: "suid"}},
		{Header: tar.Header{Typeflag: tar.TypeLink, Name: "link-to-fifo", Linkname: "./fifo"}},
		h(tar.TypeReg, "Grüße", nil), h(tar.TypeReg, "not\xffutf8", nil), h(tar.TypeReg, "back\\slash", nil), h(tar.TypeReg, "new\nline", nil),
		h(tar.TypeReg, long, nil),
		h(tar.TypeReg, "cap", attrs("security.capability", capability)),
		h(tar.TypeReg, "acl", attrs("system.posix_acl_access", acl)),
		h(tar.TypeDir, "acl-default/", attrs("system.posix_acl_default", acl)),
		h(tar.TypeReg, "xattrs", attrs("user.a", "1", "user.bb", strings.Repeat("v", 1000), "user.c", "", "trusted.x", "\x00\xff", "security.z", strings.Repeat("z", 500))),
		h(tar.TypeDir, "xattr-dir/", attrs("user.large", strings.Repeat("d", 3000))),
		h(tar.TypeSymlink, "xattr-link", func(h *tar.Header) { attrs("trusted.l", "1")(h); h.Linkname, h.Mode = strings.Repeat("y", 100), 0o777 }),
		h(tar.TypeReg, "replaced", nil), h(tar.TypeReg, "replaced-by-dir", nil), h(tar.TypeDir, "replaced-by-dir/", nil),
	}
	var names []string
	for i := range 12 {
		names = append(names, fmt.Sprintf("user.%s", strings.Repeat(string(rune('a'+i)), 12-i)), strings.Repeat("v", 100))
	}
	entries = append(entries, h(tar.TypeReg, "many-xattrs", attrs(names[:2*8]...)))
	replacement := reg("replaced", strings.Repeat("x", 10000))
	replacement.ModTime = time.Unix(1600000000, 0)
	entries = append(entries, replacement)
	for i := range 3000 {
		e := reg(fmt.Sprintf("many/file-%04d", i), strings.Repeat("m", i%300))
		e.ModTime = time.Unix(1700000000, 0)
		entries = append(entries, e)
	}
	entries = append(entries, h(tar.TypeDir, "many/", nil), h(tar.TypeDir, filepath.Dir(long)+"/", nil))
	for d := filepath.Dir(filepath.Dir(long)); d != "."; d = filepath.Dir(d) {
		entries = append(entries, h(tar.TypeDir, d+"/", nil))
	}
	large := reg("large", "")
	large.body = randomText(3 << 20)
	large.ModTime = time.Unix(1700000000, 0)
	return makeTar(t, append(entries, large)...)
}

func TestRootKernelReadsWhatTarWrites(t *testing.T) {
	requireRoot(t)
	data := everything(t)
	compareDirs(t, describeDir(t, mountLayer(t, convert(t, data))), describeDir(t, untar(t, data)))
}

// Sparse files in all of GNU tar's formats.
func TestRootSparse(t *testing.T) {
	requireRoot(t)
	src := t.TempDir()
	f, err := os.Create(filepath.Join(src, "sparse"))
	if err != nil {
		t.Fatal(err)
	}
	for _, at := range []int64{0, 70 << 10, 5 << 20, 30 << 20} {
		if _, err := f.WriteAt([]byte("here"), at); err != nil {
			t.Fatal(err)
		}
	}
	if err := f.Truncate(40 << 20); err != nil {
		t.Fatal(err)
	}
	f.Close()
	if err := os.WriteFile(filepath.Join(src, "zz"), []byte("after"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, format := range [][]string{{"--format=gnu"}, {"--format=pax", "--sparse-version=0.0"}, {"--format=pax", "--sparse-version=0.1"}, {"--format=pax", "--sparse-version=1.0"}} {
		data, err := exec.Command("tar", append(format, "-C", src, "--sparse", "--numeric-owner", "-cf", "-", "sparse", "zz")...).Output()
		if err != nil {
			t.Fatal(err)
		}
		path := convert(t, data)
		fi, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		if used := diskUsage(fi); used > 1<<20 {
			t.Errorf("%s: takes %d bytes", format, used)
		}
		compareDirs(t, describeDir(t, mountLayer(t, path)), describeDir(t, untar(t, data)))
	}
}

// TestRootLostAndFound: a layer has no lost+found but its own, whatever that is.
func TestRootLostAndFound(t *testing.T) {
	requireRoot(t)
	for name, entries := range map[string][]entry{
		"none":      {reg("a", "x")},
		"empty":     {},
		"directory": {dir("lost+found"), reg("lost+found/x", "x")},
		"file":      {reg("lost+found", "x"), reg("lost000000", "y")},
		"link":      {reg("b", "x"), hardlink("lost+found", "b")},
	} {
		t.Run(name, func(t *testing.T) {
			data := makeTar(t, entries...)
			var got, want []string
			for _, l := range describeDir(t, mountLayer(t, convert(t, data))) {
				got = append(got, strings.Split(l, " mtime=")[0])
			}
			for _, l := range describeDir(t, untar(t, data)) {
				want = append(want, strings.Split(l, " mtime=")[0])
			}
			compareDirs(t, got, want)
		})
	}
	t.Run("whiteout", func(t *testing.T) {
		dir := mountLayer(t, convert(t, makeTar(t, reg(".wh.lost+found", ""))))
		if fi, err := os.Lstat(filepath.Join(dir, lostFound)); err != nil || fi.Mode()&fs.ModeCharDevice == 0 {
			t.Errorf("%v, %v", fi, err)
		}
	})
}

// TestRootWhiteouts stacks layers as a pod does.
func TestRootWhiteouts(t *testing.T) {
	requireRoot(t)
	layers := [][]byte{
		makeTar(t, dir("d"), reg("d/one", "1"), reg("d/two", "2"), dir("opaque"), reg("opaque/lower", "x"), dir("gone"), reg("gone/x", "x"),
			reg("file", "old"), dir("was-dir"), reg("was-dir/x", "x"), reg("was-file", "x"), dir("renewed"), reg("renewed/old", "x")),
		makeTar(t, reg("d/.wh.one", ""), reg("opaque/.wh..wh..opq", ""), reg("opaque/upper", "y"), reg(".wh.gone", ""), reg("file", "new"),
			reg("was-dir", "now a file"), dir("was-file"), reg(".wh.renewed", ""), reg("renewed/new", "x")),
	}
	var lower []string
	for _, l := range layers {
		lower = append([]string{mountLayer(t, convert(t, l))}, lower...)
	}
	scratch := t.TempDir()
	mount(t, scratch, "-t", "tmpfs", "tmpfs")
	for _, d := range []string{"upper", "work", "merged"} {
		if err := os.Mkdir(filepath.Join(scratch, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	merged := filepath.Join(scratch, "merged")
	mount(t, merged, "-t", "overlay", "overlay", "-o",
		fmt.Sprintf("lowerdir=%s,upperdir=%s/upper,workdir=%s/work", strings.Join(lower, ":"), scratch, scratch))
	var got []string
	err := filepath.WalkDir(merged, func(p string, d fs.DirEntry, err error) error {
		if err != nil || p == merged {
			return err
		}
		name, _ := filepath.Rel(merged, p)
		if d.Type().IsRegular() {
			name += "=" + string(readFile(t, p))
		}
		got = append(got, name)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	want := []string{"d", "d/two=2", "file=new", "opaque", "opaque/upper=y", "renewed", "renewed/new=x", "was-dir=now a file", "was-file"}
	if !slices.Equal(got, want) {
		t.Errorf("got  %q\nwant %q", got, want)
	}
}

// imagesDir holds what examples/images/build.sh makes.
func imagesDir(t testing.TB) string {
	t.Helper()
	cache, err := os.UserCacheDir()
	if err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(cache, "cradlestack", "images")
	if _, err := os.Stat(filepath.Join(dir, "busybox-docker.tar")); err != nil {
		t.Fatalf("%s is not complete: run examples/images/build.sh all", dir)
	}
	return dir
}

// TestRootRealImages converts every layer of the example images and compares with tar.
func TestRootRealImages(t *testing.T) {
	requireRoot(t)
	dir := imagesDir(t)
	s := openStore(t)
	shared := make(map[string]int)
	for _, ref := range []string{"oci:busybox", "oci:debian", "oci:nginx", "oci:redis", "oci:postgres", "oci:mariadb", "docker-archive:busybox-docker.tar"} {
		kind, name, _ := strings.Cut(ref, ":")
		img := pull(t, s, kind+":"+filepath.Join(dir, name), PullOptions{})
		for _, l := range img.Layers {
			if shared[l.DiffID]++; shared[l.DiffID] > 1 {
				continue
			}
			fsck(t, l.Path)
			if kind != "oci" || name == "nginx" || name == "postgres" {
				continue // as the others, and large
			}
			blob := blobOf(t, filepath.Join(dir, name), l.DiffID)
			unpacked := untar(t, blob)
			overlayWhiteouts(t, unpacked)
			compareDirs(t, describeDir(t, mountLayer(t, l.Path)), describeDir(t, unpacked))
		}
	}
	assertClean(t, s)
	if shared[firstLayer(t, s, "oci:"+filepath.Join(dir, "debian"))] != 5 {
		t.Error("the images on top of debian do not share its layer")
	}
}

// overlayWhiteouts does for an unpacked layer what a container engine does.
func overlayWhiteouts(t *testing.T, root string) {
	t.Helper()
	err := filepath.WalkDir(root, func(p string, _ fs.DirEntry, err error) error {
		dir, base := filepath.Split(p)
		if err != nil || !strings.HasPrefix(base, whiteoutPrefix) {
			return err
		}
		fi, err := os.Stat(dir)
		if err != nil {
			return err
		}
		if err := os.Remove(p); err != nil {
			return err
		}
		if base == whiteoutOpaque {
			err = unix.Setxattr(dir, "trusted.overlay.opaque", []byte("y"), 0)
		} else {
			p = filepath.Join(dir, strings.TrimPrefix(base, whiteoutPrefix))
			if err = unix.Mknod(p, unix.S_IFCHR, 0); err == nil {
				err = os.Chtimes(p, time.Unix(0, 0), time.Unix(0, 0))
			}
		}
		if err != nil {
			return err
		}
		return os.Chtimes(dir, fi.ModTime(), fi.ModTime())
	})
	if err != nil {
		t.Fatal(err)
	}
}

func firstLayer(t *testing.T, s *Store, ref string) string {
	t.Helper()
	img, err := s.Get(ref)
	if err != nil {
		t.Fatal(err)
	}
	return img.Layers[0].DiffID
}

// blobOf returns a layer's tar out of a layout.
func blobOf(t *testing.T, layout, diffID string) []byte {
	t.Helper()
	var index v1.IndexManifest
	if err := json.Unmarshal(readFile(t, filepath.Join(layout, "index.json")), &index); err != nil {
		t.Fatal(err)
	}
	var m v1.Manifest
	blob := func(h v1.Hash) string { return filepath.Join(layout, "blobs", h.Algorithm, h.Hex) }
	if err := json.Unmarshal(readFile(t, blob(index.Manifests[0].Digest)), &m); err != nil {
		t.Fatal(err)
	}
	for _, l := range m.Layers {
		r, done, err := decompress(bytes.NewReader(readFile(t, blob(l.Digest))))
		if err != nil {
			t.Fatal(err)
		}
		data, err := io.ReadAll(r)
		done()
		if err != nil {
			t.Fatal(err)
		}
		if digestOf(data) == diffID {
			return data
		}
	}
	t.Fatalf("%s has no layer %s", layout, diffID)
	return nil
}

// TestRootDiskFull pulls into file systems that have too little room.
func TestRootDiskFull(t *testing.T) {
	requireRoot(t)
	r := startRegistry(t, nil)
	data := makeTar(t, reg("large", randomText(48<<20)))
	ref := r.push(t, "large:1", makeImage(t, v1.Config{}, blobLayer(data, types.OCIUncompressedLayer, digestOf(data))))
	for _, size := range []string{"24m", "72m", "97m"} { // within the first file, within the second, at the reserve
		root := t.TempDir()
		mount(t, root, "-t", "tmpfs", "-o", "size="+size, "tmpfs")
		s, err := Open(root)
		if err != nil {
			t.Fatal(err)
		}
		_, err = s.Pull(context.Background(), ref, PullOptions{})
		assertError(t, err, ErrNoSpace, "pull "+ref+": layer 1 of 1", "kcradle images gc")
		assertEmpty(t, s)
	}
}

// TestRootDockerDaemon pulls out of a real daemon.
func TestRootDockerDaemon(t *testing.T) {
	requireRoot(t)
	daemon := dockerd.ForTest(t, t.TempDir())
	t.Setenv("DOCKER_HOST", daemon.Host)
	archive := filepath.Join(imagesDir(t), "busybox-docker.tar")
	if out, err := exec.Command("docker", "load", "-i", archive).CombinedOutput(); err != nil {
		t.Fatalf("docker load: %v\n%s", err, out)
	}
	id, err := exec.Command("docker", "image", "inspect", "--format", "{{.Id}}", "busybox:docker").Output()
	if err != nil {
		t.Fatal(err)
	}

	s := openStore(t)
	img := pull(t, s, "docker-daemon:busybox:docker", PullOptions{})
	if img.ID != strings.TrimSpace(string(id)) || img.Config.Config.Healthcheck == nil || img.Config.Config.StopSignal != "SIGTERM" {
		t.Errorf("docker says %s, got %+v", id, img)
	}
	again := pull(t, s, "docker-daemon:busybox:docker", PullOptions{Progress: func(p Progress) { t.Errorf("unchanged, but %+v", p) }})
	if again.ID != img.ID {
		t.Errorf("got %s, then %s", img.ID, again.ID)
	}
	_, err = s.Pull(t.Context(), "docker-daemon:none", PullOptions{})
	assertError(t, err, ErrNotFound, "pull docker-daemon:none", "run docker pull none")
	assertClean(t, s)
}
