//go:build vm && soak

package s3

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/minio/minio-go/v7"
)

// TestRootSoakManyObjects lists 100,000 files, which S3 has not written, in their order.
func TestRootSoakManyObjects(t *testing.T) {
	w := serve(t)
	const folders, files = 10, 10_000
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
	for range c.ListObjects(t.Context(), "bucket", minio.ListObjectsOptions{Prefix: "7/"}) {
		n++
	}
	if n != files {
		t.Errorf("a folder has %d objects", n)
	}
}
