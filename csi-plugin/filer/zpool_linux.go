package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync/atomic"
	"time"

	"github.com/cradlestack/cradlestack/csi-plugin/mount"
	"github.com/cradlestack/cradlestack/csi-plugin/volume"
	"github.com/cradlestack/cradlestack/csi-plugin/zfs"
)

// sharedZpools are datasets of zpools on disks that all members' hosts reach, and that one of them has imported.
type sharedZpools struct {
	member   *member
	datasets []zfs.Pool
	names    []string // of the zpools

	syncing atomic.Int64 // when probe's sync has begun, in nanoseconds since 1970; 0 while there is none
}

func (m *member) sharedZpools() (*sharedZpools, error) {
	p := &sharedZpools{member: m}
	var err error
	if p.datasets, err = m.datasets(); err == nil {
		p.names, err = zfs.Zpools(p.datasets)
	}
	if err == nil && m.state != "" {
		err = errors.New("--state: a set on ZFS keeps that in a file system of its first pool, so that it goes with the volumes; leave it out")
	}
	return p, err
}

// state is where the file system is mounted that what belongs to the set is kept in: among the volumes, by a name that is none of a volume's.
func (p *sharedZpools) state() string { return filepath.Join(p.member.volumes(), "filer:state") }

func (p *sharedZpools) take(ctx context.Context, id string, settled bool) (at place, now string, err error) {
	importing := mount.Holding(ctx, p.member.leash) // the warden waits for its end
	for _, name := range p.names {
		if err := zfs.Import(importing, name, id != "", settled); err != nil {
			return at, "", err
		}
		p.member.log.Info("imported", "zpool", name)
	}
	b, err := p.open(ctx)
	if err == nil {
		now, err = identify(p.state(), id)
	}
	if err != nil {
		return at, "", fmt.Errorf("pool %s: %w", p.datasets[0].Name, err)
	}
	return place{backend: b, state: p.state(), kept: p.state(), shared: true}, now, nil
}

// open has the state mounted. Where it is there, nothing has to be made, which would take a program for each thing while clients wait.
func (p *sharedZpools) open(ctx context.Context) (*zfs.Backend, error) {
	place := func() error {
		return mount.Place(ctx, zfs.StateDataset(p.datasets), "", mount.ZFS, p.state(), mount.Options{})
	}
	if place() == nil {
		return zfs.Reopen(ctx, p.datasets, zfs.Locks)
	}
	b, err := zfs.Open(ctx, p.datasets, zfs.Locks)
	if err == nil {
		err = b.MakeState(ctx)
	}
	if err == nil {
		err = place()
	}
	return b, err
}

func (p *sharedZpools) give(ctx context.Context) error {
	return exportZpools(ctx, p.member.volumes(), p.names)
}

func (p *sharedZpools) lost() error { return lostZpools(p.names) }

// errZpoolLost is of one that is suspended, which ZFS lets no host with multihost go on with, as another one may have it by then (zpool-clear(8)), nor export it.
var errZpoolLost = fmt.Errorf("%w: it is suspended, as its disks failed or did not answer: this host can't go on with it, nor give it back; boot the host", volume.ErrUnavailable)

func lostZpools(names []string) error {
	for _, name := range names {
		if zfs.Suspended(name) != nil {
			return fmt.Errorf("zpool %s: %w", name, errZpoolLost)
		}
	}
	return nil
}

// exportZpools gives zpools back, of which nothing but volumes may be mounted. What was acknowledged is on stable storage.
func exportZpools(ctx context.Context, volumes string, names []string) error {
	if err := lostZpools(names); err != nil {
		return err // an unmount would have no end
	}
	err := clearMounts(volumes)
	for _, name := range names {
		err = errors.Join(err, zfs.Export(ctx, name))
	}
	if errors.Is(err, zfs.ErrSuspended) {
		err = errors.Join(lostZpools(names), err)
	}
	return err
}

// guard keeps multihost on, without which another host could take a zpool that is in use. It returns when a zpool is gone.
func (p *sharedZpools) guard(ctx context.Context) error {
	for p.member.pause(ctx, settleTime); ctx.Err() == nil; p.member.pause(ctx, guardTime) {
		for _, name := range p.names {
			err := zfs.Guard(ctx, name)
			switch {
			case err == nil, ctx.Err() != nil:
			case errors.Is(err, volume.ErrUnavailable):
				return fmt.Errorf("zpool %s: %w", name, err)
			default:
				p.member.log.Error("keep multihost on", "zpool", name, "error", err)
			}
		}
	}
	return nil
}

// probe brings something to stable storage again and again, for status and metrics to say when that does not end: where some disks answer nothing and others do, the
// zpool is not suspended, and no other host can have it. The file is of the pool, and closed then.
func (p *sharedZpools) probe(ctx context.Context, f *os.File) error {
	defer f.Close()
	for ; ctx.Err() == nil; p.member.pause(ctx, probeTime) {
		p.syncing.Store(time.Now().UnixNano())
		_, err := f.WriteAt([]byte(time.Now().UTC().Format(time.DateTime)), 0)
		err = errors.Join(err, f.Sync())
		p.syncing.Store(0)
		if err != nil && ctx.Err() == nil {
			p.member.log.Error("sync", "pool", p.datasets[0].Name, "error", err)
		}
	}
	return nil
}

// probed is a file for that.
func (p *sharedZpools) probed() (*os.File, error) {
	return os.OpenFile(filepath.Join(p.state(), "probe"), os.O_CREATE|os.O_WRONLY, 0o600)
}

// syncs says for how long probe's sync has been waiting.
func (p *sharedZpools) syncs() time.Duration {
	begun := p.syncing.Load()
	if begun == 0 {
		return 0
	}
	return time.Since(time.Unix(0, begun))
}

const (
	settleTime = 2 * time.Second // in which clients come back
	guardTime  = 10 * time.Second
	probeTime  = 5 * time.Second
	syncsLong  = 10 * time.Second // for a sync, as status has it
)
