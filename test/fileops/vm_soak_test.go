//go:build vm && soak

package main

import "testing"

func TestVMSoakFileOperations(t *testing.T) { fileOperations(t, kinds(t), "-for", "3m") }

// TestVMSoakFilerFileOperations does the same for longer, on the filer's volumes: both engines at once.
func TestVMSoakFilerFileOperations(t *testing.T) {
	kcradle, dir, image := prepare(t)
	for _, k := range engines(t) {
		t.Run(k.name, func(t *testing.T) {
			t.Parallel()
			k.operations(t, kcradle, dir, image, "-for", "10m")
		})
	}
}
