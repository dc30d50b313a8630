package server

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/nomad/api"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/events"
	"golang.org/x/sys/unix"

	"github.com/cradlestack/cradlestack/internal/dockerhttp"
)

// A start or an end that the log and the pod both tell of is told once, in whatever order they come.
func TestLivesAreToldOnce(t *testing.T) {
	log := func(action events.Action, run int) event {
		return event{Message: events.Message{Type: "container", Action: action, Actor: events.Actor{ID: "x"}}, Run: run}
	}
	pod := func(action events.Action, run int) event {
		e := log(action, run)
		e.inside = true
		return e
	}
	for name, test := range map[string]struct {
		come []event
		want string
	}{
		"the log alone":            {[]event{log("start", 1), log("die", 1), log("start", 2), log("oom", 2), log("die", 2)}, "start die start oom die"},
		"the pod first":            {[]event{pod("start", 1), log("start", 1), pod("oom", 1), pod("die", 1), log("oom", 1), log("die", 1)}, "start oom die"},
		"the pod late":             {[]event{log("start", 1), log("die", 1), pod("start", 1), pod("oom", 1), pod("die", 1)}, "start die"},
		"again in the same pod":    {[]event{log("start", 1), pod("die", 1), pod("start", 1), pod("die", 1), log("die", 1)}, "start die start die"},
		"all of it before the log": {[]event{pod("start", 1), pod("die", 1), log("start", 1), log("die", 1)}, "start die"},
		"the next run overtakes":   {[]event{log("start", 1), pod("die", 1), pod("start", 2), log("die", 1), log("start", 2), log("die", 2)}, "start die start die"},
		"joined in the middle":     {[]event{pod("die", 3), log("die", 3), log("destroy", 3)}, "die destroy"},
	} {
		o := eventWriter{wanted: &dockerhttp.EventsRequest{}, w: httptest.NewRecorder(), lives: map[string]life{}}
		var got []string
		for i := range test.come {
			if !o.known(&test.come[i]) {
				got = append(got, string(test.come[i].Action))
			}
		}
		if said := strings.Join(got, " "); said != test.want {
			t.Errorf("%s: %s, want %s", name, said, test.want)
		}
	}
}

// A variableStore has Nomad's place: variables, and lists of them that wait for a change.
type variableStore struct {
	mu      sync.Mutex
	index   uint64
	byPath  map[string]*api.Variable
	changed chan struct{}
	down    bool
}

func newVariableStore() *variableStore {
	return &variableStore{index: 10, byPath: map[string]*api.Variable{}, changed: make(chan struct{})}
}

func (v *variableStore) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	v.mu.Lock()
	defer v.mu.Unlock()
	path, one := strings.CutPrefix(r.URL.Path, "/v1/var/")
	switch {
	case v.down:
		http.Error(w, "No cluster leader", http.StatusInternalServerError)
	case one && r.Method == http.MethodPut:
		var made api.Variable
		if err := json.NewDecoder(r.Body).Decode(&made); err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		v.index++
		made.Path, made.ModifyIndex = path, v.index
		v.byPath[path] = &made
		v.change()
		_ = json.NewEncoder(w).Encode(made)
	case one && r.Method == http.MethodDelete:
		v.index++
		delete(v.byPath, path)
		v.change()
	case one:
		if v.byPath[path] == nil {
			http.Error(w, "variable not found", http.StatusNotFound)
			return
		}
		_ = json.NewEncoder(w).Encode(v.byPath[path])
	case r.URL.Path == "/v1/vars":
		wait, _ := strconv.ParseUint(r.URL.Query().Get("index"), 10, 64)
		for v.index <= wait {
			changed := v.changed
			v.mu.Unlock()
			select {
			case <-changed:
			case <-r.Context().Done():
			}
			v.mu.Lock()
			if r.Context().Err() != nil {
				return
			}
		}
		all := []*api.VariableMetadata{}
		for _, path := range slices.Sorted(maps.Keys(v.byPath)) {
			if strings.HasPrefix(path, r.URL.Query().Get("prefix")) {
				all = append(all, &api.VariableMetadata{Path: path, ModifyIndex: v.byPath[path].ModifyIndex})
			}
		}
		w.Header().Set("X-Nomad-Index", strconv.FormatUint(v.index, 10))
		_ = json.NewEncoder(w).Encode(all)
	default:
		v.mu.Unlock()
		answerNothing(w, r)
		v.mu.Lock()
	}
}

func (v *variableStore) change() {
	close(v.changed)
	v.changed = make(chan struct{})
}

// logged are two servers' tenants with one Nomad.
func logged(t *testing.T, v *variableStore) (a, b *tenant) {
	t.Helper()
	made := func() *tenant {
		client, err := api.NewClient(nomadOf(t, v.ServeHTTP))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(client.Close)
		return &tenant{nomad: client, log: newEventLog()}
	}
	return made(), made()
}

func actionEvent(n int) event {
	return event{Message: events.Message{Type: "image", Action: events.Action(strconv.Itoa(n)), Actor: events.Actor{ID: strings.Repeat("x", 100)}}}
}

// What one server has written another one reads, each event once, in order; and not more is kept than there are segments for.
func TestEventLog(t *testing.T) {
	v := newVariableStore()
	a, b := logged(t, v)
	ctx := t.Context()
	write := func(t_ *tenant, from, to int) {
		t.Helper()
		for n := from; n < to; n++ {
			t_.emit(actionEvent(n))
		}
		if err := t_.flushEvents(ctx); err != nil {
			t.Fatal(err)
		}
	}
	write(a, 0, 3)
	reader := &eventReader{tenant: b}
	next := 0
	read := func() {
		t.Helper()
		some, err := reader.read(ctx)
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range some {
			if e.Action != events.Action(strconv.Itoa(next)) || e.Time == 0 {
				t.Fatalf("read %s at %d, want %d", e.Action, e.Time, next)
			}
			next++
		}
	}
	read()
	for _, turn := range []struct {
		by *tenant
		to int
	}{{a, 5}, {b, 8}, {a, 70}, {b, 300}} {
		write(turn.by, next, turn.to)
		if read(); next != turn.to {
			t.Fatalf("%d events of %d are read", next, turn.to)
		}
	}
	write(a, 300, 300+segments*segmentEvents*2)
	all, err := (&eventReader{tenant: b}).read(ctx)
	if err != nil || len(v.byPath) != segments || len(all) < (segments-1)*segmentEvents {
		t.Errorf("%d segments with %d events are kept, %v", len(v.byPath), len(all), err)
	}
}

// What can't be written is written later, and not twice.
func TestEventLogWhileNomadIsDown(t *testing.T) {
	v := newVariableStore()
	a, b := logged(t, v)
	for n := range 200 {
		v.down = n%70 == 69 || n == 199
		a.emit(actionEvent(n))
		if err := a.flushEvents(t.Context()); (err != nil) != v.down {
			t.Fatal(err)
		}
	}
	v.down = false
	if err := a.flushEvents(t.Context()); err != nil { // of what was emitted before
		t.Fatal(err)
	}
	all, err := (&eventReader{tenant: b}).read(t.Context())
	if err != nil || len(all) != 200 {
		t.Fatalf("%d events, %v", len(all), err)
	}
	for n, e := range all {
		if e.Action != events.Action(strconv.Itoa(n)) {
			t.Fatalf("event %d is %s", n, e.Action)
		}
	}
}

// A client that joins is told nothing of the past, and all that follows, through whatever server; one that asks for the past is told that.
func TestEventsRoute(t *testing.T) {
	v := newVariableStore()
	a, _ := logged(t, v)
	write := func(n int) {
		t.Helper()
		a.emit(actionEvent(n))
		if err := a.flushEvents(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	write(0)
	socket := startUnix(t, Config{Nomad: nomadOf(t, v.ServeHTTP)})
	client := &http.Client{Transport: &http.Transport{DialContext: func(context.Context, string, string) (net.Conn, error) {
		return net.Dial("unix", socket)
	}}}
	t.Cleanup(client.CloseIdleConnections)
	ask := func(ctx context.Context, query string) *json.Decoder {
		t.Helper()
		r, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://docker/events?"+query, nil)
		if err != nil {
			t.Fatal(err)
		}
		answer, err := client.Do(r)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { answer.Body.Close() })
		if answer.StatusCode != http.StatusOK {
			t.Fatalf("%s: %s", query, answer.Status)
		}
		return json.NewDecoder(answer.Body)
	}
	next := func(d *json.Decoder) string {
		t.Helper()
		var m events.Message
		if err := d.Decode(&m); err != nil {
			return err.Error()
		}
		return string(m.Action)
	}
	past := ask(t.Context(), fmt.Sprintf("since=1&until=%d", time.Now().Unix()+1))
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	live, some := ask(ctx, ""), ask(ctx, "filters="+url.QueryEscape(`{"event":["2"]}`))
	if got := next(past); got != "0" {
		t.Errorf("the past is %s", got)
	}
	write(1)
	write(2)
	if one, two := next(live), next(live); one != "1" || two != "2" {
		t.Errorf("what happens is %s and %s", one, two)
	}
	if got := next(some); got != "2" {
		t.Errorf("of event 2 alone is told %s", got)
	}
}

// A signal is in the log, for every server, before it is sent.
func TestEmitKill(t *testing.T) {
	a, b := logged(t, newVariableStore())
	a.emitKill(t.Context(), &record{Config: &container.Config{}}, unix.SIGKILL)
	all, err := (&eventReader{tenant: b}).read(t.Context())
	if err != nil || len(all) != 1 || all[0].Action != events.ActionKill {
		t.Errorf("the log has %v, %v", all, err)
	}
}

// Whether a pod's clock is behind or ahead, its events are told after what came before by the server's, and in their order.
func TestPodClock(t *testing.T) {
	begin := time.Now()
	for _, skew := range []time.Duration{-time.Hour, -200 * time.Millisecond, 0, time.Second} {
		clock := newPodClock()
		last := begin.UnixNano()
		for i, took := range []int{300, 20, 2, 90, 1, 5} { // milliseconds on its way
			happened := begin.Add(time.Duration(i+1) * 300 * time.Millisecond)
			came := happened.Add(time.Duration(took) * time.Millisecond)
			e := event{Message: events.Message{TimeNano: happened.Add(skew).UnixNano()}}
			clock.correct(&e, came)
			if e.TimeNano < happened.UnixNano() || e.TimeNano > came.UnixNano() || e.TimeNano < last || e.Time != e.TimeNano/1e9 {
				t.Errorf("clock of %v: event %d of %v that came at %v is told at %v", skew, i, happened, came, time.Unix(0, e.TimeNano))
			}
			last = e.TimeNano
		}
	}
}

func TestSignals(t *testing.T) {
	for text, want := range map[string]unix.Signal{
		"": 1, "KILL": 9, "sigterm": 15, "28": 28, "RTMIN": 34, "SIGRTMIN+3": 37, "rtmax-1": 63, "0": 1, "65": 1, "RTMIN-1": 1, "RTMAX+1": 1, "ODD": 1,
	} {
		if got := signalOf(text, 1); got != want {
			t.Errorf("%q is %d, want %d", text, got, want)
		}
	}
}
