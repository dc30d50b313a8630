package translate

import (
	"encoding/json"
	"math"
	"net/http"

	"github.com/moby/moby/api/types/container"

	"github.com/cradlestack/cradlestack/internal/dockerhttp"
	"github.com/cradlestack/cradlestack/spec"
)

// Update checks docker update and gives the container's configuration and pod as they are then. What was there is not changed.
func Update(host *container.HostConfig, pod *spec.Pod, u *container.UpdateConfig) (*container.HostConfig, *spec.Pod, []string, error) {
	var h container.HostConfig
	var p spec.Pod
	if err := clone(host, &h); err != nil {
		return nil, nil, nil, err
	}
	if err := clone(pod, &p); err != nil {
		return nil, nil, nil, err
	}
	r := &h.Resources
	set(&r.Memory, u.Memory)
	set(&r.MemorySwap, u.MemorySwap)
	set(&r.MemoryReservation, u.MemoryReservation)
	set(&r.NanoCPUs, u.NanoCPUs)
	set(&r.CPUQuota, u.CPUQuota)
	set(&r.CPUPeriod, u.CPUPeriod)
	set(&r.CPUShares, u.CPUShares)
	if u.NanoCPUs > 0 && host.CPUQuota > 0 || u.CPUQuota > 0 && host.NanoCPUs > 0 {
		return nil, nil, nil, dockerhttp.Invalid("Conflicting options: Nano CPUs and CPU Quota cannot both be set.")
	}
	if u.PidsLimit != nil {
		r.PidsLimit = u.PidsLimit
	}
	unknown := u.Resources
	if err := checkResources(&unknown); err != nil && unknown.Memory == 0 && unknown.MemorySwap > 0 {
		unknown.MemorySwap = 0 // the container's memory limit is there already
	}
	if err := checkResources(&unknown); err != nil {
		return nil, nil, nil, err
	}
	if err := checkResources(r); err != nil {
		return nil, nil, nil, err
	}
	if u.RestartPolicy.Name != "" {
		if err := container.ValidateRestartPolicy(u.RestartPolicy); err != nil {
			return nil, nil, nil, dockerhttp.Invalid("%v", err)
		}
		if h.AutoRemove && !u.RestartPolicy.IsNone() {
			return nil, nil, nil, dockerhttp.Errorf(http.StatusConflict, "Restart policy cannot be updated because AutoRemove is enabled for the container")
		}
		h.RestartPolicy = u.RestartPolicy
	}
	own := &p.Containers[0]
	joins := h.NetworkMode.IsContainer()
	b := builder{host: h, pod: &p, own: own}
	own.Lifecycle = spec.Lifecycle{}
	if err := b.restart(); err != nil {
		return nil, nil, nil, err
	}
	cpus := CPUs(r)
	if joins { // limits within another one's machine
		own.Lifecycle.Critical = false
		own.Resources.Memory, own.Resources.CPUs = spec.Bytes(h.Memory), cpus
	} else {
		if h.Memory > 0 {
			p.Resources.Memory = max(spec.Bytes(h.Memory), spec.MinMemory)
		}
		if cpus > 0 {
			p.Resources.CPUs, own.Resources.CPUs = min(int(math.Ceil(cpus)), spec.MaxCPUs), cpus
		}
	}
	own.Resources.CPUShares = uint64(r.CPUShares)
	own.Resources.Pids = 0
	if l := r.PidsLimit; l != nil && *l > 0 {
		own.Resources.Pids = *l
	}
	if err := p.Validate(); err != nil {
		return nil, nil, nil, dockerhttp.Invalid("%v", err)
	}
	return &h, &p, b.warnings, nil
}

func set(to *int64, value int64) {
	if value != 0 {
		*to = value
	}
}

func clone(from, to any) error {
	data, err := json.Marshal(from)
	if err != nil {
		return err
	}
	return json.Unmarshal(data, to)
}
