package dockerhttp

import (
	"errors"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"
)

func isInvalid(err error) bool {
	var e Error
	return errors.As(err, &e) && e.Status == http.StatusBadRequest
}

func TestParseTime(t *testing.T) {
	for text, want := range map[string]time.Time{
		"": {}, "0": {}, "1700000000": time.Unix(1700000000, 0), "1700000000.5": time.Unix(1700000000, 5e8), "1700000000.000000001": time.Unix(1700000000, 1),
		"2023-11-14T22:13:20.25Z": time.Unix(1700000000, 25e7),
	} {
		if got, err := ParseTime(text); err != nil || !got.Equal(want) {
			t.Errorf("%q is %v, %v; want %v", text, got, err, want)
		}
	}
	for _, text := range []string{"yesterday", "1.x", "1.-5", "--1"} {
		if got, err := ParseTime(text); err == nil {
			t.Errorf("%q is %v", text, got)
		}
	}
}

func TestFilters(t *testing.T) {
	parse := func(text string) (Filters, error) {
		return ParseFilters(httptest.NewRequest("GET", "/?filters="+url.QueryEscape(text), nil), "label", "name")
	}
	for _, text := range []string{`{"label":["a=b"],"name":["x"]}`, `{"label":{"a=b":true,"c":false},"name":{"x":true}}`} {
		f, err := parse(text)
		if err != nil || !slices.Equal(f["label"], []string{"a=b"}) || !slices.Equal(f["name"], []string{"x"}) {
			t.Errorf("%s: %v, %v", text, f, err)
		}
	}
	for _, text := range []string{`{"colour":["red"]}`, `[]`, `{"label":"a"}`} {
		if f, err := parse(text); !isInvalid(err) {
			t.Errorf("%s: %v, %v", text, f, err)
		}
	}
	have := map[string]string{"a": "b", "empty": ""}
	for label, want := range map[string]bool{"a": true, "a=b": true, "a=c": false, "nosuch": false, "empty": true, "empty=": true} {
		if got := (Filters{"label": {label}}).Labels("label", have, false); got != want {
			t.Errorf("label %s: %v", label, got)
		}
	}
	if !(Filters{}).Any("name", func(string) bool { return false }) {
		t.Error("no filter refuses something")
	}
}

func TestDecode(t *testing.T) {
	for body, status := range map[string]int{
		`{"A": 1}`: 0, ``: 0, `{"A": 1} x`: 400, `{`: 400, `{"A": "text"}`: 400, `{"B": "` + strings.Repeat("x", MaxBody) + `"}`: 413,
	} {
		var v struct{ A int }
		err := Decode(httptest.NewRecorder(), httptest.NewRequest("POST", "/", strings.NewReader(body)), &v)
		var e Error
		if errors.As(err, &e); (err == nil) != (status == 0) || e.Status != status {
			t.Errorf("%.20s: %v, want %d", body, err, status)
		}
	}
}

func TestVersion(t *testing.T) {
	v := Versions{Min: 40, Max: 50}
	for path, want := range map[string]int{"/v1.41/x": 41, "/x": 50} {
		got := 0
		h := http.NewServeMux()
		h.HandleFunc("GET /{name}", func(_ http.ResponseWriter, r *http.Request) { got = v.Version(r) })
		v.Handler(h).ServeHTTP(httptest.NewRecorder(), httptest.NewRequest("GET", path, nil))
		if got != want {
			t.Errorf("%s: version %d, want %d", path, got, want)
		}
	}
}
