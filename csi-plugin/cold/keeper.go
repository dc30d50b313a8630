package cold

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"

	"github.com/cradlestack/cradlestack/csi-plugin/volume"
)

// A Source is a backend whose volumes can be copied.
type Source interface {
	volume.Backend
	volume.Snapshotter
	volume.Sender
}

// A Keeper saves the snapshots that were taken for cold storage, and removes copies that are too many.
type Keeper struct {
	source  Source
	vault   *Vault
	log     *slog.Logger
	pending func(context.Context, volume.Volume) (bool, error)

	copies *prometheus.CounterVec
	sent   prometheus.Counter

	mu      sync.Mutex
	volumes map[string]*state // by id
}

// A state is what is known of a volume's copies.
type state struct {
	born   time.Time
	newest time.Time // taken; the zero value is none yet
	known  bool      // newest was looked up
	used   bool      // it is none that is pending
	busy   bool
}

// NewKeeper returns one that does nothing yet. Volumes that are pending are not copied: as the volume's newest ones their copies would have the place of those of the one that is used meanwhile. metrics is nil for none.
func NewKeeper(s Source, v *Vault, log *slog.Logger, metrics prometheus.Registerer, pending func(context.Context, volume.Volume) (bool, error)) *Keeper {
	k := &Keeper{
		source: s, vault: v, log: log, pending: pending, volumes: map[string]*state{},
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
		if s.newest.After(since) {
			since = s.newest
		}
		all <- prometheus.MustNewConstMetric(ageDesc, prometheus.GaugeValue, time.Since(since).Seconds(), id)
	}
}

// atOnce is how many volumes are copied at the same time.
const atOnce = 4

// Run looks for what is to be saved whenever snapshots may have been taken, which it is told every minute, until ctx ends. What fails is tried again the next time, as
// long as it takes; local snapshots go on meanwhile.
func (k *Keeper) Run(ctx context.Context, taken <-chan struct{}) error {
	var g errgroup.Group
	g.SetLimit(atOnce)
	for {
		select {
		case <-taken:
			k.look(ctx, &g)
		case <-ctx.Done():
			return g.Wait()
		}
	}
}

// look begins a copy of each volume of which none is being made, as far as there is room for more.
func (k *Keeper) look(ctx context.Context, g *errgroup.Group) {
	all, err := k.source.List(ctx)
	if err != nil {
		if ctx.Err() == nil {
			k.log.Warn("cold storage", "error", err)
		}
		return
	}
	there := map[string]bool{}
	for _, v := range all {
		if v.Cold == (volume.Retention{}) {
			continue
		}
		there[v.ID] = true
		s := k.begin(v)
		if s == nil {
			continue
		}
		if !g.TryGo(func() error { k.copy(ctx, v, s); return nil }) {
			k.end(s)
		}
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	for id, s := range k.volumes {
		if !there[id] && !s.busy {
			delete(k.volumes, id)
		}
	}
}

// begin marks a volume busy; nil where it is.
func (k *Keeper) begin(v volume.Volume) *state {
	k.mu.Lock()
	defer k.mu.Unlock()
	s := k.volumes[v.ID]
	if s != nil && s.busy {
		return nil
	}
	if s == nil || !s.born.Equal(v.Created) {
		s = &state{born: v.Created}
		k.volumes[v.ID] = s
	}
	s.busy = true
	return s
}

func (k *Keeper) end(s *state) {
	k.mu.Lock()
	defer k.mu.Unlock()
	s.busy = false
}

func (k *Keeper) copy(ctx context.Context, v volume.Volume, s *state) {
	defer k.end(s)
	began := time.Now()
	c, sent, err := k.save(ctx, v, s)
	switch {
	case ctx.Err() != nil: // it goes on after the next start
	case err != nil:
		k.copies.WithLabelValues("failed").Inc()
		k.log.Warn("cold storage: trying again in a minute", "volume", v.ID, "error", err)
	case c != (Copy{}):
		k.copies.WithLabelValues("made").Inc()
		k.sent.Add(float64(sent))
		k.log.Info("cold storage: copied", "copy", c.String(), "sent", sent, "took", time.Since(began).Round(time.Millisecond))
	}
}

// save makes the copy of the newest snapshot, should there be none. The zero value is that there was nothing to do.
func (k *Keeper) save(ctx context.Context, v volume.Volume, s *state) (c Copy, sent int64, err error) {
	if !s.used {
		pending, err := k.pending(ctx, v)
		if err != nil || pending {
			return c, 0, err
		}
		s.used = true // from now on, without asking anybody
	}
	all, err := k.source.Snapshots(ctx, v.ID)
	snap := newest(all)
	if err != nil || snap.ID == (volume.SnapshotID{}) {
		return c, 0, err
	}
	taken := snap.Created.Truncate(time.Second)
	if s.known && !s.newest.Before(taken) {
		return c, 0, nil
	}
	base, err := k.vault.newest(ctx, v)
	if err != nil {
		return c, 0, err
	}
	k.saved(s, base.Taken)
	if !base.Taken.Before(taken) {
		return c, 0, nil
	}
	blocks, base, err := k.open(ctx, snap, all, base)
	if err != nil {
		return c, 0, fmt.Errorf("snapshot %s: %w", snap.ID, err)
	}
	c, sent, err = k.vault.Save(ctx, v, snap, blocks, base)
	if err = errors.Join(err, blocks.Close()); err != nil {
		return c, sent, err
	}
	k.saved(s, c.Taken)
	return c, sent, k.vault.Prune(ctx, v, v.Cold)
}

func (k *Keeper) saved(s *state, taken time.Time) {
	k.mu.Lock()
	defer k.mu.Unlock()
	s.newest, s.known = taken, true
}

// newest is the newest snapshot for cold storage; the zero value where there is none.
func newest(all []volume.Snapshot) (newest volume.Snapshot) {
	for _, s := range all {
		if s.ForCold() && s.Created.After(newest.Created) {
			newest = s
		}
	}
	return newest
}

// newest is the newest copy of this very volume; the zero value where there is none.
func (v *Vault) newest(ctx context.Context, of volume.Volume) (newest Copy, err error) {
	all, err := v.Copies(ctx, of.ID)
	for _, c := range all {
		if c.Born.Equal(of.Created) {
			newest = c
		}
	}
	return newest, err
}

// open opens a snapshot to be compared with what the base is a copy of. A base that can't be read is none, and all is compared; as it is where the base's snapshot has gone,
// and another one, which was taken later, has its name.
func (k *Keeper) open(ctx context.Context, snap volume.Snapshot, all []volume.Snapshot, base Copy) (*volume.Blocks, Copy, error) {
	var since volume.SnapshotID
	if base != (Copy{}) {
		info, err := k.vault.Info(ctx, base)
		switch {
		case err == nil:
			for _, s := range all {
				if s.ID.Name == info.Snapshot && s.Created.Truncate(time.Second).Equal(base.Taken) {
					since = s.ID
				}
			}
		case errors.Is(err, ErrDamaged):
			k.log.Error("cold storage: a copy can't be used", "error", err)
			base = Copy{}
		default:
			return nil, base, err
		}
	}
	blocks, err := k.source.Open(ctx, snap.ID, since)
	return blocks, base, err
}
