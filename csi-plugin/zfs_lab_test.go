//go:build vm && zfslab

package main

import (
	"os/exec"
	"slices"
	"strings"
	"testing"
)

// The tests in this file run in a machine that has ZFS and the pool tank: package zfs's soak starts it.

// TestZFSCold is TestRootCold with zvols.
func TestZFSCold(t *testing.T) {
	s := newColdStore(t)
	s.dataset = "tank"
	testCold(s)
}

// TestZFSColdUnreachable is TestRootColdUnreachable with zvols, and waits until it is tried again.
func TestZFSColdUnreachable(t *testing.T) {
	s := newColdStore(t)
	s.dataset = "tank"
	testColdUnreachable(s, 2)
}

// TestZFSSanity runs the whole of csi-sanity for each kind of volume that the zfs backend has.
func TestZFSSanity(t *testing.T) {
	for _, class := range []string{"lv2", "nfs"} {
		t.Run(class, func(t *testing.T) {
			dataset := "tank/sanity-" + class
			p := pool{[]string{"--backend", "zfs", "--pool", dataset}, func() (names []string) {
				out, err := exec.Command("zfs", "list", "-H", "-r", "-t", "all", "-o", "name", dataset).Output()
				if err != nil {
					t.Error(err)
				}
				return slices.DeleteFunc(strings.Fields(string(out)), func(name string) bool { return name == dataset })
			}}
			sanity(t, shortDir(t), p, "class: "+class)
		})
	}
}
