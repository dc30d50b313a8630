//go:build vm && soak

package s3

import "testing"

// TestRootSoakManyObjects lists 100,000 files.
func TestRootSoakManyObjects(t *testing.T) { listMany(t, 10, 10_000) }
