package server

import (
	"cmp"
	"context"
	"errors"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/moby/moby/api/types/container"

	"github.com/cradlestack/cradlestack/dockerapi/registry"
	"github.com/cradlestack/cradlestack/internal/dockerhttp"
	"github.com/cradlestack/cradlestack/spec"
)

// A container with --network container:X has no job of its own: it joins the machine that X runs in, and its record names X and the run of X's that it is in. What Nomad tells of
// it is what it tells of X. Its own end only the pod tells: whoever knows of its run listens for that.

// joinTokenTime is how long the node may pull the image of a container that joins.
const joinTokenTime = 15 * time.Minute

// joinTarget finds the container whose machine a new one is to join, and notes it in the request by its id. It is that container's host where it has one itself.
func (t *tenant) joinTarget(ctx context.Context, h *container.HostConfig) (*record, error) {
	if h == nil || !h.NetworkMode.IsContainer() {
		return nil, nil //nolint:nilnil // it joins none
	}
	ref := h.NetworkMode.ConnectedContainer()
	if ref == "" {
		return nil, dockerhttp.Invalid("invalid container format container:<name|id>")
	}
	x, err := t.find(ctx, ref)
	if isNotFound(err) {
		return nil, dockerhttp.Invalid("%v", err) // a client would take 404 for a missing image
	}
	if err != nil {
		return nil, err
	}
	h.NetworkMode = container.NetworkMode("container:" + x.ID)
	if x.Joins != "" {
		if x, err = t.get(ctx, x.Joins); err != nil {
			return nil, err
		}
	}
	return x, t.namespacesIn(ctx, h, x)
}

// namespacesIn finds the containers whose processes, and whose shared memory, a new one shares in the machine that it joins, and notes them by their ids.
func (t *tenant) namespacesIn(ctx context.Context, h *container.HostConfig, x *record) error {
	of := func(kind, ref string) (*record, error) {
		y, err := t.find(ctx, ref)
		switch {
		case isNotFound(err):
			return nil, dockerhttp.Invalid("failed to join %s namespace: %v", kind, err)
		case err != nil:
			return nil, err
		case or(y.Joins, y.ID) != x.ID:
			return nil, dockerhttp.Invalid("failed to join %s namespace: container /%s is not in the machine of container /%s, whose network is to be shared", kind, y.Name, x.Name)
		}
		return y, nil
	}
	if h.PidMode.IsContainer() && h.PidMode.Valid() {
		y, err := of("PID", h.PidMode.Container())
		if err != nil {
			return err
		}
		h.PidMode = container.PidMode("container:" + y.ID)
	}
	if h.IpcMode.IsContainer() && h.IpcMode.Valid() {
		y, err := of("IPC", h.IpcMode.Container())
		if err != nil {
			return err
		}
		if !y.Host.IpcMode.IsShareable() {
			return dockerhttp.Invalid("failed to join IPC namespace: container %s: non-shareable IPC (hint: use IpcMode:shareable for the donor container)", y.ID)
		}
		h.IpcMode = container.IpcMode("container:" + y.ID)
	}
	return nil
}

// sharedVolumes are the volumes of a container that joins which are not on the disk, by their names in its pod: each with the path at which the one that it joins has it. A
// machine has the volumes that it was started with.
func sharedVolumes(x *record, p *spec.Pod) (map[string]string, error) {
	var shared map[string]string
	for _, v := range p.Volumes {
		if v.Scratch != nil {
			continue
		}
		what := v.Name
		if v.Directory != nil {
			what = v.Directory.Path
		}
		writes := slices.ContainsFunc(p.Containers[0].Mounts, func(m spec.Mount) bool { return m.Volume == v.Name && !m.ReadOnly })
		at, readOnly := "", false
		for _, m := range x.Pod.Containers[0].Mounts {
			same := slices.ContainsFunc(x.Pod.Volumes, func(o spec.Volume) bool {
				return o.Name == m.Volume && (v.Class != "" && o.Class != "" && o.Name == v.Name || v.Directory != nil && o.Directory != nil && o.Directory.Path == v.Directory.Path)
			})
			if same && (at == "" || !m.ReadOnly) {
				at, readOnly = m.Path, m.ReadOnly
			}
		}
		switch {
		case at == "":
			return nil, dockerhttp.Invalid("-v %s with --network container: is not possible: the machine of container /%s has the volumes that it was started with, and %[1]s is none of them: mount it there as well", what, x.Name)
		case readOnly && writes:
			return nil, dockerhttp.Invalid("-v %s with --network container: is not possible: container /%s has it mounted read-only in the machine that both are in: add :ro", what, x.Name)
		}
		if shared == nil {
			shared = map[string]string{}
		}
		shared[v.Name] = at
	}
	return shared, nil
}

// joinsInto is the container that is joined, and has to run for that.
func (t *tenant) joinsInto(ctx context.Context, r *record) (*record, *pod, error) {
	x, err := t.get(ctx, r.Joins)
	if isNotFound(err) {
		return nil, nil, dockerhttp.Errorf(http.StatusConflict, "cannot join network of a non running container: %s was removed: remove this container and create it anew", r.Joins)
	}
	if err != nil {
		return nil, nil, err
	}
	p, err := t.running(x)
	if errors.Is(err, errAway) {
		return nil, nil, err
	}
	if err != nil {
		return nil, nil, dockerhttp.Errorf(http.StatusConflict, "cannot join network namespace of a non running container: container /%s is %s", x.Name, t.statusOf(x).Status)
	}
	own := *p
	own.container = r.ID
	return x, &own, nil
}

// endsWithin says whether the container that another one has joined has ended, which Nomad may hear of later, and the other one's end is noted later still.
func (t *tenant) endsWithin(ctx context.Context, r *record) bool {
	if r.Joins == "" {
		return false
	}
	x, err := t.get(ctx, r.Joins)
	return err == nil && x.Run == r.Within && x.ended()
}

// fits refuses more memory for one that joins than there is in the other one's machine.
func fits(x *record, p *spec.Pod) error {
	if most := cmp.Or(x.Pod.Resources.Memory, spec.DefaultMemory); p.Containers[0].Resources.Memory > most {
		return dockerhttp.Errorf(http.StatusConflict, "the machine of container /%s has %v of memory for all that are in it: --memory of one that joins can't be more", x.Name, most)
	}
	return nil
}

// join sees to it that a container is in the pod of the one that it joins, and says how far it is there. What is there already stays as it is.
func (t *tenant) join(ctx context.Context, r *record, x *record, p *pod) (state string, err error) {
	if err := fits(x, r.Pod); err != nil {
		return "", err
	}
	shared, err := sharedVolumes(x, r.Pod)
	if err != nil {
		return "", err
	}
	j := &spec.Join{ID: r.ID, Container: r.Pod.Containers[0], Shared: shared, PID: r.Host.PidMode.Container(), IPC: r.Host.IpcMode.Container(), Run: r.Run}
	for _, v := range r.Pod.Volumes {
		if v.Scratch != nil {
			j.Volumes = append(j.Volumes, v)
		}
	}
	j.Container.Name, j.Container.Image = r.ID, t.server.nodeReference(r.Image)
	if repository, ok := strings.CutPrefix(r.Image.Audience, registry.Service+"/"); ok && t.server.Registry != nil {
		token, err := t.server.Registry.Token(registry.Grant{Namespace: t.Namespace, Repositories: []string{repository}}, joinTokenTime)
		if err != nil {
			return "", err
		}
		j.Auth = &spec.JoinAuth{Username: t.Namespace, Password: token}
	}
	var s struct{ State string }
	ctx, cancel := context.WithTimeout(ctx, spec.JoinTimeout)
	defer cancel()
	err = p.call(ctx, http.MethodPost, spec.JoinPath, nil, j, &s)
	return s.State, err
}

// carryIn begins a run of a container that joins.
func (t *tenant) carryIn(ctx context.Context, r *record, wait []*attachment) error {
	placed := t.place(r.ID)
	defer placed()
	x, p, err := t.joinsInto(ctx, r)
	if err == nil && x.Run != r.Within {
		err = dockerhttp.Errorf(http.StatusConflict, "container /%s was started again meanwhile: try again", x.Name)
	}
	if err == nil {
		_, err = t.join(ctx, r, x, p)
	}
	var said dockerhttp.Error
	if errors.As(err, &said) && said.Status == http.StatusInternalServerError {
		err = startError(said.Message)
	}
	if err != nil && r.Again > 0 && t.machineEnds(ctx, r) { // its policy starts it when the other one runs the next time
		return t.noteEnd(context.WithoutCancel(ctx), r.ID, endOf(r.Run, t.watch.state(r)))
	}
	if err != nil {
		return errors.Join(err, t.abandon(context.WithoutCancel(ctx), r, err))
	}
	placed()
	return t.release(ctx, r, t.watch.state(r), wait)
}

// hasNext says whether the container that another one has joined runs again, after the run that the other one was in.
func (t *tenant) hasNext(r *record) bool {
	t.watch.mu.Lock()
	defer t.watch.mu.Unlock()
	j := t.watch.jobs[jobPrefix+r.Joins]
	return j != nil && j.run > r.Within && t.watch.stateOf(jobPrefix+r.Joins, j.run, anyTry).phase == phaseRunning
}

// rejoin starts those that have joined a container in an earlier run of its, have ended with that, and are started again by their policies.
func (t *tenant) rejoin(x *record) {
	t.server.work.Go(func() {
		ctx := t.server.ctx
		all, err := t.list(ctx)
		if err != nil {
			if ctx.Err() == nil {
				t.server.Log.Error("start what has joined a container that runs again", "container", x.ID, "error", err)
			}
			return
		}
		for _, r := range all {
			if r.Joins == x.ID && r.Want == wantRunning && r.ended() {
				t.startAgain(r)
			}
		}
	})
}

// machineEndWait is how long the end of a container that has joined waits for that of its machine, which it may be told before.
const machineEndWait = 10 * time.Second

// endedWith says whether a container that has joined has ended because its machine does. Its policy would have had it started again inside else.
func (t *tenant) endedWith(ctx context.Context, r *record, last *run) bool {
	r, err := t.get(ctx, r.ID)
	if err != nil || r.Want != wantRunning {
		return false
	}
	p := &r.Host.RestartPolicy
	if !p.IsAlways() && !p.IsUnlessStopped() && (!p.IsOnFailure() || last.ExitCode == 0 || p.MaximumRetryCount > 0 && last.Restarts >= p.MaximumRetryCount) {
		return false
	}
	return t.machineEnds(ctx, r)
}

// machineEnds says whether the machine that a container has joined ends, or has ended, which Nomad may tell later.
func (t *tenant) machineEnds(ctx context.Context, r *record) bool {
	ctx, cancel := context.WithTimeout(ctx, machineEndWait)
	defer cancel()
	return t.watch.until(ctx, func() (bool, error) { return t.watch.state(r).phase == phaseEnded, nil }) == nil
}

// goOnInside goes on with a container that has joined, whoever has begun that, and listens for its end.
func (t *tenant) goOnInside(ctx context.Context, r *record) error {
	x, p, err := t.joinsInto(ctx, r)
	if err != nil || x.Run != r.Within {
		t.followEnd(ctx, r) // it has ended with its pod
		return nil          //nolint:nilerr // or its node is away, which is waited for
	}
	state, err := t.join(ctx, r, x, p)
	if err != nil {
		return err
	}
	t.followEnd(ctx, r)
	if state != string(container.StateCreated) {
		return nil
	}
	err = p.call(ctx, http.MethodPost, p.inside("/start"), nil, nil, nil)
	var said dockerhttp.Error
	if errors.As(err, &said) {
		return nil // it runs already, or its end says why it does not
	}
	return err
}

// recoverInside is goOnInside until it is done, or nothing of the run is left to be done: the pod, or the registry that it asks, may not answer yet.
func (t *tenant) recoverInside(ctx context.Context, r *record) {
	for pause := leastPause; ; pause = min(2*pause, mostPause) {
		err := t.goOnInside(ctx, r)
		if err == nil || ctx.Err() != nil {
			return
		}
		t.server.Log.Error("go on with a container that has joined another", "container", r.ID, "error", err)
		if !sleepFor(ctx, pause) {
			return
		}
		if now, err := t.get(ctx, r.ID); isNotFound(err) || err == nil && (now.Run != r.Run || now.ended() || now.Want == wantRemoved) {
			return
		}
	}
}

// removeAgain goes on with the removal of a container whose pod does not answer for the moment.
func (t *tenant) removeAgain(id string) {
	t.sessions.mu.Lock()
	known := t.removing[id]
	if t.removing == nil {
		t.removing = map[string]bool{}
	}
	t.removing[id] = true
	t.sessions.mu.Unlock()
	if known {
		return
	}
	t.server.work.Go(func() {
		defer func() {
			t.sessions.mu.Lock()
			delete(t.removing, id)
			t.sessions.mu.Unlock()
		}()
		life := t.server.ctx
		for pause := leastPause; sleepFor(life, pause); pause = min(2*pause, mostPause) {
			err := t.goOn(life, id, anyRun)
			if err == nil || isNotFound(err) || life.Err() != nil {
				return
			}
			t.server.Log.Debug("remove a container that has joined another", "container", id, "error", err)
		}
	})
}

// sleepFor returns false where ctx has ended meanwhile.
func sleepFor(ctx context.Context, d time.Duration) bool {
	select {
	case <-time.After(d):
		return true
	case <-ctx.Done():
		return false
	}
}

// Pauses between questions to a pod that does not answer, or whose plugin is just started anew.
const (
	leastPause = 200 * time.Millisecond
	mostPause  = 5 * time.Second
)

// followEnd listens for the end of a run of a container that has joined, until it is noted. It returns when that can't be missed, the pod does not answer for the moment, or
// ctx has ended.
func (t *tenant) followEnd(ctx context.Context, r *record) {
	e := t.expectEnd(r)
	if e == nil {
		return
	}
	listens := make(chan struct{})
	t.server.work.Go(func() {
		defer t.endNoted(r.ID, e)
		first := onceClosed(listens)
		defer first()
		life := t.server.ctx
		for pause := leastPause; life.Err() == nil; pause = min(2*pause, mostPause) {
			last, err := t.askEnd(life, r, first)
			first()
			if err == nil && last.Lost == "" && t.endedWith(life, r, last) {
				last.Lost = lostMachine
			}
			if err == nil {
				err = t.noteEnd(life, r.ID, *last)
			}
			if err == nil || life.Err() != nil {
				return
			}
			if now, err := t.get(life, r.ID); isNotFound(err) || err == nil && (now.Run != r.Run || now.ended()) {
				return
			}
			t.server.Log.Debug("listen for a container's end", "container", r.ID, "error", err)
			select {
			case <-time.After(pause):
			case <-life.Done():
			}
		}
	})
	select {
	case <-listens:
	case <-ctx.Done():
	}
}

func onceClosed(c chan struct{}) func() {
	closed := false
	return func() {
		if !closed {
			closed = true
			close(c)
		}
	}
}

// askEnd asks the pod to tell when the run ends, or says itself how it has ended with the pod.
func (t *tenant) askEnd(ctx context.Context, r *record, listens func()) (*run, error) {
	s := t.watch.state(r)
	if s.phase != phaseRunning {
		if s.phase == phaseAway {
			return nil, errAway
		}
		last := endOf(r.Run, s)
		return &last, nil
	}
	p := t.podWith(r, s.alloc)
	answer, err := p.stream(ctx, http.MethodPost, p.inside("/wait"), url.Values{"condition": {string(container.WaitConditionRemoved)}})
	if err != nil {
		return nil, err
	}
	defer answer.Close()
	listens()
	begun := time.Now().UTC()
	var end dockerhttp.Waited
	if err := decodeOne(answer, &end); err != nil {
		return nil, err
	}
	last := &run{Number: r.Run, StartedAt: begun, FinishedAt: time.Now().UTC(), ExitCode: int(end.StatusCode)}
	if end.Error != nil {
		last.Error = end.Error.Message
	}
	if end.State != nil {
		last.take(end.State, end.RestartCount)
	}
	return last, nil
}

// insideDisk is the pod that a container which has joined has its files in.
func (t *tenant) insideDisk(ctx context.Context, r *record) (*pod, func(), error) {
	x, p, err := t.joinsInto(ctx, r)
	if err != nil {
		return nil, nil, dockerhttp.Errorf(http.StatusConflict, "the files of container %s are on the disk of the one that it has joined, which has to run: %v", r.ID, err)
	}
	if _, err := t.join(ctx, r, x, p); err != nil {
		return nil, nil, err
	}
	return p, func() {}, nil
}

// leavePod removes a container from the pod that it has joined. A pod that has ended has nothing of it but files on its disk.
func (t *tenant) leavePod(ctx context.Context, r *record) error {
	_, p, err := t.joinsInto(ctx, r)
	if err != nil {
		return nil //nolint:nilerr // it does not run
	}
	err = p.call(ctx, http.MethodPost, spec.LeavePath, url.Values{"container": {r.ID}}, nil, nil)
	if _, _, gone := t.joinsInto(ctx, r); gone != nil {
		return nil //nolint:nilerr // and so has this one
	}
	return err
}

// refuseJoined refuses what the one that a container has joined decides.
func refuseJoined(r *record) error {
	if r.Joins == "" {
		return nil
	}
	return dockerhttp.Errorf(http.StatusForbidden, "container sharing network namespace with another container or host cannot be connected to any other network")
}
