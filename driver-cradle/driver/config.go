package driver

import (
	"errors"
	"fmt"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/hashicorp/nomad/plugins/base"
	"github.com/hashicorp/nomad/plugins/shared/hclspec"

	"github.com/cradlestack/cradlestack/driver-cradle/boot"
	"github.com/cradlestack/cradlestack/driver-cradle/vmm"
	"github.com/cradlestack/cradlestack/spec"
)

// Defaults of the plugin's configuration.
const (
	defaultCacheDir    = "/var/lib/cradle"
	defaultStateDir    = "/var/lib/cradle/nomad"
	defaultPullTimeout = 5 * time.Minute
	defaultImageDelay  = 24 * time.Hour
	defaultOrphanDelay = 5 * time.Minute
)

// configKeys are those of the agent's plugin block.
var configKeys = []key{
	{name: "state_dir", kind: text, def: defaultStateDir, doc: "Directory of this client's pods. Each Nomad client needs its own."},
	{name: "cache_dir", kind: text, def: defaultCacheDir, doc: "Directory of image layers and templates. Clients of one host, and kcradle, can share it."},
	{name: "boot_package", kind: text, def: "found as kcradle does", doc: "Directory of the boot package: the guest's kernel and agent."},
	{name: "accelerator", kind: text, def: "auto", doc: "How machines run: auto (KVM where it works), kvm, tcg (emulated)."},
	{name: "qemu_uid", kind: number, def: fmt.Sprint(vmm.DefaultFirstUID), doc: "First of the 65536 user and group ids of which each pod's QEMU runs as another. Nobody else may have them, and nothing may be theirs."},
	{name: "default_disk", kind: text, def: "10GiB", doc: "Size of a pod's scratch disk where the task names none. It is sparse: it takes what is written."},
	{name: "image_pull_timeout", kind: text, def: "5m", doc: "Longest time for pulling a task's images, where the task names none."},
	{name: "insecure_registries", kind: texts, doc: "Registries (host[:port]) that are asked over HTTP, or whatever their certificate."},
	{name: "registry", kind: blocks, label: "name", doc: "How to reach one registry: docker.io, host[:port].", keys: []key{
		{name: "mirrors", kind: texts, doc: "Where to ask first: host[:port][/prefix], with http:// in front for one without TLS. The registry itself comes last."},
	}},
	{name: "auth", kind: block, doc: "Where credentials for registries come from, for tasks that bring none.", keys: []key{
		{name: "config", kind: text, def: "that of the user nomad runs as", doc: "Docker's configuration file: its auths, credsStore and credHelpers are used."},
		{name: "helper", kind: text, doc: "A docker credential helper to ask first: ecr-login for docker-credential-ecr-login."},
	}},
	{name: "volumes", kind: block, doc: "Which directories of the host tasks may mount with volumes and mount.", keys: []key{
		{name: "enabled", kind: boolean, def: "false", doc: "Whether tasks may mount directories outside of their allocation at all."},
		{name: "paths", kind: texts, def: "all", doc: "Only these and what is below them."},
	}},
	{name: "gc", kind: block, doc: "What is removed when.", keys: []key{
		{name: "image", kind: boolean, def: "true", doc: "Remove images that no task uses any more."},
		{name: "image_delay", kind: text, def: "24h", doc: "How long an image stays after its last use."},
		{name: "image_size", kind: text, def: "no bound", doc: "Remove images, the least recently used first, until the rest takes at most so much."},
		{name: "disk_delay", kind: text, def: "never", doc: "How long a scratch disk that tasks keep (disk_id) stays after it was written to for the last time."},
		{name: "container", kind: boolean, def: "true", doc: "Remove a task's pod directory when Nomad is done with the task. Without it, it stays in state_dir until the plugin starts anew, for looking at it."},
		{name: "orphan_delay", kind: text, def: "5m", doc: "How long pods that Nomad has not recovered after a restart, or that it does not know, go on before they are ended."},
	}},
}

func configSchema() *hclspec.Spec { return schemaOf(configKeys) }

// A config is the plugin's configuration. Pointers tell what is left out from what is off.
type config struct {
	StateDir    string                     `codec:"state_dir"`
	CacheDir    string                     `codec:"cache_dir"`
	BootPackage string                     `codec:"boot_package"`
	Accelerator string                     `codec:"accelerator"`
	QEMUUID     string                     `codec:"qemu_uid"`
	DefaultDisk string                     `codec:"default_disk"`
	PullTimeout string                     `codec:"image_pull_timeout"`
	Insecure    []string                   `codec:"insecure_registries"`
	Registries  map[string]*registryConfig `codec:"registry"` // pointers: see taskConfig
	Auth        *authConfig                `codec:"auth"`
	Volumes     *volumesConfig             `codec:"volumes"`
	GC          *gcConfig                  `codec:"gc"`

	cores       cores
	firstUID    int
	disk        spec.Bytes
	pullTimeout time.Duration
	imageDelay  time.Duration
	imageSize   spec.Bytes
	diskDelay   time.Duration // 0: never
	orphanDelay time.Duration
}

type registryConfig struct {
	Mirrors []string `codec:"mirrors"`
}

type authConfig struct {
	Config string `codec:"config"`
	Helper string `codec:"helper"`
}

type volumesConfig struct {
	Enabled bool     `codec:"enabled"`
	Paths   []string `codec:"paths"`
}

type gcConfig struct {
	Image       *bool  `codec:"image"`
	ImageDelay  string `codec:"image_delay"`
	ImageSize   string `codec:"image_size"`
	DiskDelay   string `codec:"disk_delay"`
	Container   *bool  `codec:"container"`
	OrphanDelay string `codec:"orphan_delay"`
}

// complete fills in the defaults and says what is wrong, with the key's name.
func (c *config) complete() error {
	c.StateDir, c.CacheDir = or(c.StateDir, defaultStateDir), or(c.CacheDir, defaultCacheDir)
	c.Accelerator = or(c.Accelerator, vmm.Auto)
	if c.Volumes == nil {
		c.Volumes = &volumesConfig{}
	}
	if c.GC == nil {
		c.GC = &gcConfig{}
	}
	if c.Auth == nil {
		c.Auth = &authConfig{}
	}
	var errs []error
	wrongAt := func(path []string, format string, args ...any) {
		errs = append(errs, &keyError{path, fmt.Sprintf(format, args...)})
	}
	wrong := func(key, format string, args ...any) { wrongAt(strings.Split(key, "."), format, args...) }
	absolute := func(key, path string) {
		if !filepath.IsAbs(path) || filepath.Clean(path) != path {
			wrong(key, "%q is no absolute path: write it from /, without .., //, and a slash at its end", path)
		}
	}
	absolute("state_dir", c.StateDir)
	absolute("cache_dir", c.CacheDir)
	if !slices.Contains([]string{vmm.Auto, vmm.KVM, vmm.TCG}, c.Accelerator) {
		wrong("accelerator", "%q is none of auto, kvm, tcg", c.Accelerator)
	}
	if c.BootPackage != "" {
		absolute("boot_package", c.BootPackage)
	}
	if c.QEMUUID != "" {
		const last = math.MaxUint32 - 1<<16 // the last id means none (chown(2))
		if n, err := strconv.ParseInt(c.QEMUUID, 10, 64); err != nil || n < 1 || n > last {
			wrong("qemu_uid", "%q is no first id: 1 to %d", c.QEMUUID, last)
		} else {
			c.firstUID = int(n)
		}
	}
	size := func(key, s string, def spec.Bytes, into *spec.Bytes) {
		*into = def
		if s != "" {
			n, err := spec.ParseBytes(s)
			if err != nil {
				wrong(key, "%v", err)
			}
			*into = n
		}
	}
	size("default_disk", c.DefaultDisk, spec.DefaultScratchSize, &c.disk)
	if c.disk < spec.MinScratch || c.disk > spec.MaxScratch {
		wrong("default_disk", "%v is out of range: %v to %v", c.disk, spec.MinScratch, spec.MaxScratch)
	}
	size("gc.image_size", c.GC.ImageSize, 0, &c.imageSize)
	duration := func(key, s string, def time.Duration, into *time.Duration) {
		var err error
		if *into, err = parseDuration(s, def); err != nil {
			wrong(key, "%v", err)
		}
	}
	duration("image_pull_timeout", c.PullTimeout, defaultPullTimeout, &c.pullTimeout)
	duration("gc.image_delay", c.GC.ImageDelay, defaultImageDelay, &c.imageDelay)
	duration("gc.disk_delay", c.GC.DiskDelay, 0, &c.diskDelay)
	duration("gc.orphan_delay", c.GC.OrphanDelay, defaultOrphanDelay, &c.orphanDelay)
	for _, p := range c.Volumes.Paths {
		absolute("volumes.paths", p)
	}
	if len(c.Volumes.Paths) > 0 && !c.Volumes.Enabled {
		wrong("volumes.paths", "means nothing without enabled = true")
	}
	for _, r := range c.Insecure {
		if r == "" || strings.ContainsAny(r, "/ ") {
			wrong("insecure_registries", "%q is no registry: write host or host:port", r)
		}
	}
	for name, r := range c.Registries {
		if name == "" || strings.ContainsAny(name, "/ ") {
			wrongAt([]string{"registry", name}, "no registry has that name: write docker.io, host or host:port")
		}
		for _, m := range r.Mirrors {
			if m == "" || strings.ContainsAny(m, " ") {
				wrongAt([]string{"registry", name, "mirrors"}, "%q is no address: write host[:port][/prefix]", m)
			}
		}
	}
	if c.Auth.Config != "" {
		absolute("auth.config", c.Auth.Config)
		if _, err := os.Stat(c.Auth.Config); err != nil {
			wrong("auth.config", "%v", err)
		}
	}
	if strings.ContainsAny(c.Auth.Helper, "/ ") {
		wrong("auth.helper", "%q is no helper's name: write ecr-login for docker-credential-ecr-login", c.Auth.Helper)
	}
	return errors.Join(errs...)
}

// boot finds the boot package.
func (c *config) boot() (*boot.Package, error) {
	p, err := boot.Find(c.BootPackage, boot.VariantDefault)
	if errors.Is(err, boot.ErrNoPackage) && c.BootPackage == "" && os.Getenv("CRADLE_BOOT") == "" {
		if stock, serr := boot.Find("", boot.VariantStock); serr == nil {
			return stock, nil
		}
	}
	return p, err
}

// mirrors as package image takes them.
func (c *config) mirrors() map[string][]string {
	m := map[string][]string{}
	for name, r := range c.Registries {
		m[name] = r.Mirrors
	}
	return m
}

// allowed says why tasks may not mount a path of the host. Symbolic links are followed: what they lead to has to be allowed.
func (c *config) allowed(path string) error {
	if !c.Volumes.Enabled {
		return errors.New("directories of the host can't be mounted on this client: its operator can allow it with volumes { enabled = true } in the plugin's configuration; use a host volume, or a CSI volume")
	}
	if len(c.Volumes.Paths) == 0 {
		return nil
	}
	real, err := filepath.EvalSymlinks(path)
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%s does not exist on this client", path)
	}
	if err != nil {
		return err
	}
	for _, p := range c.Volumes.Paths {
		root, err := filepath.EvalSymlinks(p)
		if err != nil {
			continue
		}
		if rel, err := filepath.Rel(root, real); err == nil && filepath.IsLocal(rel) {
			return nil
		}
	}
	return fmt.Errorf("%s is not below one of the paths that this client's operator allows (%s)", path, strings.Join(c.Volumes.Paths, ", "))
}

// cores are the client's, for turning MHz into processors.
type cores struct {
	count int
	mhz   float64 // of one of them
}

func coresOf(a *base.AgentConfig) cores {
	total := a.Compute()
	if total.NumCores == 0 {
		return cores{}
	}
	return cores{total.NumCores, float64(total.TotalCompute) / float64(total.NumCores)}
}

func parseDuration(s string, def time.Duration) (time.Duration, error) {
	if s == "" {
		return def, nil
	}
	d, err := time.ParseDuration(s)
	if err != nil || d < 0 {
		return 0, fmt.Errorf("%q is no duration: write 90s or 5m", s)
	}
	return d, nil
}

func or(a, b string) string {
	if a != "" {
		return a
	}
	return b
}

func enabled(b *bool, def bool) bool {
	if b == nil {
		return def
	}
	return *b
}
