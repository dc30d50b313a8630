package server

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"time"

	"github.com/hashicorp/nomad/api"

	"github.com/cradlestack/cradlestack/internal/dockerhttp"
)

// A restart policy is the pod's to follow, as long as there is one. Where its machine or its node is lost, a server that follows the namespace registers the next
// run; for one that it can't place at once, Nomad finds a node, whether a server runs or not.

// Delays between runs, docker's: doubled each time, and begun anew after a run that went well.
const (
	firstDelay = 100 * time.Millisecond
	mostDelay  = time.Minute
	wentWell   = 10 * time.Second
)

// What took a run away that did not end by itself.
const (
	lostNode    = "node"
	lostMachine = "machine"
)

var errAway = dockerhttp.Errorf(http.StatusServiceUnavailable, "the container's node does not answer: wait for it, or remove the container (docker rm -f)")

// startsAgain says whether a container's policy starts it after its newest run, which has ended. What ends by itself its pod has started again, where that was to be.
func (r *record) startsAgain() bool {
	p := &r.Host.RestartPolicy
	if r.Want != wantRunning || r.Last.Lost == "" {
		return false
	}
	return p.IsAlways() || p.IsUnlessStopped() || p.IsOnFailure() && (p.MaximumRetryCount == 0 || r.Again < p.MaximumRetryCount)
}

// restarting says whether a container that does not run waits to be started by its policy, or for a node where it can.
func (r *record) restarting() bool {
	return r.Want == wantRunning && (r.ended() || r.Again > 0)
}

func (r *record) restartDelay() time.Duration {
	if !r.Last.StartedAt.IsZero() && r.Last.FinishedAt.Sub(r.Last.StartedAt) > wentWell {
		return firstDelay
	}
	return min(firstDelay<<min(r.Again, 16), mostDelay)
}

// nextSoon is how long one that has joined waits for the other one's next run. Whoever starts that one later starts it then: see rejoin.
const nextSoon = 30 * time.Second

// startAgain starts a container after its newest run, in a while. Of several servers that do so one begins the run.
func (t *tenant) startAgain(r *record) {
	t.server.work.Go(func() {
		ctx := t.server.ctx
		if r.Joins != "" {
			soon, cancel := context.WithTimeout(ctx, nextSoon)
			err := t.watch.until(soon, func() (bool, error) { return t.hasNext(r), nil })
			if cancel(); err != nil {
				return
			}
		}
		for delay := r.restartDelay(); ; delay = min(2*delay, mostDelay) {
			select {
			case <-time.After(delay):
			case <-ctx.Done():
				return
			}
			err := t.begin(ctx, r.ID, r.Run)
			if err == nil || isNotFound(err) || ctx.Err() != nil || r.Joins != "" && !t.hasNext(r) {
				return
			}
			t.server.Log.Error("start a container by its restart policy", "container", r.ID, "error", err)
			if now, err := t.get(ctx, r.ID); err == nil {
				r = now
			}
		}
	})
}

// giveUp stops a container that waits to be started by its policy.
func (t *tenant) giveUp(ctx context.Context, c *record) error {
	now, err := t.change(ctx, c.ID, func(now *record) (bool, error) {
		if now.Want != wantRunning {
			return false, nil
		}
		now.Want = wantStopped
		if !now.ended() {
			now.Last.Number = now.Run // as the run before has ended
		}
		return true, nil
	})
	if err != nil {
		return err
	}
	t.note(c.ID, now.Last)
	return t.stopJob(ctx, now.jobID())
}

// recoverAfter is how long what a server has begun may be under way before it is nobody's.
const recoverAfter = 30 * time.Second

// recover goes on with what a server was killed in the middle of, and with what ended while there was none.
func (t *tenant) recover(ctx context.Context) error {
	all, err := t.list(ctx)
	if err != nil {
		return err
	}
	for _, r := range all {
		switch {
		case r.Joins != "" && r.Want != wantRemoved:
			switch {
			case r.Run == 0:
			case !r.ended():
				t.server.work.Go(func() { t.recoverInside(ctx, r) })
			case r.Want == wantRunning && t.hasNext(r):
				t.startAgain(r)
			}
		case r.Want == wantRunning && r.ended():
			t.startAgain(r)
		case r.Want == wantRemoved, r.Want == wantRunning && !t.watch.knows(r):
			t.server.work.Go(func() {
				select {
				case <-time.After(recoverAfter):
				case <-ctx.Done():
					return
				}
				if err := t.goOn(ctx, r.ID, r.Run); err != nil && !isNotFound(err) && ctx.Err() == nil {
					t.server.Log.Error("go on with what another server has begun", "container", r.ID, "error", err)
				}
			})
		}
	}
	return nil
}

// goOn removes a container that is to be removed. A run of which Nomad has nothing has ended: it was not begun, or ended so long ago that Nomad has forgotten it.
func (t *tenant) goOn(ctx context.Context, id string, number int) error {
	r, err := t.get(ctx, id)
	switch {
	case err != nil:
		return err
	case r.Want == wantRemoved:
		return t.remove(ctx, r, true)
	case r.Run != number || r.Want != wantRunning || r.ended() || t.watch.knows(r):
		return nil
	}
	return t.noteEnd(ctx, id, run{Number: number, FinishedAt: time.Now().UTC(), ExitCode: exitLost, Error: "Nomad has no job of it", Lost: lostMachine})
}

// watchAll follows the namespaces of all clients, though none has asked for anything yet: restart policies need somebody who notices.
func (s *Server) watchAll(listeners []net.Listener) {
	var all []Access
	for _, l := range listeners {
		if l.Addr().Network() == "unix" {
			all = append(all, s.Local)
		}
	}
	for _, a := range append(all, s.clients.all()...) {
		if _, err := s.tenantOf(a); err != nil {
			s.Log.Warn("follow a namespace", "namespace", a.Namespace, "error", err)
		}
	}
}

// isDown says whether a node does not answer. Where the token may not read nodes, none is.
func (t *tenant) isDown(ctx context.Context, node string) bool {
	n, _, err := t.nomad.Nodes().Info(node, t.query(ctx))
	return err == nil && n.Status != api.NodeStatusReady
}

// isAt notes in a container's record on which node its disk is: that of its newest run. A disk that it has left on a lost node is removed when that is back.
func (t *tenant) isAt(ctx context.Context, r *record, s podState) (changed bool, err error) {
	if s.alloc == nil || s.task == nil || s.task.StartedAt.IsZero() || s.alloc.NodeID == r.Node || !r.keepsDisk() {
		return false, nil
	}
	if r.Left != "" && r.Left != s.alloc.NodeID {
		if err := t.removeDiskAt(ctx, r.ID, r.Left); err != nil {
			return false, fmt.Errorf("remove the disk on a lost node: %w", err)
		}
	}
	r.Node, r.Left = s.alloc.NodeID, ""
	return true, nil
}
