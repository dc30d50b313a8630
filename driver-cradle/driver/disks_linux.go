package driver

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/docker/go-units"
	"github.com/hashicorp/nomad/plugins/drivers"
	"golang.org/x/sys/unix"

	"github.com/cradlestack/cradlestack/driver-cradle/pod"
	"github.com/cradlestack/cradlestack/spec"
)

// disks are the scratch disks that are kept on this node under ids that tasks give them, and who uses them now. Each is a pod.Disk:
//
//	STATE/disks/NAMESPACE/ID/
//
// A disk is its namespace's: tasks of another one neither get it nor hear of it. Its name is its path below STATE/disks.
type disks struct {
	dir string

	mu    sync.Mutex
	users map[string]string // ids of the tasks of this process, by the disk's name
}

func openDisks(dir string) (*disks, error) {
	namespaces, err := os.ReadDir(dir)
	errs := []error{err}
	for _, n := range namespaces {
		errs = append(errs, pod.TidyDisks(filepath.Join(dir, n.Name())))
	}
	return &disks{dir: dir, users: map[string]string{}}, errors.Join(errs...)
}

// diskOf is the name of the disk that a task calls id; "" for none.
func diskOf(t *drivers.TaskConfig, id string) string {
	if id == "" {
		return ""
	}
	namespace := strings.Map(func(r rune) rune {
		switch {
		case r >= 'a' && r <= 'z', r >= 'A' && r <= 'Z', r >= '0' && r <= '9', r == '-': // all that Nomad's have (nomad/structs validNamespaceName)
			return r
		}
		return '_'
	}, or(t.Namespace, "default"))
	return filepath.Join(namespace, id)
}

func (d *disks) path(name string) string { return filepath.Join(d.dir, name) }

// take makes the disk the task's until it is released. remnants are the tasks on disk, whose pods may run without being this process's yet.
func (d *disks) take(name, taskID string, remnants []remnant) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	user, used := d.users[name]
	for _, r := range remnants {
		if used || r.record == nil || r.record.Disk != name || r.record.ID == taskID {
			continue
		}
		p, err := pod.Open(filepath.Join(r.dir, podDir), nil)
		if errors.Is(err, pod.ErrNoPod) {
			continue
		}
		if err != nil {
			return err
		}
		if used, err = p.Running(); err != nil {
			return err
		}
		user = r.record.ID
	}
	if used && user != taskID {
		// It may be on its way out: the restart policy decides.
		return recoverable(fmt.Errorf("disk_id: disk %s is in use by task %s on this node: stop that one first", filepath.Base(name), user))
	}
	if err := os.MkdirAll(filepath.Dir(d.path(name)), 0o711); err != nil {
		return err
	}
	d.users[name] = taskID
	return nil
}

// release ends what take has begun.
func (d *disks) release(name, taskID string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.users[name] == taskID {
		delete(d.users, name)
	}
}

// remove removes a disk, if there is one.
func (d *disks) remove(name, taskID string, remnants []remnant) error {
	if err := d.take(name, taskID, remnants); err != nil {
		return err
	}
	defer d.release(name, taskID)
	if err := pod.RemoveDisk(d.path(name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	d.leave(filepath.Dir(name), name)
	return nil
}

// leave removes a namespace's directory if it is empty and nobody else is about to make a disk there.
func (d *disks) leave(namespace, removed string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for name := range d.users {
		if name != removed && filepath.Dir(name) == namespace {
			return
		}
	}
	_ = os.Remove(d.path(namespace))
}

// A keptDisk is a line of the list.
type keptDisk struct {
	ID         string              `json:"id"`
	Pod        string              `json:"pod"` // the id of its pods
	Created    time.Time           `json:"created"`
	Written    time.Time           `json:"written"` // for the last time
	Size       spec.Bytes          `json:"size"`
	Used       int64               `json:"used"` // of the node's space, bytes
	Task       string              `json:"task,omitempty"`
	Containers []pod.DiskContainer `json:"containers"`
}

// list tells about all disks of a namespace.
func (d *disks) list(namespace string) ([]keptDisk, error) {
	entries, err := os.ReadDir(d.path(namespace))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	var all []keptDisk
	for _, e := range entries {
		if !isDiskID(e.Name()) {
			continue // one that comes to be or goes
		}
		name := filepath.Join(namespace, e.Name())
		disk, err := pod.OpenDisk(d.path(name))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		used, written, err := disk.Use()
		if err != nil {
			return nil, err
		}
		k := keptDisk{ID: e.Name(), Pod: disk.ID, Created: disk.Created, Written: written, Size: disk.Size, Used: int64(used), Containers: disk.Containers}
		d.mu.Lock()
		k.Task = d.users[name]
		d.mu.Unlock()
		all = append(all, k)
	}
	return all, nil
}

// collectDisks removes disks that nothing was written to for long.
func (d *Driver) collectDisks(c *config, s *state) {
	if c.diskDelay == 0 {
		return
	}
	for {
		select {
		case <-time.After(min(collectPeriod, max(c.diskDelay/2, time.Second))):
		case <-d.ctx.Done():
			return
		}
		if err := d.collectOldDisks(c, s); err != nil && d.ctx.Err() == nil {
			d.log.Error("collect disks", "error", err)
		}
	}
}

func (d *Driver) collectOldDisks(c *config, s *state) error {
	namespaces, err := os.ReadDir(s.disks.dir)
	if err != nil {
		return err
	}
	for _, n := range namespaces {
		all, err := s.disks.list(n.Name())
		if err != nil {
			return err
		}
		for _, k := range all {
			if k.Task != "" || now().Sub(k.Written) < c.diskDelay {
				continue
			}
			found, err := s.remnants()
			if err != nil {
				return err
			}
			if err := s.disks.remove(filepath.Join(n.Name(), k.ID), "gc.disk_delay", found); err != nil {
				return err
			}
			d.log.Info("removed a disk that was not used for long", "namespace", n.Name(), "disk_id", k.ID, "written", k.Written, "freed", units.BytesSize(float64(k.Used)))
		}
	}
	return nil
}

// What disk_action may be.
const (
	diskUse    = "use"
	diskList   = "list"
	diskRemove = "remove"
)

// actOnDisks is the task that does something with this node's disks instead of starting a pod: it has ended when this returns.
func (d *Driver) actOnDisks(t *drivers.TaskConfig, cfg *taskConfig, s *state) error {
	switch {
	case cfg.DiskAction != diskList && cfg.DiskAction != diskRemove:
		return fmt.Errorf("config: disk_action: %q is none of %s, %s, %s", cfg.DiskAction, diskUse, diskList, diskRemove)
	case cfg.Image != "" || len(cfg.Containers) > 0:
		return fmt.Errorf("config: image: a task that is to %s disks runs nothing: leave it out", cfg.DiskAction)
	case cfg.DiskAction == diskRemove && !isDiskID(cfg.DiskID):
		return errors.New("config: disk_id: name the disk that is to be removed")
	case cfg.DiskAction == diskList && cfg.DiskID != "":
		return errors.New("config: disk_id: all disks are listed: leave it out")
	}
	var text bytes.Buffer
	switch cfg.DiskAction {
	case diskList:
		all, err := s.disks.list(filepath.Dir(diskOf(t, "any")))
		if err != nil {
			return fmt.Errorf("list disks: %w", err)
		}
		lines := json.NewEncoder(&text)
		for _, k := range all {
			if err := lines.Encode(k); err != nil {
				return err
			}
		}
	case diskRemove:
		found, err := s.remnants()
		if err == nil {
			err = s.disks.remove(diskOf(t, cfg.DiskID), t.ID, found)
		}
		if err != nil {
			return err // which names the disk; wrapped, Nomad would not see that it may try again
		}
	}
	dir := s.dirOf(t.ID, t.Name)
	if err := os.Mkdir(dir, 0o711); err != nil {
		return err
	}
	rec := &record{Version: recordVersion, ID: t.ID, AllocID: t.AllocID, Name: t.Name, Stdout: t.StdoutPath, Stderr: t.StderrPath, Created: now()}
	err := rec.write(dir)
	if err == nil {
		err = d.say(t.StdoutPath, text.Bytes())
	}
	if err != nil {
		return errors.Join(err, os.RemoveAll(dir))
	}
	ended := &task{d: d, dir: dir, record: rec, config: t, started: now(), done: make(chan struct{})}
	ended.ended, ended.result = now(), &drivers.ExitResult{}
	close(ended.done)
	d.hold(ended)
	return nil
}

// say writes text to one of Nomad's named pipes, and returns when it was read: without anybody who has the pipe open it would be lost.
func (d *Driver) say(path string, text []byte) error {
	out, err := openSink(path)
	if err != nil {
		return err
	}
	defer out.file.Close()
	for ; len(text) > 0; text = text[min(len(text), pipeBuf):] {
		if err := out.write(text[:min(len(text), pipeBuf)], func() error { return context.Cause(d.ctx) }); err != nil {
			return fmt.Errorf("output of the task: %w", err)
		}
	}
	for range 1000 {
		left, err := unread(out.file)
		if err != nil || left == 0 {
			return err
		}
		select {
		case <-time.After(10 * time.Millisecond):
		case <-d.ctx.Done():
			return context.Cause(d.ctx)
		}
	}
	return errors.New("output of the task: nobody reads it")
}

// unread is how many bytes are in a pipe; nothing is in what is none.
func unread(pipe *os.File) (n int, err error) {
	rc, err := pipe.SyscallConn()
	if err != nil {
		return 0, err
	}
	if cerr := rc.Control(func(fd uintptr) { n, err = unix.IoctlGetInt(int(fd), unix.TIOCINQ) }); cerr != nil {
		return 0, cerr
	}
	if errors.Is(err, unix.ENOTTY) {
		err = nil
	}
	return n, err
}
