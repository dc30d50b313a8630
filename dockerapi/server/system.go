package server

import (
	"context"
	"fmt"
	"net/http"
	"os"
	"runtime"
	"time"

	"github.com/hashicorp/nomad/api"
	"github.com/moby/moby/api/types/build"
	"github.com/moby/moby/api/types/system"

	"github.com/cradlestack/cradlestack/internal/dockerhttp"
)

func (s *Server) systemRoutes(on *router) {
	on.open("GET /_ping", dockerhttp.Ping) // HEAD as well
	on.open("GET /version", s.version)
	on.on("GET /info", s.info)
	on.on("POST /build/prune", func(w http.ResponseWriter, _ *http.Request, _ *tenant) error { // docker system prune asks for it: nothing is built, and nothing of it kept
		return dockerhttp.Answer(w, http.StatusOK, build.CachePruneReport{CachesDeleted: []string{}})
	})
}

func (s *Server) version(w http.ResponseWriter, r *http.Request) error {
	v := system.VersionResponse{
		Platform: system.PlatformInfo{Name: "cradlestack"}, Version: s.serverVersion(),
		APIVersion: dockerhttp.String(versions.Max), MinAPIVersion: dockerhttp.String(versions.Min),
		Os: "linux", Arch: runtime.GOARCH, GoVersion: runtime.Version(),
	}
	v.Components = []system.ComponentVersion{{Name: "cradle-dockerapi", Version: s.Version, Details: map[string]string{
		"ApiVersion": v.APIVersion, "MinAPIVersion": v.MinAPIVersion, "Os": v.Os, "Arch": v.Arch, "GoVersion": v.GoVersion,
	}}}
	// Nomad's version is there for those who may ask it, and while it answers: docker version works without.
	if t, err := s.tenant(r); err == nil {
		ctx, cancel := context.WithTimeout(r.Context(), pingTimeout)
		defer cancel()
		if members, err := t.nomad.Agent().MembersOpts((&api.QueryOptions{}).WithContext(ctx)); err == nil && len(members.Members) > 0 {
			v.Components = append(v.Components, system.ComponentVersion{
				Name: "nomad", Version: members.Members[0].Tags["build"], Details: map[string]string{"Address": s.Nomad.Address, "Namespace": t.Namespace},
			})
		}
	}
	return dockerhttp.Answer(w, http.StatusOK, v)
}

// pingTimeout bounds what is asked of Nomad for a mere ornament.
const pingTimeout = 2 * time.Second

func (s *Server) serverVersion() string { return "cradle-" + s.Version }

// info tells of the cluster as of one big docker host: the nodes that run pods together.
func (s *Server) info(w http.ResponseWriter, r *http.Request, t *tenant) error {
	i := system.Info{
		ID: "cradle/" + s.Nomad.Region + "/" + t.Namespace, Name: hostname(), Driver: "overlay2", LoggingDriver: "json-file", CgroupDriver: "cgroupfs", CgroupVersion: "2",
		MemoryLimit: true, PidsLimit: true, CPUShares: true, CPUCfsPeriod: true, CPUCfsQuota: true, IPv4Forwarding: true,
		OperatingSystem: "cradlestack: microVM pods in Nomad", OSType: "linux", Architecture: machine(), NGoroutines: runtime.NumGoroutine(),
		SystemTime: time.Now().Format(time.RFC3339Nano), ServerVersion: s.serverVersion(), DockerRootDir: "/", DefaultRuntime: "cradle",
		Runtimes:        map[string]system.RuntimeWithStatus{"cradle": {}},
		SecurityOptions: []string{"name=seccomp,profile=builtin", "name=microvm"},
		Labels:          []string{"nomad.namespace=" + t.Namespace}, Warnings: []string{},
	}
	i.Plugins.Log, i.Plugins.Network = []string{"json-file"}, []string{"bridge", "null"}
	nodes, _, err := t.nomad.Nodes().List((&api.QueryOptions{Params: map[string]string{"resources": "true"}}).WithContext(r.Context()))
	if isStatus(err, http.StatusForbidden) {
		i.Warnings = append(i.Warnings, "WARNING: the policy of this client's token does not let it see the nodes (node { policy = \"read\" }): processors and memory are not known")
	} else if err != nil {
		return err
	}
	var ready int
	for _, n := range nodes {
		if n.Drivers["cradle"] == nil || !n.Drivers["cradle"].Healthy || n.Status != api.NodeStatusReady {
			continue
		}
		ready++
		if of := n.Drivers["cradle"].Attributes; i.KernelVersion == "" && of != nil { // the version stands in no manifest: the package is what tells kernels apart
			i.KernelVersion = fmt.Sprintf("%s-%.12s", of["driver.cradle.boot.variant"], of["driver.cradle.boot.digest"])
		}
		if n.NodeResources != nil {
			i.NCPU += int(n.NodeResources.Cpu.TotalCpuCores)
			i.MemTotal += n.NodeResources.Memory.MemoryMB << 20
		}
	}
	if err := t.watch.ready(r.Context()); err != nil {
		return err
	}
	all, err := t.list(r.Context())
	if err != nil {
		return err
	}
	for _, c := range all {
		if i.Containers++; t.statusOf(c).Running {
			i.ContainersRunning++
		} else {
			i.ContainersStopped++
		}
	}
	i.DriverStatus = [][2]string{{"Nomad", s.Nomad.Address}, {"Namespace", t.Namespace}, {"Nodes with pods", fmt.Sprint(ready)}}
	if versions.Version(r) < 50 { // moby api/docs/CHANGELOG.md, v1.50
		return dockerhttp.Answer(w, http.StatusOK, struct {
			*system.Info
			BridgeNfIptables, BridgeNfIp6tables bool
		}{Info: &i})
	}
	return dockerhttp.Answer(w, http.StatusOK, i)
}

func hostname() string {
	name, err := os.Hostname()
	if err != nil {
		return "cradle"
	}
	return name
}

// machine is docker's name of the processor, as uname -m has it.
func machine() string {
	switch runtime.GOARCH {
	case "amd64":
		return "x86_64"
	case "arm64":
		return "aarch64"
	}
	return runtime.GOARCH
}
