package guest

import (
	"time"

	"github.com/cradlestack/cradlestack/spec"
)

// docker's bounds, moby daemon/health.go.
const (
	probeOutput = 4096 // bytes kept of a probe's output
	probeLog    = 5    // probes kept
)

// healthRules are a healthcheck with docker's defaults.
type healthRules struct {
	interval, timeout, startPeriod, startInterval time.Duration
	retries                                       int
}

func newHealthRules(h *spec.Healthcheck) healthRules {
	or := func(d spec.Duration, def time.Duration) time.Duration {
		if d <= 0 {
			return def
		}
		return time.Duration(d)
	}
	r := healthRules{
		interval: or(h.Interval, 30*time.Second), timeout: or(h.Timeout, 30*time.Second),
		startPeriod: or(h.StartPeriod, 0), startInterval: or(h.StartInterval, 5*time.Second), retries: h.Retries,
	}
	if r.retries <= 0 {
		r.retries = 3
	}
	return r
}

// wait is how long to wait before the next probe.
func (r healthRules) wait(status string, sinceStart time.Duration) time.Duration {
	if status == HealthStarting && sinceStart < r.startPeriod {
		return min(r.startInterval, r.interval)
	}
	return r.interval
}

// apply counts a probe that began so long after the container's start. Failures in the start period don't count until one has
// succeeded.
func (r healthRules) apply(h *Health, p Probe, sinceStart time.Duration) {
	h.Log = append(h.Log, p)
	if n := len(h.Log); n > probeLog {
		h.Log = h.Log[n-probeLog:]
	}
	if p.ExitCode == 0 {
		h.Status, h.FailingStreak = HealthHealthy, 0
		return
	}
	if h.Status == HealthStarting && sinceStart < r.startPeriod {
		return
	}
	h.FailingStreak++
	if h.FailingStreak >= r.retries {
		h.Status = HealthUnhealthy
	}
}
