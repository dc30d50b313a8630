// Package vdocker answers the container part of docker's Engine API inside the guest: list, inspect, logs, attach, exec, cp, stats and
// whatever else concerns containers that exist. The docker CLI and its API clients work against it unchanged; whoever is outside
// proxies the connection byte for byte.
//
// A pod is not a docker host: what it can't do, such as creating containers, or managing images and networks, answers 501 in docker's
// error shape and says what to do instead.
//
// Types and messages are docker's (moby/moby/api; api/swagger.yaml is the reference for each route). It is part of the guest's
// initramfs.
package vdocker

import (
	"fmt"
	"net/http"
	"strings"

	"github.com/cradlestack/cradlestack/driver-cradle/guest"
	"github.com/cradlestack/cradlestack/internal/dockerhttp"
)

// versions are those of the API that are spoken: what is asked of a container has not changed since 1.24.
var versions = dockerhttp.Versions{Min: 24, Max: 51, Server: "cradle (linux)"}

// Handler answers for the pod.
func Handler(p *guest.Pod) http.Handler {
	a := &api{pod: p}
	mux := http.NewServeMux()
	on := func(pattern string, h func(http.ResponseWriter, *http.Request) error) {
		mux.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) {
			if err := h(w, r); err != nil {
				answerError(w, err)
			}
		})
	}
	container := func(pattern string, h func(http.ResponseWriter, *http.Request, *guest.Container) error) {
		on(pattern, func(w http.ResponseWriter, r *http.Request) error {
			c, err := p.Lookup(r.PathValue("id"))
			if err != nil {
				return err
			}
			return h(w, r, c)
		})
	}

	on("GET /_ping", dockerhttp.Ping)
	on("GET /version", a.version)
	on("GET /info", a.info)
	on("GET /events", a.events)
	on("GET /containers/json", a.list)

	container("GET /containers/{id}/json", a.inspect)
	container("GET /containers/{id}/logs", a.logs)
	container("GET /containers/{id}/top", a.top)
	container("GET /containers/{id}/stats", a.stats)
	container("GET /containers/{id}/changes", a.changes)
	container("GET /containers/{id}/export", a.export)
	container("HEAD /containers/{id}/archive", a.statPath)
	container("GET /containers/{id}/archive", a.getArchive)
	container("PUT /containers/{id}/archive", a.putArchive)
	container("POST /containers/{id}/start", a.start)
	container("POST /containers/{id}/stop", a.stop)
	container("POST /containers/{id}/restart", a.restart)
	container("POST /containers/{id}/kill", a.kill)
	container("POST /containers/{id}/pause", a.pause)
	container("POST /containers/{id}/unpause", a.unpause)
	container("POST /containers/{id}/wait", a.wait)
	container("POST /containers/{id}/resize", a.resize)
	container("POST /containers/{id}/update", a.update)
	container("POST /containers/{id}/attach", a.attach)
	container("POST /containers/{id}/exec", a.execCreate)
	on("POST /exec/{id}/start", a.execStart)
	on("POST /exec/{id}/resize", a.execResize)
	on("GET /exec/{id}/json", a.execInspect)

	for pattern, why := range unsupported {
		on(pattern, func(http.ResponseWriter, *http.Request) error {
			return dockerhttp.NewError(http.StatusNotImplemented, why)
		})
	}
	for pattern, kind := range absent {
		on(pattern, func(_ http.ResponseWriter, r *http.Request) error {
			return dockerhttp.NewError(http.StatusNotFound, fmt.Sprintf("No such %s: %s", kind, r.PathValue("name")))
		})
	}
	on("GET /images/{name...}", func(_ http.ResponseWriter, r *http.Request) error {
		if name, ok := strings.CutSuffix(r.PathValue("name"), "/json"); ok {
			return dockerhttp.NewError(http.StatusNotFound, "No such image: "+name)
		}
		return dockerhttp.NewError(http.StatusNotImplemented, noImages)
	})
	on("/", func(http.ResponseWriter, *http.Request) error {
		return dockerhttp.NewError(http.StatusNotFound, "page not found")
	})
	return versions.Handler(mux)
}

type api struct{ pod *guest.Pod }

// What a pod can't do, and what to do.
var unsupported = map[string]string{
	"POST /containers/create":        "a pod's containers are those of its launch.json: prepare another pod with kcradle summon",
	"POST /containers/prune":         "a pod keeps its containers until its directory is removed",
	"DELETE /containers/{id}":        "a pod keeps its containers until its directory is removed: stop the container, or end the pod and remove its directory",
	"POST /containers/{id}/rename":   "a pod's containers have the names of its launch.json: change it there and run the pod again",
	"GET /containers/{id}/attach/ws": "attaching over a websocket is not supported: use POST /containers/{id}/attach",
	"POST /commit":                   "a pod can't make images: export the container with docker export and import that into a registry",
	"POST /build":                    noImages, "POST /build/prune": noImages, "/images/": noImages, "/distribution/": noImages, "POST /session": noImages, "POST /grpc": noImages,
	"/networks": noNetworks, "/networks/": noNetworks,
	"/volumes": noVolumes, "/volumes/": noVolumes,
	"/swarm": noSwarm, "/swarm/": noSwarm, "/nodes": noSwarm, "/nodes/": noSwarm, "/services": noSwarm, "/services/": noSwarm, "/tasks": noSwarm, "/tasks/": noSwarm,
	"/secrets": noSwarm, "/secrets/": noSwarm, "/configs": noSwarm, "/configs/": noSwarm,
	"/plugins": noPlugins, "/plugins/": noPlugins,
	"POST /auth":                                      "a pod has no registry credentials: they belong to the host that summons it",
	"GET /system/df":                                  "a pod does not account for disk usage: see docker ps --size, and the pod's directory on the host",
	"/containers/{id}/checkpoints":                    "checkpoints are not supported",
	"/containers/{id}/checkpoints/{checkpoint}":       "checkpoints are not supported",
	"POST /containers/{id}/checkpoints/{checkpoint}/": "checkpoints are not supported",
}

const (
	noImages   = "a pod has no images of its own: they are resolved on the host by kcradle summon, see kcradle images"
	noNetworks = "a pod has one network, which all its containers share: it is set in launch.json"
	noVolumes  = "a pod's volumes are those of its launch.json: they are managed on the host"
	noSwarm    = "a pod is no swarm"
	noPlugins  = "a pod has no plugins"
)

// Single objects that docker inspect tries one after the other when it isn't told a type.
var absent = map[string]string{
	"GET /networks/{name}":     "network",
	"GET /volumes/{name}":      "volume",
	"GET /nodes/{name}":        "node",
	"GET /services/{name}":     "service",
	"GET /tasks/{name}":        "task",
	"GET /secrets/{name}":      "secret",
	"GET /configs/{name}":      "config",
	"GET /plugins/{name}/json": "plugin",
}
