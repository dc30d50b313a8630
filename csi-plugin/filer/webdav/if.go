package webdav

import (
	"net/http"
	"net/url"
	"strings"
)

// A condition of an If header is about a resource's locks or its entity tag.
type condition struct {
	not   bool
	token string // a lock's, or
	etag  string // as it is compared, with its quotes
}

// A list of conditions holds if all of them do.
type list struct {
	resource   string // URL; "" for the one that the request is for
	conditions []condition
}

// parseIf reads an If header (RFC 4918 §10.4.2), which holds if one of its lists does.
func parseIf(header string) ([]list, error) {
	wrong := func(what string) ([]list, error) { return nil, bad("If: %s", what) }
	var lists []list
	resource, tagged := "", false
	rest := strings.TrimSpace(header)
	for rest != "" {
		switch rest[0] {
		case '<':
			end := strings.IndexByte(rest, '>')
			if end < 2 || len(lists) > 0 && !tagged {
				return wrong("a resource is not named right")
			}
			resource, rest, tagged = rest[1:end], strings.TrimSpace(rest[end+1:]), true
			if rest == "" || rest[0] != '(' {
				return wrong("no list follows a resource")
			}
		case '(':
			l := list{resource: resource}
			rest = strings.TrimSpace(rest[1:])
			for {
				if rest == "" {
					return wrong("a list does not end")
				}
				if rest[0] == ')' {
					break
				}
				var c condition
				if len(rest) >= 3 && strings.EqualFold(rest[:3], "not") {
					c.not, rest = true, strings.TrimSpace(rest[3:])
				}
				ends := map[byte]byte{'<': '>', '[': ']'}
				if rest == "" || ends[rest[0]] == 0 {
					return wrong("a condition is neither a token nor an entity tag")
				}
				end := strings.IndexByte(rest, ends[rest[0]])
				if end < 2 {
					return wrong("a condition does not end")
				}
				if rest[0] == '<' {
					c.token = rest[1:end]
				} else {
					c.etag = rest[1:end]
				}
				l.conditions, rest = append(l.conditions, c), strings.TrimSpace(rest[end+1:])
			}
			if len(l.conditions) == 0 {
				return wrong("a list is empty")
			}
			lists, rest = append(lists, l), strings.TrimSpace(rest[1:])
		default:
			return wrong("it is no list of conditions")
		}
	}
	if len(lists) == 0 {
		return wrong("it has no conditions")
	}
	return lists, nil
}

// tokens are all that the lists name: to name one is to have it.
func tokens(lists []list) (all []string) {
	for _, l := range lists {
		for _, c := range l.conditions {
			if c.token != "" {
				all = append(all, c.token)
			}
		}
	}
	return all
}

// holds says whether one of the lists does. etag is the tag of what is at a path, "" where nothing is; path leads to a URL's place in the volume, where that has one.
func holds(lists []list, here string, path func(resource string) (string, bool), etag func(path string) string, has func(path, token string) bool) bool {
	for _, l := range lists {
		at, ours := here, true
		if l.resource != "" {
			at, ours = path(l.resource)
		}
		all := true
		for _, c := range l.conditions {
			var is bool
			switch {
			case !ours:
			case c.token != "":
				is = has(at, c.token)
			default:
				is = etag(at) == c.etag
			}
			all = all && is != c.not
		}
		if all {
			return true
		}
	}
	return false
}

// matches says whether a tag is in a list of them as If-Match and If-None-Match have it (RFC 9110 §13.1). Ours are all strong.
func matches(header, etag string) bool {
	for _, t := range strings.Split(header, ",") {
		if t = strings.TrimSpace(t); t == "*" && etag != "" || t != "" && t == etag {
			return true
		}
	}
	return false
}

// local is the path that a URL of this server leads to.
func local(resource string, r *http.Request) (string, bool) {
	u, err := url.Parse(resource)
	if err != nil || u.Host != "" && u.Host != r.Host || !strings.HasPrefix(u.Path, "/") {
		return "", false
	}
	return u.Path, true
}

// href is a path as URLs have it.
func href(path string) string { return (&url.URL{Path: path}).EscapedPath() }
