package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/cradlestack/cradlestack/csi-plugin/filer/ganesha"
	"github.com/cradlestack/cradlestack/csi-plugin/filer/gateway"
	"github.com/cradlestack/cradlestack/csi-plugin/filer/lease"
	"github.com/cradlestack/cradlestack/csi-plugin/filer/nfs"
	"github.com/cradlestack/cradlestack/csi-plugin/tree"
	"github.com/cradlestack/cradlestack/csi-plugin/volume"
)

// A term is a time in which this process serves: all of it for a filer that is alone, and for one of a set as long as it is the active one.
type term struct {
	*filer
	nfs     *nfs.Server     // nil of another engine
	ganesha *ganesha.Server // so is this
	listens netip.AddrPort
	group   *errgroup.Group
	cancel  context.CancelCauseFunc // ends the conversations with clients
	stop    context.CancelCauseFunc // ends what is done for long, such as rollbacks
	listen  net.Listener            // of NFS; nil where another process has it
	close   []func()                // what else begin has opened, in its order
}

// A place is what a term is about: the volumes, and where what belongs to them is kept.
type place struct {
	backend volume.Backend
	state   string // what outlasts a reboot
	kept    string // publications, and replies that the next process is to know
	shared  bool   // with other hosts
	images  bool   // a volume with a size is one
}

// begin serves what is published and granted, under the lease, until ctx ends. Whoever may use the lease does so from here on: it is opened once all is there.
func (s *server) begin(ctx context.Context, at place, by *lease.Lease, leash *os.File, log *slog.Logger) (_ *term, err error) {
	key, err := readKey(at.state)
	if err != nil {
		return nil, err
	}
	t := &term{}
	defer func() {
		if err != nil {
			err = errors.Join(err, t.end(err))
		}
	}()
	ctx, t.cancel = context.WithCancelCause(ctx)
	t.group, ctx = errgroup.WithContext(ctx)
	var engine nfs.Engine
	if s.engine == embedded || !s.trust {
		if t.listen, err = net.Listen("tcp", s.listen); err != nil {
			return nil, fmt.Errorf("--listen: %w", err)
		}
	}
	if s.engine == embedded {
		t.listens = t.listen.Addr().(*net.TCPAddr).AddrPort()
		t.nfs = nfs.New(key, log)
		t.nfs.Lease, t.nfs.Done, t.nfs.Synced = by, s.metrics.done, s.metrics.synced("nfs")
		engine = t.nfs
	} else {
		at := ganesha.Config{
			State: filepath.Join(at.state, "ganesha"), Run: filepath.Join(filepath.Dir(s.socket), "ganesha"), Mounts: s.volumes(), Key: key[:], Shared: at.shared, Trust: s.trust, Lease: by, Leash: leash, Log: log,
		}
		if at.Listen, err = resolve(s.listen); err != nil {
			return nil, err
		}
		if t.ganesha, err = ganesha.New(at); err != nil {
			return nil, fmt.Errorf("--engine ganesha: %w", err)
		}
		t.listens, engine = at.Listen, t.ganesha
	}
	address, err := reachable(s.address, t.listens)
	if err != nil {
		return nil, err
	}
	users, err := s.users.listen()
	if err != nil {
		return nil, err
	}
	if users != nil {
		t.close = append(t.close, func() { users.Close() })
	}
	t.filer = &filer{
		backend: at.backend, engine: engine, engineName: s.engine, keptBy: s.backend, dir: filepath.Dir(s.socket), state: at.state, kept: at.kept, shared: at.shared, images: at.images, audit: newAudit(at.state, log), address: address, log: log,
		since: time.Now(), entered: map[string]*visit{}, leaving: map[string]bool{}, atWork: make(chan struct{}, maxAtWork), comparing: make(chan struct{}, maxComparing), lists: tree.NewMemory(memoryOfLists()), lease: by, leash: leash, metrics: s.metrics,
	}
	t.long, t.stop = context.WithCancelCause(ctx)
	closeGateways, err := s.gateways.serve(ctx, t.group, t.filer)
	if err != nil {
		return nil, err
	}
	t.close = append(t.close, closeGateways)
	if err := t.loadReplies(); err != nil {
		log.Warn("what was answered before", "error", err)
	}
	if err := t.complete(ctx); err != nil {
		log.Warn("what was being done before", "error", err)
	}
	err = t.restore(ctx)
	if err == nil && t.ganesha != nil {
		err = t.ganesha.Forget() // publications are gone after a reboot
	}
	if err != nil {
		log.Warn("what was published before", "error", err)
	}
	if t.ganesha != nil {
		if err := t.ganesha.Start(); err != nil {
			return nil, fmt.Errorf("--engine ganesha: %w", err)
		}
	}
	by.Open()
	log.Info("serving", "engine", s.engine, "listen", t.listens, "address", address, "socket", s.socket, "version", version)
	if t.nfs != nil {
		t.group.Go(func() error { return t.nfs.Serve(ctx, t.listen) })
	} else {
		t.group.Go(func() error { return t.ganesha.Serve(ctx, t.listen) })
	}
	if users != nil {
		t.group.Go(func() error {
			return gateway.Serve(ctx, users, t.usersHandler(s.users.nomad), maxUsersHeader, by, nil, log)
		})
	}
	return t, nil
}

// put has nothing of the volumes open any more. Clients keep their connections, and wait.
func (t *term) put() {
	if t.stop != nil {
		t.stop(lease.ErrEnded)
	}
	if t.filer != nil {
		t.work.Wait()
	}
	for _, f := range slices.Backward(t.close) {
		f()
	}
	t.close = nil
	if t.filer != nil {
		if err := t.engine.Close(); err != nil {
			t.log.Warn("end NFS", "error", err)
		}
	}
}

// end ends the term, after the calls that had begun.
func (t *term) end(cause error) error {
	t.cancel(cause)
	err := t.group.Wait()
	t.put()
	if t.listen != nil {
		t.listen.Close()
	}
	return err
}
