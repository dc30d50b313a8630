package guest

import (
	"context"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/cradlestack/cradlestack/spec"
)

// A script is what a unit's starts do, one after the other; the last one again and again.
type script []struct {
	takes time.Duration
	outcome
}

// crewOf makes a crew whose units follow scripts; the times of their starts are noted.
func crewOf(t *testing.T, units map[string]spec.Lifecycle, scripts map[string]script) (*crew, map[string]*[]time.Duration) {
	t.Helper()
	c := newCrew()
	begin := time.Now()
	starts := make(map[string]*[]time.Duration)
	var names []string
	for name := range units {
		names = append(names, name)
	}
	slices.Sort(names)
	for _, name := range names {
		u := &unit{name: name, rule: units[name]}
		var at []time.Duration
		starts[name] = &at
		u.run = func(context.Context) outcome {
			c.mu.Lock()
			at = append(at, time.Since(begin))
			c.mu.Unlock()
			steps := scripts[name]
			step := steps[min(len(at), len(steps))-1]
			if step.reason != "" {
				return step.outcome
			}
			c.mu.Lock()
			c.up(u)
			c.mu.Unlock()
			select {
			case <-time.After(step.takes):
				return step.outcome
			case <-c.over:
				return outcome{code: 143}
			}
		}
		c.units = append(c.units, u)
	}
	return c, starts
}

func after(name, until string) []spec.After { return []spec.After{{Container: name, Until: until}} }

func TestLifecycle(t *testing.T) {
	const second = time.Second
	ends := func(takes time.Duration, codes ...int) script {
		var s script
		for _, code := range codes {
			s = append(s, struct {
				takes time.Duration
				outcome
			}{takes, outcome{code: code}})
		}
		return s
	}
	for _, x := range []struct {
		name    string
		units   map[string]spec.Lifecycle
		scripts map[string]script
		code    int
		reason  string
		ended   time.Duration // since the beginning
		starts  map[string][]time.Duration
	}{
		{
			name:    "the last one's end",
			units:   map[string]spec.Lifecycle{"a": {}, "b": {}},
			scripts: map[string]script{"a": ends(second, 3), "b": ends(2*second, 4)},
			code:    4, ended: 2 * second,
		},
		{
			name:    "the critical one's end",
			units:   map[string]spec.Lifecycle{"a": {Critical: true}, "b": {RestartOnFailure: true}},
			scripts: map[string]script{"a": ends(second, 3), "b": ends(time.Hour, 4)},
			code:    3, ended: second, starts: map[string][]time.Duration{"b": {0}},
		},
		{
			name:    "in order",
			units:   map[string]spec.Lifecycle{"a": {}, "b": {After: after("a", "exited")}, "c": {After: after("b", "")}},
			scripts: map[string]script{"a": ends(second, 0), "b": ends(second, 0), "c": ends(second, 0)},
			ended:   2 * second, starts: map[string][]time.Duration{"b": {second}, "c": {second}},
		},
		{
			name:    "what it waits for fails",
			units:   map[string]spec.Lifecycle{"a": {}, "b": {After: after("a", "exited")}},
			scripts: map[string]script{"a": ends(second, 1)},
			code:    125, reason: "waits for a, which ended with 1 before it came that far", ended: second,
		},
		{
			name:    "what it waits for is never healthy",
			units:   map[string]spec.Lifecycle{"a": {}, "b": {After: after("a", "healthy"), Critical: true}},
			scripts: map[string]script{"a": ends(second, 0)},
			code:    125, reason: "waits for a, which ended with 0 before it came that far", ended: second,
		},
		{
			name:   "what it waits for is not there",
			units:  map[string]spec.Lifecycle{"b": {After: after("a", "")}},
			code:   125,
			reason: "waits for a, which is not in the pod",
		},
		{
			name:    "docker's back-off",
			units:   map[string]spec.Lifecycle{"a": {RestartOnFailure: true, MaxStarts: 5}},
			scripts: map[string]script{"a": ends(0, 1)},
			code:    1, ended: 1500 * time.Millisecond,
			starts: map[string][]time.Duration{"a": {0, 100 * time.Millisecond, 300 * time.Millisecond, 700 * time.Millisecond, 1500 * time.Millisecond}},
		},
		{
			name:    "a steady run begins the back-off anew",
			units:   map[string]spec.Lifecycle{"a": {RestartOnFailure: true, MaxStarts: 4}},
			scripts: map[string]script{"a": {{0, outcome{code: 1}}, {0, outcome{code: 1}}, {10 * second, outcome{code: 1}}, {0, outcome{code: 1}}}},
			code:    1, ended: 10*second + 400*time.Millisecond,
			starts: map[string][]time.Duration{"a": {0, 100 * time.Millisecond, 300 * time.Millisecond, 10*second + 400*time.Millisecond}},
		},
		{
			name:    "a delay of its own, until it succeeds",
			units:   map[string]spec.Lifecycle{"a": {RestartOnFailure: true, RestartDelay: spec.Duration(5 * second)}},
			scripts: map[string]script{"a": ends(second, 1, 1, 0)},
			ended:   13 * second, starts: map[string][]time.Duration{"a": {0, 6 * second, 12 * second}},
		},
		{
			name:    "restart on success, the first start counts",
			units:   map[string]spec.Lifecycle{"a": {RestartOnSuccess: true, RestartDelay: spec.Duration(second), MaxStarts: 2}},
			scripts: map[string]script{"a": ends(0, 0)},
			ended:   second, starts: map[string][]time.Duration{"a": {0, second}},
		},
		{
			name:    "what can't start is not tried again",
			units:   map[string]spec.Lifecycle{"a": {RestartOnFailure: true}},
			scripts: map[string]script{"a": {{0, outcome{127, "not found"}}}},
			code:    127, reason: "not found", starts: map[string][]time.Duration{"a": {0}},
		},
		{
			name:    "the pod's end ends waiting and delays",
			units:   map[string]spec.Lifecycle{"a": {Critical: true}, "b": {RestartOnFailure: true, RestartDelay: spec.Duration(time.Hour)}, "c": {After: after("b", "healthy")}},
			scripts: map[string]script{"a": ends(second, 0), "b": ends(0, 1)},
			ended:   second, starts: map[string][]time.Duration{"b": {0}, "c": nil},
		},
	} {
		t.Run(x.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				begin := time.Now()
				c, starts := crewOf(t, x.units, x.scripts)
				c.begin()
				<-c.ended
				if took := time.Since(begin); took != x.ended {
					t.Errorf("ended after %s, want %s", took, x.ended)
				}
				if c.code != x.code || c.reason != x.reason {
					t.Errorf("ended with %d, %q, want %d, %q", c.code, c.reason, x.code, x.reason)
				}
				for name, want := range x.starts {
					if got := *starts[name]; !slices.Equal(got, want) {
						t.Errorf("%s started at %v, want %v", name, got, want)
					}
				}
			})
		})
	}
}

func TestLifecycleByHand(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, starts := crewOf(t,
			map[string]spec.Lifecycle{"a": {RestartOnFailure: true, RestartDelay: spec.Duration(time.Hour)}, "keep": {Critical: true}},
			map[string]script{"a": {{time.Second, outcome{code: 1}}}, "keep": {{2 * time.Hour, outcome{}}}})
		a := c.units[0]
		do := func(f func()) {
			c.mu.Lock()
			f()
			c.change()
			c.mu.Unlock()
			synctest.Wait()
		}
		is := func(wrong string, right func() bool) {
			t.Helper()
			c.mu.Lock()
			defer c.mu.Unlock()
			if !right() {
				t.Errorf("%s: starts at %v", wrong, *starts["a"])
			}
		}
		c.begin()
		time.Sleep(2 * time.Second)
		is("does not wait for its delay", func() bool { return a.restarting })
		do(func() { a.again = true })
		is("a restart by hand waits for the delay", func() bool { return a.running && len(*starts["a"]) == 2 })
		do(func() { a.halt = true })
		time.Sleep(2 * time.Hour / 3)
		is("started again after it was stopped by hand", func() bool { return !a.active && len(*starts["a"]) == 2 })
		do(func() { c.revive(a) })
		is("was not started by hand", func() bool { return a.running && len(*starts["a"]) == 3 })
		<-c.ended
	})
}

// A held container starts when somebody asks for it, or else after its time; once only.
func TestLifecycleHold(t *testing.T) {
	for _, release := range []time.Duration{time.Second, time.Hour} {
		synctest.Test(t, func(t *testing.T) {
			c, starts := crewOf(t,
				map[string]spec.Lifecycle{"a": {Hold: spec.Duration(time.Minute), RestartOnFailure: true, MaxStarts: 2, RestartDelay: spec.Duration(time.Second)}},
				map[string]script{"a": {{time.Second, outcome{code: 1}}, {0, outcome{}}}})
			c.begin()
			time.Sleep(release)
			c.mu.Lock()
			c.units[0].released = true
			c.change()
			c.mu.Unlock()
			<-c.ended
			first := min(release, time.Minute)
			if want := []time.Duration{first, first + 2*time.Second}; !slices.Equal(*starts["a"], want) {
				t.Errorf("released after %v: started at %v, want %v", release, *starts["a"], want)
			}
		})
	}
}

func TestLifecycleHealthy(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, starts := crewOf(t, map[string]spec.Lifecycle{"a": {}, "b": {After: after("a", "healthy")}},
			map[string]script{"a": {{time.Minute, outcome{}}}, "b": {{0, outcome{}}}})
		c.begin()
		time.Sleep(time.Second)
		c.mu.Lock()
		if len(*starts["b"]) != 0 {
			t.Error("started before the other was healthy")
		}
		c.units[0].healthy = true
		c.change()
		c.mu.Unlock()
		<-c.ended
		if !slices.Equal(*starts["b"], []time.Duration{time.Second}) {
			t.Errorf("started at %v", *starts["b"])
		}
	})
}

func TestHealthRules(t *testing.T) {
	r := newHealthRules(&spec.Healthcheck{StartPeriod: spec.Duration(10 * time.Second), Retries: 2})
	h := &Health{Status: HealthStarting}
	if got := []time.Duration{r.wait(h.Status, 0), r.wait(h.Status, 10*time.Second), r.wait(HealthHealthy, 0)}; !slices.Equal(got, []time.Duration{5 * time.Second, 30 * time.Second, 30 * time.Second}) {
		t.Errorf("intervals %v", got)
	}
	var seen []string
	for _, p := range []struct {
		code  int
		since time.Duration
	}{{1, 1 * time.Second}, {1, 9 * time.Second}, {1, 11 * time.Second}, {0, 12 * time.Second}, {1, 13 * time.Second}, {-1, 14 * time.Second}, {0, 15 * time.Second}} {
		r.apply(h, Probe{ExitCode: p.code}, p.since)
		seen = append(seen, h.Status)
	}
	if want := "starting starting starting healthy healthy unhealthy healthy"; strings.Join(seen, " ") != want {
		t.Errorf("states %v, want %s", seen, want)
	}
	if len(h.Log) != 5 || h.FailingStreak != 0 {
		t.Errorf("log of %d, streak %d", len(h.Log), h.FailingStreak)
	}
}

func TestEvents(t *testing.T) {
	var b bus
	at := func(n int) time.Time { return time.Unix(int64(n), 0) }
	for i := range eventHistory + 10 {
		b.emit(Event{Action: "x", Time: at(i + 1)})
	}
	past, live, cancel := b.subscribe(at(1))
	if len(past) != eventHistory || !past[0].Time.Equal(at(11)) {
		t.Errorf("%d past events from %v", len(past), past[0].Time)
	}
	b.emit(Event{Action: "new"})
	if e := <-live; e.Action != "new" {
		t.Errorf("live event %+v", e)
	}
	for range eventBacklog + 1 {
		b.emit(Event{})
	}
	n := 0
	for range live {
		n++
	}
	if n != eventBacklog {
		t.Errorf("a slow subscriber got %d events before it was cut off", n)
	}
	cancel()
	if past, _, cancel := b.subscribe(time.Time{}); len(past) != 0 {
		t.Errorf("%d past events without since", len(past))
	} else {
		cancel()
	}
}

// A guest does not keep the pod from ending, and its end is not the pod's.
func TestCrewGuests(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, starts := crewOf(t, map[string]spec.Lifecycle{"own": {}}, map[string]script{"own": {{takes: 10 * time.Second, outcome: outcome{code: 3}}}})
		c.begin()
		runs := 0
		var u *unit
		u = &unit{name: "guest", guest: true, rule: spec.Lifecycle{Hold: spec.Duration(time.Hour), Critical: true}, run: func(context.Context) outcome {
			c.mu.Lock()
			runs++
			c.up(u)
			c.mu.Unlock()
			select {
			case <-time.After(time.Second):
			case <-c.over:
			}
			return outcome{code: 9}
		}}
		if !c.add(u) {
			t.Fatal("it was not admitted")
		}
		time.Sleep(time.Second)
		if runs != 0 {
			t.Fatal("it was not held")
		}
		release := func() {
			c.mu.Lock()
			u.released = true
			c.change()
			c.mu.Unlock()
		}
		release()
		time.Sleep(2 * time.Second)
		c.mu.Lock()
		if u.active || c.stopping || !c.rearm(u) {
			t.Errorf("after its end: active %v, the pod ends %v", u.active, c.stopping)
		}
		c.mu.Unlock()
		time.Sleep(time.Second)
		if runs != 1 {
			t.Errorf("it has run %d times, and was to be held", runs)
		}
		time.Sleep(5500 * time.Millisecond)
		release() // half a second before the pod's end
		<-c.ended
		if c.code != 3 || runs != 2 || len(*starts["own"]) != 1 {
			t.Errorf("the pod ended with %d, the guest ran %d times", c.code, runs)
		}
		if c.add(&unit{name: "late", guest: true}) {
			t.Error("a pod that has ended has admitted one")
		}
	})
}
