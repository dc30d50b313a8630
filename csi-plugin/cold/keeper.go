package cold

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/cradlestack/cradlestack/csi-plugin/volume"
	"github.com/cradlestack/cradlestack/internal/turns"
)

// A Source is a backend whose volumes can be copied.
type Source interface {
	volume.Backend
	volume.Snapshotter
	volume.Sender
	volume.Noter
}

// A Keeper saves the snapshots that were taken for cold storage, and removes copies that are too many.
type Keeper struct {
	source Source
	vault  *Vault
	log    *slog.Logger

	copies *prometheus.CounterVec
	sent   prometheus.Counter

	compared bool // otherKey has looked

	mu      sync.Mutex
	volumes map[string]*state // by id
}

// A state is what is known of a volume's copies.
type state struct {
	born   time.Time
	newest volume.Snapshot // that is copied; the zero value is none yet
	busy   bool
}

// NewKeeper returns one that does nothing yet. metrics is nil for none.
func NewKeeper(s Source, v *Vault, log *slog.Logger, metrics prometheus.Registerer) *Keeper {
	k := &Keeper{
		source: s, vault: v, log: log, volumes: map[string]*state{},
		copies: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "cradle_csi_cold_copies_total", Help: "Copies to cold storage that were tried, by result."}, []string{"result"}),
		sent:   prometheus.NewCounter(prometheus.CounterOpts{Name: "cradle_csi_cold_sent_bytes_total", Help: "What complete copies have added to cold storage."}),
	}
	if metrics != nil {
		metrics.MustRegister(k, k.copies, k.sent)
	}
	return k
}

var ageDesc = prometheus.NewDesc("cradle_csi_cold_age_seconds", "How old the state is that the newest copy in cold storage has; of a volume without a copy, the volume's age.", []string{"volume"}, nil)

// Describe is prometheus.Collector's.
func (k *Keeper) Describe(all chan<- *prometheus.Desc) { all <- ageDesc }

// Collect is prometheus.Collector's.
func (k *Keeper) Collect(all chan<- prometheus.Metric) {
	k.mu.Lock()
	defer k.mu.Unlock()
	for id, s := range k.volumes {
		since := s.born
		if at := s.newest.Created; at.After(since) && !ahead(at) {
			since = at
		}
		all <- prometheus.MustNewConstMetric(ageDesc, prometheus.GaugeValue, max(0, time.Since(since).Seconds()), id)
	}
}

// atOnce volumes are copied at the same time. One of which nothing is read for longer than tooLong, as its storage does not answer, counts apart: as many as apart. (What is sent has an end before
// that, but to a directory that hangs, and then there is nothing that could be copied.)
const (
	atOnce  = 4
	apart   = 28
	tooLong = 5 * time.Minute
)

// lookEvery is how often Run looks for what is to be saved.
const lookEvery = time.Minute

// Run looks for what is to be saved every minute, and when it is told that snapshots were taken, until ctx ends. What fails is tried again the next time, as
// long as it takes; local snapshots go on meanwhile.
func (k *Keeper) Run(ctx context.Context, taken <-chan struct{}) error {
	g := &turns.Turns{AtOnce: atOnce, Apart: apart, Patience: tooLong}
	defer g.Wait()
	t := time.NewTicker(lookEvery)
	defer t.Stop()
	for {
		k.look(ctx, g)
		select {
		case <-taken:
		case <-t.C:
		case <-ctx.Done():
			return nil
		}
	}
}

// look begins a copy of each volume of which none is being made, and waits where there is no room for more: each has its turn.
func (k *Keeper) look(ctx context.Context, g *turns.Turns) {
	all, err := k.source.List(ctx)
	if err != nil {
		if ctx.Err() == nil {
			k.log.Warn("cold storage", "error", err)
		}
	} // which is no matter of the volumes that are there
	here := map[string]bool{}
	for _, v := range all {
		here[v.ID] = true
	}
	all = slices.DeleteFunc(all, func(v volume.Volume) bool { return !copied(v) })
	k.see(all, err == nil)
	if err := k.vault.Use(ctx, k.source); err != nil {
		if ctx.Err() == nil {
			k.copies.WithLabelValues("failed").Inc()
			k.log.Warn("cold storage: trying again in a minute", "error", err)
		}
		return
	}
	for _, v := range all {
		if s := k.begin(v); s != nil {
			if !g.Go(ctx, func(goesOn func()) { k.copy(ctx, v, s, goesOn) }) {
				k.end(s)
			}
		}
	}
	if !k.compared && ctx.Err() == nil {
		k.compared = k.otherKey(ctx, here) == nil // else copies fail as well, which say why
	}
}

// some is how many volumes of other hosts otherKey looks at.
const some = 4

// otherKey tells where copies that other hosts have made are not read with the key of this one: all goes well then until one is to be restored on another host.
func (k *Keeper) otherKey(ctx context.Context, here map[string]bool) error {
	all, err := k.vault.Copies(ctx, "")
	if err != nil {
		return err
	}
	looked := map[string]bool{}
	for _, c := range slices.Backward(all) { // the newest of each volume
		if here[c.Volume] || looked[c.Volume] || len(looked) == some {
			continue
		}
		looked[c.Volume] = true
		_, err := k.vault.Info(ctx, c)
		switch {
		case errors.Is(err, ErrKey):
			k.log.Error("cold storage: a copy of a volume that is not here was made with another key than this host has; hosts that are to restore each other's volumes have one key", "copy", c.String())
			return nil
		case err != nil && !errors.Is(err, ErrDamaged) && !errors.Is(err, volume.ErrNotFound):
			return err
		}
	}
	return nil
}

// copied says whether a volume is one that is copied. One that was made of a copy is that copy until somebody has used it: copies of it would have the place of those of the volume of its name that is in use, on another
// host, as the newest.
func copied(v volume.Volume) bool {
	return v.Cold != (volume.Retention{}) && (v.Origin.Copy == "" || v.Used)
}

// see knows volumes before it is their turn, and where these are all, no longer those that are gone.
func (k *Keeper) see(volumes []volume.Volume, all bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	there := map[string]bool{}
	for _, v := range volumes {
		there[v.ID] = true
		if s := k.volumes[v.ID]; s == nil || !s.busy && !s.born.Equal(v.Created) {
			k.volumes[v.ID] = &state{born: v.Created}
		}
	}
	for id, s := range k.volumes {
		if all && !there[id] && !s.busy {
			delete(k.volumes, id)
		}
	}
}

// begin marks a volume busy; nil where it is, or is gone.
func (k *Keeper) begin(v volume.Volume) *state {
	k.mu.Lock()
	defer k.mu.Unlock()
	s := k.volumes[v.ID]
	if s == nil || s.busy {
		return nil
	}
	s.busy = true
	return s
}

func (k *Keeper) end(s *state) {
	k.mu.Lock()
	defer k.mu.Unlock()
	s.busy = false
}

func (k *Keeper) copy(ctx context.Context, v volume.Volume, s *state, goesOn func()) {
	defer k.end(s)
	began := time.Now()
	c, sent, err := k.save(ctx, v, s, goesOn)
	switch {
	case ctx.Err() != nil: // it goes on after the next start
	case errors.Is(err, volume.ErrDeleted), err != nil && k.gone(ctx, v):
		k.log.Info("cold storage: the volume is deleted, and not copied any more", "volume", v.ID)
	case err != nil:
		k.copies.WithLabelValues("failed").Inc()
		k.log.Warn("cold storage: trying again in a minute", "volume", v.ID, "error", err)
	case c != (Copy{}):
		k.copies.WithLabelValues("made").Inc()
		k.sent.Add(float64(sent))
		k.log.Info("cold storage: copied", "copy", c.String(), "sent", sent, "took", time.Since(began).Round(time.Millisecond))
	}
}

// gone says that a volume was deleted since it was listed.
func (k *Keeper) gone(ctx context.Context, v volume.Volume) bool {
	now, err := k.source.Get(ctx, v.ID)
	return errors.Is(err, volume.ErrNotFound) || err == nil && !now.Created.Equal(v.Created)
}

// save makes the copy of the newest snapshot, should there be none. The zero value is that there was nothing to do.
func (k *Keeper) save(ctx context.Context, v volume.Volume, s *state, goesOn func()) (c Copy, sent int64, err error) {
	if s.newest.Newest(time.Now()) {
		return c, 0, nil
	}
	all, err := k.source.Snapshots(ctx, v.ID)
	snap := newest(all)
	if err != nil || snap.ID == (volume.SnapshotID{}) || same(snap, s.newest) {
		return c, 0, err
	}
	copies, err := k.vault.copiesOf(ctx, v)
	if err != nil {
		return c, 0, err
	}
	taken := snap.Created
	var base Copy
	var was volume.Snapshot // that base is a copy of
	if len(copies) > 0 {
		base = copies[len(copies)-1]
		info, err := k.vault.Info(ctx, base)
		switch {
		case err == nil:
			was = volume.Snapshot{ID: volume.SnapshotID{Volume: v.ID, Name: info.Snapshot}, Created: info.Created, Automatic: true}
			k.saved(s, was)
		case !errors.Is(err, ErrDamaged):
			return c, 0, err
		default: // all is compared
			k.log.Error("cold storage: a copy can't be used", "error", err)
			was.Created = base.Taken
		}
		// Beside one that can't be read, another one is made; it may be this host's key that is wrong.
		again := err != nil && snap.Created.Truncate(time.Second).Equal(base.Taken)
		if !again && (same(snap, was) || slices.Contains(info.Former, snap.ID.Name+"@"+snap.Created.Format(stamp)) || !ahead(was.Created) && !snap.Created.After(was.Created)) {
			return c, 0, nil
		}
		// Where the clock was ahead, and was set back since, or is behind now, copies go on being later than those before, by as much as their snapshots are.
		if !taken.Truncate(time.Second).After(base.Taken) {
			taken = base.Taken.Add(max(time.Second, snap.Created.Sub(was.Created)))
		}
		if taken.Year() > lastYear {
			return c, 0, fmt.Errorf("copy %s: nothing can be later; remove %s from cold storage, which is damaged", base, base.Object())
		}
		if err != nil {
			base = Copy{}
		}
	}
	var since volume.SnapshotID
	var former []string
	for _, s := range all {
		if base != (Copy{}) && same(s, was) {
			since = s.ID
		}
		if s.ForCold() && !same(s, snap) {
			former = append(former, s.ID.Name+"@"+s.Created.Format(stamp))
		}
	}
	blocks, err := k.source.Open(ctx, snap.ID, since)
	if err != nil {
		return c, 0, fmt.Errorf("snapshot %s: %w", snap.ID, err)
	}
	// It may have waited long for its turn: for whom has written to it, and whether it is the same one, what it was then is no answer.
	now, err := k.source.Get(ctx, v.ID)
	if err == nil && !now.Created.Equal(v.Created) {
		err = fmt.Errorf("volume %s: %w any more: there is another one of its name", v.ID, volume.ErrNotFound)
	}
	if err != nil {
		return c, 0, errors.Join(err, blocks.Close())
	}
	v = now
	blocks.ReaderAt = &watched{blocks.ReaderAt, goesOn}
	c, sent, err = k.vault.Save(ctx, v, snap, Order{taken, former}, blocks, base)
	if err == nil {
		k.saved(s, snap)
		if err := k.vault.Prune(ctx, v, v.Cold, c); err != nil && ctx.Err() == nil { // the copy is made all the same, and the next one tries again
			k.log.Error("cold storage: old copies can't be removed", "volume", v.ID, "error", err)
		}
	}
	return c, sent, errors.Join(err, blocks.Close()) // until then no other plugin saves a copy of it
}

// watched tells of each chunk that is read: the one before it, of the few that are on their way, has been sent.
type watched struct {
	io.ReaderAt
	goesOn func()
}

func (w *watched) ReadAt(p []byte, off int64) (int, error) {
	n, err := w.ReaderAt.ReadAt(p, off)
	w.goesOn()
	return n, err
}

func (k *Keeper) saved(s *state, newest volume.Snapshot) {
	k.mu.Lock()
	defer k.mu.Unlock()
	s.newest = newest
}

// same says whether two are one snapshot. One that was deleted, and taken again under its name, is another.
func same(a, b volume.Snapshot) bool {
	return a.ID == b.ID && a.Created.Truncate(time.Second).Equal(b.Created.Truncate(time.Second))
}

// ahead says whether a time is none that can have been: the clock was ahead then, or is behind now.
func ahead(t time.Time) bool { return time.Until(t) > time.Minute }

// newest is the newest snapshot for cold storage; the zero value where there is none. What was taken in the future is older than all that was not.
func newest(all []volume.Snapshot) (newest volume.Snapshot) {
	for _, s := range all {
		switch was := newest.Created; {
		case !s.ForCold():
		case was.IsZero(), ahead(was) && !ahead(s.Created), ahead(was) == ahead(s.Created) && s.Created.After(was):
			newest = s
		}
	}
	return newest
}

// copiesOf are those of this very volume, the newest last.
func (v *Vault) copiesOf(ctx context.Context, of volume.Volume) ([]Copy, error) {
	all, err := v.Copies(ctx, of.ID)
	return slices.DeleteFunc(all, func(c Copy) bool { return !c.Born.Equal(of.Created) }), err
}
