package pod

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/cradlestack/cradlestack/driver-cradle/hostfile"
	"github.com/cradlestack/cradlestack/driver-cradle/image"
	"github.com/cradlestack/cradlestack/driver-cradle/vmm"
	"github.com/cradlestack/cradlestack/driver-cradle/wire"
	"github.com/cradlestack/cradlestack/spec"
)

// Joining is where a container that joins a running pod has its image from.
type Joining struct {
	Images *image.Store
	Pull   func(*spec.JoinAuth) (image.PullOptions, error)
}

// joinedFile, in the run directory, has the containers that have joined the pod, and what they use.
const joinedFile = "joined.json"

// joinedContainers are what each has that has joined, by its id.
type joinedContainers map[string]*joinedContainer

type joinedContainer struct {
	Image  string   `json:"image"`  // its id
	Layers []string `json:"layers"` // diff ids
}

func (d *Dir) joined() (joinedContainers, error) {
	data, err := hostfile.Read(d.join(runDir, joinedFile), spec.MaxDocument)
	if errors.Is(err, fs.ErrNotExist) {
		return joinedContainers{}, nil
	}
	if err != nil {
		return nil, err
	}
	all := joinedContainers{}
	if err := json.Unmarshal(data, &all); err != nil {
		return nil, fmt.Errorf("%s: %w", d.join(runDir, joinedFile), err)
	}
	return all, nil
}

// A joinError is the caller's.
type joinError struct {
	status int
	text   string
}

func (e *joinError) Error() string { return e.text }

// guestTimeout bounds what the guest does for one that joins or leaves.
const guestTimeout = 2 * time.Minute

// Join adds a container to the pod. It is there, and held, when Join returns.
func (r *Running) Join(ctx context.Context, j *spec.Join) (s wire.ContainerStatus, err error) {
	if r.joining == nil {
		return s, &joinError{http.StatusNotImplemented, "nothing joins this pod: it is not one of Nomad's"}
	}
	pull, err := r.joining.Pull(j.Auth)
	if err != nil {
		return s, err
	}
	img, err := r.joining.Images.Pull(ctx, j.Container.Image, pull)
	if err != nil {
		return s, err
	}
	r.joins.Lock()
	defer r.joins.Unlock()
	all, err := r.dir.joined()
	if err != nil {
		return s, err
	}
	switch {
	case all[j.ID] == nil && len(all) >= spec.MaxJoined:
		return s, &joinError{http.StatusConflict, fmt.Sprintf("pod %s: %d containers have joined it already, which is the most: remove one", r.spec.Name, len(all))}
	case j.Container.Resources.Memory > r.spec.Resources.Memory:
		return s, &joinError{http.StatusConflict, fmt.Sprintf("pod %s has %v of memory for all of its containers, and this one alone asks for %v", r.spec.Name, r.spec.Resources.Memory, j.Container.Resources.Memory)}
	}
	w, err := joinOf(j, img, r.spec.Containers[0].Mounts)
	if err != nil {
		return s, &joinError{http.StatusBadRequest, err.Error()}
	}
	before := all[j.ID]
	if before != nil && before.Image != img.ID {
		return s, &joinError{http.StatusConflict, fmt.Sprintf("container %s has joined already with image %s", j.ID, before.Image)}
	}
	own := &joinedContainer{Image: img.ID}
	for _, l := range img.Layers {
		if !slices.Contains(own.Layers, l.DiffID) {
			own.Layers = append(own.Layers, l.DiffID)
		}
	}
	all[j.ID] = own
	if err := writeJSON(r.dir.join(runDir, joinedFile), all); err != nil {
		return s, err
	}
	_, err = r.joining.Images.Hold(img, r.holder())
	for _, l := range img.Layers {
		if err == nil {
			err = r.plug(ctx, l, w)
		}
	}
	if err == nil {
		ctx, cancel := context.WithTimeoutCause(ctx, guestTimeout, errors.New("the guest does not answer"))
		defer cancel()
		if err = r.call(ctx, http.MethodPost, wire.PathJoin, nil, w, &s); err != nil && ctx.Err() != nil {
			err = context.Cause(ctx)
		}
	}
	var refused *GuestError
	if before == nil && (errors.As(err, &refused) || err != nil && ctx.Err() == nil) { // else it may have joined: the next one sees
		err = errors.Join(err, r.remove(all, j.ID))
	}
	return s, err
}

// holder is the owner of the holds on the images of those that have joined: they end with each image's last container, and at the latest with the pod's directory.
func (r *Running) holder() string { return r.dir.join(runDir) }

// remove forgets a container that the guest has not got, and what nobody but it has used.
func (r *Running) remove(all joinedContainers, id string) error {
	was := all[id]
	delete(all, id)
	if err := writeJSON(r.dir.join(runDir, joinedFile), all); err != nil {
		return err
	}
	r.unplug(all, was.Layers)
	for _, c := range all {
		if c.Image == was.Image {
			return nil
		}
	}
	return r.joining.Images.Release(was.Image, r.holder())
}

// plug sees to it that a layer's disk is in the machine.
func (r *Running) plug(ctx context.Context, l image.Layer, w *wire.Join) error {
	key := wire.DiskLayer + l.DiffID
	if slices.ContainsFunc(w.Disks, func(d wire.Disk) bool { return d.Key == key }) {
		return nil
	}
	lun, ok := r.machine.LUN(key)
	if !ok {
		if err := image.CheckLayer(ctx, l.Path, l.DiffID); err != nil {
			return err
		}
		var err error
		if lun, err = r.machine.AddDisk(ctx, vmm.Disk{Key: key, Path: l.Path, ReadOnly: true, Internal: true}); err != nil {
			return err
		}
	}
	w.Disks = append(w.Disks, wire.Disk{Key: key, LUN: lun, ReadOnly: true})
	return nil
}

// unplug takes those disks out of the machine that nobody uses any more. One that stays is used by the next container that needs it.
func (r *Running) unplug(all joinedContainers, layers []string) {
	used := map[string]bool{}
	for _, c := range r.spec.Containers {
		for _, l := range c.Layers {
			used[l.DiffID] = true
		}
	}
	for _, c := range all {
		for _, l := range c.Layers {
			used[l] = true
		}
	}
	ctx, cancel := context.WithTimeout(r.ctx, guestTimeout)
	defer cancel()
	for _, l := range layers {
		lun, ok := r.machine.LUN(wire.DiskLayer + l)
		if !ok || used[l] {
			continue
		}
		if err := r.machine.RemoveDisk(ctx, lun); err != nil {
			r.log.Warn("a layer's disk stays in the machine", "pod", r.spec.Name, "error", err)
		}
	}
}

// joinOf is what the guest is told. own are the mounts of the pod's own container.
func joinOf(j *spec.Join, img *image.Image, own []spec.Mount) (*wire.Join, error) {
	p := &spec.Pod{Name: j.Container.Name, Containers: []spec.PodContainer{j.Container}, Volumes: slices.Clone(j.Volumes)}
	for name := range j.Shared {
		p.Volumes = append(p.Volumes, spec.Volume{Name: name, Scratch: &spec.ScratchVolume{}})
	}
	l, err := Resolve(p, j.ID, map[string]*image.Image{j.Container.Image: img})
	if err != nil {
		return nil, err
	}
	w := &wire.Join{Container: l.Containers[0], PID: j.PID, IPC: j.IPC, Run: j.Run}
	names := map[string]string{} // in the pod, which has volumes of the same names
	for _, v := range l.Volumes {
		if at, shared := j.Shared[v.Name]; shared {
			has := slices.IndexFunc(own, func(m spec.Mount) bool { return m.Path == at && !m.Raw })
			if has < 0 {
				return nil, fmt.Errorf("the pod's own container has no volume at %s", at)
			}
			names[v.Name] = own[has].Volume
			continue
		}
		names[v.Name] = derive(j.ID, v.Name)
		v.Name = names[v.Name]
		w.Volumes = append(w.Volumes, v)
	}
	for i := range w.Container.Mounts {
		m := &w.Container.Mounts[i]
		if m.Raw {
			return nil, fmt.Errorf("mount %s: a container that joins gets no device", m.Path)
		}
		m.Volume = names[m.Volume]
	}
	return w, nil
}

// Leave ends a container that has joined, and removes what it has written. One that is not there has left.
func (r *Running) Leave(ctx context.Context, id string) error {
	r.joins.Lock()
	defer r.joins.Unlock()
	all, err := r.dir.joined()
	if err != nil {
		return err
	}
	if all[id] == nil {
		return nil
	}
	ctx, cancel := context.WithTimeoutCause(ctx, guestTimeout, errors.New("the guest does not answer"))
	defer cancel()
	if err := r.call(ctx, http.MethodPost, wire.PathLeave, url.Values{"container": {id}}, nil, nil); err != nil {
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		return err
	}
	return r.remove(all, id)
}

// own keeps of a status what is of the pod's own containers: those that have joined come after them, and are not its.
func (r *Running) own(s *wire.Status) {
	s.Containers = s.Containers[:min(len(s.Containers), len(r.spec.Containers))]
}

// hostCalls are what a connection begins with that is the host's to answer, and not the guest's.
var hostCalls = []string{http.MethodPost + " " + spec.JoinPath, http.MethodPost + " " + spec.LeavePath}

// isHostCall looks at the beginning of a connection.
func isHostCall(in *bufio.Reader) (bool, error) {
	for n := 1; ; n++ { // no byte more than it takes: a client may wait for an answer to what it has sent
		begin, err := in.Peek(n)
		if err != nil {
			return false, err
		}
		if slices.Contains(hostCalls, string(begin)) {
			return true, nil
		}
		if !slices.ContainsFunc(hostCalls, func(c string) bool { return strings.HasPrefix(c, string(begin)) }) {
			return false, nil
		}
	}
}

// What a caller may send, and how long it may take: the process that reads it attends to all pods of the node.
const (
	maxCall     = spec.MaxDocument + 64<<10
	callTimeout = time.Minute
	maxCalls    = 8 // of one pod at a time; others wait
)

// answerCall answers a call on a connection, and no other.
func (r *Running) answerCall(client net.Conn, in *bufio.Reader) {
	select {
	case r.calls <- struct{}{}:
		defer func() { <-r.calls }()
	case <-r.ctx.Done():
		return
	}
	_ = client.SetReadDeadline(time.Now().Add(callTimeout))
	req, err := http.ReadRequest(bufio.NewReader(io.LimitReader(in, maxCall)))
	if err != nil {
		return // it is gone, or no client
	}
	ctx, cancel := context.WithTimeoutCause(r.ctx, spec.JoinTimeout, fmt.Errorf("it was not done within %v", spec.JoinTimeout))
	defer cancel()
	ctx, done := r.whileItRuns(ctx)
	defer done()
	var answer any = struct{}{}
	switch req.URL.Path {
	case spec.JoinPath:
		var data []byte
		if data, err = io.ReadAll(io.LimitReader(req.Body, spec.MaxDocument+1)); err != nil {
			return
		}
		var j *spec.Join
		if j, err = spec.ParseJoin(data); err != nil {
			err = &joinError{http.StatusBadRequest, err.Error()}
		} else {
			answer, err = r.Join(ctx, j)
		}
	case spec.LeavePath:
		err = r.Leave(ctx, req.URL.Query().Get("container"))
	default:
		err = &joinError{http.StatusNotFound, "page not found"}
	}
	status := http.StatusOK
	if err != nil {
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		status = http.StatusInternalServerError
		var own *joinError
		var guest *GuestError
		switch {
		case errors.As(err, &own):
			status = own.status
		case errors.As(err, &guest):
			status = guest.Code
		}
		answer = map[string]string{"message": err.Error()}
	}
	body, err := json.Marshal(answer)
	if err != nil {
		return
	}
	resp := &http.Response{
		StatusCode: status, ProtoMajor: 1, ProtoMinor: 1, Header: http.Header{"Content-Type": {"application/json"}}, ContentLength: int64(len(body)),
		Body: io.NopCloser(bytes.NewReader(body)), Close: true, Request: req,
	}
	_ = client.SetWriteDeadline(time.Now().Add(callTimeout))
	_ = resp.Write(client) // who has gone learns nothing
}
