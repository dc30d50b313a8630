package volumetest

import (
	"context"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/cradlestack/cradlestack/csi-plugin/volume"
	"github.com/cradlestack/cradlestack/internal/mountns"
)

// An operation is one call that is killed.
type operation struct {
	name   string
	before func(*bench)
	do     func(context.Context, Suite, volume.Backend) error
	after  func(*bench) // once do has succeeded, however often it was tried
	keeps  bool         // do, and what removes w, leave v as it was before
}

var operations = []operation{
	{
		name: "create-block",
		do: func(ctx context.Context, _ Suite, b volume.Backend) error {
			_, err := b.Create(ctx, block("v"))
			return err
		},
		after: func(b *bench) { b.put("v", "x"); b.holds("v", "x") },
	},
	{
		name: "create-files",
		do: func(ctx context.Context, s Suite, b volume.Backend) error {
			_, err := b.Create(ctx, s.files("v"))
			return err
		},
		after: func(b *bench) { b.put("v", "x"); b.holds("v", "x") },
	},
	{
		name:   "stage-files",
		before: func(b *bench) { b.create(b.suite.plain("v")) },
		do: func(ctx context.Context, _ Suite, b volume.Backend) error {
			_, err := b.Stage(ctx, "v", volume.Use{As: volume.AsFiles})
			return err
		},
		after: func(b *bench) { b.put("v", "x"); b.holds("v", "x") },
	},
	{
		name:   "stage-raw",
		before: func(b *bench) { b.create(block("v")) },
		do: func(ctx context.Context, _ Suite, b volume.Backend) error {
			_, err := b.Stage(ctx, "v", volume.Use{As: volume.AsRaw})
			return err
		},
		after: func(b *bench) {
			if v, err := b.Get(b.ctx(), "v"); err != nil || v.Content != volume.Guest {
				b.Errorf("given away raw, it is %+v, %v", v, err)
			}
		},
	},
	{
		name: "unstage",
		before: func(b *bench) {
			b.create(b.suite.plain("v"))
			b.put("v", "kept")
			_, err := b.Stage(b.ctx(), "v", volume.Use{As: volume.AsFiles})
			b.must(err)
		},
		do:    func(ctx context.Context, _ Suite, b volume.Backend) error { return b.Unstage(ctx, "v") },
		after: func(b *bench) { b.holds("v", "kept") },
	},
	{
		name:   "expand",
		before: func(b *bench) { b.create(b.suite.plain("v")); b.put("v", "kept") },
		do: func(ctx context.Context, _ Suite, b volume.Backend) error {
			_, err := b.(volume.Expander).Expand(ctx, "v", 2*size, 0)
			return err
		},
		after: func(b *bench) {
			b.holds("v", "kept")
			if v, err := b.Get(b.ctx(), "v"); err != nil || v.Size < 2*size {
				b.Errorf("expanded, it is %+v, %v", v, err)
			}
		},
	},
	{
		name:   "snapshot",
		before: func(b *bench) { b.create(block("v")); b.put("v", "first") },
		do: func(ctx context.Context, _ Suite, b volume.Backend) error {
			_, err := b.(volume.Snapshotter).Snapshot(ctx, snap("v", "s"))
			return err
		},
		after: snapshotHolds("first"),
	},
	{
		name: "snapshot-files",
		before: func(b *bench) {
			b.create(b.suite.files("v"))
			b.put("v", "first")
		},
		do: func(ctx context.Context, _ Suite, b volume.Backend) error {
			_, err := b.(volume.Snapshotter).Snapshot(ctx, snap("v", "s"))
			return err
		},
		after: snapshotHolds("first"),
	},
	{
		name: "delete-snapshot",
		before: func(b *bench) {
			b.create(b.suite.plain("v"))
			b.put("v", "kept")
			_, err := b.Backend.(volume.Snapshotter).Snapshot(b.ctx(), snap("v", "s"))
			b.must(err)
		},
		do: func(ctx context.Context, _ Suite, b volume.Backend) error {
			return b.(volume.Snapshotter).DeleteSnapshot(ctx, snap("v", "s").ID)
		},
		after: func(b *bench) {
			b.holds("v", "kept")
			if all, err := b.Backend.(volume.Snapshotter).Snapshots(b.ctx(), ""); err != nil || len(all) != 0 {
				b.Errorf("after its deletion there are %+v, %v", all, err)
			}
		},
	},
	{
		name:   "clone",
		before: func(b *bench) { b.create(b.suite.plain("v")); b.put("v", "origin") },
		do: func(ctx context.Context, s Suite, b volume.Backend) error {
			r := s.plain("w")
			r.Size, r.Origin.Volume = 2*size, "v"
			_, err := b.(volume.Cloner).Clone(ctx, r, nil)
			return err
		},
		after: func(b *bench) { b.holds("w", "origin"); b.holds("v", "origin") },
		keeps: true,
	},
	{
		name: "receive",
		do:   receive,
		after: func(b *bench) {
			if v, err := b.Get(b.ctx(), "v"); err != nil || v.Origin.Copy == "" {
				b.Errorf("received, it is %+v, %v", v, err)
			}
		},
	},
	{
		name:   "delete",
		before: func(b *bench) { b.create(block("v")); b.put("v", "x") },
		do:     func(ctx context.Context, _ Suite, b volume.Backend) error { return b.Delete(ctx, "v") },
		after: func(b *bench) {
			if all, err := b.List(b.ctx()); err != nil || len(all) != 0 {
				b.Errorf("after its deletion there are %+v, %v", all, err)
			}
		},
	},
	{
		name: "delete-files",
		before: func(b *bench) {
			b.create(b.suite.files("v"))
			b.put("v", "x")
		},
		do:    func(ctx context.Context, _ Suite, b volume.Backend) error { return b.Delete(ctx, "v") },
		after: func(*bench) {},
	},
	{
		name:   "attach",
		before: func(b *bench) { b.create(b.suite.direct("v")) },
		do: func(ctx context.Context, _ Suite, b volume.Backend) error {
			_, err := b.(volume.Attacher).Attach(ctx, "v", target, false)
			return err
		},
		after: func(b *bench) {
			v, err := b.Backend.(volume.Attacher).Attach(b.ctx(), "v", target, false)
			if err != nil || v.Ceph == nil || v.Ceph.Secret == "" {
				b.Errorf("attached, it is %+v, %v", v, err)
			}
		},
	},
	{
		name: "detach",
		before: func(b *bench) {
			b.create(b.suite.direct("v"))
			_, err := b.Backend.(volume.Attacher).Attach(b.ctx(), "v", target, false)
			b.must(err)
		},
		do: func(ctx context.Context, _ Suite, b volume.Backend) error {
			return b.(volume.Attacher).Detach(ctx, "v", target)
		},
		after: func(b *bench) {
			if rest := b.suite.Rest(b.T, b.storage); len(rest) != 1 { // the volume
				b.Errorf("detached, there is %q", rest)
			}
		},
	},
}

// target is where a guest's volume is published.
const target = "/alloc/1"

// blocks says whether the backend has block volumes.
func (s Suite) blocks() bool { return slices.Contains(s.Classes, volume.LV2) }

// files is a volume of files.
func (s Suite) files(name string) volume.Request {
	if slices.Contains(s.Classes, volume.NFS) {
		return volume.Request{Name: name, Parameters: volume.Parameters{Class: volume.NFS}}
	}
	return volume.Request{Name: name, Size: size, Parameters: volume.Parameters{Class: volume.GFS}}
}

// plain is a block volume where there are such.
func (s Suite) plain(name string) volume.Request {
	if s.blocks() {
		return block(name)
	}
	return s.files(name)
}

// direct is a volume of files that guests mount themselves.
func (s Suite) direct(name string) volume.Request {
	r := s.files(name)
	r.Direct = true
	return r
}

// Operations names those that are killed, each of which is a test TestX/Killed/NAME of the backend's TestX.
func Operations() (names []string) {
	for _, op := range operations {
		names = append(names, op.name)
	}
	return names
}

func receive(ctx context.Context, _ Suite, b volume.Backend) error {
	r := block("v")
	r.Origin.Copy = "v@20260106T150000Z"
	_, err := b.(volume.Receiver).Receive(ctx, r, volume.Guest, func(_ context.Context, disk *os.File) error {
		for at := range int64(3) {
			if _, err := disk.WriteAt([]byte("what was in cold storage"), at<<20); err != nil {
				return err
			}
		}
		return nil
	})
	return err
}

func snapshotHolds(want string) func(*bench) {
	return func(b *bench) {
		v, err := b.Get(b.ctx(), "v")
		b.must(err)
		b.put("v", "second")
		r := volume.Request{Name: "w", Size: v.Size, Parameters: v.Parameters, Origin: volume.Origin{Snapshot: snap("v", "s").ID}}
		_, err = b.Backend.(volume.Cloner).Clone(b.ctx(), r, nil)
		b.must(err)
		b.holds("w", want)
		b.holds("v", "second")
	}
}

// has says whether the backend can do an operation.
func (s Suite) has(b volume.Backend, name string) bool {
	_, snapshots := b.(volume.Snapshotter)
	_, expands := b.(volume.Expander)
	_, clones := b.(volume.Cloner)
	_, receives := b.(volume.Receiver)
	_, attaches := b.(volume.Attacher)
	switch name {
	case "expand":
		return expands
	case "delete-snapshot":
		return snapshots
	case "snapshot":
		return snapshots && s.blocks()
	case "snapshot-files":
		return snapshots && s.hasFiles()
	case "clone":
		return clones
	case "receive":
		return receives
	case "attach", "detach":
		return attaches
	case "create-files", "delete-files":
		return s.hasFiles()
	case "stage-files", "unstage":
		return true
	}
	return s.blocks()
}

func (s Suite) hasFiles() bool {
	return slices.ContainsFunc(s.Classes, func(class string) bool { return class != volume.LV2 })
}

// Killed is the part of Run that kills.
func (s Suite) Killed(t *testing.T) { t.Run("Killed", s.testKilled) }

// testKilled kills each operation before its first step, its second, and so on until it comes to its end. Each time the storage must be
// such that the operation succeeds when it is repeated, and that everything can be removed when it is not.
func (s Suite) testKilled(t *testing.T) {
	for _, op := range operations {
		t.Run(op.name, func(t *testing.T) {
			b := s.bench(t, s.New(t))
			if !s.has(b.Backend, op.name) {
				t.Skip("the backend has no such thing")
			}
			prepared := false
			for n := 1; ; n++ {
				more := false
				for _, repeat := range []bool{true, false} {
					wholly := !s.Slow || n%3 == 0
					if !repeat && !wholly {
						continue
					}
					if op.before != nil && !prepared {
						op.before(b)
					}
					prepared = false
					was, err := killed(Operation(b.storage, op.name), n)
					if err != nil {
						t.Fatalf("killed at step %d: %v", n, err)
					}
					more = more || was
					if !wholly {
						if err := op.do(b.ctx(), s, b.Backend); err != nil {
							t.Fatalf("repeated after a kill at step %d: %v", n, err)
						}
						t.Logf("repeated after a kill at step %d", n)
						if snapshots, ok := b.Backend.(volume.Snapshotter); ok && strings.Contains(op.name, "snapshot") {
							b.must(snapshots.DeleteSnapshot(b.ctx(), snap("v", "s").ID))
						}
						if prepared = op.keeps; prepared {
							b.must(b.Delete(b.ctx(), "w"))
						} else {
							b.must(b.Unstage(b.ctx(), "v"))
							b.must(b.Delete(b.ctx(), "v"))
						}
						continue
					}
					// What is to be seen is whole.
					if _, err := b.List(b.ctx()); err != nil {
						t.Fatalf("after a kill at step %d: %v", n, err)
					}
					if repeat {
						if err := op.do(b.ctx(), s, b.Backend); err != nil {
							t.Fatalf("repeated after a kill at step %d: %v", n, err)
						}
						op.after(b)
					}
					// Also what can't be seen yet.
					if s, ok := b.Backend.(volume.Snapshotter); ok {
						b.must(s.DeleteSnapshot(b.ctx(), snap("v", "s").ID))
					}
					b.clear("v", "w")
					if t.Failed() {
						t.Fatalf("that was after a kill at step %d, repeated: %t", n, repeat)
					}
				}
				if !more {
					if n < 3 {
						t.Errorf("it came to its end after %d steps: are they seen?", n-1)
					}
					t.Logf("killed at each of %d steps", n-1)
					return
				}
			}
		})
	}
}

// Main is TestMain: where this process is to be killed, it performs its operation, else it runs the tests.
func (s Suite) Main(m *testing.M) {
	name, ok := os.LookupEnv(childOperation)
	if !ok {
		mountns.Own()
		os.Exit(m.Run())
	}
	if err := s.perform(name, os.Getenv(childStorage)); err != nil {
		fmt.Fprintf(os.Stderr, "%s: %v\n", name, err)
		os.Exit(1)
	}
	os.Exit(0)
}

func (s Suite) perform(name, storage string) error {
	b, err := s.Open(storage)
	if err != nil {
		return err
	}
	i := slices.IndexFunc(operations, func(op operation) bool { return op.name == name })
	return operations[i].do(context.Background(), s, b)
}
