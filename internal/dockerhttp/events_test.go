package dockerhttp

import (
	"encoding/json"
	"net/http/httptest"
	"net/url"
	"testing"

	"github.com/moby/moby/api/types/events"
)

func TestEventFilters(t *testing.T) {
	container := events.Message{Type: "container", Action: "exec_start: sh -c true", Actor: events.Actor{ID: "abcdef", Attributes: map[string]string{
		"image": "registry:5000/app:1", "name": "web", "tier": "front",
	}}}
	image := events.Message{Type: "image", Action: "pull", Actor: events.Actor{ID: "busybox:latest", Attributes: map[string]string{"name": "busybox"}}}
	for _, test := range []struct {
		filters          string
		container, image bool
	}{
		{`{}`, true, true},
		{`{"type":["container"]}`, true, false},
		{`{"event":["exec_start"]}`, true, false},
		{`{"event":["exec"]}`, false, false},
		{`{"event":["pull","die"]}`, false, true},
		{`{"container":["we"]}`, true, false}, // the beginning is enough, as with docker
		{`{"container":["abc"]}`, true, false},
		{`{"container":["other"]}`, false, false},
		{`{"image":["registry:5000/app"]}`, true, false},
		{`{"image":["registry:5000/app:1"]}`, true, false},
		{`{"image":["registry:5000/app:2"]}`, false, false},
		{`{"image":["busybox"]}`, false, true},
		{`{"label":["tier"]}`, true, false},
		{`{"label":["tier=back"]}`, false, false},
		{`{"scope":["local"]}`, true, true},
		{`{"scope":["swarm"]}`, false, false},
		{`{"volume":["data"]}`, false, false},
	} {
		e, err := ParseEvents(httptest.NewRequest("GET", "/events?filters="+url.QueryEscape(test.filters), nil))
		if err != nil {
			t.Errorf("%s: %v", test.filters, err)
			continue
		}
		if got := e.Wants(&container); got != test.container {
			t.Errorf("%s: of the container %v", test.filters, got)
		}
		if got := e.Wants(&image); got != test.image {
			t.Errorf("%s: of the image %v", test.filters, got)
		}
	}
	for _, query := range []string{"since=2&until=1", "since=x", "until=x", "filters=%7B%22x%22%3A%5B%5D%7D"} {
		if _, err := ParseEvents(httptest.NewRequest("GET", "/events?"+query, nil)); !isInvalid(err) {
			t.Errorf("%s: %v", query, err)
		}
	}
}

// Old clients read status, id and from.
func TestOldEvent(t *testing.T) {
	for _, test := range []struct {
		m    events.Message
		want string
	}{
		{
			events.Message{Type: "container", Action: "die", Scope: "local", Time: 1, TimeNano: 1e9, Actor: events.Actor{ID: "x", Attributes: map[string]string{"image": "app"}}},
			`{"status":"die","id":"x","from":"app","Type":"container","Action":"die","Actor":{"ID":"x","Attributes":{"image":"app"}},"scope":"local","time":1,"timeNano":1000000000}`,
		},
		{
			events.Message{Type: "network", Action: "connect", Actor: events.Actor{ID: "n"}},
			`{"Type":"network","Action":"connect","Actor":{"ID":"n","Attributes":null}}`,
		},
	} {
		if got, err := json.Marshal(NewEvent(test.m)); err != nil || string(got) != test.want {
			t.Errorf("%s, %v; want %s", got, err, test.want)
		}
	}
}
