package vdocker

import (
	"context"
	"encoding/json"
	"maps"
	"net/http"
	"os"
	"runtime"
	"slices"
	"strings"
	"time"

	"github.com/moby/moby/api/types/events"
	"github.com/moby/moby/api/types/system"
	"golang.org/x/sys/unix"

	"github.com/cradlestack/cradlestack/driver-cradle/guest"
	"github.com/cradlestack/cradlestack/driver-cradle/wire"
	"github.com/cradlestack/cradlestack/internal/dockerhttp"
)

func (a *api) version(w http.ResponseWriter, _ *http.Request) error {
	v := system.VersionResponse{
		Platform:      system.PlatformInfo{Name: "cradle pod"},
		Version:       "cradle-" + guest.Version,
		APIVersion:    dockerhttp.String(versions.Max),
		MinAPIVersion: dockerhttp.String(versions.Min),
		Os:            runtime.GOOS,
		Arch:          runtime.GOARCH,
		GoVersion:     runtime.Version(),
		KernelVersion: kernel(),
	}
	v.Components = []system.ComponentVersion{{Name: "cradle-init", Version: guest.Version, Details: map[string]string{
		"ApiVersion": v.APIVersion, "MinAPIVersion": v.MinAPIVersion, "Os": v.Os, "Arch": v.Arch, "GoVersion": v.GoVersion, "KernelVersion": v.KernelVersion,
	}}}
	return dockerhttp.Answer(w, http.StatusOK, v)
}

func kernel() string {
	var uts unix.Utsname
	_ = unix.Uname(&uts)
	return unix.ByteSliceToString(uts.Release[:])
}

func (a *api) info(w http.ResponseWriter, _ *http.Request) error {
	i := system.Info{
		Driver: "overlay", LoggingDriver: "cradle", CgroupDriver: "cgroupfs", CgroupVersion: "2",
		MemoryLimit: true, PidsLimit: true, CPUShares: true, CPUCfsPeriod: true, CPUCfsQuota: true, IPv4Forwarding: true,
		KernelVersion: kernel(), OperatingSystem: "cradle pod", OSType: runtime.GOOS, Architecture: machine(),
		NCPU: runtime.NumCPU(), MemTotal: int64(memoryLimit(podCgroup)), NGoroutines: runtime.NumGoroutine(),
		SystemTime: time.Now().Format(time.RFC3339Nano), ServerVersion: "cradle-" + guest.Version, DockerRootDir: "/run/cradle",
	}
	if l := a.pod.Launch(); l != nil {
		i.ID, i.Name = l.Launch.ID, l.Launch.Hostname
		if i.Name == "" {
			i.Name = l.Launch.Name
		}
	}
	for _, c := range a.pod.Containers() {
		i.Containers++
		switch c.State().Status {
		case wire.StateRunning, wire.StateRestarting:
			i.ContainersRunning++
		case wire.StatePaused:
			i.ContainersPaused++
		default:
			i.ContainersStopped++
		}
	}
	if fds, err := os.ReadDir("/proc/self/fd"); err == nil {
		i.NFd = len(fds)
	}
	return dockerhttp.Answer(w, http.StatusOK, i)
}

func machine() string {
	var uts unix.Utsname
	_ = unix.Uname(&uts)
	return unix.ByteSliceToString(uts.Machine[:])
}

// event is docker's message with what it had before version 1.22 as well, which old clients still print.
type event struct {
	Status string `json:"status,omitempty"`
	ID     string `json:"id,omitempty"`
	From   string `json:"from,omitempty"`
	events.Message
}

func (a *api) events(w http.ResponseWriter, r *http.Request) error {
	f, err := dockerhttp.ParseFilters(r, "type", "event", "container", "label", "image", "scope", "daemon", "network", "volume", "plugin", "service", "node", "secret", "config")
	if err != nil {
		return err
	}
	since, err := dockerhttp.ParseTime(dockerhttp.Parameter(r, "since"))
	if err != nil {
		return dockerhttp.Invalid("since: %v", err)
	}
	until, err := dockerhttp.ParseTime(dockerhttp.Parameter(r, "until"))
	if err != nil {
		return dockerhttp.Invalid("until: %v", err)
	}
	if !until.IsZero() && until.Before(since) {
		return dockerhttp.Invalid("`since` time (%s) cannot be after `until` time (%s)", dockerhttp.Parameter(r, "since"), dockerhttp.Parameter(r, "until"))
	}
	ctx := r.Context()
	if !until.IsZero() {
		var cancel context.CancelFunc
		ctx, cancel = context.WithDeadline(ctx, until)
		defer cancel()
	}
	past, live, cancel := a.pod.Subscribe(since)
	defer cancel()

	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(http.StatusOK)
	out := http.NewResponseController(w)
	enc := json.NewEncoder(w)
	send := func(e guest.Event) error {
		if !until.IsZero() && e.Time.After(until) || !a.wanted(f, e) {
			return nil
		}
		return enc.Encode(message(e))
	}
	for _, e := range past {
		if send(e) != nil {
			return nil
		}
	}
	for {
		if out.Flush() != nil {
			return nil
		}
		select {
		case e, ok := <-live:
			if !ok || send(e) != nil {
				return nil
			}
		case <-ctx.Done():
			return nil
		}
	}
}

func message(e guest.Event) event {
	m := event{Status: e.Action, ID: e.ID, From: e.Attributes["image"]}
	m.Type, m.Action, m.Scope = events.Type(e.Type), events.Action(e.Action), "local"
	m.Actor = events.Actor{ID: e.ID, Attributes: e.Attributes}
	m.Time, m.TimeNano = e.Time.Unix(), e.Time.UnixNano()
	return m
}

func (a *api) wanted(f dockerhttp.Filters, e guest.Event) bool {
	for _, kind := range []string{"daemon", "network", "volume", "plugin", "service", "node", "secret", "config"} {
		if len(f[kind]) > 0 {
			return false
		}
	}
	return f.Any("type", func(v string) bool { return v == e.Type }) &&
		f.Any("scope", func(v string) bool { return v == "local" }) &&
		f.Any("event", func(v string) bool { return e.Action == v || strings.HasPrefix(e.Action, v+":") }) &&
		f.Any("container", func(v string) bool {
			return e.Attributes["name"] == v || v != "" && strings.HasPrefix(e.ID, v)
		}) &&
		f.Any("image", func(v string) bool {
			name, _, _ := strings.Cut(e.Attributes["image"], ":")
			return v == e.Attributes["image"] || v == name
		}) &&
		f.Labels("label", e.Attributes, false)
}

func sortedKeys[V any](m map[string]V) []string { return slices.Sorted(maps.Keys(m)) }
