package vdocker

import (
	"encoding/json"
	"errors"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"github.com/moby/moby/api/types/container"
	"golang.org/x/sys/unix"

	"github.com/cradlestack/cradlestack/driver-cradle/guest"
	"github.com/cradlestack/cradlestack/internal/dockerhttp"
)

func done(w http.ResponseWriter, err error) error {
	if err == nil {
		w.WriteHeader(http.StatusNoContent)
	}
	return err
}

// start takes the size of the container's terminal as well, h and w: docker's API has it in the container's configuration.
func (a *api) start(w http.ResponseWriter, r *http.Request, c *guest.Container) error {
	if dockerhttp.Parameter(r, "h") != "" {
		rows, columns, err := size(r)
		if err != nil {
			return err
		}
		c.SetConsole(rows, columns)
	}
	return done(w, c.Start(r.Context()))
}

// grace reads the time between the stop signal and SIGKILL, in seconds; nil: the container's own.
func grace(r *http.Request) (*time.Duration, error) {
	t := dockerhttp.Parameter(r, "t")
	if t == "" {
		return nil, nil
	}
	n, err := strconv.Atoi(t)
	if err != nil {
		return nil, dockerhttp.Invalid("t: %q is no number of seconds", t)
	}
	d := time.Duration(n) * time.Second
	return &d, nil
}

func (a *api) stop(w http.ResponseWriter, r *http.Request, c *guest.Container) error {
	timeout, err := grace(r)
	if err != nil {
		return err
	}
	return done(w, c.Stop(r.Context(), dockerhttp.Parameter(r, "signal"), timeout))
}

func (a *api) restart(w http.ResponseWriter, r *http.Request, c *guest.Container) error {
	timeout, err := grace(r)
	if err != nil {
		return err
	}
	return done(w, c.Restart(r.Context(), dockerhttp.Parameter(r, "signal"), timeout))
}

func (a *api) kill(w http.ResponseWriter, r *http.Request, c *guest.Container) error {
	name := dockerhttp.Parameter(r, "signal")
	if name == "" {
		name = "KILL"
	}
	sig, err := guest.ParseSignal(name)
	if err != nil {
		return err
	}
	if err := c.Kill(sig); err != nil {
		if errors.Is(err, guest.ErrNotRunning) {
			return dockerhttp.NewError(http.StatusConflict, "cannot kill container: "+r.PathValue("id")+": "+err.Error())
		}
		return err
	}
	if sig == unix.SIGKILL { // docker's too returns when it has worked
		if _, _, err := c.Wait(r.Context(), guest.WaitNotRunning); err != nil {
			return err
		}
	}
	return done(w, nil)
}

func (a *api) pause(w http.ResponseWriter, _ *http.Request, c *guest.Container) error {
	return done(w, c.Pause())
}

func (a *api) unpause(w http.ResponseWriter, _ *http.Request, c *guest.Container) error {
	return done(w, c.Unpause())
}

// wait sends its header as soon as the end that it waits for can't be missed any more: docker run starts the container then.
func (a *api) wait(w http.ResponseWriter, r *http.Request, c *guest.Container) error {
	condition := dockerhttp.Parameter(r, "condition")
	switch condition {
	case "", guest.WaitNotRunning, guest.WaitNextExit, guest.WaitRemoved:
	default:
		return dockerhttp.Invalid("invalid condition: %q", condition)
	}
	wait := c.Awaiting(condition)
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(http.StatusOK)
	if err := http.NewResponseController(w).Flush(); err != nil {
		return nil //nolint:nilerr // the client has gone
	}
	code, message, err := wait(r.Context())
	if err != nil && r.Context().Err() != nil {
		return nil //nolint:nilerr // the client has gone
	}
	state := c.State()
	answer := dockerhttp.Waited{State: inspectState(state), RestartCount: state.RestartCount}
	answer.StatusCode = int64(code)
	if err != nil {
		message = err.Error()
	}
	if message != "" {
		answer.Error = &container.WaitExitError{Message: message}
	}
	_ = json.NewEncoder(w).Encode(answer)
	return nil
}

// size reads a terminal's size.
func size(r *http.Request) (h, w uint16, err error) {
	if h, err = extent("height", dockerhttp.Parameter(r, "h")); err != nil {
		return 0, 0, err
	}
	w, err = extent("width", dockerhttp.Parameter(r, "w"))
	return h, w, err
}

// extent reads one of the two, with docker's messages (moby daemon/server/router/container/container_routes.go).
func extent(name, text string) (uint16, error) {
	n, err := strconv.ParseUint(text, 10, 16)
	if err == nil {
		return uint16(n), nil
	}
	why := strconv.ErrSyntax
	if _, signed := strconv.ParseInt(text, 10, 64); signed == nil || errors.Is(err, strconv.ErrRange) {
		why = strconv.ErrRange
	}
	return 0, dockerhttp.Invalid("invalid resize %s %q: %v", name, text, why)
}

func (a *api) resize(w http.ResponseWriter, r *http.Request, c *guest.Container) error {
	rows, columns, err := size(r)
	if err != nil {
		return err
	}
	// As with docker, there is no harm in resizing a terminal that isn't there.
	if err := c.Resize(rows, columns); err != nil && (c.Spec().TTY || !errors.Is(err, guest.ErrInvalid)) {
		return err
	}
	c.Emit("resize", map[string]string{"height": dockerhttp.Parameter(r, "h"), "width": dockerhttp.Parameter(r, "w")})
	w.WriteHeader(http.StatusOK)
	return nil
}

// update changes limits and when the container starts again, until the pod ends. The launch.json on the host is the record of what holds from then on.
func (a *api) update(w http.ResponseWriter, r *http.Request, c *guest.Container) error {
	var u container.UpdateConfig
	if err := dockerhttp.Decode(w, r, &u); err != nil {
		return err
	}
	settings, err := cgroupSettings(u)
	if err != nil {
		return err
	}
	if p := u.RestartPolicy; p.Name != "" {
		if err := container.ValidateRestartPolicy(p); err != nil {
			return dockerhttp.Invalid("%v", err)
		}
		maxStarts := 0
		if p.MaximumRetryCount > 0 {
			maxStarts = p.MaximumRetryCount + 1
		}
		always := p.IsAlways() || p.IsUnlessStopped()
		c.SetRestart(always, always || p.IsOnFailure(), maxStarts)
	}
	for _, s := range settings {
		if err := os.WriteFile(filepath.Join(c.Cgroup(), s[0]), []byte(s[1]), 0); err != nil {
			return err
		}
	}
	c.Emit("update", nil)
	return dockerhttp.Answer(w, http.StatusOK, container.UpdateResponse{Warnings: []string{}})
}

// cgroupSettings are the changes that docker update asks for, in cgroup v2's files.
func cgroupSettings(u container.UpdateConfig) (out [][2]string, err error) {
	const period = 100_000
	set := func(file, value string) { out = append(out, [2]string{file, value}) }
	limit := func(n int64) string {
		if n < 0 {
			return "max"
		}
		return strconv.FormatInt(n, 10)
	}
	switch {
	case u.BlkioWeight != 0 || u.CpusetCpus != "" || u.CpusetMems != "" || u.CPURealtimePeriod != 0 || u.CPURealtimeRuntime != 0:
		return nil, dockerhttp.NewError(http.StatusNotImplemented, "inside a pod only memory, CPU time, CPU shares and the number of processes can be changed")
	case u.NanoCPUs != 0 && (u.CPUPeriod != 0 || u.CPUQuota != 0):
		return nil, dockerhttp.Invalid("conflicting options: NanoCPUs and CPU period or quota cannot both be set")
	case u.Memory > 0 && u.Memory < 6<<20:
		return nil, dockerhttp.Invalid("minimum memory limit allowed is 6MB")
	}
	if u.MemorySwap > 0 || u.MemoryReservation > 0 {
		if u.MemorySwap > 0 && u.Memory > 0 && u.MemorySwap < u.Memory {
			return nil, dockerhttp.Invalid("minimum memoryswap limit should be larger than memory limit, see usage")
		}
		if u.MemoryReservation > 0 {
			set("memory.low", limit(u.MemoryReservation))
		}
	}
	if u.Memory != 0 {
		set("memory.max", limit(u.Memory))
	}
	switch {
	case u.NanoCPUs > 0:
		set("cpu.max", strconv.FormatInt(max(u.NanoCPUs*period/1e9, 1000), 10)+" "+strconv.Itoa(period))
	case u.CPUQuota != 0 || u.CPUPeriod != 0:
		p := u.CPUPeriod
		if p == 0 {
			p = period
		}
		q := u.CPUQuota
		if q == 0 {
			q = -1
		}
		set("cpu.max", limit(q)+" "+strconv.FormatInt(p, 10))
	}
	if u.CPUShares != 0 {
		shares := min(max(u.CPUShares, 2), 262144)
		set("cpu.weight", strconv.FormatInt(1+(shares-2)*9999/262142, 10))
	}
	if u.PidsLimit != nil {
		n := *u.PidsLimit
		if n == 0 {
			n = -1
		}
		set("pids.max", limit(n))
	}
	return out, nil
}
