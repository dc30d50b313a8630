package guest

import (
	"slices"
	"strings"
)

// defaultPath is docker's PATH for an image that sets none.
const defaultPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// containerEnv is the environment of a container's command as docker makes it: its defaults, replaced by what the spec says.
// HOME is added when the user is known.
func containerEnv(env []string, hostname string, tty bool) []string {
	out := []string{"PATH=" + defaultPath, "HOSTNAME=" + hostname}
	if tty {
		out = append(out, "TERM=xterm")
	}
	return mergeEnv(out, env)
}

// mergeEnv replaces variables in place and appends new ones; what has no = removes a variable.
func mergeEnv(base, more []string) []string {
	out := slices.Clone(base)
	for _, kv := range more {
		name, _, set := strings.Cut(kv, "=")
		i := slices.IndexFunc(out, func(s string) bool { return strings.HasPrefix(s, name+"=") })
		switch {
		case !set:
			if i >= 0 {
				out = slices.Delete(out, i, i+1)
			}
		case i >= 0:
			out[i] = kv
		default:
			out = append(out, kv)
		}
	}
	return out
}

// lookupEnv gives the value of a variable, "" where there is none.
func lookupEnv(env []string, name string) string {
	for _, kv := range slices.Backward(env) {
		if v, ok := strings.CutPrefix(kv, name+"="); ok {
			return v
		}
	}
	return ""
}
