package server

import (
	"context"
	"fmt"
	"net/http"
	"strings"

	"github.com/hashicorp/nomad/api"
	"github.com/moby/moby/api/types/events"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/cradlestack/cradlestack/internal/dockerhttp"
	"github.com/cradlestack/cradlestack/internal/nomadjob"
)

// remove removes a container: everything of it in Nomad, and its disk. It can be called again where it was interrupted.
func (t *tenant) remove(ctx context.Context, r *record, force bool) error {
	r, err := t.markRemoved(ctx, r, force)
	if isNotFound(err) {
		return nil
	}
	if err != nil {
		return err
	}
	if err := t.killNow(ctx, r); err != nil {
		return err
	}
	if r.Joins != "" {
		if err := t.leavePod(ctx, r); err != nil {
			t.removeAgain(r.ID)
			return fmt.Errorf("remove container %s: %w", r.ID, err)
		}
	}
	if err := t.handOver(ctx, r); err != nil {
		return fmt.Errorf("remove container %s: %w", r.ID, err)
	}
	g, together := errgroup.WithContext(ctx)
	g.Go(func() error { return t.purge(together, r.jobID()) })
	g.Go(func() error { return t.purge(together, attendantID(r)) })
	g.Go(func() error {
		_, err := t.nomad.Variables().Delete(nomadjob.EnvPath(r.jobID()), t.write(together))
		return err
	})
	g.Go(func() error { return t.removeDisks(together, r) })
	// The name goes before the record: a name without a container would be in the way of the next one.
	g.Go(func() error { return t.freeName(together, r.Name, r.ID) })
	if err := g.Wait(); err != nil {
		return fmt.Errorf("remove container %s: %w", r.ID, err)
	}
	if err := t.removeRecord(ctx, r); err != nil {
		return err
	}
	t.forgetLater(r.ID)
	t.watch.change(func() {}) // who waits for its removal looks again
	return nil
}

// markRemoved notes that a container is to be removed: from then on that goes on, whoever is killed.
func (t *tenant) markRemoved(ctx context.Context, r *record, force bool) (*record, error) {
	if r.Want == wantRemoved {
		return r, nil
	}
	return t.change(ctx, r.ID, func(now *record) (bool, error) {
		if now.Want == wantRemoved {
			return false, nil
		}
		if s := t.statusOf(now); !force && s.Running {
			return false, dockerhttp.Errorf(http.StatusConflict, "cannot remove container %q: container is %s: stop the container before removing or force remove", "/"+now.Name, s.Status)
		}
		now.Want = wantRemoved
		_, err := t.isAt(ctx, now, t.watch.state(now))
		return true, err
	})
}

// killNow ends a container that runs, if it can be: its machine, and with it its ports and names, is gone before it is removed. Nomad alone would ask it
// first.
func (t *tenant) killNow(ctx context.Context, r *record) error {
	p, err := t.running(r)
	if err != nil {
		return nil //nolint:nilerr // it does not run
	}
	t.awaitEnd(r, p)
	t.emitKill(ctx, r, unix.SIGKILL)
	if err := p.call(ctx, http.MethodPost, p.inside("/kill"), nil, nil, nil); err != nil {
		t.server.Log.Debug("kill a container before its removal", "container", r.ID, "error", err)
		return nil // what does not answer, or has not begun, is Nomad's to end
	}
	ctx, cancel := context.WithTimeout(ctx, killWait)
	defer cancel()
	if r.Joins != "" {
		if err := t.untilEnded(ctx, r); err != nil && ctx.Err() == nil {
			return err
		}
		return nil
	}
	if err := t.watch.until(ctx, func() (bool, error) { return t.watch.state(r).phase != phaseRunning, nil }); err != nil && ctx.Err() == nil {
		return err
	}
	return nil
}

// removeRecord is a container's end, which is told by the one who brings it about.
func (t *tenant) removeRecord(ctx context.Context, r *record) error {
	for {
		_, err := t.nomad.Variables().CheckedDelete(recordPrefix+r.ID, r.index, t.write(ctx))
		if err == nil {
			t.emitContainer(r, events.ActionDestroy, nil)
			return nil
		}
		if !isConflict(err) {
			return err
		}
		if r, err = t.get(ctx, r.ID); isNotFound(err) {
			return nil
		} else if err != nil {
			return err
		}
	}
}

// purge ends a job and lets Nomad forget it.
func (t *tenant) purge(ctx context.Context, id string) error {
	_, _, err := t.nomad.Jobs().DeregisterOpts(id, &api.DeregisterOptions{Purge: true}, t.write(ctx))
	if isGone(err) {
		return nil
	}
	return err
}

// isGone says whether Nomad has no such job, maybe because somebody else has been quicker.
func isGone(err error) bool {
	return isStatus(err, http.StatusNotFound) || err != nil && strings.Contains(err.Error(), "job not found")
}

// removerPrefix begins the id of a job that removes a disk.
const removerPrefix = jobPrefix + "rm-"

// removeDisks removes a container's disk, and one that it has left on a lost node.
func (t *tenant) removeDisks(ctx context.Context, r *record) error {
	if !r.keepsDisk() {
		return nil
	}
	for _, node := range []string{r.Node, r.Left} {
		if node == "" {
			continue
		}
		if err := t.removeDiskAt(ctx, r.ID, node); err != nil {
			return err
		}
	}
	return nil
}

// removeDiskAt asks a node to remove a container's disk. Nomad runs that as soon as the node can.
func (t *tenant) removeDiskAt(ctx context.Context, id, node string) error {
	_, _, err := t.nomad.Jobs().Register(nomadjob.RemoveDisk(removerPrefix+id+"-"+node, t.Namespace, node, id), t.write(ctx))
	return err
}
