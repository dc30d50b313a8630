// Package spec is the vocabulary that every part of cradlestack shares: a Pod is what a user asks for, a Launch is what
// one guest executes (resolved, versioned JSON), a Volume has a class.
//
// The package is pure Go without dependencies, and it imports nothing of ours: it is compiled into the guest's initramfs
// as well as into the Terraform provider.
package spec

import (
	"fmt"
	"strings"
	"time"
)

// LaunchVersion is the version of the Launch format that this package reads and writes.
const LaunchVersion = 1

// A Pod is one VM with one or more containers that share a network and can share volumes, as a user asks for it.
// Whatever is left out is taken from the image, then from docker's defaults.
type Pod struct {
	Name       string         `json:"name"`
	Hostname   string         `json:"hostname,omitempty"` // default: the first 12 digits of the pod's id
	Resources  Resources      `json:"resources,omitzero"`
	Boot       Boot           `json:"boot,omitzero"`
	Network    Network        `json:"network,omitzero"`
	Scratch    Scratch        `json:"scratch,omitzero"`
	Containers []PodContainer `json:"containers"`
	Volumes    []Volume       `json:"volumes,omitempty"`
}

// A PodContainer is one container of a Pod, before its image is known.
type PodContainer struct {
	Name  string `json:"name"`
	Image string `json:"image"` // registry reference, docker-daemon:NAME, docker-archive:FILE, oci:DIR

	// Entrypoint and Command replace the image's; nil keeps them, an empty list clears them. As with docker, giving an
	// entrypoint drops the image's command.
	Entrypoint *[]string `json:"entrypoint,omitempty"`
	Command    *[]string `json:"command,omitempty"`

	Env         []string     `json:"env,omitempty"` // NAME=value, added to the image's; NAME alone removes one
	User        string       `json:"user,omitempty"`
	WorkingDir  string       `json:"workingDir,omitempty"`
	StopSignal  string       `json:"stopSignal,omitempty"`
	Healthcheck *Healthcheck `json:"healthcheck,omitempty"`

	Settings
}

// A Launch is what one guest executes: a Pod whose images are resolved to layers. It is stored as launch.json in the pod
// directory and made to be read and edited.
type Launch struct {
	Version    int         `json:"version"`  // of the format: 1
	ID         string      `json:"id"`       // 64 lower-case hexadecimal digits
	Name       string      `json:"name"`     // of the pod
	Hostname   string      `json:"hostname"` // of every container that names none
	Resources  Resources   `json:"resources,omitzero"`
	Boot       Boot        `json:"boot,omitzero"`
	Network    Network     `json:"network,omitzero"`
	Scratch    Scratch     `json:"scratch,omitzero"`
	Containers []Container `json:"containers"`
	Volumes    []Volume    `json:"volumes,omitempty"`
}

// A Container of a Launch: resolved, nothing left to look up.
type Container struct {
	ID     string  `json:"id"`               // 64 lower-case hexadecimal digits
	Name   string  `json:"name"`             // unique in the pod
	Image  Image   `json:"image,omitzero"`   // left out only where a volume at / brings its own system
	Layers []Layer `json:"layers,omitempty"` // lowest first; none where a volume is mounted at /

	// Entrypoint and Command are resolved: what runs is the one followed by the other.
	Entrypoint []string `json:"entrypoint,omitempty"`
	Command    []string `json:"command,omitempty"`

	Env          []string     `json:"env,omitempty"`          // NAME=value, complete
	User         string       `json:"user,omitempty"`         // (name|uid)[:(group|gid)], looked up in the container
	WorkingDir   string       `json:"workingDir,omitempty"`   // made where missing; "" is /
	StopSignal   string       `json:"stopSignal,omitempty"`   // SIGTERM or 15; "" is SIGTERM
	ExposedPorts []string     `json:"exposedPorts,omitempty"` // 80/tcp
	Healthcheck  *Healthcheck `json:"healthcheck,omitempty"`

	Settings
}

// An Image says where a container's layers come from.
type Image struct {
	Reference string            `json:"reference"`        // as asked for
	Digest    string            `json:"digest,omitempty"` // of the manifest, sha256:…
	ID        string            `json:"id"`               // digest of the configuration, sha256:…, docker's image id
	Labels    map[string]string `json:"labels,omitempty"` // of the image
}

// A Layer is one read-only ext4 image, attached as a disk and stacked by overlayfs.
type Layer struct {
	DiffID string `json:"diffId"` // digest of the uncompressed tar, sha256:…
	File   string `json:"file"`   // relative to the pod directory
}

// Settings are what a Pod's and a Launch's container have in common. The zero value of each is docker's default.
type Settings struct {
	Hostname    string            `json:"hostname,omitempty"`
	Domainname  string            `json:"domainname,omitempty"`
	Labels      map[string]string `json:"labels,omitempty"`
	GroupAdd    []string          `json:"groupAdd,omitempty"`    // group names or ids
	StopTimeout *Duration         `json:"stopTimeout,omitempty"` // from the stop signal to SIGKILL; default 10s
	TTY         bool              `json:"tty,omitempty"`
	OpenStdin   bool              `json:"openStdin,omitempty"`
	StdinOnce   bool              `json:"stdinOnce,omitempty"` // stdin ends with the first attached client
	Init        bool              `json:"init,omitempty"`      // a reaping init is pid 1, the command its child
	ReadOnly    bool              `json:"readOnly,omitempty"`  // root file system
	Privileged  bool              `json:"privileged,omitempty"`
	CapAdd      []string          `json:"capAdd,omitempty"` // NET_ADMIN, or ALL
	CapDrop     []string          `json:"capDrop,omitempty"`
	NoNewPrivs  bool              `json:"noNewPrivileges,omitempty"`
	// MaskedPaths are hidden from the container, and ReadonlyPaths write-protected; nil: docker's lists of what is in /proc and /sys, or none with Privileged.
	MaskedPaths   *[]string `json:"maskedPaths,omitempty"`
	ReadonlyPaths *[]string `json:"readonlyPaths,omitempty"`
	// WritableCgroups lets the container have cgroups of its own below /sys/fs/cgroup.
	WritableCgroups bool `json:"writableCgroups,omitempty"`

	Ulimits   []Ulimit          `json:"ulimits,omitempty"`
	Sysctls   map[string]string `json:"sysctls,omitempty"`
	Tmpfs     map[string]string `json:"tmpfs,omitempty"`   // path → mount options, as docker's --tmpfs
	ShmSize   Bytes             `json:"shmSize,omitempty"` // of /dev/shm; default 64 MiB
	Devices   []string          `json:"devices,omitempty"` // of the guest: /dev/net/tun, /dev/fuse, all
	Resources Limits            `json:"resources,omitzero"`
	Mounts    []Mount           `json:"mounts,omitempty"`
	Lifecycle Lifecycle         `json:"lifecycle,omitzero"`
	Logs      Logs              `json:"logs,omitzero"`
}

// Resources of a pod's VM.
type Resources struct {
	Memory Bytes `json:"memory,omitempty"` // what the containers may use together, exactly; default 256 MiB
	CPUs   int   `json:"cpus,omitempty"`   // virtual processors, as far as the host has so many; default 1
}

// Limits of one container inside its pod. Zero is no limit but the pod's.
type Limits struct {
	Memory      Bytes   `json:"memory,omitempty"`
	CPUs        float64 `json:"cpus,omitempty"`
	CPUShares   uint64  `json:"cpuShares,omitempty"` // docker's scale, 1024 is one share
	Pids        int64   `json:"pids,omitempty"`
	OOMScoreAdj int     `json:"oomScoreAdj,omitempty"`
}

// Boot says how the VM comes up.
type Boot struct {
	Accel string `json:"accel,omitempty"` // auto (default), kvm, tcg
	Start string `json:"start,omitempty"` // auto (default: from a template where possible), template, cold
}

// Network of a pod.
type Network struct {
	Mode    string    `json:"mode,omitempty"`  // user (default), netns, none
	Netns   string    `json:"netns,omitempty"` // path of the network namespace whose interface the guest takes over
	MAC     string    `json:"mac,omitempty"`   // link-layer address of eth0: 02:00:00:12:34:56; default: the namespace's, or chosen
	Publish []Publish `json:"publish,omitempty"`
	// Upstreams are TCP ports of services at the network namespace's 127.0.0.1 that containers reach at theirs (netns mode only): a service mesh's
	// proxy beside the pod listens there for each upstream of it.
	Upstreams []uint16 `json:"upstreams,omitempty"`
	// OnLink are ports of the pod, of TCP and UDP, that are reached from the interface's own networks alone (netns mode only): a port that CNI
	// publishes at all of the host's addresses is then at its 127.0.0.1 alone, as connections to that come from the bridge.
	OnLink     []uint16    `json:"onLink,omitempty"`
	DNS        []string    `json:"dns,omitempty"` // default: the host's resolvers, as far as a guest can reach them
	DNSSearch  []string    `json:"dnsSearch,omitempty"`
	DNSOptions []string    `json:"dnsOptions,omitempty"`
	ExtraHosts []HostEntry `json:"extraHosts,omitempty"`
	// Names is a file of a directory volume, VOLUME/FILE, with lines of /etc/hosts that may come and go while the pod runs. With it, containers' resolver
	// is the guest at 127.0.0.11, which answers by the file as it is at that moment, and asks DNS for what is not in it.
	Names string `json:"names,omitempty"`
}

// A HostEntry is one line of /etc/hosts.
type HostEntry struct {
	Name    string `json:"name"`
	Address string `json:"address"`
}

// Publish makes a port of the pod reachable on the host (user mode only; in a network namespace it is there already).
type Publish struct {
	HostIP   string `json:"hostIp,omitempty"`   // default: all addresses
	HostPort uint16 `json:"hostPort,omitempty"` // default: chosen at start
	Port     uint16 `json:"port"`
	Protocol string `json:"protocol,omitempty"` // tcp (default), udp
}

// Scratch is the pod's writable disk: container layers, anonymous volumes and logs.
type Scratch struct {
	Size Bytes `json:"size,omitempty"` // default 10 GiB; sparse: it takes what is in use
}

// A Volume is storage that containers of the pod mount by name. Exactly one of Block, Directory, NFS, Ceph, Tmpfs and Scratch says
// what is behind it; in a Pod that Nomad runs, none of them with a class: then it is the volume that Nomad has under that name.
type Volume struct {
	Name      string           `json:"name"`
	Class     string           `json:"class,omitempty"` // lv2, nfs, gfs: where it came from; the guest does not look at it
	Block     *BlockVolume     `json:"block,omitempty"`
	Directory *DirectoryVolume `json:"directory,omitempty"`
	NFS       *NFSVolume       `json:"nfs,omitempty"`
	Ceph      *CephVolume      `json:"ceph,omitempty"`
	Tmpfs     *TmpfsVolume     `json:"tmpfs,omitempty"`
	Scratch   *ScratchVolume   `json:"scratch,omitempty"`
}

// A BlockVolume is a raw image file or a block device of the host.
type BlockVolume struct {
	Path     string `json:"path"`             // absolute, or relative to the pod directory
	FSType   string `json:"fsType,omitempty"` // ext4 (default), xfs: a blank one is formatted so, a foreign file system refused
	ReadOnly bool   `json:"readOnly,omitempty"`
	Options  string `json:"options,omitempty"` // mount options
}

// A DirectoryVolume is a directory or a single file of the host.
type DirectoryVolume struct {
	Path      string `json:"path"`
	Transport string `json:"transport,omitempty"` // 9p (default), virtiofs (default with boot package stock)
	ReadOnly  bool   `json:"readOnly,omitempty"`
	Fill      bool   `json:"fill,omitempty"` // an empty one gets the image's content, as other volumes do
}

// An NFSVolume is mounted by the guest itself.
type NFSVolume struct {
	Address  string `json:"address"` // host or host:port
	Export   string `json:"export"`
	Options  string `json:"options,omitempty"` // as mount.nfs: vers=4.1,hard,…
	ReadOnly bool   `json:"readOnly,omitempty"`
}

// A CephVolume is a directory of a CephFS, which is mounted by the guest itself.
type CephVolume struct {
	Monitors   []string `json:"monitors"`             // HOST:PORT, of messenger version 2
	FileSystem string   `json:"fileSystem"`           // its name
	Path       string   `json:"path"`                 // in the file system
	Client     string   `json:"client"`               // whose key it is, without "client."
	Secret     string   `json:"secret,omitempty"`     // the key; or
	SecretFile string   `json:"secretFile,omitempty"` // a file of the host's that holds it, which is read whenever the pod starts: then no file of the pod has it
	Options    string   `json:"options,omitempty"`    // as mount.ceph: noatime,…
	ReadOnly   bool     `json:"readOnly,omitempty"`
}

// Mount is the volume's source and options for mount(2), type ceph, with the secret but without Options (linux/Documentation/filesystems/ceph.rst).
func (c *CephVolume) Mount() (source string, options []string) {
	return strings.Join(c.Monitors, ",") + ":" + c.Path, []string{"name=" + c.Client, "secret=" + c.Secret, "mds_namespace=" + c.FileSystem, "ms_mode=prefer-crc"}
}

// CephCoherent says whether a kernel of that release, as uname(2) tells it, reads right a CephFS file to which others append, and survives that others cut it: Linux
// from 6.12.7 on, and the boot package default's own (docs/decisions/0028).
func CephCoherent(release string) bool {
	var major, minor, patch int
	if n, _ := fmt.Sscanf(release, "%d.%d.%d", &major, &minor, &patch); n < 2 {
		return false
	}
	return major > 6 || major == 6 && (minor > 12 || minor == 12 && patch >= 7) || strings.HasSuffix(release, "-cradle")
}

// A TmpfsVolume lives in the guest's memory and is counted there.
type TmpfsVolume struct {
	Size Bytes `json:"size,omitempty"`
}

// A ScratchVolume is a directory on the pod's scratch disk: an anonymous volume, or one that containers of the pod share.
type ScratchVolume struct{}

// A Mount puts a volume into a container.
type Mount struct {
	Volume   string `json:"volume"`
	Path     string `json:"path"`              // absolute; / makes the volume the root file system
	Subpath  string `json:"subpath,omitempty"` // inside the volume
	ReadOnly bool   `json:"readOnly,omitempty"`
	NoCopy   bool   `json:"noCopy,omitempty"` // do not copy the image's content into an empty volume
	Raw      bool   `json:"raw,omitempty"`    // block volumes: no mount, a device node at Path, below /dev; by default /dev/volumes/NAME
}

// Lifecycle says when a container starts, starts again, and what its end means.
type Lifecycle struct {
	After            []After  `json:"after,omitempty"`
	RestartOnSuccess bool     `json:"restartOnSuccess,omitempty"`
	RestartOnFailure bool     `json:"restartOnFailure,omitempty"`
	RestartDelay     Duration `json:"restartDelay,omitempty"` // default: docker's, 100 ms doubling up to a minute
	MaxStarts        int      `json:"maxStarts,omitempty"`    // counts the first start; 0 is no limit
	// Hold keeps the container from its first start until somebody asks for it (docker's start), at most so long: who wants to miss
	// nothing of its output connects meanwhile.
	Hold Duration `json:"hold,omitempty"`
	// Critical: the end of this container (for good: not to be restarted) ends the pod. A pod in which no container is
	// critical ends with its last container.
	Critical bool `json:"critical,omitempty"`
}

// After names a container that must have come so far before this one starts.
type After struct {
	Container string `json:"container"`
	Until     string `json:"until,omitempty"` // started (default), healthy, exited (with success)
}

// Logs bounds what the guest keeps of a container's output.
type Logs struct {
	MaxSize Bytes `json:"maxSize,omitempty"` // of both streams together; default 1 GiB or a quarter of the scratch disk, the smaller
}

// A Ulimit is one resource limit. -1 is unlimited.
type Ulimit struct {
	Name string `json:"name"` // nofile, nproc, core, …
	Soft int64  `json:"soft"`
	Hard int64  `json:"hard"`
}

// Healthcheck is docker's: Test is ["NONE"], ["CMD", argv…] or ["CMD-SHELL", line].
type Healthcheck struct {
	Test          []string `json:"test,omitempty"`
	Interval      Duration `json:"interval,omitempty"`      // default 30s
	Timeout       Duration `json:"timeout,omitempty"`       // default 30s
	StartPeriod   Duration `json:"startPeriod,omitempty"`   // default 0s
	StartInterval Duration `json:"startInterval,omitempty"` // default 5s
	Retries       int      `json:"retries,omitempty"`       // default 3
}

// Defaults that the whole product uses.
const (
	DefaultMemory      Bytes = 256 << 20
	DefaultScratchSize Bytes = 10 << 30
	DefaultShmSize     Bytes = 64 << 20
	DefaultStopTimeout       = 10 * time.Second
)
