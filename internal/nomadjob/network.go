package nomadjob

import (
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/hashicorp/nomad/api"
)

// NetworkPrefix begins the paths of the variables of networks.
const NetworkPrefix = "docker/networks/"

const (
	recordItem    = "record"
	recordVersion = 1
)

// A NetworkRecord is what a namespace's variable says of a network with names, as docker has them: whoever makes one writes it so, and pods of docker and of
// others find each other there (docs/decisions/0014).
type NetworkRecord struct {
	Version    int               `json:"version"`
	ID         string            `json:"id"` // 64 hexadecimal digits
	Name       string            `json:"name"`
	Created    time.Time         `json:"created"`
	Driver     string            `json:"driver"`
	Attachable bool              `json:"attachable,omitempty"`
	Options    map[string]string `json:"options,omitempty"`
	Labels     map[string]string `json:"labels,omitempty"`
	// Node is where its containers are, by the node's id: the addresses of Nomad's bridge are known on their node alone.
	Node string `json:"node,omitempty"`
}

// NewNetworkRecord is one of a network that nobody is on.
func NewNetworkRecord(name, id string) NetworkRecord {
	return NetworkRecord{Version: recordVersion, ID: id, Name: name, Created: time.Now().UTC(), Driver: "bridge"}
}

// NetworkService is the name of Nomad's service by which pods of a network find each other.
func NetworkService(id string) string { return "net-" + id[:min(32, len(id))] }

// NetworkPath is the path of a network's variable: two networks can't have the same name.
func NetworkPath(name string) string { return NetworkPrefix + VariableName(name) }

// ReadNetwork reads a network's variable.
func ReadNetwork(v *api.Variable) (n NetworkRecord, err error) {
	if err := json.Unmarshal([]byte(v.Items[recordItem]), &n); err != nil || n.Version != recordVersion {
		return n, fmt.Errorf("variable %s is no network that this version reads (version %d): %w", v.Path, n.Version, cmp.Or(err, errors.ErrUnsupported))
	}
	return n, nil
}

// Variable is the record as it is kept; index is that of the variable that it was read from, 0 where there was none.
func (n NetworkRecord) Variable(index uint64) (*api.Variable, error) {
	data, err := json.Marshal(n)
	if err != nil {
		return nil, err
	}
	return &api.Variable{Path: NetworkPath(n.Name), Items: api.VariableItems{recordItem: string(data)}, ModifyIndex: index}, nil
}

// DockerPrefix begins the ids of the jobs of docker's containers.
const DockerPrefix = "docker-"

// DockerRecords begins the paths of the variables in which docker keeps what it knows of its containers, whose ids follow.
const DockerRecords = "docker/containers/"

// ContainerMeta is the name, in Options.Meta, of the id of the container that docker has made a job for.
const ContainerMeta = "container"

// DockerContainer is the id of the container that docker has made a job for, also of one that somebody has taken over since.
func DockerContainer(j *api.Job) (id string, ok bool) {
	id, ok = strings.CutPrefix(deref(j.ID), DockerPrefix)
	return id, ok && id != "" && Meta(j)[ContainerMeta] == id
}

// TakenOver says whether the job of a container is docker's no more: it has the name of its id then, and not the container's. Nothing else of a job can be changed
// without its pod being started anew.
func TakenOver(j *api.Job) bool {
	_, ok := DockerContainer(j)
	return ok && deref(j.Name) == deref(j.ID)
}

// DockerNamePath is the path of the variable that says whose a name of docker's containers is.
func DockerNamePath(name string) string { return "docker/names/" + VariableName(name) }

// VariableName is a name as part of a variable's path: Nomad allows letters, digits and -_~/ and 128 characters (structs/variables.go).
func VariableName(name string) string {
	text := strings.ReplaceAll(name, ".", "~")
	if len(text) > 100 {
		sum := sha256.Sum256([]byte(name))
		text = "~" + hex.EncodeToString(sum[:])
	}
	return text
}
