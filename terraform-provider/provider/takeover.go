package provider

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/hashicorp/nomad/api"

	"github.com/cradlestack/cradlestack/internal/nomadjob"
	"github.com/cradlestack/cradlestack/spec"
)

// A container that docker has made is taken over by the first apply after its import: docker's record of it goes, then its name, and then the job says by its
// name that it is docker's no more. The record is removed by check-and-set, so of docker and Terraform one is told that the other one was quicker. Until the last
// of the three is done, beyond tells of docker, and the next apply goes on.

// beyondDocker stands in beyond as long as a job is docker's.
const beyondDocker = "docker"

// A dockerRecord is what is read of the record that docker keeps of a container (dockerapi/server/records.go).
type dockerRecord struct {
	Version int
	ID      string
	Name    string
	Host    struct{ AutoRemove bool } `json:"hostConfig"`
	Want    string
	Run     int
	Try     int
	Last    struct{ Number int }
	Joins   string

	index uint64
}

// dockerRecordVersion is the one that is understood.
const dockerRecordVersion = 1

// container is the id of the container that docker has made a job for, whose it still may be.
func (f *foundPod) container() (id string, ok bool) {
	return nomadjob.DockerContainer(f.job)
}

// isDocker says whether a job is a container's that is not taken over yet.
func (f *foundPod) isDocker() bool {
	_, ok := f.container()
	return ok && !nomadjob.TakenOver(f.job)
}

// dockerRecord reads one, nil where there is none.
func (c *cluster) dockerRecord(ctx context.Context, namespace, id string) (*dockerRecord, error) {
	v, _, err := c.nomad.Variables().Read(nomadjob.DockerRecords+id, c.query(ctx, namespace))
	if errors.Is(err, api.ErrVariablePathNotFound) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("docker's record of it: %w", err)
	}
	r := &dockerRecord{index: v.ModifyIndex}
	if err := json.Unmarshal([]byte(v.Items["record"]), r); err != nil || r.Version != dockerRecordVersion || r.ID != id {
		return nil, fmt.Errorf("variable %s is no record that this version reads (version %d)", v.Path, r.Version)
	}
	return r, nil
}

// mayTake says why a container can't be taken over as it is; r is its record, nil where that has gone already.
func (c *cluster) mayTake(ctx context.Context, f *foundPod, r *dockerRecord) error {
	if len(f.options.Networks) > 0 {
		return errors.New("it is on networks, where others know it by docker's name for it: docker network disconnect it first, or write it as a cradle_pod, docker rm -f it, and apply")
	}
	if r == nil {
		return nil
	}
	meta := nomadjob.Meta(f.job)
	run, _ := strconv.Atoi(meta["run"]) // docker's
	try, _ := strconv.Atoi(meta["try"])
	switch {
	case r.Want == "removed":
		return errors.New("docker is about to remove it")
	case r.Joins != "":
		return errors.New("it is in the machine of another container (--network container:), and no pod of its own: write both as containers of one cradle_pod")
	case r.Host.AutoRemove:
		return errors.New("it is removed when it ends (--rm), which no pod of Terraform's is: run it without --rm, or write it as a cradle_pod")
	case r.Want != "running" || r.Last.Number == r.Run || deref(f.job.Stop):
		return fmt.Errorf("it does not run: docker start %s first", r.Name)
	case r.Run != run || r.Try != try:
		return errors.New("docker is just starting it: try again when it runs")
	}
	all, _, err := c.nomad.Variables().PrefixList(nomadjob.DockerRecords, c.query(ctx, f.options.Namespace))
	if err != nil {
		return fmt.Errorf("docker's records: %w", err)
	}
	for _, v := range all {
		other := strings.TrimPrefix(v.Path, nomadjob.DockerRecords)
		o, err := c.dockerRecord(ctx, f.options.Namespace, other)
		if err != nil {
			return err
		}
		if o != nil && o.Joins == r.ID {
			return fmt.Errorf("container %s has joined it (--network container:), and would lose what it knows its machine by: docker rm -f %[1]s first", o.Name)
		}
	}
	return nil
}

// take removes what docker knows of a container; its job stays as it is.
func (c *cluster) take(ctx context.Context, f *foundPod) error {
	id, _ := f.container()
	namespace := f.options.Namespace
	r, err := c.dockerRecord(ctx, namespace, id)
	if err == nil {
		err = c.mayTake(ctx, f, r)
	}
	if err != nil {
		return err
	}
	vars := c.nomad.Variables()
	if r != nil {
		if _, err := vars.CheckedDelete(nomadjob.DockerRecords+id, r.index, c.write(ctx, namespace)); isConflict(err) {
			return errors.New("docker has changed it at the same time: plan again")
		} else if err != nil {
			return fmt.Errorf("docker's record of it: %w", err)
		}
	}
	name := nomadjob.DockerNamePath(deref(f.job.Name))
	v, _, err := vars.Read(name, c.query(ctx, namespace))
	if errors.Is(err, api.ErrVariablePathNotFound) || err == nil && v.Items["id"] != id {
		return nil
	}
	if err == nil {
		if _, err = vars.CheckedDelete(name, v.ModifyIndex, c.write(ctx, namespace)); isConflict(err) { // somebody else's by now
			err = nil
		}
	}
	if err != nil {
		return fmt.Errorf("its name among docker's: %w", err)
	}
	return nil
}

// goOn lets a container that is taken over run on where nothing but whose it is changes: the time for which docker's pods wait for their clients, the size of /dev/shm
// that is any container's, and the order in which docker has written the environment, are no reason to start it anew.
func (w *wish) goOn(f *foundPod) {
	if _, ok := f.container(); !ok || len(w.pod.Containers) != len(f.pod.Containers) {
		return
	}
	if w.pod.Resources.CPUs == 1 && f.pod.Resources.CPUs == 0 { // which is one
		w.pod.Resources.CPUs = 0
	}
	for i := range w.pod.Containers {
		want, is := w.pod.Containers[i].Env, f.pod.Containers[i].Env
		if slices.Equal(slices.Sorted(slices.Values(want)), slices.Sorted(slices.Values(is))) {
			w.pod.Containers[i].Env = is
		}
		if w.pod.Containers[i].ShmSize == 0 && f.pod.Containers[i].ShmSize == spec.DefaultShmSize { // which docker says, and a job need not
			w.pod.Containers[i].ShmSize = spec.DefaultShmSize
		}
	}
	w.items, _ = nomadjob.EnvItems(w.pod, w.options.Networks) // it was marshalled before
	same := *w
	pod := *w.pod
	same.pod, pod.Containers = &pod, slices.Clone(pod.Containers)
	pod.Name, pod.Containers[0].Lifecycle.Hold = f.pod.Name, f.pod.Containers[0].Lifecycle.Hold
	if same.is(f) {
		w.pod.Containers[0].Lifecycle.Hold = pod.Containers[0].Lifecycle.Hold
	}
}

// dockerJob is the job of docker's container of a name, "" where there is none.
func (c *cluster) dockerJob(ctx context.Context, namespace, name string) (string, error) {
	v, _, err := c.nomad.Variables().Read(nomadjob.DockerNamePath(name), c.query(ctx, namespace))
	if errors.Is(err, api.ErrVariablePathNotFound) || isStatus(err, http.StatusForbidden) { // who may not know is told that there is no such job
		return "", nil
	}
	if err != nil {
		return "", err
	}
	return nomadjob.DockerPrefix + v.Items["id"], nil
}

// removeDisk removes the disk of a container that was docker's, which its nodes keep when it has ended, and waits for that.
func (c *cluster) removeDisk(ctx context.Context, namespace, name string, job *api.Job) error {
	id, ok := nomadjob.DockerContainer(job)
	if !ok {
		return nil
	}
	allocs, _, err := c.nomad.Jobs().Allocations(name, true, c.query(ctx, namespace))
	if err != nil {
		return err
	}
	nodes := map[string]bool{}
	for _, a := range allocs {
		if nodes[a.NodeID] {
			continue
		}
		nodes[a.NodeID] = true
		remover := nomadjob.DockerPrefix + "rm-" + id + "-" + a.NodeID // docker's, which forgets it as well when it has ended
		if _, _, err := c.nomad.Jobs().Register(nomadjob.RemoveDisk(remover, namespace, a.NodeID, id), c.write(ctx, namespace)); err != nil {
			return fmt.Errorf("its disk: %w", err)
		}
		if err := c.done(ctx, namespace, remover); err != nil {
			return fmt.Errorf("its disk on node %s: %w", a.NodeID, err)
		}
	}
	return nil
}

// removalWait is how long it is waited for a node to remove a disk: one that does not answer does so when it is back.
const removalWait = 30 * time.Second

// done waits until a job that runs once has ended, and has Nomad forget it.
func (c *cluster) done(ctx context.Context, namespace, name string) error {
	wait, cancel := context.WithTimeout(ctx, removalWait)
	defer cancel()
	q := c.query(wait, namespace)
	for {
		job, meta, err := c.nomad.Jobs().Info(name, q)
		if isNotFound(err) || err != nil && wait.Err() != nil && ctx.Err() == nil {
			return nil
		}
		if err != nil {
			return err
		}
		if deref(job.Status) == "dead" {
			all, _, err := c.nomad.Jobs().Allocations(name, true, c.query(ctx, namespace))
			if err == nil && slices.ContainsFunc(all, func(a *api.AllocationListStub) bool { return a.ClientStatus == api.AllocClientStatusFailed }) {
				return fmt.Errorf("it could not be removed: nomad job status %s tells why", name)
			}
			_, _, err = c.nomad.Jobs().Deregister(name, true, c.write(ctx, namespace))
			if isNotFound(err) || err != nil && strings.Contains(err.Error(), "job not found") { // docker's server has been quicker
				err = nil
			}
			return err
		}
		q.WaitIndex = meta.LastIndex
	}
}

// isDockerName says whether a name is that of the job of one of docker's containers, which is longer than others may be.
func isDockerName(s string) bool {
	id, ok := strings.CutPrefix(s, nomadjob.DockerPrefix)
	return ok && len(id) == 64 && strings.Trim(id, "0123456789abcdef") == ""
}
