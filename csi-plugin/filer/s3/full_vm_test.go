//go:build vm

package s3

import (
	"bytes"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/minio/minio-go/v7"
	"golang.org/x/sys/unix"
)

// TestRootFull: a volume that is full says so, keeps what it has, and what did not fit takes no room: of an object, of one that comes in parts, of a copy. What is
// sent compressed is kept as it came.
func TestRootFull(t *testing.T) {
	w := serve(t)
	w.server.Forbid("key")
	image := filepath.Join(t.TempDir(), "image")
	if err := os.WriteFile(image, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(image, 48<<20); err != nil {
		t.Fatal(err)
	}
	command := func(name string, args ...string) {
		t.Helper()
		if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
			t.Fatalf("%s %q: %v: %s", name, args, err, out)
		}
	}
	command("mkfs.ext4", "-q", "-m", "0", image)
	command("mount", "-o", "loop", image, w.root)
	t.Cleanup(func() {
		w.server.Close()
		command("umount", w.root)
	})
	w.allow(Grant{Key: "key", Secret: "secret"})
	c := w.client("key", "secret")
	core := minio.Core{Client: c}
	ctx := t.Context()
	free := func() int64 {
		var st unix.Statfs_t
		if err := unix.Statfs(w.root, &st); err != nil {
			t.Fatal(err)
		}
		return int64(st.Bfree) * st.Bsize
	}
	full := func(what string, err error) {
		t.Helper()
		if code := minio.ToErrorResponse(err).StatusCode; code != http.StatusInsufficientStorage {
			t.Errorf("%s that does not fit is answered by %d, %v", what, code, err)
		}
	}
	w.put(c, "object", "old")
	before := free()
	large := make([]byte, 64<<20)
	_, err := c.PutObject(ctx, "bucket", "object", bytes.NewReader(large), int64(len(large)), minio.PutObjectOptions{DisableMultipart: true})
	full("an object", err)
	w.want(c, "object", "old")
	if now := free(); now < before-1<<20 {
		t.Errorf("what did not fit takes %d bytes", before-now)
	}
	id, err := core.NewMultipartUpload(ctx, "bucket", "parts", minio.PutObjectOptions{})
	if err != nil {
		t.Fatal(err)
	}
	var parts []minio.CompletePart
	for n := 1; err == nil && n < 20; n++ {
		var p minio.ObjectPart
		if p, err = core.PutObjectPart(ctx, "bucket", "parts", id, n, bytes.NewReader(large[:8<<20]), 8<<20, minio.PutObjectPartOptions{}); err == nil {
			parts = append(parts, minio.CompletePart{PartNumber: n, ETag: p.ETag})
		}
	}
	full("a part", err)
	// The parts that are there become an object, or are told not to fit; nothing else comes of it.
	if _, err := core.CompleteMultipartUpload(ctx, "bucket", "parts", id, parts, minio.PutObjectOptions{}); err == nil {
		if len(w.read("parts")) != len(parts)*8<<20 {
			t.Errorf("of %d parts it has %d bytes", len(parts), len(w.read("parts")))
		}
		full("a copy", func() error {
			_, err := c.CopyObject(ctx, minio.CopyDestOptions{Bucket: "bucket", Object: "copy"}, minio.CopySrcOptions{Bucket: "bucket", Object: "parts"})
			return err
		}())
		if err := c.RemoveObject(ctx, "bucket", "parts", minio.RemoveObjectOptions{}); err != nil {
			t.Error(err)
		}
	} else {
		full("an object in parts", err)
		found := 0
		for u := range c.ListIncompleteUploads(ctx, "bucket", "", true) {
			found++
			if u.UploadID != id || u.Err != nil {
				t.Errorf("what is under way is %+v", u)
			}
		}
		if found != 1 {
			t.Errorf("%d uploads are under way", found)
		}
		if err := core.AbortMultipartUpload(ctx, "bucket", "parts", id); err != nil {
			t.Error(err)
		}
	}
	if now := free(); now < before-1<<20 {
		t.Errorf("what was given up takes %d bytes", before-now)
	}
	// A small file that would be a large one is not made that.
	packed := "\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03\x03\x00\x00\x00\x00\x00\x00\x00\x00\x00"
	if _, err := c.PutObject(ctx, "bucket", "packed", strings.NewReader(packed), int64(len(packed)), minio.PutObjectOptions{ContentEncoding: "gzip"}); err != nil || w.read("packed") != packed {
		t.Errorf("what is compressed is kept as %q, %v", w.read("packed"), err)
	}
	w.put(c, "object", "new")
	w.want(c, "object", "new")
}
