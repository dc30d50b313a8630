package server

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/nomad/api"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/network"
	"golang.org/x/sync/errgroup"

	"github.com/cradlestack/cradlestack/dockerapi/translate"
	"github.com/cradlestack/cradlestack/internal/dockerhttp"
	"github.com/cradlestack/cradlestack/internal/nomadjob"
	"github.com/cradlestack/cradlestack/spec"
)

// Nomad Variables of a namespace, in which everything is that Nomad would forget. Each is written with check-and-set alone, so that of two servers
// that want the same thing one has it.
const (
	recordPrefix = nomadjob.DockerRecords // + id: a record
	recordItem   = "record"
	ownerItem    = "id"
)

const recordVersion = 1

// What is wanted of a container.
const (
	wantCreated = "created"
	wantRunning = "running"
	wantStopped = "stopped"
	wantRemoved = "removed"
)

// A record is what is known of a container, from create to rm.
type record struct {
	Version  int                                  `json:"version"`
	ID       string                               `json:"id"`
	Name     string                               `json:"name"`
	Created  time.Time                            `json:"created"`
	Image    imageRef                             `json:"image"`
	Config   *container.Config                    `json:"config"`
	Host     *container.HostConfig                `json:"hostConfig"`
	Networks map[string]*network.EndpointSettings `json:"networks,omitempty"`
	Pod      *spec.Pod                            `json:"pod"`
	Zone     string                               `json:"zone,omitempty"`
	Volumes  []string                             `json:"volumes,omitempty"`
	Ranges   map[int]translate.PortRange          `json:"ranges,omitempty"` // of published ports, by index

	Want string `json:"want"`
	Run  int    `json:"run"`            // how many times it was started
	Try  int    `json:"try,omitempty"`  // of the run: the places where it can't be are counted
	Node string `json:"node,omitempty"` // where its disk is, by the node's id
	// Left is a lost node that has a disk of its, until it is known where the next run is.
	Left string `json:"left,omitempty"`
	// Again is how many times its restart policy had to begin a run since a client has started it.
	Again int `json:"again,omitempty"`
	// Filled says that a container that is removed at its end has a disk nevertheless, as somebody has looked at it, or copied to it, before its start.
	Filled bool `json:"filled,omitempty"`
	// Attended is until when somebody looks at its disk: see attendant.go.
	Attended time.Time `json:"attended,omitzero"`
	Last     run       `json:"last,omitzero"` // the newest run that is known to have ended

	// Bridged says whether the machine of the newest run has an interface in its node's bridge.
	Bridged bool `json:"bridged,omitempty"`

	// Links are its own names for other containers on its networks, by the name that each of those has of its id.
	Links map[string][]string `json:"links,omitempty"`

	// Joins is the container whose machine it is in, by its id, and Within the run of that one that its newest run is in. Began is when it began.
	Joins  string    `json:"joins,omitempty"`
	Within int       `json:"within,omitempty"`
	Began  time.Time `json:"began,omitzero"`

	// Inherits are its volumes without a name that were other containers' before, by what they are called in its pod.
	Inherits map[string]inheritance `json:"inherits,omitempty"`

	place string // the node where the newest run has to be, "" for any; known while it is started
	index uint64 // of the variable
}

type imageRef struct {
	Reference string `json:"reference"` // as the nodes pull it
	Audience  string `json:"audience,omitempty"`
	ID        string `json:"id"`
}

// A run is one from start to end.
type run struct {
	Number     int       `json:"number"`
	StartedAt  time.Time `json:"startedAt,omitzero"` // zero where it never ran
	FinishedAt time.Time `json:"finishedAt,omitzero"`
	ExitCode   int       `json:"exitCode"`
	OOMKilled  bool      `json:"oomKilled,omitempty"`
	Error      string    `json:"error,omitempty"`
	Restarts   int       `json:"restarts,omitempty"`
	Lost       string    `json:"lost,omitempty"` // what took it away; "" where it has ended by itself
}

func newID() string {
	var b [32]byte
	for {
		_, _ = rand.Read(b[:]) // never fails
		id := hex.EncodeToString(b[:])
		if strings.Trim(id[:12], "0123456789") != "" { // docker's: the short id is a host name, which is no number
			return id
		}
	}
}

func (r *record) jobID() string { return jobPrefix + r.ID }

// keepsDisk says whether the container has a disk when it does not run.
func (r *record) keepsDisk() bool { return r.Joins == "" && (!r.Host.AutoRemove || r.Filled) }

// ended says whether the newest run is known to have ended.
func (r *record) ended() bool { return r.Run > 0 && r.Last.Number == r.Run }

// namePath is the path of a name's variable.
func namePath(name string) string { return nomadjob.DockerNamePath(name) }

// hash is 64 hexadecimal digits that are a text's.
func hash(text string) string {
	sum := sha256.Sum256([]byte(text))
	return hex.EncodeToString(sum[:])
}

var errConflict = errors.New("it was changed by somebody else at the same time")

func isConflict(err error) bool {
	var conflict api.ErrCASConflict
	return errors.As(err, &conflict)
}

func (t *tenant) write(ctx context.Context) *api.WriteOptions {
	return (&api.WriteOptions{}).WithContext(ctx)
}

func (t *tenant) query(ctx context.Context) *api.QueryOptions {
	return (&api.QueryOptions{}).WithContext(ctx)
}

// put writes a record that nobody else has changed since it was read; errConflict where somebody has.
func (t *tenant) put(ctx context.Context, r *record) error {
	data, err := json.Marshal(r)
	if err != nil {
		return err
	}
	v := &api.Variable{Path: recordPrefix + r.ID, Items: api.VariableItems{recordItem: string(data)}, ModifyIndex: r.index}
	out, _, err := t.nomad.Variables().CheckedUpdate(v, t.write(ctx))
	if isConflict(err) {
		return errConflict
	}
	if err != nil {
		if strings.Contains(err.Error(), "size") {
			return dockerhttp.Invalid("the container's configuration is too large for a Nomad variable (64 KiB): put large values into files of a volume (%v)", err)
		}
		return err
	}
	r.index = out.ModifyIndex
	t.records.keep(r)
	return nil
}

// get reads a record; a 404 where there is none.
func (t *tenant) get(ctx context.Context, id string) (*record, error) {
	v, _, err := t.nomad.Variables().Read(recordPrefix+id, t.query(ctx))
	if errors.Is(err, api.ErrVariablePathNotFound) {
		return nil, noContainer(id)
	}
	if err != nil {
		return nil, err
	}
	return t.parse(v)
}

func (t *tenant) parse(v *api.Variable) (*record, error) {
	var r record
	if err := json.Unmarshal([]byte(v.Items[recordItem]), &r); err != nil {
		return nil, fmt.Errorf("variable %s: %w", v.Path, err)
	}
	if r.Version != recordVersion || recordPrefix+r.ID != v.Path || r.Config == nil || r.Host == nil || r.Pod == nil {
		return nil, fmt.Errorf("variable %s is no record that this server reads (version %d)", v.Path, r.Version)
	}
	r.index = v.ModifyIndex
	t.records.keep(&r)
	return &r, nil
}

func noContainer(name string) error {
	return dockerhttp.Errorf(http.StatusNotFound, "No such container: %s", name)
}

// change applies f to a record until nobody else has changed it meanwhile. f returns false where there is nothing to change.
func (t *tenant) change(ctx context.Context, id string, f func(*record) (bool, error)) (*record, error) {
	for {
		r, err := t.get(ctx, id)
		if err != nil {
			return nil, err
		}
		again, err := f(r)
		if err != nil || !again {
			return r, err
		}
		if err := t.put(ctx, r); !errors.Is(err, errConflict) {
			return r, err
		}
	}
}

// staleName is after which time a name without a container is somebody's who was killed while it made one.
const staleName = 30 * time.Second

// takeName reserves a name for a container.
func (t *tenant) takeName(ctx context.Context, name, id string) error {
	vars := t.nomad.Variables()
	for {
		v := &api.Variable{Path: namePath(name), Items: api.VariableItems{ownerItem: id, "name": name}}
		_, _, err := vars.CheckedCreate(v, t.write(ctx))
		if !isConflict(err) {
			return err
		}
		held, _, err := vars.Read(namePath(name), t.query(ctx))
		if errors.Is(err, api.ErrVariablePathNotFound) {
			continue
		}
		if err != nil {
			return err
		}
		owner := held.Items[ownerItem]
		if owner == id {
			return nil
		}
		r, err := t.get(ctx, owner)
		if isNotFound(err) && time.Since(time.Unix(0, held.ModifyTime)) > staleName || err == nil && r.Name != name && time.Since(time.Unix(0, held.ModifyTime)) > staleName {
			if _, err := vars.CheckedDelete(held.Path, held.ModifyIndex, t.write(ctx)); err != nil && !isConflict(err) {
				return err
			}
			continue
		}
		if err != nil && !isNotFound(err) {
			return err
		}
		return dockerhttp.Errorf(http.StatusConflict, "Conflict. The container name %q is already in use by container %q. You have to remove (or rename) that container to be able to reuse that name.", "/"+name, owner)
	}
}

// freeName gives up a name, if it is still the container's.
func (t *tenant) freeName(ctx context.Context, name, id string) error {
	vars := t.nomad.Variables()
	v, _, err := vars.Read(namePath(name), t.query(ctx))
	if errors.Is(err, api.ErrVariablePathNotFound) || err == nil && v.Items[ownerItem] != id {
		return nil
	}
	if err == nil {
		if _, err = vars.CheckedDelete(v.Path, v.ModifyIndex, t.write(ctx)); isConflict(err) {
			return nil
		}
	}
	return err
}

func isNotFound(err error) bool { return isAnswer(err, http.StatusNotFound) }

// isTaken says whether what is asked for conflicts with what there is.
func isTaken(err error) bool { return isAnswer(err, http.StatusConflict) }

// isAnswer says whether an error is what a client is told with this status.
func isAnswer(err error, status int) bool {
	var e dockerhttp.Error
	return errors.As(err, &e) && e.Status == status
}

// find reads the record of what a client calls ID, name, or the beginning of an id; in this order, as docker does.
func (t *tenant) find(ctx context.Context, ref string) (*record, error) {
	ref = strings.TrimPrefix(ref, "/")
	if ref == "" {
		return nil, dockerhttp.Invalid("no container name or ID supplied")
	}
	isHex := strings.Trim(ref, "0123456789abcdef") == ""
	if len(ref) == 64 && isHex {
		if r, err := t.get(ctx, ref); !isNotFound(err) {
			return r, err
		}
	}
	if r, err := t.named(ctx, ref); !isNotFound(err) {
		return r, err
	}
	if !isHex || len(ref) > 64 {
		return nil, noContainer(ref)
	}
	all, _, err := t.nomad.Variables().PrefixList(recordPrefix+ref, t.query(ctx))
	if err != nil {
		return nil, err
	}
	switch len(all) {
	case 0:
		return nil, noContainer(ref)
	case 1:
		r, err := t.get(ctx, strings.TrimPrefix(all[0].Path, recordPrefix))
		if isNotFound(err) {
			return nil, noContainer(ref)
		}
		return r, err
	}
	return nil, dockerhttp.Invalid("Multiple IDs found with provided prefix: %s", ref)
}

// named reads the record of a container's name.
func (t *tenant) named(ctx context.Context, name string) (*record, error) {
	if _, err := translate.Name(name); err != nil {
		return nil, noContainer(name)
	}
	v, _, err := t.nomad.Variables().Read(namePath(name), t.query(ctx))
	if errors.Is(err, api.ErrVariablePathNotFound) {
		return nil, noContainer(name)
	}
	if err != nil {
		return nil, err
	}
	r, err := t.get(ctx, v.Items[ownerItem])
	if err == nil && r.Name != name { // it was renamed, and its old name is about to go
		return nil, noContainer(name)
	}
	return r, err
}

// readers is how many records are read at once.
const readers = 16

// list reads all records, the newest first. Those that have not changed since they were read are not read again.
func (t *tenant) list(ctx context.Context) ([]*record, error) {
	all, _, err := t.nomad.Variables().PrefixList(recordPrefix, t.query(ctx))
	if err != nil {
		return nil, err
	}
	found := make([]*record, len(all))
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(readers)
	for i, v := range all {
		id := strings.TrimPrefix(v.Path, recordPrefix)
		if found[i] = t.records.known(id, v.ModifyIndex); found[i] != nil {
			continue
		}
		g.Go(func() error {
			r, err := t.get(ctx, id)
			if isNotFound(err) {
				return nil
			}
			found[i] = r
			return err
		})
	}
	if err := g.Wait(); err != nil {
		return nil, err
	}
	found = slices.DeleteFunc(found, func(r *record) bool { return r == nil })
	t.records.forget(found)
	slices.SortFunc(found, func(a, b *record) int { return b.Created.Compare(a.Created) })
	return found, nil
}

// A recordCache keeps records as they were read. Who gets one from it must not change it.
type recordCache struct {
	mu   sync.Mutex
	byID map[string]*record
}

func (c *recordCache) keep(r *record) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.byID == nil {
		c.byID = map[string]*record{}
	}
	if old := c.byID[r.ID]; old == nil || old.index <= r.index {
		kept := *r
		c.byID[r.ID] = &kept
	}
}

func (c *recordCache) known(id string, index uint64) *record {
	c.mu.Lock()
	defer c.mu.Unlock()
	if r := c.byID[id]; r != nil && r.index == index {
		return r
	}
	return nil
}

// forget drops all but those that there are.
func (c *recordCache) forget(there []*record) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.byID = make(map[string]*record, len(there))
	for _, r := range there {
		c.byID[r.ID] = r
	}
}

// putVariables writes the variable that a container's job reads its environment and its networks from.
func (t *tenant) putVariables(ctx context.Context, r *record) error {
	items, err := nomadjob.EnvItems(r.Pod, r.places())
	if err != nil || items == nil {
		return err
	}
	_, _, err = t.nomad.Variables().Update(&api.Variable{Path: nomadjob.EnvPath(r.jobID()), Items: items}, t.write(ctx))
	return err
}
