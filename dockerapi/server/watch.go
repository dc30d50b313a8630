package server

import (
	"context"
	"errors"
	"maps"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/nomad/api"

	"github.com/cradlestack/cradlestack/dockerapi/translate"
	"github.com/cradlestack/cradlestack/internal/dockerhttp"
	"github.com/cradlestack/cradlestack/internal/nomadjob"
)

// jobPrefix begins the id of the job of a container, whose id follows.
const jobPrefix = nomadjob.DockerPrefix

// Meta of a container's job.
const (
	metaContainer = nomadjob.ContainerMeta
	metaRun       = "run"
	metaTry       = "try"
)

// A watch follows what Nomad tells of a namespace's pods, by its event stream: nobody asks again and again.
type watch struct {
	mu      sync.Mutex
	jobs    map[string]*jobState // by id
	synced  bool                 // the stream is there and all of what was before it is known
	err     error                // why not
	changed chan struct{}        // closed, and made anew, when any of this changes
}

// A jobState is a container's job.
type jobState struct {
	run     int
	try     int
	index   uint64 // JobModifyIndex: what was created later belongs to this try of the run
	stopped bool
	taken   bool                    // by somebody else: it is docker's no more
	alloc   *api.AllocationListStub // of this run
	eval    *api.Evaluation         // the newest
	allocs  map[string]*api.AllocationListStub
}

func newWatch() *watch {
	return &watch{jobs: map[string]*jobState{}, changed: make(chan struct{}), err: errors.New("it was not asked yet")}
}

// change applies f and tells everyone who waits.
func (w *watch) change(f func()) {
	w.mu.Lock()
	defer w.mu.Unlock()
	f()
	close(w.changed)
	w.changed = make(chan struct{})
}

// A phase is how far a container's newest run has come, as Nomad has it.
type phase int

const (
	phaseNone    phase = iota // there is no job of it
	phasePending              // Nomad has it
	phaseRunning              // its pod is there
	phaseEnded
	phaseAway // its node does not answer; where that comes back, it goes on
)

// A podState is what Nomad tells of a container's newest run.
type podState struct {
	phase   phase
	alloc   *api.AllocationListStub // nil before there is one
	task    *api.TaskState          // nil before its client has heard of it
	noPlace string                  // why it waits for a node
	joined  bool                    // it is that of the container which it has joined
}

// state of a container's run. What an earlier run has left does not count.
func (w *watch) state(r *record) podState {
	w.mu.Lock()
	defer w.mu.Unlock()
	if r.Joins == "" {
		return w.stateOf(r.jobID(), r.Run, r.Try)
	}
	s := w.stateOf(jobPrefix+r.Joins, r.Within, anyTry)
	s.joined, s.task, s.noPlace = true, nil, ""
	switch s.phase {
	case phaseNone, phasePending:
		s.phase = phaseEnded // another run of that container
	case phaseRunning, phaseAway:
		s.task = &api.TaskState{StartedAt: r.Began}
	}
	return s
}

// taskRunning is Nomad's word.
const taskRunning = "running"

// anyTry is whichever of a run's tries is the newest.
const anyTry = -1

func (w *watch) stateOf(jobID string, run, try int) podState {
	j := w.jobs[jobID]
	if j == nil || j.run != run || try != anyTry && j.try != try {
		return podState{}
	}
	s := podState{phase: phasePending, alloc: j.alloc}
	if j.alloc == nil {
		if e := j.eval; e != nil && len(e.FailedTGAllocs) > 0 && e.JobModifyIndex >= j.index {
			s.noPlace = whyNoPlace(e)
		}
		if j.stopped {
			s.phase = phaseEnded
		}
		return s
	}
	s.task = j.alloc.TaskStates[translate.Own]
	switch j.alloc.ClientStatus {
	case api.AllocClientStatusRunning:
		s.phase = phaseRunning
		if s.task != nil && s.task.State == "dead" {
			s.phase = phaseEnded
		}
	case api.AllocClientStatusComplete, api.AllocClientStatusFailed, api.AllocClientStatusLost:
		s.phase = phaseEnded
	case api.AllocClientStatusUnknown:
		s.phase = phaseAway
	case api.AllocClientStatusPending:
		if s.task != nil && s.task.State == taskRunning {
			s.phase = phaseRunning
		}
		if j.alloc.DesiredStatus != api.AllocDesiredStatusRun && s.task == nil {
			s.phase = phaseEnded // called off before its client had heard of it
		}
	}
	return s
}

// calledOff says whether Nomad itself has ended a run, as that of a node that is drained: nobody has stopped its job.
func (w *watch) calledOff(id string, run int) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	j := w.jobs[jobPrefix+id]
	return j != nil && j.run == run && !j.stopped && j.alloc != nil && j.alloc.DesiredStatus != api.AllocDesiredStatusRun
}

// anew says whether Nomad runs a container once more whose newest run it has ended; the mutex is held.
func (j *jobState) anew() bool {
	for _, a := range j.allocs {
		if a.CreateIndex > j.index && a != j.alloc && hasBegun(j.alloc) && !isOver(a) {
			return true
		}
	}
	return false
}

// knows says whether Nomad has a container's newest run.
func (w *watch) knows(r *record) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return r.Joins != "" || w.stateOf(r.jobID(), r.Run, anyTry).phase != phaseNone
}

// taken says whether a job that docker has made is somebody else's by now.
func (w *watch) taken(jobID string) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	j := w.jobs[jobID]
	return j != nil && j.taken
}

// ready answers nil while the watch knows what there is, and 503 with the reason while it does not.
func (w *watch) ready(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, readyTimeout)
	defer cancel()
	for {
		w.mu.Lock()
		synced, err, changed := w.synced, w.err, w.changed
		w.mu.Unlock()
		if synced {
			return nil
		}
		if status, text := statusOf(err); status == http.StatusForbidden {
			return dockerhttp.NewError(status, text)
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return dockerhttp.Errorf(http.StatusServiceUnavailable, "Nomad's event stream is not to be had (%v): try again", err)
		}
	}
}

// readyTimeout is how long a request waits for a stream that was lost.
const readyTimeout = 5 * time.Second

// until waits until done says so; it is asked at each change.
func (w *watch) until(ctx context.Context, done func() (bool, error)) error {
	for {
		w.mu.Lock()
		changed := w.changed
		w.mu.Unlock()
		if ok, err := done(); ok || err != nil {
			return err
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// streamRetry is the time until a stream that broke is opened again. Nomad is not asked for anything else meanwhile.
const streamRetry = 500 * time.Millisecond

// follow keeps the watch until ctx ends.
func (t *tenant) follow(ctx context.Context) {
	for ctx.Err() == nil {
		err := t.followStream(ctx)
		t.watch.change(func() { t.watch.synced, t.watch.err = false, err })
		select {
		case <-ctx.Done():
		case <-time.After(streamRetry):
		}
	}
}

func (t *tenant) followStream(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	all := []string{"*"}
	stream, err := t.nomad.EventStream().Stream(ctx, map[api.Topic][]string{api.TopicAllocation: all, api.TopicJob: all, api.TopicEvaluation: all}, 0, t.query(ctx))
	if err != nil {
		return err
	}
	if err := t.resync(ctx); err != nil {
		return err
	}
	for batch := range stream {
		if batch.Err != nil {
			return batch.Err
		}
		t.watch.change(func() {
			for i := range batch.Events {
				t.watch.apply(&batch.Events[i])
			}
		})
		t.settle()
	}
	return errors.New("the stream has ended")
}

// resync takes what there is. Events that are older are known by their index.
func (t *tenant) resync(ctx context.Context) error {
	jobs, _, err := t.nomad.Jobs().List(&api.QueryOptions{Prefix: jobPrefix, Params: map[string]string{"meta": "true"}})
	if err != nil {
		return err
	}
	q := t.query(ctx)
	q.Params = map[string]string{"resources": "true"}
	allocs, _, err := t.nomad.Allocations().List(q)
	if err != nil {
		return err
	}
	t.watch.change(func() {
		w := t.watch
		there := map[string]bool{}
		for _, j := range jobs {
			there[j.ID] = true
			w.job(&api.Job{ID: &j.ID, Name: &j.Name, Meta: j.Meta}, j.JobModifyIndex, j.Stop)
		}
		maps.DeleteFunc(w.jobs, func(id string, _ *jobState) bool { return !there[id] })
		for _, a := range allocs {
			if there[a.JobID] {
				w.take(a)
			}
		}
		w.synced, w.err = true, nil
	})
	t.settle()
	return t.recover(ctx)
}

// job notes what a job is now.
func (w *watch) job(of *api.Job, index uint64, stopped bool) {
	id, m := *of.ID, nomadjob.Meta(of)
	if m[metaContainer] == "" && of.Meta[metaAttends] == "" {
		return
	}
	j := w.jobs[id]
	if j == nil {
		j = &jobState{allocs: map[string]*api.AllocationListStub{}}
		w.jobs[id] = j
	}
	if index < j.index {
		return
	}
	run, _ := strconv.Atoi(m[metaRun]) // ours
	try, _ := strconv.Atoi(m[metaTry])
	if run != j.run || try != j.try {
		j.run, j.try, j.index = run, try, index
	}
	j.stopped, j.taken = stopped, nomadjob.TakenOver(of)
	j.choose()
}

// choose finds the allocation of the run: the first that has begun. Where Nomad makes another one after it, as of a node that was drained, that is none of docker's.
// Of those that have not begun it is the newest.
func (j *jobState) choose() {
	j.alloc = nil
	for _, a := range j.allocs {
		if a.CreateIndex <= j.index {
			continue
		}
		if old := j.alloc; old == nil || hasBegun(a) && !hasBegun(old) || hasBegun(a) == hasBegun(old) && hasBegun(a) == (a.CreateIndex < old.CreateIndex) {
			j.alloc = a
		}
	}
}

// hasBegun says whether an allocation's container has run.
func hasBegun(a *api.AllocationListStub) bool {
	task := a.TaskStates[translate.Own]
	return task != nil && !task.StartedAt.IsZero()
}

func (w *watch) take(a *api.AllocationListStub) {
	if !strings.HasPrefix(a.JobID, jobPrefix) {
		return
	}
	j := w.jobs[a.JobID]
	if j == nil {
		// Its job comes with a later event.
		j = &jobState{allocs: map[string]*api.AllocationListStub{}}
		w.jobs[a.JobID] = j
	}
	old := j.allocs[a.ID]
	if old != nil && old.ModifyIndex > a.ModifyIndex {
		return
	}
	if isEarly(old) && a.ClientStatus == api.AllocClientStatusPending && !hasBegun(a) {
		a.TaskStates = old.TaskStates // what was sent before that
	}
	j.allocs[a.ID] = a
	j.choose()
	for id, old := range j.allocs { // earlier runs' are of no use
		if old.CreateIndex <= j.index && j.run > 0 {
			delete(j.allocs, id)
		}
	}
}

func (w *watch) apply(e *api.Event) {
	switch e.Topic {
	case api.TopicAllocation:
		if a, err := e.Allocation(); err == nil && a != nil {
			stub := a.Stub()
			stub.AllocatedResources = a.AllocatedResources // which it leaves out
			w.take(stub)
		}
	case api.TopicJob:
		j, purged, err := job(e)
		if err != nil || j == nil || j.ID == nil || !strings.HasPrefix(*j.ID, jobPrefix) {
			return
		}
		if purged {
			delete(w.jobs, *j.ID)
			return
		}
		index := e.Index
		if j.JobModifyIndex != nil {
			index = *j.JobModifyIndex
		}
		w.job(j, index, j.Stop != nil && *j.Stop)
	case api.TopicEvaluation:
		v, err := e.Evaluation()
		if err != nil || v == nil {
			return
		}
		if j := w.jobs[v.JobID]; j != nil && (j.eval == nil || j.eval.ModifyIndex <= v.ModifyIndex) {
			j.eval = v
		}
	}
}

// job is an event's, and whether it is gone.
func job(e *api.Event) (*api.Job, bool, error) {
	if e.Type == "JobDeregistered" {
		return e.DeregisteredJob()
	}
	j, err := e.Job()
	return j, false, err
}

// whyNoPlace says why no node takes a pod.
func whyNoPlace(e *api.Evaluation) string {
	var reasons []string
	for _, m := range e.FailedTGAllocs {
		if m.NodesEvaluated == 0 && m.NodesFiltered == 0 {
			reasons = append(reasons, "no node is there that could run it")
		}
		for what, n := range m.ConstraintFiltered {
			reasons = append(reasons, strconv.Itoa(n)+" of the nodes: "+what)
		}
		for what, n := range m.DimensionExhausted {
			reasons = append(reasons, strconv.Itoa(n)+" of the nodes: not enough "+what)
		}
		for what, n := range m.ClassFiltered {
			reasons = append(reasons, strconv.Itoa(n)+" of the nodes: class "+what)
		}
		for _, q := range m.QuotaExhausted {
			reasons = append(reasons, "quota exhausted: "+q)
		}
	}
	return strings.Join(reasons, ", ")
}

// endOf is how a run has ended, as Nomad has it.
func endOf(number int, s podState) run {
	r := run{Number: number, FinishedAt: time.Now().UTC()}
	if s.joined {
		r.ExitCode, r.Error, r.Lost = exitJoined, "the container whose network it shared has ended, and its machine with it", lostMachine
		return r
	}
	if s.alloc == nil {
		r.ExitCode, r.Error = exitLost, "the job was stopped before a node had it"
		return r
	}
	if s.alloc.ModifyTime > 0 {
		r.FinishedAt = time.Unix(0, s.alloc.ModifyTime).UTC()
	}
	if s.alloc.ClientStatus == api.AllocClientStatusLost || s.phase == phaseAway {
		r.ExitCode, r.Error, r.Lost = exitLost, "its node is lost", lostNode
	}
	if s.task == nil {
		if r.Error == "" {
			r.ExitCode, r.Error = exitNever, or(s.alloc.ClientDescription, "it was not started")
		}
		return r
	}
	if !s.task.StartedAt.IsZero() {
		r.StartedAt = s.task.StartedAt.UTC()
	}
	if !s.task.FinishedAt.IsZero() {
		r.FinishedAt = s.task.FinishedAt.UTC()
	}
	for _, e := range s.task.Events {
		switch e.Type {
		case api.TaskTerminated:
			r.ExitCode, r.Error = e.ExitCode, e.Details["exit_message"]
			if code, err := strconv.Atoi(e.Details["exit_code"]); err == nil {
				r.ExitCode = code
			}
			r.OOMKilled = e.Details["oom_killed"] == "true"
			if m := e.Message; m != "" && r.Error == "" {
				r.Error = m
			}
			if strings.HasPrefix(r.Error, machineEnded) {
				r.ExitCode, r.Lost = exitLost, lostMachine
			}
		case api.TaskDriverFailure, api.TaskSetupFailure, api.TaskFailedValidation:
			r.ExitCode, r.Error = exitNever, or(e.Details["driver_error"], or(e.Details["setup_error"], or(e.Details["validation_error"], e.DisplayMessage)))
		}
	}
	return r
}

// machineEnded is how the driver begins to say why a pod did not end by itself.
const machineEnded = "the pod's machine ended"

// Exit codes of a container that did not end by itself.
const (
	exitLost  = 255 // as docker has it for one that nobody saw end
	exitNever = 128 // it could not be started

	exitJoined = 137 // its machine has ended: SIGKILL
)
