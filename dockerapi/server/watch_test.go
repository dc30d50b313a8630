package server

import (
	"fmt"
	"io"
	"net/http"
	"testing"
	"time"

	"github.com/hashicorp/nomad/api"

	"github.com/cradlestack/cradlestack/dockerapi/translate"
	"github.com/cradlestack/cradlestack/internal/dockerhttp"
	"github.com/cradlestack/cradlestack/internal/tunnel"
)

// A run is one allocation, whatever Nomad makes after it.
func TestRunIsOneAllocation(t *testing.T) {
	alloc := func(id string, index uint64, desired, client, task string) *api.AllocationListStub {
		a := &api.AllocationListStub{ID: id, JobID: jobPrefix + "x", CreateIndex: index, DesiredStatus: desired, ClientStatus: client}
		if task != "" {
			a.TaskStates = map[string]*api.TaskState{translate.Own: {State: task, StartedAt: time.Unix(1, 0)}}
		}
		return a
	}
	earlier := alloc("earlier", 9, api.AllocDesiredStatusRun, api.AllocClientStatusComplete, "dead")
	for name, c := range map[string]struct {
		allocs          []*api.AllocationListStub
		stopped         bool
		is              string
		phase           phase
		calledOff, anew bool
	}{
		"none":    {is: "", phase: phasePending},
		"pending": {allocs: []*api.AllocationListStub{alloc("a", 11, api.AllocDesiredStatusRun, api.AllocClientStatusPending, "")}, is: "a", phase: phasePending},
		"running": {allocs: []*api.AllocationListStub{alloc("a", 11, api.AllocDesiredStatusRun, api.AllocClientStatusRunning, "running")}, is: "a", phase: phaseRunning},
		"drained": {
			allocs: []*api.AllocationListStub{alloc("a", 11, api.AllocDesiredStatusStop, api.AllocClientStatusComplete, "dead")},
			is:     "a", phase: phaseEnded, calledOff: true,
		},
		"drained, and placed again": {
			allocs: []*api.AllocationListStub{
				alloc("a", 11, api.AllocDesiredStatusStop, api.AllocClientStatusComplete, "dead"),
				alloc("b", 12, api.AllocDesiredStatusRun, api.AllocClientStatusRunning, "running"),
			},
			is: "a", phase: phaseEnded, calledOff: true, anew: true,
		},
		"drained before it began": {
			allocs: []*api.AllocationListStub{
				alloc("a", 11, api.AllocDesiredStatusStop, api.AllocClientStatusComplete, ""),
				alloc("b", 12, api.AllocDesiredStatusRun, api.AllocClientStatusRunning, "running"),
			},
			is: "b", phase: phaseRunning,
		},
		"stopped by docker": {
			allocs: []*api.AllocationListStub{alloc("a", 11, api.AllocDesiredStatusStop, api.AllocClientStatusComplete, "dead")}, stopped: true,
			is: "a", phase: phaseEnded,
		},
	} {
		w := newWatch()
		j := &jobState{run: 2, index: 10, stopped: c.stopped, allocs: map[string]*api.AllocationListStub{}}
		w.jobs[jobPrefix+"x"] = j
		for _, a := range append(c.allocs, earlier) {
			w.take(a)
		}
		id := ""
		if j.alloc != nil {
			id = j.alloc.ID
		}
		s := w.stateOf(jobPrefix+"x", 2, anyTry)
		if id != c.is || s.phase != c.phase || w.calledOff("x", 2) != c.calledOff || j.anew() != c.anew {
			t.Errorf("%s: allocation %q, phase %d, called off %t, anew %t", name, id, s.phase, w.calledOff("x", 2), j.anew())
		}
	}
}

// A container's job that somebody has taken over is known by its name; an attendant's, which has its id as well, is none.
func TestJobsTakenOver(t *testing.T) {
	w := newWatch()
	id, attendant := jobPrefix+"x", jobPrefix+attendantPrefix+"x"
	job := func(id, name string, meta map[string]string, index uint64) {
		w.job(&api.Job{ID: &id, Name: &name, Meta: meta}, index, false)
	}
	own := map[string]string{"cradle_" + metaContainer: "x", "cradle_" + metaRun: "1"}
	job(id, "web", own, 1)
	job(attendant, attendant, map[string]string{metaAttends: "x"}, 1)
	if w.taken(id) || w.taken(attendant) || w.taken(jobPrefix+"none") {
		t.Error("docker's own are somebody else's")
	}
	job(id, id, own, 3)
	if !w.taken(id) {
		t.Error("it is docker's though it was taken over")
	}
}

// A pod that does not answer because it has ended is waited for until Nomad tells so too; one that refuses something has not ended.
func TestPodHasEnded(t *testing.T) {
	w := newWatch()
	r := &record{ID: "x", Run: 1}
	a := &api.AllocationListStub{
		ID: "a", JobID: r.jobID(), CreateIndex: 2, ClientStatus: api.AllocClientStatusRunning,
		TaskStates: map[string]*api.TaskState{translate.Own: {State: "running", StartedAt: time.Unix(1, 0)}},
	}
	w.jobs[r.jobID()] = &jobState{run: 1, index: 1, alloc: a}
	own := &tenant{watch: w}
	if own.hasEnded(t.Context(), r, dockerhttp.NewError(http.StatusConflict, "it is paused")) {
		t.Error("a refusal is taken for an end")
	}
	told := make(chan bool)
	go func() { told <- own.hasEnded(t.Context(), r, fmt.Errorf("connect: %w", tunnel.ErrNotRunning)) }()
	w.change(func() {}) // nothing of it
	w.change(func() {
		ended := *a
		ended.ClientStatus = api.AllocClientStatusComplete
		w.jobs[r.jobID()].alloc = &ended
	})
	if !<-told {
		t.Error("the end is not noticed")
	}
	if !own.hasEnded(t.Context(), &record{ID: "gone", Run: 1}, io.ErrUnexpectedEOF) {
		t.Error("a run that Nomad has forgotten goes on")
	}
}
