package driver

import (
	"slices"

	"github.com/hashicorp/nomad/plugins/shared/hclspec"
)

// containerKeys are those that a task and its container blocks have in common.
var containerKeys = []key{
	{name: "entrypoint", kind: texts, def: "the image's", doc: "Replaces the image's entrypoint, and drops its command."},
	{name: "command", kind: text, def: "the image's", doc: "What is run, or the first argument of the entrypoint where there is one."},
	{name: "args", kind: texts, doc: "Follow the command; without command they replace the image's."},
	{name: "user", kind: text, def: "the image's", doc: "name or uid, with :group or :gid. The task's own user is the same."},
	{name: "group_add", kind: texts, doc: "Further groups of the user."},
	{name: "work_dir", kind: text, def: "the image's", doc: "Working directory; made where it is missing."},
	{name: "tty", kind: boolean, def: "false", doc: "The main process has a terminal; stderr is then part of stdout."},
	{name: "interactive", kind: boolean, def: "false", doc: "Keep standard input open."},
	{name: "stdin_once", kind: boolean, def: "false", doc: "Standard input ends with the first client that was attached to it."},
	{name: "init", kind: boolean, def: "false", doc: "Run an init that reaps processes as process 1."},
	{name: "labels", kind: freeText, doc: "Labels of the container; those with dots in their names: labels = { \"org.example.team\" = \"shop\" }."},
	{name: "privileged", kind: boolean, def: "false", doc: "All capabilities and devices, of the guest."},
	{name: "cap_add", kind: texts, doc: "Capabilities beyond docker's default set: net_admin, or all."},
	{name: "cap_drop", kind: texts, doc: "Capabilities taken away."},
	{name: "no_new_privileges", kind: boolean, def: "false", doc: "Programs gain nothing by being setuid."},
	{name: "masked_paths", kind: texts, def: "docker's", doc: "What is hidden from it: [\"/proc/keys\"], or [] for nothing."},
	{name: "readonly_paths", kind: texts, def: "docker's", doc: "What it can't write to: [\"/proc/sys\"], or [] for nothing."},
	{name: "writable_cgroups", kind: boolean, def: "false", doc: "It may have cgroups of its own below /sys/fs/cgroup."},
	{name: "readonly_rootfs", kind: boolean, def: "false", doc: "The image is read-only; what is mounted is not."},
	{name: "tmpfs", kind: texts, doc: "Where to mount a file system in memory: /run, or /run:size=64m,mode=1777."},
	{name: "shm_size", kind: text, def: "64MiB", doc: "Size of /dev/shm."},
	{name: "ulimit", kind: freeText, doc: "Resource limits: nofile = \"1024:2048\", soft and hard, or one number for both."},
	{name: "sysctl", kind: freeText, doc: "Kernel parameters of the container. Names with dots take another spelling: sysctl = { \"net.core.somaxconn\" = \"1024\" }."},
	{name: "devices", kind: texts, doc: "Devices of the guest: /dev/fuse, /dev/net/tun, all."},
	{name: "oom_score_adj", kind: number, def: "0", doc: "How willingly its processes are killed when memory runs out: -1000 to 1000."},
	{name: "log_size", kind: text, def: "1GiB, or a quarter of the scratch disk", doc: "Most of its output that the pod keeps for docker's logs. Nomad's logs have their own bounds."},
	{name: "pids_limit", kind: number, def: "no limit", doc: "Most processes at once."},
	{name: "cpu_shares", kind: number, def: "1024", doc: "Weight against the other containers of the pod."},
	{name: "cpus", kind: number, def: "all of the pod's", doc: "Most processors used, such as 0.5."},
	{name: "healthcheck", kind: block, def: "the image's", doc: "Docker's health check. What depends on it: lifecycle.after with until = \"healthy\", and the health that docker's API shows.", keys: []key{
		{name: "test", kind: texts, doc: "[\"CMD\", program, argument…], [\"CMD-SHELL\", line], or [\"NONE\"] to switch the image's off."},
		{name: "interval", kind: text, def: "30s", doc: "From one check to the next."},
		{name: "timeout", kind: text, def: "30s", doc: "Longest time of one check."},
		{name: "start_period", kind: text, def: "0s", doc: "Failures within it do not count."},
		{name: "start_interval", kind: text, def: "5s", doc: "From one check to the next within start_period."},
		{name: "retries", kind: number, def: "3", doc: "Failures in a row that make the container unhealthy."},
	}},
	{name: "volumes", kind: texts, doc: "Short for mount: SOURCE:TARGET[:ro]. SOURCE is a directory of the host (absolute, where the client allows it; relative, below the task's directory) or, without a slash, the name of a volume of the pod."},
	{name: "mount", kind: blocks, doc: "Something to mount.", keys: []key{
		{name: "type", kind: text, def: "volume", doc: "volume: a volume on the pod's scratch disk, which containers share by its name. bind: a directory or file of the host. tmpfs. task: what the task's own container has mounted at source, for container blocks."},
		{name: "source", kind: text, doc: "A volume's name, a path of the host, or a path of the task's container."},
		{name: "target", kind: text, must: true, doc: "Where."},
		{name: "readonly", kind: boolean, def: "false", doc: "Read-only."},
		{name: "subpath", kind: text, doc: "Only this directory of the volume."},
		{name: "no_copy", kind: boolean, def: "false", doc: "Do not copy what the image has there into an empty volume."},
		{name: "transport", kind: text, def: "9p", doc: "Of bind: 9p, or virtiofs (which is faster with many small files; the pod then boots instead of being restored)."},
		{name: "options", kind: text, doc: "Mount options of tmpfs."},
	}},
	{name: "lifecycle", kind: block, doc: "When the container starts, starts again inside of the pod, and what its end means.", keys: []key{
		{name: "after", kind: blocks, doc: "A container to wait for.", keys: []key{
			{name: "container", kind: text, must: true, doc: "Its name; the task's own container has the task's."},
			{name: "until", kind: text, def: "started", doc: "started, healthy, or exited (with success)."},
		}},
		{name: "hold", kind: text, def: "0s", doc: "Wait with the first start until docker's start asks the pod for it, at most so long: to connect with the container before it runs."},
		{name: "restart_on_success", kind: boolean, def: "false", doc: "Start it again when it has ended with exit code 0."},
		{name: "restart_on_failure", kind: boolean, def: "false", doc: "Start it again when it has failed. Nomad's restart policy is about the pod as a whole."},
		{name: "restart_delay", kind: text, def: "docker's: 100ms, doubled each time, up to a minute", doc: "Between two starts."},
		{name: "max_starts", kind: number, def: "no limit", doc: "Counts the first one."},
		{name: "critical", kind: boolean, def: "true for the task's own container, else false", doc: "Its end ends the pod, and the task, with its exit code."},
	}},
}

// taskKeys are those of a task's config block.
var taskKeys = slices.Concat([]key{
	{name: "image", kind: text, def: "*required*, but for disk_action", doc: "debian:12, registry.example.org/team/app@sha256:…, docker-daemon:NAME, docker-archive:FILE, oci:DIR."},
}, containerKeys, []key{
	{name: "id", kind: text, def: "random", doc: "The pod's id, which is its own container's in docker's API: 64 lower-case hexadecimal digits."},
	{name: "bare", kind: boolean, def: "false", doc: "Containers have what docker would show them: neither /alloc, /local and /secrets nor Nomad's NOMAD_ variables."},
	{name: "hostname", kind: text, def: "the beginning of the pod's id", doc: "Host name of all containers. The hostname of a group's network block Nomad takes for its docker driver alone."},
	{name: "domainname", kind: text, doc: "Domain of the host name."},
	{name: "network_mode", kind: text, def: "the group network, else one of the pod's own with a way out", doc: "none: the pod has its loopback interface alone. In a group without a network block: Nomad's own mode none fails."},
	{name: "ports", kind: texts, doc: "Labels of the group's ports. In a group without network namespace (mode host) these are forwarded to the pod."},
	{name: "host_ips", kind: freeText, doc: "Addresses of the host at which forwarded ports are there, by the ports' labels, in place of the one that Nomad has chosen: http = \"127.0.0.1\". In a group network in mode bridge, 127.0.0.1 alone."},
	{name: "upstreams", kind: texts, doc: "TCP ports at 127.0.0.1 where other tasks of the group serve the pod's containers at theirs: [5432]. Those of connect blocks need not be named."},
	{name: "mac_address", kind: text, def: "the group network's, or chosen", doc: "Link-layer address of the pod's interface: 02:00:00:12:34:56."},
	{name: "extra_hosts", kind: texts, doc: "Lines of /etc/hosts: name:address."},
	{name: "dns_servers", kind: texts, def: "the group network's, else the host's", doc: "Resolvers."},
	{name: "dns_search_domains", kind: texts, def: "the group network's, else the host's", doc: "Domains that names are completed with."},
	{name: "dns_options", kind: texts, def: "the group network's, else the host's", doc: "Options of resolv.conf."},
	{name: "names_file", kind: text, doc: "A file of the task, written by a template into a directory of its own, such as local/names/hosts, with lines of /etc/hosts that may come and go. The containers' resolver is then the pod itself, at 127.0.0.11: it answers by the file as it is at that moment, and asks dns_servers for other names."},
	{name: "env_file", kind: text, doc: "A file of the task, written by a template into secrets/, with more of the environment of the task's own container: a JSON list of NAME=value, or NAME to remove one of the image's. Unlike in Nomad's env, names and values may hold anything."},
	{name: "vcpus", kind: number, def: "what cpu or cores comes to", doc: "Processors of the machine."},
	{name: "disk", kind: text, def: "default_disk of the plugin", doc: "Size of the pod's scratch disk, which holds what containers write to their images and to volumes of the pod: 20GiB. What the group asks for as ephemeral_disk Nomad tells no driver."},
	{name: "disk_id", kind: text, doc: "Keep the scratch disk on the node under this name (1 to 64 letters, digits, _ . -) when the task ends, and go on with it in the next one that names it. Its containers and their images have to be the same, and one task uses it at a time."},
	{name: "disk_action", kind: text, def: "use", doc: "Instead of running an image: list writes a line of JSON for each kept disk that the namespace has on the node to the task's output; remove removes the disk that disk_id names, if there is one, for good."},
	{name: "volume_copy", kind: texts, def: "those of direct attachments", doc: "Destinations of volume_mounts whose volume gets what the image has there while it is empty, as docker's volumes do: [\"/data\"]."},
	{name: "volume_no_copy", kind: texts, doc: "Destinations of direct attachments that do not."},
	{name: "volume_subpath", kind: freeText, doc: "By the destination of a volume_mount, the directory or file of the volume that is mounted there in place of all of it: { \"/data\" = \"site/pages\" }. Links in it don't lead out of the volume."},
	{name: "variant", kind: text, def: "the boot package's", doc: "Boot package that is needed: default, stock. The plugin has one; another is refused."},
	{name: "image_pull_timeout", kind: text, def: "the plugin's", doc: "Longest time for pulling all images of the task."},
	{name: "force_pull", kind: boolean, def: "false", doc: "Ask the registry what the image's tag means now, though it is in the cache."},
	{name: "auth", kind: block, doc: "Credentials for the registries of the task's images. An image that was pulled with them is asked for again by each task that wants it from the cache, with its own.", keys: []key{
		{name: "username", kind: text, must: true, doc: "User."},
		{name: "password", kind: text, must: true, doc: "Password or token; take it from a template or a variable."},
		{name: "server_address", kind: text, def: "the registry of each image", doc: "Only for this registry."},
	}},
	{name: "container", kind: blocks, label: "name", doc: "A further container in the same pod: it shares network and volumes with the others. Its output goes to the task's logs, each line after its name.", keys: slices.Concat([]key{
		{name: "image", kind: text, must: true, doc: "As the task's."},
	}, containerKeys, []key{
		{name: "env", kind: freeText, doc: "Environment, beside the task's NOMAD_ variables."},
		{name: "env_file", kind: text, doc: "More of it, from a file of the task, as the task's env_file has it."},
		{name: "memory", kind: text, def: "the pod's", doc: "Most memory of this container: 64MiB."},
		{name: "stop_signal", kind: text, def: "the image's", doc: "What it is asked to end with. The task's kill_signal is for its own container."},
	})},
})

func taskSchema() *hclspec.Spec { return schemaOf(taskKeys) }

// A containerConfig is what containerKeys are decoded into.
type containerConfig struct {
	Image           string             `codec:"image"`
	Entrypoint      []string           `codec:"entrypoint"`
	Command         string             `codec:"command"`
	Args            []string           `codec:"args"`
	User            string             `codec:"user"`
	GroupAdd        []string           `codec:"group_add"`
	WorkDir         string             `codec:"work_dir"`
	TTY             bool               `codec:"tty"`
	Interactive     bool               `codec:"interactive"`
	StdinOnce       bool               `codec:"stdin_once"`
	Init            bool               `codec:"init"`
	Labels          map[string]string  `codec:"labels"`
	Privileged      bool               `codec:"privileged"`
	CapAdd          []string           `codec:"cap_add"`
	CapDrop         []string           `codec:"cap_drop"`
	NoNewPrivileges bool               `codec:"no_new_privileges"`
	MaskedPaths     []string           `codec:"masked_paths"`
	ReadonlyPaths   []string           `codec:"readonly_paths"`
	WritableCgroups bool               `codec:"writable_cgroups"`
	ReadonlyRootfs  bool               `codec:"readonly_rootfs"`
	Tmpfs           []string           `codec:"tmpfs"`
	ShmSize         string             `codec:"shm_size"`
	Ulimit          map[string]string  `codec:"ulimit"`
	Sysctl          map[string]string  `codec:"sysctl"`
	Devices         []string           `codec:"devices"`
	OOMScoreAdj     string             `codec:"oom_score_adj"`
	LogSize         string             `codec:"log_size"`
	PidsLimit       string             `codec:"pids_limit"`
	CPUShares       string             `codec:"cpu_shares"`
	CPUs            string             `codec:"cpus"`
	Healthcheck     *healthcheckConfig `codec:"healthcheck"`
	Volumes         []string           `codec:"volumes"`
	Mounts          []mountConfig      `codec:"mount"`
	Lifecycle       *lifecycleConfig   `codec:"lifecycle"`

	// Of container blocks only.
	Env        map[string]string `codec:"env"`
	EnvFile    string            `codec:"env_file"` // of the task's own as well
	Memory     string            `codec:"memory"`
	StopSignal string            `codec:"stop_signal"`
}

// A taskConfig is a task's config block.
type taskConfig struct {
	containerConfig

	ID          string            `codec:"id"`
	Bare        bool              `codec:"bare"`
	Hostname    string            `codec:"hostname"`
	Domainname  string            `codec:"domainname"`
	NetworkMode string            `codec:"network_mode"`
	Ports       []string          `codec:"ports"`
	HostIPs     map[string]string `codec:"host_ips"`
	Upstreams   []string          `codec:"upstreams"`
	MACAddress  string            `codec:"mac_address"`
	ExtraHosts  []string          `codec:"extra_hosts"`
	DNSServers  []string          `codec:"dns_servers"`
	DNSSearch   []string          `codec:"dns_search_domains"`
	DNSOptions  []string          `codec:"dns_options"`
	NamesFile   string            `codec:"names_file"`
	Copied      []string          `codec:"volume_copy"`
	NotCopied   []string          `codec:"volume_no_copy"`
	Subpaths    map[string]string `codec:"volume_subpath"`
	VCPUs       string            `codec:"vcpus"`
	Disk        string            `codec:"disk"`
	DiskID      string            `codec:"disk_id"`
	DiskAction  string            `codec:"disk_action"`
	Variant     string            `codec:"variant"`
	PullTimeout string            `codec:"image_pull_timeout"`
	ForcePull   bool              `codec:"force_pull"`
	Auth        *taskAuth         `codec:"auth"`
	// Pointers: the decoder makes one value for all entries of a map, and what is in their slices and maps would be the last one's.
	Containers map[string]*containerConfig `codec:"container"`
}

type taskAuth struct {
	Username string `codec:"username"`
	Password string `codec:"password"`
	Server   string `codec:"server_address"`
}

type healthcheckConfig struct {
	Test          []string `codec:"test"`
	Interval      string   `codec:"interval"`
	Timeout       string   `codec:"timeout"`
	StartPeriod   string   `codec:"start_period"`
	StartInterval string   `codec:"start_interval"`
	Retries       string   `codec:"retries"`
}

type mountConfig struct {
	Type      string `codec:"type"`
	Source    string `codec:"source"`
	Target    string `codec:"target"`
	Readonly  bool   `codec:"readonly"`
	Subpath   string `codec:"subpath"`
	NoCopy    bool   `codec:"no_copy"`
	Transport string `codec:"transport"`
	Options   string `codec:"options"`
}

type lifecycleConfig struct {
	After            []afterConfig `codec:"after"`
	Hold             string        `codec:"hold"`
	RestartOnSuccess bool          `codec:"restart_on_success"`
	RestartOnFailure bool          `codec:"restart_on_failure"`
	RestartDelay     string        `codec:"restart_delay"`
	MaxStarts        string        `codec:"max_starts"`
	Critical         *bool         `codec:"critical"`
}

type afterConfig struct {
	Container string `codec:"container"`
	Until     string `codec:"until"`
}
