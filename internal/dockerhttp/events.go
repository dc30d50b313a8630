package dockerhttp

import (
	"cmp"
	"net/http"
	"strings"
	"time"

	"github.com/moby/moby/api/types/events"
)

// An Event is docker's message with what it had before version 1.22 as well, which old clients still print.
type Event struct {
	Status string `json:"status,omitempty"`
	ID     string `json:"id,omitempty"`
	From   string `json:"from,omitempty"`
	events.Message
}

// NewEvent is a message as GET /events sends it.
func NewEvent(m events.Message) Event {
	e := Event{Message: m}
	switch m.Type {
	case events.ContainerEventType:
		e.Status, e.ID, e.From = string(m.Action), m.Actor.ID, m.Actor.Attributes["image"]
	case events.ImageEventType:
		e.Status, e.ID = string(m.Action), m.Actor.ID
	}
	return e
}

// An EventsRequest is what GET /events asks for.
type EventsRequest struct {
	Since, Until time.Time // zero: none
	Filters      Filters
}

// ParseEvents reads the parameters of GET /events.
func ParseEvents(r *http.Request) (*EventsRequest, error) {
	e := &EventsRequest{}
	var err error
	if e.Filters, err = ParseFilters(r, append(eventNames, "type", "event", "image", "label", "scope")...); err != nil {
		return nil, err
	}
	if e.Since, err = ParseTime(Parameter(r, "since")); err != nil {
		return nil, Invalid("since: %v", err)
	}
	if e.Until, err = ParseTime(Parameter(r, "until")); err != nil {
		return nil, Invalid("until: %v", err)
	}
	if !e.Until.IsZero() && e.Until.Before(e.Since) {
		return nil, Invalid("`since` time (%s) cannot be after `until` time (%s)", Parameter(r, "since"), Parameter(r, "until"))
	}
	return e, nil
}

// eventNames are filters by the beginning of an id or name, of whatever type the event is (moby daemon/events/filter.go).
var eventNames = []string{"container", "daemon", "network", "volume", "plugin", "service", "node", "secret", "config"}

// Wants tells whether the filters let an event through, whenever it was.
func (e *EventsRequest) Wants(m *events.Message) bool {
	return e.WantsAction(m.Action) && e.WantsActor(m)
}

// WantsAction tells whether the filter event lets an action through. exec_start and its like stand for all that follows the colon.
func (e *EventsRequest) WantsAction(a events.Action) bool {
	return e.Filters.Any("event", func(v string) bool { return string(a) == v || strings.HasPrefix(string(a), v+":") })
}

// WantsActor tells whether all filters but the one for actions let an event through.
func (e *EventsRequest) WantsActor(m *events.Message) bool {
	f := e.Filters
	for _, kind := range eventNames {
		if !f.Any(kind, func(v string) bool {
			return strings.HasPrefix(m.Actor.ID, v) || strings.HasPrefix(m.Actor.Attributes["name"], v)
		}) {
			return false
		}
	}
	image := m.Actor.Attributes["image"]
	if m.Type == events.ImageEventType {
		image = m.Actor.Attributes["name"]
	}
	return f.Any("type", func(v string) bool { return v == string(m.Type) }) &&
		f.Any("scope", func(v string) bool { return v == cmp.Or(m.Scope, "local") }) &&
		f.Any("image", func(v string) bool {
			return v == image || v == withoutTag(image) || v == m.Actor.ID || v == withoutTag(m.Actor.ID)
		}) &&
		f.Labels("label", m.Actor.Attributes, false)
}

// withoutTag takes tag and digest off an image's name.
func withoutTag(name string) string {
	name, _, _ = strings.Cut(name, "@")
	if i := strings.LastIndexByte(name, ':'); i > strings.LastIndexByte(name, '/') {
		name = name[:i]
	}
	return name
}
