package spec

import (
	"maps"
	"slices"
	"time"
)

// Calls that a pod's host answers on vdocker.sock, each as the first one of its connection. Errors are docker's, {"message": …}.
const (
	JoinPath  = "/cradle/v1/join"  // POST Join → a container more in the pod, with its state in docker's words; docker's start lets it run
	LeavePath = "/cradle/v1/leave" // POST ?container=ID: a container that has joined ends, and what it has written is removed
)

// MaxJoined is how many containers may have joined a pod at a time.
const MaxJoined = 32

// A Join is a container that joins a pod that runs: it shares the pod's machine, network, memory and processors, and ends with it. What it writes is kept on the
// pod's scratch disk by its id, until it leaves. A Join that is repeated, as its answer did not come, changes nothing.
type Join struct {
	ID        string       `json:"id"` // 64 lower-case hexadecimal digits
	Container PodContainer `json:"container"`
	// Volumes are on the scratch disk, and the container's alone.
	Volumes []Volume `json:"volumes,omitempty"`
	// Shared are the names, in Container.Mounts, of volumes that the pod's own first container has mounted, each with the path at which it has it: the machine has
	// the volumes that it was started with, and no other.
	Shared map[string]string `json:"shared,omitempty"`
	// PID and IPC are the containers of the pod, by their ids, whose processes it sees, and whose shared memory, semaphores and message queues it has; "" for its own. They
	// have to run when it starts.
	PID string `json:"pid,omitempty"`
	IPC string `json:"ipc,omitempty"`
	// Run is the number of the start that is to come: a container that has ended is made ready again where it is higher than before.
	Run int `json:"run"`
	// Auth is for the image's registry.
	Auth *JoinAuth `json:"auth,omitempty"`
}

// A JoinAuth is what a registry is told.
type JoinAuth struct {
	Username string `json:"username"`
	Password string `json:"password"`
}

// JoinTimeout is how long a caller has to wait for an answer: the image may have to be pulled.
const JoinTimeout = 10 * time.Minute

// ParseJoin reads a Join and checks it.
func ParseJoin(data []byte) (*Join, error) {
	var j Join
	if err := parse("join", data, &j, j.validate); err != nil {
		return nil, err
	}
	return &j, nil
}

func (j *Join) validate(v *validator) {
	v.id("id", j.ID)
	for field, of := range map[string]string{"pid": j.PID, "ipc": j.IPC} {
		if of != "" {
			v.id(field, of)
		}
		if of == j.ID {
			v.reject(field, "is the container itself")
		}
	}
	volumes := v.volumes(j.Volumes, true)
	for i, o := range j.Volumes {
		if o.Scratch == nil {
			v.reject(index("volumes", i), "is no volume of the pod's own disk: a container that joins can have no other")
		}
	}
	if len(j.Shared) > MaxVolumes {
		v.reject("shared", "are %d; at most %d", len(j.Shared), MaxVolumes)
	}
	for _, name := range slices.Sorted(maps.Keys(j.Shared)) {
		at := "shared." + name
		v.name(at, name)
		v.path(at, j.Shared[name])
		if _, twice := volumes[name]; twice {
			v.reject(at, "is the name of a volume of the container's own")
		}
		volumes[name] = Volume{Name: name, Scratch: &ScratchVolume{}} // of whatever kind: it has a file system
	}
	v.name("container.name", j.Container.Name)
	if len(j.Container.Lifecycle.After) > 0 {
		v.reject("container.lifecycle.after", "is there: a container that joins waits for none")
	}
	j.Container.validate(v, "container", volumes)
}
