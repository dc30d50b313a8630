package spec

import "time"

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
	volumes := v.volumes(j.Volumes, true)
	for i, o := range j.Volumes {
		if o.Scratch == nil {
			v.reject(index("volumes", i), "is no volume of the pod's own disk: a container that joins can have no other")
		}
	}
	v.name("container.name", j.Container.Name)
	if len(j.Container.Lifecycle.After) > 0 {
		v.reject("container.lifecycle.after", "is there: a container that joins waits for none")
	}
	j.Container.validate(v, "container", volumes)
}
