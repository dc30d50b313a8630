package server

import (
	"cmp"
	"context"
	"errors"
	"net/http"
	"net/url"
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
		return t.get(ctx, x.Joins)
	}
	return x, nil
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

// join sees to it that a container is in the pod of the one that it joins, and says how far it is there. What is there already stays as it is.
func (t *tenant) join(ctx context.Context, r *record, x *record, p *pod) (state string, err error) {
	if most := cmp.Or(x.Pod.Resources.Memory, spec.DefaultMemory); r.Pod.Containers[0].Resources.Memory > most {
		return "", dockerhttp.Errorf(http.StatusConflict, "the machine of container /%s has %v of memory for all that are in it: --memory of one that joins can't be more", x.Name, most)
	}
	j := &spec.Join{ID: r.ID, Container: r.Pod.Containers[0], Volumes: r.Pod.Volumes, Run: r.Run}
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
	if err != nil {
		return errors.Join(err, t.abandon(context.WithoutCancel(ctx), r, err))
	}
	placed()
	return t.release(ctx, r, t.watch.state(r), wait)
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
