package guest

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/cradlestack/cradlestack/driver-cradle/guest/stdio"
	"github.com/cradlestack/cradlestack/spec"
)

// watchHealth probes a container that has a healthcheck until the returned function is called. Without one nothing runs.
func (c *Container) watchHealth() (stop func()) {
	h := c.spec.Healthcheck
	crew := c.pod.crew
	args, ok := probeCommand(h)
	crew.mu.Lock()
	c.health = nil
	if ok {
		c.health = &Health{Status: HealthStarting}
	}
	crew.mu.Unlock()
	if !ok {
		return func() {}
	}
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() { c.probeForEver(ctx, newHealthRules(h), args) })
	return func() {
		cancel()
		wg.Wait()
	}
}

// probeCommand is what a healthcheck runs.
func probeCommand(h *spec.Healthcheck) (args []string, ok bool) {
	if h == nil || len(h.Test) == 0 {
		return nil, false
	}
	switch h.Test[0] {
	case "CMD":
		return h.Test[1:], len(h.Test) > 1
	case "CMD-SHELL":
		return append([]string{"/bin/sh", "-c"}, h.Test[1:]...), len(h.Test) > 1
	}
	return nil, false
}

func (c *Container) probeForEver(ctx context.Context, rules healthRules, args []string) {
	start := time.Now()
	for {
		crew := c.pod.crew
		crew.mu.Lock()
		status := c.health.Status
		crew.mu.Unlock()
		select {
		case <-time.After(rules.wait(status, time.Since(start))):
		case <-ctx.Done():
			return
		}
		if c.State().Paused {
			continue
		}
		p := c.probe(ctx, args, rules.timeout)
		if ctx.Err() != nil {
			return
		}
		crew.mu.Lock()
		before := c.health.Status
		rules.apply(c.health, p, p.Start.Sub(start))
		after := c.health.Status
		c.unit.healthy = after == HealthHealthy
		crew.change()
		crew.mu.Unlock()
		if before != after {
			c.Emit("health_status: "+after, nil)
		}
	}
}

// probe runs the check once.
func (c *Container) probe(ctx context.Context, args []string, timeout time.Duration) Probe {
	p := Probe{Start: time.Now(), ExitCode: -1}
	fail := func(text string) Probe {
		p.End, p.Output = time.Now(), text
		return p
	}
	c.pod.crew.mu.Lock()
	first := c.command
	c.pod.crew.mu.Unlock()
	if first == nil {
		return fail("the container is not running")
	}
	e := c.newExec(ExecConfig{Args: args})
	out := &tail{max: probeOutput}
	attached, ended := make(chan struct{}), make(chan struct{})
	reading, stopReading := context.WithCancel(context.WithoutCancel(ctx))
	go func() {
		defer close(ended)
		_ = e.io.Attach(reading, stdio.AttachOptions{
			Stdout: out, Stderr: out, Stream: true,
			Attached: func() error { close(attached); return nil },
		})
	}()
	defer func() {
		stopReading()
		<-ended
	}()
	<-attached
	if err := e.Start(ctx); err != nil {
		return fail(err.Error())
	}
	// What it printed is there once the streams have ended; a child that keeps them open is not waited for.
	said := func() {
		select {
		case <-ended:
		case <-time.After(time.Second):
		}
	}
	limit, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	code, err := e.Wait(limit)
	if err != nil {
		e.kill()
		if !errors.Is(err, context.DeadlineExceeded) {
			return fail(err.Error())
		}
		said()
		text := fmt.Sprintf("Health check exceeded timeout (%s)", timeout)
		if printed := out.String(); printed != "" {
			text += ": " + printed
		}
		return fail(text)
	}
	said()
	p.End, p.ExitCode, p.Output = time.Now(), code, out.String()
	return p
}

// tail keeps the beginning of what is written, bounded.
type tail struct {
	mu   sync.Mutex
	max  int
	data []byte
}

func (t *tail) Write(b []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.data = append(t.data, b[:min(len(b), t.max-len(t.data))]...)
	return len(b), nil
}

func (t *tail) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return string(t.data)
}
