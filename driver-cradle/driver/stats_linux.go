package driver

import (
	"context"
	"net/http"
	"time"

	cstructs "github.com/hashicorp/nomad/client/structs"
	"github.com/hashicorp/nomad/plugins/drivers"

	"github.com/cradlestack/cradlestack/driver-cradle/pod"
	"github.com/cradlestack/cradlestack/driver-cradle/wire"
)

// TaskStats measures a task at an interval until it ends.
func (d *Driver) TaskStats(ctx context.Context, taskID string, interval time.Duration) (<-chan *drivers.TaskResourceUsage, error) {
	t, err := d.task(taskID)
	if err != nil {
		return nil, err
	}
	ch := make(chan *drivers.TaskResourceUsage)
	d.work.Go(func() {
		defer close(ch)
		m := meter{task: t, cores: d.config.cores}
		timer := time.NewTimer(time.Second) // a pod that starts has other things to do
		defer timer.Stop()
		for {
			select {
			case <-timer.C:
				timer.Reset(max(interval, statsPeriod))
			case <-t.done:
				return
			case <-ctx.Done():
				return
			case <-d.ctx.Done():
				return
			}
			usage, err := m.measure(ctx)
			if err != nil {
				d.log.Debug("no statistics", "task", taskID, "error", err)
				continue
			}
			select {
			case ch <- usage:
			case <-t.done:
				return
			case <-ctx.Done():
				return
			case <-d.ctx.Done():
				return
			}
		}
	})
	return ch, nil
}

// statsPeriod is the shortest time between two measurements, each of which wakes the guest. Nomad's clients ask for one every second.
const statsPeriod = 5 * time.Second

// A meter measures a task again and again.
type meter struct {
	task  *task
	cores cores
	last  map[string]sample // by container; "" is the machine
}

type sample struct {
	at  time.Time
	cpu time.Duration
}

// statsTimeout bounds one measurement: a guest that hangs has none.
const statsTimeout = 5 * time.Second

func (m *meter) measure(ctx context.Context) (*drivers.TaskResourceUsage, error) {
	r, err := m.task.live()
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, statsTimeout)
	defer cancel()
	host, err := r.Machine().Stats(ctx)
	if err != nil {
		return nil, err
	}
	var guest wire.Stats
	if err := r.Guest().Call(ctx, http.MethodGet, wire.PathStats, nil, nil, &guest); err != nil {
		return nil, err
	}
	usage := &drivers.TaskResourceUsage{
		Timestamp: now().UnixNano(),
		ResourceUsage: &cstructs.ResourceUsage{
			// Used by the containers; what their machine takes of the host is MaxUsage's neighbour, Swap being nobody's.
			MemoryStats: &cstructs.MemoryStats{
				RSS: guest.MemoryUsed, Usage: guest.MemoryUsed, MaxUsage: uint64(host.PSS), Measured: []string{"RSS", "Usage", "Max Usage"},
			},
			CpuStats: m.cpu("", host.CPU),
		},
		Pids: map[string]*cstructs.ResourceUsage{},
	}
	for name, used := range containerStats(ctx, r) {
		usage.Pids[name] = &cstructs.ResourceUsage{
			MemoryStats: &cstructs.MemoryStats{RSS: used.memory, Usage: used.memory, Measured: []string{"RSS", "Usage"}},
			CpuStats:    m.cpu(name, used.cpu),
		}
	}
	return usage, nil
}

// cpu turns time that was used into a percentage of one core, and ticks (MHz) as Nomad allots them.
func (m *meter) cpu(of string, total time.Duration) *cstructs.CpuStats {
	s := sample{now(), total}
	last, ok := m.last[of]
	if m.last == nil {
		m.last = map[string]sample{}
	}
	m.last[of] = s
	var percent float64
	if elapsed := s.at.Sub(last.at); ok && elapsed > 0 && s.cpu > last.cpu {
		percent = 100 * float64(s.cpu-last.cpu) / float64(elapsed)
	}
	return &cstructs.CpuStats{Percent: percent, TotalTicks: percent / 100 * m.cores.mhz, Measured: []string{"Percent", "Total Ticks"}}
}

type used struct {
	memory uint64
	cpu    time.Duration
}

// containerStats asks the guest about each container of a pod that has several.
func containerStats(ctx context.Context, r *pod.Running) map[string]used {
	if len(r.Launch().Containers) < 2 {
		return nil
	}
	all := map[string]used{}
	for _, c := range r.Launch().Containers {
		// moby api/swagger.yaml, ContainerStats
		var s struct {
			CPU struct {
				Usage struct {
					Total uint64 `json:"total_usage"`
				} `json:"cpu_usage"`
			} `json:"cpu_stats"`
			Memory struct {
				Usage uint64            `json:"usage"`
				Stats map[string]uint64 `json:"stats"`
			} `json:"memory_stats"`
		}
		q := map[string][]string{"stream": {"0"}, "one-shot": {"1"}}
		if err := r.Guest().Call(ctx, http.MethodGet, "/containers/"+c.Name+"/stats", q, nil, &s); err != nil {
			continue // it does not run now
		}
		memory := s.Memory.Usage
		if cache := s.Memory.Stats["inactive_file"]; cache < memory {
			memory -= cache
		}
		all[c.Name] = used{memory, time.Duration(s.CPU.Usage.Total)}
	}
	return all
}
