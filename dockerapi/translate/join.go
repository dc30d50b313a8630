package translate

import (
	"cmp"

	"github.com/moby/moby/api/types/container"

	"github.com/cradlestack/cradlestack/internal/dockerhttp"
	"github.com/cradlestack/cradlestack/spec"
)

// checkJoin refuses what docker refuses of a container that is on another one's network (moby runconfig/hostconfig_unix.go).
func checkJoin(r *container.CreateRequest) error {
	h := r.HostConfig
	if h == nil || !h.NetworkMode.IsContainer() {
		return nil
	}
	mac := false
	if n := r.NetworkingConfig; n != nil {
		for _, e := range n.EndpointsConfig {
			mac = mac || e != nil && len(e.MacAddress) > 0
		}
	}
	switch {
	case r.Config.Hostname != "":
		return dockerhttp.Invalid("conflicting options: hostname and the network mode")
	case len(h.Links) > 0:
		return dockerhttp.Invalid("conflicting options: container type network can't be used with links. This would result in undefined behavior")
	case len(h.DNS) > 0:
		return dockerhttp.Invalid("conflicting options: dns and the network mode")
	case len(h.ExtraHosts) > 0:
		return dockerhttp.Invalid("conflicting options: custom host-to-IP mapping and the network mode")
	case mac:
		return dockerhttp.Invalid("conflicting options: mac-address and the network mode")
	case len(h.PortBindings) > 0, h.PublishAllPorts:
		return dockerhttp.Invalid("conflicting options: port publishing and the container type network mode")
	case len(r.Config.ExposedPorts) > 0:
		return dockerhttp.Invalid("conflicting options: port exposing and the container type network mode")
	}
	return nil
}

// join makes the container one of another's machine, whose network, host name, memory and processors it shares.
func (b *builder) join() error {
	b.networks, b.pod.Network, b.pod.Hostname, b.config.Hostname = nil, spec.Network{}, "", ""
	switch {
	case b.zone != "":
		return dockerhttp.Invalid("label kr.zone with --network container: is not possible: the container is where the one is that it joins")
	case len(b.host.StorageOpt) > 0:
		return refused("--storage-opt with --network container:", "the disk is that of the machine that it joins")
	}
	b.own.Resources.Memory = cmp.Or(spec.Bytes(b.host.Memory), b.pod.Resources.Memory) // else that of kr.res.mem
	b.pod.Resources, b.pod.Scratch = spec.Resources{}, spec.Scratch{}
	b.own.Lifecycle.Critical = false
	b.joins = true
	return nil
}
