package guest

import (
	"context"
	"net/http"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cradlestack/cradlestack/driver-cradle/guest/stdio"
	"github.com/cradlestack/cradlestack/driver-cradle/wire"
	"github.com/cradlestack/cradlestack/spec"
)

// Skeleton: signatures first, bodies follow.

type Pod struct{ bus bus }

func (p *Pod) Launch() *wire.Launch                          { return nil } // nil before the launch
func (p *Pod) Containers() []*Container                      { return nil } // in the Launch's order
func (p *Pod) Lookup(nameOrID string) (*Container, error)    { return nil, ErrNotFound }
func (p *Pod) LookupExec(id string) (*Exec, error)           { return nil, ErrNotFound }
func (p *Pod) Status() wire.Status                           { return wire.Status{} }
func (p *Pod) Wait(ctx context.Context) (wire.Status, error) { return wire.Status{}, ErrNotFound }
func (p *Pod) Shutdown(ctx context.Context, timeout time.Duration) (wire.Status, error) {
	return wire.Status{}, ErrNotFound
}
func (p *Pod) Freeze(volume string) error { return ErrNotFound }
func (p *Pod) Thaw(volume string) error   { return ErrNotFound }
func (p *Pod) Grow(volume string) error   { return ErrNotFound }
func (p *Pod) Stats() (wire.Stats, error) { return wire.Stats{}, nil }
func (p *Pod) Subscribe(since time.Time) (past []Event, live <-chan Event, cancel func()) {
	return p.bus.subscribe(since)
}

type Container struct{}

func (c *Container) Spec() spec.Container                        { return spec.Container{} }
func (c *Container) Created() time.Time                          { return time.Time{} }
func (c *Container) State() State                                { return State{} }
func (c *Container) IO() *stdio.IO                               { return nil }
func (c *Container) Emit(action string, attrs map[string]string) {} // for what vdocker does by itself: attach, archive-path, …
func (c *Container) Start(ctx context.Context) error             { return ErrInvalid }
func (c *Container) Stop(ctx context.Context, signal string, timeout *time.Duration) error {
	return ErrInvalid
}
func (c *Container) Kill(sig unix.Signal) error { return ErrInvalid }
func (c *Container) Restart(ctx context.Context, signal string, timeout *time.Duration) error {
	return ErrInvalid
}
func (c *Container) Pause() error   { return ErrInvalid }
func (c *Container) Unpause() error { return ErrInvalid }
func (c *Container) Wait(ctx context.Context, condition string) (exitCode int, errmsg string, err error) {
	return 0, "", ErrInvalid
}
func (c *Container) Resize(h, w uint16) error           { return ErrInvalid }
func (c *Container) Exec(cfg ExecConfig) (*Exec, error) { return nil, ErrInvalid }
func (c *Container) Execs() []*Exec                     { return nil }
func (c *Container) Pids() ([]int, error)               { return nil, ErrInvalid } // in the guest's pid namespace
func (c *Container) Cgroup() string                     { return "" }
func (c *Container) Rootfs() string                     { return "" }
func (c *Container) Upper() string                      { return "" }
func (c *Container) Lowers() []string                   { return nil } // lowest first

type Exec struct{}

func (e *Exec) ID() string                                         { return "" }
func (e *Exec) Container() *Container                              { return nil }
func (e *Exec) Config() ExecConfig                                 { return ExecConfig{} }
func (e *Exec) IO() *stdio.IO                                      { return nil }
func (e *Exec) State() ExecState                                   { return ExecState{} }
func (e *Exec) Start(ctx context.Context) error                    { return ErrInvalid } // attach to IO first: an exec's output is not kept
func (e *Exec) Resize(h, w uint16) error                           { return ErrInvalid }
func (e *Exec) Wait(ctx context.Context) (exitCode int, err error) { return 0, ErrInvalid }


// Main is PID 1. handler answers everything that is not a control call.
func Main(args []string, handler func(*Pod) http.Handler) int { return 1 }
