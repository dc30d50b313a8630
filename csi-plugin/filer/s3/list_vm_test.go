//go:build vm

package s3

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/minio/minio-go/v7"
)

// TestRootManyObjects lists more files than one answer has.
func TestRootManyObjects(t *testing.T) { listMany(t, 2, 1100) }

// listMany lists files, which S3 has not written, in their order.
func listMany(t *testing.T, folders, files int) {
	w := serve(t)
	for i := range folders {
		dir := filepath.Join(w.root, fmt.Sprint(i))
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		for j := range files {
			if err := os.WriteFile(filepath.Join(dir, fmt.Sprintf("%05d", j)), nil, 0o644); err != nil {
				t.Fatal(err)
			}
		}
	}
	c := w.client("key", "secret")
	n := 0
	for o := range c.ListObjects(t.Context(), "bucket", minio.ListObjectsOptions{Recursive: true}) {
		if o.Err != nil {
			t.Fatal(o.Err)
		}
		if want := fmt.Sprintf("%d/%05d", n/files, n%files); o.Key != want {
			t.Fatalf("object %d is %s, not %s", n, o.Key, want)
		}
		n++
	}
	if n != folders*files {
		t.Errorf("%d objects are listed", n)
	}
	n = 0
	for o := range c.ListObjects(t.Context(), "bucket", minio.ListObjectsOptions{Prefix: fmt.Sprint(folders-1, "/")}) {
		if o.Err != nil {
			t.Fatal(o.Err)
		}
		n++
	}
	if n != files {
		t.Errorf("a folder has %d objects", n)
	}
}
