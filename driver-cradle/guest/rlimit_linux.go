package guest

import (
	"fmt"
	"math"

	"golang.org/x/sys/unix"

	"github.com/cradlestack/cradlestack/spec"
)

// An rlimit is one resource limit as the kernel takes it.
type rlimit struct {
	Name     string
	Resource int
	Soft     uint64
	Hard     uint64
}

var rlimitResources = map[string]int{
	"as": unix.RLIMIT_AS, "core": unix.RLIMIT_CORE, "cpu": unix.RLIMIT_CPU, "data": unix.RLIMIT_DATA, "fsize": unix.RLIMIT_FSIZE,
	"locks": unix.RLIMIT_LOCKS, "memlock": unix.RLIMIT_MEMLOCK, "msgqueue": unix.RLIMIT_MSGQUEUE, "nice": unix.RLIMIT_NICE,
	"nofile": unix.RLIMIT_NOFILE, "nproc": unix.RLIMIT_NPROC, "rss": unix.RLIMIT_RSS, "rtprio": unix.RLIMIT_RTPRIO,
	"rttime": unix.RLIMIT_RTTIME, "sigpending": unix.RLIMIT_SIGPENDING, "stack": unix.RLIMIT_STACK,
}

// defaultLimits are those of docker's own systemd unit.
var defaultLimits = []spec.Ulimit{
	{Name: "nofile", Soft: 1 << 20, Hard: 1 << 20},
	{Name: "nproc", Soft: -1, Hard: -1},
	{Name: "core", Soft: -1, Hard: -1},
}

// takeDefaultLimits gives them to this process and to all that it starts.
func takeDefaultLimits() error {
	limits, err := resolveLimits(nil)
	if err != nil {
		return err
	}
	return setLimits(limits)
}

func setLimits(limits []rlimit) error {
	for _, l := range limits {
		if err := unix.Setrlimit(l.Resource, &unix.Rlimit{Cur: l.Soft, Max: l.Hard}); err != nil {
			return fmt.Errorf("set limit %s to %d:%d: %w", l.Name, l.Soft, l.Hard, err)
		}
	}
	return nil
}

// resolveLimits are the defaults and what the spec sets over them.
func resolveLimits(ulimits []spec.Ulimit) ([]rlimit, error) {
	var out []rlimit
	for _, u := range append(defaultLimits[:len(defaultLimits):len(defaultLimits)], ulimits...) {
		resource, ok := rlimitResources[u.Name]
		if !ok {
			return nil, &stateError{ErrInvalid, fmt.Sprintf("invalid ulimit type: %s", u.Name)}
		}
		l := rlimit{u.Name, resource, limitValue(u.Soft), limitValue(u.Hard)}
		if l.Soft > l.Hard {
			return nil, &stateError{ErrInvalid, fmt.Sprintf("ulimit %s: soft limit %d is above the hard limit %d", u.Name, u.Soft, u.Hard)}
		}
		out = append(out, l)
	}
	return out, nil
}

func limitValue(n int64) uint64 {
	if n < 0 {
		return math.MaxUint64
	}
	return uint64(n)
}
