package provider

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/hashicorp/nomad/api"
	"github.com/hashicorp/terraform-plugin-framework/diag"

	"github.com/cradlestack/cradlestack/internal/tunnel"
)

const (
	defaultWait     = 10 * time.Minute
	defaultWaitText = "10m"
	// What a person sees of a pod that has failed.
	shownEvents   = 6
	shownLogBytes = 2 << 10
	shownLogLines = 10
	logsTimeout   = 15 * time.Second
	// checkRetry is the time until a pod is asked again how its containers' health checks fare.
	checkRetry = time.Second
	// awayTimeout is how long Nomad may be away while pods are waited for, as when its servers choose a leader.
	awayTimeout = 30 * time.Second
)

// wait returns when the pods of a job are as far as the model says, or will not come that far.
func (c *cluster) wait(ctx context.Context, w *wish, eval string, m *podModel) (diags diag.Diagnostics) {
	if m.WaitFor.ValueString() == waitNone {
		return nil
	}
	timeout := m.WaitTimeout.duration()
	apply := ctx
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	why, err := c.watch(ctx, w, eval, m.WaitFor.ValueString())
	for end := time.Now().Add(awayTimeout); isAway(err) && ctx.Err() == nil && time.Now().Before(end); {
		select {
		case <-time.After(checkRetry):
		case <-ctx.Done():
		}
		began := time.Now()
		why, err = c.watch(ctx, w, eval, m.WaitFor.ValueString())
		if time.Since(began) > awayTimeout { // it was there meanwhile
			end = time.Now().Add(awayTimeout)
		}
	}
	switch {
	case err != nil && apply.Err() != nil:
		diags.AddError("The pod was not waited for", w.object()+": the apply was interrupted. Nomad goes on with the pod; a plan tells how it is.")
	case err != nil && ctx.Err() == nil:
		diags.Append(failed("The pod can't be watched", w.object(), err))
	case err != nil:
		diags.AddError("The pod is not "+m.WaitFor.ValueString(), fmt.Sprintf("%s: not within %v.\n%s", w.object(), timeout, c.story(context.WithoutCancel(ctx), w)))
	case why != "":
		diags.AddError("The pod is not "+m.WaitFor.ValueString(), w.object()+": "+why)
	}
	return diags
}

// watch is wait as long as Nomad answers.
func (c *cluster) watch(ctx context.Context, w *wish, eval, until string) (why string, err error) {
	if why, err = c.placed(ctx, w, eval); err != nil || why != "" {
		return why, err
	}
	return c.up(ctx, w, until)
}

// placed waits until Nomad has decided where pods go. why is what keeps all nodes from taking one, whatever else ends.
func (c *cluster) placed(ctx context.Context, w *wish, eval string) (why string, err error) {
	q := c.query(ctx, w.options.Namespace)
	for {
		e, meta, err := c.nomad.Evaluations().Info(eval, q)
		if err != nil {
			return "", err
		}
		if e.Status != api.EvalStatusPending {
			for _, metric := range e.FailedTGAllocs {
				if metric.NodesExhausted == 0 && !claimed(metric) {
					return "Nomad finds no node for it. " + unplaceable(metric), nil
				}
			}
			if e.Status == api.EvalStatusFailed {
				return "Nomad could not evaluate it: " + e.StatusDescription, nil
			}
			return "", nil
		}
		q.WaitIndex = meta.LastIndex
	}
}

// claimed says whether a volume is with another pod, which may end.
func claimed(m *api.AllocationMetric) bool {
	for name := range m.ConstraintFiltered {
		if strings.Contains(name, "exhausted") {
			return true
		}
	}
	return false
}

// unplaceable is why nodes do not take a pod, as Nomad counts them.
func unplaceable(m *api.AllocationMetric) string {
	var all []string
	if m.NodesEvaluated == 0 {
		all = append(all, "no node is ready in its datacenters and its node pool")
	}
	for _, name := range slices.Sorted(maps.Keys(m.ConstraintFiltered)) {
		all = append(all, fmt.Sprintf("%d of %d: %s", m.ConstraintFiltered[name], m.NodesEvaluated, name))
	}
	for _, name := range slices.Sorted(maps.Keys(m.DimensionExhausted)) {
		all = append(all, fmt.Sprintf("%d of %d: no room: %s", m.DimensionExhausted[name], m.NodesEvaluated, name))
	}
	for _, name := range slices.Sorted(maps.Keys(m.ClassFiltered)) {
		if len(m.ConstraintFiltered) == 0 {
			all = append(all, fmt.Sprintf("%d of class %s do not fit", m.ClassFiltered[name], name))
		}
	}
	return "Nodes: " + strings.Join(all, "; ")
}

// up waits until all pods of the job's version run, and are well where that is asked for. why is what has become of one that has failed.
func (c *cluster) up(ctx context.Context, w *wish, until string) (why string, err error) {
	well := until == waitHealthy
	job, _, err := c.nomad.Jobs().Info(w.options.ID, c.query(ctx, w.options.Namespace))
	if err != nil {
		return "", err
	}
	q := c.query(ctx, w.options.Namespace)
	for {
		all, meta, err := c.nomad.Jobs().Allocations(w.options.ID, false, q)
		if err != nil {
			return "", err
		}
		deployed := false
		if well {
			d, _, err := c.nomad.Jobs().LatestDeployment(w.options.ID, c.query(ctx, w.options.Namespace))
			if err != nil {
				return "", err
			}
			// Where nothing had to be started, there is no deployment of this version.
			deployed = d == nil || d.JobVersion != *job.Version || d.Status == api.DeploymentStatusSuccessful
		}
		good, others, ended := 0, 0, 0
		for _, a := range all {
			switch {
			case a.JobVersion != *job.Version:
				if a.DesiredStatus == api.AllocDesiredStatusRun && (a.ClientStatus == api.AllocClientStatusRunning || a.ClientStatus == api.AllocClientStatusPending) {
					others++
				}
			case a.ClientStatus == api.AllocClientStatusFailed && a.NextAllocation == "":
				return "it has failed.\n" + c.end(ctx, w, a), nil
			case w.once() && a.ClientStatus == api.AllocClientStatusComplete && a.DesiredStatus == api.AllocDesiredStatusRun:
				ended++
			case a.DeploymentStatus != nil && a.DeploymentStatus.Healthy != nil && !*a.DeploymentStatus.Healthy:
				return "it is not well.\n" + c.end(ctx, w, a), nil
			case a.ClientStatus == api.AllocClientStatusRunning && a.DesiredStatus == api.AllocDesiredStatusRun:
				if !well || deployed || a.DeploymentStatus != nil && a.DeploymentStatus.Healthy != nil {
					good++
				}
			}
		}
		q.WaitIndex = meta.LastIndex
		if ended > 0 {
			return "", nil
		}
		if until == waitEnded {
			continue
		}
		if good < w.count() || others > 0 {
			continue
		}
		if !well {
			return "", nil
		}
		why, done, err := c.checked(ctx, w, all)
		if err != nil || done || why != "" {
			return why, err
		}
		q.WaitIndex = 0 // Nomad hears nothing of it
		select {
		case <-time.After(checkRetry):
		case <-ctx.Done():
			return "", ctx.Err()
		}
	}
}

// checked asks the pods that run how their containers' health checks fare, where the configuration has some: done when all are healthy, why when one is not.
func (c *cluster) checked(ctx context.Context, w *wish, all []*api.AllocationListStub) (why string, done bool, err error) {
	done = true
	for _, container := range w.pod.Containers {
		if h := container.Healthcheck; h == nil || len(h.Test) == 0 || h.Test[0] == "NONE" {
			continue
		}
		for _, a := range all {
			if a.ClientStatus != api.AllocClientStatusRunning || a.DesiredStatus != api.AllocDesiredStatusRun {
				continue
			}
			state, err := c.health(ctx, w, a.ID, container.Name)
			if errors.Is(err, tunnel.ErrDenied) {
				return "", false, fmt.Errorf("the health of its container %s: %w", container.Name, err)
			}
			if err != nil { // it begins or ends, which the next look at its allocation tells
				done = false
				continue
			}
			if state.Status == unhealthy {
				said := ""
				if n := len(state.Log); n > 0 {
					said = "\nIts check says: " + strings.TrimSpace(state.Log[n-1].Output)
				}
				return "container " + container.Name + " is unhealthy." + said + "\n" + c.end(ctx, w, a), false, nil
			}
			done = done && state.Status == healthy
		}
	}
	return "", done, nil
}

// What docker's API says of a container's health (moby api/swagger.yaml, Health).
const (
	healthy   = "healthy"
	unhealthy = "unhealthy"
)

type health struct {
	Status string
	Log    []struct{ Output string }
}

// health asks a pod for that of one of its containers, by docker's API that each pod has.
func (c *cluster) health(ctx context.Context, w *wish, alloc, container string) (health, error) {
	var inspected struct{ State struct{ Health health } }
	err := c.askPod(ctx, w.options.Namespace, alloc, w.pod.Containers[0].Name, "/containers/"+container+"/json", &inspected)
	return inspected.State.Health, err
}

// ended waits until no pod of a job is left.
func (c *cluster) ended(ctx context.Context, namespace, job string) error {
	q := c.query(ctx, namespace)
	for {
		all, meta, err := c.nomad.Jobs().Allocations(job, true, q)
		if err != nil {
			return err
		}
		left := slices.ContainsFunc(all, func(a *api.AllocationListStub) bool {
			return a.ClientStatus == api.AllocClientStatusRunning || a.ClientStatus == api.AllocClientStatusPending && len(a.TaskStates) > 0 ||
				a.ClientStatus == api.AllocClientStatusPending && a.DesiredStatus == api.AllocDesiredStatusRun
		})
		if !left {
			return nil
		}
		q.WaitIndex = meta.LastIndex
	}
}

// story is what there is to say of a job that is not yet as it should be: what keeps its pods from being placed, and how the newest fare.
func (c *cluster) story(ctx context.Context, w *wish) string {
	ctx, cancel := context.WithTimeout(ctx, logsTimeout)
	defer cancel()
	var parts []string
	evals, _, err := c.nomad.Jobs().Evaluations(w.options.ID, c.query(ctx, w.options.Namespace))
	if err == nil && len(evals) > 0 {
		newest := slices.MaxFunc(evals, func(a, b *api.Evaluation) int { return int(int64(a.CreateIndex) - int64(b.CreateIndex)) })
		for _, metric := range newest.FailedTGAllocs {
			parts = append(parts, "Nomad finds no node for it. "+unplaceable(metric))
		}
	}
	all, _, err := c.nomad.Jobs().Allocations(w.options.ID, false, c.query(ctx, w.options.Namespace))
	if err == nil && len(all) > 0 {
		newest := slices.MaxFunc(all, func(a, b *api.AllocationListStub) int { return int(int64(a.CreateIndex) - int64(b.CreateIndex)) })
		parts = append(parts, c.end(ctx, w, newest))
	}
	if len(parts) == 0 {
		return "Nothing of it was started."
	}
	return strings.Join(parts, "\n")
}

// end is what Nomad tells of an allocation, and the last lines that it has written.
func (c *cluster) end(ctx context.Context, w *wish, a *api.AllocationListStub) string {
	ctx, cancel := context.WithTimeout(ctx, logsTimeout)
	defer cancel()
	var b strings.Builder
	fmt.Fprintf(&b, "Allocation %.8s on %s is %s", a.ID, a.NodeName, a.ClientStatus)
	if a.ClientDescription != "" {
		fmt.Fprintf(&b, " (%s)", a.ClientDescription)
	}
	for task, state := range a.TaskStates {
		events := state.Events
		for _, e := range events[max(0, len(events)-shownEvents):] {
			fmt.Fprintf(&b, "\n  %s", e.DisplayMessage)
		}
		for _, kind := range []string{"stdout", "stderr"} {
			if lines := c.lastLines(ctx, w.options.Namespace, a.ID, task, kind); len(lines) > 0 {
				fmt.Fprintf(&b, "\nIts %s ends:\n  %s", kind, strings.Join(lines, "\n  "))
			}
		}
	}
	return b.String()
}

// lastLines are nothing where there is nothing to be had: they are told beside what matters.
func (c *cluster) lastLines(ctx context.Context, namespace, alloc, task, kind string) []string {
	frames, errs := c.nomad.AllocFS().Logs(&api.Allocation{ID: alloc, Namespace: namespace}, false, task, kind, api.OriginEnd, shownLogBytes, ctx.Done(), c.query(ctx, namespace))
	var text strings.Builder
	for open := true; open; {
		var f *api.StreamFrame
		select {
		case f, open = <-frames:
			if open {
				text.Write(f.Data)
			}
		case err := <-errs:
			open = err == nil || errors.Is(err, io.EOF)
			errs = nil // what was read before it is still to come
		case <-ctx.Done():
			open = false
		}
	}
	lines := strings.FieldsFunc(text.String(), func(r rune) bool { return r == '\n' })
	return lines[max(0, len(lines)-shownLogLines):]
}
