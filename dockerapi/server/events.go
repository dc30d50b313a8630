package server

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"math"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/nomad/api"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/events"
	"golang.org/x/sys/unix"

	"github.com/cradlestack/cradlestack/dockerapi/translate"
	"github.com/cradlestack/cradlestack/internal/dockerhttp"
	"github.com/cradlestack/cradlestack/internal/nomadjob"
)

func (s *Server) eventRoutes(on *router) {
	on.on("GET /events", s.events)
}

// events tells what has happened and what happens: of what clients do and of containers' starts and ends there is a log; what goes on in a container
// its pod tells, for as long as it runs.
func (s *Server) events(w http.ResponseWriter, r *http.Request, t *tenant) error {
	wanted, err := dockerhttp.ParseEvents(r)
	if err != nil {
		return err
	}
	if err := t.watch.ready(r.Context()); err != nil {
		return err
	}
	ctx := r.Context()
	joined := time.Now()
	if err := t.flushEvents(ctx); err != nil {
		return err
	}
	log := &eventReader{tenant: t}
	past, err := log.read(ctx)
	if err != nil {
		return err
	}
	out := &eventWriter{wanted: wanted, w: w, lives: map[string]life{}}
	wants, err := t.wantedPods(ctx, wanted)
	if err != nil {
		return err
	}
	if wanted.Since.IsZero() && wanted.Until.IsZero() {
		past = nil
	} else {
		past = append(past, t.pastOfPods(ctx, wanted, wants, joined)...)
		slices.SortStableFunc(past, byTime)
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(http.StatusOK)
	if out.write(past) != nil || !wanted.Until.IsZero() && !wanted.Until.After(joined) {
		return nil
	}
	// From here on nothing is missed.
	if !wanted.Until.IsZero() {
		var cancel context.CancelFunc
		ctx, cancel = context.WithDeadline(ctx, wanted.Until)
		defer cancel()
	}
	var work sync.WaitGroup
	defer work.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	live, changed := make(chan event), make(chan struct{})
	pods := &podFollower{tenant: t, wants: wants, live: live, work: &work, followed: map[string]bool{}}
	work.Go(func() { t.watchLog(ctx, changed) })
	work.Go(func() { pods.run(ctx, joined) })
	var held []event // of the log and of pods, which do not come in order
	var settled <-chan time.Time
	for {
		select {
		case e := <-live:
			held = append(held, e)
		case <-changed:
		case <-settled:
			settled = nil
			some, err := log.read(ctx) // also for what pods told: the log may have what was before
			if err != nil {
				settled = time.After(streamRetry)
				continue
			}
			for i := range some {
				pods.joined(ctx, wanted, &some[i], joined)
			}
			held = append(held, some...)
			slices.SortStableFunc(held, byTime)
			if out.write(held) != nil {
				return nil
			}
			held = nil
			continue
		case <-ctx.Done():
			cancel()
			work.Wait()
			return out.last(r.Context(), log, held)
		}
		if settled == nil {
			settled = time.After(eventSettle)
		}
	}
}

// eventSettle is how long an event waits for those before it, to be told in order.
const eventSettle = 3 * eventDelay

// An eventWriter gives a client the events that it wants, each once.
type eventWriter struct {
	wanted *dockerhttp.EventsRequest
	w      http.ResponseWriter
	lives  map[string]life // by container
}

// A life is the newest of a container's starts and ends that was told.
type life struct {
	run    int
	action events.Action
	over   bool // the run is: the container does not start again in the same pod
}

func (o *eventWriter) write(all []event) error {
	enc := json.NewEncoder(o.w)
	for i := range all {
		m := &all[i]
		at := time.Unix(0, m.TimeNano)
		if at.Before(o.wanted.Since) || !o.wanted.Until.IsZero() && at.After(o.wanted.Until) || o.known(m) || !o.wanted.Wants(&m.Message) {
			continue
		}
		if err := enc.Encode(dockerhttp.NewEvent(m.Message)); err != nil {
			return err
		}
	}
	return http.NewResponseController(o.w).Flush()
}

// known says whether a start or end was told before: the log has the first start and the last end of a run, and the pod all of them.
func (o *eventWriter) known(e *event) bool {
	if e.Type != events.ContainerEventType {
		return false
	}
	last := o.lives[e.Actor.ID]
	earlier := e.Run < last.run || e.Run == last.run && last.over
	same := e.Run == last.run && last.action != ""
	switch e.Action {
	case events.ActionOOM:
		return earlier || same && last.action == events.ActionDie
	case events.ActionStart, events.ActionDie:
		if earlier {
			return true
		}
		now := life{run: e.Run, action: e.Action, over: e.Action == events.ActionDie && !e.inside}
		again := same && (e.Action == last.action || e.Action == events.ActionStart && !e.inside)
		if !again || now.over {
			o.lives[e.Actor.ID] = now
		}
		return again
	case events.ActionDestroy:
		delete(o.lives, e.Actor.ID)
	}
	return false
}

// last gives what other servers had under way when the time was over that the client wanted to wait until.
func (o *eventWriter) last(ctx context.Context, log *eventReader, held []event) error {
	select {
	case <-ctx.Done():
		return nil
	case <-time.After(eventSettle):
	}
	if some, err := log.read(ctx); err == nil {
		held = append(held, some...)
	}
	slices.SortStableFunc(held, byTime)
	_ = o.write(held) // the client has gone
	return nil
}

// running are the allocations of all pods that run, by their containers.
func (w *watch) running() map[string]*api.AllocationListStub {
	w.mu.Lock()
	defer w.mu.Unlock()
	all := map[string]*api.AllocationListStub{}
	for id, j := range w.jobs {
		if s := w.stateOf(id, j.run, j.try); j.run > 0 && s.phase == phaseRunning {
			all[strings.TrimPrefix(id, jobPrefix)] = s.alloc
		}
	}
	return all
}

// wantedPods says which pods may tell a client what it wants: by the record of the container whose pod it is. What has joined that may be wanted as well.
func (t *tenant) wantedPods(ctx context.Context, wanted *dockerhttp.EventsRequest) (func(*record) bool, error) {
	wants := func(r *record) bool {
		like := containerEvent(r, "", nil)
		return wanted.WantsActor(&like.Message)
	}
	all, err := t.list(ctx)
	if err != nil {
		return nil, err
	}
	hosts := map[string]bool{}
	for _, r := range all {
		if r.Joins != "" && wants(r) {
			hosts[r.Joins] = true
		}
	}
	return func(r *record) bool { return hosts[r.ID] || wants(r) }, nil
}

// pastOfPods asks all running pods what has happened in them until a client has joined.
func (t *tenant) pastOfPods(ctx context.Context, wanted *dockerhttp.EventsRequest, wants func(*record) bool, joined time.Time) []event {
	ctx, cancel := context.WithTimeout(ctx, podTimeout)
	defer cancel()
	until := joined
	if !wanted.Until.IsZero() && wanted.Until.Before(joined) {
		until = wanted.Until
	}
	since := wanted.Since
	if since.IsZero() {
		since = time.Unix(0, 1)
	}
	var work sync.WaitGroup
	var mu sync.Mutex
	var past []event
	slots := make(chan struct{}, asked)
	for id, alloc := range t.watch.running() {
		work.Go(func() {
			slots <- struct{}{}
			defer func() { <-slots }()
			// A pod that has just ended has nothing to tell that is not in the log.
			_ = t.podEvents(ctx, id, alloc, wants, since, until, func(m event) {
				mu.Lock()
				defer mu.Unlock()
				past = append(past, m)
			})
		})
	}
	work.Wait()
	return past
}

// A podFollower tells a client what happens in pods.
type podFollower struct {
	tenant *tenant
	wants  func(*record) bool
	live   chan<- event
	work   *sync.WaitGroup // of what it has begun

	mu       sync.Mutex
	followed map[string]bool // by allocation
}

// run follows all pods from a time on.
func (f *podFollower) run(ctx context.Context, from time.Time) {
	known := map[string]bool{} // allocations that were seen
	_ = f.tenant.watch.until(ctx, func() (bool, error) {
		now := map[string]bool{}
		for id, alloc := range f.tenant.watch.running() {
			if now[alloc.ID] = true; !known[alloc.ID] {
				f.follow(ctx, id, alloc, f.wants, from)
			}
		}
		known = now
		return false, nil
	})
}

// joined follows a pod of which nothing was wanted before, when a container has joined it that is. What was before a time is of no interest.
func (f *podFollower) joined(ctx context.Context, wanted *dockerhttp.EventsRequest, e *event, from time.Time) {
	if e.In == "" || e.Action != events.ActionStart || !wanted.WantsActor(&e.Message) {
		return
	}
	if alloc := f.tenant.watch.running()[e.In]; alloc != nil {
		if begun := time.Unix(0, e.TimeNano).Add(-podSkew); begun.After(from) {
			from = begun
		}
		f.follow(ctx, e.In, alloc, func(*record) bool { return true }, from)
	}
}

// podSkew is how much a pod's clock may differ from the server's.
const podSkew = time.Second

// A podClock is how far a pod's clock is behind the server's: no more than the least time that any of its events took to be here.
type podClock struct{ behind time.Duration }

func newPodClock() *podClock { return &podClock{math.MaxInt64} }

// correct gives an event that has come now a time by the server's clock, so that it is told after what it follows from. A pod's events stay in order.
func (c *podClock) correct(e *event, now time.Time) {
	c.behind = min(c.behind, now.Sub(time.Unix(0, e.TimeNano)))
	e.TimeNano += int64(c.behind)
	e.Time = e.TimeNano / int64(time.Second)
}

// follow follows a pod, if nobody does.
func (f *podFollower) follow(ctx context.Context, id string, alloc *api.AllocationListStub, wants func(*record) bool, from time.Time) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.followed[alloc.ID] {
		return
	}
	f.followed[alloc.ID] = true
	f.work.Go(func() {
		f.followPod(ctx, id, alloc, wants, from)
		f.mu.Lock()
		defer f.mu.Unlock()
		delete(f.followed, alloc.ID)
	})
}

// followPod goes on where its stream breaks, for as long as the pod runs.
func (f *podFollower) followPod(ctx context.Context, id string, alloc *api.AllocationListStub, wants func(*record) bool, from time.Time) {
	t := f.tenant
	clock := newPodClock()
	for ctx.Err() == nil {
		err := t.podEvents(ctx, id, alloc, wants, from.Add(1), time.Time{}, func(m event) {
			from = time.Unix(0, m.TimeNano)
			clock.correct(&m, time.Now())
			select {
			case f.live <- m:
			case <-ctx.Done():
			}
		})
		if now := t.watch.running()[id]; err == nil || isNotFound(err) || now == nil || now.ID != alloc.ID {
			return
		}
		select {
		case <-ctx.Done():
		case <-time.After(streamRetry):
		}
	}
}

// podEvents tells what happens to the containers in a container's pod: to it, and to those that have joined it. Without until it ends with the pod, which is an error. It
// returns nil where nothing is wanted of the pod.
func (t *tenant) podEvents(ctx context.Context, id string, alloc *api.AllocationListStub, wants func(*record) bool, since, until time.Time, tell func(event)) error {
	own, err := t.get(ctx, id)
	if err != nil {
		return err
	}
	if !wants(own) {
		return nil
	}
	run := own.Run
	q := url.Values{"since": {unixTime(since)}}
	if !until.IsZero() {
		q.Set("until", unixTime(until))
	}
	p := t.pod(alloc)
	told, err := p.read(ctx, "/events", q)
	if err != nil {
		return err
	}
	defer told.Close()
	in := json.NewDecoder(told)
	known := map[string]*record{id: own} // as they were last
	for {
		var m events.Message
		if err := in.Decode(&m); err != nil {
			if err == io.EOF && !until.IsZero() {
				return nil
			}
			return err
		}
		if !ofPod(m.Action) {
			continue
		}
		c := known[m.Actor.ID]
		if now, err := t.get(ctx, m.Actor.ID); err == nil { // it may have another name by now
			c, known[m.Actor.ID] = now, now
		}
		switch {
		case c == nil: // it is gone, and the log tells of that
		case c.ID == id:
			tell(ofContainer(c, run, m))
		case c.Joins == id && (!ofRun(m.Action) || !time.Unix(0, m.TimeNano).Before(c.Began)): // of its earlier runs the log has the starts and ends
			tell(ofContainer(c, c.Run, m))
		}
	}
}

// ofRun says whether an event is one of a run's, which are told once.
func ofRun(a events.Action) bool {
	return a == events.ActionStart || a == events.ActionDie || a == events.ActionOOM
}

func unixTime(at time.Time) string { return fmt.Sprintf("%d.%09d", at.Unix(), at.Nanosecond()) }

// ofPod says whether an event is the pod's to tell. Of the others the server knows more.
func ofPod(a events.Action) bool {
	switch a {
	case events.ActionCreate, events.ActionDestroy, events.ActionStop, events.ActionKill, events.ActionRestart, events.ActionUpdate,
		events.ActionAttach, events.ActionArchivePath, events.ActionExtractToDir, events.ActionExport:
		return false
	}
	return true
}

// ofContainer is a pod's event as docker has it outside.
func ofContainer(c *record, run int, m events.Message) event {
	more := map[string]string{}
	for name, value := range m.Actor.Attributes {
		switch name {
		case "image", "name":
		case "execID":
			more[name] = c.ID + value
		default:
			more[name] = value
		}
	}
	out := containerEvent(c, m.Action, more)
	out.Scope, out.Time, out.TimeNano, out.Run, out.inside = "local", m.Time, m.TimeNano, run, true
	return out
}

// emitStart tells that a container runs.
func (t *tenant) emitStart(r *record) {
	t.emit(slices.Concat(volumeEvents(r, events.ActionMount), t.networkEvents(r, events.ActionConnect), []event{containerEvent(r, events.ActionStart, nil)})...)
}

// emitEnd tells how a run has ended, if it had begun.
func (t *tenant) emitEnd(r *record, end run) {
	if end.StartedAt.IsZero() {
		return
	}
	die := containerEvent(r, events.ActionDie, map[string]string{
		"exitCode": strconv.Itoa(end.ExitCode), "execDuration": strconv.Itoa(int(end.FinishedAt.Sub(end.StartedAt).Seconds())),
	})
	die.Run = end.Number
	all := slices.Concat([]event{die}, t.networkEvents(r, events.ActionDisconnect), volumeEvents(r, events.ActionUnmount))
	if end.OOMKilled {
		oom := containerEvent(r, events.ActionOOM, nil)
		oom.Run = end.Number
		all = append([]event{oom}, all...)
	}
	if time.Since(end.FinishedAt) > lateEnd {
		for i := range all {
			all[i].TimeNano = end.FinishedAt.UnixNano()
		}
	}
	t.emit(all...)
}

// lateEnd is how much an end's time by its pod's clock may differ from now, where the end came just now.
const lateEnd = 10 * time.Second

// networkEvents are those of a container's networks when it begins and ends to run.
func (t *tenant) networkEvents(r *record, action events.Action) (all []event) {
	for _, name := range r.networks() {
		n := &netRecord{NetworkRecord: nomadjob.NetworkRecord{ID: r.Networks[name].NetworkID, Name: name, Driver: translate.Bridge}}
		for _, there := range t.builtin() {
			if there.Name == name {
				n = there
			}
		}
		all = append(all, n.event(action, map[string]string{"container": r.ID}))
	}
	return all
}

// event tells of something that has happened to a network, with more attributes than it always has.
func (n *netRecord) event(action events.Action, more map[string]string) event {
	all := map[string]string{"name": n.Name, "type": n.Driver}
	maps.Copy(all, more)
	return event{Message: events.Message{Type: events.NetworkEventType, Action: action, Actor: events.Actor{ID: n.ID, Attributes: all}}}
}

// emitKill tells of a signal that is about to be sent, by its number as docker does. It is in the log before the end that it brings is told by anybody.
func (t *tenant) emitKill(ctx context.Context, r *record, signal unix.Signal) {
	t.emitContainer(r, events.ActionKill, map[string]string{"signal": strconv.Itoa(int(signal))})
	ctx, cancel := context.WithTimeout(ctx, drainTimeout)
	defer cancel()
	if err := t.flushEvents(ctx); err != nil { // they are written later
		t.server.Log.Warn("write events", "namespace", t.Namespace, "error", err)
	}
}

// signalOf reads a signal's name or number; otherwise is what is meant where nothing is said.
func signalOf(text string, otherwise unix.Signal) unix.Signal {
	if n, err := strconv.Atoi(text); err == nil && n > 0 && n <= sigRTMax {
		return unix.Signal(n)
	}
	name := strings.ToUpper(text)
	if !strings.HasPrefix(name, "SIG") {
		name = "SIG" + name
	}
	if n := unix.SignalNum(name); n != 0 {
		return n
	}
	for prefix, from := range map[string]int{"SIGRTMIN": sigRTMin, "SIGRTMAX": sigRTMax} {
		if rest, ok := strings.CutPrefix(name, prefix); ok {
			if n, err := strconv.Atoi(or(rest, "0")); err == nil && from+n >= sigRTMin && from+n <= sigRTMax {
				return unix.Signal(from + n)
			}
		}
	}
	return otherwise
}

// Real-time signals as libc and docker count them (moby/sys/signal).
const (
	sigRTMin = 34
	sigRTMax = 64
)

// stopSignal is the one that a container is stopped with.
func stopSignal(c *container.Config, asked string) unix.Signal {
	return signalOf(asked, signalOf(c.StopSignal, unix.SIGTERM))
}

// emitPrune tells that what nobody needed was removed.
func (t *tenant) emitPrune(kind events.Type, space uint64) {
	t.emit(event{Message: events.Message{Type: kind, Action: events.ActionPrune, Actor: events.Actor{Attributes: map[string]string{"reclaimed": strconv.FormatUint(space, 10)}}}})
}

// emitImage tells of an image, by its id or name.
func (t *tenant) emitImage(action events.Action, id, name string) {
	t.emit(event{Message: events.Message{Type: events.ImageEventType, Action: action, Actor: events.Actor{ID: id, Attributes: map[string]string{"name": name}}}})
}
