package server

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/cradlestack/cradlestack/dockerapi/translate"

	"github.com/hashicorp/nomad/api"
	"github.com/moby/moby/api/types/common"
	"github.com/moby/moby/api/types/container"

	"github.com/cradlestack/cradlestack/internal/dockerhttp"
	"github.com/cradlestack/cradlestack/internal/nomadjob"
	"github.com/cradlestack/cradlestack/spec"
)

// Pods of the namespace that docker has not made, but Terraform or a job's file, or that Terraform has taken over, are containers that can be seen and looked into while they run. To change them
// is their makers' business: each of them would put back what docker has changed.

// An other container is one of such a pod.
type other struct {
	ID, Name, Job string
	inside        string // its name in the pod
	task          string
	alloc         *api.AllocationListStub
	pod           *spec.Pod
	settings      *spec.PodContainer
}

// otherPods are the pods of jobs as they were read: a job of a version is always the same.
type otherPods struct {
	mu    sync.Mutex
	known map[string]*spec.Pod // by job and version; nil for what is no pod
}

// others are those whose pods run, the newest first.
func (t *tenant) others(ctx context.Context) ([]*other, error) {
	q := t.query(ctx)
	q.Params = map[string]string{"resources": "true"}
	allocs, _, err := t.nomad.Allocations().List(q)
	if err != nil {
		return nil, err
	}
	var all []*other
	versions := map[string]bool{}
	for _, a := range allocs {
		if strings.HasPrefix(a.JobID, jobPrefix) && !t.watch.taken(a.JobID) || a.ClientStatus != api.AllocClientStatusRunning || a.DesiredStatus != api.AllocDesiredStatusRun || len(a.TaskStates) != 1 {
			continue
		}
		p, err := t.podOf(ctx, a)
		if err != nil {
			return nil, err
		}
		versions[versionOf(a)] = true
		if p == nil {
			continue
		}
		for i := range p.Containers {
			c := &p.Containers[i]
			o := &other{ID: hash(a.ID + "/" + c.Name), Name: a.JobID, Job: a.JobID, inside: c.Name, task: p.Containers[0].Name, alloc: a, pod: p, settings: c}
			if _, index, ok := strings.Cut(a.Name, "["); ok && index != "0]" { // the first of several equal pods goes by the job's name alone
				o.Name += "-" + strings.TrimSuffix(index, "]")
			}
			if i > 0 {
				o.Name += "-" + c.Name
			}
			all = append(all, o)
		}
	}
	t.otherPods.forget(versions)
	slices.SortStableFunc(all, func(a, b *other) int { return cmp.Compare(b.alloc.CreateTime, a.alloc.CreateTime) })
	return all, nil
}

func versionOf(a *api.AllocationListStub) string { return fmt.Sprintf("%s@%d", a.JobID, a.JobVersion) }

// podOf reads an allocation's job, nil where that is no pod.
func (t *tenant) podOf(ctx context.Context, a *api.AllocationListStub) (*spec.Pod, error) {
	t.otherPods.mu.Lock()
	p, ok := t.otherPods.known[versionOf(a)]
	t.otherPods.mu.Unlock()
	if ok {
		return p, nil
	}
	whole, _, err := t.nomad.Allocations().Info(a.ID, t.query(ctx))
	if err != nil {
		if isStatus(err, http.StatusNotFound) {
			return nil, nil // it has gone meanwhile
		}
		return nil, err
	}
	if p, _, err = nomadjob.Pod(whole.Job, nil); err != nil {
		p = nil
	}
	t.otherPods.mu.Lock()
	defer t.otherPods.mu.Unlock()
	if t.otherPods.known == nil {
		t.otherPods.known = map[string]*spec.Pod{}
	}
	t.otherPods.known[versionOf(a)] = p
	return p, nil
}

// forget drops what nobody runs any more.
func (o *otherPods) forget(there map[string]bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	for version := range o.known {
		if !there[version] {
			delete(o.known, version)
		}
	}
}

// other finds one by its name, its id, or the beginning of that.
func (t *tenant) other(ctx context.Context, ref string) (*other, error) {
	all, err := t.others(ctx)
	if err != nil {
		return nil, err
	}
	ref = strings.TrimPrefix(ref, "/")
	if i := slices.IndexFunc(all, func(o *other) bool { return o.ID == ref || o.Name == ref }); i >= 0 {
		return all[i], nil
	}
	all = slices.DeleteFunc(all, func(o *other) bool { return !strings.HasPrefix(o.ID, ref) })
	switch len(all) {
	case 0:
		return nil, noContainer(ref)
	case 1:
		return all[0], nil
	}
	return nil, dockerhttp.Invalid("Multiple IDs found with provided prefix: %s", ref)
}

// A named container is docker's own, or another one.
type named struct {
	*record
	other *other
}

// findAny is find for any container.
func (t *tenant) findAny(ctx context.Context, ref string) (named, error) {
	r, err := t.find(ctx, ref)
	if !isNotFound(err) {
		return named{record: r}, err
	}
	o, otherErr := t.other(ctx, ref)
	if isNotFound(otherErr) {
		return named{}, err
	}
	return named{other: o}, otherErr
}

// within is the path of something of the container in its pod.
func (o *other) within(rest string) string { return "/containers/" + o.inside + rest }

func (t *tenant) podOfOther(o *other) *pod { return &pod{t, o.alloc.ID, o.task, translate.Own} }

// serveOther answers a request about another container, of which pattern is the route: its pod does, where nothing is changed.
func (t *tenant) serveOther(w http.ResponseWriter, r *http.Request, o *other, pattern string) error {
	method, path, _ := strings.Cut(pattern, " ")
	rest := strings.TrimPrefix(path, "/containers/{id}")
	p := t.podOfOther(o)
	switch {
	case pattern == "GET /containers/{id}/json":
		var c map[string]any
		if err := p.call(r.Context(), http.MethodGet, o.within("/json"), r.URL.Query(), nil, &c); err != nil {
			return err
		}
		c["Id"], c["Name"] = o.ID, "/"+o.Name
		return dockerhttp.Answer(w, http.StatusOK, c)
	case pattern == "POST /containers/{id}/exec":
		var request json.RawMessage
		if err := dockerhttp.Decode(w, r, &request); err != nil {
			return err
		}
		var made common.IDResponse
		if err := p.call(r.Context(), http.MethodPost, o.within("/exec"), nil, request, &made); err != nil {
			return err
		}
		made.ID = o.ID + made.ID
		return dockerhttp.Answer(w, http.StatusCreated, made)
	case method == http.MethodGet, method == http.MethodHead:
		return p.pass(w, r, o.within(rest))
	}
	return dockerhttp.Errorf(http.StatusConflict, "container %s is of Nomad's job %s, which docker has not made: change it where it is written (terraform apply, nomad job run), or end it with nomad job stop %[2]s", o.Name, o.Job)
}

// otherFilters are those that others are looked at by; with another one, or what names a place among docker's own, none is listed.
var otherFilters = []string{"ancestor", "health", "id", "label", "name", "status"}

// listOthers are those that the filters let through, with those that have ended in a pod that goes on where that is asked for.
func (t *tenant) listOthers(ctx context.Context, f dockerhttp.Filters, ended bool) ([]container.Summary, error) {
	for name := range f {
		if !slices.Contains(otherFilters, name) {
			return nil, nil
		}
	}
	all, err := t.others(ctx)
	if err != nil {
		return nil, err
	}
	made := make([]*container.Summary, len(all))
	var work sync.WaitGroup
	slots := make(chan struct{}, asked)
	asking := map[string]func() []container.Summary{} // by allocation: a pod is asked once for all of its containers
	for i, o := range all {
		if !f.Any("id", func(v string) bool { return strings.HasPrefix(o.ID, v) }) || !f.Labels("label", o.settings.Labels, false) ||
			!f.Any("name", func(v string) bool { return dockerhttp.Matches(v, "/"+o.Name) || dockerhttp.Matches(v, o.Name) }) ||
			!f.Any("ancestor", func(v string) bool { return v == o.settings.Image }) {
			continue
		}
		ask := asking[o.alloc.ID]
		if ask == nil {
			ask = sync.OnceValue(func() []container.Summary { return t.inside(ctx, o) })
			asking[o.alloc.ID] = ask
		}
		work.Go(func() {
			slots <- struct{}{}
			defer func() { <-slots }()
			made[i] = o.summary(ask())
		})
	}
	work.Wait()
	var out []container.Summary
	for _, s := range made {
		if s == nil || !ended && s.State == container.StateExited || !f.Any("status", func(v string) bool { return v == string(s.State) }) ||
			!f.Any("health", func(v string) bool { return s.Health != nil && v == string(s.Health.Status) }) {
			continue
		}
		out = append(out, *s)
	}
	return out, nil
}

// inside are the containers of one's pod as that tells of them, none where it does not answer.
func (t *tenant) inside(ctx context.Context, o *other) (all []container.Summary) {
	ctx, cancel := context.WithTimeout(ctx, podWait)
	defer cancel()
	if err := t.podOfOther(o).call(ctx, http.MethodGet, "/containers/json", map[string][]string{"all": {"1"}}, nil, &all); err != nil {
		return nil
	}
	return all
}

// summary is what a list shows of one: what its pod tells, or Nomad where that does not answer.
func (o *other) summary(inside []container.Summary) *container.Summary {
	s := &container.Summary{
		Created: time.Unix(0, o.alloc.CreateTime).Unix(), Labels: union(o.settings.Labels), State: container.StateRunning, Status: "Up", Mounts: []container.MountPoint{},
		NetworkSettings: &container.NetworkSettingsSummary{},
	}
	if i := slices.IndexFunc(inside, func(c container.Summary) bool { return slices.Contains(c.Names, "/"+o.inside) }); i >= 0 {
		one := inside[i] // its names and ports are another's there
		s = &one
	}
	s.ID, s.Names, s.Image, s.Ports = o.ID, []string{"/" + o.Name}, o.settings.Image, []container.PortSummary{}
	if o.inside == o.task && o.alloc.AllocatedResources != nil { // ports are the pod's: they are told once
		for _, published := range nomadjob.Published(o.pod, o.alloc.AllocatedResources.Shared.Ports) {
			p := portOf(published)
			s.Ports = append(s.Ports, container.PortSummary{IP: hostIP(published), PrivatePort: p.Num(), PublicPort: published.HostPort, Type: string(p.Proto())})
		}
	}
	return s
}
