package driver

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/hashicorp/nomad/nomad/structs"
	"github.com/hashicorp/nomad/plugins/drivers"

	"github.com/cradlestack/cradlestack/driver-cradle/boot"
	"github.com/cradlestack/cradlestack/driver-cradle/pod"
	"github.com/cradlestack/cradlestack/spec"
)

// handleVersion is that of the state that Nomad keeps of a task.
const handleVersion = 1

// A handle is what Nomad keeps of a task for RecoverTask.
type handle struct {
	Dir    string // of the task
	BootID string // of the host, when it was started
}

// StartTask starts a pod and returns when its guest has been told what to run. Where it fails, nothing is left.
func (d *Driver) StartTask(t *drivers.TaskConfig) (*drivers.TaskHandle, *drivers.DriverNetwork, error) {
	c, s, err := d.open()
	if err != nil {
		return nil, nil, err
	}
	if _, err := d.task(t.ID); err == nil {
		return nil, nil, fmt.Errorf("task %s has been started already", t.ID)
	}
	var cfg taskConfig
	if err := t.DecodeDriverConfig(&cfg); err != nil {
		return nil, nil, fmt.Errorf("config: %w", err)
	}
	if cfg.DiskAction != "" && cfg.DiskAction != diskUse {
		pipes, err := d.clearEarlier(s, t, s.dirOf(t.ID, t.Name))
		closeAll(pipes)
		if err != nil {
			return nil, nil, fmt.Errorf("clear an earlier run of the task: %w", err)
		}
		if err := d.actOnDisks(t, &cfg, s); err != nil {
			return nil, nil, err
		}
		return d.handleOf(t, s.dirOf(t.ID, t.Name))
	}
	pkg, err := c.boot()
	if err != nil {
		return nil, nil, err
	}
	p, attached, err := attachedPodOf(t, &cfg, &host{
		cores: c.cores, disk: c.disk, variant: pkg.Manifest.Variant, examine: examine, direct: findDirect, fsType: pod.FSType, allowed: c.allowed, within: within, readEnv: readEnv,
	})
	if err != nil {
		return nil, nil, fmt.Errorf("config: %w", err)
	}
	p.Boot.Accel = c.Accelerator
	b, err := d.begin(s, t)
	if err != nil {
		return nil, nil, err
	}
	defer d.begun(b)
	if err := d.takeDisk(s, t, &cfg, p); err != nil {
		if rerr := os.Remove(b.dir); rerr != nil {
			d.log.Error("clear a task that did not start", "task", t.ID, "error", rerr)
		}
		return nil, nil, err
	}
	if err := d.start(b.ctx, t, &cfg, p, starting{c, s, pkg, b.dir, attached}); err != nil {
		if cerr := s.clear(context.Background(), b.dir); cerr != nil {
			d.log.Error("clear a task that did not start", "task", t.ID, "error", cerr)
		}
		s.disks.release(diskOf(t, cfg.DiskID), t.ID)
		return nil, nil, err
	}
	return d.handleOf(t, b.dir)
}

// takeDisk makes the disk that the task names its own, until it ends. The size of one that is there counts where the task names none.
func (d *Driver) takeDisk(s *state, t *drivers.TaskConfig, cfg *taskConfig, p *spec.Pod) error {
	if cfg.DiskID == "" {
		return nil
	}
	found, err := s.remnants()
	if err != nil {
		return err
	}
	if err := s.disks.take(diskOf(t, cfg.DiskID), t.ID, found); err != nil {
		return err
	}
	kept, err := pod.OpenDisk(s.disks.path(diskOf(t, cfg.DiskID)))
	if err == nil && cfg.Disk == "" {
		p.Scratch.Size = kept.Size
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		s.disks.release(diskOf(t, cfg.DiskID), t.ID)
		return err
	}
	return nil
}

// handleOf is what Nomad gets to know of a task that has started.
func (d *Driver) handleOf(t *drivers.TaskConfig, dir string) (*drivers.TaskHandle, *drivers.DriverNetwork, error) {
	h := drivers.NewTaskHandle(handleVersion)
	h.Config, h.State = t, drivers.TaskStateRunning
	if err := h.SetDriverState(&handle{Dir: dir, BootID: bootID()}); err != nil {
		return nil, nil, errors.Join(err, d.DestroyTask(t.ID, true))
	}
	return h, nil, nil
}

// A beginning is a task that is being started. Its directory is left alone by clearOrphans: where a plugin process dies, Nomad starts the task again in
// the next one under the same id, and so with the directory that it may find from before.
type beginning struct {
	task   *drivers.TaskConfig
	dir    string
	ctx    context.Context
	cancel context.CancelCauseFunc
	pipes  []*os.File
	done   chan struct{} // closed by begun
}

// begin makes a task's directory. begun follows.
func (d *Driver) begin(s *state, t *drivers.TaskConfig) (*beginning, error) {
	d.callOff(t)
	d.sweep.Lock()
	defer d.sweep.Unlock()
	b := &beginning{task: t, dir: s.dirOf(t.ID, t.Name), done: make(chan struct{})}
	if d.starting[b.dir] != nil {
		return nil, fmt.Errorf("task %s is being started already", t.ID)
	}
	var err error
	if b.pipes, err = d.clearEarlier(s, t, b.dir); err != nil {
		closeAll(b.pipes)
		return nil, fmt.Errorf("clear an earlier run of the task: %w", err)
	}
	if err := os.Mkdir(b.dir, 0o711); err != nil {
		closeAll(b.pipes)
		return nil, err
	}
	b.ctx, b.cancel = context.WithCancelCause(d.ctx)
	d.starting[b.dir] = b
	return b, nil
}

func (d *Driver) begun(b *beginning) {
	b.cancel(nil)
	closeAll(b.pipes)
	d.sweep.Lock()
	defer d.sweep.Unlock()
	delete(d.starting, b.dir)
	close(b.done)
}

var errCalledOff = errors.New("the task is started again: the client that has asked for this start is gone")

// callOff ends the starts of a task that an earlier client has asked for, and returns when nothing is left of them or they are complete.
func (d *Driver) callOff(t *drivers.TaskConfig) {
	d.sweep.Lock()
	var others []*beginning
	for _, b := range d.starting {
		if b.task.ID != t.ID && b.task.AllocID == t.AllocID && b.task.Name == t.Name && t.AllocID != "" {
			others = append(others, b)
		}
	}
	d.sweep.Unlock()
	for _, b := range others {
		b.cancel(errCalledOff)
		<-b.done
	}
}

func closeAll(files []*os.File) {
	for _, f := range files {
		f.Close()
	}
}

// clearEarlier removes what was left of the same task by an earlier plugin process, or by this one for an earlier client, in dir or elsewhere: Nomad starts it
// again because it knows of no such run. The earlier machine may have held the pipes of the task's output: they are held for it, until they are closed.
func (d *Driver) clearEarlier(s *state, t *drivers.TaskConfig, dir string) (pipes []*os.File, err error) {
	all, err := s.remnants()
	if err != nil {
		return nil, err
	}
	for _, r := range all {
		if r.dir != dir {
			if r.record == nil || r.record.AllocID != t.AllocID || r.record.Name != t.Name || t.AllocID == "" {
				continue
			}
		}
		if r.delivered() {
			for _, path := range []string{t.StdoutPath, t.StderrPath} {
				if held, err := openSink(path); err == nil { // else the start will say so
					pipes = append(pipes, held.file)
				}
			}
		}
		if r.record != nil {
			if _, err := d.task(r.record.ID); err == nil {
				if err := d.DestroyTask(r.record.ID, true); err != nil {
					return pipes, err
				}
				continue
			}
		}
		if err := s.clear(d.ctx, r.dir); err != nil {
			return pipes, err
		}
	}
	return pipes, nil
}

// starting is what goes with a task that is started.
type starting struct {
	config   *config
	state    *state
	boot     *boot.Package
	dir      string // of the task
	attached []attachment
}

// start makes the pod and starts it.
func (d *Driver) start(ctx context.Context, t *drivers.TaskConfig, cfg *taskConfig, p *spec.Pod, o starting) error {
	rec := &record{
		Version: recordVersion, ID: t.ID, AllocID: t.AllocID, Name: t.Name, Stdout: t.StdoutPath, Stderr: t.StderrPath, Disk: diskOf(t, cfg.DiskID), Attached: o.attached, Created: now(),
	}
	if err := rec.write(o.dir); err != nil {
		return err
	}
	made, err := d.summon(ctx, t, cfg, p, o)
	if err != nil {
		return err
	}
	groups, err := confine(t, p, o.config)
	if err != nil {
		return err
	}
	limits := map[string]spec.IOLimits{}
	for _, a := range o.attached {
		if a.Limits != (spec.IOLimits{}) {
			limits[a.Volume] = a.Limits
		}
	}
	started, err := d.awaitTurn(ctx)
	if err != nil {
		return err
	}
	defer started()
	var strays error
	var looking sync.WaitGroup
	looking.Go(func() { strays = endStrayReaders(ctx, t.StdoutPath) })
	r, err := made.Start(ctx, pod.StartOptions{
		CacheDir: o.config.CacheDir, Detached: true, DiscardLogs: true, Hold: true, Joining: joining(t, o.config, o.state), Limits: limits, Cgroup: groups.unified, Join: groups.dirs(), FirstUID: o.config.firstUID,
	})
	looking.Wait()
	if err != nil {
		return recoverable(err) // a port or a volume may be in use that is free in a moment, a machine die that lives the next time
	}
	if strays != nil { // the log may be out of order
		d.log.Error("end the processes that read a task's output in vain", "task", t.ID, "error", strays)
	}
	if err := d.attend(o.dir, rec, t, r); err != nil {
		return err
	}
	if err := o.state.answers(rec); err != nil {
		d.log.Warn("tell that a pod answers", "task", t.ID, "error", err)
	}
	if info := r.Info(); info.StartWhy != "" {
		d.emit(t, "Booted instead of restored from a template: "+info.StartWhy)
	}
	return nil
}

// longStart is how long a start may keep others waiting: one that copies an image's content into a volume, or waits for a file server, is no work for a processor.
const longStart = 20 * time.Second

// awaitTurn waits until a machine may be started. started lets the next one.
func (d *Driver) awaitTurn(ctx context.Context) (started func(), err error) {
	select {
	case d.starts <- struct{}{}:
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	leave := sync.OnceFunc(func() { <-d.starts })
	timer := time.AfterFunc(longStart, leave)
	return func() {
		timer.Stop()
		leave()
	}, nil
}

// recoverable is an error after which Nomad tries again, as the restart policy says.
func recoverable(err error) error { return structs.NewRecoverableError(err, true) }

// RecoverTask goes on with a task that an earlier plugin process has started.
func (d *Driver) RecoverTask(h *drivers.TaskHandle) error {
	if h == nil || h.Config == nil {
		return errors.New("recover task: no handle")
	}
	if h.Version != handleVersion {
		return fmt.Errorf("recover task: its handle has version %d, this plugin reads version %d", h.Version, handleVersion)
	}
	if _, err := d.task(h.Config.ID); err == nil {
		return nil // this process has had it all the time
	}
	c, s, err := d.open()
	if err != nil {
		return err
	}
	var known handle
	if err := h.GetDriverState(&known); err != nil {
		return fmt.Errorf("recover task: %w", err)
	}
	if err := d.takeUp(c, s, h.Config, &known); err != nil {
		return fmt.Errorf("recover task: %w", err)
	}
	return nil
}

func (d *Driver) takeUp(c *config, s *state, config *drivers.TaskConfig, known *handle) error {
	dir := s.dirOf(config.ID, config.Name)
	if known.Dir != dir {
		return fmt.Errorf("its pod is in %s, which does not belong to state_dir %s", known.Dir, s.dir)
	}
	rec, err := readRecord(dir)
	if err != nil {
		return err
	}
	p, err := pod.Open(filepath.Join(dir, podDir), d.log)
	if err != nil {
		return err
	}
	if known.BootID != bootID() {
		return errors.New("the node was rebooted, which has ended the pod")
	}
	ctx, cancel := context.WithTimeout(d.ctx, takeUpTimeout)
	defer cancel()
	if rec.Disk != "" {
		if err := s.disks.take(rec.Disk, rec.ID, nil); err != nil {
			return err
		}
	}
	r, err := p.TakeUp(ctx, pod.TakeUpOptions{DiscardLogs: true, Hold: true, Joining: joining(config, c, s)})
	if err == nil {
		if err = d.attend(dir, rec, config, r); err == nil {
			return nil
		}
	}
	s.disks.release(rec.Disk, rec.ID)
	if !errors.Is(err, pod.ErrNotRunning) {
		return err
	}
	if err := removeControls(rec.Attached); err != nil {
		return err
	}
	report, err := p.Report()
	if err != nil {
		return err
	}
	t := &task{d: d, dir: dir, record: rec, config: config, started: report.StartedAt, done: make(chan struct{})}
	t.finish(report)
	close(t.done)
	d.hold(t)
	return nil
}

const takeUpTimeout = time.Minute

// clearOrphans ends the pods of earlier plugin processes that Nomad does not recover: it has forgotten their tasks, or never learnt of them. What is
// no pod yet can't be recovered and goes at once.
func (d *Driver) clearOrphans(c *config, s *state) {
	for _, wait := range []time.Duration{0, c.orphanDelay} {
		select {
		case <-time.After(wait):
		case <-d.ctx.Done():
			return
		}
		for _, r := range s.found {
			if err := d.clearOrphan(s, r, wait == 0); err != nil {
				d.log.Error("remove a pod that no task of Nomad's has", "dir", r.dir, "error", err)
			}
		}
	}
}

// clearOrphan removes what was found in a directory, unless a task has that by now. soon leaves pods alone.
func (d *Driver) clearOrphan(s *state, r remnant, soon bool) error {
	d.sweep.Lock()
	defer d.sweep.Unlock()
	if d.starting[r.dir] != nil {
		return nil
	}
	_, err := os.Stat(filepath.Join(r.dir, podDir, pod.LaunchFile))
	if isPod := err == nil && r.record != nil; isPod {
		if _, err := d.task(r.record.ID); soon || err == nil {
			return nil
		}
	}
	if _, err := os.Stat(r.dir); err != nil {
		return nil
	}
	d.log.Info("removing a pod that no task of Nomad's has", "dir", r.dir)
	return s.clear(d.ctx, r.dir)
}

// endForgotten ends tasks that this process attends to and that Nomad does not know: their client was killed before it could note their start, and they are
// not to run any more. A client that knows a task waits for its end all the time.
func (d *Driver) endForgotten(c *config) {
	period := min(max(c.orphanDelay/4, time.Second), time.Minute)
	for {
		select {
		case <-time.After(period):
		case <-d.ctx.Done():
			return
		}
		for _, t := range d.forgotten(c.orphanDelay) {
			d.log.Info("ending a pod that Nomad does not know", "task", t.record.ID, "dir", t.dir)
			if err := d.DestroyTask(t.record.ID, true); err != nil && !errors.Is(err, drivers.ErrTaskNotFound) {
				d.log.Error("end a pod that Nomad does not know", "task", t.record.ID, "error", err)
			}
		}
	}
}

// forgotten lists the tasks that no client has waited for since a while, though there was one.
func (d *Driver) forgotten(after time.Duration) (all []*task) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.client.IsZero() || time.Since(d.client) < after {
		return nil
	}
	for _, t := range d.tasks {
		if t.waits.since(after) {
			all = append(all, t)
		}
	}
	return all
}

// A presence is whether somebody is there, and when somebody was there last.
type presence struct {
	mu    sync.Mutex
	count int
	last  time.Time
}

func (p *presence) come() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.count++
}

func (p *presence) leave() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.count--
	p.last = now()
}

// since says whether nobody was there for so long.
func (p *presence) since(d time.Duration) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.count == 0 && time.Since(p.last) > d
}
