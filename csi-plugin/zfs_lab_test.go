//go:build vm && zfslab

package main

import "testing"

// The test in this file runs in a machine that has ZFS and the pool tank: TestVMSoakZFSCold of package zfs starts it.

// TestZFSCold is TestRootCold with zvols.
func TestZFSCold(t *testing.T) {
	s := newColdStore(t)
	s.dataset = "tank"
	testCold(s)
}
