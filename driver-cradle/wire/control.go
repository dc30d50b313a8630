package wire

import (
	"net/netip"
	"time"

	"github.com/cradlestack/cradlestack/spec"
)

// Control calls: HTTP requests with a JSON body and a JSON answer, an error being docker's {"message": …}.
const (
	PathLaunch   = "/cradle/v1/launch"   // POST Launch → Status: once in a guest's life; ?attach=NAME&… answers as docker's attach to NAME
	PathStatus   = "/cradle/v1/status"   // GET → Status
	PathWait     = "/cradle/v1/wait"     // GET → Status, as soon as the pod has ended
	PathStop     = "/cradle/v1/stop"     // POST ?timeout=seconds&signal=NAME → Status: containers stopped; each has its own timeout and signal, unless they are given (the signal: the first container's)
	PathShutdown = "/cradle/v1/shutdown" // POST ?timeout=seconds → Status: after that, volumes unmounted, disks synced, logs closed
	PathFreeze   = "/cradle/v1/freeze"   // POST ?volume=NAME&timeout=seconds: file system quiet and on disk until thawed, at the latest by itself after the timeout; again: the time starts anew
	PathThaw     = "/cradle/v1/thaw"     // POST ?volume=NAME → Thawed
	PathGrow     = "/cradle/v1/grow"     // POST ?volume=NAME: the disk has grown, grow the file system
	PathStats    = "/cradle/v1/stats"    // GET → Stats
	PathUsage    = "/cradle/v1/usage"    // GET ?volume=NAME → spec.VolumeStats
	PathJoin     = "/cradle/v1/join"     // POST Join → ContainerStatus: a container more, held until docker's start is called for it
	PathLeave    = "/cradle/v1/leave"    // POST ?container=ID: one that has joined ends, and nothing of it stays
	PathOutput   = "/cradle/v1/output"   // GET ?container=NAME&after=Mark → a stream of Pieces, until the container has ended for good
)

// Launch is what the guest needs to run a pod: the Launch, and what the host decided at this start.
type Launch struct {
	Launch      spec.Launch `json:"launch"`
	Disks       []Disk      `json:"disks"`
	Directories []Directory `json:"directories,omitempty"`
	Interfaces  []Interface `json:"interfaces,omitempty"`
	DNS         DNS         `json:"dns"`
	// ConsoleSize, in rows and columns, is that of terminals at their containers' start, where somebody looks at them.
	ConsoleSize [2]uint16 `json:"consoleSize,omitzero"`
}

// A Join is a container that joins a pod that runs. It is held: docker's start lets it run. The same Join again changes nothing; one with a higher number for a
// container that has ended holds it anew.
type Join struct {
	Container spec.Container `json:"container"`
	Volumes   []spec.Volume  `json:"volumes,omitempty"` // of it alone, on the scratch disk
	Disks     []Disk         `json:"disks"`             // of its layers
	PID       string         `json:"pid,omitempty"`     // the container whose process namespace it shares, by its id
	IPC       string         `json:"ipc,omitempty"`     // and the one whose IPC namespace and /dev/shm
	Run       int            `json:"run"`
}

// Keys of disks, before the DiffID or the volume's name.
const (
	DiskScratch = "scratch"
	DiskLayer   = "layer:"
	DiskVolume  = "volume:"
)

// A Disk is found by its LUN on target 0 of the virtio-scsi bus; names like sda come in any order.
type Disk struct {
	Key      string `json:"key"` // DiskScratch, DiskLayer + DiffID, DiskVolume + name
	LUN      int    `json:"lun"`
	ReadOnly bool   `json:"readOnly,omitempty"`
}

// A Directory is where a directory volume is to be found.
type Directory struct {
	Volume string `json:"volume"`
	Tag    string `json:"tag"`            // mount tag; transport 9p: ShareTag
	Type   string `json:"type"`           // 9p, virtiofs
	Path   string `json:"path,omitempty"` // inside the share
	File   bool   `json:"file,omitempty"` // a single file
}

// ShareTag is the mount tag of a pod's one 9p device.
const ShareTag = "cradle"

// An Interface is set up as the host says; the guest asks nobody.
type Interface struct {
	Name      string         `json:"name"` // eth0
	MAC       string         `json:"mac,omitempty"`
	MTU       int            `json:"mtu,omitempty"`
	Addresses []netip.Prefix `json:"addresses,omitempty"`
	Routes    []Route        `json:"routes,omitempty"`
	// Namespace is there where a network namespace on the host goes on using the addresses.
	Namespace *Namespace `json:"namespace,omitempty"`
}

// A Namespace shares an interface's addresses with the guest. What its processes send to one of them or to the loopback address, and nobody there
// takes, comes in by the interface, from an address that stands for the namespace; what the guest sends to that goes back to them. The ones of IPv6 are
// there where the interface has that.
type Namespace struct {
	MAC        string     `json:"mac"`
	IP4        netip.Addr `json:"ip4"` // they were sent to one of the interface's addresses
	IP6        netip.Addr `json:"ip6,omitzero"`
	Loopback4  netip.Addr `json:"loopback4"`          // they were sent to 127.0.0.1, and come in to it
	Loopback6  netip.Addr `json:"loopback6,omitzero"` // they were sent to ::1, and come in to the first address
	LocalPorts [2]uint16  `json:"localPorts"`         // first and last: the guest's part of those for sockets that ask for none
	// Upstreams are ports of services at the namespace's 127.0.0.1 that the guest's processes reach at theirs.
	Upstreams []uint16 `json:"upstreams,omitempty"`
}

// A Route with an invalid Via is on the link.
type Route struct {
	Destination netip.Prefix `json:"destination"`
	Via         netip.Addr   `json:"via,omitzero"`
	Source      netip.Addr   `json:"source,omitzero"`
	Metric      int          `json:"metric,omitempty"`
}

// DNS is the content of /etc/resolv.conf.
type DNS struct {
	Servers []string `json:"servers,omitempty"`
	Search  []string `json:"search,omitempty"`
	Options []string `json:"options,omitempty"`
}

// States of a pod and of a container, docker's words.
const (
	StateCreated    = "created"
	StateRunning    = "running"
	StatePaused     = "paused"
	StateRestarting = "restarting"
	StateExited     = "exited"
	StateDead       = "dead"
)

// Status of a pod.
type Status struct {
	State      string            `json:"state"` // created, running, exited
	Containers []ContainerStatus `json:"containers"`
	// ExitCode is that of the container whose end ended the pod.
	ExitCode int    `json:"exitCode"`
	Error    string `json:"error,omitempty"`
	// Filling is what the launch is busy with, if that is what may take long.
	Filling *Filling `json:"filling,omitempty"`
}

// Filling is how far the copying of an image's content into a volume has come, in bytes.
type Filling struct {
	Volume string `json:"volume"`
	Done   int64  `json:"done"`
	Total  int64  `json:"total,omitempty"` // about; 0 where unknown
}

// ContainerStatus is the part of docker's State that outlives the guest.
type ContainerStatus struct {
	ID         string    `json:"id"`
	Name       string    `json:"name"`
	State      string    `json:"state"`
	ExitCode   int       `json:"exitCode"` // 126: not executable, 127: not found, 128+n: killed by signal n
	OOMKilled  bool      `json:"oomKilled,omitempty"`
	Error      string    `json:"error,omitempty"`
	Starts     int       `json:"starts"`
	StartedAt  time.Time `json:"startedAt,omitzero"`
	FinishedAt time.Time `json:"finishedAt,omitzero"`
	Health     string    `json:"health,omitempty"` // starting, healthy, unhealthy
}

// Stats of the guest as a whole, in bytes and nanoseconds. Per container: docker's stats.
type Stats struct {
	MemoryTotal     uint64 `json:"memoryTotal"`
	MemoryAvailable uint64 `json:"memoryAvailable"`
	MemoryUsed      uint64 `json:"memoryUsed"` // by the containers, as their cgroup counts it, without reclaimable cache
	CPU             uint64 `json:"cpu"`        // by the containers, since boot
}

// Thawed says whether a file system was frozen all the time until it was thawed.
type Thawed struct {
	Frozen bool `json:"frozen"`
}
