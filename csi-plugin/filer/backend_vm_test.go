//go:build vm

package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cradlestack/cradlestack/csi-plugin/filer/api"
	"github.com/cradlestack/cradlestack/csi-plugin/filer/volumes"
	"github.com/cradlestack/cradlestack/csi-plugin/volume"
)

// TestRootBackendMoves: the active filer of a pair is killed in the middle of each kind of call for a volume. The call is answered by the other one as if nothing had been,
// and so is the same call again.
func TestRootBackendMoves(t *testing.T) {
	p := newPair(t, 2*time.Second)
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
	defer cancel()
	files := volume.Parameters{Class: volume.NFS}
	snap := volume.SnapshotID{Volume: "v", Name: "then"}
	for _, step := range []struct {
		what string
		do   func(b *volumes.Backend) error
	}{
		{"create", func(b *volumes.Backend) error {
			v, err := b.Create(ctx, volume.Request{Name: "v", Parameters: files})
			if err == nil && v.ID != "v" {
				err = fmt.Errorf("%+v", v)
			}
			return err
		}},
		{"fill", func(*volumes.Backend) error {
			data := make([]byte, 1<<20)
			_, _ = rand.NewChaCha8([32]byte{}).Read(data)
			for i := range 64 {
				if err := os.WriteFile(filepath.Join(p.pool, "v", "data", fmt.Sprint(i)), data, 0o600); err != nil {
					return err
				}
			}
			return nil
		}},
		{"snapshot", func(b *volumes.Backend) error {
			s, err := b.Snapshot(ctx, volume.SnapshotRequest{ID: snap})
			if err == nil && s.ID != snap {
				err = fmt.Errorf("%+v", s)
			}
			return err
		}},
		{"clone", func(b *volumes.Backend) error {
			_, err := b.Clone(ctx, volume.Request{Name: "w", Parameters: files, Origin: volume.Origin{Snapshot: snap}}, nil)
			if entries, rerr := os.ReadDir(filepath.Join(p.pool, "w", "data")); err == nil && (rerr != nil || len(entries) != 64) {
				err = fmt.Errorf("it has %d files, %w", len(entries), rerr)
			}
			return err
		}},
		{"reschedule", func(b *volumes.Backend) error {
			err := b.Reschedule(ctx, "v", "daily=3")
			if v, gerr := b.Get(ctx, "v"); err == nil && (gerr != nil || v.Schedule != "daily=3") {
				err = fmt.Errorf("%+v, %w", v, gerr)
			}
			return err
		}},
		{"delete a snapshot", func(b *volumes.Backend) error {
			err := b.DeleteSnapshot(ctx, snap)
			if all, serr := b.Snapshots(ctx, ""); err == nil && (serr != nil || len(all) > 0) {
				err = fmt.Errorf("%+v, %w", all, serr)
			}
			return err
		}},
		{"delete", func(b *volumes.Backend) error { return errors.Join(b.Delete(ctx, "v"), b.Delete(ctx, "w")) }},
		{"list", func(b *volumes.Backend) error {
			all, err := b.List(ctx)
			if err == nil && (len(all) != 1 || all[0].ID != "vol") { // the pair's own
				err = fmt.Errorf("%+v", all)
			}
			return err
		}},
	} {
		active, other := p.active()
		b := volumes.Open(api.Client{Socket: other.socket()})
		done := make(chan error, 1)
		go func() { done <- step.do(b) }()
		time.Sleep(time.Duration(rand.IntN(30)) * time.Millisecond)
		active.sends(unix.SIGKILL)
		if err := <-done; err != nil {
			t.Errorf("%s: %v", step.what, err)
		}
		p.moved(other)
		active.again()
		if err := step.do(b); err != nil && step.what != "fill" {
			t.Errorf("%s again: %v", step.what, err)
		}
		p.eventually("a filer is active, and the other stands by", p.settled)
	}
	entries, err := os.ReadDir(p.pool)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	if names = slices.DeleteFunc(names, func(name string) bool { return name == ".lock" || name == setState || name == "vol" }); len(names) > 0 {
		t.Errorf("left in the pool: %q", names)
	}
}
