package server

import (
	"crypto/sha256"
	"encoding/hex"
	"net/http"
	"net/netip"
	"slices"
	"strconv"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/mount"
	"github.com/moby/moby/api/types/network"
	"github.com/moby/moby/api/types/storage"

	"github.com/cradlestack/cradlestack/dockerapi/translate"
	"github.com/cradlestack/cradlestack/internal/dockerhttp"
)

func (s *Server) inspectContainer(w http.ResponseWriter, r *http.Request, t *tenant, c *record) error {
	one := t.ask(r.Context(), c, podTimeout)
	argv := slices.Concat(c.Config.Entrypoint, c.Config.Cmd)
	path, args := "", []string{}
	if len(argv) > 0 {
		path, args = argv[0], slices.Clone(argv[1:])
	}
	out := dockerhttp.InspectedContainer{InspectResponse: container.InspectResponse{
		ID: c.ID, Name: "/" + c.Name, Created: stamp(c.Created), Path: path, Args: args, State: &one.state, Image: c.Image.ID, Driver: "overlay2", Platform: "linux",
		RestartCount: c.Last.Restarts + c.Again, HostConfig: c.Host, Config: c.Config, Mounts: mountPoints(c),
		GraphDriver: &storage.DriverData{Name: "overlay2", Data: map[string]string{}},
	}}
	if i := one.inside; i != nil {
		out.RestartCount, out.LogPath, out.ResolvConfPath, out.HostnamePath, out.HostsPath = i.RestartCount+c.Again, i.LogPath, i.ResolvConfPath, i.HostnamePath, i.HostsPath
		if i.GraphDriver != nil {
			out.GraphDriver.Data = i.GraphDriver.Data
		}
		for _, exec := range i.ExecIDs {
			out.ExecIDs = append(out.ExecIDs, c.ID+exec)
		}
	}
	if dockerhttp.Truth(r, "size") {
		if err := t.sizes(r, c, &out.InspectResponse); err != nil {
			return err
		}
	}
	n := &out.NetworkSettings
	n.Ports, n.Networks = t.ports(c), t.endpoints(one)
	if one.state.Running {
		sum := sha256.Sum256([]byte(c.ID))
		n.SandboxID = hex.EncodeToString(sum[:])
	}
	if e := n.Networks[translate.Bridge]; e != nil {
		n.EndpointID = e.EndpointID
		if e.IPAddress.IsValid() {
			n.IPAddress, n.IPPrefixLen, n.Gateway, n.MacAddress = e.IPAddress.String(), e.IPPrefixLen, addressText(e.Gateway), e.MacAddress.String()
		}
	}
	return dockerhttp.Answer(w, http.StatusOK, out)
}

func addressText(a netip.Addr) string {
	if !a.IsValid() {
		return ""
	}
	return a.String()
}

// sizes asks a running container's pod.
func (t *tenant) sizes(r *http.Request, c *record, out *container.InspectResponse) error {
	p, err := t.running(c)
	if err != nil {
		return nil //nolint:nilerr // it is known of those that run
	}
	var i container.InspectResponse
	if err := p.call(r.Context(), http.MethodGet, p.inside("/json"), map[string][]string{"size": {"1"}}, nil, &i); err != nil {
		return err
	}
	out.SizeRw, out.SizeRootFs = i.SizeRw, i.SizeRootFs
	return nil
}

// ports are the container's, with where each is to be found.
func (t *tenant) ports(c *record) network.PortMap {
	m := network.PortMap{}
	if !t.isRunning(c) || c.Joins != "" {
		return m
	}
	for p := range c.Config.ExposedPorts {
		m[p] = nil
	}
	for _, published := range t.published(c) {
		p := portOf(published)
		m[p] = append(m[p], network.PortBinding{HostIP: hostIP(published), HostPort: strconv.Itoa(int(published.HostPort))})
	}
	return m
}

// endpoints are the container's places on networks.
func (t *tenant) endpoints(c *seen) map[string]*network.EndpointSettings {
	out := map[string]*network.EndpointSettings{}
	for name, asked := range c.Networks {
		e := asked.Copy()
		if !translate.IsOwn(name) {
			e.NetworkID = networkID(t.Namespace, name)
		} else {
			e.DNSNames = c.names(name)[1:]
		}
		if c.inside != nil && c.inside.NetworkSettings != nil {
			for _, own := range c.inside.NetworkSettings.Networks { // a pod has one
				e.IPAddress, e.IPPrefixLen, e.Gateway, e.MacAddress = own.IPAddress, own.IPPrefixLen, own.Gateway, own.MacAddress
				e.GlobalIPv6Address, e.GlobalIPv6PrefixLen, e.IPv6Gateway = own.GlobalIPv6Address, own.GlobalIPv6PrefixLen, own.IPv6Gateway
			}
			sum := sha256.Sum256([]byte(c.ID + name))
			e.EndpointID = hex.EncodeToString(sum[:])
		}
		out[name] = e
	}
	return out
}

// networkIDs are the ids of the container's networks.
func (t *tenant) networkIDs(r *record) []string {
	var ids []string
	for name, e := range r.Networks {
		if !translate.IsOwn(name) {
			ids = append(ids, networkID(t.Namespace, name))
		} else {
			ids = append(ids, e.NetworkID)
		}
	}
	return ids
}

// mountPoints are what the container has mounted, as docker writes it.
func mountPoints(c *record) []container.MountPoint {
	out := []container.MountPoint{}
	for _, m := range c.Pod.Containers[0].Mounts {
		p := container.MountPoint{Destination: m.Path, RW: !m.ReadOnly, Mode: "z"}
		for _, v := range c.Pod.Volumes {
			if v.Name != m.Volume {
				continue
			}
			switch {
			case v.Directory != nil:
				p.Type, p.Source, p.Propagation, p.Mode = mount.TypeBind, v.Directory.Path, mount.PropagationRPrivate, ""
			case v.Class != "":
				p.Type, p.Name, p.Driver, p.Source = mount.TypeVolume, v.Name, v.Class, volumeSource(v.Name)
			default:
				p.Type, p.Name, p.Driver, p.Mode = mount.TypeVolume, c.anonymousName(v.Name), onDisk, ""
			}
		}
		out = append(out, p)
	}
	for target := range c.Pod.Containers[0].Tmpfs {
		if _, old := c.Host.Tmpfs[target]; !old { // docker leaves out those of --tmpfs
			out = append(out, container.MountPoint{Type: mount.TypeTmpfs, Destination: target, RW: true})
		}
	}
	slices.SortFunc(out, func(a, b container.MountPoint) int {
		if a.Destination < b.Destination {
			return -1
		}
		return 1
	})
	return out
}
