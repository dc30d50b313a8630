// Package launch turns this process into a service whose root file system is an
// image: a private mount namespace, the host's /proc /sys /dev /run, volumes,
// then execve. Process id, cgroup, limits, environment, open files and signals
// stay what the caller gave: nothing but the file system is isolated, no daemon
// stands behind it, and nothing is left to clean up, since the mounts die with
// the process.
//
// It knows nothing about signatures: who calls Exec has verified the root. It
// imports nothing of this repository. Everything but the types is Linux's.
package launch

import (
	"errors"
	"fmt"
	"path"
	"slices"
	"strings"
)

// Config is what a service is started with.
type Config struct {
	// Argv is the command; its first word is looked up in the image's PATH.
	Argv []string
	// Env is the whole environment.
	Env []string
	// Workdir is made if it is missing; empty is /.
	Workdir string
	// User is NAME|UID[:GROUP|GID], looked up in the image; empty keeps the
	// caller's ids.
	User string
	// Volumes are host folders and files in the image.
	Volumes []Volume
	// OOMScoreAdj, if not nil, is set before the start.
	OOMScoreAdj *int
}

// Propagation says whose mounts below a volume who sees.
type Propagation string

// The kinds of propagation, as mount(8) names them. Shared is the default: a
// mount made on either side appears on both, as if there were no namespace.
const (
	Shared  Propagation = "rshared"
	Slave   Propagation = "rslave"
	Private Propagation = "rprivate"
)

// Volume is a part of the host's file system in the image.
type Volume struct {
	Host, Target string
	ReadOnly     bool
	Propagation  Propagation
}

// ParseVolume reads HOST:PATH[:OPTION[,OPTION]], with the options ro, rw and
// the kinds of propagation.
func ParseVolume(s string) (Volume, error) {
	parts := strings.Split(s, ":")
	if len(parts) < 2 || len(parts) > 3 {
		return Volume{}, fmt.Errorf("volume %q: want HOST:PATH[:ro|rshared|rslave|rprivate]", s)
	}
	v := Volume{Host: parts[0], Target: path.Clean(parts[1]), Propagation: Shared}
	for _, p := range parts[:2] {
		if !path.IsAbs(p) {
			return Volume{}, fmt.Errorf("volume %q: %q is not absolute", s, p)
		}
	}
	if len(parts) == 3 {
		for o := range strings.SplitSeq(parts[2], ",") {
			switch o {
			case "ro":
				v.ReadOnly = true
			case "rw":
			case string(Shared), string(Slave), string(Private):
				v.Propagation = Propagation(o)
			default:
				return Volume{}, fmt.Errorf("volume %q: unknown option %q: there are ro, rw, rshared, rslave and rprivate", s, o)
			}
		}
	}
	return v, nil
}

// hostDirs are the host's own in every image.
var hostDirs = []string{"/proc", "/sys", "/dev", "/run"}

func inside(p, dir string) bool {
	return p == dir || strings.HasPrefix(p, strings.TrimSuffix(dir, "/")+"/")
}

// order sorts volumes from the outside in and refuses what would reach the
// host by accident: a mount on a shared volume appears on the host too.
func order(volumes []Volume) ([]Volume, error) {
	vs := slices.Clone(volumes)
	slices.SortStableFunc(vs, func(a, b Volume) int { return strings.Count(a.Target, "/") - strings.Count(b.Target, "/") })
	for i, v := range vs {
		if v.Target == "/" {
			return nil, errors.New("a volume at / would hide the image")
		}
		for _, d := range hostDirs {
			// at its own path it is there already, as whoever names it knows
			if inside(v.Target, d) && v != (Volume{Host: v.Host, Target: path.Clean(v.Host), Propagation: Shared}) {
				return nil, fmt.Errorf("volume %s: %s is the host's own in every image, and a mount there would appear on the host", v.Target, d)
			}
		}
		for _, outer := range vs[:i] {
			switch {
			case v.Target == outer.Target:
				return nil, fmt.Errorf("two volumes at %s", v.Target)
			case inside(v.Target, outer.Target) && outer.Propagation == Shared:
				return nil, fmt.Errorf("volume %s lies in volume %s, whose mounts appear on the host: give the outer one :rslave", v.Target, outer.Target)
			}
		}
	}
	return vs, nil
}

// Error codes of a service that could not be started, as shells have them.
const (
	ExitRefused     = 125 // bali's own: refused, unreachable, no mount
	ExitNotRunnable = 126
	ExitNotFound    = 127
)

// NotStarted is an execve that failed.
type NotStarted struct {
	Code int
	Err  error
}

func (e *NotStarted) Error() string { return e.Err.Error() }
func (e *NotStarted) Unwrap() error { return e.Err }
