package translate

import (
	"maps"
	"net/http"
	"regexp"
	"slices"
	"strings"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/network"

	"github.com/cradlestack/cradlestack/internal/dockerhttp"
)

// networkRule is docker's for names of networks (moby daemon/names).
var networkRule = regexp.MustCompile(`^[a-zA-Z0-9][a-zA-Z0-9_.-]*$`)

// aliasRule is what a resolver can be asked for.
var aliasRule = regexp.MustCompile(`^[a-zA-Z0-9_]([a-zA-Z0-9_.-]{0,251}[a-zA-Z0-9_])?$`)

// networkOptions are those of docker's driver bridge that say what is so anyway.
var networkOptions = map[string]string{
	"com.docker.network.bridge.enable_icc": "true", "com.docker.network.bridge.enable_ip_masquerade": "true", "com.docker.network.bridge.host_binding_ipv4": "0.0.0.0",
}

// IsOwn says whether a network is one that somebody has made, in which containers have names.
func IsOwn(name string) bool { return container.NetworkMode(name).IsUserDefined() }

// Network checks a request for a network.
func Network(r *network.CreateRequest) error {
	switch {
	case container.NetworkMode(r.Name).IsDefault() || r.Name == Bridge || r.Name == None || r.Name == "host":
		return dockerhttp.Errorf(http.StatusForbidden, "operation is not permitted on predefined %s network", r.Name)
	case !networkRule.MatchString(r.Name) || len(r.Name) > 100:
		return dockerhttp.Invalid("invalid network name %q: letters, digits, _ . and - are allowed, at most 100", r.Name)
	case r.Driver != "" && r.Driver != "default" && r.Driver != Bridge:
		return refused("--driver "+r.Driver, "there is bridge, in which containers find each other by name")
	case r.Scope != "" && r.Scope != "local", r.Ingress, r.ConfigOnly, r.ConfigFrom != nil && r.ConfigFrom.Network != "":
		return dockerhttp.Invalid("this is no swarm: networks have scope local, and are no ingress and no configurations for others")
	case r.Internal:
		return refused("--internal", "containers of a network have the way out that their node has")
	case r.EnableIPv6 != nil && *r.EnableIPv6:
		return refused("--ipv6", "the operator gives the nodes' bridges IPv6 addresses, or not (bridge_network_subnet_ipv6 of Nomad's client)")
	case r.EnableIPv4 != nil && !*r.EnableIPv4:
		return refused("--ipv4=false", "containers are found by their IPv4 addresses")
	}
	if i := r.IPAM; i != nil && (len(i.Config) > 0 || len(i.Options) > 0 || i.Driver != "" && i.Driver != "default") {
		return refused("--subnet, --gateway and --ipam-driver", "addresses are the nodes', of the subnet of Nomad's bridge")
	}
	for _, name := range slices.Sorted(maps.Keys(r.Options)) {
		if networkOptions[name] != r.Options[name] {
			return refused("--opt "+name+"="+r.Options[name], "the network is Nomad's bridge, which its operator configures")
		}
	}
	return nil
}

// linkAlone is why there is no --link without a network of one's own.
const linkAlone = "put both containers on a network of their own (docker network create), where they find each other by name, and where --link gives one a further name"

// Links are the containers that a new one links to, as their names were given, with its own names for them.
func (c *Container) Links() (map[string][]string, error) {
	all := slices.Clone(c.Host.Links)
	for _, name := range slices.Sorted(maps.Keys(c.Networks)) {
		all = append(all, c.Networks[name].Links...)
	}
	out := map[string][]string{}
	for _, link := range all {
		name, alias, ok := strings.Cut(link, ":")
		if !ok {
			alias = name
		}
		switch {
		case name == "" || !aliasRule.MatchString(alias):
			return nil, dockerhttp.Invalid("link %q: write CONTAINER:NAME; a name has letters, digits, _ . and -, at most 253", link)
		case len(all) > maxLinks:
			return nil, dockerhttp.Invalid("a container has %d links; at most %d", len(all), maxLinks)
		case !slices.Contains(out[name], alias):
			out[name] = append(out[name], alias)
		}
	}
	return out, nil
}

const maxLinks = 256

// Endpoint checks what is asked for a container's place on a network.
func Endpoint(name string, e *network.EndpointSettings) error {
	if e == nil {
		return nil
	}
	if i := e.IPAMConfig; i != nil && (i.IPv4Address.IsValid() || i.IPv6Address.IsValid() || len(i.LinkLocalIPs) > 0) {
		return refused("--ip", "the node chooses the address: use the container's name, or --network-alias")
	}
	switch {
	case len(e.Links) > 0 && !IsOwn(name):
		return refused("--link", linkAlone)
	case len(e.DriverOpts) > 0:
		return refused("--driver-opt", "the interface is that of Nomad's bridge, which its operator configures")
	case len(e.Aliases) > 0 && !IsOwn(name):
		return dockerhttp.Invalid("network-scoped aliases are only supported for user-defined networks")
	}
	for _, a := range e.Aliases {
		if !aliasRule.MatchString(a) {
			return dockerhttp.Invalid("network alias %q: letters, digits, _ . and - are allowed, at most 253", a)
		}
	}
	return nil
}
