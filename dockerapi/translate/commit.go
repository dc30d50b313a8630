package translate

import (
	dockerspec "github.com/moby/docker-image-spec/specs-go/v1"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/network"

	"github.com/cradlestack/cradlestack/internal/dockerhttp"
)

// ImageConfig is what of a container's configuration an image can have.
func ImageConfig(c *container.Config) dockerspec.DockerOCIImageConfig {
	var i dockerspec.DockerOCIImageConfig
	i.User, i.WorkingDir, i.StopSignal = c.User, c.WorkingDir, c.StopSignal
	i.Entrypoint, i.Cmd, i.Env = c.Entrypoint, c.Cmd, c.Env
	i.Labels, i.Volumes, i.Healthcheck = c.Labels, c.Volumes, c.Healthcheck
	i.OnBuild, i.Shell = c.OnBuild, c.Shell
	if len(c.ExposedPorts) > 0 {
		i.ExposedPorts = map[string]struct{}{}
		for p := range c.ExposedPorts {
			i.ExposedPorts[p.String()] = struct{}{}
		}
	}
	return i
}

// Commit is the configuration of an image that a container becomes: what was asked for, completed with the container's as a container's is with its
// image's.
func Commit(asked dockerspec.DockerOCIImageConfig, of *container.Config) (dockerspec.DockerOCIImageConfig, error) {
	b := &builder{image: &Image{Config: ImageConfig(of)}, config: container.Config{
		User: asked.User, WorkingDir: asked.WorkingDir, StopSignal: asked.StopSignal, Entrypoint: asked.Entrypoint, Cmd: asked.Cmd, Env: asked.Env,
		Labels: asked.Labels, Volumes: asked.Volumes, Healthcheck: asked.Healthcheck, OnBuild: asked.OnBuild, Shell: asked.Shell,
		ExposedPorts: network.PortSet{},
	}}
	for text := range asked.ExposedPorts {
		p, err := network.ParsePort(text)
		if err != nil {
			return asked, dockerhttp.Invalid("port %q: %v", text, err)
		}
		b.config.ExposedPorts[p] = struct{}{}
	}
	if err := b.merge(); err != nil {
		return asked, err
	}
	return ImageConfig(&b.config), nil
}
