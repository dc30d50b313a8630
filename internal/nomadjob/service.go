package nomadjob

import (
	"fmt"
	"slices"
	"strconv"
	"time"

	"github.com/hashicorp/nomad/api"
)

// A Service is how Nomad keeps a pod running.
type Service struct {
	Count     int // of equal pods
	Restart   Restart
	Update    Update
	Endpoints []Endpoint
}

// Restart says how a pod is started again on its node.
type Restart struct {
	Attempts        int // within Interval
	Interval, Delay time.Duration
	// Wait goes on after Interval with what has used up its attempts. Without it that pod has failed, and another one is started wherever there is room.
	Wait bool
}

// Update says how new pods take the place of former ones.
type Update struct {
	MaxParallel int // at a time; 0: all at once, and nobody looks how they fare
	// MinHealthy is how long a pod has to be well, Deadline how long it may take until then.
	MinHealthy, Deadline time.Duration
	// Revert goes back to the last job that was well where this one is not.
	Revert bool
}

// The defaults, which are Nomad's.
var (
	DefaultRestart = Restart{Attempts: 2, Interval: 30 * time.Minute, Delay: 15 * time.Second}
	DefaultUpdate  = Update{MaxParallel: 1, MinHealthy: 10 * time.Second, Deadline: 5 * time.Minute}
)

// An Endpoint is a port of the pod that others find by a name.
type Endpoint struct {
	Name     string // of the service
	Port     uint16 // of the pod: it is published, or the pod is in the bridge network
	Provider string // nomad, consul
	Tags     []string
	Check    *Check // nil: it is well while the pod runs
}

// A Check is how somebody finds out whether an endpoint is well.
type Check struct {
	Type              string // tcp, http
	Path              string // of http
	Interval, Timeout time.Duration
}

// A Constraint is what a node has to be, as Nomad has it.
type Constraint struct {
	Attribute, Operator, Value string
}

const (
	rescheduleDelay    = 5 * time.Second
	rescheduleMaxDelay = time.Minute
	exponential        = "exponential"
	failMode           = "fail"
	delayMode          = "delay"
	byChecks           = "checks"
	byStates           = "task_states"
)

// service makes a group one that Nomad keeps running.
func (b *builder) service(g *api.TaskGroup) {
	s := b.options.Service
	mode := failMode
	if s.Restart.Wait {
		mode = delayMode
	}
	g.Count = ptr(s.Count)
	g.RestartPolicy = &api.RestartPolicy{Attempts: ptr(s.Restart.Attempts), Interval: ptr(s.Restart.Interval), Delay: ptr(s.Restart.Delay), Mode: ptr(mode), RenderTemplates: ptr(false)}
	g.ReschedulePolicy = &api.ReschedulePolicy{
		Attempts: ptr(0), Interval: ptr(time.Duration(0)), Delay: ptr(rescheduleDelay), DelayFunction: ptr(exponential), MaxDelay: ptr(rescheduleMaxDelay), Unlimited: ptr(true),
	}
	health := byStates
	for i, e := range s.Endpoints {
		made := &api.Service{Name: e.Name, Provider: e.Provider, Tags: e.Tags, AddressMode: "auto"}
		ports := nodePorts(b.pod.Network.Publish)
		at := slices.IndexFunc(ports, func(p nodePort) bool { return p.Port == e.Port })
		switch {
		case at >= 0:
			made.PortLabel = ports[at].label
		case b.options.Bridge:
			made.PortLabel, made.AddressMode = strconv.Itoa(int(e.Port)), "alloc"
		default:
			b.wrong(fmt.Sprintf("endpoints[%d].port", i), "port %d is reached by nobody: publish it, or put the pod into the bridge network", e.Port)
		}
		if c := e.Check; c != nil {
			health = byChecks
			made.Checks = []api.ServiceCheck{{Type: c.Type, Path: c.Path, Interval: c.Interval, Timeout: c.Timeout}}
		}
		g.Services = append(g.Services, made)
	}
	// Without a deadline for all of it, one pod that is not well fails the deployment at once.
	g.Update = &api.UpdateStrategy{
		MaxParallel: ptr(s.Update.MaxParallel), HealthCheck: ptr(health), MinHealthyTime: ptr(s.Update.MinHealthy), HealthyDeadline: ptr(s.Update.Deadline),
		ProgressDeadline: ptr(time.Duration(0)), Canary: ptr(0), AutoRevert: ptr(s.Update.Revert), AutoPromote: ptr(false),
	}
}

func (r *reader) service() {
	g := r.group
	s := &Service{Count: deref(g.Count)}
	if p := g.RestartPolicy; p != nil {
		s.Restart = Restart{Attempts: deref(p.Attempts), Interval: deref(p.Interval), Delay: deref(p.Delay), Wait: deref(p.Mode) == delayMode}
	}
	if u := g.Update; u != nil {
		s.Update = Update{MaxParallel: deref(u.MaxParallel), MinHealthy: deref(u.MinHealthyTime), Deadline: deref(u.HealthyDeadline), Revert: deref(u.AutoRevert)}
	}
	var ports []api.Port
	for _, n := range g.Networks {
		ports = slices.Concat(n.ReservedPorts, n.DynamicPorts)
	}
	for _, from := range g.Services {
		if from.PortLabel == "" {
			continue // a network's
		}
		e := Endpoint{Name: from.Name, Provider: from.Provider, Tags: from.Tags}
		if at := slices.IndexFunc(ports, func(p api.Port) bool { return p.Label == from.PortLabel }); at >= 0 {
			e.Port = uint16(ports[at].To)
		} else if n, err := strconv.ParseUint(from.PortLabel, 10, 16); err == nil {
			e.Port = uint16(n)
		} else {
			r.errs = append(r.errs, fmt.Errorf("service %s: there is no port %q", from.Name, from.PortLabel))
		}
		for _, c := range from.Checks {
			e.Check = &Check{Type: c.Type, Path: c.Path, Interval: c.Interval, Timeout: c.Timeout}
		}
		s.Endpoints = append(s.Endpoints, e)
	}
	r.options.Service = s
}
