package gateway

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/cradlestack/cradlestack/csi-plugin/filer/lease"
)

// A Gate is what changes of a volume go through: while it is held none is made. The zero value is open, and a nil one is always.
type Gate struct {
	mu     sync.Mutex
	opens  chan struct{} // closed when it is held no longer; nil while it is open
	inside map[*passing]struct{}
	empty  chan struct{} // closed when the last one has left; nil where nobody waits for that
	shut   bool          // for good
}

type passing struct{ end context.CancelCauseFunc }

// ErrHeld ends a change that has taken too long for who wants to hold the gate. Whoever makes it tries again.
var ErrHeld = errors.New("the volume is being rolled back; try again")

// gatePatience is how long who holds a gate waits for changes that have begun, before they end by ErrHeld; and gateStuck how long for that: the storage may keep them.
const gatePatience, gateStuck = 10 * time.Second, time.Minute

// Enter waits until the gate is open. The change is made under the context that it returns, until leave is called.
func (g *Gate) Enter(ctx context.Context) (_ context.Context, leave func(), err error) {
	if g == nil {
		return ctx, func() {}, nil
	}
	g.mu.Lock()
	for g.opens != nil {
		opens := g.opens
		g.mu.Unlock()
		select {
		case <-opens:
		case <-ctx.Done():
			return ctx, nil, context.Cause(ctx)
		}
		g.mu.Lock()
	}
	defer g.mu.Unlock()
	if g.shut {
		return ctx, nil, ErrHeld
	}
	p := &passing{}
	ctx, p.end = context.WithCancelCause(ctx)
	if g.inside == nil {
		g.inside = map[*passing]struct{}{}
	}
	g.inside[p] = struct{}{}
	return ctx, func() {
		p.end(nil)
		g.mu.Lock()
		defer g.mu.Unlock()
		delete(g.inside, p)
		if len(g.inside) == 0 && g.empty != nil {
			close(g.empty)
			g.empty = nil
		}
	}, nil
}

// Hold lets no change begin, waits for those that have, and does something. There is one at a time. Where the storage keeps a change it is ErrStuck, and nothing is done. What ends by lease.ErrEnded is not done: another process will, and
// nobody enters here any more.
func (g *Gate) Hold(ctx context.Context, do func() error) (err error) {
	g.mu.Lock()
	if g.opens != nil {
		g.mu.Unlock()
		return errors.New("the volume is held already")
	}
	g.opens = make(chan struct{})
	empty := make(chan struct{})
	if len(g.inside) == 0 {
		close(empty)
	} else {
		g.empty = empty
	}
	g.mu.Unlock()
	defer func() {
		g.mu.Lock()
		defer g.mu.Unlock()
		close(g.opens)
		g.opens, g.empty = nil, nil
		g.shut = g.shut || errors.Is(err, lease.ErrEnded)
	}()
	select {
	case <-empty:
		return do()
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-time.After(gatePatience):
	}
	g.mu.Lock()
	for p := range g.inside {
		p.end(ErrHeld)
	}
	g.mu.Unlock()
	select {
	case <-empty:
		return do()
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-time.After(gateStuck):
		return fmt.Errorf("%w: nothing is done to the volume before it answers", ErrStuck)
	}
}
