package pod

import (
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"maps"
	"path"
	"slices"
	"strings"

	"github.com/cradlestack/cradlestack/driver-cradle/image"
	"github.com/cradlestack/cradlestack/spec"
)

// Resolve turns a Pod into the Launch that one guest executes: what the pod leaves open is taken from the images (by the names that
// the pod calls them), then from docker's defaults (moby daemon/commit.go, merge). id becomes the pod's and its first container's; the ids of other
// containers and the names of anonymous volumes follow from it. Equal arguments give equal results.
func Resolve(p *spec.Pod, id string, images map[string]*image.Image) (*spec.Launch, error) {
	l := &spec.Launch{
		Version: spec.LaunchVersion, ID: id, Name: p.Name, Hostname: p.Hostname,
		Resources: p.Resources, Boot: p.Boot, Network: p.Network, Scratch: p.Scratch,
		Volumes: slices.Clone(p.Volumes),
	}
	if l.Hostname == "" && len(id) >= 12 {
		l.Hostname = id[:12]
	}
	if l.Resources.Memory == 0 {
		l.Resources.Memory = spec.DefaultMemory
	}
	if l.Resources.CPUs == 0 {
		l.Resources.CPUs = 1
	}
	if l.Network.Mode == "" {
		l.Network.Mode = "user"
	}
	if l.Scratch.Size == 0 {
		l.Scratch.Size = spec.DefaultScratchSize
	}
	files := map[string]string{}
	for i := range p.Containers {
		from := &p.Containers[i]
		img, ok := images[from.Image]
		if !ok {
			return nil, fmt.Errorf("resolve container %s: image %s was not pulled", from.Name, from.Image)
		}
		c := resolveContainer(from, img)
		if c.ID = id; i > 0 {
			c.ID = derive(id, c.Name)
		}
		for _, layer := range img.Layers {
			if files[layer.DiffID] == "" {
				files[layer.DiffID] = fmt.Sprintf("%s/%d.ext4", layersDir, len(files))
			}
			c.Layers = append(c.Layers, spec.Layer{DiffID: layer.DiffID, File: files[layer.DiffID]})
		}
		for _, dir := range slices.Sorted(maps.Keys(img.Config.Config.Volumes)) {
			dir = path.Clean("/" + dir)
			if dir == "/" || mountedAt(&c.Settings, dir) {
				continue
			}
			name := derive(c.ID, dir)
			l.Volumes = append(l.Volumes, spec.Volume{Name: name, Scratch: &spec.ScratchVolume{}})
			c.Mounts = append(c.Mounts, spec.Mount{Volume: name, Path: dir})
		}
		l.Containers = append(l.Containers, c)
	}
	if err := l.Validate(); err != nil {
		return nil, err
	}
	return l, nil
}

// derive makes an id of another: the same one each time, none that can be guessed without it.
func derive(id, name string) string {
	sum := sha256.Sum256([]byte(id + "\x00" + name))
	return hex.EncodeToString(sum[:])
}

func mountedAt(s *spec.Settings, dir string) bool {
	if _, ok := s.Tmpfs[dir]; ok {
		return true
	}
	return slices.ContainsFunc(s.Mounts, func(m spec.Mount) bool { return m.Path == dir })
}

func resolveContainer(p *spec.PodContainer, img *image.Image) spec.Container {
	cfg := &img.Config.Config
	c := spec.Container{
		Name:  p.Name,
		Image: spec.Image{Reference: img.Reference, Digest: img.Digest, ID: img.ID, Labels: cfg.Labels},
		Env:   mergeEnv(cfg.Env, p.Env),
		User:  cmp.Or(p.User, cfg.User), WorkingDir: cmp.Or(p.WorkingDir, cfg.WorkingDir), StopSignal: cmp.Or(p.StopSignal, cfg.StopSignal),
		Settings: p.Settings,
	}
	c.Mounts = slices.Clone(p.Mounts)
	if c.WorkingDir != "" {
		c.WorkingDir = path.Clean("/" + c.WorkingDir)
	}
	if p.Entrypoint != nil {
		c.Entrypoint = *p.Entrypoint
	} else {
		c.Entrypoint = cfg.Entrypoint
	}
	switch {
	case p.Command != nil:
		c.Command = *p.Command
	case p.Entrypoint == nil:
		c.Command = cfg.Cmd
	}
	for port := range cfg.ExposedPorts {
		if !strings.Contains(port, "/") {
			port += "/tcp"
		}
		c.ExposedPorts = append(c.ExposedPorts, port)
	}
	slices.Sort(c.ExposedPorts)
	c.Healthcheck = resolveHealthcheck(p.Healthcheck, img)
	return c
}

// mergeEnv gives the pod's variables, then those of the image that the pod does not name. NAME alone removes one, the last of several
// counts.
func mergeEnv(image, pod []string) []string {
	var env []string
	at := map[string]int{} // -1: removed
	for _, e := range pod {
		name, _, isSet := strings.Cut(e, "=")
		i, known := at[name]
		switch {
		case !isSet:
			if known && i >= 0 {
				env[i] = ""
			}
			at[name] = -1
		case known && i >= 0:
			env[i] = e
		default:
			at[name] = len(env)
			env = append(env, e)
		}
	}
	for _, e := range image {
		name, _, isSet := strings.Cut(e, "=")
		if _, known := at[name]; !known && isSet && name != "" {
			env = append(env, e)
		}
	}
	return slices.DeleteFunc(env, func(e string) bool { return e == "" })
}

// resolveHealthcheck fills what the pod's leaves open from the image's.
func resolveHealthcheck(p *spec.Healthcheck, img *image.Image) *spec.Healthcheck {
	var h spec.Healthcheck
	if i := img.Config.Config.Healthcheck; i != nil {
		h = spec.Healthcheck{
			Test: i.Test, Interval: spec.Duration(i.Interval), Timeout: spec.Duration(i.Timeout),
			StartPeriod: spec.Duration(i.StartPeriod), StartInterval: spec.Duration(i.StartInterval), Retries: i.Retries,
		}
	}
	if p != nil {
		if len(p.Test) > 0 {
			h.Test = p.Test
		}
		h.Interval, h.Timeout = cmp.Or(p.Interval, h.Interval), cmp.Or(p.Timeout, h.Timeout)
		h.StartPeriod, h.StartInterval = cmp.Or(p.StartPeriod, h.StartPeriod), cmp.Or(p.StartInterval, h.StartInterval)
		h.Retries = cmp.Or(p.Retries, h.Retries)
	}
	if len(h.Test) == 0 {
		return nil
	}
	return &h
}
