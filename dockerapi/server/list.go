package server

import (
	"cmp"
	"context"
	"maps"
	"net/http"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/network"

	"github.com/cradlestack/cradlestack/dockerapi/translate"
	"github.com/cradlestack/cradlestack/internal/dockerhttp"
	"github.com/cradlestack/cradlestack/internal/nomadjob"
	"github.com/cradlestack/cradlestack/spec"
)

// statusOf is a container's state as far as the record and Nomad tell; only its pod knows more.
func (t *tenant) statusOf(r *record) container.State {
	s := container.State{Status: container.StateCreated, StartedAt: noTime, FinishedAt: noTime}
	last := r.Last
	switch {
	case r.Want == wantRemoved:
		s.Status = container.StateRemoving
	case r.Run == 0:
		return s
	case r.restarting() && t.watch.state(r).phase <= phasePending, r.restarting() && r.ended():
		s.Status, s.Running, s.Restarting = container.StateRestarting, true, true
	case r.ended():
	default:
		switch p := t.watch.state(r); p.phase {
		case phaseRunning:
			s.Status, s.Running, s.Pid = container.StateRunning, true, 1
			if h := r.Config.Healthcheck; h != nil && len(h.Test) > 0 && h.Test[0] != "NONE" {
				s.Health = &container.Health{Status: container.Starting, Log: []*container.HealthcheckResult{}} // until its pod tells
			}
			if p.task != nil {
				s.StartedAt = stamp(p.task.StartedAt)
			}
			return s
		case phaseAway:
			s.Status, s.Dead, s.Error = container.StateDead, true, "its node does not answer"
			if p.task != nil {
				s.StartedAt = stamp(p.task.StartedAt)
			}
			return s
		case phasePending, phaseNone:
			if r.Run == 1 {
				return s
			}
		case phaseEnded:
			last = endOf(r.Run, p)
		}
	}
	if last.Number > 0 {
		s.ExitCode, s.OOMKilled, s.Error = last.ExitCode, last.OOMKilled, last.Error
		s.StartedAt, s.FinishedAt = stamp(last.StartedAt), stamp(last.FinishedAt)
		if s.Status == container.StateCreated && r.Want != wantCreated {
			s.Status = container.StateExited
		}
		if last.StartedAt.IsZero() {
			s.FinishedAt = noTime
		}
	}
	return s
}

// noTime is how docker writes that something has not happened.
const noTime = "0001-01-01T00:00:00Z"

func stamp(at time.Time) string {
	if at.IsZero() {
		return noTime
	}
	return at.UTC().Format(time.RFC3339Nano)
}

// A seen container is one with what its pod tells, if it was asked.
type seen struct {
	*record
	state  container.State
	inside *container.InspectResponse
}

// ask completes a running container's state with what its pod tells within a time.
func (t *tenant) ask(ctx context.Context, r *record, wait time.Duration) *seen {
	s := &seen{record: r, state: t.statusOf(r)}
	if !s.state.Running {
		return s
	}
	p, err := t.running(r)
	if err != nil {
		return s
	}
	ctx, cancel := context.WithTimeout(ctx, wait)
	defer cancel()
	if r.Joins != "" {
		t.followEnd(ctx, r) // who has started it may be gone
	}
	var c container.InspectResponse
	if err := p.call(ctx, http.MethodGet, p.inside("/json"), nil, nil, &c); err != nil || c.State == nil {
		ctx, cancel := context.WithTimeout(ctx, endWait)
		defer cancel()
		if err != nil && t.hasEnded(ctx, r, err) { // a moment ago: how, its record or Nomad says
			if now, err := t.get(ctx, r.ID); err == nil {
				s.record, s.state = now, t.statusOf(now)
			}
		}
		return s
	}
	s.inside, s.state = &c, *c.State
	if s.state.Status == container.StateCreated { // it is held, or about to start
		s.state = container.State{Status: container.StateCreated, StartedAt: noTime, FinishedAt: noTime}
	}
	return s
}

// endWait is how long a pod that does not answer is taken for one that has just ended, which Nomad is about to tell.
const endWait = 5 * time.Second

// tells says whether only a container's pod knows its state: it may be paused, restarting, or have a health.
func (r *record) tells() bool {
	return r.Joins != "" || !r.Host.RestartPolicy.IsNone() || r.Config.Healthcheck != nil && len(r.Config.Healthcheck.Test) > 0
}

// asked is how many pods are asked at once.
const asked = 32

func (t *tenant) askAll(ctx context.Context, all []*record, every bool) []*seen {
	out := make([]*seen, len(all))
	var work sync.WaitGroup
	slots := make(chan struct{}, asked)
	for i, r := range all {
		if !every && !r.tells() {
			out[i] = &seen{record: r, state: t.statusOf(r)}
			continue
		}
		work.Go(func() {
			slots <- struct{}{}
			defer func() { <-slots }()
			out[i] = t.ask(ctx, r, podWait)
		})
	}
	work.Wait()
	return out
}

var containerFilters = []string{"ancestor", "before", "exited", "expose", "health", "id", "is-task", "isolation", "label", "name", "network", "publish", "since", "status", "volume"}

func (s *Server) listContainers(w http.ResponseWriter, r *http.Request, t *tenant) error {
	f, err := dockerhttp.ParseFilters(r, containerFilters...)
	if err != nil {
		return err
	}
	for _, status := range f["status"] {
		if err := container.ValidateContainerState(container.ContainerState(status)); err != nil {
			return dockerhttp.Invalid("%v", err)
		}
	}
	for _, code := range f["exited"] {
		if _, err := strconv.Atoi(code); err != nil {
			return dockerhttp.Invalid("invalid filter 'exited=%s'", code)
		}
	}
	limit := 0
	if text := dockerhttp.Parameter(r, "limit"); text != "" {
		if limit, err = strconv.Atoi(text); err != nil {
			return dockerhttp.Invalid("limit: %q is no number", text)
		}
	}
	ctx := r.Context()
	if err := t.watch.ready(ctx); err != nil {
		return err
	}
	records, err := t.list(ctx)
	if err != nil {
		return err
	}
	bounds, err := between(records, f)
	if err != nil {
		return err
	}
	descends, err := s.ancestors(ctx, t, f["ancestor"])
	if err != nil {
		return err
	}
	shown := s.imageShown(t)
	all := dockerhttp.Truth(r, "all") || limit > 0 || len(f["status"]) > 0 || len(f["exited"]) > 0
	out := []container.Summary{}
	for _, c := range t.askAll(ctx, bounds, len(f["status"]) > 0) {
		if !all && !c.state.Running || !descends(c.record) || !t.listed(f, c) {
			continue
		}
		one := t.summary(c)
		one.Image = shown(ctx, c.record)
		if versions.Version(r) < 46 { // moby api/docs/CHANGELOG.md, v1.46
			one.HostConfig.Annotations = nil
		}
		out = append(out, one)
		if limit > 0 && len(out) == limit {
			break
		}
	}
	if limit == 0 {
		others, err := t.listOthers(ctx, f, all)
		if err != nil {
			return err
		}
		out = append(out, others...)
	}
	return dockerhttp.Answer(w, http.StatusOK, out)
}

// between applies the filters before and since, which name containers.
func between(all []*record, f dockerhttp.Filters) ([]*record, error) {
	place := func(ref string) (*record, error) {
		for _, r := range all {
			if r.Name == strings.TrimPrefix(ref, "/") || strings.HasPrefix(r.ID, ref) {
				return r, nil
			}
		}
		return nil, noContainer(ref)
	}
	for _, ref := range f["before"] {
		c, err := place(ref)
		if err != nil {
			return nil, err
		}
		all = slices.DeleteFunc(slices.Clone(all), func(r *record) bool { return !r.Created.Before(c.Created) })
	}
	for _, ref := range f["since"] {
		c, err := place(ref)
		if err != nil {
			return nil, err
		}
		all = slices.DeleteFunc(slices.Clone(all), func(r *record) bool { return !r.Created.After(c.Created) })
	}
	return all, nil
}

// listed tells whether the filters let a container through.
func (t *tenant) listed(f dockerhttp.Filters, c *seen) bool {
	ports := func(name string, has func(network.Port) bool) bool {
		return f.Any(name, func(v string) bool {
			p, err := network.ParsePort(v)
			return err == nil && has(p)
		})
	}
	return f.Any("id", func(v string) bool { return strings.HasPrefix(c.ID, v) }) &&
		f.Any("name", func(v string) bool { return dockerhttp.Matches(v, "/"+c.Name) || dockerhttp.Matches(v, c.Name) }) &&
		f.Any("status", func(v string) bool { return v == string(c.state.Status) }) &&
		f.Any("exited", func(v string) bool {
			return c.state.Status == container.StateExited && v == strconv.Itoa(c.state.ExitCode)
		}) &&
		f.Any("health", func(v string) bool { return v == string(healthOf(&c.state)) }) &&
		f.Labels("label", c.Config.Labels, false) &&
		f.Any("network", func(v string) bool { return c.Networks[v] != nil || slices.Contains(t.networkIDs(c.record), v) }) &&
		f.Any("volume", func(v string) bool {
			return slices.ContainsFunc(mountPoints(c.record), func(m container.MountPoint) bool { return m.Name == v || m.Destination == v })
		}) &&
		ports("expose", func(p network.Port) bool { _, ok := c.Config.ExposedPorts[p]; return ok }) &&
		ports("publish", func(p network.Port) bool { _, ok := c.Host.PortBindings[p]; return ok }) &&
		f.Any("is-task", func(v string) bool { return v == "false" || v == "0" })
}

func healthOf(s *container.State) container.HealthStatus {
	if s.Health == nil {
		return container.NoHealthcheck
	}
	return s.Health.Status
}

// networks are the names of those that the container is on.
func (r *record) networks() []string { return slices.Sorted(maps.Keys(r.Networks)) }

func (t *tenant) summary(c *seen) container.Summary {
	out := container.Summary{
		ID: c.ID, Names: []string{"/" + c.Name}, Image: c.Config.Image, ImageID: c.Image.ID, Command: command(c.Config), Created: c.Created.Unix(),
		Ports: t.portSummaries(c), Labels: union(c.Config.Labels), State: c.state.Status, Status: translate.StatusText(&c.state, time.Now()), Mounts: mountPoints(c.record),
		NetworkSettings: &container.NetworkSettingsSummary{Networks: t.endpoints(c)},
	}
	out.HostConfig.NetworkMode, out.HostConfig.Annotations = string(c.Host.NetworkMode), c.Host.Annotations
	if h := c.state.Health; h != nil {
		out.Health = &container.HealthSummary{Status: h.Status, FailingStreak: h.FailingStreak}
	}
	return out
}

func union(m map[string]string) map[string]string {
	if m == nil {
		return map[string]string{}
	}
	return m
}

// command is the line that docker ps shows.
func command(c *container.Config) string {
	var words []string
	for _, w := range slices.Concat(c.Entrypoint, c.Cmd) {
		if strings.ContainsAny(w, " '\"\\") {
			w = "'" + strings.ReplaceAll(w, "'", "\\'") + "'"
		}
		words = append(words, w)
	}
	return strings.Join(words, " ")
}

// published are the container's ports on its node, with those that Nomad has chosen.
func (t *tenant) published(c *record) []spec.Publish {
	s := t.watch.state(c)
	if c.ended() || s.phase != phaseRunning || s.alloc.AllocatedResources == nil {
		return nil
	}
	return nomadjob.Published(c.Pod, s.alloc.AllocatedResources.Shared.Ports)
}

// portOf is the port inside of the container, and hostIP the node's address at which it is published.
func portOf(p spec.Publish) network.Port {
	port, _ := network.PortFrom(p.Port, network.IPProtocol(or(p.Protocol, "tcp"))) // validated
	return port
}

func hostIP(p spec.Publish) netip.Addr {
	ip, err := netip.ParseAddr(p.HostIP)
	if err != nil {
		return netip.IPv4Unspecified()
	}
	return ip
}

func (t *tenant) portSummaries(c *seen) []container.PortSummary {
	out := []container.PortSummary{}
	known := map[network.Port]bool{}
	for _, published := range t.published(c.record) {
		p := portOf(published)
		known[p] = true
		out = append(out, container.PortSummary{IP: hostIP(published), PrivatePort: p.Num(), PublicPort: published.HostPort, Type: string(p.Proto())})
	}
	if c.state.Running && c.Joins == "" {
		for p := range c.Config.ExposedPorts {
			if !known[p] {
				out = append(out, container.PortSummary{PrivatePort: p.Num(), Type: string(p.Proto())})
			}
		}
	}
	slices.SortFunc(out, func(a, b container.PortSummary) int {
		return cmp.Or(cmp.Compare(a.PrivatePort, b.PrivatePort), cmp.Compare(a.Type, b.Type), cmp.Compare(a.PublicPort, b.PublicPort))
	})
	return out
}
