//go:build vm && zfslab

package main

import (
	"bytes"
	"os/exec"
	"testing"
)

// The tests in this file run in a machine that has ZFS and the pool tank: TestVMZFS of package zfs starts it.

// TestZFSCold is TestRootCold with zvols.
func TestZFSCold(t *testing.T) {
	s := newColdStore(t)
	s.dataset = "tank"
	testCold(s)
}

// TestZFSDoctor has the doctor find what a copy has left that did not come to its end.
func TestZFSDoctor(t *testing.T) {
	const pool = "tank/doctor"
	doctor := func(want string, more ...string) {
		t.Helper()
		var out, errs bytes.Buffer
		code := run(t.Context(), append([]string{"doctor", "--backend", "zfs", "--pool", pool}, more...), &out, &errs)
		if code != 0 || out.String() != want {
			t.Errorf("%d, %q, %s; want %q", code, out.String(), errs.String(), want)
		}
	}
	doctor("nothing to repair\n")
	if out, err := exec.Command("zfs", "create", "-s", "-V", "16M", pool+"/receive:w").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	doctor("found: "+pool+"/receive:w: a copy to or from cold storage did not come to its end\n", "--look")
	doctor("repaired: " + pool + "/receive:w: a copy to or from cold storage did not come to its end\n")
	doctor("nothing to repair\n")
}
