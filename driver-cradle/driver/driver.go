// Package driver is a task driver for Nomad: each task is a pod, a microVM that runs the containers of docker images.
//
// The plugin process attends to all of its pods itself. It may be killed at any line: pods go on without it, and the next plugin process takes them
// up as Nomad recovers their tasks. What it has to know for that is on disk:
//
//	STATE/plugin.lock      held by the process that attends to the tasks
//	STATE/tasks/NAME/      of one task, from StartTask to DestroyTask
//	    task.json          which task it is, and where its output goes
//	    output             how far that was delivered
//	    pod/               the pod, see package pod
//	STATE/answering/       where a file ALLOCATION.TASK comes and goes when a pod answers
//	STATE/disks/…          scratch disks that tasks keep under ids, see disks
//
// A task's configuration becomes a spec.Pod in a pure function (podOf); everything else is package pod's.
//
// driver and driver-cradle's main.go are the only code of this repository that imports Nomad's root module, which is under the Business Source
// License 1.1.
package driver

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/nomad/drivers/shared/eventer"
	"github.com/hashicorp/nomad/plugins/base"
	"github.com/hashicorp/nomad/plugins/drivers"
	"github.com/hashicorp/nomad/plugins/drivers/fsisolation"
	"github.com/hashicorp/nomad/plugins/shared/hclspec"
)

// Name is what jobs write: driver = "cradle".
const Name = "cradle"

// Version is that of the build, set by the linker.
var Version = "development"

// pluginVersion is Version as Nomad wants it: a semantic version.
func pluginVersion() string {
	if regexp.MustCompile(`^v?\d+\.\d+\.\d+`).MatchString(Version) {
		return Version
	}
	return "0.0.0+" + regexp.MustCompile(`[^0-9A-Za-z-]`).ReplaceAllString(Version, "-")
}

// A Driver is the plugin.
type Driver struct {
	*eventer.Eventer

	log    *slog.Logger
	ctx    context.Context // of everything that the plugin does
	cancel context.CancelCauseFunc
	work   sync.WaitGroup

	mu     sync.Mutex
	config *config // valid once SetConfig has been called
	state  *state  // nil until the first use of it
	tasks  map[string]*task
	client time.Time // since when a client is there; zero: there is none

	starts chan struct{} // a place for each machine that is being started

	sweep    sync.Mutex            // held while what an earlier process has left is removed
	starting map[string]*beginning // by the tasks' directories, under sweep
}

var (
	_ drivers.DriverPlugin               = (*Driver)(nil)
	_ drivers.ExecTaskStreamingRawDriver = (*Driver)(nil)
)

// New makes a plugin.
func New(log hclog.Logger) any {
	d := &Driver{log: slog.New(&hclogHandler{log: log.Named(Name)}), tasks: map[string]*task{}, starting: map[string]*beginning{}, starts: make(chan struct{}, startsAtOnce())}
	d.ctx, d.cancel = context.WithCancelCause(context.Background())
	d.Eventer = eventer.NewEventer(d.ctx, log)
	return d
}

// startsAtOnce is how many machines are started at a time. A start is work for a processor: of many at once each would take as long as all of them together, and
// what has to answer within a time would not. Others wait for their turn.
func startsAtOnce() int { return max(4, 2*runtime.NumCPU()) }

var errShutdown = errors.New("the plugin ends")

// Close lets all pods go, which stay as they are. Nomad does not call it, it kills the process.
func (d *Driver) Close() error {
	d.cancel(errShutdown)
	d.mu.Lock()
	tasks := d.tasks
	d.tasks = map[string]*task{}
	d.mu.Unlock()
	var errs []error
	for _, t := range tasks {
		errs = append(errs, t.letGo())
	}
	d.work.Wait()
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.state != nil {
		errs = append(errs, d.state.close())
		d.state = nil
	}
	return errors.Join(errs...)
}

// PluginInfo says who this is.
func (d *Driver) PluginInfo() (*base.PluginInfoResponse, error) {
	return &base.PluginInfoResponse{
		Type: base.PluginTypeDriver, PluginApiVersions: []string{drivers.ApiVersion010}, PluginVersion: pluginVersion(), Name: Name,
	}, nil
}

// ConfigSchema is that of the agent's plugin block.
func (d *Driver) ConfigSchema() (*hclspec.Spec, error) { return configSchema(), nil }

// TaskConfigSchema is that of a task's config block.
func (d *Driver) TaskConfigSchema() (*hclspec.Spec, error) { return taskSchema(), nil }

// Capabilities are the same on every host.
func (d *Driver) Capabilities() (*drivers.Capabilities, error) {
	return &drivers.Capabilities{
		SendSignals: true,
		Exec:        true,
		FSIsolation: fsisolation.Image,
		// A microVM can't be in the host's network namespace.
		NetIsolationModes: []drivers.NetIsolationMode{drivers.NetIsolationModeGroup, drivers.NetIsolationModeNone},
		MountConfigs:      drivers.MountConfigSupportAll,
	}, nil
}

// SetConfig checks the plugin's configuration and takes it over. Nomad calls it once in a process that it ends again, only to have it checked.
func (d *Driver) SetConfig(c *base.Config) error {
	var cfg config
	if len(c.PluginConfig) > 0 {
		if err := base.MsgPackDecode(c.PluginConfig, &cfg); err != nil {
			return err
		}
	}
	if err := cfg.complete(); err != nil {
		return withPlaces(err, agentFiles(), filepath.Base(os.Args[0]))
	}
	if c.AgentConfig != nil {
		cfg.cores = coresOf(c.AgentConfig)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.state != nil {
		return errors.New("the plugin is in use with another configuration already")
	}
	d.config = &cfg
	return nil
}

// open makes this process the one that attends to the state directory's tasks.
func (d *Driver) open() (*config, *state, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.config == nil {
		return nil, nil, errors.New("the plugin has no configuration yet")
	}
	if d.ctx.Err() != nil {
		return nil, nil, context.Cause(d.ctx)
	}
	if d.state == nil {
		s, err := openState(d.ctx, d.config, d.log)
		if err != nil {
			return nil, nil, err
		}
		d.state = s
		c := d.config
		d.work.Go(func() { d.clearOrphans(c, s) })
		d.work.Go(func() { d.collectImages(c, s) })
		d.work.Go(func() { d.collectDisks(c, s) })
		d.work.Go(func() { d.endForgotten(c) })
	}
	return d.config, d.state, nil
}

// task finds one that this process attends to.
func (d *Driver) task(id string) (*task, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	t, ok := d.tasks[id]
	if !ok {
		return nil, drivers.ErrTaskNotFound
	}
	return t, nil
}

// hold notes a task that this process attends to from now on.
func (d *Driver) hold(t *task) {
	t.waits.last = now()
	d.mu.Lock()
	defer d.mu.Unlock()
	d.tasks[t.record.ID] = t
}

func (d *Driver) drop(t *task) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.tasks[t.record.ID] == t {
		delete(d.tasks, t.record.ID)
	}
}

// emit tells Nomad's users what happens to a task.
func (d *Driver) emit(t *drivers.TaskConfig, message string) {
	err := d.EmitEvent(&drivers.TaskEvent{
		TaskID: t.ID, TaskName: t.Name, AllocID: t.AllocID, Timestamp: now(), Message: message,
	})
	if err != nil {
		d.log.Debug("event is lost", "task", t.ID, "message", message, "error", err)
	}
}
