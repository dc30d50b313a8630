package gateway

import (
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/cradlestack/cradlestack/csi-plugin/filer/lease"
)

// TestUnder: what was done while the lease held is not answered once it has lapsed, whether the handler says something or not, and after its end nothing is done.
func TestUnder(t *testing.T) {
	l := lease.New()
	l.Extend(lease.Forever)
	l.Open()
	done := 0
	mux := http.NewServeMux()
	mux.HandleFunc("/holds", func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "done") })
	mux.HandleFunc("/says", func(w http.ResponseWriter, _ *http.Request) {
		done++
		l.Lapse()
		w.WriteHeader(http.StatusCreated)
	})
	mux.HandleFunc("/silent", func(http.ResponseWriter, *http.Request) { l.Lapse() })
	s := httptest.NewServer(Under(l, mux))
	defer s.Close()
	c := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}} // which asks no second time
	get := func(path string) (int, string, error) {
		resp, err := c.Get(s.URL + path)
		if err != nil {
			return 0, "", err
		}
		defer resp.Body.Close()
		text, err := io.ReadAll(resp.Body)
		return resp.StatusCode, string(text), err
	}
	if code, text, err := get("/holds"); code != http.StatusOK || text != "done" || err != nil {
		t.Errorf("%d %q, %v", code, text, err)
	}
	for _, path := range []string{"/says", "/silent"} {
		if code, _, err := get(path); !errors.Is(err, io.EOF) {
			t.Errorf("%s: it is answered: %d, %v", path, code, err)
		}
		l.Extend(lease.Forever)
		l.Open()
	}
	l.End()
	if code, _, err := get("/says"); code != http.StatusServiceUnavailable || err != nil || done != 1 {
		t.Errorf("after the end: %d, %v, done %d times", code, err, done)
	}
}

// TestMeter: what is answered is counted as it was, and what is not as broken off.
func TestMeter(t *testing.T) {
	type request struct {
		method  string
		code    int
		in, out int64
	}
	told := make(chan request, 1)
	m := Meter(func(method string, code int, in, out int64) { told <- request{method, code, in, out} })
	mux := http.NewServeMux()
	mux.HandleFunc("/echo", func(w http.ResponseWriter, r *http.Request) { _, _ = io.Copy(w, r.Body) })
	mux.HandleFunc("/silent", func(http.ResponseWriter, *http.Request) {})
	mux.HandleFunc("/aborts", func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(http.StatusCreated)
		panic(http.ErrAbortHandler)
	})
	s := httptest.NewServer(m.around(mux))
	defer s.Close()
	for _, c := range []struct {
		path, body string
		want       request
	}{
		{"/echo", "content", request{"POST", 200, 7, 7}}, {"/silent", "", request{"POST", 200, 0, 0}}, {"/aborts", "", request{"POST", 0, 0, 0}}, {"/absent", "", request{"POST", 404, 0, 19}},
	} {
		resp, err := http.Post(s.URL+c.path, "text/plain", strings.NewReader(c.body))
		if err == nil {
			_, _ = io.Copy(io.Discard, resp.Body)
			resp.Body.Close()
		}
		if got := <-told; got != c.want {
			t.Errorf("%s: %+v, not %+v", c.path, got, c.want)
		}
	}
}
