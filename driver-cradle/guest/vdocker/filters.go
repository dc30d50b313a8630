package vdocker

import (
	"encoding/json"
	"net/http"
	"regexp"
	"slices"
	"strings"
)

// filters are a request's filters parameter: {"label": ["a=b"], …}; old clients write {"label": {"a=b": true}}.
type filters map[string][]string

// parseFilters reads the parameter and refuses names that are not known.
func parseFilters(r *http.Request, known ...string) (filters, error) {
	text := parameter(r, "filters")
	if text == "" {
		return nil, nil
	}
	f := filters{}
	if json.Unmarshal([]byte(text), (*map[string][]string)(&f)) != nil {
		var old map[string]map[string]bool
		if err := json.Unmarshal([]byte(text), &old); err != nil {
			return nil, invalid("invalid filters %q: %v", text, err)
		}
		f = filters{}
		for name, values := range old {
			for v, on := range values {
				if on {
					f[name] = append(f[name], v)
				}
			}
		}
	}
	for name := range f {
		if !slices.Contains(known, name) {
			return nil, invalid("invalid filter '%s'", name)
		}
	}
	return f, nil
}

// any tells whether one of the filter's values matches; without the filter everything does.
func (f filters) any(name string, match func(value string) bool) bool {
	return len(f[name]) == 0 || slices.ContainsFunc(f[name], match)
}

// labels tells whether all label filters match, key or key=value; with not, whether none does.
func (f filters) labels(name string, labels map[string]string, not bool) bool {
	for _, want := range f[name] {
		key, value, valued := strings.Cut(want, "=")
		have, ok := labels[key]
		if (ok && (!valued || have == value)) == not {
			return false
		}
	}
	return true
}

// matches tells whether a filter's value is text, or a regular expression that is found in it.
func matches(value, text string) bool {
	if value == text {
		return true
	}
	if len(value) > 1024 {
		return false
	}
	re, err := regexp.Compile(value)
	return err == nil && re.MatchString(text)
}
