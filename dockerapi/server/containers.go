package server

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"maps"
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/events"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/cradlestack/cradlestack/dockerapi/translate"
	"github.com/cradlestack/cradlestack/internal/dockerhttp"
	"github.com/cradlestack/cradlestack/internal/tunnel"
)

func (s *Server) containerRoutes(on *router) {
	s.uses = append(s.uses, s.containersOfImages)
	one := func(pattern string, h func(http.ResponseWriter, *http.Request, *tenant, *record) error) {
		on.on(pattern, naming((*tenant).findAny, func(w http.ResponseWriter, r *http.Request, t *tenant, c named) error {
			if c.other != nil {
				return t.serveOther(w, r, c.other, pattern)
			}
			return outside(h(w, r, t, c.record), c.record)
		}))
	}
	on.on("POST /containers/create", s.createContainer)
	on.on("GET /containers/json", s.listContainers)
	on.on("POST /containers/prune", s.pruneContainers)
	one("GET /containers/{id}/json", s.inspectContainer)
	one("POST /containers/{id}/start", s.startContainer)
	one("POST /containers/{id}/stop", s.stopContainer)
	one("POST /containers/{id}/restart", s.restartContainer)
	one("POST /containers/{id}/kill", s.killContainer)
	one("POST /containers/{id}/wait", s.waitContainer)
	one("POST /containers/{id}/rename", s.renameContainer)
	one("DELETE /containers/{id}", s.removeContainer)
	one("POST /containers/{id}/attach", s.attachContainer)
	one("GET /containers/{id}/logs", s.containerLogs)
	for _, r := range []struct {
		pattern, rest string
	}{
		{"POST /containers/{id}/pause", "/pause"},
		{"POST /containers/{id}/unpause", "/unpause"},
		{"POST /containers/{id}/resize", "/resize"},
		{"GET /containers/{id}/top", "/top"},
	} {
		one(r.pattern, func(w http.ResponseWriter, req *http.Request, t *tenant, c *record) error {
			p, err := t.running(c)
			if err != nil {
				return err
			}
			return p.pass(w, req, p.inside(r.rest))
		})
	}
	one("POST /containers/{id}/exec", s.createExec)
	one("GET /containers/{id}/stats", s.containerStats)
	one("POST /containers/{id}/update", s.updateContainer)
	for _, r := range []struct {
		pattern, rest string
		action        events.Action // that is told of; "" for none
	}{
		{"HEAD /containers/{id}/archive", "/archive", ""},
		{"GET /containers/{id}/archive", "/archive", events.ActionArchivePath},
		{"PUT /containers/{id}/archive", "/archive", events.ActionExtractToDir},
		{"GET /containers/{id}/changes", "/changes", ""},
		{"GET /containers/{id}/export", "/export", events.ActionExport},
	} {
		one(r.pattern, func(w http.ResponseWriter, req *http.Request, t *tenant, c *record) error {
			if err := t.passDisk(w, req, c, r.rest); err != nil {
				return err
			}
			if r.action != "" {
				t.emitContainer(c, r.action, nil)
			}
			return nil
		})
	}
	s.execRoutes(on)
}

// podsName is what pods say of their container.
var podsName = regexp.MustCompile(`container ` + translate.Own + `(,| |$)`)

// outside gives an error that a pod tells of the id that the container has outside of it. That the pod of one that ran has ended is told as dockerd does.
func outside(err error, c *record) error {
	if errors.Is(err, tunnel.ErrNotRunning) && c.Want == wantRunning {
		return dockerhttp.Errorf(http.StatusConflict, "container %s is not running", c.ID)
	}
	var e dockerhttp.Error
	if !errors.As(err, &e) {
		return err
	}
	e.Message = podsName.ReplaceAllString(e.Message, "container "+c.ID+"$1")
	return e
}

// isRunning says whether a container's pod is there, as far as the record and Nomad tell.
func (t *tenant) isRunning(r *record) bool {
	return r.Run > 0 && !r.ended() && t.watch.state(r).phase == phaseRunning
}

// isAway says whether a container runs on a node that does not answer.
func (t *tenant) isAway(r *record) bool {
	return r.Run > 0 && !r.ended() && t.watch.state(r).phase == phaseAway
}

// running is the pod of a container that runs.
func (t *tenant) running(r *record) (*pod, error) {
	switch {
	case t.isRunning(r):
	case t.isAway(r):
		return nil, errAway
	case r.restarting():
		return nil, dockerhttp.Errorf(http.StatusConflict, "container %s is restarting, wait until the container is running", r.ID)
	default:
		return nil, dockerhttp.Errorf(http.StatusConflict, "container %s is not running", r.ID)
	}
	return t.podWith(r, t.watch.state(r).alloc), nil
}

// disk is a pod that has a container's file system: its own, or one that attends to it.
func (t *tenant) disk(ctx context.Context, r *record) (*pod, func(), error) {
	if p, err := t.running(r); err == nil || t.isAway(r) || r.restarting() {
		return p, func() {}, err
	}
	if r.Joins != "" {
		return t.insideDisk(ctx, r)
	}
	if !r.ended() && r.Run > 0 && t.watch.state(r).phase == phasePending {
		if s, err := t.started(ctx, r); err != nil {
			return nil, nil, err
		} else if s.phase == phaseRunning {
			return t.pod(s.alloc), func() {}, nil
		}
	}
	return t.attend(ctx, r)
}

// passDisk gives a request to a pod that has the container's file system. A pod that ends, or has just ended, is not asked in vain: the next one has its disk.
func (t *tenant) passDisk(w http.ResponseWriter, req *http.Request, c *record, rest string) error {
	for again := false; ; again = true {
		p, done, err := t.disk(req.Context(), c)
		if err != nil {
			return err
		}
		err = p.pass(w, req, p.inside(rest))
		done()
		if again || !unanswered(err, req) {
			return err
		}
		ctx, cancel := context.WithTimeout(req.Context(), podTimeout)
		ended := t.untilEnded(ctx, c)
		cancel()
		if ended != nil { // its pod goes on
			return err
		}
		if c, err = t.get(req.Context(), c.ID); err != nil {
			return err
		}
	}
}

// unanswered says whether a pod has not answered a request that can be made again.
func unanswered(err error, req *http.Request) bool {
	var refused dockerhttp.Error
	if err == nil || errors.As(err, &refused) {
		return false
	}
	return errors.Is(err, tunnel.ErrNotRunning) || req.Method == http.MethodGet || req.Method == http.MethodHead
}

func (s *Server) createContainer(w http.ResponseWriter, r *http.Request, t *tenant) error {
	var request container.CreateRequest
	if err := dockerhttp.Decode(w, r, &request); err != nil {
		return err
	}
	given := dockerhttp.Parameter(r, "name")
	name, err := translate.Name(or(given, randomName()))
	if err != nil {
		return err
	}
	if p := dockerhttp.Parameter(r, "platform"); p != "" {
		if err := checkPlatform(p); err != nil {
			return err
		}
	}
	if request.Config == nil {
		return dockerhttp.Invalid("config cannot be empty in order to create a container")
	}
	if n := request.NetworkingConfig; n != nil && len(n.EndpointsConfig) > 1 && versions.Version(r) < 44 {
		return dockerhttp.Invalid("Container cannot be created with multiple network endpoints")
	}
	ctx := r.Context()
	image, err := s.imageOf(ctx, t, request.Config.Image)
	if err != nil {
		return err
	}
	if image.Platform != "" && dockerhttp.Parameter(r, "platform") != "" {
		return dockerhttp.Errorf(http.StatusNotFound, "image with reference %s was found but does not match the specified platform: wanted %s, actual: %s",
			request.Config.Image, translate.Platform, image.Platform)
	}
	joins, err := t.joinTarget(ctx, request.HostConfig)
	if err != nil {
		return err
	}
	id := newID()
	rules := translate.Rules{HostPaths: s.HostPaths}
	if request.HostConfig != nil {
		if rules.Inherited, err = t.inherited(ctx, request.HostConfig.VolumesFrom); err != nil {
			return err
		}
	}
	if err := t.findLinked(ctx, request.HostConfig); err != nil {
		return err
	}
	c, err := translate.Create(&request, id, image, rules)
	if err != nil {
		return err
	}
	if err := t.resolve(ctx, c); err != nil {
		return err
	}
	links, err := t.links(ctx, c)
	if err != nil {
		return err
	}
	rec := &record{
		Version: recordVersion, ID: id, Name: name, Created: time.Now().UTC(), Image: imageRef{image.Reference, image.Audience, image.ID}, Config: c.Config, Host: c.Host,
		Networks: c.Networks, Links: links, Pod: c.Pod, Zone: c.Zone, Ranges: c.Ranges, Want: wantCreated,
	}
	rec.Bridged = rec.onNetworks()
	if joins != nil {
		rec.Joins, rec.Config.Hostname, rec.Config.Domainname = joins.ID, joins.Config.Hostname, joins.Config.Domainname
	}
	if err := t.inherit(ctx, c, rec); err != nil {
		return err
	}
	if joins != nil {
		if _, err := sharedVolumes(joins, c.Pod); err != nil {
			return err
		}
	} else if _, err := s.jobOf(rec, t.Namespace, false); err != nil { // what it can't say is said now
		return dockerhttp.Invalid("%v", err)
	}
	err = t.takeName(ctx, rec.Name, id)
	for given == "" && isTaken(err) {
		rec.Name = randomName()
		err = t.takeName(ctx, rec.Name, id)
	}
	if err != nil {
		return err
	}
	if err := t.useVolumes(ctx, c); err != nil {
		return errors.Join(err, t.freeName(context.WithoutCancel(ctx), rec.Name, id))
	}
	for _, v := range c.Volumes {
		rec.Volumes = append(rec.Volumes, v.Name)
	}
	// Both are there before the client knows of the container.
	var both errgroup.Group
	if joins == nil { // the pod of the other one is told
		both.Go(func() error { return t.putVariables(ctx, rec) })
	}
	both.Go(func() error { return t.put(ctx, rec) })
	err = both.Wait()
	if err == nil {
		err = t.checkHolders(ctx, rec)
	}
	if err != nil {
		return errors.Join(err, t.takeBack(context.WithoutCancel(ctx), rec))
	}
	t.emitContainer(rec, events.ActionCreate, nil)
	return dockerhttp.Answer(w, http.StatusCreated, container.CreateResponse{ID: id, Warnings: append([]string{}, c.Warnings...)})
}

// findLinked finds the containers that --link names: what there is not is said before that links are refused.
func (t *tenant) findLinked(ctx context.Context, h *container.HostConfig) error {
	if h == nil {
		return nil
	}
	for _, link := range h.Links {
		name, _, _ := strings.Cut(link, ":")
		if _, err := t.find(ctx, name); isNotFound(err) {
			return dockerhttp.Invalid("could not get container for %s: %v", name, err)
		} else if err != nil {
			return err
		}
	}
	return nil
}

// links are a new container's names for others, which have to be on one of its networks: by the names that those have of their ids, which stay.
func (t *tenant) links(ctx context.Context, c *translate.Container) (map[string][]string, error) {
	given, err := c.Links()
	if err != nil || len(given) == 0 {
		return nil, err
	}
	out := map[string][]string{}
	for _, name := range slices.Sorted(maps.Keys(given)) {
		to, err := t.find(ctx, name)
		if isNotFound(err) {
			return nil, dockerhttp.Invalid("could not get container for %s: %v", name, err)
		}
		if err != nil {
			return nil, err
		}
		shared := slices.ContainsFunc(slices.Collect(maps.Keys(c.Networks)), func(network string) bool { return translate.IsOwn(network) && to.Networks[network] != nil })
		if !shared {
			return nil, dockerhttp.Invalid("cannot link to %s: it is on none of the container's networks: connect it to one (docker network connect)", name)
		}
		out[to.ID[:12]] = append(out[to.ID[:12]], given[name]...)
	}
	return out, nil
}

func (s *Server) startContainer(w http.ResponseWriter, r *http.Request, t *tenant, c *record) error {
	// A client that goes away does not leave it half started.
	if err := t.start(context.WithoutCancel(r.Context()), c.ID); err != nil {
		return err
	}
	w.WriteHeader(http.StatusNoContent)
	return nil
}

// grace checks the time between a stop signal and SIGKILL, in seconds.
func grace(r *http.Request) error {
	if t := dockerhttp.Parameter(r, "t"); t != "" {
		if _, err := strconv.Atoi(t); err != nil {
			return dockerhttp.Invalid("strconv.Atoi: parsing %q: invalid syntax", t)
		}
	}
	return nil
}

func (s *Server) stopContainer(w http.ResponseWriter, r *http.Request, t *tenant, c *record) error {
	if err := grace(r); err != nil {
		return err
	}
	if err := t.stop(context.WithoutCancel(r.Context()), c, r.URL.Query()); err != nil {
		return err
	}
	w.WriteHeader(http.StatusNoContent)
	return nil
}

// ending completes what is asked of a pod with the signal and the time that the container was made with: its job says them to Nomad alone.
func (r *record) ending(q url.Values) url.Values {
	all := url.Values{}
	maps.Copy(all, q)
	if all.Get("signal") == "" && r.Config.StopSignal != "" {
		all.Set("signal", r.Config.StopSignal)
	}
	if t := r.Config.StopTimeout; all.Get("t") == "" && t != nil {
		all.Set("t", strconv.Itoa(*t))
	}
	return all
}

// stop ends a container with its stop signal, and the rule to start it again with it.
func (t *tenant) stop(ctx context.Context, c *record, q url.Values) error {
	if c.restarting() && !t.isRunning(c) {
		return t.giveUp(ctx, c)
	}
	if c.Run > 0 && !c.ended() && t.watch.state(c).phase == phasePending {
		if _, err := t.started(ctx, c); err != nil {
			return err
		}
	}
	p, err := t.running(c)
	if errors.Is(err, errAway) {
		return err
	}
	if err != nil {
		return dockerhttp.NewError(http.StatusNotModified, "container is already stopped")
	}
	c, err = t.change(ctx, c.ID, func(now *record) (bool, error) {
		if now.Run != c.Run || now.Want != wantRunning {
			return false, nil
		}
		now.Want = wantStopped
		return true, nil
	})
	if err != nil {
		return err
	}
	t.awaitEnd(c, p)
	t.emitKill(ctx, c, stopSignal(c.Config, q.Get("signal")))
	if err := p.call(ctx, http.MethodPost, p.inside("/stop"), c.ending(q), nil, nil); err != nil && !t.hasEnded(ctx, c, err) {
		return err
	}
	if err := t.untilEnded(ctx, c); err != nil {
		return err
	}
	t.emitContainer(c, events.ActionStop, nil)
	return nil
}

// hasEnded says whether a pod that has not answered a call has ended: it and its node know that before Nomad tells of it.
func (t *tenant) hasEnded(ctx context.Context, c *record, err error) bool {
	var refused dockerhttp.Error
	if errors.As(err, &refused) {
		return t.over(c)
	}
	ctx, cancel := context.WithTimeout(ctx, podTimeout)
	defer cancel()
	return t.watch.until(ctx, func() (bool, error) {
		p := t.watch.state(c).phase
		return p == phaseEnded || p == phaseNone, nil
	}) == nil
}

// untilEnded waits until a run's end is noted.
func (t *tenant) untilEnded(ctx context.Context, c *record) error {
	_, err := t.endOfRun(ctx, c.ID, c.Run)
	return err
}

// endOfRun waits for the end of a run; nil where the container is gone.
func (t *tenant) endOfRun(ctx context.Context, id string, number int) (last *run, err error) {
	err = t.watch.until(ctx, func() (bool, error) {
		if t.busy(id, number) {
			return false, nil
		}
		t.sessions.mu.Lock()
		noted := t.noted[id]
		t.sessions.mu.Unlock()
		if noted.Number >= number {
			last = &noted
			return true, nil
		}
		r, err := t.get(ctx, id)
		if isNotFound(err) {
			return true, nil
		}
		if err != nil {
			return false, err
		}
		if r.Run > number || r.Last.Number >= number {
			last = &r.Last
			return true, nil
		}
		return false, nil
	})
	return last, err
}

// busy says whether a run goes on as far as this server knows: there is no need to read its record.
func (t *tenant) busy(id string, number int) bool {
	t.sessions.mu.Lock()
	noted := t.noted[id].Number >= number
	t.sessions.mu.Unlock()
	if noted {
		return false
	}
	t.watch.mu.Lock()
	defer t.watch.mu.Unlock()
	s := t.watch.stateOf(jobPrefix+id, number, anyTry)
	return s.phase == phasePending && s.noPlace == "" || s.phase == phaseRunning
}

func (s *Server) restartContainer(w http.ResponseWriter, r *http.Request, t *tenant, c *record) error {
	if err := grace(r); err != nil {
		return err
	}
	ctx := context.WithoutCancel(r.Context())
	p, err := t.running(c)
	runs := err == nil
	if runs {
		t.emitKill(ctx, c, stopSignal(c.Config, dockerhttp.Parameter(r, "signal")))
		err = p.call(ctx, http.MethodPost, p.inside("/restart"), c.ending(r.URL.Query()), nil, nil)
		var refused dockerhttp.Error
		if errors.As(err, &refused) && refused.Status == http.StatusConflict { // its pod has just ended, and Nomad does not know it yet
			runs = !t.hasEnded(ctx, c, tunnel.ErrNotRunning)
		} else {
			runs = !errors.Is(err, tunnel.ErrNotRunning) || !t.hasEnded(ctx, c, err)
		}
	}
	if !runs {
		if err = t.start(ctx, c.ID); isNotModified(err) {
			err = nil
		}
	}
	if err != nil {
		return err
	}
	t.emitContainer(c, events.ActionRestart, nil)
	w.WriteHeader(http.StatusNoContent)
	return nil
}

func isNotModified(err error) bool {
	var e dockerhttp.Error
	return errors.As(err, &e) && e.Status == http.StatusNotModified
}

func (s *Server) killContainer(w http.ResponseWriter, r *http.Request, t *tenant, c *record) error {
	p, err := t.running(c)
	if err != nil {
		return dockerhttp.Errorf(http.StatusConflict, "cannot kill container: %s: container %s is not running", r.PathValue("id"), c.ID)
	}
	ctx := context.WithoutCancel(r.Context())
	t.awaitEnd(c, p)
	signal := unix.SIGKILL
	if text := dockerhttp.Parameter(r, "signal"); text != "" {
		signal = signalOf(text, 0)
	}
	if signal != 0 { // else the pod refuses it
		t.emitKill(ctx, c, signal)
	}
	if c.Joins != "" && (signal == unix.SIGKILL || signal == stopSignal(c.Config, "")) { // its end is wanted: its policy does not have it follow the one that it has joined
		if _, err := t.change(ctx, c.ID, func(now *record) (bool, error) {
			if now.Run != c.Run || now.Want != wantRunning {
				return false, nil
			}
			now.Want = wantStopped
			return true, nil
		}); err != nil {
			return err
		}
	}
	if err := p.call(ctx, http.MethodPost, p.inside("/kill"), r.URL.Query(), nil, nil); errors.Is(err, tunnel.ErrNotRunning) {
		return dockerhttp.Errorf(http.StatusConflict, "cannot kill container: %s: container %s is not running", r.PathValue("id"), c.ID)
	} else if err != nil {
		return err
	}
	if signal == unix.SIGKILL {
		ctx, cancel := context.WithTimeout(ctx, killWait)
		defer cancel()
		if err := t.untilEnded(ctx, c); err != nil && ctx.Err() == nil {
			return err
		}
	}
	w.WriteHeader(http.StatusNoContent)
	return nil
}

// killWait is how long a kill waits for the end that SIGKILL brings, as dockerd does.
const killWait = 10 * time.Second

// waitContainer sends its header as soon as the end that it waits for can't be missed any more: docker run starts the container then.
func (s *Server) waitContainer(w http.ResponseWriter, r *http.Request, t *tenant, c *record) error {
	condition := container.WaitCondition(dockerhttp.Parameter(r, "condition"))
	switch condition {
	case "", container.WaitConditionNotRunning, container.WaitConditionNextExit, container.WaitConditionRemoved:
	default:
		return dockerhttp.Invalid("invalid condition: %q", condition)
	}
	ctx := r.Context()
	// Its pod may start it again, by its policy or for docker restart: then the run goes on.
	var exited io.ReadCloser
	if c.Joins != "" && t.isRunning(c) {
		t.followEnd(ctx, c)
	}
	if p, err := t.running(c); err == nil && condition != container.WaitConditionRemoved {
		if exited, err = p.nextExit(ctx); err != nil && ctx.Err() != nil {
			return nil //nolint:nilerr // the client has gone
		}
	}
	number := c.Run
	if idle := c.Run == 0 || c.ended(); idle && condition == container.WaitConditionNextExit || c.Run == 0 && condition == container.WaitConditionRemoved {
		number++
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(http.StatusOK)
	if err := http.NewResponseController(w).Flush(); err != nil {
		return nil //nolint:nilerr // the client has gone
	}
	var answer container.WaitResponse
	if exited != nil {
		defer exited.Close()
		var end dockerhttp.Waited
		if decodeOne(exited, &end) == nil && end.State != nil && end.State.Running {
			_ = json.NewEncoder(w).Encode(end.WaitResponse)
			return nil
		}
	}
	last, err := t.awaitRun(ctx, c.ID, number)
	if err == nil && condition == container.WaitConditionRemoved {
		err = t.watch.until(ctx, func() (bool, error) {
			now, err := t.get(ctx, c.ID)
			if isNotFound(err) {
				return true, nil
			}
			if err == nil && now.ended() {
				last = &now.Last
			}
			return false, err
		})
	}
	if ctx.Err() != nil {
		return nil //nolint:nilerr // the client has gone
	}
	if last != nil {
		answer.StatusCode = int64(last.ExitCode)
		// Why it did not start who starts it is told, and who waits for its removal only hears that it is gone, as with dockerd.
		if last.Error != "" && (condition != container.WaitConditionRemoved || !last.StartedAt.IsZero()) {
			answer.Error = &container.WaitExitError{Message: last.Error}
		}
	}
	if err != nil {
		answer.Error = &container.WaitExitError{Message: err.Error()}
	}
	_ = json.NewEncoder(w).Encode(answer)
	return nil
}

// nextExit asks the pod to tell of the container's next exit, and whether it starts it again. When it returns, that can't be missed.
func (p *pod) nextExit(ctx context.Context) (io.ReadCloser, error) {
	return p.stream(ctx, http.MethodPost, p.inside("/wait"), url.Values{"condition": {string(container.WaitConditionNextExit)}})
}

// awaitRun is endOfRun, for a run that may not have begun.
func (t *tenant) awaitRun(ctx context.Context, id string, number int) (*run, error) {
	if number == 0 {
		return nil, nil
	}
	return t.endOfRun(ctx, id, number)
}

func (s *Server) renameContainer(w http.ResponseWriter, r *http.Request, t *tenant, c *record) error {
	name, err := translate.Name(dockerhttp.Parameter(r, "name"))
	if err != nil {
		return err
	}
	ctx := r.Context()
	if name == c.Name {
		return dockerhttp.Invalid("Renaming a container with the same name as its current name")
	}
	if err := t.takeName(ctx, name, c.ID); err != nil {
		var taken dockerhttp.Error
		if errors.As(err, &taken) {
			taken.Message = "Error when allocating new name: " + taken.Message
			return taken
		}
		return err
	}
	old := c.Name
	renamed, err := t.change(ctx, c.ID, func(now *record) (bool, error) {
		old, now.Name = now.Name, name
		return true, nil
	})
	if err != nil {
		return errors.Join(err, t.freeName(context.WithoutCancel(ctx), name, c.ID))
	}
	if err := t.freeName(ctx, old, c.ID); err != nil {
		return err
	}
	t.emitContainer(renamed, events.ActionRename, map[string]string{"oldName": "/" + old})
	if err := t.tellNames(context.WithoutCancel(ctx), renamed); err != nil {
		return err
	}
	w.WriteHeader(http.StatusNoContent)
	return nil
}

func (s *Server) removeContainer(w http.ResponseWriter, r *http.Request, t *tenant, c *record) error {
	if dockerhttp.Truth(r, "link") {
		return dockerhttp.Invalid("there are no links")
	}
	if c.Run > 0 && !c.ended() && t.watch.state(c).phase == phaseEnded {
		if err := t.untilEnded(r.Context(), c); err != nil {
			return err
		}
	}
	if err := t.remove(context.WithoutCancel(r.Context()), c, dockerhttp.Truth(r, "force")); err != nil {
		return err
	}
	w.WriteHeader(http.StatusNoContent)
	return nil
}

func (s *Server) pruneContainers(w http.ResponseWriter, r *http.Request, t *tenant) error {
	f, err := dockerhttp.ParseFilters(r, "label", "label!", "until")
	if err != nil {
		return err
	}
	until, err := pruneUntil(f["until"])
	if err != nil {
		return err
	}
	if err := t.watch.ready(r.Context()); err != nil {
		return err
	}
	all, err := t.list(r.Context())
	if err != nil {
		return err
	}
	report := container.PruneReport{ContainersDeleted: []string{}}
	for _, c := range all {
		if t.statusOf(c).Running || c.Run > 0 && !c.ended() || !f.Labels("label", c.Config.Labels, false) || !f.Labels("label!", c.Config.Labels, true) {
			continue
		}
		if !until.IsZero() && !c.Created.Before(until) {
			continue
		}
		if err := t.remove(r.Context(), c, false); err != nil {
			return err
		}
		report.ContainersDeleted = append(report.ContainersDeleted, c.ID)
	}
	t.emitPrune(events.ContainerEventType, report.SpaceReclaimed)
	return dockerhttp.Answer(w, http.StatusOK, report)
}

// pruneUntil reads the filter until: a time, or how long ago.
func pruneUntil(values []string) (time.Time, error) {
	if len(values) == 0 {
		return time.Time{}, nil
	}
	if len(values) > 1 {
		return time.Time{}, dockerhttp.Invalid("more than one until filter specified")
	}
	if d, err := time.ParseDuration(values[0]); err == nil {
		return time.Now().Add(-d), nil
	}
	return dockerhttp.ParseTime(values[0])
}

// decodeOne reads one JSON value, as long as a pod's answer may be.
func decodeOne(r io.Reader, v any) error {
	return json.NewDecoder(io.LimitReader(r, dockerhttp.MaxBody)).Decode(v)
}

// containerLogs asks the pod, or one that attends to the container's disk.
func (s *Server) containerLogs(w http.ResponseWriter, r *http.Request, t *tenant, c *record) error {
	if !dockerhttp.Truth(r, "stdout") && !dockerhttp.Truth(r, "stderr") {
		return dockerhttp.Invalid("Bad parameters: you must choose at least one stream")
	}
	if c.Run == 0 {
		w.Header().Set("Content-Type", mediaType(c))
		w.WriteHeader(http.StatusOK)
		return nil
	}
	return t.passDisk(w, r, c, "/logs")
}

// mediaType is that of a container's output (moby api/swagger.yaml, ContainerAttach).
func mediaType(c *record) string {
	if c.Config.Tty {
		return "application/vnd.docker.raw-stream"
	}
	return "application/vnd.docker.multiplexed-stream"
}

// containerStats are the pod's, with docker's name and id. A container that does not run has none.
func (s *Server) containerStats(w http.ResponseWriter, r *http.Request, t *tenant, c *record) error {
	p, err := t.running(c)
	if err != nil {
		return dockerhttp.Answer(w, http.StatusOK, container.StatsResponse{ID: c.ID, Name: "/" + c.Name, OSType: "linux"})
	}
	request, err := p.request(r.Context(), http.MethodGet, p.inside("/stats"), r.URL.Query(), nil)
	if err != nil {
		return err
	}
	answer, _, err := p.send(r.Context(), request)
	if err != nil {
		return err
	}
	defer answer.Body.Close()
	if answer.StatusCode != http.StatusOK {
		return refusal(answer)
	}
	w.Header().Set("Content-Type", "application/json")
	flush := http.NewResponseController(w)
	_ = flush.Flush()
	in, out := json.NewDecoder(answer.Body), json.NewEncoder(w)
	for {
		var one map[string]json.RawMessage
		if err := in.Decode(&one); err != nil {
			return nil //nolint:nilerr // the pod has ended, or the client is gone
		}
		one["name"], _ = json.Marshal("/" + c.Name)
		one["id"], _ = json.Marshal(c.ID)
		if out.Encode(one) != nil || flush.Flush() != nil {
			return nil
		}
	}
}

// updateContainer changes the limits of the pod that runs, and of those to come.
func (s *Server) updateContainer(w http.ResponseWriter, r *http.Request, t *tenant, c *record) error {
	var u container.UpdateConfig
	if err := dockerhttp.Decode(w, r, &u); err != nil {
		return err
	}
	host, pod, warnings, err := translate.Update(c.Host, c.Pod, &u)
	if err != nil {
		return err
	}
	ctx := r.Context()
	if c.Joins != "" {
		x, err := t.get(ctx, c.Joins)
		if err == nil {
			err = fits(x, pod)
		}
		if err != nil && !isNotFound(err) {
			return err
		}
	}
	if p, err := t.running(c); err == nil {
		if err := p.call(ctx, http.MethodPost, p.inside("/update"), nil, u, nil); err != nil {
			return err
		}
	}
	if c, err = t.change(ctx, c.ID, func(now *record) (bool, error) {
		now.Host, now.Pod = host, pod
		return true, nil
	}); err != nil {
		return err
	}
	t.emitContainer(c, events.ActionUpdate, nil)
	return dockerhttp.Answer(w, http.StatusOK, container.UpdateResponse{Warnings: slices.Concat([]string{}, warnings)})
}
