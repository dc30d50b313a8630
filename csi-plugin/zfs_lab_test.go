//go:build vm && soak && zfslab

package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
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

// TestZFSColdUnmounted is TestRootColdUnmounted with zvols.
func TestZFSColdUnmounted(t *testing.T) {
	s := newColdStore(t)
	s.dataset = "tank"
	testColdUnmounted(s)
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
			sanity(t, shortDir(t), p, "class: "+class+"\nsnapshots: none") // it counts those that it has asked for
		})
	}
}

// TestZFSNomad does with zvols and datasets, by Nomad's command line, what TestRootNomad does with images.
func TestZFSNomad(t *testing.T) {
	s := startZFSNomad(t)
	s.volume("pages")
	s.examples()
}

// TestZFSNomadKilled is TestRootNomadKilled with a zvol; and a dynamic host volume that is a dataset.
func TestZFSNomadKilled(t *testing.T) {
	s := startZFSNomad(t)
	s.part("Killed", testKilled)
	s.part("HostVolume", testHostVolume)
}

// TestZFSNomadDrained drains the node of a job that has a zvol.
func TestZFSNomadDrained(t *testing.T) {
	s := startZFSNomad(t)
	s.volume("database")
	s.drained("database")
	s.CLI(t, "volume", "delete", "database")
	s.empty()
}

// TestZFSNomadLive does what happens to volumes under jobs that go on.
func TestZFSNomadLive(t *testing.T) {
	s := startZFSNomad(t)
	s.part("Block", testLiveBlock)
	for _, fs := range []string{"xfs", "ext4"} {
		s.part(fs, func(s *stack) { testLive(s, fs) })
	}
}

func startZFSNomad(t *testing.T) *stack {
	s := &stack{t: t, id: "cradle", plugins: t.TempDir(), zfs: true}
	script := strings.ReplaceAll(s.example("cradle-host-volume"), "--pool /var/lib/cradle/host-volumes", "--backend zfs --pool server/host")
	// Nomad gives a second for the version, which is too short where all is emulated and begins at once.
	s.start(strings.Replace(script, "#!/bin/sh\n", "#!/bin/sh\ntest \"$1\" != fingerprint || exec echo '{\"version\": \"1.0.0\"}'\n", 1))
	s.plugin()
	return s
}

// TestZFSNomadCopied, TestZFSNomadMoved and TestZFSNomadNodeLost are the parts of TestVMSoakHosts, with a zpool on each host.
func TestZFSNomadCopied(t *testing.T) { testHosts(startZFSHosts(t), testCopy) }

func TestZFSNomadMoved(t *testing.T) { testHosts(startZFSHosts(t), testDrain) }

func TestZFSNomadNodeLost(t *testing.T) { testHosts(startZFSHosts(t), testLost) }

// TestZFSNomadLost is TestVMSoakLost with a zpool on each host, which is destroyed.
func TestZFSNomadLost(t *testing.T) { testRestores(startZFSHosts(t)) }

func startZFSHosts(t *testing.T) *stack {
	s := &stack{t: t, zfs: true}
	s.startHosts()
	return s
}

// testLive has a job that goes on while its volume grows and gets a snapshot that is cloned, and its plugin and Nomad's client are killed and started again.
func testLive(s *stack, fs string) {
	t := s.t
	fsType := fmt.Sprintf("fs_type     = %q", fs)
	s.volume("database", `fs_type     = "xfs"`, fsType)
	s.Run(t, keeps("database"))
	a := s.UntilRunning(t, "keeps")
	s.UntilLogsHave(t, a.ID, "t", "stdout", "all is written")
	mounts := s.mounts("/per-alloc/" + a.ID)
	if len(mounts) != 1 || !strings.Contains(mounts[0], " - "+fs+" /dev/zd") {
		t.Fatalf("mounts of the allocation: %v", mounts)
	}

	s.CLI(t, "volume", "snapshot", "create", "database", "live")
	s.volume("copy", "database@before-upgrade", "database@live")
	out := s.completes(use{job: "look-" + fs, volume: "copy", script: "cd /v; $b sha256sum -c sums; $b df -T -m /v"})
	if strings.Count(out, ": OK") != 5 || !strings.Contains(out, fs) {
		t.Errorf("the clone: %s", out)
	}

	if err := s.kill("cradle-csi"); err != nil {
		t.Fatal(err)
	}
	if err := s.node.KillClient(); err != nil {
		t.Fatal(err)
	}
	if err := s.node.StartAgents(); err != nil {
		t.Fatal(err)
	}
	s.UntilAnswers(t, a.ID)
	s.healthy()
	s.Stop(t, "cradle-csi") // as for another version
	s.plugin()

	s.volume("database", "320MiB", "640MiB", `fs_type     = "xfs"`, fsType)
	var size unix.Statfs_t
	if err := unix.Statfs(s.node.Path(strings.Fields(mounts[0])[4]), &size); err != nil || size.Blocks*uint64(size.Bsize) < 500<<20 {
		t.Errorf("grown while mounted: %d blocks of %d bytes, %v", size.Blocks, size.Bsize, err)
	}
	if _, stderr, code := s.TryCLI(t, "", "volume", "delete", "database"); code == 0 || !strings.Contains(stderr, "in use") {
		t.Errorf("delete a volume in use: exit code %d, %s", code, stderr)
	}
	if now := s.mounts("/per-alloc/" + a.ID); !slices.Equal(now, mounts) {
		t.Errorf("the mounts were %v and are %v", mounts, now)
	}
	s.CLI(t, "alloc", "restart", a.ID)
	if b := s.whole(); b.ID != a.ID {
		t.Errorf("allocation %s was replaced by %s", a.ID, b.ID)
	}
	s.Stop(t, "keeps")
	s.released("database")
	s.CLI(t, "volume", "snapshot", "delete", "cradle", "database@live") // which the clone comes from
	s.CLI(t, "volume", "delete", "database")
	if out := s.completes(use{job: "look-again-" + fs, volume: "copy", script: "cd /v; $b sha256sum -c -s sums && echo whole"}); out != "whole" {
		t.Errorf("the clone, alone: %s", out)
	}
	s.CLI(t, "volume", "delete", "copy")
	s.empty()
}

// testLiveBlock writes to the device that a task has, which a snapshot and its clone have to have as well. Tasks of exec are nobody, who may not.
func testLiveBlock(s *stack) {
	t := s.t
	const size = 96 << 20
	with := func(job, volume string, do func(f *os.File) error) {
		t.Helper()
		s.Run(t, use{job: job, volume: volume, block: true, script: "test -b /v; $b sleep 1000"}.hcl())
		a := s.UntilRunning(t, job)
		mounts := s.mounts("/per-alloc/" + a.ID)
		if len(mounts) != 1 {
			t.Fatalf("mounts of the allocation: %v", mounts)
		}
		f, err := os.OpenFile(s.node.Path(strings.Fields(mounts[0])[4]), os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(do(f), f.Sync(), f.Close()); err != nil {
			t.Fatal(err)
		}
		s.Stop(t, job)
		s.released(volume)
	}
	write := func(text string) func(*os.File) error {
		return func(f *os.File) error { _, err := f.WriteString(text); return err }
	}
	s.volume("disk")
	with("fill", "disk", write("first"))
	s.CLI(t, "volume", "snapshot", "create", "disk", "first")
	with("refill", "disk", write("other"))
	clone := strings.NewReplacer(`"disk"`, `"disk-copy"`, `capacity_min = "64MiB"`, `capacity_min = "96MiB"`+"\n"+`snapshot_id = "disk@first"`)
	s.CLI(t, "volume", "create", s.file(clone.Replace(s.example("disk.volume.hcl"))))
	with("compare", "disk-copy", func(f *os.File) error {
		got := make([]byte, 5)
		_, err := f.Read(got)
		end, serr := f.Seek(0, io.SeekEnd)
		if string(got) != "first" || end != size {
			t.Errorf("the clone has %q and %d bytes", got, end)
		}
		return errors.Join(err, serr)
	})
	if _, stderr, code := s.TryCLI(t, "", "volume", "delete", "disk"); code == 0 || !strings.Contains(stderr, "first") {
		t.Errorf("delete a volume that has a snapshot: exit code %d, %s", code, stderr)
	}
	s.CLI(t, "volume", "snapshot", "delete", "cradle", "disk@first")
	s.CLI(t, "volume", "delete", "disk")
	s.CLI(t, "volume", "delete", "disk-copy")
	s.empty()
}
