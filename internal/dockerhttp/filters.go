package dockerhttp

import (
	"encoding/json"
	"net/http"
	"regexp"
	"slices"
	"strings"
)

// Filters are a request's filters parameter: {"label": ["a=b"], …}; old clients write {"label": {"a=b": true}}.
type Filters map[string][]string

// ParseFilters reads the parameter and refuses names that are not known.
func ParseFilters(r *http.Request, known ...string) (Filters, error) {
	text := Parameter(r, "filters")
	if text == "" {
		return nil, nil
	}
	f := Filters{}
	if json.Unmarshal([]byte(text), (*map[string][]string)(&f)) != nil {
		var old map[string]map[string]bool
		if err := json.Unmarshal([]byte(text), &old); err != nil {
			return nil, Invalid("invalid filters %q: %v", text, err)
		}
		f = Filters{}
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
			return nil, Invalid("invalid filter '%s'", name)
		}
	}
	return f, nil
}

// Any tells whether one of the filter's values matches; without the filter everything does.
func (f Filters) Any(name string, match func(value string) bool) bool {
	return len(f[name]) == 0 || slices.ContainsFunc(f[name], match)
}

// Labels tells whether all label filters match, key or key=value; with not, whether none does.
func (f Filters) Labels(name string, labels map[string]string, not bool) bool {
	for _, want := range f[name] {
		key, value, valued := strings.Cut(want, "=")
		have, ok := labels[key]
		if (ok && (!valued || have == value)) == not {
			return false
		}
	}
	return true
}

// Matches tells whether a filter's value is text, or a regular expression that is found in it.
func Matches(value, text string) bool {
	if value == text {
		return true
	}
	if len(value) > 1024 {
		return false
	}
	re, err := regexp.Compile(value)
	return err == nil && re.MatchString(text)
}
