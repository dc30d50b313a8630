package server

import (
	"context"
	"errors"
	"net/http"
	"net/netip"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/nomad/api"
	"github.com/moby/moby/api/types/container"

	"github.com/cradlestack/cradlestack/dockerapi/translate"
	"github.com/cradlestack/cradlestack/internal/dockerhttp"
	"github.com/cradlestack/cradlestack/internal/nomadjob"
	"github.com/cradlestack/cradlestack/spec"
)

// holdTime is how long a container waits for those who want to be attached before it runs. Where the server that it waits for is killed, it starts
// then, and what it has said until somebody is attached is in its log.
const holdTime = 10 * time.Second

// sessions are what this server has under way for containers of a namespace.
type sessions struct {
	mu        sync.Mutex
	attaching map[string][]*attachment // by container: those who wait for its start
	placing   map[string]bool          // containers that may have to be elsewhere than where Nomad has them at the moment
	settling  map[fate]bool            // that is noted, or is about to be
	ends      map[string]*ending       // of runs that this server waits for, by container
	removing  map[string]bool          // whose removal goes on, as their pod did not answer
	noted     map[string]run           // the newest run whose end this server has seen noted, by container; for a while after its removal
}

// A fate is what has become of a container's run.
type fate struct {
	id    string
	run   int
	phase phase
	anew  bool // Nomad runs it once more
}

// A startSet has the containers that are just being started: their ends are told after their starts.
type startSet struct {
	mu   sync.Mutex
	byID map[string]chan struct{}
}

func (s *startSet) begin(id string) (done func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.byID == nil {
		s.byID = map[string]chan struct{}{}
	}
	told := make(chan struct{})
	s.byID[id] = told
	return func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		close(told)
		if s.byID[id] == told {
			delete(s.byID, id)
		}
	}
}

func (s *startSet) wait(ctx context.Context, id string) {
	s.mu.Lock()
	told := s.byID[id]
	s.mu.Unlock()
	if told == nil {
		return
	}
	select {
	case <-told:
	case <-ctx.Done():
	}
}

// An attachment is a client that waits for a container's start.
type attachment struct {
	attached chan struct{} // closed when it misses nothing any more, or is gone
	once     sync.Once
}

func (a *attachment) done() { a.once.Do(func() { close(a.attached) }) }

func (s *sessions) attach(id string) *attachment {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.attaching == nil {
		s.attaching = map[string][]*attachment{}
	}
	a := &attachment{attached: make(chan struct{})}
	s.attaching[id] = append(s.attaching[id], a)
	return a
}

func (s *sessions) detach(id string, a *attachment) {
	a.done()
	s.mu.Lock()
	defer s.mu.Unlock()
	kept := s.attaching[id][:0]
	for _, other := range s.attaching[id] {
		if other != a {
			kept = append(kept, other)
		}
	}
	if s.attaching[id] = kept; len(kept) == 0 {
		delete(s.attaching, id)
	}
}

func (s *sessions) attachments(id string) []*attachment {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]*attachment{}, s.attaching[id]...)
}

// An ending is a run whose end this server hears of from its pod, before Nomad tells of it.
type ending struct {
	run  int
	done chan struct{} // closed when it is noted in the record, or is left to Nomad
}

// start starts a container for a client and returns when it runs. One that is to be removed at its end goes where it can't be started: docker run --rm waits for that.
func (t *tenant) start(ctx context.Context, id string) error {
	err := t.begin(ctx, id, anyRun)
	if err == nil || isNotModified(err) {
		return err
	}
	r, rerr := t.get(ctx, id)
	if rerr == nil && r.Host.AutoRemove && (r.Want != wantRunning || r.ended()) {
		rerr = t.remove(ctx, r, true)
	}
	if isNotFound(rerr) {
		rerr = nil
	}
	return errors.Join(err, rerr)
}

// anyRun is whichever of a container's runs is the newest.
const anyRun = -1

// begin begins a container's next run and returns when it runs. After says which run its restart policy has it follow; anyRun where a client starts it.
func (t *tenant) begin(ctx context.Context, id string, after int) error {
	if err := t.watch.ready(ctx); err != nil {
		return err
	}
	var wait []*attachment
	already, late := false, false
	placed := func() {}
	defer func() { placed() }()
	var ended run
	r, err := t.change(ctx, id, func(r *record) (bool, error) {
		already, ended = false, run{}
		if late = after != anyRun && (r.Run != after || r.Want != wantRunning || !r.ended()); late {
			return false, nil // somebody has done so, or has stopped it
		}
		switch r.Want {
		case wantRemoved:
			return false, dockerhttp.Errorf(http.StatusConflict, "container is marked for removal and cannot be started")
		case wantRunning:
			if !r.ended() && t.watch.state(r).phase != phaseEnded && !t.endsWithin(ctx, r) {
				already = true
				return false, nil
			}
		}
		if err := r.stillInherits(); err != nil {
			return false, err
		}
		if !r.ended() && r.Run > 0 { // its end is not noted yet
			r.Last = endOf(r.Run, t.watch.state(r))
			ended = r.Last
		}
		again := r.Again
		r.Run, r.Try, r.Again = r.Run+1, 0, 0
		r.Want = wantRunning
		if after != anyRun {
			r.Again = again + 1
			if r.Last.Lost == lostNode && r.Node != "" { // it may go elsewhere, with a fresh disk
				r.Left, r.Node = r.Node, ""
			}
		}
		if r.Joins != "" {
			x, _, err := t.joinsInto(ctx, r)
			if err != nil {
				return false, err
			}
			r.Within, r.Began = x.Run, time.Now().UTC()
			placed = t.place(id) // it is not in the pod yet
		}
		wait = t.attachments(id)
		r.firstPorts()
		var err error
		r.place, err = t.enter(ctx, r)
		return true, err
	})
	if err != nil || late {
		return err
	}
	t.emitEnd(r, ended)
	if already {
		if !r.restarting() {
			if _, err := t.started(ctx, r); err != nil {
				return err
			}
		}
		return dockerhttp.NewError(http.StatusNotModified, "container is already running")
	}
	return t.carryOut(ctx, r, wait)
}

// carryOut gives Nomad a run, and returns when it runs.
func (t *tenant) carryOut(ctx context.Context, r *record, wait []*attachment) error {
	if r.Joins != "" {
		return t.carryIn(ctx, r, wait)
	}
	if err := t.endAttendant(ctx, r); err != nil {
		return err
	}
	if err := t.awaitVolumes(ctx, r, r.jobID()); err != nil {
		return errors.Join(err, t.abandon(context.WithoutCancel(ctx), r, err))
	}
	placed := t.place(r.ID)
	defer placed()
	for {
		if err := t.register(ctx, r); err != nil {
			return err
		}
		state, err := t.started(ctx, r)
		if err == nil {
			if err = t.settleNetworks(ctx, r, state); err != nil && !errors.Is(err, errElsewhere) {
				err = errors.Join(err, t.abandon(context.WithoutCancel(ctx), r, err))
			}
		}
		if !errors.Is(err, errElsewhere) && !errors.Is(err, errPortTaken) {
			if err != nil {
				return err
			}
			placed()
			return t.release(ctx, r, state, wait)
		}
		if r, err = t.tryAgain(ctx, r, state, err); err != nil {
			return err
		}
	}
}

// place keeps clients from being attached to a container, and its end from being noted, until placed is called: there may be another try.
func (t *tenant) place(id string) (placed func()) {
	t.sessions.mu.Lock()
	defer t.sessions.mu.Unlock()
	if t.placing == nil {
		t.placing = map[string]bool{}
	}
	t.placing[id] = true
	return sync.OnceFunc(func() {
		t.sessions.mu.Lock()
		delete(t.placing, id)
		t.sessions.mu.Unlock()
		t.settle()
		t.watch.change(func() {})
	})
}

func (s *sessions) isPlacing(id string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.placing[id]
}

// register gives Nomad the job of a run. It is held until start asks for it: start returns when it runs, and says why it can't.
func (t *tenant) register(ctx context.Context, r *record) error {
	job, err := t.server.jobOf(r, t.Namespace, true)
	if err == nil && r.Bridged {
		err = t.putVariables(ctx, r)
	}
	if err == nil {
		_, _, err = t.nomad.Jobs().Register(job, t.write(ctx))
	}
	if err == nil {
		return nil
	}
	// Nobody runs it: the next start is another run.
	_, cerr := t.change(context.WithoutCancel(ctx), r.ID, func(now *record) (bool, error) {
		if now.Run != r.Run || now.Want != wantRunning {
			return false, nil
		}
		now.Last = run{Number: now.Run, ExitCode: exitNever, Error: err.Error(), FinishedAt: time.Now().UTC()}
		if now.Again == 0 {
			now.Want = wantCreated
		}
		return true, nil
	})
	return errors.Join(err, cerr)
}

// tryAgain makes another try of a run that can't be where Nomad would have it, or with the port that it has.
func (t *tenant) tryAgain(ctx context.Context, r *record, s podState, why error) (*record, error) {
	now, err := t.change(ctx, r.ID, func(now *record) (bool, error) {
		if now.Run != r.Run || now.Try != r.Try || now.Want != wantRunning {
			return false, dockerhttp.Errorf(http.StatusConflict, "container %s was stopped while it was started", now.Name)
		}
		now.Try++
		if errors.Is(why, errPortTaken) {
			if err := now.nextPort(now.taken(s)); err != nil {
				return false, err
			}
		}
		var err error
		now.place, err = t.enter(ctx, now)
		return true, err
	})
	if err != nil {
		return nil, errors.Join(err, t.abandon(context.WithoutCancel(ctx), r, err))
	}
	if errors.Is(why, errElsewhere) { // the disk of the machine that was there for a moment
		err = t.removeDiskAt(ctx, r.ID, s.alloc.NodeID)
	}
	return now, err
}

// errPortTaken is that a port which was chosen from a range is somebody's.
var errPortTaken = errors.New("a port of a range is taken")

// How it is said that a port of the node is somebody's: by Nomad (nomad/structs/network.go, AssignPorts), and by QEMU of one that Nomad knows nothing of.
var (
	collision    = regexp.MustCompile(`reserved port collision port(\d+)`)
	notForwarded = regexp.MustCompile(`host forwarding rule '(?:tcp|udp):[0-9.]*:(\d+)-`)
)

// taken is the index of the published port that keeps a run from its place, because the node's port is somebody's; -1 where there is none.
func (r *record) taken(s podState) int {
	publish := r.Pod.Network.Publish
	if m := collision.FindStringSubmatch(s.noPlace); m != nil {
		i, _ := strconv.Atoi(m[1])
		return i
	}
	if s.alloc != nil && s.alloc.AllocatedResources != nil {
		// Nomad gives a port at another address of the node where it is taken at the first one. What is published is there at IPv4 addresses.
		for _, given := range s.alloc.AllocatedResources.Shared.Ports {
			if at, err := netip.ParseAddr(given.HostIP); err == nil && at.Is6() {
				return slices.IndexFunc(publish, func(p spec.Publish) bool { return int(p.HostPort) == given.Value })
			}
		}
	}
	if s.phase == phaseEnded {
		if m := notForwarded.FindStringSubmatch(endOf(r.Run, s).Error); m != nil {
			return slices.IndexFunc(publish, func(p spec.Publish) bool { return strconv.Itoa(int(p.HostPort)) == m[1] })
		}
	}
	return -1
}

// firstPorts chooses the first port of each range.
func (r *record) firstPorts() {
	if len(r.Ranges) == 0 {
		return
	}
	p := *r.Pod
	p.Network.Publish = slices.Clone(p.Network.Publish)
	for i, ports := range r.Ranges {
		p.Network.Publish[i].HostPort = ports.First
	}
	r.Pod = &p
}

// nextPort chooses the next one of the range of a published port.
func (r *record) nextPort(i int) error {
	ports := r.Ranges[i]
	p := *r.Pod
	p.Network.Publish = slices.Clone(p.Network.Publish)
	at := &p.Network.Publish[i]
	if at.HostPort >= ports.Last {
		return dockerhttp.Errorf(http.StatusServiceUnavailable, "all ports of %d-%d are taken on the nodes that could run the container", ports.First, ports.Last)
	}
	at.HostPort++
	r.Pod = &p
	return nil
}

// jobOf makes a container's job.
func (s *Server) jobOf(r *record, namespace string, hold bool) (*api.Job, error) {
	p := *r.Pod
	p.Containers = append([]spec.PodContainer{}, r.Pod.Containers...)
	p.Name, p.Containers[0].Image, p.Network.Mode = r.Name, s.nodeReference(r.Image), ""
	if len(r.Networks) == 0 || r.Networks[translate.None] != nil {
		p.Network.Mode, p.Network.Publish = translate.None, nil
	}
	if hold {
		p.Containers[0].Lifecycle.Hold = spec.Duration(holdTime)
	}
	o := nomadjob.Options{
		ID: r.jobID(), Namespace: namespace, PodID: r.ID, Node: or(r.place, r.Node), Zone: r.Zone, Bare: true, Audience: r.Image.Audience,
		Meta: map[string]string{metaContainer: r.ID, metaRun: strconv.Itoa(r.Run), metaTry: strconv.Itoa(r.Try)}, Bridge: r.Bridged, Networks: r.places(), Links: r.Links,
	}
	if r.keepsDisk() {
		o.DiskID = r.ID
	}
	return nomadjob.Job(&p, o)
}

// started waits until the newest run is there, or has ended. A run that no node takes, or that could not begin, is an error, and nothing is left
// of it in Nomad.
func (t *tenant) started(ctx context.Context, r *record) (s podState, err error) {
	err = t.watch.until(ctx, func() (bool, error) {
		s = t.watch.state(r)
		if i := r.taken(s); i >= 0 {
			if _, ranged := r.Ranges[i]; ranged {
				return false, errPortTaken
			}
			p := r.Pod.Network.Publish[i]
			return false, dockerhttp.Errorf(http.StatusInternalServerError, "driver failed programming external connectivity: Bind for %s:%d failed: port is already allocated", hostIP(p), p.HostPort)
		}
		if s.phase == phaseAway {
			return false, errAway
		}
		if s.noPlace != "" && r.Again == 0 { // for one that its restart policy starts, Nomad looks for a place until there is one
			if r.place != "" {
				s.noPlace += "; its networks are on one node, and it has to go there"
			}
			return false, dockerhttp.Errorf(http.StatusServiceUnavailable, "no node takes the container at the moment: %s", s.noPlace)
		}
		return s.phase == phaseRunning || s.phase == phaseEnded, nil
	})
	if err != nil {
		if ctx.Err() == nil && !errors.Is(err, errPortTaken) && !errors.Is(err, errAway) {
			err = errors.Join(err, t.abandon(context.WithoutCancel(ctx), r, err))
		}
		return s, err
	}
	if s.phase == phaseEnded {
		if end := endOf(r.Run, s); end.StartedAt.IsZero() || end.Error != "" && end.ExitCode > 124 {
			err := startError(end.Error)
			return s, errors.Join(err, t.abandon(context.WithoutCancel(ctx), r, err))
		}
	}
	return s, nil
}

// startError has docker's words for a container that does not start.
func startError(why string) error {
	why = strings.TrimPrefix(why, "rpc error: code = Unknown desc = ")
	return dockerhttp.Errorf(http.StatusBadRequest, "failed to create task for container: failed to create shim task: OCI runtime create failed: %s", why)
}

// abandon gives a run up that has not begun: the container is created, as before, or goes if it is to be removed at its end.
func (t *tenant) abandon(ctx context.Context, r *record, why error) error {
	now, err := t.change(ctx, r.ID, func(now *record) (bool, error) {
		if now.Run != r.Run || now.Want == wantRemoved {
			return false, nil
		}
		now.Want, now.Last = wantCreated, run{Number: now.Run, ExitCode: exitCodeOf(why.Error()), Error: why.Error(), FinishedAt: time.Now().UTC()}
		return true, nil
	})
	if isNotFound(err) {
		return nil
	}
	if err != nil {
		return err
	}
	t.note(r.ID, now.Last)
	if r.Host.AutoRemove {
		return t.remove(ctx, r, true)
	}
	if r.Joins != "" {
		return nil
	}
	_, _, err = t.nomad.Jobs().Deregister(r.jobID(), false, t.write(ctx))
	return err
}

// exitCodeOf is docker's for a command that could not be executed.
func exitCodeOf(message string) int {
	switch {
	case strings.Contains(message, "not found"), strings.Contains(message, "no such file"):
		return 127
	case strings.Contains(message, "permission denied"):
		return 126
	}
	return exitNever
}

// release lets a container run that waits for its clients, and listens for its end.
func (t *tenant) release(ctx context.Context, r *record, s podState, wait []*attachment) error {
	t.noteNode(ctx, r, s)
	if s.phase != phaseRunning {
		return nil
	}
	p := t.podWith(r, s.alloc)
	var listens sync.WaitGroup
	defer listens.Wait()
	if r.Joins != "" || len(wait) > 0 || !r.Host.RestartPolicy.IsNone() { // somebody waits; or it was started again by its policy, which the pod tells alone
		listens.Go(func() { t.awaitEnd(r, p) })
	}
	for _, a := range wait {
		select {
		case <-a.attached:
		case <-time.After(holdTime):
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	listens.Wait()
	defer t.starting.begin(r.ID)()
	var console url.Values
	if size := r.Host.ConsoleSize; r.Config.Tty && size != [2]uint{} {
		console = url.Values{"h": {strconv.FormatUint(uint64(size[0]), 10)}, "w": {strconv.FormatUint(uint64(size[1]), 10)}}
	}
	err := p.call(ctx, http.MethodPost, p.inside("/start"), console, nil, nil)
	var docker dockerhttp.Error
	if errors.As(err, &docker) && (docker.Status == http.StatusNotModified || docker.Status == http.StatusConflict) {
		t.hasStarted(r)
		return nil // it has not waited any longer
	}
	if errors.As(err, &docker) {
		err = startError(docker.Message)
		return errors.Join(err, t.abandon(context.WithoutCancel(ctx), r, err))
	}
	if err != nil && !t.hasEnded(ctx, r, err) {
		return err
	}
	t.hasStarted(r) // where there is an error, it has run already
	return nil
}

// hasStarted tells of a container's start, and lets follow what waits for it.
func (t *tenant) hasStarted(r *record) {
	t.emitStart(r)
	if r.Joins == "" && r.Run > 1 {
		t.rejoin(r)
	}
}

// over says whether a run has ended, as far as this server knows.
func (t *tenant) over(r *record) bool { return t.watch.state(r).phase == phaseEnded }

// noteNode keeps in mind where a container's disk is.
func (t *tenant) noteNode(ctx context.Context, r *record, s podState) {
	if s.alloc == nil || r.Node == s.alloc.NodeID || !r.keepsDisk() {
		return
	}
	_, err := t.change(ctx, r.ID, func(now *record) (bool, error) {
		if now.Run != r.Run {
			return false, nil
		}
		return t.isAt(ctx, now, s)
	})
	if err != nil && !isNotFound(err) {
		t.server.Log.Error("note a container's node", "container", r.ID, "error", err)
	}
}

// expectEnd notes that somebody listens for the end of a container's newest run; nil where somebody does already.
func (t *tenant) expectEnd(r *record) *ending {
	t.sessions.mu.Lock()
	defer t.sessions.mu.Unlock()
	if old := t.ends[r.ID]; old != nil && old.run == r.Run {
		return nil
	}
	if t.ends == nil {
		t.ends = map[string]*ending{}
	}
	e := &ending{run: r.Run, done: make(chan struct{})}
	t.ends[r.ID] = e
	return e
}

// awaitEnd asks the pod to tell when its container has ended: sooner than Nomad does. It returns when that can't be missed.
func (t *tenant) awaitEnd(r *record, p *pod) {
	if r.Joins != "" {
		t.followEnd(t.server.ctx, r)
		return
	}
	e := t.expectEnd(r)
	if e == nil {
		return
	}
	life := t.server.ctx
	request, err := p.request(life, http.MethodPost, p.inside("/wait"), url.Values{"condition": {"removed"}}, nil)
	var answer *http.Response
	if err == nil {
		answer, _, err = p.send(life, request)
	}
	if err != nil || answer.StatusCode != http.StatusOK {
		t.endNoted(r.ID, e) // Nomad tells of it
		return
	}
	t.server.work.Go(func() {
		defer t.endNoted(r.ID, e)
		defer answer.Body.Close()
		begun := time.Now().UTC()
		var end dockerhttp.Waited
		if decodeOne(answer.Body, &end) != nil {
			return
		}
		last := run{Number: r.Run, StartedAt: begun, FinishedAt: time.Now().UTC(), ExitCode: int(end.StatusCode)}
		if end.Error != nil {
			last.Error = end.Error.Message
		}
		if end.State != nil {
			last.take(end.State, end.RestartCount)
		}
		if err := t.noteEnd(life, r.ID, last); err != nil {
			t.server.Log.Error("note a container's end", "container", r.ID, "error", err)
		}
	})
}

func (r *run) take(s *container.State, restarts int) {
	if at, err := time.Parse(time.RFC3339Nano, s.StartedAt); err == nil && !at.IsZero() && at.Year() > 1 {
		r.StartedAt = at.UTC()
	}
	if at, err := time.Parse(time.RFC3339Nano, s.FinishedAt); err == nil && at.Year() > 1 {
		r.FinishedAt = at.UTC()
	}
	r.OOMKilled, r.Restarts = s.OOMKilled, restarts
	if s.Error != "" {
		r.Error = s.Error
	}
}

func (t *tenant) endNoted(id string, e *ending) {
	t.sessions.mu.Lock()
	if t.ends[id] == e {
		delete(t.ends, id)
	}
	t.sessions.mu.Unlock()
	close(e.done)
	t.watch.change(func() {}) // who waits looks at the record again
}

// noteEnd writes a run's end into the record, once; a container that is to be removed at its end goes.
func (t *tenant) noteEnd(ctx context.Context, id string, last run) error {
	t.starting.wait(ctx, id)
	calledOff := last.Lost == "" && t.watch.calledOff(id, last.Number)
	if calledOff {
		last.Lost = lostNode
	}
	noted, again := false, false
	r, err := t.change(ctx, id, func(r *record) (bool, error) {
		if noted = r.Run == last.Number && !r.ended(); !noted {
			return false, nil
		}
		if _, err := t.isAt(ctx, r, t.watch.state(r)); err != nil { // who has started it may have been killed before it could note that
			return false, err
		}
		r.Last = last
		if again = r.startsAgain(); !again && r.Want == wantRunning {
			r.Want = wantStopped
		}
		if r.Host.AutoRemove { // whoever is killed from here on: another server removes it
			r.Want = wantRemoved
		}
		return true, nil
	})
	if isNotFound(err) {
		return nil
	}
	if err != nil {
		return err
	}
	if noted {
		t.emitEnd(r, r.Last)
		if calledOff { // what comes next is the policy's to say
			if err := t.stopJob(ctx, r.jobID()); err != nil {
				t.server.Log.Error("end the job of a container that Nomad has ended", "container", id, "error", err)
			}
		}
		if again {
			t.startAgain(r)
		}
	}
	t.note(id, r.Last)
	if r.Host.AutoRemove && r.ended() && r.Run == last.Number {
		return t.remove(ctx, r, true)
	}
	return nil
}

// note remembers an end for those who wait for it, who may come to look only after the container was removed.
func (t *tenant) note(id string, last run) {
	t.sessions.mu.Lock()
	if t.noted == nil {
		t.noted = map[string]run{}
	}
	if last.Number >= t.noted[id].Number {
		t.noted[id] = last
	}
	t.sessions.mu.Unlock()
	t.watch.change(func() {})
}

// forgetLater forgets a removed container's end when everybody who waited for it must have seen it.
func (t *tenant) forgetLater(id string) {
	time.AfterFunc(forgetTime, func() {
		t.sessions.mu.Lock()
		defer t.sessions.mu.Unlock()
		delete(t.noted, id)
	})
}

const forgetTime = time.Minute

// settle notes the ends that Nomad has told of.
func (t *tenant) settle() {
	t.watch.mu.Lock()
	ended := map[fate]bool{}
	var removed, strays []string
	for id, j := range t.watch.jobs {
		rest := strings.TrimPrefix(id, jobPrefix)
		attended, attends := strings.CutPrefix(rest, attendantPrefix)
		switch {
		case attends && t.attendants.wanted(attended):
		case attends, strings.HasPrefix(id, removerPrefix):
			if j.over() && len(j.allocs) > 0 {
				removed = append(removed, id)
				delete(t.watch.jobs, id)
			} else if attends && !j.stopped {
				strays = append(strays, attended)
			}
		case j.run > 0 && !t.isPlacing(rest):
			if p := t.watch.stateOf(id, j.run, j.try).phase; p == phaseEnded || p == phaseAway {
				ended[fate{rest, j.run, p, j.anew()}] = true
			}
		}
	}
	t.watch.mu.Unlock()
	for _, id := range strays {
		t.endStray(id)
	}
	for _, id := range removed {
		t.server.work.Go(func() {
			if err := t.purge(t.server.ctx, id); err != nil && t.server.ctx.Err() == nil {
				t.server.Log.Error("forget a job that is done", "job", id, "error", err)
			}
		})
	}
	t.sessions.mu.Lock()
	defer t.sessions.mu.Unlock()
	settled := t.settling
	t.settling = ended
	for it := range ended {
		if settled[it] {
			continue
		}
		t.server.work.Go(func() {
			if err := t.settleOne(it); err != nil && t.server.ctx.Err() == nil {
				t.server.Log.Error("note a container's end", "container", it.id, "error", err)
				t.sessions.mu.Lock()
				delete(t.settling, it) // again, with the next event
				t.sessions.mu.Unlock()
			}
			t.watch.change(func() {})
		})
	}
}

func (t *tenant) settleOne(it fate) error {
	ctx := t.server.ctx
	t.sessions.mu.Lock()
	e := t.ends[it.id]
	t.sessions.mu.Unlock()
	if e != nil && e.run == it.run {
		select {
		case <-e.done: // the pod knows better
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	r, err := t.get(ctx, it.id)
	if isNotFound(err) {
		return nil
	}
	if err != nil || r.Run != it.run {
		return err
	}
	if r.ended() {
		if !it.anew || r.Want == wantRunning { // its next run takes the job's place
			return nil
		}
		return t.stopJob(ctx, r.jobID())
	}
	s := t.watch.state(r)
	switch {
	case s.phase == phaseEnded:
	case s.phase == phaseAway && (r.Want != wantRunning || !r.Host.RestartPolicy.IsNone()):
	default: // it goes on when its node is back
		return nil
	}
	end := endOf(r.Run, s)
	if end.Lost == lostNode { // Nomad has nothing more to do with it: neither elsewhere nor when the node is back
		if err := t.stopJob(ctx, r.jobID()); err != nil {
			return err
		}
	}
	return t.noteEnd(ctx, it.id, end)
}
