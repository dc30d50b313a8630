package nomadtest

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/nomad/api"

	"github.com/cradlestack/cradlestack/internal/agents"
)

// A State is what Nomad has told of itself, by ids. It is valid during the call that gets it. Allocations come without their job: JobVersion and
// JobType of one may be missing.
type State struct {
	Allocs      map[string]*api.AllocationListStub
	Nodes       map[string]*api.NodeListStub
	Deployments map[string]*api.Deployment
	Evals       map[string]*api.Evaluation
}

// Of lists a job's allocations, the newest first.
func (s *State) Of(job string) []*api.AllocationListStub {
	var all []*api.AllocationListStub
	for _, a := range s.Allocs {
		if a.JobID == job {
			all = append(all, a)
		}
	}
	slices.SortFunc(all, func(a, b *api.AllocationListStub) int { return int(int64(b.CreateIndex) - int64(a.CreateIndex)) })
	return all
}

// Node is the node of this name, nil before it has registered.
func (s *State) Node(name string) *api.NodeListStub {
	for _, n := range s.Nodes {
		if n.Name == name {
			return n
		}
	}
	return nil
}

func (s *State) ready(n *Node, drivers []string) bool {
	node := s.Node(n.Name)
	if node == nil || node.Status != api.NodeStatusReady || node.SchedulingEligibility != api.NodeSchedulingEligible {
		return false
	}
	for _, name := range drivers {
		if d := node.Drivers[name]; d == nil || !d.Healthy {
			return false
		}
	}
	return true
}

// Ended says whether an allocation has ended, or its node is lost.
func Ended(a *api.AllocationListStub) bool {
	switch a.ClientStatus {
	case api.AllocClientStatusComplete, api.AllocClientStatusFailed, api.AllocClientStatusLost:
		return true
	default:
		return false
	}
}

// A watch follows Nomad's event stream, over restarts of the server.
type watch struct {
	api    *api.Client
	log    func(string, ...any)
	cancel context.CancelCauseFunc
	ended  chan struct{}

	mu      sync.Mutex
	state   State
	listed  uint64        // the index at which all allocations were known
	changed chan struct{} // closed, and replaced, when state has changed
	opened  int           // how many times the stream was opened, and all that was before is known
	stop    func()        // ends the stream that is open
}

var errClosed = errors.New("the cluster has been closed")

func newWatch(client *api.Client, log func(string, ...any)) *watch {
	ctx, cancel := context.WithCancelCause(context.Background())
	w := &watch{
		api: client, log: log, cancel: cancel, ended: make(chan struct{}), changed: make(chan struct{}), stop: func() {},
		state: State{Allocs: map[string]*api.AllocationListStub{}, Nodes: map[string]*api.NodeListStub{}, Deployments: map[string]*api.Deployment{}, Evals: map[string]*api.Evaluation{}},
	}
	go func() {
		defer close(w.ended)
		for ctx.Err() == nil {
			_ = w.follow(ctx) // the server is away, or not there yet
			select {
			case <-ctx.Done():
			case <-time.After(50 * time.Millisecond):
			}
		}
	}()
	return w
}

func (w *watch) close() {
	w.cancel(errClosed)
	<-w.ended
}

// follow takes what there is and then every change, until the stream breaks.
func (w *watch) follow(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	w.mu.Lock()
	w.stop = cancel
	w.mu.Unlock()
	q := func() *api.QueryOptions {
		return (&api.QueryOptions{Namespace: api.AllNamespacesNamespace}).WithContext(ctx)
	}
	all := []string{"*"}
	events, err := w.api.EventStream().Stream(ctx, map[api.Topic][]string{api.TopicAllocation: all, api.TopicNode: all, api.TopicDeployment: all, api.TopicEvaluation: all, api.TopicJob: all}, 0, q())
	if err != nil {
		return err
	}
	// What happened while nobody listened. Events that are older than this are known by their index.
	nodes, _, err := w.api.Nodes().List(q())
	if err != nil {
		return err
	}
	deployments, _, err := w.api.Deployments().List(q())
	if err != nil {
		return err
	}
	w.change(func(s *State) {
		for _, n := range nodes {
			// The list has no drivers' attributes and the like; an event of the same index has.
			newer(s.Nodes, n.ID, n, func(n *api.NodeListStub) uint64 { return n.ModifyIndex })
		}
		for _, d := range deployments {
			newer(s.Deployments, d.ID, d, func(d *api.Deployment) uint64 { return d.ModifyIndex })
		}
	})
	if err := w.list(q()); err != nil {
		return err
	}
	w.change(func(*State) {
		if ctx.Err() == nil {
			w.opened++
		}
	})
	for batch := range events {
		if batch.Err != nil {
			return batch.Err
		}
		var err error
		gone := false
		w.change(func(s *State) {
			for _, e := range batch.Events {
				err = errors.Join(err, s.apply(&e, w.listed))
				gone = gone || e.Topic == api.TopicJob && e.Type == "JobDeregistered"
			}
		})
		if gone {
			if err := w.list(q()); err != nil {
				return err
			}
		}
		if err != nil {
			w.log("event stream: %v", err)
		}
	}
	return nil
}

// list takes all allocations as they are now. Those of a job that is purged vanish without an event.
func (w *watch) list(q *api.QueryOptions) error {
	allocs, meta, err := w.api.Allocations().List(q)
	if err != nil {
		return err
	}
	w.change(func(s *State) {
		there := map[string]bool{}
		for _, a := range allocs {
			there[a.ID] = true
			newer(s.Allocs, a.ID, a, func(a *api.AllocationListStub) uint64 { return a.ModifyIndex })
		}
		maps.DeleteFunc(s.Allocs, func(id string, a *api.AllocationListStub) bool { return !there[id] && a.ModifyIndex <= meta.LastIndex })
		w.listed = max(w.listed, meta.LastIndex)
	})
	return nil
}

// reopen opens the stream anew, and returns when all is known: one for all namespaces has those that were there when it was opened.
func (w *watch) reopen(ctx context.Context) error {
	w.mu.Lock()
	before := w.opened
	w.stop()
	w.mu.Unlock()
	for {
		w.mu.Lock()
		now, changed := w.opened, w.changed
		w.mu.Unlock()
		if now > before {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return fmt.Errorf("open Nomad's event stream: %w", context.Cause(ctx))
		}
	}
}

// newer puts an object into a map unless what is there is newer.
func newer[T any](m map[string]T, id string, object T, index func(T) uint64) {
	if old, ok := m[id]; !ok || index(old) <= index(object) {
		m[id] = object
	}
}

// apply takes an event. One of an allocation that is not newer than a list of all tells nothing new, and there may be no such allocation any more.
func (s *State) apply(e *api.Event, listed uint64) error {
	switch e.Topic {
	case api.TopicAllocation:
		a, err := e.Allocation()
		if err != nil || a == nil || a.ModifyIndex <= listed {
			return err
		}
		newer(s.Allocs, a.ID, a.Stub(), func(a *api.AllocationListStub) uint64 { return a.ModifyIndex })
	case api.TopicNode:
		n, err := e.Node()
		if err != nil || n == nil {
			return err
		}
		newer(s.Nodes, n.ID, &api.NodeListStub{
			ID: n.ID, Name: n.Name, Status: n.Status, StatusDescription: n.StatusDescription, Attributes: n.Attributes,
			SchedulingEligibility: n.SchedulingEligibility, Drain: n.Drain, Drivers: n.Drivers, LastDrain: n.LastDrain, ModifyIndex: n.ModifyIndex,
		}, func(n *api.NodeListStub) uint64 { return n.ModifyIndex })
	case api.TopicDeployment:
		d, err := e.Deployment()
		if err != nil || d == nil {
			return err
		}
		newer(s.Deployments, d.ID, d, func(d *api.Deployment) uint64 { return d.ModifyIndex })
	case api.TopicEvaluation:
		v, err := e.Evaluation()
		if err != nil || v == nil {
			return err
		}
		newer(s.Evals, v.ID, v, func(v *api.Evaluation) uint64 { return v.ModifyIndex })
	}
	return nil
}

func (w *watch) change(f func(*State)) {
	w.mu.Lock()
	defer w.mu.Unlock()
	f(&w.state)
	close(w.changed)
	w.changed = make(chan struct{})
}

// look says whether f holds now, and gives what is closed at the next change.
func (w *watch) look(f func(*State) bool) (bool, <-chan struct{}) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return f(&w.state), w.changed
}

// Wait waits until f holds of what Nomad says, looking again at every event.
func (c *Cluster) Wait(ctx context.Context, what string, f func(*State) bool) error {
	for {
		ok, changed := c.watch.look(f)
		if ok {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return fmt.Errorf("waited for %s: %w\n%s", what, context.Cause(ctx), c.Describe())
		}
	}
}

// Until is Wait for tests.
func (c *Cluster) Until(t testing.TB, what string, f func(*State) bool) {
	t.Helper()
	ctx, cancel := patient(t)
	defer cancel()
	if err := c.Wait(ctx, what, f); err != nil {
		t.Fatal(err)
	}
}

// UntilAlloc waits for an allocation of a job of which f holds; the newest such one is returned.
func (c *Cluster) UntilAlloc(t testing.TB, job, what string, f func(*api.AllocationListStub) bool) (found *api.AllocationListStub) {
	t.Helper()
	c.Until(t, fmt.Sprintf("an allocation of job %s that is %s", job, what), func(s *State) bool {
		for _, a := range c.of(s, job) {
			if f(a) {
				found = a
				return true
			}
		}
		return false
	})
	c.untilKept(t, found)
	return found
}

// untilKept waits until Nomad answers with what it has told of an allocation: it tells of a change just before that can be read (nomad/state/state_changes.go, txn.Commit).
func (c *Cluster) untilKept(t testing.TB, a *api.AllocationListStub) {
	t.Helper()
	ctx, cancel := patient(t)
	defer cancel()
	// An allocation that is gone, or a server, is for the caller to find.
	_, _, _ = c.API.Allocations().Info(a.ID, (&api.QueryOptions{Namespace: a.Namespace, WaitIndex: a.ModifyIndex - 1}).WithContext(ctx))
}

// UntilRunning waits for an allocation of a job that runs, all of its tasks included.
func (c *Cluster) UntilRunning(t testing.TB, job string) *api.AllocationListStub {
	t.Helper()
	return c.UntilAlloc(t, job, "running", Running)
}

// UntilEnded waits until a job's newest allocation has ended and its logs are whole.
func (c *Cluster) UntilEnded(t testing.TB, job string) (a *api.AllocationListStub) {
	t.Helper()
	c.Until(t, "the end of job "+job, func(s *State) bool {
		all := c.of(s, job)
		if len(all) == 0 {
			return false
		}
		a = all[0]
		return Ended(a)
	})
	c.untilKept(t, a)
	c.UntilWritten(t, a)
	return a
}

// UntilWritten waits until all that an ended allocation has said is in its logs: Nomad calls tasks ended while its own processes for their logs may still
// have something to write.
func (c *Cluster) UntilWritten(t testing.TB, a *api.AllocationListStub) {
	t.Helper()
	ctx, cancel := patient(t)
	defer cancel()
	for _, n := range c.Nodes {
		if n.Name != a.NodeName {
			continue
		}
		if err := agents.Retry(ctx, "logs of allocation "+a.ID, func() error {
			open, err := n.OpenLogs()
			if errors.Is(err, fs.ErrNotExist) { // the node is down
				return nil
			}
			for _, file := range open {
				if strings.Contains(file, a.ID) {
					err = errors.Join(err, fmt.Errorf("%s is open", file))
				}
			}
			return err
		}); err != nil {
			t.Fatal(err)
		}
	}
}

// Running says whether an allocation and each of its tasks run.
func Running(a *api.AllocationListStub) bool {
	if a.ClientStatus != api.AllocClientStatusRunning || a.DesiredStatus != api.AllocDesiredStatusRun {
		return false
	}
	for _, t := range a.TaskStates {
		if t.State == "pending" {
			return false
		}
	}
	return true
}

// Describe is what a failed wait shows: allocations with their tasks' last events, nodes, evaluations without a place.
func (c *Cluster) Describe() string {
	var b strings.Builder
	c.watch.look(func(s *State) bool {
		for _, n := range s.Nodes {
			fmt.Fprintf(&b, "node %s: %s %s", n.Name, n.Status, n.SchedulingEligibility)
			for _, name := range slices.Sorted(maps.Keys(n.Drivers)) {
				if d := n.Drivers[name]; d.Detected {
					fmt.Fprintf(&b, ", %s healthy=%t %s", name, d.Healthy, d.HealthDescription)
				}
			}
			b.WriteByte('\n')
		}
		for _, v := range s.Evals {
			for group, m := range v.FailedTGAllocs {
				fmt.Fprintf(&b, "job %s: no place for group %s: filtered %v, exhausted %v\n", v.JobID, group, m.ConstraintFiltered, m.DimensionExhausted)
			}
		}
		for _, d := range s.Deployments {
			fmt.Fprintf(&b, "deployment of %s: %s: %s\n", d.JobID, d.Status, d.StatusDescription)
		}
		for _, a := range s.Allocs {
			fmt.Fprintf(&b, "allocation %s of %s on %s: %s, wanted %s\n", a.ID, a.JobID, a.NodeName, a.ClientStatus, a.DesiredStatus)
			for _, name := range slices.Sorted(maps.Keys(a.TaskStates)) {
				for _, e := range a.TaskStates[name].Events[max(0, len(a.TaskStates[name].Events)-6):] {
					fmt.Fprintf(&b, "  %s: %s: %s\n", name, e.Type, e.DisplayMessage)
				}
			}
		}
		return true
	})
	return b.String()
}
