package guest

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cradlestack/cradlestack/driver-cradle/wire"
	"github.com/cradlestack/cradlestack/spec"
)

// joined is what a container has that has joined the running pod.
type joined struct {
	run     int // of wire.Join; guarded by the crew's mutex
	layers  []string
	volumes []string

	pid, ipc string // containers, by their ids, whose namespaces it shares; "" for its own
}

// forGood is longer than any pod lives: a container that joins is held until somebody starts it.
const forGood = 100 * 365 * 24 * time.Hour

// join adds a container to the pod.
func (p *Pod) join(ctx context.Context, j *wire.Join) (wire.ContainerStatus, error) {
	p.joining.Lock()
	defer p.joining.Unlock()
	if p.Containers() == nil {
		return wire.ContainerStatus{}, &stateError{ErrConflict, "the pod has not been launched"}
	}
	for _, c := range p.Containers() {
		switch {
		case c.spec.ID == j.Container.ID && c.joined != nil:
			err := c.rejoin(j.Run)
			return c.status(), err
		case c.spec.ID == j.Container.ID, c.spec.Name == j.Container.Name:
			return wire.ContainerStatus{}, &stateError{ErrConflict, "the pod has a container " + c.spec.Name}
		}
	}
	if p.over() {
		return wire.ContainerStatus{}, errEnding
	}
	c, err := p.admit(ctx, j)
	if err != nil {
		return wire.ContainerStatus{}, fmt.Errorf("container %s: %w", j.Container.Name, err)
	}
	return c.status(), nil
}

var errEnding = &stateError{ErrConflict, "the pod is about to end: nothing joins it any more"}

func (p *Pod) over() bool {
	p.crew.mu.Lock()
	defer p.crew.mu.Unlock()
	return p.crew.stopping
}

// rejoin holds a container that has ended, for its next run.
func (c *Container) rejoin(run int) error {
	crew := c.pod.crew
	crew.mu.Lock()
	defer crew.mu.Unlock()
	if run <= c.joined.run {
		return nil
	}
	if !c.unit.active {
		if !crew.rearm(c.unit) {
			return errEnding
		}
		c.state.Status = wire.StateCreated
	}
	c.joined.run = run
	return nil
}

// admit prepares a container's place as newContainer does, and what it needs for that. Nothing stays where that fails.
func (p *Pod) admit(ctx context.Context, j *wire.Join) (_ *Container, err error) {
	s := j.Container
	s.Lifecycle.Hold, s.Lifecycle.Critical, s.Lifecycle.After = spec.Duration(forGood), false, nil
	in := &joined{run: j.Run, pid: j.PID, ipc: j.IPC}
	defer func() {
		if err != nil {
			err = errors.Join(err, p.drop(in))
		}
	}()
	for _, d := range j.Disks {
		diffID, ok := strings.CutPrefix(d.Key, wire.DiskLayer)
		if !ok {
			return nil, &stateError{ErrInvalid, "a container joins with its layers' disks alone, and not with " + d.Key}
		}
		in.layers = append(in.layers, diffID)
		if p.layers[diffID] != "" {
			continue
		}
		dir := layerDir(d.LUN)
		if err := p.mountLayer(ctx, d, dir); err != nil {
			return nil, err
		}
		p.layers[diffID] = dir
	}
	for _, v := range j.Volumes {
		if v.Scratch == nil {
			return nil, &stateError{ErrInvalid, fmt.Sprintf("volume %s: a container joins with volumes on the pod's own disk alone", v.Name)}
		}
		if p.volumeNamed(v.Name) != nil {
			return nil, &stateError{ErrInvalid, fmt.Sprintf("volume %s is there twice", v.Name)}
		}
		made := &volume{spec: v, path: filepath.Join(runDir, "volumes", v.Name)}
		if err := p.mountVolume(ctx, made, false); err != nil {
			return nil, fmt.Errorf("volume %s: %w", v.Name, err)
		}
		p.mu.Lock()
		p.volumes[v.Name] = made
		p.mu.Unlock()
		in.volumes = append(in.volumes, v.Name)
	}
	p.mu.Lock()
	n := p.places
	p.places++
	p.mu.Unlock()
	c, err := p.newContainer(n, &s)
	if err != nil {
		return nil, errors.Join(err, unmountBelow(filepath.Join(runDir, "c", filepath.Base(s.ID), "rootfs")), removeCgroup(containerCgroup(n)))
	}
	c.joined, c.unit.guest = in, true
	p.mu.Lock()
	p.containers = append(slices.Clip(p.containers), c) // others look at the list that was
	p.mu.Unlock()
	if !p.crew.add(c.unit) {
		return nil, errors.Join(errEnding, p.forget(c))
	}
	return c, nil
}

// shares are the processes whose namespaces a container shares that has joined.
func (c *Container) shares() (pid, ipc *process, err error) {
	if c.joined == nil {
		return nil, nil, nil
	}
	of := func(id, kind string) (*process, error) {
		if id == "" {
			return nil, nil //nolint:nilnil // it has its own
		}
		all := c.pod.Containers()
		i := slices.IndexFunc(all, func(o *Container) bool { return o.spec.ID == id })
		if i < 0 {
			return nil, &stateError{ErrConflict, fmt.Sprintf("failed to join %s namespace: No such container: %s", kind, id)}
		}
		cmd, err := all[i].running()
		if err != nil {
			return nil, &stateError{ErrConflict, fmt.Sprintf("failed to join %s namespace: %v", kind, err)}
		}
		return cmd.process, nil
	}
	if pid, err = of(c.joined.pid, "PID"); err == nil {
		ipc, err = of(c.joined.ipc, "IPC")
	}
	return pid, ipc, err
}

// forget takes a container that does not run out of the pod, and leaves its files.
func (p *Pod) forget(c *Container) error {
	p.crew.remove(c.unit)
	p.mu.Lock()
	p.containers = slices.DeleteFunc(slices.Clone(p.containers), func(other *Container) bool { return other == c })
	p.mu.Unlock()
	c.io.Close()
	err := unmountBelow(c.rootfs)
	if rerr := os.Remove(c.rootfs); rerr != nil && !errors.Is(rerr, fs.ErrNotExist) {
		err = errors.Join(err, rerr)
	}
	return errors.Join(err, removeCgroup(c.cgroup))
}

func removeCgroup(dir string) error {
	clearCgroup(dir)
	if err := unix.Rmdir(dir); err != nil && err != unix.ENOENT {
		return &os.PathError{Op: "remove", Path: dir, Err: err}
	}
	return nil
}

// drop unmounts layers that no container uses any more, and forgets volumes.
func (p *Pod) drop(in *joined) error {
	p.mu.Lock()
	for _, name := range in.volumes {
		delete(p.volumes, name)
	}
	p.mu.Unlock()
	used := map[string]bool{}
	for _, c := range p.Containers() {
		for _, l := range c.spec.Layers {
			used[l.DiffID] = true
		}
	}
	var errs []error
	for _, diffID := range in.layers {
		dir := p.layers[diffID]
		if used[diffID] || dir == "" {
			continue
		}
		if err := unix.Unmount(dir, unix.UMOUNT_NOFOLLOW); err != nil {
			errs = append(errs, &os.PathError{Op: "unmount", Path: dir, Err: err})
			continue
		}
		delete(p.layers, diffID)
	}
	return errors.Join(errs...)
}

// leave ends a container that has joined and removes what it has written. One that is not there has left.
func (p *Pod) leave(ctx context.Context, id string) error {
	p.joining.Lock()
	defer p.joining.Unlock()
	all := p.Containers()
	i := slices.IndexFunc(all, func(c *Container) bool { return c.spec.ID == id })
	if i < 0 {
		return nil
	}
	c := all[i]
	if c.joined == nil {
		return &stateError{ErrConflict, fmt.Sprintf("container %s is the pod's own: it ends with it", c.spec.Name)}
	}
	var now time.Duration
	if err := c.stop(ctx, "SIGKILL", &now, ""); err != nil {
		return err
	}
	var volumes []string
	for _, name := range c.joined.volumes {
		if v := p.volumeNamed(name); v != nil {
			volumes = append(volumes, v.path)
		}
	}
	err := p.forget(c)
	err = errors.Join(err, p.drop(c.joined))
	for _, path := range append(volumes, c.dir) {
		err = errors.Join(err, os.RemoveAll(path))
	}
	c.Emit("destroy", nil)
	return err
}
