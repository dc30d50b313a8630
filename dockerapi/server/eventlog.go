package server

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"sync"
	"time"

	"github.com/hashicorp/nomad/api"
	"github.com/moby/moby/api/types/events"
)

// What clients have done through any server, and what became of containers, is a log in Nomad variables: docker events reads it. Nobody writes to
// another one's segment, so nobody waits for anybody.
const (
	eventsPrefix = "docker/events/" // + when a segment was begun and whose it is
	eventsItem   = "events"
)

// Bounds of the log.
const (
	segmentEvents = 64       // after which a segment is full
	segmentBytes  = 24 << 10 // or so many of its text, which is below a variable's 64 KiB by far more than an event has
	segments      = 16       // that are kept
	pendingEvents = 4096     // that are kept while Nomad can't be written to
)

// eventDelay is how long an event waits for others, to be written with them.
const eventDelay = 50 * time.Millisecond

// An event is docker's message, with what tells whether two of a container's starts and ends are the same.
type event struct {
	events.Message
	Run int    `json:"run,omitempty"` // of the container
	In  string `json:"in,omitempty"`  // the container that it has joined, by its id

	inside bool // the pod has told it
}

// An eventLog writes the events of one server's.
type eventLog struct {
	wake chan struct{}

	mu      sync.Mutex
	pending []event

	writing sync.Mutex // holds what follows
	path    string
	segment []json.RawMessage
	size    int
	late    bool // the segment has events that could not be written yet
}

func newEventLog() *eventLog { return &eventLog{wake: make(chan struct{}, 1)} }

// emit tells of what has happened. Now is when, where nothing else is said.
func (t *tenant) emit(all ...event) {
	l := t.log
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, m := range all {
		m.Scope = "local"
		if m.TimeNano == 0 {
			m.TimeNano = time.Now().UnixNano()
		}
		m.Time = m.TimeNano / int64(time.Second)
		l.pending = append(l.pending, m)
	}
	l.bound()
	select {
	case l.wake <- struct{}{}:
	default:
	}
}

// bound forgets the oldest of too many.
func (l *eventLog) bound() {
	if n := len(l.pending) - pendingEvents; n > 0 {
		l.pending = slices.Delete(l.pending, 0, n)
	}
}

// writeEvents writes what there is to be written until ctx ends, and once more then.
func (t *tenant) writeEvents(ctx context.Context) {
	wait := func(d time.Duration) {
		select {
		case <-ctx.Done():
		case <-time.After(d):
		}
	}
	for ctx.Err() == nil {
		select {
		case <-ctx.Done():
		case <-t.log.wake:
			wait(eventDelay)
		}
		last, cancel := context.WithTimeout(context.WithoutCancel(ctx), drainTimeout)
		if err := t.flushEvents(last); err != nil && ctx.Err() == nil {
			t.server.Log.Warn("write events", "namespace", t.Namespace, "error", err)
			wait(drainTimeout)
			select {
			case t.log.wake <- struct{}{}:
			default:
			}
		}
		cancel()
	}
}

// flushEvents writes what has been emitted so far. What can't be written is so the next time, but for what Nomad refuses.
func (t *tenant) flushEvents(ctx context.Context) error {
	l := t.log
	l.writing.Lock()
	defer l.writing.Unlock()
	l.mu.Lock()
	pending := l.pending
	l.pending = nil
	l.mu.Unlock()
	for n, m := range pending {
		data, err := json.Marshal(m)
		if err != nil {
			return err
		}
		full := len(l.segment) > 0 && (len(l.segment) == segmentEvents || l.size+len(data) > segmentBytes)
		if full {
			if err := t.writeSegment(ctx); err != nil {
				return t.keepEvents(pending[n:], err)
			}
			l.path, l.segment, l.size = "", nil, 0
		}
		l.segment, l.size = append(l.segment, data), l.size+len(data)
	}
	if len(pending) == 0 && !l.late {
		return nil
	}
	return t.keepEvents(nil, t.writeSegment(ctx))
}

// keepEvents has events written the next time.
func (t *tenant) keepEvents(unwritten []event, err error) error {
	t.log.late = err != nil && !isStatus(err, http.StatusForbidden)
	if !t.log.late {
		return err
	}
	t.log.mu.Lock()
	defer t.log.mu.Unlock()
	t.log.pending = slices.Concat(unwritten, t.log.pending)
	t.log.bound()
	return err
}

// writeSegment writes the newest segment, and removes the oldest when it is new.
func (t *tenant) writeSegment(ctx context.Context) error {
	l := t.log
	begun := l.path == ""
	if begun {
		var own [8]byte
		_, _ = rand.Read(own[:]) // never fails
		l.path = fmt.Sprintf("%s%020d-%s", eventsPrefix, time.Now().UnixNano(), hex.EncodeToString(own[:]))
	}
	text, err := json.Marshal(l.segment)
	if err != nil {
		return err
	}
	if _, _, err := t.nomad.Variables().Update(&api.Variable{Path: l.path, Items: api.VariableItems{eventsItem: string(text)}}, t.write(ctx)); err != nil {
		return err
	}
	if !begun {
		return nil
	}
	all, _, err := t.nomad.Variables().PrefixList(eventsPrefix, t.query(ctx)) // by path, and so by time
	if err != nil {
		return err
	}
	for i := range max(0, len(all)-segments) {
		if _, err := t.nomad.Variables().Delete(all[i].Path, t.write(ctx)); err != nil {
			return err
		}
	}
	return nil
}

// An eventReader reads the log.
type eventReader struct {
	tenant *tenant
	seen   map[string]segmentSeen
}

// A segmentSeen is how far a segment was read.
type segmentSeen struct {
	index  uint64 // the variable's
	events int
}

// read gives what is new in the log, by time: all of it the first time.
func (r *eventReader) read(ctx context.Context) ([]event, error) {
	t := r.tenant
	all, _, err := t.nomad.Variables().PrefixList(eventsPrefix, t.query(ctx))
	if err != nil {
		return nil, err
	}
	var found []event
	seen := map[string]segmentSeen{}
	for _, v := range all {
		s := r.seen[v.Path]
		if s.index != v.ModifyIndex {
			segment, err := t.segment(ctx, v.Path)
			if errors.Is(err, api.ErrVariablePathNotFound) {
				continue
			}
			if err != nil {
				return nil, err
			}
			found = append(found, segment[min(s.events, len(segment)):]...)
			s = segmentSeen{v.ModifyIndex, len(segment)}
		}
		seen[v.Path] = s
	}
	r.seen = seen
	slices.SortStableFunc(found, byTime)
	return found, nil
}

// watchLog tells at once, and whenever the log has changed, that it is to be read. What Nomad answers it with is not: its index may be of a later change.
func (t *tenant) watchLog(ctx context.Context, changed chan<- struct{}) {
	index := uint64(0)
	for ctx.Err() == nil {
		q := t.query(ctx)
		q.WaitIndex = index
		_, meta, err := t.nomad.Variables().PrefixList(eventsPrefix, q)
		if err != nil {
			select {
			case <-ctx.Done():
			case <-time.After(streamRetry):
			}
			continue
		}
		if now := max(meta.LastIndex, 1); now != index {
			index = now
			select {
			case changed <- struct{}{}:
			case <-ctx.Done():
			}
		}
	}
}

func byTime(a, b event) int { return int(min(max(a.TimeNano-b.TimeNano, -1), 1)) }

func (t *tenant) segment(ctx context.Context, path string) (all []event, err error) {
	v, _, err := t.nomad.Variables().Read(path, t.query(ctx))
	if err != nil {
		return nil, err
	}
	if err := json.Unmarshal([]byte(v.Items[eventsItem]), &all); err != nil {
		return nil, fmt.Errorf("variable %s: %w", path, err)
	}
	return all, nil
}

// emitContainer tells of something that has happened to a container now, with more attributes than it always has.
func (t *tenant) emitContainer(r *record, action events.Action, more map[string]string) {
	t.emit(containerEvent(r, action, more))
}

func containerEvent(r *record, action events.Action, more map[string]string) event {
	all := map[string]string{}
	maps.Copy(all, r.Config.Labels)
	all["image"], all["name"] = r.Config.Image, r.Name
	maps.Copy(all, more)
	return event{Message: events.Message{Type: events.ContainerEventType, Action: action, Actor: events.Actor{ID: r.ID, Attributes: all}}, Run: r.Run, In: r.Joins}
}
