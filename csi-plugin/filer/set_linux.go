package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	consulapi "github.com/hashicorp/consul/api"
	"github.com/spf13/pflag"

	"github.com/cradlestack/cradlestack/csi-plugin/filer/api"
	"github.com/cradlestack/cradlestack/csi-plugin/filer/gateway"
	"github.com/cradlestack/cradlestack/csi-plugin/mount"
	"github.com/cradlestack/cradlestack/csi-plugin/volume"
	"github.com/cradlestack/cradlestack/csi-plugin/zfs"
)

type setFlags struct {
	name, member, consul, floating string
	peers, peersKey                string
	lease                          time.Duration
}

func (s *setFlags) flags(f *pflag.FlagSet) {
	f.StringVar(&s.name, "set", "", "name of the set of filers that this one belongs to, of which one serves at a time, and of the active one's service in Consul (default: it is alone)")
	f.StringVar(&s.member, "member", "", "name of this filer in its set (default: the host's)")
	f.StringVar(&s.consul, "consul", "", "address of this host's Consul agent (default: $CONSUL_HTTP_ADDR, else 127.0.0.1:8500)")
	f.StringVar(&s.floating, "floating", "", "ADDRESS/BITS@INTERFACE: the address that the active filer of the set gets (default: clients find it by Consul's DNS)")
	f.StringVar(&s.peers, "peers", ":"+api.PeersPort, "address that other filers of the set, and commands and cradle-csi on other hosts, reach this one at")
	f.StringVar(&s.peersKey, "peers-key", "", "file with the key that they show, the same for all of the set (default: handles.key in the state directory)")
	f.DurationVar(&s.lease, "lease", 5*time.Second, "how long another filer of the set waits before it takes over from one of which it does not know that it has ended")
}

const (
	leaseLeast, leaseMost = 2 * time.Second, time.Minute

	drainTime  = 5 * time.Second  // for calls that have begun, at a switch
	giveTime   = 8 * time.Second  // for a pool that something still has open
	endTime    = 10 * time.Second // for what can't be ended but by itself
	switchTime = 5 * time.Second  // for the other one to serve
	takeTime   = 5 * time.Minute  // for a pool to be there, the looks of ZFS included
	countTime  = time.Second      // for status to read what is published
	clonedTime = 5 * time.Second  // before this one is asked again whether it is like another
	leaveTime  = 2 * time.Second  // for what may wait in the kernel for ever

	// A question that waits is with Consul's leader. Where that is lost with the active filer's host, nobody answers it, and another one has to be asked.
	watchTime = 2 * time.Second
	watchLate = 3 * time.Second

	sessionTTL = 15 * time.Second // Consul takes it for twice as long at most; a lease does not depend on it
)

// Parts of a lease: a filer answers until the first has passed since it has asked whether it holds the lock, its warden kills it at the second unless it stands still.
// The rest is for clocks that do not run alike, and for what the kernel is doing at that time.
func (s *setFlags) answers() time.Duration { return s.lease * 7 / 10 }
func (s *setFlags) kills() time.Duration   { return s.lease * 9 / 10 }

// A member is a filer of a set.
type member struct {
	*server
	log    *slog.Logger
	lock   lock
	pool   pool
	at     *floating // nil for none
	warden *warden
	hostID string   // of ZFS; "" where that is not the pool's
	leash  *os.File // the warden's: what has it open is waited for
	peers  *peers
	ask    chan chan error // to switch
	exit   func()          // at once

	mu     sync.Mutex
	term   *term  // nil while it does not serve
	tenure tenure // its own, or that of the active one as it was seen last
	since  time.Time
	away   time.Time // since when Consul does not answer; zero while it does
	reason error     // it does not
	waits  string    // why it has the lock and can't serve; "" if it can

	former heldBefore
}

func (s *server) runSet(ctx context.Context, control, collected net.Listener, log *slog.Logger) (err error) {
	m := &member{server: s, log: log, ask: make(chan chan error), since: time.Now()}
	m.exit = func() {
		_ = m.warden.arm(1) // in the past: it takes away what this process may not, as calls of it wait in the kernel
		os.Exit(1)
	}
	if m.set.member == "" {
		if m.set.member, err = os.Hostname(); err != nil {
			return err
		}
		m.set.member, _, _ = strings.Cut(m.set.member, ".")
	}
	for flag, name := range map[string]string{"--set": m.set.name, "--member": m.set.member} {
		if err := volume.CheckName(flag, name); err != nil {
			return err
		}
	}
	if m.set.lease < leaseLeast || m.set.lease > leaseMost {
		return fmt.Errorf("--lease %v: it is from %v to %v", m.set.lease, leaseLeast, leaseMost)
	}
	if m.at, err = parseFloating(m.set.floating); err != nil {
		return err
	}
	switch {
	case m.at != nil:
		m.address = cmp.Or(m.address, m.at.prefix.Addr().String())
	case m.address == "":
		return errors.New("--set: clients have to reach whichever filer is active: give it an address that moves with --floating, or say with --address by what name they find it")
	}
	client, err := consulapi.NewClient(consulConfig(m.set.consul))
	if err != nil {
		return fmt.Errorf("--consul: %w", err)
	}
	m.lock = lock{client, m.set.name}
	var zpools []string
	keyFile := m.set.peersKey
	if s.backend == onZFS {
		shared, err := m.sharedZpools()
		if err != nil {
			return err
		}
		if m.hostID, err = zfs.HostID(); err != nil {
			return err
		}
		if keyFile == "" {
			return errors.New("--peers-key: name the file with the key that the filers of the set show each other, the same for all: one that stands by has none of what is in the pool (head -c 32 /dev/urandom)")
		}
		m.pool, zpools = shared, shared.names
		m.metrics.zpools, m.metrics.syncing = zpools, shared.syncs
	} else {
		shared, err := m.sharedDirectories()
		if err != nil {
			return err
		}
		m.pool, keyFile = shared, cmp.Or(keyFile, filepath.Join(shared.state, handlesKey))
	}
	if err := m.clear(ctx); err != nil && m.pool.lost() == nil { // what a process that was killed has left
		return err
	}
	health, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	// The address that moves is not this host's now.
	m.peers = &peers{file: keyFile}
	others, err := m.peers.listen(m.set.peers)
	if err != nil {
		return errors.Join(err, health.Close())
	}
	m.warden, err = startWarden(charge{m.set.consul, m.set.name, m.set.member, m.set.floating, m.volumes(), zpools}, s.stderr)
	if err != nil {
		return errors.Join(err, health.Close(), others.Close())
	}
	defer m.warden.close()
	serving, end := context.WithCancel(context.WithoutCancel(ctx))
	var g sync.WaitGroup
	defer g.Wait()
	defer end()
	m.metrics.consul = m.hasConsul
	serve := func(l net.Listener, by func(context.Context, net.Listener, http.Handler) error, h http.Handler) {
		g.Go(func() {
			if err := by(serving, l, h); err != nil {
				log.Error("serve", "listen", l.Addr(), "error", err)
			}
		})
	}
	serve(health, serveHTTP, m.health())
	serve(control, serveHTTP, m.control())
	serve(others, m.peers.serve, m.control())
	if collected != nil {
		serve(collected, serveHTTP, m.metrics.handler())
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	g.Go(func() {
		select {
		case <-m.warden.dead:
			cancel(errNoWarden)
		case <-serving.Done():
		}
	})
	defer m.deregister(m.lock.memberID(m.set.member))
	g.Go(func() { m.nameActive(serving, health.Addr().String()) })
	log.Info("standing by", "set", m.set.name, "member", m.set.member, "socket", s.socket, "version", version)
	m.leash = m.warden.leash
	for out := ""; ctx.Err() == nil; { // out says why this one could not take over if it were asked to
		refuse := func(err error, pause time.Duration) {
			if m.waitsFor(err); out != err.Error() {
				log.Error("does not stand by", "error", err)
			}
			out = err.Error()
			m.deregister(m.lock.memberID(m.set.member))
			m.pause(ctx, pause)
		}
		if err := m.pool.lost(); err != nil {
			refuse(err, time.Second)
			continue
		}
		if err := m.give(ctx); err != nil {
			log.Error("give the pool back", "error", err)
			m.pause(ctx, time.Second)
			continue
		}
		m.register(ctx, health.Addr().String())
		if err := m.lock.alone(ctx, m.set.member, m.hostID); errors.Is(err, errCloned) {
			refuse(err, clonedTime+rand.N(clonedTime)) // another one may have come at the same time
			continue
		}
		if out != "" {
			out = ""
			m.waitsFor(nil)
		}
		session, former, err := m.campaign(ctx)
		if err != nil {
			if ctx.Err() == nil {
				log.Warn("take the lock", "error", err)
				m.pause(ctx, time.Second)
			}
			continue
		}
		took, err := m.hold(ctx, session, former)
		m.unsession(session, took)
		m.waitsFor(err)
		if err != nil {
			log.Error("could not serve", "error", err)
			pause := 10 * time.Second
			if errors.Is(err, volume.ErrUnavailable) {
				pause = 2 * time.Second
			}
			m.pause(ctx, pause)
		}
	}
	if errors.Is(context.Cause(ctx), errNoWarden) {
		return errNoWarden
	}
	return nil
}

var errNoWarden = errors.New("the warden has ended, without which a set's filer does not serve; start it again")

func (m *member) pause(ctx context.Context, d time.Duration) {
	select {
	case <-time.After(d):
	case <-ctx.Done():
	}
}

// clear takes away what a host that is not the active one does not have.
func (m *member) clear(ctx context.Context) (err error) {
	if m.at != nil {
		err = m.at.remove()
	}
	if lost := m.pool.lost(); lost != nil {
		return errors.Join(err, lost)
	}
	return errors.Join(err, clearMounts(m.volumes()), m.give(ctx))
}

// give gives the pool back.
func (m *member) give(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, giveTime)
	defer cancel()
	return m.pool.give(ctx)
}

// waitsFor tells to status why this member does not serve although it could have.
func (m *member) waitsFor(err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.waits = ""; err != nil {
		m.waits = err.Error()
	}
}

func (m *member) waitsNow() string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.waits
}

// volumes is the directory where volumes are mounted.
func (s *server) volumes() string { return filepath.Join(filepath.Dir(s.socket), "volumes") }

func clearMounts(mounts string) error {
	var errs []error
	entries, err := os.ReadDir(mounts)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		errs = append(errs, err)
	}
	for _, e := range entries {
		path := filepath.Join(mounts, e.Name())
		// What was acknowledged is on stable storage, and nothing of it is open.
		err := mount.Detach(path)
		if err == nil {
			err = os.Remove(path)
		}
		if errors.Is(err, fs.ErrNotExist) {
			err = nil // the warden of a former process clears as well
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// health answers Consul: at /member whether the process does, at /active whether clients are answered.
func (m *member) health() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("/member", func(http.ResponseWriter, *http.Request) {})
	mux.HandleFunc("/active", func(w http.ResponseWriter, _ *http.Request) {
		m.mu.Lock()
		defer m.mu.Unlock()
		if m.term == nil || !m.term.lease.Holds() {
			http.Error(w, "it stands by", http.StatusServiceUnavailable)
		}
	})
	return mux
}

// check notices the end of a process within a second. A process that is frozen is its warden's first.
func (m *member) check(health, path string) *consulapi.AgentServiceCheck {
	return &consulapi.AgentServiceCheck{
		Name: "cradle-filer", HTTP: "http://" + health + path, Interval: "1s", Timeout: (m.set.lease + time.Second).String(), Status: consulapi.HealthPassing,
	}
}

// register registers this process with Consul, once that answers: a session depends on it.
func (m *member) register(ctx context.Context, health string) {
	for ; ctx.Err() == nil; m.pause(ctx, 250*time.Millisecond) {
		err := m.lock.client.Agent().ServiceRegisterOpts(&consulapi.AgentServiceRegistration{
			ID: m.lock.memberID(m.set.member), Name: m.lock.membersService(), Check: m.check(health, "/member"), Meta: map[string]string{hostID: m.hostID},
		}, consulapi.ServiceRegisterOpts{}.WithContext(ctx))
		if err == nil {
			return
		}
		m.noConsul(err)
	}
}

// nameActive has Consul's DNS name this host for the set while it serves.
func (m *member) nameActive(ctx context.Context, health string) {
	m.deregister(m.lock.activeID(m.set.member)) // of a former process
	named := false
	defer func() {
		if named {
			m.deregister(m.lock.activeID(m.set.member))
		}
	}()
	for ; ctx.Err() == nil; m.pause(ctx, 200*time.Millisecond) {
		m.mu.Lock()
		serves := m.term != nil
		m.mu.Unlock()
		switch {
		case serves == named:
		case serves:
			if err := m.registerActive(health); err != nil {
				m.log.Warn("tell Consul's DNS", "error", err)
				continue
			}
			named = true
		default:
			m.deregister(m.lock.activeID(m.set.member))
			named = false
		}
	}
}

// registerActive has Consul's DNS name this host for the set.
func (m *member) registerActive(health string) error {
	m.mu.Lock()
	t := m.term
	m.mu.Unlock()
	if t == nil {
		return errLost
	}
	own := ""
	if m.at != nil {
		own = m.at.prefix.Addr().String()
	}
	address, err := reachable(own, t.listens)
	if err != nil {
		return err
	}
	host, _, err := net.SplitHostPort(address)
	if err != nil {
		return err
	}
	return m.lock.client.Agent().ServiceRegister(&consulapi.AgentServiceRegistration{
		ID: m.lock.activeID(m.set.member), Name: m.set.name, Address: host, Port: int(t.listens.Port()), Check: m.check(health, "/active"),
	})
}

func (m *member) deregister(id string) {
	if err := m.lock.client.Agent().ServiceDeregister(id); err != nil && !strings.Contains(err.Error(), "Unknown service") {
		m.log.Warn("tell Consul", "error", err)
	}
}

// noConsul and consul tell in the log and to status whether Consul answers.
func (m *member) noConsul(err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.away.IsZero() {
		m.away = time.Now()
		m.log.Warn("Consul does not answer", "error", err)
	}
	m.reason = err
}

func (m *member) hasConsul() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.away.IsZero()
}

func (m *member) consulAnswers() {
	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.away.IsZero() {
		m.log.Info("Consul answers again", "after", time.Since(m.away).Round(time.Millisecond))
		m.away, m.reason = time.Time{}, nil
	}
}

// campaign waits until this member has the lock. former is who had it. An error is worth another registration.
func (m *member) campaign(ctx context.Context) (session string, former tenure, err error) {
	for index := uint64(0); ; {
		if ctx.Err() != nil {
			return "", former, context.Cause(ctx)
		}
		asking, cancel := context.WithTimeout(ctx, watchTime+watchLate)
		p, meta, err := m.lock.client.KV().Get(m.lock.key(), (&consulapi.QueryOptions{WaitIndex: index, WaitTime: watchTime, RequireConsistent: true}).WithContext(asking))
		cancel()
		if err != nil {
			if ctx.Err() == nil {
				m.noConsul(err)
				m.pause(ctx, 250*time.Millisecond)
			}
			index = 0
			continue
		}
		m.consulAnswers()
		former, err := parseTenure(p)
		if err != nil {
			return "", former, err
		}
		if p != nil && p.Session != "" {
			if p.Session == m.former.session {
				m.unsession(m.former.session, m.former.took)
				m.pause(ctx, 50*time.Millisecond)
				index = 0
				continue
			}
			m.mu.Lock()
			m.tenure = former
			m.mu.Unlock()
			index = max(meta.LastIndex, 1)
			continue
		}
		index = 0
		session, err := m.acquire(ctx, p, former)
		if session != "" {
			return session, former, nil
		}
		if err != nil {
			return "", former, err
		}
		m.pause(ctx, 100*time.Millisecond)
	}
}

// acquire takes the lock with a new session, if nobody has taken it since p was read; "" where somebody has.
func (m *member) acquire(ctx context.Context, p *consulapi.KVPair, former tenure) (session string, err error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	session, _, err = m.lock.client.Session().Create(&consulapi.SessionEntry{
		Name: "cradle-filer " + m.set.name + " " + m.set.member, TTL: sessionTTL.String(), Behavior: consulapi.SessionBehaviorRelease,
		// Consul keeps a lock's delay in its servers' memory, and knows nothing of a holder that has ended for certain: who takes the lock waits itself.
		LockDelay:  time.Millisecond,
		NodeChecks: []string{"serfHealth"}, ServiceChecks: []consulapi.ServiceCheck{{ID: "service:" + m.lock.memberID(m.set.member)}},
	}, writing(ctx))
	if err != nil {
		return "", err
	}
	t := tenure{Member: m.set.member, Session: session, Since: time.Now().UTC(), Why: former.Ended, Pool: former.Pool}
	switch {
	case former.Session == "":
		t.Why = "nobody is known to have been before"
	case t.Why == "":
		t.Why = m.lock.fate(ctx, former.Member)
	}
	m.mu.Lock()
	m.tenure = t
	m.mu.Unlock()
	ok, err := m.lock.take(ctx, session, p, t)
	if err != nil || !ok {
		m.unsession(session, false)
		return "", err
	}
	m.log.Info("has the lock", "why", t.Why)
	return session, nil
}

// unsession ends a session, and with it a lock that it still has. took says that this process has had the pool, of which it has nothing any more.
func (m *member) unsession(session string, took bool) {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	var err error
	if took {
		err = m.lock.ended(ctx, session, "the filer of "+m.set.member+" had lost the lock")
	}
	if err == nil {
		_, err = m.lock.client.Session().Destroy(session, writing(ctx))
	}
	m.former = heldBefore{}
	if err != nil {
		m.noConsul(err)
		m.former = heldBefore{session, took}
	}
}

// A heldBefore is a session that Consul was not there to end.
type heldBefore struct {
	session string
	took    bool
}

// others are the members that stand by.
func (m *member) others(ctx context.Context) (names []string, err error) {
	all, err := m.lock.members(ctx)
	for _, name := range all {
		if name != m.set.member {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names, err
}

// control answers on the socket, whether this member is active or not.
func (m *member) control() http.Handler {
	mux := http.NewServeMux()
	handle := handleJSON(mux, m.log)
	handle("GET /status", func(r *http.Request) (any, error) { return m.status(r.Context()) })
	switchOver := http.NewServeMux()
	handleJSON(switchOver, m.log)("POST /switch", func(r *http.Request) (any, error) { return struct{}{}, m.switchOver(r.Context()) })
	mux.HandleFunc("POST /switch", m.byTheActive(func(*term) http.Handler { return switchOver }))
	mux.HandleFunc("/", m.byTheActive(func(t *term) http.Handler { return gateway.Under(t.lease, t.handler()) }))
	return mux
}

func (m *member) status(ctx context.Context) (s api.Status, err error) {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	m.mu.Lock()
	t, seen := m.term, m.tenure
	away, reason, since := m.away, m.reason, m.since
	m.mu.Unlock()
	if t != nil {
		type counted struct {
			api.Status
			error
		}
		done := make(chan counted, 1)
		go func() { // it reads files in the pool, whose disks may not answer
			s, err := t.filer.status()
			done <- counted{s, err}
		}()
		select {
		case c := <-done:
			if s, err = c.Status, c.error; err != nil {
				return s, err
			}
		case <-time.After(countTime):
		}
	}
	s.Version, s.Since = version, since
	set := &api.Set{Name: m.set.name, Member: m.set.member}
	if !away.IsZero() {
		set.Consul = fmt.Sprintf("it has not answered for %v: %v", time.Since(away).Round(time.Second), reason)
	}
	switch session, now, err := m.lock.holder(ctx); {
	case err != nil && seen.Member == m.set.member: // it was
		seen.Member, seen.Serving = "", false
	case err == nil:
		if seen = now; session == "" {
			seen.Member, seen.Serving = "", false
		}
	}
	set.Active, set.ActiveSince, set.Why, s.Address = seen.Member, seen.Since, seen.Why, cmp.Or(s.Address, seen.Address)
	set.Serving = seen.Serving
	if t != nil {
		lapsed, _ := t.lease.Lapsed()
		set.Active, set.Serving = m.set.member, !lapsed
	}
	set.Waits = m.waitsNow()
	if p, ok := m.pool.(*sharedZpools); ok && set.Waits == "" && p.syncs() > syncsLong {
		set.Waits = fmt.Sprintf("a sync of pool %s, for %v: see zpool status; no other host can have the zpool before this one has ended", p.datasets[0].Name, p.syncs().Round(time.Second))
	}
	all, err := m.lock.members(ctx)
	for _, name := range all {
		if name != set.Active {
			set.Standby = append(set.Standby, name)
		}
	}
	slices.Sort(set.Standby)
	if err != nil && set.Consul == "" {
		set.Consul = err.Error()
	}
	s.Set = set
	return s, nil
}

// switchOver has another member take over.
func (m *member) switchOver(ctx context.Context) error {
	m.mu.Lock()
	t, active := m.term, m.tenure
	m.mu.Unlock()
	if t == nil {
		return fmt.Errorf("%w: this filer stands by; ask that of %s, which is active", volume.ErrUnavailable, active.Member)
	}
	others, err := m.others(ctx)
	if err != nil {
		return fmt.Errorf("%w: who stands by: %w", volume.ErrUnavailable, err)
	}
	if len(others) == 0 {
		return fmt.Errorf("%w: no other filer of set %s stands by; start one", volume.ErrUnavailable, m.set.name)
	}
	done := make(chan error, 1)
	select {
	case m.ask <- done:
		return <-done
	case <-t.long.Done():
		return fmt.Errorf("%w: this filer is no longer the active one", volume.ErrUnavailable)
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}
