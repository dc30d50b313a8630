package api

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"testing"

	"github.com/cradlestack/cradlestack/csi-plugin/volume"
)

// What a filer refuses a caller can tell apart, as if it had asked the volumes itself.
func TestErrors(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	refuse := errors.New("nothing yet")
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/volumes/broken/stats":
			w.WriteHeader(http.StatusBadGateway)
			return
		case "/volumes/lapsed/stats": // as who has the lease says it, of any protocol
			http.Error(w, "another filer serves", http.StatusServiceUnavailable)
			return
		case "/volumes/cut/stats":
			panic(http.ErrAbortHandler)
		}
		body, code := Explain(refuse)
		w.WriteHeader(code)
		_ = json.NewEncoder(w).Encode(body)
	})}
	done := make(chan error)
	go func() { done <- server.Serve(l) }()
	c := Client{Socket: socket}
	sentinels := 0
	for _, is := range []error{
		volume.ErrNotFound, volume.ErrExists, volume.ErrInUse, volume.ErrNoSpace, volume.ErrInvalid, volume.ErrForeign, volume.ErrUnavailable, ErrDenied,
		volume.ErrBusy, volume.ErrRange, errors.ErrUnsupported, ErrAway, ErrGoesOn,
	} {
		refuse = fmt.Errorf("volume v: %w: so it is", is)
		err := c.Unpublish(t.Context(), "p")
		if !errors.Is(err, is) || err.Error() != refuse.Error() {
			t.Errorf("%v arrives as %v", refuse, err)
		}
		if sort := errors.Is(is, volume.ErrUnavailable); errors.Is(err, volume.ErrUnavailable) != sort || errors.Is(err, ErrAway) != (is == ErrAway) || errors.Is(err, ErrGoesOn) != (is == ErrGoesOn) {
			t.Errorf("%v arrives as another sort: %v", refuse, err)
		}
		sentinels++
	}
	if sentinels != len(kinds) {
		t.Errorf("%d of %d kinds are tested", sentinels, len(kinds))
	}
	refuse = errors.New("something else")
	if _, err := c.Publish(t.Context(), Publication{ID: "p"}); err == nil || err.Error() != "something else" || errors.Is(err, volume.ErrUnavailable) {
		t.Errorf("another error arrives as %v", err)
	}
	if _, err := c.Stats(t.Context(), "broken"); err == nil || !strings.Contains(err.Error(), "502") {
		t.Errorf("an answer without a body: %v", err)
	}
	for _, v := range []string{"lapsed", "cut"} {
		if _, err := c.Stats(t.Context(), v); !errors.Is(err, ErrAway) {
			t.Errorf("of a filer that may not answer any more: %v", err)
		}
	}
	server.Close()
	if err := <-done; !errors.Is(err, http.ErrServerClosed) {
		t.Error(err)
	}
	if _, err := c.Status(t.Context()); !errors.Is(err, ErrAway) || !errors.Is(err, volume.ErrUnavailable) || !strings.Contains(err.Error(), "start cradle-filer") {
		t.Errorf("without a filer: %v", err)
	}
}
