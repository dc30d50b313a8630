package translate

import (
	"cmp"
	"net/http"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/moby/moby/api/types/mount"
	"github.com/moby/moby/api/types/volume"

	"github.com/cradlestack/cradlestack/internal/dockerhttp"
	"github.com/cradlestack/cradlestack/spec"
)

// mounts adds what the request names, and an anonymous volume wherever the image or the request wants one and nothing else is mounted.
func (b *builder) mounts() error {
	h := &b.host
	taken := map[string]bool{}
	for target, options := range h.Tmpfs {
		if !path.IsAbs(target) {
			return dockerhttp.Invalid("invalid mount path: '%s' mount path must be absolute", target)
		}
		if target = path.Clean(target); target == "/" {
			return dockerhttp.Invalid("invalid specification: destination can't be '/'")
		}
		taken[target] = true
		b.tmpfs(target, options)
	}
	all := slices.Clone(h.Mounts)
	for _, text := range h.Binds {
		m, err := parseBind(text)
		if err != nil {
			return err
		}
		all = append(all, m)
	}
	for _, m := range all {
		target := path.Clean(m.Target)
		if taken[target] {
			return dockerhttp.Invalid("Duplicate mount point: %s", target)
		}
		taken[target] = true
		if err := b.mount(m); err != nil {
			return err
		}
	}
	for _, m := range b.rules.Inherited {
		if target := path.Clean(m.Target); !taken[target] {
			taken[target] = true
			if err := b.mount(m); err != nil {
				return err
			}
		}
	}
	var anonymous []string
	for target := range b.config.Volumes {
		if !path.IsAbs(target) {
			return dockerhttp.Invalid("invalid volume specification: '%s': mount path must be absolute", target)
		}
		if target = path.Clean(target); !taken[target] {
			anonymous = append(anonymous, target)
		}
	}
	slices.Sort(anonymous)
	for _, target := range slices.Compact(anonymous) {
		if err := b.mount(mount.Mount{Type: mount.TypeVolume, Target: target}); err != nil {
			return err
		}
	}
	return nil
}

func (b *builder) tmpfs(target, options string) {
	if b.own.Tmpfs == nil {
		b.own.Tmpfs = map[string]string{}
	}
	b.own.Tmpfs[target] = options
}

// parseBind reads [SOURCE:]TARGET[:OPTIONS].
func parseBind(text string) (mount.Mount, error) {
	m := mount.Mount{Type: mount.TypeVolume}
	parts := strings.Split(text, ":")
	switch len(parts) {
	case 1:
		m.Target = parts[0]
	case 2, 3:
		m.Source, m.Target = parts[0], parts[1]
	default:
		return m, dockerhttp.Invalid("invalid volume specification: '%s'", text)
	}
	if !path.IsAbs(m.Target) {
		return m, dockerhttp.Invalid("invalid volume specification: '%s': invalid mount config for type \"volume\": invalid mount path: '%s' mount path must be absolute", text, m.Target)
	}
	if path.IsAbs(m.Source) {
		m.Type = mount.TypeBind
	}
	if len(parts) < 3 {
		return m, nil
	}
	for _, o := range strings.Split(parts[2], ",") {
		switch o {
		case "ro":
			m.ReadOnly = true
		case "nocopy":
			m.VolumeOptions = &mount.VolumeOptions{NoCopy: true}
		case "rw", "z", "Z", "cached", "delegated", "consistent", "private", "rprivate":
		case "shared", "rshared", "slave", "rslave":
			return m, refused("-v "+text, "mounts are not propagated between a node and a microVM")
		default:
			return m, dockerhttp.Invalid("invalid mode: %s", parts[2])
		}
	}
	return m, nil
}

// VolumeRule is docker's for names of volumes (moby volume/local).
var VolumeRule = regexp.MustCompile(`^[a-zA-Z0-9][a-zA-Z0-9_.-]+$`)

// mount adds one volume, directory or tmpfs.
func (b *builder) mount(m mount.Mount) error {
	if !path.IsAbs(m.Target) {
		return dockerhttp.Invalid("invalid mount config for type %q: invalid mount path: '%s' mount path must be absolute", m.Type, m.Target)
	}
	made := spec.Mount{Path: path.Clean(m.Target), ReadOnly: m.ReadOnly}
	if made.Path == "/" {
		return dockerhttp.Invalid("invalid mount config for type %q: invalid specification: destination can't be '/'", m.Type)
	}
	switch m.Type {
	case mount.TypeTmpfs:
		return b.tmpfsMount(made.Path, m)
	case mount.TypeBind:
		if !path.IsAbs(m.Source) {
			return dockerhttp.Invalid("invalid mount config for type \"bind\": invalid mount path: '%s' mount path must be absolute", m.Source)
		}
		if !b.rules.HostPaths {
			return dockerhttp.Errorf(http.StatusForbidden, "%s: directories of a node can't be mounted, the container may run on any of them: use a volume, docker cp, or compose's configs; on a single node its operator can allow them (cradle-dockerapi serve --host-paths)", m.Source)
		}
		if o := m.BindOptions; o != nil && o.Propagation != "" && o.Propagation != mount.PropagationPrivate && o.Propagation != mount.PropagationRPrivate {
			return refused("bind-propagation="+string(o.Propagation), "mounts are not propagated between a node and a microVM")
		}
		made.Volume, made.NoCopy = "host-"+short(made.Path), true
		b.pod.Volumes = append(b.pod.Volumes, spec.Volume{Name: made.Volume, Directory: &spec.DirectoryVolume{Path: path.Clean(m.Source)}})
	case mount.TypeVolume, "":
		if o := m.VolumeOptions; o != nil {
			made.NoCopy, made.Subpath = o.NoCopy, o.Subpath
		}
		if made.Subpath != "" {
			if !filepath.IsLocal(made.Subpath) {
				return dockerhttp.Invalid("invalid mount config for type \"volume\": subpath must be a relative path within the volume")
			}
			if made.Subpath = path.Clean(made.Subpath); made.Subpath == "." {
				made.Subpath = ""
			}
		}
		switch {
		case m.Source == "":
			made.Volume = AnonymousVolume(made.Path)
			b.pod.Volumes = append(b.pod.Volumes, spec.Volume{Name: made.Volume, Scratch: &spec.ScratchVolume{}})
		case !VolumeRule.MatchString(m.Source):
			return dockerhttp.Invalid("create %s: %q includes invalid characters for a local volume name, only \"[a-zA-Z0-9][a-zA-Z0-9_.-]\" are allowed. If you intended to pass a host directory, use absolute path", m.Source, m.Source)
		default:
			made.Volume = m.Source
			b.named(m)
		}
	case mount.TypeImage:
		return refused("--mount type=image", "not supported yet")
	default:
		return dockerhttp.Invalid("mount type unknown: %q", m.Type)
	}
	b.own.Mounts = append(b.own.Mounts, made)
	return nil
}

// named adds a volume that has a name. Which class it has is known when it is there.
func (b *builder) named(m mount.Mount) {
	if slices.ContainsFunc(b.volumes, func(v volume.CreateRequest) bool { return v.Name == m.Source }) {
		return
	}
	made := volume.CreateRequest{Name: m.Source, Driver: b.host.VolumeDriver}
	if o := m.VolumeOptions; o != nil {
		if made.Labels = o.Labels; o.DriverConfig != nil {
			made.Driver, made.DriverOpts = cmp.Or(o.DriverConfig.Name, made.Driver), o.DriverConfig.Options
		}
	}
	b.volumes = append(b.volumes, made)
	b.pod.Volumes = append(b.pod.Volumes, spec.Volume{Name: m.Source, Class: Classes[0]})
}

// AnonymousVolume is the name, in the pod, of the volume without one that is mounted at a path. It lies on the pod's scratch disk.
func AnonymousVolume(target string) string { return "anonymous-" + short(target) }

func (b *builder) tmpfsMount(target string, m mount.Mount) error {
	var options []string
	if o := m.TmpfsOptions; o != nil {
		if o.SizeBytes < 0 {
			return dockerhttp.Invalid("invalid mount config for type \"tmpfs\": size is negative")
		}
		if o.SizeBytes > 0 {
			options = append(options, "size="+strconv.FormatInt(o.SizeBytes, 10))
		}
		if o.Mode != 0 {
			options = append(options, "mode="+strconv.FormatUint(uint64(o.Mode), 8))
		}
		for _, o := range o.Options {
			options = append(options, strings.Join(o, "="))
		}
	}
	if m.ReadOnly {
		options = append(options, "ro")
	}
	b.tmpfs(target, strings.Join(options, ","))
	return nil
}
