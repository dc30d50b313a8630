// Package nomadjob translates between spec.Pod and a Nomad job whose task is run by the driver cradle. It is the only place that does: the Docker
// API, kra and Terraform all go through it, so that each can read what another one has made.
//
// Job and Pod are functions of their arguments alone: equal pods give equal jobs. Golden files show what comes out, and the driver's tests read
// them with the driver's own schema.
package nomadjob

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math"
	"path"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/hashicorp/nomad/api"

	"github.com/cradlestack/cradlestack/spec"
)

const (
	// Driver is the task driver's name.
	Driver = "cradle"
	// group is the name of a job's only group.
	group = "pod"
	// envItem begins the names of the items with the containers' environments, each a JSON list, of the variable at EnvPath; of further containers their
	// place follows. envFile begins the names of the files where a node writes them.
	envItem = "env"
	envFile = "secrets/env"
	// networksItem is its item with the services of the networks that the pod is on, and namesFile where the node writes who has which name there.
	networksItem = "networks"
	namesFile    = "local/names/hosts"
	namesWaitMin = 20 * time.Millisecond // after a change, for the next one
	namesWaitMax = 200 * time.Millisecond

	// neverLost is the time after which Nomad takes a pod for lost whose node does not answer. It would start one elsewhere then, whatever Replace says (1.11).
	neverLost = 10 * 365 * 24 * time.Hour

	diskMB       = 30 // Nomad's own of an allocation: the task's logs
	logFiles     = 2
	logFileMB    = 10
	leastMB      = 10  // that Nomad allows
	reservedMHz  = 100 // of a processor of the machine
	killMargin   = 5 * time.Second
	metaPrefix   = "cradle_"
	envIndexMeta = "cradlestack-env-index"
	csiType      = "csi"
	singleWriter = "single-node-writer"
	fileSystem   = "file-system"
	nodeTarget   = "${node.unique.id}"
	zoneTarget   = "${meta.zone}"
	// serviceProvider is Nomad itself.
	serviceProvider = "nomad"

	// The token of the identity is a variable of the task's, by which Nomad's client completes the configuration: it never stands in the job.
	identity      = "registry"
	identityToken = "${NOMAD_TOKEN_" + identity + "}"
	identityTTL   = time.Hour
)

// Options are what a job says beside its pod.
type Options struct {
	ID        string // of the job
	Namespace string
	// PodID is the id of the pod and of its first container, DiskID the name under which its scratch disk is kept. Both may be left out.
	PodID, DiskID string
	// Meta is kept with the job, the names with a prefix in front that other parts of a job's meta have not.
	Meta map[string]string
	// Node binds the pod to one node, by its id; Zone to the nodes whose meta.zone it is.
	Node, Zone string
	// Replace starts the pod elsewhere when its node is lost. Else it goes on when its node is back.
	Replace bool
	// Bare pods have nothing of Nomad's: no directories and no variables inside, and outside no log and no process that writes it. Their output is kept on their own disk.
	Bare bool
	// Audience is that of a workload identity with which the node asks the image's registry; "" for none.
	Audience string
	// Bridge gives the pod an interface in its node's bridge network, where other pods reach it.
	Bridge bool
	// Networks are those in which the pod has names, and finds those of other pods, of its namespace, by its resolver; Bridge has to be set. An empty list
	// lets it be put on networks while it runs: a job that differs in nothing but its networks is updated in place.
	Networks []Network
	// Links are further names that this pod alone has for others on its networks, by one of the names that those have there.
	Links map[string][]string
	// Service makes Nomad keep the pod running, and as many as it says; nil is a pod that runs once.
	Service *Service
	// Constraints are more of what a node has to be.
	Constraints []Constraint
	// EnvIndex is the index at which the variable at EnvPath was last changed, 0 for a job that does not care: a job that differs in it starts new pods, and
	// nothing of what is secret stands in it.
	EnvIndex uint64
	// Variant is the boot package that the pod needs, "" for whatever its node has.
	Variant string
}

// A Network is what pods have names on.
type Network struct {
	Service string // by which it is known in the namespace: a name of DNS, of at most 63 characters
	Names   []string
}

// EnvPath is the path of the variable that holds what EnvItems returns: a job that has an environment reads it there, so that no secret stands in
// its text. The job's own identity may read it, and nobody else's.
func EnvPath(jobID string) string { return "nomad/jobs/" + jobID }

// envName is a container's item, by its place in the pod.
func envName(i int) string {
	if i == 0 {
		return envItem
	}
	return envItem + strconv.Itoa(i)
}

func envPath(i int) string { return envFile + strings.TrimPrefix(envName(i), envItem) + ".json" }

// IsEnv says whether an item of the variable is an environment.
func IsEnv(item string) bool { return strings.HasPrefix(item, envItem) }

// IsNetworks says whether an item of the variable tells the pod's networks.
func IsNetworks(item string) bool { return item == networksItem }

// EnvItems is the variable's content for a pod on networks, nil where it is on none and none of its containers has an environment of its own. What
// it says of networks holds for a pod that runs as soon as the variable is written.
func EnvItems(p *spec.Pod, networks []Network) (api.VariableItems, error) {
	var items api.VariableItems
	if networks != nil {
		var services []string
		for _, n := range networks {
			services = append(services, n.Service)
		}
		items = api.VariableItems{networksItem: strings.Join(services, " ")}
	}
	for i := range p.Containers {
		if len(p.Containers[i].Env) == 0 {
			continue
		}
		text, err := json.Marshal(p.Containers[i].Env)
		if err != nil {
			return nil, err
		}
		if items == nil {
			items = api.VariableItems{}
		}
		items[envName(i)] = string(text)
	}
	return items, nil
}

// ReadsEnv says whether a job that Job has made reads an environment at EnvPath.
func ReadsEnv(j *api.Job) bool {
	for _, g := range j.TaskGroups {
		for _, t := range g.Tasks {
			if slices.ContainsFunc(t.Templates, func(t *api.Template) bool { return strings.HasPrefix(deref(t.DestPath), envFile) }) {
				return true
			}
		}
	}
	return false
}

// ReadsVariable says whether a job that Job has made reads the variable at EnvPath.
func ReadsVariable(j *api.Job) bool {
	for _, g := range j.TaskGroups {
		for _, t := range g.Tasks {
			if slices.ContainsFunc(t.Templates, func(t *api.Template) bool { return deref(t.DestPath) == namesFile }) {
				return true
			}
		}
	}
	return ReadsEnv(j)
}

// Job makes a pod's job: without Options.Service one that runs it once, which nobody starts again but who registers it anew. What a job can't say is an error
// that names the field.
func Job(p *spec.Pod, o Options) (*api.Job, error) {
	if err := p.Validate(); err != nil {
		return nil, err
	}
	b := builder{pod: p, options: o}
	config := b.config()
	if err := errors.Join(b.errs...); err != nil {
		return nil, err
	}
	own := &p.Containers[0]
	kill := spec.DefaultStopTimeout
	if own.StopTimeout != nil {
		kill = time.Duration(*own.StopTimeout)
	}
	task := &api.Task{
		Name: own.Name, Driver: Driver, Config: config, KillTimeout: ptr(kill + killMargin),
		LogConfig: &api.LogConfig{MaxFiles: ptr(logFiles), MaxFileSizeMB: ptr(logFileMB)},
		Resources: &api.Resources{CPU: ptr(reservedMHz * max(p.Resources.CPUs, 1)), MemoryMB: ptr(MemoryMB(p.Resources.Memory))},
	}
	if o.Bare {
		task.LogConfig.Disabled = ptr(true)
	}
	if own.StopSignal != "" {
		task.KillSignal = own.StopSignal
	}
	for i := range p.Containers {
		if len(p.Containers[i].Env) > 0 {
			task.Templates = append(task.Templates, &api.Template{
				EmbeddedTmpl: ptr(fmt.Sprintf(`{{ with nomadVar %q }}{{ .%s }}{{ end }}`, EnvPath(o.ID), envName(i))),
				DestPath:     ptr(envPath(i)), ChangeMode: ptr("noop"), Perms: ptr("0600"), ErrMissingKey: ptr(true),
			})
		}
	}
	if o.Networks != nil {
		task.Templates = append(task.Templates, &api.Template{
			EmbeddedTmpl: ptr(names(&o)), DestPath: ptr(namesFile), ChangeMode: ptr("noop"), Perms: ptr("0644"), ErrMissingKey: ptr(true),
			Wait: &api.WaitConfig{Min: ptr(namesWaitMin), Max: ptr(namesWaitMax)},
		})
	}
	task.VolumeMounts = b.volumeMounts
	if o.Audience != "" {
		task.Identities = []*api.WorkloadIdentity{{Name: identity, Audience: []string{o.Audience}, Env: true, TTL: identityTTL}}
		config["auth"] = map[string]any{"username": "nomad", "password": identityToken}
	}
	g := &api.TaskGroup{
		Name: ptr(group), Count: ptr(1), Tasks: []*api.Task{task}, Volumes: b.volumes,
		EphemeralDisk:    &api.EphemeralDisk{SizeMB: ptr(diskMB), Sticky: ptr(false), Migrate: ptr(false)},
		RestartPolicy:    &api.RestartPolicy{Attempts: ptr(0), Interval: ptr(time.Hour), Delay: ptr(time.Second), Mode: ptr("fail"), RenderTemplates: ptr(false)},
		ReschedulePolicy: &api.ReschedulePolicy{Attempts: ptr(0), Unlimited: ptr(false)},
		Disconnect:       &api.DisconnectStrategy{Replace: ptr(o.Replace)},
	}
	if !o.Replace {
		g.Disconnect.LostAfter = ptr(neverLost)
	}
	if n := b.network(); n != nil {
		g.Networks = []*api.NetworkResource{n}
	}
	for _, n := range o.Networks {
		g.Services = append(g.Services, &api.Service{Name: n.Service, Provider: serviceProvider, AddressMode: "alloc", Tags: n.Names})
	}
	kind := api.JobTypeBatch
	if o.Service != nil {
		kind = api.JobTypeService
		b.service(g)
		if err := errors.Join(b.errs...); err != nil {
			return nil, err
		}
	}
	job := &api.Job{
		ID: ptr(o.ID), Name: ptr(p.Name), Type: ptr(kind), Datacenters: []string{"*"}, TaskGroups: []*api.TaskGroup{g}, Meta: meta(o.Meta),
	}
	if o.Namespace != "" {
		job.Namespace = ptr(o.Namespace)
	}
	if o.Node != "" {
		job.Constraints = append(job.Constraints, api.NewConstraint(nodeTarget, "=", o.Node))
	}
	if o.Zone != "" {
		job.Constraints = append(job.Constraints, api.NewConstraint(zoneTarget, "=", o.Zone))
	}
	for _, c := range o.Constraints {
		job.Constraints = append(job.Constraints, api.NewConstraint(c.Attribute, c.Operator, c.Value))
	}
	if o.EnvIndex != 0 {
		if job.Meta == nil {
			job.Meta = map[string]string{}
		}
		job.Meta[envIndexMeta] = strconv.FormatUint(o.EnvIndex, 10)
	}
	return job, nil
}

// loopback is the one address of its node at which a port of a pod in the bridge network may be alone.
const loopback = "127.0.0.1"

// namesTemplate makes lines of /etc/hosts of who is on the networks that a variable names. Nomad's client reads it with the job's identity, which sees its
// own namespace alone, and writes it anew when somebody comes or goes.
const namesTemplate = `{{ with nomadVar %q }}{{ range split " " .%s.Value }}{{ range nomadService . }}{{ .Address }}{{ range .Tags }} {{ . }}%s{{ end }}
{{ end }}{{ end }}{{ end }}`

// names is the template with a pod's links, each behind the name that it is for.
func names(o *Options) string {
	var links strings.Builder
	for _, name := range slices.Sorted(maps.Keys(o.Links)) {
		fmt.Fprintf(&links, "{{ if eq . %q }}", name)
		for _, alias := range o.Links[name] {
			fmt.Fprintf(&links, " {{ %q }}", alias)
		}
		links.WriteString("{{ end }}")
	}
	return fmt.Sprintf(namesTemplate, EnvPath(o.ID), networksItem, &links)
}

// RemoveDisk makes the job that removes a kept disk from its node.
func RemoveDisk(id, namespace, node, disk string) *api.Job {
	job := &api.Job{
		ID: ptr(id), Name: ptr(id), Type: ptr(api.JobTypeBatch), Datacenters: []string{"*"}, Constraints: []*api.Constraint{api.NewConstraint(nodeTarget, "=", node)},
		TaskGroups: []*api.TaskGroup{{
			Name: ptr(group), Count: ptr(1), EphemeralDisk: &api.EphemeralDisk{SizeMB: ptr(diskMB), Sticky: ptr(false), Migrate: ptr(false)},
			// A pod that still ends has the disk: mostly it is free in a moment, but a node that is back may have started it once more before it heard that it is to end.
			RestartPolicy:    &api.RestartPolicy{Attempts: ptr(10), Interval: ptr(30 * time.Second), Delay: ptr(time.Second), Mode: ptr("delay"), RenderTemplates: ptr(false)},
			ReschedulePolicy: &api.ReschedulePolicy{Attempts: ptr(0), Unlimited: ptr(false)},
			Tasks: []*api.Task{{
				Name: "remove", Driver: Driver, Config: map[string]any{"disk_action": "remove", "disk_id": disk},
				LogConfig: &api.LogConfig{MaxFiles: ptr(1), MaxFileSizeMB: ptr(1), Disabled: ptr(true)}, Resources: &api.Resources{CPU: ptr(1), MemoryMB: ptr(leastMB)},
			}},
		}},
	}
	if namespace != "" {
		job.Namespace = ptr(namespace)
	}
	return job
}

func ptr[T any](v T) *T { return &v }

func meta(m map[string]string) map[string]string {
	if len(m) == 0 {
		return nil
	}
	out := map[string]string{}
	for name, value := range m {
		out[metaPrefix+name] = value
	}
	return out
}

// Meta is what Options.Meta said, of a job that Job has made.
func Meta(j *api.Job) map[string]string {
	var out map[string]string
	for name, value := range j.Meta {
		if name, ok := strings.CutPrefix(name, metaPrefix); ok {
			if out == nil {
				out = map[string]string{}
			}
			out[name] = value
		}
	}
	return out
}

// MemoryMB is what a job asks for where a pod wants so much: Nomad counts whole MiB.
func MemoryMB(b spec.Bytes) int {
	if b == 0 {
		b = spec.DefaultMemory
	}
	return max(int(math.Ceil(float64(b)/(1<<20))), leastMB)
}

// A config is the driver's, as docs/nomad-driver.md has it. The driver's tests read the golden files with its schema, and Pod reads it back.
type config struct {
	ID         string              `json:"id,omitempty"`
	Bare       bool                `json:"bare,omitempty"`
	DiskID     string              `json:"disk_id,omitempty"`
	Disk       string              `json:"disk,omitempty"`
	VCPUs      int                 `json:"vcpus,omitempty"`
	NamesFile  string              `json:"names_file,omitempty"`
	Hostname   string              `json:"hostname,omitempty"`
	Domainname string              `json:"domainname,omitempty"`
	Network    string              `json:"network_mode,omitempty"` // "none"
	Ports      []string            `json:"ports,omitempty"`
	HostIPs    []map[string]string `json:"host_ips,omitempty"`
	MAC        string              `json:"mac_address,omitempty"`
	ExtraHosts []string            `json:"extra_hosts,omitempty"`
	DNS        []string            `json:"dns_servers,omitempty"`
	DNSSearch  []string            `json:"dns_search_domains,omitempty"`
	DNSOptions []string            `json:"dns_options,omitempty"`
	Variant    string              `json:"variant,omitempty"`
	Copied     []string            `json:"volume_copy,omitempty"`
	NotCopied  []string            `json:"volume_no_copy,omitempty"`
	Subpaths   []map[string]string `json:"volume_subpath,omitempty"`
	Containers []containers        `json:"container,omitempty"`

	container
}

// containers are the container blocks: each is there by its name.
type containers map[string]container

type container struct {
	Image       string              `json:"image"`
	Entrypoint  *[]string           `json:"entrypoint,omitempty"`
	Command     string              `json:"command,omitempty"` // read, not written: a word in front of Args
	Args        *[]string           `json:"args,omitempty"`
	User        string              `json:"user,omitempty"`
	GroupAdd    []string            `json:"group_add,omitempty"`
	WorkDir     string              `json:"work_dir,omitempty"`
	TTY         bool                `json:"tty,omitempty"`
	Interactive bool                `json:"interactive,omitempty"`
	StdinOnce   bool                `json:"stdin_once,omitempty"`
	Init        bool                `json:"init,omitempty"`
	Labels      []map[string]string `json:"labels,omitempty"`
	Privileged  bool                `json:"privileged,omitempty"`
	CapAdd      []string            `json:"cap_add,omitempty"`
	CapDrop     []string            `json:"cap_drop,omitempty"`
	NoNewPrivs  bool                `json:"no_new_privileges,omitempty"`
	Masked      *[]string           `json:"masked_paths,omitempty"`
	Protected   *[]string           `json:"readonly_paths,omitempty"`
	Cgroups     bool                `json:"writable_cgroups,omitempty"`
	ReadOnly    bool                `json:"readonly_rootfs,omitempty"`
	Tmpfs       []string            `json:"tmpfs,omitempty"`
	ShmSize     string              `json:"shm_size,omitempty"`
	Ulimit      []map[string]string `json:"ulimit,omitempty"`
	Sysctl      []map[string]string `json:"sysctl,omitempty"`
	Devices     []string            `json:"devices,omitempty"`
	Pids        int64               `json:"pids_limit,omitempty"`
	CPUShares   uint64              `json:"cpu_shares,omitempty"`
	CPUs        float64             `json:"cpus,omitempty"`
	OOMScoreAdj int                 `json:"oom_score_adj,omitempty"`
	LogSize     string              `json:"log_size,omitempty"`
	Health      *healthcheck        `json:"healthcheck,omitempty"`
	Mounts      []mount             `json:"mount,omitempty"`
	Lifecycle   *lifecycle          `json:"lifecycle,omitempty"`
	EnvFile     string              `json:"env_file,omitempty"`

	// Of container blocks alone. Job writes no Env: it is in the variable.
	Env        []map[string]string `json:"env,omitempty"`
	Memory     string              `json:"memory,omitempty"`
	StopSignal string              `json:"stop_signal,omitempty"`
}

type healthcheck struct {
	Test          []string `json:"test,omitempty"`
	Interval      string   `json:"interval,omitempty"`
	Timeout       string   `json:"timeout,omitempty"`
	StartPeriod   string   `json:"start_period,omitempty"`
	StartInterval string   `json:"start_interval,omitempty"`
	Retries       int      `json:"retries,omitempty"`
}

type mount struct {
	Type      string `json:"type"`
	Source    string `json:"source,omitempty"`
	Target    string `json:"target"`
	ReadOnly  bool   `json:"readonly,omitempty"`
	Subpath   string `json:"subpath,omitempty"`
	NoCopy    bool   `json:"no_copy,omitempty"`
	Transport string `json:"transport,omitempty"`
}

type lifecycle struct {
	After            []after `json:"after,omitempty"`
	RestartOnSuccess bool    `json:"restart_on_success,omitempty"`
	RestartOnFailure bool    `json:"restart_on_failure,omitempty"`
	RestartDelay     string  `json:"restart_delay,omitempty"`
	MaxStarts        int     `json:"max_starts,omitempty"`
	Hold             string  `json:"hold,omitempty"`
	Critical         *bool   `json:"critical,omitempty"`
}

type after struct {
	Container string `json:"container"`
	Until     string `json:"until,omitempty"`
}

// A builder makes a job's parts, and a list of what is wrong.
type builder struct {
	pod          *spec.Pod
	options      Options
	volumes      map[string]*api.VolumeRequest
	volumeMounts []*api.VolumeMount
	copied, not  []string // destinations of volumes that get the image's content when they are empty, and of those that don't
	subpaths     map[string]string
	errs         []error
}

func (b *builder) wrong(field, format string, args ...any) {
	b.errs = append(b.errs, &spec.Error{Field: field, Message: fmt.Sprintf(format, args...)})
}

func (b *builder) config() map[string]any {
	p, n := b.pod, &b.pod.Network
	c := config{
		ID: b.options.PodID, Bare: b.options.Bare, DiskID: b.options.DiskID, VCPUs: p.Resources.CPUs, Hostname: p.Hostname,
		MAC: n.MAC, DNS: n.DNS, DNSSearch: n.DNSSearch, DNSOptions: n.DNSOptions, Disk: size(p.Scratch.Size), Variant: b.options.Variant,
	}
	if p.Boot != (spec.Boot{}) {
		b.wrong("boot", "is the client's to say in its plugin's configuration")
	}
	if b.options.Networks != nil {
		c.NamesFile = namesFile
		if !b.options.Bridge {
			b.wrong("network", "a pod on networks has to be in the bridge network")
		}
	}
	if n.Names != "" {
		b.wrong("network.names", "is the driver's to say: name the networks")
	}
	for _, e := range n.ExtraHosts {
		address := e.Address
		if strings.Contains(address, ":") {
			address = "[" + address + "]"
		}
		c.ExtraHosts = append(c.ExtraHosts, e.Name+":"+address)
	}
	if n.Mode == "netns" || len(n.Upstreams) > 0 {
		b.wrong("network", "a network namespace's path and its upstreams are Nomad's to say: leave mode out, and ask for a bridge")
	}
	if n.Mode == "none" {
		c.Network = n.Mode
	}
	for _, p := range nodePorts(n.Publish) {
		if !b.options.Bridge {
			c.Ports = append(c.Ports, p.label)
		}
		switch {
		case p.HostIP == "":
		case b.options.Bridge && p.HostIP == "0.0.0.0":
		case b.options.Bridge && p.HostIP != loopback:
			b.wrong(fmt.Sprintf("network.publish[%d].hostIp", p.of[0]), "%s: a port of a pod in the bridge network is there at all addresses of its node, or at 127.0.0.1 alone", p.HostIP)
		case b.options.Bridge && slices.ContainsFunc(n.Publish, func(o spec.Publish) bool { return o.Port == p.Port && o.HostIP != loopback }):
			b.wrong(fmt.Sprintf("network.publish[%d].hostIp", p.of[0]), "port %d of a pod in the bridge network is there at all addresses of its node, or at 127.0.0.1 alone: publish it in one way", p.Port)
		default:
			if c.HostIPs == nil {
				c.HostIPs = []map[string]string{{}}
			}
			c.HostIPs[0][p.label] = p.HostIP
		}
	}
	for i := range p.Containers {
		from := &p.Containers[i]
		at := fmt.Sprintf("containers[%d]", i)
		made := b.container(at, from)
		if len(from.Env) > 0 {
			made.EnvFile = envPath(i)
		}
		if i == 0 {
			c.container, c.Domainname = made, from.Domainname
			if l := made.Lifecycle; from.Lifecycle.Critical {
				l.Critical = nil // the driver's default
				if reflect.ValueOf(*l).IsZero() {
					c.Lifecycle = nil
				}
			}
			continue
		}
		made.Memory, made.StopSignal = size(from.Resources.Memory), from.StopSignal
		c.Containers = append(c.Containers, containers{from.Name: made})
	}
	c.Copied, c.NotCopied, c.Subpaths = b.copied, b.not, block(b.subpaths)
	return asMap(c)
}

func size(n spec.Bytes) string {
	if n == 0 {
		return ""
	}
	return n.String()
}

func duration(d spec.Duration) string {
	if d == 0 {
		return ""
	}
	return time.Duration(d).String()
}

func sorted(m map[string]string, join string) (out []string) {
	for _, name := range slices.Sorted(maps.Keys(m)) {
		if m[name] == "" {
			out = append(out, name)
		} else {
			out = append(out, name+join+m[name])
		}
	}
	return out
}

func block(m map[string]string) []map[string]string {
	if len(m) == 0 {
		return nil
	}
	return []map[string]string{m}
}

func (b *builder) container(at string, p *spec.PodContainer) container {
	c := container{
		Image: p.Image, Entrypoint: p.Entrypoint, Args: p.Command, User: p.User, WorkDir: p.WorkingDir, GroupAdd: p.GroupAdd,
		TTY: p.TTY, Interactive: p.OpenStdin, StdinOnce: p.StdinOnce, Init: p.Init, Labels: block(p.Labels), Privileged: p.Privileged,
		CapAdd: p.CapAdd, CapDrop: p.CapDrop, NoNewPrivs: p.NoNewPrivs, Masked: p.MaskedPaths, Protected: p.ReadonlyPaths, Cgroups: p.WritableCgroups, ReadOnly: p.ReadOnly, Tmpfs: sorted(p.Tmpfs, ":"), ShmSize: size(p.ShmSize),
		Sysctl: block(p.Sysctls), Devices: p.Devices, Pids: p.Resources.Pids, CPUShares: p.Resources.CPUShares, CPUs: p.Resources.CPUs,
		OOMScoreAdj: p.Resources.OOMScoreAdj, LogSize: size(p.Logs.MaxSize),
	}
	for _, u := range p.Ulimits {
		if c.Ulimit == nil {
			c.Ulimit = []map[string]string{{}}
		}
		c.Ulimit[0][u.Name] = fmt.Sprintf("%d:%d", u.Soft, u.Hard)
	}
	if h := p.Healthcheck; h != nil {
		c.Health = &healthcheck{
			Test: h.Test, Interval: duration(h.Interval), Timeout: duration(h.Timeout), StartPeriod: duration(h.StartPeriod),
			StartInterval: duration(h.StartInterval), Retries: h.Retries,
		}
	}
	l := p.Lifecycle
	c.Lifecycle = &lifecycle{
		RestartOnSuccess: l.RestartOnSuccess, RestartOnFailure: l.RestartOnFailure, RestartDelay: duration(l.RestartDelay), MaxStarts: l.MaxStarts,
		Hold: duration(l.Hold), Critical: ptr(l.Critical),
	}
	for _, a := range l.After {
		c.Lifecycle.After = append(c.Lifecycle.After, after{a.Container, a.Until})
	}
	if p.Entrypoint == nil && p.Command != nil && len(*p.Command) == 0 {
		b.wrong(at+".command", "is empty: give the entrypoint as well, or leave it out for the image's")
	}
	if p.Hostname != "" {
		b.wrong(at+".hostname", "all containers of a pod have the pod's: set that")
	}
	for i, m := range p.Mounts {
		b.mount(fmt.Sprintf("%s.mounts[%d]", at, i), m, &c, p == &b.pod.Containers[0])
	}
	return c
}

// mount puts a volume into a container: one that Nomad mounts, one of the pod's scratch disk, or a directory of the host.
func (b *builder) mount(at string, m spec.Mount, c *container, own bool) {
	v := &b.pod.Volumes[slices.IndexFunc(b.pod.Volumes, func(v spec.Volume) bool { return v.Name == m.Volume })] // validated
	switch {
	case v.Class != "":
		if !own {
			b.wrong(at, "volumes of a class are the first container's: mount them there")
			return
		}
		b.claim(v)
		target := m.Path
		if m.Raw {
			target = "/dev/volumes/" + v.Name
		} else if m.NoCopy {
			b.not = append(b.not, target)
		} else {
			b.copied = append(b.copied, target)
		}
		if m.Subpath != "" {
			if b.subpaths == nil {
				b.subpaths = map[string]string{}
			}
			b.subpaths[target] = m.Subpath
		}
		b.volumeMounts = append(b.volumeMounts, &api.VolumeMount{Volume: ptr(v.Name), Destination: ptr(target), ReadOnly: ptr(m.ReadOnly), PropagationMode: ptr("private")})
	case v.Scratch != nil:
		c.Mounts = append(c.Mounts, mount{Type: "volume", Source: v.Name, Target: m.Path, ReadOnly: m.ReadOnly, Subpath: m.Subpath, NoCopy: m.NoCopy})
	case v.Directory != nil:
		c.Mounts = append(c.Mounts, mount{Type: "bind", Source: v.Directory.Path, Target: m.Path, ReadOnly: m.ReadOnly || v.Directory.ReadOnly, Subpath: m.Subpath, Transport: v.Directory.Transport})
	default:
		b.wrong(at, "volume %s is nothing that a job can ask for: a class, a directory or scratch", v.Name)
	}
}

// claim asks Nomad for a volume by the name that it has there. Its kind does not matter: what is behind it is its plugin's to know.
func (b *builder) claim(v *spec.Volume) {
	if b.volumes == nil {
		b.volumes = map[string]*api.VolumeRequest{}
	}
	b.volumes[v.Name] = &api.VolumeRequest{Name: v.Name, Type: csiType, Source: v.Name, AccessMode: AccessMode(v.Class), AttachmentMode: fileSystem}
}

// AccessMode is what volumes of a class are made for.
func AccessMode(class string) string {
	if class == "nfs" || class == "gfs" {
		return "multi-node-multi-writer"
	}
	return singleWriter
}

// A nodePort is one that Nomad is asked for. It keeps a port for all protocols, so a pod that publishes one for two of them has it once.
type nodePort struct {
	spec.Publish
	label string // tells the protocols where they are other than tcp, which Nomad does not know
	of    []int  // what it is for, of the pod's published ports
}

func nodePorts(publish []spec.Publish) []nodePort {
	var all []nodePort
	for i, p := range publish {
		same := func(o nodePort) bool {
			return o.HostPort != 0 && o.HostPort == p.HostPort && o.HostIP == p.HostIP && o.Port == p.Port
		}
		if at := slices.IndexFunc(all, same); at >= 0 {
			all[at].of = append(all[at].of, i)
			all[at].label = "port" + strconv.Itoa(all[at].of[0]) + "_tcp_udp"
			continue
		}
		label := "port" + strconv.Itoa(i)
		if p.Protocol == "udp" {
			label += "_udp"
		}
		all = append(all, nodePort{p, label, []int{i}})
	}
	return all
}

// Published are a pod's published ports, with those that Nomad has given its allocation on the node.
func Published(p *spec.Pod, given []api.PortMapping) []spec.Publish {
	var out []spec.Publish
	for _, n := range nodePorts(p.Network.Publish) {
		at := slices.IndexFunc(given, func(g api.PortMapping) bool { return g.Label == n.label })
		if at < 0 { // of a job that somebody has written, it has a name of its own
			at = slices.IndexFunc(given, func(g api.PortMapping) bool { return !ownLabel(g.Label) && g.To == int(n.Port) })
		}
		if at < 0 {
			continue
		}
		for _, i := range n.of {
			one := p.Network.Publish[i]
			one.HostPort = uint16(given[at].Value)
			out = append(out, one)
		}
	}
	return out
}

// ownLabel says whether a label is one of nodePorts.
func ownLabel(label string) bool {
	number, ok := strings.CutPrefix(label, "port")
	number, _, _ = strings.Cut(number, "_")
	_, err := strconv.Atoi(number)
	return ok && err == nil
}

func portNumber(label string) int {
	label, _, _ = strings.Cut(strings.TrimPrefix(label, "port"), "_")
	n, _ := strconv.Atoi(label) // a label of somebody else's: its order does not matter
	return n
}

func (b *builder) network() *api.NetworkResource {
	n := &b.pod.Network
	r := &api.NetworkResource{Mode: "host"}
	switch {
	case n.Mode == "none": // the driver's to say: Nomad fails in its own mode none
		return nil
	case b.options.Bridge:
		r.Mode = "bridge"
	case len(n.Publish) == 0:
		return nil
	}
	for _, p := range nodePorts(n.Publish) {
		port := api.Port{Label: p.label, Value: int(p.HostPort), To: int(p.Port)}
		if p.HostPort != 0 {
			r.ReservedPorts = append(r.ReservedPorts, port)
		} else {
			r.DynamicPorts = append(r.DynamicPorts, port)
		}
	}
	return r
}

// asMap gives a configuration as Nomad's API takes it. Nomad evaluates templates in all of its texts, which ours are not.
func asMap(c config) map[string]any {
	data, err := json.Marshal(c)
	if err != nil {
		panic(err) // texts and numbers
	}
	var m map[string]any
	if err := json.Unmarshal(data, &m); err != nil {
		panic(err)
	}
	return walk(m, escape).(map[string]any)
}

// walk applies f to all texts, and to no keys: Nomad takes those as they are.
func walk(v any, f func(string) string) any {
	switch v := v.(type) {
	case string:
		return f(v)
	case []any:
		for i := range v {
			v[i] = walk(v[i], f)
		}
	case map[string]any:
		for name := range v {
			v[name] = walk(v[name], f)
		}
	}
	return v
}

// escape doubles what begins a template (HCL's native syntax, "Template Literals"); unescape undoes it.
func escape(s string) string {
	return strings.NewReplacer("${", "$${", "%{", "%%{").Replace(s)
}

func unescape(s string) string {
	return strings.NewReplacer("$${", "${", "%%{", "%{").Replace(s)
}

// Pod reads a job: its pod, and what Job was told beside that. env is the content of the variable at EnvPath, nil where there is none. A job that
// Job has not made is refused where it says something that a pod can't.
func Pod(j *api.Job, env api.VariableItems) (*spec.Pod, *Options, error) {
	if len(j.TaskGroups) != 1 || len(j.TaskGroups[0].Tasks) != 1 || j.TaskGroups[0].Tasks[0].Driver != Driver {
		return nil, nil, fmt.Errorf("job %s is not one pod: it has other than one group with one task of driver %s", deref(j.ID), Driver)
	}
	g := j.TaskGroups[0]
	task := g.Tasks[0]
	data, err := json.Marshal(task.Config)
	if err != nil {
		return nil, nil, err
	}
	var raw map[string]any
	if err := json.Unmarshal(data, &raw); err != nil {
		return nil, nil, err
	}
	unfold(raw)
	if data, err = json.Marshal(walk(raw, unescape)); err != nil {
		return nil, nil, err
	}
	var c config
	if err := json.Unmarshal(data, &c); err != nil {
		return nil, nil, fmt.Errorf("job %s: the driver's configuration: %w", deref(j.ID), err)
	}
	r := reader{group: g, task: task}
	r.options = Options{
		ID: deref(j.ID), Namespace: deref(j.Namespace), PodID: c.ID, DiskID: c.DiskID, Bare: c.Bare, Meta: Meta(j), Variant: c.Variant,
		Replace: g.Disconnect == nil || g.Disconnect.Replace == nil || *g.Disconnect.Replace, // Nomad's default
	}
	if c.NamesFile != "" {
		r.options.Networks = []Network{}
	}
	for _, s := range g.Services {
		if s.PortLabel == "" {
			r.options.Networks = append(r.options.Networks, Network{s.Name, s.Tags})
		}
	}
	if deref(j.Type) == api.JobTypeService {
		r.service()
	}
	if text, ok := j.Meta[envIndexMeta]; ok {
		r.options.EnvIndex, err = strconv.ParseUint(text, 10, 64)
		r.errs = append(r.errs, err)
	}
	for _, i := range task.Identities {
		if i.Name == identity && len(i.Audience) == 1 {
			r.options.Audience = i.Audience[0]
		}
	}
	for _, constraint := range j.Constraints {
		switch constraint.LTarget {
		case nodeTarget:
			r.options.Node = constraint.RTarget
		case zoneTarget:
			r.options.Zone = constraint.RTarget
		default:
			r.options.Constraints = append(r.options.Constraints, Constraint{constraint.LTarget, constraint.Operand, constraint.RTarget})
		}
	}
	p := r.pod(deref(j.Name), &c)
	for i := range p.Containers {
		text, ok := env[envName(i)]
		if !ok || !slices.ContainsFunc(task.Templates, func(t *api.Template) bool { return deref(t.DestPath) == envPath(i) }) {
			continue
		}
		if err := json.Unmarshal([]byte(text), &p.Containers[i].Env); err != nil {
			return nil, nil, fmt.Errorf("job %s: its environment: %w", deref(j.ID), err)
		}
	}
	if err := errors.Join(r.errs...); err != nil {
		return nil, nil, fmt.Errorf("job %s: %w", deref(j.ID), err)
	}
	if err := p.Validate(); err != nil {
		return nil, nil, fmt.Errorf("job %s: %w", deref(j.ID), err)
	}
	return p, &r.options, nil
}

// unfold gives blocks of a configuration that comes from a job's file the form that asMap has for them: the file's parser makes a list of each block.
func unfold(c map[string]any) {
	for _, name := range []string{"healthcheck", "lifecycle"} {
		if all, ok := c[name].([]any); ok && len(all) == 1 {
			c[name] = all[0]
		}
	}
	for _, name := range []string{"labels", "sysctl", "ulimit", "env", "host_ips"} {
		if m, ok := c[name].(map[string]any); ok {
			c[name] = []any{m}
		}
	}
	blocks, _ := c["container"].([]any)
	for _, b := range blocks {
		named, _ := b.(map[string]any)
		for name, one := range named {
			if all, ok := one.([]any); ok && len(all) == 1 {
				one = all[0]
			}
			named[name] = one
			if inner, ok := one.(map[string]any); ok {
				unfold(inner)
			}
		}
	}
}

func deref[T any](p *T) (v T) {
	if p != nil {
		v = *p
	}
	return v
}

// A reader takes a job apart.
type reader struct {
	group *api.TaskGroup
	task  *api.Task
	p     *spec.Pod
	named map[string]bool // its volumes that have a name of their own
	errs  []error

	options Options
}

func (r *reader) size(s string) spec.Bytes {
	if s == "" {
		return 0
	}
	n, err := spec.ParseBytes(s)
	r.errs = append(r.errs, err)
	return n
}

func (r *reader) duration(s string) spec.Duration {
	if s == "" {
		return 0
	}
	d, err := time.ParseDuration(s)
	r.errs = append(r.errs, err)
	return spec.Duration(d)
}

func (r *reader) pod(name string, c *config) *spec.Pod {
	r.p = &spec.Pod{
		Name: name, Hostname: c.Hostname, Resources: spec.Resources{CPUs: c.VCPUs}, Scratch: spec.Scratch{Size: r.size(c.Disk)},
		Network: spec.Network{MAC: c.MAC, DNS: c.DNS, DNSSearch: c.DNSSearch, DNSOptions: c.DNSOptions},
	}
	if res := r.task.Resources; res != nil && res.MemoryMB != nil {
		r.p.Resources.Memory = spec.Bytes(*res.MemoryMB) << 20
	}
	for _, e := range c.ExtraHosts {
		name, address, _ := strings.Cut(e, ":")
		r.p.Network.ExtraHosts = append(r.p.Network.ExtraHosts, spec.HostEntry{Name: name, Address: strings.Trim(address, "[]")})
	}
	r.named = map[string]bool{}
	for _, request := range r.group.Volumes {
		r.named[request.Source] = true
	}
	mounts := slices.Clone(c.Mounts)
	for _, blocks := range c.Containers {
		for _, from := range blocks {
			mounts = append(mounts, from.Mounts...)
		}
	}
	for _, m := range mounts {
		r.named[m.Source] = r.named[m.Source] || m.Type != "bind"
	}
	r.network(c)
	own := r.container(r.task.Name, &c.container)
	own.Domainname, own.StopSignal = c.Domainname, r.task.KillSignal
	own.Lifecycle.Critical = c.Lifecycle == nil || c.Lifecycle.Critical == nil || *c.Lifecycle.Critical
	if kill := deref(r.task.KillTimeout) - killMargin; kill >= 0 && kill != spec.DefaultStopTimeout {
		own.StopTimeout = ptr(spec.Duration(kill))
	}
	for _, m := range r.task.VolumeMounts {
		request := r.group.Volumes[deref(m.Volume)]
		if request == nil || request.Type != csiType {
			r.errs = append(r.errs, fmt.Errorf("volume %s is no CSI volume", deref(m.Volume)))
			continue
		}
		class := "lv2"
		if request.AccessMode != singleWriter {
			class = "nfs"
		}
		if !slices.ContainsFunc(r.p.Volumes, func(v spec.Volume) bool { return v.Name == request.Source }) {
			r.p.Volumes = append(r.p.Volumes, spec.Volume{Name: request.Source, Class: class})
		}
		mount := spec.Mount{Volume: request.Source, Path: deref(m.Destination), ReadOnly: deref(m.ReadOnly)}
		if name, ok := strings.CutPrefix(mount.Path, "/dev/volumes/"); ok && name == request.Source {
			mount.Path, mount.Raw = "", true
		}
		mount.NoCopy = slices.Contains(c.NotCopied, mount.Path)
		for _, parts := range c.Subpaths {
			mount.Subpath = parts[mount.Path]
		}
		own.Mounts = append(own.Mounts, mount)
	}
	r.p.Containers = []spec.PodContainer{own}
	for _, blocks := range c.Containers {
		for _, name := range slices.Sorted(maps.Keys(blocks)) {
			from := blocks[name]
			one := r.container(name, &from)
			one.Resources.Memory, one.StopSignal = r.size(from.Memory), from.StopSignal
			one.Lifecycle.Critical = from.Lifecycle != nil && deref(from.Lifecycle.Critical)
			one.Env = nil
			for _, e := range from.Env {
				for _, name := range slices.Sorted(maps.Keys(e)) {
					one.Env = append(one.Env, name+"="+e[name])
				}
			}
			r.p.Containers = append(r.p.Containers, one)
		}
	}
	return r.p
}

func (r *reader) network(c *config) {
	r.p.Network.Mode = c.Network
	if len(r.group.Networks) == 0 {
		return
	}
	n := r.group.Networks[0]
	switch n.Mode {
	case "none":
		r.p.Network.Mode = "none"
	case "bridge":
		r.options.Bridge = true
	case "host", "":
	default:
		r.errs = append(r.errs, fmt.Errorf("network mode %s is none of bridge, host, none", n.Mode))
	}
	ports := slices.Concat(n.ReservedPorts, n.DynamicPorts)
	slices.SortStableFunc(ports, func(a, b api.Port) int { return cmp.Compare(portNumber(a.Label), portNumber(b.Label)) })
	for _, p := range ports {
		if p.To == 0 {
			p.To = p.Value // Nomad's default
		}
		made := spec.Publish{HostPort: uint16(p.Value), Port: uint16(p.To)}
		for _, m := range c.HostIPs {
			made.HostIP = m[p.Label]
		}
		protocols := ""
		if ownLabel(p.Label) {
			_, protocols, _ = strings.Cut(p.Label, "_")
		}
		for _, protocol := range strings.Split(protocols, "_") {
			if made.Protocol = protocol; protocol == "tcp" {
				made.Protocol = ""
			}
			r.p.Network.Publish = append(r.p.Network.Publish, made)
		}
	}
}

func (r *reader) container(name string, c *container) spec.PodContainer {
	p := spec.PodContainer{Name: name, Image: c.Image, Entrypoint: c.Entrypoint, Command: c.Args, User: c.User, WorkingDir: c.WorkDir}
	if c.Command != "" {
		p.Command = ptr(append([]string{c.Command}, deref(c.Args)...))
	}
	p.Settings = spec.Settings{
		GroupAdd: c.GroupAdd, TTY: c.TTY, OpenStdin: c.Interactive, StdinOnce: c.StdinOnce, Init: c.Init, ReadOnly: c.ReadOnly, Privileged: c.Privileged,
		CapAdd: c.CapAdd, CapDrop: c.CapDrop, NoNewPrivs: c.NoNewPrivs, MaskedPaths: c.Masked, ReadonlyPaths: c.Protected, WritableCgroups: c.Cgroups, Devices: c.Devices, ShmSize: r.size(c.ShmSize),
		Resources: spec.Limits{CPUs: c.CPUs, CPUShares: c.CPUShares, Pids: c.Pids, OOMScoreAdj: c.OOMScoreAdj}, Logs: spec.Logs{MaxSize: r.size(c.LogSize)},
	}
	for _, m := range c.Labels {
		p.Labels = m
	}
	for _, m := range c.Sysctl {
		p.Sysctls = m
	}
	for _, t := range c.Tmpfs {
		target, options, _ := strings.Cut(t, ":")
		if p.Tmpfs == nil {
			p.Tmpfs = map[string]string{}
		}
		p.Tmpfs[target] = options
	}
	for _, m := range c.Ulimit {
		for _, name := range slices.Sorted(maps.Keys(m)) {
			soft, hard, _ := strings.Cut(m[name], ":")
			u := spec.Ulimit{Name: name}
			var err, err2 error
			u.Soft, err = strconv.ParseInt(soft, 10, 64)
			u.Hard, err2 = strconv.ParseInt(hard, 10, 64)
			r.errs = append(r.errs, err, err2)
			p.Ulimits = append(p.Ulimits, u)
		}
	}
	if h := c.Health; h != nil {
		p.Healthcheck = &spec.Healthcheck{
			Test: h.Test, Interval: r.duration(h.Interval), Timeout: r.duration(h.Timeout), StartPeriod: r.duration(h.StartPeriod),
			StartInterval: r.duration(h.StartInterval), Retries: h.Retries,
		}
	}
	if l := c.Lifecycle; l != nil {
		p.Lifecycle = spec.Lifecycle{
			RestartOnSuccess: l.RestartOnSuccess, RestartOnFailure: l.RestartOnFailure, RestartDelay: r.duration(l.RestartDelay), MaxStarts: l.MaxStarts,
			Hold: r.duration(l.Hold),
		}
		for _, a := range l.After {
			p.Lifecycle.After = append(p.Lifecycle.After, spec.After{Container: a.Container, Until: a.Until})
		}
	}
	for _, m := range c.Mounts {
		r.mount(&p, m)
	}
	return p
}

// Directory is the name of the volume of a pod that is a directory of the host, and that it adds unless it is there. A job has no name for it: it follows from where
// it is mounted, and is none of those that others have.
func Directory(p *spec.Pod, d spec.DirectoryVolume, target string, named map[string]bool) string {
	base := strings.Trim(strings.ReplaceAll(path.Clean(target), "/", "-"), "-")
	for n := 1; ; n++ {
		name := base
		if n > 1 {
			name += "-" + strconv.Itoa(n)
		}
		i := slices.IndexFunc(p.Volumes, func(v spec.Volume) bool { return v.Name == name })
		switch {
		case named[name]:
		case i < 0:
			p.Volumes = append(p.Volumes, spec.Volume{Name: name, Directory: &d})
			return name
		case p.Volumes[i].Directory != nil && *p.Volumes[i].Directory == d:
			return name
		}
	}
}

// mount reads a mount block.
func (r *reader) mount(p *spec.PodContainer, m mount) {
	made := spec.Mount{Volume: m.Source, Path: m.Target, ReadOnly: m.ReadOnly, Subpath: m.Subpath, NoCopy: m.NoCopy}
	v := spec.Volume{Name: m.Source}
	switch m.Type {
	case "volume", "": // the driver's default
		v.Scratch = &spec.ScratchVolume{}
	case "bind":
		made.Volume = Directory(r.p, spec.DirectoryVolume{Path: m.Source, Transport: m.Transport}, m.Target, r.named)
		v.Name = made.Volume
	default:
		r.errs = append(r.errs, fmt.Errorf("mount at %s: type %q is none of volume, bind", m.Target, m.Type))
		return
	}
	if !slices.ContainsFunc(r.p.Volumes, func(o spec.Volume) bool { return o.Name == v.Name }) {
		r.p.Volumes = append(r.p.Volumes, v)
	}
	p.Mounts = append(p.Mounts, made)
}
