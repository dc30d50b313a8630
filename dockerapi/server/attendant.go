package server

import (
	"context"
	"net/http"
	"sync"
	"time"

	"github.com/hashicorp/nomad/api"

	"github.com/cradlestack/cradlestack/internal/dockerhttp"
)

// An attendant is a pod with a stopped container's disk, whose container does not run: docker cp, logs, diff, export and commit are asked of it.
// It is a job beside the container's, so that the container's own is not touched, and ends soon after the last one has asked.

// attendantHold is longer than any attendant lives: its container is never to run.
const attendantHold = 10 * 365 * 24 * time.Hour

// attendantIdle is how long an attendant stays for the next one who asks.
const attendantIdle = 5 * time.Second

// Who uses an attendant says so in the container's record, again and again. One that nobody has spoken for is of a server that was killed: any other one ends it. The
// grace is for servers whose clocks differ.
const (
	attendantLease = 30 * time.Second
	attendantGrace = 30 * time.Second
)

// metaAttends marks its job.
const metaAttends = "attends"

// attendantPrefix begins its id.
const attendantPrefix = "at-"

func attendantID(r *record) string { return jobPrefix + attendantPrefix + r.ID }

// attendants counts who uses those of this server.
type attendants struct {
	mu       sync.Mutex
	users    map[string]int
	renewing map[string]bool // whose lease this server keeps
	strays   map[string]bool // of other servers, which this one watches
}

// attend gives the docker API of a pod with the container's disk. done is called when nothing more is asked.
func (t *tenant) attend(ctx context.Context, r *record) (p *pod, done func(), err error) {
	if r, err = t.lease(ctx, r.ID); err != nil {
		return nil, nil, err
	}
	t.attendants.mu.Lock()
	if t.attendants.users == nil {
		t.attendants.users = map[string]int{}
	}
	t.attendants.users[r.ID]++
	t.attendants.mu.Unlock()
	t.keepLease(r.ID)
	done = sync.OnceFunc(func() { t.server.work.Go(func() { t.leave(r) }) })
	a, err := t.startAttendant(ctx, r)
	if err != nil {
		done()
		return nil, nil, err
	}
	return t.pod(a), done, nil
}

// lease says in a container's record that its attendant is used, for a while.
func (t *tenant) lease(ctx context.Context, id string) (*record, error) {
	return t.change(ctx, id, func(now *record) (bool, error) {
		fill := !now.keepsDisk()
		if fill && now.Run > 0 {
			return false, dockerhttp.Errorf(http.StatusConflict, "container %s is to be removed at its end (--rm): nothing of it is kept", id)
		}
		if !fill && time.Until(now.Attended) > attendantLease/2 {
			return false, nil
		}
		now.Filled, now.Attended = now.Filled || fill, time.Now().UTC().Add(attendantLease)
		return true, nil
	})
}

// keepLease says so until nobody uses it here any more.
func (t *tenant) keepLease(id string) {
	a := &t.attendants
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.renewing == nil {
		a.renewing = map[string]bool{}
	}
	if a.renewing[id] {
		return
	}
	a.renewing[id] = true
	t.server.work.Go(func() {
		ctx := t.server.ctx
		for {
			select {
			case <-time.After(attendantLease / 3):
			case <-ctx.Done():
				return
			}
			a.mu.Lock()
			used := a.users[id] > 0
			if !used {
				delete(a.renewing, id)
			}
			a.mu.Unlock()
			if !used {
				return
			}
			if _, err := t.lease(ctx, id); err != nil && !isNotFound(err) && ctx.Err() == nil {
				t.server.Log.Error("keep an attendant", "container", id, "error", err)
			}
		}
	})
}

// endStray ends another server's attendant, when nobody speaks for it any more.
func (t *tenant) endStray(id string) {
	a := &t.attendants
	a.mu.Lock()
	known := a.strays[id]
	if a.strays == nil {
		a.strays = map[string]bool{}
	}
	a.strays[id] = true
	a.mu.Unlock()
	if known {
		return
	}
	t.server.work.Go(func() {
		defer func() {
			a.mu.Lock()
			delete(a.strays, id)
			a.mu.Unlock()
		}()
		var seen time.Time // what has ended, and was not renewed since: while Nomad was away nobody could
		for {
			r, err := t.get(t.server.ctx, id)
			left := attendantGrace
			if err == nil {
				left += time.Until(r.Attended)
				if left <= 0 && !seen.Equal(r.Attended) {
					seen, left = r.Attended, attendantGrace
				}
			}
			if isNotFound(err) || err == nil && left <= 0 {
				if err = t.stopJob(t.server.ctx, jobPrefix+attendantPrefix+id); err == nil {
					return
				}
				left = attendantGrace
			}
			if err != nil && t.server.ctx.Err() == nil {
				t.server.Log.Error("end an attendant that nobody uses", "container", id, "error", err)
			}
			select {
			case <-time.After(left):
			case <-t.server.ctx.Done():
				return
			}
			t.watch.mu.Lock()
			gone := t.watch.jobs[jobPrefix+attendantPrefix+id].over()
			t.watch.mu.Unlock()
			if gone || a.wanted(id) {
				return
			}
		}
	})
}

func (t *tenant) startAttendant(ctx context.Context, r *record) (*api.AllocationListStub, error) {
	if r.Want == wantRemoved || r.stillInherits() != nil { // its volumes are handed over, by its pod and another one that may have the same disks
		bare := *r
		bare.Pod = withoutDisks(r.Pod)
		r = &bare
	}
	job, err := t.server.jobOf(r, t.Namespace, true)
	if err != nil {
		return nil, err
	}
	id := attendantID(r)
	task := job.TaskGroups[0].Tasks[0]
	job.ID, job.Name = &id, &id
	job.Meta = map[string]string{metaAttends: r.ID}
	job.TaskGroups[0].Networks = nil // its ports may be somebody else's by now
	job.TaskGroups[0].Services = nil
	task.Templates = nil
	delete(task.Config, "env_file")
	delete(task.Config, "names_file")
	delete(task.Config, "ports")
	delete(task.Config, "host_ips")
	task.Config["lifecycle"] = map[string]any{"hold": attendantHold.String()}
	// A pod tells of its container's end before it is gone itself, and it has the disk as long. So has an attendant that is being ended, maybe by another server.
	attempts, interval := 10, time.Minute
	job.TaskGroups[0].RestartPolicy.Attempts, job.TaskGroups[0].RestartPolicy.Interval = &attempts, &interval
	if err := t.awaitOver(ctx, r.jobID()); err != nil {
		return nil, err
	}
	if err := t.awaitEnding(ctx, id); err != nil {
		return nil, err
	}
	if err := t.awaitVolumes(ctx, r, id); err != nil {
		return nil, err
	}
	if _, _, err := t.nomad.Jobs().Register(job, t.write(ctx)); err != nil {
		return nil, err
	}
	var found *api.AllocationListStub
	seen := false
	err = t.watch.until(ctx, func() (bool, error) {
		t.watch.mu.Lock()
		defer t.watch.mu.Unlock()
		j := t.watch.jobs[id]
		if j == nil && seen { // another server has removed it
			return false, dockerhttp.Errorf(http.StatusServiceUnavailable, "what looks at the disk of container %s has ended: try again", r.ID)
		}
		if j == nil {
			return false, nil
		}
		seen = true
		if e := j.eval; e != nil && len(e.FailedTGAllocs) > 0 && j.alloc == nil {
			return false, dockerhttp.Errorf(http.StatusServiceUnavailable, "the container's disk can't be looked at at the moment: %s", whyNoPlace(e))
		}
		for _, a := range j.allocs {
			switch {
			case a.DesiredStatus != api.AllocDesiredStatusRun:
			case a.ClientStatus == api.AllocClientStatusRunning, isEarly(a):
				found = a
				return true, nil
			case a.ClientStatus == api.AllocClientStatusFailed, a.ClientStatus == api.AllocClientStatusLost:
				end := endOf(0, podState{alloc: a, task: a.TaskStates[task.Name]})
				return false, dockerhttp.Errorf(http.StatusInternalServerError, "the container's disk can't be looked at: %s", or(end.Error, a.ClientStatus))
			}
		}
		return false, nil
	})
	if err == nil && r.Node == "" {
		_, err = t.change(ctx, r.ID, func(now *record) (bool, error) {
			if now.Node != "" {
				return false, nil
			}
			now.Node = found.NodeID
			return true, nil
		})
	}
	return found, err
}

// leave ends an attendant that nobody has used for a while.
func (t *tenant) leave(r *record) {
	select {
	case <-time.After(attendantIdle):
	case <-t.server.ctx.Done():
	}
	t.attendants.mu.Lock()
	t.attendants.users[r.ID]--
	last := t.attendants.users[r.ID] == 0
	if last {
		delete(t.attendants.users, r.ID)
	}
	t.attendants.mu.Unlock()
	if !last {
		return
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(t.server.ctx), podTimeout)
	defer cancel()
	if err := t.stopJob(ctx, attendantID(r)); err != nil {
		t.server.Log.Error("end an attendant", "container", r.ID, "error", err)
	}
}

// endAttendant ends it before the container needs its disk, and waits until it is gone.
func (t *tenant) endAttendant(ctx context.Context, r *record) error {
	id := attendantID(r)
	t.watch.mu.Lock()
	gone := t.watch.jobs[id].over()
	t.watch.mu.Unlock()
	if gone {
		return nil
	}
	if err := t.stopJob(ctx, id); err != nil {
		return err
	}
	return t.awaitOver(ctx, id)
}

// awaitOver waits until nothing of a job runs any more.
func (t *tenant) awaitOver(ctx context.Context, id string) error {
	return t.watch.until(ctx, func() (bool, error) {
		t.watch.mu.Lock()
		defer t.watch.mu.Unlock()
		return t.watch.jobs[id].over(), nil
	})
}

// awaitEnding waits for what still runs of a job that is stopped.
func (t *tenant) awaitEnding(ctx context.Context, id string) error {
	return t.watch.until(ctx, func() (bool, error) {
		t.watch.mu.Lock()
		defer t.watch.mu.Unlock()
		j := t.watch.jobs[id]
		return j == nil || !j.stopped || j.over(), nil
	})
}

// wanted says whether somebody uses a container's attendant, or waits for it, in this server.
func (a *attendants) wanted(container string) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.users[container] > 0
}

// over says whether nothing of a job runs any more.
func (j *jobState) over() bool {
	if j == nil {
		return true
	}
	for _, a := range j.allocs {
		if !isOver(a) {
			return false
		}
	}
	return j.stopped || len(j.allocs) > 0
}

// stopJob ends a job; Nomad keeps it, as the allocations of one that is purged vanish without a word.
func (t *tenant) stopJob(ctx context.Context, id string) error {
	_, _, err := t.nomad.Jobs().Deregister(id, false, t.write(ctx))
	if isGone(err) {
		return nil
	}
	return err
}

func isOver(a *api.AllocationListStub) bool {
	switch a.ClientStatus {
	case api.AllocClientStatusComplete, api.AllocClientStatusFailed, api.AllocClientStatusLost:
		return true
	case api.AllocClientStatusUnknown:
		return a.DesiredStatus != api.AllocDesiredStatusRun // its node ends it as soon as it is back
	}
	return false
}
