package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cradlestack/cradlestack/csi-plugin/filer/ganesha"
	"github.com/cradlestack/cradlestack/csi-plugin/filer/lease"
)

var errLost = errors.New("the lock is lost")

// A hold is a member's time with the lock.
type hold struct {
	*member
	session string
	by      *lease.Lease
	lost    context.Context // ends when somebody else may have the lock
	lose    context.CancelCauseFunc

	mu      sync.Mutex
	armed   bool            // the pool is this member's: the lease is extended, and the warden knows until when
	ganesha *ganesha.Server // that serves; nil where another engine does
}

// hold serves as long as this member has the lock: until that is lost, until ctx ends, or somebody asks for it. former is who had it. took says that this member had
// the pool, which nobody else has had since former.
func (m *member) hold(ctx context.Context, session string, former tenure) (took bool, err error) {
	acquired := lease.Now()
	h := &hold{member: m, session: session, by: lease.New()}
	// When this process is asked to end, it hands over first.
	h.lost, h.lose = context.WithCancelCause(context.WithoutCancel(ctx))
	var g sync.WaitGroup
	abandoned := false
	defer func() {
		h.lose(nil)
		if !abandoned { // else they may wait for what comes to no end
			g.Wait()
		}
	}()
	g.Go(h.renew)
	g.Go(h.keep)
	g.Go(h.look)
	if former.Ended == "" {
		m.log.Info("waits, as the former one may not have ended", "former", former.Member)
		for !m.lock.hasEnded(h.lost, former.Session) && lease.Now()-acquired < m.set.lease {
			if ctx.Err() != nil || h.lost.Err() != nil {
				return false, nil // the next one has to wait as well
			}
			m.pause(ctx, 50*time.Millisecond)
		}
	}
	if err := m.warden.holds(session); err != nil {
		return false, err
	}
	taking := h.by.Work() // meanwhile the warden may have to kill
	h.arm(true)
	g.Go(h.rest)
	t, err := h.take(former)
	taking()
	why := ""
	var asker chan error
	if err == nil {
		m.serves(t)
		select {
		case <-h.lost.Done():
		case <-t.long.Done():
			err = context.Cause(t.long)
		case asker = <-m.ask:
			why = "switched by hand"
		case <-ctx.Done():
			why = "the filer of " + m.set.member + " was stopped"
		}
	}
	switch {
	case h.lost.Err() != nil:
		why = fmt.Sprintf("the filer of %s has stopped: %v", m.set.member, context.Cause(h.lost))
		m.log.Error("stops, as another one may serve", "reason", context.Cause(h.lost))
	case err != nil:
		why = fmt.Sprintf("%s could not serve: %v", m.set.member, err)
	}
	if abandoned = h.stop(t, why); abandoned && err == nil {
		err = context.Cause(h.lost)
	}
	if asker != nil {
		asker <- err
	}
	return true, err
}

// serves says whether, and by what, this member serves from now on.
func (m *member) serves(t *term) {
	m.metrics.serves(t)
	m.mu.Lock()
	defer m.mu.Unlock()
	m.term, m.since = t, time.Now()
	if t != nil {
		m.waits = ""
	}
}

// arm begins to extend the lease, or ends that.
func (h *hold) arm(armed bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.armed = armed
}

// renew keeps the session.
func (h *hold) renew() {
	for {
		h.pause(h.lost, sessionTTL/3)
		if h.lost.Err() != nil {
			return
		}
		ctx, cancel := context.WithTimeout(h.lost, sessionTTL/3)
		_, _, _ = h.lock.client.Session().Renew(h.session, writing(ctx)) // whether the lock is still held, keep sees
		cancel()
	}
}

// keep asks again and again whether the lock is held. Each answer that it is extends the lease, from the time of the question on.
func (h *hold) keep() {
	for last := lease.Now(); ; {
		asked := lease.Now()
		ctx, cancel := context.WithTimeout(h.lost, h.set.lease/2)
		now, _, err := h.lock.holder(ctx)
		cancel()
		switch {
		case h.lost.Err() != nil:
			return
		case err == nil && now != h.session:
			h.lose(errLost)
			return
		case err == nil:
			h.consulAnswers()
			last = asked
			if err := h.prolong(asked); err != nil {
				h.lose(err)
				return
			}
		default:
			h.noConsul(err)
			if lease.Now()-last > h.set.lease {
				h.lose(fmt.Errorf("%w for %v: %w", errNoConsul, h.set.lease, err))
				return
			}
		}
		h.pause(h.lost, h.set.lease/8-(lease.Now()-asked))
	}
}

// look loses the lock once the pool is lost: another host may reach its disks.
func (h *hold) look() {
	for ; h.lost.Err() == nil; h.pause(h.lost, h.set.lease/10) {
		if err := h.pool.lost(); err != nil {
			h.lose(err)
		}
	}
}

// prolong extends the lease. The warden knows before anybody answers by it.
func (h *hold) prolong(asked time.Duration) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if !h.armed {
		return nil
	}
	if err := h.warden.arm(asked + h.set.kills()); err != nil {
		return fmt.Errorf("tell the warden: %w", err)
	}
	h.by.Extend(asked + h.set.answers())
	return nil
}

// rest sees to it that nothing is at work once the lease has lapsed, and tells the warden that it need not kill.
func (h *hold) rest() {
	rests, told := false, false
	for ; h.lost.Err() == nil; h.pause(h.lost, h.set.lease/50) {
		lapsed, idle := h.by.Lapsed()
		h.member.mu.Lock()
		t := h.term
		h.member.mu.Unlock()
		h.mu.Lock()
		ganesha := h.ganesha
		h.mu.Unlock()
		switch {
		case !lapsed && told:
			h.log.Info("goes on")
			fallthrough
		case !lapsed:
			rests, told = false, false
			if ganesha != nil {
				ganesha.Wake()
			}
		case t != nil && !told:
			h.log.Warn("answers nobody until Consul says that it has the lock")
			told = true
		}
		if lapsed && ganesha != nil {
			ganesha.Rest() // it does not ask whether it may answer
		}
		if !lapsed || !idle || rests {
			continue
		}
		if t != nil && t.s3 != nil {
			t.s3.Rest()
		}
		h.mu.Lock()
		if lapsed, idle := h.by.Lapsed(); lapsed && idle && h.armed {
			rests = true
			if err := h.warden.disarm(); err != nil {
				h.lose(fmt.Errorf("tell the warden: %w", err))
			}
		}
		h.mu.Unlock()
	}
}

// take takes the pool, and begins to serve from it.
func (h *hold) take(before tenure) (*term, error) {
	begun := lease.Now()
	alone := make(chan error, 1)
	go func() { alone <- h.lock.alone(h.lost, h.set.member, h.hostID) }()
	now, former, err := h.lock.holder(h.lost)
	if err == nil && now != h.session {
		err = errLost
	}
	if err == nil {
		err = h.prolong(begun)
	}
	if like := <-alone; err == nil && like != nil && (h.hostID != "" || errors.Is(like, errCloned)) {
		err = like
	}
	if err != nil {
		return nil, err
	}
	asked := lease.Now()
	// Disks that do not answer keep an import for ever, and the set with it.
	stuck := time.AfterFunc(takeTime, func() {
		h.log.Error("taking the pool comes to no end: this process does")
		h.exit()
	})
	defer stuck.Stop()
	at, id, err := h.pool.take(h.lost, former.Pool, before.Ended != "" || before.Serving || before.Session == "")
	if err != nil {
		return nil, err
	}
	stuck.Stop()
	taken := lease.Now()
	if h.at != nil {
		if err := h.at.add(); err != nil {
			return nil, err
		}
	}
	t, err := h.begin(h.lost, at, h.by, h.warden.leash, h.log)
	if err != nil {
		return nil, err
	}
	serving := lease.Now()
	h.log.Info("took over", "after", (serving - begun).Round(time.Millisecond), "consul", (asked - begun).Round(time.Millisecond), "pool", (taken - asked).Round(time.Millisecond), "volumes", (serving - taken).Round(time.Millisecond))
	h.mu.Lock()
	h.ganesha = t.ganesha
	h.mu.Unlock()
	h.member.mu.Lock()
	h.tenure.Serving, h.tenure.Pool, h.tenure.Address, h.tenure.Control = true, id, t.address, h.peers.address
	tenure := h.tenure
	h.member.mu.Unlock()
	if h.at != nil {
		t.group.Go(func() error {
			h.at.announce(t.long, func(err error) { h.log.Warn("neighbours", "error", err) })
			return nil
		})
	}
	if p, ok := h.pool.(*sharedZpools); ok {
		t.group.Go(func() error { return p.guard(t.long) })
		if f, err := p.probed(); err != nil {
			h.log.Error("syncs are not watched", "error", err)
		} else {
			t.group.Go(func() error { return p.probe(t.long, f) })
		}
	}
	t.group.Go(func() error {
		for ; t.long.Err() == nil; h.pause(t.long, 200*time.Millisecond) {
			if ok, err := h.lock.tell(t.long, h.session, tenure); ok && err == nil {
				break
			}
		}
		return nil
	})
	return t, nil
}

// stop gives the pool and the lock back. As long as the lock is held, calls that have begun are answered before, and clients keep their connections until
// another filer serves: when they ask again, it is that one. abandoned says that it could not, and that what had begun is left alone.
func (h *hold) stop(t *term, why string) (abandoned bool) {
	h.serves(nil)
	if err := h.pool.lost(); err != nil {
		h.lose(err)
		h.abandon(t, err, why)
		return true
	}
	orderly := t != nil && h.lost.Err() == nil
	idle := func(patience time.Duration) error {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		return h.by.Idle(ctx)
	}
	if orderly {
		h.by.Pause()
		if idle(drainTime) != nil {
			t.stop(lease.ErrEnded)
		}
	} else {
		h.by.End()
	}
	// What does not end now, such as a call that the storage keeps, ends with this process, which the warden waits for.
	stuck := time.AfterFunc(endTime, func() {
		h.log.Error("what had begun does not end: this process does")
		h.exit()
	})
	defer stuck.Stop()
	var errs []error
	if t != nil {
		if orderly && t.ganesha != nil && t.ganesha.Trust {
			// Its clients lose their connections with the process. If they don't hear of that, they go on at once when another one has the address.
			t.ganesha.Drain()
			h.freeAddress()
		}
		t.put()
		if idle(drainTime) != nil {
			h.log.Error("what had begun does not end: this process does")
			h.exit()
		}
		if orderly && h.by.Holds() {
			errs = append(errs, t.saveReplies())
		}
		if !orderly {
			errs = append(errs, t.end(errLost))
		}
	}
	if !orderly {
		h.freeAddress() // once clients know that their connections have ended
	}
	h.arm(false)
	h.by.Lapse()
	errs = append(errs, clearMounts(h.volumes()), h.give(context.Background()))
	if err := errors.Join(errs...); err != nil {
		h.log.Warn("give the pool back", "error", err)
	}
	stuck.Stop()
	werr := h.warden.disarm()
	ctx, cancel := context.WithTimeout(context.Background(), switchTime)
	defer cancel()
	err := h.lock.ended(ctx, h.session, why)
	if err != nil {
		h.noConsul(err)
	}
	if werr = errors.Join(werr, h.warden.holds("")); werr != nil {
		h.log.Error("tell the warden", "error", werr)
	}
	if orderly {
		if err == nil {
			h.await(ctx)
		}
		h.by.End()
		if err := t.end(lease.ErrEnded); err != nil {
			h.log.Warn("end", "error", err)
		}
		h.freeAddress()
	}
	h.log.Info("serves no longer", "why", why)
	return false
}

// abandon gives the lock and the address back where the pool can't be: what had begun in it waits in the kernel, and can neither end nor do harm.
func (h *hold) abandon(t *term, reason error, why string) {
	h.log.Error("gives up what had begun", "reason", reason)
	h.by.End()
	left := make(chan struct{})
	go func() { // there may be no end of this
		defer close(left)
		if t == nil {
			return
		}
		t.cancel(errLost)
		if t.ganesha != nil {
			t.ganesha.Rest()
		}
		t.put()
	}()
	select {
	case <-left:
	case <-time.After(leaveTime):
	}
	for _, child := range children(os.Getpid()) {
		if child != h.warden.cmd.Process.Pid {
			_ = unix.Kill(child, unix.SIGKILL)
		}
	}
	h.freeAddress()
	h.arm(false)
	werr := h.warden.disarm()
	ctx, cancel := context.WithTimeout(context.Background(), switchTime)
	defer cancel()
	if err := h.lock.ended(ctx, h.session, why); err != nil {
		h.noConsul(err)
	}
	if werr = errors.Join(werr, h.warden.holds("")); werr != nil {
		h.log.Error("tell the warden", "error", werr)
	}
	h.log.Info("serves no longer", "why", why)
}

func (h *hold) freeAddress() {
	if h.at == nil {
		return
	}
	if err := h.at.remove(); err != nil {
		h.log.Warn("give the address back", "error", err)
	}
}

// await waits until another member serves, if there is one.
func (h *hold) await(ctx context.Context) {
	others, err := h.others(ctx)
	if err != nil || len(others) == 0 {
		return
	}
	for ctx.Err() == nil {
		if session, t, err := h.lock.holder(ctx); err == nil && session != "" && t.Serving {
			return
		}
		h.pause(ctx, 20*time.Millisecond)
	}
}
