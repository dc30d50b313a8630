package vdocker

import (
	"context"
	"encoding/json"
	"maps"
	"net/http"
	"os"
	"runtime"
	"slices"
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

func (a *api) events(w http.ResponseWriter, r *http.Request) error {
	wanted, err := dockerhttp.ParseEvents(r)
	if err != nil {
		return err
	}
	ctx := r.Context()
	if !wanted.Until.IsZero() {
		var cancel context.CancelFunc
		ctx, cancel = context.WithDeadline(ctx, wanted.Until)
		defer cancel()
	}
	past, live, cancel := a.pod.Subscribe(wanted.Since)
	defer cancel()

	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(http.StatusOK)
	out := http.NewResponseController(w)
	enc := json.NewEncoder(w)
	send := func(e guest.Event) error {
		m := message(e)
		if !wanted.Until.IsZero() && e.Time.After(wanted.Until) || !wanted.Wants(&m) {
			return nil
		}
		return enc.Encode(dockerhttp.NewEvent(m))
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

func message(e guest.Event) events.Message {
	return events.Message{
		Type: events.Type(e.Type), Action: events.Action(e.Action), Scope: "local", Actor: events.Actor{ID: e.ID, Attributes: e.Attributes},
		Time: e.Time.Unix(), TimeNano: e.Time.UnixNano(),
	}
}

func sortedKeys[V any](m map[string]V) []string { return slices.Sorted(maps.Keys(m)) }
