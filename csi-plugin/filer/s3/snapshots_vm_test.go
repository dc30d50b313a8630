//go:build vm

package s3

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/minio/minio-go/v7"
	"github.com/minio/minio-go/v7/pkg/tags"
	"golang.org/x/sys/unix"

	"github.com/cradlestack/cradlestack/csi-plugin/filer/snapshots"
)

// past has the world's bucket keep snapshots: copies beside it, each seen through a mount of its own as a backend's are.
type past struct {
	*world
	grant Grant

	mu     sync.Mutex
	all    []snapshots.Snapshot
	opened []string
	roots  []*os.Root
}

func servePast(t *testing.T) *past {
	p := &past{world: serve(t)}
	p.grant = Grant{Key: "key", Secret: "secret", Snapshots: &snapshots.Source{
		List: func() ([]snapshots.Snapshot, error) {
			p.mu.Lock()
			defer p.mu.Unlock()
			return slices.Clone(p.all), nil
		},
		Open: func(name string) (*os.Root, error) {
			fd, err := unix.OpenTree(unix.AT_FDCWD, p.at(name), unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
			if err != nil {
				return nil, err
			}
			defer unix.Close(fd)
			if err := unix.MountSetattr(fd, "", unix.AT_EMPTY_PATH, &unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY}); err != nil {
				return nil, err
			}
			r, err := os.OpenRoot(fmt.Sprintf("/proc/self/fd/%d", fd))
			p.mu.Lock()
			defer p.mu.Unlock()
			p.opened, p.roots = append(p.opened, name), append(p.roots, r)
			return r, err
		},
	}}
	p.allow(p.grant)
	return p
}

func (p *past) at(name string) string { return filepath.Join(filepath.Dir(p.root), "taken", name) }

func (p *past) take(name string) {
	p.t.Helper()
	if err := errors.Join(os.MkdirAll(p.at(name), 0o755), os.CopyFS(p.at(name), os.DirFS(p.root))); err != nil {
		p.t.Fatal(err)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.all = append(p.all, snapshots.Snapshot{Name: name, Taken: time.Unix(int64(len(p.all)+1), 0)})
}

func (p *past) list(c *minio.Client, o minio.ListObjectsOptions) (keys []string) {
	p.t.Helper()
	for o := range c.ListObjects(p.t.Context(), "bucket", o) {
		if o.Err != nil {
			p.t.Error(o.Err)
		}
		keys = append(keys, o.Key)
	}
	return keys
}

const odd = "b&<ü> %2e+ä"

func TestRootSnapshots(t *testing.T) {
	w := servePast(t)
	ctx := t.Context()
	c := w.client("key", "secret")
	w.put(c, "dir/ü &%", "then")
	w.put(c, "file", "0123456789")
	w.take("first")
	w.take(odd)
	w.write("file", "now")
	if err := os.RemoveAll(filepath.Join(w.root, "dir")); err != nil {
		t.Fatal(err)
	}
	w.put(c, ".snapshotsfile", "is none")
	// What helps to serve the volume otherwise is no object.
	helps := []string{".cradle-webdav/part", ".zfs/file"}
	for _, name := range helps {
		if err := os.Mkdir(filepath.Join(w.root, filepath.Dir(name)), 0o755); err != nil {
			t.Fatal(err)
		}
		w.write(name, "not whole yet")
	}
	same := func(what string, got []string, want ...string) {
		t.Helper()
		slices.Sort(got)
		if !slices.Equal(got, want) {
			t.Errorf("%s: %q, not %q", what, got, want)
		}
	}
	for _, v1 := range []bool{false, true} {
		list := func(prefix string, deep bool, more ...string) []string {
			o := minio.ListObjectsOptions{Prefix: prefix, Recursive: deep, UseV1: v1}
			if len(more) > 0 {
				o.StartAfter, o.MaxKeys = more[0], 1
			}
			return w.list(c, o)
		}
		same("the bucket", list("", true), ".snapshotsfile", "file")
		same("the bucket's root", list("", false), ".snapshotsfile", "file")
		same("names that begin so", list(".snap", true), ".snapshotsfile")
		same("what is no object", list(".cradle-webdav/", true))
		w.mu.Lock()
		w.opened = nil
		w.mu.Unlock()
		same("the snapshots", list(".snapshots/", false), ".snapshots/"+odd+"/", ".snapshots/first/")
		same("those that begin so", list(".snapshots/fi", false), ".snapshots/first/")
		same("no snapshot", list(".snapshots/none/", true))
		same("above all", list(".snapshots/../", true))
		if len(w.opened) != 0 {
			t.Errorf("for their names these were opened: %v", w.opened)
		}
		same("above one", list(".snapshots/first/../", true))
		same("above all", list(".snapshots/first/../../", false))
		all := []string{".snapshots/" + odd + "/dir/ü &%", ".snapshots/" + odd + "/file", ".snapshots/first/dir/ü &%", ".snapshots/first/file"}
		same("all in all", list(".snapshots/", true), all...)
		same("all, one after another", list(".snapshots/", true, ""), all...)
		if !v1 {
			same("all after one", list(".snapshots/", true, all[1]), all[2:]...)
		}
		same("in one", list(".snapshots/first/", false), ".snapshots/first/dir/", ".snapshots/first/file")
		same("in its directory", list(".snapshots/first/dir/", false), ".snapshots/first/dir/ü &%")
		same("in it, which begin so", list(".snapshots/first/f", true), ".snapshots/first/file")
	}

	for key, want := range map[string]string{".snapshots/first/file": "0123456789", ".snapshots/" + odd + "/dir/ü &%": "then", "file": "now"} {
		w.want(c, key, want)
	}
	o, err := c.StatObject(ctx, "bucket", ".snapshots/first/file", minio.StatObjectOptions{})
	if err != nil || o.Size != 10 || o.ETag == "" {
		t.Errorf("it is %+v, %v", o, err)
	}
	part := minio.GetObjectOptions{}
	if err := part.SetRange(4, 6); err != nil {
		t.Fatal(err)
	}
	r, err := c.GetObject(ctx, "bucket", ".snapshots/first/file", part)
	if err != nil {
		t.Fatal(err)
	}
	if data, err := io.ReadAll(r); err != nil || string(data) != "456" {
		t.Errorf("from its middle %q, %v", data, err)
	}
	r.Close()
	for _, key := range append(helps, ".cradle-webdav/", ".snapshots", ".snapshots/", ".snapshots/first", ".snapshots/first/", ".snapshots/none/file", ".snapshots/FIRST/file", ".SNAPSHOTS/first/file", ".snapshots/first/none", ".snapshots/first/.snapshots/first/file", "dir/.snapshots/first/file") {
		if got, err := get(ctx, c, key); err == nil || minio.ToErrorResponse(err).StatusCode/100 != 4 {
			t.Errorf("%s is %q, %v", key, got, err)
		}
	}

	// Nothing is changed in them.
	core := minio.Core{Client: c}
	label, err := tags.NewTags(map[string]string{"size": "small"}, true)
	if err != nil {
		t.Fatal(err)
	}
	for _, key := range append(helps, ".snapshots/first/file", ".snapshots/first/new", ".snapshots/new/new", ".snapshots", ".snapshots/", ".snapshots/first/", "./.snapshots/first/file", ".snapshots//first/file", "/.snapshots/first/file") {
		_, put := c.PutObject(ctx, "bucket", key, strings.NewReader("x"), 1, minio.PutObjectOptions{})
		_, copied := c.CopyObject(ctx, minio.CopyDestOptions{Bucket: "bucket", Object: key}, minio.CopySrcOptions{Bucket: "bucket", Object: "file"})
		_, begun := core.NewMultipartUpload(ctx, "bucket", key, minio.PutObjectOptions{})
		_, uploaded := core.PutObjectPart(ctx, "bucket", key, "id", 1, strings.NewReader("x"), 1, minio.PutObjectPartOptions{})
		_, completed := core.CompleteMultipartUpload(ctx, "bucket", key, "id", []minio.CompletePart{{PartNumber: 1, ETag: "x"}}, minio.PutObjectOptions{})
		for what, err := range map[string]error{
			"put": put, "copied": copied, "begun": begun, "uploaded": uploaded, "completed": completed, "aborted": core.AbortMultipartUpload(ctx, "bucket", key, "id"),
			"removed": c.RemoveObject(ctx, "bucket", key, minio.RemoveObjectOptions{}), "tagged": c.PutObjectTagging(ctx, "bucket", key, label, minio.PutObjectTaggingOptions{}),
			"untagged": c.RemoveObjectTagging(ctx, "bucket", key, minio.RemoveObjectTaggingOptions{}),
		} {
			if code := minio.ToErrorResponse(err).Code; code != minio.AccessDenied {
				t.Errorf("%s is %s: %v", key, what, err)
			}
		}
	}
	w.write("gone", "is removed")
	objects := make(chan minio.ObjectInfo, 2)
	objects <- minio.ObjectInfo{Key: ".snapshots/first/file"}
	objects <- minio.ObjectInfo{Key: "gone"}
	close(objects)
	var refused []string
	for e := range c.RemoveObjects(ctx, "bucket", objects, minio.RemoveObjectsOptions{}) {
		if minio.ToErrorResponse(e.Err).Code != minio.AccessDenied {
			t.Error(e.Err)
		}
		refused = append(refused, e.ObjectName)
	}
	same("of many are not removed", refused, ".snapshots/first/file")
	if _, err := os.Stat(filepath.Join(w.root, "gone")); err == nil {
		t.Error("beside a former one nothing is removed")
	}
	for _, name := range []string{"first", odd} {
		if data, err := os.ReadFile(filepath.Join(w.at(name), "file")); err != nil || string(data) != "0123456789" {
			t.Errorf("%s has become %q, %v", name, data, err)
		}
	}
	if _, err := os.Stat(filepath.Join(w.root, ".snapshots")); err == nil {
		t.Error("the volume has got a directory of the snapshots' name")
	}

	// What is in them is brought back, also in parts.
	for to, from := range map[string]string{"file": ".snapshots/first/file", "back": ".snapshots/" + odd + "/dir/ü &%"} {
		if _, err := c.CopyObject(ctx, minio.CopyDestOptions{Bucket: "bucket", Object: to}, minio.CopySrcOptions{Bucket: "bucket", Object: from}); err != nil {
			t.Error(err)
		}
	}
	id, err := core.NewMultipartUpload(ctx, "bucket", "parts", minio.PutObjectOptions{})
	if err != nil {
		t.Fatal(err)
	}
	copied, err := core.CopyObjectPart(ctx, "bucket", ".snapshots/first/file", "bucket", "parts", id, 1, 2, 5, nil)
	if err == nil {
		_, err = core.CompleteMultipartUpload(ctx, "bucket", "parts", id, []minio.CompletePart{copied}, minio.PutObjectOptions{})
	}
	if err != nil {
		t.Error(err)
	}
	for name, want := range map[string]string{"file": "0123456789", "back": "then", "parts": "23456"} {
		if w.read(name) != want {
			t.Errorf("%s has become %q", name, w.read(name))
		}
	}
	if _, err := c.CopyObject(ctx, minio.CopyDestOptions{Bucket: "bucket", Object: "none"}, minio.CopySrcOptions{Bucket: "bucket", Object: ".snapshots/none/file"}); minio.ToErrorResponse(err).Code != minio.NoSuchKey {
		t.Errorf("of a snapshot that is not there was copied: %v", err)
	}
	reader := w.grant
	reader.Key, reader.ReadOnly = "reader", true
	w.allow(reader)
	rc := w.client("reader", "secret")
	w.want(rc, ".snapshots/first/file", "0123456789")
	if _, err := rc.CopyObject(ctx, minio.CopyDestOptions{Bucket: "bucket", Object: "mine"}, minio.CopySrcOptions{Bucket: "bucket", Object: ".snapshots/first/file"}); err == nil {
		t.Error("who may only read has copied")
	}

	// A process that was killed is another one; what is deleted is gone; nothing is open at the end.
	w.kill("key")
	w.want(c, ".snapshots/first/file", "0123456789")
	w.mu.Lock()
	w.all = w.all[1:]
	w.mu.Unlock()
	if _, err := get(ctx, c, ".snapshots/first/file"); minio.ToErrorResponse(err).Code != minio.NoSuchKey {
		t.Errorf("what was deleted: %v", err)
	}
	open, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", w.process("key")))
	for _, fd := range open {
		var st unix.Stat_t
		if unix.Stat(fd, &st) == nil && st.Mode&unix.S_IFMT == unix.S_IFDIR && st.Dev == device(t, w.root) {
			t.Errorf("the process has a directory open: %s", fd)
		}
	}
	if len(open) == 0 || err != nil {
		t.Errorf("the process has %v open, %v", open, err)
	}
	w.server.Forbid("key")
	w.server.Forbid("reader")
	for _, r := range w.roots {
		if _, err := r.Stat("."); err == nil {
			t.Errorf("%s is open", r.Name())
		}
	}
}

func device(t *testing.T, path string) uint64 {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		t.Fatal(err)
	}
	return st.Dev
}

// TestRootSnapshotsConfined: nothing leads out of a snapshot but into the same bucket, a directory of their name is not seen, and nobody has another's.
func TestRootSnapshotsConfined(t *testing.T) {
	w := servePast(t)
	ctx := t.Context()
	c := w.client("key", "secret")
	for name, target := range map[string]string{"up": "../../secret", "over": "../other/file", "far": "../../../../../../../../etc/passwd", "absolute": "/etc/passwd", "config": "/proc/self/fd/3", "one": "/proc/1/environ", "inside": "file"} {
		if err := os.Symlink(target, filepath.Join(w.root, name)); err != nil {
			t.Fatal(err)
		}
	}
	w.write("file", "then")
	w.take("first")
	w.take("other")
	w.want(c, ".snapshots/first/inside", "then")
	for _, key := range []string{"up", "over", "far", "absolute", "config"} {
		if got, err := get(ctx, c, ".snapshots/first/"+key); err == nil {
			t.Errorf("%s is %.40q", key, got)
		}
		if _, err := c.CopyObject(ctx, minio.CopyDestOptions{Bucket: "bucket", Object: "mine"}, minio.CopySrcOptions{Bucket: "bucket", Object: ".snapshots/first/" + key}); err == nil {
			t.Errorf("%s was copied", key)
		}
	}
	for _, key := range []string{".snapshots/../../secret", ".snapshots/..", ".snapshots/../../proc/self/environ", ".snapshots/first/../../../../secret", "../.snapshots/first/file", "x/../../../secret", ".snapshots/first/%2e%2e/%2e%2e/file"} {
		if got, err := get(ctx, c, key); err == nil {
			t.Errorf("%s is %.40q", key, got)
		}
		if _, err := c.CopyObject(ctx, minio.CopyDestOptions{Bucket: "bucket", Object: "mine"}, minio.CopySrcOptions{Bucket: "bucket", Object: key}); err == nil {
			t.Errorf("%s was copied", key)
		}
	}
	// A directory of this name that the volume has.
	for _, name := range []string{"up", "over", "far", "absolute", "config"} { // a listing of versions does not take links that lead nowhere
		if err := os.Remove(filepath.Join(w.root, name)); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Mkdir(filepath.Join(w.root, ".snapshots"), 0o755); err != nil {
		t.Fatal(err)
	}
	w.write(".snapshots/file", "hidden")
	if got, err := get(ctx, c, ".snapshots/file"); err == nil {
		t.Errorf("what is hidden is %q", got)
	}
	for _, o := range []minio.ListObjectsOptions{{}, {Recursive: true}, {UseV1: true}, {Recursive: true, UseV1: true}, {WithVersions: true}, {Recursive: true, WithVersions: true}} {
		if keys := w.list(c, o); slices.ContainsFunc(keys, func(key string) bool { return strings.HasPrefix(key, ".snap") }) || !slices.Contains(keys, "file") {
			t.Errorf("%+v lists %q", o, keys)
		}
	}
	if err := c.RemoveObject(ctx, "bucket", ".snapshots/file", minio.RemoveObjectOptions{}); minio.ToErrorResponse(err).Code != minio.AccessDenied {
		t.Errorf("what is hidden was removed: %v", err)
	}
	// Somebody else.
	root := w.root + "-other"
	if err := errors.Join(os.Mkdir(root, 0o755), w.server.Allow(Grant{Key: "other", Secret: "other", Volume: "other", Root: root, Snapshots: &snapshots.Source{List: func() ([]snapshots.Snapshot, error) { return nil, nil }}})); err != nil {
		t.Fatal(err)
	}
	for _, who := range []*minio.Client{w.client("other", "other"), w.client("key", "wrong"), w.client("nobody", "secret"), w.client("", "")} {
		if got, err := get(ctx, who, ".snapshots/first/file"); err == nil {
			t.Errorf("somebody else reads %q", got)
		}
	}
	theirs := w.client("other", "other")
	for _, key := range []string{".snapshots/first/file", "../bucket/.snapshots/first/file"} {
		if o, err := theirs.StatObject(ctx, "other", key, minio.StatObjectOptions{}); err == nil {
			t.Errorf("somebody else's own is %+v", o)
		}
	}
	if _, err := theirs.CopyObject(ctx, minio.CopyDestOptions{Bucket: "other", Object: "mine"}, minio.CopySrcOptions{Bucket: "bucket", Object: ".snapshots/first/file"}); err == nil {
		t.Error("somebody else copies")
	}
}
