//go:build vm && soak

package ceph

import "testing"

// TestRootSoakCeph runs the conformance suite, and reads on one host what the other one has written a thousand times.
func TestRootSoakCeph(t *testing.T) {
	lab(t)
	t.Run("Suite", func(t *testing.T) { suite.Methods(t) })
	t.Run("Hosts", func(t *testing.T) { testHosts(t, 1000) })
}
